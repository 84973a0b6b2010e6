"""Where a reuse step's time goes, and what else its parts could be made of. Sections yield Markdown.

Each way runs through all layers, whose weights and K/V no cache of a card holds, in a graph as a step would.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, supported_activities

from card.rig import BLOCK, Bench, Rig
from card.steps import alone, drain, onward
from dilaserve.models import attention, spans
from dilaserve.types import PAGE

SHOWN = 14  # kernels of a step, the longest first
STEPS = 8  # that are profiled
SPLITS = (1, 2, 4, 8)


def parts(bench: Bench) -> Iterator[str]:
    rig = bench.rig()
    for rows in (1, 8):
        yield from kernels_of(bench, rig, rows)
    yield from attentions(bench, rig)
    yield from products(bench, rig)


def kernels_of(bench: Bench, rig: Rig, rows: int) -> Iterator[str]:
    """What a step launches, as the device's own profiler saw it; on a CPU, operations."""
    spans = rig.laid_out([min(512, rig.canvas)] * rows, refresh=False)
    spent = alone(bench, rig, rig.reuse, spans)
    on_device = ProfilerActivity.CUDA in supported_activities()
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS):
            onward(rig.reuse)
        bench.wait()
    drain(rig.reuse)
    field = "self_device_time_total" if on_device else "self_cpu_time_total"
    found = sorted(((getattr(one, field), one) for one in seen.key_averages()), key=lambda pair: -pair[0])
    total = sum(time for time, _ in found) / STEPS
    if not total:
        yield f"A step of {rows} rows takes {1e3 * spent:.2f} ms; the profiler saw no kernels here."
        return
    yield f"A step of {rows} rows takes {1e3 * spent:.2f} ms, {total / 1e3:.2f} ms of them in kernels."
    yield ""
    yield "| kernel | launches | µs | % |"
    yield "|---|---|---|---|"
    for time, one in found[:SHOWN]:
        share = 100 * time / STEPS / total
        yield f"| `{one.key[:70]}` | {one.count / STEPS:.1f} | {time / STEPS:.0f} | {share:.1f} |"
    yield ""


def attentions(bench: Bench, rig: Rig) -> Iterator[str]:
    """Of a block's queries over canvases, by each way there is."""
    spec, pool, device = rig.spec, rig.pool, bench.device
    library = attention.varlen_for(device, bench.dtype, spec.head_dim) or attention.each_run
    ways: dict[str, Callable[..., torch.Tensor]] = {"library": library}
    if rig.model.kernels.attend_even:
        from dilaserve.models.kernels import attend_even

        ways |= {f"{splits} parts": partial(attend_even, splits=splits) for splits in SPLITS}
    yield f"| rows x keys | floor, µs | {' | '.join(f'{way}, µs' for way in ways)} |"
    yield "|" + "---|" * (2 + len(ways))
    for rows, keys in ((1, 512), (1, 2048), (2, 512), (4, 512), (8, 512), (16, 256)):
        if rows * keys > pool.tokens - PAGE or keys > spec.max_length:
            continue
        q = torch.randn(rows * BLOCK, spec.heads, spec.head_dim, device=device).to(bench.dtype)
        numbers = [range(0, BLOCK * (rows + 1), BLOCK), range(0, keys * (rows + 1), keys), [keys] * rows]
        offsets, starts, used = (torch.tensor(list(one), dtype=torch.int32, device=device) for one in numbers)
        runs = spans.Runs(offsets, starts, used, BLOCK, spec.max_length, even=True)
        floor = 2 * rows * keys * spec.kv_heads * spec.head_dim * bench.dtype.itemsize / bench.bandwidth
        found = []
        for way in ways.values():

            def through(way: Callable[..., torch.Tensor] = way, q: Any = q, runs: Any = runs) -> None:
                for k, v in zip(pool.keys, pool.values, strict=True):
                    way(q, k, v, runs)

            found.append(replayed(bench, through) / spec.layers)
        yield f"| {rows} x {keys} | {1e6 * floor:.1f} | {' | '.join(f'{1e6 * one:.1f}' for one in found)} |"
    yield ""


def products(bench: Bench, rig: Rig) -> Iterator[str]:
    """Of few tokens and each weight of a layer: how much of a copy's bandwidth the reading of the weight reaches."""
    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"library": F.linear}
    if torch.version.cuda:
        ways["cuBLASLt"] = by_lt
    yield "Share of a copy's bandwidth, %:"
    yield ""
    yield f"| weight | tokens | {' | '.join(ways)} | worst difference |"
    yield "|" + "---|" * (3 + len(ways))
    blocks = rig.weights.blocks
    named = {name: [getattr(block, name) for block in blocks] for name in ("qkv", "attn_out", "gate_up", "down")}
    for name, weights in {**named, "head": [rig.weights.head]}.items():
        for tokens in (BLOCK, 2 * BLOCK, 8 * BLOCK):
            x = torch.randn(tokens, weights[0].shape[1], device=bench.device).to(bench.dtype)
            cells, differ = [], 0.0
            for multiply in ways.values():

                def through(multiply: Any = multiply, x: torch.Tensor = x, weights: Any = weights) -> None:
                    for weight in weights:
                        multiply(x, weight)

                spent = replayed(bench, through) / len(weights)
                cells.append(f"{100 * weights[0].nbytes / bench.bandwidth / spent:.0f}")
                one, other = multiply(x, weights[0]).float(), F.linear(x, weights[0]).float()
                differ = max(differ, float((one - other).abs().max() / other.abs().max()))
            yield f"| {name} | {tokens} | {' | '.join(cells)} | {differ:.1e} |"
    yield ""


def by_lt(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with preferred("cublaslt"):
        return F.linear(x, weight)


@contextlib.contextmanager
def preferred(library: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@torch.inference_mode()
def replayed(bench: Bench, run: Callable[[], None]) -> float:
    """Seconds of one run as a graph replays it."""
    if not bench.cuda:
        return bench.seconds(run, 2)
    side = torch.cuda.Stream(bench.device)
    side.wait_stream(torch.cuda.current_stream(bench.device))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream(bench.device).wait_stream(side)
    bench.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the profiler has threads of its own
        run()
    return bench.seconds(graph.replay, 5)
