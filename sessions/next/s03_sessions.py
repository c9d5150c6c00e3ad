# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "pydantic>=2.12",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s03: Sessions and context - append on write, replay on read, summarize when too big.

    messages --append--> <id>.jsonl --replay--> messages, after a restart

    ContextGuard: does the request fit the window? -- yes --> call_model
       ^               | no
       +---- shorten results, then summarize

Run it with no key: python sessions/offline_model.py s03
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


def handle_message(agent: Agent, text: str) -> str | None:
    """Answer a message. If that fails, take the message back, say why, return None."""
    question = {"role": "user", "content": text}
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


def handle_line(agent: Agent, line: str) -> None:
    """Answer a line that the person has typed, or run the command in it."""
    if line.startswith("/"):
        run_slash_command(agent, line)
        return
    print("agent> ", end="", flush=True)
    handle_message(agent, line)
    print()


def main() -> None:
    """Build the agent, and let it talk with the person at the terminal."""
    prepare_terminal()
    agent = load_agent()
    title = __doc__.splitlines()[0]
    print(f"{title}\n{agent.options['model']} answers; quit leaves.")
    open_session(agent)
    print(f"{agent.messages}\n/help lists the commands.")
    with suppress(EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C at the prompt
        talk(partial(handle_line, agent))


if __name__ == "__main__":
    main()
