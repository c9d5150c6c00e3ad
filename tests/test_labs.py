"""The crash lab and the lane theatre, run as a reader runs them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash_lab
import harness
import lane_theatre
import pytest
from harness import since

TESTS = Path(__file__).parent
ROW = re.compile(r"^([a-z-]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)   \S", re.M)
POINTS = ("queued", "sent", "pieces")  # one of each kind

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL and pseudo-terminals")


def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(TESTS / command), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, encoding="utf-8", timeout=110)


def lab(script: Path, *points: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """What the lab says, and its rows: enqueued, sent, received twice, lost, out of order."""
    chosen = [word for point in points for word in ("--point", point)]
    done = run("crash_lab.py", "--script", script, *chosen)
    return done, {name: tuple(map(int, row)) for name, *row in ROW.findall(done.stdout)}


@since("s08")
def test_the_ledger_is_balanced(section: harness.Section, whole: bool):
    points = POINTS if whole else ("sent",)
    done, rows = lab(section.path, *points)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {"queued": (6, 6, 0, 0, 0), "pieces": (8, 8, 0, 0, 0)}
    expected["sent"] = (6, 7, 1, 0, 0)  # what no order of the two can prevent
    assert rows == {point: expected[point] for point in points}
    assert "Lost: 0. Received twice: 1, where 1 may be. Out of order: 0." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.since("s08")
def test_the_lab_finds_what_is_wrong(tmp_path: Path):
    """In a copy that acknowledges first and sends then, which loses what a kill comes between."""
    (section,) = [each for each in harness.sections() if each.label == "s08"]
    send, ack = "self.channel.send(delivery.peer, piece, key)", 'self.queue.settle(delivery, "ack")'
    assert section.source.count(f"            {send}\n") == 1
    copy = tmp_path / section.path.name
    text = section.source.replace(f"        else:\n            {ack}\n", "")
    copy.write_text(text.replace(send, f"{ack}\n            {send}"), encoding="utf-8")
    done, rows = lab(copy, "acked", "waiting")
    assert done.returncode == 1 and not done.stderr
    assert rows["acked"] == (6, 5, 0, 1, 0) and "- 1 lost" in done.stdout
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


def test_the_points_have_names():
    done = run("crash_lab.py", "--list")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == [point.name for point in crash_lab.POINTS] and len(set(names)) >= 10
    assert done.stdout.count("it may come twice") == 3
    assert max(len(str(crash_lab.Row(point))) for point in crash_lab.POINTS) <= 100


WRONG = [
    ("crash_lab.py", ["--point", "nowhere"], 1, "there is no point 'nowhere'; there are: taken, "),
    ("crash_lab.py", ["--script", harness.FOLDER / "s07_heartbeat_cron.py"], 1, "choose s08"),
    ("lane_theatre.py", ["--script", harness.FOLDER / "s09_resilience.py"], 1, "choose s10"),
    ("lane_theatre.py", ["--people", "0"], 2, "a number from 1 to 8, not '0'"),
]


@pytest.mark.parametrize(("command", "arguments", "status", "told"), WRONG)
def test_wrong_flags(command: str, arguments: list, status: int, told: str):
    done = run(command, *arguments)
    assert done.returncode == status and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{command}: ") and told in last and "Traceback" not in done.stderr
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path):
    command = [sys.executable, str(TESTS / "crash_lab.py")]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, encoding="utf-8"
    ) as process:
        deadline = time.monotonic() + 60
        while len(relatives := family(process.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(relatives) >= 4, "the lab has started no script"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and not errors
    while left := {pid for pid in relatives if family(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def columns_of(timeline: str) -> tuple[dict[str, str], list[str]]:
    """The rows of a timeline, and what all of them show in each column."""
    rows = {line[:16].strip(): line[16:] for line in timeline.splitlines()[1:-1]}
    width = max(map(len, rows.values()))
    padded = [row.ljust(width) for row in rows.values()]
    return rows, ["".join(each) for each in zip(*padded, strict=True)]


def test_the_two_timelines():
    """With one lock one runs at a time, and all others wait; with lanes they run side by side."""
    done = run("lane_theatre.py", "--people", 3, "--seconds", 0.3)
    assert done.returncode == 0, done.stdout + done.stderr
    head, lock, lanes, ratio = done.stdout.strip().split("\n\n")
    assert "3 people, 2 questions each, 0.3 s for an answer" in head
    names = ["ada   telegram", "bob   telegram", "cem   feishu", "heartbeat", "cron"]
    for timeline in (lock, lanes):
        rows, columns = columns_of(timeline)
        assert list(rows) == names and all("#" in row for row in rows.values())
        most = max(column.count("#") for column in columns)
        assert (most == 1) == (timeline is lock), timeline
        assert re.search(r"waited \d+\.\d\d s \(median\), \d+\.\d\d s \(longest\)", timeline)
    assert "s09_resilience.py" in lock and "model calls at a time: 1" in lock
    assert "s10_concurrency.py" in lanes and "model calls at a time: 1" not in lanes
    assert all("." in row for name, row in columns_of(lock)[0].items() if name != "heartbeat")
    assert re.fullmatch(
        r"one lock takes \d+\.\d times as long; .* \d+\.\d times \(longest\)", ratio
    )
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_how_a_moment_is_drawn():
    turns = [lane_theatre.Turn(1, 2, 3), lane_theatre.Turn(1, 4, 5)]
    drawn = "".join(lane_theatre.mark(turns, second + 0.5) for second in range(6))
    assert drawn == " .#.# "
