"""From counts by degree to aligned groups of devices that keep what runs. Knows nothing of traffic or time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache

DeviceGroup = tuple[int, ...]  # sorted ranks
Choice = tuple[int, int, tuple[DeviceGroup, ...]]  # instances kept, devices kept, the groups
MOST_EXACT = 64  # ranks up to which all layouts are compared; above, a quicker search may miss the best


def changed(old: Sequence[DeviceGroup], new: Sequence[DeviceGroup]) -> float:
    """The share of the new plan's devices that are in a newly formed group."""
    total = sum(map(len, new))
    return sum(map(len, set(new) - set(old))) / total if total else 0.0


def block(start: int, degree: int) -> DeviceGroup:
    return tuple(range(start, start + degree))


def groups(alive: Collection[int], degrees: Collection[int]) -> dict[int, int]:
    """How many aligned groups of each degree fit on the ranks that are alive, each as if no other were taken.

    Powers of two nest: counts n can be packed if and only if Σ (other / degree)·n[other] over all other ≥ degree is at
    most this number, for every degree. Degrees of which none fits are left out.
    """
    living = set(alive)
    found = {degree: sum(1 for _ in aligned(living, degree)) for degree in sorted(degrees)}
    return {degree: count for degree, count in found.items() if count}


def aligned(alive: Collection[int], degree: int) -> Iterator[DeviceGroup]:
    for start in sorted({rank - rank % degree for rank in alive}):
        if all(rank in alive for rank in range(start, start + degree)):
            yield block(start, degree)


def layout(
    counts: Mapping[int, int], alive: Collection[int], running: Collection[DeviceGroup] = ()
) -> tuple[DeviceGroup, ...]:
    """The aligned layout with these counts that keeps the most running instances, then the most of their devices.

    Among equals the larger groups get the lower ranks; beyond `MOST_EXACT` ranks it is not always the best that is
    found. Raises `ValueError` if the counts cannot be packed.
    """
    if len(alive) > MOST_EXACT:
        return quick_layout(counts, alive, running)
    degrees = tuple(sorted((degree for degree, count in counts.items() if count), reverse=True))
    if not degrees:
        return ()
    wanted = tuple(counts[degree] for degree in degrees)
    living, there = frozenset(alive), frozenset(running)

    @cache
    def choices(start: int, size: int) -> dict[tuple[int, ...], Choice]:
        """The best choice in one aligned block, by counts used."""
        nothing = (0,) * len(degrees)
        here: dict[tuple[int, ...], Choice] = {nothing: (0, 0, ())}
        if size > degrees[-1]:
            half = size // 2
            here = combined(choices(start, half), choices(start + half, half), wanted)
        if size in degrees and living.issuperset(block(start, size)):
            group = block(start, size)
            same = group in there
            used = tuple(int(degree == size) for degree in degrees)
            better(here, used, (int(same), size * same, (group,)))
        return here

    top = degrees[0]
    best: dict[tuple[int, ...], Choice] = {(0,) * len(degrees): (0, 0, ())}
    for start in sorted({rank - rank % top for rank in living}):
        best = combined(best, choices(start, top), wanted)
    if wanted not in best:
        raise ValueError(f"{dict(counts)} do not fit on the ranks {sorted(living)}")
    return best[wanted][2]


def quick_layout(
    counts: Mapping[int, int], alive: Collection[int], running: Collection[DeviceGroup] = ()
) -> tuple[DeviceGroup, ...]:
    """Group by group, the largest first: running ones, then where the fewest running ones of smaller degrees are.

    As powers of two nest, whatever is taken first leaves as many smaller groups. Raises `ValueError` as `layout` does.
    """
    free, there, found = set(alive), set(running), list[DeviceGroup]()
    for degree in sorted((degree for degree, count in counts.items() if count), reverse=True):
        smaller = {rank for group in there if len(group) < degree and counts.get(len(group)) for rank in group}
        blocks = sorted(aligned(free, degree), key=lambda group: (group not in there, len(smaller & set(group)), group))
        if len(blocks) < counts[degree]:
            raise ValueError(f"{dict(counts)} do not fit on the ranks {sorted(alive)}")
        found += blocks[: counts[degree]]
        free.difference_update(*blocks[: counts[degree]])
    return tuple(sorted(found))


def combined(
    left: Mapping[tuple[int, ...], Choice], right: Mapping[tuple[int, ...], Choice], most: tuple[int, ...]
) -> dict[tuple[int, ...], Choice]:
    found: dict[tuple[int, ...], Choice] = {}
    for used, (instances, kept, groups) in left.items():
        for more, (other_instances, other_kept, others) in right.items():
            total = tuple(map(int.__add__, used, more))
            if all(map(int.__le__, total, most)):
                better(found, total, (instances + other_instances, kept + other_kept, groups + others))
    return found


def better(found: dict[tuple[int, ...], Choice], used: tuple[int, ...], choice: Choice) -> None:
    old = found.get(used)
    if old is None or (choice[:2], shape(choice)) > (old[:2], shape(old)):
        found[used] = choice


def shape(choice: Choice) -> list[int]:
    return [len(group) for group in choice[2]]
