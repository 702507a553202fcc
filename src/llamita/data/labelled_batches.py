"""From labelled texts to batches for a classifier: tokens, cut to the context, the label at the last of them.

Rows are padded on the right to the longest of their batch. Knows nothing of where texts come from, or of losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.data.packing import RowsConfig
from llamita.text.tokenizer import Tokenizer

Keep = Literal["end", "start"]
STEP = 32  # rows are a multiple of this long, so that a compiled model meets few shapes


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of texts, int32 each, none longer than `context`; how many were cut, and the longest before that."""

    tokens: tuple[np.ndarray, ...]
    context: int
    truncated: int
    longest: int

    def __len__(self) -> int:
        return len(self.tokens)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], context: int, keep: Keep, where: str = "") -> EncodedTexts:
    """The ids of each text after BOS, where the tokenizer has one; of a longer one that side is kept, and BOS.

    ValueError for a text of no token at all, which has no last token to read a label from.
    """
    bos = tokenizer.bos_id is not None
    encoded = tokenizer.encode_batch(texts, bos=bos)
    for number, ids in enumerate(encoded):
        if len(ids) == 0:
            raise ValueError(f"{where or 'the texts'}: text {number + 1} is empty, and this tokenizer has no BOS token")
    lengths = [len(ids) for ids in encoded]
    cut = tuple(truncate(ids, context, keep, int(bos)) for ids in encoded)
    return EncodedTexts(cut, context, sum(length > context for length in lengths), max(lengths, default=0))


def truncate(ids: np.ndarray, length: int, keep: Keep, fixed: int) -> np.ndarray:
    """At most `length` ids: the first `fixed` of them, and what fits of the start or of the end of the others."""
    if len(ids) <= length:
        return ids
    return ids[:length] if keep == "start" else np.concatenate((ids[:fixed], ids[len(ids) - length + fixed :]))


@dataclass(frozen=True)
class LabelledRows:
    """Texts as rows, by number; `whole` rows are all as long as the context, one shape for a compiled model."""

    encoded: EncodedTexts
    labels: np.ndarray
    pad_id: int
    whole: bool = False

    @property
    def config(self) -> RowsConfig:
        return RowsConfig("pad", self.encoded.context)

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, row_ids: np.ndarray) -> Batch:
        """Some rows: the label of each at its last token, IGNORE_INDEX elsewhere."""
        rows = [self.encoded.tokens[i] for i in row_ids]
        context = self.encoded.context
        T = context if self.whole else min(context, -(-max(map(len, rows)) // STEP) * STEP)
        tokens_BT = np.full((len(rows), T), self.pad_id, dtype=np.int32)
        labels_BT = np.full((len(rows), T), IGNORE_INDEX, dtype=np.int32)
        for b, (ids, i) in enumerate(zip(rows, row_ids, strict=True)):
            tokens_BT[b, : len(ids)] = ids
            labels_BT[b, len(ids) - 1] = self.labels[i]
        return Batch(tokens_BT, labels_BT, None, np.asarray(row_ids, dtype=np.int64))


def labelled_evaluation(rows: LabelledRows, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """At most `limit` rows (0: all), evenly spaced, each once; texts of like length together."""
    count = min(limit, len(rows)) or len(rows)
    chosen = np.arange(count, dtype=np.int64) * len(rows) // count
    for ids in by_length([rows.encoded.tokens[i] for i in chosen], batch_size):
        yield rows.batch(chosen[ids])


def by_length(tokens: Sequence[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """The numbers of sequences in groups, shortest first, so that little of a batch is padding."""
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
