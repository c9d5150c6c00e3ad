"""s01: three turns and everything that can go wrong in one, at the front door of each section.

Most tests ask many questions in one run: `play` gives each its own fault, asks something harmless
after it, and goes on with the rest in a new run after a crash. What is `cold` starts Python itself.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import corpora
import pytest
from corpora import delta
from corpora import envelope
from corpora import says
from fake_model import Chunks
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Html200
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from harness import SETTINGS
from harness import Screen
from harness import Section
from harness import pipe
from harness import since

KEY = "sk-very-secret-1234"
PLAIN = '{"stream": false}'
PROMPT = re.compile(r"^you> ", re.M)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STOPPED = delta("stop")


def asked(request) -> str:
    """The last thing a person said in a request."""
    return [m["content"] for m in request.messages if m["role"] == "user"][-1]


def spoken(request) -> list[tuple[str, str]]:
    """The history of a request without its system prompt."""
    return [(m["role"], m["content"]) for m in request.messages if m["role"] != "system"]


def replies(stdout: str) -> list[tuple[str, str]]:
    """What came over the pipe: each question with all that was shown before the next prompt."""
    blocks = [block.partition("\n") for block in PROMPT.split(stdout)[1:]]
    return [(q, text.strip().removeprefix("agent>").strip()) for q, _, text in blocks if q]


def play(section: Section, env: dict, questions: list[str]) -> SimpleNamespace:
    """Ask each question and a harmless one after it. Fails if a run ended before its input."""
    rest, shown, statuses, crashes = list(questions), {}, [], []
    while rest:
        done = pipe(section, "".join(f"{q}\nafter {q}\n" for q in rest), env, timeout=90)
        assert KEY not in done.stdout + done.stderr
        found = replies(done.stdout)
        shown |= dict(found)
        statuses.append(done.returncode)
        if not done.stderr and len(found) == 2 * len(rest):
            break
        last = found[-1][0].removeprefix("after ") if found else rest[0]
        crashes.append(f"{last}: {' '.join(done.stderr.splitlines()[-1:])}")
        rest = rest[rest.index(last) + 1 :]
    assert not crashes, "it ended with a traceback at:\n" + "\n".join(crashes)
    return SimpleNamespace(shown=shown, status=statuses[-1])


def script(fake_model: FakeModel, answers: dict) -> None:
    """Let the question choose the answer; any other question is answered well."""

    def answer(body: dict):
        question = str(body["messages"][-1]["content"])
        return answers.get(question, Text(f"fine: {question}"))

    fake_model.script(None, [answer], repeat=True)


def check_turns(fake_model: FakeModel, shown: dict, question: str, text: str | None = None) -> None:
    """A turn with `text` succeeded, one with None failed; the next one went well in any case."""
    reply, after = shown[question], f"after {question}"
    last = reply.rpartition("\n")[2]
    assert shown[after].endswith(f"fine: {after}"), question
    kept = question in [t for r in fake_model.chats if asked(r) == after for _, t in spoken(r)]
    if text is None:
        assert re.fullmatch(r"\[.{5,}\]", last), f"{question}: no line that says why: {reply!r}"
        assert not kept, f"{question}: taken back, yet sent again"
    else:
        assert reply.startswith(text) and (text or kept), f"{question}: {reply!r}"
        assert kept, f"{question}: answered, yet forgotten"


def env_for(fake_model: FakeModel, **more: str) -> dict[str, str]:
    return fake_model.env(**{"model": "any", "OPENAI_API_KEY": KEY} | more)


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout} s"
        time.sleep(0.01)


# --- conversations ---


@since("s01")
def test_three_turns_on_a_terminal_stream_as_they_arrive(section: Section, fake_model: FakeModel):
    gate = threading.Event()
    slow = Gate(gate, Text("eins zwei drei vier"), after_chunks=3)
    fake_model.script("any", [slow, Text("你好 👋"), Text("the third")])
    with Screen(section, env_for(fake_model), cold=True) as screen:
        screen.wait_for(PROMPT)
        screen.type("first\n")
        screen.wait_for("eins zwei")
        assert "drei" not in screen.text
        gate.set()
        screen.wait_for(" drei vier")
        for question, reply in (("zweite 你好 😀", "你好 👋"), ("third", "the third")):
            screen.wait_for(PROMPT)
            screen.type(f"{question}\n")
            screen.wait_for(f"agent> {reply}")
        screen.wait_for(PROMPT)
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
        assert "Traceback" not in screen.text and KEY not in screen.text
    assert spoken(fake_model.chats[-1]) == [
        ("user", "first"),
        ("assistant", "eins zwei drei vier"),
        ("user", "zweite 你好 😀"),
        ("assistant", "你好 👋"),
        ("user", "third"),
    ]


@pytest.mark.guard
@since("s01")
def test_three_turns_over_a_pipe(section: Section, fake_model: FakeModel):
    fake_model.script("any", [Text("eins"), Text("zwei\n\n你好 👋"), Text("drei")])
    options = {"max_tokens": 77, "reasoning_effort": "none"}
    env = env_for(fake_model, MODEL_OPTIONS=json.dumps(options))
    lines = "first\n\n   \n/nonsense here\n /tmp is 你好\nthird\nexit\nnever asked\n"
    done = pipe(section, lines, env, cold=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not CONTROL.search(done.stdout) and KEY not in done.stdout
    for text in ("agent> eins\n", "agent> zwei\n\n你好 👋\n", "agent> drei\n", "/nonsense"):
        assert text in done.stdout
    assert spoken(fake_model.chats[-1]) == [
        ("user", "first"),
        ("assistant", "eins"),
        ("user", " /tmp is 你好"),
        ("assistant", "zwei\n\n你好 👋"),
        ("user", "third"),
    ]
    for request in fake_model.chats:
        assert request.body | options == request.body
        assert (request.model, request.key) == ("any", KEY)
        assert request.body["stream"] is True


@since("s01")
def test_a_line_can_be_edited_pasted_and_called_back(section: Section, fake_model: FakeModel):
    script(fake_model, {})
    with Screen(section, env_for(fake_model)) as screen:

        def enter(*keys: str) -> str:
            screen.wait_for(PROMPT)
            for key in keys:
                screen.press(key) if key in ("left", "home", "up") else screen.type(key)
            count = len(fake_model.chats)
            screen.press("enter")
            fake_model.wait(count + 1)
            return asked(fake_model.chats[-1])

        assert enter("helo", "left", "l") == "hello"
        assert "\x1b[?2004h" in screen.raw, "the terminal was not asked to bracket pastes"
        assert enter("\x1b[200~one\ntwo\nthree\x1b[201~", " four") == "one\ntwo\nthree four"
        assert enter("two", "home", "up") == "one\ntwo\nthree four"
        assert enter(" /say it") == " /say it"
        screen.wait_for(PROMPT)
        screen.type("/nonsense\n")
        screen.wait_for(re.compile(r"/nonsense.+/nonsense", re.S))
        screen.wait_for(PROMPT)
        screen.type("\n")
        screen.wait_for(PROMPT)
        screen.type("quit\n")
        assert screen.wait_exit() == 0
    assert len(fake_model.chats) == 4


@pytest.mark.guard
@since("s01")
def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(section: Section, fake_model: FakeModel):
    gate, long = threading.Event(), Text("word " * 3000)
    script(fake_model, {"one": Gate(gate, long), "two": Gate(gate, long, after_chunks=3)})
    with Screen(section, env_for(fake_model)) as screen:
        for count, (question, shown) in enumerate({"one": "agent> ", "two": "word word"}.items()):
            screen.wait_for(PROMPT)
            screen.type(f"{question}\n")
            fake_model.wait(count + 1)
            screen.wait_for(shown)
            screen.press("ctrl-c")
        screen.wait_for(PROMPT)
        gate.set()
        wait_until(lambda: all(request.done for request in fake_model.chats))
        assert [request.aborted for request in fake_model.chats] == [True, True]
        screen.type("three\n")
        screen.wait_for("fine: three")
        screen.wait_for(PROMPT)
        screen.press("ctrl-c")
        assert screen.wait_exit() == 0
        assert "Traceback" not in screen.text
    assert spoken(fake_model.chats[-1]) == [("user", "three")]


@since("s01")
def test_bytes_and_characters_that_do_harm(section: Section, fake_model: FakeModel):
    evil = "a\x1b[2J\x1b]0;title\x07b\rc\b\x9b31m\x00d"
    answers = {
        "control": Text(evil),
        "error": Error(400, body=corpora.bare(evil)),
        "half": Text("half \ud83d end"),
        "halves": Chunks([says("\ud83d"), delta(content="\ude00"), STOPPED]),
    }
    script(fake_model, answers)
    lines = b"control\nerror\nhalf\nhalves\ncaf\xe9 \xff\xfe\n\xf0\x9f\x98\x80 \xe4\xbd\xa0\nlast\n"
    done = subprocess.run(
        [sys.executable, section.path],
        input=lines,
        capture_output=True,
        env=env_for(fake_model),
        timeout=30,
    )
    assert done.stderr == b""
    shown = replies(done.stdout.decode())
    assert not CONTROL.search("\n".join(text for _, text in shown))
    assert [(q, text) for q, text in shown if text == f"fine: {q}"] == shown[-3:]
    history = spoken(fake_model.chats[-1])
    assert history[-2][1].endswith("😀 你") and history[-1] == ("user", "last")
    assert history[-5][1].startswith("caf")
    assert [text for _, text in history if text.startswith("half ")][0].endswith(" end")


# --- what servers answer ---


@since("s01")
def test_refused_requests(section: Section, fake_model: FakeModel):
    kinds = ("fatal", "parameter")
    names = [name for name, failure in corpora.ERRORS.items() if failure.kind in kinds]
    check_errors(section, fake_model, names)


@since("s01")
def test_requests_refused_for_their_length(section: Section, fake_model: FakeModel, tmp_path: Path):
    """Each in a workspace of its own: from s03 on, a refusal teaches how small the window is."""
    for name, failure in corpora.ERRORS.items():
        if failure.kind == "overflow":
            check_errors(section, fake_model, [name], WORKSPACE_DIR=str(tmp_path / name))


@pytest.mark.guard
@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
def test_failures_are_shown_and_not_tried_again(section: Section, fake_model: FakeModel):
    kinds = ("auth", "quota", "rate", "retry")
    names = [name for name, failure in corpora.ERRORS.items() if failure.kind in kinds]
    run = check_errors(section, fake_model, names)
    assert "OPENAI_API_KEY" in run.shown["e401"]
    assert len(fake_model.chats) == 2 * len(names)


def check_errors(
    section: Section, fake_model: FakeModel, names: list[str], **env: str
) -> SimpleNamespace:
    failures = {name: corpora.ERRORS[name] for name in names}
    script(fake_model, {n: Error(f.status, f.headers, f.body) for n, f in failures.items()})
    run = play(section, env_for(fake_model, **env), names)
    for name, failure in failures.items():
        check_turns(fake_model, run.shown, name)
        lines = run.shown[name].splitlines()
        assert all(re.fullmatch(r"\[.+\]", line) for line in lines if line), run.shown[name]
        if failure.kind != "overflow":  # s03 has words of its own for it
            assert len(lines) == 1
            assert message_of(failure.body) in lines[0]
        if failure.status == 404:
            assert "MODEL_ID" in lines[0] and "OPENAI_BASE_URL" in lines[0]
    assert run.status == 1
    return run


def message_of(body: dict | str) -> str:
    """The text of an error body, whatever its shape."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return error["message"] if isinstance(error, dict) else error


