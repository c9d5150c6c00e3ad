"""A strict stand-in for Telegram's Bot API server, on a loopback port.

A test plays the people (`say`, `group_say`, `album`, ...) and the accidents (`fail`,
`drop`, `flood`, ...); the bot under test polls and sends as it would in earnest. What
comes of it is in `sent`, `actions`, `calls` and `confirmed`; what no bot should do is
in `problems`.

To play the people yourself, at a terminal: python tests/fake_telegram.py
"""

import argparse
import itertools
import json
import math
import re
import select
import socket
import sys
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

TEXT_LIMIT = 4096  # code points; only the offsets of entities count in UTF-16
BLANK = re.compile(r"[\s\u180e\u200b-\u200f\u202e\u2060\u2800\ufeff\ufffc]*")
ENTITY = re.compile(
    r"(?P<mention>(?<!\w)@[A-Za-z0-9_]{2,32}\b)"
    r"|(?P<bot_command>(?<![\w/<>])/[A-Za-z0-9_]{1,64}(?:@[A-Za-z0-9_]{3,32})?(?![\w/<>]))"
)
WORD = re.compile(r"\w+")
PARAMETERS = {
    "deleteWebhook": "drop_pending_updates",
    "getMe": "",
    "getUpdates": "offset limit timeout allowed_updates",
    "sendChatAction": "business_connection_id chat_id message_thread_id action",
    "sendMessage": "chat_id text message_thread_id parse_mode entities"
    " link_preview_options "
    "disable_notification protect_content reply_parameters reply_markup"
    " business_connection_id "
    "allow_paid_broadcast message_effect_id direct_messages_topic_id"
    " suggested_post_parameters",
}
NAMES = {name.lower(): name for name in PARAMETERS}  # the server ignores the case
ACTIONS = (
    "typing upload_photo record_video upload_video record_voice upload_voice"
    " upload_document "
    "choose_sticker find_location record_video_note upload_video_note"
)
NOT_BY_DEFAULT = {"chat_member", "message_reaction", "message_reaction_count"}
CONFLICT = (
    "Conflict: terminated by other getUpdates request; "
    "make sure that only one bot instance is running"
)
MIGRATED = "Bad Request: group chat was upgraded to a supergroup chat"

Reply = tuple[int, Any, Mapping[str, str]]
Person = int | dict | None


@dataclass
class Sent:
    """A message of the bot that has gone through; `at` is on the monotonic clock."""

    chat_id: int
    text: str
    thread_id: int | None
    at: float
    message_id: int


@dataclass
class Action:
    """A chat action of the bot, such as "typing"."""

    chat_id: int
    action: str
    thread_id: int | None
    at: float


@dataclass
class Fault:
    """What goes wrong the next few times; `how` is fail, drop, hang or flood."""

    method: str
    how: str = ""
    times: int = 1
    after: bool = False
    seconds: float = 0
    reply: Reply | None = None
    chat_id: int | None = None
    until: Callable[[], Any] | None = None


class Refusal(Exception):
    """An error answer; `blame` if only a mistake of the bot leads to it."""

    def __init__(
        self, status: int, description: str, blame: bool = False, **parameters: int
    ):
        super().__init__(description)
        extra = {"parameters": parameters} if parameters else {}
        body = {"ok": False, "error_code": status, "description": description, **extra}
        self.reply: Reply = status, body, {}
        self.blame = blame


