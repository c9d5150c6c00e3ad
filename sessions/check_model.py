# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "openai>=3.54,<4",
#   "python-dotenv>=1.2.1",
# ]
# ///
"""Will my model work? Small checks of the server that .env describes, and a verdict per section.

    .env --> checks: requests as sections 2 and 3 send them, answers as they read them
                |--> s01 yes, s02 no: ..., s03 ...
                +--> lines for .env that would help

    python sessions/check_model.py                  check the configured server
    python sessions/check_model.py --context        and whether CONTEXT_TOKENS is true
    python sessions/offline_model.py check_model    check the offline model

Each check gets a mark; what marks other than ok mean is told below the table. Of several servers
(section 9) it checks the first.

It costs about a dozen requests, some 4,000 tokens in all, and at most eight requests more where a
server fails. --context adds one of about nine tenths of CONTEXT_TOKENS: with 128000 some 115,000
tokens, which cost money or, on a machine of your own, minutes. A server that falls silent costs
MODEL_TIMEOUT seconds at a time, but not over 60 if its first answer came within 2.

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
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import openai

SECTIONS = Path(__file__).resolve().parent / "en"
FAILURES = (openai.OpenAIError, OSError, ValueError)  # what a request may end in
PAUSE = 1  # seconds before a request is made again
RETRIES = 8  # in all
QUICK = 2  # seconds; a server that needs longer may be a slow one, and gets its time
SILENCE = 60  # seconds that a quick one may say nothing
ROUNDS = 4  # of tool calls in a turn
LIMIT = 2048  # tokens of an answer, where the server has to be told
WORD = "tamarind"
FILES = {
    "note.txt": f"The code word is {WORD}.",
    "one.txt": "red apple",
    "two.txt": "blue plum",
}
WINDOW_FIELDS = (
    "loaded_context_length",
    "max_model_len",
    "context_length",
    "context_window",
)
CALL_AS_TEXT = re.compile(
    r'<tool_call|<function|"(?:name|function|tool)"\s*:|\bread_file\s*\('
)
MARKS = {
    "copes": "odd, but the section copes",
    "but": "it works, and there is something to know",
    "no": "it does not work",
    "unclear": "this run could not tell",
    "skipped": "not checked, as an earlier check failed",
}
NESTED = {
    "guests": {"type": "integer"},
    "outside": {"type": "boolean"},
    "guest": {"type": "object", "properties": {"name": {"type": "string"}}},
    "wishes": {"type": "array", "items": {"type": "string"}},
}
BOOK = {
    "name": "book_table",
    "description": "Book a table.",
    "parameters": {"type": "object", "properties": NESTED, "required": [*NESTED]},
}
TYPES = {"guests": int, "outside": bool, "guest": dict, "wishes": list}
Found = tuple[str, str]  # ok or one of MARKS, and a text
Findings = list[tuple[int, str, str]]  # with the section whose verdict it belongs to


def load_section(name: str) -> ModuleType:
    """A section as a module: what it sends and how it reads is then no copy that could drift."""
    path = next(SECTIONS.glob(f"{name}_*.py"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


S01, S02, S03 = map(load_section, ("s01", "s02", "s03"))
read_chunks = S01.read_chunks
for section in (S01, S02, S03):
    section.read_chunks = iter  # they read a Reply, which reads the stream as they would

# --- asking ---


@dataclass
class Reply:
    """A streamed reply that keeps the chunks that pass, and ends when its time is over."""

    stream: openai.Stream
    response: object
    chunks: list
    seconds: float

    def __iter__(self) -> Iterator[object]:
        deadline = time.monotonic() + self.seconds
        for chunk in read_chunks(self.stream):
            self.chunks.append(chunk)
            yield chunk
            if time.monotonic() > deadline:
                late = TimeoutError(f"the answer still came after {self.seconds:g} s")
                raise openai.APITimeoutError(self.response.request) from late


class Probe:
    """The configured server, and what came of asking it so far."""

    def __init__(self, agent: object, window: int) -> None:
        self.agent, self.window = agent, window
        self.client, self.seconds = agent.client, agent.client.timeout.read
        chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))
        agent.client = SimpleNamespace(base_url=self.client.base_url, chat=chat)
        self.replies: list[list] = []  # the chunks of each
        self.failures: list[str] = []
        self.models: list[dict] = []
        self.lines: dict[str, str] = {}  # for .env
        self.near = ""  # a model with a name like that of one that is not listed
        self.refusal = ""  # why a setting had to be changed in this check
        self.sent = self.counted = (
            0  # tokens: of all requests, of the last by the server's count
        )

    def create(self, stream: bool, extra_body: dict, **more: object) -> object:
        """What the sections call of the SDK's client; the reply is kept."""
        chunks: list = []
        self.replies.append(chunks)
        self.sent += S03.estimate(extra_body)
        create = self.client.chat.completions.create
        reply = create(stream=stream, extra_body=extra_body, **more)
        if stream:
            return Reply(reply, reply.response, chunks, self.seconds)
        chunks.append(reply)
        return reply

    def allow_silence(self, seconds: float) -> None:
        self.client = self.client.with_options(
            timeout=openai.Timeout(seconds, connect=10)
        )

    def ask(
        self, messages: list[dict], section: ModuleType = S01, tools: list = ()
    ) -> tuple:
        """The message and finish_reason that a section's call_model makes of a conversation."""

        def call() -> tuple[dict, str]:
            agent = replace(self.agent, messages=messages, tools=tools)
            reply = section.call_model(agent)
            self.counted = getattr(agent, "used", 0)
            return reply

        return self.insist(call)

    def turn(self, text: str) -> tuple[str, list[dict]]:
        """A turn of section 2 with its tools; the answer, and all messages."""
        messages = [user(text)]
        answer = self.insist(
            lambda: S02.agent_turn(replace(self.agent, messages=messages))
        )
        return answer, messages

    def insist(self, call: Callable) -> object:
        """The outcome of a call, made again after what may be chance, or with a better setting."""
        while True:
            try:
                return call()
            except FAILURES as error:
                change = {} if self.refusal else remedy(self.agent.settings, error)
                if change:
                    self.refusal = S02.explain(error)
                    self.change(change)
                    continue
                used_up = len(self.failures) >= RETRIES
                if used_up or not is_chance(error) or self.is_lasting(error):
                    raise
                self.failures.append(short(error))
                time.sleep(PAUSE)

    def is_lasting(self, error: Exception) -> bool:
        """Whether it has failed in the same way before: as often as no chance would have it."""
        times = 1 if isinstance(error, openai.APITimeoutError) else 2
        return self.failures[-times:] == [short(error)] * times

    def change(self, change: dict) -> None:
        """Go on with other settings; one that is None goes."""
        gone = [key for key, value in change.items() if value is None]
        settings = self.agent.settings | change
        self.agent.settings = {
            key: settings[key] for key in settings if key not in gone
        }

    def keep_settings(self) -> None:
        """Put the settings that helped among the lines for .env."""
        options = {
            key: value for key, value in self.agent.settings.items() if key != "model"
        }
        if options["stream"] is True:
            del options["stream"]
        self.lines["MODEL_OPTIONS"] = f"'{json.dumps(options)}'"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def quote(text: str, size: int = 60) -> str:
    return repr(text if len(text) <= size else f"{text[:size]}...")


