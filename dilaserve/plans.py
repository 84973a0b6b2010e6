"""Plans as users write them, which of them can be, and what is left of one when devices are missing."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from dilaserve.errors import BadRequest, quoted
from dilaserve.types import Plan

PART = re.compile(r"(\d{1,4})x(\d{1,4})")


def parsed(text: str, devices: int, degrees: Sequence[int]) -> Plan:
    """`4x1+2x2`: four instances of one device and two of two. The large ones first, so that groups are aligned.

    Raises `BadRequest` for what is no plan, or none for these devices.
    """
    sizes: list[int] = []
    for part in text.split("+"):
        found = PART.fullmatch(part.strip())
        if not found or int(found[1]) < 1 or int(found[1]) > devices:
            raise BadRequest(
                f"plan {quoted(text)} is not COUNTxDEGREE, joined by + (such as 2x1 or 4x1+2x2), for {devices} devices",
                param="plan",
            )
        sizes += [int(found[2])] * int(found[1])
    groups, start = [], 0
    for size in sorted(sizes, reverse=True):
        groups.append(tuple(range(start, start + size)))
        start += size
    return checked(Plan(tuple(groups)), devices, degrees)


def checked(plan: Plan, devices: int, degrees: Sequence[int]) -> Plan:
    """The plan with its groups in order; raises `BadRequest` with the reason if it cannot be."""
    groups = tuple(sorted(tuple(sorted(group)) for group in plan.groups))
    ranks = [rank for group in groups for rank in group]
    for group in groups:
        if len(group) not in degrees:
            allowed = ", ".join(map(str, degrees))
            raise BadRequest(f"this model runs on {allowed} devices together, not on {len(group)}", param="plan")
    if len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(devices)):
        raise BadRequest(f"the groups must hold each of the devices 0 to {devices - 1} once", param="plan")
    if any(len(set(shards)) > 1 for shards in (held(group, min(degrees)) for group in groups)):
        raise BadRequest(
            f"the weights are in {min(degrees)} parts; a group needs as many devices of each part (aligned groups do)",
            param="plan",
        )
    if devices - len(ranks) >= min(degrees):
        raise BadRequest(f"the plan uses {len(ranks)} of {devices} devices; use them all", param="plan")
    return Plan(groups)


def uniform(devices: int, degree: int) -> Plan:
    """As many instances of this degree as there can be."""
    return Plan(tuple(tuple(range(i, i + degree)) for i in range(0, devices - degree + 1, degree)))


def shrunk(plan: Plan, alive: Collection[int], degrees: Sequence[int]) -> Plan:
    """What of the plan can be with these ranks: whole groups as they are, of the others the survivors together."""
    groups: list[tuple[int, ...]] = []
    for group in plan.groups:
        parts = min(degrees)
        left = [rank for rank in group if rank in alive]
        while size := max((degree for degree in degrees if degree <= parts * min(held(left, parts))), default=0):
            each = [[rank for rank in left if rank % parts == part][: size // parts] for part in range(parts)]
            taken = tuple(sorted(rank for ranks in each for rank in ranks))
            groups.append(taken)
            left = [rank for rank in left if rank not in taken]
    return Plan(tuple(sorted(groups)))


def held(group: Sequence[int], parts: int) -> list[int]:
    """How many of the devices hold each of the parts that the weights are split into."""
    return [sum(rank % parts == part for rank in group) for part in range(parts)]


def spelled(plan: Plan) -> str:
    """The plan as counts and degrees, as users write it."""
    return counted(Counter(map(len, plan.groups)))


def counted(counts: Mapping[int, int]) -> str:
    """2 instances of degree 2 and 4 of degree 1 are `2x2+4x1`, the larger degrees first; `none` without instances."""
    return "+".join(f"{counts[size]}x{size}" for size in sorted(counts, reverse=True) if counts[size]) or "none"
