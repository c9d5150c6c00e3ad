"""The gateway (s05): JSON-RPC to the letter, for those with the token, and nobody holds it up."""

import contextlib
import json
import random
import re
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.parse import unquote

import harness
import pytest
from fake_feishu import FakeFeishu
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from harness import since
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

PROMPT = "you> "
LINK = re.compile(r"(http://127\.0\.0\.1:(\d+)/#token=(\S+))")
TROUBLE = re.compile("Traceback|Exception|Warning|Task was|never retrieved|socket.send")
MIB = 1 << 20


class Refused(Exception):
    """A JSON-RPC error."""

    def __init__(self, error: dict):
        super().__init__(error)
        self.code, self.message = error["code"], error["message"]


class Client:
    """A WebSocket client: it calls methods, and keeps the events that come meanwhile."""

    def __init__(self, url: str, **options: Any):
        self.socket = connect(url, legacy=True, proxy=None, max_size=None, **options)
        self.replies: list[Any] = []
        self.events: list[tuple[str, dict]] = []
        self.number = 0

    def send(self, frame: Any) -> None:
        """Send a text or bytes as they are, anything else as JSON."""
        self.socket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    def read(self, timeout: float = 10) -> None:
        """Take in one frame, as a reply or as an event."""
        frame = json.loads(self.socket.recv(timeout=timeout))
        if "method" in frame:
            self.events.append((frame["method"], frame["params"]))
        else:
            self.replies.append(frame)

    def reply(self, timeout: float = 10) -> Any:
        """The next reply."""
        deadline = time.monotonic() + timeout
        while not self.replies:
            self.read(max(0, deadline - time.monotonic()))
        return self.replies.pop(0)

    def begin(self, method: str, /, **params: Any) -> int:
        """Send a request, and do not wait."""
        self.number += 1
        self.send({"jsonrpc": "2.0", "method": method, "params": params, "id": self.number})
        return self.number

    def call(self, method: str, /, **params: Any) -> Any:
        """The result of a method. Raises Refused."""
        number, reply = self.begin(method, **params), self.reply()
        assert reply["id"] == number and reply["jsonrpc"] == "2.0", reply
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["result"]

    def refused(self, method: str, /, **params: Any) -> int:
        """The code of the error that a method ends in."""
        with pytest.raises(Refused) as refusal:
            self.call(method, **params)
        return refusal.value.code

    def wait(self, event: str, timeout: float = 10, /, **about: Any) -> dict:
        """The first event that says this."""
        deadline, number = time.monotonic() + timeout, 0
        while True:
            for name, params in self.events[number:]:
                if name == event and about.items() <= params.items():
                    return params
            number = len(self.events)
            self.read(max(0, deadline - time.monotonic()))

    def ask(self, text: str, **about: Any) -> str:
        """Say something, and the answer to it."""
        name = self.call("send", text=text, **about)["id"]
        return self.wait("message", role="assistant", id=name)["text"]

    def history(self, **which: Any) -> list[str]:
        return [message["text"] for message in self.call("sessions.history", **which)["messages"]]

    def told(self, event: str, field: str) -> list[str]:
        """One field of all events of a kind so far."""
        self.call("status")
        return [params[field] for name, params in self.events if name == event]


class Desk:
    """A section at a terminal, its gateway, and a scripted model behind it."""

    def __init__(self, section: harness.Section, workspace: Path, model: FakeModel):
        self.section, self.workspace, self.model = section, workspace, model
        self.gate = threading.Event()
        self.opened = contextlib.ExitStack()
        self.screens: list[harness.Screen] = []
        self.port, self.token, self.link = 0, "", ""
        model.script("brain", [self.brain], repeat=True)

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Whatever a test does: no traceback, and the token in no line but the link."""
        self.gate.set()
        self.opened.close()
        for screen in self.screens:
            screen.close()
            assert kind or not TROUBLE.search(screen.text), screen.text[-3000:]
            assert kind or not self.token or self.token not in LINK.sub("", screen.text)

    def brain(self, body: dict) -> Any:
        """Does what the last user message says."""
        messages = body["messages"]
        last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        verb, _, rest = last.partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {last}"), after_chunks=2)
        if verb == "fail":
            return Error(422)
        if verb == "long":
            return Text("", pieces=[rest[:1] * 100_000] * int(rest[1:]))
        if messages[-1]["role"] != "tool":
            if verb == "bash":
                return ToolCalls([("bash", {"command": rest})])
            if verb == "read":
                return ToolCalls([("read_file", {"path": rest})])
            if verb == "broken":
                return ToolCalls([("read_file", '{"path": ')])
        return Text(f"heard {last[:200]}")

    def up(self, **env: str) -> harness.Screen:
        """A run at a terminal, its gateway open."""
        self.screens.append(screen := harness.Screen(self.section, self.model.env("brain", **env)))
        self.link, port, token = screen.wait_for(LINK, 20).groups()
        screen.wait_for(PROMPT)
        self.port, self.token = int(port), unquote(token)
        return screen

    def down(self, key: str = "ctrl-c", within: float = 2) -> None:
        """End the latest run as a person does; it takes no longer than this."""
        began = time.monotonic()
        self.screens[-1].press(key)
        assert self.screens[-1].wait_exit() == 0
        assert time.monotonic() - began < within

    def client(self, **options: Any) -> Client:
        """A client of the latest run, gone with the test at the latest."""
        client = Client(f"ws://127.0.0.1:{self.port}/ws?token={quote(self.token)}", **options)
        self.opened.callback(client.socket.close_socket)
        return client

    def connect(self, data: str = "", **options: int) -> socket.socket:
        """A connection of our own making; options are those of the socket."""
        self.opened.enter_context(connection := socket.socket())
        for name, value in options.items():
            connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(data.encode())
        return connection

    def fetch(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict, bytes]:
        """The status, the headers and all that follows them; 0 where nothing comes."""
        headers = {"Host": f"127.0.0.1:{self.port}"} | headers
        lines = (f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        connection = self.connect(f"{method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n")
        with contextlib.suppress(ConnectionResetError), connection.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
            first, *fields = head.decode().split("\r\n")
            found = dict(field.lower().split(": ", 1) for field in fields)
            return int(first.split()[1]) if first else 0, found, body
        return 0, {}, b""

    def upgrade(self, token: str | None = None, **headers: str) -> int:
        """The status that an attempt at the WebSocket ends in, by default with the right token."""
        token = quote(self.token) if token is None else token
        return int(self.shake(f"/ws?token={token}", **headers)[1].split()[1])

    def shake(self, path: str = "", **options: Any) -> tuple[socket.socket, bytes]:
        """A WebSocket on a bare socket, and what the server says to it."""
        sizes = {name: options.pop(name) for name in [*options] if name.startswith("SO_")}
        headers = {"Host": f"127.0.0.1:{self.port}"} | options
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection = self.connect(
            f"GET {path or f'/ws?token={quote(self.token)}'} HTTP/1.1\r\n{text}"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n",
            **sizes,
        )
        return connection, connection.recv(4096)

    @property
    def asked(self) -> list[str]:
        """What the model was asked, in order."""
        chats = [chat.messages[-1] for chat in self.model.chats]
        return [message["content"] for message in chats if message["role"] == "user"]


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Iterator[Desk]:
    with Desk(section, workspace, fake_model) as desk:
        yield desk


def until(condition: Callable[[], Any], timeout: float = 10) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def frame(data: bytes, opcode: int = 1) -> bytes:
    """A WebSocket frame as a client sends it, under a mask that changes nothing."""
    size = len(data)
    if size < 126:
        return struct.pack("!BBI", 128 + opcode, 128 + size, 0) + data
    if size < 65536:
        return struct.pack("!BBHI", 128 + opcode, 254, size, 0) + data
    return struct.pack("!BBQI", 128 + opcode, 255, size, 0) + data


def request(method: str, id: Any = 1, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": id})


def memory(pid: int) -> float:
    """What a process holds, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


