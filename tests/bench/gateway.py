"""How many requests the gateway answers, and how soon: `gateway`."""

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import AsyncExitStack
from contextlib import contextmanager
from pathlib import Path

from measure import at_least
from measure import environment
from measure import ladder
from measure import medians
from measure import row
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect

REQUESTS = 4000
STATUS = '{"jsonrpc": "2.0", "id": 1, "method": "status"}'
ECHO = """
import asyncio
from websockets.asyncio.server import serve

async def echo(client):
    async for frame in client:
        await client.send(frame)

async def main():
    server = await serve(echo, "127.0.0.1", 0, compression=None)
    port = server.sockets[0].getsockname()[1]
    print("at", f"http://127.0.0.1:{port}/#token=none", flush=True)
    await asyncio.Future()

asyncio.run(main())
"""


def gateway(folder: Path) -> None:
    """`status` over the gateway, against a bare websockets echo; and its latency."""
    section, env = ladder("s05")[-1], environment("http://127.0.0.1:9/v1", folder)
    with served(["-c", ECHO], env) as echo, served([str(section.path)], env) as ours:
        for clients in (1, 10, 100, 1000):
            waits: dict[str, list[float]] = {"websockets echo": [], section.label: []}
            links = zip(waits, (echo, ours), strict=True)
            load = {name: loading(link, clients, waits[name]) for name, link in links}
            seconds = medians(7, load)
            for name, took in seconds.items():
                *_, last = cuts = statistics.quantiles(waits[name], n=100)
                latency = f"p50 {cuts[49] * 1000:.1f} ms, p99 {last * 1000:.1f} ms"
                ratio = seconds["websockets echo"] / took
                goal = f"; {at_least(0.5, ratio)}" if name == section.label else ""
                rate = f"{REQUESTS / took:,.0f}/s"
                row(f"{clients} clients", name, rate, ratio, latency + goal)


@contextmanager
def served(arguments: list[str], env: dict[str, str]) -> Iterator[str]:
    """The link to the socket of a program that prints one."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *arguments], env=env, **pipes) as process:
        try:
            line = next(line for line in process.stdout if "#token=" in line)
            yield line.split("http://")[1].strip().replace("/#", "/ws?")
        finally:
            process.kill()


def loading(link: str, clients: int, waits: list[float]) -> Callable[[], float]:
    """A function that has so many clients ask at once and notes each time."""

    async def ask(client: ClientConnection) -> None:
        for _ in range(REQUESTS // clients):
            begin = time.perf_counter()
            await client.send(STATUS)
            await client.recv()
            waits.append(time.perf_counter() - begin)

    async def load() -> float:
        async with AsyncExitStack() as stack:
            opened = []
            for _ in range(clients):
                client = connect(f"ws://{link}", compression=None, ping_interval=None)
                opened.append(await stack.enter_async_context(client))
            began = time.perf_counter()
            await asyncio.gather(*map(ask, opened))
            return time.perf_counter() - began

    return lambda: asyncio.run(load())
