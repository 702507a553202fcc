import hashlib
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from llamita.data import meadow
from llamita.data.meadow_grammar import Grammar, Slot, Story, Template
from llamita.data.meadow_world import OWNER, WORLD, Character, Plot, World
from llamita.evaluation import meadow_score

TINY = World(
    characters={
        "Pip": Character("fox", he=True),
        "Mia": Character("cat", he=False),
        "Ivy": Character("cow", he=False),
    },
    words={
        "hero": ("Pip", "Mia"),
        "friend": ("Ivy",),
        "thing": ("kite", "drum"),
        "color": ("red", "blue"),
        "home": ("in the barn", "at the mill"),
        "outing": ("by the pond", "on the hill", "by the lake"),
        "weather": ("sunny", "rainy"),
        "time": ("day",),
        "happy": ("glad", "merry"),
        "sad": ("sad",),
    },
    opening=(WORLD.opening[0][2:], WORLD.opening[2][:1]),
    plots={
        "loss": Plot(
            event=("The {color} {thing} fell {at:outing}.", "All at once, the {color} {thing} was gone."),
            good=("But {friend} gave it back.", "By good luck, {he:friend} found it {at:outing}."),
            bad=("In the end {he:friend} kept it.",),
            good_owner="hero",
            bad_owner="friend",
        ),
        "gift": Plot(
            event=("That day {hero} had a {color} {thing} for {friend}.",),
            good=("Then {he:friend} took it.",),
            bad=("But {friend} said no.",),
            good_owner="friend",
            bad_owner="hero",
        ),
    },
    closing=(WORLD.closing[0][:1], WORLD.closing[1][:2]),
)


def every_story(grammar: Grammar) -> Iterator[Story]:
    """Make every story by brute force: all sentences, and all words for all variables, minus what breaks a rule."""
    words = grammar.world.words
    for plot, lines in grammar._lines.items():
        for options in itertools.product(*(range(len(line)) for line in lines)):
            slots = [slot for line, option in zip(lines, options, strict=True) for slot in line[option].slots]
            variables = sorted({slot.variable for slot in slots} - {OWNER})
            feelings = words["happy" if grammar.good_ending(plot, options) else "sad"]
            domains = [feelings if v == "feeling" else words[v] for v in variables]
            for values in itertools.product(*domains):
                yield grammar.story(plot, options, dict(zip(variables, values, strict=True)))


def test_every_story_of_a_tiny_world_is_distinct_and_their_probabilities_sum_to_one():
    grammar = Grammar(TINY)
    total, texts = [], set()
    for number, story in enumerate(every_story(grammar)):
        texts.add(story.text)
        total.append(math.exp(grammar.log_probability(story)))
        if number % 50 == 0:
            assert grammar.parse(story.text) == story
    assert len(texts) == len(total) == grammar.size()
    assert math.fsum(total) == pytest.approx(1.0, abs=1e-12)


def test_stories_are_drawn_as_often_as_their_probability_says():
    grammar, source, draws = Grammar(TINY), random.Random(0), 40_000
    expected: dict[tuple[str, tuple[int, ...], str], float] = defaultdict(float)
    for story in every_story(grammar):
        expected[story.plot, story.options, story.facts["hero"]] += math.exp(grammar.log_probability(story))
    drawn = Counter()
    for _ in range(draws):
        story = grammar.draw(source.getrandbits(256))
        drawn[story.plot, story.options, story.facts["hero"]] += 1
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn[key] - draws * p) ** 2 / (draws * p) for key, p in expected.items())
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_story_parses_back_to_its_choices():
    for story in meadow.generate(seed=1, count=1000):
        parsed = meadow.parse(story.text)
        assert parsed == story
        assert parsed.text == story.text
        assert math.isfinite(meadow.log_probability(story.text))


def test_log_probability_counts_every_choice_of_a_known_story():
    text = (
        "On a sunny morning, Max the puppy sat by the gate. He got a green lamp from a crow. "
        "After that, Nora the swan came from the pond. "
        "It was Nora's birthday, so Max offered her the lamp. Full of joy, Nora took the lamp and danced. "
        "In the end, Nora had the green lamp. Back by the gate, Max felt glad."
    )
    sentences = 3 * 3 * 3 * 2 * 4 * 3 * 3
    words = (5 * 3) * (8 * 8) * (6 * 6) * (6 * 10) * 3  # sky, names, places, color and thing, feeling
    assert meadow.log_probability(text) == pytest.approx(-math.log(4 * sentences * words), rel=1e-12)


@pytest.mark.parametrize("text", ["", "Hello.", "One sunny morning, Pip the fox was by the pond."])
def test_other_texts_have_no_reading_and_no_probability(text: str):
    assert meadow.parse(text) is None
    assert meadow.log_probability(text) == float("-inf")
    with pytest.raises(ValueError, match="expected Meadow stories"):
        meadow.floor([text])


def test_stories_are_the_same_everywhere():
    texts = "\n\n".join(meadow.story(seed, index) for seed in (0, 7) for index in range(500))
    assert (
        hashlib.sha256(texts.encode()).hexdigest() == "8a2c10ebd194df7e53764e99a4406a389304a137304a0fa0ec513ba1e42a1053"
    )
    assert [story.text for story in meadow.generate(7, 3)] == [meadow.story(7, index) for index in range(3)]


def test_stories_are_plain_lines_that_end_with_a_period():
    for text in meadow.corpus(0, 500, "train"):
        assert text.isascii()
        assert text.isprintable()
        assert text.endswith(".")
        assert "  " not in text
        assert len(text.split()) <= 90


