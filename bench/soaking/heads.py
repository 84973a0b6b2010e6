"""Heads of requests that clients, proxies and scanners send: routes, methods, headers, and bytes that are no HTTP."""

import json
import random

from soaking import bodies
from soaking.processes import ADMIN_KEY
from soaking.wire import Case, message

OPEN = ("/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/dilaserve-tiny", "/v1/plan")
POSTED = (bodies.CHAT, bodies.COMPLETIONS, "/tokenize", "/detokenize", "/v1/plan")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "get", "X" * 40)
PATHS = (
    *(
        "/",
        "//",
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1/models/",
        "/v1/chat/completions/",
        "/v1/embeddings",
        "/favicon.ico",
    ),
    *(
        "/v1/models/%00",
        "/v1/models/..%2f..",
        "/../../etc/passwd",
        "/v1/models/" + "a" * 2000,
        "/%",
        "/%zz",
        "/v1/\xff",
    ),
    *("/health?x=" + "y" * 3000, "/health#x", "http://other/health", "*", "/v1/completions?stream=true", "/v1;x", "/é"),
    *("/%ff%fe", "/v1/models/%f0%9f%98%80", "/v1/models/x?y", "/HEALTH", "/health ", "/a" * 3000),
)
CRUEL = (
    b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 200, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n", b"GET /health\r\n\r\n", b"GET /health HTTP/9.9\r\nhost: a\r\n\r\n", b"GET /health HTTP/1.1\n\n",
    b"GET  /health HTTP/1.1\r\nhost: a\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n", b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost a\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: a\r\n folded\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: \x00\r\n\r\n", b"GET /health HTTP/1.1\r\nh\xe9: a\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", b"A" * 300_000,
    b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}}",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n{}",
    b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /health HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n"
    b"connection: upgrade\r\nsec-websocket-key: eA==\r\nsec-websocket-version: 13\r\n\r\n",
)  # fmt: skip
ODD_VALUES = ("", "x", "-1", "0", "nan", "inf", "1e999", "9" * 400, "1.5", "é", "\x01", "a" * 4000, "null", "true")
HEADERS = (
    *("x-slo-deadline-ms", "x-slo-class", "x-priority", "x-request-id", "authorization", "expect", "accept", "range"),
    *("accept-encoding", "connection", "host", "if-match", "origin", "cookie", "te", "trailer", "x-forwarded-for"),
)


def odd_headers(rng: random.Random) -> Case:
    """A valid request with one to three headers that are not."""
    route, body = bodies.valid(rng)
    names = [rng.choice(HEADERS) for _ in range(rng.randint(1, 3))]
    headers = {name: rng.choice(ODD_VALUES) for name in names}
    if rng.random() < 0.1:
        headers["expect"] = rng.choice(["100-continue", "100-Continue", "nonsense"])
    return Case("", [message("POST", route, json.dumps(body).encode(), headers)])


def odd_head(rng: random.Random) -> Case:
    """Bytes that are no request, or hardly one; an answer may come or not."""
    data = rng.choice(CRUEL)
    if rng.random() < 0.3:
        data = bytearray(message("POST", bodies.COMPLETIONS, b'{"prompt":"a","max_tokens":1}'))
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return Case("", [bytes(data)], 0, patience=1.0)


def route(rng: random.Random) -> Case:
    """A method and a path that need not fit each other; most spellings of a path must get an answer."""
    method, path = rng.choice(METHODS), rng.choice([*PATHS, *OPEN, *POSTED])
    body = rng.choice([None, b"", b"{}", b'{"prompt":"a","max_tokens":1}'])
    plain = path.isascii() and " " not in path and path.startswith("/") and method.isupper()
    return Case("", [message(method, path, body)], int(plain), [method], then="wait", patience=30.0 if plain else 2.0)


def plan(rng: random.Random) -> Case:
    plans = [
        "2x1",
        "1x2",
        "auto",
        "x",
        "9x9",
        "",
        [[0, 1]],
        [[0], [1]],
        [[0, 0]],
        [[5]],
        [],
        [[]],
        [[-1]],
        [[10**30]],
        1,
    ]
    body = {"plan": rng.choice(plans), "reason": rng.choice(["fuzz", None, "a\nb", "x" * 500])}
    keys = [{"authorization": f"Bearer {ADMIN_KEY}"}] * 3 + [
        {},
        {"authorization": "Bearer x"},
        {"authorization": "\x01"},
    ]
    return Case("", [message("POST", "/v1/plan", json.dumps(body).encode(), rng.choice(keys))])
