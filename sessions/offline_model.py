# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "croniter>=7.0",
#     "cryptography>=50",
#     "httpx>=0.28",
#     "openai>=3.54,<4",
#     "python-dotenv>=1.2.1",
#     "python-telegram-bot>=22.8",
#     "PyYAML>=6.0.3",
#     "websockets>=17.4",
# ]
# ///
"""The offline model: an OpenAI-compatible server with rules where a language model would be.

    sNN_*.py --POST /v1/chat/completions--> checks -> RULES -> temper -> words or tool calls

    python sessions/offline_model.py s03                         run a section against it
    python sessions/offline_model.py --model offline-small s03   choose its temper
    python sessions/offline_model.py [--port 8123]               serve until Ctrl-C

Tempers: offline works, offline-clumsy errs like a small local model, offline-flaky fails like
a bad network, offline-small has a window of 4,096 tokens. OFFLINE_PACE is the pause between
two words in seconds, OFFLINE_STALL the silence of a stalled answer.
"""

import argparse
import base64
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

ABOUT = "offline model: a stand-in with rules, not a language model, at {}"
WINDOWS = {"offline": 128_000, "offline-clumsy": 128_000, "offline-flaky": 128_000}
WINDOWS["offline-small"] = 4_096
SECTIONS = Path(__file__).resolve().parent / "en"
MAX_BODY = 32 * 2**20

# --- checks: as strict as the strictest real server ---

# A shape is a type, a pattern, [the shape of each item] or {key: shape}.
NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
FUNCTION = {"name": NAME, "description": str, "parameters": dict, "strict": bool}
CALLED = {"name": NAME, "arguments": str}
CALL = {"id": re.compile(".+"), "type": str, "function": CALLED, "extra_content": dict}
TEXT = {"role": str, "content": str}
SPOKEN = {"role": str, "content": str | None, "tool_calls": [CALL], "reasoning_content": str}
RESULT = {"role": str, "content": str, "tool_call_id": str}
MESSAGES = {"system": TEXT, "user": TEXT, "assistant": SPOKEN, "tool": RESULT}
REQUEST = {"model": str, "messages": [dict], "tools": [{"type": str, "function": FUNCTION}]}
REQUEST |= {"stream": bool, "stream_options": {"include_usage": bool}, "stop": str | list}
REQUEST |= {"tool_choice": str | dict, "parallel_tool_calls": bool, "reasoning_effort": str}
REQUEST |= {"max_tokens": int, "max_completion_tokens": int, "temperature": int | float}
EMBEDDING = {"model": str, "input": str | list, "encoding_format": re.compile("float|base64")}
MUST = {"model", "messages", "input", "role", "id", "function", "name", "arguments", "tool_call_id"}
NEEDS = {"stream_options": "stream", "tool_choice": "tools", "parallel_tool_calls": "tools"}
NEXT = {"system": ("system", "user"), "user": ("assistant",), "assistant": ("user",)}


class ApiError(Exception):
    """A refused request; its arguments are the HTTP status, the message and the code."""


def need(condition: object, message: str, status: int = 400, code: object = None) -> None:
    """Refuse the request unless the condition holds."""
    if not condition:
        raise ApiError(status, message, code)


def loads(text: str | bytes) -> object:
    """Strict JSON, without NaN; None for anything else."""
    with suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=int)
    return None


def check(value: object, shape: object, at: str = "The body") -> None:
    """Refuse a value that is not of its shape."""
    if isinstance(shape, dict):
        need(isinstance(value, dict), f"{at} must be a JSON object.")
        wrong = value.keys() - shape.keys() | (shape.keys() & MUST) - value.keys()
        need(not wrong, f"Unrecognized or missing in {at}: {', '.join(wrong)}")
        for key, item in value.items():
            check(item, shape[key], f"{at}.{key}")
    elif isinstance(shape, list):
        need(isinstance(value, list) and value, f"{at} must be a list and not empty.")
        for i, item in enumerate(value):
            check(item, shape[0], f"{at}[{i}]")
    elif isinstance(shape, re.Pattern):
        need(isinstance(value, str) and shape.fullmatch(value), f"{at} must be {shape.pattern}.")
    else:
        need(isinstance(value, shape), f"{at} must not be {type(value).__name__}.")


