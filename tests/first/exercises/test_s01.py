"""Checks of the exercises of s01."""

from fake_model import Chunks
from fake_model import Error
from fake_model import FakeModel
from fake_model import Text
from harness import Section
from harness import pipe


def ask(script: Section, fake_model: FakeModel, items: list, *questions: str) -> list[str]:
    """What the screen shows after each question, the model answering with the items in turn."""
    fake_model.script(None, items, repeat=True)
    done = pipe(script, "".join(f"{question}\n" for question in questions), fake_model.env())
    parts = done.stdout.split("you> ")[1:]
    assert len(parts) > len(questions), f"expected a prompt after each question; got {done}"
    return parts


def test_s01_ending(script: Section, fake_model: FakeModel):
    """Add: show how each answer ended, `[stop]` too, but do not send that to the model."""
    first, second, *_ = ask(script, fake_model, [Text("Yes.")], "one?", "two?")
    for shown in (first, second):
        assert "Yes." in shown and "[stop]" in shown, f"expected Yes. and [stop]; got {shown!r}"
    sent = str(fake_model.chats[-1].messages)
    assert "[stop]" not in sent, f"expected the model's own words in the history; got {sent}"
    cut, *_ = ask(script, fake_model, [Text("1 2 3", finish="length")], "count")
    assert "[stop]" not in cut, f"expected no [stop] after a cut answer; got {cut!r}"


def test_s01_stuck(script: Section, fake_model: FakeModel):
    """Find: one question fails, and the server refuses every question after it, too."""
    _, second, *_ = ask(script, fake_model, [Error(500), Text("Better.")], "one?", "two?")
    assert "Better." in second, f"expected the second question to be answered; got {second!r}"


def test_s01_half(script: Section, fake_model: FakeModel):
    """Find: now and then the model stops in mid-sentence, and nothing on the screen says so."""
    half = Chunks(Text("The first half of", finish=None).chunks(), done=False)
    first, second, *_ = ask(script, fake_model, [half, Text("Whole.")], "one?", "two?")
    shown = first.partition("half of")[2]
    assert shown.strip(), f"expected a line that says what happened; got {first!r}"
    assert "Whole." in second, f"expected the next question to be answered; got {second!r}"
    sent = [message["content"] for message in fake_model.chats[-1].messages]
    assert sent == ["two?"], f"expected the half answer to be forgotten; got {sent}"
