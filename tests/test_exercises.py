"""The exercises: a check fails on the unsolved script, and passes on the solved one."""

import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import check_docs
import harness
import pytest
from harness import NEXT
from harness import REPO
from harness import Section

FOLDER = REPO / "tests" / "exercises"
plant = harness.load(FOLDER / "plant.py")
EXERCISES = plant.exercises()
SECTIONS = harness.sections(NEXT)
CHECKS = {
    name.removeprefix("test_"): check
    for path in sorted(FOLDER.glob("test_s*.py"))
    for name, check in vars(harness.load(path)).items()
    if name.startswith("test_")
}
each = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
each_doc = pytest.mark.parametrize(
    "lesson", [s for s in SECTIONS if s.doc.exists()], ids=lambda s: s.label
)


def run_check(exercise, text: str, request: pytest.FixtureRequest) -> None:
    """Call a check with its fixtures, on a script with this text."""
    path = request.getfixturevalue("tmp_path") / f"{exercise.label}_mine.py"
    path.write_text(text, encoding="utf-8", newline="\n")
    check = CHECKS[exercise.id]
    names = list(inspect.signature(check).parameters)
    names.remove("script")
    fixtures = {name: request.getfixturevalue(name) for name in names}
    check(script=Section(path), **fixtures)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, encoding="utf-8", timeout=100
    )


def run_plant(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(FOLDER / "plant.py", *arguments)


def run_checks(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run pytest as a reader would, without plug-ins that take half of its time."""
    without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return run("-m", "pytest", *without, *arguments)


@each
def test_the_unsolved_fails(exercise, request: pytest.FixtureRequest):
    with pytest.raises((AssertionError, pytest.fail.Exception)) as failure:
        run_check(exercise, exercise.unsolved(), request)
    reason = str(failure.value)
    assert "expected " in reason and "\n" not in reason, reason
    request.getfixturevalue("fake_model").problems.clear()


@each
def test_the_solved_passes(exercise, request: pytest.FixtureRequest):
    run_check(exercise, exercise.solved(), request)


def test_each_check_has_an_answer():
    assert sorted(CHECKS) == sorted(exercise.id for exercise in EXERCISES)
    for exercise in EXERCISES:
        verb = "Find: " if exercise.is_planted else "Add: "
        assert exercise.task.startswith(verb), exercise.id
        assert exercise.difficulty in ("easy", "medium", "hard"), exercise.id
        assert len(exercise.answer["why"]) > 80, f"{exercise.id}: why?"


def test_an_id_selects_one_check():
    for exercise in EXERCISES:
        found = [name for name in CHECKS if exercise.id in name]
        assert found == [exercise.id]


@each_doc
def test_a_section_has_three_of_both_kinds(lesson: Section):
    kinds = Counter(e.answer["kind"] for e in EXERCISES if e.label == lesson.label)
    assert kinds == {"add": 2, "find": 1}


@each_doc
def test_the_doc_has_each_exercise(lesson: Section):
    """With its command lines, and how difficult it is."""
    text = check_docs.chapter(lesson.doc.read_text(encoding="utf-8"), "Exercises")
    for exercise in EXERCISES:
        if exercise.label != lesson.label:
            continue
        file = f"mine_{exercise.name}.py"
        for wanted in (
            f"python tests/exercises/plant.py {exercise.label} {exercise.name} {file}",
            f"python -m pytest tests/exercises -k {exercise.id} --script {file}",
        ):
            assert wanted in text.splitlines(), f"{lesson.doc.name} lacks: {wanted}"
        about = rf"\*\*`{exercise.id}`\*\* \({exercise.difficulty}\)"
        assert re.search(about, text), f"{lesson.doc.name} lacks: {about}"
    assert text.count("<details>") == 3, f"{lesson.doc.name}: a hint for each"


@each_doc
def test_the_doc_names_no_other_exercise(lesson: Section):
    text = lesson.doc.read_text(encoding="utf-8")
    named = set(re.findall(r"tests/exercises -k (\w+)", text))
    assert named <= set(CHECKS)


def test_plant_lists_what_there_is():
    listing = run_plant().stdout
    for exercise in EXERCISES:
        title = f"{exercise.label} {exercise.name} ({exercise.difficulty})"
        assert f"{title} {exercise.task}" in listing


@pytest.mark.parametrize("name", ["stuck", "usage"])
def test_plant_writes_a_copy(name: str, tmp_path: Path):
    exercise = plant.find_exercise("s01", name)
    path = tmp_path / "mine.py"
    done = run_plant("s01", name, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_text(encoding="utf-8") == exercise.unsolved()
    assert exercise.task in done.stdout
    assert f"-k {exercise.id} --script {path}" in done.stdout


def test_plant_says_what_is_wrong(tmp_path: Path):
    taken = tmp_path / "taken.py"
    taken.write_text("mine\n", encoding="utf-8")
    new = tmp_path / "new.py"
    for arguments, reason in [
        (["s01", "stuck", taken], "exists already"),
        (["s99", "stuck", new], "s99 has no exercises: choose from s01, "),
        (["s01", "none", new], "s01 has no exercise none: choose from stuck, "),
        (["s01", "stuck", tmp_path / "none" / "new.py"], "No such file"),
        (["s01", "stuck", tmp_path / "notes.txt"], "does not end in .py"),
        (["s01", new], "name a section, an exercise and a file"),
    ]:
        done = run_plant(*arguments)
        assert done.returncode in (1, 2) and not done.stdout, done
        assert reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert taken.read_text(encoding="utf-8") == "mine\n" and not new.exists()


def test_a_script_is_checked(tmp_path: Path):
    exercise = plant.find_exercise("s01", "stuck")
    path = tmp_path / "mine.py"
    path.write_text(exercise.unsolved(), encoding="utf-8")
    done = run_checks(FOLDER, "-k", exercise.id, "--script", path)
    assert re.search(r"^=+ 1 failed, \d+ deselected", done.stdout, re.M), done
    assert f"{exercise.task}\nexpected " in done.stdout, done.stdout
    assert "Traceback" not in done.stdout and "workers" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "there is no such Python file"), ("def (", "SyntaxError")],
)
def test_a_script_that_cannot_be_checked(tmp_path: Path, text: str | None, reason: str):
    path = tmp_path / "mine.py"
    if text:
        path.write_text(text, encoding="utf-8")
    done = run_checks(FOLDER, "-k", "s01_stuck", "--script", path)
    assert done.returncode == 4 and reason in done.stderr, done
    assert done.stderr.strip().count("\n") == 0, done.stderr


def test_without_a_script_or_an_exercise_nothing_is_run(tmp_path: Path):
    alone = run_checks(FOLDER)
    assert "--script mine.py" in alone.stdout and "no tests ran" in alone.stdout
    path = tmp_path / "mine.py"
    path.write_text("", encoding="utf-8")
    many = run_checks(FOLDER, "--script", path)
    assert many.returncode == 4 and "-k s01_stuck" in many.stderr, many
    suite = "--ignore-glob=tests/test_*.py", "--ignore-glob=tests/first/test_*.py"
    whole = run_checks("tests", *suite, "-n", "0")
    assert "no tests ran" in whole.stdout and "--script" not in whole.stdout, whole
