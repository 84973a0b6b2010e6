"""JSON bodies: valid ones, and what a careless or a hostile client makes of them. Everything comes from the `rng`."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WORDS = (
    "Reverse: lamu",
    "Sort: 57 12 93 40",
    "12 + 30 =",
    "hello",
    "ä€𝄞 x",
    "",
    " ",
    "<|mdm_mask|>",
    "\u0000",
    "a\n" * 20,
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 17, 0.5, -0.0, 1e308, -1e308, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *("", "x", "1", "null", "auto", "dual", "steps", "\u0000", "é" * 50, "x" * 2000),
    *([], [[]], [None], [1], ["x"], {}, {"x": 1}, [{}], [[1], [2]], {"type": "text"}, [True], [1e9], [-1], [10**9]),
)
FIELDS = (
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "n",
    ),
    *(
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "echo",
        "user",
        "confidence_threshold",
        "decode",
        "factor",
    ),
    *("num_denoising_steps", "block_length", "cache", "refresh_interval", "ignore_eos", "slo", "priority", "suffix"),
    *(
        "min_confidence_threshold",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "tools",
        "tool_choice",
        "top_k",
    ),
    *("functions", "audio", "modalities", "response_format", "best_of", "min_p", "min_tokens", "stop_token_ids"),
    *(
        "repetition_penalty",
        "guided_json",
        "structured_outputs",
        "include_stop_str_in_output",
        "metadata",
        "temprature",
    ),
)


def chat(rng: random.Random) -> Json:
    roles = rng.choice([("user",), ("system", "user"), ("user", "assistant", "user"), ("developer", "user")])
    parts = lambda text: [{"type": "text", "text": text}] if rng.random() < 0.2 else text  # noqa: E731
    return {"messages": [{"role": role, "content": parts(rng.choice(WORDS[:5]))} for role in roles]} | wishes(rng)


def completion(rng: random.Random) -> Json:
    prompts: list[Any] = ["hello", ["a", "b"], [1, 2, 3], [[1, 2], [3]], rng.choice(WORDS[:5])]
    return {"prompt": rng.choice(prompts), "echo": rng.random() < 0.2} | wishes(rng)


def wishes(rng: random.Random) -> Json:
    """Valid fields, a few of them at a time, and answers of few tokens."""
    offered: Json = {
        "temperature": rng.choice([0, 0.7, 2]),
        "top_p": 0.9,
        "seed": rng.randrange(2**31),
        "stop": rng.choice(["x", ["a", "b"], []]),
        "n": rng.choice([1, 1, 2, 4]),
        "stream": rng.random() < 0.5,
        "user": rng.choice(["ann", "bob"]),
        "cache": rng.choice(["none", "prefix", "dual"]),
        "block_length": rng.choice([4, 8, 32]),
        "confidence_threshold": rng.choice([0.0, 0.5, 1.0]),
        "refresh_interval": rng.choice([0, 1, 3]),
        "slo": {"deadline_ms": rng.choice([1, 100, 60000]), "on_miss": rng.choice(["reject", "cancel_when_late"])},
        "top_logprobs": None,
        "tools": [],
    }
    taken = rng.sample(sorted(offered), rng.randint(0, 4))
    return {"max_tokens": rng.randint(1, 12)} | {name: offered[name] for name in taken}


def other(rng: random.Random) -> tuple[str, Json]:
    text = rng.choice(WORDS[:5])
    return rng.choice(
        [
            ("/tokenize", {"prompt": text}),
            ("/tokenize", {"messages": [{"role": "user", "content": text}]}),
            ("/detokenize", {"tokens": [rng.randrange(200) for _ in range(rng.randint(0, 20))]}),
        ]
    )


def valid(rng: random.Random) -> tuple[str, Json]:
    """A route and a body for it."""
    if rng.random() < 0.2:
        return other(rng)
    return (CHAT, chat(rng)) if rng.random() < 0.6 else (COMPLETIONS, completion(rng))


def mutated(body: Json, rng: random.Random) -> Json:
    """One to three fields, at any depth, are dropped, replaced, wrapped or added."""
    changed: Json = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        place: Any = changed
        while rng.random() < 0.5 and (
            inner := [item for item in values(place) if isinstance(item, dict | list) and item]
        ):
            place = rng.choice(inner)
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        match rng.randrange(4):
            case 0 if keys:
                del place[rng.choice(keys)]
            case 1 if keys:
                key = rng.choice(keys)
                place[key] = rng.choice([[place[key]], {"x": place[key]}, str(place[key])])
            case 2 if isinstance(place, dict):
                place[rng.choice(FIELDS)] = odd(rng)
            case _ if keys:
                place[rng.choice(keys)] = odd(rng)
    return changed


def odd(rng: random.Random) -> Any:
    """A value of its own: later mutations may go into it."""
    return copy.deepcopy(rng.choice(ODD))


def values(place: Any) -> list[Any]:
    return list(place.values()) if isinstance(place, dict) else list(place)


def huge(rng: random.Random) -> tuple[str, bytes]:
    """A body of up to a little more than 4 MiB, or one that makes more of itself than it is."""
    size = rng.choice([10_000, 100_000, 1_000_000, 4_100_000, 4_300_000])
    route = rng.choice([CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/v1/plan"])
    items = lambda item: b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"  # noqa: E731
    text = b'"' + rng.choice([b"a", b"a b ", "é".encode(), b"\\u00e9", b"\\n", b"a,1 "]) * (size // 6) + b'"'
    shapes: list[Callable[[], bytes]] = [
        lambda: b'{"prompt":' + items(rng.choice([b"[1]", b"1", b'"a"', b"[]", b"null", b"1e5", b"[[]]"])) + b"}",
        lambda: b'{"echo":true,"prompt":' + items(b"[1]") + b"}",
        lambda: b'{"prompt":' + text + b"}",
        lambda: b'{"messages":' + items(rng.choice([b'{"role":"user","content":"a"}', b"{}", b"[]"])) + b"}",
        lambda: b'{"messages":[{"role":"user","content":' + text + b"}]}",
        lambda: b'{"messages":[{"role":"user","content":' + items(b'{"type":"text","text":"a"}') + b"}]}",
        lambda: b'{"messages":[{"role":"user","content":"a"}],"tools":' + items(b"[]") + b"}",
        lambda: b'{"prompt":"a","max_tokens":1,"stop":' + items(b'"a"') + b"}",
        lambda: b'{"prompt":"a","max_tokens":1,"stop":' + text + b"}",
        lambda: b'{"prompt":"a","max_tokens":1,"user":' + text + b"}",
        lambda: b'{"prompt":"a","model":' + text + b"}",
        lambda: b'{"prompt":"a","max_tokens":' + b"9" * size + b"}",
        lambda: (
            b'{"prompt":"a","max_tokens":1,"logit_bias":{' + b",".join(b'"%d":0' % i for i in range(size // 10)) + b"}}"
        ),
        lambda: b'{"prompt":"a","max_tokens":1,' + b'"x":1,' * (size // 6) + b'"y":1}',
        lambda: b'{"tokens":' + items(rng.choice([b"1", b"99", b"-1", b"1.0"])) + b"}",
        lambda: b'{"plan":' + items(rng.choice([b"[0]", b"[]", b'"x"'])) + b"}",
        lambda: b'{"plan":' + text + b"}",
        lambda: b" " * size,
        lambda: b" " * size + b'{"prompt":"a","max_tokens":1}',
        lambda: b"[" * size,
    ]
    return route, rng.choice(shapes)()


def deep(rng: random.Random) -> tuple[str, bytes]:
    depth = rng.choice([10, 100, 900, 1100, 10_000, 100_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    nest = opened * depth + b"1" + closed * rng.choice([depth, depth - 1, 0])
    field = rng.choice([b"prompt", b"messages", b"tools", b"stop", b"slo", b"tokens", b"unknown", b"response_format"])
    whole = b'{"%s":%s}' % (field, nest)
    return rng.choice([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]), rng.choice([whole, nest])


def broken(rng: random.Random) -> tuple[str, bytes]:
    """What is no JSON, or hardly."""
    route, body = valid(rng)
    text = json.dumps(body).encode()
    odd = [b"", b" ", b"null", b"1", b"[]", b'""', b"nul", b"{", b"{}", b"NaN", b'{"prompt":NaN}', b'{"prompt":1e999}']
    strings = [b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xed\xa0\x80"', b'"\x00"', b'"\\x"', b"'a'", b'"a']
    return route, rng.choice(
        [
            rng.choice(odd),
            b'{"prompt":' + rng.choice(strings) + b',"max_tokens":1}',
            b'{"messages":[{"role":"user","content":' + rng.choice(strings) + b'}],"max_tokens":1}',
            text[: rng.randrange(len(text))],
            text + rng.choice([b"}", b"x", b"\x00", text]),
            b"\xef\xbb\xbf" + text,
            text.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le"])),
            rng.randbytes(rng.randint(1, 300)),
            text[:-1] + b"," + text[1:],  # every field twice
            text.replace(b'"', b"'"),
        ]
    )