ANSWERS = {
    "empty": (Text(""), None),
    "only reasoning": (Text("", reasoning="hm, hm"), None),
    "no finish": (Text("half", finish=None), None),
    "empty length": (Text("", finish="length"), None),
    "calls without calls": (Text("", finish="tool_calls"), None),
    "words without calls": (Text("words", finish="tool_calls"), "words"),
    "blocked": (Text("some", finish="content_filter"), "some"),
    "long": (Text("x" * 20_000), "x" * 20_000),
}
JSON_200 = {
    "error 200": (Json200(corpora.bare("out of credit", code=402)), None),
    "error text 200": (Json200({"error": "model not loaded"}), None),
    "null 200": (Json200(None), None),
    "list 200": (Json200([]), None),
    "number 200": (Json200(5), None),
    "no choices 200": (Json200({"choices": []}), None),
    "choices null 200": (Json200({"choices": None}), None),
    "choices a number 200": (Json200({"choices": 5}), None),
    "message null 200": (Json200({"choices": [{"message": None, "finish_reason": "stop"}]}), None),
    "html 200": (Html200(), None),
}


@since("s01")
@pytest.mark.parametrize("options", ["", PLAIN], ids=["streamed", "plain"])
def test_odd_answers(section: Section, fake_model: FakeModel, options: str):
    cases = dict(ANSWERS | JSON_200)
    for name, stream in corpora.STREAMS.items():
        alone = stream.calls or stream.broken or name == "no_created"
        if options and alone and name != "mid_error":
            continue  # these are oddities of streaming alone
        if stream.broken and section.label >= "s09" and name != "mid_error":
            continue  # those are tried three times, with seconds between
        text = None if stream.broken else "" if stream.calls else stream.text
        cases[name] = (Chunks(stream.chunks, stream.done), text)
    script(fake_model, {name: item for name, (item, _) in cases.items()})
    run = play(section, env_for(fake_model, MODEL_OPTIONS=options), list(cases))
    for name, (_, text) in cases.items():
        if text != "":  # a call: what becomes of it is a matter of the section
            check_turns(fake_model, run.shown, name, text)
    for name, note in {"length": "cut", "filter": "filter", "blocked": "filter"}.items():
        assert re.search(rf"\n\[.*{note}.*\]$", run.shown[name]), run.shown[name]
    assert "out of credit" in run.shown["error 200"]
    assert "model not loaded" in run.shown["error text 200"]
    assert "upstream died" in run.shown["mid_error"]
    for request in fake_model.chats:
        assert request.body["stream"] is (not options)
        assert not (options and "stream_options" in request.body), "only allowed when streaming"
    assert fake_model.url in run.shown["html 200"], "the line must show the wrong address"


