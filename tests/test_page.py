"""The page at / in a browser: what it shows, the chat, keys, themes, keyboard, narrow screens, and what it costs."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import moestro
from moestro.serve.service import Loaded, Service
from serving import TEMPLATE, ScriptedEngine, loaded, serving

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FILES = Path(moestro.__file__).parent / "serve" / "page"
THOUGHT = "<think>\nA greeting.\n</think>\n\nHello <b>there</b>."
LONG = "One two three four five. " * 60

pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="no Chromium: apt-get install chromium, or name one in the variable CHROMIUM"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def made() -> Loaded:
    return loaded(template=TEMPLATE)


@pytest.fixture(scope="module")
def engine(made: Loaded) -> ScriptedEngine:
    assert isinstance(made.engine, ScriptedEngine)
    return made.engine


@pytest.fixture(scope="module")
def address(made: Loaded) -> Iterator[str]:
    with serving(Service("demo", lambda: made)) as at:
        yield at


class Tab:
    """A tab that notes what goes wrong in it, and every address that it asks for."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.wrong: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else 0)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))

    def open(self, address: str, state: str = "ready") -> Page:
        self.page.goto(address)
        self.page.wait_for_selector(f"#state[data-state={state}]")
        return self.page


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.context.close()
    assert not tab.wrong


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def picture_of(page: Page, name: str) -> str:
    return str(page.evaluate("name => document.getElementById(name).toDataURL()", name))


def test_files_are_open_and_strict(address: str) -> None:
    index = httpx2.get(f"{address}/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", index.text)
    for named in re.findall(r'(?:src|href)="(/[^"]*)"', index.text):
        assert httpx2.get(f"{address}{named}").status_code == 200, named
    for path in ("/page/", "/page/none.js", "/page/..%2fapp.py", "/page/../app.py", "/page/page.css/x"):
        assert httpx2.get(f"{address}{path}").status_code == 404, path
    assert httpx2.get(f"{address}/", headers={"Host": "evil.example"}).status_code == 403


def test_what_is_shown(tab: Tab, address: str) -> None:
    page = tab.open(address)
    expect(page.locator("#map-shape")).to_have_text("6 layers \u00d7 8 experts, 2 chosen for each token")
    expect(page.locator("#at-ram")).to_have_text("48")
    expect(page.locator("#plan")).to_contain_text("All 48 experts lie in RAM, and the CPU computes every layer.")
    expect(page.locator("#lanes")).to_contain_text("there is no GPU here")
    expect(page.locator("#memory")).to_contain_text("keys and values")
    expect(page.locator("#running-of")).to_have_text("of 4")
    expect(page).to_have_title("demo · Moestro")
    assert tab.hosts == {urlsplit(address).netloc}


def test_an_answer_streams_and_its_reasoning_is_folded(tab: Tab, address: str, engine: ScriptedEngine) -> None:
    page = tab.open(address)
    engine.script = THOUGHT
    try:
        ask(page, "Hello?")
        answer = page.locator(".message.assistant").last
        expect(answer.locator("> .text")).to_have_text("Hello <b>there</b>.")
        expect(answer.locator(".about")).to_contain_text("tokens")
        expect(answer.locator("details .text")).to_be_hidden()
        answer.locator("summary").click()
        expect(answer.locator("details .text")).to_have_text("A greeting.")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "And again?")
        roles = [turn["role"] for turn in sent.value.post_data_json["messages"]]
        assert roles == ["user", "assistant", "user"]
        expect(page.locator(".message.assistant")).to_have_count(2)
        expect(page.locator("#send")).to_have_text("Send")
        expect(page.locator("#chat-said")).to_contain_text("Hello")
        page.click("#anew")
        expect(page.locator(".message")).to_have_count(0)
    finally:
        engine.script = ""


def test_an_answer_can_be_stopped(tab: Tab, address: str, engine: ScriptedEngine) -> None:
    page = tab.open(address)
    engine.script = LONG
    try:
        ask(page, "Count")
        expect(page.locator(".message.assistant > .text")).to_contain_text("One two")
        page.click("#send")
        expect(page.locator(".about").last).to_have_text("Stopped.")
        expect(page.locator("#send")).to_have_text("Send")
        expect(page.locator("#running")).to_have_text("0")
    finally:
        engine.script = ""


