"""s02 and later: tool calls off the wire, their results in the history, and the four tools."""

import json
import os
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import corpora
import pytest
from conftest import Offline
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
Turns = dict[str, list[dict]]


# --- talking: each turn is a line `case NAME`, and the model's answers hang on that name ---


def play(fake_model: FakeModel, cases: dict[str, Sequence[Item]], **more: str) -> dict[str, str]:
    """Script the model: the items of the case last asked for, then words. Returns its env."""
    left = {name: iter(items) for name, items in cases.items()}

    def reply(body: dict) -> Item:
        asked = [m["content"] for m in body["messages"] if m["role"] == "user"][-1]
        name = re.search(r"case (\S+)", asked)[1]
        return next(left.get(name, iter(())), Text(f"fine with {name}"))

    fake_model.script("m", [reply], repeat=True)
    return fake_model.env("m", CONTEXT_TOKENS="9000000", **more)


def turns_of(fake_model: FakeModel) -> Turns:
    """What the last request holds after each question: the history as the next turn sees it."""
    turns: Turns = {}
    for message in fake_model.chats[-1].messages:
        if message["role"] == "user":
            turns[re.search(r"case (\S+)", message["content"])[1]] = turn = []
        elif message["role"] in ("assistant", "tool"):
            turn.append(message)
    return turns


def converse(
    section: Section, fake_model: FakeModel, cases: dict[str, Sequence[Item]], **more: str
) -> tuple[CompletedProcess[str], Turns]:
    """Ask for each case over a pipe, then once more; fake_model refuses an invalid history."""
    env = play(fake_model, cases, **more)
    lines = "".join(f"case {name}\n" for name in (*cases, "end"))
    done = pipe(section, lines, env)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "fine with end" in done.stdout, done.stdout + done.stderr
    return done, turns_of(fake_model)


def run_calls(
    section: Section, fake_model: FakeModel, calls: Sequence[tuple[str, Any]], **more: str
) -> list[str]:
    """The results of calls made in one answer."""
    _, turns = converse(section, fake_model, {"go": [ToolCalls(calls)]}, **more)
    found = results(turns["go"])
    assert len(found) == len(calls)
    assert all(found), "an empty result tells a model nothing"
    return found


def calls_in(turn: list[dict]) -> list[tuple[str, dict]]:
    made = [call["function"] for message in turn for call in message.get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in made]


def results(turn: list[dict]) -> list[str]:
    return [message["content"] for message in turn if message["role"] == "tool"]


def is_error(text: str) -> bool:
    return text.lower().startswith("error")


def wait_until(condition: Any, timeout: float = 10) -> bool:
    """Wait for what only another process can tell."""
    deadline = time.monotonic() + timeout
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def alive(file: Path) -> bool:
    """Whether the process whose id a command wrote into a file still runs."""
    try:
        status = Path(f"/proc/{int(file.read_text())}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "(zombie)" not in status


# --- calls off the wire ---


@pytest.mark.parametrize("streamed", [True, False])
def test_every_stream_is_understood(section: Section, fake_model: FakeModel, streamed: bool):
    # fake_model cannot fold a chunk that has no finish_reason at all
    streams = {k: s for k, s in corpora.STREAMS.items() if streamed or k != "no_created"}
    tries = 3 if section.label >= "s09" else 1
    cases = {
        name: [Chunks(s.chunks, s.done)] * (tries if s.broken else 1) for name, s in streams.items()
    }
    options = json.dumps({"stream": streamed})
    done, turns = converse(section, fake_model, cases, MODEL_OPTIONS=options)
    assert done.returncode == 1, "some of these turns fail"
    assert {request.body["stream"] for request in fake_model.chats} == {streamed}
    broken = {name for name, stream in streams.items() if stream.broken}
    assert set(streams) - set(turns) == broken
    for name in set(streams) - broken:
        stream, turn = streams[name], turns[name]
        assert turn[0]["content"] == stream.text, name
        assert stream.text.strip() in done.stdout, name
        assert calls_in(turn) == stream.calls, name
        assert len(results(turn)) == len(stream.calls), name
        for (tool, _), result in zip(stream.calls, results(turn), strict=True):
            assert tool in result, f"{name}: {result}"
        extras = [c.get("extra_content") for c in turn[0].get("tool_calls", ())]
        signed = [{"google": {"thought_signature": "SIG"}}]
        assert extras == (signed if name == "gemini_sig" else [None] * len(stream.calls)), name
        thoughts = "hm yes" if name == "reasoning" else None
        assert turn[0].get("reasoning_content") == thoughts, name


def test_thoughts_before_a_call_go_back(section: Section, fake_model: FakeModel):
    thinking = [corpora.delta(reasoning_content=text) for text in ("hm ", "yes")]
    call = corpora.calls(corpora.call(0, "c", "read_file", '{"path": "SOUL.md"}'))
    chunks = Chunks([corpora.says(""), *thinking, call, corpora.CALLED])
    _, turns = converse(section, fake_model, {"go": [chunks]})
    assert [message.get("reasoning_content") for message in turns["go"]] == ["hm yes", None, None]


NAMES = st.sampled_from(["read_file", "get-time"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["{}", '"}']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=2, max_size=4)
STYLE = st.fixed_dictionaries(
    {
        "index": st.sampled_from(["given", "missing", "zero"]),
        "ids": st.sampled_from(["each", "first", "empty", "none", "same"]),
        "names": st.sampled_from(["each", "first"]),
        "arguments": st.sampled_from(["split", "opened empty", "whole", "object"]),
        "chunk": st.sampled_from(["one each", "one each", "one each", "all in one"]),
    }
)


def pieces_of(number: int, call: tuple[str, dict], style: dict, data: st.DataObject) -> list[dict]:
    """One call as a server of this style sends it, in pieces."""
    name, arguments = call
    text = json.dumps(arguments)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(text) - 1), min_size=1, max_size=3)))
    parts: list = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]
    alone = style["index"] != "given" and style["ids"] not in ("each", "first")
    if style["arguments"] in ("whole", "object") or style["chunk"] == "all in one":
        parts = [arguments if style["arguments"] == "object" else text]
    elif style["arguments"] == "opened empty" and not alone:  # else no one could tell calls apart
        parts = ["", *parts]
    made = []
    for position, part in enumerate(parts):
        id = {"empty": "", "none": None, "same": "call_0"}.get(style["ids"], f"call_{number}")
        id = None if position and style["ids"] == "first" else id
        index = {"given": number, "missing": None, "zero": 0}[style["index"]]
        named = name if not position or style["names"] == "each" else None
        made.append(corpora.call(index, id, named, part))
    return made


