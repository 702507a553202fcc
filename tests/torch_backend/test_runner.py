"""The runner gives the model's logits whatever the cache, the chunks and the type, and transformers' tokens."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita import checkpoint, files
from llamita.config import ModelConfig
from llamita.plan import Plan, SampledToken, SampleSpec, SamplingParams, ScheduledChunk
from llamita.torch_backend import runner as runner_module
from llamita.torch_backend.runner import TorchRunner, load_runner
from llamita.torch_backend.weights import build_model, to_host_arrays

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
PROMPT = tuple(np.random.default_rng(0).integers(0, 97, 23).tolist())
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner(build_model(CONFIG, seed=1))


def save_model(directory: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Path:
    with files.atomic_directory(directory) as temporary:
        checkpoint.save_tensors(temporary, to_host_arrays(build_model(config, seed=1, dtype=dtype)))
        checkpoint.save_config(temporary, config, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])
    return directory


def run(
    runner: TorchRunner, tokens: Sequence[int], start: int, params: SamplingParams | None = GREEDY
) -> SampledToken | None:
    end = start + len(tokens)
    spec = None if params is None else SampleSpec(params, 5, end)
    return runner.run(Plan((ScheduledChunk(0, tuple(tokens), start, spec),))).sampled[0]


def run_in_chunks(runner: TorchRunner, tokens: Sequence[int], size: int) -> SampledToken:
    runner.reserve(len(tokens))
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        last = start + len(chunk) == len(tokens)
        result = run(runner, chunk, start, GREEDY if last else None)
        assert (result is not None) == last
    assert result is not None
    return result


def greedy(runner: TorchRunner, prompt: Sequence[int], count: int) -> Iterator[SampledToken]:
    runner.reserve(len(prompt) + count)
    tokens, start = list(prompt), 0
    for _ in range(count):
        token = run(runner, tokens[start:], start)
        assert token is not None
        yield token
        start = len(tokens)
        tokens.append(token.token_id)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize("size", [1, 2, 5, 22, 23])
def test_a_prompt_in_chunks_gives_what_the_whole_gives(runner: TorchRunner, size: int) -> None:
    logprobs_V = log_softmax(runner.forward([PROMPT])["logits"][0, -1])
    token = run_in_chunks(runner, PROMPT, size)
    assert token.token_id == int(logprobs_V.argmax())
    assert token.logprob == pytest.approx(logprobs_V.max(), abs=1e-5)


def test_decoding_from_the_cache_gives_the_logits_of_the_whole_text(runner: TorchRunner) -> None:
    tokens = list(greedy(runner, PROMPT, 30))
    text = [*PROMPT, *(token.token_id for token in tokens)]
    logprobs_TV = log_softmax(runner.forward([text])["logits"][0])[len(PROMPT) - 1 : -1]
    assert [token.token_id for token in tokens] == logprobs_TV.argmax(-1).tolist()
    np.testing.assert_allclose([token.logprob for token in tokens], logprobs_TV.max(-1), atol=2e-5)


def test_a_chunk_may_go_back_and_a_new_sequence_forgets_the_old(runner: TorchRunner) -> None:
    first = run_in_chunks(runner, PROMPT, 23)
    run(runner, [1, 2, 3], 23)
    assert run(runner, PROMPT[20:], 20) == run(runner, PROMPT[20:], 20)
    assert run(runner, PROMPT[::-1], 0) != first
    assert run(runner, PROMPT, 0) == first


def test_growing_the_cache_changes_no_token() -> None:
    small, large = TorchRunner(build_model(CONFIG, seed=1)), TorchRunner(build_model(CONFIG, seed=1))
    large.reserve(64)
    assert list(greedy(small, PROMPT, 5)) == list(greedy(large, PROMPT, 5))
    assert (small.cache.capacity, large.cache.capacity) == (28, 64)


def test_captured_streams_and_logits_are_those_of_transformers(runner: TorchRunner, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")).eval()
    rows = [PROMPT, PROMPT[::-1]]
    names = ["embedding", "layers.0", "layers.1", "norm"]
    ours = runner.forward(rows, capture=names)
    with torch.no_grad():
        theirs = peer(torch.tensor(rows), output_hidden_states=True)
    assert set(ours) == {*names, "logits"}
    hidden = theirs.hidden_states
    for name, expected in zip(names, (hidden[0], hidden[1], hidden[2], hidden[-1]), strict=True):
        np.testing.assert_allclose(ours[name], expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), rtol=1e-4, atol=1e-5)


def test_greedy_tokens_are_those_of_transformers(runner: TorchRunner, tmp_path: Path) -> None:
    """Equal up to the first near tie: where the two best differ by more than twice the measured difference."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model")).eval()
    theirs = peer.generate(
        torch.tensor([PROMPT]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()  # fmt: skip
    ours = [*PROMPT, *(token.token_id for token in greedy(runner, PROMPT, 40))]
    with torch.no_grad():
        peer_logits_TV = peer(torch.tensor([theirs])).logits[0].numpy()
    logits_TV = runner.forward([theirs])["logits"][0]
    difference = np.abs(logits_TV - peer_logits_TV).max()
    assert difference < 1e-4
    best_two_T2 = np.sort(peer_logits_TV, axis=-1)[:, -2:]
    wide_T = best_two_T2[:, 1] - best_two_T2[:, 0] > 2 * difference
    assert wide_T[len(PROMPT) - 1 : -1].mean() > 0.9  # the comparison is about nearly all tokens
    for position in range(len(PROMPT), len(theirs)):
        if wide_T[position - 1]:
            assert ours[position] == theirs[position], f"first difference at {position}"
        elif ours[position] != theirs[position]:
            break


def test_bfloat16_decodes_like_its_own_prefill_and_leaves_onednn_on() -> None:
    half = TorchRunner(build_model(CONFIG, seed=1, dtype=torch.bfloat16))
    before = torch.backends.mkldnn.enabled
    tokens = list(greedy(half, PROMPT, 20))
    assert torch.backends.mkldnn.enabled == before
    text = [*PROMPT, *(token.token_id for token in tokens)]
    logprobs_TV = log_softmax(half.forward([text])["logits"][0])[len(PROMPT) - 1 : -1]
    forced = logprobs_TV[np.arange(20), text[len(PROMPT) :]]
    np.testing.assert_allclose([token.logprob for token in tokens], forced, atol=0.1)


def test_a_model_in_training_is_run_without_dropout_and_goes_on_training() -> None:
    model = build_model(ModelConfig(**{**vars(CONFIG), "dropout": 0.5}), seed=1).train()
    noisy, still = TorchRunner(model), TorchRunner(build_model(CONFIG, seed=1))
    assert list(greedy(noisy, PROMPT, 5)) == list(greedy(still, PROMPT, 5))
    np.testing.assert_array_equal(noisy.forward([PROMPT])["logits"], still.forward([PROMPT])["logits"])
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_a_token_count_each_weight_once_and_one_row_of_an_embedding(tied: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    model = build_model(config, dtype=torch.bfloat16)
    runner = TorchRunner(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if tied or "embed" not in name)
    assert runner.weight_bytes == 2 * matrices
    assert runner.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, head size, bytes


@pytest.mark.parametrize(("stored", "asked", "expected"), [
    (torch.float32, "auto", torch.float32), (torch.bfloat16, "auto", torch.bfloat16),
    (torch.bfloat16, "float32", torch.float32), (torch.float32, "bfloat16", torch.bfloat16),
])  # fmt: skip
def test_loading_takes_the_type_of_the_file_unless_told(
    tmp_path: Path, stored: torch.dtype, asked: str, expected: torch.dtype
) -> None:
    runner = load_runner(save_model(tmp_path / "model", dtype=stored), dtype=asked, device="cpu")
    assert {parameter.dtype for parameter in runner.model.parameters()} == {expected}
    assert runner.cache.keys[0].dtype == expected


def test_loading_a_run_directory_takes_its_best_checkpoint(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    save_model(run_directory / "checkpoints" / "step-00000100")
    (run_directory / "best").symlink_to("checkpoints/step-00000100")
    assert run_in_chunks(load_runner(run_directory, device="cpu"), PROMPT, 23).token_id < 97


def test_wrong_names_are_refused_in_one_line(runner: TorchRunner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"capture='layers\.9' is unknown"):
        runner.forward([PROMPT], capture=["layers.9"])
    with pytest.raises(ValueError, match="dtype='int3' is not supported; give auto or one of float32"):
        load_runner(tmp_path, dtype="int3")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_runner(tmp_path)


def test_the_fast_setting_is_for_bfloat16_on_a_cpu_alone() -> None:
    cpu = torch.device("cpu")
    on = torch.backends.mkldnn.enabled
    with runner_module.fast_single_row(cpu, torch.float32):
        assert torch.backends.mkldnn.enabled == on
    with runner_module.fast_single_row(cpu, torch.bfloat16):
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled == on
    with pytest.raises(ZeroDivisionError), runner_module.fast_single_row(cpu, torch.bfloat16):
        _ = 1 / 0
    assert torch.backends.mkldnn.enabled == on