def part(**fields) -> list:
    return [delta(**fields), says("yes"), STOPPED]


JUNK = {
    "choices null": [envelope(None), says("yes"), STOPPED],
    "choices [null]": [envelope([None]), says("yes"), STOPPED],
    "choices a number": [envelope(5), says("yes"), STOPPED],
    "choices a text": [envelope("abc"), says("yes"), STOPPED],
    "choices an object": [envelope({"a": 1}), says("yes"), STOPPED],
    "a choice that is a number": [envelope([1]), says("yes"), STOPPED],
    "delta null": [envelope([{"delta": None, "finish_reason": None}]), says("yes"), STOPPED],
    "delta a text": [envelope([{"delta": "hi", "finish_reason": None}]), says("yes"), STOPPED],
    "no delta": [envelope([{"index": 0}]), says("yes"), STOPPED],
    "content a list": part(content=["a"]),
    "content a number": part(content=7),
    "content an object": part(content={"text": "a"}),
    "refusal a number": part(refusal=7),
    "reasoning a number": part(reasoning_content=7),
    "reasoning a list": part(reasoning_content=["a"]),
    "finish a number": [says("yes"), delta(3)],
    "finish a list": [says("yes"), delta(["stop"])],
    "finish an object": [says("yes"), delta({"reason": "stop"})],
    "chunk a list": ["[1]", says("yes"), STOPPED],
    "chunk null": ["null", says("yes"), STOPPED],
    "chunk a number": ["7", says("yes"), STOPPED],
    "chunk a text": ['"hi"', says("yes"), STOPPED],
    "chunk empty": ["{}", says("yes"), STOPPED],
    "chunk too deep": ["[" * 20_000 + "]" * 20_000, says("yes"), STOPPED],
    "error null": [says("yes"), {"error": None}, STOPPED],
    "error a list": [says("yes"), {"error": [1]}, STOPPED],
    "calls a number": part(tool_calls=5),
    "calls [null]": part(tool_calls=[None]),
    "calls a text": part(tool_calls="ab"),
    "function null": part(tool_calls=[{"index": 0, "function": None}]),
    "name a number": part(tool_calls=[corpora.call(0, "c1") | {"function": {"name": 7}}]),
    "id an object": part(tool_calls=[{"index": 0, "id": {}, "function": {"name": "add"}}]),
    "index a list": part(tool_calls=[corpora.call([1], "c1", "add", "{}")]),
    "arguments a list": part(tool_calls=[corpora.call(0, "c1", "add", [1])]),
    "usage a number": [says("yes"), STOPPED, envelope([], usage=4)],
    "usage of texts": [says("yes"), STOPPED, envelope([], usage={"total_tokens": "many"})],
    "usage negative": [says("yes"), STOPPED, envelope([], usage={"total_tokens": -4})],
}


