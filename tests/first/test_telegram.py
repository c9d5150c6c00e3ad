"""Telegram (s04): who is answered, where, how often, and what no accident may lose."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import certifi
import harness
import pytest
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

from first.ledger import inbox_is_empty
from first.ledger import pending

PROMPT = "you> "
GROUP, FORUM = -100123, -100200
ALLOWED = f"42 43,44, {GROUP}\t{FORUM} -300"
BAD_GATEWAY = "<html><head><title>502 Bad Gateway</title></head></html>"
CONFLICT = {"ok": False, "error_code": 409, "description": "Conflict: terminated by other request"}


class Post:
    """A section with a bot at Telegram, a scripted model, and the terminal that it runs at."""

    def __init__(self, section, workspace: Path, model: FakeModel, telegram: FakeTelegram):
        self.section, self.workspace = section, workspace
        self.model, self.telegram = model, telegram
        self.certificates = workspace.with_name("one.pem")  # to read all takes longer than the rest
        first, mark, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----\n")
        self.certificates.write_text(first + mark)
        model.script("brain", [brain], repeat=True)

    def env(self, **more: str) -> dict[str, str]:
        ours = {
            "TELEGRAM_BOT_TOKEN": self.telegram.token,
            "TELEGRAM_BASE_URL": self.telegram.url,
            "TELEGRAM_ALLOWED_CHATS": ALLOWED,
            "SSL_CERT_FILE": str(self.certificates),
        }
        return self.model.env("brain", **ours | more)

    @contextmanager
    def screen(self, polls: bool = True, **env: str) -> Iterator[harness.Screen]:
        """A run at a terminal, ended by Ctrl-D unless it has ended."""
        before = len(self.telegram.calls)
        with harness.Screen(self.section, self.env(**env)) as screen:
            screen.wait_for(PROMPT)
            if polls:
                self.telegram.until(lambda: self.called("getUpdates", before), what="a poll")
            yield screen
            if screen.process.poll() is None:
                drawn(screen, PROMPT)
                screen.press("ctrl-d")
            assert screen.wait_exit(5) in (0, -9), screen.text
        self.check(screen.raw)

    def check(self, printed: str) -> None:
        """What holds for all that any run has printed, sent and written."""
        assert not re.search("Traceback|Exception|Warning|Task was", printed), printed[-2000:]
        secret = self.telegram.token.partition(":")[2]
        assert secret not in printed
        for file in self.workspace.rglob("*"):
            assert file.is_dir() or secret.encode() not in file.read_bytes(), file
        assert self.telegram.problems == []

    def called(self, method: str, since: int = 0) -> list[dict]:
        return [params for name, params in self.telegram.calls[since:] if name == method]

    def ask(self, text: str | None, chat_id: int = 42, **more: object) -> Sent:
        """Say something that is answered in one message, which this returns."""
        count = len(self.telegram.sent_to(chat_id))
        say = self.telegram.group_say if chat_id < 0 else self.telegram.say
        say(text, chat_id, **more)
        return self.wait(count + 1, chat_id)[-1]

    def wait(self, count: int, chat_id: int = 42, timeout: float = 20) -> list[Sent]:
        """Wait until a chat has been sent so many messages."""
        sent = self.telegram.sent_to
        self.telegram.until(lambda: len(sent(chat_id)) >= count, timeout, f"{count} to {chat_id}")
        return sent(chat_id)

    def told(self, chat_id: int) -> list[str]:
        return [sent.text for sent in self.telegram.sent_to(chat_id)]

    def confirmed(self) -> None:
        """Wait until Telegram has been told that all was received."""
        self.telegram.until(lambda: not self.telegram.pending(), what="a confirmation")

    def turn(self, screen: harness.Screen, text: str) -> None:
        """One turn at the terminal, up to the next prompt."""
        screen.type(f"{text}\n")
        screen.wait_for(f"heard {text}")
        drawn(screen, PROMPT)

    @property
    def questions(self) -> list[str]:
        """The question of each request to the model."""
        return [questions(request.messages)[-1] for request in self.model.chats]

    def history(self) -> list[str]:
        """All that was said, as the last request to the model holds it."""
        messages = self.model.chats[-1].messages
        return [m["content"] for m in messages if m["role"] in ("user", "assistant")]


def questions(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def words(body: dict) -> str:
    """What a person said last, without the name that stands before it in a group."""
    return re.sub(r"^\[[^]]*\] ", "", questions(body["messages"])[-1])


def brain(body: dict):
    """Answers everything; fails or calls bash when it is told so."""
    said = words(body)
    if said.startswith("fail"):
        return Error(422)
    if said.startswith("bash") and body["messages"][-1]["role"] != "tool":
        return ToolCalls([("bash", {"command": f"echo {said} >> ran.txt"})])
    return Text(f"heard {said}")


@pytest.fixture
def telegram() -> Iterator[FakeTelegram]:
    with FakeTelegram("123456:secret-token") as server:
        yield server


@pytest.fixture
def post(section, workspace: Path, fake_model: FakeModel, telegram: FakeTelegram) -> Post:
    return Post(section, workspace, fake_model, telegram)


def drawn(screen: harness.Screen, ending: str, timeout: float = 10) -> None:
    """Wait until what a person sees ends so."""
    deadline = time.monotonic() + timeout
    while not screen.paper.rstrip().endswith(ending.rstrip()):
        left = deadline - time.monotonic()
        assert left > 0 and not screen.ended, f"no {ending!r} at the end of:\n{screen.paper}"
        screen.wait_change(len(screen.raw), min(left, 0.1))


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


# --- each message once ---


@since("s04")
@pytest.mark.costly(last=True)
def test_a_burst_is_answered_once_and_in_order(post: Post):
    chats = [42, 43, 44, 45, 46]
    said = [(chats[number % 5], f"message {number}") for number in range(200)]
    first = [post.telegram.say(text, chat) for chat, text in said[:120]]
    with post.screen(TELEGRAM_ALLOWED_CHATS="42,43 44\t45, 46"):
        post.wait(20)
        more = [post.telegram.say(text, chat) for chat, text in said[120:]]
        for update in (*first[:40:9], *more[::30]):
            post.telegram.redeliver(update)
        post.telegram.redeliver(first[3], same_id=True)
        for chat in chats:
            post.wait(40, chat, 40)
        assert post.ask("the last").text == "heard the last"
        post.confirmed()
    for chat in chats:
        expected = [f"heard {text}" for to, text in said if to == chat]
        assert post.told(chat) == expected + ["heard the last"] * (chat == 42)
    calls = len(post.questions)
    for run in ("second", "third"):
        with post.screen():
            for update in (first[0], first[7], more[-1]):
                post.telegram.redeliver(update)
                post.telegram.redeliver(update, same_id=True)
            assert post.ask(f"{run} run").text == f"heard {run} run"
    assert post.questions[calls:] == ["second run", "third run"]
    assert len([sent for sent in post.telegram.sent if "message" in sent.text]) == 200


@since("s04")
def test_an_answer_does_not_wait_for_the_next_poll(post: Post):
    post.telegram.poll_cap = 30
    with post.screen():
        post.ask("one")
        began = time.monotonic()
        post.ask("two")
        assert time.monotonic() - began < 2


LONG = "".join(f"{number:05d} " for number in range(2000))  # 12,000 characters


@since("s04")
@pytest.mark.costly
def test_albums_and_pastes_are_one_message_each(post: Post):
    with post.screen():
        threading.Thread(target=post.telegram.album, args=["my cats"], kwargs={"gap": 0.2}).start()
        post.wait(1)
        assert "my cats" in post.questions[0] and "5" in post.questions[0]
        threading.Thread(target=post.telegram.paste, args=[LONG], kwargs={"gap": 0.3}).start()
        post.telegram.until(lambda: len(post.questions) >= 2)
        post.telegram.album("only seen, no mention", chat_id=GROUP)
        post.telegram.album("@tutor_bot look", chat_id=GROUP, count=2)
        post.wait(1, GROUP)
        post.ask("one"), post.ask("two")
    assert post.questions[1] == LONG.strip()
    assert post.questions[2].startswith("[User 7] look")
    assert post.questions[3:] == ["one", "two"]


@since("s04")
@pytest.mark.costly
def test_albums_and_pastes_across_two_batches(post: Post):
    """Telegram gives at most 100 updates at a time."""
    fill(post, 97)
    post.telegram.album("my cats")
    fill(post, 94)
    post.telegram.paste(LONG, chat_id=43)
    with post.screen():
        post.wait(1), post.wait(1, 43)
        assert post.ask("the last").text == "heard the last"
        post.confirmed()
    cats, paste, last = post.questions
    assert "my cats" in cats and "5" in cats and paste == LONG.strip()


@since("s04")
@pytest.mark.parametrize("kind", ["album", "paste"])
@pytest.mark.costly
def test_parts_with_others_between_them_across_two_batches(post: Post, kind: str):
    fill(post, 97)
    for number in range(3):
        if kind == "album":
            more = {"media_group_id": "1", "photo": photo(str(number))}
            post.telegram.say(None, caption="" if number else "my cats", **more)
        else:
            start = 4096 * number
            post.telegram.say(LONG[start : start + 4096], 42, message_id=9000 + number)
        post.telegram.say(f"between {number}", 43)
    with post.screen():
        post.wait(1), post.wait(3, 43)
        assert post.ask("the last").text == "heard the last"
    (whole,) = [asked for asked in post.questions[:-1] if "between" not in asked]
    assert whole == LONG.strip() if kind == "paste" else "my cats" in whole and "3" in whole


@since("s04")
def test_the_order_in_a_chat_holds_across_two_batches(post: Post):
    fill(post, 97)
    post.telegram.album("my cats", count=2)
    post.telegram.say("what are they called?")
    with post.screen():
        post.wait(2)
        post.confirmed()
    assert ["my cats" in asked for asked in post.questions] == [True, False]


def fill(post: Post, count: int) -> None:
    """Updates that nobody answers."""
    for number in range(count):
        post.telegram.group_say(f"idle talk {number}", GROUP)


# --- who is answered, and where ---


@since("s04")
def test_groups_and_topics(post: Post):
    telegram = post.telegram
    text_mention = {"type": "text_mention", "offset": 0, "length": 5, "user": telegram.bot}
    with post.screen():
        for text, more in (
            ("idle talk", {}),
            ("@somebody idle talk", {}),
            ("@tutor_bot2 idle talk", {}),
            ("/start@other_bot idle talk", {}),
            ("write to me@tutor_bot.example idle talk", {}),
            ("idle talk in a topic", {"topic": 9, "chat_id": FORUM}),
        ):
            telegram.group_say(text, **more)
        assert post.ask("@Tutor_Bot ask one", GROUP).text == "heard ask one"
        assert post.ask("ask @tutor_bot two", GROUP).text == "heard ask  two"
        assert "three" in post.ask("Tutor three", GROUP, entities=[text_mention]).text
        assert post.ask("four", GROUP, reply_to_bot=True).text == "heard four"
        assert post.ask("/ask@tutor_bot five", GROUP).text == "heard /ask five"
        assert post.ask("six", -300, mention=True).text == "heard six"
        assert post.ask("seven", FORUM, mention=True, topic=9).thread_id == 9
        assert post.ask("eight", FORUM, mention=True, forum=True).thread_id is None
        assert post.ask("nine", FORUM, reply_to_bot=True, topic=9).thread_id == 9
        assert post.history() == ["[User 7] seven", "heard seven", "[User 7] nine"]
        assert post.ask("ten", FORUM, mention=True, topic=11).thread_id == 11
        assert post.history() == ["[User 7] ten"]
        telegram.anonymous("eleven", mention=True, stand_in=True)
        assert post.wait(6, GROUP)[-1].text == "heard eleven"
        post.confirmed()
    assert not [asked for asked in post.questions if "idle" in asked]
    assert not [asked for asked in post.questions if "@" in asked]
    assert {(a.chat_id, a.thread_id) for a in telegram.actions} >= {(FORUM, 9), (FORUM, 11)}


@since("s04")
def test_each_chat_topic_and_account_has_its_own_history(post: Post):
    with FakeTelegram("654321:other-token", "work_bot") as work:
        settings = {
            "TELEGRAM_BOT_TOKEN_WORK": work.token,
            "TELEGRAM_BASE_URL_WORK": work.url,
            "TELEGRAM_ALLOWED_CHATS_WORK": "42",
        }
        for restart in (False, True):
            with post.screen(**settings) as screen:
                post.ask(f"private {restart}")
                assert len(post.history()) == 1 + 2 * restart
                post.ask(f"other {restart}", 43)
                assert len(post.history()) == 1 + 2 * restart
                post.ask(f"group {restart}", GROUP, user=42, mention=True)
                assert len(post.history()) == 1 + 2 * restart
                post.ask(f"topic {restart}", FORUM, user=42, mention=True, topic=9)
                assert len(post.history()) == 1 + 2 * restart
                work.say(f"work {restart}", 42)
                work.say("a stranger at work", 43)
                work.wait_sent(1 + restart)
                assert len(post.history()) == 1 + 2 * restart
                post.turn(screen, f"terminal {restart}")
                assert len(post.history()) == 1 + 2 * restart
        assert (work.problems, len(work.sent)) == ([], 2)
        assert "other-token" not in screen.raw
    assert "stranger" not in str(post.questions)


@pytest.mark.guard
@since("s04")
def test_strangers(post: Post):
    """Nothing is said to them, and what they are called cannot harm the terminal."""
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m\x9d\u202e\r\b\x00"
    name = {
        "id": 666,
        "is_bot": False,
        "first_name": f"Mal{evil}lory",
        "last_name": "\n\x85forged\u2028",
    }
    with post.screen() as screen:
        for _ in range(3):
            post.telegram.say(f"let me in {evil}", 666, user=name)
        post.telegram.group_say("me too", -666, mention=True, user=name)
        friend = name | {"id": 42}
        post.ask(f"from a friend {evil} indeed", user=friend)
        screen.wait_for("to Mal")
        post.confirmed()
    for harm in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\x9d", "\u202e", "\x00", "\x08"):
        assert harm not in screen.raw, repr(harm)
    assert len(lines_with(screen.paper, " 666")) == 1, screen.paper
    assert len(lines_with(screen.paper, "-666", "ALLOWED_CHATS")) == 1, screen.paper
    assert len(post.questions) == 1
    assert {sent.chat_id for sent in post.telegram.sent} == {42}
    assert {action.chat_id for action in post.telegram.actions} <= {42}
    assert not re.search(r"^\W*forged", screen.paper, re.M), "a line of the program's own is forged"


@pytest.mark.guard
@since("s04")
def test_nobody_is_allowed_by_default(post: Post):
    with post.screen(TELEGRAM_ALLOWED_CHATS="") as screen:
        post.telegram.say("hello", 42)
        screen.wait_for(" 42")
        post.confirmed()
    assert (post.questions, post.telegram.sent) == ([], [])


@since("s04")
def test_what_is_no_message_of_a_person(post: Post):
    """What is edited, posted in channels, said by bots, done to the group or not known at all."""
    telegram, said = post.telegram, post.telegram.say("first")
    reaction = {"chat": {"id": 42, "type": "private"}, "message_id": 1, "date": 1}
    reaction |= {"old_reaction": [], "new_reaction": [{"type": "emoji", "emoji": "x"}]}
    telegram.edited(said, "first, edited")
    telegram.channel_post("idle")
    for kind in ("new_chat_members", "pinned_message", "delete_chat_photo"):
        telegram.service(kind)
    telegram.from_bot("@tutor_bot idle"), telegram.from_bot("idle", reply_to_bot=True)
    telegram.unknown(), telegram.unknown("message_reaction", **reaction)
    telegram.say(None, 42, unknown_content={"x": 1})
    with post.screen():
        post.wait(1)
        telegram.unknown()
        assert post.ask("second").text == "heard second"
        post.confirmed()
    assert post.questions == ["first", "second"]
    assert post.told(42) == ["heard first", "heard second"] == [sent.text for sent in telegram.sent]


# --- what is sent ---


@since("s04")
def test_long_answers_come_in_pieces(post: Post):
    texts = {
        "words": "".join(f"word{number} " for number in range(2000)),
        "emoji": "\U0001f600" * 9000,
        "chinese": "".join(f"第{number}句话，很长。" for number in range(1500)),
        "mixed": "a\U0001f44d\U0001f3fd 很" * 3000,
    }
    texts = {name: text.strip() for name, text in texts.items()}
    script = [lambda body: Text(texts[words(body)], pieces=[texts[words(body)]])]
    post.model.script("brain", script, repeat=True)
    with post.screen():
        for chat, name in enumerate(texts, 42):
            post.telegram.say(name, min(chat, 44))
        whole = squeezed("".join(texts.values()))
        post.telegram.until(lambda: len(squeezed("".join(all_told(post)))) >= len(whole), 30)
    assert all(squeezed(text) in squeezed("".join(all_told(post))) for text in texts.values())
    assert all(units(sent.text) <= 4000 for sent in post.telegram.sent)
    assert len(post.telegram.sent) <= sum(units(text) // 3000 + 1 for text in texts.values())
    assert all(re.fullmatch(r"(word\d+\s*)+", text) for text in post.told(42)), "cut between words"


def all_told(post: Post) -> list[str]:
    return [text for chat in (42, 43, 44) for text in post.told(chat)]


def units(text: str) -> int:
    """The length of a text in UTF-16."""
    return len(text.encode("utf-16-le")) // 2


def squeezed(text: str) -> str:
    return "".join(text.split())


@since("s04")
@pytest.mark.costly
def test_typing_is_shown_while_the_model_works(post: Post):
    gate = threading.Event()
    post.model.script("brain", [brain, Gate(gate, Text("at last"))])
    with post.screen():
        post.ask("quick")
        post.telegram.say("slow", 43)
        seen = post.telegram.actions
        post.telegram.until(lambda: [a.chat_id for a in seen].count(43) == 2, what="typing again")
        gate.set()
        assert post.wait(1, 43)[0].text == "at last"
    assert [(a.chat_id, a.action) for a in seen] == [(n, "typing") for n in (42, 43, 43)]
    assert 3 < seen[2].at - seen[1].at < 5, "Telegram shows it for five seconds"


@since("s04")
def test_a_failure_of_the_model_is_told(post: Post):
    with post.screen():
        told = post.ask("fail please").text
        assert told.strip() and len(told.splitlines()) == 1 and "sk-test" not in told
        assert post.ask("and now?").text == "heard and now?"
        assert post.history()[-1:] == ["and now?"]
    assert len(post.told(42)) == 2


@since("s04")
def test_commands(post: Post):
    with post.screen() as screen:
        post.ask("one"), post.ask("one", 43)
        assert "session" in post.ask("/new").text
        post.ask("two")
        assert post.history() == ["two"]
        post.ask("two", 43)
        assert post.history() == ["one", "heard one", "two"]
        for text in ("/switch x", "/list", "/help", "/channels", "/accounts", "/nope"):
            assert post.ask(text).text == f"heard {text}"
        assert len(post.history()) == 13
        post.ask("one", GROUP, mention=True)
        assert "session" in post.ask("/new@tutor_bot", GROUP).text
        post.ask("two", GROUP, mention=True)
        assert len(post.history()) == 1
        post.turn(screen, "three")
        assert post.history() == ["three"]
    with post.screen():
        post.ask("three")
        assert post.history()[0] == "two", "the new session is the one that a restart resumes"


@pytest.mark.guard
@since("s04")
@pytest.mark.parametrize("approval", ["", "ask", "always"])
def test_bash_is_for_the_terminal(post: Post, approval: str):
    """Whoever is not at the terminal gets a clear refusal, whatever was allowed there."""
    ran = post.workspace / "ran.txt"
    with post.screen(APPROVAL=approval) as screen:
        screen.type("bash terminal\n")
        if approval != "always":
            screen.wait_for("run it?")
            screen.type("a\n")
        screen.wait_for("heard bash terminal")
        post.ask("bash telegram")
    (result,) = [m for m in post.model.chats[-1].messages if m["role"] == "tool"]
    if approval == "always":
        assert ran.read_text().split() == ["bash", "terminal", "bash", "telegram"]
    else:
        assert ran.read_text().split() == ["bash", "terminal"]
        assert result["content"].startswith("error") and "not allowed" in result["content"]
        assert screen.text.count("run it?") == 1


# --- what goes wrong at Telegram ---


@since("s04")
def test_a_user_who_has_blocked_the_bot(post: Post):
    post.telegram.know(42)
    post.telegram.block(42)
    with post.screen() as screen:
        post.telegram.say("hello", 42)
        assert post.ask("hello", 43).text == "heard hello"
        assert post.ask("again", 43).text == "heard again"
        screen.wait_for(re.compile("Forbidden|blocked"))
    assert len(lines_with(screen.paper, "blocked")) == 1
    with post.screen():
        post.ask("restarted", 43)
    assert [params["chat_id"] for params in post.called("sendMessage")].count(42) == 1


@since("s04")
@pytest.mark.costly
def test_flood_control_is_waited_out(post: Post):
    post.telegram.flood(42, seconds=2)
    with post.screen():
        began = time.monotonic()
        post.telegram.say("flooded", 42)
        post.telegram.until(lambda: len(post.called("sendMessage")) == 1)
        post.telegram.say("other", 43)
        post.model.wait(2, 1.5)  # a turn waits for nobody's flood
        assert post.wait(1, 42)[0].at - began >= 2
        assert post.wait(1, 43)[0].text == "heard other"
    assert len(post.telegram.sent) == 2


@since("s04")
@pytest.mark.costly
def test_two_processes_with_one_bot(post: Post):
    post.telegram.fail("getUpdates", 409, CONFLICT, times=2)
    with post.screen() as screen:
        began = time.monotonic()
        screen.wait_for(re.compile(r"\[telegram default\].*409"))
        assert post.ask("hello").text == "heard hello"
        assert time.monotonic() - began > 1, "it does not try again at once"
        screen.wait_for("on, as @tutor_bot")
    assert len(lines_with(screen.paper, "(409)")) == 1


@since("s04")
@pytest.mark.costly(last=True)
def test_errors_that_pass(post: Post):
    """What the network and Telegram's front end do: nothing is lost and nothing is said twice."""
    telegram = post.telegram
    telegram.fail("getMe", 502, BAD_GATEWAY)
    with post.screen() as screen:
        for text, on_poll in (("one", "drop"), ("two", 502), ("three", 200)):
            if on_poll == "drop":
                telegram.drop("getUpdates")
                telegram.drop("sendMessage")
            else:
                telegram.fail("getUpdates", on_poll, BAD_GATEWAY)
                telegram.fail("sendMessage", 502, BAD_GATEWAY)
            telegram.fail("sendChatAction", 502, BAD_GATEWAY)
            assert post.ask(text).text == f"heard {text}"
        telegram.migrate(-300, -100300)
        telegram.group_say("four", -300, mention=True)
        assert post.wait(1, -100300)[0].text == "heard four"
        screen.type("/channels\n")
        screen.wait_for("telegram default: on")
    assert len(post.questions) == len(telegram.sent) == 4
    assert len(lines_with(screen.paper, "no contact")) <= 4


