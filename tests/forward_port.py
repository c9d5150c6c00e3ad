"""Carries an edit made in one section into all later ones.

    python tests/forward_port.py s01 [--folder sessions/en] [--base REV]

The edit is what the working tree has changed in that section since HEAD (or REV). It
goes into each later section by three-way merge; docstrings at the top of the files stay
their own. All or nothing: on a conflict no file is written.
"""

import argparse
import ast
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CONFLICT = re.compile(
    r"^<{7} ours\n(?P<ours>.*?)^\|{7} base\n.*?^={7}\n(?P<theirs>.*?)^>{7} theirs\n",
    re.M | re.S,
)


class Stop(Exception):
    """The edit cannot be carried: str() says where and why."""


def read(path: Path) -> str:
    """A file's text with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def committed(path: Path, revision: str) -> str:
    """The text a file had in a revision."""
    done = subprocess.run(
        ["git", "show", f"{revision}:./{path.name}"],
        cwd=path.parent,
        capture_output=True,
    )
    if done.returncode:
        raise Stop(
            f"{path.name} in {revision}: {done.stderr.decode(errors='replace').strip()}"
        )
    return done.stdout.decode("utf-8")


def docstring_lines(name: str, text: str) -> tuple[int, int]:
    """The lines of the module's docstring, as a slice."""
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise Stop(f"{name}, line {error.lineno}: {error.msg}") from None
    first = body[0] if body else None
    value = first.value if isinstance(first, ast.Expr) else None
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return first.lineno - 1, first.end_lineno
    return 0, 0


def with_docstring_of(name: str, text: str, model: tuple[str, str]) -> str:
    """A text with the module docstring of another one, so that the two do not differ in
    it.
    """
    start, end = docstring_lines(name, text)
    model_start, model_end = docstring_lines(*model)
    if start == end or model_start == model_end:
        return text
    lines, docstring = (
        text.splitlines(True),
        model[1].splitlines(True)[model_start:model_end],
    )
    return "".join([*lines[:start], *docstring, *lines[end:]])


def merge(name: str, base: str, ours: str, theirs: str, origin: str) -> str:
    """Three-way merge of texts; raises Stop where the two sides contradict."""
    base, theirs = (
        with_docstring_of(origin, text, (name, ours)) for text in (base, theirs)
    )
    with tempfile.TemporaryDirectory() as folder:
        for side, text in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, side).write_bytes(text.encode("utf-8"))
        labels = ["-L", "ours", "-L", "base", "-L", "theirs"]
        command = [
            "git",
            "merge-file",
            "-p",
            "--diff3",
            *labels,
            "ours",
            "base",
            "theirs",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True)
    merged = done.stdout.decode("utf-8")
    if done.returncode:
        raise Stop(
            conflict(name, merged, origin) or done.stderr.decode(errors="replace")
        )
    docstring_lines(name, merged)  # it must still parse
    return merged


def conflict(name: str, merged: str, origin: str) -> str:
    """The conflicts in a merged text: section, line and both sides."""
    said, shift = [], 0
    for match in CONFLICT.finditer(merged):
        line = merged[: match.start()].count("\n") + 1 - shift
        shift += match[0].count("\n") - match["ours"].count("\n")
        sides = f"  {name} has:\n{shorten(match['ours'])}\n  {origin} brings:\n"
        said.append(
            f"conflict in {name}, line {line}\n{sides}{shorten(match['theirs'])}"
        )
    return "\n".join(said)


def shorten(text: str, most: int = 6) -> str:
    """A few lines of one side."""
    lines = [f"    | {line}" for line in text.splitlines()] or ["    | (nothing)"]
    return "\n".join(lines[:most] + (["    | ..."] if len(lines) > most else []))


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """How many lines were added, and how many are gone."""
    diff = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return sum(d.startswith("+ ") for d in diff), sum(d.startswith("- ") for d in diff)


def carry(label: str, folder: Path, revision: str) -> dict[Path, tuple[str, str]]:
    """The later sections with their texts before and after the edit; raises Stop."""
    scripts = sorted(folder.glob("s[0-9][0-9]_*.py"))
    edited = next((path for path in scripts if path.name[:3] == label), None)
    if edited is None:
        raise Stop(f"no section {label} in {folder}")
    base, theirs, origin = committed(edited, revision), read(edited), edited.name
    if base == theirs:
        return {}
    results = {}
    for path in scripts[scripts.index(edited) + 1 :]:
        ours = read(path)
        merged = merge(path.name, base, ours, theirs, origin)
        results[path] = (ours, merged)
        base, theirs, origin = ours, merged, path.name
    return results


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_bytes(text.encode("utf-8"))
    draft.chmod(path.stat().st_mode)
    os.replace(draft, path)


def main() -> int:
    """Returns 0 if the edit is carried or there is none, 1 if nothing was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", help="the section that was edited, such as s01")
    parser.add_argument("--folder", type=Path, default=Path("sessions/en"))
    parser.add_argument("--base", default="HEAD", metavar="REV")
    options = parser.parse_args()
    try:
        results = carry(options.section, options.folder, options.base)
    except Stop as problem:
        print(f"{problem}\nnothing was written", file=sys.stderr)
        return 1
    if not results:
        print(f"{options.section}: no edit since {options.base}, or no later section")
    for path, (before, after) in results.items():
        write(path, after)
        added, gone = changed_lines(before, after)
        print(f"{path.name[:3]}: {added} lines added, {gone} gone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
