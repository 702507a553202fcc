"""Structured output: masks of the tokens that may come next, by a JSON schema, a regular expression, choices or a
grammar.

`llguidance` does the parsing; here its grammars are built from `SamplingParams`, its view of the vocabulary from our
tokenizer, and limits are set on what a stranger may ask of it. Masks are bits in numpy arrays, for any backend. Knows
nothing of tensors or of who is served.
"""

import functools
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask_par

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.gbnf import to_lark
from llamita.text.tokenizer import Tokenizer

LONGEST_SCHEMA = 1 << 16  # characters
LONGEST_REGEX = 1 << 12
LONGEST_CHOICES = 1 << 16  # characters of all choices together
LONGEST_GRAMMAR = 1 << 16
MOST_INTERSECTED = 8
"""Most patterns of a schema that combines schemas: the time to intersect them doubles with each."""
LARGEST_MULTIPLE = 10_000
"""Largest `multipleOf`, without its decimal point and trailing zeros, and largest sum of them: an expression for the
multiples of n has n states. Where schemas are combined, their least common multiple counts."""
ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions", "$schema", "$id")
)
COMPILED_KEPT = 64
BROKEN = "the grammar cannot be followed further"
"""How the reason begins why a text was ended that had become too expensive to restrict."""
WHITESPACE = r"[ \n]?[ ]{0,16}"
"""White space allowed between the parts of a JSON text; without a limit, some models write blanks without end."""
LARK = re.compile(r"\s*(%llguidance\b|start\s*:(?!:=))")
"""A line by which a grammar in Lark's notation is known."""
LARK_TEXT = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])*/')
LARK_TIMES = re.compile(r"\{\s*(\d+)?\s*,?\s*(\d+)?\s*\}")
MOST_TIMES = 1_000_000
"""How often a grammar may have a part repeated at most."""
LARK_OPTIONS = re.compile(r"\s*%llguidance\s*(?=\{)")
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,  # building, and the first mask of, the worst expression takes some 0.2 s
    step_lexer_fuel=100_000,  # a step 10 to 30 ms
    step_max_items=20_000,
    max_lexer_states=20_000,  # up to 2 kB each
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """Follows one continuation: knows the tokens that may come next after those accepted.

    `stops` are tokens that end a text besides those of the vocabulary; they are allowed where those are.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: "Vocabulary", executor: LLExecutor, stops: Sequence[int] = ()
    ) -> None:
        self._matcher, self._vocabulary, self._executor, self._stops = matcher, vocabulary, executor, stops

    def allowed(self) -> np.ndarray:
        """Returns the mask as int32 words: bit i % 32 of word i // 32 says whether token i may come.

        An end-of-text token may come exactly where the text may end. Raises ValueError where the grammar has become too
        expensive to follow.
        """
        (mask,) = fill([self])
        if self.error:
            raise ValueError(self.error)
        return mask

    def accept(self, token_id: int) -> None:
        """Accepts a token, none of `stops`. Raises ValueError where it may not come; the matcher is then unchanged."""
        if not 0 <= token_id < self._vocabulary.model_size or self._matcher.try_consume_tokens([token_id]) != 1:
            raise ValueError(self.error or f"token {token_id} may not come here: the grammar of the request forbids it")

    def rollback(self, count: int) -> None:
        """Takes the last `count` accepted tokens back; ValueError where fewer were accepted."""
        if count and not self._matcher.rollback(count):
            raise ValueError(self.error or f"{count} tokens cannot be taken back: so many were not accepted")

    @property
    def is_complete(self) -> bool:
        """True where the text is complete and only its end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """The reason why the grammar can be followed no further, in one line; empty where it can."""
        return f"{BROKEN}: {_line(self._matcher.get_error())}" if self._matcher.is_error() else ""


