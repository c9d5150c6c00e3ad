# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "croniter>=7.0",
#     "cryptography>=50",
#     "httpx>=0.28",
#     "openai>=3.54,<4",
#     "pydantic>=2.12",
#     "python-dotenv>=1.2.1",
#     "python-telegram-bot>=22.8",
#     "PyYAML>=6.0.3",
#     "websockets>=17.4",
# ]
# ///
"""Trace: run a section, and see what it sends to the model and what comes back.

    section --> proxy on 127.0.0.1 --> the server of .env
                  |--> what was sent, what came back

    python sessions/trace.py s02                  against the server of .env
    python sessions/trace.py --offline s02        against the offline model
    python sessions/trace.py --next s02           a section from sessions/next
    python sessions/trace.py --to trace.txt s04   show it elsewhere: tail -f trace.txt
    python sessions/trace.py --save t.jsonl s02   keep everything, as JSON lines

Of each request you see the messages that are new in it. Long texts are cut, unless you
say --full. The API key is neither shown nor saved.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import TextIO
from urllib.parse import urlsplit

import httpx
import offline_model
from dotenv import load_dotenv
from offline_model import fail

OPENAI = "https://api.openai.com/v1"
DONE = b"data: [DONE]"  # the end of a stream
HUNG_UP = "the section hung up"
MAX_LINES = {"assistant": 1}  # of a text: the section itself shows all of this one
FILE_WIDTH = 100  # columns of a line that does not go to a terminal
SHORTEST_KEY = 12  # characters: shorter ones, such as "ollama", are no secrets
PRINT_SECONDS = 0.05  # for the section to print what it has before the trace goes on
COLOURS = {"request": "36", "answer": "32", "error": "31", "dim": "2"}
WIDE = re.compile(
    "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60]|"
    "[\U0001f300-\U0001faff\U00020000-\U0003fffd]"
)  # characters of two columns
OWN_HEADERS = (  # of one connection: they are not passed on
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "host",
    "keep-alive",
    "transfer-encoding",
)

# --- what was exchanged ---


@dataclass
class Exchange:
    """A request, and what came of it."""

    number: int
    path: str
    request_body: bytes
    key: str
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0
    response_body: bytearray = field(default_factory=bytearray)
    problem: str = ""  # why there is no whole answer

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    def ending(self) -> str:
        """How it ended, and after how long."""
        result = self.problem or f"HTTP {self.status}"
        return f"{result} after {self.seconds:.1f} s"

    def request(self) -> object:
        """The request as JSON."""
        return read_json(self.without_key(self.request_body))

    def response(self) -> bytes:
        """The body of the answer, as far as it has come."""
        return self.without_key(bytes(self.response_body))

    def events(self) -> list:
        """The answer as JSON values: one for each event, if it is a stream."""
        events = []
        for line in self.response().split(b"\n"):
            name, _, data = line.partition(b":")
            if name == b"data" and data.strip() not in (b"", b"[DONE]"):
                events.append(read_json(data))
        return events or [read_json(self.response())]

    def without_key(self, data: bytes) -> bytes:
        """The data without the API key: some servers repeat it."""
        if len(self.key) < SHORTEST_KEY:
            return data
        return data.replace(self.key.encode(), b"[API key]")


def read_json(data: bytes) -> object:
    """The JSON value in some bytes, or their text if there is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")


