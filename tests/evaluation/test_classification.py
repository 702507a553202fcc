"""Metrics against scikit-learn, calibration against its definition, probabilities against each text alone, files."""

import json
import struct

import numpy as np
import pytest

from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import weights
from llamita.evaluation import classification
from llamita.model.config import ModelConfig
from tests import reference

NAMES = ("awful", "bad", "average", "good", "excellent")


def predictions(n=400, labels=5, seed=0, never=()):
    """log p and true labels that agree more often than by chance; labels in `never` are neither true nor predicted."""
    generator = np.random.default_rng(seed)
    allowed = [i for i in range(labels) if i not in never]
    true = generator.choice(allowed, n)
    logits = generator.normal(size=(n, labels)) + 1.2 * np.eye(labels)[true]
    logits[:, list(never)] = -30.0
    return classification.log_softmax(logits), true


@pytest.mark.parametrize("never", [(), (2,)])
def test_metrics_are_those_of_scikit_learn(never):
    sklearn = pytest.importorskip("sklearn.metrics")
    log_p, true = predictions(never=never)
    report = classification.classification_report(log_p, true, NAMES)
    predicted = log_p.argmax(1)
    assert report.accuracy == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert report.macro_f1 == pytest.approx(sklearn.f1_score(true, predicted, average="macro"))
    assert report.loss == pytest.approx(sklearn.log_loss(true, np.exp(log_p), labels=range(5)))
    assert report.brier_score == pytest.approx(sklearn.brier_score_loss(true, np.exp(log_p), labels=range(5)))
    assert np.array_equal(report.confusion, sklearn.confusion_matrix(true, predicted, labels=range(5)))
    each = sklearn.precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    found = [(label.precision, label.recall, label.f1, label.texts) for label in report.labels]
    np.testing.assert_allclose(found, np.array(each).T)
    assert report.majority == pytest.approx(np.bincount(true).max() / len(true))


def test_the_brier_score_of_two_labels_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    log_p, true = predictions(labels=2)
    report = classification.classification_report(log_p, true, NAMES[:2])
    assert report.brier_score == pytest.approx(sklearn.brier_score_loss(true, np.exp(log_p[:, 1])))
    even = classification.classification_report(np.log(np.full((8, 2), 0.5)), np.arange(8) % 2, NAMES[:2])
    assert even.brier_score == pytest.approx(0.25)


def test_calibration_error_by_its_definition():
    log_p, true = predictions(1000, 3)
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == true
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.sum() / 1000 * abs(confidence[inside].mean() - right[inside].mean())
    report = classification.classification_report(log_p, true, NAMES[:3])
    assert report.calibration_error == pytest.approx(expected)
    assert sum(each.texts for each in report.bins) == 1000
    sure = classification.classification_report(
        np.log(np.array([[1.0, 1e-300], [1.0, 1e-300]])), np.array([0, 1]), NAMES[:2]
    )
    assert sure.calibration_error == pytest.approx(0.5)
    calibrated = np.log(np.tile([0.75, 0.25], (400, 1)))
    even = classification.classification_report(calibrated, np.repeat([0, 0, 0, 1], 100), NAMES[:2])
    assert even.calibration_error == pytest.approx(0.0, abs=1e-12)


def test_probabilities_do_not_depend_on_what_runs_beside_a_text():
    config = ModelConfig(61, 32, 48, 2, 4, 2, 32, num_labels=5)
    model = weights.build_model(config, seed=3).eval()
    arrays = {name: array.to_numpy() for name, array in weights.to_host_arrays(model).items()}
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 61, length) for length in (9, 1, 30, 12, 12, 3)]
    for batch_size in (1, 4, 64):
        found = classification.label_log_probabilities(TorchRunner(model), tokens, 5, batch_size)
        for row, ids in zip(found, tokens, strict=True):
            expected = reference.forward(config, arrays, ids)["logits"][-1]
            np.testing.assert_allclose(row, np.log(reference.softmax(expected)), atol=2e-5)


def test_what_is_written(tmp_path):
    log_p, true = predictions()
    report = classification.classification_report(log_p, true, NAMES)
    classification.write_report(tmp_path / "out", report, {"model": "m"})
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["model"] == "m"
    assert content["accuracy"] == report.accuracy
    assert content["confusion"] == [list(row) for row in report.confusion]
    for name in ("confusion.png", "reliability.png"):
        data = (tmp_path / "out" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", data[16:24])) > 300
    with pytest.raises(FileExistsError):
        classification.write_report(tmp_path / "out", report, {})
