"""The terminal beside the channels (s04): its line, its turn and its end are its own."""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import harness
import pytest
from fake_model import Gate
from fake_model import Text
from harness import Screen
from harness import since

from first import test_telegram
from first.test_telegram import PROMPT
from first.test_telegram import Post
from first.test_telegram import brain
from first.test_telegram import drawn
from first.test_telegram import lines_with

post, telegram = test_telegram.post, test_telegram.telegram  # fixtures


def leaves(screen: Screen, seconds: float = 2) -> None:
    """Ctrl-C at the prompt ends the program."""
    screen.press("ctrl-c")
    began = time.monotonic()
    assert screen.wait_exit() == 0
    assert time.monotonic() - began < seconds, screen.text


# --- the line that is being typed ---


BUSY = """
import readline, sys, threading
sys.path.insert(0, {tests!r})
import harness
module = harness.load(harness.Path({script!r}))
cli = module.CLIChannel(None, module.ChannelAccount("cli"))

def talk():
    while True:
        cli.send("", "news")

threading.Thread(target=talk, daemon=True).start()
print("read:", cli.read(), flush=True)
harness.os._exit(0)  # the thread goes on to talk
"""


@since("s04")
def test_keys_and_news_at_the_same_moment(section: harness.Section, env: dict[str, str]):
    """The line is looked at while readline changes it, thousands of times."""
    tests = str(harness.REPO / "tests")
    code = BUSY.format(tests=tests, script=str(section.path))
    with Screen([sys.executable, "-c", code], env) as screen:
        screen.wait_for("news")
        latest = time.monotonic() + 3
        while time.monotonic() < latest and not screen.ended:
            screen.type("héllo wörld " * 3)
            screen.press("ctrl-u")
        screen.type("still here\n")
        screen.wait_for("read: still here", 20)
        assert screen.wait_exit() == 0


@since("s04")
@pytest.mark.parametrize(
    "line",
    ["half-typed", "words " * 45 + "end", "x" * 95, "一句很长的话，" * 9, "字" * 60],
    ids=["short", "long", "full", "wide", "long-wide"],
)
def test_a_half_typed_line_is_kept(post: Post, line: str):
    """What comes in is printed above it; `full` reaches exactly to the terminal's edge."""
    with post.screen() as screen:
        drawn(screen, f"on, as @tutor_bot\n{PROMPT}")  # else it may come between two keys
        screen.type(line)
        screen.wait_for(line[-1])  # readline itself leaves a gap where a wide letter does not fit
        for number in range(3):
            post.ask(f"message {number}")
        drawn(screen, f"heard message 2\n{PROMPT}{line}")
        assert screen.paper.count(line) == 1, screen.paper
        shown = re.findall(r"^\[telegram.*message \d$", screen.paper, re.M)
        assert len(shown) == 6, screen.paper
        screen.type(" and more\n")
        drawn(screen, f"agent> heard {line} and more\n\n{PROMPT}")
    assert post.questions[-1] == f"{line} and more"


@since("s04")
def test_a_line_is_kept_with_the_cursor_inside(post: Post):
    with post.screen() as screen:
        screen.type("the end")
        screen.press("home")
        screen.wait_for("the end")
        post.ask("hello")
        screen.wait_for("heard hello")
        screen.type("this is ")
        screen.press("end")
        screen.type("!\n")
        screen.wait_for("heard this is the end!")
        screen.wait_for(PROMPT)


@since("s04")
def test_others_do_not_break_into_an_answer(post: Post):
    gate, words = threading.Event(), "one two three four five six"
    post.model.script("brain", [Gate(gate, Text(words), after_chunks=4), brain], repeat=True)
    with post.screen() as screen:
        screen.type("count\n")
        screen.wait_for("one two")
        post.telegram.say("hello")
        post.telegram.say("let me in", 666)
        post.confirmed()
        time.sleep(0.1)
        gate.set()
        screen.wait_for("666")
        screen.wait_for(PROMPT)
        if "heard hello" not in screen.text:  # from s10 on it is answered in the meantime
            screen.wait_for("heard hello")
        drawn(screen, PROMPT)
        post.turn(screen, "bye")
    assert f"\nagent> {words}\n" in screen.paper
    before_prompt = screen.paper.split(words)[1].split(PROMPT)[0]
    assert "User 42: hello" in before_prompt and "666" in before_prompt
    assert not lines_with(screen.paper, PROMPT, "[telegram")


