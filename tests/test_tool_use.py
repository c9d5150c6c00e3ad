"""s02: tool calls off the wire, their results in the history, and the four tools."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import corpora
import harness
import openai
import pytest
from conftest import Offline
from conversation import PROMPT
from conversation import asked
from conversation import script
from conversation import wait_until
from fake_model import Chunks
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Item
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import Section
from harness import pipe
from harness import since
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

pytestmark = since("s02")
posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
QUESTION = "[y/N/a] "
MAX_RESULT = 30_000
READ = ("read_file", {"path": "SOUL.md"})
Turns = dict[str, list[dict]]


# --- talking: each turn is a question that names a case, with the model's answers ---


def env_for(fake_model: FakeModel, **more: str) -> dict[str, str]:
    return fake_model.env("m", CONTEXT_TOKENS="9000000", **more)


def turns_of(fake_model: FakeModel, number: int = -1) -> Turns:
    """What a request holds after each question: what the next turn knows of it."""
    turns: Turns = {}
    for message in fake_model.chats[number].messages:
        if message["role"] == "user":
            turns[message["content"]] = turn = []
        elif message["role"] in ("assistant", "tool"):
            turn.append(message)
    return turns


def converse(
    section: Section,
    fake_model: FakeModel,
    cases: dict[str, Sequence[Item]],
    **more: str,
) -> tuple[CompletedProcess[str], Turns]:
    """Ask for each case over a pipe, then once more: the history must be valid."""
    script(fake_model, {name: list(items) for name, items in cases.items()})
    questions = "".join(f"{name}\n" for name in (*cases, "end"))
    done = pipe(section, questions, env_for(fake_model, **more))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "fine: end" in done.stdout, done.stdout
    return done, turns_of(fake_model)


def run_calls(
    section: Section,
    fake_model: FakeModel,
    calls: Sequence[tuple[str, Any]],
    **more: str,
) -> list[str]:
    """The results of calls made in one answer."""
    _, turns = converse(section, fake_model, {"go": [ToolCalls(calls)]}, **more)
    found = results(turns["go"])
    assert len(found) == len(calls)
    assert all(found), "an empty result tells a model nothing"
    return found


def made_calls(turn: list[dict]) -> list[dict]:
    return [call for message in turn for call in message.get("tool_calls", ())]


def calls_in(turn: list[dict]) -> list[tuple[str, dict]]:
    functions = [call["function"] for call in made_calls(turn)]
    return [
        (function["name"], json.loads(function["arguments"])) for function in functions
    ]


def results(turn: list[dict]) -> list[str]:
    return [message["content"] for message in turn if message["role"] == "tool"]


def texts(turn: list[dict]) -> list[str]:
    return [message["content"] for message in turn if message["role"] == "assistant"]


def is_error(text: str) -> bool:
    return text.startswith("error")


def alive(file: Path) -> bool:
    """Whether the process whose id a command wrote into a file still runs."""
    try:
        status = Path(f"/proc/{int(file.read_text())}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "(zombie)" not in status


@pytest.fixture
def agent(section: Section, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch):
    """An agent inside the test process; what it shows is in `agent.shown`."""
    for name, value in env_for(fake_model).items():
        monkeypatch.setenv(name, value)
    module = section.load()
    agent = module.load_agent()
    if section.label >= "s03":
        module.open_session(agent)
    agent.module = module
    agent.shown = []
    agent.show = lambda text, kind="answer": agent.shown.append((kind, text))
    return agent


# --- calls off the wire ---


SIGNED = {"google": {"thought_signature": "SIG"}}


@pytest.mark.parametrize("streamed", [True, False])
def test_every_stream_is_understood(
    section: Section, fake_model: FakeModel, streamed: bool
):
    # Two whole calls without an id at one index look like one call in two pieces. The
    # scripted server cannot fold a chunk that has no finish_reason at all.
    left_out = "same_index_no_id" if streamed else "no_created"
    streams = {name: s for name, s in corpora.STREAMS.items() if name != left_out}
    assert len(streams) >= 24
    tries = 3 if section.label >= "s09" else 1
    cases = {}
    for name, sent in streams.items():
        item = Chunks(sent.chunks, sent.done)
        cases[name] = [item] * (2 if name == "empty_200" else tries)
    options = json.dumps({"stream": streamed})
    done, turns = converse(section, fake_model, cases, MODEL_OPTIONS=options)
    assert {request.body["stream"] for request in fake_model.chats} == {streamed}
    broken = {name for name, sent in streams.items() if sent.broken}
    assert set(streams) - set(turns) == broken
    for name in set(streams) - broken:
        sent, turn = streams[name], turns[name]
        assert turn[0]["content"] == sent.text, name
        assert sent.text.strip() in done.stdout, name
        assert calls_in(turn) == sent.calls, name
        assert len(results(turn)) == len(sent.calls), name
        for (tool, _), result in zip(sent.calls, results(turn), strict=True):
            assert tool in result, f"{name}: {result}"
        extras = [call.get("extra_content") for call in made_calls(turn)]
        signed = [SIGNED] if name == "gemini_sig" else [None] * len(extras)
        assert extras == signed, name
        thoughts = "hm yes" if name == "reasoning" else None
        assert turn[0].get("reasoning_content") == thoughts, name


NAMES = st.sampled_from(["read_file", "get-time"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just('{"}'),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=2, max_size=4)


def can_be_told_apart(style: dict) -> bool:
    """Whether anything says where a call ends: its index, its id, or its place."""
    if style["index"] == "given" or style["ids"] in ("each", "first"):
        return True
    return style["at_once"] and style["index"] == "missing"


STYLE = st.fixed_dictionaries(
    {
        "index": st.sampled_from(["given", "missing", "zero"]),
        "ids": st.sampled_from(["each", "first", "empty", "none", "same"]),
        "names": st.sampled_from(["each", "first"]),
        "arguments": st.sampled_from(["split", "opened empty", "whole", "object"]),
        "at_once": st.sampled_from([False, False, False, True]),
    }
).filter(can_be_told_apart)


def pieces_of(number: int, call: tuple, style: dict, data: st.DataObject) -> list[dict]:
    """One call as a server of this style sends it, in pieces."""
    name, arguments = call
    text = json.dumps(arguments)
    cuts = st.lists(st.integers(1, len(text) - 1), min_size=1, max_size=3, unique=True)
    places = [0, *sorted(data.draw(cuts)), len(text)]
    parts: list = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    if style["arguments"] in ("whole", "object") or style["at_once"]:
        parts = [arguments if style["arguments"] == "object" else text]
    elif style["arguments"] == "opened empty":
        parts = ["", *parts]
    made = []
    for position, part in enumerate(parts):
        odd_ids = {"empty": "", "none": None, "same": "call_0"}
        id = odd_ids.get(style["ids"], f"call_{number}")
        id = None if position and style["ids"] == "first" else id
        index = {"given": number, "missing": None, "zero": 0}[style["index"]]
        named = name if not position or style["names"] == "each" else None
        made.append(corpora.call(index, id, named, part))
    return made


def stream_of(made: list[tuple], style: dict, data: st.DataObject) -> Chunks:
    """Calls as a server of this style streams them; indexed pieces in any order."""
    queues = [pieces_of(n, call, style, data) for n, call in enumerate(made)]
    if style["at_once"]:
        chunks = [corpora.calls(*(queue[0] for queue in queues))]
    elif style["index"] == "given":
        owners = [n for n, queue in enumerate(queues) for _ in queue[1:]]
        later = [iter(queue[1:]) for queue in queues]
        order = data.draw(st.permutations(owners))
        chunks = [corpora.calls(queue[0]) for queue in queues]
        chunks += [corpora.calls(next(later[n])) for n in order]
    else:
        chunks = [corpora.calls(piece) for queue in queues for piece in queue]
    return Chunks([corpora.says(""), *chunks, corpora.CALLED])


@pytest.mark.costly
def test_calls_survive_any_way_of_sending_them(section: Section, fake_model: FakeModel):
    said: list[Item] = []
    fake_model.script("m", [lambda _: said.pop(0)], repeat=True)
    with Screen(section, env_for(fake_model)) as screen:
        screen.wait_for(PROMPT)

        @settings(
            max_examples=60,
            phases=[Phase.generate],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(made=CALLS, style=STYLE, data=st.data())
        def check(made: list[tuple[str, dict]], style: dict, data: st.DataObject):
            count = len(fake_model.chats)
            said[:] = [stream_of(made, style, data), Text(f"seen {count}")]
            screen.type("go\n")
            screen.wait_for(re.compile(rf"seen {count}\b.*?you> ", re.S))
            messages = fake_model.chats[-1].messages
            start = max(n for n, m in enumerate(messages) if m["role"] == "user")
            assert calls_in(messages[start:]) == made, style
            assert len(results(messages[start:])) == len(made)

        check()


def test_calls_told_apart_by_their_ids_alone(section: Section, fake_model: FakeModel):
    cases = {}
    for index in (None, 0):
        chunks = []
        for number in (1, 2):
            chunks += [corpora.call(index, f"{index}-{number}", "no_such_tool", "")]
            parts = ('{"a":', f"{number}}}")
            chunks += [corpora.call(index, None, None, part) for part in parts]
        cases[f"{index}"] = [Chunks([*map(corpora.calls, chunks), corpora.CALLED])]
    _, turns = converse(section, fake_model, cases)
    for name in cases:
        assert calls_in(turns[name]) == [("no_such_tool", {"a": n}) for n in (1, 2)]


def test_parallel_calls_run_in_order(
    section: Section, fake_model: FakeModel, workspace: Path
):
    made = [
        ("write_file", {"path": "a.txt", "content": "one"}),
        ("read_file", {"path": "a.txt"}),
        ("write_file", {"path": "a.txt", "content": "two"}),
        ("read_file", {"path": "nothing.txt"}),
        ("read_file", {"path": "a.txt"}),
    ]
    endings = ("stop", "tool_calls", "length")
    cases = {finish: [ToolCalls(made, "Now.", finish)] for finish in endings}
    _, turns = converse(section, fake_model, cases)
    assert len(fake_model.chats) == 7, "all five results go back in one request"
    for finish in endings:
        turn = turns[finish]
        assert turn[0]["content"] == "Now."
        assert calls_in(turn) == made
        assert (results(turn)[1], results(turn)[4]) == ("one", "two")
        assert is_error(results(turn)[3])
        assert turn[-1]["content"] == f"fine: {finish}"


def test_every_call_gets_an_id_of_our_own(
    section: Section, fake_model: FakeModel, workspace: Path
):
    """Nine letters and digits, as Mistral wants them, and never one twice."""
    made = [("read_file", {"path": f"{name}.txt"}) for name in "abc"]
    for name in "abc":
        (workspace / f"{name}.txt").write_text(f"text {name}")
    cases = {}
    given = (
        ["x"] * 3,
        [""] * 3,
        ["a", "a", "b"],
        ["c" * 300] * 3,
        ["é \x1b", "\ud83d", "z"],
    )
    for number, ids in enumerate(given):
        cases[f"{number}"] = [ToolCalls(made, ids=ids), ToolCalls(made, ids=ids)]
        cases[f"{number} again"] = [ToolCalls(made, ids=ids)]
    _, turns = converse(section, fake_model, cases)
    ids = []
    for name, answers in cases.items():
        assert results(turns[name]) == ["text a", "text b", "text c"] * len(answers)
        ids += [call["id"] for call in made_calls(turns[name])]
    assert len(set(ids)) == len(ids) == 45
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)


def thoughtful_call() -> Chunks:
    """A call as DeepSeek and Gemini send it: with what has to go back to them."""
    thinking = [
        corpora.delta(reasoning_content=text) for text in ("hm \ud83d", "\ude00")
    ]
    call = corpora.call(0, "c", "read_file", '{"path": "SOUL.md"}')
    signed = corpora.calls(call | {"extra_content": SIGNED})
    return Chunks([corpora.says(""), *thinking, signed, corpora.CALLED])


def extras_of(messages: list[dict]) -> list[tuple]:
    """The extras of each message of the model: its thoughts, and its calls' content."""
    found = []
    for message in messages:
        if message["role"] == "assistant":
            signed = [c.get("extra_content") for c in message.get("tool_calls", ())]
            found.append((message.get("reasoning_content"), signed))
    return found


