"""README's twelve likeliest failures: each is provoked, and its line is what the scripts print."""

import re
import socket
import sys
from collections.abc import Callable

import pytest
from fake_model import Error
from fake_model import FakeModel
from fake_model import Stall
from fake_model import Text
from harness import REPO
from harness import Screen
from harness import Section
from harness import pipe
from harness import since

TEXT = (REPO / "README.md").read_text(encoding="utf-8")
TABLE = TEXT.partition("### The twelve likeliest")[2].partition("\n### ")[0]
ROWS = re.findall(r"^\| `(.+?)` \|", TABLE, re.M)
NO_TOOLS = {"error": {"message": "registry.ollama.ai/library/x does not support tools"}}


def asks(section: Section, env: dict[str, str], text: str = "hello") -> str:
    """What a section shows that is asked one thing."""
    done = pipe(section, f"{text}\nquit\n", env)
    return done.stdout + done.stderr


def answers(section: Section, model: FakeModel, *items: object, **settings: str) -> str:
    """What a section shows when the server answers so."""
    model.script("m", items, repeat=True)
    return asks(section, model.env("m", **settings))


def without_packages(section: Section, env: dict[str, str]) -> str:
    """What another Python shows than the one that the packages are installed for."""
    return pipe([sys.executable, "-I", "-S", str(section.path)], "", env).stderr


def twice(section: Section, env: dict[str, str]) -> str:
    """What a second process shows in the same workspace."""
    with Screen(section, env) as first:
        first.wait_for("you>")
        return asks(section, env)


def closed_port() -> str:
    """The address of a server that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"


PROVOKED: list[Callable[[Section, FakeModel, dict[str, str]], str]] = [
    lambda section, model, env: asks(section, env),
    lambda section, model, env: without_packages(section, env),
    lambda section, model, env: asks(section, model.env("m", OPENAI_BASE_URL=closed_port())),
    lambda section, model, env: asks(section, model.env("m", OPENAI_BASE_URL="127.0.0.1:8080")),
    lambda section, model, env: asks(section, model.env("e401")),
    lambda section, model, env: asks(section, model.env("no such model")),
    lambda section, model, env: answers(section, model, Error(400, body=NO_TOOLS)),
    lambda section, model, env: asks(section, model.env("e429")),
    lambda section, model, env: answers(section, model, Text("and so", finish="length")),
    lambda section, model, env: answers(section, model, Stall(0, 60), MODEL_TIMEOUT="0.3"),
    lambda section, model, env: asks(section, model.env("text", CONTEXT_TOKENS="900"), "so " * 900),
    lambda section, model, env: twice(section, model.env("text")),
]


def test_there_are_twelve():
    assert len(ROWS) == len(PROVOKED) == 12


@since("s03", until="s08")
@pytest.mark.costly
@pytest.mark.parametrize("number", range(12), ids=lambda n: ROWS[n][:40] if ROWS[n:] else n)
def test_each_is_what_the_scripts_print(
    section: Section, fake_model: FakeModel, env: dict[str, str], number: int
):
    shown = PROVOKED[number](section, fake_model, env)
    line = ".*".join(map(re.escape, ROWS[number].split("...")))
    assert re.search(f"^(agent> )?{line}$", shown, re.M), f"{ROWS[number]}\n--- but:\n{shown}"