@dataclass
class Answer:
    """What the events of an answer say together."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict] = field(default_factory=list)
    finish_reason: str = "missing"
    usage: dict = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add_event(self, event: object) -> None:
        if not isinstance(event, dict) or "error" in event:
            self.errors.append(json.dumps(event, ensure_ascii=False))
            return
        if event.get("usage"):
            self.usage = event["usage"]
        for choice in event.get("choices", []):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            self.add_message(choice.get("delta") or choice.get("message") or {})

    def add_message(self, message: dict) -> None:
        """Add a message, or a piece of one."""
        self.content += first_text(message, "content")
        self.reasoning += first_text(message, "reasoning_content", "reasoning")
        for piece in message.get("tool_calls") or []:
            function = piece["function"]
            if function.get("name"):  # the first piece of a call
                call = {"name": function["name"], "arguments": ""}
                self.calls.append({"id": piece.get("id"), "function": call})
            arguments = first_text(function, "arguments")
            self.calls[-1]["function"]["arguments"] += arguments

    def message(self) -> dict:
        """The answer as a message of the conversation."""
        return {
            "role": "assistant",
            "reasoning_content": self.reasoning,
            "content": self.content,
            "tool_calls": self.calls,
        }


def first_text(values: dict, *names: str) -> str:
    """The first of these fields that holds something, or nothing."""
    for name in names:
        if values.get(name):
            return str(values[name])
    return ""


# --- showing it ---

Row = tuple[str, str]  # a label, and the text beside it


class Trace:
    """Shows exchanges as they happen, and saves them."""

    def __init__(self, stream: TextIO, saved: TextIO | None, full: bool) -> None:
        self.stream = stream
        self.saved = saved
        self.full = full
        self.lock = threading.Lock()
        self.conversations: dict[str, list[dict]] = {}  # by their first message
        self.options: dict = {}  # of the request before
        self.late: list[Exchange] = []
        self.on_terminal = stream.isatty()
        self.coloured = self.on_terminal and not os.getenv("NO_COLOR")

    def show_request(self, exchange: Exchange) -> None:
        """Show what the section sends, unless its end will say all in one line."""
        self.show_late()
        if exchange.is_chat:
            self.show_safely(self.write_request, exchange)

    def show_late(self) -> None:
        """Show the answers that the section did not wait for.

        They were kept back because its prompt may have been on the screen.
        """
        while self.late:
            self.show_answer(self.late.pop(0))

    def show_answer(self, exchange: Exchange) -> None:
        """Show what came back, and save both."""
        if self.on_terminal:
            time.sleep(PRINT_SECONDS)
        if exchange.is_chat:
            self.show_safely(self.write_answer, exchange)
        else:
            self.show_safely(self.write_other, exchange)
        if self.saved:
            self.save(exchange)

    def show_safely(self, write: Callable, exchange: Exchange) -> None:
        """Show an exchange. It may fail: anything can stand in what is sent."""
        with self.lock:
            try:
                write(exchange)
            except Exception as error:
                head = f"exchange {exchange.number} cannot be shown: {error!r}"
                self.show("error", head, [])

    def write_request(self, exchange: Exchange) -> None:
        """Show the new messages, and the options that have changed."""
        request = exchange.request()
        messages = request.pop("messages")
        new = self.new_messages(messages)
        noun = "message" if len(messages) == 1 else "messages"
        head = f"request {exchange.number}: {len(messages)} {noun}, {len(new)} new"
        same = []
        for name, value in request.items():
            if self.options.get(name) == value:
                same.append(name)
            elif name == "tools":
                tools = [tool["function"]["name"] for tool in value]
                head += f"; tools: {', '.join(tools)}"
            else:
                head += f"; {name}: {json.dumps(value)}"
        if same:
            head += f"; {', '.join(same)} as before"
        self.options = request
        rows = []
        for message in new:
            rows.extend(message_rows(message))
        self.show("request", head, rows)

    def new_messages(self, messages: list[dict]) -> list[dict]:
        """The messages that the conversation's request before did not have."""
        first = str([each for each in messages if each["role"] != "system"][:1])
        before = self.conversations.get(first, [])
        self.conversations[first] = messages
        new = []
        for position, message in enumerate(messages):
            if before[position : position + 1] != [message]:
                new.append(message)
        return new

    def write_answer(self, exchange: Exchange) -> None:
        """Show what came back, how it ended, and what it cost."""
        answer = Answer()
        if exchange.status == 200:
            for event in exchange.events():
                answer.add_event(event)
        elif exchange.response_body:
            answer.errors.append(exchange.response().decode("utf-8", "replace"))
        head = f"answer {exchange.number}: {exchange.ending()}"
        if answer.usage:
            tokens_in = answer.usage.get("prompt_tokens", 0)
            tokens_out = answer.usage.get("completion_tokens", 0)
            head += f"; {tokens_in:,} tokens in, {tokens_out:,} out"
        rows = message_rows(answer.message())
        for error in answer.errors:
            rows.append(("error", error))
        failed = exchange.problem or answer.errors
        if not failed:
            head += f"; finish_reason: {answer.finish_reason}"
        self.show("error" if failed else "answer", head, rows)

    def write_other(self, exchange: Exchange) -> None:
        """Show in one line what is no chat, such as a request for embeddings."""
        sent = f"{exchange.path}, {len(exchange.request_body):,} bytes"
        got = f"{exchange.ending()}, {len(exchange.response_body):,} bytes"
        self.show("answer", f"request {exchange.number}: {sent}; answer: {got}", [])

    def save(self, exchange: Exchange) -> None:
        """Write one line of JSON about an exchange."""
        record = {
            "number": exchange.number,
            "path": exchange.path,
            "request": exchange.request(),
            "status": exchange.status,
            "response": exchange.events(),
            "seconds": round(exchange.seconds, 3),
            "problem": exchange.problem,
        }
        with self.lock:
            self.saved.write(json.dumps(record) + "\n")
            self.saved.flush()

    def show(self, style: str, head: str, rows: list[Row]) -> None:
        """Show a head, and the rows below it, with a bar at the left."""
        width = self.width()
        lines = [self.paint(style, line) for line in wrap(head, width)]
        for label, text in rows:
            for line in self.cut(label, text, width - 13):
                lines.append(f"  {self.paint('dim', label.ljust(9))}  {line}")
                label = ""
        bar = self.paint("dim", "  │ ")
        block = "".join(f"{bar}{line}\n" for line in lines)
        # What the section has printed may not end with a line feed.
        self.stream.write("\n" + block if self.on_terminal else block)
        self.stream.flush()

    def cut(self, label: str, text: str, width: int) -> list[str]:
        """The lines of a text. A long one is cut, and its blank lines are left out."""
        if self.full:
            return wrap(text, width)
        short = re.sub(r"\n\s*\n", "\n", text)
        lines = wrap(short, width)
        limit = MAX_LINES.get(label, 5)
        if len(lines) > limit:
            last_line = wrap(lines[limit - 1], width - 24)[0]
            note = f" ... ({len(text):,} characters)"
            return [*lines[: limit - 1], last_line + note]
        return lines

    def width(self) -> int:
        """The columns between the bar and the right edge."""
        columns = shutil.get_terminal_size((FILE_WIDTH, 0)).columns
        return max(columns, 40) - 5

    def paint(self, style: str, text: str) -> str:
        """The text in the colour of a style, if there are colours."""
        if not self.coloured:
            return text
        return f"\x1b[{COLOURS[style]}m{text}\x1b[0m"