def test_extras_go_back_to_their_server(section: Section, fake_model: FakeModel):
    converse(section, fake_model, {"go": [thoughtful_call()]})
    within, after = fake_model.chats[1:]
    assert extras_of(within.messages) == [("hm 😀", [SIGNED])]
    assert extras_of(after.messages) == [("hm 😀", [SIGNED]), (None, [])]


@since("s02", until="s02")
def test_extras_go_to_no_other_server_or_model(agent: Any, fake_model: FakeModel):
    script(fake_model, {"go": [thoughtful_call()]})
    assert agent.module.handle_message(agent, "go") == "fine: go"
    home = agent.client
    with FakeModel() as other:
        script(other, {})
        agent.client = openai.OpenAI(api_key="k", base_url=other.url)
        assert agent.module.handle_message(agent, "there") == "fine: there"
        assert not other.problems
        messages = other.chats[0].messages
    assert extras_of(messages) == [(None, [None]), (None, [])]
    assert not [message for message in messages if "extras" in message]
    agent.client = home
    agent.options["model"] = "another"
    agent.module.handle_message(agent, "another model")
    assert extras_of(fake_model.chats[-1].messages)[0] == (None, [None])
    agent.options["model"] = "m"
    agent.module.handle_message(agent, "home")
    assert extras_of(fake_model.chats[-1].messages)[0] == ("hm 😀", [SIGNED])


@since("s03")
def test_extras_go_to_no_other_server_after_a_restart(
    section: Section, fake_model: FakeModel
):
    converse(section, fake_model, {"go": [thoughtful_call()]})
    with FakeModel() as other:
        script(other, {})
        env = env_for(fake_model) | {"OPENAI_BASE_URL": other.url}
        assert "fine: there" in pipe(section, "there\n", env).stdout
        assert not other.problems
        messages = other.chats[0].messages
    assert extras_of(messages) == [(None, [None]), (None, []), (None, [])]
    assert not [message for message in messages if "extras" in message]
    assert "fine: home" in pipe(section, "home\n", env_for(fake_model)).stdout
    assert extras_of(fake_model.chats[-1].messages)[0] == ("hm 😀", [SIGNED])


@pytest.mark.parametrize(
    "extra", [{"g": "\ud83d"}, {"x": float("nan")}], ids=["half", "nan"]
)
def test_extras_that_cannot_go_back(
    section: Section, fake_model: FakeModel, extra: dict
):
    call = corpora.call(0, "c1", "read_file", '{"path": "x"}') | {
        "extra_content": extra
    }
    chunks = Chunks(
        [corpora.calls(call, reasoning_content="half \ud83d"), corpora.CALLED]
    )
    converse(section, fake_model, {"go": [chunks]})


DEEP = '{"path": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD_CALLS = {  # the call, and what its result must say
    "unknown tool": ("no_such_tool", "{}", "no tool no_such_tool"),
    "odd name": ("rm -rf /; é\n\x1b[2J", "{}", "there is no tool rm_-rf"),
    "long name": ("n" * 500, "{}", "no tool n{64}$"),
    "no name": ("", "{}", "no tool unnamed"),
    "no json": ("read_file", "path=SOUL.md", "(?i)json"),
    "cut off": ("read_file", '{"path": "SOUL.m', "(?i)json"),
    "two objects": ("read_file", '{"path": "a"}{"path": "bcdefghijkl"}', "(?i)json"),
    "list": ("read_file", "[1, 2]", "(?i)json"),
    "text": ("read_file", '"x"', "(?i)json"),
    "number": ("read_file", "5", "(?i)json"),
    "true": ("read_file", "true", "(?i)json"),
    "null": ("read_file", "null", "path"),
    "empty": ("read_file", "", "path"),
    "blank": ("read_file", " \n", "path"),
    "bare nan": ("read_file", "NaN", "(?i)json"),
    "nan inside": ("read_file", '{"path": "a", "limit": NaN}', "(?i)json|limit"),
    "infinity": ("read_file", '{"path": "a", "limit": -Infinity}', "(?i)json|limit"),
    "huge float": ("read_file", '{"path": "SOUL.md", "limit": 1e999}', "limit"),
    "huge number": ("read_file", '{"limit": 1%s}' % ("0" * 5000), "(?i)path|json"),
    "deep": ("read_file", DEEP, "(?i)path|json"),
    "nested": ("read_file", '{"path": ' + "[" * 200 + "]" * 200 + "}", "path"),
    "missing": ("write_file", '{"path": "a.txt"}', "content"),
    "unknown": ("read_file", '{"path": "SOUL.md", "encoding": "utf-8"}', "encoding"),
    "self": ("read_file", '{"path": "SOUL.md", "agent": "x"}', "agent"),
    "self a list": ("read_file", '{"path": "SOUL.md", "agent": []}', "agent"),
    "wrong type": ("read_file", '{"path": 5}', "path"),
    "null value": ("read_file", '{"path": null}', "path"),
    "text for number": ("read_file", '{"path": "a", "limit": "ten"}', "limit"),
    "broken number": ("read_file", '{"path": "a", "limit": 1.5}', "limit"),
    "folder": ("read_file", '{"path": "skills"}', "skills"),
    "below a file": ("read_file", '{"path": "SOUL.md/x"}', ""),
    "long path": ("write_file", json.dumps({"path": "x" * 5000, "content": ""}), ""),
}


