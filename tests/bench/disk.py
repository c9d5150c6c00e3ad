"""What reaches the disk: `append`, `replay` and `delivery`."""

import json
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
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

MESSAGE = {
    "role": "user",
    "content": "A line of ordinary length, such as people write. " * 4,
}
SYNC = getattr(os, "fdatasync", os.fsync)


def append(folder: Path) -> None:
    """A message on disk, against a bare write and sync of the same bytes."""
    section = ladder("s03")[-1]
    session = open_log(section.module, folder / "s.jsonl")
    session.append(MESSAGE)
    line = (folder / "s.jsonl").read_bytes().splitlines(keepends=True)[-1]
    with closing(open_database(folder)) as database:
        insert = partial(put, database, line)
        steps = {
            "write and fsync": raw_writer(folder, line, sync=os.fsync),
            "write and fdatasync": raw_writer(folder, line),
            section.label: lambda: session.append(MESSAGE),
            "sqlite3, WAL, FULL": insert,
        }
        if "Journal" in vars(section.module):  # sessions/en syncs so
            del steps["write and fsync"]
        times = medians(40, {name: timed(step, 20) for name, step in steps.items()})
    rates("append", times, {section.label: 0.8})


def open_log(module: ModuleType, path: Path) -> object:
    """The session of a log, which may be new."""
    if "Journal" in vars(module):  # sessions/en
        return module.Session(module.Journal(path))
    path.touch()
    return module.Session(path)


def raw_writer(
    folder: Path,
    line: bytes,
    rest: bytes = b"",
    sync: Callable = SYNC,
) -> Callable[[], None]:
    """A function that syncs a line; the next sync takes a rest along."""
    file = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write() -> None:
        os.write(file, line)
        sync(file)
        if rest:
            os.write(file, rest)

    return write


def open_database(folder: Path) -> sqlite3.Connection:
    """A table of lines; each transaction is synced, as ours is."""
    database = sqlite3.connect(folder / "peer.sqlite", isolation_level=None)
    database.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE lines (id INTEGER PRIMARY KEY, line TEXT)"
    )
    return database


def put(database: sqlite3.Connection, line: bytes) -> int:
    """One row, one transaction. Returns its id."""
    return database.execute(
        "INSERT INTO lines (line) VALUES (?)", [line.decode()]
    ).lastrowid


def rates(what: str, times: dict[str, float], goals: dict[str, float]) -> None:
    """Rows of so many a second, against the first of them."""
    first = next(iter(times.values()))
    for name, seconds in times.items():
        ratio = first / seconds
        goal = at_least(goals[name], ratio) if name in goals else ""
        row(what, name, f"{1 / seconds:,.0f}/s", ratio, goal)


def replay(folder: Path) -> None:
    """10,000 messages read back, against json.loads of the same lines, and sqlite3."""
    section = ladder("s03")[-1]
    message = {"type": "message", "used": 0}
    roles = ("user", "assistant") * 5000
    lines = [
        json.dumps(message | {"message": MESSAGE | {"role": role}}) for role in roles
    ]
    (folder / "r.jsonl").write_text(
        "".join(f"{line}\n" for line in lines), encoding="utf-8"
    )
    module = section.module
    with closing(open_database(folder)) as database:
        database.execute("BEGIN")
        database.executemany(
            "INSERT INTO lines (line) VALUES (?)", zip(lines, strict=True)
        )
        database.execute("COMMIT")
        select = "SELECT line FROM lines ORDER BY id"
        steps = {
            "json.loads": lambda: [json.loads(line) for line in lines],
            section.label: lambda: open_log(module, folder / "r.jsonl"),
            "sqlite3, json.loads": lambda: [
                json.loads(r[0]) for r in database.execute(select)
            ],
        }
        times = medians(7, {name: timed(step) for name, step in steps.items()})
    for name, seconds in times.items():
        goal = at_most(0.5, seconds, " s") if name == section.label else ""
        row("replay", name, f"{seconds:.3f} s", seconds / times["json.loads"], goal)


class Outbox:
    """The queue of s08 on, with a channel that accepts at once, and an idle one."""

    def __init__(self, module: ModuleType, folder: Path, waiting: int) -> None:
        self.module, self.numbers, path = module, count(), folder / "queue.jsonl"
        folder.mkdir()
        self.queue = module.DeliveryQueue(path)
        self.enqueue("nobody")
        line = path.read_text(encoding="utf-8").splitlines()[-1]
        with path.open("a", encoding="utf-8") as file:
            for number in range(1, waiting):
                file.write(f"{line}\n".replace('"id": "0"', f'"id": "w{number}"'))
        self.queue = module.DeliveryQueue(path)
        account = module.ChannelAccount("telegram")
        always = {"send": lambda *text: None, "allows": lambda message: True}
        channel = SimpleNamespace(account=account, is_keyed=False, **always)
        runner = module.DeliveryRunner(channel, self.queue)
        threading.Thread(target=runner.run, daemon=True).start()

    def enqueue(self, account: str = "nobody") -> None:
        """Take a text: those of the account `nobody` stay."""
        number, pieces = str(next(self.numbers)), ["hello there, this is an answer"]
        self.queue.enqueue(
            self.module.QueuedDelivery(number, "telegram", account, "42", pieces)
        )

    def deliver(self, texts: int = 20) -> None:
        """Send texts one after the other, and wait until all have arrived."""
        done = self.queue.counts["ack"] + texts
        for _ in range(texts):
            self.enqueue("default")
        with self.queue.lock:
            self.queue.settled.wait_for(lambda: self.queue.counts["ack"] >= done)


def delivery(folder: Path) -> None:
    """Texts queued and acknowledged, against a bare write and fdatasync of the same.

    One sync for each text is what ours needs: the acknowledgement rides on the next
    one. sqlite3 commits twice (a row put, a row deleted), persist-queue three times
    (put, get, ack).
    """
    section = ladder("s08")[-1]
    few = Outbox(section.module, folder / "few", 1)
    many = Outbox(section.module, folder / "many", 10_000)
    line = (folder / "few" / "queue.jsonl").read_bytes().splitlines(keepends=True)[-1]
    raw = raw_writer(folder, line)
    raw_twice = raw_writer(folder, line, b'{"type": "ack", "id": "12345"}\n')
    full = f"{section.label}, 10,000 wait"
    with (
        closing(open_database(folder)) as database,
        Peer("persist-queue", folder / "persist") as persist,
    ):

        def pass_through() -> None:
            database.execute("DELETE FROM lines WHERE id = ?", [put(database, line)])

        enqueued = {
            "write and fdatasync": timed(raw, 20),
            section.label: timed(few.enqueue, 20),
            full: timed(many.enqueue, 20),
            "sqlite3, WAL, FULL": timed(partial(put, database, line), 20),
        }
        delivered = {
            "write and fdatasync": timed(raw_twice, 20),
            section.label: lambda: timed(few.deliver)() / 20,
            full: lambda: timed(many.deliver)() / 20,
            "sqlite3, WAL, FULL": timed(pass_through, 20),
        }
        if persist.steps:
            enqueued["persist-queue"] = persist.timed("enqueue", 20)
            delivered["persist-queue"] = persist.timed("deliver", 10)
        rates("enqueue", medians(40, enqueued), {section.label: 0.8, full: 0.8})
        rates("acknowledged", medians(30, delivered), {section.label: 0.7, full: 0.7})
        if not persist.steps:
            row("delivery", "persist-queue", goal=NOT_INSTALLED)
