"""A trained model writes the same greedy story in every engine: Llamita, transformers, mlx-lm and llama.cpp.

Trained on a few stories until the gaps between logits are wide; with random weights a long text would part by chance.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import llamita
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.model import weights
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.rope import RopeScaling
from llamita.storage import files, model_directory
from llamita.storage.formats import gguf
from llamita.storage.formats.foreign import ForeignModel
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer

STORIES = [meadow.story(5, index) for index in range(6)]
LONGEST = 200
# How each engine's own tokenizer reads a prompt, BOS put before it, and the story it writes after it.
Engine = tuple[Callable[[str], list[int]], Callable[[list[int]], list[int]]]


@pytest.fixture(scope="module", params=["llama", "llama 3", "qwen 3"])
def trained(request, tmp_path_factory) -> Path:
    tokenizer = train_bpe_from_iterator(meadow.corpus(5, 300, "train"), 400)
    switches = {
        "llama": {"tie_word_embeddings": True},
        "llama 3": {"rope_scaling": RopeScaling("llama3", 8.0, 64), "rope_theta": 500000.0},
        "qwen 3": {"query_key_norm": True, "head_dim": 32, "tie_word_embeddings": True},
    }[request.param]
    config = ModelConfig(400, 64, 128, 2, 4, 2, 256, bos_token_id=1, eos_token_id=2, **switches)
    model = weights.build_model(config, seed=1)
    rows = [torch.tensor(tokenizer.encode(story, bos=True, eos=True)) for story in STORIES]
    tokens_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(250):
        logits_BTV = model(tokens_BT[:, :-1].clamp(min=0)).logits_BTV
        loss = functional.cross_entropy(logits_BTV.transpose(1, 2), tokens_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.04:
            break
    directory = tmp_path_factory.mktemp("trained") / "model"
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, config)
        model_directory.save_tensors(temporary, weights.to_host_arrays(model))
        tokenizer.save(temporary)
    return directory


def with_transformers(directory: Path) -> Engine:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def story(ids: list[int]) -> list[int]:
        seen = torch.ones(1, len(ids), dtype=torch.long)
        found = model.generate(
            torch.tensor([ids]), attention_mask=seen, max_new_tokens=LONGEST, do_sample=False, pad_token_id=0
        )
        return found[0, len(ids) :].tolist()

    return lambda text: [tokenizer.bos_token_id, *tokenizer(text).input_ids], story


def with_mlx_lm(directory: Path) -> Engine:
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(directory))

    def story(ids: list[int]) -> list[int]:
        found: list[int] = []
        for response in mlx_lm.stream_generate(model, tokenizer, mx.array(ids), max_tokens=LONGEST):
            found.append(int(response.token))
        return found

    return lambda text: [tokenizer.bos_token_id, *tokenizer.encode(text)], story


def with_llama_cpp(directory: Path) -> Engine:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled")
    arrays = model_directory.load_tensors(directory)
    model = ForeignModel(model_directory.load_config(directory), arrays, Tokenizer.load(directory))
    gguf.write_model(directory.parent / "m.gguf", model)
    theirs = llama_cpp.Llama(str(directory.parent / "m.gguf"), verbose=False, n_ctx=256, seed=0)

    def story(ids: list[int]) -> list[int]:
        theirs.reset()
        found: list[int] = []
        for token in theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(token)
            if token == 2 or len(found) == LONGEST:
                break
        return found

    return lambda text: theirs.tokenize(text.encode(), add_bos=True, special=False), story


@pytest.fixture(scope="module")
def ours(trained: Path) -> list[tuple[str, list[int], list[int]]]:
    """Prompts, their ids, and the stories that Llamita writes after them."""
    found, llm = [], llamita.load(trained)
    for story in STORIES:
        prompt = " ".join(story.split()[:5])
        ids = llm.tokenizer.encode(prompt, bos=True)
        written = list(llm.generate(prompt, SamplingParams(temperature=0, max_tokens=LONGEST)).token_ids)
        logits_TV = np.sort(llm.runner.forward([[*ids, *written]])["logits"][0, len(ids) - 1 : -1], axis=-1)
        assert (logits_TV[:, -1] - logits_TV[:, -2]).min() > 1e-2  # far more than the engines differ by
        assert len(written) > 30
        assert written[-1] == 2
        found.append((prompt, ids, written))
    return found


@pytest.mark.parametrize("engine", [with_transformers, with_mlx_lm, with_llama_cpp])
def test_the_greedy_stories_are_the_same(trained, ours, engine):
    read, write = engine(trained)
    for prompt, ids, story in ours:
        assert read(prompt) == ids
        assert write(ids) == story
