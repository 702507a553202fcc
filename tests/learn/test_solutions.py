"""min-llama's solutions against other people's code: PyTorch, transformers, complex numbers in numpy's float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llamita.backend.choice import load_backend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.learn import track
from llamita.learn.harness import assembled, installed
from llamita.learn.track import solutions_of, sources_of
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows.convert import ConvertConfig, Tools, convert

TRACK = track.find("min-llama")
FILES = solutions_of(TRACK.directory, "torch")


@pytest.fixture(scope="module")
def solutions() -> SimpleNamespace:
    return assembled(FILES, ["rope", "llama", "optimizer", "classifier", "config", "run_llama", "utils"])


@pytest.fixture(scope="module")
def checks() -> SimpleNamespace:
    return assembled(sources_of([TRACK.directory / "checks.py"]), ["checks"]).checks


@contextmanager
def importable() -> Iterator[None]:
    with installed(FILES):
        yield


def test_the_lessons_name_the_checks_that_there_are(checks: Any) -> None:
    named = [name for lesson in TRACK.lessons for name in lesson.checks]
    assert named == [check.name for check in checks.CHECKS]


def test_rotary_is_a_product_with_complex_numbers(solutions: Any) -> None:
    generator = np.random.default_rng(0)
    query, key = generator.normal(size=(2, 7, 4, 10)), generator.normal(size=(2, 7, 2, 10))
    got = solutions.rope.apply_rotary_emb(torch.tensor(query), torch.tensor(key), 10, 16, theta=300.0)
    turn = np.exp(1j * np.arange(7)[:, None] * 300.0 ** (-np.arange(0, 10, 2) / 10))[None, :, None, :]
    for x, result in zip((query, key), got, strict=True):
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        assert result.dtype == torch.float64
        expected = np.stack((turned.real, turned.imag), -1).reshape(x.shape)
        np.testing.assert_allclose(result.numpy(), expected, atol=2e-5)


def test_attention_and_norm_are_pytorchs(solutions: Any) -> None:
    config = solutions.config.LlamaConfig(vocab_size=9, dim=24, n_layers=1, n_heads=4, n_kv_heads=2, max_seq_len=8)
    attention = solutions.llama.Attention(config)
    query, key, value = torch.randn(3, 2, 4, 5, 6)
    got = attention.compute_query_key_value_scores(query, key, value)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(got, expected)
    norm, x = solutions.llama.RMSNorm(24, eps=0.1), torch.randn(2, 5, 24)
    norm.weight.data = torch.randn(24)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (24,), norm.weight, 0.1))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_gives_the_logits_of_transformers(tied: bool, solutions: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16}
    torch.manual_seed(0)
    model = solutions.llama.Llama(solutions.config.LlamaConfig(**sizes, hidden_dim=40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    state = model.state_dict()
    if not tied:
        state["output.weight"] = torch.randn(17, 24)
    torch.save({"model_args": {**sizes, "hidden_dim": 40}, "model": state}, tmp_path / "model.pt")
    with importable():
        model = solutions.llama.load_pretrained(str(tmp_path / "model.pt")).eval()
    tools = Tools(load_backend("torch", device="cpu"), read_pickle, write_pickle)
    convert(tmp_path / "model.pt", tmp_path / "hf", ConvertConfig(), tools)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.randint(17, (3, 9))
    with torch.no_grad():
        logits, hidden = model(tokens, targets=tokens)
        last, _ = model(tokens)
        expected = reference(tokens, output_hidden_states=True)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, logits[:, -1:])


def test_a_checkpoint_of_llama2c_has_other_names(solutions: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 9, "dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 8, "norm_eps": 1e-3}
    model = solutions.llama.Llama(solutions.config.LlamaConfig.from_arguments(sizes))
    names = {"compute_query": "wq", "compute_key": "wk", "compute_value": "wv", "compute_output": "wo"}
    state = {}
    for name, tensor in model.state_dict().items():
        state["_orig_mod." + ".".join(names.get(part, part) for part in name.split("."))] = tensor
    torch.save({"model_args": sizes, "model": state}, tmp_path / "stories.pt")
    again = solutions.llama.load_pretrained(str(tmp_path / "stories.pt"))
    assert again.norm.eps == 1e-3
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, atol=0, rtol=0)


def test_adamw_is_pytorchs_where_epsilon_does_not_matter(solutions: Any) -> None:
    mine, other = (torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2))
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-12}
    optimizer = solutions.optimizer.AdamW([mine], weight_decay=0.0, **options)
    reference = torch.optim.AdamW([other], weight_decay=0.0, **options)
    for step in range(20):
        mine.grad = torch.sin(torch.arange(12.0) * (step + 1)).view(3, 4)
        other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_adamw_is_the_papers_formula(checks: Any, solutions: Any) -> None:
    """The efficient form with decay after the update, in float64."""
    got = checks.adamw(solutions, solutions)
    for corrected in (True, False):
        weights = [checks.numbers(seed, 3, 4).double().numpy() for seed in (1, 2, 3)]
        means = [(np.zeros((3, 4)), np.zeros((3, 4))) for _ in range(2)]
        for step in range(6):
            for number in range(2):
                gradient = checks.numbers(10 * step + number, 3, 4).double().numpy()
                m, v = means[number]
                m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
                means[number] = m, v
                rate = 0.05 * np.sqrt(1 - 0.95 ** (step + 1)) / (1 - 0.8 ** (step + 1)) if corrected else 0.05
                weights[number] = (weights[number] - rate * m / (np.sqrt(v) + 0.01)) * (1 - 0.05 * 0.3)
        name = "weights after step 6" + ("" if corrected else " without correct_bias")
        np.testing.assert_allclose(got[name], np.stack(weights), atol=1e-6)


def test_sampled_shares_are_the_softmaxs(checks: Any, solutions: Any) -> None:
    got = checks.sampled(solutions, solutions)
    table = 1.5 * checks.numbers(3, 6, 6).double().numpy()[:3]
    for temperature in (0.5, 1.0, 2.0):
        weights = np.exp(table / temperature)
        shares = got[f"share of each token after tokens 0, 1 and 2 at temperature {temperature}"]
        np.testing.assert_allclose(shares, weights / weights.sum(-1, keepdims=True), atol=0.015)


@pytest.mark.parametrize(
    ("script", "line"),
    [("rope_test.py", "Rotary embedding test passed!"), ("optimizer_test.py", "Optimizer test passed!")],
)
def test_the_readers_scripts_pass_solutions_and_refuse_skeletons(script: str, line: str) -> None:
    names = {"rope_test.py": "rope", "optimizer_test.py": "optimizer"}
    with importable():
        code = compile(FILES[script.removesuffix(".py")][1], script, "exec")
        printed: list[str] = []
        exec(code, {"__name__": "__main__", "print": printed.append})
    assert printed == [line]
    unsolved = {**FILES, names[script]: (Path(script), TRACK.skeletons("torch")[f"{names[script]}.py"])}
    with installed(unsolved), pytest.raises(NotImplementedError):
        exec(code, {"__name__": "__main__"})
    wrong = FILES[names[script]][1].replace("theta ** (-pairs", "theta ** (pairs").replace("lr * weight_decay", "0.0")
    with installed({**unsolved, names[script]: (Path(script), wrong)}), pytest.raises(AssertionError):
        exec(code, {"__name__": "__main__"})


def test_the_finished_program_writes_asks_and_learns(
    solutions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two classes that differ in their last word alone, texts of different lengths: the head must learn them."""
    train_bpe_from_iterator(("a good film", "a bad film"), 260).save(tmp_path)
    sizes = {"vocab_size": 260, "dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 128}
    torch.manual_seed(0)
    state = solutions.llama.Llama(solutions.config.LlamaConfig(**sizes, hidden_dim=24)).state_dict()
    torch.save({"model_args": {**sizes, "hidden_dim": 24}, "model": state}, tmp_path / "stories.pt")
    words = ("bad", "good")
    lines = [f"{number % 2} ||| {'very ' * (number % 5)}{words[number % 2]}\n" for number in range(20)]
    (tmp_path / "t.txt").write_text("".join(lines))
    (tmp_path / "names.json").write_text('["bad", "good"]')
    monkeypatch.chdir(tmp_path)
    data = ["--train", "t.txt", "--dev", "t.txt", "--test", "t.txt"]

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["run_llama.py", *arguments])
        with importable():
            solutions.run_llama.main()
        return capsys.readouterr().out

    assert "temperature 1.0:" in run("--prefix", "a good", "--max_new_tokens", "3")
    assert Path("generated-sentence-temp-0.txt").read_text("utf-8").startswith("a good")
    assert "test accuracy: " in run("--option", "prompt", *data, "--label-names", "names.json")
    assert "very bad Is this movie bad or good? This movie is" in Path("cfimdb-dev-prompting-output.txt").read_text(
        "utf-8"
    )
    assert "dev accuracy: 1.000" in run(
        "--option",
        "finetune",
        *data,
        "--epochs",
        "12",
        "--lr",
        "1e-2",
        "--hidden_dropout_prob",
        "0",
        "--test_out",
        "test.txt",
    )
    assert Path("test.txt").read_text("utf-8") == "".join(lines)
