"""The benchmarks know the sections as they are; their figures are nothing to test."""

import sys
from pathlib import Path

import pytest
from harness import NEXT
from harness import REPO
from harness import Section
from harness import sections

BENCH = REPO / "tests" / "bench"


@pytest.mark.parametrize("lesson", sections(NEXT)[-1:], ids=lambda s: s.label)
def test_each_step_of_a_section_runs(
    lesson: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(BENCH))
    import calls
    import disk
    import measure

    with calls.quick_model() as url:
        for name, value in measure.environment(url, tmp_path).items():
            monkeypatch.setenv(name, value)
        arguments = ("section", lesson.path, tmp_path)
        with measure.Peer(*arguments, python=sys.executable) as peer:
            assert {"1", "2000 events", "ten tools", "a tool call"} <= {*peer.steps}
            for step in peer.steps:
                assert peer.timed(step)() > 0
    session = disk.open_log(lesson.module, tmp_path / "s.jsonl")
    session.append(disk.MESSAGE)
    assert (tmp_path / "s.jsonl").read_bytes().endswith(b"}\n")


def test_the_gateway_and_the_echo_that_it_is_measured_by_both_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(BENCH))
    import gateway
    import measure

    lessons = [lesson for lesson in sections(NEXT) if lesson.label >= "s05"]
    env = measure.environment("http://127.0.0.1:9/v1", tmp_path)
    monkeypatch.setattr(gateway, "REQUESTS", 30)
    commands = [["-c", gateway.ECHO], [str(lessons[-1].path)]]
    for command in commands:
        waits = []
        with gateway.served(command, env) as link:
            assert gateway.loading(link, 3, waits)() > 0
        assert len(waits) == 30
