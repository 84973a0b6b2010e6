"""Fuzz cases by number: the same seed and number always give the same bytes."""

import gzip
import json
import random
import zlib
from collections.abc import Callable

from soaking import bodies, heads
from soaking.processes import ADMIN_KEY
from soaking.wire import Case, message

GONE = 0.5  # seconds in which a client that leaves may see a first byte
UNFINISHED = 2.0  # seconds to wait for an answer to a request that was not sent whole


def case(seed: int, number: int, kinds: dict[str, int] | None = None) -> Case:
    """`kinds` weighs the kinds, by name; by default all of them."""
    rng, weights = random.Random(f"{seed} {number}"), kinds or WEIGHTS
    kind = rng.choices(list(weights), list(weights.values()))[0]
    return KINDS[kind](rng)._replace(kind=kind)


def encoded(body: object) -> bytes:
    return json.dumps(body).encode()


def post(route: str, body: bytes, **headers: str) -> Case:
    return Case("", [message("POST", route, body, headers)])


def valid(rng: random.Random) -> Case:
    if rng.random() < 0.2:
        method, path = rng.choice(["GET", "HEAD"]), rng.choice(heads.OPEN)
        return Case("", [message(method, path)], methods=[method])
    route, body = bodies.valid(rng)
    return post(route, encoded(body), **rng.choice([{}, {"x-request-id": "fuzz-1"}, {"x-priority": "1"}]))


def mutated(rng: random.Random) -> Case:
    route, body = bodies.valid(rng)
    changed = encoded(bodies.mutated(body, rng))
    return post(route if rng.random() < 0.9 else rng.choice(heads.POSTED), changed)


def huge(rng: random.Random) -> Case:
    return post(*bodies.huge(rng), authorization=f"Bearer {ADMIN_KEY}")


def deep(rng: random.Random) -> Case:
    return post(*bodies.deep(rng))


def broken(rng: random.Random) -> Case:
    return post(*bodies.broken(rng))


def content_type(rng: random.Random) -> Case:
    route, body = bodies.valid(rng)
    kinds = ["", "text/plain", "application/json; charset=utf-8", "APPLICATION/JSON", "application/json;charset=utf-16"]
    kinds += ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "a", "/", "application/json, a/b"]
    kinds += ["application/json; charset=nonsense", 'application/json; charset="', "application/json;" * 50, "é/é"]
    return post(route, encoded(body), content_type=rng.choice(kinds))


def compressed(rng: random.Random) -> Case:
    route, body = bodies.valid(rng)
    plain = rng.choice([encoded(body), b" " * rng.choice([1000, 4_000_000, 50_000_000]), b"[" * 4_000_000])
    packed = rng.choice([gzip.compress(plain, 1, mtime=0), zlib.compress(plain, 1)])
    twisted = [
        packed,
        packed,
        packed[: len(packed) // 2],
        packed + b"x",
        packed + packed,
        gzip.compress(packed, mtime=0),
        plain,
    ]
    coding = rng.choice(
        ["gzip", "gzip", "gzip", "deflate", "x-gzip", "GZIP", "br", "zstd", "identity", "gzip, gzip", ""]
    )
    return post(route, rng.choice(twisted)[:5_000_000], content_encoding=coding)


def half_sent(rng: random.Random) -> Case:
    """A body that ends before its announced length, or never begins."""
    route, body = rng.choice([bodies.valid(rng), bodies.valid(rng), (bodies.CHAT, {"prompt": "a" * 100_000})])
    whole = message("POST", route, encoded(body))
    part = whole[: rng.randrange(1, len(whole))]
    then = rng.choice(["shut", "leave", "wait"])
    return Case("", [part], 0, then=then, patience=GONE if then == "leave" else UNFINISHED)


def chunked(rng: random.Random) -> Case:
    route, body = bodies.valid(rng)
    text = encoded(body)
    size = rng.randint(1, len(text))
    good = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (text[i : i + size] for i in range(0, len(text), size)))
    head = message("POST", route, b"", transfer_encoding="chunked")
    if rng.random() < 0.5:
        return Case("", [head + good + b"0\r\n\r\n"])
    odd = [b"zz\r\n", b"-1\r\nx\r\n", b"ffffffffffffffff\r\n", b"5;a=b\r\nhello\r\n0\r\n\r\n", b"0\r\nx: y\r\n\r\n"]
    odd += [b"3\r\nabcdef\r\n", good, b"0x5\r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"1" * 5000 + b"\r\n"]
    return Case("", [head + rng.choice(odd)], 0, then="shut", patience=UNFINISHED)


def slow(rng: random.Random) -> Case:
    route, body = bodies.valid(rng)
    whole = message("POST", route, encoded(body))
    size = max(1, len(whole) // rng.randint(2, 8))
    return Case("", [whole[i : i + size] for i in range(0, len(whole), size)], pause=0.02)


def leaving(rng: random.Random) -> Case:
    make = rng.choice([bodies.chat, bodies.completion])
    body = make(rng) | {"stream": rng.random() < 0.8, "max_tokens": rng.randint(20, 60), "ignore_eos": True}
    route = bodies.CHAT if "messages" in body else bodies.COMPLETIONS
    return post(route, encoded(body))._replace(then="leave", patience=rng.choice([0.0, 0.01, 0.1, GONE]))


def pipelined(rng: random.Random) -> Case:
    parts, methods = [], []
    for _ in range(rng.randint(2, 8)):
        if rng.random() < 0.5:
            route, body = bodies.valid(rng)
            parts.append(message("POST", route, encoded(body)))
            methods.append("POST")
        else:
            parts.append(message("GET", rng.choice(heads.OPEN)))
            methods.append("GET")
    return Case("", [b"".join(parts)], len(parts), methods)


def shut_side(rng: random.Random) -> Case:
    """A whole request, after which the client shuts its writing side; the answer is due all the same."""
    return valid(rng)._replace(then="shut")


KINDS: dict[str, Callable[[random.Random], Case]] = {
    "valid": valid,
    "mutated fields": mutated,
    "huge bodies": huge,
    "deep bodies": deep,
    "broken bodies": broken,
    "content types": content_type,
    "compressed": compressed,
    "half-sent": half_sent,
    "chunked": chunked,
    "slow": slow,
    "clients that leave": leaving,
    "pipelined": pipelined,
    "shut writing side": shut_side,
    "odd headers": heads.odd_headers,
    "odd heads": heads.odd_head,
    "routes and methods": heads.route,
    "plans": heads.plan,
}
WEIGHTS = dict.fromkeys(KINDS, 5) | {
    "valid": 10,
    "mutated fields": 25,
    "huge bodies": 4,
    "broken bodies": 10,
    "plans": 2,
}