def stream_of(made: list[tuple[str, dict]], style: dict, data: st.DataObject) -> Chunks:
    """Calls as a server of this style streams them."""
    queues = [pieces_of(number, call, style, data) for number, call in enumerate(made)]
    if style["chunk"] == "all in one":
        chunks = [corpora.calls(*(queue[0] for queue in queues))]
    elif style["index"] == "given":
        order = data.draw(st.permutations([n for n, queue in enumerate(queues) for _ in queue]))
        iterators = [iter(queue) for queue in queues]
        chunks = [corpora.calls(next(it)) for it in iterators]
        chunks += [corpora.calls(p) for n in order if (p := next(iterators[n], None))]
    else:
        chunks = [corpora.calls(piece) for queue in queues for piece in queue]
    return Chunks([corpora.says(""), *chunks, corpora.CALLED])


@pytest.mark.costly
def test_calls_survive_any_way_of_sending_them(section: Section, fake_model: FakeModel):
    said: list[Item] = []
    fake_model.script("m", [lambda _: said.pop(0)], repeat=True)
    with Screen(section, fake_model.env("m", CONTEXT_TOKENS="9000000")) as screen:
        screen.wait_for("you> ")

        @settings(
            max_examples=60,
            phases=[Phase.generate],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(made=CALLS, style=STYLE, data=st.data())
        def check(made: list[tuple[str, dict]], style: dict, data: st.DataObject) -> None:
            count = len(fake_model.chats)
            said[:] = [stream_of(made, style, data), Text(f"seen {count}")]
            screen.type("go\n")
            screen.wait_for(re.compile(rf"seen {count}\b.*?you> ", re.S))
            messages = fake_model.chats[-1].messages
            start = max(i for i, message in enumerate(messages) if message["role"] == "user")
            assert calls_in(messages[start:]) == made, style
            assert len(results(messages[start:])) == len(made)

        check()


def test_calls_told_apart_by_their_ids_alone(section: Section, fake_model: FakeModel):
    cases: dict[str, Sequence[Item]] = {}
    for index in (None, 0):
        chunks = []
        for number in (1, 2):
            chunks += [corpora.call(index, f"{index}-{number}", "no_such_tool", "")]
            chunks += [corpora.call(index, None, None, text) for text in ('{"a":', f"{number}}}")]
        cases[f"{index}"] = [Chunks([*map(corpora.calls, chunks), corpora.CALLED])]
    _, turns = converse(section, fake_model, cases)
    for name in cases:
        assert calls_in(turns[name]) == [("no_such_tool", {"a": n}) for n in (1, 2)], name


def test_parallel_calls_run_in_order(section: Section, fake_model: FakeModel, workspace: Path):
    made = [
        ("write_file", {"path": "a.txt", "content": "one"}),
        ("read_file", {"path": "a.txt"}),
        ("write_file", {"path": "a.txt", "content": "two"}),
        ("read_file", {"path": "nothing.txt"}),
        ("read_file", {"path": "a.txt"}),
    ]
    endings = {"stop": "abcde", "tool_calls": "fghij", "length": "klmno"}
    cases = {name: [ToolCalls(made, "Now.", name, list(ids))] for name, ids in endings.items()}
    _, turns = converse(section, fake_model, cases)
    assert len(fake_model.chats) == 7, "all five results go back in one request"
    for finish, ids in endings.items():
        turn = turns[finish]
        assert turn[0]["content"] == "Now."
        assert calls_in(turn) == made
        assert [m["tool_call_id"] for m in turn if m["role"] == "tool"] == list(ids)
        assert (results(turn)[1], results(turn)[4]) == ("one", "two")
        assert is_error(results(turn)[3])
        assert turn[-1]["content"] == f"fine with {finish}"


def test_finish_reason_tool_calls_without_a_call(section: Section, fake_model: FakeModel):
    cases = {"words": [Text("I will.", "tool_calls")], "nothing": [Text("", "tool_calls")]}
    done, turns = converse(section, fake_model, cases)
    assert "I will." in done.stdout
    assert turns["words"] == [{"role": "assistant", "content": "I will."}]
    assert "nothing" not in turns


DEEP = '{"path": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD_CALLS = {
    "unknown-tool": ("no_such_tool", "{}", "no_such_tool"),
    "odd-name": ("rm -rf /; é\n\x1b[2J", "{}", "read_file"),
    "long-name": ("n" * 500, "{}", "read_file"),
    "no-name": ("", "{}", "read_file"),
    "no-json": ("read_file", "path=SOUL.md", "JSON"),
    "cut-off": ("read_file", '{"path": "SOUL.m', "JSON"),
    "two-objects": ("read_file", '{"path": "a"}{"path": "bcdefghijkl"}', "JSON"),
    "list": ("read_file", "[1, 2]", "JSON|object"),
    "text": ("read_file", '"x"', "JSON|object"),
    "number": ("read_file", "5", "JSON|object"),
    "true": ("read_file", "true", "JSON|object"),
    "null": ("read_file", "null", "path"),
    "empty": ("read_file", "", "path"),
    "blank": ("read_file", " \n", "path"),
    "bare-nan": ("read_file", "NaN", "JSON|object"),
    "nan-inside": ("read_file", '{"path": "SOUL.md", "limit": NaN}', "JSON|limit"),
    "infinity": ("read_file", '{"path": "SOUL.md", "limit": -Infinity}', "JSON|limit"),
    "huge-number": ("read_file", '{"path": "SOUL.md", "limit": 1%s}' % ("0" * 5000), ""),
    "huge-float": ("read_file", '{"path": "SOUL.md", "limit": 1e999}', "limit"),
    "deep": ("read_file", DEEP, "path|JSON"),
    "nested": ("read_file", '{"path": ' + "[" * 200 + "]" * 200 + "}", "path"),
    "missing": ("write_file", '{"path": "a.txt"}', "content"),
    "unknown": ("read_file", '{"path": "SOUL.md", "encoding": "utf-8"}', "encoding"),
    "self": ("read_file", '{"path": "SOUL.md", "agent": "x"}', "agent"),
    "wrong-type": ("read_file", '{"path": 5}', "path"),
    "null-value": ("read_file", '{"path": null}', "path"),
    "text-for-number": ("read_file", '{"path": "SOUL.md", "limit": "ten"}', "limit"),
    "bool-for-number": ("read_file", '{"path": "SOUL.md", "limit": true}', "limit"),
    "folder": ("read_file", '{"path": "skills"}', "skills"),
    "below-a-file": ("read_file", '{"path": "SOUL.md/x"}', ""),
    "long-path": ("write_file", json.dumps({"path": "x" * 5000, "content": ""}), ""),
}


