"""What the harness costs, as ratios of figures that were measured in turn in this one
run.

python tests/bench/bench.py                   every benchmark, a table each
python tests/bench/bench.py lanes delivery    some of them: prompt, idle, call, turn,
                                              append, replay, delivery, memory, routing,
                                              cron, lanes, gateway

A row tells the case, whose figure it is, the figure, its ratio to the table's first
contestant, and for ours the goal and whether it holds. The peers (frameworks, queues,
indexes) come along where tests/bench/requirements.txt is installed. They want other
versions than the sections do: give them a virtual environment of their own, and its
Python in PEERS_PYTHON.
"""

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
import scale  # noqa: E402
import start  # noqa: E402

BENCHMARKS = {
    "prompt": start.prompt,
    "idle": start.idle,
    "call": calls.call,
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
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
        return 2
    for name in names:
        print(f"\n{name}: {inspect.cleandoc(BENCHMARKS[name].__doc__)}")
        with tempfile.TemporaryDirectory(dir=TESTS.parent) as folder:
            BENCHMARKS[name](Path(folder))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
