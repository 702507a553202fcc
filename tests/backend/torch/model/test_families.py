"""Every family of models, made by transformers with random weights and read here: the same logits at every position.

Head counts, ratios and switches are those of the real models; layers, widths and vocabularies are small, and windows
and first lengths short, so that prompts pass them.
"""

import dataclasses

import numpy as np
import pytest
import torch

from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.model import weights
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.train.losses import chunked_cross_entropy
from llamita.inference.llm import LLM
from llamita.storage import files, model_directory
from tests import reference
from tests.backend.frameworks import Torch
from tests.backend.paged import even_cuts, paged_logits

transformers = pytest.importorskip("transformers")

NEW = ("smollm 3", "olmo 2", "olmo 2 32b", "granite 3", "gemma 2", "gemma 3")
SMALL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # theirs are beyond the small vocabulary
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# family -> (transformers' model type, layers, heads, key/value heads, head size, what else its config says)
FAMILIES = {
    "llama 1": ("llama", 3, 32, 32, 8, {"rms_norm_eps": 1e-6}),
    "llama 2 70b": ("llama", 2, 64, 8, 8, {}),
    "llama 3": ("llama", 3, 32, 8, 16, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.2": ("llama", 3, 32, 8, 16, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear scaling": ("llama", 2, 8, 8, 16, {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", 2, 8, 8, 32, {"rope_parameters": YARN}),
    "mistral": ("mistral", 3, 32, 8, 16, {"sliding_window": 32}),
    "mistral nemo": ("mistral", 2, 32, 8, 20, {"sliding_window": None}),
    "qwen 2": ("qwen2", 3, 14, 2, 32, {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "qwen 2.5, long": (
        "qwen2", 3, 14, 2, 32,
        {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    ),
    "qwen 3": ("qwen3", 3, 16, 8, 32, {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "smollm 2": ("llama", 3, 9, 3, 32, {"tie_word_embeddings": True}),
    "tinyllama": ("llama", 3, 32, 4, 16, {}),
    "smollm 3": ("smollm3", 5, 16, 4, 16, {"tie_word_embeddings": True, "no_rope_layer_interval": 4}),
    "olmo 2": ("olmo2", 3, 16, 16, 16, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "olmo 2 32b": ("olmo2", 2, 20, 4, 16, {}),
    "granite 3": (
        "granite", 3, 32, 8, 16,
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.05, "residual_multiplier": 0.22,
         "logits_scaling": 8.0},
    ),
    "gemma 2": (
        "gemma2", 4, 8, 4, 32,
        {"sliding_window": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma 3": (
        "gemma3_text", 7, 4, 1, 32,
        {"sliding_window": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window_pattern": 6,
         "rope_parameters": {
             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
             "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
         }},
    ),
}  # fmt: skip


def made_by_transformers(family: str, tmp_path, full_width: bool = False):
    """A model of transformers, saved, and the same read here. Norms and biases are moved off their ones and zeros."""
    kind, layers, heads, kv_heads, head_dim, more = FAMILIES[family]
    halved = ("mistral nemo", "qwen 3", "gemma 2", "gemma 3")
    width = heads * head_dim // 2 if family in halved else heads * head_dim
    if full_width:
        layers, head_dim, width = 2, 64, heads * 64
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        **{"tie_word_embeddings": False} | (SMALL_IDS if family in NEW else {}) | more,
    )
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            else:
                parameter *= 2.0
    theirs.save_pretrained(tmp_path / "theirs")
    ours = weights.build_model(
        model_directory.load_config(tmp_path / "theirs"), model_directory.load_tensors(tmp_path / "theirs")
    )
    return theirs, ours.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1000, shape, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours - theirs).abs().max() < tolerance * theirs.abs().max())


def cached_logits(model: Llama, tokens_BT: torch.Tensor, prompt: int, chunk: int = 512) -> torch.Tensor:
    """Logits at every position: a prompt read in chunks, then one token after the other."""
    cuts = even_cuts(tokens_BT.shape[1], chunk, prompt)
    return torch.from_numpy(np.stack(paged_logits(Torch(), model, tokens_BT, [cuts] * len(tokens_BT), block_size=16)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(family, tmp_path):
    with torch.inference_mode(False):
        theirs, ours = made_by_transformers(family, tmp_path)
    for length in (1, 2, 31, 33, 65, 150, 300):
        tokens_BT = tokens(2, length)
        assert close(ours(tokens_BT).logits_BTV, theirs(tokens_BT).logits), length
    whole = tokens(2, 300 + 20)  # single tokens begin and end blocks of 16, and go past a window of 32
    expected = theirs(whole).logits
    assert close(cached_logits(ours, whole, prompt=300), expected)
    assert close(cached_logits(ours, whole[:, :50], prompt=1), expected[:, :50])
    weights_by_name = {name: array.to_numpy() for name, array in weights.to_host_arrays(ours).items()}
    oracle = reference.forward(ours.config, weights_by_name, whole[0, :100])["logits"]
    assert close(expected[0, :100].double(), torch.from_numpy(oracle), 1e-5)
    assert close(ours(whole[:1, :100]).logits_BTV[0].double(), torch.from_numpy(oracle), 1e-5)


@pytest.mark.parametrize("family", NEW)
def test_gradients_are_those_of_transformers(family, tmp_path):
    """Of the summed loss by each matrix of the last layer and by the embedding, through the chunked head."""
    theirs, ours = made_by_transformers(family, tmp_path)
    tokens_BT = tokens(2, 50)
    expected = theirs(tokens_BT, labels=tokens_BT).loss
    expected.backward()
    labels_BT = torch.nn.functional.pad(tokens_BT[:, 1:], (0, 1), value=-100)
    loss = chunked_cross_entropy(ours.hidden(tokens_BT, training=True), ours.head, labels_BT, 32) / (2 * 49)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for fused in ours.fused_parameters():
        assert fused.parameter.grad is not None
        for name, gradient in zip(fused.parts, fused.split(fused.parameter.grad), strict=True):
            assert close(gradient, gradients[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_padded_batches_are_those_of_transformers(family, tmp_path):
    """Prompts of different length padded on the left there, and here too, or packed into one row (cache)."""
    with torch.inference_mode(False):
        theirs, ours = made_by_transformers(family, tmp_path)
    lengths, longest, more = [100, 40, 7], 100, 16
    texts = [tokens(3, longest + more)[row, : length + more] for row, length in enumerate(lengths)]
    expected = [theirs(text[None]).logits[0] for text in texts]

    padded = torch.stack(
        [torch.cat((torch.zeros(longest + more - len(text), dtype=torch.long), text)) for text in texts]
    )
    real = torch.stack([torch.arange(longest + more) >= longest + more - len(text) for text in texts])
    left = ours(padded, segments_BT=real.int()).logits_BTV
    batch = theirs(padded, attention_mask=real.int()).logits
    for row, text in enumerate(texts):
        assert close(left[row, -len(text) :], expected[row])
        assert close(left[row, -len(text) :], batch[row, -len(text) :])

    cached = paged_logits(Torch(), ours, texts, [[length] + [1] * more for length in lengths], block_size=16)
    for row, logits in enumerate(cached):
        assert close(torch.from_numpy(logits), expected[row])


@pytest.mark.parametrize("block_size", [1, 5, 16])
@pytest.mark.parametrize("chunk", [1, 7, 24, 40])
@torch.inference_mode()
def test_windows_of_some_layers_need_only_the_blocks_they_see(chunk, block_size, tmp_path):
    """Behind the window of 32 the helper's tables have no blocks, as an engine's."""
    with torch.inference_mode(False):
        _, model = made_by_transformers("qwen 2.5, long", tmp_path)
    assert model.config.attention_windows == (0, 32)
    tokens_BT = tokens(2, 120)
    cached = paged_logits(Torch(), model, tokens_BT, [even_cuts(120, chunk)] * 2, block_size)
    assert close(torch.from_numpy(np.stack(cached)), model(tokens_BT).logits_BTV)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_full_width_logits_are_those_of_transformers(family, tmp_path):
    with torch.inference_mode(False):
        theirs, ours = made_by_transformers(family, tmp_path, full_width=True)
    tokens_BT = tokens(1, 300)
    assert close(ours(tokens_BT).logits_BTV, theirs(tokens_BT).logits)


def test_greedy_tokens_agree_where_the_margin_is_clear(tmp_path):
    """64 greedy tokens: equal to those of transformers wherever the two best logits differ by more than the error."""
    theirs, ours = made_by_transformers("qwen 3", tmp_path)
    sequence = tokens(1, 20)
    with torch.inference_mode():
        for _ in range(64):
            mine, other = ours(sequence).logits_BTV[0, -1], theirs(sequence).logits[0, -1]
            best, second = other.topk(2).values.tolist()
            if best - second > 2 * (mine - other).abs().max():
                assert mine.argmax() == other.argmax()
            sequence = torch.cat((sequence, other.argmax()[None, None]), dim=1)


def test_what_is_written_names_its_family(tmp_path):
    """Each family's directory, written here, is opened by transformers as that family, with equal logits."""
    for family in ("mistral", "qwen 2", "qwen 3", "llama 3.2", *NEW):
        theirs, ours = made_by_transformers(family, tmp_path / family)
        with files.atomic_directory(tmp_path / f"{family} again") as directory:
            model_directory.save_config(directory, ours.config)
            model_directory.save_tensors(directory, weights.to_host_arrays(ours))
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{family} again", output_loading_info=True
        )
        assert type(again) is type(theirs)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert dataclasses.asdict(model_directory.load_config(tmp_path / f"{family} again")) == dataclasses.asdict(
            ours.config
        )
        with torch.inference_mode():
            assert torch.equal(again(tokens(1, 80)).logits, theirs(tokens(1, 80)).logits)
        saved, original = (
            model_directory.load_tensors(tmp_path / name) for name in (f"{family} again", f"{family}/theirs")
        )
        assert saved.keys() == original.keys()
        for name, array in saved.items():
            assert np.array_equal(array.to_numpy(), original[name].to_numpy())


@pytest.mark.parametrize("family", ["mistral", "qwen 2.5, long"])
def test_a_long_prompt_is_continued_as_by_transformers(family, tmp_path):
    """A prompt of several chunks, through the engine and a cache that holds a window of it."""
    theirs, ours = made_by_transformers(family, tmp_path)
    theirs.generation_config.eos_token_id = None
    config = dataclasses.replace(ours.config, max_position_embeddings=2048)
    model = LLM(runner_over(config, weights.to_host_arrays(ours)))
    prompt = tokens(1, 1200)
    with torch.inference_mode():
        all_seen = torch.ones_like(prompt)  # else token 0 would be taken for padding
        expected = theirs.generate(prompt, attention_mask=all_seen, max_new_tokens=40, do_sample=False, pad_token_id=0)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    held = []
    for _ in model.events(prompt[0].tolist(), params):
        held.append([pool.blocks - len(pool.free) for pool in model.engine.manager.pools])
    assert list(model.generate(prompt[0].tolist(), params).token_ids) == expected[0, 1200:].tolist()
    most = max(sequence[-1] for sequence in held)
    assert 2 <= most <= 3, "a window of 32 lies in two or three blocks of 16"