# --- JSON-RPC 2.0 ---

MAIN = "agent:main:main"
NOTHING = {"session": MAIN, "agent": "main", "messages": [], "busy": False}
EXAMPLES = [  # those of the specification, with our methods: what is sent, what comes
    (
        '{"jsonrpc": "2.0", "method": "sessions.history", "params": ["agent:main:main"], "id": 1}',
        {"jsonrpc": "2.0", "result": NOTHING, "id": 1},
    ),
    (
        '{"jsonrpc": "2.0", "method": "sessions.history", "params": ["agent:main:main", "", 5], '
        '"id": 2}',
        {"jsonrpc": "2.0", "result": NOTHING, "id": 2},
    ),
    (
        '{"jsonrpc": "2.0", "method": "sessions.history", "params": {"limit": 5, '
        '"session": "agent:main:main"}, "id": 3}',
        {"jsonrpc": "2.0", "result": NOTHING, "id": 3},
    ),
    (
        '{"jsonrpc": "2.0", "method": "sessions.history", "params": {"session": '
        '"agent:main:main", "limit": 5}, "id": 4}',
        {"jsonrpc": "2.0", "result": NOTHING, "id": 4},
    ),
    ('{"jsonrpc": "2.0", "method": "status", "params": [1,2,3,4,5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', (-32601, "1")),
    ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', (-32700, None)),
    ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', (-32600, None)),
    (
        '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, '
        '{"jsonrpc": "2.0", "method"]',
        (-32700, None),
    ),
    ("[]", (-32600, None)),
    ("[1]", [(-32600, None)]),
    ("[1,2,3]", [(-32600, None)] * 3),
    (
        '[{"jsonrpc": "2.0", "method": "sessions.history", "params": ["agent:main:main"], '
        '"id": "1"}, {"jsonrpc": "2.0", "method": "status", "params": [7]}, '
        '{"jsonrpc": "2.0", "method": "sessions.history", "params": ["agent:main:main", "", 23], '
        '"id": "2"}, {"foo": "boo"}, '
        '{"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"}, '
        '{"jsonrpc": "2.0", "method": "bindings.list", "id": "9"}]',
        [
            {"jsonrpc": "2.0", "result": NOTHING, "id": "1"},
            {"jsonrpc": "2.0", "result": NOTHING, "id": "2"},
            (-32600, None),
            (-32601, "5"),
            {"jsonrpc": "2.0", "result": [], "id": "9"},
        ],
    ),
    (
        '[{"jsonrpc": "2.0", "method": "status", "params": [1,2,4]}, '
        '{"jsonrpc": "2.0", "method": "status", "params": [7]}]',
        None,
    ),
]
NO_REQUESTS = [
    "1",
    '"text"',
    "null",
    "true",
    "{}",
    '{"jsonrpc": "2.0"}',
    '{"method": "status", "id": 1}',
    '{"jsonrpc": "1.0", "method": "status", "id": 1}',
    '{"jsonrpc": 2.0, "method": "status", "id": 1}',
    '{"jsonrpc": "2.0", "method": null, "id": 1}',
    '{"jsonrpc": "2.0", "method": ["status"], "id": 1}',
    '{"jsonrpc": "2.0", "method": "status", "params": "x", "id": 1}',
    '{"jsonrpc": "2.0", "method": "status", "params": null, "id": 1}',
]
NO_JSON = ["", " ", "{", "[1,", "nul", "NaN", "[-Infinity]", "'x'", '"\\x"', "[" * 100_000, "{}{}"]


