"""The stand-in model: as strict as a real server, its rules, tempers and launcher."""

import base64
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import openai
import pytest
from fake_model import check_history
from harness import FOLDER
from harness import REPO
from harness import Screen
from harness import load
from harness import pipe

SCRIPT = REPO / "sessions" / "offline_model.py"
COMMAND = [sys.executable, str(SCRIPT)]
MODELS = ["offline", "offline-clumsy", "offline-flaky", "offline-small"]
ABOUT = "a stand-in with rules, not a language model"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def tool(name: str, *fields: str) -> dict:
    properties = {field: {"type": "string"} for field in fields}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


ASK = {"model": "offline", "messages": [user("hello")]}
READ = tool("read_file", "path")
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "read_file", "arguments": "{}"},
}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "x"}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load(SCRIPT)


@pytest.fixture
def server(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SimpleNamespace]:
    """A server, the SDK's client for it, and `post`, which sends a body as it is."""
    monkeypatch.setenv("OFFLINE_STALL", "1")
    running = module.serve(port=0, pace=0)
    port = running.server_port
    client = openai.OpenAI(
        api_key="offline", base_url=running.url, max_retries=0, timeout=0.5
    )

    def post(
        body: object, path: str = "/v1/chat/completions", key: str = "offline"
    ) -> tuple:
        with closing(
            http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        ) as connection:
            return send(connection, body, path, key)

    with client:
        yield SimpleNamespace(
            port=port, client=client, post=post, chat=client.chat.completions
        )
    running.shutdown()
    running.server_close()


