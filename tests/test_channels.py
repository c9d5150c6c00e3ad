"""Channels together (s04): one inbox, one brain, many mouths, and no mouth harms
another.
"""

import os
import re
import resource
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace

import harness
import pytest
from conversation import wait_until
from desk import PROMPT
from desk import Desk
from desk import lines_with
from desk import open_desk
from desk import say
from desk import wait_for_paper
from fake_feishu import FakeFeishu
from fake_model import FakeModel
from fake_telegram import FakeTelegram
from harness import since
from hypothesis import HealthCheck
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

DAY = 24 * 3600


@pytest.fixture
def desk(
    section: harness.Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Desk]:
    with open_desk(section, workspace, fake_model) as desk:
        yield desk


# --- one brain, many mouths ---


@since("s04")
def test_one_process_with_three_mouths(desk: Desk):
    screen = desk.both()
    for number in (1, 2):
        say(screen, f"typed {number}", f"heard typed {number}")
        assert desk.ask_telegram(f"tapped {number}") == f"heard tapped {number}"
        assert desk.ask_feishu(f"sent {number}") == f"heard sent {number}"
    each_has_its_own = [
        ["sent 1", "sent 2"],
        ["tapped 1", "tapped 2"],
        ["typed 1", "typed 2"],
    ]
    assert sorted(desk.histories()[-3:]) == each_has_its_own
    assert lines_with(screen, "[telegram] User 42: tapped 1")
    assert lines_with(screen, "[telegram] to User 42: heard tapped 1")
    assert lines_with(screen, "[feishu] ou_alice: sent 1")
    say(screen, "/channels", "feishu: on")
    for name in ("terminal: on", "telegram: on, as @tutor_bot", "feishu: on, at http"):
        assert lines_with(screen, name), name
    desk.settle()
    began = time.monotonic()
    screen.press("ctrl-c")
    assert screen.wait_exit() == 0
    assert time.monotonic() - began < 3
    screen = desk.both()
    desk.ask_telegram("again")
    desk.ask_feishu("again")
    say(screen, "again", "agent> heard again")
    assert sorted(desk.histories()[-3:]) == [
        [*history, "again"] for history in each_has_its_own
    ]


@since("s04")
def test_commands_of_a_channel(desk: Desk):
    """What is about the chat's own session works from afar; nothing else does."""
    screen = desk.telegram_alone()
    desk.ask_telegram("one")
    assert re.fullmatch(
        r"session \w+, messages: 0, fresh", desk.ask_telegram("/new fresh")
    )
    desk.ask_telegram("two")
    listed = desk.ask_telegram("/list").splitlines()
    assert len(listed) == 2
    assert listed[0].startswith("* ")
    first = listed[1].split()[0]
    assert desk.ask_telegram(f"/switch {first}").startswith(f"session {first}")
    desk.ask_telegram("three")
    assert desk.histories()[-1] == ["one", "three"]
    assert "messages: 4" in desk.ask_telegram("/context")
    assert "begin so: 0" in desk.ask_telegram("/switch nope")
    for line in ("/start", "/channels", "/quit", "/help"):
        usages = desk.ask_telegram(line).splitlines()
        assert usages[0] == "The commands here:"
        assert usages[1].startswith("/new [label] - ")
    calls = len(desk.model.chats)
    desk.ask_telegram("/list")
    assert len(desk.model.chats) == calls, "no command goes to the model"
    listed = say(screen, "/list", "\n* ").rpartition(f"{PROMPT}/list")[2]
    assert first not in listed, "another's session is nobody's business"
    assert "begin so: 0" in desk.ask_telegram(f"/switch {first}", chat=43)


@since("s04")
@pytest.mark.parametrize("approval", ["", "never", "always"])
def test_bash_from_a_channel(desk: Desk, approval: str):
    """Nobody is asked: it runs if APPROVAL says "always"."""
    screen = desk.telegram_alone(APPROVAL=approval)
    desk.ask_telegram("bash env > made; cat made")
    runs = approval == "always"
    assert (desk.workspace / "made").exists() == runs
    (result,) = tool_results(desk)
    assert runs or "not allowed" in result
    assert "run it" not in screen.text
    assert desk.telegram.token not in result


