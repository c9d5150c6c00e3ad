"""Checks of the exercises of s04."""

import os
import re
from pathlib import Path

from conversation import wait_until
from fake_model import FakeModel
from fake_model import Text
from fake_telegram import FakeTelegram
from harness import Screen
from harness import Section

PROMPT = re.compile(r"^you> ", re.M)
LONG = "word " * 1800 + "end"


def repeat(body: dict) -> Text:
    """A model that says what it has heard."""
    heard = body["messages"][-1]["content"]
    return Text(LONG if heard == "long" else f"heard {heard}")


def settings(fake_model: FakeModel, telegram: FakeTelegram) -> dict[str, str]:
    """The environment of a script that talks to both servers. Chat 42 is allowed."""
    fake_model.script(None, [repeat], repeat=True)
    return fake_model.env(
        TELEGRAM_BOT_TOKEN=telegram.token,
        TELEGRAM_BASE_URL=telegram.url,
        TELEGRAM_ALLOWED_CHATS="42",
    )


def type_line(screen: Screen, line: str) -> str:
    """Type a line at the prompt. Returns what is shown before the next prompt."""
    screen.type(f"{line}\n")
    begin = screen.wait_for(line, 30).end()
    end = screen.wait_for(PROMPT, 30).start()
    return screen.text[begin:end]


def fake_telegram() -> FakeTelegram:
    """A server that answers at once, also if it has no news."""
    telegram = FakeTelegram()
    telegram.poll_cap = 0.1  # seconds
    return telegram


def texts_to(telegram: FakeTelegram, chat: int) -> list[str]:
    return [sent.text for sent in telegram.sent_to(chat)]


def test_s04_tell(script: Section, fake_model: FakeModel):
    """Add: /tell <channel> <peer> <text> sends a text to a chat, in your own words."""
    with fake_telegram() as telegram:
        telegram.know(42)
        telegram.know(7)
        with Screen(script, settings(fake_model, telegram)) as screen:
            screen.wait_for("on, as @", 30)
            screen.wait_for(PROMPT, 30)
            shown = type_line(screen, "/tell telegram 42 dinner is ready")
            problem = f"expected a command /tell; got {shown!r}"
            assert "There is no command" not in shown, problem
            telegram.wait_sent(1)
            sent = texts_to(telegram, 42)
            wanted = ["dinner is ready"]
            assert sent == wanted, f"expected chat 42 to get {wanted}; got {sent}"
            shown = type_line(screen, "/tell pigeon 42 hello")
            problem = (
                f"expected one line that says that there is no pigeon; got {shown!r}"
            )
            assert "pigeon" in shown and "Traceback" not in shown, problem
            telegram.say("/tell telegram 7 boo")
            telegram.wait_sent(2)
            others = texts_to(telegram, 7)
            problem = f"expected only the terminal to have /tell; chat 7 got {others}"
            assert not others, problem


def drop(folder: Path, name: str, text: str) -> None:
    """Let a file appear in a folder with all its text at once."""
    outside = folder.parent / name
    outside.write_text(text, encoding="utf-8")
    os.replace(outside, folder / name)


def wait_for_answer(folder: Path, name: str, wanted: str) -> None:
    """Wait until an answer has arrived, the whole of it."""
    file = folder / f"{name}.answer"

    def answer() -> str:
        return file.read_text(encoding="utf-8") if file.exists() else ""

    try:
        wait_until(lambda: answer().strip() == wanted, 20)
    except AssertionError:
        text = answer()
        problem = f"{name}.answer: expected {len(wanted)} characters, {wanted[:60]!r}"
        raise AssertionError(f"{problem}; got {len(text)}, {text[:60]!r}") from None


def leave(screen: Screen) -> None:
    screen.type("quit\n")
    screen.wait_exit(30)


def test_s04_folder(script: Section, fake_model: FakeModel, tmp_path: Path):
    """Add: a channel `folder`: each text file in FOLDER_DIR is a message."""
    folder = tmp_path / "letters"
    folder.mkdir()
    fake_model.script(None, [repeat], repeat=True)
    env = fake_model.env(FOLDER_DIR=str(folder))
    with Screen(script, env) as screen:
        screen.wait_for(PROMPT, 30)
        shown = type_line(screen, "/channels")
        assert "folder: " in shown, f"expected `folder` in /channels; got {shown!r}"
        drop(folder, "cat.txt", "my cat is Miso")
        wait_for_answer(folder, "cat", "heard my cat is Miso")
        drop(folder, "long.txt", "long")
        wait_for_answer(folder, "long", LONG)
        leave(screen)
    drop(folder, "dog.txt", "my dog is Rex")  # while nobody looks
    with Screen(script, env) as screen:
        wait_for_answer(folder, "dog", "heard my dog is Rex")
        drop(folder, "emu.txt", "my emu is Edna")
        wait_for_answer(folder, "emu", "heard my emu is Edna")
        leave(screen)
    asked = [request.messages[-1]["content"] for request in fake_model.chats]
    wanted = ["my cat is Miso", "long", "my dog is Rex", "my emu is Edna"]
    assert asked == wanted, f"expected the questions {wanted}, each once; got {asked}"


def test_s04_lost(script: Section, fake_model: FakeModel):
    """Find: Telegram is down, you restart the agent, and an answer never arrives."""
    with fake_telegram() as telegram:
        env = settings(fake_model, telegram)
        with Screen(script, env) as screen:
            screen.wait_for("on, as @", 30)
            telegram.drop("sendMessage", times=1000)
            telegram.say("first")
            telegram.until(lambda: has_tried_to_send(telegram), 30, "an answer")
            screen.kill()
        telegram.mend()
        with Screen(script, env) as screen:
            screen.wait_for("on, as @", 30)
            telegram.say("second")  # the answers to one chat keep their order
            telegram.until(
                lambda: "heard second" in texts_to(telegram, 42), 30, "an answer"
            )
            sent = texts_to(telegram, 42)
    wanted = ["heard first", "heard second"]
    assert sent == wanted, f"expected {wanted} after the restart; got {sent}"


def has_tried_to_send(telegram: FakeTelegram) -> bool:
    return any(method == "sendMessage" for method, _ in telegram.calls)
