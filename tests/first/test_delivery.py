"""Delivery (s08): what is to be sent is on disk first, arrives in order, and holds up nobody."""

import json
import os
import random
import re
import statistics
import threading
import time
from collections import Counter
from collections import deque
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
from fake_feishu import SEND_PATH
from fake_feishu import FakeFeishu
from fake_model import FakeModel
from fake_model import Text
from fake_telegram import FakeTelegram
from harness import since
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from first import test_channels
from first import test_feishu
from first import test_proactive
from first import test_telegram
from first.ledger import inbox_is_empty
from first.ledger import journal
from first.ledger import pending
from first.test_feishu import Desk
from first.test_feishu import wait_until
from first.test_proactive import idle
from first.test_proactive import trigger
from first.test_proactive import write_jobs
from first.test_telegram import PROMPT
from first.test_telegram import Post
from first.test_telegram import drawn
from first.test_telegram import lines_with

post, telegram = test_telegram.post, test_telegram.telegram  # fixtures
desk, sealing = test_feishu.desk, test_feishu.sealing

SLOW = os.getenv("SLOW") == "1"
EXAMPLES = 400 if SLOW else 60
TABLE = (5, 25, 120, 600)
MINUTE, HOUR = 60, 3600
HERE, THERE = ("telegram", "default"), ("feishu", "default")


def kills_for(section: harness.Section) -> int:
    """How often the process is killed: it costs a second each, so later sections have fewer."""
    return 200 if SLOW else 15 if section.label == "s08" else 4


# --- a queue on a clock of ours ---


class Waits(Exception):
    """A channel has nothing to send for so many seconds, None for ever."""


class Still:
    """Stands for those who would wait for a channel's next text."""

    def notify(self) -> None:
        pass

    def wait(self, seconds: float | None) -> None:
        raise Waits(seconds)


class Outlet:
    """A channel that sends what it is given, unless a rule for the recipient has an error."""

    def __init__(self, bench: "Bench", channel: tuple[str, str]):
        self.bench = bench
        self.account = bench.module.ChannelAccount(*channel)
        self.calls: list[tuple[float, str, str]] = []  # when, to whom, what
        self.keys: list[str] = []
        self.arrived: list[tuple[float, str, str]] = []
        self.rules: dict[str, Callable[[str], Exception | None]] = {}
        self.told: list[str] = []

    def send(self, peer: str, text: str, key: str = "") -> None:
        call = (self.bench.time, peer, text)
        self.calls.append(call)
        self.keys.append(key)
        if error := self.rules.get(peer, lambda text: None)(text):
            raise error
        self.arrived.append(call)

    def allows(self, message: object) -> bool:
        return True

    def tell(self, text: str, once: bool = False) -> None:
        self.told.append(text)

    def got(self, peer: str) -> list[str]:
        return [text for _, to, text in self.arrived if to == peer]

    def times(self, peer: str) -> list[float]:
        """When it was tried to reach somebody, counted from the bench's beginning."""
        return [at - self.bench.began for at, to, _ in self.calls if to == peer]


class Bench:
    """A queue, two channels, and a clock that goes only when there is nothing to do."""

    def __init__(self, section: harness.Section, folder: Path):
        self.module, self.path = section.module, folder / "delivery-queue" / "queue.jsonl"
        self.time = self.began = 1000.0
        self.outlets = {channel: Outlet(self, channel) for channel in (HERE, THERE)}
        self.here, self.there = self.outlets.values()
        self.start()

    def start(self) -> None:
        """The program begins, anew if it has run before."""
        self.queue = self.module.DeliveryQueue(self.path, lambda: self.time)
        for channel in self.outlets:
            self.queue.outlets[channel] = (self.queue.outlet(channel)[0], Still())

    def put(self, name: str, peer: str = "42", *pieces: str, channel: tuple = HERE) -> None:
        delivery = self.module.QueuedDelivery(name, *channel, peer, list(pieces) or [name])
        self.queue.enqueue(delivery)

    def work(self) -> float:
        """Send all that is due now. Returns for how long there is nothing to do then."""
        pauses = []
        for channel, outlet in self.outlets.items():
            runner = self.module.DeliveryRunner(outlet, self.queue)
            try:
                while delivery := self.queue.take(channel):
                    runner.attempt(delivery)
            except Waits as pause:
                pauses.append(pause.args[0])
        return min((pause for pause in pauses if pause is not None), default=10**9)

    def until(self, end: float) -> None:
        """Let time pass up to a moment, counted from the bench's beginning."""
        end += self.began
        while self.time + (pause := self.work()) <= end:
            self.time += max(pause, 0.001)
        self.time = end

    def command(self, line: str) -> str:
        """What a command of the terminal says."""
        name, _, rest = line.partition(" ")
        profiles = SimpleNamespace(stats=lambda: "")  # from s09 on
        agent = SimpleNamespace(app=SimpleNamespace(delivery=self.queue, profiles=profiles))
        return self.module.COMMANDS[name][2](agent, rest)

    def error(self, told: str = "it does not answer", **about: object) -> Exception:
        return self.module.ChannelError(told, **about)


@pytest.fixture
def bench(section, tmp_path: Path) -> Bench:
    return Bench(section, tmp_path)


@since("s08")
def test_the_table_of_the_tries(bench: Bench):
    """Five tries, with pauses that differ by a fifth; then a text is failed, and kept."""
    people = [str(number) for number in range(40)]
    for person in people:
        bench.here.rules[person] = lambda text: bench.error()
        bench.put(f"text {person}", person)
    bench.until(HOUR)
    pauses = []
    for person in people:
        times = bench.here.times(person)
        assert times[0] == 0 and len(times) == 5
        pauses.append([b - a for a, b in zip(times, times[1:], strict=False)])
    for seconds, found in zip(TABLE, zip(*pauses, strict=True), strict=True):
        assert 0.8 * seconds <= min(found) < 0.93 * seconds
        assert 1.07 * seconds < max(found) <= 1.2 * seconds + 0.01
    failed = bench.queue.failed
    assert set(failed) == {f"text {person}" for person in people}
    assert {(text.tries, text.error) for text in failed.values()} == {(5, "it does not answer")}
    assert not bench.queue.pending and not bench.here.arrived
    told = Counter(bench.here.told)
    assert told["it does not answer; trying again"] == 40 and len(bench.here.told) == 80
    assert told["not sent to 7: it does not answer; see /failed"] == 1
    bench.until(24 * HOUR)
    assert len(bench.here.calls) == 200


@since("s08")
def test_a_text_that_comes_through_in_the_end(bench: Bench):
    """The count begins anew with each piece, and the same key goes with each try of one."""
    fails = deque([4, 0, 4])

    def moody(text: str) -> Exception | None:
        if fails[0]:
            fails[0] -= 1
            return bench.error()
        return fails.popleft() and None

    bench.here.rules["42"] = moody
    bench.put("one", "42", "a", "b", "c")
    bench.until(HOUR)
    assert bench.here.got("42") == ["a", "b", "c"] and len(bench.here.calls) == 11
    assert bench.here.keys == ["one/0"] * 5 + ["one/1"] + ["one/2"] * 5
    assert not bench.queue.failed and not bench.queue.pending


