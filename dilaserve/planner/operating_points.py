"""What a fleet of equal instances carries: on-time share, accuracy drop and latency by threshold and rate.

A birth-death chain over the requests in the fleet, on the mean-field law of a step; it knows no plan and no traffic.
"""

import numpy as np
from scipy.special import ndtr

from dilaserve.planner.program import Point
from dilaserve.planner.step_pace import FULL, NEVER, Kind, Pace, Stepping, blocks, paced
from dilaserve.profile.forecast import Forecast
from dilaserve.profile.step_cost import StepCost
from dilaserve.scheduler.rules.admission import COMPANY, HOPELESS, KEPT

RATES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.3)  # of the fleet's highest throughput
MOST_INSTANCES = 32  # instances beyond which pooling them is taken to help no further
LEAST_SPREAD = 0.01  # least relative spread of the steps of like requests; no forecast is taken to be better
BETTER = 0.002  # relative gain in rate on time below which a further operating point is left out
PATIENT = 50.0  # factor on the unloaded latency beyond which no request waits; bounds the chain for long deadlines


def points(
    law: StepCost,
    forecast: Forecast,
    kind: Kind,
    instances: int,
    rows: int,
    levels: int | None = None,
    overhead: float = 0.0,
    stepping: Stepping = FULL,
) -> list[Point]:
    """Operating points of `instances` pooled instances with at most `rows` rows on each, at the first `levels`.

    `overhead` are seconds that each step takes outside the worker, `stepping` says what the steps are.
    """
    instances = min(instances, MOST_INSTANCES)
    drops = forecast.profile.task(kind.task).drop
    answer = blocks(kind, forecast.profile.block_length, stepping)
    found: list[Point] = []
    for level, drop in enumerate(drops[:levels]):
        ahead = forecast.ahead(forecast.name(kind.task), level, 0, *answer.masked)
        pace = paced(law, kind, ahead, rows, answer.length, overhead, stepping)
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


def unloaded(law: StepCost, forecast: Forecast, kind: Kind, overhead: float = 0.0, stepping: Stepping = FULL) -> float:
    """Seconds of a request alone at the reference threshold."""
    answer = blocks(kind, forecast.profile.block_length, stepping)
    ahead = forecast.ahead(forecast.name(kind.task), 0, 0, *answer.masked)
    return float(paced(law, kind, ahead, 1, answer.length, overhead, stepping).life[0])


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