def tool_results(desk: Desk) -> list[str]:
    """The results in the request that came last."""
    messages = desk.model.chats[-1].messages
    return [message["content"] for message in messages if message["role"] == "tool"]


# --- settings and accounts ---


@since("s04")
def test_settings_that_cannot_work(desk: Desk):
    """Each account says in a line what is wrong; the others, the good ones, work."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nowhere = "http://127.0.0.1:9"  # nobody listens there
        apps = {
            "taken": {"PORT": str(taken.getsockname()[1])},
            "word": {"PORT": "abc"},
            "high": {"PORT": "99999"},
            "nonsense": {"DOMAIN": "nonsense"},
            "nowhere": {"DOMAIN": nowhere},
            "odd": {"DOMAIN": "http://[odd"},
            "bare": {"APP_SECRET": ""},
            "open": {"VERIFICATION_TOKEN": ""},
        }
        bots = {
            "wrong": {"BOT_TOKEN": "111:wrong-token"},
            "odd": {"BOT_TOKEN": "no token at all"},
            "bare": {"BASE_URL": desk.telegram.url.removeprefix("http://")},
            "nowhere": {"BASE_URL": nowhere},
        }
        env = {}
        for account, wrong in apps.items():
            env |= desk.app(None, f"_{account}".upper(), **wrong)
        for account, wrong in bots.items():
            env |= desk.bot(None, f"_{account}".upper(), **wrong)
        screen = desk.both(**env)
        names = [f"[feishu {account}] " for account in apps]
        names += [f"[telegram {account}] " for account in bots]
        wait_until(lambda: all(lines_with(screen, name) for name in names), 20)
        assert desk.ask_telegram("hello") == "heard hello"
        assert desk.ask_feishu("hi") == "heard hi"
        say(screen, "ho", "heard ho")
    for name in names:
        (line,) = lines_with(screen, name)
        assert len(line) < 350, line
    assert re.search("in use", lines_with(screen, "[feishu taken]")[0])
    assert "APP_SECRET" in lines_with(screen, "[feishu bare]")[0]
    assert "VERIFICATION_TOKEN" in lines_with(screen, "[feishu open]")[0]
    assert "token" in lines_with(screen, "[telegram wrong]")[0].lower()
    assert "wrong-token" not in screen.raw
    assert "no token at all" not in screen.raw


@since("s04")
@pytest.mark.costly
def test_two_accounts_of_a_platform(desk: Desk):
    """Each has its own conversations with the same people, and its own outages."""
    with FakeTelegram("654321:other-token", "other_bot") as bot2, FakeFeishu() as app2:
        app2.app_id = "cli_other"
        env = desk.bot(bot2, "_WORK") | desk.app(app2, "_WORK")
        channels = ["telegram", "telegram work", "feishu", "feishu work"]
        screen = desk.start(*channels, **desk.bot(), **desk.app(), **env)
        webhook2 = re.search(r"\[feishu work\] on, at (\S+)", screen.text)[1]
        for number in (1, 2):
            assert desk.ask_telegram(f"bot {number}") == f"heard bot {number}"
            assert desk.ask_feishu(f"app {number}") == f"heard app {number}"
            bot2.say(f"other bot {number}")
            bot2.wait_sent(number)
            event = app2.event(f"other app {number}")
            assert app2.push(webhook2, event).status == 200
            app2.wait_sent(number)
        histories = desk.histories()[-4:]
        names = ["app", "bot", "other app", "other bot"]
        assert sorted(histories) == [[f"{name} 1", f"{name} 2"] for name in names]
        bot2.down()
        app2.down()
        event = app2.event("into the dark")
        assert app2.push(webhook2, event).status == 200
        for number in range(3):
            text = f"all is well {number}"
            assert desk.ask_telegram(text) == f"heard {text}"
            assert desk.ask_feishu(text) == f"heard {text}"
        screen.wait_for("trying again")
        bot2.up()
        app2.up()
        bot2.say("back")
        bot2.until(lambda: bot2.sent[-1].text == "heard back", 20)
        assert app2.wait_sent(3, 20)[-1].text == "heard into the dark"
        assert not bot2.problems + app2.problems


@since("s04")
def test_an_account_that_is_gone_for_a_time(desk: Desk):
    """What came in for it is kept, and answered when it is there again."""
    screen = desk.both()
    assert desk.push(desk.feishu.event("wait feishu")) == 200
    desk.model.wait(1)
    desk.telegram.say("wait telegram")
    wait_until(lambda: len(desk.inbox()) == 2)
    screen.kill()
    desk.gate.set()
    screen = desk.start()
    say(screen, "anybody there?", "heard anybody there?")
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0
    assert desk.asked == ["wait feishu", "anybody there?"]
    desk.both()
    desk.wait_telegram(1)
    desk.feishu.wait_sent(1)
    assert [sent.text for sent in desk.telegram.sent] == ["heard wait telegram"]
    assert desk.replies == ["heard wait feishu"]
    desk.settle()


# --- the inbox ---


@dataclass
class Whole:
    """What the model of the inbox knows of a message and the parts joined with it."""

    ids: list[str]
    texts: list[str]
    chat: str
    sender: str
    received: float  # the last part
    expects_more: float
    answer: str | None = None

    def is_complete(self, now: float) -> bool:
        """Whether no part can come any more; so it is if the clock was set back."""
        return not self.received <= now < self.received + self.expects_more


@dataclass
class Row:
    """What the model of the inbox knows of one message on disk."""

    message_id: str
    chat: str
    sender: str
    expects_more: float
    received: float
    answer: str | None = None
    done: float | None = None


@dataclass
class ModelInbox:
    """The inbox in its simplest form: a list of rows, and what waits."""

    rows: list[Row] = field(default_factory=list)
    waiting: list[Whole] = field(default_factory=list)

    def put(self, row: Row) -> None:
        self.rows = [
            old
            for old in self.rows
            if old.done is None or old.done >= row.received - DAY
        ]
        if row.message_id not in [old.message_id for old in self.rows]:
            self.rows.append(row)
            self.join(row)

    def join(self, row: Row) -> None:
        text = f"text {row.message_id}"
        for whole in self.waiting:
            is_same = (whole.chat, whole.sender) == (row.chat, row.sender)
            if is_same and 0 <= row.received - whole.received < whole.expects_more:
                whole.ids.append(row.message_id)
                whole.texts.append(text)
                whole.received = row.received
                whole.expects_more = row.expects_more
                return
        whole = Whole(
            [row.message_id],
            [text],
            row.chat,
            row.sender,
            row.received,
            row.expects_more,
            row.answer,
        )
        self.waiting.append(whole)

    def next_is_complete(self, now: float) -> float:
        """When some message is complete, at the latest."""
        if any(whole.is_complete(now) for whole in self.waiting):
            return now
        return min(whole.received + whole.expects_more for whole in self.waiting)

    def take(self, now: float) -> Whole:
        """The first one that is complete."""
        for whole in self.waiting:
            if whole.is_complete(now):
                self.waiting.remove(whole)
                return whole
        raise AssertionError("none is complete")

    def restart(self) -> None:
        self.waiting = []
        for row in self.rows:
            if row.done is None:
                self.join(row)

    def row(self, message_id: str) -> Row:
        (row,) = [row for row in self.rows if row.message_id == message_id]
        return row


STEPS = st.sampled_from([0, 0.2, 0.5, 1, 10, 9e4, -100])  # the clock may be set back
PUT = st.tuples(
    st.just("put"),
    st.integers(0, 9),  # the message's id
    st.sampled_from(["chat 1", "chat 1", "chat 2"]),
    st.sampled_from(["ann", "ann", "bob"]),
    st.sampled_from([0, 0.5, 1.5]),  # seconds in which more is expected
)
OTHER = st.tuples(st.sampled_from(["take", "answer", "done", "restart"]))
PART = ("put", 0, "chat 1", "ann", 1.5)
LAST_PART = ("put", 1, "chat 1", "ann", 0)
ALL_PARTS_ARE_DONE = [PART, LAST_PART, ("take",), ("done",), ("restart",)]
AN_ANSWER_STAYS = [PART, LAST_PART, ("take",), ("answer",), ("restart",), ("take",)]
AN_ID_IS_KNOWN = [LAST_PART, ("take",), ("done",), LAST_PART, ("restart",), LAST_PART]
ACTIONS = st.lists(
    st.tuples(STEPS, st.one_of(PUT, PUT, OTHER)), min_size=10, max_size=40
)


@since("s04")
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(actions=ACTIONS)
@example([(0.2, action) for action in ALL_PARTS_ARE_DONE])
@example([(0.2, action) for action in AN_ANSWER_STAYS])
@example([(0.2, action) for action in AN_ID_IS_KNOWN])
@example([(5e4, action) for action in AN_ID_IS_KNOWN])
def test_the_inbox_does_as_a_simple_model_does(
    section: harness.Section, tmp_path: Path, actions: list
):
    """Known ids, parts, order, restarts, answers, and ids that are forgotten."""
    module = section.module
    clock = Clock()
    path = tmp_path / ".state" / "gateway.db"
    for file in path.parent.glob("*"):
        file.unlink()
    with clock.replaces_time_in(module):
        inbox, model, taken = module.Inbox(module.Database(path)), ModelInbox(), []
        for seconds, (verb, *about) in actions:
            clock.now += seconds
            if verb == "put":
                number, chat, sender, more = about
                message_id = f"id {number}"
                inbox.put(
                    module.InboundMessage(
                        "telegram",
                        "default",
                        chat,
                        f"text {message_id}",
                        message_id,
                        sender,
                        expects_more=more,
                    )
                )
                model.put(Row(message_id, chat, sender, more, clock.now))
            elif verb == "take" and model.waiting:
                clock.now = max(clock.now, model.next_is_complete(clock.now))
                whole = model.take(clock.now)
                message = inbox.take()
                assert shown(message) == (
                    whole.ids,
                    "\n".join(whole.texts),
                    whole.answer,
                )
                taken.append((message, whole))
            elif verb == "answer" and taken:
                message, whole = taken[0]
                answer = f"answer {whole.ids[0]}"
                inbox.set_answer(message, answer)
                model.row(whole.ids[0]).answer = answer
            elif verb == "done" and taken:
                message, whole = taken.pop(0)
                inbox.done(message)
                for message_id in whole.ids:
                    model.row(message_id).done = clock.now
            elif verb == "restart":
                inbox.database.connection.close()
                inbox = module.Inbox(module.Database(path))
                model.restart()
                taken = []
            assert [shown(message) for message in inbox.waiting] == [
                (whole.ids, "\n".join(whole.texts), whole.answer)
                for whole in model.waiting
            ]
            rows = inbox.database.execute("SELECT id FROM inbox ORDER BY number")
            assert [name for (name,) in rows] == [row.message_id for row in model.rows]
        inbox.database.connection.close()


class Clock:
    """The time of day for a module, as a test sets it."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    @contextmanager
    def replaces_time_in(self, module: ModuleType) -> Iterator[None]:
        real = module.time
        module.time = SimpleNamespace(time=lambda: self.now)
        try:
            yield
        finally:
            module.time = real


