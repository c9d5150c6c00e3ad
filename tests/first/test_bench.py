"""The benchmark's command; what it measures is nothing to test."""

import re
import subprocess
import sys
from pathlib import Path

from harness import REPO


def run(*names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "tests" / "bench" / "bench.py"), *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_table_with_ratios_and_goals():
    done = run("routing")
    assert (done.returncode, done.stderr) == (0, "")
    title, few, many = done.stdout.split("\n", 1)[1].splitlines()
    assert title.startswith("routing: ")
    assert re.fullmatch(r" +route, 10 bindings +s\d\d +[\d.]+ us +1\.00 x", few)
    figures = r"[\d.]+ us +[\d.]+ x  at most 1\.2: (holds|short)"
    assert re.fullmatch(rf" +route, 100,000 bindings +s\d\d +{figures}", many)


def test_the_sections_of_a_folder(tmp_path: Path):
    done = run("replay")
    assert (done.returncode, done.stderr) == (0, "")
    figures = r"[\d.]+ s +[\d.]+ x  at most 0\.5 s: (holds|short)"
    assert re.search(rf"^ +replay +s\d\d +{figures}$", done.stdout, re.MULTILINE)
    done = run("--sections", str(tmp_path), "replay")
    assert done.returncode == 1
    assert done.stderr == f"there is no section s03 in {tmp_path}\n"


def test_a_name_that_is_no_benchmark():
    done = run("cron", "crom")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("no benchmark crom; there are: prompt, ")
    assert done.stdout.count("\n") == 1