def brief(reply: Any) -> Any:
    """A reply with each well-formed error as (code, id)."""
    if isinstance(reply, list):
        return [brief(part) for part in reply]
    assert reply.keys() == {"jsonrpc", "id", "result" if "result" in reply else "error"}, reply
    assert reply["jsonrpc"] == "2.0"
    if "result" in reply:
        return reply
    assert reply["error"].keys() <= {"code", "message", "data"}
    assert isinstance(reply["error"]["message"], str)
    return reply["error"]["code"], reply["id"]


def replies(client: Client, text: str | bytes) -> list[Any]:
    """All replies to a frame: those that come before the one to the next request."""
    client.send(text)
    client.send(request("status", id="the end"))
    found = [client.reply()]
    while not isinstance(found[-1], dict) or found[-1]["id"] != "the end":
        found.append(client.reply())
    return [brief(reply) for reply in found[:-1]]


@since("s05")
def test_the_specification_is_kept(desk: Desk):
    desk.up()
    client = desk.client()
    for text, expected in EXAMPLES:
        assert replies(client, text) == ([] if expected is None else [expected]), text
        assert replies(client, text.encode()) == replies(client, text), "a binary frame is one, too"
    for text in NO_REQUESTS:
        ((code, _),) = replies(client, text)
        assert code == -32600, text
    for text in NO_JSON:
        assert replies(client, text) == [(-32700, None)], text
    assert replies(client, b"\xff\xfe") == [(-32700, None)]


@since("s05")
def test_ids_come_back_as_they_were_or_not_at_all(desk: Desk):
    desk.up()
    client = desk.client()
    for name in ("a", "", "1", "ü\n", 0, 1, -7, 1.5, 10**40, None):
        assert replies(client, request("bindings.list", id=name)) == [
            {"jsonrpc": "2.0", "result": [], "id": name}
        ]
        assert replies(client, request("nope", id=name)) == [(-32601, name)]
    for name in ("true", "false", "{}", "[]", '["a"]', "1e999", "-1e999"):
        for method in ("bindings.list", "nope"):
            text = f'{{"jsonrpc": "2.0", "method": "{method}", "id": {name}}}'
            assert replies(client, text) == [(-32600, None)], text
    text = f'{{"jsonrpc": "2.0", "method": "status", "id": {"9" * 5000}}}'
    assert replies(client, text)[0][1] is None


WRONG = [  # parameters
    ("send", {}),
    ("send", []),
    ("send", {"text": None}),
    ("send", {"text": ["x"]}),
    ("send", {"text": " \n\t\u2028"}),
    ("send", {"text": "x", "id": 7}),
    ("send", {"text": "x", "id": "x" * 1000}),
    ("send", {"text": "x", "peer": 7}),
    ("send", {"text": "x", "session": MAIN}),
    ("send", ["x", "a", "b", "c"]),
    ("status", [1]),
    ("status", {"self": 1}),
    ("status", {"client": 1}),
    ("sessions.history", {"limit": "7"}),
    ("sessions.history", {"limit": True}),
    ("sessions.history", {"limit": 7.0}),
    ("sessions.history", {"session": "agent:nobody:main"}),
    ("sessions.history", {"session": "main"}),
    ("agents.list", {"": ""}),
]


@since("s05")
def test_wrong_parameters_are_told_and_notifications_never_answered(desk: Desk):
    desk.up()
    client = desk.client()
    for method, params in WRONG:
        call = {"jsonrpc": "2.0", "method": method, "params": params}
        assert replies(client, json.dumps(call)) == [], call
        assert replies(client, json.dumps(call | {"id": 1})) == [(-32602, 1)], call
    call = {"jsonrpc": "2.0", "method": "send", "params": ["by notification", "alice"]}
    assert replies(client, json.dumps(call)) == []
    until(lambda: client.history(peer="alice") == ["by notification", "heard by notification"])
    assert desk.asked == ["by notification"]


@since("s05")
def test_a_batch_has_a_hundred_requests_at_most(desk: Desk):
    desk.up()
    client = desk.client()
    calls = [json.loads(request("bindings.list", id=number)) for number in range(101)]
    (found,) = replies(client, json.dumps(calls[:100]))
    assert [reply["id"] for reply in found] == list(range(100))
    assert replies(client, json.dumps(calls)) == [(-32600, None)]
    sends = [json.loads(request("send", number, text=f"{number}")) for number in range(5)]
    sends[3].pop("id")
    (found,) = replies(client, json.dumps(sends))
    assert [reply["id"] for reply in found] == [0, 1, 2, 4]
    until(lambda: len(client.history()) == 10)
    assert desk.asked == list("01234")


@pytest.mark.guard
@since("s05")
def test_an_internal_error_does_not_say_what_it_is(desk: Desk):
    screen = desk.up()
    client = desk.client()
    (desk.workspace / ".inbox.jsonl").unlink()
    client.send(request("send", text="hello"))
    reply = client.reply()
    assert reply["error"] == {"code": -32603, "message": "Internal error"}
    screen.wait_for(".inbox.jsonl")
    assert client.call("bindings.list") == [] and desk.asked == []


