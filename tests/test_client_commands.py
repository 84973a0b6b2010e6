"""`dilaserve chat` and `dilaserve bench` against the real server and against one that is not ours."""

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from aiohttp import web
from rich.console import Console

from dilaserve.cli import flags
from dilaserve.client.bench_command import driven, planned, prompts
from dilaserve.client.chat_command import Conversation, answer, drawing
from dilaserve.client.endpoint import Slot, canvas_of, first_model, opened, root_of
from dilaserve.client.load import Ask, Outcome, Target, run
from dilaserve.client.load_report import lines, plot, report
from dilaserve.errors import ConfigError

LEFT, RIGHT, BACKSPACE, CTRL_C, CTRL_D = "\x1b[D", "\x1b[C", "\x7f", "\x03", "\x04"
with_server = pytest.mark.asyncio(loop_scope="module")  # where the server of the fixture runs


def extras(*words):
    return flags("bench").parse_args(list(words))


async def other(fails=(), hangs=None):
    """An endpoint in OpenAI's shape, with nothing of ours; refuses the requests whose number is in `fails`. Instead of
    ending the answer to one in `hangs`, it sets the event there.
    """
    asked = []

    async def models(request):
        return web.json_response({"object": "list", "data": [{"id": "other", "object": "model", "owned_by": "them"}]})

    async def chat(request):
        asked.append(await request.json())
        number = len(asked)
        if number in fails:
            return web.json_response({"error": {"message": "too busy"}}, status=503)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for text in ("one ", "two"):
            chunk = {"choices": [{"index": 0, "delta": {"content": text}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if number in (hangs or {}):
                hangs[number].set()
                await asyncio.Event().wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}", asked, runner


async def test_bench_measures_an_endpoint_that_is_not_ours_and_tells_it_no_deadline(tmp_path):
    url, asked, runner = await other(fails={2})
    seen = []
    words = extras(url + "/v1", "--concurrency", "2", "--requests", "5", "--deadline-ms", "60000")
    outcomes, _ = await driven(words, planned(words), lambda what, done, total: seen.append((done, total)))
    await runner.cleanup()
    found = report(outcomes, 5, 60.0)
    assert (found.requests, found.answered, found.attainment) == (5, 4, 0.8)
    assert found.errors == {"HTTP 503": 1}
    assert seen[-1] == (5, 5)
    assert all("slo" not in body for body in asked)
    assert [one.tokens for one in outcomes if one.end is not None] == [2, 2, 2, 2]
    plot(outcomes, 60.0, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert any("80.0 % within 60000 ms" in line for line in lines(found))


async def test_times_count_from_the_intended_moment():
    url, _, runner = await other()
    outcomes = []
    async with opened(None) as session:
        target = Target(url, "other", {}, {}, deadline=0.5)
        await run(session, target, [Ask(-1.0, "hi", 8)], None, 60.0, outcomes.append)
    await runner.cleanup()
    assert outcomes[0].lag >= 1.0
    assert outcomes[0].end >= outcomes[0].first >= 1.0
    assert outcomes[0].met is False


@with_server
async def test_bench_tells_our_server_the_deadline(address):
    words = extras(address, "--rate", "1000", "--requests", "4", "--answer", "8", "--deadline-ms", "60000")
    outcomes, _ = await driven(words, planned(words), lambda *_: None)
    assert [one.error for one in outcomes] == [None] * 4
    assert report(outcomes, 4, 60.0).attainment == 1.0


async def test_ctrl_c_ends_a_bench_with_the_results_so_far():
    hangs = {number: asyncio.Event() for number in range(2, 50)}
    url, _, runner = await other(hangs=hangs)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dilaserve", "bench", url, "--concurrency", "2", "--requests", "50"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    await hangs[3].wait()  # the first is answered by then
    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()
    await runner.cleanup()
    assert (process.returncode, err.decode()) == (130, "")
    assert out.decode().startswith("requests      1 answered, 1 ended, 50 planned")


async def test_nobody_there_is_one_sentence():
    async with opened(None) as session:
        with pytest.raises(ConfigError, match=r"no server answers at http://127.0.0.1:9; start one with `dilaserve`"):
            await first_model(session, "http://127.0.0.1:9")


def test_the_plan_is_bounded_by_time_and_count_and_repeats(tmp_path):
    few = planned(extras("x", "--rate", "10", "--seconds", "1", "--seed", "3"))
    assert few == planned(extras("x", "--rate", "10", "--seconds", "1", "--seed", "3"))
    assert all(ask.at < 1 for ask in few)
    (file := tmp_path / "trace.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,5,9\n2,6,8\n")
    rows = planned(extras("x", "--trace", str(file), "--requests", "2"))
    assert [(ask.at, len(ask.prompt.split()), ask.max_tokens) for ask in rows] == [(0.0, 5, 9), (2.0, 6, 8)]
    (asked := tmp_path / "prompts").write_text('first\n{"prompt": "second"}\n')
    assert prompts(asked) == ["first", "second"]


def test_a_report_of_nothing_is_a_report():
    assert next(iter(lines(report([], 3, 1.0)))).startswith("requests      0 answered, 0 ended, 3 planned")
    assert report([Outcome(0.0, 0.0, None, None, 0, "timeout", False)], 1, 1.0).attainment == 0.0


def test_addresses_are_taken_with_and_without_their_path():
    assert {root_of(url) for url in ("h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/")} == {"http://h:1"}
    with pytest.raises(ConfigError, match="no address"):
        root_of("ftp://h")


def test_a_canvas_is_read_where_there_is_one():
    chunk = {"dilaserve": {"canvas": {"tokens": ["a", None], "confidences": [0.9, None], "masked": [False, True]}}}
    assert canvas_of(chunk) == [Slot("a", 0.9), Slot(None, 0.0)]
    assert canvas_of({"choices": [], "dilaserve": {"deadline_met": True}}) == []
    assert canvas_of({}) == []


def test_commands_of_the_chat_change_what_the_next_request_says():
    talk = Conversation("m", ours=True)
    talk.answered("q", "a")
    assert talk.command("/threshold 0.7") == "threshold: 0.7"
    talk.command("/deadline 800")
    body = talk.body("next")
    assert [said["content"] for said in body["messages"]] == ["q", "a", "next"]
    assert (body["confidence_threshold"], body["slo"]) == (0.7, {"deadline_ms": 800.0})
    assert talk.command("/deadline soon") == "'soon' is no number"
    assert talk.command("/threshold") == "threshold: as the server decides"
    talk.command("/reset")
    assert talk.body("x")["messages"] == [{"role": "user", "content": "x"}]
    assert "confidence_threshold" not in talk.body("x")
    assert "not DiLaServe" in Conversation("m", ours=False).command("/threshold 0.7")


@with_server
async def test_a_piped_chat_answers_each_line(address):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dilaserve", "chat", address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OPENAI_API_KEY": ""},
    )
    out, err = await process.communicate(b"hello\n/reset\nhello\n")
    assert (process.returncode, err.decode()) == (0, "the conversation is forgotten\n")
    first, second = out.decode().split("\n")[:2]
    assert first == second


async def test_an_answer_of_another_server_is_read_as_text():
    url, asked, runner = await other()
    async with opened("key") as session:
        pieces = [piece async for piece in answer(session, url, Conversation("m", ours=False).body("hi"))]
        assert session.headers["authorization"] == "Bearer key"
    await runner.cleanup()
    assert "".join(piece.text for piece in pieces) == "one two"
    assert "include_canvas" not in asked[0]["stream_options"]


class Terminal:
    """A process on a pseudo-terminal, as a user sees and types it."""

    def __init__(self, *words):
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 60, 0, 0))
        environ = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            words,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env=environ,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C on it is a signal
        )
        self.shown = asyncio.StreamReader()

    async def __aenter__(self):
        file = os.fdopen(self.ours, "rb", buffering=0)
        protocol = asyncio.StreamReaderProtocol(self.shown)
        self.transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, file)
        return self

    async def __aexit__(self, *raised):
        self.process.kill()
        self.process.wait()
        self.transport.close()
        os.close(self.theirs)

    async def shows(self, text):
        """Wait until it shows this text, after what was waited for before."""
        await asyncio.wait_for(self.shown.readuntil(text.encode()), 60)

    def types(self, text):
        os.write(self.ours, text.encode())

    async def is_interrupted(self, text):
        """Press Ctrl-C until it shows this text: Python may miss one between its prompt and its wait for a key."""
        shown = asyncio.ensure_future(self.shows(text))
        while not shown.done():
            self.types(CTRL_C)
            await asyncio.wait([shown], timeout=1)
        await shown


