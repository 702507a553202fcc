"""The numpy track's solutions against other people's code: PyTorch, transformers, safetensors, the float64 oracle."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from llamita.backend.choice import load_backend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.cli.main import main
from llamita.learn import course
from llamita.learn.harness import assembled, installed
from llamita.model.config import ModelConfig
from llamita.storage import model_directory
from llamita.storage.formats.foreign import ForeignModel
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows.convert import Tools
from tests import reference
from tests.learn.graded import Graded

NUMPY = Graded("numpy", "numpy")


@pytest.fixture(scope="module")
def solutions() -> SimpleNamespace:
    return assembled(NUMPY.files(), sorted(NUMPY.files().keys() - {"run", "train"}))


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def test_functions_are_pytorchs(solutions: Any) -> None:
    functions, x, weight = solutions.functions, 20 * random(1, 3, 4, 6), random(2, 5, 6)
    (t, w) = tensors(x, weight)
    np.testing.assert_allclose(functions.softmax(x), t.softmax(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(functions.linear(x, weight), F.linear(t, w), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(functions.silu(x / 4), F.silu(t / 4), rtol=1e-5, atol=1e-6)
    tokens = np.array([[0, 4], [2, 2]])
    np.testing.assert_array_equal(functions.embedding(tokens, weight), F.embedding(torch.from_numpy(tokens), w))
    expected = F.rms_norm(t, (6,), w[0], 0.1)
    np.testing.assert_allclose(functions.rms_norm(x, weight[0], 0.1), expected, rtol=1e-5, atol=1e-6)


def test_float32_stays_float32_and_arguments_stay_as_they_were(solutions: Any) -> None:
    x, weight, functions = random(1, 3, 6), random(2, 6), solutions.functions
    given = x.copy()
    mask = solutions.attention.causal_mask(3, 3)
    results = (
        functions.softmax(given), functions.linear(given, given), functions.silu(given),
        functions.rms_norm(given, weight, 0.1), solutions.attention.attention(given, given, given),
        solutions.attention.attention(given, given, given, mask),
    )  # fmt: skip
    assert [result.dtype for result in results] == [np.float32] * 6
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(given, x)


def test_rotary_is_the_oracles_and_one_layout_is_the_other_reordered(solutions: Any) -> None:
    x, positions = random(1, 7, 10), np.arange(3, 10)
    turn = solutions.rope.angles(positions, 10, 300.0)
    frequencies = [300.0 ** (-2 * pair / 10) for pair in range(5)]
    expected = reference.rope(x.astype(np.float64), positions, frequencies)
    halves = solutions.rope.rotate_halves(x, turn)
    assert halves.dtype == np.float32
    np.testing.assert_allclose(halves, expected, atol=1e-6)
    order = np.concatenate((np.arange(0, 10, 2), np.arange(1, 10, 2)))
    neighbours = solutions.rope.rotate_neighbours(x, turn)
    np.testing.assert_array_equal(neighbours[:, order], solutions.rope.rotate_halves(x[:, order], turn))


@pytest.mark.parametrize(("T", "S"), [(5, 5), (3, 8), (1, 4)])
def test_attention_is_pytorchs(T: int, S: int, solutions: Any) -> None:
    mask = solutions.attention.causal_mask(T, S)
    np.testing.assert_array_equal(mask, torch.ones(T, S, dtype=torch.bool).tril(S - T))
    query, key, value = random(1, 2, 6, T, 8), random(2, 2, 3, S, 8), random(3, 2, 3, S, 8)
    q, k, v, m = tensors(query, key, value, mask)
    for chosen in (None, mask):
        expected = F.scaled_dot_product_attention(q, k, v, None if chosen is None else m, enable_gqa=True)
        got = solutions.attention.grouped_attention(query, key, value, chosen)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        alone = solutions.attention.attention(query[:, :3], key, value, chosen)
        expected = F.scaled_dot_product_attention(q[:, :3], k, v, None if chosen is None else m)
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)


def test_weights_are_what_safetensors_wrote(solutions: Any, tmp_path: Path) -> None:
    given = {"b": torch.randn(3, 5), "a": torch.randn(2, 2, 2).bfloat16(), "c": torch.randn(7).half()}
    given["d"] = torch.tensor([0.0, -0.0, float("inf"), 3e38, 1e-40]).bfloat16()
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    got = solutions.weights.read_weights(tmp_path)
    assert got.keys() == given.keys()
    for name, tensor in given.items():
        assert got[name].dtype == np.float32
        np.testing.assert_array_equal(got[name], tensor.float().numpy())
    save_file({"ids": torch.arange(3)}, tmp_path / "ids.safetensors")
    with pytest.raises(ValueError, match="expected F32, F16 or BF16, got I64"):
        solutions.weights.read_safetensors(tmp_path / "ids.safetensors")


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_model_gives_the_logits_and_tokens_of_transformers(
    tied: bool, dtype: torch.dtype, solutions: Any, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_theta=300.0, rms_norm_eps=1e-3, tie_word_embeddings=tied,
        max_position_embeddings=64,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.4)
    made.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(31, size=(2, 9))
    own = solutions.config.read_config(tmp_path)
    weights = solutions.weights.read_weights(tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = solutions.llama.forward(own, weights, tokens)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    oracle = [reference.forward(model_directory.load_config(tmp_path), weights, row)["logits"] for row in tokens]
    np.testing.assert_allclose(logits, oracle, rtol=1e-4, atol=1e-4)
    caches = [solutions.cache.KeyValueCache(2, 2, 9, 8) for _ in range(3)]
    parts = [solutions.llama.forward(own, weights, part, caches) for part in np.split(tokens, [4, 5, 6], axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), logits, rtol=1e-4, atol=1e-4)
    prompt = torch.from_numpy(tokens[:1])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 9:].tolist()
    choose = lambda logits: int(solutions.generate.greedy(logits))  # noqa: E731
    assert list(solutions.generate.generate(own, weights, tokens[0].tolist(), 12, choose)) == greedy
    stop = greedy.index(greedy[5])
    stopped = solutions.generate.generate(own, weights, tokens[0].tolist(), 12, choose, stop={greedy[5]})
    assert list(stopped) == greedy[:stop]


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "qwen3"},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"attention_bias": True},
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused(changed: dict[str, Any], solutions: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = solutions.config.read_config(tmp_path)
    assert (read.num_key_value_heads, read.head_dim, read.rope_theta, read.tie_word_embeddings) == (2, 4, 1e4, False)
    (tmp_path / "config.json").write_text(json.dumps(content | changed))
    with pytest.raises(ValueError, match="expected a Llama without biases and without scaled rotary positions"):
        solutions.config.read_config(tmp_path)


def test_sampling_draws_by_the_softmax(solutions: Any) -> None:
    logits, number = 2 * random(1, 7), np.random.default_rng(2).random(40000)
    drawn = solutions.generate.sample(np.broadcast_to(logits, (40000, 7)), 0.7, number)
    expected = torch.from_numpy(logits / 0.7).softmax(-1)
    np.testing.assert_allclose(np.bincount(drawn, minlength=7) / 40000, expected, atol=0.01)
    assert solutions.generate.sample(np.array([-np.inf, 0.0, -np.inf]), 1.0, np.array(1 - 1e-9)) == 1


def test_losses_and_gradients_are_autograds(solutions: Any) -> None:
    tokens, labels = np.array([1, 4, 4, 0, 2]), np.array([3, -100, 6, 0, 6])
    table, weight = random(1, 6, 5), random(2, 7, 5)
    t, w = (tensor.requires_grad_() for tensor in tensors(table, weight))
    x = F.embedding(torch.from_numpy(tokens), t)
    x.retain_grad()
    logits = F.linear(x, w)
    logits.retain_grad()
    loss = F.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    given = logits.detach().numpy()
    assert solutions.loss.cross_entropy(given, labels) == pytest.approx(float(loss.detach()), rel=1e-5)
    by_logits = solutions.loss.cross_entropy_gradient(given, labels)
    by_x, by_weight = solutions.loss.linear_gradients(x.detach().numpy(), weight, by_logits)
    by_table = solutions.loss.embedding_gradient(tokens, 6, by_x)
    for got, tensor in ((by_logits, logits), (by_x, x), (by_weight, w), (by_table, t)):
        np.testing.assert_allclose(got, tensor.grad, rtol=1e-4, atol=1e-6)


def test_adamw_is_pytorchs(solutions: Any) -> None:
    given = {"a": random(1, 3, 4), "b": random(2, 5)}
    others = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in given.values()]
    optimizer = solutions.optimizer.AdamW(given, lr=0.05, betas=(0.8, 0.95), eps=0.01, weight_decay=0.3)
    expected = torch.optim.AdamW(others, lr=0.05, betas=(0.8, 0.95), eps=0.01, weight_decay=0.3)
    for step in range(20):
        gradients = {name: random(step, *array.shape) for name, array in given.items()}
        for parameter, gradient in zip(others, gradients.values(), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step(gradients)
        expected.step()
    for array, parameter in zip(given.values(), others, strict=True):
        np.testing.assert_allclose(array, parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course over a random model with a tokenizer."""
    path = tmp_path_factory.mktemp("numpy")
    tools = Tools(load_backend("torch", device="cpu"), read_pickle, write_pickle)
    tokenizer = train_bpe_from_iterator(["one rainy morning the river was wide", "one sunny evening"] * 2, 270)
    config = ModelConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    arrays = tools.backend.build_train_step(config, seed=1).weights()
    model = ForeignModel.in_order(config, arrays)
    (path / "source").mkdir()
    model_directory.save_config(path / "source", config)
    model_directory.save_tensors(path / "source", model.arrays)
    tokenizer.save(path / "source")
    course.start(path / "course", NUMPY.track, "numpy", path / "source", 1, tools)
    return path / "course"