CHEAP = [
    request("status"),
    request("agents.list"),
    request("bindings.list", id="a"),
    request("bindings.remove", channel="web", peer="p", priority=3),
    request("nope"),
    f"[{request('status')},{request('nope', id=2)},1]",
]
SEEDS = [  # what costs a turn, a sync or a thread is rarer
    *CHEAP * 8,
    request("send", text=" ", peer="alice", id="one"),
    request("bindings.set", agent="luna", channel="web", peer="p", priority=3),
    request("sessions.list"),
    request("sessions.history", session=MAIN, peer="bob", limit=3),
]
CODES = {-32700, -32600, -32601, -32602}
VALUES = ["null", "true", "-1", "1e999", '"\\ud800"', "[]", "{}", '""', '"x"', "[[1]]", "9" * 40]
ALPHABET = list('{}[]",:0123456789.eE+-\\ \n\tabtrufalsn\0é€') + ['"id":', '"jsonrpc":', '"2.0"']


def mutated(chance: random.Random) -> bytes:
    """A frame that is nearly a request, or a request, or nothing like one."""
    text = chance.choice(SEEDS)
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        place, kind = chance.randrange(len(text) + 1), chance.randrange(6)
        if kind == 0:
            text = text[:place] + chance.choice(ALPHABET) + text[place:]
        elif kind == 1:
            text = text[:place] + text[place + chance.randrange(8) :]
        elif kind == 2:
            text = text[:place]
        elif kind == 3:
            text = text[:place] + chance.choice(SEEDS)[-place:]
        else:
            value = re.compile(r'(?<=: )("[^"]*"|\d+)')
            at = chance.randrange(len(value.findall(text)) or 1)
            for number, match in enumerate(value.finditer(text)):
                if number == at:
                    text = text[: match.start()] + chance.choice(VALUES) + text[match.end() :]
                    break
    return text.encode() if chance.random() < 0.97 else chance.randbytes(chance.randrange(90))


@since("s05", until="s05")
@pytest.mark.costly
def test_frames_of_noise_do_no_harm(desk: Desk, pytestconfig: pytest.Config):
    """A hundred thousand of them with --every-section, else a quarter."""
    burst = 1000 if pytestconfig.getoption("--every-section") else 250
    screen = desk.up()
    chance = random.Random(5)
    texts: list[str] = []
    for round in range(5):
        lines = [desk.shake()[0] for _ in range(4)]
        readers = [threading.Thread(target=listen, args=(line, texts)) for line in lines]
        for reader in readers:
            reader.start()
        for number in range(20):
            noise = b"".join(frame(mutated(chance), 2) for _ in range(burst))
            lines[number % 4].sendall(noise)
        for line in lines:
            line.sendall(frame(request("status", id="the end").encode()))
        for reader in readers:
            reader.join(60)
        assert sum('"the end"' in text for text in texts) == 4 * (round + 1)
        if round == 1:
            before = memory(screen.pid)
    assert memory(screen.pid) - before < burst / 50
    found = [json.loads(text) for text in texts if '"error"' in text]
    assert len(found) > 50 * burst
    parts = [part for reply in found for part in (reply if isinstance(reply, list) else [reply])]
    errors = [part for part in parts if "error" in part]
    internal = [error for error in errors if brief(error)[0] == -32603]
    assert not internal and {brief(error)[0] for error in errors} == CODES, internal[:9]
    assert desk.client().ask("still there?") == "heard still there?"
    desk.down()


def listen(line: socket.socket, texts: list[str]) -> None:
    """Read the texts that a server sends, to the last reply."""
    with line.makefile("rb") as stream:
        while head := stream.read(2):
            size = head[1]
            if size > 125:
                size = int.from_bytes(stream.read(2 if size == 126 else 8))
            data = stream.read(size)
            if head[0] == 0x81:  # a text, not a ping
                texts.append(data.decode())
                if '"the end"' in texts[-1]:
                    return


# --- who gets in, and to what ---


@pytest.mark.guard
@since("s05")
def test_only_those_with_the_token_get_in(desk: Desk):
    desk.up()
    own, name = f"http://127.0.0.1:{desk.port}", f"localhost:{desk.port}"
    assert desk.upgrade() == desk.upgrade(Origin=own) == 101
    assert desk.upgrade(Host=name, Origin=f"http://{name}") == 101
    assert int(desk.shake("/ws")[1].split()[1]) == 401
    for token in ("", "x", desk.token[:-1], f"{desk.token}x", desk.token.upper(), "%ff"):
        assert desk.upgrade(token) == desk.upgrade(token, Origin=own) == 401, token
    foreign = ["null", "http://evil.example", f"http://evil.example:{desk.port}", "file://", "x"]
    foreign += ["http://127.0.0.1", f"http://127.0.0.1:{desk.port + 1}", f"{own}.evil.example"]
    for origin in [*foreign, f"https://127.0.0.1:{desk.port}"]:
        assert desk.upgrade(Origin=origin) == desk.upgrade("x", Origin=origin) == 403, origin
    for host in ("evil.example", f"evil.example:{desk.port}", "127.0.0.1", "", f"{name}.example"):
        assert desk.upgrade(Host=host) == 403, host
        for path in ("/", "/healthz", "/nope"):
            assert desk.fetch(path, Host=host)[0] == 403, (path, host)
    twice = f"{name}\r\nHost: evil.example"
    assert desk.upgrade(Host=twice) >= 400 and desk.upgrade(Origin=f"{own}\r\nOrigin: x") >= 400
    assert desk.client().call("status")["clients"] == 4