@pytest.mark.parametrize("streamed", [True, False])
def test_bad_calls_become_errors(
    section: Section, fake_model: FakeModel, workspace: Path, streamed: bool
):
    cases = {name: [ToolCalls([(tool, a)])] for name, (tool, a, _) in BAD_CALLS.items()}
    options = json.dumps({"stream": streamed})
    done, turns = converse(section, fake_model, cases, MODEL_OPTIONS=options)
    assert done.returncode == 0, done.stdout
    assert set(turns) == {*cases, "end"}
    for name, (_, _, told) in BAD_CALLS.items():
        (result,) = results(turns[name])
        assert is_error(result), f"{name}: {result}"
        assert re.search(told, result), f"{name}: {result}"
        assert 10 < len(result) < 10_000, f"{name}: {result}"
    assert "\x1b[2J" not in done.stdout
    assert not (workspace / "a.txt").exists()


HALVES = {
    "escaped": ("read_file", '{"path": "\\ud83d"}', "half-1"),
    "escaped-key": ("read_file", '{"\\ud83d": "SOUL.md"}', "half-2"),
    "raw": ("read_file", '{"path": "\ud83d"}', "half-3"),
    "no-json": ("read_file", "path \ud83d", "half-4"),
    "name": ("read_\ud83d", "{}", "half-5"),
    "id": ("no_such_tool", "{}", "half-\ud83d"),
    "written": ("write_file", '{"path": "half.txt", "content": "new \\ud83d"}', "half-6"),
}


def test_half_a_character(section: Section, fake_model: FakeModel, workspace: Path):
    (workspace / "half.txt").write_text("old", encoding="utf-8")
    cases = {
        name: [ToolCalls([(tool, arguments)], ids=[id])]
        for name, (tool, arguments, id) in HALVES.items()
    }
    _, turns = converse(section, fake_model, cases)
    for name in cases:
        assert is_error(results(turns[name])[0]) or name == "written", name
    assert (workspace / "half.txt").read_bytes() in (b"old", b"new ?", "new \ufffd".encode())


