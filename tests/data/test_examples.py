"""Conversations as rows: which tokens are scored, what is cut, dropped and skipped, and how rows are filled."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data.batches import IGNORE_INDEX, BatchIterator, collate
from llamita.data.conversations import BadRecords, conversation, recorded
from llamita.data.examples import ConversationRows, Counts, best_fit, encode
from llamita.data.packing import RowsConfig
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat

TOKENIZER = train_bpe_from_iterator(["a"], 262, reserved_tokens=3)  # bytes and six control tokens
R0, PLAIN = Chat(TOKENIZER, "r0"), Chat(TOKENIZER, "plain-eos")


def talk(*contents):
    """A conversation of alternating turns, the user first."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return conversation({"messages": messages}, "here")


TWO_TURNS = talk("Hi", "Yo", "ok?", "No")
# The tokens of TWO_TURNS, stretch by stretch, and whether the model learns to write them.
TABLES = {
    "r0": [
        ("<s> <r0> u s e r <r1> H i <r2>", False),
        ("<r0> a s s i s t a n t <r1>", False),
        ("Y o <r2>", True),
        ("<r0> u s e r <r1> o k ? <r2>", False),
        ("<r0> a s s i s t a n t <r1>", False),
        ("N o <r2>", True),
    ],
    # What a model is asked ends at the colon, so the space is its own to write ("_" here).
    "plain-eos": [
        ("<s> U s e r : _ H i \n A s s i s t a n t :", False),
        ("_ Y o </s>", True),
        ("U s e r : _ o k ? \n A s s i s t a n t :", False),
        ("_ N o </s>", True),
    ],
}


@pytest.mark.parametrize(("chat", "name"), [(R0, "r0"), (PLAIN, "plain-eos")])
def test_each_token_of_two_turns_and_whether_it_is_scored(chat, name):
    expected = [(token.replace("_", " "), scored) for text, scored in TABLES[name] for token in text.split(" ")]
    encoded = encode(chat, [TWO_TURNS], 200)
    names = [TOKENIZER.decode([token_id], skip_special=False) for token_id in encoded.tokens]
    assert list(zip(names, encoded.scored.tolist(), strict=True)) == expected
    assert encoded.counts.targets == sum(scored for _, scored in expected)
    # In a batch the label of a scored token stands one place before it, and nowhere else is a label.
    batch = collate([ConversationRows(encoded, RowsConfig("pad", 200)).row(0)], np.array([0]))
    labels = [TOKENIZER.decode([i], skip_special=False) if i != IGNORE_INDEX else None for i in batch.labels_BT[0]]
    shifted = [token if scored else None for token, scored in expected[1:]]
    assert labels == shifted + [None] * (200 - len(shifted))


def test_conversations_that_cannot_be_used_are_counted():
    system = conversation({"messages": [{"role": "system", "content": "Hm"}]}, "here")
    few, many = talk("Hi", "Yo"), talk("Hi", "Yo" * 30)
    given = [few, system, many, talk("Hi"), talk("x" * 60, "Yo"), few]
    whole = encode(R0, given, 1000)
    assert (whole.counts.read, whole.counts.kept, whole.counts.nothing_to_learn) == (6, 4, 2)
    assert encode(R0, given, 40).counts == Counts(
        read=6, kept=2, truncated=0, dropped=2, nothing_to_learn=2, tokens=2 * 24, targets=2 * 3
    )
    cut = encode(R0, given, 40, "truncate")
    counts = cut.counts
    # The question of 60 letters is cut before its answer begins.
    assert (counts.kept, counts.truncated, counts.dropped, counts.nothing_to_learn) == (3, 1, 0, 3)
    lengths = whole.lengths[[0, 1, 3]].tolist()
    assert cut.lengths.tolist() == [lengths[0], 40, lengths[2]]
    begin = cut.starts[1]
    assert (cut.tokens[begin : begin + 40] == whole.tokens[whole.starts[1] : whole.starts[1] + 40]).all()
    assert TOKENIZER.codec.special_tokens["<r2>"] != cut.tokens[begin + 39], "a cut answer teaches no end"
    assert str(counts) == (
        "3 of 6 conversations, 88 tokens, 25 scored, 1 cut for their length, 3 skipped, nothing in them to learn"
    )


def test_a_mistake_in_a_conversation_names_its_place():
    roles = conversation({"messages": [{"role": "user<r0>", "content": "Hi"}]}, "talk.jsonl, line 7")
    with pytest.raises(
        ValueError, match=r"^talk\.jsonl, line 7: a field of a message: a text spells the control token"
    ):
        encode(R0, [talk("Hi", "Yo"), roles], 100)
    changing = Chat(TOKENIZER, "{% for m in messages %}{{ m.content.split('|')[-1] }}{% endfor %}")
    with pytest.raises(ValueError, match="here: the chat template changes this conversation"):
        encode(changing, [talk("Hi", "hm|Yo")], 100)


