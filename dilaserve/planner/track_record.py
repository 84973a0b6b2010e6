"""Corrects forecasts by experience: for each plan, how many requests missed against how many were predicted to.

It has no clock: trust fades with each look at the traffic.
"""

import math
from typing import NamedTuple

from dilaserve.planner.adoption import BLUR
from dilaserve.planner.program import Counts, Proposal

FEW = 20  # requests that must have ended before an observed on-time share corrects anything
QUICK = 0.4  # weight of the newest observation in a plan's record; a larger value follows faster and is noisier
FADING = 0.98  # factor on the trust in each record at each look; old records lose their influence
ALIKE = 0.7  # width, in the logarithm of the missed share, within which records apply to a situation
PRIOR = 0.1  # weight of "the forecast is right" against all records; it decides where few are known
MOST = 6  # plans whose records are kept
MOST_OFF = 2.0  # largest factor by which one observation corrects a forecast, up or down

Key = tuple[tuple[int, int], ...]  # (degree, instances), sorted


class Record(NamedTuple):
    """How far forecasts for one plan were off.

    `log_ratio` is the logarithm of `miss_ratio`, `trust` the record's weight from 0 to 1, `missed` the share that was
    predicted to miss.
    """

    log_ratio: float
    trust: float
    missed: float


NONE = Record(0.0, 0.0, 0.0)


class TrackRecord:
    """Corrects forecasts by what was observed under the plans that ran.

    A plan that never ran is corrected by the records of the others. Otherwise an untried plan would always look best.
    """

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}

    def observe(self, now: Proposal, met: int, ended: int) -> None:
        """Record that `met` of `ended` requests were on time under the running plan, for which `now` was predicted.

        Older observations of the plan count by how alike their situations were. The record is their mean; a record of
        little trust pulls the correction towards that of other plans.
        """
        self.records = {key: record._replace(trust=FADING * record.trust) for key, record in self.records.items()}
        if ended < FEW:
            return
        missed, before = 1.0 - now.on_time, self.records.pop(key_of(now.counts), NONE)
        seen = math.log(miss_ratio(now.on_time, met / ended))
        kept = (1.0 - QUICK) * before.trust * alike(missed, before.missed)
        record = Record((kept * before.log_ratio + QUICK * seen) / (kept + QUICK), kept + QUICK, missed)
        self.records[key_of(now.counts)] = record
        if len(self.records) > MOST:
            del self.records[min(self.records, key=lambda key: self.records[key].trust)]

    def expected_log_ratio(self, proposal: Proposal) -> float:
        """The logarithm of the miss ratio to expect: by the plan's own record in alike situations, else by all."""
        missed = 1.0 - proposal.on_time
        weights = {key: record.trust * alike(missed, record.missed) for key, record in self.records.items()}
        total = sum(weight * self.records[key].log_ratio for key, weight in weights.items())
        usual = total / (sum(weights.values()) + PRIOR)
        own = key_of(proposal.counts)
        return usual + weights.get(own, 0.0) * (self.records.get(own, NONE).log_ratio - usual)

    def corrected(self, proposal: Proposal) -> Proposal:
        """The proposal with its on-time share as the records correct it."""
        on_time = corrected_share(proposal.on_time, math.exp(self.expected_log_ratio(proposal)))
        return proposal._replace(on_time=on_time, value=proposal.value + on_time - proposal.on_time)

    def tried(self) -> list[dict[int, int]]:
        """The plans that have a record, as instances by degree."""
        return [dict(key) for key in self.records]


def miss_ratio(predicted: float, seen: float) -> float:
    """The observed missed share over the predicted one, both from on-time shares; within `MOST_OFF` either way."""
    ratio = (1.0 - seen + BLUR) / (1.0 - predicted + BLUR)
    return min(MOST_OFF, max(1.0 / MOST_OFF, ratio))


def corrected_share(predicted: float, ratio: float) -> float:
    """The on-time share to expect where `ratio` times as many requests miss as predicted."""
    return min(1.0, max(0.0, 1.0 - (1.0 - predicted + BLUR) * ratio + BLUR))


def alike(one: float, other: float) -> float:
    """How alike two situations are by their missed shares: 1 for equal ones, towards 0 for different ones."""
    apart = math.log((one + BLUR) / (other + BLUR)) / ALIKE
    return math.exp(-apart * apart / 2)


def key_of(counts: Counts) -> Key:
    return tuple(sorted((degree, count) for degree, count in counts.items() if count))
