"""The page at `/` in a real browser, and what the server sends for it."""

import json
import os
import re
import urllib.error
import urllib.request

import pytest

from bench.page import DESK, PHONE, Browser, browser, missing, served

KEY = "a-key"
pytestmark = pytest.mark.skipif(bool(missing()) and os.environ.get("CI") != "true", reason=missing() or "")
MASKS_SEEN = """
window.seen = [];
const count = () => window.seen.push(document.querySelectorAll('.run:last-child .mask').length);
new MutationObserver(count).observe(document.querySelector('#runs'), { childList: true, subtree: true });
"""
STOP_AT_THE_FIRST_CANVAS = """
const press = () => { if (document.querySelector('.run .mask')) document.querySelector('#stop').click(); };
new MutationObserver(press).observe(document.querySelector('#runs'), { childList: true, subtree: true });
"""
CONTRAST = """
const shade = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = getComputedStyle(at).backgroundColor;
    if (!color.includes(', 0)')) return color;
  }
};
return [...document.querySelectorAll('main *, header *, footer *')]
  .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
  .filter((one) => !one.closest('svg, :disabled'))
  .map((one) => [one.outerHTML.slice(0, 80), shade(getComputedStyle(one).color), shade(behind(one))])
  .map(([name, a, b]) => [name, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)])
  .filter(([, contrast]) => contrast < 4.5);
"""


UNNAMED = """
return [...document.querySelectorAll('input, textarea')].filter((one) => !one.labels.length && !one.ariaLabel).length
"""


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def addresses():
    """Of a server that is open, of one with a key, and of one behind a prefix."""
    with served({}, {"api_key": KEY}, {"root_path": "/llm"}) as addresses:
        yield addresses


@pytest.fixture(scope="module")
def address(addresses):
    return addresses[0]


@pytest.fixture(autouse=True)
def without_complaints(page):
    """Each test ends without a message in the browser's console; the policy's are among them."""
    page.errors()
    yield
    assert page.errors() == []


def started(page: Browser, address: str, **view) -> None:
    page.open(address, **view)
    page.wait(lambda: page.all("#tiles dd"))


def ask(page: Browser, prompt: str) -> None:
    """Type a question and send it with the keyboard alone."""
    page.find("#prompt").send_keys(prompt)
    page.run("document.querySelector('#ask').requestSubmit()")
    page.wait(lambda: page.find("#stop").get_attribute("disabled") and page.all(".run .answer, .run .failure"))


def fetched(address, path, **headers):
    with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=60) as response:
        return response.headers, response.read()


def test_a_question_is_typed_and_its_answer_denoises_on_the_canvas(page, address):
    started(page, address)
    page.run(MASKS_SEEN)
    ask(page, "Start with 34: +3 +2 -2 -9 -8")
    answer, canvas = page.find(".run .answer").text, page.find(".run .canvas").text
    assert re.fullmatch(r"\+3=37 \w+ \+2=39 \w+ -2=37 \w+ -9=28 \w+ -8=20", answer), answer
    assert canvas == answer
    masks = page.run("return window.seen")
    assert len(set(masks)) > 2  # the canvas after several steps
    assert masks[-1] == 0
    assert page.find("#said").get_attribute("textContent").endswith(answer)
    facts = page.terms(".run .facts")
    assert facts["Refreshes"] == "1"
    assert len(page.all(".run .track rect.refresh")) == 1
    assert int(facts["Steps"]) == len(page.all(".run .track rect.refresh, .run .track rect.reuse"))
    assert len(page.run("return [...document.querySelectorAll('.run tbody tr')]")) == int(facts["Steps"])


def test_steps_that_are_over_can_be_looked_at_again(page, address):
    started(page, address)
    ask(page, "Start with 34: +3 +2 -2 -9 -8")
    page.slide(".scrub input", 1)
    assert page.all(".run .mask")
    assert page.find(".scrub span").text.startswith("Step 1 of")


def test_stop_ends_the_answer_here_and_on_the_server(page, address):
    def cancelled():
        return json.loads(fetched(address, "/v1/stats")[1])["requests"]["fates"]["cancelled"]

    started(page, address)
    before = cancelled()
    page.slide("#threshold", 1)  # one token a step
    page.run(STOP_AT_THE_FIRST_CANVAS)
    ask(page, "Start with 34: +3 +2 -2 -9 -8 +7 -6 +5 -4 +3")
    assert page.find(".run .failure").text == page.find("#said").get_attribute("textContent") == "Stopped."
    assert page.find("#run").is_enabled()
    page.wait(lambda: cancelled() == before + 1)
    started(page, address)
    ask(page, "What is 347+85?")
    assert page.find(".run .answer").text == "432"


