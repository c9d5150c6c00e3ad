"""A section with people at its terminal, at Telegram and at Feishu, and a scripted
model behind it.
"""

import json
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from conversation import wait_until
from fake_feishu import FakeFeishu
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Text
from fake_model import ToolCalls
from fake_telegram import FakeTelegram

PROMPT = "you> "
TOOLS = {
    "bash": "command",
    "read_file": "path",
    "write_file": "path content",
    "edit_file": "path old_text new_text",
}


class Desk:
    """A section, its workspace, and all that it talks with."""

    def __init__(
        self,
        section: harness.Section,
        workspace: Path,
        model: FakeModel,
        telegram: FakeTelegram,
        feishu: FakeFeishu,
    ):
        self.section = section
        self.workspace = workspace
        self.model = model
        self.telegram = telegram
        self.feishu = feishu
        self.gate = threading.Event()  # opened, answers to "wait" come
        self.screens: list[harness.Screen] = []
        model.script("brain", [self.brain], repeat=True)

    def brain(self, body: dict) -> Any:
        """Do what was said last: wait, fail, call a tool, or just answer."""
        said = questions(body["messages"])[-1]
        words = re.sub(r"^\[[^]]*\] ", "", said)  # in a group, a name stands before it
        verb, _, rest = words.partition(" ")
        if verb == "wait":
            return Gate(self.gate, Text(f"heard {words}"), after_chunks=2)
        if verb == "fail":
            return Error(422)
        if verb in TOOLS and body["messages"][-1]["role"] != "tool":
            names = TOOLS[verb].split()
            values = rest.split(" ", len(names) - 1)
            return ToolCalls([(verb, dict(zip(names, values, strict=False)))])
        return Text(f"heard {words[:200]}")

    # --- settings ---

    def bot(
        self, server: FakeTelegram | None = None, suffix: str = "", **more: str
    ) -> dict[str, str]:
        """The settings of one account at Telegram; `more` by their short names."""
        server = server or self.telegram
        settings = {"BOT_TOKEN": server.token, "BASE_URL": server.url}
        settings |= {"ALLOWED_CHATS": "42 43, -100123"} | more
        return {f"TELEGRAM_{name}{suffix}": value for name, value in settings.items()}

    def app(
        self, server: FakeFeishu | None = None, suffix: str = "", **more: str
    ) -> dict[str, str]:
        """The settings of one account at Feishu; `more` by their short names."""
        server = server or self.feishu
        settings = {"APP_ID": server.app_id, "APP_SECRET": server.app_secret}
        settings |= {"DOMAIN": server.url, "PORT": "0"}
        settings |= {"VERIFICATION_TOKEN": server.verification_token}
        settings |= {"ENCRYPT_KEY": server.encrypt_key}
        settings |= {"ALLOWED_CHATS": "ou_alice, ou_bobby, oc_group"} | more
        return {f"FEISHU_{name}{suffix}": value for name, value in settings.items()}

    # --- runs ---

    def start(
        self, *channels: str, fsize: int | None = None, **env: str
    ) -> harness.Screen:
        """A run at a terminal, when it has said that these channels are on."""
        settings = self.model.env("brain", **env)
        screen = harness.Screen(self.section, settings, fsize=fsize)
        self.screens.append(screen)
        screen.wait_for(PROMPT)
        wait_until(lambda: all(lines_with(screen, f"[{c}] on") for c in channels))
        return screen

    def telegram_alone(self, **env: str) -> harness.Screen:
        return self.start("telegram", **self.bot(), **env)

    def feishu_alone(self, fsize: int | None = None, **env: str) -> harness.Screen:
        return self.start("feishu", fsize=fsize, **self.app(), **env)

    def both(self, **env: str) -> harness.Screen:
        return self.start("telegram", "feishu", **self.bot(), **self.app(), **env)

    def check(self) -> None:
        """What holds for all runs: no traceback, no secret on the screen or on disk."""
        printed = "\n".join(screen.raw for screen in self.screens)
        noise = re.search("Traceback|Exception|Warning|Task was", printed)
        assert not noise, harness.plain(printed)
        files = [file for file in self.workspace.rglob("*") if file.is_file()]
        everywhere = [printed.encode(), *(file.read_bytes() for file in files)]
        secrets = [self.telegram.token.partition(":")[2], self.feishu.app_secret]
        secrets += [self.feishu.verification_token, self.feishu.encrypt_key]
        for secret in filter(None, secrets):
            assert not [text for text in everywhere if secret.encode() in text]

    # --- people ---

    def ask_telegram(self, text: str, chat: int = 42, timeout: float = 20) -> str:
        """Say something in a chat, and wait for what is sent to it then."""
        count = len(self.telegram.sent_to(chat))
        self.telegram.say(text, chat)
        self.wait_telegram(count + 1, chat, timeout)
        return self.telegram.sent_to(chat)[count].text

    def wait_telegram(self, count: int, chat: int = 42, timeout: float = 20) -> None:
        """Wait until a chat has been sent so many messages."""
        sent = self.telegram.sent_to
        self.telegram.until(lambda: len(sent(chat)) >= count, timeout)

    def ask_feishu(self, text: str, timeout: float = 20, **about: Any) -> str:
        """Say something to the app, and wait for what is sent then."""
        count = len(self.feishu.sent)
        assert self.push(self.feishu.event(text, **about)) == 200
        return self.feishu.wait_sent(count + 1, timeout)[count].text

    def push(self, event: dict) -> int:
        """Post an event to the webhook. Returns the status of its answer."""
        found = re.findall(r"\[feishu\] on, at (\S+)", self.screens[-1].text)
        return self.feishu.push(found[-1], event).status

    @property
    def replies(self) -> list[str]:
        """What was sent to people at Feishu."""
        return [sent.text for sent in self.feishu.sent]

    @property
    def asked(self) -> list[str]:
        """The question of each request to the model."""
        return [questions(request.messages)[-1] for request in self.model.chats]

    def histories(self) -> list[list[str]]:
        """For each request to the model: all questions in it."""
        return [questions(request.messages) for request in self.model.chats]

    # --- the disk ---

    @property
    def database(self) -> Path:
        return self.workspace / ".state" / "gateway.db"

    def inbox(self) -> list[tuple[str, str, str, bool]]:
        """What the inbox holds: for each message its id, text, answer, and if done."""
        address = f"file:{self.database}?mode=ro"
        rows = []
        with closing(sqlite3.connect(address, uri=True, timeout=10)) as database:
            found = database.execute(
                "SELECT id, message, answer, done FROM inbox ORDER BY number"
            )
            for message_id, record, answer, done in found:
                text = json.loads(record)["text"] if record else ""
                rows.append((message_id, text, answer or "", done is not None))
        return rows

    def settle(self) -> None:
        """Wait until all that has come in is noted as done."""
        wait_until(lambda: all(row[-1] for row in self.inbox()), 20)


