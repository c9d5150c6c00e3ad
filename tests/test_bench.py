"""The benchmark's command; what it measures is nothing to test."""

import re
import subprocess
import sys

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
    figures = r" +route, 100,000 bindings +s\d\d +[\d.]+ us +[\d.]+ x"
    shape = figures + r"  at most 1\.2: (holds|short)"
    assert re.fullmatch(shape, many)


def test_a_name_that_is_no_benchmark():
    done = run("cron", "crom")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("no benchmark crom; there are: prompt, ")
    assert done.stdout.count("\n") == 1
