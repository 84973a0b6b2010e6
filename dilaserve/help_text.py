"""The pages of --help: the usual settings with examples, and of --help-all: every one."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# settings that a first page shows
USUAL = {
    "model",
    "served_model_name",
    "max_model_len",
    "dtype",
    "devices",
    "plan",
    "tensor_parallel_size",
    "max_num_seqs",
    "gpu_memory_utilization",
    "confidence_threshold",
    "default_max_tokens",
    "seed",
    "accuracy_budget",
    "slo_class",
    "profile",
    "max_queue",
    "host",
    "port",
    "api_key",
    "api_key_file",
    "log_level",
}
SETTINGS = (
    "Every setting can also be given as DILASERVE_NAME in the environment, or in the file of --config.\n"
    "`dilaserve config` prints all with their values and sources."
)
EXAMPLES = {
    "serve": (
        "dilaserve                                             the bundled model on http://127.0.0.1:8000",
        "dilaserve --model GSAI-ML/LLaDA-8B-Instruct           a model of the hub",
        "dilaserve --tensor-parallel-size 2 --port 9000        instances of two devices",
        "dilaserve --slo-class chat=2x,batch=none --seed 1     classes of deadlines, repeatable answers",
    ),
    "simulate": (
        "dilaserve simulate --rate 40 --seconds 60 --deadline 2.0 --out report",
        "dilaserve simulate --nodes 16 --routing least-backlog --rate 600 --seconds 10",
    ),
    "chat": ("dilaserve chat", "echo 'Reverse: lamu' | dilaserve chat http://127.0.0.1:8000"),
    "bench": (
        "dilaserve bench http://127.0.0.1:8000 --rate 5 --seconds 60 --deadline-ms 800 --out report",
        "dilaserve bench http://127.0.0.1:8000 --concurrency 8 --requests 200",
    ),
    "config": ("dilaserve config --toml > dilaserve.toml", "dilaserve --config dilaserve.toml"),
    "completion": ("source <(dilaserve completion bash)", "dilaserve completion fish | source"),
}


def is_usual(setting: str) -> bool:
    return setting in USUAL


def epilog(command: str, about: Mapping[str, str], settings: bool) -> str:
    """What stands below the flags. `about` has one line for each command."""
    parts = [listed("examples:", EXAMPLES.get(command, ()))]
    if command == "serve":
        parts.append(
            listed("commands (`dilaserve COMMAND --help`):", [f"{name:<12}{text}" for name, text in about.items()])
        )
    parts += [SETTINGS] * settings
    return "\n\n".join(part for part in parts if part).replace("%", "%%")


def listed(head: str, lines: Sequence[str]) -> str:
    return "\n  ".join([head, *lines]) if lines else ""


class ShowAll(argparse.Action):
    """--help-all: prints the help of the parser that `whole` makes, and exits."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, whole: Callable[[], argparse.ArgumentParser], **more: Any
    ):
        super().__init__(option_strings, dest, nargs=0, **more)
        self.whole = whole

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        self.whole().print_help()
        parser.exit()