def check_request(body: object) -> None:
    """Refuse what some server in the field would refuse."""
    check(body, REQUEST)
    models = f"There is no model {body['model']}: choose from {', '.join(WINDOWS)}."
    need(body["model"] in WINDOWS, models, 404, "model_not_found")
    least = min(body.get("max_tokens", 1), body.get("max_completion_tokens", 1))
    need(least > 0, "max_tokens must be at least 1.")
    for key, other in NEEDS.items():
        need(key not in body or body.get(other), f"{key} is only allowed with {other}.")
    functions = [tool["function"] for tool in body.get("tools", [])]
    need(len({f["name"] for f in functions}) == len(functions), "Two tools share a name.")
    for function in functions:
        properties = function.get("parameters", {}).get("properties", {})
        need(isinstance(properties, dict), "The properties of a tool must be a JSON object.")
    check_messages(body["messages"])


def check_messages(messages: list[dict]) -> None:
    """User and assistant alternate, and each tool call is followed by its one result."""
    before, waiting = "system", []
    for i, message in enumerate([*messages, {"role": "assistant", "content": "the answer"}]):
        at, role, calls = f"messages[{i}]", str(message.get("role")), message.get("tool_calls")
        check(message, MESSAGES.get(role, {}), at)
        need(calls or message.get("content") is not None, f"{at}.content must be a string.")
        if role == "tool":
            need(message["tool_call_id"] in waiting, f"{at} answers no tool call before it.")
            waiting.remove(message["tool_call_id"])
        else:
            need(not waiting, f"{at}: no tool message yet for the tool_call_ids {waiting}.")
            need(role in NEXT.get(before, "assistant"), f"{at}: {role} cannot follow {before}.")
            waiting = [call["id"] for call in calls or ()]
        need(len(set(waiting)) == len(waiting), f"{at}: two tool calls share an id.")
        objects = [loads(call["function"]["arguments"]) for call in calls or ()]
        need(all(isinstance(o, dict) for o in objects), f"{at}: arguments must be JSON objects.")
        before = role


# --- rules: what it understands, and what it answers ---

HELP = (
    "I understand: hello, help, read PATH (and PATH), write TEXT to PATH, replace OLD with NEW in "
    "PATH, list files, run COMMAND (and run COMMAND), X, then Y, keep running COMMAND, my ... is "
    "..., what is my ...?, remember TEXT, recall WORDS, what did I say?, what was my first "
    "message?, how many messages?, who are you?, summarize, count to N, repeat TEXT."
)
FACT = r"(?im)\bmy (?>(\w[\w' -]{0,40}?) is )(.{1,80}?)(?=[,;\"。！？]|[.!?](?:\W|$)| and my |$)"
NOTE = r"(?im)^(?:- )?(?:user: )?remember (?:that )?(.{1,80})"
SAID = r"(?im)^(?:- )?user: (?!.{0,99}(?:\bmy |remember |summari[sz]e|so far))(.{1,40})"
HEAD = "The conversation so far:"
AND = r" and (?=(?:run|read|write|replace|list|ls)\b)"
Plan = list[list[dict]]  # rounds of tool calls; those of one round are made at once


def clip(text: str, size: int = 100) -> str:
    return text if len(text) <= size else text[:size] + "..."


def quoted(texts: list[str]) -> str:
    return "; ".join(f'"{clip(text)}"' for text in texts) or "nothing"


