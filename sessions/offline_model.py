# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "croniter>=7.0",
#     "cryptography>=50",
#     "httpx>=0.28",
#     "openai>=3.54,<4",
#     "pydantic>=2.12",
#     "python-dotenv>=1.2.1",
#     "python-telegram-bot>=22.8",
#     "PyYAML>=6.0.3",
#     "websockets>=17.4",
# ]
# ///
"""The offline model: an OpenAI-compatible server that answers by rules.

    section --> POST /v1/chat/completions --> checks --> RULES --> temper --> answer

    python sessions/offline_model.py s03                         run a section
    python sessions/offline_model.py --next s02                  from sessions/next
    python sessions/offline_model.py --model offline-small s03   choose its temper
    python sessions/offline_model.py [--port 8123]               serve until Ctrl-C

Tempers: offline works, offline-clumsy errs like a small local model, offline-flaky
fails like a bad network, offline-small has a window of 4,096 tokens. OFFLINE_PACE is
the pause between two words in seconds, OFFLINE_STALL the silence of a stalled answer.
"""

import argparse
import base64
import itertools
import json
import operator
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Annotated
from typing import Any
from typing import Literal
from typing import NoReturn

from pydantic import AfterValidator
from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import Field
from pydantic import ValidationError
from pydantic_core import from_json

ABOUT = "offline model: a stand-in with rules, not a language model, at {}"
WINDOWS = {  # the models, and how many tokens each can take
    "offline": 128_000,
    "offline-clumsy": 128_000,
    "offline-flaky": 128_000,
    "offline-small": 4_096,
}
EMBEDDING_MODEL = "offline-embed"
DEFAULT_PORT = 8123
SESSIONS = Path(__file__).resolve().parent
MAX_BODY = 32 * 2**20  # bytes

# --- checks: as strict as the strictest real server ---


class ApiError(Exception):
    """A request that is refused: the HTTP status, and what the error body says."""

    def __init__(
        self, status: int, message: str, code: str | int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def check_json_object(text: str) -> str:
    """The text. Raises ValueError unless it is a JSON object."""
    if not isinstance(from_json(text, allow_inf_nan=False), dict):
        raise ValueError("this is JSON, but not an object")
    return text


JsonObject = Annotated[str, AfterValidator(check_json_object)]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
NonEmpty = Annotated[str, Field(min_length=1)]
AtLeastOne = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A JSON object with these fields, no others, and exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class FunctionCall(Strict):
    name: ToolName
    arguments: JsonObject


class ToolCall(Strict):
    id: NonEmpty
    type: Literal["function"]
    function: FunctionCall
    extra_content: dict = {}


class SystemMessage(Strict):
    role: Literal["system"]
    content: str


class UserMessage(Strict):
    role: Literal["user"]
    content: str


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | None = None
    tool_calls: list[ToolCall] = Field(default=[], min_length=1)
    reasoning_content: str = ""


class ToolMessage(Strict):
    role: Literal["tool"]
    content: str
    tool_call_id: str


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


class Parameters(BaseModel):
    """The JSON Schema of a tool's arguments. Only `properties` matters here."""

    model_config = ConfigDict(extra="allow", strict=True)
    properties: dict[str, Any] = {}


class Function(Strict):
    name: ToolName
    description: str = ""
    parameters: Parameters = Parameters()
    strict: bool = False


class Tool(Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(Strict):
    include_usage: bool = False


class ChatRequest(Strict):
    model: str
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default=[], min_length=1)
    tool_choice: str | dict = "auto"
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    temperature: float = 1.0
    stop: str | list[str] = []
    reasoning_effort: str = ""


class EmbeddingRequest(Strict):
    model: str
    input: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"


def parse(shape: type[BaseModel], body: object) -> BaseModel:
    """A request of this shape. Raises ApiError that says what is wrong and where."""
    try:
        return shape.model_validate(body)
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"]) or "the body"
        raise ApiError(400, f"{place}: {found['msg']}.") from None


def check_chat_request(body: object) -> ChatRequest:
    """A request that every server would accept. Raises ApiError for any other."""
    request = parse(ChatRequest, body)
    if request.model not in WINDOWS:
        known = ", ".join(WINDOWS)
        reason = f"There is no model {request.model}: choose from {known}."
        raise ApiError(404, reason, "model_not_found")
    given = request.model_fields_set
    if "stream_options" in given and not request.stream:
        raise ApiError(400, "stream_options is only allowed with stream.")
    for field in ("tool_choice", "parallel_tool_calls"):
        if field in given and not request.tools:
            raise ApiError(400, f"{field} is only allowed with tools.")
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "Two tools share a name.")
    check_order(request.messages)
    return request


MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("system", "user"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_order(messages: list[Message]) -> None:
    """Raise ApiError unless the conversation has the order that all servers accept.

    User and assistant alternate, and each tool call is followed by its one result.
    """
    previous = "start"
    waiting: list[str] = []  # ids of the tool calls that have no result yet
    for position, message in enumerate(messages):
        place = f"messages.{position}"
        if message.role not in MAY_FOLLOW[previous]:
            raise ApiError(400, f"{place}: {message.role} cannot follow {previous}.")
        if message.role == "tool":
            take_result(message, waiting, place)
        else:
            check_all_answered(waiting, place)
        if message.role == "assistant":
            waiting = check_assistant(message, place)
        previous = message.role
    check_all_answered(waiting, "The end of messages")
    if "assistant" not in MAY_FOLLOW[previous]:
        reason = "The last message must be the user's or a tool's."
        raise ApiError(400, f"{reason} It is of role {previous}.")


def take_result(message: ToolMessage, waiting: list[str], place: str) -> None:
    """Strike a tool call off the list. Raises ApiError if it is not on it."""
    if message.tool_call_id not in waiting:
        call_id = repr(message.tool_call_id)
        raise ApiError(400, f"{place}: {call_id} answers no tool call before it.")
    waiting.remove(message.tool_call_id)


def check_all_answered(waiting: list[str], place: str) -> None:
    """Raise ApiError if a tool call has no result yet."""
    if waiting:
        raise ApiError(
            400, f"{place}: no tool message for the tool_call_ids {waiting}."
        )


def check_assistant(message: AssistantMessage, place: str) -> list[str]:
    """The ids of the message's tool calls. Raises ApiError if they are not unique."""
    if message.content is None and not message.tool_calls:
        raise ApiError(400, f"{place}: content must be a string if there are no calls.")
    call_ids = [call.id for call in message.tool_calls]
    if len(set(call_ids)) < len(call_ids):
        raise ApiError(400, f"{place}: two tool calls share an id.")
    return call_ids


# --- the conversation: what the rules can look at ---

Call = dict[str, str]  # {"name": ..., "arguments": ...}, as the API has it
Plan = list[list[Call]]  # rounds of tool calls; those of one round are made at once

SUMMARY_TITLE = "The conversation so far:"
# "my cat is Miso" up to the end of the clause. The (?>...) keeps the search linear.
FACT = re.compile(
    r"\bmy (?>(\w[\w' -]{0,40}?) is )(.{1,80}?)"
    r"(?=[,;\"。！？]|[.!?](?:\W|$)| and my |$)",
    re.IGNORECASE | re.MULTILINE,
)
# "I'm Ann.", "Call me Ann!": one word with a capital, at the end of the line
NAME_IS = re.compile(
    r"\b(?:my name's|call me|i am|i'm) (?=(?-i:[A-Z])\w*\W*$)",
    re.IGNORECASE | re.MULTILINE,
)
QUOTES = "\"'`"


class Conversation:
    """What a request says, sorted for the rules."""

    def __init__(self, request: ChatRequest) -> None:
        self.tools: dict[str, list[str]] = {}  # the parameters of each tool
        if request.tool_choice != "none":
            for tool in request.tools:
                names = list(tool.function.parameters.properties)
                self.tools[tool.function.name] = names
        self.user_texts: list[str] = []
        self.system_texts: list[str] = []
        for message in request.messages:
            if message.role == "user":
                self.user_texts.append(message.content.strip())
            if message.role == "system":
                self.system_texts.append(message.content)
        self.transcript = self.read_transcript(request.messages)
        self.facts = dict(find_facts(self.transcript))
        self.rounds: Plan = []  # the calls of this turn
        self.results: list[tuple[Call, str]] = []  # and what came of them
        self.read_turn(request.messages)

    def read_transcript(self, messages: list[Message]) -> str:
        """What system, user and earlier summaries have told the model."""
        lines = []
        for message in messages:
            content = message.content or ""
            if message.role in ("system", "user") or SUMMARY_TITLE in content:
                lines.append(f"{message.role}: {content}")
        return "\n".join(lines)

    def read_turn(self, messages: list[Message]) -> None:
        """Sort the tool calls and results since the last user message."""
        call_of_id: dict[str, Call] = {}
        for message in messages:
            if message.role == "user":
                self.rounds.clear()
                self.results.clear()
            elif message.role == "tool":
                result = (call_of_id[message.tool_call_id], message.content)
                self.results.append(result)
            elif message.role == "assistant" and message.tool_calls:
                calls = []
                for call in message.tool_calls:
                    call_of_id[call.id] = call.function.model_dump()
                    calls.append(call_of_id[call.id])
                self.rounds.append(calls)


def find_facts(text: str) -> list[tuple[str, str]]:
    """All "my X is Y" in a text, as pairs of X and Y."""
    text = NAME_IS.sub("my name is ", text)
    return [(key.lower(), value) for key, value in FACT.findall(text)]


def clip(text: str, size: int = 100) -> str:
    """The beginning of a text."""
    return text if len(text) <= size else text[:size] + "..."


def quote(texts: list[str]) -> str:
    """Texts in quotation marks, each of them cut short."""
    if not texts:
        return "nothing"
    return "; ".join(f'"{clip(text)}"' for text in texts)


def unquote(text: str) -> str:
    """A text without the quotation marks around it."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in QUOTES:
        return text[1:-1]
    return text


# --- handlers: one for each rule ---

# A handler returns an answer, a plan of tool calls, or None: try the next rule.
Outcome = str | Plan | None
Handler = Callable[[Conversation, re.Match], Outcome]

HELP = """I understand these words, and some like them:
- hello, who are you?, what can you do?, what time is it?, tell me a joke, thanks
- my name is Ann, what is my name?, how many messages?, what did I say first?
- count to 30, repeat hello, what is 6 * 7?, summarize
With the tools that section 2 brings:
- what is in SOUL.md?, read SOUL.md and USER.md, list the files, run date
- create notes.txt with buy milk, replace milk with tea in notes.txt
- run date, then read notes.txt; run date and run ls; keep running date
With the memory that section 6 brings, and without it for one conversation:
- remember that I like tea, what do you remember about tea?"""
JOKE = "Why do programmers mix up Halloween and Christmas? Because oct 31 is dec 25."
ABILITIES = {
    "read_file": "open files",
    "write_file": "write files",
    "edit_file": "change files",
    "bash": "run commands",
}
AND = r" and (?=(?:run|read|write|replace|list|ls)\b)"
FILE_NAME = re.compile(r"[\w.~/-]*\.[a-z]\w*", re.IGNORECASE)
NOTE = re.compile(r"^(?:- )?(?:user: )?remember (?:that )?(.{1,80})", re.I | re.M)
SAID = re.compile(r"^(?:- )?user: (.{1,40})", re.I | re.M)
NOT_WORTH_KEEPING = re.compile(r"\bmy |remember |summari[sz]e|so far", re.I)
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "x": operator.mul,
    "/": operator.truediv,
}


def plan_call(chat: Conversation, tool: str, *values: str) -> Plan:
    """A plan of one call. The tool's schema says how its parameters are called."""
    arguments = {}
    for name, value in zip(chat.tools.get(tool, []), values, strict=False):
        arguments[name] = unquote(value)
    text = json.dumps(arguments, ensure_ascii=False)
    return [[{"name": tool, "arguments": text}]]


def several_steps(chat: Conversation, match: re.Match) -> Outcome:
    """X, then Y. Each of them may be: run A and run B."""
    plan = []
    for step in match.string.split(", then "):
        calls: list[Call] = []
        for part in re.split(AND, step):
            outcome = apply_rules(chat, part)
            if not isinstance(outcome, list):
                return None
            for round_of_calls in outcome:
                calls.extend(round_of_calls)
        plan.append(calls)
    return plan


def run_again_and_again(chat: Conversation, match: re.Match) -> Outcome:
    return plan_call(chat, "bash", match[1]) * 100


def run_command(chat: Conversation, match: re.Match) -> Outcome:
    return plan_call(chat, "bash", match[1])


def list_files(chat: Conversation, match: re.Match) -> Outcome:
    if "list_files" in chat.tools:
        return plan_call(chat, "list_files")
    command = "dir" if os.name == "nt" else "ls"
    return plan_call(chat, "bash", command)


def read_files(chat: Conversation, match: re.Match) -> Outcome:
    """All files in one round."""
    wanted = match[1].rstrip(".?! ").removesuffix(" please")
    paths = re.split(r", and |, | and ", wanted)
    return [read_file_calls(chat, paths)]


def read_named_files(chat: Conversation, match: re.Match) -> Outcome:
    """What is in SOUL.md? The words that look like names of files are read."""
    paths = []
    for word in match[0].split():
        path = word.lstrip(QUOTES + "(").rstrip(QUOTES + "?!.,:;)")
        if FILE_NAME.fullmatch(path):
            paths.append(path)
    return [read_file_calls(chat, paths)] if paths else None


def read_file_calls(chat: Conversation, paths: list[str]) -> list[Call]:
    """A call of read_file for each path."""
    return [plan_call(chat, "read_file", path)[0][0] for path in paths]


def write_text_to_file(chat: Conversation, match: re.Match) -> Outcome:
    return plan_call(chat, "write_file", match[2], match[1])


def create_file(chat: Conversation, match: re.Match) -> Outcome:
    return plan_call(chat, "write_file", match[1].strip(".,:"), match[2] or "")


def replace_in_file(chat: Conversation, match: re.Match) -> Outcome:
    old, new, path = match.groups()
    return plan_call(chat, "edit_file", path, old, new)


def remember(chat: Conversation, match: re.Match) -> Outcome:
    if "memory_write" in chat.tools:
        return plan_call(chat, "memory_write", match[1])
    return f"I will keep that for this conversation: {match[1]}"


def recall(chat: Conversation, match: re.Match) -> Outcome:
    """Search the memory; without one, search what the person has said."""
    query = match[1].strip(" ?.!")
    if "memory_search" in chat.tools:
        return plan_call(chat, "memory_search", query)
    words = []
    for word in query.lower().split():
        if len(word) > 2 or not word.isascii():
            words.append(word)
    found = []
    for text in chat.user_texts[:-1]:
        if any(word in text.lower() for word in words):
            found.append(text)
    return f"You told me: {quote(found[-5:])}."


def tell_all_facts(chat: Conversation, match: re.Match) -> Outcome:
    if not chat.facts:
        return "You have told me nothing yet. Try: my name is Ann."
    known = [f"your {key} is {value}" for key, value in chat.facts.items()]
    return f"You told me: {'; '.join(known[-10:])}."


def tell_fact(chat: Conversation, match: re.Match) -> Outcome:
    """What is my cat? What is my cat called? What is my cat's name?"""
    key = match[1].lower().strip().removesuffix(" called").removesuffix("'s name")
    if key in chat.facts:
        return f"Your {key} is {chat.facts[key]}."
    return f"You have not told me your {key}."


def tell_name(chat: Conversation, match: re.Match) -> Outcome:
    if "name" not in chat.facts:
        return "You have not told me your name."
    return f"Your name is {chat.facts['name']}."


def note_facts(chat: Conversation, match: re.Match) -> Outcome:
    facts = find_facts(match[0])
    if not facts:
        return None
    noted = [f"your {key} is {value}" for key, value in facts]
    return f"Noted: {'; '.join(noted)}."


def first_message(chat: Conversation, match: re.Match) -> Outcome:
    return f"Your first message was: {quote(chat.user_texts[:1])}"


def last_message(chat: Conversation, match: re.Match) -> Outcome:
    return f"Your last message was: {quote(chat.user_texts[-2:-1])}"


def what_was_said(chat: Conversation, match: re.Match) -> Outcome:
    return f"You said: {quote(chat.user_texts[-11:-1])}"


def count_messages(chat: Conversation, match: re.Match) -> Outcome:
    count = len(chat.user_texts)
    if count == 1:
        return "I see 1 message from you."
    return f"I see {count} messages from you."


def summarize(chat: Conversation, match: re.Match) -> Outcome:
    """At most 36 short lines, which a later summary can read again."""
    facts = [f"- my {key} is {value}." for key, value in chat.facts.items()]
    notes = [f"- remember {note}" for note in NOTE.findall(chat.transcript)]
    said = []
    for text in SAID.findall(chat.transcript):
        if not NOT_WORTH_KEEPING.search(text):
            said.append(f"- user: {text}")
    lines = [SUMMARY_TITLE, *latest(facts, 20), *latest(notes, 10), *latest(said, 6)]
    return "\n".join(lines)[:1500]


def latest(lines: list[str], count: int) -> list[str]:
    """The last lines, without repetitions."""
    return list(dict.fromkeys(lines))[-count:]


def who_are_you(chat: Conversation, match: re.Match) -> Outcome:
    """By the name in the system prompt, if there is one."""
    instructions = "\n".join(chat.system_texts)
    if not instructions:
        return "I am the offline stand-in: a few rules where a language model would be."
    name = re.search(r"(?i:\byou are|\byour name is) ([^\Wa-z][\w-]*)", instructions)
    who = name[1] if name else "the offline stand-in"
    return f'I am {who}. My instructions begin: "{clip(instructions, 200)}"'


def hello(chat: Conversation, match: re.Match) -> Outcome:
    return (
        "Hello! I am the offline stand-in: I follow rules, I am no language model."
        f" Try {examples(chat)}. The word help lists what I understand."
    )


def what_can_you_do(chat: Conversation, match: re.Match) -> Outcome:
    text = f"I follow rules, and show what the program can do. Try {examples(chat)}."
    if not chat.tools:
        text += " Files and commands come with section 2."
    return f"{text} The word help lists what I understand."


def examples(chat: Conversation) -> str:
    """A few things to try, which fit the tools that the request offers."""
    if "memory_write" in chat.tools:
        return '"what is in SOUL.md?", "remember that I like tea" or "who are you?"'
    if chat.tools:
        return '"what is in SOUL.md?", "list the files" or "count to 30"'
    return '"my name is Ann", then "what is my name?", or "count to 30"'


def which_tools(chat: Conversation, match: re.Match) -> Outcome:
    if not chat.tools:
        return "I have no tools yet: the first four come with section 2."
    return f"The program offers me these tools: {', '.join(chat.tools)}."


def tell_time(chat: Conversation, match: re.Match) -> Outcome:
    now = time.strftime("%H:%M on %A, %d %B %Y")
    return f"It is {now}, by the clock of this machine. A real model has no clock."


def calculate(chat: Conversation, match: re.Match) -> Outcome:
    left, sign, right = match.groups()
    if sign == "/" and int(right) == 0:
        return "Nobody can divide by 0."
    value = OPERATORS[sign](int(left), int(right))
    if isinstance(value, float):
        value = f"{value:.6g}"
    return f"{left} {sign} {right} is {value}."


def count(chat: Conversation, match: re.Match) -> Outcome:
    numbers = range(1, int(match[1]) + 1)
    return " ".join(str(number) for number in numbers)


def repeat(chat: Conversation, match: re.Match) -> Outcome:
    return match[1]


def slash_command(chat: Conversation, match: re.Match) -> Outcome:
    """A command that the section does not know, or a skill."""
    text = quote(chat.user_texts[-1:])
    return f"You said: {text} I am the offline stand-in: try help."


# --- rules: what it understands, in the order in which they are tried ---

FILES = "(?:all )?(?:the |your |my )?(?:files|folders?|workspace|directory)"
CREATE = (
    r"^(?:create|make|write) (?:a |the )?(?:new )?(?:text )?(?:file )?"
    r"(?:called |named )?(\S{1,200}\.\w{1,20})[:,]?"
    r"(?: (?:with|containing|saying|that says) (?:the )?(?:text |content )?(.+))?$"
)
RULES: list[tuple[str, Handler | str]] = [  # a string is the answer itself
    # several things at once
    (rf"^.+?(?:, then |{AND})", several_steps),
    # files and commands
    (r"^keep running (.+)", run_again_and_again),
    (r"^(?:run|execute) (?:the command )?(.+)", run_command),
    (r"^(pwd|date|whoami)$", run_command),
    (r"^(?:list|ls|dir)\b", list_files),
    (rf"^(?:which|what|what are|show|show me) {FILES}\b", list_files),
    (rf"^what(?:'s| is| are) in(?:side)? {FILES}\b", list_files),
    (r"^read (?:the )?(?:file )?(.+)", read_files),
    (CREATE, create_file),
    (r"^(?:write|save) (.+) (?:to|in|into) (\S+)$", write_text_to_file),
    (r"^replace (?>(.+?) with )(.*) in (.+)", replace_in_file),
    (r"^change (?>(.+?) to )(.*) in (.+)", replace_in_file),
    # the conversation
    (r"^[^\n]*\bsummari[sz]e\b", summarize),
    (r"^what (?:did i say|was the) first\b", first_message),
    (r"^what \w+ my first (?:message|question)", first_message),
    (r"^what \w+ my last (?:message|question)", last_message),
    (r"^what did i (?:just )?say", what_was_said),
    (r"^how many messages", count_messages),
    (r"^(?:do you (?:know|remember) my name|who am i)\b", tell_name),
    (r"^what(?:'s| is| was) my ([\w' -]+)", tell_fact),
    # memory
    (r"^(?:remember|don't forget|keep in mind)(?: that)? (.+)", remember),
    (r"^(?:recall|do you remember|search (?:your )?memory for) (.+)", recall),
    (r"^what do you (?:remember|know)(?: about me)?\W*$", tell_all_facts),
    (r"^what do you (?:remember|know) about (.+)", recall),
    (r"^[^\n]+$", note_facts),  # my cat is Miso
    # itself
    (r"^(?:help|what do you understand)\b", HELP),
    (r"^what (?:can|do|should) (?:you|i) (?:do|ask|say|type|try)\b", what_can_you_do),
    (r"^how (?:does|do) (?:this|it|you) work\b", what_can_you_do),
    (r"^(?:which|what) tools\b", which_tools),
    (r"^tell me about yourself\b", who_are_you),
    (r"^(?:who|what) are you\b", who_are_you),
    (r"^what(?:'s| is) your name\b", who_are_you),
    (r"^are you (?:an? )?(?:real|human|person|ai|bot|language model)\b", who_are_you),
    # small talk
    (r"^(?:hello|hi|hey|hallo|good (?:morning|day|evening))\b", hello),
    (r"^how are you\b", "Fine, thank you: rules do not get tired. And you?"),
    (r"^(?:thanks|thank you|thx)\b", "You are welcome!"),
    (r"^(?:bye|goodbye|good night|see you)\b", "Goodbye! The word quit ends this."),
    (r"\bjoke\b", JOKE),
    (r"^(?:what|tell me the|what's the|what is the) (?:time|day|date)\b", tell_time),
    (r"^count (?:from 1 )?to (\d{1,4})", count),
    (
        r"^(?:what is |what's |calculate )?(\d{1,9}) ?([-+*x/]) ?(\d{1,9})\W*$",
        calculate,
    ),
    (r"^(?:repeat|say|echo)[: ]+(.+)", repeat),
    (r"^(?:what|show|open|display|print|cat|view|look|tell)\b[^\n]*", read_named_files),
    (r"^/\w", slash_command),
]
COMPILED_RULES = []
for pattern, handler in RULES:
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    COMPILED_RULES.append((compiled, handler))

# What may stand before a request: [a note], a "quoted" line, > another one.
BEFORE = re.compile(r'(?:\s*(?:\[[^\]\n]*\]|>[^\n]*\n|"[^"\n]*"\n))*\s*')
GREETING = re.compile(r"(?:hello|hi|hey)\b[^,.!\n]{0,20}[,.!]\s*", re.IGNORECASE)
POLITE = re.compile(r"(?:(?:please|can you|could you|would you),? )*", re.IGNORECASE)
LONG_TEXT = 20_000  # characters: of a longer one, only the first line is looked at


def apply_rules(chat: Conversation, text: str) -> Outcome:
    """The outcome of the first rule that fits a text, or None."""
    text = text.strip()
    if len(text) >= LONG_TEXT:
        text = text.partition("\n")[0][:200]
    text = text[POLITE.match(text).end() :]
    for pattern, handler in COMPILED_RULES:
        match = pattern.search(text)
        if not match:
            continue
        if isinstance(handler, str):
            return handler
        outcome = handler(chat, match)
        if outcome is not None:
            return outcome
    return None


def understand(chat: Conversation) -> Outcome:
    """What the rules say to the last message, whatever notes and quotes stand in it."""
    text = chat.user_texts[-1]
    beginning = text[BEFORE.match(text).end() :]
    after_greeting = GREETING.sub("", beginning, count=1)
    last_line = text.rpartition("\n")[2]
    for candidate in (after_greeting, beginning, last_line):
        outcome = apply_rules(chat, candidate)
        if outcome is not None:
            return outcome
    return None


def respond(chat: Conversation, one_by_one: bool) -> tuple[str, list[Call]]:
    """The answer of the rules: a text, or tool calls."""
    outcome = understand(chat)
    plan = outcome if isinstance(outcome, list) else []
    if one_by_one:
        plan = [[call] for calls in plan for call in calls]
    calls = next_calls(plan, chat.rounds)
    for call in calls:
        if call["name"] not in chat.tools:
            return explain_missing_tool(chat, call["name"]), []
    if calls:
        return "", calls
    if chat.results:
        return tell_results(chat, plan), []
    return outcome or not_understood(chat), []


def next_calls(plan: Plan, rounds: Plan) -> list[Call]:
    """The calls of the first round of a plan that has not been made yet.

    A round that went wrong is made once more, and then given up.
    """
    position = 0
    for planned in plan:
        made = rounds[position] if position < len(rounds) else []
        missing = [call for call in planned if call not in made]
        position += 1
        if missing:
            made_twice = made and position < len(rounds)
            if not made_twice:
                return missing
            position += 1
    return []


def explain_missing_tool(chat: Conversation, name: str) -> str:
    """Why a tool is not called that the request does not offer."""
    if not chat.tools and name in ABILITIES:
        return f"I cannot {ABILITIES[name]} yet: that comes with section 2."
    return f"I have no tool named {name} here."


def tell_results(chat: Conversation, plan: Plan) -> str:
    """What came of the planned calls; if none of them was made, of all calls."""
    planned = []
    for call, content in chat.results:
        if any(call in calls for calls in plan):
            planned.append((call, content))
    lines = []
    for call, content in planned or chat.results:
        lines.append(f"{call['name']} says: {clip(content, 600)}")
    return "\n\n".join(lines)


def not_understood(chat: Conversation) -> str:
    """An answer to anything else."""
    said = quote(chat.user_texts[-1:])
    return (
        f"You said: {said}. I am a stand-in that follows rules, and none fits that."
        f" Try {examples(chat)}. The word help lists what I understand."
    )


# --- tempers: from what the rules say to a completion ---

CALL_MISTAKES = ("json", "stop", "ids", "none")
TEXT_MISTAKES = ("none", "none", "length")
TROUBLES = ("none", "429", "none", "500", "stall", "drop", "error", "cut")


@dataclass
class Answer:
    """What the model says, before it becomes JSON."""

    text: str
    tool_calls: list[dict]
    finish_reason: str

    @property
    def tokens(self) -> int:
        if self.tool_calls:
            return count_tokens(json.dumps(self.tool_calls))
        return count_tokens(self.text)

    @property
    def message(self) -> dict:
        message = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


class Tempers:
    """The mistakes and troubles that come next; they take turns."""

    def __init__(self) -> None:
        self.call_mistakes = itertools.cycle(CALL_MISTAKES)
        self.text_mistakes = itertools.cycle(TEXT_MISTAKES)
        self.troubles = itertools.cycle(TROUBLES)


def count_tokens(text: str) -> int:
    """About four letters to a token, and one token to a Chinese character."""
    more_bytes = len(text.encode("utf-8")) - len(text)
    return (2 * len(text) + 3 * more_bytes + 7) // 8


def complete(request: ChatRequest, body: dict, tempers: Tempers) -> tuple[Answer, dict]:
    """The answer to a request, and the token usage. Raises ApiError for a long one."""
    prompt = json.dumps([body["messages"], body.get("tools")], ensure_ascii=False)
    prompt_tokens = count_tokens(prompt)
    window = WINDOWS[request.model]
    if prompt_tokens >= window:
        reason = (
            f"This model's maximum context length is {window} tokens,"
            f" the messages have {prompt_tokens}."
        )
        raise ApiError(400, reason, "context_length_exceeded")
    chat = Conversation(request)
    answer = make_answer(chat, request, zlib.crc32(prompt.encode()))
    if request.model == "offline-clumsy":
        make_mistake(answer, chat, tempers)
    limits = [window - prompt_tokens, request.max_tokens, request.max_completion_tokens]
    apply_limit(answer, min(limit for limit in limits if limit is not None))
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt_tokens + answer.tokens,
    }
    return answer, usage


