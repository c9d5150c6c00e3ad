"""The checkers, on made-up sections and docs: each must see what is wrong."""

import os
from pathlib import Path

import check_docs
import check_steps
import pytest
import transcripts
from harness import Section
from harness import shipped_files

HEAD = """# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "python-dotenv>=1.2",
# ]
# ///
"""
ONE = f'''{HEAD}"""s01: one."""

import sys

from dotenv import load_dotenv

# --- s01: the loop ---

NOTES = {{"a": 1}}


class Agent:
    """Something with state."""

    limit = 3

    def ask(self, text):
        return text.upper()


def answer(text):
    if text:
        return Agent().ask(text)
    return ""


# --- main ---


def main():
    load_dotenv()
    print("made-up section")
    while True:
        try:
            text = input("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        print("agent>", answer(text), flush=True)


if __name__ == "__main__":
    sys.exit(main())
'''
TWO = ONE.replace("s01: one.", "s02: two.").replace(
    "# --- main ---",
    """# --- s02: the tools ---

TOOLS = {}


def tool(*names):
    return lambda function: function


@tool("read", "/read [file]")
def read(path):
    return path


# --- main ---""",
)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Section, Section]:
    """Two sections that keep all rules."""
    folder = tmp_path / "sessions" / "en"
    folder.mkdir(parents=True)
    for name, text in (("s01_one.py", ONE), ("s02_two.py", TWO)):
        (folder / name).write_text(text, encoding="utf-8")
    return Section(folder / "s01_one.py"), Section(folder / "s02_two.py")


def edit(section: Section, old: str, new: str) -> None:
    """Change a text that must be there."""
    assert old in section.source
    section.path.write_text(section.source.replace(old, new, 1), encoding="utf-8")


# --- steps ---


def test_what_keeps_the_rules_passes(pair: tuple[Section, Section]):
    one, two = pair
    assert not list(check_steps.size_problems(None, one, 49))
    assert not list(check_steps.size_problems(one, two, 20))
    assert not list(check_steps.survival_problems(one, two, 0.95))
    assert not list(check_steps.touch_problems(one, two, {}))
    assert not list(check_steps.band_problems(one, two, "the tools"))
    assert not list(check_steps.place_problems(one, two, {}))
    assert not list(check_steps.header_problems(two))
    assert not list(check_steps.standalone_problems(two))
    assert not list(check_steps.encoding_problems(two.path))


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('NOTES = {"a": 1}', 'NOTES = {"a": 2}', "NOTES"),
        ('NOTES = {"a": 1}', 'NOTES = {"a": 1}\nNOTES["b"] = 2', "NOTES"),
        ("limit = 3", "limit = 4", "Agent"),
        ("class Agent:", "@final\nclass Agent:", "Agent"),
        ("text.upper()", "text.lower()", "Agent.ask"),
        ("    def ask", "    @cached\n    def ask", "Agent.ask"),
        (
            "def ask(self, text):",
            "def new(self):\n        pass\n\n    def ask(self, text):",
            "Agent",
        ),
        ('    return ""', '    return "?"', "answer"),
        ("def answer", "def reply", "answer"),
        ("sys.exit(main())", "main()", "__main__"),
    ],
)
def test_touches_are_seen_both_ways(
    pair: tuple[Section, Section], old: str, new: str, name: str
):
    one, two = pair
    edit(two, old, new)
    assert check_steps.touched(one.source, two.source) == {name}
    assert not list(check_steps.touch_problems(one, two, {name: "why"}))
    (missing,) = check_steps.touch_problems(one, two, {})
    assert f'add "{name}" = ' in missing
    (extra,) = check_steps.touch_problems(one, two, {name: "why", "other": "why"})
    assert "does not change other" in extra


def test_comments_imports_and_docstrings_at_the_top_are_free(
    pair: tuple[Section, Section],
):
    one, two = pair
    edit(two, "import sys\n", "import os\nimport sys\n")
    edit(two, 'NOTES = {"a": 1}', 'NOTES = {"a": 1}  # why')
    assert check_steps.touched(one.source, two.source) == set()


def test_a_script_is_measured(tmp_path: Path):
    """A docstring is no line of code, an expression in it is one node."""
    path = tmp_path / "s01_a.py"
    path.write_text('"""Two\n\nlines."""\n\n# no code\nx = 1 if y else 2\n', "utf-8")
    size = check_steps.measure(path.read_text(encoding="utf-8"))
    assert (size.lines, size.nodes, size.knots) == (1, 9, 1)
    assert not list(check_steps.density_problems(path, 9, 100))
    dense, tangled = check_steps.density_problems(path, 8.9, 99)
    assert "9.00 nodes a line" in dense and "100.0 knots" in tangled
    assert list(check_steps.budget_problems(None, Section(path), 8))
    assert not list(check_steps.budget_problems(Section(path), Section(path), 0))
    path.write_text(
        "class A:\n    def f(self):\n        pass\n\n        pass\n", "utf-8"
    )
    assert not list(check_steps.length_problems(path, 4))
    (problem,) = check_steps.length_problems(path, 3)
    assert problem.endswith("f has 4 lines, at most 3")


