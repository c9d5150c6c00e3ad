"""An hour's mixed traffic for s10, compressed.

    python tests/first/soak.py [--seconds 180] [--kills 3]

People on two Telegram bots, Feishu and the web chat write, each on with the next question; a
heartbeat and three cron jobs run beside them; two model servers and the platforms fail at random;
the process is killed. At the end each person's ledger is balanced, and the process's memory,
threads and file descriptors are compared with those of its beginning. Exit status 1 if a message
was lost, came in the wrong order or more often than kills and failures explain, or if it grew.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from fake_feishu import FakeFeishu
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

HOUR = 3600  # seconds
MESSAGES = 1200  # in the hour
TOKEN = "soak-token"
OWNER = "telegram:101"
JOBS = [
    {"id": "reminder", "schedule": {"kind": "every", "every_seconds": 3}},
    {"id": "report", "schedule": {"kind": "every", "every_seconds": 7}},
    {"id": "minute", "schedule": {"kind": "cron", "expr": "* * * * *"}},
]
FAULTS = [
    lambda world: world.bots[0].fail("sendMessage", 502, "<html>Bad Gateway</html>"),
    lambda world: world.bots[0].drop("sendMessage"),
    lambda world: world.lost_answer(),
    lambda world: world.bots[1].flood(seconds=1),
    lambda world: world.bots[1].fail("getUpdates", 500, "<html>no</html>"),
    lambda world: world.feishu.rate_limit(seconds=1),
    lambda world: world.feishu.fail("/im/v1/messages", 500, "<html>no</html>"),
    lambda world: world.feishu.expire_token(),
]


class Person:
    """Somebody who writes numbered questions to one place, and what has come back."""

    def __init__(self, name: str, write: Callable[[str], None]):
        self.name, self.write = name, write
        self.asked = 0
        self.answers: list[str] = []

    def ask(self) -> None:
        self.asked += 1
        self.write(f"{self.name}-{self.asked}")


class World:
    """Everything around the process under test."""

    def __init__(self, script: Path, folder: Path, seed: int, seconds: float):
        self.script, self.folder, self.random = script, folder, random.Random(seed)
        self.workspace, self.seconds = folder / "workspace", seconds
        self.workspace.mkdir()
        self.bots = [
            FakeTelegram("111:first", "first_bot"),
            FakeTelegram("222:second", "second_bot"),
        ]
        self.feishu, self.models = FakeFeishu(), [FakeModel(), FakeModel()]
        self.ports = [free_port(), free_port()]
        self.faults, self.kills, self.duplicates_allowed = Counter(), 0, 0
        self.people: list[Person] = []
        self.web: dict[str, set[str]] = {}
        self.process: subprocess.Popen | None = None
        self.samples: list[tuple[float, float, int, int]] = []
        self.ended = threading.Event()
        for number in range(8):
            self.people.append(self.telegrammer(0, 101 + number))
            self.people.append(self.telegrammer(1, 201 + number))
            self.people.append(self.feishu_person(f"ou_p{number}"))
            self.people.append(self.web_person(f"ws-p{number}"))
        self.models[0].script(None, [self.brain], repeat=True)
        self.models[1].script(None, [self.sound_brain], repeat=True)

    def telegrammer(self, bot: int, chat: int) -> Person:
        return Person(f"tg{chat}", lambda text: self.bots[bot].say(text, chat))

    def feishu_person(self, name: str) -> Person:
        hook = f"http://127.0.0.1:{self.ports[1]}/feishu/events"

        def write(text: str) -> None:
            event = self.feishu.event(text, open_id=name)
            while self.feishu.push(hook, event).status != 200:  # the platform tries again for long
                if self.ended.wait(0.2):
                    return

        return Person(f"fs{name[4:]}", write)

    def web_person(self, peer: str) -> Person:
        self.web[peer] = set()

        def write(text: str) -> None:
            send = {"text": text, "peer": peer, "id": text}
            request = {"jsonrpc": "2.0", "method": "send", "params": send, "id": 1}
            while not self.ended.is_set():
                with suppress(OSError, WebSocketException, TimeoutError):
                    url = f"ws://127.0.0.1:{self.ports[0]}/ws?token={TOKEN}"
                    with connect(url, open_timeout=2, close_timeout=1) as socket:
                        socket.send(json.dumps(request))
                        while (reply := json.loads(socket.recv(5))).get("id") != 1:
                            pass
                        assert "result" in reply, reply
                        return
                time.sleep(0.2)

        return Person(f"web{peer[4:]}", write)

    def sound_brain(self, body: dict) -> object:
        """An answer that names the question; for some, after a tool has run."""
        messages = body["messages"]
        last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        if "HEARTBEAT.md" in last:
            return Text(f"beat {time.time():.3f}")
        question = re.sub(r"^\[[^\]]*\] ", "", last)[:60]
        if messages[-1]["role"] == "user" and self.random.random() < 0.2:
            return ToolCalls([("read_file", {"path": "SOUL.md"})])
        return Text(f"re {question}")

    def brain(self, body: dict) -> object:
        kind = self.random.random()
        if kind > 0.12:
            return self.sound_brain(body)
        self.faults["model"] += 1
        if kind < 0.03:
            return Error(429, {"Retry-After": "1"})
        return Error(500) if kind < 0.08 else Drop(2, "reset", Text("a word and no end to it"))

    def lost_answer(self) -> None:
        """A text arrives, and the platform's yes does not: it will come twice."""
        self.duplicates_allowed += 1
        self.bots[0].drop("sendMessage", after=True)

    def environment(self) -> dict[str, str]:
        first, second = self.models
        compressed = max(int(1800 * self.seconds / HOUR), 1)
        return harness.clean_env(self.folder, self.workspace) | {
            "OPENAI_API_KEY": "sk-1",
            "OPENAI_BASE_URL": first.url,
            "MODEL_ID": "brain",
            "OPENAI_API_KEY_2": "sk-2",
            "OPENAI_BASE_URL_2": second.url,
            "TELEGRAM_BOT_TOKEN": self.bots[0].token,
            "TELEGRAM_BASE_URL": self.bots[0].url,
            "TELEGRAM_ALLOWED_CHATS": " ".join(str(101 + n) for n in range(8)),
            "TELEGRAM_BOT_TOKEN_WORK": self.bots[1].token,
            "TELEGRAM_BASE_URL_WORK": self.bots[1].url,
            "TELEGRAM_ALLOWED_CHATS_WORK": " ".join(str(201 + n) for n in range(8)),
            "FEISHU_APP_ID": self.feishu.app_id,
            "FEISHU_APP_SECRET": self.feishu.app_secret,
            "FEISHU_DOMAIN": self.feishu.url,
            "FEISHU_VERIFICATION_TOKEN": self.feishu.verification_token,
            "FEISHU_ALLOWED_CHATS": " ".join(f"ou_p{n}" for n in range(8)),
            "FEISHU_PORT": str(self.ports[1]),
            "GATEWAY_PORT": str(self.ports[0]),
            "GATEWAY_TOKEN": TOKEN,
            "HEARTBEAT_SECONDS": str(compressed),
            "OWNER": OWNER,
        }

    def start(self) -> None:
        with open(self.folder / "screen.txt", "ab") as screen:
            self.process = subprocess.Popen(
                [sys.executable, str(self.script)],
                stdin=subprocess.PIPE,
                stdout=screen,
                stderr=screen,
                env=self.environment(),
                start_new_session=True,
            )
        self.began = time.monotonic()

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.kills += 1
        self.samples.clear()
        self.start()

    def sample(self) -> None:
        """Note age, memory in MiB, threads and file descriptors of the process."""
        place = Path("/proc", str(self.process.pid))
        with suppress(OSError, AttributeError):
            status = (place / "status").read_text()
            memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
            threads = int(re.search(r"Threads:\s+(\d+)", status)[1])
            files = len(os.listdir(place / "fd"))
            self.samples.append((time.monotonic() - self.began, memory, threads, files))

    def read_answers(self) -> None:
        """Put what has arrived so far into the ledgers of those it was for."""
        arrived: dict[str, list[str]] = {person.name: [] for person in self.people}
        sent = [(f"tg{each.chat_id}", each.text) for bot in self.bots for each in list(bot.sent)]
        sent += [(f"fs{each.receive_id[4:]}", each.text) for each in list(self.feishu.sent)]
        for name, text in sent:
            if text.startswith(f"re {name}-"):
                arrived[name].append(text[3:])
        for peer in self.web:
            arrived[f"web{peer[4:]}"] = self.history(peer)
        for person in self.people:
            person.answers = arrived[person.name]

    def history(self, peer: str) -> list[str]:
        """The questions of a web peer that its session has an answer to, in order."""
        request = {"jsonrpc": "2.0", "method": "sessions.history", "id": 1}
        request["params"] = {"peer": peer, "limit": 10_000}
        with suppress(OSError, WebSocketException, TimeoutError):
            url = f"ws://127.0.0.1:{self.ports[0]}/ws?token={TOKEN}"
            with connect(url, open_timeout=2, close_timeout=1, max_size=None) as socket:
                socket.send(json.dumps(request))
                while (reply := json.loads(socket.recv(5))).get("id") != 1:
                    pass
                told = [m["text"] for m in reply["result"]["messages"] if m["role"] != "user"]
                return [text[3:] for text in told if text.startswith("re ")]
        return []

    def missing(self) -> list[str]:
        """The questions without an answer."""
        wanted = {p.name: {f"{p.name}-{n}" for n in range(1, p.asked + 1)} for p in self.people}
        return sorted(q for p in self.people for q in wanted[p.name] - set(p.answers))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def write_jobs(workspace: Path) -> None:
    for job in JOBS:
        is_turn = job["id"] == "report"
        job["payload"] = (
            {"kind": "agent_turn", "message": "report"}
            if is_turn
            else {"kind": "system_event", "text": f"it is {job['id']} time"}
        )
    (workspace / "CRON.json").write_text(json.dumps({"jobs": JOBS}), encoding="utf-8")
    (workspace / "HEARTBEAT.md").write_text("- look around\n", encoding="utf-8")
    (workspace / "SOUL.md").write_text("You are brief.\n", encoding="utf-8")


