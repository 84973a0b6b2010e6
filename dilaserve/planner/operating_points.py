"""What a fleet of equal instances carries: on-time share, accuracy drop and latency by threshold and rate.

A birth-death chain over the requests in the fleet, on the mean-field law of a step; it knows no plan and no traffic.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from dilaserve.planner.program import Point
from dilaserve.profile.block_chain import Outlook
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.step_cost import StepCost
from dilaserve.scheduler.rules.admission import COMPANY, HOPELESS, KEPT

RATES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.3)  # of the fleet's highest throughput
MOST_INSTANCES = 32  # instances beyond which pooling them is taken to help no further
LEAST_SPREAD = 0.01  # least relative spread of the steps of like requests; no forecast is taken to be better
BETTER = 0.002  # relative gain in rate on time below which a further operating point is left out
PATIENT = 50.0  # factor on the unloaded latency beyond which no request waits; bounds the chain for long deadlines
NEVER = float("inf")


class Kind(NamedTuple):
    """A class of requests as planning sees it: tokens of the canvas and of the answer, seconds until the deadline.

    `weight` is what one of them is worth against others, `task` names the quality profile.
    """

    canvas: int
    answer: int
    deadline: float = NEVER
    weight: float = 1.0
    task: str | None = None


class Pace(NamedTuple):
    """A request on an instance that it shares, by rows on the instance: seconds of its life, seconds of one step."""

    life: np.ndarray  # [rows]
    step: np.ndarray  # [rows]


def points(
    law: StepCost,
    forecast: Forecast,
    kind: Kind,
    instances: int,
    rows: int,
    levels: int | None = None,
    overhead: float = 0.0,
) -> list[Point]:
    """Operating points of `instances` pooled instances with at most `rows` rows on each, at the first `levels`.

    `overhead` are seconds that each step takes outside the worker.
    """
    instances = min(instances, MOST_INSTANCES)
    drops = forecast.profile.task(kind.task).drop
    found: list[Point] = []
    for level, drop in enumerate(drops[:levels]):
        ahead = forecast.ahead(forecast.name(kind.task), level, 0, *canvas(kind, forecast))
        pace = paced(law, kind, ahead, rows, forecast.profile.block_length, overhead)
        spread = (ahead.variance + (max(LEAST_SPREAD, forecast.profile.spread) * ahead.steps) ** 2) ** 0.5
        rates = np.array(RATES) * np.max(np.arange(1, rows + 1) / pace.life)
        on_time, latency = carried(pace, spread, kind.deadline, instances, rates)
        for rate, share, seconds in zip(rates, on_time, latency, strict=True):
            if rate * share > (1.0 + BETTER) * reached(found, rate):
                found.append(Point(level, float(rate), float(share), drop, float(seconds)))
    return found


def reached(known: list[Point], rate: float) -> float:
    """Requests a second on time, at most, that mixtures of known points and of idleness get out of this rate.

    A lower level of the threshold is worth looking at where it gets more, and a higher rate as well.
    """
    return max((min(rate, point.rate) * point.on_time for point in known), default=0.0)


def unloaded(law: StepCost, forecast: Forecast, kind: Kind, overhead: float = 0.0) -> float:
    """Seconds of a request alone at the reference threshold."""
    ahead = forecast.ahead(forecast.name(kind.task), 0, 0, *canvas(kind, forecast))
    return float(paced(law, kind, ahead, 1, forecast.profile.block_length, overhead).life[0])


def canvas(kind: Kind, forecast: Forecast) -> tuple[int, int]:
    """Blocks of the answer, and their length."""
    block = forecast.profile.block_length
    return max(1, -(-kind.answer // block)), block


def paced(law: StepCost, kind: Kind, ahead: Outlook, rows: int, block: int, overhead: float) -> Pace:
    """The mean-field step law: the refreshes of all rows fall on different steps while there are enough of them."""
    lives, paces = [], []
    steps, refreshes = ahead.steps, ahead.refreshes
    for company in range(1, rows + 1):
        due = min(refreshes * company, steps)  # steps with a refresh during one life
        each = refreshes * company / due if due else 0.0
        busy = seconds(law, kind, each, company - each, block) + overhead
        calm = seconds(law, kind, 0.0, company, block) + overhead
        life = due * busy + (steps - due) * calm
        lives.append(life)
        paces.append(life / steps)
    return Pace(np.array(lives), np.array(paces))


def seconds(law: StepCost, kind: Kind, refreshing: float, reusing: float, block: int) -> float:
    tokens = refreshing * kind.canvas + reusing * block
    attention = refreshing * kind.canvas**2 + reusing * block * kind.canvas
    rows = refreshing + reusing
    every = law.fixed + law.expert_seconds(tokens)
    return every + law.marginal(tokens, attention, rows * kind.canvas, rows * (block + 1) / 2, rows)  # type: ignore[arg-type]


def carried(
    pace: Pace, spread: float, deadline: float, instances: int, rates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """On-time share and latency by rate per instance: a birth-death chain over the requests in the fleet.

    Arrivals that would be late do not join; those that find no instance which may take them wait.
    """
    state, company, waiting = crowd(pace, deadline, instances)
    index = np.arange(1, len(pace.life) + 1)
    life, step = np.interp(company, index, pace.life), np.interp(company, index, pace.step)
    leaving = np.minimum(state, instances * company) / life  # a second
    sure = ndtr((deadline - life - waiting) / (spread * step)) * (HOPELESS * pace.life[0] <= deadline)
    births = np.log(np.maximum(1e-300, rates[:, None] * instances * sure))
    log_weights = np.cumsum(births - np.log(leaving), axis=1)
    log_weights = np.concatenate([np.zeros((len(rates), 1)), log_weights], axis=1)
    weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    share = (weights[:, :-1] * sure).sum(1)
    latency = (weights[:, 1:] * state).sum(1) / np.maximum(1e-12, share * rates * instances)
    return share, latency


def crowd(pace: Pace, deadline: float, instances: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of the fleet (requests in it), and in each the rows on a busy instance and the wait of a new request.

    The longer the wait, the less slack is left, and the fewer others an instance may run at a time.
    """
    rows, alone = len(pace.life), float(pace.life[0])
    if deadline == NEVER:
        most = instances * rows
        state = np.arange(1, 3 * most + 1)
        company = np.clip(state / instances, 1.0, rows)
        return state, company, np.maximum(0, state - most) / (most / pace.life[-1])
    deadline = min(deadline, PATIENT * alone)
    work = max(1e-9, float(pace.life[-1] - alone) / max(1, rows - 1))  # what one more row adds
    waits = np.linspace(0.0, deadline, 64)
    fits = np.clip(allowed(deadline - waits, alone, work), 1.0, rows)
    replicas = instances * float(fits[0])
    reached = replicas + waits * replicas / np.interp(fits[0], np.arange(1, rows + 1), pace.life)
    state = np.arange(1, int(reached[-1]) + 1)
    waiting = np.interp(state, reached, waits)
    company = np.minimum(np.clip(state / instances, 1.0, rows), np.interp(state, reached, fits))
    return state, company, waiting


def allowed(left: np.ndarray, alone: float, work: float) -> np.ndarray:
    """Rows on an instance that the test on arrival lets a new request join, the others being half done.

    COMPANY x (alone + half the others' work) <= left - KEPT x (left - alone), see scheduler/rules/admission.py.
    """
    return 1.0 + 2.0 * ((1 - KEPT) * left + KEPT * alone - COMPANY * alone) / (COMPANY * work)
