"""Checks on the ladder: what each section keeps, adds and changes. Each returns its
complaints.
"""

import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from harness import Section

DISTRIBUTIONS = {
    "dotenv": "python-dotenv",
    "pydantic_core": "pydantic",  # which wants exactly one version of it
    "telegram": "python-telegram-bot",
    "yaml": "PyYAML",
}
LABEL = re.compile(r"# --- (?:(s\d\d): (\S.*)|main) ---")
HEADER = re.compile(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


# --- lines ---


def lines_of(source: str) -> list[str]:
    """The lines that count: those that are not blank."""
    return [line.rstrip() for line in source.splitlines() if line.strip()]


@dataclass
class Change:
    """How many lines one section adds to the one before, how many are gone, what share
    stays.
    """

    added: int
    gone: int
    survival: float
    lost: list[str]


def change(before: str, after: str) -> Change:
    """The difference of two sources in non-blank lines."""
    old, new = lines_of(before), lines_of(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    codes = matcher.get_opcodes()
    lost = [
        line
        for tag, a, b, _, _ in codes
        if tag in ("delete", "replace")
        for line in old[a:b]
    ]
    return Change(len(new) - kept, len(old) - kept, kept / max(1, len(old)), lost)


def survival_problems(before: Section, after: Section, least: float) -> Iterator[str]:
    """A section keeps nearly all of the one before."""
    step = change(before.source, after.source)
    if step.survival < least:
        lost = "".join(f"\n    - {line}" for line in step.lost)
        yield (
            f"{step.survival:.1%} of {before.label} survive, at least {least:.0%};"
            f" gone:{lost}"
        )


def size_problems(before: Section | None, after: Section, most: int) -> Iterator[str]:
    """A section adds no more lines than it may."""
    added = change(before.source if before else "", after.source).added
    if added > most:
        yield f"{after.label} adds {added} non-blank lines, at most {most}"


# --- how much there is to understand ---

KNOTS = (
    ast.IfExp
    | ast.ListComp
    | ast.SetComp
    | ast.DictComp
    | ast.GeneratorExp
    | ast.BoolOp
)
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


@dataclass
class Measure:
    """How much code a script has, however it is laid out."""

    lines: int  # of code: without blank lines, comments and docstrings
    nodes: int  # of the syntax tree
    knots: int  # conditional expressions, comprehensions, chains of and and or
    functions: dict[str, int]  # the lines of each

    @property
    def density(self) -> float:
        """Nodes per line: how much has to be understood at once."""
        return self.nodes / self.lines

    @property
    def tangle(self) -> float:
        """Knots per 100 lines."""
        return 100 * self.knots / self.lines


def measure(source: str) -> Measure:
    """Measure a script."""
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.expr_context)]
    lines = code_lines(source)
    for node in nodes:
        lines -= docstring_lines(node)
    functions = {}
    for node in nodes:
        if isinstance(node, FUNCTION):
            functions[node.name] = node.end_lineno - node.lineno + 1
    knots = [node for node in nodes if isinstance(node, KNOTS)]
    return Measure(len(lines), len(nodes), len(knots), functions)


