"""A trained model's greedy texts from one crowded engine: transformers' under the margin rule, and exact to the bit."""

import pytest

from llamita.backend.torch.infer.runner import load_runner
from llamita.backend.torch.train.step import build_train_step
from llamita.data import meadow
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.quickstart import QuickstartConfig, quickstart

equality = pytest.importorskip("benchmarks.equality", reason="needs transformers, and a checkout")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_texts_are_those_of_transformers_and_exact_logits_those_of_each_alone(tmp_path):
    config = QuickstartConfig(output=tmp_path, steps=150, stories=3000, vocab_size=500, scored_stories=10)
    assert quickstart(config, build_train_step, load_runner) == 0
    model = tmp_path / "run" / "best"
    tokenizer = Tokenizer.load(model)
    tokens = tokenizer.encode("\n".join(meadow.corpus(0, 300, "validation")))
    prompts = equality.mixed_prompts(tokens, 200, 120, [tokenizer.bos_id])
    found = equality.compare(model, prompts, 80)
    equality.show(found)
    assert found.holds
    assert found.shortest == 1
    assert found.longest == 120
    assert found.tokens == found.exact_tokens == 200 * 80
    assert min(found.preemptions, found.exact_preemptions) > 200
    assert found.largest_difference < 1e-4
    assert found.wide > 0.9, "the rule covers nearly all tokens"


def test_a_difference_of_tokens_where_the_margin_is_clear_is_not_allowed():
    found = dict.fromkeys((field for field in equality.Equality.__dataclass_fields__), 0)
    near, far = equality.Divergence(0, 5, gap=1e-6, difference=1e-6), equality.Divergence(0, 5, 1.0, 1e-6)
    for divergences, differences, holds in (([], 0, True), ([near], 0, True), ([near, far], 0, False), ([], 1, False)):
        parts = found | {"divergences": divergences, "exact_differences": differences}
        assert equality.Equality(**parts).holds == holds
