"""Routing (s05): which agent a message goes to, in which session, and what the bindings may say."""

import itertools
import json
import re
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import harness
import pytest
from fake_model import FakeModel
from fake_model import Text
from harness import since
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from first.test_gateway import PROMPT
from first.test_gateway import Desk
from first.test_gateway import until

AGENTS = ("main", "luna", "sage")
TIERS = ("peer", "guild", "account", "channel")
FIELDS = {
    "channel": ("web", "telegram", ""),
    "account": ("work", ""),
    "peer": ("1:topic:7", "1", "2", ""),
    "guild": ("g", ""),
}
exhaustive = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Iterator[Desk]:
    with Desk(section, workspace, fake_model) as desk:
        yield desk


# --- the table ---


def fits(binding: dict, message: tuple[str, ...]) -> bool:
    """Whether all fields that a binding gives match; a topic is in its chat."""
    chat = message[2].split(":topic:")[0]
    return all(
        not binding[name] or binding[name] == value or (name == "peer" and binding[name] == chat)
        for name, value in zip(FIELDS, message, strict=True)
    )


def rank(binding: dict) -> tuple[int, int, int]:
    """What decides between two that fit: the tier, the priority, the number of fields."""
    tier = next((n for n, name in enumerate(TIERS) if binding[name]), len(TIERS))
    return -tier, binding["priority"], sum(bool(binding[name]) for name in FIELDS)


def possible(binding: dict) -> bool:
    """Whether a binding can ever match."""
    return bool(binding["channel"]) or not any(binding[name] for name in FIELDS)


bindings = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in FIELDS.items()}
    | {"agent": st.sampled_from(AGENTS), "priority": st.integers(0, 1)}
)
changes = st.lists(st.tuples(bindings, st.sampled_from([False, False, False, True])), max_size=12)


@since("s05")
@given(changes=changes)
@exhaustive
@pytest.mark.costly
def test_a_look_up_finds_what_a_scan_finds(section, tmp_path: Path, changes):
    module, path = section.module, tmp_path / "bindings.jsonl"
    path.unlink(missing_ok=True)
    table, known = module.BindingTable(path, AGENTS), {}
    for fields, removed in changes:
        binding = module.Binding(**fields)
        if not possible(fields):
            with pytest.raises(ValueError):
                table.change(binding, removed)
            continue
        table.change(binding, removed)
        name = (*(fields[key] for key in FIELDS), fields["priority"])
        known.pop(name, None)
        if not removed:
            known[name] = fields
    again = module.BindingTable(path, AGENTS)
    assert set(table) == set(again) == {module.Binding(**fields) for fields in known.values()}
    for message in itertools.product(*FIELDS.values()):
        fitting = [fields for fields in known.values() if fits(fields, message)]
        best = max(map(rank, fitting), default=None)
        found = [each.resolve(*message) for each in (table, again)]
        assert found[0] == found[1]
        if best is None:
            assert found[0] is None
        else:
            fields = {name: getattr(found[0], name) for name in (*FIELDS, "agent", "priority")}
            assert fields in fitting and rank(fields) == best


def make_table(section: harness.Section, path: Path, lines: Iterable[dict]):
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return section.module.BindingTable(path, AGENTS)


@since("s05")
def test_a_binding_of_a_chat_fits_its_topics_and_that_of_a_topic_comes_first(section, tmp_path):
    chat = {"agent": "luna", "channel": "telegram", "peer": "-100"}
    topic = chat | {"agent": "sage", "peer": "-100:topic:7"}
    odd = {"agent": "sage", "channel": "matrix", "peer": "!room:server.example"}
    for lines in itertools.permutations((chat, topic, odd)):
        table = make_table(section, tmp_path / "b.jsonl", lines)
        asked = ("-100", "-100:topic:7", "-100:topic:8", "-1001:topic:7")
        found = [table.resolve("telegram", "default", peer, "") for peer in asked]
        assert [binding and binding.agent for binding in found] == ["luna", "sage", "luna", None]
        assert table.resolve("matrix", "default", "!room:server.example", "").agent == "sage"
        assert table.resolve("matrix", "default", "!room", "") is None


