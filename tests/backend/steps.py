"""A small model and batches for the tests of training steps."""

from collections.abc import Mapping

import numpy as np

from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from tests.backend.models import IGNORE_INDEX

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)


def batch(rows=8, T=12, seed=0, unequal=True, segments=False) -> Batch:
    """Rows whose numbers of targets differ widely: from all to one."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    block = generator.integers(0, CONFIG.vocab_size, (rows, T + 1), dtype=np.int32)
    labels = block[:, 1:].copy()
    if unequal:
        for row in range(rows):
            labels[row, : T - max(1, T >> row)] = IGNORE_INDEX
    segments_BT = np.cumsum(generator.random((rows, T)) < 0.2, axis=1, dtype=np.int32) + 1 if segments else None
    return Batch(block[:, :-1], labels, segments_BT, np.arange(rows, dtype=np.int64) + 100)


def split(whole: Batch, size: int) -> list[Batch]:
    pieces = [slice(i, i + size) for i in range(0, len(whole.row_ids), size)]
    return [
        Batch(
            whole.tokens_BT[p],
            whole.labels_BT[p],
            None if whole.segments_BT is None else whole.segments_BT[p],
            whole.row_ids[p],
        )
        for p in pieces
    ]


def same(a: Mapping[str, HostArray], b: Mapping[str, HostArray]) -> bool:
    return a.keys() == b.keys() and all(bytes(a[name].data) == bytes(b[name].data) for name in a)


def largest_difference(a: Mapping[str, HostArray], b: Mapping[str, HostArray]) -> float:
    assert a.keys() == b.keys()
    return max(np.abs(a[name].to_numpy() - b[name].to_numpy()).max() for name in a)
