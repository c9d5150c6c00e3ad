"""Heartbeat and cron (s07): what wakes the agent, when exactly, how often, and who is told."""

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import harness
import pytest
from cronsim import CronSim
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Stall
from fake_model import Text
from harness import Screen
from harness import since

from first import test_telegram
from first.test_telegram import PROMPT
from first.test_telegram import Post
from first.test_telegram import drawn
from first.test_telegram import lines_with

post, telegram = test_telegram.post, test_telegram.telegram  # fixtures

MINUTE, HOUR, DAY = 60, 3600, 86400
WAKE = "Nobody has written"  # how the question of a beat begins
OK = "HEARTBEAT_OK"


def moment(text: str, zone: str = "UTC") -> float:
    """A local time, as 2027-03-01 09:00, in seconds since 1970."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def stamp(at: float) -> str:
    """A time as CRON.json has it."""
    return datetime.fromtimestamp(at, UTC).isoformat()


def job(name: object, schedule: object, /, **more: object) -> dict:
    """An entry of CRON.json; it tells its own name unless it has a payload."""
    payload = {"kind": "system_event", "text": f"this is {name}"}
    return {"id": name, "schedule": schedule, "payload": payload, **more}


def turn(name: str, schedule: dict, /, **more: object) -> dict:
    """A job that asks the model."""
    return job(name, schedule, payload={"kind": "agent_turn", "message": f"do {name}"}, **more)


def at(when: float, **more: object) -> dict:
    return {"kind": "at", "at": stamp(when), **more}


def every(seconds: object, **more: object) -> dict:
    return {"kind": "every", "every_seconds": seconds, **more}


def cron(expr: str, tz: str = "UTC") -> dict:
    return {"kind": "cron", "expr": expr, "tz": tz}


class OneLane:
    """The lanes of s10 as the one lane of s07: a place in main, and what the heartbeat sees."""

    def __init__(self, module, has_more: Callable[[], bool]):
        self.commands, self.task, self.lock = module.CommandQueue(has_more), module.Task, self
        self.commands.limit("main", 1)
        self.main, self.beat = self.commands.lane("main"), self.commands.lane("heartbeat")
        self.attempt, self.busy, self.waiting = self.beat.attempt, self.beat.busy, self.main.waiting
        self.person = None
        self.places = threading.local()

    def __enter__(self) -> None:
        self.places.held = self.commands.enter("main")
        self.places.held.__enter__()

    def __exit__(self, *about: object) -> None:
        self.places.held.__exit__(*about)

    def acquire(self) -> None:
        with self.commands.lock:
            self.person = self.task(running=True)
            self.main.hold(self.person)

    def release(self) -> None:
        if self.person is None:
            self.beat.release()
            return
        with self.commands.lock:
            self.commands.leave(self.person)
            self.person = None

    def __str__(self) -> str:
        return str(self.main)


def one_lane(module, has_more: Callable[[], bool]):
    """What people and background work share, of the section under test."""
    return module.Lane(has_more) if hasattr(module, "Lane") else OneLane(module, has_more)


class Bench:
    """The heartbeat and the jobs on a clock of ours, with nobody but us around them."""

    def __init__(self, section: harness.Section, folder: Path):
        self.module, self.folder, self.time = section.module, folder, moment("2027-03-01 09:00")
        self.asked: list[tuple[float, str]] = []  # when the model was asked, and by which job
        self.told: list[tuple[float, str]] = []
        self.screen: list[str] = []
        self.more = False
        self.answer: Callable[[str], str] = lambda name: f"answer to {name}"
        self.spawn: Callable = lambda function, *args: function(*args)
        self.start()

    def now(self) -> float:
        return float(self.time)

    def wait(self, event: threading.Event, seconds: float) -> None:
        self.time += seconds

    def start(self) -> None:
        """The program begins, anew if it has run before."""
        self.lane = one_lane(self.module, lambda: self.more)
        self.app = app = SimpleNamespace(told={}, lane=self.lane)
        app.lanes = getattr(self.lane, "commands", None)
        app.agent = SimpleNamespace(workspace=self.folder)
        app.agents = SimpleNamespace(agents={"main": None, "luna": None})
        app.cli = SimpleNamespace(send=lambda peer, text: self.screen.append(text))
        app.think, app.announce = self.think, self.announce
        app.report = lambda *about: self.module.App.report(app, *about)
        self.log = self.module.RunLog(self.folder / "cron" / "cron-runs.jsonl")
        self.beat = self.module.HeartbeatRunner(app, self, self.log)
        self.cron = self.module.CronService(app, self, self.log, self.spawn)
        app.cron, app.heartbeat = self.cron, self.beat

    def think(self, name: str, text: str, agent: str = "main") -> str:
        self.asked.append((self.time, name))
        return self.answer(name)

    def announce(self, title: str, text: str) -> None:
        self.told.append((self.time, f"{title}: {text}"))

    def checklist(self, text: str) -> None:
        """What HEARTBEAT.md holds."""
        (self.folder / "HEARTBEAT.md").write_text(text, encoding="utf-8")

    def file(self, text: str | bytes) -> None:
        """What CRON.json holds from now on: of a later time than before, however fast we are."""
        path = self.folder / "CRON.json"
        before = path.stat().st_mtime_ns if path.exists() else time.time_ns()
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        os.utime(path, ns=(before + 10**9, before + 10**9))

    def jobs(self, *entries: object) -> None:
        self.file(json.dumps({"jobs": entries}))

    def until(self, end: float, step: float = 0) -> None:
        """Let time pass as the service's own thread does, or step by step."""
        while self.time < end:
            pause = self.cron.tick()
            self.time = min(self.time + (step or max(pause, 0.001)), end)
        self.cron.tick()

    def times(self, name: str) -> list[float]:
        """When a job told something, counted from the bench's first moment."""
        told = [t for t, text in self.told if text.startswith(f"cron {name}:")]
        return [t - moment("2027-03-01 09:00") for t in told]

    def command(self, line: str) -> str:
        """What a command of the terminal says."""
        name, _, rest = line.partition(" ")
        handler = next(c[2] for c in self.module.COMMANDS.values() if c[0].split()[0] == name)
        return handler(SimpleNamespace(app=self.app), rest)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own settings."""
    for name in ("HEARTBEAT_SECONDS", "HEARTBEAT_HOURS", "TZ", "OWNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIMEZONE", "UTC")


@pytest.fixture
def bench(section, tmp_path: Path) -> Bench:
    return Bench(section, tmp_path)


# --- should it run ---


@since("s07")
def test_a_beat_runs_when_it_is_due(bench: Bench):
    bench.checklist("- look\n")
    bench.beat.tick()
    first = bench.time
    assert bench.beat.should_run() == (False, "not due for 1800 s")
    bench.time = first + 1799
    assert bench.beat.should_run() == (False, "not due for 1 s")
    bench.time = first + 1800
    assert bench.beat.should_run() == (True, "due")
    bench.beat.tick()
    bench.beat.tick()
    assert bench.asked == [(first + 1800, "heartbeat")]


@since("s07")
def test_a_beat_that_is_off_runs_only_when_triggered(bench: Bench, monkeypatch):
    monkeypatch.setenv("HEARTBEAT_SECONDS", "0")
    monkeypatch.setenv("HEARTBEAT_HOURS", "22:00-23:00")
    bench.start()
    bench.checklist("- look\n")
    for _ in range(3):
        bench.time += DAY
        assert not bench.beat.should_run()[0] and "off" in bench.beat.tick()
    assert bench.asked == []
    bench.beat.triggered = True
    assert bench.beat.should_run() == (True, "triggered")
    bench.beat.tick()
    assert len(bench.asked) == 1 and "off" in bench.beat.tick()


HOURS = [
    ("08:00-22:00", "UTC", {"07:59": 0, "08:00": 1, "21:59": 1, "22:00": 0, "00:00": 0}),
    ("22:00-06:30", "UTC", {"21:59": 0, "22:00": 1, "00:00": 1, "06:29": 1, "06:30": 0}),
    ("20:00-24:00", "UTC", {"19:59": 0, "20:00": 1, "23:59": 1, "00:00": 0}),
    ("00:00-24:00", "UTC", {"00:00": 1, "12:00": 1, "23:59": 1}),
    ("24:00-06:00", "UTC", {"23:59": 0, "00:00": 1, "05:59": 1, "06:00": 0}),
    ("08:00-22:00", "Europe/Berlin", {"06:00": 0, "06:59": 0, "07:00": 1, "20:59": 1, "21:00": 0}),
]


@since("s07")
@pytest.mark.parametrize("hours, zone, moments", HOURS)
def test_the_hours(bench: Bench, monkeypatch, hours: str, zone: str, moments: dict):
    """The first minute is within, the last is not; in winter Berlin is an hour before UTC."""
    monkeypatch.setenv("HEARTBEAT_HOURS", hours)
    monkeypatch.setenv("TIMEZONE", zone)
    bench.start()
    bench.checklist("- look\n")
    bench.log.record("beat", at=moment("2027-02-01 00:00"))
    for clock, within in moments.items():
        bench.time = moment(f"2027-02-02 {clock}") + 59
        told = (True, "due") if within else (False, "outside HEARTBEAT_HOURS")
        assert bench.beat.should_run() == told, clock
        bench.beat.triggered = True
        assert bench.beat.should_run() == (True, "triggered")
        bench.beat.triggered = False


@since("s07")
def test_the_hours_are_those_of_the_day_that_the_clock_changes(bench: Bench, monkeypatch):
    monkeypatch.setenv("HEARTBEAT_HOURS", "08:00-22:00")
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    bench.start()
    bench.checklist("- look\n")
    bench.log.record("beat", at=moment("2027-03-01 00:00"))
    for day, first, last in (
        ("03-27", 7, 21),
        ("03-28", 6, 20),
        ("10-30", 6, 20),
        ("10-31", 7, 21),
    ):
        midnight = moment(f"2027-{day} 00:00")
        within = []
        for minute in range(24 * 60):
            bench.time = midnight + minute * MINUTE
            if bench.beat.should_run()[0]:
                within.append(minute)
        assert within == list(range(first * 60, last * 60)), day


EMPTY = [
    "",
    "# Heading\n",
    "\n\n  \n",
    "# A\n\n## B\n<!-- none -->\n",
    "- \n* \n- [ ]\n",
    "\ufeff# A",
]


@since("s07")
def test_a_list_that_asks_for_nothing_costs_nothing(bench: Bench):
    bench.log.record("beat", at=bench.time - DAY)
    file, asks = bench.folder / "HEARTBEAT.md", "HEARTBEAT.md asks for nothing"
    for text in (None, *EMPTY):
        if text is not None:
            bench.checklist(text)
        for bench.beat.triggered in (False, True):
            assert bench.beat.should_run() == (False, asks), text
            assert bench.beat.tick() == asks
    file.unlink()
    file.mkdir()
    assert bench.beat.tick() == asks
    file.rmdir()
    file.write_bytes(b"- \xff look")
    ready, reason = bench.beat.should_run()
    assert not ready and "HEARTBEAT.md" in reason and bench.asked == []
    bench.checklist("\ufeff# A\r\n\r\n- look\r\n")
    assert bench.beat.should_run()[0]


@since("s07")
def test_a_beat_waits_for_those_who_are_answered(bench: Bench):
    bench.checklist("- look\n")
    bench.log.record("beat", at=bench.time - DAY)
    busy, done = (False, "busy: somebody is being answered"), threading.Event()

    def person() -> None:
        with bench.lane:
            done.set()

    for bench.beat.triggered in (True, False):
        bench.lane.lock.acquire()
        assert bench.beat.should_run() == busy and bench.beat.tick() == busy[1]
        assert bench.beat.should_run(lane_free=True)[0]
        thread = threading.Thread(target=person)
        thread.start()
        while not bench.lane.waiting:
            time.sleep(0.001)
        assert bench.beat.should_run() == busy and bench.beat.tick() == busy[1]
        bench.lane.release()
        thread.join(10)
        bench.more = True
        assert bench.beat.should_run() == busy and bench.beat.tick() == busy[1]
        bench.more = False
        assert bench.beat.should_run()[0]
    assert bench.asked == [] and bench.beat.tick() == "told"


# --- whose turn it is ---


def write_jobs(folder: Path, *entries: object) -> None:
    (folder / "CRON.json").write_text(json.dumps({"jobs": entries}), encoding="utf-8")


def past(folder: Path, *records: dict) -> None:
    """What an earlier run has left in the run log; without records, a beat long ago."""
    path = folder / "cron" / "cron-runs.jsonl"
    path.parent.mkdir(exist_ok=True)
    records = records or ({"type": "beat", "at": time.time() - DAY},)
    with path.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def question(body: dict) -> str:
    """The latest question of a request to the model."""
    return [m["content"] for m in body["messages"] if m["role"] == "user"][-1]


def kinds(model: FakeModel) -> list[str]:
    """Who asked the model, request by request."""
    asked = [question(chat.body) for chat in model.chats]
    return ["beat" if text.startswith(WAKE) else text for text in asked]


class Brain:
    """A model that answers people and jobs at once, or when their gate opens."""

    def __init__(self, model: FakeModel):
        self.gates: dict[str, threading.Event] = {}
        self.beat = OK
        model.script("brain", [self], repeat=True)

    def __call__(self, body: dict):
        text = question(body)
        kind = "beat" if text.startswith(WAKE) else text
        answer = self.beat if kind == "beat" else f"heard {text}"
        if "fail" in text:
            return Error(422)
        gate = next((gate for key, gate in self.gates.items() if key in kind), None)
        return Gate(gate, Text(answer)) if gate else Text(answer)

    def hold(self, kind: str) -> threading.Event:
        self.gates[kind] = threading.Event()
        return self.gates[kind]


@pytest.fixture
def brain(fake_model: FakeModel) -> Iterator[Brain]:
    brain = Brain(fake_model)
    yield brain
    for gate in brain.gates.values():
        gate.set()


def begin(section: harness.Section, model: FakeModel, **env: str) -> Screen:
    """A run at a terminal, at its prompt."""
    screen = Screen(section, model.env("brain", TIMEZONE="UTC", **env))
    screen.wait_for(PROMPT)
    return screen


def leave(screen: Screen) -> None:
    drawn(screen, PROMPT)
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0
    assert not re.search("Traceback|Exception", screen.text), screen.text


def hasty(section: harness.Section, folder: Path) -> harness.Section:
    """The section, with a look at files and clock not every five seconds but all the time."""
    path = folder / section.path.name
    source, found = re.subn("^LOOK = 5\\b", "LOOK = 0.1", section.source, flags=re.M)
    assert found == 1
    path.write_text(source, encoding="utf-8")
    return harness.Section(path)


@since("s07")
@pytest.mark.costly
def test_a_beat_waits_for_a_turn_and_a_person_only_for_the_beat(
    section, fake_model: FakeModel, brain: Brain, workspace: Path, tmp_path: Path
):
    (workspace / "HEARTBEAT.md").write_text("- look\n")
    past(workspace, {"type": "beat", "at": time.time()})
    one, beat = brain.hold("one"), brain.hold("beat")
    with begin(hasty(section, tmp_path), fake_model, HEARTBEAT_SECONDS="2") as screen:
        screen.type("one\n")
        fake_model.wait(1)
        time.sleep(3.2)  # by now it is due, and was looked at
        assert kinds(fake_model) == ["one"]
        one.set()
        screen.wait_for("heard one")
        fake_model.wait(2)
        screen.wait_for(PROMPT)
        screen.type("two\n")
        time.sleep(0.3)
        assert kinds(fake_model) == ["one", "beat"]
        beat.set()
        screen.wait_for("heard two", 2)
        leave(screen)
    assert kinds(fake_model)[:3] == ["one", "beat", "two"] and fake_model.peak == 1


@since("s07")
def test_a_person_who_waits_comes_before_a_beat_that_is_due(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    """The beat is due from the start; it goes when nobody has anything to say any more."""
    (workspace / "HEARTBEAT.md").write_text("- look\n")
    gates = [brain.hold(name) for name in ("beat", "one", "two")]
    past(workspace)
    with begin(section, fake_model) as screen:
        fake_model.wait(1)
        assert kinds(fake_model) == ["beat"]
        screen.type("one\ntwo\n")
        gates[0].set()
        fake_model.wait(2)
        screen.type("/trigger\n")  # it waits behind what was typed before
        gates[1].set()
        fake_model.wait(3)
        gates[2].set()
        fake_model.wait(4)
        leave(screen)
    assert kinds(fake_model) == ["beat", "one", "two", "beat"] and fake_model.peak == 1


@since("s07")
def test_the_lane_goes_to_people_first(section):
    """Whoever tries it for the background gets it only when nobody holds it or waits."""
    lane, order = one_lane(section.module, lambda: False), []

    def person(number: int) -> None:
        with lane:
            order.append(f"person {number}")
            time.sleep(0.02)

    def background() -> None:
        while not lane.attempt():
            time.sleep(0.001)
        order.append("background")
        lane.release()

    with lane:
        threads = [threading.Thread(target=background)]
        threads += [threading.Thread(target=person, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        while "5 waiting" not in str(lane):
            time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order[-1] == "background" and len(order) == 6 and not lane.busy()


# --- what a beat tells ---

REMARK, ESSAY = "All is quiet. " * 20, "The build is red. " * 20
SWALLOWED = [
    OK,
    f"**{OK}**",
    f"`{OK}`",
    f'"{OK}"',
    f"'{OK}'",
    f"<b>{OK}</b>",
    f"  {OK}.\n",
    f"**{OK}**\n\n{REMARK}",
    f"{REMARK}\n\n{OK}",
    f"{OK} - {'x' * 297}xxx",
    f"{'x' * 300} {OK}",
    f"Nothing to do. {OK}!",
    "",
]
TOLD = [
    (f"{OK} {'x' * 301}", "x" * 301),
    (f"{'x' * 301}\n{OK}", "x" * 301),
    (f"**{OK}**\n\n{ESSAY}", ESSAY.strip()),
    (f"{ESSAY}\n\n`{OK}`", None),
    (f"{OK}\n\n{'x' * 301}\n\n{OK}", "x" * 301),
    (f"I say {OK} only when all is well.", f"I say {OK} only when all is well."),
    ("HEARTBEAT_OKAY", "HEARTBEAT_OKAY"),
    ("NO_HEARTBEAT_OK", "NO_HEARTBEAT_OK"),
    ("HEARTBEAT_OK_NOT", "HEARTBEAT_OK_NOT"),
    ("The disk is full.", "The disk is full."),
]


@since("s07")
@pytest.mark.parametrize("text", SWALLOWED)
def test_an_answer_that_says_there_is_nothing_is_swallowed(bench: Bench, text: str):
    bench.answer = lambda name: text
    bench.checklist("- look\n")
    bench.beat.triggered = True
    assert bench.beat.tick() == "nothing to tell" and bench.told == []


@since("s07")
@pytest.mark.parametrize("text, told", TOLD)
def test_an_answer_that_says_more_is_told(bench: Bench, text: str, told: str | None):
    bench.answer = lambda name: text
    bench.checklist("- look\n")
    bench.beat.triggered = True
    assert bench.beat.tick() == "told"
    words = bench.told[0][1].removeprefix("heartbeat: ")
    assert words == told if told else OK not in words and words.startswith("The build is red.")


@since("s07")
def test_a_long_answer_is_looked_through_at_once(section):
    for noise in ("-" * 10_000, " \n" * 5000, "| " * 5000, OK * 1000, f"{OK} " * 1000):
        began = time.process_time()
        section.module.strip_ok(f"x{noise}x")
        assert time.process_time() - began < 0.5, f"{noise[:20]}..."


@since("s07")
def test_the_same_words_are_told_once_a_day(bench: Bench):
    bench.checklist("- look\n")
    bench.answer = lambda name: "The disk is full."
    first = bench.time
    told = []
    for hours in (0, 1, 12, 23.9, 24, 25, 47.9, 48, 49):
        bench.time = first + hours * HOUR
        bench.start()  # a restart forgets nothing
        bench.beat.triggered = True
        if bench.beat.tick() == "told":
            told.append(hours)
    assert told == [0, 24, 48] and len(bench.asked) == 9
    bench.answer = lambda name: "The disk is full, and the cellar, too."
    bench.beat.triggered = True
    assert bench.beat.tick() == "told"


@since("s07")
def test_a_model_error_is_no_message(bench: Bench):
    bench.checklist("- look\n")
    bench.log.record("beat", at=bench.time - DAY)

    def fail(name: str) -> str:
        raise RuntimeError("out of order")

    bench.answer = fail
    assert "out of order" in bench.beat.tick() and bench.told == []
    assert not bench.lane.busy()
    for _ in range(100):
        bench.time += 5
        bench.beat.tick()
    assert len(bench.asked) == 1 and len(bench.screen) == 1, "a beat that fails waits as others do"
    bench.answer = lambda name: "well"
    bench.time += 1800
    assert bench.beat.tick() == "told"


@since("s07")
def test_what_a_beat_could_not_tell_is_told_by_the_next(bench: Bench):
    bench.checklist("- look\n")
    bench.answer = lambda name: "The disk is full."

    def fail(title: str, text: str) -> None:
        raise OSError("the inbox was removed")

    announce, bench.app.announce = bench.app.announce, fail
    bench.beat.triggered = True
    with pytest.raises(OSError):
        bench.beat.tick()
    bench.app.announce, bench.beat.triggered = announce, True
    assert bench.beat.tick() == "told" and not bench.lane.busy()


@since("s07")
def test_a_beat_when_the_clock_is_set_back(bench: Bench):
    """It is at most an interval until the next one, whatever the last one's time was."""
    bench.checklist("- look\n")
    for _ in range(100):
        bench.beat.tick()
        bench.time += 60
    bench.time -= DAY
    asked = len(bench.asked)
    bench.beat.tick()
    assert len(bench.asked) == asked
    for _ in range(31):
        bench.time += 60
        bench.beat.tick()
    assert len(bench.asked) == asked + 1


