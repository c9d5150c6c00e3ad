"""The terminal beside the channels (s04): its line, its turn and its end."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import harness
import pytest
from conversation import wait_until
from desk import PROMPT
from desk import Desk
from desk import lines_with
from desk import open_desk
from desk import say
from desk import wait_for_paper
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import since


@pytest.fixture
def desk(
    section: harness.Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Desk]:
    with open_desk(section, workspace, fake_model) as desk:
        yield desk


def gated(desk: Desk, text: str, after_chunks: int = 0) -> threading.Event:
    """Let the next answer wait for an event, which is returned."""
    gate = threading.Event()
    answer = Gate(gate, Text(text), after_chunks=after_chunks)
    desk.model.script("brain", [answer, desk.brain], repeat=True)
    return gate


def stored(desk: Desk, count: int) -> None:
    """Wait until so many messages are in the inbox."""
    wait_until(lambda: len(desk.inbox()) == count)


# --- the line that is being typed ---


BUSY = """
import os, sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
import harness
module = harness.load(Path({script!r}))
module.prepare_terminal()
terminal = module.TerminalChannel(None)

def talk():
    while True:
        terminal.send("", "news")

terminal.show_prompt()
threading.Thread(target=talk, daemon=True).start()
line = input("you> ")
terminal.leave_prompt()
print("read:", line, flush=True)
os._exit(0)
"""


@since("s04")
@pytest.mark.costly
def test_keys_and_news_at_the_same_moment(section: harness.Section, env: dict):
    """The line is looked at while readline changes it, thousands of times."""
    tests = str(harness.REPO / "tests")
    code = BUSY.format(tests=tests, script=str(section.path))
    with Screen([sys.executable, "-c", code], env) as screen:
        screen.wait_for("news")
        for _ in range(150):
            screen.type("héllo wörld " * 3)
            screen.press("ctrl-u")
            assert not screen.ended, screen.text[-500:]
        screen.type("still here\n")
        screen.wait_for("read: still here", 20)
        assert screen.wait_exit() == 0


@since("s04")
@pytest.mark.parametrize(
    "line",
    ["half-typed", "words " * 45 + "end", "x" * 95],
    ids=["short", "long", "full"],
)
def test_a_half_typed_line_is_kept(desk: Desk, line: str):
    """What others say is printed above it. `full` reaches the terminal's edge."""
    screen = desk.telegram_alone()
    wait_for_paper(screen, PROMPT)
    screen.type(line)
    wait_for_paper(screen, f"{PROMPT}{line}")
    for number in range(2):
        desk.ask_telegram(f"message {number}")
    wait_until(lambda: screen.text.count("heard message 1") == 1)
    wait_for_paper(screen, f"\n{PROMPT}{line}")
    for text in ("User 42: message", "to User 42: heard message"):
        for number in range(2):
            assert screen.text.count(f"[telegram] {text} {number}\n") == 1
    if len(line) < 50:  # of a longer one, the rows above the last stay where they were
        assert screen.paper.count(line) == 1, screen.paper
    screen.type(" and more\n")
    screen.wait_for(f"agent> heard {line} and more"[:200])
    wait_for_paper(screen, PROMPT)
    assert desk.asked[-1] == f"{line} and more"


@since("s04")
def test_a_line_is_kept_with_the_cursor_inside(desk: Desk):
    screen = desk.telegram_alone()
    wait_for_paper(screen, PROMPT)
    screen.type("the end")
    screen.press("home")
    screen.wait_for("the end")
    desk.ask_telegram("hello")
    screen.wait_for("heard hello")
    screen.type("this is ")
    screen.press("end")
    screen.type("!\n")
    screen.wait_for("heard this is the end!")
    wait_for_paper(screen, PROMPT)


@since("s04")
def test_others_do_not_break_into_an_answer(desk: Desk):
    words = "one two three four five six"
    gate = gated(desk, words, after_chunks=4)
    screen = desk.telegram_alone()
    screen.type("count\n")
    screen.wait_for("one two")
    desk.telegram.say("let me in", 666)
    desk.telegram.say("hello")
    stored(desk, 1)
    assert "666" not in screen.text
    gate.set()
    screen.wait_for("heard hello")
    wait_for_paper(screen, PROMPT)
    say(screen, "bye", "agent> heard bye")
    assert f"\nagent> {words}\n" in screen.paper
    assert lines_with(screen, "[telegram] 666", "is not in ALLOWED_CHATS")
    assert len(lines_with(screen, "[telegram] User 42: hello")) == 1
    assert not lines_with(screen, PROMPT, "[telegram")
    assert not lines_with(screen, "agent>", "[telegram")


