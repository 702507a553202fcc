"""llama.cpp's names for the ways in which byte-level tokenizers split text into words, and what each name stands for.

The patterns are those of the tokenizer.json of the models that the names come from; llama.cpp's own are spelled so that
its engine for regular expressions takes them. A pattern goes over the pieces that the one before it left, and what it
does not match is a piece too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from llamita.text.tiktoken_ranks import WORDS

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_SLASHED}"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}{_SLASHED}"
)
CHINESE = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VIKING = (r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")
MINICPM5 = (r"\p{N}{1,3}", WORDS.replace(r"\p{N}{1,3}", r"\p{N}+"))
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, r"\p{N}")
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 "
    "1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE "
    "1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 "
    "2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A "
    "10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
"""The letters of alphabets that have capitals, as the model's own file lists them, as code points."""
_CASED_CLASS = "".join("-".join(rf"\x{{{point}}}" for point in span.split("-")) for span in _CASED.split())
DEEPSEEK_LLM = (
    *("[\r\n]", rf"\s?[{_CASED_CLASS}]+"),
    *(r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+", r"\s+$", CHINESE, r"\p{N}+"),
)
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
THREE_DIGITS = "[0-9][0-9][0-9]"


@dataclass(frozen=True)
class Splitter:
    """A way to split words: patterns in their order, whether the text is brought to NFC first, and whether a word that
    is a token is taken whole, whatever the merges say."""

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    begins_texts: bool = False
    """Whether llama.cpp puts the BOS token before a text where the file does not say."""

    def pre_tokenizer(self, add_prefix_space: bool = False) -> Any:
        """Returns the same for a `tokenizers.Tokenizer`, with or without a space before a text that has none."""
        steps = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == r"\p{N}"
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in self.patterns
        ]
        if self.patterns[-1] == GPT2:  # the library has it built in
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space)
            return pre_tokenizers.Sequence([*steps[:-1], byte_level]) if steps[:-1] else byte_level
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space, use_regex=False)])

    def normalizer(self) -> Any:
        return normalizers.NFC() if self.nfc else None


_LLAMA3 = Splitter((WORDS,), whole_words=True, begins_texts=True)
_GPT2, _DIGITS, _QWEN2 = Splitter((GPT2,)), Splitter((r"\p{N}", GPT2)), Splitter((QWEN2,), nfc=True)
SPLITTERS: Mapping[str, Splitter] = {
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _DIGITS,
    "tekken": Splitter((TEKKEN,), whole_words=True, begins_texts=True),
    "qwen35": Splitter((QWEN35,), nfc=True),
    "gpt-4o": Splitter((GPT4O,)),
    "dbrx": Splitter((WORDS,)),
    "deepseek-llm": Splitter(DEEPSEEK_LLM),
    "deepseek-coder": Splitter(DEEPSEEK_CODER),
    "deepseek-v3": Splitter(DEEPSEEK_V3),
    "default": Splitter((PUNCTUATION.replace("`", ""), GPT2, r"\p{N}+", THREE_DIGITS)),
    "falcon": Splitter((PUNCTUATION, GPT2, THREE_DIGITS)),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3),
    "viking": Splitter(VIKING),
    "seed-coder": Splitter((SEED_CODER,)),
    "minicpm5": Splitter(MINICPM5, whole_words=True),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "granite-docling", "gigachat"), _GPT2),
    **dict.fromkeys(("mellum", "a.x-4.0"), _GPT2),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"), _QWEN2),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open"), Splitter((QWEN2,))),
    **dict.fromkeys(("smaug-bpe", "glm4", "chatglm-bpe"), Splitter((WORDS,))),
    **dict.fromkeys(("llama4", "kanana2", "talkie"), Splitter((GPT4O,))),
}
"""The names that are written come first; others mean the same as one of them."""


def name_of(spec: Mapping[str, Any]) -> str | None:
    """Returns llama.cpp's name for the way in which a tokenizer.json splits words; None where it has none."""
    given = _decisive(spec.get("pre_tokenizer"))
    normalizer = (spec.get("normalizer") or {}).get("type")
    whole_words = bool(spec["model"].get("ignore_merges"))
    same = {
        name: splitter
        for name, splitter in SPLITTERS.items()
        if _decisive(json.loads(splitter.pre_tokenizer().__getstate__())) == given
        and normalizer == ("NFC" if splitter.nfc else None)
    }
    alike = [name for name, splitter in same.items() if splitter.whole_words == whole_words]
    return next(iter(alike or same), None)


def _decisive(spec: Any) -> Any:
    """Returns a pre-tokenizer's settings without those that change no split."""
    if isinstance(spec, dict):
        if spec.get("type") == "Sequence" and len(spec["pretokenizers"]) == 1:
            return _decisive(spec["pretokenizers"][0])
        return {key: _decisive(value) for key, value in spec.items() if key != "trim_offsets"}
    return [_decisive(item) for item in spec] if isinstance(spec, list) else spec
