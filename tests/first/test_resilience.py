"""Resilience (s09): why a model call failed, who is asked next, and who has to rest.

Most tests run the section's own loop in this process, against live servers, on a clock of ours.
"""

import email.utils
import itertools
import json
import random
import re
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import corpora
import harness
import httpx
import httpx2
import openai
import pytest
from fake_model import Chunks
from fake_model import Drop
from fake_model import Error
from fake_model import FakeModel
from fake_model import Json200
from fake_model import Stall
from fake_model import Text
from fake_model import ToolCalls
from harness import Screen
from harness import since

PROMPT = re.compile(r"^you> ", re.M)
KEYS = ["sk-first-0001", "sk-second-0002", "sk-third-0003"]
REASONS = {
    "e400ctx": "overflow",
    "e401": "auth",
    "e402": "billing",
    "e403": "auth",
    "e404": "model_not_found",
    "e408": "timeout",
    "e409": "overloaded",
    "e413": "overflow",
    "e422": "format",
    "e429": "rate_limit",
    "e429quota": "billing",
    "e429long": "rate_limit",
    "e500": "overloaded",
    "e503": "overloaded",
    "e500str": "overloaded",
    "e400flat": "format",
    "e200err": "overloaded",
    "gpt4all": "format",
    "llamacpp": "overflow",
    "lmstudio": "overflow",
    "vllm16": "overflow",
    "vllm_old": "overflow",
    "openrouter": "overflow",
    "openrouter_raw": "overflow",
    "ollama": "overflow",
    "gpt5": "overflow",
    "effort": "format",
    "max_tokens": "format",
} | {name: failure.kind for name, failure in corpora.PROVIDERS.items()}


class Time:
    """A clock that only a sleep moves."""

    def __init__(self) -> None:
        self.time, self.sleeps = 1000.0, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.sleeps += [seconds] if seconds else []


