# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "pydantic>=2.12",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s02: Tool use - tools are data (a schema) plus a handler map.

    messages --> call_model --> does it ask for tools? -- no --> agent>
       ^                                | yes
       |                                v
       +---- one result per call --- run_tool --> TOOL_HANDLERS[name]

Run it with no key: python sessions/offline_model.py s02
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
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
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
    messages: list[dict]
    show: Callable  # show(text, kind) prints a text; kind is "answer", "note", ...
    tools: list[dict]  # what the model may ask for
    workspace: Path  # the folder that tools work in
    approval: "Approval"  # whether commands run
    check_path: Callable  # check_path(agent, file, is_write) raises if it is off limits
    system: str = ""  # instructions that stand before the conversation
    check_cancelled: Callable = do_nothing  # from s10 on: raises after /stop
    note_waiting: Callable = do_nothing  # told what the turn waits for, for /stop


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
        reply = call_model(agent)
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
    """Answer a line that the person has typed."""
    print("agent> ", end="", flush=True)
    handle_message(agent, line)
    print()


def main() -> None:
    """Build the agent, and let it talk with the person at the terminal."""
    prepare_terminal()
    agent = load_agent()
    title = __doc__.splitlines()[0]
    print(f"{title}\n{agent.options['model']} answers; quit leaves.")
    with suppress(EOFError, KeyboardInterrupt):  # Ctrl-D and Ctrl-C at the prompt
        talk(partial(handle_line, agent))


if __name__ == "__main__":
    main()