def code_lines(source: str) -> set[int]:
    """The lines on which something stands that is no comment."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def docstring_lines(node: ast.AST) -> set[int]:
    """The lines of the docstring of a module, class or function."""
    if not isinstance(node, ast.Module | ast.ClassDef | FUNCTION):
        return set()
    if ast.get_docstring(node, clean=False) is None:
        return set()
    return set(range(node.body[0].lineno, node.body[0].end_lineno + 1))


def density_problems(path: Path, most: float, most_knots: float) -> Iterator[str]:
    """A script says little at once."""
    size = measure(path.read_text(encoding="utf-8"))
    if size.density > most:
        yield f"{path.name}: {size.density:.2f} nodes a line, at most {most}"
    if size.tangle > most_knots:
        yield f"{path.name}: {size.tangle:.1f} knots in 100 lines, at most {most_knots}"


def length_problems(path: Path, most: int) -> Iterator[str]:
    """No function is longer than this."""
    size = measure(path.read_text(encoding="utf-8"))
    for name, lines in size.functions.items():
        if lines > most:
            yield f"{path.name}: {name} has {lines} lines, at most {most}"


def budget_problems(before: Section | None, after: Section, most: int) -> Iterator[str]:
    """A section adds no more nodes than it may."""
    added = measure(after.source).nodes
    if before:
        added -= measure(before.source).nodes
    if added > most:
        yield f"{after.label} adds {added} nodes, at most {most}"


def title_problems(section: Section, title: str, idea: str) -> Iterator[str]:
    """The docstring begins with the label, the title and the motto."""
    docstring = ast.get_docstring(ast.parse(section.source)) or ""
    first = docstring.partition("\n")[0]
    wanted = f"{section.label}: {title[:1].upper()}{title[1:]} - {idea}."
    if first != wanted:
        yield f"{section.label}: the docstring begins with {first!r}, not {wanted!r}"


# --- definitions ---


@dataclass
class Definition:
    """A name with its code, compared without comments and layout, and the line it
    starts on.
    """

    line: int
    code: list[str] = field(default_factory=list)


def definitions(source: str) -> dict[str, Definition]:
    """Top-level functions, classes (without methods), `Class.method`, and assigned
    names.
    """
    found: dict[str, Definition] = {}
    for node in ast.parse(source).body:
        for name, part in named_parts(node):
            start = min(
                [part.lineno, *(d.lineno for d in getattr(part, "decorator_list", ()))]
            )
            found.setdefault(name, Definition(start)).code.append(ast.dump(part))
    return found


def named_parts(node: ast.stmt) -> Iterator[tuple[str, ast.stmt]]:
    """One top-level statement as names and code; imports and the docstring are free."""
    if isinstance(node, FUNCTION):
        yield node.name, node
    elif isinstance(node, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, FUNCTION)]
        rest = [part for part in node.body if part not in methods]
        yield node.name, with_body(node, rest)
        for method in methods:
            yield f"{node.name}.{method.name}", method
    elif (
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ):
        yield "__main__", node
    elif not is_free(node):
        for name in assigned_names(node) or [ast.unparse(node).splitlines()[0]]:
            yield name, node


def with_body(node: ast.ClassDef, body: list[ast.stmt]) -> ast.ClassDef:
    """A class with another body."""
    fields = {name: getattr(node, name, None) for name in node._fields} | {"body": body}
    return ast.copy_location(ast.ClassDef(**fields), node)


def is_free(node: ast.stmt) -> bool:
    """Imports, guarded or not, and bare constants such as the docstring."""
    if isinstance(node, ast.Try | ast.If | ast.With):
        return any(
            isinstance(part, ast.Import | ast.ImportFrom) for part in ast.walk(node)
        )
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Import | ast.ImportFrom)


def assigned_names(node: ast.stmt) -> list[str]:
    """The names that a statement binds, or whose items or attributes it sets."""
    names = []
    for part in ast.walk(node):
        targets = getattr(part, "targets", None) or [getattr(part, "target", None)]
        if isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names += [base for target in targets for base in base_names(target)]
        elif isinstance(part, FUNCTION | ast.ClassDef):
            names.append(part.name)
    return list(dict.fromkeys(names))


def base_names(target: ast.expr) -> list[str]:
    """The plain names at the bottom of an assignment's target."""
    if isinstance(target, ast.Tuple | ast.List):
        return [name for element in target.elts for name in base_names(element)]
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
        target = target.value
    return [target.id] if isinstance(target, ast.Name) else []


def touched(before: str, after: str) -> set[str]:
    """The earlier definitions that changed, vanished, or (a class) got a new method."""
    old, new = definitions(before), definitions(after)
    names = {
        name for name in old if name not in new or new[name].code != old[name].code
    }
    # of a class that is gone, the name says all
    gone = {name for name in names if name not in new}
    names -= {name for name in gone if "." in name and name.partition(".")[0] in gone}
    owners = {
        name.partition(".")[0] for name in set(new) - set(old) if is_method(name, new)
    }
    return names | (owners & set(old))


def is_method(name: str, known: Iterable[str]) -> bool:
    """Whether a name is Class.method of a known class."""
    return "." in name and name.partition(".")[0] in known


def touch_problems(
    before: Section, after: Section, declared: Iterable[str]
) -> Iterator[str]:
    """The changed definitions are exactly those that steps.toml declares."""
    real, declared = touched(before.source, after.source), set(declared)
    for name in sorted(real - declared):
        yield (
            f"{after.label} changes {name} of {before.label}: undo it, or add"
            f' "{name}" = "the reason" to [{after.label}.touches] in steps.toml'
        )
    for name in sorted(declared - real):
        yield (
            f"{after.label} does not change {name} of {before.label}: remove"
            f" it from [{after.label}.touches] in steps.toml"
        )


# --- bands ---


