"""Checks of the exercises of s08."""

from pathlib import Path

from harness import Section

from first.test_delivery import HOUR
from first.test_delivery import Bench


def test_s08_drop(script: Section, tmp_path: Path):
    """Add: `/drop <id>` gives up a text, waiting or failed: never sent, and never taken again."""
    bench = Bench(script, tmp_path)
    assert "/drop" in script.module.COMMANDS, "expected a command /drop; got none"
    bench.here.rules["42"] = lambda text: bench.error() if text == "stuck" else None
    bench.here.rules["43"] = lambda text: bench.error(permanent=True) if text == "dead" else None
    for name, peer in (("stuck", "42"), ("next", "42"), ("dead", "43")):
        bench.put(name, peer)
    bench.until(10)
    bench.command("/drop stuck")
    bench.until(20)
    assert bench.here.got("42") == ["next"], f"expected the next to go; got {bench.here.got('42')}"
    bench.command("/drop dead")
    for when in ("now", "after a restart", "after the next one"):
        told = bench.command("/failed") + bench.command("/queue")
        assert not {"dead", "stuck"} & set(told.replace("'", " ").split()), (
            f"expected neither text to be kept {when}; got {told!r}"
        )
        bench.here.rules.clear()
        bench.put("stuck", "42")
        bench.put("dead", "43")
        bench.until(HOUR)
        sent = bench.here.got("42") + bench.here.got("43")
        assert sent == ["next"], f"expected neither id to be taken again {when}; got {sent}"
        bench.start()


def test_s08_forever(script: Section, tmp_path: Path):
    """Find: Bob blocked the bot, Eve's server is gone: each is tried every 5 seconds, for days."""
    bench = Bench(script, tmp_path)
    bench.here.rules["bob"] = lambda text: bench.error("blocked", permanent=True)
    bench.here.rules["eve"] = lambda text: bench.error("no answer") if text == "one" else None
    floods = iter([3, 4, 5, 6, 7, 8])
    bench.here.rules["cem"] = lambda text: next(
        (bench.error("flood", retry_after=seconds) for seconds in floods), None
    )
    bench.put("hello", "bob")
    bench.put("one", "eve")
    bench.put("two", "eve")
    bench.put("three", "cem")
    bench.until(HOUR)
    tries = len(bench.here.times("bob"))
    assert tries == 1, f"expected 1 try of what Bob can never get; got {tries} in an hour"
    tries = len(bench.here.times("eve"))
    assert tries == 6, f"expected 5 tries for Eve's first text, 1 for the second; got {tries}"
    failed = sorted(bench.queue.failed)
    assert failed == ["hello", "one"], f"expected what failed to be kept as failed; got {failed}"
    got = bench.here.got("cem")
    assert got == ["three"], f"expected that to be told to wait is no failed try; got {got}"


def test_s08_order(script: Section, tmp_path: Path):
    """Find: after a short outage, Ada reads the second of your two texts before the first."""
    bench = Bench(script, tmp_path)
    outage = iter([bench.error()])
    bench.here.rules["ada"] = lambda text: next(outage, None)
    for text in ("one", "two", "three"):
        bench.put(text, "ada")
    bench.put("four", "bob")
    bench.until(HOUR)
    got = bench.here.got("ada")
    assert got == ["one", "two", "three"], f"expected one, two, three; got {', '.join(got)}"
    times = bench.here.times("bob")
    assert times == [0], f"expected Bob not to wait for Ada's outage; got a try after {times} s"