@since("s08")
def test_to_be_told_to_wait_is_no_failed_try(bench: Bench):
    floods = iter([7, 0.5, 3600, 40, 1, 2, 3, 90])
    bench.here.rules["42"] = lambda text: next(
        (bench.error("flood", retry_after=seconds) for seconds in floods), None
    )
    bench.put("one")
    bench.until(2 * HOUR)
    waits = [0, 7, 7.5, 3607.5, 3647.5, 3648.5, 3650.5, 3653.5, 3743.5]
    assert bench.here.times("42") == pytest.approx(waits, abs=0.1)
    assert bench.here.got("42") == ["one"] and bench.queue.counts["failed"] == 0

    answers = iter([0, 30, 0, 30, 0, 30, 0, 30, 0])
    bench.here.rules["43"] = lambda text: bench.error("mixed", retry_after=next(answers))
    bench.put("two", "43")
    bench.until(4 * HOUR)
    assert len(bench.here.times("43")) == 9 and bench.queue.failed["two"].tries == 5


@since("s08")
def test_what_can_never_arrive_is_tried_once(bench: Bench):
    bench.here.rules["42"] = lambda text: bench.error("chat not found", permanent=True)
    bench.put("one", "42", "a", "b")
    bench.put("two")
    bench.put("three", "43")
    bench.until(HOUR)
    bench.start()
    bench.until(2 * HOUR)
    assert [text for _, to, text in bench.here.calls if to == "42"] == ["a", "two"]
    assert bench.here.got("43") == ["three"] and len(bench.here.calls) == 3
    assert [(each.id, each.tries) for each in bench.queue.failed.values()] == [
        ("one", 1),
        ("two", 1),
    ]


ODD = [
    ValueError("odd"),
    KeyError("odd"),
    OSError(28, "odd"),
    TimeoutError(),
    RuntimeError(""),
    UnicodeEncodeError("utf-8", "x", 0, 1, "odd"),
    type("Odd", (Exception,), {"retry_after": None})("odd"),
]


@since("s08")
@pytest.mark.parametrize("error", ODD, ids=repr)
def test_whatever_a_channel_raises_the_text_is_kept(bench: Bench, error: Exception):
    times = 2

    def rule(text: str) -> Exception | None:
        nonlocal times
        times -= 1
        return error if times >= 0 else None

    bench.here.rules["42"] = rule
    bench.put("one")
    bench.put("two")
    bench.put("three", "43")
    bench.work()
    waiting = bench.queue.pending["one"]
    assert waiting.tries == 1 and waiting.error.strip() and bench.here.got("43") == ["three"]
    bench.until(HOUR)
    assert bench.here.got("42") == ["one", "two"]


@since("s08")
def test_a_long_wait_is_no_end(bench: Bench):
    """However far off the moment is that a platform names, others are served."""
    for number, wait in enumerate((1e12, 1e300, float("inf"), float("nan"), -5)):
        bench.here.rules[str(number)] = lambda text, wait=wait: bench.error("w", retry_after=wait)
        bench.put(f"text {number}", str(number))
    for _ in range(20):
        assert bench.work() < threading.TIMEOUT_MAX
    bench.put("fine", "42")
    bench.work()
    assert bench.here.got("42") == ["fine"] and len(bench.here.calls) < 200
    bench.start()
    assert bench.work() < threading.TIMEOUT_MAX
    bench.put("finer", "42")
    bench.work()
    assert bench.here.got("42") == ["fine", "finer"]


@since("s08")
def test_who_fails_for_an_hour_delays_nobody(bench: Bench):
    """Order is kept for those who fail; all others get theirs at the moment it is queued."""
    end = bench.began + HOUR
    bench.here.rules["42"] = lambda text: bench.error() if bench.time < end else None
    sent: dict[str, float] = {}
    for minute in range(90):
        for name, peer, channel in (("bad", "42", HERE), ("a", "43", HERE), ("b", "42", THERE)):
            sent[f"{name} {minute}"] = bench.time
            bench.put(f"{name} {minute}", peer, channel=channel)
        bench.until(minute * MINUTE + MINUTE)
    for outlet, peer, name in ((bench.here, "43", "a"), (bench.there, "42", "b")):
        assert outlet.got(peer) == [f"{name} {minute}" for minute in range(90)]
        assert all(at - sent[text] < 0.01 for at, to, text in outlet.arrived if to == peer)
    got = bench.here.got("42")
    bad = [f"bad {minute}" for minute in range(90)]
    lost = list(bench.queue.failed)
    assert 3 <= len(lost) <= 5 and [*lost, *got] == bad
    assert bench.here.arrived[0][0] >= bench.began and not bench.queue.pending
    assert len([at for at in bench.here.times("42") if at < HOUR]) <= 5 * 6


# --- what the person at the terminal sees and does ---


def three_failed(bench: Bench) -> None:
    """a1, a2 to one and b1 to another are failed."""
    for peer in ("42", "43"):
        bench.here.rules[peer] = lambda text: bench.error("gone for ever", permanent=True)
    for name, peer in (("a1", "42"), ("a2", "42"), ("b1", "43")):
        bench.put(name, peer, f"{name} I", f"{name} II")
    bench.work()


@since("s08")
def test_what_failed_can_be_tried_again(bench: Bench):
    assert bench.command("/failed") == "nothing has failed"
    three_failed(bench)
    bench.start()
    shown = bench.command("/failed").splitlines()
    assert sorted(line.split(":")[0] for line in shown) == ["a1", "a2", "b1"]
    assert all("gone for ever" in line and "1 tries" in line for line in shown)
    assert re.match("0 ", bench.command("/retry nosuch")) and len(bench.queue.failed) == 3
    bench.here.rules["43"] = lambda text: bench.error()
    assert bench.command("/retry b").startswith("1 ")
    bench.until(HOUR)
    assert bench.queue.failed["b1"].tries == 5
    assert len(bench.here.times("43")) == 6, "the count is a fresh one"
    bench.here.rules.clear()
    bench.put("a3")
    assert bench.command("/retry").startswith("3 ") and not bench.queue.failed
    bench.work()
    assert bench.here.got("42") == ["a3", "a1 I", "a1 II", "a2 I", "a2 II"]
    assert bench.here.got("43") == ["b1 I", "b1 II"]
    assert bench.command("/retry").startswith("0 ")


@since("s08")
def test_a_retry_goes_on_behind_the_pieces_that_arrived(bench: Bench):
    bench.here.rules["42"] = lambda text: bench.error("no", permanent=True) if text == "b" else None
    bench.put("one", "42", "a", "b", "c")
    bench.work()
    bench.start()
    bench.here.rules.clear()
    bench.command("/retry one")
    bench.start()
    bench.work()
    assert bench.here.got("42") == ["a", "b", "c"]


@since("s08")
def test_what_failed_is_known_after_a_restart(bench: Bench):
    """Its error and its count, too; and it is not queued again by its id."""
    three_failed(bench)
    bench.here.rules["44"] = lambda text: bench.error("out of order")
    bench.put("c1", "44")
    bench.until(20)
    before = {name: vars(each) for name, each in bench.queue.failed.items()}
    tries = bench.queue.pending["c1"].tries
    assert tries == 2
    for _ in range(3):
        bench.start()
        assert {name: vars(each) for name, each in bench.queue.failed.items()} == before
        waiting = bench.queue.pending["c1"]
        assert (waiting.tries, waiting.error) == (tries, "out of order")
        assert 15 < waiting.due - bench.time <= 30, "the pause goes on"
        bench.put("a1")
        assert bench.work() > 4 and len(bench.queue.pending) == 1
    bench.until(2 * HOUR)
    assert len(bench.here.times("44")) == 5 and bench.queue.failed["c1"].tries == 5


