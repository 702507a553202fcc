"""What an objective may be: settings out of range are refused in a line."""

import pytest

from llamita.backend.objectives import PolicyGradient, Preference


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preference(beta=0), "beta=0 must be above 0"),
        (lambda: Preference(label_smoothing=0.5), "label_smoothing=0.5 must be"),
        (lambda: Preference("ipo", label_smoothing=0.1), "for form=dpo alone"),
        (lambda: PolicyGradient(clip=1.5), "clip=1.5 must be"),
        (lambda: PolicyGradient(kl_weight=-1), "kl_weight=-1 must not be negative"),
    ],
)
def test_objectives_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
