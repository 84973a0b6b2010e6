"""DiffusionGemma's passes one by one, as one rank or as several in threads, and transformers' own model beside them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from safetensors.torch import load_file, save_file

from dilaserve import models
from dilaserve.models.attention import grouped, windowed
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.models.kv_pool import KVPool
from dilaserve.models.spans import NoisyTokens, Packed, PackedSpan
from dilaserve.models.spec import Shard

FIXTURE = Path(__file__).parent / "fixtures" / "diffusion_gemma"
CPU = torch.device("cpu")
POOL = 512  # tokens


def cases(decoder: str) -> list[dict]:
    return [case for case in json.loads((FIXTURE / "cases.json").read_text()) if case["decoder"] == decoder]


def doubled(directory: Path) -> Path:
    """The fixture with each K head of its full layers twice, which computes the same and can be divided by two."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((FIXTURE / "config.json").read_text())
    config["text_config"]["num_global_key_value_heads"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(FIXTURE / "model.safetensors")
    for layer in (1, 3):
        name = f"model.decoder.layers.{layer}.self_attn.k_proj.weight"
        tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, directory / "model.safetensors")
    return directory


def reference(directory: Path = FIXTURE):
    """transformers' model with the same weights."""
    from transformers import DiffusionGemmaForBlockDiffusion

    return DiffusionGemmaForBlockDiffusion.from_pretrained(directory, dtype=torch.float32).eval()


class Meeting:
    """Sums and joins tensors of ranks that run in threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = Barrier(size, timeout=20.0), [torch.empty(0)] * size

    def swapped(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.slots[rank] = x.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def reduce(self, rank: int):
        return lambda x: torch.stack(self.swapped(rank, x)).sum(0)


class Passes:
    """A checkpoint as `size` ranks, each with a pool of its own, of one row from pool token 32 on."""

    def __init__(self, directory: Path = FIXTURE, size: int = 1, first: int = 32) -> None:
        checkpoint = Checkpoint(directory)
        self.spec, self.first, self.size = models.describe(checkpoint), first, size
        weights = models.load(self.spec, checkpoint.tensors(), CPU, torch.float32, lambda nbytes: None)
        self.meeting = Meeting(size)
        self.ranks = [
            models.model(self.spec, weights, Shard(rank, size), self.meeting.reduce(rank)) for rank in range(size)
        ]
        elements = POOL * self.spec.kv_elements // size
        self.pools = [KVPool(self.spec, Shard(rank, size), torch.zeros(elements)) for rank in range(size)]

    def encode(self, ids: list[int], start: int = 0) -> None:
        """Write K/V of finished tokens."""
        span = PackedSpan(0, len(ids), self.first, start + len(ids), 1, -len(ids))
        self.run(ids, start, span, torch.zeros(0, dtype=torch.int64), None)

    def denoise(
        self, before: list[int], cached: int, block: list[int], expected: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of an open block behind `before`, of which `cached` have K/V; [block, vocab]."""
        ids, fresh = [*before[cached:], *block], len(before) - cached
        span = PackedSpan(0, len(ids), self.first, len(before) + len(block), int(fresh > 0), -fresh)
        places = torch.arange(fresh, len(ids))
        if expected is None:
            expected = torch.zeros(len(block), self.spec.hidden)
        return self.run(ids, cached, span, places, NoisyTokens(places, expected))

    @torch.inference_mode()
    def run(self, ids, start, span, kept, noisy) -> torch.Tensor:
        positions = torch.arange(start, start + len(ids))
        block = span._replace(length=len(kept), grain=0, past=0)
        packed = Packed(
            torch.tensor(ids),
            positions,
            positions + self.first,
            grouped([span], CPU),
            kept,
            grouped([block], CPU) if len(kept) else [],
            grouped(windowed([span], self.spec.window or 0), CPU),
            noisy,
        )
        with ThreadPoolExecutor(self.size) as threads:
            parts = list(threads.map(lambda rank: self.logits(rank, packed), range(self.size)))
        return torch.cat(parts, 1)

    def logits(self, rank: int, packed: Packed) -> torch.Tensor:
        with torch.inference_mode():
            return self.ranks[rank].logits(self.ranks[rank].hidden(packed, self.pools[rank]))

    def expected(self, logits: torch.Tensor) -> torch.Tensor:
        """The embedding that the next step of a block is told, of processed logits."""
        chances = logits.softmax(-1)

        def part(rank: int) -> torch.Tensor:
            with torch.inference_mode():
                model = self.ranks[rank]
                return model.expected_embedding(chances[:, model.vocabulary])

        with ThreadPoolExecutor(self.size) as threads:
            return next(iter(threads.map(part, range(self.size))))
