"""Sessions and the context guard (s03): what was said survives, and never grows too long."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import corpora
import harness
import pytest
from fake_model import Chunks
from fake_model import Error
from fake_model import FakeModel
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_model import check_request
from harness import since

PROMPT = "you> "
WIDE = re.compile(r"\[[#.]+\] ([\d,]+) of ([\d,]+) tokens, (\d+) messages")


class Desk:
    """A section, a workspace, and a scripted model on the other side."""

    def __init__(self, section: harness.Section, workspace: Path, server: FakeModel):
        self.section, self.workspace, self.server = section, workspace, server
        server.script("brain", [brain], repeat=True)
        for file in workspace.glob("*.md"):  # they count, from s06 on
            file.unlink()

    def run(self, *lines: str, status: int = 0, fsize: int | None = None, **env: str) -> str:
        """One run over pipes, ended by quit; what it printed, errors last."""
        settings = self.server.env("brain", APPROVAL="always") | env
        text = "".join(f"{line}\n" for line in (*lines, "quit"))
        done = harness.pipe(self.section, text, settings, fsize=fsize)
        printed = done.stdout + done.stderr
        assert "Traceback" not in printed, printed
        assert done.returncode == status, printed
        return printed

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
        """The messages of a request, without the system prompt that later sections add."""
        return [m for m in self.server.chats[number].messages if m["role"] != "system"]

    def told(self, *lines: str, **env: str) -> list[str]:
        """What a new run sends when it is asked `probe`: all content, in order."""
        self.run(*lines, "probe", status=1, **env)
        return contents(self.sent()[:-1])

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.file.read_bytes().splitlines()]

    def open(self, path: Path):
        """A session file as the script opens it."""
        return self.section.module.Session(self.section.module.Journal(path))


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Desk:
    return Desk(section, workspace, fake_model)


def brain(body: dict):
    """Does what the last user message says; `probe` fails, and so leaves no trace."""
    messages = body["messages"]
    last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    verb, _, rest = last.partition(" ")
    if verb == "hangtool":
        verb, rest = "tools", "sleep 30"
    if verb not in ("probe", "fail") and "tools" not in body:
        return Text("the summary")
    if messages[-1]["role"] == "tool":
        return Error(422) if verb == "toolfail" else Text(f"done {rest}")
    if verb in ("tools", "toolfail"):
        write = ("write_file", {"path": "made.txt", "content": rest or "x"})
        return ToolCalls([("bash", {"command": rest or "echo ran"}), write], text="let me")
    if verb == "read":
        return ToolCalls([("read_file", {"path": rest})])
    if verb in ("probe", "fail"):
        return Error(422)
    if verb == "hang":
        return Stall(2, 20, Text("never seen to its end"))
    return Text(f"heard {rest}")


def contents(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages]


def say(screen: harness.Screen, text: str, timeout: float = 10) -> str:
    """One turn at the terminal: what came between the line and the next prompt."""
    start = len(screen.text)
    screen.type(text + "\n")
    screen.wait_for(text[:60])
    screen.wait_for(PROMPT, timeout)
    return screen.text[start:]


def ids(printed: str) -> list[str]:
    """The sessions that a run told of, in order."""
    return re.findall(r"^(?:you> )?session (\w+)", printed, re.M)


def one_line(printed: str, *parts: str) -> str:
    """The one line that says all of these."""
    lines = [line for line in printed.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, (parts, printed)
    return lines[0]


def next_is_accepted(module, session: list) -> None:
    """The strictest server would take the next question."""
    messages = list(session)
    module.close_turn(messages)
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
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0


@since("s03")
def test_new_list_and_switch(desk: Desk):
    printed = desk.run("say one", "/new with a label", "say two", "/list", "/new", "/list")
    first, second, third = ids(printed)
    assert len({first, second, third}) == 3
    one, two = printed.split("/list")[1:]
    assert re.search(rf"^\* {second} .* with a label$", one, re.M)
    assert re.search(rf"^  {first} ", one, re.M) and one.count("*") == 1
    assert re.search(rf"^\* {third} ", two, re.M) and two.count("*") == 1
    assert desk.told() == []
    assert desk.told(f"/switch {second[:8]}") == ["say two", "heard two"]
    assert desk.told() == ["say two", "heard two"], "the session left last is resumed"
    assert desk.told(f"/switch {first}", f"/switch {first}") == ["say one", "heard one"]


@since("s03")
def test_switch_needs_exactly_one_session(desk: Desk):
    desk.run("say one")
    for number in range(3):
        shutil.copy(desk.file.parent / desk.file.name, desk.workspace / f"x{number}")
    for number in range(3):
        (desk.workspace / f"x{number}").rename(desk.files[0].parent / f"{number:012x}.jsonl")
    printed = desk.run("/switch zz", "/switch 000", "/switch", "/switch *", "/switch ../")
    assert len(re.findall(r"^(?:you> )?\[.*/list.*\]$", printed, re.M)) == 5, printed
    assert not ids(printed)[1:]
    assert desk.told() == ["say one", "heard one"]


@since("s03")
def test_switch_to_a_deleted_session_changes_nothing(desk: Desk):
    first, second = ids(desk.run("say one", "/new", "say two"))
    gone = next(file for file in desk.files if file.stem == first)
    gone.unlink()
    printed = desk.run(f"/switch {first}", "say three")
    assert one_line(printed, "0 sessions")
    assert desk.told() == ["say two", "heard two", "say three", "heard three"]
    assert not gone.exists()


@since("s03")
def test_the_current_session_file_is_deleted(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        say(screen, "say one")
        desk.file.unlink()
        for line in ("/list", "say two", "/new", "/list"):
            assert "Traceback" not in say(screen, line)
    desk.file.unlink()
    assert desk.told("say three") == ["say three", "heard three"]


@since("s03")
def test_help_lists_every_command(desk: Desk):
    printed = desk.run("/help")
    for command in ("/new [label]", "/list", "/switch <id>", "/context", "/compact", "/help"):
        assert re.search(rf"^(?:you> )?{re.escape(command)} +\w", printed, re.M), command
    for usage, about, _ in desk.section.module.COMMANDS.values():
        assert re.search(rf"^(?:you> )?{re.escape(usage)} +{re.escape(about)}$", printed, re.M)


@since("s03")
@pytest.mark.parametrize("line", ["/nope", "/nope really", "/"])
def test_unknown_command_says_so_and_is_not_sent(desk: Desk, line: str):
    assert one_line(desk.run(line, "/context"), line.split()[0], "no command")
    assert not desk.server.chats
    desk.run(f" {line}")
    assert contents(desk.sent()) == [f" {line}"]


@since("s03")
def test_an_error_in_a_command_is_one_line(desk: Desk):
    refusal = Error(422, body=corpora.bare("out of order"))
    desk.server.script("brain", [brain, brain, refusal, brain])
    printed = desk.run("say one", "say more", "/compact", "say two")
    assert one_line(printed, "[", "out of order")
    assert contents(desk.sent()) == ["say one", "heard one", "say more", "heard more", "say two"]


@since("s03")
def test_two_messages_are_not_made_shorter(desk: Desk):
    assert "2 messages" in desk.run("say one", "/compact", "/compact")
    assert len(desk.server.chats) == 1


@since("s03")
def test_context_shows_a_bar_and_numbers(desk: Desk):
    usage = {"prompt_tokens": 900, "completion_tokens": 148, "total_tokens": 1048}
    desk.server.script("brain", [Text("x", usage=usage)])
    printed = desk.run("/context", "hi", "/context", CONTEXT_TOKENS="4096")
    assert "[####................] 9" in printed
    assert " of 4,096 tokens, 2 messages" in printed
    first, second = bars(printed)
    assert 0 < first < 900 < second < 940, "the prompt as the server counted it, and the answer"


# --- the index ---


@since("s03")
@pytest.mark.parametrize(
    "damage",
    [
        None,
        b"",
        b"{",
        b'{"agent:main:main": {"id": "',
        b"\x00" * 200,
        b"\xff\xfe{}",
        b"[1, 2]",
        b"null",
        b"[" * 100_000,
        b"[]",
        b'{"agent:main:main": 3}',
        b'{"agent:main:main": {"id": null}}',
    ],
    ids=lambda damage: repr(damage)[:24],
)
def test_sessions_are_found_again_without_their_index(desk: Desk, damage: bytes | None):
    desk.run("say zero", "/new my label", "say one")
    (key,) = json.loads(desk.index.read_text())
    if damage is None:
        desk.index.unlink()
    else:
        desk.index.write_bytes(damage.replace(b"agent:main:main", key.encode()))
    assert desk.told() == ["say one", "heard one"]
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
        assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
        seen, stop = set(), threading.Event()

        def look() -> None:
            while not stop.is_set():
                seen.add(desk.index.read_bytes())

        reader = threading.Thread(target=look)
        reader.start()
        for number in range(20):
            say(screen, f"/new label {number}")
        stop.set()
        reader.join(5)
        assert len(seen) > 3 and all(json.loads(text) for text in seen)
        last = desk.index.stat()  # the number of a file that is gone may come again
        assert (last.st_mtime_ns, last.st_ino) != (before.st_mtime_ns, before.st_ino)
    assert {p.name for p in desk.index.parent.iterdir()} == {"sessions.json", "sessions"}


# --- crashes ---


def slowly(body: dict):
    """Two tools at once, then an answer; both arrive in small steps."""
    last = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
    item = Text(f"answer to {last}")
    if body["messages"][-1]["role"] == "user":
        write = ("write_file", {"path": "made.txt", "content": last})
        item = ToolCalls([("bash", {"command": "sleep 0.02; echo ran"}), write], text="let me")
    for after in range(1, 5):
        item = Stall(after, 0.008, item)
    return item


@since("s03")
@pytest.mark.costly(last=True)
def test_killed_at_any_moment_50_times(desk: Desk, whole: bool):
    """kill -9 between any two steps: the session resumes, and nothing acknowledged is lost."""
    chance, acknowledged, enough = random.Random(7), [], 10 if whole else 5
    desk.server.script("brain", [slowly], repeat=True)
    for number in range(50):
        if not whole and number >= 20 and len(acknowledged) >= enough:
            break
        with desk.screen() as screen:
            if number % 8 == 7:
                time.sleep(chance.uniform(0, 0.1))
                screen.kill()
                continue
            screen.wait_for(PROMPT)
            deadline = time.monotonic() + chance.uniform(0, 0.5)
            for question in (f"q{number}.{turn}" for turn in range(3)):
                screen.type(question + "\n")
                done = re.compile(rf"answer to {question}\s+{PROMPT}")
                try:
                    screen.wait_for(done, max(deadline - time.monotonic(), 0))
                except AssertionError:
                    assert not screen.ended, screen.text
                    break
                acknowledged.append(question)
            screen.kill()
    desk.run("last")
    # A request that the kill cut off before its body is no request of ours.
    problems = desk.server.problems
    problems[:] = [each for each in problems if "messages is not a list" not in each]
    history = desk.sent()
    places = []
    for question in acknowledged:
        place = next(i for i, m in enumerate(history) if m["content"] == question)
        turn = history[place + 1 : place + 5]
        assert [m["role"] for m in turn] == ["assistant", "tool", "tool", "assistant"], question
        assert len(turn[0]["tool_calls"]) == 2 and "ran" in turn[1]["content"]
        assert turn[3]["content"] == f"answer to {question}"
        places.append(place)
    assert places == sorted(places) and enough <= len(places) <= 140
    text = json.dumps(history)
    assert "interrupted" in text or not whole, "no kill hit a tool call: make the turns slower"


@pytest.mark.guard
@since("s03")
def test_a_killed_turn_says_which_tools_were_interrupted(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        screen.type("hangtool\n")
        screen.wait_for("[bash 'sleep 30']")
        screen.kill()
    desk.run("say next")
    roles = [m["role"] for m in desk.sent()]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert all("interrupted" in content for content in contents(desk.sent())[2:4])
    size = desk.file.stat().st_size
    desk.run("/context")
    assert desk.file.stat().st_size == size, "mended once, and written down"


def sample(desk: Desk) -> list[bytes]:
    """The lines of a session that has one of each record."""
    desk.run("say one", "tools", "fail", "say two", "/compact", "say three", "tools", status=1)
    desk.run("say four")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    kinds = {json.loads(line)["type"] for line in lines}
    assert kinds == {"session", "message", "retraction", "compaction"}
    return lines


@since("s03")
@pytest.mark.costly
def test_torn_at_any_byte(desk: Desk, tmp_path: Path):
    lines, module = sample(desk), desk.section.module
    number = 0
    for end in range(1, len(lines) + 1):
        whole, last = b"".join(lines[: end - 1]), lines[end - 1]
        (tmp_path / f"whole{end}.jsonl").write_bytes(whole)
        expected = list(desk.open(tmp_path / f"whole{end}.jsonl"))
        for cut in range(1, len(last), 1 if end % 6 == 0 else 23):
            number += 1
            path = tmp_path / f"cut{number}.jsonl"
            path.write_bytes(whole + last[:cut])
            session = desk.open(path)
            assert list(session) == expected, (end, cut)
            next_is_accepted(module, session)
            module.close_turn(session)
            session.append({"role": "user", "content": "after"})
            again = list(session)
            session = desk.open(path)
            assert list(session) == again, "the next record is not glued to the torn one"


@since("s03")
@pytest.mark.parametrize("cut", [1, 20, -2, -1])
def test_torn_last_line_at_the_front_door(desk: Desk, cut: int):
    *lines, last, _ = sample(desk)
    assert b"say four" in last
    desk.file.write_bytes(b"".join(lines))
    before = desk.told()
    desk.file.write_bytes(b"".join(lines) + last[:cut])
    assert desk.told("say next") == [*before, "say next", "heard next"]
    assert desk.told() == [*before, "say next", "heard next"]


@since("s03")
@pytest.mark.parametrize("text", [b"", b'{"type": "sess', b"\x00" * 64, b"\n", b"\n\n{}\n"])
def test_a_file_without_a_header(desk: Desk, text: bytes):
    desk.run("say one")
    desk.file.write_bytes(text)
    assert desk.told("/list", "/context", "say two") == ["say two", "heard two"]
    assert desk.told("/list") == ["say two", "heard two"]
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
}
SHAPES = {
    "no message": {"type": "message"},
    "message is a list": {"type": "message", "message": []},
    "no role": {"type": "message", "message": {"content": "x"}},
    "odd role": {"type": "message", "message": {"role": "robot", "content": "x"}},
    "no content": {"type": "message", "message": {"role": "user"}},
    "null calls": {
        "type": "message",
        "message": {"role": "assistant", "content": "x", "tool_calls": None},
    },
    "odd calls": {
        "type": "message",
        "message": {"role": "assistant", "content": "x", "tool_calls": [{}]},
    },
    "no messages": {"type": "compaction"},
    "odd messages": {"type": "compaction", "messages": [1]},
    "empty messages": {"type": "compaction", "messages": [{}]},
    "odd used": {
        "type": "message",
        "message": {"role": "user", "content": "x"},
        "used": "many",
    },
    "unknown": {"type": "weather", "sun": True},
    "no type": {"a": 1},
}


def survives(desk: Desk, lines: list[bytes], expected: list[str]) -> str:
    """Resume a damaged file: what is whole is sent, in order, and the request is accepted."""
    desk.file.write_bytes(b"".join(lines))
    printed = desk.run("/context", "probe", status=1)
    found = iter(contents(desk.sent()))
    missing = [text for text in expected if text not in found]
    assert not missing, (missing, contents(desk.sent()))
    return printed


@since("s03")
@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.costly
def test_garbage_in_the_middle(desk: Desk, kind: str):
    desk.run("say one", "tools", "say two")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    expected = contents(json.loads(line)["message"] for line in lines[1:])
    for place in (0, 1, 5, len(lines) - 1):
        printed = survives(desk, [*lines[:place], GARBAGE[kind], *lines[place:]], expected)
        assert one_line(printed, desk.file.name, "damaged")


@since("s03")
@pytest.mark.parametrize("kind", SHAPES)
def test_json_of_another_shape_in_the_middle(desk: Desk, kind: str):
    desk.run("say one", "tools", "say two")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    expected = contents(json.loads(line)["message"] for line in lines[1:])
    if kind == "odd used":
        expected = expected[-2:]
    wrong = json.dumps(SHAPES[kind]).encode() + b"\n"
    survives(desk, [*lines[:-2], wrong, *lines[-2:]], expected)


@since("s03")
@pytest.mark.parametrize("header", [b"[1]\n", b'{"key": [1], "label": 5}\n', b'{"key": null}\n'])
def test_a_damaged_header_and_no_index(desk: Desk, header: bytes):
    desk.run("say one")
    lines = desk.file.read_bytes().splitlines(keepends=True)
    desk.index.unlink()
    desk.file.write_bytes(b"".join([header, *lines[1:]]))
    desk.run("/list", "/new", "/list", f"/switch {desk.file.stem}", "say two")
    assert contents(desk.sent()) == ["say one", "heard one", "say two"]


@since("s03")
@pytest.mark.parametrize("twice", [False, True], ids=["deleted", "doubled"])
def test_one_line_deleted_or_doubled(desk: Desk, tmp_path: Path, twice: bool):
    lines, problems = sample(desk), []
    whole = contents(desk.open(shutil.copy(desk.file, tmp_path / "whole.jsonl")))
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b"".join(lines[:number] + [line] * 2 * twice + lines[number + 1 :]))
        try:
            session = desk.open(path)
            next_is_accepted(desk.section.module, session)
            if twice:
                kept = iter(contents(session))
                assert all(text in kept for text in whole), contents(session)
        except Exception as error:
            problems.append(f"line {number + 1}, {line[:90]!r}: {error!r}"[:400])
    assert not problems, "\n".join(problems)


@since("s03")
def test_crlf_line_ends(desk: Desk):
    desk.run("say one", "tools")
    before = desk.told()
    desk.file.write_bytes(desk.file.read_bytes().replace(b"\n", b"\r\n"))
    assert desk.told() == before
    assert desk.told() == before


# --- one process at a time, and what else may be wrong with the workspace ---


@pytest.mark.guard
@since("s03")
def test_a_second_process_is_told_who_holds_the_workspace(desk: Desk, tmp_path: Path):
    other = tmp_path / "link"
    other.symlink_to(desk.workspace)
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        for place in (desk.workspace, other):
            printed = desk.run("say no", status=1, WORKSPACE_DIR=str(place))
            assert one_line(printed, f" {screen.pid}", "in use")
        assert not desk.server.chats
        screen.type("hangtool\n")
        screen.wait_for("[bash 'sleep 30']")
        os.kill(screen.pid, 9)
        screen.process.wait(10)
        printed = desk.run("say next")
        assert "heard next" in printed
        assert one_line(printed, "session ").startswith("session ")


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
def test_a_workspace_that_cannot_be_written(desk: Desk, spoil: Callable[[Path], None]):
    spoil(desk.workspace)
    printed = desk.run(status=1)
    assert len(printed.strip().splitlines()) == 1, printed
    assert str(desk.workspace) in printed


@since("s03")
def test_a_workspace_in_proc(desk: Desk):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    printed = desk.run(status=1, WORKSPACE_DIR="/proc/self")
    assert one_line(printed.strip(), "/proc/", ".lock")


FULL = re.compile(r"^\[.*(disk is full|No space|too large).*\]$", re.M)


@since("s03")
@pytest.mark.parametrize("room", [0, 10, 60, 120, 250, 400, 700])
def test_a_full_disk(desk: Desk, room: int):
    """A file may not grow any more: a line says so, nothing accepted is lost, and it goes on."""
    desk.run("say one", "tools")
    before = desk.told()
    size = desk.file.stat().st_size
    with desk.screen(fsize=size + room) as screen:
        screen.wait_for(PROMPT)
        seen = []
        while not seen or not FULL.search(seen[-1]):
            seen.append(say(screen, f"say {len(seen)}"))
        for line in ("/compact", "tools", "say it"):
            assert one_line(say(screen, line).replace("you> [", "["), "[")
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
    after = desk.told("say next")
    said = [f"{verb} {number}" for number in range(len(seen) - 1) for verb in ("say", "heard")]
    assert after[: len(before) + len(said)] == before + said
    assert after[-2:] == ["say next", "heard next"]


@since("s03")
@pytest.mark.parametrize("room", range(0, 900, 90))
@pytest.mark.costly
def test_a_disk_that_fills_up_in_a_turn_with_tools(desk: Desk, room: int):
    desk.run("say one")
    with desk.screen(fsize=desk.file.stat().st_size + room) as screen:
        screen.wait_for(PROMPT)
        seen = [say(screen, line) for line in ("tools", "say two", "/new", "tools", "say three")]
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
    assert "Traceback" not in "".join(seen)
    desk.run("/list")
    first = min(desk.files, key=lambda file: file.stat().st_ctime_ns).stem
    after = desk.told(f"/switch {first}", "say next")
    assert after[:2] == ["say one", "heard one"]
    assert after[-2:] == ["say next", "heard next"]


@since("s03")
@pytest.mark.parametrize("room", [0, 30, 60, 100])
def test_a_disk_that_is_full_at_the_start(desk: Desk, room: int):
    printed = desk.run(status=1, fsize=room)
    assert len(printed.strip().splitlines()) == 1, printed
    assert desk.told("say one") == ["say one", "heard one"]


# --- replay equals memory ---


def held_and_replayed(desk: Desk, screen: harness.Screen, **env: str) -> tuple[str, str]:
    """The next request is the same before and after a restart; what /context says, twice."""
    say(screen, "probe")
    held, bar = desk.sent(), say(screen, "/context")
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0
    printed = desk.run("/context", "probe", status=1, **env)
    assert desk.sent() == held
    return WIDE.search(bar)[0], WIDE.search(printed)[0]


@since("s03")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.costly(last=True)
def test_replay_equals_memory(desk: Desk, seed: int):
    chance = random.Random(seed)
    (desk.workspace / "big.txt").write_text("many words, 很多的话. " * 700, encoding="utf-8")
    verbs = ["say", "fail", "tools", "toolfail", "hang", "hangtool", "/compact", "read big.txt"]
    with desk.screen(CONTEXT_TOKENS="4096") as screen:
        screen.wait_for(PROMPT)
        for number in range(14):
            verb = chance.choice(verbs) if number >= len(verbs) else verbs[number - seed]
            if verb.startswith("hang"):
                screen.type(verb + "\n")
                screen.wait_for("never" if verb == "hang" else "[bash 'sleep 30']")
                screen.press("ctrl-c")
                screen.wait_for("stopped]")
                screen.wait_for(PROMPT)
            else:
                lone = verb in ("/compact", "read big.txt")
                say(screen, verb if lone else f"{verb} {number}".replace("tools ", "tools echo "))
        held, replayed = held_and_replayed(desk, screen, CONTEXT_TOKENS="4096")
    assert held == replayed
    kinds = {record["type"] for record in desk.records()}
    assert kinds == {"session", "message", "retraction", "compaction"}
    assert "shortened" in desk.file.read_text(encoding="utf-8")


@since("s03")
def test_compact_is_recorded_and_deletes_nothing(desk: Desk):
    desk.run("say one", "say two", "tools")
    before = desk.file.read_bytes()
    printed = desk.run("/compact", "say three")
    assert "the summary" in json.dumps(desk.sent()[:-1])
    assert not {"say one", "heard one", "say two"} & set(contents(desk.sent()))
    assert desk.file.read_bytes().startswith(before)
    assert WIDE.search(printed)
    held = contents(desk.sent())
    assert desk.told()[: len(held)] == held
    calls = len(desk.server.chats)
    assert WIDE.search(desk.run("/new", "/compact"))[3] == "0"
    assert len(desk.server.chats) == calls, "there was nothing to summarize"


# --- the guard ---


def small(url: str) -> Callable[[dict], object]:
    """offline-small behind the fake model, so that its requests are kept and checked."""

    def answer(body: dict):
        if body["messages"][-1]["content"] == "probe":
            return Error(422)
        more = {"model": "offline-small", "stream": False}
        body = {key: value for key, value in body.items() if key != "stream_options"} | more
        headers = {"Authorization": "Bearer offline", "Content-Type": "application/json"}
        ask = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(ask, timeout=30) as reply:
                found = json.load(reply)
        except urllib.error.HTTPError as error:
            return Error(error.code, body=json.load(error))
        choice, usage = found["choices"][0], found["usage"]
        message = choice["message"]
        calls = [each["function"] for each in message.get("tool_calls") or ()]
        if not calls:
            return Text(message["content"], choice["finish_reason"], usage=usage)
        return ToolCalls([(call["name"], call["arguments"]) for call in calls], usage=usage)

    return answer


@since("s03")
@pytest.mark.parametrize("window", ["4096", ""], ids=["told", "untold"])
@pytest.mark.costly
def test_60_turns_in_a_small_window(desk: Desk, offline, window: str):
    desk.server.script("brain", [small(offline.url)], repeat=True)
    chance = random.Random(3)
    words = {
        "en": "a line of plain words. ",
        "zh": "这是一行很普通的中文。",
        "ja": "日本語の文章。",
    }
    lines = ["my name is Ada and my city is Turin"]
    for number in range(58):
        name, size = f"f{number}.txt", chance.randrange(1_000, 30_000)
        text = words[chance.choice(list(words))]
        (desk.workspace / name).write_text(text * (size // len(text.encode())), encoding="utf-8")
        both = f"read {name} and f{chance.randrange(number + 1)}.txt"
        lines.append(chance.choice([f"read {name}", both, f"read {name}", f"say {number}"]))
    with desk.screen(CONTEXT_TOKENS=window) as screen:
        screen.wait_for(PROMPT)
        for line in lines:
            seen = say(screen, line, 30)
            assert not re.search(r"^\[.*(error|too long|Error)", seen, re.M | re.I), seen
        assert "Your name is Ada" in say(screen, "what is my name?")
        bar_held, bar_replayed = held_and_replayed(desk, screen, CONTEXT_TOKENS=window)
    assert bars(bar_held) == bars(bar_replayed)
    why = {record["why"] for record in desk.records() if record["type"] == "compaction"}
    assert why == {"shortened", "summarized"}
    assert "Your city is Turin" in desk.run("what is my city?", CONTEXT_TOKENS=window)


@since("s03")
@pytest.mark.parametrize("window", ["4096", ""], ids=["told", "untold"])
def test_context_is_the_same_after_a_server_said_how_much_it_takes(desk: Desk, window: str):
    (desk.workspace / "big.txt").write_text("some words " * 2500)
    desk.server.script("brain", [overflowing(TOO_BIG)], repeat=True)
    with desk.screen(CONTEXT_TOKENS=window) as screen:
        screen.wait_for(PROMPT)
        for line in ("say one", "read big.txt", "say now"):
            say(screen, line)
        held, replayed = held_and_replayed(desk, screen, CONTEXT_TOKENS=window)
    assert held == replayed


OVERFLOWS = {
    name: failure for name, failure in corpora.ERRORS.items() if failure.kind == "overflow"
}
OTHERS = {name: failure for name, failure in corpora.ERRORS.items() if failure.kind != "overflow"}
LM_STUDIO = corpora.ERRORS["lmstudio"].body
OVERFLOWS_200 = {
    "in the stream": Chunks([LM_STUDIO], done=False),
    "in the stream, late": Chunks([corpora.says(""), LM_STUDIO], done=False),
    "in place of the stream": Json200(LM_STUDIO),
}


def overflowing(failure: object, times: int = 1) -> Callable[[dict], object]:
    """`say now` overflows some times; all else goes well."""
    left = [times]

    def answer(body: dict):
        if body["messages"][-1]["content"] == "say now" and left[0]:
            left[0] -= 1
            return failure
        return brain(body)

    return answer


def meets(desk: Desk, answer: Callable, status: int, **env: str) -> tuple[str, int, list[str]]:
    """A question into a long history: the screen, the calls it cost, and why it was rewritten."""
    (desk.workspace / "big.txt").write_text("some words " * 2500)
    desk.run("say one", "read big.txt", "say two")
    calls = len(desk.server.chats)
    desk.server.script("brain", [answer], repeat=True)
    printed = desk.run("say now", status=status, **env)
    why = [record["why"] for record in desk.records() if record["type"] == "compaction"]
    return printed, len(desk.server.chats) - calls, why


@since("s03")
@pytest.mark.parametrize("stream", ["true", "false"], ids=["stream", "whole"])
@pytest.mark.parametrize("name", [*OVERFLOWS, *OVERFLOWS_200])
def test_overflow_makes_room(desk: Desk, name: str, stream: str):
    failure = OVERFLOWS_200.get(name)
    if failure and stream == "false":
        failure = Json200(LM_STUDIO)
    failure = failure or Error(OVERFLOWS[name].status, {}, OVERFLOWS[name].body)
    options = json.dumps({"stream": stream == "true"})
    printed, calls, why = meets(desk, overflowing(failure), 0, MODEL_OPTIONS=options)
    assert "heard now" in printed
    assert calls >= 2 and why
    sizes = [len(json.dumps(chat.messages)) for chat in desk.server.chats[-calls:]]
    assert sizes[-1] < sizes[0]
    for chat in desk.server.chats[-calls:]:
        assert ("stream_options" in chat.body) == (stream == "true")
        assert chat.body.get("stream_options", {"include_usage": True})["include_usage"]


TRAPS = {
    "tokens per minute": Error(
        429,
        {"Retry-After": "1"},
        corpora.error(
            "Rate limit reached for gpt-4o in organization org-x on tokens per min (TPM): Limit"
            " 30000, Used 29000, Requested 5000. Please try again in 8s.",
            "rate_limit_exceeded",
            "tokens",
        ),
    ),
    "request too large per minute": Error(
        429,
        {},
        corpora.error(
            "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000."
            " The input or output tokens must be reduced in order to run successfully.",
            "rate_limit_exceeded",
            "tokens",
        ),
    ),
    "authentication token": Error(
        401, {}, corpora.error("Invalid authentication token: context length 0", "invalid_token")
    ),
    "forbidden": Error(403, {}, corpora.bare("the token may not use this context window")),
    "unknown parameter": Error(
        400,
        {},
        corpora.error(
            "Unrecognized request argument supplied: context_length",
            "unknown_parameter",
            corpora.INVALID,
            "context_length",
        ),
    ),
    "gpt4all": Error(500, {}, ""),
}


@since("s03")
@pytest.mark.parametrize("name", [*OTHERS, *TRAPS])
def test_other_errors_rewrite_nothing_and_are_not_answered(desk: Desk, name: str):
    trap = TRAPS.get(name)
    trap = trap or Error(OTHERS[name].status, OTHERS[name].headers, OTHERS[name].body)
    printed, calls, why = meets(desk, overflowing(trap, 99), 1)
    passes = trap.status in (408, 409) or trap.status >= 500 or trap.status == 429
    is_final = (
        "insufficient_quota" in json.dumps(trap.body) or trap.headers.get("Retry-After") == "300"
    )
    tries = 3 if desk.section.label >= "s09" and passes and not is_final else 1
    assert (calls, why) == (tries, [])
    assert "heard now" not in printed
    assert "say now" not in desk.told()


TOO_BIG = Error(400, {}, corpora.ERRORS["e400ctx"].body)


@since("s03")
def test_overflow_in_the_summary_itself(desk: Desk):
    """The summary of a summary call that is too long is made from smaller pieces."""
    summaries = []

    def answer(body: dict):
        size = len(json.dumps(body["messages"]))
        if "tools" not in body:
            summaries.append(size)
            return TOO_BIG if size > 8_000 else Text("the summary")
        return TOO_BIG if size > 12_000 else brain(body)

    said = [f"say {number} {'words ' * 400}" for number in range(12)]
    desk.run(*said)
    desk.server.script("brain", [answer], repeat=True)
    assert "heard now" in desk.run("say now")
    assert max(summaries) > 8_000 > summaries[-1]
    assert "the summary" in json.dumps(desk.sent())


@since("s03")
def test_a_server_that_always_overflows(desk: Desk):
    """A clear end after a bounded number of calls; the question is taken back."""
    printed, calls, _ = meets(desk, lambda body: TOO_BIG, 1)
    assert 1 < calls < 30
    assert "context length" in printed or "/new" in printed
    desk.server.script("brain", [brain], repeat=True)
    assert desk.told()[:2] == ["say one", "heard one"]
    assert "heard now" in desk.run("/new", "say now")


@since("s03")
@pytest.mark.parametrize("way", ["/compact", "say now"])
def test_a_summary_that_fails_changes_nothing(desk: Desk, way: str):
    def answer(body: dict):
        return brain(body) if "tools" in body else Error(422, body=corpora.bare("out of order"))

    desk.server.script("brain", [answer], repeat=True)
    said = [f"say {number} {'words ' * 100}" for number in range(20)]
    desk.run(*said)
    before = desk.told()
    printed = desk.run(way, CONTEXT_TOKENS="4096", status=int(way != "/compact"))
    assert one_line(printed, "[", "out of order")
    assert desk.told() == before
    desk.server.script("brain", [brain], repeat=True)
    assert "heard now" in desk.run("say now", CONTEXT_TOKENS="4096")
    assert "the summary" in json.dumps(desk.sent())


@since("s03")
@pytest.mark.parametrize("window", ["4096", ""], ids=["told", "untold"])
def test_one_over_long_question(desk: Desk, window: str):
    """Refused with a way out, taken back, and gone for good."""

    def answer(body: dict):
        return TOO_BIG if len(json.dumps(body["messages"])) > 16_000 else brain(body)

    desk.server.script("brain", [answer], repeat=True)
    long = "say " + "over and over " * 3_000
    printed = desk.run("say one", long, "say two", status=1, CONTEXT_TOKENS=window)
    assert one_line(printed.replace(long, ""), "[", "/new")
    assert desk.told() == ["say one", "heard one", "say two", "heard two"]
    assert len(desk.server.chats) <= 8
    assert not window or all(len(json.dumps(c.messages)) < 16_000 for c in desk.server.chats)


def estimated(body: dict) -> int:
    """The tokens of a request, counted by a rule that is not the script's own."""
    text = json.dumps([body["messages"], body.get("tools", [])], ensure_ascii=False)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return (len(text) - wide) // 4 + wide * 4 // 5