@since("s08")
def test_a_pause_is_over_after_a_long_night(bench: Bench):
    """The program was down while the pause passed; or the clock was set back meanwhile."""
    bench.here.rules["42"] = lambda text: bench.error()
    bench.put("one")
    bench.until(HOUR / 12)
    tries = len(bench.here.calls)
    assert tries == 4
    text = bench.path.read_text()
    for hours, least, most in ((-1, 0, 0), (100, 400, 721)):
        at = time.time() + hours * HOUR
        bench.path.write_text(re.sub(r'"at": [\d.]+', f'"at": {at}', text))
        bench.start()
        assert least <= bench.queue.pending["one"].due - bench.time <= most


@since("s08")
def test_not_all_that_fails_is_kept(bench: Bench):
    bench.here.rules["42"] = lambda text: bench.error("no", permanent=True)
    for number in range(1100):
        bench.queue.apply(record(bench, f"n{number}"))
    bench.work()
    names = [f"n{number}" for number in range(100, 1100)]
    assert list(bench.queue.failed) == names
    with bench.queue.lock:
        bench.queue.compact()
    bench.start()
    assert list(bench.queue.failed) == names
    assert len(bench.command("/failed").splitlines()) == 20


@since("s08")
def test_the_queue_on_the_screen(bench: Bench):
    assert bench.command("/queue").startswith("0 texts")
    bench.here.rules["42"] = lambda text: bench.error("no   luck\ntoday")
    bench.put("one")
    bench.put("two")
    bench.put("long", "oc_x", "word\n\n" * 500, channel=THERE)
    lines = bench.command("/queue").splitlines()
    assert lines[0].startswith("3 texts") and "2 recipients" in lines[0]
    assert max(map(len, lines)) < 200 and len(lines) == 3
    bench.work()
    first, line = bench.command("/queue").splitlines()
    assert first.startswith("2 texts") and "'one'" in line and line.startswith("2 to")
    assert re.search(r"1 tries.*in [456] s$", line)


@since("s08")
def test_failures_can_be_simulated(bench: Bench):
    assert "100%" in bench.command("/simulate-failure 1")
    bench.put("one")
    bench.work()
    assert bench.here.calls == [] and bench.queue.pending["one"].tries == 1
    assert "50%" in bench.command("/simulate-failure 0.5")
    for number in range(400):
        bench.queue.apply(record(bench, f"n{number}", f"p{number}"))
    bench.work()
    assert 140 < len(bench.here.arrived) < 260
    for bad in ("2", "-1", "1.1", "often", "nan", "1e-3", "0.5 0.5", "0,5", ".", "inf"):
        with pytest.raises(ValueError, match="rate"):
            bench.command(f"/simulate-failure {bad}")
    assert bench.queue.failure_rate == 0.5
    assert "0%" in bench.command("/simulate-failure 0") and bench.queue.failure_rate == 0
    bench.command("/simulate-failure 0.25")
    bench.command("/simulate-failure")
    assert bench.queue.failure_rate == 0
    bench.until(HOUR)
    assert not bench.queue.pending and len(bench.here.arrived) == 401


@since("s08")
def test_the_figures(bench: Bench):
    three_failed(bench)
    bench.here.rules.clear()
    bench.command("/retry b1")
    bench.put("fine", "44")
    bench.here.rules["45"] = lambda text: bench.error()
    bench.put("late", "45")
    bench.work()
    figures = [int(number) for number in re.findall(r"\d+", bench.command("/stats"))]
    assert figures[:5] == [5, 3, 1, 3, 1]
    bench.start()
    figures = [int(number) for number in re.findall(r"\d+", bench.command("/stats"))]
    assert figures[:5] == [0] * 5, "they count from the start"


# --- the journal ---


def record(bench: Bench, name: str, peer: str = "42", *pieces: str) -> dict:
    """A text as the journal has it."""
    fields = vars(bench.module.QueuedDelivery(name, *HERE, peer, list(pieces) or [name]))
    return {"type": "enqueue", "delivery": {k: v for k, v in fields.items() if k != "due"}}


