"""Memory (s06): what is kept is on disk, and is found again by word, by part and by meaning."""

import json
import math
import os
import random
import re
import shutil
import sqlite3
import threading
import unicodedata
from collections.abc import Callable
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC
from datetime import date
from datetime import datetime
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import harness
import openai
import pytest
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Html200
from fake_model import Json200
from fake_model import Text
from fake_model import ToolCalls
from fake_model import embeddings
from fake_telegram import FakeTelegram
from harness import since

from first.test_telegram import GROUP
from first.test_telegram import Post

PROMPT = "you> "
TODAY = date(2026, 11, 22)
HIT = re.compile(r"^(\S+):(\d+) \((\d\.\d\d)\)\n", re.MULTILINE)
RECALL = json.loads((Path(__file__).parent / "recall.json").read_text(encoding="utf-8"))
WEIGHTS = ((0.7, 0.3), (1, 0), (0, 1))
PARCEL, KIOSK = "who is the parcel QX77120934DE for?", "handed in at the kiosk"
ALONE = "searching by words alone"


class Desk:
    """A section, a workspace without notes, and a scripted model on the other side."""

    def __init__(self, section: harness.Section, workspace: Path, server: FakeModel):
        self.section, self.workspace, self.server = section, workspace, server
        server.script("brain", [brain], repeat=True)
        for file in workspace.glob("*.md"):
            file.unlink()

    def env(self, **env: str) -> dict[str, str]:
        ours = {"WORKSPACE_DIR": str(self.workspace), "APPROVAL": "always", "TZ": "UTC"}
        return self.server.env("brain", **ours | env)

    def run(self, *lines: str, cold: bool = False, fsize: int | None = None, **env: str) -> str:
        """One run over pipes, ended by quit; what it printed, errors last."""
        text = "".join(f"{line}\n" for line in (*lines, "quit"))
        done = harness.pipe(self.section, text, self.env(**env), cold=cold, fsize=fsize)
        printed = done.stdout + done.stderr
        assert "Traceback" not in printed, printed
        assert done.returncode == 0, printed
        return printed

    def results(self, *lines: str, **options) -> list[str]:
        """What the tools told the model in one run."""
        before = len(self.server.chats)
        self.run(*lines, **options)
        last = [chat.messages[-1] for chat in self.server.chats[before:]]
        return [message["content"] for message in last if message["role"] == "tool"]

    def systems(self, *lines: str, **options) -> list[str]:
        """The system prompts of one run."""
        before = len(self.server.chats)
        self.run(*lines, **options)
        return [chat.messages[0]["content"] for chat in self.server.chats[before:]]

    def vectors(self, *lines: str, model: str = "embed-a") -> list[list[str]]:
        """The texts of each request for vectors in one run."""
        before = len(self.server.requests)
        self.run(*lines, EMBEDDING_MODEL=model)
        asked = [r for r in self.server.requests[before:] if r.path.endswith("/embeddings")]
        assert {request.model for request in asked} <= {model}
        return [request.body["input"] for request in asked]


@pytest.fixture
def desk(section, workspace: Path, fake_model: FakeModel) -> Desk:
    return Desk(section, workspace, fake_model)


def brain(body: dict):
    """Does what the last user message says."""
    messages = body["messages"]
    last = next(m["content"] for m in reversed(messages) if m["role"] == "user")
    verb, _, rest = last.partition(" ")
    if messages[-1]["role"] == "tool":
        return Text("done")
    if verb == "keep":
        return ToolCalls([("memory_write", {"content": rest})])
    if verb == "find":
        return ToolCalls([("memory_search", {"query": rest})])
    if verb in ("memory_write", "memory_search"):
        return ToolCalls([(verb, rest)])
    return Text(f"heard {last}")


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write files as an editor does: their time is another one each time."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.stat().st_mtime_ns if file.exists() else 1_700_000_000_000_000_000
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.utime(file, ns=(before + 10**9, before + 10**9))


def listed(notes: Iterable[str]) -> str:
    return "".join(f"- {note}\n" for note in notes)


def day(age: int = 0) -> str:
    return f"memory/{TODAY - timedelta(age)}.md"


def open_store(section, folder: Path, model: str = "", embed: Callable | None = None):
    """The notes of a folder, as a run opens them on a day that stays the same."""
    store = section.module.MemoryStore(folder, folder, model, embed)
    store.today = lambda: TODAY
    return store


def places(hits: Iterable) -> list[tuple[str, int, str]]:
    return [(hit.path, hit.line, hit.text) for hit in hits]


def rows(store) -> list[tuple[str, int, str]]:
    """All that is in the index."""
    return sorted(store.db.execute("SELECT path, line, text FROM notes"))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "memory").glob("*")}


# --- keeping ---


@pytest.mark.guard
@since("s06")
def test_a_note_is_on_disk_when_the_model_hears_of_it(desk):
    gate = threading.Event()
    note = ToolCalls([("memory_write", {"content": "the spare key is at Ruth's\n- and a list"})])
    desk.server.script("brain", [note, Gate(gate, after_chunks=0)])
    with harness.Screen(desk.section, desk.env()) as screen:
        screen.wait_for(PROMPT)
        screen.type("go\n")
        desk.server.wait(2)
        screen.kill()
    gate.set()
    told = desk.server.chats[-1].messages[-1]["content"]
    path = re.fullmatch(r"kept in (memory/\d{4}-\d\d-\d\d\.md)", told)[1]
    text = (desk.workspace / path).read_text()
    assert re.fullmatch(r"- \d\d:\d\d the spare key is at Ruth's\n  - and a list\n", text)
    desk.server.script("brain", [brain], repeat=True)
    (found,) = desk.results("find spare key")
    assert found.startswith(f"{path}:1 (") and "\n  - and a list" in found


