"""The docs tell the truth: excerpts, transcripts, figures, names, links."""

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

import check_docs
import pytest
import transcripts
from harness import REPO
from harness import Section
from harness import sections

STEPS = tomllib.loads(Path(__file__).with_name("steps.toml").read_text(encoding="utf-8"))
SECTIONS = sections()
HEADINGS = [
    "The problem",
    "The picture",
    "What changes",
    "How it works",
    "Try it",
    "Break it",
    "Exercises",
    "How OpenClaw does it",
    "Left out on purpose",
    "Next",
]
LENGTH = range(120, 221)
DOCUMENTED = [
    (before, after)
    for before, after in zip([None, *SECTIONS], SECTIONS, strict=False)
    if after.doc.exists()
]
each_doc = pytest.mark.parametrize(
    ("before", "after"), DOCUMENTED, ids=[after.label for _, after in DOCUMENTED]
)
TRANSCRIPTS = [
    pytest.param(block, id=f"{path.stem[:3]}-line-{block.line}")
    for path in (after.doc for _, after in DOCUMENTED)
    for block in check_docs.blocks(path.read_text(encoding="utf-8"), "console")
]


def none(path: Path, problems: Iterable[str]) -> None:
    """Fail with all complaints at once."""
    found = [f"{path.name}: {problem}" for problem in problems]
    assert not found, "\n" + "\n".join(found)


def text_of(section: Section) -> str:
    return section.doc.read_text(encoding="utf-8")


@each_doc
def test_excerpts(before: Section | None, after: Section):
    none(after.doc, check_docs.excerpt_problems(text_of(after), after.source))


@each_doc
def test_shape(before: Section | None, after: Section):
    none(after.doc, check_docs.length_problems(text_of(after), LENGTH))
    none(after.doc, check_docs.heading_problems(text_of(after), HEADINGS))


@each_doc
def test_figures(before: Section | None, after: Section):
    none(after.doc, check_docs.figure_problems(text_of(after), before, after))


@each_doc
def test_names(before: Section | None, after: Section):
    touches = STEPS.get(after.label, {}).get("touches", {})
    none(after.doc, check_docs.name_problems(text_of(after), before, after, touches))


@each_doc
def test_links_and_paths(before: Section | None, after: Section):
    none(after.doc, check_docs.link_problems(after.doc, REPO))
    none(after.doc, check_docs.path_problems(after.doc, REPO))


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and a shell")
@pytest.mark.parametrize("block", TRANSCRIPTS)
@pytest.mark.costly
def test_transcripts(block: check_docs.Block, tmp_path: Path):
    found = transcripts.problems(block.text, tmp_path)
    assert not found, f"\n{found}"