@pytest.mark.guard
@since("s05")
def test_the_pages(desk: Desk):
    desk.up()
    page = (desk.workspace / "webchat.html").read_bytes()
    for path, status, text in (("/", 200, page), ("/healthz", 200, b"ok\n"), ("/x", 404, None)):
        found, headers, body = desk.fetch(path)
        assert found == status and body == (text or body), path
        assert headers["content-length"] == str(len(body))
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert not [name for name in headers if name.startswith("access-control")]
        assert headers["content-type"].startswith("text/html" if path == "/" else "text/plain")
    assert desk.token.encode() not in page
    for path in ("/../bindings.jsonl", "/.gateway-token", "//", "/AGENTS.md", "/%2e%2e/", "/ws/"):
        assert desk.fetch(path)[0] == 404, path
    assert desk.fetch("/?a=b")[0] == 200
    edited = page.replace(b"<title>Web chat", b"<title>Mine")
    (desk.workspace / "webchat.html").write_bytes(edited)
    assert desk.fetch("/")[2] == edited
    (desk.workspace / "webchat.html").unlink()
    assert b"<title>Web chat" in desk.fetch("/")[2]


@pytest.mark.guard
@since("s05")
def test_a_page_is_only_read(desk: Desk):
    desk.up()
    assert [desk.fetch(path, "HEAD")[::2] for path in ("/", "/healthz")] == [(200, b"")] * 2
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        for path in ("/", "/healthz", f"/ws?token={desk.token}"):
            assert desk.fetch(path, method)[0] in (0, 405, 501), (method, path)
            assert desk.fetch(path, method, Content_Length="9")[0] in (0, 400, 405, 413, 501)
    assert desk.fetch("/healthz")[0] == 200


@pytest.mark.guard
@since("s05")
def test_the_token(desk: Desk):
    file = desk.workspace / ".gateway-token"
    desk.up()
    first = desk.token
    assert re.fullmatch(r"[!-~]{20,}", first) and stat.S_IMODE(file.stat().st_mode) == 0o600
    desk.down()
    desk.up()
    assert desk.token == first
    desk.down()
    desk.up(GATEWAY_TOKEN="tök en&#/+%")
    assert desk.token == "tök en&#/+%" and desk.client().call("status")
    assert desk.upgrade(first) == 401
    assert file.read_text().strip() == first
    desk.down()
    file.write_text("\n")
    screen = harness.Screen(desk.section, desk.model.env("brain"))
    desk.screens.append(screen)
    told = screen.wait_for(re.compile(r"\[web default\] o(ff|n, at http://127.0.0.1:(\d+))"))
    desk.port = int(told[2] or 0)
    if desk.port:
        assert desk.upgrade("") == 401, "an empty file lets everybody in"


@pytest.mark.guard
@since("s05")
def test_the_token_is_shown_in_the_link_alone(desk: Desk):
    screen = desk.up()
    client = desk.client()
    client.ask("hello")
    for text in ("/channels", "/accounts", "/sessions", "/bindings"):
        screen.type(f"{text}\n")
        screen.wait_for(PROMPT)
    told = [client.call(name) for name in ("status", "agents.list", "sessions.list")]
    assert desk.token not in json.dumps([told, client.events])
    assert f"on, at http://127.0.0.1:{desk.port}/" in json.dumps(told)
    files = [file for file in desk.workspace.rglob("*") if file.is_file()]
    holders = [file.name for file in files if desk.token.encode() in file.read_bytes()]
    assert holders == [".gateway-token"]


@pytest.mark.guard
@since("s05")
def test_what_the_web_asks_for_is_not_run_and_not_read(desk: Desk):
    """Not even the keys of the program itself, whoever has the token."""
    desk.up(APPROVAL="ask")
    client = desk.client()
    client.ask("bash echo ran >> ran.txt")
    for path in ("/etc/passwd", "../.env", ".gateway-token", ".sessions", f"{desk.workspace}/../x"):
        client.ask(f"read {path}")
    results = [m["content"] for m in desk.model.chats[-1].messages if m["role"] == "tool"]
    assert len(results) == 6 and all(result.startswith("error") for result in results), results
    assert not (desk.workspace / "ran.txt").exists()
    desk.down()
    desk.up(APPROVAL="always")
    desk.client().ask("bash echo ran >> ran.txt")
    assert (desk.workspace / "ran.txt").read_text() == "ran\n"


@since("s05")
def test_a_port_that_cannot_be_had_is_told_and_the_rest_runs_on(desk: Desk):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        for port in (str(taken), "abc", "99999", "-1"):
            env = desk.model.env("brain", GATEWAY_PORT=port)
            done = harness.pipe(desk.section, "hello\n/gateway\nquit\n", env)
            told = [line for line in done.stdout.splitlines() if line.startswith("[web default]")]
            assert len(told) == 1 and re.search(f"off.*({port}|port)", told[0]), done.stdout
            assert "heard hello" in done.stdout and done.returncode == 0
            assert not TROUBLE.search(done.stdout + done.stderr) and "web chat:" not in done.stdout


@since("s05")
def test_a_platform_that_hangs_does_not_hold_up_the_gateway(desk: Desk):
    with FakeTelegram() as telegram:
        telegram.hang("getMe", 20)
        desk.up(TELEGRAM_BOT_TOKEN=telegram.token, TELEGRAM_BASE_URL=telegram.url)
        client = desk.client()
        assert client.ask("hello") == "heard hello"
        assert "on" not in client.call("status")["channels"]["telegram default"].split()
        desk.down()


# --- a conversation ---


