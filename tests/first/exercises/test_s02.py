"""Checks of the exercises of s02."""

from pathlib import Path

from conftest import Offline
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import Section
from harness import pipe


def test_s02_memory(script: Section, offline: Offline, workspace: Path):
    """Add: a tool `memory_write` with one text parameter adds a line to `notes.txt`."""
    told = ["the shop closes at six", "the key is under the mat"]
    done = pipe(script, "".join(f"remember that {fact}\n" for fact in told), offline.env)
    file = workspace / "notes.txt"
    assert file.is_file(), f"expected a file notes.txt; got no file, and {done.stdout[-300:]!r}"
    notes = file.read_text(encoding="utf-8").splitlines()
    kept = len(notes) == 2 and all(fact in note for fact, note in zip(told, notes, strict=True))
    assert kept, f"expected a line for each of {told}; got {notes}"


def test_s02_cut(script: Section, fake_model: FakeModel):
    """Find: one tool call comes cut off in its middle, and from then on every question fails."""
    cut = ToolCalls([("write_file", '{"path": "a.txt", "content": "onc')])
    fake_model.script(None, [cut, Text("Better.")], repeat=True)
    done = pipe(script, "write a long story\nhello?\n", fake_model.env())
    second = done.stdout.rpartition("hello?")[2]
    assert "Better." in second, f"expected the next question to be answered; got {second!r}"


def test_s02_link(script: Section, fake_model: FakeModel, workspace: Path):
    """Find: the agent reads your diary, which lies outside of the workspace: `diary/may.txt`."""
    (workspace.parent / "home" / "may.txt").write_text("dear diary", encoding="utf-8")
    (workspace / "diary").symlink_to(workspace.parent / "home")
    (workspace / "june.txt").write_text("dear reader", encoding="utf-8")
    (workspace / "latest.txt").symlink_to("june.txt")
    calls = [("read_file", {"path": path}) for path in ("diary/may.txt", "latest.txt")]
    fake_model.script(None, [ToolCalls(calls), Text("Done.")], repeat=True)
    pipe(script, "what does it say?\n", fake_model.env())
    outside, inside = (message["content"] for message in fake_model.chats[-1].messages[-2:])
    assert outside.startswith("error"), f"expected diary/may.txt to be refused; got {outside!r}"
    assert "dear reader" in inside, f"expected latest.txt to be read; got {inside!r}"
