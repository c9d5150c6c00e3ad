"""The docs tell the truth: excerpts, data, transcripts, names and links."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import check_docs
import pytest
import transcripts
from conftest import Offline
from harness import NEXT
from harness import REPO
from harness import Section
from harness import pipe
from harness import sections

SECTIONS = [section for section in sections(NEXT) if section.doc.exists()]
# What a doc may name besides its script: programs, settings, exercises.
BESIDE = [
    *REPO.glob("sessions/*.py"),
    *REPO.glob("tests/exercises/*.py"),
    REPO / ".env.example",
    REPO / "README.md",
]
HEADINGS = ["The problem", "Try it", "Exercises", "How OpenClaw does it"]
each_doc = pytest.mark.parametrize("lesson", SECTIONS, ids=lambda s: s.label)
TRANSCRIPTS = [
    pytest.param(block, id=f"{section.label}-line-{block.line}")
    for section in SECTIONS
    for block in check_docs.blocks(check_docs.read(section.doc), "console")
]


def none(section: Section, problems: Iterable[str]) -> None:
    """Fail with all complaints at once."""
    found = [f"{section.doc.name}: {problem}" for problem in problems]
    assert not found, "\n" + "\n".join(found)


@each_doc
def test_excerpts(lesson: Section):
    doc = check_docs.read(lesson.doc)
    none(lesson, check_docs.excerpt_problems(doc, lesson.source))


@each_doc
def test_layout(lesson: Section):
    doc = check_docs.read(lesson.doc)
    none(lesson, check_docs.heading_problems(doc, HEADINGS))
    none(lesson, check_docs.width_problems(doc))


@each_doc
def test_data(lesson: Section):
    doc = check_docs.read(lesson.doc)
    none(lesson, check_docs.json_problems(doc))
    values = vars(lesson.module)
    none(lesson, check_docs.schema_problems(doc, values.get("TOOLS", [])))
    none(lesson, check_docs.constant_problems(doc, values))


@each_doc
def test_names(lesson: Section):
    doc = check_docs.read(lesson.doc)
    sources = [lesson.source, *map(check_docs.read, BESIDE)]
    none(lesson, check_docs.stale_name_problems(doc, sources))


@each_doc
def test_links_and_paths(lesson: Section):
    none(lesson, check_docs.link_problems(lesson.doc, REPO))
    none(lesson, check_docs.path_problems(lesson.doc, REPO))


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal and a shell")
@pytest.mark.parametrize("block", TRANSCRIPTS)
@pytest.mark.costly
def test_transcripts(block: check_docs.Block, tmp_path: Path):
    found = transcripts.problems(block.text, tmp_path, is_next=True)
    assert not found, f"\n{found}"


@pytest.mark.skipif(not SECTIONS, reason="there are no docs")
def test_the_smallest_agent(offline: Offline, tmp_path: Path):
    """The program that s01 begins with does what the doc says it does."""
    doc = check_docs.read(SECTIONS[0].doc)
    program, *_ = check_docs.blocks(doc, "py")
    path = tmp_path / "tiny.py"
    url = re.search(r'base_url="(.*?)"', program.text)[1]
    path.write_text(program.text.replace(url, offline.url), encoding="utf-8")
    after = doc[doc.index(program.text) :]
    shown, *_ = check_docs.blocks(after, "text")
    typed = re.findall(r"^you> (.*)", shown.text, re.MULTILINE)
    done = pipe(path, "".join(f"{line}\n" for line in typed), offline.env)
    answers = re.findall(r"^agent> (.*)", shown.text, re.MULTILINE)
    assert re.findall(r"agent> (.*)", done.stdout) == answers
