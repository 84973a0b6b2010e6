"""How a step's arrays reach the device: together, in one copy through pinned memory for which no host waits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

ALIGNMENT = 16  # bytes; what any kernel may ask of where a tensor begins


class Staging:
    """The way to one device. On a CPU arrays are there already."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.pinned = torch.empty(0, dtype=torch.uint8)
        if self.cuda:
            self.gone = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, arrays: Sequence[np.ndarray[Any, Any] | None]) -> list[Any]:
        """A tensor for each array, of its shape and type, on the device; None for None."""
        if not self.cuda:
            return [None if array is None else torch.from_numpy(array) for array in arrays]
        sizes = [0 if array is None else -(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
        ends = np.cumsum(sizes).tolist()
        self.gone.synchronize()  # what was sent before has left, so its place can be filled
        if ends[-1] > len(self.pinned):
            self.pinned = torch.empty(2 * ends[-1], dtype=torch.uint8, pin_memory=True)
        host = self.pinned.numpy()
        for array, end, size in zip(arrays, ends, sizes, strict=True):
            if array is not None:
                host[end - size : end - size + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = torch.empty(ends[-1], dtype=torch.uint8, device=self.device)
        there.copy_(self.pinned[: ends[-1]], non_blocking=True)
        self.gone.record()
        return [
            array if array is None else part(there[end - size :], array)
            for array, end, size in zip(arrays, ends, sizes, strict=True)
        ]


def part(there: torch.Tensor, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The array at the beginning of these bytes."""
    return there[: array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
