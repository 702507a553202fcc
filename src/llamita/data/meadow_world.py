"""The words and sentences of Meadow, the small world of the embedded corpus.

This is data alone: it knows nothing of drawing, reading or scoring stories (see meadow_grammar.py). A template is a
sentence with slots: `{variable}` is the variable's word, `{form:variable}` another form of it (`{at:home}` is "in the
barn", `{He:hero}` is "He" or "She", `{kind:hero}` is "mouse"). Rules that the tests check:

- Sentences that compete for one position part company in their literal words, never at a slot. So each choice is
  visible where it is made: a text has at most one reading, and a slot whose variable was named before is determined.
- A variable is named before any other form stands for it, but for places.
- No word after "a" starts with a vowel.

Heroes and friends, homes and outings are words of their own, so each word is drawn independently of all others: a small
model then learns to carry what was drawn, in minutes, rather than to avoid what was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# variable -> (the class it is drawn from, the classes whose words the grammar reads there)
VARIABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "weather": ("weather", ("weather",)),
    "time": ("time", ("time",)),
    "hero": ("hero", ("hero", "friend")),
    "home": ("home", ("home", "outing")),
    "color": ("color", ("color",)),
    "thing": ("thing", ("thing",)),
    "friend": ("friend", ("hero", "friend")),
    "outing": ("outing", ("home", "outing")),
    "feeling": ("feeling", ("happy", "sad")),  # drawn from the happy or the sad words, as the plot ends
}

OWNER = "owner"  # a second name for hero or friend, as the plot ends


@dataclass(frozen=True)
class Character:
    """The traits of someone that never change."""

    kind: str
    he: bool


# form -> (for him, for her)
PRONOUNS: Mapping[str, tuple[str, str]] = {
    "he": ("he", "she"),
    "He": ("He", "She"),
    "him": ("him", "her"),
}


@dataclass(frozen=True)
class Plot:
    """A course of events between hero and friend, its endings, and which of the two then owns the thing."""

    event: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    good_owner: str
    bad_owner: str


@dataclass(frozen=True)
class World:
    """Words by class, and the sentences of a story: opening positions, a plot's event and ending, closing positions."""

    characters: Mapping[str, Character]
    words: Mapping[str, tuple[str, ...]]
    opening: tuple[tuple[str, ...], ...]
    plots: Mapping[str, Plot]
    closing: tuple[tuple[str, ...], ...]


HEROES: Mapping[str, Character] = {
    "Pip": Character("mouse", he=True),
    "Finn": Character("rabbit", he=True),
    "Max": Character("puppy", he=True),
    "Sam": Character("lamb", he=True),
    "Ned": Character("mole", he=True),
    "Daisy": Character("duck", he=False),
    "Mia": Character("squirrel", he=False),
    "Tess": Character("calf", he=False),
}
FRIENDS: Mapping[str, Character] = {
    "Otto": Character("bear", he=True),
    "Hugo": Character("fox", he=True),
    "Theo": Character("badger", he=True),
    "Bram": Character("goat", he=True),
    "Nell": Character("hen", he=False),
    "Nora": Character("swan", he=False),
    "Clara": Character("deer", he=False),
    "Hazel": Character("turtle", he=False),
}

WORDS: Mapping[str, tuple[str, ...]] = {
    "hero": tuple(HEROES),
    "friend": tuple(FRIENDS),
    "thing": ("ball", "kite", "drum", "hat", "bell", "book", "lamp", "scarf", "cup", "basket"),
    "color": ("red", "blue", "green", "yellow", "white", "golden"),
    # Places come with the preposition of {at:home}; {home} is the last word alone.
    "home": ("in the barn", "at the mill", "on the farm", "in the garden", "in the castle", "by the gate"),
    "outing": ("by the river", "on the hill", "by the pond", "in the forest", "at the market", "in the meadow"),
    "weather": ("sunny", "windy", "rainy", "foggy", "cold"),
    "time": ("morning", "evening", "day"),
    "happy": ("happy", "glad", "proud"),
    "sad": ("sad", "lonely", "upset"),
}

WORLD = World(
    characters={**HEROES, **FRIENDS},
    words=WORDS,
    opening=(
        (
            "One {weather} {time}, {hero} the {kind:hero} was {at:home}.",
            "On a {weather} {time}, {hero} the {kind:hero} sat {at:home}.",
            "Once upon a time, {hero} the {kind:hero} lived {at:home}.",
        ),
        (
            "{He:hero} had a {color} {thing}.",
            "{He:hero} found a {color} {thing} there.",
            "{He:hero} got a {color} {thing} from a crow.",
        ),
        (
            "Then {he:hero} took it to the {outing} to show {friend} the {kind:friend}.",
            "Soon {he:hero} met {friend} the {kind:friend} {at:outing}.",
            "After that, {friend} the {kind:friend} came from the {outing}.",
        ),
    ),
    plots={
        "gift": Plot(
            event=(
                "It was {friend}'s birthday, so {hero} offered {him:friend} the {thing}.",
                "As a surprise, {hero} offered the {thing} to {friend}.",
            ),
            good=(
                "With a big smile, {friend} took it.",
                "Full of joy, {friend} took the {thing} and danced.",
            ),
            bad=(
                "But {friend} did not like it.",
                "Sadly, {friend} said no.",
            ),
            good_owner="friend",
            bad_owner="hero",
        ),
        "loss": Plot(
            event=(
                "On the way, {hero} lost the {thing}.",
                "All at once, the wind blew it across the {outing}.",
            ),
            good=(
                "The next day, {friend} found it and brought it back.",
                "By good luck, {friend} found it and gave it to {hero}.",
            ),
            bad=(
                "But {friend} found it and kept it.",
                "In secret, {friend} went to the {outing} and took it.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
        "race": Plot(
            event=(
                '"Let us race to the {home} for the {thing}," said {friend}.',
                "To win the {thing}, they ran a race to the {home}.",
            ),
            good=(
                "With one last jump, {hero} won.",
                "Near the end {friend} fell, and {hero} won.",
            ),
            bad=(
                "But {friend} was faster and won.",
                "At the last tree {hero} fell, and {friend} won.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
        "loan": Plot(
            event=(
                '"May I borrow the {thing} for a week?" asked {friend}.',
                "For one week, {hero} lent the {thing} to {friend}.",
            ),
            good=(
                "A week later, {friend} gave it back.",
                "As promised, {friend} brought it back to the {home}.",
            ),
            bad=(
                "The week went by, but {friend} kept it.",
                "Many weeks went by, but {friend} never gave it back.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
    },
    closing=(
        (
            "In the end, {owner} had the {color} {thing}.",
            "And so the {color} {thing} belonged to {owner}.",
            "From then on, {owner} had the {color} {thing}.",
        ),
        (
            "Back {at:home}, {hero} felt {feeling}.",
            "That night {hero} came back to the {home}, {feeling} and tired.",
            "When {hero} came back to the {home}, {he:hero} was {feeling}.",
        ),
    ),
)
