"""The serving track as a folder: lessons, figures, skeletons, the two frameworks side by side, and run.py."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from llamita.backend.choice import load_backend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.cli.main import main
from llamita.data import meadow
from llamita.learn import course
from llamita.learn.figures import drawings
from llamita.learn.harness import assembled
from llamita.learn.track import solutions_of, sources_of
from llamita.model.config import ModelConfig
from llamita.model.parameters import parameter_table
from llamita.model.presets import preset
from llamita.storage.model_directory import save_config, save_tensors
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows.convert import Tools
from tests.learn.serving import FRAMEWORKS, GIVEN, TRACK, importable, solutions

DRAWN = assembled(sources_of([TRACK.directory / "figures.py"]), ["figures"]).figures
FIGURES = drawings(TRACK.directory)


@pytest.mark.parametrize("lesson", TRACK.lessons, ids=lambda lesson: lesson.name)
def test_a_lesson_has_its_parts(lesson: Any) -> None:
    for part in ("**The idea.**", "**The exercise.**", "**The check.**", "**In Llamita.**", "**Try.**"):
        assert lesson.text.count(part) == 1, part
    assert f"llamita learn check {lesson.name}\n" in lesson.text
    assert f"`{lesson.file}`" in lesson.text
    number = TRACK.lessons.index(lesson) + 1
    assert lesson.text.startswith(f"# {number}. {lesson.title}\n")
    assert f"]({lesson.name}.svg)" in lesson.text
    for check in lesson.checks:
        assert check == "Model, with all parts your own" or check.split(".")[-1] in lesson.text, check


def test_each_lesson_has_a_figure() -> None:
    assert set(FIGURES) == {lesson.name for lesson in TRACK.lessons}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn(name: str) -> None:
    figure = Figure(figsize=(7, 4))
    FIGURES[name](figure)
    assert figure.axes
    for axes in figure.axes:
        assert axes.has_data()
        assert axes.get_xlabel() or axes.get_ylabel()


def test_the_parameters_in_a_figure_are_those_of_the_table() -> None:
    presets = {"Qwen2 0.5B": "qwen2-0.5b", "Qwen3 0.6B": "qwen3-0.6b", "Llama 3.2 1B": "llama-3.2-1b"}
    presets["Llama 2 7B"] = "llama-2-7b"
    for shape in DRAWN.SHAPES:
        table = parameter_table(preset(presets[shape.name]))
        matrices = [row for row in table if len(row.shape) == 2]
        assert DRAWN.matrices(shape) == {
            row.name.split(".")[-2]: row.shape for row in matrices if row.name.startswith("model.layers.0.")
        }
        assert DRAWN.parameters(shape) == {
            "embeddings": table[0].size,
            "attention": sum(row.size for row in matrices if ".self_attn." in row.name),
            "feed-forward": sum(row.size for row in matrices if ".mlp." in row.name),
            "lm_head": sum(row.size for row in matrices if row.name == "lm_head.weight"),
            "norms and biases": sum(row.size for row in table if len(row.shape) == 1),
        }


@pytest.mark.parametrize(("prompt", "new", "chunk"), [(10, 4, 10), (10, 4, 4), (8, 1, 4)])
def test_the_calls_in_a_figure_are_those_of_the_solution(prompt: int, new: int, chunk: int) -> None:
    course, spans = solutions("torch"), []

    def model(tokens: torch.Tensor, caches: Any) -> torch.Tensor:
        first = spans[-1][1] if spans else 0
        spans.append((first, first + tokens.shape[1]))
        return torch.zeros(1, tokens.shape[1], 3)

    course.generate.generate(model, [1] * prompt, [], course.sampler.make_sampler(0.0), new, chunk=chunk)
    assert DRAWN.calls(prompt, new, chunk) == spans


def test_the_pages_in_a_figure_are_those_of_the_solution() -> None:
    pool = SimpleNamespace(page_size=2, hold=lambda page: None)
    cache, count = solutions("torch").prefix_cache.PrefixCache(pool), 0
    texts = [list("abcdefghi"), list("abcdefghjk"), list("abxycdef")]
    drawn = DRAWN.prefix_pages(texts, 2).values()
    for number, text in enumerate(texts):
        pages = cache.match(text)
        needed = -(-len(text) // 2) - len(pages)
        pages += range(count, count + needed)
        count += needed
        cache.insert(text, pages)
        assert [page for page, users in drawn if number in users] == pages


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_skeleton_has_no_solution_in_it(framework: str) -> None:
    files = TRACK.solutions(framework)
    assert {lesson.file for lesson in TRACK.lessons} == set(files) - {f"{name}.py" for name in (*GIVEN, "config")}
    for name, text in TRACK.skeletons(framework).items():
        compile(text, name, "exec")
        assert "# done" not in text
        assert text.count("raise NotImplementedError") == text.count("# to do:") == files[name].count("# done")


def test_both_frameworks_have_the_same_names_arguments_and_docstrings() -> None:
    first, second = (TRACK.solutions(framework) for framework in FRAMEWORKS)
    assert set(first) == set(second)
    for name in first:
        assert outline(first[name]) == outline(second[name]), name
    for name in ("config.py", "prefix_cache.py"):  # there are no arrays in these
        assert first[name] == second[name]


def outline(text: str) -> list[tuple[str, list[str], str]]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            arguments = [argument.arg for argument in node.args.args] if isinstance(node, ast.FunctionDef) else []
            found.append((node.name, arguments, ast.get_docstring(node) or ""))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 300 tokens with a tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "random"
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    arrays = load_backend("torch", device="cpu").build_train_step(config, seed=1).weights()
    directory.mkdir()
    save_config(directory, config)
    save_tensors(directory, arrays)
    train_bpe_from_iterator(meadow.corpus(0, 30, "train"), 300).save(directory)
    return directory


@pytest.fixture(scope="module", params=FRAMEWORKS)
def started(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    solutions(request.param)  # skips where the framework is not there
    directory = tmp_path_factory.mktemp("started") / request.param
    tools = Tools(load_backend("torch", device="cpu"), read_pickle, write_pickle)
    course.start(directory, TRACK, request.param, model, 1, tools)
    return directory


def test_run_writes_the_same_by_every_way(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with importable(started.name):
        sources = solutions_of(TRACK.directory, started.name)
        run = assembled({name: (started / path.name, text) for name, (path, text) in sources.items()}, ["run"]).run
        options = ["--prompt", "a fox and a crow and a fox", "--max-tokens", "7", "--model", str(started / "model")]
        expected = run.main(options)
        assert len(expected) == 1
        assert expected[0].startswith("a fox and a crow and a fox")
        assert len(expected[0]) > len("a fox and a crow and a fox")
        for way in (["--without-cache"], ["--paged"], ["--chunk", "2"], ["--draft", str(started / "model")]):
            assert run.main([*options, *way]) == expected, way
        again = [*options, "--prompt", "a fox and a crow and a fox"]
        for way in ([], ["--paged"], ["--batch-size", "1"], ["--prefix"]):
            assert run.main([*again, *way]) == expected * 2, way
        assert "16 of " in capsys.readouterr().out
        sampled = [run.main([*options, "--temperature", "1", "--seed", seed]) for seed in ("1", "1", "2")]
        assert sampled[0] == sampled[1] != sampled[2]
        assert run.main([*options, "--bits", "8"])[0].startswith("a fox")


def test_run_refuses_a_draft_at_a_temperature(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with importable(started.name):
        run = assembled(solutions_of(TRACK.directory, started.name), ["run"]).run
        with pytest.raises(SystemExit) as stop:
            run.main(["--prompt", "a fox", "--draft", str(started / "model"), "--temperature", "0.5"])
    assert str(stop.value) == (
        "run.py: --draft writes at temperature 0 only: leave out --temperature, or leave out --draft"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.medium
def test_the_commands(started: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(started)
    text = TRACK.solutions(started.name)["basics.py"]
    (started / "basics.py").write_text(text.replace("y + bias", "y - bias"), "utf-8")
    assert main(["learn", "check", "basics"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok     basics: softmax"
    assert out[1] == "WRONG  basics: linear"
    assert out[3] == "       the bias is subtracted"
    assert out[-1] == "2 of 3 checks pass"
    assert main(["learn", "next"]) == 0
    assert capsys.readouterr().out.startswith("# 1. Softmax, a linear layer, SiLU")
