"""Runs the transcripts of the docs and compares the screen, word for word.

In a ```console block a line `$ command` is run in a fresh copy of the repository, the
rest is what the screen shows. `$ python sessions/...` runs on a pseudo-terminal: what
stands after a prompt is typed when the prompt appears; ^C and ^D, there or on a line of
their own, are pressed. A program whose last line is an idle `you>` stays open: what
follows is run in another terminal, with the port of its web chat for the usual one. `$
python -m websockets ...` is at a terminal, too: it is typed what is a JSON-RPC request.
Anything else runs through the shell, its output in a pipe. A line `...` matches any
lines. Free to differ: ports, tokens in links, ids of 8 to 12 hex digits (the same id
stays the same; of one that was shown, the beginning may be typed), process ids, dates,
times, durations, spaces at the end of a line. Commands of a doc in sessions/next run
from there.
"""

import contextlib
import difflib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path

import pytest
from harness import REPO
from harness import Screen
from harness import end_session
from harness import shipped_files

PROMPTS = [r"you> ", r".*\[y/N/a\] ", r".*\[y/N\] "]
PROMPT = re.compile("|".join(f"(?:{prompt})" for prompt in PROMPTS))
SETTING = r"\w+=(?:'[^']*'|[^\s']*) "
ON_TERMINAL = re.compile(rf"(?:{SETTING})*python3? sessions/\S+\.py(?: [^|<>&;]*)?")
CLIENT = re.compile(r"python3? -m websockets .*")
REQUEST = re.compile(r'\{"jsonrpc": "2\.0", "method": .*, "id": [^{}]+\}')
KEY = re.compile(r"\^([CD])")
PORT = "8765"
LINK = re.compile(r"http://127\.0\.0\.1:(\d+)/#token=")
HERE = "~/mini-openclaw"
ID = r"\b[0-9a-f]{8,12}\b"
FREE = [
    (r"(?P<token>#token=\w+)", r"#token=\w+"),
    (r"(?P<port>(?:127\.0\.0\.1|localhost):\d+)", r"(?:127\.0\.0\.1|localhost):\d+"),
    (r"(?P<date>\b\d{4}-\d\d-\d\d)", r"\d{4}-\d\d-\d\d"),
    (r"(?P<clock>\b\d\d:\d\d(?::\d\d(?:\.\d+)?)?\b)", r"\d\d:\d\d(?::\d\d(?:\.\d+)?)?"),
    (r"(?P<process>\b(?:pid|process) \d+)", r"(?:pid|process) \d+"),
    (r"(?P<span>\b\d+(?:\.\d+)? ?m?s\b)", r"\d+(?:\.\d+)? ?m?s"),
]
TOKEN = re.compile("|".join([*(pattern for pattern, _ in FREE), f"(?P<id>{ID})"]))
TIMEOUT = 30
SLOWLY = 'sleep() { command sleep "$1" "$1" "$1"; }\n'  # GNU's sleep adds them up


@dataclass
class Run:
    """One command of a transcript and the lines the screen is said to show."""

    command: str
    lines: list[str] = field(default_factory=list)

    @property
    def on_terminal(self) -> bool:
        return bool(ON_TERMINAL.fullmatch(self.command)) or self.is_client

    @property
    def is_client(self) -> bool:
        return bool(CLIENT.fullmatch(self.command))

    @property
    def stays(self) -> bool:
        return self.lines[-1:] == ["you>"]


def runs_of(block: str) -> list[Run]:
    """The commands of a block, each with its screen."""
    runs: list[Run] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            runs.append(Run(line[2:].strip()))
        elif runs:
            runs[-1].lines.append(line.rstrip())
        else:
            raise AssertionError(
                f"a transcript begins with '$ command', not with {line!r}"
            )
    return runs


# --- comparing ---


def pattern_of(line: str, ids: dict[str, str]) -> str:
    """A line as a regular expression in which only what may differ is free."""
    parts, position = [], 0
    for match in TOKEN.finditer(line):
        parts.append(re.escape(line[position : match.start()]))
        position = match.end()
        if match.lastgroup != "id":
            kinds = [
                name for pattern, _ in FREE for name in re.findall(r"P<(\w+)>", pattern)
            ]
            parts.append(FREE[kinds.index(match.lastgroup)][1])
        elif match[0] in ids:
            parts.append(f"(?P={ids[match[0]]})")
        else:
            ids[match[0]] = f"id{len(ids) + 1}"
            parts.append(f"(?P<{ids[match[0]]}>{ID})")
    return "".join([*parts, re.escape(line[position:])])


