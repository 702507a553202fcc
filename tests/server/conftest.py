"""Servers under test: over a model whose answers are known, and over a tiny one with random weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.server.model import ServedModel, serve_model
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from tests.inference.conftest import TEXT, tiny_model  # noqa: F401 (a fixture)
from tests.server.clients import random_model, scripted_model, serve
from tests.server.live import LiveServer, hash_model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe_from_iterator([TEXT], vocab_size=320)


@pytest.fixture(scope="module")
def hash_server(tokenizer: Tokenizer) -> Iterator[LiveServer]:
    """A server over the hash model, for tests that leave it as they find it."""
    with LiveServer(hash_model(tokenizer)) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_runner(tiny_model: Path) -> TorchRunner:  # noqa: F811
    return load_runner(tiny_model, device="cpu")


@pytest.fixture
def tiny_served(tiny_runner: TorchRunner, tokenizer: Tokenizer) -> ServedModel:
    """A tiny model with random weights, whose sampling is the real one."""
    llm = LLM(tiny_runner, tokenizer, engine=EngineConfig(block_size=4, blocks=200, max_sequences=8))
    return serve_model(llm, "tiny")


@pytest.fixture(scope="module")
def scripted() -> Iterator[str]:
    """The address of a server whose model says one text."""
    with serve(scripted_model()) as address:
        yield address


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    """The address of a server over a tiny model, whose answers seldom end by themselves."""
    with serve(random_model()) as address:
        yield address
