"""What all sections share: the machine, the clock, the checkpoint, and one worker's parts in this process."""

import argparse
import contextlib
import gc
import json
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from dilaserve import Config, models
from dilaserve.models.checkpoint import BUNDLED_MODELS, Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spec import Shard
from dilaserve.profile import profile_file
from dilaserve.scheduler.rules.quotas import even
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import PAGE, Decoding, Span
from dilaserve.worker.forward_graphs import TOKENS, ForwardGraphs
from dilaserve.worker.graph_steps import ReuseSteps
from dilaserve.worker.model_runner import Runner
from dilaserve.worker.step_arrays import columns_of
from dilaserve.worker.step_buffers import StepKernels

BLOCK = 32
FEW = 1  # runs of what is measured on a tiny shape
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
    "tiny": Shape(2, 64, 4, 128, 384, 258, 512, 40, 64, (128, 256), (1, 8)),
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
        self.patience = 60.0 * args.minutes  # seconds that engines of a section may take
        self.quotas = even(BLOCK, args.steps)
        self.bandwidth = self.rate = math.nan
        self.goals: list[Goal] = []
        self.profile: profile_file.ModelProfile | None = None
        self.resident: Rig | None = None

    def left(self) -> float:
        return self.ends_at - time.monotonic()

    def goal(self, what: str, value: float, wanted: float, unit: str = "", most: bool = True) -> None:
        """A figure of the issue; on a CPU only a proof that it can be measured."""
        met = value <= wanted if most else value >= wanted
        sign = "at most" if most else "at least"
        self.goals.append(Goal(what, f"{value:.3g}{unit}", f"{sign} {wanted:g}{unit}", met))

    def repeats(self, wanted: int) -> int:
        """Runs of what is measured: few on a tiny shape, whose figures only show that they can be measured."""
        return min(wanted, FEW) if self.args.shape == "tiny" else wanted

    def seconds(self, run: Callable[[], object], repeats: int = 20) -> float:
        """Of one run on the device, the median of three series."""
        run()
        found, repeats = [], self.repeats(repeats)
        for _ in range(self.repeats(3)):
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
            with contextlib.suppress(RuntimeError):  # what broke a kernel is told by every call from then on
                torch.cuda.empty_cache()

    def config(self, **settings: Any) -> Config:
        known = dict(
            model=str(self.directory), devices=self.args.device, max_model_len=self.shape.length, log_level="warning"
        )
        return Config.of(**{**known, **settings})


class Rig:
    """One worker's parts in this process: weights, pool, table, and a runner with steps on fixed buffers."""

    def __init__(self, bench: Bench) -> None:
        checkpoint = Checkpoint(bench.directory)
        self.spec = models.describe(checkpoint)
        device, dtype = bench.device, bench.dtype
        self.weights = models.load(self.spec, checkpoint.tensors(), device, dtype, lambda nbytes: None, Shard())
        self.model = models.transformer.Model(self.spec, self.weights)
        rows = max(bench.shape.rows)
        canvas = min(512, bench.shape.length)
        tokens = max(rows * canvas, max(bench.shape.refreshes))
        flat = torch.zeros((tokens + PAGE) * self.spec.kv_elements, dtype=dtype, device=device)
        self.pool = KVPool(self.spec, Shard(), flat)
        self.table = RequestTable(rows, self.spec.max_length)
        self.reuse = self.steps()
        self.forward = self.forwards()
        self.runner, self.plain = self.runner_of(self.reuse), self.runner_of(None)
        self.replayed = self.runner_of(None, self.forward)
        self.canvas = canvas

    def steps(self, eager: bool = False, kernels: StepKernels | None = None) -> ReuseSteps:
        made = ReuseSteps(self.spec, self.model, self.pool, self.table.rows, eager)
        made.kernels = kernels or made.kernels
        return made

    def forwards(self, eager: bool = False) -> ForwardGraphs:
        return ForwardGraphs(self.spec, self.model, self.pool, TOKENS, eager)

    def runner_of(self, reuse: ReuseSteps | None, forward: ForwardGraphs | None = None) -> Runner:
        return Runner(self.spec, self.model, self.pool, self.table, (), reuse=reuse, forward=forward)

    @property
    def nbytes(self) -> int:
        """Weights that a step reads; of the embedding it reads next to nothing."""
        parts = [tensor for block in self.weights.blocks for tensor in block.tensors()]
        return sum(tensor.nbytes for tensor in (*parts, self.weights.norm, self.weights.head))

    @property
    def products(self) -> int:
        """Multiplications of one token in all layers, without attention and head."""
        return sum(tensor.numel() for block in self.weights.blocks for tensor in block.tensors() if tensor.dim() == 2)

    def laid_out(
        self, lengths: Sequence[int], refresh: bool, quota: int = 1, seed: int = 0, after: int = 0
    ) -> list[Span]:
        """Rows of these canvases, whose block before the last `after` tokens is to be filled, under the steps rule."""
        rng, spans, start = np.random.default_rng(seed), [], 0
        for row, canvas in enumerate(lengths):
            block = canvas - BLOCK - after
            ids = rng.integers(0, 250, block).astype(np.int32)
            generation = self.table.fill(row, ids, canvas, self.spec.mask_id, Decoding(rule="steps"))
            queries = (0, canvas) if refresh else (block, BLOCK)
            spans.append(Span(row, generation, start, *queries, canvas, block, block + BLOCK, quota, 0))
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


def prompts_for(bench: Bench, count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(250) for _ in range(bench.shape.prompt)] for _ in range(count)]


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
