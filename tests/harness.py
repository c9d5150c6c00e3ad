"""Runs the sections as a person runs them: on a pseudo-terminal, over pipes, or loaded
to look at.

A test says `@since("s02")` and takes the fixture `section`: it then runs on s02 and on
every later section found on disk.
"""

import codecs
import contextlib
import importlib.util
import itertools
import os
import re
import signal
import site
import struct
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType

import pytest
import warm

try:
    import fcntl
    import pty
    import termios
except ImportError:
    pty = None

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "sessions" / "en"
NEXT = REPO / "sessions" / "next"
ROWS, COLUMNS = 30, 100
SETTINGS = [
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "OPENAI_ORG_ID",
    "OPENAI_PROJECT_ID",
    "MODEL_ID",
    "MODEL_OPTIONS",
    "MODEL_TIMEOUT",
    "CONTEXT_TOKENS",
    "APPROVAL",
    "EMBEDDING_MODEL",
    "FALLBACK_MODELS",
    "OPENAI_API_KEY_2",
    "OPENAI_BASE_URL_2",
    "MODEL_ID_2",
    "TELEGRAM_BOT_TOKEN",
    "TELEGRAM_ALLOWED_CHATS",
    "TELEGRAM_BASE_URL",
    "FEISHU_APP_ID",
    "FEISHU_APP_SECRET",
    "FEISHU_DOMAIN",
    "FEISHU_ENCRYPT_KEY",
    "FEISHU_VERIFICATION_TOKEN",
    "FEISHU_ALLOWED_CHATS",
    "FEISHU_PORT",
    "GATEWAY_TOKEN",
    "HEARTBEAT_SECONDS",
    "HEARTBEAT_HOURS",
    "TIMEZONE",
    "OWNER",
    "SKILLS_DIR",
]
UNSHIPPED = {
    ".env",
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".pyc",
}
KEYS = {
    "enter": "\r",
    "tab": "\t",
    "escape": "\x1b",
    "backspace": "\x7f",
    "up": "\x1b[A",
    "down": "\x1b[B",
    "right": "\x1b[C",
    "left": "\x1b[D",
    "home": "\x1b[H",
    "end": "\x1b[F",
}

_unique = itertools.count(1)


class Section:
    """One script of the ladder and what belongs to it."""

    def __init__(self, path: Path):
        self.path = path
        self.label = path.name[:3]

    def __repr__(self) -> str:
        return f"Section({self.path.stem})"

    @property
    def doc(self) -> Path:
        return self.path.with_suffix(".md")

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def module(self) -> ModuleType:
        """The script as a module, loaded once per test process: do not change it, see
        `load`.
        """
        return self.load()

    def load(self) -> ModuleType:
        """A fresh module of its own, registered under a name of its own."""
        return load(self.path)


def load(path: Path) -> ModuleType:
    """Import a file under a unique name, leaving no bytecode behind."""
    name = f"{path.stem}__{next(_unique)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = before
    return module


def sections(folder: Path = FOLDER) -> list[Section]:
    """The sections of a folder, in order."""
    return [Section(path) for path in sorted(folder.glob("s[0-9][0-9]_*.py"))]


def since(label: str, until: str | None = None) -> pytest.MarkDecorator:
    """Mark a test with the section that earns it (and, rarely, the last one it holds
    for).
    """
    return pytest.mark.since(label, until=until)


