"""A scripted OpenAI-compatible server: it answers what a test tells it to, and keeps
every request.

The request's model chooses the answer: a stream or an error of corpora.py by its name,
or a script that a test has registered with `server.script(name, [item, ...])`, one item
per call.
"""

import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

import corpora

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ALLOWED_KEYS = {
    "system": {"role", "content", "name"},
    "developer": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "reasoning_content"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
CALL_KEYS = {"id", "type", "function", "extra_content"}
_ids = itertools.count(1)


# --- what a script may hold ---


@dataclass
class Text:
    """An answer in text, streamed in the given pieces or word by word."""

    text: str
    finish: str | None = "stop"
    pieces: Sequence[str] = ()
    reasoning: str = ""
    usage: Mapping[str, int] | None = None

    def chunks(self) -> list[corpora.Chunk]:
        pieces = self.pieces or re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", self.text)
        thinking = (
            [corpora.delta(reasoning_content=self.reasoning)] if self.reasoning else []
        )
        words = [corpora.delta(content=piece) for piece in pieces]
        return [corpora.says(""), *thinking, *words, *ending(self.finish, self.usage)]


@dataclass
class ToolCalls:
    """An answer that calls tools: (name, arguments), arguments a dict or any text."""

    calls: Sequence[tuple[str, Any]]
    text: str = ""
    finish: str | None = "tool_calls"
    ids: Sequence[str] = ()
    usage: Mapping[str, int] | None = None

    def chunks(self) -> list[corpora.Chunk]:
        chunks = [corpora.says(self.text)]
        for index, (name, arguments) in enumerate(self.calls):
            id = self.ids[index] if self.ids else f"call_{next(_ids)}"
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            middle = len(text) // 2
            chunks += [
                corpora.calls(corpora.call(index, id, name, "")),
                corpora.calls(corpora.call(index, arguments=text[:middle])),
                corpora.calls(corpora.call(index, arguments=text[middle:])),
            ]
        return [*chunks, *ending(self.finish, self.usage)]


@dataclass
class Chunks:
    """An answer given chunk by chunk; done: whether [DONE] follows."""

    items: Sequence[corpora.Chunk]
    done: bool = True

    def chunks(self) -> list[corpora.Chunk]:
        return list(self.items)


@dataclass
class Error:
    """An HTTP error; a body that is a text is sent as HTML, anything else as JSON."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = field(default_factory=lambda: corpora.bare("the server says no"))


@dataclass
class Stall:
    """Sends some chunks of an answer, then nothing for some seconds, then the rest."""

    after_chunks: int
    seconds: float
    then: Any = field(default_factory=lambda: Text("late but here"))


@dataclass
class Gate:
    """Sends some chunks of an answer, then waits for an event before the rest."""

    event: threading.Event
    then: Any = field(default_factory=lambda: Text("the gate is open"))
    after_chunks: int = 0
    timeout: float = 60


@dataclass
class Drop:
    """Sends some chunks of an answer, then the connection ends: how is "close" or
    "reset".
    """

    after_chunks: int
    how: str = "close"
    then: Any = field(default_factory=lambda: Text("you will not read this to its end"))


@dataclass
class Json200:
    """Status 200 and any JSON."""

    body: Any


@dataclass
class Html200:
    """Status 200 and a web page, as a wrong address or a captive portal gives."""

    text: str = "<!doctype html><html><body>Sign in</body></html>"


Item = Any  # one of the above, or a function from the request's body to one of them


def ending(finish: str | None, usage: Mapping[str, int] | None) -> list[corpora.Chunk]:
    """The chunks that close an answer."""
    closing = [corpora.delta(finish)] if finish else []
    return [*closing, corpora.envelope([], usage=dict(usage))] if usage else closing


# --- the strict checker ---


def check_history(messages: Any) -> None:
    """Raise AssertionError unless the strictest server would take these messages."""
    need(isinstance(messages, list), "messages is not a list")
    pending: list[str] = []
    known: set[str] = set()
    before = ""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        check_message(message, where)
        role = message["role"]
        if role == "tool":
            need(pending, f"{where}: a tool message that no call asks for")
            need(
                message["tool_call_id"] == pending[0],
                f"{where}: answers {message['tool_call_id']!r} where {pending[0]!r}"
                f" is due",
            )
            pending.pop(0)
        else:
            need(not pending, f"{where}: {role} before the results of {pending}")
            check_order(role, before, where)
        for call in message.get("tool_calls", ()):
            check_call(call, f"{where} ({call.get('id')!r})")
            need(
                call["id"] not in known, f"{where}: the id {call['id']!r} is used twice"
            )
            known.add(call["id"])
            pending.append(call["id"])
        before = role
    need(not pending, f"the history ends before the results of {pending}")


def check_message(message: Any, where: str) -> None:
    """The keys and types of one message."""
    need(isinstance(message, dict), f"{where} is not an object")
    role = message.get("role")
    need(role in ALLOWED_KEYS, f"{where}: unknown role {role!r}")
    extra = set(message) - ALLOWED_KEYS[role]
    need(not extra, f"{where} ({role}): unexpected {sorted(extra)}")
    content, calls = message.get("content"), message.get("tool_calls")
    need("content" in message, f"{where} ({role}): no content")
    fits = isinstance(content, str) or (content is None and calls)
    need(fits, f"{where} ({role}): content is {content!r}")
    if "tool_calls" in message:
        need(isinstance(calls, list) and calls, f"{where}: tool_calls is {calls!r}")
        need(
            all(isinstance(call, dict) for call in calls),
            f"{where}: a call is not an object",
        )
    if role == "tool":
        id = message.get("tool_call_id")
        need(isinstance(id, str) and id, f"{where}: tool_call_id is {id!r}")
    reasoning = message.get("reasoning_content", "")
    need(isinstance(reasoning, str), f"{where}: reasoning_content is {reasoning!r}")
    check_text(message, where)


def check_order(role: str, before: str, where: str) -> None:
    """Which role may follow which, tool messages apart."""
    if role in ("system", "developer"):
        need(not before, f"{where}: {role} is not the first message")
    elif role == "user":
        need(before != "tool", f"{where}: user directly after tool")
        need(before != "user", f"{where}: two user messages in a row")
    else:
        need(
            before in ("user", "tool"),
            f"{where}: assistant after {before or 'nothing'}",
        )


def check_call(call: dict, where: str) -> None:
    """The parts of one tool call."""
    extra = set(call) - CALL_KEYS
    need(not extra, f"{where}: unexpected {sorted(extra)} in a call")
    id, function = call.get("id"), call.get("function")
    need(isinstance(id, str) and id, f"{where}: a call's id is {id!r}")
    need(
        call.get("type") == "function",
        f"{where}: a call's type is {call.get('type')!r}",
    )
    need(isinstance(function, dict), f"{where}: a call's function is {function!r}")
    need(
        set(function) == {"name", "arguments"},
        f"{where}: function has {sorted(function)}",
    )
    name, arguments = function["name"], function["arguments"]
    need(
        isinstance(name, str) and NAME.fullmatch(name),
        f"{where}: a call's name is {name!r}",
    )
    need(isinstance(arguments, str), f"{where}: arguments are no text: {arguments!r}")
    try:
        parsed = json.loads(arguments, parse_constant=refuse)
    except ValueError as error:
        raise AssertionError(
            f"{where}: arguments are not JSON ({error}): {arguments!r}"
        ) from None
    need(isinstance(parsed, dict), f"{where}: arguments are no object: {arguments!r}")
    check_text(parsed, where)


def check_text(value: Any, where: str) -> None:
    """All text, keys included, must be encodable."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise AssertionError(
                f"{where}: not encodable in UTF-8: {value!r}"
            ) from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, where)
            check_text(inner, where)
    elif isinstance(value, list):
        for inner in value:
            check_text(inner, where)


