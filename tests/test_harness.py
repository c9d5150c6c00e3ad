"""The harness itself, on small made-up scripts."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import COLUMNS
from harness import MOTHER
from harness import Paper
from harness import Screen
from harness import Section
from harness import clean_env
from harness import pipe
from harness import plain
from harness import sections

PARROT = """
import os
import sys
from dataclasses import dataclass
try:
    import readline
except ImportError:
    pass

@dataclass
class Bird:
    name: str

def main():
    print(os.isatty(0), os.get_terminal_size() if os.isatty(0) else "")
    while True:
        try:
            text = input("you> ")
        except KeyboardInterrupt:
            print("stopped")
            return 3
        except EOFError:
            print("bye")
            return 0
        print("\\x1b[1m" + text.upper() + "\\x1b[0m")

if __name__ == "__main__":
    sys.exit(main())
"""
KEEPER = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
child = subprocess.Popen(sleep, process_group=0)
print("child", child.pid, flush=True)
time.sleep(60)
"""
PROBE = """
import json, os, resource, signal, sys, threading
def stream(s):
    return [s.encoding, s.errors, s.line_buffering, s.closed, s.isatty(), s.fileno()]
def handler(number):
    return str(signal.getsignal(number)).split(" at ")[0]
here = {
    "argv": [sys.argv, sys.orig_argv], "path": sys.path, "env": dict(os.environ),
    "cwd": os.getcwd(), "fds": [f for f in range(99) if os.path.exists(f"/dev/fd/{f}")],
    "leads": [os.getsid(0), os.getpgid(0)] == [os.getpid()] * 2,
    "terminal": os.isatty(0) and [os.ttyname(0)[:5], os.tcgetpgrp(0) == os.getpid()],
    "signals": [handler(n) for n in sorted(signal.valid_signals())],
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "streams": [stream(s) for s in (sys.stdin, sys.stdout, sys.stderr, sys.__stderr__)],
    "main": [__name__, __file__, __doc__, __spec__],
    "is main": sys.modules["__main__"].__dict__ is globals(),
    "limits": resource.getrlimit(resource.RLIMIT_FSIZE),
    "bytecode": sys.dont_write_bytecode,
    "threads": threading.active_count(), "umask": os.umask(0o22), "nice": os.nice(0),
}
with open(sys.argv[1], "w") as file:
    json.dump(here, file, indent=1, sort_keys=True)
"""
ENDS = [
    "pass",
    "raise SystemExit(3)",
    "raise SystemExit('said why')",
    "def fail():\n    raise KeyError('gone')\nfail()",
    "raise KeyboardInterrupt",
    "this is no Python",
    "'\\d'",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import os, signal; os.kill(os.getpid(), signal.SIGINT); open(0).read()",
    "import atexit; atexit.register(print, 'at exit'); print('said', end='')",
    "import threading, time\nthreading.Timer(0.2, print, ['late']).start()",
    "print('\\udcff half'); import sys; print('\\ud800', file=sys.stderr)",
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
both = pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])


def script(folder: Path, text: str) -> Section:
    path = folder / "s01_made_up.py"
    path.write_text(text, encoding="utf-8")
    return Section(path)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (ProcessLookupError, FileNotFoundError):
        return False


@both
def test_screen_types_and_reads(tmp_path: Path, cold: bool):
    with Screen(script(tmp_path, PARROT), clean_env(tmp_path), cold=cold) as screen:
        screen.wait_for("True")
        assert re.search(r"columns=100, lines=30", screen.text)
        screen.wait_for("you> ")
        screen.type("grüße 你好\n")
        screen.wait_for(re.compile(r"^GRÜSSE 你好$", re.M))
        with pytest.raises(AssertionError, match="passed without 'GR"):
            screen.wait_for("GR", timeout=0.1)
        screen.wait_for("you> ")
        screen.type("ab")
        screen.press("backspace")
        screen.type("c\n")
        screen.wait_for("AC")
        screen.wait_for("you> ")
        screen.press("up")
        screen.wait_for("ac")
        screen.press("enter")
        screen.wait_for("AC")
        screen.wait_for("you> ")
        screen.press("ctrl-d")
        assert screen.wait_exit() == 0
        assert (
            screen.paper.endswith("you> ac\nAC\nyou> ac\nAC\nyou> \nbye\n")
            or "bye" in screen.text
        )
        with pytest.raises(AssertionError, match="the output ended"):
            screen.wait_for("never")


@both
def test_screen_interrupts(tmp_path: Path, cold: bool):
    with Screen(script(tmp_path, PARROT), clean_env(tmp_path), cold=cold) as screen:
        screen.wait_for("you> ")
        screen.press("ctrl-c")
        screen.wait_for("stopped")
        assert screen.wait_exit() == 3


@both
@pytest.mark.skipif(
    not os.path.isdir("/proc"), reason="needs /proc to find a session's processes"
)
def test_screen_leaves_nothing_behind(tmp_path: Path, cold: bool):
    with Screen(script(tmp_path, KEEPER), clean_env(tmp_path), cold=cold) as screen:
        child = int(screen.wait_for(re.compile(r"child (\d+)"))[1])
        assert alive(child)
        with pytest.raises(AssertionError, match="still running"):
            screen.wait_exit(0.1)
        screen.kill()
        assert screen.wait_exit() == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


