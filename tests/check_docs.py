"""Checks on the docs: excerpts, figures, names, links and paths. Each returns its
complaints.

A fence says what it holds: ```python is an excerpt of the paired script, ```console a
transcript that is run (see transcripts.py); ```text, ```sh and the like are not
checked.
"""

import ast
import json
import re
import subprocess
import textwrap
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import check_steps
from harness import Section

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.M | re.S)
SKIP = re.compile(r"\s*(?:#\s*)?\.\.\.\s*")
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
FIGURES = re.compile(r"\*\*(\d[\d,]*) lines added, (\d[\d,]*) gone\*\*")
TOTAL = re.compile(r"\*\*(\d[\d,]*) lines\*\*")


@dataclass
class Block:
    """A fenced block: its language, its text, and the line of the doc it begins on."""

    language: str
    text: str
    line: int


def blocks(doc: str, language: str) -> list[Block]:
    """The fenced blocks of one language."""
    return [
        Block(match[1], match[2], doc.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(doc)
        if match[1] == language
    ]


def prose(doc: str) -> str:
    """The doc without its fenced blocks, line numbers kept."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), doc)


def chapter(doc: str, heading: str) -> str:
    """What stands below a heading of the second level; "" if there is none."""
    for part in re.split(r"^## +", doc, flags=re.M)[1:]:
        if part.partition("\n")[0].strip() == heading:
            return part
    return ""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# --- excerpts ---


def pieces_of(block: str) -> list[list[str]]:
    """The non-blank lines of an excerpt, split where a line `...` skips something."""
    pieces: list[list[str]] = [[]]
    for line in check_steps.lines_of(textwrap.dedent(block)):
        if SKIP.fullmatch(line):
            pieces.append([])
        else:
            pieces[-1].append(line)
    return [piece for piece in pieces if piece]


def stands_in(block: str, script: str) -> bool:
    """Whether each piece is a run of lines of the script, in order, indented alike."""
    flat, pieces = check_steps.lines_of(script), pieces_of(block)
    depths = {len(line) - len(line.lstrip()) for line in flat}
    return any(stands_at(pieces, flat, " " * depth) for depth in sorted(depths))


def stands_at(pieces: list[list[str]], flat: list[str], indent: str) -> bool:
    """The same, for one indentation of the excerpt."""
    position = 0
    for piece in pieces:
        want = [indent + line for line in piece]
        starts = range(position, len(flat) - len(want) + 1)
        found = next((s for s in starts if flat[s : s + len(want)] == want), None)
        if found is None:
            return False
        position = found + len(want)
    return True


def excerpt_problems(doc: str, script: str) -> Iterator[str]:
    """Every python block stands in the script, word for word."""
    for block in blocks(doc, "python"):
        if not stands_in(block.text, script):
            known = {line.strip() for line in script.splitlines()}
            given = (line.strip() for piece in pieces_of(block.text) for line in piece)
            strange = [line for line in given if line not in known]
            reason = f"not in it: {strange[0]!r}" if strange else "order or indentation"
            yield (
                f"line {block.line}: this block does not stand in the script ({reason})"
            )


# --- figures and names ---


def number(text: str) -> int:
    return int(text.replace(",", ""))


def figure_problems(doc: str, before: Section | None, after: Section) -> Iterator[str]:
    """The size that the doc states is the real one."""
    if before is None:
        real = len(after.source.splitlines())
        if str(real) not in {str(number(match[1])) for match in TOTAL.finditer(doc)}:
            yield f"'What changes' must say **{real:,} lines**"
        return
    step = check_steps.change(before.source, after.source)
    stated = [(number(match[1]), number(match[2])) for match in FIGURES.finditer(doc)]
    if stated != [(step.added, step.gone)]:
        right = f"**{step.added:,} lines added, {step.gone:,} gone**"
        yield f"'What changes' must say {right}, once; it says {stated}"


def entries(source: str) -> set[str]:
    """The first words of texts given to decorators, and of keys of top-level dicts."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call):
                found.update(decorator.args)
    for node in ast.parse(source).body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Dict):
            found.update(value.keys)
    texts = (part.value for part in found if isinstance(part, ast.Constant))
    return {text.split()[0] for text in texts if isinstance(text, str) and text.strip()}