def today_files(text: str) -> dict[str, str]:
    """A file for this day, and for the next one: a test may run at midnight."""
    now = datetime.now(UTC).date()
    return {f"memory/{now + timedelta(n)}.md": text for n in (0, 1)}


@since("s06")
@pytest.mark.parametrize(
    ("filler", "lines"), [("\n", 300_000), ("- a line of its own, as a note\n", 4000)]
)
def test_a_full_disk_keeps_no_half_note(desk, filler, lines):
    """With notes in the file, there is no room for an index, either."""
    put(desk.workspace, today_files("- the bird is blue\n" + filler * lines))
    before = content(desk.workspace)
    (size,) = {len(data) for data in before.values()}
    said = ["keep this does not fit in any more", "find blue bird", "keep nor does this"]
    wrote, found, again = desk.results(*said, fsize=size + 20)
    assert wrote.startswith("error:") and again.startswith("error:")
    assert "the bird is blue" in found
    assert content(desk.workspace) == before
    wrote, found = desk.results("keep now it fits", "find now it fits")
    assert wrote.startswith("kept in") and "now it fits" in found


@since("s06")
def test_notes_that_cannot_be_written_are_an_error_that_the_model_reads(desk):
    (desk.workspace / "memory").write_text("in the way")
    put(desk.workspace, {"MEMORY.md": "- the bird is blue\n"})
    wrote, found = desk.results("keep a fact", "find blue bird")
    assert wrote.startswith("error:") and "the bird is blue" in found
    assert (desk.workspace / "memory").read_text() == "in the way"


@since("s06")
def test_the_first_note_of_an_agent_makes_its_folder_and_its_index(section, tmp_path):
    store = open_store(section, tmp_path / "agents" / "luna")
    assert not store.search("Miso")
    store.write("Miso must not eat chicken")
    assert len(store.search("Miso")) == 1 and store.index.is_file()


@since("s06")
def test_an_index_that_cannot_be_is_no_reason_to_write_twice(section, tmp_path):
    (tmp_path / ".memory.sqlite").mkdir()
    store = open_store(section, tmp_path)
    assert store.write("Miso must not eat chicken").startswith("memory/")
    (data,) = content(tmp_path).values()
    assert data.count(b"chicken") == 1 and len(store.search("chicken")) == 1


@since("s06")
def test_what_is_no_note_is_refused_and_the_turn_goes_on(desk):
    bad = ['["a"]', '""', '" \\n\\t "', "5", "null", "true", '{"a": 1}', '"cut off']
    lines = [f'memory_write {{"content": {value}}}' for value in bad]
    lines += ["memory_write {}", 'memory_write {"text": "x"}', "memory_write [1]"]
    lines += ['memory_search {"query": ["a"]}', 'memory_search {"query": "a", "limit": "3"}']
    *refused, kept, found = desk.results(*lines, "keep one that is right", "find right")
    assert [text for text in refused if not text.startswith("error: ")] == []
    assert len(refused) == len(lines) and kept.startswith("kept in") and "that is right" in found
    (data,) = content(desk.workspace).values()
    assert data.count(b"\n") == 1


@since("s06")
def test_any_limit_is_taken(desk):
    put(desk.workspace, {"MEMORY.md": listed(f"the bird {n} is blue" for n in range(9))})
    limits = ("-1", "0", "1", "4", "1000000000")
    asked = (f'memory_search {{"query": "bird", "limit": {n}}}' for n in limits)
    assert [len(HIT.findall(text)) for text in desk.results(*asked)] == [1, 1, 1, 4, 9]


@since("s06")
@pytest.mark.parametrize("mark", ["\u2028", "\x0c", "\x85", "\x1c", "\r"])
def test_a_note_with_an_odd_line_end_does_not_move_the_next(section, tmp_path, mark):
    store = open_store(section, tmp_path)
    for text in (f"one{mark}two", "the bird is blue"):
        store.write(text)
    lines = (tmp_path / day()).read_bytes().decode().split("\n")
    right = 1 + next(n for n, line in enumerate(lines) if "bird" in line)
    assert [hit.line for hit in store.search("bird")] == [right]
    store.index.unlink()
    assert [hit.line for hit in store.search("bird")] == [right]


# --- finding ---

SPOKEN = """\
The bicycle stands behind the courthouse
Renewed the motorcyclist's licence
Der Ersatzschlüssel liegt bei Frau Großmann in der Lindenstraße
Die Haftpflichtversicherungspolice ist im Ordner
Für die Gäste sind Äpfel da
护照放在书房的抽屉里
下周一坐火车去上海开会
診察券は財布の中にある
カメラのレンズを修理に出した
도서관에서 우산을 잃어버렸다
여권은 서랍에 있습니다
""".splitlines()
ASKED = {
    "bicycle": 0,
    "BICYCLE": 0,
    "bicy": 0,
    "court": 0,
    "house": 0,
    "cyclist": 1,
    "Ersatzschlüssel": 2,
    "Schlüssel": 2,
    "schlussel": 2,
    "SCHLÜSSEL": 2,
    "Grossmann": 2,
    "großmann": 2,
    "Strasse": 2,
    "Linden": 2,
    "Versicherung": 3,
    "Police": 3,
    "pflicht": 3,
    "Gaste": 4,
    "äpfel": 4,
    "A\u0308pfel": 4,
    "护照": 5,
    "抽屉": 5,
    "护照在哪里": 5,
    "火车": 6,
    "上海开会": 6,
    "診察券": 7,
    "財布": 7,
    "カメラ": 8,
    "ｶﾒﾗ": 8,
    "メラ": 8,
    "レンズの修理": 8,
    "우산": 9,
    "우산은 어디": 9,
    "도서관": 9,
    "서관": 9,
    "여권": 10,
    unicodedata.normalize("NFD", "서랍"): 10,
}