@since("s07")
def test_a_restart_does_not_beat(bench: Bench):
    bench.checklist("- look\n")
    for _ in range(20):
        bench.start()
        bench.beat.tick()
        bench.time += 60
    assert bench.asked == []
    bench.time += 1800
    bench.beat.tick()
    for _ in range(20):
        bench.start()
        bench.beat.tick()
        bench.time += 60
    assert len(bench.asked) == 1


@since("s07")
def test_a_beat_keeps_out_of_the_conversation(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    (workspace / "HEARTBEAT.md").write_text("# Heading\n- see the moon\n")
    brain.beat = "The moon is full."
    past(workspace)
    with begin(section, fake_model) as screen:
        screen.wait_for("[heartbeat] The moon is full.")
        screen.type("one\n")
        screen.wait_for("heard one")
        screen.wait_for(PROMPT)
        brain.beat = "**HEARTBEAT_OK**"
        screen.type("/trigger\n")
        fake_model.wait(3)
        screen.wait_for(PROMPT)
        screen.type("two\n")
        screen.wait_for("heard two")
        screen.wait_for(PROMPT)
        screen.type("/heartbeat\n")
        screen.wait_for(re.compile(r"not due for \d+ s.*nothing to tell"))
        leave(screen)
        assert screen.paper.count("moon") == 1 and OK not in screen.paper
    beats = [chat for chat in fake_model.chats if question(chat.body).startswith(WAKE)]
    assert len(beats) == 2 and all("see the moon" in question(beat.body) for beat in beats)
    assert all([m["role"] for m in beat.messages] == ["system", "user"] for beat in beats)
    talk = json.dumps(fake_model.chats[-1].messages[1:])
    assert "heard one" in talk and "moon" not in talk and WAKE not in talk
    with begin(section, fake_model) as screen:  # and is not resumed by the next run
        screen.type("three\n")
        screen.wait_for("heard three")
        leave(screen)
    talk = json.dumps(fake_model.chats[-1].messages[1:])
    assert "heard two" in talk and "moon" not in talk and WAKE not in talk
    assert kinds(fake_model) == ["beat", "one", "beat", "two", "three"]


@since("s07")
def test_the_files_that_ship_cost_nothing(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    past(workspace)
    with begin(section, fake_model) as screen:
        screen.type("/trigger\n")
        screen.wait_for("HEARTBEAT.md asks for nothing")
        screen.wait_for(PROMPT)
        screen.type("/heartbeat\n")
        screen.wait_for("HEARTBEAT.md asks for nothing")
        screen.wait_for(PROMPT)
        screen.type("/cron\n")
        screen.wait_for(re.compile("morning-brief.*\n.*stand-up.*\n.*renew-domain"))
        leave(screen)
    assert fake_model.chats == []


@since("s07")
def test_a_beat_that_fails_is_told_at_the_terminal_alone(post: Post):
    (post.workspace / "HEARTBEAT.md").write_text("- fail\n")
    Brain(post.model)
    with post.screen() as screen:
        post.ask("hello")
        screen.wait_for("heard hello")
        drawn(screen, PROMPT)
        screen.type("/trigger\n")
        screen.wait_for("heartbeat failed")
        drawn(screen, PROMPT)
    assert post.told(42) == ["heard hello"]


# --- cron, by another's reckoning ---

NIGHTS = {
    "Europe/Berlin": ("2027-03-28", "2027-10-31"),
    "America/New_York": ("2027-03-14", "2027-11-07"),
    "Asia/Shanghai": ("2027-03-28", "2027-10-31"),
    "UTC": ("2027-03-28", "2027-10-31"),
    "Australia/Lord_Howe": ("2027-04-04", "2027-10-03"),
    "America/St_Johns": ("2027-03-14", "2027-11-07"),
    "Africa/Cairo": ("2027-04-30", "2027-10-29"),
    "Asia/Tehran": ("2027-03-21", "2027-09-21"),
}
GAP = datetime(2027, 4, 29, 22, tzinfo=UTC)  # when Cairo's clock goes from 00:00 to 01:00
FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


def some_field(dice: random.Random, least: int, most: int, wild: float) -> str:
    """*, */n, a number, a range or a list."""
    if dice.random() < wild:
        return "*"
    kind = dice.choice(("step", "number", "number", "range", "list"))
    if kind == "step":
        return f"*/{dice.randint(1, max(2, most // 2))}"
    if kind == "number":
        return str(dice.randint(least, dice.choice((3, most))))
    if kind == "range":
        low, high = sorted((dice.randint(least, most), dice.randint(least, most)))
        return f"{low}-{high}"
    return ",".join(str(dice.randint(least, most)) for _ in range(dice.randint(2, 4)))


def some_expressions(count: int) -> list[str]:
    """Random ones, most of them of every day and hour, for those meet the night."""
    dice = random.Random(7)
    chances = (0.25, 0.4, 0.75, 0.85, 0.75)
    found = []
    while len(found) < count:
        parts = [some_field(dice, *f, wild) for f, wild in zip(FIELDS, chances, strict=True)]
        expr = " ".join(parts)
        try:
            next(CronSim(expr, datetime(2027, 1, 1)))
        except Exception:  # a day that never comes
            continue
        found.append(expr)
    return found


def cron_job(section: harness.Section, expr: str, zone: str):
    """A job as the service reads it."""
    entry = {"name": "", "enabled": True, "delete_after_run": False, "agent": "main"}
    return section.module.CronJob(**job("x", cron(expr, zone)), **entry)


def both(section: harness.Section, expr: str, zone: str, start: datetime) -> list[list[datetime]]:
    """The first five times as the section has them, and as cronsim has them."""
    ours = islice(cron_job(section, expr, zone).times(start.timestamp()), 5)
    theirs = islice(CronSim(expr, start), 5)
    return [[each.astimezone(UTC) for each in times] for times in (ours, theirs)]


def is_known(expr: str, zone: str, first: datetime) -> bool:
    """Whether a first difference is one of the two that are known of croniter.

    It is half an hour off on Lord Howe's two days, up to the first hour after them. In Cairo, where
    midnight itself is left out, a job of `*` at midnight on this day does not run right after.
    """
    day = f"{first.astimezone(ZoneInfo(zone)) - timedelta(hours=1):%Y-%m-%d}"
    if zone == "Australia/Lord_Howe":
        return day in NIGHTS[zone]
    return zone == "Africa/Cairo" and first == GAP and "*" in (expr[0], expr.split()[1][0])


def compare(section: harness.Section, cases: list[tuple[str, str, datetime]]) -> set[str]:
    """The zones with known differences from cronsim; one that is not known fails."""
    unknown, known = [], set()
    for expr, zone, start in cases:
        start = start.replace(tzinfo=UTC).astimezone(ZoneInfo(zone))
        ours, theirs = both(section, expr, zone, start)
        if ours != theirs:
            differing = sorted({*ours} ^ {*theirs})
            if is_known(expr, zone, differing[0]):
                known.add(zone)
            else:
                unknown.append((expr, zone, str(start), str(differing[0])))
    assert not unknown, f"{len(unknown)}: {unknown[:5]}"
    return known


@since("s07")
def test_the_times_are_those_of_cronsim(section):
    dice, cases = random.Random(11), []
    for number, expr in enumerate(some_expressions(2000)):
        zone = [*NIGHTS][number % len(NIGHTS)]
        night = datetime.fromisoformat(dice.choice(NIGHTS[zone]))
        cases.append((expr, zone, night - timedelta(minutes=dice.randint(-180, 1500))))
    assert compare(section, cases) <= {"Australia/Lord_Howe", "Africa/Cairo"}


@since("s07")
def test_the_nights_are_those_of_cronsim(section):
    """Each kind of minute with each kind of hour, over each change of the clock."""
    cases = [
        (f"{minute} {hour} * * {days}", zone, datetime.fromisoformat(night) - timedelta(hours=14.5))
        for minute in ("*", "*/20", "0", "30", "15,45", "10-12")
        for hour in ("*", "0", "1", "2", "3", "0-3", "*/2", "0,2", "23")
        for days in ("*", "0,5")
        for zone, nights in NIGHTS.items()
        for night in nights
    ]
    assert compare(section, cases) == {"Australia/Lord_Howe", "Africa/Cairo"}


@since("s07")
def test_a_year_of_nights(section):
    """What an expression means where the clock changes, as people would write it down."""
    table = [
        ("30 2 * * *", "Europe/Berlin", "2027-03-27 12:00", ["03-28 03:00", "03-29 02:30"]),
        ("30 2 * * *", "Europe/Berlin", "2027-10-30 12:00", ["10-31 02:30", "11-01 02:30"]),
        ("30 1 * * *", "America/New_York", "2027-11-06 12:00", ["11-07 01:30", "11-08 01:30"]),
        ("0 9 * * *", "Europe/Berlin", "2027-03-27 12:00", ["03-28 09:00", "03-29 09:00"]),
        ("0 9 * * *", "Asia/Shanghai", "2027-03-27 12:00", ["03-28 09:00", "03-29 09:00"]),
        ("0 0 1,15 * 1", "UTC", "2027-06-01 12:00", ["06-07 00:00", "06-14 00:00", "06-15 00:00"]),
        ("0 0 29 2 *", "UTC", "2027-03-01 00:00", ["02-29 00:00"]),
        ("9-9 9-9 * * *", "UTC", "2027-03-01 00:00", ["03-01 09:09", "03-02 09:09"]),
        ("30 8 * JAN MON-FRI", "UTC", "2027-01-01 00:00", ["01-01 08:30", "01-04 08:30"]),
        ("0  8 *  * 7", "UTC", "2027-03-01 00:00", ["03-07 08:00"]),
    ]
    for expr, zone, start, expected in table:
        times = islice(cron_job(section, expr, zone).times(moment(start, zone)), len(expected))
        assert [f"{each:%m-%d %H:%M}" for each in times] == expected, expr


# --- jobs that cannot run ---

BAD = [
    job("past", at(moment("2027-03-01 08:00"))),
    job("zone", cron("0 9 * * *", "Mars/Olympus")),
    job("zone-at", at(moment("2027-04-01 08:00"), tz="Mars/Olympus")),
    job("zone-every", every(60, tz="Mars/Olympus")),
    job("zone-path", cron("0 9 * * *", "../../etc/passwd")),
    job("zone-type", cron("0 9 * * *", 7)),
    job("expr", cron("61 * * * *")),
    job("words", cron("every day at nine")),
    job("february", cron("0 0 30 2 *")),
    job("six", cron("0 0 9 * * *")),
    job("four", cron("0 9 * *")),
    job("step", cron("*/0 * * * *")),
    job("daily", cron("@daily")),
    job("expr-type", {"kind": "cron", "expr": 5}),
    job("good-1", every(60)),
    job("payload", every(60), payload={"kind": "sing", "text": "la"}),
    job("payload-empty", every(60), payload={"kind": "agent_turn", "message": "  "}),
    job("payload-type", every(60), payload="hello"),
    job("minus", every(-5)),
    job("zero", every(0)),
    job("true", every(True)),
    job("text", every("60")),
    job("half", every(0.5)),
    job("nan", every(float("nan"))),
    job("huge", every(float("inf"))),
    job("huge-2", every(10**300)),
    job("kind", {"kind": "never"}),
    job("schedule", "0 9 * * *"),
    job("when", {"kind": "at", "at": "tomorrow"}),
    job("when-type", {"kind": "at", "at": 1801242000}),
    job("when-end", {"kind": "at", "at": "9999-12-31T23:59:59-12:00"}),
    job("anchor", every(60, anchor="noon")),
    job("anchor-type", every(60, anchor=[1])),
    job("agent", every(60), agent="ghost"),
    job("agent-type", every(60), agent=["main"]),
    job("key", every(60), colour="red"),
    job("flag", every(60), enabled="yes"),
    job("flag-2", every(60), delete_after_run=1),
    job("name", every(60), name=7),
    {"schedule": every(60), "payload": {"kind": "system_event", "text": "x"}},
    job("", every(60)),
    job(7, every(60)),
    job(None, every(60)),
    {"id": "bare"},
    7,
    None,
    ["x"],
]


@since("s07")
def test_bad_jobs_are_told_in_a_line_each_and_the_others_run(bench: Bench):
    twin = job("good-1", every(30))
    bench.jobs(*BAD, twin, job("good-2", cron("*/5 * * * *")))
    bench.until(bench.time + 600)
    assert bench.times("good-1") == [60 * n for n in range(1, 11)]
    assert bench.times("good-2") == [300, 600]
    assert len(bench.told) == 12
    assert len(bench.screen) == len(BAD), "\n".join(bench.screen)
    assert all(re.fullmatch(r"\[CRON\.json, .{5,300}\]", line) for line in bench.screen)
    names = [entry.get("id") for entry in BAD if isinstance(entry, dict)]
    for name in names:
        if isinstance(name, str) and name and not name.startswith("good"):
            assert len([line for line in bench.screen if f"CRON.json, {name}:" in line]) == 1, name
    assert len([line for line in bench.screen if "CRON.json, good-1:" in line]) == 1
    assert not [line for line in bench.screen if "Traceback" in line or "Error(" in line]
    listing = bench.command("/cron")
    assert listing.startswith("good-1:") and all(
        line.strip("[]") in listing for line in bench.screen
    )
    before = len(bench.screen)
    bench.until(bench.time + 600)
    assert len(bench.screen) == before, "each is told once"


@since("s07")
@pytest.mark.parametrize(
    "entry",
    [
        e
        for e in BAD
        if isinstance(e, dict) and e.get("id") in ("zone-at", "zone-every", "when-end")
    ],
    ids=lambda e: e["id"],
)
def test_a_job_that_is_no_good_keeps_no_other_from_the_list(bench: Bench, entry: dict):
    bench.jobs(job("good", every(60)), entry)
    bench.cron.tick()
    assert "good: every 60" in bench.command("/cron")


FILES = [
    "{",
    "",
    "[]",
    "7",
    "null",
    '{"jobs": 7}',
    '{"jobs": {"id": "x"}}',
    '{"job": []}',
    "[" * 100_000,
    b"\xff\xfe",
    b'{"jobs": [{"id": "\xe9"}]}',
    " " * 10_000_001,
    '{"jobs": [], "x": 1' + "0" * 5000 + "}",
]


@since("s07")
def test_a_cron_json_that_may_not_be_read_leaves_the_jobs_alone(bench: Bench, monkeypatch):
    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied")

    bench.jobs(turn("good", every(60)))
    bench.cron.tick()
    with monkeypatch.context() as patch:
        patch.setattr(bench.module, "load_text", refuse)
        bench.jobs(turn("new", every(60)))
        told = bench.command("/cron")
    assert "good" in told and "CRON.json: Permission denied" in told
    told = bench.command("/cron")
    assert "new" in told and "Permission" not in told, "no edit is needed to have it read again"


@since("s07")
def test_a_bad_cron_json_is_told_once(bench: Bench):
    """The jobs before go on, as they do while somebody is in the middle of an edit."""
    bench.jobs(job("good", every(60)))
    bench.cron.tick()
    for number, text in enumerate(FILES):
        bench.file(text)
        bench.until(bench.time + 60)
        bench.until(bench.time + 60)
        name = repr(text[:20])
        assert len(bench.told) == 2 * number + 2, name
        assert len(bench.screen) == number + 1, (name, bench.screen)
        assert re.fullmatch(r"\[CRON\.json: .{5,300}\]", bench.screen[-1]), bench.screen[-1]
        assert "CRON.json: " in bench.command("/cron") and "good" in bench.command("/cron")
        bench.jobs(job("good", every(60)))
        bench.cron.tick()
        assert "CRON.json: " not in bench.command("/cron")
    (bench.folder / "CRON.json").unlink()
    (bench.folder / "CRON.json").mkdir()
    told = len(bench.told)
    bench.until(bench.time + 120)
    assert "CRON.json" in bench.screen[-1] and len(bench.screen) == len(FILES) + 1
    assert len(bench.told) == told + 2


@since("s07")
def test_a_byte_order_mark_and_no_file_are_fine(bench: Bench):
    bench.cron.tick()
    assert bench.command("/cron") == "there are no jobs"
    text = json.dumps({"note": "mine", "jobs": [job("good", every(60))]})
    bench.file(b"\xef\xbb\xbf" + text.encode())
    bench.until(bench.time + 60)
    assert len(bench.told) == 1 and bench.screen == []
    (bench.folder / "CRON.json").unlink()
    bench.until(bench.time + 600)
    assert len(bench.told) == 1 and bench.command("/cron") == "there are no jobs"


@since("s07")
def test_an_anchor_is_when_it_begins(bench: Bench):
    first = bench.time
    bench.jobs(
        job("ahead", every(3600, anchor=stamp(first + 5000))),
        job("behind", every(3600, anchor=stamp(first - 50 * 3600 + 100))),
        job("local", every(DAY, anchor="2027-03-02T00:00:00", tz="Europe/Berlin")),
        job("none", every(3600)),
    )
    bench.until(first + 13_000)
    assert bench.times("ahead") == [5000, 8600, 12_200]
    assert bench.times("behind") == [100, 3700, 7300, 10_900]
    assert bench.times("none") == [3600, 7200, 10_800]
    bench.until(first + DAY)
    assert bench.times("local") == [14 * 3600]
    assert bench.cron.preview(bench.cron.find("local"))[0] == "2027-03-03 00:00:00+01:00"


@since("s07")
def test_the_29th_of_february_is_in_a_leap_year(bench: Bench):
    bench.jobs(job("leap", cron("0 9 29 2 *", "Europe/Berlin")))
    times = bench.command("/cron-preview leap").splitlines()
    expected = [f"{year}-02-29 09:00:00+01:00" for year in range(2028, 2048, 4)]
    assert times == expected and bench.screen == []


# --- a week ---


@since("s07")
def test_a_week(bench: Bench, monkeypatch):
    """From Wednesday to Wednesday, with the last Sunday of March in it."""
    monkeypatch.setenv("HEARTBEAT_HOURS", "08:00-22:00")
    monkeypatch.setenv("TIMEZONE", "Europe/Berlin")
    bench.time = first = moment("2027-03-24 00:00", "Europe/Berlin")
    bench.start()
    bench.checklist("- look\n")
    bench.answer = lambda name: OK if name == "heartbeat" else name
    bench.jobs(
        job("once", at(moment("2027-03-25 09:00", "Europe/Berlin"))),
        turn("night", cron("30 2 * * *", "Europe/Berlin")),
        job("work", cron("0 9 * * 1-5", "Europe/Berlin")),
        job("desk", cron("0 18 * * 5", "America/New_York")),
        job("six", every(6 * HOUR, anchor="2027-03-24T01:00:00+01:00")),
        job("hour", cron("15 * 28 3 *", "Europe/Berlin")),
    )
    began = time.process_time()
    while bench.time < first + 7 * DAY:
        bench.cron.tick()
        bench.beat.tick()
        bench.time += 60
    assert time.process_time() - began < 3
    fired: dict[str, list[str]] = {}
    for when, text in bench.told:
        clock = datetime.fromtimestamp(when, ZoneInfo("Europe/Berlin"))
        fired.setdefault(text.split()[1].rstrip(":"), []).append(f"{clock:%d %H:%M}")
    days = range(24, 31)
    assert fired == {
        "once": ["25 09:00"],
        "night": [f"{day} {'03:00' if day == 28 else '02:30'}" for day in days],
        "work": [f"{day} 09:00" for day in (24, 25, 26, 29, 30)],
        "desk": ["26 23:00"],
        "six": SIX,
        "hour": [f"28 {hour:02d}:15" for hour in range(24) if hour != 2],
    }
    beats: dict[str, list[str]] = {}
    for when, name in bench.asked:
        if name == "heartbeat":
            clock = datetime.fromtimestamp(when, ZoneInfo("Europe/Berlin"))
            beats.setdefault(f"{clock:%d}", []).append(f"{clock:%H:%M}")
    half = [f"{hour:02d}:{minute}" for hour in range(8, 22) for minute in ("00", "30")]
    assert beats == {str(day): half for day in days}


SIX = [f"{day} {hour:02d}:00" for day in range(24, 28) for hour in (1, 7, 13, 19)]
SIX += ["28 01:00", "28 08:00", "28 14:00", "28 20:00"]
SIX += [f"{day} {hour:02d}:00" for day in (29, 30) for hour in (2, 8, 14, 20)]


# --- once, whatever happens ---


def killed(bench: Bench) -> None:
    """The program ends while the jobs that are on are on, and begins again."""

    def die(name: str) -> str:
        raise SystemExit

    before, bench.answer = bench.answer, die
    with pytest.raises(SystemExit):
        bench.until(bench.time + DAY)
    bench.answer = before
    bench.start()


@since("s07")
def test_what_was_missed_runs_once(bench: Bench):
    first = bench.time
    entries = [
        job("every", every(600)),
        job("daily", cron("0 10 * * *")),
        job("soon", at(first + 1800)),
        job("later", at(first + 5 * DAY)),
        job("gone", at(first + 300)),
    ]
    bench.jobs(*entries)
    bench.until(first + 900)
    assert bench.times("gone") == [300] and bench.times("every") == [600]
    bench.time = first + 3 * DAY + 100
    bench.start()
    bench.until(first + 3 * DAY + 1000)
    back = 3 * DAY + 100
    assert bench.times("every") == [600, back, 3 * DAY + 600]
    assert bench.times("daily") == [back] and bench.times("soon") == [back]
    assert bench.times("gone") == [300] and bench.times("later") == [] and bench.screen == []
    for _ in range(5):
        bench.start()
        bench.until(bench.time + 10)
    assert len(bench.told) == 6


@since("s07")
def test_a_clock_that_is_set_back(bench: Bench):
    first = bench.time
    bench.jobs(
        job("every", every(600)),
        job("quarter", cron("*/15 * * * *")),
        job("once", at(first + 900)),
    )
    bench.until(first + 3900)
    told = len(bench.told)
    bench.time -= HOUR
    bench.until(first + 3900)
    assert len(bench.told) == told, "nothing that ran runs again"
    bench.until(first + 2 * HOUR)
    assert bench.times("every") == [600 * n for n in range(1, 13)]
    assert bench.times("quarter") == [900 * n for n in range(1, 9)]
    told = len(bench.told)
    bench.time -= DAY
    bench.until(bench.time + 1800)
    assert sum("every" in text for _, text in bench.told[told:]) == 3, "by a day: they go on"
    assert sum("quarter" in text for _, text in bench.told[told:]) == 2
    assert bench.times("once") == [900]
    bench.time -= DAY
    bench.start()
    told = len(bench.told)
    bench.until(bench.time + 1800)
    assert sum("every" in text for _, text in bench.told[told:]) == 3, "after a restart, too"
    assert bench.times("once") == [900]


@since("s07")
def test_an_edit_holds_at_once(bench: Bench):
    first = bench.time
    bench.jobs(job("a", every(60)), job("b", every(60)), job("off", every(60), enabled=False))
    bench.until(first + 120)
    bench.jobs(job("a", every(90)), job("c", at(first + 200)), job("off", every(60)))
    bench.until(first + 300)
    assert bench.times("a") == [60, 120, 210, 300] and bench.times("b") == [60, 120]
    assert bench.times("c") == [200] and bench.times("off")[-2:] == [240, 300]
    bench.file('{"jobs": [{"id": "a", "sched')
    bench.until(first + 480)
    assert bench.times("a") == [60, 120, 210, 300, 390, 480] and len(bench.screen) == 1
    bench.jobs(job("c", at(first + 600)))
    bench.until(first + 1200)
    assert bench.times("a")[-1] == 480 and bench.times("c") == [200, 600], "a new time, a new run"
    assert len(bench.screen) == 1


@since("s07")
def test_an_edit_while_a_job_runs(bench: Bench):
    """The run ends as it began; the job goes on as it is now."""
    first, waiting = bench.time, []
    bench.spawn = lambda function, *args: waiting.append((function, args))
    bench.start()

    def finish() -> None:
        function, args = waiting.pop(0)
        function(*args)

    bench.jobs(turn("slow", every(60)), turn("once", at(first + 60)))
    bench.until(first + 60)
    assert len(waiting) == 2

    def edit(name: str) -> str:
        bench.jobs(
            turn("slow", every(60), name="a new name"),
            turn("once", at(first + 1000)),
            job("b", every(300)),
        )
        bench.cron.tick()
        bench.time += 100  # it is due while it runs
        bench.cron.tick()
        return "well"

    bench.answer = edit
    finish()
    bench.answer = lambda name: "well"
    while bench.time < first + 1200:
        bench.until(bench.time + 1)
        while waiting:
            finish()
    slow = bench.times("slow")
    assert len(slow) > 15, f"it goes on: {slow}"
    assert bench.times("once") == [160, 1000], "it is not what ran before, it has a time to come"
    assert bench.times("b")


@since("s07")
def test_a_removed_job_does_not_run(bench: Bench):
    """Not even when it was waiting for the lane already."""
    first, waiting = bench.time, []
    bench.spawn = lambda function, *args: waiting.append((function, args))
    bench.start()
    bench.jobs(turn("a", every(60)), turn("b", every(60)))
    bench.until(first + 60)
    bench.jobs(turn("b", every(60), enabled=False))
    bench.cron.tick()
    for function, args in waiting:
        function(*args)
    assert bench.asked == []
    bench.until(first + 600)
    assert bench.asked == [] and not bench.lane.busy()


@since("s07")
def test_a_job_that_waits_is_not_triggered_again(bench: Bench):
    waiting = []
    bench.spawn = lambda function, *args: waiting.append((function, args))
    bench.start()
    bench.jobs(turn("a", every(60)))
    bench.until(bench.time + 60)
    with pytest.raises(ValueError, match="running or waiting"):
        bench.command("/cron-trigger a")
    bench.until(bench.time + 300)
    assert len(waiting) == 1 and "running" in bench.command("/cron")
    function, args = waiting.pop()
    function(*args)
    assert len(bench.asked) == 1 and "running" not in bench.command("/cron")


@since("s07")
def test_a_run_that_a_crash_cut_off(bench: Bench):
    first = bench.time
    bench.jobs(turn("once", at(first + 60)), job("other", every(600)))
    killed(bench)
    bench.until(first + DAY / 2)
    assert [name for _, name in bench.asked] == ["cron-once"]
    assert len(lines_with("\n".join(bench.screen), "once", "interrupted")) == 1
    assert len(bench.times("other")) == DAY / 2 / 600
    bench.jobs(turn("again", every(600)))
    killed(bench)
    ran = bench.time
    bench.until(ran + 600)
    assert len(lines_with("\n".join(bench.screen), "again", "interrupted")) == 1
    assert bench.times("again")[0] <= ran + 600 - first
    assert "interrupted" not in bench.command("/cron")


@since("s07")
def test_a_one_shot_that_was_cut_off_can_be_given_a_new_time(bench: Bench):
    first = bench.time
    bench.jobs(turn("once", at(first + 60)))
    killed(bench)
    bench.jobs(turn("once", at(first + 600)))
    bench.until(first + 700)
    assert bench.times("once") == [600]


@since("s07")
def test_errors_survive_a_restart(bench: Bench):
    def fail(name: str) -> str:
        raise RuntimeError("no answer")

    first, bench.answer = bench.time, fail
    bench.jobs(turn("bad", every(10)))
    asked = []
    for _ in range(10):
        bench.start()
        bench.until(bench.time + 400)
        asked.append(len(bench.asked))
    assert [when - first for when, _ in bench.asked] == [10, 40, 100, 400, 1300]
    assert len(bench.told) == 1, bench.told
    bench.start()
    assert "5 errors" in bench.command("/cron") and "off" in bench.command("/cron")


# --- a model that fails ---


@since("s07")
def test_how_often_a_job_that_fails_is_tried(bench: Bench):
    """Nothing but the time of the next try, and the last word goes to the owner."""
    first, works = bench.time, False

    def answer(name: str) -> str:
        if not works:
            raise RuntimeError("no answer")
        return "well"

    bench.answer = answer
    for name, schedule in (
        ("once", at(first + 10)),
        ("often", every(10)),
        ("cron", cron("* * * * *")),
    ):
        bench.jobs(turn(name, schedule))
        begun = bench.time
        bench.asked.clear(), bench.told.clear(), bench.screen.clear()
        bench.until(begun + 2 * HOUR)
        tries = [when for when, _ in bench.asked]
        gaps = [b - a for a, b in zip(tries, tries[1:], strict=False)]
        assert gaps == [30 if name != "cron" else 60, 60, 300, 900], name
        assert len(bench.told) == 1 and f"{name} failed 5 times" in bench.told[0][1]
        assert len(bench.screen) == 4 and all("no answer" in line for line in bench.screen)
        if name == "once":
            bench.time = first
            bench.start()
    works = True
    assert bench.command("/cron-trigger cron")
    bench.until(bench.time + 600)
    assert len(bench.asked) in (15, 16) and "errors" not in bench.command("/cron")


@since("s07")
def test_a_success_resets_and_an_edit_brings_back(bench: Bench):
    results = iter("FFFFSFFFFFSS")

    def answer(name: str) -> str:
        if next(results) == "F":
            raise RuntimeError("no answer")
        return "well"

    bench.answer = answer
    bench.jobs(turn("a", every(3600)))
    bench.until(bench.time + DAY)
    assert len(bench.asked) == 10 and len(bench.times("a")) == 2, "once well, once off"
    bench.jobs(turn("a", every(3600), name="mended"))
    bench.until(bench.time + HOUR)
    assert len(bench.asked) in (11, 12) and bench.told[-1][1] == "cron a: well"


@since("s07")
def test_a_one_shot_that_is_triggered_has_had_its_time(bench: Bench):
    first = bench.time
    other = {"id": "other", "schedule": every(60), "payload": {"kind": "system_event", "text": "é"}}
    once = turn("once", at(first + 600), delete_after_run=True)
    whole = {"note": ["mine", 1.5], "jobs": [7, other | {"colour": "red"}, once, other], "z": None}
    bench.file(json.dumps(whole))
    bench.cron.tick()
    assert bench.command("/cron-trigger once")
    assert bench.times("once") == [0], bench.screen
    whole["jobs"].remove(once)
    left = (bench.folder / "CRON.json").read_text(encoding="utf-8")
    assert json.loads(left)["jobs"] == whole["jobs"]
    assert json.loads(left) == whole and "é" in left
    bench.until(first + 1200)
    assert bench.times("once") == [0] and len(bench.times("other")) == 20
    with pytest.raises(ValueError, match="once"):
        bench.command("/cron-trigger once")
    bench.jobs(job("twice", at(first + 1800)))
    bench.cron.tick()
    bench.command("/cron-trigger twice")
    bench.until(first + 2400)
    assert bench.times("twice") == [1200]
    assert "twice" in (bench.folder / "CRON.json").read_text() and "done" in bench.command("/cron")


@since("s07")
@pytest.mark.parametrize("text", ['{"jobs": [{"id": "on', None, "[]", '{"jobs": [null]}'])
def test_what_a_job_tells_is_told_though_it_cannot_be_taken_out(bench: Bench, text: str | None):
    first = bench.time
    bench.jobs(turn("once", at(first + 10), delete_after_run=True))

    def edit(name: str) -> str:
        (bench.folder / "CRON.json").unlink()
        if text is not None:
            bench.file(text)
        return "well"

    bench.answer = edit
    bench.until(first + 60)
    assert bench.times("once") == [10]
    bench.jobs(turn("once", at(first + 10), delete_after_run=True))
    bench.until(first + 600)
    assert bench.times("once") == [10]


@since("s07")
def test_a_full_disk_is_no_storm(bench: Bench):
    """Whatever cannot be written down does not run, and is not tried without a pause."""
    first, waiting, tries = bench.time, [], []
    bench.spawn = lambda function, *args: waiting.append((function, args))
    bench.start()
    bench.jobs(turn("once", at(first + 10)), turn("often", every(20)))
    bench.until(first + 5)
    append = bench.log.journal.append

    def full(record: dict) -> None:
        tries.append(record)
        raise OSError("the disk is full")

    bench.log.journal.append = full
    end = time.monotonic() + 3
    while bench.time < first + 120 and time.monotonic() < end and len(tries) < 2000:
        bench.until(bench.time + 0.1)
        while waiting:
            function, args = waiting.pop(0)
            function(*args)
    assert len(tries) < 200, f"{len(tries)} tries in {bench.time - first:.0f} s"
    assert bench.asked == [] and "the disk is full" in "".join(bench.screen)
    bench.log.journal.append = append
    bench.until(bench.time + 4000)
    while waiting:
        function, args = waiting.pop(0)
        function(*args)
    assert {name for _, name in bench.asked} == {"cron-once", "cron-often"}


@since("s07")
def test_what_cannot_be_sent_is_no_reason_to_run_again(bench: Bench):
    """A one-shot whose words find no way to the owner has run all the same."""
    first = bench.time
    waiting = []
    bench.spawn = lambda function, *args: waiting.append((function, args))
    bench.start()

    def fail(title: str, text: str) -> None:
        raise OSError("the disk is full")

    bench.app.announce = fail
    bench.jobs(turn("once", at(first + 10)))
    for _ in range(300):
        bench.until(bench.time + 1)
        while waiting:
            function, args = waiting.pop(0)
            function(*args)
    assert len(bench.asked) == 1


# --- the run log ---


@since("s07")
@pytest.mark.costly
def test_a_long_log_is_cut_and_keeps_the_states(bench: Bench):
    first = bench.time
    bench.jobs(job("often", every(10)), job("once", at(first + 60)), turn("bad", every(10)))

    def fail(name: str) -> str:
        raise RuntimeError("no answer")

    bench.answer = fail
    bench.until(first + 2 * HOUR)
    bench.log.record("told", digest="d", at=bench.time)
    bench.log.record("beat", at=bench.time)
    place = {"channel": "telegram", "account": "default", "peer": "42", "text": "", "ids": [""]}
    bench.log.record("owner", message=place)
    path = bench.folder / "cron" / "cron-runs.jsonl"
    while path.read_bytes().count(b"\n") < 2500:
        bench.until(bench.time + HOUR)
    before = bench.log.states
    for _ in range(3):
        bench.start()
        size = path.read_bytes().count(b"\n")
        assert size < 1000 and bench.log.states == before
        assert bench.log.owner.peer == "42" and bench.log.told.keys() == {"d"}
        assert 0 < bench.log.beat <= bench.time
    assert bench.log.states["once"].done and bench.log.states["bad"].errors == 5
    told = len(bench.told)
    bench.until(bench.time + 100)
    assert [text for _, text in bench.told[told:]] == ["cron often: this is often"] * 10


@since("s07")
def test_a_damaged_log_does_not_stop_the_rest(bench: Bench, capsys):
    first = bench.time
    bench.jobs(job("often", every(10)), job("once", at(first + 60)))
    bench.until(first + 100)
    path = bench.folder / "cron" / "cron-runs.jsonl"
    with path.open("a") as stream:
        stream.write('{"type": "state", "job": "often", "state": {"colour": 1}}\n7\n{"type": "ow')
        stream.write(
            'ner", "message": {"x": 1}}\n{"type": "start", "job": 5, "at": "x"}\n{"type": "e'
        )
    bench.start()
    told = capsys.readouterr().out
    assert "damaged" in told and "torn" in told and "Traceback" not in told
    bench.until(first + 200)
    assert bench.times("once") == [60] and len(bench.times("often")) == 20


# --- the real program ---


def idle(name: str, **more: object) -> dict:
    """A job that runs when it is triggered, and not before."""
    return job(name, every(86_400), enabled=False, **more)


def trigger(screen: Screen, name: str) -> None:
    drawn(screen, PROMPT)
    screen.type(f"/cron-trigger {name}\n")


@pytest.mark.guard
@since("s07")
@pytest.mark.costly
def test_a_job_that_kill_cut_off_does_not_run_again(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    soon = time.time() + 3  # the start has to be over by then
    write_jobs(workspace, turn("once", at(soon)), turn("often", every(86_400, anchor=stamp(soon))))
    brain.hold("do ")
    with begin(section, fake_model) as screen:
        fake_model.wait(1)
        screen.kill()
    brain.gates.clear()
    with begin(section, fake_model) as screen:
        fake_model.wait(2)
        screen.wait_for(re.compile("heard.*do |interrupted"))
        screen.type("/cron\n")
        screen.wait_for("often: every 86400, next ")
        drawn(screen, PROMPT)
        first, second = kinds(fake_model)
        name = first.split("] do ")[1]
        assert {name, second.split("] do ")[1]} == {"once", "often"}
        assert len(lines_with(screen.paper, f"[cron {name}: interrupted")) == 1
        leave(screen)
    with begin(section, fake_model) as screen:
        screen.type("/cron\n")
        screen.wait_for(re.compile("once: at .*, done"))
        drawn(screen, PROMPT)
        assert "[cron" not in screen.paper
        leave(screen)
    assert len(fake_model.chats) == 2


@since("s07")
@pytest.mark.costly
def test_no_one_shot_runs_twice(section, fake_model: FakeModel, brain: Brain, workspace: Path):
    """Killed at any moment, ten times."""
    dice, first = random.Random(5), time.time() + 0.5
    fake_model.script("brain", [lambda body: Stall(1, 0.1, Text(question(body)))], repeat=True)
    names = [f"job-{number}" for number in range(24)]
    write_jobs(workspace, *[turn(name, at(first + 0.25 * n)) for n, name in enumerate(names)])
    for _ in range(10):
        with begin(section, fake_model) as screen:
            time.sleep(dice.uniform(0, 0.5))
            screen.kill()
    with begin(section, fake_model) as screen:
        for _ in range(50):
            drawn(screen, PROMPT)
            screen.type("/cron\n")
            screen.wait_for(f"{names[-1]}: at")
            drawn(screen, PROMPT)
            if len(lines_with(screen.paper.split("/cron")[-1], ": at", ", done")) == len(names):
                break
            time.sleep(0.3)
        else:
            raise AssertionError(screen.paper)
        leave(screen)
    asked = [kind.split("] do ")[1] for kind in kinds(fake_model)]
    assert len(asked) == len(set(asked)) and len(asked) > 10


@since("s07")
def test_a_slow_job_delays_no_reminder(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    gate = brain.hold("do slow")
    write_jobs(workspace, turn("slow", at(time.time() + 0.5)), job("tick", every(1)))
    with begin(section, fake_model) as screen:
        fake_model.wait(1)
        for _ in range(2):
            screen.wait_for("[cron tick] this is tick", 3)
        screen.type("/lanes\nhello\n")
        time.sleep(0.2)
        gate.set()
        screen.wait_for("cron jobs that run or wait: ")
        screen.wait_for("heard hello")
        drawn(screen, PROMPT)
        done = "[cron slow] heard [cron slow] do slow"
        if done not in screen.text:
            screen.wait_for(done)
        assert len(lines_with(screen.paper, done)) == 1
    assert kinds(fake_model) == ["[cron slow] do slow", "hello"]
    talk = json.dumps(fake_model.chats[-1].messages[1:])
    assert "slow" not in talk and [m["role"] for m in fake_model.chats[0].messages][1:] == ["user"]


@since("s07")
def test_what_is_told_leaves_the_line_alone(
    section, fake_model: FakeModel, brain: Brain, workspace: Path
):
    write_jobs(workspace, job("news", at(time.time() + 1)), idle("later"))
    with begin(section, fake_model) as screen:
        screen.type("half a li")
        screen.wait_for("[cron news] this is news", 5)
        drawn(screen, f"[cron news] this is news\n{PROMPT}half a li")
        screen.type("ne\n")
        screen.wait_for("heard half a line")
        trigger(screen, "later")
        screen.wait_for("[cron later] this is later")
        leave(screen)
    assert kinds(fake_model) == ["half a line"]


@since("s07")
def test_a_job_of_another_agent(section, fake_model: FakeModel, brain: Brain, workspace: Path):
    entry = turn("poem", every(86_400), agent="luna") | {"enabled": False}
    write_jobs(workspace, entry)
    with begin(section, fake_model) as screen:
        trigger(screen, "poem")
        screen.wait_for("heard [cron poem] do poem")
        leave(screen)
    assert "agent luna" in fake_model.chats[0].messages[0]["content"]


# --- who is told, and where ---


@since("s07")
def test_the_owner_is_told_where_they_were_last(post: Post):
    write_jobs(post.workspace, idle("news"))
    with post.screen() as screen:
        told = 0

        def tell(where: int | None) -> None:
            """Have it told, at the terminal and in this chat alone."""
            nonlocal told
            told += 1
            before = {chat: post.told(chat).count("this is news") for chat in (42, 43, -300, 666)}
            trigger(screen, "news")
            screen.wait_for("[cron news] this is news")
            if where:
                before[where] += 1
                post.telegram.until(lambda: post.told(where).count("this is news") == before[where])
            else:
                time.sleep(0.2)
            assert {c: post.told(c).count("this is news") for c in before} == before

        tell(None)
        post.ask("hello")
        tell(42)
        post.ask("@tutor_bot hello", -300)
        post.telegram.say("let me in", 666)
        screen.wait_for("666")
        tell(42)
        post.ask("hello", 43)
        tell(43)
        drawn(screen, PROMPT)
        post.turn(screen, "here")
        tell(None)
        post.ask("hello again", 42)
    with post.screen() as screen:
        tell(42)


@since("s07")
def test_owner_says_who_it_is(post: Post):
    write_jobs(post.workspace, idle("news"))
    with post.screen() as screen:
        post.ask("hello", 43)
        screen.wait_for("heard hello")
    with post.screen(OWNER="telegram:42") as screen:
        trigger(screen, "news")
        screen.wait_for("[cron news] this is news")
        time.sleep(0.3)
        assert post.told(43) == ["heard hello"], "whoever wrote before is not the owner"
        post.ask("I am", 42)
        post.ask("hello again", 43)
        drawn(screen, PROMPT)
        post.turn(screen, "here")
        before = len(post.told(42))
        trigger(screen, "news")
        post.wait(before + 1)
        assert post.told(42)[-1] == "this is news" and len(post.told(43)) == 2


@since("s07")
def test_a_kill_before_it_is_sent_loses_nothing(post: Post):
    write_jobs(post.workspace, idle("news"))
    with post.screen() as screen:
        post.ask("hello")
        screen.wait_for("heard hello")
        post.confirmed()
        inbox, queue = (post.workspace / n for n in (".inbox.jsonl", "delivery-queue/queue.jsonl"))
        file, word = (queue, '"ack"') if post.section.label >= "s08" else (inbox, '"done"')
        post.telegram.until(lambda: word in file.read_text(), what="the end of the answer")
        drawn(screen, PROMPT)
        post.telegram.down()
        screen.type("/cron-trigger news\n")
        screen.wait_for("to User 42: this is news")
        screen.kill()
    post.telegram.up()
    with post.screen():
        post.wait(2)
        time.sleep(0.2)
    assert post.told(42) == ["heard hello", "this is news"]


@since("s07")
@pytest.mark.costly
def test_words_that_no_disk_takes_are_no_storm(post: Post):
    """The inbox is gone, so nothing can be told from afar; the model is asked once."""
    entry = turn("once", at(time.time() + 3))
    write_jobs(post.workspace, entry)
    with post.screen() as screen:
        post.ask("hello")
        screen.wait_for("heard hello")
        (post.workspace / ".inbox.jsonl").unlink()
        post.model.wait(2)
        time.sleep(1)
    assert [text for text in post.questions if "once" in text] == ["[cron once] do once"]


# --- settings ---

SETTINGS = [
    ("HEARTBEAT_SECONDS", "-1"),
    ("HEARTBEAT_SECONDS", "often"),
    ("HEARTBEAT_SECONDS", "1.5"),
    ("HEARTBEAT_SECONDS", "9" * 30),
    ("HEARTBEAT_HOURS", "8-22"),
    ("HEARTBEAT_HOURS", "08:00-08:00"),
    ("HEARTBEAT_HOURS", "08:00-24:01"),
    ("HEARTBEAT_HOURS", "08:00-22:00 "),
    ("TIMEZONE", "Mars/Olympus"),
    ("TIMEZONE", "../../../etc/passwd"),
    ("TIMEZONE", "Europe"),
    ("TIMEZONE", "x" * 5000),
]


@since("s07")
@pytest.mark.parametrize("name, value", SETTINGS, ids=lambda text: text[:20])
def test_a_bad_setting_is_told_in_a_line(section, fake_model: FakeModel, name: str, value: str):
    done = harness.pipe(section, "quit\n", fake_model.env("brain", **{name: value}))
    if value.endswith(" "):  # blanks around are no fault
        assert done.returncode == 0 and not done.stderr
        return
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    known = "time zone" if name == "TIMEZONE" else name
    assert known in done.stderr and "Traceback" not in done.stderr


@since("s07")
def test_an_odd_tz_is_the_machine_s_own_matter(section, fake_model: FakeModel):
    for zone in (":Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3", "nowhere"):
        done = harness.pipe(section, "/heartbeat\nquit\n", fake_model.env("brain", TZ=zone))
        assert done.returncode == 0 and "Traceback" not in done.stderr, zone
