"""A small tokenizer and a small model with random weights, on disk and loaded."""

from pathlib import Path

import pytest

from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.storage import files
from llamita.storage.model_directory import save_config, save_tensors
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from tests.inference.helpers import Opens

TEXT = "The fox gave the owl a red kite. Où est l'élève? 日本語 🦙🦙 naïve, and then they sat by the river. " * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe_from_iterator([TEXT], vocab_size=320)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    with files.atomic_directory(tmp_path_factory.mktemp("models") / "tiny") as directory:
        save_tensors(directory, to_host_arrays(build_model(config, seed=3)))
        save_config(directory, config)
        tokenizer.save(directory)
    return directory.parent / "tiny"


@pytest.fixture(scope="session")
def runner(tiny_model: Path) -> TorchRunner:
    return load_runner(tiny_model, device="cpu")


@pytest.fixture
def llm(tiny_model: Path, runner: TorchRunner) -> LLM:
    return LLM.load(tiny_model, backend=Opens(runner))
