"""Intelligence (s06): the prompt made of files, read anew for each message, and the skills."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
from fake_model import FakeModel
from fake_model import Text
from fake_model import ToolCalls
from harness import since

LAYERS = ("soul", "tools", "skills", "memory", "context", "runtime", "channel")
GOOD = "---\nname: {0}\ndescription: what {0} is for\n---\n# {0}\nthe body of {0}\n"


class Desk:
    """A section, a workspace, and a model that says ok."""

    def __init__(self, section: harness.Section, workspace: Path, server: FakeModel):
        self.section, self.workspace, self.server = section, workspace, server
        server.script("brain", [Text("ok")], repeat=True)

    def run(self, *lines: str, **env: str) -> str:
        """One run over pipes, ended by quit; what it printed."""
        settings = self.server.env("brain", GATEWAY_PORT="0", APPROVAL="always") | env
        done = harness.pipe(
            self.section, "".join(f"{line}\n" for line in (*lines, "quit")), settings
        )
        assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def screen(self, **env: str) -> harness.Screen:
        return harness.Screen(self.section, self.server.env("brain", GATEWAY_PORT="0") | env)

    @property
    def prompts(self) -> list[str]:
        """The system prompts that the model got."""
        chats = [chat.messages for chat in self.server.chats]
        return [m["content"] for chat in chats for m in chat if m["role"] == "system"]

    def write(self, path: str, text: str | bytes) -> Path:
        file = self.workspace / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def skill(self, name: str, text: str = GOOD, root: str = "skills") -> Path:
        return self.write(f"{root}/{name}/SKILL.md", text.replace("{0}", name))


@pytest.fixture
def desk(section: harness.Section, workspace: Path, fake_model: FakeModel) -> Desk:
    return Desk(section, workspace, fake_model)


# --- the prompt ---


@since("s06")
def test_the_layers_stand_in_order(desk: Desk):
    desk.run("hi")
    [prompt] = desk.prompts
    assert prompt.startswith((desk.workspace / "IDENTITY.md").read_text().strip()[:80])
    places = [prompt.index(f"\n<{name}>\n") for name in LAYERS]
    assert places == sorted(places)
    ends = [prompt.index(f"\n</{name}>") for name in LAYERS]
    assert all(a < b for a, b in zip(places, ends, strict=True))
    inside = dict(zip(LAYERS, zip(places, ends, strict=True), strict=True))
    for name, files in {
        "soul": ["SOUL.md"],
        "tools": ["TOOLS.md"],
        "memory": ["MEMORY.md"],
        "context": ["AGENTS.md", "USER.md", "HEARTBEAT.md", "BOOTSTRAP.md"],
    }.items():
        for file in files:
            at = prompt.index((desk.workspace / file).read_text().strip())
            assert inside[name][0] < at < inside[name][1], file
    assert "skills/example-skill/SKILL.md" in prompt[slice(*inside["skills"])]
    assert "What stays with" not in prompt and "Meeting notes to minutes" not in prompt


@since("s06")
def test_the_stable_part_is_the_same_in_each_turn(desk: Desk):
    desk.run("hi", "how are you", "a word on tea", "hi")
    first, *others = desk.prompts
    assert len(others) == 3 and all(other == first for other in others)


@since("s06")
def test_a_changed_file_changes_the_next_answer(desk: Desk):
    with desk.screen() as screen:
        screen.wait_for("you> ")
        for word in ("gruff", "merry"):
            desk.write("SOUL.md", f"You are {word}.")
            desk.write("skills/new/SKILL.md", GOOD.replace("{0}", f"{word}-skill"))
            screen.type(f"hello {word}")
            screen.press("enter")
            screen.wait_for(re.compile(f"hello {word}.*agent> ok.*you> ", re.S))
    for word, prompt in zip(("gruff", "merry"), desk.prompts, strict=True):
        assert f"You are {word}." in prompt and f"{word}-skill" in prompt


@since("s06")
def test_no_file_is_needed(desk: Desk):
    for path in desk.workspace.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "agent> ok" in desk.run("hi")


@since("s06")
@pytest.mark.parametrize("name", ["SOUL.md", "MEMORY.md", "BOOTSTRAP.md"])
@pytest.mark.parametrize("kind", ["long", "2 MB", "3 MiB", "binary", "folder", "latin-1", "utf-16"])
def test_odd_files_are_told_of_once_and_break_nothing(desk: Desk, name: str, kind: str):
    (desk.workspace / name).unlink()
    data = {
        "long": "x" * 20_001,
        "2 MB": "ä" * 1_000_000,
        "3 MiB": "x" * (3 << 20),
        "binary": b"\x7fELF\0\1\2",
        "latin-1": b"caf\xe9 au lait",
        "utf-16": "hello".encode("utf-16"),
    }.get(kind)
    if data is None:
        (desk.workspace / name).mkdir()
    else:
        desk.write(name, data)
    printed = desk.run("hi", "hi again")
    assert printed.count(f"[{name}: ") == 1
    assert printed.count("agent> ok") == 2
    assert ("caf\ufffd au lait" in desk.prompts[0]) == (kind == "latin-1")
    assert len(desk.prompts[0]) < 40_000


@since("s06")
def test_caps_are_exact(desk: Desk):
    text = "".join(chr(ord("a") + i % 26) for i in range(20_001))
    loader = desk.section.module.BootstrapLoader([desk.workspace])
    desk.write("SOUL.md", text[:20_000])
    assert loader.load()["SOUL.md"] == text[:20_000] and not loader.problems
    desk.write("SOUL.md", text)
    cut = loader.load()["SOUL.md"]
    assert loader.problems
    assert cut.startswith(text[:14_000] + "\n[") and cut.endswith("]\n" + text[-4_000:])
    assert "2,001 characters" in cut and len(cut) < 20_000


@since("s06")
def test_all_files_together_have_a_cap(desk: Desk):
    module = desk.section.module
    for number, name in enumerate(module.BOOTSTRAP_FILES):
        desk.write(name, str(number) * 20_000)
    texts = module.BootstrapLoader([desk.workspace]).load()
    assert [len(text) for text in texts.values()][:7] == [20_000] * 7
    last = texts[module.BOOTSTRAP_FILES[7]]
    assert last.startswith("7" * 7_000 + "\n") and last.endswith("\n" + "7" * 2_000)
    assert sum(map(len, texts.values())) <= 150_000


@since("s06")
def test_modes(desk: Desk):
    printed = desk.run("/prompt full", "/prompt minimal", "/prompt none", "/prompt most")
    full, minimal, none, wrong = printed.split("you> ")[1:5]
    assert all(f"<{name}>" in full for name in LAYERS)
    found = [name for name in LAYERS if f"<{name}>" in minimal]
    assert found == ["soul", "runtime", "channel"]
    assert "You are Tally" in none and not any(f"<{name}>" in none for name in LAYERS)
    assert "/prompt [full|minimal|none]" in wrong
    assert desk.server.chats == []


@since("s06")
def test_a_small_window_gets_the_minimal_prompt(desk: Desk):
    desk.write("SOUL.md", "soul " * 5_000)
    assert "agent> ok" in desk.run("hi", CONTEXT_TOKENS="4096")
    [prompt] = desk.prompts
    assert "<memory>" not in prompt and "<soul>" in prompt and len(prompt) < 2_600


@since("s06")
def test_a_prompt_that_becomes_smaller_tells_each_problem_once(desk: Desk):
    (desk.workspace / "TOOLS.md").unlink()
    (desk.workspace / "TOOLS.md").mkdir()
    for name in ("USER.md", "AGENTS.md", "MEMORY.md"):
        desk.write(name, "灵" * 20_000)
    printed = desk.run("one", "/prompt minimal", "two", CONTEXT_TOKENS="60000")
    assert printed.count("[TOOLS.md: left out") == 1
    assert printed.count("[the prompt of main would fill half of the window, so it is minimal") == 1


@since("s06")
def test_a_prompt_counts(desk: Desk):
    few, many = (
        int(re.search(r"([\d,]+) of 128,000 tokens", desk.run("/context"))[1].replace(",", ""))
        for _ in range(2)
        if desk.write("SOUL.md", "word " * (4_000 * _))
    )
    assert many - few > 4_000


@since("s06")
def test_agents_have_homes(desk: Desk):
    desk.write("agents/luna/SOUL.md", "Luna's own soul.")
    desk.write("agents/luna/MEMORY.md", "Luna's own notes.")
    desk.run("hi", "/agent luna", "hi", "/agent sage", "hi")
    main, luna, sage = desk.prompts
    assert "Calm, exact, brief" in main and "Luna's own" not in main
    assert luna.startswith("You are Luna.") and "Luna's own soul." in luna
    assert "Luna's own notes." in luna and "Calm, exact, brief" not in luna
    assert "The offline model" not in luna, "main's notes are main's"
    assert sage.startswith("You are Sage.") and "Calm, exact, brief" in sage


@pytest.mark.guard
@since("s06")
def test_a_group_sees_nothing_private(desk: Desk):
    desk.write("USER.md", "The person is called Ada Private.")
    desk.write("MEMORY.md", "- the blue key lies under the Private stone\n")
    module = desk.section.module
    client = type("Client", (), {"base_url": "x"})()
    settings, quiet = {"model": "m"}, lambda piece: None
    agent = module.Agent(client, settings, [], quiet, desk.workspace, "never", module.TOOLS)
    agent.key, agent.guard = "agent:main:main", module.ContextGuard(128_000)
    agent.messages = module.Session(module.Journal(desk.workspace / ".s.jsonl"))
    app = module.App(agent)
    prompts = {}
    for kind in ("direct", "group"):
        message = module.InboundMessage("telegram", "default", "1", "the blue key", ["x"], kind)
        agent.key = app.route(message)[1]
        agent.system = app.system_prompt(agent, message)
        app.recall(agent, message)
        prompts[kind] = agent.system
        call = {"name": "memory_search", "arguments": '{"query": "blue key"}'}
        prompts[kind] += module.run_tool(agent, {"id": "c", "function": call})
    assert "Ada Private" in prompts["direct"] and "<recalled>" in prompts["direct"]
    assert "Private" not in prompts["group"] and "<recalled>" not in prompts["group"]
    assert module.KEEP_NOTES in prompts["direct"] and module.KEEP_NOTES not in prompts["group"]
    assert prompts["group"].endswith("error: notes are not for groups")


# --- skills ---


@since("s06")
def test_later_folders_win(desk: Desk, tmp_path: Path):
    home, extra = tmp_path / "home", tmp_path / "extra"
    roots = [extra, home / ".openclaw/skills", home / ".agents/skills"]
    roots += [desk.workspace / ".agents/skills", desk.workspace / "skills"]
    text = "---\nname: same\ndescription: from {0}\n---\n"
    for number, root in enumerate(roots):
        folder = root / "same"
        folder.mkdir(parents=True)
        (folder / "SKILL.md").write_text(text.replace("{0}", f"root {number}"))
        (root / f"only{number}").mkdir()
        (root / f"only{number}" / "SKILL.md").write_text(GOOD.replace("{0}", f"only{number}"))
    for number in range(4, -1, -1):
        printed = desk.run("/skills", SKILLS_DIR=str(extra))
        assert f"same: from root {number}" in printed
        assert all(f"only{each}" in printed for each in range(5))
        shutil.rmtree(roots[number] / "same")


@since("s06")
def test_the_current_folder_brings_no_skills(desk: Desk, tmp_path: Path):
    for root in ("skills", ".agents/skills"):
        (tmp_path / "cwd" / root / "evil").mkdir(parents=True)
        (tmp_path / "cwd" / root / "evil" / "SKILL.md").write_text(GOOD.replace("{0}", "evil"))
    settings = desk.server.env("brain", GATEWAY_PORT="0")
    done = harness.pipe(desk.section, "/skills\nquit\n", settings, cwd=tmp_path / "cwd")
    assert "example-skill" in done.stdout and "evil" not in done.stdout


BROKEN = {
    "no frontmatter": ("# hello\n", 1),
    "not closed": ("---\nname: x\ndescription: y\n", 1),
    "bad yaml": ("---\nname: x\ndescription: [a, b\n---\n", 4),
    "tab": ("---\nname: x\n\tdescription: y\n---\n", 3),
    "no description": ("---\nname: x\n---\n", 2),
    "a list": ("---\n- name\n---\n", 2),
    "a number": ("---\nname: 7\ndescription: y\n---\n", 2),
    "empty": ("---\ndescription: y\nname: ''\n---\n", 3),
    "too long": (f"---\nname: x\ndescription: {'y' * 1025}\n---\n", 3),
    "nothing": ("", 1),
    "deep": (f"---\nname: x\ndescription: {'[' * 5_000}\n---\n", None),
}


@since("s06")
@pytest.mark.parametrize("kind", BROKEN)
def test_bad_frontmatter_is_reported_with_its_line(desk: Desk, kind: str):
    text, line = BROKEN[kind]
    desk.skill("broken", text)
    printed = desk.run("hi", "hi", "/skills")
    at = f"skills/broken/SKILL.md, line {line}: " if line else "skills/broken/SKILL.md"
    told = [each for each in printed.splitlines() if "broken" in each]
    assert len(told) == 2, "once at the first message, once in /skills"
    assert all(at in each and len(each) < 300 for each in told)
    assert "example-skill" in printed and printed.count("agent> ok") == 2


@since("s06")
@pytest.mark.parametrize("kind", ["folder", "binary", "big", "unreadable"])
def test_odd_skill_files(desk: Desk, kind: str):
    file = desk.skill("odd", GOOD + "x" * (300_000 if kind == "big" else 0))
    if kind == "folder":
        file.unlink()
        file.mkdir()
    if kind == "binary":
        file.write_bytes(b"---\nname: \xff\xfe\n---\n")
    if kind == "unreadable":
        file.unlink()
        file.symlink_to("nowhere")
    printed = desk.run("hi", "/skills")
    assert "agent> ok" in printed and "example-skill" in printed
    assert "skills/odd/SKILL.md" in printed or kind == "unreadable"


FORMATS = {
    "quoted": ("name: \"f\"\ndescription: 'it''s: fine'", "it's: fine"),
    "folded": ("name: f\ndescription: >-\n  one\n  two", "one two"),
    "literal": ("name: f\ndescription: |\n  one\n  two", "one two"),
    "lists": ("name: f\ndescription: d1\nallowed-tools:\n  - bash\n  - read_file", "d1"),
    "nested": ("name: f\ndescription: d2\nmetadata:\n  a: {b: [1, 2]}\n  c: 2026-01-01", "d2"),
    "comment": ("# hi\nname: f # the name\ndescription: d3\nlicense: MIT", "d3"),
    "chinese": ("name: f\ndescription: 把会议记录整理成纪要", "把会议记录整理成纪要"),
}


@since("s06")
@pytest.mark.parametrize("ends", ["\n", "\r\n", "bom"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_the_format_allows(desk: Desk, kind: str, ends: str):
    front, description = FORMATS[kind]
    text = f"---\n{front}\n---\n# body\n"
    data = ("\ufeff" + text if ends == "bom" else text.replace("\n", ends)).encode()
    skill = desk.section.module.read_skill(desk.write("skills/f/SKILL.md", data))
    assert (skill.name, skill.description, skill.invocation) == ("f", description, "f")


@since("s06")
def test_500_skills_stay_within_the_caps(desk: Desk):
    for number in range(500):
        desk.skill(f"skill-{number:03}")
    desk.run("hi")
    [prompt] = desk.prompts
    listed = prompt[prompt.index("<skills>") : prompt.index("</skills>")]
    assert listed.count("\n- ") == 150 and "351 more are not listed" in listed
    for number in range(500):
        desk.skill(f"skill-{number:03}", GOOD.replace("what", "what " + "w" * 900))
    desk.run("hi")
    listed = desk.prompts[-1][desk.prompts[-1].index("<skills>") :].split("</skills>")[0]
    assert 25 < listed.count("\n- ") < 34 and len(listed) < 30_200
    assert re.search(r"\(4\d\d more are not listed\)", listed)


@pytest.mark.guard
@since("s06")
def test_a_link_out_of_the_folder_is_no_skill(desk: Desk, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "SKILL.md").write_text(GOOD.replace("{0}", "outsider"))
    (desk.workspace / "skills" / "linked").symlink_to(outside)
    (desk.workspace / "skills" / "file").mkdir()
    (desk.workspace / "skills" / "file" / "SKILL.md").symlink_to(outside / "SKILL.md")
    desk.skill("inside")
    (desk.workspace / "skills" / "alias").symlink_to(desk.workspace / "skills" / "inside")
    printed = desk.run("/skills")
    assert "outsider" not in printed and "inside" in printed


@since("s06")
def test_a_body_is_read_by_the_model_or_called_by_the_user(desk: Desk):
    desk.skill("tea", GOOD.replace("---\n#", "invocation: Brew Tea\n---\n#"))
    printed = desk.run("hi", "/brew-tea a cup", "and now", "/help", "/brew")
    plain, called, after = desk.prompts
    assert "what tea is for" in plain and "the body of tea" not in plain
    assert "the body of tea" in called and called.startswith(plain)
    assert after == plain, "for that message alone"
    asked = [m["content"] for m in desk.server.chats[1].messages if m["role"] == "user"]
    assert asked[-1] == "/brew-tea a cup"
    assert "/brew is no command" in printed
    stored = "".join(f.read_text() for f in (desk.workspace / ".sessions").rglob("*.jsonl"))
    assert "the body of tea" not in stored


@since("s06")
def test_flags_of_a_skill(desk: Desk):
    desk.skill("secret", GOOD.replace("---\n#", "disable-model-invocation: true\n---\n#"))
    desk.skill("inner", GOOD.replace("---\n#", "user-invocable: false\n---\n#"))
    desk.skill("new")  # as a command that is there already
    printed = desk.run("/secret now", "/inner now", "/new a label")
    [called] = desk.prompts
    assert "the body of secret" in called and "- secret:" not in called and "- inner:" in called
    assert "/inner is no command" in printed and "(a label)" in printed


def calls(desk: Desk, tool: str, *arguments: dict) -> list[str]:
    """What the model is told when it makes these calls."""
    made = [(tool, each) for each in arguments]
    desk.server.script("brain", [ToolCalls(made), Text("done")])
    desk.run("go")
    results = [m["content"] for m in desk.server.chats[-1].messages if m["role"] == "tool"]
    return results[-len(arguments) :]


@pytest.mark.guard
@since("s06")
def test_skills_outside_the_workspace_can_be_read_and_not_written(desk: Desk, tmp_path: Path):
    folder = tmp_path / "home" / ".agents" / "skills" / "far"
    (folder / "references").mkdir(parents=True)
    (folder / "SKILL.md").write_text(GOOD.replace("{0}", "far"))
    (folder / "references" / "more.md").write_text("more of far")
    (folder / "away").symlink_to(tmp_path)
    (tmp_path / "private.txt").write_text("hidden-thing")
    desk.run("hi")
    location = re.search(r"far: what far is for \[(.+?)\]", desk.prompts[0])[1]
    paths = (location, f"{folder}/references/more.md", f"{folder}/away/private.txt")
    body, more, away = calls(desk, "read_file", *({"path": path} for path in paths))
    assert "the body of far" in body and more == "more of far"
    assert away.startswith("error") and "hidden" not in away
    [written] = calls(desk, "write_file", {"path": location, "content": "x"})
    assert written.startswith("error") and "body of far" in (folder / "SKILL.md").read_text()


@since("s06")
def test_commands_show_the_files(desk: Desk):
    desk.write("SOUL.md", "A soul of my own.")
    desk.write("USER.md", "x" * 25_000)
    printed = desk.run("/soul", "/bootstrap", "/memory", "/skills")
    assert "A soul of my own." in printed
    assert "USER.md: 25,000 characters, cut to 20,000" in printed
    assert "/minutes" in printed and "4 notes" in printed


@since("s06")
def test_a_skill_that_changes_is_read_again(desk: Desk):
    manager = desk.section.module.SkillsManager(desk.workspace)
    file = desk.skill("fresh")
    assert manager.load()["fresh"].description == "what fresh is for"
    opened: list[str] = []
    read, module = desk.section.module.read_skill, desk.section.module
    watched: Callable = lambda path: opened.append(path.name) or read(path)  # noqa: E731
    module.read_skill = watched
    try:
        manager.load()
        assert opened == [], "what has not changed is not read"
        file.write_text(GOOD.replace("{0}", "fresh").replace("what", "all that"))
        os.utime(file, (time.time(), time.time() + 5))
        assert manager.load()["fresh"].description == "all that fresh is for"
        assert opened == ["SKILL.md"]
    finally:
        module.read_skill = read
    assert json.dumps(manager.problems) == "[]"
