"""The web chat (s05) in a real browser: what a person sees who opens the link."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from browser import Browser
from browser import find
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from harness import since

needs_chromium = pytest.mark.skipif(not find(), reason="needs Chromium")
# What no later section can change runs on the first one alone.
is_about_the_page = pytest.mark.costly
WEBCHAT = harness.REPO / "sessions" / "webchat"
LINK = re.compile(r"(http://127\.0\.0\.1:\d+/)#token=(\S+)")
CONNECTED = (  # and what was said before is loaded
    "document.querySelector('#connection').dataset.state === 'connected'"
    " && document.querySelector('#subtitle').textContent"
)
STOP = "document.querySelector('#stop').checkVisibility()"
IDLE = "!document.querySelector('.turn:not([data-state=done])')"
WORKING = "document.querySelector('.turn[data-state=running]')"

# The questions and answers in the log, in order.
LISTED = """[...%s.querySelectorAll(
  '#log :is(.question-text, .text, .note span, .command-result, .divider)'
)].map((element) => element.innerText.trim())"""

# The texts that are hard to read: each with its contrast, as WCAG 2 counts it.
FAINT = """(() => {
  const context = Object.assign(document.createElement('canvas'),
    {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const parts = colour.slice(0, 3).map((value) => value / 255).map(
      (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = (element) => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 ? colour : paper(element.parentElement);
  };
  const ratio = (element) => {
    const ink = luminance(rgba(getComputedStyle(element).color));
    const ground = luminance(paper(element));
    return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const faint = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const isSeen = texts.currentNode.data.trim() && element.checkVisibility()
      && !element.closest('.visually-hidden, template, :disabled');
    if (isSeen && ratio(element) < 4.5) {
      faint.push([texts.currentNode.data, ratio(element)]);
    }
  }
  return faint;
})()"""

LONG = "\n\n".join(f"Paragraph {number}, with some words." for number in range(60))
MARKDOWN = """# Title

Some **bold** words and a [link](https://example.com/page).

| a | b |
|---|---|
| 1 | 2 |

```python
print("one")
print("two")
```

The end."""
HOSTILE = """<script>window.hit = 1</script>
<img src=x onerror="window.hit = 2"><svg onload="window.hit = 3"></svg>
<iframe srcdoc="<script>parent.hit = 4</script>"></iframe>
<style>body { display: none }</style><p style="position: fixed">over all</p>

[click](javascript:window.hit=5) [data](data:text/html,x) [good](https://example.com)
![picture](https://example.com/picture.png) <form action=/x><button>go</button></form>
"""


class Desk:
    """A section at a terminal, its gateway, and a scripted model behind it."""

    def __init__(
        self, section: harness.Section, workspace: Path, model: FakeModel
    ) -> None:
        self.section = section
        self.workspace = workspace
        self.model = model
        self.gate = threading.Event()  # what a "wait" waits for
        self.screens: list[harness.Screen] = []
        self.origin = self.link = ""
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = str(server.getsockname()[1])
        model.script("brain", [self.answer_to], repeat=True)

    def answer_to(self, body: dict) -> Any:
        """Do what the last question says."""
        messages = body["messages"]
        questions = [m["content"] for m in messages if m["role"] == "user"]
        verb, _, rest = questions[-1].partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {questions[-1]}"), after_chunks=2)
        if verb == "fail":
            return Error(422)
        if verb == "drop":
            return Drop(2, then=Text(f"heard {questions[-1]}"))
        if verb == "stream":
            pieces = [LONG, "\n\nthen ", "more"]
            return Gate(self.gate, Text("", pieces=pieces), after_chunks=3)
        if verb == "markdown":
            return Text(MARKDOWN, pieces=re.findall(".{1,9}", MARKDOWN, re.DOTALL))
        if verb == "hostile":
            return Text(HOSTILE)
        if verb == "read" and messages[-1]["role"] == "user":
            return ToolCalls([("read_file", {"path": rest})], text="Let me look.")
        return Text(f"heard {questions[-1]}")

    def up(self) -> None:
        env = self.model.env("brain", GATEWAY_PORT=self.port)
        screen = harness.Screen(self.section, env)
        self.screens.append(screen)
        found = screen.wait_for(LINK, 20)
        self.link, self.origin = found[0], found[1]

    def kill(self) -> None:
        self.screens[-1].kill()

    def close(self) -> None:
        self.gate.set()
        for screen in self.screens:
            screen.close()


class Page:
    """The page, and a person before it."""

    def __init__(self, browser: Browser, desk: Desk) -> None:
        self.browser = browser
        self.desk = desk

    def open(self, link: str = "") -> None:
        self.browser.open("about:blank")  # a new #token alone would load nothing
        self.browser.open(link or self.desk.link)
        self.wait(CONNECTED)

    def say(self, text: str) -> None:
        """Type a message and press Enter."""
        self.browser.type(text)
        self.browser.press("Enter")

    def ask(self, text: str) -> None:
        """Say something, and wait until all is answered."""
        count = self.get("document.querySelectorAll('.turn').length")
        self.say(text)
        self.wait(f"document.querySelectorAll('.turn').length > {count}")
        self.wait(IDLE)

    def wait(self, condition: str, timeout: float = 10) -> None:
        self.browser.wait_for(condition, timeout)

    def get(self, js: str) -> Any:
        return self.browser.evaluate(js)

    def click(self, selector: str) -> None:
        self.get(f"document.querySelector({selector!r}).click()")

    def see(self, text: str, timeout: float = 10) -> None:
        self.wait(f"document.body.innerText.includes({json.dumps(text)})", timeout)

    def shows(self, *texts: str, document: str = "document") -> None:
        """Wait until the log has exactly these texts."""
        listed = f"JSON.stringify({LISTED % document})"
        wanted = json.dumps(texts, ensure_ascii=False, separators=(",", ":"))
        self.wait(f"{listed} === {json.dumps(wanted)}")

    def text_of(self, selector: str) -> str:
        return self.get(f"document.querySelector({selector!r}).textContent.trim()")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(
    browser: Browser, section: harness.Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Page]:
    """The page as a new visitor opens it. In the end, its console has no errors."""
    desk = Desk(section, workspace, fake_model)
    desk.up()
    before = len(browser.console)
    browser.emulate(1000, 800)
    page = Page(browser, desk)
    page.open()
    yield page
    browser.open("about:blank")
    errors = [line for line in browser.console[before:] if "network: " not in line]
    desk.close()
    assert not errors, "\n".join(errors)


@needs_chromium
@since("s05")
def test_a_conversation_by_keyboard_alone(page: Page):
    assert "token" not in page.get("location.href")
    page.wait("document.activeElement.id === 'text'")
    page.see("What can you do?")
    page.browser.type("two")
    page.browser.press("Enter", shift=True)
    composing = {"key": "Enter", "windowsVirtualKeyCode": 229}  # of an input method
    page.browser.call("Input.dispatchKeyEvent", type="rawKeyDown", **composing)
    page.ask("lines")
    page.shows("two\nlines", "heard two\nlines")
    assert page.get("document.querySelectorAll('time').length") == 2
    page.browser.press("Enter")
    page.browser.press("ArrowUp")
    page.ask(", again")
    said = ["two\nlines", "two\nlines, again"]
    page.shows(*[text for one in said for text in (one, f"heard {one}")])
    reached = []
    for _ in range(25):
        page.browser.press("Tab")
        reached.append(page.get("document.activeElement.id"))
    assert {"panel-open", "scroller", "text"} <= set(reached)
    page.browser.press("Escape")
    assert page.get("document.activeElement.id") == "text"


@needs_chromium
@since("s05")
@is_about_the_page
def test_markdown_and_its_copy_buttons(page: Page):
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.browser.call(
        "Browser.grantPermissions", permissions=permissions, origin=page.desk.origin
    )
    page.ask("markdown")
    assert page.text_of(".text h4") == "Title"
    assert page.text_of(".text table td") == "1"
    assert page.text_of(".code-head span") == "python"
    assert page.text_of(".text > :last-child") == "The end."
    page.click(".copy-code")
    page.see("Copied")
    code = 'print("one")\nprint("two")\n'
    assert page.get("await navigator.clipboard.readText()") == code
    page.click(".copy-answer")
    page.wait(f"navigator.clipboard.readText().then((text) => text !== {code!r})")
    assert page.get("await navigator.clipboard.readText()") == MARKDOWN
    link = "document.querySelector('.text a')"
    assert page.get(f"[{link}.target, {link}.rel]") == ["_blank", "noopener noreferrer"]


@needs_chromium
@since("s05")
def test_streaming_moves_nothing_that_is_read(page: Page):
    page.say("stream")
    page.see("then")
    page.wait("scroller.scrollTop > 500")
    page.get("window.first = document.querySelector('.text p')")
    page.get("scroller.scrollTop = 100")
    page.wait("!jump.hidden")
    assert page.text_of("#announcer") == "", "not each piece is announced"
    page.desk.gate.set()
    page.wait(IDLE)
    assert page.get("scroller.scrollTop") == 100
    assert page.get("first.isConnected && document.body.textContent.includes('more')")
    page.wait("announcer.textContent.endsWith('then more')")
    page.click("#jump")
    page.wait("jump.hidden && scroller.scrollTop > 500")
    assert page.get("document.activeElement.id") == "text"


@needs_chromium
@since("s05")
def test_tool_calls_are_folded_and_stay(page: Page):
    page.ask("read SOUL.md")
    soul = page.desk.model.chats[-1].messages[-1]["content"]
    for _ in range(2):  # as it came, and as the history has it
        page.shows("read SOUL.md", "Let me look.", "heard read SOUL.md")
        assert page.text_of(".tool-name") == "read_file"
        assert page.text_of(".tool-arguments") == '{"path": "SOUL.md"}'
        assert page.text_of(".tool-result") == soul.strip()
        assert page.text_of(".tool-state") == "done"
        assert not page.get("document.querySelector('.tool').open")
        page.browser.reload()
        page.wait(f"{CONNECTED} && document.querySelector('.answer-foot')")
    page.ask("read missing.txt")
    assert page.text_of(".turn:last-child .tool-state") == "failed"


@needs_chromium
@since("s05")
def test_an_error_is_no_answer(page: Page):
    page.ask("fail now")
    assert page.text_of(".note.is-error .note-label") == "Error"
    assert "HTTP 422" in page.text_of(".note.is-error span")
    assert not page.get("document.querySelector('.text')")
    page.click(".note .send-again")
    page.wait("document.querySelectorAll('.note.is-error').length === 2")


@needs_chromium
@since("s05", until="s08")  # from s09 on, it is tried again
def test_an_answer_that_breaks_off_is_an_error(page: Page):
    page.ask("drop this")
    assert page.text_of(".text") == "heard"
    assert page.text_of(".note.is-error .note-label") == "Error"


@needs_chromium
@since("s05")
def test_messages_wait_while_the_agent_works(page: Page):
    page.say("wait")
    page.see("main is working")
    page.say("second")
    page.say("third")
    page.wait("document.querySelectorAll('[data-state=waiting]').length === 2")
    page.shows("wait", "heard", "second", "third")
    page.wait("document.title.startsWith('Working')")
    page.browser.type("a draft")
    page.browser.reload()  # in the middle of the turn
    page.wait(f"{CONNECTED} && {WORKING}")
    page.shows("wait", "second", "third")
    assert page.get("text.value") == "a draft"
    page.desk.gate.set()
    answers = ["wait", "heard wait", "second", "heard second", "third", "heard third"]
    page.shows(*answers)
    page.wait(IDLE)
    assert page.get("document.title") == "main - web chat"


@needs_chromium
@since("s05")
def test_a_new_conversation_is_set_apart(page: Page):
    page.ask("before")
    page.ask("/new second try")
    page.wait("document.querySelector('.divider')")
    assert page.text_of(".divider") == "New conversation: second try"
    assert "second try" in page.text_of(".command-result")
    page.ask("after")
    page.see("before")
    page.browser.reload()
    page.shows("second try", "after", "heard after")


@needs_chromium
@since("s05")
@is_about_the_page
def test_commands_are_completed(page: Page):
    selected = "document.querySelector('[role=option][aria-selected=true]')"
    page.browser.type("/")
    page.wait("!completions.hidden")
    assert page.get(f"{selected}.dataset.name") == "/new"
    active = "text.getAttribute('aria-activedescendant')"
    assert page.get(f"{active} === {selected}.id")
    page.browser.press("ArrowDown")
    assert page.get(f"{selected}.dataset.name") == "/list"
    page.browser.press("Escape")
    assert page.get("completions.hidden && text.value === '/'")
    page.browser.type("ag")
    page.browser.press("Tab")
    assert page.get("text.value") == "/agents"
    page.browser.press("Enter")
    page.see("* main")
    page.browser.type("/ne")
    page.browser.press("Enter")
    assert page.get("text.value") == "/new "


@needs_chromium
@since("s05")
def test_a_binding_leads_this_chat_to_another_agent(page: Page):
    deciding = "document.querySelector('.is-deciding').textContent"
    page.wait("document.querySelector('#agents [data-key=luna]')")
    assert page.get(deciding) == "defaultmaindecides"
    page.ask("to main")
    page.click("#agents [data-key=luna]")
    page.wait("title.textContent === 'luna'")
    page.shows()
    assert page.get(deciding) == "peerlunadecides"
    page.ask("to luna")
    assert "You are Luna" in page.desk.model.chats[-1].messages[0]["content"]
    bindings = json.loads((page.desk.workspace / "bindings.json").read_text())
    assert [each["agent"] for each in bindings] == ["luna"]
    page.click("#unbind")
    page.shows("to main", "heard to main")
    page.wait("document.activeElement.textContent === 'Undo'")
    page.browser.press("Enter")
    page.shows("to luna", "heard to luna")
    form = "document.querySelector('#binding-form')"
    page.get(f"{form}.elements.channel.value = 'web'")
    page.get(f"{form}.elements.agent.value = 'sage'")
    page.get(f"{form}.requestSubmit()")
    page.wait("document.querySelectorAll('.binding').length === 2")
    page.wait("document.activeElement.textContent === 'Add a binding'")
    page.click("#bindings li:first-child button")  # the narrower one
    page.wait("title.textContent === 'sage'")
    assert page.get(deciding) == "channelsagedecides"


@needs_chromium
@since("s05")
def test_another_session_is_read_live(page: Page):
    page.ask("mine")
    page.click("#sessions [data-key='agent:main:main']")
    page.see("You are reading")
    page.shows()
    page.desk.screens[-1].type("at the terminal\n")
    page.shows("at the terminal", "heard at the terminal")
    assert not page.get("composer.checkVisibility()")
    page.browser.press("Escape")
    page.shows("mine", "heard mine")
    page.click("#sessions [data-key='agent:main:main']")
    page.shows("at the terminal", "heard at the terminal")
    page.click("#back")
    page.shows("mine", "heard mine")
    page.wait("document.activeElement.id === 'text'")


@needs_chromium
@since("s05")
def test_a_restart_loses_and_doubles_nothing(page: Page):
    page.ask("before")
    page.say("wait")
    page.shows("before", "heard before", "wait", "heard")
    began = page.get("performance.timeOrigin")
    page.desk.kill()
    page.see("The gateway is not reachable; trying again")
    page.say("while it is down")
    page.see("Not sent yet")
    page.desk.gate.set()
    page.desk.up()
    page.wait(CONNECTED, 20)
    said = ["before", "wait", "while it is down"]
    page.shows(*[text for one in said for text in (one, f"heard {one}")])
    page.wait("banner.hidden")
    page.ask("after")
    said.append("after")
    page.shows(*[text for one in said for text in (one, f"heard {one}")])
    assert page.get("performance.timeOrigin") == began


@needs_chromium
@since("s05")
def test_a_wrong_token_asks_for_the_link(page: Page):
    page.get("localStorage.setItem('token', 'wrong')")
    page.browser.reload()
    page.see("The gateway refuses this token")
    assert page.get("document.activeElement.id") == "token"
    page.say("wrong again")
    page.wait("document.querySelector('#token').value === ''")
    page.wait("document.activeElement.id === 'token'")
    page.say(page.desk.link)
    page.wait(CONNECTED)
    page.wait("document.activeElement.id === 'text'")
    page.ask("hello")
    page.open(page.desk.origin)  # the token is known from now on
    page.shows("hello", "heard hello")


@needs_chromium
@since("s05")
def test_two_tabs_show_the_same(page: Page):
    page.get(f"void (window.second = window.open({page.desk.origin!r}))")
    state = "second.document.querySelector('#connection')?.dataset.state"
    page.wait(f"{state} === 'connected'")
    page.get("second.document.querySelector('#text').value = 'from the second'")
    page.get("second.document.querySelector('#composer').requestSubmit()")
    page.shows("from the second", "heard from the second")
    page.get("void document.querySelector('#text').focus()")
    page.get("document.querySelector('#text').value = 'from the first'")
    page.get("document.querySelector('#composer').requestSubmit()")
    texts = ["from the second", "heard from the second"]
    texts += ["from the first", "heard from the first"]
    page.shows(*texts)
    page.shows(*texts, document="second.document")
    page.get("second.close()")


@needs_chromium
@since("s05")
@is_about_the_page
def test_the_title_counts_what_is_unread(page: Page):
    hidden = "Object.defineProperty(document, 'hidden', {get: () => window.isAway})"
    page.get(f"void (window.isAway = true, {hidden})")
    page.ask("one")
    page.ask("two")
    page.wait("document.title === '(2) main - web chat'")
    page.get("window.isAway = false")
    page.get("document.dispatchEvent(new Event('visibilitychange'))")
    assert page.get("document.title") == "main - web chat"


@needs_chromium
@since("s05")
@is_about_the_page
def test_a_message_that_is_too_long_stays_in_the_field(page: Page):
    page.get("text.value = 'long '.repeat(220_000)")
    page.browser.press("Enter")
    page.see("This is too long for one message")
    assert page.get("text.value.length") == 1_100_000
    page.get("text.value = ''")
    page.ask("short")
    page.shows("short", "heard short")


@needs_chromium
@since("s05")
@is_about_the_page
def test_on_a_phone_and_in_the_dark(page: Page):
    page.ask("markdown")
    page.ask("fail")
    page.ask("read SOUL.md")
    page.ask("x" * 300 + " https://example.com/" + "y" * 300)
    page.ask("/context")
    for width, dark in ((375, False), (375, True), (1280, True), (1280, False)):
        page.browser.emulate(width, 700, mobile=width < 500, dark=dark)
        page.wait(f"innerWidth === {width}")
        assert page.get("document.documentElement.scrollWidth") <= width
        assert page.get("scroller.scrollWidth <= scroller.clientWidth")
        assert page.get("send.getBoundingClientRect().bottom <= innerHeight")
        page.wait(
            "document.getAnimations().every((each) => each.playState !== 'running')"
        )
        assert page.get(FAINT) == []
        if width < 500:
            assert not page.get("panel.checkVisibility()")
            page.click("#panel-open")
            page.wait("panel.checkVisibility() && page.inert")
            assert page.get(FAINT) == []
            page.browser.press("Escape")
            assert not page.get("panel.checkVisibility()")
            assert page.get("document.activeElement.id") == "panel-open"
    size = "parseFloat(getComputedStyle(text).fontSize)"
    assert page.get(size) >= 16, "else iOS zooms in"


@needs_chromium
@since("s05")
@is_about_the_page
def test_hostile_texts_are_harmless(page: Page):
    page.ask("hostile")
    page.ask("<img src=x onerror='window.hit = 6'>")
    page.ask("/new <img src=x onerror='window.hit = 7'>")
    elements = "script, img, svg, iframe, style, form, [style], [onerror], [onload]"
    assert page.get(f"document.querySelectorAll('#log :is({elements})').length") == 0
    links = "[...document.querySelectorAll('#log a[href]')].map((each) => each.href)"
    assert page.get(links) == [
        "https://example.com/",
        "https://example.com/picture.png",
    ]
    assert page.get("window.hit") is None
    page.see("<script>window.hit = 1</script>")  # nothing of the text is lost
    page.see("over all")


@needs_chromium
@since("s05")
@is_about_the_page
def test_the_accessibility_tree(page: Page):
    page.ask("markdown")
    page.ask("read SOUL.md")
    heard = "main: Let me look.\\nheard read SOUL.md"  # and nothing of the tool
    page.wait(f"announcer.textContent === '{heard}'")
    page.browser.type("/")
    page.wait("!completions.hidden")
    nodes = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        if not node["ignored"]:
            role, name = node["role"]["value"], node.get("name", {}).get("value", "")
            named.setdefault(role, set()).add(name)
    for role in ("button", "link", "textbox", "option", "listbox", "log", "combobox"):
        assert "" not in named.get(role, set()), role
    assert named["log"] == {"Conversation"} and named["textbox"] >= {"Message"}
    assert named["complementary"] == {"Agents, sessions and bindings"}
    assert {"Send", "Copy code", "Copy answer"} <= named["button"]
    assert len(named["option"]) > 5 and {"main", "banner"} <= set(named)


@needs_chromium
@since("s05")
def test_the_stop_button(page: Page):
    # A command /stop comes with s10; until then the page is told of one.
    source = """
      const parse = JSON.parse;
      JSON.parse = (text) => {
        const frame = parse(text);
        if (frame?.result?.[0]?.usage) {
          frame.result.push({ usage: "/stop", about: "stop" });
        }
        return frame;
      };"""
    page.say("wait")
    page.wait(WORKING)
    if '@command("/stop' not in page.desk.section.source:
        assert not page.get(STOP)
        added = "Page.addScriptToEvaluateOnNewDocument"
        script = page.browser.call(added, source=source)["identifier"]
        page.browser.reload()
        page.wait(CONNECTED)
        removed = "Page.removeScriptToEvaluateOnNewDocument"
        page.browser.call(removed, identifier=script)
    page.wait(STOP)
    page.click("#stop")
    page.see("/stop")
    page.desk.gate.set()
    page.wait(IDLE)
    assert not page.get(STOP)


VENDORED = {
    "marked.js": "bb95d4c15f1289f78486eaacebf3bb18688475ed58a040ef762ed49337090542",
    "purify.js": "f69a46022ab1f53e969c8ebbca98172c8995785a9b3be72ea4a12d25b1a1bf67",
}


@pytest.mark.parametrize("name", VENDORED)
def test_libraries_are_unchanged_copies(name: str):
    file = WEBCHAT / name
    assert hashlib.sha256(file.read_bytes()).hexdigest() == VENDORED[name]
    assert file.with_suffix(".LICENSE.txt").is_file()
    assert re.search(r"v?\d+\.\d+\.\d+", file.read_text()[:300]), "states its version"
