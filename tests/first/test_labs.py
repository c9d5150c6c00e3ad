"""The crash lab and the lane theatre: what their commands say, with real scripts under them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import harness
import pytest
from harness import since

from first import crash_lab
from first import lane_theatre

ROW = re.compile(r"^([a-z-]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)  \S", re.M)
BALANCED = {"queued": (6, 6, 0, 0, 0), "pieces": (8, 8, 0, 0, 0)}
BALANCED["sent"] = (6, 7, 1, 0, 0)  # what no order of the two can prevent
WIDTH = 80

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL and pseudo-terminals")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[Callable]:
    """Runs a command in this process, which has what it imports and where scripts start from."""
    monkeypatch.setattr(harness.MOTHER, "end", lambda: None)
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    handler = signal.getsignal(signal.SIGINT)

    def run_here(command: ModuleType, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [command.__file__, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        try:
            status = command.main()
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(line, status, *capsys.readouterr())

    yield run_here
    signal.signal(signal.SIGINT, handler)


def rows_of(ledger: str) -> dict[str, tuple[int, ...]]:
    """For each point: enqueued, received, of these twice, lost, out of order."""
    return {name: tuple(map(int, figures)) for name, *figures in ROW.findall(ledger)}


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.guard
@since("s08")
def test_the_ledger_is_balanced(section: harness.Section, whole: bool, run: Callable):
    points = list(BALANCED) if whole else ["sent"]
    chosen = [word for point in [*points, "sent"] for word in ("--point", point)]
    done = run(crash_lab, "--script", section.path, *chosen)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert rows_of(done.stdout) == {point: BALANCED[point] for point in points}
    kills = "3 kills" if whole else "1 kill"
    told = "Lost: 0. Received twice: 1, where 1 may be. Out of order: 0."
    assert done.stdout.splitlines()[-1] == f"{kills}. {told}"
    assert widest(done.stdout) <= WIDTH


@pytest.mark.since("s08")
def test_the_lab_finds_what_is_wrong(tmp_path: Path, run: Callable):
    """In a copy that acknowledges first and sends then, which loses what a kill comes between."""
    (section,) = [each for each in harness.sections() if each.label == "s08"]
    send, ack = "self.channel.send(delivery.peer, piece, key)", 'self.queue.settle(delivery, "ack")'
    assert section.source.count(f"            {send}\n") == 1
    copy = tmp_path / section.path.name
    text = section.source.replace(f"        else:\n            {ack}\n", "")
    copy.write_text(text.replace(send, f"{ack}\n            {send}"), encoding="utf-8")
    done = run(crash_lab, "--script", copy, "--point", "acked", "--point", "waiting")
    assert done.returncode == 1 and not done.stderr
    enqueued, received, twice, lost, _ = rows_of(done.stdout)["acked"]
    assert (enqueued, twice) == (6, 0) and lost == 6 - received >= 1
    assert f"- {lost} lost" in done.stdout.splitlines()
    assert "- it never came to this point" in done.stdout, "a refused text is not tried again"


def row_of(*arrived: str, point: str = "acked", enqueued: int = 3) -> crash_lab.Row:
    """A row in which ada should get two pieces and one, and has got these."""
    texts = {"a": ("ada", 1, 1), "b": ("ada", 1, 2), "c": ("ada", 2, 1)}
    (known,) = [each for each in crash_lab.POINTS if each.name == point]
    return crash_lab.Row(known, enqueued, [texts[each] for each in arrived], set(texts.values()))


def test_what_counts_as_wrong():
    assert row_of("a", "b", "c").complaints() == []
    assert row_of("a", "c").complaints() == ["1 lost"]
    assert row_of("a", "c", "b").complaints() == ["1 out of order"]
    assert row_of("a", "b", "b", "c").complaints() == ["1 received twice, where 0 may be"]
    assert row_of("a", "b", "b", "c", point="sent").complaints() == []
    assert len(row_of("a", "a", "b", "b", "c", point="sent").complaints()) == 1
    assert row_of("a", "b", "c", enqueued=4).complaints() == ["4 enqueued of 3"]


def test_the_points_are_told_of(run: Callable):
    done = run(crash_lab, "--list")
    assert done.returncode == 0
    _, *stories = re.split(r"\n(?=\S)", done.stdout)
    stories = {name: " ".join(words) for name, *words in map(str.split, stories)}
    assert list(stories) == [point.name for point in crash_lab.POINTS] and len(stories) >= 10
    for point in crash_lab.POINTS:
        assert stories[point.name].startswith(point.about)
        assert "the next start " in stories[point.name]
        assert stories[point.name].endswith("so it may come twice") == bool(point.twice)
    assert widest(done.stdout) <= WIDTH


def test_a_row_fits_a_terminal():
    assert max(len(str(crash_lab.Row(point))) for point in crash_lab.POINTS) <= WIDTH


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (crash_lab, [*crash_lab.COUNTED, "Exit status 1", "more than once", "s08_delivery.py"]),
        (lane_theatre, ["1 to 8 (default: 6)", "0.01 to 10 (default: 0.2)", "s10_concurrency.py"]),
    ],
)
def test_help_tells_all(command: ModuleType, told: list[str], run: Callable):
    done = run(command, "--help")
    assert done.returncode == 0 and [word for word in told if word not in done.stdout] == []
    assert widest(done.stdout) <= WIDTH


WRONG = [
    (crash_lab, ["--point", "nowhere"], 1, "there is no point 'nowhere'; there are: taken, "),
    (crash_lab, ["--script", harness.FOLDER / "s07_heartbeat_cron.py"], 1, "choose s08"),
    (lane_theatre, ["--script", harness.FOLDER / "s09_resilience.py"], 1, "choose s10"),
    (lane_theatre, ["--people", "0"], 2, "a number from 1 to 8, not '0'"),
    (lane_theatre, ["--seconds", "nan"], 2, "a number from 0.01 to 10, not 'nan'"),
]


@pytest.mark.parametrize(("command", "arguments", "status", "told"), WRONG)
def test_wrong_flags(command: ModuleType, arguments: list, status: int, told: str, run: Callable):
    done = run(command, *arguments)
    assert done.returncode == status and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{Path(command.__file__).name}: ") and told in last
    assert status == 2 or len(done.stderr.splitlines()) == 1


def family(ancestor: int) -> set[int]:
    """The processes that descend from one, those that have ended left out."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            parents[int(file.parent.name)] = int(parent)
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found & set(parents)


