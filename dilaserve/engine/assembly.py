"""What an engine works with: the model as clients see it, its tokenizer, the request table, and the executor."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from dilaserve import models
from dilaserve.config import BUNDLED, Config, DeviceConfig
from dilaserve.engine.submit import check_defaults
from dilaserve.errors import BadRequest, CheckpointError, ConfigError
from dilaserve.executor.executor import Executor, Progress
from dilaserve.executor.worker_processes import ProcessExecutor
from dilaserve.models import hub
from dilaserve.models.checkpoint import Checkpoint, tensors_sentence
from dilaserve.models.spec import ModelSpec
from dilaserve.planner.planner import PlannerPort, Setup
from dilaserve.planner.process import PlannerProcess
from dilaserve.plans import parsed, uniform
from dilaserve.profile import profile_file
from dilaserve.profile.decode_speed import QualityProfile
from dilaserve.profile.profile_file import ModelProfile
from dilaserve.profile.step_cost import DENSE, ExpertCounts, StepCost
from dilaserve.tokenizer.tokenizer import Text
from dilaserve.transport.collectives_memory import Exchange
from dilaserve.transport.devices import backend_for, dtype_for, listed, threads_for
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import FamilyTraits, Plan
from dilaserve.worker import memory
from dilaserve.worker.main import Shared, WorkerJob

log = logging.getLogger(__name__)


class ModelCard(msgspec.Struct, frozen=True):
    """The model as clients see it; `created` in Unix seconds."""

    name: str
    max_model_len: int
    created: int
    parameters: int
    root: str  # the directory
    traits: FamilyTraits = FamilyTraits()
    experts: ExpertCounts = DENSE
    architecture: str = ""
    dtype: str = ""
    threads: int = 0  # of one CPU worker; 0 where there is none
    calibrated: bool = False  # whether a profile was found


class Parts(NamedTuple):
    model: ModelCard
    mask_id: int
    vocab_size: int
    text: Text
    table: RequestTable
    executor: Executor
    laws: dict[int, StepCost]  # by tensor-parallel degree
    quality: QualityProfile
    devices: list[str]
    degrees: tuple[int, ...]
    plan: Plan
    note: str | None = None  # what the user should read once the engine is up
    planner: PlannerPort | None = None  # None: there is nothing to choose, or too little is known
    unplanned: str | None = None  # what would have to be known
    stop_ids: tuple[int, ...] = ()  # tokens that end answers


Assemble = Callable[[Config, Progress], Parts]


def real(config: Config, progress: Progress, measured: bool = True) -> Parts:
    """A checkpoint and worker processes; reads and checks everything that needs no worker. Blocking.

    Not `measured`: no profile is read, so that it does not matter what is wrong with it.
    """
    directory = hub.directory_of(config.model.model, config.model.revision)
    names = listed(config.device.devices)
    checkpoint = Checkpoint(directory)
    spec = models.trained(models.describe(checkpoint), named(directory), config.model.attention)
    if checkpoint.unused:
        log.warning("%s %s that the model has no part for", directory, tensors_sentence("holds", checkpoint.unused))
    check_defaults(config.decode, spec.traits)
    text = Text(directory, config.model.chat_template)
    if (highest := text.highest_id()) >= spec.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {directory} has ids up to {highest}, but the model knows {spec.vocab_size} tokens; "
            "is it another model's?"
        )
    limit = config.model.max_model_len or spec.max_length
    if limit > spec.max_length:
        raise ConfigError(
            f"--max-model-len {limit} exceeds the model's {spec.max_length}; lower it", param="max_model_len"
        )
    profile = profile_file.find(directory, config.scheduler.profile) if measured else None
    card = ModelCard(
        next(iter(config.model.names), named(directory)),
        limit,
        int(time.time()),
        spec.parameters,
        str(directory),
        spec.traits,
        ExpertCounts(spec.experts.count, spec.experts.chosen) if spec.experts else DENSE,
        models.architecture_of(directory),
        dtype_for(names[0], config.model.dtype),
        threads_for("cpu", names, config.device) if "cpu" in names else 0,
        profile is not None,
    )
    table = RequestTable(config.scheduler.max_queue, limit)
    stop_ids = ends(spec, text, directory)
    shared = {"directory": str(directory.resolve()), "max_length": limit, "stop_ids": stop_ids}
    claim = memory.host_claim(names.count("cpu")) if "cpu" in names else memory.Claim()
    degrees = possible_degrees(spec, names, config, claim)
    shared["shards"] = min(degrees)
    plan = first_plan(plan_text(config.device, len(names)), len(names), degrees)
    mapped = Shared(table, Exchange(len(names)))
    executor = ProcessExecutor([job(config, name, names, shared, claim) for name in names], mapped, progress)
    if profile and profile.model not in (card.name, directory.resolve().name):
        log.warning("the profile was measured with %r, and the model is %r", profile.model, card.name)
    laws, quality, note = known(profile, card, names[0], degrees)
    planner = PlannerProcess(laws, quality, Setup.of(config, quality, traits=spec.traits)) if len(laws) > 1 else None
    return Parts(
        card,
        spec.mask_id,
        spec.vocab_size,
        text,
        table,
        executor,
        laws,
        quality,
        names,
        degrees,
        plan,
        note,
        planner,
        unplanned(laws, degrees, config, names),
        stop_ids,
    )


def named(directory: Path) -> str:
    """What clients call the model: the directory as it was given, also where it is a link to elsewhere; a snapshot in
    a cache of Hugging Face's hub has the name of its repository.
    """
    given = Path(os.path.abspath(directory))
    return hub.repository(given) or given.name


def ends(spec: ModelSpec, text: Text, directory: Path) -> tuple[int, ...]:
    """The tokens that end an answer, from wherever the checkpoint names one. Raises `CheckpointError`."""
    found = tuple(sorted({*spec.stop_ids, *text.stop_ids()}))
    if spec.mask_id in found:
        raise CheckpointError(
            f"the mask token {spec.mask_id} of {directory} is also named as a token that ends answers"
        )
    if not found:
        log.warning("%s names no eos_token: answers end at max_tokens or at a stop string", directory)
    return found


def possible_degrees(spec: ModelSpec, names: list[str], config: Config, claim: memory.Claim) -> tuple[int, ...]:
    """How many devices may run the model together: as its heads divide, and so many that its weights fit.

    Raises `CheckpointError` where there are too few devices.
    """
    size = getattr(torch, dtype_for(names[0], config.model.dtype)).itemsize
    room = min(weights_room(name, names, config.device, claim) for name in names)
    fits = [degree for degree in spec.degrees if spec.shard_parameters(degree) * size <= room]
    if not fits:
        fits = [spec.degrees[-1]]  # the worker says what is missing
    if fits[0] > len(names):
        raise CheckpointError(
            f"the weights fit on {fits[0]} devices together and there are {len(names)}; see --devices"
        )
    return tuple(degree for degree in fits if degree <= len(names))


def weights_room(name: str, names: list[str], config: DeviceConfig, claim: memory.Claim) -> float:
    """Bytes that weights may take on this device, which workers of the same name share."""
    if config.weights_memory is not None:
        return config.weights_memory * 2**30
    if name == "cpu":
        return claim.nbytes
    total: int = torch.cuda.get_device_properties(name).total_memory
    return total * config.gpu_memory_utilization / names.count(name)


def plan_text(device: DeviceConfig, devices: int) -> str:
    """--plan, or what the two sizes say; a size that is not given is what the other leaves. Raises `ConfigError`."""
    degree, count = device.tensor_parallel_size, device.data_parallel_size
    if degree is None and count is None:
        return device.plan
    degree = degree or max(1, devices // (count or 1))
    count = count or max(1, devices // degree)
    if count * degree != devices:
        raise ConfigError(
            f"{count} instances of {degree} devices need {count * degree} devices, and there are {devices}; change "
            "--devices, --tensor-parallel-size or --data-parallel-size",
            param="tensor_parallel_size",
        )
    return f"{count}x{degree}"


def first_plan(text: str, devices: int, degrees: tuple[int, ...]) -> Plan:
    """The plan of --plan; `auto` starts with instances as small as can be. Raises `ConfigError`."""
    if text == "auto":
        return uniform(devices, min(degrees))
    try:
        return parsed(text, devices, degrees)
    except BadRequest as error:
        reason = "there is one device, whose plan is 1x1; see --devices" if devices == 1 else error.message
        raise ConfigError(f"--plan {text}: {reason}", param="plan") from error


def known(
    profile: ModelProfile | None, card: ModelCard, device: str, degrees: tuple[int, ...]
) -> tuple[dict[int, StepCost], QualityProfile, str | None]:
    """Cost laws by degree and quality profile, and a note for the user if estimates replace measurements."""
    name, least = card.name, min(degrees)
    assumed = profile_file.guessed(name, device, card.experts, card.traits.part_length, card.traits.block_length or 32)
    if profile is None:
        note = f"{name} has no profile yet and starts from a cautious guess; `dilaserve calibrate` measures one"
        return {least: assumed.costs[profile_file.cost_key(device)]}, assumed.quality, note
    laws = {
        degree: profile.costs[profile_file.cost_key(device, degree)]
        for degree in degrees
        if profile_file.cost_key(device, degree) in profile.costs
    }
    if least not in laws:
        note = f"the profile of {name} knows no step costs on {device}; they are learned while serving"
        return {least: assumed.costs[profile_file.cost_key(device)]}, profile.quality, note
    return laws, profile.quality, None


def unplanned(
    laws: dict[int, StepCost], degrees: tuple[int, ...], config: Config, names: list[str] | None = None
) -> str | None:
    """Why there is no planner among several degrees, and what measures what it lacks on devices of these names."""
    if len(laws) > 1 or len(degrees) < 2:
        return None
    model = "" if config.model.model == BUNDLED else f" --model {config.model.model}"
    cure = f"; `dilaserve calibrate{model} --devices {','.join(names)}` measures the others" if names else ""
    return f"step costs are known at degree {min(laws)} alone of {', '.join(map(str, degrees))}{cure}"


def job(config: Config, device: str, names: list[str], shared: dict[str, Any], claim: memory.Claim) -> WorkerJob:
    """What the worker of one device is started with; `claim` is that of a CPU."""
    used = config.device.gpu_memory_utilization
    fields = {
        "device": device,
        "dtype": dtype_for(device, config.model.dtype),
        "threads": threads_for(device, names, config.device),
        "kv_tokens": config.device.kv_cache_tokens,
        "kv_wanted": config.device.max_num_seqs * shared["max_length"],
        "backend": backend_for(names, config.device.group_backend),
        "batched_tokens": config.device.max_num_batched_tokens,
        "max_rows": config.device.max_num_seqs,
        "eager": config.device.enforce_eager == "on",
        "claim": claim if device == "cpu" else memory.Claim(used / names.count(device), 1 - used),
    }
    return msgspec.convert({**shared, **fields}, WorkerJob)


def advised(note: str | None, unplanned: str | None) -> str | None:
    """What the user should read at the start, or None."""
    return "; ".join(filter(None, [note, unplanned and f"no planner changes the plan: {unplanned}"])) or None
