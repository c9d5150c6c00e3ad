"""Feishu as a channel (s04): who is believed, who is answered, and nothing is lost."""

import base64
import copy
import hashlib
import itertools
import json
import os
import random
import re
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fake_feishu
import harness
import pytest
from conversation import wait_until
from fake_feishu import SEND_PATH
from fake_feishu import TOKEN_PATH
from fake_feishu import Encoded
from fake_feishu import FakeFeishu
from fake_feishu import Sent
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Item
from fake_model import Text
from fake_model import ToolCalls
from harness import since

try:
    import resource
except ImportError:  # Windows has none
    resource = None

ON = re.compile(r"\[feishu\] on, at (http://127\.0\.0\.1:(\d+)/feishu/events)")
KEY = "an-encrypt-key"
GROUP = {"chat_type": "group"}
POST = "POST /feishu/events HTTP/1.1"
SEALED = pytest.mark.parametrize("encrypt_key", ["", KEY], ids=["plain", "encrypted"])


class Bench:
    """A section at a terminal, Feishu on its other side, and a scripted model."""

    def __init__(self, section: harness.Section, model: FakeModel, feishu: FakeFeishu):
        self.section, self.model, self.feishu = section, model, feishu
        self.gate = threading.Event()
        self.hook = ""
        self.screens: list[harness.Screen] = []
        model.script("brain", [self.answer], repeat=True)

    def answer(self, body: dict) -> Item:
        """Do what the last user message says, without the name in front of it."""
        messages = body["messages"]
        last = [m["content"] for m in messages if m["role"] == "user"][-1]
        words = re.sub(r"^\[\S+\] ", "", last)
        verb, _, rest = words.partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {words}"))
        if verb == "count":
            return Text(f"heard {len(words)} characters")
        if verb == "fail":
            return Error(422)
        if verb == "repeat":
            text = rest[:1] * int(rest[1:])
            return Text(text, pieces=[text])
        if verb == "bash" and messages[-1]["role"] != "tool":
            return ToolCalls([("bash", {"command": rest})])
        return Text(f"heard {words}")

    def settings(self, account: str = "", **more: str) -> dict:
        """The settings of one account; `more` are others, by their short names."""
        feishu = self.feishu
        names = {
            "APP_ID": feishu.app_id,
            "APP_SECRET": feishu.app_secret,
            "DOMAIN": feishu.url,
            "PORT": "0",
            "VERIFICATION_TOKEN": feishu.verification_token,
            "ENCRYPT_KEY": feishu.encrypt_key,
            "ALLOWED_CHATS": "ou_alice, oc_group,",
        }
        names |= more
        suffix = f"_{account}".upper() if account else ""
        return {f"FEISHU_{name}{suffix}": value for name, value in names.items()}

    def start(self, fsize: int | None = None, **env: str) -> harness.Screen:
        """Start a process at a terminal. It is ended with the test at the latest."""
        env = self.model.env("brain", **env)
        screen = harness.Screen(self.section, env, fsize=fsize)
        self.screens.append(screen)
        return screen

    def up(self, **more: str) -> harness.Screen:
        """Start a process, and wait until it listens to Feishu."""
        screen = self.start(**self.settings(**more))
        self.hook = screen.wait_for(ON)[1]
        return screen

    def push(self, event: dict | Encoded, forge: str = "") -> int:
        """Post an event. Returns the status of the answer; Feishu waits 3 s for one."""
        response = self.feishu.push(self.hook, event, timeout=3, forge=forge)
        assert response.status, response
        return response.status

    def ask(self, text: str, **fields: Any) -> Sent:
        """Post a message, and return what is sent after it."""
        count = len(self.feishu.sent)
        assert self.push(self.feishu.event(text, **fields)) == 200
        return self.feishu.wait_sent(count + 1, 20)[count]

    @property
    def questions(self) -> list[str]:
        """What the model was asked, in order."""
        found = []
        for request in self.model.chats:
            if request.messages[-1]["role"] == "user":
                found.append(request.messages[-1]["content"])
        return found

    @property
    def answers(self) -> list[str]:
        """What has been sent, in order."""
        return [sent.text for sent in self.feishu.sent]

    @property
    def sends(self) -> list[fake_feishu.Call]:
        """The requests to send a message, with those that were refused."""
        return [call for call in self.feishu.calls if call.path == SEND_PATH]


@pytest.fixture
def encrypt_key() -> str:
    """The encrypt key; a test may parametrize it."""
    return KEY


@pytest.fixture
def bench(
    section: harness.Section, workspace: Path, fake_model: FakeModel, encrypt_key: str
) -> Iterator[Bench]:
    """Whatever a test does: no traceback, no secret in sight, Feishu is content."""
    with FakeFeishu(encrypt_key, "a-verification-token") as feishu:
        feishu.app_secret = "an-app-secret"
        bench = Bench(section, fake_model, feishu)
        yield bench
        bench.gate.set()
        for screen in bench.screens:
            screen.close()
    printed = "\n".join(screen.raw for screen in bench.screens)
    assert "Traceback" not in printed, harness.plain(printed)
    for secret in ("an-app-secret", "a-verification-token", KEY):
        assert secret not in printed, harness.plain(printed)
        for file in workspace.rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    assert not feishu.problems


