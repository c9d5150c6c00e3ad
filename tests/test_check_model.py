"""Will my model work: the verdicts say what the sections do on the same server."""

import io
import itertools
import json
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from collections.abc import Collection
from contextlib import redirect_stderr
from contextlib import redirect_stdout
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import corpora
import pytest
from conftest import Offline
from fake_model import Chunks
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Html200
from fake_model import Item
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_model import fold
from harness import NEXT
from harness import REPO
from harness import Screen
from harness import load
from harness import pipe
from harness import sections

SCRIPT = REPO / "sessions" / "check_model.py"
OFFLINE = [sys.executable, str(REPO / "sessions" / "offline_model.py")]
S01, S02, *_ = sections(NEXT)
LABELS = [f"s{number:02}" for number in range(1, 11)]
CHECK_NAMES = [
    "reachable",
    "plain answer",
    "long answer",
    "offering tools",
    "tool call",
    "parallel calls",
    "number argument",
    "nested arguments",
    "summary",
    "context",
    "system prompt",
    "embeddings",
    "two at once",
    "oddities",
]
NUMBERS = " ".join(map(str, range(1, 61)))
UNKNOWN_WINDOW = (
    "yes, but CONTEXT_TOKENS is 128,000, and the server does not say: --context"
)
NO_TOOLS = "yes, but without tools: no files, commands, notes, skills"


@dataclass
class Report:
    """What a run has shown: of each check its mark and text, and the verdicts."""

    status: int
    text: str
    checks: dict[str, tuple[str, str]] = field(default_factory=dict)
    verdicts: dict[str, str] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        joined = re.sub(r"\n {18,}", " ", self.text)
        for line in joined.splitlines():
            if match := re.fullmatch(r"(s\d\d) [a-z ]{17}(.*)", line):
                self.verdicts[match[1]] = match[2]
            elif match := re.fullmatch(r"([a-z ]{17})(\w+) +(\S.*)", line):
                self.checks.setdefault(match[1].strip(), (match[2], match[3]))
            elif match := re.fullmatch(r"([A-Z_]+)=(.*)", line):
                self.lines[match[1]] = match[2]
        rows = self.text.partition("\n\n")[2].splitlines()
        assert max(map(len, rows)) < 80, self.text


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load(SCRIPT)


@pytest.fixture
def run(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Report]:
    """Runs the script's main() in this process, in the given environment."""
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    every_check = module.CHECKS

    def run(
        env: dict[str, str], *args: str, only: Collection[str] = CHECK_NAMES
    ) -> Report:
        checks = [check for check in every_check if check.name in only]
        monkeypatch.setattr(module, "CHECKS", checks)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        out, told = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with redirect_stdout(out), redirect_stderr(told):
            status = module.main()
        out.seek(0)
        assert not told.getvalue()
        return Report(status, out.read())

    return run


def by_process(command: list, env: dict[str, str], *args: str) -> Report:
    done = pipe(command, "", env, args)
    assert not done.stderr
    return Report(done.returncode, done.stdout)


BOOKED = {
    "guests": 4,
    "outside": True,
    "guest": {"name": "Ada"},
    "wishes": ["a window"],
}


def answer(body: dict) -> Item:
    """What a good model answers to each check."""
    messages = body["messages"]
    asked = max(i for i, message in enumerate(messages) if message["role"] == "user")
    text = messages[asked]["content"]
    files = re.findall(r"\w+\.txt", text.rpartition("\n")[2])
    if results := [m["content"] for m in messages[asked:] if m["role"] == "tool"]:
        return Text("It says: " + " ".join(results))
    if files and body.get("tools"):
        lines = {"offset": 1, "limit": 1} if "line 1" in text else {}
        return ToolCalls([("read_file", {"path": name} | lines) for name in files])
    if "Book a table" in text:
        return ToolCalls([("book_table", BOOKED)])
    if "code word" in text and len(messages) > 1:
        told = re.search(r"word is (\w+)", messages[0]["content"])
        return Text(f"It is {told[1]}." if told else "I do not know.")
    answers = {"Count to 60": NUMBERS, "cat is Miso": "The cat is Miso, the dog Rex."}
    answers |= {"Who are you": "I am Luna.", "": "Four."}
    told = next(told for words, told in answers.items() if words in text)
    return Text(told, pieces=[told[:9], told[9:]])


def serve(
    fake: FakeModel, item: Callable[[dict], Item] = answer, **more: str
) -> dict[str, str]:
    """Answer each request by a function; the environment for it."""
    fake.script("m", [item], repeat=True)
    return fake.env("m", **more)


