"""Checks of the exercises of s02."""

from pathlib import Path

from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import Section
from harness import pipe


def results(fake_model: FakeModel) -> list[str]:
    """The results of tools in the last request."""
    messages = fake_model.chats[-1].messages
    return [message["content"] for message in messages if message["role"] == "tool"]


def names_in(listing: str) -> list[str]:
    """The names in a listing, however folders are marked."""
    return [line.strip().removeprefix("./").rstrip("/") for line in listing.split("\n")]


def test_s02_list(script: Section, fake_model: FakeModel, workspace: Path):
    """Add: a tool list_files lists what matches a pattern, in the workspace only."""
    (workspace / ".hidden").write_text("mine", encoding="utf-8")
    (workspace.parent / "outside.md").write_text("mine", encoding="utf-8")
    patterns = [{}, {"pattern": "**/*.md"}, {"pattern": "../*"}]
    calls = ToolCalls([("list_files", arguments) for arguments in patterns])
    fake_model.script(None, [calls, Text("Done.")], repeat=True)
    pipe(script, "list the files\n", fake_model.env())
    every, markdown, outside = results(fake_model)
    names = names_in(every)
    for name in ("SOUL.md", "CRON.json", "skills"):
        assert name in names, f"no pattern: expected a line {name}; got {every!r}"
    assert ".hidden" not in every, f"expected no dot files; got {every!r}"
    skill = "skills/example-skill/SKILL.md"
    names = names_in(markdown)
    assert skill in names, f"**/*.md: expected a line {skill}; got {markdown!r}"
    assert "CRON.json" not in names, f"**/*.md: expected no CRON.json; got {markdown!r}"
    assert "outside.md" not in outside, f"../*: expected no outside.md; got {outside!r}"


def test_s02_repeat(script: Section, fake_model: FakeModel, workspace: Path):
    """Add: in a turn, the third of equal tool calls gets an error as its result."""
    call = ToolCalls([("bash", {"command": "echo x >> count.txt"})])
    other = ToolCalls([("bash", {"command": "echo y >> count.txt"})])
    answers = [call, call, call, other, call, Text("Done."), call, Text("Done.")]
    fake_model.script(None, answers, repeat=True)
    pipe(script, "one?\ntwo?\n", fake_model.env(APPROVAL="always"))
    given = results(fake_model)
    assert len(given) == 6, f"expected a result for each of 6 calls; got {given}"
    third, _, fifth = given[2:5]
    for which, result in (("third", third), ("fourth", fifth)):
        problem = f"expected an error for the {which} time; got {result!r}"
        assert result.startswith("error"), problem
    file = workspace / "count.txt"
    ran = file.read_text(encoding="utf-8").split()
    wanted = ["x", "x", "y", "x"]
    problem = f"expected two runs, another call's, and one in the next turn: {wanted}"
    assert ran == wanted, f"{problem}; got {ran}"


def test_s02_refused(script: Section, fake_model: FakeModel):
    """Find: you say no to a command, and the server answers with HTTP 400."""
    calls = ToolCalls(
        [("bash", {"command": "make"}), ("read_file", {"path": "SOUL.md"})]
    )
    fake_model.script(None, [calls, Text("Then not.")], repeat=True)
    shown = pipe(script, "build it\n", fake_model.env()).stdout
    assert "Then not." in shown, f"expected an answer after the refusal; got {shown!r}"
    refused, *rest = results(fake_model)
    assert rest, f"expected a result for each of two calls; got {[refused]}"
    assert refused.startswith("error"), f"expected an error first; got {refused!r}"