def shown(message: object) -> tuple:
    return [message.id, *message.other_ids], message.text, message.answer


@since("s04")
def test_the_last_part_is_waited_for(section: harness.Section, tmp_path: Path):
    module = section.module
    inbox = module.Inbox(module.Database(tmp_path / ".state" / "gateway.db"))
    taken = []
    thread = threading.Thread(target=lambda: taken.append(inbox.take()), daemon=True)
    thread.start()
    for number, more in enumerate([60, 60, 0]):
        assert not taken
        message = module.InboundMessage("telegram", "default", "42", f"part {number}")
        message.id = f"id {number}"
        message.expects_more = more
        inbox.put(message)
    thread.join(10)
    assert shown(taken[0]) == (["id 0", "id 1", "id 2"], "part 0\npart 1\npart 2", None)


@since("s04")
def test_parts_of_one_message_keep_nobody_waiting(
    section: harness.Section, tmp_path: Path
):
    """Others are not behind it, and it does not grow without end."""
    module = section.module
    inbox = module.Inbox(module.Database(tmp_path / ".state" / "gateway.db"))
    limit = module.MAX_PARTS
    for number in range(limit + 3):
        part = module.InboundMessage(
            "telegram", "default", "42", "part", f"id {number}"
        )
        part.expects_more = 60
        inbox.put(part)
    inbox.put(module.InboundMessage("telegram", "default", "43", "hello", "another"))
    assert inbox.take().text == "hello"
    assert [len(whole.other_ids) for whole in inbox.waiting] == [limit - 1, 2]


