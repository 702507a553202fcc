"""The words and sentences of Meadow, the small world of the embedded corpus.

This is data alone: it knows nothing of drawing, reading or scoring stories (see meadow_grammar.py). A template is a
sentence with slots: `{variable}` is the variable's word, `{form:variable}` another form of it (`{at:place}` is "by the
pond", `{He:hero}` is "He" or "She"). Rules that the tests check:

- Sentences that compete for one position part company in their literal words, never at a slot. So each choice is
  visible where it is made: a text has at most one reading, and a slot whose variable was named before is determined.
- A variable is mentioned by name before any pronoun stands for it.
- No word after "a" starts with a vowel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# variable -> (the word class it is drawn from, the variables it must differ from)
VARIABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "weather": ("weather", ()),
    "time": ("time", ()),
    "hero": ("name", ()),
    "animal": ("animal", ()),
    "place": ("place", ()),
    "color": ("color", ()),
    "thing": ("thing", ()),
    "friend": ("name", ("hero",)),
    "animal2": ("animal", ("animal",)),
    "place2": ("place", ("place",)),
    "place3": ("place", ("place", "place2")),
    "color2": ("color", ()),
    "thing2": ("thing", ("thing",)),
    "day": ("day", ()),
    "feeling": ("feeling", ()),  # the plot's ending narrows it to the happy or the sad words
}

# A role is a second name for a variable; which one, the ending of the plot decides.
ROLES: Mapping[str, str] = {"owner": "name", "owned": "thing", "owned_color": "color"}

PRONOUNS: Mapping[str, tuple[str, str]] = {  # form -> (for him, for her)
    "he": ("he", "she"),
    "He": ("He", "She"),
    "him": ("him", "her"),
    "his": ("his", "her"),
    "himself": ("himself", "herself"),
}


@dataclass(frozen=True)
class Plot:
    """What happens between hero and friend: the event, its good and bad endings, and who then owns what."""

    event: tuple[str, ...]
    good: tuple[str, ...]
    bad: tuple[str, ...]
    good_roles: Mapping[str, str]
    bad_roles: Mapping[str, str]


@dataclass(frozen=True)
class World:
    """Words by class and the sentences of a story: opening positions, one plot (event, ending), closing positions."""

    words: Mapping[str, tuple[str, ...]]
    opening: tuple[tuple[str, ...], ...]
    plots: Mapping[str, Plot]
    closing: tuple[tuple[str, ...], ...]


_HERO_KEEPS = {"owner": "hero", "owned": "thing", "owned_color": "color"}
_FRIEND_KEEPS = {"owner": "friend", "owned": "thing", "owned_color": "color"}
_HERO_TRADES = {"owner": "hero", "owned": "thing2", "owned_color": "color2"}

HE_NAMES = ("Pip", "Otto", "Finn", "Hugo", "Max", "Theo", "Leo", "Sam", "Toby", "Ned", "Gus", "Bram")
SHE_NAMES = ("Daisy", "Mia", "Ruby", "Nell", "Lulu", "Ivy", "Ella", "Tess", "Poppy", "Lily", "Nora", "Zoe")

WORDS: Mapping[str, tuple[str, ...]] = {
    "he-name": HE_NAMES,
    "she-name": SHE_NAMES,
    "name": HE_NAMES + SHE_NAMES,
    "animal": (
        *("mouse", "rabbit", "fox", "duck", "frog", "bear", "squirrel", "hedgehog"),
        *("goat", "cat", "badger", "lamb", "mole", "beaver", "pony", "hen"),
    ),
    "thing": (
        *("ball", "kite", "drum", "hat", "bell", "boat", "book", "lamp"),
        *("scarf", "cup", "basket", "ribbon", "whistle", "spoon", "blanket", "flute"),
    ),
    "color": ("red", "blue", "green", "yellow", "white", "purple", "pink", "golden"),
    "place": (  # with the preposition of {at:place}; {place} is the last word alone
        *("in the garden", "by the river", "on the hill", "in the barn", "by the pond", "at the mill"),
        *("in the forest", "on the beach", "at the market", "in the meadow", "by the bridge", "on the farm"),
    ),
    "weather": ("sunny", "windy", "rainy", "foggy", "cold", "warm", "bright", "cloudy"),
    "time": ("morning", "afternoon", "evening", "day"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "happy": ("happy", "glad", "proud", "cheerful", "merry", "joyful"),
    "sad": ("sad", "gloomy", "unhappy", "lonely", "sorry", "upset"),
}

WORLD = World(
    words=WORDS,
    opening=(
        (
            "One {weather} {time}, {hero} the {animal} was playing {at:place}.",
            "On a {weather} {time}, {hero} the {animal} sat {at:place}.",
            "It was a {weather} {time}, and {hero} the {animal} was resting {at:place}.",
            "Once upon a time, {hero} the {animal} lived {at:place}.",
        ),
        (
            "{He:hero} had a {color} {thing} that {he:hero} loved very much.",
            "{He:hero} found a {color} {thing} behind a big stone.",
            "{He:hero} had made a {color} {thing} all by {himself:hero}.",
            "{He:hero} got a {color} {thing} from an old crow.",
        ),
        (
            "Then {he:hero} took it to the {place2} to show {friend} the {animal2}.",
            "Soon {he:hero} carried it to the {place2}, where {friend} the {animal2} was waiting.",
            "After that, {he:hero} walked to the {place2} and met {friend} the {animal2}.",
            "When {friend} the {animal2} called from the {place2}, {hero} ran over.",
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
                "Full of joy, {friend} the {animal2} took the {thing} and danced.",
                "Nobody had ever been so kind to {friend}, who took it at once.",
            ),
            bad=(
                "But {friend} did not like it and gave it back.",
                "Sadly, {friend} only said no and walked away.",
                "Alas, {friend} said that the {thing} was ugly and turned away.",
            ),
            good_roles=_FRIEND_KEEPS,
            bad_roles=_HERO_KEEPS,
        ),
        "loss": Plot(
            event=(
                "While they were playing, {hero} lost the {thing} {at:place3}.",
                "All at once, the wind blew the {thing} away to the {place3}.",
                "On the way home, the {thing} fell from {his:hero} bag {at:place3}.",
            ),
            good=(
                "The next day, {friend} found it there and brought it back.",
                "But {friend} looked {at:place3} until {he:friend} found it, and gave it back.",
                "By good luck, {friend} the {animal2} found it and gave it back.",
            ),
            bad=(
                "But {friend} found it there and kept it.",
                "By bad luck, {friend} was the first to find it and kept it.",
                "In secret, {friend} went to the {place3} and took it.",
            ),
            good_roles=_HERO_KEEPS,
            bad_roles=_FRIEND_KEEPS,
        ),
        "race": Plot(
            event=(
                '"Let us race to the {place3} for the {thing}," said {friend}.',
                "Together they ran a race to the {place3} to win the {thing}.",
                "To win the {thing}, they had to be first {at:place3}.",
            ),
            good=(
                "With one last jump, {hero} got to the {place3} first.",
                "They ran and ran, and {hero} was the first {at:place3}.",
                "Near the end {friend} fell, and {hero} won.",
            ),
            bad=(
                "But {friend} was much faster and got to the {place3} first.",
                "They ran and ran, but {friend} was the first {at:place3}.",
                "At the last tree {hero} fell, and {friend} won.",
            ),
            good_roles=_HERO_KEEPS,
            bad_roles=_FRIEND_KEEPS,
        ),
        "trade": Plot(
            event=(
                '"I will give you my {color2} {thing2} for it," said {friend}.',
                "That day {friend} had a {color2} {thing2} and wanted to trade.",
                "As it happened, {friend} had brought a {color2} {thing2} to trade.",
            ),
            good=(
                "So they traded, and both of them laughed.",
                "After some thought, {hero} said yes, and they traded.",
                "It was a fair trade, so {hero} gave {friend} the {thing}.",
            ),
            bad=(
                "But after some thought, {friend} said no.",
                "They talked for an hour, but they did not trade.",
                "In the end {hero} asked for more, and {friend} walked away.",
            ),
            good_roles=_HERO_TRADES,
            bad_roles=_HERO_KEEPS,
        ),
        "loan": Plot(
            event=(
                '"May I borrow the {thing} until {day}?" asked {friend}.',
                "So {friend} asked to borrow the {thing} until {day}.",
                "Until {day}, {hero} lent the {thing} to {friend}.",
            ),
            good=(
                "On {day}, {friend} brought it back to the {place}.",
                "When {day} came, {friend} gave it back.",
                "As promised, {friend} the {animal2} gave it back on {day}.",
            ),
            bad=(
                "But {day} came and went, and {friend} kept it.",
                "When {day} came, {friend} said no and kept it.",
                "Weeks went by, but {friend} never gave it back.",
            ),
            good_roles=_HERO_KEEPS,
            bad_roles=_FRIEND_KEEPS,
        ),
    },
    closing=(
        (
            "In the end, {owner} had the {owned_color} {owned}.",
            "So it was {owner} who took the {owned_color} {owned} home.",
            "And so the {owned_color} {owned} belonged to {owner}.",
            "From then on, {owner} was the one with the {owned_color} {owned}.",
        ),
        (
            "All the way back to the {place}, {hero} the {animal} felt {feeling}.",
            "Back {at:place}, {hero} the {animal} felt {feeling}.",
            "That night {hero} the {animal} came back to the {place}, {feeling} and tired.",
            "When {he:hero} came home to the {place}, {hero} was {feeling}.",
        ),
    ),
)