def lines(screen: harness.Screen, *parts: str) -> list[str]:
    """The lines on the screen that contain all of these."""
    shown = screen.paper.splitlines()
    return [line for line in shown if all(part in line for part in parts)]


def encrypted(feishu: FakeFeishu, data: bytes) -> Encoded:
    """Any bytes as an event: if there is a key, encrypted and well signed."""
    if not feishu.encrypt_key:
        return data, {}
    secret = base64.b64encode(fake_feishu.encrypt(feishu.encrypt_key, data)).decode()
    return signed(feishu, json.dumps({"encrypt": secret}).encode())


def signed(feishu: FakeFeishu, body: bytes) -> Encoded:
    """A body as it is, well signed."""
    stamp = str(int(time.time()))
    text = f"{stamp}nonce{feishu.encrypt_key}".encode() + body
    headers = {
        "X-Lark-Request-Timestamp": stamp,
        "X-Lark-Request-Nonce": "nonce",
        "X-Lark-Signature": hashlib.sha256(text).hexdigest(),
    }
    return body, headers


def without(event: dict, path: str) -> dict:
    """An event that lacks a field."""
    event = copy.deepcopy(event)
    *parents, name = path.split(".")
    place = event
    for parent in parents:
        place = place[parent]
    del place[name]
    return event


def changed(event: dict, path: str, value: Any) -> dict:
    """An event with another value in a field."""
    event = copy.deepcopy(event)
    *parents, name = path.split(".")
    place = event
    for parent in parents:
        place = place[parent]
    place[name] = value
    return event


def connect(hook: str, data: bytes) -> socket.socket:
    """A connection to the webhook that has sent some bytes."""
    parts = urlsplit(hook)
    connection = socket.create_connection((parts.hostname, parts.port), 10)
    connection.sendall(data)
    return connection


def status_of(hook: str, head: str, body: bytes = b"") -> int:
    """The status of the answer to a request; 0 if there is none."""
    data = f"{head}\r\nHost: localhost\r\n\r\n".encode() + body
    with connect(hook, data) as connection, suppress(ConnectionResetError):
        answer = connection.recv(100)
        return int(answer.split()[1]) if answer else 0
    return 0


# --- who is believed ---

MESSAGE_FIELDS = ["message_id", "chat_type", "message_type", "content"]
SENDER_FIELDS = ["sender_id", "sender_id.open_id", "sender_type"]
REQUIRED = ["event", "event.message", "event.sender", "header", "header.token"]
REQUIRED += ["header.event_type"]
REQUIRED += [f"event.message.{name}" for name in MESSAGE_FIELDS]
REQUIRED += [f"event.sender.{name}" for name in SENDER_FIELDS]
CONTENTS = ["no JSON", "[]", '"x"', "{}", '{"text": 5}', '{"text": null}', 5, None]
POSTS = ['{"content": 5}', '{"content": [5]}', '{"content": [[5]]}', "{}"]
MENTIONS = [5, "x", [5], [None], [{}], [{"key": 5, "id": 5, "name": 5}]]
BODIES = [b"", b"{}", b"[]", b"5", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000]
BODIES += [b"1" * 5000, b'{"header": []}', b'{"type": "url_verification"}']
CIPHERTEXTS = ["", "AAAA", "%%%", "\u00e9", 5, None, [], {}]


@since("s04")
@SEALED
def test_a_challenge_is_answered_only_with_the_token(bench: Bench):
    bench.up()
    feishu = bench.feishu
    challenge = feishu.challenge()
    response = feishu.push(bench.hook, challenge)
    assert (response.status, response.json) == (
        200,
        {"challenge": challenge["challenge"]},
    )
    forgeries = ["token", "json"]
    if feishu.encrypt_key:
        forgeries += ["plain", "key", "padding", "base64"]
    for forge in forgeries:
        response = feishu.push(bench.hook, challenge, forge=forge)
        assert response.status in (400, 401), forge
        assert challenge["challenge"] not in response.body, forge
    assert feishu.push(bench.hook, challenge, forge="token").status == 401
    for field in ("token", "challenge"):
        assert bench.push(without(challenge, field)) == 400


@since("s04")
@SEALED
def test_nobody_else_is_believed(bench: Bench):
    """What is forged, stale or malformed is refused at once, and reaches no model."""
    screen = bench.up()
    feishu = bench.feishu
    good = feishu.event("forged")
    refused = [(good, "token", 401), (good, "json", 400)]
    requests = []
    if feishu.encrypt_key:
        for forge in ("signature", "unsigned", "body", "stale", "plain"):
            refused.append((good, forge, 401))
        for forge in ("key", "padding", "base64"):
            refused.append((good, forge, 400))
        requests += forged_signatures(feishu, good)
        for ciphertext in CIPHERTEXTS:
            body = json.dumps({"encrypt": ciphertext}).encode()
            requests.append(signed(feishu, body))
    for event, forge, status in refused:
        assert bench.push(event, forge) == status, forge
    for body in BODIES:
        requests.append((body, {}))
        requests.append(encrypted(feishu, body))
    for request in requests:
        assert bench.push(request) in (400, 401), request
    for event in malformed_events(good):
        request = encrypted(feishu, json.dumps(event).encode())
        assert bench.push(request) < 500, event
    assert bench.ask("good").text == "heard good"
    assert bench.questions == ["good"]
    assert lines(screen, "refused"), screen.paper


