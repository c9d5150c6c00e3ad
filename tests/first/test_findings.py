"""What real servers, users and attacks have found: text and state from outside do no harm."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace
from typing import Any

import fake_feishu
import harness
import pytest
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from harness import since
from websockets.sync.client import connect

try:
    import resource
except ImportError:  # Windows has none, and no /proc either
    resource = None

HUGE = 10**400  # too large for a float


def results(model: FakeModel) -> list[str]:
    """The results of tools in the last request."""
    return [m["content"] for m in model.chats[-1].messages if m["role"] == "tool"]


def run_calls(section: harness.Section, model: FakeModel, calls: Sequence[tuple]) -> list[str]:
    """What comes of tool calls that are made in one answer."""
    model.script("m", [ToolCalls(calls), Text("done")])
    done = harness.pipe(section, "go\n", model.env("m"), timeout=60)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr
    return results(model)


# --- the program's own state ---

STATE = {
    ".inbox.jsonl": "",
    ".gateway-token": "a secret word",
    ".sessions/agents/main/sessions.json": "{}",
    "agents/luna/.memory.sqlite": "no database",
    "bindings.jsonl": "",
    "bindings.jsonl.torn": "half a line",
    "cron/cron-runs.jsonl": '{"type": "beat", "at": 1.0}\n',
    "delivery-queue/queue.jsonl": '{"type": "sent", "ids": []}\n',
    "delivery-queue/queue.jsonl.damaged": "half a line",
}
SPELLINGS = ("{}", "./{}", "box/../{}", "link/{}")


def snapshot(workspace: Path) -> dict[str, bytes]:
    """All that the workspace holds of the state above and beside it."""
    tops = {name.partition("/")[0] for name in STATE} - {".sessions", ".inbox.jsonl"}
    found = [file for top in tops for file in [workspace / top, *(workspace / top).rglob("*")]]
    return {str(file): file.read_bytes() if file.is_file() else b"/" for file in found}


@since("s02")
@pytest.mark.skipif(os.name == "nt", reason="makes links")
def test_no_tool_reaches_the_state_of_the_program(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """However a path is spelled: no tool reads, writes or replaces it, nor puts a file there."""
    for name, text in STATE.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text, encoding="utf-8")
    (workspace / "box").mkdir()
    (workspace / "link").symlink_to(workspace, target_is_directory=True)
    (workspace / "queue").symlink_to(workspace / "delivery-queue", target_is_directory=True)
    paths = [spelling.replace("{}", name) for name in STATE for spelling in SPELLINGS]
    paths += [str(workspace / name) for name in STATE]
    paths += ["queue/queue.jsonl", "Delivery-Queue/queue.jsonl", "CRON/cron-runs.jsonl"]
    calls = [("read_file", {"path": path}) for path in paths]
    paths += ["cron/new.jsonl", "delivery-queue", "cron", "agents/sage/.memory.sqlite", ".lock"]
    calls += [("write_file", {"path": path, "content": "x"}) for path in paths]
    calls += [("edit_file", {"path": p, "old_text": "a", "new_text": "b"}) for p in paths]
    before = snapshot(workspace)
    found = run_calls(section, fake_model, calls)
    assert len(found) == len(calls)
    for call, result in zip(calls, found, strict=True):
        assert result.startswith("error: ") and "not for tools" in result, (call, result)
    kept = snapshot(workspace)
    assert all(kept[name].startswith(before[name]) for name in before)  # it may have grown


@since("s02")
def test_what_is_like_the_state_is_the_persons(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    names = ["box/cron/a.txt", "cron.txt", "delivery-queue.md", "my/.env.example", "agents/a/b.md"]
    calls = [("write_file", {"path": name, "content": "x"}) for name in names]
    found = run_calls(section, fake_model, calls)
    assert [text[:5] for text in found] == ["wrote"] * len(names), found


@since("s06")
def test_a_skill_around_the_workspace_opens_nothing(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    text = "---\nname: all\ndescription: everything\n---\n"
    (workspace / "SKILL.md").write_text(text, encoding="utf-8")
    (workspace / ".gateway-token").write_text("a secret word", encoding="utf-8")
    fake_model.script("m", [ToolCalls([("read_file", {"path": ".gateway-token"})]), Text("done")])
    env = fake_model.env("m", SKILLS_DIR=str(workspace.parent))
    done = harness.pipe(section, "/skills\ngo\n", env)
    assert "/all" in done.stdout, done.stdout
    assert "not for tools" in results(fake_model)[0]


MESSAGE = {
    "channel": "telegram",
    "account": "default",
    "peer": "42",
    "text": "hi",
    "ids": ["telegram:1:42:1"],
    "kind": "direct",
    "sender": "Ada",
}
DELIVERY = {
    "id": "q1",
    "channel": "telegram",
    "account": "default",
    "peer": "42",
    "pieces": ["one", "two"],
    "sent": 0,
    "tries": 0,
    "error": "",
}
JOB_STATE = {"since": 1.0, "last": 1.0, "ended": 1.0, "errors": 1, "error": "no"}
RECORDS: dict[str, list[dict]] = {
    ".inbox.jsonl": [
        {"type": "message", "message": MESSAGE},
        {"type": "answer", "id": "telegram:1:42:1", "text": "hello"},
        {"type": "seen", "ids": {"a": 1.0}},
    ],
    "bindings.jsonl": [{"agent": "luna", "channel": "web", "peer": "ada", "priority": 0}],
    "cron/cron-runs.jsonl": [
        {"type": "seen", "job": "tea", "at": 1.0, "schedule": "a", "version": "b"},
        {"type": "start", "job": "tea", "at": 1.0},
        {"type": "end", "job": "tea", "at": 2.0, "error": "no", "done": False},
        {"type": "state", "job": "tea", "state": JOB_STATE},
        {"type": "beat", "at": 1.0},
        {"type": "told", "digest": "d", "at": 1.0},
        {"type": "owner", "message": MESSAGE},
    ],
    "delivery-queue/queue.jsonl": [
        {"type": "enqueue", "delivery": DELIVERY},
        {"type": "ack", "id": "q1"},
        {"type": "retry", "id": "q1", "tries": 1, "error": "no", "wait": 5, "at": 1.0},
        {"type": "failed", "id": "q1", "tries": 1, "error": "no"},
        {"type": "again", "id": "q1"},
        {"type": "sent", "ids": ["a"]},
    ],
    ".sessions/agents/main/sessions/aaaaaaaaaaaa.jsonl": [
        {"type": "session", "key": "agent:main:main", "label": "old", "created": 1.0},
        {"type": "message", "message": {"role": "user", "content": "hi"}, "used": 9, "fixed": 9},
        {"type": "message", "message": {"role": "assistant", "content": "hello"}, "used": 0},
        {"type": "overflow", "window": "m, 128000", "tokens": 5000},
        {"type": "retraction", "to": 1},
    ],
}
ODD: list[Any] = [HUGE, -HUGE, float("inf"), float("nan"), -1, 1e17, None, True, [], {}, "", [[]]]


def odd_records(record: dict) -> list[dict]:
    """A record with each of its values in turn, and those inside of it, replaced by an odd one."""
    found = []
    for key, value in record.items():
        values = [*ODD, *(odd_records(value) if isinstance(value, dict) else [])]
        found += [record | {key: odd} for odd in values]
    return found


@since("s03")
def test_odd_values_in_the_state_stop_nothing(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """Whatever a file of its own holds, the program starts, says so, and answers."""
    for name, records in RECORDS.items():
        lines = [odd for record in records for odd in [record, *odd_records(record)]]
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workspace / name).write_text(text, encoding="utf-8")
    schedule = {"kind": "every", "every_seconds": 3600}
    job = {"id": "tea", "schedule": schedule, "payload": {"kind": "system_event", "text": "tea"}}
    (workspace / "CRON.json").write_text(json.dumps({"jobs": [job]}), encoding="utf-8")
    fake_model.script("m", [Text("here I am")], repeat=True)
    lines = "hello\n" + "/cron\n" * (section.label >= "s07")
    done = harness.pipe(section, lines, fake_model.env("m"), timeout=60)
    assert done.returncode == 0 and "here I am" in done.stdout, done.stdout + done.stderr
    assert "damaged, left out" in done.stdout and not done.stderr, done.stderr
    if section.label >= "s07":
        assert re.search("^tea: every 3600, next ", done.stdout, re.M), done.stdout


@since("s08")
def test_a_queued_text_goes_to_nobody_who_is_not_allowed(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """Neither after a restart, nor because somebody tries it once more."""
    queue = workspace / "delivery-queue" / "queue.jsonl"
    queue.parent.mkdir()
    deliveries = [
        DELIVERY | {"id": f"to {peer}", "peer": peer, "pieces": [f"for {peer}"]}
        for peer in ("666", "666:topic:5", "42", "-100200:topic:5")
    ]
    lines = [json.dumps({"type": "enqueue", "delivery": each}) + "\n" for each in deliveries]
    queue.write_text("".join(lines), encoding="utf-8")
    with FakeTelegram() as telegram:
        telegram.know(666)
        telegram.know(42)
        telegram.know(-100200, "supergroup", topics=[5])
        env = fake_model.env(
            TELEGRAM_BOT_TOKEN=telegram.token,
            TELEGRAM_BASE_URL=telegram.url,
            TELEGRAM_ALLOWED_CHATS="42 -100200",
        )
        with harness.Screen(section, env) as screen:
            for chat in (42, -100200):
                telegram.until(lambda chat=chat: telegram.sent_to(chat), what=f"a text to {chat}")
            screen.wait_for("not sent to 666:topic:5: ")
            screen.type("/retry\n")
            screen.wait_for("2 texts are tried again")
            screen.wait_for("not sent to 666:topic:5: ")
            screen.type("/failed\n")
            screen.wait_for("to 666: telegram default 666, ")
        assert not telegram.sent_to(666)


# --- skills ---

BOMB = ["a: &a [x, x, x, x, x, x, x, x, x]"]
BOMB += [f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]" for old, new in pairwise("abcdefghij")]
BOMB = "\n".join(BOMB)
FRONTS = {
    "in the name": f"{BOMB}\nname: *j\ndescription: d",
    "in the description": f"{BOMB}\nname: n\ndescription: *j",
    "in the call": f"{BOMB}\nname: n\ndescription: d\ninvocation: *j",
    "in a flag": f"{BOMB}\nname: n\ndescription: d\nuser-invocable: *j",
    "as a key": f"{BOMB}\n? *j\n: x\nname: n\ndescription: d",
    "merged": f"{BOMB}\nm: &m {{x: *j}}\n<<: *m\nname: n\ndescription: d",
    "in itself": "name: &n [*n]\ndescription: d",
    "deep": f"name: n\ndescription: {'[' * 90_000}",
    "deep and closed": f"name: n\ndescription: d\nx: {'[' * 3_000}{']' * 3_000}",
    "wide": f"name: n\ndescription: d\nx: [{'a, ' * 30_000}]",
    "long": f"name: n\ndescription: {'d ' * 45_000}",
    "many keys": "name: n\ndescription: d\n" + "\n".join(f"k{n}: v" for n in range(9_000)),
    "a tag": "name: !!python/object/apply:os.getcwd []\ndescription: d",
    "a number in base 60": f"name: n\ndescription: d\nx: 1{':59' * 30_000}",
    "a list as text": "name: !!str [a]\ndescription: d",
}


@since("s06")
def test_no_frontmatter_holds_the_program_up(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """Neither the first answer nor the next: values are plain texts, and nothing is expanded."""
    for number, front in enumerate(FRONTS.values()):
        folder = workspace / "skills" / f"odd{number}"
        folder.mkdir(parents=True)
        (folder / "SKILL.md").write_text(f"---\n{front}\n---\nhello\n", encoding="utf-8")
    fake_model.script("m", [Text("here I am")], repeat=True)
    env = fake_model.env("m")
    done = harness.pipe(section, "hello\n/skills\nhello\n", env, timeout=20)
    assert done.stdout.count("here I am") == 2 and not done.stderr, done.stdout + done.stderr
    assert "example-skill" in done.stdout
    for number, name in enumerate(FRONTS):
        told = f"skills/odd{number}/SKILL.md" in done.stdout
        is_good = name in ("in the call", "in a flag", "as a key", "merged", "deep and closed")
        assert told or is_good, name


@since("s06")
@pytest.mark.skipif(os.name == "nt", reason="makes FIFOs")
def test_only_regular_files_are_read(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """A FIFO gives nothing until somebody writes to it: whoever opens it waits."""
    names = ["skills/pipe/SKILL.md", "SOUL.md", "MEMORY.md", "memory/2026-01-01.md"]
    for name in [*names, "HEARTBEAT.md", "CRON.json", "agents.json"]:
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).unlink(missing_ok=True)
        os.mkfifo(workspace / name)
    fake_model.script("m", [Text("here I am")], repeat=True)
    lines = "hello you\n/skills\n/search hello\nhello again\n"
    done = harness.pipe(section, lines, fake_model.env("m"), timeout=20)
    assert done.stdout.count("here I am") == 2 and not done.stderr, done.stdout + done.stderr
    assert "skills/pipe/SKILL.md: no file of at most" in done.stdout


# --- long texts ---

LONG = 100_000
UNITS = [
    "a",
    " ",
    "\n",
    "# a\n",
    "## \n",
    "- a\n",
    "<a>",
    "</a>",
    "```\n",
    "/",
    "../",
    "[",
    "{",
    "}",
]
UNITS += ["\r", "\\", '"', "\u0301", "\u200d", "\U0001f1e6", "\u4e2d", "@_user_1 ", "1-1,", "* "]


def timed(function: Callable, *arguments: object) -> float:
    """The seconds of work that a call takes, whatever comes of it."""
    began = time.process_time()
    with suppress(OSError, ValueError):
        function(*arguments)
    return time.process_time() - began


def readers(module: ModuleType, folder: Path) -> dict[str, Callable]:
    """What of a section reads text from outside, as far as it is there."""
    agent = SimpleNamespace(workspace=folder.resolve())
    agent.app = SimpleNamespace(skills=SimpleNamespace(skills={}))
    file = folder / "a.md"

    def edit(text: str) -> None:
        file.write_text(text, encoding="utf-8", newline="")
        module.edit_file(agent, "a.md", text[: LONG // 2], "b")

    def add_pieces(text: str) -> None:
        parts: list[dict] = []
        for number, letter in enumerate(text[:5_000]):
            function = SimpleNamespace(name=None, arguments=letter)
            piece = SimpleNamespace(index=number % 2, id=None, function=function)
            module.add_piece(parts, piece, 0)
        module.plain_calls(parts, [])

    def schedule(text: str) -> None:
        payload = {"kind": "system_event", "text": "tea"}
        module.CronJob("a", "a", True, {"kind": "cron", "expr": text}, payload, False, "main")

    found = {
        "edit_file": edit,
        "add_piece": add_pieces,
        "workspace_path": lambda text: module.workspace_path(agent, text),
        "readable_path": lambda text: module.readable_path(agent, text),
        "chunk_message": lambda text: module.chunk_message(text, 4000),
        "split_notes": lambda text: list(module.split_notes(text)),
        "strip_ok": lambda text: module.strip_ok(text),
        "CronJob": schedule,
        "estimate": lambda text: module.estimate(text),
        "is_object": lambda text: module.is_object(text),
    }
    return {name: function for name, function in found.items() if hasattr(module, name)}


@since("s02")
def test_long_texts_take_no_time(section: harness.Section, tmp_path: Path):
    """100 kB of anything, from a model, a file or a person, in well under a second."""
    slow = {}
    for name, function in readers(section.module, tmp_path).items():
        for unit in UNITS:
            text = (unit * LONG)[:LONG]
            for long in (
                text,
                f"x{text}",
                f"{text}x",
                f"HEARTBEAT_OK{text}",
                f"{text}HEARTBEAT_OK",
            ):
                if (seconds := timed(function, long)) > 1:
                    slow[name, long[:15], long[-15:]] = seconds
    assert not slow


@since("s06")
def test_long_notes_hold_nobody_up(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """80 kB of headings in a note, and 100,000 blanks in one that is written."""
    folder = workspace / "memory"
    folder.mkdir(exist_ok=True)
    (folder / "2026-01-01.md").write_text("# a\n" * 20_000, encoding="utf-8")
    blanks = {"content": f"tea{' ' * LONG}x{chr(10) * 50_000}milk"}
    fake_model.script("m", [ToolCalls([("memory_write", blanks)]), Text("done")])
    began = time.monotonic()
    done = harness.pipe(section, "what was it\n/search milk\n", fake_model.env("m"), timeout=60)
    assert time.monotonic() - began < 10
    assert "kept in memory/" in results(fake_model)[0] and "  milk" in done.stdout


@since("s02")
def test_a_passage_is_found_once_or_not_at_all(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    for name, text in {"one": "abcab", "two": "aaa", "many": "ab" * 50_000}.items():
        (workspace / name).write_text(text, encoding="utf-8")
    edits = [("one", "ab"), ("one", "abc"), ("two", "aa"), ("two", "aaa"), ("many", "ab" * 25_000)]
    calls = [("edit_file", {"path": p, "old_text": old, "new_text": "x"}) for p, old in edits]
    found = run_calls(section, fake_model, calls)
    assert [text.split(" occurs ")[-1][:9] for text in found] == [
        "2 times i",
        "replaced ",
        "2 times i",
        "replaced ",
        "2 times i",
    ]


# --- who holds connections ---


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Let this process have so many files open; the program under test keeps its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, count), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def crowd(stack: ExitStack, port: int, count: int, text: bytes) -> list[socket.socket]:
    """So many connections that have sent a part of a request."""
    found = []
    for _ in range(count):
        found.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)))
        with suppress(OSError):  # of one that was cut off at once
            found[-1].sendall(text)
    return found


def drip(crowded: list[socket.socket]) -> list[socket.socket]:
    """Send each one byte more. Returns those that are still open."""
    left = []
    for each in crowded:
        each.setblocking(False)
        with suppress(OSError):
            each.send(b"x")
            with suppress(BlockingIOError):
                if not each.recv(1):
                    continue
            left.append(each)
    return left


def files_of(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


@since("s04")
@pytest.mark.costly
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files in /proc")
def test_dripping_requests_at_the_webhook(section: harness.Section, fake_model: FakeModel):
    """1,010 of them, without credentials: Feishu and the terminal are answered, and they end."""
    fake_model.script("m", [Text("here I am")], repeat=True)
    with fake_feishu.FakeFeishu() as feishu, many_files(4096), ExitStack() as stack:
        env = {
            "FEISHU_APP_ID": feishu.app_id,
            "FEISHU_APP_SECRET": feishu.app_secret,
            "FEISHU_DOMAIN": feishu.url,
            "FEISHU_PORT": "0",
            "FEISHU_VERIFICATION_TOKEN": feishu.verification_token,
            "FEISHU_ENCRYPT_KEY": feishu.encrypt_key,
            "FEISHU_ALLOWED_CHATS": "ou_alice",
        }
        screen = stack.enter_context(harness.Screen(section, fake_model.env("m", **env)))
        hook = screen.wait_for(re.compile(r"on, at (http://127\.0\.0\.1:(\d+)/feishu/events)"))
        head = b"POST /feishu/events HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        crowded = crowd(stack, int(hook[2]), 1010, head)
        crowded += crowd(stack, int(hook[2]), 20, b"POST /feishu/events HTTP/1.1\r\nHost: ")
        assert files_of(screen.pid) < 250
        assert feishu.push(hook[1], feishu.event("hello")).status == 200
        assert feishu.wait_sent(1, 20)
        screen.type("hello\n")
        screen.wait_for("agent> here I am")
        deadline = time.monotonic() + 30
        while crowded := drip(crowded):
            assert time.monotonic() < deadline, f"{len(crowded)} are still open"
            time.sleep(0.2)


@since("s05")
@pytest.mark.costly
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files in /proc")
def test_half_open_connections_at_the_gateway(section: harness.Section, fake_model: FakeModel):
    """1,000 that say nothing, or a part: whoever is there stays, and whoever comes is let in."""
    fake_model.script("m", [Text("here I am")], repeat=True)
    with many_files(4096), ExitStack() as stack:
        screen = stack.enter_context(harness.Screen(section, fake_model.env("m")))
        link = screen.wait_for(re.compile(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)"))
        address = f"ws://127.0.0.1:{link[1]}/ws?token={link[2]}"
        before = stack.enter_context(connect(address, proxy=None))
        for text in (b"G", b"GET /ws HTTP/1.1\r\nHost: ", b"GET / HTTP/1.1\r\n"):
            crowd(stack, int(link[1]), 340, text)
        assert files_of(screen.pid) < 400
        after = stack.enter_context(connect(address, proxy=None))
        for client in (before, after):
            client.send(json.dumps({"jsonrpc": "2.0", "method": "status", "id": 1}))
            assert json.loads(client.recv(10))["result"]["clients"] == 2
        screen.type("hello\n")
        screen.wait_for("agent> here I am")


# --- answers ---


class Raw:
    """A server that sends event streams byte by byte as a test has written them, one per call."""

    def __init__(self, streams: Sequence[bytes]):
        self.streams, self.requests = list(streams), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                self.requests.append(json.loads(body))
                stream = self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]
                handler.send_response(200)
                handler.send_header("Content-Type", "text/event-stream")
                handler.end_headers()
                for start in range(0, len(stream), 7):  # no piece ends where a line does
                    handler.wfile.write(stream[start : start + 7])
                    handler.wfile.flush()

            def log_message(handler, *about: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "Raw":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def chunk(text: str = "", finish: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    about = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return json.dumps(about | {"choices": [choice]}, ensure_ascii=False)


PARTS = (chunk("Hello"), chunk(" th\u2028ere \U0001f600"), chunk("!", "stop"), "[DONE]")
KEPT = "Hello th\u2028ere \U0001f600!"


def stream(between: str, end: str = "\n", before: str = "data: ") -> bytes:
    """An answer as a stream of events, with something between them."""
    text = between + "".join(f"{before}{part}\n\n{between}" for part in PARTS)
    return text.replace("\n", end).encode()


STREAMS = {
    "comment": stream(": ping\n\n"),
    "comment after an id": stream("id: 7\n: ping\n\n"),
    "retry": stream("retry: 3000\n\n"),
    "retry and id": stream("id: 8\nretry: 3000\n\n"),
    "an event ping": stream("event: ping\n\n"),
    "a ping with data": stream('event: ping\ndata: {"type": "ping"}\n\n'),
    "empty data": stream("data:\n\n"),
    "blank data": stream("data:  \n\n"),
    "data without a colon": stream("data\n\n"),
    "a word": stream("data: keep-alive\n\n"),
    "null": stream("data: null\n\n"),
    "blank lines": stream("\n\n\n"),
    "CRLF": stream(": ping\n\n", end="\r\n"),
    "CRLF and empty data": stream("data:\n\nid: 1\n\n", end="\r\n"),
    "no blank": stream("", before="data:"),
    "named events": stream("", before="event: message\nid: 5\ndata: "),
    "unknown fields": stream("x-field: 1\n\n"),
    "data in lines": stream("").replace(b', "delta"', b',\ndata: "delta"'),
    "a mark first": "\ufeff".encode() + b"\n\n" + stream(""),
}


@since("s01")
def test_event_streams_as_they_are_written(section: harness.Section, env: dict[str, str]):
    """What keeps a connection alive is no part of an answer, and ends none."""
    with Raw(list(STREAMS.values())) as server:
        env |= {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": server.url, "MODEL_ID": "m"}
        lines = "".join(f"say {name}\n" for name in STREAMS)
        done = harness.pipe(section, f"{lines}and what\n", env, timeout=60)
        history = server.requests[-1]["messages"]
    said = [m["content"] for m in history if m["role"] == "assistant"]
    assert dict(zip(STREAMS, said, strict=True)) == dict.fromkeys(STREAMS, KEPT)
    assert done.stdout.count(KEPT) == len(STREAMS) + 1 and "Error" not in done.stdout


@since("s01", until="s08")  # from s09 on it is tried again
def test_an_error_in_a_stream_is_told(section: harness.Section, env: dict[str, str]):
    for error in ({"message": "out of credit", "code": 402}, "out of credit"):
        text = f": ping\n\ndata: {chunk('Hel')}\n\ndata: {json.dumps({'error': error})}\n\n"
        with Raw([text.encode()]) as server:
            env |= {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": server.url, "MODEL_ID": "m"}
            done = harness.pipe(section, "hello\n", env)
        assert done.returncode == 1 and done.stdout.count("out of credit") == 1


THOUGHTS = {
    "plain": ["<think>I ponder.</think>Hi!"],
    "lines": ["<think>\nI ponder.\n</think>\n\nHi!"],
    "pieces": ["<", "th", "ink", ">", "I ", "ponder", "<", "/th", "ink", ">", "\n", "\n", "Hi!"],
    "two": ["<think>I ponder.</think> <think>I ponder.</think>Hi!"],
    "other words": ["<thinking>I ponder.</thinking>", "Hi!"],
    "brackets": [" [THINK]I ponder.[/THINK]", "Hi!"],
    "a tag in it": ["<think>I ponder a < b, <b>so</b>. </thin", "k>Hi!"],
    "blank first": ["\n", " ", "<think>I ponder.</think>Hi!"],
}
NO_THOUGHTS = ["<thin ice>", "  two blanks", "<", "a <think> tag", "[x] done", "`<think>`", "<b>hi"]


@since("s01")
def test_thoughts_in_tags_are_kept_out(section: harness.Section, fake_model: FakeModel):
    """Of the screen and of the history; what only looks like thoughts stays."""
    answers = [Text("", pieces=pieces) for pieces in THOUGHTS.values()]
    answers += [Text("", pieces=list(text)) for text in NO_THOUGHTS]
    fake_model.script("m", [*answers, Text("done")])
    lines = "say it\n" * (len(answers) + 1)
    done = harness.pipe(section, lines, fake_model.env("m"), timeout=60)
    assert "ponder" not in done.stdout and done.stdout.count("Hi!") == len(THOUGHTS)
    history = fake_model.chats[-1].messages
    said = [m["content"] for m in history if m["role"] == "assistant"]
    assert said == ["Hi!"] * len(THOUGHTS) + NO_THOUGHTS


@since("s01")
@pytest.mark.parametrize("thoughts", ["<think>I ponder.</think>\n\n", "<think>I ponder"])
def test_mere_thoughts_are_asked_once_more(
    section: harness.Section, fake_model: FakeModel, thoughts: str
):
    tries = 6 if section.label >= "s09" else 2  # then with pauses, as after any failure
    fake_model.script("m", [Text(thoughts), Text("Hi!"), *[Text(thoughts)] * tries, Text("Ho!")])
    done = harness.pipe(section, "one\n", fake_model.env("m"), timeout=60)
    assert done.returncode == 0 and "Hi!" in done.stdout and len(fake_model.chats) == 2
    done = harness.pipe(section, "two\n", fake_model.env("m"), timeout=60)
    assert "ponder" not in done.stdout and "the answer was empty" in done.stdout


@since("s03")
def test_thoughts_are_in_no_summary(section: harness.Section, fake_model: FakeModel):
    answers = [Text(f"answer {number}") for number in range(3)]
    summary = Text("<think>I ponder.</think>They greeted.")
    fake_model.script("m", [*answers, summary, Text("done")])
    done = harness.pipe(section, "one\ntwo\nthree\n/compact\nfour\n", fake_model.env("m"))
    told = json.dumps(fake_model.chats[-1].messages)
    assert "They greeted." in told and "ponder" not in told, done.stdout


@since("s07")
def test_a_thoughtful_heartbeat_tells_nobody(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "HEARTBEAT.md").write_text("- look at the door\n", encoding="utf-8")
    fake_model.script("m", [Text(f"<think>{'I ponder. ' * 70}</think>\nHEARTBEAT_OK")])
    with harness.Screen(section, fake_model.env("m")) as screen:
        screen.wait_for("you> ")
        screen.type("/trigger\n")
        fake_model.wait(1)
        deadline = time.monotonic() + 20
        while "nothing to tell" not in screen.text:
            assert time.monotonic() < deadline, screen.text
            screen.type("/heartbeat\n")
            screen.wait_for("the last beat: ")
        assert "ponder" not in screen.text


TURNS = {
    "empty": (["Noted: you like tea.", ""], "Noted: you like tea.", 2),
    "blank": (["Noted: you like tea.", " \n "], "Noted: you like tea.", 2),
    "thoughts": (["Noted: you like tea.", "<think>so</think>"], "Noted: you like tea.", 2),
    "a word": (["Noted: you like tea.", "Saved!"], "Noted: you like tea.\n\nSaved!", 2),
    "twice": (["First.", "Then.", ""], "First.\n\nThen.", 3),
    "silent": (["", "", "Saved!"], "Saved!", 3),
    "blank and silent": (["", "\n", "Saved!"], "Saved!", 3),
}


def turn(texts: Sequence[str], calls: int) -> list[Any]:
    """Answers of which the first ones call a tool."""
    call = [("read_file", {"path": "AGENTS.md"})]
    return [ToolCalls(call, text) if n < calls else Text(text) for n, text in enumerate(texts)]


@since("s02")
def test_all_texts_of_a_turn_are_the_answer(section: harness.Section, fake_model: FakeModel):
    """Seen at the terminal, and with the next question the history is one that servers take."""
    script = []
    for name, (texts, _, _) in TURNS.items():
        script += turn(texts, 2 if name == "twice" else 1)
    fake_model.script("m", [*script, Text("done")])
    done = harness.pipe(section, "go\n" * (len(TURNS) + 1), fake_model.env("m"), timeout=60)
    assert done.returncode == 0 and "empty" not in done.stdout, done.stdout
    assert len(fake_model.chats) == sum(count for _, _, count in TURNS.values()) + 1
    assert not fake_model.problems


@since("s04")
def test_people_elsewhere_get_all_texts_of_a_turn(section: harness.Section, fake_model: FakeModel):
    script = []
    for name, (texts, _, _) in TURNS.items():
        script += turn(texts, 2 if name == "twice" else 1)
    fake_model.script("m", script)
    with FakeTelegram() as telegram:
        env = fake_model.env(
            "m",
            TELEGRAM_BOT_TOKEN=telegram.token,
            TELEGRAM_BASE_URL=telegram.url,
            TELEGRAM_ALLOWED_CHATS="42",
        )
        with harness.Screen(section, env):
            for number, (_, told, _) in enumerate(TURNS.values(), 1):
                telegram.say("go", 42)
                telegram.until(lambda n=number: len(telegram.sent_to(42)) >= n, 20, "an answer")
                assert telegram.sent_to(42)[-1].text == told


@since("s05")
def test_the_web_gets_all_texts_of_a_turn(section: harness.Section, fake_model: FakeModel):
    fake_model.script("m", turn(["Noted: you like tea.", ""], 1))
    with ExitStack() as stack:
        screen = stack.enter_context(harness.Screen(section, fake_model.env("m")))
        link = screen.wait_for(re.compile(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)"))
        address = f"ws://127.0.0.1:{link[1]}/ws?token={link[2]}"
        client = stack.enter_context(connect(address, proxy=None))

        def until(fits: Callable[[dict], bool]) -> dict:
            while not fits(frame := json.loads(client.recv(20))):
                pass
            return frame

        ask = {"jsonrpc": "2.0", "method": "send", "params": {"text": "go", "peer": "ada"}, "id": 1}
        client.send(json.dumps(ask))
        said = until(lambda f: f.get("params", {}).get("role") == "assistant")
        assert said["params"]["text"] == "Noted: you like tea."
        about = {"method": "sessions.history", "params": {"peer": "ada"}, "id": 2}
        client.send(json.dumps({"jsonrpc": "2.0", **about}))
        told = until(lambda f: f.get("id") == 2)["result"]["messages"]
        assert [each["text"] for each in told] == ["go", "Noted: you like tea."]


@since("s02", until="s08")  # from s09 on it is tried again
def test_an_empty_answer_after_a_tool_is_asked_once_more(
    section: harness.Section, fake_model: FakeModel
):
    fake_model.script("m", [*turn(["", "", ""], 1), Text("done")])
    done = harness.pipe(section, "go\nand\n", fake_model.env("m"))
    assert "the answer was empty" in done.stdout and "done" in done.stdout
    assert len(fake_model.chats) == 4
