"""What goes between the door and the nodes: requests, the pieces of their answers, errors."""

from collections.abc import Mapping, Sequence

import msgspec

from dilaserve.engine.assembly import ModelCard
from dilaserve.engine.stream import Chunk
from dilaserve.engine.submit import Options
from dilaserve.errors import DilaserveError


class NodeCard(msgspec.Struct, frozen=True):
    """The model that a node serves, how many token ids it has, and whether it has a chat template."""

    model: ModelCard
    vocab_size: int
    chats: bool


class Call(msgspec.Struct, frozen=True):
    """A request. `headers`: those that name the trace it belongs to."""

    prompt: Sequence[int]  # token ids
    options: Options
    id: str
    headers: Mapping[str, str] = {}


class Started(msgspec.Struct, frozen=True):
    """The first piece of an answer: an engine has taken the request. `resumed_characters`: of `AnswerStream`."""

    node: str
    resumed_characters: int = 0


class Failure(msgspec.Struct, frozen=True):
    """An error as a value, for pickled exceptions lose what they were made with."""

    message: str
    status: int
    kind: str
    code: str | None
    param: str | None
    retry_after: float | None
    never_feasible: bool

    @classmethod
    def of(cls, error: DilaserveError) -> "Failure":
        return cls(
            error.message, error.status, error.kind, error.code, error.param, error.retry_after, error.never_feasible
        )

    def error(self) -> DilaserveError:
        """The same error; of the base class, with what it had."""
        made = DilaserveError(self.message, param=self.param, code=self.code, retry_after=self.retry_after)
        made.status, made.kind, made.never_feasible = self.status, self.kind, self.never_feasible
        return made


Piece = Started | Chunk | Failure