def test_ids_that_repeat(section: Section, fake_model: FakeModel, workspace: Path):
    cases = {}
    for number, ids in enumerate((["x"] * 3, [""] * 3, ["a", "a", "b"], ["c" * 300] * 3)):
        made = [("read_file", {"path": f"{name}.txt"}) for name in "abc"]
        cases[f"{number}"] = [ToolCalls(made, ids=ids), ToolCalls(made, ids=ids)]
        cases[f"{number}-again"] = [ToolCalls(made, ids=ids)]
    for name in "abc":
        (workspace / f"{name}.txt").write_text(f"text {name}")
    _, turns = converse(section, fake_model, cases)
    for name, replies in cases.items():
        assert results(turns[name]) == ["text a", "text b", "text c"] * len(replies)


# --- the turn ---


@pytest.mark.guard
def test_endless_calls_stop_at_25(section: Section, fake_model: FakeModel, workspace: Path):
    (workspace / "a.txt").write_text("again")
    endless = [ToolCalls([("read_file", {"path": "a.txt"})] * 2, "", "stop")] * 40
    done, turns = converse(section, fake_model, {"on": endless})
    asked = [request.messages for request in fake_model.chats]
    assert sum(messages[-1]["content"] != "case end" for messages in asked) == 25
    assert re.search(r"stopped.* 25\b", done.stdout)
    assert len(calls_in(turns["on"])) == len(results(turns["on"])) == 50
    assert results(turns["on"])[:48] == ["again"] * 48


@posix
def test_ctrl_c_while_a_command_runs(section: Section, fake_model: FakeModel, workspace: Path):
    pids = [workspace / name for name in ("shell", "child")]
    command = "echo $$ > shell; trap '' INT TERM; sleep 300 & echo $! > child; wait"
    made = [("bash", {"command": command}), ("write_file", {"path": "b.txt", "content": "b"})]
    with Screen(section, play(fake_model, {"go": [ToolCalls(made)]})) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        screen.wait_for(QUESTION)
        screen.type("y\n")
        assert wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
        assert all(map(alive, pids))
        screen.press("ctrl-c")
        screen.wait_for("you> ")
        assert wait_until(lambda: not any(map(alive, pids)), 2)
        screen.type("case end\n")
        screen.wait_for("fine with end")
        assert "Traceback" not in screen.text
    turns = turns_of(fake_model)
    assert calls_in(turns["go"]) == made
    assert "interrupted" in results(turns["go"])[0]
    assert not (workspace / "b.txt").exists()


def test_ctrl_c_while_the_model_talks_after_a_tool(
    section: Section, fake_model: FakeModel, workspace: Path
):
    gate = threading.Event()
    made = [("write_file", {"path": "a.txt", "content": "once"}), ("read_file", {"path": "a.txt"})]
    words = Gate(gate, Text("Halfway through", pieces=["Half", "way", " through"]), 2)
    with Screen(section, play(fake_model, {"go": [ToolCalls(made), words]})) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        screen.wait_for("Half")
        screen.press("ctrl-c")
        screen.wait_for("you> ")
        gate.set()
        screen.type("case end\n")
        screen.wait_for("fine with end")
        assert "Traceback" not in screen.text
    turn = turns_of(fake_model)["go"]
    assert calls_in(turn) == made
    assert results(turn)[1] == "once"
    assert turn[-1]["role"] == "assistant"


@posix
def test_an_error_in_the_middle_keeps_the_results(
    section: Section, fake_model: FakeModel, workspace: Path
):
    failures: dict[str, Item] = {"500": Error(500), "drop": Drop(0), "mid-drop": Drop(2)}
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
    long = "line\n\x1b[31mred\x1b[0m\r\x9b2J\n" * 500
    made = [
        ("write_file", {"path": "a.txt", "content": long}),
        ("read_file", {"path": "a.txt"}),
        ("no_such_tool", {"what": "x"}),
    ]
    done, _ = converse(section, fake_model, {"go": [ToolCalls(made, "Look:")]})
    for name, arguments in made:
        (line,) = [line for line in done.stdout.splitlines() if name in line]
        assert str(next(iter(arguments.values()))) in line
        assert len(line) <= 150
    assert not re.search(r"[\x1b\x9b\r]", done.stdout.replace("\r\n", "\n"))
    assert len(done.stdout) < 1_500


# --- the file tools ---