def write(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


@since("s08")
def test_a_damaged_journal(bench: Bench, capsys):
    """What nobody wrote is set aside and told of, and all the rest is delivered."""
    odd = ["", "{", "null", "[]", "5", '"x"', "\x00\x01", "[" * 3000, '{"type": []}', "{}"]
    notes = [
        {"type": "ack", "id": "nobody"},
        {"type": "ack", "id": []},
        {"type": "retry", "id": "good 1", "tries": "2", "error": "x"},
        {"type": "retry", "id": "good 1", "tries": 2, "error": None},
        {"type": "retry", "id": "good 1", "tries": 2, "error": "x", "wait": "5", "at": 1},
        {"type": "retry", "id": "good 1", "tries": 2, "error": "x", "wait": 5, "at": None},
        {"type": "failed", "id": "nobody", "tries": 2, "error": "x"},
        {"type": "again", "id": "good 1"},
        {"type": "sent", "ids": 5},
        {"type": "enqueue", "delivery": 5},
        {"type": "enqueue"},
        {"type": "unheard of", "id": "good 1"},
    ]
    lines = [json.dumps(record(bench, "good 0")), *odd]
    kept = record(bench, "bad")
    for number, bad in enumerate(test_channels.spoilt(kept["delivery"])):
        named = bad | ({"id": f"bad {number}"} if isinstance(bad.get("id"), str) else {})
        lines.append(json.dumps({"type": "enqueue", "delivery": named}))
    lines.append(json.dumps(record(bench, "good 1")))
    lines += map(json.dumps, notes)
    lines.append(json.dumps(record(bench, "good 2")))
    bench.path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"type": "enq')
    before = bench.path.read_bytes()
    bench.start()
    told = capsys.readouterr().out
    assert "queue.jsonl: a torn last line was set aside" in told
    assert "queue.jsonl.damaged" in told and "damaged, left out" in told
    copy = bench.path.with_name("queue.jsonl.damaged").read_bytes()
    assert before.startswith(copy) and len(before) - len(copy) == len(b'{"type": "enq')
    assert b'{"type": "enq' in bench.path.with_name("queue.jsonl.torn").read_bytes()
    bench.until(HOUR)
    texts = [text for text in bench.here.got("42") if text.startswith("good")]
    assert texts == ["good 0", "good 1", "good 2"] and not bench.queue.pending
    assert len(bench.here.calls) < 30, "a record without one of its fields that can be left out"
    bench.start()
    assert capsys.readouterr().out == ""


WRONG = [None, "x", [], {}, -1, -7, 10**6, 1e300, float("nan"), float("inf"), True]


@since("s08")
@pytest.mark.parametrize("field", ["due", "tries", "sent", "error"])
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_wrong_value_stops_nobody(bench: Bench, field: str, wrong: object):
    """Neither in a text nor in a note on a try; whether it is sent or set aside."""
    odd = record(bench, "odd", "41")
    odd["delivery"][field] = wrong
    note = {"type": "retry", "id": "noted", "tries": 1, "error": "x", "wait": 1, "at": time.time()}
    names = {"due": ["wait", "at"], "sent": []}.get(field, [field])
    notes = [note | {name: wrong} for name in names]
    before, after = record(bench, "before"), record(bench, "after")
    write(bench.path, before, odd, record(bench, "noted", "43"), *notes, after)
    bench.start()
    fails = {"43": 1, "41": 1}

    def once(peer: str) -> Exception | None:
        fails[peer] -= 1
        return bench.error() if fails[peer] >= 0 else None

    for peer in fails:
        bench.here.rules[peer] = lambda text, peer=peer: once(peer)
    bench.until(48 * HOUR)
    assert bench.here.got("42") == ["before", "after"] and not bench.queue.pending
    assert bench.here.got("43") == ["noted"] or "noted" in bench.queue.failed


@since("s08")
def test_a_text_that_is_in_the_journal_twice(bench: Bench, capsys):
    """As when the disk took it, said that it did not, and was asked again."""
    write(bench.path, record(bench, "one"), record(bench, "one"), record(bench, "two"))
    bench.start()
    bench.work()
    bench.put("three")
    bench.work()
    assert bench.here.got("42") == ["one", "two", "three"] and not bench.queue.pending
    bench.start()
    assert bench.work() > 100 and len(bench.here.calls) == 3


@since("s08")
def test_an_id_is_taken_once(bench: Bench):
    for _ in range(2):
        bench.put("one")
        bench.put("one", "43", "another text")
        bench.work()
        bench.put("one")
        bench.work()
        bench.start()
    assert [call[1:] for call in bench.here.calls] == [("42", "one")]


@since("s08")
def test_the_journal_stays_small(bench: Bench):
    """However much is sent, the file holds what is not; the ids of the latest, too."""
    bench.here.rules["43"] = lambda text: bench.error()
    bench.put("waits", "43")
    most = 0
    for number in range(3000):
        with bench.queue.lock:
            bench.queue.write(record(bench, f"n{number}", "42", "x" * 300), durable=False)
            bench.queue.apply(record(bench, f"n{number}", "42", "x" * 300))
            bench.queue.tidy()
        bench.work()
        most = max(most, bench.path.stat().st_size)
    assert len(bench.here.got("42")) == 3000 and most < 600_000
    bench.start()
    assert bench.path.stat().st_size < 50_000 and list(bench.queue.pending) == ["waits"]
    for number in (2999, 2500, 2001):
        bench.put(f"n{number}")
    assert list(bench.queue.pending) == ["waits"]


@since("s08")
def test_what_a_crash_left_beside_the_journal_goes(bench: Bench):
    """A kill while the file is compacted leaves a half of the new one; nobody takes it for one."""
    bench.put("one")
    for number in range(3):
        bench.path.with_name(f".{number:016x}.tmp").write_text(json.dumps(record(bench, "ghost")))
    bench.start()
    bench.work()
    assert bench.here.got("42") == ["one"]
    assert [file.name for file in bench.path.parent.iterdir()] == ["queue.jsonl"]


@since("s08")
def test_many_queue_while_the_file_is_compacted(bench: Bench):
    """Nothing is lost and nobody's order changes, in memory or in the file."""
    queue, threads = bench.queue, []

    def put(who: int) -> None:
        for number in range(400):
            bench.put(f"{who}/{number}", f"p{who}")

    for who in range(3):
        threads.append(threading.Thread(target=put, args=(who,)))
    for thread in threads:
        thread.start()
    rounds = 0
    while any(thread.is_alive() for thread in threads):
        with queue.lock:
            queue.compact()
        rounds += 1
        time.sleep(0.001)
    expected = {f"p{who}": [f"{who}/{number}" for number in range(400)] for who in range(3)}
    assert rounds and len(queue.pending) == 1200
    for start_anew in (True, False):
        if start_anew:
            bench.start()
        assert len(bench.queue.pending) == 1200
    bench.work()
    assert {person: bench.here.got(person) for person in expected} == expected


# --- with threads ---


class Line(Outlet):
    """A channel with its own threads, on which some recipients hang until they are let go."""

    is_keyed = False

    def __init__(self, bench: Bench, channel: tuple, queue: object):
        super().__init__(bench, channel)
        self.hung: dict[str, threading.Event] = {}
        self.began: list[str] = []
        runner = bench.module.DeliveryRunner(self, queue)
        threading.Thread(target=runner.run, daemon=True).start()

    def send(self, peer: str, text: str, key: str = "") -> None:
        self.began.append(text)
        if peer in self.hung:
            self.hung[peer].wait(30)
        super().send(peer, text, key)


@since("s08")
def test_who_hangs_delays_nobody(bench: Bench):
    queue = bench.queue = bench.module.DeliveryQueue(bench.path)
    here, there = Line(bench, HERE, queue), Line(bench, THERE, queue)
    here.hung = {"41": threading.Event(), "40": threading.Event()}
    try:
        for number in range(20):
            for peer in ("40", "41", "42", "43"):
                bench.put(f"{peer} {number}", peer)
                bench.put(f"there {peer} {number}", peer, channel=THERE)
        wait_until(lambda: len(here.arrived) == 40 and len(there.arrived) == 80, 10)
        assert here.began.count("41 0") == 1 and "41 1" not in here.began
    finally:
        for event in here.hung.values():
            event.set()
    wait_until(lambda: not queue.pending, 10)
    for peer in ("40", "41", "42", "43"):
        assert here.got(peer) == [f"{peer} {number}" for number in range(20)]
    queue.close(1)


@since("s08")
def test_at_the_end_what_is_on_its_way_may_arrive(bench: Bench):
    queue = bench.queue = bench.module.DeliveryQueue(bench.path)
    here = Line(bench, HERE, queue)
    here.hung["42"] = threading.Event()
    bench.put("one", "42", "a", "b")
    wait_until(lambda: here.began == ["a"])
    began = time.monotonic()
    queue.close(0.3)
    assert 0.25 < time.monotonic() - began < 2
    threading.Timer(0.2, here.hung["42"].set).start()
    queue.close(5)
    assert here.got("42") == ["a"] and queue.pending["one"].sent == 1
    time.sleep(0.2)
    assert here.began == ["a"], "nothing more is begun"


@since("s08")
def test_ten_thousand_wait_at_the_start(bench: Bench):
    """The first is sent at once, and one more costs what it costs with an empty queue."""

    def cost(label: str) -> float:
        seconds = []
        for number in range(150):
            began = time.perf_counter()
            bench.put(f"{label} {number}", f"q{number}", "x" * 200)
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    cost("warm")
    empty = cost("empty")
    peers = [str(number % 500) for number in range(10_000)]
    records = [record(bench, f"n{n}", peer, "x" * 200) for n, peer in enumerate(peers)]
    write(bench.path, *records)
    size = bench.path.stat().st_size
    began = time.monotonic()
    bench.queue = bench.module.DeliveryQueue(bench.path)
    here = Line(bench, HERE, bench.queue)
    wait_until(lambda: here.arrived, 10)
    assert time.monotonic() - began < 3, "a second, on a machine that does nothing else"
    bench.queue.close(1)

    write(bench.path, *records)
    bench.start()
    full = cost("full")
    assert full < 4 * empty + 0.0005, (full, empty)
    began = time.monotonic()
    bench.work()
    assert time.monotonic() - began < 15 and not bench.queue.pending
    for peer in ("0", "499"):
        assert here.account and len(bench.here.got(peer)) == 20
    bench.start()
    assert bench.path.stat().st_size < size / 20


# --- a text in pieces ---


def units(text: str) -> int:
    """How long a text is as Telegram counts: in UTF-16 units."""
    return len(text.encode("utf-16-le")) // 2


CUTS = [
    ("", 10, ["(an empty answer)"]),
    (" \n\n ", 10, ["(an empty answer)"]),
    ("short", 10, ["short"]),
    ("one two three", 10, ["one two ", "three"]),
    ("line\nanother line\n", 13, ["line\nanother ", "line\n"]),
    ("first\nsecond\nthird", 14, ["first\nsecond\n", "third"]),
    ("para one\n\npara two", 14, ["para one\n\n", "para two"]),
    ("a" * 25, 10, ["a" * 10, "a" * 10, "a" * 5]),
    ("\u4f60\u597d" * 8, 10, ["\u4f60\u597d" * 5, "\u4f60\u597d" * 3]),
    ("\U0001f600" * 6, 5, ["\U0001f600" * 2] * 3),
    ("aaaaaaaae\u0301e\u0301", 9, ["aaaaaaaa", "e\u0301e\u0301"]),
    ("\U0001f1e9\U0001f1ea" * 3, 10, ["\U0001f1e9\U0001f1ea" * 2, "\U0001f1e9\U0001f1ea"]),
    ("one" + " " * 30 + "two", 10, ["one       ", "   two"]),
    ("```\none\ntwo\n```\nend", 20, ["```\none\ntwo\n```\nend"]),
    ("```\none one\ntwo two\n```", 20, ["```\none one\n```", "```\ntwo two\n```"]),
    ("~~~\n" + "x" * 20 + "\n~~~", 20, ["~~~\n" + "x" * 12 + "\n~~~", "~~~\n" + "x" * 8 + "\n~~~"]),
    ("```py\none two\nthree\n```", 24, ["```py\none two\nthree\n```"]),
    ("```py\none two\nthree\n```\nend", 24, ["```py\none two\nthree\n```\n", "end"]),
    (
        "before it, some words\n```py\nx = 1\n```\nafter",
        40,
        ["before it, some words\n```py\nx = 1\n```\n", "after"],
    ),
    (
        "before it, words\n```py\nx = 1\ny = x + 1\n```\nafter",
        32,
        ["before it, words\n", "```py\nx = 1\ny = x + 1\n```\nafter"],
    ),
    (
        "``a``` is no block, but words and words",
        20,
        ["``a``` is no block, ", "but words and words"],
    ),
    (
        "```a``` is no block, but words and words",
        21,
        ["```a``` is no block, ", "but words and words"],
    ),
]


@since("s08")
@pytest.mark.parametrize("text, limit, pieces", CUTS)
def test_how_a_text_is_cut(section, text: str, limit: int, pieces: list[str]):
    assert section.module.chunk_message(text, limit) == pieces


LOOPS = [
    "```\ne" + "\u0301" * 60,
    "```\n" + "x\u200d" * 60,
    "~~~" + "\U0001f600" * 6 + "\n" + "\U0001f600" * 90,
    "```" + "x" * 100,
    "`" * 300,
    "~~~\n" * 50,
    "```\n\n" + "\n" * 200 + "```",
    "   ```\n" + "\r\n" * 100,
    "\u0301" * 200,
    "```\n" + "\U0001f1e9" * 100,
    "```\n" + "x " * 18 + "\n```" + " " * 90 + "\nend",
    "a" * 19 + "\n~~~" + "\U0001f600" * 3 + "\n" + "\U0001f600" * 90,
]


@since("s08")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", LOOPS, ids=range(len(LOOPS)))
def test_every_text_comes_to_an_end(section, text: str):
    for limit in range(40, 60):
        rest, count = text, 0
        while rest:
            piece, rest = section.module.cut_piece(rest, limit)
            assert units(piece) <= limit and piece
            count += 1
            assert count < 200, (limit, piece)


def blocks(text: str) -> list[tuple[int, int, str, str]]:
    """The code blocks: from the end of the opening line to the closing line, or the text's end.

    With it go the opening line and its mark: Markdown's own rules, line by line.
    """
    found, at, opening, mark = [], 0, "", ""
    begin = 0
    for line in text.splitlines(keepends=True) if "\r" not in text else text.split("\n"):
        match = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if not opening and match and not (match[1][0] == "`" and "`" in match[2]):
            opening, mark, begin = line.rstrip("\n"), match[1], at + len(line)
        elif opening and match and match[1].startswith(mark) and not match[2].strip():
            found.append((begin, at, opening, mark))
            opening = ""
        at += len(line)
    if opening:
        found.append((begin, len(text) + 1, opening, mark))
    return found


def around(found: list[tuple[int, int, str, str]], at: int) -> tuple[str, str]:
    """The opening line and the mark of the block that a place is in."""
    return next(((line, mark) for a, b, line, mark in found if a <= at <= b), ("", ""))


def cuts_of(text: str, pieces: list[str]) -> list[int]:
    """Where a text was cut; AssertionError if the pieces are not this text, with blocks mended."""
    found, ways = blocks(text), {0: []}
    for piece in pieces:
        after = {}
        for at, cuts in ways.items():
            blank = re.compile(r"\s*").match(text, at).end()  # blanks alone are no piece
            for begin in dict.fromkeys((at, *range(at, blank + 1))):
                line = around(found, begin)[0] if begin else ""
                if line and not piece.startswith(f"{line}\n"):
                    continue
                for end, body in ends_of(piece[len(line) + 1 if line else 0 :]):
                    here = begin + len(body)
                    mark = around(found, here)[1] if here < len(text) else ""
                    if text.startswith(body, begin) and end in (mark, mark and f"\n{mark}"):
                        after.setdefault(here, [*cuts, here])
        assert after, f"{piece!r} is not what comes at {set(ways)} in {text!r}"
        ways = after
    whole = [cuts for at, cuts in ways.items() if not text[at:].strip()]
    assert whole, f"the end of {text!r} is not in {pieces}"
    return whole[0]


def ends_of(body: str) -> Iterator[tuple[str, str]]:
    """The ways to see a piece: with what was added at its end, and without it."""
    yield "", body
    if match := re.search(r"\n(`{3,}|~{3,})\Z", body):
        yield match[1], body[: match.start() + 1]
        yield match[0], body[: match.start()]


WORDS = [
    "word",
    "a quick brown na\u00efve",
    "*bold* _it_ `code`",
    "[link](http://x.y)",
    "- # > 1. |",
    "\u4f60\u597d\u4e16\u754c",
    "\u6f22\u5b57\u304b\u306a",
    "\ud55c\uad6d\uc5b4",
    "\u0e2a\u0e27\u0e31\u0e2a",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0650\u064a\u064e\u0651\u0629",
    "\u05e9\u05c1\u05b8\u05dc\u05d5",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0915\u094d\u0937\u0947\u0924\u094d\u0930",
    "\U00020000\U0002a6d6",
    "\U0001d518\U0001d52b",
]
CLUSTERS = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",  # a family
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1e9\U0001f1ea",
    "\U0001f1ef\U0001f1f5",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # Scotland
    "\U0001f44d\U0001f3fd",
    "\U0001f469\U0001f3ff\u200d\U0001f680",
    "1\ufe0f\u20e3",
    "e\u0301",
    "a\u0308\u0323\u0301",
    "\u1112\u1161\u11ab",  # Hangul, in parts
    "\u0915\u0941",
    "\U0001f600",
]
INFOS = ["", "py", "c++", "diff", " sh"]
MARKS = ["```", "````", "~~~", "~~~~"]

