"""Brings to each client's stream what the scheduler says of its request."""

import logging
from collections.abc import Callable

from dilaserve.engine.stream import Stream
from dilaserve.errors import OURS, DeadlineMissed, Overloaded, RequestFailed
from dilaserve.transport.request_table import RequestTable
from dilaserve.types import Cancel, Decline, Emit, Event, Fail, Finish, Refuse, Usage

log = logging.getLogger(__name__)
ForClient = Emit | Finish | Fail | Decline | Refuse


class Delivery:
    """Reads final tokens from the table and puts them, or an error, on the stream. `streams` are those still open."""

    def __init__(
        self,
        table: RequestTable,
        streams: dict[str, Stream],
        post: Callable[[Event], None],
        full: Callable[[float], Overloaded],
    ) -> None:
        self.table, self.streams, self.post, self.full = table, streams, post, full

    def deliver(self, command: ForClient) -> None:
        """Pass a command on to the client's stream. An error fails this request alone."""
        request = command.request
        if isinstance(command, Fail):
            log.error("request %s failed: %s", request.id, command.reason, exc_info=command.error)
        if (stream := self.streams.get(request.id)) is None:
            return  # its client has had another error
        if not isinstance(command, Emit):
            del self.streams[request.id]
        if stream.over:
            return
        try:
            self.put(stream, command)
        except RequestFailed as error:
            self.drop(stream, error)
        except Exception:
            log.exception("request %s failed: its answer could not be passed on", request.id)
            self.drop(stream, RequestFailed(OURS))

    def drop(self, stream: Stream, error: RequestFailed) -> None:
        """Fail the stream, and end its request if it still runs."""
        if not stream.over:
            stream.fail(error)
        if stream.id in self.streams:
            self.post(Cancel(stream.id, "cancelled"))

    def put(self, stream: Stream, command: ForClient) -> None:
        match command:
            case Emit(_, prefix):
                self.emit(stream, prefix)
            case Finish(_, reason, usage):
                self.push_final(stream)
                if reason == "stop" and stream.shows_stop_token:
                    stream.final += 1
                    self.push_final(stream)
                stream.finish(reason, usage)
            case Fail(_, _, for_client):
                stream.fail(RequestFailed(for_client))
            case Decline(_, usage, retry, never_feasible):
                stream.fail(missed(usage, retry, never_feasible))
            case Refuse(_, retry_after):
                stream.fail(self.full(retry_after))

    def emit(self, stream: Stream, prefix: int) -> None:
        stream.final = prefix
        if stream.waits or stream.over:
            return
        self.push_final(stream)
        if stream.stopped:
            self.post(Cancel(stream.id, "stop"))

    def push_final(self, stream: Stream) -> None:
        """Give the stream what has become final since the last time."""
        if stream.final > stream.position:
            row, new = stream.request.row, slice(stream.position, stream.final)
            stream.push(self.table.canvas[row, new].tolist(), self.table.confidence[row, new].tolist())


def missed(usage: Usage, retry_after: float | None, never_feasible: bool) -> DeadlineMissed:
    seconds = f"{usage.deadline:.3g} s" if usage.deadline is not None else "its deadline"
    if never_feasible:
        return DeadlineMissed(f"the answer takes longer than {seconds} even if nothing else runs", never_feasible=True)
    if retry_after is not None:
        return DeadlineMissed(f"the server is too busy to answer within {seconds}; try later", retry_after=retry_after)
    return DeadlineMissed(
        f"the answer could not be finished within {seconds} and was given up after {usage.steps} steps"
    )