@since("s02")
def test_a_model_gone_wild_is_held_back(section: Section, fake_model: FakeModel):
    """Of 3,000 calls in one answer a hundred are run, and the history stays valid."""
    calls = [("read_file", {"path": f"{number}.md"}) for number in range(3000)]
    _, turns = converse(section, fake_model, {"go": [ToolCalls(calls)]})
    assert len(results(turns["go"])) == 100


@pytest.mark.parametrize("streamed", [True, False])
def test_bad_calls_become_errors(
    section: Section, fake_model: FakeModel, workspace: Path, streamed: bool
):
    cases = {name: [ToolCalls([(tool, a)])] for name, (tool, a, _) in BAD_CALLS.items()}
    options = json.dumps({"stream": streamed})
    done, turns = converse(section, fake_model, cases, MODEL_OPTIONS=options)
    assert set(turns) == {*cases, "end"}
    for name, (_, _, told) in BAD_CALLS.items():
        (result,) = results(turns[name])
        assert is_error(result), f"{name}: {result}"
        assert re.search(told, result), f"{name}: {result}"
        assert 10 < len(result) < 10_000, f"{name}: {result}"
    assert "\x1b[2J" not in done.stdout
    assert not (workspace / "a.txt").exists()


def test_arguments_may_be_nearly_right(
    section: Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "ten.txt").write_text("".join(f"line {n}\n" for n in range(10)))
    third = "line 2\nline 3\n[from line 3 of 10]"
    nearly = [
        {"path": "ten.txt", "offset": 3, "limit": 2},
        {"path": "ten.txt", "offset": "3", "limit": "2"},
        {"path": "ten.txt", "offset": 3.0, "limit": 2.0},
        {"path": "ten.txt", "offset": " 3 ", "limit": "2.0"},
        {"path": "ten.txt", "offset": 3, "limit": 2, "agent": None},
    ]
    found = run_calls(section, fake_model, [("read_file", each) for each in nearly])
    assert found == [third] * len(nearly)
    optional = [{}, {"offset": None, "limit": None}, {"offset": 1, "limit": None}]
    calls = [("read_file", {"path": "ten.txt", **each}) for each in optional]
    found = run_calls(section, fake_model, calls)
    assert {*found} == {"\n".join(f"line {n}" for n in range(10))}


def test_blanks_around_the_name_of_a_tool(section: Section, fake_model: FakeModel):
    names = [" read_file", "read_file\n", "\t read_file \r\n"]
    calls = [(name, {"path": "SOUL.md"}) for name in names]
    found = run_calls(section, fake_model, calls)
    assert not any(map(is_error, found)), found


HALVES = {
    "escaped": ("read_file", '{"path": "\\ud83d"}'),
    "escaped-key": ("read_file", '{"\\ud83d": "SOUL.md"}'),
    "raw": ("read_file", '{"path": "\ud83d"}'),
    "no-json": ("read_file", "path \ud83d"),
    "name": ("read_\ud83d", "{}"),
    "written": ("write_file", '{"path": "half.txt", "content": "new \\ud83d"}'),
}


def test_half_a_character(section: Section, fake_model: FakeModel, workspace: Path):
    (workspace / "half.txt").write_text("old")
    cases = {name: [ToolCalls([call])] for name, call in HALVES.items()}
    _, turns = converse(section, fake_model, cases)
    for name in cases:
        assert is_error(results(turns[name])[0]) or name == "written", name
    content = (workspace / "half.txt").read_text()
    assert content in ("old", "new ?", "new \ufffd")


def test_an_emoji_in_two_pieces_of_a_call(
    section: Section, fake_model: FakeModel, workspace: Path
):
    text = '{"path": "😀.txt", "content": "a 👋 b"}'
    data = text.encode("utf-16-le")
    units = [data[n : n + 2] for n in range(0, len(data), 2)]
    parts = [unit.decode("utf-16-le", "surrogatepass") for unit in units]
    first = corpora.calls(corpora.call(0, "c", "write_file", ""))
    pieces = [corpora.calls(corpora.call(0, arguments=part)) for part in parts]
    chunks = Chunks([first, *pieces, corpora.CALLED])
    _, turns = converse(section, fake_model, {"go": [chunks]})
    assert calls_in(turns["go"]) == [("write_file", json.loads(text))]
    assert (workspace / "😀.txt").read_text() == "a 👋 b"


# --- the turn ---


def test_endless_calls_stop_at_25(
    section: Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "a.txt").write_text("again")
    endless = [ToolCalls([("read_file", {"path": "a.txt"})] * 2, "", "stop")] * 40
    done, turns = converse(section, fake_model, {"on": endless})
    requests = [request.messages for request in fake_model.chats]
    assert sum(asked(messages) == "on" for messages in requests) == 25
    assert re.search(r"\[stopped.* 25\b.*\]", done.stdout)
    assert len(calls_in(turns["on"])) == len(results(turns["on"])) == 50
    assert results(turns["on"]) == ["again"] * 50


SAYS_AND_CALLS = ToolCalls([READ], "Noted: you like tea.")
CALLS_ONLY = ToolCalls([READ])
BLANK = Text(" \n ", pieces=[" ", "\n", " "])
ENDINGS = {  # the model's answers, all texts of the turn, and its requests
    "says more": (
        [SAYS_AND_CALLS, Text("Saved!")],
        ["Noted: you like tea.", "Saved!"],
        2,
    ),
    "says no more": ([SAYS_AND_CALLS, Text("")], ["Noted: you like tea."], 2),
    "blank": ([SAYS_AND_CALLS, BLANK], ["Noted: you like tea."], 2),
    "thinks": ([SAYS_AND_CALLS, Text("<think>a</think>")], ["Noted: you like tea."], 2),
    "says twice": (
        [SAYS_AND_CALLS, CALLS_ONLY, ToolCalls([READ], "Now."), Text("")],
        ["Noted: you like tea.", "Now."],
        4,
    ),
    "once more": ([CALLS_ONLY, Text(""), Text("Here.")], ["Here."], 3),
    "once more, blank": ([CALLS_ONLY, BLANK, Text("Here.")], ["Here."], 3),
    "once more, calls": ([CALLS_ONLY, Text(""), CALLS_ONLY, Text("So.")], ["So."], 4),
    "blank call": ([ToolCalls([READ], " \n"), Text("So.")], ["So."], 2),
    "never": ([CALLS_ONLY, Text(""), Text("")], None, 3),
}


def test_all_texts_of_a_turn_are_its_answer(agent: Any, fake_model: FakeModel):
    script(fake_model, {name: items for name, (items, _, _) in ENDINGS.items()})
    for name, (_, wanted, count) in ENDINGS.items():
        agent.shown.clear()
        answer = agent.module.handle_message(agent, name)
        notes = [text for kind, text in agent.shown if kind == "note"]
        assert answer == (wanted and "\n\n".join(wanted)), name
        assert len(notes) == (wanted is None), f"{name}: {notes}"
        requests = [r for r in fake_model.chats if asked(r.messages) == name]
        assert len(requests) == count, name
    assert agent.module.handle_message(agent, "end") == "fine: end"
    for name, turn in turns_of(fake_model).items():
        wanted = ENDINGS[name][1] if name in ENDINGS else []
        said = [text for text in texts(turn) if text.strip() and text[0] != "["]
        assert said == (wanted or []), name


