"""Lanes (s10): who runs when, what a reset lets go of, and that nothing is lost or stuck."""

import gc
import json
import re
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures import Future
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import harness
import pytest
from fake_feishu import FakeFeishu
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from harness import since
from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import run_state_machine_as_test

from first import test_gateway
from first.test_gateway import PROMPT
from first.test_gateway import until

LONG = 10  # seconds after which something is stuck


class Job:
    """A task that runs until it is told to end."""

    def __init__(self, name: object = "", check: Callable[[], None] | None = None):
        self.name, self.check = name, check
        self.began, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def __call__(self) -> object:
        self.began.set()
        assert self.go.wait(60), f"{self.name} was never told to end"
        if self.check:
            self.check()
        if self.error:
            raise self.error
        return self.name

    def runs(self, timeout: float = LONG) -> bool:
        return self.began.wait(timeout)


@pytest.fixture
def module(section) -> ModuleType:
    return section.module


@pytest.fixture
def lanes(module: ModuleType) -> Any:
    """A queue of lanes with nobody but us around it."""
    return module.CommandQueue()


def begin(lanes: Any, *names: str, label: object = "") -> tuple[Job, Future]:
    job = Job(label, lanes.check)
    return job, lanes.enqueue(names, job)


def finish(*pairs: tuple[Job, Future]) -> list[object]:
    """Let tasks end, and what came of them."""
    for job, _ in pairs:
        job.go.set()
    return [future.result(LONG) for _, future in pairs]


def counts(lanes: Any, name: str) -> tuple[int, int]:
    """How many are in a lane, and how many wait for it."""
    with lanes.lock:
        lane = lanes.lanes.get(name)
        return (len(lane.active), len(lane.waiting)) if lane else (0, 0)


def names(lanes: Any) -> set[str]:
    with lanes.lock:
        return set(lanes.lanes)


def workers(module: ModuleType) -> int:
    """The threads that run tasks of any queue of a module."""
    running = [t for t in threading.enumerate() if "run_tasks" in t.name]
    return len(running)


# --- a lane ---


@since("s10")
def test_a_lane_of_one_keeps_the_order_and_a_lane_of_four_runs_four(lanes):
    seen: list[int] = []
    futures = [lanes.enqueue(["one"], seen.append, number) for number in range(2000)]
    wait(futures, LONG)
    assert seen == [*range(2000)]
    jobs = [begin(lanes, "main", label=number) for number in range(10)]
    for number in range(10):
        assert jobs[number][0].runs()
        until(lambda number=number: sum(j.began.is_set() for j, _ in jobs) == min(number + 4, 10))
        assert counts(lanes, "main") == (min(4, 10 - number), max(0, 6 - number))
        assert finish(jobs[number]) == [number]
    assert counts(lanes, "main") == (0, 0) and names(lanes) == {"main", "cron", "heartbeat"}


@since("s10")
def test_what_a_task_raises_is_its_future_s(lanes):
    for lane in ("one", "main", "cron"):
        for kind in (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit):
            job, future = begin(lanes, lane)
            job.error = kind("no")
            after = lanes.enqueue([lane], str, "after")
            job.go.set()
            assert type(future.exception(LONG)) is kind
            assert after.result(LONG) == "after"


@since("s10")
@pytest.mark.parametrize("lane", ["one", "main"])
def test_a_hundred_thousand_tasks_that_do_nothing(lanes, lane: str):
    seen: list[int] = []
    last = None
    for number in range(100_000):
        last = lanes.enqueue([lane], seen.append, number)
    last.result(60)
    until(lambda: len(seen) == 100_000)
    if lane == "one":
        assert seen == [*range(100_000)]
    assert sorted(seen) == [*range(100_000)] and counts(lanes, lane) == (0, 0)
    assert lanes.threads <= 32, lanes.threads


@since("s10")
def test_when_the_result_is_seen_the_lane_is_free(lanes):
    for number in range(2000):
        lanes.enqueue(["a", "main"], int).result(LONG)
        assert counts(lanes, "main") == (0, 0) and "a" not in names(lanes), number
    seen: list[tuple] = []
    job, future = begin(lanes, "a", "main")
    future.add_done_callback(lambda _: seen.append((counts(lanes, "main"), counts(lanes, "a"))))
    finish((job, future))
    until(lambda: seen == [((0, 0), (0, 0))])


@since("s10")
def test_a_callback_may_wait_for_the_lanes_to_be_idle(lanes):
    """What is behind a task in its lane does not need the thread that its callback keeps busy."""
    told: list[object] = []

    def idle(future: Future) -> None:
        deadline = time.monotonic() + LONG
        while counts(lanes, "one") != (0, 0):
            if time.monotonic() > deadline:
                told.append("stuck")
                return
            time.sleep(0.001)
        told.append("idle")

    first = begin(lanes, "one")
    assert first[0].runs()
    first[1].add_done_callback(idle)
    behind = [lanes.enqueue(["one"], int) for _ in range(20)]
    finish(first)
    wait(behind, LONG)
    until(lambda: told == ["idle"])


@since("s10")
def test_a_callback_that_comes_at_the_last_moment_may_wait_too(lanes):
    """Nor does it matter in which moment of a task's end somebody begins to watch it."""
    ending, watched, told = threading.Event(), threading.Event(), []
    first = begin(lanes, "one")
    assert first[0].runs()
    behind = begin(lanes, "one")
    give = first[1].set_result

    def late(result: object) -> None:
        ending.set()
        assert watched.wait(LONG)
        give(result)

    first[1].set_result = late
    first[0].go.set()
    assert ending.wait(LONG)
    first[1].add_done_callback(lambda _: told.append(behind[0].runs(3)))
    watched.set()
    until(lambda: told)
    assert told == [True]
    finish(behind)


@since("s10")
def test_who_is_in_a_lane_cannot_enqueue_into_it(module, lanes):
    def again(*into: str) -> object:
        return lanes.enqueue(into, int).result(LONG)

    for into in (["one"], ["main"], ["other", "one"], ["other", "main"]):
        with pytest.raises(module.LaneError, match=f"lane {into[-1]} cannot enqueue"):
            lanes.enqueue(["one", "main"], again, *into).result(LONG)
    assert lanes.enqueue(["one", "main"], again, "other").result(LONG) == 0
    with lanes.enter("one"), pytest.raises(module.LaneError, match="lane one"):
        again("one")
    with lanes.enter("one"), pytest.raises(module.LaneError), lanes.enter("one"):
        raise AssertionError("entered twice")
    assert again("one") == 0 and counts(lanes, "one") == (0, 0)
    assert names(lanes) == {"main", "cron", "heartbeat"}


@since("s10")
def test_a_cancelled_task_does_not_run_and_blocks_nobody(lanes):
    holder = begin(lanes, "one")
    assert holder[0].runs()
    waiting = [begin(lanes, "one", label=number) for number in range(5)]
    assert waiting[1][1].cancel() and waiting[3][1].cancel() and waiting[4][1].cancel()
    assert not holder[1].cancel()
    finish(holder, waiting[0], waiting[2])
    assert [job.began.is_set() for job, _ in waiting] == [True, False, True, False, False]
    for _, future in (waiting[1], waiting[3]):
        with pytest.raises(CancelledError):
            future.result(LONG)
    until(lambda: names(lanes) == {"main", "cron", "heartbeat"})


