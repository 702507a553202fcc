"""The prompts that a benchmark sends: Meadow's stories cut to a length, or those of a file, over and over."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llamita.data import meadow, textfiles
from llamita.data.conversations import ConversationSource
from llamita.data.prompts import prompts

Messages = Sequence[dict[str, Any]]
RECORDS = (".json", ".jsonl")


class Prompts(Protocol):
    """The messages of each request, by its number."""

    def messages(self, number: int) -> Messages: ...


class StoryPrompts:
    """Running words of Meadow's stories, a fixed number of them, a pure function of (seed, number).

    Each begins at a random word of a story of its own, so that a server's prefix cache seldom knows one already.
    """

    def __init__(self, words: int, seed: int) -> None:
        self._words, self._seed = words, seed

    def messages(self, number: int) -> Messages:
        draw = random.Random(f"{self._seed}:{number}")
        index = draw.getrandbits(48)
        story = meadow.story(self._seed, index).split()
        words = story[draw.randrange(len(story)) :]
        while len(words) < self._words:
            index += 1
            words += meadow.story(self._seed, index).split()
        return [{"role": "user", "content": " ".join(words[: self._words])}]


class FilePrompts:
    """The prompts of a file in their order, begun again at its end.

    A text file has one a line; a .json or .jsonl file has records with `prompt` or `messages`, as `llamita rl` takes.
    ValueError where there is none or, if they must be `plain` texts, where one is not.
    """

    def __init__(self, path: Path, plain: bool = False) -> None:
        source = ConversationSource(files=(path,))
        source.check()
        self._all: list[Messages]
        if any(suffix in RECORDS for suffix in path.suffixes):
            self._all = [[dict(message) for message in prompt.said] for prompt in prompts(source)]
        else:
            self._all = [[{"role": "user", "content": line}] for line in textfiles.lines(path) if line.strip()]
        if not self._all:
            raise ValueError(f"{path} has no prompt; write one a line, or records with prompt or messages (.jsonl)")
        if plain:
            for messages in self._all:
                as_text(messages)

    def messages(self, number: int) -> Messages:
        return self._all[number % len(self._all)]


def as_text(messages: Messages) -> str:
    """Returns the text of a prompt of one user's message; ValueError for any other, which only a chat can take."""
    if len(messages) != 1 or messages[0]["role"] != "user" or not isinstance(messages[0].get("content"), str):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"--endpoint completions takes plain texts, got messages of {roles}; use --endpoint chat")
    return messages[0]["content"]