@pytest.mark.guard
@posix
def test_file_tools_stay_inside_the_workspace(
    section: Section, fake_model: FakeModel, workspace: Path, tmp_path: Path
):
    outside, sibling = tmp_path / "outside", tmp_path / "workspace-secrets"
    for folder in (outside, sibling, workspace / ".sessions", workspace / "sub"):
        folder.mkdir(exist_ok=True)
    kept = [folder / "key.txt" for folder in (outside, sibling, workspace / ".sessions")]
    for file in (*kept, workspace / ".env"):
        file.write_text("hidden-thing")
    links = {"link.txt": outside / "key.txt", "link2.txt": "link.txt", "linkdir": outside}
    links |= {"dangling.txt": outside / "new.txt", "to_env.txt": ".env", "to_dots": ".sessions"}
    for name, target in links.items():
        (workspace / name).symlink_to(target)
    refused = [
        "../outside/key.txt",
        "sub/../../outside/key.txt",
        "../workspace-secrets/key.txt",
        "../outside/new.txt",
        "../new-folder/new.txt",
        *map(str, (outside / "key.txt", sibling / "key.txt", sibling / "new.txt")),
        *("link.txt", "link2.txt", "linkdir/key.txt", "linkdir/new.txt", "dangling.txt"),
        *(".env", "./.env", "sub/../.env", str(workspace / ".env"), "to_env.txt", ".new"),
        *(".sessions/key.txt", ".sessions/new.txt", "to_dots/key.txt"),
        *("SOUL.md\0", "\0", "", ".", ".."),
    ]
    others = {"write_file": {"content": "OWNED"}, "read_file": {}}
    others["edit_file"] = {"old_text": "hidden", "new_text": "OWNED"}
    made = [(tool, {"path": path, **more}) for path in refused for tool, more in others.items()]
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    found = run_calls(section, fake_model, made)
    for call, result in zip(made, found, strict=True):
        assert is_error(result), f"{call}: {result}"
        assert "hidden-thing" not in result, call
    assert {path.read_text() for path in (*kept, workspace / ".env")} == {"hidden-thing"}
    assert all(path.lstat().st_ino == inode for path, inode in before.items())
    new = {path for path in tmp_path.rglob("*") if path not in before}
    own = {
        path for path in new if path.relative_to(tmp_path).parts[:2] == ("workspace", ".sessions")
    }
    assert not [path for path in own if path.name == "new.txt"]
    assert not [path for path in new - own if outside in path.parents or "new" in path.name]
    assert not [p for p in new - own if p.is_file() and b"OWNED" in p.read_bytes()]


@posix
def test_what_is_inside_is_allowed(
    section: Section, fake_model: FakeModel, workspace: Path, tmp_path: Path
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


def test_read_file_offset_and_limit(section: Section, fake_model: FakeModel, workspace: Path):
    (workspace / "ten.txt").write_text("".join(f"line {n}\n" for n in range(1, 11)))
    asked = [
        (3, 2),
        (1, 1),
        (10, 5),
        (9, 1),
        (0, 1),
        (-5, 2),
        (99, 5),
        (2, 0),
        (2, -1),
        (2, 10**30),
    ]
    made = [("read_file", {"path": "ten.txt", "offset": o, "limit": n}) for o, n in asked]
    made += [("read_file", {"path": "ten.txt", "offset": 9}), ("read_file", {"path": "ten.txt"})]
    found = run_calls(section, fake_model, made)
    lines = [[int(n) for n in re.findall(r"^line (\d+)$", text, re.M)] for text in found]
    assert lines[:4] == [[3, 4], [1], [10], [9]]
    assert lines[6] == []
    assert lines[9:] == [list(range(2, 11)), [9, 10], list(range(1, 11))]
    assert not any("Error" in text or "Traceback" in text for text in found)
    assert "10" in found[0] or "11" in found[0], "how long the file is"


def test_read_file_long_file(section: Section, fake_model: FakeModel, workspace: Path):
    lines = [f"line {n:05} of a file that is far longer than one result" for n in range(1, 5001)]
    (workspace / "long.txt").write_text("\n".join(lines))
    made: list[tuple[str, dict]] = [("read_file", {"path": "long.txt"})]
    made += [
        ("read_file", {"path": "long.txt", "offset": n, "limit": 400}) for n in range(1, 5001, 400)
    ]
    whole, *parts = run_calls(section, fake_model, made)
    assert len(whole) <= MAX_RESULT
    assert re.search(r"cut|of 5,?000", whole)
    assert [line for part in parts for line in part.splitlines() if line in set(lines)] == lines


def test_read_file_odd_files(section: Section, fake_model: FakeModel, workspace: Path):
    files = {
        "crlf.txt": b"one\r\ntwo\r\n",
        "bom.txt": b"\xef\xbb\xbfhello",
        "empty.txt": b"",
        "binary.bin": bytes(range(256)) * 10,
        "latin.txt": "café".encode("latin-1"),
        "nul.txt": b"a\x00b",
        "big.txt": b"0123456789abcde\n" * (20 * 2**16),
    }
    for name, data in files.items():
        (workspace / name).write_bytes(data)
    (workspace / "folder").mkdir()
    names = [*files, "folder", "missing.txt", "SOUL.md/"]
    if os.name == "posix":
        os.mkfifo(workspace / "fifo")
        names += ["fifo"]
    made = [("read_file", {"path": name}) for name in names]
    made += [("edit_file", {"path": n, "old_text": "a", "new_text": "b"}) for n in names[7:]]
    texts = run_calls(section, fake_model, made)
    found = dict(zip(names, texts, strict=False))
    assert found["crlf.txt"].splitlines() == ["one", "two"]
    assert found["bom.txt"] == "hello"
    assert not is_error(found["empty.txt"])
    assert "café" not in found["latin.txt"]
    for name in {"binary.bin", "latin.txt", "folder", "missing.txt", "fifo"} & {*names}:
        assert is_error(found[name]), name
    assert "missing.txt" in found["missing.txt"]
    assert len(found["big.txt"]) <= MAX_RESULT
    assert [is_error(text) for name, text in zip(names[7:], texts[len(names) :], strict=True)][
        :2
    ] == [
        True,
        True,
    ]


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
    made = [("write_file", {"path": path, "content": text}) for path, text in wanted.items()]
    found = run_calls(section, fake_model, made)
    assert [is_error(text) for text in found] == [False] * 3 + [True] * 3
    assert (box / "deep/er/new.txt").read_bytes() == b"gr\xc3\xbc\xc3\x9fe\r\n\ttabs\n"
    assert (box / "old.sh").read_text() == "new"
    assert (box / "old.sh").stat().st_mode & 0o777 == 0o751
    assert (workspace / "second-name").read_text() == "old and long text", "written in place"
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
    "overlapping": (b"aaa", "aa", "b", None),
    "empty-old": (b"one two\n", "", "1", None),
    "empty-file": (b"", "", "1", None),
    "case": (b"One\n", "one", "1", None),
    "delete": (b"one two\n", " two", "", b"one\n"),
    "to-itself": (b"one two", "one", "one one", b"one one two"),
    "crlf": (b"a\r\nb\r\nc\r\n", "a\nb", "x\ny\nz", b"x\r\ny\r\nz\r\nc\r\n"),
    "crlf-as-it-is": (b"a\r\nb\r\nc", "a\r\nb", "x\r\ny", b"x\r\ny\r\nc"),
    "mixed": (b"a\r\nb\nc\n\r", "a", "A", b"A\r\nb\nc\n\r"),
    "mixed-lines": (b"a\r\nb\nc\n", "b\nc", "b\nC", b"a\r\nb\nC\n"),
    "old-mac": (b"a\rb\rc", "b", "B", b"a\rB\rc"),
    "odd-ends": (
        b"a\x0bb\x0cc\xc2\x85d\xe2\x80\xa8e",
        "e",
        "E",
        b"a\x0bb\x0cc\xc2\x85d\xe2\x80\xa8E",
    ),
    "bom": (b"\xef\xbb\xbfhello\n", "hello", "bye", b"\xef\xbb\xbfbye\n"),
    "blanks": (b" \ta \n\n", "a", "b", b" \tb \n\n"),
    "literal": (b"a.c \\1", "a.c", "\\g<0>\\1", b"\\g<0>\\1 \\1"),
    "latin": (b"caf\xe9 one", "one", "two", None),
    "binary": (b"\xff\xfeo\x00n\x00e\x00", "o", "x", None),
}