def message_rows(message: dict) -> list[Row]:
    """The parts of a message: thoughts, text, tool calls."""
    rows = []
    thoughts = first_text(message, "reasoning_content", "reasoning")
    if thoughts:
        rows.append(("thoughts", thoughts))
    content = first_text(message, "content")
    if message["role"] == "tool":
        content = f"[result of {message['tool_call_id']}] {content}"
    if content:
        rows.append((message["role"], content))
    for call in message.get("tool_calls", []):
        function = call["function"]
        text = f"{function['name']} {function['arguments']} [{call['id']}]"
        rows.append(("tool call", text))
    return rows


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, none of them wider than `width` columns."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        # While the lines are broken, a wide character has a second one behind it.
        padded = WIDE.sub("\\g<0>\0", escape_control_characters(paragraph))
        lines.extend(textwrap.wrap(padded, width, break_on_hyphens=False) or [""])
    return [line.replace("\0", "") for line in lines]


def escape_control_characters(text: str) -> str:
    """The text with what would steer a terminal written out, such as \\x1b."""
    if text.isprintable():
        return text
    shown = []
    for character in text:
        shown.append(character if character.isprintable() else repr(character)[1:-1])
    return "".join(shown)


# --- the proxy ---


class Proxy(ThreadingHTTPServer):
    """A server that passes requests on to another one."""

    def __init__(self, target: str, trace: Trace, use_proxies: bool) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        parts = urlsplit(target)
        if parts.scheme not in ("http", "https"):
            raise ValueError(
                f"OPENAI_BASE_URL must begin with http://, not be {target}"
            )
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self.url = f"http://127.0.0.1:{self.server_port}{parts.path}"
        self.trace = trace
        self.numbers = itertools.count(1)
        timeout = httpx.Timeout(None, connect=30)  # the section limits the rest
        self.client = httpx.Client(timeout=timeout, trust_env=use_proxies)


