"""What an engine works with: the model as clients see it, its tokenizer, the request table, and who runs the steps."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from dilaserve import models, profiles
from dilaserve.config import Config
from dilaserve.cost import StepCost
from dilaserve.devices import dtype_for, listed, threads_for
from dilaserve.errors import CheckpointError, ConfigError
from dilaserve.executor import Executor, ProcessExecutor, Progress
from dilaserve.models.checkpoint import Checkpoint, locate
from dilaserve.profiles import ModelProfile
from dilaserve.quality import QualityProfile
from dilaserve.table import RequestTable
from dilaserve.text import Text
from dilaserve.worker.loop import Job


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
    note: str | None = None  # what the user should hear once the engine is up


Furnish = Callable[[Config, Progress], Furniture]


def real(config: Config, progress: Progress) -> Furniture:
    """A checkpoint and worker processes; reads and checks everything that needs no worker. Blocking."""
    directory = locate(config.model.model)
    names = listed(config.device.devices)
    checkpoint = Checkpoint(directory)
    spec = models.describe(checkpoint)
    text = Text(directory)
    if (highest := text.highest_id()) >= spec.vocab_size:
        raise CheckpointError(
            f"tokenizer.json in {directory} has ids up to {highest}, but the model knows {spec.vocab_size} tokens; "
            "is it another model's?"
        )
    limit = config.model.max_model_len or spec.max_length
    if limit > spec.max_length:
        raise ConfigError(
            f"--max-model-len {limit} exceeds the model's {spec.max_length}; lower it", param="max_model_len"
        )
    card = ModelCard(
        config.model.served_model_name or directory.resolve().name, limit, int(time.time()), spec.parameters
    )
    table = RequestTable(config.scheduler.max_queue, limit)
    stop_ids = tuple(sorted({*spec.stop_ids, *text.stop_ids()}))
    shared = {"directory": str(directory), "max_length": limit, "stop_ids": stop_ids}
    executor = ProcessExecutor([job(config, name, names, shared) for name in names], table, progress)
    law, quality, note = known(profiles.find(directory, config.scheduler.profile), card.name, names[0])
    return Furniture(card, spec.mask_id, spec.vocab_size, text, table, executor, law, quality, note)


def known(profile: ModelProfile | None, name: str, device: str) -> tuple[StepCost, QualityProfile, str | None]:
    """Cost law and quality profile, and what to tell the user where a guess stands in for them."""
    key, guess = profiles.cost_key(device), profiles.guessed(name, device)
    if profile is None:
        note = f"{name} has no profile yet and starts from a cautious guess; `dilaserve calibrate` measures one"
        return guess.costs[key], guess.quality, note
    if key not in profile.costs:
        note = f"the profile of {name} knows no step costs on {device}; they are learned while serving"
        return guess.costs[key], profile.quality, note
    return profile.costs[key], profile.quality, None


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
