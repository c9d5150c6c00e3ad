"""Feishu as a channel (s04): who is believed, who is answered, and that nothing is lost."""

import base64
import copy
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fake_feishu
import harness
import pytest
from fake_feishu import SEND_PATH
from fake_feishu import TOKEN_PATH
from fake_feishu import FakeFeishu
from fake_feishu import Sent
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from harness import since

ON = re.compile(r"\[feishu default\] on, at (http://127\.0\.0\.1:\d+/feishu/events)")
KEY = "an-encrypt-key"


class Desk:
    """A section at a terminal, Feishu on its other side, and a scripted model behind it."""

    def __init__(self, section: harness.Section, model: FakeModel, feishu: FakeFeishu):
        self.section, self.model, self.feishu = section, model, feishu
        self.gate, self.hook = threading.Event(), ""
        self.screens: list[harness.Screen] = []
        model.script("brain", [self.brain], repeat=True)

    def brain(self, body: dict) -> Any:
        """Does what the last user message says, without the name that stands before it."""
        messages = body["messages"]
        last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        words = re.sub(r"^\[\S+\] ", "", last)
        verb, _, rest = words.partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {words}"))
        if verb == "fail":
            return Error(422)
        if verb == "long":
            return Text(rest[:1] * int(rest[1:]), pieces=[rest[:1] * int(rest[1:])])
        if verb == "bash" and messages[-1]["role"] != "tool":
            return ToolCalls([("bash", {"command": rest})])
        return Text(f"heard {words[:200]}")

    def settings(self, feishu: FakeFeishu | None = None, suffix: str = "", **more: str) -> dict:
        """What one account is told, `more` by the short names."""
        app = feishu or self.feishu
        names = {"APP_ID": app.app_id, "APP_SECRET": app.app_secret, "DOMAIN": app.url, "PORT": "0"}
        names |= {"VERIFICATION_TOKEN": app.verification_token, "ENCRYPT_KEY": app.encrypt_key}
        names |= {"ALLOWED_CHATS": "ou_alice, oc_group"} | more
        return {f"FEISHU_{name}{suffix}": value for name, value in names.items()}

    def start(self, fsize: int | None = None, **env: str) -> harness.Screen:
        """A process at a terminal, ended with the test at the latest."""
        env = self.model.env("brain", **env)
        self.screens.append(screen := harness.Screen(self.section, env, fsize=fsize))
        return screen

    def up(self, **more: str) -> harness.Screen:
        """A process that listens to Feishu."""
        screen = self.start(**self.settings(**more))
        self.hook = screen.wait_for(ON)[1]
        return screen

    def ask(self, text: str, timeout: float = 20, **about: Any) -> Sent:
        """One message, and what is sent after it."""
        count = len(self.feishu.sent)
        assert self.push(self.feishu.event(text, **about)) == 200
        return self.feishu.wait_sent(count + 1, timeout)[count]

    def push(self, event: Any, forge: str = "") -> int:
        """Post an event; the status of the answer, which comes at once."""
        answer = self.feishu.push(self.hook, event, forge=forge)
        assert answer.status and answer.seconds < 1, answer
        return answer.status

    @property
    def asked(self) -> list[str]:
        """What the model was asked, in order."""
        chats = [chat.messages[-1] for chat in self.model.chats]
        return [message["content"] for message in chats if message["role"] == "user"]

    @property
    def replies(self) -> list[str]:
        return [sent.text for sent in self.feishu.sent]


@pytest.fixture
def sealing() -> str:
    """The encrypt key; a test may parametrize it."""
    return KEY


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel, sealing: str) -> Iterator[Desk]:
    """Whatever a test does: no traceback, no secret in sight, and Feishu has no complaint."""
    with FakeFeishu(sealing, "a-verification-token") as feishu:
        feishu.app_secret = "an-app-secret"
        yield (desk := Desk(section, fake_model, feishu))
        desk.gate.set()
        for screen in desk.screens:
            screen.close()
    printed = "\n".join(screen.raw for screen in desk.screens)
    assert "Traceback" not in printed and "Exception" not in printed, harness.plain(printed)
    files = [file.read_bytes() for file in workspace.rglob("*") if file.is_file()]
    for secret in ("an-app-secret", "a-verification-token", *filter(None, [sealing])):
        assert not [text for text in (printed.encode(), *files) if secret.encode() in text]
    assert not feishu.problems


