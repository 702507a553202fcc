"""The assistant's turns in the families' own templates: held to what trl marks in its forms of them for training.

transformers reads those marks. Ids and masks of a template with marks are theirs to the token; of one without, a turn
lacks only the line ends around it, which the template writes.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers

from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat, ChatTokens
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.tokenizer import Tokenizer

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CASES = Path(__file__).parents[1] / "data" / "cases"
MARKS = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|return|>", "<|observation|>"),
]
TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
"""Tokens of their own, which the families' files do not call special."""


def tokenizer_of(normalizer: Any = None, special_tags: bool = False) -> Tokenizer:
    """Bytes, the marks of the families, and the tags."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(train_bpe_from_iterator(["a"], 259).codec.spec))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MARKS])
    backend.add_tokens([AddedToken(name, special=special_tags, normalized=False) for name in TAGS])
    return Tokenizer.from_codec(HuggingFaceCodec(backend))


TOKENIZER = tokenizer_of()


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8")


def wrapped(tokenizer: Tokenizer, source: str) -> Any:
    """The tokenizer as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.codec.spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=source)


def theirs(tokenizer: Tokenizer, source: str, messages: Sequence[Any], tools: Any = None) -> tuple[list, list]:
    """Ids and mask of transformers."""
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    found = wrapped(tokenizer, source).apply_chat_template(
        given, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(mine) for mine in found["assistant_masks"]]


def turns(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool] | None) -> list[str]:
    """The text of each stretch that is scored."""
    assert mask is not None
    found: list[list[int]] = []
    before = False
    for token_id, mine in zip(ids, mask, strict=True):
        if mine and not before:
            found.append([])
        if mine:
            found[-1].append(token_id)
        before = mine
    return [tokenizer.decode(part, skip_special=False) for part in found]


def ours(source: str, messages: Sequence[Any], tokenizer: Tokenizer = TOKENIZER, **options: Any) -> ChatTokens:
    return Chat(tokenizer, source).encode(messages, add_generation_prompt=False, **options)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool, "arguments": arguments}}


LINES = [json.loads(line) for line in (CASES / "assistant-turns.jsonl").read_text("utf-8").splitlines()]
TOOLS = LINES[0]["tools"]
MORE = [
    # Two calls at once, with arguments of every kind, and their results.
    {
        "messages": [
            user("two towns?"),
            assistant("", tool_calls=[call("weather", name="a", days=[1, 2]), call("weather", name="b", at=None)]),
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "tool", "name": "weather", "content": "rain"},
            assistant("Sunny, and rain."),
            user("sure?"),
            assistant("Yes."),
        ],
        "tools": TOOLS,
    },
    # The mark that ends a turn, spelled by both.
    {"messages": [user("say <|im_end|>"), assistant("It is <|im_end|>.")]},
    # A system message, several turns, an answer of spaces around a word, and an empty one.
    {"messages": [{"role": "system", "content": "Be brief."}, user("a"), assistant(" b "), user("c"), assistant("")]},
    # Reasoning in one turn, none in another.
    {"messages": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")]},
    # A question that looks like a result of a tool.
    {"messages": [user("<tool_response>\nsunny\n</tool_response>"), assistant("Fine.")]},
    # A conversation that ends with its user.
    {"messages": [user("a"), assistant("b"), user("c")]},
    # Letters of several bytes, and one that is split among tokens.
    {"messages": [user("Où 🦙?"), assistant("日本語 🦙 é")]},
]
FAMILIES = {  # the template, and whether it lays calls of tools out
    "qwen2_5": True,
    "qwen3": True,
    "qwen3_5_think": True,
    "glm4moe": True,
    "gptoss": True,
    "llama3": False,
    "gemma3": False,
    "phi3": False,
}


def usable(name: str, case: dict[str, Any]) -> bool:
    """Whether the family lays such a conversation out."""
    messages = case["messages"]
    calls = max(len(message.get("tool_calls") or ()) for message in messages)
    if name == "qwen3_5_think" and messages[0]["content"].startswith("<tool_response>"):
        return False  # "no user query"
    return calls <= (1 if name == "gptoss" else 2 if FAMILIES[name] else 0)


@pytest.mark.parametrize("number", range(len(LINES + MORE)))
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_mask_of_a_template_with_marks_are_those_of_transformers(name: str, number: int) -> None:
    case = (LINES + MORE)[number]
    if not usable(name, case):
        pytest.skip("the family's template refuses it, or leaves calls of tools out")
    source, messages, tools = template(f"{name}_training"), case["messages"], case.get("tools")
    found = ours(source, messages, tools=tools)
    assert found.assistant_mask is not None, found.fault
    ids, mask = theirs(TOKENIZER, source, messages, tools)
    if "<|im_end|>" in json.dumps(messages):  # theirs lets a message end its own turn; ours keeps it text
        assert found.tokens != tuple(ids)
        assert TOKENIZER.decode(found.tokens, skip_special=False) == TOKENIZER.decode(ids, skip_special=False)
        assert turns(TOKENIZER, found.tokens, found.assistant_mask) == turns(TOKENIZER, ids, mask)
        return
    assert found.tokens == tuple(ids)
    assert found.assistant_mask == tuple(mask)