@since("s05")
@pytest.mark.costly
def test_a_look_up_costs_the_same_in_a_table_of_any_size(section, tmp_path: Path):
    real = [
        {"agent": "luna", "channel": "web", "peer": "alice"},
        {"agent": "luna", "channel": "web", "guild": "g"},
        {"agent": "luna", "channel": "web", "account": "work"},
        {"agent": "luna", "channel": "telegram"},
        {"agent": "sage"},
    ]
    asked = [("web", "work", "alice", "g"), ("web", "work", "bob", "g"), ("web", "work", "bob", "")]
    asked += [("telegram", "default", "7:topic:1", ""), ("feishu", "default", "ou_1", "")]
    counts = []
    for size in (10, 100_000):
        noise = [
            {"agent": AGENTS[n % 3], "channel": "web", "peer": f"p{n}", "priority": n % 5}
            for n in range(size)
        ]
        table = make_table(section, tmp_path / f"{size}.jsonl", [*real, *noise])
        assert len(list(table)) == size + 5
        counts.append([steps(lambda table=table, m=m: table.resolve(*m)) for m in asked])
    assert counts[0] == counts[1] and max(counts[0]) < 2000


def steps(function: Callable[[], object]) -> int:
    """How many instructions of Python a call takes, all that it calls included."""
    count = 0

    def trace(frame: FrameType, event: str, about: object) -> Callable:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@since("s05")
def test_what_threads_change_at_once_is_what_the_file_says(section, tmp_path: Path):
    path, module = tmp_path / "bindings.jsonl", section.module
    table = module.BindingTable(path, AGENTS)

    together = threading.Barrier(4)

    def change(number: int) -> None:
        for turn in range(100):
            together.wait(10)
            agent = AGENTS[(turn + number) % 3]
            table.change(module.Binding(agent, "web", peer=f"p{turn}", priority=number % 2))

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(table) == set(module.BindingTable(path, AGENTS))
    assert len(list(table)) == 200


# --- a file that people edit ---


@since("s05")
def test_a_file_with_bad_lines_is_told_of_line_by_line(desk: Desk):
    good = {"agent": "luna", "channel": "web", "peer": "alice"}
    lines = [
        json.dumps(good),
        '{"agent": "luna", "channel": "web", "peer": ',
        json.dumps(good | {"peer": "bob", "agent": "ghost"}),
        json.dumps({"agent": "luna", "peer": "carol"}),
        json.dumps(good | {"peer": ["dave"]}),
        json.dumps(good | {"priority": "high"}),
        json.dumps(good | {"colour": "red"}),
        "[]",
        '{"channel": "web"}',
        json.dumps({"agent": "sage", "channel": "web", "peer": "erin"}),
    ]
    (desk.workspace / "bindings.jsonl").write_text("\n".join(lines) + "\n")
    screen = desk.up()
    told = re.findall(r"^\[bindings\.jsonl, line (\d+): (.+)\]", screen.text, re.M)
    assert sorted(int(number) for number, _ in told) == [2, 3, 4, 5, 6, 7, 8, 9], screen.text
    assert "ghost" in dict(told)["3"] and "channel" in dict(told)["4"]
    client = desk.client()
    assert [b["peer"] for b in client.call("bindings.list")] == ["alice", "erin"]
    assert client.call("send", text="hello", peer="erin")["agent"] == "sage"


@since("s05")
@pytest.mark.parametrize("end", ["", "\n\n", "\r\n", "  \n"])
def test_how_an_editor_ends_the_file_does_not_matter(desk: Desk, end: str):
    lines = [{"agent": "luna", "channel": "web", "peer": peer} for peer in ("alice", "bob")]
    text = "\n".join(map(json.dumps, lines)) + end
    (desk.workspace / "bindings.jsonl").write_text(text)
    desk.up()
    client = desk.client()
    assert client.call("send", text="hello", peer="bob")["agent"] == "luna"
    client.call("bindings.set", agent="sage", channel="web")
    desk.down()
    desk.up()
    assert len(desk.client().call("bindings.list")) == 3


AGENTS_FILES = [
    "{",
    "[]",
    "7",
    '{"poet": 7}',
    '{"poet": {"colour": "red"}}',
    '{"poet": {"prompt": ["x"]}}',
    '{"poet": {"model": null}}',
    '{"poet": {"dm_scope": "per-planet"}}',
    "[" * 100_000,
    "\udcff",
]


@since("s05")
def test_a_bad_agents_json_is_told_in_a_line(section, fake_model: FakeModel, workspace: Path):
    fake_model.script("brain", [Text("fine")], repeat=True)
    for text in AGENTS_FILES:
        (workspace / "agents.json").write_text(text, errors="surrogateescape")
        done = harness.pipe(section, "hello\n/agents\nquit\n", fake_model.env("brain"))
        told = [line for line in done.stdout.splitlines() if line.startswith("[agents.json")]
        assert len(told) == 1 and len(told[0]) < 200, (text[:50], done.stdout + done.stderr)
        assert "fine" in done.stdout and "luna" in done.stdout and done.returncode == 0
        assert "Traceback" not in done.stderr
    (workspace / "agents.json").unlink()
    (workspace / "agents.json").mkdir()
    done = harness.pipe(section, "hello\nquit\n", fake_model.env("brain"))
    assert "[agents.json" in done.stdout and "fine" in done.stdout and done.returncode == 0


