"""Named keys with limits, read again on SIGHUP; pages of other sites; HTTPS."""

import asyncio
import hashlib
import os
import signal
import ssl
import subprocess

import aiohttp
import pytest
from forked_python import Python
from http_requests import CHAT, HELLO, post
from hypothesis import given
from hypothesis import strategies as st

from dilaserve import Config
from dilaserve.errors import ConfigError, Overloaded
from dilaserve.scheduler.rules.accuracy_budget import budget_of
from dilaserve.server import api_keys
from dilaserve.server.api_keys import Keyring, Tenant
from dilaserve.server.app import running
from dilaserve.types import Slo

KEYS = """
[[tenant]]
name = "ann"
key = "key-of-ann"
requests_per_minute = 600
priority = 1
max_priority = 2
accuracy_budget = 0.2

[[tenant]]
name = "bob"
sha256 = "{digest}"
concurrency = 1

[[tenant]]
name = "root"
key = "key-of-root"
admin = true
"""


@pytest.fixture
def key_file(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(KEYS.format(digest=hashlib.sha256(b"key-of-bob").hexdigest()))
    return file


def bearer(name):
    return {"authorization": f"Bearer key-of-{name}"}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_named_key_makes_its_requests_those_of_its_tenant(engine, key_file):
    config = Config.of(port=0, api_key_file=str(key_file))
    ledger = engine.scheduler.deadlines.ledger
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        assert (await post(client, CHAT, HELLO))[0] == 401
        assert (await post(client, CHAT, HELLO, **bearer("carl")))[0] == 401
        assert (await post(client, CHAT, HELLO | {"user": "somebody"}, **bearer("ann")))[0] == 200
        assert "ann" in ledger.banks
        assert "somebody" not in ledger.banks
        status, body, _ = await post(client, CHAT, HELLO | {"priority": 3}, **bearer("ann"))
        assert (status, body["error"]["param"]) == (400, "priority")
        assert (await post(client, CHAT, HELLO | {"priority": 2}, **bearer("ann")))[0] == 200
        status, body, headers = await post(client, CHAT, HELLO | {"n": 2}, **bearer("bob"))
        assert (status, body["error"]["code"]) == (429, "concurrency_limit")
        assert int(headers["retry-after"]) >= 1
        assert (await post(client, CHAT, HELLO, **bearer("bob")))[0] == 200


@pytest.mark.asyncio(loop_scope="module")
async def test_only_an_admin_key_of_the_file_changes_the_plan(engine, key_file):
    config = Config.of(port=0, api_key_file=str(key_file))
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        assert (await post(client, "/v1/plan", {"plan": "1x1"}, **bearer("ann")))[0] == 403
        assert (await post(client, "/v1/plan", {"plan": "1x1"}))[0] == 401
        assert (await post(client, "/v1/plan", {"plan": "1x1"}, **bearer("root")))[0] == 200


@pytest.mark.asyncio(loop_scope="module")
async def test_pages_of_allowed_sites_may_ask_and_others_may_not(engine):
    config = Config.of(port=0, api_key="a-long-key", allowed_origins="https://one.example, https://two.example")
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with running(engine, config) as address, aiohttp.ClientSession(address) as client:
        async with client.options(CHAT, headers={"origin": "https://two.example", **wants}) as answer:
            assert answer.status == 204
            assert answer.headers["access-control-allow-origin"] == "https://two.example"
            assert answer.headers["access-control-allow-headers"] == "authorization"
        async with client.options(CHAT, headers={"origin": "https://three.example", **wants}) as answer:
            assert "access-control-allow-origin" not in answer.headers
        for stream in (False, True):
            body = HELLO | {"stream": stream}
            headers = {"origin": "https://one.example", "authorization": "Bearer a-long-key"}
            async with client.post(CHAT, json=body, headers=headers) as answer:
                assert answer.status == 200
                assert answer.headers["access-control-allow-origin"] == "https://one.example"
                assert answer.headers["vary"] == "origin"
        status, _, headers = await post(client, CHAT, HELLO, origin="https://one.example")
        assert (status, headers["access-control-allow-origin"]) == (401, "https://one.example")


@pytest.mark.asyncio(loop_scope="module")
async def test_without_allowed_origins_no_page_may_ask(client):
    _, _, headers = await post(client, CHAT, HELLO, origin="https://one.example")
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.asyncio(loop_scope="module")
async def test_https(engine, certificate):
    config = Config.of(port=0, ssl_certfile=str(certificate))
    trusted = ssl.create_default_context(cafile=str(certificate))
    async with running(engine, config) as address:
        assert address.startswith("https://")
        connector = aiohttp.TCPConnector(ssl=trusted)
        async with aiohttp.ClientSession(address.replace("127.0.0.1", "localhost"), connector=connector) as client:
            assert (await post(client, CHAT, HELLO))[0] == 200
            async with client.post(CHAT, json=HELLO | {"stream": True}) as answer:
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")


@pytest.fixture
def certificate(tmp_path):
    """A certificate of its own for localhost, with its key in the same file."""
    file = tmp_path / "localhost.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(file), "-out", str(tmp_path / "c.pem")]
    subprocess.run(words, check=True, capture_output=True)
    file.write_text(file.read_text() + (tmp_path / "c.pem").read_text())
    return file


def test_keys_are_read_again_on_sighup_and_a_broken_file_changes_nothing(key_file):
    with Python("-m", "dilaserve", "--port", "0", "--api-key-file", key_file) as server:
        try:
            address = server.stdout.readline().split(" on ")[1].split()[0]

            async def status(name):
                async with aiohttp.ClientSession(address) as client:
                    return (await post(client, CHAT, HELLO, **bearer(name)))[0]

            def hang_up(text, said):
                key_file.write_text(text)
                os.kill(server.pid, signal.SIGHUP)
                while said not in server.stderr.readline():
                    pass

            assert asyncio.run(status("ann")) == 200
            hang_up("[[tenant]]\nname = 'ann'\n", "needs either key or sha256")
            assert asyncio.run(status("ann")) == 200
            hang_up("[[tenant]]\nname = 'carl'\nkey = 'key-of-carl'\n", "read again: 1 keys")
            assert (asyncio.run(status("ann")), asyncio.run(status("carl"))) == (401, 200)
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "tenant"),
        ("[[tenant]]\nname = 'a'", "needs either key or sha256"),
        ("[[tenant]]\nname = 'a'\nkey = 'short'", "length >= 8"),
        ("[[tenant]]\nname = 'a'\nkey = 'long-enough'\nrate = 3", "rate"),
        ("[[tenant]]\nname = 'a'\nkey = 'long-enough'\n" * 2, "same key"),
        ("[[tenant]]\nname = 'a'\nkey = 'long-enough'\npriority = 2\nmax_priority = 1", "max_priority"),
        ("[[tenant", "not valid TOML"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_without_repeating_keys(tmp_path, run_main, text, words):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    code, out, err = run_main("serve", "--port", "0", "--api-key-file", str(file))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert "long-enough" not in err


def test_wrong_tls_files_are_refused_before_the_model_is_loaded(tmp_path, run_main):
    code, _, err = run_main("serve", "--port", "0", "--ssl-certfile", str(tmp_path / "none.pem"))
    assert (code, "No such file" in err) == (2, True)
    code, _, err = run_main("serve", "--port", "0", "--ssl-keyfile", str(tmp_path / "none.pem"))
    assert (code, "--ssl-certfile" in err) == (2, True)


def test_a_tenant_has_no_larger_budget_than_the_server(key_file):
    api_keys.budgets_within(api_keys.read(key_file), 0.2, key_file)
    with pytest.raises(ConfigError, match="ann"):
        api_keys.budgets_within(api_keys.read(key_file), 0.1, key_file)
    assert budget_of(Slo(budget=0.2), 0.9) == 0.2
    assert budget_of(Slo(budget=2.0), 0.9) == budget_of(Slo(), 0.9) == 0.9


def wait_of(keys, tenant, now):
    """Seconds that a refused request is asked to wait; None for one that was taken, and has ended."""
    try:
        keys.begin(tenant, 1, now)
    except Overloaded as refused:
        return refused.retry_after
    keys.end(tenant, 1)
    return None


@given(st.integers(1, 120), st.lists(st.floats(0.0, 30.0), min_size=1, max_size=200))
def test_no_tenant_sends_more_than_its_rate(rate, pauses):
    """In any time from the first request on: the rate, and what may come at once."""
    tenant, now, taken = Tenant(name="a", key="long-enough", requests_per_minute=rate), 0.0, 0
    keys = Keyring([tenant])
    for pause in pauses:
        now += pause
        if (wait := wait_of(keys, tenant, now)) is None:
            taken += 1
        else:
            assert 0.0 < wait <= 60.0 / rate
        assert taken <= rate + now * rate / 60.0 + 1e-6
    assert keys.used["a"].running == 0


@given(
    st.lists(st.text("ab", min_size=8, max_size=12), unique=True, min_size=1, max_size=6), st.text("ab", max_size=12)
)
def test_a_key_has_the_owner_that_the_file_says(keys, sent):
    tenants = [Tenant(name=f"t{place}", key=key) for place, key in enumerate(keys)]
    owner = Keyring(tenants).owner(sent)
    assert (owner.name if owner else None) == (f"t{keys.index(sent)}" if sent in keys else None)