@since("s10")
def test_a_cancelled_task_lets_go_of_the_lane_that_it_waits_in(lanes):
    """It has its session's lane and waits for main; the next of its session takes its place."""
    lanes.reset()
    full = [begin(lanes, "main") for _ in range(4)]
    assert all(job.runs() for job, _ in full)
    first, second = begin(lanes, "s", "main"), begin(lanes, "s", "main", label="second")
    assert counts(lanes, "s") == (1, 1) and counts(lanes, "main") == (4, 1)
    assert first[1].cancel()
    finish(full[0])
    assert second[0].runs() and not first[0].began.is_set()
    assert finish(second) == ["second"]
    finish(*full)
    assert counts(lanes, "main") == (0, 0) and "s" not in names(lanes)


@since("s10")
def test_who_comes_in_place_of_a_cancelled_task_overtakes_nobody(lanes):
    full = [begin(lanes, "main") for _ in range(4)]
    first, other = begin(lanes, "s", "main"), begin(lanes, "t", "main", label="other")
    second = begin(lanes, "s", "main", label="second")
    assert all(job.runs() for job, _ in full) and first[1].cancel()
    finish(full[0])
    assert other[0].runs() and not second[0].began.is_set()
    assert finish(other, second, *full)[:2] == ["other", "second"]


@since("s10")
def test_raised_and_lowered_while_tasks_run(lanes):
    jobs = [begin(lanes, "main") for _ in range(20)]
    until(lambda: sum(job.began.is_set() for job, _ in jobs) == 4)
    lanes.limit("main", 7)
    until(lambda: sum(job.began.is_set() for job, _ in jobs) == 7)
    lanes.limit("main", 2)
    for done in range(5):
        finish(jobs[done])
        time.sleep(0.02)
        assert sum(job.began.is_set() for job, _ in jobs) == 7  # five are too many
    finish(jobs[5])
    until(lambda: sum(job.began.is_set() for job, _ in jobs) == 8)
    for job, _ in jobs:
        job.go.set()
    for _, future in jobs:
        future.result(LONG)
    assert counts(lanes, "main") == (0, 0)
    lanes.limit("new", 3)
    assert "new" in names(lanes) and lanes.enqueue(["new"], int).result(LONG) == 0
    assert "new" in names(lanes)  # its limit is to be kept


@since("s10")
def test_the_number_of_threads_is_bounded_and_they_end(section):
    module = section.load()
    module.WORKER_REST = 0.3
    lanes, before = module.CommandQueue(), threading.active_count()
    lanes.limit("wide", 99)
    jobs = [begin(lanes, "wide") for _ in range(60)]
    until(lambda: sum(job.began.is_set() for job, _ in jobs) == module.MAX_WORKERS)
    time.sleep(0.1)
    assert sum(job.began.is_set() for job, _ in jobs) == module.MAX_WORKERS == lanes.threads
    assert threading.active_count() - before <= module.MAX_WORKERS
    for job, _ in jobs:
        job.go.set()
    for _, future in jobs:
        future.result(LONG)
    until(lambda: lanes.threads == 0 and threading.active_count() <= before)
    assert lanes.idle == 0 and lanes.enqueue(["wide"], int).result(LONG) == 0


@since("s10")
def test_one_after_the_other_needs_one_thread(lanes):
    for _ in range(500):
        lanes.enqueue(["one", "main"], int).result(LONG)
    assert lanes.threads <= 2


@since("s10")
def test_ten_thousand_lanes_come_and_go(module, lanes):
    def visit(first: int, last: int) -> list[weakref.ref]:
        seen = []
        for number in range(first, last):
            future = lanes.enqueue([f"session:{number}", "main"], bytearray, 1000)
            with lanes.lock:
                lane = lanes.lanes.get(f"session:{number}")
                seen += [weakref.ref(each) for each in (future, lane) if each is not None]
            lane = None
            if number % 50 == 0:
                future.result(LONG)
        future.result(LONG)
        until(lambda: names(lanes) == {"main", "cron", "heartbeat"})
        return seen

    visit(0, 1000)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        seen = visit(1000, 11_000)
        alive = len([each for each in seen if each() is not None])
        del seen
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert alive <= 40, alive  # what the last tasks left in the threads' frames
    assert grown < 100_000, grown


@since("s10")
def test_a_result_is_kept_by_nobody_but_its_future(lanes):
    class Thing:
        pass

    def make() -> Thing:
        return Thing()

    def fail(thing: Thing) -> None:
        raise ValueError("no")

    argument = Thing()
    made, failed = lanes.enqueue(["one"], make), lanes.enqueue(["one"], fail, argument)
    seen = [weakref.ref(made.result(LONG)), weakref.ref(argument)]
    assert isinstance(failed.exception(LONG), ValueError)
    del made, failed, argument

    def gone() -> bool:
        gc.collect()
        return not any(each() for each in seen)

    until(gone)


# --- to hold lanes in one's own thread ---


@since("s10")
def test_who_enters_holds_the_lanes(lanes):
    busy = begin(lanes, "s", "main")
    assert busy[0].runs()
    told: list[str] = []

    def visit() -> None:
        with lanes.enter("s", "main"):
            told.append("in")
            behind.append(lanes.enqueue(["t"], int))
            time.sleep(0.1)
            told.append("out")

    behind: list[Future] = []
    visitor = threading.Thread(target=visit)
    visitor.start()
    until(lambda: counts(lanes, "s") == (1, 1))
    after = lanes.enqueue(["s", "main"], told.append, "after")
    assert told == []
    finish(busy)
    after.result(LONG)
    visitor.join(LONG)
    assert told == ["in", "out", "after"] and behind[0].result(LONG) == 0
    with pytest.raises(ValueError, match="mine"), lanes.enter("s", "main"):
        raise ValueError("mine")
    assert counts(lanes, "main") == (0, 0) and "s" not in names(lanes)


CTRL_C = """
import _thread, sys, threading, time
sys.path.insert(0, {tests!r})
import harness
from pathlib import Path
module = harness.load(Path({script!r}))
lanes = module.CommandQueue()
go = threading.Event()
held = [lanes.enqueue([name], go.wait) for name in {held!r}]
threading.Timer(0.3, _thread.interrupt_main).start()
began = time.monotonic()
try:
    with lanes.enter("s", "main"):
        print("entered")
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - began < 2)
after = lanes.enqueue(["s", "main"], str, "after")
go.set()
print(after.result(5), sorted(lanes.lanes))
for future in held:
    future.result(5)
print(lanes.enqueue(["s", "main"], str, "again").result(5), len(lanes.lanes["main"].active))
"""


@since("s10")
@pytest.mark.parametrize("held", [["s"], ["main"] * 4], ids=["session", "main"])
def test_ctrl_c_ends_the_wait_for_a_lane(section, env, tmp_path: Path, held: list[str]):
    script = tmp_path / "wait.py"
    names = {"tests": str(harness.REPO / "tests"), "script": str(section.path), "held": held}
    script.write_text(CTRL_C.format(**names))
    ran = harness.pipe(script, "", env)
    assert ran.returncode == 0, ran.stderr
    first, second, third = ran.stdout.splitlines()
    assert first == "interrupted True" and second.startswith("after ") and third == "again 0"