def refusing(word: str, message: str, status: int = 400) -> Callable[[dict], Item]:
    """A server that refuses each request that has a key."""
    failure = Error(status, body=corpora.error(message, type=corpora.INVALID))
    return lambda body: failure if body.get(word) else answer(body)


def together(fake: FakeModel, second: Item | None = None) -> Callable[[dict], Item]:
    """A server that answers the first of two requests when both are there."""
    both = threading.Event()

    def respond(body: dict) -> Item:
        if "+ 1" not in body["messages"][-1]["content"]:
            return answer(body)
        if sum("+ 1" in chat.messages[-1]["content"] for chat in fake.chats) == 2:
            both.set()
            return second or answer(body)
        return Gate(both, answer(body))

    return respond


def changing(
    change: Callable[[dict], None], at_calls: bool = True
) -> Callable[[dict], Item]:
    """A server that streams each piece of a tool call, or each chunk, with a change."""

    def respond(body: dict) -> Item:
        chunks = answer(body).chunks()
        for chunk in chunks:
            for choice in chunk["choices"]:
                for part in (
                    choice["delta"].get("tool_calls", ()) if at_calls else [choice]
                ):
                    change(part)
        return Chunks(chunks)

    return respond


# --- the offline model ---


def test_the_offline_model_runs_it(env: dict):
    report = by_process([*OFFLINE, "check_model"], env | {"OFFLINE_PACE": "0"})
    assert report.status == 0
    assert [*report.verdicts] == LABELS
    told = report.checks["plain answer"][1]
    assert told.startswith("an answer came: 'You said: ") and told.endswith("...'")
    assert report.verdicts.pop("s03").startswith(UNKNOWN_WINDOW)
    assert set(report.verdicts.values()) == {"yes"}
    assert not report.lines
    last_line = report.text.splitlines()[-1]
    assert re.fullmatch(r"13 requests, about 3,\d\d\d tokens sent\.", last_line)


@pytest.mark.parametrize("temper", ["offline", "offline-small", "offline-clumsy"])
def test_tempers_with_context(offline: Offline, run: Callable, temper: str):
    settings = {
        "MODEL_ID": temper,
        "CONTEXT_TOKENS": "5000",
        "EMBEDDING_MODEL": "offline-embed",
    }
    report = run(offline.env | settings, "--context")
    assert report.status == 0
    assert report.checks["parallel calls"] == ("ok", "two calls at once")
    assert report.checks["embeddings"] == ("ok", "vectors of 256 numbers")
    expected = dict.fromkeys(LABELS, "yes")
    if temper == "offline-small":
        size = "a conversation of about 4,319 tokens"
        told = f"{size} is refused, for a window of 4,096 tokens: section 3 makes room"
        expected["s03"] = f"yes, the section copes: {told}"
    elif temper == "offline-clumsy":
        odd = "arguments that are no JSON; calls without an id; "
        odd += "finish_reason is not tool_calls"
        expected["s02"] = f"yes, the section copes: {odd}"
    assert report.verdicts == expected
    assert report.lines == (
        {"CONTEXT_TOKENS": "4096"} if temper == "offline-small" else {}
    )