STUCK = """
class DeliveryQueue:
    pass


class Journal:
    append = None


if __name__ == "__main__":
    input()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path):
    """Of a script that answers nobody, so that the lab is in the middle of it for long."""
    script, folder = tmp_path / "s08_stuck.py", tmp_path / "temporary"
    script.write_text(STUCK, encoding="utf-8")
    folder.mkdir()
    points = ["--point=taken", "--point=asked", "--point=answered", "--point=queued"]
    command = [sys.executable, crash_lab.__file__, "--script", str(script), *points]
    count = 2 + 2 * len(points)  # itself, where scripts start from; a script and who waits for it
    env = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, encoding="utf-8"
    ) as process:
        wait_until(lambda: len(family(process.pid)) == count)
        relatives = family(process.pid)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not errors
    wait_until(lambda: not any(map(family, relatives)))
    assert not list(folder.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_two_timelines(run: Callable, monkeypatch: pytest.MonkeyPatch):
    """With one lock one runs at a time, and all others wait; with lanes they run side by side.

    There all answers are held until each person's first question is with the model.
    """

    def think(stage: lane_theatre.Stage) -> None:
        deadline = time.monotonic() + (30 if stage.script == lane_theatre.LANES else 0)
        firsts = [f"{person.name}-1" for person in stage.people]
        while not all(name in stage.turns and stage.turns[name].began for name in firsts):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        time.sleep(stage.seconds)

    monkeypatch.setattr(lane_theatre.Stage, "think", think)
    done = run(lane_theatre, "--people", 3, "--seconds", 0.05)
    assert done.returncode == 0, done.stdout + done.stderr
    head, lock, lanes, ratio = done.stdout.strip().split("\n\n")
    assert "3 people, 2 questions each, 0.05 s for an answer" in head
    names = ["ada   telegram", "bob   telegram", "cem   feishu", "heartbeat", "cron"]
    for timeline in (lock, lanes):
        _, *rows, waits, _ = timeline.splitlines()
        assert [row[:16].rstrip() for row in rows] == names
        assert re.fullmatch(r"questions waited \d+\.\d\d s \(median\), .* \(longest\)", waits)
    assert lock.startswith("one lock, s09_resilience.py: all is done after ")
    assert lock.endswith("\nmodel calls at a time: 1")
    assert max(column.count("#") for column in zip_longest(*lock.splitlines()[1:-2])) <= 1
    assert float(re.search(r"([\d.]+) s\n", lock)[1]) >= 8 * 0.05
    assert lanes.startswith("lanes, s10_concurrency.py: all is done after ")
    assert re.search(r"\nmodel calls at a time: [45] \(.*main [23]\b.*\)$", lanes)
    assert re.fullmatch(
        r"one lock takes \d+\.\d times as long;\n.* \d+\.\d times \(longest\)", ratio
    )
    assert widest(done.stdout) <= WIDTH


TURNS = {
    "ada-1": (1, 1, 3),
    "ada-2": (1, 4, 7),
    "bob-1": (1, 5, 7),
    "heartbeat": (0, 0, 2),
    "cron": (1, 5, 7),
}
DRAWN = """a title: all is done after 7.0 s
ada   telegram   ##.###
bob   telegram   ....##
heartbeat       ##
cron             ....##
questions waited 3.00 s (median), 4.00 s (longest)
model calls at a time: 3 (main 2, cron 1)"""


def test_how_a_timeline_is_drawn():
    turns = {name: lane_theatre.Turn(*moments) for name, moments in TURNS.items()}
    people = [SimpleNamespace(name="ada"), SimpleNamespace(name="bob")]
    stage = SimpleNamespace(people=people, turns=turns, all_turns=lambda: list(turns.values()))
    assert lane_theatre.Timeline("a title", stage).draw(1) == DRAWN


def test_how_a_moment_is_drawn():
    turns = [lane_theatre.Turn(1, 2, 3), lane_theatre.Turn(1, 4, 5)]
    drawn = "".join(lane_theatre.mark(turns, second + 0.5) for second in range(6))
    assert drawn == " .#.# "
