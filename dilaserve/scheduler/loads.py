"""What a request still needs, by threshold level."""

import msgspec

from dilaserve.profile.forecast import Track
from dilaserve.scheduler.rules.demand import load
from dilaserve.types import Load


class Loads(msgspec.Struct):
    """What a request still needs, by its own levels, worked out when it is asked for.

    `refresh` and `reuse` are the seconds that such steps of the row take at `degree`, `due` the refreshes that it needs
    right now.
    """

    tracks: list[Track]
    masks: int
    due: float
    drift: float
    refresh: float
    reuse: float
    interval: int
    degree: int
    known: dict[int, Load] = {}

    def __getitem__(self, level: int) -> Load:
        found = self.known.get(level)
        if found is None:
            (law, after), masks = self.tracks[level], self.masks
            stays = 1.0 - law.ends[masks]
            steps = law.steps[masks] + stays * after.steps
            refreshes = self.due + stays * after.refreshes
            if self.interval:
                refreshes = max(refreshes, steps / self.interval)
            found = self.known[level] = load(steps, refreshes, self.drift, self.refresh, self.reuse)
        return found