spaced = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)
crowd = st.lists(st.sampled_from(CLUSTERS), min_size=1, max_size=40).map("".join)
many = st.tuples(st.sampled_from(CLUSTERS), st.integers(1, 120)).map(lambda p: p[0] * p[1])
solid = st.text(
    st.sampled_from("ab\u4f60\u3042\ud55c\u0627\u0905\U00020000\u00e9."), min_size=1, max_size=150
)
line = st.one_of(spaced, spaced, crowd, many, solid, st.just(""))
paragraph = st.lists(line, max_size=5).map("\n".join)


@st.composite
def block(draw: st.DrawFn) -> str:
    """A code block, closed; lines in it may look like the ends of others."""
    mark, info = draw(st.sampled_from(MARKS)), draw(st.sampled_from(INFOS))
    lines = draw(st.lists(line, max_size=12))
    other = {"`": "~~~", "~": "```"}[mark[0]]
    for odd in (other, f"{other} x", mark[:-1] if len(mark) > 3 else "x", f"{mark} x"):
        if draw(st.integers(0, 5)) == 0:
            lines.insert(draw(st.integers(0, len(lines))), odd)
    indent = draw(st.sampled_from(["", "", " ", " " if info else "   "]))
    close = mark + mark[0] * draw(st.sampled_from([0, 0, 0, 1]))
    return "\n".join([f"{indent}{mark}{info}", *lines, close])


