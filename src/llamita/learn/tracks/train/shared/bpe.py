"""Byte-level byte-pair encoding: a tokenizer that is learned from text, and any text as its tokens and back.

Sources: Sennrich, Haddow and Birch 2016 (https://arxiv.org/abs/1508.07909), algorithm 1, on bytes as in Radford et al.
2019 (GPT-2). Tokens 0 to 255 are the bytes of UTF-8; the merge at place i of the list makes token 256 + i.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[int, int]
"""Two neighbouring tokens; as an entry of the list of merges, the two that become one."""


def words_of(text: str) -> list[str]:
    """Returns the words that a text is cut into. Nothing is lost: the words joined are the text.

    From the beginning of the text to its end, at each place the first of these rules that fits takes as much as it can:

        1. one space or none (" ", no other), then letters, digits and underscores (one or more; Python's `\\w`)
        2. one space or none, then characters that are neither those nor white space (one or more)
        3. white space (one or more), but not its last character where something else follows (where it is the
           only one, rule 4 takes it)
        4. white space (one or more)

    So "Max's  cap!" is "Max", "'", "s", " ", " cap", "!".
    """
    # to do: one regular expression of four alternatives.
    return re.findall(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+", text)
    # done


def count_pairs(words: Mapping[tuple[int, ...], int]) -> dict[Pair, int]:
    """Returns how often each pair of neighbouring tokens occurs.

    words: each word as its tokens, and how often that word occurs. A pair is counted at each place where it stands,
    also where two places overlap: (7, 7, 7) holds (7, 7) twice. Pairs that do not occur are left out.
    """
    # to do: each pair in each word counts as often as the word does.
    counts: dict[Pair, int] = {}
    for tokens, count in words.items():
        for pair in pairwise(tokens):
            counts[pair] = counts.get(pair, 0) + count
    return counts
    # done


def most_frequent(pairs: Mapping[Pair, int]) -> Pair:
    """Returns the pair with the greatest count; of several, the one with the smaller first token, then second."""
    # to do: one line is enough.
    return min(pairs, key=lambda pair: (-pairs[pair], pair))
    # done


def merged(tokens: Sequence[int], pair: Pair, new: int) -> tuple[int, ...]:
    """Returns the tokens with `new` in the place of each occurrence of the pair.

    Occurrences are looked for from the left and do not overlap: in (7, 7, 7) the pair (7, 7) gives (new, 7).
    """
    # to do: one pass from left to right.
    found: list[int] = []
    position = 0
    while position < len(tokens):
        if tuple(tokens[position : position + 2]) == pair:
            found.append(new)
            position += 2
        else:
            found.append(tokens[position])
            position += 1
    return tuple(found)
    # done


def train(texts: Iterable[str], vocab_size: int) -> list[Pair]:
    """Returns the merges, in the order in which they are learned, that make a vocabulary of so many tokens.

    Again and again the most frequent pair of all words of all texts becomes a token. vocab_size: 256 or more, the bytes
    among them. Learning ends early where no pair is left, or where the most frequent one occurs once: such a merge
    would say nothing of other texts.
    """
    # to do: all words, each as a tuple of the bytes of its UTF-8, and how often it occurs; then, until there are
    #        vocab_size - 256 merges, count the pairs, choose one, and merge it in all words.
    counts = Counter(word for text in texts for word in words_of(text))
    words = {tuple(word.encode("utf-8")): count for word, count in counts.items()}
    merges: list[Pair] = []
    while len(merges) < vocab_size - 256:
        pairs = count_pairs(words)
        if not pairs or max(pairs.values()) < 2:
            break
        pair = most_frequent(pairs)
        words = {merged(tokens, pair, 256 + len(merges)): count for tokens, count in words.items()}
        merges.append(pair)
    return merges
    # done


def encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """Returns the tokens of a text.

    The text is cut into the words of `words_of`. A word begins as its bytes. Of all pairs that stand in it, the one
    that was learned first (the earliest in `merges`) is merged wherever it stands, and again, until none of the pairs
    in it was ever learned.
    """
    # to do: the words in their order; a dictionary from a pair to its place in merges says which was learned first.
    rank = {pair: place for place, pair in enumerate(merges)}
    known: dict[str, tuple[int, ...]] = {}
    tokens: list[int] = []
    for word in words_of(text):
        if word not in known:
            parts = tuple(word.encode("utf-8"))
            while candidates := [pair for pair in pairwise(parts) if pair in rank]:
                first = min(candidates, key=lambda pair: rank[pair])
                parts = merged(parts, first, 256 + rank[first])
            known[word] = parts
        tokens += known[word]
    return tokens
    # done


def decode(tokens: Sequence[int], merges: Sequence[Pair]) -> str:
    """Returns the text of tokens: their bytes joined, read as UTF-8.

    Bytes that are no UTF-8 (a text cut in the middle of a character) become U+FFFD, as `errors="replace"` has it.
    """
    # to do: the bytes of every token, the merged ones from those of their two parts; join, then decode.
    contents = [bytes([byte]) for byte in range(256)]
    for first, second in merges:
        contents.append(contents[first] + contents[second])
    return b"".join(contents[token] for token in tokens).decode("utf-8", errors="replace")
    # done