either = pytest.mark.parametrize("sealing", ["", KEY], ids=["plain", "sealed"])


def lines(screen: harness.Screen, *parts: str) -> list[str]:
    """The lines on the screen that say all of these."""
    return [line for line in screen.paper.splitlines() if all(part in line for part in parts)]


def seal(feishu: FakeFeishu, data: bytes) -> fake_feishu.Encoded:
    """Any bytes as the body of an event, encrypted and well signed if there is a key."""
    if not feishu.encrypt_key:
        return data, {}
    inner = base64.b64encode(fake_feishu.encrypt(feishu.encrypt_key, data)).decode()
    return sign(feishu, json.dumps({"encrypt": inner}).encode())


def sign(feishu: FakeFeishu, body: bytes) -> fake_feishu.Encoded:
    """A body as it is, well signed."""
    stamp = str(int(time.time()))
    signature = hashlib.sha256(f"{stamp}n{feishu.encrypt_key}".encode() + body).hexdigest()
    names = {"Timestamp": stamp, "Nonce": "n"}
    headers = {f"X-Lark-Request-{name}": value for name, value in names.items()}
    return body, headers | {"X-Lark-Signature": signature}


def changed(event: dict, path: str, *value: Any) -> dict:
    """An event with a field of another value, or without it."""
    event = copy.deepcopy(event)
    *parents, name = path.split(".")
    place = event
    for parent in parents:
        place = place[parent]
    if value:
        place[name] = value[0]
    else:
        del place[name]
    return event


def connect(hook: str, data: bytes) -> socket.socket:
    """A connection of our own making."""
    parts = urlsplit(hook)
    connection = socket.create_connection((parts.hostname, parts.port), 5)
    connection.sendall(data)
    return connection


def status_of(hook: str, head: str, body: bytes = b"") -> int:
    """The status that a request of our own making gets."""
    with connect(hook, f"{head}\r\nHost: localhost\r\n\r\n".encode() + body) as connection:
        return int(connection.recv(100).split()[1])


# --- who is believed ---

MESSAGE = [
    f"event.message{name}"
    for name in ("", ".message_id", ".chat_type", ".message_type", ".content")
]
SENDER = [
    f"event.sender{name}" for name in ("", ".sender_id", ".sender_id.open_id", ".sender_type")
]
HEADER = [f"header{name}" for name in ("", ".token", ".event_type", ".event_id")]
REQUIRED = ["event", *MESSAGE, *SENDER, *HEADER]
TYPED = [path for path in REQUIRED if not path.endswith(("message_id", "event_id", "message_type"))]
CONTENTS = ("no JSON", "[]", '"x"', "{}", '{"text": 5}', '{"text": null}', 5, None)
POSTS = ('{"content": 5}', '{"content": [5]}', '{"content": [[5]]}', "{}")
MENTIONS = (5, "x", [5], [None], [{}], [{"key": 5, "id": 5, "name": 5}])
BODIES = [b"", b"{}", b"[]", b"5", b"null", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000]
BODIES += [b'{"header": []}', b'{"type": "url_verification"}', b'{"type": "url_verification", 5}']
SEALED = ("", "AAAA", "%%%", "\u00e9", 5, None, [], {})


@pytest.mark.guard
@since("s04")
@either
def test_a_challenge_is_answered_only_with_the_token(desk: Desk):
    desk.up()
    feishu, challenge = desk.feishu, desk.feishu.challenge()
    answer = feishu.push(desk.hook, challenge)
    assert (answer.status, answer.json) == (200, {"challenge": challenge["challenge"]})
    assert answer.seconds < 1
    sealed = ("plain", "key", "padding", "base64") if feishu.encrypt_key else ()
    for forge in ("token", "json", *sealed):
        answer = feishu.push(desk.hook, challenge, forge=forge)
        assert 400 <= answer.status < 500 and challenge["challenge"] not in answer.body, forge
    for odd in (changed(challenge, "token"), changed(challenge, "challenge")):
        assert 400 <= desk.push(odd) < 500


