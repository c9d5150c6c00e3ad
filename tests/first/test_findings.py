"""What real servers, users and attacks have found: text and state from outside do no harm."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from harness import since

PROMPT = "you> "
HUGE = 10**400  # too large for a float


def results(model: FakeModel) -> list[str]:
    """The results of tools in the last request."""
    return [m["content"] for m in model.chats[-1].messages if m["role"] == "tool"]


def run_calls(section: harness.Section, model: FakeModel, calls: Sequence[tuple]) -> list[str]:
    """What comes of tool calls that are made in one answer."""
    model.script("m", [ToolCalls(calls), Text("done")])
    done = harness.pipe(section, "go\n", model.env("m"), timeout=60)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout + done.stderr
    return results(model)


# --- the program's own state ---

STATE = {
    ".inbox.jsonl": "",
    ".gateway-token": "a secret word",
    ".sessions/agents/main/sessions.json": "{}",
    "agents/luna/.memory.sqlite": "no database",
    "bindings.jsonl": "",
    "bindings.jsonl.torn": "half a line",
    "cron/cron-runs.jsonl": '{"type": "beat", "at": 1.0}\n',
    "delivery-queue/queue.jsonl": '{"type": "sent", "ids": []}\n',
    "delivery-queue/queue.jsonl.damaged": "half a line",
}
SPELLINGS = ("{}", "./{}", "box/../{}", "link/{}")


def snapshot(workspace: Path) -> dict[str, bytes]:
    """All that the workspace holds of the state above and beside it."""
    tops = {name.partition("/")[0] for name in STATE} - {".sessions", ".inbox.jsonl"}
    found = [file for top in tops for file in [workspace / top, *(workspace / top).rglob("*")]]
    return {str(file): file.read_bytes() if file.is_file() else b"/" for file in found}


@since("s02")
def test_no_tool_reaches_the_state_of_the_program(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """However a path is spelled: no tool reads, writes or replaces it, nor puts a file there."""
    for name, text in STATE.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text, encoding="utf-8")
    (workspace / "box").mkdir()
    (workspace / "link").symlink_to(workspace, target_is_directory=True)
    (workspace / "queue").symlink_to(workspace / "delivery-queue", target_is_directory=True)
    paths = [spelling.replace("{}", name) for name in STATE for spelling in SPELLINGS]
    paths += [str(workspace / name) for name in STATE]
    paths += ["queue/queue.jsonl", "Delivery-Queue/queue.jsonl", "CRON/cron-runs.jsonl"]
    calls = [("read_file", {"path": path}) for path in paths]
    paths += ["cron/new.jsonl", "delivery-queue", "cron", "agents/sage/.memory.sqlite", ".lock"]
    calls += [("write_file", {"path": path, "content": "x"}) for path in paths]
    calls += [("edit_file", {"path": p, "old_text": "a", "new_text": "b"}) for p in paths]
    before = snapshot(workspace)
    found = run_calls(section, fake_model, calls)
    assert len(found) == len(calls)
    for call, result in zip(calls, found, strict=True):
        assert result.startswith("error: ") and "not for tools" in result, (call, result)
    kept = snapshot(workspace)
    assert all(kept[name].startswith(before[name]) for name in before)  # it may have grown


@since("s02")
def test_what_is_like_the_state_is_the_persons(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    names = ["box/cron/a.txt", "cron.txt", "delivery-queue.md", "my/.env.example", "agents/a/b.md"]
    calls = [("write_file", {"path": name, "content": "x"}) for name in names]
    found = run_calls(section, fake_model, calls)
    assert [text[:5] for text in found] == ["wrote"] * len(names), found


@since("s06")
def test_a_skill_around_the_workspace_opens_nothing(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    text = "---\nname: all\ndescription: everything\n---\n"
    (workspace / "SKILL.md").write_text(text, encoding="utf-8")
    (workspace / ".gateway-token").write_text("a secret word", encoding="utf-8")
    fake_model.script("m", [ToolCalls([("read_file", {"path": ".gateway-token"})]), Text("done")])
    env = fake_model.env("m", SKILLS_DIR=str(workspace.parent))
    done = harness.pipe(section, "/skills\ngo\n", env)
    assert "/all" in done.stdout, done.stdout
    assert "not for tools" in results(fake_model)[0]


MESSAGE = {
    "channel": "telegram",
    "account": "default",
    "peer": "42",
    "text": "hi",
    "ids": ["telegram:1:42:1"],
    "kind": "direct",
    "sender": "Ada",
}
DELIVERY = {
    "id": "q1",
    "channel": "telegram",
    "account": "default",
    "peer": "42",
    "pieces": ["one", "two"],
    "sent": 0,
    "tries": 0,
    "error": "",
}
JOB_STATE = {"since": 1.0, "last": 1.0, "ended": 1.0, "errors": 1, "error": "no"}
RECORDS: dict[str, list[dict]] = {
    ".inbox.jsonl": [
        {"type": "message", "message": MESSAGE},
        {"type": "answer", "id": "telegram:1:42:1", "text": "hello"},
        {"type": "seen", "ids": {"a": 1.0}},
    ],
    "bindings.jsonl": [{"agent": "luna", "channel": "web", "peer": "ada", "priority": 0}],
    "cron/cron-runs.jsonl": [
        {"type": "seen", "job": "tea", "at": 1.0, "schedule": "a", "version": "b"},
        {"type": "start", "job": "tea", "at": 1.0},
        {"type": "end", "job": "tea", "at": 2.0, "error": "no", "done": False},
        {"type": "state", "job": "tea", "state": JOB_STATE},
        {"type": "beat", "at": 1.0},
        {"type": "told", "digest": "d", "at": 1.0},
        {"type": "owner", "message": MESSAGE},
    ],
    "delivery-queue/queue.jsonl": [
        {"type": "enqueue", "delivery": DELIVERY},
        {"type": "ack", "id": "q1"},
        {"type": "retry", "id": "q1", "tries": 1, "error": "no", "wait": 5, "at": 1.0},
        {"type": "failed", "id": "q1", "tries": 1, "error": "no"},
        {"type": "again", "id": "q1"},
        {"type": "sent", "ids": ["a"]},
    ],
    ".sessions/agents/main/sessions/aaaaaaaaaaaa.jsonl": [
        {"type": "session", "key": "agent:main:main", "label": "old", "created": 1.0},
        {"type": "message", "message": {"role": "user", "content": "hi"}, "used": 9, "fixed": 9},
        {"type": "message", "message": {"role": "assistant", "content": "hello"}, "used": 0},
        {"type": "overflow", "window": "m, 128000", "tokens": 5000},
        {"type": "retraction", "to": 1},
    ],
}
ODD: list[Any] = [HUGE, -HUGE, float("inf"), float("nan"), -1, 1e17, None, True, [], {}, "", [[]]]


def odd_records(record: dict) -> list[dict]:
    """A record with each of its values in turn, and those inside of it, replaced by an odd one."""
    found = []
    for key, value in record.items():
        values = [*ODD, *(odd_records(value) if isinstance(value, dict) else [])]
        found += [record | {key: odd} for odd in values]
    return found


@since("s03")
def test_odd_values_in_the_state_stop_nothing(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """Whatever a file of its own holds, the program starts, says so, and answers."""
    for name, records in RECORDS.items():
        lines = [odd for record in records for odd in [record, *odd_records(record)]]
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workspace / name).write_text(text, encoding="utf-8")
    schedule = {"kind": "every", "every_seconds": 3600}
    job = {"id": "tea", "schedule": schedule, "payload": {"kind": "system_event", "text": "tea"}}
    (workspace / "CRON.json").write_text(json.dumps({"jobs": [job]}), encoding="utf-8")
    fake_model.script("m", [Text("here I am")], repeat=True)
    lines = "hello\n" + "/cron\n" * (section.label >= "s07")
    done = harness.pipe(section, lines, fake_model.env("m"), timeout=60)
    assert done.returncode == 0 and "here I am" in done.stdout, done.stdout + done.stderr
    assert "damaged, left out" in done.stdout and not done.stderr, done.stderr
    if section.label >= "s07":
        assert re.search("^tea: every 3600, next ", done.stdout, re.M), done.stdout


@since("s08")
def test_a_queued_text_goes_to_nobody_who_is_not_allowed(
    section: harness.Section, fake_model: FakeModel, workspace: Path
):
    """Neither after a restart, nor because somebody tries it once more."""
    queue = workspace / "delivery-queue" / "queue.jsonl"
    queue.parent.mkdir()
    deliveries = [
        DELIVERY | {"id": f"to {peer}", "peer": peer, "pieces": [f"for {peer}"]}
        for peer in ("666", "666:topic:5", "42", "-100200:topic:5")
    ]
    lines = [json.dumps({"type": "enqueue", "delivery": each}) + "\n" for each in deliveries]
    queue.write_text("".join(lines), encoding="utf-8")
    with FakeTelegram() as telegram:
        telegram.know(666)
        telegram.know(42)
        telegram.know(-100200, "supergroup", topics=[5])
        env = fake_model.env(
            TELEGRAM_BOT_TOKEN=telegram.token,
            TELEGRAM_BASE_URL=telegram.url,
            TELEGRAM_ALLOWED_CHATS="42 -100200",
        )
        with harness.Screen(section, env) as screen:
            for chat in (42, -100200):
                telegram.until(lambda chat=chat: telegram.sent_to(chat), what=f"a text to {chat}")
            screen.wait_for("not sent to 666:topic:5: ")
            screen.type("/retry\n")
            screen.wait_for("2 texts are tried again")
            screen.wait_for("not sent to 666:topic:5: ")
            screen.type("/failed\n")
            screen.wait_for("to 666: telegram default 666, ")
        assert not telegram.sent_to(666)
