"""Every command that README.md and docs/ show is run, in order, one empty directory a page.

How: fenced blocks marked `sh` or `bash` are read line by line. A `llamita` command runs as written plus the overrides
that SHORTER has for its verb (a repeated flag counts as given last), so that a run of minutes takes seconds. Fenced
`python` blocks run as they stand. FILES are what a page may assume the reader has. `make` targets are planned with
`make --dry-run`, and `make quickstart` also runs the verb below it; commands that fetch or enter things are checked
for what they name. A command of any other kind fails the test: either it is made known here, or it goes.

A block whose commands cannot run here (a GPU, a download) is marked `sh` with a word after it, such as
"```sh no-run", and is only parsed. `llamita serve` runs beside the rest of its page, at a free port in the place of
ADDRESS's, and `curl` may ask it there. One marked `needs` and the names of modules is run where those are installed.
HUB are models that pages name: small ones stand for them in a cache of the hub's client, which stays offline.
The first `llamita` of a page and the first `torchrun` are the installed programs; later ones, and Python, are processes
forked from one that has done the imports (see forked.py), which take longer than most of these commands.
Many pages begin alike, with a tokenizer, data and a model. A beginning that another page has run is not run again, even
with other numbers where SHORTER overrides both: what it left is copied. All pages are run at one path, since runs write
down where their data is.
"""

import contextlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llamita.cli.main import VERBS
from llamita.data import meadow
from tests import forked
from tests.storage.test_hub import lay_out, write_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Flags that are added to a verb's command so that it ends within seconds.
SHORTER: dict[str, list[str]] = {
    "train": [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "2",
        "--evaluation-rows",
        "2",
        "--sample-tokens",
        "8",
    ],
    "classify train": ["--steps", "2", "--batch-size", "4", "--evaluation-rows", "8"],
    "dpo": ["--steps", "3", "--batch-size", "4", "--evaluation-rows", "8"],
    "rl": ["--steps", "2", "--batch-size", "4", "--group", "2", "--max-tokens", "8", "--evaluation-rows", "4"],
    "generate": ["--max-tokens", "8"],
    "chat": ["--max-tokens", "8"],
    "sft": ["--steps", "2", "--batch-size", "2", "--evaluation-rows", "4", "--conversations", "40", "--answers", "2"],
    "learn start": ["--model-steps", "2"],
    "quickstart": ["--size", "small", "--steps", "1", "--stories", "400", "--scored-stories", "4"],
}

# Files that pages may assume: the reader's own text.
FILES = {"stories.txt": 400}  # so many Meadow stories, a blank line between them

ADDRESS = "127.0.0.1:8000"
"""Where a page's server is; the commands and the Python below it are run with the port that it really has."""

STORIES = 100
"""The most stories that `meadow:COUNT` stands for."""

KEPT = 3
"""What a page has left after each of its first lines, so many of them, is kept for pages that begin alike."""

HUB = ("HuggingFaceTB/SmolLM2-135M",)

NOT_RUN = ("git", "cd", "source", "lm_eval")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    words: tuple[str, ...]  # what follows the language on the fence
    line: int  # of the fence, from 1
    text: str


def blocks(text: str) -> list[Block]:
    found, opened, lines = [], None, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"```(\S*)\s*(.*)", line.strip())
        if opened is None and fence:
            opened, lines = (fence[1], tuple(fence[2].split()), number), []
        elif opened is not None and line.strip() == "```":
            found.append(Block(*opened, "\n".join(lines)))
            opened = None
        elif opened is not None:
            lines.append(line)
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block: continued lines joined, comments and a leading `$` left out."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def launched(words: list[str]) -> list[str]:
    """`llamita VERB ...` of a command that runs it, by itself or in processes that torchrun starts; else nothing."""
    if words[:1] == ["torchrun"] and "-m" in words:
        return words[words.index("-m") + 1 :]
    return words if words[:1] == ["llamita"] else []


def verb_of(words: list[str]) -> str:
    """The verb of `llamita ...`; ValueError where there is none such."""
    for name in (" ".join(words[1:3]), " ".join(words[1:2])):
        if name in VERBS:
            return name
    if words[1:2] in (["--help"], ["--version"]):
        return ""
    raise ValueError(f"no such verb: {shlex.join(words)}")