def send(
    connection, body: object, path: str, key: str = "offline", method: str = "POST"
) -> tuple:
    """The status and the JSON of one exchange on a connection."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, raw, {"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def outcome(server: SimpleNamespace, stream: bool = True, **body) -> tuple[str, object]:
    """What became of a request: finish_reason and message, or what went wrong."""
    text, calls, finish = "", {}, None
    try:
        reply = server.chat.create(**ASK | body, stream=stream)
        for chunk in reply if stream else [reply]:
            if not chunk.choices:
                break
            choice = chunk.choices[0]
            part = choice.delta if stream else choice.message
            finish = choice.finish_reason or finish
            text += part.content or ""
            for number, piece in enumerate(part.tool_calls or ()):
                index = piece.index if stream else number
                call = calls.setdefault(index, [piece.id, piece.function.name, ""])
                call[2] += piece.function.arguments or ""
    except openai.APIStatusError as error:
        return str(error.status_code), error.body
    except openai.APITimeoutError:
        return "stall", None
    except openai.APIConnectionError:
        return "drop", text
    return str(finish) if finish or text else "error 200", list(calls.values()) or text


# --- the wire ---


def test_endpoints_with_the_sdk(server: SimpleNamespace):
    assert [model.id for model in server.client.models.list()] == [
        *MODELS,
        "offline-embed",
    ]
    answer = server.chat.create(**ASK)
    assert answer.choices[0].finish_reason == "stop"
    assert "stand-in" in answer.choices[0].message.content
    usage = answer.usage
    assert usage.prompt_tokens > 0 < usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert ABOUT in send(connect(server), b"", "/", method="GET")[1]["about"]


def connect(server: SimpleNamespace) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)


@pytest.mark.parametrize("path", ["chat/completions", "embeddings", "models"])
@pytest.mark.parametrize("key", ["wrong", ""])
def test_the_key_is_checked(server: SimpleNamespace, path: str, key: str):
    method = "GET" if path == "models" else "POST"
    status, body = send(connect(server), ASK, f"/v1/{path}", key, method)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


def test_the_stream_is_the_answer_in_pieces(server: SimpleNamespace):
    question = {"messages": [user("repeat 你好 my dear   friend\nand goodbye")]}
    whole = outcome(server, stream=False, **question)
    assert (
        whole
        == outcome(server, **question)
        == ("stop", "你好 my dear   friend\nand goodbye")
    )
    options = {"include_usage": True}
    chunks = list(
        server.chat.create(**ASK | question, stream=True, stream_options=options)
    )
    assert len(chunks) > 6 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert not any(chunk.usage for chunk in chunks[:-1])
    assert (
        len(list(server.chat.create(**ASK | question, stream=True))) == len(chunks) - 1
    )


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls(server: SimpleNamespace, stream: bool):
    body = {"tools": [READ], "messages": [user("read a.txt and b.txt")]}
    finish, calls = outcome(server, stream, **body)
    assert finish == "tool_calls"
    assert [(name, json.loads(text)) for _, name, text in calls] == [
        ("read_file", {"path": "a.txt"}),
        ("read_file", {"path": "b.txt"}),
    ]
    made = [
        CALL | {"id": c[0], "function": {"name": c[1], "arguments": c[2]}}
        for c in calls
    ]
    results = [
        RESULT | {"tool_call_id": call["id"], "content": call["id"]} for call in made
    ]
    history = [*body["messages"], CALLED | {"tool_calls": made}, *results]
    check_history(history)
    finish, text = outcome(server, stream, **body | {"messages": history})
    assert finish == "stop" and all(call["id"] in text for call in made)
    assert len(outcome(server, stream, **body, parallel_tool_calls=False)[1]) == 1


def test_it_remembers_the_conversation(server: SimpleNamespace):
    said = [user("my cat is Mia"), {"role": "assistant", "content": "Noted."}]
    assert "Mia" in outcome(server, messages=[*said, user("what is my cat?")])[1]
    assert "Mia" not in outcome(server, messages=[user("what is my cat?")])[1]
    assert outcome(server) == outcome(server)


STRANGE = {
    "no messages": {"messages": []},
    "messages a text": {"messages": "hi"},
    "no model": {"model": None},
    "unknown argument": {"max_token": 5},
    "unknown key": {"messages": [user("hi") | {"mood": "good"}]},
    "unknown role": {"messages": [{"role": "bot", "content": "x"}]},
    "content null": {"messages": [{"role": "user", "content": None}]},
    "content a list": {"messages": [{"role": "user", "content": ["x"]}]},
    "two users": {"messages": [user("a"), user("b")]},
    "assistant first": {"messages": [{"role": "assistant", "content": "x"}]},
    "assistant last": {"messages": [user("a"), {"role": "assistant", "content": "x"}]},
    "late system": {"messages": [user("a"), {"role": "system", "content": "x"}]},
    "orphan result": {"messages": [user("a"), RESULT]},
    "missing result": {"messages": [user("a"), CALLED]},
    "missing result, then user": {"messages": [user("a"), CALLED, user("b")]},
    "two results": {"messages": [user("a"), CALLED, RESULT, RESULT]},
    "user after result": {"messages": [user("a"), CALLED, RESULT, user("b")]},
    "result without id": {
        "messages": [user("a"), CALLED, {"role": "tool", "content": "x"}]
    },
    "id with a user": {"messages": [user("a") | {"tool_call_id": "c1"}]},
    "calls null": {
        "messages": [user("a"), CALLED | {"tool_calls": None, "content": "x"}]
    },
    "calls empty": {"messages": [user("a"), CALLED | {"tool_calls": []}]},
    "same id": {
        "messages": [user("a"), CALLED | {"tool_calls": [CALL, CALL]}, RESULT, RESULT]
    },
    "empty id": {"messages": [user("a"), CALLED | {"tool_calls": [CALL | {"id": ""}]}]},
    "no tools": {"tools": []},
    "tool twice": {"tools": [READ, READ]},
    "tool with a bad name": {"tools": [tool("read file")]},
    "tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "choice without tools": {"tool_choice": "auto"},
    "parallel without tools": {"parallel_tool_calls": True},
    "usage without stream": {"stream_options": {"include_usage": True}},
    "no room": {"max_tokens": 0},
    "temperature a text": {"temperature": "warm"},
    "stream a number": {"stream": 1},
    "two answers": {"n": 2},
}
for text in ("", "{broken", "[1]", "null", '{"a": NaN}', "[" * 5000):
    function = {"name": "read_file", "arguments": text}
    history = [
        user("a"),
        CALLED | {"tool_calls": [CALL | {"function": function}]},
        RESULT,
    ]
    STRANGE[f"arguments {text[:9]}"] = {"messages": history}


@pytest.mark.parametrize("name", STRANGE)
def test_what_a_strict_server_refuses(server: SimpleNamespace, name: str):
    status, answer = server.post({**ASK, **STRANGE[name]})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["message"]


def test_what_a_strict_server_takes(server: SimpleNamespace):
    system = {"role": "system", "content": "Be brief."}
    answered = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    history = [system, user("a"), CALLED, RESULT, answered, user("hello")]
    more = {
        "tools": [READ],
        "tool_choice": "auto",
        "temperature": 0.5,
        "max_tokens": 50,
    }
    assert server.post(ASK | {"messages": history} | more)[0] == 200


@pytest.mark.parametrize("raw", [b"", b"{broken", b"[]", b"5", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_object(server: SimpleNamespace, raw: bytes):
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        assert server.post(raw, path)[0] == 400


def test_unknown_models_paths_and_methods(server: SimpleNamespace):
    status, answer = server.post(ASK | {"model": "gpt-9"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert all(model in answer["error"]["message"] for model in MODELS)
    assert server.post(ASK, "/chat/completions")[0] == 404
    assert send(connect(server), ASK, "/v1/models", method="PUT")[0] == 404
    assert server.post({"model": "offline", "input": "x"}, "/v1/embeddings")[0] == 404


def test_one_connection_serves_many_requests(server: SimpleNamespace):
    connection = connect(server)
    connection.connect()
    first = connection.sock
    bodies = (ASK, b"{broken", ASK | {"model": "x"}, ASK)
    found = [send(connection, body, "/v1/chat/completions")[0] for body in bodies]
    assert found == [200, 400, 404, 200]
    raw = json.dumps(ASK | {"stream": True})
    connection.request(
        "POST", "/v1/chat/completions", raw, {"Authorization": "Bearer offline"}
    )
    assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
    assert send(connection, b"", "/", method="GET")[0] == 200
    assert connection.sock is first


def test_bodies_too_big_or_without_a_length(
    server: SimpleNamespace, module: ModuleType
):
    assert server.post(b" " * (module.MAX_BODY + 1))[0] == 413
    connection = connect(server)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 411


@pytest.mark.parametrize("id", ["x", "call 1", "é/1:2\n", "k3v9x2p1q", "0" * 300])
def test_an_id_may_have_any_form(server: SimpleNamespace, id: str):
    called = CALLED | {"tool_calls": [CALL | {"id": id}]}
    history = [user("a"), called, RESULT | {"tool_call_id": id}]
    assert server.post(ASK | {"messages": history})[0] == 200


def test_a_refusal_says_what_is_wrong_and_where(server: SimpleNamespace):
    broken = CALL | {"function": {"name": "read_file", "arguments": "[1]"}}
    history = [user("a"), CALLED | {"tool_calls": [broken]}, RESULT]
    for body, place, reason in [
        ({"max_token": 5}, "max_token:", "not permitted"),
        ({"messages": [user("a") | {"content": 5}]}, "messages.0.", "valid string"),
        ({"messages": [{"role": "bot"}]}, "messages.0:", "'assistant'"),
        ({"messages": history}, "messages.1.", "not an object"),
        ({"messages": [user("a"), user("b")]}, "messages.1:", "cannot follow user"),
        ({"messages": [user("a"), CALLED]}, "end", "c1"),
    ]:
        message = server.post(ASK | body)[1]["error"]["message"]
        assert place in message and reason in message, message


# --- what it understands ---

BASH = tool("bash", "command", "timeout")
WRITE = tool("write_file", "path", "content")
EDIT = tool("edit_file", "path", "old_text", "new_text")
TOOLS = [BASH, READ, WRITE, EDIT]
MEMORY = [tool("memory_write", "content"), tool("memory_search", "query")]


def said_before(*texts: str) -> list[dict]:
    """A conversation in which these texts were said and answered, all but the last."""
    messages = []
    for text in texts:
        messages += [user(text), {"role": "assistant", "content": "Well."}]
    return messages[:-1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("hello", "Hello! I am the offline stand-in"),
        ("hi there", "Hello!"),
        ("Good morning!", "Hello!"),
        ("Hi, I'm Ann.", "Noted: your name is Ann."),
        ("my name's Bo", "Noted: your name is Bo."),
        (
            "My cat is Mia and my dog is Rex.",
            "Noted: your cat is Mia; your dog is Rex.",
        ),
        ("what can you do?", "Files and commands come with section 2"),
        ("how does this work?", "Try "),
        ("help", "read SOUL.md and USER.md"),
        ("what is in SOUL.md?", "I cannot open files yet: that comes with section 2."),
        ("list the files", "I cannot run commands yet: that comes with section 2."),
        ("run ls", "I cannot run commands yet"),
        ("create notes.txt with milk", "I cannot write files yet"),
        ("which tools do you have?", "no tools yet"),
        ("who are you?", "I am the offline stand-in"),
        ("Are you an AI?", "rules where a language model would be"),
        ("thanks!", "You are welcome"),
        ("how are you?", "Fine"),
        ("bye", "quit"),
        ("can you tell me a joke?", "Halloween"),
        ("what time is it?", "by the clock of this machine"),
        ("please count to 5", "1 2 3 4 5"),
        ("what is 6 * 7?", "6 * 7 is 42."),
        ("7 / 2", "7 / 2 is 3.5."),
        ("1/0", "Nobody can divide by 0."),
        ("say cheese", "cheese"),
        ("what did I say first?", 'Your first message was: "my cat is Mia"'),
        (
            "what was my last message?",
            'Your last message was: "remember that I like tea"',
        ),
        ("what did I say?", 'You said: "my cat is Mia"; "remember that I like tea"'),
        ("what do you remember?", "your cat is Mia"),
        ("what do you remember about tea?", 'You told me: "remember that I like tea"'),
        ("what is my cat called?", "Your cat is Mia."),
        ("What's my cat's name?", "Your cat is Mia."),
        ("who am I?", "You have not told me your name."),
        (
            "remember that Bo is late",
            "I will keep that for this conversation: Bo is late",
        ),
        ("how many messages?", "I see 3 messages from you."),
        ("/minutes of today", 'You said: "/minutes of today"'),
        ("the weather, please", 'You said: "the weather, please". I am a stand-in'),
        ("the weather, please", '"what is my name?"'),
    ],
)
def test_what_a_newcomer_types(server: SimpleNamespace, text: str, answer: str):
    messages = said_before("my cat is Mia", "remember that I like tea", text)
    assert answer in outcome(server, messages=messages)[1]


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("what is in SOUL.md?", "read_file", ["SOUL.md"]),
        ("What's in skills/a.md", "read_file", ["skills/a.md"]),
        ("show me SOUL.md", "read_file", ["SOUL.md"]),
        ("hi, can you read SOUL.md please?", "read_file", ["SOUL.md"]),
        ("cat `.env`", "read_file", [".env"]),
        ("list the files", "bash", ["ls"]),
        ("which files are there?", "bash", ["ls"]),
        ("show me all files", "bash", ["ls"]),
        ("what's in the workspace?", "bash", ["ls"]),
        ("run `ls -l`", "bash", ["ls -l"]),
        ("date", "bash", ["date"]),
        (
            "create a file notes.txt with buy milk",
            "write_file",
            ["notes.txt", "buy milk"],
        ),
        ("make a new file called a.md that says 'go!'", "write_file", ["a.md", "go!"]),
        ("create empty.txt", "write_file", ["empty.txt", ""]),
        ("save two words in a.txt", "write_file", ["a.txt", "two words"]),
        ("replace a to b with c in d.txt", "edit_file", ["d.txt", "a to b", "c"]),
        ("change milk to tea in d.txt", "edit_file", ["d.txt", "milk", "tea"]),
        ("remember that I like tea", "memory_write", ["I like tea"]),
        ("what do you remember about tea?", "memory_search", ["tea"]),
    ],
)
def test_what_becomes_a_tool_call(
    server: SimpleNamespace, text: str, name: str, arguments: list[str]
):
    if name == "bash" and arguments == ["ls"] and os.name == "nt":
        arguments = ["dir"]
    finish, calls = outcome(server, messages=[user(text)], tools=[*TOOLS, *MEMORY])
    assert finish == "tool_calls"
    assert [(call[1], [*json.loads(call[2]).values()]) for call in calls] == [
        (name, arguments)
    ]


def test_files_are_listed_by_a_tool_for_it_if_there_is_one(server: SimpleNamespace):
    tools = [*TOOLS, tool("list_files", "pattern")]
    calls = outcome(server, messages=[user("list the files")], tools=tools)[1]
    assert [call[1:] for call in calls] == [["list_files", "{}"]]


def test_two_files_are_read_in_one_round(server: SimpleNamespace):
    question = [user("what is in SOUL.md and USER.md?")]
    calls = outcome(server, messages=question, tools=TOOLS)[1]
    assert [json.loads(call[2])["path"] for call in calls] == ["SOUL.md", "USER.md"]


def test_examples_fit_the_tools(server: SimpleNamespace):
    for tools, example in [
        (TOOLS, "list the files"),
        ([*TOOLS, *MEMORY], "remember that I like tea"),
    ]:
        for text in ("hello", "what can you do?", "the weather"):
            answer = outcome(server, messages=[user(text)], tools=tools)[1]
            assert example in answer and "section 2" not in answer
    text = outcome(server, messages=[user("which tools?")], tools=TOOLS)[1]
    assert all(tool["function"]["name"] in text for tool in TOOLS)
    text = outcome(server, messages=[user("run date")], tools=[READ])[1]
    assert text == "I have no tool named bash here."


@pytest.mark.parametrize(
    "before",
    [
        "[Ada] ",
        "[in reply to: see you at 6]\n[Ada, in the group] ",
        "> see you at 6\n> or at 7\n\n",
        '"see you at 6"\n',
        '[Bo forwarded] "read it"\n> and that\n',
        "A long story.\nIt has no rule.\n",
    ],
)
def test_notes_and_quotes_before_a_message(server: SimpleNamespace, before: str):
    messages = said_before("my cat is Mia", f"{before}what is my cat?")
    assert outcome(server, messages=messages)[1] == "Your cat is Mia."


FRAGMENTS = [
    "a",
    " ",
    "\n",
    ".",
    "/",
    "my ",
    "my a is ",
    " is b",
    " and run ",
    ", then ",
]
FRAGMENTS += [" to b", " with ", " in b", "[", "[a]", ">", ">\n", '"', '"a"\n', "1 + "]
FRAGMENTS += [
    "what is ",
    "please ",
    "hi, ",
    "I'm A",
    "I'm A!",
    "a.b",
    "remember ",
    "x ",
]
STARTS = ["", "write a ", "replace a ", "change a ", "create a", "read ", "run ", "hi "]
STARTS += ["what is my ", "what is in ", "remember ", "recall ", "summarize ", "[", "1"]


@pytest.mark.parametrize("length", [19_000, 100_000])
@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_no_text_takes_long(module: ModuleType, fragment: str, length: int):
    """The time of the process counts, so that a busy machine changes nothing."""
    for start in STARTS:
        text = start + fragment * (length // len(fragment)) + "\x00"
        body = {"model": "offline", "messages": [user(text)], "tools": TOOLS}
        request = module.check_chat_request(body)
        began = time.process_time()
        module.complete(request, body, module.Tempers())
        assert time.process_time() - began < 1, (start, fragment)


# --- limits and tempers ---


def test_the_answer_ends_at_the_callers_limit(server: SimpleNamespace):
    question = {"messages": [user("count to 500")]}
    whole = outcome(server, **question)[1]
    for limit in ({"max_tokens": 20}, {"max_completion_tokens": 20}):
        finish, text = outcome(server, **question, **limit)
        assert finish == "length" and whole.startswith(text) and 20 < len(text) < 200
    assert outcome(server, **question, max_tokens=5000) == ("stop", whole)


def test_the_window_of_the_small_model(server: SimpleNamespace):
    status, error = outcome(
        server, model="offline-small", messages=[user("x " * 10_000)]
    )
    assert (status, error["code"]) == ("400", "context_length_exceeded")
    assert "4096" in error["message"]
    question = [user(f"count to 2000\n{'x ' * 6000}")]
    assert outcome(server, messages=question)[0] == "stop"
    finish, text = outcome(server, model="offline-small", messages=question)
    assert finish == "length" and text.startswith("1 2 3")
    usage = server.chat.create(model="offline-small", messages=question).usage
    assert usage.total_tokens <= 4096


@pytest.mark.parametrize("stream", [True, False])
def test_clumsy_shows_each_mistake_soon(server: SimpleNamespace, stream: bool):
    body = {
        "model": "offline-clumsy",
        "tools": [READ],
        "messages": [user("read a and read b")],
    }
    seen = set()
    for _ in range(4):
        finish, calls = outcome(server, stream, **body)
        whole = {json_or_none(text) is not None for _, _, text in calls}
        seen.add((finish, whole == {True}, len({call[0] for call in calls})))
    assert seen == {
        ("tool_calls", False, 2),
        ("stop", True, 2),
        ("tool_calls", True, 1),
        ("tool_calls", True, 2),
    }
    words = [outcome(server, stream, model="offline-clumsy") for _ in range(3)]
    assert sorted(finish for finish, _ in words) == ["length", "stop", "stop"]


def json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("stream", [True, False])
def test_flaky_shows_each_failure_soon(server: SimpleNamespace, stream: bool):
    seen = [outcome(server, stream, model="offline-flaky")[0] for _ in range(8)]
    broken = {"None"} if stream else {"drop"}
    assert set(seen) == {"stop", "429", "500", "stall", "drop", "error 200"} | broken
    assert seen.count("stop") == 2


def test_flaky_tells_when_to_come_back(server: SimpleNamespace):
    with pytest.raises(openai.RateLimitError) as caught:
        for _ in range(2):
            server.chat.create(**ASK | {"model": "offline-flaky"})
    assert caught.value.response.headers["retry-after"] == "1"


# --- embeddings ---


def test_embeddings(server: SimpleNamespace):
    make = server.client.embeddings.create
    texts = ["the cat sat on the mat", "a cat on a mat", "quarterly tax report"]
    floats = [d.embedding for d in make(model="offline-embed", input=texts).data]
    near, far = (
        sum(x * y for x, y in zip(floats[0], v, strict=True)) for v in floats[1:]
    )
    assert near > far
    assert sum(x * x for x in floats[0]) == pytest.approx(1)
    body = {"model": "offline-embed", "input": texts[0]}
    plain = server.post(body, "/v1/embeddings")[1]["data"][0]["embedding"]
    packed = server.post(body | {"encoding_format": "base64"}, "/v1/embeddings")[1][
        "data"
    ][0]
    numbers = struct.unpack("<256f", base64.b64decode(packed["embedding"]))
    assert list(numbers) == pytest.approx(plain, abs=1e-6)
    assert floats[0] == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize(
    "more",
    [
        {"input": ""},
        {"input": []},
        {"input": [5]},
        {"dims": 5},
        {"encoding_format": "hex"},
    ],
)
def test_embeddings_refused(server: SimpleNamespace, more: dict):
    body = {"model": "offline-embed", "input": "x"} | more
    assert server.post(body, "/v1/embeddings")[0] == 400


def test_answers_do_not_depend_on_the_process(env: dict):
    code = f"""if True:
        import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
        import offline_model as m
        body = {ASK!r}
        request = m.check_chat_request(body)
        print(m.embed("hello cat")[:99], m.complete(request, body, m.Tempers()))"""
    runs = [
        pipe([sys.executable, "-B", "-c", code], "", env | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0].stderr == "" and "0." in runs[0].stdout
    assert runs[0].stdout == runs[1].stdout


# --- the launcher ---


def test_the_launcher_on_a_terminal(env: dict):
    elsewhere = {
        "OPENAI_API_KEY": "sk-cloud",
        "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    }
    elsewhere |= {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    with Screen([*COMMAND, "s01"], env | elsewhere) as screen:
        screen.wait_for("you> ")
        assert ABOUT in screen.text.splitlines()[0]
        screen.type("count to 2000\n")
        screen.wait_for(" 5 6 7 ")
        screen.press("ctrl-c")
        screen.wait_for("you> ")
        screen.type("my cat is Mia\n")
        screen.wait_for("your cat is Mia")
        screen.wait_for("you> ")
        screen.type("what is my cat?\n")
        screen.wait_for("cat is Mia")
        screen.wait_for("you> ")
        screen.press("ctrl-c")
        assert screen.wait_exit() == 0
        assert "Traceback" not in screen.text


def test_the_launcher_passes_the_exit_status_on(env: dict):
    env |= {"OFFLINE_PACE": "0"}
    done = pipe([*COMMAND, "s01"], "hello\n", env)
    assert (done.returncode, done.stderr) == (0, "")
    assert ABOUT in done.stdout.splitlines()[0] and "agent> Hello!" in done.stdout
    done = pipe([*COMMAND, "--model", "offline-flaky", "s01"], "one\ntwo\nthree\n", env)
    assert (done.returncode, done.stderr) == (1, "")
    assert "429" in done.stdout and 'You said: "three"' in done.stdout


def test_the_launcher_needs_no_proxy(env: dict):
    """To this machine; httpx wants a package for a SOCKS proxy, used or not."""
    proxies = {
        "ALL_PROXY": "socks5://127.0.0.1:9",
        "all_proxy": "socks5h://127.0.0.1:9",
    }
    done = pipe([*COMMAND, "s01"], "hello\n", env | proxies | {"OFFLINE_PACE": "0"})
    assert (done.returncode, done.stderr) == (0, "") and "agent> Hello!" in done.stdout


def test_the_launcher_runs_a_copy_of_ones_own(env: dict, tmp_path: Path):
    mine = tmp_path / "mine.py"
    text = next(REPO.glob("sessions/en/s01_*.py")).read_text(encoding="utf-8")
    mine.write_text(text.replace("answers; quit leaves.", "is mine."), encoding="utf-8")
    done = pipe([*COMMAND, str(mine)], "hello\n", env | {"OFFLINE_PACE": "0"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "offline is mine." in done.stdout and "agent> Hello!" in done.stdout


@pytest.fixture
def two_folders(tmp_path: Path) -> list[str]:
    """The command line of an offline model beside two folders, of one section each."""
    for folder in ("en", "next"):
        script = tmp_path / "sessions" / folder / f"s0{len(folder)}_a_section.py"
        script.parent.mkdir(parents=True)
        script.write_text(f"print('this is {folder}')\n", encoding="utf-8")
    copy = shutil.copy(SCRIPT, tmp_path / "sessions")
    return [sys.executable, str(copy)]


def test_the_launcher_runs_sessions_next(env: dict, two_folders: list[str]):
    done = pipe([*two_folders, "s02"], "", env)
    assert done.returncode == 0 and done.stdout.endswith("\nthis is en\n")
    done = pipe([*two_folders, "--next", "s04"], "", env)
    assert done.returncode == 0 and done.stdout.endswith("\nthis is next\n")


def test_unknown_sections_of_sessions_next(env: dict, two_folders: list[str]):
    done = pipe([*two_folders, "--next", "s02"], "", env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "choose from s04, check_model" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "status", "word"),
    [
        (["s99"], 2, "s01"),
        (["--next", "s99"], 2, "sessions/next"),
        (["no_such.py"], 2, "no_such.py"),
        (["agent_loop"], 2, "s01"),
        (["../s01"], 2, "s01"),
        (["--model", "gpt-9", "s01"], 2, "offline-small"),
        (["--model"], 2, "--model"),
        (["--wrong", "s01"], 2, "--port"),
        (["--port", "many"], 2, "65535"),
        (["--port=99999"], 2, "65535"),
    ],
)
def test_the_launcher_refuses_in_one_line(
    env: dict, args: list[str], status: int, word: str
):
    done = pipe([*COMMAND, *args], "", env)
    assert (done.returncode, done.stdout) == (status, "")
    assert word in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "setting", ["OFFLINE_PACE=slow", "OFFLINE_STALL=slow", "OFFLINE_PACE=inf"]
)
def test_bad_settings_are_refused_in_one_line(env: dict, setting: str):
    name, _, value = setting.partition("=")
    done = pipe([*COMMAND, "s01"], "", env | {name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert name in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken(env: dict):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args in (["--port", port], ["--port", port, "s01"]):
            done = pipe([*COMMAND, *args], "", env)
            assert (done.returncode, done.stdout) == (1, "")
            assert port in done.stderr and len(done.stderr.splitlines()) == 1


def test_it_serves_alone_and_prints_what_goes_into_dotenv(env: dict):
    with Screen([*COMMAND, "--port", "0", "--model=offline-small"], env) as screen:
        screen.wait_for("MODEL_ID=offline-small")
        assert ABOUT in screen.text.splitlines()[0]
        settings = dict(re.findall(r"^([A-Z_]+)=(\S+)$", screen.text, re.M))
        assert len(settings) == 3
        client = openai.OpenAI(
            api_key=settings["OPENAI_API_KEY"], base_url=settings["OPENAI_BASE_URL"]
        )
        answer = client.chat.completions.create(**ASK | {"model": settings["MODEL_ID"]})
        assert "stand-in" in answer.choices[0].message.content
        screen.press("ctrl-c")
        assert screen.wait_exit() == 0
        assert "Traceback" not in screen.text


def test_help_and_header(env: dict):
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "offline-flaky" in done.stdout
    scripts = [
        path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("s*.py"))
    ]
    needed = {name for text in scripts for name in requirements(text)}
    assert needed and needed <= requirements(SCRIPT.read_text(encoding="utf-8"))


def requirements(text: str) -> set[str]:
    """The dependencies of a PEP 723 header."""
    return set(re.findall(r'^#\s+"([^"]+)",$', text.partition("# ///\n")[0], re.M))
