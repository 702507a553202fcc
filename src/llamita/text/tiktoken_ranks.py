"""Llama 3's own `tokenizer.model`, a rank file of tiktoken's, as a `tokenizers.Tokenizer` with the same ids.

Each line is a token in base64 and its rank, which is its id. Words are split, and special tokens named, as in
Llama 3's published code (https://github.com/meta-llama/llama3, tokenizer.py): neither is in the file.

Why the ids are equal. tiktoken merges any two neighbours whose concatenation is a token, lowest rank first;
`tokenizers` merges listed pairs. As the proof in fast_bpe.py shows, the two neighbours that make a token are, in any
text, those that the token alone comes to; that pair is listed here, at the token's rank. A token that alone never
comes to two pieces is found only where it is a whole word, in both libraries (`ignore_merges`).
"""

import base64
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llamita.text import fast_bpe
from llamita.text.huggingface_codec import HuggingFaceCodec

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
_RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(251)]
SPECIAL = (
    *(BEGIN, END, *_RESERVED[:4], "<|start_header_id|>", "<|end_header_id|>", _RESERVED[4], END_OF_TURN),
    *_RESERVED[5:],
)
"""In the order of their ids, which follow the ranks."""
LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")
LONGEST_TOKEN = 256  # bytes; Llama 3's have at most 128


def is_rank_file(path: Path) -> bool:
    """Whether a file begins as a rank file does; a SentencePiece model begins with a line feed."""
    with open(path, "rb") as file:
        return LINE.fullmatch(file.readline(2 * LONGEST_TOKEN).strip()) is not None


def codec_from_file(path: Path, names: Callable[[int], Sequence[str]] | None = None) -> HuggingFaceCodec:
    """Read a rank file with Llama 3's special tokens; ValueError names the file and the fault.

    `names` gives the special tokens after so many ranks, where the files beside it name others.
    """
    try:
        ranks = parse(path.read_bytes())
        return HuggingFaceCodec(convert(ranks, (names and names(len(ranks))) or SPECIAL))
    except ValueError as error:
        raise ValueError(f"{path} is no rank file of tiktoken's that can be used: {error}") from None


def parse(content: bytes) -> dict[bytes, int]:
    """Tokens and their ranks, which are 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        found = LINE.fullmatch(line)
        if found is None:
            raise ValueError(f"line {number} is not a token in base64, a space and a rank")
        try:
            token, rank = base64.b64decode(found[1], validate=True), int(found[2])
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if rank != len(ranks) or token in ranks or not 0 < len(token) <= LONGEST_TOKEN:
            raise ValueError(f"line {number}: expected a new token of rank {len(ranks)}, got {token[:40]!r} of {rank}")
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"byte {missing[0]:#04x} is no token, so not every text could be encoded")
    return ranks


def convert(ranks: dict[bytes, int], special: Sequence[str] = SPECIAL) -> tokenizers.Tokenizer:
    """The tokenizer with the ids that tiktoken gives with these ranks, and the special tokens after them."""
    character = {byte: name for name, byte in fast_bpe.byte_of_character().items()}
    names = {token: "".join(map(character.__getitem__, token)) for token in ranks}
    taken = {*names.values()}.intersection(special)
    if taken:
        raise ValueError(f"{min(taken)!r} is an ordinary token there, and a special one of Llama 3's")
    pairs = [pair for token in ranks if len(token) > 1 and (pair := last_pair(token, ranks))]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: ranks[token] for token, name in names.items()},
            merges=[(names[left], names[right]) for left, right in pairs],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two pieces that a token's bytes come to before they are one, lowest rank first; None where they do not."""
    pieces = [token[index : index + 1] for index in range(len(token))]
    never = len(ranks)
    joined = [ranks.get(left + right, never) for left, right in itertools.pairwise(pieces)]
    while len(pieces) > 2:
        rank = min(joined)
        if rank == never:
            return None
        at = joined.index(rank)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        del joined[at]
        for near in range(max(at - 1, 0), min(at + 1, len(joined))):
            joined[near] = ranks.get(pieces[near] + pieces[near + 1], never)
    return pieces[0], pieces[1]
