"""Checks of the exercises of s10."""

import json
import re
import threading
import time
from concurrent.futures import wait
from pathlib import Path

from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import Section
from harness import pipe

LONG = 20  # seconds after which something is stuck


def test_s10_delegate(script: Section, fake_model: FakeModel):
    """Add: a tool `delegate(task)` lets an agent of its own do a task, in a lane `subagent`."""
    asked: list[list[str]] = []

    def brain(body: dict) -> Text | ToolCalls:
        said = [message["content"] for message in body["messages"] if message["role"] != "system"]
        asked.append(said)
        if body["messages"][-1]["role"] == "tool":
            return Text(f"I was told: {said[-1]}")
        if said[-1] == "count":
            return Text("forty-two words")
        return ToolCalls([("delegate", {"task": "deeper" if said[-1] == "twice" else "count"})])

    fake_model.script("brain", [brain], repeat=True)
    shown = pipe(script, "once\ntwice\nquit\n", fake_model.env("brain", APPROVAL="always")).stdout
    names = [tool["function"]["name"] for tool in fake_model.chats[0].body["tools"]]
    assert "delegate" in names, f"expected a tool delegate; got {', '.join(names)}"
    assert "I was told: forty-two words" in shown, f"expected the agent's answer; got {shown!r}"
    assert ["count"] in asked, f"expected a session of its own, with the task alone; got {asked}"
    refusal = "who is in lane subagent cannot enqueue into it"
    nested = [text for said in asked for text in said if refusal in text]
    assert nested, f"expected a delegate of a delegate to be refused by the lane; got {asked[-3:]}"


def test_s10_stuck(script: Section):
    """Find: Ada's turn hangs, /reset lets go of it, and still her next message is not answered."""
    lanes, go = script.module.CommandQueue(), threading.Event()
    began = threading.Event()

    def hang() -> None:
        began.set()
        go.wait(60)

    try:
        lanes.enqueue(["session:ada", "main"], hang)
        assert began.wait(LONG), "expected the first task to run at once"
        behind = [lanes.enqueue(["session:ada", "main"], str, name) for name in ("one", "two")]
        number = lanes.reset()
        assert number == 1, f"expected the reset to let go of 1 task; got {number}"
        with lanes.lock:
            waiting = sum(len(lane.waiting) for lane in lanes.lanes.values())
        assert waiting < 2, f"expected the next to be let in; got {waiting} of 2 still waiting"
        done = wait(behind, LONG).done
        assert len(done) == 2, f"expected what waited to run after the reset; got {len(done)} of 2"
    finally:
        go.set()


def test_s10_collect(script: Section, workspace: Path, fake_model: FakeModel):
    """Add: what one person writes during a turn is answered in one turn, as `collect` does it."""
    inbox, texts = workspace / ".inbox.jsonl", ["red", "green", "blue"]
    place = {"channel": "web", "account": "default", "peer": "ada"}
    written = [{"type": "message", "message": {**place, "text": t, "ids": [t]}} for t in texts]
    inbox.write_text("".join(f"{json.dumps(record)}\n" for record in written))
    gates = [threading.Event() for _ in texts]
    fake_model.script("brain", [Gate(gate) for gate in gates], repeat=True)

    def asked() -> list[list[str]]:
        questions = [chat.messages[-1]["content"] for chat in fake_model.chats]
        return [[text for text in texts if text in question] for question in questions]

    def still_open() -> list[str]:
        records = [json.loads(line) for line in inbox.read_text().split("\n")[:-1]]
        done = {record["id"] for record in records if record["type"] == "done"}
        return [text for text in texts if text not in done]

    def check_kept(turn: int) -> None:
        fake_model.wait(turn + 1, LONG)
        late, kept = asked()[turn], still_open()
        assert set(late) <= set(kept), f"expected {late} to be kept until answered; kept is {kept}"

    with Screen(script, fake_model.env("brain")) as screen:
        try:
            check_kept(0)
            wait_in_line(screen, len(texts) - len(asked()[0]))
            gates[0].set()
            if len(asked()[0]) < len(texts):
                check_kept(1)
        finally:
            for gate in gates:
                gate.set()
        latest = time.monotonic() + LONG
        while still_open() and time.monotonic() < latest:
            time.sleep(0.02)
    assert not still_open(), f"expected all to be done in the end; got {still_open()} kept"
    found = [" and ".join(turn) for turn in asked()]
    assert len(found) < 3, f"expected one turn for what waited; got turns for {', '.join(found)}"
    told = sorted(text for turn in asked() for text in turn)
    assert told == sorted(texts), f"expected the model to read each text once; got {found}"


def wait_in_line(screen: Screen, number: int) -> None:
    """Wait until so many messages stand behind a turn; a copy may keep them elsewhere."""
    latest = time.monotonic() + 10
    while time.monotonic() < latest:
        screen.type("/lanes\n")
        found = screen.wait_for(re.compile(r"^main: .*\n(?:(?!you> ).*\n)*", re.M))[0]
        if re.search(rf"session:.*, {number} waiting", found):
            return
