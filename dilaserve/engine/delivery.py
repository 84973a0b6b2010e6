"""Delivers to the clients' streams what the scheduler says of their requests. An error here ends one request only."""

import logging
from collections.abc import Callable, Iterable, Sequence

from dilaserve.engine.canvas import snapshot
from dilaserve.engine.observer import Ended, Message, Observer, fate_of
from dilaserve.engine.prefix_hashes import PrefixHasher
from dilaserve.engine.stream import Stream
from dilaserve.errors import OURS, DeadlineMissed, Overloaded, RequestFailed
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import Cancel, Decline, Denoised, Emit, Event, Fail, Finish, PrefixGrown, Refuse, RowResult, Usage

log = logging.getLogger(__name__)
TOO_MUCH = (
    "more work without deadlines waits than is done while others have deadlines (--best-effort-backlog); "
    "try again later, or send a deadline"
)


class Delivery:
    """`streams` are the open ones by request id; `places` is --max-queue, for the message to refused clients.

    `add` puts an event behind those that are being observed; `post` also wakes the consumer.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        table: RequestTable,
        post: Callable[[Event], None],
        add: Callable[[Event], None],
        places: int,
        observers: Sequence[Observer],
        clock: Callable[[], float],
    ) -> None:
        self.streams, self.table, self.post, self.add, self.places = streams, table, post, add, places
        self.observers, self.clock = observers, clock

    def deliver(self, message: Message | Denoised) -> None:
        """Hand the message to the stream of its request, if that is still open."""
        request = message.request
        if isinstance(message, Fail):
            log.error("request %s failed: %s", request.id, message.reason, exc_info=message.error)
        stream = self.streams.get(request.id)
        if self.observers and not isinstance(message, Denoised):
            self.report(message, stream)
        if stream is None:
            return  # its client has had another error
        if not isinstance(message, Emit | Denoised):
            del self.streams[request.id]
        if stream.over:
            return
        try:
            self.pass_on(stream, message)
        except RequestFailed as error:
            self.drop(stream, error)
        except Exception:
            log.exception("request %s failed: its answer could not be passed on", request.id)
            self.drop(stream, RequestFailed(OURS))

    def report(self, message: Message, stream: Stream | None) -> None:
        """Tell the observers; an error of theirs is logged and changes nothing."""
        now, request = self.clock(), message.request
        try:
            if isinstance(message, Emit):
                if stream and message.prefix > stream.final:
                    for observer in self.observers:
                        observer.emitted(request, message.prefix - stream.final, stream.last_at, now)
                    stream.first_at, stream.last_at = stream.first_at or now, now
                return
            ended = ending(message, stream, now)
            for observer in self.observers:
                observer.ended(ended)
        except Exception:
            log.exception("request %s could not be reported", request.id)

    def pass_on(self, stream: Stream, message: Message | Denoised) -> None:
        request = message.request
        match message:
            case Emit(_, prefix):
                self.emit(stream, prefix)
            case Denoised() if not stream.patient:
                stream.show(snapshot(self.table, message, self.clock()))
            case Finish(_, reason, usage):
                self.push(stream)
                if reason == "stop" and stream.shows_stop_token and not request.ended:
                    stream.final += 1
                    self.push(stream)
                stream.finish(reason, usage)
            case Fail(_, _, for_client):
                stream.fail(RequestFailed(for_client))
            case Decline(_, usage, retry, never_feasible):
                stream.fail(missed(usage, retry, never_feasible))
            case Refuse(_, retry_after, _, too_much):
                stream.fail(
                    Overloaded(TOO_MUCH, retry_after=retry_after) if too_much else full(self.places, retry_after)
                )

    def learn(self, results: Iterable[RowResult]) -> None:
        """Hand the alternatives of what a step has unmasked to the streams that want them."""
        for one in results:
            if one.alternatives:
                row = one.row, one.generation
                for stream in self.streams.values():
                    if (stream.request.row, stream.request.generation) == row:
                        stream.learn(one.alternatives)

    def drop(self, stream: Stream, error: RequestFailed) -> None:
        """Fail the stream, and end its request if it still runs."""
        if not stream.over:
            stream.fail(error)
        if stream.id in self.streams:
            self.post(Cancel(stream.id, "cancelled"))

    def emit(self, stream: Stream, prefix: int) -> None:
        stream.final = prefix
        self.table.resumed[stream.request.row] = False  # all is put back, so that its steps are like others again
        if stream.hasher:
            self.hash(stream, stream.hasher)
        if stream.waits or stream.over:
            return
        self.push(stream)
        if stream.stopped:
            self.post(Cancel(stream.id, "stop"))

    def hash(self, stream: Stream, hasher: PrefixHasher) -> None:
        """Tell the scheduler under which hashes the K/V of what has become final are found by the next turn."""
        tokens = self.table.canvas[stream.request.row, hasher.position : stream.final]
        if hashes := hasher.extend(tokens):
            self.add(PrefixGrown(stream.id, hashes))

    def push(self, stream: Stream) -> None:
        """Give the stream the tokens that became final since the last time."""
        if stream.final > stream.position:
            row, new = stream.request.row, slice(stream.position, stream.final)
            stream.push(self.table.canvas[row, new].tolist(), self.table.confidence[row, new].tolist())


def ending(message: Finish | Fail | Decline | Refuse, stream: Stream | None, now: float) -> Ended:
    """What observers hear of the end of a request."""
    fate, reason = fate_of(message)
    request = message.request
    return Ended(
        request=request,
        fate=fate,
        reason=reason,
        usage=message.usage,
        tokens=stream.final - request.begin if stream else 0,
        first_at=stream.first_at if stream else None,
        last_at=stream.last_at if stream else None,
        ended_at=now,
    )


def full(places: int, retry_after: float, too_much: bool = False) -> Overloaded:
    """The error of a request for which there is no row, or before which too much work waits."""
    if too_much:
        return Overloaded(TOO_MUCH, retry_after=retry_after)
    return Overloaded(f"all {places} places (--max-queue) are taken; try again later", retry_after=retry_after)


def missed(usage: Usage, retry_after: float | None, never_feasible: bool) -> DeadlineMissed:
    """The error of a request that was declined because of its deadline."""
    seconds = f"{usage.deadline:.3g} s" if usage.deadline is not None else "its deadline"
    if never_feasible:
        return DeadlineMissed(f"the answer takes longer than {seconds} even if nothing else runs", never_feasible=True)
    if retry_after is not None:
        return DeadlineMissed(f"the server is too busy to answer within {seconds}; try later", retry_after=retry_after)
    return DeadlineMissed(
        f"the answer could not be finished within {seconds} and was given up after {usage.steps} steps"
    )
