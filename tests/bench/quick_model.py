"""A model server that takes next to no time, so that what is measured is who calls it.

It prints its address. What it answers is settled: some words, 2,000 of them when it is
asked to go on and on; a call of the first tool when it is asked to add 2 and 3; and by
the tool final_answer when there is one, as smolagents wants it.
"""

import asyncio
import json
import re
from functools import cache

ANSWER = "Twelve short words of an answer that comes in pieces and ends."
LONG = "word " * 1999
USAGE = {"prompt_tokens": 10, "completion_tokens": 12, "total_tokens": 22}
HEAD = {"id": "chatcmpl-1", "created": 1, "model": "offline"}


def call_of(body: dict) -> dict | None:
    """The tool call that answers a request, if it is not words."""
    names = [tool["function"]["name"] for tool in body.get("tools") or ()]
    is_first = all(
        message["role"] in ("system", "user") for message in body["messages"]
    )
    if is_first and "add 2 and 3" in json.dumps(body["messages"][-1]):
        function = {"name": names[0], "arguments": '{"a": 2, "b": 3}'}
    elif "final_answer" in names:
        function = {"name": "final_answer", "arguments": json.dumps({"answer": ANSWER})}
    else:
        return None
    return {"id": "call_1", "type": "function", "function": function}


def text_of(body: dict) -> str:
    """The words that answer a request."""
    return LONG if "on and on" in json.dumps(body["messages"][-1]) else ANSWER


def whole(call: dict | None, answer: str) -> bytes:
    """The response in one piece."""
    message = {"role": "assistant", "content": None if call else answer}
    message |= {"tool_calls": [call]} if call else {}
    finish = "tool_calls" if call else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish}
    data = {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}
    text = json.dumps(data).encode()
    about = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"HTTP/1.1 200 OK\r\n{about}\r\n".encode() + text


@cache
def streamed_text(answer: str) -> bytes:
    """The response as a stream of events, made once."""
    return streamed([{"content": f"{word} "} for word in answer.split()], "stop")


def streamed_call(call: dict) -> bytes:
    """A tool call as a stream of events."""
    return streamed([{"tool_calls": [{"index": 0, **call}]}], "tool_calls")


def streamed(pieces: list[dict], finish: str) -> bytes:
    """A stream of events."""
    choices = [{"index": 0, "delta": piece, "finish_reason": None} for piece in pieces]
    end = {"index": 0, "delta": {}, "finish_reason": finish}
    events = [{"choices": [choice]} for choice in (*choices, end)]
    events.append({"choices": [], "usage": USAGE})
    head = {**HEAD, "object": "chat.completion.chunk"}
    lines = [*(json.dumps(head | event) for event in events), "[DONE]"]
    chunks = [f"data: {line}\n\n" for line in lines]
    about = "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    text = "".join(f"{len(chunk):x}\r\n{chunk}\r\n" for chunk in chunks)
    return f"HTTP/1.1 200 OK\r\n{about}\r\n{text}0\r\n\r\n".encode()


def answer_to(request: dict) -> bytes:
    """The response to a request."""
    call = call_of(request)
    if not request.get("stream"):
        return whole(call, text_of(request))
    return streamed_call(call) if call else streamed_text(text_of(request))


class Model(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport, self.data = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, _, body = self.data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        if length and len(body) == int(length[1]):
            self.data.clear()
            request = json.loads(body)
            self.transport.write(answer_to(request))


async def main() -> None:
    """Serve until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Model, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
