"""Checks on the ladder: what each section keeps, adds and changes. Each returns its complaints."""

import ast
import difflib
import re
import sys
import tomllib
from collections.abc import Iterable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

from harness import Section

# Non-blank lines: ceilings, so that no section grows unnoticed. s04 holds two whole platforms.
BUDGETS = {
    "s01": 219,
    "s02": 347,
    "s03": 411,
    "s04": 833,
    "s05": 569,
    "s06": 761,
    "s07": 648,
    "s08": 372,
    "s09": 355,
    "s10": 392,
}
BUDGET = 275  # 250 and a tenth
SURVIVAL = {"s02": 0.93, "s03": 0.93}
DISTRIBUTIONS = {"dotenv": "python-dotenv", "telegram": "python-telegram-bot", "yaml": "PyYAML"}
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
    """How many lines one section adds to the one before, how many are gone, what share stays."""

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
    lost = [line for tag, a, b, _, _ in codes if tag in ("delete", "replace") for line in old[a:b]]
    return Change(len(new) - kept, len(old) - kept, kept / max(1, len(old)), lost)


def size_problems(before: Section | None, after: Section) -> Iterator[str]:
    """A section keeps nearly all of the one before and stays within its budget."""
    if before is None:
        count = len(lines_of(after.source))
        if after.label == "s01" and count > BUDGETS["s01"]:
            yield f"{after.label} has {count} non-blank lines, at most {BUDGETS['s01']}"
        return
    step = change(before.source, after.source)
    floor = SURVIVAL.get(after.label, 0.97)
    if step.survival < floor:
        lost = "".join(f"\n    - {line}" for line in step.lost)
        yield f"{step.survival:.1%} of {before.label} survive, at least {floor:.0%}; gone:{lost}"
    budget = BUDGETS.get(after.label, BUDGET)
    if step.added > budget:
        yield f"{after.label} adds {step.added} non-blank lines, at most {budget}"


# --- definitions ---


@dataclass
class Definition:
    """A name with its code, compared without comments and layout, and the line it starts on."""

    line: int
    code: list[str] = field(default_factory=list)


def definitions(source: str) -> dict[str, Definition]:
    """Top-level functions, classes (without methods), `Class.method`, and assigned names."""
    found: dict[str, Definition] = {}
    for node in ast.parse(source).body:
        for name, part in named_parts(node):
            start = min([part.lineno, *(d.lineno for d in getattr(part, "decorator_list", ()))])
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
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
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
        return any(isinstance(part, ast.Import | ast.ImportFrom) for part in ast.walk(node))
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
    names = {name for name in old if name not in new or new[name].code != old[name].code}
    gone = {name for name in names if name not in new}  # of a class that is gone, the name says all
    names -= {name for name in gone if "." in name and name.partition(".")[0] in gone}
    owners = {name.partition(".")[0] for name in set(new) - set(old) if is_method(name, new)}
    return names | (owners & set(old))


def is_method(name: str, known: Iterable[str]) -> bool:
    """Whether a name is Class.method of a known class."""
    return "." in name and name.partition(".")[0] in known


def touch_problems(before: Section, after: Section, declared: Iterable[str]) -> Iterator[str]:
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
    return [(number, line) for number, line in lines if re.match(r"\s*# ?-{2,} ?\S", line)]


def band_problems(before: Section | None, after: Section, title: str | None) -> Iterator[str]:
    """One label for each section so far, in order, then main; earlier ones stay as they were."""
    labels = [line for _, line in bands(after.source)]
    for line in labels:
        if not LABEL.fullmatch(line):
            yield f"{after.label}: not a band label of the form '# --- sNN: title ---': {line!r}"
    numbers = [match[1] or "main" for line in labels if (match := LABEL.fullmatch(line))]
    last = int(after.label[1:])
    wanted = [*(f"s{number:02}" for number in range(1, last + 1)), "main"]
    if numbers != wanted:
        yield f"{after.label}: the bands are {numbers}, not {wanted}"
    earlier = [line for _, line in bands(before.source)][:-1] if before else []
    for line in earlier:
        if line not in labels:
            yield f"{after.label}: the label {line!r} of {before.label} is gone or has changed"
    own = f"# --- {after.label}: {title} ---"
    if title and own not in labels:
        yield f"{after.label}: no label {own!r}, as the title in steps.toml has it"


def place_problems(
    before: Section | None, after: Section, elsewhere: Iterable[str]
) -> Iterator[str]:
    """What is new stands in the section's own band, or is listed as standing elsewhere."""
    labels = bands(after.source)
    own = [number for number, line in labels if line.startswith(f"# --- {after.label}:")]
    end = [number for number, line in labels if line == "# --- main ---"]
    if not before or not own or not end:
        return
    old, new = definitions(before.source), definitions(after.source)
    names = {name for name in new if name not in old and not is_method(name, new)}
    outside = {name for name in names if not own[0] < new[name].line < end[0]}
    for name in sorted(outside - set(elsewhere)):
        yield (
            f"{after.label}: {name} (line {new[name].line}) is new and stands outside the band of"
            f" {after.label}: move it, or give the reason in [{after.label}.elsewhere]"
        )
    for name in sorted(set(elsewhere) - outside):
        yield f"{after.label}: remove {name} from [{after.label}.elsewhere]: it is not so"


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
        yield f"{label}: requires-python is {data.get('requires-python')!r}, not '>=3.11'"
    listed = data.get("dependencies", [])
    for line in listed:
        if not re.search(rf'(?m)^#\s+"{re.escape(line)}",$', source):
            yield f"{label}: the dependency {line!r} does not stand on a line of its own"
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
    beside = {path.stem for root in (folder, folder.parent) for path in root.glob("*.py")}
    packages = {path.name for path in folder.parent.iterdir() if path.is_dir()}
    for name in sorted(imports(section.source)):
        if name in beside | packages | {"sessions"} or name.startswith("."):
            yield f"{section.label}: imports {name}: a section stands alone"


def requirement_problems(sections: Iterable[Section], root: Path) -> Iterator[str]:
    """requirements.txt is what all headers say together, and so is offline_model.py's header."""
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
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]} without encoding="


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
events = []


def watch(event, args):
    if event in ("socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo"):
        events.append(event)
    elif event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "os.system"):
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
            nodes += [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)]
    return names
