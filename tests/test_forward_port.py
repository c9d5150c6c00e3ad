"""forward_port.py carries an edit forward, or writes nothing at all."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).with_name("forward_port.py")
FIRST = '''"""s01: one."""

LIMIT = 10


def greet(name):
    """Say hello."""
    return "hello " + name


def main():
    print(greet("you"))
'''
SECOND = FIRST.replace("s01: one.", "s02: two.\n\nMore to read.").replace(
    "def main", "def part():\n    return 'bye'\n\n\ndef main"
)
THIRD = SECOND.replace("s02: two.", "s03: three.").replace("LIMIT = 10", "LIMIT = 30")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True
    )


@pytest.fixture
def ladder(tmp_path: Path) -> list[Path]:
    """Three committed sections."""
    texts = {"s01_one.py": FIRST, "s02_two.py": SECOND, "s03_three.py": THIRD}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "three sections")
    return [tmp_path / name for name in texts]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def port(ladder: list[Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool and keep what it says."""
    command = [sys.executable, str(TOOL), "--folder", str(ladder[0].parent), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_an_edit_is_carried(ladder: list[Path]):
    edit(ladder[0], '"hello " + name', 'f"hello {name}"')
    done = port(ladder, "s01")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "s02: 1 lines added, 1 gone\ns03: 1 lines added, 1 gone\n"
    for path, before in zip(ladder, (FIRST, SECOND, THIRD), strict=True):
        wanted = before.replace('"hello " + name', 'f"hello {name}"')
        assert path.read_text(encoding="utf-8") == wanted
    assert sorted(path.name for path in ladder[0].parent.glob("*.*")) == [
        ".git",
        "s01_one.py",
        "s02_two.py",
        "s03_three.py",
    ]


def test_an_edit_in_the_middle_goes_forward_only(ladder: list[Path]):
    edit(ladder[1], "'bye'", "'farewell'")
    done = port(ladder, "s02")
    assert done.stdout == "s03: 1 lines added, 1 gone\n"
    assert ladder[0].read_text(encoding="utf-8") == FIRST
    assert "farewell" in ladder[2].read_text(encoding="utf-8")


def test_docstrings_stay_their_own(ladder: list[Path]):
    edit(ladder[0], '"""s01: one."""', '"""s01: the first.\n\nNew here.\n"""')
    edit(ladder[0], '"hello "', '"hi "')
    assert port(ladder, "s01").returncode == 0
    assert ladder[1].read_text(encoding="utf-8") == SECOND.replace('"hello "', '"hi "')
    assert ladder[2].read_text(encoding="utf-8") == THIRD.replace('"hello "', '"hi "')


def test_only_the_named_edit_travels(ladder: list[Path]):
    edit(ladder[0], '"hello "', '"hi "')
    edit(ladder[1], "'bye'", "'farewell'")
    assert port(ladder, "s01").returncode == 0
    assert ladder[2].read_text(encoding="utf-8") == THIRD.replace('"hello "', '"hi "')


def test_a_conflict_writes_nothing(ladder: list[Path]):
    edit(ladder[0], "LIMIT = 10", "LIMIT = 20")
    done = port(ladder, "s01")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "conflict in s03_three.py, line 5",
        "  s03_three.py has:",
        "    | LIMIT = 30",
        "  s02_two.py brings:",
        "    | LIMIT = 20",
        "nothing was written",
    ]
    assert ladder[1].read_text(encoding="utf-8") == SECOND
    assert ladder[2].read_text(encoding="utf-8") == THIRD


def test_no_edit(ladder: list[Path]):
    done = port(ladder, "s01")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no edit since HEAD" in done.stdout


def test_an_edit_since_an_older_revision(ladder: list[Path]):
    edit(ladder[0], '"hello "', '"hi "')
    git(ladder[0].parent, "commit", "-qam", "forgot to carry it")
    assert "no edit" in port(ladder, "s01").stdout
    assert port(ladder, "s01", "--base", "HEAD~1").returncode == 0
    assert '"hi "' in ladder[2].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["s09"], "no section s09 in "),
        (["s01", "--base", "nowhere"], "s01_one.py in nowhere: "),
    ],
)
def test_what_cannot_be_found(ladder: list[Path], arguments: list[str], said: str):
    done = port(ladder, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "nothing was written" in done.stderr


def test_a_script_that_does_not_parse(ladder: list[Path]):
    edit(ladder[0], "def greet(name):", "def greet(name:")
    done = port(ladder, "s01")
    assert done.returncode == 1
    assert "s01_one.py, line 6: " in done.stderr
