"""What became of forecasts: how many times as much was missed under each plan as was foretold. Has no clock."""

import math
from typing import NamedTuple

from dilaserve.policy.planning import BLUR, Counts, Proposal, believed, surprise

FEW = 20  # requests that must have ended for a share to mean something
QUICK = 0.4  # weight of the newest observation
FADING = 0.98  # what is left of the trust in a plan's own record after one more question
ALIKE = 0.7  # difference in the logarithm of what is missed at which situations are not alike any more
MOST = 6  # plans that are remembered

Key = tuple[tuple[int, int], ...]  # (degree, instances), sorted


class Record(NamedTuple):
    """The logarithm of a plan's surprise, how much it is trusted, from 0 to 1, and what was foretold to be missed."""

    surprise: float
    trust: float
    missed: float


NONE = Record(0.0, 0.0, 0.0)


class Hindsight:
    """Remembers the plans that were in force. One that was not, or not in such a situation, is taken to surprise as
    the running one does.
    """

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.general = 0.0  # logarithm of the surprise of whichever plan is in force

    def happened(self, now: Proposal, met: int, ended: int) -> None:
        """Under the running plan, of which `now` was expected, `met` of the `ended` requests were in time."""
        self.records = {key: record._replace(trust=FADING * record.trust) for key, record in self.records.items()}
        if ended < FEW:
            return
        before, trust = self.expected(now), self.records.pop(key_of(now.counts), NONE).trust
        self.general = before + QUICK * (math.log(surprise(now.on_time, met / ended)) - before)
        record = Record(self.general, trust + QUICK * (1.0 - trust), 1.0 - now.on_time)
        self.records[key_of(now.counts)] = record
        if len(self.records) > MOST:
            del self.records[min(self.records, key=lambda key: self.records[key].trust)]

    def expected(self, proposal: Proposal) -> float:
        """The logarithm of the surprise that it will be."""
        known = self.records.get(key_of(proposal.counts), NONE)
        apart = math.log((1.0 - proposal.on_time + BLUR) / (known.missed + BLUR)) / ALIKE
        return self.general + known.trust * math.exp(-apart * apart / 2) * (known.surprise - self.general)

    def judged(self, proposal: Proposal) -> Proposal:
        """The proposal as experience has it."""
        on_time = believed(proposal.on_time, math.exp(self.expected(proposal)))
        return proposal._replace(on_time=on_time, value=proposal.value + on_time - proposal.on_time)

    def tried(self) -> list[dict[int, int]]:
        """The counts that are remembered."""
        return [dict(key) for key in self.records]


def key_of(counts: Counts) -> Key:
    return tuple(sorted((degree, count) for degree, count in counts.items() if count))
