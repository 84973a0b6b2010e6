"""Memory in which the workers of one box hand tensors to each other: a slot pair, a counter and two flags per rank.

Knows the layout and who may write what: a rank writes its own slots and counter, the engine's process writes the flags.
"""

from dilaserve.system.shared_memory import SharedBytes

MOST = 2**25  # bytes of all slots
SLOT = 2**22  # bytes of one slot at most; larger tensors pass in pieces
LINE = 64  # bytes; a counter or a flag has a cache line of its own
WORDS = LINE // 8
SHIFT = 32  # a counter is the instance's number, then the collectives on it


class Exchange:
    """Two slots for each of `ranks` ranks: one is filled while peers may still read the other.

    Pickling it (to a child process) shares the memory, it does not copy it.
    """

    def __init__(self, ranks: int, slot: int | None = None, memory: SharedBytes | None = None) -> None:
        slot = slot or min(SLOT, MOST // (2 * ranks) // LINE * LINE)
        self.ranks, self.slot = ranks, slot
        head = 3 * ranks * LINE
        self.memory = memory or SharedBytes(head + (2 * ranks * slot if ranks > 1 else 0))
        buffer = self.memory.tensor
        words = memoryview(buffer[:head].numpy()).cast("q")  # type: ignore[arg-type]
        self.counters, self.flags, self.calls = (
            words[i * ranks * WORDS : (i + 1) * ranks * WORDS : WORDS] for i in range(3)
        )
        self.slots = buffer[head:].view(ranks, 2, slot) if ranks > 1 else buffer[:0]

    def __reduce__(self) -> tuple[type["Exchange"], tuple[int, int, SharedBytes]]:
        return Exchange, (self.ranks, self.slot, self.memory)

    def abandon(self, rank: int, instance: int) -> None:
        """Let the rank leave every collective of this instance and of earlier ones."""
        self.flags[rank] = max(self.flags[rank], instance + 1)

    def abandoned(self, rank: int, instance: int) -> bool:
        return self.flags[rank] > instance

    def stop_early(self, rank: int, batch: int) -> None:
        """Let the rank begin no other step of this batch."""
        self.calls[rank] = batch

    def stops_early(self, rank: int, batch: int) -> bool:
        return self.calls[rank] >= batch

    def behind(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Those that the others wait for, as far as the counters tell; all of them when they are level."""
        least = min(self.counters[rank] for rank in ranks)
        return tuple(rank for rank in ranks if self.counters[rank] == least)


def first(instance: int) -> int:
    """The counter of a rank that has joined the instance and not yet met its peers."""
    return (instance + 1) << SHIFT