def same(expected: list[str], actual: list[str]) -> bool:
    """Whether a screen is the one that is expected."""
    return real_ids(expected, actual) is not None


def real_ids(expected: list[str], actual: list[str]) -> dict[str, str] | None:
    """What the ids of the doc are on the screen; None if it is another screen."""
    ids: dict[str, str] = {}
    whole = "".join(
        r"(?:.*\n)*?" if line == "..." else pattern_of(line, ids) + r"\n"
        for line in expected
    )
    match = re.fullmatch(whole, "".join(f"{line}\n" for line in actual))
    if not match or len(set(match.groupdict().values())) < len(ids):
        return None
    return {id: match[group] for id, group in ids.items()}


def tidy(lines: list[str]) -> list[str]:
    """Lines without the keys pressed at prompts, trailing spaces, and an idle prompt at
    the end.
    """
    shown = [pressed(line).rstrip() for line in lines]
    while shown and (not shown[-1] or PROMPT.fullmatch(f"{shown[-1]} ")):
        shown.pop()
    return shown


def pressed(line: str) -> str:
    """A line without the ^C or ^D after its prompt."""
    prompt, typed = at_its_prompt(line)
    return prompt + KEY.sub("", typed, count=1) if prompt else line


def at_its_prompt(line: str) -> tuple[str, str]:
    """A line as its prompt ("" when it has none) and what stands after it."""
    match = PROMPT.match(f"{line} ")
    return (line[: match.end()], line[match.end() :]) if match else ("", line)


def difference(expected: list[str], actual: list[str]) -> str:
    """Both screens, one below the other where they differ."""
    return "\n".join(
        difflib.unified_diff(expected, actual, "the doc", "the screen", lineterm="")
    )


# --- running ---


@dataclass
class Place:
    """A fresh copy of the repository, the environment of a newcomer in it, and what
    stays open.
    """

    folder: Path
    env: dict[str, str]
    slowly: bool = False
    is_next: bool = False
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    port: str = PORT


