"""Shows what lanes are for: the same traffic twice, as two timelines.

    python tests/first/lane_theatre.py
    python tests/first/lane_theatre.py --people 8 --seconds 0.5

People on two Telegram bots, Feishu and the web chat ask two questions each, all
at once, while a heartbeat is on its way and a job of CRON.json is started. s09
has one lock: who is answered holds `Lane`, all others wait. s10 has lanes. Both
run as they are. What is drawn was measured outside of them: when a question was
asked, and when the model server, which takes a fixed time for each answer, was
asked it and had answered.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from fake_model import Text

from first import soak
from first.crash_lab import Stop
from first.crash_lab import last_line
from first.crash_lab import run_as_command
from first.crash_lab import source_of

LOCK, LANES = harness.FOLDER / "s09_resilience.py", harness.FOLDER / "s10_concurrency.py"
NAMES = ["ada", "bob", "cem", "dan", "eva", "fay", "gus", "hal"]
PLACES = ["telegram", "telegram", "feishu", "web"]  # in the order of soak's people
ON = ["[telegram default] on", "[telegram work] on", "[feishu default] on", "[web default] on"]
HEARTBEAT, JOB = "heartbeat", "cron"
QUESTIONS = 2  # of each person
COLUMNS = 64  # and 16 for the names
SHORTEST, LONGEST = 0.01, 10  # seconds for an answer
PATIENCE = 60  # seconds beyond those that the answers take


@dataclass
class Turn:
    """One question: when it was asked, when the model began to answer, and when it had."""

    asked: float
    began: float = 0
    ended: float = 0

    @property
    def waited(self) -> float:
        return self.began - self.asked


class Stage(soak.World):
    """The soak's platforms and people, and a model that takes its time and notes it."""

    def __init__(self, script: Path, folder: Path, people: int, seconds: float):
        super().__init__(script, folder, seed=0, seconds=seconds)
        self.people = self.people[:people]
        for person, name in zip(self.people, NAMES, strict=False):
            person.name = name
        self.turns: dict[str, Turn] = {}
        self.changed = threading.Condition()
        write_tasks(self.workspace)

    def environment(self) -> dict[str, str]:
        return super().environment() | {"HEARTBEAT_SECONDS": "86400"}

    def brain(self, body: dict) -> Text:
        """The same time for each answer; what counts is when it was asked for."""
        last = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
        turn = self.turns[HEARTBEAT if "HEARTBEAT.md" in last else last.split()[-1]]
        turn.began = time.monotonic()
        self.think()
        with self.changed:
            turn.ended = time.monotonic()
            self.changed.notify_all()
        return Text("HEARTBEAT_OK" if turn is self.turns[HEARTBEAT] else f"re {last}")

    def think(self) -> None:
        """Take the time of an answer."""
        time.sleep(self.seconds)

    def ask(self, person: soak.Person) -> None:
        """One person's questions, the second right behind the first."""
        for number in range(person.asked + 1, QUESTIONS + 1):
            self.turns[f"{person.name}-{number}"] = Turn(time.monotonic())
            person.ask()

    def play(self) -> None:
        """A beat, and in the middle of it a job and everybody's questions."""
        with harness.Screen(self.script, self.environment()) as screen:
            self.wait(screen, lambda: all(line in screen.text for line in ON))
            self.turns[HEARTBEAT] = Turn(time.monotonic())
            screen.type("/trigger\n")
            self.wait(screen, lambda: self.turns[HEARTBEAT].began)
            self.turns[HEARTBEAT].asked = self.turns[HEARTBEAT].began  # nobody waits for it
            self.turns[JOB] = Turn(time.monotonic())
            screen.type(f"/cron-trigger {JOB}\n")
            for person in self.people:
                threading.Thread(target=self.ask, args=(person,), daemon=True).start()
            count = 2 + QUESTIONS * len(self.people)
            self.wait(screen, lambda: sum(bool(t.ended) for t in self.all_turns()) == count)

    def all_turns(self) -> list[Turn]:
        return list(self.turns.values())

    def wait(self, screen: harness.Screen, condition: Callable[[], object]) -> None:
        """Wait for a condition, as long as the process may still bring it. Raises Stop."""
        latest = PATIENCE + self.seconds * (2 + QUESTIONS * len(self.people))
        deadline = time.monotonic() + latest
        with self.changed:
            while not condition():
                if screen.ended or time.monotonic() > deadline:
                    told = f"its last line: {last_line(screen)}"
                    raise Stop(f"{self.script.name} did not answer everybody; {told}")
                self.changed.wait(0.02)


def write_tasks(workspace: Path) -> None:
    """A job and a heartbeat that begin when they are told to."""
    payload = {"kind": "agent_turn", "message": JOB}
    job = {"id": JOB, "schedule": {"kind": "every", "every_seconds": 86400}, "payload": payload}
    (workspace / "CRON.json").write_text(json.dumps({"jobs": [job]}), encoding="utf-8")
    (workspace / "HEARTBEAT.md").write_text("- look around\n", encoding="utf-8")


