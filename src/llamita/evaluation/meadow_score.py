"""Scores stories that a model wrote against Meadow's grammar and facts.

Reads texts alone; knows nothing of where they come from or of how a model rates them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamita.data import meadow
from llamita.data.meadow_grammar import Mention, Reading
from llamita.data.meadow_world import OWNER

DISTANCE = 20  # words between a fact and the words it determines, from which on the fact counts as distant


@dataclass(frozen=True)
class MeadowScore:
    """The shares of stories that the grammar reads, and whose facts agree too."""

    stories: int
    grammatical: float  # share that the grammar reads, whatever the facts
    consistent: float  # share that is grammatical and carries every fact along, as a drawn story does
    faults: Mapping[str, int]  # variable -> mentions that contradict the story so far, over all stories

    def __str__(self) -> str:
        return f"{self.grammatical:.1%} of {self.stories} stories are grammatical, {self.consistent:.1%} consistent"


def score(texts: Iterable[str]) -> MeadowScore:
    """Scores whole stories, sampled with nothing cut off; white space around a story is ignored.

    Raises ValueError where there are no texts.
    """
    stories = grammatical = consistent = 0
    faults: Counter[str] = Counter()
    for text in texts:
        stories += 1
        reading = meadow.grammar().read(text.strip())
        if reading is None:
            continue
        grammatical += 1
        contradictions = meadow.grammar().facts(reading)[1]
        consistent += not contradictions
        faults.update(mention.slot.variable for mention in contradictions)
    if stories == 0:
        raise ValueError("expected at least one story to score, got none")
    return MeadowScore(stories, grammatical / stories, consistent / stories, dict(faults))


def determined_spans(text: str, distance: int = DISTANCE) -> list[tuple[int, int]]:
    """Returns the spans text[start:end] that only facts at least `distance` words back determine.

    Such a span names something whose latest earlier mention (for a pronoun: by name or pronoun) lies that many words
    back; no sentence of the grammar can go on differently at that point. A model that carries facts gives each word of
    it all the probability. Raises ValueError where the text is no consistent story.
    """
    grammar = meadow.grammar()
    story = meadow.parse(text)
    reading = grammar.read(text)
    if story is None or reading is None:
        raise ValueError(f"expected a consistent Meadow story, got {text[:60]!r}")
    return [
        (mention.start, mention.end)
        for mention, source in _sources(reading, grammar.owner(reading.plot, reading.options))
        if source is not None and text.count(" ", source.end, mention.start) >= distance
    ]


def _sources(reading: Reading, owner: str) -> list[tuple[Mention, Mention | None]]:
    """Returns each mention with the latest earlier one that determines its words, None where they are a free choice."""
    named: dict[str, Mention] = {}  # variable -> its latest mention by name
    latest: dict[str, Mention] = {}  # variable -> its latest mention by name or pronoun
    pairs = []
    for mention in reading.mentions:
        variable = owner if mention.slot.variable == OWNER else mention.slot.variable
        by_name = mention.slot.form in ("", "at")
        pairs.append((mention, (named if by_name else latest).get(variable)))
        latest[variable] = mention
        if by_name:
            named[variable] = mention
    return pairs