def test_titles_are_seen(pair: tuple[Section, Section]):
    one, _ = pair
    (problem,) = check_steps.title_problems(one, "one", "go")
    assert "begins with 's01: one.', not 's01: One - go.'" in problem
    edit(one, "s01: one.", "s01: One - go.")
    assert not list(check_steps.title_problems(one, "one", "go"))


def test_sizes_are_seen(pair: tuple[Section, Section]):
    one, two = pair
    edit(
        two,
        "    limit = 3\n\n    def ask(self, text):\n        return text.upper()\n",
        "",
    )
    (problem,) = check_steps.survival_problems(one, two, 0.95)
    assert "survive, at least 95%" in problem
    assert "-     limit = 3" in problem
    edit(one, "NOTES", "x = 1\n" * 150 + "NOTES")
    (problem,) = check_steps.size_problems(None, one, 150)
    assert "at most 150" in problem
    edit(two, "TOOLS = {}", "".join(f"A{n} = {n}\n" for n in range(315)))
    (problem,) = check_steps.size_problems(one, two, 305)
    assert "at most 305" in problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "# --- s01: the loop ---",
            "# --- s01: the old loop ---",
            "of s01 is gone or has changed",
        ),
        ("# --- s02: the tools ---\n", "", "the bands are"),
        ("# --- main ---\n", "", "the bands are"),
        ("TOOLS = {}", "# --- helpers", "not a band label"),
        ("s02: the tools", "s02: tools", "no label '# --- s02: the tools ---'"),
    ],
)
def test_bands_are_seen(pair: tuple[Section, Section], old: str, new: str, said: str):
    edit(pair[1], old, new)
    assert any(
        said in problem for problem in check_steps.band_problems(*pair, "the tools")
    )


def test_places_are_seen(pair: tuple[Section, Section]):
    edit(pair[1], "class Agent", "LIMIT = 1\n\n\nclass Agent")
    (problem,) = check_steps.place_problems(*pair, {})
    assert "LIMIT" in problem
    assert not list(check_steps.place_problems(*pair, {"LIMIT": "why"}))
    (problem,) = check_steps.place_problems(*pair, {"LIMIT": "why", "TOOLS": "why"})
    assert "remove TOOLS" in problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "import sys\n",
            "import sys\n\nimport httpx\n",
            "imports httpx, which its header",
        ),
        (
            "from dotenv import load_dotenv",
            "",
            "lists python-dotenv, which it does not",
        ),
        (">=3.11", ">=3.9", "requires-python"),
        ("#     ", '#     "x>=1", ', "does not stand on a line of its own"),
        ('"python-dotenv>=1.2"', '"python-dotenv"', "no lower bound"),
        ("# /// script", "# ///", "does not begin with"),
    ],
)
def test_headers_are_seen(pair: tuple[Section, Section], old: str, new: str, said: str):
    edit(pair[1], old, new)
    assert any(said in problem for problem in check_steps.header_problems(pair[1]))


def test_requirements_are_seen(pair: tuple[Section, Section], tmp_path: Path):
    listing = tmp_path / "requirements.txt"
    listing.write_text("# all\nPython_Dotenv>=1.2\n", encoding="utf-8")
    assert not list(check_steps.requirement_problems(pair, tmp_path))
    listing.write_text("python-dotenv>=1.3\nhttpx>=1\n", encoding="utf-8")
    found = list(check_steps.requirement_problems(pair, tmp_path))
    assert [problem.split()[0] for problem in found] == [
        "s01",
        "s02",
        "requirements.txt",
    ]


