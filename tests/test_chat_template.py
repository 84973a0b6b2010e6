"""Chat templates: rendered as transformers renders them, and no template takes more than its time and memory."""

import asyncio
import json
import os
import re
import signal
import threading
from pathlib import Path

import aiohttp
import checkpoints
import pytest

from dilaserve import Config, Engine
from dilaserve.errors import BadRequest, CheckpointError, Unavailable
from dilaserve.server.app import running
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.tokenizer.chat_template import ChatTemplate, find, loaded
from dilaserve.tokenizer.template_process import MEMORY, MOST_TEXT, Source
from dilaserve.tokenizer.tokenizer import Text

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HELLO = [{"role": "user", "content": "Hello"}]
SLOW, LARGE = "takes more than [.0-9]+ seconds", f"it takes more than {MEMORY // 2**20} MiB"


@pytest.fixture
def model(tmp_path, random_model):
    """A directory with a tokenizer alone; write its template with `configure`."""
    (tmp_path / "tokenizer.json").write_bytes((random_model / "tokenizer.json").read_bytes())
    return tmp_path


def configure(model, template, **more):
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **more}))


def template_of_cases() -> str:
    """A template that does what the first message asks for."""
    cases = {
        "loop": ENDLESS,
        "count": "{{ 7 ** (7 ** (8 + messages | length)) }}",
        "grow": "{{ 'x' * (3000000000 * messages | length) }}",
        "print": f"{{{{ 'x' * ({MOST_TEXT} + messages | length) }}}}",
        "double": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "refuse": "{{ raise_exception('not you') }}",
        "fail": "{{ 1 / 0 }}",
    }
    asked = "{% set asked = messages[0]['content'] %}"
    return asked + "".join(f"{{% if asked == '{name}' %}}{case}{{% endif %}}" for name, case in cases.items()) + "fine"


@pytest.fixture(scope="module")
def short_timeout():
    """Renders for less than a second."""
    template = ChatTemplate(Source(template_of_cases(), {}, 0.3))
    yield template
    template.close()


@pytest.fixture(scope="module")
def long_timeout():
    """Renders for so long that memory is short first, also where that is slow."""
    template = ChatTemplate(Source(template_of_cases(), {}, 60.0))
    yield template
    template.close()


def asking(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("content", ["loop", "count"])
def test_a_rendering_is_bounded_in_time_and_the_next_one_works(short_timeout, content):
    reply = short_timeout.render(asking(content))
    assert (reply.text, reply.on_purpose) == (None, False)
    assert reply.reason == "it takes more than 0.3 seconds of CPU time"
    assert short_timeout.render(HELLO).text == "fine"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("grow", LARGE),
        ("double", LARGE),
        ("print", f"it makes a text of {MOST_TEXT + 5} characters and may make {MOST_TEXT}"),
        ("refuse", "not you"),
        ("fail", "division by zero"),
    ],
)
def test_a_rendering_is_bounded_in_size_and_the_next_one_works(long_timeout, content, reason):
    reply = long_timeout.render(asking(content))
    assert (reply.text, reply.reason, reply.on_purpose) == (None, reason, content == "refuse")
    assert long_timeout.render(HELLO).text == "fine"


def test_a_process_that_is_killed_from_outside_is_replaced(long_timeout):
    long_timeout.render(HELLO)
    first = long_timeout.process.pid
    os.kill(first, signal.SIGKILL)
    assert long_timeout.render(HELLO).text == "fine"
    assert long_timeout.process.pid != first


async def test_the_loop_and_other_threads_go_on_while_a_template_loops(short_timeout):
    endless = asyncio.create_task(short_timeout.rendered(asking("loop")))
    turns = 0
    while not endless.done():
        await asyncio.to_thread(int)
        turns += 1
    assert re.search(SLOW, endless.result().reason)
    assert turns > 10


def test_closing_ends_a_rendering_that_is_under_way():
    template = ChatTemplate(Source(ENDLESS, {}, 60.0))
    template.start()
    pid, ended = template.process.pid, []

    def render():
        with pytest.raises(Unavailable):
            template.render(HELLO)
        ended.append(True)

    thread = threading.Thread(target=render)
    thread.start()
    template.close()
    thread.join(30)
    assert ended
    assert template.process is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, SLOW),
        ("{{ 'x' * 3000000000 }}", LARGE),
        ("{{ x", "unexpected end of template"),
        ("{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}", "recursion"),
        (5, "is broken|is no text|cannot be read"),
        ("x" * (2**20 + 1), None),
    ],
)
def test_a_template_that_never_works_is_refused_at_the_start(model, template, reason):
    configure(model, template)
    text = Text(model)
    try:
        if reason is None:
            text.load_template()
            assert len(text.render(HELLO)) == 2**20 + 1  # the configuration's bound is a wider one
        else:
            with pytest.raises(CheckpointError, match=f"chat template in .*({reason})"):
                text.load_template()
    finally:
        text.close()


def test_a_template_that_refuses_the_probe_messages_is_served(model):
    configure(model, "{{ raise_exception('a system message first') }}")
    text = Text(model)
    text.load_template()
    with pytest.raises(BadRequest, match="rejects these messages: a system message first"):
        text.render(HELLO)
    text.close()