def test_splits_share_no_story_and_have_one_distribution():
    train = list(meadow.corpus(0, 6000, "train"))
    validation = list(meadow.corpus(1, 2000, "validation"))
    assert {meadow.split_of(text) for text in train} == {"train"}
    assert {meadow.split_of(text) for text in validation} == {"validation"}
    assert len(set(train)) == 6000
    means, errors = [], []
    for texts in (train, validation):
        nats = [-meadow.log_probability(text) for text in texts]
        mean = sum(nats) / len(nats)
        means.append(mean)
        errors.append(sum((x - mean) ** 2 for x in nats) / len(nats) ** 2)
    assert abs(means[0] - means[1]) < 4 * math.sqrt(sum(errors))
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        next(meadow.corpus(0, 1, "test"))


def test_the_space_is_far_larger_than_any_corpus():
    assert meadow.space_size() > 1000 * 10**7


def test_floor_is_the_mean_surprise():
    texts = list(meadow.corpus(0, 20, "validation"))
    floor = meadow.floor(texts)
    assert floor.nats == pytest.approx(-sum(meadow.log_probability(text) for text in texts))
    assert floor.nats_per_character == pytest.approx(floor.nats / sum(len(text) for text in texts))
    assert floor.nats_per_story == pytest.approx(floor.nats / 20)
    assert 22 < floor.nats_per_story < 25
    with pytest.raises(ValueError, match="at least one"):
        meadow.floor([])


def test_competing_sentences_part_in_literal_words():
    grammar = meadow.grammar()
    plots = list(grammar._lines.values())
    opening = len(WORLD.opening)
    event = tuple(template for lines in plots for template in lines[opening])  # here the plot is chosen, too
    endings = [lines[opening + 1] for lines in plots]
    shared = [plots[0][index] for index in (*range(opening), *range(opening + 2, len(plots[0])))]
    for line in [event, *endings, *shared]:
        for one, other in itertools.combinations(line, 2):
            assert parting(one, other) == "literal", (one.pieces, other.pieces)


def parting(one: Template, other: Template) -> str:
    """Say at what two sentences part: at a "slot" or within their "literal" words."""
    for a, b in zip(one.pieces, other.pieces, strict=False):
        if a == b:
            continue
        if isinstance(a, Slot) or isinstance(b, Slot):
            return "slot"
        return "slot" if a.startswith(b) or b.startswith(a) else "literal"
    return "slot"


def test_names_come_before_pronouns_and_articles_fit():
    for story in meadow.generate(seed=2, count=2000):
        named = set()
        for mention in meadow.grammar().read(story.text).mentions:
            if mention.slot.form in ("", "at"):
                named.add(mention.slot.variable)
            else:
                assert mention.slot.variable in named
        words = story.text.split()
        assert not any(a in ("a", "A") and b[0] in "aeiou" for a, b in itertools.pairwise(words))


def test_words_of_different_classes_never_meet():
    words = [word.split()[-1] for values in WORLD.words.values() for word in values]
    words += [character.kind for character in WORLD.characters.values()]
    assert len(words) == len(set(words))
    assert set(WORLD.characters) == set(WORLD.words["hero"] + WORLD.words["friend"])


def test_questions_have_answers_that_differ_and_agree_with_the_story():
    story = meadow.parse(
        "One windy morning, Ned the mole was at the mill. He had a white lamp. "
        "Soon he met Otto the bear in the meadow. "
        '"May I borrow the lamp for a week?" asked Otto. The week went by, but Otto kept it. '
        "In the end, Otto had the white lamp. Back at the mill, Ned felt sad."
    )
    answers = {q.question: (q.answer, q.wrong_answer) for q in meadow.questions(story)}
    assert answers["Who had the white lamp in the end?"] == ("Otto had it.", "Ned had it.")
    assert answers["What kind of animal was Otto?"] == ("Otto was a bear.", "Otto was a mole.")
    assert answers["Where did the story begin?"] == ("It began at the mill.", "It began in the meadow.")
    assert answers["How did Ned feel in the end?"] == ("Ned felt sad.", "Ned felt happy.")
    assert answers["What color was the lamp?"] == ("The lamp was white.", "The lamp was golden.")
    for story in meadow.generate(seed=3, count=200):
        assert all(question.answer != question.wrong_answer for question in meadow.questions(story))


def test_labels_are_balanced_and_follow_the_feeling():
    stories = list(meadow.generate(seed=4, count=2000))
    for story in stories:
        assert story.facts["feeling"] in WORLD.words[meadow.label(story)]
    assert 0.45 < sum(meadow.label(story) == "happy" for story in stories) / 2000 < 0.55


def five_gram_stories(training: Iterator[str], count: int) -> list[str]:
    """Sample stories from the word 5-gram model of the training stories, at temperature 1."""
    followers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for text in training:
        words = ["<s>"] * 4 + text.split() + ["</s>"]
        for end in range(4, len(words)):
            followers[tuple(words[end - 4 : end])].append(words[end])
    source, stories = random.Random(0), []
    for _ in range(count):
        words = ["<s>"] * 4
        while words[-1] != "</s>":
            words.append(source.choice(followers[tuple(words[-4:])]))
        stories.append(" ".join(words[4:-1]))
    return stories


def test_a_five_gram_model_does_not_carry_facts():
    score = meadow_score.score(five_gram_stories(meadow.corpus(0, 4000, "train"), 300))
    assert score.consistent <= 0.30


@pytest.mark.slow
def test_a_five_gram_model_of_a_large_corpus_does_not_carry_facts():
    score = meadow_score.score(five_gram_stories(meadow.corpus(0, 50_000, "train"), 1000))
    assert score.consistent <= 0.30
