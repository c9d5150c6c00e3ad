"""Checks of the exercises of s03."""

from conftest import Offline
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import Section
from harness import pipe


def type_in(script: Section, env: dict[str, str], *lines: str) -> str:
    """What one run of the script shows while it is told these lines."""
    return pipe(script, "".join(f"{line}\n" for line in lines), env).stdout


def test_s03_rename(script: Section, offline: Offline):
    """Add: `/rename <label>`: `/list` shows the new label, and so does the next start."""
    type_in(script, offline.env, "/new garden", "my cat is Miso", "/rename kitchen")
    shown = type_in(script, offline.env, "what is my cat?", "/list")
    greeting, _, rest = shown.partition("you> ")
    assert "kitchen" in greeting, f"expected kitchen in the greeting; got {greeting!r}"
    answer, _, listed = rest.partition("/list")
    assert "kitchen" in listed, f"expected kitchen in /list; got {listed!r}"
    assert "garden" not in listed, f"expected the old label to be gone; got {listed!r}"
    assert "Miso" in answer, f"expected the same conversation to go on; got {answer!r}"
    type_in(script, offline.env, "/new", "/rename cellar")
    listed = type_in(script, offline.env, "/list")
    assert "kitchen" in listed, f"expected the other session to keep its label; got {listed!r}"


def test_s03_undo(script: Section, offline: Offline):
    """Add: `/undo` takes back your last question and what followed it, for the next run, too."""
    say = ["my cat is Miso", "my dog is Rex", "repeat after me: the end"]
    shown = type_in(script, offline.env, *say, "/undo", "/undo", "what is my dog?")
    answer = shown.rpartition("agent> ")[2]
    assert "Rex" not in answer, f"expected the dog to be forgotten; got {answer!r}"
    shown = type_in(script, offline.env, "what is my dog?", "what is my cat?")
    dog, cat = shown.split("agent> ")[1:3]
    assert "Rex" not in dog, f"expected the dog to be forgotten after a restart; got {dog!r}"
    assert "Miso" in cat, f"expected the cat to be remembered; got {cat!r}"
    asked = type_in(script, offline.env, "/new", "/undo", "how many messages?")
    assert "1 message" in asked, f"expected nothing to take back to be no harm; got {asked!r}"


def test_s03_orphan(script: Section, fake_model: FakeModel):
    """Find: killed while a tool is at work, started again: now every question is refused."""
    call = ToolCalls([("bash", {"command": "make"}), ("bash", {"command": "make install"})])
    fake_model.script(None, [call, Text("Back again.")], repeat=True)
    with Screen(script, fake_model.env()) as screen:
        screen.wait_for("you> ", 30)
        screen.type("build it\n")
        screen.wait_for("[y/N/a]", 30)
        screen.kill()
    shown = type_in(script, fake_model.env(), "where were we?").rpartition("agent> ")[2]
    assert "Back again." in shown, f"expected an answer after the restart; got {shown!r}"
