"""The fake Feishu itself: its API is as strict as it says, and Lark's own SDK takes its
events.
"""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_feishu
import httpx
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers import modes
from fake_feishu import FORGERIES
from fake_feishu import INFO_PATH
from fake_feishu import KEYED
from fake_feishu import SEND_PATH
from fake_feishu import TOKEN_PATH
from fake_feishu import FakeFeishu

LARK_PYTHON = os.environ.get("LARK_PYTHON", "")
KEY = "an encrypt key"


@pytest.fixture
def feishu() -> Iterator[FakeFeishu]:
    with FakeFeishu() as server:
        yield server


@pytest.fixture(params=["", KEY], ids=["plain", "encrypted"])
def either(request: pytest.FixtureRequest) -> Iterator[FakeFeishu]:
    with FakeFeishu(request.param) as server:
        yield server


class Bot:
    """A client that does it right, unless a test says otherwise."""

    def __init__(self, feishu: FakeFeishu, timeout: float = 5):
        self.feishu = feishu
        self.http = httpx.Client(base_url=feishu.url, timeout=timeout, trust_env=False)
        self.token = ""

    def get_token(self, **changes: Any) -> dict:
        body = {
            "app_id": self.feishu.app_id,
            "app_secret": self.feishu.app_secret,
        } | changes
        answer = self.http.post(TOKEN_PATH, json=body)
        assert answer.status_code == 200
        self.token = answer.json().get("tenant_access_token", "")
        return answer.json()

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        if not self.token:
            self.get_token()
        headers = {"Authorization": f"Bearer {self.token}"} | more.pop("headers", {})
        return self.http.post(path, json=body, headers=headers, **more)

    def send(
        self,
        to: str = "oc_alice",
        text: str = "hi",
        kind: str = "chat_id",
        **changes: Any,
    ) -> httpx.Response:
        body = {
            "receive_id": to,
            "msg_type": "text",
            "content": json.dumps({"text": text}),
        }
        return self.post(SEND_PATH, body | changes, params={"receive_id_type": kind})


@pytest.fixture
def bot(feishu: FakeFeishu) -> Bot:
    return Bot(feishu)


def code(answer: httpx.Response) -> int:
    return answer.json()["code"]


# --- tokens ---


def test_a_token_is_given_again_until_30_minutes_before_its_end(
    feishu: FakeFeishu, bot: Bot
):
    first = bot.get_token()
    assert (first["code"], first["expire"]) == (0, 7200)
    feishu.pass_time(5000)
    assert bot.get_token() == first | {"expire": 2200}
    feishu.pass_time(500)
    second = bot.get_token()
    assert second["tenant_access_token"] != first["tenant_access_token"]
    bot.token = first["tenant_access_token"]
    assert code(bot.send()) == 0
    feishu.pass_time(1701)
    refused = bot.send()
    assert (refused.status_code, code(refused)) == (400, 99991663)
    bot.token = second["tenant_access_token"]
    assert code(bot.send()) == 0
    feishu.expire_token()
    assert code(bot.send()) == 99991663
    assert (feishu.token_requests, feishu.problems) == (3, [])


def test_a_short_life_is_a_new_token_each_time(feishu: FakeFeishu, bot: Bot):
    feishu.expire_seconds = 60
    assert (
        bot.get_token()["tenant_access_token"] != bot.get_token()["tenant_access_token"]
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"app_id": "cli_other"}, 10014),
        ({"app_secret": "wrong"}, 10014),
        ({"app_id": "nothing"}, 10003),
        ({"app_secret": ""}, 10003),
    ],
)
def test_wrong_credentials(feishu: FakeFeishu, bot: Bot, changes: dict, expected: int):
    assert bot.get_token(**changes)["code"] == expected
    assert feishu.problems == []


def test_who_the_bot_is(feishu: FakeFeishu, bot: Bot):
    assert code(bot.http.get(INFO_PATH)) == 99991661
    assert (
        code(bot.http.get(INFO_PATH, headers={"Authorization": "Bearer t-1"}))
        == 99991663
    )
    bot.get_token()
    headers = {"Authorization": f"Bearer {bot.token}"}
    answer = bot.http.get(INFO_PATH + "/", headers=headers).json()
    assert answer["bot"]["open_id"] == feishu.bot_open_id
    assert [call.status for call in feishu.calls] == [400, 400, 200, 200]


# --- sending ---


