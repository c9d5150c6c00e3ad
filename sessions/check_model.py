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

Of several profiles it checks the first. It costs about a dozen requests, some 4,000 tokens in all,
and at most eight requests more where a server fails. --context adds one of nine tenths of
CONTEXT_TOKENS: with 128000 some 115,000 tokens, which cost money or, on a machine of your own,
minutes. The exit status is 0 if every section can be run.
"""

import argparse
import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import openai

SECTIONS = Path(__file__).resolve().parent / "en"
EMBEDDING_SECONDS = 10  # what section 6 grants
FAILURES = (openai.OpenAIError, OSError, ValueError)  # what a request may end in
PAUSE = 0.5  # seconds before a request is made again
RETRIES = 8  # in all
ROUNDS = 4  # of tool calls in a turn
LIMIT = 2048  # tokens of an answer, where the server has to be told
WORD = "tamarind"
FILES = {"note.txt": f"The code word is {WORD}.", "one.txt": "red apple", "two.txt": "blue plum"}
NESTED = {
    "type": "object",
    "properties": {
        "guests": {"type": "integer"},
        "outside": {"type": "boolean"},
        "guest": {"type": "object", "properties": {"name": {"type": "string"}}},
        "wishes": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["guests", "outside", "guest", "wishes"],
}
BOOK = {"name": "book_table", "description": "Book a table.", "parameters": NESTED}
TYPES = {"guests": int, "outside": bool, "guest": dict, "wishes": list}
WINDOW_FIELDS = ("loaded_context_length", "max_model_len", "context_length", "context_window")
CALL_AS_TEXT = re.compile(r'<tool_call|<function|"(?:name|function|tool)"\s*:|\bread_file\s*\(')


def load_section(name: str) -> ModuleType:
    """A section as a module: what it sends and how it reads is then no copy that could drift."""
    path = next(SECTIONS.glob(f"{name}_*.py"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- asking ---


class TooSlow(openai.OpenAIError):
    """An answer that still comes when its time is over."""


@dataclass
class Finding:
    """What a check found: ok, copes, but, no, unclear or skipped; and for which section."""

    mark: str
    text: str
    section: int = 0
    check: str = ""


@dataclass
class Stream:
    """A streamed reply that keeps the chunks that pass, and ends when its time is over."""

    reply: openai.Stream
    chunks: list
    seconds: float

    def __post_init__(self) -> None:
        self.response = self.reply.response

    def __iter__(self) -> Iterator[object]:
        deadline = time.monotonic() + self.seconds
        for chunk in self.reply:
            self.chunks.append(chunk)
            yield chunk
            if time.monotonic() > deadline:
                raise TooSlow(f"the answer still came after {self.seconds:g} s")


@dataclass
class Probe:
    """The configured server, and what came of asking it so far."""

    agent: object
    s01: ModuleType
    s02: ModuleType
    s03: ModuleType
    window: int
    replies: list[list] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    refusal: str = ""
    lines: dict[str, str] = field(default_factory=dict)
    models: list[dict] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.client, self.settings = self.agent.client, self.agent.settings
        chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))
        self.agent.client = SimpleNamespace(base_url=self.client.base_url, chat=chat)

    def create(self, stream: bool, extra_body: dict, **more: object) -> object:
        """What the sections call of the SDK's client; the reply is kept."""
        self.tokens += self.s03.estimate(extra_body)
        chunks: list = []
        self.replies.append(chunks)
        create = self.client.chat.completions.create
        reply = create(stream=stream, extra_body=extra_body, **more)
        if stream:
            return Stream(reply, chunks, self.client.timeout.read)
        chunks.append(reply)
        return reply

    def ask(self, messages: list[dict] | str, section: ModuleType, tools: list[dict]) -> tuple:
        """The message and finish_reason that a section's call_model makes of a conversation."""
        if isinstance(messages, str):
            messages = [user(messages)]
        agent = replace(self.agent, messages=messages, tools=tools)
        return self.insist(lambda: section.call_model(agent))

    def turn(self, text: str) -> tuple[str, list[dict]]:
        """A turn of section 2 with its tools; the answer, and all messages."""
        agent = replace(self.agent, messages=[user(text)])
        return self.insist(lambda: self.s02.agent_turn(agent)), agent.messages

    def insist(self, call: Callable) -> object:
        """The outcome of a call, made again after what may be chance, or with a better setting."""
        while True:
            try:
                return call()
            except FAILURES as error:
                if change := {} if self.refusal else remedy(self, error):
                    self.refusal = self.s02.explain(error)
                    self.set(change)
                    continue
                if not is_chance(error) or self.is_lasting(error) or len(self.failures) >= RETRIES:
                    raise
                self.failures.append(short(self, error))
                time.sleep(min(retry_after(error), 5))

    def is_lasting(self, error: Exception) -> bool:
        """Whether it has failed in the same way before: as often as no chance would have it."""
        slow = isinstance(error, openai.APITimeoutError | TooSlow)
        return self.failures[-2 + slow :] == [short(self, error)] * (2 - slow)

    def set(self, change: dict) -> None:
        """Go on with other settings; one that is None goes."""
        self.settings.update(change)
        for key in [key for key, value in change.items() if value is None]:
            del self.settings[key]

    def reset(self, settings: dict) -> None:
        """Go on with the settings of before."""
        self.settings.clear()
        self.settings.update(settings)

    def keep_settings(self) -> None:
        """Put the settings that helped among the lines for .env."""
        options = {key: value for key, value in self.settings.items() if key != "model"}
        if options.get("stream") is True:
            del options["stream"]
        self.lines["MODEL_OPTIONS"] = f"'{json.dumps(options)}'"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def short(probe: Probe, error: Exception) -> str:
    """A failure in a word or two."""
    status = getattr(error, "status_code", None)
    if status:
        return f"HTTP {status}"
    return probe.s02.explain(error).partition(" - ")[0].partition(": ")[0]


