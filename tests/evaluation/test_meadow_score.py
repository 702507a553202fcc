import pytest

from llamita.data import meadow
from llamita.evaluation.meadow_score import determined_spans, score

STORY = (
    "One windy morning, Ned the mole was at the mill. He had a white lamp. "
    "Soon he met Otto the bear in the meadow. "
    "On the way, Ned lost the lamp. In secret, Otto went to the meadow and took it. "
    "In the end, Otto had the white lamp. When Ned came back to the mill, he was upset."
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
        ("back to the mill", "back to the farm", "home"),
        ("back to the mill", "back to the meadow", "home"),
        ("meadow and took", "hill and took", "outing"),
        ("meadow and took", "mill and took", "outing"),
        ("Ned the mole", "Ned the mouse", "hero"),
        ("Otto the bear", "Otto the fox", "friend"),
        ("secret, Otto", "secret, Nora", "friend"),
        ("secret, Otto", "secret, Ned", "friend"),
        ("When Ned", "When Pip", "hero"),
        ("he was upset", "he was proud", "feeling"),
        ("he was upset", "she was upset", "hero"),
        ("He had", "She had", "hero"),
        ("met Otto the bear", "met Ned the mole", "friend"),
        ("in the meadow", "at the mill", "outing"),
        ("took it", "took it", None),
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
    result = score([STORY.replace("In secret, Otto went to the meadow and took it.", ending)])
    assert (result.grammatical, result.consistent) == (1.0, 0.0)
    assert result.faults == {"owner": 1, "feeling": 1}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("had a white", "had white"),
        ("a white lamp", "a lamp white"),
        ("at the mill. He", "in the mill. He"),
        ("Ned the mole", "Ned the lamp"),
        ("Soon he", "soon he"),
        ("was upset.", "was upset"),
        ("was upset.", "was upset. Ned was sad."),
        ("In the end, ", ""),
        (" In the end, Otto had the white lamp.", ""),
        ("On the way, Ned", "On the way Ned"),
        (". On", ".  On"),
        ("In secret, Otto went to the meadow and took it.", "Full of joy, Otto took the lamp and danced."),
        ("Ned the mole", "Nedd the mole"),
    ],
)
def test_a_planted_grammar_error_is_caught(right: str, wrong: str):
    assert STORY.count(right) == 1
    result = score([STORY.replace(right, wrong)])
    assert (result.grammatical, result.consistent) == (0.0, 0.0)


def test_shares_are_of_all_stories():
    result = score([STORY, f" {STORY}\n", STORY.replace("He had", "She had"), "Nonsense."])
    assert (result.stories, result.grammatical, result.consistent) == (4, 0.75, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        score([])


def test_determined_spans_are_the_words_that_a_distant_fact_gives():
    spans = determined_spans(STORY)
    words = [STORY[start:end] for start, end in spans]
    # "Otto" is never 20 words away from the last "Otto", and "he" does not name Ned.
    assert words == ["Ned", "white", "Ned", "mill"]
    assert [STORY[start:end] for start, end in determined_spans(STORY, distance=30)] == ["white", "mill"]
    assert len(determined_spans(STORY, distance=1)) > len(spans)
    with pytest.raises(ValueError, match="consistent Meadow story"):
        determined_spans(STORY.replace("He had", "She had"))


def test_every_story_has_determined_spans():
    for text in meadow.corpus(0, 200, "validation"):
        spans = determined_spans(text)
        assert spans
        assert all(0 <= start < end <= len(text) for start, end in spans)
        assert spans == sorted(spans)
