"""Tasks over Meadow's stories: questions with answers, right and wrong answers, texts that end happily or sadly.

What is asked, and what is right, is data/meadow.py's; this file lays it out as the records that tuning reads, one JSON
object each. A task belongs to the split of its story, so what validates is about stories that no training text tells.
Knows nothing of tokens or chat templates.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from llamita.data import meadow
from llamita.data.meadow_grammar import Story
from llamita.storage import files

Kind = Literal["sft", "preferences", "labels"]
Split = Literal["train", "validation"]


def conversations(seed: int, count: int, split: Split, turns: int = 1) -> Iterator[dict[str, Any]]:
    """Yield {"messages": [...]}: a user tells a story and asks about it, the assistant answers, `turns` times.

    The k-th story of the split is asked its questions from number k on, so that all kinds come equally often. The
    story stands in the first message alone. ValueError for more turns than a story has questions.
    """
    for number, story in enumerate(_stories(seed, count, split)):
        asked = meadow.questions(story)
        if not 1 <= turns <= len(asked):
            raise ValueError(f"turns={turns} must be between 1 and {len(asked)}, the questions that a story answers")
        messages = []
        for turn in range(turns):
            question = asked[(number + turn) % len(asked)]
            said = question.question if turn else prompt(story.text, question.question)
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": question.answer})
        yield {"messages": messages}


def preferences(seed: int, count: int, split: Split) -> Iterator[dict[str, Any]]:
    """Yield {"prompt", "chosen", "rejected"}, texts: a story with a question, its right answer, a wrong one."""
    for number, story in enumerate(_stories(seed, count, split)):
        asked = meadow.questions(story)
        question = asked[number % len(asked)]
        yield {
            "prompt": prompt(story.text, question.question),
            "chosen": question.answer,
            "rejected": question.wrong_answer,
        }


def labels(seed: int, count: int, split: Split) -> Iterator[dict[str, Any]]:
    """Yield {"text", "label"}: a story, and "happy" or "sad" as it ends."""
    for story in _stories(seed, count, split):
        yield {"text": story.text, "label": meadow.label(story)}


def prompt(story: str, question: str) -> str:
    """Returns the words of a user who asks about a story."""
    return f"{story}\n{question}"


def records(kind: Kind, seed: int, count: int, split: Split, turns: int = 1) -> Iterator[dict[str, Any]]:
    """The tasks of a kind; ValueError for one that there is not, for a count below 1, and for more turns of one that
    has none."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} is not known; use {', '.join(get_args(Kind))}")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if kind == "sft":
        return conversations(seed, count, split, turns)
    if turns != 1:
        raise ValueError(f"turns={turns} is for conversations; leave it out for {kind}")
    return preferences(seed, count, split) if kind == "preferences" else labels(seed, count, split)


def write(path: Path, kind: Kind, seed: int, count: int, split: Split, turns: int = 1, overwrite: bool = False) -> None:
    """Write tasks as JSON lines, all or none; FileExistsError where there is such a file, unless `overwrite`."""
    made = records(kind, seed, count, split, turns)
    with files.atomic_file(path, overwrite=overwrite) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in made:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _stories(seed: int, count: int, split: Split) -> Iterator[Story]:
    """The stories of `meadow.corpus`, with their facts."""
    for text in islice(meadow.corpus(seed, count, split), count):
        story = meadow.parse(text)
        assert story is not None, f"a generated story does not parse: {text}"
        yield story
