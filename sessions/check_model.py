# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "pydantic>=2.12",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""Will my model work? Small checks of the server in .env, and a verdict per section.

    .env --> checks: requests as the sections send them, answers as they read them
                |--> s01 yes, s02 no: ..., s03 ...
                +--> lines for .env that would help

    python sessions/check_model.py                  check the configured server
    python sessions/check_model.py --context        and whether CONTEXT_TOKENS is true
    python sessions/offline_model.py check_model    check the offline model

Each check gets a mark. The marks other than ok are explained below the table. If .env
names several servers (section 9), the first one is checked.

It costs about 14 requests, some 5,000 tokens in all, and at most eight requests more if
the server fails. --context adds one request of about nine tenths of CONTEXT_TOKENS:
with 128000 some 115,000 tokens, which cost money or, on a machine of your own, minutes.
A server that falls silent costs MODEL_TIMEOUT seconds at a time, but no more than 60 if
its first answer came within 2.

The exit status is 0 if every section can be run, else 1; 2 for a wrong option.
"""

import signal
import sys

if __name__ == "__main__":  # before what takes long to load
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import argparse
import difflib
import importlib.util
import json
import os
import re
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import openai

# --- the sections ---

SESSIONS = Path(__file__).resolve().parent
TITLES = SESSIONS / "en"  # a verdict for each section in this folder
CODE = SESSIONS / "next" / "s03_sessions.py"  # it contains s01 and s02


def load_section(path: Path) -> ModuleType:
    """A section as a module, so that the checks send and read exactly what it does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


SECTION = load_section(CODE)
NOTES = SECTION.NOTES
TOOLS = SECTION.TOOLS
ask_model = SECTION.ask_model
agent_turn = SECTION.agent_turn
call_model = SECTION.call_model
read_events = SECTION.read_events
read_lines = SECTION.read_lines
merge_tool_call_delta = SECTION.merge_tool_call_delta
estimate_tokens = SECTION.estimate_tokens
explain = SECTION.explain
show = SECTION.show
ContextGuard = SECTION.ContextGuard
ContextOverflow = SECTION.ContextOverflow

# --- asking ---

PAUSE = 1  # seconds before a request is made again
RETRIES = 8  # in all
QUICK = 2  # seconds; a slower server keeps MODEL_TIMEOUT
SILENCE = 60  # seconds that a quick server may say nothing
ROUNDS = 4  # model calls in one turn
LIMIT = 2048  # tokens of an answer, if the server has to be told
PERMANENT = (ContextOverflow, ValueError, LookupError, TypeError, AttributeError)


