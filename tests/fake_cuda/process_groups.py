"""Gloo and NCCL between workers of fake GPUs."""

import datetime
import threading
from types import SimpleNamespace

import torch

from fake_cuda.memory import fill_with_garbage, tensors_of
from fake_cuda.tensors import MACHINES, inner_of


class Gloo:
    """Gloo's process group, which takes tensors of a device through host memory and waits for the current stream."""

    real = getattr(torch.distributed, "ProcessGroupGloo", None)

    def __init__(self, *args):
        self.group = self.real(*args)

    def allreduce(self, given):
        return self.group.allreduce(self.opened(given))

    def allgather(self, out, given):
        return self.group.allgather([self.opened(one) for one in out], self.opened(given))

    def opened(self, given):
        MACHINES[-1].stream.synchronize()
        return [inner_of(one) for one in given]


class Nccl(Gloo):
    """NCCL's process group, as far as it can be told apart from here: no host learns that a peer is gone. The device
    waits until the group is aborted, and goes on with garbage.
    """

    def __init__(self, store, rank, size):
        super().__init__(store, rank, size, datetime.timedelta(minutes=30))
        self.aborted = threading.Event()

    def allreduce(self, given):
        return self.without_errors(super().allreduce, given)

    def allgather(self, out, given):
        return self.without_errors(super().allgather, out, given)

    def without_errors(self, call, *given):
        try:
            call(*given).wait()
        except RuntimeError:
            self.aborted.wait()
            fill_with_garbage(inner_of(leaf) for leaf in tensors_of(given[0]))
        return SimpleNamespace(wait=lambda: None)

    def abort(self):
        self.aborted.set()
