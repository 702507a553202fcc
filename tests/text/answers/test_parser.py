"""A model's answer in parts: what an independent reader of whole texts finds, however the text is split."""

import gc
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamita.text.answers import Answer, AnswerFormat, AnswerParser, Part, ToolCall, collect, parse_answer
from llamita.text.answers.forms import FORMS

THINK = ("<think>", "</think>")
FORMAT = {form.name: AnswerFormat(form, THINK) for form in FORMS}
FORMAT["none"] = AnswerFormat(None, THINK)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "place": {"$ref": "#/$defs/place"},
                    "note": {"type": ["string", "null"]},
                },
                "$defs": {"place": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARIS = ToolCall("weather", '{"city": "Paris"}')
NOW = ToolCall("now", "{}")


def parts_of(pieces: Sequence[str], form: AnswerFormat, **options: Any) -> list[Part]:
    parser = AnswerParser(form, TOOLS, **options)
    return [part for piece in pieces for part in parser.feed(piece)] + parser.finish()


def test_an_answer_without_anything_special_is_its_text():
    for form in FORMAT.values():
        assert parse_answer(form, " Paris is\n\nthere. ", TOOLS) == Answer(" Paris is\n\nthere. ")
        assert parse_answer(form, "", TOOLS) == Answer()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', [PARIS]),
        ("hermes", '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>', [PARIS]),
        ("hermes", '<tool_call>{"name": "weather", "parameters": {"city": "Paris"}}</tool_call>', [PARIS]),
        ("hermes", '<tool_call>{"name": "now", "arguments": null} </tool_call>', [NOW]),
        ("hermes", '<tool_call>{"name": "now"}', [NOW]),  # the closing mark forgotten
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call> \\"<think>"}}</tool_call>',
            [ToolCall("weather", '{"city": "</tool_call> \\"<think>"}')],
        ),
        (
            "hermes",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            [PARIS, NOW],
        ),
        (
            "smollm2",
            '<tool_call>[{"name": "weather", "arguments": {"city": "Paris"}},\n'
            '{"name": "now", "arguments": {}}]</tool_call>\n',
            [PARIS, NOW],
        ),
        ("smollm2", "<tool_call>[]</tool_call>", []),
        ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ("llama3", '\n{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}\n', [PARIS]),
        ("llama3", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', [PARIS]),
        (
            "llama3",
            '{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
            [PARIS, NOW],
        ),
        ("mistral", '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]', [PARIS]),
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
            '{"name": "now", "arguments": "{}"}]',
            [PARIS, NOW],
        ),
        ("mistral-named", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', [PARIS, NOW]),
        ("mistral-named", '[TOOL_CALLS]weather{"city": "Paris"}', [PARIS]),
        ("mistral-ids", '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}', [PARIS]),
        (
            "qwen3-coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=now>\n</function>\n</tool_call>",
            [PARIS, NOW],
        ),
        ("glm4", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>", [PARIS]),
        (
            "glm4",
            "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>\n<tool_call>now\n"
            "</tool_call>",
            [PARIS, NOW],
        ),
        (
            "glm4",
            "<tool_call>weather<arg_key>days</arg_key><arg_value>3</arg_value><arg_key>city</arg_key>"
            "<arg_value>\n</tool_call> 7 </arg_value></tool_call>",
            [ToolCall("weather", '{"days": 3, "city": "\\n</tool_call> 7 "}')],
        ),
        (
            "kimi-k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
            '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
            "<|tool_call_end|><|tool_calls_section_end|>",
            [PARIS, NOW],
        ),
        (
            "deepseek-v3",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```'
            "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
            "<｜tool▁calls▁end｜>",
            [PARIS, NOW],
        ),
        (
            "deepseek-v3.1",
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
            "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            [PARIS, NOW],
        ),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}", [NOW]),  # marks forgotten
        ("lfm2", '<|tool_call_start|>[weather(city="Paris"), now()]<|tool_call_end|>', [PARIS, NOW]),
        ("lfm2", "<|tool_call_start|> [weather(city='Paris')]", [PARIS]),
        (
            "lfm2",
            '<|tool_call_start|>[a.b(x=[1, -2.5, None, true], y={\'k\': (False, "it\'s ]")}, z="\\\\d\\d\\/")]',
            [ToolCall("a.b", '{"x": [1, -2.5, null, true], "y": {"k": [false, "it\'s ]"]}, "z": "\\\\d\\\\d/"}')],
        ),
        ("lfm2", "<|tool_call_start|>[now(a=-1e999)]<|tool_call_end|>", [ToolCall("now", '{"a": -1e999}')]),
        (
            "granite3",
            '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now"}]',
            [PARIS, NOW],
        ),
        ("phi4-mini", 'functools[{"name": "weather", "arguments": {"city": "Paris"}}]', [PARIS]),
    ],
)
def test_calls_of_each_family(name: str, text: str, expected: list[ToolCall]) -> None:
    assert parse_answer(FORMAT[name], text, TOOLS) == Answer(calls=tuple(expected))
    one = parse_answer(FORMAT[name], text, TOOLS, parallel=False)
    assert one == Answer(calls=tuple(expected[:1]))
    for streams in (False, True):
        assert collect(parts_of(text, FORMAT[name], streams_arguments=streams)) == Answer(calls=tuple(expected))


def test_what_a_tag_holds_becomes_what_the_schema_says():
    values = {
        "city": "12",
        "days": "12",
        "exact": "True",
        "place": "\n[1]\n",
        "note": "None",
        "other": "x",
        "list": "[1]",
    }
    tags = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    (call,) = parse_answer(FORMAT["qwen3-coder"], f"<tool_call><function=weather>{tags}</function>", TOOLS).calls
    expected = {"city": "12", "days": 12, "exact": True, "place": "\n[1]\n", "note": None, "other": "x", "list": [1]}
    assert json.loads(call.arguments) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {}'),
        ("hermes", 'a <tool_call>{"name": "now", "arguments": {"a": tru}}</tool_call> b'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "line\nend"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}}"}</tool_call>'),
        ("hermes", '<tool_call>{"function": "now"}</tool_call>'),
        ("hermes", "<tool_call>now()</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 200),
        ("smollm2", '<tool_call>[{"name": "now", "arguments": {}}, {"name": "'),
        ("smollm2", "<tool_call>[[]]</tool_call>"),
        ("llama3", '{"name": "Anna", "parameters": {}}'),  # an answer in JSON, not one of the functions
        ("llama3", '{"name": "now"}'),
        ("llama3", 'I say {"name": "now", "parameters": {}}'),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3", '{"answer": 42}; {"name": "now", "parameters": {}}'),
        ("mistral-named", "[TOOL_CALLS]now[ARGS]"),
        ("mistral-named", "[TOOL_CALLS][ARGS]{}"),
        ("mistral-named", "[TOOL_CALLS]" + "n" * 300 + "[ARGS]{}"),
        ("qwen3-coder", "<tool_call>\n<function=now>\n<parameter=city>\nParis\n</function>\n</tool_call>"),
        ("qwen3-coder", "<tool_call><function=" + "n" * 300 + ">"),
        ("glm4", "<tool_call>weather"),  # cut off: it is not known what the name would have been
        ("glm4", "<tool_call>weather<arg_key>city</arg_key>Paris</tool_call>"),
        ("glm4", "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</tool_call>"),
        ("kimi-k2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        ("kimi-k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{"),
        ("deepseek-v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n{}"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>[]<｜tool▁call▁end｜>"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>" + "n" * 300 + "<｜tool▁sep｜>{}"),
        ("lfm2", "<|tool_call_start|>[now(]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(1)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(**{})]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a=open('x'))]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a=1_0e999)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now() for a in b]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a='\\ud800')]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a='\n')]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[[now()]]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a=" + "-" * 70000 + "1)]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[now(a=" + "[" * 200 + "]" * 200 + ")]"),
        ("gemma4", '<|tool_call>call:now{a:<|"|>x}<tool_call|>'),
        ("gemma4", "<|tool_call>call:now{a:x}<tool_call|>"),
        ("gemma4", "<|tool_call>call:now{a:1 b:2}<tool_call|>"),
        ("gemma4", "<|tool_call>call:now{:1}<tool_call|>"),
        ("gemma4", "<|tool_call>call:{a:1}<tool_call|>"),
        ("gemma4", "<|tool_call>call:now{a:01}<tool_call|>"),
        ("gemma4", "<|tool_call>call:now{a:" + "[" * 200),
        ("gemma4", "<|tool_call>now{a:1}<tool_call|>"),
        ("phi4-mini", "import functools\nfunctools.cache(f)[0]"),
        ("granite3", '<|tool_call|>[{"name": "now"'),
        ("none", '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ("none", "a </think> b <think> c"),
        ("hermes", "Say <think> and </think>."),
    ],
)
def test_what_is_no_call_is_text_to_the_letter(name: str, text: str) -> None:
    assert parse_answer(FORMAT[name], text, TOOLS) == Answer(text)
    assert collect(parts_of(text, FORMAT[name])) == Answer(text)


def test_what_follows_whole_calls_of_a_section_and_is_none_is_text() -> None:
    begun = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    )
    for broken in ("<|tool_call_begin|>functions.weather:1<|tool_call_argument_begin|>{", "<|tool_call_begin|> "):
        expected = Answer(broken, "", (NOW,))
        assert parse_answer(FORMAT["kimi-k2"], begun + broken, TOOLS) == expected
        assert collect(parts_of(begun + broken, FORMAT["kimi-k2"])) == expected


def test_without_tools_a_call_is_text():
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parse_answer(FORMAT["hermes"], text) == Answer(text)
    assert parse_answer(FORMAT["llama3"], '{"name": "now", "parameters": {}}') == Answer(
        '{"name": "now", "parameters": {}}'
    )


def test_reasoning_and_text_around_calls():
    text = '<think>\nHm.\n\nSo?\n</think>\n\nI look.\n\n<tool_call>{"name": "now"}</tool_call>\nDone. '
    assert parse_answer(FORMAT["hermes"], text, TOOLS) == Answer("I look.\nDone. ", "Hm.\n\nSo?", (NOW,))
    kinds = [part.kind for part in parts_of([text], FORMAT["hermes"])]
    assert kinds == ["reasoning", "text", "call", "arguments", "text", "text"]
    assert parse_answer(FORMAT["none"], " <think>a</think>b") == Answer("b", "a")
    assert parse_answer(FORMAT["none"], "<think>\n\n</think>\n\nb") == Answer("b")
    assert parse_answer(FORMAT["none"], "<think>cut off") == Answer("", "cut off")
    marks = AnswerFormat(None, ("[THINK]", "[/THINK]"))
    assert parse_answer(marks, "[THINK]<think>[/THINK] b") == Answer(" b", "<think>")
    assert parse_answer(AnswerFormat(), "<think>a</think>b") == Answer("<think>a</think>b")


def test_gemmas_reasoning_is_a_channel() -> None:
    form = AnswerFormat(FORMAT["gemma4"].calls, ("<|channel>thought", "<channel|>"))
    text = "<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:now{}<tool_call|>"
    assert parse_answer(form, text, TOOLS) == collect(parts_of(text, form)) == Answer("I look.", "Hm.", (NOW,))
    closed = "<|turn>model\n<|channel>thought\n<channel|>"
    assert parse_answer(form, "Yes.", TOOLS, prompt=closed) == Answer("Yes.")


def test_reasoning_goes_on_where_the_template_opened_it():
    opened, closed = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert parse_answer(FORMAT["hermes"], "Hm.\n</think>\n\nYes.", prompt=opened) == Answer("Yes.", "Hm.")
    assert parse_answer(FORMAT["hermes"], "Hm.", prompt=opened) == Answer("", "Hm.")
    assert parse_answer(FORMAT["hermes"], "Yes.", prompt=closed) == Answer("Yes.")


def test_a_call_begins_with_its_name_and_arguments_come_as_they_are_written():
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    parts = parts_of(text, FORMAT["hermes"], streams_arguments=True)
    assert parts[0] == Part("call", "weather", 0)
    assert [part.text for part in parts[1:]] == list('{"city": "Paris"}')
    whole = parts_of(text, FORMAT["hermes"])
    assert whole == [Part("call", "weather", 0), Part("arguments", '{"city": "Paris"}', 0)]


def test_one_call_ends_the_answer_where_one_is_allowed():
    parser = AnswerParser(FORMAT["hermes"], TOOLS, parallel=False)
    assert [part.kind for part in parser.feed('<tool_call>{"name": "now"}')] == ["call", "arguments"]
    assert parser.is_complete
    assert parser.feed('</tool_call><tool_call>{"name": "now"}</tool_call> and') == parser.finish() == []


def test_only_what_may_begin_a_mark_is_held_back():
    parser = AnswerParser(FORMAT["hermes"], TOOLS)
    letters = "Is a < b? \n <tool_box> <tool_cal l"
    given_out = ""
    for number, letter in enumerate(letters, start=1):
        given_out += "".join(part.text for part in parser.feed(letter))
        held = letters[len(given_out) : number]
        assert re.fullmatch(r"\s*(<(t(o(o(l(_(c(a(ll?)?)?)?)?)?)?)?)?)?", held), held
    assert given_out + "".join(part.text for part in parser.finish()) == letters


# --- properties ------------------------------------------------------------------------------------------------------

PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<think>", "</think>"),
    *("<function=weather>", "<function=", "<parameter=city>", "</parameter>", "</function>", ">", "weather", "now"),
    *('{"name": "weather", "arguments": {"city": "Paris"}}', '{"name": "now", "parameters": {}}', '{"name": "now"}'),
    *("{", "}", "[", "]", '"', "\\", ":", ",", ";", " ", "\n", "\t", "a", "1", "-", "é", "🦙", " " * 70, "\\u00e9"),
    *("<arg_key>city</arg_key>", "<arg_key>", "<arg_value>", "</arg_value>", "functools", "functools["),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.now:0<|tool_call_argument_begin|>{}"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    *("function<｜tool▁sep｜>now\n```json\n{}\n```", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    *("<|tool_call_start|>", "[now(a='b')]", "[now(", "'", ")", "<|tool_call_end|>", "<|tool_call|>"),
    *("<|tool_call>", "call:now{", '<|"|>', "a:", "<tool_call|>"),
    *("null", "tru", "<", "</", "<tool", "[TOOL", '"name"', '"arguments"'),
]
answers = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)


@given(answers, st.sampled_from(sorted(FORMAT)), st.data(), st.sampled_from(["", "<think>\n"]), st.booleans())
def test_parts_do_not_depend_on_how_the_text_is_split(text, name, data, prompt, parallel):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    options = {"prompt": prompt, "parallel": parallel}
    whole = parse_answer(FORMAT[name], text, TOOLS, **options)
    assert collect(parts_of(pieces, FORMAT[name], **options)) == whole
    assert collect(parts_of(text, FORMAT[name], **options)) == whole


@given(answers, st.sampled_from(sorted(FORMAT)))
def test_every_call_is_a_name_with_an_object_and_no_letter_is_invented(text, name):
    answer = parse_answer(FORMAT[name], text, TOOLS)
    for call in answer.calls:
        assert call.name
        assert isinstance(json.loads(call.arguments, parse_constant=pytest.fail), dict)
        if name not in ("qwen3-coder", "glm4", "lfm2", "gemma4") and call.arguments != "{}" and '"{' not in text:
            assert call.arguments in text
    rest = iter(text)
    assert all(letter in rest for letter in answer.reasoning + answer.text)  # what is left out is left out, no more
    parts = parts_of(text, FORMAT[name], streams_arguments=True)  # hostile text: nothing is promised but to go on
    assert all(part.text for part in parts)


def slow_hermes(text: str) -> Answer:
    """Calls in a whole text, by Python's own JSON reader."""
    pattern, said, calls, at = re.compile(r"[ \t\r\n]*<tool_call>[ \t\r\n]*"), "", [], 0
    while (mark := pattern.search(text, at)) is not None:
        said += text[at : mark.start()]
        try:
            value, end = json.JSONDecoder().raw_decode(text, mark.end())
        except ValueError:
            return Answer("unknown")
        given = value if isinstance(value, list) else [value]
        if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in given):
            return Answer("unknown")
        calls += [ToolCall(call["name"], json.dumps(call.get("arguments") or {})) for call in given]
        closing = re.compile(r"[ \t\r\n]*</tool_call>").match(text, end)
        at = closing.end() if closing else end
    rest = "" if at and not text[at:].strip(" \t\r\n") else text[at:]
    return Answer(said + rest, "", tuple(calls))


names = st.text(min_size=1, max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
call_objects = st.fixed_dictionaries(
    {"name": names, "arguments": st.dictionaries(st.text(max_size=5), values, max_size=2)}
)
bodies = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    call_objects | st.lists(call_objects, max_size=2),
    st.booleans(),
    st.sampled_from([None, 1]),
)
spaces = st.text("\n \t", max_size=3)
marked = st.builds("{0}<tool_call>{1}{2}{3}</tool_call>{4}".format, spaces, spaces, bodies, spaces, spaces)
plain = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=10)


@given(st.lists(marked | plain, max_size=3).map("".join))
@example('<tool_call>{"name": "a", "arguments": {"</tool_call>": "\\\\\\""}}</tool_call>')
def test_calls_are_those_that_a_reader_of_whole_texts_finds(text):
    expected = slow_hermes(text)
    found = parse_answer(FORMAT["hermes"], text, TOOLS)
    assert found.text == expected.text
    assert [call.name for call in found.calls] == [call.name for call in expected.calls]
    for ours, theirs in zip(found.calls, expected.calls, strict=True):
        assert json.loads(ours.arguments) == json.loads(theirs.arguments)
    assert collect(parts_of(text, FORMAT["hermes"], streams_arguments=True)) == found


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hermes", " "),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>[",","'),
        ("hermes", '<tool_call>{"a": '),
        ("hermes", '<tool_call>{"name": "now"}</tool_call> '),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "'),
        ("llama3", '{"name": "now", "parameters": {}};'),
        ("mistral-named", "[TOOL_CALLS]now"),
        ("qwen3-coder", "<tool_call><function=now><parameter=a>"),
        ("glm4", "<tool_call>now<arg_key>a</arg_key><arg_value>"),
        ("kimi-k2", "<|tool_calls_section_begin|><|tool_call_begin|>"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"),
        ("lfm2", "<|tool_call_start|>[now(a=["),
        ("phi4-mini", "functools["),
        ("gemma4", "<|tool_call>call:now{a:["),
        ("gemma4", "<|tool_call>call:now{a:1},"),
        ("none", "<think"),
    ],
)
@pytest.mark.slow
def test_work_grows_with_the_length_alone(name: str, unit: str) -> None:
    def seconds(count: int) -> float:
        text, begun = unit * count, time.process_time()
        for size in (3, len(text)):
            parser = AnswerParser(FORMAT[name], TOOLS)
            for at in range(0, len(text), size):
                parser.feed(text[at : at + size])
            parser.finish()
        return time.process_time() - begun

    gc.collect()
    gc.disable()  # a collection among all the objects of a test run takes longer than the parsing
    try:
        short = max(min(seconds(500) for _ in range(3)), 1e-3)
        assert min(seconds(8000) for _ in range(3)) < 64 * short, "quadratic work would take 256 times as long"
    finally:
        gc.enable()