@since("s06")
def test_a_note_is_found_by_a_word_and_by_a_part_of_one(section, tmp_path):
    put(tmp_path, {"MEMORY.md": listed(SPOKEN)})
    store = open_store(section, tmp_path)
    for weights in (WEIGHTS[0], WEIGHTS[2]):
        found = {query: store.search(query, 6, weights) for query in ASKED}
        first = {query: places(hits)[:1] for query, hits in found.items()}
        assert first == {q: [("MEMORY.md", n + 1, f"- {SPOKEN[n]}")] for q, n in ASKED.items()}


@since("s06")
@pytest.mark.parametrize(
    ("note", "query"),
    [
        ("我的猫叫小白", "猫"),
        ("妈妈喜欢喝茶", "茶"),
        ("駅前に鍵を忘れた", "鍵"),
        ("아침에 약을 먹는다", "약"),
    ],
)
def test_a_word_of_one_letter_is_found_where_such_words_are(section, tmp_path, note, query):
    put(tmp_path, {"MEMORY.md": listed([*SPOKEN, note])})
    assert [hit.text for hit in open_store(section, tmp_path).search(query)][:1] == [f"- {note}"]


@since("s06")
def test_a_part_of_a_very_long_word_is_found(section, tmp_path):
    word = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
    put(tmp_path, {"MEMORY.md": listed([*SPOKEN, word])})
    store = open_store(section, tmp_path)
    for query in (word, "Donaudampf", "Dampfschiff", "Gesellschaft"):
        assert [hit.text for hit in store.search(query)][:1] == [f"- {word}"], query


@since("s06")
def test_what_nothing_fits_finds_nothing(desk):
    put(desk.workspace, {"MEMORY.md": listed(SPOKEN)})
    queries = (
        "xylophone",
        "Zwiebelkuchen",
        "飞机",
        "ピアノ",
        "피아노",
        "?!",
        "the and of",
        "*",
        '"',
    )
    found = desk.results(*(f"find {query}" for query in queries))
    assert dict(zip(queries, found, strict=True)) == dict.fromkeys(queries, "nothing was found")
    assert "nothing was found" in desk.run("/search xylophone")
    assert desk.results("memory_search {}", 'memory_search {"query": ""}')[1] == "nothing was found"


@since("s06")
def test_a_query_in_the_language_of_the_index_is_words_like_others(section, tmp_path):
    put(tmp_path, {"MEMORY.md": '- the bird AND the cat (NOT the dog) say "near" words:x*\n'})
    store = open_store(section, tmp_path)
    for query in (
        'bird" OR "x',
        "bird AND",
        "NEAR(bird",
        "words:bird",
        "bird*",
        "^bird",
        "bird'--",
    ):
        assert len(store.search(query)) == 1, query
    assert store.search("bird " * 100_000)
    store.search(" ".join(f'"bird{n}' for n in range(300)))


FILES = {
    "MEMORY.md": """\
# About

First paragraph with word01
goes on in the next line with word02

## Under

### Deeper

Second word03 stands here

- item word04
- item word05
  indented word06

  * inner word07
* star word08
#### Close
word09 right below
| table | word10 |

    code word11
Setext word12
=====

last word13""",
    day(1): "- 08:00 one word14\r\n- 09:00 two word15\r\n  more word16\r\n\r\n- three word17\r\n",
    day(2): "\ufeff- 08:00 one word18\n- 09:00 two word19\n",
    day(3): "\ufeff# Title\r\n\r\ntext word20\r\n",
    day(4): b"- fine word21\n- caf\xe9 \xff\xfe word22\n- fine word23\n",
    day(5): "\n\n\n- word24\n\n\n\n- word25",
}


@since("s06")
def test_the_line_that_is_told_is_where_the_note_begins(section, tmp_path):
    put(tmp_path, FILES)
    store = open_store(section, tmp_path)
    for number in range(1, 26):
        word = f"word{number:02}"
        hit = store.search(word, 1, WEIGHTS[2])[0]
        lines = (tmp_path / hit.path).read_bytes().decode("utf-8-sig", "replace").split("\n")
        text = hit.text.split("\n")
        assert word in hit.text
        there = lines[hit.line - 1 : hit.line - 1 + len(text)]
        assert [line.strip() for line in there] == [line.strip() for line in text], hit


@since("s06")
def test_what_stands_only_in_a_heading_is_found(section, tmp_path):
    put(tmp_path, {"MEMORY.md": "# Notes\n\n- a bird\n\n# The garage code is 4711\n"})
    put(tmp_path, {day(): "- 08:00 a cat\n#todo buy milk\n"})
    store = open_store(section, tmp_path)
    found = [hit for query in ("garage code", "milk") for hit in store.search(query)]
    assert [hit.path for hit in found] == ["MEMORY.md", day()]


