"""What the tests of formats share: a small model, and its rows in the order of other people's files."""

import numpy as np

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import initialize_parameters
from llamita.storage.formats.foreign import ForeignModel

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip


def model(**changes) -> ForeignModel:
    config = ModelConfig(**(vars(CONFIG) | changes))
    return ForeignModel(config, {name: HostArray.from_numpy(a) for name, a in initialize_parameters(config, seed=3)})


def equal(one: ForeignModel, other: ForeignModel) -> bool:
    same = all(np.array_equal(one.arrays[name].to_numpy(), other.arrays[name].to_numpy()) for name in one.arrays)
    return same and one.config == other.config and list(one.arrays) == list(other.arrays)


def as_pairs(weight: np.ndarray, H: int) -> np.ndarray:
    """Row by row: what turns with pair i, rows i and i + H/2 of a head, goes to rows 2 i and 2 i + 1."""
    result = np.empty_like(weight)
    for start in range(0, len(weight), H):
        for i in range(H // 2):
            result[start + 2 * i] = weight[start + i]
            result[start + 2 * i + 1] = weight[start + i + H // 2]
    return result
