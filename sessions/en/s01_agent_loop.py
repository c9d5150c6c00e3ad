# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""s01: The agent loop - an agent is `while True` plus `finish_reason`.

    you> --> messages[] --> call_model --> finish_reason --> agent>
     ^                                                         |
     +---------------------------------------------------------+

Run it with no key: python sessions/offline_model.py s01
"""

import json
import os
import re
import sys
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

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
        return Agent(client, settings, [], show)
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
    stream = bool(request["stream"])
    # extra_body is sent as it is; what stands in messages= would be walked and copied first.
    reply = agent.client.chat.completions.create(
        model="", messages=[], stream=stream, extra_body=request
    )
    if stream and "json" in reply.response.headers.get("content-type", ""):
        raise openai.OpenAIError(f"HTTP 200, but no stream: {reply.response.read().decode()}")
    text, finish_reason, visible = "", None, ThoughtFilter()
    for chunk in read_chunks(reply) if stream else [reply]:  # the SDK checks no field of it
        for choice in getattr(chunk, "choices", None) or []:
            finish_reason = getattr(choice, "finish_reason", None) or finish_reason
            delta = getattr(choice, "delta" if stream else "message", None)
            piece = getattr(delta, "content", None) or getattr(delta, "refusal", None)
            if isinstance(piece, str) and (piece := visible.feed(piece)):
                agent.show(piece)
                text += piece
    if rest := visible.feed("", last=True):
        agent.show(rest)
        text += rest
    message = {"role": "assistant", "content": plain(text)}
    if finish_reason and text.strip():
        return message, finish_reason
    if visible.found and again and finish_reason and finish_reason not in NOTES:
        return call_model(agent, again=False)  # nothing but thoughts
    empty = "the answer was empty" if finish_reason else "the answer broke off"
    told = getattr(reply, "error", None) or NOTES.get(finish_reason, empty)
    raise openai.OpenAIError(f"{told} - {agent.client.base_url}")


def agent_turn(agent: Agent) -> str:
    """Answer the last message of the history. Returns the answer, or raises OpenAIError."""
    message, finish_reason = call_model(agent)
    agent.messages.append(message)
    note = f"\n[{NOTES[finish_reason]}]" if finish_reason in NOTES else ""
    agent.show(note)
    return message["content"] + note


def answer(agent: Agent, text: str) -> str:
    """Run one turn. One that fails shows why in a line, takes the text back, and returns ""."""
    question = {"role": "user", "content": text}
    try:
        agent.messages.append(question)
        return agent_turn(agent)
    except (Exception, KeyboardInterrupt) as error:  # a turn may fail, the loop goes on
        if agent.messages[-1:] == [question]:
            agent.messages.pop()
        agent.show(f"\n[{explain(error)}]")
        return ""


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
