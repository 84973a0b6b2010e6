"""Train the bundled model from nothing and write it as a checkpoint of the LLaDA family.

    python bench/train_tiny.py --out DIR --minutes 7 --device cuda --compile --workers 14
    python bench/train_tiny.py --out DIR --init dilaserve-tiny --decay 1 --streams 0 --minutes 2 --device cuda

Masked diffusion (LLaDA, arXiv 2502.09992): cross-entropy on masked answer tokens, as `recipe/lessons.py` chooses them,
and in a share `--rollouts` of batches on what the net's own decoding shows (`recipe/rollout.py`). A run begins mostly
with two streams (`--streams`). It may go on from a checkpoint (`--init`), whose tokenizer it keeps.

At the end the temperature that makes confidences fit best is folded into the head, and held-out problems are asked.
"""

import argparse
import collections
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from recipe import vocabulary
from recipe.batches import Feed, Plan
from recipe.decode import contact, table
from recipe.lessons import Canvas, Lesson
from recipe.muon import Muon
from recipe.net import Net, export, seen_by_level, stacked
from recipe.rollout import Rollout
from recipe.vocabulary import MIX

from dilaserve.models.checkpoint import locate

MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.01, 0.004, 0.01
WARM_UP = 200  # steps
MEMORY = 0.998  # of the averaged weights, by step
HEAT = torch.linspace(0.8, 1.25, 46)  # temperatures that are tried for the head
HEAT_BATCHES = 8
AT_ONCE, ROUNDS = 4, 10  # rollouts that are under way at the same time, and steps of each
SHOWN = 4.0  # seconds between two lines of the log


