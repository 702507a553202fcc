"""Conversations from files, datasets and Meadow: what is read, how it is split, and a place for every mistake."""

import json

import pytest

from llamita.data import meadow
from llamita.data.conversations import (
    BadRecords,
    ConversationSource,
    conversation,
    conversations,
    for_validation,
    split,
)

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path, *records):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


def test_both_forms_and_their_places(tmp_path):
    pair = {"prompt": "Hi", "response": "Hello", "id": 3}
    first = write(tmp_path / "a.jsonl", {"messages": TURNS, "tools": [{"name": "look"}]}, "", pair)
    second = write(tmp_path / "b.jsonl", {"prompt": "Hi", "completion": "Hello"})
    found = list(conversations(ConversationSource(files=(first, second))))
    assert [list(each.messages) for each in found] == [TURNS] * 3
    assert [each.where for each in found] == [f"{first}, line 1", f"{first}, line 3", f"{second}, line 1"]
    assert [each.tools for each in found] == [[{"name": "look"}], None, None]
    limited = list(conversations(ConversationSource(files=(first, second), limit=1)))
    assert [each.where for each in limited] == [f"{first}, line 1"]


def test_a_dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for name, record in (("set", {"messages": TURNS}), ("other", {"text": "Hi"})):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", record)
    (found,) = conversations(ConversationSource(dataset=str(tmp_path / "set")))
    assert [dict(each) for each in found.messages] == TURNS
    with pytest.raises(ValueError, match=r"other \(train\), row 0 has the fields \['text'\]"):
        list(conversations(ConversationSource(dataset=str(tmp_path / "other"))))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ([1], "line 2 is list, not an object; expected"),
        ({"text": "Hi"}, r"line 2 has the fields \['text'\]; expected .*messages.*prompt"),
        ({"prompt": "Hi"}, r"line 2 has the fields \['prompt'\]"),
        ({"prompt": "Hi", "response": None}, "line 2: response is NoneType, not text"),
        ({"messages": []}, "line 2: messages must be a list of at least one"),
        ({"messages": "Hi"}, "line 2: messages must be a list"),
        ({"messages": [TURNS[0], "Hello"]}, "line 2: message 1 must be an object with a role and a content"),
        ({"messages": [{"content": "Hi"}]}, "line 2: message 0 must be an object with a role"),
        ({"messages": [{"role": "user", "content": 5}]}, "line 2: message 0 has a content that is int"),
        ({"prompt": TURNS[:1], "completion": [{"role": "user"}, 5]}, "line 2: completion: message 1 must be an object"),
        (
            {"conversations": [{"from": "alice", "value": "Hi"}]},
            "line 2: message 0 is from 'alice'; expected one of human",
        ),
        ({"messages": TURNS, "system": ["s"]}, "line 2: system is list, not text"),
        ({"messages": TURNS, "functions": [{"name": "look"}]}, "line 2: functions is the older form of tools"),
        ({"messages": TURNS, "chat_template_kwargs": {"tools": []}}, "line 2: chat_template_kwargs must .*'tools'"),
        ({"messages": TURNS, "chat_template_kwargs": "x"}, "line 2: chat_template_kwargs must be an object .*'x'"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(tmp_path, record, message):
    file = write(tmp_path / "a.jsonl", {"messages": TURNS}, record)
    with pytest.raises(ValueError, match=message) as found:
        list(conversations(ConversationSource(files=(file,))))
    assert str(found.value).startswith(str(file))
    assert "\n" not in str(found.value)


def test_records_that_cannot_be_read_are_skipped_where_that_is_asked(tmp_path):
    good = {"messages": TURNS}
    file = write(tmp_path / "a.jsonl", good, "{broken", {"text": "Hi"}, [1], {**good, "tools": 3}, {**good, "n": 1})
    bad = BadRecords(skip=True)
    found = list(conversations(ConversationSource(files=(file,)), bad))
    assert [each.where for each in found] == [f"{file}, line 1", f"{file}, line 6"]
    assert bad.count == 4
    assert [line.partition(", ")[2][:6] for line in bad.lines()] == ["line 2", "line 3", "line 4", ""]
    assert bad.lines()[-1] == "skipped: 1 more"


@pytest.mark.parametrize("key", ["prompt", "completion", "messages", "conversations"])
def test_messages_in_sharegpts_form_are_those_that_trl_makes_of_them(key):
    """`human` and `gpt` trl leaves to the template; here they are the roles that are meant."""
    trl_data = pytest.importorskip("trl.data_utils")
    said = [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]
    rest = {"prompt": {"completion": "c"}, "completion": {"prompt": "c"}}.get(key, {})
    found = conversation({key: said, **rest}, "here").messages
    renamed = [{**message, "from": name} for message, name in zip(said, ("system", "human", "gpt"), strict=True)]
    assert conversation({key: renamed, **rest}, "here").messages == found
    theirs = trl_data.maybe_convert_to_chatml({key: [dict(message) for message in said]})
    wanted = theirs["messages" if key == "conversations" else key]
    assert [{name: m[name] for name in ("role", "content")} for m in found if m["content"] != "c"] == wanted


def test_of_a_prompt_that_is_a_conversation_the_completion_alone_is_learned():
    before = [TURNS[0], {"role": "assistant", "content": "Hm?"}, TURNS[0]]
    found = conversation({"prompt": before, "completion": [TURNS[1]]}, "here")
    assert found.messages == (TURNS[0], {**before[1], "weight": 0}, TURNS[0], TURNS[1])


def test_a_system_message_in_a_field_of_its_own_comes_first():
    system = {"role": "system", "content": "Be brief."}
    for form in ({"messages": TURNS}, {"prompt": "Hi", "response": "Hello"}):
        assert conversation({**form, "system": "Be brief."}, "here").messages == (system, *TURNS)
    for other in ("Be long.", "", None):
        assert conversation({"messages": [system, *TURNS], "system": other}, "here").messages == (system, *TURNS)


def test_tools_count_in_every_form():
    tools = [{"type": "function", "function": {"name": "look"}}]
    for form in ({"messages": TURNS}, {"prompt": "Hi", "response": "Hello"}, {"prompt": "Hi", "completion": "Hello"}):
        for given in (tools, json.dumps(tools)):
            assert conversation({**form, "tools": given}, "x").tools == tools
        for none in ([], None, ""):
            assert conversation({**form, "tools": none}, "x").tools is None
        with pytest.raises(ValueError, match=r"^x: tools must be a list of objects, got \['look'\]"):
            conversation({**form, "tools": ["look"]}, "x")


def test_an_array_of_conversations(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"messages": TURNS}, {"prompt": "Hi"}], indent=2))
    with pytest.raises(ValueError, match=r"a\.jsonl, entry 2 \(line \d+\) has the fields \['prompt'\]"):
        list(conversations(ConversationSource(files=(tmp_path / "a.jsonl",))))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.jsonl"):
        conversations(ConversationSource(files=(tmp_path / "none.jsonl",)))
    with pytest.raises(IsADirectoryError, match="is a directory"):
        conversations(ConversationSource(files=(tmp_path,)))


def test_equal_conversations_lie_on_one_side():
    made = [conversation({"prompt": f"number {i % 300}", "response": "yes"}, f"line {i}") for i in range(900)]
    train, validation = split(iter(made), 0.2, seed=1)
    assert len(train) + len(validation) == 900
    assert 0.1 < len(validation) / 900 < 0.3
    said = [{each.messages[0]["content"] for each in side} for side in (train, validation)]
    assert not said[0] & said[1]
    assert split(iter(made), 0.0, seed=1) == (made, [])
    other = split(iter(made), 0.2, seed=2)[1]
    assert {each.messages[0]["content"] for each in other} != said[1]


def test_meadow_validates_on_stories_of_its_other_split():
    source = ConversationSource(meadow="train", limit=40, seed=2)
    sides = {"train": source, "validation": for_validation(source, 0.1)}
    for name, side in sides.items():
        found = list(conversations(side))
        assert len(found) == {"train": 40, "validation": 4}[name]
        stories = [each.messages[0]["content"].rpartition("\n")[0] for each in found]
        assert {meadow.split_of(story) for story in stories} == {name}