def test_conversations_that_cannot_be_laid_out_are_skipped_where_that_is_asked():
    roles = conversation({"messages": [{"role": "user<r0>", "content": "Hi"}]}, "line 2")
    weight = conversation(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 2}]}, "line 3"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    calling = conversation({"messages": [{"role": "user", "content": "Hi"}, call]}, "line 4")
    given = [talk("Hi", "Yo"), roles, weight, calling, talk("Hi", "No")]
    with pytest.raises(
        ValueError, match=r"^line 4: message 1 calls the tool 'look', which the chat template leaves out"
    ):
        encode(R0, [calling], 100)
    with pytest.raises(ValueError, match=r"^line 3: message 1 has the weight 2; expected 0, not learned, or 1"):
        encode(R0, given[2:], 100)
    bad = BadRecords(skip=True)
    encoded = encode(R0, given, 100, bad=bad)
    assert (encoded.counts.read, encoded.counts.kept, encoded.counts.bad) == (5, 2, 3)
    assert str(encoded.counts).endswith("6 scored, 3 skipped, which cannot be laid out")
    assert [line.partition(": ")[2][:7] for line in bad.lines()] == ["line 2:", "line 3:", "line 4:"]
    assert encoded.digest() == encode(R0, [given[0], given[4]], 100).digest()
    assert "bad" not in recorded(encode(R0, given[:1], 100).counts)


def test_a_message_of_weight_0_is_read_and_not_learned():
    messages = [dict(message) for message in TWO_TURNS.messages]
    messages[1]["weight"] = 0
    whole, part = (encode(R0, [each], 100) for each in (TWO_TURNS, conversation({"messages": messages}, "here")))
    assert (whole.tokens == part.tokens).all()
    assert TOKENIZER.decode(part.tokens[part.scored], skip_special=False) == "No<r2>"
    messages[3]["weight"] = 0
    assert encode(R0, [conversation({"messages": messages}, "here")], 100).counts.nothing_to_learn == 1


def test_variables_of_a_record_reach_the_template():
    chat = Chat(TOKENIZER, "{{ mood | default('calm') }}{% for m in messages %}<r0>{{ m.content }}<r2>{% endfor %}")
    for variables, mood in (({"mood": "glad", "other": None}, "glad"), (None, "calm")):
        record = {"prompt": "a", "response": "b", "chat_template_kwargs": variables}
        found = encode(chat, [conversation(record, "here")], 100)
        assert TOKENIZER.decode(found.tokens, skip_special=False) == f"{mood}<r0>a<r2><r0>b<r2>"


@given(st.lists(st.integers(1, 30), max_size=60))
def test_groups_hold_every_item_once_and_fit(lengths):
    groups = best_fit(lengths, 30)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in group) <= 30 for group in groups)
    # No two groups could be one: each was begun when its first item fitted nowhere.
    sums = sorted(sum(lengths[item] for item in group) for group in groups)
    assert all(first + second > 30 for first, second in pairwise(sums))


@pytest.mark.parametrize("mode", ["pad", "pack"])
def test_rows_hold_each_conversation_whole_and_apart(mode):
    talks = [talk("q" * (i % 7), "a" * (1 + i % 5)) for i in range(40)]
    encoded = encode(R0, talks, 100)
    rows = ConversationRows(encoded, RowsConfig(mode, 99, mode == "pack"), pad_id=2)
    assert len(rows) == 40 if mode == "pad" else len(rows) < 20
    seen = []
    for index in range(len(rows)):
        row = rows.row(index)
        place = 0
        for number, member in enumerate(rows.members(index), start=1):
            begin, end = encoded.starts[member : member + 2]
            here = slice(place, place + end - begin)
            assert (row.tokens[here] == encoded.tokens[begin:end]).all()
            assert (row.label_mask[here] == encoded.scored[begin:end]).all()
            assert (row.segments[here] == number).all()
            place, seen = here.stop, [*seen, member]
        assert (row.tokens[place:] == 2).all()
        assert not row.label_mask[place:].any()
        assert not row.segments[place:].any()
    assert sorted(seen) == list(range(40))
    iterator = BatchIterator(rows, 4, seed=1)
    assert sum(iterator.next().num_targets for _ in range(len(rows))) == 4 * encoded.counts.targets


def test_an_answer_at_the_very_beginning_is_not_predicted_from_what_lies_before_it():
    """The assistant begins, and the template writes nothing before it."""
    bare = Chat(TOKENIZER, "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    opening = conversation({"messages": [{"role": "assistant", "content": "Yo"}]}, "here")
    encoded = encode(bare, [opening, opening], 10)
    assert encoded.scored.tolist() == [False, True, True] * 2
    row = ConversationRows(encoded, RowsConfig("pack", 9, True)).row(0)
    assert row.label_mask.tolist() == [False, True, True] * 2 + [False] * 4
