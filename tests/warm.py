"""Starts scripts from a process that has the SDK imported: real processes, at a tenth
of the time.

That process, the mother, is `python warm.py FD`. For each start it forks, and the child
runs the script as `__main__`, in a session of its own, on the pipes or the terminal it
is given. Nothing is patched: what costs a start its time, `import openai` and compiling
the script, is done once.

What differs: the hash seed is the mother's, and so is the command line that `ps` shows.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType
from types import ModuleType
from types import TracebackType

LATER = [  # what sections import as their channels start
    "cryptography.hazmat.primitives.ciphers.modes",
    "cryptography.hazmat.primitives.padding",
    "telegram",
    "websockets.asyncio.server",
]
QUESTION = [{"role": "user", "content": "?"}]
ANSWER = (
    b'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", '
    b'"choices": [{"index": 0, "delta": {"role": "assistant", "content": "!"}, '
    b'"finish_reason": "stop"}], '
    b'"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}\n\n'
    b"data: [DONE]\n\n"
)
POSSIBLE = hasattr(os, "fork") and hasattr(socket, "send_fds")


def fixed(env: Mapping[str, str]) -> dict[str, str]:
    """What of an environment Python takes in as it starts, and so cannot be given to a
    child.
    """
    names = [
        name for name in env if name.startswith(("PYTHON", "LANG", "LC_", "OPENAI_LOG"))
    ]
    return {name: env[name] for name in names if name != "PYTHONDONTWRITEBYTECODE"}


class Child:
    """A started script, waited for as a Popen is."""

    def __init__(self, line: socket.socket):
        with line:
            self._reports = line.makefile("rb", 0)
        self.returncode: int | None = None
        self.pid = self._report("started")

    def _report(self, word: str) -> int:
        line = self._reports.readline().decode()
        if not line.startswith(word):
            raise ChildProcessError(f"not {word}, but: {line!r}")
        return int(line.split()[1])

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = self._report("ended")
            self._reports.close()
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Mother:
    """The process that forks; it is there from the first start until `end`."""

    def __init__(self, env: Mapping[str, str]):
        self._env = dict(env)
        self._link: socket.socket | None = None
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def can_start(self, env: Mapping[str, str]) -> bool:
        """Whether a script with this environment can come from here."""
        return POSSIBLE and fixed(env) == fixed(self._env)

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike,
        streams: Sequence[int],
        fsize: int | None = None,
    ) -> Child:
        """Start a script, with its arguments, on stdin, stdout and stderr."""
        order = {"command": list(command), "env": dict(env), "fsize": fsize}
        order["cwd"] = os.path.abspath(cwd)
        line, theirs = socket.socketpair()
        with self._lock, theirs:
            if self._link is None:
                self._begin()
            socket.send_fds(self._link, [b"."], [theirs.fileno(), *streams])
        line.sendall(json.dumps(order).encode())
        line.shutdown(socket.SHUT_WR)
        return Child(line)

    def _begin(self) -> None:
        self._link, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._env,
                start_new_session=True,
            )

    def end(self) -> None:
        if self._link:
            self._link.close()
            self._process.wait(10)
            self._link = None


# --- inside the mother ---


@functools.lru_cache
def compiled(source: bytes, path: str) -> CodeType:
    return compile(source, path, "exec", dont_inherit=True)


def code_of(path: str) -> CodeType | None:
    """The code of a script; None if there is something wrong with it, which the child
    will say.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return compiled(Path(path).read_bytes(), path)
    except (OSError, SyntaxError, ValueError):
        return None


def read_order(line: socket.socket) -> dict:
    with line.makefile("rb") as stream:
        return json.load(stream)


def be_mother(link: socket.socket) -> tuple[dict, CodeType | None]:
    """Fork for each order, until there is nobody to give one. Returns in the children
    alone.
    """
    while True:
        data, fds, *_ = socket.recv_fds(link, 1, 4)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not data:
            sys.exit()
        line, *streams = fds
        with socket.socket(fileno=line) as reports:
            order = read_order(reports)
            path = os.path.join(order["cwd"], order["command"][0])
            code = code_of(path)
            if not os.fork():
                link.close()
                watch(reports, streams)
                set_up(order, streams)
                reports.sendall(b"started %d\n" % os.getpid())
                return order, code
        for fd in streams:
            os.close(fd)


def watch(reports: socket.socket, streams: list[int]) -> None:
    """Fork once more and tell how the child ends. Returns in the child alone."""
    if child := os.fork():
        for fd in streams:
            os.close(fd)
        _, status = os.waitpid(child, 0)
        with suppress(OSError):
            reports.sendall(b"ended %d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)


def set_up(order: dict, streams: list[int]) -> None:
    """Become what a started Python is before it runs its script."""
    import fcntl
    import resource
    import termios

    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdin = sys.__stdin__ = os.fdopen(
        0, "r", -1, "utf-8", "surrogateescape", closefd=False
    )
    sys.stdout = sys.__stdout__ = os.fdopen(
        1, "w", -1, "utf-8", "surrogateescape", closefd=False
    )
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", 1, "utf-8", "backslashreplace", closefd=False
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["env"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    time.tzset()
    os.chdir(order["cwd"])
    if order["fsize"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"], order["fsize"]))


def hide_mother(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Show an error as if the script had been started by itself."""
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def run(order: dict, code: CodeType | None) -> None:
    """Run the script as Python runs one that is named on its command line."""
    command = order["command"]
    path = os.path.join(order["cwd"], command[0])
    sys.argv = command
    sys.orig_argv = [sys.executable, *command]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    main = sys.modules["__main__"] = ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=__builtins__, __cached__=None)
    sys.excepthook = hide_mother
    exec(code or compiled(Path(path).read_bytes(), path), vars(main))


def keep(modules: Mapping[str, ModuleType]) -> None:
    """Leave out of the end of Python what the mother has imported: to free it takes the
    longest.

    The script itself, and what it alone has imported, end as ever.
    """
    for name in modules:
        if name not in ("__main__", "builtins", "sys"):
            sys.modules.pop(name, None)


def ask_once(openai: ModuleType) -> None:
    """Have the SDK build what it builds at its first request."""

    def answer() -> None:
        with server.accept()[0] as line:
            line.recv(65536)
            line.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + ANSWER
            )

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        with (
            suppress(openai.OpenAIError),
            openai.OpenAI(api_key="none", base_url=url) as client,
        ):
            list(
                client.chat.completions.create(
                    model="m", messages=QUESTION, stream=True
                )
            )
        thread.join()


def main() -> None:
    imported: dict[str, ModuleType] = {}
    atexit.register(keep, imported)  # the first to register is the last to be called
    import dotenv  # noqa: F401
    import openai
    from openai.types import chat

    for name in LATER:
        with suppress(ImportError):
            importlib.import_module(name)
    chat.ChatCompletionChunk.model_rebuild()
    ask_once(openai)
    imported.update(sys.modules)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(imported))
    gc.collect()
    gc.freeze()
    run(*be_mother(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
