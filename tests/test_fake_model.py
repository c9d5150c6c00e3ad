"""The scripted server itself: what it sends is what a test asked for, and its checker
is strict.
"""

import copy
import threading
import time

import corpora
import openai
import pytest
from fake_model import Chunks
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Gate
from fake_model import Html200
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from fake_model import check_history

ASK = [{"role": "user", "content": "hi"}]


def client(server: FakeModel, timeout: float = 10) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=server.url, api_key="sk-1", max_retries=0, timeout=timeout
    )


def ask(server: FakeModel, model: str, stream: bool, timeout: float = 10) -> str:
    """The text of one answer."""
    chat = client(server, timeout).chat.completions
    answer = chat.create(model=model, messages=ASK, stream=stream)
    if not stream:
        return answer.choices[0].message.content
    return "".join(
        c.delta.content or "" for chunk in answer for c in chunk.choices or []
    )


def call(id: str = "c1", arguments: str = "{}", **more) -> dict:
    function = {"name": "add", "arguments": arguments}
    return {"id": id, "type": "function", "function": function, **more}


@pytest.mark.parametrize("stream", [True, False])
def test_plays_its_script_and_keeps_the_requests(fake_model: FakeModel, stream: bool):
    fake_model.script(
        "m", [Text("one two"), lambda body: Text(body["messages"][0]["content"])]
    )
    assert ask(fake_model, "m", stream) == "one two"
    assert ask(fake_model, "m", stream) == "hi"
    assert [r.messages for r in fake_model.chats] == [ASK, ASK]
    assert fake_model.requests[0].key == "sk-1"


def test_scripts_of_one_key_and_of_any_model(fake_model: FakeModel):
    fake_model.script(None, [Text("any")], repeat=True)
    fake_model.script("m", [Text("mine")], key="sk-1")
    assert [ask(fake_model, model, True) for model in ("m", "x", "x")] == [
        "mine",
        "any",
        "any",
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_tool_calls(fake_model: FakeModel, stream: bool):
    fake_model.script(
        "m", [ToolCalls([("add", {"a": 1}), ("now", "{broken")], ids=["a", "b"])]
    )
    answer = client(fake_model).chat.completions.create(
        model="m", messages=ASK, stream=stream
    )
    if stream:
        pieces = [
            t for chunk in answer for t in chunk.choices[0].delta.tool_calls or []
        ]
        texts = [
            "".join(t.function.arguments for t in pieces if t.index == i)
            for i in (0, 1)
        ]
        assert [t.id for t in pieces if t.id] == ["a", "b"]
    else:
        texts = [t.function.arguments for t in answer.choices[0].message.tool_calls]
    assert texts == ['{"a": 1}', "{broken"]


@pytest.mark.parametrize("name", corpora.STREAMS)
def test_streams_arrive_as_written(fake_model: FakeModel, name: str):
    with client(fake_model).with_streaming_response.chat.completions.create(
        model=name, messages=ASK, stream=True
    ) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert (events[-1] == "data: [DONE]") == corpora.STREAMS[name].done
    assert len(events) == len(corpora.STREAMS[name].chunks) + corpora.STREAMS[name].done


@pytest.mark.parametrize("name", corpora.ERRORS)
def test_errors_arrive_as_written(fake_model: FakeModel, name: str):
    failure = corpora.ERRORS[name]
    chat = client(fake_model).chat.completions.with_raw_response
    if failure.status == 200:
        assert "error" in chat.create(model=name, messages=ASK).text
        return
    with pytest.raises(openai.APIStatusError) as caught:
        chat.create(model=name, messages=ASK)
    assert caught.value.status_code == failure.status
    for header, value in failure.headers.items():
        assert caught.value.response.headers[header] == value


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_drops(fake_model: FakeModel, how: str, stream: bool):
    fake_model.script("m", [Drop(2, how), Drop(0, how), Text("again")])
    for _ in range(2):
        with pytest.raises(Exception) as caught:
            ask(fake_model, "m", stream)
        assert type(caught.value).__name__ in (
            "APIConnectionError",
            "RemoteProtocolError",
            "ReadError",
        )
    assert ask(fake_model, "m", stream) == "again"


@pytest.mark.parametrize("after", [0, 2, 99])
def test_stalls(fake_model: FakeModel, after: int):
    fake_model.script("m", [Stall(after, 0.2), Stall(after, 1.5)])
    began = time.monotonic()
    assert ask(fake_model, "m", True) == "late but here"
    assert time.monotonic() - began >= 0.2
    with pytest.raises(Exception, match="timed out"):
        ask(fake_model, "m", True, timeout=0.3)


def test_gate_holds_answers_back_and_peak_counts_them(fake_model: FakeModel):
    gate = threading.Event()
    fake_model.script("m", [Gate(gate), Gate(gate, Error(503), 1)])
    results: list[object] = []

    def one() -> None:
        try:
            results.append(ask(fake_model, "m", True))
        except openai.APIStatusError as error:
            results.append(error.status_code)

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    fake_model.wait(2)
    assert results == []
    gate.set()
    for thread in threads:
        thread.join(10)
    assert sorted(map(str, results)) == ["503", "the gate is open"]
    assert fake_model.peak == 2


def test_pages_models_and_embeddings(fake_model: FakeModel):
    fake_model.script("m", [Html200(), Json200({"odd": 1}), Chunks(["{nope"])])
    chat = client(fake_model).chat.completions.with_raw_response
    assert "Sign in" in chat.create(model="m", messages=ASK).text
    assert chat.create(model="m", messages=ASK).text == '{"odd": 1}'
    with pytest.raises(ValueError, match="property name"):
        ask(fake_model, "m", True)
    assert client(fake_model).models.list().data[0].id == "text"
    vectors = (
        client(fake_model).embeddings.create(model="e", input=["a b", "b a", "c"]).data
    )
    assert vectors[0].embedding == vectors[1].embedding != vectors[2].embedding


def test_a_bad_request_and_a_script_that_runs_out_are_problems():
    with FakeModel() as server:
        server.script("m", [Text("one")])
        ask(server, "m", True)
        with pytest.raises(openai.BadRequestError, match="run out"):
            ask(server, "m", True)
        with pytest.raises(openai.BadRequestError, match="last message"):
            client(server).chat.completions.create(
                model="m", messages=[*ASK, {"role": "assistant", "content": "yes"}]
            )
        server.strict = False
        client(server).chat.completions.create(model="text", messages=[])
        assert len(server.problems) == 2


GOOD = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [call("c1"), call("c2", '{"a": 1}')],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
    {"role": "tool", "tool_call_id": "c2", "content": "2"},
    {"role": "assistant", "content": "3", "reasoning_content": "hm"},
]