@since("s10")
def test_a_lane_that_is_only_tried(lanes):
    """As the heartbeat does: not while anybody is answered; and who comes then does not wait."""
    beat = lanes.lane("heartbeat")
    assert beat.attempt() and not beat.attempt()
    assert lanes.enqueue(["s", "main"], int).result(LONG) == 0
    beat.release()
    person = begin(lanes, "s", "main")
    assert person[0].runs() and not beat.attempt()
    finish(person)
    assert beat.attempt()
    lanes.reset()
    assert beat.attempt()  # the first was let go
    beat.release()
    assert counts(lanes, "heartbeat") == (0, 0)


# --- reset and stop ---


@since("s10")
def test_a_reset_loses_nothing_that_waits(lanes):
    """Twenty sessions of three messages each: all are answered, in order, though four hang."""
    running, most, lock = {}, [], threading.Lock()
    order: dict[int, list[int]] = {number: [] for number in range(20)}
    hang = threading.Event()

    def answer(session: int, number: int, stale: bool) -> None:
        with lock:
            order[session].append(number)
            running[session] = running.get(session, 0) + (not stale)
            most.append(running[session])
        if stale:
            hang.wait(30)
            return
        time.sleep(0.002)
        with lock:
            running[session] -= 1

    futures = [
        lanes.enqueue([f"s{session}", "main"], answer, session, number, session < 4 and not number)
        for number in range(3)
        for session in range(20)
    ]
    until(lambda: sum(map(len, order.values())) == 4)
    time.sleep(0.05)
    assert sum(map(len, order.values())) == 4
    assert lanes.reset() == 4
    wait(futures[4:], LONG)
    assert all(numbers == [0, 1, 2] for numbers in order.values()), order
    assert max(most) == 1
    assert not any(future.done() for future in futures[:4])
    assert names(lanes) == {"main", "cron", "heartbeat"} and counts(lanes, "main") == (0, 0)
    hang.set()
    wait(futures, LONG)
    assert all(future.done() for future in futures)


@since("s10")
def test_who_was_let_go_neither_frees_nor_blocks_a_lane(module, lanes):
    stale = [begin(lanes, "s", "main") for _ in range(1)] + [begin(lanes, "main")]
    assert all(job.runs() for job, _ in stale)
    assert lanes.reset() == 2 and lanes.reset() == 0
    fresh = begin(lanes, "s", "main", label="fresh")
    behind = begin(lanes, "s", "main", label="behind")
    full = [begin(lanes, "main") for _ in range(4)]
    assert fresh[0].runs() and all(job.runs() for job, _ in full[:3])
    assert counts(lanes, "main") == (4, 1) and counts(lanes, "s") == (1, 1)
    for job, future in stale:
        job.go.set()
        assert type(future.exception(LONG)) is module.Stopped
    time.sleep(0.05)
    assert counts(lanes, "main") == (4, 1) and counts(lanes, "s") == (1, 1)
    assert not behind[0].began.is_set() and not full[3][0].began.is_set()
    assert finish(fresh, *full, behind)[-1] == "behind"
    assert counts(lanes, "main") == (0, 0)


@since("s10")
def test_a_reset_goes_on_with_those_who_wait_in_both_lanes(lanes):
    """Also with the session that holds its lane and waits for main in that moment."""
    full = [begin(lanes, f"f{number}", "main") for number in range(4)]
    assert all(job.runs() for job, _ in full)
    between = [begin(lanes, "s", "main", label=number) for number in range(3)]
    assert counts(lanes, "s") == (1, 2)
    for round in range(3):
        assert lanes.reset() == (4 if not round else 1)
        assert between[round][0].runs()
        assert [job.began.is_set() for job, _ in between] == [n <= round for n in range(3)]
    for job, _ in (*full, *between):
        job.go.set()
    wait([future for _, future in (*full, *between)], LONG)
    assert between[2][1].exception() is None and "s" not in names(lanes)
    assert counts(lanes, "main") == (0, 0)


@since("s10")
def test_who_waited_through_a_reset_leaves_its_lanes_as_ever(lanes):
    full = [begin(lanes, "main") for _ in range(4)]
    assert all(job.runs() for job, _ in full)
    waited = [begin(lanes, "t", "main", label=number) for number in range(2)]
    assert lanes.reset() == 4
    assert finish(*waited) == [0, 1] and "t" not in names(lanes)
    for job, _ in full:
        job.go.set()


@since("s10")
def test_a_reset_gives_back_what_somebody_entered(lanes):
    inside, leave = threading.Event(), threading.Event()

    def visit() -> None:
        with lanes.enter("s"):
            inside.set()
            leave.wait(30)

    visitor = threading.Thread(target=visit)
    visitor.start()
    assert inside.wait(LONG)
    fresh = begin(lanes, "s")
    assert lanes.reset() == 1 and fresh[0].runs()
    leave.set()
    visitor.join(LONG)
    assert counts(lanes, "s") == (1, 0)
    finish(fresh)
    assert "s" not in names(lanes)


@since("s10")
def test_a_stop_is_for_what_runs_in_that_lane(module, lanes):
    mine, theirs = begin(lanes, "s", "main"), begin(lanes, "t", "main", label="theirs")
    next_one = begin(lanes, "s", "main", label="next")
    assert mine[0].runs() and theirs[0].runs()
    assert lanes.stop("s") == 1 and lanes.stop("nobody") == 0
    mine[0].go.set()
    assert type(mine[1].exception(LONG)) is module.Stopped
    assert finish(theirs, next_one) == ["theirs", "next"]


@since("s10")
def test_nothing_begins_after_a_drain(section):
    module = section.load()
    module.MAX_WORKERS = 3
    lanes = module.CommandQueue()
    running = [begin(lanes, "main") for _ in range(3)]
    assert all(job.runs() for job, _ in running)
    ready = begin(lanes, "main")  # it has a place, and no thread
    waiting = [begin(lanes, "main"), begin(lanes, "s", "main")]
    drained = threading.Thread(target=lanes.drain, args=(LONG,))
    drained.start()
    until(lambda: lanes.closed)
    with pytest.raises(module.LaneError, match="ending"):
        lanes.enqueue(["other"], int)
    with pytest.raises(module.LaneError), lanes.enter("other"):
        raise AssertionError("entered")
    began = time.monotonic()
    finish(*running)
    drained.join(LONG)
    assert not drained.is_alive() and time.monotonic() - began < 1
    assert lanes.reset() == 0
    lanes.limit("main", 9)
    time.sleep(0.1)
    assert not any(job.began.is_set() for job, _ in (ready, *waiting))


@since("s10")
def test_a_drain_gives_up(lanes):
    running = begin(lanes, "main")
    assert running[0].runs()
    began = time.monotonic()
    lanes.drain(0.3)
    assert 0.25 < time.monotonic() - began < 1.5
    finish(running)


# --- anything, in any order ---


