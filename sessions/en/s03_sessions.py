# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s03: Sessions and context - append on write, replay on read, summarize when too big.

    messages.append --> Session --> Journal: one line, synced    <id>.jsonl
    call_model <------- ContextGuard: shorten, summarize, or say that it is too long

Run it with no key: python sessions/offline_model.py s03
"""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

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
    return " - ".join(" ".join(str(part).split())[:300] for part in parts if str(part or ""))


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


def answer(agent: Agent, text: str) -> str:
    """Run one turn. One that fails shows why in a line, takes the text back, and returns ""."""
    question = {"role": "user", "content": text}
    try:
        close_turn(agent.messages)
        agent.messages.append(question)
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
    try:
        output = bytearray()
        reader = threading.Thread(target=read_ends, args=(process, output), daemon=True)
        reader.start()
        process.wait(seconds)
        end = f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        end = f"killed after {seconds} seconds"
    finally:
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
                self.estimated += estimate(message)
            case {"type": "retraction", "to": int(length)}:
                self.estimated -= sum(map(estimate, self[length:]))
                del self[length:]
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

    def append(self, message: dict) -> None:
        """Add a message, with `used`: the tokens before it as the server counted, if it did."""
        about = {"used": self.used, "fixed": self.fixed}
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


# --- main ---


def main() -> int:
    """Read a line, answer it, and round again. Returns the exit status."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a strange letter must not end the program
    with suppress(ImportError):  # Windows has no readline
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one message
    agent = load_agent()
    open_sessions(agent)
    print(f"{__doc__.splitlines()[0]}\n{agent.settings['model']} answers; quit leaves.")
    print(f"{agent.messages}; /help lists the commands.")
    failed = False
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            print()
            text = input("you> ")
            if not sys.stdin.isatty():
                print(text)  # a pipe does not echo
            if text.strip() in ("quit", "exit", "/quit"):
                break
            if run_command(agent, text):
                continue
            if text.startswith("/"):  # a mistyped command is no question
                print(f"{text.split()[0]} is no command; start with a space to say it anyway")
            elif text.strip():
                print("agent> ", end="", flush=True)
                failed |= not answer(agent, text)
                print()
    print()
    return int(failed and not sys.stdin.isatty())  # for a script; a person has seen it


if __name__ == "__main__":
    sys.exit(main())
