"""What the harness costs, as ratios of figures that were measured in turn in one run.

python tests/bench/bench.py                         every benchmark, a table each
python tests/bench/bench.py call event              some: prompt, idle, call, event,
                                                    turn, append, replay, delivery,
                                                    memory, routing, cron, lanes,
                                                    gateway
python tests/bench/bench.py --sections sessions/en  of these sections; without it, of
                                                    sessions/next as far as they go

A row tells the case, whose figure it is, the figure, its ratio to the table's first
contestant, and for ours the goal and whether it holds. The peers (frameworks, queues,
indexes) come along where tests/bench/requirements.txt is installed. They want other
versions than the sections do: give them a virtual environment of their own, and its
Python in PEERS_PYTHON.
"""

import argparse
import inspect
import signal
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

import calls  # noqa: E402
import disk  # noqa: E402
import gateway  # noqa: E402
import measure  # noqa: E402
import scale  # noqa: E402
import start  # noqa: E402

BENCHMARKS = {
    "prompt": start.prompt,
    "idle": start.idle,
    "call": calls.call,
    "event": calls.event,
    "turn": calls.turn,
    "append": disk.append,
    "replay": disk.replay,
    "delivery": disk.delivery,
    "memory": scale.memory,
    "routing": scale.routing,
    "cron": scale.cron,
    "lanes": scale.lanes,
    "gateway": gateway.gateway,
}


def main() -> int:
    """Run the benchmarks that the command line names, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", type=Path, metavar="FOLDER")
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
        return 2
    if given.sections:
        measure.FOLDERS[:] = [given.sections.resolve()]
    for name in given.names or list(BENCHMARKS):
        print(f"\n{name}: {inspect.cleandoc(BENCHMARKS[name].__doc__)}")
        # On the disk of the repository: /tmp may be memory.
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=TESTS.parent) as folder:
            BENCHMARKS[name](Path(folder))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