class Entry:
    """A task, or somebody who enters, as the model below sees it."""

    def __init__(self, route: tuple[str, ...], job: Job):
        self.route, self.job = route, job
        self.ahead = [*route]
        self.state, self.let_go, self.stopped = "waiting", False, False
        self.future: Future | None = None
        self.thread: threading.Thread | None = None


class Machine(RuleBasedStateMachine):
    """CommandQueue, and beside it a model: a list of those inside and of those who wait, by lane.

    After each step, exactly those run who run in the model; so nobody begins too early, too late
    or in another order.
    """

    module: ModuleType

    def __init__(self) -> None:
        super().__init__()
        self.lanes = self.module.CommandQueue()
        self.limits = {"main": 4}
        self.inside: dict[str, list[Entry]] = {}
        self.behind: dict[str, list[Entry]] = {}
        self.entries: list[Entry] = []
        self.lanes.limit("main", 2)
        self.limits["main"] = 2

    # the model

    def free(self, lane: str) -> bool:
        return len(self.inside.get(lane, [])) < self.limits.get(lane, 1)

    def go_on(self, entry: Entry) -> None:
        while entry.ahead:
            lane = entry.ahead.pop(0)
            if self.behind.get(lane) or not self.free(lane):
                self.behind.setdefault(lane, []).append(entry)
                return
            self.inside.setdefault(lane, []).append(entry)
        entry.state = "running"

    def let_in(self, lane: str) -> None:
        while self.behind.get(lane) and self.free(lane):
            entry = self.behind[lane].pop(0)
            if entry.state == "cancelled":
                self.take_out(entry)
            else:
                self.inside.setdefault(lane, []).append(entry)
                self.go_on(entry)

    def take_out(self, entry: Entry) -> None:
        for lane in entry.route:
            if entry in self.inside.get(lane, []):
                self.inside[lane].remove(entry)
                self.let_in(lane)

    def some(self, state: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.state == state]

    # what may happen

    @rule(
        route=strategies.sampled_from([("main",), ("a",), ("a", "main"), ("b", "main"), ("c",)]),
        enters=strategies.booleans(),
    )
    def arrive(self, route: tuple[str, ...], enters: bool) -> None:
        if len(self.some("running")) > 12:
            return
        entry = Entry(route, Job(len(self.entries), self.lanes.check))
        self.entries.append(entry)
        if enters:
            entry.thread = threading.Thread(target=self.visit, args=(entry,), daemon=True)
            before = self.places(route[0])
            entry.thread.start()
            until(lambda: self.places(route[0]) > before)
        else:
            entry.future = self.lanes.enqueue(route, entry.job)
        self.go_on(entry)
        self.compare()

    def visit(self, entry: Entry) -> None:
        with suppress(KeyboardInterrupt, ValueError), self.lanes.enter(*entry.route):
            entry.job()

    def places(self, name: str) -> int:
        return sum(counts(self.lanes, name))

    @precondition(lambda self: self.some("running"))
    @rule(data=strategies.data(), error=strategies.sampled_from([None, ValueError, SystemExit]))
    def end(self, data: strategies.DataObject, error: type[BaseException] | None) -> None:
        entry = data.draw(strategies.sampled_from(self.some("running")))
        entry.job.error = ValueError() if error and entry.thread else error and error()
        self.finish(entry)
        self.compare()

    def finish(self, entry: Entry) -> None:
        entry.job.go.set()
        if entry.thread:
            entry.thread.join(LONG)
            assert not entry.thread.is_alive(), "it never left"
        elif entry.stopped:
            assert type(entry.future.exception(LONG)) is self.module.Stopped
        elif entry.job.error:
            assert entry.future.exception(LONG) is entry.job.error
        else:
            assert entry.future.result(LONG) == entry.job.name
        entry.state = "done"
        self.take_out(entry)

    @precondition(lambda self: self.some("waiting"))
    @rule(data=strategies.data())
    def cancel(self, data: strategies.DataObject) -> None:
        waiting = [entry for entry in self.some("waiting") if entry.future]
        if waiting:
            entry = data.draw(strategies.sampled_from(waiting))
            assert entry.future.cancel()
            entry.state = "cancelled"
        for entry in self.some("running"):
            assert not entry.future or not entry.future.cancel()
        self.compare()

    @rule()
    def reset(self) -> None:
        gone = {id(e): e for lane in self.inside.values() for e in lane if e.state == "running"}
        assert self.lanes.reset() == len(gone)
        for entry in gone.values():
            entry.stopped = True
            for lane in entry.route:
                self.inside[lane].remove(entry)
        for lane in [*self.behind]:
            self.let_in(lane)
        self.compare()

    @rule(lane=strategies.sampled_from(["main", "a", "b", "c"]))
    def stop(self, lane: str) -> None:
        running = [e for e in self.inside.get(lane, []) if e.state == "running"]
        assert self.lanes.stop(lane) == len(running)
        for entry in running:
            entry.stopped = True

    @rule(lane=strategies.sampled_from(["main", "main", "c"]), limit=strategies.integers(1, 5))
    def change_limit(self, lane: str, limit: int) -> None:
        self.limits[lane] = limit
        self.lanes.limit(lane, limit)
        self.let_in(lane)
        self.compare()

    # what has to hold

    def compare(self) -> None:
        running = {entry.job.name for entry in self.entries if entry.state in ("running", "done")}
        began = [entry.job for entry in self.entries if entry.job.began.is_set()]
        for entry in self.some("running"):
            assert entry.job.runs(), f"{entry.job.name} {entry.route} is stuck"
        assert {job.name for job in began} <= running, "somebody began too early"
        full = {name for name in {*self.inside, *self.behind} if self.present(name)}
        until(lambda: names(self.lanes) == full | {*LANES, *self.limits}, 3)
        for name in full:
            expected = len(self.inside.get(name, [])), len(self.behind.get(name, []))
            assert counts(self.lanes, name) == expected, name
            assert len(self.lanes.lanes[name].active) <= max(5, self.limits.get(name, 1))

    def present(self, name: str) -> bool:
        return bool(self.inside.get(name) or self.behind.get(name))

    def teardown(self) -> None:
        while running := self.some("running"):
            self.finish(running[0])
            self.compare()
        assert not self.some("waiting"), "stuck, though all that ran has ended"
        for entry in self.some("cancelled"):
            assert entry.future.cancelled() and not entry.job.began.is_set()
        assert names(self.lanes) == {*LANES, *self.limits}
        until(lambda: not any(lane.active for lane in self.lanes.lanes.values()))
        for future in [entry.future for entry in self.entries if entry.future]:
            assert future.done()


LANES = ("main", "cron", "heartbeat")