@pytest.mark.parametrize(
    "line", ["import s01_one", "from .s01_one import x", "import sessions.en"]
)
def test_imports_of_sections_are_seen(pair: tuple[Section, Section], line: str):
    edit(pair[1], "import sys\n", f"import sys\n{line}\n")
    assert any(
        "stands alone" in problem
        for problem in check_steps.standalone_problems(pair[1])
    )


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("open('x')", False),
        ("open('x', 'w')", False),
        ("open('x', 'rb')", True),
        ("open('x', mode='ab')", True),
        ("open('x', encoding='utf-8')", True),
        ("path.open()", False),
        ("path.open('wb')", True),
        ("path.read_text()", False),
        ("path.read_text(encoding='utf-8')", True),
        ("path.write_text('x')", False),
        ("path.read_bytes()", True),
        ("os.open('x', 0)", True),
    ],
)
def test_encodings_are_seen(pair: tuple[Section, Section], line: str, fine: bool):
    edit(pair[1], "    return path", f"    return {line}")
    assert bool(list(check_steps.encoding_problems(pair[1].path))) != fine


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pass", ""),
        ("print('hi')", "prints 'hi'"),
        ("open('made.txt', 'w').close()", "made.txt"),
        ("import socket; socket.socket()", "socket.__new__"),
        (
            "import threading; threading.Thread(target=input, daemon=True).start()",
            "thread",
        ),
        ("load_dotenv('.env')", ".env"),
        ("import os; os.environ['X'] = 'y'", "the environment changed"),
        ("raise OSError('no')", "OSError: no"),
    ],
)
def test_effects_of_an_import_are_seen(
    pair: tuple[Section, Section],
    tmp_path: Path,
    env: dict[str, str],
    workspace: Path,
    line: str,
    said: str,
):
    edit(pair[1], "NOTES", f"{line}\nNOTES")
    found = list(check_steps.import_effects(pair[1], tmp_path, env, workspace))
    assert any(said in problem for problem in found) if said else not found


# --- docs ---

DOC = """# s02: tools

## What changes

**8 lines added, 1 gone**

New names: `TOOLS`, `read`,
`/read`.
Touched: nothing.

```python
class Agent:
    ...
    def ask(self, text):
        return text.upper()
```

```python
if text:
    return Agent().ask(text)
```
"""


def test_a_true_doc_passes(pair: tuple[Section, Section]):
    one, two = pair
    assert not list(check_docs.excerpt_problems(DOC, two.source))
    assert not list(check_docs.figure_problems(DOC, one, two))
    assert not list(check_docs.name_problems(DOC, one, two, {}))
    assert not list(check_docs.figure_problems("**49 lines**", None, one))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("text.upper()", "text.lower()"),
        ("    def ask", "def ask"),
        ("    ...\n", ""),
        ("    return Agent", "return Agent"),
        (
            "if text:\n    return Agent().ask(text)",
            "return Agent().ask(text)\nif text:",
        ),
    ],
)
def test_excerpts_are_seen(old: str, new: str):
    assert old in DOC
    (problem,) = check_docs.excerpt_problems(DOC.replace(old, new), TWO)
    assert "does not stand in the script" in problem


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "**8 lines added, 1 gone**",
            "**9 lines added, 1 gone**",
            "must say **8 lines added, 1",
        ),
        ("**8 lines added, 1 gone**", "", "must say **8 lines added, 1 gone**"),
        ("`TOOLS`", "`NOTES`", "NOTES is not new"),
        ("`/read`", "`/write`", "/write is not new"),
        ("New names:", "New:", "New names:"),
        ("nothing", "`main`", "Touched: ['main']"),
        ("nothing", "a little", "must say nothing"),
        ("Touched:", "Changed:", "Touched:"),
    ],
)
def test_figures_and_names_are_seen(
    pair: tuple[Section, Section], old: str, new: str, said: str
):
    doc = DOC.replace(old, new)
    found = [
        *check_docs.figure_problems(doc, *pair),
        *check_docs.name_problems(doc, *pair, {}),
    ]
    assert any(said in problem for problem in found)


def test_touched_names_are_those_of_the_steps(pair: tuple[Section, Section]):
    doc = DOC.replace("nothing.", "`main`, `Agent.ask`.")
    touches = {"main": "why", "Agent.ask": "why"}
    assert not list(check_docs.name_problems(doc, *pair, touches))
    assert list(check_docs.name_problems(doc, *pair, {"main": "why"}))


