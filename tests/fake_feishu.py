"""A strict stand-in for the Feishu (Lark) platform, over loopback HTTP in both
directions.

As a server it is the open API: tokens, the bot's identity, sending and replying. As a
client it makes the events that Feishu posts to a webhook, encrypts and signs them, and
forges them on demand. What a correct bot would never send is noted in `problems`,
besides being refused.
"""

import base64
import copy
import hashlib
import http.client
import itertools
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers import algorithms
from cryptography.hazmat.primitives.ciphers import modes

TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"
INFO_PATH = "/open-apis/bot/v3/info"
SEND_PATH = "/open-apis/im/v1/messages"
REPLY_PATH = re.compile(re.escape(SEND_PATH) + r"/([^/]+)/reply")
PREFIXES = {"open_id": "ou_", "chat_id": "oc_"}
PLACEHOLDER = re.compile(r"(@_user_\d+|@_all)")
FILES = {
    "image": {"image_key": "img_1"},
    "file": {"file_key": "file_1", "file_name": "a.pdf"},
    "audio": {"file_key": "file_2", "duration": 2000},
    "media": {"file_key": "file_3", "image_key": "img_3", "file_name": "a.mp4"},
    "sticker": {"file_key": "file_4"},
}
RICH_POST = {  # what the content of a post may hold
    "title": "The plan",
    "content": [
        [
            {"tag": "text", "text": "Read "},
            {"tag": "a", "text": "this", "href": "https://example.org/plan"},
            {"tag": "text", "text": " with "},
            {"tag": "at", "user_id": "@_user_1", "user_name": "Bob"},
            {"tag": "emotion", "emoji_type": "SMILE"},
        ],
        [{"tag": "img", "image_key": "img_1", "width": 9, "height": 9}],
        [{"tag": "media", "file_key": "file_1", "image_key": "img_2"}],
        [],
        [{"tag": "code_block", "language": "PYTHON", "text": "print(1)\n"}],
        [{"tag": "hr"}],
    ],
}
MAX_BODY = 150 * 1024
RENEWAL = 30 * 60  # a token with less left than this is no longer given out again
UUID_MEMORY = 60 * 60
STALE = 2 * 60 * 60
# no correct bot ever gets these
BUGS = {9499, 99991661, 99992402, 230001, 230025, 230034}
KEYED = ("signature", "unsigned", "body", "stale", "plain", "key", "padding", "base64")
# what encode() can do; KEYED only with an encrypt key
FORGERIES = ("token", "json", *KEYED)

Answer = tuple[int, Any, dict[str, str]]
Encoded = tuple[bytes, dict[str, str]]