def test_figures_move_with_an_answer(tab: Tab, address: str, engine: ScriptedEngine) -> None:
    page = tab.open(address)
    engine.script = LONG
    try:
        page.wait_for_function("document.getElementById('map').width > 0")
        before = {name: picture_of(page, name) for name in ("map", "speed", "lane-cpu")}
        ask(page, "Count")
        expect(page.locator("#running")).to_have_text("1")
        page.wait_for_function("parseFloat(document.getElementById('answer-rate').textContent) > 0")
        page.wait_for_function("parseFloat(document.getElementById('share-cpu').textContent) > 0")
        end = time.monotonic() + 20
        while any(picture_of(page, name) == picture for name, picture in before.items()):
            assert time.monotonic() < end
            time.sleep(0.1)
        page.click("#send")
    finally:
        engine.script = ""


def test_an_error_is_shown(browser: Browser, address: str) -> None:
    tab = Tab(browser)
    page = tab.open(address)
    ask(page, "word " * 3000)
    expect(page.locator(".message .error")).to_contain_text("context")
    expect(page.locator("#send")).to_have_text("Send")
    assert all("400" in line for line in tab.wrong)  # the browser's own word for it
    tab.context.close()


def test_the_map_by_keyboard_and_pointer(tab: Tab, address: str) -> None:
    page = tab.open(address)
    expect(page.locator("#at-ram")).to_have_text("48")
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#map")).to_be_focused()
    expect(page.locator("#tip")).to_contain_text("Layer 0, expert 0")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowUp", "End", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#tip")).to_contain_text("Layer 0, expert 7")
    expect(page.locator("#map-said")).to_contain_text("Layer 0, expert 7: in RAM; ")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.hover("#map", position={"x": 60, "y": 45})
    expect(page.locator("#tip")).to_contain_text("Layer 1, expert 0")
    page.mouse.move(0, 0)
    expect(page.locator("#tip")).to_be_hidden()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes_can_be_read(browser: Browser, address: str, theme: str) -> None:
    """Text has a contrast of 4.5 with what is behind it, by the system's choice and by the page's own button."""
    tab = Tab(browser, color_scheme=theme)
    page = tab.open(address)
    expect(page.locator("#at-ram")).to_have_text("48")
    for choice in ("auto", "light", "dark"):
        wanted = theme if choice == "auto" else choice
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == wanted
        low = page.evaluate(CONTRAST)
        assert not low, (theme, choice, low)
        page.click("#theme")
    page.click("#theme")
    page.reload()
    expect(page.locator("#theme")).to_have_text("Light")
    assert not tab.wrong
    tab.context.close()


CONTRAST = """() => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const [r, g, b] = parts.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = getComputedStyle(node).backgroundColor;
      if (!/, 0\\)$/.test(found)) return found;
    }
    return 'rgb(255, 255, 255)';
  };
  const low = [];
  for (const node of document.body.querySelectorAll('*')) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!says || !node.checkVisibility() || node.closest('noscript')) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${node.tagName}.${node.className}#${node.id} ${ratio.toFixed(2)}`);
  }
  return low;
}"""


@pytest.mark.parametrize("width", [360, 768, 1920])
def test_widths(browser: Browser, address: str, width: int) -> None:
    tab = Tab(browser, viewport={"width": width, "height": 740})
    page = tab.open(address)
    expect(page.locator("#at-ram")).to_have_text("48")
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("#map", "#speed", "#question", "#send", "#theme"):
        box = page.locator(name).bounding_box()
        assert box is not None
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
    assert not tab.wrong
    tab.context.close()