@pytest.mark.guard
@since("s04")
@either
def test_nobody_else_is_believed(desk: Desk):
    """Forged, stale and malformed: refused at once, no question, and the next one is answered."""
    screen = desk.up(ALLOWED_CHATS="ou_alice, oc_group,")
    feishu, sealed = desk.feishu, bool(desk.feishu.encrypt_key)
    good = feishu.event("forged")
    for forge in fake_feishu.FORGERIES if sealed else ("token", "json"):
        assert 400 <= desk.push(good, forge) < 500, forge
    if sealed:
        ahead = feishu.encode(good, timestamp=time.time() + fake_feishu.STALE)
        body, headers = feishu.encode(good)
        unsigned = [{k: v for k, v in headers.items() if k != name} for name in headers]
        forged = [ahead, *((body, less) for less in unsigned[1:])]
        forged += [(body, headers | {"X-Lark-Request-Timestamp": bad}) for bad in ("", "x", "nan")]
        forged += [sign(feishu, json.dumps({"encrypt": odd}).encode()) for odd in SEALED]
        for request in forged:
            assert 400 <= desk.push(request) < 500, request
    odd = [changed(good, path) for path in REQUIRED]
    odd += [changed(good, path, value) for path in TYPED for value in (None, 5, [], "")]
    odd += [changed(good, "event.message.content", value) for value in CONTENTS]
    post = changed(good, "event.message.message_type", "post")
    odd += [changed(post, "event.message.content", value) for value in POSTS]
    odd += [changed(good, "event.message.mentions", value) for value in MENTIONS]
    for event in odd:
        assert desk.push(seal(feishu, json.dumps(event).encode())) < 500, event
    for body in BODIES:
        assert 400 <= desk.push(seal(feishu, body)) < 500 and 400 <= desk.push((body, {})) < 500
    assert desk.ask("good").text == "heard good"
    assert desk.asked == ["good"]
    assert len(lines(screen, "[feishu default]")) < 12, screen.paper  # told, but not each time


@since("s04")
def test_requests_that_are_no_requests(desk: Desk):
    """Other paths and methods, sizes, half requests and clients that hang up."""
    desk.up()
    event, post = desk.feishu.event("no"), "POST /feishu/events HTTP/1.1"
    for path in ("/", "/feishu", "/feishu/events/more", "/x?/feishu/events"):
        assert desk.feishu.push(desk.hook.replace("/feishu/events", path), event).status == 404
    body, headers = desk.feishu.encode(event)
    head = "".join(f"\r\n{name}: {value}" for name, value in headers.items())
    for method in ("GET", "PUT", "DELETE", "HEAD"):
        about = f"{method} /feishu/events HTTP/1.1\r\nContent-Length: {len(body)}{head}"
        assert status_of(desk.hook, about, body) >= 400
    assert status_of(desk.hook, f"{post}\r\nContent-Length: {(1 << 20) + 1}") == 413
    for length in ("", "\r\nContent-Length: -5", "\r\nContent-Length: x", "\r\nContent-Length: 0"):
        assert 400 <= status_of(desk.hook, f"{post}{length}") < 500, length
    assert 400 <= status_of(desk.hook, f"{post}\r\nContent-Length: {'9' * 5000}") < 500
    halves = [connect(desk.hook, f"{post}\r\nContent-Length: 99\r\n\r\n{{".encode())]
    halves += [connect(desk.hook, b"POST /fei") for _ in range(20)]
    big = feishu_body(desk.feishu, 700_000)
    assert desk.push(seal(desk.feishu, big)) == 200  # a stranger's, and not too long
    assert desk.ask("while they hang").text == "heard while they hang"
    rest = f"{post}\r\nContent-Length: {len(body)}{head}\r\n\r\n".encode()
    halves += [connect(desk.hook, rest + body) for _ in range(5)]
    halves += [connect(desk.hook, rest + body[:-9]) for _ in range(5)]
    time.sleep(0.1)
    for half in halves:  # an RST, as from a client that has died
        half.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        half.close()
    assert desk.ask("after that").text in ("heard no", "heard after that")
    desk.feishu.wait_sent(3)
    assert sorted(desk.asked) == ["after that", "no", "while they hang"]


