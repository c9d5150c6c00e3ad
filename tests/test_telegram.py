"""Telegram (s04): who is answered, where, how often, and what no accident may lose."""

import json
import os
import random
import re
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from pathlib import Path

import harness
import pytest
from conversation import wait_until
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram
from fake_telegram import Sent
from fake_telegram import photo
from harness import since

PROMPT = "you> "
PATIENCE = 30  # seconds, on a machine that has a lot to do
GROUP, FORUM, SMALL_GROUP = -100123, -100200, -300
ALLOWED = f"42 43,44, {GROUP}\t{FORUM} {SMALL_GROUP}"
SECRET = "AAHk3v9ZqLm7Xw2RtY8u"
BAD_GATEWAY = "<html><head><title>502 Bad Gateway</title></head></html>"
CONFLICT = {
    "ok": False,
    "error_code": 409,
    "description": "Conflict: terminated by other getUpdates request",
}
UNAUTHORIZED = {"ok": False, "error_code": 401, "description": "Unauthorized"}


class Bot:
    """A section with a bot at Telegram, a scripted model, and a terminal."""

    def __init__(
        self,
        section: harness.Section,
        workspace: Path,
        model: FakeModel,
        telegram: FakeTelegram,
    ):
        self.section = section
        self.workspace = workspace
        self.model = model
        self.telegram = telegram
        model.script("brain", [brain], repeat=True)

    def env(self, **more: str) -> dict[str, str]:
        ours = {
            "TELEGRAM_BOT_TOKEN": self.telegram.token,
            "TELEGRAM_BASE_URL": self.telegram.url,
            "TELEGRAM_ALLOWED_CHATS": ALLOWED,
        }
        return self.model.env("brain", **ours | more)

    @contextmanager
    def run(self, polls: bool = True, **env: str) -> Iterator[harness.Screen]:
        """A run at a terminal, ended by Ctrl-D unless it has ended."""
        before = len(self.telegram.calls)
        with harness.Screen(self.section, self.env(**env)) as screen:
            screen.wait_for(PROMPT, PATIENCE)
            if polls:
                polled = lambda: self.called("getUpdates", before)  # noqa: E731
                self.telegram.until(polled, PATIENCE, "a poll")
            yield screen
            if screen.process.poll() is None:
                wait_until(lambda: screen.paper.rstrip().endswith(PROMPT.rstrip()))
                screen.press("ctrl-d")
            assert screen.wait_exit(PATIENCE) in (0, -9), screen.text
        self.check(screen.raw)

    def check(self, printed: str) -> None:
        """What holds for all that a run has printed, sent, and written."""
        assert not re.search("Traceback|Exception|Warning|Task was", printed), printed
        assert not parts_of_secret(printed), printed
        for file in self.workspace.rglob("*"):
            assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file
        assert self.telegram.problems == []

    # What is said

    def called(self, method: str, since: int = 0) -> list[dict]:
        """The parameters of each call of a method."""
        calls = self.telegram.calls[since:]
        return [params for name, params in calls if name == method]

    def ask(self, text: str | None, chat_id: int = 42, **more: object) -> Sent:
        """Say something that is answered in one message. Returns this message."""
        count = len(self.telegram.sent_to(chat_id))
        say = self.telegram.group_say if chat_id < 0 else self.telegram.say
        say(text, chat_id, **more)
        return self.wait(count + 1, chat_id)[-1]

    def wait(self, count: int, chat_id: int = 42) -> list[Sent]:
        """Wait until a chat has been sent so many messages."""
        sent_to = self.telegram.sent_to
        what = f"message {count} to {chat_id}"
        self.telegram.until(lambda: len(sent_to(chat_id)) >= count, PATIENCE, what)
        return sent_to(chat_id)

    def answers(self, chat_id: int = 42) -> list[str]:
        return [sent.text for sent in self.telegram.sent_to(chat_id)]

    def type(self, screen: harness.Screen, text: str) -> None:
        """One turn at the terminal."""
        screen.type(f"{text}\n")
        screen.wait_for(f"heard {text}")
        screen.wait_for(PROMPT)

    @property
    def questions(self) -> list[str]:
        """The question of each request to the model."""
        return [questions(request.messages)[-1] for request in self.model.chats]

    def history(self) -> list[str]:
        """All that was said, as the last request to the model holds it."""
        messages = self.model.chats[-1].messages
        return [m["content"] for m in messages if m["role"] in ("user", "assistant")]

    # What is on disk

    def wait_confirmed(self) -> None:
        """Wait until Telegram has been told that all updates have arrived."""
        nothing_waits = lambda: not self.telegram.pending()  # noqa: E731
        self.telegram.until(nothing_waits, PATIENCE, "a confirmation")

    def wait_done(self) -> None:
        """Wait until all that was said is confirmed, answered, sent, and noted so."""
        self.wait_confirmed()
        wait_until(lambda: not self.open_rows(), PATIENCE)

    def open_rows(self) -> list[tuple]:
        """What the inbox holds that is not done."""
        return self.sql("SELECT id, message, answer FROM inbox WHERE done IS NULL")

    def sql(self, statement: str, *values: object) -> list[tuple]:
        """Look into the database of the program."""
        file = self.workspace / ".state" / "gateway.db"
        with closing(sqlite3.connect(file)) as database, database:
            return database.execute(statement, values).fetchall()


@pytest.fixture
def telegram() -> Iterator[FakeTelegram]:
    with FakeTelegram(f"123456:{SECRET}") as server:
        yield server


@pytest.fixture
def bot(section, workspace: Path, fake_model: FakeModel, telegram: FakeTelegram) -> Bot:
    return Bot(section, workspace, fake_model, telegram)


def parts_of_secret(text: str) -> list[str]:
    """The pieces of the token, of six characters, that a text shows."""
    pieces = [SECRET[at : at + 6] for at in range(len(SECRET) - 5)]
    return [piece for piece in pieces if piece in text]