@since("s03")
@pytest.mark.parametrize("text", ["plain words, one after the other. ", "这是一行很普通的中文。"])
def test_a_call_that_is_sure_to_overflow_is_not_sent(desk: Desk, text: str):
    """Ollama never complains, it forgets: no request may be larger than CONTEXT_TOKENS."""
    (desk.workspace / "big.txt").write_text(text * (12_000 // len(text)), encoding="utf-8")
    lines = ["read big.txt", "say one", f"say {text * 10}", "read big.txt", "read big.txt"]
    desk.run(*lines, *[f"say {number} {text * 10}" for number in range(25)], CONTEXT_TOKENS="4096")
    sizes = [estimated(chat.body) for chat in desk.server.chats]
    assert max(sizes) <= 4096 * 1.05, sizes
    assert max(sizes) > 2000


# --- usage ---


def usage(total: object) -> dict:
    return {"prompt_tokens": total, "completion_tokens": 1, "total_tokens": total}


def bars(printed: str) -> list[int]:
    return [int(used.replace(",", "")) for used, *_ in WIDE.findall(printed)]


@since("s03")
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_the_servers_count_or_an_estimate(desk: Desk, stream: bool):
    words = "plain words " * 200
    script = [Text("x", usage=usage(777)), Text(words), Text("y"), Text("z", usage=usage(1234))]
    desk.server.script("brain", script)
    options = json.dumps({"stream": stream})
    lines = ["hi", "/context", "hi", "/context", "hi", "/context", "hi", "/context"]
    first, second, third, last = bars(desk.run(*lines, MODEL_OPTIONS=options))
    assert 777 < first < 777 + 20, "what the server counted, and the answer"
    assert 1234 < last < 1234 + 20
    assert 777 + 300 < second < 777 + 1800, "an answer without usage is estimated on top"
    assert second < third < second + 100


@since("s03")
@pytest.mark.parametrize("total", [None, "many", "12", {}, [], -5, 0, True, 1.5, 10**15])
def test_garbage_in_usage(desk: Desk, total: object):
    script = [Text("x", usage=usage(total)), Text("y", usage=usage(total)), Text("z")]
    desk.server.script("brain", script)
    printed = desk.run("hi", "/context", "hi", "/context")
    assert all(used >= 1 for used in bars(printed)), printed
    assert "z" in desk.run("/context", "hi").split("agent> ")[1]


@since("s03")
def test_a_usage_that_is_no_object(desk: Desk):
    chunks = [corpora.says("x"), corpora.STOPPED, corpora.envelope([], usage="many")]
    desk.server.script("brain", [Chunks(chunks), Text("y")])
    assert "y" in desk.run("hi", "/context", "hi").split("agent> ")[2]


@since("s03")
def test_thoughts_that_the_server_counted_are_no_reason_to_give_up(desk: Desk):
    """total_tokens holds reasoning that is never sent back: little history, yet a full count."""
    desk.server.script("brain", [Text("x", usage=usage(4_500)), brain], repeat=True)
    assert "heard two" in desk.run("hi", "say two", CONTEXT_TOKENS="4096")
    assert "heard three" in desk.run("say three", CONTEXT_TOKENS="4096")


GPT4O = {  # text and count as OpenAI published them for o200k ("Hello GPT-4o", May 2024)
    "English": (
        "Hello, my name is GPT-4o. I'm a new type of language model, it's nice to meet you!",
        24,
    ),
    "German": (
        "Hallo, mein Name is GPT-4o. Ich bin ein neues KI-Sprachmodell. Es ist schön, dich"
        " kennenzulernen.",
        29,
    ),
    "French": (
        "Bonjour, je m'appelle GPT-4o. Je suis un nouveau type de modèle de langage, c'est un"
        " plaisir de vous rencontrer!",
        28,
    ),
    "Russian": (
        "Привет, меня зовут GPT-4o. Я — новая языковая модель, приятно познакомиться!",
        23,
    ),
    "Chinese": ("你好，我的名字是GPT-4o。我是一种新型的语言模型，很高兴见到你!", 24),
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
    found = section.module.estimate(text)
    assert tokens / 1.6 <= found <= tokens * 1.6, (found, tokens)


# --- the journal ---


@since("s03")
def test_appends_from_many_threads(section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All there, each intact, in each thread's order; on disk when append returns; syncs shared."""
    path, real, synced, syncs = tmp_path / "j.jsonl", os.fdatasync, [0], []

    def fdatasync(fd: int) -> None:
        size = os.fstat(fd).st_size
        time.sleep(0.002)
        real(fd)
        syncs.append(size)
        synced[0] = max(synced[0], size)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    journal, returned = section.module.Journal(path), {}

    def write(thread: int) -> None:
        for number in range(25):
            text = "很" * (number * 37 % 400)
            journal.append({"thread": thread, "number": number, "text": text})
            returned[thread, number] = synced[0]

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    end, early = 0, []
    for line in path.read_bytes().splitlines(keepends=True):
        end, record = end + len(line), json.loads(line)
        if returned[record["thread"], record["number"]] < end:
            early.append(record)
    assert not early, "append returned before its record was synced"
    assert len(syncs) < 16 * 25 / 2
    records = section.module.Journal(path).replay()
    assert len(records) == 16 * 25
    for thread in range(16):
        numbers = [r["number"] for r in records if r["thread"] == thread]
        assert numbers == list(range(25))
    assert all(r["text"] == "很" * (r["number"] * 37 % 400) for r in records)


@since("s03")
def test_one_sync_per_append(section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, syncs = os.fdatasync, []
    monkeypatch.setattr(os, "fdatasync", lambda fd: (syncs.append(fd), real(fd)))
    journal = section.module.Journal(tmp_path / "j.jsonl")
    for number in range(10):
        journal.append({"number": number})
        assert len(syncs) == number + 1


def half(fd: int, data: bytes) -> int:
    return REAL_WRITE(fd, data[: len(data) // 2])


def nothing(*args: object) -> int:
    raise OSError(28, "No space left on device")


REAL_WRITE = os.write


@since("s03")
@pytest.mark.parametrize(
    ("call", "fault"), [("write", half), ("write", nothing), ("fdatasync", nothing)]
)
def test_append_after_one_that_failed(
    section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fault: Callable
):
    """An append that could not write has added nothing; after any failure the next one works."""
    journal = section.module.Journal(tmp_path / "j.jsonl")
    journal.append({"number": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fault)
        with pytest.raises(OSError):
            journal.append({"number": 2})
    journal.append({"number": 3})
    kept = [{"number": n} for n in ((1, 2, 3) if call == "fdatasync" else (1, 3))]
    assert section.module.Journal(tmp_path / "j.jsonl").replay() == kept


# --- what it costs ---


@since("s03")
def test_replay_of_10_000_messages(desk: Desk, tmp_path: Path):
    path = tmp_path / "long.jsonl"
    lines = [{"type": "session", "version": 1, "key": "k", "label": ""}]
    for number in range(10_000):
        role = "assistant" if number % 2 else "user"
        message = {"role": role, "content": f"message {number} " * 12}
        lines.append({"type": "message", "message": message, "used": 0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    began = time.process_time()
    session = desk.open(path)
    took = time.process_time() - began
    print(f"10,000 messages in {took:.3f} s")
    assert len(session) == 10_000
    assert took < 2


@since("s03")
def test_a_turn_costs_the_same_with_5_000_sessions(desk: Desk):
    desk.run("say one")
    folder, lines = desk.file.parent, desk.file.read_bytes().splitlines(keepends=True)
    costs = []
    for count in (10, 5_000):
        for number in range(count):
            (folder / f"{number:012x}.jsonl").write_bytes(lines[0])
        with desk.screen() as screen:
            screen.wait_for(PROMPT)
            before, read = snapshot(folder.parent), characters_read(screen.pid)
            say(screen, "tools")
            after = snapshot(folder.parent)
            read = characters_read(screen.pid) - read
        changed = [path for path in after if after[path] != before.get(path)]
        assert len(changed) == 1 and changed[0].suffix == ".jsonl"
        costs.append((after[changed[0]][0] - before[changed[0]][0], read))
    (few, few_read), (many, many_read) = costs
    assert abs(few - many) < 100
    assert many_read < few_read + 100_000


def snapshot(folder: Path) -> dict[Path, tuple]:
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


def characters_read(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])
    return 0


# --- what is private ---


@pytest.mark.guard
@since("s03")
@pytest.mark.parametrize(
    "path", ["{}", "./{}", "skills/../{}", "link/{}", "{}/../sessions.json", "{absolute}"]
)
def test_tools_cannot_reach_the_sessions(desk: Desk, path: str):
    (desk.workspace / "link").symlink_to(".")
    desk.run("say secret")
    file = desk.file.relative_to(desk.workspace)
    name = path.format(file.parent if "json" in path else file, absolute=desk.file)
    before = snapshot(desk.workspace / ".sessions")
    calls = [
        ("read_file", {"path": name}),
        ("write_file", {"path": name, "content": "gone"}),
        ("edit_file", {"path": name, "old_text": "secret", "new_text": "gone"}),
    ]
    desk.server.script("brain", [ToolCalls(calls), Text("well")])
    desk.run("/new", "go")
    results = [m["content"] for m in desk.sent() if m["role"] == "tool"]
    assert len(results) == 3
    for result in results:
        assert result.startswith("error") and "heard" not in result
    after = snapshot(desk.workspace / ".sessions")
    assert all(after[p] == before[p] for p in before if p.suffix == ".jsonl")


@since("s03")
def test_user_data_is_ignored_by_git():
    paths = ["workspace/.sessions/x", "workspace/.lock"]
    if not (harness.REPO / ".git").exists():
        pytest.skip("no git repository")
    done = subprocess.run(
        ["git", "check-ignore", *paths], cwd=harness.REPO, capture_output=True, text=True
    )
    assert done.stdout.split() == paths


@pytest.mark.guard
@since("s03")
def test_what_is_written_is_private(desk: Desk):
    """Only the owner may read what was said."""
    desk.run("say one", "/new", "say two")
    for path in (*desk.files, desk.workspace / ".sessions"):
        assert path.stat().st_mode & 0o077 == 0 or path.is_dir() and path.parent != path


@since("s03")
@pytest.mark.parametrize(
    "worthless",
    [ToolCalls([("bash", {"command": "true"})]), Text("The", finish="content_filter"), Text("")],
    ids=["calls", "filtered", "empty"],
)
def test_a_worthless_summary_replaces_nothing(desk: Desk, worthless: object):
    def answer(body: dict):
        return brain(body) if "tools" in body else worthless

    desk.server.script("brain", [answer], repeat=True)
    desk.run("say one", "say two")
    before = desk.told()
    assert one_line(desk.run("/compact"), "[no summary", "/new")
    desk.server.script("brain", [brain], repeat=True)
    assert desk.told() == before


@since("s03")
def test_a_command_survives_any_answer(desk: Desk):
    desk.run("say one", "say more")
    desk.server.script("brain", [Json200({"choices": 5}), brain], repeat=False)
    assert "heard two" in desk.run("/compact", "say two", MODEL_OPTIONS='{"stream": false}')


@since("s03")
def test_a_refusal_that_quotes_the_question_is_no_overflow(desk: Desk):
    quoted = {"detail": [{"loc": ["body"], "input": "what is a context window?"}]}
    desk.server.script("brain", [Error(422, body=quoted), Error(400, body=quoted), brain])
    desk.run("what is a context window?", "and now?", "say two", status=1)
    assert len(desk.server.chats) == 3, "one call each"
    assert {record["type"] for record in desk.records()} == {"session", "message", "retraction"}


@since("s03")
def test_a_file_removed_while_in_use_is_told(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for(PROMPT)
        say(screen, "say one")
        desk.file.unlink()
        assert "removed while in use" in say(screen, "say two")
        assert "heard two" not in screen.text
        assert "session" in say(screen, "/new")
        assert "heard three" in say(screen, "say three")


@since("s03")
def test_a_damaged_question_takes_no_other_message_along(desk: Desk):
    """The retraction of a question that the file lost must not take back what was answered."""
    desk.run("say one", "fail now", "say two", status=1)
    lines = desk.file.read_bytes().splitlines(keepends=True)
    (place,) = [n for n, line in enumerate(lines) if b"fail now" in line]
    lines[place] = b"garbage\n"
    desk.file.write_bytes(b"".join(lines))
    assert desk.told() == ["say one", "heard one", "say two", "heard two"]


@since("s03")
def test_a_learned_window_holds_for_one_setting(desk: Desk):
    def answer(body: dict):
        return TOO_BIG if len(json.dumps(body["messages"])) > 9_000 else brain(body)

    desk.server.script("brain", [answer], repeat=True)
    said = [f"say {number} {'words ' * 300}" for number in range(8)]
    learned = WIDE.findall(desk.run(*said, "/context", CONTEXT_TOKENS="20000"))[0][1]
    assert int(learned.replace(",", "")) < 9_000
    assert WIDE.findall(desk.run("/context", CONTEXT_TOKENS="20000"))[0][1] == learned
    assert WIDE.findall(desk.run("/context", CONTEXT_TOKENS="2000"))[0][1] == "2,000"
    assert WIDE.findall(desk.run("/context", CONTEXT_TOKENS="64000"))[0][1] == "64,000"


@since("s03")
def test_no_summary_for_a_question_that_cannot_fit(desk: Desk):
    desk.run(*(f"say {number} {'words ' * 100}" for number in range(8)))
    assert "/new" in desk.run("say " + "words " * 2_200, CONTEXT_TOKENS="4096", status=1)
    assert "compaction" not in {record["type"] for record in desk.records()}


@since("s03")
@pytest.mark.costly
def test_a_dense_text_counts_as_the_server_counts_it(desk: Desk):
    """Digits take four times the estimate: what the server counted holds after a rewrite, too."""
    sizes = []

    def answer(body: dict):
        sizes.append(len(json.dumps(body["messages"])))
        reply = brain(body)
        if isinstance(reply, Text):
            reply = Text(reply.text, usage={"prompt_tokens": sizes[-1], "total_tokens": 0})
        return reply

    desk.server.script("brain", [answer], repeat=True)
    said = [f"say {'7 ' * 400}" for _ in range(12)]
    desk.run(*said, CONTEXT_TOKENS="4096")
    assert max(sizes[2:]) < 4_500, sizes