@since("s05")
def test_a_turn_as_a_client_sees_it(desk: Desk):
    desk.up()
    client, other = desk.client(), desk.client()
    sent = client.call("send", text="wait for it", peer="alice", id="one")
    key = sent.pop("session")
    assert sent == {"id": "one", "agent": "main", "matched_by": "default"}
    client.wait("delta")
    now = other.call("sessions.history", peer="alice")
    assert now["busy"] and now["messages"] == [{"role": "user", "text": "wait for it", "id": "one"}]
    desk.gate.set()
    answer = client.wait("message", role="assistant")
    about = {"session": key, "agent": "main"}
    assert answer == about | {"role": "assistant", "text": "heard wait for it", "id": "one"}
    names = [name for name, _ in client.events]
    deltas = names.count("delta")
    assert deltas > 1 and "".join(client.told("delta", "text")) == "heard wait for it"
    kinds = sorted(names[:2]) + names[2 + deltas :]
    assert kinds == ["message", "typing", "typing", "message"]
    assert client.told("typing", "on") == [True, False]
    assert all(about.items() <= params.items() for _, params in client.events)
    assert client.wait("message", role="user")["id"] == "one"
    later = other.call("sessions.history", session=key)
    assert not later["busy"] and later["messages"][1] == {
        "role": "assistant",
        "text": "heard wait for it",
    }
    assert other.history(peer="alice", limit=1) == ["heard wait for it"]
    assert [s["session"] for s in client.call("sessions.list")].count(key) == 1


@since("s05")
def test_who_gives_no_peer_is_alone(desk: Desk):
    screen = desk.up()
    one, two = desk.client(), desk.client()
    one.ask("my secret"), two.ask("who am I?")
    assert two.history() == ["who am I?", "heard who am I?"]
    assert [m["content"] for m in desk.model.chats[-1].messages if m["role"] == "user"] == [
        "who am I?"
    ]
    screen.type("and here?\n")
    screen.wait_for("heard and here?")
    assert one.history() == ["my secret", "heard my secret"]


@since("s05")
def test_a_peer_is_lower_case_or_refused(desk: Desk):
    desk.up()
    client = desk.client()
    for peer in ("Alice", "ALICE", "ü", " ", "a b", "../x", "-a", ":a", "a\n", "a" * 129, "\ud800"):
        assert client.refused("send", text="x", peer=peer) == -32602, peer
        assert client.refused("sessions.history", peer=peer) == -32602, peer
    for peer in ("alice", "7", "a.b_c:d@e-f", "a" * 128):
        assert client.ask(f"from {peer}", peer=peer)
        assert client.history(peer=peer) == [f"from {peer}", f"heard from {peer}"]


@since("s05")
def test_each_id_is_taken_once(desk: Desk):
    screen = desk.up()
    client = desk.client()
    ids = ["one", "ONE", "7", "a_b-c", "x" * 100]
    for name in ids:
        for _ in range(2):
            assert client.call("send", text=f"say {name}", peer="alice", id=name)["id"] == name
    until(lambda: len(client.history(peer="alice")) == 2 * len(ids))
    screen.kill()
    desk.up()
    client = desk.client()
    for name in ids:
        client.call("send", text=f"say {name}", peer="alice", id=name)
    assert client.ask("new", peer="alice", id="new") == "heard new"
    assert client.ask("other", peer="bob", id="one") == "heard other", "bob has ids of his own"
    assert desk.asked == [*(f"say {name}" for name in ids), "new", "other"]
    told = [p["id"] for name, p in client.events if name == "message" and p["role"] == "user"]
    assert told == ["new", "one"]


@since("s05")
def test_an_id_of_other_characters_is_refused(desk: Desk):
    desk.up()
    client = desk.client()
    for name in ("a:b", "two words", "one\n", "ü", "\ud800", "x" * 101):
        assert client.refused("send", text="x", id=name) == -32602, name


@since("s05")
def test_a_text_may_hold_any_character(desk: Desk):
    screen = desk.up()
    said = desk.client().ask("a\ud83d \x00 \x1b[31m 👩‍👩‍👧‍👦 \u202e")
    assert said == "heard a\ufffd \x00 \x1b[31m 👩‍👩‍👧‍👦 \u202e"
    screen.wait_for("👧")
    assert "\x1b[31m" not in screen.raw and "\x00" not in screen.raw


@since("s05")
def test_a_send_is_acknowledged_while_the_model_hangs(desk: Desk):
    desk.up()
    client, other = desk.client(), desk.client()
    client.call("send", text="wait", peer="alice")
    client.wait("typing", on=True)
    for number in range(20):  # the gate is shut: whatever waited for the model would wait in vain
        client.call("send", text=f"after {number}", peer="alice")
        other.call("send", text=f"other {number}", peer="bob")
        assert client.call("status")["waiting"] > number
    said = ["wait", *(f"after {number}" for number in range(20))]
    assert client.history(peer="alice") == said, "what is taken is in the history"
    desk.gate.set()
    client.wait("message", text="heard after 19")
    other.wait("message", text="heard other 19")
    assert client.history(peer="alice") == [t for s in said for t in (s, f"heard {s}")]
    assert len(other.history(peer="bob")) == 40


@since("s05")
def test_kill_9_after_the_acknowledgement_loses_nothing(desk: Desk):
    screen = desk.up()
    client = desk.client()
    said = ["wait here", "and then", "and last"]
    for name in said:
        client.call("send", text=name, peer="alice", id=name.replace(" ", "-"))
    desk.model.wait(1)
    screen.kill()
    desk.gate.set()
    desk.up()
    client = desk.client()
    for name in said:
        client.call("send", text=name, peer="alice", id=name.replace(" ", "-"))
    until(lambda: not client.call("status")["waiting"])
    heard = [text for name in said for text in (name, f"heard {name}")]
    assert client.history(peer="alice") == heard
    assert desk.asked == ["wait here", *said]
    desk.down("ctrl-d")
    desk.up()
    assert desk.client().history(peer="alice") == heard and len(desk.asked) == 4