def test_edit_file(section: Section, fake_model: FakeModel, workspace: Path):
    made, box = [], workspace / "box"
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
        if data != (before if after is None else after) or is_error(found[name]) != (after is None):
            wrong[name] = data, found[name]
    assert not wrong
    assert re.search(r"\b2\b", found["twice"])
    assert (workspace / "second-name").read_bytes() == EDITS["once"][0], "written in place"
    assert sorted(path.name for path in box.iterdir()) == sorted(EDITS)
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in box.iterdir()} == {0o750}


# --- bash ---


@posix
def test_bash_says_what_happened(section: Section, fake_model: FakeModel, workspace: Path):
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
    }
    made = [("bash", {"command": command}) for command in commands]
    found = run_calls(section, fake_model, made, APPROVAL="always")
    for (command, told), result in zip(commands.items(), found, strict=True):
        assert re.search(told, result), f"{command}: {result}"


@pytest.mark.guard
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
def test_bash_timeout_kills_the_family(section: Section, fake_model: FakeModel, workspace: Path):
    names = ["shell", "child", "grandchild"]
    command = (
        "trap '' TERM INT HUP; echo $$ > shell; sleep 300 & echo $! > child;"
        "bash -c 'sleep 300 & echo $! > grandchild; wait' & echo before; wait"
    )
    (text,) = run_calls(
        section, fake_model, [("bash", {"command": command, "timeout": 1})], APPROVAL="always"
    )
    assert "before" in text
    assert re.search(r"killed|timed? ?out", text)
    assert [name for name in names if not (workspace / name).exists()] == []
    assert wait_until(lambda: not any(alive(workspace / name) for name in names), 3)


