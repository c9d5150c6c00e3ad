"""What a call of the model costs: `call`, `event` and `turn`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path

from measure import HERE
from measure import NOT_INSTALLED
from measure import Peer
from measure import at_most
from measure import environment
from measure import ladder
from measure import medians
from measure import row

FRAMEWORKS = ("openai-agents", "pydantic-ai", "smolagents", "langgraph")
GOALS = {  # the cases of a turn, and what ours may take of the bare SDK's time
    "plain": 1,
    "one tool": 1,
    "ten tools": 0.75,
    "streamed": 1,
    "a tool call": 1,
}


@contextmanager
def quick_model() -> Iterator[str]:
    """The address of a server that takes next to no time."""
    command = [sys.executable, str(HERE / "quick_model.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def start_sections(
    stack: ExitStack, labels: list[str], url: str, folder: Path
) -> list[Peer]:
    """Some sections and the last, each in a process and a workspace of its own."""
    peers = []
    last = ladder()[-1].label
    for section in ladder():
        if section.label in (*labels, last):
            home = folder / section.label
            os.environ |= environment(url, home)
            peer = Peer("section", section.path, home, python=sys.executable)
            peer.name = section.label
            peers.append(stack.enter_context(peer))
    return peers


def call(folder: Path) -> None:
    """One streamed call_model by length of history, against the bare SDK."""
    with ExitStack() as stack:
        url = stack.enter_context(quick_model())
        bare = stack.enter_context(Peer("bare SDK", url, python=sys.executable))
        ours = start_sections(stack, ["s01", "s02", "s03"], url, folder)
        for length, rounds in {"1": 100, "21": 100, "201": 50, "2001": 25}.items():
            peers = {peer.name: peer.timed(length) for peer in (bare, *ours)}
            times = medians(rounds, peers)
            for name, seconds in times.items():
                ratio = seconds / times[bare.name]
                goal = "" if name == bare.name else at_most(1, ratio)
                row(f"{length} messages", name, f"{seconds * 1000:.2f} ms", ratio, goal)


def event(folder: Path) -> None:
    """One event of a long stream, against the bare SDK: 2,000 of them less 13."""
    with ExitStack() as stack:
        url = stack.enter_context(quick_model())
        bare = stack.enter_context(Peer("bare SDK", url, python=sys.executable))
        ours = start_sections(stack, ["s01", "s02", "s03"], url, folder)
        measured = {}
        for peer in (bare, *ours):
            measured[peer.name] = peer.timed("2000 events")
            measured[f"{peer.name}, few"] = peer.timed("1")
        times = medians(15, measured)
        cost = {}
        for peer in (bare, *ours):
            cost[peer.name] = times[peer.name] - times[f"{peer.name}, few"]
        for name, seconds in cost.items():
            ratio = seconds / cost[bare.name]
            goal = "" if name == bare.name else at_most(0.5, ratio)
            row("one event", name, f"{seconds / 1987 * 1e6:.1f} us", ratio, goal)


def turn(folder: Path) -> None:
    """A whole turn, against the bare SDK in a loop; from s03 on with its syncs."""
    with ExitStack() as stack:
        url = stack.enter_context(quick_model())
        bare = stack.enter_context(Peer("bare SDK", url, python=sys.executable))
        ours = start_sections(stack, ["s02"], url, folder)
        others = [stack.enter_context(Peer(name, url)) for name in FRAMEWORKS]
        peers = [bare, *ours, *(peer for peer in others if peer.steps)]
        for case, limit in GOALS.items():
            times = medians(100, {peer.name: peer.timed(case) for peer in peers})
            for name, seconds in times.items():
                ratio = seconds / times[bare.name]
                goal = at_most(limit, ratio) if name == "s02" else ""
                row(case, name, f"{seconds * 1000:.2f} ms", ratio, goal)
        for peer in others:
            if not peer.steps:
                row("turn", peer.name, goal=NOT_INSTALLED)
