# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "cryptography>=50",
#   "httpx>=0.28",
#   "openai>=3.54,<4",
#   "pydantic>=2.12",
#   "python-dotenv>=1.2.1",
#   "python-telegram-bot>=22.8",
#   "websockets>=17.4",
# ]
# ///
"""s05: Gateway and routing - every message finds its home.

    telegram --+                        +--> main:  its prompt, its model, its sessions
    feishu   --+--> Inbox --> Bindings -+--> luna
    web chat --+                        +--> sage
        ^
        +--- JSON-RPC over a WebSocket --- GatewayServer, on 127.0.0.1

Run it with no key: python sessions/offline_model.py s05
"""

import codecs
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import openai
import pydantic
from dotenv import load_dotenv
from pydantic_core import from_json

# isort: split
import asyncio
import base64
import ctypes
import hashlib
import hmac
import itertools
import logging
import queue
import sqlite3
from asyncio import StreamReader
from asyncio import StreamWriter
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import asdict
from email import message_from_string
from email.message import Message as HttpHeaders
from http import HTTPStatus
from types import SimpleNamespace
from typing import NoReturn

# isort: split
import secrets
from collections.abc import Container
from typing import Literal
from urllib.parse import parse_qs
from urllib.parse import quote

from pydantic import BaseModel
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import broadcast
from websockets.asyncio.server import serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request
from websockets.http11 import Response

# --- s01: the agent loop ---

NOTES = {
    "length": "the answer was cut at the length limit",
    "content_filter": "the provider's content filter stopped the answer",
    "tool_calls": "the model asked for a tool, and there is none to run",
}


def do_nothing(*arguments):
    """Take anything and do nothing, in place of a function that is not needed (yet)."""


@dataclass
class Agent:
    """What one turn of the conversation works with."""

    client: openai.OpenAI
    options: dict  # what every request contains besides the messages
    messages: "Session"
    show: Callable  # show(text, kind) prints a text; kind is "answer", "note", ...
    tools: list[dict]  # what the model may ask for
    workspace: Path  # the folder that tools work in
    approval: "Approval"  # whether commands run
    check_path: Callable  # check_path(agent, file, is_write) raises if it is off limits
    system: str = ""  # instructions that stand before the conversation
    check_cancelled: Callable = do_nothing  # from s10 on: raises after /stop
    note_waiting: Callable = do_nothing  # told what the turn waits for, for /stop
    session_key: str = "agent:main:main"  # whose conversation it is
    store: "SessionStore | None" = None  # where the sessions are
    guard: "ContextGuard | None" = None  # calls the model, and keeps to its window
    app: "App | None" = None  # the program that it is a part of


@dataclass
class Reply:
    """What the model has answered."""

    message: dict
    finish_reason: str = ""  # empty until the server says why the answer ended
    usage: dict | None = None  # how many tokens the call took, if the server tells
    tool_calls: list = field(default_factory=list)  # raw, until complete_message
    growing_calls: dict = field(default_factory=dict)  # index: the raw call that grows
    reasoning: list = field(default_factory=list)  # thoughts in a field of their own


def call_model(agent: Agent) -> Reply:
    """Send the conversation to the model, and show its answer as it arrives.

    Returns the whole reply. Raises OpenAIError if the answer breaks off.
    """
    reply = Reply({"role": "assistant"})
    cleaner = AnswerCleaner()
    pieces = []
    request = {**agent.options, "messages": request_messages(agent)}
    if agent.tools:
        request["tools"] = agent.tools
    create = agent.client.chat.completions.with_streaming_response.create
    # `extra_body` replaces the two empty arguments and is sent unchecked: to check
    # 2,000 messages would take the openai package half a second.
    with create(model="", messages=[], extra_body=request) as response:
        agent.note_waiting(response)
        for event in read_events(response):
            agent.check_cancelled()  # does nothing before s10
            text = add_event(reply, event)
            piece = cleaner.feed(text, reply.finish_reason)
            agent.show(piece)
            pieces.append(piece)
    if not reply.finish_reason:  # the stream has ended too early
        raise openai.OpenAIError(
            "the answer broke off. If it always does: does OPENAI_BASE_URL end in /v1,"
            " and is the conversation perhaps too long for this model?"
        )
    reply.message["content"] = "".join(pieces)
    complete_message(agent, reply)
    return reply


def agent_turn(agent: Agent) -> str:
    """Call the model and run its tools until it asks for none. Returns all its text."""
    texts = []
    for _ in range(MAX_ROUNDS):
        reply = ask_model(agent, texts)
        if not reply.tool_calls:
            return "\n\n".join(texts) + show_finish_note(agent, reply.finish_reason)
        for call in reply.tool_calls:
            result = run_tool(agent, call)
            agent.messages.append(tool_result(call, result))
        agent.show("\n")  # what follows begins on a new line
    return "\n\n".join(texts) + show_finish_note(agent, "rounds")


def show_finish_note(agent: Agent, finish_reason: str) -> str:
    """Show and return what a finish reason says: nothing if the answer is complete."""
    if finish_reason == "stop":
        return ""
    note = NOTES.get(finish_reason, f"the answer ended with {finish_reason!r}")
    agent.show(note, "note")
    return f"\n[{note}]"


def handle_message(agent: Agent, text: str, **fields: object) -> str | None:
    """Answer a message. If that fails, take the message back, say why, return None."""
    question = {"role": "user", "content": text, **fields}
    try:
        agent.check_cancelled()
        end_interrupted_turn(agent)
        agent.messages.append(question)
        return agent_turn(agent)
    except KeyboardInterrupt:
        reason = "stopped"
    except Exception as error:  # a turn may fail in any way, and the loop goes on
        reason = f"{explain(error)} - {agent.client.base_url}"
    # Not if something has come after it. (From s03 on, the messages are no list.)
    if list(agent.messages)[-1:] == [question]:
        agent.messages.pop()
    agent.show(reason, "note")
    return None


# Errors and the screen

HINTS = {
    401: ", check OPENAI_API_KEY",
    404: ", check MODEL_ID and OPENAI_BASE_URL (most end in /v1)",
}
# All but tab and newline; the last two ranges reverse the direction of writing.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


def explain(error: Exception) -> str:
    """One line that says what went wrong, and what to check."""
    if isinstance(error, openai.APIStatusError):
        hint = HINTS.get(error.status_code, "")
        text = f"HTTP {error.status_code}{hint}: {error.response.text}"
    elif isinstance(error, openai.OpenAIError):
        text = f"{error} {error.__cause__ or ''}"  # such as: Connection refused
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def show(text: str, kind: str = "answer") -> None:
    """Print a piece of an answer as it arrives, or a note on a line of its own."""
    if kind == "tool_result":
        return  # for the model: a person sees the call
    text = CONTROL_CHARACTERS.sub("", text)  # they could move the cursor or hide text
    if kind != "answer":
        text = f"\n[{text}]"
    print(text, end="", flush=True)


# Settings

# __doc__[:3] is the name of this script.
NO_MODEL = f"""OPENAI_API_KEY and MODEL_ID must be set: copy .env.example to .env.
Without a key: python sessions/offline_model.py {__doc__[:3]}"""


def load_agent() -> Agent:
    """Build the agent from the settings in .env and the environment, or exit."""
    try:
        load_dotenv()
        options = load_options()
        client = openai.OpenAI(
            api_key=required_setting("OPENAI_API_KEY"),
            base_url=os.getenv("OPENAI_BASE_URL") or "https://api.openai.com/v1",
            timeout=float(os.getenv("MODEL_TIMEOUT") or 180),  # seconds of silence
            max_retries=0,  # retrying is a subject of its own, in s09
        )
        workspace = load_workspace()
        approval = Approval(os.getenv("APPROVAL") or "ask")
        return Agent(client, options, [], show, TOOLS, workspace, approval, check_path)
    except Exception as error:  # the packages do not say what they may raise
        sys.exit(
            "check the settings in .env, such as OPENAI_BASE_URL, MODEL_OPTIONS and"
            f" MODEL_TIMEOUT: {error}"
        )


def required_setting(name: str) -> str:
    """The value of a setting. Exits if there is none, or one that cannot be sent."""
    value = os.getenv(name, "").strip()
    if not value or not value.isascii():
        sys.exit(NO_MODEL)
    return value


def load_options() -> dict:
    """What every request contains besides the messages."""
    options = {
        "model": required_setting("MODEL_ID"),
        "stream": True,
        **json.loads(os.getenv("MODEL_OPTIONS") or "{}"),
    }
    if options["stream"]:  # without a stream, some servers refuse the next option
        options.setdefault("stream_options", {"include_usage": True})
    return options


# Reading the response: what servers and models really send

OPENING_TAG = "<think"  # or <thinking>
CLOSING_TAG = re.compile("</think(?:ing)?>")


def read_events(response: openai.APIResponse) -> Iterator[dict]:
    """The JSON objects of a response: one for each event, or one without a stream."""
    if "json" in response.headers.get("content-type", ""):
        yield json.loads(response.read())
        return
    for line in read_lines(response):
        name, _, data = line.partition(b":")
        data = data.strip()
        if data == b"[DONE]":
            return
        if name == b"data" and data:  # comments and blank lines carry nothing
            yield json.loads(data)


def read_lines(response: openai.APIResponse) -> Iterator[bytes]:
    """The lines of a response.

    The openai package has a function for this, too, but it also splits at U+2028, a
    rare line separator that may stand inside an answer.
    """
    parts = []  # of a line whose end has not arrived yet
    for block in response.iter_bytes():
        for part in block.splitlines(keepends=True):
            parts.append(part)
            if part.endswith(b"\n"):
                yield b"".join(parts)
                parts = []
    yield b"".join(parts)


def add_event(reply: Reply, event: dict) -> str:
    """Note what an event says about the reply. Returns the text in it."""
    if event.get("error"):  # some servers notice an error after they sent HTTP 200
        raise openai.OpenAIError(f"the server reports {event['error']}")
    reply.usage = event.get("usage") or reply.usage
    choices = event.get("choices")
    if not choices:
        return ""
    choice = choices[0]
    reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
    delta = choice.get("delta") or choice.get("message") or {}
    reply.reasoning.append(delta.get("reasoning_content") or "")
    for position, part in enumerate(delta.get("tool_calls") or []):
        merge_tool_call_delta(reply, part, position)
    return delta.get("content") or delta.get("refusal") or ""


class AnswerCleaner:
    """Turns what a server sends as the text of an answer into what a person should see.

    Some models write their thoughts before the answer, between <think> and </think>:
    they are left out. Some servers send an emoji in two halves, such as "\\ud83d" and
    "\\ude00" in JSON: they are joined.
    """

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-16-le")("replace")
        self.pending = ""  # what has arrived and may still be a thought
        self.has_begun = False

    def feed(self, piece: str, finish_reason: str) -> str:
        """Take in the next piece of text. Returns what can be shown of it.

        Once there is a finish reason, no more text will come, and nothing has to wait.
        """
        # Each half of an emoji is two bytes in UTF-16: the decoder waits for all four.
        data = piece.encode("utf-16-le", "surrogatepass")
        text = self.decoder.decode(data, bool(finish_reason))
        if self.has_begun:
            return text
        self.pending = (self.pending + text).lstrip()
        if self.pending.startswith(OPENING_TAG):
            closing = CLOSING_TAG.search(self.pending)
            if not closing:
                # Forget the thoughts so far, but neither that they have begun nor what
                # may be the beginning of </thinking>, 11 characters at most.
                self.pending = OPENING_TAG + self.pending[-11:]
                return ""
            self.pending = self.pending[closing.end() :].lstrip()
        if OPENING_TAG.startswith(self.pending) and not finish_reason:
            return ""  # it may become a tag
        self.has_begun = True
        return self.pending


# --- s02: tool use ---

MAX_ROUNDS = 25  # in one turn; a round is a model call and the tools it asks for
MAX_RESULT = 30_000  # characters of a tool's result
NOTES["rounds"] = f"stopped after {MAX_ROUNDS} rounds; ask again to go on"
TOOLS = []  # what the model is told: a schema for each tool
TOOL_HANDLERS = {}  # what runs: a function for each tool's name


def tool(handler: Callable):
    """Register a function as a tool.

    Its docstring tells the model what it does, and its parameters, all but the agent,
    become the JSON Schema of the arguments.
    """
    # partial(handler, None) fills in the agent, which the model must not see.
    function = {
        "name": handler.__name__,
        "description": handler.__doc__,
        "parameters": pydantic.TypeAdapter(partial(handler, None)).json_schema(),
    }
    TOOLS.append({"type": "function", "function": function})
    TOOL_HANDLERS[handler.__name__] = handler
    return handler


def ask_model(agent: Agent, texts: list) -> Reply:
    """Call the model, keep its message, and add what it says to the texts of the turn.

    As in s01, a model that says nothing (and asks for no tool) is asked once more. But
    if it has said something earlier in this turn, it has said all.
    """
    for _ in range(2):
        agent.check_cancelled()
        reply = agent.guard.call_with_room(agent)
        text = reply.message["content"]
        if text:
            texts.append(text)
        if text or reply.tool_calls:
            agent.messages.append(reply.message)
            return reply
        if texts:
            return reply
    raise openai.OpenAIError(NOTES.get(reply.finish_reason, "the answer was empty"))


def run_tool(agent: Agent, call: dict) -> str:
    """Run a tool call. Whatever goes wrong becomes a text that the model can read."""
    agent.check_cancelled()
    name = call["function"]["name"]
    arguments = call["function"]["arguments"]
    agent.show(f"{name} {' '.join(arguments.split())[:80]}", "tool_call")
    try:
        result = call_handler(agent, name, json.loads(arguments))
    except Exception as error:  # a tool may fail in any way, and the model must know
        result = f"error: {str(error) or type(error).__name__}"
    result = cut_middle(replace_surrogates(result))
    agent.show(result, "tool_result")
    return result


def call_handler(agent: Agent, name: str, arguments: dict) -> str:
    """Call the handler of a tool. Raises ValueError if it cannot take the arguments.

    pydantic makes "5" the number 5 where a number is wanted. Null means the default.
    """
    if name not in TOOL_HANDLERS:
        raise ValueError(f"there is no tool {name}")
    handler = pydantic.validate_call(partial(TOOL_HANDLERS[name], agent))
    given = {key: value for key, value in arguments.items() if value is not None}
    return handler(**given)


def cut_middle(text: str, limit: int = MAX_RESULT) -> str:
    """The text, or "(empty)". It loses its middle if it has over `limit` characters."""
    if len(text) <= limit:
        return text or "(empty)"
    half = limit // 2 - 50  # room for the line in between
    return f"{text[:half]}\n[... the middle is cut out ...]\n{text[-half:]}"


# One result for each call, also after an error or Ctrl-C


INTERRUPTED = "interrupted: it may have run, wholly or in part"


def tool_result(call: dict, text: str) -> dict:
    """The message that answers a tool call."""
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def unanswered_tool_calls(messages: list[dict]) -> list:
    """The tool calls of the last assistant message that have no result yet."""
    # Results stand in the order of the calls. So if n results end the list, the first
    # n calls of the message before them are answered, and the others are not.
    for result_count, message in enumerate(reversed(messages)):
        if message["role"] != "tool":
            return message.get("tool_calls", [])[result_count:]
    return []


