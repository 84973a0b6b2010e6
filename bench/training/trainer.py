"""The training run: its rate, its mix of lessons over time, and its saved state."""

import argparse
import contextlib
import math
import random
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from training.checkpoint import export, stacked
from training.lessons import Batch, batches
from training.muon import Muon
from training.network import Net


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