def feishu_body(feishu: FakeFeishu, size: int) -> bytes:
    """An event of a stranger, of so many bytes."""
    body = json.dumps(feishu.event("", open_id="ou_stranger"))
    return body.replace('\\"text\\": \\"', '\\"text\\": \\"' + "x" * (size - len(body))).encode()


@pytest.mark.guard
@since("s04")
def test_encrypted_events_need_the_key(desk: Desk):
    screen = desk.up(ENCRYPT_KEY="")
    for _ in range(3):
        assert 400 <= desk.push(desk.feishu.event("sealed")) < 500
    screen.wait_for("FEISHU_ENCRYPT_KEY")
    desk.feishu.encrypt_key = ""
    assert desk.ask("plain").text == "heard plain"
    assert desk.asked == ["plain"] and len(lines(screen, "FEISHU_ENCRYPT_KEY")) == 1


@since("s04")
def test_a_question_is_answered_once_and_the_platform_at_once(desk: Desk):
    """Replayed, pushed again under new ids, while the model works, after a kill and a restart."""
    desk.up()
    feishu, first = desk.feishu, desk.feishu.event("first")
    about = first["event"]["message"]["message_id"], first["header"]["event_id"]
    again = [feishu.encode(first), first, feishu.event("again", message_id=about[0])]
    again += [again[0], feishu.event("again", event_id=about[1])]
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(desk.push, [first] * 60)) == set(map(desk.push, again)) == {200}
    feishu.wait_sent(1)
    waiting = [feishu.event(f"wait {n}") for n in range(3)]
    for push in (*waiting, waiting[2], *again):
        assert desk.push(push) == 200
    desk.model.wait(2)
    desk.screens[-1].kill()
    desk.up()
    for push in (*again, *waiting):
        assert desk.push(push) == 200
    desk.gate.set()
    assert desk.push(feishu.event("last")) == 200
    feishu.wait_sent(5)
    desk.screens[-1].type("quit\n")
    assert desk.screens[-1].wait_exit() == 0
    desk.up()
    for push in (*again, *waiting):
        assert desk.push(push) == 200
    assert desk.ask("end").text == "heard end"
    texts = ["first", "wait 0", "wait 1", "wait 2", "last", "end"]
    assert desk.replies == [f"heard {text}" for text in texts]
    assert [m["content"] for m in desk.model.chats[-1].messages if m["role"] == "user"] == texts


# --- who is answered, and where ---


@since("s04")
def test_private_chats_and_groups(desk: Desk):
    desk.up()
    feishu, group = desk.feishu, {"chat_type": "group"}
    sent = desk.ask("hello", mentions="null")
    assert (sent.receive_id_type, sent.receive_id, sent.text) == (
        "open_id",
        "ou_alice",
        "heard hello",
    )
    sent = desk.ask("hello", mentions="bot", **group)
    assert (sent.receive_id_type, sent.receive_id, sent.text) == (
        "chat_id",
        "oc_group",
        "heard hello",
    )
    everyone = {"key": "@_all", "id": {}, "name": "Everyone"}
    for mentions in (None, "null", "all", [], ["ou_bob"], [everyone]):
        assert desk.push(feishu.event("not for it", mentions=mentions, **group)) == 200
    read = feishu.event("read")
    read["header"]["event_type"] = "im.message.message_read_v1"
    app = feishu.event("a bot's", mentions="bot", sender_type="app", **group)
    for event in (read, app, feishu.event("a bot's", sender_type="app")):
        assert desk.push(event) == 200
    people = ["bot", *("ou_bob" for _ in range(9)), "ou_zed"]
    text = "@_user_1 ask @_user_2, @_user_11 and @_all"
    people = [feishu.mention(who, n) for n, who in enumerate(people, 1) if n in (1, 2, 11)]
    assert desk.ask(text, mentions=people, **group).text == "heard ask @Bob, @Zed and @_all"
    assert desk.ask("@_user_1\u4f60\u597d", mentions="bot", **group).text == "heard \u4f60\u597d"
    assert desk.ask("@_user_1", mentions="bot", **group).text
    post = {"message_type": "post"}
    assert desk.ask("one\ntwo", **post).text == "heard one\ntwo"
    desk.ask("@_user_1 look, @_user_2", mentions=["bot", "ou_bob"], **group, **post)
    assert feishu.sent[-1].text == "heard look, @Bob"
    assert feishu.sent[-1].receive_id == "oc_group"
    for kind in ("image", "file", "audio", "sticker"):
        assert kind in desk.ask("x", message_type=kind).text
    assert not [text for text in desk.asked if re.search("not for it|a bot's|read|_user_|_1", text)]