def test_the_flaky_temper(env: dict, run: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OFFLINE_STALL", "3")
    server = load(REPO / "sessions" / "offline_model.py").serve(pace=0)
    try:
        settings = {"OPENAI_API_KEY": "offline", "OPENAI_BASE_URL": server.url}
        settings |= {"MODEL_ID": "offline-flaky", "MODEL_TIMEOUT": "1"}
        report = run(env | settings)
    finally:
        server.shutdown()
        server.server_close()
    assert report.status == 1
    assert report.checks["plain answer"][0] == "ok"
    assert "\nFailed, and made again: 8 (HTTP 429, " in report.text
    assert "unclear" in {mark for mark, _ in report.checks.values()}
    assert not any(verdict.startswith("no") for verdict in report.verdicts.values())


# --- a good server ---


def test_a_good_model(fake_model: FakeModel, run: Callable):
    report = run(serve(fake_model, together(fake_model)))
    assert report.status == 0
    assert report.verdicts.pop("s03").startswith(UNKNOWN_WINDOW)
    assert set(report.verdicts.values()) == {"yes"}
    assert report.checks["number argument"] == ("ok", "it came as a number")
    assert report.checks["long answer"] == ("ok", "60 numbers came whole, in 4 chunks")
    assert report.checks["nested arguments"][0] == "ok"
    assert {mark for mark, _ in report.checks.values()} == {"ok", "but"}
    assert len(fake_model.chats) == 13


def test_nested_arguments_of_other_types_are_told(fake_model: FakeModel, run: Callable):
    def respond(body: dict) -> Item:
        odd = BOOKED | {"guests": "4", "wishes": "a window"}
        is_booking = "Book a table" in body["messages"][-1]["content"]
        return ToolCalls([("book_table", odd)]) if is_booking else together_with(body)

    together_with = together(fake_model)
    report = run(serve(fake_model, respond))
    mark, told = report.checks["nested arguments"]
    assert mark == "but" and "wishes Input should be a valid list" in told
    assert "guests" not in told, "section 2 takes a number that came as text"
    assert report.status == 0 and report.verdicts["s02"] == "yes", (
        "no section needs them"
    )


def test_the_window_that_a_server_tells(fake_model: FakeModel, run: Callable):
    models = [{"id": "m", "max_model_len": 8192}]
    fake_model.script("", [Json200({"data": models})], repeat=True)
    report = run(serve(fake_model))
    assert (
        report.verdicts["s03"]
        == "yes, but CONTEXT_TOKENS is 128,000, and the server says 8,192"
    )
    assert report.lines == {"CONTEXT_TOKENS": "8192"}
    assert run(serve(fake_model, CONTEXT_TOKENS="8192")).verdicts["s03"] == "yes"


def test_the_window_of_the_only_model(fake_model: FakeModel, run: Callable):
    """llama.cpp lists its model by another name than the one that it is asked for."""
    models = [{"id": "/models/tiny.gguf", "meta": {"n_ctx": 4096, "n_ctx_train": 8192}}]
    fake_model.script("", [Json200({"data": models})], repeat=True)
    report = run(serve(fake_model), only=("reachable", "context"))
    assert report.lines == {"CONTEXT_TOKENS": "4096"}


def test_a_window_that_drops_silently(fake_model: FakeModel, run: Callable):
    def forgetful(body: dict) -> Item:
        if len(json.dumps(body["messages"])) < 8000:
            return answer(body)
        return Text("You told me no word.", usage={"prompt_tokens": 1990})

    report = run(serve(fake_model, forgetful, CONTEXT_TOKENS="8000"), "--context")
    assert report.status == 1
    assert re.fullmatch(
        r"no: .* silently dropped all but 1,990", report.verdicts["s03"]
    )
    assert report.verdicts["s10"] == "yes, but long conversations go wrong (see s03)"
    assert report.lines == {"CONTEXT_TOKENS": "1990"}


def test_a_model_that_only_forgets(fake_model: FakeModel, run: Callable):
    def weak(body: dict) -> Item:
        return Text("What word?") if len(body["messages"]) > 9 else answer(body)

    report = run(serve(fake_model, weak, CONTEXT_TOKENS="8000"), "--context")
    start = "unclear: asked for the first words of a conversation of about 6,"
    assert report.verdicts["s03"].startswith(start)
    assert report.verdicts["s03"].endswith("it said 'What word?'")
    later = "yes, but perhaps long conversations go wrong (see s03)"
    assert report.verdicts["s04"] == later
    assert report.status == 1 and not report.lines


NOTHING = {
    "no event": Chunks([]),
    "no text": Chunks(corpora.STREAMS["empty_200"].chunks),
    "no end": Chunks([corpora.says("")], done=False),
}


@pytest.mark.parametrize("name", NOTHING)
def test_an_empty_stream_is_no_report_of_overflow(
    fake_model: FakeModel,
    run: Callable,
    name: str,
):
    def full(body: dict) -> Item:
        return NOTHING[name] if len(body["messages"]) > 9 else answer(body)

    only = ("reachable", "plain answer", "context")
    report = run(serve(fake_model, full, CONTEXT_TOKENS="8000"), "--context", only=only)
    assert report.verdicts["s03"].startswith("no: overflow is not reported: a conver")
    assert "CONTEXT_TOKENS must not be more than" in report.verdicts["s03"]
    assert report.verdicts["s10"] == "yes, but long conversations go wrong (see s03)"
    assert len(fake_model.chats) == 2, "it costs much, and is asked once"


def test_an_overflow_in_words_that_section_3_does_not_know(
    fake_model: FakeModel,
    run: Callable,
):
    def full(body: dict) -> Item:
        error = Error(400, body=corpora.error("that is more than I can take"))
        return error if len(body["messages"]) > 9 else answer(body)

    only = ("reachable", "plain answer", "context")
    report = run(serve(fake_model, full, CONTEXT_TOKENS="8000"), "--context", only=only)
    assert "fails, not as an overflow: HTTP 400" in report.verdicts["s03"]


def test_the_window_that_an_error_states(
    fake_model: FakeModel,
    run: Callable,
):
    failure = corpora.ERRORS["llamacpp"]

    def full(body: dict) -> Item:
        error = Error(failure.status, body=failure.body)
        return error if len(body["messages"]) > 9 else answer(body)

    only = ("reachable", "plain answer", "context")
    report = run(
        serve(fake_model, full, CONTEXT_TOKENS="20000"), "--context", only=only
    )
    assert report.status == 0
    assert report.lines == {"CONTEXT_TOKENS": "8192"}


OVERFLOWS = [
    name for name, failure in corpora.ERRORS.items() if failure.kind == "overflow"
]


@pytest.mark.parametrize("name", OVERFLOWS[::2])
def test_every_overflow_is_known_as_one(
    fake_model: FakeModel, run: Callable, name: str
):
    failure = corpora.ERRORS[name]
    error = Error(failure.status, failure.headers, failure.body)
    full = lambda body: error if len(body["messages"]) > 9 else answer(body)  # noqa: E731
    report = run(serve(fake_model, full, CONTEXT_TOKENS="20000"), "--context")
    assert report.verdicts["s03"].startswith("yes, the section copes: ")
    told = int(report.lines.get("CONTEXT_TOKENS", 0))
    assert not told or re.search(rf"\b{told}\b", json.dumps(failure.body))


# --- no server, no key, no model ---


def test_no_server(env: dict, run: Callable):
    settings = {
        "OPENAI_API_KEY": "k",
        "MODEL_ID": "m",
        "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
    }
    report = run(env | settings)
    assert report.status == 1
    assert report.verdicts["s01"].startswith("no: Connection error.")
    assert report.checks["plain answer"] == ("skipped", "because of: reachable")
    assert report.text.endswith("\n0 requests, about 0 tokens sent.\n")


def test_wrong_key(offline: Offline, run: Callable):
    report = run(offline.env | {"OPENAI_API_KEY": "wrong"})
    assert report.checks["reachable"][0] == "no"
    assert report.verdicts["s01"].startswith("no: HTTP 401")
    assert "check OPENAI_API_KEY" in report.verdicts["s01"]


def test_wrong_model(offline: Offline, run: Callable):
    report = run(offline.env | {"MODEL_ID": "offlin"})
    assert "it does not list offlin, but offline" in report.checks["reachable"][1]
    assert report.verdicts["s01"].startswith("no: HTTP 404")
    assert report.verdicts["s02"] == "no: as s01"
    assert report.lines == {"MODEL_ID": "offline"}


def test_an_empty_list_of_models(fake_model: FakeModel, run: Callable):
    fake_model.script("", [Json200({"data": []})], repeat=True)
    report = run(serve(fake_model))
    assert report.checks["reachable"] == ("ok", f"{fake_model.url}/")
    assert report.verdicts["s01"] == "yes"


def test_address_without_v1(offline: Offline, run: Callable):
    short = offline.url.removesuffix("/v1")
    report = run(offline.env | {"OPENAI_BASE_URL": short})
    assert report.lines == {"OPENAI_BASE_URL": offline.url}
    assert report.verdicts["s01"].startswith("no: no models at")


def test_a_web_page(fake_model: FakeModel, run: Callable):
    fake_model.script(None, [Html200()], repeat=True)
    report = run(fake_model.env("m"))
    assert report.status == 1
    assert report.verdicts["s01"].startswith("no: ")
    assert report.checks["tool call"] == ("skipped", "because of: plain answer")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"OPENAI_API_KEY": ""}, "sessions/offline_model.py check_model"),
        ({"MODEL_OPTIONS": "{"}, "MODEL_OPTIONS"),
        ({"MODEL_TIMEOUT": "soon"}, "MODEL_TIMEOUT"),
        (
            {"CONTEXT_TOKENS": "8k"},
            "CONTEXT_TOKENS must be a number of tokens, not '8k'",
        ),
    ],
)
def test_settings_as_the_sections_want_them(
    env: dict, run: Callable, more: dict, told: str
):
    with pytest.raises(SystemExit) as stop:
        run(env | {"OPENAI_API_KEY": "k", "MODEL_ID": "m"} | more)
    assert told in stop.value.code


