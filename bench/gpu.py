"""Everything that only a GPU can tell: builds a LLaDA-8B-shaped model of random weights, checks, measures, reports.

    python -m bench.gpu [--minutes 8.5] [--only kernels,reuse,…] [--directory DIR] [--out FILE]
    python -m bench.gpu --shape tiny --device cpu        # the same road in half a minute, where there is no GPU

Needs nothing but the packages of the project and no network. Floors are counted: a reuse step reads all weights once at
the bandwidth that a copy reaches, a refresh step does its operations at the rate that a large product reaches. What
others publish runs in the same process on the same weights. Weights that were never trained reach no threshold, so the
schedule is forced (`--steps` for a block of 32), the same for everybody. Writes bench/results/GPU-NAME.md and the
measured profile beside it, which `dilaserve simulate --costs` takes. A section that fails says why and the others go
on; one for which no time is left is skipped and says so.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import math
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from baselines import Plain, loop

from dilaserve import Config, Engine, Options, models, profiles
from dilaserve.calibrate import step_costs
from dilaserve.cost import Sample, fit
from dilaserve.models import layers
from dilaserve.models.checkpoint import BUNDLED_MODELS, Checkpoint
from dilaserve.models.kvcache import KVPool
from dilaserve.models.spec import Shard
from dilaserve.pages import PAGE
from dilaserve.policy.transfer import even
from dilaserve.sim.roofline import llada_8b_h200
from dilaserve.table import RequestTable
from dilaserve.terms import Decoding, Span
from dilaserve.worker import statistics as row_statistics
from dilaserve.worker.batch import columns_of
from dilaserve.worker.ends import DEPTH, PLAIN, Ends
from dilaserve.worker.reuse import ReuseSteps
from dilaserve.worker.runner import Runner

BLOCK = 32
ROOT = "model.transformer."


class Shape(NamedTuple):
    """Of a model, and of what is asked of it; `small` shapes are for what needs float32 twice."""

    layers: int
    width: int
    heads: int
    mlp: int
    vocab: int
    mask_id: int
    length: int
    prompt: int
    answer: int
    refreshes: tuple[int, ...]
    rows: tuple[int, ...]


SHAPES = {
    "llada-8b": Shape(32, 4096, 32, 12288, 126464, 126336, 4096, 200, 256, (1024, 2048, 4096), (1, 2, 4, 8, 16, 64)),
    "small": Shape(8, 1024, 8, 3072, 8192, 258, 1024, 100, 128, (512, 1024), (1, 2, 4, 8)),
    "tiny": Shape(2, 64, 4, 128, 384, 258, 512, 40, 64, (128, 256), (1, 2, 4, 8)),
}


class Goal(NamedTuple):
    what: str
    found: str
    wanted: str
    met: bool


class Bench:
    """What the sections share: the machine, the model's directory, the clock, and what was found."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args, self.directory = args, directory
        self.shape = SHAPES[args.shape]
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.ends_at = time.monotonic() + 60 * args.minutes
        self.quotas = even(BLOCK, args.steps)
        self.bandwidth = self.rate = math.nan
        self.goals: list[Goal] = []
        self.profile: profiles.ModelProfile | None = None
        self.resident: Rig | None = None

    def left(self) -> float:
        return self.ends_at - time.monotonic()

    def goal(self, what: str, value: float, wanted: float, unit: str = "", most: bool = True) -> None:
        """A figure of the issue; on a CPU only a proof that it can be measured."""
        met = value <= wanted if most else value >= wanted
        sign = "at most" if most else "at least"
        self.goals.append(Goal(what, f"{value:.3g}{unit}", f"{sign} {wanted:g}{unit}", met))

    def seconds(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Of one run on the device, the median of three series."""
        run()
        found = []
        for _ in range(3):
            self.wait()
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            self.wait()
            found.append((time.perf_counter() - began) / repeats)
        return statistics.median(found)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def rig(self) -> "Rig":
        self.resident = self.resident or Rig(self)
        return self.resident

    def free(self) -> None:
        """Leave the device to others."""
        self.resident = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def config(self, **settings: Any) -> Config:
        known = dict(
            model=str(self.directory), devices=self.args.device, max_model_len=self.shape.length, log_level="warning"
        )
        return Config.of(**{**known, **settings})


class Rig:
    """One worker's parts in this process: weights, pool, table, and a runner with steps on fixed buffers."""

    def __init__(self, bench: Bench, dtype: torch.dtype | None = None, directory: Path | None = None) -> None:
        checkpoint = Checkpoint(directory or bench.directory)
        self.spec = models.describe(checkpoint)
        family, device = models.FAMILIES[self.spec.architecture], bench.device
        dtype = dtype or bench.dtype
        began = time.perf_counter()
        tensors = checkpoint.tensors()
        self.weights = family.load(self.spec, tensors, device, dtype, lambda nbytes: None, Shard())
        bench.wait()
        self.loading = time.perf_counter() - began
        self.model = family.Model(self.spec, self.weights)
        rows = max(bench.shape.rows)
        canvas = min(512, bench.shape.length)
        tokens = max(rows * canvas, max(bench.shape.refreshes))
        flat = torch.zeros((tokens + PAGE) * self.spec.kv_elements, dtype=dtype, device=device)
        self.pool = KVPool(self.spec, Shard(), flat)
        self.table = RequestTable(rows, self.spec.max_length)
        self.reuse = self.steps()
        self.runner, self.plain = self.runner_of(self.reuse), self.runner_of(None)
        self.canvas = canvas

    def steps(self, eager: bool = False, ends: Ends | None = None) -> ReuseSteps:
        made = ReuseSteps(self.spec, self.model, self.pool, self.table.rows, eager)
        made.ends = ends or made.ends
        return made

    def runner_of(self, reuse: ReuseSteps | None) -> Runner:
        return Runner(self.spec, self.model, self.pool, self.table, (), reuse=reuse)

    @property
    def nbytes(self) -> int:
        """Weights that a step reads; of the embedding it reads next to nothing."""
        parts = [tensor for block in self.weights.blocks for tensor in block]
        return sum(tensor.nbytes for tensor in (*parts, self.weights.norm, self.weights.head))

    @property
    def products(self) -> int:
        """Multiplications of one token in all layers, without attention and head."""
        return sum(tensor.numel() for block in self.weights.blocks for tensor in block if tensor.dim() == 2)

    def laid_out(
        self, lengths: Sequence[int], refresh: bool, quota: int = 1, seed: int = 0, after: int = 0
    ) -> list[Span]:
        """Rows of these canvases, whose block before the last `after` tokens is to be filled, under the steps rule."""
        rng, spans, start = np.random.default_rng(seed), [], 0
        for row, canvas in enumerate(lengths):
            block = canvas - BLOCK - after
            self.table.fill(
                row, rng.integers(0, 250, block).astype(np.int32), canvas, self.spec.mask_id, Decoding(rule="steps")
            )
            queries = (0, canvas) if refresh else (block, BLOCK)
            spans.append(Span(row, 1, start, *queries, canvas, block, block + BLOCK, quota, 0))
            start += -(-canvas // PAGE) * PAGE
        return spans

    @torch.inference_mode()
    def block_logits(self, spans: list[Span]) -> list[torch.Tensor]:
        """Logits of each span's active block, [block, vocab] in float32, through the runner's own packing."""
        packed, _ = self.plain.pack(columns_of(spans))
        logits = self.model.logits(self.model.hidden(packed, self.pool)).float()
        widths = [span.block_end - span.block_start for span in spans]
        return list(torch.split(logits, widths))


def build(directory: Path, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> float:
    """Write a checkpoint of random weights, made on the device; returns its bytes."""
    torch.manual_seed(seed)
    files, total = {}, 0

    def made(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(sizes, device=device, dtype=dtype) * (scale * sizes[-1] ** -0.5)).cpu()

    def saved(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        named = {f"{ROOT}{name}.weight": tensor for name, tensor in tensors.items()}
        save_file(named, directory / file)
        files.update(dict.fromkeys(named, file))
        total += sum(tensor.nbytes for tensor in named.values())

    d = shape.width
    ends = {"wte": made(shape.vocab, d, scale=d**0.5), "ff_out": made(shape.vocab, d, scale=4.0)}
    saved("model-ends.safetensors", ends | {"ln_f": torch.ones(d, dtype=dtype)})
    for i in range(shape.layers):
        block = {name: made(d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        block |= {"ff_proj": made(shape.mlp, d), "up_proj": made(shape.mlp, d), "ff_out": made(d, shape.mlp)}
        block |= {name: torch.ones(d, dtype=dtype) for name in ("attn_norm", "ff_norm")}
        saved(f"model-{i:03}.safetensors", {f"blocks.{i}.{name}": tensor for name, tensor in block.items()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    bundled = BUNDLED_MODELS / "dilaserve-tiny"
    config = json.loads((bundled / "config.json").read_text())
    sizes = dict(d_model=d, n_layers=shape.layers, n_heads=shape.heads, n_kv_heads=shape.heads)
    sizes |= dict(mlp_hidden_size=shape.mlp, vocab_size=shape.vocab, embedding_size=shape.vocab)
    sizes |= dict(max_sequence_length=shape.length, mask_token_id=shape.mask_id)
    (directory / "config.json").write_text(json.dumps(config | sizes))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, directory / name)
    return total


# sections; each yields lines of Markdown


def machine(bench: Bench) -> Iterator[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    varlen = layers.varlen_for(bench.device, bench.dtype, bench.shape.width // bench.shape.heads)
    yield f"- {name_of(bench.device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, commit {commit.strip()}"
    yield f"- attention: {varlen.__qualname__ if varlen else 'SDPA by groups'}; Triton: {triton_version(bench)}"
    if bench.cuda:
        free, total = torch.cuda.mem_get_info(bench.device)
        yield f"- memory: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def triton_version(bench: Bench) -> str:
    if not layers.has_kernels(bench.device):
        return "not used"
    import triton

    return str(triton.__version__)


def roofs(bench: Bench) -> Iterator[str]:
    size = 2**32 if bench.cuda else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.bandwidth = 2 * size / bench.seconds(lambda: target.copy_(source), 10)
    n = 8192 if bench.cuda else 512
    one, other = (torch.randn(n, n, dtype=bench.dtype, device=bench.device) for _ in range(2))
    bench.rate = 2 * n**3 / bench.seconds(lambda: one @ other, 10)
    yield f"- copy: {bench.bandwidth / 1e12:.3f} TB/s, both ways; product of {n}: {bench.rate / 1e12:.1f} TFLOP/s"


def kernels(bench: Bench) -> Iterator[str]:
    """On a GPU: what the CPU cannot check of them."""
    rig, device, dtype = bench.rig(), bench.device, bench.dtype
    vocab, mask_id = bench.shape.vocab, bench.shape.mask_id
    logits = torch.randn(256, vocab, device=device).mul_(4).to(dtype)
    logits[3], logits[5, [7, 900 % vocab]] = 1.0, 40.0
    found, twin = row_statistics.best(logits.clone(), mask_id), row_statistics.plain(logits.clone(), mask_id)
    same = (found.token == twin.token).float().mean().item()
    error = ((found.odds - twin.odds).abs() / twin.odds.clamp(min=1e-30)).max().item()
    yield f"- row statistics: {100 * same:.2f} % of tokens as the twin, odds within {error:.1e}"
    spent = bench.seconds(lambda: row_statistics.best(logits, mask_id))
    floor = logits.nbytes / bench.bandwidth
    yield f"- row statistics of [256, {vocab}]: {1e6 * spent:.0f} µs, {spent / floor:.2f} times their reading"
    kit, block = rig.model.kit, rig.weights.blocks[0]
    x, delta = (torch.randn(64, bench.shape.width, device=device).to(dtype) for _ in range(2))
    pairs = zip(
        kit.add_norm(x, delta, block.ff_norm, 1e-5), layers.add_norm(x, delta, block.ff_norm, 1e-5), strict=True
    )
    yield f"- sum and norm: {worst(pairs):.1e} from the twin"
    fused = torch.nn.functional.linear(x, block.qkv).view(64, rig.model.groups, -1, rig.spec.head_dim)
    turns, slots = rig.model.turns[torch.arange(64, device=device)], torch.randperm(100, device=device)[:64]
    stores = [torch.zeros(100, rig.spec.kv_heads, rig.spec.head_dim, dtype=dtype, device=device) for _ in range(4)]
    heads = rig.model.q, rig.model.kv
    queries = (
        kit.place(fused, turns, slots, *stores[:2], *heads),
        layers.place(fused, turns, slots, *stores[2:], *heads),
    )
    placed = [queries, (stores[0], stores[2]), (stores[1], stores[3])]
    yield f"- rotation and placing: {worst(placed):.1e} from the twin"
    gate_up = torch.nn.functional.linear(x, block.gate_up).view(64, rig.model.groups, 2, -1)
    yield f"- gate: {worst([(kit.gated(gate_up.clone()), layers.gated(gate_up.clone()))]):.1e} from the twin"
    yield from attention(bench, rig)
    yield from graphs(bench, rig)


def worst(pairs: Any) -> float:
    """The largest difference, in parts of the largest value."""
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def attention(bench: Bench, rig: Rig) -> Iterator[str]:
    spans = rig.laid_out([200, 77, 333, 96], refresh=True)
    columns, pool = columns_of(spans), rig.pool
    lengths = [span.length for span in spans]
    q = torch.randn(sum(lengths), rig.spec.heads, rig.spec.head_dim, device=bench.device).to(bench.dtype)
    for store in (pool.keys[0], pool.values[0]):
        store.normal_()
    offsets = np.cumsum([0, *lengths])
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=bench.device)  # noqa: E731
    runs = layers.Runs(
        as_tensor(offsets),
        as_tensor([*columns.kv_start, 0]),
        as_tensor(columns.keys),
        max(lengths),
        rig.spec.max_length,
    )
    yield f"- attention over runs: {worst([(layers.attend(q, pool, 0, runs), layers.each_run(q, pool.keys[0], pool.values[0], runs))]):.1e} from the twin"  # noqa: E501


def graphs(bench: Bench, rig: Rig) -> Iterator[str]:
    """The same batch by a graph, by the same function without one, and laid out anew."""
    lengths, found = [64 + 9 * i for i in range(5)], {}
    ways = {
        "graph": rig.runner,
        "eager": rig.runner_of(rig.steps(eager=True)),
        "plain": rig.runner_of(rig.steps(ends=PLAIN)),
        "anew": rig.plain,
    }
    for way, runner in ways.items():
        list(rig.plain.steps(rig.laid_out(lengths, refresh=True, quota=2), 1))
        spans = [
            span._replace(start=span.block_start, length=BLOCK, quota=3)
            for span in rig.laid_out(lengths, refresh=False)
        ]
        list(runner.steps(spans, 4))
        found[way] = rig.table.canvas[: len(lengths), : max(lengths)].copy()
    differ = {way: int((found["graph"] != canvases).sum()) for way, canvases in found.items()}
    yield (
        f"- {len(rig.reuse.graphs)} graphs captured{' (eager)' if rig.reuse.eager else ''}; of {12 * len(lengths)} "
        f"tokens {differ['eager']} differ between replay and plain call, {differ['plain']} where plain torch lays out "
        f"and unmasks, {differ['anew']} where a step is laid out anew"
    )
    for way, what in (("eager", "the same function"), ("plain", "plain torch at both ends")):
        bench.goals.append(Goal(f"graph against {what}", f"{differ[way]} differ", "0 differ", not differ[way]))
    if bench.cuda:
        count = len(rig.reuse.graphs)
        bench.goals.append(Goal("CUDA graphs captured", str(count), "at least 1", count > 0))


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
            ends = spent - alone(bench, rig, rig.steps(ends=PLAIN), spans)
    yield ""
    yield f"Against plain torch at both ends of a step of one row, kernels take {1e6 * ends:+.0f} µs."
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


def blocks_of(spans: list[Span]) -> Any:
    from dilaserve.worker.batch import active_blocks

    return active_blocks(columns_of(spans))


def gaps(bench: Bench, rig: Rig, canvas: int) -> Iterator[str]:
    """What the host adds to steps in a row: their seconds on the wall against the same steps on the device alone."""
    for rows in (1, 8):
        for most in (1, 8):
            spans = rig.laid_out([canvas] * rows, refresh=False)
            mine: list[float] = []
            for _ in range(4):
                spans = rig.laid_out([canvas] * rows, refresh=False)
                list(rig.runner.steps(spans, most))
                bench.wait()
                began, count = time.perf_counter(), 0
                while count < 16:
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


def prompts_for(bench: Bench, count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(250) for _ in range(bench.shape.prompt)] for _ in range(count)]


def throughput(bench: Bench) -> Iterator[str]:
    """The published dual-cache loop first, then the engine, alone on the card each."""
    bench.free()
    answer, wanted = bench.shape.answer, bench.args.requests
    model = Plain(bench.directory, str(bench.device), bench.dtype)
    loop(model, prompts_for(bench, 1), BLOCK, BLOCK, 2.0, True, bench.quotas)
    plain = []
    for prompt in prompts_for(bench, 3):
        bench.wait()
        began = time.perf_counter()
        _, passes = loop(model, [prompt], answer, BLOCK, 2.0, True, bench.quotas)
        bench.wait()
        plain.append(time.perf_counter() - began)
    base = answer / statistics.median(plain)
    yield f"- published dual-cache loop, batch 1: {base:.1f} tokens/s, {passes} passes of {answer} tokens"
    del model
    bench.free()
    yield from asyncio.run(served(bench, base, wanted))


async def served(bench: Bench, base: float, wanted: int) -> list[str]:
    lines, blocks = [], bench.shape.answer // BLOCK
    options = Options(
        max_tokens=bench.shape.answer,
        num_denoising_steps=blocks * bench.args.steps,
        block_length=BLOCK,
        ignore_eos=True,
    )
    began = time.perf_counter()
    async with Engine(bench.config(max_num_seqs=64)) as engine:
        ready = time.perf_counter() - began
        await engine.generate(prompts_for(bench, 1)[0], Options(max_tokens=1, ignore_eos=True))
        first = time.perf_counter() - began
        lines.append(f"- start: ready after {ready:.1f} s, first token after {first:.1f} s; pool {engine.pools} tokens")
        bench.goal("start to first token, from page cache", first, 20.0, " s")
        for concurrent in (1, 8, 32, 64):
            count = {1: 3, 8: 24, 32: wanted, 64: max(64, wanted)}[concurrent]
            await crowd(engine, options, prompts_for(bench, min(count, concurrent)), concurrent)
            before = msgspec.structs.replace(engine.profile)
            spent = await crowd(engine, options, prompts_for(bench, count), concurrent)
            after = engine.profile
            speed = count * bench.shape.answer / spent
            forward = 100 * (1 - (after.forward - before.forward) / spent)
            deciding = 100 * (after.deciding - before.deciding) / spent
            steps, rows = after.steps - before.steps, after.rows - before.rows
            lines.append(
                f"- engine, {concurrent} at once: {speed:.1f} tokens/s, {speed / base:.2f} times the loop, {steps} "
                f"steps of {rows / steps:.1f} rows; {forward:.1f} % of the wall outside the model, {deciding:.2f} % in "
                "decisions"
            )
            if concurrent <= 8:
                bench.goal(f"wall outside the model, {concurrent} at once", forward, 3.0, " %")
            if concurrent == 1:
                bench.goal("tokens/s, 1 at once, over the published loop", speed / base, 1.5, most=False)
            if concurrent == 32:
                bench.goal("tokens/s, 32 at once, over the published loop", speed / base, 8.0, most=False)
            if concurrent == 64:
                bench.goal("scheduler and Python, 64 rows", forward, 5.0, " %")
    return lines


async def crowd(engine: Engine, options: Options, prompts: list[list[int]], concurrent: int) -> float:
    """Seconds for the prompts with so many in flight."""
    gate = asyncio.Semaphore(concurrent)

    async def one(prompt: list[int]) -> None:
        async with gate:
            await engine.generate(prompt, options)

    began = time.perf_counter()
    await asyncio.gather(*(one(prompt) for prompt in prompts))
    return time.perf_counter() - began


def law(bench: Bench) -> Iterator[str]:
    bench.free()
    config = bench.config(max_num_seqs=64)
    told = lambda what, done, total: None  # noqa: E731
    limit = min(1024, bench.shape.length)
    found: dict[int, list[Sample]] = asyncio.run(step_costs(config, limit, told))
    fitted = {degree: fit(samples) for degree, samples in found.items()}
    known = llada_8b_h200()
    costs = {**known.costs, **{profiles.cost_key(str(bench.device), degree): one for degree, one in fitted.items()}}
    bench.profile = msgspec.structs.replace(
        known,
        model=f"{bench.args.shape}, random weights",
        made=time.strftime("%Y-%m-%d"),
        machine=name_of(bench.device),
        costs=costs,
    )
    for degree, one in fitted.items():
        yield (
            f"- degree {degree}: {one.samples} layouts, held-out error {100 * one.error:.1f} %; a reuse step takes "
            f"{1e3 * one.fixed:.2f} ms and {1e6 * one.row:.0f} µs a row, a token {1e6 * one.token:.1f} µs"
        )
        bench.goal(f"step-cost law held out, degree {degree}", 100 * one.error, 5.0, " %")


def pair(bench: Bench) -> Iterator[str]:
    """Two workers on one card: the plan changes under load; in float32 on a small model for the tokens, then large."""
    bench.free()
    with tempfile.TemporaryDirectory() as place:
        small = Path(place)
        shape = SHAPES["small" if bench.cuda else "tiny"]
        build(small, shape, bench.device, torch.float32)
        settings = dict(
            model=str(small), dtype="float32", max_model_len=shape.length, kv_cache_tokens=16 * shape.length
        )
        lines, right = asyncio.run(replanned(bench, settings, shape, "float32, cache none"))
        yield from lines
        bench.goals.append(Goal("tokens after changes of plan, float32", "right" if right else "wrong", "right", right))
    if bench.cuda and bench.left() > 60:
        length = min(1024, bench.shape.length)
        settings = dict(kv_cache_tokens=16 * length, max_model_len=length)
        lines, _ = asyncio.run(replanned(bench, settings, bench.shape, "bfloat16, large model"))
        yield from lines


async def replanned(bench: Bench, settings: dict[str, Any], shape: Shape, what: str) -> tuple[list[str], bool]:
    devices = f"{bench.args.device},{bench.args.device}"
    config = bench.config(**{**settings, "devices": devices, "group_backend": "gloo", "plan": "1x2"})
    prompts = [prompt[: shape.prompt] for prompt in prompts_for(bench, 6)]
    options = Options(max_tokens=64, num_denoising_steps=20, cache="none", ignore_eos=True)
    async with Engine(config) as engine:
        together = [(await engine.generate(prompt, options)).token_ids for prompt in prompts[:2]]
        await engine.replan("2x1")
        alone = [(await engine.generate(prompt, options)).token_ids for prompt in prompts]
        running = asyncio.gather(*(engine.generate(prompt, options) for prompt in prompts))
        changes = []
        for plan in ("1x2", "2x1"):
            await asyncio.sleep(0.3 if bench.cuda else 0.02)
            changes.append(await engine.replan(plan))
        moved = [answer.token_ids for answer in await running]
    right = together == alone[:2] and moved == alone
    agree = np.mean([np.mean(np.array(a) == np.array(b)) for a, b in zip(moved, alone, strict=True)])
    lines = [
        f"- {what}: {100 * agree:.1f} % of tokens as without changes; at degree 2 from the start: "
        f"{'the same' if together == alone[:2] else 'others'}"
    ]
    for change in changes:
        pause = "no row moved" if change.pause is None else f"rows paused {1e3 * change.pause:.1f} ms"
        lines.append(f"  - to {len(change.after.groups)} instances: {1e3 * change.seconds:.1f} ms, {pause}")
    return lines, right


def numerics(bench: Bench) -> Iterator[str]:
    """Teacher-forced: the loss of random targets in a masked block, ours in bf16 against plain float32."""
    bench.free()
    rig = bench.rig()
    reference = Plain(bench.directory, str(bench.device), torch.float32)
    lengths, worst_one = [min(n, bench.shape.length) for n in (96, 161, 250)], 0.0
    rng = torch.Generator().manual_seed(int(time.time()))
    targets = torch.randint(0, 250, (len(lengths), BLOCK), generator=rng).to(bench.device)
    yield "| cache | layout | loss | float32 | relative |"
    yield "|---|---|---|---|---|"
    for kind in ("none", "prefix", "dual"):
        for layout in ("alone", "together", "mixed", "padded"):
            if layout == "padded" and kind != "dual":
                continue
            mine, theirs = losses(bench, rig, reference, kind, layout, lengths, targets)
            relative = abs(mine / theirs - 1)
            worst_one = max(worst_one, relative)
            yield f"| {kind} | {layout} | {mine:.4f} | {theirs:.4f} | {relative:.1e} |"
    bench.goal("loss against float32, the worst of all", worst_one, 1e-2)


def losses(
    bench: Bench, rig: Rig, reference: Plain, kind: str, layout: str, lengths: list[int], targets: torch.Tensor
) -> tuple[float, float]:
    """Mean loss of the second step of each row (the first is a refresh), ours and the reference's.

    `mixed`: the first row is refreshed while the others reuse. `padded`: by the steps on fixed buffers, whose loss is
    that of the tokens they choose.
    """
    whole = rig.laid_out(lengths, refresh=True, seed=int(time.time()), after=BLOCK)
    for spans in [[span] for span in whole] if layout == "alone" else [whole]:
        rig.block_logits(spans)
    expected, ids, caches = [], [], []
    for row, canvas in enumerate(lengths):
        x = torch.tensor(rig.table.canvas[row, :canvas].astype(np.int64), device=bench.device)[None]
        caches.append(reference.forward(x)[1])
        block = whole[row].block_start
        x[0, block : block + BLOCK // 2] = targets[row, : BLOCK // 2]
        rig.table.canvas[row, :canvas] = x[0].cpu().numpy()
        ids.append(x)
    spans = []
    for row, span in enumerate(whole):
        fresh = kind == "none" or (layout == "mixed" and row == 0)
        start = 0 if fresh else span.block_start
        end = span.keys if fresh or kind == "prefix" else span.block_end
        logits, _ = reference.forward(ids[row][:, start:end], start, None if fresh else caches[row])
        expected.append(logits[0, span.block_start - start : span.block_end - start].float())
        spans.append(span._replace(start=start, length=end - start))
    if layout == "padded":
        return chosen_losses(rig, spans, expected)
    batches = [[span] for span in spans] if layout == "alone" else [spans]
    found = [logits for batch in batches for logits in rig.block_logits(batch)]
    return loss(found, targets), loss(expected, targets)


def loss(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> float:
    """Mean over the positions that are still masked, the second half of each block."""
    half = slice(BLOCK // 2, None)
    parts = [
        torch.nn.functional.cross_entropy(one[half], wanted[half]) for one, wanted in zip(logits, targets, strict=True)
    ]
    return float(torch.stack(parts).mean())


def chosen_losses(rig: Rig, spans: list[Span], expected: list[torch.Tensor]) -> tuple[float, float]:
    columns = columns_of([span._replace(quota=BLOCK) for span in spans])
    with torch.inference_mode():
        rig.reuse.load(columns, blocks_of(spans), rig.table)
        rig.reuse.launch()
    found = rig.reuse.read()
    mine, theirs = [], []
    for row, logits in enumerate(expected):
        chosen = found.token[row] >= 0
        mine.append(-np.log(found.confidence[row][chosen]).mean())
        tokens = torch.tensor(found.token[row][chosen].astype(np.int64), device=logits.device)
        places = torch.tensor(np.flatnonzero(chosen), device=logits.device)
        theirs.append(float(torch.nn.functional.cross_entropy(logits[places], tokens)))
    return float(np.mean(mine)), float(np.mean(theirs))


SECTIONS: dict[str, tuple[str, Callable[[Bench], Iterator[str]], float]] = {  # title, section, seconds it needs
    "machine": ("Machine", machine, 0.0),
    "roofs": ("Roofs", roofs, 5.0),
    "kernels": ("Kernels against their twins", kernels, 20.0),
    "reuse": ("Reuse steps", reuse, 15.0),
    "refresh": ("Refresh steps", refresh, 10.0),
    "throughput": ("Tokens per second", throughput, 60.0),
    "law": ("Step-cost law", law, 60.0),
    "pair": ("Two workers on one card", pair, 40.0),
    "numerics": ("Numerics", numerics, 25.0),
}


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def run(bench: Bench, out: Path, built: str) -> None:
    """All sections in order, and the file after each, so that what was found stays whatever comes."""
    parts: list[str] = ["- " + built]
    for key, (title, section, needs) in SECTIONS.items():
        if key not in ("machine", "roofs") and key not in bench.args.only:
            continue
        began = time.monotonic()
        lines = [f"## {title}", ""]
        if bench.left() < needs:
            lines.append(f"Skipped: {bench.left():.0f} s were left of {bench.args.minutes:g} minutes.")
        else:
            try:
                lines += section(bench)
            except Exception:
                lines += ["", "Failed:", "", "```", traceback.format_exc().strip(), "```"]
                bench.goals.append(Goal(title, "failed", "to run", False))
                bench.free()
        lines += ["", f"({time.monotonic() - began:.1f} s)"]
        print("\n".join(lines), flush=True)
        parts += ["", *lines]
        write(bench, out, parts)
    print("\n".join(table(bench.goals, bench.cuda)))
    print(f"written to {out}")


def write(bench: Bench, out: Path, parts: list[str]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# {name_of(bench.device)}", "", f"`python -m bench.gpu --shape {bench.args.shape}`", ""]
    out.write_text("\n".join([*head, *table(bench.goals, bench.cuda), "", *parts, ""]))
    if bench.profile:
        out.with_suffix(".json").write_bytes(profiles.indented(bench.profile))


def table(goals: Sequence[Goal], cuda: bool) -> list[str]:
    """On a CPU figures of time only show that they can be measured."""
    lines = ["| what | found | wanted | |", "|---|---|---|---|"]
    verdict = {True: "met", False: "**missed**" if cuda else "no GPU"}
    return lines + [f"| {goal.what} | {goal.found} | {goal.wanted} | {verdict[goal.met]} |" for goal in goals]


def room(directory: Path | None, need: float) -> contextlib.AbstractContextManager[str]:
    """Where the checkpoint is built: the directory that was given, shared memory if it is large, else the disk."""
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        return contextlib.nullcontext(str(directory))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without clearing the room
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() and shutil.disk_usage(shared).free > 2 * need else None
    return tempfile.TemporaryDirectory(prefix="dilaserve-bench-", dir=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=8.5, help="sections that would end later are skipped")
    parser.add_argument("--steps", type=int, default=10, help="forced steps of a block of 32 (default 10)")
    parser.add_argument("--requests", type=int, default=32, help="requests at 32 at once")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--directory", type=Path, help="keep the random checkpoint here, and take it if it is there")
    parser.add_argument("--out", type=Path, help="default: bench/results/GPU-NAME.md")
    args = parser.parse_args()
    device, shape = torch.device(args.device), SHAPES[args.shape]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
    name = re.sub(r"[^A-Za-z0-9]+", "-", name_of(device)).strip("-")
    weights = shape.layers * (4 * shape.width + 3 * shape.mlp) * shape.width + 2 * shape.vocab * shape.width
    with room(args.directory, weights * dtype.itemsize) as place:
        bench = Bench(args, Path(place))
        began = time.monotonic()
        there = (Path(place) / "config.json").exists()
        total = 0.0 if there else build(Path(place), shape, device, dtype)
        took = time.monotonic() - began
        built = "weights were there" if there else f"{total / 1e9:.2f} GB of random weights written in {took:.1f} s"
        run(bench, args.out or Path("bench/results") / f"{name}.md", built)


if __name__ == "__main__":
    main()
