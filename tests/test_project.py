"""What the project says of itself: its requirements, README.md, and the companions."""

import os
from collections.abc import Iterable
from pathlib import Path

import check_docs
import check_steps
import pytest
import transcripts
from harness import NEXT
from harness import REPO
from harness import sections

README = REPO / "README.md"
COMPANIONS = sorted((REPO / "sessions").glob("*.py"))
TRANSCRIPTS = [
    pytest.param(block, id=f"line-{block.line}")
    for block in check_docs.blocks(README.read_text(encoding="utf-8"), "console")
]


def none(problems: Iterable[str]) -> None:
    """Fail with all complaints at once."""
    found = list(problems)
    assert not found, "\n" + "\n".join(found)


def test_requirements():
    none(check_steps.requirement_problems([*sections(), *sections(NEXT)], REPO))


@pytest.mark.parametrize("path", COMPANIONS, ids=lambda path: path.stem)
def test_encoding_of_the_companions(path: Path):
    none(check_steps.encoding_problems(path))


def test_readme():
    none(check_docs.link_problems(README, REPO))
    none(check_docs.path_problems(README, REPO))
    text = README.read_text(encoding="utf-8")
    none(check_docs.readme_problems(text, sections()))


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and a shell")
@pytest.mark.parametrize("block", TRANSCRIPTS)
def test_transcripts_of_the_readme(block: check_docs.Block, tmp_path: Path):
    found = transcripts.problems(block.text, tmp_path)
    assert not found, f"\n{found}"