def without_settings(command: str) -> tuple[list[str], list[str]]:
    """The words of a command, those at its beginning apart that set variables of the environment."""
    words = shlex.split(command, comments=True)
    count = next((number for number, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[:count], words[count:]


def shortened(command: str) -> str:
    """The command with the overrides of SHORTER at the end of each `llamita` part, and at most STORIES stories; pipes
    and redirections are kept."""
    parts = []
    command = re.sub(r"\bmeadow:(\d+)", lambda found: f"meadow:{min(int(found[1]), STORIES)}", command)
    for part in re.split(r"(\s[|>]\s|&&)", command):
        settings, words = without_settings(part)
        if (verb := launched(words)) and "--help" not in words:
            extra = shlex.join(SHORTER.get(verb_of(verb), []))
            part = f" {shlex.join([*settings, *words])} {extra} "
        parts.append(part)
    return "".join(parts).strip()


def problem(command: str) -> str | None:
    """Why a command is of no kind that this test knows; None where it is."""
    _, words = without_settings(command)
    if words[0] in NOT_RUN or words[0] in ("llamita", "torchrun", "echo", "printf", "cat"):
        if words[0] in ("llamita", "torchrun"):
            verb_of(launched(words))
        return None
    if words[0] == "curl":
        return None if f"http://{ADDRESS}" in command else f"curl asks another place than {ADDRESS}"
    if words[0] == "make":
        return None if make_dry_run(words) == 0 else "make has no such target"
    if words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [extra for group in re.findall(r"\[([\w,-]+)\]", command) for extra in group.split(",")]
        unknown = [extra for extra in named if extra not in extras]
        return f"pyproject.toml has no extra {unknown[0]!r}" if unknown else None
    if words[0] == "pytest":
        return None if (ROOT / words[1]).exists() else f"there is no {words[1]}"
    if words[0] == "python" and words[1].startswith("benchmarks/"):
        return None if (ROOT / words[1]).is_file() else "no such benchmark"
    if words[0].startswith("scripts/") or words[:2] == ["bash", ".ci/run"]:
        return None if (ROOT / words[-1 if words[0] == "bash" else 0]).is_file() else "no such script"
    if words[:3] == ["python3", "-m", "venv"]:
        return None
    return "tests/test_readme.py does not know how to run this kind of command"


def runs_here(block: Block) -> bool:
    """Whether a block is not marked as one that is only read, here or anywhere."""
    needed = block.words[1:] if block.words[:1] == ("needs",) else ()
    return "no-run" not in block.words and all(importlib.util.find_spec(name) for name in needed)


def make_dry_run(words: list[str]) -> int:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run([words[0], "--dry-run", *words[1:]], cwd=ROOT, env=clean, capture_output=True).returncode


def to_run(command: str) -> str | None:
    """The shell line that stands for a command here, or None where checking it was all."""
    _, words = without_settings(command)
    if words == ["make", "quickstart"]:
        return shortened("llamita quickstart")
    return shortened(command) if words[0] in ("llamita", "torchrun", "echo", "printf", "cat", "curl") else None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of the commands, with the models of HUB in the cache of the hub's client."""
    hub = tmp_path_factory.mktemp("hub")
    write_model(hub / "small")
    for name in HUB:
        lay_out(hub, name, hub / "small")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }


@pytest.fixture(scope="module")
def with_programs(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The same environment, with forked.py's programs in front of the PATH."""
    with forked.programs(tmp_path_factory.mktemp("forked"), environment) as directory:
        yield environment | {"PATH": f"{directory}{os.pathsep}{environment['PATH']}"}


@dataclass(frozen=True)
class Step:
    """What is run of a page: a line of a shell, or a block of Python."""

    language: str
    text: str
    where: str


def steps(page: Path) -> list[Step]:
    """The steps of a page, all of whose commands are checked. AssertionError where one is of an unknown kind."""
    found = []
    for block in blocks(page.read_text()):
        where = f"{page.name}, block at line {block.line}"
        if block.language == "python" and runs_here(block):
            found.append(Step("python", block.text, where))
        if block.language not in ("sh", "bash", "shell", "console"):
            continue
        for command in commands(block):
            assert (why := problem(command)) is None, f"{where}: {command}: {why}"
            line = to_run(command)
            if line is not None and runs_here(block):
                found.append(Step("sh", line, f"{where}: {command}"))
    return found


def serves(step: Step) -> bool:
    return step.text.startswith("llamita serve") and "--help" not in step.text


def beginning(steps: list[Step]) -> list[str]:
    """The lines before the first step that is Python or starts a server, without the numbers that SHORTER replaces."""
    plain = itertools.takewhile(lambda step: step.language == "sh" and not serves(step), steps)
    return [re.sub(r"(--[\w-]+) \d+ (?=.*\1 )", "", step.text) for step in plain]


@dataclass(frozen=True)
class Beginnings:
    """The directory in which pages are run, and copies of it as the lines with which a page began had left it."""

    place: Path
    copies: Path
    known: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def begin(self, lines: list[str]) -> int:
        """Empties the place, puts there FILES or what the longest known beginning of these lines has left, and returns
        how many lines that beginning has."""
        shutil.rmtree(self.place, ignore_errors=True)
        for count in range(len(lines), 0, -1):
            if tuple(lines[:count]) in self.known:
                shutil.copytree(self.known[tuple(lines[:count])], self.place, symlinks=True)
                return count
        self.place.mkdir()
        for name, count in FILES.items():
            (self.place / name).write_text("\n\n".join(meadow.story(7, index) for index in range(count)) + "\n")
        return 0

    def keep(self, lines: list[str]) -> None:
        """Keeps what these lines have left, where another page may begin with them."""
        if len(lines) <= KEPT and tuple(lines) not in self.known:
            self.known[tuple(lines)] = self.copies / str(len(self.known))
            shutil.copytree(self.place, self.known[tuple(lines)], symlinks=True)


@pytest.fixture(scope="module")
def beginnings(tmp_path_factory: pytest.TempPathFactory) -> Beginnings:
    directory = tmp_path_factory.mktemp("pages")
    return Beginnings(directory / "page", directory)


@pytest.mark.medium
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_runs(
    page: Path, beginnings: Beginnings, environment: dict[str, str], with_programs: dict[str, str]
) -> None:
    of_page = steps(page)
    lines, place = beginning(of_page), beginnings.place
    begun = beginnings.begin(lines)
    installed = {"torchrun"} if begun else {"llamita", "torchrun"}
    with contextlib.ExitStack() as servers:
        address = ADDRESS
        for number, step in enumerate(of_page[begun:], begun + 1):
            if serves(step):
                servers.close()  # the one before
                address = servers.enter_context(serving(step.text.rstrip("& "), place, environment))
                continue
            text = step.text.replace(ADDRESS, address)
            if step.language == "python":
                run(["python", "-c", text], place, with_programs, step.where)
                continue
            first = {program for program in installed if re.search(rf"\b{program} ", text)}
            installed -= first
            run(["bash", "-o", "pipefail", "-c", text], place, environment if first else with_programs, step.where)
            if number <= len(lines):
                beginnings.keep(lines[:number])


@contextlib.contextmanager
def serving(line: str, directory: Path, environment: dict[str, str]) -> Iterator[str]:
    """Runs a server at a free port and yields its address; it must end well when it is asked to."""
    log = directory / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*shlex.split(line), "--port", "0"], cwd=directory, env=environment, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"serving .* at http://(\S+)", log.read_text())):
            ended = process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"{line}:\n{log.read_text()[-4000:]}"
            time.sleep(0.1)
        yield found[1]
        process.terminate()
        assert process.wait(60) == 0, f"{line}:\n{log.read_text()[-4000:]}"
    finally:
        process.kill()


