"""Temperatures beside a model: written and read again, replaced, found by their question, broken files in one line."""

import json

import pytest

from llamita.storage import calibration
from llamita.storage.calibration import Calibration, HeadTemperature, QuestionTemperature

HEAD = HeadTemperature(1.5, ("bad", "gut und schön"), 40)
QUESTION = QuestionTemperature(0.7, "It is", ("bad", "good"), 12)
MEAN = QuestionTemperature(2.0, "It is", ("bad", "good"), 12, "mean", True)
WHOLE = Calibration(HEAD, (QUESTION, MEAN))


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for place, name in ((tmp_path, "calibration.json"), (file, "model.gguf.calibration.json")):
        assert calibration.load(place) == Calibration()
        calibration.save(place, Calibration())
        assert not (tmp_path / name).exists()
        calibration.save(place, WHOLE)
        assert (tmp_path / name).is_file()
        assert calibration.load(place) == WHOLE
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file stays"


def test_a_question_has_its_own_temperature_whatever_the_order_of_its_words():
    assert WHOLE.question_temperature("It is ", ("good", "bad")) == 0.7
    assert WHOLE.question_temperature("It is", ("bad", "good"), "mean", True) == 2.0
    for other in (("It was", ("bad", "good")), ("It is", ("bad", "so")), ("It is", ("bad", "good"), "mean", False)):
        assert WHOLE.question_temperature(*other) == 1.0
    changed = WHOLE.with_question(QuestionTemperature(3.0, "It is ", ("good", "bad"), 5))
    assert changed.question_temperature("It is", ("bad", "good")) == 3.0
    assert (len(changed.questions), changed.head, changed.questions[0]) == (2, HEAD, MEAN)


def test_a_head_of_other_labels_is_refused(tmp_path):
    assert WHOLE.head_temperature(("bad", "gut und schön"), tmp_path) == 1.5
    assert Calibration().head_temperature(("a", "b"), tmp_path) == 1.0
    with pytest.raises(ValueError, match=r"\.json is for the labels bad, gut und schön, and the model's are a"):
        WHOLE.head_temperature(("a", "b"), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"head": {"temperature": 0, "labels": ["a"], "texts": 1}}',
        '{"head": {"temperature": NaN, "labels": ["a"], "texts": 1}}',
        '{"head": {"temperature": "2", "labels": ["a"], "texts": 1}}',
        '{"head": {"temperature": true, "labels": ["a"], "texts": 1}}',
        '{"head": {"labels": ["a"], "texts": 1}}',
        '{"head": {"temperature": 1.5, "labels": "ab", "texts": 1}}',
        '{"head": {"temperature": 1.5, "labels": ["a"], "texts": 1, "more": 2}}',
        '{"head": 2}',
        '{"questions": [{"temperature": -1, "suffix": "", "words": ["a"], "texts": 1}]}',
        '{"questions": 3}',
        "[]",
        "{",
    ],
)
def test_broken_files(tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json") as error:
        calibration.load(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_written_is_plain_json(tmp_path):
    calibration.save(tmp_path, WHOLE)
    content = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert content["head"] == {"temperature": 1.5, "labels": ["bad", "gut und schön"], "texts": 40}
    assert content["questions"][0]["suffix"] == "It is"
