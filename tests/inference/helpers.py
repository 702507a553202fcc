"""What tests of the engine's faces share."""

from pathlib import Path
from typing import Any

from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.model.config import ModelConfig
from llamita.storage import files
from llamita.storage.model_directory import save_config, save_tensors
from llamita.text.tokenizer import Tokenizer


def write_small_model(place: Path, tokenizer: Tokenizer, seed: int, **more: Any) -> Path:
    """Writes a small model with random weights and this tokenizer into a new directory, and returns that."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        **more,
    )
    with files.atomic_directory(place) as directory:
        save_tensors(directory, to_host_arrays(build_model(config, seed=seed)))
        save_config(directory, config)
        tokenizer.save(directory)
    return place


class Opens:
    """A backend that opens every model as the same runner."""

    def __init__(self, runner):
        self.load_runner = lambda *arguments, **options: runner