@since("s06")
def test_lines_are_right_in_files_with_odd_line_ends(section, tmp_path):
    put(tmp_path, {day(): "- a form\x0c feed\n- a line\u2028end\n- a next\x85line\n- a bird\n"})
    assert [hit.line for hit in open_store(section, tmp_path).search("bird")] == [4]


@since("s06")
def test_of_a_long_note_nothing_is_lost(section, tmp_path):
    """One with many lines and one in a single line, each in pieces that say their own lines."""
    sentences = [f"sentence number{n} tells of thing{n} " + "x" * (n % 70) for n in range(300)]
    many, single = "\n".join(sentences), " ".join(sentences)
    put(
        tmp_path,
        {"MEMORY.md": f"# Head\n\n{many}\n\nafter\n", day(): f"- one\n- {single}\n- two\n"},
    )
    store = open_store(section, tmp_path)
    store.search("x")
    for path, whole, first in (("MEMORY.md", f"# Head\n\n{many}", 1), (day(), f"- {single}", 2)):
        pieces = [(line, text) for name, line, text in rows(store) if name == path]
        pieces = [(line, text) for line, text in pieces if text not in ("after", "- one", "- two")]
        seen = bytearray(len(whole))
        for line, text in pieces:
            assert len(text) <= 1600 and whole.count(text) == 1
            start = whole.index(text)
            seen[start : start + len(text)] = b"x" * len(text)
            assert line == first + whole[:start].count("\n")
        assert seen == b"x" * len(whole)
    for number in (0, 31, 150, 299):
        found = store.search(f"number{number} thing{number}", 9, WEIGHTS[2])
        assert {hit.path for hit in found if f"number{number} " in hit.text} == {"MEMORY.md", day()}


@since("s06")
def test_a_note_comes_whole(desk):
    note = "the bird " + "sings and sings " * 60 + "at the end"
    kept, found = desk.results(f"keep {note}", "find bird")
    path = kept.removeprefix("kept in ")
    assert re.fullmatch(rf"{path}:1 \(\d\.\d\d\)\n- \d\d:\d\d {note}", found)


def fill_recall(folder: Path) -> None:
    put(folder, {path: listed(notes) for path, notes in RECALL["notes"].items()})


@since("s06")
@pytest.mark.costly
def test_two_processes_find_the_same(desk):
    """Also where many notes fit equally well, whatever order a set of their files is in."""
    fill_recall(desk.workspace)
    put(
        desk.workspace,
        {f"memory/2026-0{n % 8 + 1}-{n // 8 + 10}.md": "- pill\n" for n in range(72)},
    )
    queries = [question["query"] for question in RECALL["questions"][::4]]
    asked = [f"/search {query}" for query in (*queries, "pill")]
    printed = []
    for seed in ("1", "2"):
        text = desk.run(*asked, cold=True, PYTHONHASHSEED=seed)
        printed.append([found for found in text.split(PROMPT) if HIT.search(found)])
        for file in desk.workspace.glob(".memory.sqlite*"):
            file.unlink()
    assert len(printed[0]) == len(asked) and printed[0] == printed[1]


# --- how well ---


def count_right(section, folder: Path, model: str, embed: Callable | None) -> list[int]:
    """How often the right note comes first, by both scores and by each alone."""
    fill_recall(folder)
    store = open_store(section, folder, model, embed)
    counts = []
    for weights in WEIGHTS:
        first = [store.search(q["query"], 6, weights)[:1] for q in RECALL["questions"]]
        right = zip(RECALL["questions"], first, strict=True)
        counts.append(sum(bool(hits) and q["answer"] in hits[0].text for q, hits in right))
    assert len(store) == 138 and store.problem == ""
    return counts


@since("s06")
@pytest.mark.costly
def test_recall_of_both_scores_is_better_than_of_each(section, tmp_path):
    offline = harness.load(harness.REPO / "sessions" / "offline_model.py")
    grams = count_right(section, tmp_path / "grams", "", None)
    model = "offline-embed"
    vectors = count_right(
        section, tmp_path / "vectors", model, lambda texts: [offline.embed(text) for text in texts]
    )
    assert [grams, vectors] == [[52, 50, 45], [52, 38, 45]]
    assert WEIGHTS[0] == (section.module.VECTOR_WEIGHT, section.module.KEYWORD_WEIGHT)
    assert all(both > max(alone) for both, *alone in (grams, vectors))
    doc = harness.FOLDER / "s06_intelligence.md"
    if doc.exists():  # in one paragraph, in this order
        told = ".*".join(rf"\b{number}\b" for number in grams + vectors)
        parts = doc.read_text(encoding="utf-8").split("\n\n")
        assert any(re.search(told, part, re.DOTALL) for part in parts), told


@since("s06")
def test_of_two_equal_notes_the_newer_comes_first(section, tmp_path):
    put(tmp_path, {day(n): "- 08:00 the bird is blue\n" for n in (40, 3, 200, 0, 90)})
    store = open_store(section, tmp_path)
    assert [hit.path for hit in store.search("blue bird")] == [day(n) for n in (0, 3, 40, 90, 200)]


@since("s06")
def test_of_many_equal_notes_the_newest_come_first(section, tmp_path):
    put(tmp_path, {day(n): "- 08:00 took the pill\n" for n in range(119, -1, -1)})
    store = open_store(section, tmp_path)
    for weights in WEIGHTS:
        assert [hit.path for hit in store.search("pill", 3, weights)] == [day(n) for n in range(3)]