def settings_in(path: Path) -> list[str]:
    """The names of the variables that a .env file sets or shows."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^\s*#?\s*(?:export\s+)?([A-Z][A-Z0-9_]+)\s*=", text, flags=re.M)


def clean_env(home: Path, workspace: Path | None = None) -> dict[str, str]:
    """An environment of its own; a setting is "" so that load_dotenv() cannot fill it
    in.
    """
    names = {
        *SETTINGS,
        *settings_in(REPO / ".env"),
        *settings_in(REPO / ".env.example"),
    }
    env = dict.fromkeys(sorted(names), "")
    env |= {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "TERM": "xterm",
    }
    env |= {"HOME": str(home), "GATEWAY_PORT": "0"}
    # no certificates there: to read all takes a third of a start
    env["SSL_CERT_DIR"] = str(home)
    if site.ENABLE_USER_SITE:
        env["PYTHONUSERBASE"] = site.getuserbase()
    if "COVERAGE_PROCESS_CONFIG" in os.environ:  # coverage counts in processes, too
        env["COVERAGE_PROCESS_CONFIG"] = os.environ["COVERAGE_PROCESS_CONFIG"]
    if os.name == "nt":
        env |= {
            name: os.environ[name]
            for name in ("SYSTEMROOT", "TEMP")
            if name in os.environ
        }
        env |= {"USERPROFILE": str(home), "PYTHONUTF8": "1"}
    if workspace:
        env["WORKSPACE_DIR"] = str(workspace)
    return env


def shipped_files(under: str = ".", root: Path = REPO) -> list[Path]:
    """The repository's files that git tracks or would track; all of them where git is
    missing.
    """
    command = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
    ]
    try:
        listing = subprocess.run(
            [*command, under],
            cwd=root,
            capture_output=True,
            check=True,
            encoding="utf-8",
        ).stdout
        paths = [root / name for name in sorted(set(listing.split("\0"))) if name]
    except (OSError, subprocess.CalledProcessError):
        paths = sorted((root / under).rglob("*"))
    own = [p for p in paths if not UNSHIPPED & {*p.relative_to(root).parts, p.suffix}]
    return [path for path in own if path.is_file()]


def argv_of(
    what: Section | Path | Sequence[str], args: Sequence[str] = ()
) -> list[str]:
    """The command line for a section, a script's path, or a ready argv."""
    if isinstance(what, Section):
        what = what.path
    if isinstance(what, str | Path):
        what = [sys.executable, str(what)]
    return [*map(str, what), *args]


def end_session(leader: int) -> None:
    """SIGKILL the process group of a session leader, and all of its session."""
    if os.name == "nt":
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)


MOTHER = warm.Mother(clean_env(Path(os.devnull)))
LAUNCH = """
import fcntl, os, resource, signal, sys, termios
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
if sys.argv[1]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def start(
    argv: list[str],
    env: Mapping[str, str],
    cwd: Path,
    streams: Sequence[int],
    cold: bool = False,
    fsize: int | None = None,
) -> subprocess.Popen | warm.Child:
    """Start a program in a session of its own, on stdin, stdout and stderr, perhaps a
    terminal.

    A section starts from a process that has the SDK imported, unless `cold`: see
    warm.py.
    """
    script = Path(cwd, argv[1]) if argv[0] == sys.executable and argv[1:] else Path()
    is_section = re.fullmatch(r"s\d\d_\w+\.py", script.name) and script.is_file()
    if is_section and not cold and MOTHER.can_start(env):
        return MOTHER.start(argv[1:], env, cwd, streams, fsize)
    # under nohup
    ignored = os.name != "nt" and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if os.isatty(streams[0]) or ignored or fsize is not None:
        limit = "" if fsize is None else str(fsize)
        argv = [sys.executable, "-I", "-S", "-c", LAUNCH, limit, *argv]
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )


def pipe(
    what: Section | Path | Sequence[str],
    stdin_text: str,
    env: Mapping[str, str],
    args: Sequence[str] = (),
    timeout: float = 30,
    cwd: Path = REPO,
    cold: bool = False,
    fsize: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script over pipes; a run that lasts too long is ended whole and raises.

    `cold` starts Python itself; no file may grow over `fsize` bytes.
    """
    argv = argv_of(what, args)
    (theirs, keys), (out, shown), (err, told) = [os.pipe() for _ in range(3)]
    try:
        process = start(argv, env, cwd, [theirs, shown, told], cold, fsize)
    except BaseException:
        for fd in (keys, out, err):
            os.close(fd)
        raise
    finally:
        for fd in (theirs, shown, told):
            os.close(fd)
    texts = ["", ""]
    jobs = [
        threading.Thread(target=_write, args=(keys, stdin_text), daemon=True),
        threading.Thread(target=_read, args=(out, texts, 0), daemon=True),
        threading.Thread(target=_read, args=(err, texts, 1), daemon=True),
    ]
    deadline = time.monotonic() + timeout
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(max(0, deadline - time.monotonic()))
    try:
        if any(job.is_alive() for job in jobs):
            raise subprocess.TimeoutExpired(argv, timeout)
        status = process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        end_session(process.pid)
        process.kill()
        process.wait(10)
        for job in jobs:
            job.join(1)
        raise AssertionError(
            f"{argv} still ran after {timeout} s\n--- stdout\n{texts[0]}\n---"
            f" stderr\n{texts[1]}"
        ) from None
    return subprocess.CompletedProcess(argv, status, *texts)


