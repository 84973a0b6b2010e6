"""Puts a fake machine in torch's place, for a block, a process, or the workers that a program starts."""

import atexit
import contextlib
import ctypes
import os
import sys
from pathlib import Path
from unittest import mock

import torch

import fake_cuda.flash_attention  # noqa: F401 - registers the operation
from fake_cuda.machine import Machine
from fake_cuda.process_groups import Gloo, Nccl
from fake_cuda.tensors import MACHINES, Mode
from fake_cuda.torch_cuda import torch_cuda

GIB = 2**30
CUDA = 1  # of c10's device types
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"


@contextlib.contextmanager
def fake_gpus(devices=1, memory=64 * GIB, kernels=False):
    """Whatever torch does in the block, in this thread, it does as if there were so many GPUs.

    `kernels`: Triton is there; it must have been imported so that it interprets. Else it is not there at all.
    """
    machine, lifted = Machine(devices, memory), torch._C._only_lift_cpu_tensors()
    torch.set_num_threads(1)  # what stands in for a kernel is small
    MACHINES.append(machine)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in torch_cuda(machine).items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(interpreted(machine) if kernels else hidden("triton"))
            for name, value in dict(
                ProcessGroupGloo=Gloo, ProcessGroupNCCL=Nccl, is_nccl_available=lambda: True
            ).items():
                stack.enter_context(mock.patch.object(torch.distributed, name, value, create=True))
            torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device=…) asks to be moved there
            disable_device_guard()
            stack.enter_context(Mode())
            yield machine
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        MACHINES.pop()


@contextlib.contextmanager
def hidden(name):
    """Let a module be none that is installed."""
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not missing:
            sys.modules[name] = before


@contextlib.contextmanager
def interpreted(machine):
    """Let kernels of Triton run on the machine."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor, *args, **kwargs):
        machine.launched(lambda *given: run(executor, *given, **kwargs), args)

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def disable_device_guard():
    """Let CUDA's device guard be one that does nothing, also where torch was built without CUDA and so has none."""
    torch._C._ensureCUDADeviceGuardSet()
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (CUDA + 1)).in_dll(library, GUARDS)
    guards[CUDA] = guards[CUDA] or guards[0]


def install(devices, memory=64 * GIB):
    """Give this process fake GPUs for the rest of its life."""
    FOREVER.enter_context(fake_gpus(devices, memory))
    atexit.register(FOREVER.close)


FOREVER = contextlib.ExitStack()


def for_workers(devices):
    """The environment that gives worker processes fake GPUs as well."""
    return {"TORCH_FAKE_GPUS": str(devices), **with_site()}


def steps_of_a_gpu():
    """The environment in which worker processes run on their CPU, in its types, the steps that a GPU runs."""
    return {"TORCH_STEPS_OF_A_GPU": "1", **with_site()}


def with_site():
    places = [str(Path(__file__).parent / "site"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, places))}
