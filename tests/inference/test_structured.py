"""Structured output: any choice among the allowed tokens gives text of the form asked for, as others judge it."""

import functools
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llamita.backend.interface import SampleSpec
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.sampling import Sampler
from llamita.inference.detokenizer import IncrementalDetokenizer
from llamita.inference.structured import Grammars, Matcher, fill
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.sentencepiece_training import train as train_sentencepiece
from llamita.text.tokenizer import Tokenizer
from tests.inference.conftest import TEXT

JSON_TEXT = ' {"name": "Anna", "age": 12, "tags": ["x", null, true]}, -3.5e10 [[1, 2], {}] "é🦙" \\" \\n' * 30


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return train_bpe_from_iterator([TEXT + JSON_TEXT], vocab_size=340)
    return Tokenizer.from_codec(train_sentencepiece([TEXT + JSON_TEXT], 400, ["<unk>", "<s>", "</s>"]))


@pytest.fixture(scope="module")
def grammars(tok: Tokenizer) -> Grammars:
    return Grammars(tok, tok.vocab_size + 37, [tok.eos_id])  # a model's vocabulary is often padded


def ids_in(mask: np.ndarray) -> list[int]:
    return [32 * word + bit for word, bits in enumerate(mask.tolist()) for bit in range(32) if bits >> bit & 1]


def write(matcher: Matcher, tok: Tokenizer, seed: int, most: int = 600) -> str | None:
    """The text of random choices among the allowed tokens, ending where it may half of the time; None: unfinished.

    Closing brackets are taken more often, so that nested structures end.
    """
    chance, text = random.Random(seed), IncrementalDetokenizer(tok, context=tok.encode("Say:"))
    written = ""
    for _ in range(most):
        if matcher.is_complete:
            return written + text.finish()
        ids = ids_in(matcher.allowed())
        assert ids, "nothing may come and the text is not complete"
        assert max(ids) < tok.vocab_size
        if tok.eos_id in ids and (len(ids) == 1 or chance.random() < 0.5):
            matcher.accept(tok.eos_id)
            assert matcher.is_complete
            return written + text.finish()
        ids = [i for i in ids if i != tok.eos_id]
        closing = [i for i in ids if tok.token_bytes(i) in (b"}", b"]", b'"')]
        token_id = chance.choice(closing if closing and chance.random() < 0.3 else ids)
        matcher.accept(token_id)
        written += text.feed(token_id)
    return None


def texts(params: SamplingParams, grammars: Grammars, tok: Tokenizer, count: int = 12) -> Iterator[str]:
    written = [write(grammars.matcher(params), tok, seed) for seed in range(count)]
    finished = [text for text in written if text is not None]
    assert len(finished) >= count // 2
    assert not any("\ufffd" in text for text in finished)  # half a character never ends a text
    yield from finished


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return set(value) == {"name", "age"} and len(value["name"]) <= 8 and type(value["age"]) is int and value["age"] >= 0


SCHEMAS: list[tuple[dict, Callable[[Any], bool]]] = [
    ({"type": "object"}, lambda v: isinstance(v, dict)),
    ({"type": "integer", "minimum": -20, "maximum": 999}, lambda v: type(v) is int and -20 <= v <= 999),
    ({"type": "number"}, lambda v: type(v) in (int, float)),
    ({"type": "boolean"}, lambda v: v in (True, False)),
    ({"enum": ["é", "🦙 llama", 3, None, ["x"]]}, lambda v: v in ["é", "🦙 llama", 3, None, ["x"]]),
    ({"const": {"a": [1]}}, lambda v: v == {"a": [1]}),
    ({"type": "string", "minLength": 2, "maxLength": 4}, lambda v: 2 <= len(v) <= 4),
    ({"type": "string", "pattern": "^[a-c]{2,4}é+$"}, lambda v: re.fullmatch("[a-c]{2,4}é+", v) is not None),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        lambda v: 1 <= len(v) <= 3 and set(v) <= {True, False},
    ),
    (PERSON, is_person),
    (
        {
            "type": "object",
            "properties": {"who": {"type": "array", "items": PERSON, "maxItems": 2}, "ok": {"type": "boolean"}},
            "required": ["who"],
            "additionalProperties": False,
        },
        lambda v: {"who"} <= set(v) <= {"who", "ok"} and len(v["who"]) <= 2 and all(map(is_person, v["who"])),
    ),
    (
        {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
        lambda v: v is None or (isinstance(v, str) and len(v) <= 3),
    ),
    (
        {
            "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
            "$ref": "#/$defs/tree",
        },
        lambda v: isinstance(v, list) and len(v) <= 2,
    ),
]