@since("s01")
def test_chunks_of_any_shape(section: Section, fake_model: FakeModel):
    script(fake_model, {name: Chunks(chunks) for name, chunks in JUNK.items()})
    run = play(section, env_for(fake_model), list(JUNK))
    for name in JUNK:
        assert run.shown[f"after {name}"].endswith(f"fine: after {name}")
        assert run.shown[name], f"{name}: nothing was said"


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
@pytest.mark.parametrize("options", ["", PLAIN], ids=["streamed", "plain"])
def test_a_connection_that_breaks(section: Section, fake_model: FakeModel, options: str):
    cases = {
        "closed": (Drop(0), ""),
        "reset": (Drop(0, "reset"), ""),
        "closed inside": (Drop(3), "you will"),
        "reset inside": (Drop(3, "reset"), "you will"),
        "silent": (Stall(0, 5), ""),
        "silent inside": (Stall(3, 5), "late but"),
    }
    script(fake_model, {name: item for name, (item, _) in cases.items()})
    env = env_for(fake_model, MODEL_OPTIONS=options, MODEL_TIMEOUT="0.5")
    run = play(section, env, list(cases))
    for name, (_, text) in cases.items():
        check_turns(fake_model, run.shown, name)
        shown = "" if options else text
        assert re.fullmatch(rf"{shown}\s*\[.+\]", run.shown[name]), run.shown[name]
        assert fake_model.url in run.shown[name]
        assert ("timed out" in run.shown[name]) == ("silent" in name)
    assert len(fake_model.chats) == 2 * len(cases)
    assert run.status == 1


