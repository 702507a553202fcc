"""Grading in a process of its own: what a reader's code does to it, the limits, and the commands of `llamita learn`."""

import re
import shutil
import time
from pathlib import Path
from urllib.request import url2pathname

import numpy as np
import pytest
import torch

from llamita.backend.choice import load_backend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.cli.main import main
from llamita.learn import course, track
from llamita.learn.grading import Limits, Mistaken, Result, grade
from llamita.learn.harness import assembled
from llamita.learn.page import page
from llamita.learn.track import solutions_of
from llamita.model.config import ModelConfig
from llamita.storage.formats.checkpoints import to_training_checkpoint
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.model_directory import save_config, save_tensors
from llamita.workflows.convert import Tools

TRACK = track.find("min-llama")
LINE = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"


@pytest.fixture(scope="module")
def tools() -> Tools:
    return Tools(load_backend("torch", device="cpu"), read_pickle, write_pickle)


@pytest.fixture(scope="module")
def model(tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in the course's own form, with an output matrix of its own."""
    path = tmp_path_factory.mktemp("model") / "random.pt"
    config = ModelConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=12, rms_norm_eps=1e-3,
    )  # fmt: skip
    arrays = tools.backend.build_train_step(config, seed=1).weights()
    tools.write_pickle(path, to_training_checkpoint(ForeignModel.in_order(config, arrays), "course"))
    return path


@pytest.fixture(scope="module")
def started(model: Path, tools: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("started") / "course"
    course.start(directory, TRACK, "torch", model, 1, tools)
    return directory


@pytest.fixture
def directory(started: Path, tmp_path: Path) -> Path:
    """A started course of this test's own."""
    return Path(shutil.copytree(started, tmp_path / "course"))


def solve(directory: Path, *changes: tuple[str, str], file: str = "llama.py") -> None:
    text = TRACK.solutions("torch")[file]
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (directory / file).write_text(text, "utf-8")


def test_a_started_course_has_no_solution_in_it(started: Path) -> None:
    solutions = TRACK.solutions("torch")
    assert {path.name for path in started.glob("*.py")} == set(solutions)
    for name, text in TRACK.skeletons("torch").items():
        assert (started / name).read_text("utf-8") == text
        compile(text, name, "exec")
        solved = solutions[name].count("# done")
        assert text.count("raise NotImplementedError") == text.count("# to do:") == solved
        assert "# done" not in text
    assert sum(text.count("# done") for text in solutions.values()) == 10
    assert "softmax(" not in (started / "llama.py").read_text("utf-8")


def test_the_sanity_check_has_the_numbers_that_the_solution_gives(started: Path) -> None:
    """The library's own model computed them; the solution is another program over the same file."""
    files = solutions_of(TRACK.directory, "torch")
    llama = assembled(files, ["llama"]).llama.load_pretrained(str(started / "stories.pt")).eval()
    expected = np.load(started / "sanity_check.npz")
    with torch.no_grad():
        logits, hidden = llama(torch.from_numpy(expected["tokens"]))
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(hidden.numpy(), expected["hidden_states"], atol=1e-5, rtol=1e-4)


def test_a_model_with_another_theta_is_held_too(tools: Tools, tmp_path: Path) -> None:
    """SmolLM2 and Llama 3 turn more slowly than llama2.c; a reader's Llama that leaves theta out is seen."""
    config = ModelConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=12, rope_theta=50.0,
    )  # fmt: skip
    arrays = tools.backend.build_train_step(config, seed=1).weights()
    (tmp_path / "hf").mkdir()
    save_config(tmp_path / "hf", config)
    save_tensors(tmp_path / "hf", arrays)
    course.start(tmp_path / "course", TRACK, "torch", tmp_path / "hf", 1, tools)
    expected = np.load(tmp_path / "course" / "sanity_check.npz")
    files = solutions_of(TRACK.directory, "torch")
    path, text = files["llama"]
    files_without = {
        **files,
        "llama": (path, text.replace(", self.max_seq_len, self.rope_theta)", ", self.max_seq_len)")),
    }
    differences = []
    for sources in (files, files_without):
        llama = assembled(sources, ["llama"]).llama.load_pretrained(str(tmp_path / "course" / "stories.pt")).eval()
        with torch.no_grad():
            hidden = llama(torch.from_numpy(expected["tokens"]))[1].numpy()
        differences.append(np.abs(hidden - expected["hidden_states"]).max())
    assert differences[0] < 1e-5
    assert differences[1] > 1e-3


def test_a_lesson_of_a_started_course_names_its_check_and_its_file(started: Path) -> None:
    for number, lesson in enumerate(TRACK.lessons, 1):
        text = (started / "lessons" / f"{number}-{lesson.name}.md").read_text("utf-8")
        targets = [part.split(")")[0] for part in text.split("](")[1:]]
        targets = [target for target in targets if not target.endswith(".svg")]
        assert targets
        for target in targets:
            assert target.startswith("file://")
            path, lines = target.removeprefix("file://").split("#")
            assert Path(url2pathname(path)).is_file(), target
            assert re.fullmatch(r"L\d+-L\d+", lines)
        assert "**Try.**" in text
        assert f"llamita learn check {lesson.name}" in text
        assert f"`{lesson.file}`" in text or lesson.name == "model"