@pytest.mark.parametrize(
    ("flag", "status", "told"),
    [
        ("-h", 0, "some 5,000 tokens"),
        (
            "--all",
            2,
            "check_model.py: unrecognized arguments: --all;"
            " the one option is --context\n",
        ),
    ],
)
def test_help_and_bad_flags(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
    flag: str,
    status: int,
    told: str,
):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), flag])
    with pytest.raises(SystemExit) as stop:
        module.main()
    shown = capsys.readouterr()
    assert stop.value.code == status
    assert told in shown.out if flag == "-h" else told == shown.err


def test_ctrl_c(fake_model: FakeModel):
    gate = threading.Event()
    env = serve(fake_model, lambda body: Gate(gate))
    with Screen(SCRIPT, env) as screen:
        fake_model.wait(1)
        screen.wait_for("plain answer")  # its name, though it has not ended
        screen.press("ctrl-c")
        assert screen.wait_exit() == 130
        assert "Traceback" not in screen.text
    gate.set()


def test_ctrl_c_while_it_loads(env: dict, tmp_path: Path):
    """Only Ctrl-C ends the module that stands in for openai here."""
    (tmp_path / "openai.py").write_text(
        "import time\nprint('loading', flush=True)\ntime.sleep(60)"
    )
    with Screen(SCRIPT, env | {"PYTHONPATH": str(tmp_path)}, cold=True) as screen:
        screen.wait_for("loading")
        screen.press("ctrl-c")
        assert screen.wait_exit() == 130
        assert "Traceback" not in screen.text