def test_a_turn_of_words_and_calls_on_the_screen(
    section: Section, fake_model: FakeModel
):
    cases = {name: items for name, (items, _, _) in ENDINGS.items()}
    done, _ = converse(section, fake_model, cases)
    blocks = dict(re.findall(r"(?ms)^you> (\S.*?)\n(.*?)(?=^you> )", done.stdout))
    for name, (_, wanted, _) in ENDINGS.items():
        lines = blocks[name].removeprefix("agent> ").splitlines()
        said = [line for line in lines if line.strip() and line[0] != "["]
        assert said == (wanted or []), name
        notes = [line for line in lines if re.match(r"\[(?!read_file)", line)]
        assert len(notes) == (wanted is None), name


def test_finish_reason_tool_calls_without_a_call(
    section: Section, fake_model: FakeModel
):
    cases = {"words": [Text("I will.", "tool_calls")]}
    cases["nothing"] = [Text("", "tool_calls")] * 2
    done, turns = converse(section, fake_model, cases)
    assert "I will." in done.stdout
    assert turns["words"] == [{"role": "assistant", "content": "I will."}]
    assert "nothing" not in turns


def test_what_is_shown_and_to_whom(agent: Any, fake_model: FakeModel):
    """Text, calls, results and notes each have a kind, in the order of the turn."""
    content = "x" * 500
    calls = [
        ("write_file", {"path": "a.txt", "content": content}),
        ("read_file", {"path": "a.txt"}),
        ("no_such_tool", {}),
    ]
    items = [ToolCalls(calls, "Look:"), Text("Done.", "length")]
    script(fake_model, {"go": items})
    agent.module.handle_message(agent, "go")
    kinds = [kind for kind, text in agent.shown if kind != "answer"]
    assert kinds == ["tool_call", "tool_result"] * 3 + ["note"]
    shown = [text for kind, text in agent.shown if kind == "tool_call"]
    assert shown[1] == 'read_file {"path": "a.txt"}'
    shown = [text for kind, text in agent.shown if kind == "tool_result"]
    assert shown == results(turns_of(fake_model)["go"])
    assert shown[1] == content and is_error(shown[2])
    said = "".join(text for kind, text in agent.shown if kind == "answer")
    assert said.split() == ["Look:", "Done."]


def test_a_cancelled_turn_leaves_a_valid_history(agent: Any, fake_model: FakeModel):
    """At each step at which it can be: the scripted server would refuse any other."""

    class Cancelled(Exception):
        pass

    calls = [("write_file", {"path": "a.txt", "content": "a"}), READ]
    steps = 0
    while True:
        script(fake_model, {f"go {steps}": [ToolCalls(calls, "Now."), Text("Done.")]})
        left = steps

        def check() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Cancelled

        agent.check_cancelled = check
        answer = agent.module.handle_message(agent, f"go {steps}")
        agent.check_cancelled = lambda: None
        assert agent.module.handle_message(agent, "next") == "fine: next"
        if answer is not None:
            break
        steps += 1
    assert answer == "Now.\n\nDone."
    assert steps > 8


@contextlib.contextmanager
def running_command(
    section: Section, fake_model: FakeModel, workspace: Path
) -> Iterator[tuple[Screen, list[Path]]]:
    """A command of many processes that refuse to end by themselves, while it runs."""
    names = ["shell", "child", "grandchild", "bare", "apart", "far"]
    files = [workspace / name for name in names]
    made = [("bash", {"command": FAMILY}), ("write_file", {"path": "b", "content": ""})]
    script(fake_model, {"go": [ToolCalls(made)]})
    with Screen(section, env_for(fake_model, APPROVAL="always")) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        wait_until(lambda: all(map(alive, files)))
        try:
            yield screen, files
        finally:
            for file in filter(alive, files):
                os.kill(int(file.read_text()), signal.SIGKILL)


FAMILY = """trap '' TERM INT HUP
write() { echo $2 > $1.tmp; mv $1.tmp $1; }
write shell $$
sleep 300 & write child $!
bash -c 'sleep 300 & echo $! > g.tmp; mv g.tmp grandchild; wait' &
env -i sleep 300 & write bare $!
setsid sleep 300 & write apart $!
setsid bash -c 'sleep 300 & echo $! > f.tmp; mv f.tmp far; wait' &
echo before
wait"""


@posix
def test_ctrl_c_ends_a_command(
    section: Section, fake_model: FakeModel, workspace: Path
):
    with running_command(section, fake_model, workspace) as (screen, files):
        screen.press("ctrl-c")
        screen.wait_for("[stopped]")
        wait_until(lambda: not any(map(alive, files)))
        screen.wait_for(PROMPT)
        screen.type("end\n")
        screen.wait_for("fine: end")
        assert "Traceback" not in screen.text
    first, second = results(turns_of(fake_model)["go"])
    assert "interrupted" in first and "interrupted" in second
    assert not (workspace / "b").exists()


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_ends_with_the_program(
    section: Section, fake_model: FakeModel, workspace: Path, name: str
):
    with running_command(section, fake_model, workspace) as (screen, files):
        number = getattr(signal, name)
        os.kill(screen.pid, number)
        assert screen.wait_exit() == 128 + number
        wait_until(lambda: not any(map(alive, files)))
        assert "Traceback" not in screen.text


@posix
def test_a_command_ends_with_the_terminal(
    section: Section, fake_model: FakeModel, workspace: Path
):
    script(fake_model, {"go": [ToolCalls([("bash", {"command": FAMILY})])]})
    env = env_for(fake_model, APPROVAL="always")
    files = [workspace / name for name in ("shell", "child", "bare", "apart")]
    master, terminal = harness.pty.openpty()
    process = harness.start(harness.argv_of(section), env, harness.REPO, [terminal] * 3)
    try:
        os.close(terminal)
        shown = b""
        while b"you> " not in shown:
            shown += os.read(master, 1000)
        os.write(master, b"go\r")
        wait_until(lambda: all(map(alive, files)))
        os.close(master)
        process.wait(10)
        wait_until(lambda: not any(map(alive, files)))
    finally:
        harness.end_session(process.pid)
        for file in filter(alive, files):
            os.kill(int(file.read_text()), signal.SIGKILL)


def send_signal(screen: Screen, number: int) -> bool:
    """Send a signal, and say whether the program has ended.

    One that comes between a prompt and the read behind it is seen with the next one.
    """
    os.kill(screen.pid, number)
    try:
        return screen.process.wait(1) is not None
    except subprocess.TimeoutExpired:
        return False


@posix
def test_signals_at_the_prompts(section: Section, fake_model: FakeModel):
    script(fake_model, {"go": ToolCalls([("bash", {"command": "true"})])})
    for number in (signal.SIGTERM, signal.SIGHUP):
        for line, shown in (("", "you> "), ("go\n", QUESTION)):
            with Screen(section, env_for(fake_model)) as screen:
                screen.type(line)
                screen.wait_for(shown)
                wait_until(partial(send_signal, screen, number))
                assert screen.wait_exit() == 128 + number
                assert "Traceback" not in screen.text


def test_ctrl_c_while_the_model_talks_after_a_tool(
    section: Section, fake_model: FakeModel, workspace: Path
):
    gate = threading.Event()
    made = [
        ("write_file", {"path": "a.txt", "content": "once"}),
        ("read_file", {"path": "a.txt"}),
    ]
    pieces = ["Half", "way", " through"]
    words = Gate(gate, Text("Halfway through", pieces=pieces), 2)
    script(fake_model, {"go": [ToolCalls(made), words]})
    with Screen(section, env_for(fake_model)) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        screen.wait_for("Half")
        screen.press("ctrl-c")
        screen.wait_for(PROMPT)
        gate.set()
        screen.type("end\n")
        screen.wait_for("fine: end")
        assert "Traceback" not in screen.text
    turn = turns_of(fake_model)["go"]
    assert calls_in(turn) == made
    assert results(turn)[1] == "once"
    assert turn[-1]["role"] == "assistant"


@posix
def test_an_error_in_the_middle_keeps_the_results(
    section: Section, fake_model: FakeModel, workspace: Path
):
    failures = {"500": Error(500), "drop": Drop(0), "mid-drop": Drop(2)}
    failures["reset"] = Drop(2, "reset")
    failures["truncated"] = Chunks([corpora.says("half")], done=False)
    failures["no-json"] = Chunks([corpora.says("half"), "{no"])
    count = ("bash", {"command": "echo ran >> count; echo it ran"})
    cases = {name: [ToolCalls([count, count]), item] for name, item in failures.items()}
    _, turns = converse(section, fake_model, cases, APPROVAL="always")
    assert (workspace / "count").read_text() == "ran\nran\n" * len(failures)
    for name in failures:
        assert calls_in(turns[name]) == [count, count], name
        assert len(results(turns[name])) == 2, name
        assert all("it ran" in result for result in results(turns[name])), name


