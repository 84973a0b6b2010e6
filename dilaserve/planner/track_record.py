"""How forecasts turned out: by plan, the ratio of missed requests to those forecast. Has no clock."""

import math
from typing import NamedTuple

from dilaserve.planner.program import BLUR, Counts, Proposal, believed, surprise

FEW = 20  # requests that must have ended for a share to mean something
QUICK = 0.4  # weight of the newest observation
FADING = 0.98  # what is left of the trust in a plan's own record after one more question
ALIKE = 0.7  # difference in the logarithm of what is missed at which situations are not alike any more
PRIOR = 0.1  # weight of the forecast being right where nothing is known
MOST = 6  # plans that are remembered

Key = tuple[tuple[int, int], ...]  # (degree, instances), sorted


class Record(NamedTuple):
    """The logarithm of a plan's surprise, how much it is trusted, from 0 to 1, and the share forecast to be missed."""

    surprise: float
    trust: float
    missed: float


NONE = Record(0.0, 0.0, 0.0)


class TrackRecord:
    """Remembers the plans that were in force. Others are taken to surprise as these did in situations that were alike:
    else whatever was never tried would look best.
    """

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}

    def happened(self, now: Proposal, met: int, ended: int) -> None:
        """Under the running plan, of which `now` was expected, `met` of the `ended` requests were in time.

        What was seen of it in situations that were not alike counts no longer. Little trust alone draws what is
        expected to what other plans were like: the record itself is the mean of what was seen.
        """
        self.records = {key: record._replace(trust=FADING * record.trust) for key, record in self.records.items()}
        if ended < FEW:
            return
        missed, before = 1.0 - now.on_time, self.records.pop(key_of(now.counts), NONE)
        seen = math.log(surprise(now.on_time, met / ended))
        kept = (1.0 - QUICK) * before.trust * alike(missed, before.missed)
        record = Record((kept * before.surprise + QUICK * seen) / (kept + QUICK), kept + QUICK, missed)
        self.records[key_of(now.counts)] = record
        if len(self.records) > MOST:
            del self.records[min(self.records, key=lambda key: self.records[key].trust)]

    def expected(self, proposal: Proposal) -> float:
        """The logarithm of the surprise that it will be: by its own record of alike situations, else by all of them."""
        missed = 1.0 - proposal.on_time
        weights = {key: record.trust * alike(missed, record.missed) for key, record in self.records.items()}
        total = sum(weight * self.records[key].surprise for key, weight in weights.items())
        usual = total / (sum(weights.values()) + PRIOR)
        own = key_of(proposal.counts)
        return usual + weights.get(own, 0.0) * (self.records.get(own, NONE).surprise - usual)

    def judged(self, proposal: Proposal) -> Proposal:
        """The proposal as experience has it."""
        on_time = believed(proposal.on_time, math.exp(self.expected(proposal)))
        return proposal._replace(on_time=on_time, value=proposal.value + on_time - proposal.on_time)

    def tried(self) -> list[dict[int, int]]:
        """The counts that are remembered."""
        return [dict(key) for key in self.records]


def alike(one: float, other: float) -> float:
    """Of two shares that are missed, from 0 to 1."""
    apart = math.log((one + BLUR) / (other + BLUR)) / ALIKE
    return math.exp(-apart * apart / 2)


def key_of(counts: Counts) -> Key:
    return tuple(sorted((degree, count) for degree, count in counts.items() if count))