@pytest.mark.parametrize(("schema", "fits"), SCHEMAS, ids=[json.dumps(schema)[:40] for schema, _ in SCHEMAS])
def test_json_fits_its_schema(schema: dict, fits: Callable[[Any], bool], grammars: Grammars, tok: Tokenizer) -> None:
    for text in texts(SamplingParams(json_schema=json.dumps(schema)), grammars, tok):
        assert fits(json.loads(text)), text


@pytest.mark.parametrize(
    "regex",
    ["ab|a", "a/b\\/c",
     "a\nb", "[a-z]{1,20}?x", "[0-9]{3}-[0-9]{2}", "日本語|naïve", "(a|b)*c", "^abc$", ".{0,9}", "a{2,5}é+",
     "[^a]", "The fox", "x&y~z#\"'", "(?i)abc", "🦙+", "[a-z]\\s?[é-ü]", "(\\+|-)?[0-9]{1,3}(\\.[0-9]+)?"],
)  # fmt: skip
def test_text_matches_its_regular_expression(regex: str, grammars: Grammars, tok: Tokenizer) -> None:
    for text in texts(SamplingParams(regex=regex), grammars, tok):
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize(
    "choices",
    [
        ("yes", "no"),
        ('a"b', "\\", "\n", "日本", "🦙"),
        ("a", "ab", "abc"),
        (" x", "x "),
        ("\x00", ".*", "a|b", "(", "/"),
    ],
)
def test_each_choice_and_nothing_else_can_come(choices: tuple[str, ...], grammars: Grammars, tok: Tokenizer) -> None:
    assert set(texts(SamplingParams(choices=choices), grammars, tok, count=60)) == set(choices)


@pytest.mark.parametrize(
    ("grammar", "regex"),
    [
        ('start: greeting (" " NAME)+\ngreeting: "Hi" | "Où"\nNAME: /[a-z]{1,3}/', r"(Hi|Où)( [a-z]{1,3})+"),
        ('start: "n=" %json {"type": "integer", "minimum": 1, "maximum": 99}', r"n=[1-9][0-9]?"),
        ("start: /[^🦙]{0,3}/ end\nend: /x|日/", r"(?s:[^🦙]{0,3}(x|日))"),
        ('root ::= greeting (" " name)+  # llama.cpp\'s notation\ngreeting ::= "Hi" | "Où"\nname ::= [a-z]{1,3}',
         r"(Hi|Où)( [a-z]{1,3})+"),
        ('root ::= begin "," [^,]{2} | "\\"::=\\n"\nbegin ::= [0-9]{2,}', r'(?s:[0-9]{2,},[^,]{2}|"::=\n)'),
    ],
)  # fmt: skip
def test_text_is_what_its_grammar_allows(grammar: str, regex: str, grammars: Grammars, tok: Tokenizer) -> None:
    for text in texts(SamplingParams(grammar=grammar), grammars, tok):
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize(
    "grammar",
    ["root ::= (", 'root ::= "a', 'other ::= "a"', 'root ::= absent "a"', "root ::= " + "(" * 30_000, "root ::= [z-a]",
     'root ::= "a"{3,1}', 'root ::= "a"{}', 'root ::= * "a"', 'root ::= "\\q"', 'root ::= "\\ud83d"', 'root ::= <s>'],
    ids=lambda grammar: grammar[:20],
)  # fmt: skip
def test_a_broken_grammar_of_llama_cpps_is_refused_in_a_line(grammar: str, grammars: Grammars) -> None:
    with pytest.raises(ValueError, match=r"^grammar .*[^\n]{5}$"):
        grammars.matcher(SamplingParams(grammar=grammar))


