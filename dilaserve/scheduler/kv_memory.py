"""K/V memory of one row on its instance: taken, made longer, filled from another row's beginning."""

from dilaserve.scheduler.instance_state import InstanceState
from dilaserve.scheduler.kv_pages import rounded
from dilaserve.scheduler.request_state import RequestState
from dilaserve.types import PAGE, Copy

MORE_ROWS = 2  # that an instance may have beyond another's, and still be preferred for the K/V that it holds


def take(state: RequestState, replica: InstanceState, watermark: bool = True) -> bool:
    """Take K/V memory of the instance for the row, if there is enough.

    `watermark`: one page is left for each row of the instance that will want more.
    """
    grows = watermark and state.grows
    spare = PAGE * sum(row.wants_more for row in replica.residents.values()) if grows else 0
    kv_start = replica.pages.take(state.kv_tokens, spare)
    if kv_start is None:
        return False
    state.kv_start, state.room = kv_start, rounded(state.kv_tokens)
    return True


def reuse_prefix(state: RequestState, replica: InstanceState) -> None:
    """Copy K/V of the prompt's beginning from another row's run, before the next step of the instance.

    Once the row has stepped that run may be what it left behind itself.
    """
    part = state.part
    most = (part.block_start - part.first) // PAGE  # pages; the logits of the position before a first token are wanted
    hit = replica.pages.find(state.prefix_hashes[:most])
    if state.started_at is None:
        state.cached_prompt_tokens = min(hit.tokens, state.request.prompt_tokens) if hit else 0
    if hit:
        replica.copies.append(Copy(hit.start, state.kv_start, hit.tokens))
        state.cached, state.loads, state.ready = hit.tokens, None, None


def longest_prefix_first(state: RequestState, replicas: list[InstanceState]) -> list[InstanceState]:
    """Instances with K/V of the prompt's beginning before others, if they have few rows more than the first."""
    hashes = state.prefix_hashes
    if not hashes or len(replicas) < 2:
        return replicas
    most = len(replicas[0].residents) + MORE_ROWS
    held = [one.pages.held(hashes) if len(one.residents) <= most else 0 for one in replicas]
    return [replicas[place] for place in sorted(range(len(replicas)), key=lambda place: -held[place])]


def publish(state: RequestState) -> None:
    """A step of the row is done: let others reuse the K/V of its final tokens that are there now."""
    hashes, replica = state.prefix_hashes, state.replica
    if hashes and replica and len(replica.pages.published.get(state.kv_start, ())) < len(hashes):
        pages = min(state.cached // PAGE, len(hashes))
        replica.pages.publish(state.kv_start, hashes[:pages])


def grow(state: RequestState, replica: InstanceState) -> bool:
    """Make the row's run longer, and move its K/V if need be; False if there is no room."""
    start = replica.pages.grow(state.kv_start, state.kv_tokens)
    if start is None:
        return False
    if start != state.kv_start and state.cached:
        replica.copies.append(Copy(state.kv_start, start, state.cached))
    state.kv_start, state.room, state.ready = start, rounded(state.kv_tokens), None
    return True
