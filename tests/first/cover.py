"""Runs the suite under coverage, in the processes it starts, too, and lists what it leaves out.

python tests/first/cover.py              the whole suite; it takes about three times as long
python tests/first/cover.py -k lanes     what pytest takes

It counts the lines of the last section and of the offline model, which are to be run to 95 %. A
line of the last section is listed as run before if a test ran it where it stands first: on later
sections most tests run in samples. The rest has its reason in LEFT_OUT, by function. A process that
a test kills counts for nothing. Some tests fail here, as they let no file grow, coverage's neither,
or look at all that is in an environment: the exit status tells of the lines alone.
"""

import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import REPO
from harness import sections

GOAL = 95  # percent
SETTINGS = """
[run]
patch = subprocess, fork, _exit
parallel = true
sigterm = true
data_file = {folder}/data
include =
    */sessions/en/s*.py
    */sessions/offline_model.py
[report]
ignore_errors = true
[paths]
copies =
    {repo}/sessions
    */copy/sessions
"""
FULL = "a full disk"  # on which coverage cannot write either
LEFT_OUT = {
    "Channel.start": "abstract",
    "Channel.send": "abstract",
    "kill": "Windows",
    "lock_workspace": "Windows",
    "typed_line": "no readline",
    "local_zone": "no local zone",
    "App.recall": FULL,
    "App.think_aloud": FULL,
    "CronService.run": FULL,
    "DeliveryQueue.change": FULL,
    "DeliveryRunner.work": FULL,
    "HeartbeatRunner.run": FULL,
    "MemoryStore.search": FULL,
    "MemoryStore.sync": FULL,
    "force_agent": FULL,
    "FeishuChannel.call": "a rate limit",
    "GatewayServer.rpc_send": "100 that wait",
    "Inbox.put": "1,000 records",
    "MemoryStore.fill": "an odd server",
    "MemoryStore.forget_others": "another model",
    "TelegramChannel.take": "a broken update",
}
NO_REASON = "not provoked"


def main() -> int:
    """Run, count and list. Returns 1 if the suite covers less than the goal."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = folder / "settings"
        settings.write_text(SETTINGS.format(folder=folder, repo=REPO), encoding="utf-8")
        tool = [sys.executable, "-m", "coverage"]
        run = [*tool, "run", f"--rcfile={settings}"]
        suite = ["-m", "pytest", "-q", "tests/first", *sys.argv[1:]]
        subprocess.run([*run, *suite], cwd=REPO)
        # Where no file might grow there is no data; combine tells of it and goes on.
        combine = [*tool, "combine", "-q", f"--rcfile={settings}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(combine, cwd=REPO, **quiet)
        output = folder / "found.json"
        subprocess.run(
            [*tool, "json", "-q", f"--rcfile={settings}", "-o", str(output)],
            cwd=REPO,
            check=True,
            **quiet,
        )
        found = json.loads(output.read_text(encoding="utf-8"))["files"]
    return int(report(found))


def report(found: dict[str, dict]) -> bool:
    """Show what was left out, and why. Returns whether that is too much."""
    files = {Path(path).name: data for path, data in found.items()}
    *earlier, last = sections()
    before = set()
    for section in earlier:
        run = files.get(section.path.name, {}).get("executed_lines", [])
        places = dict(functions(section.path))
        before |= {places[line] for line in run if line in places}
    short = False
    for path in (last.path, REPO / "sessions" / "offline_model.py"):
        if not (data := files.get(path.name)):
            print(f"\n{path.name}: no test has run it")
            short = True
            continue
        percent = data["summary"]["percent_covered"]
        short |= percent < GOAL
        print(f"\n{path.name}: {percent:.1f} % of {data['summary']['num_statements']} statements")
        places = dict(functions(path))
        for line in data["missing_lines"]:
            name, text = places.get(line, ("", ""))
            reason = LEFT_OUT.get(name, NO_REASON)
            reason = "run before" if (name, text) in before else reason
            print(f"{line:>5}  {name:<32.32} {reason:<18} {text:.60}")
    return short


def functions(path: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """For each line of a function its qualified name, and what it says."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()

    def walk(node: ast.AST, outer: str) -> Iterator[tuple[int, tuple[str, str]]]:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}".lstrip(".")
                for line in range(child.lineno, child.end_lineno + 1):
                    yield line, (name, lines[line - 1].strip())
            yield from walk(child, name)

    yield from walk(ast.parse(source), "")


if __name__ == "__main__":
    sys.exit(main())