@since("s04")
def test_a_question_of_bash_is_not_disturbed(post: Post):
    with post.screen(APPROVAL="ask") as screen:
        screen.type("bash it\n")
        screen.wait_for("run it? [y/N/a] ")
        post.telegram.say("hello")
        post.telegram.say("let me in", 666)
        post.confirmed()
        time.sleep(0.1)
        screen.type("y\n")
        screen.wait_for("heard bash it")
        screen.wait_for("heard hello")
    assert len(lines_with(screen.paper, "run it? [y/N/a] y")) == 1
    assert (post.workspace / "ran.txt").exists()


@since("s04")
def test_an_empty_line_and_the_lists(post: Post):
    work = {"TELEGRAM_BOT_TOKEN_WORK": "77:other-secret"}
    with post.screen(TELEGRAM_BASE_URL_WORK=post.telegram.url, **work) as screen:
        screen.wait_for("on, as @tutor_bot")
        for line, told in (
            ("", PROMPT),
            ("/channels", r"^cli default: on\n(.*\n)*telegram default: on, as @tutor_bot$"),
            ("/accounts", r"^telegram default\b.*42.*-300\ntelegram work"),
            ("/help", r"^/channels +\w(.*\n)+/accounts +\w"),
        ):
            screen.type(f"{line}\n")
            screen.wait_for(re.compile(told, re.M))
            screen.wait_for(PROMPT)
        assert "telegram work" in screen.text
    assert "other-secret" not in screen.raw and post.questions == []


# --- whose turn it is ---


@since("s04")
def test_the_terminal_is_next(post: Post):
    """It waits for the turn that is on, however many wait behind that one."""
    gate = threading.Event()
    post.model.script("brain", [Gate(gate, Text("heard message 0")), brain], repeat=True)
    with post.screen() as screen:
        for number in range(50):
            post.telegram.say(f"message {number}")
        post.model.wait(1)
        post.confirmed()
        screen.type("mine\n")
        screen.wait_for("agent> ")
        if post.section.label < "s10":  # from then on it waits for nobody
            gate.set()
        screen.wait_for("heard mine")
        gate.set()
        assert post.questions.index("mine") <= 1, post.questions
        post.wait(50)
    assert post.told(42) == [f"heard message {number}" for number in range(50)]


@since("s04")
def test_stopping_a_turn_of_ones_own(post: Post):
    gate = threading.Event()
    post.model.script("brain", [Gate(gate, after_chunks=2), brain], repeat=True)
    with post.screen() as screen:
        screen.type("count\n")
        post.model.wait(1)
        screen.wait_for("agent> the")
        post.telegram.say("hello")
        screen.press("ctrl-c")
        screen.wait_for("[stopped]")
        screen.wait_for(PROMPT)
        assert post.wait(1)[0].text == "heard hello"
        post.turn(screen, "go on")
    gate.set()
    assert screen.text.count("[stopped]") == 1


@since("s04", until="s09")
@pytest.mark.parametrize("line", ["mine", "/context"])
def test_stopping_to_wait_for_the_turn_of_another(post: Post, line: str):
    gate = threading.Event()
    post.model.script("brain", [Gate(gate, Text("at last")), brain], repeat=True)
    with post.screen() as screen:
        drawn(screen, f"on, as @tutor_bot\n{PROMPT}")
        post.telegram.say("hello")
        post.model.wait(1)
        drawn(screen, f"hello\n{PROMPT}")
        screen.type(f"{line}\n")
        time.sleep(0.2)
        screen.press("ctrl-c")
        drawn(screen, PROMPT)
        gate.set()
        assert post.wait(1)[0].text == "at last"
        post.turn(screen, "go on")
    assert "mine" not in post.questions