@since("s04", until="s07")
def test_an_outage(post: Post):
    """Connections end, then none is taken; what was said before and meanwhile is answered once."""
    telegram, gate = post.telegram, threading.Event()
    post.model.script("brain", [brain, Gate(gate, Text("heard two")), brain], repeat=True)
    with post.screen() as screen:
        telegram.say("one"), post.wait(1)
        telegram.say("two"), post.model.wait(2)
        telegram.say("three", 43)
        post.confirmed()
        telegram.down()
        gate.set()
        polls = len(telegram.calls)
        telegram.say("four"), telegram.say("five", 44)
        screen.wait_for("no contact")
        post.turn(screen, "the terminal goes on")
        time.sleep(0.5)
        assert len(telegram.calls) - polls < 8, "it does not try again at once"
        telegram.down(port=True)
        time.sleep(0.5)
        telegram.up()
        post.wait(3, 42), post.wait(1, 43), post.wait(1, 44)
        post.ask("six")
    assert post.told(42) == ["heard one", "heard two", "heard four", "heard six"]
    assert post.told(43) == ["heard three"] and post.told(44) == ["heard five"]


@since("s04")
@pytest.mark.parametrize("token", ["123456:wrong-secret-token", "secret-token"])
def test_a_bad_token(post: Post, token: str):
    """It is told in one line, and the rest goes on; so does another account."""
    with FakeTelegram("654321:other-token", "work_bot") as work:
        settings = {"TELEGRAM_BOT_TOKEN_WORK": work.token, "TELEGRAM_BASE_URL_WORK": work.url}
        settings |= {"TELEGRAM_ALLOWED_CHATS_WORK": "42", "TELEGRAM_BOT_TOKEN": token}
        with post.screen(polls=False, **settings) as screen:
            work.say("hello", 42)
            assert work.wait_sent(1)[0].text == "heard hello"
            post.turn(screen, "are you there?")
            screen.type("/channels\n")
            screen.wait_for(re.compile("telegram default: off.*token"))
    assert len(lines_with(screen.paper, "[telegram default]")) == 1
    assert len(post.telegram.calls) <= 2