def test_what_reads_it_goes_away(env: dict, offline: Offline, tmp_path: Path):
    command = f'cd "{tmp_path}" && "{sys.executable}" "{SCRIPT}" | head -3'
    done = pipe(["bash", "-c", command], "", offline.env)
    assert done.stdout.endswith("reachable        ok       " + offline.url + "/\n")
    assert not done.stderr


# --- a server that falls silent ---


@pytest.mark.parametrize("quick", [2, 0])
def test_silence(
    module: ModuleType,
    fake_model: FakeModel,
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    quick: float,
):
    """The first request gets MODEL_TIMEOUT; the others less, if it was quick."""
    monkeypatch.setattr(module, "QUICK", quick)
    monkeypatch.setattr(module, "SILENCE", 0.2)
    names = ("reachable", "plain answer", "system prompt")
    report = run(
        serve(fake_model, lambda body: Stall(0, 0.6, answer(body))), only=names
    )
    assert report.verdicts["s01"] == "yes"
    if quick:
        assert report.verdicts["s06"].startswith("unclear: Request timed out")
        assert report.text.endswith(
            "\nFailed, and made again: 1 (Request timed out).\n"
        )
        assert "\nunclear: this run could not tell\n" in report.text
    else:
        assert report.status == 0
        assert "this run" not in report.text