@since("s04")
def test_an_answer_is_kept_until_it_is_sent(desk: Desk):
    """The program ends before it is out: it is sent later, and the model not asked."""
    screen = desk.both()
    assert desk.push(desk.feishu.event("wait")) == 200
    desk.model.wait(1)
    desk.telegram.say("hello")
    wait_until(lambda: len(desk.inbox()) == 2)
    desk.telegram.down()
    desk.feishu.down()
    desk.gate.set()
    answers = ["heard wait", "heard hello"]
    wait_until(lambda: [row[2] for row in desk.inbox()] == answers)
    screen.kill()
    assert not desk.telegram.sent + desk.feishu.sent
    desk.telegram.up()
    desk.feishu.up()
    desk.both()
    desk.wait_telegram(1)
    desk.feishu.wait_sent(1)
    desk.settle()
    assert [sent.text for sent in desk.telegram.sent] == ["heard hello"]
    assert desk.replies == ["heard wait"]
    assert desk.asked == ["wait", "hello"]
    assert desk.ask_telegram("two") == "heard two"
    assert desk.histories()[-1] == ["hello", "two"]


@since("s04", until="s04")
@pytest.mark.costly
def test_the_inbox_stays_small(desk: Desk):
    """What is answered goes, but for its id, which is known for a day."""
    desk.feishu_alone()
    events = [desk.feishu.event(f"/context {'x' * 40_000}") for _ in range(100)]
    for number, event in enumerate(events):
        assert desk.push(event) == 200
        desk.feishu.wait_sent(number + 1)
    desk.settle()
    log = desk.database.with_name("gateway.db-wal")
    assert desk.database.stat().st_size < 500_000
    assert log.stat().st_size < 6_000_000
    for event in events[::20]:
        assert desk.push(event) == 200
    assert desk.ask_feishu("last") == "heard last"
    assert len(desk.feishu.sent) == 101
    assert desk.asked == ["last"]


