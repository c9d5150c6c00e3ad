"""What a call of the model costs: `call` and `turn`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import contextmanager
from pathlib import Path

from harness import sections
from measure import HERE
from measure import NOT_INSTALLED
from measure import Peer
from measure import at_most
from measure import environment
from measure import medians
from measure import row

FRAMEWORKS = ("openai-agents", "pydantic-ai", "smolagents", "langgraph")
CASES = ("plain", "one tool", "ten tools", "streamed", "a tool call")


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
    """Some sections, each in a process and a workspace of its own."""
    peers = []
    for section in sections():
        if section.label in labels:
            home = folder / section.label
            os.environ |= environment(url, home)
            peer = Peer("section", section.path.stem, home, python=sys.executable)
            peer.name = section.label
            peers.append(stack.enter_context(peer))
    return peers


def call(folder: Path) -> None:
    """One streamed call_model by length of history, against the bare SDK on the same
    messages.
    """
    with ExitStack() as stack:
        url = stack.enter_context(quick_model())
        bare = stack.enter_context(Peer("bare SDK", url, python=sys.executable))
        ours = start_sections(
            stack, ["s01", "s02", "s03", sections()[-1].label], url, folder
        )
        for length in ("1", "21", "201", "2001"):
            peers = {peer.name: peer.timed(length) for peer in (bare, *ours)}
            times = medians(25, peers)
            for name, seconds in times.items():
                ratio = seconds / times[bare.name]
                goal = "" if name == bare.name else at_most(1, ratio)
                row(f"{length} messages", name, f"{seconds * 1000:.2f} ms", ratio, goal)


def turn(folder: Path) -> None:
    """A whole turn, against the bare SDK in a loop; from s03 on ours has synced it to
    the disk.
    """
    with ExitStack() as stack:
        url = stack.enter_context(quick_model())
        bare = stack.enter_context(Peer("bare SDK", url, python=sys.executable))
        ours = start_sections(stack, ["s02", sections()[-1].label], url, folder)
        others = [stack.enter_context(Peer(name, url)) for name in FRAMEWORKS]
        peers = [bare, *ours, *(peer for peer in others if peer.steps)]
        for case in CASES:
            times = medians(25, {peer.name: peer.timed(case) for peer in peers})
            for name, seconds in times.items():
                ratio = seconds / times[bare.name]
                goal = at_most(1, ratio) if name == "s02" else ""
                row(case, name, f"{seconds * 1000:.2f} ms", ratio, goal)
        for peer in others:
            if not peer.steps:
                row("turn", peer.name, goal=NOT_INSTALLED)