@since("s10")
@pytest.mark.costly
def test_lanes_and_a_model_of_them_agree(section):
    module = section.load()
    module.WORKER_REST = 0.2
    kind = type("Lanes", (Machine,), {"module": module})
    checks = settings(
        max_examples=80,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(kind, settings=checks)


# --- through the front door ---

APPROVED = {"APPROVAL": "always"}
BASH = "bash is always allowed"


class Office(test_gateway.Desk):
    """A section with people on Telegram, at Feishu and on the web, and a model that can wait."""

    def __init__(self, section: harness.Section, workspace: Path, model: FakeModel):
        super().__init__(section, workspace, model)
        self.telegram = self.opened.enter_context(FakeTelegram())
        self.feishu = self.opened.enter_context(FakeFeishu("", "a-verification-token"))
        self.gates: dict[str, threading.Event] = {}
        self.people = [str(number) for number in range(101, 108)]
        self.guests = [f"ou_guest{number}" for number in range(7)]
        self.hook, self.web = "", None
        self.slow, self.broken = 0.0, None

    def brain(self, body: dict) -> Any:
        """Does what the last user message says; `wait x` and `stream x` wait for gate x."""
        messages = body["messages"]
        last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        verb, _, rest = re.sub(r"^\[cron \w+\] ", "", last).partition(" ")
        answer = Text(f"heard {last[:200]}")
        if verb == "Nobody":
            return Gate(self.gate_of("beat"), Text("HEARTBEAT_OK"))
        if "tools" not in body:
            return Gate(self.gate_of("late"), Text("in short"))
        if verb == "broken":
            return Gate(self.broken or self.gate_of(rest), answer if self.broken else Error(400))
        if messages[-1]["role"] == "tool":
            return Text(f"done {last[:200]}")
        if verb == "bash":
            return ToolCalls([("bash", {"command": part}) for part in rest.split(" ;; ")])
        if verb == "wait":
            return Gate(self.gate_of(rest), answer)
        if verb == "stream":
            return Gate(self.gate_of(rest), answer, after_chunks=3)
        return Stall(0, self.slow, answer) if self.slow else answer

    def gate_of(self, name: str) -> threading.Event:
        return self.gates.setdefault(name, threading.Event())

    def __exit__(self, *about: Any) -> None:
        for gate in [*self.gates.values()]:
            gate.set()
        super().__exit__(*about)

    def up(self, **env: str) -> harness.Screen:
        """A run at a terminal with all three channels on."""
        screen = super().up(
            TELEGRAM_BOT_TOKEN=self.telegram.token,
            TELEGRAM_BASE_URL=self.telegram.url,
            TELEGRAM_ALLOWED_CHATS=" ".join(self.people),
            FEISHU_APP_ID=self.feishu.app_id,
            FEISHU_APP_SECRET=self.feishu.app_secret,
            FEISHU_DOMAIN=self.feishu.url,
            FEISHU_PORT="0",
            FEISHU_VERIFICATION_TOKEN=self.feishu.verification_token,
            FEISHU_ALLOWED_CHATS=" ".join(self.guests),
            **env,
        )
        until(lambda: "[feishu default] on" in screen.text)
        self.hook = re.findall(r"http://\S+/feishu/events", screen.text)[-1]
        self.web = self.client()
        return screen

    def say(self, who: str, text: str) -> None:
        """Have a person say something: a chat at Telegram, an open_id at Feishu, or on the web."""
        if who in self.people:
            self.telegram.say(text, int(who))
        elif who in self.guests:
            assert self.feishu.push(self.hook, self.feishu.event(text, open_id=who)).status == 200
        else:
            self.web.call("send", text=text, peer=who)

    def told(self, who: str) -> list[str]:
        """What a person was sent, in order."""
        if who in self.people:
            return [sent.text for sent in self.telegram.sent_to(int(who))]
        if who in self.guests:
            mine = (who, f"oc_{who[3:]}")
            return [sent.text for sent in list(self.feishu.sent) if sent.receive_id in mine]
        self.web.call("status")
        return [
            params["text"]
            for name, params in self.web.events
            if name == "message" and params["role"] == "assistant" and self.mine(params, who)
        ]

    @staticmethod
    def mine(params: dict, who: str) -> bool:
        return json.dumps(params).lower().find(f"direct:{who}") >= 0

    def wait(self, who: str, *texts: str, timeout: float = 15) -> None:
        """Wait until a person was sent exactly these."""
        deadline = time.monotonic() + timeout
        while self.told(who) != [*texts] and time.monotonic() < deadline:
            time.sleep(0.03)
        assert self.told(who) == [*texts]

    def asking(self, text: str, timeout: float = 10) -> None:
        """Wait until the model has been asked this."""
        until(lambda: text in self.asked, timeout)

    def line(self, screen: harness.Screen, text: str, answer: str | re.Pattern) -> str:
        """What a command at the terminal shows, up to the next prompt."""
        began = len(screen.text)
        screen.type(f"{text}\n")
        screen.wait_for(answer, 5)
        screen.wait_for(PROMPT, 5)
        return screen.text[began:]

    def sessions(self) -> dict[str, list[dict]]:
        """The messages in each session file, by the session's key."""
        found: dict[str, list[dict]] = {}
        for file in self.workspace.rglob("sessions/*.jsonl"):
            records = [json.loads(line) for line in file.read_text().splitlines()]
            messages = [r["message"] for r in records if r["type"] == "message"]
            found.setdefault(records[0]["key"], []).extend(messages)
        return found


@pytest.fixture
def office(section, workspace: Path, fake_model: FakeModel) -> Iterator[Office]:
    with Office(section, workspace, fake_model) as office:
        yield office
    assert not office.telegram.problems and not office.feishu.problems


@since("s10")
@pytest.mark.costly
def test_twenty_people_are_answered_four_at_a_time(office: Office, record_property):
    office.slow, rounds = 1.0, 3
    everybody = [*office.people, *office.guests, *(f"web{number}" for number in range(6))]
    office.up()
    began = time.monotonic()
    for who in everybody:
        for round in range(rounds):
            office.say(who, f"{who} says {round}")
    ideal = len(everybody) * rounds / 4
    expected = [f"heard {{}} says {round}" for round in range(rounds)]
    office.model.wait(len(everybody) * rounds, ideal * 1.35 + 5)
    for who in everybody:
        office.wait(who, *(text.format(who) for text in expected))
    took = time.monotonic() - began
    record_property("seconds", took)
    print(f"{took:.2f} s, ideal {ideal:.2f} s")
    assert office.model.peak == 4
    assert took < ideal * 1.35 + 0.5, took
    for chat in office.model.chats:  # each sees its own exchanges so far, and no other's
        said = [m["content"] for m in chat.messages if m["role"] != "system"]
        who, _, round = said[-1].partition(" says ")
        whole = [t for n in range(int(round)) for t in (f"{who} says {n}", f"heard {who} says {n}")]
        assert said == [*whole, f"{who} says {round}"]
    kept = [m for m in office.sessions().values() if m]
    assert len(kept) == len(everybody)
    for messages in kept:
        (who,) = {m["content"].split(" says ")[0].removeprefix("heard ") for m in messages}
        assert [m["content"] for m in messages[1::2]] == [text.format(who) for text in expected]
    office.down()


TOOLS = "bash echo one >> ran.txt; until [ -e go ]; do sleep 0.02; done ;; echo two >> ran.txt"


@since("s10")
@pytest.mark.parametrize("who", ["101", "ou_guest0", "alice"], ids=["telegram", "feishu", "web"])
def test_stop_ends_a_turn_between_two_steps(office: Office, workspace: Path, who: str):
    office.up(**APPROVED)
    office.say(who, "/stop")
    office.wait(who, "nothing runs here")
    office.say("102", "wait other")
    office.asking("wait other")
    # between two tools
    office.say(who, TOOLS)
    until((workspace / "ran.txt").exists)
    office.say(who, "/stop")
    office.wait(who, "nothing runs here", "stopped")
    (workspace / "go").touch()
    office.wait(who, "nothing runs here", "stopped", "[stopped]")
    office.say(who, "go on")
    office.wait(who, "nothing runs here", "stopped", "[stopped]", "heard go on")
    assert (workspace / "ran.txt").read_text() == "one\n"
    results = [m["content"] for m in office.model.chats[-1].messages if m["role"] == "tool"]
    assert len(results) == 2 and all("interrupted" in text for text in results)
    # while text streams, with another message behind it
    office.say(who, "stream a")
    office.asking("stream a")
    office.say(who, "behind")
    office.say(who, " /stop ")
    before = office.told(who)[:4]
    office.wait(who, *before, "stopped")
    office.gates["a"].set()
    office.wait(who, *before, "stopped", "[stopped]", "heard behind")
    said = [m["content"] for m in office.model.chats[-1].messages]
    assert "heard stream a" not in said
    office.gates["other"].set()
    office.wait("102", "heard wait other")
    office.say(who, "/stop")
    office.wait(who, *before, "stopped", "[stopped]", "heard behind", "nothing runs here")
    office.down()
    office.up()
    office.say(who, "again")
    until(lambda: office.told(who)[-1:] == ["heard again"])
    office.down()


@since("s10")
def test_stop_at_the_terminal(office: Office):
    screen = office.up()
    office.line(screen, "/stop", "nothing runs")
    for who in ("101", "alice"):
        office.say(who, f"stream {who}")
        office.asking(f"stream {who}")
    office.line(screen, "/stop session:agent:main:nobody", "nothing runs")
    (key,) = [k for k in office.sessions() if "alice" in k]
    office.line(screen, f"/stop session:{key}", "1 tasks are stopped")
    office.gates["alice"].set()
    office.wait("alice", "[stopped]")
    office.line(screen, "/stop", re.compile("[12] tasks are stopped"))
    office.gates["101"].set()
    office.wait("101", "[stopped]")
    for who in ("101", "alice"):
        office.say(who, "hello")
        office.wait(who, "[stopped]", "heard hello")
    office.down()


@since("s10")
def test_reset_goes_on_with_what_waits(office: Office):
    """Four hang; the next message of one of them has the same words as the one that hangs."""
    screen = office.up()
    hanging = ["101", "102", "ou_guest0", "alice"]
    for who in hanging:
        office.say(who, "stream same")
    until(lambda: office.asked.count("stream same") == 4)
    same = office.gates["same"]
    office.gates["same"] = threading.Event()
    for who in ("101", "alice"):
        office.say(who, "stream same")
    for who in ("103", "ou_guest1", "bob"):
        office.say(who, "hello")
    time.sleep(0.3)
    assert len(office.asked) == 4
    office.line(screen, "/reset", "4 tasks were let go; what waited goes on")
    for who in ("103", "ou_guest1", "bob"):
        office.wait(who, "heard hello")
    until(lambda: office.asked.count("stream same") == 6)
    same.set()  # the four that were let go come to their end while two of their sessions are used
    for who in hanging:
        office.wait(who, "[stopped]")
    office.gates["same"].set()
    for who in ("101", "alice"):
        office.wait(who, "[stopped]", "heard stream same")
    for who in hanging:
        office.say(who, "and on")
        until(lambda who=who: office.told(who)[-1:] == ["heard and on"])
        said = [m["content"] for m in office.model.chats[-1].messages[1:]]
        assert said.count("heard stream same") == (who in ("101", "alice")), said
    office.line(screen, "/generation", "main: generation 1")
    office.down()


@since("s10")
def test_who_was_let_go_leaves_the_session_alone(office: Office):
    """Not only a text that streams: a call that fails, a new session, a summary that comes late."""
    screen = office.up(CONTEXT_TOKENS="20000")
    for who in ("101", "102", "103"):
        for number in range(3):
            office.say(who, f"{number} " + "word " * 300)
            until(lambda who=who, n=number: len(office.told(who)) == n + 1)
    late = office.gate_of("late")
    office.say("101", "broken late")
    office.say("102", "stream late")
    office.say("103", "/compact")
    until(lambda: len(office.asked) == 12)
    for who, text in (("101", "broken late"), ("102", "/new"), ("103", "first")):
        office.say(who, text)
    office.broken = office.gate_of("other")
    office.line(screen, "/reset", "3 tasks were let go")
    office.asking("first")
    until(lambda: office.told("102")[-1].startswith("session "))
    until(lambda: office.asked.count("broken late") == 2)
    until(lambda: office.told("103")[-1:] == ["heard first"])
    late.set()
    for who, count in (("101", 4), ("102", 5), ("103", 5)):
        until(lambda who=who, count=count: len(office.told(who)) == count)
    assert "[stopped]" in office.told("101") and "[stopped]" in office.told("102")
    office.broken.set()
    until(lambda: office.told("101")[-1] == "heard broken late")
    for who in ("101", "102", "103"):
        office.say(who, "and on")
        until(lambda who=who: office.told(who)[-1:] == ["heard and on"])
        said = [m["content"] for m in office.model.chats[-1].messages[1:]]
        if who == "101":
            assert said[-3:] == ["broken late", "heard broken late", "and on"]
        if who == "102":
            assert said == ["and on"], said
        if who == "103":
            assert said[-3:] == ["first", "heard first", "and on"], said
            assert said[0].startswith("0 word") and "in short" not in said[0]
    office.down()


@pytest.mark.guard
@since("s10")
def test_ctrl_c_while_turns_run_loses_nothing(office: Office, workspace: Path):
    """The next start goes on: each question is answered once, and no tool runs again."""
    office.up(**APPROVED)
    office.say("101", "bash echo a >> a.txt ;; echo b >> b.txt; sleep 20 ;; echo c >> c.txt")
    until((workspace / "b.txt").exists)
    for who in ("102", "ou_guest0", "alice"):
        office.say(who, f"wait {who}")
        office.asking(f"wait {who}")
    for who in ("103", "ou_guest1", "bob", "102", "101"):
        office.say(who, f"{who} waits")
    time.sleep(0.2)
    began = time.monotonic()
    office.down(within=2.5)
    print(f"ended after {time.monotonic() - began:.2f} s")
    for gate in office.gates.values():
        gate.set()
    time.sleep(0.3)
    assert not (workspace / "c.txt").exists()
    office.up(**APPROVED)
    office.wait("102", "heard wait 102", "heard 102 waits")
    for who in ("103", "ou_guest1"):
        office.wait(who, f"heard {who} waits")
    office.wait("ou_guest0", "heard wait ou_guest0")
    until(lambda: len(office.told("101")) == 2)
    assert office.told("101")[0].startswith("done bash echo a")
    assert office.told("101")[1] == "heard 101 waits"
    assert (workspace / "a.txt").read_text() == "a\n" and (workspace / "b.txt").read_text() == "b\n"
    assert not (workspace / "c.txt").exists()
    until(lambda: {"heard wait alice", "heard bob waits"} <= set(said_in(office)))
    said = said_in(office)
    assert len([text for text in said if text.startswith(("heard", "done"))]) == 9
    office.down()


def said_in(office: Office) -> list[str]:
    """All that is in any session."""
    return [m["content"] for messages in office.sessions().values() for m in messages]


@since("s10")
def test_the_commands_of_the_lanes_while_turns_run(office: Office):
    screen = office.up()
    for who in ("101", "102", "ou_guest0", "alice"):
        office.say(who, f"wait {who}")
        office.asking(f"wait {who}")
    for who in ("103", "101"):
        office.say(who, f"hello of {who}")
    time.sleep(0.2)
    shown = office.line(screen, "/lanes", "cron jobs that run or wait: none")
    assert "main: 4 of 4, 1 waiting" in shown and "heartbeat: 0 of 1, 0 waiting" in shown
    assert len(re.findall(r"^session:agent:main:\S+: [01] of 1, [01] waiting$", shown, re.M)) == 5
    shown = office.line(screen, "/queue main", "main: 4 of 4, 1 waiting")
    assert "hello of 103" in shown
    assert "main: 4 of 4" not in office.line(screen, "/queue", "texts wait to be sent")
    office.line(screen, "/queue nowhere", "there is no lane 'nowhere' now; there are: main, cron")
    assert "main: generation 0" in office.line(screen, "/generation", "heartbeat: generation 0")
    for bad in ("", "main", "main 0", "main 33", "main -1", "main x", "main 1.5", "main  2"):
        office.line(screen, f"/concurrency {bad}", "a lane and a number from 1 to 32 are needed")
    for bad in ("", "main", "main  "):
        office.line(screen, f"/enqueue {bad}", "a lane and a message are needed")
    session = re.search(r"session:agent:main:\S+(?=:)", office.line(screen, "/lanes", "cron"))[0]
    office.line(screen, f"/concurrency {session} 2", "answered one after the other")
    office.line(screen, "/enqueue main hello from here", "main: 4 of 4, 2 waiting")
    office.line(screen, "/enqueue side hello aside", re.compile("side: ([01] of 1, 0|done)"))
    screen.wait_for("[side] heard hello aside")
    assert "wait 103" not in office.asked and "hello of 103" not in office.asked
    office.line(screen, "/concurrency main 6", "main: ")
    office.wait("103", "heard hello of 103")
    until(lambda: "[main] heard hello from here" in screen.text)
    office.line(screen, "/concurrency main 2", "main: 4 of 2, 0 waiting")
    office.line(screen, "/reset", "4 tasks were let go; what waited goes on")
    until(lambda: office.told("101") == ["heard hello of 101"])
    office.line(screen, "/reset", "0 tasks were let go")
    office.line(screen, "/generation", "main: generation 2")
    for gate in office.gates.values():
        gate.set()
    until(lambda: office.told("102") == ["[stopped]"])
    office.line(screen, "hello", "heard hello")
    office.line(screen, "/lanes", "main: 0 of 2, 0 waiting")
    assert not [f for f in office.workspace.rglob("*.jsonl") if f.stem.startswith("enqueue-")]
    office.down()


def bind(office: Office, agent: str, **about: Any) -> None:
    office.web.call("bindings.set", agent=agent, **about)


@since("s10")
def test_a_binding_that_changes_while_a_message_waits(office: Office, workspace: Path):
    """The message is answered by the agent that it belongs to then, and never by two at once."""
    (workspace / "agents.json").write_text("{}")
    office.up()
    office.say("101", "wait a")
    office.asking("wait a")
    office.say("101", "second")
    office.say("101", "third")
    time.sleep(0.2)
    bind(office, "luna", channel="telegram", peer="101")
    office.say("101", "wait b")
    office.asking("wait b")
    office.gates["a"].set()
    office.wait("101", "heard wait a")
    time.sleep(0.3)
    assert "second" not in office.asked
    office.gates["b"].set()
    office.wait("101", "heard wait a", "heard wait b", "heard second", "heard third")
    keys = {key: [m["content"] for m in found] for key, found in office.sessions().items()}
    (mine,) = [texts for key, texts in keys.items() if key.startswith("agent:main:telegram")]
    (hers,) = [texts for key, texts in keys.items() if key.startswith("agent:luna:telegram")]
    assert mine == ["wait a", "heard wait a"]
    assert [text for text in hers if "heard" not in text] == ["wait b", "second", "third"]
    office.down()


@since("s10")
def test_two_who_begin_a_new_session_at_the_same_time(office: Office):
    office.up()
    everybody = [*office.people, *office.guests]
    for who in everybody:
        office.say(who, f"{who} was here")
    for who in everybody:
        office.wait(who, f"heard {who} was here")
    for who in everybody:
        office.say(who, f"/new fresh {who}")
    for who in everybody:
        until(lambda who=who: len(office.told(who)) == 2)
        assert re.match(rf"session \w+ \(fresh {who}\), 0 messages", office.told(who)[1])
    index = json.loads(next(office.workspace.rglob("sessions.json")).read_text())
    found = sorted(entry["label"] for entry in index.values() if entry["label"])
    assert found == sorted(f"fresh {who}" for who in everybody)
    office.down()


@since("s10")
def test_two_threads_that_point_at_once(section, tmp_path: Path):
    store = section.module.SessionStore(tmp_path)
    store.folder.mkdir(parents=True)
    other = section.module.SessionStore(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n, s=s: [s.create(f"key {n} {i}") for i in range(20)])
        for n, s in enumerate((store, other, store, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert len(store.read_index()) == 80


def jobs(workspace: Path, *entries: dict) -> None:
    (workspace / "CRON.json").write_text(json.dumps({"jobs": entries}))


def every(name: str, seconds: int, **payload: str) -> dict:
    schedule = {"kind": "every", "every_seconds": seconds}
    return {"id": name, "schedule": schedule, "payload": payload}


@since("s10")
def test_a_slow_job_delays_no_reminder_and_no_person(office: Office, workspace: Path):
    jobs(
        workspace,
        every("slow", 1, kind="agent_turn", message="wait job"),
        every("tick", 1, kind="system_event", text="tick tock"),
    )
    screen = office.up(OWNER="telegram:999")
    until(lambda: any("wait job" in text for text in office.asked))
    for who in ("101", "102", "103", "104", "ou_guest0"):
        office.say(who, f"wait {who}")
    until(lambda: sum(text.startswith("wait ") for text in office.asked) == 4)
    for _ in range(2):
        screen.wait_for("[cron tick] tick tock", 3)
    shown = office.line(screen, "/lanes", "cron jobs that run or wait: slow")
    assert "cron: 1 of 1, 0 waiting" in shown and "main: 4 of 4, 1 waiting" in shown
    for gate in [*office.gates.values(), *(office.gate_of(who) for who in ("104", "ou_guest0"))]:
        gate.set()
    for who in ("101", "102", "103", "104", "ou_guest0"):
        office.wait(who, f"heard wait {who}")
    screen.wait_for("[cron slow] heard [cron slow] wait job")
    office.down()


@since("s10")
def test_stop_ends_a_job_too(office: Office, workspace: Path):
    """A job that was stopped has ended, with an error; the next one runs as ever."""
    jobs(workspace, every("slow", 1, kind="agent_turn", message="wait job"))
    screen = office.up()
    until(lambda: any("wait job" in text for text in office.asked))
    office.line(screen, "/stop cron", "1 tasks are stopped")
    office.gates["job"].set()
    screen.wait_for("[cron slow: stopped]")
    office.down()
    log = (workspace / "cron" / "cron-runs.jsonl").read_text()
    ends = [json.loads(line) for line in log.splitlines() if '"end"' in line]
    assert [end["error"] for end in ends if end["type"] == "end"][:1] == ["stopped"]


@since("s10")
def test_a_beat_and_people_do_not_meet(office: Office, workspace: Path):
    """It does not begin while somebody is answered; whoever comes while it runs does not wait."""
    (workspace / "HEARTBEAT.md").write_text("- look\n")
    beat = office.gate_of("beat")
    screen = office.up()
    office.say("101", "wait 101")
    office.asking("wait 101")
    office.line(screen, "/trigger", "it runs as soon as nobody is being answered")
    time.sleep(1.2)
    assert not any(text.startswith("Nobody") for text in office.asked)
    office.gates["101"].set()
    until(lambda: any(text.startswith("Nobody") for text in office.asked))
    for who in ("101", "102", "ou_guest0"):
        office.say(who, "hello")
    office.wait("102", "heard hello")
    office.wait("ou_guest0", "heard hello")
    office.wait("101", "heard wait 101", "heard hello")
    assert "heartbeat: 1 of 1, 0 waiting" in office.line(screen, "/lanes", "cron jobs")
    office.line(screen, "/stop heartbeat", "1 tasks are stopped")
    beat.set()
    office.line(screen, "/heartbeat", re.compile("not due"))
    until(lambda: "stopped" in office.line(screen, "/heartbeat", "not due"))
    office.line(screen, "/lanes", "heartbeat: 0 of 1, 0 waiting")
    beat.clear()
    office.line(screen, "/trigger", "it runs as soon")  # its thread is still there
    until(lambda: sum(text.startswith("Nobody") for text in office.asked) == 2)
    beat.set()
    office.down()


@since("s10")
def test_all_commands_so_far_are_there_and_answer(section, office: Office):
    before = [each for each in harness.sections() if each.label <= section.label]
    wanted = {name for each in before for name in getattr(each.module, "COMMANDS", {})}
    assert wanted <= set(section.module.COMMANDS)
    screen = office.up()
    for name in sorted(wanted):
        before = len(screen.text)
        screen.type(f"{name}\n")
        screen.wait_for(f"{name}\n", 5)
        screen.wait_for(PROMPT, 5)
        shown = screen.text[before:].split(name, 1)[1]
        assert len(shown.replace(PROMPT, "").strip()) > 3, (name, shown)
        assert "is no command" not in shown, shown
    office.line(screen, "hello", "heard hello")
    office.down()


@since("s10")
def test_no_tool_begins_while_the_program_ends(office: Office, workspace: Path):
    """The command that still runs is ended; the next call of the same answer does not begin."""
    office.up(**APPROVED)
    office.telegram.hang("sendMessage", 5, times=9)
    office.say("102", "hello")
    office.say(
        "101", "bash echo a >> a.txt; sleep 20 ;; echo c >> c.txt; sleep 20; echo d >> d.txt"
    )
    until((workspace / "a.txt").exists)
    until(lambda: "to User 102: heard hello" in office.screens[-1].text)
    office.down(within=2.5)
    time.sleep(0.5)
    assert not (workspace / "c.txt").exists()


# --- what readers broke ---


@since("s10")
def test_a_second_ctrl_c_does_not_cut_off_the_end(office: Office, workspace: Path):
    """A command that a turn has begun ends with the program all the same."""
    screen = office.up(**APPROVED)
    office.say("101", "bash echo a >> a.txt; sleep 2; echo b >> b.txt")
    until((workspace / "a.txt").exists)
    screen.press("ctrl-c")
    time.sleep(0.2)
    screen.press("ctrl-c")
    assert screen.wait_exit(5) == 0
    assert "Traceback" not in screen.text
    time.sleep(2)
    assert not (workspace / "b.txt").exists()


@since("s10")
def test_a_second_stop_is_answered_too(office: Office):
    office.up()
    for number in range(10):
        office.say("101", f"stream {number}")
        office.asking(f"stream {number}")
        for _ in range(3):
            office.say("101", "/stop")
        office.gate_of(str(number)).set()
        until(lambda number=number: len(office.told("101")) == 4 * (number + 1))
    office.down()
    done = [json.loads(line) for line in (office.workspace / ".inbox.jsonl").open()]
    assert {r["message"]["ids"][0] for r in done if r["type"] == "message"} == {
        r["id"] for r in done if r["type"] == "done"
    }


@since("s10")
def test_a_command_that_was_let_go_does_not_bring_its_session_back(office: Office):
    """The summary of /compact comes when /new has been answered long ago."""
    screen = office.up(CONTEXT_TOKENS="20000")
    for number in range(4):
        office.say("101", f"{number} " + "word " * 300)
        until(lambda number=number: len(office.told("101")) == number + 1)
    office.say("101", "/compact")
    until(lambda: len(office.model.chats) == 5)
    office.say("101", "/new")
    office.line(screen, "/reset", "1 tasks were let go")
    until(lambda: any(text.startswith("session ") for text in office.told("101")))
    office.gate_of("late").set()
    until(lambda: any("stopped" in text for text in office.told("101")))
    office.say("101", "hello")
    until(lambda: office.told("101")[-1] == "heard hello")
    assert len(office.model.chats[-1].messages) == 2, "the prompt, and one question"
    office.down()


@since("s10")
def test_resets_leave_threads_for_the_others(lanes, module):
    """Each reset lets go of four that hang, more in all than there may be threads."""
    hung = [[begin(lanes, "main") for _ in range(4)]]
    for _ in range(module.MAX_WORKERS // 4 + 1):
        assert all(job.began.wait(LONG) for job, _ in hung[-1])
        lanes.reset()
        hung.append([begin(lanes, "main") for _ in range(4)])
    assert all(job.began.wait(LONG) for job, _ in hung[-1])
    for job, _ in (pair for pairs in hung for pair in pairs):
        job.go.set()
    assert lanes.enqueue(["main"], max, 1, 2).result(LONG) == 2


@since("s07")
def test_session_files_that_go_while_they_are_listed(section, tmp_path: Path):
    """Jobs remove theirs, as another thread looks for the session of a new person."""
    store, over = section.module.SessionStore(tmp_path), threading.Event()
    store.folder.mkdir(parents=True)

    def come_and_go() -> None:
        while not over.is_set():
            for name in "abc":
                (store.folder / f"{name}.jsonl").write_text("{}\n")
            for name in "abc":
                (store.folder / f"{name}.jsonl").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(2000):
            assert store.files("agent:main:telegram:default:direct:1") == []
    finally:
        over.set()
        thread.join()


@since("s04")
def test_an_error_that_repeats_the_key_hides_it(section, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-very-secret-key")
    told = section.module.explain(OSError("wrong key: sk-a-very-secret-key, sorry"))
    assert "secret" not in told and told.endswith("***, sorry')") or told.endswith("***, sorry")
