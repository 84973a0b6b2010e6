"""What an engine works with: the model as clients see it, its tokenizer, the request table, and who runs the steps."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from dilaserve import models, profiles
from dilaserve.config import Config
from dilaserve.cost import StepCost
from dilaserve.devices import dtype_for, listed, threads_for
from dilaserve.errors import ConfigError
from dilaserve.executor import Executor, ProcessExecutor, Progress
from dilaserve.models.checkpoint import Checkpoint, locate
from dilaserve.profiles import ModelProfile
from dilaserve.quality import QualityProfile
from dilaserve.table import RequestTable
from dilaserve.text import Text
from dilaserve.worker.loop import Job

log = logging.getLogger(__name__)


class ModelCard(msgspec.Struct, frozen=True):
    """The model as clients see it; `created` in Unix seconds."""

    name: str
    max_model_len: int
    created: int
    parameters: int


class Furniture(NamedTuple):
    model: ModelCard
    mask_id: int
    vocab_size: int
    text: Text
    table: RequestTable
    executor: Executor
    law: StepCost
    quality: QualityProfile


Furnish = Callable[[Config, Progress], Furniture]


def real(config: Config, progress: Progress) -> Furniture:
    """A checkpoint and worker processes; reads and checks everything that needs no worker. Blocking."""
    directory = locate(config.model.model)
    names = listed(config.device.devices)
    checkpoint = Checkpoint(directory)
    spec = models.describe(checkpoint)
    text = Text(directory)
    limit = config.model.max_model_len or spec.max_length
    if limit > spec.max_length:
        raise ConfigError(
            f"--max-model-len {limit} exceeds the model's {spec.max_length}; lower it", param="max_model_len"
        )
    card = ModelCard(config.model.served_model_name or directory.name, limit, int(time.time()), spec.parameters)
    table = RequestTable(config.scheduler.max_queue, limit)
    stop_ids = tuple(sorted({*spec.stop_ids, *text.stop_ids()}))
    shared = {"directory": str(directory), "max_length": limit, "stop_ids": stop_ids}
    executor = ProcessExecutor([job(config, name, names, shared) for name in names], table, progress)
    known = profile(config, card.name, names[0])
    law = known.costs.get(profiles.cost_key(names[0])) or next(iter(guess(card.name, names[0]).costs.values()))
    return Furniture(card, spec.mask_id, spec.vocab_size, text, table, executor, law, known.quality)


def profile(config: Config, name: str, device: str) -> ModelProfile:
    found = profiles.find(locate(config.model.model), config.scheduler.profile)
    if found is None:
        log.info("%s has no profile yet: starting from a cautious guess; `dilaserve calibrate` measures one", name)
        return guess(name, device)
    return found


def guess(name: str, device: str) -> ModelProfile:
    return profiles.guessed(name, device)


def job(config: Config, device: str, names: list[str], shared: dict[str, Any]) -> Job:
    """What the worker of one device is started with."""
    fields = {
        "device": device,
        "dtype": dtype_for(device, config.model.dtype),
        "threads": threads_for(device, names, config.device),
        "kv_tokens": config.device.kv_cache_tokens,
        "kv_wanted": config.device.max_num_seqs * shared["max_length"],
        "batched_tokens": config.device.max_num_batched_tokens,
        "memory_share": (1.0 if device == "cpu" else config.device.gpu_memory_utilization) / names.count(device),
    }
    return msgspec.convert({**shared, **fields}, Job)
