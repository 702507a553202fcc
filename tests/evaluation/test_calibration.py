"""The fitted temperature: recovered where it is known, against SciPy's minimum, and refused where there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.evaluation.calibration import fit_temperature, with_temperature
from llamita.evaluation.classification import classification_report, log_softmax


def drawn(temperature, n=20_000, labels=4, seed=0):
    """Logits of a model that is `temperature` times too sure, and labels drawn from what it should have said."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, labels)) * 1.5
    true = (log_softmax(logits) + generator.gumbel(size=logits.shape)).argmax(axis=1)
    return logits * temperature, true


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_recovered(temperature):
    logits, true = drawn(temperature)
    assert fit_temperature(logits, true) == pytest.approx(temperature, rel=0.03)
    assert fit_temperature(log_softmax(logits) + 7, true) == pytest.approx(fit_temperature(logits, true), rel=1e-9)
    fitted = with_temperature(log_softmax(logits), fit_temperature(logits, true))
    assert classification_report(fitted, true, "abcd").calibration_error < 0.01


@given(st.integers(0, 1000), st.integers(2, 5), st.floats(0.2, 5))
@settings(max_examples=25, deadline=None)
def test_it_has_the_least_loss_by_scipy(seed, labels, temperature):
    scipy = pytest.importorskip("scipy.optimize")
    logits, true = drawn(temperature, 200, labels, seed)

    def loss(log_t):
        return -log_softmax(logits / np.exp(log_t))[np.arange(200), true].mean()

    found = fit_temperature(logits, true)
    least = scipy.minimize_scalar(loss, bounds=(-4, 6), method="bounded", options={"xatol": 1e-9})
    assert loss(np.log(found)) <= least.fun + 1e-12
    assert found == pytest.approx(np.exp(least.x), rel=1e-3)


def test_a_temperature_changes_no_prediction_and_one_changes_nothing():
    log_p = log_softmax(drawn(2.0, 500)[0])
    assert with_temperature(log_p, 1.0) is log_p
    for temperature in (0.3, 4.0):
        changed = with_temperature(log_p, temperature)
        np.testing.assert_allclose(np.exp(changed).sum(axis=1), 1)
        assert np.array_equal(changed.argmax(axis=1), log_p.argmax(axis=1))
        gaps = (changed[:, 0] - changed[:, 1]) * temperature
        np.testing.assert_allclose(gaps, log_p[:, 0] - log_p[:, 1], atol=1e-12)


LOGITS = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.empty((0, 2)), [], r"at least one text, got \(0, 2\) for 0"),
        (LOGITS[:3], [0, 1], r"got \(3, 2\) for 2"),
        (LOGITS, [0, 0, 0, 0], "all 4 texts have one label"),
        (np.where(LOGITS == 2, np.nan, LOGITS), [0, 0, 1, 1], "is not finite"),
        (np.where(LOGITS == 0, -np.inf, LOGITS), [0, 0, 1, 1], "is not finite"),
        (LOGITS, [0, 0, 1, 1], "right about nearly all 4 texts"),
        (LOGITS, [1, 1, 0, 0], "no better than chance"),
        (np.zeros((4, 2)), [1, 1, 0, 0], "no better than chance"),
    ],
)
def test_what_cannot_be_fitted(logits, labels, message):
    with pytest.raises(ValueError, match=message) as error:
        fit_temperature(logits, np.array(labels, dtype=int))
    assert "\n" not in str(error.value)