def forged_signatures(feishu: FakeFeishu, event: dict) -> list[Encoded]:
    """An event of the future, and one whose signature lacks or spoils a part."""
    found = [feishu.encode(event, timestamp=time.time() + fake_feishu.STALE)]
    body, headers = feishu.encode(event)
    for name in headers:
        if name.startswith("X-Lark"):
            rest = {key: value for key, value in headers.items() if key != name}
            found.append((body, rest))
    for timestamp in ("", "x", "nan"):
        found.append((body, headers | {"X-Lark-Request-Timestamp": timestamp}))
    found.append((body, headers | {"X-Lark-Signature": "\u00e9"}))
    return found


def malformed_events(good: dict) -> list[dict]:
    """Events that lack a field, or have one of another type."""
    found = [without(good, path) for path in REQUIRED]
    typed = set(REQUIRED) - {"event.message.message_id", "event.message.message_type"}
    for path in sorted(typed):
        found += [changed(good, path, value) for value in (None, 5, [], "")]
    for value in CONTENTS:
        found.append(changed(good, "event.message.content", value))
    post = changed(good, "event.message.message_type", "post")
    for value in POSTS:
        found.append(changed(post, "event.message.content", value))
    for value in MENTIONS:
        found.append(changed(good, "event.message.mentions", value))
    return found


@since("s04")
def test_strangers_requests_do_not_fill_the_terminal(bench: Bench):
    """Many requests that are refused for the same reason make one line."""
    screen = bench.up()
    for number in range(20):
        body = json.dumps({"encrypt": f"forged {number}"}).encode()
        assert bench.push((body, {})) in (400, 401)
        assert bench.push((f"no JSON {number}".encode(), {})) == 400
    assert bench.ask("good").text == "heard good"
    assert 1 <= len(lines(screen, "refused")) <= 4, screen.paper
    assert "pydantic" not in screen.paper


@since("s04")
def test_encrypted_events_need_the_key_and_plain_ones_none(bench: Bench):
    screen = bench.up(ENCRYPT_KEY="")
    for _ in range(3):
        assert bench.push(bench.feishu.event("encrypted")) == 401
    screen.wait_for("ENCRYPT_KEY")
    assert len(lines(screen, "ENCRYPT_KEY")) == 1
    bench.feishu.encrypt_key = ""
    assert bench.ask("plain").text == "heard plain"
    screen.close()
    screen = bench.up(ENCRYPT_KEY=KEY)
    assert bench.push(bench.feishu.event("plain")) == 401
    assert bench.push(bench.feishu.challenge()) == 401
    screen.wait_for("ENCRYPT_KEY")
    bench.feishu.encrypt_key = KEY
    assert bench.ask("encrypted").text == "heard encrypted"
    assert bench.questions == ["plain", "encrypted"]


@since("s04")
def test_requests_that_are_no_requests(bench: Bench):
    """Other paths, methods and sizes, half requests, and clients that hang up."""
    bench.up()
    event = bench.feishu.event("no")
    for path in ("/", "/feishu", "/feishu/events/more", "/x?/feishu/events"):
        hook = bench.hook.replace("/feishu/events", path)
        assert bench.feishu.push(hook, event).status == 404, path
    body, headers = bench.feishu.encode(event)
    fields = "".join(f"\r\n{name}: {value}" for name, value in headers.items())
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        head = f"{method} /feishu/events HTTP/1.1\r\nContent-Length: {len(body)}"
        assert status_of(bench.hook, head + fields, body) in (404, 405), method
    for length in ("-5", "x", "0", "9" * 5000, "1000001", ""):
        head = f"{POST}\r\nContent-Length: {length}{fields}"
        assert status_of(bench.hook, head) in (400, 411, 413), length
    assert status_of(bench.hook, POST + fields) in (400, 411, 413)
    chunked = f"{POST}\r\nTransfer-Encoding: chunked{fields}"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    assert status_of(bench.hook, chunked, chunks) in (400, 411, 413)
    huge = f"{POST}\r\nX-Huge: {'x' * 200_000}{fields}\r\nContent-Length: {len(body)}"
    with suppress(OSError):  # it may hang up before all has been sent
        assert status_of(bench.hook, huge, body) in (0, 400, 413, 431)
    large = bench.feishu.event("x" * 650_000, open_id="ou_stranger")
    assert bench.push(large) == 200  # it has a stranger's message, and is not too long
    halves = [connect(bench.hook, f"{POST}\r\nContent-Length: 99\r\n\r\n{{".encode())]
    halves += [connect(bench.hook, b"POST /fei") for _ in range(20)]
    assert bench.ask("while they hang").text == "heard while they hang"
    head = f"{POST}\r\nContent-Length: {len(body)}{fields}\r\n\r\n".encode()
    halves += [connect(bench.hook, head + body[:-9]) for _ in range(5)]
    halves += [connect(bench.hook, head + body) for _ in range(5)]
    bench.feishu.wait_sent(2)  # the answer to what five clients have sent in full
    for half in halves:
        hang_up(half)
    assert bench.ask("after that").text == "heard after that"
    assert bench.questions == ["while they hang", "no", "after that"]