class Timeline:
    """What was measured in one run, with the figures that sum it up."""

    def __init__(self, title: str, stage: Stage):
        self.title = title
        self.rows: dict[str, list[Turn]] = {}
        for person, place in zip(stage.people, PLACES * 2, strict=False):
            turns = [
                turn for name, turn in stage.turns.items() if name.startswith(f"{person.name}-")
            ]
            self.rows[f"{person.name:<6}{place}"] = turns
        questions = [turn for turns in self.rows.values() for turn in turns]
        self.waits = [turn.waited for turn in questions]
        self.rows |= {name: [stage.turns[name]] for name in (HEARTBEAT, JOB)}
        self.begin = min(turn.asked for turn in stage.all_turns())
        self.seconds = max(turn.ended for turn in stage.all_turns()) - self.begin
        self.median, self.longest = statistics.median(self.waits), max(self.waits)

    def draw(self, column: float) -> str:
        """A row for each of them, a column for so many seconds."""
        lines = [f"{self.title}: all is done after {self.seconds:.1f} s"]
        for name, turns in self.rows.items():
            moments = [self.begin + column * (number + 0.5) for number in range(COLUMNS)]
            lines.append(f"{name:<16}{''.join(mark(turns, at) for at in moments)}".rstrip())
        waits = f"{self.median:.2f} s (median), {self.longest:.2f} s (longest)"
        lines += [f"questions waited {waits}", f"model calls at a time: {self.peak()}"]
        return "\n".join(lines)

    def peak(self) -> str:
        """How many turns ran at the moment when most did, and in which lanes."""
        turns = [(lane_of(name), turn) for name, turns in self.rows.items() for turn in turns]
        moments = [
            Counter(lane for lane, turn in turns if turn.began <= other.began < turn.ended)
            for _, other in turns
        ]
        most = max(moments, key=Counter.total)
        lanes = ", ".join(f"{lane} {count}" for lane, count in most.items())
        return f"{most.total()} ({lanes})" if most.total() > 1 else "1"


def lane_of(row: str) -> str:
    return row if row in (HEARTBEAT, JOB) else "main"


def mark(turns: list[Turn], at: float) -> str:
    """What somebody's turns do at a moment: one runs, or one waits, or nothing is to do."""
    if any(turn.began <= at < turn.ended for turn in turns):
        return "#"
    return "." if any(turn.asked <= at < turn.began for turn in turns) else " "


def perform(title: str, script: Path, people: int, seconds: float) -> Timeline:
    with ExitStack() as until:
        folder = until.enter_context(tempfile.TemporaryDirectory(prefix="lane-theatre-"))
        stage = Stage(script, Path(folder), people, seconds)
        until.callback(stage.ended.set)
        for fake in (*stage.models, *stage.bots, stage.feishu):
            until.enter_context(fake)
        stage.play()
        return Timeline(title, stage)


def show_both(people: int, seconds: float, script: Path) -> int:
    """Play the traffic twice, and print what came of it."""
    source_of(script, "CommandQueue", "s10")
    who = "1 person" if people == 1 else f"{people} people"
    print(f"{who}, {QUESTIONS} questions each, {seconds:g} s for an answer", flush=True)
    lock = perform(f"one lock, {LOCK.name}", LOCK, people, seconds)
    lanes = perform(f"lanes, {script.name}", script, people, seconds)
    column = max(lock.seconds, lanes.seconds) / COLUMNS
    print(f"a column is {column:.2f} s; # runs, . waits; below the people: the agent's own tasks")
    for timeline in (lock, lanes):
        print(f"\n{timeline.draw(column)}")
    print(f"\none lock takes {lock.seconds / lanes.seconds:.1f} times as long;")
    print(f"questions wait {lock.median / lanes.median:.1f} times as long (median), ", end="")
    print(f"{lock.longest / lanes.longest:.1f} times (longest)")
    return 0


def people_of(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= len(NAMES):
        raise argparse.ArgumentTypeError(f"a number from 1 to {len(NAMES)}, not {text!r}")
    return int(text)


def seconds_of(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"a number from {SHORTEST} to {LONGEST}, not {text!r}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = f"how many ask, 1 to {len(NAMES)} (default: %(default)s)"
    parser.add_argument("--people", type=people_of, default=6, metavar="N", help=about)
    about = f"for each answer, {SHORTEST} to {LONGEST} (default: %(default)s)"
    parser.add_argument("--seconds", type=seconds_of, default=0.2, metavar="S", help=about)
    about = f"s10, or a copy (default: {LANES.name})"
    parser.add_argument("--script", type=Path, default=LANES, metavar="PATH", help=about)
    given = parser.parse_args()
    script = given.script.resolve()
    return run_as_command(lambda: show_both(given.people, given.seconds, script))


if __name__ == "__main__":
    sys.exit(main())