markdown = st.lists(st.one_of(paragraph, paragraph, block()), max_size=8).map("\n".join)
IGNORED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
limits = st.one_of(st.integers(40, 120), st.integers(40, 4000))


@since("s08")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SLOW,
    suppress_health_check=IGNORED,
)
@given(text=markdown, limit=limits)
@example(text="a" + CLUSTERS[2] * 1500, limit=4000)
@example(text="```\n" + "x" * 20 + " foo\n" + "y " * 60 + "\n```\n", limit=40)
@example(text="~~~\n" + "x " * 15 + "\n~~~~\nrest " * 3, limit=40)
def test_pieces_are_the_text(section, text: str, limit: int):
    """None is too long, all is there, no character is broken, and code stays code."""
    pieces = section.module.chunk_message(text, limit)
    if not text.strip():
        assert pieces == ["(an empty answer)"]
        return
    assert all(0 < units(piece) <= limit for piece in pieces)
    cuts = cuts_of(text, pieces)
    is_open = bool(around(blocks(text), len(text))[0])
    for number, piece in enumerate(pieces, 1):
        last = number == len(pieces)
        assert not around(blocks(piece), len(piece))[0] or (last and is_open), piece
    for cluster in CLUSTERS[:-1]:
        for match in re.finditer(re.escape(cluster), text):
            whole = len(re.search("[\U0001f1e6-\U0001f1ff]*$", text[: match.start()])[0]) % 2 == 0
            if whole:
                assert not [cut for cut in cuts if match.start() < cut < match.end()], cluster
    assert len(pieces) <= 2 + 6 * units(text) // limit + 4 * len(blocks(text))


@since("s08")
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not SLOW,
    suppress_health_check=IGNORED,
)
@given(
    text=st.text(
        st.sampled_from("ab `~\n\r\t\u0301\u200d\U0001f600\U0001f1e9\u4f60"), max_size=400
    ),
    limit=st.integers(40, 90),
)
def test_no_text_is_too_odd(section, text: str, limit: int):
    """Whatever it is: it ends, fits, and each visible character is there, in order."""
    pieces = section.module.chunk_message(text, limit)
    assert all(units(piece) <= limit for piece in pieces)
    shown = iter("".join(pieces))
    assert not text.strip() or all(char in shown for char in text if not char.isspace())


# --- the program as a person runs it ---


def say_command(screen: harness.Screen, line: str, answer: str | re.Pattern) -> re.Match:
    """Type a command and wait for what it says."""
    drawn(screen, PROMPT)
    screen.type(f"{line}\n")
    return screen.wait_for(answer)


@since("s08")
def test_who_has_blocked_the_bot(post: Post):
    """Is tried once, told of, kept over a kill, and tried once more when asked to."""
    write_jobs(post.workspace, idle("news"))
    sends = "sendMessage"
    with post.screen(OWNER="telegram:44") as screen:
        post.telegram.block(42)
        post.telegram.say("one")
        screen.wait_for("not sent to 42: Forbidden: bot was blocked by the user; see /failed")
        trigger(screen, "news")
        screen.wait_for("not sent to 44: Chat not found; see /failed")
        assert post.ask("fine", 43).text == "heard fine"
        assert len(post.called(sends)) == 3
        wait_until(lambda: not pending(post.workspace))
        screen.kill()
    with post.screen() as screen:
        say_command(screen, "/failed", re.compile(r"44, 'this is news' after 1 tries: Chat not"))
        assert lines_with(screen.text, "42, 'heard one' after 1 tries: Forbidden")
        assert len(post.called(sends)) == 3 and not post.told(42)
        post.telegram.block(42, blocked=False)
        say_command(screen, "/retry telegram", "1 texts are tried again")
        assert post.wait(1)[0].text == "heard one"
        post.telegram.know(44)
        say_command(screen, "/retry", "1 texts are tried again")
        assert post.wait(1, 44)[0].text == "this is news"
        say_command(screen, "/failed", "nothing has failed")
        say_command(screen, "/retry nosuch", "0 texts")
        say_command(screen, "/queue", "0 texts wait")
        assert len(post.called(sends)) == 5
        wait_until(lambda: not pending(post.workspace))
        say_command(
            screen, "/stats", "2 pieces sent, 0 tries put off, 0 texts given up, 2 put back"
        )


@since("s08")
def test_simulated_failures_and_a_flood(post: Post):
    with post.screen() as screen:
        say_command(screen, "/simulate-failure often", "the rate must be from 0 to 1, not often")
        say_command(screen, "/simulate-failure 1", "100% of the sends fail")
        post.telegram.say("one")
        screen.wait_for("simulated failure; trying again")
        wait_until(lambda: '"retry"' in journal(post.workspace).read_text())
        began = time.monotonic()
        say_command(screen, "/queue", re.compile(r"1 to telegram default 42.*1 tries.*in \d s"))
        say_command(screen, "/simulate-failure 0", "0% of the sends fail")
        post.telegram.flood(43, seconds=1)
        post.telegram.say("flooded", 43)
        assert post.wait(1, 43)[0].text == "heard flooded"
        assert post.wait(1)[0].text == "heard one"
        wait_until(lambda: not pending(post.workspace))
        assert 3.5 < time.monotonic() - began < 8
        say_command(screen, "/stats", "2 texts taken, 2 pieces sent, 2 tries put off")