class Recorder:
    """Takes the place of functions of the section, and notes what passes through."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # how long an answer may take
        self.requests = 0
        self.tokens_sent = 0
        self.events: list[dict] = []  # of the last reply
        self.is_stream = False  # whether these came as a stream
        self.pieces: list[dict] = []  # of tool calls, in the last reply
        self.replies: list[tuple] = []  # each with the pieces of its tool calls
        self.keep_alives = 0
        SECTION.call_model = self.call_model
        SECTION.read_events = self.read_events
        SECTION.read_lines = self.read_lines
        SECTION.merge_tool_call_delta = self.merge_tool_call_delta

    def call_model(self, agent: object) -> object:
        messages = SECTION.request_messages(agent)
        self.requests += 1
        self.tokens_sent += estimate_tokens([agent.tools, messages])
        self.events = []
        self.is_stream = False
        self.pieces = []
        reply = call_model(agent)
        self.replies.append((reply, self.pieces))
        return reply

    def read_events(self, response: openai.APIResponse) -> Iterator[dict]:
        deadline = time.monotonic() + self.seconds
        for event in read_events(response):
            self.events.append(event)
            yield event
            if time.monotonic() > deadline:
                late = TimeoutError(f"the answer still came after {self.seconds:g} s")
                raise openai.APITimeoutError(response.http_request) from late

    def read_lines(self, response: openai.APIResponse) -> Iterator[bytes]:
        self.is_stream = True
        for line in read_lines(response):
            if line.startswith((b":", b"id:", b"event:", b"retry:")):
                self.keep_alives += 1
            yield line

    def merge_tool_call_delta(self, reply: object, piece: dict, position: int) -> None:
        if not self.is_stream:
            piece = {"index": position} | piece  # only a stream needs it
        self.pieces.append(piece)
        merge_tool_call_delta(reply, piece, position)


class Probe(Recorder):
    """The configured server, and what came of asking it so far."""

    def __init__(self, agent: object, window: int, with_context: bool) -> None:
        super().__init__(agent.client.timeout)
        self.agent = agent
        self.window = window  # in tokens, as CONTEXT_TOKENS says
        self.real_window = window  # or less, if anything so far speaks for it
        self.stated_window = 0  # in the server's list of models
        self.with_context = with_context
        self.similar_model = ""  # if MODEL_ID is not listed
        self.session = None  # of the last turn
        self.failures: list[str] = []  # of requests that were made again
        self.refusal = ""  # why this check had to change the options
        self.env_lines: dict[str, str] = {}
        self.options_help = False  # whether the changed options belong into .env

    def conversation(
        self, messages: list[dict], tools: list[dict] = (), system: str = ""
    ) -> object:
        """An agent in a new session that holds some messages."""
        session = self.agent.store.create("check")
        session.replace_all(messages, "check")
        return replace(self.agent, messages=session, tools=tools, system=system)

    def ask(self, question: str, tools: list[dict] = (), system: str = "") -> object:
        """The reply to a question."""

        def call() -> object:
            agent = self.conversation([user(question)], tools, system)
            reply = ask_model(agent, [])
            if reply.tool_calls and not tools and not reply.message["content"]:
                raise openai.OpenAIError(NOTES["tool_calls"])
            return reply

        return self.with_retries(call)

    def turn(self, question: str) -> str:
        """The answer to a question, with the section's tools. Keeps the session."""

        def call() -> str:
            agent = self.conversation([user(question)], TOOLS)
            self.session = agent.messages
            return agent_turn(agent)

        return self.with_retries(call)

    def run_tool(self, call: dict) -> str:
        """The result of a tool call."""
        return SECTION.run_tool(self.conversation([]), call)

    def with_retries(self, call: Callable) -> object:
        """The outcome of a call, made again with other options or after bad luck."""
        while True:
            try:
                return call()
            except Exception as error:  # a turn may fail in any way
                if not self.change_options(error) and not self.may_retry(error):
                    raise

    def change_options(self, error: Exception) -> bool:
        """Change the options as an error asks for. Once in a check."""
        options = better_options(self, error)
        if self.refusal or options == self.agent.options:
            return False
        self.refusal = explain(error)
        self.agent.options = options
        return True

    def may_retry(self, error: Exception) -> bool:
        """Whether the same request may succeed now. Waits a little before."""
        used_up = len(self.failures) >= RETRIES
        if used_up or not is_temporary(error) or self.is_lasting(error):
            return False
        self.failures.append(short_reason(error))
        time.sleep(PAUSE)
        return True

    def is_lasting(self, error: Exception) -> bool:
        """Whether the last requests, too, have failed in the same way."""
        reason = short_reason(error)
        times = 1 if "time" in reason.lower() else 2  # silence is slow to find out
        return self.failures[-times:] == [reason] * times

    def allow_silence(self, seconds: float) -> None:
        self.agent.client = self.agent.client.with_options(timeout=seconds)

    def lower_window(self, tokens: int) -> None:
        """Believe in a window of so many tokens, if that is less than so far."""
        self.real_window = min(self.real_window, tokens)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def quote(text: str, size: int = 60) -> str:
    if len(text) > size:
        text = f"{text[:size]}..."
    return repr(text)


def short_reason(error: Exception) -> str:
    """A failure in a word or two."""
    status = getattr(error, "status_code", None)
    if status:
        return f"HTTP {status}"
    if isinstance(error, openai.OpenAIError):
        return re.split("[.:{]", str(error))[0].strip()
    return type(error).__name__