class FakeTelegram:
    """The server of one bot, a context manager; the host's side of it is safe from any
    thread.
    """

    def __init__(
        self,
        token: str = "123456:test-token",
        bot_username: str = "tutor_bot",
        port: int = 0,
    ):
        self.token, self.bot_username = token, bot_username
        self.bot_id = int(token.partition(":")[0])
        self.bot = {"id": self.bot_id, "is_bot": True, "first_name": "Tutor"}
        self.bot["username"] = bot_username
        self.poll_cap = 2.0
        self.calls: list[tuple[str, dict]] = []
        self.sent: list[Sent] = []
        self.actions: list[Action] = []
        self.confirmed: list[int] = []
        self.problems: list[str] = []
        self.conflicts = 0
        self._changed = threading.Condition()
        self._update_ids, self._message_ids = (
            itertools.count(700_000_001),
            itertools.count(101),
        )
        self._updates: list[dict] = []  # not confirmed yet
        self._again: list[dict] = []  # to be delivered once more, whatever the offset
        self._history: dict[int, dict] = {}
        self._seen: set[int] = set()
        self._allowed: list[str] = []
        self._poll = 0
        self._chats: dict[int, dict] = {}
        self._topics: dict[int, set[int]] = defaultdict(set)
        self._messages: dict[int, set[int]] = defaultdict(set)
        self._migrated: dict[int, int] = {}
        self._blocked: set[int] = set()
        self._faults: list[Fault] = []
        self._floods: list[Fault] = []
        self._quiet_until: dict[int, float] = {}
        self._serving = self._down = self._closed = False
        self.outages = 0
        self._server = self._bind(port)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    # --- the server's life ---

    def __enter__(self) -> "FakeTelegram":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> "FakeTelegram":
        self.up()
        return self

    def up(self) -> None:
        """Serve, for the first time or again."""
        with self._changed:
            self._down = False
            if not self._serving and not self._closed:
                self._server.server_activate()
                serve = self._server.serve_forever
                threading.Thread(
                    target=serve, kwargs={"poll_interval": 0.02}, daemon=True
                ).start()
                self._serving = True

    def down(self, port: bool = False) -> None:
        """Close every connection, open or new, without an answer; `port`: refuse new
        ones.
        """
        with self._changed:
            self._down = True
            self.outages += 1
            self._changed.notify_all()
            if port and self._serving:
                self._stop()
                self._server = self._bind(self.port)  # ours still, but nobody listens
            self._server.hang_up()

    def outage(self, seconds: float, port: bool = False) -> None:
        """Go down now and come back by itself."""
        self.down(port)
        timer = threading.Timer(seconds, self.up)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        with self._changed:
            self._closed = self._down = True
            self._changed.notify_all()
            self._stop()

    def _bind(self, port: int) -> "Server":
        server = Server(("127.0.0.1", port), Handler, bind_and_activate=False)
        server.fake = self
        server.server_bind()
        return server

    def _stop(self) -> None:
        if self._serving:
            self._server.shutdown()
        self._serving = False
        self._server.server_close()
        self._server.hang_up()

    # --- what a test looks at ---

    def pending(self) -> int:
        """How many updates the bot has not confirmed."""
        with self._changed:
            return len(self._updates)

    def sent_to(self, chat_id: int) -> list[Sent]:
        with self._changed:
            return [sent for sent in self.sent if sent.chat_id == chat_id]

    def until(
        self, condition: Callable[[], Any], timeout: float = 10, what: str = "it"
    ) -> None:
        """Wait until a condition on this server holds."""
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                texts = [sent.text[:80] for sent in self.sent]
                raise AssertionError(
                    f"{what} has not come after {timeout} s; sent: {texts}"
                )

    def wait_sent(self, count: int, timeout: float = 10) -> list[Sent]:
        """Wait until the bot has sent so many messages in all."""
        self.until(lambda: len(self.sent) >= count, timeout, f"message {count}")
        return list(self.sent)

    # --- what people do ---

    def say(
        self,
        text: str | None,
        chat_id: int = 42,
        user: Person = None,
        chat_type: str | None = None,
        **fields: Any,
    ) -> int:
        """A message; more fields of it by name, None leaves one out. The update's id,
        or 0.

        It is 0 for an update that the bot has not asked for and that is never sent,
        here as below.
        """
        with self._changed:
            return self.push(
                "message", self._message(chat_id, user, chat_type, text, **fields)
            )

    def group_say(
        self,
        text: str | None,
        chat_id: int = -100123,
        mention: bool = False,
        reply_to_bot: bool = False,
        topic: int | None = None,
        forum: bool = False,
        **more: Any,
    ) -> int:
        """A message in a group; any @name in the text gets its entity."""
        with self._changed:
            if mention and f"@{self.bot_username}" not in (text or ""):
                text = f"@{self.bot_username} {text or ''}".rstrip()
            fields: dict[str, Any] = {}
            chat = self._learn(
                chat_id, more.get("chat_type"), forum or topic is not None
            )
            # typing in a topic replies to the message that opened it
            if topic is not None:
                opened = {
                    "message_id": topic,
                    "chat": chat,
                    "date": now(),
                    "from": self.bot,
                }
                opened["forum_topic_created"] = {"name": "Topic", "icon_color": 7322096}
                fields = {"message_thread_id": topic, "is_topic_message": True}
                fields["reply_to_message"] = opened
            if reply_to_bot:
                fields["reply_to_message"] = original = self._words_of_bot(
                    chat_id, chat
                )
                if chat["type"] == "supergroup":  # a thread of replies is no topic
                    fields.setdefault("message_thread_id", original["message_id"])
            return self.say(text, chat_id, **fields | more)

    def album(
        self,
        captions: str | Sequence[str] = "",
        count: int = 5,
        gap: float = 0,
        **more: Any,
    ) -> list[int]:
        """Photos sent as one album: an update for each, with a caption on the first or
        on several.

        With a `gap` in seconds they come in one by one, here as in `paste`.
        """
        captions = [captions] if isinstance(captions, str) else list(captions)
        group = str(13_000_000_000 + next(self._message_ids))
        parts = []
        for number in range(count):
            caption = captions[number] if number < len(captions) else None
            parts.append(
                {"caption": caption or None, "photo": photo(f"{group}-{number}")}
            )
        return self._burst(
            [{"text": None, "media_group_id": group, **p} for p in parts], gap, more
        )

    def paste(
        self, text: str, size: int = TEXT_LIMIT, gap: float = 0, **more: Any
    ) -> list[int]:
        """A long text, which Telegram's apps send as several messages."""
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        return self._burst([{"text": piece} for piece in pieces], gap, more)

    def service(
        self,
        kind: str = "new_chat_members",
        value: Any = None,
        chat_id: int = -100123,
        **fields: Any,
    ) -> int:
        """A message without words: somebody has joined, something was pinned."""
        with self._changed:
            chat = self._learn(chat_id)
            pinned = {
                "message_id": 5,
                "date": now(),
                "chat": chat,
                "from": self.bot,
                "text": "x",
            }
            usual = {"new_chat_members": [person(8, chat_id)], "pinned_message": pinned}
            value = usual.get(kind, True) if value is None else value
            return self.say(None, chat_id, **{kind: value}, **fields)

    def channel_post(self, text: str, chat_id: int = -100900, **fields: Any) -> int:
        """A post in a channel: it has no sender, and its update is of another kind."""
        with self._changed:
            chat = self._learn(chat_id, "channel")
            fields = {"from": None, "sender_chat": chat} | fields
            return self.push(
                "channel_post", self._message(chat_id, None, None, text, **fields)
            )

    def anonymous(
        self, text: str, chat_id: int = -100123, stand_in: bool = False, **more: Any
    ) -> int:
        """A message of an anonymous admin; stand_in: with the fake bot that Telegram
        fills in.
        """
        with self._changed:
            bot = {"id": 1087968824, "is_bot": True, "first_name": "Group"}
            bot["username"] = "GroupAnonymousBot"
            fields = {
                "from": bot if stand_in else None,
                "sender_chat": self._learn(chat_id),
            }
            return self.group_say(text, chat_id, **fields | more)

    def from_bot(self, text: str, chat_id: int = -100123, **more: Any) -> int:
        """A message of another bot."""
        other = {
            "id": 99,
            "is_bot": True,
            "first_name": "Other",
            "username": "other_bot",
        }
        return self.group_say(text, chat_id, user=other, **more)

    def edited(self, update_id: int, text: str, **fields: Any) -> int:
        """Somebody changes the text of a message."""
        with self._changed:
            before = self._history[update_id]["message"]
            kept = {key: value for key, value in before.items() if key != "entities"}
            message = kept | with_entities({"text": text, "edit_date": now(), **fields})
            return self.push("edited_message", message)

    def unknown(self, kind: str = "future_kind", **fields: Any) -> int:
        """An update of a kind that nobody knows; it comes whatever the bot has asked
        for.
        """
        return self.push(kind, {"id": "1", **fields}, always=True)

    def redeliver(self, update_id: int, same_id: bool = False) -> int:
        """The same message once more, in an update of its own or in the same one."""
        with self._changed:
            update = self._history[update_id]
            if not same_id:
                kind = next(key for key in update if key != "update_id")
                return self.push(kind, update[kind], always=True)
            self._again.append(update)
            self._changed.notify_all()
            return update_id

    def push(self, kind: str, content: dict, always: bool = False) -> int:
        """Any update; the bot's allowed_updates hold for those that come after its
        poll.
        """
        with self._changed:
            wanted = (
                kind in self._allowed if self._allowed else kind not in NOT_BY_DEFAULT
            )
            if not (wanted or always):
                return 0
            update = {"update_id": next(self._update_ids), kind: content}
            self._updates.append(update)
            self._history[update["update_id"]] = update
            self._changed.notify_all()
            return update["update_id"]

    def know(
        self, chat_id: int, chat_type: str | None = None, topics: Sequence[int] = ()
    ) -> None:
        """A chat, perhaps a forum, that the bot may send to though nobody has written
        in it.
        """
        with self._changed:
            self._learn(chat_id, chat_type, bool(topics))
            self._topics[chat_id].update(topics)

    def block(self, chat_id: int, blocked: bool = True) -> None:
        """The user of this chat does not want the bot's messages, or does again."""
        with self._changed:
            (self._blocked.add if blocked else self._blocked.discard)(chat_id)

    def migrate(self, old: int, new: int) -> None:
        """A group becomes a supergroup."""
        with self._changed:
            self._migrated[old] = new
            self._learn(new, "supergroup")

    def _burst(self, parts: Sequence[dict], gap: float, more: dict) -> list[int]:
        """Messages right behind one another; nothing comes between them unless there is
        a gap.
        """
        with self._changed:
            ids = []
            for number, part in enumerate(parts):
                self._pause(gap if number else 0)
                ids.append(
                    (self.group_say if "topic" in more else self.say)(**part | more)
                )
            return ids

    def _learn(
        self, chat_id: int, chat_type: str | None = None, forum: bool = False
    ) -> dict:
        """The chat as its messages show it; from now on the bot may send to it."""
        if chat_id > 0:
            chat = {"id": chat_id, "type": "private", "first_name": f"User {chat_id}"}
        else:
            guess = "supergroup" if str(chat_id).startswith("-100") else "group"
            chat = {
                "id": chat_id,
                "type": chat_type or guess,
                "title": f"Chat {chat_id}",
            }
        known = self._chats.setdefault(chat_id, chat)
        if forum:
            known["is_forum"] = True
        return dict(known)

    def _message(
        self,
        chat_id: int,
        user: Person,
        chat_type: str | None,
        text: str | None,
        **fields: Any,
    ) -> dict:
        chat = self._learn(chat_id, chat_type)
        if fields.get("is_topic_message"):
            self._topics[chat_id].add(fields["message_thread_id"])
        message = {"message_id": next(self._message_ids), "from": person(user, chat_id)}
        message |= {"chat": chat, "date": now(), "text": text, **fields}
        self._messages[chat_id].add(message["message_id"])
        return with_entities(
            {key: value for key, value in message.items() if value is not None}
        )

    def _words_of_bot(self, chat_id: int, chat: dict) -> dict:
        """The bot's last message in a chat, or one that it has sent before it all
        began.
        """
        sent = self.sent_to(chat_id)
        id = sent[-1].message_id if sent else next(self._message_ids)
        text = sent[-1].text if sent else "what I have said before"
        return {
            "message_id": id,
            "from": self.bot,
            "chat": chat,
            "date": now(),
            "text": text,
        }

    # --- what goes wrong; the method "*" is any ---

    def fail(
        self,
        method: str,
        status: int,
        body: Any,
        times: int = 1,
        headers: Mapping[str, str] | None = None,
        after: bool = False,
    ) -> None:
        """An error answer; `after`: the request is carried out all the same."""
        self._fault(
            Fault(method, "fail", times, after, reply=(status, body, headers or {}))
        )

    def drop(self, method: str, times: int = 1, after: bool = False) -> None:
        """The connection ends without an answer, before or after the request is carried
        out.
        """
        self._fault(Fault(method, "drop", times, after))

    def hang(
        self,
        method: str,
        seconds: float,
        times: int = 1,
        after: bool = False,
        until: Callable[[], Any] | None = None,
    ) -> None:
        """A late answer, which comes earlier if `until` holds.

        If the bot hangs up by then, the request is lost unless `after`.
        """
        self._fault(Fault(method, "hang", times, after, seconds, until=until))

    def flood(
        self, chat_id: int | None = None, seconds: float = 1, times: int = 1
    ) -> None:
        """Refuse the next messages to a chat, or to any, each for so many seconds."""
        with self._changed:
            fault = Fault(
                "sendMessage", "flood", times, seconds=seconds, chat_id=chat_id
            )
            self._floods.append(fault)

    def mend(self) -> None:
        """Nothing more goes wrong."""
        with self._changed:
            self._faults.clear()
            self._floods.clear()

    def _fault(self, fault: Fault) -> None:
        with self._changed:
            self._faults.append(fault)

    def _pause(self, seconds: float, until: Callable[[], Any] | None = None) -> None:
        if seconds:  # else the lock would be let go for a moment
            self._changed.wait_for(lambda: self._down or (until and until()), seconds)

    # --- what the bot calls ---

    def answer(
        self, path: str, params: dict, gone: Callable[[], bool], outages: int
    ) -> Reply | None:
        """What to send back, None for nothing; `gone` tells whether the bot has hung
        up, `outages` how many had been when the request came.
        """
        method = path.rpartition("/")[2]
        method = NAMES.get(method.lower(), method)
        with self._changed:
            self.calls.append((method, params))
            self._changed.notify_all()
            if self._down or outages != self.outages or gone():
                return None
            if not (match := re.fullmatch(r"/bot(\d+:[\w-]+)/\w+", path)):
                return Refusal(404, "Not Found").reply
            if match[1] != self.token:
                return Refusal(401, "Unauthorized").reply
            fault = take(self._faults, lambda f: f.method in (method, "*")) or Fault(
                method
            )
            reply = self._carry_out(method, params, gone) if fault.after else None
            self._pause(fault.seconds, fault.until)
            if self._down or fault.how == "drop" or (fault.how == "hang" and gone()):
                return None
            return fault.reply or reply or self._carry_out(method, params, gone)

    def _carry_out(
        self, method: str, params: dict, gone: Callable[[], bool]
    ) -> Reply | None:
        try:
            if method not in PARAMETERS:
                raise Refusal(404, "Not Found", blame=True)
            if extra := set(params) - set(WORD.findall(PARAMETERS[method])):
                self.problems.append(f"{method}: unknown parameters {sorted(extra)}")
            if method == "getMe":
                rights = {"can_join_groups": True, "can_read_all_group_messages": False}
                return success({**self.bot, **rights, "supports_inline_queries": False})
            if method == "deleteWebhook":
                return success(True)
            if method == "getUpdates":
                return self._get_updates(params, gone)
            return (
                self._send_message(params)
                if method == "sendMessage"
                else self._act(params)
            )
        except Refusal as refusal:
            if refusal.blame:
                self.problems.append(f"{method}: {refusal}")
            return refusal.reply
        finally:
            self._changed.notify_all()

    def _get_updates(self, params: dict, gone: Callable[[], bool]) -> Reply | None:
        offset, timeout = number(params, "offset"), number(params, "timeout")
        limit = min(max(number(params, "limit") or 100, 1), 100)
        if isinstance(params.get("allowed_updates"), list):
            self._allowed = params["allowed_updates"]
        self._poll += 1
        mine = self._poll
        self._confirm(offset)
        self._changed.notify_all()
        self._changed.wait_for(
            lambda: mine != self._poll or self._down or self._updates or self._again,
            min(timeout, self.poll_cap),
        )
        if self._down:
            return None
        if mine != self._poll:
            if not gone():  # a poll that the bot has given up does no harm
                self.conflicts += 1
                self.problems.append("getUpdates: two polls at once")
            raise Refusal(409, CONFLICT)
        updates = [*self._again, *self._updates][:limit]
        self._again.clear()
        self._seen.update(update["update_id"] for update in updates)
        return success(updates)

    def _confirm(self, offset: int) -> None:
        """Forget what is below the offset, or, if negative, all but the last few."""
        ids = [update["update_id"] for update in self._updates]
        done = ids[:offset] if offset < 0 else [id for id in ids if id < offset]
        if unseen := [id for id in done if offset > 0 and id not in self._seen]:
            self.problems.append(
                f"getUpdates: confirms {unseen}, which it has never been given"
            )
        self._updates = self._updates[len(done) :]
        self.confirmed += done

    def _send_message(self, params: dict) -> Reply:
        text = params.get("text", "")
        if not isinstance(text, str) or BLANK.fullmatch(text):
            raise Refusal(400, "Bad Request: message text is empty", blame=True)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refusal(
                400, "Bad Request: strings must be encoded in UTF-8", blame=True
            )
        chat_id = self._target(params)
        thread_id = self._thread(chat_id, params)
        if len(text) > TEXT_LIMIT:
            raise Refusal(400, "Bad Request: message is too long", blame=True)
        if mode := params.get("parse_mode"):
            self.problems.append(
                f"sendMessage: parse_mode {mode!r} on text that nobody escaped"
            )
        reply = params.get("reply_parameters") or {"allow_sending_without_reply": True}
        found = reply.get("message_id") in self._messages[chat_id]
        if not (found or reply.get("allow_sending_without_reply")):
            raise Refusal(
                400, "Bad Request: message to be replied not found", blame=True
            )
        self._check_flood(chat_id)
        topic = (
            {"message_thread_id": thread_id, "is_topic_message": True}
            if thread_id
            else {}
        )
        message = self._message(chat_id, self.bot, None, text, **topic)
        sent = Sent(chat_id, text, thread_id, time.monotonic(), message["message_id"])
        self.sent.append(sent)
        return success(message)

    def _act(self, params: dict) -> Reply:
        chat_id, action = self._target(params), params.get("action")
        if action not in WORD.findall(ACTIONS):
            raise Refusal(
                400, "Bad Request: wrong parameter action in request", blame=True
            )
        thread_id = self._thread(chat_id, params, general=True)
        self.actions.append(Action(chat_id, action, thread_id, time.monotonic()))
        return success(True)

    def _target(self, params: dict) -> int:
        """The chat that a request is for."""
        if not (chat_id := params.get("chat_id")):
            raise Refusal(400, "Bad Request: chat_id is empty", blame=True)
        if chat_id in self._migrated:
            raise Refusal(400, MIGRATED, migrate_to_chat_id=self._migrated[chat_id])
        if chat_id in self._blocked:
            raise Refusal(403, "Forbidden: bot was blocked by the user")
        if chat_id not in self._chats:
            raise Refusal(400, "Bad Request: chat not found")
        return chat_id

    def _thread(self, chat_id: int, params: dict, general: bool = False) -> int | None:
        """The topic of a request; General has a number for chat actions only."""
        thread_id = number(params, "message_thread_id") or None
        if thread_id == 1 and general and self._chats[chat_id].get("is_forum"):
            return thread_id
        if thread_id and (thread_id == 1 or thread_id not in self._topics[chat_id]):
            raise Refusal(400, "Bad Request: message thread not found", blame=True)
        return thread_id

    def _check_flood(self, chat_id: int) -> None:
        left = self._quiet_until.get(chat_id, 0) - time.monotonic()
        if left > 0:
            self.problems.append(
                f"sendMessage: to {chat_id} {left:.2f} s too early after a 429"
            )
        elif flood := take(self._floods, lambda f: f.chat_id in (None, chat_id)):
            left = flood.seconds
            self._quiet_until[chat_id] = time.monotonic() + left
        else:
            return
        wait = math.ceil(left)
        raise Refusal(429, f"Too Many Requests: retry after {wait}", retry_after=wait)