def check_request(body: dict) -> None:
    """A whole chat request: its history, that it asks for something, and its tools."""
    check_history(body.get("messages"))
    need(body["messages"], "messages is empty")
    last = body["messages"][-1]["role"]
    need(last in ("user", "tool"), f"the last message is of role {last}")
    if "tools" not in body:
        return
    tools = body["tools"]
    need(isinstance(tools, list) and tools, f"tools is {tools!r}")
    functions = [tool.get("function", {}) for tool in tools]
    names = [function.get("name", "") for function in functions]
    need(
        all(tool.get("type") == "function" for tool in tools),
        "a tool's type is not function",
    )
    need(all(NAME.fullmatch(name) for name in names), f"names of tools: {names}")
    need(len(set(names)) == len(names), f"a tool is there twice: {names}")
    for function in functions:
        schema = function.get("parameters", {})
        need(
            schema.get("type") == "object",
            f"{function['name']}: parameters are no object",
        )


def need(condition: Any, message: str) -> None:
    """A check that also runs under python -O."""
    if not condition:
        raise AssertionError(message)


def refuse(constant: str) -> None:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} is no JSON")


# --- the server ---


@dataclass
class Request:
    """One request as it came; headers by lower-case name."""

    path: str
    headers: dict[str, str]
    body: dict
    time: float
    done: bool = False
    aborted: bool = False

    @property
    def messages(self) -> list[dict]:
        return self.body.get("messages", [])

    @property
    def model(self) -> str:
        return self.body.get("model", "")

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


