"""Kills a running s08 at named points, starts it again, and balances the ledger.

    python tests/first/crash_lab.py --list
    python tests/first/crash_lab.py --point queued --point sent
    python tests/first/crash_lab.py --script sessions/en/s10_concurrency.py

Two people write to a bot of a local Telegram server. At the third question the
process dies of SIGKILL, in the middle of a step; what comes meanwhile waits at
the server. What runs until then is the real script with a line before its last
two, which arms a trap (trap.py). The next start is the script itself.

The ledger has a row for each point, and counts pieces of text:

    enqueued      what the queue took, by its journal
    received      what arrived at Telegram, each time it did
    twice         of these, what had arrived before: where the process cannot
                  know whether it did, that may be
    lost          what never arrived
    out of order  what arrived behind something that should have come later

Exit status 1 if anything was lost, came in the wrong order, or came twice where
that need not be.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextlib import ExitStack
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import trap
from fake_model import FakeModel
from fake_model import Text
from fake_telegram import FakeTelegram

from first import ledger

SCRIPT = harness.FOLDER / "s08_delivery.py"
END = '\nif __name__ == "__main__":\n'
ARM = "import sys; sys.path.append({folder!r}); import trap; trap.arm(globals())\n"
PEOPLE = {"ada": 42, "bob": 43}
PIECE = 3900  # characters: with one more of that size, a text is too long for one message
PIECES = 3  # of a long answer
PATIENCE = 60  # seconds until something that has not come counts as missing
AT_ONCE = 4  # worlds beside each other
WIDTH = 80  # columns of a terminal
TAG = re.compile(r"<(\w+)-(\d+) (\d)/\d>")


class Stop(Exception):
    """The experiment cannot be made; the message is for the reader."""


@dataclass(frozen=True)
class Point:
    """A moment at which the process is killed, and what that may cost."""

    name: str
    about: str  # for a row: up to 21 characters
    then: str  # the rest of the sentence: what the next start does
    traps: tuple[tuple[str, str, str], ...] = ()  # one for each life
    kill_when: Callable[["World"], bool] | None = None  # to kill from outside
    twice: int = 0  # pieces that may come once more
    is_long: bool = False
    spoil: Callable[[FakeTelegram], None] = lambda telegram: None


def hold_answer(telegram: FakeTelegram) -> None:
    """One text arrives, but no answer comes; what is sent beside it does not arrive."""
    telegram.hang("sendMessage", PATIENCE, after=True)
    telegram.hang("sendMessage", PATIENCE, times=99)


def refuse(telegram: FakeTelegram) -> None:
    telegram.fail("sendMessage", 502, "<html>Bad Gateway</html>")


def at(record: str, moment: str) -> tuple[str, str, str]:
    """A trap at the writing of a record."""
    return "Journal.append", record, moment


QUEUED = at("'type': 'enqueue'", "after")
REWRITTEN = ("os.replace", "queue.jsonl", "before")
POINTS = [
    Point(
        "taken",
        "the inbox has it",
        ", Telegram has not been told; the next start answers, and drops it when it comes again",
        (at("'ids': [", "after"),),
    ),
    Point(
        "asked",
        "the session has it",
        ", no model has been asked; the next start asks one",
        (at("'role': 'user'", "after"),),
    ),
    Point(
        "streaming",
        "the model has begun",
        ": its first word is here, and not on disk; the next start asks again",
        (("Channel.stream", "", "before"),),
    ),
    Point(
        "answered",
        "the answer is on disk",
        " in the session, not in the queue; the next start queues it, and asks no model",
        (at("'role': 'assistant'", "after"),),
    ),
    Point(
        "half-queued",
        "half of it is queued",
        ", a torn line; the next start sets that aside, and queues the session's answer",
        (at("'type': 'enqueue'", "half"),),
    ),
    Point(
        "queued",
        "the queue has it",
        ", nothing has been sent; the next start sends it, and asks no model",
        (QUEUED,),
    ),
    Point(
        "compacting",
        "a start rewrites it",
        ": the queue had it, the next start dies at that; the one after it reads the old file",
        (QUEUED, REWRITTEN),
    ),
    Point(
        "waiting",
        "a try has failed",
        ", the second is to come; the next start waits for the rest of the time, and tries",
        (at("'retry'", "after"),),
        spoil=refuse,
    ),
    Point(
        "sending",
        "Telegram has it",
        ", its yes is on the way; the next start sends it once more",
        kill_when=lambda world: world.has_arrived(),
        twice=1,
        spoil=hold_answer,
    ),
    Point(
        "sent",
        "yes, and no ack yet",
        ": it arrived, and that is not on disk; the next start sends it once more",
        (at("'ack'", "before"),),
        twice=1,
    ),
    Point(
        "half-acked",
        "half an ack is there",
        ", a torn line; the next start sets that aside, and sends the piece once more",
        (at("'ack'", "half"),),
        twice=1,
    ),
    Point(
        "acked",
        "the ack is written",
        "; the next start does not send it again",
        (at("'ack'", "after"),),
    ),
    Point(
        "not-noted",
        "the ack, but no done",
        ": the inbox still has the question; the next start knows its id, and sends nothing",
        (at("'done'", "never"),),
        kill_when=lambda world: world.has_arrived() and not ledger.pending(world.workspace),
    ),
    Point(
        "pieces",
        "between two pieces",
        " of a long text, the first acknowledged; the next start goes on with the second",
        (at("'ack'", "after"),),
        is_long=True,
    ),
]


@dataclass
class Row:
    """What came of one point."""

    point: Point
    enqueued: int = 0  # pieces, by the journal
    arrived: list[tuple[str, int, int]] = field(default_factory=list)  # who, question, piece
    expected: set[tuple[str, int, int]] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @property
    def twice(self) -> int:
        return len(self.arrived) - len(set(self.arrived))

    @property
    def lost(self) -> int:
        return len(self.expected - set(self.arrived))

    @property
    def disorder(self) -> int:
        """How often somebody got what should have come before what he got last."""
        firsts = list(dict.fromkeys(self.arrived))
        lines = [[each for each in firsts if each[0] == name] for name in PEOPLE]
        return sum(a > b for line in lines for a, b in zip(line, line[1:], strict=False))

    def complaints(self) -> list[str]:
        """What should not be."""
        told = [f"{self.lost} lost"] * bool(self.lost)
        told += [f"{self.disorder} out of order"] * bool(self.disorder)
        if self.twice > self.point.twice:
            told.append(f"{self.twice} received twice, where {self.point.twice} may be")
        if self.enqueued != len(self.expected):
            told.append(f"{self.enqueued} enqueued of {len(self.expected)}")
        return [*told, *self.problems]

    def __str__(self) -> str:
        figures = (self.enqueued, len(self.arrived), self.twice, self.lost, self.disorder)
        return LINE.format(self.point.name, *figures, self.point.about)


LINE = "{:<12}{:>8}{:>10}{:>7}{:>6}{:>14}  {}"
COUNTED = ("enqueued", "received", "twice", "lost", "out of order")
HEAD = LINE.format("killed at", *COUNTED, "").rstrip()


class Lab:
    """What the worlds have in common: the script, its copy with the trap, and a way to end all."""

    def __init__(self, script: Path, folder: Path):
        self.script, self.folder = script.resolve(), folder
        self.trapped = folder / f"s00_{re.sub(r'[^a-z0-9_]', '_', script.stem.lower())}.py"
        self.trapped.write_text(with_trap(script), encoding="utf-8")
        self.ended, self.lock = False, threading.Lock()
        self.screens: set[harness.Screen] = set()

    @contextmanager
    def life(self, script: Path, env: dict[str, str]) -> Iterator[harness.Screen]:
        """A run of the script, until the block ends. Raises Stop when all has to end."""
        with harness.Screen(script, env) as screen:
            with self.lock:
                if self.ended:
                    raise Stop("interrupted")
                self.screens.add(screen)
            try:
                yield screen
            finally:
                with self.lock:
                    self.screens.discard(screen)

    def end(self) -> None:
        """Kill what runs; nothing more is started."""
        with self.lock:
            self.ended = True
            for screen in self.screens:
                harness.end_session(screen.pid)


def source_of(script: Path, needed: str, since: str) -> str:
    """The text of a script that has a class. Raises Stop."""
    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Stop(f"{script} cannot be read: {error}") from None
    if f"\nclass {needed}" not in text or text.count(END) != 1:
        raise Stop(f"{script.name} has no {needed} and main: choose {since} or later with --script")
    return text


def with_trap(script: Path) -> str:
    """The script's text with the line that arms the trap."""
    text, folder = source_of(script, "DeliveryQueue", "s08"), str(Path(trap.__file__).parent)
    return text.replace(END, f"\n{ARM.format(folder=folder)}{END}")