def test_sends_and_replies(feishu: FakeFeishu, bot: Bot):
    event = feishu.event(chat_type="group", chat_id="oc_team", open_id="ou_bob")
    asked = event["event"]["message"]["message_id"]
    content = json.dumps({"text": "réponse"})
    reply = {"msg_type": "text", "content": content, "uuid": "r1"}
    answers = [
        bot.send("oc_team", "one", uuid="u1"),
        bot.send("ou_bob", "two", kind="open_id"),
        bot.post(f"{SEND_PATH}/{asked}/reply", reply),
    ]
    sent = feishu.wait_sent(3)
    assert [a.json()["data"]["message_id"] for a in answers] == [
        s.message_id for s in sent
    ]
    assert [a.json()["data"]["chat_id"] for a in answers] == [
        "oc_team",
        "oc_bob",
        "oc_team",
    ]
    assert [
        (s.receive_id_type, s.receive_id, s.text, s.uuid, s.reply_to) for s in sent
    ] == [
        ("chat_id", "oc_team", "one", "u1", ""),
        ("open_id", "ou_bob", "two", "", ""),
        ("chat_id", "oc_team", "réponse", "r1", asked),
    ]
    assert feishu.problems == []
    with pytest.raises(AssertionError, match="3 of 4 messages"):
        feishu.wait_sent(4, 0.05)


