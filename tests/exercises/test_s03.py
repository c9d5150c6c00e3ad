"""Checks of the exercises of s03."""

from pathlib import Path

from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import Section
from harness import pipe

READ = ToolCalls([("read_file", {"path": "SOUL.md"})])


def run(script: Section, fake_model: FakeModel, items: list, *lines: str) -> list[str]:
    """The texts of the last request after these lines. The items are the answers."""
    fake_model.script(None, items, repeat=True)
    pipe(script, "".join(f"{line}\n" for line in lines), fake_model.env())
    assert fake_model.chats, "expected a request to the model; got none"
    return [message["content"] for message in fake_model.chats[-1].messages]


def test_s03_export(script: Section, fake_model: FakeModel, workspace: Path):
    """Add: /export writes the questions and answers to export.md in the workspace."""
    answers = [Text("Nice cat."), READ, Text("It is kind.")]
    run(script, fake_model, answers, "my cat is Miso", "what is in SOUL.md?", "/export")
    file = workspace / "export.md"
    assert file.is_file(), "expected a file export.md; got none"
    text = file.read_text(encoding="utf-8")
    position = 0
    for part in ("my cat is Miso", "Nice cat.", "what is in SOUL.md?", "It is kind."):
        position = text.find(part, position)
        assert position >= 0, f"expected {part!r}, in its place; got {text!r}"
    soul = (workspace / "SOUL.md").read_text(encoding="utf-8").splitlines()[0]
    assert soul not in text, f"expected no results of tools; got {text!r}"


def test_s03_undo(script: Section, fake_model: FakeModel):
    """Add: /undo takes back the last question and what followed, for good."""
    answer = [Text("Noted.")]
    sent = run(script, fake_model, answer, "cat", "dog", "/undo", "and now?")
    wanted = ["cat", "Noted.", "and now?"]
    assert sent == wanted, f"expected {wanted} after /undo; got {sent}"
    sent = run(script, fake_model, answer, "again")
    wanted += ["Noted.", "again"]
    assert sent == wanted, f"expected {wanted} after a restart; got {sent}"
    answers = [READ, Text("It is kind."), Text("Noted.")]
    sent = run(script, fake_model, answers, "/new", "read it", "/undo", "hello")
    assert sent == ["hello"], f"expected a turn with a tool to be gone; got {sent}"
    sent = run(script, fake_model, answer, "/new", "/undo", "hello")
    assert sent == ["hello"], f"expected /undo to do nothing if all is new; got {sent}"


def test_s03_torn(script: Section, fake_model: FakeModel, workspace: Path):
    """Find: a crash tears the log's last line; two starts later a question is gone."""
    answer = [Text("Noted.")]
    run(script, fake_model, answer, "one")
    (log,) = (workspace / ".sessions").rglob("*.jsonl")
    with open(log, "ab") as stream:
        stream.write(b'{"type": "message", "mess')
    run(script, fake_model, answer, "two")
    sent = run(script, fake_model, answer, "three")
    wanted = ["one", "Noted.", "two", "Noted.", "three"]
    assert sent == wanted, f"expected {wanted}; got {sent}"