def end_interrupted_turn(agent: Agent) -> None:
    """Complete the last turn, if it was cut off, so that a question can follow it."""
    for call in unanswered_tool_calls(list(agent.messages)):
        agent.messages.append(tool_result(call, INTERRUPTED))
    messages = list(agent.messages)
    if messages and messages[-1]["role"] != "assistant":
        agent.messages.append(
            {"role": "assistant", "content": "[The turn ended here.]"}
        )


# Files

FILE_LOCK = threading.Lock()  # for later, when several turns run at once


def load_workspace() -> Path:
    """The folder that tools work in: WORKSPACE_DIR, or workspace/ beside sessions/."""
    name = os.getenv("WORKSPACE_DIR") or Path(__file__).parents[2] / "workspace"
    folder = Path(name).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_file(agent: Agent, path: str, is_write: bool = False) -> Path:
    """The file that a path means, links followed. Raises ValueError if it is denied."""
    file = (agent.workspace / Path(path).expanduser()).resolve()
    agent.check_path(agent, file, is_write)
    return file


def check_path(agent: Agent, file: Path, is_write: bool) -> None:
    """Raise ValueError if a file is outside the workspace, or the program's own.

    (`is_write` is for later rules: some files may be read and not written.)
    """
    if not file.is_relative_to(agent.workspace):
        raise ValueError("this path is outside the workspace")
    if str(file.relative_to(agent.workspace)).startswith("."):
        raise ValueError("paths that begin with a dot are not for tools")


def load_text(file: Path) -> str:
    """The text of a file, line ends included. Raises ValueError if it is no text."""
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text: use bash for it") from error


def replace_file(file: Path, text: str) -> None:
    """Write a file, wholly or not at all: a temporary file takes its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            if file.exists():
                shutil.copymode(file, temporary)
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@tool
def read_file(agent: Agent, path: str, offset: int = 1, limit: int = 2000) -> str:
    """Read a text file of the workspace: up to `limit` lines, from line `offset` on."""
    text = load_text(find_file(agent, path))
    lines = text.removeprefix("\ufeff").splitlines()
    start = max(offset - 1, 0)
    chosen = lines[start : start + limit]
    result = cut_middle("\n".join(chosen))
    if len(chosen) < len(lines):
        result += f"\n[from line {start + 1} of {len(lines)}]"
    return result


@tool
def write_file(agent: Agent, path: str, content: str) -> str:
    """Write a text file of the workspace. One that exists is replaced."""
    with FILE_LOCK:
        replace_file(find_file(agent, path, True), content)
    return f"wrote {path}"


@tool
def edit_file(agent: Agent, path: str, old_text: str, new_text: str) -> str:
    """Replace a passage of a text file. `old_text` must occur in it exactly once."""
    with FILE_LOCK:
        file = find_file(agent, path, True)
        text = load_text(file)
        if "\r\n" in text:  # line ends of Windows; models write \n
            old_text = re.sub("\r?\n", "\r\n", old_text)
            new_text = re.sub("\r?\n", "\r\n", new_text)
        check_passage(text, old_text)
        replace_file(file, text.replace(old_text, new_text))
    return "replaced the passage"


def check_passage(text: str, passage: str) -> None:
    """Raise ValueError, with the nearest line, unless a passage occurs exactly once."""
    count = text.count(passage) if passage else 0
    if count > 1:
        raise ValueError(f"old_text occurs {count} times: make it longer")
    if count == 0:
        lines = [line[:100] for line in text.split("\n")[:1000]]
        nearest = difflib.get_close_matches(passage.split("\n")[0], lines, n=1)
        raise ValueError(f"old_text does not occur. Similar lines: {nearest}")


# Commands

SECRET = re.compile("(?i)key|token|secret|pass|pwd|credential")


@dataclass
class Approval:
    """Whether commands run: "always", "never", or if the person says yes ("ask").

    It is an object so that a yes to all holds for all copies of the agent.
    """

    mode: str


@tool
def bash(agent: Agent, command: str, timeout: int = 120) -> str:
    """Run a bash command in the workspace. It is killed after `timeout` seconds.

    It gets no input. The person may refuse it; then try no other way.
    """
    if not is_approved(agent.approval, command):
        raise ValueError("not allowed: the person said no, or nobody was asked")
    return run_command(agent, command, timeout)


def is_approved(approval: Approval, command: str) -> bool:
    """Whether a command may run. The person at the terminal sees exactly what it is."""
    if approval.mode == "always":
        return True
    if approval.mode == "never" or not sys.stdin.isatty():
        return False
    forget_typed_text()
    lines = command.split("\n")
    print()
    for line in lines:
        print(f"> {escape_invisible(line)}")
    question = f"run it (lines: {len(lines)}, characters: {len(command)})? [y/N/a] "
    answer = input(question).strip().lower()
    if answer == "a":
        approval.mode = "always"
    return answer in ("y", "a")


def escape_invisible(text: str) -> str:
    """The text with each character that does not show written out, such as \\x1b."""
    shown = ""
    for character in text:
        shown += character if character.isprintable() else repr(character)[1:-1]
    return shown


def forget_typed_text() -> None:
    """Drop what was typed before a question: it is no answer to it."""
    with suppress(ImportError):  # Windows has no termios
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)


def run_command(agent: Agent, command: str, seconds: int) -> str:
    """Run a command. Returns what it has printed, and how it ended."""
    mark = f"AGENT_COMMAND={uuid4().hex}"  # a variable that all its processes inherit
    process = subprocess.Popen(
        ["env", mark, "bash", "-c", command],  # kill_command needs the mark, as args[1]
        cwd=agent.workspace,
        env={name: os.environ[name] for name in os.environ if not SECRET.search(name)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group of its own, to be killed as a whole
    )
    agent.note_waiting(process)
    output = bytearray()
    reader = threading.Thread(
        target=collect_output, args=(process, output), daemon=True
    )
    reader.start()
    ending = f"killed after {seconds} s"  # unless it ends in time
    try:
        with suppress(subprocess.TimeoutExpired):
            ending = f"exit code {process.wait(seconds)}"
    finally:
        if process.returncode is None:
            kill_command(process)
    reader.join(1)  # a process left in the background may keep the pipe open
    text = output.decode(errors="replace").rstrip()
    # Cut the output alone, so that run_tool has nothing left to cut.
    return f"{cut_middle(text, MAX_RESULT - 100)}\n[{ending}]"


def collect_output(process: subprocess.Popen, output: bytearray) -> None:
    """Read what a process prints, to its end. Keep the beginning and the end of it."""
    keep = 4 * MAX_RESULT  # bytes at each end; a character has up to 4
    while block := process.stdout.read1(65536):
        output += block
        del output[keep:-keep]  # deletes nothing while the two ends overlap


def kill_command(process: subprocess.Popen) -> None:
    """Kill a command, and every process that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    mark = process.args[1].encode()
    for folder in Path("/proc").glob("[0-9]*"):  # there are none but on Linux
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if mark in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


# Reading tool calls, and sending them back (most details are for odd servers)


def merge_tool_call_delta(reply: Reply, delta: dict, position: int) -> None:
    """Add a piece of a streamed tool call to the reply.

    A piece belongs to the last call with its index, unless it brings another id. Some
    servers send no index, repeat the name, or send the arguments as an object.
    """
    index = delta.get("index", position)
    call = reply.growing_calls.get(index)
    if call is None or delta.get("id") not in (None, "", call["id"]):  # a new call
        call = {"id": delta.get("id"), "name": "", "arguments": "", "extra": {}}
        reply.growing_calls[index] = call
        reply.tool_calls.append(call)
    function = delta.get("function") or {}
    call["name"] = function.get("name") or call["name"]
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    call["arguments"] += arguments
    if "extra_content" in delta:
        call["extra"] = {"extra_content": delta["extra_content"]}


def complete_message(agent: Agent, reply: Reply) -> None:
    """Put the tool calls into the message of a reply, in a form all servers take.

    What only this model's server understands is kept as an extra: it goes back there.
    """
    calls = []
    signed_calls = []  # the same, with the signatures that Gemini adds to its calls
    extras = {}
    for call in reply.tool_calls[:100]:  # more than that is a model gone wild
        calls.append(normalize_tool_call(call))
        signed_calls.append(calls[-1] | call["extra"])
    reply.tool_calls = calls
    if calls:
        reply.message["tool_calls"] = calls
    if signed_calls != calls:
        extras["tool_calls"] = signed_calls
    if any(reply.reasoning):  # the thoughts of DeepSeek and Kimi
        extras["reasoning_content"] = replace_surrogates("".join(reply.reasoning))
    if extras and is_json_object(json.dumps(extras)):  # NaN would spoil each request
        reply.message["extras"] = {model_and_server(agent): extras}


def normalize_tool_call(call: dict) -> dict:
    """A tool call with a plain name, a JSON object as arguments, and an id of our own.

    Mistral accepts only nine letters and digits as an id; other servers repeat theirs.
    """
    name = re.sub("[^a-zA-Z0-9_-]", "_", call["name"].strip())[:64] or "unnamed"
    arguments = normalize_arguments(replace_surrogates(call["arguments"]))
    function = {"name": name, "arguments": arguments}
    return {"id": uuid4().hex[:9], "type": "function", "function": function}


def normalize_arguments(text: str) -> str:
    """The arguments as they came if they are a JSON object, else one around them."""
    if text.strip() in ("", "null"):
        return "{}"
    if is_json_object(text):
        return text
    return json.dumps({"invalid_json": text})


def is_json_object(text: str) -> bool:
    """Whether a text is a JSON object, without NaN and without half a character."""
    try:
        return isinstance(from_json(text, allow_inf_nan=False), dict)
    except ValueError:
        return False


def request_messages(agent: Agent) -> list:
    """The conversation as it is sent: of the extras, each model gets its own."""
    key = model_and_server(agent)
    messages = []
    if agent.system:
        messages.append({"role": "system", "content": agent.system})
    for message in agent.messages:
        sent = dict(message)
        extras = sent.pop("extras", {})
        messages.append(sent | extras.get(key, {}))
    return messages


def model_and_server(agent: Agent) -> str:
    """The model and where it runs: the key of what only they understand."""
    return f"{agent.options['model']} at {agent.client.base_url}"


def replace_surrogates(text: str) -> str:
    """Join the halves of a character that a stream has split; replace a lone half."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- s03: sessions and context ---

# The log of a conversation

RECORD = pydantic.TypeAdapter(dict)  # its validate_json accepts only JSON objects


def read_records(path: Path) -> list[dict]:
    """The records of a log. A torn last line is set aside, a damaged one left out."""
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:  # what follows the last newline: nothing after a whole line
        path.with_suffix(".torn").write_bytes(torn)
        os.truncate(path, path.stat().st_size - len(torn))
        print(f"[{path.name}: the last line was torn, and is set aside]")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(RECORD.validate_json(line))
        except ValueError:
            print(f"[{path.name}: line {number} is damaged and left out]")
    return records


class Session:
    """One conversation: a list of messages. Each change is in its log first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = ""
        self.messages = []
        self.windows = {}  # for each model, in tokens, as its server has stated it
        self.lock = threading.Lock()  # for later, when several turns run at once
        for record in read_records(path):
            self.apply(record)
        self.replace_all(repair_history(self.messages), "repaired")

    def __iter__(self) -> Iterator[dict]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)

    def __str__(self) -> str:
        text = f"session {self.path.stem}, messages: {len(self)}, {self.label}"
        return text.removesuffix(", ")  # without a label

    def append(self, message: dict) -> None:
        """Add a message."""
        self.commit({"type": "message", "message": message})

    def pop(self) -> None:
        """Take the last message back, also when the disk is full."""
        record = {"type": "retraction", "to": len(self) - 1}
        try:
            self.commit(record)
        except OSError:
            self.apply(record)  # in memory alone

    def replace_all(self, messages: list[dict], why: str) -> None:
        """Put other messages in place of all, if they differ. The log keeps the old."""
        if messages != self.messages:
            self.commit({"type": "compaction", "why": why, "messages": messages})

    def set_window(self, model: str, tokens: int) -> None:
        """Remember how many tokens a model takes."""
        self.commit({"type": "window", "model": model, "tokens": tokens})

    def commit(self, record: dict) -> None:
        """Write a change to the log, apply it, and wait until it is on the disk."""
        if not self.path.exists():
            raise OSError(f"{self.path} was removed while in use; see /new")
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self.lock, open(self.path, "ab", buffering=0) as log:
            size = log.tell()
            if log.write(line) < len(line):
                log.truncate(size)
                raise OSError("the disk is full")
            self.apply(record)
            os.fsync(log.fileno())

    def apply(self, record: dict) -> None:
        """Make the change that a record describes: now, or when the log is replayed."""
        match record:
            case {"type": "session", "label": str(label)}:
                self.label = label
            case {"type": "message", "message": message} if is_message(message):
                self.messages.append(message)
            case {"type": "retraction", "to": int(length)}:
                del self.messages[length:]
            case {"type": "compaction", "messages": list(messages)}:
                self.messages = [each for each in messages if is_message(each)]
            case {"type": "window", "model": str(model), "tokens": int(tokens)}:
                self.windows[model] = tokens
            case _:
                print(f"[{self.path.name}: a record is damaged and left out]")


def is_message(value: object) -> bool:
    """Whether a value from a log has all that is used of a message."""
    match value:
        case {"role": "assistant", "content": str(), "tool_calls": list(calls)}:
            return all(is_tool_call(call) for call in calls)
        case {"role": "tool", "content": str(), "tool_call_id": str()}:
            return True
        case {"role": "user" | "assistant", "content": str(), **others}:
            return "tool_calls" not in others  # a list of them fits the first case
    return False


def is_tool_call(value: object) -> bool:
    """Whether a value from a log has all that is used of a tool call."""
    match value:
        case {"id": str(), "function": {"name": str(), "arguments": str()}}:
            return True
    return False


def repair_history(messages: list[dict]) -> list[dict]:
    """A history that servers accept: one result for each call, alternate speakers."""
    repaired = []
    for message in messages:
        if repaired and message == repaired[-1]:
            continue  # a line of the log that is there twice
        waiting = unanswered_tool_calls(repaired)
        if message["role"] == "tool":
            if waiting and waiting[0]["id"] == message["tool_call_id"]:
                repaired.append(message)
            continue  # a result whose call is lost is left out
        add_missing_results(repaired)
        last_role = repaired[-1]["role"] if repaired else "assistant"
        if message["role"] == "user" and last_role != "assistant":
            repaired.append({"role": "assistant", "content": "[The turn ended here.]"})
        if message["role"] == "assistant" and last_role == "assistant":
            repaired.append({"role": "user", "content": "[A message is missing here.]"})
        repaired.append(message)
    add_missing_results(repaired)
    return repaired