@pytest.mark.parametrize(
    ("doc", "problem"),
    [
        ("x " * 51, "line 1 has 102 columns"),
        ("```json\n[1, 2]\n{}\n```\n", ""),
        ("```json\n[1, 2\n```\n", "line 1: this block is no JSON"),
        ("```jsonl\n{}\n{\n```\n", "line 3: this line is no JSON"),
        ('```json\n{"function": {"name": "read"}}\n```\n', ""),
        (
            '```json\n{"function": {"name": "read", "parameters": {}}}\n```\n',
            "read is None in the script",
        ),
        ("`MAX_WORDS` is 3, and `MAX_ROUNDS`\nis 2,500.\n", ""),
        ("`MAX_ROUNDS` is 25.\n", "MAX_ROUNDS is 2500, not 25"),
        ("`read_file`, `AnswerText`, `plain`, `a.read_file()`\n", ""),
        ("`reed_file`\n", "`reed_file` is not in the code"),
        ("`AnserText()`\n", "`AnserText()` is not in the code"),
    ],
)
def test_data_and_names_are_checked(doc: str, problem: str):
    values = {"MAX_WORDS": 3, "MAX_ROUNDS": 2500}
    found = [
        *check_docs.width_problems(doc),
        *check_docs.json_problems(doc),
        *check_docs.constant_problems(doc, values),
        *check_docs.stale_name_problems(doc, ["read_file AnswerText", *values]),
    ]
    if not found:
        found = list(check_docs.schema_problems(doc, []))
    assert len(found) == bool(problem), found
    assert problem in "".join(found)


def test_a_chapter_ends_where_the_next_begins():
    doc = "# A\n\n## B\nb\n### C\nc\n## D\nd\n"
    assert check_docs.chapter(doc, "B") == "B\nb\n### C\nc\n"
    assert check_docs.chapter(doc, "D") == "D\nd\n"
    assert check_docs.chapter(doc, "E") == ""


def test_shape_is_seen():
    headings = ["The problem", "Try it", "Next"]
    doc = "".join(f"## {heading}\ntext\n" for heading in headings)
    assert not list(check_docs.length_problems(doc, range(6, 7)))
    assert "6 lines, not 7 to 8" in next(check_docs.length_problems(doc, range(7, 9)))
    assert not list(check_docs.heading_problems(doc, headings))
    assert not list(check_docs.heading_problems(doc, ["Try it", "Next"]))
    assert "no heading" in next(check_docs.heading_problems(doc, [*headings, "Then"]))
    (problem,) = check_docs.heading_problems(doc, ["Next", "Try it"])
    assert "order" in problem


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("[a](other.md)", True),
        ("[a](other.md#part-one-call_model)", True),
        ("[a](other.md#part-two)", False),
        ("[a](#here)", True),
        ("[a](#there)", False),
        ("[a](missing.md)", False),
        ("[a](../../outside.md)", False),
        ("[a](https://example.org/x)", True),
        ("`[a](missing.md)`", True),
        ("```text\n[a](missing.md)\n```", True),
        ("`sessions/doc.md`", True),
        ("`sessions/missing.py`", False),
        ("`python sessions/missing.py s01`", False),
        ("`sessions/en/sNN_*.py`", True),
    ],
)
def test_links_and_paths_are_seen(tmp_path: Path, text: str, fine: bool):
    folder = tmp_path / "sessions"
    folder.mkdir()
    other = "# Part one: `call_model`\n"
    (folder / "other.md").write_text(other, encoding="utf-8")
    doc = folder / "doc.md"
    doc.write_text(f"# Here\n\n{text}\n", encoding="utf-8")
    found = [
        *check_docs.link_problems(doc, tmp_path),
        *check_docs.path_problems(doc, tmp_path),
    ]
    assert bool(found) != fine, found


README = """
    python sessions/offline_model.py s01
    python -m pytest

| section | idea | lines |
|---|---|---|
| [s01](sessions/en/s01_one.md) | the loop | 49 |
| s02 | tools | 63 |
"""


def test_readme_is_checked(pair: tuple[Section, Section]):
    assert not list(check_docs.readme_problems(README, pair))
    for old, new in (
        ("| 49 |", "| 48 |"),
        ("| s02 |", "| s03 |"),
        ("pytest", "x"),
        ("s01\n", "\n"),
    ):
        assert list(check_docs.readme_problems(README.replace(old, new, 1), pair)), old


# --- transcripts ---


def test_what_may_differ_and_what_may_not():
    doc = [
        "on http://127.0.0.1:8123/v1 at 12:30:05, 2026-01-02, took 1.5 s",
        "new 1a2b3c4d",
        "...",
        "old 1a2b3c4d, other 99887766",
    ]
    screen = [
        "on http://127.0.0.1:50111/v1 at 09:01:59, 2026-11-22, took 12.25 s",
        "new aaaabbbb",
        "anything",
        "at all cccc1111",
        "old aaaabbbb, other 12341234",
    ]
    assert transcripts.same(doc, screen)
    assert transcripts.same(doc, [*screen[:2], screen[4]])
    assert not transcripts.same(doc, [line.replace("took", "used") for line in screen])
    assert not transcripts.same(doc, [*screen[:4], "old cccc1111, other 12341234"])
    assert not transcripts.same(doc, [*screen[:4], "old aaaabbbb, other aaaabbbb"])
    assert not transcripts.same(doc, [*screen, "one more"])
    assert transcripts.real_ids(["a 11112222"], ["a aaaabbbb"]) == {
        "11112222": "aaaabbbb"
    }


