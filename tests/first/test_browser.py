"""The web chat page (s05) in a real browser: what a person sees who opens the link."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from browser import find
from fake_model import FakeModel
from harness import since

from first.ledger import inbox_is_empty
from first.test_gateway import Client
from first.test_gateway import Desk
from first.test_gateway import until

pytestmark = pytest.mark.skipif(not find(), reason="needs Chromium")
CONNECTED = "document.querySelector('#state').dataset.state === 'connected'"
LISTED = "[...{}.querySelectorAll('#log .text')].map((e) => e.textContent)"
COMPACT = {"ensure_ascii": False, "separators": (",", ":")}  # as JSON.stringify writes it
COLOURS = """(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const of = (name) => getComputedStyle(document.querySelector(name));
  return [numbers(of('main').backgroundColor), numbers(of('.text').color)];
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Iterator[Desk]:
    with Desk(section, workspace, fake_model) as desk:
        yield desk


@pytest.fixture
def page(browser: Browser, desk: Desk) -> Iterator["Page"]:
    """The page of a gateway, as a new visitor opens it; no error on its console."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    desk.up(GATEWAY_PORT=str(port))
    before = len(browser.console)
    origin = f"http://127.0.0.1:{port}"
    browser.call("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
    browser.emulate(1000, 800)
    yield Page(browser, desk)
    browser.open("about:blank")
    errors = browser.console[before:]
    assert not [line for line in errors if not line.startswith("network: ")], errors


class Page:
    """A page and who sits before it, with a keyboard alone."""

    def __init__(self, browser: Browser, desk: Desk):
        self.browser, self.desk = browser, desk

    def open(self, link: str = "") -> None:
        self.browser.open("about:blank")  # another #token alone would load nothing
        self.browser.open(link or self.desk.link)
        self.browser.wait_for(CONNECTED)

    def say(self, text: str) -> None:
        self.browser.type(text)
        self.browser.press("Enter")

    def see(self, text: str, timeout: float = 10) -> None:
        self.browser.wait_for(f"document.body.innerText.includes({text!r})", timeout)

    def messages(self) -> list[str]:
        """The texts in the log, in order."""
        return self.browser.evaluate(LISTED.format("document"))

    def shows(self, *messages: str, document: str = "document") -> None:
        """Wait until the log has these messages, and all of each: they stream."""
        listed = f"JSON.stringify({LISTED.format(document)})"
        self.browser.wait_for(f"{listed} === {json.dumps(json.dumps(messages, **COMPACT))}")

    def get(self, js: str) -> object:
        return self.browser.evaluate(js)

    @property
    def peer(self) -> str:
        return self.get("localStorage.peer")


@pytest.mark.guard
@since("s05")
@pytest.mark.costly(last=True)
def test_a_conversation_with_the_keyboard_alone(page: Page):
    page.open()
    assert "token" not in page.get("location.href"), "it stays in no history and no screenshot"
    assert page.get("document.activeElement.id") == "text"
    page.browser.type("wait for")
    page.browser.press("Enter", shift=True)
    page.say("the answer")
    page.shows("wait for\nthe answer", "heard")
    page.browser.wait_for("document.querySelector('#status').innerText.includes('main is typing')")
    page.desk.gate.set()
    page.shows("wait for\nthe answer", "heard wait for\nthe answer")
    page.browser.wait_for("document.querySelector('#status').innerText === ''")
    page.browser.press("Enter"), page.say(" "), page.browser.press("Backspace")
    html = "<img src=x onerror='window.hit=1'><script>window.hit=1</script><b>bold</b>"
    page.say(html)
    shown = ["wait for\nthe answer", "heard wait for\nthe answer", html, f"heard {html}"]
    page.shows(*shown)
    assert len(page.desk.asked) == 2, "a blank line is not sent"
    assert (
        page.get("window.hit || document.querySelectorAll('#log :is(img, script, b)').length") == 0
    )
    page.browser.reload()
    page.browser.wait_for(CONNECTED)
    page.shows(*shown)
    page.browser.wait_for("document.activeElement.id === 'text'")
    reached = set()
    for _ in range(4):
        page.browser.press("Tab")
        reached.add(page.get("document.activeElement.id"))
    assert {"send", "scroller"} <= reached


@since("s05")
def test_a_restart_of_the_gateway_goes_unnoticed(page: Page):
    page.open()
    page.say("before")
    page.see("heard before")
    until(lambda: inbox_is_empty(page.desk.workspace))  # the page sees it before the disk has it
    began = page.get("performance.timeOrigin")
    page.desk.screens[-1].kill()
    page.browser.wait_for(f"!({CONNECTED})")
    page.say("while it is down")
    page.see("Not sent yet")
    page.desk.up(GATEWAY_PORT=str(page.desk.port))
    page.see("heard while it is down", 20)
    page.say("after")
    page.see("heard after")
    said = ["before", "while it is down", "after"]
    page.shows(*[text for one in said for text in (one, f"heard {one}")])
    assert page.desk.asked == said and page.get("performance.timeOrigin") == began
    page.desk.down()


@since("s05")
def test_who_has_a_wrong_token_is_asked_for_it(page: Page):
    page.browser.open(page.desk.link.partition("#")[0])
    page.browser.wait_for("document.activeElement.id === 'token'")
    page.say("wrong")
    page.see("token is probably wrong")
    assert not page.get("document.querySelector('#door').hidden")
    assert not page.get(CONNECTED)
    page.get("document.querySelector('#token').focus()")
    page.say(page.desk.link)
    page.browser.wait_for(CONNECTED)
    assert page.get("document.querySelector('#door').hidden")
    page.browser.wait_for("document.activeElement.id === 'text'")
    page.say("hello")
    page.see("heard hello")
    page.open(page.desk.link.partition("#")[0])
    page.see("heard hello")


@since("s05")
def test_two_tabs_and_a_client_see_the_same(page: Page):
    page.open()
    origin = page.desk.link.partition("#")[0]
    page.get(f"void (window.second = window.open({origin!r}))")
    other = "second.document"
    page.browser.wait_for(f"{other}.querySelector('#state')?.dataset.state === 'connected'")
    page.get("window.focus()")
    client: Client = page.desk.client()
    client.history(peer=page.peer)
    page.get(f"{other}.querySelector('#text').value = 'from the second tab'")
    page.get(f"{other}.querySelector('#composer').requestSubmit()")
    page.see("heard from the second tab")
    client.ask("from the client", peer=page.peer)
    page.see("heard from the client")
    shown = client.history(peer=page.peer)
    assert len(shown) == 4
    page.shows(*shown)
    page.shows(*shown, document=other)
    elsewhere = page.desk.client()
    elsewhere.ask("something else", peer="somebody")
    assert len(page.messages()) == 4
    page.get("second.close()")


@since("s05")
def test_on_a_phone_and_in_the_dark(page: Page):
    wide = "x" * 300 + " https://example.com/" + "y" * 300
    for dark in (False, True):
        page.browser.emulate(360, 640, mobile=True, dark=dark)
        page.open()
        page.say(wide)
        page.see(f"heard {'x' * 150}")
        sizes = page.get("[document.documentElement.scrollWidth, innerWidth]")
        assert sizes[0] <= sizes[1] == 360
        paper, ink = page.get(COLOURS)
        assert contrast(paper, ink) > 7 and (luminance(paper) < 0.1) == dark, (paper, ink)
        place = "document.querySelector('#send').getBoundingClientRect()"
        assert page.get(f"{place}.bottom <= innerHeight && {place}.right <= innerWidth")
        assert page.get("parseFloat(getComputedStyle(text).fontSize)") >= 16, "else iOS zooms in"


def luminance(colour: list[float]) -> float:
    """How bright a colour is, as WCAG 2 counts it."""
    parts = [value / 255 for value in colour]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: list[float], two: list[float]) -> float:
    dark, light = sorted(map(luminance, (one, two)))
    return (light + 0.05) / (dark + 0.05)