@contextmanager
def open_desk(
    section: harness.Section, workspace: Path, model: FakeModel, encrypt_key: str = ""
) -> Iterator[Desk]:
    """A desk for one test. What holds for all runs is checked at its end."""
    with FakeTelegram() as telegram, FakeFeishu(encrypt_key) as feishu:
        feishu.app_secret = "an-app-secret"
        feishu.verification_token = "a-verification-token"
        feishu.users |= {"ou_bobby"}
        telegram.poll_cap = 0.3  # seconds: the channel is on after the first poll
        desk = Desk(section, workspace, model, telegram, feishu)
        try:
            yield desk
        finally:
            desk.gate.set()
            for screen in desk.screens:
                screen.close()
        desk.check()
        assert telegram.problems == []
        assert feishu.problems == []


def questions(messages: list[dict]) -> list[str]:
    """What people said, in order."""
    return [message["content"] for message in messages if message["role"] == "user"]


def lines_with(screen: harness.Screen, *parts: str) -> list[str]:
    """The lines on the paper that contain all of these."""
    lines = screen.paper.splitlines()
    return [line for line in lines if all(part in line for part in parts)]


def say(screen: harness.Screen, text: str, answer: str) -> str:
    """Type a line, and wait for its answer and for the next prompt.

    Returns what came in between.
    """
    wait_for_paper(screen, PROMPT)
    before = len(screen.text)
    screen.type(f"{text}\n")
    screen.wait_for(answer)
    wait_for_paper(screen, PROMPT)
    return screen.text[before:]


def wait_for_paper(screen: harness.Screen, ending: str) -> None:
    """Wait until what a person sees ends so."""
    wait_until(lambda: screen.paper.rstrip().endswith(ending.rstrip()))