def is_temporary(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    kind = f"{getattr(error, 'code', '')} {getattr(error, 'type', '')}"
    if "quota" in kind or "billing" in kind:
        return False
    status = getattr(error, "status_code", None)
    if status:
        return status in (408, 409, 425, 429) or status >= 500
    return not isinstance(error, PERMANENT)


def better_options(probe: Probe, error: Exception) -> dict:
    """The options that an error asks for: the present ones if it asks for none."""
    options = dict(probe.agent.options)
    text = f"{error} {getattr(error, 'body', '')}"
    if NOTES["length"] in text:  # before the answer had begun
        return with_limit(probe)
    if getattr(error, "status_code", None) not in (400, 422):
        return options
    if options["stream"] and re.search(r"\bstream(ing|_options)?\b", text):
        return without_stream(options)
    if "reasoning_effort" in text and options.get("reasoning_effort") != "none":
        return options | {"reasoning_effort": "none"}
    if "max_completion_tokens" in text and "max_tokens" in options:
        options["max_completion_tokens"] = options.pop("max_tokens")
        return options
    for name in options.keys() - {"model", "stream"}:
        if re.search(rf"\b{re.escape(name)}\b", text):
            del options[name]
    return options


def without_stream(options: dict) -> dict:
    """The options of a request for an answer in one piece."""
    options = options | {"stream": False}
    options.pop("stream_options", None)
    return options


def with_limit(probe: Probe) -> dict:
    """The options that allow for a long answer and leave the window room for more."""
    options = probe.agent.options
    name = "max_tokens"
    if "max_completion_tokens" in options:
        name = "max_completion_tokens"
    limit = min(LIMIT, probe.real_window // 4)
    return options | {name: max(limit, options.get(name) or 0)}


# --- checks ---

WORD = "tamarind"
FILES = {
    "note.txt": f"The code word is {WORD}.",
    "one.txt": "red apple",
    "two.txt": "blue plum",
}
CALL_AS_TEXT = re.compile(
    r'<tool_call|<function|"(?:name|function|tool)"\s*:|\bread_file\s*\('
)
Result = tuple[str, str]  # ok or one of MARKS, and a text


def check_reachable(probe: Probe) -> Result:
    """Whether something that serves models is there, and takes the key."""
    client = probe.agent.client
    url = str(client.base_url)
    try:
        models = list_models(client)
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        return "no", explain(error)
    except (openai.APIStatusError, ValueError):
        better = url.rstrip("/") + "/v1"
        with suppress(openai.OpenAIError, ValueError):
            list_models(client.with_options(base_url=better))
            probe.env_lines["OPENAI_BASE_URL"] = better
            return "no", f"no models at {url}, but at {better}"
        return "ok", f"{url} answers; it lists no models"
    return "ok", url + look_for_model(probe, models)


def list_models(client: openai.OpenAI) -> list[dict]:
    """The models of a server. Raises APIError, or ValueError for what is no list."""
    request = client.with_options(timeout=15).models.with_raw_response
    match json.loads(request.list().text):
        case {"data": list(models)}:
            return models
    raise ValueError("no list of models")


WINDOW_FIELDS = (
    "loaded_context_length",  # LM Studio
    "max_model_len",  # vLLM
    "context_length",  # OpenRouter
    "context_window",
    "n_ctx",  # llama.cpp, below `meta`
)


def window_in(model: dict) -> int:
    """The window that an entry in a list of models states; 0 if it does not."""
    meta = model.get("meta")
    if isinstance(meta, dict):
        model = meta | model
    for name in WINDOW_FIELDS:
        value = model.get(name)
        if isinstance(value, int):
            return value
    return 0


def look_for_model(probe: Probe, models: list[dict]) -> str:
    """Note the stated window of the model. What to say if the model is not listed."""
    wanted = probe.agent.options["model"]
    names = []
    for model in models:
        names.append(str(model.get("id")))
        if wanted == names[-1] or len(models) == 1:  # llama.cpp takes any name
            probe.stated_window = window_in(model)
            probe.lower_window(probe.stated_window or probe.window)
    if not names or wanted in names:
        return ""
    similar = difflib.get_close_matches(str(wanted), names, 3, 0.4)
    probe.similar_model = "".join(similar[:1])
    return f"; it does not list {wanted}, but {', '.join(similar or names[:3])}"


def check_plain(probe: Probe) -> Result:
    """Whether an answer comes. After a quick one, long silence is a fault."""
    start = time.monotonic()
    reply = probe.ask("What is 2 + 2? Answer with the number alone.")
    if time.monotonic() - start < QUICK:
        probe.allow_silence(min(SILENCE, probe.seconds))
    text = reply.message["content"]
    if "think>" in text:
        return "but", f"its thoughts (<think>) stand in its answers: {quote(text)}"
    if "think>" in json.dumps(probe.events):
        return "copes", f"its thoughts (<think>) are left out of: {quote(text)}"
    if any(reply.reasoning):
        return "ok", f"an answer came, its thoughts apart: {quote(text)}"
    return "ok", f"an answer came: {quote(text)}"


def check_long(probe: Probe) -> Result:
    """Whether an answer of some length comes whole, and as a stream."""
    question = "Count to 60, in digits, with blanks between, and nothing else."
    reply = probe.ask(question)
    text = reply.message["content"]
    if reply.finish_reason == "length":
        allow_longer_answers(probe, question)
        return "but", f"answers are cut, this one after {len(text)} characters"
    found = "it ended by itself before 60"
    if re.search(r"\b60\W*$", text):
        found = "60 numbers came whole"
    if not probe.agent.options["stream"]:
        return "ok", f"{found}, at once: streaming is off"
    if not probe.is_stream:
        probe.agent.options = without_stream(probe.agent.options)
        probe.options_help = True
        return "but", f"{found}, at once: the server does not stream"
    return "ok", f"{found}, in {len(probe.events)} chunks"


def allow_longer_answers(probe: Probe, question: str) -> None:
    """Change the limit of answers, if the same question is then answered whole."""
    before = probe.agent.options
    probe.agent.options = with_limit(probe)
    with suppress(Exception):  # the old options may still do
        probe.options_help = probe.ask(question).finish_reason != "length"
    if not probe.options_help:
        probe.agent.options = before


def check_offered_tools(probe: Probe) -> Result:
    """Whether the server takes requests that offer tools, as all do from s02 on."""
    probe.ask("What is 3 + 3? Answer with the number alone.", TOOLS)
    return "ok", "it takes requests that offer tools"


def check_tool(probe: Probe) -> Result:
    """Whether the model calls a tool, and what becomes of the result."""
    question = "Which code word does this file hold?\nread note.txt"
    answer = probe.turn(question)
    results = [each["content"] for each in probe.session if each["role"] == "tool"]
    if not results:
        return "no", describe_missing_call(answer)
    if WORD not in "".join(results):
        return "no", f"its calls did not work: {quote(results[0], 100)}"
    if NOTES["rounds"] in answer:
        return "no", f"went on calling after {ROUNDS} rounds"
    if WORD in answer.lower():
        return "ok", "called read_file, and used its result"
    if NOTES["length"] in answer:
        return "but", "its answer to a tool's result was cut"
    return "but", f"it does not use a tool's result: {quote(answer)}"


def describe_missing_call(text: str) -> str:
    """What to say of a text that came in place of a tool call."""
    if CALL_AS_TEXT.search(text):
        advice = "llama.cpp wants --jinja, vLLM --tool-call-parser"
        return f"wrote its call as text, not as a call ({advice})"
    return f"answered with text in place of a call: {quote(text)}"


def check_parallel(probe: Probe) -> Result:
    """Two calls at once. One after the other does as well."""
    question = "What do these files say? Read both at once.\nread one.txt and two.txt"
    answer = probe.turn(question)
    calls = probe.session.messages[1].get("tool_calls", [])
    if not calls:
        return "but", describe_missing_call(answer)
    if "apple" not in answer.lower() or "plum" not in answer.lower():
        return "but", f"of two files it did not tell both: {quote(answer)}"
    if len(calls) > 1:
        return "ok", "two calls at once"
    return "ok", "one call at a time"


def check_number(probe: Probe) -> Result:
    """A number as an argument. Section 2 makes "5" the number 5."""
    reply = probe.ask("Read line 1 of one.txt alone.", TOOLS)
    if not reply.tool_calls:
        return "but", describe_missing_call(reply.message["content"])
    arguments = json.loads(reply.tool_calls[0]["function"]["arguments"])
    numbers = arguments.keys() & {"offset", "limit", "timeout"}
    for name in numbers:
        if type(arguments[name]) is not int:
            result = probe.run_tool(reply.tool_calls[0])
            mark = "but" if result.startswith("error") else "copes"
            return mark, f"{name}, a number, came as {quote(repr(arguments[name]))}"
    return "ok", "it came as a number" if numbers else "none came, and none has to"


def book_table(
    agent: object, guests: int, outside: bool, guest: dict, wishes: list[str]
) -> str:
    """Book a table."""
    return "booked"


def check_nested(probe: Probe) -> Result:
    """Arguments of all kinds, as a tool of your own may have them."""
    SECTION.tool(book_table)
    question = (
        "Book a table outside for 4 guests in Ada's name. Her wishes: a quiet place,"
        " a window."
    )
    reply = probe.ask(question, [TOOLS.pop()])
    if not reply.tool_calls:
        text = describe_missing_call(reply.message["content"])
        return "unclear", f"no section needs them; {text}"
    result = probe.run_tool(reply.tool_calls[0])
    if result != "booked":
        reason = textwrap.shorten(result, 150, placeholder="...")
        return "but", f"no section needs them; {reason}"
    return "ok", "a number, a truth value, an object and a list came as such"


def check_summary(probe: Probe) -> Result:
    """A summary as section 3 asks for it, and the server's count of tokens."""
    talk = (
        "user: my cat is Miso\nassistant: Noted.\n"
        "user: my dog is Rex\nassistant: Noted."
    )
    reply = probe.ask(f"{SECTION.SUMMARIZE}\n\n{talk}")
    text = reply.message["content"]
    if reply.finish_reason == "length":
        return "but", "its summary was cut"
    if "miso" not in text.lower() or "rex" not in text.lower():
        return "but", f"its summary leaves out what counts: {quote(text)}"
    counted = counted_tokens(reply)
    if not counted:
        return "ok", "names are kept; the server counts no tokens: section 3 estimates"
    return "ok", f"names are kept; the server counted {counted:,} tokens"


def counted_tokens(reply: object) -> int:
    """How many tokens the server has counted in a request; 0 if it does not tell."""
    match reply.usage:
        case {"prompt_tokens": int(counted)}:
            return counted
    return 0


def check_context(probe: Probe) -> Result:
    """What the server says about the model's window, or with --context what is true."""
    if probe.with_context:
        return try_full_window(probe)
    wanted = f"CONTEXT_TOKENS is {probe.window:,}"
    if not probe.stated_window:
        return "but", f"{wanted}, and the server does not say: --context finds out"
    mark = "but" if probe.stated_window < probe.window else "ok"
    return mark, f"{wanted}, and the server says {probe.stated_window:,}"


def try_full_window(probe: Probe) -> Result:
    """Send a conversation as long as section 3 lets it become."""
    talk = long_talk(probe.window)
    size = f"a conversation of about {estimate_tokens(talk):,} tokens"
    probe.allow_silence(probe.seconds)
    agent = probe.conversation(talk)
    agent.guard = ContextGuard(probe.window)
    try:
        reply = probe.with_retries(partial(attempt_long_talk, probe, agent))
    except ContextOverflow:
        return describe_overflow(probe, agent.messages, size)
    except openai.BadRequestError as error:
        return "no", f"{size} fails, not as an overflow: {explain(error)}"
    if not reply:
        advice = "CONTEXT_TOKENS must not be more than the server's real window"
        return "no", f"overflow is not reported: {size} gets no answer; {advice}"
    return judge_memory(probe, reply, estimate_tokens(talk), size)


def long_talk(window: int) -> list[dict]:
    """Messages that fill what section 3 fills of a window, a code word first."""
    filler = "The rain came down on the hills, and the river rose a little. "
    part = user(filler * (window // 250))
    noted = {"role": "assistant", "content": "Noted."}
    talk = [user(f"My code word is {WORD}."), noted]
    while estimate_tokens([*talk, part]) < window * 0.88:
        talk += [part, noted]
    return [*talk, user("What is my code word?")]


def attempt_long_talk(probe: Probe, agent: object) -> object | None:
    """The reply to a long conversation. None if it is empty, and no error is reported.

    That is how llama-cpp-python and LM Studio answer when the window is full.
    """
    pieces = []
    agent.show = lambda text, *_: pieces.append(text)
    try:
        reply = agent.guard.attempt(agent)
    except openai.OpenAIError as error:
        if is_unusable(probe, error) and not any(pieces):
            return None
        raise
    return reply if any(pieces) else None


def describe_overflow(probe: Probe, session: object, size: str) -> Result:
    """What to say if the server refuses a long conversation, as it should."""
    stated = session.windows.get(probe.agent.options["model"])
    if not stated:
        return "copes", f"{size} is refused: section 3 makes room"
    probe.lower_window(stated)
    window = f"a window of {stated:,} tokens"
    return "copes", f"{size} is refused, for {window}: section 3 makes room"


def judge_memory(probe: Probe, reply: object, estimate: int, size: str) -> Result:
    """Whether the model still knows the first words of a long conversation."""
    text = reply.message["content"]
    counted = counted_tokens(reply)
    if WORD in text.lower():
        return "ok", f"{size} came through whole"
    if 0 < counted <= estimate // 2:
        probe.lower_window(counted)
        dropped = f"of {size}, the server silently dropped all but {counted:,}"
        return "no", f"overflow is not reported: {dropped}"
    mark = "unclear"
    if counted > estimate * 0.9:  # the server has read it all
        mark = "but"
    return mark, f"asked for the first words of {size}, it said {quote(text)}"


def check_system(probe: Probe) -> Result:
    """Whether the server takes a system prompt, which section 6 always sends."""
    prompt = "You are Luna, an assistant. When asked who you are, say your name."
    text = probe.ask("Who are you?", system=prompt).message["content"]
    if "luna" not in text.lower():
        return "but", f"it ignores its system prompt: {quote(text)}"
    return "ok", "it does as its system prompt says"


def check_embeddings(probe: Probe) -> Result:
    """The vectors of section 6, in the time that it grants."""
    model = os.getenv("EMBEDDING_MODEL", "").strip()
    if not model:
        unset = "EMBEDDING_MODEL is not set"
        return "ok", f"{unset}: section 6 compares pieces of three letters instead"
    embeddings = probe.agent.client.with_options(timeout=10).embeddings
    texts = ["cat", "dog"]
    try:
        reply = embeddings.create(input=texts, model=model, encoding_format="float")
        return "ok", f"vectors of {len(reply.data[0].embedding)} numbers"
    except Exception as error:  # the SDK does not check what the server sends
        if not is_temporary(error):
            probe.env_lines["EMBEDDING_MODEL"] = ""
        reason = explain(error).replace("MODEL_ID", "EMBEDDING_MODEL")
    advice = "llama.cpp wants --embeddings and --pooling mean"
    return "but", f"memory search goes by words alone ({advice}): {reason}"


def check_lanes(probe: Probe) -> Result:
    """Two requests at the same time, as section 10 makes them."""
    failures: list[str] = []

    def ask(agent: object) -> None:
        try:
            ask_model(agent, [])
        except Exception as error:  # a turn may fail in any way
            failures.append(short_reason(error))

    first = probe.conversation([user("What is 2 + 1?")])
    second = probe.conversation([user("What is 1 + 1?")])
    thread = threading.Thread(target=ask, args=[second], daemon=True)
    thread.start()
    ask(first)
    thread.join()
    if not failures:
        return "ok", "both were answered"
    if len(failures) == 1:
        return "but", f"of two requests at once one failed: {failures[0]}"
    return "unclear", f"of two requests at once both failed: {failures[0]}"


def check_oddities(probe: Probe) -> Result:
    """What was odd in the answers, though the sections cope. Sends no request."""
    found = set()
    for reply, pieces in probe.replies:
        if reply.tool_calls:
            found.update(odd_calls(reply, pieces))
    if probe.keep_alives:
        found.add("lines that only keep the connection open")
    if found:
        return "copes", "; ".join(sorted(found))
    return "ok", "nothing was odd"


def odd_calls(reply: object, pieces: list[dict]) -> Iterator[str]:
    """How the tool calls of a reply differ from what the API documents."""
    count = len(reply.tool_calls)
    ids = {piece.get("id") for piece in pieces} - {None, ""}
    indexes = {piece.get("index") for piece in pieces}
    if reply.finish_reason != "tool_calls":
        yield "finish_reason is not tool_calls"
    if not ids:
        yield "calls without an id"
    elif len(ids) < count:
        yield "one id for two calls"
    if None in indexes:
        yield "calls without an index"
    elif len(indexes) < count:
        yield "one index for two calls"
    if '"arguments": {' in json.dumps(pieces):
        yield "arguments as an object"
    if "invalid_json" in str(reply.tool_calls):
        yield "arguments that are no JSON"


# --- verdicts ---

MARKS = {
    "copes": "odd, but the section copes",
    "but": "it works, and there is something to know",
    "no": "it does not work",
    "unclear": "this run could not tell",
    "skipped": "not checked, as an earlier check failed",
}
NO_TOOLS = "without tools: no files, commands, notes, skills"
ODD_CALLS = "tool calls fail (see s02)"
MENDED = "without the MODEL_OPTIONS below"
NO_SECTION = 99


@dataclass
class Check:
    """A row of the table, and what it means for the sections."""

    name: str
    run: Callable
    section: int  # whose verdict it belongs to
    needs: str = ""  # a check without which it makes no sense
    later: str = ""  # what later sections are like if it fails; empty: they fail, too
    mark: str = ""  # once it has run
    text: str = ""


CHECKS = [
    Check("reachable", check_reachable, 1),
    Check("plain answer", check_plain, 1),
    Check("long answer", check_long, 1),
    Check("offering tools", check_offered_tools, 2),
    Check("tool call", check_tool, 2, "offering tools", NO_TOOLS),
    Check("parallel calls", check_parallel, 2, "tool call", ODD_CALLS),
    Check("number argument", check_number, 2, "tool call", ODD_CALLS),
    Check("nested arguments", check_nested, NO_SECTION, "tool call"),
    Check("summary", check_summary, 3, "", "summaries fail (see s03)"),
    Check("context", check_context, 3, "", "long conversations go wrong (see s03)"),
    Check("system prompt", check_system, 6),
    Check("embeddings", check_embeddings, 6),
    Check("two at once", check_lanes, 10),
    Check("oddities", check_oddities, 2),
]


def run_check(probe: Probe, check: Check) -> Result:
    """What a check finds. If it fails: what the section would show."""
    before = probe.agent.options
    probe.refusal = ""
    try:
        mark, text = check.run(probe)
    except Exception as error:  # a turn may fail in any way
        probe.agent.options = before
        if isinstance(error, openai.NotFoundError) and probe.similar_model:
            probe.env_lines["MODEL_ID"] = probe.similar_model
        text = probe.refusal or explain(error)
        probe.refusal = ""
        is_final = is_unusable(probe, error) and probe.is_lasting(error)
        if is_final or not is_temporary(error):
            return "no", text
        return "unclear", text
    if probe.refusal:
        probe.options_help = True
        return "no", f"{MENDED}: {probe.refusal}"
    return mark, text


def is_unusable(probe: Probe, error: Exception) -> bool:
    """Whether a server has sent, without an error, what a section cannot use."""
    reports_error = any(event.get("error") for event in probe.events)
    return type(error) is openai.OpenAIError and not reports_error


def run_checks(probe: Probe) -> list[Check]:
    """Run all checks, and show each as it begins and ends."""
    done: list[Check] = []
    for check in CHECKS:
        show(f"{check.name:<17}")  # before it runs: it may take long
        cause = cause_to_skip(check, done)
        if cause:
            mark, text = "skipped", f"because of: {cause}"
        else:
            mark, text = run_check(probe, check)
        show_row(f"{mark:<9}", text, 17)
        done.append(replace(check, mark=mark, text=text))
    return done


def cause_to_skip(check: Check, done: list[Check]) -> str:
    """The name of a check that has failed, and without which this one has no sense."""
    for earlier in done:
        is_needed = earlier.name in ("reachable", "plain answer", check.needs)
        has_failed = earlier.mark in ("no", "unclear", "skipped")
        if is_needed and has_failed and not earlier.text.startswith(MENDED):
            return earlier.name
    return ""


def show_row(start: str, text: str, column: int = 0) -> None:
    """Show the rest of a row, which begins at a column, in 80 columns."""
    blanks = " " * (column + len(start))
    lines = textwrap.wrap(text, 79 - len(blanks))
    show(start + f"\n{blanks}".join(lines) + "\n")


def verdict(section: int, checks: list[Check]) -> str:
    """Whether a section can be run, and what to know about it."""
    copes = []
    remarks = []
    for check in sorted(checks, key=lambda check: check.mark != "no"):
        is_own = check.section == section
        if check.section > section:
            continue
        if check.mark in ("no", "unclear"):
            if is_own:
                return f"{check.mark}: {check.text}"
            if not check.later:
                return f"{check.mark}: as s{check.section:02}"
            perhaps = "perhaps " if check.mark == "unclear" else ""
            remarks.append(perhaps + check.later)
        elif is_own and check.mark == "copes":
            copes.append(check.text)
        elif is_own and check.mark == "but":
            remarks.append(check.text)
    answer = "yes"
    if copes:
        answer += f", the section copes: {'; '.join(copes)}"
    if remarks:
        answer += f", but {'; '.join(remarks)}"
    return answer


def report(probe: Probe, checks: list[Check]) -> int:
    """Show what follows from the checks. Returns the exit status."""
    show_meanings(checks)
    show("\n")
    status = 0
    for number, path in enumerate(sorted(TITLES.glob("s*_*.py")), 1):
        answer = verdict(number, checks)
        if not answer.startswith("yes"):
            status = 1
        title = path.stem[4:].replace("_", " ")
        show_row(f"{path.stem[:3]} {title:<17}", answer)
    show_env_lines(probe)
    show(f"\n{probe.requests} requests, about {probe.tokens_sent:,} tokens sent.\n")
    if probe.failures:
        kinds = ", ".join(sorted(set(probe.failures)))
        show_row("", f"Failed, and made again: {len(probe.failures)} ({kinds}).")
    return status


def show_meanings(checks: list[Check]) -> None:
    """Explain the marks that the table has."""
    marks = {check.mark for check in checks}
    meanings = [f"{mark}: {MARKS[mark]}" for mark in MARKS if mark in marks]
    if meanings:
        show("\n")
        show_row("", "; ".join(meanings))


def show_env_lines(probe: Probe) -> None:
    """Show the lines for .env that would help."""
    lines = dict(probe.env_lines)
    if probe.real_window < probe.window:
        lines["CONTEXT_TOKENS"] = probe.real_window
    if probe.options_help:
        lines["MODEL_OPTIONS"] = f"'{json.dumps(options_for_env(probe))}'"
    if lines:
        show("\nWhat would help, in .env:\n")
    for name, value in lines.items():
        show(f"{name}={value}\n")


def options_for_env(probe: Probe) -> dict:
    """The options that helped, without those that the sections set by themselves."""
    options = dict(probe.agent.options)
    del options["model"]
    options.pop("stream_options", None)
    if options["stream"] is True:
        del options["stream"]
    for name in ("max_tokens", "max_completion_tokens"):
        if name in options:  # an answer must leave room for the conversation
            options[name] = min(options[name], probe.real_window // 4)
    return options


# --- the command line ---


def parse_arguments() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    about = "one long request more: is the window as long as CONTEXT_TOKENS says?"
    parser.add_argument("--context", action="store_true", help=about)
    parser.error = lambda message: parser.exit(
        2, f"check_model.py: {message}; the one option is --context\n"
    )
    return parser.parse_args()


def load_probe(folder: Path, with_context: bool) -> Probe:
    """The server in .env. Exits with a section's own line if it is not described."""
    SECTION.NO_MODEL = SECTION.NO_MODEL.replace("s03", "check_model")
    SECTION.MAX_ROUNDS = ROUNDS
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    agent = SECTION.load_agent()
    text = os.getenv("CONTEXT_TOKENS") or "128000"
    if not re.fullmatch("[0-9]{1,8}", text):
        sys.exit(f"CONTEXT_TOKENS must be a number of tokens, not {text!r}")
    window = max(int(text), 1000)
    agent = replace(
        agent,
        show=lambda *_: None,
        workspace=folder,
        approval=SECTION.Approval("never"),
        store=SECTION.SessionStore(folder / ".sessions"),
        guard=ContextGuard(window),
    )
    return Probe(agent, window, with_context)


def run(probe: Probe) -> int:
    """Check a server. Returns the exit status."""
    cost = "about 14 small requests"
    if probe.with_context:
        cost += f", one of about {probe.window * 9 // 10:,} tokens"
    agent = probe.agent
    show_row("", f"{cost}, to {agent.options['model']} at {agent.client.base_url}")
    show("\n")
    try:
        return report(probe, run_checks(probe))
    except SystemExit:  # Ctrl-C, perhaps in the middle of a line
        show("\n")
        raise


def main() -> int:
    sys.stdout.reconfigure(errors="replace")
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return run(load_probe(Path(folder).resolve(), arguments.context))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