def test_a_second_run_at_another_threshold_marks_what_differs(page, address):
    started(page, address)
    ask(page, "Start with 34: +3 +2 -2 -9 -8")
    page.slide("#other-threshold", 0.6)
    page.press("#compare")
    page.wait(lambda: page.all("#difference:not([hidden])"))
    first, second = (one.text for one in page.all(".run .answer"))
    assert [one.text for one in page.all(".run h2")] == ["Threshold 0.90", "Threshold 0.60"]
    said = page.find("#difference").text
    assert ("The answers are the same." in said) == (first == second)
    assert "3 steps instead of 7" in said
    marked = {word for one in page.all(".run:last-child mark") for word in one.text.split()}
    assert marked == set(second.split()) - set(first.split())


def test_the_server_is_shown_in_charts_boxes_and_timelines(page, address):
    started(page, address)
    ask(page, "What is 347+85?")
    page.run("document.querySelector('#charts').scrollIntoView({ behavior: 'instant' })")
    page.wait(lambda: len(page.all("#charts .main-svg .xy")) >= 6)
    page.wait(lambda: page.all("#timelines .track rect.refresh"))
    assert [one.text for one in page.all("#instances .device")] == ["0 · cpu"]
    (change,) = page.all("#changes tbody tr")
    assert "the start" in change.text
    tiles = page.terms("#tiles")
    assert int(tiles["Answered"]) >= 1


def test_an_error_of_the_api_is_shown_in_words(page, address):
    started(page, address)
    page.run("document.querySelector('#prompt').value = 'many words '.repeat(400)")
    ask(page, "and more")
    assert "maximum context length" in page.find(".run .failure").text
    assert any("400" in message for message in page.errors())  # the browser's own, of the status


@pytest.mark.parametrize(("size", "dark"), [(DESK, False), (DESK, True), (PHONE, True), ((320, 640), False)])
def test_the_page_fits_and_can_be_read_in_light_and_dark(page, address, size, dark):
    started(page, address, size=size, dark=dark)
    ask(page, "Tom has 12 pens, wins 5, breaks 3. How many pens now?")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert page.run(CONTRAST) == []


def test_a_keyboard_reaches_everything_and_shows_where_it_is(page, address):
    started(page, address)
    page.run("document.body.focus()")
    reached = []
    for _ in range(14):
        page.driver.switch_to.active_element.send_keys("\ue004")  # tab
        reached.append(page.run("return document.activeElement.id || document.activeElement.textContent.trim()"))
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached[0] == "Skip to the playground"
    assert {"prompt", "threshold", "deadline", "max-tokens", "adaptive", "run"} <= set(reached)
    unnamed = page.run(UNNAMED)
    assert unnamed == 0


def test_a_key_is_asked_for_once_and_kept_in_the_tab(page, addresses):
    _, locked, _ = addresses
    page.open(locked)
    page.wait(lambda: page.all("#key-dialog[open]"))
    give(page, "wrong")
    page.wait(lambda: "refused" in page.find("#key-why").text)
    give(page, KEY)
    page.wait(lambda: page.all("#tiles dd"))
    ask(page, "What is 347+85?")
    assert page.find(".run .answer").text == "432"
    page.driver.refresh()
    page.wait(lambda: page.all("#tiles dd"))
    assert not page.all("#key-dialog[open]")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        fetched(locked, "/v1/stats")
    assert all("401" in message for message in page.errors())  # the browser's own, of the status


def test_a_server_behind_a_prefix_has_its_page_there(page, addresses):
    *_, prefixed = addresses
    started(page, f"{prefixed}/llm")
    assert page.run("return location.pathname") == "/llm/"
    ask(page, "What is 347+85?")
    assert page.find(".run .answer").text == "432"


def test_a_server_that_cannot_be_reached_is_reported_until_it_can(page, address):
    started(page, address)
    page.offline(True)
    page.wait(lambda: "cannot be reached" in page.find("#notice").text)
    page.offline(False)
    page.wait(lambda: not page.find("#notice").is_displayed())
    assert all("ERR_INTERNET_DISCONNECTED" in message for message in page.errors())  # the browser's own


def give(page: Browser, key: str) -> None:
    page.find("#key").send_keys(key)
    page.run("document.querySelector('#key-form').requestSubmit()")


def test_everything_comes_from_this_server_and_nothing_inline_runs(page, address):
    headers, body = fetched(address, "/")
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert not re.search(rb"<script(?![^>]*src=)|<style|style=|\son\w+=|https?://", body)
    started(page, address)
    page.run("document.querySelector('#charts').scrollIntoView({ behavior: 'instant' })")
    page.wait(lambda: page.all("#charts .main-svg"))
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert any(name.endswith("plotly.min.js") for name in loaded)
    assert all(name.startswith(address) for name in loaded)


def test_clients_that_want_json_get_json(address):
    headers, body = fetched(address, "/", accept="application/json")
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["service"] == "dilaserve"
    assert {"/v1/chat/completions", "/v1/stats"} <= set(json.loads(body)["routes"])
    assert fetched(address, "/", accept="text/html,*/*")[0]["content-type"].startswith("text/html")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(address, "/static/..%2fpage_files.py")