def fill(matchers: Sequence[Matcher]) -> list[np.ndarray]:
    """Returns the masks of many matchers of one `Grammars`, made by several threads; all zeros for an `error`."""
    if not matchers:
        return []
    vocabulary = matchers[0]._vocabulary
    words = np.zeros((len(matchers), vocabulary.words), dtype=np.int32)
    pairs = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
    fill_next_token_bitmask_par(matchers[0]._executor, pairs, words)
    for row, matcher in enumerate(matchers):
        if matcher._matcher.is_error():
            words[row] = 0
        elif matcher._stops and vocabulary.allows_end(words[row]):
            for token_id in matcher._stops:
                words.view(np.uint32)[row, token_id // 32] |= np.uint32(1 << (token_id % 32))
    return list(vocabulary.cut(words))


class Grammars:
    """Compiles the grammars of `SamplingParams`; one for an engine.

    `vocab_size` is the model's, which may be padded beyond the tokenizer's; those ids are never allowed. The last
    grammars are kept compiled. May be used from several threads.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._executor = LLExecutor()
        self._compiled = functools.lru_cache(COMPILED_KEPT)(self._compile)

    def matcher(self, params: SamplingParams) -> Matcher:
        """Returns a matcher at the start of a text for the grammar of `params`.

        Raises ValueError, in one line, for a broken or too expensive JSON schema, regular expression, grammar or list
        of choices.
        """
        if params.json_schema:
            start = self._compiled("json_schema", params.json_schema)
        elif params.regex:
            start = self._compiled("regex", params.regex)
        elif params.grammar:
            start = self._compiled("grammar", params.grammar)
        else:
            assert params.choices, "the request asks for no structure"
            start = self._compiled("choices", params.choices)
        return Matcher(start.deep_copy(), self._vocabulary, self._executor, params.stop_token_ids)

    def _compile(self, kind: str, asked: str | tuple[str, ...]) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary.tokenizer, _grammar(kind, asked), log_level=0, limits=LIMITS)
        trial = matcher
        if not matcher.is_error():  # much is built only when it is needed: find out now whether a token can be taken
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            trial = matcher.deep_copy()
            trial.consume_token(int(np.unpackbits(mask, bitorder="little").argmax()))
        if trial.is_error():
            raise ValueError(f"{kind} is not supported: {_line(trial.get_error())}")
        return matcher


class Vocabulary:
    """A tokenizer as `llguidance` sees it; built when first needed, which takes a while for a large one.

    Tokens that stand for no text are never allowed, but for those that end a text, and control tokens that a grammar
    names (by `<|name|>` or `<[id]>`). A model without any that ends a text gets one more, past the end of its
    vocabulary, since the library needs one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.model_size, self._ours = vocab_size, tokenizer
        self._eos = sorted(eos for eos in set(eos_token_ids) if 0 <= eos < vocab_size)
        self.size = vocab_size if self._eos else vocab_size + 1
        self._ends = self._eos or [self.model_size]
        self.words = (self.size + 31) // 32

    def allows_end(self, words: np.ndarray) -> bool:
        """Whether the text may end, by a mask that has not been cut."""
        return bool(words.view(np.uint32)[self._ends[0] // 32] >> np.uint32(self._ends[0] % 32) & 1)

    @functools.cached_property
    def tokenizer(self) -> LLTokenizer:
        known = min(self._ours.vocab_size, self.model_size)
        tokens = [self._ours.token_bytes(i) for i in range(known)] + [b""] * (self.size - known)
        ends = self._ends
        for token_id in ends:
            tokens[token_id] = b""
        control = [i for i in range(known) if not tokens[i] and i not in ends and self._ours.spelled_bytes(i)]
        for token_id in control:
            tokens[token_id] = self._ours.spelled_bytes(token_id)
        source = _Source(self._ours, tokens, ends[0], special_token_ids=control)
        source.library = LLTokenizer(TokenizerWrapper(source), eos_token=ends)
        return source.library

    def cut(self, words_RW: np.ndarray) -> np.ndarray:
        """Returns the masks cut to the model's own ids. R: masks, W: words of a mask."""
        if not self._eos:
            words_RW = words_RW[:, : (self.model_size + 31) // 32]
            if self.model_size % 32:
                words_RW[:, -1] &= np.int32((1 << (self.model_size % 32)) - 1)
        return words_RW & self._known[: words_RW.shape[1]]

    @functools.cached_property
    def _known(self) -> np.ndarray:
        """The mask of all tokens that mean anything: a grammar may name others by their ids."""
        known = min(self._ours.vocab_size, self.model_size)
        ids = [i for i in range(known) if self._ours.spelled_bytes(i)] + self._eos
        bits = np.zeros(self.words * 32, dtype=np.uint8)
        bits[ids] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass
class _Source:
    """The tokenizer in the form that `llguidance` asks for: bytes by id, and a function from a text to its tokens."""

    ours: Tokenizer
    tokens: list[bytes]
    eos_token_id: int
    special_token_ids: list[int]
    bos_token_id: int | None = None
    library: LLTokenizer | None = None

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        for prefix in ("", "\n"):  # SentencePiece puts a space before a text; it does not after a line's end
            ids = self.ours.encode(prefix + text)
            pieces = [self.tokens[i] if i < len(self.tokens) else b"" for i in ids]
            skipped = 0
            while prefix and skipped < len(ids) and not b"".join(pieces[:skipped]).endswith(prefix.encode()):
                skipped += 1
            if b"".join(pieces[skipped:]) == text.encode():
                return ids[skipped:]
        return self.library.greedy_tokenize(text) if self.library else []


def _grammar(kind: str, asked: str | tuple[str, ...]) -> str:
    """Returns the grammar in llguidance's notation; ValueError for one that is too long or no valid text."""
    texts = (asked,) if isinstance(asked, str) else asked
    longest = {"json_schema": LONGEST_SCHEMA, "regex": LONGEST_REGEX, "grammar": LONGEST_GRAMMAR}
    length, most = sum(map(len, texts)), longest.get(kind, LONGEST_CHOICES)
    if length > most:
        raise ValueError(f"{kind} has {length} characters; give at most {most}")
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        raise ValueError(f"{kind} holds a lone surrogate, which no text can hold")
    if kind == "json_schema":
        _check_schema(texts[0])
        try:
            return LLMatcher.grammar_from_json_schema(
                texts[0], overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True, "lenient": False}
            )
        except ValueError as fault:
            raise ValueError(f"json_schema is not supported: {_line(str(fault))}") from None
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(_lark(texts[0]))
    # An expression of all choices rather than a rule of the grammar for each: thousands of them stay cheap.
    return LLMatcher.grammar_from_regex(texts[0] if kind == "regex" else "|".join(map(_literal, texts)))


def _lark(grammar: str) -> str:
    """Returns a grammar in Lark's notation, which one in llama.cpp's (GBNF) is turned into.

    Without `no_forcing` llguidance looks for all that must come next, and does so without end where one terminal
    swallows what has to follow it, as in `start: /x+/ "xy"`. A grammar of which that is known not to be so may say it.
    """
    options: dict[str, Any] = {}
    if "::=" in grammar and not any(LARK.match(line) for line in grammar.splitlines()):
        try:
            grammar = to_lark(grammar)
        except RecursionError:
            raise ValueError("grammar is nested too deeply") from None
        except ValueError as fault:
            raise ValueError(f"grammar is not supported: {_line(str(fault))}") from None
    elif (given := LARK_OPTIONS.match(grammar)) is not None:
        try:
            options, end = json.JSONDecoder().raw_decode(grammar, given.end())
        except (ValueError, RecursionError):
            return grammar  # llguidance says what is wrong with them
        grammar = grammar[end:]
    times = [int(number) for found in LARK_TIMES.findall(LARK_TEXT.sub("", grammar)) for number in found if number]
    if (most := max(times, default=0)) > MOST_TIMES:
        raise ValueError(f"grammar is not supported: Too many items, a part {most} times; at most {MOST_TIMES} times")
    return f"%llguidance {json.dumps({'no_forcing': True, **options})}\n{grammar}"


def _literal(text: str) -> str:
    """Returns a regular expression for this text alone."""
    return "".join("\\" + letter if letter in r"\.+*?()|[]{}^$#&-~" else letter for letter in text)


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise ValueError("json_schema is nested too deeply") from None
    except ValueError as fault:
        raise ValueError(f"json_schema is not JSON: {fault}") from None
    if not isinstance(schema, dict):
        raise ValueError(f"json_schema must be a JSON object, not {type(schema).__name__}; {{}} allows any JSON")
    _check_cost(schema)


def _check_cost(schema: dict[str, Any]) -> None:
    """Raises ValueError for a schema whose compilation would take time without bounds, which the limits of llguidance
    do not cover: many patterns, or multiples of large numbers, to be intersected."""
    combines, patterns = False, 0
    multiples: list[int] = []
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if not isinstance(part, dict):
            continue
        waiting += part.values()
        choosing = sum(key in part for key in ("$ref", "anyOf", "oneOf"))
        combines |= "allOf" in part or bool(choosing and len(part.keys() - ANNOTATIONS) > 1)
        patterns += sum(isinstance(part.get(key), str) for key in ("pattern", "format"))
        value = part.get("multipleOf")
        if isinstance(value, int | float) and value > 0 and math.isfinite(value):
            digits = Decimal(repr(value)).as_tuple().digits
            multiples.append(int("".join(map(str, digits)).rstrip("0") or 1))
    if combines and patterns > MOST_INTERSECTED:
        raise ValueError(
            f"json_schema has {patterns} patterns and formats in schemas that are combined; give at most "
            f"{MOST_INTERSECTED}, or do without allOf and keywords beside $ref and anyOf"
        )
    size = math.lcm(*multiples) if combines else sum(multiples)
    if size > LARGEST_MULTIPLE:
        raise ValueError(
            f"json_schema asks for multiples of {size} (multipleOf, all together); at most {LARGEST_MULTIPLE}"
        )


def _line(message: str) -> str:
    """Returns the library's message in one line of moderate length, without its picture of the place."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return "no text fits it" if reason == "NoExtensionBias" else reason[:300]