def last_line(screen: harness.Screen) -> str:
    return ([""] + [line for line in screen.text.splitlines() if line.strip()])[-1]


class World:
    """One point: a workspace, a Telegram, a model, and the lives of the process."""

    def __init__(self, lab: Lab, point: Point, telegram: FakeTelegram, model: FakeModel):
        self.lab, self.point, self.telegram, self.model = lab, point, telegram, model
        self.folder = lab.folder / point.name
        self.workspace, self.armed = self.folder / "workspace", self.folder / "armed"
        self.workspace.mkdir(parents=True)
        self.row, self.queued = Row(point), {}
        self.asked = dict.fromkeys(PEOPLE, 0)
        model.script(None, [self.brain], repeat=True)
        telegram.poll_cap = 0.5

    def brain(self, body: dict) -> Text:
        """An answer that names the question, and how many pieces it has."""
        question = body["messages"][-1]["content"]
        count = self.pieces_of(question)
        if count == 1:
            return Text(f"<{question} 1/1> and some words about it")
        pieces = [
            f"<{question} {n}/{count}> ".ljust(PIECE, "x") + "\n" for n in range(1, count + 1)
        ]
        return Text("".join(pieces), pieces=pieces)

    def pieces_of(self, question: str) -> int:
        return PIECES if self.point.is_long and question == "ada-2" else 1

    def say(self, *names: str) -> None:
        for name in names:
            self.asked[name] += 1
            question = f"{name}-{self.asked[name]}"
            pieces = range(1, self.pieces_of(question) + 1)
            self.row.expected |= {(name, self.asked[name], piece) for piece in pieces}
            self.telegram.say(question, PEOPLE[name])

    def life(self, number: int) -> AbstractContextManager[harness.Screen]:
        """A run of the script: with a trap as long as the point has one for it, then as it is."""
        if number >= len(self.point.traps):
            return self.lab.life(self.lab.script, self.env())
        spec = json.dumps([*self.point.traps[number], str(self.armed)])
        return self.lab.life(self.lab.trapped, self.env() | {trap.SETTING: spec})

    def env(self) -> dict[str, str]:
        allowed = " ".join(map(str, PEOPLE.values()))
        return harness.clean_env(self.folder, self.workspace) | {
            "OPENAI_API_KEY": "sk-lab",
            "OPENAI_BASE_URL": self.model.url,
            "MODEL_ID": "brain",
            "TELEGRAM_BOT_TOKEN": self.telegram.token,
            "TELEGRAM_BASE_URL": self.telegram.url,
            "TELEGRAM_ALLOWED_CHATS": allowed,
        }

    def run(self) -> Row:
        """Two answers, the kill at the third question, what comes meanwhile, and a new start."""
        with self.life(0) as screen:
            self.say("ada", "bob")
            self.wait(screen, self.is_quiet)
            self.armed.touch()
            self.point.spoil(self.telegram)
            self.say("ada", "ada")
            self.let_die(screen)
        self.telegram.mend()
        self.say("bob", "ada")
        for number in range(1, len(self.point.traps)):
            with self.life(number) as screen:
                self.let_die(screen)
        with self.life(len(POINTS)) as screen:
            self.wait(screen, self.is_quiet)
            self.look(screen)
        self.row.problems += [*self.telegram.problems, *self.model.problems]
        return self.row

    def let_die(self, screen: harness.Screen) -> None:
        """Wait until the process has killed itself, or kill it when its moment has come."""
        if self.point.kill_when:
            self.wait(screen, lambda: self.point.kill_when(self))
            screen.kill()
        self.wait(screen, lambda: screen.process.poll() is not None or self.is_quiet())
        if screen.process.poll() is None:
            self.row.problems.append("it never came to this point")
            screen.kill()
        if screen.wait_exit() != -signal.SIGKILL:
            raise self.failure(screen, "ended by itself")
        self.look(screen)

    def has_arrived(self) -> bool:
        """Whether the answer at which the process is to die is at Telegram."""
        return len(self.telegram.sent) > len(PEOPLE)

    def is_quiet(self) -> bool:
        """Whether nothing is left to do, by the files; what is on its way then has a second."""
        left = self.telegram.pending() or ledger.pending(self.workspace)
        if left or not ledger.inbox_is_empty(self.workspace):
            return False
        deadline = time.monotonic() + 1
        while self.row.expected - set(self.arrived()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return True

    def wait(self, screen: harness.Screen, condition: Callable[[], bool]) -> None:
        """Wait for a condition, as long as the process may still bring it. Raises Stop."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if screen.process.poll() is not None and not condition():
                raise self.failure(screen, "ended by itself")
            if time.monotonic() > deadline:
                raise self.failure(screen, f"did not get there in {PATIENCE} s")
            time.sleep(0.02)

    def failure(self, screen: harness.Screen, what: str) -> Stop:
        about = f"{self.point.name}: {self.lab.script.name} {what}"
        return Stop(f"{about}; its last line: {last_line(screen)}")

    def look(self, screen: harness.Screen) -> None:
        """Note what the journal has, before the next start rewrites it."""
        for record in ledger.records(ledger.journal(self.workspace)):
            if record["type"] == "enqueue":
                self.queued[record["delivery"]["id"]] = record["delivery"]["pieces"]
        self.row.enqueued = sum(len(tags_in(piece)) for ps in self.queued.values() for piece in ps)
        self.row.arrived = self.arrived()
        if "Traceback" in screen.text:
            self.row.problems.append("a traceback")

    def arrived(self) -> list[tuple[str, int, int]]:
        return [tag for sent in list(self.telegram.sent) for tag in tags_in(sent.text)]


def tags_in(text: str) -> list[tuple[str, int, int]]:
    """Who asked, the number of the question and of the piece, for what a text holds."""
    return [(name, int(number), int(piece)) for name, number, piece in TAG.findall(text)]


def try_out(lab: Lab, point: Point) -> Row:
    with FakeTelegram() as telegram, FakeModel() as model:
        try:
            return World(lab, point, telegram, model).run()
        except (LookupError, TypeError, ValueError) as error:
            raise Stop(f"{point.name}: the journals are not those of s08: {error!r}") from None


def run_all(lab: Lab, points: list[Point]) -> bool:
    """Print a row for each point. Whether all are as they should be."""
    rows, good = [], True
    print(f"{lab.script.name}: two people, six questions, SIGKILL at the third question,")
    print("and a new start. --list tells of the points, --help of the columns.\n")
    print(HEAD, flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool, ExitStack() as until:
        until.callback(pool.shutdown, wait=False, cancel_futures=True)
        until.callback(lab.end)
        for row in pool.map(lambda point: try_out(lab, point), points):
            rows.append(row)
            complaints = row.complaints()
            print(row, *(f"- {each}" for each in complaints), sep="\n", flush=True)
            good &= not complaints
    may = sum(point.twice for point in points)
    kills = "1 kill" if len(rows) == 1 else f"{len(rows)} kills"
    print(f"\n{kills}. Lost: {sum(row.lost for row in rows)}. ", end="")
    print(f"Received twice: {sum(row.twice for row in rows)}, where {may} may be. ", end="")
    print(f"Out of order: {sum(row.disorder for row in rows)}.")
    return good


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="tell of the points, and run nothing")
    about = "only this one; may be given more than once"
    parser.add_argument("--point", action="append", metavar="NAME", help=about)
    about = f"s08 or later, or a copy (default: {SCRIPT.name})"
    parser.add_argument("--script", type=Path, default=SCRIPT, metavar="PATH", help=about)
    return parser.parse_args()


def choose(names: list[str] | None) -> list[Point]:
    """The points of these names, or all. Raises Stop."""
    known = {point.name: point for point in POINTS}
    for name in names or ():
        if name not in known:
            raise Stop(f"there is no point {name!r}; there are: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def list_points() -> int:
    """Tell of each point when that is, and what the next start does."""
    print(f"{'killed at':<14}when that is, and what the next start does")
    for point in POINTS:
        story = f"{point.about}{point.then}" + ", so it may come twice" * point.twice
        print(textwrap.fill(f"{point.name:<14}{story}", WIDTH, subsequent_indent=" " * 14))
    return 0


def run_lab(options: argparse.Namespace) -> int:
    """Returns 0 if the ledger is balanced at each point."""
    points = choose(options.point)
    with tempfile.TemporaryDirectory(prefix="crash-lab-") as folder:
        return 0 if run_all(Lab(options.script, Path(folder)), points) else 1


def run_as_command(run: Callable[[], int]) -> int:
    """Run a command; a Stop is told in a line, Ctrl-C and a pipe that is closed end it quietly."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt_once)
    try:
        if harness.pty is None:
            raise Stop("this needs pseudo-terminals and SIGKILL, which Windows has not: try WSL")
        return run()
    except Stop as problem:
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    finally:
        harness.MOTHER.end()


def interrupt_once(*_: object) -> None:
    """Ctrl-C; a second one does not interrupt the end of all that runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    options = read_options()
    return run_as_command(list_points if options.list else lambda: run_lab(options))


if __name__ == "__main__":
    sys.exit(main())