class Bench:
    """A section's agent and its profiles, one at each server, on a clock of ours."""

    def __init__(self, section, folder: Path, env: dict, monkeypatch, model: str = "m1"):
        self.module, self.folder, self.clock = section.module, folder, Time()
        for name in harness.SETTINGS:
            for number in ("", *"23456789"):
                monkeypatch.delenv(f"{name}_{number}".rstrip("_"), raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(folder)
        self.shown: list[str] = []
        url, timeout = env.get("OPENAI_BASE_URL", "http://127.0.0.1:9/v1"), 0.5
        self.client = openai.OpenAI(
            api_key=KEYS[0], base_url=url, max_retries=0, timeout=openai.Timeout(timeout)
        )
        self.start(model)

    def start(self, model: str = "m1") -> None:
        """The program begins."""
        module, settings = self.module, {"model": model, "stream": True}
        self.agent = agent = module.Agent(
            self.client, settings, [], self.shown.append, self.folder, "always", module.TOOLS
        )
        agent.guard = module.ContextGuard(128_000)
        self.profiles = module.ProfileManager(agent, self.clock.now)
        self.runner = module.ResilienceRunner(self.profiles, self.clock.sleep)
        agent.app = SimpleNamespace(profiles=self.profiles, resilience=self.runner, agent=agent)
        agent.app.lanes = SimpleNamespace(check=lambda: None)  # of s10
        self.fresh()

    def fresh(self) -> None:
        """A new session, in which nothing was said."""
        path = self.folder / "sessions" / f"{random.randbytes(6).hex()}.jsonl"
        self.agent.messages = self.module.Session(self.module.Journal(path))

    def awake(self) -> None:
        """Everybody has rested, and a new session begins."""
        for each in self.profiles.profiles:
            each.until, each.errors, each.reason, each.is_told = 0, 0, None, False
        self.clock.sleeps.clear()
        self.shown.clear()
        self.fresh()

    def ask(self, text: str) -> str:
        return self.module.answer(self.agent, text)

    @property
    def screen(self) -> str:
        return "".join(self.shown)

    @property
    def names(self) -> list[str]:
        """Who is tried next, in order."""
        return [each.name for each in self.profiles.order()]

    def rest(self, name: str = "1") -> float:
        """The seconds that a profile has to rest still."""
        (profile,) = (each for each in self.profiles.profiles if each.name == name)
        return max(profile.until - self.clock.time, 0)

    def fail(self, reason: str, name: str = "1", error: BaseException | None = None) -> float:
        """A profile fails; how long it has to rest."""
        (profile,) = (each for each in self.profiles.profiles if each.name == name)
        reason = self.module.FailoverReason(reason)
        self.profiles.fail(profile, reason, error or RuntimeError(reason))
        return self.rest(name)

    def command(self, line: str) -> str:
        name, _, rest = line.partition(" ")
        return self.module.COMMANDS[name][2](self.agent, rest)


@pytest.fixture
def servers(env: dict) -> Iterator[list[FakeModel]]:
    with ExitStack() as stack:
        found = [stack.enter_context(FakeModel(env)) for _ in range(3)]
        yield found
    assert not [problem for server in found for problem in server.problems]


def env_of(servers: list[FakeModel], **more: str) -> dict[str, str]:
    """A profile at each server, with a key and a model of its own."""
    env = {"MODEL_ID": "m1"}
    for number, server in enumerate(servers, 1):
        tail = f"_{number}" if number > 1 else ""
        env[f"OPENAI_API_KEY{tail}"] = KEYS[number - 1]
        env[f"OPENAI_BASE_URL{tail}"] = server.url
        env[f"MODEL_ID{tail}"] = f"m{number}"
    return env | more


@pytest.fixture
def bench(section, tmp_path: Path, servers, monkeypatch) -> Bench:
    return Bench(section, tmp_path, env_of(servers), monkeypatch)


@pytest.fixture
def desk(section, tmp_path: Path, monkeypatch) -> Callable[..., Bench]:
    """Benches whose servers are never asked."""

    def make(**env: str) -> Bench:
        url = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
        return Bench(section, tmp_path, url | env, monkeypatch)

    return make


TWO = {"OPENAI_API_KEY_2": "k2", "OPENAI_BASE_URL_2": "http://127.0.0.2:9/v1"}


def response(status: int, **headers: str) -> httpx2.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx2.Request("POST", "http://x/v1")
    return httpx2.Response(status, headers=names, request=request)


def limited(**headers: str) -> openai.RateLimitError:
    return openai.RateLimitError("slow", response=response(429, **headers), body=None)


# --- why a call failed ---


@since("s09")
@pytest.mark.parametrize("stream", [True, False])
def test_what_servers_send_is_read_by_status_and_code(section, desk, fake_model, stream: bool):
    """Each body as the SDK raises it, and as it comes through the guard."""
    assert REASONS.keys() == corpora.ERRORS.keys() | corpora.PROVIDERS.keys()
    bench = desk(OPENAI_BASE_URL=fake_model.url)
    wrong = {}
    for name, failure in (corpora.ERRORS | corpora.PROVIDERS).items():
        fake_model.script(name, [Error(failure.status, failure.headers, failure.body)], repeat=True)
        bench.fresh()
        bench.agent.messages.append({"role": "user", "content": "x"})
        bench.agent.settings = {"model": name, "stream": stream}
        for call in (section.module.call_model, bench.agent.guard.call):
            with pytest.raises(Exception) as caught:
                call(bench.agent)
            found = section.module.classify_failure(caught.value)
            if found != REASONS[name]:
                wrong[name, call.__name__] = (found, caught.value)
    assert not wrong


def sse(error: object) -> Chunks:
    return Chunks([corpora.says("par"), error if isinstance(error, str) else {"error": error}])


IN_STREAM = [
    (sse({"code": 502, "message": "upstream died"}), "overloaded"),
    (sse({"code": 429, "message": "slow"}), "rate_limit"),
    (sse({"code": "429", "message": "slow"}), "rate_limit"),
    (sse({"code": 402, "message": "no credits"}), "billing"),
    (sse({"code": 401, "message": "who"}), "auth"),
    (sse({"code": 400, "message": "odd request 429"}), "format"),
    (sse({"code": 400, "message": "maximum context length is 8192 tokens"}), "overflow"),
    (sse({"type": "overloaded_error", "message": "Overloaded"}), "overloaded"),
    (sse({"type": "rate_limit_error", "message": "slow"}), "rate_limit"),
    (sse({"type": "server_error", "code": None, "message": "sorry"}), "overloaded"),
    (sse({"type": "server_error", "code": 500, "message": "Context size exceeded"}), "overflow"),
    (sse({"code": "rate_limit_exceeded", "message": "slow"}), "rate_limit"),
    (sse({"code": "insufficient_quota", "message": "rate limit"}), "billing"),
    (sse({"code": "²", "message": "odd"}), "unknown"),
    (sse("{not json"), "unknown"),
    (Chunks(corpora.STREAMS["mid_error_str"].chunks), "unknown"),
    (Chunks(corpora.STREAMS["truncated"].chunks, done=False), "timeout"),
    (Chunks(corpora.STREAMS["empty_200"].chunks), "unknown"),
    (Text("", finish="content_filter"), "format"),
    (Json200({"error": {"code": 502, "message": "rate limit"}}), "overloaded"),
    (Json200({"error": {"code": 403, "message": "flagged"}}), "auth"),
    (Json200({"error": "rate limit 429"}), "unknown"),
    (Drop(0), "timeout"),
    (Drop(2), "timeout"),
    (Drop(2, "reset"), "timeout"),
    (Stall(0, 1.0), "timeout"),
    (Stall(2, 1.0), "timeout"),
]


@since("s09")
def test_what_goes_wrong_in_a_stream(section, desk, fake_model):
    bench = desk(OPENAI_BASE_URL=fake_model.url)
    fake_model.script("m1", [item for item, _ in IN_STREAM])
    bench.agent.messages.append({"role": "user", "content": "x"})
    for item, reason in IN_STREAM:
        with pytest.raises(Exception) as caught:
            section.module.call_model(bench.agent)
        assert section.module.classify_failure(caught.value) == reason, (item, caught.value)


def wrapped(error: openai.OpenAIError, cause: BaseException) -> openai.OpenAIError:
    error.__cause__ = cause
    return error


def raised() -> list[tuple[BaseException, str | None]]:
    request, body = httpx2.Request("POST", "http://x/v1"), {"message": "x"}
    kinds = [
        (openai.BadRequestError, 400, "format"),
        (openai.AuthenticationError, 401, "auth"),
        (openai.PermissionDeniedError, 403, "auth"),
        (openai.NotFoundError, 404, "model_not_found"),
        (openai.ConflictError, 409, "overloaded"),
        (openai.UnprocessableEntityError, 422, "format"),
        (openai.RateLimitError, 429, "rate_limit"),
        (openai.InternalServerError, 500, "overloaded"),
        (openai.InternalServerError, 504, "timeout"),
        (openai.InternalServerError, 529, "overloaded"),
        (openai.APIStatusError, 402, "billing"),
        (openai.APIStatusError, 408, "timeout"),
        (openai.APIStatusError, 413, "overflow"),
        (openai.APIStatusError, 418, "format"),
    ]
    found = [(k("x", response=response(s), body=body), r) for k, s, r in kinds]
    no_summary = openai.OpenAIError("no summary: try again, or start with /new")
    return [
        *found,
        (openai.APIConnectionError(request=request), "timeout"),
        (openai.APITimeoutError(request), "timeout"),
        (openai.APIError("rate limit 429 key token", request, body=None), "unknown"),
        (openai.OpenAIError("401 429 quota"), "unknown"),
        (wrapped(no_summary, limited()), "rate_limit"),
        (httpx.ReadTimeout("x"), "timeout"),
        (httpx.RemoteProtocolError("peer closed connection"), "timeout"),
        (httpx2.ReadError("x"), "timeout"),
        (httpx2.ConnectError("x"), "timeout"),
        (ConnectionResetError(104, "reset"), "timeout"),
        (ConnectionRefusedError(111, "refused"), "timeout"),
        (TimeoutError("x"), "timeout"),
        (json.JSONDecodeError("rate limit 429", "{", 1), "unknown"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "key"), "unknown"),
        (OSError(28, "No space left on device"), None),
        (PermissionError(13, "denied"), None),
        (FileNotFoundError(2, "no such file"), None),
    ]


