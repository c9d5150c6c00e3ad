"""The trace: what a person sees of requests and answers, and what the section gets."""

import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import COLUMNS
from harness import FOLDER
from harness import REPO
from harness import Screen
from harness import pipe
from harness import width

SCRIPT = REPO / "sessions" / "trace.py"
COMMAND = [sys.executable, str(SCRIPT)]
OFFLINE = [*COMMAND, "--offline"]
KEY = "sk-a-key-that-nobody-may-see"
BAR = "  │ "
CSI = "\x1b["

ASK = """
import json, os, sys, urllib.request

def ask(*texts, system="", path="/chat/completions", **more):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": r, "content": t} for r, t in zip(roles, texts)]
    body = more or {"messages": messages}
    body["model"] = body.get("model", "offline")
    url = os.environ["OPENAI_BASE_URL"] + path
    headers = {"Authorization": "Bearer offline", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))
"""


@pytest.fixture
def quick(env: dict[str, str]) -> dict[str, str]:
    """The environment of an offline model that does not pause between words."""
    return env | {"OFFLINE_PACE": "0"}


class Server(ThreadingHTTPServer):
    """A model's server that answers with one of `answers` after the other."""

    def __init__(self, answers: list[Callable[["Handler"], None]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.heads: list[dict[str, str]] = []  # of the requests


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        head = {name.lower(): value for name, value in self.headers.items()}
        self.server.heads.append(head)
        self.server.answers.pop(0)(self)

    def send(self, status: int, body: str, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()

    def event(self, finish: str | None = None, **delta: object) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        data = json.dumps({"choices": [choice]})
        self.wfile.write(f"data: {data}\n\n".encode())

    def done(self) -> None:
        self.wfile.write(b"data: [DONE]\n\n")

    def reset(self) -> None:
        """Break the connection off."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


@pytest.fixture
def serve(env: dict[str, str]) -> Iterator[Callable[..., tuple[Server, dict]]]:
    """Start a server with these answers; returns it and the environment for it."""
    running = []

    def start(*answers: Callable[[Handler], None]) -> tuple[Server, dict]:
        server = Server(list(answers))
        running.append(server)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        more = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "m"}
        return server, env | more

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def say(text: str) -> Callable[[Handler], None]:
    """An answer of these words, streamed."""

    def answer(handler: Handler) -> None:
        handler.begin_stream()
        handler.event(content=text)
        handler.event("stop")
        handler.done()

    return answer


def shown(text: str) -> str:
    """What stands behind the bar, with single blanks."""
    lines = []
    for line in text.splitlines():
        if line.startswith(BAR):
            lines.append(" ".join(line.removeprefix(BAR).split()))
    return "\n".join(lines)


def without_times(text: str) -> str:
    return re.sub(r"after \d+\.\d s", "after N s", text)


# --- what it shows ---


def test_a_tool_turn(quick: dict[str, str]):
    done = pipe([*OFFLINE, "s02"], "what is in SOUL.md?\nmy name is Ann\n", quick)
    assert done.returncode == 0
    assert "│" not in done.stdout and "agent> Noted: your name is Ann." in done.stdout
    text = without_times(shown(done.stderr))
    call = re.search(r"\[(call_\w+)\]", text)[1]
    assert "request 1: 1 message, 1 new; " in text
    tools = "; tools: read_file, write_file, edit_file, bash\n"
    assert tools in text.replace(",\n", ", ").replace("tools:\n", "tools: ")
    for part in [
        "user what is in SOUL.md?\nanswer 1: HTTP 200 after N s; ",
        f'tool call read_file {{"path": "SOUL.md"}} [{call}]\nrequest 2: 3 messages, ',
        f"tool [result of {call}] # Soul",
        "assistant read_file says: # Soul",
        "request 3: 5 messages, 2 new; ",
        "user my name is Ann\nanswer 3: HTTP 200 after N s; ",
    ]:
        assert part in text
    assert "finish_reason: tool_calls" in text and "finish_reason: stop" in text
    assert "tools as before" in text
    assert text.count("user what is in SOUL.md?") == 1


def test_new_is_new_in_this_conversation(quick: dict[str, str], tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text(f"""{ASK}
ask("one"); ask("other"); ask("one", "Hm.", "one"); ask("one", "Hm.", "one")
ask("one", system="A"); ask("one", "Hm.", "two", system="B")
ask(messages=[dict(role="user", content="hi")], max_tokens=5)
""")
    done = pipe([*OFFLINE, str(script)], "", quick)
    assert (done.returncode, done.stdout) == (0, "")
    text = shown(done.stderr)
    found = re.findall(r"request \d: (\d) messages?, (\d) new", text)
    assert " ".join("".join(pair) for pair in found) == "11 11 32 30 22 43 11"
    assert "system A\nuser one" in text and "system B\nassistant Hm." in text
    assert "; max_tokens: 5; model as before" in text


def test_tokens_are_counted(quick: dict[str, str], tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text(f"{ASK}\nprint(ask('hello')['usage']['prompt_tokens'])")
    done = pipe([*OFFLINE, str(script)], "", quick)
    assert f"; {done.stdout.strip()} tokens in, " in done.stderr


def test_other_requests_are_one_line(quick: dict[str, str], tmp_path: Path):
    script = tmp_path / "mine.py"
    body = 'path="/embeddings", model="offline-embed", input=["a", "b"]'
    script.write_text(f"{ASK}\nprint(len(ask({body})['data']))")
    done = pipe([*OFFLINE, "--save", str(tmp_path / "t.jsonl"), str(script)], "", quick)
    assert (done.returncode, done.stdout) == (0, "2\n")
    lines = shown(done.stderr).splitlines()[1:]
    assert len(lines) == 1 and re.fullmatch(
        r"request 1: /v1/embeddings, [\d,]+ bytes; "
        r"answer: HTTP 200 after \d\.\d s, [\d,]+ bytes",
        lines[0],
    )
    assert json.loads((tmp_path / "t.jsonl").read_text())["request"]["input"]


def test_long_texts_are_cut_unless_full(quick: dict[str, str]):
    question = f"my list is {'word ' * 200}end"
    for option, lines in (["--full"], range(12, 20)), ([], range(5, 6)):
        done = pipe([*OFFLINE, *option, "s01"], f"{question}\n", quick)
        text = shown(done.stderr)
        asked = text[text.index("user my list") : text.index("answer 1")]
        assert len(asked.splitlines()) in lines
        assert ("word end" in asked) == bool(option)
        assert ("(1,014 characters)" in asked) != bool(option)


def test_what_a_model_says_does_not_steer_the_terminal(serve: Callable):
    text = "a\x1b[2Jb\x07c\x9bd\u202ee\r\u2028👍🏽"
    _, env = serve(say(text))
    done = pipe([*COMMAND, "--full", "s01"], "hi\n", env)
    found = shown(done.stderr)
    assert r"assistant a\x1b[2Jb\x07c\x9bd\u202ee\r\u202" in found and "👍🏽" in found
    assert not any(sign in done.stderr for sign in "\x1b\x07\x9b\u202e\r\u2028")


def test_lines_fit_the_terminal(quick: dict[str, str]):
    with Screen([*OFFLINE, "s01"], quick) as screen:
        screen.wait_for("you> ")
        for text in ("repeat " + "你好" * 60, "repeat " + "一 two 三四 " * 20):
            screen.type(text + "\n")
            screen.wait_for("finish_reason: stop")
            screen.wait_for("you> ")
        lines = screen.text.splitlines()
    barred = [line for line in lines if line.startswith(BAR)]
    widths = [sum(map(width, line)) for line in barred]
    assert len(barred) > 8 and COLUMNS - 12 < max(widths) <= COLUMNS


# --- where it shows it ---


def test_on_a_terminal_it_has_colours_and_spares_the_prompt(quick: dict[str, str]):
    with Screen([*OFFLINE, "s02"], quick) as screen:
        screen.wait_for("you> ")
        screen.type("my name is Ann\n")
        screen.wait_for("request 1")
        screen.wait_for("\nNoted: your name is Ann.\n")
        screen.wait_for("answer 1")
        screen.wait_for("assistant  Noted: your name is Ann.\n")
        screen.wait_for("\nyou> ")
        assert f"{CSI}36mrequest 1" in screen.raw and f"{CSI}32manswer 1" in screen.raw
        assert screen.paper.rstrip().endswith("\nyou>")
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0


def test_no_colour_where_none_is_wanted(quick: dict[str, str], tmp_path: Path):
    with Screen([*OFFLINE, "s01"], quick | {"NO_COLOR": "1"}) as screen:
        screen.wait_for("you> ")
        screen.type("hello\n")
        screen.wait_for("answer 1")
        screen.wait_for("you> ")
        assert not re.search(r"\x1b\[[\d;]*m", screen.raw)
    file = tmp_path / "trace.txt"
    with Screen([*OFFLINE, "--to", str(file), "s01"], quick) as screen:
        screen.wait_for("you> ")
        screen.type("hello\n")
        screen.wait_for("agent> Hello!")
        screen.wait_for("you> ")
        text = file.read_text(encoding="utf-8")
        assert "answer 1" in text and CSI not in text
        assert "│" not in screen.text


def test_saved_lines(serve: Callable, tmp_path: Path):
    def refuse(handler: Handler) -> None:
        handler.send(401, json.dumps({"error": {"message": f"bad key: {KEY}"}}))

    server, env = serve(say("Good day."), refuse)
    file = tmp_path / "t.jsonl"
    done = pipe([*COMMAND, "--save", str(file), "s01"], "one\ntwo\n", env)
    text = file.read_text(encoding="utf-8")
    first, second = map(json.loads, text.splitlines())
    assert first["request"]["messages"] == [{"role": "user", "content": "one"}]
    assert first["response"][0]["choices"][0]["delta"] == {"content": "Good day."}
    assert first["status"] == 200 and 0 <= first["seconds"] < 30
    assert second["status"] == 401
    assert second["response"] == [{"error": {"message": "bad key: [API key]"}}]
    for head in server.heads:
        assert head["authorization"] == f"Bearer {KEY}"
        assert head["host"] == f"127.0.0.1:{server.server_port}"
        assert head["accept-encoding"] == "identity"
    assert len(server.heads) == 2
    assert KEY not in text + done.stderr
    assert "answer 2: HTTP 401" in done.stderr and "bad key: [API key]" in done.stderr
    assert "401" in done.stdout


# --- what it passes on ---


def test_pieces_are_passed_on_at_once(serve: Callable):
    """The server sends its second word only after the first is on the screen."""
    seen = threading.Event()

    def answer(handler: Handler) -> None:
        handler.begin_stream()
        handler.event(content="First")
        if seen.wait(10):
            handler.event(content=", second")
        handler.event("stop")
        handler.done()

    _, env = serve(answer)
    with Screen([*COMMAND, "s01"], env) as screen:
        screen.wait_for("you> ")
        screen.type("hi\n")
        screen.wait_for("First")
        assert "answer 1" not in screen.text
        seen.set()
        screen.wait_for(", second")
        screen.wait_for("answer 1")
        screen.wait_for("assistant  First, second")


def test_one_answer_that_is_not_streamed(serve: Callable):
    message = {"role": "assistant", "content": "All at once: data: [DONE]"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1234, "completion_tokens": 5}
    body = json.dumps({"choices": [choice], "usage": usage})
    _, env = serve(lambda handler: handler.send(200, body))
    env |= {"MODEL_OPTIONS": '{"stream": false}'}
    done = pipe([*COMMAND, "s01"], "hi\n", env)
    assert "agent> All at once: data: [DONE]\n" in done.stdout
    assert "1,234 tokens in, 5 out; finish_reason: stop" in done.stderr
    assert "assistant  All at once: data: [DONE]\n" in done.stderr


def test_a_dropped_connection_is_dropped(serve: Callable):
    def drop_late(handler: Handler) -> None:
        handler.begin_stream()
        handler.event(content="Hel")
        handler.reset()

    _, env = serve(drop_late, Handler.reset, say("Fine."))
    done = pipe([*COMMAND, "s01"], "one\ntwo\nthree\n", env)
    assert done.stdout.count("Connection error") == 2 and "agent> Fine." in done.stdout
    text = without_times(shown(done.stderr))
    dropped = "the server dropped the connection after N s\n"
    assert f"answer 1: {dropped}" in text
    assert f"answer 2: {dropped}request 3" in text


def test_a_server_that_is_down(env: dict[str, str]):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"http://127.0.0.1:{gone.getsockname()[1]}"
    env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"{address}/v1", "MODEL_ID": "m"}
    done = pipe([*COMMAND, "s01"], "hi\n", env)
    assert done.returncode == 1
    assert f"{address} cannot be reached" in done.stdout
    assert f"answer 1: {address} cannot be reached: " in shown(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (
            '{"error": {"message": "no money"}}',
            'error {"error": {"message": "no money"',
        ),
        ('{"choices": 5}', "exchange 1 cannot be shown"),
        ("not JSON", 'error "not JSON"'),
        ("", 'error ""'),
    ],
)
def test_odd_answers_are_passed_on(serve: Callable, body: str, seen: str):
    _, env = serve(lambda handler: handler.send(200, body), say("Fine."))
    done = pipe([*COMMAND, "s01"], "one\ntwo\n", env)
    assert "Traceback" not in done.stderr and "agent> Fine." in done.stdout
    assert seen in shown(done.stderr) and "request 2" in done.stderr


def test_tool_calls_and_thoughts_as_servers_send_them(serve: Callable):
    def answer(handler: Handler) -> None:
        handler.begin_stream()
        handler.event(reasoning="I wonder", tool_calls=None)
        for index, text in enumerate(("one", "two")):
            function = {"name": text, "arguments": ""}
            call = {"index": index, "id": f"id-{text}", "function": function}
            handler.event(tool_calls=[call])
            for piece in ('{"a"', ": 1}"):
                rest = {"index": index, "function": {"arguments": piece}}
                handler.event(tool_calls=[rest])
        handler.event("tool_calls")
        handler.done()

    _, env = serve(answer)
    text = shown(pipe([*COMMAND, "s01"], "hi\n", env).stderr)
    assert "thoughts I wonder\ntool call one" in text
    assert 'one {"a": 1} [id-one]\ntool call two {"a": 1} [id-two]' in text


# --- how it starts and ends ---


def test_ctrl_c_is_the_sections(env: dict[str, str]):
    with Screen([*OFFLINE, "s01"], env | {"OFFLINE_PACE": "0.02"}) as screen:
        screen.wait_for("you> ")
        screen.type("count to 2000\n")
        screen.wait_for(" 5 6 7 ")
        screen.press("ctrl-c")
        screen.wait_for("[stopped]")
        screen.wait_for("you> ")
        screen.type("my name is Ann\n")
        screen.wait_for("Noted: your name is Ann.")
        screen.wait_for("answer 2")
        screen.wait_for("you> ")
        screen.press("ctrl-c")
        assert screen.wait_exit() == 0
        assert "answer 1: the section hung up after" in screen.text
        assert "Traceback" not in screen.text


def test_the_exit_status_is_the_sections(quick: dict[str, str], tmp_path: Path):
    script = tmp_path / "mine.py"
    script.write_text("import sys\nsys.exit(int(sys.argv[1]))")
    assert pipe([*OFFLINE, str(script), "7"], "", quick).returncode == 7
    done = pipe([*COMMAND, "--model", "offline-flaky", "s01"], "a\nb\n", quick)
    assert done.returncode == 1 and "answer 2: HTTP 429" in done.stderr


def test_a_section_of_sessions_next(quick: dict[str, str], tmp_path: Path):
    folder = tmp_path / "sessions" / "next"
    folder.mkdir(parents=True)
    for path in (SCRIPT, SCRIPT.with_name("offline_model.py")):
        shutil.copy(path, folder.parent)
    (folder / "s04_new.py").write_text("print('this is next')")
    command = [sys.executable, str(folder.parent / "trace.py"), "--offline", "--next"]
    done = pipe([*command, "s04"], "", quick)
    assert (done.returncode, done.stdout) == (0, "this is next\n")
    done = pipe([*command, "s01"], "", quick)
    assert done.returncode == 2 and "choose from s04, check_model" in done.stderr


@pytest.mark.parametrize(
    ("args", "url", "word"),
    [
        (["s99"], "", "s01"),
        ([], "", "--help"),
        (["--model", "gpt-9", "s01"], "", "offline-small"),
        (["--save", "no/such/folder/t.jsonl", "s01"], "", "no/such/folder"),
        (["s01"], "127.0.0.1:9/v1", "http://"),
    ],
)
def test_it_refuses_in_one_line(
    env: dict[str, str], args: list[str], url: str, word: str
):
    done = pipe([*COMMAND, *args], "", env | {"OPENAI_BASE_URL": url})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("trace.py: ") and word in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_key_the_section_says_so(env: dict[str, str]):
    done = pipe([*COMMAND, "s01"], "", env)
    assert done.returncode == 1 and "OPENAI_API_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_header(env: dict[str, str]):
    done = pipe([*COMMAND, "--help"], "", env)
    assert done.returncode == 0 and "--save FILE" in done.stdout
    header = SCRIPT.read_text(encoding="utf-8").partition("# ///\n")[0]
    for script in [SCRIPT.with_name("offline_model.py"), *sorted(FOLDER.glob("s*.py"))]:
        text = script.read_text(encoding="utf-8").partition("# ///\n")[0]
        for name in re.findall(r'^#\s+"([^"]+)",$', text, re.M):
            assert f'"{name}"' in header, os.fspath(script)
