"""Meadow's tasks: every answer follows from the story it is about, splits stay apart, files hold what is stated."""

import json
from itertools import islice

import pytest

from llamita.cli.main import main
from llamita.data import meadow, meadow_tasks


def asked(content):
    """The story and the question of a user's message."""
    text, _, question = content.rpartition("\n")
    return text, question


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_are_those_of_the_story_and_stories_those_of_the_split(split):
    kinds = set()
    for record in meadow_tasks.conversations(3, 70, split):
        user, assistant = record["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        text, question = asked(user["content"])
        right = {each.question: each.answer for each in meadow.questions(meadow.parse(text))}
        assert assistant["content"] == right[question]
        assert meadow.split_of(text) == split
        kinds.add(list(right).index(question))
    assert kinds == set(range(7))


def test_several_turns_ask_about_the_story_of_the_first():
    for record in meadow_tasks.conversations(3, 9, "train", turns=3):
        contents = [message["content"] for message in record["messages"]]
        text, first = asked(contents[0])
        right = {each.question: each.answer for each in meadow.questions(meadow.parse(text))}
        questions = [first, *contents[2::2]]
        assert len(set(questions)) == 3
        assert contents[1::2] == [right[question] for question in questions]
    with pytest.raises(ValueError, match="turns=8 must be between 1 and 7"):
        next(meadow_tasks.conversations(3, 1, "train", turns=8))


def test_preferences_and_labels_follow_from_the_facts():
    for record in meadow_tasks.preferences(3, 70, "train"):
        text, question = asked(record["prompt"])
        (each,) = (each for each in meadow.questions(meadow.parse(text)) if each.question == question)
        assert (record["chosen"], record["rejected"]) == (each.answer, each.wrong_answer)
        assert record["chosen"] != record["rejected"]
    found = list(meadow_tasks.labels(3, 200, "validation"))
    assert [record["label"] for record in found] == [meadow.label(meadow.parse(record["text"])) for record in found]
    assert {record["label"] for record in found} == {"happy", "sad"}


def test_stories_are_those_of_the_corpus_whatever_the_count():
    few = list(meadow_tasks.labels(5, 3, "train"))
    assert few == list(islice(meadow_tasks.labels(5, 40, "train"), 3))
    assert [record["text"] for record in few] == list(meadow.corpus(5, 3, "train"))


@pytest.mark.parametrize("kind", ["sft", "preferences", "labels"])
def test_the_verb_writes_the_records_as_json_lines(kind, tmp_path, capsys):
    file = tmp_path / "tasks.jsonl"
    arguments = ["data", "meadow-tasks", "--kind", kind, "--count", "5", "--split", "validation", "--output", str(file)]
    assert main(arguments) == 0
    assert "5 records" in capsys.readouterr().out
    lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(meadow_tasks.records(kind, 0, 5, "validation"))
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--count", "0"]) == 2
    assert "count=0 must be at least 1" in capsys.readouterr().err
    status = main([*arguments, "--overwrite", "--turns", "2"])
    assert status == (0 if kind == "sft" else 2)
    assert kind == "sft" or "turns=2 is for conversations" in capsys.readouterr().err
    changed = [json.dumps(each) for each in meadow_tasks.conversations(0, 5, "validation", 2)]
    assert file.read_text().splitlines() == (changed if kind == "sft" else lines)
