"""Engines on a card: tokens a second beside the published loop, the step-cost law, plans. Sections yield Markdown."""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from baselines import Plain, loop

from card.rig import BLOCK, SHAPES, Bench, Goal, Shape, build, name_of, prompts_for
from dilaserve import Engine, Options
from dilaserve.calibrate.kept import Measurements
from dilaserve.calibrate.step_timing import step_costs
from dilaserve.profile import profile_file
from dilaserve.profile.step_cost import Sample, fit
from dilaserve.sim.h200 import llada_8b_h200

T = TypeVar("T")


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
    yield from bounded(bench, served(bench, base, wanted))


def bounded(bench: Bench, work: Coroutine[Any, Any, T]) -> T:
    """Run it, and end it where it hangs, so that the other sections have their time."""
    return asyncio.run(asyncio.wait_for(work, bench.patience))


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
        lines.append(f"- start: ready after {ready:.1f} s, first token after {first:.1f} s")
        lines.append(f"- K/V pools: {engine.consumer.pools} tokens")
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
    found: dict[int, list[Sample]] = bounded(bench, step_costs(config, limit, told, Measurements()))
    fitted = {degree: fit(samples) for degree, samples in found.items()}
    known = llada_8b_h200()
    costs = {**known.costs, **{profile_file.cost_key(str(bench.device), degree): one for degree, one in fitted.items()}}
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
        lines, right = bounded(bench, replanned(bench, settings, shape, "float32, cache none"))
        yield from lines
        bench.goals.append(Goal("tokens after changes of plan, float32", "right" if right else "wrong", "right", right))
    if bench.cuda and bench.left() > 60:
        length = min(1024, bench.shape.length)
        settings = dict(kv_cache_tokens=16 * length, max_model_len=length)
        lines, _ = bounded(bench, replanned(bench, settings, bench.shape, "bfloat16, large model"))
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