def hang_up(connection: socket.socket) -> None:
    """End a connection with a reset, as a client that has died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- who holds connections ---


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Let this process have so many files open; the section keeps its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, count), hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def crowd(stack: ExitStack, hook: str, count: int, data: bytes) -> list[socket.socket]:
    """So many connections that have sent a part of a request.

    A whole request now and then is answered. Before that, the section has taken all
    connections that wait at its port, so that their queue is never full.
    """
    parts = urlsplit(hook)
    connections = []
    for number in range(count):
        connection = socket.create_connection((parts.hostname, parts.port), 10)
        connections.append(stack.enter_context(connection))
        with suppress(OSError):  # of one that was cut off at once
            connection.sendall(data)
        if number % 50 == 49:
            assert status_of(hook, "GET / HTTP/1.1") == 404
    return connections


def drip(connections: list[socket.socket]) -> list[socket.socket]:
    """Send a byte more on each connection. Returns those that are still open."""
    still_open = []
    for connection in connections:
        connection.setblocking(False)
        with suppress(ConnectionError):
            connection.send(b"x")
            try:
                if not connection.recv(1):
                    continue
            except BlockingIOError:
                pass
            still_open.append(connection)
    return still_open


def count_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


@since("s04")
@pytest.mark.costly
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files in /proc")
def test_slow_requests_hold_nobody_up(bench: Bench):
    """1,010 dripping requests and 1,000 silent connections: all else works."""
    screen = bench.up()
    idle = count_files(screen.pid)
    head = f"{POST}\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{{".encode()
    with many_files(4096), ExitStack() as stack:
        dripping = crowd(stack, bench.hook, 1010, head)
        assert count_files(screen.pid) < idle + 600
        drip(dripping)
        assert bench.ask("one").text == "heard one"
        crowd(stack, bench.hook, 500, b"")
        crowd(stack, bench.hook, 500, f"{POST}\r\nHost: ".encode())
        assert count_files(screen.pid) < idle + 600
        assert bench.ask("two").text == "heard two"
        screen.type("hello\n")
        screen.wait_for("heard hello")
        wait_until(lambda: count_files(screen.pid) < idle + 110)
    wait_until(lambda: count_files(screen.pid) < idle + 10)
    assert bench.ask("three").text == "heard three"


# --- answered once, and Feishu at once ---


@since("s04")
def test_a_question_is_answered_once(bench: Bench):
    """Replayed, pushed again under other ids, after a kill, and after a restart."""
    bench.up()
    feishu = bench.feishu
    first = feishu.event("first")
    message_id = first["event"]["message"]["message_id"]
    event_id = first["header"]["event_id"]
    replayed = feishu.encode(first)
    again = [replayed, first, feishu.event("again", message_id=message_id)]
    same_id = feishu.event("again", event_id=event_id, message_id=message_id)
    again += [replayed, same_id]
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(bench.push, [first] * 60)) == {200}
    for event in again:
        assert bench.push(event) == 200
    feishu.wait_sent(1)
    waiting = [feishu.event(f"wait {number}") for number in range(3)]
    for event in [*waiting, waiting[2], *again]:
        assert bench.push(event) == 200  # at once, though the model works
    bench.model.wait(2)
    bench.screens[-1].kill()
    bench.up()
    for event in [*again, *waiting]:
        assert bench.push(event) == 200
    bench.gate.set()
    assert bench.push(feishu.event("last")) == 200
    feishu.wait_sent(5)
    bench.screens[-1].type("quit\n")
    assert bench.screens[-1].wait_exit() == 0
    bench.up()
    for event in [*again, *waiting]:
        assert bench.push(event) == 200
    assert bench.ask("end").text == "heard end"
    texts = ["first", "wait 0", "wait 1", "wait 2", "last", "end"]
    assert bench.answers == [f"heard {text}" for text in texts]
    messages = bench.model.chats[-1].messages
    assert [m["content"] for m in messages if m["role"] == "user"] == texts


@since("s04")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_what_cannot_be_stored_is_not_taken(bench: Bench):
    """Feishu hears of the failure, brings the message again, and it is answered."""
    screen = bench.start(fsize=300_000, **bench.settings())
    bench.hook = screen.wait_for(ON)[1]
    event = bench.feishu.event("count " + "x" * 400_000)
    for _ in range(2):
        assert bench.push(event) == 500
    screen.wait_for(re.compile(r"\[feishu\] .*not be stored"))
    assert bench.ask("small").text == "heard small"
    screen.close()
    bench.up()
    assert bench.push(event) == 200
    bench.feishu.wait_sent(2)
    assert bench.answers == ["heard small", "heard 400006 characters"]


@since("s04")
def test_answers_that_were_not_sent_before_the_end(bench: Bench, workspace: Path):
    """They are sent after a restart, and the model is not asked again."""
    screen = bench.up()
    bench.feishu.down()
    for text in ("one", "two"):
        assert bench.push(bench.feishu.event(text)) == 200
    wait_until(lambda: count_unsent(workspace) == 2)
    screen.kill()
    bench.feishu.up()
    bench.up()
    bench.feishu.wait_sent(2)
    assert bench.ask("next").text == "heard next"
    assert bench.answers == ["heard one", "heard two", "heard next"]
    assert bench.questions == ["one", "two", "next"]


def count_unsent(workspace: Path) -> int:
    """How many answers are on disk, and have not been sent."""
    query = "SELECT count(*) FROM inbox WHERE answer IS NOT NULL AND done IS NULL"
    with closing(sqlite3.connect(workspace / ".state" / "gateway.db")) as database:
        return database.execute(query).fetchone()[0]


@since("s04")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_what_is_kept_is_the_owners_alone(bench: Bench, workspace: Path):
    """Nobody else on the machine can read what was said, also with umask 022."""
    before = os.umask(0o022)
    try:
        bench.up()
    finally:
        os.umask(before)
    assert bench.ask("a secret").text == "heard a secret"
    kept = []
    for path in workspace.rglob("*"):
        if path.is_file() and b"a secret" in path.read_bytes():
            kept.append(path)
            assert is_private(path, workspace), path
    names = {path.suffix for path in kept}
    assert {".jsonl", ".db-wal"} <= names, kept
    for path in (workspace / ".state").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def is_private(path: Path, workspace: Path) -> bool:
    """Whether only the owner can read a file: by its mode, or by that of a folder."""
    while path != workspace:
        if stat.S_IMODE(path.stat().st_mode) & 0o077 == 0:
            return True
        path = path.parent
    return False


# --- who is answered, and where ---


@since("s04")
def test_private_chats_and_groups(bench: Bench):
    bench.up()
    feishu = bench.feishu
    sent = bench.ask("hello", mentions="null")
    assert (sent.receive_id_type, sent.receive_id) == ("open_id", "ou_alice")
    assert sent.text == "heard hello"
    sent = bench.ask("hello", mentions="bot", **GROUP)
    assert (sent.receive_id_type, sent.receive_id) == ("chat_id", "oc_group")
    assert sent.text == "heard hello"
    assert "ou_alice" in bench.questions[-1]  # the model knows who has said it
    everyone = {"key": "@_all", "id": {}, "name": "Everyone"}
    for mentions in (None, "null", "all", [], ["ou_bob"], [everyone]):
        event = feishu.event("not for it", mentions=mentions, **GROUP)
        assert bench.push(event) == 200
    read = feishu.event("read")
    read["header"]["event_type"] = "im.message.message_read_v1"
    from_app = feishu.event("from an app", sender_type="app")
    from_app_in_group = feishu.event(
        "from an app", mentions="bot", sender_type="app", **GROUP
    )
    for event in (read, from_app, from_app_in_group):
        assert bench.push(event) == 200
    assert bench.ask("end").text == "heard end"
    assert len(feishu.sent) == len(bench.questions) == 3


@since("s04")
def test_mentions_have_names(bench: Bench):
    """The bot's own is left out, so that a command behind it is one."""
    bench.up()
    mention = bench.feishu.mention
    people = [mention("bot", 1), mention("ou_bob", 2), mention("ou_zed", 11)]
    text = "@_user_1 ask @_user_2, @_user_11 and @_all"
    answer = bench.ask(text, mentions=people, **GROUP).text
    assert answer == "heard ask @Bob, @Zed and @_all"
    answer = bench.ask("@_user_1\u4f60\u597d", mentions="bot", **GROUP).text
    assert answer == "heard \u4f60\u597d"
    assert bench.ask("@_user_1", mentions="bot", **GROUP).text
    assert "session" in bench.ask("@_user_1 /new", mentions="bot", **GROUP).text
    post = {"message_type": "post", **GROUP}
    answer = bench.ask("@_user_1 look, @_user_2", mentions=people[:2], **post).text
    assert answer == "heard look, @Bob"
    assert "session" in bench.ask("@_user_1 /new", mentions="bot", **post).text
    assert not [text for text in bench.questions if "_user_" in text]


