"""What lm_eval finds with its own adapter for transformers, and a comparison with what it finds here."""

import pytest


def compare(ours, theirs):
    from llamita.evaluation.lm_eval_adapter import metrics_by_task

    left, right = metrics_by_task(ours), metrics_by_task(theirs)
    assert left.keys() == right.keys()
    for task, values in right.items():
        assert left[task].keys() == values.keys()
        for name, value in values.items():
            assert left[task][name] == pytest.approx(value, rel=1e-4, nan_ok=True), (task, name)
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours["samples"][task], samples, strict=True):
            for a, b in zip(flat(mine["resps"]), flat(other["resps"]), strict=True):
                same = pytest.approx(float(b), abs=1e-4, rel=1e-6) if not isinstance(b, bool | str) else b
                assert a == same, (task, mine["doc_id"])
    return left


def flat(value):
    """Log-probabilities, verdicts and texts, whatever they are wrapped in; lm_eval makes texts of some."""
    if isinstance(value, list | tuple):
        return [inner for part in value for inner in flat(part)]
    return [value]


def peer(directory):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)