def test_a_uuid_counts_once_in_an_hour(feishu: FakeFeishu, bot: Bot):
    ids = [bot.send(uuid="u1").json()["data"]["message_id"] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(feishu.sent) == 1
    assert feishu.problems == []
    assert bot.send(text="other", uuid="u1").json()["data"]["message_id"] == ids[0]
    assert "'other' is lost" in feishu.problems[0]
    feishu.pass_time(3601)
    assert bot.send(uuid="u1").json()["data"]["message_id"] != ids[0]
    assert len(feishu.sent) == 2


def test_whom_the_bot_cannot_reach(feishu: FakeFeishu, bot: Bot):
    assert code(bot.send("oc_nobody")) == 230002
    assert code(bot.send("ou_nobody", kind="open_id")) == 230013
    assert (feishu.sent, feishu.problems) == ([], [])


BIG = "x" * 150 * 1024
BAD_SENDS = {
    "a receive_id of the other type": (230001, {"to": "ou_alice"}),
    "no receive_id at all": (99992402, {"to": ""}),
    "a receive_id of no type": (230034, {"to": "alice"}),
    "an unknown type": (99992402, {"kind": "thread_id"}),
    "no type": (99992402, {"kind": ""}),
    "an unknown msg_type": (230001, {"msg_type": "markdown"}),
    "content that is an object": (230001, {"content": {"text": "hi"}}),
    "content that is bare text": (230001, {"content": "hi"}),
    "content without text": (230001, {"content": "{}"}),
    "no text": (230001, {"text": ""}),
    "a half surrogate": (230001, {"content": '{"text": "\\ud800"}'}),
    "too much text": (230025, {"text": BIG}),
    "a long uuid": (99992402, {"uuid": "u" * 51}),
    "no Bearer": (99991661, {"headers": {"Authorization": "t-1"}}),
}


@pytest.mark.parametrize("what", BAD_SENDS)
def test_a_bad_send_is_refused_and_a_problem(feishu: FakeFeishu, bot: Bot, what: str):
    expected, changes = BAD_SENDS[what]
    answer = (
        bot.post(SEND_PATH, {}, **changes)
        if "headers" in changes
        else bot.send(**changes)
    )
    assert (answer.status_code, code(answer)) == (400, expected)
    assert (len(feishu.problems), feishu.sent) == (1, [])


def test_a_body_that_is_no_json_and_a_path_that_is_none(feishu: FakeFeishu, bot: Bot):
    bot.get_token()
    headers = {"Authorization": f"Bearer {bot.token}"}
    for headers["Content-Type"], raw in (
        ("text/plain", "{}"),
        ("application/json", "["),
    ):
        answer = bot.http.post(SEND_PATH, content=raw, headers=headers)
        assert (answer.status_code, code(answer)) == (400, 9499)
    assert code(bot.post(f"{SEND_PATH}/om_none/reply", {"msg_type": "text"})) == 230001
    for answer in (bot.post("/open-apis/im/v2", {}), bot.http.get(SEND_PATH)):
        assert (answer.status_code, answer.text) == (404, "404 page not found")
        assert answer.headers["Content-Type"] == "text/plain"
    assert len(feishu.problems) == 5


@pytest.mark.parametrize("style", ["429", "400", "230020"])
def test_rate_limits(feishu: FakeFeishu, bot: Bot, style: str):
    feishu.rate_limit(2, 0.2, style)
    for _ in range(2):
        refused = bot.send()
        expected = (400, 230020) if style == "230020" else (int(style), 99991400)
        assert (refused.status_code, code(refused)) == expected
        assert refused.headers.get("x-ogw-ratelimit-reset") == (
            None if style == "230020" else "0.2"
        )
        time.sleep(0.2)
    assert code(bot.send()) == 0
    assert feishu.problems == []
    feishu.rate_limit(seconds=5, style=style)
    assert code(bot.send()) == code(bot.send()) != 0
    assert "too early" in feishu.problems[0]
    assert len(feishu.sent) == len(feishu.problems) == 1


# --- faults ---


def test_errors_of_one_path(feishu: FakeFeishu, bot: Bot):
    feishu.fail("/messages", 502, "<html>Bad Gateway</html>", times=2)
    assert bot.get_token()["code"] == 0
    answers = [bot.send() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [502, 502, 200]
    assert answers[0].headers["Content-Type"] == "text/html"
    feishu.fail(
        "/messages", 500, {"code": 2200, "msg": "internal error"}, accepted=True
    )
    assert code(bot.send(uuid="u")) == 2200
    assert code(bot.send(uuid="u")) == 0
    assert len(feishu.sent) == 2


@pytest.mark.parametrize("accepted", [False, True])
def test_drops(feishu: FakeFeishu, bot: Bot, accepted: bool):
    bot.get_token()
    feishu.drop(2, "/messages", accepted)
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            bot.send(uuid="u")
        assert len(feishu.sent) == accepted
    assert code(bot.send(uuid="u")) == 0
    assert len(feishu.sent) == 1
    assert [call.status for call in feishu.calls[1:]] == [0, 0, 200]


def test_a_late_answer_is_to_a_message_that_was_sent(feishu: FakeFeishu):
    bot = Bot(feishu, timeout=0.2)
    bot.get_token()
    feishu.hang(5)
    with pytest.raises(httpx.ReadTimeout):
        bot.send(uuid="u")
    assert code(bot.send(uuid="u")) == 0
    assert len(feishu.sent) == 1


def test_down_and_up_again_at_the_same_address(feishu: FakeFeishu, bot: Bot):
    assert code(bot.send()) == 0
    feishu.down()
    with pytest.raises(httpx.RemoteProtocolError):  # on the connection that is open
        bot.send()
    with pytest.raises(httpx.ConnectError):
        bot.send()
    feishu.up()
    assert code(bot.send()) == 0
    assert len(feishu.sent) == 2


def test_many_at_once_and_a_quick_end():
    with FakeFeishu() as feishu:
        feishu.hang(60, part="/reply")
        feishu.event(message_id="om_asked")
        bots = [Bot(feishu) for _ in range(8)]
        threads = [
            threading.Thread(target=bot.send, kwargs={"uuid": "u"}) for bot in bots
        ]
        reply = {"msg_type": "text", "content": '{"text": "late"}'}
        late = Bot(feishu)
        late.get_token()
        hung = threading.Thread(
            target=late.post, args=(f"{SEND_PATH}/om_asked/reply", reply)
        )
        for thread in [*threads, hung]:
            thread.start()
        for thread in threads:
            thread.join(10)
        feishu.wait_sent(2)
        began = time.monotonic()
    hung.join(10)
    assert time.monotonic() - began < 1
    assert (len(feishu.sent), feishu.problems) == (2, [])


# --- events ---


def opened(feishu: FakeFeishu, encoded: fake_feishu.Encoded) -> dict:
    """What is in a request, its signature checked if it has one."""
    raw, headers = encoded
    body = json.loads(raw)
    if not feishu.encrypt_key:
        return body
    if "X-Lark-Signature" in headers:
        stamp, nonce = (
            headers["X-Lark-Request-Timestamp"],
            headers["X-Lark-Request-Nonce"],
        )
        signed = (stamp + nonce + feishu.encrypt_key).encode() + raw
        assert hashlib.sha256(signed).hexdigest() == headers["X-Lark-Signature"]
    secret, key = (
        base64.b64decode(body["encrypt"]),
        hashlib.sha256(feishu.encrypt_key.encode()),
    )
    decryptor = Cipher(algorithms.AES(key.digest()), modes.CBC(secret[:16])).decryptor()
    padded = decryptor.update(secret[16:])
    assert padded[-1:] * padded[-1] == padded[-padded[-1] :]
    return json.loads(padded[: -padded[-1]])


def test_encodes_what_it_makes(either: FakeFeishu):
    for size in range(20):
        event = either.event("hé" + "x" * size)
        encoded = either.encode(event)
        assert opened(either, encoded) == event
        assert ("X-Lark-Signature" in encoded[1]) == bool(either.encrypt_key)
    challenge = either.challenge()
    encoded = either.encode(challenge)
    assert opened(either, encoded) == challenge
    assert list(encoded[1]) == ["Content-Type"]


def test_timestamp_and_nonce_can_be_given():
    feishu = FakeFeishu(KEY)
    _, headers = feishu.encode(feishu.event(), timestamp=1700000000.5, nonce="n")
    assert headers["X-Lark-Request-Timestamp"] == "1700000000"
    assert headers["X-Lark-Request-Nonce"] == "n"


def message_of(event: dict) -> tuple[Any, Any]:
    """The content of an event's message, and whom it mentions."""
    message = event["event"]["message"]
    mentions = message.get("mentions", "absent")
    if isinstance(mentions, list):
        mentions = [
            (m["key"], m["id"]["open_id"], m["mentioned_type"]) for m in mentions
        ]
    return json.loads(message["content"]), mentions


def test_mentions_and_kinds_of_messages():
    feishu = FakeFeishu()
    bot = ("@_user_1", feishu.bot_open_id, "bot")
    bob = ("@_user_2", "ou_bob", "user")
    assert message_of(feishu.event("hi")) == ({"text": "hi"}, "absent")
    assert message_of(feishu.event("hi", mentions="null")) == ({"text": "hi"}, None)
    assert message_of(feishu.event("hi", mentions="all")) == (
        {"text": "@_all hi"},
        "absent",
    )
    assert message_of(feishu.event("hi", mentions="bot")) == (
        {"text": "@_user_1 hi"},
        [bot],
    )
    text = "hi @_user_2, ask @_user_1"
    assert message_of(feishu.event(text, mentions=["bot", "ou_bob"])) == (
        {"text": text},
        [bot, bob],
    )
    content, mentions = message_of(
        feishu.event("@_user_1 one\ntwo", mentions="bot", message_type="post")
    )
    assert [
        [e.get("text", e.get("user_id")) for e in line] for line in content["content"]
    ] == [
        ["@_user_1", " one"],
        ["two"],
    ]
    assert mentions == [bot]
    assert "image_key" in message_of(feishu.event(message_type="image"))[0]
    event = feishu.event(
        chat_type="group", open_id="ou_x", event_id="e", parent_id="om_p"
    )
    assert (event["header"]["event_id"], event["event"]["message"]["parent_id"]) == (
        "e",
        "om_p",
    )
    assert event["event"]["message"]["chat_id"] == "oc_group"
    assert event["event"]["sender"]["sender_id"]["open_id"] == "ou_x"


@pytest.mark.parametrize("forge", KEYED)
def test_forgeries_of_what_is_encrypted_need_a_key(forge: str):
    with pytest.raises(ValueError, match=forge):
        FakeFeishu().encode({}, forge=forge)


# --- pushing ---


class Hook(http.server.BaseHTTPRequestHandler):
    """A webhook that answers as the server's list of (status, seconds) says."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, raw, self.headers))
        status, seconds = self.server.answers.pop(0)
        time.sleep(seconds)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"ok": 1}')


@pytest.fixture
def hook() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        server.handle_error = lambda *_: None
        server.got, server.answers = [], []
        server.url = f"http://127.0.0.1:{server.server_port}/feishu/events?a=1"
        serve = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        serve.start()
        yield server
        server.shutdown()


def test_pushes_and_times_the_answer(either: FakeFeishu, hook: Any):
    hook.answers += [(200, 0.1), (403, 0), (200, 0)]
    event = either.event()
    answer = either.push(hook.url, event)
    assert (answer.status, answer.json) == (200, {"ok": 1})
    assert 0.1 <= answer.seconds < 1
    replay = either.encode(event)
    assert [either.push(hook.url, replay).status for _ in range(2)] == [403, 200]
    assert all(opened(either, (raw, headers)) == event for _, raw, headers in hook.got)
    assert hook.got[0][0] == "/feishu/events?a=1"
    assert hook.got[1][1] == hook.got[2][1] == replay[0]
    either.down()
    nobody = either.push(either.url, event)
    assert (nobody.status, nobody.body, "Refused" in nobody.error) == (0, "", True)


def test_delivers_again_until_it_is_answered_in_time(hook: Any):
    feishu = FakeFeishu(KEY)
    hook.answers += [(500, 0), (200, 0.4), (200, 0), (200, 0)]
    event = feishu.event()
    answers = feishu.deliver(hook.url, event, schedule=(0.01, 0.02, 0.03), limit=0.2)
    assert [answer.status for answer in answers] == [500, 0, 200]
    assert "timed out" in answers[1].error
    bodies = [raw for _, raw, _ in hook.got]
    assert len(set(bodies)) == 3
    assert all(opened(feishu, (raw, headers)) == event for _, raw, headers in hook.got)


# --- Lark's own SDK ---

# What its dispatcher makes of a forged event: it does not look at a timestamp's age.
ACCEPTED = {"stale"}
# A challenge is not signed, and the SDK accepts a plain one although there is a key.
ACCEPTED_CHALLENGES = {"stale", "signature", "unsigned", "body", "plain"}


@pytest.mark.skipif(
    not LARK_PYTHON, reason="LARK_PYTHON names no Python that has lark-oapi"
)
@pytest.mark.costly
def test_lark_itself_agrees():
    """Its dispatcher takes our events and refuses our forgeries; we take its client's
    messages.
    """
    cases: list[tuple[Any, str, bool, dict, dict]] = []
    rich_post = json.dumps({"zh_cn": fake_feishu.RICH_POST})
    for key in ("", KEY):
        feishu = FakeFeishu(key)
        good = [
            feishu.event("hello 你好 😀"),
            feishu.event("hi", mentions="null", sender_type="app"),
            feishu.event("hi", "group", mentions=["bot", "ou_bob"]),
            feishu.event("hi", "group", "ou_bob", "oc_team", "all"),
            feishu.event("@_user_1 a\nb", mentions="bot", message_type="post"),
            feishu.event(message_type="image"),
            feishu.event(message_type="audio"),
            feishu.event(message_type="sticker"),
            feishu.event(message_type="post", content=rich_post),
        ]
        challenge = feishu.challenge()
        tries = [(obj, "", True) for obj in (*good, challenge)]
        for forge in FORGERIES if key else ("token", "json"):
            tries.append((good[0], forge, forge in ACCEPTED))
            tries.append((challenge, forge, forge in ACCEPTED_CHALLENGES))
        for obj, forge, accepted in tries:
            raw, headers = feishu.encode(obj, forge=forge)
            request = {"body": raw.decode(), "headers": headers, "encrypt_key": key}
            request["verification_token"] = feishu.verification_token
            cases.append((obj, forge, accepted, request))
    with FakeFeishu() as feishu:
        send = {
            "domain": feishu.url,
            "app_id": feishu.app_id,
            "app_secret": feishu.app_secret,
        }
        send |= {
            "receive_id_type": "chat_id",
            "receive_id": "oc_alice",
            "text": "hé",
            "uuid": "u",
        }
        unknown = send | {"receive_id": "oc_nobody", "uuid": "v"}
        done = subprocess.run(
            [LARK_PYTHON, str(Path(__file__).with_name("lark_check.py"))],
            input=json.dumps(
                {"events": [case[-1] for case in cases], "sends": [send, send, unknown]}
            ),
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert [sent.text for sent in feishu.sent] == ["hé"]
        assert [result["code"] for result in results["sends"]] == [0, 0, 230002]
        assert feishu.problems == []
    for (obj, forge, accepted, _), result in zip(cases, results["events"], strict=True):
        kind = "challenge" if "challenge" in obj else "event"
        what = f"{forge or 'good'} {kind}: {result}"
        assert result["status"] == (200 if accepted else 500), what
        assert (result["event"] is not None) == (accepted and "event" in obj), what
        if accepted and "challenge" in obj:
            assert json.loads(result["content"]) == {"challenge": obj["challenge"]}
        elif accepted:
            check_summary(obj, result["event"])


def check_summary(event: dict, seen: dict) -> None:
    """What Lark read is what the event said."""
    message, sender = event["event"]["message"], event["event"]["sender"]
    for name in ("message_id", "chat_id", "chat_type", "message_type"):
        assert seen[name] == message[name]
    assert seen["event_id"] == event["header"]["event_id"]
    assert seen["content"] == json.loads(message["content"])
    assert seen["open_id"] == sender["sender_id"]["open_id"]
    assert seen["sender_type"] == sender["sender_type"]
    assert seen["mentions"] == [
        [m["key"], m["id"]["open_id"], m["name"], m["mentioned_type"]]
        for m in message.get("mentions") or []
    ]
