"""Requests with known answers, and the judgement of what comes back. Asks over HTTP as OpenAI's clients do."""

import enum
import random
from typing import Any, NamedTuple

import aiohttp

COMPLETIONS = "/v1/completions"
PROMPTS = 8  # of each kind of cache
CACHES: dict[str, dict[str, Any]] = {  # by name, what a request says
    "none": {"cache": "none"},
    "dual, always refreshed": {"cache": "dual", "refresh_interval": 1},
    "dual": {"cache": "dual"},
}
EXACT = ("none", "dual, always refreshed")  # kinds whose answers do not depend on when rows are refreshed


class Known(NamedTuple):
    """A request and what it gets undisturbed."""

    cache: str
    body: dict[str, Any]
    text: str
    refreshes: int


class Outcome(enum.Enum):
    RIGHT = "as undisturbed"
    MOVED = "another, after more refreshes"
    WRONG = "wrong"


def bodies(cache: str, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(f"{cache} {seed}")
    fixed = {"max_tokens": tokens, "confidence_threshold": 0.8, "ignore_eos": True, "block_length": 8, **CACHES[cache]}
    return [{"prompt": [rng.randrange(200) for _ in range(rng.randint(4, 40))], **fixed} for _ in range(PROMPTS)]


async def undisturbed(session: aiohttp.ClientSession, caches: list[str], tokens: int) -> list[Known]:
    """Ask each request alone, twice: an answer that differs from itself would make every judgement void."""
    known = []
    for cache in caches:
        for body in bodies(cache, tokens):
            first, again = [await asked(session, body) for _ in range(2)]
            if first != again:
                raise SystemExit(f"the server answers differently when nothing disturbs it: {body}")
            known.append(Known(cache, body, *first))
    return known


async def asked(session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[str, int]:
    """Text and refreshes of the answer; raises `ClientResponseError` unless it is a 200."""
    async with session.post(COMPLETIONS, json=body) as response:
        if response.status != 200:
            raise LookupError(f"{response.status} {(await response.text())[:300]}")
        answer = await response.json()
    return answer["choices"][0]["text"], answer["dilaserve"]["refreshes"]


def judged(known: Known, text: str, refreshes: int) -> Outcome:
    if text == known.text:
        return Outcome.RIGHT
    moved = known.cache not in EXACT and refreshes > known.refreshes
    return Outcome.MOVED if moved else Outcome.WRONG
