"""Train the bundled model from nothing and write it as a checkpoint of the LLaDA family.

    python bench/train_tiny.py --out DIR [--state FILE] [--minutes M | --steps N] [--device cuda]
    python bench/train_tiny.py --out DIR --init dilaserve-tiny --rate 0.3 --minutes 15

Masked diffusion (LLaDA, arXiv 2502.09992): cross-entropy on masked answer tokens. The masks are those that block
decoding shows: everything after the active block is masked, everything before it is visible, and inside it mostly a
prefix is visible, so that a result is computed and not copied from further right.

That gives a handful of lessons per example. So the run begins with two streams (block diffusion, arXiv 2503.09573): the
answer stands there once in clear and once masked, cut into chunks of random size; the masks of a chunk see each other
and all clear tokens before the chunk, and every answer token is a lesson. The last part of the run is plain masked
diffusion; so is a run that goes on from a checkpoint (`--init`), at a rate that falls from its beginning.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dilaserve.models.checkpoint import locate
from dilaserve.profile.problems import TASKS, Problem, training

SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|unused|>",
)
BOS, EOS, MASK, EOT, USER, ASSISTANT = range(256, 262)
TEMPLATE = (
    "<|startoftext|>{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB, WIDTH, LAYERS, HEADS, MLP = 384, 192, 5, 4, 512
PIECES = r"[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]+|\s"  # every digit by itself, words and signs with the space before them
MAX_LENGTH, BLOCK, THETA, EPS = 512, 32, 10000.0, 1e-5
MIX = {"add": 0.2, "chain": 0.23, "word": 0.22, "sort": 0.18, "reverse": 0.07, "json": 0.1}
FRONTIER = 6  # masked tokens from the left that count in full; those behind them depend on what is not there yet


Share = Callable[[], float]


class Example(NamedTuple):
    prompt: list[int]
    answer: list[int]


@functools.cache
def tokenizer() -> Tokenizer:
    """Bytes, marks, and the words that the tasks use over and over; id n < 256 is byte n, so that every text has ids.

    A word is a token as a whole or goes byte by byte (no merges), so that made-up words are always spelled out.
    """
    letters = bytes_to_unicode()
    vocab = {letters[byte]: byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    words = common_words(made.pre_tokenizer, VOCAB - 256 - len(SPECIALS))
    vocab |= {word: 256 + len(SPECIALS) + i for i, word in enumerate(words)}
    made.model = models.BPE(
        vocab=vocab | dict(zip(SPECIALS, range(256, 264), strict=True)), merges=[], ignore_merges=True
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def common_words(pieces: pre_tokenizers.PreTokenizer, most: int) -> list[str]:
    """Pieces of two characters or more that stand in at least one of 400 problems of a task, made-up words aside."""
    rng, counts = random.Random(0), Counter[str]()
    for name in TASKS:
        stream = training(name, rng, lambda: 1.0)
        for _ in range(2000):
            problem = next(stream)
            for text in (problem.prompt, problem.answer):
                counts.update({piece for piece, _ in pieces.pre_tokenize_str(text) if len(piece) > 1})
    return sorted(piece for piece, count in counts.most_common(most) if count >= 5 * len(TASKS))


def bytes_to_unicode() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def encoded(problem: Problem) -> Example:
    prompt = tokenizer().encode(problem.prompt, add_special_tokens=False).ids
    answer = tokenizer().encode(problem.answer, add_special_tokens=False).ids
    return Example([BOS, USER, *prompt, EOT, ASSISTANT], answer)


class Batch(NamedTuple):
    noisy: torch.Tensor  # [rows, length], with masks
    clean: torch.Tensor  # [rows, length]
    weight: torch.Tensor  # [rows, length], 0 where nothing is learned
    places: torch.Tensor  # [rows, length], positions in the canvas
    seen: torch.Tensor | None  # [rows, 1, length, length], who sees whom; None: everybody everybody


def examples(rng: random.Random, hardness: Share, mix: dict[str, float]) -> Iterator[Example]:
    streams = {name: training(name, rng, hardness) for name in mix}
    while True:
        yield encoded(next(streams[rng.choices(list(streams), list(mix.values()))[0]]))


def shares(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


def canvases(source: Iterator[Example], rng: random.Random, full: float) -> tuple[Example, int]:
    """An example and its canvas length: a few ends after the answer, or whole blocks in a share `full`."""
    example = next(source)
    end = len(example.answer) + rng.randint(1, 6)
    if rng.random() < full:
        end = (-(-(len(example.answer) + 1) // BLOCK) + rng.choice((0, 0, 0, 1, 1, 2, 3))) * BLOCK
    return example, len(example.prompt) + end


def batches(
    rng: random.Random,
    tokens: int,
    full: Callable[[], float],
    hardness: Callable[[], float],
    streams: Callable[[], float],
    mix: dict[str, float],
) -> Iterator[Batch]:
    """Batches of about `tokens` tokens of like length; the longest sets the canvas, the others get more ends."""
    source = examples(rng, hardness, mix)
    while True:
        double = rng.random() < streams()
        if double:
            items = [(example, cost(example)) for example in itertools.islice(source, 1500)]
        else:
            items = [canvases(source, rng, full()) for _ in range(1500)]
        groups: list[list[tuple[Example, int]]] = [[]]
        for item in sorted(items, key=lambda item: item[1]):
            if groups[-1] and item[1] * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            batch, length = [example for example, _ in group], max(length for _, length in group)
            yield two_streams(batch, length, rng) if double else collate(batch, length, rng)


def cost(example: Example) -> int:
    return len(example.prompt) + 2 * (len(example.answer) + 2)


def two_streams(group: list[Example], length: int, rng: random.Random) -> Batch:
    """Rows of prompt, answer in clear, answer masked; the answer ends with two end tokens."""
    clean = torch.full((len(group), length), EOS)
    noisy = clean.clone()
    weight = torch.zeros(len(group), length)
    places = torch.zeros(len(group), length, dtype=torch.long)
    level = torch.full((len(group), length), 10_000)  # the chunk a clear token lies in; the prompt is chunk 0
    masked = torch.zeros(len(group), length, dtype=torch.bool)
    for row, example in enumerate(group):
        start, answer = len(example.prompt), [*example.answer, EOS, EOS]
        middle, end = start + len(answer), start + 2 * len(answer)
        clean[row, :end] = torch.tensor(example.prompt + answer + answer)
        noisy[row, :middle] = clean[row, :middle]
        noisy[row, middle:end] = MASK
        places[row, :middle] = torch.arange(middle)
        places[row, middle:end] = torch.arange(start, middle)
        size = rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 6, 12))
        shift = rng.randrange(size)
        chunks = (torch.arange(len(answer)) + shift) // size + 1
        level[row, :start] = 0
        level[row, start:middle], level[row, middle:end] = chunks, chunks
        masked[row, middle:end] = True
        order = (torch.arange(len(answer)) + shift) % size
        weight[row, middle:end] = torch.where(order < FRONTIER, 1.0, 0.25)
        weight[row, end - 1] = 0.1
        weight[row] /= weight[row].sum().sqrt()
    ours, theirs = level[:, :, None], level[:, None, :]
    clear_seen = ~masked[:, None, :] & torch.where(masked[:, :, None], theirs < ours, theirs <= ours)
    seen = clear_seen | (masked[:, :, None] & masked[:, None, :] & (theirs == ours))
    return Batch(noisy, clean, weight, places, seen[:, None])


def collate(group: list[Example], length: int, rng: random.Random) -> Batch:
    clean = torch.full((len(group), length), EOS)
    noisy = torch.full((len(group), length), MASK)
    weight = torch.zeros(len(group), length)
    for row, example in enumerate(group):
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        clean[row, :end] = torch.tensor(example.prompt + example.answer)
        noisy[row, :start] = clean[row, :start]
        block, masked = masks(len(example.answer), length - start, rng)
        noisy[row, start : start + block] = clean[row, start : start + block]
        for order, at in enumerate(masked):
            noisy[row, start + at] = MASK
            weight[row, start + at] = 0.1 if start + at > end else 1.0 if order < FRONTIER else 0.25
        weight[row] /= weight[row].sum().sqrt()
    return Batch(noisy, clean, weight, torch.arange(length).expand(len(group), -1), None)


def masks(answer: int, room: int, rng: random.Random) -> tuple[int, list[int]]:
    """The end of the active block, and the positions masked in it, both counted from the start of the answer."""
    first = rng.randrange(0, answer + 1, BLOCK)
    last = min(first + BLOCK, room)
    body = list(range(first, min(last, answer + 1)))
    style = rng.random()
    if style < 0.25:
        masked = set(body)
    elif style < 0.8:  # a visible prefix, then a short ragged edge, then all masked
        cut, edge, shown = rng.choice(body), rng.randint(0, 10), rng.random()
        masked = {at for at in body if at >= cut and (at >= cut + edge or rng.random() > shown)} or {body[-1]}
    else:
        share = rng.random()
        masked = {at for at in body if rng.random() < share} or {rng.choice(body)}
    tail = range(answer + 1, last)
    shown = rng.choice((0.0, 0.0, 1.0, rng.random()))
    if shown == 1.0 and answer < last:
        masked.discard(answer)  # the length is known already
    masked |= {at for at in tail if rng.random() >= shown}
    return last, sorted(masked or {body[0]})


class Net(torch.nn.Module):
    """LLaDA's forward pass with the weights of all layers stacked by shape."""

    def __init__(self) -> None:
        super().__init__()
        scale = WIDTH**-0.5
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.5)
        self.head = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.02)
        self.norms = torch.nn.Parameter(torch.ones(2 * LAYERS + 1, WIDTH))
        self.qkv = torch.nn.Parameter(torch.randn(LAYERS * 3, WIDTH, WIDTH) * scale)
        self.out = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, WIDTH))
        self.gate_up = torch.nn.Parameter(torch.randn(LAYERS * 2, MLP, WIDTH) * scale)
        self.down = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, MLP))
        frequencies = THETA ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.outer(torch.arange(MAX_LENGTH), frequencies)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, seen: torch.Tensor | None, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Logits [wanted, vocab] of the entries `wanted` of ids [rows, length], counted row by row."""
        rows, length = ids.shape
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        for i in range(LAYERS):
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i], EPS)
            q, k, v = F.linear(h, self.qkv[3 * i : 3 * i + 3].flatten(0, 1)).view(rows, length, 3, HEADS, -1).unbind(2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, attn_mask=seen)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.out[i])
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i + 1], EPS)
            gate, up = F.linear(h, self.gate_up[2 * i : 2 * i + 2].flatten(0, 1)).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.down[i])
        return F.linear(F.rms_norm(x.flatten(0, 1)[wanted], (WIDTH,), self.norms[-1], EPS), self.head)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Muon:
    """Momentum, orthogonalised by five Newton-Schulz steps in float32 (Jordan 2024), for stacked matrices."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 0.05)
            update = orthogonal(parameter.grad.lerp(momentum, 0.95))
            size = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - rate * decay).add_(update, alpha=-rate * size)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Trainer:
    """The run: warm-up, a long plateau, and a linear decay over the last part of the steps or minutes."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        self.net = Net().to(self.device)
        self.forward = torch.compile(self.net, dynamic=True) if args.compile else self.net
        self.halves = self.device.type == "cuda" or has_bfloat16()
        if args.init:
            self.net.load_state_dict(stacked(args.init), strict=False)
        self.average = [parameter.detach().clone() for parameter in self.net.parameters()]
        self.step, self.seen, self.seconds = 0, 0, 0.0
        self.muon = Muon([self.net.qkv, self.net.out, self.net.gate_up, self.net.down])
        self.adam = torch.optim.AdamW(
            [self.net.embedding, self.net.head, self.net.norms], betas=(0.9, 0.99), weight_decay=0.0
        )
        self.decay_from: float | None = None
        if args.state and args.state.exists():
            self.restore(torch.load(args.state, map_location=self.device))
        self.began = time.monotonic() - self.seconds

    @property
    def done(self) -> float:
        """Share of the run that lies behind, by steps or by minutes."""
        if self.args.steps:
            return self.step / self.args.steps
        return (time.monotonic() - self.began) / (60 * self.args.minutes)

    def rate(self) -> float:
        tail = 1.0 if self.args.init else self.args.decay
        warm_up = min(1.0, self.step / (50 if self.args.init else 200))
        return float(self.args.rate * warm_up * min(1.0, max(0.0, (1 - self.done) / tail)))

    def train_step(self, batch: Batch) -> float:
        batch = Batch(*(None if part is None else part.to(self.device) for part in batch))
        wanted = batch.weight.flatten().nonzero()[:, 0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.halves):
            logits = self.forward(batch.noisy, batch.places, batch.seen, wanted)
        losses = F.cross_entropy(logits.float(), batch.clean.flatten()[wanted], reduction="none")
        weight = batch.weight.flatten()[wanted]
        loss = (losses * weight).sum() / weight.sum()
        for parameter in self.net.parameters():
            parameter.grad = None
        loss.backward()
        rate = self.rate()
        self.muon.step(0.01 * rate, 0.01)
        for group in self.adam.param_groups:
            group["lr"] = 0.004 * rate
        self.adam.step()
        self.step += 1
        self.seen += batch.noisy.numel()
        keep = min(0.998, self.step / (self.step + 20))
        with torch.no_grad():
            for slow, parameter in zip(self.average, self.net.parameters(), strict=True):
                slow.lerp_(parameter, 1 - keep)
        return loss.item()

    def run(self) -> None:
        rng = random.Random(self.args.seed + self.step)
        hardness = lambda: self.difficulty(rng)  # noqa: E731
        source = batches(rng, self.args.tokens, self.full_share, hardness, self.double_share, self.args.mix)
        signal.signal(signal.SIGUSR1, lambda *_: self.save())
        columns = (TextColumn("loss {task.fields[loss]:.3f} {task.fields[speed]:.0f} tok/s"), BarColumn())
        with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn()) as bar:
            shown = bar.add_task("", total=1000, loss=math.nan, speed=0.0)
            smooth = math.nan
            while self.done < 1.0:
                loss = self.train_step(next(source))
                smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
                self.seconds = time.monotonic() - self.began
                speed = self.seen / self.seconds
                bar.update(shown, completed=int(1000 * self.done), loss=smooth, speed=speed)
                if self.step % 100 == 0:
                    bar.console.print(f"step {self.step} loss {smooth:.4f} {self.seen / 1e6:.1f}M tokens {speed:.0f}/s")
                if self.step % self.args.save_every == 0:
                    self.save()
        self.save()

    def difficulty(self, rng: random.Random) -> float:
        """Short problems only at first; the full range from the middle of the run on."""
        return 1.0 if self.args.init else min(1.0, max(0.0, 2.2 * self.done - 0.2) + 0.3 * rng.random())

    def double_share(self) -> float:
        """Share of batches with two streams: most at first, none from three quarters of the run on."""
        return 0.0 if self.args.init else 0.75 * min(1.0, max(0.0, (0.75 - self.done) / 0.2))

    def full_share(self) -> float:
        """Share of examples on whole blocks: few at first, many at the end."""
        return 0.08 if self.done < 1 - self.args.decay and not self.args.init else 0.4

    def save(self) -> None:
        export(dict(zip((name for name, _ in self.net.named_parameters()), self.average, strict=True)), self.args.out)
        if self.args.state:
            temporary = self.args.state.with_suffix(".new")
            torch.save(self.state(), temporary)
            temporary.rename(self.args.state)

    def state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "average": self.average,
            "momenta": self.muon.momenta,
            "adam": self.adam.state_dict(),
            "progress": (self.step, self.seen, self.seconds),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.adam.load_state_dict(state["adam"])
        self.average, self.muon.momenta = state["average"], state["momenta"]
        self.step, self.seen, self.seconds = state["progress"]


def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16, which is 1.5 times as fast as float32."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        return any("avx512_bf16" in line for line in lines)
    return False


def stacked(model: str) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, stacked as `Net` has them."""
    tensors, root = load_file(locate(model) / "model.safetensors"), "model.transformer."

    def each(*names: str) -> torch.Tensor:
        found = [tensors[f"{root}blocks.{i}.{name}.weight"] for i in range(LAYERS) for name in names]
        return torch.stack(found).float()

    norms = torch.cat([each("attn_norm", "ff_norm"), tensors[root + "ln_f.weight"].float()[None]])
    return {
        "embedding": tensors[root + "wte.weight"].float(),
        "head": tensors[root + "ff_out.weight"].float(),
        "norms": norms,
        "qkv": each("q_proj", "k_proj", "v_proj"),
        "out": each("attn_out"),
        "gate_up": each("ff_proj", "up_proj"),
        "down": each("ff_out"),
    }


