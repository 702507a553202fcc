"""`llamita evaluate`: a model's loss over a split of prepared data, every target scored once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llamita.plan import BackendName


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model's loss over prepared text: nats per token, perplexity, nats per character, bits per byte."""

    model: tyro.conf.Positional[Path]
    """A model directory, or the directory of a training run (then its best checkpoint)."""
    data: Path
    """Prepared data (llamita prepare), made with the model's tokenizer."""
    task: Literal["perplexity"] = "perplexity"
    """What to measure."""
    split: Literal["train", "validation"] = "validation"
    """Which part of the data."""
    sequence_length: int = 0
    """Length of a window in tokens; 0: as many as the model has positions."""
    stride: int = 0
    """How far the window moves; a smaller stride gives each target more context. 0: the sequence length."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights, and of the activations beside quantised ones; auto is that of the file."""
    backend: BackendName = "auto"
    """Which framework computes; auto is MLX on Apple silicon where it is installed, else PyTorch."""
    device: str = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto takes a GPU if there is one."""


def run(options: EvaluateOptions) -> int:
    import numpy as np
    from rich.console import Console

    from llamita import checkpoint
    from llamita.backends import load_backend
    from llamita.data.shards import TokenShards
    from llamita.evaluation.perplexity import strided_perplexity
    from llamita.text.tokenizer import Tokenizer

    directory = checkpoint.resolve_model_directory(options.model)
    positions = checkpoint.load_config(directory).max_position_embeddings
    length = options.sequence_length or positions
    stride = options.stride or length
    if not 1 <= length <= positions:
        raise ValueError(f"sequence_length={length} must be 1 to {positions}, the model's positions")
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} must be 1 to sequence_length={length}")
    shards = TokenShards(options.data, options.split)
    if Tokenizer.load(directory).hash != shards.manifest.tokenizer_hash:
        raise ValueError(
            f"{options.data} was prepared with another tokenizer than {directory} has; prepare the text again with "
            f"--tokenizer {directory}"
        )
    backend = load_backend(options.backend, device=options.device)
    runner = backend.load_runner(directory, options.dtype, options.device)
    tokens = np.concatenate([shards.document(i) for i in range(shards.num_documents)])
    result = strided_perplexity(
        runner, tokens, runner.config.vocab_size, length, stride, shards.num_characters, shards.num_bytes
    )
    console = Console(highlight=False)
    console.print(
        f"{options.split}: {result.targets} targets in windows of {length}, stride {stride}\n"
        f"loss       {result.nats_per_token:.4f} nats per token\n"
        f"perplexity {result.perplexity:.2f}\n"
        f"loss       {result.nats_per_character:.4f} nats per character\n"
        f"           {result.bits_per_byte:.4f} bits per byte"
    )
    return 0
