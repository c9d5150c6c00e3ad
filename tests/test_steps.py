"""The ladder holds: a section is the one before plus one idea, in plain code."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

import check_steps
import harness
import pytest
from harness import NEXT
from harness import REPO
from harness import Section

TOML = Path(__file__).with_name("steps.toml")
STEPS = tomllib.loads(TOML.read_text(encoding="utf-8"))
SECTIONS = harness.sections(NEXT)
PAIRS = list(zip([None, *SECTIONS], SECTIONS, strict=False))
PROGRAMS = ["offline_model.py", "check_model.py", "trace.py"]
COMPANIONS = [REPO / "sessions" / name for name in PROGRAMS]
NODES = {  # at most so many new nodes of the syntax tree
    "s01": 1100,
    "s02": 2000,
    "s03": 2550,
    "s04": 5800,
    "s05": 4000,
    "s06": 3300,
    "s07": 3000,
    "s08": 1500,
    "s09": 1800,
    "s10": 1500,
}
SURVIVAL = dict.fromkeys(NODES, 0.99) | {
    "s02": 0.94,
    "s03": 0.98,
    "s04": 0.98,
}
DENSITY, KNOTS, LENGTH = 6.3, 7, 45
each_pair = pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=[section.label for section in SECTIONS]
)
each_section = pytest.mark.parametrize("lesson", SECTIONS, ids=lambda s: s.label)
each_script = pytest.mark.parametrize(
    "path",
    [*(s.path for s in SECTIONS), *(path for path in COMPANIONS if path.exists())],
    ids=lambda path: path.stem,
)


def none(problems: Iterable[str]) -> None:
    """Fail with all complaints at once."""
    found = list(problems)
    assert not found, "\n" + "\n".join(found)


def step(section: Section) -> dict:
    """What steps.toml says of a section."""
    return STEPS.get(section.label, {})


def test_sections_are_numbered_without_gaps():
    labels = [section.label for section in SECTIONS]
    assert labels == [f"s{number:02}" for number in range(1, len(labels) + 1)]


@each_pair
def test_declared(before: Section | None, after: Section):
    assert step(after).get("title"), f"steps.toml: [{after.label}] has no title"
    assert step(after).get("idea"), f"steps.toml: [{after.label}] has no idea"
    reasons = {**step(after).get("touches", {}), **step(after).get("elsewhere", {})}
    assert all(reasons.values()), f"steps.toml: a reason of {after.label} is empty"
    none(check_steps.title_problems(after, step(after)["title"], step(after)["idea"]))


@each_pair
def test_budget(before: Section | None, after: Section):
    none(check_steps.budget_problems(before, after, NODES[after.label]))
    if before:
        least = SURVIVAL[after.label]
        none(check_steps.survival_problems(before, after, least))


@each_script
def test_plain(path: Path):
    none(check_steps.density_problems(path, DENSITY, KNOTS))
    none(check_steps.length_problems(path, LENGTH))


@each_pair
def test_touches(before: Section | None, after: Section):
    touches = step(after).get("touches", {})
    if before:
        none(check_steps.touch_problems(before, after, touches))
    else:
        assert not touches


@each_pair
def test_bands(before: Section | None, after: Section):
    none(check_steps.band_problems(before, after, step(after).get("title")))
    elsewhere = step(after).get("elsewhere", {})
    none(check_steps.place_problems(before, after, elsewhere))


@each_section
def test_header_and_imports(lesson: Section):
    none(check_steps.header_problems(lesson))
    none(check_steps.standalone_problems(lesson))


@each_section
def test_encoding(lesson: Section):
    none(check_steps.encoding_problems(lesson.path))


def test_importing_does_nothing_else(
    section: Section, tmp_path: Path, env: dict[str, str], workspace: Path
):
    none(check_steps.import_effects(section, tmp_path, env, workspace))
