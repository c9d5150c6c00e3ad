"""Routing (s05): which agent a message goes to, in which session, and who says so."""

import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from fake_model import FakeModel
from fake_model import Text
from fake_telegram import FakeTelegram
from gateway_client import Gateway
from harness import Section
from harness import pipe
from harness import since
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

AGENTS = ("main", "luna", "sage")
TIERS = ("peer", "guild", "account", "channel")
FIELDS = {  # the values that a binding or a message may have
    "channel": ("web", "telegram", ""),
    "account": ("work", "default", ""),
    "peer": ("1:topic:7", "1", "2", ""),
    "guild": ("g", ""),
}


@pytest.fixture
def gateway(
    section: Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Gateway]:
    with Gateway(section, workspace, fake_model) as gateway:
        yield gateway


def make_table(section: Section, file: Path, bindings: list[dict]):
    """The table of a file with these bindings."""
    file.write_text(json.dumps(bindings), encoding="utf-8")
    return section.module.BindingTable(file, AGENTS)


def make_message(section: Section, **fields: object):
    """A message; in doubt a direct one on Telegram."""
    defaults = {"channel": "telegram", "account": "default", "peer": "42", "text": ""}
    return section.module.InboundMessage(**defaults | fields)


# --- the table ---


def fits(binding: dict, message: dict) -> bool:
    """Whether all fields that a binding gives match. A topic is in its chat."""
    chat = message["peer"].split(":topic:")[0]
    for name in FIELDS:
        accepted = {message[name], chat} if name == "peer" else {message[name]}
        if binding[name] and binding[name] not in accepted:
            return False
    return True


def rank(binding: dict) -> tuple:
    """What decides between two that fit, the greatest: the narrowest tier, then ..."""
    given = [name for name in TIERS if binding[name]]
    tier = TIERS.index(given[0]) if given else len(TIERS)
    is_topic = ":topic:" in binding["peer"]
    return -tier, binding["priority"], is_topic, len(given)


def is_possible(binding: dict) -> bool:
    """Whether a binding can ever match."""
    return bool(binding["channel"]) or not any(binding[name] for name in FIELDS)


def place_of(binding: dict) -> tuple:
    """What one binding replaces another one by."""
    return tuple(binding[name] for name in (*FIELDS, "priority"))


BINDINGS = st.fixed_dictionaries(
    {name: st.sampled_from(values) for name, values in FIELDS.items()}
    | {"agent": st.sampled_from(AGENTS), "priority": st.integers(0, 1)}
)
IS_REMOVED = st.sampled_from([False, False, False, True])


@since("s05")
@given(changes=st.lists(st.tuples(BINDINGS, IS_REMOVED), max_size=12))
@settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
)
@pytest.mark.costly
def test_a_look_up_finds_what_a_scan_finds(
    section: Section, tmp_path: Path, changes: list
):
    module = section.module
    file = tmp_path / "bindings.json"
    file.unlink(missing_ok=True)
    table = module.BindingTable(file, AGENTS)
    known = {}
    for fields, is_removed in changes:
        binding = module.Binding(**fields)
        if is_removed and place_of(fields) in known:
            table.remove(binding)
            del known[place_of(fields)]
        elif is_removed or not is_possible(fields):
            with pytest.raises(ValueError):
                (table.remove if is_removed else table.set)(binding)
        else:
            table.set(binding)
            known[place_of(fields)] = fields
    again = module.BindingTable(file, AGENTS)
    for values in itertools.product(*FIELDS.values()):
        fields = dict(zip(FIELDS, values, strict=True))
        message = make_message(section, **fields)
        fitting = [binding for binding in known.values() if fits(binding, fields)]
        found = table.resolve(message)
        assert found == again.resolve(message), "the file says the same"
        if not fitting:
            assert found is None, fields
        else:
            assert found.model_dump() in fitting, fields
            best = max(map(rank, fitting))
            assert rank(found.model_dump()) == best, (fields, fitting)


