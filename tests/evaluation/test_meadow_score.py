import pytest

from llamita.data import meadow
from llamita.evaluation.meadow_score import determined_spans, score

STORY = (
    "One windy morning, Ned the badger was playing at the market. He had made a white lamp all by himself. "
    "After that, he walked to the meadow and met Mia the fox. "
    "On the way home, the lamp fell from his bag by the pond. But Mia found it there and kept it. "
    "In the end, Mia had the white lamp. Back at the market, Ned the badger felt sorry."
)


def test_drawn_stories_score_full_marks():
    result = score(meadow.corpus(5, 300, "train"))
    assert (result.stories, result.grammatical, result.consistent, result.faults) == (300, 1.0, 1.0, {})
    assert str(result) == "100.0% of 300 stories are grammatical, 100.0% consistent"


@pytest.mark.parametrize(
    ("right", "wrong", "variable"),
    [
        ("Mia had the white lamp", "Ned had the white lamp", "owner"),
        ("Mia had the white lamp", "Leo had the white lamp", "owner"),
        ("had the white lamp", "had the green lamp", "owned_color"),
        ("had the white lamp", "had the white kite", "owned"),
        ("the lamp fell", "the ball fell", "thing"),
        ("Back at the market", "Back on the hill", "place"),
        ("by the pond", "at the market", "place3"),
        ("Ned the badger felt", "Ned the fox felt", "animal"),
        ("But Mia found", "But Zoe found", "friend"),
        ("felt sorry", "felt merry", "feeling"),
        ("his bag", "her bag", "hero"),
        ("himself", "herself", "hero"),
        ("met Mia the fox", "met Ned the fox", "friend"),
        ("met Mia the fox", "met Mia the badger", "animal2"),
        ("the meadow", "the market", "place2"),
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
    ending = "The next day, Mia found it there and brought it back."
    result = score([STORY.replace("But Mia found it there and kept it.", ending)])
    assert (result.grammatical, result.consistent) == (1.0, 0.0)
    assert result.faults == {"owner": 1, "feeling": 1}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("had made a white", "had made white"),
        ("white lamp all", "lamp white all"),
        ("at the market. He", "in the market. He"),
        ("Ned the badger was", "Ned the lamp was"),
        ("But Mia", "but Mia"),
        ("felt sorry.", "felt sorry"),
        ("felt sorry.", "felt sorry. The badger felt sad."),
        ("In the end, ", ""),
        (" In the end, Mia had the white lamp.", ""),
        ("After that, he", "After that he"),
        (". But", ".  But"),
        ("But Mia found it there and kept it.", "So they traded, and both of them laughed."),
        ("Ned the badger was", "Nedd the badger was"),
    ],
)
def test_a_planted_grammar_error_is_caught(right: str, wrong: str):
    assert STORY.count(right) == 1
    result = score([STORY.replace(right, wrong)])
    assert (result.grammatical, result.consistent) == (0.0, 0.0)


def test_shares_are_of_all_stories():
    result = score([STORY, f" {STORY}\n", STORY.replace("his", "her"), "Nonsense."])
    assert (result.stories, result.grammatical, result.consistent) == (4, 0.75, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        score([])


def test_determined_spans_are_the_words_that_a_distant_fact_gives():
    spans = determined_spans(STORY)
    words = [STORY[start:end] for start, end in spans]
    # "Mia" is never 20 words away, and "his bag" does not name Ned.
    assert words == ["lamp", "white", "lamp", "at the market", "Ned", "badger"]
    assert [STORY[start:end] for start, end in determined_spans(STORY, distance=50)] == [
        "at the market",
        "Ned",
        "badger",
    ]
    assert len(determined_spans(STORY, distance=1)) > len(spans)
    with pytest.raises(ValueError, match="consistent Meadow story"):
        determined_spans(STORY.replace("his", "her"))


def test_every_story_has_determined_spans():
    for text in meadow.corpus(0, 200, "validation"):
        spans = determined_spans(text)
        assert spans
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert spans == sorted(spans)