# --- the parts of an update ---


def now() -> int:
    return int(time.time())


def person(user: Person, chat_id: int) -> dict:
    """A user by id; a private chat has the id of its user."""
    if isinstance(user, dict):
        return user
    id = user or (chat_id if chat_id > 0 else 7)
    return {
        "id": id,
        "is_bot": False,
        "first_name": f"User {id}",
        "username": f"user{id}",
    }


def photo(id: str) -> list[dict]:
    """A photo in the sizes that Telegram makes of it."""
    sizes = (90, 67), (800, 600)
    return [
        {
            "file_id": f"{id}-{w}",
            "file_unique_id": f"u{id}-{w}",
            "width": w,
            "height": h,
        }
        for w, h in sizes
    ]


def with_entities(message: dict) -> dict:
    """A message with the mentions and commands that Telegram finds in its text or
    caption.
    """
    for name, entities in (("text", "entities"), ("caption", "caption_entities")):
        text = message.get(name) or ""
        found = []
        for match in ENTITY.finditer(text):
            offset = len(text[: match.start()].encode("utf-16-le")) // 2
            found.append(
                {"type": match.lastgroup, "offset": offset, "length": len(match[0])}
            )
        if found:
            message.setdefault(entities, found)
    return message


def number(params: dict, name: str) -> int:
    """A parameter that is a whole number, 0 if it is not there."""
    value = params.get(name) or 0
    if not isinstance(value, int):
        raise Refusal(400, f"Bad Request: {name} must be an integer", blame=True)
    return value


