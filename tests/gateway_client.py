"""A section with its gateway open, and clients that talk to it."""

import contextlib
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.parse import unquote

import pytest
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Item
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import Section
from websockets.sync.client import connect

PROMPT = "you> "
LINK = re.compile(r"http://127\.0\.0\.1:(\d+)/#token=(\S+)")
TROUBLE = re.compile("Traceback|Exception|Warning|Task was|never retrieved")


class Refused(Exception):
    """A JSON-RPC error."""

    def __init__(self, error: dict) -> None:
        super().__init__(error)
        self.code = error["code"]
        self.message = error["message"]


class Client:
    """A client: it calls methods, and keeps the events that come meanwhile."""

    def __init__(self, url: str) -> None:
        self.socket = connect(url, legacy=True, proxy=None, max_size=None)
        self.replies = []
        self.events = []
        self.last_id = 0

    def send(self, frame: str | bytes) -> None:
        """Send a frame as it is."""
        self.socket.send(frame)

    def read(self, timeout: float) -> None:
        """Wait for a frame, and keep it as a reply or as an event."""
        frame = load_json(self.socket.recv(timeout=timeout))
        if "method" in frame:
            self.events.append((frame["method"], frame["params"]))
        else:
            self.replies.append(frame)

    def reply(self, timeout: float = 20) -> dict:
        """The next reply."""
        deadline = time.monotonic() + timeout
        while not self.replies:
            self.read(max(0, deadline - time.monotonic()))
        return self.replies.pop(0)

    def replies_to(self, frame: str | bytes) -> list[dict]:
        """All replies to a frame: those that come before the reply to the next one."""
        self.send(frame)
        self.send(request("status", request_id="the end"))
        found = [self.reply()]
        while found[-1]["id"] != "the end":
            found.append(self.reply())
        return found[:-1]

    def call(self, method: str, /, **params: object) -> Any:
        """The result of a method. Raises Refused."""
        self.last_id += 1
        self.send(request(method, request_id=self.last_id, **params))
        reply = self.reply()
        assert reply["id"] == self.last_id
        if "error" in reply:
            raise Refused(reply["error"])
        return reply["result"]

    def refusal(self, method: str, /, **params: object) -> Refused:
        """The error that a method ends in."""
        with pytest.raises(Refused) as caught:
            self.call(method, **params)
        return caught.value

    def wait(self, event: str, /, **about: object) -> dict:
        """The first event of this kind that says this about its turn."""
        deadline = time.monotonic() + 30
        seen = 0
        while True:
            for name, params in self.events[seen:]:
                if name == event and about.items() <= params.items():
                    return params
            seen = len(self.events)
            self.read(max(0, deadline - time.monotonic()))

    def say(self, text: str, **about: object) -> dict:
        """Send a message. Returns what the gateway answers to that."""
        return self.call("send", text=text, **about)

    def ask(self, text: str, **about: object) -> str:
        """Send a message. Returns the answer to it."""
        message_id = self.say(text, **about)["id"]
        return self.wait("turn.end", id=message_id)["text"]

    def history(self, **which: object) -> list[str]:
        """The texts of a session."""
        messages = self.call("sessions.history", **which)["messages"]
        return [message["text"] for message in messages]

    def told(self, event: str, field: str) -> list:
        """One field of all events of a kind that have been sent until now."""
        self.call("status")
        return [params[field] for name, params in self.events if name == event]

    def leave(self) -> None:
        """Be gone, without a word."""
        self.socket.close_socket()