ARITHMETIC = r"""# as llama.cpp has it among its examples
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
GBNF: list[tuple[str, list[str], list[str]]] = [  # a grammar of llama.cpp's, texts that it takes, and others
    (ARITHMETIC, ["a+1=2\n", "(a*b) -c =\n\n7\n1=2\n"], ["a=\n", "a+1=2"]),
    ('root ::= a b\na ::= "x"*\nb ::= "x" "y"', ["xy", "xxxy"], ["y", "xx"]),
    ('root ::= (a | b)+ c\na ::= "ab"\nb ::= "a"\nc ::= "bc"', ["abc", "ababc", "aabc"], ["ab", "bc"]),
    ('root ::= ([a-z] | "if!")+', ["ifx", "if!if"], ["!"]),
    ("root ::= . [^x]", ["\n\n", "éa"], ["ax", "a"]),
    (r'root ::= "\u00e9" [\U0001F600-\U0001F64F\x41] "\[\"\\"', ['é😀["\\', 'éA["\\'], ['ea["\\']),
    (r"root ::= [a\-z] [-+] [a-c-]", ["-+-", "a-b"], ["b+a", "a,a"]),
    ("root ::= [a&&b] [a~~b] [!--] [[.]", ["&~#[", "ab-."], ["aa.."]),
    ('root ::= FOO foo fooBar foo-bar foo_bar start 1st\nFOO ::= "a"\nfoo ::= "b"\nfooBar ::= "c"\nfoo-bar ::= "d"\n'
     'foo_bar ::= "e"\nstart ::= "f"\n1st ::= "g"', ["abcdefg"], ["aacdefg"]),
    ('root ::=\r\n  "a" # don\'t "quote\r\n  | "b" [#]\r\n', ["a", "b#"], ["b"]),
    ('root ::= "ab"{2} ("c" "d"){0} "e"?+ [0-9]{1,65536} |', ["abab1", "ababee23", ""], ["ab1", "ababcd1", "abab"]),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "right", "wrong"), GBNF)
def test_a_grammar_of_llama_cpps_takes_what_it_takes_there(grammar: str, right: list[str], wrong: list[str]) -> None:
    tok = train_bpe_from_iterator(["a"], 259)  # bytes, so that no token jumps over an end
    grammars = Grammars(tok, tok.vocab_size, [tok.eos_id])

    def takes(text: str) -> bool:
        matcher = grammars.matcher(SamplingParams(grammar=grammar))
        for token_id in tok.encode(text):
            if token_id not in ids_in(matcher.allowed()):
                return False
            matcher.accept(token_id)
        return matcher.is_complete or tok.eos_id in ids_in(matcher.allowed())

    assert [text for text in right if not takes(text)] == []
    assert [text for text in wrong if takes(text)] == []


@pytest.mark.parametrize("options", ["", "%llguidance {}\n", '\n%llguidance {"allow_invalid_utf8": true}\n'])
def test_a_terminal_that_swallows_what_must_follow_does_not_hang(options: str, grammars: Grammars) -> None:
    """llguidance would look for the end of the x's for ever: the text goes on, as long as it may be."""
    matcher = grammars.matcher(SamplingParams(grammar=options + 'start: /x+/ "xy"'))
    for _ in range(3):
        matcher.accept(ids_in(matcher.allowed())[0])


def test_a_grammar_names_control_tokens_and_gets_no_others(grammars: Grammars, tok: Tokenizer) -> None:
    named = grammars.matcher(SamplingParams(grammar=f'start: <s> <[{tok.unk_id}]> "a"'))
    for token_id in (tok.bos_id, tok.unk_id):
        assert ids_in(named.allowed()) == [token_id]
        named.accept(token_id)
    assert not {tok.bos_id, tok.unk_id, tok.eos_id} & set(ids_in(named.allowed()))
    free = ids_in(grammars.matcher(SamplingParams(grammar="start: /(?s:.*)/")).allowed())
    assert not {tok.bos_id, tok.unk_id} & set(free)
    every = ids_in(grammars.matcher(SamplingParams(grammar='start: <[*]> "a"')).allowed())
    assert every == [i for i in range(tok.vocab_size) if tok.spelled_bytes(i)]  # no padding of the model's vocabulary


def test_thousands_of_choices_stay_cheap(grammars: Grammars, tok: Tokenizer) -> None:
    choices = tuple(f"item {i}" for i in range(5000))
    assert set(texts(SamplingParams(choices=choices), grammars, tok, count=5)) <= set(choices)


