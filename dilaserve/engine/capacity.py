"""K/V tokens that workers and instances have."""

from collections.abc import Sequence

from dilaserve.types import PAGE, Event, InstanceLost, InstanceReady, WorkerUp


class Capacity:
    """`instances`: K/V tokens of those that are up; `pools`: of the workers that are up, by rank, at degree 1."""

    def __init__(self) -> None:
        self.instances: dict[int, int] = {}
        self.pools: dict[int, int] = {}

    def note(self, event: Event) -> None:
        match event:
            case InstanceReady(instance):
                self.instances[instance.id] = instance.kv_tokens
            case InstanceLost(instance):
                self.instances.pop(instance, None)
            case WorkerUp(rank, kv_tokens):
                self.pools[rank] = kv_tokens

    def smallest(self, degrees: Sequence[int]) -> int | None:
        """K/V tokens that every instance has under any plan, so that no change of plan leaves a row without a place;
        None before a worker was up.
        """
        return min(self.pools.values()) // PAGE * PAGE * min(degrees) if self.pools else None
