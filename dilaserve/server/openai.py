"""How a request becomes the engine's options: OpenAI's names, headers of gateways, and how often each prompt runs."""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from dilaserve.engine import slo_classes
from dilaserve.engine.submit import Options
from dilaserve.errors import BadRequest
from dilaserve.server import first_arrival, gateway_headers
from dilaserve.server.api_keys import Tenant
from dilaserve.server.backend import Backend
from dilaserve.server.gateway_headers import AskedSlo, number
from dilaserve.server.schema import ChatRequest, Common, CompletionRequest, Slo, TokenizeRequest


def check_stream(request: Common) -> None:
    """Raise `BadRequest` for options of a stream that is none."""
    if (wanted := request.stream_options) is None:
        return
    if (wanted.include_usage or wanted.include_canvas or wanted.continuous_usage_stats) and not request.stream:
        raise BadRequest("stream_options needs stream: true", param="stream_options")


def check_tokenize(request: TokenizeRequest) -> None:
    """Raise `BadRequest` for a request to /tokenize that is not of one text, with the special tokens it has here."""
    if (request.prompt is None) == (request.messages is None):
        raise BadRequest("give either prompt or messages")
    added = request.prompt is not None  # the chat template writes them itself
    if request.add_special_tokens not in (None, added):
        raise BadRequest(
            f"add_special_tokens is always {str(added).lower()} here; leave it out",
            param="add_special_tokens",
            code="unsupported_parameter",
        )


def with_headers(request: Common, headers: Mapping[str, str], engine: Backend) -> list[str]:
    """Take over what gateways put into headers that cannot touch the body; gives warnings about what was ignored.

    The body goes before, then our own headers, then those that gateways set for themselves too. Raises `BadRequest`.
    """
    slo, asked = request.slo or Slo(), AskedSlo()
    if not dated(slo):
        slo = msgspec.structs.replace(
            slo, deadline_ms=number(headers, "x-slo-deadline-ms", float), class_=headers.get("x-slo-class")
        )
    if not dated(slo):
        asked = asked_by_gateway(request, headers, engine)
        slo = msgspec.structs.replace(slo, deadline_ms=asked.deadline_ms, class_=asked.class_)
    if slo.elapsed_ms is None:
        slo = msgspec.structs.replace(slo, elapsed_ms=first_arrival.elapsed_ms(headers, time.time()))
    if request.priority is None:
        request.priority = number(headers, "x-priority", int)
    if request.user is None:
        request.user = gateway_headers.tenant(headers)
    request.slo = slo
    return [*asked.warnings]


def dated(slo: Slo) -> bool:
    """Whether it asks for a deadline."""
    return slo.class_ is not None or slo.deadline_ms is not None


def asked_by_gateway(request: Common, headers: Mapping[str, str], engine: Backend) -> AskedSlo:
    """What headers ask that gateways set for themselves too."""
    default = max(engine.config.decode.default_max_tokens, request.min_tokens or 0)
    tokens = default if (wanted := max_tokens(request)) is None else wanted
    classes = slo_classes.parse_classes(engine.config.scheduler.slo_class)
    return gateway_headers.slo(headers, min(tokens, engine.model.max_model_len), bool(request.stream), classes)


def deadlines(request: Common) -> dict[str, Any]:
    """The engine's options that speak of deadlines."""
    slo = request.slo or Slo()
    floor = request.min_confidence_threshold if slo.min_confidence_threshold is None else slo.min_confidence_threshold
    return {
        "deadline_ms": slo.deadline_ms,
        "elapsed_ms": slo.elapsed_ms,
        "slo_class": slo.class_,
        "on_miss": slo.on_miss,
        "priority": request.priority if slo.priority is None else slo.priority,
        "min_confidence_threshold": floor,
        "task": slo.task,
        "user": request.user,
    }


