"""The stand-in for Telegram itself, seen through the client library that the sections
use.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_telegram import FakeTelegram
from telegram import Bot
from telegram.error import BadRequest
from telegram.error import ChatMigrated
from telegram.error import Conflict
from telegram.error import Forbidden
from telegram.error import InvalidToken
from telegram.error import NetworkError
from telegram.error import RetryAfter
from telegram.error import TimedOut
from telegram.request import HTTPXRequest


@pytest.fixture
def server() -> Iterator[FakeTelegram]:
    with FakeTelegram() as server:
        yield server


def client(server: FakeTelegram, token: str = "") -> Bot:
    """A bot of this server; without certificates, which take most of the time to set
    one up.
    """
    requests = [HTTPXRequest(httpx_kwargs={"verify": False}) for _ in range(2)]
    return Bot(token or server.token, f"{server.url}/bot", "", *requests)


def use(
    server: FakeTelegram, task: Callable[[Bot], Awaitable[Any]], token: str = ""
) -> Any:
    """Run a task with a bot of its own."""

    async def main() -> Any:
        async with client(server, token) as bot:
            return await task(bot)

    return asyncio.run(main())


def poll(server: FakeTelegram, **params: Any) -> list:
    """The messages of one poll, or whatever else the updates hold."""
    updates = use(server, lambda bot: bot.get_updates(**params))
    return [update.effective_message or update for update in updates]


def send(server: FakeTelegram, text: str, chat_id: int = 42, **more: Any) -> Any:
    return use(server, lambda bot: bot.send_message(chat_id, text, **more))


def polls_of(server: FakeTelegram) -> int:
    return [method for method, _ in server.calls].count("getUpdates")


async def polls(server: FakeTelegram, count: int) -> None:
    """Wait until so many polls have come in."""
    await asyncio.to_thread(server.until, lambda: polls_of(server) >= count)


async def back_again(bot: Bot) -> tuple:
    """The updates, as soon as the server is there again."""
    while True:
        try:
            return await bot.get_updates()
        except NetworkError:
            await asyncio.sleep(0.02)


def test_get_me_and_tokens(server: FakeTelegram):
    me = use(server, lambda bot: bot.get_me())
    assert (me.id, me.username, me.is_bot) == (server.bot_id, server.bot_username, True)
    for token, status in (("1:wrong", 401), ("abc", 404)):
        answer = httpx.get(f"{server.url}/bot{token}/getMe")
        assert (answer.status_code, answer.json()["error_code"]) == (status, status)
    with pytest.raises(InvalidToken):
        use(server, lambda bot: bot.get_me(), token="1:wrong")
    assert not server.problems
    with pytest.raises(InvalidToken):
        use(server, lambda bot: bot.log_out())
    assert server.problems == ["logOut: Not Found"]


def test_offsets(server: FakeTelegram):
    ids = [server.say(text) for text in ("one", "two", "three", "four")]
    assert [m.text for m in poll(server)] == [
        m.text for m in poll(server, offset=ids[0])
    ]
    assert [m.text for m in poll(server, offset=ids[1], limit=2)] == ["two", "three"]
    assert (server.pending(), server.confirmed) == (3, ids[:1])
    assert [m.text for m in poll(server)] == ["two", "three", "four"]
    assert [m.text for m in poll(server, offset=-1)] == ["four"]
    assert poll(server, offset=ids[3] + 1) == []
    assert (server.pending(), server.confirmed, server.problems) == (0, ids, [])
    late = server.say("five")
    poll(server, offset=late + 1)
    assert "never been given" in server.problems[0]


def test_redelivery(server: FakeTelegram):
    first = server.say("one")
    assert poll(server, offset=first) and poll(server, offset=first + 1) == []
    server.redeliver(first, same_id=True)
    second = server.redeliver(first)
    updates = use(server, lambda bot: bot.get_updates(offset=first + 1))
    assert [update.update_id for update in updates] == [first, second]
    assert len({update.message.message_id for update in updates}) == 1


def test_a_long_poll_waits_and_wakes(server: FakeTelegram):
    server.poll_cap = 0.2
    began = time.monotonic()
    assert poll(server, timeout=30) == []
    assert 0.2 <= time.monotonic() - began < 10
    server.poll_cap = 30
    threading.Timer(0.1, server.say, ["hello"]).start()
    assert [m.text for m in poll(server, timeout=30)] == ["hello"]
    assert server.calls[-1] == ("getUpdates", {"timeout": 30})


def test_the_older_of_two_polls_ends(server: FakeTelegram):
    async def two(bot: Bot) -> None:
        async with client(server) as other:
            before = polls_of(server)
            older = asyncio.create_task(bot.get_updates(timeout=30))
            await polls(server, before + 1)
            assert await other.get_updates() == ()
            with pytest.raises(Conflict, match="only one bot instance"):
                await older

    async def given_up(bot: Bot) -> None:
        before = polls_of(server)
        poll = asyncio.create_task(bot.get_updates(timeout=30))
        await polls(server, before + 1)
        poll.cancel()
        await asyncio.wait([poll])
        await bot.get_updates()

    use(server, given_up)
    assert server.conflicts == 0
    use(server, two)
    assert (server.conflicts, server.problems) == (1, ["getUpdates: two polls at once"])


def test_allowed_updates_last(server: FakeTelegram):
    said = server.say("hi")
    assert server.push("message_reaction", {}) == 0
    poll(server, allowed_updates=["message"])
    assert server.edited(said, "ho") == 0
    assert server.channel_post("news") == 0
    poll(server, allowed_updates=[])
    server.edited(said, "ho")
    server.channel_post("news")
    server.unknown()
    first, edited, post, unknown = poll(server, offset=said)
    assert (edited.text, edited.message_id) == ("ho", first.message_id)
    assert (post.from_user, post.sender_chat.type) == (None, "channel")
    assert unknown.api_kwargs == {"future_kind": {"id": "1"}}


def test_what_send_message_takes(server: FakeTelegram):
    with pytest.raises(BadRequest, match="Chat not found"):
        send(server, "hi")
    server.know(42)
    assert not server.problems
    face = "\U0001f600"
    assert send(server, face * 4096).text == face * 4096
    for text, complaint in ((" \n", "text is empty"), (face * 4097, "is too long")):
        with pytest.raises(BadRequest, match=complaint):
            send(server, text)
        assert complaint in server.problems.pop()
    send(server, "a", parse_mode="HTML", api_kwargs={"colour": "red"})
    assert "colour" in server.problems[0] and "parse_mode" in server.problems[1]
    with pytest.raises(BadRequest, match="replied not found"):
        send(server, "hi", reply_to_message_id=12345)
    send(server, "hi", reply_to_message_id=server.sent[0].message_id)
    assert [sent.text for sent in server.wait_sent(3)] == [face * 4096, "a", "hi"]


def test_chats_that_move_and_chats_that_block(server: FakeTelegram):
    server.say("hi", chat_id=-5)
    server.migrate(-5, -1005)
    with pytest.raises(ChatMigrated) as caught:
        send(server, "hi", -5)
    send(server, "hi", caught.value.new_chat_id)
    server.say("hi")
    server.block(42)
    with pytest.raises(Forbidden, match="blocked by the user"):
        send(server, "hi")
    assert [sent.chat_id for sent in server.sent] == [-1005]


def test_topics(server: FakeTelegram):
    server.group_say("in a topic", topic=9)
    server.group_say("in General", forum=True, reply_to_bot=True)
    topic, general = poll(server)
    assert (topic.message_thread_id, topic.is_topic_message, topic.chat.is_forum) == (
        9,
        True,
        True,
    )
    assert topic.reply_to_message.forum_topic_created
    assert not general.is_topic_message
    assert general.message_thread_id == general.reply_to_message.message_id
    send(server, "hi", -100123, message_thread_id=9)
    for thread in (1, 8, general.message_thread_id):
        with pytest.raises(BadRequest, match="thread not found"):
            send(server, "hi", -100123, message_thread_id=thread)
    use(
        server, lambda bot: bot.send_chat_action(-100123, "typing", message_thread_id=1)
    )
    assert [sent.thread_id for sent in server.sent_to(-100123)] == [9]
    assert [(action.action, action.thread_id) for action in server.actions] == [
        ("typing", 1)
    ]


def test_mentions_and_senders(server: FakeTelegram):
    server.group_say("\U0001f600 @tutor_bot /new@tutor_bot a@b.com", user=5)
    server.group_say("hello", mention=True)
    server.group_say("thanks", reply_to_bot=True)
    server.anonymous("secret")
    server.from_bot("beep")
    server.service()
    spoken, greeting, reply, anonymous, bot, joined = poll(server)
    assert list(spoken.parse_entities().values()) == ["@tutor_bot", "/new@tutor_bot"]
    assert spoken.from_user.id == 5
    assert list(greeting.parse_entities(["mention"]).values()) == ["@tutor_bot"]
    assert (
        reply.reply_to_message.from_user.id == server.bot_id
        and not reply.is_topic_message
    )
    assert anonymous.from_user is None and anonymous.sender_chat.id == -100123
    assert bot.from_user.is_bot and joined.new_chat_members and joined.text is None


def test_albums_and_pastes(server: FakeTelegram):
    server.album("@tutor_bot look", count=3)
    server.paste("x" * 5000)
    *album, first, second = poll(server)
    assert len(album) == 3 and len({m.media_group_id for m in album}) == 1
    assert [m.caption for m in album] == ["@tutor_bot look", None, None]
    assert album[0].caption_entities and all(m.photo and m.text is None for m in album)
    assert [len(first.text), len(second.text)] == [4096, 904]
    assert second.message_id == first.message_id + 1


def test_flood_control(server: FakeTelegram, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PTB_TIMEDELTA", "1")

    async def hurry(bot: Bot) -> None:
        for early in (False, True):
            with pytest.raises(RetryAfter) as caught:
                await bot.send_message(42, "hi")
            assert caught.value.retry_after.total_seconds() == 1
            assert bool(server.problems) == early
        await bot.send_message(43, "hi")
        await asyncio.sleep(1)
        await bot.send_message(42, "hi")

    server.know(42)
    server.know(43)
    server.flood(42, seconds=1)
    use(server, hurry)
    assert [sent.chat_id for sent in server.sent] == [43, 42]
    assert len(server.problems) == 1


def test_faults(server: FakeTelegram):
    async def suffer(bot: Bot) -> None:
        for number in range(5):
            with pytest.raises(TimedOut if number > 2 else NetworkError):
                await bot.send_message(42, str(number), read_timeout=0.3)

    server.know(42)
    server.fail(
        "sendMessage", 502, {"ok": False, "description": "Bad Gateway"}, after=True
    )
    server.drop("sendMessage")
    server.drop("sendMessage", after=True)
    server.hang("sendMessage", 0.8)
    server.hang("sendMessage", 0.8, after=True)
    use(server, suffer)
    time.sleep(0.8)
    assert send(server, "5").text == "5"
    assert [sent.text for sent in server.sent] == ["0", "2", "4", "5"]
    server.fail("*", 429, "<html>slow down</html>", headers={"Retry-After": "7"})
    answer = httpx.get(f"{server.url}/bot{server.token}/getMe")
    assert (answer.headers["retry-after"], answer.headers["content-type"]) == (
        "7",
        "text/html",
    )


def test_late_answers_that_wait_for_something(server: FakeTelegram):
    async def two_at_once(bot: Bot) -> None:
        both = [bot.send_message(42, text, read_timeout=20) for text in ("a", "b")]
        await asyncio.gather(*both)

    server.know(42)
    both_are_there = lambda: len(server.calls) >= 2  # noqa: E731
    server.hang("sendMessage", 60, times=2, until=both_are_there)
    use(server, two_at_once)
    assert len(server.sent) == 2


@pytest.mark.parametrize("port", [False, True])
def test_outages(server: FakeTelegram, port: bool):
    async def through(bot: Bot) -> None:
        waiting = asyncio.create_task(bot.get_updates(timeout=30))
        await polls(server, 1)
        server.outage(0.5, port)
        server.say("hi")
        for attempt in (waiting, bot.get_updates()):
            with pytest.raises(NetworkError):
                await attempt
        assert [update.message.text for update in await back_again(bot)] == ["hi"]

    server.poll_cap = 30
    use(server, through)
    assert not server.problems


def test_close_does_not_wait(server: FakeTelegram, capfd: pytest.CaptureFixture[str]):
    server.poll_cap = 30
    url = f"{server.url}/bot{server.token}/getUpdates?timeout=30"
    failures: list[Exception] = []

    def wait() -> None:
        try:
            httpx.get(url, timeout=30)
        except httpx.TransportError as error:
            failures.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    server.until(lambda: server.calls)
    began = time.monotonic()
    server.close()
    thread.join(5)
    assert time.monotonic() - began < 5 and failures
    assert capfd.readouterr() == ("", "")
