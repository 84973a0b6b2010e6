"""CUDA graphs of one function of fixed buffers, by the size to which its input is padded."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)


class Graphs:
    """Graphs of `run(size)`, which works on fixed buffers and never looks at the host; `what` names a size in the log.

    A graph is captured when its size is first needed, and that of the largest size before it: the smaller ones then
    find room in its memory. All share one memory pool, because one runs at a time. `prepare(size)` fills the buffers
    with padding before a capture. Where no graph can be captured, or on a CPU, `run` is called instead (`eager`).
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sequence[int],
        run: Callable[[int], None],
        prepare: Callable[[int], None],
        what: str,
        eager: bool = False,
    ) -> None:
        self.device, self.sizes, self.run, self.prepare, self.what = device, sizes, run, prepare, what
        self.cuda = device.type == "cuda"
        self.eager = eager or not self.cuda
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}
        self.memory: Any = None
        # Of each stream the library for products keeps a workspace for good: one is enough.
        self.side = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.captured)

    def replay(self, size: int) -> None:
        """Do what `run(size)` does."""
        if graph := self.captured.get(size):
            graph.replay()
        else:
            self.run(size)

    def make_ready(self, size: int) -> bool:
        """Capture the graph of this size unless it is there; whether anything was run for it."""
        if self.eager or size in self.captured or size not in self.sizes:
            return False
        try:
            for one in dict.fromkeys((max(self.sizes), size)):
                if one not in self.captured:
                    self.captured[one] = self.capture(one)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning("no CUDA graph of %d %s (%s); steps go on without graphs", size, self.what, reason)
            self.eager = True
            self.captured.clear()
        return True

    def capture(self, size: int) -> torch.cuda.CUDAGraph:
        """After one run on padding, so that all kernels are there."""
        self.rehearse(size)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
            self.run(size)
        self.memory = self.memory or graph.pool()
        return graph

    def rehearse(self, size: int) -> None:
        """Run on padding alone, beside the current stream as captures want it."""
        self.prepare(size)
        if self.side is None:
            self.run(size)
            return
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            self.run(size)
        here.wait_stream(self.side)
        torch.cuda.synchronize(self.device)