def _write(fd: int, text: str) -> None:
    with (
        contextlib.suppress(OSError),
        open(fd, "w", encoding="utf-8", errors="replace") as stream,
    ):
        stream.write(text)


def _read(fd: int, texts: list[str], number: int) -> None:
    with open(fd, encoding="utf-8", errors="replace") as stream:
        texts[number] = stream.read()


ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # control sequences: colours, cursor
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # titles and links
    r"|\x1b[()][0-9A-B]|\x1b[=>78cDEHM]"
    r"|\x1b(?:[\[\]()][^\x07]*)?$"  # one that is still arriving
)


def plain(raw: str) -> str:
    """Terminal output as one growing text: no escape sequences, backspaces applied."""
    text = re.sub(r"\r+\n", "\n", ESCAPE.sub("", raw).replace("\x07", ""))
    text = re.sub(r"\r+", "\n", text.rstrip("\r"))
    while "\b" in text:
        shorter = re.sub(r"[^\x08\n]\x08", "", text)
        text = shorter if shorter != text else text.replace("\b", "")
    return text


def width(char: str) -> int:
    """The columns one character takes."""
    if unicodedata.combining(char) or char in "\u200b\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class Paper:
    """A terminal of COLUMNS columns on endless paper: what a person sees and can scroll
    back to.
    """

    def __init__(self, columns: int = COLUMNS):
        self.columns = columns
        self.rows: list[list[str]] = [[]]
        self.wrapped: set[int] = set()
        self.row = self.column = 0

    def feed(self, raw: str) -> None:
        """Draw output: text, \\r \\n \\b \\t, cursor moves, and erased lines."""
        for piece in re.split(f"({ESCAPE.pattern})", raw):
            if piece.startswith("\x1b"):
                self.control(piece)
            else:
                for char in piece:
                    self.put(char)

    def put(self, char: str) -> None:
        if char == "\n":
            self.go_to(self.row + 1)
        elif char == "\r":
            self.column = 0
        elif char == "\b":
            self.column = max(0, min(self.column, self.columns) - 1)
        elif char == "\t":
            self.column = min(self.columns - 1, self.column // 8 * 8 + 8)
        elif char >= " ":
            self.draw(char)

    def draw(self, char: str) -> None:
        wide = width(char)
        if self.column + wide > self.columns:
            self.go_to(self.row + 1)
            self.wrapped.add(self.row)
            self.column = 0
        cells = self.rows[self.row]
        cells.extend(" " * (self.column + wide - len(cells)))
        if wide:
            cells[self.column : self.column + wide] = [char] + [""] * (wide - 1)
        elif self.column:
            cells[self.column - 1] += char
        self.column += wide

    def go_to(self, row: int) -> None:
        self.row = max(0, row)
        while len(self.rows) <= self.row:
            self.rows.append([])

    def control(self, sequence: str) -> None:
        match = re.fullmatch(r"\x1b\[(\d*)(?:;(\d*))?([A-Za-z@])", sequence)
        if not match:
            return
        number, verb = int(match[1] or 0), match[3]
        count, cells = max(1, number), self.rows[self.row]
        if verb in "AB":
            self.go_to(self.row + (count if verb == "B" else -count))
        elif verb in "CD":
            self.column = max(
                0, min(self.columns, self.column + (count if verb == "C" else -count))
            )
        elif verb == "G":
            self.column = count - 1
        elif verb == "P":
            del cells[self.column : self.column + count]
        elif verb == "@":
            cells[self.column : self.column] = " " * count
        elif verb == "K" and number == 0:
            del cells[self.column :]
        elif verb == "K":
            cells[:] = [] if number == 2 else [" "] * self.column + cells[self.column :]
        elif verb == "J" and number == 0:
            del cells[self.column :]
            del self.rows[self.row + 1 :]
            self.wrapped -= {row for row in self.wrapped if row > self.row}

    @property
    def text(self) -> str:
        """The paper so far; a line that the terminal broke at its edge is one line
        again.
        """
        parts = []
        for number, cells in enumerate(self.rows):
            joint = "" if number in self.wrapped or not number else "\n"
            parts.append(joint + "".join(cells))
        return "".join(parts)


class Screen:
    """A script on a pseudo-terminal of 100 x 30, with keys to press and a screen to
    read.
    """

    def __init__(
        self,
        what: Section | Path | Sequence[str],
        env: Mapping[str, str],
        args: Sequence[str] = (),
        cwd: Path = REPO,
        cold: bool = False,
        fsize: int | None = None,
    ):
        if pty is None:
            pytest.skip("needs a pseudo-terminal")
        self.raw = ""
        self._seen = 0
        self._ended = False
        self._arrival = threading.Condition()
        self._master, terminal = pty.openpty()
        fcntl.ioctl(
            self._master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0)
        )
        try:
            self.process = start(
                argv_of(what, args), env, cwd, [terminal] * 3, cold, fsize
            )
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(terminal)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:
                data = b""
            with self._arrival:
                self.raw += decoder.decode(data, final=not data)
                self._ended = not data
                self._arrival.notify_all()
            if not data:
                return

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """All output in order of arrival, without escape sequences."""
        return plain(self.raw)

    @property
    def paper(self) -> str:
        """What a person sees by scrolling back: redrawn and erased lines are gone."""
        paper = Paper()
        paper.feed(self.raw)
        return paper.text

    @property
    def ended(self) -> bool:
        """Whether no more output can come."""
        return self._ended

    def type(self, text: str) -> None:
        """Press the keys of a text; a newline in it is the Enter key."""
        data = text.replace("\n", "\r").encode()
        while data:
            data = data[os.write(self._master, data) :]

    def press(self, key: str) -> None:
        """Press a key by name: up, enter, ... or ctrl-c, ctrl-d, ..."""
        control = re.fullmatch(r"ctrl-([a-z\\])", key)
        if key == "ctrl-c":
            # a signal between a prompt and the read behind it would be lost
            time.sleep(0.1)
        self.type(chr(ord(control[1].upper()) - 64) if control else KEYS[key])

    def wait_for(
        self, what: str | re.Pattern[str], timeout: float = 10
    ) -> re.Match[str]:
        """Wait for a text, or a compiled pattern, after the last match."""
        pattern = re.compile(re.escape(what)) if isinstance(what, str) else what
        deadline = time.monotonic() + timeout
        with self._arrival:
            while True:
                text = self.text
                if match := pattern.search(text, min(self._seen, len(text))):
                    self._seen = match.end()
                    return match
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    break
                self._arrival.wait(left)
        why = "the output ended" if self._ended else f"{timeout} s passed"
        raise AssertionError(
            f"{why} without {pattern.pattern!r} on the screen:\n{self._shown()}"
        )

    def wait_change(self, length: int, timeout: float) -> bool:
        """Wait until `raw` is longer than `length`; False when the output has ended
        before.
        """
        with self._arrival:
            self._arrival.wait_for(
                lambda: len(self.raw) > length or self._ended, timeout
            )
            return len(self.raw) > length

    def wait_exit(self, timeout: float = 10) -> int:
        """Wait for the end and return the exit status (-9: ended by signal 9)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout} s:\n{self._shown()}"
            ) from None
        self._reader.join(1)
        return status

    def kill(self) -> None:
        """SIGKILL, as a crash: the whole process group, now."""
        end_session(self.pid)
        self.process.wait(10)

    def close(self) -> None:
        """End everything this screen has started."""
        # which writes at a SIGTERM
        if "COVERAGE_PROCESS_CONFIG" in os.environ and not self.ended:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.kill(self.pid, signal.SIGTERM)
                self.process.wait(3)
        self.kill()
        self._reader.join(1)
        if not self._reader.is_alive():
            with contextlib.suppress(OSError):
                os.close(self._master)

    def _shown(self) -> str:
        bar = "-" * 40
        return f"{bar}\n{self.text}\n{bar} (exit status: {self.process.poll()})"