def retry_after(error: Exception) -> float:
    """Seconds that the server asks for, else half a second."""
    value = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    return float(value) if value.isdecimal() else PAUSE


def is_chance(error: Exception) -> bool:
    """Whether the same request may well succeed a little later."""
    told = f"{getattr(error, 'code', '')} {getattr(error, 'type', '')}"
    if "quota" in told or "billing" in told or retry_after(error) > 5:
        return False
    if status := getattr(error, "status_code", None):
        return status in (408, 409, 425, 429) or status >= 500
    return not isinstance(error, ValueError)


def remedy(probe: Probe, error: Exception) -> dict:
    """The change of settings that an error asks for, as MODEL_OPTIONS would make it."""
    settings, status = probe.settings, getattr(error, "status_code", None)
    told = f"{error} {getattr(error, 'body', '')}"
    if status not in (None, 400, 422) or probe.s03.is_overflow(error):
        return {}
    refused = status and re.search(r"\bstream(ing|_options)?\b", told)
    if settings["stream"] and (refused or "no stream" in told and '"choices"' in told):
        return {"stream": False}
    if probe.s02.NOTES["length"] in told:  # before the answer had begun
        return {limit_name(settings): LIMIT}
    if status and "reasoning_effort" in told and settings.get("reasoning_effort") != "none":
        return {"reasoning_effort": "none"}
    if status and "max_completion_tokens" in told and "max_tokens" in settings:
        return {"max_completion_tokens": settings["max_tokens"], "max_tokens": None}
    options = settings.keys() - {"model", "stream"}
    named = [key for key in sorted(options) if re.search(rf"\b{re.escape(key)}\b", told)]
    return dict.fromkeys(named if status else [])


def limit_name(settings: dict) -> str:
    return "max_completion_tokens" if "max_completion_tokens" in settings else "max_tokens"


# --- checks ---


