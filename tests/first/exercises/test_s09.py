"""Checks of the exercises of s09."""

import re
from pathlib import Path

import httpx
import openai
from fake_model import Error
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import Section
from harness import pipe

REBOOTED = """
import runpy
import time

before = time.monotonic
time.monotonic = lambda: before() + 1e6
runpy.run_path({!r}, run_name="__main__")
"""
REFUSED = [
    (400, "this cannot be used to generate a picture of a monkey", "format"),
    (400, "temperature must be at most 2, not 429", "format"),
    (422, "the keyword `quota` is not a parameter", "format"),
    (500, "a corrupt key-value cache; the billing of it is under way", "overloaded"),
    (404, "no model of that name, at any rate", "model_not_found"),
    (429, "too many requests with this key", "rate_limit"),
    (401, "this key is unknown, or was used at too high a rate", "auth"),
    (402, "no key for this door: pay", "billing"),
]


def test_s09_rests(script: Section, tmp_path: Path, offline):
    """Add: a rest outlives the program, and a restart of the machine; a success still ends it."""
    rebooted = tmp_path / "s09_rebooted.py"  # as time.monotonic() counts from the machine's start
    rebooted.write_text(REBOOTED.format(str(script.path)), encoding="utf-8")
    spare = offline.env | {"OPENAI_API_KEY_2": "other", "MODEL_ID_2": "offline"}

    def rests(what: Section | Path, *lines: str, env: dict[str, str]) -> list[str]:
        shown = pipe(what, "\n".join([*lines, "quit"]), env).stdout
        found = re.findall(r"^you> /cooldowns\n(.*)", shown, re.M)
        assert len(found) == lines.count("/cooldowns"), f"expected an answer; got {shown!r}"
        return found

    [told] = rests(script, "/simulate-failure auth", "hello", "/cooldowns", env=spare)
    assert "1 auth, again in" in told, f"expected profile 1 to rest; got {told!r}"
    told, then = rests(rebooted, "/cooldowns", "hello", "/cooldowns", env=offline.env)
    left = re.search(r"\b1 auth, again in (\d+) s", told)
    assert left and 400 < int(left[1]) <= 600, f"expected some 600 s after a restart; got {told!r}"
    assert then == "none has to rest", f"expected a success to end the rest; got {then!r}"
    [told] = rests(script, "/cooldowns", env=offline.env)
    assert told == "none has to rest", f"expected it to be over for good; got {told!r}"


def test_s09_words(script: Section):
    """Find: a server refuses one question about keys or rates, and its profile rests for it."""
    request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
    for status, text, reason in REFUSED:
        error = openai.APIStatusError(
            f"Error code: {status} - {text}",
            response=httpx.Response(status, request=request),
            body={"message": text, "code": None},
        )
        found = script.module.classify_failure(error)
        assert found == reason, f"expected {reason} for {status}, {text!r}; got {found}"


def test_s09_twice(script: Section, workspace: Path, fake_model: FakeModel):
    """Find: a 429 in the middle of a turn, another model goes on, and a mail was sent twice."""
    send = ToolCalls([("bash", {"command": "echo sent >> mails.txt"})])

    def goes_on(body: dict) -> Text | ToolCalls:
        return Text("The mail is sent.") if body["messages"][-1]["role"] == "tool" else send

    fake_model.script("first", [send, Error(429)])
    fake_model.script("second", [goes_on], repeat=True)
    env = fake_model.env("first", FALLBACK_MODELS="second", APPROVAL="always")
    shown = pipe(script, "send the mail\nquit\n", env).stdout
    mails = (workspace / "mails.txt").read_text().count("sent")
    assert mails == 1, f"expected one mail; got {mails}"
    assert "The mail is sent." in shown, f"expected the second model's answer; got {shown!r}"
