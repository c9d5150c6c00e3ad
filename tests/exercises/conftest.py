"""Runs the check of an exercise on a reader's own copy of a section.

python -m pytest tests/exercises -k s01_stuck --script mine_stuck.py
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import harness
import pytest
from fake_model import FakeModel

HERE = Path(__file__).parent
HOW = "These checks need your script and an exercise: -k s01_stuck --script mine.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the script to check."""
    about = "your copy of a section, for the exercises"
    with suppress(ValueError):  # tests/first/exercises may have added it
        parser.addoption("--script", metavar="PATH", help=about)


def script_of(config: pytest.Config) -> Path | None:
    """What --script names. None if it is not given."""
    given = config.getoption("--script", default=None)
    if not given:
        return None
    return Path(config.invocation_params.dir, given)


def pytest_configure(config: pytest.Config) -> None:
    """Stop with one line unless the script loads and -k names an exercise."""
    path = script_of(config)
    if not path:
        return
    if path.suffix != ".py" or not path.is_file():
        raise pytest.UsageError(f"--script {path}: there is no such Python file")
    if not config.getoption("keyword"):
        raise pytest.UsageError(HOW)
    try:
        harness.load(path)
    except (Exception, SystemExit) as error:  # a script may fail in any way
        reason = " ".join(str(error).split())
        problem = f"--script {path}: {type(error).__name__}: {reason}"
        raise pytest.UsageError(problem) from None


def pytest_xdist_auto_num_workers() -> int:
    """No workers: starting them takes longer than the checks."""
    return 0


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without a script there is nothing to check here."""
    if script_of(config):
        return None
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator:
    """Of a failed check, show the task and what was expected, not how it was tested."""
    report = yield
    error = call.excinfo and call.excinfo.value
    if isinstance(error, AssertionError | pytest.fail.Exception):
        task = (item.obj.__doc__ or item.name).splitlines()[0]
        reason = str(error).partition("\nassert ")[0]
        report.longrepr = f"{task}\n{reason}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell a person who asks for these checks without a script what is missing."""
    config = terminalreporter.config
    for argument in config.args:
        path = Path(argument.partition("::")[0]).resolve()
        if path.is_relative_to(HERE) and not script_of(config):
            terminalreporter.line(HOW)
            return


@pytest.fixture
def script(request: pytest.FixtureRequest) -> harness.Section:
    """The reader's copy of a section."""
    return harness.Section(script_of(request.config))


@pytest.fixture
def fake_model(env: dict[str, str]) -> Iterator[FakeModel]:
    """A scripted model server. A check says itself whether it may refuse a request."""
    with FakeModel(env) as server:
        yield server