@since("s06")
def test_lasting_notes_do_not_age_and_an_old_one_is_found(section, tmp_path):
    text = "- the bird is blue\n"
    put(tmp_path, {day(3): text, day(365): "- the cat is grey\n", "MEMORY.md": text})
    store = open_store(section, tmp_path)
    assert [hit.path for hit in store.search("blue bird")] == ["MEMORY.md", day(3)]
    store.today = lambda: TODAY + timedelta(3650)
    assert [hit.path for hit in store.search("grey cat")] == [day(365)]
    assert [hit.path for hit in store.search("blue bird")] == ["MEMORY.md", day(3)]


@since("s06")
def test_notes_of_small_words_alone_can_be_found(section, tmp_path):
    put(tmp_path, {"MEMORY.md": "- with you\n- with us\n"})
    assert len(open_store(section, tmp_path).search("wit")) == 2


@since("s06")
def test_a_file_that_has_become_too_big_is_left_out_and_told(section, tmp_path, monkeypatch):
    monkeypatch.setattr(section.module, "MAX_FILE", 100)
    store = open_store(section, tmp_path)
    put(tmp_path, {day(): "- the heron\n", day(1): "- the stork\n"})
    assert store.search("heron") and not store.odd
    put(tmp_path, {day(): "- the heron\n" * 20})
    assert not store.search("heron") and store.search("stork")
    assert list(store.odd) == [day()]
    (tmp_path / day()).unlink()
    assert store.search("stork") and not store.odd


@since("s06")
def test_notes_that_say_the_same_leave_room_for_another(section, tmp_path):
    same = [f"the team meeting is on Monday at ten o'clock in room {n}" for n in range(3)]
    other = (
        "the team meeting was cancelled twice because Ruth was ill, says the boss of the department"
    )
    put(tmp_path, {"MEMORY.md": listed([*same, other])})
    found = [hit.text for hit in open_store(section, tmp_path).search("team meeting", 4)]
    assert found.index(f"- {other}") in (1, 2) and len(found) == 4


# --- without being asked ---


@since("s06")
def test_notes_come_up_by_themselves_when_they_fit(desk):
    fill_recall(desk.workspace)
    irrelevant = RECALL["irrelevant"]
    systems = desk.systems(*irrelevant, PARCEL, "tell me a joke")
    assert len(systems) == len(irrelevant) + 2
    assert [n for n, system in enumerate(systems) if "<recalled>" in system] == [len(irrelevant)]
    recalled = systems[-2].partition("<recalled>")[2]
    path, line, _ = HIT.search(recalled).groups()
    assert KIOSK in (desk.workspace / path).read_text().splitlines()[int(line) - 1]
    assert KIOSK in recalled and "</recalled>" in recalled
    stored = [
        file.read_text() for file in (desk.workspace / ".sessions").rglob("*") if file.is_file()
    ]
    assert any("QX77120934DE" in text for text in stored)
    assert not any("recalled" in text or KIOSK in text for text in stored)
    said = [m["content"] for m in desk.server.chats[-1].messages[1:]]
    assert PARCEL in said and not any(KIOSK in text for text in said)


@pytest.mark.guard
@since("s06")
def test_notes_do_not_come_up_in_a_group(section, workspace, fake_model):
    with FakeTelegram("123456:secret-token") as telegram:
        post = Post(section, workspace, fake_model, telegram)
        fill_recall(workspace)
        with post.screen():
            post.ask(PARCEL, 42)
            post.ask(f"@tutor_bot {PARCEL}", GROUP)
    direct, group = (chat.messages for chat in fake_model.chats)
    assert "QX77120934DE" in group[-1]["content"] and direct[0]["role"] == group[0]["role"]
    assert "<recalled>" in direct[0]["content"] and KIOSK in direct[0]["content"]
    assert "<recalled>" not in group[0]["content"] and KIOSK not in str(group)


@since("s06")
def test_notes_that_cannot_be_read_do_not_end_the_program(desk):
    """A name that is not UTF-8, as old programs make it, beside a folder and a dead link."""
    put(desk.workspace, {day(): "- the bird is blue\n"})
    (desk.workspace / "memory" / "folder.md").mkdir()
    (desk.workspace / "memory" / "link.md").symlink_to("nowhere.md")
    assert "bird is blue" in desk.results("find blue bird")[0]
    Path(os.fsdecode(os.fsencode(desk.workspace / "memory") + b"/caf\xe9.md")).write_text(
        "- a cat\n"
    )
    assert "bird is blue" in desk.results("find blue bird")[0]


# --- vectors of a server ---


@since("s06")
def test_vectors_are_asked_for_in_batches_and_once(desk):
    notes = [f"note number{n} tells of thing{n}" for n in range(150)]
    put(desk.workspace, {"MEMORY.md": listed(notes[:70]), day(): listed(notes[70:])})
    query, *batches = desk.vectors("/search zebra")
    assert query == ["zebra"] and len(batches) == 3 and max(map(len, batches)) <= 64
    assert sorted(sum(batches, [])) == sorted(f"- {note}" for note in notes)
    assert desk.vectors("/search zebra", "/search lion") == [["zebra"], ["lion"]]
    put(desk.workspace, {"MEMORY.md": listed(notes[1:70]), day(1): listed(notes[:1])})
    assert desk.vectors("/search zebra") == [["zebra"]]
    put(desk.workspace, {"MEMORY.md": listed(["a new one", *notes[1:70]])})
    assert desk.vectors("/search zebra") == [["zebra"], ["- a new one"]]
    query, *batches = desk.vectors("/search zebra", model="embed-b")
    assert len(sum(batches, [])) == 151 and len(batches) == 3 and query == ["zebra"]
    for file in desk.workspace.glob(".memory.sqlite*"):
        file.unlink()
    assert len(desk.vectors("/search zebra", model="embed-b")) == 4


