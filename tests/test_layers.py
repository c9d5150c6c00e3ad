"""The app can grow (s04): what later sections do is done in classes below it, which
override a few methods each.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from conversation import wait_until
from desk import PROMPT
from desk import Desk
from desk import open_desk
from desk import say
from fake_model import FakeModel
from harness import since

LAYERS = """
import queue
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import uuid4

sys.path.insert(0, {tests!r})
import harness

section = harness.load(Path({script!r}))


class IntelligentApp(getattr(section, "GatewayApp", section.App)):
    '''Builds the system prompt, and recalls what fits the message.'''

    def agent_for(self, message):
        agent = super().agent_for(message)
        agent.system = "You are Luna."
        return agent

    def respond(self, agent, message):
        if "door" in message.text:
            agent.system += " Recalled: the door is blue."
        return super().respond(agent, message)


class ProactiveApp(IntelligentApp):
    '''Speaks first, in sessions of its own, when nobody is being answered.'''

    def session_key(self, message):
        if message.channel == "cron":
            return f"agent:main:cron:{{message.peer}}"
        return super().session_key(message)

    def run_background_turn(self, name, prompt):
        if not self.turn_lock.acquire(blocking=False):
            return "people come first"
        try:
            message = section.InboundMessage("cron", "default", name, prompt)
            message.id = uuid4().hex
            answer = self.run_turn(message)
        finally:
            self.turn_lock.release()
        owner = section.InboundMessage("telegram", "default", "42", "", uuid4().hex)
        self.outbox.put(owner, f"{{name}}: {{answer}}")
        return "done"


@section.command("/tick", "run the daily job")
def tick(agent, argument):
    return agent.app.run_background_turn("daily", "any news?")


class Deliveries:
    '''Another outbox: it has one thread for all, and marks what it has sent.'''

    def __init__(self, app):
        self.app = app
        self.waiting = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def put(self, message, answer):
        self.app.inbox.done(message)
        self.waiting.put((message, answer))

    def run(self):
        while True:
            message, answer = self.waiting.get()
            channel = self.app.channels[message.channel, message.account]
            channel.send(message.peer, f"{{answer}} (delivered)")

    def close(self, seconds):
        pass


class DeliveryApp(ProactiveApp):
    '''Sends through a queue of its own.'''

    def __init__(self, agent):
        super().__init__(agent)
        self.outbox = Deliveries(self)


class ConcurrentApp(DeliveryApp):
    '''Answers several people at once, and stops what it does for one of them.'''

    def __init__(self, agent):
        super().__init__(agent)
        self.lanes = defaultdict(threading.Lock)
        self.stopped = set()

    def dispatch(self, message):
        threading.Thread(target=self.process, args=[message], daemon=True).start()

    @contextmanager
    def exclusive(self, message):
        with self.lanes[self.session_key(message)]:
            yield

    def agent_for(self, message):
        agent = super().agent_for(message)
        agent.check_cancelled = partial(self.check_cancelled, agent.session_key)
        return agent

    def check_cancelled(self, key):
        if key in self.stopped:
            raise InterruptedError("on request")

    def respond(self, agent, message):
        answer = super().respond(agent, message)
        if agent.session_key in self.stopped:  # its connection may have ended, too
            self.stopped.remove(agent.session_key)
            answer = "stopped"
        return answer

    def finish_without_turn(self, message):
        if message.text != "/stop":
            return super().finish_without_turn(message)
        self.reply(message, "stopping")
        self.stop(self.session_key(message))
        return True

    def stop(self, key):
        thing = self.waiting_for[key]
        self.stopped.add(key)
        if isinstance(thing, subprocess.Popen):
            section.kill_command(thing)
        else:
            stream = thing.http_response.extensions["network_stream"]
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


open_app = section.open_app
section.open_app = lambda kind, agent: open_app({newest}, agent)
section.main()
"""


@pytest.fixture
def desk(
    section: harness.Section, workspace: Path, fake_model: FakeModel
) -> Iterator[Desk]:
    with open_desk(section, workspace, fake_model) as desk:
        yield desk


def start(desk: Desk, newest: str) -> harness.Screen:
    """A run of the section with the layers on top, up to the newest of them."""
    tests = str(harness.REPO / "tests")
    code = LAYERS.format(tests=tests, script=str(desk.section.path), newest=newest)
    env = desk.model.env("brain", APPROVAL="always", **desk.bot())
    screen = harness.Screen([sys.executable, "-c", code], env)
    desk.screens.append(screen)
    screen.wait_for("[telegram] on")
    return screen


def prompts(desk: Desk) -> list[str]:
    """The system prompt of each request."""
    first_messages = [request.messages[0] for request in desk.model.chats]
    return [each["content"] for each in first_messages if each["role"] == "system"]


@since("s04")
def test_prompts_recall_background_turns_and_another_outbox(desk: Desk):
    screen = start(desk, "DeliveryApp")
    assert desk.ask_telegram("hello") == "heard hello (delivered)"
    assert desk.ask_telegram("the door?") == "heard the door? (delivered)"
    say(screen, "typed", "agent> heard typed")
    luna = "You are Luna."
    assert prompts(desk) == [luna, f"{luna} Recalled: the door is blue.", luna]
    desk.telegram.say("wait here")
    desk.model.wait(4)
    say(screen, "/tick", "people come first")
    desk.gate.set()
    desk.wait_telegram(3)
    say(screen, "/tick", "done")
    desk.wait_telegram(4)
    assert desk.histories()[-1] == ["any news?"]
    say(screen, "/tick", "done")
    desk.wait_telegram(5)
    assert desk.histories()[-1] == ["any news?", "any news?"], "it has its own session"
    news = "daily: heard any news? (delivered)"
    sent = [message.text for message in desk.telegram.sent_to(42)]
    assert sent[2:] == ["heard wait here (delivered)", news, news]
    desk.settle()
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0


@since("s04")
def test_several_turns_at_once_and_stopping_one(desk: Desk):
    screen = start(desk, "ConcurrentApp")
    desk.telegram.say("wait here", 42)
    desk.model.wait(1)
    assert desk.ask_telegram("hello", 43) == "heard hello (delivered)"
    say(screen, "typed", "agent> heard typed")
    assert not desk.telegram.sent_to(42)
    assert desk.ask_telegram("/stop", 42) == "stopping (delivered)"
    desk.wait_telegram(2, 42)
    assert desk.telegram.sent_to(42)[-1].text == "stopped (delivered)"
    assert desk.ask_telegram("next", 42) == "heard next (delivered)"
    assert desk.histories()[-1] == ["next"], "what was stopped is taken back"
    desk.telegram.say("bash touch begun; sleep 600; touch ended", 42)
    wait_until(lambda: (desk.workspace / "begun").exists())
    assert desk.ask_telegram("/stop", 42) == "stopping (delivered)"
    desk.wait_telegram(5, 42)
    assert desk.telegram.sent_to(42)[-1].text == "stopped (delivered)"
    assert desk.ask_telegram("and now?", 42) == "heard and now? (delivered)"
    assert not (desk.workspace / "ended").exists()
    desk.settle()
    assert PROMPT in screen.paper
    screen.press("ctrl-d")
    assert screen.wait_exit() == 0
