"""How many nodes there should be, by the work that they have before them. A rule: it remembers nothing."""

import math
from collections.abc import Sequence
from typing import Any

SLACK = 0.7  # of the target that the others may reach when a node goes, so that it is not back at once


def nodes_wanted(backlogs: Sequence[float], present: int, target: float, least: int, most: int) -> int:
    """Nodes after this decision, between `least` and `most`.

    `backlogs`: for each node that has reported, seconds of work that is not done for each of its instances; `target`:
    how much of it a node should have. As many nodes are wanted as bring all to the target; one goes at a time, and only
    if the others then stay below `SLACK` of the target.
    """
    total = sum(backlogs)
    wanted = math.ceil(total / target)
    if wanted < present:
        wanted = present - 1 if present > 1 and total / (present - 1) < SLACK * target else present
    return max(least, min(most, wanted))


class BacklogPolicy:
    """The rule as Ray Serve calls it: with an `AutoscalingContext`, of whose metrics it reads `backlog`."""

    def __init__(self, target: float, least: int, most: int) -> None:
        self.target, self.least, self.most = target, least, most

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        reported = (context.aggregated_metrics or {}).get("backlog", {})
        present = context.target_num_replicas
        return nodes_wanted(list(reported.values()), present, self.target, self.least, self.most), {}