def test_code_that_ends_its_process_or_never_ends_is_an_error_and_the_rest_is_graded(directory: Path) -> None:
    solve(directory, (LINE, "import os; print('farewell', flush=True); os._exit(7)"))
    first, second = grade(TRACK, "torch", directory, "norm", Limits(seconds=15))
    assert (first.check, first.state) == ("RMSNorm._norm", "error")
    assert first.text == "the code ended its process with status 7; the last it printed: farewell"
    assert (second.check, second.state) == ("RMSNorm.forward", "passed")


@pytest.mark.parametrize(
    ("code", "limits", "text"),
    [
        ("while True: pass", Limits(seconds=0.5), "did not end within 0.5 seconds; is there an endless loop?"),
        (
            "held = []\n        while True: held.append(torch.ones(1 << 22))",
            Limits(seconds=20, memory_bytes=1 << 30),
            "more than 1 GiB of memory",
        ),
        ("while True: print('x' * 10000)", Limits(seconds=20), "it printed more than 16 MiB; the last it printed: xxx"),
    ],
    ids=["time", "memory", "print"],
)
def test_what_takes_too_much_is_ended(code: str, limits: Limits, text: str, directory: Path) -> None:
    solve(directory, (LINE, code))
    began = time.monotonic()
    results = grade(TRACK, "torch", directory, "norm", limits)
    first = next(results)
    results.close()
    assert (first.state, text in first.text) == ("error", True), first
    assert time.monotonic() - began < 60


def test_a_page_has_the_lessons_and_what_was_found() -> None:
    states = {"RMSNorm._norm": Result("norm", "RMSNorm._norm", "error", "NameError: <b>y</b>")}
    wrong = Result("norm", "RMSNorm.forward", "wrong", "x is 1", (Mistaken("the weight is left out", "equation 4"),))
    states[wrong.check] = wrong
    every = [
        states.get(check, Result(lesson.name, check, "passed")) for lesson in TRACK.lessons for check in lesson.checks
    ]
    text = page(TRACK, every, {})
    assert "7 of 8 lessons pass their checks." in text
    assert text.count("<details open>") == 1
    assert text.count("<details>") == 7
    opened = text[text.index("<details open>") :]
    assert opened[: opened.index("</details>")].count("<h1>2. Root mean square normalisation</h1>") == 1
    assert "NameError: &lt;b&gt;y&lt;/b&gt;" in text
    assert "<strong>the weight is left out</strong>; see equation 4" in text
    assert text.count('<li class="passed">') == 10
    assert "<script" not in text
    assert text.count('<a href="file://') == sum(lesson.text.count("](PACKAGE/") for lesson in TRACK.lessons)


@pytest.mark.medium
@pytest.mark.usefixtures("graded_at_once")
def test_the_commands(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.chdir(directory)
    solve(directory, file="rope.py")
    solve(directory, (" / math.sqrt(self.head_dim)", ""))
    assert main(["learn", "check"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok     rotary: apply_rotary_emb"
    at = out.index("WRONG  attention: Attention.compute_query_key_value_scores")
    assert out[at + 1].startswith("       result[0, 0, 1, 0] is ")
    assert out[at + 2 : at + 4] == [
        "       the scale is left out",
        "       see Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1",
    ]
    assert out[out.index("to do  optimizer: AdamW.step") + 1] == "       not yet written"
    assert out[-1] == "8 of 12 checks pass"
    assert main(["learn", "next"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# 3. Attention")
    assert "the scale is left out" in out
    assert main(["learn", "show", "norm"]) == 0
    assert capsys.readouterr().out.startswith("# 2. Root mean square")
    assert main(["learn", "show", "norm", "--solution"]) == 0
    assert LINE in capsys.readouterr().out
    assert main(["learn", "tracks"]) == 0
    assert "min-llama  A small Llama in PyTorch" in capsys.readouterr().out


@pytest.mark.usefixtures("graded_at_once")
def test_a_lesson_that_passes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve(directory, file="rope.py")
    assert main(["learn", "check", "rotary", "--directory", str(directory)]) == 0
    assert capsys.readouterr().out == "ok     rotary: apply_rotary_emb\n1 of 1 checks pass\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "is no course: it has no course.json; llamita learn start DIR begins one"),
        (["start", "new", "--track", "max"], "there is no track 'max'; choose one of adapters, "),
        (["start", "new", "--framework", "jax"], "min-llama is there for torch, not for 'jax'"),
        (["start", "new", "--model-steps", "0"], "model_steps=0 must be at least 1"),
        (["start", "."], "exists"),
    ],
)
@pytest.mark.usefixtures("graded_at_once")
def test_mistakes_in_the_commands(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["learn", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lesson_that_there_is_not(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "check", "swimming", "--directory", str(started)]) != 0
    assert "there is no lesson 'swimming'; choose one of rotary, norm, attention" in capsys.readouterr().err
