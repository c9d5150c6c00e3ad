"""Channels together (s04): one process and many mouths, and what each does to the others."""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import harness
import pytest
from fake_feishu import FakeFeishu
from fake_telegram import FakeTelegram
from harness import since

from first import test_feishu
from first.ledger import inbox_is_empty
from first.test_feishu import Desk
from first.test_feishu import lines
from first.test_feishu import wait_until

desk, sealing = test_feishu.desk, test_feishu.sealing
OTHER_TOKEN = "654321:other-token"


@pytest.fixture
def telegram() -> Iterator[FakeTelegram]:
    with FakeTelegram() as server:
        yield server
    assert not server.problems


def bot(telegram: FakeTelegram, suffix: str = "", **more: str) -> dict[str, str]:
    """What one account at Telegram is told, `more` by the short names."""
    names = {"BOT_TOKEN": telegram.token, "BASE_URL": telegram.url, "ALLOWED_CHATS": "42"} | more
    return {f"TELEGRAM_{name}{suffix}": value for name, value in names.items()}


def start(desk: Desk, *accounts: str, fsize: int | None = None, **env: str) -> harness.Screen:
    """A process, when it has told that these accounts are on, such as "feishu default"."""
    screen = desk.start(fsize, **env)
    wait_until(lambda: all(lines(screen, f"[{account}] on") for account in accounts))
    if webhook := test_feishu.ON.search(screen.text):
        desk.hook = webhook[1]
    return screen


def both(desk: Desk, telegram: FakeTelegram, **env: str) -> harness.Screen:
    accounts = desk.settings() | bot(telegram)
    return start(desk, "feishu default", "telegram default", **accounts, **env)


def say(screen: harness.Screen, text: str, answer: str) -> None:
    """Type a line and wait for the answer."""
    screen.type(f"{text}\n")
    screen.wait_for(answer)


def histories(desk: Desk) -> list[list[str]]:
    """What the user has said in each request, oldest first."""
    return [
        [message["content"] for message in chat.messages if message["role"] == "user"]
        for chat in desk.model.chats
    ]


def inbox(desk: Desk) -> Path:
    (file,) = Path(desk.model.env()["WORKSPACE_DIR"]).glob(".inbox.jsonl")
    return file


# --- one brain, many mouths ---


@pytest.mark.guard
@since("s04")
def test_one_process_with_three_mouths(desk: Desk, telegram: FakeTelegram):
    screen = both(desk, telegram)
    for number in (1, 2):
        say(screen, f"typed {number}", f"heard typed {number}")
        telegram.say(f"tapped {number}")
        telegram.wait_sent(number)
        assert desk.ask(f"told {number}").text == f"heard told {number}"
    told = [["typed 1", "typed 2"], ["tapped 1", "tapped 2"], ["told 1", "told 2"]]
    assert sorted(histories(desk)[-3:]) == sorted(told)
    assert [sent.text for sent in telegram.sent] == ["heard tapped 1", "heard tapped 2"]

    screen.type("\nhalf a ")  # an empty line ends nothing, and what others say is printed above
    telegram.say("meanwhile")
    screen.wait_for("heard meanwhile")
    desk.ask("between")
    screen.wait_for("heard between")  # what is typed meanwhile may be drawn in two pieces
    say(screen, "line", "heard half a line")
    assert lines(screen, "you> half a line") and lines(screen, "[feishu default] ou_alice: between")

    say(screen, "/channels", "feishu default: on")
    shown = screen.text
    for name in ("cli default: on", "telegram default: on", "feishu default: on"):
        assert name in shown
    before = len(screen.text)
    screen.type("/accounts\n")
    wait_until(lambda: {"telegram", "feishu"} <= set(screen.text[before:].split()))
    assert all(secret not in screen.raw for secret in (telegram.token, "test-token"))

    began = time.monotonic()
    screen.press("ctrl-c")
    assert screen.wait_exit() == 0 and time.monotonic() - began < 2
    both(desk, telegram)
    telegram.say("again")
    telegram.wait_sent(4)
    desk.ask("again")
    assert {tuple(asked) for asked in histories(desk)[-2:]} == {
        ("tapped 1", "tapped 2", "meanwhile", "again"),
        ("told 1", "told 2", "between", "again"),
    }


