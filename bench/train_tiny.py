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
from pathlib import Path

import torch
from training.lessons import MIX
from training.trainer import Trainer


def shares(text: str) -> dict[str, float]:
    return {name: float(share) for name, share in (part.split("=") for part in text.split(","))}


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
