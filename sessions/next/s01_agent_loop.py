# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s01: The agent loop - an agent is `while True` plus `finish_reason`.

    you> --> messages --> call_model --> finish_reason --> agent>
     ^                                                       |
     +-------------------------------------------------------+

Run it with no key: python sessions/offline_model.py s01
"""

import codecs
import json
import os
import re
import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import openai
from dotenv import load_dotenv

# --- s01: the agent loop ---

NOTES = {
    "length": "the answer was cut at the length limit",
    "content_filter": "the provider's content filter stopped the answer",
    "tool_calls": "the model asked for a tool, and there is none to run",
}


@dataclass
class Agent:
    """What one turn of the conversation works with."""

    client: openai.OpenAI
    options: dict  # what every request contains besides the messages
    messages: list[dict]
    show: Callable  # show(text, kind) prints a text; kind is "answer", "note", ...


@dataclass
class Reply:
    """What the model has answered."""

    message: dict
    finish_reason: str = ""  # empty until the server says why the answer ended
    usage: dict | None = None  # how many tokens the call took, if the server tells


def call_model(agent: Agent) -> Reply:
    """Send the conversation to the model, and show its answer as it arrives.

    Returns the whole reply. Raises OpenAIError if the answer breaks off.
    """
    reply = Reply({"role": "assistant"})
    cleaner = AnswerCleaner()
    pieces = []
    request = {**agent.options, "messages": list(agent.messages)}
    create = agent.client.chat.completions.with_streaming_response.create
    # `extra_body` replaces the two empty arguments and is sent unchecked: to check
    # 2,000 messages would take the openai package half a second.
    with create(model="", messages=[], extra_body=request) as response:
        for event in read_events(response):
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
    return reply


def agent_turn(agent: Agent) -> str:
    """Have the model answer the last message. An empty answer is asked for again."""
    for _ in range(2):
        reply = call_model(agent)
        answer = reply.message["content"]
        if answer:
            agent.messages.append(reply.message)
            return answer + show_finish_note(agent, reply.finish_reason)
    raise openai.OpenAIError(NOTES.get(reply.finish_reason, "the answer was empty"))


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
        return Agent(client, options, [], show)
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


# --- main ---


def prepare_terminal() -> None:
    """Let arrow keys edit a line and recall older ones; survive bytes of no UTF-8."""
    with suppress(ImportError):  # Windows has no readline
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste is one line
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")


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
