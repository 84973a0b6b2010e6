"""A model runner on the fake GPU."""

import pytest
import torch
from runner_harness import Harness as Plain

from dilaserve.models import attention, blocks

GPU = torch.device("cuda:0")


def forget():
    """What was found out about a device must not outlive it."""
    blocks.has_kernels.cache_clear()
    attention.varlen_for.cache_clear()


@pytest.fixture(autouse=True)
def fresh_device_caches():
    yield
    forget()


class Harness(Plain):
    """In bfloat16, with its reuse steps on fixed buffers."""

    def __init__(self, directory, device, eager=False, **sizes):
        super().__init__(directory, True, device, torch.bfloat16, eager=eager, **sizes)

    def laid_out(self, shapes):
        """Rows of (prompt, block, answer) as spans for a refresh, and to reuse it."""
        self.fill(shapes)
        return self.spans(shapes, refresh=True), self.spans(shapes, refresh=False)

    def denoised(self, shapes, launches=6, most=4):
        """The canvases after a refresh and launches of several steps."""
        refresh, reuse = self.laid_out(shapes)
        list(self.runner.steps(refresh, 1))
        for _ in range(launches):
            list(self.runner.steps(reuse, most))
        return self.table.canvas.copy()