@pytest.mark.guard
@since("s08")
@pytest.mark.parametrize("up", [True, False], ids=["sent", "not sent"])
def test_a_crash_between_the_queue_and_the_inbox(post: Post, up: bool):
    """The inbox holds the question as open, the queue knows its id: the answer is sent once."""
    with post.screen() as screen:
        post.ask("before")
        post.confirmed()
        wait_until(lambda: inbox_is_empty(post.workspace) and not pending(post.workspace))
        if not up:
            post.telegram.hang("sendMessage", 3)
        post.telegram.say("one")
        screen.wait_for("to User 42: heard one")
        post.telegram.until(lambda: up is False or len(post.told(42)) == 2)
        post.confirmed()
        wait_until(lambda: inbox_is_empty(post.workspace))
        wait_until(lambda: len(pending(post.workspace)) == (not up))
        screen.kill()
    inbox = post.workspace / ".inbox.jsonl"
    *lines, last = inbox.read_text().splitlines(keepends=True)
    assert '"done"' in last
    inbox.write_text("".join(lines))
    with post.screen() as screen:
        post.telegram.say("after")
        post.wait(3)
        wait_until(lambda: inbox_is_empty(post.workspace) and not pending(post.workspace))
    assert post.told(42) == ["heard before", "heard one", "heard after"]
    assert post.questions == ["before", "one", "after"]


@since("s08")
def test_a_kill_between_two_pieces(post: Post):
    """What has arrived stays, and the next run goes on there; one piece comes twice at most."""
    pieces = [f"{number} {'x' * 3900}\n" for number in range(6)]
    post.model.script("long", [Text("".join(pieces))], repeat=True)
    post.telegram.hang("sendMessage", 0.3, times=100, after=True)
    with post.screen(MODEL_ID="long") as screen:
        post.telegram.say("tell me")
        post.wait(3)
        screen.kill()
    before = len(post.told(42))
    with post.screen(MODEL_ID="long"):
        post.telegram.until(lambda: post.told(42)[-1:] == pieces[-1:], 20)
        wait_until(lambda: not pending(post.workspace))
    told = post.told(42)
    assert before in (3, 4) and told[before - 1] == pieces[before - 1]
    once = [text for number, text in enumerate(told) if text not in told[:number]]
    assert once == pieces and len(told) <= 7
    assert told in (pieces, [*pieces[:before], *pieces[before - 1 :]])


@pytest.mark.guard
@since("s08")
def test_a_full_disk(post: Post):
    """One line says so, the terminal goes on, and with room again all has its answer."""
    texts = [f"{number} " + "y" * 3990 + "\n" for number in range(8)]
    fields = {"channel": "telegram", "peer": "42", "pieces": texts}
    file = journal(post.workspace)
    file.parent.mkdir()
    places = [{"id": account, "account": account} for account in ("late", "never")]
    write(file, *({"type": "enqueue", "delivery": fields | place} for place in places))
    with post.screen():
        pass
    room = file.stat().st_size + 900
    with harness.Screen(post.section, post.env(), fsize=room) as screen:
        screen.wait_for(PROMPT)
        said = []
        while not is_full(screen):
            said.append(f"question {len(said)}")
            post.telegram.say(said[-1])
            wait_until(lambda: f"heard {said[-1]}" in file.read_text() or is_full(screen))
            assert len(said) < 30
        assert len(said) > 1
        (line,) = [text for text in screen.paper.splitlines() if "not answered" in text]
        assert "full" in line or "large" in line
        wait_until(lambda: len(post.told(42)) >= len(said) - 1)
        drawn(screen, PROMPT)
        screen.type("still there?\n")
        screen.wait_for("heard still there?")
        screen.kill()
        post.check(screen.raw)
    with FakeTelegram("654321:other-token", "late_bot") as late, ExitStack() as until:
        late.know(42)
        until.enter_context(post.screen(**test_channels.bot(late, "_LATE")))
        post.telegram.until(lambda: post.told(42)[-1] == f"heard {said[-1]}", 20)
        late.wait_sent(len(texts), 20)
        wait_until(lambda: list(pending(post.workspace)) == ["telegram never 42"])
        assert [sent.text for sent in late.sent] == texts and not late.problems
    told = post.told(42)
    answers = [f"heard {text}" for text in said]
    assert [t for n, t in enumerate(told) if t not in told[:n]] == answers
    assert len(told) <= len(said) + 1


def is_full(screen: harness.Screen) -> bool:
    return "not answered" in screen.text


@since("s08")
def test_halves_of_characters_are_mended(post: Post):
    """No server takes them, and no journal: a reminder that has them arrives all the same."""
    write_jobs(post.workspace, idle("news") | {"payload": halves("one \ud83d two")})
    with post.screen(OWNER="telegram:42") as screen:
        post.telegram.know(42)
        trigger(screen, "news")
        assert post.wait(1)[0].text == "one \ufffd two"
        wait_until(lambda: not pending(post.workspace))


def halves(text: str) -> dict:
    return {"kind": "system_event", "text": text}


@since("s08")
def test_a_folder_that_cannot_be_used(section, fake_model: FakeModel, workspace: Path):
    """The program says so in a line, and does not begin to take what it could not keep."""
    folder = workspace / "delivery-queue"
    cases: list[Callable[[], object]] = [folder.touch, (folder / "queue.jsonl").mkdir]
    if os.geteuid():
        cases.append(lambda: folder.chmod(0o500))
    for number, spoil in enumerate(cases):
        if number:
            folder.mkdir()
        spoil()
        done = harness.pipe(section, "quit\n", fake_model.env())
        assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
        (told,) = done.stderr.splitlines()
        assert "the workspace cannot be used" in told and "delivery-queue" in told
        folder.chmod(0o700)
        folder.unlink() if number == 0 else [each.rmdir() for each in folder.iterdir()]
        if number:
            folder.rmdir()


# --- kill -9 ---