def check_reachable(probe: Probe) -> Finding:
    """Whether something that serves models answers at the address, and takes the key."""
    url = str(probe.client.base_url)
    try:
        probe.models = list_models(probe.client)
    except (openai.APIConnectionError, openai.AuthenticationError) as error:
        return Finding("no", probe.s02.explain(error), 1)
    except (openai.APIStatusError, ValueError):
        if not url.rstrip("/").endswith("/v1"):
            with suppress(openai.OpenAIError, ValueError):
                better = url.rstrip("/") + "/v1"
                probe.models = list_models(probe.client.with_options(base_url=better))
                probe.lines["OPENAI_BASE_URL"] = better
                return Finding("no", f"no models at {url}, but at {better}", 1)
        return Finding("ok", f"{url} answers; it lists no models")
    names = [str(model.get("id")) for model in probe.models]
    name = probe.settings["model"]
    if not names or name in names:
        return Finding("ok", url)
    near = difflib.get_close_matches(name, names, 3, 0.4) or names[:3]
    return Finding("ok", f"{url}; it does not list {name}, but {', '.join(near)}")


def list_models(client: openai.OpenAI) -> list[dict]:
    """What a server says of its models. Raises APIError, or ValueError for what is no list."""
    listing = json.loads(client.with_options(timeout=15).models.with_raw_response.list().text)
    models = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(models, list):
        raise ValueError("no list of models")
    return [model for model in models if isinstance(model, dict)]


def check_plain(probe: Probe) -> Finding:
    message, _ = probe.ask("What is 2 + 2? Answer with the number alone.", probe.s01, [])
    return Finding("ok", f"answered {message['content'].strip()[:40]!r}", 1)


def check_long(probe: Probe) -> Finding:
    """Whether an answer of some length comes whole, or has to be allowed for."""
    question = "Count to 60, in digits, with blanks between, and nothing else."
    message, finish_reason = probe.ask(question, probe.s01, [])
    if finish_reason != "length":
        whole = re.search(r"\b60\W*$", message["content"])
        text = "60 numbers came whole" if whole else "it ended by itself before 60"
        return Finding("ok", text)
    before, refusal, helped = dict(probe.settings), probe.refusal, False
    probe.set({limit_name(before): LIMIT})
    with suppress(*FAILURES):
        helped = probe.ask(question, probe.s01, [])[1] != "length"
    probe.refusal = refusal
    if helped:
        probe.keep_settings()
    else:
        probe.reset(before)
    size = len(message["content"])
    return Finding("but", f"answers are cut, this one after {size} characters", 1)


def check_streaming(probe: Probe) -> Finding:
    """In how many pieces the long answer came; no request of its own."""
    if not probe.settings["stream"]:
        return Finding("ok", "off: an answer appears when it is whole")
    pieces = sum(bool(getattr(delta, "content", "")) for _, delta in deltas_of(probe.replies[-1]))
    return Finding("ok", f"the long answer came in {pieces} pieces")


def check_tool(probe: Probe) -> Finding:
    """One tool call of section 2, and what becomes of its result."""
    question = "Which code word does this file hold? Use your tools.\nread note.txt"
    answer, messages = probe.turn(question)
    results = [m["content"] for m in messages if m["role"] == "tool"]
    if not results:
        if CALL_AS_TEXT.search(answer):
            advice = "llama.cpp wants --jinja, vLLM --tool-call-parser"
            return Finding("no", f"wrote its call as text, not as a call ({advice})", 2)
        return Finding("no", f"answered with text in place of a call: {answer[:60]!r}", 2)
    if not any(WORD in result for result in results):
        return Finding("no", f"its calls did not work: {results[0][:100]!r}", 2)
    if probe.s02.NOTES["rounds"] in answer:
        return Finding("no", f"went on calling after {ROUNDS} rounds", 2)
    if WORD not in answer.lower() and probe.s02.NOTES["length"] in answer:
        return Finding("but", "its answer to a tool's result was cut", 2)
    if WORD not in answer.lower():
        return Finding("but", f"it does not use a tool's result: {answer[:60]!r}", 2)
    errors = sum(result.startswith("error") for result in results)
    amends = f", after {errors} that went wrong" if errors else ""
    return Finding("ok", f"called read_file{amends}, and used its result", 2)


