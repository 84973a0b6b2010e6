"""How the log is written: text or JSON lines on standard error, each with the id of the request that it is about."""

import logging
import sys
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]
REQUEST: ContextVar[str] = ContextVar("request", default="")  # id of the HTTP request that this task handles
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
KEYS = {"asctime": "time", "levelname": "level", "name": "logger"}  # of JSON lines, by the names of `logging`


class RequestId(logging.Filter):
    """Gives each record the id of the request at hand, unless it brings one."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id") and (id := REQUEST.get()):
            record.request_id = id
        return True


class TextFormatter(logging.Formatter):
    """One line, with the request's id behind it where the message does not say it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, id = super().formatMessage(record), getattr(record, "request_id", "")
        return f"{line} [request {id}]" if id and id not in line else line


def formatter(kind: LogFormat) -> logging.Formatter:
    if kind == "text":
        return TextFormatter(TEXT)
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=KEYS)


def configure(level: str, kind: LogFormat) -> None:
    """Log to standard error from this level on, unless the program has set up its log already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(kind))
    handler.addFilter(RequestId())
    logging.basicConfig(level=level.upper(), handlers=[handler])
