"""Which devices there are, and the settings of a worker on each."""

import platform
import re

import torch

from dilaserve.config import DeviceConfig
from dilaserve.errors import ConfigError
from dilaserve.system import host

STEPS = 8
SYNONYMS = {"half": "float16", "float": "float32"}  # names of vLLM for the same numbers
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
        return SYNONYMS.get(dtype, dtype)
    return "float32" if device == "cpu" else "bfloat16"


def backend_for(names: list[str], wanted: str) -> str:
    """What carries tensor-parallel groups. Raises `ConfigError` where NCCL is asked for and cannot work."""
    distinct = all(name.startswith("cuda") for name in names) and len(set(names)) == len(names)
    nccl = distinct and torch.distributed.is_nccl_available()
    if wanted == "nccl" and not nccl:
        raise ConfigError(
            "--group-backend nccl needs NCCL and a GPU of its own for every worker", param="group_backend"
        )
    if wanted != "auto":
        return wanted
    if nccl:
        return "nccl"
    return "shm" if platform.machine().lower() in ("x86_64", "amd64") else "gloo"  # see groups.SharedMemory


def steps_for(names: list[str], config: DeviceConfig) -> int:
    """Steps that a launch may take: a GPU must not wait for Python between two of them, a CPU never does."""
    return config.steps_per_launch or (STEPS if names[0].startswith("cuda") else 1)


def threads_for(device: str, names: list[str], config: DeviceConfig) -> int:
    """Threads of one worker: the cores are divided among the CPU workers; a GPU worker needs one."""
    if device != "cpu":
        return 1
    return config.cpu_threads or max(1, host.cores() // names.count("cpu"))
