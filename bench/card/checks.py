"""Whether a card computes what it should: kernels, graphs and losses against their twins. Sections yield Markdown."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from baselines import Plain

from card.parts import replayed
from card.rig import BLOCK, Bench, Goal, Rig
from card.steps import blocks_of
from dilaserve.models import blocks
from dilaserve.models.attention import attend, each_run
from dilaserve.models.spans import Runs
from dilaserve.types import Span
from dilaserve.worker import confidence as row_statistics
from dilaserve.worker.step_arrays import columns_of
from dilaserve.worker.step_kernels import PLAIN


def kernels(bench: Bench) -> Iterator[str]:
    """On a GPU: what the CPU cannot check of them."""
    rig, device, dtype = bench.rig(), bench.device, bench.dtype
    if bench.cuda:
        used = blocks.has_kernels(device)
        bench.goals.append(Goal("Triton kernels", "used" if used else "not used", "used", used))
    vocab, mask_id = bench.shape.vocab, bench.shape.mask_id
    logits = torch.randn(256, vocab, device=device).mul_(4).to(dtype)
    logits[3], logits[5, [7, 900 % vocab]] = 1.0, 40.0
    found, twin = row_statistics.best(logits.clone(), mask_id), row_statistics.plain(logits.clone(), mask_id)
    same = (found.token == twin.token).float().mean().item()
    error = ((found.odds - twin.odds).abs() / twin.odds.clamp(min=1e-30)).max().item()
    yield f"- row statistics: {100 * same:.2f} % of tokens as the twin, odds within {error:.1e}"
    bench.goal("row statistics: tokens as the twin", 100 * same, 100.0, " %", most=False)
    bench.goal("row statistics: odds beside the twin", error, 1e-4)
    spent = replayed(bench, lambda: row_statistics.best(logits, mask_id))
    floor = logits.nbytes / bench.bandwidth
    yield f"- row statistics of [256, {vocab}]: {1e6 * spent:.0f} µs, {spent / floor:.2f} times their reading"
    ours, block = rig.model.kernels, rig.weights.blocks[0]
    x, delta = (torch.randn(64, bench.shape.width, device=device).to(dtype) for _ in range(2))
    pairs = zip(
        ours.add_norm(x, delta, block.ff_norm, 1e-5), blocks.add_norm(x, delta, block.ff_norm, 1e-5), strict=True
    )
    yield beside(bench, "sum and norm", pairs)
    fused = torch.nn.functional.linear(x, block.qkv).view(64, rig.model.groups, -1, rig.spec.head_dim)
    turns, slots = rig.model.turns[torch.arange(64, device=device)], torch.randperm(100, device=device)[:64]
    stores = [torch.zeros(100, rig.spec.kv_heads, rig.spec.head_dim, dtype=dtype, device=device) for _ in range(4)]
    heads = rig.model.q, rig.model.kv
    queries = (
        ours.place(fused, turns, slots, *stores[:2], *heads),
        blocks.place(fused, turns, slots, *stores[2:], *heads),
    )
    placed = [queries, (stores[0], stores[2]), (stores[1], stores[3])]
    yield beside(bench, "rotation and placing", placed)
    gate_up = torch.nn.functional.linear(x, block.gate_up).view(64, rig.model.groups, 2, -1)
    yield beside(bench, "gate", [(ours.gated(gate_up.clone()), blocks.gated(gate_up.clone()))])
    yield from attention(bench, rig)
    yield from replays(bench, rig)
    yield from mixed(bench, rig)


def beside(bench: Bench, what: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], most: float = 2**-7) -> str:
    """How far a kernel's results are from its twin's; a goal as well, by default two places of bfloat16."""
    apart = [float((found.float() - twin.float()).abs().max() / twin.float().abs().max()) for found, twin in pairs]
    worst = float(np.max(apart))  # NaN if one is
    bench.goal(f"{what}: difference from the twin, of the largest value", worst, most)
    return f"- {what}: {worst:.1e} from the twin"


def attention(bench: Bench, rig: Rig) -> Iterator[str]:
    """Runs of any length, and those of blocks alone, of few rows and of more."""
    pool = rig.pool
    for store in (pool.keys[0], pool.values[0]):
        store.normal_()
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int32, device=bench.device)  # noqa: E731
    for what, canvases in (
        ("runs", [200, 77, 333, 96]),
        ("two blocks", [333, 64]),
        ("blocks", [60 + 37 * i for i in range(8)]),
    ):
        even = what != "runs"
        columns = columns_of(rig.laid_out(canvases, refresh=not even))
        lengths = columns.length.tolist()
        q = torch.randn(sum(lengths), rig.spec.heads, rig.spec.head_dim, device=bench.device).to(bench.dtype)
        offsets, starts = as_tensor([0, *np.cumsum(lengths)]), as_tensor([*columns.kv_start, 0])
        runs = Runs(offsets, starts, as_tensor(columns.keys), max(lengths), rig.spec.max_length, even)
        found = attend(q, pool, 0, runs, rig.model.kernels)
        twin = each_run(q, pool.keys[0], pool.values[0], runs)
        yield beside(bench, f"attention over {what}", [(found, twin)], most=2e-2)


def replays(bench: Bench, rig: Rig) -> Iterator[str]:
    """The same batch by a graph, by the same function without one, and laid out anew."""
    lengths, found = [64 + 9 * i for i in range(5)], {}
    ways = {
        "graph": rig.runner,
        "eager": rig.runner_of(rig.steps(eager=True)),
        "plain": rig.runner_of(rig.steps(kernels=PLAIN)),
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
    graphs = rig.reuse.graphs
    yield (
        f"- {len(graphs)} graphs captured{' (eager)' if graphs.eager else ''}; of {12 * len(lengths)} "
        f"tokens {differ['eager']} differ between replay and plain call, {differ['plain']} where plain torch lays out "
        f"and unmasks, {differ['anew']} where a step is laid out anew"
    )
    for way, what in (("eager", "the same function"), ("plain", "plain torch at both ends")):
        bench.goals.append(Goal(f"graph against {what}", f"{differ[way]} differ", "0 differ", not differ[way]))
    if bench.cuda:
        count = len(graphs)
        bench.goals.append(Goal("CUDA graphs captured", str(count), "at least 1", count > 0))


def mixed(bench: Bench, rig: Rig) -> Iterator[str]:
    """A step of refresh and reuse rows: by a graph, by the same function without, and laid out anew."""
    lengths, found = [64 + 9 * i for i in range(5)], {}
    ways = {"graph": rig.forward, "eager": rig.forwards(eager=True), "anew": None}
    for way, forward in ways.items():
        list(rig.plain.steps(rig.laid_out(lengths, refresh=True, quota=2), 1))
        spans = [
            span._replace(start=span.block_start, length=BLOCK, quota=3) if row % 2 else span._replace(quota=3)
            for row, span in enumerate(rig.laid_out(lengths, refresh=True))
        ]
        list(rig.runner_of(None, forward).steps(spans, 1))
        found[way] = rig.table.canvas[: len(lengths), : max(lengths)].copy()
    differ = {way: int((found["graph"] != canvases).sum()) for way, canvases in found.items()}
    yield (
        f"- a step of refresh and reuse rows: of {3 * len(lengths)} tokens {differ['eager']} differ between replay and "
        f"plain call, {differ['anew']} where it is laid out anew"
    )
    bench.goals.append(Goal("graph of a mixed step", f"{differ['eager']} differ", "0 differ", not differ["eager"]))


def numerics(bench: Bench) -> Iterator[str]:
    """Teacher-forced: the loss of random targets in a masked block, ours in bf16 against plain float32."""
    bench.free()
    rig = bench.rig()
    reference = Plain(bench.directory, str(bench.device), torch.float32)
    lengths, found = [min(n, bench.shape.length) for n in (96, 161, 250)], []
    rng = torch.Generator().manual_seed(bench.args.seed)
    targets = torch.randint(0, 250, (len(lengths), BLOCK), generator=rng).to(bench.device)
    yield "| cache | layout | loss | float32 | relative |"
    yield "|---|---|---|---|---|"
    for kind in ("none", "prefix", "dual"):
        for layout in ("alone", "together", "mixed", "padded"):
            if layout == "padded" and kind != "dual":
                continue
            mine, theirs = losses(bench, rig, reference, kind, layout, lengths, targets)
            relative = abs(mine - theirs) / max(theirs, 1.0)  # below a nat, rounding is no longer a share of the loss
            found.append(relative)
            yield f"| {kind} | {layout} | {mine:.4f} | {theirs:.4f} | {relative:.1e} |"
    yield ""
    yield f"Inputs by --seed {bench.args.seed}."
    bench.goal("loss against float32, the worst of all", float(np.max(found)), 1e-2)


def losses(
    bench: Bench, rig: Rig, reference: Plain, kind: str, layout: str, lengths: list[int], targets: torch.Tensor
) -> tuple[float, float]:
    """Mean loss of the second step of each row (the first is a refresh), ours and the reference's.

    `mixed`: the first row is refreshed while the others reuse. `padded`: by the steps on fixed buffers, whose loss is
    that of the tokens they choose.
    """
    whole = rig.laid_out(lengths, refresh=True, seed=bench.args.seed, after=BLOCK)
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