class Trainer:
    """The run: warm-up, a long plateau, and a linear decay over the last part of the minutes."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        if args.init:
            vocabulary.KEPT.append(locate(args.init))
        plan = Plan(args.tokens, args.mix, not args.init, args.streams, args.rollouts)
        self.feed = Feed(args.seed, plan, args.workers, self.device.type == "cuda")
        self.net = Net().to(self.device)
        self.forward = torch.compile(self.net, dynamic=True) if args.compile else self.net
        self.halves = self.device.type == "cuda" or has_bfloat16()
        if args.init:
            self.net.load_state_dict(stacked(args.init), strict=False)
        self.average = [parameter.detach().clone() for parameter in self.net.parameters()]
        self.muon = Muon([self.net.qkv, self.net.out, self.net.gate_up, self.net.down])
        others = [self.net.embedding, self.net.head, self.net.norms]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.step = self.seen = 0
        self.rollouts: collections.deque[tuple[Rollout, int]] = collections.deque()  # and how often each has been used
        self.waited = 0.0  # seconds, for batches
        self.began = time.monotonic()

    @property
    def done(self) -> float:
        return (time.monotonic() - self.began) / (60 * self.args.minutes)

    def rate(self) -> float:
        warm_up = min(1.0, (self.step + 1) / WARM_UP)
        return float(self.args.rate * warm_up * min(1.0, max(0.0, (1 - self.done) / self.args.decay)))

    def batch(self) -> Lesson | Rollout:
        """The next lesson, or one of the rollouts that are under way."""
        if len(self.rollouts) >= AT_ONCE:
            return self.rollouts[0][0]
        began = time.monotonic()
        found = self.feed.next(self.device)
        self.waited += time.monotonic() - began
        if isinstance(found, Lesson):
            return found
        self.rollouts.appendleft((Rollout(found), 0))
        return self.rollouts[0][0]

    def logits(self, batch: Lesson | Rollout, net: Callable[..., torch.Tensor]) -> torch.Tensor:
        half = torch.bfloat16 if self.halves else torch.float32
        seen = seen_by_level(batch.levels, half) if isinstance(batch, Lesson) and batch.levels is not None else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.halves):
            return net(batch.noisy, batch.places, seen, batch.wanted).float()

    def loss(self, batch: Lesson | Rollout) -> torch.Tensor:
        logits = self.logits(batch, self.forward)
        weight = batch.weight().flatten() if isinstance(batch, Rollout) else batch.weight
        loss = (F.cross_entropy(logits, batch.truth.flatten(), reduction="none") * weight).sum() / weight.sum()
        if isinstance(batch, Rollout):
            batch.advance(logits.detach())
            _, used = self.rollouts.popleft()
            if used < ROUNDS:
                self.rollouts.append((batch, used + 1))
        return loss

    def train_step(self, batch: Lesson | Rollout) -> torch.Tensor:
        loss = self.loss(batch)
        for parameter in self.net.parameters():
            parameter.grad = None
        loss.backward()
        rate = self.rate()
        self.muon.step(MUON_RATE * rate, WEIGHT_DECAY)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * rate
        self.adam.step()
        self.step += 1
        self.seen += batch.noisy.numel()
        keep = min(MEMORY, self.step / (self.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.net.parameters()), 1 - keep)
        return loss.detach()

    def run(self) -> None:
        self.compile()
        self.began = shown = time.monotonic()
        smooth = torch.zeros((), device=self.device)
        since = saved = 0
        while self.done < 1.0:
            self.feed.progress.value = self.done
            smooth += self.train_step(self.batch())
            since += 1
            if time.monotonic() - shown > SHOWN:
                shown = time.monotonic()
                mean, seen = smooth.item() / since, self.seen / 1e6
                self.say(f"step {self.step} loss {mean:.4f} tokens {seen:.1f}M waited {self.waited:.1f} s")
                smooth.zero_()
                since = 0
            if self.done * 4 > saved + 1:
                saved += 1
                self.save()
        self.finish()

    def compile(self) -> None:
        """A step of each kind, which may take a minute to compile, before the clock starts."""
        kinds: set[tuple[bool, bool]] = set()
        while len(kinds) < (self.args.streams > 0) + (self.args.rollouts > 0) + (self.args.rollouts < 1):
            batch = self.batch()
            kinds.add((isinstance(batch, Rollout), isinstance(batch, Lesson) and batch.levels is not None))
            self.train_step(batch)

    def finish(self) -> None:
        self.feed.progress.value = 1.0
        with torch.no_grad():
            for parameter, slow in zip(self.net.parameters(), self.average, strict=True):
                parameter.copy_(slow)
        self.save()
        heat = self.best_heat()
        self.say(f"temperature {heat:.3f}")
        with torch.no_grad():
            self.net.head /= heat
            for parameter, slow in zip(self.net.parameters(), self.average, strict=True):
                slow.copy_(parameter)
                parameter.copy_(parameter.bfloat16().float())  # as the checkpoint has them
        self.save()
        table(self.net, self.args.held_out, self.say)
        contact(self.net, self.args.held_out, self.say)

    @torch.no_grad()
    def best_heat(self) -> float:
        """The temperature at which the truth is likeliest in what decoding shows."""
        total = torch.zeros(len(HEAT), device=self.device)
        for _ in range(HEAT_BATCHES):
            batch = self.feed.next(self.device)
            while not isinstance(batch, Canvas):
                batch = self.feed.next(self.device)
            rollout = Rollout(batch)
            for _ in range(ROUNDS):
                logits = self.logits(rollout, self.net)
                inside = (rollout.masked & (rollout.inside < rollout.end)).flatten()
                known = logits[inside], rollout.truth.flatten()[inside]
                total += torch.stack([F.cross_entropy(known[0] / heat, known[1]) for heat in HEAT.tolist()])
                rollout.advance(logits)
        return float(HEAT[total.argmin().cpu()])

    def save(self) -> None:
        export(dict(zip((name for name, _ in self.net.named_parameters()), self.average, strict=True)), self.args.out)

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:6.1f} s  {text}"
        print(line, flush=True)
        with open(self.args.out / "log.txt", "a") as log:
            log.write(line + "\n")


def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16, which is 1.5 times as fast as float32."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        return any("avx512_bf16" in line for line in lines)
    return False


def shares(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--init", help="checkpoint to go on from, a directory or dilaserve-tiny")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate, times the usual one")
    parser.add_argument("--mix", type=shares, default=MIX, help="share of the tasks, such as add=.2,chain=.3")
    parser.add_argument("--minutes", type=float, default=7.0, help="length of the run (default 7)")
    parser.add_argument("--decay", type=float, default=0.4, help="share of the run over which the rate falls to 0")
    parser.add_argument("--streams", type=float, default=0.7, help="share of the run that has batches of two streams")
    parser.add_argument("--rollouts", type=float, default=0.3, help="share of the other batches that the net decodes")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches")
    parser.add_argument("--compile", action="store_true", help="about twice as fast; needs a C++ compiler")
    parser.add_argument("--held-out", type=int, default=500, help="problems of a task that are asked at the end")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance are not the same size
    Trainer(args).run()


if __name__ == "__main__":
    main()
