"""The fake CUDA device finds what a real one would do wrong without a word."""

import numpy as np
import pytest
import torch
from cuda_harness import GPU, fresh_device_caches  # noqa: F401 - a fixture
from fake_cuda import Race, fake_gpus


@pytest.fixture
def machine():
    with fake_gpus() as machine:
        yield machine


def test_operations_compute_what_the_cpu_computes(machine):
    x = torch.arange(12.0, device=GPU).view(3, 4)
    x[1] = torch.tensor([7.0, 8.0, 9.0, 1.0], device=GPU)
    x[x > 8] = 0.5
    assert (x.device, x.T.contiguous().shape) == (GPU, (4, 3))
    assert x.tolist() == [[0, 1, 2, 3], [7, 8, 0.5, 1], [8, 0.5, 0.5, 0.5]]
    assert int(x.argmax()) == 5
    assert torch.from_numpy(np.ones(3)).to(GPU).float().cpu().tolist() == [1, 1, 1]
    with torch.inference_mode():
        assert torch.nn.functional.linear(x, x).cpu()[0, 0] == 14
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_devices_do_not_mix(machine):
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]


def test_a_stream_must_wait_for_another(machine):
    x, side, written = torch.zeros(3, device=GPU), torch.cuda.Stream(), torch.cuda.Event()
    x.add_(1)
    with torch.cuda.stream(side), pytest.raises(Race):
        x + 1
    written.record()
    with torch.cuda.stream(side):
        side.wait_event(written)
        y = x + 1
    with pytest.raises(Race):
        x.add_(1)
    torch.cuda.synchronize()
    assert (x.add_(1) + y).tolist() == [4, 4, 4]


def test_memory_in_use_must_not_be_freed(machine):
    x, side = torch.ones(3, device=GPU), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    del x
    with pytest.raises(Race, match="freed"):
        y + 1


def test_pinned_memory_is_looked_at_after_a_wait_and_left_alone_before(machine):
    x, host = torch.ones(3, device=GPU), torch.zeros(3, pin_memory=True)
    arrived = torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    arrived.record()
    assert host.isnan().all()
    arrived.synchronize()
    assert host.tolist() == [1, 1, 1]
    x.copy_(host, non_blocking=True)
    host[1] = 5
    with pytest.raises(Race, match="changed"):
        torch.cuda.synchronize()


def test_a_graph_is_captured_without_running_and_replayed_on_the_same_memory(machine):
    total, graph = torch.zeros(2, device=GPU), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = total.add_(1) * 2
    assert total.tolist() == [0, 0]
    for _ in range(3):
        graph.replay()
    assert total.tolist() == [3, 3]
    assert torch.isnan(inside).all()
    for waits in (lambda: total.tolist(), lambda: total.cpu(), lambda: bool(total.any()), torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            waits()


def test_memory_ends():
    with fake_gpus(memory=1000) as machine:
        kept = torch.zeros(200, device=GPU)
        with pytest.raises(torch.OutOfMemoryError):
            kept + 1
        assert torch.cuda.mem_get_info() == (200, 1000)
        del kept
        assert machine.allocated == [0]
