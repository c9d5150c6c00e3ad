"""Figures that are taken in turns, and the table they go into."""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from harness import FOLDER
from harness import NEXT
from harness import Section
from harness import sections

HERE = Path(__file__).resolve().parent
FOLDERS = [
    NEXT,
    FOLDER,
]  # where to look for sections; `bench.py --sections` says another
PEERS_PYTHON = os.environ.get("PEERS_PYTHON") or sys.executable
NOT_INSTALLED = "not installed: PEERS_PYTHON is to have tests/bench/requirements.txt"


def ladder(label: str = "s01") -> list[Section]:
    """The sections to measure: of the first folder that goes as far as this one."""
    for folder in FOLDERS:
        found = sections(folder)
        if any(section.label == label for section in found):
            return found
    sys.exit(f"there is no section {label} in {', '.join(map(str, FOLDERS))}")


class Peer(AbstractContextManager):
    """One of peers.py, in a process of its own, which does the steps it is told."""

    def __init__(
        self, name: str, *arguments: object, python: str = PEERS_PYTHON
    ) -> None:
        command = [
            python,
            "-W",
            "ignore",
            str(HERE / "peers.py"),
            name,
            *map(str, arguments),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.name = name
        self.process = subprocess.Popen(command, **pipes)
        self.steps: list[str] = json.loads(self.process.stdout.readline() or "[]")

    def __exit__(self, *about: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def timed(self, step: str, times: int = 1) -> Callable[[], float]:
        """A function that gives the seconds of one step, on average over so many."""

        def measure() -> float:
            print(json.dumps([step, times]), file=self.process.stdin, flush=True)
            if not (line := self.process.stdout.readline()):
                sys.exit(f"{self.name} failed at: {step}")
            return json.loads(line)

        return measure


def timed(function: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """A function that gives the seconds of one call, on average over so many."""

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - begin) / times

    return measure


def medians(rounds: int, measured: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median seconds of each function.

    They take turns so that they meet the same weather. The first round warms up and
    does not count; who begins a round is drawn by lot.
    """
    times: dict[str, list[float]] = {name: [] for name in measured}
    order, dice = list(measured), random.Random(1)
    for _ in range(rounds + 1):
        for name in order:
            times[name].append(measured[name]())
        dice.shuffle(order)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def row(
    what: str, who: str, figure: str = "", ratio: float | None = None, goal: str = ""
) -> None:
    """Print one row: case, contestant, figure, ratio, goal."""
    times = "" if ratio is None else f"{ratio:.2f} x"
    print(
        f"  {what:<24} {who:<22} {figure:>12} {times:>9}  {goal}".rstrip(), flush=True
    )


def at_most(limit: float, value: float, unit: str = "") -> str:
    """A goal, and whether it holds."""
    return f"at most {limit:g}{unit}: {'holds' if value <= limit else 'short'}"


def at_least(limit: float, value: float, unit: str = "") -> str:
    """A goal, and whether it holds."""
    return f"at least {limit:g}{unit}: {'holds' if value >= limit else 'short'}"


def environment(url: str, folder: Path) -> dict[str, str]:
    """What a section needs to run against a server, with a workspace of its own."""
    settings = {
        "OPENAI_API_KEY": "offline",
        "OPENAI_BASE_URL": url,
        "MODEL_ID": "offline",
    }
    empty = ("MODEL_OPTIONS", "FALLBACK_MODELS", "EMBEDDING_MODEL", "CONTEXT_TOKENS")
    own = {
        "WORKSPACE_DIR": str(folder),
        "GATEWAY_PORT": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {**os.environ, **settings, **dict.fromkeys(empty, ""), **own}