def changed(**changes: object) -> list[dict]:
    """GOOD with messages replaced, by m0=..., or dropped, by m0=None."""
    messages = dict(enumerate(copy.deepcopy(GOOD)))
    messages |= {int(name[1:]): value for name, value in changes.items()}
    return [
        messages[number] for number in sorted(messages) if messages[number] is not None
    ]


def test_checker_accepts_what_is_valid():
    check_history(GOOD)
    check_history(changed(m0=None))
    check_history([])


USER = {"role": "user", "content": "x"}
BAD = {
    "unknown role": changed(m0={"role": "robot", "content": ""}),
    "content is None": changed(m1={"role": "user", "content": None}),
    "content is []": changed(m5={"role": "assistant", "content": []}),
    "no content": changed(m5={"role": "assistant"}),
    "unexpected ['refusal']": changed(
        m5={"role": "assistant", "content": "", "refusal": None}
    ),
    "unexpected ['tool_call_id']": changed(m1={**USER, "tool_call_id": "c"}),
    "tool_calls is []": changed(
        m5={"role": "assistant", "content": "", "tool_calls": []}
    ),
    "is used twice": changed(m2={**GOOD[2], "tool_calls": [call("c1"), call("c1")]}),
    "a call's id is ''": changed(m2={**GOOD[2], "tool_calls": [call("")]}),
    "a call's type is None": changed(m2={**GOOD[2], "tool_calls": [call(type=None)]}),
    "arguments are no object": changed(
        m2={**GOOD[2], "tool_calls": [call("c1", "[]")]}
    ),
    "NaN is no JSON": changed(m2={**GOOD[2], "tool_calls": [call("c1", '{"a": NaN}')]}),
    "arguments are not JSON": changed(m2={**GOOD[2], "tool_calls": [call("c1", "{")]}),
    "unexpected ['index']": changed(
        m2={**GOOD[2], "tool_calls": [call("c1", index=0)]}
    ),
    "where 'c1' is due": changed(m3=GOOD[4], m4=GOOD[3]),
    "before the results of ['c2']": changed(m4=None),
    "ends before the results": changed(m3=None, m4=None, m5=None),
    "no call asks for": changed(m2={"role": "assistant", "content": "x"}),
    "two user messages": changed(m6=USER, m7=USER),
    "user directly after tool": changed(m5=USER),
    "assistant after assistant": changed(m6={"role": "assistant", "content": "x"}),
    "assistant after system": changed(m1=None),
    "not the first message": changed(m6={"role": "system", "content": "x"}),
    "not encodable": changed(m1={"role": "user", "content": "\ud800"}),
    "a call's name is 'a b'": changed(
        m2={
            **GOOD[2],
            "tool_calls": [call() | {"function": {"name": "a b", "arguments": "{}"}}],
        }
    ),
}


@pytest.mark.parametrize("problem", BAD)
def test_checker_refuses(problem: str):
    with pytest.raises(AssertionError) as caught:
        check_history(BAD[problem])
    assert problem in str(caught.value)