def listed(doc: str, start: str) -> list[str] | None:
    """The backticked names of a line that starts so, and of the lines it runs on to."""
    match = re.search(
        rf"^(?:[-*] )?{start}((?:.*\n)(?:(?!\s*$|[-*] |\w[\w ]*:).*\n)*)", doc, re.M
    )
    return re.findall(r"`([^`]+)`", match[1]) if match else None


def name_problems(
    doc: str, before: Section | None, after: Section, touches: Iterable[str]
) -> Iterator[str]:
    """The new names are new, and the touched ones are those of steps.toml."""
    text, old = prose(doc) + "\n", before.source if before else ""
    new_names, touched = listed(text, "New names:"), listed(text, "Touched:")
    if new_names is None:
        if before:
            yield "there is no line that starts with 'New names:'"
    else:
        known = set(check_steps.definitions(after.source)) | entries(after.source)
        earlier = set(check_steps.definitions(old)) | entries(old)
        for name in new_names:
            if name.split()[0].removesuffix("()") not in known - earlier:
                yield f"New names: {name} is not new in {after.label}, or is not there"
    if touched is None:
        if before:
            yield "there is no line that starts with 'Touched:'"
    elif set(touched) != set(touches):
        yield f"Touched: {sorted(touched)}, steps.toml has {sorted(touches)}"
    elif not touched and not re.search(r"^(?:[-*] )?Touched: *nothing\b", text, re.M):
        yield "Touched: must say nothing, as nothing is"


def length_problems(doc: str, lengths: range) -> Iterator[str]:
    """The doc is neither too short nor too long."""
    count = len(doc.splitlines())
    if count not in lengths:
        yield f"{count} lines, not {lengths.start} to {lengths.stop - 1}"


def heading_problems(doc: str, headings: list[str]) -> Iterator[str]:
    """These headings are there, in order; others may stand among them."""
    found = re.findall(r"^## +(.+?)\s*$", prose(doc), re.M)
    for heading in headings:
        if heading not in found:
            yield f"there is no heading '## {heading}'"
    order = [heading for heading in found if heading in headings]
    wanted = [heading for heading in headings if heading in order]
    if order != wanted:
        yield f"the headings are in the order {order}"


# --- layout, data and names ---

FIELD = re.compile(r"[A-Za-z_]+(?:_[A-Za-z0-9]+)+|[A-Z][a-z]+(?:[A-Z][a-z]+)+")


def width_problems(doc: str, most: int = 100) -> Iterator[str]:
    """Lines of prose are no longer than this; tables and lone links are free."""
    for number, line in enumerate(prose(doc).splitlines(), 1):
        is_free = line.startswith("|") or re.fullmatch(r"\S+", line.strip())
        if len(line) > most and not is_free:
            yield f"line {number} has {len(line)} columns, at most {most}"


def json_values(text: str) -> list:
    """The JSON values that stand one after the other in a text. Raises ValueError."""
    decoder, values, position = json.JSONDecoder(), [], 0
    text = text.strip()
    while position < len(text):
        value, end = decoder.raw_decode(text, position)
        values.append(value)
        position = end + len(text[end:]) - len(text[end:].lstrip())
    return values


def json_problems(doc: str) -> Iterator[str]:
    """A json block is one or more JSON values; each line of a jsonl block is one."""
    for block in blocks(doc, "json"):
        try:
            json_values(block.text)
        except ValueError as error:
            yield f"line {block.line}: this block is no JSON: {error}"
    for block in blocks(doc, "jsonl"):
        for number, line in enumerate(block.text.splitlines(), block.line + 1):
            try:
                json.loads(line)
            except ValueError as error:
                yield f"line {number}: this line is no JSON: {error}"