async def test_a_chat_on_a_terminal():
    url, asked, runner = await other(hangs={2: asyncio.Event()})
    async with Terminal(sys.executable, "-m", "dilaserve", "chat", url) as chat:
        await chat.shows("> ")
        chat.types(f"hello wrold{3 * LEFT}{BACKSPACE}{RIGHT}r\r")
        await chat.shows("one two")
        await chat.shows("> ")
        assert asked[-1]["messages"] == [{"role": "user", "content": "hello world"}]
        chat.types("and then?\r")
        await chat.shows("one")
        chat.types(CTRL_C)
        await chat.shows("(cancelled)")
        await chat.shows("> ")
        chat.types("a line that is dropped")
        await chat.is_interrupted("Ctrl-D ends the chat")
        await runner.cleanup()
        await chat.shows("> ")
        chat.types("more\r")
        await chat.shows(f"no server answers at {url}")
        await chat.shows("> ")
        chat.types(CTRL_D)
        assert await asyncio.to_thread(chat.process.wait) == 0
        assert termios.tcgetattr(chat.theirs)[3] & termios.ECHO
    assert len(asked) == 2


def screen(written, height):
    """The rows that a terminal of this height shows of this text, and those that have left it at the top."""
    rows, row = [""], 0
    for sign in re.split(r"(\x1b\[[?\d;]*[a-zA-Z]|\r|\n)", written):
        match sign:
            case "\n":
                row += 1
                rows += [""] if row == len(rows) else []
            case "\x1b[1A":
                row = max(row - 1, len(rows) - height, 0)
            case "\x1b[2K":
                rows[row] = ""
            case "\r":
                pass
            case text if not text.startswith("\x1b"):
                rows[row] += text
    return [one.rstrip() for one in rows]


def test_an_answer_longer_than_the_terminal_is_shown_once():
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=4, legacy_windows=False)
    lines = [f"line {number} of many words \x07more" for number in range(9)]
    with drawing(console) as show:
        for count in range(len(lines)):
            text = "".join(f"{line}\n" for line in lines[:count])
            show(text, [Slot("line ", 0.95), Slot(None, 0.0)] * 20)
            show(text + lines[count], [])
    shown = [row for row in screen(console.file.getvalue(), 4) if row]
    assert shown == [
        row for number in range(9) for row in (f"line {number} of many words", "\N{REPLACEMENT CHARACTER}more")
    ]
