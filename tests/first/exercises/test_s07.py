"""Checks of the exercises of s07."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from harness import Section

from first.test_proactive import HOUR
from first.test_proactive import OK
from first.test_proactive import Bench
from first.test_proactive import at
from first.test_proactive import turn

QUIET = [
    OK,
    f"{OK}.",
    f"**{OK}**",
    f"Nothing is due. `{OK}`",
    f"I went through the list: all quiet.\n\n**{OK}**\n",
    f"<p>{OK}</p>",
    f"{OK} - the plants were watered yesterday.",
]


class Killed(BaseException):
    """The program ends here."""


def bench_of(script: Section, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The heartbeat and the jobs of the copy on a clock of ours; we answer for the model."""
    for name in ("HEARTBEAT_SECONDS", "HEARTBEAT_HOURS", "TZ", "OWNER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TIMEZONE", "UTC")
    return Bench(script, folder)


def test_s07_beats(script: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Add: `/heartbeat` says, too, how many beats the last 24 hours had, as `2 beats in 24 h`."""
    bench = bench_of(script, tmp_path, monkeypatch)
    bench.checklist("- look\n")
    bench.beat.tick()
    told = bench.command("/heartbeat")
    assert "0 beats in 24 h" in told, f"expected 0 beats: nothing has run yet; got {told!r}"
    for hours in (1, 19, 10):
        bench.time += hours * HOUR
        bench.beat.tick()
    told = bench.command("/heartbeat")
    assert "2 beats in 24 h" in told, f"expected 2 beats, 30 hours after the first; got {told!r}"
    bench.start()
    told = bench.command("/heartbeat")
    assert "2 beats in 24 h" in told, f"expected 2 beats after a restart, too; got {told!r}"
    run = {"type": "end", "job": "tea", "at": bench.time, "error": "", "done": False}
    with open(tmp_path / "cron" / "cron-runs.jsonl", "a") as log:
        log.write(f"{json.dumps(run)}\n" * 3000)
    for _ in range(2):
        bench.start()
    told = bench.command("/heartbeat")
    assert "2 beats in 24 h" in told, f"expected 2 beats when the log was cut, too; got {told!r}"
    bench.time += 15 * HOUR
    told = bench.command("/heartbeat")
    assert "1 beats in 24 h" in told, f"expected 1 beats 15 hours later; got {told!r}"


def test_s07_spam(script: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Find: with a new model, the heartbeat tells you that all is well, over and over."""
    bench = bench_of(script, tmp_path, monkeypatch)
    bench.checklist("- look\n")
    bench.beat.tick()
    for answer in (*QUIET, "The plants need water."):
        bench.time += HOUR
        bench.answer = lambda name, answer=answer: answer
        bench.beat.tick()
        told = [text.removeprefix("heartbeat: ") for _, text in bench.told]
        wanted = [] if OK in answer else [answer]
        assert told == wanted, f"expected {wanted} to be told for {answer!r}; got {told}"
    assert len(bench.asked) == len(QUIET) + 1, f"expected a beat an hour; got {bench.asked}"


def test_s07_twice(script: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Find: the program was killed while a one-shot sent a mail; its next start sends it again."""
    bench = bench_of(script, tmp_path, monkeypatch)
    bench.jobs(turn("mail", at(bench.time + 60)))
    bench.cron.tick()

    def sends_and_is_killed(name: str) -> str:
        raise Killed

    bench.time, bench.answer = bench.time + 60, sends_and_is_killed
    with suppress(Killed):
        bench.cron.tick()
    assert len(bench.asked) == 1, f"expected the job to run at its time; got {bench.asked}"
    bench.start()
    bench.answer = lambda name: "sent"
    bench.until(bench.time + 24 * HOUR)
    assert len(bench.asked) == 1, f"expected one mail; got {len(bench.asked)}"
    told = " ".join([*bench.screen, *(text for _, text in bench.told)])
    assert "interrupted" in told, f"expected to be told of it; got {told!r}"