@pytest.mark.parametrize("number", range(len(LINES + MORE)))
@pytest.mark.parametrize("name", FAMILIES)
def test_turns_of_a_template_without_marks_are_those_that_trl_marks(name: str, number: int) -> None:
    case = (LINES + MORE)[number]
    if not usable(name, case):
        pytest.skip("the family's template refuses it, or leaves calls of tools out")
    messages, tools = case["messages"], case.get("tools")
    found = ours(template(name), messages, tools=tools)
    expected = turns(TOKENIZER, *theirs(TOKENIZER, template(f"{name}_training"), messages, tools))
    actual = turns(TOKENIZER, found.tokens, found.assistant_mask)
    assert len(actual) == len(expected)
    for turn, marked in zip(actual, expected, strict=True):
        given = "<|start|>assistant" if name == "gptoss" else ""  # marked, though the model is given it
        wanted = marked.removeprefix(given).strip()
        if name == "phi3":
            wanted = wanted.removesuffix("</s>").strip()
        if name == "glm4moe":  # without a next message nothing ends a turn
            wanted, turn = (text.removesuffix("<|user|>").removesuffix("<|observation|>") for text in (wanted, turn))
        if name == "qwen3_5_think":  # the beginning of an answer holds the tag
            wanted = wanted.removeprefix("<think>").strip()
        if turn.strip() != wanted:  # an earlier turn, whose reasoning the template leaves out
            assert name.startswith(("qwen3", "gptoss", "glm4moe"))
            wanted = wanted.rpartition("</think>" if "</think>" in wanted else "<|end|><|start|>assistant")[2]
            assert turn.strip() == wanted.strip()
    if expected and messages[-1]["role"] == "assistant" and name not in ("glm4moe", "gptoss"):
        control = {token_id: text for text, token_id in TOKENIZER.codec.special_tokens.items()}
        (end,) = Chat(TOKENIZER, template(name)).end_of_turn[0]
        assert actual[-1].endswith(control[end])


@pytest.mark.parametrize(
    "messages",
    [
        [assistant("hi"), user("a"), assistant("b")],
        [user("a"), assistant("b"), assistant("c")],
        [user("a"), assistant("a"), user("a"), assistant("a")],
        [user("a"), assistant("<|im_start|>assistant\n")],
        [user(""), assistant("b"), user(""), assistant("d")],
        [user("a"), assistant("\n\nb\n\n")],
        [user("a"), assistant("<think>\nhm")],
        [user("a"), assistant("hm\n</think>\n\nb")],
        [
            {"role": "system", "content": "s"},
            user("a"),
            assistant("b"),
            {"role": "system", "content": "t"},
            assistant("c"),
        ],
        [user("a"), assistant("b"), user("c")],
    ],
)
@pytest.mark.parametrize("name", ["qwen2_5", "llama3"])
def test_turns_in_unusual_places_and_of_unusual_words(name: str, messages: list[dict[str, Any]]) -> None:
    source = template(f"{name}_training")
    ids, mask = theirs(TOKENIZER, source, messages)
    found = ours(source, messages)
    expected = turns(TOKENIZER, ids, mask)
    assert turns(TOKENIZER, found.tokens, found.assistant_mask) == expected
    own = ours(template(name), messages)
    assert [turn.strip() for turn in turns(TOKENIZER, own.tokens, own.assistant_mask)] == [
        turn.strip() for turn in expected
    ]


def test_a_turn_begins_where_the_model_is_asked_and_holds_all_of_it() -> None:
    """To the token: what an engine is given, and what a model then has to write, make up the text."""
    for name, case in [("qwen2_5", LINES[2]), ("qwen2_5", LINES[1]), ("qwen3", LINES[4]), ("qwen3", LINES[5])]:
        chat = Chat(TOKENIZER, template(name))
        found = chat.encode(case["messages"], add_generation_prompt=False)
        asked = chat.encode(case["messages"][:-1]).tokens
        assert found.tokens[: len(asked)] == asked
        assert found.assistant_mask is not None
        scored = [place for place, mine in enumerate(found.assistant_mask) if mine]
        assert scored == list(range(len(asked), scored[-1] + 1))
        assert TOKENIZER.decode(found.tokens[scored[-1] :], skip_special=False) == "<|im_end|>\n"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("special_tags", [False, True])