GOOD = (
    b'data: {"choices":[{"delta":{"content":"good"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
JSON = b" X\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
TORN = {
    "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "no answer": b"",
    "torn headers": b"HTTP/1.1 200 OK\r\nContent-",
    "torn error": b"HTTP/1.1 500" + JSON + b'\r\n{"er',
    "torn json": b"HTTP/1.1 200" + JSON + b'\r\n{"er',
    "error not utf-8": b"HTTP/1.1 500" + JSON + b"\r\n" + b"\xff" * 9,
    "json not utf-8": b"HTTP/1.1 200" + JSON + b"\r\n" + b"\xff" * 9,
    "error no gzip": b"HTTP/1.1 401" + JSON + b"Content-Encoding: gzip\r\n\r\n" + b"x" * 9,
    "event not utf-8": EVENTS + b'\r\ndata: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
    "event no gzip": EVENTS + b"Content-Encoding: gzip\r\n\r\nno zip",
    "event torn chunk": EVENTS + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    "round in circles": b"HTTP/1.1 307 X\r\nLocation: /v1/x\r\nConnection: close\r\n\r\n",
}


@contextmanager
def raw_server(answers: dict[str, bytes]) -> Iterator[str]:
    """A server that answers with bytes, chosen by the last question; any other is answered well."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                head = b"".join(iter(reader.readline, b"\r\n"))
                if size := re.search(rb"(?i)content-length: (\d+)", head):
                    message = json.loads(reader.read(int(size[1])))["messages"][-1]
                    connection.sendall(answers.get(message["content"], EVENTS + b"\r\n" + GOOD))

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
def test_answers_that_are_no_http(section: Section, env: dict):
    with raw_server(TORN) as url:
        env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "any"}
        run = play(section, env, list(TORN))
    for name in TORN:
        assert re.fullmatch(r"\[.+\]", run.shown[name]), f"{name}: {run.shown[name]}"
        assert run.shown[f"after {name}"] == "good"


@since("s01")
@pytest.mark.parametrize("body", [{"detail": "no such route"}, [{"error": "no such route"}]])
def test_an_error_of_any_shape_is_told(section: Section, fake_model: FakeModel, body: object):
    fake_model.script("m", [Error(404, body=body)])
    done = pipe(section, "hello\n", fake_model.env("m"))
    assert "no such route" in done.stdout and "check MODEL_ID" in done.stdout


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
def test_a_server_that_is_down_is_named(section: Section, env: dict):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "any"}
    done = pipe(section, "hello\n", env)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch(rf"\[.*{re.escape(url)}.*\]", replies(done.stdout)[0][1])


# --- settings ---


def copy_alone(section: Section, folder: Path, dotenv: str = "") -> Path:
    """The script in a tree of its own, perhaps with a .env at its root."""
    target = folder / "tree" / "sessions" / "en" / section.path.name
    target.parent.mkdir(parents=True)
    shutil.copy2(section.path, target)
    if dotenv:
        (folder / "tree" / ".env").write_text(dotenv, encoding="utf-8")
    return target


@since("s01")
def test_nothing_set_up(section: Section, env: dict, tmp_path: Path):
    unset = {name: value for name, value in env.items() if name not in SETTINGS}
    done = pipe(copy_alone(section, tmp_path), "hello\n", unset, cwd=tmp_path, cold=True)
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert "OPENAI_API_KEY" in first and ".env" in first
    assert f"python sessions/offline_model.py {section.label}" in second


@since("s01")
def test_dotenv_fills_in_what_the_environment_lacks(
    section: Section, env: dict, fake_model: FakeModel, tmp_path: Path
):
    lines = f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL={fake_model.url}\nMODEL_ID=from-file\n"
    copy = copy_alone(section, tmp_path, lines)
    unset = {name: value for name, value in env.items() if name not in SETTINGS}
    script(fake_model, {})
    unset["MODEL_ID"] = "from-environment"
    done = pipe(copy, "hello\n", unset, cwd=tmp_path, cold=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fine: hello" in done.stdout and KEY not in done.stdout
    request = fake_model.chats[0]
    assert (request.model, request.key) == ("from-environment", KEY)


START_EACH = """
import json, os, runpy, sys
for settings in json.loads(sys.argv[2]):
    os.environ.update(settings)
    try:
        runpy.run_path(sys.argv[1], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = [type(error).__name__]
    print("\\n" + json.dumps(code))
"""
WRONG = [
    ("OPENAI_API_KEY", ""),
    ("OPENAI_API_KEY", "  "),
    ("OPENAI_API_KEY", "sk-\u201cquoted\u201d"),
    ("MODEL_ID", ""),
    ("MODEL_OPTIONS", "{broken"),
    ("MODEL_OPTIONS", '["a"]'),
    ("MODEL_OPTIONS", "null"),
    ("MODEL_TIMEOUT", "soon"),
    ("MODEL_TIMEOUT", "-1"),
    ("MODEL_TIMEOUT", "nan"),
    ("MODEL_TIMEOUT", "inf"),
    ("OPENAI_BASE_URL", "http://localhost:port/v1"),
]


@since("s01")
def test_settings_that_are_wrong(section: Section, env: dict):
    right = {"OPENAI_API_KEY": KEY, "MODEL_ID": "any", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    right |= {"MODEL_OPTIONS": "", "MODEL_TIMEOUT": ""}
    cases = json.dumps([right | {name: value} for name, value in WRONG])
    done = pipe([sys.executable, "-c", START_EACH, str(section.path), cases], "", env)
    codes = [json.loads(line) for line in done.stdout.splitlines() if re.match(r'[0"\[]', line)]
    assert len(codes) == len(WRONG), done.stdout + done.stderr
    assert KEY not in done.stdout
    bad = []
    for (name, value), code in zip(WRONG, codes, strict=True):
        lines = 2 if name in ("OPENAI_API_KEY", "MODEL_ID") else 1
        if not (isinstance(code, str) and name in code and len(code.splitlines()) == lines):
            bad.append(f"{name}={value!r}: {code!r}")
    assert not bad, "no message that names the setting:\n" + "\n".join(bad)


@since("s01", until="s08")
def test_a_long_error_page_hides_neither_address_nor_hint(section, fake_model):
    page = f"<html><style>{'p {margin: 0} ' * 80}</style></html>"
    fake_model.script("m", [Error(404, body=page)])
    done = pipe(section, "hi\n", fake_model.env("m"))
    assert "/chat/completions" in done.stdout
    assert "check MODEL_ID" in done.stdout


@since("s01")
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_an_env_file_in_another_encoding(section, env, tmp_path, encoding):
    home = tmp_path / "repo" / "sessions" / "en"
    home.mkdir(parents=True)
    (tmp_path / "repo" / ".env").write_bytes("MODEL_ID=müller\n".encode(encoding))
    script = home / section.path.name
    script.write_bytes(section.path.read_bytes())
    done = subprocess.run(
        [sys.executable, str(script)], input="", env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ".env" in done.stderr