# --- kill -9 ---


@since("s04")
@pytest.mark.parametrize("moment", ["model", "tool", "send"])
def test_killed_in_the_middle_of_a_turn(post: Post, moment: str):
    """The turn is resumed: nothing is asked, run or answered twice."""
    telegram, gates = post.telegram, [threading.Event(), threading.Event()]
    question, steps = ("bash two", [brain]) if moment == "tool" else ("two", [])
    if moment == "send":
        telegram.hang("sendMessage", 0)
        telegram.hang("sendMessage", 30)
    else:
        steps.append(Gate(gates[0]))
    post.model.script("brain", [brain, *steps, Gate(gates[1], Text("at last"))])
    with post.screen(APPROVAL="always") as screen:
        post.ask("one")  # and it is on disk that this one is answered and sent
        telegram.until(lambda: inbox_is_empty(post.workspace) and not pending(post.workspace))
        telegram.say(question)
        if moment == "send":
            gates[1].set()
            telegram.until(lambda: len(post.called("sendMessage")) == 2)
        else:
            post.model.wait(1 + len(steps))
        post.confirmed()
        screen.kill()
    asked, typed = len(post.questions), len(telegram.actions)
    with post.screen(APPROVAL="always"):
        if moment != "send":
            telegram.until(lambda: len(telegram.actions) > typed, what="typing")
            gates[1].set()
        assert post.wait(2)[1].text == "at last"
    gates[0].set()
    assert len(post.questions) == asked + (moment != "send")
    assert questions(post.model.chats[-1].messages) == ["one", question]
    assert post.told(42) == ["heard one", "at last"]
    if moment == "tool":
        assert (post.workspace / "ran.txt").read_text() == "bash two\n"