def add_missing_results(messages: list[dict]) -> None:
    """Give each unanswered tool call at the end of a history a result that says so."""
    for call in unanswered_tool_calls(messages):
        messages.append(tool_result(call, INTERRUPTED))


# Keeping requests inside the model's window

SUMMARIZE = """Summarize this conversation for the assistant who has to go on with it.
Keep names, numbers, paths, decisions, what was done, what failed and what is still to
do. At most 300 words."""
TOO_LONG = "this is too long for the model's window: say less, or begin anew with /new"


class ContextOverflow(openai.OpenAIError):
    """The conversation does not fit the model's window."""


class ContextGuard:
    """Calls the model. If the conversation is too long for it, makes room first."""

    def __init__(self, window: int) -> None:
        self.window = window  # in tokens, as CONTEXT_TOKENS says
        self.correction = 1.0  # what the estimates have to be multiplied by

    def call_with_room(self, agent: Agent) -> Reply:
        """Call the model; then with shorter tool results; then with a summary.

        Raises ContextOverflow, with the conversation as it was, if nothing helps.
        """
        before = list(agent.messages)
        # How to make room, and by what to divide it: so much each result, or all that
        # is not summarized, may have.
        steps = (
            (do_nothing, 1),  # most requests fit as they are
            (self.shorten_results, 8),
            (self.compact, 4),
            (self.shorten_results, 64),
        )
        for make_room, divisor in steps:
            make_room(agent, self.room(agent) // divisor)
            try:
                return self.attempt(agent)
            except ContextOverflow as error:
                overflow = error  # Python forgets `error` after this block
            if self.question_is_too_long(agent):
                break
        agent.messages.replace_all(before, "restored")
        raise overflow

    def attempt(self, agent: Agent) -> Reply:
        """Call the model once. Raises ContextOverflow if the request is too long."""
        estimate = self.used_tokens(agent)
        if estimate > self.window_of(agent) * 0.9:  # the answer needs room, too
            raise ContextOverflow(TOO_LONG)
        try:
            reply = call_model(agent)
        except openai.OpenAIError as error:
            if not is_overflow(error):
                raise
            stated = STATED_WINDOW.search(error_text(error))
            if stated:
                agent.messages.set_window(agent.options["model"], int(stated[1]))
            raise ContextOverflow(TOO_LONG) from error
        self.calibrate(reply, estimate)
        return reply

    def window_of(self, agent: Agent) -> int:
        """The window in tokens: what CONTEXT_TOKENS or the server says, if less."""
        stated = agent.messages.windows.get(agent.options["model"], self.window)
        return min(stated, self.window)

    def room(self, agent: Agent) -> int:
        """The window, or the request that did not fit if it is estimated at less."""
        return min(self.window_of(agent), self.used_tokens(agent))

    def question_is_too_long(self, agent: Agent) -> bool:
        """Whether a question alone leaves no room for a summary before it."""
        last = list(agent.messages)[-1]
        size = self.estimate([agent.tools, last])
        return last["role"] == "user" and size > self.window_of(agent) * 0.8

    def estimate(self, value: object) -> int:
        """About how many tokens a value takes, by the server's last count."""
        return int(estimate_tokens(value) * self.correction)

    def used_tokens(self, agent: Agent) -> int:
        """About how many tokens the next request takes."""
        return self.estimate([agent.tools, request_messages(agent)])

    def calibrate(self, reply: Reply, estimate: int) -> None:
        """Correct the estimates by the tokens that the server has counted."""
        match reply.usage:
            case {"prompt_tokens": int(counted)}:
                uncorrected = estimate / self.correction
                self.correction = min(max(counted / uncorrected, 0.25), 4)

    def shorten_results(self, agent: Agent, limit: int) -> None:
        """Cut the middle out of the tool results that have more than `limit` tokens."""
        shortened = []
        for message in agent.messages:
            if message["role"] == "tool":
                message = message | {"content": cut_tokens(message["content"], limit)}
            shortened.append(message)
        agent.messages.replace_all(shortened, "shortened")

    def compact(self, agent: Agent, limit: int, may_drop: bool = True) -> None:
        """Put a summary in place of all but the latest `limit` tokens.

        At least one message stays. If the model gives no summary, drop the older
        messages if `may_drop`, else raise. If it cannot be reached, always raise.
        """
        messages = list(agent.messages)
        start = self.latest_start(messages, limit)
        if start == 0:
            return
        note = f"messages that became a summary: {start}"
        try:
            summary = self.summarize(agent, messages[:start])
        except (openai.APIConnectionError, openai.RateLimitError):
            raise  # there may be a summary when the server can answer again
        except Exception as error:  # the call may fail in any way
            agent.check_cancelled()
            if not may_drop:
                raise
            note = f"no summary ({explain(error)}): messages left out: {start}"
            summary = "(The beginning is left out.)"
        head = [{"role": "user", "content": f"[The conversation so far]\n{summary}"}]
        if messages[start]["role"] == "user":
            # Speakers have to take turns.
            head.append({"role": "assistant", "content": "I go on from there."})
        agent.messages.replace_all(head + messages[start:], "summarized")
        agent.show(note, "note")
        agent.show("\n")

    def latest_start(self, messages: list[dict], limit: int) -> int:
        """Where the latest `limit` tokens begin. A call stays with its results."""
        # Go back, message by message, until the tokens are used up.
        start = len(messages)
        for position in reversed(range(len(messages))):
            limit -= self.estimate(messages[position])
            if limit < 0 and start < len(messages):  # at least one message stays
                break
            if messages[position]["role"] != "tool":  # its call would be left behind
                start = position
        return start

    def summarize(self, agent: Agent, messages: list[dict]) -> str:
        """The model's summary of messages. Raises OpenAIError if it gives none."""
        lines = []
        for message in messages:
            lines.append(f"{message['role']}: {message['content']}")
            for call in message.get("tool_calls", []):
                lines.append(f"tool call: {call['function']}")
        transcript = cut_tokens("\n".join(lines), self.room(agent) // 2)
        request = {"role": "user", "content": f"{SUMMARIZE}\n\n{transcript}"}
        # A copy of the agent with a conversation of its own, which is in no log.
        helper = replace(agent, messages=[request], tools=[], show=do_nothing)
        reply = call_model(helper)
        agent.check_cancelled()
        summary = reply.message["content"]
        # Each finish reason in NOTES means that the answer is not whole.
        if reply.finish_reason in NOTES or not summary:
            raise openai.OpenAIError("the model gave none")
        return summary


def estimate_tokens(value: object) -> int:
    """About how many tokens a value has: 1 for 4 letters or for a Chinese character."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return len(text) // 4
    wide = len(re.findall("[\u2e80-\U0010ffff]", text))
    return wide + (len(text) - wide) // 4


def cut_tokens(text: str, tokens: int) -> str:
    """The text, without its middle if it has more than about so many tokens."""
    estimate = max(estimate_tokens(text), 1)
    return cut_middle(text, max(len(text) * tokens // estimate, 200))


# Which session?


class SessionStore:
    """The sessions of one agent, and which of them a session key means now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sessions"
        self.index = folder / "sessions.json"
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, key: str) -> list[Path]:
        """The logs of the sessions of a key, the one used last first."""
        found = []
        for path in self.folder.glob("*.jsonl"):
            # A damaged header names no key: show it to the owner rather than lose it.
            if read_header(path).get("key", "agent:main:main") == key:
                found.append(path)
        return sorted(found, key=os.path.getmtime, reverse=True)

    def read_index(self) -> dict:
        """The id of each key's session. Empty if the file is missing or damaged."""
        try:
            return RECORD.validate_json(self.index.read_bytes())
        except (OSError, ValueError):
            return {}

    def resume(self, key: str) -> Session:
        """The session of a key in the index, else the last one, else a new one."""
        # For a key that is not in the index this is None.jsonl, which is no file.
        path = self.folder / f"{self.read_index().get(key)}.jsonl"
        if path.is_file():
            return Session(path)
        found = self.find(key)
        if found:
            return Session(found[0])
        return self.create(key)

    def create(self, key: str, label: str = "") -> Session:
        """A new session, which the key means from now on."""
        path = self.folder / f"{uuid4().hex[:12]}.jsonl"
        path.touch()
        session = Session(path)
        session.commit({"type": "session", "key": key, "label": label})
        self.set_current(key, path)
        return session

    def switch_to(self, key: str, prefix: str) -> Session:
        """The session whose id begins with a prefix: what the key means from now on."""
        found = [path for path in self.find(key) if path.stem.startswith(prefix)]
        if len(found) != 1:
            raise ValueError(f"sessions that begin so: {len(found)}. See /list")
        session = Session(found[0])
        self.set_current(key, found[0])
        return session

    def set_current(self, key: str, path: Path) -> None:
        """Write into the index that a key means a session."""
        index = self.read_index()
        index[key] = path.stem
        replace_file(self.index, json.dumps(index))


def read_header(path: Path) -> dict:
    """The first record of a log. Empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return RECORD.validate_json(file.readline())
    except (OSError, ValueError):
        return {}


LOCKS = []  # open files: to close one would release its lock


def lock_workspace(folder: Path) -> None:
    """Own a workspace while the process lives. Exits if another process owns it."""
    path = folder / ".lock"
    path.touch(0o600)  # the owner alone may read it
    # It stays open on purpose.
    lock = open(path, "a", encoding="utf-8")  # noqa: SIM115
    LOCKS.append(lock)
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return  # Windows has no such lock
    except OSError:
        owner = path.read_text("utf-8")
        sys.exit(f"{folder} is in use by {owner}: end it, or set WORKSPACE_DIR")
    path.write_text(f"{__doc__[:3]}, process {os.getpid()}", "utf-8")


# Commands

COMMANDS = {}


@dataclass
class Command:
    """A slash command."""

    usage: str
    about: str
    handler: Callable


def command(usage: str, about: str) -> Callable:
    """Register a slash command: how it is written, and its line in /help."""

    def register(handler: Callable) -> Callable:
        COMMANDS[usage.split()[0]] = Command(usage, about, handler)
        return handler

    return register


def run_slash_command(agent: Agent, line: str) -> None:
    """Run a line that begins with a slash, and print what comes of it."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        print(f"There is no command {name}: see /help. To send it, begin with a space.")
        return
    try:
        print(COMMANDS[name].handler(agent, argument.strip()))
    except (Exception, KeyboardInterrupt) as error:  # the loop goes on
        print(f"[{str(error) or 'stopped'}]")


@command("/new [label]", "start a new session")
def new_session(agent: Agent, label: str) -> str:
    agent.messages = agent.store.create(agent.session_key, label)
    return str(agent.messages)


@command("/list", "the sessions, the one used last first")
def list_sessions(agent: Agent, argument: str) -> str:
    lines = []
    for path in agent.store.find(agent.session_key)[:20]:
        mark = "*" if path == agent.messages.path else " "
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        lines.append(
            f"{mark} {path.stem}  {used}  {read_header(path).get('label', '')}"
        )
    return "\n".join(lines)


@command("/switch <id>", "go to another session; the beginning of its id will do")
def switch_session(agent: Agent, prefix: str) -> str:
    agent.messages = agent.store.switch_to(agent.session_key, prefix)
    return str(agent.messages)


@command("/context", "how full the model's window is")
def show_context(agent: Agent, argument: str) -> str:
    used = agent.guard.used_tokens(agent)
    window = agent.guard.window_of(agent)
    bar = "#" * min(20 * used // window, 20)
    return (
        f"[{bar:.<20}] {used:,} of {window:,} tokens, messages: {len(agent.messages)}"
    )


@command("/compact", "put a summary in place of all but the last message")
def compact_session(agent: Agent, argument: str) -> str:
    agent.guard.compact(agent, limit=0, may_drop=False)
    return show_context(agent, argument)


@command("/help", "the commands")
def show_help(agent: Agent, argument: str) -> str:
    width = max(len(entry.usage) for entry in COMMANDS.values())
    lines = [f"{entry.usage:<{width}}  {entry.about}" for entry in COMMANDS.values()]
    return "\n".join(lines)


def open_session(agent: Agent) -> None:
    """Own the workspace, and go on in the session used last. Exits if it cannot."""
    try:
        window = int(os.getenv("CONTEXT_TOKENS") or 128_000)
        lock_workspace(agent.workspace)
        folder = agent.workspace / ".sessions"
        folder.mkdir(0o700, exist_ok=True)  # what is in it is the owner's alone
        agent.store = SessionStore(folder / "agents" / "main")
        agent.messages = agent.store.resume(agent.session_key)
    except (OSError, ValueError) as error:
        sys.exit(f"check WORKSPACE_DIR and CONTEXT_TOKENS: {error}")
    agent.guard = ContextGuard(max(window, 1000))


# How servers say that a request is too long

OVERFLOW = re.compile(
    "context.?(length|size|window|limit)|n_ctx|tokens_limit|token limit"
    "|maximum (input|prompt|model) length|maximum number of tokens|max_prompt_tokens"
    "|max_seq_len|(input|prompt).{0,30}(too long|exceeds? (max|the)|length should be)"
    "|input tokens exceed|too many (input )?tokens|more than max tokens|model maximum"
    "|reduce the length of the messages|length of all messages|max_new_tokens. must be",
    re.IGNORECASE,
)
# Such as "maximum context length is 8192 tokens", "13392 tokens > 8192 maximum".
STATED_WINDOW = re.compile(
    r"(?:n_ctx\W{1,4}|> |\[1, |context (?:size|window) \(?(?:of )?"
    r"|(?:context|prompt|model) length \(?(?:of|is|only| )*|limit(?: of| is|:)? "
    r"|(?:tokens allowed|max_\w{1,20})(?: of| is|:)? \(?)(\d{3,})\b(?! \+)"
)


def is_overflow(error: openai.OpenAIError) -> bool:
    """Whether a server has refused a request because it is too long."""
    status = getattr(error, "status_code", None)  # none in the middle of a stream
    if status not in (None, 400, 413, 500):  # 500 is llama.cpp's
        return False
    if str(getattr(error, "code", "")).endswith("_parameter"):
        return False  # it does not know a field such as context_length
    return status == 413 or bool(OVERFLOW.search(error_text(error)))


def error_text(error: openai.OpenAIError) -> str:
    """What a server says about an error, without fields that may quote a question."""
    body = getattr(error, "body", None)
    if not isinstance(body, dict):
        return f"{error} {body}"
    fields = ("code", "type", "message", "metadata", "n_ctx")
    return str([(field, body[field]) for field in fields if field in body])


# --- s04: channels ---

# Part 1: the inbox, channels, and the App

REMEMBER_SECONDS = 24 * 3600  # after that, no platform brings a message again
MAX_WAITING = 100  # messages of one chat
MAX_PARTS = 12  # of one message; the longest album has ten
SESSION_COMMANDS = ["/new", "/list", "/switch", "/context", "/compact"]
REMOTE_COMMANDS = [*SESSION_COMMANDS]  # what people may use on all channels


@dataclass
class InboundMessage:
    """Something that a person has said on a channel."""

    channel: str  # such as "telegram"
    account: str  # which bot of ours has received it
    peer: str  # the chat, where the answer goes
    text: str
    # The platform's: a message that comes again has the same. The terminal has none.
    id: str = field(default_factory=lambda: uuid4().hex)
    sender: str = ""  # who said it: a name, or an id
    is_group: bool = False
    guild: str = ""  # the company or server that a chat belongs to
    context: str = ""  # what it replies to, quotes, forwards, or brings along
    expects_more: float = 0  # seconds in which another part of it may follow
    received: float = 0  # seconds since 1970
    other_ids: list = field(default_factory=list)  # of the parts that came after it
    answer: str | None = None  # the answer, until it is sent

    def prompt(self) -> str:
        """The text as the model gets it."""
        text = self.text
        if self.context:
            text = f"{self.context}\n{text}"
        if self.is_group:
            text = f"[{self.sender}] {text}"
        return text


class Database:
    """An SQLite file that remembers what has to be done, such as messages to answer."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(0o700, exist_ok=True)
        path.touch(0o600)
        self.lock = threading.RLock()
        self.connection = sqlite3.connect(path, check_same_thread=False)
        # FULL: a change is on the disk when it is committed, even if the power fails.
        self.connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL"
        )

    def execute(self, statement: str, *values: object) -> list[tuple]:
        """Run an SQL statement, and commit it. Returns its rows."""
        with self.lock, self.connection:
            return self.connection.execute(statement, values).fetchall()


class Inbox:
    """The messages that have come in, on disk until they are answered.

    The ids of what is answered stay for a day: so a message that comes again is known.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        database.execute(
            "CREATE TABLE IF NOT EXISTS inbox (number INTEGER PRIMARY KEY,"
            " id TEXT UNIQUE, message TEXT, answer TEXT, done REAL)"
        )
        self.changed = threading.Condition()
        self.waiting = []  # what nobody works on yet, in the order in which it came
        rows = database.execute(
            "SELECT message, answer FROM inbox WHERE done IS NULL ORDER BY number"
        )
        for record, answer in rows:
            self.add_or_join(InboundMessage(**json.loads(record), answer=answer))

    def put(self, message: InboundMessage) -> None:
        """Take a message, unless it has come before. It is on disk when this returns.

        Raises sqlite3.Error if it cannot be written: then it is not taken.
        """
        now = time.time()
        with self.changed:
            message.received = now
            self.database.execute(
                "DELETE FROM inbox WHERE done < ?", now - REMEMBER_SECONDS
            )
            inserted = self.database.execute(
                "INSERT OR IGNORE INTO inbox (id, message) VALUES (?, ?) RETURNING id",
                message.id,
                to_record(message),
            )
            if inserted:  # a row, unless the id was known
                self.add_or_join(message)
                self.changed.notify()

    def add_or_join(self, message: InboundMessage) -> None:
        """Put a message in line, or join it with the one that it is a part of."""
        whole = self.find_beginning(message)
        if not whole:
            self.waiting.append(message)
            return
        whole.text = f"{whole.text}\n{message.text}".strip()
        whole.context = f"{whole.context}\n{message.context}".strip()
        whole.other_ids.append(message.id)
        whole.received = message.received
        whole.expects_more = message.expects_more

    def find_beginning(self, message: InboundMessage) -> InboundMessage | None:
        """The waiting message that a new one is a part of, if there is one."""
        with self.changed:  # `put` holds it already; a thread may take it twice
            for whole in self.waiting:
                seconds = message.received - whole.received
                is_in_time = 0 <= seconds < whole.expects_more
                is_same_sender = message.sender == whole.sender
                is_same_chat = chat_of(message) == chat_of(whole)
                has_room = len(whole.other_ids) < MAX_PARTS - 1
                if is_in_time and is_same_sender and is_same_chat and has_room:
                    return whole
        return None

    def take(self) -> InboundMessage:
        """Wait for a message with all its parts, and return the first there is."""
        with self.changed:
            while True:
                pauses = []
                for message in self.waiting:
                    seconds = message.received + message.expects_more - time.time()
                    # The second case: somebody has set the clock back.
                    if seconds <= 0 or seconds > message.expects_more:
                        self.waiting.remove(message)
                        return message
                    pauses.append(seconds)
                self.changed.wait(min(pauses, default=None))  # None: until a new one

    def set_answer(self, message: InboundMessage, answer: str) -> None:
        """Keep the answer to a message until it is sent."""
        self.database.execute(
            "UPDATE inbox SET answer = ? WHERE id = ?", answer, message.id
        )

    def done(self, message: InboundMessage) -> None:
        """Note that nothing is left to do for a message and its parts."""
        for message_id in [*message.other_ids, message.id]:
            self.database.execute(
                "UPDATE inbox SET message = '', answer = '', done = ? WHERE id = ?",
                time.time(),
                message_id,
            )

    def count_waiting(self, message: InboundMessage) -> int:
        """How many messages of the same chat wait."""
        with self.changed:
            chats = [chat_of(other) for other in self.waiting]
        return chats.count(chat_of(message))


def to_record(message: InboundMessage) -> str:
    """A message as it is kept on disk."""
    fields = asdict(message)
    del fields["answer"]  # it has a column of its own
    return json.dumps(fields)


def chat_of(message: InboundMessage) -> tuple:
    """What identifies the chat that a message was written in."""
    return message.channel, message.account, message.peer


def without_topic(peer: str) -> str:
    """The chat alone: a topic in it, such as in a forum, is <chat>:topic:<number>."""
    return peer.split(":topic:")[0]


# Channels: one way for all to receive, send, and say how they are


class ChannelError(Exception):
    """A channel could not do something: for good, or until another try."""

    def __init__(
        self, reason: object, is_permanent: bool = False, retry_after: float = 0
    ) -> None:
        super().__init__(reason)
        self.is_permanent = is_permanent
        self.retry_after = retry_after  # seconds, if the platform says so


def call_with_retries(step: Callable, on_retry: Callable, max_tries: int = 0) -> None:
    """Call `step` until it succeeds. Waits 1, 2, 4 ... 60 seconds between two tries.

    `on_retry` is told why the first try failed. Raises ChannelError after `max_tries`
    tries (0: it tries forever), or if another try is of no use.
    """
    for number in itertools.count(1):
        try:
            step()
            return
        except ChannelError as error:
            if error.is_permanent or number == max_tries:
                raise
            if number == 1:
                on_retry(f"{error}; trying again")
            time.sleep(error.retry_after or min(2 ** (number - 1), 60))


class Channel:
    """A way to people. One object is one account: one bot, one app, the terminal."""

    name = ""
    key_setting = ""  # an account exists if it has this setting
    secret_setting = ""  # never to be shown
    max_length = 4000  # characters of one text

    def __init__(self, app: "App", account: str = "default") -> None:
        self.app = app
        self.account = account
        self.status = "starting"
        self.logged = set()  # the subjects of log_once

    def __str__(self) -> str:
        return self.name if self.account == "default" else f"{self.name} {self.account}"

    def start(self) -> None:
        """Begin to receive. Raises an exception if that cannot work."""

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Send a text to a chat. Raises ChannelError.

        A platform that can do so sends texts with the same key only once.
        """
        raise NotImplementedError

    def typing(self, peer: str) -> AbstractContextManager:
        """Show in a chat, while this is entered, that an answer is being written."""
        return nullcontext()

    def setting(self, name: str, default: str = "") -> str:
        """The account's setting, such as TELEGRAM_BOT_TOKEN, or ..._WORK for "work"."""
        name = f"{self.name}_{name}_{self.account}".upper().removesuffix("_DEFAULT")
        return os.getenv(name, "").strip() or default

    def allows(self, message: InboundMessage) -> bool:
        """Whether the people of a chat may talk to the agent. Nobody by default."""
        allowed = self.setting("ALLOWED_CHATS").replace(",", " ").split()
        return without_topic(message.peer) in allowed

    def receive(self, message: InboundMessage) -> bool:
        """Take what a person has said: then it is on disk. Returns whether it is taken.

        Raises sqlite3.Error if it cannot be written.
        """
        message.text = replace_surrogates(message.text)
        message.sender = replace_surrogates(message.sender)
        message.context = replace_surrogates(message.context)
        if not self.allows(message):
            chat = without_topic(message.peer)
            self.log_once(chat, f"{chat} ({message.sender}) is not in ALLOWED_CHATS")
            return False
        if self.app.inbox.count_waiting(message) >= MAX_WAITING:
            self.log(f"{message.peer}: too many messages wait, so one is left out")
            return False
        self.app.inbox.put(message)
        return True

    def log(self, text: str) -> None:
        """Say something at the terminal, in one line."""
        line = " ".join(self.mask_secret(text).split())[:300]
        self.app.terminal.send("", f"[{self}] {line}")

    def log_once(self, subject: str, text: str) -> None:
        """Say something that strangers could cause again and again: once a subject."""
        if subject not in self.logged:
            self.logged.add(subject)
            self.log(text)

    def report(self, status: str) -> None:
        """Note how the channel is, and say so at the terminal if it has changed."""
        status = self.mask_secret(status)
        if status != self.status:
            self.log(status)
        self.status = status

    def mask_secret(self, text: str) -> str:
        """The text without the secret of the account: errors may contain it."""
        secret = self.setting(self.secret_setting)
        return text.replace(secret, "***") if secret else text

    def run(self) -> None:
        """Start, again and again while that fails for a time. Runs in a thread."""
        try:
            call_with_retries(self.start, self.report)
        except Exception as error:  # whatever it is, the other channels work
            self.report(f"off: {error}. Check its settings in .env")


class TerminalChannel(Channel):
    """The terminal: it shows what others say above the line that is being typed."""

    name = "terminal"

    def __init__(self, app: "App") -> None:
        super().__init__(app)
        self.status = "on"
        self.lock = threading.Lock()
        self.is_at_prompt = False
        self.held_back = []  # texts that wait for the prompt

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Print a text: now if the person is at the prompt, else before the next."""
        text = CONTROL_CHARACTERS.sub("", text)
        with self.lock:
            if not self.is_at_prompt:
                self.held_back.append(text)
            elif sys.stdin.isatty():
                # Go to the blank line above the prompt, clear what is below, and write.
                prompt = f"\n\nyou> {typed_text()}"
                print(f"\x1b[A\r\x1b[J{text}{prompt}", end="", flush=True)
            else:
                print(text, flush=True)

    def show_prompt(self) -> None:
        """From now on, the person is at the prompt."""
        with self.lock:
            for text in self.held_back:
                print(text, flush=True)
            self.held_back = []
            self.is_at_prompt = True

    def leave_prompt(self) -> None:
        """From now on, a line of the person is worked on."""
        with self.lock:
            self.is_at_prompt = False


def typed_text() -> str:
    """What has been typed at the prompt, without Enter.

    It is copied from the memory of the readline library: its own function for this
    crashes if a key is pressed at the same moment.
    """
    if "readline" not in sys.modules:
        return ""
    library = ctypes.CDLL(sys.modules["readline"].__file__)
    line = ctypes.c_char_p.in_dll(library, "rl_line_buffer").value
    return (line or b"").decode(errors="replace")


class Outbox:
    """Sends answers: those to one chat in order, and no chat waits for another."""

    def __init__(self, app: "App") -> None:
        self.app = app
        self.queues = {}  # for each chat: the answers that wait to be sent

    def put(self, message: InboundMessage, answer: str) -> None:
        """Keep an answer on disk, and send it in the background."""
        self.app.inbox.set_answer(message, answer)
        chat = chat_of(message)
        if chat not in self.queues:
            self.queues[chat] = queue.Queue()
            threading.Thread(target=self.send_answers, args=[chat], daemon=True).start()
        self.queues[chat].put(replace(message, answer=answer))

    def send_answers(self, chat: tuple) -> None:
        """Send what there is for a chat. Runs in a thread of this chat."""
        answers = self.queues[chat]
        while True:
            message = answers.get()
            channel = self.app.channels[message.channel, message.account]
            try:
                self.send(channel, message)
                self.app.inbox.done(message)
            except Exception as error:  # the answer stays in the inbox
                channel.log(f"not sent to {message.peer}: {error}")
            answers.task_done()

    def send(self, channel: Channel, message: InboundMessage) -> None:
        """Send an answer in parts. One that can never arrive is given up."""
        try:
            texts = split_text(message.answer, channel.max_length)
            for number, text in enumerate(texts):
                key = f"{message.id}/{number}"
                step = partial(channel.send, message.peer, text, key)
                call_with_retries(step, channel.log, max_tries=10)
        except ChannelError as error:
            if not error.is_permanent:
                raise
            channel.log(f"never to be sent to {message.peer}: {error}")

    def close(self, seconds: float) -> None:
        """Give the answers that are on their way some time to arrive."""
        deadline = time.monotonic() + seconds
        for answers in list(self.queues.values()):
            while answers.unfinished_tasks and time.monotonic() < deadline:
                time.sleep(0.01)


def split_text(text: str, limit: int) -> list[str]:
    """A text in parts of at most `limit` characters, cut after a line or a word."""
    parts = []
    while len(text) > limit:
        newline = text.rfind("\n", limit // 2, limit)
        blank = text.rfind(" ", limit // 2, limit)
        cut = newline + 1 or blank + 1 or limit  # they are -1 if there is none
        parts.append(text[:cut])
        text = text[cut:]
    parts.append(text)
    return [part for part in parts if part.strip()]  # platforms refuse blank texts


CHANNELS = []  # the classes of channels that can be configured


def create_channels(app: "App") -> dict[tuple, Channel]:
    """A channel for each account in the settings, such as TELEGRAM_BOT_TOKEN_WORK."""
    channels = {("terminal", "default"): app.terminal}
    for kind in CHANNELS:
        setting = f"{kind.name}_{kind.key_setting}".upper()
        for name in sorted(os.environ):
            if name.startswith(setting) and os.environ[name].strip():
                account = name.removeprefix(setting).strip("_").lower() or "default"
                try:
                    channels[kind.name, account] = kind(app, account)
                except Exception as error:  # the libraries do not say what they raise
                    app.terminal.log(f"{kind.name} {account} is off: {error}")
    return channels


class App:
    """Takes messages from all channels, answers each in its session, and replies."""

    def __init__(self, agent: Agent) -> None:
        agent.app = self
        self.agent = agent
        self.database = Database(agent.workspace / ".state" / "gateway.db")
        self.inbox = Inbox(self.database)
        self.outbox = Outbox(self)
        self.terminal = TerminalChannel(self)
        self.channels = create_channels(self)
        self.sessions = {agent.session_key: agent.messages}  # those in use
        self.session_lock = threading.Lock()
        self.turn_lock = threading.Lock()  # held by the turn that runs
        self.next_turn_lock = threading.Lock()  # held by the one that waits for it
        self.waiting_for = {}  # what each session's turn waits for
        # There is nobody who could be asked.
        mode = "always" if agent.approval.mode == "always" else "never"
        self.remote_approval = Approval(mode)

    def run(self) -> NoReturn:
        """Answer everybody until the person at the terminal leaves."""
        status = 0
        try:
            self.start()
            self.terminal.show_prompt()
            talk(self.handle_line)
        except (EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C at the prompt
            print()
        except SystemExit as error:  # a signal, such as SIGTERM
            status = error.code
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # a second one changes nothing
            signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)
        self.close(1)
        sys.stdout.flush()
        os._exit(status)  # it waits for no thread; what is not done is in the inbox

    def start(self) -> None:
        """Start the channels, and the thread that works off the inbox."""
        for channel in self.channels.values():
            threading.Thread(target=channel.run, daemon=True).start()
        threading.Thread(target=self.take_messages, daemon=True).start()

    def close(self, seconds: float) -> None:
        """Give answers some seconds to be sent, then kill the commands that run."""
        self.agent.approval.mode = "never"  # no command begins from now on
        self.remote_approval.mode = "never"
        self.outbox.close(seconds)
        for thing in list(self.waiting_for.values()):
            if isinstance(thing, subprocess.Popen) and thing.returncode is None:
                kill_command(thing)

    # A message from the inbox

    def take_messages(self) -> None:
        """Take one message after the other from the inbox. Runs in a thread."""
        while True:
            try:
                self.dispatch(self.inbox.take())
            except Exception as error:  # such as a full disk
                self.terminal.log(explain(error))
                time.sleep(1)

    def dispatch(self, message: InboundMessage) -> None:
        """Send a message on its way: until s10, it is answered before the next one."""
        self.process(message)

    def process(self, message: InboundMessage) -> None:
        """Answer a message. If the disk fails, the message waits for a restart."""
        channel = self.channels.get((message.channel, message.account))
        if channel is None or not channel.allows(message):
            return  # it waits on disk for a restart with the old settings
        try:
            if self.finish_without_turn(message):
                return
            channel.log(f"{message.sender}: {message.context} {message.text}")
            with self.exclusive(message), channel.typing(message.peer):
                answer = self.run_turn(message)
            self.reply(message, answer)
        except Exception as error:  # such as a full disk
            channel.log(f"not answered: {explain(error)}")

    def finish_without_turn(self, message: InboundMessage) -> bool:
        """Do what needs no model. Returns whether that was all."""
        if message.answer is None:
            return False
        self.outbox.put(message, message.answer)  # the program ended before it was sent
        return True

    @contextmanager
    def exclusive(self, message: InboundMessage) -> Iterator[None]:
        """Hold what a turn needs for itself: until s10, turns run one at a time.

        The second lock makes it fair. Whoever waits for a turn holds it, so a thread
        that has just had a turn cannot get the next one before.
        """
        with self.next_turn_lock:
            self.turn_lock.acquire()
        try:
            yield
        finally:
            self.turn_lock.release()

    def reply(self, message: InboundMessage, answer: str) -> None:
        """Send an answer to where the message came from."""
        channel = self.channels[message.channel, message.account]
        self.outbox.put(message, answer)
        channel.log(f"to {message.sender}: {answer}")

    # A turn, also of the terminal

    def run_turn(self, message: InboundMessage) -> str:
        """Answer a message in its session. Returns the answer, or why there is none."""
        agent = self.agent_for(message)
        notes = []

        def show(text: str, kind: str = "answer") -> None:
            if kind == "note":
                notes.append(text)
            self.show_piece(agent, message, text, kind)

        agent.show = show  # self.agent, the original, still shows at the terminal
        self.begin_turn(agent, message)
        # Without an answer, the notes say why.
        answer = self.respond(agent, message) or "\n".join(notes)
        self.sessions[agent.session_key] = agent.messages  # /new replaces it
        self.waiting_for.pop(agent.session_key, None)
        self.end_turn(agent, message, answer)
        return answer

    def begin_turn(self, agent: Agent, message: InboundMessage) -> None:
        """Show others that a turn begins. Empty until s05."""

    def show_piece(
        self, agent: Agent, message: InboundMessage, text: str, kind: str
    ) -> None:
        """Show a piece of a turn's text as it arrives: at the terminal, its own."""
        if message.channel == self.terminal.name:
            self.agent.show(text, kind)

    def end_turn(self, agent: Agent, message: InboundMessage, answer: str) -> None:
        """Show others that a turn has ended. Empty until s05."""

    def respond(self, agent: Agent, message: InboundMessage) -> str | None:
        """The answer to a message: the model's, or what a command prints."""
        if message.text.startswith("/"):
            return run_remote_command(agent, message.text)
        turn = begun_turn(agent.messages, message.id)
        if turn:
            return resume_turn(agent, turn)
        extras = {"message_id": message.id, "received": message.received}
        return handle_message(agent, message.prompt(), extras=extras)

    def agent_for(self, message: InboundMessage) -> Agent:
        """A copy of the agent for one turn, in the session of the message."""
        key = self.session_key(message)
        agent = replace(self.agent, session_key=key, store=self.store_for(key))
        agent.messages = self.session_for(agent)
        agent.note_waiting = partial(self.note_waiting, key)
        if message.channel != self.terminal.name:
            agent.approval = self.remote_approval
        return agent

    def note_waiting(self, key: str, thing: object) -> None:
        """Note what a session's turn waits for: a command or the model's response."""
        self.waiting_for[key] = thing

    def session_for(self, agent: Agent) -> Session:
        """The session that an agent's session key means."""
        key = agent.session_key
        with self.session_lock:  # two objects for one log would not know of each other
            if key not in self.sessions:
                self.sessions[key] = agent.store.resume(key)
            return self.sessions[key]

    def session_key(self, message: InboundMessage) -> str:
        """Whose conversation a message belongs to: a person's, or a group's."""
        channel = message.channel
        if channel == "terminal":
            return "agent:main:main"
        # As OpenClaw writes it, the key of a group has no account. A second bot in the
        # same group needs one.
        if message.is_group and message.account == "default":
            return f"agent:main:{channel}:group:{message.peer}".lower()
        kind = "group" if message.is_group else "direct"
        return f"agent:main:{channel}:{message.account}:{kind}:{message.peer}".lower()

    def store_for(self, key: str) -> SessionStore:
        """Where the session of a key is kept."""
        return self.agent.store

    # The terminal

    def handle_line(self, line: str) -> None:
        """Answer a line that the person at the terminal has typed."""
        message = InboundMessage("terminal", "default", "", line, received=time.time())
        self.terminal.leave_prompt()
        try:
            if line.startswith("/"):
                self.run_command(message)
            else:
                print("agent> ", end="", flush=True)
                with self.exclusive(message):
                    self.run_turn(message)
                print()
        except KeyboardInterrupt:  # while somebody else had the turn
            print("[stopped]")
        except (OSError, sqlite3.Error) as error:
            print(f"[{explain(error)}]")
        self.terminal.show_prompt()

    def run_command(self, message: InboundMessage) -> None:
        """Run a command of the person at the terminal, and print what comes of it."""
        is_about_session = message.text.split()[0] in SESSION_COMMANDS
        lock = self.exclusive(message) if is_about_session else nullcontext()
        with lock:
            agent = self.agent_for(message)
            run_slash_command(agent, message.text)
            self.sessions[agent.session_key] = agent.messages


def begun_turn(messages: Session, message_id: str) -> list[dict]:
    """The last turn of a conversation if it answers this message, else nothing."""
    turn = []
    for entry in reversed(list(messages)):
        turn.insert(0, entry)
        if entry["role"] == "user":
            extras = entry.get("extras", {})
            return turn if extras.get("message_id") == message_id else []
    return []


def resume_turn(agent: Agent, turn: list[dict]) -> str | None:
    """Go on with a turn that was cut off when the program ended."""
    texts = []
    for entry in turn:
        if entry["role"] == "assistant" and entry["content"]:
            texts.append(entry["content"])
    try:
        if turn[-1]["role"] != "assistant":  # it has not come to its end
            texts.append(agent_turn(agent))
        return "\n\n".join(texts)
    except Exception as error:  # as in handle_message
        agent.show(explain(error), "note")
        return None


def run_remote_command(agent: Agent, line: str) -> str:
    """Run a command that has come from a channel. Returns what to answer."""
    name, _, argument = line.partition(" ")
    if name not in REMOTE_COMMANDS:  # such as /help, or /start, which Telegram sends
        entries = [COMMANDS[name] for name in REMOTE_COMMANDS]
        lines = [f"{entry.usage} - {entry.about}" for entry in entries]
        return "\n".join(["The commands here:", *lines])
    try:
        return COMMANDS[name].handler(agent, argument.strip())
    except Exception as error:  # the person has to know
        return f"[{error}]"


@command("/channels", "the channels, and whether they work")
def show_channels(agent: Agent, argument: str) -> str:
    channels = agent.app.channels.values()
    return "\n".join(f"{channel}: {channel.status}" for channel in channels)


def open_app(kind: type[App], agent: Agent) -> App:
    """The program with all that the settings ask for. Exits if that cannot work."""
    try:
        return kind(agent)
    except (OSError, sqlite3.Error) as error:
        folder = agent.workspace / ".state"
        sys.exit(
            f"{folder} cannot be used: {error}. Is the disk full? If not, move the"
            " folder away: then a new one is made"
        )


# Part 2: Telegram

LONG_TEXT = 4000  # characters; the apps split a text before it has 4,096
ALBUM_SECONDS = 0.5  # in which the next picture of an album comes
PASTE_SECONDS = 1.5  # in which the next part of a split text comes


class LoopThread:
    """A thread that runs asyncio code, for a library that is written with asyncio."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def submit(self, coroutine: Coroutine) -> Future:
        """Start a coroutine there. Any other thread may call this."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


class TelegramChannel(Channel):
    """A Telegram bot. It fetches updates by long polling."""

    name = "telegram"
    key_setting = "BOT_TOKEN"
    secret_setting = "BOT_TOKEN"

    def __init__(self, app: App, account: str) -> None:
        super().__init__(app, account)
        os.environ["PTB_TIMEDELTA"] = "1"  # retry_after as a timedelta, without warning
        import telegram.ext  # not above: it takes a while, and not everybody has a bot

        for logger in ("httpx", "telegram"):  # their lines contain the token
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        self.telegram = telegram
        self.loop = LoopThread()
        server = self.setting("BASE_URL", "https://api.telegram.org").rstrip("/")
        repair_no_proxy()
        self.bot = telegram.Bot(self.setting("BOT_TOKEN"), base_url=f"{server}/bot")

    def start(self) -> None:
        """Begin to fetch updates. Raises ChannelError."""
        self.loop.submit(self.start_polling()).result()

    async def start_polling(self) -> None:
        """Let the library's Updater fetch updates, and put them into the inbox."""
        try:
            await self.bot.initialize()
            self.mention = re.compile(rf"@{self.bot.username}\b", re.IGNORECASE)
            updater = self.telegram.ext.Updater(PollingBot(self), UpdateQueue(self))
            await updater.initialize()
            await updater.start_polling(
                timeout=25,  # seconds that Telegram waits for news before it answers
                allowed_updates=["message"],
                error_callback=lambda error: self.report(f"{error}; trying again"),
            )
            self.report(f"on, as @{self.bot.username}")
        except self.telegram.error.TelegramError as error:
            raise self.channel_error(error) from None

    def channel_error(self, error: Exception) -> ChannelError:
        """An error of Telegram's library as one that all channels have."""
        errors = self.telegram.error
        if isinstance(error, errors.RetryAfter):
            return ChannelError(error, retry_after=error.retry_after.total_seconds())
        is_permanent = isinstance(error, errors.BadRequest | errors.Forbidden)
        return ChannelError(str(error) or "no answer", is_permanent)

    def store_update(self, update: dict) -> None:
        """Put the message of an update into the inbox. Raises sqlite3.Error."""
        try:
            parsed = self.telegram.Update.de_json(update, self.bot)
            message = self.read_message(parsed.message)
        except Exception as error:  # the library does not say which
            self.log(f"an update cannot be understood: {error!r} in {update}")
            return
        if message:
            self.receive(message)

    def read_message(self, message: object) -> InboundMessage | None:
        """What a person has said to the bot. None if it is not for the bot."""
        if message is None or is_from_bot(message):
            return None
        text = message.text or message.caption or ""
        context = self.context_of(message)
        if not text and not context:
            return None  # such as: somebody has joined the group
        inbound = InboundMessage(
            channel=self.name,
            account=self.account,
            peer=str(message.chat.id),
            text=self.mention.sub("", text).strip(),
            received=time.time(),  # for find_beginning, below
            id=f"telegram:{self.bot.id}:{message.chat.id}:{message.message_id}",
            sender=name_of(message),
            is_group=message.chat.type != "private",
            context=context,
        )
        if message.is_topic_message:
            inbound.peer += f":topic:{message.message_thread_id}"
        elif message.chat.is_forum:
            inbound.peer += ":topic:1"  # the topic "General" has no number of its own
        if message.media_group_id:
            inbound.expects_more = ALBUM_SECONDS
        elif len(text) >= LONG_TEXT:
            inbound.expects_more = PASTE_SECONDS
        # The next part of a pasted text does not mention the bot again.
        is_for_bot = not inbound.is_group or self.is_called(message)
        if is_for_bot or self.app.inbox.find_beginning(inbound):
            return inbound
        return None

    def is_called(self, message: object) -> bool:
        """Whether a message in a group mentions the bot, or replies to it."""
        if self.mention.search(message.text or message.caption or ""):
            return True
        replied = message.reply_to_message
        if not replied or not replied.from_user or replied.forum_topic_created:
            return False  # each message of a topic "replies" to the topic's beginning
        return replied.from_user.id == self.bot.id

    def context_of(self, message: object) -> str:
        """What a message refers to and brings along, in lines for the model."""
        lines = []
        replied = message.reply_to_message
        if replied and not replied.forum_topic_created:
            text = replied.text or replied.caption or "something that is no text"
            lines.append(f"[in reply to {name_of(replied)}: {text[:1000]}]")
        if message.quote:
            lines.append(f"[about these words: {message.quote.text}]")
        if message.forward_origin:
            lines.append(f"[forwarded from {origin_name(message.forward_origin)}]")
        links = message.parse_entities(["text_link"])
        links |= message.parse_caption_entities(["text_link"])
        for entity, text in links.items():
            lines.append(f"[{text} links to {entity.url}]")
        lines.extend(describe_attachment(message))
        return "\n".join(lines)

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Send a text. Telegram has no keys: after a crash, a text may come twice."""
        chat, _, topic = peer.partition(":topic:")
        # "General" has the number 1 for "typing", and none for a text.
        thread = None if topic == "1" else topic or None
        sending = self.bot.send_message(
            chat, text, message_thread_id=thread, read_timeout=30
        )
        try:
            self.loop.submit(sending).result(60)
        except (self.telegram.error.TelegramError, TimeoutError) as error:
            raise self.channel_error(error) from None

    @contextmanager
    def typing(self, peer: str) -> Iterator[None]:
        """Show in a chat that an answer is being written."""
        task = self.loop.submit(self.keep_typing(peer))
        try:
            yield
        finally:
            task.cancel()

    async def keep_typing(self, peer: str) -> None:
        """Telegram shows it for five seconds, so say it every four."""
        chat, _, topic = peer.partition(":topic:")
        while True:
            with suppress(self.telegram.error.TelegramError):
                await self.bot.send_chat_action(
                    chat, "typing", message_thread_id=topic or None
                )
            await asyncio.sleep(4)


class UpdateQueue(asyncio.Queue):
    """Where the Updater puts the updates that it has fetched: into the inbox.

    It confirms updates to Telegram, which then forgets them, only after `put`.
    """

    def __init__(self, channel: TelegramChannel) -> None:
        super().__init__()
        self.channel = channel

    async def put(self, update: SimpleNamespace) -> None:
        """Store an update, and wait until that is possible."""
        while True:
            try:
                await asyncio.to_thread(self.channel.store_update, update.data)
                return
            except sqlite3.Error as error:
                self.channel.report(f"not stored: {error}; trying again")
                await asyncio.sleep(1)


class PollingBot:
    """What the Updater takes for the bot: it fetches updates without parsing them.

    The library would drop all updates that it has fetched if it could not parse one of
    them, and then fetch the same ones again, forever.
    """

    def __init__(self, channel: TelegramChannel) -> None:
        self.channel = channel
        self.initialize = channel.bot.initialize
        self.delete_webhook = channel.bot.delete_webhook

    async def get_updates(self, offset: int | None, timeout: int, **request) -> list:
        """Fetch the next updates. Raises TelegramError: the Updater tries again."""
        errors = self.channel.telegram.error
        try:
            # In lower case: for "getUpdates", the library has a method, and warns.
            found = await self.channel.bot.do_api_request(
                "getupdates",
                {"offset": offset or 0, "timeout": timeout, **request},
                read_timeout=timeout + 10,
            )
        except errors.EndPointNotFound:  # as the library takes a refused token here
            raise errors.NetworkError("the token is refused: see .env") from None
        self.channel.report(f"on, as @{self.channel.bot.username}")
        return [
            SimpleNamespace(update_id=data["update_id"], data=data) for data in found
        ]


def is_from_bot(message: object) -> bool:
    """Whether a bot has written a message. (An anonymous admin looks like one.)"""
    user = message.from_user
    return bool(user and user.is_bot and not message.sender_chat)


def name_of(message: object) -> str:
    """The name of who has written a message, as people see it."""
    if message.sender_chat:
        return message.sender_chat.title or "someone"
    return message.from_user.full_name if message.from_user else "someone"


def origin_name(origin: object) -> str:
    """Whom a forwarded message comes from: a person, a hidden person, or a channel."""
    if origin.type == "user":
        return origin.sender_user.full_name
    if origin.type == "hidden_user":
        return origin.sender_user_name
    chat = origin.chat if origin.type == "channel" else origin.sender_chat
    return chat.title or "a chat"


def describe_attachment(message: object) -> list[str]:
    """Lines about what a message has besides text."""
    if message.checklist:
        tasks = [f"- {task.text}" for task in message.checklist.tasks]
        return [f"[checklist: {message.checklist.title}]", *tasks]
    attachment = message.effective_attachment
    if not attachment:
        return []
    kind = type(attachment).__name__.lower()
    if isinstance(attachment, tuple):  # the sizes of a picture
        kind = "photo"
    return [f"[{kind}: you cannot see it]"]


def repair_no_proxy() -> None:
    """Leave out of NO_PROXY what httpx cannot read: brackets, and IPv6 networks."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = os.getenv(name, "").split(",")
        readable = [host.strip(" []") for host in hosts if "/" not in host]
        if name in os.environ:
            os.environ[name] = ",".join(readable)


CHANNELS.append(TelegramChannel)


# Part 3: Feishu

FEISHU_SERVERS = {
    "feishu": "https://open.feishu.cn",
    "lark": "https://open.larksuite.com",
}
TOKEN_PATH = "/open-apis/auth/v3/tenant_access_token/internal"
# Codes of Feishu's API: https://open.feishu.cn/document/server-docs/api-call-guide
BAD_TOKEN_CODES = {99991661, 99991663, 99991664, 99991668, 99991671, 99991677}
RATE_LIMIT_CODES = {99991400, 230020, 11232}
PERMANENT_CODES = {230001, 230002, 230006, 230013, 230022, 230025, 230034, 230053}
MAX_CONNECTIONS = 100
MAX_REQUEST_SECONDS = 10  # Feishu waits three
MAX_EVENT_AGE = 3600  # seconds


class FeishuChannel(Channel):
    """A Feishu or Lark app. Its messages come to a webhook, answers go to its API."""

    name = "feishu"
    key_setting = "APP_ID"
    secret_setting = "APP_SECRET"

    def __init__(self, app: App, account: str) -> None:
        super().__init__(app, account)
        import httpx  # not above: it takes a while, and not everybody needs it

        repair_no_proxy()
        domain = self.setting("DOMAIN", "feishu")
        server = FEISHU_SERVERS.get(domain, domain)
        self.http = httpx.Client(base_url=server, timeout=10)
        self.http_error = httpx.HTTPError
        self.api_token = ""  # proves to the API who we are, for about two hours
        self.api_token_end = 0.0  # when it has to be renewed, by time.monotonic()
        self.bot_id = ""

    def start(self) -> None:
        """Open the webhook. Raises ChannelError if a setting is missing or wrong."""
        for name in ("APP_SECRET", "VERIFICATION_TOKEN"):
            if not self.setting(name):
                raise ChannelError(f"its {name} is not set", is_permanent=True)
        self.bot_id = self.call("GET", "/open-apis/bot/v3/info")["bot"]["open_id"]
        port = parse_port(self.setting("PORT", "3000"))
        address = LoopThread().submit(WebhookServer(self).listen(port)).result()
        self.report(f"on, at {address}")

    # Sending

    def call(self, method: str, path: str, body: dict | None = None) -> dict:
        """Call the API, with a new token if the old one is refused.

        Raises ChannelError.
        """
        response, data = self.request(method, path, body)
        if data.get("code") in BAD_TOKEN_CODES:
            self.api_token_end = 0
            response, data = self.request(method, path, body)
        code = data.get("code")
        if code == 0:
            return data
        wait = 0
        if response.status_code == 429 or code in RATE_LIMIT_CODES:
            wait = float(response.headers.get("x-ogw-ratelimit-reset", 0))
        reason = f"{code} {data.get('msg')}"
        raise ChannelError(reason, code in PERMANENT_CODES, retry_after=wait)

    def request(self, method: str, path: str, body: dict | None) -> tuple:
        """One request to the API: its response, and the JSON object in that."""
        headers = {}
        if path != TOKEN_PATH:  # this request gets the token, and so it has none
            headers["Authorization"] = f"Bearer {self.valid_api_token()}"
        try:
            response = self.http.request(method, path, json=body, headers=headers)
            return response, RECORD.validate_json(response.content)
        except (self.http_error, ValueError) as error:
            raise ChannelError(f"{type(error).__name__}: {error}") from None

    def valid_api_token(self) -> str:
        """The token for the API, renewed ten minutes before its end."""
        if time.monotonic() > self.api_token_end:
            secret = self.setting("APP_SECRET")
            app = {"app_id": self.setting("APP_ID"), "app_secret": secret}
            data = self.call("POST", TOKEN_PATH, app)
            self.api_token = data["tenant_access_token"]
            self.api_token_end = time.monotonic() + data["expire"] - 600
        return self.api_token

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Send a text. One with the same key within an hour is sent only once."""
        kind = "open_id" if peer.startswith("ou_") else "chat_id"
        content = json.dumps({"text": text})
        message = {"receive_id": peer, "msg_type": "text", "content": content}
        if key:
            message["uuid"] = hashlib.sha256(key.encode()).hexdigest()[:40]
        path = f"/open-apis/im/v1/messages?receive_id_type={kind}"
        self.call("POST", path, message)

    # Receiving

    def handle_event(self, headers: HttpHeaders, body: bytes) -> tuple[int, dict]:
        """The answer to a POST request: an HTTP status and a JSON object."""
        try:
            event = self.verify_event(headers, body)
            if event.get("type") == "url_verification":
                return 200, {"challenge": event["challenge"]}
            message = self.read_event(event)
            if message:
                self.receive(message)
            return 200, {}
        except PermissionError as error:
            self.log_once(str(error), f"an event was refused: {error}")
            return 401, {}
        except sqlite3.Error as error:
            self.log(f"a message could not be stored: {error}")
            return 500, {}  # then Feishu brings it again
        except Exception as error:  # it is not as Feishu writes events
            kind = type(error).__name__
            self.log_once(kind, f"an event was refused, its form is wrong: {kind}")
            return 400, {}

    def verify_event(self, headers: HttpHeaders, body: bytes) -> dict:
        """The event in a request. Raises PermissionError unless Feishu has sent it."""
        event = RECORD.validate_json(body)
        secret = self.setting("ENCRYPT_KEY")
        if ("encrypt" in event) != bool(secret):
            raise PermissionError("ENCRYPT_KEY must be as in the app: a key, or none")
        if secret:
            event = RECORD.validate_json(decrypt(secret, event["encrypt"]))
        # Feishu asks whether this is our server, and does not sign that.
        if event.get("type") == "url_verification":
            token = event["token"]
        else:
            token = event["header"]["token"]
            if secret:
                check_signature(headers, body, secret)
        if not hmac.compare_digest(token, self.setting("VERIFICATION_TOKEN")):
            raise PermissionError("its token is not VERIFICATION_TOKEN")
        return event

    def read_event(self, event: dict) -> InboundMessage | None:
        """What a person has said to the bot. None if it is something else."""
        if event["header"]["event_type"] != "im.message.receive_v1":
            return None
        message = event["event"]["message"]
        sender = event["event"]["sender"]
        is_group = message["chat_type"] != "p2p"
        mentions = message.get("mentions") or []
        mentioned = [mention["id"].get("open_id") for mention in mentions]
        is_called = self.bot_id in mentioned or not is_group
        if sender["sender_type"] != "user" or not is_called:
            return None
        content = RECORD.validate_json(message["content"])
        text = read_content(message["message_type"], content)
        for mention in reversed(mentions):  # @_user_11 before @_user_1
            is_bot = mention["id"].get("open_id") == self.bot_id
            name = "" if is_bot else f"@{mention['name']}"
            text = text.replace(mention["key"], name)
        person = sender["sender_id"]["open_id"]
        return InboundMessage(
            channel=self.name,
            account=self.account,
            peer=message["chat_id"] if is_group else person,
            text=text.strip(),
            id=f"feishu:{self.setting('APP_ID')}:{message['message_id']}",
            sender=person,
            is_group=is_group,
            guild=event["header"].get("tenant_key", ""),
        )


def parse_port(text: str) -> int:
    """The number of a port. Raises ValueError if it is none."""
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text} is not the number of a port")
    return int(text)


def decrypt(secret: str, text: str) -> bytes:
    """What Feishu has encrypted with AES-256-CBC. Raises ValueError if it cannot be."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers import algorithms
    from cryptography.hazmat.primitives.ciphers import modes
    from cryptography.hazmat.primitives.padding import PKCS7

    data = base64.b64decode(text)
    key = hashlib.sha256(secret.encode()).digest()
    decryptor = Cipher(algorithms.AES(key), modes.CBC(data[:16])).decryptor()
    padded = decryptor.update(data[16:]) + decryptor.finalize()
    unpadder = PKCS7(128).unpadder()
    return unpadder.update(padded) + unpadder.finalize()


def check_signature(headers: HttpHeaders, body: bytes, secret: str) -> None:
    """Raise PermissionError unless Feishu has signed a request within the last hour."""
    timestamp = headers.get("X-Lark-Request-Timestamp", "")
    nonce = headers.get("X-Lark-Request-Nonce", "")
    signed = f"{timestamp}{nonce}{secret}".encode() + body
    signature = hashlib.sha256(signed).hexdigest()
    if not hmac.compare_digest(signature, headers.get("X-Lark-Signature", "")):
        raise PermissionError("its signature is wrong")
    if abs(time.time() - float(timestamp)) > MAX_EVENT_AGE:
        raise PermissionError("it is over an hour old, or this clock is wrong")


def read_content(kind: str, content: dict) -> str:
    """The text of a message: of a text or a post, or a word about what else it is."""
    if kind == "text":
        return content["text"]
    if kind != "post":
        return describe_file(kind, content)
    if "content" not in content:  # one post for each language, as {"zh_cn": {...}}
        content = next(iter(content.values()))
    lines = [content.get("title") or ""]
    for elements in content["content"]:
        lines.append("".join(read_element(element) for element in elements))
    return "\n".join(lines).strip()


def read_element(element: dict) -> str:
    """The text of a part of a post: text, a link, a mention, a picture, a file, ..."""
    match element:
        case {"tag": "a", "text": str(text), "href": str(url)}:
            return f"{text} ({url})"
        case {"text": str(text)}:
            return text
        case {"tag": "at", "user_id": str(person)}:
            return person  # such as @_user_1
        case {"tag": "emotion", "emoji_type": str(name)}:
            return f":{name}:"
    return describe_file(element.get("tag"), element)


def describe_file(kind: str, content: dict) -> str:
    """A line about something that is no text."""
    name = content.get("file_name", "")
    return f"[{kind} {name}".strip() + ": you cannot see it]"


class WebhookServer:
    """Answers Feishu's POST requests: a hundred at a time, ten seconds for each."""

    def __init__(self, channel: FeishuChannel) -> None:
        self.channel = channel
        self.connections = {}  # open ones, the oldest first

    async def listen(self, port: int) -> str:
        """Open a port. Returns the webhook's address. Raises OSError if it is taken."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", port)
        port = server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/feishu/events"

    async def serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Answer one request, and close its connection."""
        self.connections[writer] = None
        if len(self.connections) > MAX_CONNECTIONS:
            oldest = next(iter(self.connections))
            del self.connections[oldest]
            oldest.transport.abort()
        try:
            async with asyncio.timeout(MAX_REQUEST_SECONDS):
                status, answer = await self.handle_request(reader)
                body = json.dumps(answer)
                writer.write(
                    f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                    f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                    f"Connection: close\r\n\r\n{body}".encode()
                )
                await writer.drain()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # too slow (TimeoutError is an OSError), too long, or gone
        finally:
            self.connections.pop(writer, None)
            writer.close()

    async def handle_request(self, reader: StreamReader) -> tuple[int, dict]:
        """Read a request. Returns the HTTP status and the JSON object for it."""
        head = await reader.readuntil(b"\r\n\r\n")
        request_line, _, lines = head.decode("latin-1").partition("\r\n")
        if not re.match(r"POST /feishu/events[ ?]", request_line):
            self.channel.log_once("path", f"this is not for Feishu: {request_line}")
            return 404, {}
        headers = message_from_string(lines)
        length = headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,6}", length):  # no event has a million bytes
            self.channel.log_once("length", f"a request was refused, length {length}")
            return 413, {}
        body = await reader.readexactly(int(length))
        return await asyncio.to_thread(self.channel.handle_event, headers, body)


CHANNELS.append(FeishuChannel)


# --- s05: gateway and routing ---

# Which agent answers, and in which session

MAIN = "main"  # the agent that answers if no binding says otherwise
DM_SCOPES = Literal["main", "per-peer", "per-channel-peer", "per-account-channel-peer"]
# For the owner to edit, in lower case. (CRON.json comes in s07.)
CONFIG_FILES = ("agents.json", "bindings.json", "cron.json")


class Binding(BaseModel, extra="forbid", frozen=True):
    """Sends messages to an agent: those that all fields which are set fit."""

    agent: str
    channel: str = ""
    account: str = ""
    peer: str = ""
    guild: str = ""
    priority: int = 0  # between bindings of one tier, the highest wins

    def match_key(self) -> tuple:
        """The fields that a message must have."""
        return self.channel, self.account, self.peer, self.guild

    def tier(self) -> str:
        """How narrow it is: peer, guild, account, channel, or default."""
        for name in ("peer", "guild", "account", "channel"):
            if getattr(self, name):
                return name
        return "default"

    def rank(self) -> tuple:
        """What decides within a tier: the priority, then how narrow it is."""
        fields_set = [field for field in self.match_key() if field]
        return self.priority, ":topic:" in self.peer, len(fields_set)


def tier_of(binding: Binding | None) -> str:
    """The tier of what has decided about a message: a binding, or none."""
    return binding.tier() if binding else "default"


class BindingTable:
    """The bindings of bindings.json, and which of them a message has."""

    def __init__(self, file: Path, agent_ids: Container[str]) -> None:
        self.file = file
        self.agent_ids = agent_ids
        self.lock = threading.Lock()
        self.entries = []
        self.unusable = []  # entries that are kept in the file as they are
        self.best = {}  # match key: the binding with the highest priority
        try:
            for problem in self.load():
                print(f"[{problem}]")
        except ValueError as error:
            print(f"[{error}]")

    def load(self) -> list[str]:
        """Read and use the file. Returns what is wrong with entries that are left out.

        Raises ValueError if the file as a whole cannot be used.
        """
        bindings = []
        unusable = []
        problems = []
        for position, entry in enumerate(load_config(self.file, list), 1):
            try:
                binding = Binding.model_validate(entry)
                self.check(binding)
                bindings.append(binding)
            except ValueError as error:
                unusable.append(entry)
                reason = short_reason(error)
                problems.append(f"bindings.json, entry {position}: {reason}")
        self.unusable = unusable
        self.use(bindings)
        return problems

    def check(self, binding: Binding) -> None:
        """Raise ValueError if a binding could never apply."""
        if binding.agent not in self.agent_ids:
            raise ValueError(f"there is no agent {binding.agent}")
        if binding.tier() != "default" and not binding.channel:
            raise ValueError(f"a binding by {binding.tier()} needs a channel")

    def use(self, bindings: list[Binding]) -> None:
        """Take these bindings from now on."""
        best = {}
        for binding in sorted(bindings, key=Binding.rank):
            best[binding.match_key()] = binding  # the last one, so the highest
        self.entries = bindings
        self.best = best  # replaced as a whole, as other threads look things up

    def resolve(self, message: InboundMessage) -> Binding | None:
        """The binding for a message: of the first tier that has one, the best.

        This takes the same few look-ups however many bindings there are.
        """
        for keys in tier_keys(message):
            found = [self.best[key] for key in keys if key in self.best]
            if found:
                return max(found, key=Binding.rank)
        return None

    def set(self, binding: Binding) -> None:
        """Add a binding, or replace the one with the same fields and priority."""
        self.check(binding)
        with self.lock:
            self.load()  # the owner may have edited the file
            self.save([*self.others(binding), binding])

    def remove(self, binding: Binding) -> None:
        """Remove the binding with the same fields and priority, whatever its agent.

        Raises ValueError if there is none.
        """
        with self.lock:
            self.load()
            others = self.others(binding)
            if len(others) == len(self.entries):
                raise ValueError("there is no such binding")
            self.save(others)

    def others(self, binding: Binding) -> list[Binding]:
        """All bindings but the one that this one replaces."""
        place = (binding.match_key(), binding.priority)
        return [b for b in self.entries if (b.match_key(), b.priority) != place]

    def save(self, bindings: list[Binding]) -> None:
        """Write the file as a whole, then use what is in it."""
        entries = [binding.model_dump(exclude_defaults=True) for binding in bindings]
        text = json.dumps([*entries, *self.unusable], indent=2, ensure_ascii=False)
        replace_file(self.file, text + "\n")
        self.use(bindings)


def tier_keys(message: InboundMessage) -> list[list]:
    """For each tier, the narrowest first: the match keys that fit a message."""
    channel = message.channel
    by_peer = []
    by_guild = []
    for account in (message.account, ""):
        by_guild.append((channel, account, "", message.guild))
        for guild in (message.guild, ""):
            # A binding of a chat holds for the topics in it, too.
            for peer in (message.peer, without_topic(message.peer)):
                by_peer.append((channel, account, peer, guild))
    return [
        by_peer if message.peer else [],
        by_guild if message.guild else [],
        [(channel, message.account, "", "")],
        [(channel, "", "", "")],
        [("", "", "", "")],
    ]


class AgentConfig(BaseModel, extra="forbid"):
    """One of the agents: who it is, and which model it uses."""

    prompt: str = ""
    model: str = ""  # empty: MODEL_ID
    dm_scope: DM_SCOPES = "per-account-channel-peer"  # which chats share a session


class AgentManager:
    """The agents: main, two examples, and those of agents.json."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.configs = {
            MAIN: AgentConfig(),
            "luna": AgentConfig(prompt="You are Luna: warm, and brief."),
            "sage": AgentConfig(prompt="You are Sage. You explain, and name doubts."),
        }
        try:
            entries = load_config(workspace / "agents.json", dict)
        except ValueError as error:
            print(f"[{error}]")
            return
        for name, entry in entries.items():
            try:
                if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", name):
                    raise ValueError("a name has letters a-z, digits, - and _")
                self.configs[name] = AgentConfig.model_validate(entry)
            except ValueError as error:
                print(f"[agents.json, {name}: {short_reason(error)}]")

    def session_store(self, agent_id: str) -> SessionStore:
        """Where the sessions of an agent are kept."""
        return SessionStore(self.workspace / ".sessions" / "agents" / agent_id)


def load_config(file: Path, kind: type) -> list | dict:
    """The list or dict in a JSON file of the owner, an empty one if there is no file.

    Raises ValueError if the file cannot be read, or holds something else.
    """
    if not file.exists():
        return kind()
    try:
        value = from_json(load_text(file).removeprefix("\ufeff"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be used: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{file.name} cannot be used: it must be like {kind()}")
    return value


def short_reason(error: ValueError) -> str:
    """The first thing that is wrong, in one line: pydantic's own text has many."""
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def build_session_key(agent_id: str, message: InboundMessage, dm_scope: str) -> str:
    """The key of the session that a message belongs to, in OpenClaw's form.

    A group has a session of its own; `dm_scope` says which direct chats share one.
    """
    channel = message.channel
    account = message.account
    peer = message.peer
    if message.is_group:
        # Only the key of a second bot names the account, as in s04.
        platform = f"{channel}:{account}".removesuffix(":default")
        rest = f"{platform}:group:{peer}"
    elif channel == "terminal" or dm_scope == "main":
        rest = "main"
    elif dm_scope == "per-peer":
        rest = f"direct:{peer}"
    elif dm_scope == "per-channel-peer":
        rest = f"{channel}:direct:{peer}"
    else:
        rest = f"{channel}:{account}:direct:{peer}"
    return f"agent:{agent_id}:{rest}".lower()


def check_config(
    older_check: Callable, agent: Agent, file: Path, is_write: bool
) -> None:
    """Raise ValueError if a file is off limits. Configuration may only be read."""
    older_check(agent, file, is_write)  # so the file is below the workspace
    name = file.relative_to(agent.workspace).parts[0]
    if is_write and name.lower() in CONFIG_FILES:
        raise ValueError(f"only the owner may change {name}")


# The gateway: a web page, and JSON-RPC 2.0 over a WebSocket

MAX_FRAME = 1 << 20  # characters
MAX_UNSENT = 4 << 20  # bytes that wait for a client that does not read
MAX_OPENING = 100  # connections that have not shown the token yet
CONTENT_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# The page may load what the gateway serves, and connect to it, and nothing else.
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " img-src 'self' data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PEER = "[a-z0-9][a-z0-9_.-]{0,63}"
RPC_METHODS = {}


class RpcError(Exception):
    """What a client is told. The codes are those of JSON-RPC 2.0."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class RpcRequest(BaseModel, strict=True):
    """A request, or a notification if it has no id."""

    jsonrpc: Literal["2.0"]
    method: str
    params: dict | list = {}
    id: int | str | None = None


def rpc_method(name: str) -> Callable:
    """Register a method of the gateway. Its parameters are checked by their types."""

    def register(handler: Callable) -> Callable:
        check = pydantic.validate_call(config={"arbitrary_types_allowed": True})
        RPC_METHODS[name] = check(handler)
        return handler

    return register


class GatewayConnection(ServerConnection):
    """A connection. If too many are open without the token, the oldest is dropped."""

    opening = {}  # of all connections: those without the token, the oldest first
    peer = ""  # the name that the client has given itself

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected, and has said nothing yet."""
        super().connection_made(transport)
        self.opening[self] = None
        if len(self.opening) > MAX_OPENING:
            oldest = next(iter(self.opening))
            del self.opening[oldest]
            oldest.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self.opening.pop(self, None)
        super().connection_lost(error)


class GatewayServer(Channel):
    """The channel of web clients: they send requests, and get events."""

    name = "web"

    def __init__(self, app: "GatewayApp") -> None:
        super().__init__(app)
        self.loop = LoopThread()
        self.clients = set()
        self.watchers = {}  # session key: the clients that get its events
        self.running = {}  # session key: the id of the message being answered
        self.token = ""
        self.link = ""
        self.is_ready = threading.Event()  # it is on, or off for good
        self.started = time.monotonic()

    def start(self) -> None:
        """Open the port, and print the link with the token."""
        try:
            logging.getLogger("websockets").setLevel(logging.CRITICAL + 1)
            self.token = os.getenv("GATEWAY_TOKEN") or self.load_token()
            port = parse_port(os.getenv("GATEWAY_PORT") or "8765")
            address = self.loop.submit(self.listen(port)).result()
            self.link = f"{address}/#token={quote(self.token)}"
            self.report(f"on, at {address}")
            self.app.terminal.send("", f"web chat: {self.link}")
        finally:
            self.is_ready.set()

    def load_token(self) -> str:
        """A token that stays the same, so that a link is good after a restart."""
        file = self.app.agent.workspace / ".state" / "gateway-token"
        file.touch(0o600)
        if not file.read_text("utf-8").strip():
            file.write_text(secrets.token_hex(16), "utf-8")
        return file.read_text("utf-8").strip()

    async def listen(self, port: int) -> str:
        """Open the port. Returns the address. Raises OSError if it is taken."""
        server = await serve(
            self.serve_client,
            "127.0.0.1",
            port,
            process_request=self.answer_http,
            create_connection=GatewayConnection,
            max_size=4 * MAX_FRAME,  # bytes; more than that ends the connection
            compression=None,  # both ends are on this machine
            close_timeout=1,
        )
        port = server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def allows(self, message: InboundMessage) -> bool:
        """Whoever has the token may talk to the agent."""
        return True

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Nothing: the answer is an event, and in the history."""

    # HTTP: the page, and who may open a WebSocket

    def answer_http(
        self, client: GatewayConnection, request: Request
    ) -> Response | None:
        """The answer to a request. None lets it become a WebSocket."""
        path, _, query = request.path.partition("?")
        host = request.headers.get("Host", "")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):
            return http_response(403, b"use 127.0.0.1 or localhost\n")
        if path == "/healthz":
            return http_response(200, b"ok\n")
        if path != "/ws":
            return serve_file(path)
        # A tunnel may turn http into https.
        origin = request.headers.get("Origin")
        if origin not in (None, f"http://{host}", f"https://{host}"):
            return http_response(403, b"this page may not connect\n")
        token = parse_qs(query).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return http_response(401, b"wrong token: use the link at the terminal\n")
        return None

    # JSON-RPC

    async def serve_client(self, client: GatewayConnection) -> None:
        """Answer the requests of one client, one after the other, until it leaves."""
        client.opening.pop(client, None)
        client.peer = f"guest-{secrets.token_hex(6)}"
        self.clients.add(client)
        try:
            async for frame in client:
                answer = await self.answer_frame(client, frame)
                if answer:
                    await client.send(json.dumps(answer))
        except ConnectionClosed:
            pass
        finally:
            self.clients.discard(client)
            for key, watchers in list(self.watchers.items()):
                watchers.discard(client)
                if not watchers:
                    del self.watchers[key]

    async def answer_frame(self, client: GatewayConnection, frame: str) -> dict | None:
        """The answer to a frame, as JSON-RPC 2.0 wants it. None for a notification."""
        request_id = None
        is_notification = False
        try:
            data = parse_frame(frame)
            request_id = valid_id(data)
            request = parse_request(data)
            is_notification = "id" not in request.model_fields_set
            answer = {"result": await self.call_method(client, request)}
        except RpcError as error:
            answer = {"error": {"code": error.code, "message": str(error)}}
        if is_notification:
            return None
        return {"jsonrpc": "2.0", **answer, "id": request_id}

    async def call_method(
        self, client: GatewayConnection, request: RpcRequest
    ) -> object:
        """Run the method of a request. Raises RpcError."""
        method = RPC_METHODS.get(request.method)
        if not method:
            raise RpcError(-32601, f"there is no method {request.method[:100]}")
        try:
            if isinstance(request.params, dict):
                # A client cannot say who it is: what stands on the right wins.
                given = request.params | {"gateway": self, "client": client}
                return await method(**given)
            return await method(*request.params, gateway=self, client=client)
        except RpcError:
            raise
        except ValueError as error:  # pydantic's errors are ValueErrors, too
            raise RpcError(-32602, short_reason(error)) from None
        except Exception as error:  # what it is, is for the owner alone
            self.log(f"{request.method} failed: {explain(error)}")
            raise RpcError(-32603, "Internal error") from None

    # Events

    def watch(self, client: GatewayConnection, key: str) -> None:
        """Send the events of a session to a client from now on."""
        self.watchers.setdefault(key, set()).add(client)

    def publish(self, key: str, event: str, **params: object) -> None:
        """Send an event to those who watch a session. May be called in any thread."""
        params = {"session": key, **params}
        frame = json.dumps({"jsonrpc": "2.0", "method": event, "params": params})
        self.loop.loop.call_soon_threadsafe(self.send_event, key, frame)

    def send_event(self, key: str, frame: str) -> None:
        """Send an event to its clients. Drop a client that does not read them."""
        watchers = self.watchers.get(key, set())
        for client in list(watchers):
            if client.transport.get_write_buffer_size() > MAX_UNSENT:
                client.transport.abort()
                watchers.discard(client)
        broadcast(watchers, frame)

    def note_running(self, key: str, message: InboundMessage) -> None:
        """Note which message is being answered. Its sender watches from now on."""
        self.running[key] = message.id
        # Since it was sent, a binding may have led it to another session.
        for client in self.clients:
            if (self.name, client.peer) == (message.channel, message.peer):
                self.watch(client, key)

    def note_ended(self, key: str) -> None:
        """Note that it is answered."""
        self.running.pop(key, None)

    def rename(self, client: GatewayConnection, peer: str) -> None:
        """Note the name that a client gives itself, if it gives one."""
        if peer and not re.fullmatch(PEER, peer):
            raise ValueError(f"peer: must be {PEER}")
        client.peer = peer or client.peer

    def message_from(self, client: GatewayConnection) -> InboundMessage:
        """A message of a client, still without a text."""
        return InboundMessage(self.name, "default", client.peer, "", sender=client.peer)


def parse_frame(frame: str | bytes) -> object:
    """The JSON value in a frame. Raises RpcError."""
    if len(frame) > MAX_FRAME:
        raise RpcError(-32600, f"a frame may have {MAX_FRAME:,} characters")
    try:
        return from_json(frame, allow_inf_nan=False)
    except ValueError:
        raise RpcError(-32700, "Parse error") from None


def valid_id(data: object) -> object:
    """The id of a request, even of one that is wrong otherwise; None if it has none."""
    value = data.get("id") if isinstance(data, dict) else None
    is_valid = isinstance(value, int | str) and not isinstance(value, bool)
    return value if is_valid else None


def parse_request(data: object) -> RpcRequest:
    """The request in a frame. Raises RpcError."""
    if isinstance(data, list):
        raise RpcError(-32600, "Invalid Request: batches are not supported")
    try:
        return RpcRequest.model_validate(data)
    except ValueError as error:
        raise RpcError(-32600, f"Invalid Request: {short_reason(error)}") from None


def http_response(
    status: int, body: bytes, content_type: str = "text/plain"
) -> Response:
    """An HTTP response."""
    headers = Headers(SECURITY_HEADERS)
    headers["Content-Type"] = f"{content_type}; charset=utf-8"
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    return Response(status, HTTPStatus(status).phrase, headers, body)


def serve_file(path: str) -> Response:
    """A file of the web chat, as an HTTP response."""
    folder = find_webchat()
    file = folder / (path.removeprefix("/") or "index.html")
    # Whatever the path is, only what is in the folder itself is found.
    if file not in folder.iterdir() or file.suffix not in CONTENT_TYPES:
        return http_response(404, b"not found\n")
    return http_response(200, file.read_bytes(), CONTENT_TYPES[file.suffix])


def find_webchat() -> Path:
    """The folder of the page: sessions/webchat, in a folder above this script."""
    for folder in Path(__file__).resolve().parents:
        webchat = folder / "sessions" / "webchat"
        if webchat.is_dir():
            return webchat
    raise FileNotFoundError("sessions/webchat")


# What clients may ask for


@rpc_method("send")
async def rpc_send(
    text: str,
    peer: str = "",
    id: str = "",
    *,
    gateway: GatewayServer,
    client: GatewayConnection,
) -> dict:
    """Take a message; with an id, only once. Its answer comes as events."""
    gateway.rename(client, peer)
    id = id or secrets.token_hex(8)
    if not text.strip() or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", id):
        raise ValueError("text must not be empty; id has letters, digits, - and _")
    message = gateway.message_from(client)
    message.text = text
    message.id = f"web:{client.peer}:{id}"
    binding = gateway.app.bindings.resolve(message)
    key = gateway.app.session_key(message)
    gateway.watch(client, key)  # before the turn can begin
    if not await asyncio.to_thread(gateway.receive, message):
        raise RpcError(-32000, "too many messages wait: try again later")
    return {"id": message.id, "session": key, "matched_by": tier_of(binding)}


@rpc_method("sessions.history")
async def rpc_history(
    session: str = "",
    peer: str = "",
    limit: int = 200,
    *,
    gateway: GatewayServer,
    client: GatewayConnection,
) -> dict:
    """What was said in a session, or in the client's own. Its events follow."""
    app = gateway.app
    gateway.rename(client, peer)
    key = session or app.session_key(gateway.message_from(client))
    if agent_of(key) not in app.agents.configs:
        raise ValueError(f"session: there is no agent {agent_of(key)}")
    gateway.watch(client, key)
    unanswered = await asyncio.to_thread(app.unanswered)
    found = await asyncio.to_thread(app.find_session, key)
    messages = []
    if found is not None:
        messages = transcript(found)
    known = [message["id"] for message in messages]
    waiting = []  # what is not in the session yet
    for each in unanswered:
        if app.session_key(each) == key and each.id not in known:
            waiting.append({"id": each.id, "text": each.text})
    return {
        "session": key,
        "agent": agent_of(key),
        "id": found.path.stem if found is not None else "",
        "label": found.label if found is not None else "",
        "messages": messages[-max(limit, 1) :],
        "running": gateway.running.get(key),
        "waiting": waiting,
    }


def transcript(messages: Session) -> list[dict]:
    """A conversation as a web page shows it."""
    entries = []
    for message in messages:
        extras = message.get("extras", {})
        entry = {"role": message["role"], "text": message["content"]}
        entry["id"] = extras.get("message_id")
        entry["time"] = extras.get("received")
        entry["calls"] = [call["function"] for call in message.get("tool_calls", [])]
        entries.append(entry)
    return entries


@rpc_method("sessions.list")
async def rpc_sessions(*, gateway: GatewayServer, client: GatewayConnection) -> list:
    """What each session key means now, for all agents."""
    return await asyncio.to_thread(list_all_sessions, gateway.app.agents)


def list_all_sessions(agents: AgentManager) -> list[dict]:
    """The current session of each key."""
    entries = []
    for agent_id in agents.configs:
        store = agents.session_store(agent_id)
        for key, session_id in store.read_index().items():
            path = store.folder / f"{session_id}.jsonl"
            if path.is_file():
                entry = {"session": key, "agent": agent_id, "id": session_id}
                entry["label"] = read_header(path).get("label", "")
                entry["used"] = path.stat().st_mtime
                entries.append(entry)
    return entries


@rpc_method("agents.list")
async def rpc_agents(*, gateway: GatewayServer, client: GatewayConnection) -> list:
    """The agents."""
    configs = gateway.app.agents.configs
    return [{"id": name, **configs[name].model_dump()} for name in configs]


@rpc_method("bindings.list")
async def rpc_bindings(*, gateway: GatewayServer, client: GatewayConnection) -> list:
    """The bindings, with their tiers."""
    bindings = gateway.app.bindings.entries
    return [{**each.model_dump(), "tier": each.tier()} for each in bindings]


@rpc_method("bindings.set")
async def rpc_set_binding(
    binding: Binding, *, gateway: GatewayServer, client: GatewayConnection
) -> dict:
    """Add a binding, or replace the one with the same fields and priority."""
    await asyncio.to_thread(gateway.app.bindings.set, binding)
    return binding.model_dump()


@rpc_method("bindings.remove")
async def rpc_remove_binding(
    binding: Binding, *, gateway: GatewayServer, client: GatewayConnection
) -> dict:
    """Remove the binding with the same fields and priority."""
    await asyncio.to_thread(gateway.app.bindings.remove, binding)
    return binding.model_dump()


@rpc_method("commands.list")
async def rpc_commands(*, gateway: GatewayServer, client: GatewayConnection) -> list:
    """The commands that a client may send as a text."""
    entries = [COMMANDS[name] for name in REMOTE_COMMANDS]
    return [{"usage": entry.usage, "about": entry.about} for entry in entries]


@rpc_method("status")
async def rpc_status(*, gateway: GatewayServer, client: GatewayConnection) -> dict:
    """How the program is."""
    return {
        "uptime": round(time.monotonic() - gateway.started),
        "clients": len(gateway.clients),
        "waiting": len(gateway.app.inbox.waiting),
        "channels": {str(c): c.status for c in gateway.app.channels.values()},
    }


class GatewayApp(App):
    """Sends each message to the agent of its binding, and serves web clients."""

    def __init__(self, agent: Agent) -> None:
        super().__init__(agent)
        agent.check_path = partial(check_config, agent.check_path)
        self.agents = AgentManager(agent.workspace)
        self.bindings = BindingTable(
            agent.workspace / "bindings.json", self.agents.configs
        )
        self.terminal_agent_id = ""  # see /agent
        self.gateway = GatewayServer(self)
        self.channels["web", "default"] = self.gateway

    def start(self) -> None:
        """Start everything, and wait until the link to the web chat is known."""
        super().start()
        self.gateway.is_ready.wait(5)

    def route(self, message: InboundMessage) -> str:
        """The id of the agent that a message goes to."""
        if message.channel == "terminal" and self.terminal_agent_id:
            return self.terminal_agent_id
        binding = self.bindings.resolve(message)
        return binding.agent if binding else MAIN

    def session_key(self, message: InboundMessage) -> str:
        """The session of the agent that a message goes to."""
        agent_id = self.route(message)
        dm_scope = self.agents.configs[agent_id].dm_scope
        return build_session_key(agent_id, message, dm_scope)

    def store_for(self, key: str) -> SessionStore:
        """The sessions of the agent that a key names."""
        return self.agents.session_store(agent_of(key))

    def find_session(self, key: str) -> Session | None:
        """The session of a key, if there is one."""
        # To ask for a session that does not exist must not create it.
        if key in self.sessions or key in self.store_for(key).read_index():
            agent = replace(self.agent, session_key=key, store=self.store_for(key))
            return self.session_for(agent)
        return None

    def unanswered(self) -> list[InboundMessage]:
        """The messages in the inbox that have no answer yet."""
        rows = self.database.execute(
            "SELECT message FROM inbox WHERE done IS NULL AND answer IS NULL"
        )
        return [InboundMessage(**json.loads(record)) for (record,) in rows]

    def agent_for(self, message: InboundMessage) -> Agent:
        """The agent with the prompt and the model of its configuration."""
        agent = super().agent_for(message)
        config = self.agents.configs[agent_of(agent.session_key)]
        agent.system = config.prompt
        if config.model:
            agent.options = agent.options | {"model": config.model}
        return agent

    def begin_turn(self, agent: Agent, message: InboundMessage) -> None:
        """Tell web clients that a message is being answered."""
        super().begin_turn(agent, message)
        key = agent.session_key
        self.gateway.loop.loop.call_soon_threadsafe(
            self.gateway.note_running, key, message
        )
        self.gateway.publish(
            key,
            "turn.begin",
            id=message.id,
            text=message.prompt(),
            time=message.received,
        )

    def show_piece(
        self, agent: Agent, message: InboundMessage, text: str, kind: str
    ) -> None:
        """Send a piece of an answer, a note, a tool call or a result to web clients."""
        super().show_piece(agent, message, text, kind)
        if text:
            self.gateway.publish(agent.session_key, f"turn.{kind}", text=text)

    def end_turn(self, agent: Agent, message: InboundMessage, answer: str) -> None:
        """Tell web clients that a message is answered."""
        super().end_turn(agent, message, answer)
        if message.channel == "web":
            # First: who now asks for the history must not find it waiting.
            self.inbox.done(message)
        session_id = agent.messages.path.stem  # another one after /new
        key = agent.session_key
        self.gateway.loop.loop.call_soon_threadsafe(self.gateway.note_ended, key)
        self.gateway.publish(
            key, "turn.end", id=message.id, text=answer, session_id=session_id
        )

    def reply(self, message: InboundMessage, answer: str) -> None:
        """Send the answer. Web clients have it as an event, or in the history."""
        if message.channel == "web":
            self.gateway.log(f"to {message.sender}: {answer}")
        else:
            super().reply(message, answer)


def agent_of(key: str) -> str:
    """The id of the agent in a session key, which is agent:<id>:..."""
    _, _, rest = key.partition(":")
    return rest.partition(":")[0]


@command("/agents", "the agents")
def show_agents(agent: Agent, argument: str) -> str:
    lines = []
    for name, config in agent.app.agents.configs.items():
        mark = "*" if name == agent_of(agent.session_key) else " "
        lines.append(f"{mark} {name}  {config.model}".rstrip())
    return "\n".join(lines)


@command("/agent <id>|off", "talk to this agent here, whatever the bindings say")
def choose_agent(agent: Agent, agent_id: str) -> str:
    if agent_id == "off":
        agent_id = ""
    elif agent_id not in agent.app.agents.configs:
        raise ValueError(f"there is no agent {agent_id}: see /agents")
    agent.app.terminal_agent_id = agent_id
    return f"the terminal talks to {agent_id or 'the agent of its binding'}"


@command("/bindings", "which messages go to which agent")
def show_bindings(agent: Agent, argument: str) -> str:
    lines = []
    for binding in agent.app.bindings.entries:
        fields = binding.model_dump(exclude_defaults=True)
        lines.append(f"{binding.tier()}: {fields}")
    return "\n".join(lines) or "none: all messages go to main"


@command("/route <channel> <peer> [account] [guild]", "where a message would go")
def show_route(agent: Agent, argument: str) -> str:
    words = argument.split()
    if not 2 <= len(words) <= 4:
        raise ValueError("/route <channel> <peer> [account] [guild]")
    message = InboundMessage(words[0], "default", words[1], "")
    if len(words) > 2:
        message.account = words[2]
    if len(words) > 3:
        message.guild = words[3]
    # So the ids of groups begin in Telegram and in Feishu.
    message.is_group = message.peer.startswith(("-", "oc_"))
    tier = tier_of(agent.app.bindings.resolve(message))
    return f"{agent.app.session_key(message)} (tier: {tier})"


@command("/gateway", "the link to the web chat")
def show_gateway(agent: Agent, argument: str) -> str:
    gateway = agent.app.gateway
    return f"{gateway.link}\nclients: {len(gateway.clients)}"


REMOTE_COMMANDS += ["/agents"]


# --- main ---


def prepare_terminal() -> None:
    """Let arrow keys edit a line and recall older ones; survive bytes of no UTF-8."""
    with suppress(ImportError):  # Windows has no readline
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one line
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        signal.signal(
            getattr(signal, name, signal.SIGTERM),
            # The exit passes every `finally`, so that a running command is killed.
            lambda number, frame: sys.exit(128 + number),
        )


def talk(on_line: Callable) -> None:
    """Read line after line, and call `on_line` with each, until the person leaves."""
    while True:
        line = input("\nyou> ")
        if not sys.stdin.isatty():
            print(line)  # a pipe does not echo
        if line.strip() in ("quit", "exit", "/quit"):
            return
        if line.strip():
            on_line(line)


def main() -> None:
    """Build the agent, and let it talk with the person at the terminal."""
    prepare_terminal()
    agent = load_agent()
    title = __doc__.splitlines()[0]
    print(f"{title}\n{agent.options['model']} answers; quit leaves.")
    open_session(agent)
    print(f"{agent.messages}\n/help lists the commands.")
    open_app(GatewayApp, agent).run()


if __name__ == "__main__":
    main()