@posix
def test_bash_long_output_loses_its_middle(section: Section, fake_model: FakeModel):
    filling = "head -c 10000000 /dev/zero | tr '\\0' "
    made = [
        ("bash", {"command": f"echo HEAD; {filling} x; echo TAIL; exit 4"}),
        ("bash", {"command": "echo HEAD; yes 你好 | head -c 3000000; echo TAIL"}),
        ("bash", {"command": "echo HEAD; head -c 29990 /dev/zero | tr '\\0' y; echo TAIL"}),
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
        assert "early" in text
    finally:
        if alive(workspace / "pid"):
            os.kill(int((workspace / "pid").read_text()), 9)


@posix
def test_bash_leaves_the_typing_alone(section: Section, fake_model: FakeModel, workspace: Path):
    command = "touch started; read line; echo got=$line; until [ -e go ]; do sleep 0.02; done"
    cases = {"go": [ToolCalls([("bash", {"command": command, "timeout": 20})])]}
    with Screen(section, play(fake_model, cases, APPROVAL="always")) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        assert wait_until((workspace / "started").exists)
        screen.type("case end\n")
        (workspace / "go").touch()
        screen.wait_for("fine with end")
    assert "got=\n" in results(turns_of(fake_model)["go"])[0]


def touch(*names: str) -> ToolCalls:
    return ToolCalls([("bash", {"command": f"touch {name}"}) for name in names])


def made_files(workspace: Path) -> set[str]:
    return {path.name for path in workspace.glob("made-*")}


@pytest.mark.guard
@posix
def test_bash_asks_first(section: Section, fake_model: FakeModel, workspace: Path):
    answers = {"n": "n", "no": "", "what": "N", "yes": "y", "up": "Y", "q": "x", "once": "no y"}
    names = [f"made-{name}" for name in (*answers, "always", "later", "after")]
    cases = {"go": [touch(*names[:-1])], "next": [touch(names[-1])]}
    with Screen(section, play(fake_model, cases)) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        for name, answer in [*answers.items(), ("always", "a")]:
            asked = screen.wait_for(
                re.compile(rf"touch made-{name}\b(?s:.*?){re.escape(QUESTION)}")
            )
            assert asked[0].count(QUESTION) == 1
            assert f"made-{name}" not in made_files(workspace)
            screen.type(f"{answer}\n")
        screen.wait_for("fine with go")
        screen.wait_for("you> ")
        screen.type("case next\n")
        screen.wait_for("fine with next")
        assert screen.text.count(QUESTION) == len(answers) + 1
    assert made_files(workspace) == {f"made-{n}" for n in ("yes", "up", "always", "later", "after")}
    refused = [result for result in results(turns_of(fake_model)["go"]) if is_error(result)]
    assert len(refused) == 5


@pytest.mark.guard
@posix
def test_bash_question_left_unanswered(section: Section, fake_model: FakeModel, workspace: Path):
    cases = {"ctrl-d": [touch("made-a")], "ctrl-c": [touch("made-b")]}
    with Screen(section, play(fake_model, cases)) as screen:
        screen.wait_for("you> ")
        for key in cases:
            screen.type(f"case {key}\n")
            screen.wait_for(QUESTION)
            screen.press(key)
            screen.wait_for("you> ")
        screen.type("case end\n")
        screen.wait_for("fine with end")
        assert "Traceback" not in screen.text
    assert made_files(workspace) == set()
    turns = turns_of(fake_model)
    assert [len(results(turns[key])) for key in cases] == [1, 1]


@pytest.mark.guard
@posix
def test_bash_text_typed_ahead_is_no_answer(
    section: Section, fake_model: FakeModel, workspace: Path
):
    gate = threading.Event()
    env = play(fake_model, {"go": [Gate(gate, touch("made-a"))]})
    fake_model.script("m", [Gate(gate, touch("made-a")), Text("well")], repeat=True)
    with Screen(section, env) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        fake_model.wait(1)
        screen.type("y\na\n")
        screen.wait_for("a\n")
        gate.set()
        screen.wait_for(QUESTION)
        screen.type("\n")
        screen.wait_for("well")
    assert made_files(workspace) == set()


@pytest.mark.guard
@posix
@pytest.mark.parametrize("approval", ["", "never", "always"])
def test_bash_on_a_pipe(section: Section, fake_model: FakeModel, workspace: Path, approval: str):
    done, turns = converse(section, fake_model, {"go": [touch("made-a")]}, APPROVAL=approval)
    assert QUESTION not in done.stdout
    assert made_files(workspace) == ({"made-a"} if approval == "always" else set())
    assert is_error(results(turns["go"])[0]) == (approval != "always")


@pytest.mark.guard
@posix
def test_approval_never_asks_never(section: Section, fake_model: FakeModel, workspace: Path):
    env = play(fake_model, {"go": [touch("made-a")]}, APPROVAL="never")
    with Screen(section, env) as screen:
        screen.wait_for("you> ")
        screen.type("case go\n")
        screen.wait_for("fine with go")
        assert QUESTION not in screen.text
    assert made_files(workspace) == set()


@pytest.mark.guard
def test_approval_nonsense_is_refused(section: Section, fake_model: FakeModel):
    done = pipe(section, "hello\n", fake_model.env("text", APPROVAL="allways"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "APPROVAL" in line
    assert "allways" in line
    assert fake_model.requests == []


@pytest.mark.guard
@posix
def test_command_to_approve_is_shown_whole_and_harmless(section: Section, fake_model: FakeModel):
    command = "echo start \x1b]0;owned\x07\x1b[2J\x1b[1A\x9b31m\b\b\b\r# hidden? " + "x" * 300
    command += "\necho second line; rm -rf made-up"
    with Screen(
        section, play(fake_model, {"go": [ToolCalls([("bash", {"command": command})])]})
    ) as s:
        s.wait_for("you> ")
        s.type("case go\n")
        s.wait_for(QUESTION)
        raw, paper = s.raw, s.paper
        s.type("n\n")
        s.wait_for("fine with go")
    for bad in ("\x1b]0;", "\x1b[2J", "\x1b[1A", "\x9b", "\b", "\x07"):
        assert bad not in raw, repr(bad)
    shown = paper.rpartition("case go")[2].replace("\n", " ")
    for part in ("echo start", "# hidden? " + "x" * 300, "second line; rm -rf made-up"):
        assert part in shown


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
    lines += [f"replace item with thing in file{n}.txt, then read file{n}.txt" for n in range(4)]
    lines += ["read file0.txt and file1.txt and file2.txt", "read file3.txt"]
    done = pipe(section, "\n".join([*lines, ""]), offline.env | {"MODEL_ID": "offline-clumsy"})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert [(workspace / f"file{n}.txt").read_text() for n in range(4)] == [
        f"thing {n}" for n in range(4)
    ]
    answers = re.split(r"you> ", done.stdout)[1:11]
    wanted = [[f"item {n}"] for n in range(4)] + [[f"thing {n}"] for n in range(4)]
    wanted += [["thing 0", "thing 1", "thing 2"], ["thing 3"]]
    right = 0
    for answer, texts in zip(answers, wanted, strict=True):
        whole = all(f"read_file says: {text}" in answer for text in texts)
        assert whole or "cut at the length limit" in answer, answer
        right += whole
    assert right >= 6
    assert "not a JSON object" not in done.stdout


@pytest.mark.guard
@since("s02")
def test_a_command_to_approve_cannot_dress_up_as_the_screen(
    section: Section, fake_model: FakeModel, workspace: Path
):
    command = "touch made\n\nrun it? [y/N/a] n\n\n[bash 'ls']\n\u202e> ls"
    fake_model.script("m", [ToolCalls([("bash", {"command": command})]), Text("done")])
    with Screen(section, fake_model.env("m")) as screen:
        screen.wait_for("you> ")
        screen.type("go\n")
        screen.wait_for("N/a]")
        screen.wait_for("N/a]")
        shown = screen.text[screen.text.index("\n> touch") :]
        assert all(line.startswith(">") for line in shown.splitlines()[1:-1]), shown
        assert "\u202e" not in screen.raw
        screen.type("n\n")
        screen.wait_for("you> ")
    assert not (workspace / "made").exists()


@since("s02")
@pytest.mark.parametrize("extra", [{"g": "\ud83d"}, {"x": float("nan")}], ids=["half", "nan"])
def test_vendor_extras_that_cannot_go_back(section: Section, fake_model: FakeModel, extra: dict):
    call = {"index": 0, "id": "c1", "type": "function", "extra_content": extra}
    call["function"] = {"name": "read_file", "arguments": '{"path": "x"}'}
    delta = {"reasoning_content": "half \ud83d", "tool_calls": [call]}
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": "tool_calls"}]}]
    fake_model.script("m", [Chunks(chunks), Text("one"), Text("two")])
    done = pipe(section, "go\nagain\n", fake_model.env("m"))
    assert done.returncode == 0, done.stdout
    assert "agent> two" in done.stdout


@since("s02")
@pytest.mark.parametrize("value", [None, [], {}], ids=["null", "list", "object"])
def test_an_unknown_argument_is_named(section: Section, fake_model: FakeModel, value: object):
    call = ("read_file", {"path": "x", "agent": value})
    fake_model.script("m", [ToolCalls([call]), Text("done")])
    pipe(section, "go\n", fake_model.env("m"))
    assert "agent is unknown" in fake_model.chats[1].messages[-1]["content"]


@since("s02")
def test_new_lines_in_a_file_with_others(section: Section, fake_model: FakeModel, workspace: Path):
    """A line added to a file of CR LF lines ends as they do, and can be edited again."""
    (workspace / "f").write_bytes(b"a\r\nb\r\nc\r\n")
    first = ("edit_file", {"path": "f", "old_text": "b", "new_text": "b\nnew"})
    second = ("edit_file", {"path": "f", "old_text": "b\nnew\nc", "new_text": "d"})
    fake_model.script("m", [ToolCalls([first]), ToolCalls([second]), Text("done")])
    pipe(section, "go\n", fake_model.env("m"))
    assert (workspace / "f").read_bytes() == b"a\r\nd\r\n"


@since("s02")
def test_an_error_without_words_is_told_by_its_kind(section, monkeypatch):
    def fail(agent: object, command: str) -> str:
        raise ValueError

    monkeypatch.setitem(section.module.TOOL_HANDLERS, "bash", fail)
    call = {"id": "1", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    agent = SimpleNamespace(show=lambda text: None)
    assert section.module.run_tool(agent, call) == "error: ValueError"
