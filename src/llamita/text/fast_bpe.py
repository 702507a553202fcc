"""The same ids as `tokenizers` gives for a byte-level BPE, through `tiktoken`, several times faster.

Knows nothing of special tokens, files or batches. `fast_bpe` gives an encoder only where the two are proven equal.

The proof. Both libraries split a text by the same pattern and then merge adjacent pieces of bytes inside each part,
lowest rank first and leftmost first among equals. They differ in what may merge: `tokenizers` merges the listed
pairs, by their place in the list; `tiktoken` merges any pair whose concatenation is a token, by that token's rank.
Suppose that

1. each merge of the list makes a new token, and the ids of those tokens increase along the list, and
2. each token, given alone to the BPE model of `tokenizers`, comes out as itself.

Take the first step of any text at which the two could choose differently. Until then they have made the same merges,
so the same pieces lie side by side. Let (l, r) be two neighbours whose concatenation is a token t. No merge has
crossed an outer edge of (l, r), for that edge would be gone; so the merges made inside its bytes are the first merges
that t alone would see, in the same order. By (2) t alone ends as one piece, and just before that it is two, by the
one listed merge that makes t: that state is (l, r). So every pair that `tiktoken` may merge is a listed one, with the
rank order of the list by (1), and the two choose alike: there is no first difference. `tiktoken` also looks a whole
part up before it merges at all; by (2) that gives the same id.

What is left is the splitting: the two regular expression engines must class every code point alike (tests compare all
of them; at run time a letter of each recent Unicode version is compared, and on a difference only ASCII takes this
path), and `tiktoken` must survive the text: in some of its versions the time grows with the square of a word's
length, and its engine panics on a run of a million spaces or letters, so a text with a long run of whitespace, or of
anything else, goes to `tokenizers`.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONG_RUN = 2_500  # characters
RUN = re.compile(r"[^\S\x1c-\x1f]+|[\S\x1c-\x1f]+")  # whitespace as the pattern has it (Python adds four), or all else
# A letter or number that came with each version of Unicode from 7 to 17: engines of different versions disagree on one.
UNICODE_PROBES = (
    "\u0528\u08b3\u1c80\u0860\u0560\U00010fe0\U00030000\u0870\U00031350\U0002ebf0\u1c89\U000323b0\U00011f50\U0001e4f0"
)


class FastBpe:
    """A byte-level BPE encoder over `tiktoken`, for texts without lone surrogates."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        self._encoding = tiktoken.Encoding("llamita", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._any_unicode = engines_agree(UNICODE_PROBES)

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text, or None for a text that only `tokenizers` can be trusted with."""
        if not self._any_unicode and not text.isascii():
            return None
        if has_long_run(text, LONG_RUN):
            return None
        return self._encoding.encode_ordinary(text)


def fast_bpe(tokenizer: tokenizers.Tokenizer, spec: Mapping[str, Any]) -> FastBpe | None:
    """An encoder that gives the ids of `tokenizer`, or None where that is not proven.

    `spec` is the tokenizer's own JSON, parsed. The time is that of encoding every token once.
    """
    ranks = _ranks(spec)
    if ranks is None:
        return None
    model = tokenizer.model
    names = {token_id: name for name, token_id in spec["model"]["vocab"].items()}
    for token_id in ranks.values():
        alone = model.tokenize(names[token_id])
        if len(alone) != 1 or alone[0].id != token_id:
            return None
    return FastBpe(ranks)


def splits_as_gpt2(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer, by its settings, splits texts by GPT-2's pattern: no other is taken here."""
    byte_level = pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)
    return bool(byte_level) and not pre_tokenizer.get("add_prefix_space")


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table, 256 entries)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = str.maketrans(
    dict.fromkeys(map(chr, range(256)), "\uffff") | {c: chr(b) for c, b in byte_of_character().items()}
)
"""To the characters of Latin 1, which are bytes; to one that is none for what stands for no byte."""


def bytes_of_name(name: str) -> bytes:
    """The bytes that a byte-level token stands for; those of its text where a character of it stands for none."""
    try:
        return name.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()


def has_long_run(text: str, length: int) -> bool:
    """Whether a text holds a long run of whitespace, or of anything else; looks at few characters of a usual text.

    Any run of 2 * length - 1 characters or more counts, none shorter than `length`, and some of those between.
    """
    for start in range(0, len(text) - length + 1, length):
        found = RUN.match(text, start, start + length)
        if found and found.end() == start + length:
            return True
    return False


@functools.cache
def engines_agree(characters: str, pattern: str = GPT2_PATTERN) -> bool:
    """Whether `tokenizers` and `tiktoken` class each of these characters alike: letter, number, space or other.

    Between two letters, two digits or two signs, a character of the same class, and no other, leaves one part whole.
    """
    whole = {f"{side}{character}{side}" for character in characters for side in "a1!"} - {"a\na", "1\n1", "!\n!"}
    text = "\n".join(sorted(whole))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = {text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)} & whole
    # Tokens of three characters in a vocabulary without tokens of two come out only by the lookup of a whole part.
    ranks = {bytes([byte]): byte for byte in range(256)}
    names = [name.encode() for name in sorted(whole)]
    ranks |= {name: 256 + index for index, name in enumerate(names)}
    encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = {names[token_id - 256].decode() for token_id in encoding.encode_ordinary(text) if token_id >= 256}
    return ours == theirs


def _ranks(spec: Mapping[str, Any]) -> dict[bytes, int] | None:
    """Bytes and id of every token that text can become, or None unless the first condition of the proof holds."""
    model = spec["model"]
    oddities = (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    )
    if model.get("type") != "BPE" or any(model.get(name) for name in oddities) or spec.get("normalizer"):
        return None
    if not splits_as_gpt2(spec.get("pre_tokenizer") or {}):
        return None
    if not all(token["special"] for token in spec["added_tokens"]):  # these are found in text
        return None
    special = {token["content"] for token in spec["added_tokens"]}
    table = byte_of_character()
    vocab = {name: token_id for name, token_id in model["vocab"].items() if name not in special}
    if not table.keys() <= vocab.keys() or not all(character in table for name in vocab for character in name):
        return None
    merged = [left + right for left, right in model["merges"]]
    ids = [vocab.get(name, -1) for name in merged]
    if any(after <= before for before, after in zip([-1, *ids], ids, strict=False)):
        return None
    if len(merged) + len(table) != len(vocab):  # a token that no merge makes
        return None
    return {bytes_of_name(name): token_id for name, token_id in vocab.items()}