@since("s04")
@pytest.mark.parametrize("locale", ["", "zh_cn"])
def test_posts_come_with_all_that_is_in_them(bench: Bench, locale: str):
    bench.up()
    content = {locale: fake_feishu.RICH_POST} if locale else fake_feishu.RICH_POST
    post = {"message_type": "post", "content": json.dumps(content)}
    people = [bench.feishu.mention("ou_bob", 1)]
    bench.ask("", mentions=people, **post)
    shown = bench.questions[-1].splitlines()
    assert shown[0] == "The plan"
    assert shown[1].startswith("Read this (https://example.org/plan) with @Bob")
    assert "emo" in shown[1] or "SMILE" in shown[1]
    for line, word in zip(shown[2:4], ["img", "media"], strict=True):
        assert word in line and "cannot see" in line
    assert "print(1)" in shown
    assert bench.ask("one\ntwo", message_type="post").text == "heard one\ntwo"


@since("s04")
def test_what_the_model_cannot_see_is_named(bench: Bench):
    """Pictures, files and voices: the model is told that they are there."""
    bench.up()
    for kind in ("image", "file", "audio", "media", "sticker", "share_chat"):
        bench.ask("", message_type=kind)
        assert kind in bench.questions[-1], kind
        assert "cannot see" in bench.questions[-1]
    files = [text for text in bench.questions if "a.pdf" in text or "a.mp4" in text]
    assert len(files) == 2