class Chat:
    """The conversation of one request, and what the rules make of it."""

    def __init__(self, body: dict) -> None:
        messages = body["messages"]
        tools = body.get("tools", []) if body.get("tool_choice") != "none" else []
        self.tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.one_by_one = body.get("parallel_tool_calls") is False
        self.user = [m["content"].strip() for m in messages if m["role"] == "user"]
        self.system = "\n".join(m["content"] for m in messages if m["role"] == "system")
        heard = [
            m for m in messages if m["role"] in NEXT["system"] or HEAD in str(m.get("content"))
        ]
        self.told = "\n".join(f"{m['role']}: {m['content']}" for m in heard)
        self.facts = {key.lower(): value for key, value in re.findall(FACT, self.told)}
        turn = messages[max(i for i, m in enumerate(messages) if m["role"] == "user") :]
        made = [m["tool_calls"] for m in turn if "tool_calls" in m]
        self.rounds = [[call["function"] for call in calls] for calls in made]
        calls = {call["id"]: call["function"] for calls in made for call in calls}
        results = [m for m in turn if m["role"] == "tool"]
        self.results = [(calls[m["tool_call_id"]], m["content"]) for m in results]

    def call(self, tool: str, *values: str) -> Plan:
        """A plan of one call; the tool's own schema says how its parameters are called."""
        names = self.tools.get(tool, {}).get("parameters", {}).get("properties", {})
        bare = [re.sub(r"""(?s)^(["'`])(.*)\1$""", r"\2", value.strip()) for value in values]
        arguments = json.dumps(dict(zip(names, bare, strict=False)), ensure_ascii=False)
        return [[{"name": tool, "arguments": arguments}]]

    def steps(self, match: re.Match) -> Plan | None:
        """X, then Y; each of them may be: run A and run B."""
        plan = []
        for step in match.string.split(", then "):
            parts = [self.interpret(part) for part in re.split(AND, step)]
            if not all(isinstance(part, list) for part in parts):
                return None
            plan.append([call for part in parts for calls in part for call in calls])
        return plan

    def read(self, match: re.Match) -> Plan:
        paths = re.split(r", and |, | and ", match[1].removesuffix("."))
        return [[self.call("read_file", path)[0][0] for path in paths]]

    def remember(self, match: re.Match) -> Plan | str:
        text = f"I will keep that for this conversation: {match[1]}"
        return self.call("memory_write", match[1]) if "memory_write" in self.tools else text

    def recall(self, match: re.Match) -> Plan | str:
        query = match[1].strip(" ?.!")
        words = [word for word in query.lower().split() if len(word) > 2 or not word.isascii()]
        told = [text for text in self.user[:-1] if any(word in text.lower() for word in words)]
        text = f"You told me: {quoted(told[-5:])}."
        return self.call("memory_search", query) if "memory_search" in self.tools else text

    def summarize(self, match: re.Match) -> str:
        """At most 36 short lines, which a later summary can read again."""
        notes, said = (list(dict.fromkeys(re.findall(kind, self.told))) for kind in (NOTE, SAID))
        lines = [f"- my {key} is {value}." for key, value in self.facts.items()][-20:]
        lines += [f"- remember {note}" for note in notes[-10:]]
        lines += [f"- user: {text}" for text in said[-6:]]
        return "\n".join([HEAD, *lines])[:1500]

    def note_facts(self, match: re.Match) -> str | None:
        found = [f"your {key.lower()} is {value}" for key, value in re.findall(FACT, match[0])]
        return f"Noted: {'; '.join(found)}." if found else None

    def tell_fact(self, match: re.Match) -> str:
        key = match[1].lower().strip()
        value = self.facts.get(key)
        return f"Your {key} is {value}." if value else f"You have not told me your {key}."

    def who(self, match: re.Match) -> str:
        name = re.search(r"(?i:\byou are|\byour name is) ([^\Wa-z][\w-]*)", self.system)
        start = f' My instructions begin: "{clip(self.system, 200)}"' if self.system else ""
        return f"I am {name[1] if name else 'the offline stand-in'}.{start}"

    def interpret(self, text: str) -> Plan | str | None:
        """What the first rule that fits makes of a text, or of the first line of a long one."""
        text = re.sub(r"^\[[^\]\n]*\]\s*", "", text.strip())
        text = text if len(text) < 20_000 else text.partition("\n")[0][:200]
        for pattern, rule in RULES:
            match = re.search(pattern, text, re.IGNORECASE | re.DOTALL)
            if match and (outcome := rule(self, match)) is not None:
                return outcome
        return None

    def respond(self) -> tuple[str, list[dict]]:
        """The final answer, or else the next tool calls."""
        text = self.user[-1]
        outcome = self.interpret(text) or self.interpret(text.rpartition("\n")[2])
        plan = outcome if isinstance(outcome, list) else []
        if self.one_by_one:
            plan = [[call] for calls in plan for call in calls]
        if calls := self.pending(plan):
            missing = [call["name"] for call in calls if call["name"] not in self.tools]
            return (f"I have no tool named {missing[0]} here.", []) if missing else ("", calls)
        planned = [result for result in self.results if any(result[0] in calls for calls in plan)]
        if told := planned or self.results:
            return "\n\n".join(f"{call['name']} says: {clip(said, 600)}" for call, said in told), []
        return outcome or f"You said: {quoted([text])} I am the offline stand-in: try help.", []

    def pending(self, plan: Plan) -> list[dict]:
        """The calls of the first round that is not done; one that went wrong is made twice."""
        rounds = iter(self.rounds)
        for calls in plan:
            made = next(rounds, [])
            missing = [call for call in calls if call not in made]
            if missing and not (made and next(rounds, [])):
                return missing
        return []