@since("s04")
def test_a_question_of_bash_is_not_disturbed(desk: Desk):
    screen = desk.telegram_alone(APPROVAL="ask")
    screen.type("bash touch ran\n")
    screen.wait_for("? [y/N/a] ")
    desk.telegram.say("let me in", 666)
    desk.telegram.say("hello")
    stored(desk, 1)
    screen.type("y\n")
    screen.wait_for("heard bash")
    screen.wait_for("to User 42: heard hello")
    assert len(lines_with(screen, "run it", "? [y/N/a] y")) == 1
    assert (desk.workspace / "ran").exists()


@since("s04")
def test_an_empty_line_ends_nothing(desk: Desk):
    screen = desk.telegram_alone()
    screen.type("\n   \n\nhello\n")
    screen.wait_for("agent> heard hello")
    assert desk.asked == ["hello"]


# --- whose turn it is ---


@since("s04")
def test_the_terminal_is_next(desk: Desk):
    """It waits for the turn that is on, however many wait behind that one."""
    gate = gated(desk, "heard message 0")
    screen = desk.telegram_alone()
    for number in range(20):
        desk.telegram.say(f"message {number}")
    desk.model.wait(1)
    stored(desk, 20)
    screen.type("mine\n")
    screen.wait_for("agent> ")
    if desk.section.label < "s10":  # from then on it waits for nobody
        gate.set()
    screen.wait_for("heard mine")
    gate.set()
    assert desk.asked.index("mine") <= 2
    desk.wait_telegram(20)
    answers = [sent.text for sent in desk.telegram.sent_to(42)]
    assert answers == [f"heard message {number}" for number in range(20)]


@since("s04", until="s09")
def test_the_turn_goes_to_who_waits_for_it(section: harness.Section):
    """A thread that has just had its turn cannot get the next one before."""
    app = object.__new__(section.module.App)
    app.turn_lock, app.next_turn_lock = threading.Lock(), threading.Lock()
    turns, seen = 0, []

    def wait_for_a_turn() -> None:
        with app.exclusive(None):
            seen.append(turns)

    with app.exclusive(None):
        threading.Thread(target=wait_for_a_turn, daemon=True).start()
        wait_until(app.next_turn_lock.locked)
    while not seen:
        with app.exclusive(None):
            turns += 1
    assert seen == [0]


@since("s04")
def test_stopping_a_turn_of_ones_own(desk: Desk):
    gate = gated(desk, "the gate is open", after_chunks=3)
    screen = desk.telegram_alone()
    screen.type("count\n")
    desk.model.wait(1)
    screen.wait_for("agent> the")
    desk.telegram.say("hello")
    stored(desk, 1)
    screen.press("ctrl-c")
    screen.wait_for("[stopped]")
    desk.wait_telegram(1)
    assert desk.telegram.sent[0].text == "heard hello"
    say(screen, "go on", "agent> heard go on")
    gate.set()
    assert screen.text.count("[stopped]") == 1
    assert desk.histories()[-1] == ["go on"], "what was stopped is taken back"


@since("s04", until="s09")
@pytest.mark.parametrize("line", ["mine", "/context"])
def test_stopping_to_wait_for_the_turn_of_another(desk: Desk, line: str):
    gate = gated(desk, "at last")
    screen = desk.telegram_alone()
    desk.telegram.say("hello")
    desk.model.wait(1)
    wait_for_paper(screen, f"User 42: hello\n\n{PROMPT}")
    screen.type(f"{line}\n")
    wait_until(lambda: not screen.paper.rstrip().endswith(PROMPT.rstrip()))
    screen.press("ctrl-c")
    screen.wait_for("[stopped]")
    wait_for_paper(screen, PROMPT)
    gate.set()
    desk.wait_telegram(1)
    assert desk.telegram.sent[0].text == "at last"
    say(screen, "go on", "agent> heard go on")
    assert "mine" not in desk.asked