MEANING = {"ship": 0, "vessel": 0, "dog": 1, "puppy": 1, "tax": 2, "levy": 2}


def by_meaning(body: dict) -> Json200:
    """Vectors in which words that mean the same are the same."""
    reply = embeddings(body)
    for each, text in zip(reply["data"], body["input"], strict=True):
        found = [number for word, number in MEANING.items() if word in text]
        each["embedding"] = [0.1 + (n in found) for n in range(8)]
    return Json200(reply)


def backwards(body: dict) -> Json200:
    """The same, in another order than asked: each says its index."""
    reply = by_meaning(body)
    reply.body["data"].reverse()
    return reply


@since("s06")
@pytest.mark.parametrize("answer", [by_meaning, backwards])
def test_what_means_the_same_is_found(desk, answer):
    notes = ["the ship comes on Monday", "a dog barked all night", "tax is due in May"]
    put(desk.workspace, {"MEMORY.md": listed(notes)})
    desk.server.script("embed-a", [answer], repeat=True)
    for note, query in zip(notes, ("vessel", "puppy", "levy"), strict=True):
        (found,) = desk.results(f"find {query}", EMBEDDING_MODEL="embed-a")
        assert HIT.sub("", found).split("\n\n")[0] == f"- {note}"


def spoilt(change: Callable[[list[dict]], object]) -> Callable[[dict], Json200]:
    """An answer to which something happens where there is more than one vector."""

    def answer(body: dict) -> Json200:
        reply = embeddings(body)
        if len(reply["data"]) > 1:
            change(reply["data"])
        return Json200(reply)

    return answer


def vector(number: int, value: object) -> Callable[[dict], Json200]:
    return spoilt(lambda data: data[number].update(embedding=value))


BROKEN = {
    "500": Error(500),
    "404": Error(404),
    "page": Html200(),
    "dropped": Drop(0),
    "object": Json200({}),
    "list": Json200([]),
    "text": Json200("no"),
    "null": Json200({"data": None}),
    "numbers": Json200({"data": [1, 2, 3]}),
    "nothing": Json200({"data": []}),
    "fewer": spoilt(lambda data: data.pop()),
    "more": spoilt(lambda data: data.append(data[0])),
    "empty": vector(0, []),
    "zeros": vector(1, [0.0] * 64),
    "nan first": vector(0, [math.nan] * 64),
    "nan last": vector(-1, [1.0] * 63 + [math.nan]),
    "infinity": vector(-1, [1.0] * 63 + [math.inf]),
    "huge": vector(1, [10**400] * 64),
    "texts": vector(1, ["1"] * 64),
    "no vector": vector(1, None),
    "uneven": vector(1, [1.0]),
}


@since("s06")
@pytest.mark.parametrize("kind", BROKEN)
def test_vectors_that_are_none_leave_the_search_by_words(
    section, tmp_path, fake_model, monkeypatch, kind
):
    """What the SDK makes of an answer counts, too: it is asked as the program asks it."""
    monkeypatch.setenv("EMBEDDING_MODEL", "embed-a")
    client = openai.OpenAI(api_key="sk-test", base_url=fake_model.url, max_retries=0)
    app = SimpleNamespace(agent=SimpleNamespace(client=client))
    put(tmp_path, {"MEMORY.md": listed(SPOKEN)})
    store = open_store(section, tmp_path, "embed-a", partial(section.module.App.embed, app))
    fake_model.script("embed-a", [BROKEN[kind]], repeat=True)
    for query in ("bicycle", "bicycle"):
        assert [hit.text for hit in store.search(query)][:1] == [f"- {SPOKEN[0]}"]
    tried = len(fake_model.requests)
    assert "embed-a" in store.problem and tried <= 2, "the query, then the notes"
    fake_model.script("embed-a", [lambda body: Json200(embeddings(body))], repeat=True)
    again = open_store(section, tmp_path, "embed-a", store.embed)
    assert again.search("bicycle") and again.problem == ""
    asked = [request.body["input"] for request in fake_model.requests[tried:]]
    assert [len(texts) for texts in asked] == [1, len(SPOKEN)]


@since("s06")
@pytest.mark.parametrize("kind", ["500", "nan last", "page"])
def test_a_server_without_vectors_is_told_of_once(desk, kind):
    put(desk.workspace, {"MEMORY.md": listed(SPOKEN)})
    desk.server.script("embed-a", [BROKEN[kind]], repeat=True)
    lines = ["hello bicycle", "find bicycle", "/search bicycle", "find Versicherung", "bye"]
    printed = desk.run(*lines, EMBEDDING_MODEL="embed-a")
    chats = [chat.messages[-1] for chat in desk.server.chats]
    found = [message["content"] for message in chats if message["role"] == "tool"]
    assert len(chats) == 6 and "heard hello" in printed and "heard bye" in printed
    assert [SPOKEN[0] in found[0], SPOKEN[3] in found[1]] == [True, True]
    assert printed.count(ALONE) == 1, printed
    desk.server.script("embed-a", [lambda body: Json200(embeddings(body))], repeat=True)
    assert ALONE not in desk.run("hello bicycle", EMBEDDING_MODEL="embed-a")