def schema_problems(doc: str, tools: list[dict]) -> Iterator[str]:
    """A tool's description in a json block is the one that the script sends."""
    known = {tool["function"]["name"]: tool for tool in tools}
    for block in blocks(doc, "json"):
        for value in json_values(block.text):
            if isinstance(value, dict) and isinstance(value.get("function"), dict):
                name = value["function"].get("name")
                if "parameters" in value["function"] and known.get(name) != value:
                    actual = known.get(name)
                    yield f"line {block.line}: {name} is {actual} in the script"


def constant_problems(doc: str, values: dict) -> Iterator[str]:
    """Where the prose says that `A_CONSTANT` is a number, it is."""
    text = " ".join(prose(doc).split())
    for name, figure in re.findall(r"`([A-Z][A-Z_]+)`,? (?:is|=) (\d[\d,]*)\b", text):
        if values.get(name) != number(figure):
            yield f"{name} is {values.get(name)}, not {figure}"


def stale_name_problems(doc: str, sources: Iterable[str]) -> Iterator[str]:
    """Names in backticks, such as `call_model`, are somewhere in the code."""
    code = "\n".join(sources)
    known = set(
        re.findall(r"\w+", code + "".join(match[0] for match in FENCE.finditer(doc)))
    )
    for text in sorted(set(re.findall(r"`([^`\n]+)`", prose(doc)))):
        name = text.removesuffix("()").rpartition(".")[2]
        if FIELD.fullmatch(name) and name not in known:
            yield f"`{text}` is not in the code"


# --- links and paths ---


def slugs(doc: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", prose(doc), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {
        f"{slug}-{n}" if n else slug
        for slug, last in found.items()
        for n in range(last + 1)
    }


def link_problems(path: Path, root: Path) -> Iterator[str]:
    """Relative links lead to files of the repository, and to headings that exist."""
    doc = read(path)
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(doc))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path.resolve()
        if not file.exists() or not file.is_relative_to(root.resolve()):
            yield f"the link {target} leads nowhere"
        elif anchor and file.suffix == ".md" and anchor not in slugs(read(file)):
            yield f"the link {target}: there is no heading #{anchor}"


def path_problems(path: Path, root: Path) -> Iterator[str]:
    """Backticked paths of the repository exist, or are ignored by git (written at run
    time).
    """
    codes = re.findall(r"`([^`\n]+)`", prose(read(path)))
    words = {word.strip("'\"(),;:") for code in codes for word in code.split()}
    for word in sorted(words):
        if (
            not re.fullmatch(r"(?:sessions|workspace|tests)/[\w./-]+", word)
            or "NN" in word
        ):
            continue
        if not (root / word).exists() and not ignored(word, root):
            yield f"`{word}` does not exist, and git does not ignore it"


def ignored(name: str, root: Path) -> bool:
    """Whether .gitignore covers a path."""
    done = subprocess.run(
        ["git", "check-ignore", "-q", "--no-index", name], cwd=root, capture_output=True
    )
    return done.returncode == 0


# --- README ---


def readme_problems(readme: str, sections: Iterable[Section]) -> Iterator[str]:
    """The table of sections has each one with its number of lines; both commands are
    there.
    """
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in readme.splitlines()
        if line.lstrip().startswith("|")
    ]
    for section in sections:
        own = [row for row in rows if re.search(rf"\b{section.label}\b", row[0])]
        real = len(section.source.splitlines())
        if not own:
            yield f"README.md: the table has no row for {section.label}"
        for row in own:
            counts = [
                number(cell) for cell in row[1:] if re.fullmatch(r"\d[\d,]*", cell)
            ]
            if counts != [real]:
                yield (
                    f"README.md: the row of {section.label} says {counts}, the file"
                    f" has {real}"
                )
    for what, pattern in (
        ("runs the first section", r"sessions/offline_model\.py s01\b"),
        ("runs the tests", r"\bpytest\b"),
    ):
        if not re.search(pattern, readme):
            yield f"README.md: no command that {what}"
