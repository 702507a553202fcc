"""Meadow, the embedded corpus: short stories about animals that find, lose, lend and trade things.

A story is a pure function of (seed, index), the same on every platform. Its exact probability is known, so the loss
that no model can beat (the floor) is known too. From the same facts come questions with right and wrong answers, and a
happy-or-sad label. Knows nothing of tokens, files or models.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from llamita.data.meadow_grammar import Grammar, Story
from llamita.data.meadow_world import WORLD

VALIDATION_SHARE = 16  # one story in this many belongs to the validation split


@dataclass(frozen=True)
class Floor:
    """The least expected loss over some stories."""

    nats: float  # the sum of -log p over whole stories
    characters: int  # separators between stories not counted
    stories: int

    @property
    def nats_per_character(self) -> float:
        """The floor of a loss in nats per character."""
        return self.nats / self.characters

    @property
    def nats_per_story(self) -> float:
        """The floor of a loss in nats per story."""
        return self.nats / self.stories


@dataclass(frozen=True)
class Question:
    """A question about a story, the answer that its facts give, and a wrong one made mostly of the story's own words.

    The pair of answers serves instruction tuning (the right one) and preference tuning (both).
    """

    question: str
    answer: str
    wrong_answer: str


@functools.cache
def grammar() -> Grammar:
    """Return the grammar of the real world (compiled once: it takes some milliseconds)."""
    return Grammar(WORLD)


def generate(seed: int, count: int) -> Iterator[Story]:
    """Yield the stories (seed, 0) to (seed, count - 1), of both splits, with the choices that made them."""
    for index in range(count):
        yield _story(seed, index)


def story(seed: int, index: int) -> str:
    """Return the text of one story, a pure function of its arguments."""
    return _story(seed, index).text


def corpus(seed: int, count: int, split: Literal["train", "validation"]) -> Iterator[str]:
    """Yield the first `count` stories of a seed that belong to a split.

    A story belongs to a split by a hash of its text, so no two corpora of any seeds share a story across splits.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split={split!r} must be 'train' or 'validation'")
    index = 0
    while count > 0:
        text = story(seed, index)
        index += 1
        if split_of(text) == split:
            count -= 1
            yield text


def split_of(text: str) -> Literal["train", "validation"]:
    """Return the split that a story belongs to."""
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8, person=b"meadow-split").digest()
    return "validation" if int.from_bytes(digest, "big") % VALIDATION_SHARE == 0 else "train"


def parse(text: str) -> Story | None:
    """Return the story that renders to exactly this text, with its choices and facts; None where there is none."""
    return grammar().parse(text)


def log_probability(text: str) -> float:
    """Return the natural logarithm of the exact probability that a drawn story has this text (-inf where it cannot).

    This is the distribution of all stories, not of one split. Within a split each probability is larger by one constant
    factor (16/15 in train, 16 in validation), but only for whoever knows which texts hash into it: the membership of an
    unseen text is a pseudo-random bit that no model learns, and it is independent of everything else, so the mean over
    a split stays the same.
    """
    parsed = parse(text)
    return float("-inf") if parsed is None else grammar().log_probability(parsed)


def floor(texts: Iterable[str]) -> Floor:
    """Return the floor of the loss over whole stories (first token to end-of-story, nothing cropped).

    Raises ValueError where a text is no Meadow story.
    """
    nats, characters, stories = 0.0, 0, 0
    for text in texts:
        log_p = log_probability(text)
        if log_p == float("-inf"):
            raise ValueError(f"expected Meadow stories, got {text[:60]!r}; the floor is known for Meadow alone")
        nats -= log_p
        characters += len(text)
        stories += 1
    if stories == 0:
        raise ValueError("expected at least one Meadow story, got none")
    return Floor(nats, characters, stories)


def questions(story: Story) -> list[Question]:
    """Return the questions that a story answers."""
    facts, characters = story.facts, WORLD.characters
    hero, friend, thing, color = facts["hero"], facts["friend"], facts["thing"], facts["color"]
    kind, other_kind = characters[hero].kind, characters[friend].kind
    owner, other = (hero, friend) if grammar().owner(story.plot, story.options) == "hero" else (friend, hero)
    colors, happy, sad = (WORLD.words[word_class] for word_class in ("color", "happy", "sad"))
    opposite = dict(zip(happy + sad, sad + happy, strict=True))[facts["feeling"]]
    another_color = colors[(colors.index(color) + 1) % len(colors)]
    return [
        Question(f"Who had the {color} {thing} in the end?", f"{owner} had it.", f"{other} had it."),
        Question(f"What color was the {thing}?", f"The {thing} was {color}.", f"The {thing} was {another_color}."),
        Question(f"What kind of animal was {hero}?", f"{hero} was a {kind}.", f"{hero} was a {other_kind}."),
        Question(f"What kind of animal was {friend}?", f"{friend} was a {other_kind}.", f"{friend} was a {kind}."),
        Question("Where did the story begin?", f"It began {facts['home']}.", f"It began {facts['outing']}."),
        Question(f"Where was {friend}?", f"{friend} was {facts['outing']}.", f"{friend} was {facts['home']}."),
        Question(f"How did {hero} feel in the end?", f"{hero} felt {facts['feeling']}.", f"{hero} felt {opposite}."),
    ]


def label(story: Story) -> Literal["happy", "sad"]:
    """Return whether a story ends happily."""
    return "happy" if story.good_ending else "sad"


def space_size() -> int:
    """Return the exact number of different stories."""
    return grammar().size()


def _story(seed: int, index: int) -> Story:
    digest = hashlib.blake2b(f"{seed}:{index}".encode("ascii"), digest_size=32, person=b"meadow-story").digest()
    return grammar().draw(int.from_bytes(digest, "big"))
