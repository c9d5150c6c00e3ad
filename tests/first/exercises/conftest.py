"""Runs checks on a reader's own copy of a section.

python -m pytest tests/first/exercises -k s03 --script mine.py
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import harness
import pytest
from fake_model import FakeModel


def pytest_addoption(parser: pytest.Parser) -> None:
    """The script to check; without it there is nothing to run here."""
    with suppress(ValueError):  # tests/exercises may have added it
        parser.addoption("--script", metavar="PATH", help="your copy, for the exercises")


def script_of(config: pytest.Config) -> Path | None:
    """What --script names; None too in a run of the whole suite, which does not know the option."""
    given = config.getoption("--script", default=None)
    return Path(config.invocation_params.dir, given) if given else None


def pytest_configure(config: pytest.Config) -> None:
    """Stop with a line if there is no script that loads."""
    path = script_of(config)
    if not path:
        return
    if path.suffix != ".py" or not path.is_file():
        raise pytest.UsageError(f"--script {path}: there is no such Python file")
    try:
        harness.load(path)
    except (Exception, SystemExit) as error:  # a script may fail in any way
        told = " ".join(str(error).split())
        raise pytest.UsageError(f"--script {path}: {type(error).__name__}: {told}") from None


def pytest_xdist_auto_num_workers() -> int:
    """None: to start them takes longer than the checks."""
    return 0


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Nothing here is a test of the suite."""
    return None if script_of(config) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Show of a check that failed what was asked, and what came, not how it was found out."""
    report = yield
    error = call.excinfo and call.excinfo.value
    if isinstance(error, AssertionError | pytest.fail.Exception):
        task = (item.obj.__doc__ or item.name).splitlines()[0]
        report.longrepr = f"{task}\n{str(error).partition(chr(10) + 'assert ')[0]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why nothing ran, to who asked for these checks."""
    config = terminalreporter.config
    paths = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    named = any(path.is_relative_to(Path(__file__).parent) for path in paths)
    if named and not script_of(config):
        terminalreporter.line("These checks want your copy: add --script path/to/mine.py")


@pytest.fixture
def script(request: pytest.FixtureRequest) -> harness.Section:
    """The reader's copy of a section."""
    return harness.Section(script_of(request.config))


@pytest.fixture
def fake_model(env: dict[str, str]) -> Iterator[FakeModel]:
    """A scripted model server; whether it had to refuse a request is for the check to judge."""
    with FakeModel(env) as server:
        yield server
