"""Requests to a server as OpenAI's clients send them."""

import json

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "block_length": 8}


async def post(client, path, body, **headers):
    async with client.post(path, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


async def stream(client, path, body):
    """The raw event stream and its data objects."""
    async with client.post(path, json=body | {"stream": True}) as response:
        raw = (await response.read()).decode()
    assert response.status == 200, raw
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    lines = raw.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