@since("s04")
def test_strangers(bench: Bench):
    """No answer, no question; the terminal shows once which id may be allowed."""
    screen = bench.up()
    feishu = bench.feishu
    for _ in range(2):
        assert bench.push(feishu.event("let me in", open_id="ou_stranger")) == 200
        event = feishu.event("let us in", mentions="bot", chat_id="oc_strange", **GROUP)
        assert bench.push(event) == 200
        event = feishu.event("x", open_id="ou_\x1b[31mred\x07\u202e\nline")
        assert bench.push(event) == 200
    assert bench.ask("hi \x1b]0;owned\x07\x1b[2J").text
    assert len(bench.questions) == len(feishu.sent) == 1
    assert len(lines(screen, "oc_strange")) == 1
    assert len(lines(screen, "ou_stranger")) == 1
    for code in ("\x1b[31m", "\x1b]0", "\x1b[2J", "\x07", "\u202e"):
        assert code not in screen.raw
    screen.close()
    screen = bench.up(ALLOWED_CHATS="")
    assert bench.push(feishu.event("me", open_id="ou_alice")) == 200
    screen.wait_for("ou_alice")
    screen.type("at the terminal\n")
    screen.wait_for("heard at the terminal")
    assert len(bench.questions) == 2 and len(feishu.sent) == 1


@since("s04")
def test_commands_and_a_turn_that_fails(bench: Bench):
    """The person is told, the next question works; what is no command is explained."""
    screen = bench.up()
    assert "422" in bench.ask("fail").text
    assert bench.ask("one").text == "heard one"
    assert "session" in bench.ask("/new").text
    assert bench.ask("two").text == "heard two"
    assert len(bench.ask("/list").text.splitlines()) == 2
    assert "/switch" in bench.ask("/help").text
    assert "/new" in bench.ask("/quit").text
    assert screen.process.poll() is None
    histories = []
    for request in bench.model.chats:
        messages = request.messages
        histories.append([m["content"] for m in messages if m["role"] == "user"])
    # A call may be tried again.
    told = [history for history, _ in itertools.groupby(histories)]
    assert told == [["fail"], ["one"], ["two"]]


# --- answers on their way ---


@since("s04")
def test_an_answer_that_is_long(bench: Bench):
    """It comes in parts, in order and whole, though one of them needs two tries."""
    bench.up()
    feishu = bench.feishu
    bench.ask("repeat \u957f20000")
    wait_until(lambda: "".join(bench.answers) == "\u957f" * 20_000)
    assert len(feishu.sent) > 1
    feishu.sent.clear()
    feishu.fail(SEND_PATH, 503, "<html>busy</html>", accepted=True)
    bench.ask("repeat \U0001f60020000")
    wait_until(lambda: len("".join(bench.answers)) >= 20_000)
    assert "".join(bench.answers) == "\U0001f600" * 20_000
    assert {sent.receive_id for sent in feishu.sent} == {"ou_alice"}


@since("s04")
def test_the_token_is_kept_and_renewed(bench: Bench):
    bench.up()
    feishu = bench.feishu

    def refused() -> int:
        return [call.status for call in feishu.calls].count(400)

    for number in range(5):
        bench.ask(f"question {number}")
    assert (feishu.token_requests, refused()) == (1, 0)
    feishu.expire_seconds = 600  # a token that is used up to ten minutes before its end
    feishu.expire_token()
    assert bench.ask("refused").text == "heard refused"
    assert (feishu.token_requests, refused()) == (2, 1)
    assert bench.ask("in time").text == "heard in time"
    assert (feishu.token_requests, refused()) == (3, 1)
    feishu.expire_seconds = 3600
    for number in range(3):
        bench.ask(f"again {number}")
    assert (feishu.token_requests, refused()) == (4, 1)
    assert len(feishu.sent) == 10


@since("s04")
@pytest.mark.costly
def test_rate_limits_are_waited_out(bench: Bench):
    """The platform notes whoever sends before the time that it has named."""
    bench.up()
    feishu = bench.feishu
    for seconds, style in ((1.3, "429"), (1.3, "400"), (1, "230020")):
        feishu.rate_limit(1, seconds, style)
        assert bench.ask(style).text == f"heard {style}"
    assert len(bench.answers) == 3 and len(bench.sends) == 6


@since("s04")
def test_what_is_refused_for_good_is_told_once(bench: Bench):
    """Nobody else waits, and it is not tried again after a restart."""
    screen = bench.up(ALLOWED_CHATS="ou_alice ou_bob")
    feishu = bench.feishu
    for code, status in ((230002, 400), (230022, 200), (230013, 400)):
        before = len(bench.sends)
        feishu.fail(SEND_PATH, status, {"code": code, "msg": "never"})
        assert bench.push(feishu.event(f"refused {code}")) == 200
        screen.wait_for(re.compile(rf"\[feishu\] .*{code} never"))
        assert bench.ask("next", open_id="ou_bob").text == "heard next"
        assert bench.ask("next").text == "heard next"
        assert len(bench.sends) == before + 3
        assert len(lines(screen, f"{code} never")) == 1
    screen.close()
    bench.up()
    assert bench.ask("end").text == "heard end"
    assert len(bench.answers) == 7


