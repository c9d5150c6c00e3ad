"""Fixtures of the suite: see harness.py and fake_model.py for what they give."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest
from fake_model import FakeModel

FIRST = Path(__file__).parent / "first"
FIRST_SECTIONS = harness.sections()
NEXT_SECTIONS = harness.sections(harness.NEXT)
ROOM = 2 << 30  # bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Without the option, a test runs whole on its first section, and in samples on the
    last.
    """
    about = "run each test whole on each section that it holds for"
    parser.addoption("--every-section", action="store_true", help=about)


def pytest_configure() -> None:
    """Keep what tests write in memory where there is room: no test waits for another's
    disk.
    """
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than cores: a test waits for much of its time, for a screen or a
    clock.
    """
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(allowed(0)) + 1


def is_below_first(path: Path) -> bool:
    return path.is_relative_to(FIRST)


def sections_for(test: pytest.Item) -> list[harness.Section]:
    """The ladder that a test is about: tests/first has one of its own."""
    return FIRST_SECTIONS if is_below_first(test.path) else NEXT_SECTIONS


def wanted(test: pytest.Item, every: bool = True) -> list[harness.Section]:
    """The sections that a test holds for, from its `since` mark; or the first and last
    of them.
    """
    first, last = "s01", None
    if mark := test.get_closest_marker("since"):
        first, last = mark.args[0], mark.kwargs.get("until")
    for label in (first, last or first):
        if not re.fullmatch(r"s\d\d", label):
            raise pytest.UsageError(f"since({label!r}): write a label such as s01")
    found = [
        s
        for s in sections_for(test)
        if first <= s.label and (not last or s.label <= last)
    ]
    return found if every else [*found[:1], *found[1:][-1:]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `section` once for each section it holds for."""
    if "section" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-section")
        found = wanted(metafunc.definition, every)
        if is_below_first(metafunc.definition.path) and not names_first(
            metafunc.config
        ):
            found = found[-1:]  # of the first ladder, its last section has all
        costly = metafunc.definition.get_closest_marker("costly")
        if costly and not every and not costly.kwargs.get("last"):
            found = found[:1]
        metafunc.parametrize("section", found, ids=lambda s: s.label, indirect=True)


def is_first(item: pytest.Item) -> bool:
    """Whether a test runs on the section that earns it."""
    mark = item.get_closest_marker("since")
    return not mark or item.callspec.params["section"].label == wanted(item)[0].label


def has_no_case(item: pytest.Item) -> bool:
    """Whether a test takes `section`, and the sections that it holds for are not there
    yet.
    """
    return "section" in item.fixturenames and not wanted(item)


def names_first(config: pytest.Config) -> bool:
    """Whether the command line names tests/first, or something in it."""
    paths = [
        Path(config.invocation_params.dir, arg.partition("::")[0])
        for arg in config.args
    ]
    return any(is_below_first(path.resolve()) for path in paths)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out what has no case, and of tests/first all but the guards, unless it is
    named.

    On a test's last section, run it in samples: its first section has run all. What
    takes long begins first, so that no worker is left alone with it in the end.
    """
    items.sort(key=lambda item: not item.get_closest_marker("costly"))
    whole_first = names_first(config)
    whole_last = config.getoption("--every-section")
    seen: dict[str, int] = {}
    kept, left_out = [], []
    for item in items:
        is_guard = item.get_closest_marker("guard") or not is_below_first(item.path)
        if has_no_case(item) or not (is_guard or whole_first):
            left_out.append(item)
            continue
        callspec = getattr(item, "callspec", None)
        section = callspec.params.get("section") if callspec else None
        if section and not whole_last and not is_first(item):
            # Of the parameter sets of a test every third; of other tests every second,
            # but of the first ladder all.
            has_parameters = len(callspec.params) > 1
            key = item.nodeid.split("[")[0] if has_parameters else str(item.path)
            seen[key] = seen.get(key, -1) + 1
            every_other = 1 if is_below_first(item.path) else 2
            if seen[key] % (3 if has_parameters else every_other):
                left_out.append(item)
                continue
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that does not take `section` until the section that earns it is
    there.
    """
    mark = item.get_closest_marker("since")
    if mark and not wanted(item):
        pytest.skip(f"no section from {mark.args[0]} on yet")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the process that sections were started from."""
    harness.MOTHER.end()


@pytest.fixture
def section(request: pytest.FixtureRequest) -> harness.Section:
    """The section under test."""
    return request.param


@pytest.fixture
def whole(request: pytest.FixtureRequest, section: harness.Section) -> bool:
    """Whether a test of many rounds runs them all here; if not, some will do."""
    config, test = request.config, request.node
    is_mere_guard = is_below_first(test.path) and not names_first(config)
    return config.getoption("--every-section") or (is_first(test) and not is_mere_guard)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A fresh copy of the files that ship in workspace/; `env` names it in
    WORKSPACE_DIR.
    """
    target = tmp_path / "workspace"
    target.mkdir()
    for path in harness.shipped_files("workspace"):
        copy = tmp_path / path.relative_to(harness.REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return target


@pytest.fixture
def env(tmp_path: Path, workspace: Path) -> dict[str, str]:
    """A clean environment with no key: nothing of the developer's own gets in."""
    home = tmp_path / "home"
    home.mkdir()
    return harness.clean_env(home, workspace)


@dataclass
class Offline:
    """The offline model while it serves: its address, and an environment that points to
    it.
    """

    url: str
    env: dict[str, str]


@pytest.fixture
def offline(env: dict[str, str]) -> Iterator[Offline]:
    """The stand-in model that ships with the tutorial, answering at once."""
    path = harness.REPO / "sessions" / "offline_model.py"
    if not path.exists():
        pytest.skip("there is no sessions/offline_model.py yet")
    server = harness.load(path).serve(port=0, pace=0)
    settings = {
        "OPENAI_API_KEY": "offline",
        "OPENAI_BASE_URL": server.url,
        "MODEL_ID": "offline",
    }
    yield Offline(server.url, env | settings)
    server.shutdown()
    server.server_close()


@pytest.fixture
def fake_model(env: dict[str, str]) -> Iterator[FakeModel]:
    """A scripted model server; a request it had to refuse fails the test at its end."""
    with FakeModel(env) as server:
        yield server
    assert not server.problems, "\n".join(server.problems)
