"""A scheduler, its events and what follows from them, made short for tests."""

import msgspec

from dilaserve.config import Config
from dilaserve.profile.profile_file import guessed
from dilaserve.scheduler.scheduler import Scheduler
from dilaserve.types import (
    Decoding,
    InstanceReady,
    Kill,
    Launch,
    Plan,
    Request,
    Reshard,
    RowResult,
    Slo,
    StepDone,
    WorkerUp,
)


def request(row, prompt=10, answer=64, at=0.0, slo=Slo(), **decoding):  # noqa: B008
    return Request(
        id=f"r{row}",
        row=row,
        generation=1,
        prompt_tokens=prompt,
        canvas_tokens=prompt + answer,
        max_tokens=answer,
        arrived_at=at,
        decoding=Decoding(**decoding),
        slo=slo,
    )


def scheduler(guess=False, plan=None, solves=False, repeats=1, **device):
    profile = guessed("a model", "cpu")
    law = msgspec.structs.replace(profile.costs["cpu x1"], guess=guess)
    return Scheduler(Config.of(**device), {1: law}, profile.quality, plan, (1, 2, 4), solves, repeats)


def feed(machine, event, now=0.0):
    """Commands of one event and the decision after it."""
    return [*machine.observe(event, now), *machine.decide(now)]


def result(span, masks_left=0, prefix=None, stop_at=-1, unmasked=4, stage=0, rested=False):
    end = span.block_end if prefix is None else prefix
    return RowResult(span.row, span.generation, unmasked, masks_left, end, stop_at, 0.9 * unmasked, stage, rested)


def done(batch, results, last=True):
    return StepDone(batch.instance, batch.id, tuple(results), 0.01, 0.009, last)


def up(machine, ranks, pool=4096, now=0.0):
    """Commands after workers of these ranks have come up and their instances have been formed."""
    for rank in ranks:
        list(machine.observe(WorkerUp(rank, pool), now))
    return formed(machine, list(machine.decide(now)), now)


def formed(machine, commands, now):
    """What follows when all instances of a `Reshard` are ready."""
    (moves,) = [command.moves for command in commands if isinstance(command, Reshard)]
    for instance in moves.begins:
        list(machine.observe(InstanceReady(instance), now))
    return list(machine.decide(now))


PAIRS, SINGLES = Plan(((0, 1), (2, 3))), Plan(((0,), (1,), (2,), (3,)))


def of(commands, kind):
    return [command for command in commands if isinstance(command, kind)]


def killed_at(machine, until=1000.0):
    """When the scheduler first gives up on an instance, deciding whenever it wants to."""
    while (now := machine.wake_at()) < until:
        if of(machine.decide(now), Kill):
            return now
    return None


def rows_of(commands):
    return {span.row for launch in of(commands, Launch) for span in launch.batch.spans}