def success(result: Any) -> Reply:
    return 200, {"ok": True, "result": result}, {}


def take(items: list, fits: Callable[[Any], bool]) -> Any:
    """The first item that fits, used once; one that is used up is gone."""
    item = next((item for item in items if fits(item)), None)
    if item:
        item.times -= 1
        if item.times < 1:
            items.remove(item)
    return item


# --- HTTP ---


class Server(ThreadingHTTPServer):
    """Knows its open connections, so that it can hang up on them."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    fake: FakeTelegram

    def __init__(self, *args: Any, **options: Any):
        self.open: set[socket.socket] = set()
        super().__init__(*args, **options)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no event, a mistake of this server is."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.fake.problems.append(f"the fake server: {error!r}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        outages = self.server.fake.outages
        url = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if len(raw) < length:  # the bot has given up, or died, in the middle of it
            self.close_connection = True
            return
        kind = self.headers.get("Content-Type", "")
        params = parse(f"{url.query}&".encode() + (b"" if "json" in kind else raw))
        params |= json.loads(raw) if raw and "json" in kind else {}
        reply = self.server.fake.answer(
            urllib.parse.unquote(url.path), params, self.gone, outages
        )
        if reply is None:
            self.close_connection = True
            return
        status, body, headers = reply
        html = isinstance(body, str)
        raw = (body if html else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_POST

    def gone(self) -> bool:
        """Whether the client has closed the connection that it waits on."""
        try:
            ready = select.select([self.connection], [], [], 0)[0]
            return bool(ready) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True


def parse(form: bytes) -> dict[str, Any]:
    """The parameters of a form, numbers and lists as such, texts untouched."""
    pairs = urllib.parse.parse_qsl(
        form.decode("utf-8", "surrogateescape"),
        keep_blank_values=True,
        errors="surrogateescape",
    )
    params: dict[str, Any] = dict(pairs)
    for name in params.keys() - {"text"}:
        with suppress(ValueError):
            params[name] = json.loads(params[name])
    return params


# --- at a terminal ---


def main() -> int:
    """Each line typed is a message of person 42, or of 99 if it begins with `99:`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=8081, help="0 for any free one")
    port = parser.parse_args().port
    try:
        fake = FakeTelegram(port=port).start()
    except (OSError, OverflowError) as error:
        print(
            f"fake_telegram.py: port {port}: {error}; choose another", file=sys.stderr
        )
        return 1
    fake.know(42)  # they may have written to the bot in the last run
    # a bot that knows the last run must not take this one for it
    first = int(time.time())
    fake._update_ids, fake._message_ids = itertools.count(first), itertools.count(first)
    print(f"TELEGRAM_BOT_TOKEN={fake.token} \\\nTELEGRAM_BASE_URL={fake.url} \\")
    print("TELEGRAM_ALLOWED_CHATS=42 \\", flush=True)
    threading.Thread(target=print_sent, args=(fake,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            person, text = re.fullmatch(
                r"(?:(\d+):\s)?(.*)", line.strip(), re.S
            ).groups()
            if text:
                fake.paste(text, chat_id=int(person or 42))
    return 0


def print_sent(fake: FakeTelegram) -> None:
    """Print what the bot sends."""
    for number in itertools.count():
        fake.until(lambda number=number: len(fake.sent) > number, threading.TIMEOUT_MAX)
        print(f"to {fake.sent[number].chat_id}: {fake.sent[number].text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
