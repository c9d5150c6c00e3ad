"""What the harness costs, as ratios of figures that were measured in turn in this one run.

python tests/bench/bench.py            every benchmark, a table each
python tests/bench/bench.py prompt     one of them: prompt, call, append, replay, routing,
                                         gateway, memory, cron
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "sessions")]

from harness import REPO  # noqa: E402
from harness import Section  # noqa: E402
from harness import sections  # noqa: E402

SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
import offline_model
print(offline_model.serve(pace=0).url, flush=True)
sys.stdin.read()
"""

ECHO = """
import asyncio
from websockets.asyncio.server import serve

async def echo(client):
    async for frame in client:
        await client.send(frame)

async def main():
    server = await serve(echo, "127.0.0.1", 0, compression=None)
    print("at", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/#token=none", flush=True)
    await asyncio.Future()

asyncio.run(main())
"""


def medians(rounds: int, **measured: Callable[[], float]) -> dict[str, float]:
    """The median seconds of each function, which take turns so that they meet the same weather."""
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, measure in measured.items():
            times[name].append(measure())
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def timed(function: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """A function that gives the seconds which one call takes, on average over so many."""

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            function()
        return (time.perf_counter() - begin) / times

    return measure


def environment(url: str, folder: Path) -> dict[str, str]:
    """What a section needs to run against a server, with a workspace of its own."""
    settings = {"OPENAI_API_KEY": "offline", "OPENAI_BASE_URL": url, "MODEL_ID": "offline"}
    return {**os.environ, **settings, "MODEL_OPTIONS": "", "WORKSPACE_DIR": str(folder)}


def start(arguments: list[str], env: dict[str, str], until: bytes) -> Callable[[], None]:
    """A function that starts Python and waits until it has printed something."""

    def run() -> None:
        command = [sys.executable, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=env, **pipes) as process:
            seen = b""
            while until not in seen and (piece := os.read(process.stdout.fileno(), 4096)):
                seen += piece
            process.stdin.close()
            process.kill()

    return run


def prompt(url: str, folder: Path) -> None:
    """From the shell to the first prompt, against `import openai` alone (goal: at most 1.3)."""
    env = environment(url, folder)
    bare = start(["-c", "import openai; openai.OpenAI; print('ready', flush=True)"], env, b"ready")
    measured = {"import openai": timed(bare)}
    for section in sections():
        measured[section.label] = timed(start([str(section.path)], env, b"you> "))
    times = medians(9, **measured)
    for name, seconds in times.items():
        row("prompt", name, f"{seconds * 1000:.0f} ms", seconds / times["import openai"])


def call(url: str, folder: Path) -> None:
    """One streamed model call, against the bare SDK on the same messages (goal: at most 1.0)."""
    for section in sections():
        agent = make_agent(section, url, folder)
        for length in (0, 20, 200, 2000):
            turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
            agent.messages = turn * (length // 2)
            agent.messages.append({"role": "user", "content": "repeat after me"})

            def bare(messages: list[dict] = agent.messages, client=agent.client) -> None:
                create = client.chat.completions.create
                for _ in create(model="offline", messages=messages, stream=True):
                    pass

            ours = timed(lambda module=section.module, agent=agent: module.call_model(agent), 5)
            times = medians(9, ours=ours, bare=timed(bare, 5))
            label = f"{section.label}, {length + 1} messages"
            row("call", label, f"{times['ours'] * 1000:.1f} ms", times["ours"] / times["bare"])


def make_agent(section: Section, url: str, folder: Path) -> object:
    """An agent as the section itself makes one, without tools and without a screen."""
    os.environ |= environment(url, folder)
    agent = section.module.load_agent()
    agent.show = lambda text: None
    agent.tools = []
    return agent


def append(url: str, folder: Path) -> None:
    """A message on disk, against a bare write and fdatasync of the same bytes (goal: 0.8)."""
    section = sections()[-1]
    session = section.module.Session(section.module.Journal(folder / "s.jsonl"))
    message = {"role": "user", "content": "A line of ordinary length, such as people write. " * 4}
    session.append(message)
    line = (folder / "s.jsonl").read_bytes()
    raw = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def bare() -> None:
        os.write(raw, line)
        getattr(os, "fdatasync", os.fsync)(raw)

    times = medians(20, ours=timed(lambda: session.append(message), 50), bare=timed(bare, 50))
    label = f"{1 / times['ours']:.0f}/s"
    row("append", section.label, label, times["bare"] / times["ours"])


def replay(url: str, folder: Path) -> None:
    """10,000 messages read back, in seconds, and against json.loads of the same lines."""
    section = sections()[-1]
    message = {"type": "message", "used": 0}
    roles = ("user", "assistant") * 5000
    lines = [
        json.dumps(message | {"message": {"role": role, "content": "some words " * 20}})
        for role in roles
    ]
    (folder / "r.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    module = section.module
    ours = timed(lambda: module.Session(module.Journal(folder / "r.jsonl")))
    bare = timed(lambda: [json.loads(line) for line in lines])
    times = medians(7, ours=ours, bare=bare)
    row("replay", section.label, f"{times['ours']:.3f} s", times["ours"] / times["bare"])


def routing(url: str, folder: Path) -> None:
    """The agent for a message found among 100,000 bindings, against 10 (goal: 1.0)."""
    section = sections()[-1]
    look_ups = {}
    for size in (10, 100_000):
        file = folder / f"{size}.jsonl"
        lines = [f'{{"agent": "luna", "channel": "web", "peer": "p{n}"}}\n' for n in range(size)]
        file.write_text("".join(lines), encoding="utf-8")
        table = section.module.BindingTable(file, ["luna"])

        def resolve(table=table) -> None:
            table.resolve("web", "default", "p7", "")
            table.resolve("web", "default", "nobody:topic:7", "")

        look_ups[size] = timed(resolve, 2000)
    times = medians(20, few=look_ups[10], many=look_ups[100_000])
    label = f"{times['many'] / 2 * 1e6:.1f} us"
    row("routing", section.label, label, times["many"] / times["few"])


def gateway(url: str, folder: Path) -> None:
    """`status` over the gateway, against a bare websockets echo (goal: at least 0.5)."""
    section, env = sections()[-1], environment(url, folder) | {"GATEWAY_PORT": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", ECHO], env=env, **pipes) as echo,
        subprocess.Popen([sys.executable, str(section.path)], env=env, **pipes) as ours,
    ):
        links = {}
        for name, process in {"bare": echo, "ours": ours}.items():
            line = next(line for line in process.stdout if "#token=" in line)
            links[name] = line.split("http://")[1].strip().replace("/#", "/ws?")
        for clients in (1, 100, 1000):
            load = {name: partial(ask_status, link, clients) for name, link in links.items()}
            seconds = medians(5, **load)
            label = f"{section.label}, {clients} clients"
            row(
                "gateway",
                label,
                f"{4000 / seconds['ours']:.0f}/s",
                seconds["bare"] / seconds["ours"],
            )
        echo.kill()
        ours.kill()


def ask_status(link: str, clients: int, requests: int = 4000) -> float:
    """The seconds that so many requests take, sent by so many clients at once."""
    frame = '{"jsonrpc": "2.0", "id": 1, "method": "status"}'

    async def ask(client: ClientConnection) -> None:
        for _ in range(requests // clients):
            await client.send(frame)
            await client.recv()

    async def load() -> float:
        async with AsyncExitStack() as stack:
            opened = []
            for _ in range(clients):
                client = connect(f"ws://{link}", compression=None, ping_interval=None)
                opened.append(await stack.enter_async_context(client))
            began = time.perf_counter()
            await asyncio.gather(*map(ask, opened))
            return time.perf_counter() - began

    return asyncio.run(load())


def memory(url: str, folder: Path) -> None:
    """A search and a new note among 10,000 notes, against 100 (goals: 25 ms, a few ms)."""
    section, dice = sections()[-1], random.Random(1)
    words = [
        "".join(dice.choices("abcdefghijklmnoprstuvw", k=dice.randint(3, 9))) for _ in range(4000)
    ]
    stores = {}
    for size in (100, 10_000):
        days = folder / str(size) / "memory"
        days.mkdir(parents=True)
        for day in range(10):
            notes = (f"- {' '.join(dice.choices(words, k=18))}\n" for _ in range(size // 10))
            (days / f"2026-10-{day + 1:02}.md").write_text("".join(notes), encoding="utf-8")
        stores[size] = section.module.MemoryStore(days.parent, days.parent, "", None)
        stores[size].search(words[0])

    def search(store: object) -> None:
        store.search(" ".join(dice.choices(words, k=4)))

    def write(store: object) -> None:
        store.write(" ".join(dice.choices(words, k=18)))

    for name, step in {"search": search, "write": write}.items():
        few, many = (timed(partial(step, stores[size]), 5) for size in (100, 10_000))
        times = medians(20, few=few, many=many)
        row(
            "memory",
            f"{name}, 10,000",
            f"{times['many'] * 1000:.1f} ms",
            times["many"] / times["few"],
        )


def cron(url: str, folder: Path) -> None:
    """A tick of the scheduler with 10,000 jobs of which none is due, against 10 (goal: 1.0)."""
    section, module, services = sections()[-1], sections()[-1].module, {}
    for size in (10, 10_000):
        home = folder / f"cron{size}"
        home.mkdir()
        payload = {"kind": "system_event", "text": "x"}
        schedule = {"kind": "every", "every_seconds": 10**6}
        jobs = [{"id": f"j{n}", "schedule": schedule, "payload": payload} for n in range(size)]
        (home / "CRON.json").write_text(json.dumps({"jobs": jobs}), encoding="utf-8")
        app = SimpleNamespace(
            agent=SimpleNamespace(workspace=home),
            agents=SimpleNamespace(agents=["main"]),
            report=lambda about, *problems: None,
        )
        log = module.RunLog(home / "cron-runs.jsonl")
        services[size] = module.CronService(app, module.Clock(), log)
        services[size].tick()
    few, many = (timed(services[size].tick, 200) for size in (10, 10_000))
    times = medians(20, few=few, many=many)
    row("cron", section.label, f"{times['many'] * 1e6:.0f} us", times["many"] / times["few"])


def row(*cells: object) -> None:
    """Print one row: benchmark, case, figure, ratio."""
    *texts, ratio = cells
    print("".join(f"{text:<22}" for text in texts) + f"{ratio:6.2f} x", flush=True)


BENCHMARKS = {
    "prompt": prompt,
    "call": call,
    "append": append,
    "replay": replay,
    "routing": routing,
    "gateway": gateway,
    "memory": memory,
    "cron": cron,
}


def main() -> int:
    """Run the benchmarks that the command line names, or all."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := set(names) - set(BENCHMARKS):
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}")
        return 2
    command = [sys.executable, "-c", SERVER, str(REPO / "sessions")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        url = server.stdout.readline().strip()
        for name in names:
            print(f"\n{BENCHMARKS[name].__doc__.splitlines()[0]}")
            with tempfile.TemporaryDirectory(dir=REPO) as folder:
                BENCHMARKS[name](url, Path(folder))
        server.stdin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