def check_parallel(probe: Probe) -> Finding:
    """Two calls at once; one after the other does as well."""
    question = "What do these two files say? Read both at once.\nread one.txt and two.txt"
    answer, messages = probe.turn(question)
    calls = [len(m["tool_calls"]) for m in messages if m.get("tool_calls")]
    told = answer.lower()
    if not calls:
        return Finding("but", f"answered with text in place of two calls: {answer[:60]!r}", 2)
    if "apple" not in told or "plum" not in told:
        return Finding("but", f"of two files it did not tell both: {answer[:60]!r}", 2)
    return Finding("ok", "two calls at once" if calls[0] > 1 else "one call at a time", 2)


def check_typed(probe: Probe) -> Finding:
    """Numbers, truth values, objects and lists as arguments: the sections use numbers alone."""
    text = "Book a table outside for 4 guests in Ada's name. Her wishes: a quiet place, a window."
    tools = [{"type": "function", "function": BOOK}]
    message, _ = probe.ask(text, probe.s02, tools)
    if not message.get("tool_calls"):
        told = message["content"][:40]
        return Finding("unclear", f"answered with text in place of a call: {told!r}")
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    wrong = [key for key, kind in TYPES.items() if type(arguments.get(key)) is not kind]
    if "guests" in wrong:
        return Finding(
            "but", f"an argument that is a number came as {arguments.get('guests')!r}", 2
        )
    odd = f"; no section has such as came wrong: {', '.join(wrong)}" if wrong else ""
    return Finding("ok", f"a number came as a number{odd}")


def check_summary(probe: Probe) -> Finding:
    """A summary as section 3 asks for it, and the server's count of tokens."""
    talk = "user: my cat is Miso\nassistant: Noted.\nuser: my dog is Rex\nassistant: Noted."
    question = f"{probe.s03.SUMMARIZE}\n\n{talk}"
    message, finish_reason = probe.ask(question, probe.s03, [])
    told = message["content"].lower()
    if finish_reason == "length":
        return Finding("but", "its summary was cut", 3)
    if "miso" not in told or "rex" not in told:
        return Finding("but", f"its summary leaves out what counts: {told[:60]!r}", 3)
    counted = counted_tokens(probe.replies[-1])
    count = f"the server counted {counted:,} tokens" if counted else "the tokens are estimated"
    return Finding("ok", f"names are kept; {count}", 3)


def counted_tokens(chunks: list) -> int:
    """The tokens of the request as the server counted them; 0 if it did not."""
    counts = [getattr(getattr(chunk, "usage", None), "prompt_tokens", None) for chunk in chunks]
    return max([count for count in counts if isinstance(count, int)], default=0)


def check_context(probe: Probe) -> Finding:
    """What the server itself says about the model's window."""
    name, wanted = probe.settings["model"], f"CONTEXT_TOKENS is {probe.window:,}"
    said = next((window_of(model) for model in probe.models if model.get("id") == name), 0)
    if not said:
        return Finding("but", f"{wanted}, and the server does not say: --context finds out", 3)
    if said < probe.window:
        probe.lines["CONTEXT_TOKENS"] = str(said)
        return Finding("but", f"{wanted}, and the server says {said:,}", 3)
    return Finding("ok", f"{wanted}, the server says {said:,}", 3)


def window_of(model: dict) -> int:
    """The window as a server's listing has it, else 0: what a model could have is no window."""
    meta = model.get("meta")
    values = [model.get(key) for key in WINDOW_FIELDS]
    values.append(meta.get("n_ctx") if isinstance(meta, dict) else None)
    return next((value for value in values if type(value) is int and value > 0), 0)