@since("s04")
def test_one_chat_cannot_fill_the_inbox(section: harness.Section, desk: Desk):
    """More than MAX_WAITING messages of one chat are not taken; others have room."""
    limit = section.module.MAX_WAITING
    screen = desk.both()
    assert desk.push(desk.feishu.event("wait")) == 200
    desk.model.wait(1)
    for number in range(limit + 20):
        event = desk.feishu.event(f"/context {number}")
        assert desk.push(event) == 200
    desk.telegram.say("hello")
    wait_until(lambda: len(desk.inbox()) == limit + 2)
    wait_until(lambda: lines_with(screen, "[feishu]", "too many messages wait"))
    desk.gate.set()
    desk.wait_telegram(1)
    desk.settle()
    assert len(desk.replies) == limit + 1
    assert desk.ask_feishu("and now?") == "heard and now?"


# --- the disk ---


def limit_files(screen: harness.Screen, size: int) -> None:
    """From now on, no file of a running program may grow over a size."""
    limits = (size, resource.RLIM_INFINITY)
    resource.prlimit(screen.pid, resource.RLIMIT_FSIZE, limits)


def fill_disk(desk: Desk, room: int = 0) -> None:
    """The database cannot grow by more than `room` bytes."""
    log = desk.database.with_name("gateway.db-wal")
    limit_files(desk.screens[-1], log.stat().st_size + room)