@since("s05")
def test_two_at_one_session_take_turns(desk: Desk):
    desk.up()
    one, two = desk.client(), desk.client()
    for client in (one, two):
        client.history(peer="team")
    for number in range(10):
        (one, two)[number % 2].begin("send", text=f"{number}", peer="team")
        (one, two)[number % 2].reply()
    for client in (one, two):
        client.wait("message", text="heard 9")
        said = [text for n in range(10) for text in (f"{n}", f"heard {n}")]
        assert client.told("message", "text") == said
        assert client.history(peer="team") == said
    one.call("send", text="fail", peer="team"), two.call("send", text="go on", peer="team")
    failed = [one.wait("message", text="fail"), one.wait("message", text="heard go on")][0]
    told = [p["text"] for n, p in one.events if n == "message" and p["id"] == failed["id"]]
    assert len(told) == 2 and told[1] and "sk-test" not in told[1]
    assert one.told("typing", "on") == [True, False] * 12
    assert two.history(peer="team")[-2:] == ["go on", "heard go on"]


@pytest.mark.guard
@since("s05")
def test_events_go_to_those_who_watch(desk: Desk):
    screen = desk.up()
    talks, watches, idle, elsewhere = clients = [desk.client() for _ in range(4)]
    watches.history(peer="alice")
    elsewhere.ask("hello", peer="bob")
    before = len(elsewhere.events)
    talks.ask("hello", peer="alice")
    watches.wait("message", role="assistant")
    for client in clients:
        client.call("status")
    assert idle.events == [] and len(elsewhere.events) == before
    assert watches.events == talks.events
    watches.history(session=MAIN)
    screen.type("at the terminal\n")
    heard = watches.wait("message", text="heard at the terminal")
    assert heard["session"] == MAIN and heard["role"] == "assistant"
    assert talks.told("message", "text") == ["hello", "heard hello"]


@since("s05")
def test_who_leaves_in_the_middle_finds_the_answer(desk: Desk):
    desk.up()
    reset = struct.pack("ii", 1, 0)
    for number in range(6):
        client = desk.client()
        client.call("send", text=f"wait {number}", peer="alice")
        client.history(peer="alice")
        if number == 0:
            client.wait("delta")
        if number % 2:
            client.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.socket.socket.close()
        else:
            client.socket.close_socket()
    client = desk.client()
    desk.gate.set()
    until(lambda: len(client.history(peer="alice")) == 12)
    assert client.history(peer="alice")[-1] == "heard wait 5"
    until(lambda: client.call("status")["clients"] == 1)


@since("s05")
def test_a_history_that_is_not_there_is_empty_and_makes_nothing(desk: Desk):
    desk.up()
    client = desk.client()
    for which in ({"peer": "nobody"}, {"session": "agent:luna:web:default:direct:nobody"}):
        found = client.call("sessions.history", **which)
        assert found["messages"] == [] and not found["busy"]
    assert found["agent"] == "luna"
    assert client.refused("sessions.history", session="agent:../main:x") == -32602
    assert "nobody" not in json.dumps(client.call("sessions.list"))
    assert not list(desk.workspace.rglob("luna"))


@since("s05")
def test_a_command_from_the_web_begins_a_new_session(desk: Desk):
    desk.up()
    client = desk.client()
    client.ask("one", peer="alice")
    for _ in range(5):
        assert "session" in client.ask("/new", peer="alice")
        assert client.history(peer="alice") == [], "what is answered does not wait any more"
        assert client.ask("fail", peer="alice") and client.history(peer="alice") == []
    assert client.ask("/agents", peer="alice") == "heard /agents", "that is for the terminal"
    assert client.ask("two", peer="alice") == "heard two"
    assert client.history(peer="alice")[-2:] == ["two", "heard two"]


@since("s05")
def test_arguments_that_are_no_json_do_not_spoil_a_session(desk: Desk):
    desk.up()
    client = desk.client()
    assert client.ask("broken", peer="alice") == "heard broken"
    assert client.ask("go on", peer="alice") == "heard go on"
    desk.down()
    desk.up()
    assert desk.client().ask("and on", peer="alice") == "heard and on"


@since("s05")
def test_all_at_once_each_with_a_history_of_its_own(desk: Desk):
    with FakeTelegram() as telegram, FakeFeishu("", "a-verification-token") as feishu:
        screen = desk.up(
            TELEGRAM_BOT_TOKEN=telegram.token,
            TELEGRAM_BASE_URL=telegram.url,
            TELEGRAM_ALLOWED_CHATS="42",
            FEISHU_APP_ID=feishu.app_id,
            FEISHU_APP_SECRET=feishu.app_secret,
            FEISHU_DOMAIN=feishu.url,
            FEISHU_PORT="0",
            FEISHU_VERIFICATION_TOKEN=feishu.verification_token,
            FEISHU_ALLOWED_CHATS="ou_alice",
        )
        until(lambda: "[feishu default] on" in screen.text)
        hook = re.search(r"http://\S+/feishu/events", screen.text)[0]
        clients = {peer: desk.client() for peer in ("alice", "bob", "42")}
        speakers = {
            "terminal": lambda text: screen.type(f"{text}\n"),
            "telegram": lambda text: telegram.say(text, 42),
            "feishu": lambda text: feishu.push(hook, feishu.event(text)),
        }
        for peer, client in clients.items():
            speakers[peer] = lambda text, c=client, p=peer: c.call("send", text=text, peer=p)
        for round in ("first", "second"):
            for who, say in speakers.items():
                say(f"{round} of {who}")
            wanted = {f"{round} of {who}" for who in speakers}
            until(lambda wanted=wanted: wanted <= {*desk.asked}, 20)
            screen.wait_for(f"heard {round} of terminal")
        telegram.wait_sent(2), feishu.wait_sent(2)
        for who in speakers:
            (last,) = [
                c for c in desk.model.chats if c.messages[-1]["content"] == f"second of {who}"
            ]
            said = [m["content"] for m in last.messages if m["role"] == "user"]
            assert said == [f"first of {who}", f"second of {who}"]
        assert [sent.text for sent in telegram.sent] == [f"heard {n} of telegram" for n in ROUNDS]
        assert [sent.text for sent in feishu.sent] == [f"heard {n} of feishu" for n in ROUNDS]
        for peer, client in clients.items():
            client.wait("message", text=f"heard second of {peer}")
            assert set(client.told("message", "text")) == set(client.history(peer=peer))
        desk.down()