class Gateway:
    """A section at a terminal, its gateway, and a scripted model behind it.

    It may be started again and again. In the end, no run may have shown a traceback, or
    the token in any line but the link.
    """

    def __init__(self, section: Section, workspace: Path, model: FakeModel) -> None:
        self.section = section
        self.workspace = workspace
        self.model = model
        self.gate = threading.Event()  # what "wait" waits for
        self.stack = contextlib.ExitStack()
        self.screens = []
        self.port = 0
        self.token = ""
        model.script("brain", [self.answer], repeat=True)

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, kind: type | None, *about: object) -> None:
        self.gate.set()
        self.stack.close()
        for screen in self.screens:
            screen.close()
            if kind is None:
                assert not TROUBLE.search(screen.text), screen.text[-3000:]
                assert self.token not in LINK.sub("", screen.text)

    def answer(self, body: dict) -> Item:
        """The model does what the first word of the last question says."""
        messages = body["messages"]
        questions = [m["content"] for m in messages if m["role"] == "user"]
        question = questions[-1]
        verb, _, rest = question.partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {question}"), after_chunks=2)
        if verb == "fail":
            return Error(422)
        if verb == "long":  # so many pieces of 100,000 characters
            return Text("", pieces=["x" * 100_000] * int(rest))
        if verb == "tool" and messages[-1]["role"] != "tool":
            name, arguments = rest.split(" ", 1)
            return ToolCalls([(name, arguments)], text="Let me see.")
        return Text(f"heard {question[:200]}")

    def start(self, **settings: str) -> Screen:
        """Run the section at a terminal, until its gateway is open."""
        screen = self.start_closed(**settings)
        port, token = screen.wait_for(LINK, 20).groups()
        screen.wait_for(PROMPT)
        self.port = int(port)
        self.token = unquote(token)
        return screen

    def start_closed(self, **settings: str) -> Screen:
        """Run the section at a terminal, and do not wait for its gateway."""
        screen = Screen(self.section, self.model.env("brain", **settings))
        self.screens.append(screen)
        return screen

    def stop(self) -> None:
        """End the latest run as a person does."""
        self.screens[-1].press("ctrl-d")
        assert self.screens[-1].wait_exit() == 0

    def kill(self) -> None:
        """End the latest run as a crash does."""
        self.screens[-1].kill()

    def type(self, line: str) -> str:
        """What comes between a line typed at the terminal and the next prompt."""
        screen = self.screens[-1]
        start = len(screen.text)
        screen.type(f"{line}\n")
        screen.wait_for(line)
        screen.wait_for(PROMPT)
        return screen.text[start:]

    def client(self) -> Client:
        """A client of the latest run."""
        client = Client(f"ws://127.0.0.1:{self.port}{self.path}")
        self.stack.callback(client.leave)
        return client

    @property
    def path(self) -> str:
        """Where the WebSocket is."""
        return f"/ws?token={quote(self.token)}"

    def connect(self, text: str = "", receive_buffer: int = 0) -> socket.socket:
        """A bare connection to the gateway, and the first that it says."""
        connection = self.stack.enter_context(socket.socket())
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(text.encode())
        return connection

    def fetch(self, path: str, method: str = "GET", **headers: str) -> tuple:
        """The status, the headers, and the body of an answer; 0 if none comes."""
        headers = {"Host": f"127.0.0.1:{self.port}"} | headers
        connection = self.connect(http_request(method, path, headers))
        received = b""
        with contextlib.suppress(ConnectionResetError), connection:
            while block := connection.recv(65536):
                received += block
        if not received:
            return 0, {}, b""
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), fields, body

    def handshake(
        self, path: str = "", receive_buffer: int = 0, **headers: str
    ) -> tuple[socket.socket, int]:
        """Try to open a WebSocket. Returns the bare connection, and the status."""
        headers = {
            "Host": f"127.0.0.1:{self.port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
        } | headers
        text = http_request("GET", path or self.path, headers)
        connection = self.connect(text, receive_buffer)
        head = connection.recv(65536)
        return connection, int(head.split()[1]) if head else 0

    def status_of(self, path: str = "", **headers: str) -> int:
        """The status that a try to open a WebSocket ends in."""
        connection, status = self.handshake(path, **headers)
        connection.close()
        return status

    @property
    def questions(self) -> list[str]:
        """What the model was asked, in order."""
        last_messages = [chat.messages[-1] for chat in self.model.chats]
        return [each["content"] for each in last_messages if each["role"] == "user"]


def http_request(method: str, path: str, headers: dict[str, str]) -> str:
    """The text of an HTTP request without a body."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""])


def request(method: str, /, request_id: object = 1, **params: object) -> str:
    """The text of a JSON-RPC request."""
    body = {"jsonrpc": "2.0", "method": method, "params": params, "id": request_id}
    return json.dumps(body)


def load_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for Infinity and NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