# --- session keys and agent ids ---


def key(section: harness.Section, scope: str, agent: str = "main", **about: object) -> str:
    fields = {"channel": "telegram", "account": "work", "peer": "42", "text": "", "ids": ["x"]}
    message = section.module.InboundMessage(**(fields | about))
    return section.module.build_session_key(agent, message, scope)


SCOPES = {
    "main": "agent:main:main",
    "per-peer": "agent:main:direct:42",
    "per-channel-peer": "agent:main:telegram:direct:42",
    "per-account-channel-peer": "agent:main:telegram:work:direct:42",
}


@since("s05")
def test_session_keys_are_those_of_openclaw(section):
    group, topic = {"kind": "group", "peer": "-100"}, {"kind": "group", "peer": "-100:topic:7"}
    for scope, expected in SCOPES.items():
        assert key(section, scope) == expected
        assert key(section, scope, "luna") == expected.replace("main", "luna", 1)
        assert key(section, scope, **group) == "agent:main:telegram:group:-100"
        assert key(section, scope, **topic) == "agent:main:telegram:group:-100:topic:7"
        assert key(section, scope, channel="cli", account="default", peer="") == "agent:main:main"
    upper = {"channel": "Feishu", "account": "EU", "peer": "ou_ABC"}
    assert key(section, "per-account-channel-peer", **upper) == "agent:main:feishu:eu:direct:ou_abc"
    assert key(section, "per-peer", **upper) == "agent:main:direct:ou_abc"
    default = "per-account-channel-peer"
    assert section.module.AgentConfig("x").dm_scope == default
    assert key(section, default) != key(section, default, channel="web")
    assert key(section, default) != key(section, default, account="home")


@since("s05")
def test_agent_ids(section):
    normal = section.module.normalize_agent_id
    known = {"Main": "main", "Luna 2": "luna-2", "a_b-c": "a_b-c", "--x__": "x", "": "main"}
    known |= {"é": "main", "../etc": "etc", "x" * 99: "x" * 64, "小月": "main", "7": "7"}
    assert {name: normal(name) for name in known} == known


@since("s05")
@given(name=st.text(max_size=40) | st.text("aZ-_ é", min_size=60, max_size=80))
@exhaustive
def test_an_agent_id_is_good_for_a_file_name_and_stays_as_it_is(section, name: str):
    normal = section.module.normalize_agent_id
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", normal(name))
    assert normal(normal(name)) == normal(name)


# --- over the wire ---

IMPOSSIBLE = [
    {"agent": "luna", "peer": "alice"},
    {"agent": "luna", "guild": "g"},
    {"agent": "luna", "account": "work"},
    {"agent": "ghost", "channel": "web"},
    {"agent": "", "channel": "web"},
    {"channel": "web"},
    {"agent": None, "channel": "web"},
    {"agent": "luna", "channel": 7},
    {"agent": "luna", "channel": "web", "peer": ["alice"]},
    {"agent": "luna", "channel": "web", "priority": "1"},
    {"agent": "luna", "channel": "web", "priority": 1.5},
    {"agent": "luna", "channel": "web", "priority": True},
    {"agent": "luna", "channel": "web", "tier": "peer"},
    {"agent": "luna", "channel": "web", "removed": True},
    {"agent": "luna", "channel": "web", "peer": "\ud800"},
]