@both
def test_pipe(tmp_path: Path, cold: bool):
    section = script(tmp_path, PARROT)
    done = pipe(section, "hi\nyou\n", clean_env(tmp_path), cold=cold)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "False \nyou> HI\nyou> YOU\nyou> bye\n".replace(
        "HI", "\x1b[1mHI\x1b[0m"
    ).replace("YOU\n", "\x1b[1mYOU\x1b[0m\n")
    with pytest.raises(AssertionError, match="still ran after"):
        pipe(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            "",
            clean_env(tmp_path),
            timeout=0,
        )
    section = script(
        tmp_path, "import time; print('begun', flush=True); time.sleep(60)"
    )
    with pytest.raises(AssertionError, match="still ran after(?s:.*)begun"):
        pipe(section, "", clean_env(tmp_path), timeout=2, cold=cold)


@needs_fork
@pytest.mark.parametrize("on_terminal", [False, True], ids=["pipe", "terminal"])
def test_a_warm_script_finds_what_a_cold_one_finds(tmp_path: Path, on_terminal: bool):
    section, env = script(tmp_path, PROBE), clean_env(tmp_path) | {"ÜNUSUAL": "\udcff"}
    found = []
    for cold in (True, False):
        result = tmp_path / "result"
        how = {
            "args": [str(result), "一"],
            "cwd": tmp_path,
            "cold": cold,
            "fsize": 1 << 20,
        }
        if on_terminal:
            with Screen(section, env, **how) as screen:
                assert screen.wait_exit() == 0, screen.text
        else:
            done = pipe(section, "", env, **how)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found.append(json.loads(result.read_text(encoding="utf-8")))
        result.unlink()
    assert found[0] == found[1]
    assert found[1]["env"] == env and found[1]["fds"][:3] == [0, 1, 2]


@needs_fork
@pytest.mark.parametrize("code", ENDS)
def test_a_warm_script_ends_as_a_cold_one(tmp_path: Path, code: str):
    section = script(tmp_path, code)
    cold, warm = (
        pipe(section, "", clean_env(tmp_path), cold=cold) for cold in (True, False)
    )
    assert vars(cold) == vars(warm)


@needs_fork
def test_only_sections_start_warm_and_only_as_python_would(tmp_path: Path):
    text = "import sys; print('openai' in sys.modules, end='')"
    section, env = script(tmp_path, text), clean_env(tmp_path)
    other = tmp_path / "other.py"
    other.write_text(text, encoding="utf-8")
    assert pipe(section, "", env).stdout == "True"
    assert (
        pipe([sys.executable, section.path.name], "", env, cwd=tmp_path).stdout
        == "True"
    )
    assert pipe(section, "", env | {"PYTHONDONTWRITEBYTECODE": "1"}).stdout == "True"
    for what, more in [
        (other, {}),
        (section, {"PYTHONHASHSEED": "1"}),
        (section, {"LANG": "C"}),
    ]:
        assert pipe(what, "", env | more).stdout == "False"
    MOTHER.end()
    assert pipe(section, "", env).stdout == "True", "there is no second mother"


def test_modules_are_fresh_and_leave_no_trace(tmp_path: Path):
    section = script(tmp_path, PARROT)
    assert section.module is section.module
    assert section.load() is not section.load()
    assert section.module.Bird("coco").name == "coco"
    assert sys.modules[section.module.__name__] is section.module
    assert [found.label for found in sections(tmp_path)] == ["s01"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s01_made_up.py"]


def test_environment_is_clean(
    monkeypatch: pytest.MonkeyPatch, env: dict, workspace: Path
):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("SOMETHING_ELSE", "secret")
    fresh = clean_env(workspace)
    assert "secret" not in fresh.values()
    assert fresh["OPENAI_API_KEY"] == fresh["CONTEXT_TOKENS"] == ""
    assert env["WORKSPACE_DIR"] == str(workspace)


def test_plain_text():
    assert (
        plain("\x1b[1mbold\x1b[0m\r\n\x1b]0;title\x07next\x1b[?2004h\r\n")
        == "bold\nnext\n"
    )
    assert plain("abc\b \b\b \bx\r\n") == "ax\n"
    assert plain("you> \r\x1b[Knews\r\nyou> \x1b[3") == "you> \nnews\nyou> "


def paper(raw: str, columns: int = COLUMNS) -> str:
    page = Paper(columns)
    page.feed(raw)
    return page.text


def test_paper():
    assert paper("you> half\r\x1b[Knews\r\nyou> half") == "news\nyou> half"
    assert paper("one\r\ntwo\x1b[A\r\x1b[2Kuno") == "uno\ntwo"
    assert paper("one\r\ntwo\x1b[A\r\x1b[Jx") == "x"
    assert paper("abcdef", 4) == "abcdef"
    assert paper("你好吗x\r\nnext", 5) == "你好吗x\nnext"
    assert paper("ab\tc\b\x1b[1Pd") == "ab      d"
    assert paper("abc\x1b[2D\x1b[@X\x1b[Cc") == "aXbc"
    assert paper("e\u0301") == "e\u0301"