def bands(source: str) -> list[tuple[int, str]]:
    """The lines and texts of the band labels, and of what nearly is one."""
    lines = enumerate(source.splitlines(), 1)
    return [
        (number, line) for number, line in lines if re.match(r"\s*# ?-{2,} ?\S", line)
    ]


def band_problems(
    before: Section | None, after: Section, title: str | None
) -> Iterator[str]:
    """One label for each section so far, in order, then main; earlier ones stay as they
    were.
    """
    labels = [line for _, line in bands(after.source)]
    for line in labels:
        if not LABEL.fullmatch(line):
            yield (
                f"{after.label}: not a band label of the form '# --- sNN: title"
                f" ---': {line!r}"
            )
    numbers = [
        match[1] or "main" for line in labels if (match := LABEL.fullmatch(line))
    ]
    last = int(after.label[1:])
    wanted = [*(f"s{number:02}" for number in range(1, last + 1)), "main"]
    if numbers != wanted:
        yield f"{after.label}: the bands are {numbers}, not {wanted}"
    earlier = [line for _, line in bands(before.source)][:-1] if before else []
    for line in earlier:
        if line not in labels:
            yield (
                f"{after.label}: the label {line!r} of {before.label} is gone or"
                f" has changed"
            )
    own = f"# --- {after.label}: {title} ---"
    if title and own not in labels:
        yield f"{after.label}: no label {own!r}, as the title in steps.toml has it"


def place_problems(
    before: Section | None, after: Section, elsewhere: Iterable[str]
) -> Iterator[str]:
    """What is new stands in the section's own band, or is listed as elsewhere."""
    labels = bands(after.source)
    own = [
        number for number, line in labels if line.startswith(f"# --- {after.label}:")
    ]
    end = [number for number, line in labels if line == "# --- main ---"]
    if not before or not own or not end:
        return
    old, new = definitions(before.source), definitions(after.source)
    names = {name for name in new if name not in old and not is_method(name, new)}
    outside = {name for name in names if not own[0] < new[name].line < end[0]}
    for name in sorted(outside - set(elsewhere)):
        yield (
            f"{after.label}: {name} (line {new[name].line}) is new and stands outside"
            f" the band of"
            f" {after.label}: move it, or give the reason in [{after.label}.elsewhere]"
        )
    for name in sorted(set(elsewhere) - outside):
        yield (
            f"{after.label}: remove {name} from [{after.label}.elsewhere]: it is not so"
        )


# --- headers and imports ---


def imports(source: str) -> set[str]:
    """The top-level names of all modules that are imported anywhere in a script."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name if name.startswith(".") else name.partition(".")[0] for name in names}


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: Iterable[str]) -> dict[str, str]:
    """Requirements as normal name -> bound."""
    stripped = (line.partition("#")[0].strip() for line in lines)
    matches = [REQUIREMENT.fullmatch(line) for line in stripped if line]
    return {normal(match[1]): match[2].strip() for match in matches if match}


def header(source: str) -> dict | None:
    """The PEP 723 header, parsed; None when there is none."""
    match = HEADER.search(source)
    if not match:
        return None
    lines = (line[2:] for line in match["content"].splitlines())
    return tomllib.loads("\n".join(lines))


def header_problems(section: Section) -> Iterator[str]:
    """The header asks for 3.11 and exactly what the script imports, one per line."""
    source, label = section.source, section.label
    data = header(source)
    if data is None or not source.startswith("# /// script\n"):
        yield f"{label}: the script does not begin with a PEP 723 header"
        return
    if data.get("requires-python") != ">=3.11":
        yield (
            f"{label}: requires-python is {data.get('requires-python')!r}, not '>=3.11'"
        )
    listed = data.get("dependencies", [])
    for line in listed:
        if not re.search(rf'(?m)^#\s+"{re.escape(line)}",$', source):
            yield (
                f"{label}: the dependency {line!r} does not stand on a line of its own"
            )
        if ">=" not in line:
            yield f"{label}: the dependency {line!r} has no lower bound"
    used = imports(source) - set(sys.stdlib_module_names)
    needed = {normal(DISTRIBUTIONS.get(name, name)) for name in used}
    names = set(requirements(listed))
    for name in sorted(needed - names):
        yield f"{label}: imports {name}, which its header does not list"
    for name in sorted(names - needed):
        yield f"{label}: its header lists {name}, which it does not import"


def bounds_of(section: Section) -> dict[str, str]:
    """What a section's header asks for."""
    return requirements((header(section.source) or {}).get("dependencies", []))


