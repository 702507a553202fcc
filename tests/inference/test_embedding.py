"""Vectors of texts, held to the last hidden states of transformers, each text by itself."""

import numpy as np
import pytest
import torch

from llamita.inference import embedding
from llamita.inference.embedding import embed
from llamita.inference.llm import LLM
from tests import reference
from tests.backend.adapters import CONFIG, EVERYTHING, fresh, summed
from tests.backend.models import perturbed, small
from tests.backend.torch.model.test_families import made_by_transformers
from tests.inference.test_adapters import adapter_of

LENGTHS = (7, 1, 40, 12, 40, 3)


def texts(vocab_size: int) -> list[list[int]]:
    random = np.random.default_rng(4)
    return [random.integers(vocab_size, size=length).tolist() for length in LENGTHS]


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("family", ["qwen 3", "gemma 2"])
def test_vectors_are_pooled_from_the_last_hidden_states_of_transformers(framework, family, tmp_path) -> None:
    """Past the window of 32 that some layers have."""
    theirs, _ = made_by_transformers(family, tmp_path)
    runner, rows = framework.backend.load_runner(tmp_path / "theirs", device="cpu"), texts(1000)
    with torch.no_grad():
        states = [theirs.model(torch.tensor([row])).last_hidden_state[0].numpy() for row in rows]
    expected = {"mean": [state.mean(0) for state in states], "last": [state[-1] for state in states]}
    for pooling, vectors in expected.items():
        found = embed(runner, rows, pooling, normalize=False)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.stack(vectors), atol=1e-4 * np.abs(vectors).max())


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_does_not_depend_on_what_runs_beside_it(framework, monkeypatch, pooling) -> None:
    config = small()
    runner, rows = framework.runner_over(config, perturbed(config)), texts(97)
    together = embed(runner, rows, pooling)
    np.testing.assert_allclose(together, unit(embed(runner, rows, pooling, normalize=False)), atol=1e-6)
    np.testing.assert_allclose(together, np.concatenate([embed(runner, [row], pooling) for row in rows]), atol=1e-6)
    shapes, forward = [], runner.forward

    def counted(tokens_BT, *more, **options):
        shapes.append(tokens_BT.shape)
        assert options["logits"] == "none"
        return forward(tokens_BT, *more, **options)

    monkeypatch.setattr(runner, "forward", counted)
    monkeypatch.setattr(embedding, "MAX_TOKENS", 41)
    np.testing.assert_allclose(embed(runner, rows, pooling), together, atol=1e-6)
    assert shapes == [(3, 7), (1, 12), (1, 40), (1, 40)]


def test_an_adapter_changes_vectors_as_its_sum_does(framework) -> None:
    arrays, adapter = fresh(CONFIG), adapter_of(CONFIG, EVERYTHING, 3)
    runner = framework.runner_of(framework.build_model(CONFIG, arrays), adapters={"a": adapter})
    values = summed({name: array.to_numpy() for name, array in arrays.items()}, adapter)
    states = reference.forward(CONFIG, values, [4, 8, 15])["norm"]
    np.testing.assert_allclose(embed(runner, [[4, 8, 15]], adapter="a"), unit(states.mean(0))[None], atol=1e-5)
    assert np.abs(embed(runner, [[4, 8, 15]]) - embed(runner, [[4, 8, 15]], adapter="a")).max() > 1e-2


def test_texts_of_a_model_with_a_tokenizer(framework, tiny_model, tokenizer) -> None:
    llm = LLM(framework.backend.load_runner(tiny_model, device="cpu"), tokenizer)
    found = llm.embed(["The fox", "The owl"], pooling="last")
    assert found.shape == (2, 32)
    np.testing.assert_allclose(found[:1], llm.embed("The fox", "last"), atol=1e-6)
    np.testing.assert_allclose(found[1:], llm.embed(tokenizer.encode("The owl", bos=True), "last"), atol=1e-6)
    assert llm.embed([]).shape == (0, 32)


def test_what_has_no_vector_is_refused_in_one_line(framework) -> None:
    config = small()
    runner = framework.runner_over(config, perturbed(config))
    with pytest.raises(ValueError, match="text 1 has 0 tokens and must have 1 to 64, the model's positions"):
        embed(runner, [[1], []])
    with pytest.raises(ValueError, match="text 0 has 65 tokens and must have 1 to 64"):
        embed(runner, [[1] * 65])
    with pytest.raises(ValueError, match="pooling='max' must be one of mean, last"):
        embed(runner, [[1]], "max")
    with pytest.raises(ValueError, match="token id 97 is not one of this model's"):
        embed(runner, [[97]])
    framework.set_values(runner.model, "model.norm.weight", np.full(config.hidden_size, np.nan, np.float32))
    with pytest.raises(ValueError, match="states are not finite"):
        embed(runner, [[1]])
