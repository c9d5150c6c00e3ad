"""Checks of the exercises of s05."""

import json
import re
from pathlib import Path

from fake_model import FakeModel
from fake_model import Text
from harness import Screen
from harness import Section
from harness import pipe
from websockets.sync.client import connect

PROMPT = re.compile(r"^you> ", re.M)
LINK = re.compile(r"http://(127\.0\.0\.1:\d+)/#token=(\S+)")


def write_config(workspace: Path, name: str, value: object) -> None:
    (workspace / name).write_text(json.dumps(value), encoding="utf-8")


def type_in(script: Section, env: dict[str, str], *lines: str) -> list[str]:
    """What one run of the script shows after each of these lines."""
    done = pipe(script, "".join(f"{line}\n" for line in lines), env)
    parts = done.stdout.split("you> ")[1:]
    assert len(parts) > len(lines), f"expected a prompt after each line; got {done}"
    return [part.partition("\n")[2].strip() for part in parts]


def ask_in_web_chat(screen: Screen, peer: str, text: str) -> str:
    """The answer to what somebody writes in the web chat."""
    host, token = screen.wait_for(LINK, 30).groups()
    params = {"text": text, "peer": peer}
    request = {"jsonrpc": "2.0", "id": 1, "method": "send", "params": params}
    with connect(f"ws://{host}/ws?token={token}", proxy=None) as client:
        client.send(json.dumps(request))
        while True:
            frame = json.loads(client.recv(30))
            if frame.get("method") == "turn.end":
                return frame["params"]["text"]


def test_s05_who(script: Section, fake_model: FakeModel, workspace: Path):
    """Add: /who says which agent answers you, with which model, in which session."""
    write_config(workspace, "agents.json", {"luna": {"model": "moon-1"}})
    binding = {"agent": "luna", "channel": "web", "peer": "ann"}
    write_config(workspace, "bindings.json", [binding])
    with Screen(script, fake_model.env(MODEL_ID="sun-1")) as screen:
        answer = ask_in_web_chat(screen, "ann", "/who")
        for wanted in ("luna", "moon-1", "agent:luna:web:default:direct:ann"):
            assert wanted in answer, f"web chat: expected {wanted}; got {answer!r}"
        screen.wait_for(PROMPT, 30)
        screen.type("/who\nquit\n")
        screen.wait_exit(30)
        shown = screen.text.rpartition("/who")[2]
    for wanted in ("main", "sun-1", "agent:main:main"):
        assert wanted in shown, f"terminal: expected {wanted}; got {shown!r}"


def test_s05_star(script: Section, fake_model: FakeModel, workspace: Path):
    """Add: a binding with the peer * is for all direct chats of its channel."""
    bindings = [
        {"agent": "luna", "channel": "telegram", "peer": "*"},
        {"agent": "sage", "channel": "telegram", "priority": 9},
        {"agent": "sage", "channel": "telegram", "account": "work", "peer": "*"},
        {"agent": "main", "channel": "telegram", "peer": "7"},
        {"agent": "sage", "channel": "feishu", "guild": "acme"},
        {"agent": "luna", "channel": "feishu", "peer": "*"},
    ]
    write_config(workspace, "bindings.json", bindings)
    cases = [
        ("/route telegram 42", "luna", "wildcard", "a direct chat"),
        ("/route telegram -100", "sage", "channel", "a group"),
        ("/route telegram 7", "main", "peer", "a chat with a binding of its own"),
        ("/route telegram 42 work", "sage", "wildcard", "a bot with its own star"),
        ("/route telegram 42 home", "luna", "wildcard", "another bot"),
        ("/route feishu ou_1 default acme", "luna", "wildcard", "a chat in a guild"),
        ("/route web ann", "main", "default", "another channel"),
    ]
    shown = type_in(script, fake_model.env(), *[line for line, *_ in cases])
    for (line, agent_id, tier, about), answer in zip(cases, shown, strict=False):
        problem = f"{line}, {about}: expected {agent_id} by its {tier}; got {answer!r}"
        is_right = f"agent:{agent_id}:" in answer and answer.endswith(f"(tier: {tier})")
        assert is_right, problem


def test_s05_model(script: Section, fake_model: FakeModel, workspace: Path):
    """Find: Luna has a model of her own, and soon all agents answer with it."""
    write_config(workspace, "agents.json", {"luna": {"model": "moon-1"}})
    fake_model.script(None, [Text("Yes.")], repeat=True)
    env = fake_model.env(MODEL_ID="sun-1")
    lines = ["one", "/agent luna", "two", "/agent sage", "three", "/agent off", "four"]
    type_in(script, env, *lines)
    models = [request.body["model"] for request in fake_model.chats]
    wanted = ["sun-1", "moon-1", "sun-1", "sun-1"]
    problem = f"expected the models {wanted} for main, luna, sage, main; got {models}"
    assert models == wanted, problem
