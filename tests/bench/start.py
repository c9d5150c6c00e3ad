"""What the scripts take before they are asked anything: `prompt` and `idle`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fake_telegram import FakeTelegram
from measure import at_most
from measure import environment
from measure import ladder
from measure import medians
from measure import row
from measure import timed

IMPORT = "import openai; openai.OpenAI; print('you> ', flush=True); input()"
NO_SERVER = "http://127.0.0.1:9/v1"


def launch(
    arguments: list[str], env: dict[str, str], seconds: float = 0
) -> subprocess.Popen:
    """Start Python, wait until it prompts, and perhaps a little longer."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *arguments], env=env, **pipes)
    seen = b""
    while b"you> " not in seen and (piece := os.read(process.stdout.fileno(), 4096)):
        seen += piece
    time.sleep(seconds)
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def starting(arguments: list[str], env: dict[str, str]) -> Callable[[], float]:
    """A function that starts Python and gives the seconds until it prompts."""
    return timed(lambda: end(launch(arguments, env)))


def prompt(folder: Path) -> None:
    """From the shell to the first prompt, against `import openai` alone."""
    env = environment(NO_SERVER, folder)
    scripts = {s.label: starting([str(s.path)], env) for s in ladder()}
    times = medians(7, {"import openai": starting(["-c", IMPORT], env)} | scripts)
    for name, seconds in times.items():
        ratio = seconds / times["import openai"]
        goal = at_most(1.3, ratio) if name in scripts else ""
        row("first prompt", name, f"{seconds * 1000:.0f} ms", ratio, goal)


def idle(folder: Path) -> None:
    """Memory in use two seconds after the prompt, with Telegram and the gateway on."""
    section, figures = ladder("s05")[-1], {}
    with FakeTelegram() as telegram:
        env = environment(NO_SERVER, folder) | {"TELEGRAM_BOT_TOKEN": telegram.token}
        env |= {"TELEGRAM_BASE_URL": telegram.url, "TELEGRAM_ALLOWED_CHATS": "1"}
        scripts = {"import openai": ["-c", IMPORT], section.label: [str(section.path)]}
        for name, arguments in scripts.items():
            process = launch(arguments, env, 2)
            command = ["ps", "-o", "rss=", "-p", str(process.pid)]
            figures[name] = (
                int(subprocess.run(command, capture_output=True).stdout) / 1024
            )
            end(process)
    for name, size in figures.items():
        goal = at_most(90, size, " MiB") if name == section.label else ""
        row(
            "memory in use",
            name,
            f"{size:.0f} MiB",
            size / figures["import openai"],
            goal,
        )