class ProxyHandler(BaseHTTPRequestHandler):
    """One connection of the section."""

    server: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    error_message_format = "%(explain)s"
    error_content_type = "text/plain; charset=utf-8"

    def handle(self) -> None:
        with suppress(ConnectionError):  # the section went away
            super().handle()

    def log_message(self, *args: object) -> None:
        """Say nothing: the trace does."""

    def forward(self) -> None:
        """Pass one request on, and its answer back."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        exchange = Exchange(next(self.server.numbers), self.path, body, key)
        self.server.trace.show_request(exchange)
        try:
            self.call_server(exchange)
        except ConnectionError:
            self.give_up(exchange, HUNG_UP)
        except (httpx.ReadError, httpx.RemoteProtocolError):
            self.give_up(exchange, "the server dropped the connection")
        except Exception as error:  # of httpx, of TLS, of an address that is none
            self.give_up(exchange, f"{self.server.origin} cannot be reached: {error}")
            if not exchange.status:
                self.send_error(502, explain=exchange.problem)

    do_GET = forward
    do_POST = forward

    def call_server(self, exchange: Exchange) -> None:
        """Pass a request on, and the answer back piece by piece."""
        headers = {"Accept-Encoding": "identity"}
        for name, value in self.headers.items():
            if name.lower() not in OWN_HEADERS:
                headers[name] = value
        url = self.server.origin + self.path
        with self.server.client.stream(
            self.command, url, headers=headers, content=exchange.request_body
        ) as response:
            self.send_head(exchange, response)
            for piece in response.iter_bytes():
                self.pass_on(exchange, piece)
        self.show_end(exchange)
        self.send_chunk(b"")

    def send_head(self, exchange: Exchange, response: httpx.Response) -> None:
        exchange.status = response.status_code
        self.send_response_only(response.status_code)
        for name, value in response.headers.items():
            if name.lower() not in OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def pass_on(self, exchange: Exchange, piece: bytes) -> None:
        """Pass a piece of an answer on.

        The answer is shown before its end is passed on, because the section then has
        not printed yet what comes after it.
        """
        exchange.response_body += piece
        if not piece.rstrip().endswith(DONE):
            self.send_chunk(piece)
            return
        before, _, _ = piece.rpartition(DONE)
        if before:
            self.send_chunk(before)
        self.show_end(exchange)
        self.send_chunk(piece[len(before) :])

    def send_chunk(self, data: bytes) -> None:
        """Send a chunk; an empty one is the last."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def give_up(self, exchange: Exchange, problem: str) -> None:
        """End the connection, and say why."""
        self.close_connection = True
        exchange.problem = problem
        self.show_end(exchange)

    def show_end(self, exchange: Exchange) -> None:
        """Show the answer, once."""
        if exchange.seconds:
            return
        exchange.seconds = time.monotonic() - exchange.started
        if exchange.problem == HUNG_UP:
            self.server.trace.late.append(exchange)
        else:
            self.server.trace.show_answer(exchange)


# --- the command line ---


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(f"{message}; --help lists the options")
    add = parser.add_argument
    add("--next", action="store_true", help="from sessions/next")
    add("--model", choices=offline_model.WINDOWS, help="with an offline model")
    add("--offline", dest="model", action="store_const", const="offline")
    add(
        "--to", metavar="FILE", type=open_file, default=sys.stderr, help="show it there"
    )
    add("--save", metavar="FILE", type=open_file, help="save it, as JSON lines")
    add("--full", action="store_true", help="cut nothing")
    add("section", help="s03, check_model, or your script")
    add("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args()


def open_file(path: str) -> TextIO:
    return open(path, "w", encoding="utf-8", errors="replace")


def find_server(model: str | None) -> tuple[str, dict[str, str]]:
    """The server that the section is to talk to, and the section's environment."""
    if model:
        url = offline_model.start_server(0).url
        return url, offline_model.section_environment(url, model)
    load_dotenv()
    env = dict(os.environ)
    offline_model.bypass_proxies(env)
    return env.get("OPENAI_BASE_URL") or OPENAI, env


def main() -> int:
    try:
        given = parse_arguments()
        folder = offline_model.SESSIONS / ("next" if given.next else "en")
        script = offline_model.find_script(given.section, folder)
        url, env = find_server(given.model)
        offline_model.choose_workspace(script, env)
        trace = Trace(given.to, given.save, given.full)
        proxy = Proxy(url, trace, use_proxies=not given.model)
    except (OSError, ValueError, ImportError) as error:
        fail(str(error))
    threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
    env["OPENAI_BASE_URL"] = proxy.url
    trace.show("request", f"{script.name} talks to {url}", [])
    status = offline_model.run_section(script, given.arguments, env)
    trace.show_late()
    return status


if __name__ == "__main__":
    raise SystemExit(main())