@since("s05")
def test_a_topic_goes_with_its_chat_and_its_own_binding_comes_first(
    section: Section, tmp_path: Path
):
    chat = {"agent": "luna", "channel": "telegram", "peer": "-100"}
    topic = {"agent": "sage", "channel": "telegram", "peer": "-100:topic:7"}
    guild = {"agent": "luna", "channel": "telegram", "peer": "-100", "guild": "g"}
    room = {"agent": "sage", "channel": "matrix", "peer": "!room:server.example"}
    for bindings in itertools.permutations([chat, topic, guild, room]):
        table = make_table(section, tmp_path / "b.json", bindings)

        def agent_of(table=table, **fields: str) -> str:
            binding = table.resolve(make_message(section, **fields))
            return binding.agent if binding else ""

        assert agent_of(peer="-100") == "luna"
        assert agent_of(peer="-100:topic:7") == "sage"
        assert agent_of(peer="-100:topic:7", guild="g") == "sage"
        assert agent_of(peer="-100:topic:8") == "luna"
        assert agent_of(peer="-1001:topic:7") == ""
        assert agent_of(channel="matrix", peer="!room:server.example") == "sage"
        assert agent_of(channel="matrix", peer="!room") == ""


@since("s05")
@pytest.mark.costly
def test_a_look_up_costs_the_same_in_a_table_of_any_size(
    section: Section, tmp_path: Path
):
    real = [
        {"agent": "luna", "channel": "web", "peer": "alice"},
        {"agent": "luna", "channel": "web", "guild": "g"},
        {"agent": "luna", "channel": "web", "account": "work"},
        {"agent": "luna", "channel": "telegram"},
        {"agent": "sage"},
    ]
    messages = [
        make_message(section, channel="web", account="work", peer="alice", guild="g"),
        make_message(section, channel="web", account="work", peer="bob", guild="g"),
        make_message(section, channel="web", account="work", peer="bob"),
        make_message(section, peer="7:topic:1"),
        make_message(section, channel="feishu", peer="ou_1"),
    ]
    costs = []
    for size in (10, 100_000):
        others = [
            {"agent": AGENTS[n % 3], "channel": "web", "peer": f"p{n}", "priority": n}
            for n in range(size)
        ]
        table = make_table(section, tmp_path / "b.json", [*real, *others])
        for message, binding in zip(messages, real, strict=True):
            assert table.resolve(message).agent == binding["agent"]
        costs.append([instructions_of(table.resolve, each) for each in messages])
    assert costs[0] == costs[1]


def instructions_of(function: Callable, *arguments: object) -> int:
    """How many instructions of Python a call takes, with all that it calls."""
    count = 0

    def trace(frame: FrameType, event: str, about: object) -> Callable:
        nonlocal count
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