def test_reasoning_under_each_of_its_names_is_learned(name: str, special_tags: bool) -> None:
    tokenizer = tokenizer_of(special_tags=special_tags)
    inside = ours(template("qwen3"), [user("a"), assistant("<think>\nhm\n</think>\n\nb")], tokenizer)
    found = ours(template("qwen3"), [user("a"), assistant("b", **{name: "hm"})], tokenizer)
    assert turns(tokenizer, found.tokens, found.assistant_mask) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert found == inside
    assert found.assistant_mask == inside.assistant_mask
    (tag,) = tokenizer.encode_with_offsets("<think>", allow_special=True)[0]
    assert found.tokens.count(tag) == 1


def test_reasoning_reaches_a_template_under_the_name_that_it_reads() -> None:
    """And only where it reads another than the message has: what transformers would lay out stays as it is."""
    for source, name in [("{{ m.thinking }}", "reasoning"), ("{{ m['reasoning'] }}", "thinking")]:
        whole = (
            "{# a comment on reasoning and thinking #}{% for m in messages %}{% if m.role == 'assistant' %}"
            f"({source}) {{% endif %}}{{{{ m.content }}}}<|end|>{{% endfor %}}"
        )
        assert Chat(TOKENIZER, whole).render([user("a"), assistant("b", **{name: "hm"})]) == "a<|end|>(hm) b<|end|>"
    both = "{% for m in messages %}{{ m.reasoning }},{{ m.thinking }}{% endfor %}"
    assert Chat(TOKENIZER, both).render([assistant("b", thinking="x")]) == ",x"


def test_a_tag_of_reasoning_that_a_user_spells_stays_text_where_it_is_a_control_token() -> None:
    tokenizer = tokenizer_of(special_tags=True)
    found = ours(template("qwen2_5"), [user("<think>"), assistant("<think>\nhm\n</think>\n\nb")], tokenizer)
    assert found.tokens.count(tokenizer.codec.special_tokens["<think>"]) == 1
    assert turns(tokenizer, found.tokens, found.assistant_mask) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "llama3", "gemma3_training"])
def test_a_message_of_weight_0_is_not_learned(name: str) -> None:
    messages = [user("a"), assistant("bad", weight=0), user("c"), assistant("good", weight=1)]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    found, whole = (ours(template(name), said) for said in (messages, plain))
    assert found == whole
    (turn,) = turns(TOKENIZER, found.tokens, found.assistant_mask)
    assert turn == turns(TOKENIZER, whole.tokens, whole.assistant_mask)[1]
    assert "good" in turn
    with pytest.raises(ValueError, match=r"message 1 has the weight 0\.5; expected 0, not learned, or 1"):
        ours(template(name), [user("a"), assistant("b", weight=0.5)])


@pytest.mark.parametrize("mark", ["weight", "train", "training", "train_on_turn", "loss", "masked"])
def test_each_way_to_say_that_a_message_is_not_learned(mark: str) -> None:
    no = mark == "masked"
    messages = [user("a"), assistant("bad", **{mark: no}), user("c"), assistant("good", **{mark: not no}), user("d")]
    messages += [assistant("too", **{mark: None})]
    found = ours(template("qwen2_5"), messages)
    assert turns(TOKENIZER, found.tokens, found.assistant_mask) == ["good<|im_end|>", "too<|im_end|>"]
    with pytest.raises(ValueError, match=f"message 1 has the {mark} 'no'; expected [01], not learned, or [01]"):
        ours(template("qwen2_5"), [user("a"), assistant("b", **{mark: "no"})])


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "qwen3_5_think", "glm4moe", "gptoss", "llama3_1", "lfm2_v2", "qwen3_training"]
)
def test_arguments_as_text_are_laid_out_as_the_object(name: str) -> None:
    """OpenAI's data has the text, of which templates would write the text of a text, or fail."""
    said = [user("a"), assistant("", tool_calls=[call("weather", name="é", days=[1, None])])]
    said += [{"role": "tool", "name": "weather", "content": "sunny"}, assistant("It is sunny.")]
    function = said[1]["tool_calls"][0]["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    as_text = [said[0], {**said[1], "tool_calls": [{"function": {**function, "arguments": text}}]}, *said[2:]]
    expected, found = (ours(template(name), messages, tools=TOOLS) for messages in (said, as_text))
    assert (found.text, found.tokens, found.assistant_mask) == (
        expected.text,
        expected.tokens,
        expected.assistant_mask,
    )
    ids, _ = theirs(TOKENIZER, template(name), said, TOOLS)  # transformers, given the object
    assert found.tokens == tuple(ids)


def test_arguments_that_a_template_adds_to_a_text_are_text() -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c['function']['arguments'] + ';' }}{% endfor %}"
    )
    source += "{{ m.content }}<|end|>{% endfor %}"
    expected = '{"name": "é"}; ok<|end|>'
    for arguments in ({"name": "é"}, '{"name": "é"}'):
        calls = [{"function": {"name": "weather", "arguments": arguments}}]
        assert Chat(TOKENIZER, source).render([assistant(" ok", tool_calls=calls)]) == expected


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{bad"}}]},
            "message 1 calls 'f' with '{bad', which is",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": "[1]"}]},
            r"message 1 calls 'f' with '\[1\]', which is no JSON object",
        ),
        ({"tool_calls": '[{"name": "f"}]'}, "message 1 has the tool_calls .*; expected a list of objects"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "message 1 has a function_call, the older form"),
    ],
)
def test_calls_that_cannot_be_laid_out_are_refused(message: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ours(template("qwen2_5"), [user("a"), assistant(None, **message)])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "qwen3"])
@pytest.mark.parametrize("role", ["human", "User", "developer"])
def test_an_answer_is_not_learned_without_its_question(name: str, role: str) -> None:
    """transformers gives the answer alone: the template has no branch for such a role."""
    messages = [user("x"), {"role": role, "content": "why?"}, assistant("b")]
    assert "why?" not in TOKENIZER.decode(theirs(TOKENIZER, template(name), messages)[0])
    found = ours(template(name), messages)
    assert found.assistant_mask is None
    assert found.fault.startswith(f"the chat template leaves out message 1, which has the role {role!r}")


