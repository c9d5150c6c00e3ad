"""Conversations with a section: questions that choose their answers, and what was said.

Most tests ask many questions in one run: `play` gives each its own answer or fault, and
asks something harmless after it.
"""

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from fake_model import FakeModel
from fake_model import Item
from fake_model import Request
from fake_model import Text
from harness import Screen
from harness import Section
from harness import pipe

KEY = "sk-very-secret-1234"
PROMPT = re.compile(r"^you> ", re.M)
GOOD = {"choices": [{"delta": {"content": "good"}, "finish_reason": "stop"}]}


def env_for(fake_model: FakeModel, **more: str) -> dict[str, str]:
    """The environment for a scripted model, with a key that no output may contain."""
    return fake_model.env(**{"model": "any", "OPENAI_API_KEY": KEY} | more)


def wait_until(condition: Callable[[], Any], timeout: float = 10) -> None:
    """Wait for something that only another process or thread can bring about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout} s"
        time.sleep(0.01)


# --- who answers ---


def script(fake_model: FakeModel, answers: dict[str, Any]) -> None:
    """Let the question choose the answer: an item, or a list of one for each call.

    Any other question, and any call after the last one of a list, is answered well.
    """
    left = {}
    for question, items in answers.items():
        left[question] = iter(items) if isinstance(items, list) else None

    def answer(body: dict) -> Item:
        question = asked(body["messages"])
        fine = Text(f"fine: {question}")
        if left.get(question) is None:
            return answers.get(question, fine)
        return next(left[question], fine)

    fake_model.script(None, [answer], repeat=True)


@contextmanager
def raw_server(answers: dict[str, bytes | Sequence[bytes]]) -> Iterator[str]:
    """A server that answers the last question with bytes, as they are."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=16)

    def serve() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                head = b"".join(iter(reader.readline, b"\r\n"))
                if size := re.search(rb"(?i)content-length: (\d+)", head):
                    message = json.loads(reader.read(int(size[1])))["messages"][-1]
                    answer = answers.get(message["content"])
                    connection.sendall(
                        stream(event(GOOD)) if answer is None else answer
                    )

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def event(chunk: dict, end: bytes = b"\n") -> bytes:
    """A chunk as an event of a stream; characters stay as they are."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + end * 2


def stream(*blocks: bytes) -> bytes:
    """A streamed answer whose body a client reads in exactly these blocks."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
    )
    body = b"".join(b"%x\r\n%b\r\n" % (len(block), block) for block in blocks)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


# --- what was said ---


def asked(messages: list[dict]) -> str:
    """The last thing a person said."""
    return [m["content"] for m in messages if m["role"] == "user"][-1]


def spoken(request: Request) -> list[tuple[str, str]]:
    """The history of a request without its system prompt."""
    messages = request.messages
    return [(m["role"], m["content"]) for m in messages if m["role"] != "system"]


def replies(shown: str) -> list[tuple[str, str]]:
    """Each question with all that was shown before the next prompt."""
    found = []
    for block in PROMPT.split(shown)[1:]:
        question, _, text = block.partition("\n")
        if question:
            found.append((question, text.strip().removeprefix("agent>").strip()))
    return found


def play(section: Section, env: dict, questions: list[str]) -> dict[str, str]:
    """Ask each question, and a harmless one after it, over a pipe. Returns the replies.

    After a crash, the rest is asked in a new run; the crashes fail the test in the end.
    """
    rest = list(questions)
    shown: dict[str, str] = {}
    crashes = []
    while rest:
        done = pipe(
            section, "".join(f"{q}\nafter {q}\n" for q in rest), env, timeout=90
        )
        assert KEY not in done.stdout + done.stderr
        found = replies(done.stdout)
        shown |= dict(found)
        if (done.returncode, done.stderr) == (0, "") and len(found) == 2 * len(rest):
            break
        last = found[-1][0].removeprefix("after ") if found else rest[0]
        error = " ".join(done.stderr.splitlines()[-1:])
        crashes.append(f"{last}: exit status {done.returncode}. {error}")
        rest = rest[rest.index(last) + 1 :]
    assert not crashes, "it ended at:\n" + "\n".join(crashes)
    return shown


def ask_over_a_pipe(
    section: Section, env: dict, questions: list[str]
) -> dict[str, str]:
    """Ask the questions over a pipe. Returns the replies."""
    done = pipe(section, "".join(f"{question}\n" for question in questions), env)
    assert (done.returncode, done.stderr) == (0, "")
    return dict(replies(done.stdout))


def ask_on_a_terminal(
    section: Section, env: dict, questions: list[str]
) -> dict[str, str]:
    """Ask the questions on a pseudo-terminal. Returns the replies."""
    with Screen(section, env) as screen:
        for question in questions:
            screen.wait_for(PROMPT)
            screen.type(f"{question}\n")
        screen.wait_for(PROMPT)
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
        assert "Traceback" not in screen.text
        return dict(replies(screen.text))


def check_turn(
    fake_model: FakeModel, shown: dict, question: str, text: str | None = None
) -> None:
    """A turn with `text` succeeded, one with None failed, and the next went well."""
    reply = shown[question]
    after = f"after {question}"
    assert shown[after].endswith(f"fine: {after}"), question
    last_request = [r for r in fake_model.chats if asked(r.messages) == after][-1]
    kept = ("user", question) in spoken(last_request)
    if text is None:
        last_line = reply.rpartition("\n")[2]
        assert re.fullmatch(r"\[.{5,}\]", last_line), f"{question}: {reply!r}"
        assert not kept, f"{question}: taken back, yet sent again"
    else:
        assert reply.startswith(text) and (text or kept), f"{question}: {reply!r}"
        assert kept, f"{question}: answered, yet forgotten"