def test_tool_activity_is_one_short_line_per_call(
    section: Section, fake_model: FakeModel, workspace: Path
):
    long = "line\n\x1b[31mred\x1b[0m\r\x9b2J\n\u202e" * 500
    made = [
        ("write_file", {"path": "a.txt", "content": long}),
        ("read_file", {"path": "a.txt"}),
        ("no_such_tool", {"what": "x"}),
    ]
    raw = json.dumps({"path": "b.txt", "content": "\x9b31m\u202e"}, ensure_ascii=False)
    done, _ = converse(
        section, fake_model, {"go": [ToolCalls([*made, ("write_file", raw)], "Look:")]}
    )
    for name, arguments in made:
        (line,) = [
            line
            for line in done.stdout.splitlines()
            if line.startswith(f'[{name} {{"') and "b.txt" not in line
        ]
        assert str(next(iter(arguments.values()))) in line
        assert line.endswith("]") and len(line) <= 150
    assert '[read_file {"path": "a.txt"}]' in done.stdout
    assert not re.search("[\x1b\x9b\r\u202e]", done.stdout)
    assert len(done.stdout) < 1_500


def test_arguments_of_many_lines_are_shown_on_one(
    section: Section, fake_model: FakeModel
):
    pretty = '{\n  "path":\n    "SOUL.md"\n}'
    done, turns = converse(
        section, fake_model, {"go": [ToolCalls([("read_file", pretty)])]}
    )
    assert "Soul" in results(turns["go"])[0]
    assert '\n[read_file { "path": "SOUL.md" }]\n' in done.stdout


def test_a_signal_in_the_middle_of_an_answer(section: Section, fake_model: FakeModel):
    gate = threading.Event()
    script(fake_model, {"go": Gate(gate, Text("one two three"), after_chunks=2)})
    for number in (signal.SIGTERM, signal.SIGHUP):
        with Screen(section, env_for(fake_model)) as screen:
            screen.wait_for(PROMPT)
            screen.type("go\n")
            screen.wait_for("one")
            os.kill(screen.pid, number)
            assert screen.wait_exit() == 128 + number
            assert "Traceback" not in screen.text
    gate.set()


SIGNATURES = {
    "read_file": "path: string, offset: integer?, limit: integer?",
    "write_file": "path: string, content: string",
    "edit_file": "path: string, old_text: string, new_text: string",
    "bash": "command: string, timeout: integer?",
}


def signature_of(schema: dict) -> str:
    """A schema in short: a question mark stands behind what may be left out."""
    parts = []
    for name, each in schema["properties"].items():
        mark = "" if name in schema["required"] else "?"
        parts.append(f"{name}: {each['type']}{mark}")
    return ", ".join(parts)


def test_what_the_model_is_told_about_tools(section: Section, fake_model: FakeModel):
    script(fake_model, {})
    pipe(section, "go\n", env_for(fake_model))
    functions = [each["function"] for each in fake_model.chats[0].body["tools"]]
    told = {each["name"]: signature_of(each["parameters"]) for each in functions}
    assert told | SIGNATURES == told
    assert all(len(each["description"]) > 40 for each in functions)


# --- the file tools ---


@posix
def test_file_tools_stay_inside_the_workspace(
    section: Section, fake_model: FakeModel, workspace: Path, tmp_path: Path
):
    outside = tmp_path / "outside"
    sibling = tmp_path / "workspace-secrets"
    for folder in (outside, sibling, workspace / ".sessions", workspace / "sub"):
        folder.mkdir(exist_ok=True)
    kept = [
        folder / "key.txt" for folder in (outside, sibling, workspace / ".sessions")
    ]
    for file in (*kept, workspace / ".env"):
        file.write_text("hidden-thing")
    links = {"link.txt": outside / "key.txt", "link2.txt": "link.txt"}
    links |= {"linkdir": outside, "dangling.txt": outside / "new.txt"}
    links |= {"to_env.txt": ".env", "to_dots": ".sessions"}
    for name, target in links.items():
        (workspace / name).symlink_to(target)
    refused = [
        "../outside/key.txt",
        "sub/../../outside/key.txt",
        "../workspace-secrets/key.txt",
        "../outside/new.txt",
        "../new-folder/new.txt",
        *map(str, (outside / "key.txt", sibling / "key.txt", sibling / "new.txt")),
        *(
            "link.txt",
            "link2.txt",
            "linkdir/key.txt",
            "linkdir/new.txt",
            "dangling.txt",
        ),
        *(".env", "./.env", "sub/../.env", str(workspace / ".env"), "to_env.txt"),
        *(".new", ".sessions/key.txt", ".sessions/new.txt", "to_dots/key.txt"),
        *("SOUL.md\0", "\0", "", ".", ".."),
        *(
            "~",
            "~/new.txt",
            "~/new-folder/new.txt",
            "~root/new.txt",
            "~nobody-x/new.txt",
        ),
    ]
    others = {"write_file": {"content": "OWNED"}, "read_file": {}}
    others["edit_file"] = {"old_text": "hidden", "new_text": "OWNED"}
    made = [
        (tool, {"path": p, **more}) for p in refused for tool, more in others.items()
    ]
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    found = run_calls(section, fake_model, made)
    for call, result in zip(made, found, strict=True):
        assert is_error(result), f"{call}: {result}"
        assert "hidden-thing" not in result, call
    assert {path.read_text() for path in (*kept, workspace / ".env")} == {
        "hidden-thing"
    }
    assert all(path.lstat().st_ino == inode for path, inode in before.items())
    new = [path for path in tmp_path.rglob("*") if path not in before]
    assert not [path for path in new if "new" in path.name or "~" in path.name]
    assert not [path for path in new if outside in path.parents]
    files = [path for path in new if path.is_file() and ".sessions" not in path.parts]
    assert not [path for path in files if b"OWNED" in path.read_bytes()]


@posix
def test_what_is_inside_is_allowed(
    section: Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "sub").mkdir()
    (workspace / "real.txt").write_text("old")
    (workspace / "link.txt").symlink_to("real.txt")
    paths = [
        str(workspace / "abs.txt"),
        "sub/../up.txt",
        "a..b.txt",
        "link.txt",
        "x y/grüße 你.txt",
        "notes~",
    ]
    made: list[tuple[str, dict]] = []
    for path in paths:
        made += [("write_file", {"path": path, "content": f"new {path}"})]
        made += [("edit_file", {"path": path, "old_text": "new", "new_text": "newer"})]
        made += [("read_file", {"path": path})]
    found = run_calls(section, fake_model, made)
    assert found[2::3] == [f"newer {path}" for path in paths]
    assert (workspace / "real.txt").read_text() == "newer link.txt"
    assert (workspace / "link.txt").is_symlink()
    assert (workspace / "up.txt").exists()


def test_read_file_offset_and_limit(
    section: Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "ten.txt").write_text("".join(f"line {n}\n" for n in range(1, 11)))
    wanted = {
        (3, 2): [3, 4],
        (1, 1): [1],
        (10, 5): [10],
        (9, 1): [9],
        (0, 1): [1],
        (-5, 2): [1, 2],
        (99, 5): [],
        (2, 0): [],
        (2, 10**15): list(range(2, 11)),
        (9, None): [9, 10],
        (None, None): list(range(1, 11)),
    }
    made = [
        ("read_file", {"path": "ten.txt", "offset": o, "limit": n}) for o, n in wanted
    ]
    found = run_calls(section, fake_model, made)
    for numbers, text in zip(wanted.values(), found, strict=True):
        assert [int(n) for n in re.findall(r"^line (\d+)$", text, re.M)] == numbers
        assert not is_error(text)
        whole = len(numbers) == 10
        assert ("of 10" in text) == (not whole), "how long the file is"


def test_read_file_long_file(section: Section, fake_model: FakeModel, workspace: Path):
    lines = [f"line {n:05} of a file that is longer than a result" for n in range(5000)]
    (workspace / "long.txt").write_text("\n".join(lines))
    made: list[tuple[str, dict]] = [("read_file", {"path": "long.txt"})]
    for start in range(1, 5001, 400):
        part = {"path": "long.txt", "offset": start, "limit": 400}
        made.append(("read_file", part))
    whole, *parts = run_calls(section, fake_model, made)
    assert len(whole) <= MAX_RESULT
    assert "cut" in whole and "of 5000" in whole
    known = {*lines}
    assert [s for part in parts for s in part.splitlines() if s in known] == lines