@since("s04")
@pytest.mark.costly
def test_trouble_with_the_network(bench: Bench):
    """Errors that pass, lost connections, odd answers: sent in the end, and once."""
    people = [f"ou_person{number}" for number in range(5)]
    bench.up(ALLOWED_CHATS=" ".join(people))
    feishu = bench.feishu
    feishu.fail(SEND_PATH, 502, "<html>bad gateway</html>")
    feishu.fail(SEND_PATH, 500, {"code": 1000, "msg": "internal"}, accepted=True)
    feishu.fail(SEND_PATH, 200, "<html>a portal</html>")
    feishu.drop(part=SEND_PATH)
    feishu.drop(part=SEND_PATH, accepted=True)
    for who in people:
        assert bench.push(feishu.event(f"first of {who}", open_id=who)) == 200
    wait_until(lambda: len(bench.sends) == 10, 20)
    for who in people:
        answer = bench.ask(f"second of {who}", open_id=who).text
        assert answer == f"heard second of {who}"
        answers = [sent.text for sent in feishu.sent if sent.receive_id == who]
        assert answers == [f"heard first of {who}", answer]
        sends = [call.body for call in bench.sends if call.body["receive_id"] == who]
        keys = [send["uuid"] for send in sends]
        assert keys[0] == keys[1] != keys[2] and len(keys) == 3


@since("s04")
@pytest.mark.costly
def test_an_answer_to_a_token_request_that_makes_no_sense(bench: Bench):
    """The channel lives on, whatever it is given in place of a token."""
    bench.up()
    answers = [{"code": 0}, {"code": 0, "tenant_access_token": None}, [], 5]
    for number, answer in enumerate(answers):
        bench.feishu.expire_token()
        bench.feishu.fail(TOKEN_PATH, 200, answer)
        before = bench.feishu.token_requests
        assert bench.push(bench.feishu.event(f"first {number}")) == 200
        wait_until(lambda n=before: bench.feishu.token_requests > n)
        assert bench.push(bench.feishu.event(f"second {number}")) == 200
        wait_until(lambda n=number: f"heard second {n}" in bench.answers, 20)
    assert len(bench.answers) == len(set(bench.answers))


@since("s04")
@pytest.mark.costly
def test_no_platform_at_the_start(bench: Bench):
    """One line says so, the terminal works, and the channel begins when it can."""
    feishu = bench.feishu
    feishu.down()
    screen = bench.start(**bench.settings())
    screen.wait_for(re.compile(r"\[feishu\] (?!on).*trying again"))
    screen.type("still here\n")
    screen.wait_for("heard still here")
    feishu.up()
    bench.hook = screen.wait_for(ON, 20)[1]
    assert len(lines(screen, "[feishu]")) == 2
    assert bench.ask("hello").text == "heard hello"


@since("s04")
@pytest.mark.costly
def test_what_hangs_has_an_end(bench: Bench):
    """A send without an answer is tried again, and a request without end is cut off."""
    bench.up(ALLOWED_CHATS="ou_alice ou_bob")
    feishu = bench.feishu
    feishu.hang(15, part=SEND_PATH)
    assert bench.push(feishu.event("slow")) == 200
    wait_until(lambda: bench.sends)
    assert bench.push(feishu.event("after it")) == 200
    bench.model.wait(2)
    with ExitStack() as stack:
        dripping = []
        body = f"{POST}\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{{".encode()
        for data in (b"", body[:30], body):
            dripping += crowd(stack, bench.hook, 1, data)
        assert bench.ask("another", open_id="ou_bob").text == "heard another"
        deadline = time.monotonic() + 30
        while drip(dripping):
            assert time.monotonic() < deadline, "a connection is still open"
            time.sleep(0.1)
    wait_until(lambda: len(bench.sends) == 4, 30)
    feishu.wait_sent(3)
    assert bench.answers == ["heard slow", "heard another", "heard after it"]


@since("s04")
def test_recipients_do_not_wait_for_each_other(bench: Bench):
    """Each of 20 sends takes 3 s, yet all are on their way at the same time."""
    people = [f"ou_person{number}" for number in range(20)]
    bench.up(ALLOWED_CHATS=" ".join(people))
    feishu = bench.feishu
    feishu.hang(3, times=20, part=SEND_PATH)
    with ThreadPoolExecutor(20) as pool:
        events = [feishu.event(f"for {who}", open_id=who) for who in people]
        assert set(pool.map(bench.push, events)) == {200}
    feishu.wait_sent(20, 30)  # one after the other, they would take a minute
    told = {(sent.receive_id, sent.text) for sent in feishu.sent}
    assert told == {(who, f"heard for {who}") for who in people}


# --- settings ---


