"""Writes a copy of a section to work on, with a defect planted in it if you name one.

python tests/first/exercises/plant.py                     what there is
python tests/first/exercises/plant.py s04 inbox mine.py   s04 with that defect
python tests/first/exercises/plant.py s04 mine.py         s04 as it is, to add something to

The checks need pytest: pip install -q -r tests/requirements.txt
"""

import ast
import sys
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SECTIONS = FOLDER.parents[2] / "sessions" / "en"


@dataclass
class Exercise:
    """One exercise: its file in solutions/ and its check."""

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
    def task(self) -> str:
        """The first line of the check's docstring: what to add, or what is wrong."""
        tree = ast.parse((FOLDER / f"test_{self.label}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == f"test_{self.id}":
                return ast.get_docstring(node).splitlines()[0]
        raise ValueError(f"{self.id} has no check")

    def changed(self) -> str:
        """The section after the replacements: solved, or with the defect planted."""
        text = section_of(self.label).read_text(encoding="utf-8")
        for number, step in enumerate(self.answer["replace"], 1):
            if text.count(step["old"]) != 1:
                count = text.count(step["old"])
                raise ValueError(f"{self.path.name}: old text {number} occurs {count} times")
            text = text.replace(step["old"], step["new"])
        return text


def exercises() -> list[Exercise]:
    """All exercises, in order."""
    return [Exercise(path) for path in sorted((FOLDER / "solutions").glob("s*.toml"))]


def section_of(label: str) -> Path:
    """The script of a section. Raises ValueError if there is none."""
    found = {path.name[:3]: path for path in sorted(SECTIONS.glob("s[0-9][0-9]_*.py"))}
    if label not in found:
        raise ValueError(f"unknown section {label}: choose from {', '.join(found)}")
    return found[label]


def planted(label: str, name: str) -> Exercise:
    """The exercise that plants a defect. Raises ValueError if there is none."""
    known = {e.name: e for e in exercises() if e.label == label and e.is_planted}
    if name not in known:
        there = ", ".join(known) or "none"
        raise ValueError(f"{section_of(label).stem} has no defect {name}: there is {there}")
    return known[name]


def write(target: Path, text: str) -> None:
    """Write a new file. Raises FileExistsError rather than replace one."""
    with open(target, "x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def show_list() -> None:
    """Print the exercises, a defect to find with what a user would say about it."""
    print(__doc__)
    for exercise in exercises():
        print(f"{exercise.label} {exercise.name}: {exercise.task}")


def main(arguments: list[str]) -> int:
    """Do what the arguments say. Returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        show_list()
        return 0
    if len(arguments) not in (2, 3):
        print("plant.py: say a section, perhaps a defect, and a file to write", file=sys.stderr)
        return 2
    label, *name, file = arguments
    target = Path(file)
    try:
        if target.suffix != ".py":
            raise ValueError(f"{file} does not end in .py: name the file to write")
        exercise = planted(label, *name) if name else None
        write(target, exercise.changed() if exercise else section_of(label).read_text("utf-8"))
    except FileExistsError:
        print(f"plant.py: {file} is there already: choose another name", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"plant.py: {error}", file=sys.stderr)
        return 1
    which = exercise.id if exercise else label
    print(f"{file}: {exercise.task if exercise else f'a copy of {section_of(label).name}'}")
    print(f"To check it: python -m pytest tests/first/exercises -k {which} --script {file}")
    print(f"To run it: WORKSPACE_DIR=workspace python sessions/offline_model.py {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