def questions(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def last_words(body: dict) -> str:
    """What a person has said last, without the name that it begins with in a group."""
    return re.sub(r"^\[User \d+\] ", "", questions(body["messages"])[-1])


def brain(body: dict) -> object:
    """Answers everything; fails or calls bash when it is told so."""
    said = last_words(body)
    if said.startswith("fail"):
        return Error(422)
    if said.startswith("bash") and body["messages"][-1]["role"] != "tool":
        return ToolCalls([("bash", {"command": f"echo {said} >> ran.txt"})])
    return Text(f"heard {said[:300]}")


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def wait_shown(screen: harness.Screen, pattern: str) -> None:
    """Wait until a screen has shown something, perhaps before the first prompt."""
    wait_until(lambda: re.search(pattern, screen.text, re.S), PATIENCE)


def without_blanks(text: str) -> str:
    return "".join(text.split())


def account(name: str, telegram: FakeTelegram, allowed: str) -> dict[str, str]:
    """The settings of one more bot."""
    return {
        f"TELEGRAM_BOT_TOKEN_{name}": telegram.token,
        f"TELEGRAM_BASE_URL_{name}": telegram.url,
        f"TELEGRAM_ALLOWED_CHATS_{name}": allowed,
    }


# --- each message once ---


@since("s04")
def test_an_update_is_confirmed_only_when_it_is_on_disk(bot: Bot):
    """While the disk is full, Telegram keeps the message, and brings it again."""
    with bot.run() as screen:
        bot.ask("one")
        bot.wait_done()
        sizes = resource.prlimit(screen.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(screen.pid, resource.RLIMIT_FSIZE, (1, sizes[1]))
        bot.telegram.say("two")
        screen.wait_for("not stored")
        assert bot.telegram.pending() == 1
        assert len(bot.questions) == 1
        resource.prlimit(screen.pid, resource.RLIMIT_FSIZE, sizes)
        assert bot.wait(2)[1].text == "heard two"
        bot.wait_done()
        resource.prlimit(screen.pid, resource.RLIMIT_FSIZE, (1, sizes[1]))
        bot.telegram.say("three")
        screen.wait_for("not stored")
        screen.kill()
    assert bot.telegram.pending() == 1
    with bot.run():
        assert bot.wait(3)[2].text == "heard three"
        bot.wait_done()
    assert bot.questions == ["one", "two", "three"]


@since("s04")
def test_a_burst_is_answered_once_and_in_order(bot: Bot, whole: bool):
    chats = [42, 43, 44, 45, 46]
    count = 120 if whole else 30
    said = [(chats[number % 5], f"message {number}") for number in range(count)]
    half = count // 2
    first = [bot.telegram.say(text, chat) for chat, text in said[:half]]
    with bot.run(TELEGRAM_ALLOWED_CHATS="42,43 44\t45, 46"):
        bot.telegram.wait_sent(half // 4, PATIENCE)
        more = [bot.telegram.say(text, chat) for chat, text in said[half:]]
        for update in (*first[::9], *more[::7]):
            bot.telegram.redeliver(update)
        bot.telegram.redeliver(first[3], same_id=True)
        for chat in chats:
            bot.wait(count // 5, chat)
        assert bot.ask("the last").text == "heard the last"
        bot.wait_done()
    for chat in chats:
        expected = [f"heard {text}" for to, text in said if to == chat]
        if chat == 42:
            expected.append("heard the last")
        assert bot.answers(chat) == expected
    calls = len(bot.questions)
    with bot.run():
        for update in (first[0], first[7], more[-1]):
            bot.telegram.redeliver(update)
            bot.telegram.redeliver(update, same_id=True)
        assert bot.ask("next run").text == "heard next run"
    assert bot.questions[calls:] == ["next run"]
    assert len(bot.telegram.sent) == count + 2


@since("s04")
def test_an_answer_does_not_wait_for_the_next_poll(bot: Bot):
    bot.telegram.poll_cap = 60
    with bot.run():
        bot.ask("one")
        bot.ask("two")
        assert len(bot.called("getUpdates")) <= 3


@since("s04")
def test_ids_are_remembered_for_a_day(bot: Bot):
    """What Telegram brings again later than that, nobody expects to be known."""
    with bot.run():
        old = bot.telegram.say("old")
        bot.wait(1)
        new = bot.telegram.say("new")
        bot.wait(2)
        bot.wait_done()
    day = 24 * 3600
    for text, seconds in (("old", day + 60), ("new", day - 60)):
        # A row that is done has no text any more: the rows are in order.
        number = ["old", "new"].index(text) + 1
        at = time.time() - seconds
        bot.sql("UPDATE inbox SET done = ? WHERE number = ?", at, number)
    with bot.run():
        bot.ask("clean up")
        bot.telegram.redeliver(new)
        bot.telegram.redeliver(old)
        bot.wait(4)
        bot.wait_done()
    assert bot.questions == ["old", "new", "clean up", "old"]


# --- what belongs together ---

LONG = "".join(f"{number:05d} " for number in range(2000))  # 12,000 characters


def fill(bot: Bot, count: int) -> None:
    """Updates that nobody answers, up to the hundred that Telegram gives at a time."""
    for number in range(count):
        bot.telegram.group_say(f"idle talk {number}")


def say_parts(bot: Bot, kind: str, chat_id: int = 42) -> None:
    """Three parts of an album or of a long text, with other messages between them.

    In a group, only the first part mentions the bot. What is said between the parts is
    another person's in the same group, and the same person's in another one.
    """
    mention = "@tutor_bot " if chat_id < 0 else ""
    for number in range(3):
        if kind == "album":
            fields = {"media_group_id": "1", "photo": photo(str(number))}
            if number == 0:
                fields["caption"] = f"{mention}my cats"
            bot.telegram.say(None, chat_id, 42, **fields)
        else:
            start = 4050 * number
            text = LONG[start : start + 4050]
            bot.telegram.say((mention if number == 0 else "") + text, chat_id, 42)
        bot.telegram.group_say("idle talk", GROUP, user=43)
        between = f"between {number}"
        bot.telegram.group_say(between, SMALL_GROUP, user=42, mention=True)


def is_whole(question: str, kind: str, count: int = 3) -> bool:
    """Whether a question has all parts of what say_parts has said."""
    if kind == "album":
        return "my cats" in question and question.count("photo") == count
    return without_blanks(question).endswith(without_blanks(LONG))


@since("s04")
@pytest.mark.parametrize("kind", ["album", "paste"])
@pytest.mark.parametrize("place", ["direct", "group"])
def test_parts_are_one_message(bot: Bot, kind: str, place: str):
    """Across two batches, with others between, and a mention in the first part only."""
    chat_id = GROUP if place == "group" else 42
    fill(bot, 95)
    say_parts(bot, kind, chat_id)
    with bot.run():
        bot.wait(1, chat_id)
        bot.wait(3, SMALL_GROUP)
        assert bot.ask("the last", 44).text == "heard the last"
        bot.wait_done()
    found = [asked for asked in bot.questions[:-1] if "between" not in asked]
    assert len(found) == 1
    assert is_whole(found[0], kind)
    assert len(bot.telegram.sent_to(chat_id)) == 1
    assert not [asked for asked in bot.questions if "idle" in asked]


@since("s04")
@pytest.mark.costly
def test_parts_that_come_one_by_one_are_one_message(bot: Bot):
    with bot.run():
        polls = len(bot.called("getUpdates"))
        more = {"gap": 0.03}
        threading.Thread(
            target=bot.telegram.album, args=["my cats"], kwargs=more
        ).start()
        bot.wait(1)
        assert is_whole(bot.questions[0], "album", 5)
        assert len(bot.called("getUpdates")) - polls > 2, "in several batches"
        more["size"] = 4050
        threading.Thread(target=bot.telegram.paste, args=[LONG], kwargs=more).start()
        bot.telegram.until(lambda: len(bot.questions) >= 2)
        assert is_whole(bot.questions[1], "paste")
        bot.telegram.album("only seen, no mention", chat_id=GROUP)
        bot.telegram.paste(LONG, chat_id=GROUP)
        bot.ask("one")
        bot.ask("two")
        bot.wait_done()
    assert bot.questions[2:] == ["one", "two"]


@since("s04")
def test_parts_are_one_message_after_a_crash(bot: Bot):
    gate = threading.Event()
    bot.model.script("brain", [Gate(gate), brain], repeat=True)
    with bot.run() as screen:
        bot.telegram.say("first", 43)
        bot.model.wait(1)
        say_parts(bot, "album")
        bot.telegram.say("what are they called?", 44)
        bot.wait_confirmed()
        screen.kill()
    gate.set()
    with bot.run():
        bot.wait(1, 42)
        bot.wait(1, 43)
        bot.wait(1, 44)
        bot.wait(3, SMALL_GROUP)
        bot.wait_done()
    said = [asked for asked in bot.questions[2:] if "between" not in asked]
    assert len(said) == 2
    assert "what are they called?" in said
    said.remove("what are they called?")  # no chat waits for the parts of another's
    assert is_whole(said[0], "album")


@since("s04")
def test_a_message_from_a_clock_that_was_ahead(bot: Bot):
    """The clock may be set back while messages wait: they do not wait for it to pass,
    and what is said after it is no part of them.
    """
    gate = threading.Event()
    bot.model.script("brain", [Gate(gate), brain], repeat=True)
    with bot.run() as screen:
        bot.telegram.say("one")
        bot.model.wait(1)
        bot.telegram.say("two")
        bot.wait_confirmed()
        screen.kill()
    gate.set()
    row_id, record, _ = bot.open_rows()[0]
    message = json.loads(record)
    message["received"] += 3 * 3600
    statement = "UPDATE inbox SET message = ? WHERE id = ?"
    bot.sql(statement, json.dumps(message), row_id)
    with bot.run():
        assert bot.ask("three", 43).text == "heard three"
        bot.wait(2)
    assert bot.answers() == ["heard one", "heard two"]


# --- who is answered, and where ---


@since("s04")
def test_groups_and_topics(bot: Bot):
    telegram = bot.telegram
    with bot.run():
        for text, more in (
            ("idle talk", {}),
            ("@somebody idle talk", {}),
            ("@tutor_bot2 idle talk", {}),
            ("/start@other_bot idle talk", {}),
            ("idle talk in a topic", {"topic": 9, "chat_id": FORUM}),
            ("idle talk, to Ada", {"reply_to_message": original("so?")}),
        ):
            telegram.group_say(text, **more)
        assert bot.ask("@Tutor_Bot ask one", GROUP).text == "heard ask one"
        answer = bot.ask("ask @tutor_bot two", GROUP).text
        assert answer.split() == ["heard", "ask", "two"]
        assert bot.ask("four", GROUP, reply_to_bot=True).text.endswith("\nfour")
        assert bot.ask("six", SMALL_GROUP, mention=True).text == "heard six"
        assert bot.ask("seven", FORUM, mention=True, topic=9).thread_id == 9
        assert bot.ask("eight", FORUM, mention=True, forum=True).thread_id is None
        assert bot.ask("nine", FORUM, reply_to_bot=True, topic=9).thread_id == 9
        seven, answer, nine = bot.history()
        assert (seven, answer) == ("[User 7] seven", "heard seven")
        assert nine.endswith("\nnine")
        assert bot.ask("ten", FORUM, mention=True, topic=11).thread_id == 11
        assert bot.history() == ["[User 7] ten"]
        topic = {"message_thread_id": 5, "is_topic_message": True}
        assert bot.ask("in a topic of a private chat", 42, **topic).thread_id == 5
        telegram.anonymous("eleven", mention=True, stand_in=True)
        assert "heard [Chat -100123] eleven" in bot.wait(4, GROUP)[-1].text
        bot.wait_done()
    assert not [asked for asked in bot.questions if "idle" in asked]
    assert not [asked for asked in bot.questions if "@" in asked]


@since("s04")
def test_each_chat_topic_and_account_has_its_own_history(bot: Bot):
    """Two bots in one group, too; all of it after a restart."""
    with FakeTelegram("654321:other-token", "work_bot") as work:
        allowed = f"42 {GROUP}"
        settings = account("WORK", work, allowed)
        for number in (0, 1):
            with bot.run(**settings) as screen:
                bot.ask(f"private {number}")
                assert len(bot.history()) == 1 + 2 * number
                bot.ask(f"other {number}", 43)
                assert len(bot.history()) == 1 + 2 * number
                bot.ask(f"group {number}", GROUP, user=42, mention=True)
                assert len(bot.history()) == 1 + 2 * number
                bot.ask(f"topic {number}", FORUM, user=42, mention=True, topic=9)
                assert len(bot.history()) == 1 + 2 * number
                work.say("a stranger at work", 43)
                work.say(f"work {number}", 42)
                work.wait_sent(1 + 2 * number)
                assert len(bot.history()) == 1 + 2 * number
                work.group_say(f"work group {number}", GROUP, user=42, mention=True)
                work.wait_sent(2 + 2 * number)
                assert len(bot.history()) == 1 + 2 * number
                bot.type(screen, f"terminal {number}")
                assert len(bot.history()) == 1 + 2 * number
                bot.wait_done()
                work.until(lambda: not work.pending())
        assert (work.problems, len(work.sent)) == ([], 4)
        assert "other-token" not in screen.raw
    assert "stranger" not in str(bot.questions)


@since("s04")
def test_strangers(bot: Bot):
    """They are told nothing, and what they are called cannot harm the terminal."""
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m\x9d\u202e\r\b\x00"
    name = {
        "id": 666,
        "is_bot": False,
        "first_name": f"Mal{evil}lory",
        "last_name": "\n\x85forged\u2028",
    }
    with bot.run() as screen:
        for _ in range(3):
            bot.telegram.say(f"let me in {evil}", 666, user=name)
        for topic in (5, 6):
            bot.telegram.group_say("and me", -666, mention=True, user=name, topic=topic)
            bot.telegram.group_say("and me", -666, mention=True, user=8, topic=topic)
        bot.ask(f"from a friend {evil} indeed", user=name | {"id": 42})
        screen.wait_for("to Mal")
        bot.wait_done()
    for harm in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\x9d", "\u202e", "\0", "\x08"):
        assert harm not in screen.raw, repr(harm)
    assert len(lines_with(screen.paper, " 666 ", "ALLOWED_CHATS")) == 1, screen.paper
    assert len(lines_with(screen.paper, " -666 ", "ALLOWED_CHATS")) == 1, screen.paper
    assert len(lines_with(screen.paper, "ALLOWED_CHATS")) == 2, screen.paper
    assert len(bot.questions) == 1
    assert {sent.chat_id for sent in bot.telegram.sent} == {42}
    assert {action.chat_id for action in bot.telegram.actions} <= {42}
    assert not re.search(r"^\W*forged", screen.paper, re.M), "a line of our own"


@since("s04")
def test_nobody_is_allowed_by_default(bot: Bot):
    with bot.run(TELEGRAM_ALLOWED_CHATS="") as screen:
        bot.telegram.say("hello", 42)
        bot.telegram.group_say("hello", mention=True)
        screen.wait_for("42 ")
        screen.wait_for(f"{GROUP} ")
        bot.wait_confirmed()
        bot.type(screen, "hello")
    assert bot.questions == ["hello"]
    assert (bot.telegram.sent, bot.telegram.actions) == ([], [])


@since("s04")
def test_who_is_no_longer_allowed_waits(bot: Bot):
    gate = threading.Event()
    bot.model.script("brain", [Gate(gate), brain], repeat=True)
    with bot.run() as screen:
        bot.telegram.say("left over")
        bot.model.wait(1)
        bot.wait_confirmed()
        screen.kill()
    gate.set()
    with bot.run(TELEGRAM_ALLOWED_CHATS="43"):
        bot.ask("hello", 43)
    assert bot.questions == ["left over", "hello"]
    assert bot.answers(42) == []
    with bot.run():
        assert bot.wait(1)[0].text == "heard left over"


@since("s04")
def test_what_is_no_message_of_a_person(bot: Bot):
    """Edits, posts of channels, other bots, what is done to a group, unknown kinds."""
    telegram = bot.telegram
    said = telegram.say("first")
    reaction = {"chat": {"id": 42, "type": "private"}, "message_id": 1, "date": 1}
    reaction["old_reaction"] = []
    reaction["new_reaction"] = [{"type": "emoji", "emoji": "x"}]
    telegram.edited(said, "first, edited")
    idle = telegram.group_say("idle")
    telegram.edited(idle, "@tutor_bot idle, edited")
    telegram.channel_post("@tutor_bot idle", chat_id=SMALL_GROUP)
    for kind in ("new_chat_members", "pinned_message", "delete_chat_photo"):
        telegram.service(kind)
    telegram.from_bot("@tutor_bot idle")
    telegram.from_bot("idle", reply_to_bot=True)
    telegram.unknown()
    telegram.unknown("message_reaction", **reaction)
    telegram.say(None, 42, unknown_content={"x": 1})
    with bot.run():
        bot.wait(1)
        telegram.unknown()
        assert bot.ask("second").text == "heard second"
        bot.wait_done()
    assert bot.questions == ["first", "second"]
    assert [sent.text for sent in telegram.sent] == ["heard first", "heard second"]


# --- what a message brings along ---


def original(text: str | None, **more: object) -> dict:
    """A message of Ada's that another one refers to."""
    message = {"message_id": 7, "date": 1, "chat": {"id": 42, "type": "private"}}
    message["from"] = {"id": 9, "is_bot": False, "first_name": "Ada"}
    if text:
        message["text"] = text
    return message | more


def text_link(offset: int, length: int, url: str) -> list[dict]:
    return [{"type": "text_link", "offset": offset, "length": length, "url": url}]


FILE = {"file_id": "f", "file_unique_id": "u"}
SHARED_BY_ADA = {"type": "user", "date": 1, "sender_user": original("")["from"]}
HIDDEN = {"type": "hidden_user", "date": 1, "sender_user_name": "Grace"}
CHANNEL = {"id": -1009, "type": "channel", "title": "The News"}
POSTED = {"type": "channel", "date": 1, "chat": CHANNEL, "message_id": 3}
IN_A_GROUP = {
    "type": "chat",
    "date": 1,
    "sender_chat": CHANNEL | {"type": "supergroup", "title": "The Club"},
}
TASKS = [{"id": 1, "text": "buy milk"}, {"id": 2, "text": "feed the cat"}]
CONTEXTS = {
    "a reply": (
        {"text": "why?", "reply_to_message": original("the sky is green")},
        ["Ada", "the sky is green", "why?"],
    ),
    "a reply to a picture": (
        {
            "text": "whose?",
            "reply_to_message": original(None, caption="a cat", photo=photo("p")),
        },
        ["Ada", "a cat", "whose?"],
    ),
    "a quote": (
        {
            "text": "is it?",
            "reply_to_message": original("the sky is green, they say"),
            "quote": {"text": "is green", "position": 8},
        },
        ["these words: is green]", "is it?"],
    ),
    "a link": (
        {"text": "\U0001f600 read this", "entities": text_link(3, 4, "http://a.test")},
        ["read", "http://a.test", "\U0001f600 read this"],
    ),
    "a link under a picture": (
        {
            "text": None,
            "caption": "see here",
            "caption_entities": text_link(4, 4, "http://b.test"),
            "photo": photo("p"),
        },
        ["http://b.test", "photo", "see here"],
    ),
    "forwarded from a person": (
        {"text": "tea at five", "forward_origin": SHARED_BY_ADA},
        ["forwarded", "Ada", "tea at five"],
    ),
    "forwarded from somebody hidden": (
        {"text": "tea at six", "forward_origin": HIDDEN},
        ["forwarded", "Grace", "tea at six"],
    ),
    "forwarded from a channel": (
        {"text": "tea at seven", "forward_origin": POSTED},
        ["forwarded", "The News", "tea at seven"],
    ),
    "forwarded from a group": (
        {"text": "tea at eight", "forward_origin": IN_A_GROUP},
        ["forwarded", "The Club", "tea at eight"],
    ),
    "a file": (
        {
            "text": None,
            "caption": "the report",
            "document": FILE | {"file_name": "report.pdf"},
        },
        ["document", "the report"],
    ),
    "a voice message": ({"text": None, "voice": FILE | {"duration": 3}}, ["voice"]),
    "a place": (
        {"text": None, "location": {"latitude": 1.5, "longitude": 2.5}},
        ["location"],
    ),
    "a contact": (
        {"text": None, "contact": {"phone_number": "1", "first_name": "Bob"}},
        ["contact"],
    ),
    "a checklist": (
        {"text": None, "checklist": {"title": "to do", "tasks": TASKS}},
        ["to do", "buy milk", "feed the cat"],
    ),
}


@since("s04")
def test_what_a_message_refers_to(bot: Bot):
    with bot.run():
        for name, (fields, expected) in CONTEXTS.items():
            bot.ask(fields["text"], **{k: v for k, v in fields.items() if k != "text"})
            for text in expected:
                assert text in bot.questions[-1], name
        bot.ask("@tutor_bot why?", GROUP, reply_to_message=original("it is so"))
        assert "Ada" in bot.questions[-1]
        assert "it is so" in bot.questions[-1]
        bot.ask("plain")
        assert bot.questions[-1] == "plain"


@since("s04")
def test_an_update_that_cannot_be_parsed(bot: Bot):
    """It silences nobody, not even after a restart, and the terminal is told of it."""
    with bot.run() as screen:
        bot.telegram.say("one")
        bot.telegram.say("broken", 666, poll={"id": "1"})
        bot.telegram.say("two")
        bot.wait(2)
        wait_shown(screen, "cannot be understood")
        bot.wait_done()
        screen.kill()
    bot.telegram.say("broken", 42, poll={"id": "1"})
    bot.telegram.say("three")
    with bot.run() as screen:
        bot.wait(3)
        wait_shown(screen, "cannot be understood")
        assert bot.ask("four").text == "heard four"
        bot.wait_done()
    assert bot.questions == ["one", "two", "three", "four"]
    assert [sent.text for sent in bot.telegram.sent] == [
        f"heard {text}" for text in bot.questions
    ]


# --- what is sent ---


@since("s04")
def test_long_answers_come_in_parts(bot: Bot):
    texts = {
        "words": "".join(f"word{number} " for number in range(2000)).strip(),
        "lines": "".join(f"line {number}\n" for number in range(1000)).strip(),
        "emoji": "\U0001f600" * 9000,
    }

    def answer(body: dict) -> Text:
        text = texts[last_words(body)]
        return Text(text, pieces=[text])

    bot.model.script("brain", [answer], repeat=True)
    with bot.run():
        for chat, name in zip((42, 43, 44), texts, strict=True):
            bot.telegram.say(name, chat)
        bot.telegram.wait_sent(8, PATIENCE)
        bot.wait_done()
    for chat, text in zip((42, 43, 44), texts.values(), strict=True):
        parts = bot.answers(chat)
        assert without_blanks("".join(parts)) == without_blanks(text)
        assert all(len(part) <= 4000 for part in parts)
        assert len(parts) <= len(text) // 3000 + 1
    assert all(re.fullmatch(r"(word\d+\s*)+", part) for part in bot.answers(42))
    assert all(re.fullmatch(r"(line \d+\s*)+", part) for part in bot.answers(43))


@since("s04")
def test_a_long_stretch_of_blank_lines(bot: Bot):
    """Telegram refuses a text without words; what stands after it arrives all the same.

    Small models run into such loops.
    """
    text = "before" + "\n" * 9000 + "after"
    bot.model.script("brain", [Text(text, pieces=[text]), brain])
    with bot.run():
        bot.telegram.say("go on")
        bot.wait(2)
        bot.wait_done()
        assert bot.ask("next").text == "heard next"
    assert "".join(bot.answers()[:-1]).split() == ["before", "after"]


@since("s04")
def test_typing_is_shown_where_the_answer_will_be(bot: Bot):
    seen = bot.telegram.actions

    def answer(body: dict) -> Text:
        bot.telegram.until(lambda: len(seen) >= len(bot.model.chats), what="typing")
        return Text("here it is")

    bot.model.script("brain", [answer], repeat=True)
    with bot.run():
        bot.ask("hello")
        bot.ask("hello", GROUP, mention=True)
        bot.ask("hello", FORUM, mention=True, topic=9)
        bot.ask("hello", FORUM, mention=True, forum=True)
    assert {action.action for action in seen} == {"typing"}
    places = [(action.chat_id, action.thread_id) for action in seen]
    expected = [(42, None), (GROUP, None), (FORUM, 9), (FORUM, 1)]
    assert list(dict.fromkeys(places)) == expected


@since("s04")
@pytest.mark.costly
def test_typing_is_shown_while_the_model_works(bot: Bot):
    gate = threading.Event()
    bot.model.script("brain", [brain, Gate(gate, Text("at last")), brain])

    def times(chat_id: int) -> list[float]:
        return [seen.at for seen in bot.telegram.actions if seen.chat_id == chat_id]

    with bot.run():
        bot.ask("quick")
        bot.telegram.say("slow", 43)
        bot.telegram.until(lambda: len(times(43)) == 2, PATIENCE, "typing again")
        gate.set()
        assert bot.wait(1, 43)[0].text == "at last"
        bot.ask("next")
    assert len(times(42)) <= 2, "it ends with the turn"
    assert len(times(43)) == 2
    first, second = times(43)
    assert 3 < second - first < 5, "Telegram shows it for five seconds"


@since("s04")
def test_a_failure_of_the_model_is_told(bot: Bot):
    with bot.run():
        answer = bot.ask("fail please").text
        assert answer.strip()
        assert len(answer.splitlines()) == 1
        assert "sk-test" not in answer
        assert bot.ask("and now?").text == "heard and now?"
        assert bot.history() == ["and now?"]
    assert len(bot.answers(42)) == 2


@since("s04")
def test_commands(bot: Bot):
    with bot.run() as screen:
        bot.ask("one")
        bot.ask("one", 43)
        assert "session" in bot.ask("/new").text
        bot.ask("two")
        assert bot.history() == ["two"]
        bot.ask("two", 43)
        assert bot.history() == ["one", "heard one", "two"]
        asked = len(bot.model.chats)
        for text in ("/help", "/start", "/nope", "/channels", "/trace x"):
            answer = bot.ask(text).text
            assert "/new" in answer, text
            assert "/compact" in answer, text
            assert "/channels" not in answer, text
        assert "telegram" not in answer, "the owner's commands are for the terminal"
        assert bot.ask("/list").text.count("*") == 1
        assert bot.ask("/context").text
        assert len(bot.model.chats) == asked, "commands are no questions"
        bot.ask("one", GROUP, mention=True)
        assert "session" in bot.ask("/new@tutor_bot", GROUP).text
        bot.telegram.group_say("/new@other_bot", GROUP)
        bot.ask("two", GROUP, mention=True)
        assert bot.history() == ["[User 7] two"]
        bot.type(screen, "three")
        assert bot.history() == ["three"]
        bot.wait_done()
    with bot.run():
        bot.ask("three")
        assert bot.history() == ["two", "heard two", "three"]


@since("s04")
def test_compact_from_afar(bot: Bot):
    with bot.run():
        for number in range(6):
            bot.ask(f"question {number}")
        before = bot.history()
        answer = bot.ask("/compact").text
        assert answer.strip()
        bot.ask("what now?")
        assert len(bot.history()) < len(before)
        assert bot.history()[-1] == "what now?"


@since("s04")
@pytest.mark.parametrize("approval", ["ask", "always", ""])
def test_bash_is_refused_from_afar(bot: Bot, approval: str):
    """Whatever was allowed at the terminal, unless the setting allows all commands."""
    ran = bot.workspace / "ran.txt"
    with bot.run(APPROVAL=approval) as screen:
        screen.type("bash terminal\n")
        if approval != "always":
            screen.wait_for("run it")
            screen.type("a\n")
        screen.wait_for("heard bash terminal")
        bot.ask("bash telegram")
    results = [m for m in bot.model.chats[-1].messages if m["role"] == "tool"]
    if approval == "always":
        assert ran.read_text().split() == ["bash", "terminal", "bash", "telegram"]
    else:
        assert ran.read_text().split() == ["bash", "terminal"]
        assert "not allowed" in results[-1]["content"]
        assert screen.text.count("run it") == 1


# --- what goes wrong at Telegram ---


@since("s04")
def test_a_user_who_has_blocked_the_bot(bot: Bot):
    bot.telegram.know(42)
    bot.telegram.block(42)
    with bot.run() as screen:
        bot.telegram.say("hello", 42)
        assert bot.ask("hello", 43).text == "heard hello"
        assert bot.ask("again", 43).text == "heard again"
        screen.wait_for("blocked")
        bot.wait_done()
    assert len(lines_with(screen.paper, "blocked")) == 1
    with bot.run():
        bot.ask("restarted", 43)
    tried = [params["chat_id"] for params in bot.called("sendMessage")]
    assert tried.count(42) == 1


@since("s04")
@pytest.mark.costly
def test_flood_control_is_waited_out(bot: Bot):
    bot.telegram.flood(42, seconds=3)
    with bot.run():
        began = time.monotonic()
        bot.telegram.say("flooded", 42)
        bot.telegram.until(lambda: len(bot.called("sendMessage")) == 1)
        bot.telegram.say("other", 43)
        other = bot.wait(1, 43)[0]
        flooded = bot.wait(1, 42)[0]
        bot.wait_done()
    assert other.text == "heard other"
    assert other.at < flooded.at, "nobody waits for the flood of another chat"
    assert flooded.at - began >= 3
    assert len(bot.called("sendMessage")) == 3


@since("s04")
@pytest.mark.costly
def test_two_processes_with_one_bot(bot: Bot):
    bot.telegram.poll_cap = 0.2
    bot.telegram.fail("getUpdates", 409, CONFLICT, times=2)
    began = time.monotonic()
    with bot.run() as screen:
        wait_shown(screen, "Conflict: terminated by other getUpdates request")
        assert bot.ask("hello").text == "heard hello"
        assert time.monotonic() - began > 2, "it does not try again at once"
        wait_shown(screen, "Conflict.*on, as @tutor_bot")
    assert len(lines_with(screen.paper, "Conflict")) == 1


@since("s04")
@pytest.mark.costly
def test_errors_that_pass(bot: Bot):
    """What the network and Telegram's servers do loses nothing and doubles nothing."""
    telegram = bot.telegram
    telegram.poll_cap = 0.2
    telegram.fail("getMe", 502, BAD_GATEWAY)
    said = {42: "one", 43: "two", 44: "three"}
    with bot.run() as screen:
        for chat, text in said.items():
            for method in ("getUpdates", "sendMessage", "sendChatAction"):
                if text == "one":
                    telegram.drop(method)
                else:
                    telegram.fail(method, 502 if text == "two" else 200, BAD_GATEWAY)
            telegram.say(text, chat)
            bot.wait(1, chat)
        bot.wait_done()
        wait_shown(screen, "Invalid server response.*on, as @tutor_bot")
        screen.type("/channels\n")
        screen.wait_for("telegram: on")
    assert bot.questions == list(said.values())
    assert {sent.chat_id: sent.text for sent in telegram.sent} == {
        chat: f"heard {text}" for chat, text in said.items()
    }
    assert len(telegram.sent) == 3


@since("s04")
@pytest.mark.costly
def test_an_outage(bot: Bot):
    """What was said before it, and what is said meanwhile, is answered once."""
    telegram = bot.telegram
    gate = threading.Event()
    script = [brain, Gate(gate, Text("heard two")), brain]
    bot.model.script("brain", script, repeat=True)
    with bot.run() as screen:
        bot.ask("one")
        telegram.say("two")
        bot.model.wait(2)
        telegram.say("three", 43)
        bot.wait_confirmed()
        telegram.down()
        before = len(telegram.calls)
        began = time.monotonic()
        gate.set()
        telegram.say("four")
        telegram.say("five", 44)
        screen.wait_for("trying again")
        bot.type(screen, "the terminal goes on")

        def tries() -> int:
            sends = bot.called("sendMessage", before)
            return [params["chat_id"] for params in sends].count(42)

        telegram.until(lambda: tries() >= 2, PATIENCE, "another try")
        assert time.monotonic() - began > 1, "it does not try again at once"
        assert len(telegram.calls) - before < 40
        telegram.down(port=True)
        screen.wait_for("trying again")
        telegram.up()
        bot.wait(3, 42)
        bot.wait(1, 43)
        bot.wait(1, 44)
        bot.ask("six")
        bot.wait_done()
    assert bot.answers(42) == ["heard one", "heard two", "heard four", "heard six"]
    assert bot.answers(43) == ["heard three"]
    assert bot.answers(44) == ["heard five"]


@since("s04")
@pytest.mark.parametrize("token", [f"123456:wrong{SECRET}", SECRET])
def test_a_bad_token(bot: Bot, token: str):
    """It is told, and never shown; the rest goes on, and so does another account."""
    with FakeTelegram("654321:other-token", "work_bot") as work:
        settings = account("WORK", work, "42") | {"TELEGRAM_BOT_TOKEN": token}
        with bot.run(polls=False, **settings) as screen:
            work.say("hello", 42)
            assert work.wait_sent(1)[0].text == "heard hello"
            bot.type(screen, "are you there?")
            wait_shown(screen, r"\[telegram\] [^\n]*token")
            screen.type("/channels\n")
            screen.wait_for(re.compile(r"telegram: .*token", re.I))
            screen.wait_for("telegram work: ")
    assert len(lines_with(screen.text, "[telegram]")) == 1
    assert bot.telegram.sent == []


@since("s04")
@pytest.mark.costly
def test_a_token_that_is_refused_for_a_time_loses_no_answer(bot: Bot):
    """BotFather has made a new token: until it is in .env, what is answered waits."""
    with bot.run() as screen:
        bot.ask("one")
        bot.wait_done()
        bot.telegram.fail("getUpdates", 401, UNAUTHORIZED)
        bot.telegram.say("two")
        wait_shown(screen, "[Tt]oken|[Uu]nauthorized")
        assert bot.wait(2)[1].text == "heard two"
        bot.wait_done()
        bot.telegram.fail("sendMessage", 401, UNAUTHORIZED, times=1000)
        bot.telegram.say("three")
        wait_until(lambda: [row[2] for row in bot.open_rows()] == ["heard three"])
        screen.kill()
    with bot.run(polls=False, TELEGRAM_BOT_TOKEN=f"123456:wrong{SECRET}") as screen:
        wait_shown(screen, "trying again")
        screen.kill()
    bot.telegram.mend()
    with bot.run():
        assert bot.wait(3)[2].text == "heard three"
    assert bot.questions == ["one", "two", "three"]
    assert bot.answers() == ["heard one", "heard two", "heard three"]


@since("s04")
def test_the_outage_of_one_bot_does_not_stop_the_other(bot: Bot):
    with FakeTelegram("654321:other-token", "work_bot") as work:
        with bot.run(**account("WORK", work, "42")):
            bot.ask("one")
            work.hang("sendMessage", 60)
            work.say("at work")
            work.until(lambda: "sendMessage" in [name for name, _ in work.calls])
            work.down()
            assert bot.ask("two").text == "heard two"
            work.up()
            assert work.wait_sent(1, PATIENCE)[0].text == "heard at work"
            bot.wait_done()
        assert work.problems == []


@since("s04")
@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_no_proxy_with_ipv6(bot: Bot, name: str):
    """What the HTTP library cannot read in it is left out, the rest holds."""
    settings = {
        name: "localhost,[::1],fd00::/8,127.0.0.1",
        "HTTP_PROXY": "http://[::1]:9",
    }
    with bot.run(**settings):
        assert bot.ask("hello").text == "heard hello"


@since("s04")
def test_chats_do_not_wait_for_each_other(bot: Bot):
    """Twenty answers are on their way at once, however long each of them takes."""
    chats = range(1001, 1021)
    sends = lambda: len(bot.called("sendMessage"))  # noqa: E731
    bot.telegram.hang("sendMessage", 60, times=20, until=lambda: sends() >= 20)
    with bot.run(TELEGRAM_ALLOWED_CHATS=" ".join(map(str, chats))):
        for chat in chats:
            bot.telegram.say("hello", chat)
        bot.telegram.wait_sent(20, PATIENCE)
        bot.wait_done()
    assert {sent.chat_id for sent in bot.telegram.sent} == set(chats)


# --- ends ---


@since("s04")
@pytest.mark.parametrize("moment", ["model", "tool", "send", "outage"])
def test_killed_in_the_middle_of_a_turn(bot: Bot, moment: str):
    """The turn is resumed: nothing is asked, run, or answered twice."""
    telegram = bot.telegram
    gate = threading.Event()
    question = "bash two" if moment == "tool" else "two"
    steps = [brain, brain]
    if moment == "model":
        steps = [brain, Gate(gate), brain]
    if moment == "tool":
        wait = "echo bash two >> ran.txt; while [ ! -e go ]; do sleep 0.02; done"
        steps = [brain, ToolCalls([("bash", {"command": wait})]), brain]
    bot.model.script("brain", steps)
    with bot.run(APPROVAL="always") as screen:
        bot.ask("one")
        bot.wait_done()
        if moment == "send":
            telegram.hang("sendMessage", 60)
        if moment == "outage":
            telegram.fail("sendMessage", 502, BAD_GATEWAY, times=1000)
        telegram.say(question)
        if moment == "model":
            bot.model.wait(2)
        elif moment == "tool":
            wait_until((bot.workspace / "ran.txt").exists)
        else:
            telegram.until(lambda: len(bot.called("sendMessage")) >= 2)
        bot.wait_confirmed()
        screen.kill()
    (bot.workspace / "go").touch()
    gate.set()
    telegram.mend()
    asked = len(bot.questions)
    with bot.run(APPROVAL="always"):
        assert bot.wait(2)[1].text == f"heard {question}"
        bot.wait_done()
    assert len(bot.questions) - asked == (1 if moment in ("model", "tool") else 0)
    assert questions(bot.model.chats[-1].messages) == ["one", question]
    assert bot.answers() == ["heard one", f"heard {question}"]
    if moment == "tool":
        assert (bot.workspace / "ran.txt").read_text() == "bash two\n"


@since("s04")
def test_killed_with_answers_that_wait_to_be_sent(bot: Bot):
    bot.telegram.hang("sendMessage", 60)
    with bot.run() as screen:
        for number in range(3):
            bot.telegram.say(f"message {number}")
        wait_until(lambda: len([row for row in bot.open_rows() if row[2]]) == 3)
        screen.kill()
    with bot.run():
        bot.wait(3)
        bot.ask("the last")
    said = ["message 0", "message 1", "message 2", "the last"]
    assert bot.answers() == [f"heard {text}" for text in said]
    assert bot.questions == said


@since("s04")
@pytest.mark.costly
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_25_times(bot: Bot, seed: int):
    """No message is lost, each is answered, and none stands in a history twice."""
    rng = random.Random(seed)
    telegram = bot.telegram
    bot.model.script("brain", [answer_slowly], repeat=True)
    said: dict[int, list[str]] = {42: [], 43: [], 44: []}
    for number in range(25):
        before = len(telegram.calls)
        with harness.Screen(bot.section, bot.env()) as screen:
            chat = rng.choice([42, 43, 44])
            said[chat].append(f"message {number}")
            telegram.say(said[chat][-1], chat)
            if rng.random() < 0.8:
                telegram.until(lambda before=before: bot.called("getUpdates", before))
            time.sleep(rng.uniform(0, 0.25))
            screen.kill()
        bot.check(screen.raw)
    with bot.run():
        for chat, texts in said.items():
            wanted = {f"heard {text}" for text in texts}
            telegram.until(
                lambda chat=chat, wanted=wanted: wanted <= set(bot.answers(chat)), 30
            )
        bot.wait_done()
        for chat, texts in said.items():
            bot.ask("the last", chat)
            assert questions(bot.model.chats[-1].messages) == [*texts, "the last"]
    assert len(telegram.sent) <= 25 + 3 + 25, "a kill doubles at most what is in flight"
    for file in (bot.workspace / ".sessions").rglob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        asked = questions([r["message"] for r in records if r["type"] == "message"])
        assert len(asked) == len(set(asked)), file


def answer_slowly(body: dict) -> Stall:
    return Stall(1, 0.03, Stall(2, 0.03, Text(f"heard {last_words(body)}")))


@since("s04")
def test_a_quit_waits_for_no_thread(bot: Bot):
    """Strangers write while the program ends, and the model answers nobody."""
    gate = threading.Event()
    bot.model.script("brain", [Gate(gate)], repeat=True)
    with bot.run() as screen:
        bot.telegram.say("hello")
        bot.model.wait(1)
        for stranger in range(30):
            bot.telegram.say("let me in", 1000 + stranger)
        screen.press("ctrl-d")
        assert screen.wait_exit(10) == 0
    gate.set()


def sleep_command(file: str) -> str:
    """A command that writes its process id into a file, and then sleeps.

    It first prints more than a pipe holds: when the file is there, the program reads
    from the command, and so knows of it.
    """
    return f"printf %0100000d 0; echo $$ > {file}; exec sleep 300"


@since("s04")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_does_not_outlive_the_program(bot: Bot, number: signal.Signals):
    call = ToolCalls([("bash", {"command": sleep_command("pid")})])
    bot.model.script("brain", [call, Stall(0, 5)])
    file = bot.workspace / "pid"
    with harness.Screen(bot.section, bot.env(APPROVAL="always")) as screen:
        bot.telegram.say("wait for me")
        wait_until(lambda: file.exists() and file.read_text().strip(), PATIENCE)
        pid = int(file.read_text())
        os.kill(screen.pid, number)
        assert screen.wait_exit(PATIENCE) == 128 + number
        wait_until(lambda: not is_running(pid), 5)
    assert bot.telegram.sent == []


@since("s04")
def test_no_command_is_started_while_the_program_ends(bot: Bot):
    """An answer to somebody else has a second to arrive: nothing is begun in it."""
    calls = [
        ToolCalls([("bash", {"command": sleep_command(name)})])
        for name in ("pid1", "pid2")
    ]
    bot.model.script("brain", [brain, *calls, brain])
    first, second = bot.workspace / "pid1", bot.workspace / "pid2"
    with harness.Screen(bot.section, bot.env(APPROVAL="always")) as screen:
        bot.telegram.hang("sendMessage", 60)
        bot.telegram.say("hello", 43)
        bot.telegram.until(lambda: bot.called("sendMessage"))
        bot.telegram.say("wait for me")
        wait_until(lambda: first.exists() and first.read_text().strip(), PATIENCE)
        os.kill(screen.pid, signal.SIGTERM)
        assert screen.wait_exit(PATIENCE) == 128 + signal.SIGTERM
    running = []
    for file in (first, second):
        if file.exists() and is_running(int(file.read_text())):
            running.append(file.name)
            os.kill(int(file.read_text()), signal.SIGKILL)
    assert not running


def is_running(pid: int) -> bool:
    """Whether a process runs (and has not only not been waited for)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