@contextlib.contextmanager
def odd_files(workspace: Path) -> Iterator[list[str]]:
    """Things that are no files of text, in the workspace; those that can be made."""
    names = ["folder", "missing.txt", "SOUL.md/x"]
    (workspace / "folder").mkdir()
    for name, data in NO_TEXT.items():
        (workspace / name).write_bytes(data)
        names.append(name)
    with socket.socket(socket.AF_UNIX) as listener:
        os.mkfifo(workspace / "fifo")
        os.chdir(workspace)  # the path of a socket must be short
        listener.bind("socket")
        os.chdir(harness.REPO)
        names += ["fifo", "socket"]
        with contextlib.suppress(OSError):  # who is not root may make no device
            os.mknod(workspace / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
            names.append("zero")
        yield names


NO_TEXT = {
    "binary.bin": bytes(range(256)) * 10,
    "latin.txt": "café".encode("latin-1"),
    "utf-16.txt": "café".encode("utf-16"),
    "cut.txt": "café 你".encode()[:-1],
}


@posix
def test_what_is_no_text_file_is_refused(
    section: Section, fake_model: FakeModel, workspace: Path
):
    with odd_files(workspace) as names:
        made: list[tuple[str, dict]] = [("read_file", {"path": n}) for n in names]
        edit = {"old_text": "a", "new_text": "b"}
        made += [("edit_file", {"path": name, **edit}) for name in names]
        found = run_calls(section, fake_model, made)
    for (tool, arguments), result in zip(made, found, strict=True):
        name = arguments["path"]
        assert is_error(result), f"{tool} {name}: {result}"
        assert Path(name).name in result, f"{tool} {name}: {result}"
        assert not re.search("codec|Errno|0x", result), f"{tool} {name}: {result}"
        if name in NO_TEXT:
            assert "UTF-8" in result
    for name, data in NO_TEXT.items():
        assert (workspace / name).read_bytes() == data


def test_text_files_of_all_kinds(
    section: Section, fake_model: FakeModel, workspace: Path
):
    files = {
        "crlf.txt": (b"one\r\ntwo\r\n", "one\ntwo"),
        "bom.txt": (b"\xef\xbb\xbfhello", "hello"),
        "nul.txt": (b"a\x00b", "a\x00b"),
        "one.txt": (b"one\n", "one"),
    }
    for name, (data, _) in files.items():
        (workspace / name).write_bytes(data)
    (workspace / "empty.txt").touch()
    made = [("read_file", {"path": name}) for name in (*files, "empty.txt")]
    *found, empty = run_calls(section, fake_model, made)
    assert found == [text for _, text in files.values()]
    assert not is_error(empty)


READ_A = ("read_file", {"path": "a.txt"})


@posix
def test_write_file(section: Section, fake_model: FakeModel, workspace: Path):
    box = workspace / "box"
    (box / "folder").mkdir(parents=True)
    (box / "folder" / "inner.txt").write_text("inner")
    for name in ("old.sh", "plain.txt"):
        (box / name).write_text("old and long text")
    (box / "old.sh").chmod(0o751)
    os.link(box / "old.sh", workspace / "second-name")
    wanted = {
        "box/deep/er/new.txt": "grüße\r\n\ttabs\n",
        "box/old.sh": "new",
        "box/empty.txt": "",
        "box/folder": "x",
        "box/plain.txt/child.txt": "x",
        "box/" + "n" * 256: "x",
    }
    made = [("write_file", {"path": p, "content": text}) for p, text in wanted.items()]
    found = run_calls(section, fake_model, made)
    assert [is_error(text) for text in found] == [False] * 3 + [True] * 3
    new = (box / "deep/er/new.txt").read_bytes()
    assert new.decode() == "grüße\r\n\ttabs\n"
    assert (box / "old.sh").read_text() == "new"
    assert (box / "old.sh").stat().st_mode & 0o777 == 0o751
    assert (workspace / "second-name").read_text() == "old and long text"
    assert (box / "folder" / "inner.txt").read_text() == "inner"
    assert (box / "plain.txt").read_text() == "old and long text"
    names = {str(path.relative_to(box)) for path in box.rglob("*")}
    assert names == {
        *("deep", "deep/er", "deep/er/new.txt", "folder", "folder/inner.txt"),
        *("old.sh", "plain.txt", "empty.txt"),
    }


EDITS = {  # before, old_text, new_text, after (None: refused)
    "once": (b"one two\n", "one", "1", b"1 two\n"),
    "never": (b"one two\n", "three", "3", None),
    "twice": (b"one one\n", "one", "1", None),
    "empty-old": (b"one two\n", "", "1", None),
    "empty-file": (b"", "", "1", None),
    "case": (b"One\n", "one", "1", None),
    "delete": (b"one two\n", " two", "", b"one\n"),
    "to-itself": (b"one two", "one", "one one", b"one one two"),
    "crlf": (b"a\r\nb\r\nc\r\n", "a\nb", "x\ny\nz", b"x\r\ny\r\nz\r\nc\r\n"),
    "crlf-as-it-is": (b"a\r\nb\r\nc", "a\r\nb", "x\r\ny", b"x\r\ny\r\nc"),
    "crlf-added": (b"a\r\nb\r\n", "b", "b\nnew", b"a\r\nb\r\nnew\r\n"),
    "one-line": (b"a\r\nb\nc\n\r", "a", "A", b"A\r\nb\nc\n\r"),
    "old-mac": (b"a\rb\rc", "b", "B", b"a\rB\rc"),
    "form-feed": (b"a\x0bb\x0cc", "b", "B", b"a\x0bB\x0cc"),
    "separators": (b"a\xc2\x85d\xe2\x80\xa8e", "d", "D", b"a\xc2\x85D\xe2\x80\xa8e"),
    "bom": (b"\xef\xbb\xbfhello\n", "hello", "bye", b"\xef\xbb\xbfbye\n"),
    "blanks": (b" \ta \n\n", "a", "b", b" \tb \n\n"),
    "literal": (b"a.c \\1", "a.c", "\\g<0>\\1", b"\\g<0>\\1 \\1"),
}


def test_edit_file(section: Section, fake_model: FakeModel, workspace: Path):
    made = []
    box = workspace / "box"
    box.mkdir()
    for name, (before, old, new, _) in EDITS.items():
        (box / name).write_bytes(before)
        (box / name).chmod(0o750)
        arguments = {"path": f"box/{name}", "old_text": old, "new_text": new}
        made.append(("edit_file", arguments))
    os.link(box / "once", workspace / "second-name")
    found = dict(zip(EDITS, run_calls(section, fake_model, made), strict=True))
    wrong = {}
    for name, (before, _, _, after) in EDITS.items():
        data = (box / name).read_bytes()
        right = before if after is None else after
        if data != right or is_error(found[name]) != (after is None):
            wrong[name] = data, found[name]
    assert not wrong
    assert re.search(r"\b2\b", found["twice"])
    assert "one two" not in found["twice"]
    assert (workspace / "second-name").read_bytes() == EDITS["once"][0]
    assert sorted(path.name for path in box.iterdir()) == sorted(EDITS)
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in box.iterdir()} == {0o750}


