"""The prompts of a benchmark: their lengths, that they differ, and what files may hold."""

import json
from pathlib import Path

import pytest

from llamita.data import meadow
from llamita.workflows.benchmark.prompts import FilePrompts, StoryPrompts, as_text


@pytest.mark.parametrize("words", [1, 16, 700])
def test_a_story_prompt_has_the_words_that_were_asked_for(words: int) -> None:
    texts = [as_text(StoryPrompts(words, seed=1).messages(number)) for number in range(20)]
    assert [len(text.split()) for text in texts] == [words] * 20
    if words > 1:
        assert len(set(texts)) == 20


def test_story_prompts_are_a_function_of_seed_and_number_and_meadows_words() -> None:
    prompts = StoryPrompts(50, seed=1)
    assert prompts.messages(3) == StoryPrompts(50, seed=1).messages(3)
    assert prompts.messages(3) != StoryPrompts(50, seed=2).messages(3)
    known = {word for index in range(3000) for word in meadow.story(9, index).split()}
    assert set(as_text(prompts.messages(3)).split()) <= known


def test_a_text_file_has_a_prompt_a_line_and_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One day.\n\nWhy é?\r\n")
    prompts = FilePrompts(path)
    assert [as_text(prompts.messages(number)) for number in range(3)] == ["One day.", "Why é?", "One day."]


def test_records_hold_texts_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path.write_text(json.dumps({"prompt": "Once"}) + "\n" + json.dumps({"messages": said}) + "\n")
    prompts = FilePrompts(path)
    assert prompts.messages(0) == [{"role": "user", "content": "Once"}]
    assert prompts.messages(1) == said
    with pytest.raises(ValueError, match="completions takes plain texts, got messages of system, user"):
        FilePrompts(path, plain=True)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="has no prompt; write one a line"):
        FilePrompts(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError):
        FilePrompts(tmp_path / "none.txt")
