"""What is known of the values in a `config.json` apart from the model: keys that mean nothing here, ids, divisors."""

import math
from typing import Any

HARMLESS_KEYS = frozenset(
    (
        *("_name_or_path", "add_cross_attention", "architectures", "attention_dropout", "auto_map"),
        *("chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id"),
        *("dtype", "finetuning_task", "hidden_act", "id2label", "initializer_range", "is_decoder"),
        *("is_encoder_decoder", "label2id", "layer_types", "max_window_layers", "model_type", "name_or_path"),
        *("num_labels", "output_attentions", "output_hidden_states", "partial_rotary_factor", "pretraining_tp"),
        *("problem_type", "quantization_config", "return_dict", "rope_parameters", "sep_token_id"),
        *("tie_encoder_decoder", "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_version"),
        *("use_cache", "use_mrope", "use_sliding_window"),
    )
)
"""Keys of a `config.json` that change no logit here, besides those that are read."""


def token_ids(name: str, value: Any, vocab_size: int) -> Any:
    """The id, or ids, of a special token; old configs say -1 for none."""
    if value is None or value == -1:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in ids):
        raise ValueError(f"{name}={value!r} in config.json must be an id from 0 to {vocab_size - 1}")
    return tuple(value) if isinstance(value, list) else value


def nearest_divisor(number: int, near: int) -> int:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]  # a broken config's number is large
    return min((*small, *(number // d for d in small)), key=lambda d: (abs(d - near), d))
