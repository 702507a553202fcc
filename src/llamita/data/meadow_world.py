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
    """What never changes about someone."""

    kind: str
    he: bool


# form -> (for him, for her)
PRONOUNS: Mapping[str, tuple[str, str]] = {
    "he": ("he", "she"),
    "He": ("He", "She"),
    "him": ("him", "her"),
    "his": ("his", "her"),
    "himself": ("himself", "herself"),
}


@dataclass(frozen=True)
class Plot:
    """What happens between hero and friend, how it can end, and which of the two then owns the thing."""

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
    "Leo": Character("kitten", he=True),
    "Sam": Character("lamb", he=True),
    "Toby": Character("frog", he=True),
    "Ned": Character("mole", he=True),
    "Daisy": Character("duck", he=False),
    "Mia": Character("squirrel", he=False),
    "Lulu": Character("chick", he=False),
    "Tess": Character("calf", he=False),
    "Poppy": Character("fawn", he=False),
}
FRIENDS: Mapping[str, Character] = {
    "Otto": Character("bear", he=True),
    "Hugo": Character("fox", he=True),
    "Theo": Character("badger", he=True),
    "Bram": Character("goat", he=True),
    "Felix": Character("beaver", he=True),
    "Rufus": Character("wolf", he=True),
    "Nell": Character("hen", he=False),
    "Lily": Character("cow", he=False),
    "Nora": Character("swan", he=False),
    "Clara": Character("deer", he=False),
    "Hazel": Character("turtle", he=False),
    "Bella": Character("sheep", he=False),
}

WORDS: Mapping[str, tuple[str, ...]] = {
    "hero": tuple(HEROES),
    "friend": tuple(FRIENDS),
    "thing": (
        *("ball", "kite", "drum", "hat", "bell", "boat", "book", "lamp"),
        *("scarf", "cup", "basket", "ribbon", "whistle", "blanket", "flute", "mirror"),
    ),
    "color": (*("red", "blue", "green", "yellow", "white", "purple", "pink", "golden", "silver", "brown"),),
    "home": (  # with the preposition of {at:home}; {home} is the last word alone
        *("in the barn", "at the mill", "on the farm", "in the garden", "in the cottage", "in the stable"),
        *("in the castle", "in the tower", "at the inn", "by the gate"),
    ),
    "outing": (
        *("by the river", "on the hill", "by the pond", "in the forest", "on the beach", "at the market"),
        *("in the meadow", "by the bridge", "on the island", "in the valley"),
    ),
    "weather": ("sunny", "windy", "rainy", "foggy", "cold", "warm", "bright", "cloudy"),
    "time": ("morning", "afternoon", "evening", "day"),
    "happy": ("happy", "glad", "proud", "cheerful", "merry", "joyful"),
    "sad": ("sad", "gloomy", "unhappy", "lonely", "sorry", "upset"),
}

WORLD = World(
    characters={**HEROES, **FRIENDS},
    words=WORDS,
    opening=(
        (
            "One {weather} {time}, {hero} the {kind:hero} was playing {at:home}.",
            "On a {weather} {time}, {hero} the {kind:hero} sat {at:home}.",
            "It was a {weather} {time}, and {hero} the {kind:hero} was resting {at:home}.",
            "Once upon a time, {hero} the {kind:hero} lived {at:home}.",
        ),
        (
            "{He:hero} had a {color} {thing} that {he:hero} loved very much.",
            "{He:hero} found a {color} {thing} behind a big stone.",
            "{He:hero} had made a {color} {thing} all by {himself:hero}.",
            "{He:hero} got a {color} {thing} from an old crow.",
        ),
        (
            "Then {he:hero} took it to the {outing} to show {friend} the {kind:friend}.",
            "Soon {he:hero} carried it to the {outing}, where {friend} the {kind:friend} was waiting.",
            "After that, {he:hero} walked to the {outing} and met {friend} the {kind:friend}.",
            "When {friend} the {kind:friend} called from the {outing}, {hero} ran over.",
        ),
    ),
    plots={
        "gift": Plot(
            event=(
                "It was {friend}'s birthday, so {hero} offered {him:friend} the {thing}.",
                "Because {friend} looked lonely, {hero} offered {him:friend} the {thing}.",
                "As a surprise, {hero} wanted to give the {thing} to {friend}.",
            ),
            good=(
                "With a big smile, {friend} took it and said thank you.",
                "Full of joy, {friend} took the {thing} and danced.",
                "Nobody had ever been so kind to {friend}, who took it at once.",
            ),
            bad=(
                "But {friend} did not like it and gave it back.",
                "Sadly, {friend} only said no and walked away.",
                "Alas, {friend} said that the {thing} was ugly.",
            ),
            good_owner="friend",
            bad_owner="hero",
        ),
        "loss": Plot(
            event=(
                "While they were playing, {hero} lost the {thing} near the {outing}.",
                "All at once, the wind blew the {thing} across the {outing}.",
                "On the way home, the {thing} fell from {his:hero} bag.",
            ),
            good=(
                "The next day, {friend} found it and brought it back.",
                "But {friend} searched the {outing} until {he:friend} found it, and gave it back.",
                "By good luck, {friend} found it and gave it to {hero}.",
            ),
            bad=(
                "But {friend} found it and kept it.",
                "By bad luck, {friend} was the first to find it and kept it.",
                "In secret, {friend} went to the {outing} and took it.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
        "race": Plot(
            event=(
                '"Let us race to the {home} for the {thing}," said {friend}.',
                "Together they ran a race to the {home} to win the {thing}.",
                "To win the {thing}, they had to be first {at:home}.",
            ),
            good=(
                "With one last jump, {hero} got to the {home} first.",
                "They ran and ran, and {hero} was the first {at:home}.",
                "Near the end {friend} fell, and {hero} won.",
            ),
            bad=(
                "But {friend} was much faster and got to the {home} first.",
                "They ran and ran, but {friend} was the first {at:home}.",
                "At the last tree {hero} fell, and {friend} won.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
        "loan": Plot(
            event=(
                '"May I borrow the {thing} for a week?" asked {friend}.',
                "So {friend} asked to borrow the {thing} for a week.",
                "For one week, {hero} lent the {thing} to {friend}.",
            ),
            good=(
                "A week later, {friend} brought it back to the {home}.",
                "When the week was over, {friend} gave it back.",
                "As promised, {friend} gave the {thing} back.",
            ),
            bad=(
                "But the week went by, and {friend} kept it.",
                "When the week was over, {friend} said no and kept it.",
                "Many weeks went by, but {friend} never gave it back.",
            ),
            good_owner="hero",
            bad_owner="friend",
        ),
    },
    closing=(
        (
            "In the end, {owner} had the {color} {thing}.",
            "So it was {owner} who took the {color} {thing} home.",
            "And so the {color} {thing} belonged to {owner}.",
            "From then on, {owner} was the one with the {color} {thing}.",
        ),
        (
            "All the way back to the {home}, {hero} the {kind:hero} felt {feeling}.",
            "Back {at:home}, {hero} the {kind:hero} felt {feeling}.",
            "That night {hero} came back to the {home}, {feeling} and tired.",
            "When {hero} came back to the {home}, {he:hero} was {feeling}.",
        ),
    ),
)