def probe_context(probe: Probe) -> Finding:
    """A conversation as long as section 3 lets it become; its first words are asked for."""
    talk, estimate = long_talk(probe)
    size = f"a conversation of about {estimate:,} tokens"
    try:
        message, _ = probe.ask(talk, probe.s03, [])
    except openai.OpenAIError as error:
        if not probe.s03.is_overflow(error):
            raise
        told = f"{error} {getattr(error, 'body', '')}"
        sizes = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{2,}", told)]
        if sizes := [size for size in sizes if 500 < size < probe.window]:
            probe.lines["CONTEXT_TOKENS"] = str(min(sizes))
        return Finding("copes", f"{size} is refused, and section 3 then makes room", 3)
    counted = counted_tokens(probe.replies[-1])
    if WORD in message["content"].lower():
        return Finding("ok", f"{size} came through whole", 3)
    if not counted or counted > estimate // 2:
        text = "its first words were not told again: dropped, or a weak model"
        return Finding("unclear", f"of {size}, {text}", 3)
    probe.lines["CONTEXT_TOKENS"] = str(counted)
    return Finding("no", f"of {size}, the server silently dropped all but {counted:,}", 3)


def long_talk(probe: Probe) -> tuple[list[dict], int]:
    """Messages that fill what section 3 fills of a window, a code word first; and their size."""
    filler = "The rain came down on the hills, and the river rose a little. "
    part = filler * max(probe.window // 16 * 4 // len(filler), 1)
    talk = [user(f"My code word is {WORD}.")]
    while (size := probe.s03.estimate(talk)) + probe.s03.estimate(part) < probe.window * 0.88:
        talk += [{"role": "assistant", "content": "Noted."}, user(part)]
    return [*talk, {"role": "assistant", "content": "Noted."}, user("What is my code word?")], size


def check_system(probe: Probe) -> Finding:
    """Whether the server takes a system prompt, which section 6 always sends."""
    prompt = "You are Luna, an assistant. When you are asked who you are, say your name."
    messages = [{"role": "system", "content": prompt}, user("Who are you?")]
    message, _ = probe.ask(messages, probe.s01, [])
    if "luna" not in message["content"].lower():
        return Finding("but", f"it ignores its system prompt: {message['content'][:60]!r}", 6)
    return Finding("ok", "it does as its system prompt says", 6)


def check_embeddings(probe: Probe) -> Finding:
    model = os.getenv("EMBEDDING_MODEL", "").strip()
    if not model:
        return Finding("ok", "EMBEDDING_MODEL is not set: section 6 counts letters instead")
    embeddings = probe.client.with_options(timeout=EMBEDDING_SECONDS).embeddings
    try:
        reply = embeddings.create(input=["cat", "dog"], model=model, encoding_format="float")
        sizes = {len(each.embedding) for each in reply.data}
        if len(reply.data) != 2 or len(sizes) != 1:
            raise ValueError(f"{len(reply.data)} vectors came for 2 texts")
        return Finding("ok", f"vectors of {sizes.pop()} numbers", 6)
    except (openai.OpenAIError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        told = probe.s02.explain(error).replace("check MODEL_ID", "check EMBEDDING_MODEL")
        if not is_chance(error):
            probe.lines["EMBEDDING_MODEL"] = ""
        return Finding("but", f"memory search goes by words alone: {told}", 6)


def check_lanes(probe: Probe) -> Finding:
    """Two requests at the same time, as section 10 makes them."""
    outcomes: list[str] = []

    def ask(text: str) -> None:
        agent = replace(probe.agent, messages=[user(text)], tools=[])
        try:
            probe.s01.call_model(agent)
            outcomes.append("")
        except FAILURES as error:
            outcomes.append(short(probe, error))

    questions = ("What is 1 + 1?", "What is 2 + 1?")
    threads = [threading.Thread(target=ask, args=[text], daemon=True) for text in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not any(outcomes):
        return Finding("ok", "both were answered", 10)
    mark, count = ("unclear", "both") if all(outcomes) else ("but", "one")
    return Finding(mark, f"of two requests at once {count} failed: {max(outcomes)}", 10)


def check_wire(probe: Probe) -> list[Finding]:
    """What was odd in the replies, though the sections cope; no request of its own."""
    streamed = probe.settings["stream"]
    calls = {quirk for reply in probe.replies for quirk in quirks(probe.s02, reply, streamed)}
    found = [Finding("copes", "; ".join(sorted(calls)), 2)] if calls else []
    deltas = [delta for chunks in probe.replies for _, delta in deltas_of(chunks)]
    if any("<think>" in str(getattr(delta, "content", "")) for delta in deltas):
        found.append(Finding("but", "its thoughts (<think>) stand in its answers", 1))
    if probe.failures:
        told = ", ".join(sorted(set(probe.failures)))
        count = f"{len(probe.failures)} of {len(probe.replies)} requests failed"
        found.append(Finding("but", f"{count} ({told}); section 9 tries again", 1))
    return found or [Finding("ok", "nothing odd in the replies")]


def deltas_of(chunks: list) -> Iterator[tuple[str | None, object]]:
    """The finish_reason and the delta, or the message, of each choice."""
    for chunk in chunks:
        for choice in getattr(chunk, "choices", None) or []:
            delta = getattr(choice, "delta", None) or getattr(choice, "message", None)
            yield getattr(choice, "finish_reason", None), delta


def quirks(s02: ModuleType, chunks: list, streamed: bool) -> Iterator[str]:
    """What of a reply with tool calls is not as the API documents it."""
    parts: list[dict] = []
    finishes, values, indexes = set(), [], []
    for finish, delta in deltas_of(chunks):
        finishes.add(finish)
        for position, piece in enumerate(getattr(delta, "tool_calls", None) or []):
            s02.add_piece(parts, piece, position)
            values.append(getattr(getattr(piece, "function", None), "arguments", None))
            indexes.append(getattr(piece, "index", None))
    ids = [part["id"] for part in parts if part["id"]]
    whole = [part["text"] for part in parts if part["text"].strip() not in ("", "null")]
    odd = {
        "finish_reason is not tool_calls": finishes != {None} and "tool_calls" not in finishes,
        "calls without an id": len(ids) < len(parts),
        "one id for two calls": len(set(ids)) < len(ids),
        "calls without an index": streamed and None in indexes,
        "one index for two calls": streamed and len(set(indexes)) < len(parts),
        "arguments as an object": any(isinstance(value, dict) for value in values),
        "arguments that are no JSON": not all(map(s02.is_object, whole)),
    }
    return (text for text, is_so in odd.items() if parts and is_so)


# --- verdicts ---

CHECKS = {
    "reachable": (check_reachable, 1),
    "plain answer": (check_plain, 1),
    "long answer": (check_long, 1),
    "streaming": (check_streaming, 1),
    "tool call": (check_tool, 2),
    "parallel calls": (check_parallel, 2),
    "typed arguments": (check_typed, 0),
    "summary": (check_summary, 3),
    "context": (check_context, 3),
    "system prompt": (check_system, 6),
    "embeddings": (check_embeddings, 6),
    "two at once": (check_lanes, 10),
    "the wire": (check_wire, 2),
}
NEEDED_BY = {"reachable": [*CHECKS][1:], "plain answer": [*CHECKS][2:]}
NEEDED_BY["long answer"] = ["streaming"]
NEEDED_BY["tool call"] = ["parallel calls", "typed arguments"]


def run_check(probe: Probe, check: Callable, section: int) -> list[Finding]:
    """What a check finds; where it fails, what the section would show."""
    before, probe.refusal = dict(probe.settings), ""
    try:
        found = check(probe)
    except FAILURES as error:
        probe.reset(before)
        # A bare OpenAIError is the section's own: it cannot use what the server has sent.
        useless = type(error) is openai.OpenAIError and probe.is_lasting(error)
        lasting = useless or not is_chance(error)
        told, probe.refusal = probe.refusal or probe.s02.explain(error), ""
        found = Finding("no" if lasting else "unclear", told, section)
    else:
        if probe.refusal:
            probe.keep_settings()
            found = Finding("no", f"without the MODEL_OPTIONS below: {probe.refusal}", section)
    return found if isinstance(found, list) else [found]


def run_checks(probe: Probe, checks: dict[str, tuple[Callable, int]]) -> list[Finding]:
    """All checks, told of as they end; what makes no sense after an earlier one is skipped."""
    findings: list[Finding] = []
    skipped: dict[str, str] = {}
    for name, (check, section) in checks.items():
        if name in skipped:
            found = [Finding("skipped", f"because of: {skipped[name]}", check=name)]
        else:
            found = [replace(each, check=name) for each in run_check(probe, check, section)]
            if found[0].mark in ("no", "unclear") and not probe.refusal:
                skipped |= dict.fromkeys(NEEDED_BY.get(name, ()), name)
        for finding in found:
            row(probe, f"{name:<17}{finding.mark:<9}", finding.text)
        findings += found
    return findings


def row(probe: Probe, start: str, text: str) -> None:
    """Show a line of a table, in 80 columns."""
    text = " ".join(text.split())
    text = text if len(text) < 400 else f"{text[:400]}..."
    lines = textwrap.wrap(text, 79 - len(start)) or [""]
    probe.s02.show(start + f"\n{'':{len(start)}}".join(lines) + "\n")


def verdict(section: int, findings: list[Finding]) -> str:
    """Whether a section can be run, and what to know about it."""
    for mark in ("no", "unclear"):
        marked = [f for f in findings if f.mark == mark and 0 < f.section <= section]
        if marked:
            first = min(marked, key=lambda f: f.section)
            return (
                f"{mark}: {first.text if first.section == section else f'as s{first.section:02}'}"
            )
    text = "yes"
    for mark, start in (("copes", ", the section copes: "), ("but", ", but ")):
        told = [f.text for f in findings if f.mark == mark and f.section == section]
        text += start * bool(told) + "; ".join(told)
    return text


# --- the command line ---


def parse() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    about = "one long request more: is the window as long as CONTEXT_TOKENS says?"
    parser.add_argument("--context", action="store_true", help=about)
    parser.error = lambda message: sys.exit(fail(f"{message}; the one option is --context"))
    return parser.parse_args()


def fail(message: str) -> int:
    print(f"check_model.py: {message}", file=sys.stderr)
    return 2


def load_probe(folder: Path) -> Probe:
    """The server that .env describes. Exits with a section's own line if it does not."""
    s01, s02, s03 = map(load_section, ("s01", "s02", "s03"))
    s02.NO_MODEL = s02.NO_MODEL.replace("s02", "check_model")
    s02.MAX_ROUNDS = ROUNDS
    agent = s02.load_agent()
    window = os.getenv("CONTEXT_TOKENS") or "128000"
    if not window.isdecimal():
        sys.exit(f"CONTEXT_TOKENS must be a number of tokens, not {window!r}")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    agent = replace(agent, workspace=folder, approval="never", show=lambda text: None)
    return Probe(agent, s01, s02, s03, int(window))


def report(probe: Probe, findings: list[Finding]) -> int:
    """Show the verdicts and the lines for .env. Returns the exit status."""
    verdicts = []
    print()
    for number, path in enumerate(sorted(SECTIONS.glob("s*_*.py")), 1):
        verdicts.append(verdict(number, findings))
        title = path.stem[4:].replace("_", " ")
        row(probe, f"{path.stem[:3]} {title:<17}", verdicts[-1])
    if probe.lines:
        print("\nWhat would help, in .env:")
        for name, value in probe.lines.items():
            probe.s02.show(f"{name}={value}\n")
    print(f"\n{len(probe.replies)} requests, about {probe.tokens:,} tokens sent.")
    return int(not all(told.startswith("yes") for told in verdicts))


def main() -> int:
    sys.stdout.reconfigure(errors="replace")
    given = parse()
    checks = CHECKS | ({"context": (probe_context, 3)} if given.context else {})
    try:
        with tempfile.TemporaryDirectory() as folder:
            probe = load_probe(Path(folder).resolve())
            cost = f", one of {probe.window * 9 // 10:,} tokens" if given.context else ""
            about = f"a dozen small requests{cost}, to {probe.settings['model']} at"
            row(probe, "", f"{about} {probe.client.base_url}")
            print()
            return report(probe, run_checks(probe, checks))
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