RULES = (
    (rf"^.+?(?:, then |{AND})", Chat.steps),
    (r"^keep running (.+)", lambda chat, m: chat.call("bash", m[1]) * 100),
    (r"^read (?:the )?(?:file )?(.+)", Chat.read),
    (r"^write (.+) to (\S+)$", lambda chat, m: chat.call("write_file", m[2], m[1])),
    (r"^replace (?>(.+?) with )(.*) in (.+)", lambda c, m: c.call("edit_file", *m.group(3, 1, 2))),
    (r"^(?:list|ls)\b", lambda chat, m: chat.call("bash", "dir" if os.name == "nt" else "ls")),
    (r"^run (.+)", lambda chat, m: chat.call("bash", m[1])),
    (r"^[^\n]*\bsummari[sz]e\b", Chat.summarize),
    (r"^remember (?:that )?(.+)", Chat.remember),
    (r"^recall (.+)", Chat.recall),
    (r"^what did I say", lambda chat, m: f"You said: {quoted(chat.user[-11:-1])}"),
    (r"^what \w+ my first message", lambda c, m: f"Your first message was: {quoted(c.user[:1])}"),
    (r"^what \w+ my last message", lambda c, m: f"Your last message was: {quoted(c.user[-2:-1])}"),
    (r"^what(?:'s| is| was) my ([\w' -]+)", Chat.tell_fact),
    (r"^how many messages", lambda chat, m: f"I see {len(chat.user)} messages from you."),
    (r"^who are you", Chat.who),
    (r"^[^\n]+$", Chat.note_facts),
    (r"^count to (\d{1,4})", lambda chat, m: " ".join(map(str, range(1, int(m[1]) + 1)))),
    (r"^(?:repeat|say)[: ]+(.+)", lambda chat, m: m[1]),
    (r"^(?:hello|hi|hey)\b", lambda chat, m: f"Hello! I am the offline stand-in. {HELP}"),
    (r"^help\b", lambda chat, m: HELP),
)

# --- tempers: from what the rules say to a completion ---

MISTAKES = {"calls": ("json", "stop", "ids", "none"), "words": ("none", "none", "length")}
TROUBLES = ("none", "429", "none", "500", "stall", "drop", "error", "cut")


def tokens(text: str) -> int:
    """About four letters to a token, and one token to a Chinese character."""
    return (3 * len(text.encode("utf-8", "replace")) - len(text) + 7) // 8


def complete(body: dict, server: ThreadingHTTPServer) -> tuple[dict, dict]:
    """The model's choice, as the API calls an answer, and the usage. Raises ApiError."""
    asked = json.dumps([body["messages"], body.get("tools")], ensure_ascii=False)
    prompt, window = tokens(asked), WINDOWS[body["model"]]
    error = f"This model's maximum context length is {window} tokens, the messages have {prompt}."
    need(prompt < window, error, 400, "context_length_exceeded")
    chat, stamp = Chat(body), f"call_{zlib.crc32(ascii(asked).encode()):08x}"
    text, made = chat.respond()
    calls = [{"id": f"{stamp}_{i}", "type": "function", "function": f} for i, f in enumerate(made)]
    finish = "tool_calls" if calls else "stop"
    if body["model"] == "offline-clumsy":
        text, calls, finish = spoil(text, calls, finish, chat, server)
    limits = [body[key] for key in ("max_tokens", "max_completion_tokens") if key in body]
    limit = min([window - prompt, *limits])
    if tokens(json.dumps(calls) if calls else text) > limit:
        text, calls, finish = fit(text, limit), [], "length"
    message = {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {})
    used = tokens(json.dumps(calls) if calls else text)
    usage = {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used}
    return {"index": 0, "message": message, "finish_reason": finish}, usage