@pytest.mark.guard
@since("s04")
def test_killed_with_answers_that_wait_to_be_sent(post: Post):
    post.telegram.hang("sendMessage", 30)
    with post.screen() as screen:
        for number in range(3):
            post.telegram.say(f"message {number}")
        screen.wait_for("heard message 2")
        screen.kill()
    with post.screen():
        assert [sent.text for sent in post.wait(3)] == [f"heard message {n}" for n in range(3)]
        post.ask("the last")
    assert [*post.questions[:3], "the last"] == post.questions


@since("s04", until="s04")
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.costly
def test_killed_at_any_moment_25_times(post: Post, seed: int):
    """No message is lost, each is answered, and none stands in a history twice."""
    rng, telegram = random.Random(seed), post.telegram
    post.model.script("brain", [slowly], repeat=True)
    said: dict[int, list[str]] = {42: [], 43: [], 44: []}
    for number in range(25):
        before = len(telegram.calls)
        with harness.Screen(post.section, post.env()) as screen:
            chat = rng.choice([42, 43, 44])
            said[chat].append(f"message {number}")
            telegram.say(said[chat][-1], chat)
            if rng.random() < 0.8:
                polled = lambda before=before: post.called("getUpdates", before)  # noqa: E731
                telegram.until(polled, what="a poll")
                time.sleep(rng.uniform(0, 0.25))
            else:
                time.sleep(rng.uniform(0, 0.4))
            screen.kill()
        assert "Traceback" not in screen.raw, screen.text
    # One that is killed before the body of its request is out has asked nothing.
    with post.screen():
        for chat, texts in said.items():
            wanted = {f"heard {text}" for text in texts}
            telegram.until(lambda c=chat, w=wanted: w <= set(post.told(c)), 30, f"all to {chat}")
            post.ask("the last", chat)
            assert questions(post.model.chats[-1].messages) == [*texts, "the last"]
    for file in (post.workspace / ".sessions").rglob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        asked = questions([r["message"] for r in records if r["type"] == "message"])
        assert len(asked) == len(set(asked))


