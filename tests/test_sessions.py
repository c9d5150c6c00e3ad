"""Sessions and the context guard (s03): nothing said is lost, or grows too long."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import corpora
import harness
import pytest
from fake_model import Chunks
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_model import check_request
from harness import since

PROMPT = "you> "
BAR = re.compile(r"\[[#.]+\] ([\d,]+) of ([\d,]+) tokens, messages: (\d+)")
KEY = "agent:main:main"
BIG_TEXT = "some words " * 2500


class Desk:
    """A section, a workspace, and a scripted model on the other side."""

    def __init__(self, section: harness.Section, workspace: Path, server: FakeModel):
        self.section = section
        self.workspace = workspace
        self.server = server
        server.script("brain", [brain], repeat=True)

    def run(self, *lines: str, status: int = 0, fsize: int | None = None, **env) -> str:
        """One run over pipes, ended by quit; what it printed, errors last."""
        settings = self.server.env("brain", APPROVAL="always") | env
        text = "".join(f"{line}\n" for line in (*lines, "quit"))
        done = harness.pipe(self.section, text, settings, fsize=fsize, timeout=60)
        printed = done.stdout + done.stderr
        assert "Traceback" not in printed, printed
        assert done.returncode == status, printed
        return printed

    def refusal(self, fsize: int | None = None, **env: str) -> str:
        """The one line that a start ends with which cannot succeed."""
        printed = self.run(status=1, fsize=fsize, **env)
        assert PROMPT not in printed
        *title, line = printed.strip().splitlines()
        assert len(title) in (0, 2), printed
        return line

    def screen(self, fsize: int | None = None, **env: str) -> harness.Screen:
        settings = self.server.env("brain", APPROVAL="always") | env
        return harness.Screen(self.section, settings, fsize=fsize)

    @property
    def files(self) -> list[Path]:
        """The session files, newest last."""
        found = (self.workspace / ".sessions").rglob("*.jsonl")
        return sorted(found, key=lambda file: file.stat().st_mtime_ns)

    @property
    def file(self) -> Path:
        (file,) = self.files
        return file

    @property
    def index(self) -> Path:
        (file,) = (self.workspace / ".sessions").rglob("sessions.json")
        return file

    def sent(self, number: int = -1) -> list[dict]:
        """The messages of a request, without a system prompt."""
        messages = self.server.chats[number].messages
        return [each for each in messages if each["role"] != "system"]

    def remembered(self, *lines: str, **env: str) -> list[str]:
        """What a new run sends before the question `probe`: all content, in order."""
        self.run(*lines, "probe", **env)
        return contents(self.sent()[:-1])

    def records(self, file: Path | None = None) -> list[dict]:
        lines = (file or self.file).read_bytes().splitlines()
        return [json.loads(line) for line in lines]

    def windows(self, file: Path | None = None) -> list[int]:
        """The windows that a session has recorded."""
        records = self.records(file)
        return [each["tokens"] for each in records if each["type"] == "window"]

    def rewrites(self, file: Path | None = None) -> list[str]:
        """Why a session was rewritten, each time."""
        records = self.records(file)
        return [each["why"] for each in records if each["type"] == "compaction"]


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Desk:
    return Desk(section, workspace, fake_model)


def brain(body: dict) -> object:
    """Does what the last user message says; `probe` fails, and so leaves no trace."""
    messages = body["messages"]
    questions = [each["content"] for each in messages if each["role"] == "user"]
    verb, _, rest = questions[-1].partition(" ")
    if verb == "hangtool":
        verb, rest = "tools", "sleep 30"
    if verb in ("probe", "fail"):
        return Error(422)
    if "tools" not in body:
        return Text("the summary")
    if messages[-1]["role"] == "tool":
        return Error(422) if verb == "toolfail" else Text(f"done {rest}")
    if verb in ("tools", "toolfail"):
        write = ("write_file", {"path": "made.txt", "content": rest or "x"})
        command = ("bash", {"command": rest or "echo ran"})
        return ToolCalls([command, write], text="let me")
    if verb == "read":
        return ToolCalls([("read_file", {"path": rest})])
    if verb == "hang":
        return Stall(2, 20, Text("never seen to its end"))
    return Text(f"heard {rest}")


def contents(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages]


def say(screen: harness.Screen, text: str, timeout: float = 15) -> str:
    """One turn at the terminal: what came between the line and the next prompt."""
    start = len(screen.text)
    screen.type(text + "\n")
    screen.wait_for(text[:60])
    screen.wait_for(PROMPT, timeout)
    return screen.text[start:]


def leave(screen: harness.Screen) -> None:
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0


def ids(printed: str) -> list[str]:
    """The sessions that a run told of, in order."""
    return re.findall(r"^(?:you> )?session (\w+)", printed, re.M)


def bars(printed: str) -> list[int]:
    """The tokens in use, each time /context told them."""
    return [int(used.replace(",", "")) for used, *_ in BAR.findall(printed)]


def windows(printed: str) -> list[int]:
    """The model's window, each time /context told it."""
    return [int(window.replace(",", "")) for _, window, _ in BAR.findall(printed)]


def one_line(printed: str, *parts: str) -> str:
    """The one line that says all of these."""
    lines = printed.splitlines()
    lines = [line for line in lines if all(part in line for part in parts)]
    assert len(lines) == 1, (parts, printed)
    return lines[0]


def next_is_accepted(module, session) -> None:
    """The strictest server would take the next question."""
    messages = module.repair_history(list(session))
    assert messages == list(session), "what is wrong was repaired when it was opened"
    # A request leaves out what only the log keeps, such as the id of a message.
    messages = [
        {name: message[name] for name in message if name != "extras"}
        for message in messages
    ]
    if messages and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": "x"})
    check_request({"messages": [*messages, {"role": "user", "content": "next"}]})


# --- commands, and which session is resumed ---


@since("s03")
def test_restart_resumes_the_latest_session(section, offline):
    first = harness.pipe(section, "my name is Ada\nquit\n", offline.env)
    assert first.returncode == 0, first.stderr
    with harness.Screen(section, offline.env) as screen:
        screen.wait_for(PROMPT)
        screen.type("what is my name?\n")
        screen.wait_for("Your name is Ada.")
        screen.wait_for(PROMPT)
        leave(screen)


@since("s03")
def test_new_list_and_switch(desk: Desk):
    printed = desk.run(
        "say one", "/new with a label", "say two", "/list", "/new", "/list"
    )
    first, second, third = ids(printed)
    assert len({first, second, third}) == 3
    one, two = printed.split("/list")[-2:]
    assert re.search(rf"^(?:you> )?\* {second} .* with a label$", one, re.M), one
    assert re.search(rf"^  {first} ", one, re.M) and one.count("*") == 1
    assert re.search(rf"^(?:you> )?\* {third} ", two, re.M) and two.count("*") == 1
    assert desk.remembered() == []
    assert desk.remembered(f"/switch {second[:8]}") == ["say two", "heard two"]
    assert desk.remembered() == ["say two", "heard two"], "what was left is resumed"
    again = desk.remembered(f"/switch {first}", f"/switch {first}")
    assert again == ["say one", "heard one"]


@since("s03")
def test_switch_needs_exactly_one_session(desk: Desk):
    desk.run("say one")
    for number in range(3):
        shutil.copy(desk.files[-1], desk.files[-1].with_name(f"{number:012x}.jsonl"))
    tries = ["zz", "000", "", "*", "../", "[0-9]", "\\", "0" * 100_000, "\ud83d"]
    printed = desk.run(*(f"/switch {each}" for each in tries))
    refused = re.findall(r"\[sessions that begin so: \d+\. See /list\]", printed)
    assert len(refused) == len(tries), printed[:3000]
    assert len(ids(printed)) == 1
    assert desk.remembered() == ["say one", "heard one"]


@since("s03")
def test_switch_to_a_deleted_session_changes_nothing(desk: Desk):
    first, _ = ids(desk.run("say one", "/new", "say two"))
    (gone,) = [file for file in desk.files if file.stem == first]
    gone.unlink()
    printed = desk.run(f"/switch {first}", "say three")
    assert one_line(printed, "sessions that begin so: 0")
    answers = ["say two", "heard two", "say three", "heard three"]
    assert desk.remembered() == answers
    assert not gone.exists()


