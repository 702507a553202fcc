"""A small tokenizer and a small model with random weights, on disk and loaded."""

from pathlib import Path

import pytest

from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.inference.llm import LLM
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from tests.inference.helpers import Opens, write_small_model

TEXT = "The fox gave the owl a red kite. Où est l'élève? 日本語 🦙🦙 naïve, and then they sat by the river. " * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe_from_iterator([TEXT], vocab_size=320)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    return write_small_model(place, tokenizer, seed=3, max_position_embeddings=96)


@pytest.fixture(scope="session")
def runner(tiny_model: Path) -> TorchRunner:
    return load_runner(tiny_model, device="cpu")


@pytest.fixture
def llm(tiny_model: Path, runner: TorchRunner) -> LLM:
    return LLM.load(tiny_model, backend=Opens(runner))