TEMPLATES = (
    checkpoints.TEMPLATE,
    "{{ bos_token }}{% for m in messages %}\n  {% if loop.last %}\n  {{ m | tojson }}\n  {% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "{{ tools is none }}{{ documents is none }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}",
    "{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}",
    "{{ namespace(a=1).a }}{{ messages[0].name is defined }}{{ messages[0]['content'].split('o')[-1] }}",
)
CONVERSATIONS = (
    HELLO,
    [{"role": "system", "content": " <be> 'brief' & é漢 \n"}, {"role": "user", "content": "  Hello you  "}],
    [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "content": "oh"}, HELLO[0]],
)


def test_what_is_rendered_is_what_transformers_renders(model):
    for template in TEMPLATES:
        configure(
            model, template, bos_token="<|startoftext|>", eos_token={"__type": "AddedToken", "content": "<|end|>"}
        )
        theirs, ours = loaded(model), ChatTemplate(find(model, None))
        for messages in CONVERSATIONS:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert ours.render(messages).text == expected
        ours.close()


def test_a_model_without_a_template_says_so_and_how_to_get_one(model):
    lists = [{"name": "tools", "template": "a"}, {"name": "rag", "template": "b"}]
    for template, reason in ((None, "it has no chat template"), (lists, "its chat templates are tools, rag and none")):
        configure(model, template)
        text = Text(model)
        text.load_template()
        with pytest.raises(BadRequest, match=f"serves no chats: {reason}.*--chat-template, or use /v1/completions"):
            text.encode_chat(HELLO)
        assert text.encode("Hello")
    configure(model, [*lists, {"name": "default", "template": "c"}])
    assert find(model, None).template == "c"


def test_a_file_takes_the_place_of_the_models_own_template(model, tmp_path):
    configure(model, ENDLESS)
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0].content }}, é!")
    text = Text(model, mine)
    text.load_template()
    assert text.render(HELLO) == "Hello, é!"
    text.close()
    mine.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=f"cannot be read from {mine}: .*decode"):
        find(model, mine)
    with pytest.raises(CheckpointError, match=r"cannot be read from /nowhere\.jinja: No such file"):
        find(model, model.__class__("/nowhere.jinja"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{{ messages[0].content }}, é漢\\nno", "Hello, é漢\nno"),
        ("{% for m in messages %}\n{{ m.role }}{% endfor %}", "user"),
        ("rag", "b"),
        ("default", "c"),
        ("{{ messages[0].content }}" + "." * 5000, "Hello" + "." * 5000),
    ],
)
def test_a_template_may_be_given_as_text_or_by_its_name_in_the_model(model, given, expected):
    configure(model, [{"name": name, "template": text} for name, text in (("rag", "b"), ("default", "c"))])
    text = Text(model, given)
    text.load_template()
    assert text.render(HELLO) == expected
    text.close()


def test_a_file_goes_before_a_text_and_before_a_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configure(model, [{"name": "rag", "template": "b"}, {"name": "default", "template": "c"}])
    for name in ("rag", "{{ x }}.jinja"):
        Path(name).write_text("of a file")
        assert find(model, name).template == "of a file"
    for given, reason in (("tools", "tools: No such file"), ("\0", "null byte"), ("{{ '\\x' }}", "can't decode")):
        with pytest.raises(CheckpointError, match=f"the chat template cannot be read from .*{reason}"):
            find(model, given)
    with pytest.raises(CheckpointError, match=r"^the chat template in {{ x.{95}… is broken: "):
        Text(model, "{{ x" + "x" * 500).load_template()


def test_a_file_of_its_own_goes_before_the_configurations_template(model):
    configure(model, "of the configuration")
    (model / "chat_template.jinja").write_text("of the file {{ messages[0].content }}")
    assert find(model, None).template == loaded(model).chat_template == "of the file {{ messages[0].content }}"


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)


async def test_over_http_a_template_that_refuses_a_system_message_says_so_with_400(random_model):
    assemble = pretended(llada_8b_h200(), 1, 256, text=Text(random_model, NO_SYSTEM))
    system = {"role": "system", "content": "be brief"}
    async with (
        Engine(Config.of(port=0), assemble=assemble) as engine,
        running(engine, engine.config) as address,
        aiohttp.ClientSession(address) as client,
    ):
        for messages in ([system, *HELLO], [{**system, "role": "developer"}, *HELLO]):
            async with client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8}) as response:
                error = (await response.json())["error"]
                assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", "messages")
                assert error["message"] == "the chat template rejects these messages: System role not supported"
        async with client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 8}) as response:
            assert response.status == 200
        async with client.post("/tokenize", json={"messages": HELLO}) as response:
            assert (await response.json())["tokens"] == engine.text.encode("<user>Hello")


def test_a_conversation_longer_than_any_canvas_is_not_rendered(model):
    configure(model, ENDLESS)
    text = Text(model)
    text.template = ChatTemplate(Source(ENDLESS, {}))
    for messages in (HELLO * 5000, [{"role": "user", "content": "a" * 300_000}]):
        with pytest.raises(BadRequest, match="is too long"):
            text.encode_chat(messages)
    assert text.template.process is None
