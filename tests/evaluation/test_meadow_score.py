import pytest

from llamita.data import meadow
from llamita.evaluation.meadow_score import determined_spans, score

STORY = (
    "One windy morning, Ned the mole was playing at the inn. He had made a white lamp all by himself. "
    "After that, he walked to the meadow and met Otto the bear. "
    "While they were playing, Ned lost the lamp near the meadow. But Otto found it and kept it. "
    "In the end, Otto had the white lamp. When Ned came back to the inn, he was sorry."
)


def test_drawn_stories_score_full_marks():
    result = score(meadow.corpus(5, 300, "train"))
    assert (result.stories, result.grammatical, result.consistent, result.faults) == (300, 1.0, 1.0, {})
    assert str(result) == "100.0% of 300 stories are grammatical, 100.0% consistent"


@pytest.mark.parametrize(
    ("right", "wrong", "variable"),
    [
        ("Otto had the white lamp", "Ned had the white lamp", "owner"),
        ("Otto had the white lamp", "Hugo had the white lamp", "owner"),
        ("had the white lamp", "had the green lamp", "color"),
        ("had the white lamp", "had the white kite", "thing"),
        ("lost the lamp", "lost the ball", "thing"),
        ("back to the inn", "back to the mill", "home"),
        ("back to the inn", "back to the meadow", "home"),
        ("near the meadow", "near the hill", "outing"),
        ("near the meadow", "near the inn", "outing"),
        ("Ned the mole", "Ned the mouse", "hero"),
        ("Otto the bear", "Otto the fox", "friend"),
        ("But Otto found", "But Nora found", "friend"),
        ("But Otto found", "But Ned found", "friend"),
        ("When Ned", "When Pip", "hero"),
        ("he was sorry", "he was merry", "feeling"),
        ("he was sorry", "she was sorry", "hero"),
        ("himself", "herself", "hero"),
        ("met Otto the bear", "met Ned the mole", "friend"),
        ("to the meadow", "to the inn", "outing"),
        ("kept it", "kept it", None),
    ],
)
def test_a_planted_contradiction_is_inconsistent_but_grammatical(right: str, wrong: str, variable: str | None):
    assert STORY.count(right) == 1
    result = score([STORY.replace(right, wrong)])
    assert result.grammatical == 1.0
    assert result.consistent == (1.0 if variable is None else 0.0)
    assert variable is None or variable in result.faults


def test_the_other_ending_contradicts_owner_and_feeling():
    ending = "The next day, Otto found it and brought it back."
    result = score([STORY.replace("But Otto found it and kept it.", ending)])
    assert (result.grammatical, result.consistent) == (1.0, 0.0)
    assert result.faults == {"owner": 1, "feeling": 1}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("had made a white", "had made white"),
        ("white lamp all", "lamp white all"),
        ("at the inn. He", "in the inn. He"),
        ("Ned the mole", "Ned the lamp"),
        ("But Otto", "but Otto"),
        ("was sorry.", "was sorry"),
        ("was sorry.", "was sorry. Ned was sad."),
        ("In the end, ", ""),
        (" In the end, Otto had the white lamp.", ""),
        ("After that, he", "After that he"),
        (". But", ".  But"),
        ("But Otto found it and kept it.", "Full of joy, Otto took the lamp and danced."),
        ("Ned the mole", "Nedd the mole"),
    ],
)
def test_a_planted_grammar_error_is_caught(right: str, wrong: str):
    assert STORY.count(right) == 1
    result = score([STORY.replace(right, wrong)])
    assert (result.grammatical, result.consistent) == (0.0, 0.0)


def test_shares_are_of_all_stories():
    result = score([STORY, f" {STORY}\n", STORY.replace("himself", "herself"), "Nonsense."])
    assert (result.stories, result.grammatical, result.consistent) == (4, 0.75, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        score([])


def test_determined_spans_are_the_words_that_a_distant_fact_gives():
    spans = determined_spans(STORY)
    words = [STORY[start:end] for start, end in spans]
    # "Otto" is never 20 words away from the last "Otto", and "he" does not name Ned.
    assert words == ["Ned", "lamp", "white", "Ned", "inn"]
    assert [STORY[start:end] for start, end in determined_spans(STORY, distance=40)] == ["white", "inn"]
    assert len(determined_spans(STORY, distance=1)) > len(spans)
    with pytest.raises(ValueError, match="consistent Meadow story"):
        determined_spans(STORY.replace("himself", "herself"))


def test_every_story_has_determined_spans():
    for text in meadow.corpus(0, 200, "validation"):
        spans = determined_spans(text)
        assert spans
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert spans == sorted(spans)
