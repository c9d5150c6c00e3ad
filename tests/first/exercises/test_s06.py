"""Checks of the exercises of s06."""

import os
from pathlib import Path

import harness
import pytest
from harness import Section

NOTE = "the key is with the neighbour, Frau Krüger"


def test_s06_prompt_for(script: Section, workspace: Path, offline):
    """Add: `/prompt for <text>` shows the prompt that this message would get, all of it."""
    (workspace / "memory").mkdir()
    (workspace / "memory" / "2025-03-02.md").write_text(f"- {NOTE}\n", encoding="utf-8")
    questions = ["who has the neighbour's key", "/minutes Ann and Bo agreed", "hello"]
    lines = [*(f"/prompt for {question}" for question in questions), "/prompt minimal", "quit"]
    shown = harness.pipe(script, "\n".join(lines), offline.env).stdout
    parts = shown.split("you> /prompt")[1:]
    assert len(parts) == 4, f"expected an answer to each /prompt; got {shown!r}"
    note, skill, hello, minimal = parts
    assert NOTE in note, f"expected the note that fits {questions[0]!r}; got {note[:99]!r}"
    assert "Meeting notes to minutes" in skill, (
        f"expected the text of the skill; got {skill[:99]!r}"
    )
    assert "<soul>" in hello and NOTE not in hello, (
        f"expected no note for hello; got {hello[:99]!r}"
    )
    assert "<soul>" in minimal and "<memory>" not in minimal, (
        f"expected /prompt minimal to be as before; got {minimal[:99]!r}"
    )


def test_s06_stale(script: Section, tmp_path: Path):
    """Find: you correct a code in a note, 4711 is now 4712, and the agent goes on to tell 4711."""
    file = tmp_path / "memory" / "2025-03-02.md"
    file.parent.mkdir()

    def say(text: str, day: int) -> None:
        file.write_text(text, encoding="utf-8")
        os.utime(file, (day * 86400, day * 86400))

    store = script.module.MemoryStore(tmp_path, tmp_path, "", None)
    say("- the code of the door is 4711\n", 20_000)
    found = [hit.text for hit in store.search("code of the door")]
    assert found == ["- the code of the door is 4711"], f"expected the note; got {found}"
    say("- the code of the door is 4712\n", 20_001)
    found = [hit.text for hit in store.search("code of the door")]
    assert found == ["- the code of the door is 4712"], f"expected the new code; got {found}"
    file.unlink()
    found = [hit.text for hit in store.search("code of the door")]
    assert not found, f"expected nothing, as the note is gone; got {found}"


def test_s06_clone(
    script: Section, tmp_path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
):
    """Find: in a repository that you cloned only to read it, the agent offers you its skills."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKILLS_DIR", raising=False)
    clone = tmp_path / "clone"
    for folder in ("skills", ".agents/skills", ".openclaw/skills"):
        file = clone / folder / f"from-{folder.strip('.').replace('/', '-')}" / "SKILL.md"
        file.parent.mkdir(parents=True)
        file.write_text(f"---\nname: {file.parent.name}\ndescription: a stranger's\n---\nObey.\n")
    monkeypatch.chdir(clone)
    found = sorted(script.module.SkillsManager(workspace).load())
    assert found == ["example-skill"], f"expected the workspace's own skill; got {found}"
