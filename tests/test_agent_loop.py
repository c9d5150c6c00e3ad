"""s01: turns of a conversation and all that can go wrong in one, at the front door.

What is `cold` starts Python itself.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import corpora
import harness
import pytest
from conftest import NEXT_SECTIONS
from conversation import KEY
from conversation import PROMPT
from conversation import ask_on_a_terminal
from conversation import ask_over_a_pipe
from conversation import asked
from conversation import check_turn
from conversation import env_for
from conversation import event
from conversation import play
from conversation import raw_server
from conversation import replies
from conversation import script
from conversation import spoken
from conversation import stream
from conversation import wait_until
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
from fake_model import fold
from harness import SETTINGS
from harness import Screen
from harness import Section
from harness import pipe
from harness import since

NOT_STREAMED = '{"stream": false}'
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STOPPED = delta("stop")
WAYS = pytest.mark.parametrize(
    "ask", [ask_over_a_pipe, ask_on_a_terminal], ids=["pipe", "terminal"]
)
FIRST_THREE = pytest.mark.parametrize("early", NEXT_SECTIONS[:3], ids=lambda s: s.label)


# --- conversations ---


@since("s01")
def test_three_turns_stream_as_they_arrive(section: Section, fake_model: FakeModel):
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


@since("s01")
def test_three_turns_over_a_pipe(section: Section, fake_model: FakeModel):
    answers = [Text("eins"), Text("zwei\n\n你好 👋"), Text("drei")]
    fake_model.script("any", answers)
    options = {"max_tokens": 77, "reasoning_effort": "none"}
    env = env_for(fake_model, MODEL_OPTIONS=json.dumps(options))
    lines = "first\n\n   \n /tmp is 你好\nthird\nexit\nnever asked\n"
    done = pipe(section, lines, env, cold=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not CONTROL.search(done.stdout) and KEY not in done.stdout
    for text in ("eins", "zwei\n\n你好 👋", "drei"):
        assert f"agent> {text}\n" in done.stdout
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
        assert request.body["stream_options"] == {"include_usage": True}


@since("s01", until="s02")
def test_a_slash_means_nothing_yet(section: Section, fake_model: FakeModel):
    script(fake_model, {})
    shown = play(section, env_for(fake_model), ["/nonsense here"])
    check_turn(fake_model, shown, "/nonsense here", "fine: /nonsense here")


@since("s01")
def test_a_line_can_be_edited_pasted_and_called_back(
    section: Section, fake_model: FakeModel
):
    script(fake_model, {})
    with Screen(section, env_for(fake_model)) as screen:

        def enter(*keys: str) -> str:
            screen.wait_for(PROMPT)
            for key in keys:
                screen.press(key) if key in harness.KEYS else screen.type(key)
            count = len(fake_model.chats)
            screen.press("enter")
            fake_model.wait(count + 1)
            return asked(fake_model.chats[-1].messages)

        assert enter("helo", "left", "l") == "hello"
        assert "\x1b[?2004h" in screen.raw, "the terminal brackets no pastes"
        pasted = "\x1b[200~one\ntwo\nthree\x1b[201~"
        assert enter(pasted, " four") == "one\ntwo\nthree four"
        assert enter("two", "home", "up") == "one\ntwo\nthree four"
        assert enter(" /say it") == " /say it"
        screen.wait_for(PROMPT)
        screen.type("\n")
        screen.wait_for(PROMPT)
        screen.type("quit\n")
        assert screen.wait_exit() == 0
    assert len(fake_model.chats) == 4


@since("s01")
def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(
    section: Section, fake_model: FakeModel
):
    gate = threading.Event()
    long = Text("word " * 3000)
    items = {"one": Gate(gate, long), "two": Gate(gate, long, after_chunks=3)}
    script(fake_model, items)
    with Screen(section, env_for(fake_model)) as screen:
        for question, shown in {"one": "agent> ", "two": "word word"}.items():
            screen.wait_for(PROMPT)
            count = len(fake_model.chats)
            screen.type(f"{question}\n")
            fake_model.wait(count + 1)
            screen.wait_for(shown)
            screen.press("ctrl-c")
            screen.wait_for("[stopped]")
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
    evil = "a\x1b[2J\x1b]0;title\x07b\rc\b\x9b31m\x00d\u202ee\u2066f"
    answers = {
        "control": Text(evil),
        "error": Error(400, body=corpora.bare(evil)),
        "half": Text("half \ud83d end"),
    }
    script(fake_model, answers)
    lines = (
        b"control\nerror\nhalf\ncaf\xe9 \xff\xfe\n\xf0\x9f\x98\x80 \xe4\xbd\xa0\nl\n"
    )
    done = subprocess.run(
        [sys.executable, section.path],
        input=lines,
        capture_output=True,
        env=env_for(fake_model),
        timeout=30,
    )
    assert done.stderr == b""
    shown = replies(done.stdout.decode())
    screen = "\n".join(text for _, text in shown)
    assert not CONTROL.search(screen)
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", screen)
    good = [(question, text) for question, text in shown if text == f"fine: {question}"]
    assert good == shown[-3:]
    history = spoken(fake_model.chats[-1])
    assert history[-2][1].endswith("😀 你") and history[-1] == ("user", "l")
    assert history[-5][1].startswith("caf")
    assert ("assistant", "half \ufffd end") in history


# --- three turns against servers of every kind ---


WORDS = [says("one "), delta(content="two"), STOPPED]
KEEP_ALIVES = [
    ": OPENROUTER PROCESSING",
    ": a comment\nid: 7",
    ": and\nretry: 3000",
    ": and\nevent: ping",
    ": and\nevent: ping\ndata:",
    ": and\ndata: ",
    ": and\ndata",
    ": and\n\n\n",
]
SPLIT_LINES = json.dumps(says("a\u2028b\u2029c"), ensure_ascii=False)
SPLIT_EMOJI = [says("a \ud83d"), delta(content="\ude00"), STOPPED]
DEAD = [says("one"), corpora.bare("upstream died", code=502)]
KINDS = {  # what a server sends, what is shown, what is kept (None: a turn that failed)
    "streams": (Text("one two"), "one two", "one two"),
    "streams-not": (Json200(fold(WORDS, "m")), "one two", "one two"),
    "counts": (Text("one two", usage={"prompt_tokens": 3}), "one two", "one two"),
    "keep-alives": (
        Chunks([*KEEP_ALIVES, WORDS[0], *KEEP_ALIVES, *WORDS[1:], *KEEP_ALIVES]),
        "one two",
        "one two",
    ),
    "thinks": (Text("<think>\nhm, hm\n</think>\n\none two"), "one two", "one two"),
    "thinks-beside": (Text("one two", reasoning="hm, hm"), "one two", "one two"),
    "refuses": (Chunks([says(None, refusal="no"), STOPPED]), "no", "no"),
    "line-ends": (Chunks([SPLIT_LINES, STOPPED]), "a\u2028b", "a\u2028b\u2029c"),
    "emoji": (Chunks(SPLIT_EMOJI), "a 😀", "a 😀"),
    "length": (Text("one", "length"), "one\n[the answer was cut", "one"),
    "filter": (Text("one", "content_filter"), "one\n[the provider's", "one"),
    "eos": (Text("one", "eos"), "one\n[the answer ended with 'eos']", "one"),
    "end": (Text("one", "END_TURN"), "one\n[the answer ended with 'END_TURN']", "one"),
    "empty": (Chunks([]), "[the answer broke off", None),
    "empty-torn": (Chunks([], done=False), "[the answer broke off", None),
    "error-200": (Json200(corpora.bare("no credit")), "[the server reports", None),
    "error-text": (Json200({"error": "gone"}), "[the server reports gone", None),
    "error-inside": (Chunks(DEAD), "one\n[the server reports", None),
    "dropped": (Drop(2, then=Chunks(WORDS)), "one two\n[", None),
}


@WAYS
@FIRST_THREE
def test_three_turns_with_servers_of_each_kind(
    early: Section, fake_model: FakeModel, ask
):
    questions = [f"{kind} {number}" for kind in KINDS for number in "123"]
    script(fake_model, {q: KINDS[q.split()[0]][0] for q in questions})
    shown = ask(early, env_for(fake_model), [*questions, "last"])
    history = []
    for question in questions:
        _, text, kept = KINDS[question.split()[0]]
        assert shown[question].startswith(text), f"{question}: {shown[question]!r}"
        if "[" in text:
            assert shown[question].endswith("]"), f"{question}: {shown[question]!r}"
        elif kept == text:
            assert shown[question] == text
        if kept:
            history += [("user", question), ("assistant", kept)]
    assert spoken(fake_model.chats[-1]) == [*history, ("user", "last")]


@WAYS
@FIRST_THREE
def test_three_turns_with_the_offline_model(
    early: Section, env: dict, monkeypatch: pytest.MonkeyPatch, ask
):
    """In all its tempers: a flaky one succeeds only twice in eight turns."""
    monkeypatch.setenv("OFFLINE_STALL", "1")
    script = harness.load(harness.REPO / "sessions" / "offline_model.py")
    server = script.serve(port=0, pace=0)
    env |= {"OPENAI_API_KEY": "offline", "OPENAI_BASE_URL": server.url}
    env |= {"MODEL_TIMEOUT": "0.4"}
    wanted = {"offline": 3, "offline-clumsy": 2, "offline-small": 3, "offline-flaky": 2}
    for model, count in wanted.items():
        last = 9 if model == "offline-flaky" else 4
        questions = {
            f"what is {n} * 7?": f"{n} * 7 is {7 * n}." for n in range(2, last + 1)
        }
        shown = ask(early, env | {"MODEL_ID": model}, list(questions))
        good = [q for q, answer in questions.items() if shown[q] == answer]
        assert len(good) == count, shown
        assert all(re.search(r"\[.+\]$", shown[q]) for q in {*questions} - {*good})
    server.shutdown()
    server.server_close()


# --- thoughts and halves of characters ---


THOUGHTS = "<think>\nhm </b>\n</think>\n\nyes <think>it</think> is"
ANSWER = "yes <think>it</think> is"
LONG_THOUGHTS = "<think>" + "a </thin> <think> b\n" * 35_000 + "</think>yes"
THINKING = {
    **{f"cut {n}": [THOUGHTS[:n], THOUGHTS[n:]] for n in range(1, len(THOUGHTS))},
    "letters": list(THOUGHTS),
    "thinking": ["<thinking>", "no</thinking", ">", ANSWER],
    "blanks before": ["\n ", " \n<th", "ink>no</think>", " ", "\n", ANSWER],
    "no thoughts": ["<think>", "</think>", ANSWER],
    "no tag": [ANSWER],
    "whole": [LONG_THOUGHTS.replace("yes", ANSWER)],
    "small pieces": [*re.findall("(?s).{1,90}", LONG_THOUGHTS[:-3]), ANSWER],
}
NO_THOUGHTS = ["<", "<t", "<thin", "< think>", "<b>bold</b>", "1 < 2", "</think>"]


@since("s01")
def test_tagged_thoughts_are_no_answer(section: Section, fake_model: FakeModel):
    answers = {name: Text("".join(p), pieces=p) for name, p in THINKING.items()}
    answers |= {text: Text(text, pieces=[*text]) for text in NO_THOUGHTS}
    script(fake_model, answers)
    shown = play(section, env_for(fake_model), list(answers))
    history = spoken(fake_model.chats[-1])
    for name in answers:
        wanted = name if name in NO_THOUGHTS else ANSWER
        assert shown[name] == wanted, name
        answer = history[history.index(("user", name)) + 1]
        assert answer == ("assistant", wanted), name


@since("s01")
def test_tagged_thoughts_without_a_stream(section: Section, fake_model: FakeModel):
    whole = Text("", pieces=[LONG_THOUGHTS])
    answers = {"think": Text(THOUGHTS), "whole": whole}
    script(fake_model, answers)
    env = env_for(fake_model, MODEL_OPTIONS=NOT_STREAMED)
    shown = play(section, env, list(answers))
    assert (shown["think"], shown["whole"]) == (ANSWER, "yes")
    assert ("assistant", ANSWER) in spoken(fake_model.chats[-1])


@since("s01")
def test_much_text_takes_little_time(section: Section, fake_model: FakeModel):
    """Each kind of text, far longer than a window, in a second or two."""
    thoughts = "<think>" + "</" * 350_000
    texts = {
        "thoughts": [*re.findall("(?s).{1,50}", thoughts), "</think>", "yes"],
        "thoughts at once": [thoughts + "</think>yes"],
        "blanks": [" "] * 5_000 + [" " * 500_000, "yes"],
        "halves": ["\ud83d"] * 5_000 + ["\ud83d" * 100_000, "yes"],
        "control": ["\x1b[2J" * 100_000 + "yes"],
        "tags": ["yes" + "<think>" * 100_000],
    }
    items = {
        name: Text("".join(pieces), pieces=pieces) for name, pieces in texts.items()
    }
    items["error"] = Error(500, body=corpora.bare("yes " + "context x " * 50_000))
    script(fake_model, items)
    shown = play(section, env_for(fake_model), list(items))
    came = {}
    for request in fake_model.chats:
        came.setdefault(asked(request.messages), request.time)
    for name in items:
        assert came[f"after {name}"] - came[name] < 8, name
        assert "yes" in shown[name]


@since("s01")
def test_an_answer_of_nothing_is_asked_for_once_more(
    section: Section, fake_model: FakeModel
):
    nothing = {
        "empty": Text(""),
        "blank": Text(" \n ", pieces=[" ", "\n", " "]),
        "thoughts": Text("<think>hm</think>\n"),
        "open thoughts": Text("<think>hm"),
        "beside": Text("", reasoning="hm"),
        "no text": Chunks([delta(role="assistant"), STOPPED]),
    }
    cases = {}
    for name, item in nothing.items():
        cases[f"{name} once"] = [item, Text("here it is")]
        cases[f"{name} twice"] = [item, item, Text("too late")]
    cases["cut thoughts"] = [Text("<think>hm", "length")] * 2
    script(fake_model, cases)
    shown = play(section, env_for(fake_model), list(cases))
    for name in cases:
        if "once" in name:
            check_turn(fake_model, shown, name, "here it is")
            assert shown[name] == "here it is"
        else:
            check_turn(fake_model, shown, name)
            assert len(shown[name].splitlines()) == 1
        requests = [r for r in fake_model.chats if asked(r.messages) == name]
        assert len(requests) == 2, name
        assert requests[0].messages == requests[1].messages, name
        assert "hm" not in shown[name]
    assert "the answer was empty" in shown["empty twice"]
    assert "cut at the length limit" in shown["cut thoughts"]


EMOJI = "a 😀 b 👩‍👩‍👧 c"


def halves_of(text: str) -> list[str]:
    """The text in pieces that each end in the middle of a character, where one can."""
    data = text.encode("utf-16-le")
    pieces = [data[n : n + 2] for n in range(0, len(data), 2)]
    return [piece.decode("utf-16-le", "surrogatepass") for piece in pieces]


@WAYS
@since("s01")
def test_an_emoji_in_two_pieces(section: Section, fake_model: FakeModel, ask):
    cases = {
        "halves": halves_of(EMOJI),
        "after thoughts": ["<think>\ud83d", "\ude00</think>", *halves_of(EMOJI)],
        "first": halves_of("😀"),
    }
    script(fake_model, {name: Text("", pieces=p) for name, p in cases.items()})
    shown = ask(section, env_for(fake_model), [*cases, "last"])
    wanted = {
        "halves": EMOJI,
        "after thoughts": EMOJI,
        "first": "😀",
        "last": "fine: last",
    }
    assert shown == wanted
    history = dict(entry[::-1] for entry in spoken(fake_model.chats[-1]))
    assert history | {EMOJI: "assistant", "😀": "assistant"} == history


# --- event streams as they are written ---


HELLO = '{"choices":[{"delta":{"content":"%s"}}]}'
STOP = '{"choices":[{"delta":{},"finish_reason":"stop"}]}'
TAIL = f"data: {STOP}\n\ndata: [DONE]\n\n"


def lines(*before: str) -> bytes:
    """A streamed answer with lines before its end."""
    return stream("\n".join([*before, TAIL]).encode())


def letters(text: str) -> bytes:
    """A streamed answer that arrives byte by byte."""
    return stream(*[bytes([byte]) for byte in text.encode()])


HI = "data: " + HELLO % "hi"
WIRE = {
    "crlf": stream(f"{HI}\n\n{TAIL}".replace("\n", "\r\n").encode()),
    "crlf in pieces": letters(f"{HI}\n\n{TAIL}".replace("\n", "\r\n")),
    "letter by letter": letters(f"{HI}\n\n{TAIL}"),
    "at once": stream(f"{HI}\n\n{TAIL}".encode()),
    "no blank": lines("data:" + HELLO % "hi", ""),
    "no blank lines": lines(HI),
    "many blanks": lines("data:  " + HELLO % "hi" + "  ", ""),
    "no done": stream(f"{HI}\n\ndata: {STOP}\n\n".encode()),
    "no last line end": stream(f"{HI}\n\ndata: {STOP}".encode()),
    "comments": lines(":", ": ping", ":ping", "", HI, ": data: {", ""),
    "events": lines(
        "event: ping", "data:", "", "event: ping", "", HI, "", "data: ", ""
    ),
    "named": lines("event: message", "id: 1", "retry: 10", HI, "", "id", "data", ""),
    "ids": lines("id: 4", ": ping", "", "retry: 3000", "", HI, ""),
    "unknown": lines("foo: bar", "foo", "datax: {", HI, ""),
    "after the end": stream(f"{HI}\n\n{TAIL}data: {{no\n\n".encode()),
    "separators": stream(
        event(json.loads(HELLO % "a\u2028b\u2029c\x85d")), TAIL.encode()
    ),
    "separators cut": letters(
        "data: " + HELLO % "a\u2028b\u2029c\x85d" + "\n\n" + TAIL
    ),
    "characters cut": letters("data: " + HELLO % "你好 😀" + "\n\n" + TAIL),
}


@since("s01")
def test_event_streams_as_they_are_written(section: Section, env: dict):
    with raw_server(WIRE) as url:
        env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "any"}
        shown = play(section, env, list(WIRE))
    for name in WIRE:
        wanted = "hi"
        if name.startswith("separators"):
            wanted = "a\u2028b\u2029cd"  # without the control character
        if name == "characters cut":
            wanted = "你好 😀"
        assert shown[name] == wanted, name
        assert shown[f"after {name}"] == "good"


@since("s01")
def test_a_reset_after_the_end_comes_too_late(section: Section, fake_model: FakeModel):
    chunks = [says("all"), STOPPED, "[DONE]"]
    late = Drop(len(chunks), "reset", then=Chunks(chunks, done=False))
    script(fake_model, {f"reset {n}": late for n in range(5)})
    shown = play(section, env_for(fake_model), [f"reset {n}" for n in range(5)])
    for n in range(5):
        check_turn(fake_model, shown, f"reset {n}", "all")
        assert shown[f"reset {n}"] == "all"


# --- errors: one line that says what is true, and the conversation goes on ---


def message_of(body: dict | str) -> str:
    """The text of an error body, whatever its shape."""
    error = body.get("error", body) if isinstance(body, dict) else body
    return error["message"] if isinstance(error, dict) else error


@since("s01", until="s08")  # from s09 on some of these turns are tried again
def test_refused_requests(section: Section, fake_model: FakeModel):
    """Each is told and not tried again. From s03 on, one that is too long is."""
    failures = corpora.ERRORS | {"no json": corpora.Failure("fatal", 404, "no route")}
    if section.label >= "s03":
        failures = {n: f for n, f in failures.items() if f.kind != "overflow"}
    answers = {n: Error(f.status, f.headers, f.body) for n, f in failures.items()}
    script(fake_model, answers)
    shown = play(section, env_for(fake_model), list(failures))
    assert len(fake_model.chats) == 2 * len(failures)
    for name, failure in failures.items():
        check_turn(fake_model, shown, name)
        (line,) = shown[name].splitlines()
        message = message_of(failure.body)
        assert message in line.replace("\\'", "'"), name
        if failure.status != 200:
            assert f"HTTP {failure.status}" in line, line
        assert line.endswith(f" - {fake_model.url}/]"), line
        hints = {401: ["OPENAI_API_KEY"], 404: ["MODEL_ID", "OPENAI_BASE_URL"]}
        for hint in ("OPENAI_API_KEY", "MODEL_ID", "OPENAI_BASE_URL", "/new"):
            assert (hint in line) == (hint in hints.get(failure.status, [])), line


@since("s01", until="s08")
def test_an_error_of_any_shape_is_told(section: Section, fake_model: FakeModel):
    url = "http://elsewhere.example/v1?a=b"
    page = f"<html>\n<style>{'p {margin: 0}' * 8000}</style></html>"
    answers = {
        "detail": Error(404, body={"detail": "no such route"}),
        "list": Error(404, body=[{"error": "no such route"}]),
        "address": Error(400, body=corpora.bare(f"no such route: ask {url} for one")),
        "long": Error(404, body=page),
        "nothing": Error(503, body=""),
        "lines": Error(500, body="no such\r\n\n\troute"),
    }
    script(fake_model, answers)
    shown = play(section, env_for(fake_model), list(answers))
    for name, text in shown.items():
        if name in answers:
            assert re.fullmatch(rf"\[HTTP \d+\b.* - {fake_model.url}/\]", text), text
            assert ("no such route" in text) == (name not in ("long", "nothing"))
            assert len(text) < 700
    assert url in shown["address"], "an address must stay: it says whose server it is"
    assert "MODEL_ID" in shown["long"]


ANSWERS = {
    "no finish": (Text("half", finish=None), None),
    "empty length": (Text("", finish="length"), None),
    "calls without calls": (Text("", finish="tool_calls"), None),
    "words without calls": (Text("words", finish="tool_calls"), "words"),
    "blocked": (Text("some", finish="content_filter"), "some"),
    "unknown reason": (Text("some", finish="odd \x1b[2J"), "some"),
    "long": (Text("x" * 20_000), "x" * 20_000),
}
COMPLETION = {"choices": [{"message": None, "finish_reason": "stop"}]}
JSON_200 = {
    "error 200": (Json200(corpora.bare("out of credit", code=402)), None),
    "error text 200": (Json200({"error": "model not loaded"}), None),
    "null 200": (Json200(None), None),
    "list 200": (Json200([]), None),
    "number 200": (Json200(5), None),
    "no choices 200": (Json200({"choices": []}), None),
    "choices null 200": (Json200({"choices": None}), None),
    "choices a number 200": (Json200({"choices": 5}), None),
    "message null 200": (Json200(COMPLETION), None),
    "html 200": (Html200(), None),
}


@since("s01")
@pytest.mark.parametrize("options", ["", NOT_STREAMED], ids=["streamed", "whole"])
def test_odd_answers(section: Section, fake_model: FakeModel, options: str):
    cases = dict(ANSWERS | JSON_200)
    for name, sent in corpora.STREAMS.items():
        alone = sent.calls or sent.broken or name == "no_created"
        if options and alone and name != "mid_error":
            continue  # these are oddities of streaming alone
        if sent.broken and section.label >= "s09" and name != "mid_error":
            continue  # those are tried again, with seconds between
        if sent.calls:
            continue  # what becomes of a call is a matter of the section
        text = None if sent.broken else sent.text
        cases[name] = (Chunks(sent.chunks, sent.done), text)
    script(fake_model, {name: item for name, (item, _) in cases.items()})
    shown = play(section, env_for(fake_model, MODEL_OPTIONS=options), list(cases))
    for name, (_, text) in cases.items():
        check_turn(fake_model, shown, name, text)
    notes = {"length": "cut", "filter": "filter", "blocked": "filter"}
    notes |= {"words without calls": "tool", "unknown reason": "odd"}
    for name, note in notes.items():
        assert re.search(rf"\n\[.*{note}.*\]$", shown[name]), shown[name]
    assert "out of credit" in shown["error 200"]
    assert "model not loaded" in shown["error text 200"]
    assert "upstream died" in shown["mid_error"]
    assert "/v1" in shown["html 200"] and fake_model.url in shown["html 200"]
    for request in fake_model.chats:
        assert request.body["stream"] is (not options)
        assert not (options and "stream_options" in request.body)


@since("s01")
def test_a_message_with_a_call_and_no_tools(section: Section, fake_model: FakeModel):
    """Nothing but s01 lacks tools; a call is no reason to end, there as anywhere."""
    names = [name for name, sent in corpora.STREAMS.items() if sent.calls]
    script(fake_model, {n: [Chunks(corpora.STREAMS[n].chunks)] for n in names})
    shown = play(section, env_for(fake_model), names)
    for name in names:
        assert shown[f"after {name}"].endswith(f"fine: after {name}")
        assert shown[name].endswith("]") or "fine" in shown[name]
    if section.label == "s01":
        assert "asked for a tool, and there is none" in shown["good"]


def part(**fields) -> list:
    """An answer with one odd field before its text."""
    return [delta(**fields), says("yes"), STOPPED]


def choice(value: object) -> list:
    """An answer with one odd choice before its text."""
    return [envelope(value), says("yes"), STOPPED]


JUNK = {
    "choices null": choice(None),
    "choices [null]": choice([None]),
    "choices a number": choice(5),
    "choices a text": choice("abc"),
    "choices an object": choice({"a": 1}),
    "a choice that is a number": choice([1]),
    "delta null": choice([{"delta": None, "finish_reason": None}]),
    "delta a text": choice([{"delta": "hi", "finish_reason": None}]),
    "no delta": choice([{"index": 0}]),
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
    "name a number": part(tool_calls=[{"index": 0, "function": {"name": 7}}]),
    "id an object": part(tool_calls=[{"id": {}, "function": {"name": "add"}}]),
    "index a list": part(tool_calls=[corpora.call([1], "c1", "add", "{}")]),
    "arguments a list": part(tool_calls=[corpora.call(0, "c1", "add", [1])]),
    "usage a number": [says("yes"), STOPPED, envelope([], usage=4)],
    "usage of texts": [says("yes"), STOPPED, envelope([], usage={"total_tokens": "x"})],
    "usage negative": [says("yes"), STOPPED, envelope([], usage={"total_tokens": -4})],
}


@since("s01")
def test_chunks_of_any_shape(section: Section, fake_model: FakeModel):
    script(fake_model, {name: Chunks(chunks) for name, chunks in JUNK.items()})
    shown = play(section, env_for(fake_model), list(JUNK))
    for name in JUNK:
        assert shown[f"after {name}"].endswith(f"fine: after {name}")
        assert shown[name], f"{name}: nothing was said"


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
@pytest.mark.parametrize("options", ["", NOT_STREAMED], ids=["streamed", "whole"])
def test_a_connection_that_breaks(
    section: Section, fake_model: FakeModel, options: str
):
    cases = {
        "closed": (Drop(0), ""),
        "reset": (Drop(0, "reset"), ""),
        "closed inside": (Drop(3), "you will"),
        "reset inside": (Drop(3, "reset"), "you will"),
        "silent": (Stall(0, 2), ""),
        "silent inside": (Stall(3, 2), "late but"),
    }
    script(fake_model, {name: item for name, (item, _) in cases.items()})
    env = env_for(fake_model, MODEL_OPTIONS=options, MODEL_TIMEOUT="0.5")
    shown = play(section, env, list(cases))
    for name, (_, text) in cases.items():
        check_turn(fake_model, shown, name)
        before = "" if options else text
        url = re.escape(fake_model.url)
        assert re.fullmatch(rf"{before}\s*\[.+{url}/\]", shown[name]), shown[name]
        assert ("timed out" in shown[name]) == ("silent" in name)
    assert len(fake_model.chats) == 2 * len(cases)


JSON = (
    b" X\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
    b"Connection: close\r\n"
)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
TORN = {
    "no http": b"SSH-2.0-OpenSSH_9.9\r\n",
    "no answer": b"",
    "torn headers": b"HTTP/1.1 200 OK\r\nContent-",
    "torn error": b"HTTP/1.1 500" + JSON + b'\r\n{"er',
    "torn json": b"HTTP/1.1 200" + JSON + b'\r\n{"er',
    "error not utf-8": b"HTTP/1.1 500" + JSON + b"\r\n" + b"\xff" * 9,
    "json not utf-8": b"HTTP/1.1 200" + JSON + b"\r\n" + b"\xff" * 9,
    "error no gzip": b"HTTP/1.1 401"
    + JSON
    + b"Content-Encoding: gzip\r\n\r\nno zip no",
    "event not utf-8": EVENTS + b'\r\ndata: {"choices":[{"delta":"\xff"}]}\n\n',
    "event no gzip": EVENTS + b"Content-Encoding: gzip\r\n\r\nno zip",
    "event torn chunk": EVENTS + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    "in circles": b"HTTP/1.1 307 X\r\nLocation: /v1/x\r\nConnection: close\r\n\r\n",
}


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
def test_answers_that_are_no_http(section: Section, env: dict):
    with raw_server(TORN) as url:
        env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "any"}
        shown = play(section, env, list(TORN))
    for name in TORN:
        assert re.fullmatch(rf"\[.+ - {url}/\]", shown[name]), f"{name}: {shown[name]}"
        assert shown[f"after {name}"] == "good"


@since("s01", until="s08")  # from s09 on such a turn is tried again, in the open
def test_a_server_that_is_down_is_named(section: Section, env: dict):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    env |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, "MODEL_ID": "any"}
    done = pipe(section, "hello\n", env)
    assert (done.returncode, done.stderr) == (0, "")
    line = replies(done.stdout)[0][1]
    assert re.fullmatch(rf"\[.*refused.* - {re.escape(url)}/\]", line), line
    assert not re.search("time", line), line


# --- settings ---


def copy_alone(section: Section, folder: Path, dotenv: bytes = b"") -> Path:
    """The script in a tree of its own, perhaps with a .env at its root."""
    target = folder / "tree" / "sessions" / "en" / section.path.name
    target.parent.mkdir(parents=True)
    shutil.copy2(section.path, target)
    if dotenv:
        (folder / "tree" / ".env").write_bytes(dotenv)
    return target


def unset(env: dict) -> dict:
    """The environment without any setting, so that .env counts."""
    return {name: value for name, value in env.items() if name not in SETTINGS}


@since("s01")
def test_nothing_set_up(section: Section, env: dict, tmp_path: Path):
    script = copy_alone(section, tmp_path)
    done = pipe(script, "hello\n", unset(env), cwd=tmp_path, cold=True)
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert "OPENAI_API_KEY" in first and ".env" in first
    assert f"python sessions/offline_model.py {section.label}" in second


@since("s01")
def test_dotenv_fills_in_what_the_environment_lacks(
    section: Section, env: dict, fake_model: FakeModel, tmp_path: Path
):
    dotenv = f"OPENAI_API_KEY={KEY}\nOPENAI_BASE_URL={fake_model.url}\nMODEL_ID=file\n"
    copy = copy_alone(section, tmp_path, dotenv.encode())
    script(fake_model, {})
    env = unset(env) | {"MODEL_ID": "from-environment"}
    done = pipe(copy, "hello\n", env, cwd=tmp_path, cold=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fine: hello" in done.stdout and KEY not in done.stdout
    request = fake_model.chats[0]
    assert (request.model, request.key) == ("from-environment", KEY)


@since("s01")
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_an_env_file_in_another_encoding(
    section: Section, env: dict, tmp_path: Path, encoding: str
):
    copy = copy_alone(section, tmp_path, "MODEL_ID=müller\n".encode(encoding))
    done = pipe(copy, "", env, cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert ".env" in line


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
    ("OPENAI_BASE_URL", "http://localhost:port/v1"),
]


@since("s01")
def test_settings_that_are_wrong(section: Section, env: dict):
    right = {"OPENAI_API_KEY": KEY, "MODEL_ID": "any", "MODEL_OPTIONS": ""}
    right |= {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "MODEL_TIMEOUT": ""}
    cases = json.dumps([right | {name: value} for name, value in WRONG])
    command = [sys.executable, "-c", START_EACH, str(section.path), cases]
    done = pipe(command, "", env)
    codes = re.findall(r'^[0"\[].*', done.stdout, re.M)
    assert len(codes) == len(WRONG), done.stdout + done.stderr
    assert KEY not in done.stdout
    for (name, value), line in zip(WRONG, codes, strict=True):
        text = json.loads(line)
        count = 2 if name in ("OPENAI_API_KEY", "MODEL_ID") else 1
        assert isinstance(text, str) and name in text, f"{name}={value!r}: {line}"
        assert len(text.splitlines()) == count, f"{name}={value!r}: {line}"
