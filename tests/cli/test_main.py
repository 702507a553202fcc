"""The command line itself: verbs, help, flags, and what a user sees when something is wrong."""

import gc
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import tyro

from llamita import __version__
from llamita.cli import main as command
from llamita.cli.main import VERBS, Verb, main


@dataclass(frozen=True)
class Optimizer:
    """How weights move."""

    momentum: float = 0.9
    """Share of the last step that is kept."""


@dataclass(frozen=True)
class Settings:
    """What the verb of these tests takes."""

    data: Path
    """A directory of prepared data."""
    name: Annotated[str, tyro.conf.Positional] = "world"
    steps: int = 3
    """Steps in all."""
    optimizer: Optimizer = field(default_factory=Optimizer)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """A verb `greet all` whose calls are recorded, and which `greet` alone names as a group."""
    calls: list[Settings] = []
    module = ModuleType("greeting_verb")

    def run(settings: Settings) -> None:
        """Greet from prepared data."""
        calls.append(settings)

    def fail(kind: str = "value", *, text: str = "two\nlines") -> int:
        """Raise something."""
        if kind == "status":
            return 7
        errors: dict[str, BaseException] = {
            "value": ValueError(text),
            "file": FileNotFoundError(2, "No such file or directory", "corpus.txt"),
            "plain": FileNotFoundError("no corpus.txt here; write one"),
            "empty": ValueError(),
            "bug": RuntimeError("an invariant broke"),
            "interrupt": KeyboardInterrupt(),
            "missing": ModuleNotFoundError("No module named 'wandb'", name="wandb.sdk"),
            "ours": ModuleNotFoundError("No module named 'llamita.attic'", name="llamita.attic"),
        }
        raise errors[kind]

    module.run, module.fail = run, fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "greeting_verb", module)
    verbs = {"greet all": Verb("greeting_verb", "run", "Greets."), "fail": Verb("greeting_verb", "fail", "Fails.")}
    monkeypatch.setattr(command, "VERBS", {**VERBS, **verbs})
    return calls


def test_garbage_is_looked_for_less_often_while_a_verb_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = gc.get_threshold(), []
    module = ModuleType("looking_verb")
    module.run = lambda: during.append(gc.get_threshold())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "looking_verb", module)
    monkeypatch.setattr(command, "VERBS", {"look": Verb("looking_verb", "run", "Looks.")})
    assert main(["look"]) == 0
    assert during == [(command.COLLECTED, *before[1:])]
    assert gc.get_threshold() == before


def test_help_names_every_verb_with_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, verb in VERBS.items():
        assert any(
            line.split("  ")[1].strip() == name and line.endswith(verb.help) for line in lines if line[:2] == "  "
        )
    assert max(map(len, lines)) <= 100


def test_a_call_without_a_verb_shows_the_help_as_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: llamita VERB")


def test_a_group_lists_its_own_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--help"]) == 0
    out = capsys.readouterr().out
    assert "tokenizer train" in out
    assert "generate" not in out
    assert main(["data"]) == 2
    assert "data show" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"llamita {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["genrate"], "did you mean 'llamita generate'?"),
        (["tokenizer", "trian"], "did you mean 'llamita tokenizer train'?"),
        (["tokenise"], "did you mean 'llamita tokenizer train'?"),
        (["data", "shwo"], "did you mean 'llamita data show'?"),
        (["frobnicate"], "llamita --help lists the verbs"),
        (["--steps", "3"], "expected a verb first, got '--steps'"),
    ],
)
def test_an_unknown_verb_gets_the_closest_in_one_line(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert meant in captured.err


def test_flags_are_the_fields_of_the_dataclass(verb: list[Settings]) -> None:
    arguments = ["greet", "all", "moon", "--data", "d", "--steps", "5", "--momentum", "0.5"]
    assert main(arguments) == 0
    assert verb == [Settings(data=Path("d"), name="moon", steps=5, optimizer=Optimizer(0.5))]


def test_the_help_of_a_verb_explains_its_fields(verb: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["greet", "all", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in (
        "usage: llamita greet all",
        "Greet from prepared data.",
        "--data PATH",
        "Steps in all. (default: 3)",
    ):
        assert expected in out
    assert verb == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--data PATH"),
        (["--data", "d", "--stepz", "3"], "--steps INT"),
        (["--data", "d", "--steps", "three"], "--steps"),
    ],
)
def test_wrong_flags_are_a_short_message(
    verb: list[Settings], arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["greet", "all", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert captured.err.count("\n") <= 12
    assert "Traceback" not in captured.err
    assert verb == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data d --output o --steps 0", "error: steps=0 must be at least 1\n"),
        (
            "train --data d --output o --batch-size 2 --micro-batch-size 3",
            "error: micro_batch_size=3 must not be above",
        ),
        ("tokenizer train t.txt --output o --vocab-size 3", "error: "),
        ("prepare --source text --tokenizer t --output o", "error: "),
        ("generate m text --top-p 7", "error: top_p=7.0 is not allowed; give a number above 0 and at most 1"),
    ],
)
def test_what_a_dataclass_refuses_is_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("value", "error: two lines\n"),
        ("file", "error: No such file or directory: corpus.txt\n"),
        ("plain", "error: no corpus.txt here; write one\n"),
        ("empty", "error: ValueError\n"),
        ("missing", "error: the package 'wandb' is not installed; install it with: pip install wandb\n"),
    ],
)
@pytest.mark.usefixtures("verb")
def test_a_users_mistake_is_one_line_and_status_2(kind: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fail", "--kind", kind]) == 2
    assert capsys.readouterr().err == message


@pytest.mark.usefixtures("verb")
def test_a_variable_asks_for_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="two"):
        main(["fail"])
    with pytest.raises(ModuleNotFoundError):
        main(["fail", "--kind", "missing"])


@pytest.mark.usefixtures("verb")
def test_a_bug_keeps_its_traceback_and_asks_for_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="an invariant broke"):
        main(["fail", "--kind", "bug"])
    assert "please report it" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        main(["fail", "--kind", "ours"])


@pytest.mark.usefixtures("verb")
def test_interrupts_are_quiet_and_a_verb_may_give_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fail", "--kind", "interrupt"]) == 130
    assert main(["fail", "--kind", "status"]) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["info", "tiny", "--json"]])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llamita.cli.main", *arguments], stdout=write, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in (1, 141)  # 1 where rich met the closed pipe first


def test_a_command_that_loaded_triton_ends_without_a_word() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is there on Linux")
    code = "import triton\nfrom llamita.cli.main import main\nmain(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_module_of_the_command_line_is_reached_by_a_verb() -> None:
    modules = {path.stem for path in Path(command.__file__).parent.glob("*.py")}
    modules -= {"__init__", "main", "tuning", "loading", "own_code", "together"}  # what verbs share
    assert {f"llamita.cli.{name}" for name in modules} == {verb.module for verb in VERBS.values()}


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_readable_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: llamita {name} [-h]")
    words = " ".join(out.replace("│", " ").split())
    undocumented = re.findall(
        r"(--[a-z][\w.-]*)(?:, --no-[\w.-]+)?(?: [^ a-z]+| \S+\|\S+)* \((?:default|required)", words
    )
    assert undocumented == [], f"llamita {name}: these fields need a docstring"