class FakeModel:
    """The server, a context manager; `strict` answers a history that breaks a rule with
    400.
    """

    def __init__(self, env: Mapping[str, str] | None = None, strict: bool = True):
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.strict = strict
        self.busy = self.peak = 0
        self._env = dict(env or {})
        self._scripts: dict[tuple[str | None, str | None], Iterator[Item]] = {}
        self._changed = threading.Condition()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.fake = self
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "FakeModel":
        serve = self._server.serve_forever
        threading.Thread(
            target=serve, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def chats(self) -> list[Request]:
        """The requests for an answer, without those for models or embeddings."""
        return [
            request
            for request in self.requests
            if request.path.endswith("/completions")
        ]

    def env(self, model: str = "text", **more: str) -> dict[str, str]:
        """The fixture's environment, pointed at this server and one of its models."""
        ours = {
            "OPENAI_API_KEY": "sk-test",
            "OPENAI_BASE_URL": self.url,
            "MODEL_ID": model,
        }
        return self._env | ours | more

    def script(
        self,
        model: str | None,
        items: Sequence[Item],
        key: str | None = None,
        repeat: bool = False,
    ) -> None:
        """Answer the calls to a model (None: any), perhaps of one API key, item by
        item.

        A script that runs out is a problem, or goes on with its last item if `repeat`.
        """
        last = itertools.repeat(items[-1]) if repeat else ()
        self._scripts[model, key] = itertools.chain(items, last)

    def wait(self, count: int, timeout: float = 10) -> None:
        """Wait until so many requests for an answer have come in."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.chats) >= count, timeout):
                raise AssertionError(
                    f"{len(self.chats)} of {count} requests after {timeout} s"
                )

    def answer_to(self, request: Request) -> Item:
        """What to send back: checks first, then scripts, then the corpora."""
        if request.path.endswith("/completions"):
            try:
                check_request(request.body)
            except AssertionError as error:
                if self.strict:
                    return self.refuse(f"invalid request: {error}")
        for name in ((request.model, request.key), (request.model, None), (None, None)):
            if name in self._scripts:
                with self._changed:
                    item = next(self._scripts[name], None)
                item = item(request.body) if isinstance(item, Callable) else item
                return item or self.refuse(
                    f"the script of model {name[0]!r} has run out"
                )
        return self.ready_made(request)

    def ready_made(self, request: Request) -> Item:
        """The answer of a model that no test has scripted."""
        model = request.model
        if model in corpora.STREAMS:
            stream = corpora.STREAMS[model]
            return Chunks(stream.chunks, stream.done)
        if model in corpora.ERRORS:
            failure = corpora.ERRORS[model]
            return Error(failure.status, failure.headers, failure.body)
        if request.path.endswith("/embeddings"):
            return Json200(embeddings(request.body))
        if request.path.endswith("/models"):
            return Json200(
                {"object": "list", "data": [{"id": "text", "object": "model"}]}
            )
        return Error(
            404, body=corpora.error(f"model {model!r} not found", "model_not_found")
        )

    def refuse(self, problem: str) -> Error:
        """Note a problem, which fails the test in the end, and answer with it."""
        self.problems.append(problem)
        return Error(400, body=corpora.error(problem, type=corpora.INVALID))

    def began(self, request: Request) -> None:
        with self._changed:
            self.requests.append(request)
            self.busy += 1
            self.peak = max(self.peak, self.busy)
            self._changed.notify_all()

    def ended(self, request: Request) -> None:
        with self._changed:
            request.done = True
            self.busy -= 1
            self._changed.notify_all()


class Server(ThreadingHTTPServer):
    """Threads that do not hold up the end; a client that hangs up is no event."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    fake: FakeModel

    def handle_error(self, *_: object) -> None:
        pass


Pause = tuple[int, Callable[[], None]]


class Dropped(Exception):
    """The connection has been ended on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.respond({})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) == length:  # else the client was cut off
            self.respond(json.loads(body or b"{}"))

    def respond(self, body: dict) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, body, time.monotonic())
        self.server.fake.began(request)
        try:
            self.send(self.server.fake.answer_to(request), body)
        except Dropped:
            self.close_connection = True
        except AssertionError as error:
            self.server.fake.problems.append(str(error))
            self.close_connection = True
        except OSError:
            request.aborted = self.close_connection = True
        finally:
            self.server.fake.ended(request)

    def send(self, item: Item, body: dict) -> None:
        """Send a whole answer, or a stream of chunks."""
        pauses: list[Pause] = []
        while isinstance(item, Stall | Gate | Drop):
            pauses.append((item.after_chunks, pause_of(item, self.drop)))
            item = item.then
        streams = body.get("stream") and hasattr(item, "chunks")
        for after, pause in pauses:
            if after == 0 or not hasattr(item, "chunks"):
                pause()
        pauses = [(after, pause) for after, pause in pauses if after]
        if streams:
            self.stream(item, pauses)
        elif hasattr(item, "chunks"):
            self.plain(item, body, pauses)
        elif isinstance(item, Error):
            self.whole(item.status, item.body, item.headers)
        else:
            self.whole(200, item.text if isinstance(item, Html200) else item.body)

    def stream(self, item: Item, pauses: Sequence[Pause]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chunks = item.chunks()
        for number in range(len(chunks) + 1):
            for after, pause in pauses:
                if min(after, len(chunks)) == number:
                    pause()
            if number < len(chunks):
                self.event(chunks[number])
        if getattr(item, "done", True):
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def plain(self, item: Item, body: dict, pauses: Sequence[Pause]) -> None:
        """The same answer in one piece; an interruption comes in the middle of it."""
        raw = json.dumps(fold(item.chunks(), body.get("model", ""))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        middle = len(raw) // 2
        self.wfile.write(raw[:middle])
        for _, pause in pauses:
            pause()
        self.wfile.write(raw[middle:])

    def event(self, chunk: corpora.Chunk) -> None:
        text = chunk if isinstance(chunk, str) else json.dumps(chunk)
        raw = (text if text.startswith(":") else f"data: {text}").encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(raw), raw))

    def whole(
        self, status: int, body: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        html = isinstance(body, str)
        raw = (body if html else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def drop(self, how: str) -> None:
        """End the connection: "close" as a process that dies, "reset" as a router that
        forgets.
        """
        if how == "reset":
            now = struct.pack("hh" if hasattr(socket, "SIO_RCVALL") else "ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        socket.close(self.connection.detach())
        raise Dropped


def pause_of(item: Item, drop: Callable[[str], None]) -> Callable[[], None]:
    """What an interruption does when its moment comes."""
    if isinstance(item, Stall):
        return lambda: time.sleep(item.seconds)
    if isinstance(item, Gate):
        return lambda: need(item.event.wait(item.timeout), "a gate has stayed shut")
    return lambda: drop(item.how)


def fold(chunks: Sequence[corpora.Chunk], model: str) -> dict:
    """A stream as the one answer that a server sends when asked not to stream; quirks
    stay.
    """
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    finish, usage, open_calls = None, None, []
    for chunk in chunks:
        if isinstance(chunk, str):
            continue
        if "error" in chunk:
            return chunk
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or ():
            finish = choice.get("finish_reason") or finish
            for name in ("content", "reasoning_content", "refusal"):
                if piece := choice["delta"].get(name):
                    message[name] = message.get(name, "") + piece
            for fragment in choice["delta"].get("tool_calls") or ():
                add_fragment(open_calls, fragment)
    if open_calls:
        message["tool_calls"] = [
            {k: v for k, v in c.items() if k != "index"} for c in open_calls
        ]
    choices = [{"index": 0, "message": message, "finish_reason": finish}]
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
    }
    return {**answer, "choices": choices, **({"usage": usage} if usage else {})}


def add_fragment(open_calls: list[dict], fragment: dict) -> None:
    """A fragment with a name of its own opens a call, unless it only repeats the last
    one's id.
    """
    function = fragment.get("function", {})
    repeats = (
        open_calls and fragment.get("id") and open_calls[-1].get("id") == fragment["id"]
    )
    if function.get("name") and not repeats or not open_calls:
        open_calls.append({**fragment, "function": dict(function)})
    elif isinstance(function.get("arguments"), str):
        open_calls[-1]["function"]["arguments"] += function["arguments"]


def embeddings(body: dict) -> dict:
    """Vectors that depend on the words alone: texts that share words are near."""
    texts = body.get("input", [])
    texts = [texts] if isinstance(texts, str) else texts
    data = [
        {"object": "embedding", "index": index, "embedding": vector(text)}
        for index, text in enumerate(texts)
    ]
    tokens = {"prompt_tokens": 1, "total_tokens": 1}
    return {
        "object": "list",
        "model": body.get("model", ""),
        "data": data,
        "usage": tokens,
    }


def vector(text: str, size: int = 64) -> list[float]:
    """A hashed bag of words."""
    values = [0.0] * size
    for word in re.findall(r"\w+", text.lower()):
        values[hashlib.sha256(word.encode()).digest()[0] % size] += 1.0
    return values
