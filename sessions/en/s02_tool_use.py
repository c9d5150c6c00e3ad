# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s02: Tool use - tools are data (a schema) plus a handler map.

    call_model --> message.tool_calls? -- none --> agent>
        ^                 | run_tool: TOOL_HANDLERS[name](agent, **arguments)
        +-- one result per call, in call order

Run it with no key: python sessions/offline_model.py s02
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
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
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
    # extra_body is sent as it is; what stands in messages= would be walked and copied first.
    reply = agent.client.chat.completions.create(
        model="", messages=[], stream=stream, extra_body=request
    )
    if stream and "json" in reply.response.headers.get("content-type", ""):
        raise openai.OpenAIError(f"HTTP 200, but no stream: {reply.response.read().decode()}")
    text, finish_reason, visible = "", None, ThoughtFilter()
    calls, thoughts = [], ""
    for chunk in read_chunks(reply) if stream else [reply]:  # the SDK checks no field of it
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
        message, finish_reason = call_model(agent)
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


# --- main ---


def main() -> int:
    """Read a line, answer it, and round again. Returns the exit status."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # a strange letter must not end the program
    with suppress(ImportError):  # Windows has no readline
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one message
    agent = load_agent()
    print(f"{__doc__.splitlines()[0]}\n{agent.settings['model']} answers; quit leaves.")
    failed = False
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            print()
            text = input("you> ")
            if not sys.stdin.isatty():
                print(text)  # a pipe does not echo
            if text.strip() in ("quit", "exit", "/quit"):
                break
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