def short(error: Exception) -> str:
    """A failure in a word or two."""
    if status := getattr(error, "status_code", None):
        return f"HTTP {status}"
    return S02.explain(error).partition(" - ")[0].partition(": ")[0].rstrip(".")


def is_chance(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    told = f"{getattr(error, 'code', '')} {getattr(error, 'type', '')}"
    if "quota" in told or "billing" in told:
        return False
    if status := getattr(error, "status_code", None):
        return status in (408, 409, 425, 429) or status >= 500
    return not isinstance(error, ValueError)


def remedy(settings: dict, error: Exception) -> dict:
    """The change of settings that an error asks for, as MODEL_OPTIONS would make it."""
    status, told = (
        getattr(error, "status_code", None),
        f"{error} {getattr(error, 'body', '')}",
    )
    if S02.NOTES["length"] in told:  # before the answer had begun
        return more_room(settings)
    if settings["stream"] and "no stream" in told and '"choices"' in told:
        return {"stream": False}
    if status not in (400, 422) or S03.is_overflow(error):
        return {}
    if settings["stream"] and re.search(r"\bstream(ing|_options)?\b", told):
        return {"stream": False}
    if "reasoning_effort" in told and settings.get("reasoning_effort") != "none":
        return {"reasoning_effort": "none"}
    if "max_completion_tokens" in told and "max_tokens" in settings:
        return {"max_completion_tokens": settings["max_tokens"], "max_tokens": None}
    options = settings.keys() - {"model", "stream"}
    return {key: None for key in options if re.search(rf"\b{re.escape(key)}\b", told)}


def more_room(settings: dict) -> dict:
    """The change of settings that allows for a long answer."""
    name = (
        "max_completion_tokens" if "max_completion_tokens" in settings else "max_tokens"
    )
    return {name: LIMIT}


# --- checks ---


def check_reachable(probe: Probe) -> Found:
    """Whether something that serves models answers at the address, and takes the key."""
    url, name = str(probe.client.base_url), probe.agent.settings["model"]
    try:
        probe.models = list_models(probe.client)
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        return "no", S02.explain(error)
    except (openai.APIStatusError, ValueError):
        better = url.rstrip("/") + "/v1"
        with suppress(openai.OpenAIError, ValueError):
            list_models(probe.client.with_options(base_url=better))
            probe.lines["OPENAI_BASE_URL"] = better
            return "no", f"no models at {url}, but at {better}"
        return "ok", f"{url} answers; it lists no models"
    names = [str(model.get("id")) for model in probe.models]
    if not names or name in names:
        return "ok", url
    near = difflib.get_close_matches(str(name), names, 3, 0.4)
    probe.near, near = "".join(near[:1]), near or names[:3]
    return "ok", f"{url}; it does not list {name}, but {', '.join(near)}"


def list_models(client: openai.OpenAI) -> list[dict]:
    """What a server says of its models. Raises APIError, or ValueError for what is no list."""
    listing = json.loads(
        client.with_options(timeout=15).models.with_raw_response.list().text
    )
    models = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(models, list):
        raise ValueError("no list of models")
    return [model for model in models if isinstance(model, dict)]


def check_plain(probe: Probe) -> Found:
    """Whether an answer comes; after a quick one, silence is a fault earlier."""
    start = time.monotonic()
    message, _ = probe.ask([user("What is 2 + 2? Answer with the number alone.")])
    if time.monotonic() - start < QUICK:
        probe.allow_silence(min(SILENCE, probe.seconds))
    text = message["content"].strip()
    if "think>" in text:
        return "but", f"its thoughts (<think>) stand in its answers: {quote(text)}"
    return "ok", f"an answer came: {quote(text)}"


def check_long(probe: Probe) -> Found:
    """Whether an answer of some length streams and comes whole, or has to be allowed for."""
    question = [user("Count to 60, in digits, with blanks between, and nothing else.")]
    message, finish_reason = probe.ask(question)
    if finish_reason == "length":
        try_more_room(probe, question)
        return (
            "but",
            f"answers are cut, this one after {len(message['content'])} characters",
        )
    whole = re.search(r"\b60\W*$", message["content"])
    text = "60 numbers came whole" if whole else "it ended by itself before 60"
    if not probe.agent.settings["stream"]:
        return "ok", f"{text}, at once: streaming is off"
    return "ok", f"{text}, in {len(probe.replies[-1])} chunks"


def try_more_room(probe: Probe, question: list[dict]) -> None:
    """Go on with room for long answers, if the same question is then answered whole."""
    before = probe.agent.settings
    probe.change(more_room(before))
    with suppress(*FAILURES):
        if probe.ask(question)[1] != "length":
            probe.keep_settings()
            return
    probe.agent.settings = before


def check_tool(probe: Probe) -> Found:
    """One tool call of section 2, and what becomes of its result."""
    answer, messages = probe.turn("Which code word does this file hold?\nread note.txt")
    results = [message["content"] for message in messages if message["role"] == "tool"]
    if not results:
        return "no", no_call(answer)
    if not any(WORD in result for result in results):
        return "no", f"its calls did not work: {quote(results[0], 100)}"
    if S02.NOTES["rounds"] in answer:
        return "no", f"went on calling after {ROUNDS} rounds"
    if WORD in answer.lower():
        return "ok", "called read_file, and used its result"
    if S02.NOTES["length"] in answer:
        return "but", "its answer to a tool's result was cut"
    return "but", f"it does not use a tool's result: {quote(answer)}"


def no_call(text: str) -> str:
    """What to say of a text that came in place of a tool call."""
    if CALL_AS_TEXT.search(text):
        advice = "llama.cpp wants --jinja, vLLM --tool-call-parser"
        return f"wrote its call as text, not as a call ({advice})"
    return f"answered with text in place of a call: {quote(text)}"


def check_parallel(probe: Probe) -> Found:
    """Two calls at once; one after the other does as well."""
    question = (
        "What do these two files say? Read both at once.\nread one.txt and two.txt"
    )
    answer, messages = probe.turn(question)
    calls = [
        len(message["tool_calls"]) for message in messages if message.get("tool_calls")
    ]
    if not calls:
        return "but", no_call(answer)
    if "apple" not in answer.lower() or "plum" not in answer.lower():
        return "but", f"of two files it did not tell both: {quote(answer)}"
    return "ok", "two calls at once" if calls[0] > 1 else "one call at a time"


def check_number(probe: Probe) -> Found:
    """A number as an argument; section 2 returns a call in which it is a text."""
    message, _ = probe.ask([user("Read line 1 of one.txt alone.")], S02, S02.TOOLS)
    if not message.get("tool_calls"):
        return "but", no_call(message["content"])
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    values = [
        arguments[key] for key in ("offset", "limit", "timeout") if key in arguments
    ]
    wrong = [value for value in values if type(value) is not int]
    if wrong:
        return "but", f"an argument that is a number came as {repr(wrong[0])[:60]}"
    return "ok", "it came as a number" if values else "none came, and none has to"


def check_nested(probe: Probe) -> Found:
    """Arguments of all kinds, as tools of your own may have them; no section needs more."""
    text = "Book a table outside for 4 guests in Ada's name. Her wishes: a quiet place, a window."
    message, _ = probe.ask([user(text)], S02, [{"type": "function", "function": BOOK}])
    if not message.get("tool_calls"):
        return "unclear", f"no section needs them; {no_call(message['content'])}"
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    wrong = [key for key, kind in TYPES.items() if type(arguments.get(key)) is not kind]
    if wrong:
        told = f"missing, or of another type: {', '.join(wrong)}"
        return "but", f"no section needs them; {told}"
    return "ok", "a number, a truth value, an object and a list came as such"


def check_summary(probe: Probe) -> Found:
    """A summary as section 3 asks for it, and the server's count of tokens."""
    talk = "user: my cat is Miso\nassistant: Noted.\nuser: my dog is Rex\nassistant: Noted."
    message, finish_reason = probe.ask([user(f"{S03.SUMMARIZE}\n\n{talk}")], S03)
    text = message["content"]
    if finish_reason == "length":
        return "but", "its summary was cut"
    if "miso" not in text.lower() or "rex" not in text.lower():
        return "but", f"its summary leaves out what counts: {quote(text)}"
    if not probe.counted:
        return "ok", "names are kept; the server counts no tokens: section 3 estimates"
    return "ok", f"names are kept; the server counted {probe.counted:,} tokens"


def check_context(probe: Probe) -> Found:
    """What the server itself says about the model's window."""
    name, wanted = probe.agent.settings["model"], f"CONTEXT_TOKENS is {probe.window:,}"
    model = next((model for model in probe.models if model.get("id") == name), {})
    meta = model.get("meta")
    values = [model.get(key) for key in WINDOW_FIELDS]
    values.append(meta.get("n_ctx") if isinstance(meta, dict) else None)
    said = next((value for value in values if type(value) is int and value > 0), 0)
    if not said:
        return "but", f"{wanted}, and the server does not say: --context finds out"
    if said < probe.window:
        probe.lines["CONTEXT_TOKENS"] = str(said)
        return "but", f"{wanted}, and the server says {said:,}"
    return "ok", f"{wanted}, the server says {said:,}"


def probe_context(probe: Probe) -> Found:
    """A conversation as long as section 3 lets it become; its first words are asked for."""
    talk = long_talk(probe.window)
    estimate = S03.estimate(talk)
    size = f"a conversation of about {estimate:,} tokens"
    probe.allow_silence(probe.seconds)
    try:
        message, _ = probe.ask(talk, S03)
    except openai.OpenAIError as error:
        if not S03.is_overflow(error):
            raise
        numbers = re.findall(r"\d[\d,]{2,}", f"{error} {getattr(error, 'body', '')}")
        sizes = [int(number.replace(",", "")) for number in numbers]
        if sizes := [size for size in sizes if 500 < size < probe.window]:
            probe.lines["CONTEXT_TOKENS"] = str(min(sizes))
        return "copes", f"{size} is refused, and section 3 then makes room"
    if WORD in message["content"].lower():
        return "ok", f"{size} came through whole"
    if not probe.counted or probe.counted > estimate // 2:
        mark = (
            "but" if probe.counted > estimate * 0.9 else "unclear"
        )  # it has counted them
        return (
            mark,
            f"asked for the first words of {size}, it said {quote(message['content'])}",
        )
    probe.lines["CONTEXT_TOKENS"] = str(probe.counted)
    return "no", f"of {size}, the server silently dropped all but {probe.counted:,}"


def long_talk(window: int) -> list[dict]:
    """Messages that fill what section 3 fills of a window, a code word first."""
    filler = "The rain came down on the hills, and the river rose a little. "
    part, noted = (
        user(filler * (window // 250)),
        {"role": "assistant", "content": "Noted."},
    )
    talk = [user(f"My code word is {WORD}."), noted]
    while S03.estimate([*talk, part]) < window * 0.88:
        talk += [part, noted]
    return [*talk, user("What is my code word?")]


def check_system(probe: Probe) -> Found:
    """Whether the server takes a system prompt, which section 6 always sends."""
    prompt = (
        "You are Luna, an assistant. When you are asked who you are, say your name."
    )
    message, _ = probe.ask(
        [{"role": "system", "content": prompt}, user("Who are you?")]
    )
    if "luna" not in message["content"].lower():
        return "but", f"it ignores its system prompt: {quote(message['content'])}"
    return "ok", "it does as its system prompt says"


def check_embeddings(probe: Probe) -> Found:
    """The vectors of section 6, in the time that it grants."""
    model = os.getenv("EMBEDDING_MODEL", "").strip()
    if not model:
        unset = "EMBEDDING_MODEL is not set"
        return "ok", f"{unset}: section 6 compares pieces of three letters instead"
    create = probe.client.with_options(timeout=10).embeddings.create
    try:
        reply = create(input=["cat", "dog"], model=model, encoding_format="float")
        sizes = [len(each.embedding) for each in reply.data]
        return "ok", f"vectors of {sizes[0]} numbers"
    except (
        openai.OpenAIError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        if not is_chance(error):
            probe.lines["EMBEDDING_MODEL"] = ""
        told = S02.explain(error).replace("check MODEL_ID", "check EMBEDDING_MODEL")
        return "but", f"memory search goes by words alone: {told}"


def check_lanes(probe: Probe) -> Found:
    """Two requests at the same time, as section 10 makes them."""
    failed: list[str] = []

    def ask(text: str) -> None:
        try:
            S01.call_model(replace(probe.agent, messages=[user(text)]))
        except FAILURES as error:
            failed.append(short(error))

    other = threading.Thread(target=ask, args=["What is 1 + 1?"], daemon=True)
    other.start()
    ask("What is 2 + 1?")
    other.join()
    if failed:
        mark, count = ("but", "one") if len(failed) == 1 else ("unclear", "both")
        return mark, f"of two requests at once {count} failed: {failed[0]}"
    return "ok", "both were answered"


def check_oddities(probe: Probe) -> Found:
    """What was odd in the tool calls, though section 2 copes; no request of its own."""
    streamed = bool(probe.agent.settings["stream"])
    found = {
        oddity for chunks in probe.replies for oddity in oddities(chunks, streamed)
    }
    return (
        ("copes", "; ".join(sorted(found))) if found else ("ok", "no tool call was odd")
    )


def oddities(chunks: list, streamed: bool) -> list[str]:
    """What of a reply with tool calls is not as the API documents it."""
    calls, indexes, values, finishes = [], set(), [], set()
    for choice in [
        each for chunk in chunks for each in getattr(chunk, "choices", None) or []
    ]:
        finishes.add(getattr(choice, "finish_reason", None) or "tool_calls")
        delta = getattr(choice, "delta" if streamed else "message", None)
        for position, piece in enumerate(getattr(delta, "tool_calls", None) or []):
            S02.add_piece(calls, piece, position)
            indexes.add(getattr(piece, "index", None))
            values.append(getattr(getattr(piece, "function", None), "arguments", None))
    ids = [call["id"] for call in calls if call["id"]]
    texts = [call["text"] for call in calls if call["text"].strip() not in ("", "null")]
    odd = {
        "finish_reason is not tool_calls": finishes != {"tool_calls"},
        "calls without an id": len(ids) < len(calls),
        "one id for two calls": len(set(ids)) < len(ids),
        "calls without an index": streamed and None in indexes,
        "one index for two calls": streamed and len(indexes) < len(calls),
        "arguments as an object": any(isinstance(value, dict) for value in values),
        "arguments that are no JSON": not all(map(S02.is_object, texts)),
    }
    return [text for text, is_so in odd.items() if calls and is_so]


# --- verdicts ---

CHECKS = {
    "reachable": (check_reachable, 1),  # and the section whose verdict it belongs to
    "plain answer": (check_plain, 1),
    "long answer": (check_long, 1),
    "tool call": (check_tool, 2),
    "parallel calls": (check_parallel, 2),
    "number argument": (check_number, 2),
    "nested arguments": (check_nested, 11),  # of no section
    "summary": (check_summary, 3),
    "context": (check_context, 3),
    "system prompt": (check_system, 6),
    "embeddings": (check_embeddings, 6),
    "two at once": (check_lanes, 10),
    "oddities": (check_oddities, 2),
}
NEEDS = dict.fromkeys(
    ("parallel calls", "number argument", "nested arguments"), "tool call"
)


def run_check(probe: Probe, check: Callable) -> Found:
    """What a check finds; where it fails, what the section would show."""
    before, probe.refusal = probe.agent.settings, ""
    try:
        found = check(probe)
    except FAILURES as error:
        probe.agent.settings = before
        if isinstance(error, openai.NotFoundError) and probe.near:
            probe.lines["MODEL_ID"] = probe.near
        # A bare OpenAIError is the section's own: it cannot use what the server has sent.
        useless = type(error) is openai.OpenAIError and probe.is_lasting(error)
        told, probe.refusal = probe.refusal or S02.explain(error), ""
        return "no" if useless or not is_chance(error) else "unclear", told
    if probe.refusal:
        probe.keep_settings()
        return "no", f"without the MODEL_OPTIONS below: {probe.refusal}"
    return found


def run_checks(probe: Probe, checks: dict[str, tuple[Callable, int]]) -> Findings:
    """All checks, told of as they begin and end; what makes no sense after another is skipped."""
    findings, failed = [], []
    for name, (check, section) in checks.items():
        S02.show(f"{name:<17}")  # before it runs: it may take long
        needed = ("reachable", "plain answer", NEEDS.get(name))
        causes = [cause for cause in failed if cause in needed]
        if causes:
            mark, text = "skipped", f"because of: {causes[0]}"
        else:
            mark, text = run_check(probe, check)
        if mark in ("no", "unclear") and not probe.refusal:
            failed.append(name)
        show_row(f"{mark:<9}", text, 17)
        findings.append((section, mark, text))
    return findings


def show_row(start: str, text: str, column: int = 0) -> None:
    """Show the rest of a line of a table, from a column on, in 80 columns."""
    text = " ".join(text.split())
    text = text if len(text) < 400 else f"{text[:400]}..."
    blanks = " " * (column + len(start))
    S02.show(start + f"\n{blanks}".join(textwrap.wrap(text, 79 - len(blanks))) + "\n")


def verdict(section: int, findings: Findings) -> str:
    """Whether a section can be run, and what to know about it."""
    for mark in ("no", "unclear"):
        marked = [
            (at, text)
            for at, found, text in findings
            if found == mark and at <= section
        ]
        if marked:
            first, text = min(marked)
            return f"{mark}: {text if first == section else f'as s{first:02}'}"
    answer = "yes"
    for mark, start in (("copes", ", the section copes: "), ("but", ", but ")):
        told = [text for at, found, text in findings if found == mark and at == section]
        answer += start + "; ".join(told) if told else ""
    return answer


def report(probe: Probe, findings: Findings) -> int:
    """Show the marks, the verdicts and the lines for .env. Returns the exit status."""
    marks = {mark for _, mark, _ in findings}
    if meanings := [f"{mark}: {told}" for mark, told in MARKS.items() if mark in marks]:
        S02.show("\n")
        show_row("", "; ".join(meanings))
    S02.show("\n")
    verdicts = []
    for number, path in enumerate(sorted(SECTIONS.glob("s*_*.py")), 1):
        verdicts.append(verdict(number, findings))
        title = path.stem[4:].replace("_", " ")
        show_row(f"{path.stem[:3]} {title:<17}", verdicts[-1])
    if probe.lines:
        lines = [f"{name}={value}\n" for name, value in probe.lines.items()]
        S02.show("\nWhat would help, in .env:\n" + "".join(lines))
    S02.show(f"\n{len(probe.replies)} requests, about {probe.sent:,} tokens sent.\n")
    if probe.failures:
        kinds = ", ".join(sorted(set(probe.failures)))
        show_row("", f"Failed, and made again: {len(probe.failures)} ({kinds}).")
    return int(not all(text.startswith("yes") for text in verdicts))


# --- the command line ---


def parse() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    about = "one long request more: is the window as long as CONTEXT_TOKENS says?"
    parser.add_argument("--context", action="store_true", help=about)
    way_out = "the one option is --context"
    parser.error = lambda told: parser.exit(2, f"check_model.py: {told}; {way_out}\n")
    return parser.parse_args()


def load_probe(folder: Path) -> Probe:
    """The server that .env describes. Exits with a section's own line if it does not."""
    S02.NO_MODEL = S02.NO_MODEL.replace("s02", "check_model")
    S02.MAX_ROUNDS = ROUNDS
    agent, window = S02.load_agent(), os.getenv("CONTEXT_TOKENS") or "128000"
    if not re.fullmatch("[0-9]{1,8}", window):
        sys.exit(f"CONTEXT_TOKENS must be a number of tokens, not {window!r}")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    agent = replace(agent, workspace=folder, approval="never", show=lambda text: None)
    return Probe(agent, S03.ContextGuard(int(window)).window)


def run(probe: Probe, with_context: bool) -> int:
    """Check a server. Returns the exit status."""
    cost = f", one of about {probe.window * 9 // 10:,} tokens" if with_context else ""
    target = f"{probe.agent.settings['model']} at {probe.client.base_url}"
    show_row("", f"a dozen small requests{cost}, to {target}")
    S02.show("\n")
    checks = CHECKS | ({"context": (probe_context, 3)} if with_context else {})
    try:
        return report(probe, run_checks(probe, checks))
    except SystemExit:  # Ctrl-C, perhaps in the middle of a line
        S02.show("\n")
        raise


def main() -> int:
    sys.stdout.reconfigure(errors="replace")
    given = parse()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return run(load_probe(Path(folder).resolve()), given.context)
    except (
        BrokenPipeError
    ):  # `| head` has read enough, and what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
