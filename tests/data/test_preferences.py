"""Pairs of answers and prompts: the forms of records, what is scored of them, batches, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from llamita.data import meadow_tasks, preferences, prompts
from llamita.data.batches import IGNORE_INDEX, BatchIterator, evaluation_batches
from llamita.data.conversations import BadRecords, ConversationSource
from llamita.data.preferences import Layout, PairRows, encode
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.text.chat_templates import BUILT_IN


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_from_iterator(["a few words of text, good and bad"] * 20, 280, 4)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("Go")]},
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go")]},
        {"chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go")], "score": 3},
        {"prompt": "Q: Hi", "chosen": [user("Hi"), assistant("Hello")], "rejected": [user("Hi"), assistant("Go")]},
        {"prompt": [user("Hi", name=None)], "chosen": [user("Hi"), assistant("Hello")], "rejected": "Go"},
        {"prompt": "Hi", "chosen": assistant("Hello"), "rejected": assistant("Go", tool_calls=None)},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
    ],
)
def test_every_form_is_the_same_pair(record):
    found = preferences.preference(record, "x")
    assert found == preferences.Preference((user("Hi"),), (assistant("Hello"),), (assistant("Go"),), "x")


def test_a_question_beside_whole_conversations_is_not_read_as_in_trl():
    trl_data = pytest.importorskip("trl.data_utils")
    before = [{"role": "system", "content": "s"}, user("Hi")]
    record = {"prompt": "Hi", "chosen": [*before, assistant("Hello")], "rejected": [*before, assistant("Go")]}
    found = preferences.preference(record, "x")
    theirs = trl_data.maybe_extract_prompt(record)
    assert {name: list(getattr(found, name)) for name in theirs} == theirs
    beside = preferences.preference({"system": "s", "prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, "x")
    assert beside == found


def test_conversations_that_part_late_share_what_came_before():
    before = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    record = {"chosen": [*before, assistant("d")], "rejected": [*before, assistant("e"), user("f"), assistant("g")]}
    found = preferences.preference(record, "x")
    assert found.prompt == tuple(before)
    assert found.rejected == (assistant("e"), user("f"), assistant("g"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["a"], "x is list, not an object; expected"),
        ({"prompt": "a", "chosen": "b"}, r"x has the fields \['chosen', 'prompt'\]; expected"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "x: prompt is int; expected a text or a list of messages"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "x: chosen is list; expected"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": "c"}, "a message is an object with a role"),
        ({"prompt": "a", "chosen": [{"role": "r"}], "rejected": "c"}, "whose content is NoneType, not text"),
        (
            {"prompt": "a", "chosen": [user("b")], "rejected": "c"},
            "x: chosen must go on from the prompt with a message",
        ),
        ({"chosen": "b", "rejected": "c"}, "x has no prompt, and chosen and rejected do not begin alike"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "x: chosen must go on"),
    ],
)
def test_a_record_of_another_form_is_refused_with_its_place(record, message):
    with pytest.raises(ValueError, match=message):
        preferences.preference(record, "x")


def test_files_are_read_in_order_and_faults_named(tmp_path):
    for name, count in (("a", 3), ("b", 2)):
        lines = [json.dumps({"prompt": f"{name}{i}", "chosen": "y", "rejected": "n"}) for i in range(count)]
        (tmp_path / name).write_text("\n\n".join(lines) + "\n")
    source = ConversationSource(files=(tmp_path / "a", tmp_path / "b"), limit=4)
    assert [each.prompt[0]["content"] for each in preferences.preferences(source)] == ["a0", "a1", "a2", "b0"]
    (tmp_path / "b").write_text("{\n")
    with pytest.raises(ValueError, match="b, line 1 is not JSON"):
        list(preferences.preferences(source))


@pytest.mark.medium  # importing datasets takes seconds
def test_a_dataset_of_the_hub_is_read_row_by_row(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{i}", "chosen": "y", "rejected": "n"} for i in range(6)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set/train.parquet")
    source = ConversationSource(dataset=str(tmp_path / "set"), limit=3)
    assert [each.prompt[0]["content"] for each in preferences.preferences(source)] == ["p0", "p1", "p2"]


def test_meadow_gives_right_and_wrong_answers():
    found = list(preferences.preferences(ConversationSource(meadow="validation", limit=5, seed=3)))
    expected = list(meadow_tasks.preferences(3, 5, "validation"))
    assert [each.chosen[0]["content"] for each in found] == [record["chosen"] for record in expected]
    assert found[4].prompt == (user(expected[4]["prompt"]),)


# --- tokens and rows --------------------------------------------------------------------------------------------------


def pair(prompt, chosen, rejected, where="x"):
    return preferences.Preference((user(prompt),), (assistant(chosen),), (assistant(rejected),), where)


def scored_text(tokenizer, side):
    tokens, scored = side
    return tokenizer.decode(tokens[scored], skip_special=False)


@pytest.mark.parametrize("template", [None, "r0", "plain-eos"])
def test_the_answer_alone_is_scored_with_its_end(tokenizer, template):
    layout = Layout(tokenizer, Chat(tokenizer, template) if template else None)
    found = encode(layout, [pair("a few words ", "good", "bad text")], 100)
    end = {"r0": "<r2>"}.get(template, "</s>")
    assert scored_text(tokenizer, found.chosen[0]).strip() == f"good{end}"
    assert scored_text(tokenizer, found.rejected[0]).strip() == f"bad text{end}"
    whole = tokenizer.decode(found.chosen[0][0], skip_special=False)
    if template is None:
        assert whole == "<s>a few words good</s>"
    else:
        messages = [user("a few words "), assistant("good")]
        assert whole == layout.chat.render(messages, add_generation_prompt=False)
    prompt = layout.prompt((user("a few words "),))
    assert tuple(found.chosen[0][0][: len(prompt)]) == prompt  # what is sampled from is what is trained after


def test_earlier_answers_are_not_scored(tokenizer):
    each = preferences.Preference(
        (user("a"), assistant("few"), user("words")), (assistant("good"),), (assistant("bad"),), "x"
    )
    found = encode(Layout(tokenizer, Chat(tokenizer, "r0")), [each], 100)
    assert scored_text(tokenizer, found.chosen[0]) == "good<r2>"


def test_pairs_that_teach_nothing_are_counted(tokenizer):
    layout = Layout(tokenizer, None)
    given = [pair("a", "good", "bad"), pair("a", "good", "good"), pair("a", "good", "bad " * 30), pair("b", "x", "y")]
    found = encode(layout, given, 20)
    assert len(found) == 2
    assert str(found.counts) == ("2 of 4 pairs, 1 dropped for their length, 1 skipped, nothing to choose between")
    assert found.digest() != encode(layout, given[:1], 20).digest()
    assert found.digest() == encode(layout, given, 20).digest()
    expected = [[len(tokenizer.encode(text)) + 1 for text in texts] for texts in (("good", "bad"), ("x", "y"))]
    assert found.lengths_N2.tolist() == expected


def test_a_batch_holds_both_answers_and_their_reference(tokenizer):
    given = [pair("a " * n, "good", "bad text") for n in range(1, 8)]
    pairs = encode(Layout(tokenizer, None), given, 100)
    rows = PairRows(pairs, pairs.longest + 3)
    pairs.reference_N2 = np.arange(14, dtype=np.float32).reshape(7, 2)
    batches = BatchIterator(rows, 3, seed=1)
    batch = batches.next()
    assert batch.row_is_target
    assert batch.num_targets == 3
    assert (batch.extras["reference_B2"] == pairs.reference_N2[batch.row_ids]).all()
    for row, number in enumerate(batch.row_ids):
        sides = (
            (batch.tokens_BT[row], batch.labels_BT[row], pairs.chosen[number]),
            (batch.extras["rejected_tokens_BT"][row], batch.extras["rejected_labels_BT"][row], pairs.rejected[number]),
        )
        for tokens, labels, (ids, scored) in sides:
            assert tokens.shape == (pairs.longest + 3,)
            assert (tokens[: len(ids) - 1] == ids[:-1]).all()
            assert (labels[labels != IGNORE_INDEX] == ids[scored]).all()
            assert (np.flatnonzero(labels != IGNORE_INDEX) == np.flatnonzero(scored) - 1).all()
    part = batch.rows(slice(1, 2))
    assert {name: len(array) for name, array in part.extras.items()} == dict.fromkeys(part.extras, 1)
    seen = [*batch.row_ids, *batches.next().row_ids, *batches.next().row_ids][:7]
    assert sorted(seen) == list(range(7))
    assert [len(each.row_ids) for each in evaluation_batches(rows, 2, 5)] == [2, 2, 1]
    assert list(evaluation_batches(PairRows(encode(Layout(tokenizer, None), [], 9), 9), 2)) == []


def test_pairs_of_one_prompt_lie_on_one_side():
    given = [pair(f"prompt {i // 2}", str(i), "n") for i in range(200)]
    train, held_out = preferences.split(iter(given), 0.3, 0)
    assert len(train) + len(held_out) == 200
    assert 20 < len(held_out) < 100
    assert not {each.prompt[0]["content"] for each in train} & {each.prompt[0]["content"] for each in held_out}


# --- calls of tools, as trl lays them out -----------------------------------------------------------------------------

LINES = (Path(__file__).parent / "cases" / "preference-tools.jsonl").read_text("utf-8").splitlines()
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
RECORDS = [json.loads(line) for line in LINES] + [
    # Reasoning preferred to none, and a longer way to go on with the result of a call.
    {"prompt": [user("a")], "chosen": [assistant("b", reasoning_content="hm")], "rejected": [assistant("b")]},
    {
        "prompt": [user("a")],
        "chosen": [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "c"}, assistant("d")],
        "rejected": [assistant("d")],
    },
    # An earlier turn of the assistant, with reasoning, in the prompt.
    {
        "prompt": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
        "chosen": [assistant("d")],
        "rejected": [assistant("e")],
    },
    # The same call with other arguments, and the same text with a call and without.
    {
        "prompt": [user("a")],
        "chosen": [assistant(None, tool_calls=[CALL])],
        "rejected": [assistant(None, tool_calls=[{"function": {"name": "look", "arguments": {"at": 2}}}])],
    },
    {"prompt": [user("a")], "chosen": [assistant("I look.", tool_calls=[CALL])], "rejected": [assistant("I look.")]},
    # Two conversations that begin alike.
    {"chosen": [user("a"), assistant("", tool_calls=[CALL])], "rejected": [user("a"), assistant("b")]},
]


@pytest.mark.parametrize("number", range(len(RECORDS)))
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_answers_with_calls_are_laid_out_as_trl_does(family, number):
    trl_data = pytest.importorskip("trl.data_utils")
    from tests.text import test_chat_turns as chat

    record = RECORDS[number]
    found = preferences.preference(record, "x")
    layout = Layout(chat.TOKENIZER, Chat(chat.TOKENIZER, chat.template(family)))
    theirs = trl_data.apply_chat_template(
        {
            name: [{k: v for k, v in said.items() if v is not None} for said in getattr(found, name)]
            for name in ("prompt", "chosen", "rejected")
        },
        chat.wrapped(chat.TOKENIZER, chat.template(family)),
        tools=record.get("tools"),
    )
    for name in ("chosen", "rejected"):
        tokens, scored = layout.answered(found.prompt, getattr(found, name), found.tools)
        assert chat.TOKENIZER.decode(tokens, skip_special=False) == theirs["prompt"] + theirs[name]
        turns = chat.turns(chat.TOKENIZER, tokens.tolist(), scored.tolist())
        between = theirs[name]
        for turn in turns:  # what lies between turns is another's; around them, only line ends of the template
            before, at, between = between.partition(turn)
            assert at
            assert not before or "<tool_response>" in before
        assert between == "\n"
    # Qwen2.5's template leaves reasoning out, which is all that one pair differs in.
    same = number == 3 or (number == 5 and family == "qwen2_5")
    counts = encode(layout, [found], 10_000).counts
    assert (counts.kept, counts.without_preference) == ((0, 1) if same else (1, 0))


def test_equal_conversations_have_nothing_to_choose(tokenizer):
    same = [user("a"), assistant("b")]
    found = preferences.preference({"chosen": same, "rejected": list(same)}, "x")
    assert (found.prompt, found.chosen, found.rejected) == ((user("a"),), (assistant("b"),), (assistant("b"),))
    assert encode(Layout(tokenizer, Chat(tokenizer, "r0")), [found], 100).counts.without_preference == 1


def test_a_pair_that_cannot_be_laid_out_is_named_or_skipped(tokenizer):
    calling = {"prompt": "a", "chosen": [assistant(None, tool_calls=[CALL])], "rejected": "b"}
    pairs = [
        preferences.preference(record, f"line {i}") for i, record in enumerate([calling, {**calling, "chosen": "c"}])
    ]
    for template, message in [
        ("r0", r"^line 0, chosen: message 1 calls the tool 'look', which the chat template leaves out"),
        (None, r"^line 0, chosen: message 0 of them has tool_calls; without a chat template there can be text alone"),
    ]:
        layout = Layout(tokenizer, Chat(tokenizer, template) if template else None)
        with pytest.raises(ValueError, match=message):
            encode(layout, pairs, 100)
        bad = BadRecords(skip=True)
        counts = encode(layout, pairs, 100, bad).counts
        assert (counts.read, counts.kept, counts.bad) == (2, 1, 1)
        assert str(counts) == "1 of 2 pairs, 1 skipped, which cannot be laid out"
        assert len(bad.lines()) == 1


def test_tools_reach_the_template(tokenizer):
    """In pairs and in prompts, as a list or, as datasets keep it, as JSON."""
    telling = Chat(tokenizer, "{{ tools | tojson if tools else '' }}" + BUILT_IN["r0"])
    tools = [{"name": "look"}]
    for given in (tools, json.dumps(tools)):
        pair = preferences.preference({"prompt": "a", "chosen": "b", "rejected": "c", "tools": given}, "x")
        tokens, _ = Layout(tokenizer, telling).answered(pair.prompt, pair.chosen, pair.tools)
        assert tokenizer.decode(tokens).startswith('[{"name": "look"}]')
        for record in ({"prompt": "a"}, {"messages": [user("a"), assistant("b")]}):
            asked = prompts.prompt({**record, "tools": given}, "x")
            assert tokenizer.decode(Layout(tokenizer, telling).prompt(asked.said, asked.tools)).startswith('[{"name"')
    for given in (3, "look", ["look"], "{}x", {"name": "look"}):
        for parse, record in [
            (preferences.preference, {"prompt": "a", "chosen": "b", "rejected": "c"}),
            (prompts.prompt, {"prompt": "a"}),
        ]:
            with pytest.raises(ValueError, match=r"^x: tools "):
                parse({**record, "tools": given}, "x")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_keep_what_their_record_holds(tmp_path):
    records = [
        {"prompt": "Hi", "level": 3},
        {"prompt": [user("a"), assistant("b"), user("c")]},
        {"messages": [user("What?"), assistant("That.")]},
        {"messages": [user("What?")]},
    ]
    (tmp_path / "p").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = list(prompts.prompts(ConversationSource(files=(tmp_path / "p",))))
    assert [each.said[-1]["content"] for each in found] == ["Hi", "c", "What?", "What?"]
    assert found[0].record == records[0]
    assert found[2].record["answer"] == "That."
    assert found[3].where.endswith("p, line 4")
    assert prompts.digest(found) != prompts.digest(found[:3])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "x is int, not an object"),
        ({"text": "a"}, r"x has the fields \['text'\]; expected"),
        ({"prompt": None}, "x: prompt is NoneType"),
        ({"messages": [assistant("a")]}, "x has an answer alone"),
    ],
)
def test_a_prompt_of_another_form_is_refused_with_its_place(record, message):
    with pytest.raises(ValueError, match=message):
        prompts.prompt(record, "x")
