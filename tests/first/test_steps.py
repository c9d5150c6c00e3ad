"""The ladder holds: each section is the one before plus one idea, declared in steps.toml."""

import tomllib
from collections.abc import Iterable
from pathlib import Path

import check_steps
import pytest
from harness import NEXT
from harness import REPO
from harness import Section
from harness import sections

STEPS = tomllib.loads(Path(__file__).with_name("steps.toml").read_text(encoding="utf-8"))
SECTIONS = sections()
PAIRS = list(zip([None, *SECTIONS], SECTIONS, strict=False))
# Non-blank lines: ceilings, so that no section grows unnoticed. s04 holds two whole platforms.
LINES = {
    "s01": 219,
    "s02": 347,
    "s03": 411,
    "s04": 835,
    "s05": 569,
    "s06": 761,
    "s07": 648,
    "s08": 372,
    "s09": 355,
    "s10": 392,
}
SURVIVAL = dict.fromkeys(LINES, 0.97) | {"s02": 0.93, "s03": 0.93}
each_pair = pytest.mark.parametrize(
    ("before", "after"), PAIRS, ids=[section.label for section in SECTIONS]
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


@each_pair
def test_size(before: Section | None, after: Section):
    none(check_steps.size_problems(before, after, LINES[after.label]))
    if before:
        none(check_steps.survival_problems(before, after, SURVIVAL[after.label]))


@each_pair
def test_touches(before: Section | None, after: Section):
    if before is None:
        assert not step(after).get("touches")
    else:
        none(check_steps.touch_problems(before, after, step(after).get("touches", {})))


@each_pair
def test_bands(before: Section | None, after: Section):
    none(check_steps.band_problems(before, after, step(after).get("title")))
    none(check_steps.place_problems(before, after, step(after).get("elsewhere", {})))


def test_header_and_imports(section: Section):
    none(check_steps.header_problems(section))
    none(check_steps.standalone_problems(section))


def test_requirements():
    if not SECTIONS:
        pytest.skip("no sections yet")
    both = [*SECTIONS, *sections(NEXT)]
    none(check_steps.requirement_problems(both, REPO))


def test_encoding(section: Section):
    none(check_steps.encoding_problems(section.path))


def test_importing_does_nothing_else(
    section: Section, tmp_path: Path, env: dict[str, str], workspace: Path
):
    none(check_steps.import_effects(section, tmp_path, env, workspace))