ROUNDS = ("first", "second")


# --- nobody holds it up ---


@since("s05")
@pytest.mark.costly
def test_who_never_reads_holds_up_nobody(desk: Desk):
    desk.up()
    stuck = desk.shake(SO_RCVBUF=4096)[0]
    stuck.sendall(frame(request("sessions.history", peer="alice").encode()))
    flood = frame(request("agents.list").encode())
    deaf = desk.shake(SO_RCVBUF=4096)[0]
    deaf.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for _ in range(1000):
            deaf.sendall(flood * 1000)
    client = desk.client()
    assert client.ask("hello") == "heard hello" and client.call("status")["clients"] == 3
    assert len(client.ask("long x120", peer="alice")) == 12_000_000
    until(lambda: client.call("status")["clients"] == 2)
    assert client.ask("next", peer="bob") == "heard next"
    assert desk.client().ask("new", peer="carol") == "heard new"
    desk.down()


@since("s05")
def test_a_big_frame_is_refused_and_a_huge_one_ends_its_sender_alone(desk: Desk):
    desk.up()
    client, other = desk.client(), desk.client()
    client.send(request("send", text="x" * 2 * MIB))
    assert brief(client.reply()) == (-32600, None)
    client.send(request("bindings.list", id=1)[:-1] + " " * (MIB - 200) + "}")
    assert client.reply()["result"] == []
    client.send(request("send", text="x" * 8 * MIB))
    with pytest.raises(ConnectionClosed) as closed:
        client.reply()
    assert closed.value.rcvd.code == 1009
    assert other.ask("hello") == "heard hello" and desk.asked == ["hello"]


@since("s05")
def test_a_long_message_is_taken_and_answered(desk: Desk):
    desk.up(CONTEXT_TOKENS="10000000")
    client = desk.client()
    assert client.ask(text := "word " * 150_000, peer="alice") == f"heard {text[:200]}"
    assert client.history(peer="alice")[0] == text


@since("s05")
def test_two_hundred_idle_clients_and_those_who_say_nothing_at_all(desk: Desk):
    desk.up()
    assert all(b" 101 " in desk.shake()[1] for _ in range(200))
    for start in ("", "GET ", "GET /ws HTTP/1.1\r\nHost: 127.0.0.1", "\x16\x03\x01", "\r\n" * 9):
        desk.connect(start)
    client = desk.client()
    assert client.ask("hello") == "heard hello" and client.call("status")["clients"] == 201
    assert desk.fetch("/healthz")[0] == 200
    desk.down()


@since("s05")
def test_who_is_gone_leaves_nothing_behind(desk: Desk):
    screen = desk.up()
    client = desk.client()
    for number in range(10):
        client.begin("sessions.history", session=f"agent:main:{number:0900000}")
        client.reply()
    before = memory(screen.pid)
    for number in range(10, 70):
        client.begin("sessions.history", session=f"agent:main:{number:0900000}")
        client.reply()
        if number % 10 == 0:
            client.socket.close()
            client = desk.client()
    assert memory(screen.pid) - before < 25


@since("s05")
def test_frames_that_break_the_protocol_end_their_sender_alone(desk: Desk):
    desk.up()
    client = desk.client()
    for data in (b"\xff" * 20, b"\x81\x05hello", frame(b"\xff\xfe"), frame(b"", 3), b"\x88"):
        line = desk.shake()[0]
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        while line.recv(4096):
            pass
    assert client.ask("hello") == "heard hello"
    until(lambda: client.call("status")["clients"] == 1)


# --- what watchers see ---


@since("s05")
def test_the_history_and_what_follows_hold_each_answer_once(desk: Desk):
    desk.up()
    client = desk.client()
    for number in range(25):
        client.call("send", text=f"hello {number}", peer="alice")
        other = desk.client()
        messages = other.call("sessions.history", peer="alice")["messages"]
        client.wait("message", text=f"heard hello {number}")
        other.call("status")  # what came before its reply has come
        seen = [message["text"] for message in messages] + other.told("message", "text")
        assert seen.count(f"heard hello {number}") == 1, (number, messages)
        assert seen.count(f"hello {number}") in (1, 2), "twice if it was waiting: with its id"


@pytest.mark.guard
@since("s05")
def test_what_commands_show_goes_to_no_client(desk: Desk):
    screen, key = desk.up(), "agent:main:main"
    client = desk.client()
    client.call("sessions.history", session=key)
    screen.type("hello\n")
    client.wait("message", role="assistant")
    screen.type("/gateway\n")
    screen.wait_for("1 clients")
    client.call("status")
    assert not [text for text in client.told("delta", "text") if "token" in text]


@since("s05")
def test_a_sender_sees_the_answer_wherever_its_message_went(desk: Desk):
    """It is bound to another agent while it waits for its turn."""
    desk.up()
    client = desk.client()
    for number in range(4):  # as many as s10 answers at a time
        client.call("send", text="wait", peer=f"bob{number}")
    client.call("send", text="hello", peer="alice")
    client.call("bindings.set", agent="luna", channel="web", peer="alice")
    desk.gate.set()
    assert client.wait("message", text="heard hello")["agent"] == "luna"