@since("s04")
def test_an_answer_that_is_long(desk: Desk):
    """It comes in pieces, in order, and whole, though one of them needs two tries."""
    desk.up()
    feishu = desk.feishu
    desk.ask("long \u957f60000")
    wait_until(lambda: len("".join(desk.replies)) >= 60_000)
    assert "".join(desk.replies) == "\u957f" * 60_000
    feishu.sent.clear()
    feishu.fail(SEND_PATH, 503, "<html>busy</html>", accepted=True)
    desk.ask("long \U0001f600100000")
    wait_until(lambda: len("".join(desk.replies)) >= 100_000)
    assert "".join(desk.replies) == "\U0001f600" * 100_000
    assert {sent.receive_id for sent in feishu.sent} == {"ou_alice"}


def wait_until(condition: Any, timeout: float = 20) -> None:
    """Wait for something that nothing tells of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.02)


@pytest.mark.guard
@since("s04")
def test_strangers(desk: Desk):
    """No answer, no question to the model; the terminal shows once which id to allow."""
    screen = desk.up()
    feishu = desk.feishu
    for _ in range(2):
        assert desk.push(feishu.event("let me in", open_id="ou_stranger")) == 200
        strange = {"chat_type": "group", "chat_id": "oc_strange", "open_id": "ou_alice"}
        assert desk.push(feishu.event("let us in", mentions="bot", **strange)) == 200
        assert desk.push(feishu.event("x", open_id="ou_\x1b[31mred\x07\u202e\nline")) == 200
    assert desk.ask("hi \x1b]0;owned\x07\x1b[2J").text
    assert len(desk.asked) == len(feishu.sent) == 1
    assert len(lines(screen, "oc_strange")) == 1 and len(lines(screen, "ou_stranger")) == 1
    for bad in ("\x1b[31m", "\x1b]0", "\x1b[2J", "\x07", "\u202e"):
        assert bad not in screen.raw
    screen.close()
    feishu.sent.clear()
    screen = desk.up(ALLOWED_CHATS="")
    assert desk.push(feishu.event("me", open_id="ou_alice")) == 200
    assert desk.push(feishu.event("nobody", open_id="")) < 500
    screen.wait_for("ou_alice")
    screen.type("at the terminal\n")
    screen.wait_for("heard at the terminal")
    assert len(desk.asked) == 2 and not feishu.sent


@since("s04")
def test_a_turn_that_fails_and_a_new_session(desk: Desk):
    """The person is told, the next question works; /new works from afar, too."""
    desk.up()
    assert "422" in desk.ask("fail").text
    assert desk.ask("one").text == "heard one"
    assert "session" in desk.ask("/new").text
    assert desk.ask("two").text == "heard two"
    told = [
        [m["content"] for m in chat.messages if m["role"] == "user"] for chat in desk.model.chats
    ]
    asked = [words for words, _ in itertools.groupby(told)]  # from s09 on, some twice and more
    assert asked == [["fail"], ["one"], ["two"]]


# --- what the platform does to a sender ---


@since("s04")
def test_the_token_is_kept_and_renewed(desk: Desk):
    desk.up()
    feishu = desk.feishu
    for number in range(5):
        desk.ask(f"q{number}")
    assert feishu.token_requests == 1
    feishu.expire_seconds = 1
    feishu.expire_token()
    assert desk.ask("expired").text == "heard expired"
    assert (feishu.token_requests, [call.status for call in feishu.calls].count(400)) == (2, 1)
    time.sleep(1.1)
    assert desk.ask("renewed").text == "heard renewed"
    assert (feishu.token_requests, [call.status for call in feishu.calls].count(400)) == (3, 1)
    assert len(feishu.sent) == 7


@since("s04")
@pytest.mark.costly
def test_limits_and_refusals(desk: Desk):
    """A limit is waited out as told; what is refused for good is told once; others go on."""
    screen = desk.up(ALLOWED_CHATS="ou_alice ou_bob")
    feishu = desk.feishu
    for code, status in ((230002, 400), (230022, 200)):
        before = len(feishu.calls)
        feishu.fail(SEND_PATH, status, {"code": code, "msg": "never"})
        assert desk.push(feishu.event(f"refused {code}")) == 200
        screen.wait_for(re.compile(rf"\[feishu default\] .*{code} never"))
        assert desk.ask("next", open_id="ou_bob").text == "heard next"
        assert len(feishu.calls) == before + 2 and len(lines(screen, f"{code} never")) == 1
    for seconds, style in ((2, "429"), (2, "400"), (1, "230020")):
        feishu.rate_limit(1, seconds, style)
        assert desk.ask(style).text == f"heard {style}"
    assert len(desk.replies) == 5


@since("s04", until="s07")
@pytest.mark.costly(last=True)
def test_trouble_with_the_network(desk: Desk):
    """Errors that pass, lost connections, answers that make no sense: sent in the end, and once."""
    desk.up()
    feishu = desk.feishu
    faults = [
        lambda: feishu.fail(SEND_PATH, 502, "<html>bad gateway</html>"),
        lambda: feishu.fail(SEND_PATH, 500, {"code": 1000, "msg": "internal"}, accepted=True),
        lambda: feishu.drop(part=SEND_PATH),
        lambda: feishu.drop(part=SEND_PATH, accepted=True),
        lambda: feishu.fail(SEND_PATH, 200, "<html>a portal</html>"),
    ]
    for number, fault in enumerate(faults):
        fault()
        assert desk.push(feishu.event(f"q{number}")) == 200
        wait_until(lambda: [call.path for call in feishu.calls].count(SEND_PATH) == 2)
        wait_until(lambda: feishu.calls[-1].status == 200)
        feishu.calls.clear()
    assert desk.ask("fine").text == "heard fine"
    assert desk.replies == [*(f"heard q{number}" for number in range(5)), "heard fine"]


@since("s04")
@pytest.mark.parametrize("odd", [{"code": 0}, {"code": 0, "tenant_access_token": None}, [], 5])
@pytest.mark.costly
def test_a_token_that_is_none(desk: Desk, odd: Any):
    """The channel lives on, whatever it is given in place of a token."""
    desk.up()
    desk.feishu.expire_token()
    desk.feishu.fail(TOKEN_PATH, 200, odd)
    assert desk.push(desk.feishu.event("first")) == 200
    wait_until(lambda: desk.feishu.token_requests > 1)
    assert desk.push(desk.feishu.event("second")) == 200
    wait_until(lambda: "heard second" in desk.replies)
    assert desk.replies in (["heard first", "heard second"], ["heard second"])


@since("s04", until="s04")
@pytest.mark.costly
def test_no_platform_at_the_start_and_one_that_hangs(desk: Desk):
    feishu = desk.feishu
    feishu.down()
    screen = desk.start(**desk.settings())
    screen.wait_for(re.compile(r"\[feishu default\] (?!on).*trying again"))
    screen.type("still here\n")
    screen.wait_for("heard still here")
    feishu.up()
    desk.hook = screen.wait_for(ON)[1]
    assert len(lines(screen, "[feishu default]")) == 2
    feishu.hang(11, part=SEND_PATH)
    assert desk.ask("slow").text == "heard slow"
    assert desk.ask("after it").text == "heard after it"
    sends = [call for call in feishu.calls if call.path == SEND_PATH]
    assert len(sends) == 3 and desk.replies == ["heard slow", "heard after it"]


@since("s04")
def test_an_answer_that_was_not_sent_before_the_end(desk: Desk):
    """It is sent after a restart, and the model is not asked again."""
    screen = desk.up()
    desk.feishu.down()
    assert desk.push(desk.feishu.event("hello")) == 200
    screen.wait_for("heard hello")
    screen.kill()
    desk.feishu.up()
    desk.up()
    assert desk.feishu.wait_sent(1)[0].text == "heard hello"
    assert desk.ask("next").text == "heard next"
    assert desk.asked == ["hello", "next"]


@pytest.mark.guard
@since("s04")
def test_accounts_that_cannot_work(desk: Desk):
    """Each says so in one line, names no secret, and leaves the others and the terminal alone."""
    wrong = f"an-app-secret of {desk.feishu.app_id}"
    bad = {
        "_NOTOKEN": {"VERIFICATION_TOKEN": ""},
        "_NOSECRET": {"APP_SECRET": ""},
        "_WRONG": {"APP_SECRET": wrong},
        "_NOBODY": {"APP_ID": "cli_nobody"},
    }
    env = {k: v for name, odd in bad.items() for k, v in desk.settings(suffix=name, **odd).items()}
    echo = {"code": 10014, "msg": f"secret {wrong} and an-app-secret are invalid"}
    desk.feishu.fail(TOKEN_PATH, 200, echo, times=1)
    screen = desk.start(**env)
    wait_until(lambda: all(lines(screen, f"[feishu {name[1:].lower()}] ") for name in bad))
    assert len(lines(screen, "] off")) == 2 and len(lines(screen, "trying again")) == 2
    assert len(lines(screen, "notoken", "FEISHU_VERIFICATION_TOKEN")) == 1
    assert len(lines(screen, "nosecret", "FEISHU_APP_SECRET")) == 1
    assert len(lines(screen, "[feishu")) == len(bad)
    screen.type("hello\n")
    screen.wait_for("heard hello")


@since("s04")
def test_questions_at_the_very_start(desk: Desk):
    """While a channel still gets ready, the terminal is answered, and so is what was left over."""
    env = desk.model.env("brain", **desk.settings())
    for number in range(3):
        printed = harness.pipe(desk.section, "hello\nquit\n", env)
        assert "heard hello" in printed.stdout, printed
        desk.up()
        assert desk.push(desk.feishu.event(f"wait {number}")) == 200
        desk.model.wait(len(desk.model.chats) + (desk.asked[-1] == "hello"))
        desk.screens[-1].kill()
        desk.gate.set()
        desk.up()
        desk.feishu.wait_sent(number + 1)
        desk.screens[-1].kill()
        desk.gate.clear()
    assert desk.replies == ["heard wait 0", "heard wait 1", "heard wait 2"]


# --- kill -9 ---


@since("s04")
@pytest.mark.costly(last=True)
def test_killed_15_times(desk: Desk, whole: bool):
    """At any moment: nothing is lost, each is answered, and no question stands twice."""
    chance, feishu, kills = random.Random(11), desk.feishu, 15 if whole else 6
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    hook, people, ended = f"http://127.0.0.1:{port}/feishu/events", ["ou_alice", "ou_bob"], []
    feeding = threading.Event()
    feeding.set()

    def feed(who: str) -> None:
        number = 0
        while feeding.is_set():
            text = f"{'bash echo' if number % 3 == 2 else 'say'} {who} {number}"
            event, number = feishu.event(text, open_id=who), number + 1
            while feishu.push(hook, event, timeout=1).status != 200:
                time.sleep(0.02)
            ended.append(text)
            time.sleep(0.03)

    feeders = [threading.Thread(target=feed, args=[who], daemon=True) for who in people]
    settings = desk.settings(ALLOWED_CHATS=" ".join(people), PORT=port)
    for feeder in feeders:
        feeder.start()
    for number in range(kills):
        screen = desk.start(**settings, APPROVAL="always")
        if number % 5:
            with suppress(AssertionError):
                screen.wait_for(ON)
        time.sleep(chance.uniform(0.0, 0.3))
        screen.kill()
    feeding.clear()
    desk.start(**settings, APPROVAL="always")
    for feeder in feeders:
        feeder.join(10)
    expected = {f"heard {text}" for text in ended}
    assert len(ended) == len(expected) > 2 * kills
    wait_until(lambda: expected <= set(desk.replies), 30)
    assert sorted(desk.replies) == sorted(expected)
    # A request that a kill cut off before its body is no request of ours.
    desk.model.problems[:] = [p for p in desk.model.problems if "messages is not a list" not in p]
    for chat in desk.model.chats:
        asked = [m["content"] for m in chat.messages if m["role"] == "user"]
        assert len(asked) == len(set(asked)), asked
