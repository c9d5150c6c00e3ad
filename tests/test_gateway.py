"""The gateway (s05): JSON-RPC, for those with the token, and nobody holds it up."""

import contextlib
import json
import random
import re
import socket
import sqlite3
import stat
import string
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversation import wait_until
from fake_model import FakeModel
from fake_telegram import FakeTelegram
from gateway_client import LINK
from gateway_client import Client
from gateway_client import Gateway
from gateway_client import load_json
from gateway_client import request
from harness import REPO
from harness import Section
from harness import pipe
from harness import since
from websockets.exceptions import ConnectionClosed

MAIN = "agent:main:main"
MIB = 1 << 20


@pytest.fixture
def gateway(
    section: Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Gateway]:
    with Gateway(section, workspace, fake_model) as gateway:
        yield gateway


# --- JSON-RPC 2.0 ---

LIST = {"jsonrpc": "2.0", "result": []}  # what bindings.list returns, without the id
EXAMPLES = [  # those of the specification, with methods of ours: what comes in answer
    (request("bindings.list", request_id=1), {**LIST, "id": 1}),
    ('{"jsonrpc": "2.0", "method": "bindings.list", "id": 2}', {**LIST, "id": 2}),
    (
        '{"jsonrpc": "2.0", "method": "bindings.list", "params": [], "id": 3}',
        {**LIST, "id": 3},
    ),
    ('{"jsonrpc": "2.0", "method": "bindings.list", "params": [1, 2]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', (-32601, "1")),
    ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', (-32700, None)),
    ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', (-32600, None)),
    ("[]", (-32600, None)),
    ("[1, 2, 3]", (-32600, None)),
    (f"[{request('status')}, {request('status', request_id=2)}]", (-32600, None)),
    ('[{"jsonrpc": "2.0", "method": "status", "id": 1}, {"jsonrpc"]', (-32700, None)),
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
NO_JSON = [
    "",
    " ",
    "{",
    "[1,",
    "nul",
    "NaN",
    "[-Infinity]",
    "'x'",
    '"\\x"',
    "[" * 100_000,
    "{}{}",
    b"\xff\xfe",
]


def brief(reply: dict) -> dict | tuple:
    """A reply as it is if it has a result, else its code and its id."""
    kind = "result" if "result" in reply else "error"
    assert reply.keys() == {"jsonrpc", "id", kind}
    assert reply["jsonrpc"] == "2.0"
    if kind == "result":
        return reply
    error = reply["error"]
    assert error.keys() <= {"code", "message", "data"}
    assert isinstance(error["message"], str) and error["message"]
    return error["code"], reply["id"]


def brief_replies(client: Client, frame: str | bytes) -> list[dict | tuple]:
    """All replies to a frame, in brief."""
    return [brief(reply) for reply in client.replies_to(frame)]


@since("s05")
def test_the_examples_of_the_specification(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    for text, expected in EXAMPLES:
        wanted = [] if expected is None else [expected]
        assert brief_replies(client, text) == wanted, text
        assert brief_replies(client, text.encode()) == wanted, "in a binary frame"
    for text in NO_REQUESTS:
        (found,) = brief_replies(client, text)
        assert found[0] == -32600, text
    for text in NO_JSON:
        assert brief_replies(client, text) == [(-32700, None)], text[:20]
    (reply,) = client.replies_to(f"[{request('status')}]")
    assert "batch" in reply["error"]["message"], "what is wrong with it is said"


@since("s05")
def test_ids_come_back_as_they_were_or_not_at_all(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    for value in ("a", "", "1", "ü\n", 0, 1, -7, 10**40, None):
        found = brief_replies(client, request("bindings.list", request_id=value))
        assert found == [{**LIST, "id": value}]
        found = brief_replies(client, request("nope", request_id=value))
        assert found == [(-32601, value)]
    for value in ("true", "false", "{}", "[]", '["a"]', "1e999", "-1e999", "9" * 5000):
        for method in ("bindings.list", "nope"):
            text = f'{{"jsonrpc": "2.0", "method": "{method}", "id": {value}}}'
            ((code, returned_id),) = brief_replies(client, text)
            assert code in (-32600, -32700), value[:20]
            assert returned_id is None


WRONG_PARAMETERS = [  # and what the error has to name
    ("send", {}, "text"),
    ("send", [], "text"),
    ("send", {"text": None}, "text"),
    ("send", {"text": ["x"]}, "text"),
    ("send", {"text": " \n\t\u2028"}, "text"),
    ("send", {"text": "x", "id": 7}, "id"),
    ("send", {"text": "x", "id": "x" * 1000}, "id"),
    ("send", {"text": "x", "id": "two words"}, "id"),
    ("send", {"text": "x", "id": "one\n"}, "id"),
    ("send", {"text": "x", "peer": 7}, "peer"),
    ("send", {"text": "x", "peer": "Alice"}, "peer"),
    ("send", {"text": "x", "session": MAIN}, "session"),
    ("send", ["x", "a", "b", "c"], ""),
    ("status", [1], ""),
    ("status", {"self": 1}, "self"),
    ("sessions.history", {"limit": "many"}, "limit"),
    ("sessions.history", {"limit": 7.5}, "limit"),
    ("sessions.history", {"session": "agent:nobody:main"}, "session"),
    ("sessions.history", {"session": "main"}, "session"),
    ("sessions.history", {"session": "agent:../main:x"}, "session"),
    ("bindings.set", {}, "binding"),
    ("bindings.set", {"binding": {"channel": "web"}}, "binding.agent"),
    ("bindings.set", {"binding": {"agent": "luna", "channel": 7}}, "binding.channel"),
    ("agents.list", {"": ""}, ""),
]


@since("s05")
def test_wrong_parameters_are_told_by_name_and_notifications_never_answered(
    gateway: Gateway,
):
    gateway.start()
    client = gateway.client()
    for method, params, name in WRONG_PARAMETERS:
        call = {"jsonrpc": "2.0", "method": method, "params": params}
        assert client.replies_to(json.dumps(call)) == [], call
        (reply,) = client.replies_to(json.dumps(call | {"id": 1}))
        assert brief(reply) == (-32602, 1), call
        assert name in reply["error"]["message"], (call, reply)
    call = {"jsonrpc": "2.0", "method": "send", "params": ["unanswered", "alice"]}
    assert client.replies_to(json.dumps(call)) == []
    client.call("sessions.history", peer="alice")
    wait_until(lambda: "heard unanswered" in client.history())
    assert gateway.questions == ["unanswered"]


@since("s05")
def test_an_internal_error_is_told_at_the_terminal_alone(gateway: Gateway):
    screen = gateway.start()
    client = gateway.client()
    database = sqlite3.connect(gateway.workspace / ".state" / "gateway.db")
    with contextlib.closing(database):
        database.execute("DROP TABLE inbox")
    client.send(request("send", text="hello"))
    error = client.reply()["error"]
    assert error == {"code": -32603, "message": "Internal error"}
    screen.wait_for("[web] send failed")
    screen.wait_for("no such table")
    assert client.call("bindings.list") == []
    assert gateway.questions == []


SEEDS = [  # what costs a turn, a sync or a thread is rarer
    *[
        request("status"),
        request("agents.list"),
        request("bindings.list", request_id="a"),
        request("bindings.remove", binding={"agent": "luna", "channel": "web"}),
        request("nope"),
        f"[{request('status')}, {request('nope', request_id=2)}, 1]",
    ]
    * 8,
    request("send", text=" ", peer="alice", id="one"),
    request("bindings.set", binding={"agent": "luna", "channel": "x", "peer": "p"}),
    request("sessions.list"),
    request("sessions.history", session=MAIN, peer="bob", limit=3),
]
VALUES = ["null", "true", "-1", "1e999", '"\\ud800"', "[]", "{}", '""', '"x"', "[[1]]"]
PIECES = [*string.printable, "é", "€", "\0", '"id":', '"jsonrpc":', '"2.0"']
JSON_VALUE = re.compile(r'(?<=: )("[^"]*"|\d+)')


def mutated_frame(chance: random.Random) -> bytes:
    """A request that some mutations may have made into something else."""
    if chance.random() < 0.03:
        return chance.randbytes(chance.randrange(90))
    text = chance.choice(SEEDS)
    for _ in range(chance.choice([0, 1, 1, 2, 4])):
        place = chance.randrange(len(text) + 1)
        match chance.randrange(6):
            case 0:
                text = text[:place] + chance.choice(PIECES) + text[place:]
            case 1:
                text = text[:place] + text[place + chance.randrange(8) :]
            case 2:
                text = text[:place]
            case 3:
                text = text[:place] + chance.choice(SEEDS)[-place:]
            case _:
                found = list(JSON_VALUE.finditer(text))
                if found:
                    start, end = chance.choice(found).span()
                    text = text[:start] + chance.choice(VALUES) + text[end:]
    return text.encode()


def memory_of(process_id: int) -> float:
    """What a process holds, in MiB."""
    text = Path(f"/proc/{process_id}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


@since("s05")
@pytest.mark.costly
def test_twenty_thousand_mutated_frames_do_no_harm(gateway: Gateway):
    screen = gateway.start()
    chance = random.Random(5)
    client = gateway.client()
    codes = []
    memory = 0
    for burst in range(100):
        for _ in range(199):
            client.send(mutated_frame(chance))
        for reply in client.replies_to(mutated_frame(chance)):
            if "error" in reply:
                codes.append(brief(reply)[0])
        if burst == 30:
            memory = memory_of(screen.pid)
    assert memory_of(screen.pid) - memory < 10
    assert len(codes) > 8000
    assert {*codes} == {-32700, -32600, -32601, -32602}
    assert gateway.client().ask("still there?") == "heard still there?"


# --- who gets in, and to what ---


@since("s05")
def test_only_those_with_the_token_get_in(gateway: Gateway):
    gateway.start()
    token = gateway.token
    own = f"http://127.0.0.1:{gateway.port}"
    assert gateway.status_of() == 101
    assert gateway.status_of(Origin=own) == 101
    assert gateway.status_of("/ws") == 401
    wrong_tokens = ["", "x", token[:-1], f"{token}x", token.swapcase(), "%ff", "%00"]
    for wrong in wrong_tokens:
        assert gateway.status_of(f"/ws?token={wrong}") == 401, wrong
        assert gateway.status_of(f"/ws?token={wrong}", Origin=own) == 401, wrong
    assert gateway.status_of(f"/ws?token=x&token={token}") == 401
    wait_until(lambda: gateway.client().call("status")["clients"] == 1)


@since("s05")
@pytest.mark.costly
def test_other_pages_and_other_hosts_are_refused(gateway: Gateway):
    gateway.start()
    own = f"http://127.0.0.1:{gateway.port}"
    foreign_origins = [
        "null",
        "file://",
        "x",
        "http://evil.example",
        f"http://evil.example:{gateway.port}",
        f"{own}.evil.example",
        f"{own}@evil.example",
        "http://127.0.0.1",
        f"http://127.0.0.1:{gateway.port + 1}",
        f"http://localhost:{gateway.port}",  # another name than that of the page
    ]
    for origin in foreign_origins:
        assert gateway.status_of(Origin=origin) == 403, origin
        assert gateway.status_of("/ws?token=x", Origin=origin) == 403, origin
    foreign_hosts = [
        "",
        "evil.example",
        f"evil.example:{gateway.port}",
        f"localhost.evil.example:{gateway.port}",
        f"127.0.0.1:{gateway.port}.evil.example",
        f"xlocalhost:{gateway.port}",
        "127a0b0c1",
    ]
    for host in foreign_hosts:
        assert gateway.status_of(Host=host) == 403, host
        assert gateway.status_of(Host=host, Origin=f"http://{host}") == 403, host
        for path in ("/", "/healthz", "/nope"):
            assert gateway.fetch(path, Host=host)[0] == 403, (path, host)
    assert gateway.status_of(Host=f"localhost\r\nHost: {own}") >= 400
    assert gateway.status_of(Origin=f"{own}\r\nOrigin: x") >= 400


@since("s05")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_page_that_comes_through_a_tunnel_gets_in(gateway: Gateway, scheme: str):
    gateway.start()
    # Another local port, port 80 (which is left out), and the other name.
    for host in ("127.0.0.1:9000", "localhost:9000", "127.0.0.1", "localhost"):
        assert gateway.status_of(Host=host) == 101
        assert gateway.status_of(Host=host, Origin=f"{scheme}://{host}") == 101
        assert gateway.fetch("/healthz", Host=host)[0] == 200


WEBCHAT = REPO / "sessions" / "webchat"
PAGE_FILES = ["index.html", "webchat.js", "panel.js", "webchat.css"]
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
}
OUTSIDE = [  # paths that lead to no file of the page
    "/nope",
    "/nope.js",
    "//",
    "/ws/",
    "/.",
    "/..",
    "/index",
    "/marked.LICENSE.txt",
    "/../webchat/index.html",
    "/../offline_model.py",
    "/..%2foffline_model.py",
    "/%2e%2e/offline_model.py",
    "/..\\offline_model.py",
    "/%00index.html",
    "//etc/passwd.html",
    "/" + "x" * 5000 + ".html",
    "/AGENTS.md",
    "/.state/gateway-token",
]


@since("s05")
@pytest.mark.costly
def test_the_pages(gateway: Gateway):
    gateway.start()
    files = {"/": WEBCHAT / "index.html"}
    for name in PAGE_FILES:
        files[f"/{name}"] = WEBCHAT / name
    for path, file in files.items():
        status, headers, body = gateway.fetch(path)
        assert (status, body) == (200, file.read_bytes()), path
        assert headers["content-type"] == f"{CONTENT_TYPES[file.suffix]}; charset=utf-8"
        check_headers(headers, body)
        assert gateway.token.encode() not in body
        assert gateway.fetch(f"{path}?a=b")[0] == 200
    status, headers, body = gateway.fetch("/healthz")
    assert (status, body) == (200, b"ok\n")
    check_headers(headers, body)
    for path in OUTSIDE:
        status, headers, body = gateway.fetch(path)
        assert status == 404, path[:40]
        check_headers(headers, body)
    status, headers, body = gateway.fetch("/", Host="evil.example")
    check_headers(headers, body)
    status, headers, body = gateway.fetch("/ws")
    check_headers(headers, body)


def check_headers(headers: dict, body: bytes) -> None:
    """The headers that each answer has."""
    assert headers["content-length"] == str(len(body))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] in ("no-cache", "no-store")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert not [name for name in headers if name.startswith("access-control")]


@since("s05")
def test_a_page_is_only_read(gateway: Gateway):
    gateway.start()
    page = gateway.fetch("/")[2]
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        for path in ("/", "/index.html", "/healthz"):
            status = gateway.fetch(path, method)[0]
            assert status in (0, 200, 400, 404, 405, 501), (method, path)
        for path in ("/", gateway.path):  # it says that a body follows
            status = gateway.fetch(path, method, **{"Content-Length": "9"})[0]
            assert status in (0, 400, 405, 413, 501), (method, path)
        assert gateway.fetch(gateway.path, method)[0] in (0, 400, 405, 501), method
    assert gateway.fetch("/")[2] == page
    assert gateway.client().call("status")["clients"] == 1


@since("s05")
def test_the_token_stays_the_same_and_is_the_owners_alone(gateway: Gateway):
    gateway.start()
    first = gateway.token
    assert re.fullmatch(r"[!-~]{20,}", first)
    gateway.stop()
    (file,) = files_with(gateway.workspace, first)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    gateway.start()
    assert gateway.token == first
    gateway.stop()
    gateway.start(GATEWAY_TOKEN="tök en&#/+%")
    assert gateway.token == "tök en&#/+%"
    assert gateway.client().call("status")
    assert gateway.status_of(f"/ws?token={first}") == 401
    assert file.read_text() == first
    gateway.stop()
    file.write_text("\n")  # as an editor leaves a file that was emptied
    gateway.start()
    assert len(gateway.token) >= 20
    assert gateway.status_of("/ws?token=%0A") == 401


def files_with(folder: Path, text: str) -> list[Path]:
    """The files that contain a text."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if text.encode() in file.read_bytes()]


@since("s05")
def test_the_token_is_shown_in_the_link_alone(gateway: Gateway):
    screen = gateway.start()
    client = gateway.client()
    client.ask("hello")
    for line in ("/channels", "/agents", "/list", "/bindings", "/help"):
        gateway.type(line)
    methods = ("status", "agents.list", "sessions.list", "bindings.list")
    results = [client.call(method) for method in methods]
    assert gateway.token not in json.dumps([results, client.events])
    assert f"on, at http://127.0.0.1:{gateway.port}" in json.dumps(results)
    assert LINK.search(screen.text)
    assert [f.name for f in files_with(gateway.workspace, gateway.token)] == [
        "gateway-token"
    ]


def tool(name: str, **arguments: str) -> str:
    """A question that makes the model call a tool."""
    return f"tool {name} {json.dumps(arguments)}"


def tool_results(model: FakeModel) -> list[str]:
    """The results of the tools in the last request."""
    messages = model.chats[-1].messages
    return [each["content"] for each in messages if each["role"] == "tool"]


@since("s05")
def test_bash_is_refused_from_the_web_unless_it_is_always_allowed(gateway: Gateway):
    gateway.start(APPROVAL="ask")
    assert "heard tool" in gateway.client().ask(tool("bash", command="echo > ran.txt"))
    (result,) = tool_results(gateway.model)
    assert result.startswith("error: not allowed")
    assert not (gateway.workspace / "ran.txt").exists()
    gateway.stop()
    gateway.start(APPROVAL="always", GATEWAY_TOKEN="a-long-secret")
    gateway.client().ask(tool("bash", command="echo ran; env"))
    (result,) = tool_results(gateway.model)
    assert result.startswith("ran\n")
    assert "a-long-secret" not in result


@since("s05")
def test_the_page_and_the_program_are_out_of_the_tools_reach(gateway: Gateway):
    """Whoever has the token may talk, and that is all."""
    gateway.start()
    client = gateway.client()
    page = WEBCHAT / "index.html"
    before = page.read_bytes()
    secrets = ["../.env", ".state/gateway-token", ".sessions", "/etc/passwd"]
    for path in (*secrets, str(page)):
        client.ask(tool("read_file", path=path))
    for path in (str(page), ".state/gateway-token", "x/../../webchat/index.html"):
        client.ask(tool("write_file", path=path, content="mine"))
    results = tool_results(gateway.model)
    assert len(results) == 8
    for result in results:
        assert result.startswith("error"), results
    assert page.read_bytes() == before


@since("s05")
def test_a_port_that_cannot_be_had_is_told_and_the_rest_runs(
    section: Section, fake_model: FakeModel
):
    fake_model.script(None, [lambda body: Gateway.answer(None, body)], repeat=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = str(server.getsockname()[1])
        for port in (taken, "abc", "99999", "-1"):
            env = fake_model.env(GATEWAY_PORT=port)
            done = pipe(section, "hello\n/gateway\n/channels\nquit\n", env)
            shown = done.stdout
            (line,) = [each for each in shown.splitlines() if each.startswith("[web]")]
            assert "off" in line
            assert port in line
            assert "port" in line or "address" in line
            assert "heard hello" in shown
            assert "token=" not in shown
            assert (done.returncode, done.stderr) == (0, "")


@since("s05")
def test_a_platform_that_hangs_does_not_hold_up_the_gateway(gateway: Gateway):
    with FakeTelegram() as telegram:
        telegram.hang("getMe", 20)
        gateway.start(TELEGRAM_BOT_TOKEN=telegram.token, TELEGRAM_BASE_URL=telegram.url)
        client = gateway.client()
        assert client.ask("hello") == "heard hello"
        assert client.call("status")["channels"]["telegram"] == "starting"
        gateway.stop()


# --- a conversation ---


@since("s05")
def test_a_turn_as_a_client_sees_it(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    other = gateway.client()
    key = "agent:main:web:default:direct:alice"
    sent = client.say("wait for it", peer="alice", id="one")
    assert sent == {"id": "web:alice:one", "session": key, "matched_by": "default"}
    client.wait("turn.answer")
    now = other.call("sessions.history", peer="alice")
    assert now["session"] == key
    assert now["agent"] == "main"
    assert now["running"] == "web:alice:one"
    assert now["waiting"] == [], "what runs is in the session already"
    (question,) = now["messages"]
    assert question["role"] == "user"
    assert question["text"] == "wait for it"
    assert question["id"] == "web:alice:one"
    gateway.gate.set()
    end = client.wait("turn.end")
    assert end["id"] == "web:alice:one"
    assert end["text"] == "heard wait for it"
    assert end["session_id"] == now["id"]
    names = [name for name, _ in client.events]
    pieces = client.told("turn.answer", "text")
    assert names == ["turn.begin", *["turn.answer"] * len(pieces), "turn.end"]
    assert len(pieces) > 1
    assert "".join(pieces) == "heard wait for it"
    begin = client.wait("turn.begin")
    assert (begin["id"], begin["text"]) == ("web:alice:one", "wait for it")
    assert begin["time"] == question["time"]
    assert all(params["session"] == key for _, params in client.events)
    later = other.call("sessions.history", session=key)
    assert later["running"] is None
    assert later["waiting"] == []
    assert later["messages"][0] == question
    assert later["messages"][1]["role"] == "assistant"
    assert later["messages"][1]["text"] == "heard wait for it"
    assert other.history(session=key, limit=1) == ["heard wait for it"]
    keys = [each["session"] for each in client.call("sessions.list")]
    assert keys.count(key) == 1


@since("s05")
def test_tool_calls_and_notes_are_events_of_their_own(gateway: Gateway):
    gateway.start()
    (gateway.workspace / "a.txt").write_text("what is in it")
    client = gateway.client()
    answer = client.ask(question := tool("read_file", path="a.txt"), peer="alice")
    assert answer == f"Let me see.\n\nheard {question}"
    (call,) = client.told("turn.tool_call", "text")
    assert call.startswith("read_file")
    assert "a.txt" in call
    assert client.told("turn.tool_result", "text") == ["what is in it"]
    names = [name for name, _ in client.events]
    assert names.index("turn.tool_call") < names.index("turn.tool_result")
    answered = "".join(client.told("turn.answer", "text")).split()
    assert answered == answer.split()
    history = client.call("sessions.history")["messages"]
    assert [each["role"] for each in history] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert history[1]["calls"][0]["name"] == "read_file"
    assert load_json(history[1]["calls"][0]["arguments"]) == {"path": "a.txt"}
    assert client.told("turn.note", "text") == []
    failed = client.ask("fail", peer="alice")
    (note,) = client.told("turn.note", "text")
    assert failed == note
    assert "422" in note
    assert "sk-test" not in note
    assert len(client.history()) == 4, "what has failed is taken back"


@since("s05")
def test_who_gives_no_peer_is_alone(gateway: Gateway):
    gateway.start()
    one = gateway.client()
    two = gateway.client()
    one.ask("my secret")
    two.ask("who am I?")
    assert two.history() == ["who am I?", "heard who am I?"]
    last = gateway.model.chats[-1].messages
    assert [m["content"] for m in last if m["role"] == "user"] == ["who am I?"]
    gateway.type("and here?")
    assert one.history() == ["my secret", "heard my secret"]


@since("s05")
def test_a_peer_has_to_match(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    wrong = ["Alice", "ü", " ", "a b", "../x", "-a", ".a", ":a", "a:b", "a\n", "a" * 65]
    for peer in wrong:
        for params in ({"text": "x"}, {}):
            method = "send" if params else "sessions.history"
            refusal = client.refusal(method, peer=peer, **params)
            assert refusal.code == -32602, peer
            assert "peer" in refusal.message
    for peer in ("alice", "7", "a.b_c-d", "a" * 64):
        assert client.ask(f"from {peer}", peer=peer) == f"heard from {peer}"
        assert client.history() == [f"from {peer}", f"heard from {peer}"]
    assert len(gateway.questions) == 4


@since("s05")
def test_each_id_is_taken_once(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    ids = ["one", "ONE", "7", "a_b-c", "x" * 64]
    for number, message_id in enumerate(ids):
        for _ in range(2):
            sent = client.say(f"text {number}", peer="alice", id=message_id)
            assert sent["id"] == f"web:alice:{message_id}"
    client.wait("turn.end", id=f"web:alice:{ids[-1]}")
    wait_until(lambda: client.call("status")["waiting"] == 0)
    # What follows is answered after the last of them has been noted as done.
    client.ask("last", peer="alice")
    gateway.kill()
    gateway.start()
    client = gateway.client()
    for number, message_id in enumerate(ids):
        client.say(f"text {number}", peer="alice", id=message_id)
    assert client.ask("new", peer="alice", id="new") == "heard new"
    assert client.ask("other", peer="bob", id="one") == "heard other", "bob's own id"
    texts = [f"text {number}" for number in range(len(ids))]
    assert gateway.questions == [*texts, "last", "new", "other"]
    assert client.told("turn.begin", "id") == ["web:alice:new", "web:bob:one"]


@since("s05")
def test_a_text_may_hold_any_character(gateway: Gateway):
    screen = gateway.start()
    text = "a \x00 \x1b[31m 👩‍👩‍👧‍👦 \u202e\u2028 end"
    assert gateway.client().ask(text) == f"heard {text}"
    screen.wait_for("👧")
    screen.wait_for("end")
    assert "\x1b[31m" not in screen.raw
    assert "\x00" not in screen.raw


def occupy(gateway: Gateway) -> Client:
    """Let the model hang on as many turns as run at a time: four from s10 on."""
    client = gateway.client()
    for number in range(4):
        client.say("wait", peer=f"first{number}")
    client.wait("turn.answer")
    return client


@since("s05")
def test_a_send_is_acknowledged_while_the_model_hangs(gateway: Gateway):
    gateway.start()
    occupy(gateway)
    client = gateway.client()
    other = gateway.client()
    # The gate is shut: whatever waited for the model would wait in vain.
    for number in range(10):
        client.say(f"text {number}", peer="alice")
        other.say(f"other {number}", peer="bob")
        assert client.call("status")["waiting"] >= 2 * number
    assert client.history() == []
    gateway.gate.set()
    client.wait("turn.end", text="heard text 9")
    other.wait("turn.end", text="heard other 9")
    said = [f"text {number}" for number in range(10)]
    assert client.history()[::2] == said
    assert client.history()[1::2] == [f"heard {text}" for text in said]
    assert len(other.history()) == 20


@since("s05")
def test_what_waits_for_its_turn_is_in_the_history(gateway: Gateway):
    """Who opens the page meanwhile sees that the message has arrived."""
    gateway.start()
    occupy(gateway)
    client = gateway.client()
    for peer in ("bob", "carol"):
        sent = client.say("hello", peer=peer)
        found = client.call("sessions.history", peer=peer)
        assert found["waiting"] == [{"id": sent["id"], "text": "hello"}]
        assert (found["running"], found["messages"]) == (None, [])
    gateway.gate.set()
    client.wait("turn.end", id=sent["id"])
    assert client.call("sessions.history", peer="carol")["waiting"] == []


@since("s05", until="s09")
def test_what_waits_behind_a_turn_of_the_terminal_is_in_the_history(gateway: Gateway):
    screen = gateway.start()
    client = gateway.client()
    screen.type("wait\n")
    gateway.model.wait(1)
    sent = client.say("hello", peer="alice")
    for _ in range(50):  # whatever happens to it meanwhile
        found = client.call("sessions.history")
        assert [each["id"] for each in found["waiting"]] == [sent["id"]]
    gateway.gate.set()
    client.wait("turn.end", id=sent["id"])
    found = client.call("sessions.history")
    assert found["waiting"] == []
    assert len(found["messages"]) == 2


@since("s05")
def test_kill_9_after_the_acknowledgement_loses_nothing(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    said = ["wait here", "and then", "and last"]
    for text in said:
        client.say(text, peer="alice", id=text.replace(" ", "-"))
    gateway.model.wait(1)
    gateway.kill()
    gateway.gate.set()
    gateway.start()
    client = gateway.client()
    for text in said:  # as the page does with what it saw no answer to
        client.say(text, peer="alice", id=text.replace(" ", "-"))
    heard = [line for text in said for line in (text, f"heard {text}")]
    wait_until(lambda: client.history() == heard)
    assert gateway.questions == ["wait here", *said]
    client.ask("one more")
    gateway.stop()
    gateway.start()
    assert gateway.client().history(peer="alice")[:6] == heard
    assert len(gateway.questions) == 5


@since("s05")
def test_two_clients_at_one_session_take_turns_and_both_see_all(gateway: Gateway):
    gateway.start()
    one = gateway.client()
    two = gateway.client()
    clients = [one, two]
    for client in clients:
        assert client.history(peer="team") == []
    said = [str(number) for number in range(8)]
    for number, text in enumerate(said):
        clients[number % 2].say(text, peer="team")
    for client in clients:
        client.wait("turn.end", text="heard 7")
        assert client.told("turn.begin", "text") == said
        assert client.told("turn.end", "text") == [f"heard {text}" for text in said]
        names = [name for name, _ in client.events if name != "turn.answer"]
        assert names == ["turn.begin", "turn.end"] * 8
    assert one.history() == two.history()
    one.say("fail", peer="team")
    two.say("go on", peer="team")
    one.wait("turn.end", text="heard go on")
    assert two.history()[-2:] == ["go on", "heard go on"]
    assert one.told("turn.end", "text") == two.told("turn.end", "text")


@since("s05")
def test_events_go_only_to_those_who_watch(gateway: Gateway):
    gateway.start()
    talks, watches, idle, elsewhere = [gateway.client() for _ in range(4)]
    watches.history(peer="alice")
    elsewhere.ask("hello", peer="bob")
    before = len(elsewhere.events)
    talks.ask("hello", peer="alice")
    watches.wait("turn.end")
    for client in (talks, watches, idle, elsewhere):
        client.call("status")
    assert idle.events == []
    assert len(elsewhere.events) == before
    assert watches.events == talks.events
    watches.history(session=MAIN)
    gateway.type("at the terminal")
    assert watches.wait("turn.end", session=MAIN)["text"] == "heard at the terminal"
    assert talks.told("turn.end", "text") == ["heard hello"]


@since("s05")
def test_what_commands_show_at_the_terminal_goes_to_no_client(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.call("sessions.history", session=MAIN)
    assert gateway.token in gateway.type("/gateway")
    gateway.type("hello")
    client.wait("turn.end")
    assert "token" not in json.dumps(client.events)


@since("s05")
def test_who_leaves_in_the_middle_finds_the_answer(gateway: Gateway):
    gateway.start()
    reset = struct.pack("ii", 1, 0)  # it is gone without a goodbye
    for number in range(6):
        client = gateway.client()
        client.say(f"wait {number}", peer="alice")
        if number == 0:
            client.wait("turn.answer")
        if number % 2:
            raw = client.socket.socket
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        client.leave()
    client = gateway.client()
    wait_until(lambda: client.call("status")["clients"] == 1)
    gateway.gate.set()
    wait_until(lambda: len(client.history(peer="alice")) == 12)
    assert client.history()[-1] == "heard wait 5"


@since("s05")
def test_the_history_of_no_session_is_empty_and_makes_nothing(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    logs = sorted(gateway.workspace.rglob("*.jsonl"))
    lists = client.call("sessions.list")
    for which in ({"peer": "nobody"}, {"session": "agent:luna:web:default:direct:x"}):
        found = client.call("sessions.history", **which)
        assert (found["messages"], found["running"]) == ([], None)
        assert (found["id"], found["waiting"]) == ("", [])
    assert found["agent"] == "luna"
    assert client.call("sessions.list") == lists
    assert sorted(gateway.workspace.rglob("*.jsonl")) == logs


@since("s05")
def test_a_limit_gives_the_last_messages(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    for text in ("one", "two"):
        client.ask(text, peer="alice")
    texts = ["one", "heard one", "two", "heard two"]
    for limit in (1, 3, 4, 5, 10**9):
        assert client.history(limit=limit) == texts[-limit:]
    for limit in (0, -1, -5):
        assert client.history(limit=limit) in ([], texts[-1:])


@since("s05")
def test_commands_from_the_web(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.ask("one", peer="alice")
    first = client.call("sessions.history")["id"]
    assert "session" in client.ask("/new errands", peer="alice")
    now = client.call("sessions.history")
    assert (now["messages"], now["label"]) == ([], "errands")
    assert client.told("turn.end", "session_id")[-1] == now["id"] != first
    listed = client.ask("/list", peer="alice")
    assert first in listed
    assert now["id"] in listed
    client.ask(f"/switch {first[:6]}", peer="alice")
    assert client.history() == ["one", "heard one"]
    assert "ghost" not in client.ask("/switch ghost", peer="alice")
    assert "tokens" in client.ask("/context", peer="alice")
    assert "luna" in client.ask("/agents", peer="alice")
    assert client.ask("/bindings", peer="alice")
    known = client.call("commands.list")
    shown = client.ask("/help", peer="alice")
    for usage in [entry["usage"] for entry in known]:
        assert usage in shown
    assert "/new [label]" in shown
    # Neither what is for the terminal alone, nor what is unknown, is a question.
    for line in ("/gateway", "/agent luna", "/start", "/nope", "/", "/NEW", "//x"):
        assert client.ask(line, peer="alice") == shown, line
    assert gateway.questions == ["one"]
    assert client.history() == ["one", "heard one"]
    assert client.ask("two", peer="alice") == "heard two"


@since("s05")
def test_what_has_ended_does_not_wait_any_more(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    for text in ["/new", "fail", "hello"] * 10:
        client.ask(text, peer="alice")
        found = client.call("sessions.history")
        assert (found["waiting"], found["running"]) == ([], None), text


@since("s05")
def test_compact_from_the_web_puts_a_summary_in_place(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    for text in ("one", "two", "three"):
        client.ask(text, peer="alice")
    assert "tokens" in client.ask("/compact", peer="alice")
    assert len(client.history()) < 6
    assert "[The conversation so far]" in client.history()[0]
    assert client.ask("four", peer="alice") == "heard four"


@since("s05")
def test_a_hundred_messages_of_one_peer_may_wait(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.say("wait", peer="alice")
    client.wait("turn.answer")
    for number in range(100):
        client.say(f"text {number}", peer="alice", id=f"id-{number}")
    refusal = client.refusal("send", text="too many", peer="alice")
    assert refusal.code == -32000
    assert "wait" in refusal.message
    assert client.say("hello", peer="bob"), "others are not held up"
    gateway.gate.set()
    client.wait("turn.end", id="web:alice:id-99")
    assert client.ask("and now", peer="alice") == "heard and now"
    assert "too many" not in gateway.questions
    assert len(gateway.questions) == 103


@since("s05")
def test_each_answer_is_in_the_history_or_in_what_follows(gateway: Gateway):
    """A page that opens at any moment of a turn misses nothing."""
    gateway.start()
    client = gateway.client()
    for number in range(25):
        sent = client.say(f"text {number}", peer="alice")
        late = gateway.client()
        found = late.call("sessions.history", peer="alice")
        late.events.clear()  # what came before the history is in it
        client.wait("turn.end", id=sent["id"])
        late.call("status")  # what came before the reply to this has come
        texts = [message["text"] for message in found["messages"]]
        waiting = [message["text"] for message in found["waiting"]]
        asked = [*texts, *waiting, *late.told("turn.begin", "text")]
        assert f"text {number}" in asked, found
        ended = late.told("turn.end", "id")
        assert f"heard text {number}" in texts or sent["id"] in ended, found
        assert len(ended) <= 1, "with the id, so that nobody takes it for a second one"
        late.leave()


@since("s05")
def test_a_sender_sees_the_answer_wherever_its_message_went(gateway: Gateway):
    """It is bound to another agent while it waits for its turn."""
    gateway.start()
    occupy(gateway)
    client = gateway.client()
    client.say("hello", peer="alice")
    binding = {"agent": "luna", "channel": "web", "peer": "alice"}
    client.call("bindings.set", binding=binding)
    gateway.gate.set()
    end = client.wait("turn.end", text="heard hello")
    assert end["session"] == "agent:luna:web:default:direct:alice"


# --- nobody holds it up ---


@since("s05")
def test_who_never_reads_is_dropped_and_holds_up_nobody(gateway: Gateway):
    gateway.start()
    deaf = gateway.handshake(receive_buffer=4096)[0]
    deaf.sendall(masked(request("sessions.history", peer="alice")))
    flooding = gateway.handshake(receive_buffer=4096)[0]
    flooding.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        for _ in range(1000):
            flooding.sendall(masked(request("agents.list")) * 1000)
    client = gateway.client()
    assert client.ask("hello") == "heard hello"
    assert client.call("status")["clients"] == 3
    speaker = gateway.client()
    speaker.say("long 100", peer="alice")
    speaker.leave()
    wait_until(lambda: client.call("status")["clients"] == 2)
    assert client.ask("next", peer="bob") == "heard next"
    gateway.stop()


def masked(data: str | bytes, opcode: int = 1) -> bytes:
    """A frame as a client sends it, under a mask that changes nothing."""
    if isinstance(data, str):
        data = data.encode()
    size = len(data)
    if size < 126:
        return struct.pack("!BBI", 128 + opcode, 128 + size, 0) + data
    return struct.pack("!BBHI", 128 + opcode, 128 + 126, size, 0) + data


@since("s05")
def test_a_big_frame_is_refused_and_a_huge_one_ends_its_sender_alone(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    other = gateway.client()
    assert brief_replies(client, request("send", text="x" * 2 * MIB)) == [
        (-32600, None)
    ]
    text = request("bindings.list", request_id=1)
    blanks = " " * (MIB - len(text))
    assert client.replies_to(f"{text}{blanks}")[0]["result"] == []
    client.send(request("send", text="x" * 8 * MIB))
    with pytest.raises(ConnectionClosed) as closed:
        client.reply()
    assert closed.value.rcvd.code == 1009
    assert other.ask("hello") == "heard hello"
    assert gateway.questions == ["hello"]


@since("s05")
@pytest.mark.costly
def test_a_long_message_is_taken_and_answered(gateway: Gateway):
    gateway.start(CONTEXT_TOKENS="10000000")
    client = gateway.client()
    text = "word " * 150_000
    assert client.ask(text, peer="alice") == f"heard {text[:200]}"
    assert client.history()[0] == text


BEGINNINGS = [
    "",
    "GET ",
    "GET /ws HTTP/1.1\r\nHost: 127.0.0.1",
    "\x16\x03\x01",
    "\r\n" * 9,
]


@since("s05")
def test_two_hundred_idle_clients_and_a_thousand_that_never_come_in(gateway: Gateway):
    screen = gateway.start()
    client = gateway.client()
    for _ in range(200):
        assert gateway.handshake()[1] == 101
    for number in range(1000):
        gateway.connect(BEGINNINGS[number % len(BEGINNINGS)])
        if number % 50 == 0:  # or the kernel would have to refuse some
            client.call("status")
    assert client.ask("hello") == "heard hello"
    assert gateway.client().ask("new") == "heard new"
    assert client.call("status")["clients"] == 202
    assert gateway.fetch("/healthz")[0] == 200
    files = Path(f"/proc/{screen.pid}/fd")
    if files.exists():  # soon, and not only when the time to say something is over
        wait_until(lambda: len(list(files.iterdir())) < 400, timeout=5)
    gateway.stop()


@since("s05")
@pytest.mark.costly
def test_nothing_is_left_behind_by_who_is_gone(gateway: Gateway):
    screen = gateway.start()
    client = gateway.client()
    memory = 0
    for number in range(60):
        # A session that does not exist: its key is as long as a frame may be.
        key = f"agent:main:{number:0900000}"
        client.send(request("sessions.history", session=key))
        client.reply()
        if number % 10 == 9:
            client.socket.close()
            client = gateway.client()
        if number == 19:
            memory = memory_of(screen.pid)
    assert memory_of(screen.pid) - memory < 20


@since("s05")
def test_no_list_of_the_gateway_grows_with_those_who_are_gone(
    section: Section, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
):
    """Looked at from inside, since nobody sees it from outside."""
    module = section.load()
    for name, value in fake_model.env().items():
        monkeypatch.setenv(name, value)
    agent = module.load_agent()
    module.open_session(agent)
    server = module.GatewayApp(agent).gateway
    server.start()
    address, token = server.link.split("/#")
    address = address.replace("http", "ws")
    opening = module.GatewayConnection.opening
    for number in range(5):
        client = Client(f"{address}/ws?{token}")
        client.call("sessions.history", peer=f"peer{number}")
        client.call("sessions.history", session=MAIN)
        client.leave()
        host, port = address.removeprefix("ws://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            wait_until(lambda: len(opening) == 1)
            raw.sendall(b"GET /")
    wait_until(lambda: not server.clients and not opening)
    wait_until(lambda: not any(server.watchers.values()))
    assert server.watchers == {}
    assert server.running == {}


@since("s05")
@pytest.mark.costly
def test_frames_that_break_the_protocol_end_their_sender_alone(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    unmasked = b"\x81\x05hello"
    broken = [b"\xff" * 20, unmasked, masked(b"\xff\xfe"), masked(b"", 3), b"\x88"]
    for data in broken:
        connection = gateway.handshake()[0]
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert client.ask("hello") == "heard hello"
    wait_until(lambda: client.call("status")["clients"] == 1)


@since("s05")
def test_twenty_clients_at_once_each_with_its_own_history(gateway: Gateway):
    gateway.start()
    clients = [gateway.client() for _ in range(20)]
    said = [f"text {number}" for number in range(5)]
    histories = {}

    def talk(client: Client, peer: str) -> None:
        for text in said:
            client.ask(f"{text} of {peer}", peer=peer)
        histories[peer] = client.history()

    threads = []
    for number, client in enumerate(clients):
        thread = threading.Thread(target=talk, args=(client, f"peer{number}"))
        threads.append(thread)
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(histories) == 20
    for peer, history in histories.items():
        expected = [f"{text} of {peer}" for text in said]
        assert history[::2] == expected
        assert history[1::2] == [f"heard {text}" for text in expected]
    for chat in gateway.model.chats:
        texts = [m["content"] for m in chat.messages if m["role"] == "user"]
        assert len({text.split()[-1] for text in texts}) == 1, "of one peer alone"
