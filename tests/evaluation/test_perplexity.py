"""Losses over text against the oracle: every target once, whatever the windows and batches."""

import math

import numpy as np
import pytest

from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import weights
from llamita.evaluation import perplexity
from llamita.model.presets import preset
from tests import reference

CONFIG = preset("tiny", vocab_size=61, hidden_size=32, num_hidden_layers=2, max_position_embeddings=16)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner(weights.build_model(CONFIG, seed=3).eval())


@pytest.fixture(scope="module")
def log_probabilities(runner):
    """The oracle's log-probability of each token but the first of a context."""
    arrays = {name: array.to_numpy() for name, array in weights.to_host_arrays(runner.model).items()}

    def score(tokens):
        logits = reference.forward(CONFIG, arrays, tokens)["logits"][:-1]
        return np.log(reference.softmax(logits))[np.arange(len(tokens) - 1), tokens[1:]], logits.argmax(axis=-1)

    return score


def sequences(*lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(0, CONFIG.vocab_size, length) for length in lengths]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_each_sequence_alone(runner, log_probabilities, batch_size, monkeypatch):
    texts = sequences(5, 12, 1, 2, 16, 7)
    for limit in (2**25, 16 * CONFIG.vocab_size):
        monkeypatch.setattr(perplexity, "MAX_LOGITS", limit)
        scored = list(perplexity.score_sequences(runner, texts, CONFIG.vocab_size, batch_size))
        assert len(scored) == len(texts)
        for scores, tokens in zip(scored, texts, strict=True):
            expected, likeliest = log_probabilities(tokens)
            np.testing.assert_allclose(scores.log_probabilities_T, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(scores.likeliest_T, likeliest)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_every_target_counts_once_with_the_context_that_the_stride_gives(runner, log_probabilities, stride):
    (tokens,) = sequences(30)
    length = 8
    expected, done = 0.0, 1
    while done < len(tokens):
        end = min(len(tokens), length + 1 if done == 1 else done + stride)
        context = tokens[max(0, end - length - 1) : end]
        expected -= log_probabilities(context)[0][done - end :].sum()
        done = end
    result = perplexity.strided_perplexity(runner, tokens, CONFIG.vocab_size, length, stride, characters=90, size=100)
    assert result.targets == 29
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected / 29), rel=1e-5)
    assert result.nats_per_character == pytest.approx(expected / 90, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(expected / 100 / math.log(2), rel=1e-5)


def test_documents_are_scored_each_from_its_own_beginning(runner, log_probabilities):
    texts = sequences(7, 1, 12, 2)
    expected = -sum(log_probabilities(tokens)[0].sum() for tokens in texts if len(tokens) > 1)
    result = perplexity.strided_perplexity(runner, texts, CONFIG.vocab_size, 16, 16, characters=1, size=1)
    assert result.targets == 6 + 11 + 1
    assert result.nats == pytest.approx(expected, rel=1e-5)


def test_a_text_without_a_target_is_refused(runner):
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        perplexity.strided_perplexity(runner, np.array([4]), CONFIG.vocab_size, 8, 8, 1, 1)