def test_edits_at_the_same_time_all_arrive(agent: Any, workspace: Path):
    lines = [f"line {n:02} is old\n" for n in range(40)]
    (workspace / "a.txt").write_text("".join(lines))

    def work(numbers: range) -> None:
        for n in numbers:
            edit_file = agent.module.TOOL_HANDLERS["edit_file"]
            edit_file(agent, "a.txt", f"line {n:02} is old", f"line {n:02} is new")

    threads = [threading.Thread(target=work, args=(range(k, 40, 8),)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    text = (workspace / "a.txt").read_text()
    assert text == "".join(lines).replace("old", "new")


def test_edit_file_names_the_nearest_line(
    section: Section, fake_model: FakeModel, workspace: Path
):
    (workspace / "a.py").write_text("import os\n\ndef hello(name):\n    return name\n")
    edit = {"path": "a.py", "old_text": "def helo(name):\n  return", "new_text": "x"}
    (result,) = run_calls(section, fake_model, [("edit_file", edit)])
    assert is_error(result) and "def hello(name):" in result
    assert "import os" not in result


def edit(path: str, old_text: str, new_text: str = "x") -> tuple[str, dict]:
    arguments = {"path": path, "old_text": old_text, "new_text": new_text}
    return ("edit_file", arguments)


LETTERS = "abcdefghij" * 10
CHINESE = "".join(chr(0x4E00 + n * 7919 % 997) for n in range(50_000))
HUGE = {  # files that are far longer than anybody's
    "lines.txt": "0123456789abcde\n" * 2**18,
    "line.txt": "ab" * 2**21,
    "alike.txt": "".join(
        f"{LETTERS[n % 9 :]}{LETTERS[: n % 9]}\n" for n in range(30_000)
    ),
    "edit.txt": "x" * 50_000 + "y",
    "chinese.txt": CHINESE,
}
HUGE_CALLS = {
    "no passage": edit("line.txt", "ab" * 25_000 + "c"),
    "no lines": edit("lines.txt", "0123456789abcde\n" * 3_000 + "c"),
    "nearly": edit("alike.txt", LETTERS[::-1] + "\n" + "b" * 50_000),
    "nearly chinese": edit("chinese.txt", f"{CHINESE[:25_000]}x{CHINESE[25_000:]}"),
    "blanks": edit("lines.txt", " " * 50_000),
    "line ends": edit("lines.txt", "\r" * 50_000),
    "passage": edit("edit.txt", "x" * 50_000 + "y", "\r\n" * 25_000),
    "read lines": ("read_file", {"path": "lines.txt"}),
    "read line": ("read_file", {"path": "line.txt"}),
    "write": ("write_file", {"path": "new.txt", "content": "a\n" * 50_000}),
    "long name": ("n" * 100_000, {}),
    "blank name": (" " * 100_000 + "read_file", {"path": "SOUL.md"}),
    "long path": ("read_file", {"path": "a/" * 50_000}),
    "way out": ("read_file", {"path": "../" * 33_000}),
    "no json": ("read_file", "{" * 100_000),
    "many names": ("read_file", {f"n{number}": 1 for number in range(10_000)}),
    "long command": ("bash", {"command": "echo " + "x" * 200_000}),
    "long output": ("bash", {"command": "yes | head -c 30000000"}),
    "many lines": ("bash", {"command": "for i in {1..20000}; do echo $i; done"}),
}


@posix
@pytest.mark.costly
def test_huge_things_take_little_time(
    section: Section, fake_model: FakeModel, workspace: Path
):
    """Files, passages, arguments: each in a second or two, with a short result."""
    for name, text in HUGE.items():
        (workspace / name).write_text(text)
    cases = {name: [ToolCalls([call])] for name, call in HUGE_CALLS.items()}
    text = json.dumps({"path": "pieces.txt", "content": "a \n" * 50_000})
    pieces = [corpora.call(0, arguments=part) for part in re.findall(".{1,20}", text)]
    first = corpora.call(0, "c", "write_file", "")
    chunks = [*map(corpora.calls, [first, *pieces]), corpora.CALLED]
    cases["many pieces"] = [Chunks(chunks)]
    _, turns = converse(section, fake_model, cases, APPROVAL="always")
    came: dict[str, list[float]] = {}
    for request in fake_model.chats:
        came.setdefault(asked(request.messages), []).append(request.time)
    for name in cases:
        called, answered = came[name]
        assert answered - called < 8, f"{name}: {answered - called}"
        assert len(results(turns[name])[0]) <= MAX_RESULT + 100
    assert (workspace / "pieces.txt").read_text() == "a \n" * 50_000
    assert is_error(results(turns["long command"])[0])


# --- bash ---


@posix
def test_bash_says_what_happened(
    section: Section, fake_model: FakeModel, workspace: Path
):
    commands = {
        "echo out; echo err >&2; exit 3": r"(?s)(?=.*\bout\b)(?=.*\berr\b).*\b3\b",
        "true": r"\b0\b",
        "pwd": rf"(?m)^{re.escape(str(workspace))}$",
        "printf '\\377\\376\\000ok\\n'": r"(?m)ok$",
        "printf 'gr\\303\\274\\303\\237e'": "grüße",
        "cat; echo after": "after",
        "read line || echo nothing to read": "nothing to read",
        "kill -9 $$": r"-9|137|signal|[Kk]illed",
        "no_such_command_here": r"(?s)not found.*\b127\b",
        "if then": r"(?s)syntax error.*\b[12]\b",
        "[[ a == a ]] && echo bash": "(?m)^bash$",
        "echo '\\ud83d'; printf '\\000'": "ud83d",
        "echo \0": "(?i)error.*null",
    }
    made = [("bash", {"command": command}) for command in commands]
    found = run_calls(section, fake_model, made, APPROVAL="always")
    for (command, told), result in zip(commands.items(), found, strict=True):
        assert re.search(told, result), f"{command}: {result}"


@posix
def test_bash_sees_no_secrets(section: Section, fake_model: FakeModel):
    secrets = {
        "OPENAI_API_KEY_2": "hidden-1",
        "TELEGRAM_BOT_TOKEN": "",
        "AWS_SECRET_ACCESS_KEY": "hidden-3",
        "GITHUB_TOKEN": "hidden-4",
        "db_password": "hidden-5",
        "FEISHU_APP_SECRET": "hidden-6",
        "GOOGLE_APPLICATION_CREDENTIALS": "hidden-7",
        "FEISHU_ENCRYPT_KEY": "hidden-8",
        "GPG_PASSPHRASE": "hidden-9",
    }
    made = [("bash", {"command": "env; export -p"})]
    (text,) = run_calls(section, fake_model, made, APPROVAL="always", **secrets)
    assert re.search(r"(?m)^PATH=.", text)
    assert re.search(r"(?m)^HOME=.", text)
    assert not re.findall(r".*(?:sk-test|hidden-\d).*", text)


@posix
def test_bash_timeout_kills_the_family(
    section: Section, fake_model: FakeModel, workspace: Path
):
    made = [("bash", {"command": FAMILY, "timeout": 1})]
    names = ["shell", "child", "grandchild", "bare", "apart", "far"]
    try:
        (text,) = run_calls(section, fake_model, made, APPROVAL="always")
        assert text.startswith("before\n")
        assert re.search(r"\[killed after 1 s\]$", text)
        assert [name for name in names if not (workspace / name).exists()] == []
        wait_until(lambda: not any(alive(workspace / name) for name in names))
    finally:
        for file in filter(alive, [workspace / name for name in names]):
            os.kill(int(file.read_text()), signal.SIGKILL)


@posix
def test_bash_long_output_loses_its_middle(section: Section, fake_model: FakeModel):
    filling = "head -c 10000000 /dev/zero | tr '\\0' "
    made = [
        ("bash", {"command": f"echo HEAD; {filling} x; echo TAIL; exit 4"}),
        ("bash", {"command": "echo HEAD; yes 你好 | head -c 3000000; echo TAIL"}),
        (
            "bash",
            {"command": "echo HEAD; head -c 29990 /dev/zero | tr '\\0' y; echo TAIL"},
        ),
    ]
    for result in run_calls(section, fake_model, made, APPROVAL="always"):
        assert 25_000 < len(result) <= MAX_RESULT
        assert result.startswith("HEAD\n")
        assert "TAIL\n" in result[-100:]
        assert "cut" in result
        assert re.search(r"\b[04]\b", result[-30:])


@posix
def test_bash_background_process_holds_nobody_up(
    section: Section, fake_model: FakeModel, workspace: Path
):
    made = [("bash", {"command": "echo early; sleep 300 & echo $! > pid"})]
    try:
        (text,) = run_calls(section, fake_model, made, APPROVAL="always")
        assert "early" in text and "exit code 0" in text
    finally:
        if alive(workspace / "pid"):
            os.kill(int((workspace / "pid").read_text()), signal.SIGKILL)


@posix
def test_bash_leaves_the_typing_alone(
    section: Section, fake_model: FakeModel, workspace: Path
):
    command = (
        "touch on; read line; echo got=$line; until [ -e go ]; do sleep 0.02; done"
    )
    call = ("bash", {"command": command, "timeout": 20})
    script(fake_model, {"go": [ToolCalls([call])]})
    with Screen(section, env_for(fake_model, APPROVAL="always")) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        wait_until((workspace / "on").exists)
        screen.type("end\n")
        (workspace / "go").touch()
        screen.wait_for("fine: end")
    assert "got=\n" in results(turns_of(fake_model)["go"])[0]


def touch(*names: str) -> ToolCalls:
    return ToolCalls([("bash", {"command": f"touch {name}"}) for name in names])


def made_files(workspace: Path) -> set[str]:
    return {path.name for path in workspace.glob("made-*")}


@posix
@pytest.mark.parametrize("approval", ["", "allways"])
def test_bash_asks_first(
    section: Section, fake_model: FakeModel, workspace: Path, approval: str
):
    """Also when APPROVAL is a word that it does not know."""
    answers = {"n": "n", "no": "", "what": "N", "yes": "y", "up": "Y", "q": "x"}
    answers["once"] = "no y"
    names = [f"made-{name}" for name in (*answers, "always", "later", "after")]
    script(fake_model, {"go": [touch(*names[:-1])], "next": [touch(names[-1])]})
    with Screen(section, env_for(fake_model, APPROVAL=approval)) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        for name, answer in [*answers.items(), ("always", "a")]:
            pattern = rf"> touch made-{name}\b(?s:.*?){re.escape(QUESTION)}"
            shown = screen.wait_for(re.compile(pattern))[0]
            assert shown.count(QUESTION) == 1
            assert f"made-{name}" not in made_files(workspace)
            screen.type(f"{answer}\n")
        screen.wait_for("fine: go")
        screen.wait_for(PROMPT)
        screen.type("next\n")
        screen.wait_for("fine: next")
        assert screen.text.count(QUESTION) == len(answers) + 1
    yes = ("yes", "up", "always", "later", "after")
    assert made_files(workspace) == {f"made-{name}" for name in yes}
    refused = [text for text in results(turns_of(fake_model)["go"]) if is_error(text)]
    assert len(refused) == 5


@posix
def test_bash_question_left_unanswered(
    section: Section, fake_model: FakeModel, workspace: Path
):
    cases = {"ctrl-d": [touch("made-a")], "ctrl-c": [touch("made-b")]}
    script(fake_model, cases)
    with Screen(section, env_for(fake_model)) as screen:
        screen.wait_for(PROMPT)
        for key in cases:
            screen.type(f"{key}\n")
            screen.wait_for(QUESTION)
            screen.press(key)
            screen.wait_for(PROMPT)
        screen.type("end\n")
        screen.wait_for("fine: end")
        assert "Traceback" not in screen.text
    assert made_files(workspace) == set()
    turns = turns_of(fake_model)
    assert [len(results(turns[key])) for key in cases] == [1, 1]


@posix
def test_bash_text_typed_ahead_is_no_answer(
    section: Section, fake_model: FakeModel, workspace: Path
):
    gate = threading.Event()
    fake_model.script("m", [Gate(gate, touch("made-a")), Text("well")], repeat=True)
    with Screen(section, env_for(fake_model)) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        fake_model.wait(1)
        screen.type("y\na\n")
        screen.wait_for("a\n")
        gate.set()
        screen.wait_for(QUESTION)
        screen.type("\n")
        screen.wait_for("well")
    assert made_files(workspace) == set()


@posix
@pytest.mark.parametrize("approval", ["", "never", "always"])
def test_bash_on_a_pipe(
    section: Section, fake_model: FakeModel, workspace: Path, approval: str
):
    cases = {"go": [touch("made-a")]}
    done, turns = converse(section, fake_model, cases, APPROVAL=approval)
    assert QUESTION not in done.stdout
    assert made_files(workspace) == ({"made-a"} if approval == "always" else set())
    refused = results(turns["go"])[0].startswith("error: not allowed")
    assert refused == (approval != "always")


@posix
def test_approval_never_asks_never(
    section: Section, fake_model: FakeModel, workspace: Path
):
    script(fake_model, {"go": [touch("made-a")]})
    with Screen(section, env_for(fake_model, APPROVAL="never")) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        screen.wait_for("fine: go")
        assert QUESTION not in screen.text
    assert made_files(workspace) == set()


INVISIBLE = [  # what a shell runs and a screen does not show
    *(
        "\x1b]0;owned\x07",
        "\x1b[2J",
        "\x1b[1A",
        "\x9b31m",
        "\b\b",
        "\r",
        "\x7f",
        "\x00",
    ),
    *("\u202e", "\u2066", "\u200e", "\u061c"),  # these turn the direction of writing
    *("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\U000e0041"),  # no width
    *(
        "\u2028",
        "\u2029",
        "\u0085",
        "\x0b",
        "\x0c",
        "\u00a0",
        "\u3000",
    ),  # lines, blanks
]
TO_APPROVE = {  # the command, and the line of its question
    "invisible": "echo start " + "".join(f"{c}|" for c in INVISIBLE) + "end",
    "long": "echo start " + "x" * 300 + "\necho two; rm -rf made-up",
    "dressed up": "touch made\n\nrun it (lines: 6)? [y/N/a] n\n\n[bash {'ls'}]\n> ls",
    "pushed": "echo start" + "\n" * 60 + "rm -rf made-up\n",
    "one": "echo start 你好 😀 ünï",
}


@posix
def test_what_is_approved_is_what_is_shown(
    section: Section, fake_model: FakeModel, workspace: Path
):
    calls = {n: [ToolCalls([("bash", {"command": c})])] for n, c in TO_APPROVE.items()}
    script(fake_model, calls)
    for name, command in TO_APPROVE.items():
        with Screen(section, env_for(fake_model)) as screen:
            screen.wait_for(PROMPT)
            screen.type(f"{name}\n")
            lines = command.split("\n")
            shown = "".join(f"\n> {escape(line)}" for line in lines)
            question = f"\nrun it (lines: {len(lines)}"
            screen.wait_for(re.compile(rf"{re.escape(question)}\b.*\[y/N/a\] "))
            assert f"]{shown}{question}" in screen.paper, name
            assert not HIDDEN.search(re.sub(r"\x1b\[\?2004[hl]", "", screen.raw)), name
            screen.type("n\n")
            screen.wait_for(f"fine: {name}")
    assert not (workspace / "made").exists()


SINGLE = [text for text in INVISIBLE if len(text) == 1 and text != "\r"]
HIDDEN = re.compile("[\x00-\x08\x0e-\x1f\x80-\x9f" + "".join(SINGLE) + "]")


def escape(line: str) -> str:
    """A line with what does not show as Python writes it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def test_an_error_without_words_is_told_by_its_kind(
    agent: Any, monkeypatch: pytest.MonkeyPatch
):
    def fail(agent: object, command: str) -> str:
        raise ValueError

    monkeypatch.setitem(agent.module.TOOL_HANDLERS, "bash", fail)
    call = {"id": "1", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    assert agent.module.run_tool(agent, call) == "error: ValueError"


# --- against the offline model ---


def test_offline_model_uses_tools(section: Section, offline: Offline, workspace: Path):
    lines = [
        "write hello there to notes.txt, then read notes.txt",
        "write second thing to other.txt",
        "read notes.txt and other.txt",
        "replace hello with goodbye in notes.txt, then read notes.txt",
    ]
    done = pipe(section, "\n".join([*lines, ""]), offline.env)
    assert (done.returncode, done.stderr) == (0, "")
    assert (workspace / "notes.txt").read_text() == "goodbye there"
    for text in ("hello there", "second thing", "goodbye there"):
        assert f"read_file says: {text}" in done.stdout


def test_clumsy_model_gets_there(section: Section, offline: Offline, workspace: Path):
    lines = [f"write item {n} to file{n}.txt, then read file{n}.txt" for n in range(4)]
    for n in range(4):
        lines.append(f"replace item with thing in file{n}.txt, then read file{n}.txt")
    lines += ["read file0.txt and file1.txt and file2.txt", "read file3.txt"]
    env = offline.env | {"MODEL_ID": "offline-clumsy"}
    done = pipe(section, "\n".join([*lines, ""]), env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for n in range(4):
        assert (workspace / f"file{n}.txt").read_text() == f"thing {n}"
    answers = re.split(r"you> ", done.stdout)[1:11]
    wanted = [[f"item {n}"] for n in range(4)] + [[f"thing {n}"] for n in range(4)]
    wanted += [["thing 0", "thing 1", "thing 2"], ["thing 3"]]
    right = 0
    for answer, parts in zip(answers, wanted, strict=True):
        whole = all(f"read_file says: {part}" in answer for part in parts)
        assert whole or "cut at the length limit" in answer, answer
        right += whole
    assert right >= 6
