# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "cryptography>=50",
#   "httpx>=0.28",
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
#   "python-telegram-bot>=22.8",
# ]
# ///
"""s04: Channels - same brain, many mouths.

    Telegram --> inbox (journal) --> App.handle --> App.reply --> outbox of the channel --> Telegram
    Feishu ----> inbox (journal) --> App.handle --> ...
    the line you type -------------> App.handle, printed as it streams

Run it with no key: python sessions/offline_model.py s04
"""

import asyncio
import base64
import hashlib
import hmac
import inspect
import json
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import weakref
from collections import deque
from collections.abc import Callable
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
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from importlib import import_module
from itertools import accumulate
from itertools import count
from pathlib import Path
from typing import NoReturn

import openai
from dotenv import load_dotenv
from openai.types.chat import ChatCompletionChunk

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
        raise openai.OpenAIError(f"HTTP 200, but no stream: {reply.response.read().decode()}")
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
    raise openai.OpenAIError(f"{told} - {agent.client.base_url}")


def agent_turn(agent: Agent) -> str:
    """Answer the last message of the history. Returns the answer, or raises OpenAIError."""
    texts = []
    for rounds in range(1, MAX_ROUNDS + 1):
        message, finish_reason = agent.guard.call(agent)
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
        if agent.messages[-1:] == [question]:
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
        load_text(workspace_path(agent, path))
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

    def append(self, record: dict) -> None:
        """Write a record, and return when it is on disk. Raises OSError when it may not be."""
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
            if self.synced < mine:  # else a sync that began later has taken it along
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

    def __post_init__(self) -> None:
        """Raise TypeError unless all of it is text: it may come from a file."""
        texts = [*self.ids, *(value for name, value in vars(self).items() if name != "ids")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError

    @property
    def said(self) -> str:
        """The text as the model gets it: in a group, with the name of who speaks."""
        return f"[{self.sender}] {self.text}" if self.kind == "group" else self.text


def build_session_key(message: InboundMessage) -> str:
    """The key of the session a message belongs to: one for each channel, account and peer."""
    if message.channel == "cli":
        return SESSION_KEY
    return f"agent:main:{message.channel}:{message.account}:{message.kind}:{message.peer}".lower()


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

    def __init__(self, app: "App", account: ChannelAccount) -> None:
        self.app, self.account = app, account
        self.status = "starting"
        self.outbox: queue.Queue[tuple[InboundMessage, str]] = queue.Queue()
        self.told: set[str] = set()
        self.sending = threading.Lock()

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
        while True:
            message, text = self.outbox.get()
            try:
                with self.sending:
                    self.deliver(message, text)
                    self.app.inbox.note(message, type="done")
            except Exception as error:  # the outermost loop; the message stays in the inbox
                self.tell(f"not sent to {message.peer}: {error}")

    def deliver(self, message: InboundMessage, text: str) -> None:
        """Send an answer in pieces; one that nobody can ever get is told of and given up."""
        try:
            for number, piece in enumerate(chunk_message(text, self.limit)):
                self.insist(self.send, message.peer, piece, f"{message.ids[0]}/{number}")
        except ChannelError as error:
            if not error.permanent:
                raise
            self.tell(f"not sent to {message.peer}: {error}")

    def insist(self, step: Callable, *args: str) -> None:
        """Take a step, again and again while it fails for a time. Raises ChannelError after all."""
        for attempt in count():
            try:
                step(*args)
                break
            except ChannelError as error:
                if error.permanent or (args and attempt == 9):  # a start is tried for ever
                    raise
                if attempt == 0:
                    self.tell(f"{error}; trying again")
                time.sleep(error.retry_after or min(2**attempt, 60))


def chunk_message(text: str, limit: int) -> list[str]:
    """A text in pieces of at most `limit` UTF-16 units, cut between paragraphs, lines or words."""
    pieces = []
    while text:
        head = text[:limit].encode("utf-16-le")[: 2 * limit].decode("utf-16-le", "ignore")
        if len(head) < len(text):
            ends = (head.rfind(mark) + len(mark) for mark in ("\n\n", "\n", " "))
            head = head[: next((end for end in ends if end > len(head) // 2), len(head))]
        pieces.append(head)
        text = text[len(head) :]
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
        return InboundMessage(self.name, self.account.id, peer, text, ids, kind, person)

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
        try:
            self.inbox = Inbox(agent.workspace / ".inbox.jsonl")
        except OSError as error:
            sys.exit(f"the workspace cannot be used: {error}")

    def start(self) -> None:
        """Start the channels, and work on what they bring."""
        self.loop = LoopThread()
        self.channels.start()
        threading.Thread(target=self.work, daemon=True).start()

    def stop(self, status: int) -> NoReturn:
        """End the process, whatever its threads do: what is not done is in the inbox."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not disturb this
        for process in list(RUNNING):
            kill(process)
        latest = time.monotonic() + 0.8
        for channel in self.channels.channels.values():  # a text that is on its way may arrive
            channel.sending.acquire(timeout=max(latest - time.monotonic(), 0))
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
            if text is not None:  # it was not sent for sure when the last run ended
                self.reply(message, text)
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

        text, command = "", message.text.split()[0]
        with self.lane, channel.typing(message.peer):
            agent = self.agent_for(message)
            agent.show = show_piece
            if command not in FROM_AFAR or not run_command(agent, message.text):
                text = answer(agent, message.said, message.ids[0])
            self.sessions[agent.key] = agent.messages
            told = text or re.sub(r"https?://\S+", "its server", shown[-1].strip())  # or why not
            if channel is not self.cli:
                self.reply(message, told)
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
        key = build_session_key(message)
        agent.messages, agent.key = self.session(key), key
        return agent

    def session(self, key: str) -> Session:
        """The session of a key: one object, as long as anybody uses it."""
        session = self.sessions.get(key)
        if session is None:
            session = self.sessions[key] = self.agent.store.resume(key)
        self.recent.append(session)
        return session

    def reply(self, message: InboundMessage, text: str) -> None:
        """Write an answer down, and let its channel send it."""
        channel = self.channels.find(message)
        channel.tell(f"to {message.sender or message.peer}: {text}")
        self.inbox.note(message, type="answer", text=text)
        channel.outbox.put((message, text))


@command("/channels", "the channels, and how they are")
def show_channels(agent: Agent, rest: str) -> str:
    channels = agent.app.channels.channels.values()
    return "\n".join(f"{channel.account}: {channel.status}" for channel in channels)


@command("/accounts", "the accounts at the platforms, and whom they listen to")
def show_accounts(agent: Agent, rest: str) -> str:
    accounts = [each.account for each in agent.app.channels.channels.values() if each.setting]
    return "\n".join(f"{each}: {each.get('ALLOWED_CHATS') or 'nobody'}" for each in accounts)


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
            if text.startswith("/"):  # a mistyped command is no question
                print(f"{text.split()[0]} is no command; start with a space to say it anyway")
            elif text.strip():
                print("agent> ", end="", flush=True)
                failed |= not app.ask(text)
                print()
    print()
    app.stop(int(failed and not sys.stdin.isatty()))  # for a script; a person has seen it


if __name__ == "__main__":
    sys.exit(main())