# --- the file ---


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns so often that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@since("s05")
@pytest.mark.usefixtures("frequent_switches")
def test_what_two_threads_change_at_once_is_what_the_file_says(
    section: Section, tmp_path: Path
):
    module = section.module
    file = tmp_path / "bindings.json"
    table = module.BindingTable(file, AGENTS)

    def change(number: int) -> None:
        for turn in range(60):
            agent = AGENTS[(turn + number) % 3]
            peer = f"p{turn % 30}"
            binding = module.Binding(agent=agent, channel="web", peer=peer)
            table.set(binding.model_copy(update={"priority": number % 2}))

    threads = [threading.Thread(target=change, args=[n]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    again = module.BindingTable(file, AGENTS)
    assert len(table.entries) == 60
    assert sorted(table.entries, key=repr) == sorted(again.entries, key=repr)


@since("s05")
@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.costly
def test_a_look_up_during_a_change_finds_what_is_not_changed(
    section: Section, tmp_path: Path
):
    module = section.module
    others = [{"agent": "luna", "channel": "web", "peer": f"p{n}"} for n in range(1000)]
    table = make_table(section, tmp_path / "bindings.json", others)
    is_over = threading.Event()

    def change() -> None:
        for number in range(20):
            peer = f"new {number}"
            table.set(module.Binding(agent="sage", channel="web", peer=peer))
        is_over.set()

    threading.Thread(target=change).start()
    message = make_message(section, channel="web", peer="p999")
    missed = 0
    while not is_over.is_set():
        if table.resolve(message) is None:
            missed += 1
    assert missed == 0


@since("s05")
@pytest.mark.costly
def test_the_file_is_replaced_as_a_whole(
    section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = section.module
    file = tmp_path / "bindings.json"
    others = [{"agent": "luna", "channel": "web", "peer": f"p{n}"} for n in range(500)]
    table = make_table(section, file, others)
    is_over = threading.Event()

    def change() -> None:
        for number in range(20):
            peer = f"new {number}"
            table.set(module.Binding(agent="sage", channel="web", peer=peer))
        is_over.set()

    threading.Thread(target=change).start()
    while not is_over.is_set():
        assert len(json.loads(file.read_text())) >= 500, "whole at any moment"
    before = file.read_bytes(), list(table.entries)

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    binding = module.Binding(agent="sage", channel="web", peer="p1")
    with pytest.raises(OSError):
        table.set(binding)
    with pytest.raises(OSError):
        table.remove(binding)
    assert (file.read_bytes(), table.entries) == before
    message = make_message(section, channel="web", peer="p1")
    assert table.resolve(message).agent == "luna", "what is not on disk does not hold"
    assert list(tmp_path.iterdir()) == [file]


GOOD = {"agent": "luna", "channel": "web", "peer": "alice"}
ENTRIES = [  # and what is told of them
    (GOOD, ""),
    ({**GOOD, "peer": "bob", "agent": "ghost"}, "ghost"),
    ({"agent": "luna", "peer": "carol"}, "channel"),
    ({**GOOD, "peer": ["dave"]}, "peer"),
    ({**GOOD, "priority": "high"}, "priority"),
    ({**GOOD, "colour": "red"}, "colour"),
    ([], ""),
    (7, ""),
    ("luna", ""),
    (None, ""),
    ({"channel": "web"}, "agent"),
    ({"agent": "sage", "channel": "web", "peer": "erin"}, ""),
]
GOOD_POSITIONS = {1, len(ENTRIES)}


@since("s05")
@pytest.mark.costly
def test_a_bad_entry_is_told_by_its_position_and_is_kept(gateway: Gateway):
    file = gateway.workspace / "bindings.json"
    entries = [entry for entry, _ in ENTRIES]
    file.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    screen = gateway.start()
    told = re.findall(r"^\[bindings\.json, entry (\d+): (.+)\]", screen.text, re.M)
    reasons = {int(position): reason for position, reason in told}
    assert {*reasons} == {*range(1, len(ENTRIES) + 1)} - GOOD_POSITIONS, screen.text
    for position, (_, word) in enumerate(ENTRIES, 1):
        assert word in reasons.get(position, ""), position
    client = gateway.client()
    assert [b["peer"] for b in client.call("bindings.list")] == ["alice", "erin"]
    assert client.say("hello", peer="erin")["session"].startswith("agent:sage:")
    client.call("bindings.set", binding={"agent": "sage", "channel": "feishu"})
    written = json.loads(file.read_text())
    assert len(written) == len(entries) + 1
    for entry in entries:
        assert entry in written, "the owner may still want to mend it"
    assert written.count(GOOD) == 1


@since("s05")
@pytest.mark.parametrize(
    "text", ['[{"agent": "luna",', '{"agent": "luna"}', "\udcff[]", "[" * 100_000, "7"]
)
def test_a_file_that_is_no_list_is_told_and_not_overwritten(
    gateway: Gateway, text: str
):
    file = gateway.workspace / "bindings.json"
    file.write_text(text, errors="surrogateescape")
    before = file.read_bytes()
    screen = gateway.start()
    assert len(re.findall(r"^\[bindings\.json", screen.text, re.M)) == 1
    client = gateway.client()
    refusal = client.refusal("bindings.set", binding=GOOD)
    assert (refusal.code, "bindings.json" in refusal.message) == (-32602, True)
    assert file.read_bytes() == before
    assert client.call("bindings.list") == []
    assert client.ask("hello", peer="alice") == "heard hello"


@since("s05")
def test_what_the_owner_edits_meanwhile_is_kept(gateway: Gateway):
    file = gateway.workspace / "bindings.json"
    gateway.start()
    client = gateway.client()
    client.call("bindings.set", binding=GOOD)
    edited = [*json.loads(file.read_text()), {**GOOD, "peer": "bob"}]
    file.write_text(json.dumps(edited))
    client.call("bindings.set", binding={**GOOD, "peer": "carol"})
    assert [b["peer"] for b in json.loads(file.read_text())] == [
        "alice",
        "bob",
        "carol",
    ]
    assert client.say("hello", peer="bob")["session"].startswith("agent:luna:")
    file.write_text(text := "[half of it")
    for method in ("bindings.set", "bindings.remove"):
        refusal = client.refusal(method, binding=GOOD)
        assert (refusal.code, "bindings.json" in refusal.message) == (-32602, True)
    assert file.read_text() == text
    assert len(client.call("bindings.list")) == 3, "as before"


@since("s05")
@pytest.mark.parametrize("ending", ["", "\n\n", "\r\n", "  \n"])
@pytest.mark.parametrize("beginning", ["", "\ufeff", "\n"])
def test_how_an_editor_writes_the_file_does_not_matter(
    section: Section, tmp_path: Path, beginning: str, ending: str
):
    file = tmp_path / "bindings.json"
    file.write_text(f"{beginning}[{json.dumps(GOOD)}]{ending}", encoding="utf-8")
    table = section.module.BindingTable(file, AGENTS)
    assert len(table.entries) == 1
    table.set(section.module.Binding(agent="sage", channel="web"))
    assert len(section.module.BindingTable(file, AGENTS).entries) == 2


BAD_AGENTS = [
    "{",
    "[]",
    "7",
    '{"poet": 7}',
    '{"poet": {"colour": "red"}}',
    '{"poet": {"prompt": ["x"]}}',
    '{"poet": {"model": null}}',
    '{"poet": {"dm_scope": "per-planet"}}',
    '{"Poet!": {}}',
    '{"": {}}',
    '{"../x": {}}',
    "[" * 100_000,
    "\udcff",
]


@since("s05")
@pytest.mark.costly
def test_a_bad_agents_json_is_told_in_a_line(
    section: Section, fake_model: FakeModel, workspace: Path
):
    fake_model.script("brain", [Text("fine")], repeat=True)
    file = workspace / "agents.json"
    for text in BAD_AGENTS:
        file.write_text(text, errors="surrogateescape")
        check_agents_json(section, fake_model)
        assert file.read_text(errors="surrogateescape") == text
    file.unlink()
    file.mkdir()
    check_agents_json(section, fake_model)


def check_agents_json(section: Section, fake_model: FakeModel) -> None:
    """One line says that the file cannot be used, and the rest works."""
    done = pipe(section, "hello\n/agents\nquit\n", fake_model.env("brain"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("[agents.json")]
    assert len(told) == 1, done.stdout
    assert len(told[0]) < 200
    assert "fine" in done.stdout
    assert "luna" in done.stdout


@since("s05")
def test_one_bad_agent_leaves_the_others(
    section: Section, fake_model: FakeModel, workspace: Path
):
    agents = {
        "typo": {"promt": "x"},
        "诗人": {"prompt": "x"},
        "a" * 65: {"prompt": "x"},
        "poet": {"prompt": "You are Poe."},
        "a_b-7": {},
        "luna": {"prompt": "You are another Luna."},
    }
    (workspace / "agents.json").write_text(json.dumps(agents), encoding="utf-8")
    done = pipe(section, "/agents\nquit\n", fake_model.env("brain"))
    told = re.findall(r"^\[agents\.json, (\w+): ", done.stdout, re.M)
    assert told == ["typo", "诗人", "a" * 65], done.stdout
    for line in ("* main", "  poet", "  a_b-7", "  sage"):
        assert f"\n{line}" in done.stdout
    assert "You are Luna" not in done.stdout


# --- session keys ---

KEYS = {  # of a direct message on Telegram, for each dm_scope
    "main": "agent:main:main",
    "per-peer": "agent:main:direct:42",
    "per-channel-peer": "agent:main:telegram:direct:42",
    "per-account-channel-peer": "agent:main:telegram:work:direct:42",
}


@since("s05")
def test_session_keys_are_those_of_openclaw(section: Section):
    def key(dm_scope: str, agent_id: str = "main", **fields: object) -> str:
        message = make_message(section, **fields)
        return section.module.build_session_key(agent_id, message, dm_scope)

    for dm_scope, expected in KEYS.items():
        assert key(dm_scope, account="work") == expected
        assert key(dm_scope, "luna", account="work") == expected.replace(
            "main", "luna", 1
        )
        group = {"is_group": True, "peer": "-100"}
        assert key(dm_scope, **group) == "agent:main:telegram:group:-100"
        topic = {"is_group": True, "peer": "-100:topic:7"}
        assert key(dm_scope, **topic) == "agent:main:telegram:group:-100:topic:7"
        # A second bot in the same group is somebody else.
        second = key(dm_scope, account="work", **group)
        assert second == "agent:main:telegram:work:group:-100"
        assert key(dm_scope, channel="terminal", peer="") == "agent:main:main"
        assert key(dm_scope, "sage", channel="terminal", peer="") == "agent:sage:main"
    upper = {"channel": "Feishu", "account": "EU", "peer": "ou_ABC"}
    scope = section.module.AgentConfig().dm_scope
    assert scope == "per-account-channel-peer"
    assert key(scope, **upper) == "agent:main:feishu:eu:direct:ou_abc"


# --- over the wire ---

REFUSED = [  # bindings, and what the error has to name
    ({"agent": "luna", "peer": "alice"}, "channel"),
    ({"agent": "luna", "guild": "g"}, "channel"),
    ({"agent": "luna", "account": "work"}, "channel"),
    ({"agent": "ghost", "channel": "web"}, "ghost"),
    ({"agent": "", "channel": "web"}, "agent"),
    ({"channel": "web"}, "agent"),
    ({"agent": None, "channel": "web"}, "agent"),
    ({"agent": "luna", "channel": 7}, "channel"),
    ({"agent": "luna", "channel": "web", "peer": ["alice"]}, "peer"),
    ({"agent": "luna", "channel": "web", "priority": "high"}, "priority"),
    ({"agent": "luna", "channel": "web", "priority": 1.5}, "priority"),
    ({"agent": "luna", "channel": "web", "tier": "peer"}, "tier"),
]


@since("s05")
def test_bindings_over_the_wire(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    assert client.call("bindings.list") == []
    made = client.call("bindings.set", binding=GOOD)
    assert made == {**GOOD, "account": "", "guild": "", "priority": 0}
    for binding in (
        {"agent": "sage", "channel": "web", "peer": "alice"},  # in place of the first
        {"agent": "luna", "channel": "web", "peer": "alice", "priority": -1},
        {"agent": "luna", "channel": "web", "account": "work"},
        {"agent": "luna", "channel": "telegram", "guild": "g"},
        {"agent": "luna", "channel": "feishu"},
        {"agent": "sage"},
    ):
        client.call("bindings.set", binding=binding)
    listed = client.call("bindings.list")
    assert sorted(b["tier"] for b in listed) == sorted([*TIERS, "peer", "default"])
    assert [b["agent"] for b in listed if b["peer"]] == ["sage", "luna"]
    for binding, word in REFUSED:
        refusal = client.refusal("bindings.set", binding=binding)
        assert refusal.code == -32602, binding
        assert word in refusal.message, binding
    assert client.call("bindings.list") == listed
    assert client.say("hi", peer="alice")["matched_by"] == "peer"
    assert client.say("hi", peer="bob")["matched_by"] == "default"
    gateway.kill()
    gateway.start()
    client = gateway.client()
    assert client.call("bindings.list") == listed
    client.call("bindings.remove", binding=GOOD)
    client.call("bindings.remove", binding={"agent": "sage"})
    for binding in (GOOD, {**GOOD, "priority": 7}):
        refusal = client.refusal("bindings.remove", binding=binding)
        assert refusal.code == -32602
        assert "no such binding" in refusal.message
    assert client.say("hi", peer="alice")["session"].startswith("agent:luna:")
    assert client.say("hi", peer="bob")["session"].startswith("agent:main:")
    gateway.stop()
    gateway.start()
    left = [binding for binding in listed if binding["agent"] == "luna"]
    assert gateway.client().call("bindings.list") == left


def requests_for(model: FakeModel, question: str) -> list:
    """The requests that ask this last."""
    return [c for c in model.chats if c.messages[-1]["content"] == question]


def system_prompt_of(model: FakeModel, question: str) -> str:
    """The system prompt of the first request that asks this."""
    first = requests_for(model, question)[0].messages[0]
    return first["content"] if first["role"] == "system" else ""


@since("s05")
def test_each_agent_has_its_own_history_prompt_and_model(gateway: Gateway):
    agents = {
        "poet": {"prompt": "You are the poet.", "model": "verse"},
        "shared": {"prompt": "You share.", "dm_scope": "main"},
        "luna": {"prompt": "You are another Luna."},
    }
    (gateway.workspace / "agents.json").write_text(json.dumps(agents))
    gateway.model.script("verse", [Text("a rhyme")], repeat=True)
    gateway.start()
    client = gateway.client()
    listed = client.call("agents.list")
    assert {agent["id"] for agent in listed} == {*AGENTS, "poet", "shared"}
    homes = {"a": "luna", "b": "sage", "c": "poet", "d": "shared", "e": "shared"}
    for peer, agent in homes.items():
        binding = {"agent": agent, "channel": "web", "peer": peer}
        client.call("bindings.set", binding=binding)
    for peer in "abcdex":
        client.ask(f"I am {peer}", peer=peer)
    prompts = {p: system_prompt_of(gateway.model, f"I am {p}") for p in "abcdex"}
    assert "You are another Luna." in prompts["a"]
    assert "You are Sage." in prompts["b"]
    assert "You are the poet." in prompts["c"]
    assert not re.search("Luna|Sage|poet|share", prompts["x"])
    models = {p: requests_for(gateway.model, f"I am {p}")[0].model for p in "acx"}
    assert models == {"a": "brain", "c": "verse", "x": "brain"}
    assert client.history(peer="c") == ["I am c", "a rhyme"]
    assert client.history(peer="d") == client.history(session="agent:shared:main")
    assert len(client.history(peer="e")) == 4, "d and e share a session"


@since("s05")
def test_another_binding_leads_to_another_history(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.call("bindings.set", binding=GOOD)
    client.ask("to luna", peer="alice")
    client.call("bindings.set", binding={**GOOD, "agent": "sage"})
    assert client.history(peer="alice") == []
    client.ask("to sage", peer="alice")
    assert client.history() == ["to sage", "heard to sage"]
    client.call("bindings.remove", binding=GOOD)
    assert client.history(peer="alice") == []
    client.ask("to main", peer="alice")
    sessions = client.call("sessions.list")
    known = [entry["session"] for entry in sessions]
    assert len({*known}) == len(known)
    for entry in sessions:
        assert entry["session"].split(":")[1] == entry["agent"]
    gateway.stop()
    gateway.start()
    client = gateway.client()
    for agent in AGENTS:
        key = f"agent:{agent}:web:default:direct:alice"
        assert key in known
        assert client.history(session=key) == [f"to {agent}", f"heard to {agent}"]


@since("s05")
def test_a_binding_that_is_changed_holds_for_what_waits(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.call("bindings.set", binding=GOOD)
    for text in ("wait", "second", "third"):
        assert client.say(text, peer="alice")["session"].startswith("agent:luna:")
    client.wait("turn.answer")
    client.call("bindings.set", binding={**GOOD, "agent": "sage"})
    gateway.gate.set()
    client.wait("turn.end", text="heard third")
    luna, sage = [f"agent:{name}:web:default:direct:alice" for name in ("luna", "sage")]
    # What had begun ends where it began, and nothing is answered twice.
    assert client.history(session=luna) == ["wait", "heard wait"]
    assert client.history(session=sage)[::2] == ["second", "third"]
    assert gateway.questions == ["wait", "second", "third"]


@since("s05")
def test_two_bots_in_one_group_have_a_session_and_an_agent_each(gateway: Gateway):
    with FakeTelegram() as first, FakeTelegram("654:other", "work_bot") as second:
        gateway.start(
            TELEGRAM_BOT_TOKEN=first.token,
            TELEGRAM_BASE_URL=first.url,
            TELEGRAM_ALLOWED_CHATS="-100123",
            TELEGRAM_BOT_TOKEN_WORK=second.token,
            TELEGRAM_BASE_URL_WORK=second.url,
            TELEGRAM_ALLOWED_CHATS_WORK="-100123",
        )
        client = gateway.client()
        binding = {"agent": "sage", "channel": "telegram", "account": "work"}
        client.call("bindings.set", binding=binding)
        of_first = "agent:main:telegram:group:-100123"
        of_second = "agent:sage:telegram:work:group:-100123"
        for key in (of_first, of_second):
            assert client.history(session=key) == [], "from now on, it is watched"
        first.group_say("hello first", mention=True)
        second.group_say("hello second", mention=True)
        for bot, word, key in (
            (first, "first", of_first),
            (second, "second", of_second),
        ):
            (sent,) = bot.wait_sent(1)
            assert (sent.chat_id, word in sent.text) == (-100123, True)
            assert word in client.wait("turn.end", session=key)["text"]
            (question, answer) = client.history(session=key)
            assert word in question
            assert answer == sent.text


@since("s05")
def test_an_agent_that_is_gone_takes_nothing_along(gateway: Gateway):
    agents = gateway.workspace / "agents.json"
    agents.write_text('{"poet": {"prompt": "You rhyme."}}')
    gateway.start()
    client = gateway.client()
    binding = {"agent": "poet", "channel": "web", "peer": "alice"}
    client.call("bindings.set", binding=binding)
    for text in ("wait", "for a poet"):
        assert client.say(text, peer="alice")["session"].startswith("agent:poet:")
    gateway.model.wait(1)
    gateway.kill()
    agents.unlink()
    gateway.gate.set()
    screen = gateway.start()
    assert "[bindings.json, entry 1: there is no agent poet]" in screen.text
    client = gateway.client()
    client.ask("and now", peer="alice")
    said = client.history(peer="alice")
    assert said[::2] == ["wait", "for a poet", "and now"]
    assert client.call("sessions.history", peer="alice")["agent"] == "main"
    key = "agent:poet:web:default:direct:alice"
    assert client.refusal("sessions.history", session=key).code == -32602
    assert binding in json.loads((gateway.workspace / "bindings.json").read_text())


# --- at the terminal ---


@since("s05")
def test_bindings_and_routes_at_the_terminal(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    assert "main" in gateway.type("/bindings")
    for binding in (
        {"agent": "luna", "channel": "telegram", "peer": "42", "priority": 5},
        {"agent": "sage", "channel": "telegram", "account": "work"},
        {"agent": "luna", "channel": "discord", "guild": "g"},
    ):
        client.call("bindings.set", binding=binding)
    shown = gateway.type("/bindings")
    (line,) = [each for each in shown.splitlines() if "42" in each]
    for word in ("peer", "luna", "telegram", "priority", "5"):
        assert word in line
    routes = {
        "telegram 42": ("agent:luna:telegram:default:direct:42", "peer"),
        "telegram 7 work": ("agent:sage:telegram:work:direct:7", "account"),
        "telegram 7": ("agent:main:telegram:default:direct:7", "default"),
        "telegram -100:topic:7": ("agent:main:telegram:group:-100:topic:7", "default"),
        "feishu ou_1": ("agent:main:feishu:default:direct:ou_1", "default"),
        "feishu oc_1": ("agent:main:feishu:group:oc_1", "default"),
        "discord 9 default g": ("agent:luna:discord:default:direct:9", "guild"),
    }
    for arguments, words in routes.items():
        told = gateway.type(f"/route {arguments}")
        for word in words:
            assert word in told, arguments
    assert "/route <channel> <peer>" in gateway.type("/route telegram")
    gateway.type("/route a b c d e f")


@since("s05")
def test_agents_at_the_terminal(gateway: Gateway):
    gateway.start()
    client = gateway.client()
    client.call("bindings.set", binding={"agent": "sage", "channel": "terminal"})
    shown = gateway.type("/agents")
    marks = {line[2:].split()[0]: line[0] for line in shown.splitlines() if line[2:]}
    assert {name: marks[name] for name in AGENTS} == {
        "main": " ",
        "luna": " ",
        "sage": "*",
    }
    gateway.type("hello sage")
    assert "luna" in gateway.type("/agent luna")
    assert client.say("hello", peer="alice")["session"].startswith("agent:main:")
    gateway.type("hello luna")
    gateway.type("and again")
    gateway.type("/agent off")
    assert "ghost" in gateway.type("/agent ghost")
    gateway.type("back to sage")
    for question, name in (("hello sage", "Sage"), ("hello luna", "Luna")):
        assert f"You are {name}" in system_prompt_of(gateway.model, question)
    messages = gateway.model.chats[-1].messages
    said = [each["content"] for each in messages if each["role"] != "system"]
    assert said == ["hello sage", "heard hello sage", "back to sage"]
    luna = client.history(session="agent:luna:main")
    assert luna[::2] == ["hello luna", "and again"]
    assert "session" in gateway.type("/new fresh")
    gateway.type("/agent luna")
    assert client.history(session="agent:luna:main") == luna, "/new was for sage"
    assert client.history(session="agent:sage:main") == []
    shown = gateway.type("/gateway")
    assert f"127.0.0.1:{gateway.port}/#token=" in shown
    assert "clients: 1" in shown
    shown = gateway.type("/help")
    for name in ("/route", "/bindings", "/agents", "/agent", "/gateway"):
        assert name in shown


# --- what tools may not write ---

CONFIG_FILES = ("agents.json", "bindings.json", "CRON.json")


def tool_results(gateway: Gateway, name: str, calls: list[dict]) -> list[str]:
    """What the model gets when it calls a tool with these arguments."""
    client = gateway.client()
    for arguments in calls:
        client.ask(f"tool {name} {json.dumps(arguments)}")
    messages = gateway.model.chats[-1].messages
    return [each["content"] for each in messages if each["role"] == "tool"]


@since("s05")
@pytest.mark.parametrize("is_linked", [False, True])
def test_tools_read_the_configuration_and_never_write_it(
    gateway: Gateway, tmp_path: Path, is_linked: bool
):
    folder = gateway.workspace
    texts = dict.fromkeys(CONFIG_FILES, '["what the owner has written"]')
    texts["agents.json"] = "{}"
    texts["bindings.json"] = "[]"
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / f"link-{name}").symlink_to(folder / name)
    (folder / "here").symlink_to(folder)
    (tmp_path / "linked").symlink_to(folder)
    settings = {"WORKSPACE_DIR": str(tmp_path / "linked")} if is_linked else {}
    gateway.start(**settings)
    paths = []
    for name in CONFIG_FILES:
        paths += [name, f"./{name}", name.upper(), name.lower(), name.title()]
        paths += [f"skills/../{name}", f"here/{name}", f"link-{name}"]
        paths += [str(folder / name), f".//{name}", f"{name}/"]
    writes = [{"path": path, "content": "{}"} for path in paths]
    for path, result in zip(
        paths, tool_results(gateway, "write_file", writes), strict=True
    ):
        assert result.startswith("error"), path
    edits = [{"path": p, "old_text": "[", "new_text": "{"} for p in paths]
    for path, result in zip(
        paths, tool_results(gateway, "edit_file", edits), strict=True
    ):
        assert result.startswith("error"), path
    for name, text in texts.items():
        assert (folder / name).read_text() == text
    reads = [{"path": path} for path in (*CONFIG_FILES, "link-CRON.json")]
    results = tool_results(gateway, "read_file", reads)
    assert results == [*texts.values(), texts["CRON.json"]]
    others = [{"path": "skills/agents.json", "content": "{}"}]
    (result,) = tool_results(gateway, "write_file", others)
    assert not result.startswith("error"), "elsewhere the name is nothing special"


@since("s05")
def test_tools_make_no_configuration_where_there_is_none(gateway: Gateway):
    for name in CONFIG_FILES:
        (gateway.workspace / name).unlink(missing_ok=True)
    gateway.start()
    paths = [*CONFIG_FILES]
    for name in CONFIG_FILES:
        paths += [f"{name}/x", f"./{name}/x/y", name.upper()]
    calls = [{"path": path, "content": "{}"} for path in paths]
    for path, result in zip(
        paths, tool_results(gateway, "write_file", calls), strict=True
    ):
        assert result.startswith("error"), path
    names = {path.name.lower() for path in gateway.workspace.iterdir()}
    assert not names & {name.lower() for name in CONFIG_FILES}
