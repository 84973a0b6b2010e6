"""CPU tensors that say that they lie on a GPU; whatever torch does with them goes to the machine."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_cuda.memory import storage_of

MACHINES = []  # the last one is there now


class Held:
    """The CPU tensor behind a fake one; tells the machine when it is gone."""

    def __init__(self, inner, index, machine):
        self.inner, self.index, self.machine = inner, index, machine
        self.storage, self.nbytes = storage_of(inner), inner.untyped_storage().nbytes()
        machine.holds(self)

    def __del__(self):
        self.machine.release(self)


class FakeTensor(torch.Tensor):
    """What says that it lies on a GPU."""

    @staticmethod
    def __new__(cls, inner, index, machine):
        form = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), **form, device=torch.device("cuda", index), requires_grad=False
            )
        self.held = Held(inner, index, machine)
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return MACHINES[-1].run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        raise TypeError("can't convert a CUDA tensor to numpy; copy it to the host first")

    def __repr__(self):
        return f"FakeTensor({self.held.inner!r}, cuda:{self.held.index})"


class Mode(TorchDispatchMode):
    """What torch does without a tensor of the device, but for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return MACHINES[-1].run(func, args, kwargs or {})


def inner_of(leaf):
    """What an operation is given on the CPU in place of this."""
    if isinstance(leaf, FakeTensor):
        return leaf.held.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