@dataclass
class Call:
    """One request to the open API; headers by lower-case name, status 0 if it got no
    answer.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw: bytes
    at: float = field(default_factory=time.monotonic)
    status: int = 0

    @property
    def body(self) -> Any:
        return parsed(self.raw)


@dataclass
class Sent:
    """One message that reached its chat; a reply has `reply_to`, and its chat as
    receive_id.
    """

    receive_id_type: str
    receive_id: str
    text: str
    uuid: str
    message_id: str
    at: float
    reply_to: str = ""


@dataclass
class Response:
    """What a webhook answered, and how soon; status 0 and `error` if it did not."""

    status: int
    body: str
    seconds: float
    error: str = ""

    @property
    def json(self) -> Any:
        return parsed(self.body)


@dataclass
class Fault:
    """What goes wrong with calls whose path holds `part`: an answer, else a wait, else
    a drop.
    """

    part: str
    times: int
    accepted: bool
    answer: Answer | None = None
    seconds: float = 0


@dataclass(eq=False)
class Refused(Exception):
    """An answer with an error code."""

    code: int
    msg: str
    status: int = 400
    headers: dict[str, str] = field(default_factory=dict)


class FakeFeishu:
    """The platform with one app, one user and one group; a context manager.

    `url` is the domain. The bot reaches `users` and `chats`; event() adds those it
    comes from.
    """

    def __init__(self, encrypt_key: str = "", verification_token: str = "v-token"):
        self.app_id, self.app_secret = "cli_fake", "app-secret"
        self.encrypt_key, self.verification_token = encrypt_key, verification_token
        self.bot_open_id, self.bot_name = "ou_bot", "Claw"
        self.users, self.chats = {"ou_alice"}, {"oc_alice", "oc_group"}
        self.expire_seconds: float = 7200
        self.calls: list[Call] = []
        self.sent: list[Sent] = []
        self.problems: list[str] = []
        self.closing = threading.Event()
        self.server: Server | None = None
        self._changed = threading.Condition()
        self._ids = itertools.count(1)
        self._skipped = 0.0
        self._tokens: dict[str, float] = {}
        self._uuids: dict[str, tuple[float, Sent, dict]] = {}
        self._messages: dict[str, str] = {}
        self._faults: list[Fault] = []
        self._limits: list[tuple[float, str]] = []
        self._limit = (0.0, 0.0, "")
        self._place = socket.socket()  # holds the port while the server is down
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._place.getsockname()[1]}"

    def __enter__(self) -> "FakeFeishu":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.down()
        self._place.close()

    # --- what a test asks for ---

    @property
    def token_requests(self) -> int:
        return sum(call.path == TOKEN_PATH for call in list(self.calls))

    def wait_sent(self, count: int, timeout: float = 10) -> list[Sent]:
        """Wait until so many messages have been sent."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.sent) >= count, timeout):
                raise AssertionError(
                    f"{len(self.sent)} of {count} messages after {timeout} s"
                )
            return list(self.sent)

    def up(self) -> None:
        """Listen, at the same address as ever."""
        if self.server is None:
            self.server = Server(self._place.getsockname(), Handler)
            self.server.fake = self
            serve, quick = self.server.serve_forever, {"poll_interval": 0.02}
            threading.Thread(target=serve, kwargs=quick, daemon=True).start()

    def down(self) -> None:
        """Refuse connections, and end those that are open at their next request."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def pass_time(self, seconds: float) -> None:
        """Make tokens, uuids and rate limits older."""
        self._skipped += seconds

    def expire_token(self) -> None:
        """Invalidate every token given so far."""
        with self._changed:
            self._tokens.clear()

    def rate_limit(
        self, times: int = 1, seconds: float = 1, style: str = "429"
    ) -> None:
        """Refuse the next sends: "429" and "400" name the wait in a header, "230020"
        does not.

        To send again before the wait is over is a problem.
        """
        self._limits += [(seconds, style)] * times

    def fail(
        self, part: str, status: int, body: Any, times: int = 1, accepted: bool = False
    ) -> None:
        """Answer with an error (a text: as HTML); accepted: yet the call has been
        carried out.
        """
        self._faults.append(Fault(part, times, accepted, (status, body, {})))

    def drop(self, times: int = 1, part: str = "", accepted: bool = False) -> None:
        """End the connection instead of answering."""
        self._faults.append(Fault(part, times, accepted))

    def hang(self, seconds: float, times: int = 1, part: str = "") -> None:
        """Carry calls out at once, but answer late."""
        self._faults.append(Fault(part, times, True, seconds=seconds))

    def mend(self) -> None:
        """Nothing more goes wrong."""
        with self._changed:
            self._faults.clear()
            self._limits.clear()

    # --- the open API ---

    def began(self, call: Call) -> Fault | None:
        """Keep a call, and find out what is to go wrong with it."""
        with self._changed:
            self.calls.append(call)
            fault = next(
                (f for f in self._faults if f.times and f.part in call.path), None
            )
            if fault:
                fault.times -= 1
            return fault

    def answer(self, call: Call) -> Answer:
        """Carry a call out."""
        with self._changed:
            try:
                return 200, self.handle(call), {}
            except Refused as no:
                if no.code in BUGS:
                    self.problems.append(
                        f"{call.method} {call.path}: {no.code} {no.msg}"
                    )
                error = {"log_id": uuid.uuid4().hex}
                return (
                    no.status,
                    {"code": no.code, "msg": no.msg, "error": error},
                    no.headers,
                )
            except LookupError:
                self.problems.append(f"{call.method} {call.path}: no such path")
                # no JSON: so it is with the real one
                return 404, "404 page not found", {}
            finally:
                self._changed.notify_all()

    def handle(self, call: Call) -> dict:
        """The result of a call, or Refused, or LookupError."""
        reply = REPLY_PATH.fullmatch(call.path)
        routes = [("POST", TOKEN_PATH), ("GET", INFO_PATH), ("POST", SEND_PATH)]
        routes += [("POST", call.path)] if reply else []
        if (call.method, call.path) not in routes:
            raise LookupError
        if call.path != TOKEN_PATH:
            self.check_token(call.headers.get("authorization", ""))
        if call.path == INFO_PATH:
            bot = {
                "activate_status": 2,
                "app_name": self.bot_name,
                "open_id": self.bot_open_id,
            }
            return {"code": 0, "msg": "ok", "bot": bot}
        if not isinstance(call.body, dict):
            raise Refused(9499, "Bad Request: the body is no JSON object")
        if call.path == TOKEN_PATH:
            return self.give_token(call.body)
        if not call.headers.get("content-type", "").startswith("application/json"):
            raise Refused(9499, "Bad Request: the content type is not JSON")
        self.check_rate()
        return self.send(call, reply[1] if reply else "")

    def now(self) -> float:
        return time.monotonic() + self._skipped

    def give_token(self, body: dict) -> dict:
        """The newest token while it has 30 minutes left, else a new one; errors have
        status 200.

        Lark's own client sends no content type here, so none is asked for.
        """
        id, secret = body.get("app_id"), body.get("app_secret")
        if not str(id).startswith("cli_") or not isinstance(secret, str) or not secret:
            raise Refused(10003, "invalid param", 200)
        if (id, secret) != (self.app_id, self.app_secret):
            wrong = "app id not exists" if id != self.app_id else "app secret invalid"
            raise Refused(10014, wrong, 200)
        token, end = next(reversed(self._tokens.items()), ("", 0.0))
        if end - self.now() < RENEWAL:
            token, end = (
                f"t-{next(self._ids)}-{uuid.uuid4().hex}",
                self.now() + self.expire_seconds,
            )
            self._tokens[token] = end
        left = round(end - self.now())
        return {"code": 0, "msg": "ok", "tenant_access_token": token, "expire": left}

    def check_token(self, authorization: str) -> None:
        if not authorization.startswith("Bearer "):
            raise Refused(99991661, "Missing access token for authorization.")
        if self._tokens.get(authorization.removeprefix("Bearer "), 0.0) <= self.now():
            raise Refused(99991663, "Invalid access token for authorization.")

    def check_rate(self) -> None:
        """Begin the next limit, or hold on to one that has not passed."""
        until, seconds, style = self._limit
        if self.now() < until:
            self.problems.append(f"sent again {until - self.now():.2f} s too early")
        elif not self._limits:
            return
        else:
            seconds, style = self._limits.pop(0)
            self._limit = self.now() + seconds, seconds, style
        if style == "230020":
            raise Refused(230020, "This operation triggers the frequency limit.")
        wait = {"x-ogw-ratelimit-limit": "50", "x-ogw-ratelimit-reset": f"{seconds:g}"}
        raise Refused(99991400, "request trigger frequency limit", int(style), wait)

    def send(self, call: Call, reply_to: str) -> dict:
        """Take a message, of those with the same uuid within an hour only the first."""
        if reply_to and reply_to not in self._messages:
            raise Refused(
                230001, "Your request contains an invalid request parameter: message_id"
            )
        kind = "chat_id" if reply_to else call.query.get("receive_id_type", "")
        target = self._messages[reply_to] if reply_to else call.body.get("receive_id")
        text, key = check_message(call, kind, target), call.body.get("uuid", "")
        if kind == "chat_id" and target not in self.chats:
            raise Refused(230002, "Bot is NOT in the chat.")
        if kind == "open_id" and target not in self.users:
            raise Refused(230013, "Bot has NO availability to this user.")
        end, first, answer = self._uuids.get(key, (0.0, None, {}))
        if first and end > self.now():
            if (first.receive_id, first.text, first.reply_to) != (
                target,
                text,
                reply_to,
            ):
                self.problems.append(
                    f"uuid {key!r} is that of another message: {text!r} is lost"
                )
            return answer
        chat_id = "oc_" + target[3:]
        sent = Sent(
            kind, target, text, key, f"om_{next(self._ids)}", time.monotonic(), reply_to
        )
        data = {"message_id": sent.message_id, "chat_id": chat_id, "msg_type": "text"}
        data |= {
            "create_time": milliseconds(),
            "body": {"content": call.body["content"]},
        }
        data |= {"root_id": reply_to, "parent_id": reply_to} if reply_to else {}
        answer = {"code": 0, "msg": "success", "data": data}
        self.sent.append(sent)
        self._messages[sent.message_id] = chat_id
        self.chats.add(chat_id)
        if key:
            self._uuids[key] = self.now() + UUID_MEMORY, sent, answer
        return answer

    # --- events, as Feishu posts them ---

    def event(
        self,
        text: str = "hello",
        chat_type: str = "p2p",
        open_id: str = "ou_alice",
        chat_id: str | None = None,
        mentions: str | Sequence[Any] | None = None,
        message_type: str = "text",
        event_id: str | None = None,
        message_id: str | None = None,
        sender_type: str = "user",
        **more: Any,
    ) -> dict:
        """A message event; `more` are further fields of its message, such as parent_id.

        mentions: None leaves the field out and "null" sends null; "bot"; "all", which
        is @_all in the text alone; or a list of "bot", open_ids and ready-made objects.
        Placeholders that the text does not hold are put before it.
        """
        chat_id = chat_id or (
            "oc_group" if chat_type == "group" else "oc_" + open_id[3:]
        )
        wanted = (
            ["bot"]
            if mentions == "bot"
            else []
            if isinstance(mentions, str)
            else mentions
        )
        people = [
            self.mention(who, number) for number, who in enumerate(wanted or [], 1)
        ]
        keys = ["@_all"] if mentions == "all" else [person["key"] for person in people]
        text = " ".join([key for key in keys if key not in text] + [text])
        now, bare = milliseconds(), open_id[3:]
        message = {
            "message_id": message_id or f"om_{uuid.uuid4().hex}",
            "create_time": now,
            "update_time": now,
            "chat_id": chat_id,
            "chat_type": chat_type,
            "message_type": message_type,
            "content": json.dumps(content_of(message_type, text), ensure_ascii=False),
            **({"mentions": people or None} if people or mentions == "null" else {}),
            **more,
        }
        header = {
            "event_id": event_id or uuid.uuid4().hex,
            "token": self.verification_token,
            "create_time": now,
            "event_type": "im.message.receive_v1",
            "tenant_key": "t1",
            "app_id": self.app_id,
        }
        ids = {"open_id": open_id, "union_id": f"on_{bare}", "user_id": bare}
        sender = {"sender_id": ids, "sender_type": sender_type, "tenant_key": "t1"}
        with self._changed:
            self.users.add(open_id)
            self.chats.add(chat_id)
            self._messages[message["message_id"]] = chat_id
        return {
            "schema": "2.0",
            "header": header,
            "event": {"sender": sender, "message": message},
        }

    def mention(self, who: str | dict, number: int) -> dict:
        """One entry of a message's mentions."""
        if isinstance(who, dict):
            return who
        bot = who in ("bot", self.bot_open_id)
        open_id = self.bot_open_id if bot else who
        return {
            "key": f"@_user_{number}",
            "id": {"open_id": open_id, "union_id": f"on_{open_id[3:]}", "user_id": ""},
            "name": self.bot_name if bot else open_id[3:].title(),
            "mentioned_type": "bot" if bot else "user",
            "tenant_key": "t1",
        }

    def challenge(self) -> dict:
        """What Feishu posts once, when a webhook is registered."""
        token = self.verification_token
        return {
            "challenge": uuid.uuid4().hex,
            "token": token,
            "type": "url_verification",
        }

    def encode(
        self,
        obj: dict,
        timestamp: float | None = None,
        nonce: str | None = None,
        forge: str = "",
    ) -> Encoded:
        """The body and headers of a request: with an encrypt key encrypted, and an
        event signed.

        forge is one of FORGERIES: a wrong "token"; a body that is no "json"; a wrong
        "signature"; "unsigned"; a "body" changed after signing; a "stale" timestamp,
        well signed; "plain" text although there is a key; another "key" for both; a
        wrong "padding" or "base64", well signed.
        """
        if forge and (
            forge not in FORGERIES or forge in KEYED and not self.encrypt_key
        ):
            raise ValueError(f"cannot forge {forge!r}")
        if forge == "token":
            obj = copy.deepcopy(obj)
            obj.get("header", obj)["token"] = "another token"
        body = json.dumps(obj, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"}
        if forge == "json":
            return body[:-1], headers
        if not self.encrypt_key or forge == "plain":
            return body, headers
        key = "another key" if forge == "key" else self.encrypt_key
        secret = base64.b64encode(
            encrypt(key, body, spoilt=forge == "padding")
        ).decode()
        body = json.dumps({"encrypt": "%%%" if forge == "base64" else secret}).encode()
        if obj.get("type") == "url_verification" or forge == "unsigned":
            return body, headers
        stamp = (
            time.time() - STALE * (forge == "stale") if timestamp is None else timestamp
        )
        stamp, nonce = str(int(stamp)), nonce or uuid.uuid4().hex[:10]
        signature = hashlib.sha256((stamp + nonce + key).encode() + body).hexdigest()
        headers["X-Lark-Request-Timestamp"] = stamp
        headers["X-Lark-Request-Nonce"] = nonce
        headers["X-Lark-Signature"] = "0" * 64 if forge == "signature" else signature
        return body + b" " * (forge == "body"), headers

    def push(
        self,
        webhook_url: str,
        obj: dict | Encoded,
        timeout: float = 10,
        forge: str = "",
    ) -> Response:
        """Post an event or a challenge, or the very bytes that encode() gave."""
        body, headers = self.encode(obj, forge=forge) if isinstance(obj, dict) else obj
        parts = urlsplit(webhook_url)
        connection = http.client.HTTPConnection(
            parts.hostname, parts.port, timeout=timeout
        )
        began = time.monotonic()
        try:
            connection.request(
                "POST",
                parts._replace(scheme="", netloc="").geturl() or "/",
                body,
                headers,
            )
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            return Response(answer.status, text, time.monotonic() - began)
        except (OSError, http.client.HTTPException) as error:
            return Response(0, "", time.monotonic() - began, repr(error))
        finally:
            connection.close()

    def deliver(
        self,
        webhook_url: str,
        obj: dict,
        schedule: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
        limit: float = 3,
    ) -> list[Response]:
        """Push an event, signed anew each time, until it gets a 200 in time; every
        answer it got.

        The schedule stands for Feishu's own: after 15 s, 5 min, 1 h and 6 h.
        """
        responses: list[Response] = []
        for pause in (0, *schedule):
            self.closing.wait(pause)
            responses.append(self.push(webhook_url, obj, timeout=limit))
            if responses[-1].status == 200 and responses[-1].seconds <= limit:
                break
        return responses


def check_message(call: Call, kind: str, target: Any) -> str:
    """The text of a message to be sent, or Refused; its content is JSON once more, in a
    string.
    """
    body, wrong = call.body, "Your request contains an invalid request parameter"
    key = body.get("uuid", "")
    if kind not in PREFIXES:
        raise Refused(99992402, f"field validation failed: receive_id_type is {kind!r}")
    if not isinstance(target, str) or not target:
        raise Refused(99992402, "field validation failed: receive_id is required")
    if not isinstance(key, str) or len(key) > 50:
        raise Refused(
            99992402, "field validation failed: uuid is no text of up to 50 characters"
        )
    if not target.startswith(PREFIXES[kind]):
        if target.startswith(tuple(PREFIXES.values())):
            raise Refused(230001, f"{wrong}, ext=invalid receive_id.")
        raise Refused(230034, "The receive_id is invalid.")
    if body.get("msg_type") != "text":
        raise Refused(230001, f"{wrong}, ext=invalid msg_type {body.get('msg_type')!r}")
    try:
        text = json.loads(body["content"])["text"]
        empty = not text.encode()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Refused(
            230001, f"{wrong}, ext=content is no JSON text: {error!r}"
        ) from None
    if empty:
        raise Refused(230001, f"{wrong}, ext=text content is empty")
    if len(call.raw) > MAX_BODY:
        raise Refused(230025, "The length of the message content reaches its limit.")
    return text


def content_of(message_type: str, text: str) -> dict:
    """What an event's content holds, before it becomes a string."""
    if message_type != "post":
        return {"text": text} if message_type == "text" else FILES.get(message_type, {})
    lines = [filter(None, PLACEHOLDER.split(line)) for line in text.split("\n")]
    return {"title": "", "content": [list(map(element, line)) for line in lines]}


def element(piece: str) -> dict:
    """A piece of a rich text."""
    if PLACEHOLDER.fullmatch(piece):
        return {"tag": "at", "user_id": piece, "user_name": piece[2:], "style": []}
    return {"tag": "text", "text": piece, "style": []}


def encrypt(key: str, data: bytes, spoilt: bool = False) -> bytes:
    """AES-256-CBC under the SHA-256 of the key, the IV first, with PKCS7 padding."""
    iv, missing = os.urandom(16), 16 - len(data) % 16
    cipher = Cipher(
        algorithms.AES(hashlib.sha256(key.encode()).digest()), modes.CBC(iv)
    )
    encryptor = cipher.encryptor()
    return iv + encryptor.update(data + bytes([0 if spoilt else missing]) * missing)


def parsed(text: str | bytes) -> Any:
    """What a text holds, None if it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def milliseconds() -> str:
    return str(int(time.time() * 1000))


class Server(ThreadingHTTPServer):
    """Threads that do not hold up the end; a client that hangs up is no event."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = True
    request_queue_size = 128
    fake: FakeFeishu

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        fake, parts = self.server.fake, urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(length)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(parts.query))
        call = Call(self.command, parts.path.rstrip("/"), query, headers, raw)
        # the bot may have been killed
        if fake.server is not self.server or len(raw) < length:
            self.close_connection = True
            return
        fault = fake.began(call)
        answer = fake.answer(call) if not fault or fault.accepted else None
        if fault and fault.seconds:
            fake.closing.wait(fault.seconds)
        elif fault:
            answer = fault.answer
        self.send_answer(call, answer)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def send_answer(self, call: Call, answer: Answer | None) -> None:
        """Send an answer: a text as HTML or plain, anything else as JSON; None: hang
        up.
        """
        if answer is None:
            self.close_connection = True
            return
        call.status, body, headers = answer
        kind = "application/json; charset=utf-8"
        if isinstance(body, str):
            kind = "text/html" if body.startswith("<") else "text/plain"
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(call.status)
        for name, value in {
            **headers,
            "Content-Type": kind,
            "Content-Length": len(raw),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(raw)