def fresh_place(folder: Path, root: Path = REPO) -> Place:
    """Copy what git tracks or would track; `python` there is the one that runs the
    tests.
    """
    copy, home, tools = folder / "copy", folder / "home", folder / "tools"
    for path in (copy, home, tools):
        path.mkdir(parents=True)
    for path in shipped_files(".", root):
        target = copy / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    for name in ("python", "python3"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        tool.chmod(0o755)
    env = {
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HOME": str(home),
        "SSL_CERT_DIR": str(home),  # see harness.clean_env
        "LANG": "C.UTF-8",
        "TERM": "xterm",
        "OFFLINE_PACE": "0",
        "GATEWAY_PORT": "0",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if site.ENABLE_USER_SITE:
        env["PYTHONUSERBASE"] = site.getuserbase()
    return Place(copy, env)


def perform(run: Run, place: Place) -> list[str]:
    """Run one command; the lines of its screen."""
    command = run.command.replace(PORT, place.port)
    if place.is_next:
        command = re.sub(
            r"\b(sessions/(?:offline_model|trace)\.py) ", r"\1 --next ", command
        )
    run = Run(command, run.lines)
    text = on_terminal(run, place) if run.on_terminal else in_shell(run, place)
    return text.replace(str(place.folder), HERE).splitlines()


def in_shell(run: Run, place: Place) -> str:
    """A command through the shell, its output and errors in one pipe."""
    if run.command.startswith("curl ") and not shutil.which("curl"):
        pytest.skip("needs curl")
    process = subprocess.Popen(
        [shutil.which("bash") or "sh", "-c", SLOWLY * place.slowly + run.command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=place.folder,
        env=place.env,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=TIMEOUT * (3 if place.slowly else 1))[0]
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{run.command!r} still ran after {TIMEOUT} s") from None
    finally:
        end_session(process.pid)
        process.wait()


def on_terminal(run: Run, place: Place) -> str:
    """A command on a pseudo-terminal, with the transcript's keys pressed at its
    prompts.
    """
    words = shlex.split(run.command)
    settings = [word for word in words if re.match(r"\w+=", word)]
    program = words[words.index(next(w for w in words if w.startswith("python"))) + 1 :]
    env = place.env | dict(setting.split("=", 1) for setting in settings)
    argv = ["sh", "-c", run.command] if run.is_client else [sys.executable, *program]
    with contextlib.ExitStack() as opened:
        screen = opened.enter_context(Screen(argv, env, cwd=place.folder))
        for number, line in enumerate(run.lines):
            prompt, typed = at_its_prompt(line)
            if prompt and (typed or number < len(run.lines) - 1):
                wait_until(screen, lambda: at_prompt(screen), f"a prompt for {line!r}")
                typed = complete_id(typed, run.lines, number, place, screen)
                send(screen, typed)
            elif KEY.fullmatch(line) or (run.is_client and REQUEST.fullmatch(line)):
                wait_for_lines(screen, run.lines[:number], place)
                send(screen, line)
        if run.is_client:
            wait_for_lines(screen, run.lines, place)
            return screen.paper
        shown = last_words(screen, run.stays)
        if run.stays:
            place.port = [PORT, *LINK.findall(shown)][-1]
            place.opened.push(opened.pop_all())
        return shown


def complete_id(
    typed: str, lines: list[str], number: int, place: Place, screen: Screen
) -> str:
    """What to type where the doc types the beginning of an id that it has shown.

    The doc's own line is completed, too: the screen will show all of the id.
    """
    match = re.fullmatch(r"(/\w+ )([0-9a-f]{3,12})", typed)
    shown = screen.paper.replace(str(place.folder), HERE)
    ids = real_ids(tidy(lines[:number]), tidy(shown.splitlines())) if match else None
    for id, real in (ids or {}).items():
        if id.startswith(match[2]):
            lines[number] = lines[number].replace(typed, match[1] + id)
            return match[1] + real
    return typed


def send(screen: Screen, typed: str) -> None:
    """Press what a line shows as typed, and wait until the screen has gone on to a next
    line.
    """
    rows = screen.paper.count("\n")
    if key := KEY.match(typed):
        screen.press(f"ctrl-{key[1].lower()}")
    else:
        screen.type(typed + "\n")
    wait_until(
        screen,
        lambda: screen.paper.count("\n") > rows or screen.ended,
        f"{typed!r} answered",
    )


def at_prompt(screen: Screen) -> bool:
    """Whether the last line is nothing but a prompt."""
    return bool(PROMPT.fullmatch(screen.paper.rpartition("\n")[2]))


def wait_for_lines(screen: Screen, lines: list[str], place: Place) -> None:
    """Wait until the screen shows these lines and no more."""

    def shown() -> bool:
        text = screen.paper.replace(str(place.folder), HERE)
        return same(tidy(lines), tidy(text.splitlines()))

    wait_until(screen, shown, "these lines:\n" + "\n".join(lines))


def wait_until(screen: Screen, true: Callable[[], bool], what: str) -> None:
    """Wait for a condition on the screen, as long as it may still come."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        length = len(screen.raw)
        if true():
            return
        left = deadline - time.monotonic()
        if left <= 0 or not screen.wait_change(length, left):
            if true():
                return
            raise AssertionError(f"the screen never showed {what}:\n{screen.paper}")


def last_words(screen: Screen, stay: bool) -> str:
    """The screen when the program has ended, or waits at a prompt for what is not
    there.
    """
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        length = len(screen.raw)
        if screen.process.poll() is not None:
            screen.wait_exit()
            return screen.paper
        if at_prompt(screen):
            shown = screen.paper
            if not stay:
                screen.press("ctrl-d")
                screen.wait_exit()
            return shown
        screen.wait_change(length, 0.05)
    raise AssertionError(
        f"neither the end nor a prompt after {TIMEOUT} s:\n{screen.paper}"
    )


def problems(block: str, folder: Path, root: Path = REPO, is_next: bool = False) -> str:
    """What the screen shows other than the block says; "" when it is all the same.

    On a busy machine a `sleep` may be too short: the second time each takes three times
    as long.
    """
    place = fresh_place(folder / "first", root)
    place.is_next = is_next
    found = difference_in(block, place)
    if found and re.search(r"\bsleep \d", block):
        place = fresh_place(folder / "second", root)
        place.slowly = True
        place.is_next = is_next
        found = difference_in(block, place)
    return found


def difference_in(block: str, place: Place) -> str:
    """The first command of a block whose screen differs from what it says, and how."""
    with place.opened:
        for run in runs_of(block):
            actual = tidy(perform(run, place))
            expected = tidy(run.lines)
            if not same(expected, actual):
                return f"$ {run.command}\n{difference(expected, actual)}"
    return ""