def export(weights: dict[str, torch.Tensor], out: Path) -> None:
    """Write the checkpoint under the published names, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    root, tensors = "model.transformer.", {}
    tensors[root + "wte.weight"], tensors[root + "ff_out.weight"] = weights["embedding"], weights["head"]
    tensors[root + "ln_f.weight"] = weights["norms"][-1]
    for i in range(LAYERS):
        names = ("q_proj", "k_proj", "v_proj")
        block = {name: weights["qkv"][3 * i + j] for j, name in enumerate(names)}
        block |= {"attn_out": weights["out"][i], "ff_out": weights["down"][i]}
        block |= {"ff_proj": weights["gate_up"][2 * i], "up_proj": weights["gate_up"][2 * i + 1]}
        block |= {"attn_norm": weights["norms"][2 * i], "ff_norm": weights["norms"][2 * i + 1]}
        tensors |= {f"{root}blocks.{i}.{name}.weight": tensor for name, tensor in block.items()}
    plain = {name: tensor.detach().to(torch.bfloat16).cpu().contiguous().clone() for name, tensor in tensors.items()}
    temporary = out / "model.safetensors.new"
    save_file(plain, temporary, metadata={"format": "pt"})
    temporary.rename(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config(), indent=1) + "\n")
    tokenizer().save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "pad_token": SPECIALS[1],
        "mask_token": SPECIALS[2],
        "model_max_length": MAX_LENGTH,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")


def config() -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": WIDTH,
        "n_layers": LAYERS,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "mlp_hidden_size": MLP,
        "vocab_size": VOCAB,
        "embedding_size": VOCAB,
        "max_sequence_length": MAX_LENGTH,
        "rope": True,
        "rope_theta": THETA,
        "rope_full_precision": True,
        "rms_norm_eps": EPS,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "attention_layer_norm": False,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--state", type=Path, help="file to resume from and to keep the run's state in")
    parser.add_argument("--init", help="checkpoint to go on from, a directory or dilaserve-tiny")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate, times the usual one")
    parser.add_argument("--mix", type=shares, default=MIX, help="share of the tasks, such as add=.2,chain=.3")
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run (default 60)")
    parser.add_argument("--steps", type=int, help="length of the run in steps, instead of minutes")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the run over which the rate falls to 0")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens in a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--compile", action="store_true", help="1.8 times as fast; needs a C++ compiler")
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    Trainer(args).run()


if __name__ == "__main__":
    main()
