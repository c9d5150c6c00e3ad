"""Checks of the exercises of s04."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from fake_model import FakeModel
from fake_model import Text
from fake_telegram import FakeTelegram
from harness import Screen
from harness import Section


def wait_until(condition: Callable[[], bool], told: Callable[[], str], timeout: float = 30) -> None:
    """Wait for a condition; after all, fail with what is told."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.02)


def append(file: Path, line: str) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def repeats(body: dict) -> Text:
    """A model that says what it heard."""
    return Text(f"heard {body['messages'][-1]['content']}")


def talk_by_file(script: Section, env: dict, file: Path, *lines: str) -> None:
    """In one run, append each line to the file and wait for its answer."""
    with Screen(script, env) as screen:
        screen.wait_for("you> ", 30)
        screen.type("/channels\n")
        listed = screen.wait_for("cli default: on", 30).end()
        screen.wait_for("you> ", 30)
        assert "file default: " in screen.text[listed:], (
            f"expected the channel `file default` in /channels; got {screen.text[listed:]!r}"
        )
        for line in lines:
            append(file, line)
        answers = Path(f"{file}.out")
        wait_until(
            lambda: f"heard {lines[-1]}" in read(answers),
            lambda: f"expected 'heard {lines[-1]}' in {answers.name}; got {read(answers)!r}",
        )
        screen.type("quit\n")
        screen.wait_exit(30)


def test_s04_file(script: Section, fake_model: FakeModel, tmp_path: Path):
    """Add: a channel `file`: each line in the file FILE_INBOX names is answered, in <file>.out."""
    fake_model.script(None, [repeats], repeat=True)
    talk = tmp_path / "talk.txt"
    env = fake_model.env(FILE_INBOX=str(talk))
    talk_by_file(script, env, talk, "one")
    append(talk, "two")  # while nobody listens
    talk_by_file(script, env, talk, "three", "one", "four")
    heard = [line for line in read(Path(f"{talk}.out")).splitlines() if "heard" in line]
    wanted = [f"heard {word}" for word in ("one", "two", "three", "one", "four")]
    assert heard == wanted, f"expected {wanted}, each line answered once; got {heard}"


def test_s04_inbox(script: Section, workspace: Path):
    """Find: look with `/inbox` at what waits, and it is answered after a restart at best."""
    module = script.load()
    inbox = module.Inbox(workspace / ".inbox.jsonl")
    for text in ("first", "second"):
        inbox.put(module.InboundMessage("telegram", "default", "42", text, [text]))
    agent = SimpleNamespace(app=SimpleNamespace(inbox=inbox))
    shown = module.COMMANDS["/inbox"][2](agent, "") if "/inbox" in module.COMMANDS else ""
    waiting = [message.text for message in list(inbox.queue.queue)]
    assert waiting == ["first", "second"], f"expected both to wait on after /inbox; got {waiting}"
    told = not shown or ("first" in shown and "second" in shown)
    assert told, f"expected /inbox to show what waits; got {shown!r}"


def test_s04_lost(script: Section, fake_model: FakeModel, workspace: Path):
    """Find: the disk fails for a moment; what Telegram brings just then is never answered."""
    with FakeTelegram() as telegram:
        names = {"BOT_TOKEN": telegram.token, "BASE_URL": telegram.url, "ALLOWED_CHATS": "42"}
        env = fake_model.env(**{f"TELEGRAM_{name}": value for name, value in names.items()})
        with Screen(script, env) as screen:
            screen.wait_for("on, as @", 30)
            (workspace / ".inbox.jsonl").unlink()  # so that nothing can be added to it
            sent = telegram.say("are you there?")
            screen.wait_for("no contact", 30)
            polls = count_polls(telegram)
            telegram.until(lambda: count_polls(telegram) > polls, 30, "a poll")
            offset = [about.get("offset") for name, about in telegram.calls if name == "getUpdates"]
        kept = int(offset[-1] or 0) <= sent
        assert kept, (
            "expected Telegram to have the message still; got it confirmed, and nobody has it"
        )


def count_polls(telegram: FakeTelegram) -> int:
    return sum(name == "getUpdates" for name, _ in telegram.calls)