needs_prlimit = pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="needs prlimit"
)


@since("s04")
@needs_prlimit
def test_a_full_disk(desk: Desk):
    """What cannot be written is not taken; with room again, it is answered once."""
    screen = desk.both()
    desk.ask_feishu("before")
    desk.ask_telegram("before")
    desk.settle()
    fill_disk(desk)
    event = desk.feishu.event("in need")
    for _ in range(2):
        assert 500 <= desk.push(event) < 600
    desk.telegram.say("in need")
    wait_until(lambda: lines_with(screen, "[telegram]", "trying again"))
    wait_until(lambda: lines_with(screen, "[feishu]", "could not be stored"))
    assert desk.telegram.pending() == 1
    assert desk.asked == ["before", "before"]
    say(screen, "/channels", "terminal: on")
    limit_files(screen, resource.RLIM_INFINITY)
    desk.wait_telegram(2)
    for _ in range(2):
        assert desk.push(event) == 200
    desk.feishu.wait_sent(2)
    assert desk.ask_feishu("after") == "heard after"
    assert desk.ask_telegram("after") == "heard after"
    answers = ["heard before", "heard in need", "heard after"]
    assert [sent.text for sent in desk.telegram.sent] == answers
    assert desk.replies == answers
    say(screen, "/channels", "telegram: on")


@since("s04")
@needs_prlimit
@pytest.mark.parametrize("room", [0, 4200])
def test_a_disk_that_fills_up_behind_an_answer(desk: Desk, room: int):
    """The answer cannot be kept, or it cannot be noted that it is out: none is lost."""
    screen = desk.feishu_alone()
    desk.ask_feishu("before")
    assert desk.push(desk.feishu.event("wait")) == 200
    desk.model.wait(2)
    wait_until(lambda: [row[-1] for row in desk.inbox()] == [True, False])
    fill_disk(desk, room)
    desk.gate.set()
    wait_until(lambda: lines_with(screen, "[feishu] not "))
    later = desk.feishu.event("later")
    assert 500 <= desk.push(later) < 600
    say(screen, "hello", "heard hello")
    screen.kill()
    desk.feishu_alone()
    assert desk.push(later) == 200
    wait_until(lambda: desk.replies[-1] == "heard later")
    assert desk.replies == ["heard before", "heard wait", "heard later"]
    assert desk.asked == ["before", "wait", "hello", "later"]
    desk.settle()


def refused_start(desk: Desk, fsize: int | None = None) -> str:
    """The line with which a start ends that cannot succeed."""
    settings = desk.model.env("brain", **desk.app())
    done = harness.pipe(desk.section, "hello\n", settings, fsize=fsize)
    assert done.returncode == 1
    assert PROMPT not in done.stdout
    (line,) = done.stderr.splitlines()
    assert str(desk.database.parent) in line
    return line


@since("s04")
def test_a_disk_without_any_room_at_the_start(desk: Desk):
    assert refused_start(desk, fsize=9000)
    assert not desk.model.chats
    desk.feishu_alone()
    assert desk.ask_feishu("hello") == "heard hello"


def spoil_header(path: Path) -> None:
    path.write_bytes(b"garbage " * 12 + path.read_bytes()[96:])


