"""Flags that a command has besides the settings. Imports nothing that takes long."""

import argparse
from pathlib import Path

from dilaserve.flag_values import amount, delay, device_counts, devices, folder, nodes, positive, tokens

PROBLEMS = "JSON lines of prompt, answer (optional) and task (default: the package's own problems)"
ROUTING_RULES = ("p2c", "p2c-weighted", "least-backlog", "slack", "quote")
HERE = "http://127.0.0.1:8000"


def chat_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", default=HERE, metavar="URL", help=f"of the server (default: {HERE})")
    asking_flags(parser)


def asking_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, metavar="NAME", help="(default: the first that the server lists)")
    parser.add_argument("--api-key", default=None, metavar="KEY", help="(default: OPENAI_API_KEY of the environment)")


def bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="of any OpenAI endpoint, with or without /v1")
    asking_flags(parser)
    add = parser.add_argument_group("Load").add_argument
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--rate", type=amount, default=None, metavar="R", help="requests a second (default: 1)")
    way.add_argument("--concurrency", type=positive, default=None, metavar="N", help="clients that wait for answers")
    add("--arrivals", default="poisson", metavar="KIND", help="of a rate: poisson, gamma2, gamma4, bursts")
    trace = "CSV of arrival_s,prompt_tokens,output_tokens; .gz too; stretched to --rate, if that is given"
    add("--trace", type=Path, default=None, metavar="FILE", help=trace)
    add("--seconds", type=amount, default=60.0, metavar="S", help="how long requests are sent (default: 60)")
    add("--requests", type=positive, default=1000, metavar="N", help="at most (default: 1000)")
    add("--timeout", type=amount, default=120.0, metavar="S", help="for one request, and after the last (default: 120)")
    add("--prompts", type=Path, default=None, metavar="FILE", help="one a line, or JSON lines with prompt")
    add("--prompt", type=positive, default=32, metavar="N", help="words of a made prompt (default: 32)")
    add("--answer", type=positive, default=64, metavar="N", help="max_tokens (default: 64)")
    add("--seed", type=int, default=0, metavar="N", help="of arrivals and made prompts (default: 0)")
    add("--deadline-ms", type=amount, default=None, metavar="MS", help="for each answer, judged by this client's clock")
    tell = "how the server learns the deadline; auto: by the field slo, if it is DiLaServe"
    add("--tell", choices=("auto", "field", "header", "none"), default="auto", help=tell)
    add("--out", type=folder, default=None, metavar="DIR", help="save report.json and report.png")


def calibration_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Calibration")
    group.add_argument("--problems", type=Path, default=None, metavar="FILE", help=PROBLEMS)
    group.add_argument(
        "--per-task", type=positive, default=300, metavar="N", help="problems of each task (default: 300)"
    )
    again = "measure anew what an interrupted run has measured (default: go on from it)"
    group.add_argument("--restart", action="store_true", default=False, help=again)
    group.add_argument("--plots", type=folder, default=None, metavar="DIR", help="where to draw the curves (PNG)")


def ray_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Nodes").add_argument
    add("--nodes", default="1", metavar="N", help="how many, or LEAST:MOST to follow the backlog (default: 1)")
    add("--gpus-per-node", dest="gpus", type=amount, default=0.0, metavar="G", help="that Ray gives each (default: 0)")
    add("--cpus-per-node", dest="cpus", type=amount, default=1.0, metavar="C", help="likewise (default: 1)")
    add("--doors", type=positive, default=1, metavar="N", help="processes that speak HTTP (default: 1)")
    told = "seconds of work for each instance that a node should have before it; more nodes come above (default: 8)"
    add("--target-backlog", type=amount, default=8.0, metavar="S", help=told)
    add("--up-after", type=amount, default=5.0, metavar="S", help="that more nodes are wanted (default: 5)")
    add("--down-after", type=amount, default=60.0, metavar="S", help="that fewer nodes are wanted (default: 60)")
    there = (
        "of a Ray cluster that runs, or auto; the command then leaves (default: a Ray of this machine, while it runs)"
    )
    add("--address", default=None, metavar="ADDRESS", help=there)


def pretending_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Pretended devices").add_argument
    from dilaserve.sim.published import NAMES

    costs = (
        "a profile from `calibrate`, h200: LLaDA-8B, data-sheet costs (default), or a model on H200s by data sheets: "
        f"{', '.join(NAMES)}"
    )
    add("--costs", default="h200", metavar="FILE", help=costs)
    add("--sim-devices", type=devices, default=8, metavar="N", help="how many (default: 8)")
    add("--sim-seed", type=int, default=0, metavar="N", help="seed of arrivals, steps and times")


def simulation_flags(parser: argparse.ArgumentParser) -> None:
    pretending_flags(parser)
    add = parser.add_argument_group("Simulation").add_argument
    add(
        "--trace", type=Path, default=None, metavar="FILE", help="CSV of arrival_s,prompt_tokens,output_tokens; .gz too"
    )
    add("--arrivals", default="poisson", metavar="KIND", help="without a trace: poisson, gamma2, gamma4, bursts")
    add(
        "--rate",
        type=amount,
        default=10.0,
        metavar="R",
        help="requests a second; a trace is stretched to it (default: 10)",
    )
    add("--seconds", type=amount, default=120.0, metavar="S", help="how long requests arrive (default: 120)")
    add("--prompt", type=positive, default=256, metavar="N", help="prompt tokens without a trace (default: 256)")
    add("--answer", type=positive, default=256, metavar="N", help="answer tokens without a trace (default: 256)")
    add("--deadline", default="2.0", metavar="X", help="times the unloaded latency, as 2.0, none, or a mix 1.5:1,8:1")
    add("--on-miss", default="best_effort", choices=("best_effort", "reject", "cancel_when_late"), help="then")
    add("--shared-prompt", type=tokens, default=0, metavar="N", help="tokens with which all prompts begin (default: 0)")
    add("--task", default=None, metavar="NAMES", help="tasks of the profile, comma separated")
    add("--out", type=folder, default=None, metavar="DIR", help="save outcomes.json, report.json and timeline.png")
    routing_flags(parser)


def routing_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Several nodes").add_argument
    add("--nodes", type=nodes, default=None, metavar="N", help="engines of --sim-devices each, behind a router")
    add("--routing", default=None, choices=ROUTING_RULES, help="how the router chooses a node (default: p2c)")
    add("--routing-delay-ms", type=delay, default=None, metavar="MS", help="one way to a node (default: 3)")
    sizes = "devices by node, from the first again after the last, as 8,4; instead of --sim-devices"
    add("--node-devices", type=device_counts, default=None, metavar="LIST", help=sizes)


def listing_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", default=False, help="as JSON")


def config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toml", action="store_true", default=False, help="as a file for --config")


def completion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose completion to print")


def no_flags(parser: argparse.ArgumentParser) -> None:
    """This command has only the settings."""