@since("s03")
def test_a_session_file_removed_while_in_use(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        say(screen, "say one")
        desk.file.unlink()
        assert "Traceback" not in say(screen, "/list")
        told = one_line(say(screen, "say two"), "removed while in use")
        assert "/new" in told
        assert "heard two" not in screen.text
        assert not desk.files, "it is not begun again without its beginning"
        assert ids(say(screen, "/new").replace("\r", ""))
        assert "heard three" in say(screen, "say three")
    desk.file.unlink()
    assert desk.remembered("say four") == ["say four", "heard four"]


@since("s03")
def test_help_lists_every_command(desk: Desk):
    printed = desk.run("/help")
    table = printed[printed.index("you> ") :]
    usages = ["/new [label]", "/list", "/switch <id>", "/context", "/compact", "/help"]
    commands = desk.section.module.COMMANDS.values()
    assert [command.usage for command in commands][: len(usages)] == usages
    columns = set()
    for usage in [command.usage for command in commands]:
        line = re.search(rf"^(?:you> )?{re.escape(usage)} +(?=\w)", table, re.M)
        assert line, usage
        columns.add(len(line[0].removeprefix("you> ")))
    assert len(columns) == 1, "the columns are straight"
    for command in commands:
        assert command.about in printed
    if desk.section.label == "s03":
        assert len(commands) == len(usages)


@since("s03")
def test_unknown_command_says_so_and_is_not_sent(desk: Desk):
    printed = desk.run("/nope", "/really nope", "/", "/context")
    for name in ("/nope", "/really", "/"):
        assert len(re.findall(rf"no command {name}: see /help", printed)) == 1
    assert not desk.server.chats
    desk.run(" /nope")
    assert contents(desk.sent()) == [" /nope"]


@since("s03")
def test_an_error_in_a_command_is_one_line(desk: Desk):
    refusal = Error(422, body=corpora.bare("out of order"))
    odd = Json200({"choices": 5})
    desk.server.script("brain", [brain, brain, refusal, odd, brain])
    printed = desk.run("say one", "say more", "/compact", "/compact", "say two")
    assert one_line(printed, "[", "out of order")
    said = ["say one", "heard one", "say more", "heard more", "say two"]
    assert contents(desk.sent()) == said


@since("s03")
def test_context_shows_a_bar_and_numbers(desk: Desk):
    desk.server.script(
        "brain", [Text("x", usage=usage(900)), Text("y", usage=usage(950))]
    )
    lines = ["/context", "hi", "/context", "hi", "/context"]
    printed = desk.run(*lines, CONTEXT_TOKENS="4096")
    first, second, third = bars(printed)
    assert 0 < first < 900 < second < 950, "as the server counted it, and the answer"
    assert 950 < third < 1000
    assert f"[####................] {second} of 4,096 tokens, messages: 2" in printed
    assert windows(printed) == [4096] * 3


# --- the index ---

DAMAGED_INDEX = [
    None,
    b"",
    b"{",
    b'{"agent:main:main": {"id": "',
    b"\x00" * 200,
    b"\xff\xfe{}",
    b"[1, 2]",
    b"null",
    b"[" * 100_000,
    b'{"agent:main:main": 3}',
    b'{"agent:main:main": {"id": null}}',
    b'{"agent:main:main": "../../../../SOUL"}',
    b'{"agent:main:main": "gone"}',
]


@since("s03")
def test_sessions_are_found_again_without_their_index(desk: Desk):
    desk.run("say zero", "/new my label", "say one")
    index = desk.index
    for damage in DAMAGED_INDEX:
        index.unlink(missing_ok=True)
        if damage is not None:
            index.write_bytes(damage)
        assert desk.remembered("/list") == ["say one", "heard one"], damage
    assert "my label" in one_line(desk.run("/list"), "* ")
    assert len(desk.files) == 2


@since("s03")
def test_the_index_is_replaced_whole_and_only_when_it_changes(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        before = desk.index.stat()
        say(screen, "say one")
        say(screen, "tools")
        after = desk.index.stat()
        assert after.st_mtime_ns == before.st_mtime_ns
        assert after.st_ino == before.st_ino
        index, seen, stop = desk.index, set(), threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.add(index.read_bytes())

        reader = threading.Thread(target=look)
        reader.start()
        for number in range(500):  # until the reader has seen it change
            say(screen, f"/new label {number}")
            if number > 20 and len(seen) > 3:
                break
        stop.set()
        reader.join(5)
        assert len(seen) > 3 and all(json.loads(text) for text in seen)
    names = {path.name for path in desk.index.parent.iterdir()}
    assert names == {"sessions.json", "sessions"}


# --- crashes ---


def slowly(body: dict) -> object:
    """Two tools at once, then an answer; both arrive in small steps."""
    questions = [m["content"] for m in body["messages"] if m["role"] == "user"]
    item = Text(f"answer to {questions[-1]}")
    if body["messages"][-1]["role"] == "user":
        write = ("write_file", {"path": "made.txt", "content": questions[-1]})
        command = ("bash", {"command": "sleep 0.02; echo ran"})
        item = ToolCalls([command, write], text="let me")
    for after in range(1, 5):
        item = Stall(after, 0.008, item)
    return item


def talk_until_killed(screen: harness.Screen, number: int, seconds: float) -> list[str]:
    """Ask up to three questions, then kill -9. Returns the questions answered."""
    answered = []
    screen.wait_for(PROMPT)
    deadline = time.monotonic() + seconds
    for question in (f"q{number}.{turn}" for turn in range(3)):
        screen.type(question + "\n")
        done = re.compile(rf"answer to {question}\s+{PROMPT}")
        try:
            screen.wait_for(done, max(deadline - time.monotonic(), 0))
        except AssertionError:
            assert not screen.ended, screen.text
            break
        answered.append(question)
    screen.kill()
    return answered


@since("s03")
@pytest.mark.costly
def test_killed_at_any_moment_50_times(desk: Desk):
    """kill -9 between any two steps: nothing that was answered is lost."""
    chance = random.Random(7)
    answered = []
    desk.server.script("brain", [slowly], repeat=True)
    for number in range(50):
        with desk.screen() as screen:
            if number % 10 == 9:  # while it starts
                time.sleep(chance.uniform(0, 0.1))
                screen.kill()
            else:
                answered += talk_until_killed(screen, number, chance.uniform(0, 0.45))
    desk.run("last")
    # A request that the kill cut off before its body is no request of ours.
    problems = desk.server.problems
    problems[:] = [each for each in problems if "messages is not a list" not in each]
    history = desk.sent()
    questions = [number for number, m in enumerate(history) if m["role"] == "user"]
    places = []
    for question in answered:
        (place,) = [n for n in questions if history[n]["content"] == question]
        turn = history[place + 1 : place + 5]
        roles = [message["role"] for message in turn]
        assert roles == ["assistant", "tool", "tool", "assistant"], question
        assert len(turn[0]["tool_calls"]) == 2 and "ran" in turn[1]["content"]
        assert turn[3]["content"] == f"answer to {question}"
        places.append(place)
    assert places == sorted(places) and len(places) >= 10
    assert "interrupted" in json.dumps(history), "no kill hit a tool: slow them down"


@since("s03")
def test_a_killed_turn_says_which_tools_were_interrupted(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        screen.type("hangtool\n")
        screen.wait_for("sleep 30")
        screen.kill()
    desk.run("say next")
    roles = [message["role"] for message in desk.sent()]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    for result in contents(desk.sent())[2:4]:
        assert result.startswith("interrupted")
    size = desk.file.stat().st_size
    desk.run("/context")
    assert desk.file.stat().st_size == size, "mended once, and written down"


def sample(desk: Desk) -> list[bytes]:
    """The lines of a session that has one of each record."""
    desk.server.script("brain", [overflowing(TOO_BIG)], repeat=True)
    desk.run("say one", "tools", "fail", "say now", "/compact", "say three", "tools")
    desk.run("say four")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    kinds = {json.loads(line)["type"] for line in lines}
    assert kinds == {"session", "message", "retraction", "compaction", "window"}
    return lines


@since("s03")
@pytest.mark.costly
def test_torn_at_any_byte(desk: Desk, tmp_path: Path, capsys):
    """The record that was not whole is set aside, all before it is there."""
    lines, module = sample(desk), desk.section.module
    number = 0
    for end in range(1, len(lines) + 1):
        whole, last = b"".join(lines[: end - 1]), lines[end - 1]
        (tmp_path / f"whole{end}.jsonl").write_bytes(whole)
        expected = module.Session(tmp_path / f"whole{end}.jsonl")
        for cut in range(1, len(last), 1 if end % 6 == 0 else 23):
            number += 1
            path = tmp_path / f"cut{number}.jsonl"
            path.write_bytes(whole + last[:cut])
            session = module.Session(path)
            assert list(session) == list(expected), (end, cut)
            assert session.windows == expected.windows
            assert path.with_suffix(".torn").read_bytes() == last[:cut]
            next_is_accepted(module, session)
            session.append({"role": "assistant", "content": "after"})
            again = module.repair_history(list(session))
            assert list(module.Session(path)) == again, "nothing is glued together"
    assert capsys.readouterr().out.count("was torn, and is set aside") == number


@since("s03")
def test_torn_last_line_at_the_front_door(desk: Desk):
    *lines, last, _ = sample(desk)
    assert b"say four" in last
    desk.file.write_bytes(b"".join(lines))
    before = desk.remembered()
    for cut in (1, 20, -2, -1):
        desk.file.write_bytes(b"".join(lines) + last[:cut])
        printed = desk.run("say next", "probe")
        assert one_line(printed, desk.file.name, "torn")
        assert contents(desk.sent()[:-1]) == [*before, "say next", "heard next"]
        assert desk.remembered() == [*before, "say next", "heard next"]


@since("s03")
def test_a_file_without_a_header(desk: Desk):
    desk.run("say one")
    for text in (b"", b'{"type": "sess', b"\x00" * 64, b"\n", b"\n\n{}\n"):
        desk.file.write_bytes(text)
        said = desk.remembered("/list", "/context", "say two")
        assert said == ["say two", "heard two"], text
        assert desk.remembered("/list") == ["say two", "heard two"]
    assert len(desk.files) == 1


GARBAGE = {
    "random": b"\x8f\x03\xfe\x91{]\xc3\x28\n",
    "nuls": b"\x00" * 300 + b"\n",
    "half": b'{"type": "message", "mess\n',
    "list": b"[]\n",
    "number": b"12\n",
    "null": b"null\n",
    "text": b'"text"\n',
    "deep": b"[" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"\n",
    "nan": b'{"type": "retraction", "to": NaN}\n',
    "half a character": b'{"type": "session", "label": "\\ud83d"}\n',
    "empty": b"\n",
}


def shape(kind: str, **fields: object) -> bytes:
    return json.dumps({"type": kind, **fields}).encode() + b"\n"


def message_shape(**message: object) -> bytes:
    return shape("message", message=message)


CALL = {"id": "x", "type": "function"}
SHAPES = {
    "no message": shape("message"),
    "message is a list": shape("message", message=[]),
    "no role": message_shape(content="x"),
    "odd role": message_shape(role="robot", content="x"),
    "role is a list": message_shape(role=["user"], content="x"),
    "no content": message_shape(role="user"),
    "null content": message_shape(role="assistant", content=None),
    "content is a list": message_shape(role="user", content=[{"type": "text"}]),
    "null calls": message_shape(role="assistant", content="x", tool_calls=None),
    "calls is a text": message_shape(role="assistant", content="x", tool_calls="bash"),
    "empty call": message_shape(role="assistant", content="x", tool_calls=[{}]),
    "no function": message_shape(role="assistant", content="x", tool_calls=[CALL]),
    "tool without id": message_shape(role="tool", content="x"),
    "odd retraction": shape("retraction", to="all"),
    "no retraction": shape("retraction"),
    "no messages": shape("compaction"),
    "odd window": shape("window", model="brain", tokens="many"),
    "window of nothing": shape("window", model=None, tokens=5),
    "unknown": shape("weather", sun=True),
    "no type": b'{"a": 1}\n',
    "type is a list": b'{"type": []}\n',
}


@since("s03")
@pytest.mark.costly
@pytest.mark.parametrize("kind", [*GARBAGE, *SHAPES])
def test_garbage_in_the_middle(desk: Desk, kind: str, pytestconfig: pytest.Config):
    """What is whole is sent, in order; the request is valid; the person is told.

    Each kind stands at one place, with --every-section at each place.
    """
    wrong = GARBAGE.get(kind) or SHAPES[kind]
    desk.run("say one", "tools", "say two")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    expected = contents(json.loads(line)["message"] for line in lines[1:])
    places = (1, 5, len(lines)) if kind in SHAPES else (0, 1, 5, len(lines))
    if not pytestconfig.getoption("--every-section"):
        number = [*GARBAGE, *SHAPES].index(kind)
        places = places[number % len(places) :][:1]
    path = desk.file
    for place in places:
        path.write_bytes(b"".join([*lines[:place], wrong, *lines[place:]]))
        printed = desk.run("/context", "/list", "probe")
        found = iter(contents(desk.sent()))
        missing = [text for text in expected if text not in found]
        assert not missing, (place, missing, contents(desk.sent()))
        if kind != "half a character":
            assert one_line(printed, path.name, "damaged"), place


@since("s03")
def test_a_compaction_with_odd_messages(desk: Desk):
    """It replaces what was before, and only what is a message is taken."""
    desk.run("say one", "tools", "say two")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    good = {"role": "user", "content": "kept"}
    for odd in ([1], [{}], [None, good], [good, good], ["text"], [[good]], []):
        wrong = shape("compaction", why="x", messages=odd)
        desk.file.write_bytes(b"".join([*lines[:-2], wrong, *lines[-2:]]))
        assert desk.remembered("/context")[-2:] == ["say two", "heard two"], odd


@since("s03")
def test_a_damaged_header_and_no_index(desk: Desk):
    desk.run("say one")
    path = desk.file
    lines = path.read_bytes().splitlines(keepends=True)
    for header in (b"[1]\n", b'{"key": [1], "label": 5}\n', b'{"key": null}\n', b""):
        for other in desk.files:
            other.unlink()
        desk.index.unlink()
        path.write_bytes(b"".join([header, *lines[1:]]))
        desk.run("/list", "/new", "/list", "say two")
        assert path.exists()
    desk.run(f"/switch {path.stem}", "say three")
    assert contents(desk.sent()) == ["say one", "heard one", "say three"]


@since("s03")
@pytest.mark.parametrize("copies", [0, 2], ids=["deleted", "doubled"])
def test_one_line_deleted_or_doubled(desk: Desk, tmp_path: Path, copies: int):
    lines, module = sample(desk), desk.section.module
    whole = contents(module.Session(shutil.copy(desk.file, tmp_path / "whole.jsonl")))
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        if copies and b'"tool_calls"' in line:
            continue
        changed = [*lines[:number], *[line] * copies, *lines[number + 1 :]]
        path.write_bytes(b"".join(changed))
        session = module.Session(path)
        next_is_accepted(module, session)
        if copies:
            kept = iter(contents(session))
            assert all(text in kept for text in whole), (line, contents(session))


@since("s03")
def test_a_damaged_question_takes_no_other_message_along(desk: Desk):
    """Taking back a question that the file has lost takes nothing else back."""
    desk.run("say one", "fail now", "say two")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    (place,) = [n for n, line in enumerate(lines) if b"fail now" in line]
    lines[place] = b"garbage\n"
    desk.file.write_bytes(b"".join(lines))
    assert desk.remembered() == ["say one", "heard one", "say two", "heard two"]


@since("s03")
def test_crlf_line_ends(desk: Desk):
    desk.run("say one", "tools")
    before = desk.remembered()
    desk.file.write_bytes(desk.file.read_bytes().replace(b"\n", b"\r\n"))
    assert desk.remembered() == before
    assert desk.remembered() == before


# --- one process at a time, and what else may be wrong with the workspace ---


@since("s03")
def test_a_second_process_is_told_who_holds_the_workspace(desk: Desk, tmp_path: Path):
    other = tmp_path / "link"
    other.symlink_to(desk.workspace)
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        for place in (desk.workspace, other):
            printed = desk.run("say no", status=1, WORKSPACE_DIR=str(place))
            assert one_line(printed, f" {screen.pid}", "in use", "WORKSPACE_DIR")
        assert not desk.server.chats
        screen.type("hangtool\n")
        screen.wait_for("sleep 30")
        os.kill(screen.pid, 9)
        screen.process.wait(10)
        assert "heard next" in desk.run("say next"), "its command is no owner"


def no_folder(workspace: Path) -> None:
    (workspace / ".sessions").write_text("a file")


def no_lock(workspace: Path) -> None:
    (workspace / ".lock").mkdir()


def read_only(workspace: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    workspace.chmod(0o500)


def no_index(workspace: Path) -> None:
    (workspace / ".sessions/agents/main/sessions.json").mkdir(parents=True)


@since("s03")
@pytest.mark.parametrize("spoil", [no_folder, no_lock, read_only, no_index])
def test_a_workspace_that_cannot_be_written(desk: Desk, spoil: Callable):
    spoil(desk.workspace)
    line = desk.refusal()
    assert str(desk.workspace) in line and "WORKSPACE_DIR" in line


@since("s03")
def test_settings_that_are_no_settings(desk: Desk):
    for window in ("many", "1e5", "128k", "12.5"):
        assert "CONTEXT_TOKENS" in desk.refusal(CONTEXT_TOKENS=window)
    for window in ("0", "-5", "1"):
        assert windows(desk.run("/context", CONTEXT_TOKENS=window)) == [1000]
    if os.path.isdir("/proc/self"):
        assert "WORKSPACE_DIR" in desk.refusal(WORKSPACE_DIR="/proc/self")


FULL = re.compile(r"^\[.*(disk is full|No space|too large).*\]$", re.M)


@since("s03")
@pytest.mark.parametrize("room", [0, 60, 250, 700])
def test_a_full_disk(desk: Desk, room: int):
    """When a file cannot grow, a line says so, and nothing answered is lost."""
    desk.run("say one", "tools")
    # From s04 on, no program starts without some room for its database.
    padding = '{"type": "window", "model": "another", "tokens": 9999}\n' * 2000
    with open(desk.file, "a", encoding="utf-8") as log:
        log.write(padding)
    before = desk.remembered()
    size = desk.file.stat().st_size
    with desk.screen(fsize=size + room) as screen:
        screen.wait_for(PROMPT)
        seen = []
        while not seen or not FULL.search(seen[-1]):
            seen.append(say(screen, f"say {len(seen)}"))
        for line in ("/compact", "tools", "say it"):
            assert one_line(say(screen, line).replace("you> [", "["), "[")
        leave(screen)
    after = desk.remembered("say next")
    said = []
    for number in range(len(seen) - 1):
        said += [f"say {number}", f"heard {number}"]
    assert after[: len(before) + len(said)] == before + said
    assert after[-2:] == ["say next", "heard next"]


@since("s03")
@pytest.mark.costly
@pytest.mark.parametrize("room", range(0, 900, 150))
def test_a_disk_that_fills_up_in_a_turn_with_tools(desk: Desk, room: int):
    desk.run("say one")
    first = desk.file.stem
    with desk.screen(fsize=desk.file.stat().st_size + room) as screen:
        screen.wait_for(PROMPT)
        for line in ("tools", "say two", "/new", "tools", "say three"):
            assert "Traceback" not in say(screen, line)
        leave(screen)
    after = desk.remembered(f"/switch {first}", "say next")
    assert after[:2] == ["say one", "heard one"]
    assert after[-2:] == ["say next", "heard next"]


@since("s03")
def test_a_disk_that_is_full_at_the_start(desk: Desk):
    for room in (0, 15, 25, 40, 50):
        shutil.rmtree(desk.workspace / ".sessions", ignore_errors=True)
        assert re.search("too large|disk is full", desk.refusal(fsize=room))
    assert desk.remembered("say one") == ["say one", "heard one"]


# --- replay equals memory ---


def held_and_replayed(desk: Desk, screen: harness.Screen, **env: str) -> tuple:
    """The next request is the same before and after a restart.

    Returns what /context says before, and after.
    """
    say(screen, "probe")
    held = desk.sent()
    bar = say(screen, "/context")
    leave(screen)
    printed = desk.run("/context", "probe", **env)
    assert desk.sent() == held
    return BAR.search(bar).groups(), BAR.search(printed).groups()


@since("s03")
@pytest.mark.costly
@pytest.mark.parametrize("seed", range(3))
def test_replay_equals_memory(desk: Desk, seed: int):
    chance = random.Random(seed)
    big = "many words, 很多的话. " * 700
    (desk.workspace / "big.txt").write_text(big, encoding="utf-8")
    verbs = ["say", "fail", "tools", "toolfail", "hang", "hangtool", "/compact", "read"]
    chance.shuffle(verbs)
    verbs += [chance.choice(verbs) for _ in range(5)]
    with desk.screen(CONTEXT_TOKENS="4096") as screen:
        screen.wait_for(PROMPT)
        for number, verb in enumerate(verbs):
            if verb.startswith("hang"):
                screen.type(verb + "\n")
                screen.wait_for("never" if verb == "hang" else "sleep 30")
                screen.press("ctrl-c")
                screen.wait_for("stopped]")
                screen.wait_for(PROMPT)
            elif verb == "/compact":
                say(screen, verb)
            elif verb == "read":
                say(screen, "read big.txt")
            elif verb in ("tools", "toolfail"):
                say(screen, f"{verb} echo {number}")
            else:
                say(screen, f"{verb} {number}")
        before, after = held_and_replayed(desk, screen, CONTEXT_TOKENS="4096")
    assert before == after
    kinds = {record["type"] for record in desk.records()}
    assert kinds == {"session", "message", "retraction", "compaction"}
    assert "shortened" in desk.rewrites()


@since("s03")
def test_compact_is_recorded_and_deletes_nothing(desk: Desk):
    desk.run("say one", "say two", "tools")
    before = desk.file.read_bytes()
    printed = desk.run("/compact", "say three")
    assert one_line(printed, "[messages that became a summary: 8]")
    assert "the summary" in json.dumps(desk.sent()[:-1])
    assert not {"say one", "heard one", "say two"} & set(contents(desk.sent()))
    assert desk.file.read_bytes().startswith(before)
    held = contents(desk.sent())
    assert desk.remembered()[: len(held)] == held
    calls = len(desk.server.chats)
    assert BAR.search(desk.run("/new", "/compact"))[3] == "0"
    assert len(desk.server.chats) == calls, "there was nothing to summarize"


# --- the guard ---


def small(url: str) -> Callable[[dict], object]:
    """offline-small behind the fake model, so that its requests are checked."""

    def answer(body: dict) -> object:
        if body["messages"][-1]["content"] == "probe":
            return Error(422)
        request = body | {"model": "offline-small", "stream": False}
        request.pop("stream_options", None)
        headers = {
            "Authorization": "Bearer offline",
            "Content-Type": "application/json",
        }
        data = json.dumps(request).encode()
        ask = urllib.request.Request(f"{url}/chat/completions", data, headers)
        try:
            with urllib.request.urlopen(ask, timeout=30) as reply:
                found = json.load(reply)
        except urllib.error.HTTPError as error:
            return Error(error.code, body=json.load(error))
        message = found["choices"][0]["message"]
        calls = [each["function"] for each in message.get("tool_calls") or ()]
        if calls:
            pairs = [(call["name"], call["arguments"]) for call in calls]
            return ToolCalls(pairs, usage=found["usage"])
        return Text(message["content"], usage=found["usage"])

    return answer


WORDS = ["a line of plain words. ", "这是一行很普通的中文。", "日本語の文章。"]


@since("s03")
@pytest.mark.costly
@pytest.mark.parametrize("window", ["4096", ""], ids=["told", "untold"])
def test_60_turns_in_a_small_window(desk: Desk, offline, window: str):
    desk.server.script("brain", [small(offline.url)], repeat=True)
    chance = random.Random(3)
    lines = ["my name is Ada and my city is Turin"]
    for number in range(58):
        name, words = f"f{number}.txt", chance.choice(WORDS)
        text = words * (chance.randrange(1_000, 30_000) // len(words.encode()))
        (desk.workspace / name).write_text(text, encoding="utf-8")
        both = f"read {name} and f{chance.randrange(number + 1)}.txt"
        read = f"read {name}"
        lines.append(chance.choice([read, both, read, f"say {number}"]))
    with desk.screen(CONTEXT_TOKENS=window) as screen:
        screen.wait_for(PROMPT)
        for line in lines:
            seen = say(screen, line, 30)
            assert not re.search("error|too long|no summary", seen, re.I), seen
        assert "Your name is Ada" in say(screen, "what is my name?")
        before, after = held_and_replayed(desk, screen, CONTEXT_TOKENS=window)
    assert before[1:] == after[1:], "the same window, and as many messages"
    assert set(desk.rewrites()) == {"shortened", "summarized"}
    assert set(desk.windows()) == (set() if window else {4096})
    answer = desk.run("what is my city?", CONTEXT_TOKENS=window)
    assert "Your city is Turin" in answer


TOO_BIG = Error(400, {}, corpora.ERRORS["e400ctx"].body)
EVERY_ERROR = corpora.ERRORS | corpora.PROVIDERS | corpora.OVERFLOWS
LM_STUDIO = corpora.ERRORS["lmstudio"].body
OVERFLOWS_200 = {
    "in the stream": Chunks([LM_STUDIO], done=False),
    "in the stream, late": Chunks([corpora.says(""), LM_STUDIO], done=False),
    "in place of the stream": Json200(LM_STUDIO),
}


def overflowing(failure: object, times: int = 1) -> Callable[[dict], object]:
    """`say now` overflows some times; all else goes well."""
    left = [times]

    def answer(body: dict) -> object:
        if body["messages"][-1]["content"] == "say now" and left[0]:
            left[0] -= 1
            return failure
        return brain(body)

    return answer


def failing(failures: dict[str, object], times: int) -> Callable[[dict], object]:
    """`say NAME` meets the failure of that name so many times, then goes well."""
    left = dict.fromkeys(failures, times)

    def answer(body: dict) -> object:
        name = body["messages"][-1]["content"].removeprefix("say ")
        if left.get(name, 0):
            left[name] -= 1
            return failures[name]
        return brain(body)

    return answer


def ask_each(desk: Desk, failures: dict[str, object], times: int, **env) -> dict:
    """Meet each failure in a session of its own, with a long history.

    Returns for each name what was printed, the calls it took, and the session's file.
    """
    (desk.workspace / "big.txt").write_text(BIG_TEXT)
    desk.server.script("brain", [failing(failures, times)], repeat=True)
    lines = []
    for name in failures:
        lines += [f"/new {name}", "read big.txt", f"say {name}"]
    printed = desk.run(*lines, **env)
    turns = re.split(r"^you> /new (.*)\n", printed, flags=re.M)[1:]
    files = {}
    for file in desk.files:
        files[desk.records(file)[0]["label"]] = file
    met = {}
    for name, turn in zip(turns[::2], turns[1::2], strict=True):
        question = f"say {name}"
        calls = [
            chat
            for chat in desk.server.chats
            if chat.messages[-1]["content"] == question
        ]
        met[name] = (turn.partition(f"you> {question}\n")[2], calls, files[name])
    assert set(met) == set(failures)
    return met


@since("s03")
@pytest.mark.costly
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_overflow_in_any_words_makes_room(desk: Desk, stream: bool):
    """Each server's own words are understood, and a stated window is read right."""
    failures = {
        name: Error(failure.status, failure.headers, failure.body)
        for name, failure in EVERY_ERROR.items()
        if failure.kind == "overflow"
    }
    failures |= OVERFLOWS_200 if stream else {"in place": Json200(LM_STUDIO)}
    options = json.dumps({"stream": stream})
    met = ask_each(desk, failures, 1, MODEL_OPTIONS=options)
    problems = []
    for name, (printed, calls, file) in met.items():
        if not printed.startswith(f"agent> heard {name}\n"):
            problems.append(f"{name}: {printed!r}")  # nothing may come before it
            continue
        first, last = calls[0].body, calls[-1].body
        if len(calls) != 2 or len(str(last)) >= len(str(first)):
            problems.append(f"{name}: {len(calls)} calls, none smaller")
        stated = corpora.WINDOWS.get(name)
        if desk.windows(file) not in ([], [stated]):
            problems.append(f"{name}: {desk.windows(file)} is not {stated}")
        if stated and not desk.windows(file) and name not in corpora.WINDOW_IN_PROSE:
            problems.append(f"{name}: {stated} was not read")
        if desk.rewrites(file) != ["shortened"]:
            problems.append(f"{name}: {desk.rewrites(file)}")
    assert not problems, "\n".join(problems)
    for chat in desk.server.chats:
        assert ("stream_options" in chat.body) == stream


TRAPS = {
    "tokens per minute": corpora.Failure(
        "rate",
        429,
        corpora.error(
            "Rate limit reached for gpt-4o in organization org-x on tokens per min"
            " (TPM):"
            " Limit 30000, Used 29000, Requested 5000. Please try again in 8s.",
            "rate_limit_exceeded",
            "tokens",
        ),
        {"Retry-After": "1"},
    ),
    "authentication token": corpora.Failure(
        "auth",
        401,
        corpora.error(
            "Invalid authentication token: context length 0", "invalid_token"
        ),
    ),
    "forbidden": corpora.Failure(
        "auth", 403, corpora.bare("the token may not use this context window")
    ),
    "unknown parameter": corpora.Failure(
        "parameter",
        400,
        corpora.error(
            "Unrecognized request argument supplied: context_length",
            "unknown_parameter",
            corpora.INVALID,
            "context_length",
        ),
    ),
    "gpt4all, in the end": corpora.Failure("fatal", 500, ""),
    "an answer that is too long": corpora.Failure(
        "parameter",
        400,
        corpora.error(
            "max_tokens is too large: 65536. This model supports at most 16384"
            " completion"
            " tokens, whereas you provided 65536.",
            "invalid_value",
            corpora.INVALID,
            "max_tokens",
        ),
    ),
    "quotes the question": corpora.Failure(
        "fatal",
        422,
        {"detail": [{"loc": ["body"], "input": "what is a context window?"}]},
    ),
    "quotes it with 400": corpora.Failure(
        "fatal",
        400,
        {"detail": [{"loc": ["body"], "input": "what is a context window?"}]},
    ),
}


@since("s03")
def test_other_errors_rewrite_nothing(desk: Desk):
    failures = {
        name: Error(failure.status, failure.headers, failure.body)
        for name, failure in (EVERY_ERROR | TRAPS).items()
        if failure.kind != "overflow"
    }
    for name, (printed, calls, file) in ask_each(desk, failures, 99).items():
        assert re.match(r"agent> \n\[.+\]\n", printed), (name, printed)
        assert len(calls) == 1, name
        assert not desk.rewrites(file) and not desk.windows(file), name
        assert desk.records(file)[-1]["type"] == "retraction", name


@since("s03")
def test_overflow_in_the_summary_itself(desk: Desk):
    """If even the summary is too long a request, the older messages go."""

    def answer(body: dict) -> object:
        if "tools" not in body:
            return TOO_BIG
        return TOO_BIG if len(json.dumps(body["messages"])) > 12_000 else brain(body)

    desk.run(*(f"say {number} {'words ' * 400}" for number in range(12)))
    desk.server.script("brain", [answer], repeat=True)
    printed = desk.run("say now")
    assert re.search(r"^\[no summary \(.+\): messages left out: \d+\]$", printed, re.M)
    assert re.search(r"^heard now$", printed, re.M)
    assert "say 11" in json.dumps(desk.sent()), "the latest stay"
    assert "say 0 " not in json.dumps(desk.sent())


@since("s03")
def test_a_server_that_always_overflows(desk: Desk):
    """A clear end after few calls; question and history are as they were."""
    (desk.workspace / "big.txt").write_text(BIG_TEXT)
    desk.run("say one", "read big.txt", "say two")
    before = desk.remembered()
    calls = len(desk.server.chats)
    unstated = Error(400, {}, corpora.ERRORS["ollama"].body)
    desk.server.script("brain", [lambda body: unstated], repeat=True)
    printed = desk.run("say now")
    assert 1 < len(desk.server.chats) - calls < 8
    assert one_line(printed, "[", "too long", "/new")
    assert "restored" in desk.rewrites()
    desk.server.script("brain", [brain], repeat=True)
    assert desk.remembered() == before
    assert "heard now" in desk.run("/new", "say now")


@since("s03")
def test_one_over_long_question(desk: Desk):
    """Refused with a way out, taken back, and gone for good; nothing is rewritten."""

    def answer(body: dict) -> object:
        return TOO_BIG if len(json.dumps(body["messages"])) > 40_000 else brain(body)

    desk.server.script("brain", [answer], repeat=True)
    long = "say " + "over and over " * 3_000
    lines = ["say one", long, "say two"]
    for window in ("4096", ""):
        printed = desk.run("/new", *lines, CONTEXT_TOKENS=window)
        assert one_line(printed.replace(long, ""), "[", "/new")
        said = ["say one", "heard one", "say two", "heard two"]
        assert desk.remembered(CONTEXT_TOKENS=window) == said
        assert not desk.rewrites(desk.files[-1])
    assert len(desk.server.chats) <= 8


def counted(body: dict) -> int:
    """The tokens of a request, counted by a rule that is not the script's own."""
    text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return (len(text) - wide) // 4 + wide * 4 // 5


@since("s03")
@pytest.mark.parametrize("text", WORDS[:2], ids=["en", "zh"])
def test_a_call_that_is_sure_to_overflow_is_not_sent(desk: Desk, text: str):
    """Ollama never complains, it forgets: CONTEXT_TOKENS is what may be sent."""
    big = text * (12_000 // len(text))
    (desk.workspace / "big.txt").write_text(big, encoding="utf-8")
    lines = ["read big.txt", "say one", f"say {text * 10}", "read big.txt"]
    lines += [f"say {number} {text * 10}" for number in range(25)]
    desk.run(*lines, CONTEXT_TOKENS="4096")
    sizes = [counted(chat.body) for chat in desk.server.chats]
    assert max(sizes) <= 4096 * 1.05, sizes
    assert max(sizes) > 2000


@since("s03")
def test_a_history_much_larger_than_the_window(desk: Desk):
    """A smaller model takes over: the request for a summary fits it, too."""
    desk.run(*(f"say {number} {'words ' * 600}" for number in range(25)))
    calls = len(desk.server.chats)
    assert "heard now" in desk.run("say now", CONTEXT_TOKENS="4096")
    sizes = [counted(chat.body) for chat in desk.server.chats[calls:]]
    assert len(sizes) == 2 and max(sizes) <= 4096, sizes
    assert "the summary" in json.dumps(desk.sent())


def reads_many(body: dict) -> object:
    """Asks for 20 files at once, then answers."""
    last = body["messages"][-1]
    if last["content"] == "read all":
        calls = [("read_file", {"path": f"{number}.txt"}) for number in range(20)]
        return ToolCalls(calls)
    if last["role"] == "tool":
        return Text("read them all")
    return brain(body)


@since("s03")
def test_many_results_at_once(desk: Desk):
    """They stay with their calls, and are shortened until they fit."""
    for number in range(20):
        (desk.workspace / f"{number}.txt").write_text(f"{number} some words " * 200)
    desk.server.script("brain", [reads_many], repeat=True)
    printed = desk.run("say one", "read all", "say two", CONTEXT_TOKENS="4096")
    assert "read them all" in printed and "heard two" in printed
    assert max(counted(chat.body) for chat in desk.server.chats) <= 4096 * 1.05
    with_results = [
        chat for chat in desk.server.chats if chat.messages[-1]["role"] == "tool"
    ]
    roles = [each["role"] for each in with_results[-1].messages]
    assert roles[-21:] == ["assistant"] + ["tool"] * 20


def writes_much(body: dict) -> object:
    """Writes a file that is larger than the window, then answers."""
    last = body["messages"][-1]
    if last["content"] == "write much":
        content = "some words " * 2_000
        return ToolCalls([("write_file", {"path": "much.txt", "content": content})])
    return brain(body)


@since("s03")
def test_a_call_that_is_larger_than_the_window(desk: Desk):
    """That turn may end with the way out; the next question is answered."""
    desk.server.script("brain", [writes_much], repeat=True)
    lines = ["say one", "write much", "say two", "say three"]
    printed = desk.run(*lines, CONTEXT_TOKENS="4096")
    assert "heard two" in printed and "heard three" in printed
    assert max(counted(chat.body) for chat in desk.server.chats) <= 4096 * 1.05
    assert (desk.workspace / "much.txt").stat().st_size > 20_000


# --- the window ---


def limited(chars: int, failure: object) -> Callable[[dict], object]:
    """A server that refuses requests longer than so many characters."""

    def answer(body: dict) -> object:
        return failure if len(json.dumps(body["messages"])) > chars else brain(body)

    return answer


@since("s03")
def test_a_stated_window_is_believed_and_kept(desk: Desk):
    """Also after a restart; for that model alone, and never above CONTEXT_TOKENS."""
    desk.server.script("brain", [limited(30_000, TOO_BIG)], repeat=True)
    desk.server.script("other", [brain], repeat=True)
    said = [f"say {number} {'words ' * 1000}" for number in range(8)]
    printed = desk.run(*said, "/context")
    assert windows(printed) == [8192]
    assert "too long" not in printed and "error" not in printed
    assert desk.windows() == [8192], "recorded once: from then on it is kept"
    assert windows(desk.run("/context")) == [8192]
    assert windows(desk.run("/context", CONTEXT_TOKENS="2000")) == [2000]
    assert windows(desk.run("/context", CONTEXT_TOKENS="64000")) == [8192]
    assert windows(desk.run("/context", MODEL_ID="other")) == [128_000]
    assert windows(desk.run("/new", "/context")) == [128_000]


@since("s03")
def test_a_window_larger_than_the_setting_is_not_taken(desk: Desk):
    body = corpora.error(
        "maximum context length is 1000000 tokens", "context_length_exceeded"
    )
    desk.server.script("brain", [overflowing(Error(400, {}, body))], repeat=True)
    printed = desk.run("say now", "/context", CONTEXT_TOKENS="5000")
    assert windows(printed) == [5000]


@since("s03")
def test_without_a_stated_window_only_this_request_gets_smaller(desk: Desk):
    body = corpora.ERRORS["ollama"].body
    desk.server.script("brain", [limited(30_000, Error(400, {}, body))], repeat=True)
    said = [f"say {number} {'words ' * 1000}" for number in range(8)]
    printed = desk.run(*said, "/context")
    assert windows(printed) == [128_000]
    assert desk.windows() == []
    assert "summarized" in desk.rewrites()
    assert printed.count("heard ") >= 8 and "too long" not in printed


@since("s03")
@pytest.mark.parametrize("window", ["4096", ""], ids=["told", "untold"])
def test_context_is_the_same_after_a_restart(desk: Desk, window: str):
    (desk.workspace / "big.txt").write_text(BIG_TEXT)
    desk.server.script("brain", [overflowing(TOO_BIG)], repeat=True)
    with desk.screen(CONTEXT_TOKENS=window) as screen:
        screen.wait_for(PROMPT)
        for line in ("say one", "read big.txt", "say now"):
            say(screen, line)
        before, after = held_and_replayed(desk, screen, CONTEXT_TOKENS=window)
    assert before == after


@since("s03")
def test_nothing_stands_before_a_good_answer(desk: Desk):
    """No error line, and a note about a summary is on a line of its own."""
    desk.server.script("brain", [limited(30_000, TOO_BIG)], repeat=True)
    said = [f"say {number} {'words ' * 1000}" for number in range(4)]
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        for line in said:
            say(screen, line)
        seen = say(screen, f"say now {'words ' * 1000}")
        text = screen.paper
        leave(screen)
    assert "summarized" in desk.rewrites(), seen
    lines = text[text.rindex("say now") :].splitlines()
    note = [n for n, line in enumerate(lines) if line.startswith("[messages that ")]
    assert len(note) == 1 and lines[note[0]].endswith("]")
    assert lines[note[0] - 1] == "agent> "
    assert lines[note[0] + 1].startswith("heard now")
    assert "too long" not in text and "error" not in text


@since("s03")
@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("way_out", ["/compact", "/new"])
def test_an_empty_stream_is_told_with_the_way_out(desk: Desk, way_out: str, done: bool):
    """llama-cpp-python says HTTP 200 and nothing when a conversation is too long."""
    desk.server.script("brain", [limited(20_000, Chunks([], done=done))], repeat=True)
    said = [f"say {number} {'words ' * 550}" for number in range(7)]
    printed = desk.run(*said, way_out, "say now")
    before, after = printed.split(f"you> {way_out}")
    assert one_line(before[before.index("say 6") :], "[", "too long for this model")
    assert "heard now" in after


# --- summaries that are none ---

CALLS_A_TOOL = ToolCalls([("bash", {"command": "touch run-by-a-summary"})])
NO_SUMMARIES = {
    "empty": Text(""),
    "blank": Text(" \n "),
    "only thoughts": Text("<think>well, what was it</think>"),
    "open thoughts": Text("<think>well, what was it"),
    "reasoning alone": Text("", reasoning="well, what was it"),
    "filtered": Text("The", finish="content_filter"),
    "cut": Text("The person said", finish="length"),
    "a tool call": CALLS_A_TOOL,
    "fails": Error(422, body=corpora.bare("out of order")),
    "fails with 500": Error(500, body=corpora.bare("out of order")),
    "breaks off": Drop(2),
    "never ends": Text("The person", finish=None),
    "no JSON": Chunks([corpora.says("The"), "{not json"]),
    "odd": Json200({"choices": 5}),
}


def without_summary(item: object) -> Callable[[dict], object]:
    return lambda body: brain(body) if "tools" in body else item


@since("s03")
@pytest.mark.parametrize("kind", NO_SUMMARIES)
def test_a_summary_that_is_none(desk: Desk, kind: str):
    """/compact changes nothing; a turn drops the oldest messages, says so, and ends."""
    answer = without_summary(NO_SUMMARIES[kind])
    desk.server.script("brain", [answer], repeat=True)
    said = [f"say {number} {'words ' * 100}" for number in range(20)]
    printed = desk.run(*said[:3], "/compact", "probe")
    assert one_line(printed.partition("/compact")[2].partition("you>")[0], "[", "]")
    assert contents(desk.sent())[:-1:2] == said[:3]
    assert not desk.rewrites()
    printed = desk.run(*said[3:], CONTEXT_TOKENS="4096")
    notes = re.findall(
        r"^\[no summary \(.+\): messages left out: (\d+)\]$", printed, re.M
    )
    assert notes and all(int(number) > 1 for number in notes), printed
    answers = re.findall(r"^(?:agent> )?heard (\d+)", printed, re.M)
    assert answers == [str(number) for number in range(3, 20)], "each was answered"
    assert "well, what was it" not in json.dumps(desk.records())
    assert not (desk.workspace / "run-by-a-summary").exists()


@since("s03")
@pytest.mark.parametrize("way", ["/compact", "say now"])
def test_a_server_that_is_gone_costs_no_messages(desk: Desk, way: str):
    """Its summary is asked for again when it is back."""
    gone = without_summary(Drop(0, "reset"))
    desk.server.script("brain", [gone], repeat=True)
    desk.run(*(f"say {number} {'words ' * 100}" for number in range(20)))
    before = desk.remembered()
    printed = desk.run(way, CONTEXT_TOKENS="4096")
    assert one_line(printed, "[", "onnection")
    assert "heard now" not in printed
    assert "summarized" not in desk.rewrites()
    assert desk.remembered() == before
    desk.server.script("brain", [brain], repeat=True)
    assert "heard now" in desk.run("say now", CONTEXT_TOKENS="4096")
    assert "the summary" in json.dumps(desk.sent())


@since("s03")
def test_thoughts_before_a_summary_are_left_out(desk: Desk):
    thoughtful = Text("<think>well, what was it</think>the gist")
    desk.server.script("brain", [without_summary(thoughtful)], repeat=True)
    desk.run("say one", "say two", "/compact", "say three")
    assert "the gist" in desk.sent()[0]["content"]
    assert "well, what" not in json.dumps(desk.records())


@since("s03")
def test_no_summary_for_a_question_that_cannot_fit(desk: Desk):
    desk.run(*(f"say {number} {'words ' * 100}" for number in range(8)))
    calls = len(desk.server.chats)
    assert "/new" in desk.run("say " + "words " * 2_800, CONTEXT_TOKENS="4096")
    assert len(desk.server.chats) == calls
    assert not desk.rewrites()


@since("s03")
def test_ctrl_c_in_a_summary_changes_nothing(desk: Desk):
    def answer(body: dict) -> object:
        return brain(body) if "tools" in body else Stall(2, 20, Text("The summary"))

    desk.server.script("brain", [answer], repeat=True)
    desk.run("say one", "say two")
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        screen.type("/compact\n")
        desk.server.wait(3)
        screen.press("ctrl-c")
        screen.wait_for("[stopped]")
        screen.wait_for(PROMPT)
        assert "heard three" in say(screen, "say three")
        leave(screen)
    assert not desk.rewrites()


# --- what only one server understands ---

SIGNATURE = {"google": {"thought_signature": "SIG"}}


def with_extras(body: dict) -> object:
    """Thinks like DeepSeek, and signs its calls like Gemini."""
    if body["messages"][-1]["role"] == "tool":
        return Text("all done", reasoning="that was it")
    fragment = corpora.call(0, "call_1", "bash", '{"command": "echo ran"}')
    return Chunks(
        [
            corpora.says("", reasoning_content="hm"),
            corpora.calls(fragment | {"extra_content": SIGNATURE}),
            corpora.CALLED,
        ]
    )


def extras_in(messages: list[dict]) -> tuple:
    """The thoughts and the signatures in a request."""
    thoughts = [each.get("reasoning_content") for each in messages]
    calls = [call for each in messages for call in each.get("tool_calls", ())]
    return list(filter(None, thoughts)), [call.get("extra_content") for call in calls]


@since("s03")
def test_extras_go_back_to_their_server_alone(desk: Desk):
    """Also after restarts with another server in the environment, and back."""
    desk.server.script("brain", [with_extras], repeat=True)
    desk.run("go")
    assert extras_in(desk.sent()) == (["hm"], [SIGNATURE]), "within the turn"
    desk.server.script("brain", [brain], repeat=True)
    with FakeModel() as second:
        second.script("brain", [brain], repeat=True)
        desk.run("say one", OPENAI_BASE_URL=second.url)
        assert not second.problems
        (request,) = second.chats
    assert extras_in(request.messages) == ([], [None])
    assert "extras" not in json.dumps(request.body)
    desk.run("say two")
    thoughts, signatures = extras_in(desk.sent())
    assert (thoughts, signatures) == (["hm", "that was it"], [SIGNATURE])
    assert "heard one" in contents(desk.sent())


# --- usage ---


def usage(total: object) -> dict:
    return {"prompt_tokens": total, "completion_tokens": 1, "total_tokens": total}


@since("s03")
def test_garbage_in_usage(desk: Desk):
    for total in (None, "many", "12", {}, [], -5, 0, True, 1.5, 10**15):
        script = [Text("x", usage=usage(total)), Text("y", usage=usage(total)), brain]
        desk.server.script("brain", script)
        printed = desk.run("/new", "hi", "/context", "hi", "/context", "say z")
        assert all(used >= 1 for used in bars(printed)), printed
        assert "heard z" in printed, total
    chunks = [corpora.says("x"), corpora.STOPPED, corpora.envelope([], usage="many")]
    desk.server.script("brain", [Chunks(chunks), Text("fine")])
    assert "fine" in desk.run("hi", "/context", "hi")


@since("s03")
def test_a_high_count_is_no_reason_to_give_up(desk: Desk):
    """A server that counts thoughts which are never sent back."""
    script = [Text("x", usage=usage(4_500)), brain]
    desk.server.script("brain", script, repeat=True)
    assert "heard two" in desk.run("hi", "say two", CONTEXT_TOKENS="4096")
    assert "heard three" in desk.run("say three", CONTEXT_TOKENS="4096")


@since("s03")
def test_a_dense_text_counts_as_the_server_counts_it(desk: Desk):
    """Digits take four times the estimate: the server's count corrects it."""
    sizes = []

    def answer(body: dict) -> object:
        tools = len(json.dumps(body.get("tools", []))) // 4
        sizes.append(tools + len(json.dumps(body["messages"])))
        reply = brain(body)
        reply.usage = {"prompt_tokens": sizes[-1], "total_tokens": 0}
        return reply

    desk.server.script("brain", [answer], repeat=True)
    said = [f"say {'7 ' * 100}" for _ in range(30)]
    printed = desk.run(*said, CONTEXT_TOKENS="4096")
    assert 3000 < max(sizes) < 4096, sizes
    assert "too long" not in printed


GPT4O = {  # text and count as OpenAI published them for o200k (Hello GPT-4o, 2024)
    "English": (
        "Hello, my name is GPT-4o. I'm a new type of language model, it's nice to meet"
        " you!",
        24,
    ),
    "German": (
        "Hallo, mein Name is GPT-4o. Ich bin ein neues KI-Sprachmodell. Es ist schön,"
        " dich kennenzulernen.",
        29,
    ),
    "French": (
        "Bonjour, je m'appelle GPT-4o. Je suis un nouveau type de modèle de langage,"
        " c'est un plaisir de vous rencontrer!",
        28,
    ),
    "Russian": (
        "Привет, меня зовут GPT-4o. Я — новая языковая модель, приятно познакомиться!",
        23,
    ),
    "Chinese": (
        "你好，我的名字是GPT-4o。我是一种新型的语言模型，很高兴见到你!",
        24,
    ),
    "Japanese": (
        "こんにちわ、私の名前はGPT-4oです。私は新しいタイプの言語モデルです、初めまして",
        26,
    ),
    "Korean": (
        "안녕하세요, 제 이름은 GPT-4o입니다. 저는 새로운 유형의 언어 모델입니다,"
        " 만나서 반갑습니다!",
        27,
    ),
    # Counted by hand.
    "prose": ("The quick brown fox jumps over the lazy dog. " * 40, 400),
    "JSON": ('{"id": 1, "name": "Ada"}, ' * 40, 500),
    "code": ("def add(a, b):\n    return a + b\n" * 40, 480),
    "emoji": ("😀🎉🚀👍😂" * 20, 150),
}


@since("s03")
@pytest.mark.parametrize("name", GPT4O)
def test_estimate(section, name: str):
    text, tokens = GPT4O[name]
    found = section.module.estimate_tokens(text)
    assert tokens / 1.7 <= found <= tokens * 1.7, (found, tokens)


# --- the log ---


@pytest.fixture
def session(section, tmp_path: Path):
    """A session of its own, from the section's own class."""
    path = tmp_path / "one.jsonl"
    path.touch()
    return section.module.Session(path)


@since("s03")
def test_an_append_is_on_disk_when_it_returns(session, monkeypatch: pytest.MonkeyPatch):
    """One sync for each record, after all of it is written."""
    real, sizes = os.fsync, []

    def fsync(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for number in range(10):
        session.append({"role": "user", "content": f"很 {number}"})
        assert len(sizes) == number + 1
        assert sizes[-1] == session.path.stat().st_size


@since("s03")
def test_appends_from_many_threads(session, monkeypatch: pytest.MonkeyPatch):
    """All there, each intact, in each thread's order, and as in memory."""

    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0))  # others go first
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def write(thread: int) -> None:
        for number in range(100):
            text = f"{thread} {number} " + "很" * (number * 37 % 400)
            session.append({"role": "user", "content": text})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    sys.setswitchinterval(before)
    records = [json.loads(line) for line in session.path.read_bytes().splitlines()]
    messages = [record["message"] for record in records]
    assert messages == list(session) and len(messages) == 8 * 100
    for thread in range(8):
        texts = [text for text in contents(messages) if text.split()[0] == str(thread)]
        assert [int(text.split()[1]) for text in texts] == list(range(100))
        assert [text.count("很") for text in texts] == [
            n * 37 % 400 for n in range(100)
        ]


@since("s03")
def test_append_after_one_that_failed(section, session, monkeypatch):
    """What could not be written is not in memory, and the next record is whole."""

    def no_sync(fd: int) -> None:
        raise OSError(28, "No space left on device")

    session.append({"role": "assistant", "content": "one"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_sync)
        with pytest.raises(OSError):
            session.append({"role": "user", "content": "two"})
    held = list(session)
    session.append({"role": "assistant", "content": "three"})
    lines = session.path.read_bytes().splitlines()
    replayed = [json.loads(line)["message"] for line in lines]
    assert replayed == list(session), "memory and log agree"
    assert contents(held) in (["one"], ["one", "two"])


class HalfFull(io.FileIO):
    """A file on a disk that takes half of what is written."""

    def write(self, data: bytes) -> int:
        return super().write(data[: len(data) // 2])


@since("s03")
def test_a_record_that_did_not_fit_leaves_nothing_behind(section, tmp_path: Path):
    """When there is room again, the next record is a line of its own."""
    module = section.load()
    path = tmp_path / "one.jsonl"
    path.touch()
    session = module.Session(path)
    question = {"role": "user", "content": "one"}
    session.append(question)
    module.open = lambda file, *_, **__: HalfFull(file, "ab")
    with pytest.raises(OSError, match="disk is full"):
        session.append({"role": "assistant", "content": "two"})
    del module.open
    answer = {"role": "assistant", "content": "three"}
    session.append(answer)
    assert list(session) == list(module.Session(path)) == [question, answer]
    assert len(path.read_bytes().splitlines()) == 2


@since("s03")
def test_a_session_has_no_way_around_the_disk(session):
    assert not isinstance(session, list)
    for name in ("extend", "insert", "clear", "remove", "sort", "__setitem__"):
        assert not hasattr(session, name), name


# --- what it costs ---


@since("s03")
def test_replay_of_10_000_messages(section, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    lines = [{"type": "session", "key": "k", "label": ""}]
    for number in range(10_000):
        role = "assistant" if number % 2 else "user"
        message = {"role": role, "content": f"message {number} " * 12}
        lines.append({"type": "message", "message": message})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = time.process_time()
    session = section.module.Session(path)
    took = time.process_time() - began
    assert len(session) == 10_000
    assert took < 2


@since("s03")
def test_a_turn_costs_the_same_with_5_000_sessions(desk: Desk):
    desk.run("say one")
    folder = desk.file.parent
    header = desk.file.read_bytes().splitlines(keepends=True)[0]
    costs = []
    for count in (10, 5_000):
        for number in range(count):
            (folder / f"{number:012x}.jsonl").write_bytes(header)
        with desk.screen() as screen:
            screen.wait_for(PROMPT)
            before, read = snapshot(folder.parent), characters_read(screen.pid)
            say(screen, "tools")
            after = snapshot(folder.parent)
            read = characters_read(screen.pid) - read
            shown = say(screen, "/list")
        changed = [path for path in after if after[path] != before.get(path)]
        assert len(changed) == 1 and changed[0].suffix == ".jsonl"
        costs.append((after[changed[0]][0] - before[changed[0]][0], read))
    assert shown.count(".jsonl") == 0 and 15 < len(shown.splitlines()) < 30
    (few, few_read), (many, many_read) = costs
    assert abs(few - many) < 100
    assert many_read < few_read + 100_000


def snapshot(folder: Path) -> dict[Path, tuple]:
    """Size, time and number of each file below a folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


def characters_read(pid: int) -> int:
    with contextlib.suppress(OSError):
        counters = Path(f"/proc/{pid}/io").read_text()
        return int(re.search(r"rchar: (\d+)", counters)[1])
    return 0


SEEDS = [
    " ", "a", "很", "\ud83d\ude00", '"', "\\", "\n", "{", "[", "> ", "> 1", "1",
    "n_ctx", "n_ctx ", "max_", "max_a", "context length ", "context length of of ",
    "context", "input ", "prompt", "prompt exceed", "limit: ", "limit", "length is ",
    "[1, ", "token limit", "tokens allowed (", "input tokens ", "too many input ",
    "maximum ", "</think>", "<think", "9" * 50 + " + ",
]  # fmt: skip


def hostile_texts(size: int) -> Iterator[str]:
    for seed in SEEDS:
        yield seed * (size // len(seed))
    for head in ("n_ctx", "context length ", "max_", "limit ", "> "):
        for seed in (" ", "1", "of ", "a", "_", "1 + "):
            yield head + seed * (size // len(seed)) + "!"


@since("s03")
def test_work_on_a_long_text_is_linear(section):
    """100 kB of any text cost about nothing, wherever the guard reads text."""
    module = section.module
    jobs = {
        "OVERFLOW": module.OVERFLOW.search,
        "STATED_WINDOW": module.STATED_WINDOW.search,
        "estimate_tokens": module.estimate_tokens,
        "cut_tokens": lambda text: module.cut_tokens(text, 500),
        "show": lambda text: module.CONTROL_CHARACTERS.sub("", text),
    }
    slow = []
    for text in hostile_texts(100_000):
        for name, job in jobs.items():
            began = time.process_time()
            job(text)
            took = time.process_time() - began
            if took > 0.25:
                slow.append(f"{name}: {took:.1f} s for {text[:20]!r}")
                break
    assert not slow, "\n".join(slow)


@since("s03")
def test_long_lines_of_a_person(desk: Desk):
    """A label, a command and an argument of 100 kB are no trouble."""
    long = "x y " * 25_000
    began = time.monotonic()
    printed = desk.run(f"/new {long}", f"/list {long}", f"/{long}", f"/compact {long}")
    assert time.monotonic() - began < 10
    assert len(ids(printed)) == 2
    assert desk.remembered("say one") == ["say one", "heard one"]


# --- what is private ---


def is_private(path: Path, top: Path) -> bool:
    """Whether nobody but the owner can read a file, or get to it."""
    if path.stat().st_mode & 0o077 == 0:
        return True
    folders = [each for each in path.parents if each.is_relative_to(top)]
    return any(folder.stat().st_mode & 0o077 == 0 for folder in folders)


@since("s03")
def test_what_is_written_is_private(desk: Desk):
    """At umask 022, only the owner may read what was said, at any moment."""
    before = os.umask(0o022)
    try:
        desk.run("say one", "/new", "say two", "/compact")
        path = desk.files[-1]
        path.write_bytes(path.read_bytes() + b'{"torn')
        desk.run("/list")
    finally:
        os.umask(before)
    own = [*(desk.workspace / ".sessions").rglob("*"), desk.workspace / ".sessions"]
    assert {".torn", ".jsonl", ".json"} <= {path.suffix for path in own}
    for path in own:
        assert is_private(path, desk.workspace), path


@since("s03")
@pytest.mark.parametrize(
    "path",
    [
        "{}",
        "./{}",
        "skills/../{}",
        "link/{}",
        "{folder}/../sessions.json",
        "{absolute}",
    ],
)
def test_tools_cannot_reach_the_sessions(desk: Desk, path: str):
    (desk.workspace / "link").symlink_to(".")
    desk.run("say secret")
    file = desk.file.relative_to(desk.workspace)
    name = path.format(file, folder=file.parent, absolute=desk.file)
    before = snapshot(desk.workspace / ".sessions")
    calls = [
        ("read_file", {"path": name}),
        ("write_file", {"path": name, "content": "gone"}),
        ("edit_file", {"path": name, "old_text": "secret", "new_text": "gone"}),
    ]
    desk.server.script("brain", [ToolCalls(calls), Text("well")])
    desk.run("/new", "go")
    results = [each["content"] for each in desk.sent() if each["role"] == "tool"]
    assert len(results) == 3
    for result in results:
        assert result.startswith("error") and "heard" not in result
    after = snapshot(desk.workspace / ".sessions")
    logs = [each for each in before if each.suffix == ".jsonl"]
    assert all(after[each] == before[each] for each in logs)
