"""Which devices there are, and what a worker on each is told."""

import os
import re

import torch

from dilaserve.config import DeviceConfig
from dilaserve.errors import ConfigError

FORMS = "write --devices auto, or a list such as cuda:0,cuda:1 or cpu,cpu"


def listed(devices: str) -> list[str]:
    """Device names, one per worker; `auto` is every GPU, or the CPU. Raises `ConfigError`."""
    gpus = torch.cuda.device_count()
    if devices == "auto":
        return [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
    names = [name.strip() for name in devices.split(",")]
    for name in names:
        if not re.fullmatch(r"cpu|cuda:\d+", name):
            raise ConfigError(f"unknown device {name!r}; {FORMS}", param="devices")
        if name != "cpu" and int(name.removeprefix("cuda:")) >= gpus:
            raise ConfigError(f"there is no {name}: this machine shows {gpus} CUDA devices", param="devices")
    return names


def dtype_for(device: str, dtype: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def threads_for(device: str, names: list[str], config: DeviceConfig) -> int:
    """Threads of one worker: the cores are divided among the CPU workers; a GPU worker needs one."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.cpu_threads or max(1, cores // names.count("cpu"))