class Network:
    """Two bots and Feishu, slow to answer, and everybody who writes to them."""

    def __init__(self, post: Post, second: FakeTelegram, feishu: FakeFeishu):
        self.post, self.first, self.second, self.feishu = post, post.telegram, second, feishu
        self.count, self.turns, self.said = 0, 0, 0
        self.enqueued: dict[str, dict] = {}  # every text that was in the journal, in order
        self.hook, self.unheard = "", []
        post.model.script("brain", [self.brain], repeat=True)

    def brain(self, body: dict) -> Text:
        """Each answer is another one, and some are long."""
        asked = test_proactive.question(body)
        self.turns += 1
        about = asked[-20:] if asked.startswith("say ") else "unasked"
        text = f"<{self.turns}> {about}"
        lines = [f"{text} {number}\n" for number in range(500 if self.turns % 5 == 0 else 0)]
        whole = "".join([f"{text}\n" if lines else text, *lines])
        return Text(whole, pieces=[whole])

    def env(self) -> dict[str, str]:
        env = Desk.settings(self, self.feishu, ALLOWED_CHATS="ou_alice ou_bobby")
        bot = test_channels.bot(self.second, "_WORK", ALLOWED_CHATS="42, 43")
        return self.post.env(
            **env, **bot, OWNER="telegram:43", TIMEZONE="UTC", HEARTBEAT_SECONDS="1"
        )

    def slow(self, seconds: float, dice: random.Random) -> None:
        """From now on, answers are late: of some, the request is carried out before."""
        for bot in (self.first, self.second):
            with bot._changed:
                bot._faults.clear()
            for _ in range(40 if seconds else 0):
                late = dice.uniform(0, 2 * seconds)
                bot.hang("sendMessage", late, after=dice.random() < 0.5)
        self.feishu._faults.clear()
        for _ in range(40 if seconds else 0):
            self.feishu.hang(dice.uniform(0, 2 * seconds), part=SEND_PATH)

    def speak(self) -> None:
        """Everybody says something, at Feishu what it did not take, too."""
        self.said += 1
        for bot in (self.first, self.second):
            for chat in (42, 43):
                bot.say(f"say {self.said} to {chat}", chat)
        for person in ("ou_alice", "ou_bobby"):
            self.unheard.append(self.feishu.event(f"say {self.said}", open_id=person))

    def push(self) -> None:
        while self.unheard and self.hook:
            if self.feishu.push(self.hook, self.unheard[0]).status != 200:
                return
            del self.unheard[0]

    def look(self) -> Counter:
        """Note what is in the journal, and at which point of its way each next piece is."""
        waiting, points = pending(self.post.workspace), Counter()
        for line in journal(self.post.workspace).read_bytes().split(b"\n")[:-1]:
            note = json.loads(line)
            if note["type"] == "enqueue":
                self.enqueued.setdefault(note["delivery"]["id"], note["delivery"])
        for place, pieces in waiting.items():
            calls, arrived = self.reached(place)
            point = "arrived" if pieces[0] in arrived else "called" if pieces[0] in calls else "not"
            points[point] += 1
            points["behind"] += len(pieces) - 1
        return points

    def reached(self, place: str) -> tuple[list[str], list[str]]:
        """What was sent to somebody, and what of it has arrived."""
        name, account, peer = place.split()
        if name == "feishu":
            calls = [call.body for call in self.feishu.calls if call.path == SEND_PATH]
            texts = [json.loads(c["content"])["text"] for c in calls if c["receive_id"] == peer]
            return texts, [sent.text for sent in self.feishu.sent if sent.receive_id == peer]
        bot = self.first if account == "default" else self.second
        calls = [params for method, params in bot.calls if method == "sendMessage"]
        texts = [params["text"] for params in calls if str(params["chat_id"]) == peer]
        return texts, [sent.text for sent in bot.sent_to(int(peer))]


@since("s08")
@pytest.mark.timeout(1200 if SLOW else 120)
def test_kill_at_any_moment(section, post: Post, tmp_path: Path):
    """Replies, beats and jobs: nothing that was queued is lost, order holds, and at each kill one
    piece at most comes twice, as no answer here is so late that others go beside it.
    """
    kills, dice = kills_for(section), random.Random(8)
    hasty = test_proactive.hasty(section, tmp_path)
    payload = {"kind": "agent_turn", "message": "a job"}
    write_jobs(post.workspace, idle("job") | job_every_second(payload))
    (post.workspace / "HEARTBEAT.md").write_text("- look\n")
    file = journal(post.workspace)
    points, largest, began = Counter(), 0, time.monotonic()
    with (
        FakeTelegram("654321:other-token", "work_bot") as second,
        FakeFeishu() as feishu,
    ):
        net = Network(post, second, feishu)
        feishu.users.add("ou_bobby")
        for bot in (net.first, net.second):
            bot.poll_cap = 0.5
            for chat in (42, 43):
                bot.know(chat)
        for number in range(kills + 1):
            last = number == kills
            net.slow(0 if last else 0.25, dice)
            net.hook = ""
            if number % 2 == 0:
                net.speak()
            with harness.Screen(hasty, net.env()) as screen:
                if not last and number % 7 == 3:  # while it starts
                    time.sleep(dice.uniform(0, 0.5))
                else:
                    net.hook = screen.wait_for(test_feishu.ON)[1]
                    net.push()
                    before, until = len(net.enqueued), time.monotonic() + (not last)
                    while time.monotonic() < until and len(net.enqueued) == before:
                        time.sleep(0.02)
                        net.look()
                    time.sleep(0 if last else dice.uniform(0, 0.7))
                if last:
                    wait_until(lambda: not net.unheard and not pending(post.workspace), 60)
                    wait_until(lambda: inbox_is_empty(post.workspace), 60)
                    write_jobs(post.workspace)
                    (post.workspace / "HEARTBEAT.md").unlink()
                    time.sleep(0.5)
                    wait_until(lambda: not +net.look() and inbox_is_empty(post.workspace), 60)
                screen.kill()
                assert not re.search("Traceback|Exception", screen.raw), screen.text
            if file.exists():
                points += net.look()
                largest = max(largest, file.stat().st_size)
        twice = check_arrivals(net, kills)
        assert not second.problems and not feishu.problems
    unasked = sum("unasked" in text["pieces"][0] for text in net.enqueued.values())
    figures = {
        "kills": kills,
        "texts": len(net.enqueued),
        "unasked": unasked,
        "pieces": sum(len(text["pieces"]) for text in net.enqueued.values()),
        "twice": twice,
        "at a kill": dict(points),
        "largest": largest,
        "seconds": round(time.monotonic() - began),
    }
    print(figures)
    assert unasked and len(net.enqueued) >= 3 * kills, figures
    if section.label == "s08":
        assert points["called"] and points["arrived"] and (points["not"] or not SLOW), figures
    assert twice <= kills, figures
    assert largest < 300_000 + 5_000 * points["behind"] / kills, figures  # of what still waits
    assert [each.name for each in file.parent.iterdir()] == ["queue.jsonl"]


def job_every_second(payload: dict) -> dict:
    schedule = {"kind": "every", "every_seconds": 1}
    return {"schedule": schedule, "payload": payload, "enabled": True}


def check_arrivals(net: Network, kills: int) -> int:
    """That everybody got what was queued for them, in order. How many pieces came twice."""
    people: dict[str, list[str]] = {}
    for text in net.enqueued.values():
        place = f"{text['channel']} {text['account']} {text['peer']}"
        people.setdefault(place, []).extend(text["pieces"])
    assert len(people) == 6
    total = 0
    for place, pieces in people.items():
        assert len(set(pieces)) == len(pieces)
        arrived = net.reached(place)[1]
        once = [text for n, text in enumerate(arrived) if not n or text != arrived[n - 1]]
        assert once == pieces, place
        twice = len(arrived) - len(once)
        assert not twice or place.startswith("telegram"), place
        total += twice
    asked = [text for pieces in people.values() for text in pieces]
    for number in range(1, net.said + 1):
        for ending, count in ((f"say {number}", 2), (f"say {number} to 42", 2)):
            found = [t for t in asked if t.splitlines()[0].endswith(f" {ending}")]
            assert len(found) >= count, ending
    return total
