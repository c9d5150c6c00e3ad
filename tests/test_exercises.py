"""The exercises: each check fails on the unsolved script and passes on the solved one."""

import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import harness
import pytest
from harness import REPO
from harness import Section

FOLDER = REPO / "tests" / "exercises"
plant = harness.load(FOLDER / "plant.py")
EXERCISES = plant.exercises()
CHECKS = {
    name.removeprefix("test_"): check
    for path in sorted(FOLDER.glob("test_s*.py"))
    for name, check in vars(harness.load(path)).items()
    if name.startswith("test_")
}
each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
each_section = pytest.mark.parametrize("lesson", harness.sections(), ids=lambda s: s.label)


def script_of(exercise, solved: bool) -> str:
    """The section, solved or not, as a reader would have it."""
    if solved == exercise.is_planted:
        return plant.section_of(exercise.label).read_text(encoding="utf-8")
    return exercise.changed()


def run_check(exercise, solved: bool, request: pytest.FixtureRequest) -> None:
    """Call a check with its fixtures, on a copy of the section."""
    path = request.getfixturevalue("tmp_path") / f"{exercise.label}_mine.py"
    path.write_text(script_of(exercise, solved), encoding="utf-8", newline="\n")
    check = CHECKS[exercise.id]
    names = [name for name in inspect.signature(check).parameters if name != "script"]
    check(script=Section(path), **{name: request.getfixturevalue(name) for name in names})


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", timeout=100)


def run_plant(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(FOLDER / "plant.py", *arguments)


@each
def test_the_unsolved_fails(exercise, request: pytest.FixtureRequest):
    with pytest.raises((AssertionError, pytest.fail.Exception)) as failure:
        run_check(exercise, False, request)
    told = str(failure.value)
    assert told and "\n" not in told, f"no line says what was expected: {told}"
    if "fake_model" in inspect.signature(CHECKS[exercise.id]).parameters:
        request.getfixturevalue("fake_model").problems.clear()


@each
def test_the_solved_passes(exercise, request: pytest.FixtureRequest):
    run_check(exercise, True, request)


def test_each_check_has_an_answer():
    assert sorted(CHECKS) == [exercise.id for exercise in EXERCISES]
    for exercise in EXERCISES:
        assert exercise.answer["kind"] in ("add", "find"), exercise.id
        assert len(exercise.answer["why"]) > 80, f"{exercise.id}: why?"
        assert exercise.task, f"{exercise.id}: what is the task?"


@each_section
def test_a_section_has_two_or_three_of_both_kinds(lesson: Section):
    kinds = Counter(e.answer["kind"] for e in EXERCISES if e.label == lesson.label)
    assert kinds.total() in (2, 3) and abs(kinds["add"] - kinds["find"]) < 2, kinds


@each_section
def test_the_doc_names_the_checks(lesson: Section):
    chapter = re.split("^## ", lesson.doc.read_text(encoding="utf-8"), flags=re.M)
    text = next(part for part in chapter if part.startswith("Exercises"))
    wanted = [f"`{e.id}`" for e in EXERCISES if e.label == lesson.label]
    wanted += [f"-k {lesson.label} --script"]
    assert not [name for name in wanted if name not in text]


def test_plant_lists_what_there_is():
    listing = run_plant().stdout
    for exercise in EXERCISES:
        line = f"{exercise.label} {exercise.name}: {exercise.task}"
        assert line in listing


def test_plant_writes_a_copy(tmp_path: Path):
    found = next(exercise for exercise in EXERCISES if exercise.is_planted)
    sick, well = tmp_path / "sick.py", tmp_path / "well.py"
    assert found.task in run_plant(found.label, found.name, sick).stdout
    assert run_plant(found.label, well).returncode == 0
    assert sick.read_text(encoding="utf-8") == found.changed()
    assert well.read_bytes() == plant.section_of(found.label).read_bytes()


def test_plant_says_what_is_wrong(tmp_path: Path):
    taken = tmp_path / "taken.py"
    taken.write_text("mine\n", encoding="utf-8")
    new = tmp_path / "new.py"
    for arguments, told in [
        (["s01", taken], "is there already"),
        (["s99", new], "unknown section s99"),
        (["s01", "no-such", new], "has no defect no-such"),
        (["s01", tmp_path / "none" / "new.py"], "No such file"),
        (["s01", tmp_path / "notes.txt"], "does not end in .py"),
        (["s01"], "say a section"),
    ]:
        done = run_plant(*arguments)
        assert done.returncode in (1, 2) and not done.stdout, done
        assert told in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert taken.read_text(encoding="utf-8") == "mine\n" and not new.exists()


def run_exercises(*arguments: object) -> subprocess.CompletedProcess[str]:
    without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]  # which takes half the time
    return run("-m", "pytest", *without, *arguments)


def test_a_script_is_checked(tmp_path: Path):
    (exercise,) = [exercise for exercise in EXERCISES if exercise.id == "s04_inbox"]
    path = tmp_path / "mine.py"
    path.write_text(script_of(exercise, False), encoding="utf-8")
    done = run_exercises(FOLDER, "-k", exercise.id, "--script", path)
    assert re.search(r"^=+ 1 failed", done.stdout, re.M), done.stdout + done.stderr
    assert f"{exercise.task}\nexpected " in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and "workers" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("text", "told"),
    [(None, "there is no such Python file"), ("def (", "SyntaxError"), ("1 / 0", "ZeroDivision")],
)
def test_a_script_that_cannot_be_checked(tmp_path: Path, text: str | None, told: str):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text, encoding="utf-8")
    done = run_exercises(FOLDER, "-k", "s01", "--script", path)
    assert done.returncode == 4 and told in done.stderr, done
    assert done.stderr.strip().count("\n") == 0, done.stderr


def test_without_a_script_nothing_is_run():
    alone = run_exercises(FOLDER)
    assert "--script path/to/mine.py" in alone.stdout and "no tests ran" in alone.stdout
    ignored = ("--ignore-glob=tests/test_*.py", "--ignore=tests/first")
    whole = run_exercises("tests", *ignored, "-n", "0")
    assert "no tests ran" in whole.stdout and "--script" not in whole.stdout, whole
