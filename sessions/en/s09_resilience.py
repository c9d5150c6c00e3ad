# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "croniter>=7.0",
#   "cryptography>=50",
#   "httpx>=0.28",
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
#   "python-telegram-bot>=22.8",
#   "PyYAML>=6.0.3",
#   "websockets>=17.4",
# ]
# ///
"""s09: Resilience - when one call fails, rotate and retry.

    agent_turn --> ResilienceRunner.call: profile 1 --> ContextGuard.call --> call_model
       tools       classify_failure,      profile 2     room is made
                   cooldowns, retries     FALLBACK_MODELS

Run it with no key: python sessions/offline_model.py s09
"""

import asyncio
import base64
import hashlib
import heapq
import hmac
import inspect
import json
import logging
import math
import operator
import os
import platform
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import unicodedata
import weakref
import zlib
from array import array
from collections import Counter
from collections import deque
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Coroutine
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextlib import ExitStack
from contextlib import nullcontext
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from datetime import date
from datetime import datetime
from datetime import tzinfo
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from importlib import import_module
from itertools import accumulate
from itertools import chain
from itertools import count
from itertools import islice
from itertools import product
from pathlib import Path
from typing import NoReturn
from urllib.parse import parse_qs
from urllib.parse import quote
from zoneinfo import ZoneInfo

import openai
from dotenv import load_dotenv
from openai.types.chat import ChatCompletionChunk
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import broadcast
from websockets.asyncio.server import serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request
from websockets.http11 import Response

# --- s01: the agent loop ---

NO_MODEL = f"""OPENAI_API_KEY (no blanks in it) and MODEL_ID must be set: copy .env.example to .env.
Without a key: python sessions/offline_model.py {__doc__[:3]}"""  # this section's name
CHECK = {
    400: "if the conversation is too long, begin a new one",
    401: "check OPENAI_API_KEY",
    404: "check MODEL_ID, and OPENAI_BASE_URL (most end in /v1)",
}
NOTES = {
    "length": "the answer was cut at the length limit",
    "content_filter": "the provider's content filter stopped the answer",
    "tool_calls": "the model asked for a tool, and there is none to run",
}


TAG = "(?:think|thinking|thought|reasoning)"  # as models write it when no server takes it out
OPENING = re.compile(rf"\s*[<\[]{TAG}[>\]]", re.IGNORECASE)
CLOSING = re.compile(rf"[<\[]/{TAG}[>\]]", re.IGNORECASE)
UNCLEAR = re.compile(r"\s{0,99}([<\[]\w{0,9})?")


@dataclass
class Agent:
    """What a turn works with: a server, the settings of each request, the history, a screen."""

    client: openai.OpenAI
    settings: dict
    messages: list[dict]
    show: Callable[[str], None]
    workspace: Path
    approval: str
    tools: list[dict]
    used: int = 0
    system: str = ""
    key: str = field(init=False)
    store: "SessionStore" = field(init=False)
    guard: "ContextGuard" = field(init=False)
    app: "App" = field(init=False)


def load_agent() -> Agent:
    """The agent that .env and the environment describe. Exits with a line if they do not."""
    try:
        load_dotenv()
        key, model = (os.getenv(name, "").strip() for name in ("OPENAI_API_KEY", "MODEL_ID"))
        if not re.fullmatch("[!-~]+", key) or not model:  # a header takes ASCII alone
            sys.exit(NO_MODEL)
        options = json.loads(os.getenv("MODEL_OPTIONS") or "{}")
        settings = {"model": model, "stream": True, **options}
        timeout = openai.Timeout(float(os.getenv("MODEL_TIMEOUT") or 180), connect=10)
        if not 0 < timeout.read < 1e6:
            raise ValueError(f"nobody can wait {timeout.read} seconds")
        url = os.getenv("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
        client = openai.OpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout)
        approval = os.getenv("APPROVAL") or "ask"
        if approval not in ("ask", "always", "never"):
            sys.exit(f"APPROVAL must be ask, always or never, not {approval!r}")
        return Agent(client, settings, [], show, load_workspace(), approval, TOOLS)
    except Exception as error:  # dotenv and openai do not say what they may raise
        sys.exit(f".env, OPENAI_BASE_URL, MODEL_OPTIONS or MODEL_TIMEOUT: {error}")


def show(text: str) -> None:
    """Print a piece as it arrives, without what steers a terminal or turns its text round."""
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    print(re.sub(hidden, "", text), end="", flush=True)


def plain(text: str) -> str:
    """The text without surrogates: a pair that a stream has parted is joined, a half replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def explain(error: BaseException) -> str:
    """One line for a person: what went wrong and its cause, where, and what to check."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    told = error if isinstance(error, openai.OpenAIError | OSError) else repr(error)
    url = getattr(getattr(error, "request", None), "url", "")
    body = getattr(error, "body", None)
    body = "" if isinstance(body, dict) and "message" in body else body  # then it is told
    hint = CHECK.get(getattr(error, "status_code", None))
    parts = (told, error.__cause__, body, url, hint)
    lines = [" ".join(str(part).split()) for part in parts if str(part or "")]
    keys = [v.strip() for name, v in os.environ.items() if "_API_KEY" in name]
    for key in (key for key in keys if len(key) > 9):  # "ollama" is no secret
        lines = [line.replace(key, "***") for line in lines]  # some servers repeat it
    return " - ".join(line[:300] for line in lines)


class ThoughtFilter:
    """Takes thoughts out of a streamed answer: what it begins with, in tags such as <think>."""

    def __init__(self) -> None:
        self.held, self.inside, self.found, self.begun = "", False, False, False

    def feed(self, piece: str, last: bool = False) -> str:
        """What of the next piece is answer, as far as that is clear by now."""
        if self.begun:
            return piece
        self.held += piece
        place = 0
        while self.inside or (tag := OPENING.match(self.held, place)):
            if not self.inside:
                self.inside, self.found, place = True, True, tag.end()
            tag = CLOSING.search(self.held, place)
            if not tag:
                self.held = self.held[max(place, len(self.held) - 20) :]  # half a tag may be there
                return ""
            self.inside, place = False, tag.end()
        self.held = self.held[place:]
        if UNCLEAR.fullmatch(self.held) and not last:
            return ""
        self.begun = True
        return self.held.lstrip() if self.found else self.held


def read_lines(response: object) -> Iterator[bytes]:
    """The lines of a stream. What else ends a line elsewhere, as U+2028, may stand in a text."""
    begun: list[bytes] = []
    try:
        for piece in response.iter_bytes():
            head, *tails = piece.split(b"\n")
            begun.append(head)
            for tail in tails:
                yield b"".join(begun).rstrip(b"\r")
                begun = [tail]
    except Exception as error:  # of the HTTP library, which the SDK may change
        is_late = "Timeout" in type(error).__name__
        kind = openai.APITimeoutError if is_late else openai.APIConnectionError
        raise kind(request=response.request) from error


def read_chunks(reply: openai.Stream) -> Iterator[object]:
    """The chunks of an event stream. An event that holds none keeps the connection, and is left."""
    data: list[bytes] = []
    try:
        for line in read_lines(reply.response):
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.strip())
            if line or not data:
                continue
            event, data = b"\n".join(data), []
            if event == b"[DONE]":
                return
            if event.startswith(b"{"):
                chunk = json.loads(event)
                if error := chunk.get("error"):
                    told = error.get("message") if isinstance(error, dict) else ""
                    told = str(told or "an error came in the stream")
                    raise openai.APIError(told, reply.response.request, body=error)
                yield ChatCompletionChunk.construct(**chunk)
    finally:
        reply.close()


def call_model(agent: Agent, again: bool = True) -> tuple[dict, str]:
    """Send the history, show the answer as it streams. Returns the message and finish_reason."""
    request = {"messages": agent.messages, **agent.settings}
    if agent.system and agent.tools:  # a summary needs neither
        request["messages"] = [{"role": "system", "content": agent.system}, *agent.messages]
    if agent.tools:
        request = {"tools": agent.tools} | request
    stream = bool(request["stream"])
    if stream:
        request = {"stream_options": {"include_usage": True}} | request
    agent.used = 0
    # extra_body is sent as it is; what stands in messages= would be walked and copied first.
    reply = agent.client.chat.completions.create(
        model="", messages=[], stream=stream, extra_body=request
    )
    if stream and "json" in reply.response.headers.get("content-type", ""):
        told = reply.response.read().decode()
        failure = openai.OpenAIError(f"HTTP 200, but no stream: {told}")
        with suppress(LookupError, TypeError, ValueError):
            failure.code = json.loads(told)["error"]["code"]  # for classify_failure
        raise failure
    text, finish_reason, visible = "", None, ThoughtFilter()
    calls, thoughts = [], ""
    for chunk in read_chunks(reply) if stream else [reply]:  # the SDK checks no field of it
        used = getattr(getattr(chunk, "usage", None), "prompt_tokens", None)
        agent.used = used if isinstance(used, int) else agent.used
        for choice in getattr(chunk, "choices", None) or []:
            finish_reason = getattr(choice, "finish_reason", None) or finish_reason
            delta = getattr(choice, "delta" if stream else "message", None)
            piece = getattr(delta, "content", None) or getattr(delta, "refusal", None)
            if isinstance(piece, str) and (piece := visible.feed(piece)):
                agent.show(piece)
                text += piece
            for position, fragment in enumerate(getattr(delta, "tool_calls", None) or []):
                add_piece(calls, fragment, position)
            thought = getattr(delta, "reasoning_content", None)
            thoughts += thought if isinstance(thought, str) else ""
    if rest := visible.feed("", last=True):
        agent.show(rest)
        text += rest
    message = {"role": "assistant", "content": plain(text)}
    if thoughts:
        message["reasoning_content"] = plain(thoughts)  # DeepSeek refuses a history without it
    if finish_reason and calls:
        return message | {"tool_calls": plain_calls(calls, agent.messages)}, finish_reason
    if finish_reason and text.strip():
        return message, finish_reason
    is_end = finish_reason and finish_reason not in NOTES
    if is_end and turn_texts(agent.messages):  # it has said all beside its calls
        return message | {"content": NOTHING}, finish_reason
    is_tool = agent.messages[-1]["role"] == "tool"
    if is_end and again and (visible.found or thoughts or is_tool):
        return call_model(agent, again=False)
    empty = "the answer was empty" if finish_reason else "the answer broke off"
    told = getattr(reply, "error", None) or NOTES.get(finish_reason, empty)
    failure = openai.OpenAIError(f"{told} - {agent.client.base_url}")
    failure.code = told.get("code") if isinstance(told, dict) else None
    raise failure


def agent_turn(agent: Agent) -> str:
    """Answer the last message of the history. Returns the answer, or raises OpenAIError."""
    texts = []
    for rounds in range(1, MAX_ROUNDS + 1):
        message, finish_reason = agent.app.resilience.call(agent)
        agent.messages.append(message)
        texts.append(message["content"])
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            result = run_tool(agent, call) if rounds < MAX_ROUNDS else f"not run: {TOO_LONG}"
            agent.messages.append(tool_result(call, result))
        agent.show("\n")
    else:
        finish_reason = "rounds"
    note = f"\n[{NOTES[finish_reason]}]" if finish_reason in NOTES else ""
    agent.show(note)
    return join_texts(texts) + note


def answer(agent: Agent, text: str, asked: str = "") -> str:
    """Run one turn. One that fails shows why in a line, takes the text back, and returns ""."""
    question = {"role": "user", "content": text}
    try:
        if asked and asked == agent.messages.asked:  # a crash cut off the turn: go on with it
            texts = turn_texts(agent.messages)
            if agent.messages[-1]["role"] != "assistant":
                texts.append(agent_turn(agent))
            return join_texts(texts)
        close_turn(agent.messages)
        agent.messages.append(question, asked)
        return agent_turn(agent)
    except (Exception, KeyboardInterrupt) as error:  # a turn may fail, the loop goes on
        if agent.messages[-1:] == [question] and not isinstance(error, NoProfileLeft):
            agent.messages.pop()
        agent.show(f"\n[{explain(error)}]")
        return ""


# --- s02: tool use ---

MAX_ROUNDS = 25
MAX_RESULT = 30_000
MAX_FILE = 10_000_000
MAX_PATH = 4096
MAX_CALLS = 500  # in one answer
MAX_CHECKS = 200  # whether a call is whole: each reads all of it
TOO_LONG = f"this turn has had its {MAX_ROUNDS} model calls"
NOTES["rounds"] = f"stopped after {MAX_ROUNDS} model calls; ask again to go on"
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
NOTHING = "[nothing to add]"  # as no server takes an empty message in a history
PATH = "the file, relative to the workspace"
# What the program, here or in a later section, keeps for itself in the workspace.
OWN = re.compile(
    r"\.|(cron|delivery-queue|bindings\.jsonl[^/]*)(/|$)|agents/[^/]+/\.", re.IGNORECASE
)
SECRET = re.compile("key|token|secret|pass|pwd|credential", re.IGNORECASE)
TOOLS: list[dict] = []
TOOL_HANDLERS: dict[str, Callable[..., str]] = {}


def tool(description: str, **about: str) -> Callable:
    """Register a function as a tool. `description`, and `about` each parameter, tell the model."""

    def register(handler: Callable[..., str]) -> Callable[..., str]:
        parameters = list(inspect.signature(handler).parameters.values())[1:]
        schema = {
            "type": "object",
            "properties": {
                p.name: {"type": JSON_TYPES[p.annotation], "description": about[p.name]}
                for p in parameters
            },
            "required": [p.name for p in parameters if p.default is p.empty],
        }
        function = {"name": handler.__name__, "description": description, "parameters": schema}
        TOOLS.append({"type": "function", "function": function})
        TOOL_HANDLERS[handler.__name__] = handler
        return handler

    return register


def add_piece(parts: list[dict], piece: object, position: int) -> None:
    """Add a piece of a streamed tool call to the calls put together so far, one dict each.

    Servers repeat id and name in each piece or send neither, use one id twice, count no index or
    one for all calls (then the `position` in the message counts), and send arguments as an object.
    """
    index, function = getattr(piece, "index", None), getattr(piece, "function", None)
    text = getattr(function, "arguments", None)
    text = "" if text is None else text
    new = {
        "index": position if index is None else index,
        "id": getattr(piece, "id", None),
        "name": getattr(function, "name", None),
        "text": text if isinstance(text, str) else json.dumps(text),
        "extra_content": getattr(piece, "extra_content", None),  # Gemini's signature
        "checks": 0,
    }
    part = next((part for part in reversed(parts) if continues(part, new)), None)
    if part is None:
        if len(parts) < MAX_CALLS:  # the others are left out
            parts.append(new)
    else:
        text = part.pop("text")
        text += new["text"]  # as nothing else holds it, it grows in place: no piece costs a copy
        part["text"] = text
        part |= {key: part[key] or new[key] for key in ("id", "name", "extra_content")}


def continues(part: dict, new: dict) -> bool:
    """Whether a piece goes on with a call: nothing contradicts it, and the call lacks something."""
    if part["index"] != new["index"]:
        return False
    contradicts = [part[key] and new[key] and part[key] != new[key] for key in ("id", "name")]
    if any(contradicts):
        return False
    if not new["text"].lstrip().startswith("{") or part["checks"] == MAX_CHECKS:
        return True
    part["checks"] += 1
    return not is_object(part["text"])


def plain_calls(parts: list[dict], messages: list[dict]) -> list[dict]:
    """The calls as the strictest server takes them: unique ids, plain names, JSON objects."""
    used = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    calls = []
    for part in parts:
        call_id = plain(str(part["id"] or ""))
        call_id = os.urandom(12).hex() if not call_id or call_id in used else call_id
        used.add(call_id)
        name = re.sub("[^a-zA-Z0-9_-]", "_", str(part["name"] or "unnamed"))[:64]
        function = {"name": name, "arguments": plain_arguments(part["text"])}
        calls.append({"id": call_id, "type": "function", "function": function})
        if is_object(json.dumps(part["extra_content"])):
            calls[-1]["extra_content"] = part["extra_content"]
    return calls


def is_object(text: str) -> bool:
    """Whether a text is a JSON object for others than Python, too: no NaN, no lone surrogate."""
    try:
        value = json.loads(text, parse_constant=int)  # int("NaN") raises, as encode() below may
        return isinstance(value, dict) and bool(json.dumps(value, ensure_ascii=False).encode())
    except (ValueError, RecursionError):
        return False


def plain_arguments(text: str) -> str:
    """The arguments as sent when they are a JSON object, else one that shows what they were."""
    if text.strip() in ("", "null"):
        return "{}"
    return text if is_object(text) else json.dumps({"invalid_json": plain(text[:500])})


def turn_texts(messages: list[dict]) -> list[str]:
    """What the model has said since the last question, beside its tool calls."""
    texts = []
    for message in reversed(messages):
        if message["role"] == "user":
            break
        if message["role"] == "assistant" and message["content"].strip():
            texts.append(message["content"])
    return texts[::-1]


def join_texts(texts: list[str]) -> str:
    """All that was said in a turn, as one answer."""
    return "\n\n".join(text for text in texts if text.strip() and text != NOTHING)


def tool_result(call: dict, text: str) -> dict:
    """The message that answers a tool call."""
    return {"role": "tool", "tool_call_id": call["id"], "content": text}


def close_turn(messages: list[dict]) -> None:
    """End a turn that an error or Ctrl-C cut off, so that a new one can follow."""
    close_calls(messages)
    if messages and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": "[This turn ended early.]"})


def close_calls(messages: list[dict]) -> None:
    """Give each tool call at the end of the history that has no result one that says so."""
    for call in open_calls(messages):
        messages.append(tool_result(call, "interrupted: it may have run, wholly or in part"))


def open_calls(messages: list[dict]) -> list[dict]:
    """The last tool calls of the history without a result yet; results are in their order."""
    for answered, message in enumerate(reversed(messages)):
        if message["role"] != "tool":
            return message.get("tool_calls", [])[answered:]
    return []


def run_tool(agent: Agent, call: dict) -> str:
    """Run one tool call. Whatever goes wrong becomes a text that the model can read and correct."""
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    agent.show(f"\n[{name} {' '.join(str(value) for value in arguments.values())[:80]!r}]")
    try:
        if name not in TOOL_HANDLERS:
            raise ValueError(f"there is no tool {name}; there are: {', '.join(TOOL_HANDLERS)}")
        check_arguments(name, arguments)
        result = TOOL_HANDLERS[name](agent, **arguments)
    except Exception as error:  # a tool may fail in any way, and the model has to hear of it
        result = f"error: {str(error) or type(error).__name__}"
    return cut_middle(plain(result))


def check_arguments(name: str, arguments: dict) -> None:
    """Raise ValueError, saying what does not fit, unless the tool can be called with these."""
    tools = {entry["function"]["name"]: entry["function"]["parameters"] for entry in TOOLS}
    kinds = {key: about["type"] for key, about in tools[name]["properties"].items()}
    wrong = [f"{key} is missing" for key in tools[name]["required"] if key not in arguments]
    for key, value in arguments.items():
        if key == "invalid_json":
            wrong = ["what came was no JSON object (cut off? then write less at once)"]
        elif key not in kinds or JSON_TYPES.get(type(value)) != kinds[key]:
            wrong.append(f"{key} must be {kinds[key]}" if key in kinds else f"{key} is unknown")
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}. The arguments of {name}: {json.dumps(kinds)}")


