"""Looking inside: predictions, lens and attention held to the oracle, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from llamita.backend.objectives import Classification
from llamita.inference import inspection
from llamita.inference.inspection import look_inside
from llamita.inference.llm import LLM
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from llamita.storage import model_directory
from tests import reference
from tests.backend.frameworks import to_numpy
from tests.backend.models import perturbed, small
from tests.inference.test_adapters import adapter_of

PROMPT = "The owl 🦙 sat by"


@pytest.fixture(scope="module")
def opened(framework, tiny_model, tokenizer) -> LLM:
    return LLM(framework.backend.load_runner(tiny_model, device="cpu"), tokenizer)


@pytest.fixture(scope="module")
def oracle(tiny_model, tokenizer):
    config = model_directory.load_config(tiny_model)
    values = to_numpy(model_directory.load_tensors(tiny_model))
    tokens = tokenizer.encode(PROMPT, bos=True)
    return config, values, tokens, reference.forward(config, values, tokens, attention=True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.log(reference.softmax(logits))


def check_candidates(found, logits_TV: np.ndarray, count: int) -> None:
    """Those of each position are the likeliest, in order, with their log-probabilities."""
    logprobs_TV = log_softmax(logits_TV)
    assert len(found) == len(logits_TV)
    for row, logprobs_V in zip(found, logprobs_TV, strict=True):
        assert len(row) == count
        np.testing.assert_allclose([each.logprob for each in row], np.sort(logprobs_V)[::-1][:count], atol=1e-5)
        np.testing.assert_allclose([logprobs_V[each.id] for each in row], np.sort(logprobs_V)[::-1][:count], atol=1e-5)
        assert len({each.id for each in row}) == count


def test_predictions_lens_and_attention_are_those_of_the_oracle(opened, oracle) -> None:
    config, values, tokens, expected = oracle
    found = opened.look_inside(PROMPT, top=7, attention=(1, 0), lens=True)
    assert (found.layers, found.heads) == (2, 4)
    assert [piece.id for piece in found.tokens] == tokens
    check_candidates(found.next, expected["logits"], 7)
    for row, place in zip(found.lens, ("embedding", "layers.0", "layers.1"), strict=True):
        check_candidates(row, reference.output_logits(config, values, expected[place]), 5)
    assert found.lens[-1] == tuple(row[:5] for row in found.next)
    assert [each.layer for each in found.attention] == [1, 0]
    for each in found.attention:
        assert each.weights.shape == (4, len(tokens), len(tokens))
        np.testing.assert_allclose(each.weights, expected[f"layers.{each.layer}.attention"], atol=1e-5)


def test_it_says_no_more_than_was_asked_for(opened) -> None:
    found = opened.look_inside(PROMPT)
    assert found.lens is None
    assert found.attention == ()
    assert {len(row) for row in found.next} == {5}
    assert [each.layer for each in opened.look_inside(PROMPT, attention=[1, 1]).attention] == [1]
    assert {len(row) for row in opened.look_inside(PROMPT, top=2, lens=True).lens[0]} == {2}


def test_the_dictionary_is_json_whose_attention_sums_to_one(opened, oracle, tokenizer) -> None:
    _, _, tokens, expected = oracle
    found = opened.look_inside(tokens, attention=[np.int64(0)], lens=True)
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said.keys() == {"layers", "heads", "tokens", "next", "lens", "attention"}
    assert said["tokens"] == [{"id": i, "text": tokenizer.piece(i)} for i in tokens]
    assert said["next"][3][0].keys() == {"id", "text", "logprob"}
    assert (len(said["next"]), len(said["lens"]), len(said["lens"][0])) == (len(tokens), 3, len(tokens))
    (attention,) = said["attention"]
    assert attention.keys() == {"layer", "weights"}
    assert attention["layer"] == 0
    np.testing.assert_allclose(np.array(attention["weights"]).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(attention["weights"], expected["layers.0.attention"], atol=1e-5)
    assert opened.look_inside(tokens).to_dict()["lens"] is None


def test_pieces_show_control_tokens_by_name_and_broken_characters_as_such(opened, tokenizer) -> None:
    ids = [
        tokenizer.bos_id,
        *(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xf0"),
    ]
    found = opened.look_inside([*ids, *tokenizer.encode("e")])
    assert [piece.text for piece in found.tokens] == ["<s>", "\ufffd", "e"]
    beyond = opened.look_inside([tokenizer.eos_id])
    assert beyond.tokens[0].text == "</s>"


def test_ids_without_a_tokenizer_or_beyond_it_have_no_text(framework, tokenizer) -> None:
    config = small(vocab_size=tokenizer.vocab_size + 7)
    runner = framework.runner_over(config, perturbed(config))
    last = config.vocab_size - 1
    assert [piece.text for piece in look_inside(runner, tokenizer, [last, 1]).tokens] == ["", "<s>"]
    assert [piece.text for piece in look_inside(runner, None, [last, 1]).tokens] == ["", ""]
    json.dumps(look_inside(runner, None, [last], top=20).to_dict())


def test_logits_are_held_for_a_few_positions_at_a_time(opened, monkeypatch) -> None:
    whole = opened.look_inside(PROMPT, lens=True)
    sizes = []
    monkeypatch.setattr(inspection, "MAX_LOGITS", 3 * opened.config.vocab_size)
    lens, forward = opened.runner.logit_lens, opened.runner.forward

    def counted(stream_BTD, adapter=None):
        sizes.append(stream_BTD.shape[1])
        return lens(stream_BTD, adapter)

    def without_logits(*arguments, **options):
        found = forward(*arguments, **options)
        assert "logits" not in found
        return found

    monkeypatch.setattr(opened.runner, "logit_lens", counted)
    monkeypatch.setattr(opened.runner, "forward", without_logits)
    pieces = opened.look_inside(PROMPT, lens=True)
    assert max(sizes) == 3
    assert sum(sizes) == 3 * len(pieces.tokens)
    for mine, other in zip((*pieces.lens, pieces.next), (*whole.lens, whole.next), strict=True):
        for row, expected in zip(mine, other, strict=True):
            np.testing.assert_allclose([c.logprob for c in row], [c.logprob for c in expected], atol=1e-5)


def test_of_equally_likely_tokens_the_lower_ids_come_first(framework) -> None:
    config = small()
    arrays = perturbed(config)
    arrays["lm_head.weight"] = HostArray.from_numpy(np.zeros((config.vocab_size, config.hidden_size), np.float32))
    (row,) = look_inside(framework.runner_over(config, arrays), None, [3], top=4).next
    assert [candidate.id for candidate in row] == [0, 1, 2, 3]
    assert [candidate.logprob for candidate in row] == pytest.approx([-np.log(config.vocab_size)] * 4)


def test_an_adapter_changes_all_that_is_seen(framework) -> None:
    config = small()
    adapter = adapter_of(config, LoraSettings(4, 8, targets=("all", "lm_head")), 3)
    runner = framework.runner_of(framework.build_model(config, perturbed(config)), adapters={"a": adapter})
    asked = {"lens": True, "attention": [0]}
    base, adapted = (
        look_inside(runner, None, [1, 5, 9], **asked),
        look_inside(runner, None, [1, 5, 9], adapter="a", **asked),
    )
    logits = runner.forward([[1, 5, 9]], adapter="a")["logits"][0].astype(np.float64)
    check_candidates(adapted.next, logits, 5)
    assert base.next != adapted.next
    assert base.lens[0] != adapted.lens[0]
    assert np.abs(base.attention[0].weights - adapted.attention[0].weights).max() > 1e-4


@pytest.mark.parametrize(
    ("tokens", "asked", "message"),
    [
        ([], {}, "the text has 0 tokens; give 1 to 96"),
        ([1] * 97, {}, "the text has 97 tokens; give 1 to 96"),
        ([1], {"top": 0}, "top=0 must be 1 to 20"),
        ([1], {"top": 21}, "top=21 must be 1 to 20"),
        ([1], {"attention": [0, 2]}, "attention=2 is no layer of this model: give 0 to 1"),
        ([1], {"attention": [-1]}, "attention=-1 is no layer of this model: give 0 to 1"),
        ([1], {"adapter": "b"}, "there is no adapter 'b'; loaded are: none"),
        ([320], {}, "token id 320 is not one of this model's, 0 to 319"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(opened, tokens, asked, message) -> None:
    with pytest.raises(ValueError, match=message):
        opened.look_inside(tokens, **asked)


def test_long_texts_classifiers_and_broken_weights_are_refused(framework) -> None:
    config = small(max_position_embeddings=2048)
    runner = framework.runner_over(config, perturbed(config))
    with pytest.raises(ValueError, match="the text has 513 tokens; give 1 to 512"):
        look_inside(runner, None, [1] * 513)
    labelled = dataclasses.replace(config, num_labels=3)
    with pytest.raises(ValueError, match="this model is a classifier and predicts no tokens"):
        look_inside(framework.runner_over(labelled, perturbed(labelled)), None, [1])
    step = framework.train_step(small(num_labels=2), objective=Classification())
    with pytest.raises(ValueError, match="is a classifier"):
        look_inside(step.runner(), None, [1])
    framework.set_values(runner.model, "model.norm.weight", np.full(config.hidden_size, np.inf, np.float32))
    with pytest.raises(ValueError, match="logits are not finite"):
        look_inside(runner, None, [1, 2])