def standalone_problems(section: Section) -> Iterator[str]:
    """No section imports another one, or a file that lies beside it."""
    folder = section.path.parent
    beside = {
        path.stem for root in (folder, folder.parent) for path in root.glob("*.py")
    }
    packages = {path.name for path in folder.parent.iterdir() if path.is_dir()}
    for name in sorted(imports(section.source)):
        if name in beside | packages | {"sessions"} or name.startswith("."):
            yield f"{section.label}: imports {name}: a section stands alone"


def requirement_problems(sections: Iterable[Section], root: Path) -> Iterator[str]:
    """requirements.txt is what all headers say together, and so is offline_model.py's
    header.
    """
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    installed, used = requirements(text.splitlines()), {}
    for section in sections:
        for name, bound in bounds_of(section).items():
            used[name] = bound
            if installed.get(name) != bound:
                yield (
                    f"{section.label} needs {name} {bound}, requirements.txt"
                    f" has {installed.get(name, 'nothing')}"
                )
    for name in sorted(set(installed) - set(used)):
        yield f"requirements.txt has {name}, which no section uses"
    offline = root / "sessions" / "offline_model.py"
    if offline.exists():
        data = header(offline.read_text(encoding="utf-8")) or {}
        listed = requirements(data.get("dependencies", []))
        for name in sorted(set(used) - set(listed)):
            yield f"the header of offline_model.py lacks {name}"


# --- text files ---


def encoding_problems(path: Path) -> Iterator[str]:
    """Every text file is opened with an explicit encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and opens_text(node):
            yield (
                f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]} without encoding="
            )


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text and leaves the encoding open."""
    function = call.func
    method = isinstance(function, ast.Attribute)
    name = function.attr if method else getattr(function, "id", "")
    owner = ast.unparse(function.value) if method else ""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given or owner in ("os", "webbrowser", "tarfile"):
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    if name not in ("open", "fdopen"):
        return False
    place = 0 if method and owner not in ("io", "os") else 1
    mode = given.get("mode") or (call.args[place] if len(call.args) > place else None)
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


# --- importing ---

PROBE = r"""
import contextlib, importlib, importlib.util, os, sys, threading
from pathlib import Path

path, modules = Path(sys.argv[1]), sys.argv[2:]
for name in modules:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
sys.dont_write_bytecode = True
SOCKETS = ("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.system")
events = []


def watch(event, args):
    if event in SOCKETS:
        events.append(event)
    elif event in CHANGES:
        events.append(f"{event} {args[0]}")
    elif event == "open" and isinstance(args[0], str | bytes):
        flags = args[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR) or os.fsdecode(args[0]).endswith(".env"):
            events.append(f"open {os.fsdecode(args[0])}")


threads, environment = threading.enumerate(), dict(os.environ)
spec = importlib.util.spec_from_file_location("section_under_test", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
sys.addaudithook(watch)
spec.loader.exec_module(module)
events += [f"thread {t.name}" for t in threading.enumerate() if t not in threads]
events += ["the environment changed"] if environment != dict(os.environ) else []
Path(os.environ["PROBE_RESULT"]).write_text("\n".join(events), encoding="utf-8")
"""


def top_level_imports(source: str) -> list[str]:
    """The modules that are imported when the script is, in order."""
    names = []
    nodes = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif not isinstance(node, FUNCTION | ast.ClassDef):
            nodes += [
                part
                for part in ast.iter_child_nodes(node)
                if isinstance(part, ast.stmt)
            ]
    return names


def import_effects(
    section: Section, folder: Path, env: dict[str, str], workspace: Path
) -> Iterator[str]:
    """What importing a section does besides defining things."""
    here, result = folder / "cwd", folder / "effects.txt"
    here.mkdir()
    (here / ".env").write_text("OPENAI_API_KEY=from-a-file\n", encoding="utf-8")
    files = {*workspace.rglob("*"), *here.rglob("*")}
    modules = top_level_imports(section.source)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(section.path), *modules],
        cwd=here,
        env=env | {"PROBE_RESULT": str(result)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    yield from (
        f"{section.label}: on import: {line}" for line in done.stderr.splitlines()
    )
    yield from (
        f"{section.label}: on import it prints {s!r}" for s in done.stdout.splitlines()
    )
    made = {*workspace.rglob("*"), *here.rglob("*")} - files
    yield from (f"{section.label}: on import it makes {path}" for path in sorted(made))
    if result.exists():
        effects = result.read_text(encoding="utf-8").splitlines()
        yield from (f"{section.label}: on import: {effect}" for effect in effects)