def spoil_page(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@since("s04")
@pytest.mark.parametrize("spoil", [spoil_header, spoil_page, cut, make_a_folder])
def test_a_damaged_database(desk: Desk, spoil):
    """One line says so, with the way out; what is there stays as it is."""
    screen = desk.feishu_alone()
    desk.push(desk.feishu.event("wait"))
    desk.model.wait(1)
    screen.kill()
    desk.gate.set()
    with sqlite3.connect(desk.database) as database:  # closed, its log is in the file
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    spoil(desk.database)
    before = desk.database.is_file() and desk.database.read_bytes()
    line = refused_start(desk)
    assert re.search("move|rename|remove", line), line
    after = desk.database.is_file() and desk.database.read_bytes()
    assert after == before
    desk.database.rename(desk.workspace / "aside")
    desk.feishu_alone()
    assert desk.ask_feishu("hello") == "heard hello"


# --- what is private ---


@since("s04")
def test_state_is_private(desk: Desk):
    """At umask 022, what people wrote is readable by the owner alone, at any moment."""
    before = os.umask(0o022)
    try:
        desk.feishu_alone()
        desk.ask_feishu("hello")
    finally:
        os.umask(before)
    state = desk.database.parent
    names = {path.name for path in state.iterdir()}
    assert {"gateway.db", "gateway.db-wal", "gateway.db-shm"} <= names
    sessions = desk.workspace / ".sessions"
    for path in (state, *state.iterdir(), desk.workspace / ".lock", sessions):
        assert path.stat().st_mode & 0o077 == 0, path


@since("s04")
def test_a_file_keeps_its_mode_while_it_is_rewritten(
    section: harness.Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = section.module
    file = tmp_path / "notes.md"
    seen = []

    def look(number: int) -> None:
        modes = [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()]
        seen.append(modes)

    monkeypatch.setattr(module.os, "fsync", look)
    for mode in (0o600, 0o640, 0o755):
        file.write_text("one")
        file.chmod(mode)
        module.replace_file(file, "two")
        assert file.stat().st_mode & 0o777 == mode
        assert seen[-1] == [mode, mode]
    assert file.read_text() == "two"


@since("s04")
def test_tools_cannot_reach_the_state(desk: Desk):
    """An allowed person asks for it, by all kinds of names."""
    desk.telegram_alone()
    desk.ask_telegram("hello")
    desk.settle()
    (desk.workspace / "link").symlink_to(".state")
    (desk.workspace / "top").symlink_to(".")
    before = snapshot(desk.workspace)
    names = [".state/gateway.db", "link/gateway.db", "top/.state/gateway.db"]
    names += ["skills/../.state/gateway.db-wal", str(desk.database), ".lock"]
    names += [".sessions/agents/main/sessions.json", ".state/new"]
    for name in names:
        for call in (
            f"read_file {name}",
            f"write_file {name} x",
            f"edit_file {name} a b",
        ):
            desk.ask_telegram(call)
            result = tool_results(desk)[-1]
            assert re.match("error: (paths that begin|this path is outside)", result)
    for path, data in snapshot(desk.workspace).items():
        is_log = ".sessions" in path.parts or path.name.startswith("gateway.db")
        assert is_log or data == before.get(path), path
    assert desk.ask_telegram("still there?") == "heard still there?"


def snapshot(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


# --- nothing that nobody asked for ---


def listening(pid: int) -> list[str]:
    """The local addresses that a process listens at, as the kernel writes them."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            sockets.add(str(link.readlink()))
    found = []
    for name in ("tcp", "tcp6"):
        table = Path(f"/proc/{pid}/net/{name}").read_text()
        for row in table.splitlines():
            columns = row.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                found.append(columns[1])
    return found


@since("s04")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_with_all_channels_off(desk: Desk):
    """Nothing listens, nothing more is shown, nothing heavy is imported."""
    screen = desk.start()
    say(screen, "hello", "heard hello")
    if desk.section.label == "s04":
        assert listening(screen.pid) == []
    assert not lines_with(screen, "telegram")
    assert not lines_with(screen, "feishu")
    screen.type("quit\n")
    assert screen.wait_exit() == 0
    argv = [sys.executable, "-X", "importtime", str(desk.section.path)]
    done = harness.pipe(argv, "hello\nquit\n", desk.model.env("brain"))
    assert "heard hello" in done.stdout
    imported = set(re.findall(r"\| +(\w+)", done.stderr))
    assert "openai" in imported
    assert not {"telegram", "httpx", "cryptography"} & imported


@since("s04")
def test_no_part_of_a_key_is_shown(desk: Desk):
    """Not in what a platform answers, nor its first half where a line is cut."""
    token = "777:" + "very-secret" * 20
    with FakeTelegram(token) as bot:
        long = f"{'x' * 200} no such bot: {token}"
        bot.fail("getMe", 502, {"ok": False, "error_code": 502, "description": long})
        refusal = {"ok": False, "error_code": 400, "description": long}
        bot.fail("sendMessage", 400, refusal)
        bot.say("hello")
        screen = desk.start(**desk.bot(bot, "_WORK"))
        wait_until(lambda: lines_with(screen, "[telegram work] x"))
        wait_until(lambda: lines_with(screen, "[telegram work] never", "x" * 60))
        wait_for_paper(screen, PROMPT)
        assert "very-secret" not in screen.raw
        assert "777:" not in screen.raw


@since("s04")
def test_control_characters_of_others_do_nothing(desk: Desk):
    """What people write cannot move the cursor, hide text or change the title."""
    screen = desk.telegram_alone()
    evil = "\x1b[2J\x1b]0;owned\x07\x08\x08 rm \u202egnp.exe\u2066 \x9b2J"
    eve = {"id": 42, "is_bot": False, "first_name": f"Eve{evil}"}
    desk.telegram.say(f"hi {evil} there", user=eve)
    desk.wait_telegram(1)
    wait_until(lambda: lines_with(screen, "to Eve"))
    (line,) = [line for line in screen.raw.splitlines() if "[telegram] Eve" in line]
    assert not re.search(
        "[\x00-\x08\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line
    )
    assert "\x1b]0" not in screen.raw
    assert "\x1b[2J" not in screen.raw


# --- trying again ---


@since("s04")
def test_the_waits_between_two_tries(
    section: harness.Section, monkeypatch: pytest.MonkeyPatch
):
    module = section.module
    waits, told = [], []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    failures = [module.ChannelError("no contact") for _ in range(9)]
    failures[2] = module.ChannelError("slow down", retry_after=33)

    def step() -> None:
        if failures:
            raise failures.pop(0)

    module.call_with_retries(step, told.append)
    assert waits == [1, 2, 33, 8, 16, 32, 60, 60, 60]
    assert told == ["no contact; trying again"]


@since("s04")
def test_when_no_other_try_is_made(
    section: harness.Section, monkeypatch: pytest.MonkeyPatch
):
    module = section.module
    waits, told, tries = [], [], []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))

    def fail(is_permanent: bool) -> None:
        tries.append(is_permanent)
        raise module.ChannelError("no", is_permanent)

    with pytest.raises(module.ChannelError):
        module.call_with_retries(lambda: fail(True), told.append, max_tries=9)
    assert (tries, waits, told) == ([True], [], [])
    with pytest.raises(module.ChannelError):
        module.call_with_retries(lambda: fail(False), told.append, max_tries=3)
    assert (tries, waits) == ([True, False, False, False], [1, 2])


@since("s04")
@pytest.mark.parametrize("limit", [1, 10, 100])
def test_a_long_text_in_parts(section: harness.Section, limit: int):
    """No part is too long or blank, and no word is lost or cut without need."""
    split = section.module.split_text
    words = " ".join(f"word{number}" for number in range(100))
    lines = "\n".join(f"line {number}" for number in range(100))
    for text in ("", "x", words, lines, "x" * 1000, " " * 150, "\n" * 150, "字" * 150):
        parts = split(text, limit)
        assert "".join("".join(parts).split()) == "".join(text.split())
        assert all(len(part) <= limit and part.strip() for part in parts)
    assert split("one two three", 9) == ["one two ", "three"]
    assert split("one two\nthree four", 9) == ["one two\n", "three ", "four"]
    assert split("one\ntwo three", 5) == ["one\n", "two ", "three"]