@since("s09")
def test_what_is_raised(section):
    for error, reason in raised():
        assert section.module.classify_failure(error) == reason, repr(error)
    overflow = section.module.ContextOverflow("too long for a window of 429 tokens")
    assert section.module.classify_failure(overflow) == "overflow"


@since("s09")
def test_a_full_disk_is_no_reason_to_ask_elsewhere(bench: Bench, servers, monkeypatch):
    for number, server in enumerate(servers, 1):
        server.script(f"m{number}", [Error(400)], repeat=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.agent.guard, "call", full, raising=False)
    assert bench.ask("hi") == "" and "[[Errno 28]" in bench.screen
    assert bench.names == ["1", "2", "3"] and not bench.clock.sleeps
    assert not any(server.chats for server in servers)


# --- when a server says how long ---


WAITS = [
    ({"retry_after": "7"}, 7),
    ({"retry_after": "1.5"}, 1.5),
    ({"retry_after_ms": "2500"}, 2.5),
    ({"retry_after_ms": "2500", "retry_after": "9"}, 2.5),
    ({"retry_after_ms": "soon", "retry_after": "9"}, 9),
    ({"retry_after": "999999999"}, 86400),
    ({"retry_after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 86400),
    ({"retry_after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
]
NONSENSE = ["", "0", "-5", "soon", "nan", "inf", "1e9", "9" * 400, "7 s", "Fri, 99 Foo 2026", "0x7"]
NONSENSE += ["Fri, 31 Dec 9999 23:59:59 -0000", "Fri, 1 Jan 0001 00:00:00 -0000", ":", "١"]
NONSENSE += ["1 Jan 1 0:0:0 +9999", "Mon, 1 Jan 2024 99:99:99 GMT", "1-1", "Mon,"]


@since("s09")
def test_how_long_a_server_wants_to_be_left_alone(section):
    retry_after = section.module.retry_after
    for headers, seconds in WAITS:
        assert retry_after(limited(**headers)) == seconds, headers
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < retry_after(limited(retry_after=date)) <= 30
    for text in NONSENSE:
        error = SimpleNamespace(response=SimpleNamespace(headers={"retry-after": text}))
        assert 0 <= retry_after(error) <= 86400, text
    assert retry_after(RuntimeError("x")) == 0
    assert retry_after(openai.APITimeoutError(httpx2.Request("POST", "http://x"))) == 0
    summary = openai.OpenAIError("no summary")
    assert retry_after(wrapped(summary, limited(retry_after="7"))) == 7


# --- three profiles ---

BAD: dict[str, Callable[[], object]] = {
    "401": lambda: Error(401, body=corpora.ERRORS["e401"].body),
    "402": lambda: Error(402, body=corpora.ERRORS["e402"].body),
    "429": lambda: Error(429, body=corpora.bare("slow")),
    "429 soon": lambda: Error(429, {"Retry-After": "2"}, corpora.bare("slow")),
    "429 late": lambda: Error(429, {"Retry-After": "300"}, corpora.bare("slow")),
    "500": lambda: Error(500),
    "404": lambda: Error(404, body=corpora.ERRORS["e404"].body),
    "400": lambda: Error(400, body=corpora.ERRORS["gpt4all"].body),
    "empty": lambda: Text(""),
    "cut": lambda: Drop(2),
    "reset": lambda: Drop(0, "reset"),
    "overflow": lambda: Error(400, body=corpora.ERRORS["e400ctx"].body),
    "stall": lambda: Stall(1, 1.0),
}
TELLS = {
    "401": "auth, again in ",
    "402": "billing, again in ",
    "429": "rate_limit, again in ",
    "429 soon": "rate_limit, again in ",
    "429 late": "rate_limit, again in ",
    "500": "overloaded, again in ",
    "404": "model_not_found, again in ",
    "400": "format",
    "empty": "unknown, again in ",
    "cut": "timeout, again in ",
    "reset": "timeout, again in ",
    "overflow": "overflow",
    "stall": "timeout, again in ",
}
RAN = ("bash", {"command": "echo ran >> ran.txt"})


def good(body: dict):
    """Calls a tool first, then tells of it."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return Text(f"done: {body['messages'][-3]['content']}")
    return ToolCalls([RAN]) if last["content"].startswith("run") else Text(last["content"])


def rig(bench: Bench, servers: list[FakeModel], kinds: list[str]) -> None:
    """What each server does from now on."""
    bench.awake()
    for number, (server, kind) in enumerate(zip(servers, kinds, strict=True), 1):
        item = good if kind == "good" else lambda body, kind=kind: BAD[kind]()
        server.script(f"m{number}", [item], repeat=True)
        server.requests.clear()


def cases(whole: bool) -> list[list[str]]:
    """The good server at each place, behind each failure and each pair of them."""
    pairs = [list(pair) for pair in itertools.permutations(BAD, 2)]
    stalls = [pair for pair in pairs if "stall" in pair]
    rest = [pair for pair in pairs if "stall" not in pair]
    pairs = [*rest, *stalls[::3]] if whole else rest[::23]
    ones = [[name, "good", "500"] for name in BAD if whole or name != "stall"]
    return [["good", "500", "401"], *ones, *([*pair, "good"] for pair in pairs)]


@since("s09")
def test_the_answer_comes_if_any_can_give_it(bench: Bench, servers, whole: bool):
    """One try for each before the good one, no waiting, the tool once, every history valid."""
    ran = bench.folder / "ran.txt"
    for kinds in cases(whole):
        rig(bench, servers, kinds)
        ran.unlink(missing_ok=True)
        assert bench.ask("run it").startswith("done: run it"), (kinds, bench.screen)
        assert ran.read_text() == "ran\n", kinds
        assert sum(bench.clock.sleeps) == 0, kinds
        place = kinds.index("good")
        assert len(servers[place].chats) == 2, kinds
        for number, kind in enumerate(kinds[:place]):
            count = len(servers[number].chats)
            most = {"overflow": 12, "400": 2}.get(kind, 1)  # these two need not rest
            assert 1 <= count <= most, (kinds, count)
        assert not any(server.chats for server in servers[place + 1 :]), kinds
        assert [m["role"] for m in bench.agent.messages] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
    assert not any(server.problems for server in servers)


@since("s09")
@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "stall"])
def test_a_failure_after_a_tool_does_not_run_it_again(bench: Bench, servers, kind: str):
    """The first server asks for a tool and fails then; the next goes on from the result."""
    rig(bench, servers, ["good", "500", "good"])
    once = iter([lambda body: good(body)])
    servers[0].script("m1", [lambda body: next(once, lambda _: BAD[kind]())(body)], repeat=True)
    assert bench.ask("run it") == "done: run it"
    assert (bench.folder / "ran.txt").read_text() == "ran\n"
    seen = servers[2].chats[0].messages
    assert [m["role"] for m in seen] == ["user", "assistant", "tool"]
    assert "exit code 0" in seen[-1]["content"]


@since("s09")
def test_when_none_can_one_line_says_why_and_the_question_is_kept(bench, servers, whole: bool):
    kinds = [kind for kind in BAD if TELLS[kind] not in ("format", "overflow")]
    triples = list(itertools.permutations([k for k in kinds if k != "stall"], 3))
    some = [*random.Random(9).sample(triples, 40 if whole else 4), ("stall", "401", "402")]
    for triple in some:
        rig(bench, servers, list(triple))
        assert bench.ask("who am I") == ""
        line = bench.screen.splitlines()[-1]
        assert re.fullmatch(r"\[no profile could answer: .*\]", line), line
        for number, kind in enumerate(triple, 1):
            assert f"{number} {TELLS[kind]}" in line, (triple, line)
        assert line.count("again in") == 3
        assert sum(len(server.chats) for server in servers) <= 9 and len(bench.clock.sleeps) <= 2
        assert sum(bench.clock.sleeps) <= bench.module.PATIENCE
        assert [m["content"] for m in bench.agent.messages] == ["who am I"]
        assert not any(key in bench.screen for key in KEYS)
        servers[1].script("m2", [good], repeat=True)
        bench.clock.time += 4000
        assert bench.ask("and now") == "and now"
        asked = [m["content"] for m in servers[1].chats[-1].messages if m["role"] == "user"]
        assert asked == ["who am I", "and now"]


@since("s09")
@pytest.mark.parametrize("kinds", [["400", "400", "400"], ["401", "400", "500"], ["overflow"] * 3])
def test_a_question_that_a_server_refuses_is_taken_back(bench: Bench, servers, kinds: list):
    """Else each later turn would send it again, and be refused for it, too."""
    rig(bench, servers, kinds)
    assert bench.ask("bad") == "" and bench.screen.rstrip().endswith("]")
    assert re.search(r"\[no profile could answer: 1 \w+.*; 2 (format|overflow).*; 3", bench.screen)
    assert bench.agent.messages == []
    for server in servers:
        model = server.chats[0].model
        server.script(model, [lambda body: Error(400) if "bad" in str(body) else good(body)] * 2)
    assert bench.ask("fine") == "fine"


@since("s09")
def test_who_passes_soon_is_asked_again(bench: Bench, servers):
    """A lasting failure before it must not use up its tries."""
    for kinds in (["500", "good", "401"], ["401", "500", "good"], ["500", "429", "good"]):
        rig(bench, servers, kinds)
        place = kinds.index("good")
        first = iter([Error(503), Error(503)])
        item = lambda body, first=first: next(first, None) or good(body)  # noqa: E731
        servers[place].script(f"m{place + 1}", [item], repeat=True)
        assert bench.ask("hi") == "hi", (kinds, bench.screen)
        assert len(bench.clock.sleeps) == 2


@since("s09")
def test_who_told_to_wait_a_little_is_waited_for(bench: Bench, servers):
    """Not asked while it rests, though the others fail; asked when the time has come."""
    rig(bench, servers, ["429 soon", "good", "401"])
    assert bench.ask("one") == "one"
    rig_first = len(servers[0].chats)
    assert bench.ask("two") == "two" and len(servers[0].chats) == rig_first == 1
    servers[0].script("m1", [good], repeat=True)
    servers[1].script("m2", [lambda body: BAD["401"]()], repeat=True)
    before = bench.clock.time
    assert bench.ask("three") == "three", bench.screen
    assert bench.clock.time - before >= 2 and len(servers[0].chats) == 2


@since("s09")
def test_nobody_waits_longer_than_patience(bench: Bench, servers):
    patience = bench.module.PATIENCE
    for seconds in (1, patience - 6, patience - 1, patience, patience + 1, 4000):
        rig(bench, servers, ["401", "402", "404"])
        item = Error(429, {"Retry-After": str(seconds)})
        servers[0].script("m1", [item], repeat=True)
        for _ in range(2):
            start, calls = bench.clock.time, len(servers[0].chats)
            assert bench.ask("hi") == ""
            assert bench.clock.time - start <= patience + sum(bench.module.RETRIES) * 1.2
            called = len(servers[0].chats) - calls
            assert called <= 1 if seconds > patience else called >= 1


@since("s09")
def test_attempts_are_capped(desk, fake_model):
    many = {f"OPENAI_API_KEY_{n}": f"k{n}" for n in range(2, 10)}
    bench = desk(OPENAI_BASE_URL=fake_model.url, FALLBACK_MODELS="a b,c", **many)
    assert len(bench.profiles.profiles) == 36
    fake_model.script(None, [Error(503)], repeat=True)
    assert bench.ask("hi") == ""
    assert len(fake_model.chats) == bench.module.MAX_ATTEMPTS == 12
    fake_model.requests.clear()
    fake_model.script("c", [Text("at last")], key="k9")
    for _ in range(2):
        bench.ask("hi")
    assert fake_model.chats[-1].key == "k9" and "at last" in bench.screen


@since("s09")
def test_what_is_passed_over_for_its_key_is_no_attempt(desk, fake_model):
    """Of 12 attempts two learn that a key is bad; the other models of these keys cost none."""
    keys = {"OPENAI_API_KEY_2": "k2", "OPENAI_API_KEY_3": "k3"}
    bench = desk(OPENAI_BASE_URL=fake_model.url, FALLBACK_MODELS="a b c d", **keys)
    for key in (KEYS[0], "k2"):
        for model in ("m1", *"abcd"):
            fake_model.script(model, [Error(401)], key=key, repeat=True)
    for model in ("m1", *"abc"):
        fake_model.script(model, [Error(429)], key="k3", repeat=True)
    fake_model.script("d", [Text("at last")], key="k3")
    assert bench.ask("hi") == "at last" and len(fake_model.chats) == 7


@since("s09")
def test_a_model_that_calls_tools_for_ever_is_stopped(bench: Bench, servers):
    rig(bench, servers, ["good", "good", "good"])
    read = ToolCalls([("read_file", {"path": "no"})])
    replies = itertools.cycle([read, Error(500)])
    servers[0].script("m1", [lambda body: next(replies)], repeat=True)
    servers[1].script("m2", [lambda body: ToolCalls([("read_file", {"path": "no"})])], repeat=True)
    bench.ask("go on")
    answered = sum(m["role"] == "assistant" for m in bench.agent.messages)
    assert answered == bench.module.MAX_ROUNDS == 25
    assert sum(len(server.chats) for server in servers) <= 25 + 13
    rig(bench, servers, ["good", "good", "good"])
    servers[0].script("m1", [lambda body: ToolCalls([("read_file", {"path": "no"})])], repeat=True)
    bench.ask("go on")
    assert len(servers[0].chats) == 25 and not servers[1].chats


# --- one profile ---


@since("s09")
def test_alone_what_passes_is_tried_again_and_what_lasts_is_not(desk, fake_model):
    bench = desk(OPENAI_BASE_URL=fake_model.url)
    for kind, item in BAD.items():
        if kind == "stall":
            continue
        passes = kind in ("429", "429 soon", "500", "cut", "reset")
        fake_model.requests.clear()
        fake_model.script("m1", [lambda body, item=item: item()], repeat=True)
        bench.awake()
        assert bench.ask("hi") == "" and bench.agent.messages == []
        line = bench.screen.splitlines()[-1]
        assert re.fullmatch(r"\[.{5,}\]", line) and "profile" not in line, line
        if kind != "overflow":
            assert len(fake_model.chats) == (3 if passes else 1), kind
        if passes:
            first, second = bench.clock.sleeps
            assert max(1, 2 * (kind == "429 soon")) <= first <= 2 and 4 <= second <= 5
            first_try = iter([item()])
            fake_model.script("m1", [lambda _, tries=first_try: next(tries, Text("ok"))] * 2)
            bench.awake()
            assert bench.ask("hi") == "ok" and len(bench.clock.sleeps) == 1


@since("s09")
def test_alone_it_is_asked_again_at_once_unless_a_server_told_otherwise(desk, fake_model):
    bench = desk(OPENAI_BASE_URL=fake_model.url)
    for kind in ("401", "402", "404", "500", "empty", "429 late"):
        bench.awake()
        fake_model.script("m1", [lambda body, kind=kind: BAD[kind]()], repeat=True)
        assert bench.ask("one") == ""
        fake_model.script("m1", [Text("ok")])
        assert bench.ask("two") == ("" if kind == "429 late" else "ok"), kind
    assert re.search(r"\[no profile could answer: 1 rate_limit, again in 300 s\]", bench.screen)
    assert [m["content"] for m in bench.agent.messages] == ["two"]
    bench.clock.time += 300
    assert bench.ask("three") == "ok"


# --- rest ---

SHORT, LONG = (30, 60, 300, 300), (600, 1800, 3600, 3600)
RESTS = dict.fromkeys(("rate_limit", "overloaded", "timeout", "unknown"), SHORT)
RESTS |= dict.fromkeys(("billing", "auth", "model_not_found"), LONG)
RESTS |= dict.fromkeys(("format", "overflow"), (0, 0, 0, 0))


@since("s09")
def test_a_rest_grows_with_failures_and_success_ends_it(desk):
    bench = desk(**TWO)
    assert RESTS.keys() == set(bench.module.FailoverReason)
    for reason, rests in RESTS.items():
        for rest in rests:
            assert bench.fail(reason) == rest, reason
            assert bench.names == (["2", "1"] if rest else ["1", "2"])
            bench.clock.time += max(rest - 1, 0)
            assert bench.names[0] == ("2" if rest else "1")
            bench.clock.time += 1
            assert bench.names == ["1", "2"]
        bench.profiles.succeed(bench.profiles.profiles[0])
    bench.fail("auth")
    bench.profiles.succeed(bench.profiles.profiles[0])
    assert bench.names == ["1", "2"] and bench.fail("auth") == 600
    bench.clock.time += 1
    bench.fail("timeout", "2")
    assert bench.names == ["2", "1"], "who may come first, first"


@since("s09")
def test_who_rests_and_for_how_long_when_a_server_says_it(desk):
    bench = desk(**TWO)
    assert bench.fail("rate_limit", error=limited(retry_after="5")) == 5
    assert bench.names == ["2"], "not even as the last resort"
    bench.clock.time += 5
    assert bench.names == ["1", "2"]
    assert bench.fail("rate_limit", error=limited(retry_after="soon")) == 60
    assert bench.names == ["2", "1"]


@since("s09")
def test_a_bad_key_rests_with_all_its_models_a_missing_model_alone(desk):
    same = {"OPENAI_API_KEY_2": "k2", "OPENAI_BASE_URL_3": "http://127.0.0.3:9/v1"}
    for reason in ("auth", "billing", "model_not_found", "timeout", "rate_limit"):
        bench = desk(FALLBACK_MODELS="spare", **same)
        assert bench.names == ["1", "2", "3", "1/spare", "2/spare"]
        bench.fail(reason)
        rested = [name for name in ("1", "2", "3", "1/spare", "2/spare") if bench.rest(name)]
        assert rested == (["1", "1/spare"] if reason in ("auth", "billing") else ["1"]), reason


@since("s09")
@pytest.mark.parametrize("kind", ["400", "overflow"])
def test_one_bad_message_locks_nothing(bench: Bench, servers, kind: str):
    rig(bench, servers, [kind] * 3)
    for _ in range(5):
        assert bench.ask("long") == ""
    assert bench.command("/cooldowns") == "none has to rest"
    for number, server in enumerate(servers, 1):
        server.script(f"m{number}", [good], repeat=True)
    assert bench.ask("short") == "short" and not bench.clock.sleeps


# --- settings ---


@pytest.mark.guard
@since("s09")
def test_where_keys_go_and_where_they_do_not(bench: Bench, servers, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY_2")
    monkeypatch.setenv("FALLBACK_MODELS", "spare, , m9")
    monkeypatch.setenv("OPENAI_API_KEY_4", "sk-fourth-0004")
    monkeypatch.setenv("MODEL_OPTIONS_3", '{"temperature": 0.5, "stream": false}')
    monkeypatch.setenv("MODEL_ID_5", "another")
    bench.start()
    for server in servers:
        server.script(None, [Error(404)], repeat=True)
    bench.ask("hi")
    asked = [[(chat.key, chat.model) for chat in server.chats] for server in servers]
    one, four = KEYS[0], "sk-fourth-0004"
    spares = [(one, "spare"), (four, "spare"), (one, "m9"), (four, "m9")]
    assert asked[0] == [(one, "m1"), (four, "m1"), (one, "another"), *spares]
    assert asked[1:] == [[("none", "m2")], [(KEYS[2], "m3")]]
    for server in servers[1:]:
        assert KEYS[0] not in str([request.headers for request in server.requests])
    assert servers[2].chats[0].body["temperature"] == 0.5 and "stream" in servers[2].chats[0].body
    assert not servers[2].chats[0].body["stream"]
    tail = " at 127.0.0.1 - 1 model_not_found"
    assert f"4/m9: m9{tail}" in bench.command("/profiles").splitlines()
    assert not re.search("sk-|fourth", bench.command("/profiles") + bench.screen)


WRONG = [
    {"OPENAI_BASE_URL_2": "localhost:1234/v1"},
    {"OPENAI_BASE_URL_2": "not a url"},
    {"OPENAI_BASE_URL_2": "ftp://x/v1"},
    {"OPENAI_BASE_URL_2": "http://"},
    {"OPENAI_BASE_URL_2": "http://x:port/v1"},
    {"OPENAI_API_KEY_2": "sk-a b-secret"},
    {"OPENAI_API_KEY_2": "sk-secret-\u00e9"},
    {"OPENAI_API_KEY_2": "sk-secret", "MODEL_OPTIONS_2": "{temperature: 1}"},
    {"OPENAI_API_KEY_2": "sk-secret", "MODEL_OPTIONS_2": "[1]"},
    {"OPENAI_API_KEY_2": "sk-secret", "MODEL_OPTIONS_2": "5"},
    {"OPENAI_API_KEY_2": "sk-secret", "MODEL_OPTIONS_2": '"x"'},
]


@since("s09")
def test_settings_that_make_no_sense(desk, section, fake_model):
    for env in WRONG:
        with pytest.raises(ValueError, match="profile 2") as caught:
            desk(**env)
        assert "\n" not in str(caught.value) and "secret" not in str(caught.value), env
    done = harness.pipe(section, "hi\n", fake_model.env(**WRONG[0]))
    assert done.returncode == 1 and not fake_model.chats
    assert re.fullmatch(r"the settings of profile 2.*\n", done.stderr), done.stderr


@since("s09")
def test_what_is_left_empty_is_no_profile(desk):
    bench = desk(OPENAI_API_KEY_2=" ", OPENAI_BASE_URL_2="", FALLBACK_MODELS=" , ")
    assert bench.names == ["1"]


# --- commands ---

SIMULATED = {
    "rate_limit": (openai.RateLimitError, 429),
    "overloaded": (openai.InternalServerError, 503),
    "timeout": (openai.APITimeoutError, None),
    "billing": (openai.RateLimitError, 429),
    "auth": (openai.AuthenticationError, 401),
    "model_not_found": (openai.NotFoundError, 404),
    "format": (openai.BadRequestError, 400),
    "overflow": (openai.BadRequestError, 400),
    "unknown": (openai.APIError, None),
}


@since("s09")
def test_what_is_simulated_is_what_the_sdk_raises(section, bench: Bench):
    assert SIMULATED.keys() == set(section.module.FailoverReason)
    for reason, (kind, status) in SIMULATED.items():
        error = section.module.simulated_error(reason, bench.client)
        assert type(error) is kind and getattr(error, "status_code", None) == status
        assert section.module.classify_failure(error) == reason
        assert str(error) and section.module.explain(error)
        assert str(error.request.url).startswith(str(bench.client.base_url))
        if status:
            assert error.response.status_code == status and error.body["message"]


@since("s09")
def test_a_simulated_failure_fails_one_call(bench: Bench, servers):
    for reason in SIMULATED:
        rig(bench, servers, ["good", "good", "good"])
        assert reason in bench.command(f"/simulate-failure {reason}")
        assert bench.ask("hi") == "hi"
        told = re.findall(r"profile 1: (\w+); trying profile 2", bench.screen)
        assert told == ([reason] if reason != "overflow" else []), "the guard makes room"
        assert bench.ask("more") == "more"
        rests = bool(RESTS[reason][0])
        assert bool(bench.rest()) == rests
        count = 2 if reason == "overflow" else 1
        expected = (0, 2) if rests else (count, 2 - count)
        assert (len(servers[0].chats), len(servers[1].chats)) == expected
        assert [m["content"] for m in bench.agent.messages] == ["hi", "hi", "more", "more"]
    for words in ("nonsense", "rate", "AUTH", "auth now", "2", "-1", "1e3"):
        with pytest.raises(ValueError, match="model_not_found, format, overflow"):
            bench.command(f"/simulate-failure {words}")


@since("s09")
def test_a_simulated_overflow_makes_room_once(bench: Bench, servers):
    """A long history is summarized, and the window is as wide as before, after a restart, too."""
    rig(bench, servers, ["good", "good", "good"])
    brief = lambda body: good(body) if "tools" in body else Text("in short")  # noqa: E731
    servers[0].script("m1", [brief], repeat=True)
    for number in range(12):
        bench.agent.messages.append({"role": "user", "content": f"tell {number} " + "word " * 900})
        bench.agent.messages.append({"role": "assistant", "content": "so " * 500})
    window, length = bench.agent.guard.limit(bench.agent), len(bench.agent.messages)
    bench.command("/simulate-failure overflow")
    assert bench.ask("hi") == "hi", bench.screen
    assert "became a summary" in bench.screen and len(bench.agent.messages) < length
    assert not servers[1].chats and bench.agent.guard.limit(bench.agent) == window
    again = bench.module.Session(bench.module.Journal(bench.agent.messages.journal.path))
    assert again == bench.agent.messages
    bench.agent.messages = again
    assert bench.agent.guard.limit(bench.agent) == window


@since("s09")
def test_what_the_commands_show(bench: Bench, servers):
    assert bench.command("/profiles").splitlines() == [
        "1: MODEL_ID or the agent's own at 127.0.0.1 - not called yet",
        "2: m2 at 127.0.0.1 - not called yet",
        "3: m3 at 127.0.0.1 - not called yet",
    ]
    assert bench.command("/cooldowns") == "none has to rest"
    assert bench.profiles.stats() == "not called yet"
    rig(bench, servers, ["401", "429 late", "good"])
    assert bench.ask("hi") == "hi" and bench.ask("hi") == "hi"
    told = bench.command("/profiles").splitlines()
    assert "Incorrect API key" in told[1] and len(told) == 5
    assert [line.split(" - ")[1] for line in told if line[0] != " "] == [
        "1 auth",
        "1 rate_limit",
        "2 answered",
    ]
    one, two = bench.command("/cooldowns").splitlines()
    assert one.startswith("1 auth, again in 600 s - ") and "Incorrect API key" in one
    assert two.startswith("2 rate_limit, again in 300 s - ")
    assert [line[0] for line in bench.command("/fallback").splitlines()] == ["3", "1"]
    assert sorted(bench.profiles.stats().split(", ")) == ["1 auth", "1 rate_limit", "2 answered"]
    bench.fail("rate_limit", "3", limited(retry_after="900"))
    bench.fail("rate_limit", "1", limited(retry_after="900"))
    assert bench.command("/fallback").strip(), "a line, even when nobody is left"
    assert "sk-" not in bench.command("/cooldowns") + bench.command("/profiles")


# --- at the front door ---


def process_env(servers: list[FakeModel], env: dict, **more: str) -> dict[str, str]:
    return env | env_of(servers, APPROVAL="always", MODEL_TIMEOUT="0.5", **more)


@since("s09")
def test_a_program_that_fails_over(section, servers, env: dict, workspace: Path):
    servers[0].script("m1", [Error(401)])
    servers[1].script("m2", [ToolCalls([RAN]), Drop(2)])
    servers[2].script("m3", [Text("from three"), Text("three again")])
    lines = "run it\n/cooldowns\n/fallback\nand then\n/profiles\n/stats\n/help\n"
    done = harness.pipe(section, lines, process_env(servers, env))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "[profile 1: auth; trying profile 2]" in done.stdout
    assert "[profile 2: timeout; trying profile 3]" in done.stdout
    assert "from three" in done.stdout and "three again" in done.stdout
    assert re.search(r"^model: 1 auth, 3 answered, 1 timeout$", done.stdout, re.M), done.stdout
    assert re.search(r"^3: m3 at 127\.0\.0\.1 - 2 answered$", done.stdout, re.M)
    assert re.search(r"^you> .*\n1 auth, again in (600|59\d) s - ", done.stdout, re.M)
    assert (workspace / "ran.txt").read_text() == "ran\n"
    for number, server in enumerate(servers):
        assert {chat.key for chat in server.chats} == {KEYS[number]}
        others = [key for key in KEYS if key != KEYS[number]]
        told = str([(request.headers, request.body) for request in server.requests])
        assert not any(key in told for key in others)
    written = [path.read_bytes() for path in workspace.rglob("*") if path.is_file()]
    for key in KEYS:
        assert key not in done.stdout and not any(key.encode() in data for data in written)


@since("s09")
def test_a_program_that_none_can_answer_goes_on(section, servers, env: dict):
    servers[1].script("m2", [Error(402), Error(402)])
    servers[2].script("m3", [Error(404), Error(404)])
    servers[0].script("m1", [Error(401), Text("fine")])
    lines = "remember blue\nwhich colour\n"
    done = harness.pipe(section, lines, process_env(servers, env))
    assert done.returncode == 1 and not done.stderr, "a question of a pipe went unanswered"
    reasons = "1 auth, again in 600 s; 2 billing, again in 600 s; 3 model_not_found, again in 600 s"
    assert done.stdout.count(f"[no profile could answer: {reasons}") == 1
    said = [m["content"] for m in servers[0].chats[-1].messages if m["role"] == "user"]
    assert said == ["remember blue", "which colour"] and "fine" in done.stdout


@pytest.mark.guard
@since("s09")
def test_the_shell_does_not_see_the_keys(section, servers, env: dict):
    command = "env | grep -c sk- ; env | grep _BASE_URL"
    servers[0].script("m1", [ToolCalls([("bash", {"command": command})]), Text("ok")])
    harness.pipe(section, "run it\n", process_env(servers, env))
    shown = servers[0].chats[-1].messages[-1]["content"]
    assert shown.startswith("0\n") and "OPENAI_BASE_URL_2" in shown


@since("s09")
@pytest.mark.costly
def test_a_program_alone_tries_again_in_the_open(section, fake_model):
    fake_model.script("text", [Error(429), Drop(1), Text("here I am"), Error(401)])
    done = harness.pipe(section, "hi\nagain\n", fake_model.env())
    assert len(re.findall(r"\[profile 1: rate_limit; trying again in \d s\]", done.stdout)) == 1
    assert len(re.findall(r"\[profile 1: timeout; trying again in \d s\]", done.stdout)) == 1
    assert "here I am" in done.stdout and "check OPENAI_API_KEY" in done.stdout
    times = [chat.time for chat in fake_model.chats]
    assert len(times) == 4 and 1 <= times[1] - times[0] < 2.5 and 4 <= times[2] - times[1] < 6.5


@since("s09")
def test_the_heartbeat_and_a_job_fail_over(section, servers, env: dict, workspace: Path):
    (workspace / "HEARTBEAT.md").write_text("- look at the sky\n", encoding="utf-8")
    payload = {"kind": "agent_turn", "message": "do it"}
    job = {"id": "job", "schedule": {"kind": "every", "every_seconds": 5000}, "payload": payload}
    (workspace / "CRON.json").write_text(json.dumps({"jobs": [job]}), encoding="utf-8")
    servers[0].script("m1", [Error(401)])
    servers[1].script("m2", [Error(402), Text("it rains"), Text("the job is done")])
    servers[2].script("m3", [Text("it rains"), Text("the job is done")])
    with Screen(section, process_env(servers, env)) as screen:
        screen.wait_for(PROMPT)
        screen.type("/trigger\n")
        screen.wait_for("it rains")
        screen.type("/cron-trigger job\n")
        screen.wait_for("the job is done")
        assert "Traceback" not in screen.text


@since("s09")
def test_ctrl_c_ends_the_pause_between_two_tries(section, servers, env: dict):
    servers[0].script("m1", [ToolCalls([RAN]), Error(500), Error(500), Text("fine")])
    with Screen(section, process_env(servers[:1], env)) as screen:
        screen.wait_for(PROMPT)
        screen.type("run it\n")
        servers[0].wait(3)
        time.sleep(0.3)  # of 4 s
        began = time.monotonic()
        screen.press("ctrl-c")
        screen.wait_for("[stopped]")
        screen.wait_for(PROMPT)
        assert time.monotonic() - began < 2
        screen.type("next\n")
        screen.wait_for("fine")
    seen = [m for m in servers[0].chats[-1].messages if m["role"] != "system"]
    assert [m["role"] for m in seen] == ["user", "assistant", "tool", "assistant", "user"]
    assert seen[-1]["content"] == "next"
