"""What must not grow with what is stored: `memory`, `routing`, `cron` and `lanes`."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

from measure import NOT_INSTALLED
from measure import Peer
from measure import at_least
from measure import at_most
from measure import ladder
from measure import medians
from measure import row
from measure import timed

LETTERS = "abcdefghijklmnoprstuvw"
SIZES = {
    100: 7,
    1000: 7,
    10_000: 5,
    100_000: 1,
}  # with the rounds that there is time for
TASKS = {"empty": (int, 5000), "1 ms": (partial(time.sleep, 0.001), 300)}


def memory(folder: Path) -> None:
    """A search among notes, and a note more, against bm25s, which makes a new index."""
    section, dice = ladder("s06")[-1], random.Random(1)
    words = ["".join(dice.choices(LETTERS, k=dice.randint(3, 9))) for _ in range(4000)]
    for size, rounds in SIZES.items():
        home = folder / str(size)
        notes = [" ".join(dice.choices(words, k=18)) for _ in range(size)]
        write_notes(home, words, notes)
        store = section.module.MemoryStore(home, home, "", None)
        store.search(words[0])
        while store.missing:  # a search spends five seconds at most on an index
            store.search(words[0])
        ours = {
            "search": lambda store=store: store.search(
                " ".join(dice.choices(words, k=4))
            ),
            "write": lambda store=store: store.write(
                " ".join(dice.choices(words, k=18))
            ),
        }
        with Peer("bm25s", home) as bm25s:
            for step, unit in {"search": 25, "write": 5}.items():
                measured = {section.label: timed(ours[step], 3)}
                if bm25s.steps:
                    measured["bm25s"] = bm25s.timed(step, 3 if step == "search" else 1)
                times = medians(rounds, measured)
                for name, seconds in times.items():
                    is_goal = name == section.label and size == 10_000
                    goal = at_most(unit, seconds * 1000, " ms") if is_goal else ""
                    ratio = seconds / times[section.label]
                    row(
                        f"{step}, {size:,} notes",
                        name,
                        f"{seconds * 1000:.2f} ms",
                        ratio,
                        goal,
                    )
    if not bm25s.steps:
        row("memory", "bm25s", goal=NOT_INSTALLED)


def write_notes(home: Path, words: list[str], notes: list[str]) -> None:
    """The notes as ours keeps them, in a file a day, and as a peer reads them."""
    (home / "memory").mkdir(parents=True)
    for day in range(10):
        lines = "".join(f"- {note}\n" for note in notes[day::10])
        (home / "memory" / f"2026-10-{day + 1:02}.md").write_text(
            lines, encoding="utf-8"
        )
    (home / "words.json").write_text(json.dumps(words), encoding="utf-8")
    (home / "notes.txt").write_text("\n".join(notes), encoding="utf-8")


def routing(folder: Path) -> None:
    """The agent for a message found among 100,000 bindings, against 10."""
    section = ladder("s05")[-1]
    look_ups = {}
    for size in (10, 100_000):
        entries = [
            {"agent": "luna", "channel": "web", "peer": f"p{n}"} for n in range(size)
        ]
        resolve = resolver(section.module, folder, entries)
        look_ups[f"{size:,} bindings"] = timed(resolve, 1000)
    few_and_many("route", section.label, medians(20, look_ups))


def resolver(module: ModuleType, folder: Path, entries: list[dict]) -> Callable:
    """Two look-ups in a table of these bindings, as a section writes and asks it."""
    in_lines = folder / f"{len(entries)}.jsonl"
    in_lines.write_text("\n".join(map(json.dumps, entries)) + "\n", encoding="utf-8")
    as_a_list = folder / f"{len(entries)}.json"
    as_a_list.write_text(json.dumps(entries), encoding="utf-8")
    if not hasattr(module, "tier_keys"):  # the first ladder
        table = module.BindingTable(in_lines, ["luna"])
        return lambda: [
            table.resolve("web", "default", "p7", ""),
            table.resolve("web", "default", "nobody:topic:7", ""),
        ]
    table = module.BindingTable(as_a_list, ["luna"])
    known = module.InboundMessage("web", "default", "p7", "")
    unknown = module.InboundMessage("web", "default", "nobody:topic:7", "")
    return lambda: [table.resolve(known), table.resolve(unknown)]


def few_and_many(what: str, who: str, times: dict[str, float]) -> None:
    """Rows of the same step where there is little and where there is much."""
    few, many = times.values()
    for size, seconds in times.items():
        goal = at_most(1.2, many / few) if seconds is many else ""
        row(f"{what}, {size}", who, f"{seconds * 1e6:.1f} us", seconds / few, goal)


def cron(folder: Path) -> None:
    """A tick of the scheduler with 10,000 jobs of which none is due, against 10."""
    section, ticks = ladder("s07")[-1], {}
    module = section.module
    for size in (10, 10_000):
        home = folder / f"cron{size}"
        home.mkdir()
        payload = {"kind": "system_event", "text": "x"}
        schedule = {"kind": "every", "every_seconds": 10**6}
        jobs = [
            {"id": f"j{n}", "schedule": schedule, "payload": payload}
            for n in range(size)
        ]
        (home / "CRON.json").write_text(json.dumps({"jobs": jobs}), encoding="utf-8")
        app = SimpleNamespace(
            agent=SimpleNamespace(workspace=home),
            agents=SimpleNamespace(agents=["main"]),
            report=lambda about, *problems: None,
        )
        log = module.RunLog(home / "cron-runs.jsonl")
        service = module.CronService(app, module.Clock(), log)
        service.tick()
        ticks[f"{size:,} jobs"] = timed(service.tick, 200)
    few_and_many("cron tick", section.label, medians(20, ticks))


def lanes(folder: Path) -> None:
    """Tasks put in and results taken out, against ThreadPoolExecutor."""
    section = ladder("s10")[-1]
    commands = section.module.CommandQueue()
    for lane, threads in {"cron": 1, "main": 4}.items():
        with ThreadPoolExecutor(threads) as executor:
            submit = {
                "ThreadPoolExecutor": executor.submit,
                section.label: partial(commands.enqueue, [lane]),
            }
            for kind, (task, tasks) in TASKS.items():
                ways = {who: finishing(way, task, tasks) for who, way in submit.items()}
                times = medians(15, ways)
                for who, seconds in times.items():
                    ratio = times["ThreadPoolExecutor"] / seconds
                    goal = at_least(1, ratio) if who == section.label else ""
                    what = f"{kind}, {threads} at once"
                    row(what, who, f"{1 / seconds:,.0f}/s", ratio, goal)


def finishing(submit: Callable, task: Callable, tasks: int) -> Callable[[], float]:
    """A function that hands in so many tasks, waits, and gives the seconds for each."""
    run = timed(lambda: wait([submit(task) for _ in range(tasks)]))
    return lambda: run() / tasks
