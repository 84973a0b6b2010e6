"""Hooks that `bin/bench api_fuzz` hands to schemathesis; this file runs in its environment and imports nothing of ours.

Of random bodies with sixty optional fields hardly one is a likelihood or a stream with a canvas that is answered. So of
the bodies of the endpoints that have them, a part is cut down to such a request. How they were answered is printed.
"""

import atexit
import collections
import json
import zlib
from typing import Any

import schemathesis

SHARE = 4  # one body in so many asks for the one, and one for the other
SAID = {"prompt": "Reverse: lamu", "messages": [{"role": "user", "content": "Reverse: lamu"}]}
LIKELIHOOD = {"echo": True, "max_tokens": 0, "logprobs": 1, "likelihood": "pseudo"}
CANVAS = {"stream": True, "max_tokens": 8, "stream_options": {"include_canvas": True}}
ROUTES = {"/v1/completions": (LIKELIHOOD, CANVAS), "/v1/chat/completions": (CANVAS,)}
answered: collections.Counter[tuple[str, int]] = collections.Counter()


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replaces a part of the bodies, always the same ones, by requests with a likelihood or a canvas."""
    wishes = ROUTES.get(context.operation.path, ())
    turn, drawn = divmod(zlib.crc32(json.dumps(body, default=str).encode()), SHARE)
    if not isinstance(body, dict) or drawn >= len(wishes):
        return body
    said = {name: text for name, text in SAID.items() if name in body}
    if turn % 2:  # as it was drawn, which is mostly refused
        said = {name: value for name, value in body.items() if name in (*SAID, "seed", "likelihood") and value}
    if wishes[drawn] is CANVAS:
        said.pop("likelihood", None)
    return wishes[drawn] | said


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    answered["all", response.status_code] += 1
    if not isinstance(case.body, dict):
        return
    if case.body.get("likelihood"):
        answered["likelihood", response.status_code] += 1
    options = case.body.get("stream_options")
    if isinstance(options, dict) and options.get("include_canvas"):
        answered["canvas", response.status_code] += 1


@atexit.register
def show() -> None:
    for of in ("all", "likelihood", "canvas"):
        rows = {status: count for (name, status), count in sorted(answered.items()) if name == of}
        print(f"answers, {of}: {sum(rows.values())}, by status {rows}", flush=True)
