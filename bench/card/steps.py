"""How long steps take beside what they must read and compute, and what the host adds. Sections yield Markdown."""

import statistics
import time
from collections.abc import Iterator

import torch

from card.rig import BLOCK, Bench, Rig
from dilaserve.types import Span
from dilaserve.worker.graph_steps import ReuseSteps
from dilaserve.worker.step_arrays import Blocks, active_blocks, columns_of
from dilaserve.worker.step_buffers import DEPTH
from dilaserve.worker.step_kernels import PLAIN


def roofs(bench: Bench) -> Iterator[str]:
    large = bench.cuda and bench.args.shape != "tiny"
    size = 2**32 if large else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.bandwidth = 2 * size / bench.seconds(lambda: target.copy_(source), 10)
    n = 8192 if large else 512
    one, other = (torch.randn(n, n, dtype=bench.dtype, device=bench.device) for _ in range(2))
    bench.rate = 2 * n**3 / bench.seconds(lambda: one @ other, 10)
    yield f"- copy: {bench.bandwidth / 1e12:.3f} TB/s, both ways; product of {n}: {bench.rate / 1e12:.1f} TFLOP/s"


def reuse(bench: Bench) -> Iterator[str]:
    rig = bench.rig()
    canvas = min(512, rig.canvas)
    yield f"Canvases of {canvas}; floor: {rig.nbytes / 1e9:.2f} GB of weights and the rows' K/V, read once."
    yield ""
    yield "| rows | ms | floor, ms | times the floor | laid out anew, ms |"
    yield "|---|---|---|---|---|"
    for rows in bench.shape.rows:
        spans = rig.laid_out([canvas] * rows, refresh=False)
        spent = alone(bench, rig, rig.reuse, spans)
        kv = rows * canvas * rig.spec.kv_elements * bench.dtype.itemsize
        work = 2 * rows * BLOCK * (rig.products + rig.weights.head.numel()) / bench.rate
        floor = max((rig.nbytes + kv) / bench.bandwidth, work)
        anew = bench.seconds(lambda s=spans: list(rig.plain.steps(s, 1)), 3)  # type: ignore[misc]
        yield f"| {rows} | {1e3 * spent:.2f} | {1e3 * floor:.2f} | {spent / floor:.2f} | {1e3 * anew:.2f} |"
        if rows in (1, 8):
            bench.goal(f"reuse step of {rows} rows over its floor", spent / floor, 1.35)
        if rows == 1:
            outside = spent - alone(bench, rig, rig.steps(kernels=PLAIN), spans)
    yield ""
    yield f"Against plain torch at both ends of a step of one row, kernels take {1e6 * outside:+.0f} µs."
    yield ""
    yield from gaps(bench, rig, canvas)


def alone(bench: Bench, rig: Rig, steps: ReuseSteps, spans: list[Span]) -> float:
    """Seconds of a step on the device, one behind the other."""
    with torch.inference_mode():
        steps.load(columns_of(spans), blocks_of(spans), rig.table)
    spent = bench.seconds(lambda: onward(steps))
    drain(steps)
    return spent


def onward(steps: ReuseSteps) -> None:
    """Begin a step, with as many before it under way as there may be."""
    if steps.launched - steps.seen == DEPTH:
        steps.read()
    with torch.inference_mode():
        steps.launch()


def drain(steps: ReuseSteps) -> None:
    """Read what is under way."""
    while steps.launched > steps.seen:
        steps.read()


def blocks_of(spans: list[Span]) -> Blocks:
    return active_blocks(columns_of(spans))


def gaps(bench: Bench, rig: Rig, canvas: int) -> Iterator[str]:
    """What the host adds to steps in a row: their seconds on the wall against the same steps on the device alone."""
    for rows in (1, 8):
        for most in (1, 8):
            mine: list[float] = []
            for _ in range(bench.repeats(4)):
                spans = rig.laid_out([canvas] * rows, refresh=False)
                list(rig.runner.steps(spans, most))
                bench.wait()
                began, count = time.perf_counter(), 0
                while count < bench.repeats(16):
                    count += len(list(rig.runner.steps(spans, most)))
                bench.wait()
                mine.append((time.perf_counter() - began) / count)

            spent = alone(bench, rig, rig.reuse, spans)
            gap = 100 * (1 - spent / statistics.median(mine))
            yield f"- {rows} rows, {most} steps a launch: idle {gap:.1f} % of a step of {1e3 * spent:.2f} ms"
            if most == 8:
                bench.goal(f"idle gap, {rows} rows, 8 steps a launch", gap, 3.0, " %")


def refresh(bench: Bench) -> Iterator[str]:
    rig = bench.rig()
    yield from small_refreshes(bench, rig)
    yield "| tokens | canvases | ms | TFLOP/s | of the product's rate |"
    yield "|---|---|---|---|---|"
    for tokens in bench.shape.refreshes:
        for canvas in sorted({min(1024, tokens), tokens}):
            rows = tokens // canvas
            if rows > rig.table.rows or canvas > rig.spec.max_length:
                continue
            spans = rig.laid_out([canvas] * rows, refresh=True)
            spent = bench.seconds(lambda s=spans: list(rig.plain.steps(s, 1)), 3)  # type: ignore[misc]
            attended = 4 * tokens * canvas * bench.shape.width * bench.shape.layers
            done = 2 * tokens * rig.products + attended + 2 * rows * BLOCK * rig.weights.head.numel()
            share = 100 * done / spent / bench.rate
            yield f"| {tokens} | {rows} x {canvas} | {1e3 * spent:.2f} | {done / spent / 1e12:.1f} | {share:.0f} % |"
            bench.goal(f"refresh of {rows} x {canvas} tokens", share, 60.0, " %", most=False)


def small_refreshes(bench: Bench, rig: Rig) -> Iterator[str]:
    """What the host's launches cost where a step computes little, and what a graph leaves of it."""
    yield "| tokens of one canvas | launched one by one, ms | forward pass as a graph, ms |"
    yield "|---|---|---|"
    for tokens in (64, 128, 256, 384, 512, 640, 768):
        if tokens > min(rig.spec.max_length, rig.pool.tokens):
            continue
        spans = rig.laid_out([tokens], refresh=True)
        ways = [bench.seconds(lambda r=r, s=spans: list(r.steps(s, 1)), 5) for r in (rig.plain, rig.replayed)]  # type: ignore[misc]
        yield f"| {tokens} | {1e3 * ways[0]:.2f} | {1e3 * ways[1]:.2f} |"
    yield ""