@since("s04")
def test_accounts_that_cannot_work(bench: Bench):
    """Each says so in a line, names no secret, and leaves the others alone."""
    taken = socket.create_server(("127.0.0.1", 0))
    wrong = {
        "notoken": {"VERIFICATION_TOKEN": ""},
        "nosecret": {"APP_SECRET": ""},
        "wrong": {"APP_SECRET": "an-app-secret of others"},
        "nobody": {"APP_ID": "cli_nobody"},
        "taken": {"PORT": str(taken.getsockname()[1])},
        "word": {"PORT": "abc"},
        "large": {"PORT": "99999"},
        "nowhere": {"DOMAIN": "http://127.0.0.1:1"},
        "address": {"DOMAIN": "https://open.feishu.cn:port"},
    }
    env = bench.settings()
    for account, settings in wrong.items():
        env |= bench.settings(account, **settings)
    screen = bench.start(**env)
    bench.hook = screen.wait_for(ON, 20)[1]
    for account in wrong:
        wait_until(lambda name=account: lines(screen, f"feishu {name}"))
        assert len(lines(screen, f"feishu {account}")) == 1
    for account in ("notoken", "nosecret", "taken", "word", "large", "address"):
        assert lines(screen, f"feishu {account}", "off"), account
    assert lines(screen, "notoken", "VERIFICATION_TOKEN")
    assert lines(screen, "nosecret", "APP_SECRET")
    assert lines(screen, "taken", "in use")
    assert lines(screen, "word", "abc") and lines(screen, "large", "99999")
    for account in ("wrong", "nobody", "nowhere"):
        assert lines(screen, f"[feishu {account}] ", "trying again"), account
    taken.close()
    screen.type("hello\n")
    screen.wait_for("heard hello")
    assert bench.ask("hello there").text == "heard hello there"


@since("s04")
def test_an_error_that_repeats_the_secret(bench: Bench):
    """The terminal says what went wrong, and not the secret."""
    error = {"code": 10014, "msg": "the secret an-app-secret is invalid"}
    bench.feishu.fail(TOKEN_PATH, 200, error)
    screen = bench.start(**bench.settings())
    screen.wait_for(re.compile(r"\[feishu\] .*10014 the secret .* is invalid"))


@since("s04")
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_networks_in_no_proxy(bench: Bench, name: str):
    """What httpx cannot read is no reason to be off; what it can read still holds."""
    env = {name: "[::1],fe80::/10, 127.0.0.1,localhost"}
    env["HTTP_PROXY"] = env["http_proxy"] = "http://127.0.0.1:1"
    screen = bench.start(**bench.settings(), **env)
    bench.hook = screen.wait_for(ON)[1]
    assert bench.ask("hello").text == "heard hello"


@since("s04")
def test_questions_at_the_very_start(bench: Bench):
    """What was left over is answered, and the terminal does not wait for Feishu."""
    env = bench.model.env("brain", **bench.settings())
    done = harness.pipe(bench.section, "hello\nquit\n", env)
    assert "heard hello" in done.stdout, done
    bench.up()
    assert bench.push(bench.feishu.event("wait 1")) == 200
    bench.model.wait(2)
    bench.screens[-1].kill()
    bench.gate.set()
    done = harness.pipe(bench.section, "hello again\nquit\n", env)
    assert "heard hello again" in done.stdout, done
    bench.up()
    bench.feishu.wait_sent(1)
    assert bench.ask("end").text == "heard end"
    assert bench.answers == ["heard wait 1", "heard end"]


# --- kill -9 ---


@since("s04")
@pytest.mark.costly(last=True)
def test_killed_15_times(bench: Bench, whole: bool):
    """At any moment: nothing is lost, all is answered, no question stands twice."""
    chance = random.Random(11)
    feishu = bench.feishu
    kills = 15 if whole else 5
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    hook = f"http://127.0.0.1:{port}/feishu/events"
    people = ["ou_alice", "ou_bob"]
    accepted = []
    feeding = threading.Event()
    feeding.set()

    def feed(who: str) -> None:
        number = 0
        while feeding.is_set():
            verb = "bash echo" if number % 3 == 2 else "say"
            event = feishu.event(f"{verb} {who} {number}", open_id=who)
            while feishu.push(hook, event, timeout=1).status != 200:
                time.sleep(0.02)
            accepted.append(f"{verb} {who} {number}")
            number += 1
            time.sleep(0.05)

    feeders = [threading.Thread(target=feed, args=[who], daemon=True) for who in people]
    for feeder in feeders:
        feeder.start()
    settings = bench.settings(ALLOWED_CHATS=" ".join(people), PORT=port)
    settings["APPROVAL"] = "always"
    for number in range(kills):
        screen = bench.start(**settings)
        if number % 5:
            with suppress(AssertionError):
                screen.wait_for(ON)
        time.sleep(chance.uniform(0.0, 0.3))
        screen.kill()
    bench.start(**settings)
    wait_until(lambda: len(accepted) > kills, 30)
    feeding.clear()
    for feeder in feeders:
        feeder.join(20)
    expected = {f"heard {text}" for text in accepted}
    assert len(accepted) == len(expected)
    wait_until(lambda: expected <= set(bench.answers), 40)
    assert sorted(bench.answers) == sorted(expected)
    # A request that a kill has cut off before its body is no request of ours.
    problems = bench.model.problems
    problems[:] = [text for text in problems if "messages is not a list" not in text]
    for request in bench.model.chats:
        asked = [m["content"] for m in request.messages if m["role"] == "user"]
        assert len(asked) == len(set(asked)), asked
