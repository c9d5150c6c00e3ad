"""Checks of the exercises of s05."""

import json
import re
from pathlib import Path

from fake_model import FakeModel
from harness import Screen
from harness import Section
from harness import pipe
from websockets.sync.client import connect

LINK = re.compile(r"http://(127\.0\.0\.1:\d+)/#token=(\S+)")


def type_in(script: Section, env: dict[str, str], *lines: str) -> list[str]:
    """What one run of the script shows after each of these lines."""
    done = pipe(script, "".join(f"{line}\n" for line in lines), env)
    parts = done.stdout.split("you> ")[1:]
    assert len(parts) > len(lines), f"expected a prompt after each line; got {done}"
    return parts


def call(script: Section, env: dict[str, str], *requests: dict) -> list[dict]:
    """The replies of the script's gateway to these requests."""
    with Screen(script, env) as screen:
        host, token = screen.wait_for(LINK, 30).groups()
        with connect(f"ws://{host}/ws?token={token}", proxy=None) as client:
            for number, request in enumerate(requests):
                client.send(json.dumps({"jsonrpc": "2.0", "id": number} | request))
            return [json.loads(client.recv(30)) for _ in requests]


def test_s05_channels(script: Section, fake_model: FakeModel):
    """Add: the method `channels.list` has an object for each: `channel`, `account`, `status`."""
    asked = {"method": "channels.list"}
    good, bad = call(script, fake_model.env(), asked, asked | {"params": {"colour": "red"}})
    result = good.get("result")
    assert isinstance(result, list), f"expected a list as the result; got {good}"
    cli = {"channel": "cli", "account": "default", "status": "on"}
    assert cli in result, f"expected {cli} among them; got {result}"
    names = sorted(str(each.get("channel")) for each in result if isinstance(each, dict))
    assert names == ["cli", "web"], f"expected the channels cli and web; got {names}"
    code = bad.get("error", {}).get("code")
    assert code == -32602, f"expected an unknown parameter to be refused with -32602; got {bad}"


def test_s05_bind(script: Section, fake_model: FakeModel):
    """Add: `/bind <agent> <channel> [peer]` sets a binding; an unknown agent is told in a line."""
    where = "/route telegram 42"
    before, _, after, *_ = type_in(
        script, fake_model.env(), where, "/bind luna telegram 42", where, "/bind sage telegram"
    )
    assert "agent:main:" in before, f"expected main without a binding; got {before!r}"
    assert "agent:luna:" in after, f"expected luna after /bind luna telegram 42; got {after!r}"
    asked = [where, "/route telegram 7", "/bind nemo telegram 7", "/route telegram 7", where]
    ann, all_, wrong, still, last, *_ = type_in(script, fake_model.env(), *asked)
    assert "agent:luna:" in ann, f"expected luna after a restart, too; got {ann!r}"
    assert "agent:sage:" in all_, f"expected sage after /bind sage telegram; got {all_!r}"
    assert "nemo" in wrong.partition("\n")[2], f"expected a line on nemo; got {wrong!r}"
    assert "agent:sage:" in still, f"expected no binding to nemo; got {still!r}"
    assert "agent:luna:" in last, f"expected the program to go on; got {last!r}"


def test_s05_route(script: Section, fake_model: FakeModel, workspace: Path):
    """Find: Ann's chat is bound to luna; once all of Telegram is bound to sage, so is she."""
    ann = {"agent": "luna", "channel": "telegram", "peer": "42"}
    everybody = {"agent": "sage", "channel": "telegram", "priority": 5}
    lines = "".join(json.dumps(binding) + "\n" for binding in (ann, everybody))
    (workspace / "bindings.jsonl").write_text(lines, encoding="utf-8")
    asked = ["/route telegram 42", "/route telegram 7"]
    hers, others, *_ = type_in(script, fake_model.env(), *asked)
    assert "agent:sage:" in others, f"expected everybody else to get sage; got {others!r}"
    assert "agent:luna:" in hers, f"expected Ann, telegram 42, to get luna; got {hers!r}"