@pytest.mark.parametrize("extra", [0, 1, 31, 64])
def test_the_end_may_come_exactly_where_the_text_may_end(tok: Tokenizer, extra: int) -> None:
    size, ends = tok.vocab_size + extra, [tok.eos_id, tok.vocab_size + extra - 1]  # the last id is padding, or a token
    matcher = Grammars(tok, size, ends).matcher(SamplingParams(regex="a|ab"))
    assert matcher.allowed().shape == ((size + 31) // 32,)
    assert matcher.allowed().dtype == np.int32
    assert not set(ends) & set(ids_in(matcher.allowed()))
    (a,), (b,) = ([i for i in range(3, tok.vocab_size) if tok.token_bytes(i) == text][-1:] for text in (b"a", b"b"))
    matcher.accept(a)
    assert set(ends) < set(ids_in(matcher.allowed()))
    assert not matcher.is_complete
    matcher.accept(b)
    assert matcher.is_complete
    assert ids_in(matcher.allowed()) == sorted(set(ends))


@pytest.mark.parametrize("has_end", [True, False])
def test_stop_tokens_may_come_exactly_where_the_text_may_end(tok: Tokenizer, has_end: bool) -> None:
    grammars = Grammars(tok, tok.vocab_size, [tok.eos_id] if has_end else [])
    matcher = grammars.matcher(SamplingParams(regex="a|ab", stop_token_ids=(tok.bos_id, tok.vocab_size - 1)))
    stops = {tok.bos_id, tok.vocab_size - 1}
    assert not stops & set(ids_in(matcher.allowed()))
    matcher.accept([i for i in range(3, tok.vocab_size) if tok.token_bytes(i) == b"a"][-1])
    assert stops < set(ids_in(matcher.allowed()))
    assert (tok.eos_id in ids_in(matcher.allowed())) == has_end


@pytest.mark.parametrize("extra", [0, 1, 64])
def test_a_model_without_an_end_token_can_be_followed(tok: Tokenizer, extra: int) -> None:
    size = tok.vocab_size + extra
    matcher = Grammars(tok, size, []).matcher(SamplingParams(choices=("no",)))
    while not matcher.is_complete:
        assert matcher.allowed().shape == ((size + 31) // 32,)
        ids = ids_in(matcher.allowed())
        assert ids
        assert max(ids) < tok.vocab_size
        with pytest.raises(ValueError, match="may not come here"):
            matcher.accept(size)
        matcher.accept(ids[0])
    assert ids_in(matcher.allowed()) == []


def test_a_mask_allows_the_tokens_whose_bytes_go_on(tok: Tokenizer) -> None:
    """Against the plain rule: a token may come if some text of the (finite) language begins with all bytes so far."""
    language = [b"the", b"then", b"th\xc3\xa9", "日".encode(), "旦".encode()]
    matcher = Grammars(tok, tok.vocab_size, [tok.eos_id]).matcher(
        SamplingParams(choices=("the", "then", "thé", "日", "旦"))
    )
    known = [tok.token_bytes(i) for i in range(tok.vocab_size)]

    def compare(so_far: bytes) -> int:
        rule = {i for i, text in enumerate(known) if text and any(x.startswith(so_far + text) for x in language)}
        rule |= {tok.eos_id} if so_far in language else set()
        got = set(ids_in(matcher.allowed()))
        assert got <= rule
        nexts = {x[: len(so_far) + 1] for x in language if x.startswith(so_far)}
        assert got == rule if len(nexts) > 1 else got  # a forced byte may be held to the tokenizer's own spelling
        count = 1
        for i in sorted(got - {tok.eos_id}):
            matcher.accept(i)
            count += compare(so_far + known[i])
            matcher.rollback(1)
        return count

    assert compare(b"") > 8


def test_a_refused_token_changes_nothing(grammars: Grammars, tok: Tokenizer) -> None:
    matcher = grammars.matcher(SamplingParams(regex="abc"))
    before = matcher.allowed()
    for token_id in (tok.bos_id, tok.eos_id, tok.vocab_size + 5, -1, 10**9, tok.encode("x")[-1]):
        with pytest.raises(ValueError, match=f"token {token_id} may not come here"):
            matcher.accept(token_id)
    np.testing.assert_array_equal(matcher.allowed(), before)
    assert not matcher.error


def test_masks_filled_together_are_those_of_each_alone(grammars: Grammars, tok: Tokenizer) -> None:
    asked = [SamplingParams(regex="[a-z]+"), SamplingParams(choices=("yes", "no")), SamplingParams(json_schema="{}")]
    together, alone = ([grammars.matcher(params) for params in asked * 4] for _ in range(2))
    chance = random.Random(1)
    for _ in range(6):
        masks = fill(together)
        for mask, matcher in zip(masks, alone, strict=True):
            np.testing.assert_array_equal(mask, matcher.allowed())
        for mask, first, second in zip(masks, together, alone, strict=True):
            ids = [i for i in ids_in(mask) if i != tok.eos_id]
            if ids:
                token_id = chance.choice(ids)
                first.accept(token_id)
                second.accept(token_id)
    assert fill([]) == []


def test_matchers_of_one_grammar_go_their_own_ways(grammars: Grammars) -> None:
    params = SamplingParams(choices=("yes", "no"))
    first, second = grammars.matcher(params), grammars.matcher(params)
    before = second.allowed()
    first.accept(ids_in(before)[0])
    np.testing.assert_array_equal(second.allowed(), before)
    np.testing.assert_array_equal(grammars.matcher(params).allowed(), before)


def test_compiling_again_is_cheap(grammars: Grammars) -> None:
    properties = {f"p{i}": {"enum": [f"e{i} {j}" for j in range(40)]} for i in range(40)}
    params = SamplingParams(json_schema=json.dumps({"type": "object", "properties": properties}))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        grammars.matcher(params)
        seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) < seconds[0] / 3, seconds


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(a)\\1", "backreferences"),
        ("regex", "a{1000000000}", "too many expressions"),
        ("regex", "((a{200}){200}){200}", "too many expressions"),
        ("regex", "(" * 1500 + "a" + ")" * 1500, "nested"),
        ("regex", "a" * 5000, "5000 characters; give at most 4096"),
        ("regex", "\ud800", "lone surrogate"),
        ("choices", ("x" * 70_000,), "70000 characters; give at most 65536"),
        ("choices", ("fine", "\udc00"), "lone surrogate"),
        ("json_schema", "{", "json_schema is not JSON"),
        ("json_schema", "true", "must be a JSON object, not bool"),
        ("json_schema", "[" * 60_000, "nested too deeply"),
        ("json_schema", '{"items":' * 300 + "{}" + "}" * 300, "recursion limit"),
        ("json_schema", '{"type": "objec"}', "Invalid type: objec"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "does not fetch"),
        ("json_schema", '{"$ref": "#"}', "no text fits it"),
        ("json_schema", '{"pattern": "(?=a)"}', "look-around"),
        ("json_schema", json.dumps({"enum": ["x" * 70_000]}), "give at most 65536"),
        ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000, "too deeply nested"),
        ("grammar", "start: a", "unknown name"),
        ("grammar", 'start: "a"{1000000000}', "Too many items"),
        ("grammar", "start: <|nope|>", "unknown special token"),
        ("grammar", "start: <[0-999999999]>", "range end too large"),
        ("grammar", "start: start", "no text fits it"),
        ("grammar", 'start: %json {"uniqueItems": true}', "uniqueItems"),
        ("grammar", 'start: "\ud800"', "lone surrogate"),
        ("grammar", "start: /a/ //" + "x" * 70_000, "give at most 65536"),
        ("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"{x}{i}": {"type": "integer"}},
                                                          "required": [f"{x}{i}"]} for x in "ab"]}
                                              for i in range(14)]}), "too large"),
        ("json_schema", json.dumps({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(60)]}),
         "60 patterns"),
        ("json_schema", json.dumps(functools.reduce(lambda inner, i: {"pattern": f".*{i}.*", "anyOf": [inner]},
                                                    range(30), {})), "30 patterns"),
        ("json_schema", '{"type": "number", "multipleOf": 111546435}', "multiples of 111546435"),
        ("json_schema", '{"type": "number", "multipleOf": 9.99983}', "multiples of 999983"),
        ("json_schema", json.dumps({"properties": {str(i): {"multipleOf": 9973} for i in range(90)}}), "multiples of"),
        ("json_schema", json.dumps({"allOf": [{"multipleOf": prime} for prime in (3, 5, 7, 11, 13, 17)]}), "255255"),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_what_is_broken_or_too_expensive_is_refused_in_a_line_and_soon(
    field: str, value: Any, said: str, grammars: Grammars
) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        grammars.matcher(SamplingParams(**{field: value}))
    assert time.perf_counter() - start < 5
    assert field in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_patterns_and_multiples_of_ordinary_schemas_are_compiled(grammars: Grammars) -> None:
    text = {"type": "string", "pattern": "^[a-z]+$"}
    for schema in (
        {"type": "object", "properties": {f"p{i}": text for i in range(40)}},
        {"$defs": {"t": text}, "properties": {f"p{i}": {"$ref": "#/$defs/t", "description": "x"} for i in range(40)}},
        {"allOf": [text, {"minLength": 2}]},
        {"type": "number", "multipleOf": 0.01},
        {
            "properties": {
                "price": {"type": "number", "multipleOf": 0.01},
                "size": {"type": "integer", "multipleOf": 250},
            }
        },
    ):
        assert not grammars.matcher(SamplingParams(json_schema=json.dumps(schema))).error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "(x+x+)+y"),
        ("regex", "([a-z]*[b-y]*){60}"),
        ("regex", "(a|aa)+$"),
        ("regex", "[ab]*a[ab]{200}"),
        ("regex", "(?:.{0,500}x){50}"),
        ("regex", "(.*a.{0,200}){5}"),
        ("regex", "|".join(".*".join("abcdefgh"[i:] + "abcdefgh"[:i]) for i in range(8))),
        ("json_schema", '{"type": "string", "minLength": 100000}'),
        ("json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 1000000000}'),
        ("json_schema", '{"type": "string", "pattern": "([a-z]*[b-y]*){60}"}'),
    ],
)  # fmt: skip
def test_hostile_grammars_that_compile_stay_bounded_or_end_with_an_error(
    field: str, value: str, grammars: Grammars, tok: Tokenizer
) -> None:
    matcher, chance = grammars.matcher(SamplingParams(**{field: value})), random.Random(3)
    neighbour = grammars.matcher(SamplingParams(choices=("yes", "no")))
    for _ in range(60):
        start = time.perf_counter()
        mask, beside = fill([matcher, neighbour])
        ids = [i for i in ids_in(mask) if i != tok.eos_id]
        if not matcher.error and ids:
            try:
                matcher.accept(chance.choice(ids))
            except ValueError:
                assert matcher.error
        assert time.perf_counter() - start < 3
        assert ids_in(beside)  # a neighbour goes on
        if matcher.error:
            assert "\n" not in matcher.error
            with pytest.raises(ValueError, match="the grammar cannot be followed further"):
                matcher.allowed()
            assert not fill([matcher])[0].any()
            return
        if matcher.is_complete or not ids:
            return


