"""Each section starts and answers: over a pipe, and on a terminal."""

import harness
import pytest
from harness import Screen

TALK = [
    ("my cat is Miso", "agent> Noted: your cat is Miso."),
    ("what is my cat?", "agent> Your cat is Miso."),
]
each_section = pytest.mark.parametrize("lesson", harness.sections(), ids=lambda s: s.label)


@pytest.mark.guard
@each_section
def test_over_a_pipe(lesson: harness.Section, offline):
    questions = "".join(f"{question}\n" for question, _ in TALK)
    done = harness.pipe(lesson, questions, offline.env, cold=True)
    assert (done.returncode, done.stderr) == (0, "")
    for _, answer in TALK:
        assert answer in done.stdout


@pytest.mark.guard
@each_section
def test_on_a_terminal(lesson: harness.Section, offline):
    with Screen(lesson, offline.env) as screen:
        for question, answer in TALK:
            screen.wait_for("you> ")
            screen.type(f"{question}\n")
            screen.wait_for(answer)
        screen.wait_for("you> ")
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
