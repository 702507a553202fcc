"""A story grammar: draws stories, reads them back, judges their facts and states their exact probability.

It works on any World of words and sentences (meadow_world.py holds the real one; tests use tiny ones) and knows nothing
of seeds, corpora, splits or what is later asked about a story. A few uniform choices decide a story: the plot, one
sentence at each position, one word for each variable that those sentences mention.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llamita.data.meadow_world import OWNER, PRONOUNS, VARIABLES, World


class Slot(NamedTuple):
    """A place in a sentence that a variable (or the owner) fills, in some form: "", "at", "kind" or a pronoun."""

    variable: str
    form: str


class Mention(NamedTuple):
    """A slot as found in a text: text[start:end] == words."""

    slot: Slot
    words: str
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """A text as the grammar reads it, whether or not its facts agree."""

    plot: str
    options: tuple[int, ...]
    mentions: tuple[Mention, ...]


@dataclass(frozen=True)
class Story:
    """A consistent story: the choices that made it and its text."""

    plot: str
    options: tuple[int, ...]  # which sentence, at each position
    facts: Mapping[str, str]  # variable -> word
    good_ending: bool
    text: str = field(compare=False)


class Template(NamedTuple):
    """A compiled sentence."""

    pieces: tuple[str | Slot, ...]
    slots: tuple[Slot, ...]
    pattern: re.Pattern[str]


class Grammar:
    """The stories that a World can tell."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._places = {place.split()[-1]: place for place in (*world.words["home"], *world.words["outing"])}
        self._lines: dict[str, tuple[tuple[Template, ...], ...]] = {}
        for name, plot in world.plots.items():
            sentences = (*world.opening, plot.event, plot.good + plot.bad, *world.closing)
            self._lines[name] = tuple(tuple(self._compile(sentence) for sentence in line) for line in sentences)
        self._outcome = len(world.opening) + 1  # the position of the plot's ending

    def draw(self, number: int) -> Story:
        """Return the story that a large random number spells: its digits, in a mixed radix, are the choices.

        With a uniform number of 2**256 values the choices are uniform but for a bias below 2**-150.
        """
        plots = tuple(self.world.plots)
        number, digit = divmod(number, len(plots))
        plot = plots[digit]
        options = []
        for line in self._lines[plot]:
            number, digit = divmod(number, len(line))
            options.append(digit)
        facts: dict[str, str] = {}
        for variable in self._variables(plot, tuple(options)):
            words = self._domain(plot, tuple(options), variable)
            number, digit = divmod(number, len(words))
            facts[variable] = words[digit]
        return self.story(plot, tuple(options), facts)

    def story(self, plot: str, options: tuple[int, ...], facts: Mapping[str, str]) -> Story:
        """Return the story of these choices, with its text."""
        roles = {OWNER: self.owner(plot, options)}
        words: list[str] = []
        for line, option in zip(self._lines[plot], options, strict=True):
            for piece in line[option].pieces:
                if isinstance(piece, Slot):
                    words.append(self._spell(piece.form, facts[roles.get(piece.variable, piece.variable)]))
                else:
                    words.append(piece)
            words.append(" ")
        return Story(plot, options, facts, self.good_ending(plot, options), "".join(words[:-1]))

    def read(self, text: str) -> Reading | None:
        """Return how the grammar reads a text, any word of the right class in every slot; None where it does not."""
        for plot in self._lines:
            reading = self._read(text, plot)
            if reading is not None:
                return reading
        return None

    def facts(self, reading: Reading) -> tuple[dict[str, str], list[Mention]]:
        """Return the facts of a reading by their first mention, and the mentions that contradict them."""
        roles = {OWNER: self.owner(reading.plot, reading.options)}
        facts: dict[str, str] = {}
        faults: list[Mention] = []
        for mention in reading.mentions:
            variable, form = mention.slot
            variable = roles.get(variable, variable)
            if variable not in facts:
                word = self._places.get(mention.words.split()[-1], mention.words)
                if word not in self._domain(reading.plot, reading.options, variable):
                    faults.append(mention)
                facts[variable] = word
            elif self._spell(form, facts[variable]) != mention.words:
                faults.append(mention)
        return facts, faults

    def parse(self, text: str) -> Story | None:
        """Return the story that renders to exactly this text; None where there is none."""
        reading = self.read(text)
        if reading is None:
            return None
        facts, faults = self.facts(reading)
        if faults:
            return None
        return Story(reading.plot, reading.options, facts, self.good_ending(reading.plot, reading.options), text)

    def log_probability(self, story: Story) -> float:
        """Return the natural logarithm of the exact probability of a story (which has one reading only)."""
        ways = len(self._lines)
        for line in self._lines[story.plot]:
            ways *= len(line)
        return -math.log(ways * self._assignments(story.plot, story.options))

    def size(self) -> int:
        """Return the exact number of different stories."""
        total = 0
        for plot, lines in self._lines.items():
            total += sum(self._assignments(plot, options) for options in _tuples([len(line) for line in lines]))
        return total

    def good_ending(self, plot: str, options: tuple[int, ...]) -> bool:
        """Say whether the plot ends well."""
        return options[self._outcome] < len(self.world.plots[plot].good)

    def owner(self, plot: str, options: tuple[int, ...]) -> str:
        """Return the variable that the owner is, as the plot ends: "hero" or "friend"."""
        ending = self.world.plots[plot]
        return ending.good_owner if self.good_ending(plot, options) else ending.bad_owner

    def _variables(self, plot: str, options: tuple[int, ...]) -> list[str]:
        """Return the variables that these sentences mention, in the order in which they are drawn."""
        roles = {OWNER: self.owner(plot, options)}
        mentioned: set[str] = set()
        for line, option in zip(self._lines[plot], options, strict=True):
            mentioned.update(roles.get(slot.variable, slot.variable) for slot in line[option].slots)
        return [variable for variable in VARIABLES if variable in mentioned]

    def _domain(self, plot: str, options: tuple[int, ...], variable: str) -> tuple[str, ...]:
        """Return the words that a variable is drawn from."""
        word_class = VARIABLES[variable][0]
        if word_class == "feeling":
            word_class = "happy" if self.good_ending(plot, options) else "sad"
        return self.world.words[word_class]

    def _assignments(self, plot: str, options: tuple[int, ...]) -> int:
        """Return in how many ways words can be given to the variables of these sentences."""
        variables = self._variables(plot, options)
        return math.prod(len(self._domain(plot, options, variable)) for variable in variables)

    def _spell(self, form: str, word: str) -> str:
        """Return a word in a form of it."""
        if form == "kind":
            return self.world.characters[word].kind
        if form in PRONOUNS:
            return PRONOUNS[form][0 if self.world.characters[word].he else 1]
        return word if form == "at" else word.split()[-1]

    def _compile(self, sentence: str) -> Template:
        """Compile "... {form:variable} ..." into its pieces and a pattern with one group a slot."""
        pieces: list[str | Slot] = []
        pattern: list[str] = []
        for index, piece in enumerate(re.split(r"\{([^}]*)\}", sentence)):
            if index % 2 == 0:
                pieces.append(piece)
                pattern.append(re.escape(piece))
                continue
            form, _, variable = piece.rpartition(":")
            classes = VARIABLES["hero" if variable == OWNER else variable][1]
            values = [word for word_class in classes for word in self.world.words[word_class]]
            pieces.append(Slot(variable, form))
            pattern.append("(" + "|".join(sorted({re.escape(self._spell(form, value)) for value in values})) + ")")
        slots = tuple(piece for piece in pieces if isinstance(piece, Slot))
        return Template(tuple(pieces), slots, re.compile("".join(pattern) + " "))

    def _read(self, text: str, plot: str) -> Reading | None:
        """Read a text as a story of one plot."""
        text += " "  # every sentence is then followed by one space
        position = 0
        options: list[int] = []
        mentions: list[Mention] = []
        for line in self._lines[plot]:
            for option, template in enumerate(line):
                match = template.pattern.match(text, position)
                if match is None:
                    continue
                options.append(option)
                for group, slot in enumerate(template.slots, start=1):
                    mentions.append(Mention(slot, match[group], match.start(group), match.end(group)))
                position = match.end()
                break
            else:
                return None
        return Reading(plot, tuple(options), tuple(mentions)) if position == len(text) else None


def _tuples(radices: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield every tuple of digits below the radices."""
    for number in range(math.prod(radices)):
        digits = []
        for radix in radices:
            number, digit = divmod(number, radix)
            digits.append(digit)
        yield tuple(digits)