def test_every_control_has_a_name(tab: Tab, address: str) -> None:
    page = tab.open(address)
    expect(page.locator("#at-ram")).to_have_text("48")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, textarea, input, canvas, [tabindex]')].filter((node) =>
          !(node.ariaLabel || node.labels?.length || node.textContent.trim())).map((node) => node.outerHTML)"""
    )
    assert not unnamed


def test_a_key_is_asked_for(browser: Browser, made: Loaded) -> None:
    tab = Tab(browser)
    with serving(Service("demo", lambda: made, has_key=True), key="k3y") as address:
        page = tab.page
        page.goto(address)
        expect(page.locator("#key")).to_be_visible()
        expect(page.locator("#key-value")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-wrong")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#key")).to_be_visible()
        page.fill("#key-value", "k3y")
        page.click("#key-form button")
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#key")).to_be_hidden()
        page.reload()
        expect(page.locator("#state")).to_have_text("Ready")
        assert page.evaluate("Object.keys(localStorage)") == ["moestro-theme"]
        assert all("401" in line for line in tab.wrong)
        page.close()
        tab.context.close()


def test_the_servers_end_is_told(browser: Browser) -> None:
    tab, made = Tab(browser), loaded(max_requests=1)
    assert isinstance(made.engine, ScriptedEngine)
    made.engine.script = "Good day."
    with serving(Service("demo", lambda: made)) as address:
        page = tab.open(address)
        ask(page, "Hi")
        expect(page.locator(".message.assistant .about")).to_contain_text("tokens")
    page.wait_for_selector("#state[data-state=closing], #state[data-state=gone]")
    page.wait_for_selector("#state[data-state=gone]")
    expect(page.locator("#loading-text")).to_contain_text("cannot be reached")
    ask(page, "Still there?")
    expect(page.locator(".message .error")).to_contain_text("cannot be reached")
    tab.context.close()


LAYERS, EXPERTS = 60, 512


class Fake(BaseHTTPRequestHandler):
    """The page's files, and a stream of a model with many experts whose cells change all at once."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/live":
            name = "index.html" if self.path == "/" else self.path.rpartition("/")[2]
            kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
            content = (FILES / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", kind[name.rpartition(".")[2]])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._tell("state", {"state": "ready", "model": "large"})
            self._tell("model", MODEL)
            for _ in range(600):
                self._tell("cells", {"cells": base64.b64encode(random.randbytes(LAYERS * EXPERTS)).decode()})
                self._tell("now", NOW)
                time.sleep(0.5)
        except OSError:
            pass

    def _tell(self, name: str, value: Any) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


LANE = {"is_there": True, "what": "works"}
MODEL = {
    "model": "large",
    "family": "qwen3_next",
    "shape": {"layers": LAYERS, "experts": [EXPERTS] * LAYERS, "top_k": 10},
    "formats": ["int4"],
    "policy": "moestro",
    "machine": {"cpu": "a CPU", "threads": 8, "kernels": "avx512", "ram_bytes": 2**36, "gpu": "a GPU"},
    "lanes": {"gpu": LANE, "link": LANE, "cpu": LANE},
    "plan": ["Much of it lies in RAM."],
    "memory": [{"tier": "ram", "limit_bytes": 2**36, "parts": [{"name": "experts", "bytes": 2**35}]}],
    "uncounted": [],
    "batching": "batched",
    "max_requests": 4,
    "context": 4096,
    "queue": 64,
    "half_life_s": 20.0,
}
NOW = {
    "time_s": 0,
    "passed_s": 0.5,
    "running": 3,
    "waiting": 1,
    "reading": [0, 0],
    "tok_s": {"prompt": 120.5, "answer": 31.2},
    "tokens": {"prompt": 1, "answer": 1},
    "lanes": {"gpu": 0.5, "link": 0.7, "cpu": 0.9},
    "link_gbps": 11.0,
    "hits": {"hits": 9, "joined": 1, "misses": 4},
    "hit_rate": 0.71,
    "places": {"disk": 0, "ram": 30000, "gpu": 700, "arriving": 20},
    "prefix_bytes": 2**28,
    "prefixes": 3,
    "process_bytes": 2**35,
}


def main_thread_ms(page: Page, seconds: float) -> tuple[float, float]:
    """Of an update with 60 x 512 cells: all work of the main thread, on average; and of our own code, at the most."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    page.evaluate(
        """() => {
          window.spans = [];
          new PerformanceObserver((list) => window.spans.push(...list.getEntries().map((e) => [e.name, e.duration])))
            .observe({ type: 'measure' });
        }"""
    )

    def busy_s() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(float(one["value"]) for one in metrics if one["name"] == "TaskDuration")

    before_s = busy_s()
    time.sleep(seconds)
    after_s = busy_s()
    spans: list[tuple[str, float]] = page.evaluate("window.spans")
    draws = [ms for name, ms in spans if name == "moestro-draw"]
    assert len(draws) >= seconds, "two updates a second"
    events = [ms for name, ms in spans if name == "moestro-update"]
    return (after_s - before_s) / len(draws) * 1e3, max(draws) + sum(sorted(events)[-2:])


def test_an_update_of_many_experts_takes_little(browser: Browser, capsys: pytest.CaptureFixture[str]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tab = Tab(browser)
    try:
        page = tab.open(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for_timeout(2000)
        mean_ms, most_ms = main_thread_ms(page, 8)
        with capsys.disabled():
            print(
                f"\n60 x 512 cells: {mean_ms:.1f} ms of the main thread for an update; our code {most_ms:.1f} at most"
            )
        assert mean_ms <= 50
        assert not tab.wrong
    finally:
        tab.context.close()
        server.shutdown()
