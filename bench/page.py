"""Screenshots of the page at `/` in a headless Chromium: light and dark, wide and as narrow as a phone.

    bin/bench page [--out DIR]

Nothing is timed. `tests/test_page.py` drives the page with the same browser.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from dilaserve import Config, Engine
from dilaserve.server.app import running

PATIENCE = 60.0  # seconds in which the page shows what it is meant to show
BINARIES = ("chromium", "chromium-browser", "google-chrome")
PHONE = (390, 844)  # CSS pixels
DESK = (1280, 900)
TRAFFIC = 20.0  # seconds of requests before the pictures are taken
PROMPTS = ("Start with 35: -6 +9 +7", "What is 347+85?", "Sort: 57 85 65 24")
VIEWS = {"light": (DESK, False), "dark": (DESK, True), "phone": (PHONE, False), "phone-dark": (PHONE, True)}


def missing() -> str | None:
    """Why there is no browser to drive here; None if there is one."""
    if not any(map(shutil.which, BINARIES)):
        return "no Chromium is installed; on Debian: apt-get install chromium chromium-driver"
    return (
        None
        if shutil.which("chromedriver")
        else "no chromedriver is installed; on Debian: apt-get install chromium-driver"
    )


@contextlib.contextmanager
def served(*servers: dict[str, Any], devices: str = "cpu") -> Iterator[list[str]]:
    """Servers of one engine with the bundled model, one for each of the settings, on an event loop of their own in a
    thread; gives their addresses.
    """
    addresses: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with contextlib.AsyncExitStack() as stack:
            config = Config.of(model="dilaserve-tiny", devices=devices)
            engine = await stack.enter_async_context(Engine(config))
            for settings in servers:
                server = running(engine, Config.of(devices=devices, port=0, **settings))
                addresses.append(await stack.enter_async_context(server))
            ready.set()
            await asyncio.to_thread(stop.wait)

    def live() -> None:
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        ready.wait()
        yield addresses
    finally:
        stop.set()
        thread.join()


class Browser:
    """A headless Chromium, and what tests do with a page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str, size: tuple[int, int] = DESK, dark: bool = False) -> None:
        width, height = size
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(address)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str) -> object:
        return self.driver.execute_script(script)

    def terms(self, selector: str) -> dict[str, str]:
        """A description list, read at once: the page may replace it at any time."""
        pairs = "[...document.querySelectorAll(arguments[0] + ' > div')].map((one) => [...one.children])"
        script = f"return {pairs}.map((parts) => parts.map((part) => part.textContent))"
        return dict(self.driver.execute_script(script, selector))

    def press(self, selector: str) -> None:
        """Press a button, wherever on the page it is."""
        self.driver.execute_script("document.querySelector(arguments[0]).click()", selector)

    def slide(self, selector: str, value: float) -> None:
        """Move a slider, as a user's hand does."""
        script = "const [at, value] = arguments; const slider = document.querySelector(at); slider.value = value;"
        self.driver.execute_script(f"{script} slider.dispatchEvent(new Event('input'))", selector, value)

    def wait(self, shown: Callable[[], object]) -> None:
        WebDriverWait(self.driver, PATIENCE, 0.1).until(lambda _: shown())

    def offline(self, on: bool) -> None:
        """Take the browser off the network, or back."""
        speeds = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": on, **speeds})

    def errors(self) -> list[str]:
        """What the browser has complained of since the last time, refused styles and scripts included."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def picture(self, path: Path) -> None:
        """The whole page, however long."""
        wanted = {"captureBeyondViewport": True, "format": "png"}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium of the system; nothing is downloaded."""
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BINARIES)))
    for flag in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own refuses to start as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def ask(address: str, draw: random.Random) -> None:
    """A request with a deadline, some of which are tight."""
    body = {"messages": [{"role": "user", "content": draw.choice(PROMPTS)}], "max_tokens": 64}
    body["slo"] = {"deadline_ms": draw.choice([40, 80, 1000])}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    urllib.request.urlopen(request, timeout=PATIENCE).read()


def show(page: Browser) -> None:
    """Ask a question, ask it again at a lower threshold, look at a step of the first, and have the charts drawn."""
    page.wait(lambda: page.all("#tiles dd"))
    page.press(".examples button")
    page.press("#run")
    page.wait(lambda: page.all("#again:not([hidden])"))
    page.press("#compare")
    page.wait(lambda: page.all("#difference:not([hidden])"))
    page.run("document.querySelector('#charts').scrollIntoView({ behavior: 'instant' })")
    page.wait(lambda: len(page.all("#charts .main-svg")) >= len(page.all("#charts .plot")))
    page.slide(".run:first-child .scrub input", 3)
    page.run("document.activeElement.blur(); window.scrollTo({ top: 0, behavior: 'instant' })")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the pictures")
    out = parser.parse_args().out
    if reason := missing():
        raise SystemExit(f"page: {reason}")
    draw = random.Random(0)
    with served({}, devices="cpu,cpu") as [address], browser() as page:
        until = time.monotonic() + TRAFFIC
        while time.monotonic() < until:
            ask(address, draw)
            time.sleep(draw.uniform(0, 0.4))
        for name, (size, dark) in VIEWS.items():
            page.open(address, size, dark)
            show(page)
            page.picture(out / f"page-{name}.png")
            print(out / f"page-{name}.png", *page.errors(), sep="\n")


if __name__ == "__main__":
    main()