def spoil(text: str, calls: list, finish: str, chat: Chat, server: ThreadingHTTPServer) -> tuple:
    """The next mistake of a small local model, which is more careful after an error."""
    careful = calls and any(text.lower().startswith("error") for _, text in chat.results)
    mistake = "none" if careful else next(server.mistakes["calls" if calls else "words"])
    if mistake == "json":
        function = calls[0]["function"]
        calls[0]["function"] = function | {"arguments": function["arguments"][:-1]}
    elif mistake == "ids":
        calls = [call | {"id": calls[0]["id"] if calls[1:] else ""} for call in calls]
    elif mistake == "length":
        text = text[: len(text) // 2]
    return text, calls, mistake if mistake in ("stop", "length") else finish


def fit(text: str, limit: int) -> str:
    """As much of a text as has so many tokens."""
    while tokens(text) > limit:
        text = text[: len(text) * limit // tokens(text)]
    return text


def deltas(message: dict) -> list[dict]:
    """The message in the pieces in which a real server streams it."""
    pieces = [{"content": piece} for piece in re.findall(r"\s*\S{1,12}|\s+", message["content"])]
    for i, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        first = call | {"index": i, "function": function | {"arguments": ""}}
        rest = {"index": i, "function": {"arguments": function["arguments"]}}
        pieces += [{"tool_calls": [first]}, {"tool_calls": [rest]}]
    return [{"role": "assistant", "content": ""}, *pieces]


def embed(text: str) -> list[float]:
    """Hashed pieces of two and three letters, as 256 numbers of length 1."""
    vector, padded = [1e-9] * 256, f" {text.lower()} "
    for i in range(2 * len(padded) - 3):
        piece = zlib.crc32(ascii(padded[i // 2 : i // 2 + 2 + i % 2]).encode())
        vector[piece % 256] += 1 if piece & 256 else -1
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


# --- the server ---


def serve(port: int = 0, pace: float = 0.01) -> ThreadingHTTPServer:
    """A server that already answers, at `.url`. Raises OSError for a port that is taken."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.socket.listen(128)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.pace = float(os.environ.get("OFFLINE_PACE") or pace)
    server.stall = float(os.environ.get("OFFLINE_STALL") or 600)
    if not 0 <= max(server.pace, server.stall) < 1e6:
        raise ValueError("not a time that one can wait")
    server.mistakes = {key: itertools.cycle(kinds) for key, kinds in MISTAKES.items()}
    server.troubles = itertools.cycle(TROUBLES)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """One connection: requests in, JSON or a stream of events out."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away
            super().handle()

    def log_message(self, *args: object) -> None:
        """Say nothing: the terminal belongs to the section."""

    def send_error(self, code: int, message: str | None = None, explain: object = None) -> None:
        kind = {429: "requests", 500: "server_error"}.get(code, "invalid_request_error")
        error = {"message": message, "type": kind, "param": None, "code": explain}
        self.send_json({"error": error}, code)

    def send_json(self, value: dict, status: int = 200, broken: bool = False) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)
        self.close_connection |= broken

    def answer(self) -> None:
        routes = {"GET /": self.about, "GET /v1/models": self.models}
        routes |= {"POST /v1/chat/completions": self.chat, "POST /v1/embeddings": self.embeddings}
        route = f"{self.command} {self.path}"
        try:
            body = loads(self.read_body())
            need(route in routes, f"Unknown: {route}. Known: {', '.join(routes)}.", 404)
            allowed = route == "GET /" or self.headers["Authorization"] == "Bearer offline"
            need(allowed, "The key of the offline model is: offline", 401, "invalid_api_key")
            routes[route](body)
        except ApiError as error:
            self.send_error(*error.args)
        except RecursionError:
            self.send_error(400, "The JSON is nested too deeply.")

    do_GET = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "" if self.command == "POST" else "0")
        need(re.fullmatch("[0-9]{1,12}", length), "Send a Content-Length and a body.", 411)
        left = int(length)
        if left <= MAX_BODY:
            return self.rfile.read(left)
        while left > 0 and (part := self.rfile.read(min(left, MAX_BODY))):
            left -= len(part)
        raise ApiError(413, f"The request body is over {MAX_BODY} bytes.")

    def about(self, body: object) -> None:
        self.send_json({"about": ABOUT.format(self.server.url)})

    def models(self, body: object) -> None:
        models = [{"id": name, "object": "model"} for name in (*WINDOWS, "offline-embed")]
        self.send_json({"object": "list", "data": models})

    def embeddings(self, body: object) -> None:
        check(body, EMBEDDING)
        need(body["model"] == "offline-embed", "Choose offline-embed.", 404, "model_not_found")
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        need(texts and all(isinstance(t, str) and t for t in texts), "input must hold texts.")
        vectors = [embed(text) for text in texts]
        if body.get("encoding_format") == "base64":
            vectors = [base64.b64encode(struct.pack("<256f", *v)).decode() for v in vectors]
        data = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(tokens, texts)))
        self.send_json({"object": "list", "data": data, "model": body["model"], "usage": usage})

    def chat(self, body: object) -> None:
        check_request(body)
        choice, usage = complete(body, self.server)
        trouble = next(self.server.troubles) if body["model"] == "offline-flaky" else "none"
        need(trouble != "429", "Rate limit reached: try again in 1s.", 429, "rate_limit_exceeded")
        need(trouble != "500", "The server had an error while processing your request.", 500)
        need(trouble != "error", "Provider returned error", 200, 502)
        head = {"id": f"chatcmpl-{time.time_ns():x}", "object": "chat.completion"}
        head |= {"created": int(time.time()), "model": body["model"]}
        if body.get("stream"):
            end = {"delta": {}, "finish_reason": choice["finish_reason"]}
            parts = [*({"delta": delta} for delta in deltas(choice["message"])), end]
            events = [{"choices": [{"index": 0, "finish_reason": None} | part]} for part in parts]
            if body.get("stream_options", {}).get("include_usage"):
                events.append({"choices": [], "usage": usage})
            head["object"] = "chat.completion.chunk"
            self.stream([json.dumps(head | event) for event in events] + ["[DONE]"], trouble)
        else:
            time.sleep(self.server.stall if trouble == "stall" else 0)
            whole = head | {"choices": [choice], "usage": usage}
            self.send_json(whole, broken=trouble in ("drop", "cut"))

    def stream(self, events: list[str], trouble: str) -> None:
        """Send the events; `drop` breaks off in mid-stream, `cut` ends without a finish_reason."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, event in enumerate(events[:2] if trouble in ("drop", "cut") else events):
            time.sleep(self.server.stall if i == 2 and trouble == "stall" else self.server.pace)
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.write(b"" if trouble == "drop" else b"0\r\n\r\n")
        self.close_connection |= trouble == "drop"


# --- the command line ---


def fail(message: str, status: int = 2) -> None:
    print(f"offline_model.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse() -> argparse.Namespace:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.error = lambda message: fail(f"{message}; options: --model NAME, --port 0 to 65535")
    parser.add_argument("--model", choices=WINDOWS, default="offline")
    parser.add_argument("--port", type=int)
    parser.add_argument("section", nargs="?", help="s03, check_model, or a script of yours")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not 0 <= (given.port or 0) <= 65535:
        parser.error(f"--port {given.port}")
    return given


def run_section(script: Path, arguments: list[str], model: str, url: str) -> int:
    """Run a section at this terminal and return its exit status; Ctrl-C is the child's."""
    blank = ["MODEL_OPTIONS", "EMBEDDING_MODEL", "FALLBACK_MODELS"]
    blank += [f"OPENAI_{part}_{n}" for part in ("API_KEY", "BASE_URL") for n in range(2, 10)]
    env = dict.fromkeys(blank, "") | {"CONTEXT_TOKENS": str(WINDOWS[model])} | os.environ
    env |= {"OPENAI_API_KEY": "offline", "OPENAI_BASE_URL": url, "MODEL_ID": model}
    direct = f"127.0.0.1,{env.get('no_proxy', env.get('NO_PROXY', ''))}"
    env |= {"NO_PROXY": direct, "no_proxy": direct}
    for name in ("ALL_PROXY", "all_proxy"):  # the SDK wants a package for these, even unused
        if env.get(name, "").startswith("socks"):
            del env[name]
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen([sys.executable, str(script), *arguments], env=env)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    status = child.wait()
    return status if status >= 0 else 128 - status


def main() -> int:
    given = parse()
    scripts = {path.name.partition("_")[0]: path for path in sorted(SECTIONS.glob("s*_*.py"))}
    scripts["check_model"] = SECTIONS.parent / "check_model.py"
    if given.section and given.section.endswith(".py"):
        scripts[given.section] = Path(given.section)
    if given.section and not (given.section in scripts and scripts[given.section].is_file()):
        fail(f"unknown section {given.section}: choose from {', '.join(scripts)}, or name a script")
    port = given.port if given.port is not None else 0 if given.section else 8123
    try:
        server = serve(port)
    except OSError as error:
        fail(f"port {port}: {error.strerror}; choose another with --port N", 1)
    except ValueError:
        fail("OFFLINE_PACE and OFFLINE_STALL must be numbers of seconds")
    print(ABOUT.format(server.url), flush=True)
    if given.section:
        return run_section(scripts[given.section], given.arguments, given.model, server.url)
    print("Put these three lines into .env; Ctrl-C ends the server.\nOPENAI_API_KEY=offline")
    print(f"OPENAI_BASE_URL={server.url}\nMODEL_ID={given.model}", flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