@since("s05")
def test_bindings_over_the_wire(desk: Desk):
    desk.up()
    client = desk.client()
    assert client.call("bindings.list") == []
    fields = {"agent": "luna", "channel": "web", "peer": "alice", "account": "", "guild": ""}
    made = client.call("bindings.set", agent="luna", channel="web", peer="alice")
    assert made == fields | {"priority": 0, "tier": "peer"}
    client.call("bindings.set", agent="sage", channel="web", peer="alice")
    client.call("bindings.set", agent="luna", channel="web", peer="alice", priority=-1)
    client.call("bindings.set", agent="luna", channel="web", account="work")
    client.call("bindings.set", agent="luna", channel="telegram", guild="g")
    client.call("bindings.set", agent="luna", channel="feishu")
    client.call("bindings.set", agent="sage")
    listed = client.call("bindings.list")
    assert sorted(b["tier"] for b in listed) == sorted([*TIERS, "peer", "default"])
    assert [b["agent"] for b in listed if b["peer"]] == ["sage", "luna"]
    for wrong in IMPOSSIBLE:
        assert client.refused("bindings.set", **wrong) == -32602, wrong
    assert client.call("bindings.list") == listed
    assert client.call("send", text="hi", peer="alice")["matched_by"] == "peer"
    assert client.call("send", text="hi", peer="bob")["matched_by"] == "default"
    desk.screens[-1].kill()
    desk.up()
    client = desk.client()
    assert client.call("bindings.list") == listed
    client.call("bindings.remove", channel="web", peer="alice")
    client.call("bindings.remove")
    assert client.refused("bindings.remove", channel="web", peer="alice") == -32602
    assert client.refused("bindings.remove", channel="web", peer="alice", priority=7) == -32602
    assert client.call("send", text="hi", peer="alice")["agent"] == "luna"
    assert client.call("send", text="hi", peer="bob")["agent"] == "main"
    desk.down()
    desk.up()
    left = [b for b in listed if b["agent"] == "luna"]
    assert desk.client().call("bindings.list") == left


def systems(model: FakeModel, text: str) -> list[str]:
    """The system prompt of each request that asks this."""
    found = [chat.messages for chat in model.chats if chat.messages[-1]["content"] == text]
    return [m[0]["content"] if m[0]["role"] == "system" else "" for m in found]


@since("s05")
def test_a_message_goes_to_its_agent_and_each_agent_has_its_own_history(desk: Desk):
    agents = {
        "Poet!": {"prompt": "You are the poet.", "model": "verse"},
        "shared": {"prompt": "You share.", "dm_scope": "main"},
        "luna": {"prompt": "You are another Luna."},
    }
    (desk.workspace / "agents.json").write_text(json.dumps(agents))
    desk.model.script("verse", [Text("a rhyme")], repeat=True)
    desk.up()
    client = desk.client()
    assert {a["id"] for a in client.call("agents.list")} == {*AGENTS, "poet", "shared"}
    for peer, agent in (("a", "luna"), ("b", "sage"), ("c", "poet"), ("d", "shared")):
        client.call("bindings.set", agent=agent, channel="web", peer=peer)
    client.call("bindings.set", agent="shared", channel="web", peer="e")
    for peer in "abcdex":
        client.ask(f"I am {peer}", peer=peer)
    said = {peer: systems(desk.model, f"I am {peer}")[0] for peer in "abcdex"}
    assert "You are another Luna." in said["a"] and "You are Sage." in said["b"]
    assert "You are the poet." in said["c"] and not re.search("Luna|Sage|poet", said["x"])
    models = {chat.messages[-1]["content"]: chat.model for chat in desk.model.chats}
    assert models["I am c"] == "verse" and models["I am a"] == models["I am x"] == "brain"
    assert client.history(peer="c") == ["I am c", "a rhyme"]
    assert client.history(peer="d") == client.history(session="agent:shared:main")
    assert len(client.history(peer="e")) == 4, "d and e share a session"
    client.call("bindings.set", agent="sage", channel="web", peer="a")
    assert client.history(peer="a") == []
    client.ask("and now?", peer="a")
    assert client.history(peer="a") == ["and now?", "heard and now?"]
    assert client.history(session="agent:luna:web:default:direct:a") == ["I am a", "heard I am a"]
    client.call("bindings.remove", channel="web", peer="a")
    assert client.history(peer="a") == [] and client.ask("who?", peer="a") == "heard who?"
    sessions = client.call("sessions.list")
    known = [s["session"] for s in sessions]
    assert "agent:sage:web:default:direct:a" in known and len({*known}) == len(known)
    assert all(s["session"].split(":")[1] == s["agent"] for s in sessions)
    desk.down()
    desk.up()
    client = desk.client()
    assert client.history(session="agent:luna:web:default:direct:a") == ["I am a", "heard I am a"]


@since("s05")
def test_an_agent_that_is_gone_takes_nothing_along(desk: Desk):
    (desk.workspace / "agents.json").write_text('{"poet": {"prompt": "You rhyme."}}')
    desk.up()
    client = desk.client()
    client.call("bindings.set", agent="poet", channel="web", peer="a")
    for text in ("wait", "for a poet"):
        assert client.call("send", text=text, peer="a")["agent"] == "poet"
    desk.model.wait(1)
    desk.screens[-1].kill()
    (desk.workspace / "agents.json").unlink()
    desk.gate.set()
    screen = desk.up()
    assert "[bindings.jsonl, line 1: " in screen.text
    client = desk.client()
    until(lambda: not client.call("status")["waiting"])
    assert client.history(peer="a") == ["wait", "heard wait", "for a poet", "heard for a poet"]
    assert client.call("send", text="x", peer="a")["agent"] == "main"


