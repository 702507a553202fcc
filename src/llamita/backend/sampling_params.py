"""The choices of one request: the way its tokens are picked, and its end. Knows no tensor and no tokenizer."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_SEED = 2**64 - 1
MAX_CONTINUATIONS = 128
MAX_TOP_LOGPROBS = 100


@dataclass(frozen=True)
class SamplingParams:
    """The choices of one request: the way its tokens are picked, and its end.

    The defaults are plain sampling from the model's own distribution, `softmax(logits)`, with nothing else switched
    on, for at most 256 tokens. Raises ValueError naming the field, its value and what is allowed.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with at least this mass; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 drops none."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in prompt or output are divided by it (multiplied where negative); 1 changes nothing."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, once for each time they occur there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """The same seed gives the same text; without one it is drawn, and reported with the statistics."""
    n: int = 1
    """The number of continuations of the prompt to draw; the i-th has the seed `seed + i`."""
    max_tokens: int = 256
    """Most tokens to generate."""
    min_tokens: int = 0
    """No end-of-sequence token and no stop token before so many tokens; a stop string before them is passed over."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these token ids, whose text is left out."""
    visible_token_ids: tuple[int, ...] = ()
    """The names of these control tokens are part of the text, which leaves control tokens out otherwise."""
    ignore_eos: bool = False
    """Go on past an end-of-sequence token."""
    top_logprobs: int = 0
    """Report so many of the most probable tokens at each step, with their log-probabilities."""
    prompt_logprobs: bool = False
    """Report the log-probability of each token of the prompt but the first, with the `top_logprobs` likeliest there."""
    json_schema: str = ""
    """Write only JSON that fits this JSON schema."""
    regex: str = ""
    """Write only what this regular expression matches as a whole."""
    choices: tuple[str, ...] = ()
    """Write one of these texts."""
    grammar: str = ""
    """Write only what this grammar allows, in llguidance's variant of Lark's notation or in llama.cpp's GBNF."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, float, lambda t: t == 0 or t >= 1e-6, "0 (greedy) or a number >= 1e-6")
        _check("top_k", self.top_k, int, lambda k: k >= 0, "a whole number >= 0 (0 keeps every token)")
        _check("top_p", self.top_p, float, lambda p: 0 < p <= 1, "a number above 0 and at most 1 (1 keeps every token)")
        _check("min_p", self.min_p, float, lambda p: 0 <= p <= 1, "a number from 0 (drops no token) to 1")
        allowed = "a number from 0.001 to 1000 (1 changes nothing, above 1 discourages repetition)"
        _check("repetition_penalty", self.repetition_penalty, float, lambda r: 0.001 <= r <= 1000, allowed)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), float, lambda p: -100 <= p <= 100, "a number from -100 to 100")
        if self.seed is not None:
            _check("seed", self.seed, int, lambda seed: 0 <= seed <= MAX_SEED, "a whole number from 0 to 2^64 - 1")
        _check("n", self.n, int, lambda n: 1 <= n <= MAX_CONTINUATIONS, f"a whole number from 1 to {MAX_CONTINUATIONS}")
        _check("max_tokens", self.max_tokens, int, lambda n: n >= 1, "a whole number >= 1")
        allowed = f"a whole number from 0 to max_tokens={self.max_tokens}"
        _check("min_tokens", self.min_tokens, int, lambda n: 0 <= n <= self.max_tokens, allowed)
        allowed = f"a whole number from 0 to {MAX_TOP_LOGPROBS}"
        _check("top_logprobs", self.top_logprobs, int, lambda n: 0 <= n <= MAX_TOP_LOGPROBS, allowed)
        for token_id, bias in self.logit_bias.items():
            _check("a token id of logit_bias", token_id, int, lambda i: i >= 0, "a whole number >= 0")
            _check(f"logit_bias of {token_id}", bias, float, lambda b: abs(b) <= 1e6, "a finite number")
        for name in ("stop_token_ids", "visible_token_ids"):
            for token_id in getattr(self, name):
                _check(f"a token id of {name}", token_id, int, lambda i: i >= 0, "a whole number >= 0")
        for name in ("stop", "choices"):
            texts = getattr(self, name)
            if not isinstance(texts, tuple) or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"{name}={texts!r} is not allowed; give a tuple of non-empty strings")
        for name in ("json_schema", "regex", "grammar"):
            _check(name, getattr(self, name), str, lambda text: True, "a string (empty asks for nothing)")
        for name in ("ignore_eos", "prompt_logprobs"):
            _check(name, getattr(self, name), bool, lambda flag: True, "true or false")
        if sum(map(bool, (self.json_schema, self.regex, self.choices, self.grammar))) > 1:
            raise ValueError("more than one of json_schema, regex, choices and grammar was given; give one")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], defaults: "SamplingParams | None" = None) -> "SamplingParams":
        """Returns the parameters that a JSON object asks for: a line of `generate --input`, or the body of a request.

        Its keys are names of fields; one that is missing or null is as in `defaults`. `stop`, `choices`,
        `stop_token_ids` and `visible_token_ids` are one value or a list, the keys of `logit_bias` are token ids as
        strings, and `json_schema` is an object or its text. ValueError, in one line, for a key that is no field and a
        value that is not allowed.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in values if name not in names), None)
        if unknown is not None:
            raise ValueError(f"there is no field {unknown!r}; sampling parameters are {', '.join(names)}")
        given = {name: _from_json(name, value) for name, value in values.items() if value is not None}
        return dataclasses.replace(defaults or cls(), **given)

    @property
    def is_constrained(self) -> bool:
        """True where a grammar restricts the tokens."""
        return bool(self.json_schema or self.regex or self.choices or self.grammar)

    @property
    def reads_history(self) -> bool:
        """True where the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _from_json(name: str, value: Any) -> Any:
    """Converts a value of JSON to the type of the field, where its form allows that."""
    if name in ("stop", "choices"):
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{name}={value!r:.60} is not allowed; give a non-empty string, or a list of them")
        return tuple(texts)
    if name in ("stop_token_ids", "visible_token_ids"):
        return tuple(value) if isinstance(value, list) else (value,)
    if name == "logit_bias":
        if not isinstance(value, dict):
            raise ValueError(f"{name}={value!r:.60} is not allowed; give an object of token ids and numbers")
        faulty = next((key for key in value if not re.fullmatch("[0-9]{1,20}", key)), None)
        if faulty is not None:
            raise ValueError(f"a token id of {name}={faulty!r:.60} is not allowed; give a whole number >= 0")
        return {int(key): bias for key, bias in value.items()}
    if name == "json_schema" and isinstance(value, dict):
        return json.dumps(value)
    return value


def _check(name: str, value: Any, kind: type, in_range: Callable[[Any], bool], allowed: str) -> None:
    """Raises ValueError unless a value is of `kind` (whole numbers pass for floats, bools do not) and in range."""
    kinds = (int, float) if kind is float else (kind,)
    fits = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    if fits and kind is float:
        fits = abs(value) <= sys.float_info.max  # a whole number may be longer than any float
    if not fits or not in_range(value):
        shown = f"{value!r}" if kind in (int, float) else f"{value!r:.60}"
        raise ValueError(f"{name}={shown} is not allowed; give {allowed}")