@since("s04")
def test_what_needs_no_turn_waits_for_none(post: Post):
    gate = threading.Event()
    post.model.script("brain", [Gate(gate, Text("at last"))])
    with post.screen() as screen:
        drawn(screen, f"on, as @tutor_bot\n{PROMPT}")
        post.telegram.say("hello")
        post.model.wait(1)
        drawn(screen, f"hello\n{PROMPT}")
        screen.type("\n/nope\n")
        screen.wait_for("no command", 3)
        gate.set()
        post.wait(1)


# --- the end ---


@since("s04")
@pytest.mark.parametrize("while_", ["polls", "turn", "sends", "outage", "unreachable"])
def test_ctrl_c_ends_the_program(post: Post, while_: str):
    gate = threading.Event()
    post.model.script("brain", [Gate(gate, Text("too late")) if while_ == "turn" else brain])
    post.telegram.poll_cap = 25
    with post.screen() as screen:
        if while_ == "turn":
            post.telegram.say("hello")
            post.model.wait(1)
        elif while_ == "sends":
            post.telegram.hang("sendMessage", 25)
            post.telegram.say("hello")
            post.telegram.until(lambda: post.called("sendMessage"))
        elif while_ != "polls":
            post.telegram.down(port=while_ == "unreachable")
            screen.wait_for("no contact")
        drawn(screen, PROMPT)
        leaves(screen)
    gate.set()


@contextmanager
def piped(post: Post, folder: Path) -> Iterator[BinaryIO]:
    """A run over pipes whose input stays open; what it prints and says on stderr goes to files."""
    theirs, keys = os.pipe()
    with (
        open(theirs, "rb") as stdin,
        open(folder / "out", "wb") as out,
        open(folder / "err", "wb") as err,
    ):
        streams = [stream.fileno() for stream in (stdin, out, err)]
        argv = harness.argv_of(post.section)
        process = harness.start(argv, post.env(), harness.REPO, streams)
    try:
        with open(keys, "wb", 0) as stream:
            yield stream
        assert process.wait(5) == 0
    finally:
        harness.end_session(process.pid)
    assert (folder / "err").read_text() == ""
    post.check((folder / "out").read_text())


@since("s04")
def test_piped_input(post: Post, tmp_path: Path):
    out = tmp_path / "out"
    with piped(post, tmp_path) as stdin:
        post.ask("hello")
        stdin.write(b"first\nsecond\n")
        post.model.wait(3)
        post.ask("bash")
        post.ask("bye")
        stdin.write("字 third".encode())
    printed = out.read_text(encoding="utf-8")
    answers = re.findall(r"^(?:you> )?agent> (.*)$", printed, re.M)
    assert answers == ["heard first", "heard second", "heard 字 third"], printed
    assert "[telegram default] User 42: hello" in printed and "\x1b" not in printed
    assert not (post.workspace / "ran.txt").exists()


@since("s04")
def test_the_end_comes_at_any_moment(post: Post, tmp_path: Path):
    """Nothing is said on stderr, whatever the other threads were just doing."""
    for number in range(8):
        post.telegram.say(f"message {number}")
        with piped(post, tmp_path):
            time.sleep(number * 0.07)


@since("s04")
def test_the_end_of_a_run_that_has_not_begun(post: Post):
    """Input that is over at once, and an address that does not answer."""
    post.telegram.down(port=True)
    done = harness.pipe(post.section, "", post.env())
    assert (done.returncode, done.stderr) == (0, "")
    done = harness.pipe(post.section, "hello\n", post.env(TELEGRAM_BASE_URL="http://[::1"))
    assert (done.returncode, done.stderr) == (0, "") and "heard hello" in done.stdout
    post.check(done.stdout)