@pytest.mark.guard
@since("s04")
def test_commands_of_the_computer_are_for_the_terminal(desk: Desk, workspace: Path):
    for approval, runs in (("", False), ("never", False), ("always", True)):
        screen = desk.start(**desk.settings(), APPROVAL=approval)
        desk.hook = screen.wait_for(test_feishu.ON)[1]
        assert desk.ask("bash env; touch made", timeout=5).text.startswith("heard bash")
        (result,) = [m["content"] for m in desk.model.chats[-1].messages if m["role"] == "tool"][
            -1:
        ]
        assert (workspace / "made").exists() == runs
        assert runs or re.search("refused|not allowed|may not|never", result), result
        assert "run it?" not in screen.text
        assert not re.search("an-app-secret|a-verification-token|an-encrypt-key", result)
        screen.close()


@since("s04", until="s09")
def test_the_terminal_has_its_turn(desk: Desk):
    """It waits for the turn of somebody else, or stops to wait, but not behind a whole queue."""
    screen = desk.up()
    assert desk.push(desk.feishu.event("wait")) == 200
    desk.model.wait(1)
    screen.type("never mind\n")
    screen.wait_for("never mind")
    screen.press("ctrl-c")
    screen.wait_for("you> ")
    for number in range(50):
        assert desk.push(desk.feishu.event(f"q{number}")) == 200
    desk.gate.set()
    desk.feishu.wait_sent(2)
    say(screen, "hello", "heard hello")
    assert len(desk.asked) < 45
    desk.feishu.wait_sent(51)
    assert "never mind" not in desk.asked
    assert [sent.text for sent in desk.feishu.sent[1:]] == [f"heard q{n}" for n in range(50)]


@since("s04")
@pytest.mark.parametrize("typed", ["a" * 94, "b" * 95, "c" * 195, "\u957f" * 60], ids=len)
def test_a_line_that_is_being_typed(desk: Desk, typed: str):
    """However long and wide it is, what others say stands above it, and it stands there once."""
    screen = desk.up()
    screen.type(typed)
    wait_until(lambda: screen.text.count(typed[0] * 40))
    for _ in range(2):
        desk.ask("hi")
        wait_until(lambda: screen.raw.count("heard hi") == len(desk.replies))
    screen.type("!\n")
    screen.wait_for("agent> ")
    desk.model.wait(3)
    assert desk.asked[-1] == f"{typed}!"
    shown = screen.paper
    assert len(lines(screen, f"you> {typed[:30]}")) == 1, shown
    assert len(lines(screen, "ou_alice: hi")) == len(lines(screen, "ou_alice: heard hi")) == 2, (
        shown
    )


@since("s04")
def test_where_the_platforms_are(desk: Desk, telegram: FakeTelegram):
    """What a proxy sees: the names that FEISHU_DOMAIN knows, and what holds if nothing is set."""
    env = {"FEISHU_DOMAIN_NONE": "", "TELEGRAM_BOT_TOKEN": telegram.token}
    for domain in ("none", "feishu", "lark"):
        env = desk.settings(None, f"_{domain}".upper(), DOMAIN=domain) | env
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        desk.start(**env, HTTPS_PROXY=address)
        asked = []
        while len(asked) < 4:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(99).split()[1].decode())
    hosts = ["api.telegram.org", "open.feishu.cn", "open.feishu.cn", "open.larksuite.com"]
    assert sorted(asked) == [f"{host}:443" for host in hosts]