def run(arguments: list[str], directory: Path, environment: dict[str, str], where: str) -> None:
    program = shutil.which(arguments[0], path=environment["PATH"])
    assert program is not None
    done = subprocess.run(
        [program, *arguments[1:]],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{where} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_the_tests_that_a_page_names_are_there() -> None:
    page = ROOT / "docs" / "compatibility.md"
    named = re.findall(r"\[test_\w+\.py::(\w+)\]\(([^)]+)\)", page.read_text("utf-8"))
    assert len(named) > 100
    for name, target in named:
        assert f"def {name}(" in (page.parent / target).read_text("utf-8"), f"{target} has no {name}"


def test_a_page_is_taken_apart_as_it_reads() -> None:
    page = "text\n```sh no-run\n# a comment\nllamita train \\\n  --steps 3\n\nmake test\n```\n```\nno command\n```\n"
    first, second = blocks(page)
    assert (first.language, first.words, first.line) == ("sh", ("no-run",), 2)
    assert commands(first) == ["llamita train  --steps 3", "make test"]
    assert second.language == ""


def test_a_block_runs_where_what_it_needs_is_installed() -> None:
    marks = {"sh": True, "sh no-run": False, "sh needs json": True, "python needs json no_such_module": False}
    for mark, expected in marks.items():
        assert runs_here(blocks(f"```{mark}\nllamita --help\n```\n")[0]) is expected


def test_overrides_go_to_their_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHORTER, "generate", ["--max-tokens", "8"])
    assert shortened("llamita info tiny") == "llamita info tiny"
    assert shortened("llamita generate --help") == "llamita generate --help"
    assert shortened("echo 'One day' | llamita generate runs/x > out.txt") == (
        "echo 'One day' |  llamita generate runs/x --max-tokens 8  > out.txt"
    )
    assert shortened("torchrun --nproc-per-node 2 -m llamita generate runs/x").endswith("runs/x --max-tokens 8")
    assert to_run("make test") is None
    assert shortened("llamita classify evaluate runs/x --data meadow:1000") == (
        "llamita classify evaluate runs/x --data meadow:100"
    )
    assert shortened("llamita classify evaluate runs/x --data meadow:20").endswith("meadow:20")


def test_a_beginning_is_told_by_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHORTER, "train", ["--steps", "2"])
    begun = [
        beginning([Step("sh", shortened(f"llamita train {options}"), "")])
        for options in ("--depth 2 --steps 300", "--steps 500 --depth 2", "--depth 2", "--depth 3 --steps 300")
    ]
    assert begun[0] == begun[1] == begun[2] == ["llamita train --depth 2 --steps 2"]
    assert begun[3] != begun[0]


@pytest.mark.parametrize("command", ["curl example.org | sh", "make nonsense", "pip install 'llamita[nonsense]'"])
def test_an_unknown_command_is_reported(command: str) -> None:
    assert problem(command) is not None


def test_an_unknown_verb_is_reported() -> None:
    with pytest.raises(ValueError, match="no such verb: llamita frobnicate"):
        problem("llamita frobnicate --steps 3")
