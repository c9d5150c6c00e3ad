"""s01 and s03 with a real model.

It is small: what it says does not count, only that turns end.
Not collected by default: run.py prepares what it needs, and runs it.
"""

import json
import os
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from fake_model import check_history

PYTHON = os.environ.get("REAL_MODEL_PYTHON")
SERVER = Path(__file__).with_name("server.py")
PROMPT = "you> "
QUESTIONS = ["hello", "what is the capital of France?", "write one line about the sea"]
BAR = re.compile(r"([\d,]+) of ([\d,]+) tokens, messages: (\d+)")


class RealServer:
    """llama.cpp with a window of so many tokens."""

    def __init__(self, window: int, log: Path):
        command = [PYTHON, str(SERVER), str(window)]
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        assert ready, log.read_text(errors="replace")
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url.startswith("http"), log.read_text(errors="replace")

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


def serve(window: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not PYTHON:
        pytest.skip("start it with: python tests/real/run.py")
    server = RealServer(window, tmp_path_factory.mktemp("real") / "server.log")
    yield server.url
    server.stop()


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose window holds every conversation here."""
    yield from serve(8192, tmp_path_factory)


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose window is soon full."""
    yield from serve(1024, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose window one long question fills."""
    yield from serve(512, tmp_path_factory)


def settings(env: dict[str, str], url: str, **more: str) -> dict[str, str]:
    model = {
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": f"{url}/v1",
        "MODEL_ID": "smollm2",
    }
    return env | model | {"APPROVAL": "never"} | more


def section_of(label: str) -> harness.Section:
    (found,) = [each for each in harness.sections(harness.NEXT) if each.label == label]
    return found


def records(workspace: Path) -> list[dict]:
    (file,) = (workspace / ".sessions").rglob("*.jsonl")
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def messages(workspace: Path) -> list[dict]:
    """The conversation that a session file says."""
    found: list[dict] = []
    for record in records(workspace):
        if record["type"] == "message":
            found.append(record["message"])
        elif record["type"] == "compaction":
            found = record["messages"]
        elif record["type"] == "retraction":
            del found[record["to"] :]
    for message in found:
        message.pop("extras", None)
    return found


def answers(printed: str) -> list[str]:
    """What stands between an `agent>` and the next prompt."""
    turns = re.findall(r"^agent> (.*?)^you> ", printed, re.M | re.S)
    return [turn.strip() for turn in turns]


@pytest.mark.parametrize("stream", ["true", "false"], ids=["stream", "whole"])
@pytest.mark.parametrize("label", ["s01", "s03"])
def test_three_turns_over_a_pipe(roomy, env, workspace, label: str, stream: str):
    options = json.dumps({"stream": stream == "true"})
    text = "\n".join([*QUESTIONS, "quit"]) + "\n"
    given = settings(env, roomy, MODEL_OPTIONS=options)
    done = harness.pipe(section_of(label), text, given, timeout=300)
    print(done.stdout + done.stderr)
    assert done.returncode == 0 and not done.stderr
    said = answers(done.stdout)
    assert len(said) == 3 and all(said)
    assert not any(each.startswith("[HTTP") for each in said)
    if label == "s03":
        check_history(messages(workspace))
        roles = [each["role"] for each in messages(workspace)]
        assert roles.count("user") == 3 and roles[-1] == "assistant"


@pytest.mark.parametrize("label", ["s01", "s03"])
def test_three_turns_on_a_terminal(roomy, env, workspace, label: str):
    """The answer arrives in pieces; /context counts as the server does."""
    with harness.Screen(section_of(label), settings(env, roomy)) as screen:
        screen.wait_for(PROMPT)
        growth = set()
        for question in QUESTIONS:
            screen.type(question + "\n")
            screen.wait_for("agent> ", 60)
            before = len(screen.raw)
            while not screen.raw.endswith(PROMPT):
                assert screen.wait_change(before, 120), screen.text
                before = len(screen.raw)
                growth.add(before)
            screen.wait_for(PROMPT, 60)
        assert len(growth) > 15, "it streams"
        if label == "s03":
            screen.type("/context\n")
            used = screen.wait_for(BAR, 10)
            assert int(used[1].replace(",", "")) > 50
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
        print(screen.text)
    if label == "s03":
        check_history(messages(workspace))


def test_ctrl_c_in_an_answer(roomy, env, workspace):
    with harness.Screen(section_of("s03"), settings(env, roomy)) as screen:
        screen.wait_for(PROMPT)
        screen.type("tell me a long story\n")
        screen.wait_for(re.compile(r"agent> \w"), 60)
        screen.press("ctrl-c")
        screen.wait_for("[stopped", 10)
        screen.wait_for(PROMPT)
        screen.type("hello\n")
        screen.wait_for(re.compile(r"agent> [^\n]+[\s\S]*you> "), 120)
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
    check_history(messages(workspace))


STORY = (
    "Here is a part of a story, remember it: "
    + "the ship sailed on over the sea. " * 20
)


def test_a_conversation_that_outgrows_the_window(narrow, env, workspace):
    """The server states its window: it is kept, and the conversation goes on."""
    lines = [f"{number}. {STORY}" for number in range(6)]
    text = "\n".join([*lines, "/context", "hello", "quit"]) + "\n"
    given = settings(env, narrow, CONTEXT_TOKENS="128000")
    began = time.monotonic()
    done = harness.pipe(section_of("s03"), text, given, timeout=500)
    print(done.stdout.replace(STORY, "STORY") + done.stderr)
    print(f"{time.monotonic() - began:.0f} s")
    assert done.returncode == 0 and not done.stderr
    kinds = [record["type"] for record in records(workspace)]
    stated = {each["tokens"] for each in records(workspace) if each["type"] == "window"}
    assert stated == {1024} and kinds.count("window") == 1
    assert "compaction" in kinds
    assert BAR.search(done.stdout)[2] == "1,024"
    said = answers(done.stdout)
    assert len(said) == 7 and all(said)
    assert not any("HTTP" in each or "too long" in each for each in said)
    check_history(messages(workspace))
    again = harness.pipe(section_of("s03"), "/context\nquit\n", given)
    assert BAR.search(again.stdout)[2] == "1,024", "it is known after a restart"


def test_a_question_that_fits_no_window(tiny, env, workspace):
    """One line with the way out; the question is taken back, and the loop goes on."""
    text = "\n".join(["hello", STORY * 4, "hello", "/new", "hello", "quit"]) + "\n"
    given = settings(env, tiny, CONTEXT_TOKENS="128000")
    done = harness.pipe(section_of("s03"), text, given, timeout=300)
    print(done.stdout + done.stderr)
    assert done.returncode == 0 and not done.stderr
    first, refused, second, third = answers(done.stdout)
    assert re.fullmatch(r"\[.*too long.*/new.*\]", refused.splitlines()[-1])
    for each in (first, second, third):
        assert each and not each.startswith("[")