def test_the_program_writes_what_llamita_writes(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(started)
    assert main(["generate", "model", "one rainy", "--temperature", "0", "--max-tokens", "20"]) == 0
    expected = capsys.readouterr().out.strip()
    monkeypatch.setattr("sys.argv", ["run.py", "--prompt", "one rainy", "--tokens", "20"])
    with installed(NUMPY.files()):
        assembled(NUMPY.files(), ["run"]).run.main()
    out = capsys.readouterr().out
    assert out[: out.rindex("\n\n")].strip() == expected
    assert " tokens, " in out.splitlines()[-1]


def test_the_training_program_comes_near_the_least_loss(
    started: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(started)
    train = assembled(NUMPY.files(), ["train"]).train
    train.STEPS = 200
    train.main()
    lines = capsys.readouterr().out.splitlines()
    least, first, last = (float(lines[number].split()[-1]) for number in (0, 1, -1))
    assert first == pytest.approx(np.log(256), abs=0.1)
    assert least < last < least + 0.4


def test_no_framework_is_imported_where_the_numpy_track_is_graded(tmp_path: Path) -> None:
    for name, text in NUMPY.solutions.items():
        (tmp_path / name).write_text(text, "utf-8")
    arguments = [str(NUMPY.track.directory), "numpy", str(tmp_path), str(tmp_path / "events"), *NUMPY.grader.checks]
    code = (
        "import sys; from llamita.learn.harness import main; main(sys.argv[1:])\n"
        "print(sorted({'torch', 'mlx', 'safetensors', 'tokenizers'} & set(sys.modules)), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"
    assert (tmp_path / "events").read_text().count('"state": "passed"') == len(NUMPY.grader.checks)


@pytest.mark.parametrize("graded", [NUMPY, Graded("adapters", "torch")], ids=["numpy", "adapters"])
def test_lessons_have_checks_and_figures(graded: Graded) -> None:
    named = [name for lesson in graded.track.lessons for name in lesson.checks]
    assert named == list(graded.grader.checks)
    figures = graded.module("figures").FIGURES
    shown = set()
    for lesson in graded.track.lessons:
        for part in ("**The idea.**", "**The exercise.**", "**The check.**", "**In Llamita.**", "**Try.**"):
            assert part in lesson.text, (lesson.name, part)
        assert f"llamita learn check {lesson.name}" in lesson.text
        assert f"`{lesson.file}`" in lesson.text
        if f"]({lesson.name}.svg)" in lesson.text:
            shown.add(lesson.name)
    assert shown == set(figures)
    assert 2 * len(shown) >= len(graded.track.lessons)


@pytest.mark.parametrize("name", sorted(NUMPY.module("figures").FIGURES))
def test_figures_can_be_drawn(name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    NUMPY.module("figures").FIGURES[name](figure)
    assert all(axes.has_data() for axes in figure.axes)
