"""Labels by likelihood: each against a plain computation by transformers, cutting, calibration."""

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import weights
from llamita.data import meadow
from llamita.evaluation import zero_shot
from llamita.model.config import ModelConfig
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator

LABELS = ("happy", "sad", "proud of it")
SUFFIX = "Is it happy or sad? It is "
TEXTS = [*meadow.corpus(0, 3, "train"), "A fox.", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(300, 32, 48, 2, 4, 2, 256)
    return weights.build_model(config, seed=3).eval()


def score(model, tokenizer, texts=TEXTS, length=256, **options):
    return zero_shot.zero_shot(
        TorchRunner(model),
        tokenizer,
        texts,
        LABELS,
        suffix=options.pop("suffix", SUFFIX),
        length=length,
        vocab_size=300,
        **options,
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scores_are_those_of_a_plain_computation_by_transformers(model, tokenizer, reduction, tmp_path):
    transformers = pytest.importorskip("transformers")
    model_directory.save_config(tmp_path, model.config)
    model_directory.save_tensors(tmp_path, weights.to_host_arrays(model))
    tokenizer.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = np.zeros((len(TEXTS), len(LABELS)))
    for n, text in enumerate(TEXTS):
        for i, label in enumerate(LABELS):
            before = f"{text} {SUFFIX.strip()}".strip()
            context = [tokenizer.bos_id, *encode(before).input_ids]
            answer = encode(f" {label}").input_ids
            with torch.inference_mode():
                logits = theirs(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            log_p = logits.log_softmax(-1)[range(len(answer)), answer]
            expected[n, i] = log_p.sum() if reduction == "sum" else log_p.mean()
    found = score(model, tokenizer, reduction=reduction)
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    np.testing.assert_allclose(found.log_probabilities, expected, atol=1e-4)
    assert found.truncated == 0


def test_what_runs_beside_a_text_does_not_matter(model, tokenizer, monkeypatch):
    together = score(model, tokenizer).log_probabilities
    monkeypatch.setattr(zero_shot, "MAX_ROWS", 1)
    alone = np.concatenate([score(model, tokenizer, [text]).log_probabilities for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("keep", ["end", "start"])
def test_a_long_text_is_cut_and_its_question_is_not(tokenizer, keep):
    text = TEXTS[0]
    whole = zero_shot.build_prompt(tokenizer, text, SUFFIX, LABELS, 256)
    question = tokenizer.encode(f" {SUFFIX.strip()}")
    body = tokenizer.encode(text)
    assert whole.context == (tokenizer.bos_id, *body, *question)
    assert whole.labels == tuple(tuple(tokenizer.encode(f" {label}")) for label in LABELS)
    longest = max(map(len, whole.labels))
    for length in (len(question) + longest + 1, len(question) + longest + 12, len(whole.context) + longest - 1):
        cut = zero_shot.build_prompt(tokenizer, text, SUFFIX, LABELS, length, keep)
        left = length - longest - len(question) - 1
        kept = body[len(body) - left :] if keep == "end" else body[:left]
        assert cut.context == (tokenizer.bos_id, *kept, *question)
        assert cut.truncated
        assert cut.labels == whole.labels
    assert not whole.truncated
    with pytest.raises(ValueError, match="more than the 10 of the context; shorten the suffix"):
        zero_shot.build_prompt(tokenizer, text, SUFFIX, LABELS, 10, keep)


def test_calibration_takes_out_what_the_model_says_of_nothing(model, tokenizer):
    plain = np.exp(score(model, tokenizer).log_probabilities)
    empty = np.exp(score(model, tokenizer, ["N/A", "[MASK]", ""]).log_probabilities).mean(0)
    expected = plain / empty
    expected /= expected.sum(1, keepdims=True)
    found = score(model, tokenizer, calibrate=True).log_probabilities
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-6)


def test_the_default_question():
    words = ("awful", "bad", "average", "good", "excellent")
    assert zero_shot.default_suffix(words) == ("Is this movie awful, bad, average, good, or excellent? This movie is ")
    assert zero_shot.default_suffix(("bad", "good")) == "Is this movie bad or good? This movie is "


def test_mistakes(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="there is no text"):
        score(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least two different words"):
        zero_shot.zero_shot(TorchRunner(model), tokenizer, ["a"], ["x", "x"], suffix="", length=9, vocab_size=300)
    monkeypatch.setattr(tokenizer, "bos_id", None)
    with pytest.raises(ValueError, match="nothing precedes the label"):
        score(model, tokenizer, [""], suffix="")