def options(request: Common, choice: int, tenant: Tenant | None = None, seed: int | None = None) -> Options:
    """The engine's options for one of the choices; a seed is counted up from choice to choice, also `seed`, which is
    that of requests that state none.

    What the tenant of a named key may do goes before what the request says. Raises `BadRequest`.
    """
    stop = request.stop
    seed = seed if request.seed is None else request.seed
    given: dict[str, Any] = {
        "max_tokens": max_tokens(request),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": None if seed is None else wrapped(seed, choice),
        "stop": (stop,) if isinstance(stop, str) else None if stop is None else tuple(stop),
        "top_logprobs": top_logprobs(request),
        "stop_token_ids": None if request.stop_token_ids is None else tuple(request.stop_token_ids),
        "resume_token_ids": None if request.resume_token_ids is None else tuple(request.resume_token_ids),
    }
    own = ["top_k", "min_p", "min_tokens", "include_stop_str_in_output", "refresh_interval", "ignore_eos"]
    own += [
        "decode",
        "confidence_threshold",
        "num_denoising_steps",
        "factor",
        "editing_threshold",
        "block_length",
        "cache",
    ]
    given |= {name: getattr(request, name) for name in own} | deadlines(request)
    if tenant:
        given |= {"user": tenant.name, "accuracy_budget": tenant.accuracy_budget}
        given["priority"] = priority_of(tenant, given["priority"])
    given["include_canvas"] = request.stream_options.include_canvas if request.stream_options else None
    return Options(**{name: value for name, value in given.items() if value is not None})


def priority_of(tenant: Tenant, asked: int | None) -> int:
    """Raises `BadRequest` for a priority above what the key allows."""
    if asked is None:
        return tenant.priority
    if asked > tenant.highest_priority:
        raise BadRequest(f"this key may ask for priority {tenant.highest_priority} at most", param="priority")
    return asked


def top_logprobs(request: Common) -> int | None:
    """How many alternatives of each token are wanted. Raises `BadRequest` where logprobs are not."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    wanted = request.top_logprobs if isinstance(request, ChatRequest) else None
    if wanted and isinstance(request, ChatRequest) and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return wanted


def wrapped(seed: int, choice: int) -> int:
    """The seed counted up, as 64 bits do."""
    return seed if abs(seed) > 2**63 else (seed + choice + 2**63) % 2**64 - 2**63


@contextlib.contextmanager
def spelled(request: Common) -> Iterator[None]:
    """Errors name the field that the client has sent, where the engine calls it by another name."""
    try:
        yield
    except BadRequest as error:
        names = spellings(request)
        message = error.message
        for name, theirs in names.items():
            if "_" in name or (name == error.param and theirs != "messages"):
                message = re.sub(rf"(?<!\.)\b{name}\b", theirs, message)
        raise BadRequest(message, param=names.get(error.param or "", error.param), code=error.code) from error


def spellings(request: Common) -> dict[str, str]:
    """The engine's names of fields whose name, or place, is another in this request."""
    slo = request.slo or Slo()
    other = {name: f"slo.{name}" for name in ("deadline_ms", "elapsed_ms", "on_miss", "task")}
    other["slo_class"] = "slo.class"
    if isinstance(request, ChatRequest):
        other["prompt"] = "messages"
    if isinstance(request, CompletionRequest):
        other["top_logprobs"] = "logprobs"
    if request.max_completion_tokens is not None:
        other["max_tokens"] = "max_completion_tokens"
    nested = [name for name in ("priority", "min_confidence_threshold") if getattr(slo, name) is not None]
    return other | {name: f"slo.{name}" for name in nested}


def max_tokens(request: Common) -> int | None:
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def choices_wanted(request: Common, prompts: int, most: int, places: int) -> int:
    n = 1 if request.n is None else request.n
    limit, flag = min((most, "--max-choices"), (places, "--max-queue"))
    if not 1 <= n * prompts <= limit:
        param = "prompt" if prompts > limit else "n"
        raise BadRequest(
            f"n times the number of prompts must lie between 1 and {limit} ({flag}), not {n * prompts}",
            param=param,
        )
    if request.resume_token_ids:
        check_resumed(request, n * prompts)
    return n


def check_resumed(request: Common, choices: int) -> None:
    """Raise `BadRequest` where the resumed tokens would be those of several answers, or stand behind an echo."""
    if choices > 1:
        raise BadRequest(
            f"resume_token_ids belongs to one answer, and this request asks for {choices}; send one prompt and n 1",
            param="resume_token_ids",
        )
    if isinstance(request, CompletionRequest) and request.echo:
        raise BadRequest("an answer that goes on has no echo; leave out echo or resume_token_ids", param="echo")


def prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """A completion's prompts: one text, several, token ids, or several lists of them."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(isinstance(item, str) for item in prompt):
        return list(prompt)
    if are_ids(prompt):
        return [list(prompt)]
    if prompt and all(isinstance(item, list) and are_ids(item) for item in prompt):
        return [list(item) for item in prompt]
    raise BadRequest("prompt must be a string, token ids, or a list of either", param="prompt")


def are_ids(items: list[Any]) -> bool:
    return set(map(type, items)) == {int}  # not bool