def make_answer(chat: Conversation, request: ChatRequest, stamp: int) -> Answer:
    """What the rules say, with ids that no other request's calls have."""
    text, calls = respond(chat, one_by_one=not request.parallel_tool_calls)
    tool_calls = []
    for position, call in enumerate(calls):
        call_id = f"call_{stamp:08x}_{position}"
        tool_calls.append({"id": call_id, "type": "function", "function": call})
    finish_reason = "tool_calls" if tool_calls else "stop"
    return Answer(text, tool_calls, finish_reason)


def make_mistake(answer: Answer, chat: Conversation, tempers: Tempers) -> None:
    """Spoil an answer as a small local model would."""
    if not answer.tool_calls:
        if next(tempers.text_mistakes) == "length":
            answer.text = answer.text[: len(answer.text) // 2]
            answer.finish_reason = "length"
        return
    if any(content.lower().startswith("error") for _, content in chat.results):
        return  # after an error it is more careful
    mistake = next(tempers.call_mistakes)
    if mistake == "json":
        function = answer.tool_calls[0]["function"]
        broken = function["arguments"][:-1]
        answer.tool_calls[0]["function"] = {**function, "arguments": broken}
    elif mistake == "ids":
        repeat_call_ids(answer.tool_calls)
    elif mistake == "stop":
        answer.finish_reason = "stop"


def repeat_call_ids(tool_calls: list[dict]) -> None:
    """Give all calls the same id; a single one gets an empty one."""
    call_id = tool_calls[0]["id"] if len(tool_calls) > 1 else ""
    for call in tool_calls:
        call["id"] = call_id


def apply_limit(answer: Answer, limit: int) -> None:
    """Cut an answer that has more tokens than there is room for."""
    if answer.tokens <= limit:
        return
    answer.tool_calls = []
    answer.finish_reason = "length"
    while answer.tokens > limit:
        answer.text = answer.text[: len(answer.text) * limit // answer.tokens]


def message_deltas(message: dict) -> list[dict]:
    """The message in the pieces in which a real server streams it."""
    deltas: list[dict] = [{"role": "assistant", "content": ""}]
    for piece in re.findall(r"\s*\S{1,12}|\s+", message["content"]):
        deltas.append({"content": piece})
    for index, call in enumerate(message.get("tool_calls", [])):
        function = call["function"]
        start = {**call, "index": index, "function": {**function, "arguments": ""}}
        rest = {"index": index, "function": {"arguments": function["arguments"]}}
        deltas.append({"tool_calls": [start]})
        deltas.append({"tool_calls": [rest]})
    return deltas


def embed(text: str) -> list[float]:
    """Hashed pieces of two and three letters, as 256 numbers of length 1."""
    vector = [1e-9] * 256
    padded = f" {text.lower()} "
    for size in (2, 3):
        for start in range(len(padded) - size + 1):
            piece = ascii(padded[start : start + size])
            number = zlib.crc32(piece.encode())
            vector[number % 256] += 1 if number & 256 else -1
    length = sum(value * value for value in vector) ** 0.5
    return [value / length for value in vector]


# --- the server ---


class OfflineServer(ThreadingHTTPServer):
    """The server, its address, and the state that all its connections share."""

    request_queue_size = 128

    def __init__(self, port: int, pace: float, stall: float) -> None:
        super().__init__(("127.0.0.1", port), OfflineHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.pace = pace
        self.stall = stall
        self.tempers = Tempers()


def serve(port: int = 0, pace: float = 0.01) -> OfflineServer:
    """A server that already answers, at `.url`.

    Raises OSError for a port that is taken, and ValueError if OFFLINE_PACE or
    OFFLINE_STALL is no number of seconds.
    """
    pace = float(os.environ.get("OFFLINE_PACE") or pace)
    stall = float(os.environ.get("OFFLINE_STALL") or 600)
    if not 0 <= pace < 1e6 or not 0 <= stall < 1e6:
        raise ValueError("nobody can wait that long")
    server = OfflineServer(port, pace, stall)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


class OfflineHandler(BaseHTTPRequestHandler):
    """One connection: requests in, JSON or a stream of events out."""

    server: OfflineServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away
            super().handle()

    def log_message(self, *args: object) -> None:
        """Say nothing: the terminal belongs to the section."""

    def send_error(self, code: int, message: str = "", explain: object = None) -> None:
        """Send an error as this API sends them, also those that http.server finds."""
        self.send_api_error(ApiError(code, message))

    def send_api_error(self, error: ApiError) -> None:
        kinds = {429: "requests", 500: "server_error"}
        body = {
            "message": error.message,
            "type": kinds.get(error.status, "invalid_request_error"),
            "param": None,
            "code": error.code,
        }
        self.send_json({"error": body}, error.status)

    def send_json(self, value: dict, status: int = 200, broken: bool = False) -> None:
        """Send an object; `broken` ends the connection in the middle of it."""
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if broken:
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)

    def answer(self) -> None:
        """Answer one request, whatever its method."""
        routes = {
            "GET /": self.send_about,
            "GET /v1/models": self.send_models,
            "POST /v1/chat/completions": self.send_completion,
            "POST /v1/embeddings": self.send_embeddings,
        }
        route = f"{self.command} {self.path}"
        try:
            body = self.read_body()
            if route not in routes:
                raise ApiError(404, f"Unknown: {route}. Known: {', '.join(routes)}.")
            if route != "GET /":
                self.check_key()
            routes[route](body)
        except ApiError as error:
            self.send_api_error(error)

    do_GET = answer
    do_POST = answer
    do_PUT = answer

    def check_key(self) -> None:
        if self.headers["Authorization"] != "Bearer offline":
            reason = "The key of the offline model is: offline"
            raise ApiError(401, reason, "invalid_api_key")

    def read_body(self) -> object:
        """The JSON value of the request's body, or None if there is none."""
        length = self.headers.get("Content-Length")
        if length is None and self.command != "POST":
            return None
        if not re.fullmatch("[0-9]{1,12}", length or ""):
            raise ApiError(411, "Send a Content-Length and a body.")
        if int(length) > MAX_BODY:
            self.skip(int(length))
            raise ApiError(413, f"The request body is over {MAX_BODY} bytes.")
        try:
            return from_json(self.rfile.read(int(length)), allow_inf_nan=False)
        except ValueError:
            return None  # which is refused, like all that is not an object

    def skip(self, size: int) -> None:
        """Read a body that is too big, so that the client comes to read the refusal."""
        while size > 0:
            block = self.rfile.read(min(size, MAX_BODY))
            if not block:
                return
            size -= len(block)

    def send_about(self, body: object) -> None:
        self.send_json({"about": ABOUT.format(self.server.url)})

    def send_models(self, body: object) -> None:
        names = [*WINDOWS, EMBEDDING_MODEL]
        models = [{"id": name, "object": "model"} for name in names]
        self.send_json({"object": "list", "data": models})

    def send_embeddings(self, body: object) -> None:
        request = parse(EmbeddingRequest, body)
        if request.model != EMBEDDING_MODEL:
            raise ApiError(404, f"Choose {EMBEDDING_MODEL}.", "model_not_found")
        texts = [request.input] if isinstance(request.input, str) else request.input
        data = []
        for index, text in enumerate(texts):
            vector = embed(text)
            if request.encoding_format == "base64":
                packed = struct.pack("<256f", *vector)
                vector = base64.b64encode(packed).decode()
            data.append({"index": index, "embedding": vector})
        tokens = sum(count_tokens(text) for text in texts)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        answer = {
            "object": "list",
            "data": data,
            "model": request.model,
            "usage": usage,
        }
        self.send_json(answer)

    def send_completion(self, body: object) -> None:
        request = check_chat_request(body)
        answer, usage = complete(request, body, self.server.tempers)
        trouble = "none"
        if request.model == "offline-flaky":
            trouble = next(self.server.tempers.troubles)
        self.refuse(trouble)
        head = {
            "id": f"chatcmpl-{time.time_ns():x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.model,
        }
        if request.stream:
            events = completion_events(answer)
            if request.stream_options.include_usage:
                events.append({"choices": [], "usage": usage})
            head["object"] = "chat.completion.chunk"
            lines = [json.dumps({**head, **event}) for event in events]
            self.send_stream([*lines, "[DONE]"], trouble)
            return
        if trouble == "stall":
            time.sleep(self.server.stall)
        choice = {
            "index": 0,
            "message": answer.message,
            "finish_reason": answer.finish_reason,
        }
        completion = {**head, "choices": [choice], "usage": usage}
        self.send_json(completion, broken=trouble in ("drop", "cut"))

    def refuse(self, trouble: str) -> None:
        """Raise the ApiError that a trouble stands for, if it stands for one."""
        if trouble == "429":
            reason = "Rate limit reached: try again in 1s."
            raise ApiError(429, reason, "rate_limit_exceeded")
        if trouble == "500":
            reason = "The server had an error while processing your request."
            raise ApiError(500, reason)
        if trouble == "error":  # an error with HTTP 200
            raise ApiError(200, "Provider returned error", 502)

    def send_stream(self, events: list[str], trouble: str) -> None:
        """Send events one by one.

        `drop` ends the connection in the middle, `cut` ends the stream without a
        finish_reason, `stall` falls silent after two events.
        """
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if trouble in ("drop", "cut"):
            events = events[:2]
        for position, event in enumerate(events):
            if position == 2 and trouble == "stall":
                time.sleep(self.server.stall)
            time.sleep(self.server.pace)
            self.send_chunk(f"data: {event}\n\n".encode())
        if trouble == "drop":
            self.close_connection = True
        else:
            self.send_chunk(b"")

    def send_chunk(self, data: bytes) -> None:
        """Send a chunk; an empty one is the last."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def completion_events(answer: Answer) -> list[dict]:
    """The events of a streamed answer, without what all of them have in common."""
    choices = []
    for delta in message_deltas(answer.message):
        choices.append({"index": 0, "delta": delta, "finish_reason": None})
    choices.append({"index": 0, "delta": {}, "finish_reason": answer.finish_reason})
    return [{"choices": [choice]} for choice in choices]


# --- the command line ---


def fail(message: str, status: int = 2) -> NoReturn:
    """Say in one line what is wrong, and end the program."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = "options: --model NAME, --next, --port 0 to 65535"
    parser.error = lambda message: fail(f"{message}; {options}")
    parser.add_argument("--model", choices=WINDOWS, default="offline")
    parser.add_argument("--next", action="store_true", help="from sessions/next")
    parser.add_argument("--port", type=int)
    parser.add_argument("section", nargs="?", help="s03, check_model, or your script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.port is not None and not 0 <= given.port <= 65535:
        parser.error(f"--port {given.port}")
    return given


def find_script(section: str, folder: Path) -> Path:
    """The script that a section's name means. Raises ValueError if there is none."""
    scripts = {}
    for path in sorted(folder.glob("s[0-9][0-9]_*.py")):
        scripts[path.name[:3]] = path
    scripts["check_model"] = SESSIONS / "check_model.py"
    if section in scripts:
        return scripts[section]
    if section.endswith(".py") and Path(section).is_file():
        return Path(section)
    names = ", ".join(scripts)
    where = f"sessions/{folder.name}"
    raise ValueError(
        f"unknown section {section} in {where}: choose from {names}, or name a script"
    )


def section_environment(url: str, model: str) -> dict[str, str]:
    """The environment of a section that shall talk to the offline model alone."""
    env = {  # what .env says about other servers does not count
        "MODEL_OPTIONS": "",
        "EMBEDDING_MODEL": "",
        "FALLBACK_MODELS": "",
        "CONTEXT_TOKENS": str(WINDOWS[model]),
    }
    for number in range(2, 10):
        env[f"OPENAI_API_KEY_{number}"] = ""
        env[f"OPENAI_BASE_URL_{number}"] = ""
    env.update(os.environ)
    env.update(OPENAI_API_KEY="offline", OPENAI_BASE_URL=url, MODEL_ID=model)
    bypass_proxies(env)
    return env


def choose_workspace(script: Path, env: dict[str, str]) -> None:
    """Give a reader's copy of a section the workspace that the sections have."""
    if SESSIONS not in script.resolve().parents:
        env.setdefault("WORKSPACE_DIR", str(SESSIONS.parent / "workspace"))


def bypass_proxies(env: dict[str, str]) -> None:
    """Let an environment reach servers on this machine without a proxy."""
    direct = env.get("no_proxy", env.get("NO_PROXY", ""))
    env["no_proxy"] = f"127.0.0.1,{direct}"
    env["NO_PROXY"] = env["no_proxy"]
    for name in ("ALL_PROXY", "all_proxy"):
        if env.get(name, "").startswith("socks"):
            del env[name]  # the SDK wants a package for these, even if it is not used


def run_section(script: Path, arguments: list[str], env: dict[str, str]) -> int:
    """Run a section at this terminal and return its exit status.

    Ctrl-C is for the section: the terminal sends it to both.
    """
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen([sys.executable, str(script), *arguments], env=env)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    status = child.wait()
    return status if status >= 0 else 128 - status


def start_server(port: int) -> OfflineServer:
    """The server. Ends the program in one line if it cannot start."""
    try:
        return serve(port)
    except OSError as error:
        fail(f"port {port}: {error.strerror}; choose another with --port N", 1)
    except ValueError:
        fail("OFFLINE_PACE and OFFLINE_STALL must be numbers of seconds")


def main() -> int:
    given = parse_arguments()
    script = None
    if given.section:
        try:
            script = find_script(
                given.section, SESSIONS / ("next" if given.next else "en")
            )
        except ValueError as error:
            fail(str(error))
    port = given.port
    if port is None:
        port = 0 if script else DEFAULT_PORT
    server = start_server(port)
    print(ABOUT.format(server.url), flush=True)
    if script:
        env = section_environment(server.url, given.model)
        choose_workspace(script, env)
        return run_section(script, given.arguments, env)
    print("Put these three lines into .env; Ctrl-C ends the server.")
    print(f"OPENAI_API_KEY=offline\nOPENAI_BASE_URL={server.url}")
    print(f"MODEL_ID={given.model}", flush=True)
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