# --- at the terminal ---


@since("s05")
def test_commands_at_the_terminal(desk: Desk):
    screen = desk.up()
    client = desk.client()

    def say(text: str) -> str:
        """What comes between a line and the next prompt."""
        start = len(screen.text)
        screen.type(f"{text}\n")
        screen.wait_for(text)
        screen.wait_for(PROMPT)
        return screen.text[start:]

    assert "main" in say("/bindings")
    client.call("bindings.set", agent="luna", channel="telegram", peer="42", priority=5)
    client.call("bindings.set", agent="sage", channel="telegram", account="work")
    client.call("bindings.set", agent="sage", channel="cli")
    shown = [line for line in say("/bindings").splitlines() if "agent=" in line]
    assert len(shown) == 2 + 1 and "peer" in shown[0] and "priority=5" in shown[0]
    assert all(word in shown[0] for word in ("luna", "telegram", "42"))
    told = say("/route telegram 42")
    assert "agent:luna:telegram:default:direct:42" in told and "priority=5" in told
    assert "agent:sage:telegram:work:direct:7" in say("/route telegram 7 work")
    told = say("/route telegram -100:topic:7")
    assert "agent:main:telegram:group:-100:topic:7" in told and "default" in told
    assert "agent:main:feishu:default:direct:ou_1" in say("/route feishu ou_1")
    assert "/route <channel> <peer>" in say("/route telegram")
    listed = {line[2:].split()[0]: line[:2] for line in say("/agents").splitlines()[1:] if line[2:]}
    assert {name: listed[name] for name in AGENTS} == {"main": "  ", "luna": "  ", "sage": "* "}
    say("hello sage")
    assert "agent:luna:main" in say("/agent luna")
    say("hello luna"), say("and again")
    assert "agent:sage:main" in say("/agent off")
    assert "ghost" in say("/agent ghost")
    say("back to sage")
    told = [systems(desk.model, text)[0] for text in ("hello sage", "hello luna", "back to sage")]
    assert ["You are Luna" in t for t in told] == [False, True, False]
    assert ["You are Sage" in t for t in told] == [True, False, True]
    contents = [m["content"] for m in desk.model.chats[-1].messages if m["role"] != "system"]
    assert contents == ["hello sage", "heard hello sage", "back to sage"]
    assert client.history(session="agent:luna:main")[::2] == ["hello luna", "and again"]
    shown = say("/sessions")
    assert all(f"agent:{name}:main" in shown for name in AGENTS)
    shown = say("/gateway")
    assert desk.link in shown and f"127.0.0.1:{desk.port}" in shown and "1 client" in shown
    shown = say("/help")
    assert all(name in shown for name in ("/route", "/bindings", "/agents", "/agent", "/gateway"))
    assert "session" in say("/new fresh")
    say("/agent luna")
    assert len(client.history(session="agent:luna:main")) == 4, "/new was sage's"


@since("s05")
def test_one_bad_agent_leaves_the_others(section, fake_model: FakeModel, workspace: Path):
    fake_model.script("brain", [Text("fine")], repeat=True)
    listed = {"typo": {"promt": "x"}, "诗人": {"prompt": "x"}, "poet": {"prompt": "You are Poe."}}
    (workspace / "agents.json").write_text(json.dumps(listed), encoding="utf-8")
    done = harness.pipe(section, "/agents\nquit\n", fake_model.env("brain"))
    told = [line for line in done.stdout.splitlines() if line.startswith("[agents.json")]
    assert [re.search(r", (\w+):", line)[1] for line in told] == ["typo", "诗人"], done.stdout
    assert "You are Poe." in done.stdout and "* main\n" in done.stdout


@since("s05")
def test_a_replaced_binding_does_not_come_back(desk: Desk):
    """Although the agent that replaced it is gone, and cannot be loaded any more."""
    fields = {"channel": "web", "peer": "alice"}
    records = [{"agent": "luna"}, {"agent": "gone"}, {"agent": "gone", "removed": True}]
    lines = [json.dumps(record | fields) + "\n" for record in records]
    (desk.workspace / "bindings.jsonl").write_text("".join(lines), encoding="utf-8")
    assert "line 2: there is no agent 'gone'" in desk.up().text
    assert desk.client().call("bindings.list") == []