# --- the index ---


def damage(kind: str) -> Callable[[Path], None]:
    """Ways to spoil a file."""

    def spoil(file: Path) -> None:
        data = file.read_bytes()
        noise = random.Random(kind).randbytes(len(data))
        spoilt = {
            "noise": noise,
            "half": data[: len(data) // 2],
            "header": noise[:100] + data[100:],
        }
        spoilt |= {"body": data[:100] + noise[100:], "empty": b"", "text": b"hello\n" * 9}
        if kind in spoilt:
            file.write_bytes(spoilt[kind])
            return
        file.unlink()
        with closing(sqlite3.connect(file)) as db:
            statements = {
                "foreign": "CREATE TABLE notes (a)",
                "other terms": "CREATE TABLE terms (a); CREATE TABLE files (path, stamp)",
            }
            db.executescript(statements[kind])

    return spoil


DAMAGE = ["noise", "half", "header", "body", "empty", "text", "foreign", "other terms"]


@since("s06")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_made_anew(section, tmp_path, kind):
    put(tmp_path, {"MEMORY.md": listed(SPOKEN), day(): listed(SPOKEN[:3])})
    store = open_store(section, tmp_path)
    right = places(store.search("Versicherung"))
    store.db.close()
    damage(kind)(store.index)
    again = open_store(section, tmp_path)
    assert again.write("zebra") == day()
    assert places(again.search("Versicherung")) == right
    assert [hit.line for hit in again.search("zebra")] == [4]
    assert len(open_store(section, tmp_path).search("zebra")) == 1
    with closing(sqlite3.connect(store.index)) as db:
        assert db.execute("SELECT count(*) FROM notes").fetchone()[0] == len(SPOKEN) + 4


@since("s06")
def test_an_index_that_is_damaged_or_gone_between_runs_is_not_missed(desk):
    put(desk.workspace, {"MEMORY.md": listed(SPOKEN)})
    index = desk.workspace / ".memory.sqlite"
    right = desk.results("find Versicherung", "find bicycle")
    damage("noise")(index)
    assert desk.results("find Versicherung", "find bicycle") == right
    index.unlink()
    assert desk.results("find Versicherung", "find bicycle") == right and index.exists()


@since("s06")
@pytest.mark.parametrize("kind", ["deleted", "all deleted", "noise", "half", "header", "body"])
def test_an_index_may_be_deleted_or_damaged_at_any_time(section, tmp_path, kind):
    put(tmp_path, {"MEMORY.md": listed(SPOKEN)})
    store = open_store(section, tmp_path)
    right = places(store.search("Versicherung"))
    for turn in range(3):
        for file in tmp_path.glob(".memory.sqlite*" if kind == "all deleted" else ".memory.sqlite"):
            if "deleted" in kind:
                file.unlink()
            else:
                damage(kind)(file)
        if turn == 1:
            store.write("zebra")
        assert places(store.search("Versicherung")) == right
        assert [hit.path for hit in store.search("zebra")] == [day()] * (turn > 0)
    again = open_store(section, tmp_path)
    assert places(again.search("Versicherung")) == right
    assert rows(again) == rows(store) and len(again) == len(SPOKEN) + 1


@since("s06")
def test_an_index_that_cannot_be_written_does_without_a_file(desk):
    (desk.workspace / ".memory.sqlite").mkdir()
    put(desk.workspace, {"MEMORY.md": listed(SPOKEN)})
    kept, found, again = desk.results(
        "keep the bird is blue", "find blue bird", "find Versicherung"
    )
    assert kept.startswith("kept in") and "bird is blue" in found and SPOKEN[3] in again
    assert "bird is blue" in desk.results("find blue bird")[0]


@since("s06")
def test_a_full_disk_does_not_end_the_search(desk):
    many = listed(f"note number{n} tells of thing{n}" for n in range(1500))
    put(desk.workspace, {"MEMORY.md": "- the bird is blue\n", day(): many})
    found, other = desk.results("find blue bird", "find number777", fsize=40_000)
    assert "bird is blue" in found and "thing777" in other


@since("s06")
def test_what_is_edited_by_hand_is_seen_at_once(desk):
    put(
        desk.workspace,
        {day(): listed(["the bird is blue", "the cat is grey"]), day(1): "- a fish\n"},
    )
    with harness.Screen(desk.section, desk.env()) as screen:

        def find(query: str) -> str:
            count = len(desk.server.chats) + 2
            screen.wait_for(PROMPT)
            screen.type(f"find {query}\n")
            desk.server.wait(count)
            return desk.server.chats[-1].messages[-1]["content"]

        assert find("grey cat").startswith(f"{day()}:2 (")
        put(desk.workspace, {day(): listed(["the bird is blue", "a line more", "the cat is grey"])})
        assert find("grey cat").startswith(f"{day()}:3 (") and "more" in find("line more")
        put(desk.workspace, {day(): listed(["the bird is blue", "a line more", "the cat is pink"])})
        assert "grey" not in find("cat grey") and find("pink cat").startswith(f"{day()}:3 (")
        assert "fish" in find("fish")
        (desk.workspace / day(1)).unlink()
        assert find("fish") == "nothing was found"
        put(desk.workspace, {"MEMORY.md": "- a fish again\n"})
        assert find("fish").startswith("MEMORY.md:1 (")


@since("s06")
@pytest.mark.parametrize("seed", range(6))
def test_an_index_that_grew_is_like_one_made_at_once(section, tmp_path, seed):
    """Any edits by hand and by the agent, in any order."""
    chance = random.Random(seed)
    names = ["MEMORY.md", *(day(n) for n in range(3))]
    words = ["bird", "cat", "Straße", "猫和狗", "# Head\n\nbody", "two\n  lines", "last\n\n"]
    store = open_store(section, tmp_path)
    for turn in range(25):
        name = chance.choice(names)
        file = tmp_path / name
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        match chance.randrange(5):
            case 0:
                store.write(f"{chance.choice(words)} {turn}")
            case 1:
                file.unlink(missing_ok=True)
            case 2 if lines:
                del lines[chance.randrange(len(lines))]
                put(tmp_path, {name: "".join(lines) + "x\n"})
            case _:
                end = chance.choice(["", "\n"])
                note = f"- {chance.choice(words)} {chance.choice([turn, 'same'])}{end}"
                lines.insert(chance.randrange(len(lines) + 1), note)
                put(tmp_path, {name: "".join(lines)})
        store.search("bird")
    for file in tmp_path.rglob("*.md"):
        assert "\n#" not in file.read_text()[-8:] or file.write_text(file.read_text() + "end\n")
    store.search("bird")
    grown, found = rows(store), places(store.search("cat two", 50))
    fresh = section.module.MemoryStore(tmp_path, tmp_path, "", None)
    fresh.today, fresh.index = store.today, tmp_path / "another.sqlite"
    again = places(fresh.search("cat two", 50))
    assert rows(fresh) == grown and sorted(again) == sorted(found)


@since("s06")
def test_a_note_below_a_heading_is_the_same_in_an_index_made_anew(section, tmp_path):
    put(tmp_path, {day(): "# Sunday\n\n"})
    store = open_store(section, tmp_path)
    store.write("the bird is blue")
    before = places(store.search("blue bird"))
    store.index.unlink()
    assert places(store.search("blue bird")) == before


def tamper(file: Path) -> None:
    """Change a file so that only who reads it can tell: same size, same time."""
    state = file.stat()
    file.write_bytes(file.read_bytes().replace(b"thing", b"other"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@since("s06")
def test_one_note_more_costs_one_note_in_a_large_memory(section, tmp_path):
    for n in range(10):
        notes = (f"08:00 note{n * 1000 + i} tells of thing{i % 97}" for i in range(1000))
        put(tmp_path, {day(n): listed(notes)})
    store = open_store(section, tmp_path)
    store.search("note5", 1, WEIGHTS[2])
    ids = dict(store.db.execute("SELECT id, text FROM notes"))
    stamps = dict(store.db.execute("SELECT path, stamp FROM files"))
    assert len(ids) == 10_000 and len(stamps) == 10
    for n in range(10):
        tamper(tmp_path / day(n))
    before = store.db.total_changes
    assert store.write("the zebra") == day()
    (hit,) = store.search("zebra", 6, WEIGHTS[2])
    assert (hit.path, hit.line) == (day(), 1001)
    after = dict(store.db.execute("SELECT id, text FROM notes"))
    assert ids.items() <= after.items() and len(after) == 10_001
    assert store.db.total_changes - before < 20
    changed = set(store.db.execute("SELECT path, stamp FROM files")) - set(stamps.items())
    assert [path for path, _ in changed] == [day()]


@since("s06")
def test_a_line_added_by_hand_leaves_the_other_notes_as_they_are(section, tmp_path):
    lines = [f"- note{n} tells of thing{n}\n" for n in range(500)]
    put(tmp_path, {day(): "".join(lines)})
    store = open_store(section, tmp_path)
    store.search("note5")
    ids = dict(store.db.execute("SELECT id, text FROM notes"))
    put(tmp_path, {day(): "".join([*lines[:499], "- the zebra\n", lines[499]])})
    assert [hit.line for hit in store.search("zebra")] == [500]
    after = dict(store.db.execute("SELECT id, text FROM notes"))
    assert ids.items() <= after.items() and len(after) == 501


# --- agents ---


@since("s06")
@pytest.mark.parametrize("name", ["workspace", "luna"])
def test_the_notes_of_agents_are_apart(desk, tmp_path, name):
    """Whatever the folder of the workspace is called."""
    if name != desk.workspace.name:
        desk.workspace = shutil.copytree(desk.workspace, tmp_path / name)
    lines = ["keep the bird is blue", "/agent luna", "find blue bird", "keep the cat is grey"]
    lines += ["find grey cat", "/agent main", "find grey cat", "find blue bird", "cat is grey?"]
    kept, apart, other, own, away, found = desk.results(*lines)
    assert kept.startswith("kept in memory/") and other.startswith("kept in agents/luna/memory/")
    assert apart == away == "nothing was found"
    assert own.startswith("agents/luna/memory/") and "cat is grey" in own
    assert found.startswith("memory/") and "bird is blue" in found
    assert "<recalled>" not in desk.server.chats[-1].messages[0]["content"]
    assert [b"blue" in data for data in content(desk.workspace).values()] == [True]
    luna = content(desk.workspace / "agents" / "luna")
    assert [b"grey" in data for data in luna.values()] == [True]
