"""The exact mode's logits through the paged memory against the float64 oracle."""

import pytest

from tests import reference
from tests.backend.frameworks import Torch, to_numpy
from tests.backend.models import SWITCHES, VARIANTS, perturbed, random_tokens, small
from tests.backend.paged import even_cuts, paged_logits
from tests.backend.tolerances import MODEL, relative_difference


@pytest.mark.parametrize("variant", [name for name in VARIANTS | SWITCHES if name != "classifier"])
def test_cached_logits_of_every_variant_in_the_exact_mode_follow_the_oracle(variant):
    config = small(**(VARIANTS | SWITCHES)[variant])
    arrays = perturbed(config)
    model = Torch().build_model(config, arrays)
    rows = [random_tokens(config, length) for length in (29, 12, 1, 40)]
    cuts = [[10, 1, 1, 17], [1, 3, 8], [1], even_cuts(40, 7, prompt=31)]
    for row, logits in zip(rows, paged_logits(Torch(), model, rows, cuts, exact=True), strict=True):
        expected = reference.forward(config, to_numpy(arrays), row)["logits"]
        assert relative_difference(logits, expected) < MODEL["fp32"]