SERVER = """
print("serving", flush=True)
try:
    input()
except KeyboardInterrupt:
    print()
print("stopped")
"""
needs_terminal = pytest.mark.skipif(
    os.name == "nt", reason="needs a pseudo-terminal and a shell"
)
DIALOG = """$ python sessions/en/s01_one.py
made-up section
you> hello
agent> HELLO
you>
agent>
you> world
agent> WORLD
you>
$ ls sessions/en
s01_one.py
s02_two.py
$ printf 'hi\\n' | A=1 python sessions/en/s02_two.py
made-up section
you> agent> HI
you>
"""


@needs_terminal
def test_transcripts_are_run(pair: tuple[Section, Section], tmp_path: Path):
    assert transcripts.problems(DIALOG, tmp_path / "a", root=tmp_path) == ""
    for end in ("you> ^D\n", "you> ^C\n"):
        block = DIALOG.partition("you>\n$")[0] + end
        assert transcripts.problems(block, tmp_path / end[6], root=tmp_path) == ""


@needs_terminal
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("agent> WORLD", "agent> WORLT", "-agent> WORLT"),
        ("made-up section\nyou> hello", "you> hello", "+made-up section"),
        ("s02_two.py\n$", "$", "+s02_two.py"),
        ("agent> HI", "agent> HO", "-you> agent> HO"),
    ],
)
def test_transcripts_that_lie_are_seen(
    pair: tuple[Section, Section], tmp_path: Path, old: str, new: str, said: str
):
    assert old in DIALOG
    assert said in transcripts.problems(
        DIALOG.replace(old, new), tmp_path / "a", root=tmp_path
    )


@needs_terminal
def test_a_sleep_takes_longer_the_second_time(
    pair: tuple[Section, Section], tmp_path: Path
):
    block = "$ (sleep 0.4; echo late) > log & sleep 0.2; cat log; cat log\nlate\nlate\n"
    assert "-late" in transcripts.problems(block, tmp_path / "a", root=tmp_path)
    block = "$ (/bin/sleep 0.4; echo late) > log & sleep 0.2; cat log\nlate\n"
    assert transcripts.problems(block, tmp_path / "b", root=tmp_path) == ""


@needs_terminal
def test_a_server_is_stopped_by_a_key(tmp_path: Path):
    (tmp_path / "sessions").mkdir()
    path = tmp_path / "sessions" / "server.py"
    path.write_text(SERVER, encoding="utf-8")
    block = "$ python sessions/server.py\nserving\n^C\nstopped\n"
    assert transcripts.problems(block, tmp_path / "a", root=tmp_path) == ""


GATEWAY = """
import threading

from websockets.sync.server import serve


def echo(client):
    for text in client:
        client.send(f'{{"heard": {text}}}')


with serve(echo, "127.0.0.1", 0) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.socket.getsockname()[1]}/#token=3f5a", flush=True)
    while input("you> "):
        pass
    server.shutdown()
"""
TERMINALS = """$ python sessions/gateway.py
http://127.0.0.1:8765/#token=0123456789abcdef
you> hello
you>
$ python -m websockets ws://127.0.0.1:8765/ | grep -o '{.*'
{"jsonrpc": "2.0", "method": "send", "params": {"text": "hi"}, "id": 1}
{"heard": {"jsonrpc": "2.0", "method": "send", "params": {"text": "hi"}, "id": 1}}
{"jsonrpc": "2.0", "method": "status", "id": 2}
{"heard": {"jsonrpc": "2.0", "method": "status", "id": 2}}
$ echo done
done
"""


@needs_terminal
def test_a_program_stays_open_for_a_second_terminal(tmp_path: Path):
    (tmp_path / "sessions").mkdir()
    path = tmp_path / "sessions" / "gateway.py"
    path.write_text(GATEWAY, encoding="utf-8")
    assert transcripts.problems(TERMINALS, tmp_path / "a", root=tmp_path) == ""
    closed = TERMINALS.replace("hello\nyou>\n", "hello\n")
    with pytest.raises(AssertionError, match="never showed"):
        transcripts.problems(closed, tmp_path / "b", root=tmp_path)


def test_the_copy_leaves_secrets_behind(tmp_path: Path):
    for name in (".env", "kept.txt", "__pycache__/x.pyc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x", encoding="utf-8")
    assert [path.name for path in shipped_files(".", tmp_path)] == ["kept.txt"]