@pytest.mark.parametrize(
    "normalizer", [normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
)
def test_tokens_of_a_text_that_is_normalised_are_found_by_their_offsets(normalizer: Any) -> None:
    tokenizer = tokenizer_of(normalizer)
    lines = (CASES / "decomposed.jsonl").read_text("utf-8").splitlines()
    for line in [*lines, json.dumps({"messages": [user("ﬁne Ⅳ"), assistant("a\u0301 ﬁ x")]})]:
        messages = json.loads(line)["messages"]
        ids, mask = theirs(tokenizer, template("qwen3_training"), messages)
        found = ours(template("qwen3_training"), messages, tokenizer)
        assert found.tokens == tuple(ids)
        assert found.assistant_mask == tuple(mask)
        own = ours(template("qwen2_5"), messages, tokenizer)
        (turn,) = turns(tokenizer, own.tokens, own.assistant_mask)
        assert turn == normalizer.normalize_str(messages[1]["content"]) + "<|im_end|>"


def sentencepiece_tokenizer(rule: str) -> Tokenizer:
    """Words of the cases, bytes for what is not in them, two marks; spaces are kept."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cafe is warm and sunny. user assistant system"] * 60),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        model_type="bpe",
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return Tokenizer.from_codec(SentencePieceCodec(model.getvalue()))


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_tokens_of_sentencepiece_are_found_by_its_offsets(rule: str) -> None:
    """Its normaliser joins accents, and takes ligatures apart; it puts a space before a text."""
    tokenizer = sentencepiece_tokenizer(rule)
    messages = [user("The cafe\u0301?"), assistant("It is cafe\u0301 ﬁ 🦙."), user("c"), assistant("<|im_end|> b")]
    found = ours(template("qwen2_5"), messages, tokenizer)
    said = "It is cafe\u0301 ﬁ 🦙." if rule == "identity" else "It is caf\u00e9 fi 🦙."
    assert turns(tokenizer, found.tokens, found.assistant_mask) == [f"{said}<|im_end|>", "<|im_end|> b<|im_end|>"]
    plain = ours("plain-eos", messages, tokenizer)
    assert turns(tokenizer, plain.tokens, plain.assistant_mask) == [f"{said}</s>", "<|im_end|> b</s>"]
    for text in ("", "The  cafe\u0301", "ﬁ<|im_end|>日本", "  a"):
        ids, offsets = tokenizer.encode_with_offsets(text, allow_special=True)
        assert ids == tokenizer.encode(text, allow_special=True)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)
        assert offsets == sorted(offsets)


def test_text_that_a_template_shows_in_another_order_or_repeats() -> None:
    """System texts behind the first question, and names of calls beside their results."""
    late = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if loop.index0 == 1 %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}{% elif m.role == 'assistant' %}"
        "<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")]
    found = ours(late, messages)
    assert found.text == "<|user|>S a<|assistant|>b<|end|><|user|>c<|assistant|>d<|end|>"
    assert turns(TOKENIZER, found.tokens, found.assistant_mask) == ["b<|end|>", "d<|end|>"]
    many = [message for number in range(30) for message in (user(f"q{number}"), assistant(f"a{number}"))]
    found = ours(template("qwen2_5"), many)
    assert turns(TOKENIZER, found.tokens, found.assistant_mask) == [f"a{number}<|im_end|>" for number in range(30)]
