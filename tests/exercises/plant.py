"""Writes a copy of a section for an exercise, with the defect if there is one to find.

python tests/exercises/plant.py                           what there is
python tests/exercises/plant.py s01 stuck mine_stuck.py   a copy of s01 for s01_stuck

The checks need pytest: pip install -q -r tests/requirements.txt
"""

import ast
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECTIONS = FOLDER.parents[1] / "sessions" / "next"


@dataclass
class Exercise:
    """One exercise: its check, and its answer in solutions/."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def label(self) -> str:
        return self.id.partition("_")[0]

    @property
    def name(self) -> str:
        return self.id.partition("_")[2]

    @cached_property
    def answer(self) -> dict:
        return tomllib.loads(self.path.read_text(encoding="utf-8"))

    @property
    def is_planted(self) -> bool:
        return self.answer["kind"] == "find"

    @property
    def difficulty(self) -> str:
        return self.answer["difficulty"]

    @property
    def task(self) -> str:
        """The first line of the check's docstring: what to add, or what is wrong."""
        source = (FOLDER / f"test_{self.label}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name == f"test_{self.id}":
                return ast.get_docstring(node).splitlines()[0]
        raise ValueError(f"{self.id} has no check")

    def original(self) -> str:
        """The section as it ships."""
        return section_of(self.label).read_text(encoding="utf-8")

    def changed(self) -> str:
        """The section after the answer's replacements: solved, or with the defect."""
        text = self.original()
        for number, step in enumerate(self.answer["replace"], 1):
            count = text.count(step["old"])
            if count != 1:
                problem = f"old text {number} occurs {count} times"
                raise ValueError(f"{self.path.name}: {problem}")
            text = text.replace(step["old"], step["new"])
        return text

    def unsolved(self) -> str:
        """What a reader begins with."""
        return self.changed() if self.is_planted else self.original()

    def solved(self) -> str:
        """What a reader arrives at."""
        return self.original() if self.is_planted else self.changed()


def exercises() -> list[Exercise]:
    """All exercises, in order."""
    return [Exercise(path) for path in sorted((FOLDER / "solutions").glob("s*.toml"))]


def section_of(label: str) -> Path:
    """The script of a section."""
    (path,) = SECTIONS.glob(f"{label}_*.py")
    return path


def find_exercise(label: str, name: str) -> Exercise:
    """The exercise of a section by its name. Raises ValueError if there is none."""
    labels = []
    names = []
    for exercise in exercises():
        if exercise.label not in labels:
            labels.append(exercise.label)
        if exercise.label == label:
            names.append(exercise.name)
        if (exercise.label, exercise.name) == (label, name):
            return exercise
    if not names:
        raise ValueError(f"{label} has no exercises: choose from {', '.join(labels)}")
    raise ValueError(f"{label} has no exercise {name}: choose from {', '.join(names)}")


def write_copy(exercise: Exercise, file: Path) -> None:
    """Write the copy to begin with. Raises an error rather than replace a file."""
    if file.suffix != ".py":
        raise ValueError(f"{file} does not end in .py: name the file to write")
    with open(file, "x", encoding="utf-8", newline="\n") as stream:
        stream.write(exercise.unsolved())


def show_list() -> None:
    """Print the exercises. For a defect, what a person would say who meets it."""
    print(__doc__)
    for exercise in exercises():
        about = f"({exercise.difficulty}) {exercise.task}"
        print(f"{exercise.label} {exercise.name} {about}")


def main(arguments: list[str]) -> int:
    """Do what the arguments say. Returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        show_list()
        return 0
    if len(arguments) != 3:
        usage = "name a section, an exercise and a file to write"
        print(f"plant.py: {usage}, such as: s01 stuck mine_stuck.py", file=sys.stderr)
        return 2
    label, name, file = arguments
    try:
        exercise = find_exercise(label, name)
        write_copy(exercise, Path(file))
    except FileExistsError:
        print(f"plant.py: {file} exists already: choose another name", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"plant.py: {error}", file=sys.stderr)
        return 1
    check = f"python -m pytest tests/exercises -k {exercise.id} --script {file}"
    print(f"{file}: {exercise.task}")
    print(f"To check it: {check}")
    print(f"To run it: python sessions/offline_model.py {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
