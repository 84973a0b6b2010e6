"""What can go wrong, as one family of exceptions.

Each error carries the HTTP status it becomes, and a sentence that tells the reader what to change.
"""

MAX_ECHO = 100  # characters of what a client has sent that an error may repeat


def shortened(text: str) -> str:
    """Text that may repeat what a client has sent, cut to `MAX_ECHO` characters."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"


def quoted(value: object) -> str:
    """A value that a client has sent, as an error repeats it."""
    if isinstance(value, int) and value.bit_length() > MAX_ECHO:
        return f"a number of {value.bit_length()} bits"
    return shortened(repr(value[:MAX_ECHO] if isinstance(value, str) else value))


class DilaserveError(Exception):
    """Base of every error this package raises on purpose.

    `status` is the HTTP status it maps to, `code` OpenAI's short machine-readable word, `param` the request field at
    fault, `retry_after` the seconds after which trying again makes sense.
    """

    status = 500
    kind = "server_error"
    code: str | None = None
    never_feasible = False  # the same request will never be served, though the status reads as if it might

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        return str(self.args[0])


class ConfigError(DilaserveError):
    """The configuration cannot work; the command line exits with 2."""


class CheckpointError(ConfigError):
    """The model directory is missing, damaged, too large or of an unknown architecture."""


class BadRequest(DilaserveError):
    """The request is malformed or asks for something that cannot be honoured."""

    status = 400
    kind = "invalid_request_error"


class Unauthorized(DilaserveError):
    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"


class Forbidden(DilaserveError):
    """The key, or the configuration, does not allow it."""

    status = 403
    kind = "permission_error"
    code = "forbidden"


class NotFound(DilaserveError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class Overloaded(DilaserveError):
    """Every row of the request table is taken."""

    status = 429
    kind = "rate_limit_error"
    code = "queue_full"


class DeadlineMissed(DilaserveError):
    """The deadline cannot be met, and the client does not want the answer late.

    429 when the request never started, with `retry_after`, or with `never_feasible` if it could not have made it alone;
    else 504.
    """

    code = "deadline"

    def __init__(self, message: str, *, retry_after: float | None = None, never_feasible: bool = False) -> None:
        super().__init__(message, retry_after=retry_after)
        self.never_feasible = never_feasible
        if never_feasible or retry_after is not None:
            self.status, self.kind = 429, "rate_limit_error"
        else:
            self.status, self.kind = 504, "timeout_error"


class Unavailable(DilaserveError):
    """The engine is starting, draining or stopped."""

    status = 503
    kind = "service_unavailable"
    code = "unavailable"


OURS = "an error on our side ended the request; others are not affected"  # what clients read of one


class RequestFailed(DilaserveError):
    """The engine gave up on this request; others are not affected."""

    code = "request_failed"