@since("s04")
def test_what_needs_no_turn_waits_for_none(desk: Desk):
    gate = gated(desk, "at last")
    screen = desk.telegram_alone()
    desk.telegram.say("hello")
    desk.model.wait(1)
    wait_for_paper(screen, f"User 42: hello\n\n{PROMPT}")
    screen.type("\n")
    for line, shown in (
        ("/nope", "no command /nope"),
        ("/channels", "terminal: on"),
        ("/help", "/channels "),
    ):
        say(screen, line, shown)
    assert not desk.telegram.sent
    gate.set()
    desk.wait_telegram(1)


# --- the end ---


def ends(screen: Screen, key: str) -> None:
    """A key at the prompt ends the program, soon and without a word."""
    wait_for_paper(screen, PROMPT)
    screen.press(key)
    began = time.monotonic()
    assert screen.wait_exit() == 0
    assert time.monotonic() - began < 5, screen.text


@since("s04")
@pytest.mark.parametrize("key", ["ctrl-c", "ctrl-d"])
def test_the_program_ends_while_it_polls_and_answers(desk: Desk, key: str):
    gate = gated(desk, "too late")
    desk.telegram.poll_cap = 25
    screen = desk.start(**desk.bot())
    desk.telegram.say("hello")
    desk.model.wait(1)
    screen.wait_for("User 42: hello")
    ends(screen, key)
    gate.set()


@since("s04")
@pytest.mark.parametrize("seconds", [0.3, 25])
def test_the_program_ends_while_it_sends(desk: Desk, seconds: float):
    """It gives an answer some time to arrive, and notes that it has."""
    screen = desk.telegram_alone()
    desk.telegram.hang("sendMessage", seconds)
    desk.telegram.say("hello")
    names = desk.telegram.calls
    desk.telegram.until(lambda: "sendMessage" in [name for name, _ in names])
    screen.wait_for("to User 42: heard hello")
    ends(screen, "ctrl-d")
    if seconds < 1:
        assert [message.text for message in desk.telegram.sent] == ["heard hello"]
        assert [row[-1] for row in desk.inbox()] == [True]


@since("s04")
@pytest.mark.parametrize("is_unreachable", [False, True], ids=["outage", "unreachable"])
def test_the_program_ends_while_a_platform_is_down(desk: Desk, is_unreachable: bool):
    screen = desk.telegram_alone()
    desk.telegram.down(port=is_unreachable)
    screen.wait_for("trying again")
    ends(screen, "ctrl-c")


@contextmanager
def piped(desk: Desk, folder: Path) -> Iterator[BinaryIO]:
    """A run over pipes whose input stays open. What it prints goes to files."""
    theirs, keys = os.pipe()
    with (
        open(theirs, "rb") as stdin,
        open(folder / "out", "wb") as out,
        open(folder / "err", "wb") as err,
    ):
        streams = [stream.fileno() for stream in (stdin, out, err)]
        argv = harness.argv_of(desk.section)
        env = desk.model.env("brain", **desk.bot())
        process = harness.start(argv, env, harness.REPO, streams)
    try:
        with open(keys, "wb", 0) as stream:
            yield stream
        assert process.wait(10) == 0
    finally:
        harness.end_session(process.pid)
    assert (folder / "err").read_text() == ""


@since("s04")
def test_piped_input(desk: Desk, tmp_path: Path):
    """Line after line is answered, others in between; the last needs no newline."""
    out = tmp_path / "out"
    with piped(desk, tmp_path) as stdin:
        assert desk.ask_telegram("hello") == "heard hello"
        stdin.write(b"first\nsecond\n")
        wait_until(lambda: "heard second" in out.read_text())
        assert desk.ask_telegram("bash touch ran").startswith("heard bash")
        stdin.write("字 third".encode())
    printed = out.read_text(encoding="utf-8")
    answers = re.findall(r"^(?:you> )?agent> (.*)$", printed, re.M)
    assert answers == ["heard first", "heard second", "heard 字 third"], printed
    assert "[telegram] User 42: hello" in printed
    assert "\x1b" not in printed
    assert not (desk.workspace / "ran").exists()