def slowly(body: dict) -> Stall:
    return Stall(1, 0.03, Stall(2, 0.03, Text(f"heard {words(body)}")))


# --- what an earlier run has left ---


def leave(post: Post, *more: dict) -> None:
    """An inbox with a message of 42 that is not answered yet."""
    about = {"channel": "telegram", "account": "default", "peer": "42", "kind": "direct"}
    message = about | {"text": "left over", "ids": ["telegram:1:42:7"], "sender": "Ada"}
    records = [{"type": "message", "message": message}, *more]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (post.workspace / ".inbox.jsonl").write_text(text, encoding="utf-8")
    post.telegram.know(42)


@pytest.mark.guard
@since("s04")
def test_who_is_no_longer_allowed_waits(post: Post):
    leave(post)
    with post.screen(TELEGRAM_ALLOWED_CHATS="43"):
        post.ask("hello", 43)
    assert post.questions == ["hello"] and post.told(42) == []
    with post.screen():
        assert post.wait(1)[0].text == "heard left over"


@since("s04")
def test_a_refused_token_loses_no_answer(post: Post):
    leave(post, {"type": "answer", "id": "telegram:1:42:7", "text": "the late answer"})
    again = "trying again"
    with post.screen(polls=False, TELEGRAM_BOT_TOKEN="123456:mistyped") as screen:
        screen.wait_for(re.compile(rf"{again}[\s\S]*{again}"))  # the poll, and what is to be sent
        screen.kill()
    with post.screen():
        assert post.wait(1)[0].text == "the late answer"
    assert post.questions == []


@since("s04")
def test_what_the_inbox_cannot_read_is_set_aside(post: Post):
    leave(post, {"type": "message", "message": {"ids": ["x"], "mood": "unheard of"}})
    with post.screen() as screen:
        assert post.wait(1)[0].text == "heard left over"
        assert ".inbox.jsonl.damaged" in screen.text
    assert "unheard of" in (post.workspace / ".inbox.jsonl.damaged").read_text(encoding="utf-8")


@since("s04")
def test_a_quit_waits_for_no_thread(post: Post):
    """Strangers write while the program ends: each is told at the terminal, by a thread."""
    for number in range(5):
        with post.screen() as screen:
            for stranger in range(30):
                post.telegram.say("let me in", 1000 + 30 * number + stranger)
            screen.press("ctrl-d")
            assert screen.wait_exit(3) == 0
