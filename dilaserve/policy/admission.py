"""Which waiting request goes to which instance."""

from collections.abc import Sequence
from typing import NamedTuple


class Room(NamedTuple):
    """An instance as admission sees it: rows resident, rows allowed."""

    instance: int
    residents: int
    limit: int


def least_loaded(rooms: Sequence[Room]) -> list[int]:
    """Instances with a free row, the emptiest first."""
    free = [room for room in rooms if room.residents < room.limit]
    return [room.instance for room in sorted(free, key=lambda room: (room.residents / room.limit, room.instance))]