def test_masks_hold_a_sampler_to_their_grammars_beside_a_request_without_one(
    grammars: Grammars, tok: Tokenizer
) -> None:
    """With a model that says anything: batched over several grammars, sampled and greedy."""
    forms = [
        SamplingParams(json_schema=json.dumps(PERSON), temperature=1.5),
        SamplingParams(regex="[a-c]{3,9}é", top_p=0.5),
        SamplingParams(choices=("The fox", "owl"), temperature=0, logit_bias={tok.eos_id: -5.0}),
        SamplingParams(),
    ]
    size, texts = tok.vocab_size + 37, [b""] * 4
    sampler, model = Sampler(size), torch.Generator().manual_seed(2)
    matchers = {row: grammars.matcher(params) for row, params in enumerate(forms) if params.is_constrained}
    for position in range(300):
        open_rows = [row for row, matcher in matchers.items() if not matcher.is_complete]
        masks = dict(zip(open_rows, fill([matchers[row] for row in open_rows]), strict=True))
        rows = [*open_rows, 3]
        specs = [SampleSpec(forms[row], row, position, allowed=masks.get(row)) for row in rows]
        for row, token in zip(
            rows, sampler.sample(torch.randn(len(rows), size, generator=model), specs, rows), strict=True
        ):
            if row in matchers:
                matchers[row].accept(token.token_id)
                texts[row] += tok.token_bytes(token.token_id)
    assert all(matcher.is_complete for matcher in matchers.values())
    assert is_person(json.loads(texts[0]))
    assert re.fullmatch("[a-c]{3,9}é", texts[1].decode())
    assert texts[2].decode() in ("The fox", "owl")