@since("s04")
def test_the_end_comes_at_any_moment(desk: Desk, tmp_path: Path):
    """Nothing is said on stderr, whatever the other threads were just doing."""
    for number in range(4):
        desk.telegram.say(f"message {number}")
        with piped(desk, tmp_path):
            # Not waiting for anything is the point: each round ends later.
            time.sleep(number * 0.1)
        assert "Traceback" not in (tmp_path / "out").read_text()


@since("s04")
def test_input_that_is_over_at_once(desk: Desk):
    """Also if an address is none, and a platform does not answer."""
    desk.telegram.down(port=True)
    for text, base_url in (("", desk.telegram.url), ("hello\n", "http://[::1")):
        env = desk.model.env("brain", **desk.bot(BASE_URL=base_url))
        done = harness.pipe(desk.section, text, env)
        assert (done.returncode, done.stderr) == (0, "")
    assert "heard hello" in done.stdout


def processes(mark: str) -> list[int]:
    """The processes that have a mark in their command line."""
    found = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            if mark.encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                found.append(int(number))
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")


@since("s04")
@needs_proc
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_kills_the_commands_that_run(desk: Desk, tmp_path: Path, name: str):
    """Those of the terminal's turn, and those of people on channels."""
    number = getattr(signal, name)
    screen = desk.telegram_alone(APPROVAL="always")
    for is_typed in (True, False):
        if not is_typed:
            screen = desk.telegram_alone(APPROVAL="always")
        mark = f"{tmp_path}-{is_typed}"
        sleep = f"sleep 600; : {mark}"
        # The sleep: the program has long taken note of the command when others begin.
        text = f"bash sleep 0.3; ({sleep}) & setsid bash -c '{sleep}'"
        if is_typed:
            screen.type(f"{text}\n")
        else:
            desk.telegram.say(text)
        wait_until(lambda mark=mark: len(processes(mark)) >= 3)
        os.kill(screen.pid, number)
        assert screen.wait_exit() == 128 + number
        wait_until(lambda mark=mark: not processes(mark))


def is_ignored(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16)
    return bool(mask & 1 << (number - 1))


@since("s04")
@needs_proc
def test_no_command_begins_while_the_program_ends(desk: Desk, tmp_path: Path):
    """A turn with two commands does not go on to the second one."""
    begun, go_on = tmp_path / "begun", tmp_path / "go-on"
    # A signal in the moment in which a thread starts a command may be lost, in Python:
    # that thread takes it, and the main thread goes on to wait for a key.
    first = f"sleep 0.3; echo 1 >> {begun}; until [ -e {go_on} ]; do sleep 0.02; done"
    second = f"echo 2 >> {begun}; sleep 600; : {tmp_path}"
    calls = [("bash", {"command": command}) for command in (first, second)]
    screen = desk.telegram_alone(APPROVAL="always")
    desk.telegram.hang("sendMessage", 25)  # so the end takes a while
    desk.telegram.say("hello", 43)
    screen.wait_for("heard hello")
    desk.model.script("brain", [ToolCalls(calls)], repeat=True)
    desk.telegram.say("two commands", 42)
    wait_until(begun.exists)
    os.kill(screen.pid, signal.SIGTERM)
    wait_until(lambda: is_ignored(screen.pid, signal.SIGTERM))
    go_on.touch()
    assert screen.wait_exit() == 128 + signal.SIGTERM
    try:
        assert begun.read_text() == "1\n"
        wait_until(lambda: not processes(str(tmp_path)), 3)
    finally:
        for pid in processes(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)


@since("s04")
@needs_proc
def test_a_second_signal_changes_nothing(desk: Desk, tmp_path: Path):
    """A closed window often sends two: the shell passes on what it has got itself."""
    mark = str(tmp_path)
    screen = desk.telegram_alone(APPROVAL="always")
    desk.telegram.hang("sendMessage", 25)
    desk.telegram.say("hello", 43)
    screen.wait_for("to User 43: heard hello")
    desk.telegram.say(f"bash sleep 600; : {mark}")
    wait_until(lambda: processes(mark))
    os.kill(screen.pid, signal.SIGHUP)
    try:
        while screen.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(screen.pid, signal.SIGHUP)
            time.sleep(0.05)
        assert screen.wait_exit() == 128 + signal.SIGHUP
        wait_until(lambda: not processes(mark), 3)
    finally:
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)
