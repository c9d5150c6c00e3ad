"""What bench.py measures in a process of its own: python peers.py NAME ARGUMENT...

It prints the steps that it can do, none if its library is missing, and then for each
line `[step, times]` the seconds that one step took. Each library is used as its
documentation shows, with its telemetry off; the asynchronous ones run on one loop that
stays open.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Callable
from collections.abc import Coroutine
from contextlib import redirect_stdout
from functools import cache
from functools import partial
from importlib import import_module
from pathlib import Path

SAY, ADD = "Say something.", "Please add 2 and 3."  # what quick_model.py answers to
ON = "Go on and on."
NUMBER = {"type": "integer", "description": "a number"}
SCHEMA = {
    "type": "object",
    "properties": {"a": NUMBER, "b": NUMBER},
    "required": ["a", "b"],
}
NAMES = [f"add_{number}" for number in range(10)]
KEY = "offline"
Steps = dict[str, Callable[[], object]]
os.environ |= {"OPENAI_API_KEY": KEY, "LANGSMITH_TRACING": "false"}


def schemas(names: list[str]) -> list[dict]:
    """Tools as they go over the wire."""
    about = {"description": "Add two numbers.", "parameters": SCHEMA}
    return [{"type": "function", "function": {"name": name, **about}} for name in names]


def functions(names: list[str]) -> list[Callable[[int, int], int]]:
    """Tools as the libraries take them."""

    def make(name: str) -> Callable[[int, int], int]:
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        add.__name__ = name
        return add

    return [make(name) for name in names]


def turns(
    ask: Callable[[list[str], str], object], stream: Callable[[], object]
) -> Steps:
    """The cases of a turn, by a function that asks with the tools of some names."""
    return {
        "plain": partial(ask, [], SAY),
        "one tool": partial(ask, NAMES[:1], SAY),
        "ten tools": partial(ask, NAMES, SAY),
        "streamed": stream,
        "a tool call": partial(ask, NAMES[:1], ADD),
    }


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def on_loop(function: Callable[..., Coroutine]) -> Callable:
    """A coroutine function as a plain one, on one loop that stays open."""
    return lambda *arguments: loop().run_until_complete(function(*arguments))


def once_each(make: Callable[[list[str]], object]) -> Callable[[list[str]], object]:
    """Make an agent for each set of tools at the start, as a program does."""
    made = {len(names): make(names) for names in ([], NAMES[:1], NAMES)}
    return lambda names: made[len(names)]


# --- the model calls ---


def bare(url: str) -> Steps:
    """The SDK alone, with the loop that its documentation shows for tools."""
    import openai

    client = openai.OpenAI(api_key=KEY, base_url=url, max_retries=0)
    create, run = client.chat.completions.create, functions(NAMES[:1])[0]

    def ask(names: list[str], text: str) -> str:
        messages = [{"role": "user", "content": text}]
        given = {"tools": schemas(names)} if names else {}
        while True:
            message = (
                create(model="offline", messages=messages, **given).choices[0].message
            )
            if not message.tool_calls:
                return message.content
            messages.append(message)
            for call in message.tool_calls:
                result = str(run(**json.loads(call.function.arguments)))
                messages.append(
                    {"role": "tool", "tool_call_id": call.id, "content": result}
                )

    def stream() -> str:
        messages = [{"role": "user", "content": SAY}]
        chunks = create(model="offline", messages=messages, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    def send(messages: list[dict]) -> None:
        for _ in create(model="offline", messages=messages, stream=True):
            pass

    return turns(ask, stream) | histories(send)


def histories(send: Callable[[list[dict]], object]) -> Steps:
    """One streamed call by length of history, with a function that sends messages."""
    turn = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    last = {"role": "user", "content": SAY}
    steps = {"2000 events": partial(send, [{"role": "user", "content": ON}])}
    for length in (0, 20, 200, 2000):
        steps[str(length + 1)] = partial(send, [*turn * (length // 2), last])
    return steps


def section(path: str, folder: str) -> Steps:
    """A section as it is: a call of the model, and a turn where it has tools."""
    sys.path.insert(0, str(Path(path).parent))
    module = import_module(Path(path).stem)
    agent = module.load_agent()
    agent.show = lambda text, kind="answer": None
    call_model = module.call_model
    if "open_session" in vars(module):
        module.open_session(agent)
        call_model = agent.guard.call_with_room

    def send(messages: list[dict]) -> None:
        set_messages(agent, messages)
        agent.tools = []
        call_model(agent)

    steps = histories(send)
    if "TOOL_HANDLERS" not in vars(module):
        return steps
    if "settings" in vars(agent):
        return steps | first_section_turns(module, agent)
    return steps | section_turns(module, agent)


def set_messages(agent: object, messages: list[dict]) -> None:
    """Make messages the conversation; those of a session go past the disk."""
    if hasattr(agent.messages, "messages"):
        agent.messages.messages = messages
    else:
        agent.messages = messages


def section_turns(module: object, agent: object) -> Steps:
    """The turns of a section; where it has sessions, the messages go to the disk."""
    module.TOOLS.clear()
    for function in functions(NAMES):
        module.tool(as_handler(function))
    agent.options.pop("stream_options", None)

    def ask(names: list[str], text: str, stream: bool = False) -> str:
        agent.options["stream"] = stream
        agent.tools = module.TOOLS[: len(names)]
        set_messages(agent, [])
        return module.handle_message(agent, text)

    return turns(ask, partial(ask, [], SAY, True))


def as_handler(function: Callable[[int, int], int]) -> Callable:
    """A function as a handler of a tool."""

    def handler(agent: object, a: int, b: int) -> str:
        """Add two numbers."""
        return str(function(a, b))

    handler.__name__ = function.__name__
    return handler


def first_section_turns(module: object, agent: object) -> Steps:
    """The same for sessions/en."""
    for function in functions(NAMES):
        module.TOOL_HANDLERS[function.__name__] = lambda agent, a, b, add=function: str(
            add(a, b)
        )
    module.TOOLS[:] = schemas(NAMES)
    if "App" in vars(module):
        module.open_sessions(agent)
        module.App(agent)

    def ask(names: list[str], text: str, stream: bool = False) -> str:
        agent.settings["stream"] = stream
        agent.tools = schemas(names)
        agent.messages.clear()
        if "App" in vars(module):
            agent.messages.estimated = 0
        return module.answer(agent, text)

    return turns(ask, partial(ask, [], SAY, True))


def openai_agents(url: str) -> Steps:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(api_key=KEY, base_url=url, max_retries=0)
    model = agents.OpenAIChatCompletionsModel("offline", openai_client=client)

    def make(names: list[str]) -> agents.Agent:
        tools = [agents.function_tool(function) for function in functions(names)]
        return agents.Agent(name="bench", model=model, tools=tools)

    made = once_each(make)

    async def ask(names: list[str], text: str) -> str:
        return (await agents.Runner.run(made(names), text)).final_output

    async def stream() -> str:
        result = agents.Runner.run_streamed(made([]), SAY)
        async for _ in result.stream_events():
            pass
        return result.final_output

    return turns(on_loop(ask), on_loop(stream))


def pydantic_ai(url: str) -> Steps:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(
        "offline", provider=OpenAIProvider(base_url=url, api_key=KEY)
    )
    made = once_each(lambda names: Agent(model, tools=functions(names)))

    async def ask(names: list[str], text: str) -> str:
        return (await made(names).run(text)).output

    async def stream() -> str:
        async with made([]).run_stream(SAY) as result:
            return "".join([piece async for piece in result.stream_text(delta=True)])

    return turns(on_loop(ask), on_loop(stream))


def smolagents(url: str) -> Steps:
    """Its agents answer by a call of the tool final_answer, which the model knows."""
    from smolagents import LogLevel
    from smolagents import OpenAIModel
    from smolagents import Tool
    from smolagents import ToolCallingAgent

    class Add(Tool):
        name = "add"
        description = "Add two numbers."
        inputs = {"a": NUMBER, "b": NUMBER}
        output_type = "integer"

        def forward(self, a: int, b: int) -> int:
            return a + b

    model = OpenAIModel("offline", api_base=url, api_key=KEY)

    def make(names: list[str], stream: bool = False) -> ToolCallingAgent:
        tools = [Add() for _ in names]
        for tool, name in zip(tools, names, strict=True):
            tool.name = name
        quiet = LogLevel.OFF
        return ToolCallingAgent(
            tools, model, stream_outputs=stream, verbosity_level=quiet
        )

    made, streaming = once_each(make), make([], stream=True)
    return turns(lambda names, text: made(names).run(text), lambda: streaming.run(SAY))


def langgraph(url: str) -> Steps:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from langgraph.prebuilt import create_react_agent

    model = ChatOpenAI(model="offline", base_url=url, api_key=KEY, max_retries=0)
    made = once_each(
        lambda names: create_react_agent(model, list(map(tool, functions(names))))
    )

    def asked(text: str) -> dict:
        return {"messages": [("user", text)]}

    def ask(names: list[str], text: str) -> str:
        return made(names).invoke(asked(text))["messages"][-1].content

    def stream() -> str:
        pieces = made([]).stream(asked(SAY), stream_mode="messages")
        return "".join(piece.content for piece, _ in pieces)

    return turns(ask, stream)


# --- queue and search ---


def persist_queue(folder: str) -> Steps:
    """Its queue on SQLite: WAL, synchronous=FULL, a commit for each step."""
    from persistqueue import SQLiteAckQueue

    queue = SQLiteAckQueue(folder, multithreading=True)
    waiting = SQLiteAckQueue(f"{folder}-waiting", multithreading=True)
    text = {"peer": "42", "text": "hello there, this is an answer"}

    def deliver() -> None:
        queue.put(text)
        queue.ack(queue.get())

    return {"enqueue": lambda: waiting.put(text), "deliver": deliver}


def bm25s(folder: str) -> Steps:
    """The index in memory; it takes no additions, so a new note is a new index."""
    import bm25s

    words = json.loads(Path(folder, "words.json").read_text(encoding="utf-8"))
    notes = Path(folder, "notes.txt").read_text(encoding="utf-8").splitlines()
    state, dice = {}, random.Random(1)

    def index() -> None:
        state["index"] = bm25s.BM25()
        state["index"].index(
            bm25s.tokenize(notes, show_progress=False), show_progress=False
        )

    def search() -> None:
        query = bm25s.tokenize(" ".join(dice.choices(words, k=4)), show_progress=False)
        state["index"].retrieve(query, corpus=notes, k=8, show_progress=False)

    def write() -> None:
        notes.append(" ".join(dice.choices(words, k=18)))
        index()

    index()
    return {"search": search, "write": write}


PEERS = {
    "bare SDK": bare,
    "section": section,
    "openai-agents": openai_agents,
    "pydantic-ai": pydantic_ai,
    "smolagents": smolagents,
    "langgraph": langgraph,
    "persist-queue": persist_queue,
    "bm25s": bm25s,
}


def main() -> None:
    """Do the steps that standard input names."""
    name, *arguments = sys.argv[1:]
    told = sys.stdout
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        try:
            steps = PEERS[name](*arguments)
        except ImportError:
            steps = {}
        print(json.dumps(list(steps)), file=told, flush=True)
        for line in sys.stdin:
            step, times = json.loads(line)
            begin = time.perf_counter()
            for _ in range(times):
                steps[step]()
            print((time.perf_counter() - begin) / times, file=told, flush=True)


if __name__ == "__main__":
    main()