def moments(world: World, kills: int) -> Iterator[float]:
    """When to kill: at random in the first two thirds, so that the last life is a long one."""
    return iter(sorted(world.random.uniform(5, world.seconds * 2 / 3) for _ in range(kills)))


def let_loose(world: World, kills: int) -> None:
    """The traffic, for the seconds asked for, and then until all is answered."""
    asking = [threading.Thread(target=chatter, args=(world, p), daemon=True) for p in world.people]
    began, plan = time.monotonic(), moments(world, kills)
    following = next(plan, None)
    for thread in asking:
        thread.start()
    while (passed := time.monotonic() - began) < world.seconds:
        time.sleep(0.25)
        world.sample()
        if world.random.random() < 0.15:
            fault = world.random.choice(FAULTS)
            fault(world)
            world.faults["platforms"] += 1
        if following is not None and passed >= following:
            world.kill()
            following = next(plan, None)
            print(f"{passed:5.0f} s  kill {world.kills}", flush=True)
    for thread in asking:
        thread.join(60)
    latest = time.monotonic() + 120
    while time.monotonic() < latest:
        world.read_answers()
        if not world.missing():
            break
        time.sleep(1)
    world.sample()


def chatter(world: World, person: Person) -> None:
    """One person: a question now and then, at a pace that makes an hour's messages of all."""
    pause = world.seconds * len(world.people) / MESSAGES
    rest = random.Random(person.name)
    end = time.monotonic() + world.seconds
    while time.monotonic() < end:
        time.sleep(rest.uniform(0.5, 1.5) * pause)
        person.ask()