def test_an_answer_without_end(
    module: ModuleType,
    fake_model: FakeModel,
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    """By this clock an hour passes between two chunks. None is late for the socket."""
    clock = SimpleNamespace(
        monotonic=itertools.count(step=3600).__next__, sleep=lambda pause: None
    )
    monkeypatch.setattr(module, "time", clock)
    report = run(serve(fake_model))
    told = "unclear: Request timed out. the answer still came after 180 s"
    assert report.verdicts["s01"].startswith(told)
    assert len(fake_model.chats) == 2


# --- servers that want or refuse something ---


def test_tools_are_refused(fake_model: FakeModel, run: Callable):
    report = run(serve(fake_model, refusing("tools", "m does not support tools")))
    assert report.verdicts["s01"] == "yes"
    assert report.verdicts["s02"].startswith("no: HTTP 400: ")
    assert report.verdicts["s10"] == "no: as s02"
    assert "m does not support tools" in report.verdicts["s02"]
    assert report.checks["parallel calls"] == ("skipped", "because of: tool call")
    assert report.checks["tool call"] == ("skipped", "because of: offering tools")
    assert report.checks["system prompt"][0] == "ok"


def test_streaming_is_refused(fake_model: FakeModel, run: Callable):
    env = serve(fake_model, refusing("stream", "'stream' is not supported"))
    report = run(env)
    assert report.verdicts["s01"].startswith(
        "no: without the MODEL_OPTIONS below: HTTP 400"
    )
    assert report.checks["tool call"][0] == "ok"
    assert report.lines == {"MODEL_OPTIONS": "'{\"stream\": false}'"}
    again = run(env | {"MODEL_OPTIONS": report.lines["MODEL_OPTIONS"].strip("'")})
    assert again.status == 0 and again.verdicts["s01"] == "yes"


def test_streaming_is_ignored(fake_model: FakeModel, run: Callable):
    def whole(body: dict) -> Item:
        return Json200(fold(answer(body).chunks(), "m"))

    report = run(serve(fake_model, whole))
    assert report.lines == {"MODEL_OPTIONS": "'{\"stream\": false}'"}
    told = "60 numbers came whole, at once: the server does not stream"
    assert report.verdicts["s01"] == f"yes, but {told}"
    again = run(serve(fake_model, whole, MODEL_OPTIONS='{"stream": false}'))
    assert again.verdicts["s01"] == "yes" and not again.lines


def test_a_reasoning_model(fake_model: FakeModel, run: Callable):
    effort = corpora.ERRORS["effort"]

    def thinker(body: dict) -> Item:
        lazy = body.get("reasoning_effort") == "none" or "tools" not in body
        return answer(body) if lazy else Error(effort.status, body=effort.body)

    report = run(serve(fake_model, thinker))
    assert report.verdicts["s01"] == "yes"
    assert report.verdicts["s02"].startswith("no: without the MODEL_OPTIONS below: ")
    assert report.lines == {"MODEL_OPTIONS": '\'{"reasoning_effort": "none"}\''}


def test_an_option_that_is_refused(fake_model: FakeModel, run: Callable):
    refuse = refusing(
        "max_tokens", "Use 'max_completion_tokens' instead of 'max_tokens'."
    )
    env = serve(fake_model, refuse, MODEL_OPTIONS='{"max_tokens": 900}')
    assert run(env).lines == {"MODEL_OPTIONS": "'{\"max_completion_tokens\": 900}'"}
    env = serve(
        fake_model,
        refusing("top_k", "unknown: top_k"),
        MODEL_OPTIONS='{"top_k": 4, "stop": ["."]}',
    )
    report = run(env)
    assert report.lines == {"MODEL_OPTIONS": '\'{"stop": ["."]}\''}
    assert report.verdicts["s01"].startswith("no: without the MODEL_OPTIONS below: ")


def test_answers_that_are_cut(fake_model: FakeModel, run: Callable):
    def short(body: dict) -> Item:
        item = answer(body)
        if isinstance(item, Text) and len(item.text) > 60 and "max_tokens" not in body:
            return Text(item.text[:60], "length")
        return item

    report = run(serve(fake_model, short))
    assert report.status == 0
    assert report.verdicts["s01"].startswith(
        "yes, but answers are cut, this one after 60"
    )
    assert report.lines == {"MODEL_OPTIONS": "'{\"max_tokens\": 2048}'"}


@pytest.mark.parametrize("is_stated", [True, False])
def test_the_advised_limit_leaves_room_in_a_small_window(
    fake_model: FakeModel,
    run: Callable,
    is_stated: bool,
):
    """Whether the server's list of models states the window, or an overflow does."""

    def short(body: dict) -> Item:
        if len(body["messages"]) > 9:
            too_long = "This model's maximum context length is 2048 tokens."
            return Error(400, body=corpora.error(too_long))
        return answer(body) if "max_tokens" in body else Text(NUMBERS[:40], "length")

    if is_stated:
        models = {"data": [{"id": "m", "meta": {"n_ctx": 2048}}]}
        fake_model.script("", [Json200(models)], repeat=True)
    only = ("reachable", "long answer", "context")
    report = run(
        serve(fake_model, short, CONTEXT_TOKENS="9000"), "--context", only=only
    )
    assert report.lines == {
        "CONTEXT_TOKENS": "2048",
        "MODEL_OPTIONS": "'{\"max_tokens\": 512}'",
    }


def test_thoughts_that_leave_no_room(fake_model: FakeModel, run: Callable):
    def thinker(body: dict) -> Item:
        return (
            answer(body)
            if body.get("max_tokens")
            else Text("", "length", reasoning="hm")
        )

    report = run(serve(fake_model, thinker))
    start = (
        "no: without the MODEL_OPTIONS below: the answer was cut at the length limit"
    )
    assert report.verdicts["s01"].startswith(start)
    assert report.lines == {"MODEL_OPTIONS": "'{\"max_tokens\": 2048}'"}


def test_a_limit_is_not_lowered(fake_model: FakeModel, run: Callable):
    env = serve(
        fake_model,
        lambda body: Text("", "length"),
        MODEL_OPTIONS='{"max_tokens": 9000}',
    )
    report = run(env)
    assert report.verdicts["s01"].startswith(
        "no: the answer was cut at the length limit"
    )
    assert {chat.body["max_tokens"] for chat in fake_model.chats} == {9000}
    assert not report.lines


def test_answers_that_stay_cut(fake_model: FakeModel, run: Callable):
    def short(body: dict) -> Item:
        return Text(NUMBERS[:40], "length") if "60" in str(body) else answer(body)

    report = run(serve(fake_model, short, MODEL_OPTIONS='{"max_tokens": 10}'))
    assert report.verdicts["s01"].startswith(
        "yes, but answers are cut, this one after 40"
    )
    assert not report.lines
    assert {chat.body["max_tokens"] for chat in fake_model.chats[3:]} == {10}


# --- weak models ---

AS_TEXT = (
    '<tool_call>{"name": "read_file", "arguments": {"path": "note.txt"}}</tool_call>'
)


@pytest.mark.parametrize(
    ("told", "start"),
    [
        (
            "The word is tamarind.",
            "no: answered with text in place of a call: 'The word is",
        ),
        (AS_TEXT, "no: wrote its call as text, not as a call (llama.cpp wants --jinja"),
    ],
)
def test_text_in_place_of_a_call(
    fake_model: FakeModel, run: Callable, told: str, start: str
):
    env = serve(
        fake_model, lambda body: Text(told) if body.get("tools") else answer(body)
    )
    report = run(env)
    assert report.verdicts["s02"].startswith(start)
    assert report.verdicts.pop("s03").startswith(f"{NO_TOOLS}; CONTEXT_TOKENS")
    assert {report.verdicts[label] for label in LABELS[3:]} == {NO_TOOLS}
    assert report.status == 1


@pytest.mark.parametrize(
    ("name", "arguments", "start"),
    [
        ("read_file", {"path": "note.txt"}, "no: went on calling after 4 rounds"),
        (
            "read_file",
            {"path": 7},
            "no: its calls did not work: 'error: 1 validation error",
        ),
        ("find", {}, "no: its calls did not work: 'error: there is no tool find"),
    ],
)
def test_calls_without_end(
    fake_model: FakeModel, run: Callable, name: str, arguments: dict, start: str
):
    call = ToolCalls([(name, arguments)])
    ids = iter(range(1000))

    def stubborn(body: dict) -> Item:
        if not body.get("tools"):
            return answer(body)
        return ToolCalls(call.calls, ids=[f"c{next(ids)}"])

    assert run(serve(fake_model, stubborn)).verdicts["s02"].startswith(start)


@pytest.mark.parametrize(
    ("value", "mark"), [("1", "copes"), (1.0, "copes"), ("first", "but"), (1, "ok")]
)
def test_numbers_of_other_types(
    fake_model: FakeModel,
    run: Callable,
    value: object,
    mark: str,
):
    def weak(body: dict) -> Item:
        if "line 1" not in body["messages"][-1]["content"]:
            return answer(body)
        return ToolCalls([("read_file", {"path": "one.txt", "offset": value})])

    only = ("plain answer", "number argument")
    found, told = run(serve(fake_model, weak), only=only).checks["number argument"]
    assert found == mark
    assert mark == "ok" or told.startswith("offset, a number, came as ")


def test_thoughts(
    fake_model: FakeModel,
    run: Callable,
):
    only = ("reachable", "plain answer")
    report = run(
        serve(fake_model, lambda body: Text("<think>hm</think>Four.")), only=only
    )
    left_out = "its thoughts (<think>) are left out of: 'Four.'"
    assert report.verdicts["s01"] == f"yes, the section copes: {left_out}"
    report = run(
        serve(fake_model, lambda body: Text("Well, <think>hm</think>Four.")), only=only
    )
    told = "its thoughts (<think>) stand in its answers: 'Well, <think>hm</think>Four.'"
    assert report.verdicts["s01"] == f"yes, but {told}"
    report = run(
        serve(fake_model, lambda body: Text("Four.", reasoning="hm")), only=only
    )
    apart = "an answer came, its thoughts apart: 'Four.'"
    assert report.checks["plain answer"] == ("ok", apart)
    report = run(serve(fake_model, lambda body: Text("<think>hm</think>")), only=only)
    assert report.verdicts["s01"] == "no: the answer was empty"


def test_one_request_at_a_time(fake_model: FakeModel, run: Callable):
    report = run(serve(fake_model, together(fake_model, Error(429))))
    assert (
        report.verdicts["s10"]
        == "yes, but of two requests at once one failed: HTTP 429"
    )


def test_embeddings_that_do_not_come(fake_model: FakeModel, run: Callable):
    fake_model.script("e", [Error(404)], repeat=True)
    report = run(serve(fake_model, EMBEDDING_MODEL="e"))
    assert report.verdicts["s06"].startswith(
        "yes, but memory search goes by words alone ("
    )
    assert "llama.cpp wants --embeddings" in report.verdicts["s06"]
    assert "HTTP 404, check EMBEDDING_MODEL" in report.verdicts["s06"]
    assert report.lines == {"EMBEDDING_MODEL": ""}


# --- the quirks of the field: what the section does decides ---


def put(part: dict, **fields: object) -> None:
    part.update(fields)


def as_object(part: dict) -> None:
    """All arguments at once, as an object, in place of three pieces of text."""
    name = part["function"].get("name")
    part["function"]["arguments"] = {"path": "note.txt"} if name else None


def unfinished(choice: dict) -> None:
    choice["finish_reason"] = None


QUIRKS = {
    "finish_reason is not tool_calls": changing(
        lambda choice: choice["finish_reason"] and put(choice, finish_reason="stop"),
        False,
    ),
    "calls without an id": changing(lambda part: part.pop("id", None)),
    "one id for two calls": changing(
        lambda part: "id" in part and put(part, id="same")
    ),
    "calls without an index": changing(lambda part: part.pop("index")),
    "one index for two calls": changing(lambda part: put(part, index=0)),
    "arguments as an object": changing(as_object),
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_quirks_with_which_section_2_copes(
    fake_model: FakeModel,
    run: Callable,
    quirk: str,
):
    names = ("reachable", "plain answer", "tool call", "parallel calls", "oddities")
    report = run(serve(fake_model, QUIRKS[quirk]), only=names)
    assert report.checks["tool call"][0] == "ok"
    assert report.verdicts["s02"].startswith("yes, the section copes: ")
    assert quirk in report.verdicts["s02"]


def test_keep_alives(
    fake_model: FakeModel,
    run: Callable,
):
    def slow(body: dict) -> Item:
        return Chunks([": OPENROUTER PROCESSING", *answer(body).chunks()])

    only = ("reachable", "plain answer", "oddities")
    report = run(serve(fake_model, slow), only=only)
    told = "yes, the section copes: lines that only keep the connection open"
    assert report.verdicts["s02"] == told


def test_section_2_copes_indeed(fake_model: FakeModel, workspace: Path):
    env = serve(fake_model, QUIRKS["arguments as an object"])
    assert "tamarind" in by_section_2(env, workspace)


def test_a_quirk_with_which_it_does_not(
    fake_model: FakeModel, run: Callable, workspace: Path
):
    def unfinished_calls(body: dict) -> Item:
        return changing(unfinished, False)(body) if body.get("tools") else answer(body)

    env = serve(fake_model, unfinished_calls)
    assert run(env).verdicts["s02"].startswith("no: the answer broke off")
    assert "[the answer broke off" in by_section_2(env, workspace)


def by_section_2(env: dict, workspace: Path) -> str:
    """What the section itself shows where the check says that it copes."""
    (workspace / "note.txt").write_text("The code word is tamarind.", encoding="utf-8")
    return pipe(S02, "read note.txt\n", env).stdout.partition("agent>")[2]


ANSWERS = [*corpora.STREAMS, *sorted({*corpora.ERRORS} - {*OVERFLOWS})]


@pytest.mark.parametrize("name", ANSWERS[::3])
def test_section_1_agrees(env: dict, run: Callable, name: str):
    """Each odd stream and each error as the answer to everything."""
    with FakeModel(env) as server:
        report = run(server.env(name))
        said = pipe(S01, "hello\n", server.env(name))
    verdict = report.verdicts["s01"]
    is_empty = re.search(r"agent> \n\[", said.stdout)
    has_failed = bool(is_empty) or f" - {server.url}/]" in said.stdout
    assert verdict.startswith("yes") != has_failed, report.text
    assert verdict.startswith("unclear") <= (
        name in ("mid_error", "mid_error_str") or is_chance(name)
    )


def is_chance(name: str) -> bool:
    """Whether an error may be gone a little later."""
    return name in corpora.ERRORS and corpora.ERRORS[name].kind in ("retry", "rate")
