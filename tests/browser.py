"""Headless Chromium for the tests, over the DevTools protocol: needs nothing but
`websockets`.

with Browser() as browser:
    browser.open("http://127.0.0.1:8765/")
    browser.evaluate("document.querySelector('#text').focus()")
    browser.type("hello")
    browser.press("Enter")
    browser.wait_for("document.body.innerText.includes('Hello to you')")
    assert browser.console == []
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage
--no-first-run --no-default-browser-check --no-proxy-server
--disable-background-networking --disable-sync --disable-component-update
--disable-extensions --disable-breakpad --disable-crash-reporter
--disable-search-engine-choice-screen --disable-features=Translate,MediaRouter
--mute-audio --password-store=basic --use-mock-keychain --window-size=1000,800
--remote-debugging-port=0"""
KEYS = {  # the codes that a page may ask for
    "Enter": 13, "Tab": 9, "Escape": 27, "Backspace": 8, "Delete": 46, " ": 32,
    "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34,
    "ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39,
}  # fmt: skip


class BrowserError(Exception):
    """The browser refused a command, or the page threw an exception."""


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium with one tab, on a profile of its own that is gone afterwards."""

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._number = 0
        self._session: str | None = None

    def __enter__(self) -> "Browser":
        if not (program := find()):
            raise BrowserError(f"none of {', '.join(NAMES)} is installed")
        self._folder = Path(tempfile.mkdtemp(prefix="browser-"))
        log = self._folder / "log"
        # HOME and TMPDIR too, so that whatever it writes lies in the folder.
        env = {**os.environ, "HOME": str(self._folder), "TMPDIR": str(self._folder)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    program,
                    *FLAGS.split(),
                    f"--user-data-dir={self._folder}",
                    "about:blank",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={key: env[key] for key in env if not key.startswith("XDG_")},
                start_new_session=True,
            )
        try:
            url = "ws://127.0.0.1:{}{}".format(*self._address(log))
            self._socket = connect(url, legacy=True, proxy=None, max_size=None)
            tabs = self.call("Target.getTargets")["targetInfos"]
            tab = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
            attached = self.call("Target.attachToTarget", targetId=tab, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self._session = None
            self.call("Browser.close", timeout=2)
            self._process.wait(2)
        with contextlib.suppress(Exception):
            self._socket.close()
        self._stop()

    def _address(self, log: Path, timeout: float = 30) -> tuple[str, str]:
        """The port and the path that Chromium writes down once it listens."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                port, path = (self._folder / "DevToolsActivePort").read_text().split()
                return port, path
            time.sleep(0.05)
        raise BrowserError(
            f"Chromium did not start:\n{log.read_text(errors='replace')[-2000:]}"
        )

    def _stop(self, timeout: float = 5) -> None:
        """Kill all that is left of the process group, and remove the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + timeout
        # a child may still write
        while self._folder.exists() and time.monotonic() < deadline:
            shutil.rmtree(self._folder, ignore_errors=True)
            time.sleep(0.02)

    def call(self, method: str, timeout: float = 20, **params: object) -> dict:
        """One DevTools command, and its result."""
        self._number += 1
        frame = {"id": self._number, "method": method, "params": params}
        if self._session:
            frame["sessionId"] = self._session
        self._socket.send(json.dumps(frame))
        deadline = time.monotonic() + timeout
        while True:
            answer = json.loads(
                self._socket.recv(timeout=max(0, deadline - time.monotonic()))
            )
            if answer.get("id") != self._number:
                self._note(answer.get("method"), answer.get("params", {}))
            elif "error" in answer:
                raise BrowserError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]

    def _note(self, event: str | None, params: dict) -> None:
        """Keep what an event says about an error."""
        if event == "Runtime.exceptionThrown":
            self._seen.append(f"exception: {_reason(params['exceptionDetails'])}")
        elif event == "Runtime.consoleAPICalled" and params["type"] in (
            "error",
            "assert",
        ):
            words = [
                str(arg.get("value", arg.get("description"))) for arg in params["args"]
            ]
            self._seen.append(f"console: {' '.join(words)}")
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self._seen.append(
                f"{entry['source']}: {entry['text']} {entry.get('url', '')}".strip()
            )

    @property
    def console(self) -> list[str]:
        """Errors seen so far, as "source: text url"; a failed connection is of source
        network.
        """
        # what came before its answer is in by now
        self.call("Runtime.evaluate", expression="0")
        return list(self._seen)

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded; only a new #fragment loads
        nothing.
        """
        if error := self.call("Page.navigate", url=url).get("errorText"):
            raise BrowserError(f"{url}: {error}")
        self.wait_for("document.readyState === 'complete'", 20)

    def reload(self) -> None:
        """Load the page again, as F5 does."""
        before = self.evaluate("performance.timeOrigin")
        self.call("Page.reload")
        self.wait_for(
            f"performance.timeOrigin !== {before!r} && document.readyState ==="
            f" 'complete'",
            20,
        )

    def evaluate(self, js: str, timeout: float = 20) -> object:
        """The value of an expression, awaited if it is a promise."""
        options = {"awaitPromise": True, "returnByValue": True, "replMode": True}
        answer = self.call(
            "Runtime.evaluate", timeout, expression=js, userGesture=True, **options
        )
        if "exceptionDetails" in answer:
            raise BrowserError(_reason(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, condition: str, timeout: float = 10) -> None:
        """Ask until the expression holds, in JavaScript's eyes: an element does, null
        does not.
        """
        deadline = time.monotonic() + timeout
        error = None
        while time.monotonic() < deadline:
            try:
                if self.evaluate(f"Boolean(await ({condition}))"):
                    return
            except BrowserError as thrown:  # also while one page makes way for the next
                error = thrown
            time.sleep(0.03)
        raise TimeoutError(
            f"not within {timeout} s:"
            f" {condition}\n{error or ''}\n{self.console}\n{self.text()}"
        )

    def type(self, text: str) -> None:
        """Put text where the focus is, as a keyboard or an input method does."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release one key: a character, or a name such as Enter, Tab or
        ArrowUp.
        """
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = KEYS.get(key) or ord(key.upper())
        event = {
            "key": key,
            "windowsVirtualKeyCode": code,
            "modifiers": 8 if shift else 0,
        }
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **event, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def text(self) -> str:
        """What the page shows, as text."""
        return str(self.evaluate("document.body.innerText"))

    def emulate(
        self, width: int, height: int, mobile: bool = False, dark: bool = False
    ) -> None:
        """Another window or phone, and its colour scheme."""
        size = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 2 if mobile else 1,
        }
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", mobile=mobile, **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: str | Path) -> None:
        """What is to be seen, as a PNG."""
        Path(path).write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot")["data"])
        )


def _reason(details: dict) -> str:
    """What an exceptionDetails object says."""
    return details.get("exception", {}).get("description") or details["text"]