def judge(world: World) -> bool:
    """Print the balance. Whether it is as it should be."""
    lost, wrong, twice, asked = world.missing(), [], 0, 0
    for person in world.people:
        asked += person.asked
        firsts = list(dict.fromkeys(person.answers))
        twice += len(person.answers) - len(firsts)
        if firsts != sorted(firsts, key=lambda name: int(name.rpartition("-")[2])):
            wrong.append(person.name)
    allowed = world.kills + world.duplicates_allowed
    begin = time.monotonic()
    world.process.send_signal(signal.SIGINT)
    status = world.process.wait(30)
    ending = time.monotonic() - begin
    screen = (world.folder / "screen.txt").read_text(encoding="utf-8", errors="replace")
    crashed = "Traceback" in screen
    fakes = (*world.models, *world.bots, world.feishu)
    problems = [each for fake in fakes for each in fake.problems]
    # What was on its way already when a limit of one second began was not sent too early.
    problems = [each for each in problems if not re.search(r"(0\.[89]|1\.)\d* s too early", each)]
    print(f"questions {asked}, lost {len(lost)}, out of order {len(wrong)}, twice {twice}", end="")
    print(f" (kills and lost answers explain {allowed})")
    print(f"failures: {dict(world.faults)}; kills {world.kills}; model calls ", end="")
    print(*(len(model.chats) for model in world.models), sep=" + ")
    good = not lost and not wrong and twice <= allowed and not crashed and not problems
    old = [each for each in world.samples if each[0] > 15]
    if len(old) >= 8:
        quarter = len(old) // 4
        for column, name, room in ((1, "MiB", 8), (2, "threads", 4), (3, "file descriptors", 6)):
            first = statistics.median(each[column] for each in old[:quarter])
            last = statistics.median(each[column] for each in old[-quarter:])
            print(f"{name}: {first:.0f} in the last life's first quarter, {last:.0f} in its last")
            good &= last <= first * 1.15 + room
    print(f"Ctrl-C: status {status} after {ending:.1f} s")
    for line in [*lost[:10], *wrong[:10], *problems[:10], *(["a traceback"] if crashed else [])]:
        print("-", line)
    return good and status == 0 and ending < 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--script", type=Path, default=harness.sections()[-1].path)
    given = parser.parse_args()
    print(f"{given.script.name}: an hour in {given.seconds:.0f} s, --seed {given.seed}", flush=True)
    with ExitStack() as until, tempfile.TemporaryDirectory() as folder:
        world = World(given.script, Path(folder), given.seed, given.seconds)
        for fake in (*world.models, *world.bots, world.feishu):
            until.enter_context(fake)
        write_jobs(world.workspace)
        world.start()
        try:
            let_loose(world, given.kills)
            good = judge(world)
        finally:
            world.ended.set()
            with suppress(ProcessLookupError):
                os.killpg(world.process.pid, signal.SIGKILL)
    print("all is well" if good else "something is wrong")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
