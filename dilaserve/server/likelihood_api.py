"""/v1/completions with `likelihood`: how probable prompts are, as lm-eval asks for it and reads it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dilaserve.engine.engine import Completion
from dilaserve.engine.likelihood import Likelihood, MonteCarlo, Pseudo, Sampling
from dilaserve.errors import BadRequest, quoted
from dilaserve.server.responses import Json, ResponseFormat, Token, usage
from dilaserve.server.schema import CompletionRequest, LikelihoodKind, LikelihoodWish

HEADER = "x-likelihood"  # of clients that cannot touch the body
ALLOWED = {  # fields that say something about a likelihood, or about the token behind the prompt
    *("model", "prompt", "echo", "logprobs", "max_tokens", "max_completion_tokens", "likelihood", "seed", "user"),
    *("priority", "temperature", "top_p", "top_k", "min_p", "n", "stream", "stream_options"),
}
KINDS: tuple[LikelihoodKind, ...] = ("pseudo", "monte-carlo")
NO_LIKELIHOOD = (
    "echo with logprobs cannot be honoured: a diffusion model has no left-to-right likelihood of a prompt; send "
    '"likelihood": "pseudo" or "monte-carlo" for an estimate, or leave out either'
)


def wanted(request: CompletionRequest, headers: Mapping[str, str]) -> LikelihoodWish | None:
    """The estimate that is asked for, if any. Raises `BadRequest` for the likelihood that there is not."""
    asked = request.likelihood
    if asked is None and (named := headers.get(HEADER)) is not None:
        if named not in KINDS:
            raise BadRequest(f"the header {HEADER} knows {' and '.join(KINDS)}, not {quoted(named)}", param=HEADER)
        asked = KINDS[KINDS.index(named)]
    if asked is not None:
        return check(request, LikelihoodWish(kind=asked) if isinstance(asked, str) else asked)
    if request.echo and request.logprobs is not None:
        raise BadRequest(NO_LIKELIHOOD, param="logprobs", code="unsupported_parameter")
    return None


def check(request: CompletionRequest, asked: LikelihoodWish) -> LikelihoodWish:
    """Raise `BadRequest` for whatever does not go together with a likelihood."""
    for name in (name for name in CompletionRequest.__struct_fields__ if name not in ALLOWED):
        if getattr(request, name) is None:
            continue
        raise BadRequest(f"{name} says nothing about a likelihood; leave it out", param=name)
    needs: dict[str, tuple[bool, str]] = {
        "echo": (bool(request.echo), "true"),
        "logprobs": (request.logprobs in (0, 1) and request.logprobs is not None, "0 or 1"),
        "max_tokens": (longest(request) in (0, 1), "0, or 1 for a token behind the prompt"),
        "n": (request.n in (None, 1), "1"),
        "stream": (not request.stream, "false"),
    }
    for name, (fits, value) in needs.items():
        if not fits:
            raise BadRequest(f"likelihood needs {name} to be {value}", param=name)
    return asked


def longest(request: CompletionRequest) -> int | None:
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def sampling(asked: LikelihoodWish, seed: int | None) -> Sampling:
    """How the estimate is made. Raises `BadRequest` for a field of the other kind."""
    known = {name: value for name in ("groups", "rounds", "samples") if (value := getattr(asked, name)) is not None}
    kind: type[Sampling] = MonteCarlo if asked.kind == "monte-carlo" else Pseudo
    for name in known:
        if name not in kind.__struct_fields__:
            raise BadRequest(f"{name} says nothing about {asked.kind}; leave it out", param="likelihood")
    return kind(**known, start=asked.start, seed=seed or 0)


def choice(
    form: ResponseFormat,
    index: int,
    ids: Sequence[int],
    text: str,
    found: Likelihood,
    more: Completion | None,
    tops: bool,
) -> Json:
    """One prompt's choice: its tokens, and those of the answer behind it. Without `tops` no others are listed."""
    tokens = [
        Token(id, 1.0 if logprob is None else math.exp(logprob), (best,) if best and tops else ())
        for id, logprob, best in zip(ids, found.logprobs, found.best, strict=True)
    ]
    listed: Any = form.probabilities(index, tokens + (form.tokens(index, more) if more else []))
    for i in (i for i, logprob in enumerate(found.logprobs) if logprob is None):
        listed["token_logprobs"][i] = None
        if listed["top_logprobs"]:
            listed["top_logprobs"][i] = None
    return {
        "index": index,
        "text": text + (more.text if more else ""),
        "finish_reason": more.finish_reason if more else "length",
        "logprobs": listed,
    }


def estimated(found: Likelihood, sampling: Sampling) -> Json:
    """What stands beside a choice of the estimate itself."""
    kind: LikelihoodKind = "monte-carlo" if isinstance(sampling, MonteCarlo) else "pseudo"
    values = {"kind": kind, "log_likelihood": found.total, "standard_error": found.standard_error}
    return values | msgspec.structs.asdict(sampling)


def answer(form: ResponseFormat, choices: list[Json], prompt_tokens: int, completion_tokens: int) -> Json:
    counts = usage(prompt_tokens, completion_tokens, 0)
    return form.head(False) | {"choices": choices, "usage": counts, **form.warned}