@since("s04")
def test_settings_that_cannot_work(desk: Desk, telegram: FakeTelegram):
    """Each account says in a line what is wrong; the others, the good ones, work."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    nowhere = "http://nowhere.invalid"
    feishu = {
        "taken": {"PORT": port},
        "word": {"PORT": "abc"},
        "high": {"PORT": "99999"},
        "nonsense": {"DOMAIN": "nonsense"},
        "nowhere": {"DOMAIN": nowhere},
        "odd": {"DOMAIN": "http://[odd"},
    }
    bots = {
        "wrong": {"BOT_TOKEN": "111:wrong-token"},
        "odd": {"BOT_TOKEN": "no token at all"},
        "bare": {"BASE_URL": telegram.url.removeprefix("http://")},
        "nowhere": {"BASE_URL": nowhere},
    }
    env = {
        k: v for id, odd in feishu.items() for k, v in desk.settings(None, f"_{id}", **odd).items()
    }
    env |= {k: v for id, odd in bots.items() for k, v in bot(telegram, f"_{id}", **odd).items()}
    env = {key.upper(): value for key, value in env.items()}
    screen = both(desk, telegram, **env)
    names = [f"[feishu {id}] " for id in feishu] + [f"[telegram {id}] " for id in bots]
    wait_until(lambda: all(lines(screen, name) for name in names))
    telegram.say("hello")
    assert desk.ask("hi").text == "heard hi"
    assert telegram.wait_sent(1)[0].text == "heard hello"
    say(screen, "ho", "heard ho")
    time.sleep(1.5)  # for those that try again
    for name in names:
        (line,) = lines(screen, name)
        assert len(line) < 300, line
    assert (
        port in lines(screen, "[feishu taken]")[0] or "in use" in lines(screen, "[feishu taken]")[0]
    )
    assert "token" in lines(screen, "[telegram wrong]")[0]
    assert "111:wrong-token" not in screen.raw and "no token at all" not in screen.raw
    taken.close()


@since("s04")
def test_two_accounts_of_a_platform(desk: Desk, telegram: FakeTelegram):
    """Each has its own conversations with the same people; the outage of one is its own."""
    with FakeTelegram(OTHER_TOKEN, "other_bot") as bot2, FakeFeishu() as feishu2:
        feishu2.app_id = "cli_other"
        env = desk.settings() | bot(telegram) | bot(bot2, "_WORK")
        env |= desk.settings(feishu2, "_WORK")
        names = [f"{name} {id}" for name in ("feishu", "telegram") for id in ("default", "work")]
        screen = start(desk, *names, **env)
        hook2 = re.search(r"\[feishu work\] on, at (\S+)", screen.text)[1]
        for number in (1, 2):
            telegram.say(f"first bot {number}")
            bot2.say(f"second bot {number}")
            assert feishu2.push(hook2, feishu2.event(f"second app {number}")).status == 200
            desk.ask(f"first app {number}")
            telegram.wait_sent(number)
            bot2.wait_sent(number)
            feishu2.wait_sent(number)
        own = [
            f"{which} {what} {n}"
            for which in ("first", "second")
            for what in ("app", "bot")
            for n in (1, 2)
        ]
        assert sorted(histories(desk)[-4:]) == [own[n : n + 2] for n in range(0, 8, 2)]

        bot2.down()
        feishu2.down()
        assert feishu2.push(hook2, feishu2.event("into the dark")).status == 200
        for number in range(3):
            telegram.say(f"all is well {number}")
            assert desk.ask(f"all is well {number}").text == f"heard all is well {number}"
            telegram.wait_sent(3 + number)
        screen.wait_for("[telegram work]")
        bot2.up()
        feishu2.up()
        bot2.say("back")
        bot2.until(lambda: bot2.sent[-1].text == "heard back", 20)
        assert feishu2.wait_sent(3, 20)[-1].text == "heard into the dark"
        assert len(lines(screen, "[telegram work]", "no contact")) <= 2, screen.paper
        assert not bot2.problems + feishu2.problems


@since("s04")
def test_an_account_that_is_gone_for_a_time(desk: Desk, telegram: FakeTelegram):
    """What came in for it is kept, and answered when it is there again."""
    screen = both(desk, telegram)
    assert desk.push(desk.feishu.event("wait feishu")) == 200
    desk.model.wait(1)
    telegram.say("wait telegram")
    telegram.until(lambda: telegram.pending() == 0)
    screen.kill()
    desk.gate.set()
    screen = desk.start()
    say(screen, "anybody there?", "heard anybody there?")
    say(screen, "quit", "quit")
    begun = 2 if desk.section.label >= "s10" else 1  # before the kill
    assert screen.wait_exit() == 0 and 2 <= len(desk.model.chats) <= begun + 1
    both(desk, telegram)
    assert telegram.wait_sent(1)[0].text == "heard wait telegram"
    assert desk.feishu.wait_sent(1)[0].text == "heard wait feishu"


# --- the inbox on the disk ---


@since("s04")
def test_a_damaged_inbox(desk: Desk):
    """A torn last line and lines that nobody wrote: told of or left out, and the rest works."""
    desk.up()
    assert desk.push(desk.feishu.event("wait in the inbox", message_id="om_kept")) == 200
    desk.model.wait(1)
    desk.screens[-1].kill()
    desk.gate.set()
    good = inbox(desk).read_text()
    (record,) = [line for line in good.splitlines() if "wait in the inbox" in line]
    odd = [
        "",
        "{",
        "[]",
        "5",
        "null",
        '"x"',
        "\x00\x01",
        "[" * 3000,
        '{"type": []}',
        '{"type": "message"}',
    ]
    for number, bad in enumerate(spoilt(json.loads(record))):
        odd.append(json.dumps(bad).replace("om_kept", f"om_{number}").replace("wait in", "not"))
    inbox(desk).write_bytes("\n".join([*odd, good]).encode() + b"\xff\xfe\n" + record[:50].encode())
    screen = desk.up()
    assert len(lines(screen, "torn")) == 1 and len(lines(screen, "damaged")) >= 5
    wait_until(lambda: "heard wait in the inbox" in desk.replies)
    assert desk.ask("new", timeout=5).text
    wait_until(lambda: "heard new" in desk.replies)
    say(screen, "hello", "heard hello")
    screen.kill()
    screen = desk.up()
    assert not lines(screen, "torn") and not lines(screen, "damaged")
    assert desk.push(desk.feishu.event("again", message_id="om_kept")) == 200
    assert desk.ask("newer", timeout=5).text
    wait_until(lambda: "heard newer" in desk.replies)
    assert desk.replies.count("heard wait in the inbox") == 1 and "heard again" not in desk.replies
    desk.feishu.problems.clear()  # some of those lines name a peer that is none


def spoilt(record: dict) -> Iterator[dict]:
    """A record with each of its fields missing or of a wrong type, one at a time."""
    for name, value in record.items():
        yield {key: record[key] for key in record if key != name}
        for wrong in (None, 5, [], {}, ["x"]):
            yield {**record, name: wrong}
        if isinstance(value, dict):
            yield from ({**record, name: inner} for inner in spoilt(value))
            yield {**record, name: {**value, "unknown": 1}}


@since("s04", until="s04")
@pytest.mark.costly
def test_the_inbox_stays_small(desk: Desk):
    """However much comes in: what is answered goes, but for its id, which is known for a day."""
    desk.up()
    events = [desk.feishu.event(f"/context {'x' * 4000}") for _ in range(450)]
    sizes = []
    with ThreadPoolExecutor(2) as pool:
        for begin in range(0, 450, 30):
            assert set(pool.map(desk.push, events[begin : begin + 30])) == {200}
            desk.feishu.wait_sent(begin + 30)
            sizes.append(inbox(desk).stat().st_size)
    assert max(sizes) < 450 * 4000 and not desk.model.chats
    desk.screens[-1].kill()
    desk.up()
    assert inbox(desk).stat().st_size < 450 * 400
    for event in events[::50]:
        assert desk.push(event) == 200
    assert desk.ask("last").text == "heard last"
    assert len(desk.feishu.sent) == 451


@since("s04", until="s05")
def test_a_full_disk(desk: Desk, telegram: FakeTelegram):
    """What cannot be written down is not taken; with room again, it is answered, and once."""
    both(desk, telegram).kill()
    env = desk.settings() | bot(telegram)
    screen = start(desk, "feishu default", "telegram default", fsize=9000, **env)
    big = desk.feishu.event("\u957f" * 5000)
    for _ in range(2):
        assert 500 <= desk.push(big) < 600
    assert desk.ask("small").text == "heard small"
    telegram.say("\u957f" * 3900)
    wait_until(lambda: lines(screen, "[feishu default]", "full"))
    wait_until(lambda: lines(screen, "[telegram default]", "full"))
    assert desk.ask("small too").text == "heard small too"
    polls = len(telegram.calls)
    telegram.until(lambda: "getUpdates" in [name for name, _ in telegram.calls[polls:]])
    assert telegram.pending() == 1 and desk.asked == ["small", "small too"]
    wait_until(lambda: inbox_is_empty(inbox(desk).parent))
    screen.kill()
    both(desk, telegram)
    assert telegram.wait_sent(1)[0].text.startswith("heard \u957f")
    assert desk.push(big) == desk.push(big) == 200
    desk.feishu.wait_sent(3)
    assert desk.ask("end").text == "heard end"
    assert len(desk.feishu.sent) == 4 and len(telegram.sent) == 1


def records(desk: Desk) -> list[bytes]:
    return inbox(desk).read_bytes().splitlines(keepends=True)


def settle(desk: Desk, count: int) -> None:
    wait_until(lambda: len(records(desk)) == count)


@since("s04", until="s05")
def test_a_disk_that_fills_up_behind_an_answer(desk: Desk):
    """The answer is out, that it is out cannot be noted: the channel lives on, nothing is lost."""
    people = {"ALLOWED_CHATS": "ou_alice ou_bobby"}
    desk.up(**people)
    count = len(records(desk))
    for number in range(1, 13):
        desk.ask("q")
        settle(desk, count + 3 * number)
    added = records(desk)[-3:]
    desk.screens[-1].kill()
    for _ in range(2):
        desk.up(**people)
        desk.screens[-1].kill()
    room = inbox(desk).stat().st_size + sum(map(len, added[:2])) + len(added[2]) // 2
    screen = start(desk, "feishu default", fsize=room, **desk.settings(**people))
    assert desk.ask("q", open_id="ou_bobby").text == "heard q"
    assert 500 <= desk.push(later := desk.feishu.event("later")) < 600
    screen.kill()
    desk.up(**people)
    assert desk.push(later) == 200
    wait_until(lambda: desk.replies[-1] == "heard later")
    assert len(desk.feishu.sent) == 14


# --- nothing that nobody asked for ---

IMPORTED = re.compile(r"\| +(\w+)", re.M)


@pytest.mark.guard
@since("s04")
def test_no_part_of_a_key_is_shown(section, monkeypatch):
    """Not its first half either, where a line is cut; and blanks are no key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-1234")
    monkeypatch.setenv("OTHER_API_KEY", " " * 12)
    explain = section.module.explain
    assert "sk-" not in explain(OSError("x" * 290 + " sk-very-secret-1234"))
    assert explain(OSError("no disk")) == "no disk"


