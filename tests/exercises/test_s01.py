"""Checks of the exercises of s01."""

from fake_model import Error
from fake_model import FakeModel
from fake_model import Text
from harness import Section
from harness import pipe

PROMPT = "You are Luna, a patient gardener."


def ask(
    script: Section,
    fake_model: FakeModel,
    items: list,
    *questions: str,
    **settings: str,
) -> list[str]:
    """What the screen shows after each question. The items are the model's answers."""
    fake_model.script(None, items, repeat=True)
    typed = "".join(f"{question}\n" for question in questions)
    done = pipe(script, typed, fake_model.env(**settings))
    shown = done.stdout.split("you> ")[1:]
    problem = f"expected a prompt after each question; got {done}"
    assert len(shown) > len(questions), problem
    return shown


def test_s01_system(script: Section, fake_model: FakeModel):
    """Add: what SYSTEM_PROMPT says stands before the conversation in every request."""
    answer = [Text("Yes.")]
    ask(script, fake_model, answer, "one?", "two?", SYSTEM_PROMPT=PROMPT)
    system = {"role": "system", "content": PROMPT}
    for number, request in enumerate(fake_model.chats, 1):
        first = request.messages[0]
        problem = f"request {number}: expected {system} first; got {first}"
        assert first == system, problem
        count = [message["role"] for message in request.messages].count("system")
        assert count == 1, f"request {number}: expected one system message; got {count}"
    ask(script, fake_model, answer, "three?")
    sent = fake_model.chats[-1].messages
    plain = [{"role": "user", "content": "three?"}]
    assert sent == plain, f"expected {plain} without SYSTEM_PROMPT; got {sent}"


def test_s01_usage(script: Section, fake_model: FakeModel):
    """Add: show below each answer how many tokens it took, such as [23 tokens]."""
    usage = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}
    answers = [Text("Yes.", usage=usage), Text("No.")]
    first, second, *_ = ask(script, fake_model, answers, "one?", "two?")
    below = first.partition("Yes.")[2]
    is_shown = "23" in below and "token" in below
    assert is_shown, f"expected 23 tokens below the answer; got {first!r}"
    assert "token" not in second, f"expected no count if none is sent; got {second!r}"
    sent = [message["content"] for message in fake_model.chats[-1].messages]
    wanted = ["one?", "Yes.", "two?"]
    assert sent == wanted, f"expected the history to be {wanted}; got {sent}"


def test_s01_stuck(script: Section, fake_model: FakeModel):
    """Find: after one question has failed, the server refuses every question."""
    answers = [Error(500), Text("Better.")]
    _, second, *_ = ask(script, fake_model, answers, "one?", "two?")
    assert "Better." in second, f"expected an answer to the second one; got {second!r}"