def cut_middle(text: str, limit: int = MAX_RESULT) -> str:
    """A text of about `limit` characters: a longer one loses its middle, an empty one says so."""
    half = max(limit // 2 - 50, 10)  # and 100 for the note between
    if len(text) <= limit:
        return text or "(empty)"
    return f"{text[:half]}\n[... cut: only the first and last {half:,} characters]\n{text[-half:]}"


def load_workspace() -> Path:
    """The folder that tools work in, made if it is missing: WORKSPACE_DIR, or workspace/."""
    default = Path(__file__).resolve().parent.parent.parent / "workspace"
    folder = Path(os.getenv("WORKSPACE_DIR") or default).expanduser().resolve()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if folder.is_dir() else sys.exit(f"WORKSPACE_DIR: {folder} is not a folder")


def workspace_path(agent: Agent, path: str) -> Path:
    """The file that `path` names, links resolved. Raises ValueError when it is not the agent's."""
    if len(path) > MAX_PATH:
        raise ValueError("no path is that long")
    file = (agent.workspace / path).resolve()
    if not file.is_relative_to(agent.workspace):
        raise ValueError(f"{path} is outside the workspace")
    if OWN.match(file.relative_to(agent.workspace).as_posix()):
        raise ValueError(f"{path} is not for tools: the program keeps its own state there")
    return file


def load_text(file: Path) -> str:
    """The text of a file, line endings kept. Raises ValueError for what is not a text file."""
    if not file.is_file():
        raise ValueError(f"there is no file {file.name}")
    if file.stat().st_size > MAX_FILE:
        raise ValueError(f"{file.name} has over {MAX_FILE:,} bytes: use bash to look into it")
    return file.read_bytes().decode("utf-8")


def replace_file(file: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            shutil.copymode(file, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@tool("Read a text file.", path=PATH, offset="first line, from 1", limit="lines at most")
def read_file(agent: Agent, path: str, offset: int = 1, limit: int = 2000) -> str:
    lines = (
        load_text(readable_path(agent, path))
        .removeprefix("\ufeff")
        .replace("\r\n", "\n")
        .split("\n")
    )
    start = max(offset, 1) - 1
    chosen = lines[start : start + max(limit, 1)]
    text = cut_middle("\n".join(chosen)) if chosen else f"(no line {offset})"
    return text if chosen == lines else f"{text}\n[from line {start + 1} of {len(lines)}]"


@tool("Write a text file; one that is there is replaced.", path=PATH, content="the whole text")
def write_file(agent: Agent, path: str, content: str) -> str:
    replace_file(workspace_path(agent, path), content)
    return f"wrote {len(content)} characters to {path}"


@tool(
    "Replace a passage of a text file. It must occur exactly once.",
    path=PATH,
    old_text="the passage as it stands, with its blanks and line breaks",
    new_text="what takes its place",
)
def edit_file(agent: Agent, path: str, old_text: str, new_text: str) -> str:
    file = workspace_path(agent, path)
    text = load_text(file)
    if "\r\n" in text and (old_text not in text or "\n" not in old_text):
        # Models write \n where this file has \r\n; what fits with its \n stays as it is.
        old_text, new_text = (re.sub("\r?\n", "\r\n", part) for part in (old_text, new_text))
    count = text.count(old_text) if old_text else 0
    if count == 1 and text.find(old_text, text.find(old_text) + 1) > 0:
        count = 2  # they overlap
    if count != 1:
        raise ValueError(f"old_text occurs {count} times in {path}; it must occur exactly once")
    replace_file(file, text.replace(old_text, new_text))
    return f"replaced 1 passage in {path}"


@tool(
    "Run a shell command in the workspace; it cannot ask for input, and the person may refuse it.",
    command="the command line",
    timeout="seconds until it is killed, at most 600",
)
def bash(agent: Agent, command: str, timeout: int = 120) -> str:
    if not approve(agent, command):
        return "error: not allowed; that takes a yes at the terminal, or APPROVAL. Try no other way"
    return run_shell(command, agent.workspace, min(max(timeout, 1), 600))


def approve(agent: Agent, command: str) -> bool:
    """Whether a command may run: as APPROVAL says, or the person at the terminal."""
    if agent.approval != "ask" or not sys.stdin.isatty():
        return agent.approval == "always"
    with suppress(ImportError):  # Windows has no termios
        import termios

        # What was typed before the question is no answer to it.
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
    agent.show("".join(f"\n> {line}" for line in command.split("\n")) + "\n")
    with suppress(EOFError):
        choice = input("run it? [y/N/a] ").strip().lower()
        if choice == "a":
            agent.approval = "always"
        return choice in ("y", "yes", "a")
    return False


def run_shell(command: str, folder: Path, seconds: int) -> str:
    """What a command printed, stdout and stderr as they came, and how it ended."""
    posix = os.name == "posix"
    process = subprocess.Popen(
        command,
        shell=True,
        executable=shutil.which("bash") if posix else None,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not SECRET.search(name)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=posix,
    )
    RUNNING.add(process)
    try:
        output = bytearray()
        reader = threading.Thread(target=read_ends, args=(process, output), daemon=True)
        reader.start()
        process.wait(seconds)
        end = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        end = f"killed after {seconds} seconds"
    finally:
        RUNNING.discard(process)
        if process.poll() is None:
            kill(process)
    reader.join(1)  # a command left in the background may hold the pipe for long
    text = bytes(output).decode("utf-8", "replace").rstrip()
    return f"{cut_middle(text)}\n[{end}]"


def kill(process: subprocess.Popen) -> None:
    """Kill a process and all its children."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)
    process.wait()


def read_ends(process: subprocess.Popen, data: bytearray) -> None:
    """Read a process's output to its end into `data`, which keeps only the first and last bytes."""
    keep = 4 * MAX_RESULT  # a character has up to 4 bytes
    while piece := process.stdout.read1(65536):
        data += piece
        del data[keep : max(keep, len(data) - keep)]


# --- s03: sessions and context ---

SESSION_KEY = "agent:main:main"
OVERFLOW = re.compile(
    "context.?(length|size|window)|n_ctx|tokens_limit|(input|prompt) is too long"
    "|(input|prompt) (tokens|length) exceed|too many (input )?tokens|maximum input",
    re.IGNORECASE,
)
SUMMARIZE = """Summarize this conversation for the assistant who has to go on with it. Keep names,
numbers, paths, decisions, what was done, what failed and what is still to do. At most 300 words."""
COMMANDS: dict[str, tuple[str, str, Callable]] = {}


class Journal:
    """An append-only file of JSON lines: a record is on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self.file = os.open(path, flags, 0o600)
        weakref.finalize(self, os.close, self.file)  # when nobody uses the journal any more
        self.writing, self.syncing = threading.Lock(), threading.Lock()
        self.written = self.synced = 0

    def append(self, record: dict, durable: bool = True) -> None:
        """Write a record, and return when it is on disk. Raises OSError when it may not be.

        One that need not be durable rides on the next sync: the end of the process leaves it in
        the file, a power cut may not.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        with self.writing:
            state = os.fstat(self.file)
            if not state.st_nlink:
                raise OSError(f"{self.path} was removed while in use")
            if os.write(self.file, line) != len(line):
                os.ftruncate(self.file, state.st_size)
                raise OSError(f"the disk is full: {self.path}")
            self.written += 1
            mine = self.written
        with self.syncing:
            if durable and self.synced < mine:  # else a sync that began later has taken it along
                written = self.written
                getattr(os, "fdatasync", os.fsync)(self.file)
                self.synced = written

    def replay(self) -> list[dict]:
        """The records, oldest first. A torn last line is set aside, other damage told of."""
        *lines, torn = self.path.read_bytes().split(b"\n")
        if torn:
            with open(f"{self.path}.torn", "ab") as aside:
                aside.write(torn + b"\n")
            os.ftruncate(self.file, os.fstat(self.file).st_size - len(torn))
            show(f"[{self.path.name}: a torn last line was set aside]\n")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line, **READ_NUMBERS)
                records.append({} | record)  # TypeError unless it is an object
            except (TypeError, ValueError, RecursionError):
                records.append({})  # so that a record's number is its line's
                show(f"[{self.path.name}, line {number}: damaged, left out]\n")
        return records


def read_number(text: str) -> int | float:
    """A number of a journal. Raises ValueError for one that overflows where it is used."""
    if not abs(float(text)) < 1e18:
        raise ValueError(f"{text[:20]} is no time, size or count")
    return int(text) if text.lstrip("-").isdecimal() else float(text)


READ_NUMBERS = dict.fromkeys(("parse_int", "parse_float", "parse_constant"), read_number)


class Session(list):
    """One conversation: a list of messages to the loop, but each change reaches the disk first."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.journal = journal
        self.header = {"label": ""}
        self.asked = ""
        self.fixed = estimate(TOOLS)  # tokens that are in each request
        self.estimated, self.scale = 0, 1.0
        self.windows: dict[str, int] = {}
        self.used = 0
        for record in journal.replay():
            self.apply(record)
        if (mended := mend(self)) != self:
            self.rewrite(mended, "mended")

    def apply(self, record: dict) -> None:
        """Make the change that a record describes: the only way to change, now and in a replay."""
        match record:
            case {"type": "session", "label": str()}:
                self.header = record
            case {"type": "message", "message": dict(message)} if is_message(message):
                match record:
                    case {"used": int(used), "fixed": int(fixed)} if min(used, fixed) > 0:
                        self.scale = min(max(used / (fixed + self.estimated), 0.25), 4)
                super().append(message)
                self.asked = record.get("asked") or self.asked
                self.estimated += estimate(message)
            case {"type": "retraction", "to": int(length)}:
                self.estimated -= sum(map(estimate, self[length:]))
                del self[length:]
                self.asked = ""
            case {"type": "compaction", "messages": list(new)} if all(map(is_message, new)):
                self[:] = new
                self.estimated = sum(map(estimate, new))
            case {"type": "overflow", "window": str(window), "tokens": int(tokens)}:
                self.windows[window] = max(tokens, 1000)

    def change(self, record: dict) -> None:
        """Write a record, then make its change, even if Ctrl-C ends the wait for the disk."""
        before = self.journal.written
        try:
            self.journal.append(record)
        finally:
            if self.journal.written > before:
                self.apply(record)

    def append(self, message: dict, asked: str = "") -> None:
        """Add a message, with `used`: the tokens before it as the server counted, if it did.

        A question that came through the inbox is `asked` by its id, and so known after a crash.
        """
        about = {"used": self.used, "fixed": self.fixed} | ({"asked": asked} if asked else {})
        self.change({"type": "message", "message": message, **about})
        self.used = 0

    def pop(self) -> None:
        """Take back the last message."""
        record = {"type": "retraction", "to": len(self) - 1}
        with suppress(OSError):  # on a full disk it stays in the file, as a turn that ended early
            self.journal.append(record)
        self.apply(record)

    def rewrite(self, messages: list[dict], why: str) -> None:
        """Put other messages in place of all; the file keeps the old ones."""
        self.change({"type": "compaction", "why": why, "messages": messages})

    def __str__(self) -> str:
        label = f" ({self.header['label']})" if self.header["label"] else ""
        return f"session {self.journal.path.stem}{label}, {len(self)} messages"

    def tokens(self) -> int:
        """The tokens of the next request: an estimate, scaled by what the server last counted."""
        return int(self.scale * (self.fixed + self.estimated))


def estimate(value: object) -> int:
    """About how many tokens a value takes: one for 4 characters, or for 1 Chinese one or emoji."""
    text = json.dumps(value, ensure_ascii=False)
    wide = 0 if text.isascii() else len(re.findall("[\u2e80-\U0010ffff]", text))
    return (len(text) + 3 * wide) // 4


def is_message(message: object) -> bool:
    """Whether what a file holds is a message, in all that is used of it here."""
    match message:
        case {"role": "user" | "assistant" | "tool", "content": str()}:
            calls, parts = message.get("tool_calls", []), {"id", "function"}
            if isinstance(calls, list):
                return all(isinstance(call, dict) and parts <= call.keys() for call in calls)
    return False


def mend(messages: list[dict]) -> list[dict]:
    """A history that every server accepts: each call has its one result, speakers take turns."""
    mended: list[dict] = []
    for message in messages:
        if mended[-1:] == [message]:
            continue  # said again, as Ctrl-C fell between the write and its count
        if message["role"] == "tool":
            if [c["id"] for c in open_calls(mended)[:1]] != [message.get("tool_call_id")]:
                continue  # its call is lost
        elif message["role"] == "user":
            close_turn(mended)
        else:
            close_calls(mended)
            if not mended or mended[-1]["role"] == "assistant":
                mended.append({"role": "user", "content": "[A message is missing here.]"})
        mended.append(message)
    close_calls(mended)
    return mended


class SessionStore:
    """The sessions of one agent: a journal each, and which of them a session key means now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sessions"
        self.index = folder / "sessions.json"

    def files(self, key: str) -> list[Path]:
        """The sessions of a key on disk, the latest first."""
        times = {}
        for file in self.folder.glob("*.jsonl"):
            with suppress(OSError):  # it may be gone by now
                if read_header(file)["key"] == key:
                    times[file] = file.stat().st_mtime
        return sorted(times, key=times.get, reverse=True)

    def read_index(self) -> dict[str, dict]:
        """What each key means; nothing when sessions.json is missing or damaged."""
        with suppress(OSError, TypeError, ValueError, RecursionError):
            return {} | json.loads(self.index.read_text(encoding="utf-8"))
        return {}

    def resume(self, key: str) -> Session:
        """The session that a key means: as the index says, else the latest, else a new one."""
        match self.read_index().get(key):
            case {"id": str(name)} if (file := self.folder / f"{name}.jsonl").is_file():
                return Session(Journal(file))
        files = self.files(key)
        return Session(Journal(files[0])) if files else self.create(key)

    def create(self, key: str, label: str = "") -> Session:
        """A new session, which the key means from now on."""
        session = Session(Journal(self.folder / f"{os.urandom(6).hex()}.jsonl"))
        header = {"type": "session", "version": 1, "key": key, "label": label}
        session.change(header | {"created": time.time()})
        self.point(key, session)
        return session

    def switch(self, key: str, prefix: str) -> Session:
        """Let a key mean its session whose id begins so. Raises ValueError unless it is one."""
        found = [file for file in self.files(key) if prefix and file.stem.startswith(prefix)]
        if len(found) != 1:
            raise ValueError(f"{len(found)} sessions begin with {prefix!r}; see /list")
        session = Session(Journal(found[0]))
        self.point(key, session)
        return session

    def point(self, key: str, session: Session) -> None:
        """Write down that a key means a session."""
        entry = {"id": session.journal.path.stem, "label": session.header["label"]}
        replace_file(self.index, json.dumps(self.read_index() | {key: entry}, indent=2))


def read_header(file: Path) -> dict:
    """The header of a session file, or what stands in for a damaged one."""
    header = {"key": SESSION_KEY, "label": ""}
    with suppress(OSError, AttributeError, ValueError, RecursionError), open(file, "rb") as stream:
        found = json.loads(stream.readline())
        header |= {name: found[name] for name in header if isinstance(found.get(name), str)}
    return header


def lock_workspace(folder: Path) -> None:
    """Own a workspace while the process lives. Exits, naming the holder, if another one does."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(lock, 1000, os.SEEK_SET)  # past the holder's name, which others have to read
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = (folder / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        sys.exit(f"{folder} is in use by {holder}: stop it, or set WORKSPACE_DIR to another folder")
    os.lseek(lock, 0, os.SEEK_SET)
    # Over a longer line of the last holder; the file stays open until the process ends.
    os.write(lock, f"{__doc__[:3]}, process {os.getpid()}".ljust(40).encode())


class ContextOverflow(openai.OpenAIError):
    """The history does not fit the model's window, and no room could be made."""


class ContextGuard:
    """Keeps requests inside the model's window: `window` tokens, or fewer if a server says so."""

    def __init__(self, window: int) -> None:
        self.window = max(window, 1000)

    def limit(self, agent: Agent) -> int:
        """The window of the agent's model, as far as it is known in this session."""
        return agent.messages.windows.get(self.key(agent), self.window)

    def key(self, agent: Agent) -> str:
        """What a learned window holds for: a model, and what CONTEXT_TOKENS said of it."""
        return f"{agent.settings['model']}, {self.window}"

    def learn(self, agent: Agent, tokens: int) -> None:
        """Write down that a request of so many tokens was too long for the agent's model."""
        record = {"type": "overflow", "window": self.key(agent), "tokens": tokens}
        agent.messages.change(record)

    def call(self, agent: Agent) -> tuple[dict, str]:
        """call_model, with room made when the request is too big. Raises ContextOverflow."""
        # Twice compact: while it works, the window may prove smaller than it seemed.
        steps = ((self.shorten, 8), (self.compact, 3), (self.compact, 4), (self.shorten, 64))
        for make_room, share in steps:
            with suppress(ContextOverflow):
                return self.attempt(agent)
            last, limit = agent.messages[-1], self.limit(agent)
            least = (estimate(last) + agent.messages.fixed) * agent.messages.scale + limit // 8
            if last["role"] == "user" and least > limit * 9 // 10:
                break  # the question alone, with a summary before it, would not fit
            make_room(agent, share)
        return self.attempt(agent)

    def attempt(self, agent: Agent) -> tuple[dict, str]:
        """One call, unless it seems to overflow: some servers then drop messages silently."""
        size = agent.messages.tokens()
        if size <= self.limit(agent) * 9 // 10:  # the answer needs room, too
            try:
                reply = call_model(agent)
                agent.messages.used = agent.used
                return reply
            except openai.OpenAIError as error:
                if not is_overflow(error):
                    raise
                self.learn(agent, size)
        raise ContextOverflow(
            f"too long for a window of {self.limit(agent):,} tokens: say less, or start with /new"
        )

    def shorten(self, agent: Agent, share: int) -> None:
        """Cut the middle out of tool results that fill more than 1/share of the window."""
        short = [dict(message) for message in agent.messages]
        for message in short:
            if message["role"] == "tool":
                message["content"] = cut_tokens(message["content"], self.limit(agent) // share)
        if short != agent.messages:
            agent.messages.rewrite(short, "shortened")

    def compact(self, agent: Agent, share: int) -> None:
        """Summarize all but the latest 1/share of the window; calls stay with their results."""
        messages = agent.messages
        room = self.limit(agent) // share / messages.scale  # in the tokens of `estimate`
        starts = [i for i, message in enumerate(messages) if message["role"] != "tool"]
        sizes = list(accumulate(map(estimate, reversed(messages))))[::-1]  # from each to the end
        keep = next((i for i in starts if sizes[i] <= room), starts[-1])
        if keep == 0:
            return
        summary = self.summarize(agent, messages[:keep])
        head = [{"role": "user", "content": f"[The conversation so far, in short]\n{summary}"}]
        if messages[keep]["role"] == "user":
            head.append({"role": "assistant", "content": "I go on from there."})
        messages.rewrite(head + messages[keep:], "summarized")
        agent.show(f"\n[{keep} messages became a summary]\n")

    def summarize(self, agent: Agent, messages: list[dict]) -> str:
        """The model's summary of messages, made piece by piece so that no request overflows."""
        pieces, filled, window = [""], 0, int(self.limit(agent) / agent.messages.scale)
        for message in messages:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            text = f"{message['role']}: {message['content']} {calls or ''}\n"
            line = cut_tokens(text, window // 8)  # with the summary so far, under half of it
            filled += estimate(line)
            if filled > window // 3:
                pieces, filled = [*pieces, ""], estimate(line)
            pieces[-1] += line
        summary = ""
        try:
            for piece in pieces:
                ask = {"role": "user", "content": f"{SUMMARIZE}\n\n{summary}\n\n{piece}"}
                helper = replace(agent, messages=[ask], tools=[], show=lambda text: None)
                message, finish_reason = call_model(helper)
                if "tool_calls" in message or finish_reason == "content_filter":
                    raise openai.OpenAIError("the model gave none")
                summary = cut_tokens(message["content"], window // 8)
        except openai.OpenAIError as error:
            if not is_overflow(error) or self.limit(agent) == 1000:
                raise openai.OpenAIError("no summary: try again, or start with /new") from error
            self.learn(agent, self.limit(agent) // 2)
            return self.summarize(agent, messages)
        return summary


def is_overflow(error: openai.OpenAIError) -> bool:
    """Whether a server refused a request for its length; an error of key or rate never is that."""
    status, body = getattr(error, "status_code", None), getattr(error, "body", None)
    code, kind = str(getattr(error, "code", "")), getattr(error, "type", "")
    if status is None and code.isdecimal():  # in mid-stream there is no other
        status = int(code)
    if status not in (None, 400, 500) or "parameter" in code:  # a bad max_tokens, say
        return status == 413
    told = (error, body)
    if isinstance(body, dict):  # the server's own words; OpenRouter puts them into `metadata`
        told = (body.get("message"), body.get("metadata"))
    return bool(OVERFLOW.search(f"{code} {kind} {told}"))


def cut_tokens(text: str, tokens: int) -> str:
    """A text of at most about so many tokens: a longer one loses its middle."""
    return cut_middle(text, tokens * len(text) // max(estimate(text), 1))


def command(usage: str, about: str) -> Callable:
    """Register a slash command. `usage` begins with its name; `about` is its line in /help."""

    def register(handler: Callable[[Agent, str], str]) -> Callable[[Agent, str], str]:
        COMMANDS[usage.split()[0]] = (usage, about, handler)
        return handler

    return register


def run_command(agent: Agent, text: str) -> bool:
    """Run the command that a line begins with and show what it says; False if there is none."""
    name = text.split()[0] if text.startswith("/") else ""
    if name not in COMMANDS:
        return False
    try:
        agent.show(COMMANDS[name][2](agent, text[len(name) :].strip()) + "\n")
    except (Exception, KeyboardInterrupt) as error:  # a ValueError's text is ours
        agent.show(f"[{error if isinstance(error, ValueError) else explain(error)}]\n")
    return True


@command("/new [label]", "start a new session")
def new_session(agent: Agent, label: str) -> str:
    return use(agent, agent.store.create(agent.key, label))


@command("/switch <id>", "go to another session; the beginning of its id is enough")
def switch_session(agent: Agent, prefix: str) -> str:
    return use(agent, agent.store.switch(agent.key, prefix))


def use(agent: Agent, session: Session) -> str:
    """Go on in another session."""
    agent.messages = session
    return str(session)


@command("/list", "the sessions used last")
def list_sessions(agent: Agent, rest: str) -> str:
    lines = []
    for file in agent.store.files(agent.key)[:20]:
        mark = "*" if file == agent.messages.journal.path else " "
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
        lines.append(f"{mark} {file.stem}  {when}  {read_header(file)['label']}".rstrip())
    return "\n".join(lines)


@command("/context", "how full the model's window is")
def show_context(agent: Agent, rest: str) -> str:
    used, window = agent.messages.tokens(), agent.guard.limit(agent)
    bar = "#" * min(20 * used // window, 20)
    return f"[{bar:.<20}] {used:,} of {window:,} tokens, {len(agent.messages)} messages"


@command("/compact", "put a summary in place of the conversation so far")
def compact_session(agent: Agent, rest: str) -> str:
    if len(agent.messages) > 2:  # else there is nothing to make shorter
        agent.guard.compact(agent, agent.guard.window)  # a share with room for the last message
    return show_context(agent, rest)


@command("/help", "the commands")
def show_help(agent: Agent, rest: str) -> str:
    return "\n".join(f"{usage:<16} {about}" for usage, about, _ in COMMANDS.values())


def open_sessions(agent: Agent) -> None:
    """Take the workspace and go on in the latest session. Exits with a line if that cannot be."""
    window = os.getenv("CONTEXT_TOKENS") or "128000"
    if not window.isdecimal():
        sys.exit(f"CONTEXT_TOKENS must be a number of tokens, not {window!r}")
    agent.guard = ContextGuard(int(window))
    try:
        lock_workspace(agent.workspace)
        agent.store = SessionStore(agent.workspace / ".sessions" / "agents" / "main")
        agent.key = SESSION_KEY
        agent.messages = agent.store.resume(agent.key)
    except OSError as error:
        sys.exit(f"the workspace cannot be used: {error}")


# --- s04: channels ---

KEEP = 24 * 3600  # seconds; Telegram and Feishu give up delivering a message before that
LONG_TEXT = 4000  # Telegram's apps split a paste at 4,096 characters, or at a blank before that
FROM_AFAR = ("/new", "/context", "/compact")  # what others may do of COMMANDS
MAX_OPEN = 100  # uses of sessions that are remembered, and keep them in memory
RUNNING: set[subprocess.Popen] = set()  # the commands of bash, which end with the program
MAX_CONNECTIONS = 100  # to a server of ours, from those who have not said who they are
MAX_REQUEST = 10  # seconds; Feishu gives up after three
FEISHU_DOMAINS = {"feishu": "https://open.feishu.cn", "lark": "https://open.larksuite.com"}
FEISHU_TOKEN = "/open-apis/auth/v3/tenant_access_token/internal"
FEISHU_TOKEN_CODES = (99991661, 99991663, 99991664, 99991668, 99991671, 99991677)  # renew it
FEISHU_NEVER = (230001, 230002, 230006, 230013, 230022, 230025, 230034, 230053)  # give up
FEISHU_RATE_CODES = (99991400, 230020, 11232)  # wait


@dataclass(frozen=True)
class InboundMessage:
    """What somebody said. `ids` are the platform's for it and its parts; the first one names it."""

    channel: str
    account: str
    peer: str
    text: str
    ids: list[str]
    kind: str = "direct"  # or group
    sender: str = ""
    guild: str = ""  # a server or team of many chats; in Feishu the tenant

    def __post_init__(self) -> None:
        """Raise TypeError unless all of it is text: it may come from a file."""
        texts = [*self.ids, *(value for name, value in vars(self).items() if name != "ids")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError

    @property
    def said(self) -> str:
        """The text as the model gets it: in a group, with the name of who speaks."""
        return f"[{self.sender}] {self.text}" if self.kind == "group" else self.text


def build_session_key(agent_id: str, message: InboundMessage, dm_scope: str) -> str:
    """The key of the session a message belongs to, as OpenClaw writes it; a group has its own."""
    if message.channel == "cli":
        return f"agent:{agent_id}:main"
    channel, account, peer = message.channel, message.account, message.peer
    scopes = {
        "main": "main",
        "per-peer": f"direct:{peer}",
        "per-channel-peer": f"{channel}:direct:{peer}",
        "per-account-channel-peer": f"{channel}:{account}:direct:{peer}",
    }
    rest = scopes[dm_scope] if message.kind == "direct" else f"{channel}:{message.kind}:{peer}"
    return f"agent:{agent_id}:{rest}".lower()


class Inbox:
    """What has come in: written down before its platform is told, kept until it is answered."""

    def __init__(self, path: Path) -> None:
        self.journal, self.lock = Journal(path), threading.Lock()
        self.seen: dict[str, float] = {}
        self.open: dict[str, InboundMessage] = {}
        self.answers: dict[str, str] = {}
        self.queue: queue.Queue[InboundMessage] = queue.Queue()
        restore(self.journal, self.apply)
        self.compact()
        for message in self.open.values():
            self.queue.put(message)

    def apply(self, record: dict) -> None:
        """Make the change that a record describes, now and in a replay."""
        match record:
            case {"type": "message", "message": {"ids": [str(name), *_]} as fields}:
                self.open[name] = InboundMessage(**fields)
                if isinstance(text := record.get("answer"), str):  # nobody asked
                    self.answers[name] = text
                self.seen |= dict.fromkeys(fields["ids"], time.time())
            case {"type": "answer", "id": str(name), "text": str(text)} if name in self.open:
                self.answers[name] = text
            case {"type": "done", "id": str(name)}:
                self.open.pop(name, None)
                self.answers.pop(name, None)
            case {"type": "seen", "ids": dict(ids)}:
                self.seen |= {name: at for name, at in ids.items() if isinstance(at, float)}

    def change(self, record: dict) -> None:
        """Write a record down, then make its change. Raises OSError when it is not on disk."""
        self.journal.append(record)
        self.apply(record)

    def compact(self) -> None:
        """Leave in the file what is open, and the ids that may come again."""
        latest = time.time() - KEEP
        self.seen = {name: at for name, at in self.seen.items() if at > latest}
        records = [{"type": "message", "message": asdict(each)} for each in self.open.values()]
        records += [{"type": "answer", "id": n, "text": t} for n, t in self.answers.items()]
        records.append({"type": "seen", "ids": self.seen})
        path = self.journal.path
        del self.journal  # that closes it: Windows replaces no file that is open
        with suppress(OSError):  # of a full disk: it can wait
            rewrite_journal(path, records)
        self.journal = Journal(path)

    def put(self, message: InboundMessage) -> None:
        """Take a message, unless it was here before. Raises OSError, and has not taken it."""
        with self.lock:
            if not self.seen.keys() & set(message.ids):
                self.change({"type": "message", "message": asdict(message)})
                self.queue.put(message)
                if self.journal.written > 1000 + 4 * len(self.open):  # most of it is over
                    self.compact()

    def note(self, message: InboundMessage, **about: str) -> None:
        """Write down what became of a message: type="answer" with the text to send, or "done"."""
        with self.lock:
            self.change({"id": message.ids[0], **about})


def restore(journal: Journal, apply: Callable[[dict], None]) -> None:
    """Apply the records of a journal that will be rewritten; what is damaged is kept in a copy."""
    damaged, path = False, journal.path
    for half in path.parent.glob(f".{'?' * 16}.tmp"):  # a crash came while a file was replaced
        half.unlink()
    for record in journal.replay():
        try:
            apply(record)
        except TypeError:  # not the fields of a message
            record = {}
        damaged |= not record
    if damaged:
        shutil.copy2(path, f"{path}.damaged")
        show(f"[{path.name}: what could not be read is in {path.name}.damaged]\n")


def rewrite_journal(path: Path, records: list[dict]) -> None:
    """Put a file with these records in place of a journal that nobody has open, and sync both."""
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Get a folder onto the disk: which files it has, and their names."""
    with suppress(OSError):  # Windows opens no folder
        folder = os.open(path, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


class ChannelError(Exception):
    """A text was not sent: it never will be (`permanent`), or not for `retry_after` seconds."""

    def __init__(self, told: object, permanent: bool = False, retry_after: float = 0) -> None:
        super().__init__(told)
        self.permanent, self.retry_after = permanent, retry_after


@dataclass
class ChannelAccount:
    """One login at a platform: TELEGRAM_BOT_TOKEN is default's, TELEGRAM_BOT_TOKEN_WORK work's."""

    channel: str
    id: str = "default"

    def __str__(self) -> str:
        return f"{self.channel} {self.id}"

    def get(self, name: str, otherwise: str = "") -> str:
        """What the environment says of the account."""
        name = f"{self.channel}_{name}" + ("" if self.id == "default" else f"_{self.id}")
        return os.getenv(name.upper(), "").strip() or otherwise

    def hide(self, text: str) -> str:
        """A text without the platform's secrets, in one line."""
        for name, value in os.environ.items():
            if value.strip() and name.startswith(self.channel.upper()) and SECRET.search(name):
                text = text.replace(value.strip(), "***")
        return " ".join(text.split())


class Channel:
    """A way to people: `start` begins to receive, `send` returns when the platform has a text."""

    name = ""
    setting = ""  # an account is there when it has this one
    library = ""  # imported before the threads run
    limit = 4000  # UTF-16 units in a text
    is_keyed = False  # what is sent again with its key does not come twice

    def __init__(self, app: "App", account: ChannelAccount) -> None:
        self.app, self.account = app, account
        self.status = "starting"
        self.told: set[str] = set()

    def start(self) -> None:
        """Begin to receive. Raises what speaks against it."""
        raise NotImplementedError

    def allows(self, message: InboundMessage) -> bool:
        """Whether anybody is listened to where a message comes from; a topic is in its chat."""
        allowed = self.account.get("ALLOWED_CHATS").replace(",", " ").split()
        return message.peer.split(":")[0] in allowed

    def receive(self, message: InboundMessage) -> None:
        """Take what came in, on disk when this returns; not from strangers, and not twice."""
        message = replace(message, text=plain(message.text), sender=plain(message.sender))
        if self.allows(message):
            self.app.inbox.put(message)
        else:
            chat = message.peer.split(":")[0]
            self.tell(f"{message.sender} wrote from {chat}, not in ..._ALLOWED_CHATS", once=True)

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Send one piece of text, at most once for a `key` where possible. Raises ChannelError."""
        raise NotImplementedError

    def stream(self, peer: str, piece: str) -> None:
        """Show a piece of an answer that is still being written, where that can be done."""

    def typing(self, peer: str) -> AbstractContextManager:
        """Show, as long as this is entered, that an answer is being written."""
        return nullcontext()

    def tell(self, text: str, once: bool = False) -> None:
        """Say something of this channel at the terminal; `once` if strangers can cause it."""
        line = self.account.hide(text)
        if once and (line in self.told or len(self.told) > 1000):
            return
        self.told |= {line} if once else set()
        self.app.cli.send("", f"[{self.account}] {line[:300]}{'...' * (len(line) > 300)}")

    def report(self, status: str) -> None:
        """Note how the channel is; a change is told."""
        status, before = self.account.hide(status), self.status
        self.status = status
        if status != before:
            self.tell(status)

    def run(self) -> None:
        """Start, then send what is queued: the channel's own thread, so that no turn waits."""
        try:
            self.insist(self.start)
        except Exception as error:  # whatever it is, the other channels go on
            return self.report(f"off: {error or type(error).__name__}")
        return DeliveryRunner(self, self.app.delivery).run()

    def insist(self, step: Callable) -> None:
        """Take a step, again and again while it fails for a time. Raises ChannelError after all."""
        for attempt in count():
            try:
                step()
                break
            except ChannelError as error:
                if error.permanent:
                    raise
                if attempt == 0:
                    self.tell(f"{error}; trying again")
                time.sleep(error.retry_after or min(2**attempt, 60))


def chunk_message(text: str, limit: int) -> list[str]:
    """A text in pieces of at most `limit` UTF-16 units, cut between paragraphs, lines or words."""
    pieces = []
    while text:
        head, text = cut_piece(text, limit)
        pieces.append(head)
    return [piece for piece in pieces if piece.strip()] or ["(an empty answer)"]


class CLIChannel(Channel):
    """The terminal. What others say is printed above the line that is being typed."""

    name = "cli"
    prompt = "you> "

    def __init__(self, app: "App", account: ChannelAccount) -> None:
        super().__init__(app, account)
        self.status = "on"
        self.lock = threading.Lock()
        self.prompting, self.held = False, ""

    def read(self) -> str:
        """The next line. Raises EOFError when there is none, KeyboardInterrupt at Ctrl-C."""
        with self.lock:
            show(self.held)
            self.prompting, self.held = True, ""
        try:
            return input(self.prompt)
        finally:
            with self.lock:  # what is just being printed above the line comes to its end
                self.prompting = False

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Print a text: at once if the prompt is waiting, else before it comes again."""
        with self.lock, suppress(OSError):  # nobody may be reading
            if not self.prompting:
                self.held += text + "\n"
            elif not (sys.stdin.isatty() and sys.stdout.isatty()):
                show(text + "\n")
            else:
                line = self.prompt + typed_line()
                rows, column = cursor_after(line, shutil.get_terminal_size().columns)
                print(f"\r\x1b[{rows}A" if rows else "\r", end="\x1b[J")  # to its start, and erase
                show(f"{text}\n{line}")
                print("" if column else " \r", end="", flush=True)  # a full row is left only now

    def stream(self, peer: str, piece: str) -> None:
        show(piece)

    def message(self, text: str) -> InboundMessage:
        """What the person at the terminal said; no inbox needs to keep it."""
        return InboundMessage(self.name, self.account.id, "", text, [os.urandom(6).hex()])


def typed_line() -> str:
    """What has been typed and not entered. It is copied first: readline's own get_line_buffer
    decodes it in place, and the C library ends the process if a key comes in that moment."""
    if "readline" not in sys.modules:
        return ""
    import ctypes

    library = ctypes.CDLL(getattr(sys.modules["readline"], "__file__", None))
    line = ctypes.c_char_p.in_dll(library, "rl_line_buffer").value or b""
    return line.decode(sys.stdin.encoding, "replace")


def cursor_after(line: str, columns: int) -> tuple[int, int]:
    """The row and column in which the cursor stands when a terminal has shown a line."""
    row = column = 0
    for character in line:
        width = 1 + (unicodedata.east_asian_width(character) in "WF")
        if column + width > columns:
            row, column = row + 1, 0
        column += 0 if unicodedata.combining(character) else width
    return (row + 1, 0) if column == columns else (row, column)


class LoopThread:
    """A background thread with an asyncio event loop: the home of the asynchronous libraries."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def begin(self, coroutine: Coroutine) -> Future:
        """Run a coroutine there; the future can be waited for or cancelled from here."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)


class TelegramChannel(Channel):
    """A Telegram bot, by long polling. An update is confirmed when the inbox has it on disk."""

    name = "telegram"
    setting = "BOT_TOKEN"
    library = "telegram"
    bot = None

    def start(self) -> None:
        os.environ["PTB_TIMEDELTA"] = "1"  # else retry_after warns that it will be one
        import telegram

        for logger in ("httpx", "telegram"):  # their lines hold the token
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        self.errors = telegram.error
        base = self.account.get("BASE_URL", "https://api.telegram.org").rstrip("/")
        for other in self.app.channels.channels.values():
            if other is self:
                break
            if other.account.get("BOT_TOKEN") == self.account.get("BOT_TOKEN"):
                raise ChannelError(f"{other.account} has this bot already", permanent=True)
        self.bot = telegram.Bot(self.account.get("BOT_TOKEN"), base_url=f"{base}/bot")
        self.app.loop.begin(self.poll())

    async def poll(self) -> None:
        """Fetch updates for ever, whatever the network does."""
        offset, pause = None, 1
        while True:
            try:
                await self.bot.initialize()
                updates = await self.fetch(offset)
                offset = await asyncio.to_thread(self.take, updates) or offset
                pause = 1
                self.report(f"on, as @{self.bot.username}")
                continue
            except (self.errors.InvalidToken, self.errors.Forbidden):
                self.report("off: the bot's token was refused; trying again every minute")
                pause = 60
            except self.errors.Conflict:
                self.report("another process polls this bot (409): stop it; trying again")
            except Exception as error:  # of the network, or of the disk
                self.report(f"no contact ({type(error).__name__}: {error}); trying again")
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30)

    async def fetch(self, offset: int | None) -> list:
        """The next updates; with an album or a split paste, what still belongs to it, too."""
        wait = 25 if self.status.startswith("on") else 0  # then its first success is told at once
        updates = await self.bot.get_updates(offset, timeout=wait, allowed_updates=["message"])
        for _ in range(6):  # who goes on and on keeps the others waiting no longer
            before, pause = len(updates), max(map(self.goes_on, updates), default=0)
            if pause:
                await asyncio.sleep(pause)
                updates = await self.bot.get_updates(offset, allowed_updates=["message"])
            if len(updates) == before:
                break
        return updates

    def goes_on(self, update: object) -> float:
        """For how many seconds more may follow that belongs to an update."""
        message = update.message
        if message is None:
            return 0
        return 0.5 if message.media_group_id else 1.5 * (len(message.text or "") >= LONG_TEXT)

    def take(self, updates: list) -> int | None:
        """Put updates into the inbox, what belongs together as one. Returns the next offset."""
        new = {self.id_of(update.message): update for update in updates if update.message}
        groups: list[list] = []
        for name, update in new.items():
            if name not in self.app.inbox.seen:
                group = next((g for g in reversed(groups) if follows(g, update)), None)
                if group is None:
                    groups.append(group := [])
                group.append(update)
        after = updates[-1].update_id + 1 if updates else None
        if len(updates) == 100:  # Telegram's most: there may be more, so what goes on comes again
            first = updates[0].update_id
            parts = [g[0].update_id for g in groups if self.goes_on(g[-1])]
            after = min((number for number in parts if number > first), default=after)
            groups = [group for group in groups if group[0].update_id < after]
        for group in groups:
            try:
                if message := self.read([update.message for update in group]):
                    self.receive(message)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                self.tell(f"an update was skipped: {error!r}")  # else it would come for ever
        return after

    def id_of(self, message: object) -> str:
        return f"telegram:{self.bot.id}:{message.chat.id}:{message.message_id}"

    def read(self, parts: list) -> InboundMessage | None:
        """What a person said in one message or the parts of one; None if it is not for the bot."""
        first, user = parts[0], parts[0].from_user
        joint = "\n" if first.media_group_id else ""
        text = joint.join(part.text or part.caption or "" for part in parts).strip()
        if media := sum(bool(part.effective_attachment) for part in parts):
            text = f"{text}\n[{media} attached, not shown to you]".strip()
        group = first.chat.type != "private"
        if not text or (user and user.is_bot and not first.sender_chat):  # a hidden admin is one
            return None
        if group and not any(map(self.is_called, parts)):
            return None
        text = re.sub(rf"@{self.bot.username}\b", "", text, flags=re.IGNORECASE).strip() or text
        at = first.message_thread_id if first.is_topic_message else 1 if first.chat.is_forum else ""
        peer = f"{first.chat.id}:topic:{at}" if at else str(first.chat.id)
        ids, kind = [self.id_of(part) for part in parts], "group" if group else "direct"
        name = user.full_name if user and not first.sender_chat else "someone"
        return InboundMessage(self.name, self.account.id, peer, text, ids, kind, name)

    def is_called(self, message: object) -> bool:
        """Whether a group message is meant for the bot: names it, or answers it."""
        called = message.parse_entities() | message.parse_caption_entities()
        names = (f"@{self.bot.username}".lower(), f"tg://user?id={self.bot.id}")
        for entity, text in called.items():
            if text.lower().endswith(names) or (entity.user and entity.user.id == self.bot.id):
                return True
        answered = message.reply_to_message
        if not answered or answered.forum_topic_created:  # all in a topic answers its first message
            return False
        return bool(answered.from_user and answered.from_user.id == self.bot.id)

    def send(self, peer: str, text: str, key: str = "") -> None:
        chat, _, topic = peer.partition(":topic:")
        thread = int(topic) if topic and topic != "1" else None  # General's must not be named
        sending = self.bot.send_message(chat, text, message_thread_id=thread, read_timeout=30)
        future = self.app.loop.begin(sending)
        try:
            future.result(60)
        except self.errors.RetryAfter as error:
            raise ChannelError(error, retry_after=error.retry_after.total_seconds()) from None
        except self.errors.ChatMigrated as error:
            self.send(str(error.new_chat_id), text)
        except (self.errors.TelegramError, TimeoutError) as error:  # it may have arrived after all
            future.cancel()
            refused = isinstance(error, self.errors.BadRequest) or "Forbidden: " in str(error)
            raise ChannelError(str(error) or "no answer", permanent=refused) from None

    def typing(self, peer: str) -> AbstractContextManager:
        until = ExitStack()
        until.callback(self.app.loop.begin(self.keep_typing(peer)).cancel)
        return until

    async def keep_typing(self, peer: str) -> None:
        """Telegram shows it for five seconds at most."""
        chat, _, topic = peer.partition(":topic:")
        while self.bot is None:  # a turn of the last run may go on before the start is done
            await asyncio.sleep(0.1)
        while True:
            with suppress(self.errors.TelegramError):
                thread = int(topic) if topic else None
                await self.bot.send_chat_action(chat, "typing", message_thread_id=thread)
            await asyncio.sleep(4)


def follows(group: list, update: object) -> bool:
    """Whether an update goes on with others: the same album, or the next part of a split paste."""
    last, message = group[-1].message, update.message
    for part in ("chat", "from_user", "message_thread_id", "media_group_id"):
        if getattr(last, part) != getattr(message, part):
            return False
    return bool(message.media_group_id) or (
        len(last.text or "") >= LONG_TEXT
        and message.text is not None
        and message.message_id == last.message_id + 1
        and (message.date - last.date).total_seconds() <= 2
        and len(group) < 12
    )


class FeishuChannel(Channel):
    """A Feishu or Lark app: its events come to a webhook on loopback, texts go to its HTTP API."""

    name = "feishu"
    setting = "APP_ID"
    library = "httpx"
    is_keyed = True
    quiet_until = 0.0

    def start(self) -> None:
        import httpx

        for name in ("APP_SECRET", "VERIFICATION_TOKEN"):
            if not self.account.get(name):
                raise ChannelError(f"its FEISHU_{name} is not set", permanent=True)
        domain = self.account.get("DOMAIN", "feishu")
        self.http = httpx.Client(base_url=FEISHU_DOMAINS.get(domain, domain), timeout=10)
        self.token, self.renewal, self.no_network = "", 0.0, httpx.HTTPError
        self.bot_id = self.call("GET", "/open-apis/bot/v3/info")["bot"]["open_id"]
        port = self.account.get("PORT", "3000")
        if not port.isdecimal() or int(port) > 65535:
            raise ChannelError(f"its FEISHU_PORT is no port: {port!r}", permanent=True)
        server = FeishuServer(("127.0.0.1", int(port)), FeishuWebhook)
        server.channel = self
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.report(f"on, at http://127.0.0.1:{server.server_port}/feishu/events")

    def call(self, method: str, path: str, **request: object) -> dict:
        """One call of the API; a token that is refused is renewed once. Raises ChannelError."""
        left = self.quiet_until - time.monotonic()
        if left > 0:  # the limit is the app's, not one recipient's
            raise ChannelError("Feishu's rate limit", retry_after=left)
        for last in (False, True):
            headers = {} if path == FEISHU_TOKEN else {"Authorization": f"Bearer {self.tenant()}"}
            try:
                reply = self.http.request(method, path, headers=headers, **request)
                data = {} | reply.json()
            except (self.no_network, TypeError, ValueError) as error:
                raise ChannelError(f"{type(error).__name__}: {error}") from None
            code = data.get("code")
            if code == 0:
                return data
            if code not in FEISHU_TOKEN_CODES or last:
                break
            self.renewal = 0
        limited = reply.status_code == 429 or code in FEISHU_RATE_CODES
        wait = reply.headers.get("x-ogw-ratelimit-reset", "") if limited else ""
        if wait.isdecimal():
            self.quiet_until = time.monotonic() + float(wait)
        raise ChannelError(
            f"{code} {data.get('msg')}",
            permanent=code in FEISHU_NEVER,
            retry_after=float(wait) if wait.isdecimal() else 0,
        )

    def tenant(self) -> str:
        """The tenant token, renewed ten minutes before its end."""
        if time.monotonic() >= self.renewal:
            app = {f"app_{part}": self.account.get(f"APP_{part}") for part in ("id", "secret")}
            data = self.call("POST", FEISHU_TOKEN, json=app)
            self.token = data["tenant_access_token"]
            self.renewal = time.monotonic() + data["expire"] - 600
        return self.token

    def take(self, headers: Mapping, body: bytes) -> dict:
        """What to answer to a request. Raises PermissionError if it is not from the platform."""
        event = self.unseal(headers, body)
        if event.get("type") == "url_verification":
            return {"challenge": event["challenge"]}
        if message := self.read(event):
            self.receive(message)
        return {}

    def unseal(self, headers: Mapping, body: bytes) -> dict:
        """The event in a request. Raises PermissionError unless the platform sent it, just now."""
        secret, event = self.account.get("ENCRYPT_KEY"), json.loads(body)
        if ("encrypt" in event) != bool(secret):
            raise PermissionError("an event is encrypted if and only if FEISHU_ENCRYPT_KEY is set")
        if secret:
            event = json.loads(decrypt(secret, event["encrypt"]))
        is_challenge = event.get("type") == "url_verification"
        token = event["token"] if is_challenge else event["header"]["token"]
        if not same(token, self.account.get("VERIFICATION_TOKEN")):
            raise PermissionError("the verification token is not FEISHU_VERIFICATION_TOKEN")
        if secret and not is_challenge:  # challenges are not signed
            stamp = headers.get("X-Lark-Request-Timestamp", "")
            signed = f"{stamp}{headers.get('X-Lark-Request-Nonce', '')}{secret}".encode() + body
            seal = hashlib.sha256(signed).hexdigest()
            if not same(headers.get("X-Lark-Signature", ""), seal):
                raise PermissionError("the signature of an event is wrong")
            if abs(time.time() - float(stamp)) > 3600:
                raise PermissionError("an event was signed over an hour ago, or the clock is wrong")
        return event

    def read(self, event: dict) -> InboundMessage | None:
        """What a person said; None for other events, and in a group unless the bot is named."""
        if event["header"]["event_type"] != "im.message.receive_v1":
            return None
        message, sender = event["event"]["message"], event["event"]["sender"]
        group, mentions = message["chat_type"] != "p2p", message.get("mentions") or []
        called = self.bot_id in [mention["id"].get("open_id") for mention in mentions]
        if sender["sender_type"] != "user" or (group and not called):
            return None
        text = read_content(message["message_type"], json.loads(message["content"]))
        names = {each["key"]: f"@{each['name']}" for each in mentions}
        names |= {e["key"]: "" for e in mentions if e["id"].get("open_id") == self.bot_id}
        text = re.sub(r"@_user_\d+|@_all", lambda key: names.get(key[0], key[0]), text)
        app, person = self.account.get("APP_ID"), sender["sender_id"]["open_id"]
        names = (message["message_id"], event["header"]["event_id"])
        ids = [f"{self.name}:{app}:{name}" for name in names]
        peer, kind = (message["chat_id"], "group") if group else (person, "direct")
        text = text.strip() or "(nothing but your name)"
        guild = event["header"].get("tenant_key", "")
        return InboundMessage(self.name, self.account.id, peer, text, ids, kind, person, guild)

    def send(self, peer: str, text: str, key: str = "") -> None:
        message = {"receive_id": peer, "msg_type": "text", "content": json.dumps({"text": text})}
        if key:  # what was sent with it within the hour is not sent again
            message["uuid"] = hashlib.sha256(key.encode()).hexdigest()[:40]
        kind = "open_id" if peer.startswith("ou_") else "chat_id"
        self.call("POST", f"/open-apis/im/v1/messages?receive_id_type={kind}", json=message)


class FeishuServer(ThreadingHTTPServer):
    """A thread for each connection, of MAX_CONNECTIONS at most: the oldest one makes room."""

    request_queue_size = 128

    def __init__(self, *about: object) -> None:
        super().__init__(*about)
        self.places = threading.Semaphore(MAX_CONNECTIONS)
        self.connections: dict[socket.socket, None] = {}

    def process_request(self, request: socket.socket, address: object) -> None:
        """Begin a connection's thread, when there is a place for it."""
        if not self.places.acquire(blocking=False):
            for oldest in list(self.connections)[:1]:
                cut_off(oldest)
            self.places.acquire()
        self.connections[request] = None
        super().process_request(request, address)

    def shutdown_request(self, request: socket.socket) -> None:
        """End a connection, which gives its place back."""
        super().shutdown_request(request)
        if self.connections.pop(request, 0) is None:
            self.places.release()

    def handle_error(self, *about: object) -> None:
        """Nothing: the client is gone."""


class FeishuWebhook(BaseHTTPRequestHandler):
    """Answers Feishu at once: what its events ask for is done elsewhere."""

    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        """A request, which has to be there whole in time: however slowly it drips, it ends."""
        timer = threading.Timer(MAX_REQUEST, cut_off, [self.connection])
        timer.start()
        try:
            super().handle_one_request()
        finally:
            timer.cancel()

    def do_POST(self) -> None:
        channel, length = self.server.channel, self.headers.get("Content-Length", "")
        status, answer = 404, {}
        if self.path.partition("?")[0] == "/feishu/events":
            status = 413
            if length.isdecimal() and len(length) < 8 and int(length) <= 1 << 20:
                try:
                    status, answer = 200, channel.take(self.headers, self.rfile.read(int(length)))
                except PermissionError as error:
                    status = 401
                    channel.tell(f"refused: {error}", once=True)
                except OSError as error:  # not on disk: Feishu will bring it again
                    status = 500
                    channel.tell(f"not taken: {error}", once=True)
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    status = 400
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = status != 200

    def log_message(self, *about: object) -> None:
        """Nothing: what matters is told by the channel."""


def cut_off(connection: socket.socket) -> None:
    """End a connection on which another thread may be reading."""
    with suppress(OSError):  # it has ended
        connection.shutdown(socket.SHUT_RDWR)


def same(told: object, secret: str) -> bool:
    """Whether somebody knows a secret; the time this takes tells nothing."""
    return hmac.compare_digest(str(told).encode("utf-8", "replace"), secret.encode())


def decrypt(secret: str, sealed: str) -> bytes:
    """What Feishu encrypted: AES-256-CBC, the key is the hash of a secret. Raises ValueError."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers import algorithms
    from cryptography.hazmat.primitives.ciphers import modes
    from cryptography.hazmat.primitives.padding import PKCS7

    data, key = base64.b64decode(sealed), hashlib.sha256(secret.encode()).digest()
    cipher = Cipher(algorithms.AES(key), modes.CBC(data[:16])).decryptor()
    padding = PKCS7(128).unpadder()
    return padding.update(cipher.update(data[16:]) + cipher.finalize()) + padding.finalize()


def read_content(kind: str, content: dict) -> str:
    """The text of a Feishu message: of a text or a post, else a word on what it is."""
    if kind == "text":
        return content["text"]
    if kind != "post":
        return f"[{kind}, not shown to you]"
    lines = [[{"text": content.get("title", "")}], *content["content"]]
    words = ("".join(i.get("text") or i.get("user_id") or "" for i in line) for line in lines)
    return "\n".join(words).strip()


CHANNELS: list[type[Channel]] = [
    TelegramChannel,
    FeishuChannel,
]


class ChannelManager:
    """The channels that are configured, each in a thread of its own."""

    def __init__(self, app: "App") -> None:
        self.channels: dict[tuple[str, str], Channel] = {("cli", "default"): app.cli}
        for kind in CHANNELS:
            pattern = f"{kind.name}_{kind.setting}(?:|_(.+))".upper()
            for name, value in sorted(os.environ.items()):
                if value.strip() and (match := re.fullmatch(pattern, name)):
                    account = ChannelAccount(kind.name, (match[1] or "default").lower())
                    self.channels[kind.name, account.id] = kind(app, account)
                    with suppress(ImportError, ValueError):  # its start will tell, or needs none
                        import_module(kind.library)  # now: two threads in one import may fail

    def find(self, message: InboundMessage) -> Channel | None:
        """The channel that a message came from, if it is still configured."""
        return self.channels.get((message.channel, message.account))

    def start(self) -> None:
        for channel in self.channels.values():
            if channel.name != "cli":
                threading.Thread(target=channel.run, daemon=True).start()


class App:
    """The whole program: one brain, many mouths."""

    def __init__(self, agent: Agent) -> None:
        agent.app, self.agent, self.lane = self, agent, threading.Lock()
        self.from_afar = "always" if agent.approval == "always" else "never"
        self.cli = CLIChannel(self, ChannelAccount("cli"))
        self.sessions = weakref.WeakValueDictionary({agent.key: agent.messages})
        self.recent: deque[Session] = deque(maxlen=MAX_OPEN)
        self.channels = ChannelManager(self)
        self.gateway = GatewayServer(self)
        self.channels.channels["web", "default"] = self.gateway
        self.agents = AgentManager(agent.workspace)
        self.settings, self.forced = agent.settings, ""
        self.opening = threading.Lock()
        self.skills = SkillsManager(agent.workspace)
        self.memories: dict[str, MemoryStore] = {}
        self.told: dict[str, tuple[str, ...]] = {}
        try:
            self.bindings = BindingTable(agent.workspace / "bindings.jsonl", self.agents.agents)
            self.inbox = Inbox(agent.workspace / ".inbox.jsonl")
            self.log = RunLog(agent.workspace / "cron" / "cron-runs.jsonl")
            self.delivery = DeliveryQueue(agent.workspace / "delivery-queue" / "queue.jsonl")
        except OSError as error:
            sys.exit(f"the workspace cannot be used: {error}")
        self.lane, self.clock = Lane(lambda: not self.inbox.queue.empty()), Clock()
        try:
            self.profiles = ProfileManager(agent)
            self.resilience = ResilienceRunner(self.profiles)
            self.heartbeat = HeartbeatRunner(self, self.clock, self.log)
            self.cron = CronService(self, self.clock, self.log)
        except ValueError as error:
            sys.exit(str(error))

    def start(self) -> None:
        """Start the channels, and work on what they bring."""
        self.loop = LoopThread()
        self.channels.start()
        self.gateway.ready.wait(5)
        threading.Thread(target=self.work, daemon=True).start()
        for runner in (self.heartbeat, self.cron):
            threading.Thread(target=runner.run, daemon=True).start()

    def stop(self, status: int) -> NoReturn:
        """End the process, whatever its threads do: inbox and queue hold what is not done."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not disturb this
        for process in list(RUNNING):
            kill(process)
        self.delivery.close(0.8)  # a text that is on its way may arrive
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)

    def work(self) -> None:
        """Answer what comes in, one message after the other; the outermost loop of its thread."""
        while True:
            self.attend(self.inbox.queue.get())
            while not self.cli.prompting:  # the terminal is next; a lock alone is not fair
                time.sleep(0.01)

    def attend(self, message: InboundMessage) -> None:
        """Answer a message; whatever goes wrong, as of a full disk, it stays in the inbox."""
        try:
            channel = self.channels.find(message)
            if channel is None or not channel.allows(message):
                return  # until it is configured again
            text = self.inbox.answers.get(message.ids[0])
            if text is not None:  # s04 to s07 left it: it was not sent for sure
                self.reply(message, text)
            elif self.delivery.has(message.ids[0]):  # the last run ended before it noted that
                self.inbox.note(message, type="done")
            else:
                channel.tell(f"{message.sender or message.peer}: {message.text}")
                self.handle(message)
        except Exception as error:
            self.cli.send("", f"[not answered: {explain(error)}]")

    def handle(self, message: InboundMessage) -> str:
        """Answer a message in its session, and reply. Returns the answer, or "" without one."""
        channel = self.channels.find(message)
        shown: list[str] = []

        def show_piece(piece: str) -> None:
            shown.append(piece)
            channel.stream(message.peer, piece)
            self.gateway.emit(agent, "delta", text=piece)

        text, command = "", message.text.split()[0]
        with self.lane, channel.typing(message.peer):
            agent = self.agent_for(message)
            agent.show = show_piece
            self.gateway.begin(agent, message)
            self.note_owner(message)
            if command not in FROM_AFAR or not run_command(agent, message.text):
                self.recall(agent, message)
                window = agent.guard.limit(agent)
                text = answer(agent, message.said, message.ids[0])
                if not text and agent.guard.limit(agent) < min(window, SMALL_WINDOW):
                    agent.system = self.system_prompt(agent, message)  # a refusal taught how small
                    self.recall(agent, message)
                    text = answer(agent, message.said, message.ids[0])
            self.sessions[agent.key] = agent.messages
            told = text or re.sub(r"https?://\S+", "its server", shown[-1].strip())  # or why not
            if channel is not self.cli:
                self.reply(message, told)
            self.gateway.end(agent, message, told)
        return text

    def ask(self, text: str) -> str:
        """Answer a line from the terminal, in this thread: Ctrl-C ends the turn or the wait."""
        try:
            return self.handle(self.cli.message(text))
        except (KeyboardInterrupt, OSError) as error:
            show(f"[{explain(error)}]")
            return ""

    def command(self, text: str) -> bool:
        """Run a command from the terminal, between two turns; False if there is none."""
        if not text.startswith("/") or text.split()[0] not in COMMANDS:
            return False
        try:
            with self.lane:
                agent = self.agent_for(self.cli.message(text))
                agent.show = show
                run_command(agent, text)
                self.sessions[agent.key] = agent.messages
        except (KeyboardInterrupt, OSError) as error:
            show(f"[{explain(error)}]\n")
        return True

    def agent_for(self, message: InboundMessage) -> Agent:
        """The agent that answers a message, in the session that the message belongs to."""
        agent = self.agent
        if message.channel != "cli":
            agent = copy(agent)
            agent.approval = self.from_afar
        config, key, _ = self.route(message)
        agent.messages, agent.key = self.session(key), key
        agent.store, agent.system = self.agents.store(config.id), config.prompt
        agent.settings = self.settings | ({"model": config.model} if config.model else {})
        agent.system = self.system_prompt(agent, message)
        agent.messages.fixed = estimate(TOOLS) + estimate(agent.system)
        return agent

    def home(self, agent: Agent) -> Path:
        """The folder of an agent's own files: the workspace for main, agents/<id> in it else."""
        name = agent.key.split(":")[1]
        return agent.workspace if name == "main" else agent.workspace / "agents" / name

    def loader(self, agent: Agent) -> "BootstrapLoader":
        """What reads an agent's files: those of its home, and the workspace's for the rest."""
        return BootstrapLoader([self.home(agent), agent.workspace])

    def memory(self, agent: Agent) -> "MemoryStore":
        """The notes of an agent."""
        name, model = agent.key.split(":")[1], os.getenv("EMBEDDING_MODEL", "").strip()
        with self.opening:
            if name not in self.memories:
                home = self.home(agent)
                self.memories[name] = MemoryStore(home, agent.workspace, model, self.embed)
            return self.memories[name]

    def embed(self, texts: list[str]) -> list[list[float]]:
        """The vectors of some texts, by EMBEDDING_MODEL. Raises OpenAIError."""
        model = os.getenv("EMBEDDING_MODEL", "").strip()
        client = self.agent.client.with_options(timeout=10)
        try:
            reply = client.embeddings.create(input=texts, model=model, encoding_format="float")
            return [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # an odd reply
            raise openai.OpenAIError(f"no vectors came: {error}") from None

    def report(self, about: str, *problems: str) -> None:
        """Tell at the terminal what is wrong about something now, of each once while it lasts."""
        before, self.told[about] = self.told.get(about, ()), problems
        for line in dict.fromkeys(problems):
            if line not in before:
                self.cli.send("", f"[{line}]")

    def look_up(self, agent: Agent, query: str, limit: int, least: float = 0) -> str:
        """The notes that fit a query, as a text."""
        memory = self.memory(agent)
        hits = memory.search(query, limit)
        problems = [memory.problem, *memory.odd.values()]
        self.report(f"notes of {agent.key.split(':')[1]}", *filter(None, problems))
        return "\n\n".join(str(hit) for hit in hits if hit.score >= least)

    def recall(self, agent: Agent, message: InboundMessage) -> None:
        """Add what belongs to one message alone: the notes that fit it, the skill that it calls."""
        if skill := self.skills.find(message.text):
            text = cut_tokens(load_text(skill.file), agent.guard.limit(agent) // 2)
            agent.system += (
                f"\n\n<skill file={self.skills.location(skill.file)!r}>\n{text}\n</skill>"
            )
        elif message.kind == "direct" and agent.guard.limit(agent) >= SMALL_WINDOW:
            try:
                found = self.look_up(agent, message.text, 3, RECALL_SCORE)
            except Exception as error:  # whatever it is, it must not cost the answer
                found = ""
                self.report("memory", f"memory: {explain(error)}")
            if found:
                agent.system += f"\n\n<recalled>\nNotes that may fit:\n\n{found}\n</recalled>"
        agent.messages.fixed = estimate(TOOLS) + estimate(agent.system)

    def system_prompt(self, agent: Agent, message: InboundMessage, mode: str = "") -> str:
        """The system prompt for a message, from the files as they are now: the first that fits."""
        window = agent.guard.limit(agent)
        for name in [mode] if mode else list(ROOM)[window < SMALL_WINDOW :]:  # full in a large one
            text = self.fill_prompt(agent, message, name, min(MAX_PROMPT, int(window * ROOM[name])))
            if estimate(text) <= window * ROOM[name] / (4 if name == "full" else 2):
                break
        if not mode and window >= SMALL_WINDOW:
            about = f"prompt of {agent.key.split(':')[1]}"
            told = f"the {about} would fill half of the window, so it is {name}"
            self.report(about, *[f"{told}: see /bootstrap, /skills"] * (name != "full"))
        return text

    def fill_prompt(self, agent: Agent, message: InboundMessage, mode: str, room: int) -> str:
        """The prompt of a mode; the files may fill so many characters."""
        loader = self.loader(agent)
        files = loader.load(mode, room)
        if message.kind == "group":  # they are for one person's eyes
            files["MEMORY.md"] = files["USER.md"] = ""
        config, where = self.agents.agents[agent.key.split(":")[1]], self.channels.find(message)
        parts = {
            "identity": config.prompt,
            "skills": self.skills.list(),
            "notes": KEEP_NOTES if message.kind == "direct" else "",
            "runtime": f"agent {config.id}, model {agent.settings['model']}, {platform.system()}, "
            f"workspace {agent.workspace}, {datetime.now().astimezone():%A %Y-%m-%d, UTC%z}",
            "channel": f"You answer on {message.channel}, {message.kind}.",
        }
        if where and where is not self.cli:
            parts["channel"] += f" Plain text; from {where.limit:,} characters on it is cut."
        if mode == "full" or agent.guard.limit(agent) < SMALL_WINDOW:  # the first that is tried
            self.report(f"files of {config.id}", *loader.problems)
            self.report("skills", *self.skills.problems)
        return build_system_prompt(files, parts, mode)

    def route(self, message: InboundMessage) -> tuple["AgentConfig", str, "Binding | None"]:
        """The agent for a message, the key of its session, and the binding that decided."""
        known = (message.channel, message.account, message.peer, message.guild)
        binding = self.bindings.resolve(*known)
        name = binding.agent if binding else "main"
        if message.channel == "cli":
            name = self.forced or name
        config = self.agents.agents[name]
        return config, build_session_key(name, message, config.dm_scope), binding

    def session(self, key: str, create: bool = True) -> Session | None:
        """The session of a key: one object, as long as anybody uses it."""
        store = self.agents.store(key.split(":")[1])
        with self.opening:
            session = self.sessions.get(key)
            if session is None:
                if not create and key not in store.read_index():
                    return None
                session = self.sessions[key] = store.resume(key)
            self.recent.append(session)
        return session

    def reply(self, message: InboundMessage, text: str) -> None:
        """Write an answer down, and let its channel send it."""
        self.deliver(message, text)
        self.inbox.note(message, type="done")

    def deliver(self, message: InboundMessage, text: str) -> None:
        """Queue a text for who wrote a message, once for its id; on disk when this returns."""
        channel = self.channels.find(message)
        place = (message.channel, message.account, message.peer)
        pieces = chunk_message(plain(text), channel.limit)
        self.delivery.enqueue(QueuedDelivery(message.ids[0], *place, pieces))
        channel.tell(f"to {message.sender or message.peer}: {text}")

    def note_owner(self, message: InboundMessage) -> None:
        """Note where the owner was last: OWNER (telegram:42), or who wrote last, not in a group."""
        place, here = replace(message, text="", ids=[""]), f"{message.channel}:{message.peer}"
        is_owner = (os.getenv("OWNER", "").strip() or here) == here and message.kind == "direct"
        if is_owner and place != self.log.owner:
            with suppress(OSError):  # the answer matters more
                self.log.record("owner", message=asdict(place))

    def announce(self, title: str, text: str) -> None:
        """Tell what nobody asked for: at the terminal at once, and where the owner was last."""
        self.cli.send("", f"[{title}] {text}")
        owner, wanted = self.log.owner, os.getenv("OWNER", "").strip()
        if wanted and (not owner or wanted != f"{owner.channel}:{owner.peer}"):
            name, _, peer = wanted.partition(":")
            owner = InboundMessage(name, "default", peer, "", [""])
        channel = self.channels.find(owner) if owner else None
        if channel and channel is not self.cli and channel.allows(owner):
            message = replace(owner, ids=[f"{title}:{os.urandom(8).hex()}"])
            self.deliver(message, text)
            agent = copy(self.agent)
            agent.key = self.route(message)[1]
            self.gateway.emit(agent, "message", role="assistant", text=text)

    def think(self, name: str, text: str, agent_id: str = "main") -> str:
        """One turn without anybody there, in a session of its own; the caller has the lane."""
        agent, config = copy(self.agent), self.agents.agents[agent_id]
        agent.key, agent.approval = f"agent:{agent_id}:{name}", self.from_afar
        agent.store, agent.show = self.agents.store(agent_id), lambda piece: None
        agent.settings = self.settings | ({"model": config.model} if config.model else {})
        safe = normalize_agent_id(name)
        safe += f"-{zlib.crc32(name.encode()):08x}" * (safe != name)  # 早 and 晚 are not one
        file = agent.store.folder / f"{safe}.jsonl"
        file.unlink(missing_ok=True)  # that of the last time
        agent.messages = Session(Journal(file))
        agent.messages.change({"type": "session", "version": 1, "key": agent.key, "label": name})
        message = InboundMessage("timer", "", "", text, [""])
        agent.system = self.system_prompt(agent, message)
        self.recall(agent, message)
        agent.messages.append({"role": "user", "content": text})
        return agent_turn(agent)


@command("/channels", "the channels, and how they are")
def show_channels(agent: Agent, rest: str) -> str:
    channels = agent.app.channels.channels.values()
    return "\n".join(f"{channel.account}: {channel.status}" for channel in channels)


@command("/accounts", "the accounts at the platforms, and whom they listen to")
def show_accounts(agent: Agent, rest: str) -> str:
    accounts = [each.account for each in agent.app.channels.channels.values() if each.setting]
    return "\n".join(f"{each}: {each.get('ALLOWED_CHATS') or 'nobody'}" for each in accounts)


# --- s05: gateway and routing ---

TIERS = ("peer", "guild", "account", "channel")
DM_SCOPES = ("main", "per-peer", "per-channel-peer", "per-account-channel-peer")
PEER = re.compile(r"[a-z0-9][a-z0-9_.:@-]{0,127}")  # lower case, as in the keys of sessions
MAX_FRAME = 1 << 20  # bytes
MAX_BATCH = 100
MAX_WAITING = 100  # messages of one web peer
PAGE = Path(__file__).resolve().parent.parent.parent / "workspace" / "webchat.html"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
METHODS: dict[str, tuple[Callable, list[inspect.Parameter]]] = {}


@dataclass(frozen=True)
class Binding:
    """Messages that fit all its fields go to an agent; an empty field fits any."""

    agent: str = ""
    channel: str = ""
    account: str = ""
    peer: str = ""
    guild: str = ""
    priority: int = 0

    @property
    def match(self) -> tuple[str, str, str, str]:
        return self.channel, self.account, self.peer, self.guild

    @property
    def tier(self) -> str:
        return next((tier for tier in TIERS if getattr(self, tier)), "default")

    def __str__(self) -> str:
        fields = (f"{name}={value}" for name, value in asdict(self).items() if value)
        return f"{self.tier:<8} {' '.join(fields)}"


class BindingTable:
    """Which agent a message goes to; a journal, so what is set at run time survives a restart."""

    def __init__(self, path: Path, agents: Container[str]) -> None:
        with open(path, "a+b") as file:  # an editor may have left the last line without its end
            file.seek(0)
            if file.read()[-1:] not in (b"", b"\n"):
                file.write(b"\n")
        self.journal, self.agents, self.lock = Journal(path), agents, threading.Lock()
        self.table: dict[tuple, list[Binding]] = {}
        for number, record in enumerate(self.journal.replay(), 1):
            try:
                self.apply(record)
            except (TypeError, ValueError) as error:
                show(f"[{path.name}, line {number}: {error}]\n")

    def __iter__(self) -> Iterator[Binding]:
        return (binding for row in list(self.table.values()) for binding in row)

    def apply(self, record: dict) -> None:
        """Set or remove what a record says. Raises ValueError or TypeError if it makes no sense."""
        if not record:
            return  # a damaged line
        binding = Binding(**{key: record[key] for key in record if key != "removed"})
        row = [b for b in self.table.get(binding.match, []) if b.priority != binding.priority]
        try:
            self.check(binding, record.get("removed", False))
            if not record.get("removed"):
                row = sorted([*row, binding], key=lambda b: -b.priority)
        finally:  # what it replaces is gone in any case
            self.table[binding.match] = row
            if not row:
                del self.table[binding.match]

    def check(self, binding: Binding, removed: bool = False) -> None:
        """Raise ValueError unless a binding can ever match, and leads to an agent that is there."""
        if not all(isinstance(part, str) for part in (binding.agent, *binding.match)):
            raise ValueError("agent, channel, account, peer and guild must be text")
        if type(binding.priority) is not int:
            raise ValueError("priority must be a whole number")
        if binding.agent not in self.agents and not removed:
            raise ValueError(f"there is no agent {binding.agent!r}")
        if binding.tier != "default" and not binding.channel:
            raise ValueError(f"a binding by {binding.tier} needs a channel")

    def change(self, binding: Binding, removed: bool = False) -> None:
        """Set or remove a binding, on disk first. Raises ValueError, OSError."""
        self.check(binding, removed)
        record = asdict(binding) | ({"removed": True} if removed else {})
        with self.lock:
            self.journal.append(record)
            self.apply(record)

    def resolve(self, channel: str, account: str, peer: str, guild: str = "") -> Binding | None:
        """The binding of the first tier that has one, in it of the highest priority: look-ups only.

        A forum topic (`<chat>:topic:<id>`) fits bindings of its chat, too. Of one priority, the
        binding with more fields wins.
        """
        chats = dict.fromkeys((peer, peer.split(":topic:")[0]))  # of equals the first one wins
        tiers = (
            product([channel], [account, ""], chats, [guild, ""]) if peer else (),
            product([channel], [account, ""], [""], [guild]) if guild else (),
            [(channel, account, "", "")],
            [(channel, "", "", "")],
            [("", "", "", "")],
        )
        for keys in tiers:
            found = [row[0] for key in keys if (row := self.table.get(key))]
            if found:
                return max(found, key=lambda each: (each.priority, sum(map(bool, each.match))))
        return None


@dataclass
class AgentConfig:
    """One agent: who it is, its model (else MODEL_ID), and which direct chats share a session."""

    id: str
    prompt: str = ""
    model: str = ""
    dm_scope: str = "per-account-channel-peer"


class AgentManager:
    """The agents: main, a demo pair, and those of agents.json in the workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, file = workspace, workspace / "agents.json"
        self.agents = {
            "main": AgentConfig("main"),
            "luna": AgentConfig("luna", "You are Luna. You are warm, and you answer in few words."),
            "sage": AgentConfig("sage", "You are Sage. You explain, and you name what you doubt."),
        }
        try:
            text = load_text(file).removeprefix("\ufeff") if file.exists() else "{}"
            listed = {} | json.loads(text)
        except (OSError, RecursionError, TypeError, ValueError) as error:
            listed = {}
            show(f"[agents.json: {error}]\n")
        for name, fields in listed.items():
            try:
                self.add(name, AgentConfig(normalize_agent_id(name), **fields))
            except (TypeError, ValueError) as error:
                show(f"[agents.json, {name}: {error}]\n")

    def add(self, name: str, config: AgentConfig) -> None:
        """Take an agent in. Raises ValueError unless its name and its settings make sense."""
        if config.id == "main" and name.lower() != "main":  # nothing of it was left
            raise ValueError("a name needs letters or digits of a-z 0-9")
        if not all(isinstance(value, str) for value in vars(config).values()):
            raise ValueError("prompt, model and dm_scope must be text")
        if config.dm_scope not in DM_SCOPES:
            raise ValueError(f"dm_scope must be one of {', '.join(DM_SCOPES)}")
        self.agents[config.id] = config

    def store(self, agent_id: str) -> SessionStore:
        return SessionStore(self.workspace / ".sessions" / "agents" / agent_id)

    def sessions(self) -> list[dict]:
        """What each key means now, for all agents."""
        return [
            {"session": key, "agent": name, **entry}
            for name in self.agents
            for key, entry in self.store(name).read_index().items()
        ]


def normalize_agent_id(name: str) -> str:
    """A name as an agent's id: at most 64 of a-z 0-9 _ -, beginning with a letter or digit."""
    return re.sub("[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:64].strip("-_") or "main"


class RpcError(Exception):
    """What a client is told: the code is the specification's."""

    def __init__(self, code: int, told: str) -> None:
        super().__init__(told)
        self.code = code


def method(name: str, like: Callable | None = None) -> Callable:
    """Register a method of the gateway: its params are checked by its signature, or `like`'s."""

    def register(handler: Callable) -> Callable:
        wanted = list(inspect.signature(like or handler).parameters.values())
        METHODS[name] = (handler, wanted if like else wanted[2:])  # without self and client
        return handler

    return register


class GatewayClient(ServerConnection):
    """A connection. Of those that are no open WebSocket yet, the oldest makes room."""

    opening: dict["GatewayClient", None] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.opening[self] = None
        if len(self.opening) > MAX_CONNECTIONS:
            oldest = next(iter(self.opening))
            del self.opening[oldest]
            oldest.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.opening.pop(self, None)
        super().connection_lost(error)


class GatewayServer(Channel):
    """The web chat page and JSON-RPC 2.0 over WebSocket, on loopback, for those with the token."""

    name = "web"
    is_keyed = True

    def __init__(self, app: "App") -> None:
        super().__init__(app, ChannelAccount(self.name))
        self.watchers: dict[str, set[ServerConnection]] = {}
        self.clients: set[ServerConnection] = set()
        self.ready, self.link = threading.Event(), ""
        self.running: dict[str, InboundMessage] = {}
        self.senders: dict[str, ServerConnection] = {}  # by the id of a message
        self.began = time.monotonic()

    def start(self) -> None:
        try:
            self.token = os.getenv("GATEWAY_TOKEN", "").strip() or self.keep_token()
            port = os.getenv("GATEWAY_PORT", "").strip() or "8765"
            if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
                told = f"the port must be 0 to 65535, and GATEWAY_PORT is {port}"
                raise ChannelError(told, permanent=True)
            self.app.loop.begin(self.serve(int(port))).result(10)
            self.report(f"on, at http://{self.hosts[0]}/")
            self.link = f"http://{self.hosts[0]}/#token={quote(self.token)}"
            self.app.cli.send("", f"web chat: {self.link}")
        finally:
            self.ready.set()

    def allows(self, message: InboundMessage) -> bool:
        """Whoever has the token is listened to."""
        return True

    def keep_token(self) -> str:
        """A token of the workspace's own, so that a link is good after a restart, too."""
        file = self.app.agent.workspace / ".gateway-token"
        if not file.exists() or not file.read_text("utf-8").strip():
            file.touch(0o600)  # a mode that replace_file keeps
            replace_file(file, os.urandom(16).hex())
        return file.read_text("utf-8").strip()

    async def serve(self, port: int) -> None:
        """Open the port. Raises OSError when it is taken."""
        for logger in ("asyncio", "websockets"):  # clients that break off are no news
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        server = await serve(
            self.attend,
            "127.0.0.1",
            port,
            process_request=self.check,
            create_connection=GatewayClient,
            max_size=4 * MAX_FRAME,  # so far, what is too long is told so; beyond, cut off
            compression=None,  # it costs memory for each client, and loopback is fast
            close_timeout=1,
        )
        port = server.sockets[0].getsockname()[1]
        self.hosts = [f"127.0.0.1:{port}", f"localhost:{port}"]

    def check(self, client: ServerConnection, request: Request) -> Response | None:
        """Answer all but a WebSocket that may be opened: to HEAD, without the body."""
        answer = self.look(request)
        if answer and request.method == "HEAD":
            answer.body = b""
        return answer

    def look(self, request: Request) -> Response | None:
        """A page, a refusal, or None if the WebSocket may be opened."""
        path, _, query = request.path.partition("?")
        origins = [f"http://{host}" for host in self.hosts]
        if request.headers.get("Host") not in self.hosts:  # a foreign name that leads here
            return respond(403, "wrong Host\n")
        if request.method not in ("GET", "HEAD"):
            return respond(405, "")
        if path == "/":
            file = self.app.agent.workspace / PAGE.name
            return respond(200, (file if file.is_file() else PAGE).read_text("utf-8"), "text/html")
        if path != "/ws":
            return respond(200, "ok\n") if path == "/healthz" else respond(404, "not found\n")
        if request.headers.get("Origin", origins[0]) not in origins:
            return respond(403, "wrong Origin\n")
        if not same(parse_qs(query).get("token", [""])[0], self.token):
            return respond(401, "wrong token\n")
        return None

    async def attend(self, client: ServerConnection) -> None:
        """Answer the frames of one client, in order, until it goes."""
        GatewayClient.opening.pop(client, None)
        client.peer = f"ws-{os.urandom(8).hex()}"
        self.clients.add(client)
        try:
            async for frame in client:
                if (reply := await self.answer(client, frame)) is not None:
                    await client.send(json.dumps(reply))
        except ConnectionClosed:
            pass
        finally:
            self.clients.discard(client)
            self.senders = {name: c for name, c in self.senders.items() if c is not client}
            for key, watchers in list(self.watchers.items()):
                watchers.discard(client)
                if not watchers:
                    del self.watchers[key]

    async def answer(self, client: ServerConnection, frame: str | bytes) -> dict | list | None:
        """What JSON-RPC 2.0 has as the answer to a frame; None to notifications."""
        if len(frame.encode() if isinstance(frame, str) else frame) > MAX_FRAME:
            return failure(None, -32600, f"a frame holds at most {MAX_FRAME:,} bytes")
        try:
            request = json.loads(frame, parse_constant=int)  # NaN is no JSON
        except (ValueError, RecursionError):
            return failure(None, -32700, "Parse error")
        if not isinstance(request, list):
            return await self.call(client, request)
        if not 0 < len(request) <= MAX_BATCH:
            return failure(None, -32600, f"a batch holds 1 to {MAX_BATCH} requests")
        replies = []
        for part in request:
            replies.append(await self.call(client, part))
            await asyncio.sleep(0)  # the others have a turn, too
        return [reply for reply in replies if reply is not None] or None

    async def call(self, client: ServerConnection, request: object) -> dict | None:
        """Run one request. Whatever is wrong becomes an error with a code of the specification."""
        match request:
            case {"jsonrpc": "2.0", "method": str(name), **rest} if is_request(rest):
                params, request_id = request.get("params", {}), request.get("id")
            case _:
                request_id = request.get("id") if isinstance(request, dict) else None
                return failure(request_id if is_id(request_id) else None, -32600, "Invalid Request")
        try:
            if name not in METHODS:
                raise RpcError(-32601, f"there is no method {name}"[:200])
            handler, wanted = METHODS[name]
            result = await handler(self, client, **bind(wanted, params))
            reply = {"jsonrpc": "2.0", "result": result, "id": request_id}
        except RpcError as error:
            reply = failure(request_id, error.code, str(error))
        except Exception as error:  # the client is not told what it may not know
            self.tell(f"{name}: {explain(error)}")
            reply = failure(request_id, -32603, "Internal error")
        return reply if "id" in request else None

    def watch(self, client: ServerConnection, key: str) -> None:
        """Send a client the events of a session from now on."""
        self.watchers.setdefault(key, set()).add(client)

    def begin(self, agent: Agent, message: InboundMessage) -> None:
        """Tell those who watch a session that a turn has begun."""
        begun = {"role": "user", "text": message.said, "id": short_id(message)}
        self.app.loop.loop.call_soon_threadsafe(self.note, agent.key, message)
        self.emit(agent, "message", **begun)
        self.emit(agent, "typing", on=True)

    def end(self, agent: Agent, message: InboundMessage, text: str) -> None:
        """Tell them how it ended."""
        self.emit(agent, "typing", on=False)
        self.emit(agent, "message", role="assistant", text=text, id=short_id(message))

    def note(self, key: str, message: InboundMessage) -> None:
        """Note the turn that runs in a session; who sent its message watches, wherever it went."""
        self.running[key] = message
        if client := self.senders.pop(message.ids[0], None):
            self.watch(client, key)

    def emit(self, agent: Agent, event: str, **about: object) -> None:
        """Tell those who watch a session what happens in it; from any thread, and at once."""
        about = {"session": agent.key, "agent": agent.key.split(":")[1], **about}
        text = json.dumps({"jsonrpc": "2.0", "method": event, "params": about})
        is_end = about.get("role") == "assistant" and "id" in about  # later, some answer nobody
        self.app.loop.loop.call_soon_threadsafe(self.cast, agent.key, text, is_end)

    def cast(self, key: str, text: str, is_end: bool = False) -> None:
        """Hand an event to its clients; one that does not read what it gets is cut off."""
        watchers = self.watchers.get(key, set())
        for client in list(watchers):
            if client.transport.get_write_buffer_size() > 4 * MAX_FRAME:
                client.transport.abort()
                watchers.discard(client)
        broadcast(watchers, text)
        if is_end:
            self.running.pop(key, None)

    def send(self, peer: str, text: str, key: str = "") -> None:
        """Nothing is left to do: the session has the answer, and those who watch it were told."""

    def address(self, client: ServerConnection, peer: str) -> InboundMessage:
        """An empty message from a web peer, by default the connection. Raises RpcError."""
        if not PEER.fullmatch(peer or client.peer):
            raise RpcError(-32602, f"peer must be {PEER.pattern}")
        return InboundMessage(self.name, "default", peer or client.peer, "", [""])

    @method("send")
    async def rpc_send(
        self, client: ServerConnection, text: str, peer: str = "", id: str = ""
    ) -> dict:
        """Take a message, one with an id once. Its answer comes as events."""
        message, name = self.address(client, peer), id or os.urandom(8).hex()
        if not text.strip() or not re.fullmatch("[a-zA-Z0-9_-]{1,100}", name):
            raise RpcError(-32602, "text must say something; id is 1 to 100 of a-z A-Z 0-9 _ -")
        config, key, binding = self.app.route(message)
        waiting = [(each.channel, each.peer) for each in list(self.app.inbox.open.values())]
        if waiting.count((self.name, message.peer)) >= MAX_WAITING:
            raise RpcError(-32000, f"{MAX_WAITING} messages wait already; try again later")
        self.watch(client, key)
        ids = [f"web:{message.peer}:{name}"]
        self.senders[ids[0]] = client
        await asyncio.to_thread(self.app.inbox.put, replace(message, text=plain(text), ids=ids))
        tier = binding.tier if binding else "default"
        return {"id": name, "session": key, "agent": config.id, "matched_by": tier}

    @method("sessions.history")
    async def rpc_history(
        self, client: ServerConnection, session: str = "", peer: str = "", limit: int = 200
    ) -> dict:
        """What was said in a session, or in that of a web peer. Its events follow from now on."""
        key = session or self.app.route(self.address(client, peer))[1]
        agent_id = [*key.split(":"), ""][1]
        if agent_id not in self.app.agents.agents or len(key) > 400:
            raise RpcError(-32602, f"there is no session {key}"[:200])
        found = await asyncio.to_thread(self.app.session, key, create=False)
        self.watch(client, key)
        told = self.transcript(key, found or [])[-limit:] if limit > 0 else []
        sizes = accumulate(len(each["text"]) for each in reversed(told))
        fits = max(sum(size < 2 * MAX_FRAME for size in sizes), 1)  # of the newest: see `cast`
        busy = key in self.running
        return {"session": key, "agent": agent_id, "messages": told[-fits:], "busy": busy}

    def transcript(self, key: str, session: list) -> list[dict]:
        """What was said in a session, with the question of the turn that runs, and what waits."""
        running, inbox = self.running.get(key), self.app.inbox
        ended = len(session)
        is_asked = running and getattr(session, "asked", "") == running.ids[0]
        if is_asked:  # its answer comes as events
            asked = {"role": "user", "content": running.said}
            ended = max((i for i, each in enumerate(session) if each == asked), default=ended)
        told = [
            {"role": each["role"], "text": each["content"]}
            for each in session[:ended]
            if each["role"] != "tool" and each["content"] not in ("", NOTHING)
        ]
        open_ = [each for each in list(inbox.open.values()) if each.ids[0] not in inbox.answers]
        waiting = [each for each in open_ if self.app.route(each)[1] == key and each != running]
        later = ([running] if running else []) + waiting
        return told + [{"role": "user", "text": m.said, "id": short_id(m)} for m in later]

    @method("sessions.list")
    async def rpc_sessions(self, client: ServerConnection) -> list:
        return await asyncio.to_thread(self.app.agents.sessions)

    @method("agents.list")
    async def rpc_agents(self, client: ServerConnection) -> list:
        return [vars(config) for config in self.app.agents.agents.values()]

    @method("bindings.list")
    async def rpc_bindings(self, client: ServerConnection) -> list:
        return [asdict(binding) | {"tier": binding.tier} for binding in self.app.bindings]

    @method("bindings.set", Binding)
    async def rpc_bind(self, client: ServerConnection, **fields: str | int) -> dict:
        """Set a binding; one with the same fields and priority is replaced."""
        return await self.change(Binding(**fields))

    @method("bindings.remove", Binding)
    async def rpc_unbind(self, client: ServerConnection, **fields: str | int) -> dict:
        """Remove the binding with these fields and this priority, whatever its agent."""
        wanted = Binding(**fields)
        for binding in self.app.bindings.table.get(wanted.match, []):
            if binding.priority == wanted.priority:
                return await self.change(binding, removed=True)
        raise RpcError(-32602, "there is no such binding")

    async def change(self, binding: Binding, removed: bool = False) -> dict:
        try:
            await asyncio.to_thread(self.app.bindings.change, binding, removed)
        except ValueError as error:
            raise RpcError(-32602, str(error)) from None
        return asdict(binding) | {"tier": binding.tier}

    @method("status")
    async def rpc_status(self, client: ServerConnection) -> dict:
        channels = self.app.channels.channels.values()
        return {
            "uptime": round(time.monotonic() - self.began),
            "clients": len(self.clients),
            "waiting": len(self.app.inbox.open),
            "channels": {str(channel.account): channel.status for channel in channels},
        }


def short_id(message: InboundMessage) -> str:
    """The id that a client gave to a message, or the platform."""
    return message.ids[0].split(":")[-1]


def respond(status: int, text: str, kind: str = "text/plain") -> Response:
    """An HTTP answer that no other page can use."""
    headers = Headers()
    headers["Content-Type"] = f"{kind}; charset=utf-8"
    headers["Content-Length"] = str(len(text.encode()))
    headers["Content-Security-Policy"] = POLICY
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Cache-Control"] = "no-store"
    headers["Connection"] = "close"
    return Response(status, HTTPStatus(status).phrase, headers, text.encode())


def failure(name: object, code: int, told: str) -> dict:
    return {"jsonrpc": "2.0", "error": {"code": code, "message": told}, "id": name}


def is_id(value: object) -> bool:
    """Whether JSON-RPC takes a value as an id."""
    if isinstance(value, float):
        return abs(value) < float("inf")
    return value is None or (isinstance(value, str | int) and not isinstance(value, bool))


def is_request(rest: dict) -> bool:
    """Whether what a request holds besides its version and method is right."""
    return is_id(rest.get("id")) and isinstance(rest.get("params", {}), dict | list)


def bind(wanted: list[inspect.Parameter], params: dict | list) -> dict:
    """The arguments for a method. Raises RpcError unless they fit."""
    kinds = {each.name: each.annotation for each in wanted}
    given = params if isinstance(params, dict) else dict(zip(kinds, params, strict=False))
    needed = [each.name for each in wanted if each.default is each.empty]
    wrong = [f"{name} is missing" for name in needed if name not in given]
    wrong += ["there are too many"] if len(params) > len(kinds) else []
    for name, value in given.items():
        if name not in kinds:
            wrong.append(f"{name[:99]} is unknown")
        elif type(value) is not kinds[name]:
            wrong.append(f"{name} must be {JSON_TYPES[kinds[name]]}")
    if wrong:
        raise RpcError(-32602, f"params: {'; '.join(wrong)}")
    return given


@command("/bindings", "which messages go to which agent")
def show_bindings(agent: Agent, rest: str) -> str:
    return "\n".join(map(str, agent.app.bindings)) or "none: all messages go to main"


@command("/route <channel> <peer> [account] [guild]", "where a message would go, and why")
def show_route(agent: Agent, rest: str) -> str:
    channel, peer, account, guild, *_ = [*rest.split(), "", "", "", ""]
    if not peer:
        raise ValueError("/route <channel> <peer> [account] [guild]")
    kind = "group" if peer.startswith(("-", "oc_")) else "direct"  # Telegram's and Feishu's ids
    message = InboundMessage(channel, account or "default", peer, "", [""], kind, guild=guild)
    _, key, binding = agent.app.route(message)
    return f"{key}, by {binding or 'default: no binding fits'}"


@command("/agents", "the agents; the one who answers here has a star")
def show_agents(agent: Agent, rest: str) -> str:
    here = agent.key.split(":")[1]
    return "\n".join(
        f"{'*' if config.id == here else ' '} {config.id:<10} {config.prompt[:60]}".rstrip()
        for config in agent.app.agents.agents.values()
    )


@command("/agent <id>|off", "talk to one agent here, whatever the bindings say")
def force_agent(agent: Agent, rest: str) -> str:
    if rest not in ("off", *agent.app.agents.agents):
        raise ValueError(f"there is no agent {rest!r}; see /agents")
    before, agent.app.forced = agent.app.forced, "" if rest == "off" else rest
    try:
        agent.app.agent_for(agent.app.cli.message("/agent"))  # which opens its session here
    except OSError:
        agent.app.forced = before
        raise
    return f"{agent.key}: {agent.messages}"


@command("/sessions", "the sessions of all agents")
def show_sessions(agent: Agent, rest: str) -> str:
    entries = agent.app.agents.sessions()
    return "\n".join(f"{entry['session']}  {entry.get('id')}" for entry in entries)


@command("/gateway", "the gateway's address and its clients")
def show_gateway(agent: Agent, rest: str) -> str:
    gateway = agent.app.gateway
    return f"{gateway.status}, {len(gateway.clients)} clients\n{gateway.link}"


# --- s06: intelligence ---

BOOTSTRAP_FILES = (
    "IDENTITY.md",
    "SOUL.md",
    "TOOLS.md",
    "MEMORY.md",
    "AGENTS.md",
    "USER.md",
    "HEARTBEAT.md",
    "BOOTSTRAP.md",
)
MAX_PROMPT_FILE, MAX_PROMPT = 20_000, 150_000  # characters, as in OpenClaw 2026.3.13
MAX_PROMPT_READ = 2 << 20  # bytes
SMALL_WINDOW = 16_000  # tokens; in less, the prompt is minimal
# Characters of files by token of the window: a half of it, an eighth, a 32nd.
ROOM = {"full": 2, "minimal": 0.5, "none": 0.125}
MAX_SKILLS, MAX_SKILLS_TEXT = 150, 30_000
MAX_SKILL_FILE, MAX_FRONT = 256_000, 8_000  # bytes, characters
MAX_NOTE, NOTE_OVERLAP = 1600, 320  # characters, 400 and 80 tokens
VECTOR_WEIGHT, KEYWORD_WEIGHT = 0.7, 0.3
HALF_LIFE = 30  # days
DIVERSITY = 0.7  # the lambda of MMR
CANDIDATES = 24
MIN_SCORE, RECALL_SCORE = 0.1, 0.35
N_GRAMS = "character n-grams"  # what stands in for the model that turns texts into vectors
UNSPACED_FROM = "\u0e00"  # what begins with it, or above it, counts as written without blanks
# Scripts that are written without blanks between words, and Hangul, whose endings change.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
MARKS = "[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f]"  # accents, and vowels as signs
STOP_TEXT = """
a about again all am an and any are as at be been but by can could did do does for from get had
has have he hello her hi him his how i if in into is it its just me my no not of off on or our
out please she should so some tell thank thanks that the their them then there they this to
today up us was we were what when where which who whom why will with would you your aber als am
an auch auf aus bei bin bis bitte da danke das dass dem den der des die doch du ein eine einem
einen einer er es fur hab habe haben hallo hat heute ich ihr im in ist ja kann man mein meine
mich mir mit nach nicht noch nun nur oder sein sich sie sind so um und uns von vom war was wann
wer wie wir wird wo zu zum zur
"""
STOP_WORDS = set(STOP_TEXT.split())  # accents are gone when words are compared
READ_SKILL = "If one of these skills fits the task, read its file with read_file, then follow it:"
KEEP_NOTES = (
    "Nothing stays with you but what is in a file: keep facts with memory_write, and look with "
    "memory_search before you say that you do not know. Your lasting notes, from MEMORY.md:"
)
SCHEMA = """
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT, lines INTEGER);
    CREATE TABLE IF NOT EXISTS notes
        (id INTEGER PRIMARY KEY, path TEXT, line INTEGER, text TEXT, digest BLOB);
    CREATE INDEX IF NOT EXISTS notes_path ON notes (path);
    CREATE VIRTUAL TABLE IF NOT EXISTS terms USING fts5 (words, parts, tokenize = 'ascii');
    CREATE TABLE IF NOT EXISTS vectors
        (model TEXT, digest BLOB, sketch BLOB, vector BLOB, PRIMARY KEY (model, digest));
"""


class BootstrapLoader:
    """The eight files that say who an agent is, read anew for each prompt."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders
        self.problems: list[str] = []

    def load(self, mode: str = "full", total: int = MAX_PROMPT) -> dict[str, str]:
        """The text of each file that a mode needs, cut to what it may fill; "" for the others."""
        self.problems, texts = [], dict.fromkeys(BOOTSTRAP_FILES, "")
        for name in BOOTSTRAP_FILES[: {"full": 8, "minimal": 2, "none": 1}[mode]]:
            text, room = self.read(name), min(MAX_PROMPT_FILE, total)
            if len(text) > room:
                cut = f"{name}: {len(text):,} characters, cut to {room:,}"
                self.problems += [cut] if mode == "full" else []  # a small window is no fault of it
                text = cut_ends(text, room)
            texts[name] = text
            total -= len(text)
        return texts

    def read(self, name: str) -> str:
        """The text of a file in the first folder that has it; what is wrong with it is noted."""
        try:
            files = (folder / name for folder in self.folders)
            file = next((file for file in files if file.exists()), None)
            if file is None:
                return ""
            if not file.is_file() or file.stat().st_size > MAX_PROMPT_READ:
                raise ValueError(f"no file of at most {MAX_PROMPT_READ:,} bytes")
            data = file.read_bytes()
            if b"\0" in data:
                raise ValueError("not a text file")
            text = data.decode("utf-8-sig", "replace")
            if "\ufffd" in text:
                self.problems.append(f"{name}: there are bytes in it that are not UTF-8")
            return text.replace("\r\n", "\n").strip()
        except (OSError, ValueError) as error:
            self.problems.append(f"{name}: left out, {error}")
            return ""


def cut_ends(text: str, limit: int) -> str:
    """The first 70 % and the last 20 % of `limit` characters; the note between has the rest."""
    if limit < 500:  # too little to say anything
        return ""
    head, tail = limit * 7 // 10, limit * 2 // 10
    return f"{text[:head]}\n[... {len(text) - head - tail:,} characters cut ...]\n{text[-tail:]}"


@dataclass(frozen=True)
class Skill:
    """A procedure in a SKILL.md; `invocation` is its command, only a `listed` one is offered."""

    name: str
    description: str
    file: Path
    invocation: str
    listed: bool


class SkillsManager:
    """The skills in five folders; of two with one name, that of the later folder counts."""

    def __init__(self, workspace: Path) -> None:
        home = Path(os.path.expanduser("~"))
        extra = os.getenv("SKILLS_DIR", "").strip()
        self.roots = [Path(os.path.expanduser(extra))] if extra else []
        self.roots += [home / ".openclaw" / "skills", home / ".agents" / "skills"]
        self.roots += [workspace / ".agents" / "skills", workspace / "skills"]
        self.workspace = workspace
        self.known: dict[Path, tuple[tuple, Skill | None, str]] = {}
        self.skills: dict[str, Skill] = {}
        self.problems: list[str] = []

    def load(self) -> dict[str, Skill]:
        """The skills by name, as they are on disk now; a file that has not changed is not read."""
        problems, skills, calls = [], {}, {*COMMANDS, "/"}
        for root in self.roots:
            for file in sorted(root.glob("*/SKILL.md")):
                with suppress(OSError, RuntimeError):  # of a link that leads to itself
                    place, is_inside = str(file), file.resolve().is_relative_to(root.resolve())
                    if not is_inside or plain(place) != place or not place.isprintable():
                        why = "odd letters in its name" if is_inside else "a link leads elsewhere"
                        problems.append(f"{place!a}: left out, {why}")
                        continue
                    state = file.stat()
                    stamp = (state.st_mtime_ns, state.st_size)
                    if self.known.get(file, ("",))[0] != stamp:
                        self.known[file] = (stamp, *self.examine(file))
                    _, skill, problem = self.known[file]
                    problems += [problem] if problem else []
                    if skill:
                        skills[skill.name] = skill
        for skill in reversed(skills.values()):
            if f"/{skill.invocation}" in calls and skill.invocation:
                problems.append(f"{skill.name}: /{skill.invocation} is taken")
            calls.add(f"/{skill.invocation}")
        self.skills, self.problems = skills, problems
        return skills

    def examine(self, file: Path) -> tuple[Skill | None, str]:
        """The skill in a file and "", or None and what is wrong with it."""
        try:
            return read_skill(file), ""
        except Exception as error:  # PyYAML documents YAMLError, and raises others
            joint = "" if str(error).startswith((",", ":")) else ": "
            return None, f"{self.location(file)}{joint}{error}"

    def location(self, file: Path) -> str:
        """How read_file takes the path of a file."""
        inside = file.is_relative_to(self.workspace)
        return (file.relative_to(self.workspace) if inside else file).as_posix()

    def find(self, text: str) -> Skill | None:
        """The skill that a line such as `/minutes ...` calls."""
        name = text.split()[0] if text.startswith("/") else ""
        if not name or name in COMMANDS:
            return None
        skills = reversed(self.load().values())
        return next((s for s in skills if s.invocation and name == f"/{s.invocation}"), None)

    def list(self) -> str:
        """What the model is told: name, description and place of each skill, no bodies."""
        lines, skills = [], [skill for _, skill in sorted(self.load().items()) if skill.listed]
        room = MAX_SKILLS_TEXT - 100
        for skill in skills[:MAX_SKILLS]:
            line = f"- {skill.name}: {skill.description} [{self.location(skill.file)}]"
            room -= len(line) + 1
            if room < 0:
                break
            lines.append(line)
        if len(lines) < len(skills):
            lines.append(f"({len(skills) - len(lines)} more are not listed)")
        return "\n".join(lines)


def read_skill(file: Path) -> Skill:
    """The skill in a file, by the Agent Skills format. Raises ValueError, saying in which line."""
    import yaml

    if not file.is_file() or file.stat().st_size > MAX_SKILL_FILE:
        raise ValueError(f": no file of at most {MAX_SKILL_FILE:,} bytes")
    text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    front = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if not front:
        raise ValueError(", line 1: it must begin with frontmatter between two lines of ---")
    if len(front[1]) > MAX_FRONT:
        raise ValueError(f", line 1: its frontmatter is over {MAX_FRONT:,} characters")
    try:
        about = plain_scalars(yaml.compose(front[1], getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark else 2
        raise ValueError(f", line {line}: {getattr(error, 'problem', None) or error}") from None
    for key, most in (("name", 64), ("description", 1024)):
        if not 0 < len(about.get(key, "").strip()) <= most:
            lines = (n for n, line in enumerate(text.split("\n"), 1) if line.startswith(f"{key}:"))
            raise ValueError(f", line {next(lines, 2)}: {key} must be 1 to {most} characters")
    name, description = (" ".join(about[key].split()) for key in ("name", "description"))
    invocation = (about.get("invocation") or name).strip("/ ").lower()
    invocation = re.sub(r"[^\w-]+", "-", invocation)[:32].strip("-")
    hidden = about.get("user-invocable", "").lower() in ("false", "no", "off")
    listed = about.get("disable-model-invocation", "").lower() not in ("true", "yes", "on")
    return Skill(plain(name), plain(description), file, "" if hidden else invocation, listed)


def plain_scalars(node: object) -> dict[str, str]:
    """The texts and flags at the top of YAML. All else is left alone: an alias may expand to GB."""
    found, kinds = {}, ("tag:yaml.org,2002:str", "tag:yaml.org,2002:bool")
    for key, value in node.value if getattr(node, "id", "") == "mapping" else ():
        if key.id == value.id == "scalar" and value.tag in kinds:
            found[key.value] = value.value
    return found


def readable_path(agent: Agent, path: str) -> Path:
    """A file that may be read: of a skill, wherever that is, or of the workspace."""
    if len(path) > MAX_PATH:
        raise ValueError("no path is that long")
    file = (agent.workspace / Path(path).expanduser()).resolve()
    folders = (skill.file.parent.resolve() for skill in agent.app.skills.skills.values())
    folders = (folder for folder in folders if not agent.workspace.is_relative_to(folder))
    if any(file.is_relative_to(folder) for folder in folders):
        return file
    return workspace_path(agent, path)


def fold(text: str) -> str:
    """A text with no capitals and no accents, so that words compare."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFC", re.sub(MARKS, "", apart))


def words_of(text: str) -> list[str]:
    """The words of a text; where a script has no blanks, each two letters side by side."""
    words = []  # the vowel signs of India's scripts, from U+0900 on, are no \w
    for word in re.findall(f"[{UNSPACED}]+|(?:[^\\W_{UNSPACED}]|[\u0900-\u0dff])+", fold(text)):
        pairs = [word[i : i + 2] for i in range(len(word) - 1)]
        words += pairs if pairs and word[0] > UNSPACED_FROM else [word]
    return words


def terms_of(text: str) -> list[str]:
    """The words of a text that say something, each once."""
    return [word for word in dict.fromkeys(words_of(text)) if word not in STOP_WORDS]


def n_grams(text: str) -> int:
    """A vector of 2,048 zeros and ones, as the bits of a number: which n-grams a text has."""
    bits = 0
    for word in terms_of(text):
        padded = word if word[0] > UNSPACED_FROM else f" {word} "
        for start in range(max(len(padded) - 2, 1)):
            bits |= 1 << (zlib.crc32(padded[start : start + 3].encode()) % 2048)
    return bits


def split_notes(text: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """The notes in a text, each with its line: paragraphs and list items, under their heading."""
    note: list[str] = []
    headings = True  # whether the note has nothing else so far
    for number, line in enumerate([*text.split("\n"), None], first):
        ended = not line or not line.strip() or re.match("[-*] |#+ ", line)
        if line is None and any(note) or ended and not headings:
            whole, begin = "\n".join(note).strip(), number - len(note)
            step = MAX_NOTE - NOTE_OVERLAP
            for start in range(0, max(len(whole) - NOTE_OVERLAP, 1), step):
                yield begin, whole[start : start + MAX_NOTE]
                begin += whole.count("\n", start, start + step)
            note, headings = [], True
        if note or (line and line.strip()):
            note.append(line or "")
            headings = headings and is_heading(note[-1])


def is_heading(note: str) -> bool:
    """Whether there are headings in a note, and nothing else."""
    return all(not line.strip() or re.match("#+ ", line) for line in note.split("\n"))


@dataclass(frozen=True)
class Hit:
    """A note that was found, and how well it fits, 0 to 1."""

    path: str
    line: int
    text: str
    score: float

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.score:.2f})\n{self.text}"


class MemoryStore:
    """An agent's notes, in MEMORY.md and memory/*.md, and an index that can always be deleted.

    `embed` turns texts into vectors with the server's `model`; without one, n-grams stand in.
    """

    def __init__(self, folder: Path, root: Path, model: str, embed: Callable) -> None:
        self.folder, self.root, self.embed = folder, root, embed  # paths are told from the root
        self.index = folder / ".memory.sqlite"
        self.model = model or N_GRAMS
        self.today: Callable[[], date] = date.today
        self.lock = threading.RLock()
        self.db: sqlite3.Connection | None = None
        self.place: Path | str = self.index
        self.sketches: dict[int, tuple[int, float]] = {}  # with their lengths
        self.missing: dict[int, None] = {}
        self.problem, self.pause = "", 0.0
        self.odd: dict[str, str] = {}

    def connect(self, place: Path | str) -> None:
        """Open the index, unless that is done. Raises sqlite3.Error when it is damaged."""
        if self.db and (self.index.exists() or self.place == ":memory:"):
            return
        self.place = place
        with suppress(OSError):  # SQLite tells what it could not open
            self.index.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(place, timeout=1, check_same_thread=False)
        self.db.executescript(SCHEMA)
        self.db.execute("DELETE FROM vectors WHERE digest NOT IN (SELECT digest FROM notes)")
        self.db.commit()
        self.sketches = {}
        self.missing = dict.fromkeys(row[0] for row in self.db.execute("SELECT id FROM notes"))

    def drop(self, delete: bool) -> None:
        """Close the index, and delete it if it is damaged, not just full or locked."""
        if self.db:
            self.db.close()
        self.db = None
        for end in ("", "-wal", "-shm") if delete else ():
            with suppress(OSError):
                self.index.with_name(self.index.name + end).unlink()

    def write(self, text: str) -> str:
        """Add a note to today's file; on disk when this returns. Returns where it stands."""
        if not text.strip():
            raise ValueError("there is nothing to write")
        now, day = datetime.now(), self.today().isoformat()
        path = (self.folder / "memory" / f"{day}.md").relative_to(self.root).as_posix()
        lines = filter(None, map(str.strip, plain(text).split("\n")))
        indented = "\n  ".join(lines)
        item = f"- {now:%H:%M} {indented}\n"
        with self.lock:
            with suppress(sqlite3.Error):
                self.connect(self.index)
                self.sync()
            append_durably(self.root / path, item)
            if not self.db:
                return path
            with suppress(sqlite3.Error), self.db:  # else the next search takes it in
                last = "SELECT text, lines FROM notes JOIN files USING (path) WHERE path = ?"
                row = self.db.execute(f"{last} ORDER BY line DESC", [path]).fetchone()
                if not row or is_heading(row[0]):  # the note joins it: split the file anew
                    self.update(path)
                    return path
                for line, note in split_notes(item.removesuffix("\n"), row[1] + 1):
                    self.insert(path, line, note)
                self.note_file(path, row[1] + item.count("\n"))
        return path

    def note_file(self, path: str, lines: int) -> None:
        """Note the state in which a file is in the index."""
        values = (path, self.stamp(self.root / path), lines)
        self.db.execute("REPLACE INTO files VALUES (?, ?, ?)", values)

    def stamp(self, file: Path) -> str:
        state = file.stat()
        return f"{state.st_mtime_ns} {state.st_size}"

    def sync(self) -> None:
        """Take into the index what has changed on disk since it was last looked at."""
        known, found, odd = dict(self.db.execute("SELECT path, stamp FROM files")), {}, {}
        for file in (self.folder / "MEMORY.md", *self.folder.glob("memory/*.md")):
            with suppress(OSError):
                path = file.relative_to(self.root).as_posix()
                if not file.is_file():
                    continue
                if plain(path) != path or file.stat().st_size > MAX_FILE:
                    odd[path] = f"{plain(path)}: left out, for its name or its size"
                    continue
                found[path] = self.stamp(file)
        for path in sorted(known.keys() | found.keys()):
            if known.get(path) != found.get(path):
                try:
                    self.odd.pop(path, "")
                    self.update(path, path in found)
                except OSError as error:
                    self.odd[path] = f"{path}: left out, {error.strerror}"
        self.odd = {path: self.odd[path] for path in self.odd if path in found} | odd

    def update(self, path: str, is_kept: bool = True) -> None:
        """Bring the notes of one file up to date; those that stayed keep their index and vector."""
        file, old = self.root / path, {}
        text = file.read_bytes().decode("utf-8-sig", "replace") if is_kept else ""
        text = text.replace("\r\n", "\n").removesuffix("\n")
        if ("\0" in text or "\ufffd" in text) and file.name != "MEMORY.md":  # the prompt tells that
            self.odd[path] = f"{path}: not all of it is text in UTF-8"
        for name, line, note in self.db.execute(
            "SELECT id, line, text FROM notes WHERE path = ? ORDER BY id DESC", [path]
        ):
            old.setdefault(note, []).append((name, line))
        with self.db:
            for line, note in split_notes(text):
                if not old.get(note):
                    self.insert(path, line, note)
                    continue
                name, before = old[note].pop()
                if before != line:
                    self.db.execute("UPDATE notes SET line = ? WHERE id = ?", (line, name))
            for name, _ in chain(*old.values()):
                self.db.execute("DELETE FROM notes WHERE id = ?", [name])
                self.db.execute("DELETE FROM terms WHERE rowid = ?", [name])
                self.sketches.pop(name, None)
                self.missing.pop(name, None)
            if is_kept:
                self.note_file(path, text.count("\n") + bool(text))
            else:
                self.db.execute("DELETE FROM files WHERE path = ?", [path])

    def insert(self, path: str, line: int, note: str) -> None:
        """Add a note to the index. `parts` has the ends of words: a prefix of one is any part."""
        digest = hashlib.sha256(note.encode("utf-8", "replace")).digest()
        name = self.db.execute(
            "INSERT INTO notes (path, line, text, digest) VALUES (?, ?, ?, ?)",
            (path, line, note, digest),
        ).lastrowid
        words = words_of(note)
        ends = [letter for w in words if w[0] > UNSPACED_FROM for letter in w]
        for word in (word[:40] for word in words if word[0] < UNSPACED_FROM):
            ends += [word[start:] for start in range(max(len(word) - 2, 1))]
        self.db.execute(
            "INSERT INTO terms (rowid, words, parts) VALUES (?, ?, ?)",
            (name, " ".join(words), " ".join(ends)),
        )
        self.missing[name] = None

    def search(self, query: str, limit: int = 6, weights: tuple | None = None) -> list[Hit]:
        """The notes that fit a query best, from vector and keyword scores by their `weights`."""
        with self.lock:
            for place in (self.index, self.index, ":memory:"):  # again if damaged, or if no disk
                try:
                    self.connect(place)
                    self.sync()
                    return self.find(query, limit, weights or (VECTOR_WEIGHT, KEYWORD_WEIGHT))
                except sqlite3.Error as error:
                    kept = ("BUSY", "LOCKED", "READONLY", "IOERR", "FULL", "CANTOPEN")
                    self.drop(not getattr(error, "sqlite_errorname", "")[7:].startswith(kept))
        raise OSError("there is no room for the index of the notes")

    def find(self, query: str, limit: int, weights: tuple) -> list[Hit]:
        query = query[:MAX_NOTE]
        if not terms_of(query):
            return []
        keyword = self.match(query) if weights[1] else {}
        vector = self.compare(query, keyword) if weights[0] else {}
        if vector is None:
            vector, weights = {}, (0, 1)
        total, hits = sum(weights), []
        for name in vector | keyword:
            parts = (vector.get(name, 0), keyword.get(name, 0))
            score = sum(map(operator.mul, weights, parts)) / total
            if score >= MIN_SCORE:
                row = "SELECT path, line, text FROM notes WHERE id = ?"
                hits.append(Hit(*self.db.execute(row, [name]).fetchone(), score))
        return self.choose(hits, limit)

    def match(self, query: str) -> dict[int, float]:
        """Keyword scores: BM25 against the best, by the share of the query that was found."""
        terms, found = terms_of(query)[:32], {}  # as many as a question has
        asks = [
            f'words:"{t}"' + f' OR parts:"{t}"*' * (len(t) > 2 or t > UNSPACED_FROM) for t in terms
        ]
        rows = self.db.execute(
            "SELECT rowid, bm25(terms, 4, 1), words || ' ' || parts FROM terms"
            " WHERE terms MATCH ? ORDER BY 2, rowid DESC LIMIT ?",
            (" OR ".join(asks), CANDIDATES),
        ).fetchall()
        count = "SELECT count(*) FROM terms WHERE terms MATCH ?"
        counts = [self.db.execute(count, [ask]).fetchone()[0] for ask in asks] if rows else []
        rarity = [math.log(1 + len(self) / (1 + count)) for count in counts]
        for name, rank, words in rows:
            share = sum(r for t, r in zip(terms, rarity, strict=True) if t in words) / sum(rarity)
            found[name] = share * rank / rows[0][1]
        return found

    def compare(self, query: str, more: Container[int]) -> dict[int, float] | None:
        """Vector scores of the nearest notes and of some `more`; None if the server has none."""
        if time.monotonic() < self.pause:
            return None
        try:
            if self.model == N_GRAMS:
                sketch, exact = n_grams(query), None
            else:
                exact = unit_vectors(self.embed([query]), 1)[0]
                sketch, self.problem = sketch_of(exact), ""
                self.forget_others(len(exact))
            self.fill()
        except (openai.OpenAIError, ValueError) as error:
            told = explain(error).replace("check MODEL_ID", "check EMBEDDING_MODEL")
            self.problem = f"{self.model}: {told}; searching by words alone"
            self.pause = time.monotonic() + 60  # until then it is not asked
            return None
        size = math.sqrt(sketch.bit_count()) or 1
        scores = {  # the cosine of vectors of zeros and ones
            name: (sketch & other).bit_count() / (length * size)
            for name, (other, length) in self.sketches.items()
        }
        wanted = CANDIDATES if exact is None else 4 * CANDIDATES
        near = heapq.nlargest(wanted, scores, lambda n: (scores[n], n))
        near = dict.fromkeys([*near, *more])
        if exact is None:
            return {name: scores.get(name, 0) for name in near}
        return {name: max(0, self.cosine(name, exact)) for name in near}

    def forget_others(self, size: int) -> None:
        """Make all vectors anew if those kept are not of a size: the server has another model."""
        query = "DELETE FROM vectors WHERE model = ? AND length(vector) != ?"
        with self.db:
            if self.db.execute(query, (self.model, 4 * size)).rowcount:
                self.sketches = {}
                self.missing = dict.fromkeys(n for (n,) in self.db.execute("SELECT id FROM notes"))

    def cosine(self, name: int, exact: array) -> float:
        row = self.db.execute(
            "SELECT vector FROM vectors JOIN notes USING (digest) WHERE model = ? AND id = ?",
            (self.model, name),
        ).fetchone()
        vector = array("f", row[0]) if row else ()
        return sum(map(operator.mul, exact, vector)) if len(vector) == len(exact) else 0

    def fill(self) -> None:
        """Give each note its vector, from the index or in batches; at most five seconds at once."""
        latest, size, refused = time.monotonic() + 5, 64, 0
        get = "SELECT sketch FROM vectors JOIN notes USING (digest) WHERE model = ? AND id = ?"
        while self.missing and time.monotonic() < latest:
            batch = list(islice(self.missing, size))
            texts = {}
            for name in batch:
                if row := self.db.execute(get, (self.model, name)).fetchone():
                    self.keep(name, int.from_bytes(row[0]))
                    continue
                query = "SELECT digest, text FROM notes WHERE id = ?"
                if row := self.db.execute(query, [name]).fetchone():  # else it was taken back
                    texts[name] = row
            try:
                self.make_vectors(texts)
            except openai.APIStatusError as error:
                if error.status_code not in (400, 413, 422, 500) or refused == 3:
                    raise
                if size > 1:  # there may be too many notes, or one that is too long
                    size = max(size // 8, 1)
                    continue
                refused += 1  # one that the server does not take goes without
            for name in batch:
                del self.missing[name]

    def make_vectors(self, texts: dict[int, tuple[bytes, str]]) -> None:
        """Make the vectors of some notes, and keep them by what the notes say."""
        if self.model == N_GRAMS or not texts:
            made = [(n_grams(text), b"") for _, text in texts.values()]
        else:
            vectors = unit_vectors(self.embed([t for _, t in texts.values()]), len(texts))
            made = [(sketch_of(vector), vector.tobytes()) for vector in vectors]
        with self.db:
            for (name, (digest, _)), (sketch, vector) in zip(texts.items(), made, strict=True):
                size = sketch.bit_length() // 8 + 1
                values = (self.model, digest, sketch.to_bytes(size), vector)
                self.db.execute("REPLACE INTO vectors VALUES (?, ?, ?, ?)", values)
                self.keep(name, sketch)

    def keep(self, name: int, sketch: int) -> None:
        self.sketches[name] = (sketch, math.sqrt(sketch.bit_count()) or 1)

    def choose(self, hits: list[Hit], limit: int) -> list[Hit]:
        """The best hits: what is older counts less, and so does what is like one chosen before."""
        rest = {hit: hit.score * self.freshness(hit.path) for hit in hits}
        best, terms = max(rest.values(), default=1), {hit: set(terms_of(hit.text)) for hit in hits}
        chosen: list[Hit] = []

        def worth(hit: Hit) -> float:
            same = (len(terms[hit] & terms[c]) / max(len(terms[hit] | terms[c]), 1) for c in chosen)
            return DIVERSITY * rest[hit] / best - (1 - DIVERSITY) * max(same, default=0)

        while rest and len(chosen) < limit:
            chosen.append(max(rest, key=worth))
            del rest[chosen[-1]]
        return chosen

    def freshness(self, path: str) -> float:
        """1 for what does not age. A day's note loses up to 60 %, half of that in 30 days."""
        with suppress(ValueError):
            day = date.fromisoformat(Path(path).stem[:10])
            return 0.4 + 0.6 * 0.5 ** (max((self.today() - day).days, 0) / HALF_LIFE)
        return 1.0

    def __len__(self) -> int:
        return self.db.execute("SELECT count(*) FROM notes").fetchone()[0]


def append_durably(file: Path, text: str) -> None:
    """Add whole lines to a text file; on disk when this returns, or OSError and nothing added."""
    is_new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+", buffering=0) as stream:
        size = stream.tell()
        stream.seek(max(size - 1, 0))
        data = (b"" if stream.read() in (b"", b"\n") else b"\n") + text.encode()
        if stream.write(data) != len(data):
            stream.truncate(size)
            raise OSError(f"the disk is full: {file}")
        os.fsync(stream.fileno())
    if is_new:
        sync_folder(file.parent)


def unit_vectors(vectors: list[list[float]], count: int) -> list[array]:
    """Vectors of length 1, in place of what a server sent. Raises ValueError unless they are."""
    try:
        lengths, sizes = [math.hypot(*vector) for vector in vectors], set(map(len, vectors))
        if len(lengths) == count and len(sizes) == 1 and all(0 < n < math.inf for n in lengths):
            return [array("f", (x / n for x in v)) for v, n in zip(vectors, lengths, strict=True)]
    except (ArithmeticError, TypeError, ValueError):
        pass
    raise ValueError(f"the server did not send {count} vectors")


def sketch_of(vector: array) -> int:
    """A vector in a bit per number, whether it is above zero: enough to look for those near it."""
    return int("".join("01"[x > 0] for x in vector), 2)


def build_system_prompt(files: dict[str, str], parts: dict[str, str], mode: str = "full") -> str:
    """The layers of a prompt, what changes least first; `parts` are those that no file holds.

    The mode is full, minimal (identity, soul, runtime and channel), or none (identity alone).
    """
    context = (files[name] for name in ("AGENTS.md", "USER.md", "HEARTBEAT.md", "BOOTSTRAP.md"))
    layers = {
        "identity": parts["identity"] or files["IDENTITY.md"],
        "soul": files["SOUL.md"],
        "tools": files["TOOLS.md"],
        "skills": f"{READ_SKILL}\n{parts['skills']}" if parts["skills"] else "",
        "memory": f"{parts['notes']}\n\n{files['MEMORY.md']}".strip(),
        "context": "\n\n".join(filter(None, context)),
        "runtime": parts["runtime"],
        "channel": parts["channel"],
    }
    chosen = {
        "full": tuple(layers),
        "minimal": ("identity", "soul", "runtime", "channel"),
        "none": ("identity",),
    }[mode]
    blocks = (f"<{name}>\n{layers[name]}\n</{name}>" for name in chosen[1:] if layers[name])
    return "\n\n".join([layers["identity"], *blocks])


@tool("Keep a fact: it is added to today's notes.", content="one fact, in a sentence of its own")
def memory_write(agent: Agent, content: str) -> str:
    check_private(agent)
    return f"kept in {agent.app.memory(agent).write(content)}"


@tool(
    "Search the notes of all days and MEMORY.md. Says for each note in which file and line it is.",
    query="two or three words that the note may have",
    limit="notes at most",
)
def memory_search(agent: Agent, query: str, limit: int = 6) -> str:
    check_private(agent)
    return agent.app.look_up(agent, query, min(max(limit, 1), 50)) or "nothing was found"


def check_private(agent: Agent) -> None:
    """Raise ValueError in a group: what one person said is not for all, nor theirs to add to."""
    if ":group:" in agent.key:
        raise ValueError("notes are not for groups")


@command("/soul", "the agent's SOUL.md")
def show_soul(agent: Agent, rest: str) -> str:
    return agent.app.loader(agent).read("SOUL.md") or "there is no SOUL.md"


@command("/bootstrap", "the eight files of the prompt, and what is wrong with them")
def show_bootstrap(agent: Agent, rest: str) -> str:
    loader = agent.app.loader(agent)
    sizes = [f"{name:<13} {len(text):>6,}" for name, text in loader.load().items()]
    return "\n".join([*sizes, *loader.problems])


@command("/prompt [full|minimal|none]", "the system prompt, as it would be now")
def show_prompt(agent: Agent, rest: str) -> str:
    if rest not in ("", "full", "minimal", "none"):
        raise ValueError("/prompt [full|minimal|none]")
    text = agent.app.system_prompt(agent, agent.app.cli.message(""), rest)
    return f"{text}\n[{len(text):,} characters]"


@command("/skills", "the skills, how to call them, and what is wrong with them")
def show_skills(agent: Agent, rest: str) -> str:
    manager = agent.app.skills
    lines = [
        f"{'/' + s.invocation if s.invocation else '-':<16} {s.name}: {s.description[:60]}"
        for s in manager.load().values()
    ]
    return "\n".join([*lines, *manager.problems]) or "there are none"


@command("/memory", "the notes and their index")
def show_memory(agent: Agent, rest: str) -> str:
    memory = agent.app.memory(agent)
    memory.search("memory", 1)  # takes into the index what has changed
    return f"{memory.folder}: {len(memory)} notes, vectors by {memory.model}"


@command("/search <query>", "search the notes")
def search_memory(agent: Agent, query: str) -> str:
    return agent.app.look_up(agent, query, 6) or "nothing was found"


# --- s07: heartbeat and cron ---

HEARTBEAT_OK = "HEARTBEAT_OK"
ACK_MAX = 300  # characters beside HEARTBEAT_OK that nobody has to read, as in OpenClaw 2026.3.13
REPEAT_AFTER = 24 * 3600  # seconds until the same words may be told again
BACKOFF = (30, 60, 300, 900)  # seconds, by errors in a row
MAX_ERRORS = 5
SET_BACK = 7200  # seconds by which a clock may be set back before its older times are mistrusted
MAX_RUNS = 2000  # records in the run log when it is cut at a start
# Five fields, in which croniter would take more than cron does.
CRON_EXPR = re.compile(r"(?:[\d*,/-]+ ){3}(?:[a-z]{3}|[\d*,/-])+ (?:[a-z]{3}|[\d*,/#-])+", re.I)
LOOK = 5  # seconds; how often files and clock are looked at
HEARTBEAT = f"""Nobody has written: the timer woke you. Go through this list, HEARTBEAT.md. Tell
only what the person has to know now. If there is nothing, answer {HEARTBEAT_OK}."""


class Clock:
    """The time, and waiting for it; a test puts another one in its place."""

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, event: threading.Event, seconds: float) -> None:
        """Wait so long, or until the event is set, and clear it."""
        event.wait(seconds)
        event.clear()


def local_zone(name: str = "") -> tzinfo:
    """The time zone of a name, else TIMEZONE's, else the machine's. Raises ValueError."""
    if name := name or os.getenv("TIMEZONE", "").strip():
        try:
            return ZoneInfo(name)
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(f"there is no time zone {name!r}") from error
    with suppress(KeyError, OSError, ValueError):
        return ZoneInfo(os.environ["TZ"])
    with suppress(OSError, ValueError), open("/etc/localtime", "rb") as file:
        return ZoneInfo.from_file(file)
    return datetime.now().astimezone().tzinfo  # today's offset, for want of better


class Lane:
    """What runs one at a time. People wait for it; background work only tries it."""

    def __init__(self, has_more: Callable[[], bool]) -> None:
        self.lock, self.has_more = threading.Lock(), has_more
        self.waiting: list[str] = []  # one entry each

    def __enter__(self) -> None:
        self.waiting.append("a person")
        try:
            self.lock.acquire()
        finally:
            self.waiting.pop()

    def __exit__(self, *about: object) -> None:
        self.lock.release()

    def busy(self) -> bool:
        """Whether somebody is being answered, or waits to be."""
        return self.lock.locked() or bool(self.waiting) or self.has_more()

    def attempt(self) -> bool:
        """Take the lane if nobody else has it or wants it; who takes it has to release it."""
        return not self.busy() and self.lock.acquire(blocking=False)

    def release(self) -> None:
        """Give back what `attempt` took."""
        self.lock.release()

    def __str__(self) -> str:
        return f"main: one at a time, {len(self.waiting)} waiting"


@dataclass
class JobState:
    """What has become of a job; times in seconds since 1970."""

    schedule: str = ""  # a digest, and so is version
    version: str = ""
    since: float = 0  # when this schedule was first seen
    last: float = 0  # when a run began
    ended: float = 0
    errors: int = 0
    error: str = ""
    running: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        """Raise TypeError unless the fields are what they should be: they may come from a file."""
        if not all(isinstance(text, str) for text in (self.schedule, self.version, self.error)):
            raise TypeError
        times = (self.since, self.last, self.ended)
        if not all(isinstance(at, int | float) and 0 <= at < 250e9 for at in times):  # a date
            raise TypeError
        if type(self.errors) is not int or self.errors < 0:
            raise TypeError

    @property
    def disabled(self) -> bool:
        return self.errors >= MAX_ERRORS


class RunLog:
    """What ran, and how it ended: a journal, from which the state of all jobs is read at start."""

    def __init__(self, path: Path) -> None:
        self.journal, self.lock = Journal(path), threading.RLock()
        self.states: dict[str, JobState] = {}
        self.beat = 0.0
        self.told: dict[str, float] = {}
        self.owner: InboundMessage | None = None
        records = self.journal.replay()
        for record in records:
            with suppress(TypeError):  # not the fields of a state or a message
                self.apply(record)
        if len(records) > MAX_RUNS:
            self.compact(records[-MAX_RUNS // 4 :])

    def compact(self, runs: list[dict]) -> None:
        """Leave in the file the latest runs, as `ended`, which replay passes by, and the state."""
        ends = [{**run, "type": "ended"} for run in runs if run.get("type") in ("end", "ended")]
        states = [{"type": "state", "job": j, "state": asdict(s)} for j, s in self.states.items()]
        told = [{"type": "told", "digest": d, "at": at} for d, at in self.told.items()]
        owner = [{"type": "owner", "message": asdict(self.owner)}] if self.owner else []
        path, beat = self.journal.path, {"type": "beat", "at": self.beat}
        del self.journal  # that closes it: Windows replaces no file that is open
        with suppress(OSError):  # of a full disk: it can wait
            rewrite_journal(path, [*ends, *states, *told, *owner, beat])
        self.journal = Journal(path)

    def record(self, kind: str, **about: object) -> None:
        """Write down what happens. Raises OSError when it is not on disk."""
        with self.lock:
            self.journal.append({"type": kind, **about})
            self.apply({"type": kind, **about})

    def apply(self, record: dict) -> None:
        """Make the change that a record describes, now and in a replay."""
        at = record.get("at", 0)
        state = self.states.get(record.get("job"), JobState())
        match record:
            case {"type": "seen", "job": str(name), "at": float()}:
                schedule, version = (str(record.get(key)) for key in ("schedule", "version"))
                fresh = JobState(since=at) if schedule != state.schedule else state
                fresh = replace(fresh, schedule=schedule, version=version, errors=0, error="")
                self.states[name] = fresh
            case {"type": "start", "job": str(name), "at": float()}:
                self.states[name] = replace(state, last=at, running=True)
            case {"type": "end", "job": str(name), "at": float(), "error": str(error)}:
                state = replace(state, running=False, ended=at, error=error)
                state.errors = state.errors + 1 if error else 0
                state.done = state.done or bool(record.get("done"))
                self.states[name] = state
            case {"type": "state", "job": str(name), "state": dict(fields)}:
                self.states[name] = JobState(**fields)
            case {"type": "beat", "at": float()}:
                self.beat = at
            case {"type": "told", "digest": str(digest), "at": float()}:
                self.told = {d: t for d, t in self.told.items() if t > at - REPEAT_AFTER}
                self.told[digest] = at
            case {"type": "owner", "message": dict(fields)}:
                self.owner = InboundMessage(**fields)


class HeartbeatRunner:
    """Wakes the agent from time to time, to look whether there is something to tell."""

    def __init__(self, app: "App", clock: Clock, log: RunLog) -> None:
        self.app, self.clock, self.log, self.lane = app, clock, log, app.lane
        self.file = app.agent.workspace / "HEARTBEAT.md"
        self.event, self.triggered = threading.Event(), False
        self.result = "has not run yet"
        seconds = os.getenv("HEARTBEAT_SECONDS", "").strip() or "1800"
        hours = os.getenv("HEARTBEAT_HOURS", "").strip() or "00:00-24:00"
        if not re.fullmatch("[0-9]{1,8}", seconds):
            raise ValueError(f"HEARTBEAT_SECONDS must be a number, 0 for never, not {seconds!r}")
        clock_time = "([01][0-9]|2[0-4]):([0-5][0-9])"
        found = re.fullmatch(f"{clock_time}-{clock_time}", hours)
        ends = [int(found[i]) * 60 + int(found[i + 1]) for i in (1, 3)] if found else [0, 0]
        if ends[0] == ends[1] or max(ends) > 24 * 60:
            raise ValueError(f"HEARTBEAT_HOURS must be like 08:00-22:00, not {hours!r}")
        self.interval, self.ends, self.zone = int(seconds), ends, local_zone()

    def checks(self) -> str:
        """What HEARTBEAT.md asks for: its lines that are neither empty nor a heading or comment."""
        if not self.file.is_file():
            return ""
        lines = load_text(self.file).removeprefix("\ufeff").splitlines()
        bare = [line.strip() for line in lines if not line.lstrip().startswith(("#", "<!--"))]
        return "\n".join(line for line in bare if line.strip("-* []"))

    def in_hours(self, now: float) -> bool:
        """Whether a time is within the active hours: from the first minute, before the last."""
        moment = datetime.fromtimestamp(now, self.zone)
        minute, (begin, end) = moment.hour * 60 + moment.minute, self.ends
        return begin <= minute < end if begin < end else minute >= begin or minute < end

    def due(self) -> float:
        """When the next beat is: an interval after the last one, or after the first start."""
        return self.log.beat + self.interval

    def should_run(self, lane_free: bool | None = None) -> tuple[bool, str]:
        """Whether a beat should run now, and the reason."""
        now = self.clock.now()
        try:
            checks = self.checks()
        except (OSError, ValueError) as error:
            return False, f"HEARTBEAT.md: {error}"
        if not checks:
            return False, "HEARTBEAT.md asks for nothing"
        if not self.triggered:
            if not self.interval:
                return False, "off: HEARTBEAT_SECONDS is 0"
            if now < self.due():
                return False, f"not due for {self.due() - now:.0f} s"
            if not self.in_hours(now):
                return False, "outside HEARTBEAT_HOURS"
        if self.lane.busy() if lane_free is None else not lane_free:
            return False, "busy: somebody is being answered"
        return True, "triggered" if self.triggered else "due"

    def tick(self) -> str:
        """Run a beat if it should. Returns what came of it, or why it did not run."""
        # The first start, or a clock that was set back, by more than it is corrected daily.
        if not 0 < self.log.beat <= self.clock.now() + 60:
            self.log.record("beat", at=self.clock.now())
        ready, reason = self.should_run()
        if not ready or not self.lane.attempt():
            return reason
        self.triggered = False
        try:
            self.log.record("beat", at=self.clock.now())
            text = self.app.think("heartbeat", f"{HEARTBEAT}\n\n{self.checks()}")
        except Exception as error:  # it is no message to anybody; the next beat tries again
            self.result = f"failed: {explain(error)}"
            lasting = re.sub(r", again in \d+ s", "", self.result)  # told once, not at each beat
            self.app.report("heartbeat", f"heartbeat {lasting}")
            return self.result
        finally:
            self.lane.release()
        self.app.report("heartbeat")
        self.result = self.tell(strip_ok(text))
        return self.result

    def tell(self, text: str) -> str:
        """Tell the owner what a beat brought, unless it is nothing or was told within a day."""
        if not text:
            return "nothing to tell"
        now = self.clock.now()
        digest = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
        if abs(now - self.log.told.get(digest, -REPEAT_AFTER)) < REPEAT_AFTER:
            return "told before"
        self.app.announce("heartbeat", text)
        self.log.record("told", digest=digest, at=now)
        return "told"

    def run(self) -> None:
        """The runner's thread."""
        while True:
            reason, pause = "", LOOK
            try:
                reason = self.tick()
            except Exception as error:  # as of a full disk
                self.app.report("heartbeat", f"heartbeat: {explain(error)}")
            if reason.startswith("busy"):
                pause = 1
            self.clock.wait(self.event, pause)


def strip_ok(text: str) -> str:
    """What is left to tell of an answer: nothing of HEARTBEAT_OK with a short remark beside it."""
    # Models put it in bold, in quotes or in tags: marks do not count, loose ones go with it.
    text, marks = text.strip(), " \n\t*_`'\"<>/()[].,:;!-\u201c\u201d\u2018\u2019"
    bare = cut_tags(re.sub(r"^(?:<\w+>)+", "", text), "/").strip(marks)
    rest, loose = text, " \n\t*_`:,-"
    if re.match(rf"{HEARTBEAT_OK}\b", bare):
        rest = re.sub(r"^(?:</\w+>)+", "", rest.partition(HEARTBEAT_OK)[2]).lstrip(loose)
    if bare.endswith(HEARTBEAT_OK) and not re.search(r"\w\Z", bare.removesuffix(HEARTBEAT_OK)):
        rest = cut_tags(rest.rpartition(HEARTBEAT_OK)[0]).rstrip(loose)
    if rest == text:
        return text
    return "" if len(rest.strip(marks)) <= ACK_MAX else rest


def cut_tags(text: str, slash: str = "") -> str:
    """A text without the tags at its end; read from there, as a search would begin at each tag."""
    tags = re.match(rf"(?:>\w+{slash}<)*", text[::-1])
    return text[: len(text) - tags.end()]


@dataclass
class CronJob:
    """One entry of CRON.json: when, and what."""

    id: str
    name: str
    enabled: bool
    schedule: dict
    payload: dict
    delete_after_run: bool
    agent: str

    def __post_init__(self) -> None:
        """Raise ValueError, saying what is wrong, unless the job can run."""
        texts = (self.id, self.name, self.agent)
        if not all(isinstance(text, str) for text in texts) or not self.id.strip():
            raise ValueError("id, name and agent must be text")
        if not all(isinstance(flag, bool) for flag in (self.enabled, self.delete_after_run)):
            raise ValueError("enabled and delete_after_run must be true or false")
        if not isinstance(self.schedule, dict):
            raise ValueError("schedule must be an object")
        match self.payload:
            case {"kind": "agent_turn", "message": str(text)} if text.strip():
                pass
            case {"kind": "system_event", "text": str(text)} if text.strip():
                pass
            case _:
                raise ValueError(
                    "payload must be agent_turn with message or system_event with text"
                )
        if not isinstance(self.schedule.get("tz", ""), str):
            raise ValueError("tz must be the name of a time zone")
        self.zone = local_zone(self.schedule.get("tz", ""))
        match self.schedule:
            case {"kind": "at", "at": str(at)}:
                self.at = self.moment(at)
            case {"kind": "every", "every_seconds": int(seconds)} if (
                0 < seconds < 1e9 and seconds is not True  # an int, too
            ):
                anchor = self.schedule.get("anchor")
                self.anchor = None if anchor is None else self.moment(anchor)
            case {"kind": "cron", "expr": str(expr)}:
                if len(expr) > 200 or not CRON_EXPR.fullmatch(" ".join(expr.split())):
                    raise ValueError(f"expr must be five fields of cron, not {expr[:200]!r}")
                self.after(time.time())  # raises if there is none
            case _:
                raise ValueError("schedule must be at, every (every_seconds > 0) or cron with expr")

    def moment(self, text: object) -> float:
        """A time such as 2030-01-07T09:00:00+01:00; without an offset it is in tz, or local."""
        try:
            moment = datetime.fromisoformat(text)
        except (TypeError, ValueError):
            raise ValueError(f"{text!r} is no time such as 2030-01-07T09:00:00+01:00") from None
        at = moment.replace(tzinfo=moment.tzinfo or self.zone).timestamp()
        if not 0 <= at < 250e9:  # the year 9892: in any zone it is a date
            raise ValueError(f"{text!r} is too far away")
        return at

    def after(self, base: float) -> float | None:
        """The first time after `base`. Raises ValueError for an expression that has none."""
        if self.schedule["kind"] == "at":
            return self.at if self.at > base else None
        if self.schedule["kind"] == "every":
            every, anchor = self.schedule["every_seconds"], self.anchor
            return anchor + max((base - anchor) // every + 1, 0) * every
        return next(self.times(base)).timestamp()

    def times(self, base: float) -> Iterator[datetime]:
        """The times of the expression, as cron has them: days and weekdays both given are either;
        on the night that the clock goes back a fixed time comes once, and on the night that it
        goes forward a time that is left out comes right after, unless it is one of `*`."""
        from croniter import croniter

        expr = re.sub(r"\b(\d+)-\1\b", r"\1", self.schedule["expr"])  # 9-9 is 9, not all
        minute, hour, day, _, weekday = expr.split()
        start = datetime.fromtimestamp(base, self.zone)
        is_fixed = "*" not in (minute[0], hour[0])
        try:
            times = croniter(expr, start, day_or="*" not in (day[0], weekday[0]))
            minutes, hours = times.expanded[:2]
            while True:
                moment = times.get_next(datetime)
                fits = (moment.minute in minutes or "*" in minutes) and (
                    moment.hour in hours or "*" in hours
                )
                if not moment.fold if is_fixed else fits:
                    yield moment
        except (AttributeError, TypeError, ValueError, LookupError) as error:
            raise ValueError(f"expr {expr!r}: {error}") from None

    def digest(self, *names: str) -> str:
        """What tells two versions of a job apart."""
        parts = {name: value for name, value in asdict(self).items() if not names or name in names}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        about = {"at": "at", "every": "every_seconds", "cron": "expr"}[self.schedule["kind"]]
        return f"{self.id}: {self.schedule['kind']} {self.schedule[about]}"


def in_thread(function: Callable, *args: object) -> None:
    threading.Thread(target=function, args=args, daemon=True).start()


class CronService:
    """Runs the jobs of CRON.json when they are due, each once; its own thread only looks when."""

    def __init__(
        self, app: "App", clock: Clock, log: RunLog, spawn: Callable | None = None
    ) -> None:
        self.app, self.clock, self.log, self.lane = app, clock, log, app.lane
        self.spawn = spawn or in_thread
        self.file = app.agent.workspace / "CRON.json"
        self.stamp: object = ""
        self.problems: list[str] = []
        self.jobs: dict[str, CronJob] = {}
        self.queue: list[tuple[float, str]] = []
        self.active: set[str] = set()
        self.latest = 0.0
        self.pauses: dict[str, float] = {}
        self.event = threading.Event()

    def load(self) -> None:
        """Take in CRON.json if it has changed; one that cannot be read leaves the jobs alone."""
        with suppress(OSError):
            state = self.file.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            if stamp == self.stamp:
                return
            self.stamp = stamp
            try:
                entries = json.loads(load_text(self.file).removeprefix("\ufeff"))["jobs"]
                if not isinstance(entries, list):
                    raise TypeError
            except OSError as error:
                self.problems, self.stamp = [f"CRON.json: {error.strerror}"], ""
            except (KeyError, TypeError):
                self.problems = ['CRON.json: it must hold {"jobs": [...]}']
            except (ValueError, RecursionError) as error:
                self.problems = [f"CRON.json: {error}"]
            else:
                self.take(entries)
            return
        self.jobs, self.queue, self.problems, self.stamp = {}, [], [], ""

    def take(self, entries: list) -> None:
        """Put these jobs in place of those before; what is wrong with one is noted."""
        self.jobs, self.queue, self.problems = {}, [], []
        for number, entry in enumerate(entries, 1):
            name = isinstance(entry, dict) and entry.get("id") or f"job {number}"
            try:
                job = self.read(entry)
                self.take_in(job)
                self.plan(job)
                self.jobs[job.id] = job
            except ValueError as error:
                self.problems.append(f"CRON.json, {name}: {error}")

    def read(self, entry: object) -> CronJob:
        """The job that an entry describes. Raises ValueError."""
        if not isinstance(entry, dict):
            raise ValueError("a job must be an object")
        usual = {"name": entry.get("id"), "enabled": True, "delete_after_run": False}
        needed = {"id": None, "schedule": None, "payload": None, "agent": "main"}
        if wrong := entry.keys() - usual - needed.keys():
            raise ValueError(f"{', '.join(map(str, wrong))} is unknown")
        job = CronJob(**{**usual, **needed, **entry})
        if job.id in self.jobs:
            raise ValueError("another job has this id")
        if job.agent not in self.app.agents.agents:
            raise ValueError(f"there is no agent {job.agent!r}")
        return job

    def take_in(self, job: CronJob) -> None:
        """Bring a job and its state together. Raises ValueError if its one time was past before."""
        schedule, version, now = job.digest("schedule"), job.digest(), self.clock.now()
        state = self.log.states.get(job.id, JobState())
        was_running = state.running and state.schedule == schedule
        if (state.schedule, state.version) != (schedule, version):
            self.log.record("seen", job=job.id, at=now, schedule=schedule, version=version)
        if was_running and job.id not in self.active:
            self.end(job, "interrupted: the program ended while it ran", now)
        state = self.log.states[job.id]
        if max(state.since, state.last) > now + SET_BACK:  # the clock was wrong then
            state = replace(state, since=now, last=now, ended=now)
            self.log.record("state", job=job.id, state=asdict(state))
        if job.schedule["kind"] == "every" and job.anchor is None:
            job.anchor = state.since
        if job.schedule["kind"] == "at" and job.at < state.since - 60 and not state.done:
            raise ValueError(f"{job.schedule['at']} was past when the job was first seen")

    def next(self, job: CronJob) -> float | None:
        """When a job runs next, None for never: a run that was missed is due at once, and once."""
        state = self.log.states[job.id]
        is_cut_off = state.running and job.schedule["kind"] == "at"  # its end could not be noted
        if not job.enabled or state.disabled or state.done or is_cut_off:
            return None
        retry = state.ended + BACKOFF[state.errors - 1] if state.errors else 0
        retry = max(retry, self.pauses.get(job.id, 0))
        if job.schedule["kind"] == "at":
            return max(job.at, retry)
        return max(job.after(max(state.since, state.last)), retry)

    def plan(self, job: CronJob) -> None:
        """Put a job's next run into the queue."""
        if (at := self.next(job)) is not None:
            heapq.heappush(self.queue, (at, job.id))

    def tick(self) -> float:
        """Start what is due. Returns the seconds until something may be due, LOOK at most."""
        with self.log.lock:
            now = self.clock.now()
            if now < self.latest - SET_BACK:  # look at all jobs again
                self.stamp = ""
            self.latest = now
            self.load()
            self.app.report("CRON.json", *self.problems)
            while self.queue and self.queue[0][0] <= now:
                at, name = heapq.heappop(self.queue)
                job = self.jobs.get(name)
                if job and name not in self.active and self.next(job) == at:
                    self.begin(job)
            return min(max(self.queue[0][0] - now, 0), LOOK) if self.queue else LOOK

    def begin(self, job: CronJob) -> None:
        """Run a job in a thread of its own: one that takes long delays no other."""
        self.active.add(job.id)
        self.spawn(self.work, job)

    def work(self, job: CronJob) -> None:
        """Run a job, when the lane is free if it needs the model; a thread of its own."""
        is_turn = job.payload["kind"] == "agent_turn"
        while is_turn and not self.lane.attempt():
            time.sleep(0.5)
        try:
            self.run_once(job)
        finally:
            if is_turn:
                self.lane.release()

    def run_once(self, job: CronJob) -> None:
        """Run a job, note what came of it, and tell; the outermost of its thread."""
        text, error = "", ""
        try:
            current = self.jobs.get(job.id)
            if not current or current.digest() != job.digest():
                return  # it was edited or removed while it waited
            self.log.record("start", job=job.id, at=self.clock.now())
            try:
                text = self.perform(job)
            except Exception as failure:  # whatever it is, the job has failed
                error = explain(failure)
            try:
                if text:
                    self.app.announce(f"cron {job.id}", text)
            finally:
                self.end(job, error, self.clock.now())
            if job.delete_after_run and self.log.states[job.id].done and not error:
                self.forget(job)
        except Exception as failure:  # as of a full disk: a run that cannot be noted comes again
            self.app.report("cron", f"cron {job.id}: {explain(failure)}")
            self.pauses[job.id] = self.clock.now() + BACKOFF[0]
        finally:
            with self.log.lock:
                self.active.discard(job.id)
                if job.id in self.jobs:
                    self.plan(self.jobs[job.id])
            self.event.set()

    def perform(self, job: CronJob) -> str:
        """Do a job; a turn has a session of its own. Returns what there is to tell."""
        if job.payload["kind"] == "system_event":
            return job.payload["text"]
        text = f"[cron {job.id}] {job.payload['message']}"
        return strip_ok(self.app.think(f"cron-{job.id}", text, job.agent))

    def end(self, job: CronJob, error: str, now: float) -> None:
        """Write down how a run ended. A failure is told of; the fifth in a row is the last."""
        cut_off = error.startswith("interrupted")
        is_same = self.log.states[job.id].schedule == job.digest("schedule")
        done = is_same and job.schedule["kind"] == "at" and (not error or cut_off)
        self.log.record("end", job=job.id, at=now, error=error, done=done)
        state = self.log.states[job.id]
        if state.errors == MAX_ERRORS:
            told = f"{job.id} failed {MAX_ERRORS} times in a row and is off: {error}"
            self.app.announce(f"cron {job.id}", f"{told}. Edit it, or /cron-trigger {job.id}")
        elif error:
            self.app.cli.send("", f"[cron {job.id}: {error}]")

    def forget(self, job: CronJob) -> None:
        """Take a job out of CRON.json."""
        whole = json.loads(load_text(self.file).removeprefix("\ufeff"))
        jobs = whole["jobs"]
        whole["jobs"] = [e for e in jobs if not isinstance(e, dict) or e.get("id") != job.id]
        replace_file(self.file, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")

    def run(self) -> None:
        """The service's thread."""
        while True:
            pause = LOOK
            try:
                pause = self.tick()
            except Exception as error:  # as of a full disk
                self.app.report("cron", f"cron: {explain(error)}")
            self.clock.wait(self.event, pause)

    def find(self, name: str) -> CronJob:
        """The job of an id. Raises ValueError."""
        with self.log.lock:
            self.load()
        if name not in self.jobs:
            raise ValueError(f"there is no job {name!r}; see /cron")
        return self.jobs[name]

    def describe(self, job: CronJob) -> str:
        """A job in a line: when it runs next, and what became of it last."""
        state, at = self.log.states[job.id], self.next(job)
        then = f"next {self.clock_time(job, at)}" if at else "off" if not state.done else "done"
        last = f", last {self.clock_time(job, state.last)}" if state.last else ""
        failed = f", {state.errors} errors: {state.error}" if state.errors else ""
        return f"{job}, {'running' if job.id in self.active else then}{last}{failed}"

    def clock_time(self, job: CronJob, at: float) -> str:
        return datetime.fromtimestamp(at, job.zone).isoformat(" ", "seconds")

    def preview(self, job: CronJob, count: int = 5) -> list[str]:
        """The next times of a job, by its schedule."""
        base, times = self.clock.now(), []
        while len(times) < count and (at := job.after(base)) is not None:
            times.append(self.clock_time(job, at))
            base = at
        return times


@command("/heartbeat", "whether the heartbeat would run now, and why not")
def show_heartbeat(agent: Agent, rest: str) -> str:
    beat = agent.app.heartbeat
    reason = beat.should_run(lane_free=True)[1]  # but for this command
    return f"{reason}; the last beat: {beat.result}"


@command("/trigger", "run the heartbeat now, whatever the time")
def trigger_heartbeat(agent: Agent, rest: str) -> str:
    beat = agent.app.heartbeat
    if not beat.checks():
        return "HEARTBEAT.md asks for nothing"
    beat.triggered = True
    beat.event.set()
    return "it runs as soon as nobody is being answered"


@command("/cron", "the jobs of CRON.json, when they run next, and what is wrong with them")
def show_cron(agent: Agent, rest: str) -> str:
    cron = agent.app.cron
    with cron.log.lock:
        cron.load()
        lines = [cron.describe(job) for job in cron.jobs.values()]
    return "\n".join([*lines, *cron.problems]) or "there are no jobs"


@command(
    "/cron-trigger <id>", "run a job now; one that was switched off for its errors is on again"
)
def trigger_job(agent: Agent, name: str) -> str:
    cron = agent.app.cron
    job = cron.find(name)
    if job.id in cron.active:
        raise ValueError(f"{job.id} is running or waiting to run")
    cron.begin(job)
    return "it runs as soon as its lane is free"


@command("/cron-preview <id>", "the next five times of a job")
def preview_job(agent: Agent, name: str) -> str:
    return "\n".join(agent.app.cron.preview(agent.app.cron.find(name))) or "never again"


@command("/lanes", "what runs one at a time")
def show_lanes(agent: Agent, rest: str) -> str:
    active = ", ".join(sorted(agent.app.cron.active)) or "none"
    return f"{agent.app.lane}\ncron jobs that run or wait: {active}"


# --- s08: delivery ---

SEND_BACKOFF = (5, 25, 120, 600)  # seconds between the tries, as in OpenClaw 2026.3
JITTER = 0.2  # of them: what failed together is not tried together
MAX_TRIES = 5
LONGEST_WAIT = 86400  # seconds; to try once a day does no harm
SENDERS = 4  # threads of an account: so many recipients may hang at a time
HANGS = 1  # seconds after which a send holds up the next one no more
MAX_FAILED = 1000  # texts that are kept; the oldest makes room
MAX_SENT = 1000  # ids of texts that are gone
FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})([^\n]*)\n?", re.MULTILINE)


@dataclass
class QueuedDelivery:
    """A text on its way to one recipient, in pieces. `due` is by the clock of the queue."""

    id: str
    channel: str
    account: str
    peer: str
    pieces: list[str]
    sent: int = 0  # pieces that the platform has
    tries: int = 0  # that failed, of the next one
    error: str = ""
    due: float = 0

    @property
    def recipient(self) -> tuple[str, str, str]:
        return self.channel, self.account, self.peer

    def check(self) -> None:
        """Raise TypeError unless the fields are what they should be."""
        texts, numbers = (*self.recipient, self.error, *self.pieces), (self.sent, self.tries)
        is_right = all(isinstance(text, str) for text in texts)
        if not is_right or not all(isinstance(number, int) for number in numbers):
            raise TypeError
        if not 0 <= self.sent < len(self.pieces) or self.tries < 0:
            raise TypeError

    def __str__(self) -> str:
        tried = f" after {self.tries} tries: {self.error}" if self.error else ""
        text = " ".join(self.pieces[self.sent].split())
        return f"{self.channel} {self.account} {self.peer}, {text[:40]!r}{tried}"


class DeliveryQueue:
    """What has to go out: on disk before it is sent, there until it is acknowledged, in order.

    A journal of enqueue, ack (of one piece), retry, failed, again and sent (ids of the past).
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.lock = now, threading.RLock()
        self.settled = threading.Condition(self.lock)
        self.pending: dict[str, QueuedDelivery] = {}
        self.failed: dict[str, QueuedDelivery] = {}
        self.sent: dict[str, None] = {}
        self.lines: dict[tuple, deque[QueuedDelivery]] = {}  # by recipient
        self.outlets: dict[tuple, tuple[list, threading.Condition]] = {}  # by channel
        self.busy: dict[tuple, float] = {}  # since when something is on its way to a recipient
        self.owed: list[dict] = []
        self.numbers, self.closed, self.failure_rate = count(), False, 0.0
        self.journal = Journal(path)
        self.counts = dict.fromkeys(("enqueue", "ack", "retry", "failed", "again", "sent"), 0)
        restore(self.journal, self.apply)
        self.counts = dict.fromkeys(self.counts, 0)  # without the replay
        self.compact()

    def apply(self, record: dict) -> None:
        """Make the change that a record describes, now and in a replay. Raises TypeError."""
        delivery = self.pending.get(record.get("id", ""))
        match record:
            case {"type": "enqueue", "delivery": {"id": str(name), "pieces": list()} as fields}:
                if name in self.pending:
                    raise TypeError
                delivery = QueuedDelivery(**fields | {"due": 0})
                delivery.check()
                self.pending[name] = delivery
                self.lines.setdefault(delivery.recipient, deque()).append(delivery)
            case {"type": "ack"} if delivery:
                delivery.sent, delivery.tries, delivery.error = delivery.sent + 1, 0, ""
                if delivery.sent == len(delivery.pieces):
                    self.sent[delivery.id] = None
                    self.leave(delivery)
            case {"type": "retry", "tries": int(tries), "error": str(error)} if delivery:
                wait = max(0, min(record.get("wait", 0), LONGEST_WAIT))  # NaN becomes 0
                left = min(max(0, record.get("at", 0) + wait - time.time()), wait)
                delivery.tries, delivery.error = max(tries, 0), error
                delivery.due = self.now() + left
            case {"type": "failed", "tries": int(tries), "error": str(error)} if delivery:
                delivery.tries, delivery.error = tries, error
                self.leave(delivery)
                self.failed[delivery.id] = delivery
                for oldest in list(self.failed)[:-MAX_FAILED]:
                    del self.failed[oldest]
            case {"type": "again", "id": str(name)} if name in self.failed:
                delivery = replace(self.failed.pop(name), tries=0, error="", due=0)
                self.pending[name] = delivery
                self.lines.setdefault(delivery.recipient, deque()).append(delivery)
            case {"type": "sent", "ids": list(ids)}:
                self.sent |= dict.fromkeys(map(str, ids))
            case _:
                raise TypeError
        self.counts[record["type"]] += 1
        if delivery:
            self.schedule(delivery.recipient)

    def leave(self, delivery: QueuedDelivery) -> None:
        """Take a text out: nothing more will become of it."""
        del self.pending[delivery.id]
        self.lines[delivery.recipient].remove(delivery)
        if not self.lines[delivery.recipient]:
            del self.lines[delivery.recipient]

    def outlet(self, channel: tuple) -> tuple[list, threading.Condition]:
        """The heap of a channel (name, account): who is due when; and what wakes its threads."""
        return self.outlets.setdefault(channel, ([], threading.Condition(self.lock)))

    def schedule(self, recipient: tuple) -> None:
        """Plan the first text of a recipient's line. A plan that no longer holds is passed over."""
        if line := self.lines.get(recipient):
            heap, due = self.outlet(recipient[:2])
            heapq.heappush(heap, (line[0].due, next(self.numbers), recipient))
            with self.lock:  # a replay does not hold it
                due.notify()

    def write(self, record: dict, durable: bool) -> None:
        """Write down a record, and before it what a full disk did not take. Raises OSError."""
        self.owed.append(record)
        while self.owed:
            self.journal.append(self.owed[0], durable)
            del self.owed[0]

    def tidy(self) -> None:
        """Compact the file when most of it is past. Only when it holds what memory does."""
        if self.journal.written > 1000 + 4 * (len(self.pending) + len(self.failed)):
            self.compact()

    def compact(self) -> None:
        """Leave in the file what is pending or failed, and the latest ids."""
        self.sent = dict.fromkeys(list(self.sent)[-MAX_SENT:])
        records = [{"type": "sent", "ids": list(self.sent)}]
        for delivery in (*self.failed.values(), *self.pending.values()):
            fields = {name: value for name, value in vars(delivery).items() if name != "due"}
            records.append({"type": "enqueue", "delivery": fields})
            about = {"id": delivery.id, "tries": delivery.tries, "error": delivery.error}
            wait = max(delivery.due - self.now(), 0)
            if delivery.id in self.failed:
                records.append({"type": "failed", **about})
            elif wait:
                records.append({"type": "retry", **about, "wait": wait, "at": time.time()})
        path = self.journal.path
        del self.journal  # that closes it: Windows replaces no file that is open
        try:
            with suppress(OSError):  # of a full disk: it can wait
                rewrite_journal(path, records)
                self.owed = []
        finally:  # at Ctrl-C, too
            self.journal = Journal(path)

    def has(self, name: str) -> bool:
        """Whether a text with this id was taken before."""
        return any(name in ids for ids in (self.pending, self.failed, self.sent))

    def enqueue(self, delivery: QueuedDelivery) -> None:
        """Take a text, on disk when this returns, once for each id. Raises OSError."""
        with self.lock:
            if self.has(delivery.id):
                return
            fields = {name: value for name, value in vars(delivery).items() if name != "due"}
            self.change({"type": "enqueue", "delivery": fields})

    def change(self, record: dict) -> None:
        """Write a record down, then make its change. Raises OSError when it is not on disk."""
        try:
            self.write(record, durable=True)
        except OSError:
            self.owed.remove(record)
            raise
        self.apply(record)
        self.tidy()

    def take(self, channel: tuple, is_keyed: bool = False) -> QueuedDelivery | None:
        """Wait for the next text that is due on a channel; None when the program ends.

        A crash repeats what is on its way: so where that would come twice, a text waits for the
        one before it, on whatever channel, unless that hangs.
        """
        with self.lock:
            heap, due = self.outlet(channel)
            while not self.closed:
                now = self.now()
                turn = 0 if is_keyed else max(self.busy.values(), default=-HANGS) + HANGS
                while turn <= now and heap and heap[0][0] <= now:
                    recipient = heapq.heappop(heap)[2]
                    line = self.lines.get(recipient)
                    if line and recipient not in self.busy and line[0].due <= now:
                        self.busy[recipient] = -HANGS if is_keyed else now  # -HANGS: nobody waits
                        return line[0]
                due.wait(max(heap[0][0] - now, turn - now, 0) if heap else None)
        return None

    def settle(self, delivery: QueuedDelivery, kind: str, **about: object) -> None:
        """Note what came of a try (ack, retry or failed), without a sync of its own.

        Raises OSError when it is not in the file: it is noted here, and written with the next.
        """
        with self.lock:
            record = {"type": kind, "id": delivery.id, **about}
            self.busy.pop(delivery.recipient, None)
            self.apply(record)
            self.settled.notify_all()
            for _, due in self.outlets.values():
                due.notify()
            self.write(record, durable=False)
            self.tidy()

    def retry(self, name: str) -> int:
        """Put the failed texts whose id begins so back, with a fresh count. Returns how many."""
        with self.lock:
            names = [each for each in self.failed if each.startswith(name)]
            for each in names:
                self.change({"type": "again", "id": each})
        return len(names)

    def close(self, seconds: float) -> None:
        """Begin no more, and give what is on its way so long to arrive."""
        with self.lock:
            self.closed = True
            self.settled.wait_for(lambda: not self.busy, seconds)


class DeliveryRunner:
    """Sends what is queued for one channel, to SENDERS recipients at a time."""

    def __init__(self, channel: Channel, queue: DeliveryQueue) -> None:
        self.channel, self.queue = channel, queue

    def run(self) -> None:
        for _ in range(SENDERS - 1):
            in_thread(self.work)
        self.work()

    def work(self) -> None:
        """Send what is due, one piece after the other; the outermost loop of a thread."""
        account, is_keyed = self.channel.account, self.channel.is_keyed
        while delivery := self.queue.take((account.channel, account.id), is_keyed):
            try:
                self.attempt(delivery)
            except Exception as error:  # as of a full disk
                self.channel.tell(f"what was sent may be sent again: {error}", once=True)

    def attempt(self, delivery: QueuedDelivery) -> None:
        """Send the next piece of a text, and note what came of it."""
        piece, key = delivery.pieces[delivery.sent], f"{delivery.id}/{delivery.sent}"
        try:
            if random.random() < self.queue.failure_rate:
                raise ChannelError("simulated failure")
            if not self.channel.allows(InboundMessage(*delivery.recipient, "", [""])):
                raise ChannelError("it is in no ..._ALLOWED_CHATS", permanent=True)
            self.channel.send(delivery.peer, piece, key)
        except Exception as error:  # whatever it is, the text is kept
            self.note_failure(delivery, error)
        else:
            self.queue.settle(delivery, "ack")

    def note_failure(self, delivery: QueuedDelivery, error: Exception) -> None:
        """Plan the next try; none for a text that can never arrive, or that had its tries."""
        told = self.channel.account.hide(str(error) or type(error).__name__)
        wait = max(0, error.retry_after) if isinstance(error, ChannelError) else 0
        tries = delivery.tries + (not wait)  # to be told to wait is no failed try
        if getattr(error, "permanent", False) or tries >= MAX_TRIES:
            self.channel.tell(f"not sent to {delivery.peer}: {told}; see /failed")
            return self.queue.settle(delivery, "failed", tries=tries, error=told)
        if not delivery.error:
            self.channel.tell(f"{told}; trying again")
        if not wait:
            wait = SEND_BACKOFF[tries - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        about = {"tries": tries, "error": told, "wait": wait, "at": time.time()}
        return self.queue.settle(delivery, "retry", **about)


def cut_piece(text: str, limit: int) -> tuple[str, str]:
    """The first piece of a text, of at most `limit` UTF-16 units, and the rest.

    It ends between paragraphs, lines or words. A code block that is cut is closed in the one and
    opened again in the other.
    """
    size = cut_before(text, limit)
    fence, start = open_fence(text, size)
    begun = start + len(fence) + 1
    if size == len(text) or not fence or (start == 0 and len(fence) >= limit // 4):
        return text[:size], text[size:]  # or no room to repeat the fence
    mark = FENCE.match(fence)[1]
    size = cut_before(text, limit - len(mark) - 1, begun)
    if start > size // 2 or (start and size <= begun):  # it may fit into the next piece
        return text[:start], text[start:]
    head, end = text[:size], FENCE.match(text, size)
    if end and is_end(end, mark) and len(end[0]) <= len(mark) + 1:
        return head + end[0], text[end.end() :]
    return head + "\n" * (head[-1] != "\n") + mark, f"{fence}\n{text[size:]}"


def cut_before(text: str, limit: int, least: int = 0) -> int:
    """Where to cut: at most `limit` UTF-16 units stand before, more than `least` characters."""
    size = len(text[:limit].encode("utf-16-le")[: 2 * limit].decode("utf-16-le", "ignore"))
    if size == len(text):
        return size
    ends = (text.rfind(mark, 0, size) + len(mark) for mark in ("\n\n", "\n", " "))
    size = next((end for end in ends if end > max(size // 2, least)), size)
    places = range(size, max(size - 50, least), -1)  # no emoji, with its joints, is longer
    return next((end for end in places if not joined(text, end)), size)


def joined(text: str, at: int) -> bool:
    """Whether the characters around a place are seen as one: accents, emoji, flags, Hangul."""
    before, after = text[at - 1], text[at]
    letters = re.match("[\U0001f1e6-\U0001f1ff]*", text[at - 1 :: -1])[0]  # two are a flag
    return (
        "\u200d" in (before, after)
        or unicodedata.category(after).startswith("M")
        or bool(re.match("[\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f\u1160-\u11ff]", after))
        or (len(letters) % 2 == 1 and "\U0001f1e6" <= after <= "\U0001f1ff")
        or before + after == "\r\n"
    )


def open_fence(text: str, at: int) -> tuple[str, int]:
    """The line that began the code block around a place, and where, or "". A cut line is whole."""
    line, start = "", 0
    for match in FENCE.finditer(text[: at - 1] + text[at - 1 :].partition("\n")[0]):
        if not line:
            line, start = match[0].rstrip("\n"), match.start()
        elif is_end(match, FENCE.match(line)[1]):
            line = ""
    return line, start


def is_end(match: re.Match, mark: str) -> bool:
    """Whether a line ends the code block that began with a mark."""
    return match[1].startswith(mark) and not match[2].strip()


@command("/queue", "what waits to be sent")
def show_queue(agent: Agent, rest: str) -> str:
    queue = agent.app.delivery
    with queue.lock:
        lines = [f"{len(queue.pending)} texts wait to be sent, to {len(queue.lines)} recipients"]
        for line in islice(queue.lines.values(), 20):
            wait = max(line[0].due - queue.now(), 0)
            lines.append(f"{len(line)} to {line[0]}" + (f"; in {wait:.0f} s" if wait else ""))
    return "\n".join(lines)


@command("/failed", "what could not be sent, and why")
def show_failed(agent: Agent, rest: str) -> str:
    failed = list(agent.app.delivery.failed.values())
    return "\n".join(f"{each.id}: {each}" for each in failed[-20:]) or "nothing has failed"


@command("/retry [id]", "try what failed once more; the beginning of an id is enough")
def retry_failed(agent: Agent, name: str) -> str:
    return f"{agent.app.delivery.retry(name)} texts are tried again"


@command(
    "/simulate-failure [rate|reason]", "let some of the sends fail (0.5 is half), or a model call"
)
def simulate_failure(agent: Agent, rest: str) -> str:
    if rest in set(FailoverReason):
        agent.app.resilience.simulated = FailoverReason(rest)
        return f"the next model call fails: {rest}"
    if not re.fullmatch(r"0|1|0?\.\d+|[01]\.0*", rest or "0"):
        reasons = ", ".join(FailoverReason)
        raise ValueError(f"the rate must be from 0 to 1, not {rest}; a reason is one of {reasons}")
    agent.app.delivery.failure_rate = float(rest or 0)
    return f"{agent.app.delivery.failure_rate:.0%} of the sends fail from now on"


@command("/stats", "what was done since the start")
def show_stats(agent: Agent, rest: str) -> str:
    done = agent.app.delivery.counts
    return (
        f"delivery: {done['enqueue']} texts taken, {done['ack']} pieces sent, "
        f"{done['retry']} tries put off, {done['failed']} texts given up, {done['again']} put back"
        f"\nmodel: {agent.app.profiles.stats()}"
    )


# --- s09: resilience ---

COOLDOWNS = (30, 60, 300)  # seconds, by failures in a row
LONG_COOLDOWNS = (600, 1800, 3600)  # for what a person has to mend
RETRIES = (1, 4)  # seconds before what may have passed is tried once more in a call
PATIENCE = 20  # seconds that a turn waits at most when a server says how long
MAX_TRYING = 60  # seconds after which a call is not begun again
MAX_ATTEMPTS = 12  # at one model call
MAX_PROFILES = 9


class FailoverReason(StrEnum):
    """Why a model call failed, as far as it matters for what to do next."""

    RATE_LIMIT = "rate_limit"
    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"  # no answer in time, or the line broke
    BILLING = "billing"
    AUTH = "auth"
    MODEL_NOT_FOUND = "model_not_found"
    FORMAT = "format"  # this server will not take this request
    OVERFLOW = "overflow"
    UNKNOWN = "unknown"


PASSING = {FailoverReason.RATE_LIMIT, FailoverReason.OVERLOADED, FailoverReason.TIMEOUT}
OF_THE_KEY = {FailoverReason.AUTH, FailoverReason.BILLING}  # what all share that have the key
OF_THE_REQUEST = {FailoverReason.FORMAT, FailoverReason.OVERFLOW}  # another one may be fine
REASONS_BY_CODE = {
    "insufficient_quota": FailoverReason.BILLING,
    "billing_hard_limit_reached": FailoverReason.BILLING,
    "billing_not_active": FailoverReason.BILLING,
    "exceeded_current_quota_error": FailoverReason.BILLING,  # Moonshot
    "Arrearage": FailoverReason.BILLING,  # DashScope
    "rate_limit_exceeded": FailoverReason.RATE_LIMIT,
    "rate_limit_error": FailoverReason.RATE_LIMIT,
    "invalid_api_key": FailoverReason.AUTH,
    "model_not_found": FailoverReason.MODEL_NOT_FOUND,
    "model_decommissioned": FailoverReason.MODEL_NOT_FOUND,
    "invalid_model": FailoverReason.MODEL_NOT_FOUND,
    "overloaded_error": FailoverReason.OVERLOADED,
    "server_error": FailoverReason.OVERLOADED,
}
REASONS_BY_STATUS = {
    401: FailoverReason.AUTH,
    402: FailoverReason.BILLING,
    403: FailoverReason.AUTH,
    404: FailoverReason.MODEL_NOT_FOUND,
    408: FailoverReason.TIMEOUT,
    409: FailoverReason.OVERLOADED,
    429: FailoverReason.RATE_LIMIT,
    498: FailoverReason.OVERLOADED,  # Groq
    504: FailoverReason.TIMEOUT,
}
SIMULATED = {
    "rate_limit": (openai.RateLimitError, 429, "rate_limit_exceeded"),
    "overloaded": (openai.InternalServerError, 503, ""),
    "billing": (openai.RateLimitError, 429, "insufficient_quota"),
    "auth": (openai.AuthenticationError, 401, "invalid_api_key"),
    "model_not_found": (openai.NotFoundError, 404, "model_not_found"),
    "format": (openai.BadRequestError, 400, "unsupported_parameter"),
    "overflow": (openai.BadRequestError, 400, "context_length_exceeded"),
}


class NoProfileLeft(openai.OpenAIError):
    """Every profile was tried, or has to rest; the question stays in the history."""


def classify_failure(error: BaseException) -> FailoverReason | None:
    """Why a model call failed, by status and code, never by loose words; None for a full disk.

    The codes are OpenAI's and those of servers that speak as it does.
    """
    if isinstance(error, ContextOverflow):
        return FailoverReason.OVERFLOW
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return None  # of the disk: no other server can help
    if type(error) is openai.OpenAIError and error.__cause__:  # what is behind "no summary"
        return classify_failure(error.__cause__)
    if isinstance(error, openai.OpenAIError) and is_overflow(error):
        return FailoverReason.OVERFLOW  # as the guard sees it
    status, code = getattr(error, "status_code", None), str(getattr(error, "code", None) or "")
    if status is None and code.isdecimal():  # in mid-stream there is no other status
        status = int(code)
    for name in (code, str(getattr(error, "type", None) or "")):
        if name in REASONS_BY_CODE:
            return REASONS_BY_CODE[name]
    told = str(getattr(error, "body", error))
    if "'reason': 'API_KEY_INVALID'" in told:  # Gemini's is a 400
        return FailoverReason.AUTH
    if status == 403 and "'flagged_input': " in told:  # OpenRouter's moderation
        return FailoverReason.FORMAT
    if status == 402 and retry_after(error):  # OpenRouter: no credit while others run
        return FailoverReason.RATE_LIMIT
    if status in REASONS_BY_STATUS:
        return REASONS_BY_STATUS[status]
    if status is not None and status >= 400:
        return FailoverReason.OVERLOADED if status >= 500 else FailoverReason.FORMAT
    if str(error).startswith("the answer broke off"):  # call_model's own words
        return FailoverReason.TIMEOUT
    if str(error).startswith(NOTES["content_filter"]):
        return FailoverReason.FORMAT
    is_network = type(error).__module__.startswith(("httpx", "httpcore"))  # httpx2, too
    if is_network or isinstance(error, openai.APIConnectionError | ConnectionError | TimeoutError):
        return FailoverReason.TIMEOUT
    return FailoverReason.UNKNOWN


def retry_after(error: BaseException) -> float:
    """The seconds that a server wants to be left alone, 0 if it does not say."""
    failed = error if hasattr(error, "response") else error.__cause__  # it may be a summary's
    headers = getattr(getattr(failed, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        text = headers.get(name, "")
        if re.fullmatch(r"\d{1,9}(\.\d+)?", text):
            return min(float(text) / unit, LONGEST_WAIT)
        with suppress(ArithmeticError, TypeError, ValueError):
            wait = parsedate_to_datetime(text).timestamp() - time.time()
            return min(max(wait, 0), LONGEST_WAIT)
    return 0


@dataclass
class AuthProfile:
    """A key at a server with a model. `settings` are put over those of each request."""

    name: str
    key: str  # its own name, or that of the profile whose key it shares
    client: openai.OpenAI
    settings: dict
    reason: FailoverReason | None = None
    error: str = ""
    errors: int = 0  # in a row
    until: float = 0  # it rests, by the clock of the manager
    is_told: bool = False  # a server said for how long
    calls: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        model = self.settings.get("model", "MODEL_ID or the agent's own")
        return f"{self.name}: {model} at {self.client.base_url.host}"


class ProfileManager:
    """The profiles in the order in which they are tried, and which of them have to rest."""

    def __init__(self, agent: Agent, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.lock = now, threading.Lock()
        self.profiles = [AuthProfile("1", "1", agent.client, {})]
        for number in range(2, MAX_PROFILES + 1):
            if profile := self.read(agent, str(number)):
                self.profiles.append(profile)
        server = agent.client.base_url
        keys = [each for each in self.profiles if each.key == each.name]
        same = [each for each in keys if each.client.base_url == server]
        for model in dict.fromkeys(os.getenv("FALLBACK_MODELS", "").replace(",", " ").split()):
            for each in same:
                name, settings = f"{each.name}/{model}", each.settings | {"model": model}
                self.profiles.append(AuthProfile(name, each.key, each.client, settings))

    def read(self, agent: Agent, name: str) -> AuthProfile | None:
        """A profile of .env, such as OPENAI_API_KEY_2. Raises ValueError when it makes no sense."""
        names = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MODEL_ID", "MODEL_OPTIONS")
        key, url, model, options = (os.getenv(f"{each}_{name}", "").strip() for each in names)
        if not (key or url or model):
            return None
        try:
            settings = {} | json.loads(options or "{}") | ({"model": model} if model else {})
            client = agent.client.with_options(base_url=url or agent.client.base_url)
            is_other = client.base_url != agent.client.base_url
            if key or is_other:  # no server gets another's key, nor the account it belongs to
                client = client.with_options(api_key=key or "none")
            if is_other:
                client.organization = client.project = None
            if not re.fullmatch(r"[!-~]* https?://[^ /]\S*", f"{key} {client.base_url}"):  # both
                raise ValueError("a key has no blanks, a URL begins with http:// and names a host")
        except Exception as error:  # the SDK does not document what it may raise
            raise ValueError(f"the settings of profile {name} (..._{name}): {error}") from None
        return AuthProfile(name, name if key or is_other else "1", client, settings)

    def order(self) -> list[AuthProfile]:
        """Those that need not rest, then those that no server told to, the first to end first."""
        now = self.now()
        rested = [each for each in self.profiles if each.until <= now]
        resting = sorted((p for p in self.profiles if p.until > now), key=lambda each: each.until)
        return rested + [each for each in resting if not each.is_told]

    def wait(self, profile: AuthProfile) -> float:
        """The seconds for which a server still wants a profile to rest."""
        return max(profile.until - self.now(), 0) if profile.is_told else 0

    def succeed(self, profile: AuthProfile) -> None:
        """Note that a profile has answered: it need not rest any more."""
        with self.lock:
            profile.calls["answered"] += 1
            profile.reason, profile.error, profile.errors, profile.until = None, "", 0, 0

    def fail(self, profile: AuthProfile, reason: FailoverReason, error: BaseException) -> None:
        """Note a failure: the profile has to rest, and with it all that share a bad key."""
        with self.lock:
            profile.calls[str(reason)] += 1
            profile.reason, profile.error = reason, explain(error)
            if reason in OF_THE_REQUEST:
                return
            lasts = reason in OF_THE_KEY or reason == FailoverReason.MODEL_NOT_FOUND
            table = LONG_COOLDOWNS if lasts else COOLDOWNS
            if profile.until <= self.now() or not profile.errors:  # else the same outage
                profile.errors += 1
            told, rest = retry_after(error), table[min(profile.errors, len(table)) - 1]
            profile.until, profile.is_told = self.now() + (told or rest), bool(told)
            for each in self.profiles if reason in OF_THE_KEY else ():
                if each.key == profile.key:
                    each.reason, each.error = reason, profile.error
                    each.until, each.is_told = profile.until, profile.is_told

    def describe(self, profiles: list[AuthProfile]) -> str:
        """What is wrong with some profiles, and for how long, in a line."""
        rests = ((each, each.until - self.now()) for each in profiles)
        about = (
            f"{each.name} {each.reason}" + (f", again in {rest:.0f} s" if rest > 0 else "")
            for each, rest in rests
            if each.reason
        )
        return "; ".join(about)

    def stats(self) -> str:
        """How many calls were answered, and how many failed for which reason."""
        calls = sum((each.calls for each in self.profiles), Counter())
        return ", ".join(f"{number} {name}" for name, number in calls.items()) or "not called yet"


class ResilienceRunner:
    """Makes a model call where it can be answered. An onion: around the call of s01 stands the
    guard of s03, which makes room, around that the profiles, around all the turn with its tools.
    """

    def __init__(
        self, profiles: ProfileManager, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.profiles, self.sleep = profiles, sleep
        self.simulated: FailoverReason | None = None

    def call(self, agent: Agent) -> tuple[dict, str]:
        """The guard's call, by the first profile that gives an answer. Raises NoProfileLeft.

        What a turn has done so far stands in the history, so that no tool runs twice.
        """
        failure, last, refused, bad_keys = None, None, False, set()
        plan = ((each, pause) for each, pause in self.plan() if each.key not in bad_keys)
        for profile, pause in islice(plan, MAX_ATTEMPTS):
            if last or pause:
                told = f"profile {last.name}: {last.reason}" if last else "a server wants a pause"
                then = "again" if profile is last else f"profile {profile.name}"
                later = f" in {pause:.0f} s" if pause >= 1 else ""
                agent.show(f"\n[{told}; trying {then}{later}]\n")
            self.sleep(pause)
            last = profile
            try:
                reply = self.attempt(agent, profile)
            except Exception as error:
                failure, reason = error, classify_failure(error)
                if reason is None:
                    raise
                self.profiles.fail(profile, reason, error)
                refused |= reason in OF_THE_REQUEST
                bad_keys |= {profile.key} if reason in OF_THE_KEY else set()
            else:
                self.profiles.succeed(profile)
                return reply
        if len(self.profiles.profiles) == 1 and failure:
            raise failure
        told = self.profiles.describe(self.profiles.profiles)
        kind = openai.OpenAIError if refused else NoProfileLeft  # it would be refused again
        raise kind(f"no profile could answer: {told}") from failure

    def plan(self) -> Iterator[tuple[AuthProfile, float]]:
        """The profiles to try, each after a pause in seconds: first those that are ready, then
        twice what may pass in the meantime."""
        began, patience = self.profiles.now(), PATIENCE
        yield from ((each, 0) for each in self.profiles.order())
        for least in RETRIES:
            passing = [p for p in self.profiles.profiles if p.reason in PASSING]
            waits = [(self.profiles.wait(each), each) for each in passing]
            soon = min((wait for wait, _ in waits), default=PATIENCE + 1)
            if soon > patience or self.profiles.now() - began > MAX_TRYING:
                return
            patience -= soon
            pause = max(least * random.uniform(1, 1 + JITTER), soon)
            for each in [each for wait, each in waits if wait <= pause]:
                yield each, pause
                pause = 0

    def attempt(self, agent: Agent, profile: AuthProfile) -> tuple[dict, str]:
        """One call, with the overflow recovery of the guard, by one profile."""
        trial, first = copy(agent), self.profiles.profiles[0]
        if profile.client.base_url != first.client.base_url:  # MODEL_OPTIONS are for the first one
            trial.settings = {"model": agent.settings["model"], "stream": True}
        trial.client, trial.settings = profile.client, trial.settings | profile.settings
        reason, self.simulated = self.simulated, None
        if not reason:
            return agent.guard.call(trial)
        trial.client = FailingOnce(profile.client, simulated_error(reason, profile.client))
        window = trial.guard.limit(trial)
        try:
            return agent.guard.call(trial)
        finally:
            if trial.guard.limit(trial) < window:  # what a simulation has taught is not true
                key = trial.guard.key(trial)
                agent.messages.change({"type": "overflow", "window": key, "tokens": window})


class FailingOnce:
    """A client whose next call raises an error; all else of it is as ever."""

    def __init__(self, client: openai.OpenAI, error: Exception) -> None:
        self.client, self.error = client, error
        self.chat = self.completions = self  # so that `create` below is found

    def __getattr__(self, name: str) -> object:
        return getattr(self.client, name)

    def create(self, **request: object) -> object:
        error, self.error = self.error, None
        if error:
            raise error
        return self.client.chat.completions.create(**request)


def simulated_error(reason: FailoverReason, client: openai.OpenAI) -> Exception:
    """What the SDK raises for a reason."""
    import httpx  # the SDK takes its responses, too

    request = httpx.Request("POST", f"{client.base_url}chat/completions")
    if reason == FailoverReason.TIMEOUT:
        return openai.APITimeoutError(request)
    if reason == FailoverReason.UNKNOWN:
        return openai.APIError("a simulated failure", request, body=None)
    kind, status, code = SIMULATED[reason]
    body = {"message": f"a simulated {reason}", "type": code, "code": code}
    return kind(body["message"], response=httpx.Response(status, request=request), body=body)


@command("/profiles", "the profiles that answer, in the order in which they are tried")
def show_profiles(agent: Agent, rest: str) -> str:
    lines = []
    for profile in agent.app.profiles.profiles:
        calls = ", ".join(f"{number} {name}" for name, number in profile.calls.items())
        lines.append(f"{profile} - {calls or 'not called yet'}")
        lines += [f"   its last error: {profile.error}"] if profile.error else []
    return "\n".join(lines)


@command("/cooldowns", "which profiles have to rest, why, and for how long")
def show_cooldowns(agent: Agent, rest: str) -> str:
    profiles = agent.app.profiles
    resting = [each for each in profiles.profiles if each.until > profiles.now()]
    lines = [f"{profiles.describe([each])} - {each.error}" for each in resting]
    return "\n".join(lines) or "none has to rest"


@command("/fallback", "what the next call tries, in this order")
def show_fallback(agent: Agent, rest: str) -> str:
    return "\n".join(map(str, agent.app.profiles.order())) or "nothing: see /cooldowns"


# --- main ---


def main() -> int:
    """Read a line, answer it, and round again. Ends the process with the exit status."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a strange letter must not end the program
    with suppress(ImportError):  # Windows has no readline
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one message
    agent = load_agent()
    open_sessions(agent)
    app = App(agent)
    print(f"{__doc__.splitlines()[0]}\n{agent.settings['model']} answers; quit leaves.")
    print(f"{agent.messages}; /help lists the commands.")
    app.start()
    failed = False
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            print()
            text = app.cli.read()
            if not sys.stdin.isatty():
                print(text)  # a pipe does not echo
            if text.strip() in ("quit", "exit", "/quit"):
                break
            if app.command(text):
                continue
            if text.startswith("/") and not app.skills.find(text):
                print(f"{text.split()[0]} is no command; start with a space to say it anyway")
            elif text.strip():
                print("agent> ", end="", flush=True)
                failed |= not app.ask(text)
                print()
    print()
    app.stop(int(failed and not sys.stdin.isatty()))  # for a script; a person has seen it


if __name__ == "__main__":
    sys.exit(main())