def listening(pid: int) -> list[str]:
    """The local addresses a process listens at, as the kernel writes them."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed by now
            sockets.add(str(link.readlink()))
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table.splitlines()]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@since("s04")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_with_all_channels_off(desk: Desk, section, telegram: FakeTelegram, monkeypatch):
    """Nothing listens, nothing more is shown, nothing is imported, and nothing is said outside."""
    with harness.Screen(section, desk.model.env("brain")) as screen:
        screen.wait_for("you> ")
        say(screen, "hello", "heard hello")
        if section.label == "s04":
            assert listening(screen.pid) == []
        assert not lines(screen, "telegram") and not lines(screen, "feishu")
        say(screen, "quit", "quit")
        assert screen.wait_exit() == 0
    argv = [sys.executable, "-X", "importtime", str(section.path)]
    done = harness.pipe(argv, "hello\nquit\n", desk.model.env("brain"))
    assert "heard hello" in done.stdout
    imported = set(IMPORTED.findall(done.stderr))
    assert "openai" in imported
    assert not {"telegram", "httpx", "cryptography"} & imported
    for name, value in (desk.settings() | bot(telegram)).items():
        monkeypatch.setenv(name, value)
    threads = set(threading.enumerate())
    section.load()
    assert set(threading.enumerate()) <= threads and not telegram.calls and not desk.feishu.calls
