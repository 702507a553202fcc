"""The runner gives the model's logits whatever the cache, the chunks, the type and the thread; and what it refuses."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.interface import BlockCopy, CacheLayout, Plan, SampledToken, SampleSpec, ScheduledChunk  # noqa: E402
from llamita.backend.mlx.infer.runner import MlxRunner, load_runner, runner_over  # noqa: E402
from llamita.backend.mlx.model.weights import build_model, quantize_arrays, to_host_arrays  # noqa: E402
from llamita.backend.torch.infer.runner import load_runner as load_torch  # noqa: E402
from llamita.backend.torch.infer.runner import runner_over as over_torch  # noqa: E402
from llamita.backend.torch.model.weights import quantize_arrays as quantize_torch  # noqa: E402
from llamita.model.config import ModelConfig  # noqa: E402
from llamita.storage import files, model_directory  # noqa: E402
from tests.backend.paged import shuffled_tables  # noqa: E402
from tests.backend.torch.infer.test_runner import CONFIG, GREEDY, PROMPT, log_softmax  # noqa: E402


@pytest.fixture(scope="module")
def runner() -> MlxRunner:
    return MlxRunner(build_model(CONFIG, seed=1))


def save_model(directory: Path, config: ModelConfig = CONFIG, dtype: str = "F32") -> Path:
    with files.atomic_directory(directory) as temporary:
        model = build_model(config, seed=1, dtype={"F32": mx.float32, "BF16": mx.bfloat16}[dtype])
        model_directory.save_tensors(temporary, to_host_arrays(model))
        model_directory.save_config(temporary, config, dtype)
    return directory


class Session:
    """A runner with memory for a few sequences of up to 64 tokens, sequence i in blocks of its own in mixed order."""

    def __init__(self, runner: MlxRunner, block_size: int = 8) -> None:
        self.runner = runner
        layout = CacheLayout(block_size, 4 * -(-64 // block_size), runner.config.attention_windows)
        self.memory, self.tables = runner.allocate(layout), shuffled_tables(layout, [64] * 4)

    def chunk(self, tokens: Sequence[int], start: int, sequence: int = 0, draws: Sequence[int] = (-1,),
              targets: Sequence[int] = ()) -> ScheduledChunk:  # fmt: skip
        """`draws`: after which of the tokens one is drawn."""
        ends = [range(start, start + len(tokens))[draw] + 1 for draw in draws]
        samples = tuple(SampleSpec(GREEDY, 5, end) for end in ends)
        return ScheduledChunk(sequence, tuple(tokens), start, self.tables[sequence], samples, tuple(targets))

    def run(self, *chunks: ScheduledChunk) -> tuple[tuple[SampledToken, ...], ...]:
        return self.runner.run(Plan(chunks), self.memory).sampled


def assert_greedy(found: Sequence[SampledToken], logits_RV: np.ndarray, tolerance: float = 2e-5) -> None:
    logprobs_RV = log_softmax(logits_RV)
    assert [token.token_id for token in found] == logprobs_RV.argmax(-1).tolist()
    np.testing.assert_allclose([token.logprob for token in found], logprobs_RV.max(-1), atol=tolerance)


@pytest.mark.parametrize("size", [1, 5, 22, 23])
def test_a_prompt_in_chunks_gives_what_the_whole_gives(runner: MlxRunner, size: int) -> None:
    session = Session(runner)
    for start in range(0, len(PROMPT), size):
        last = start + size >= len(PROMPT)
        (found,) = session.run(session.chunk(PROMPT[start : start + size], start, draws=(-1,) if last else ()))
        assert len(found) == last
    assert_greedy(found, runner.forward([PROMPT])["logits"][0, -1:])


@pytest.mark.parametrize("block_size", [1, 8])
def test_decoding_from_the_cache_gives_the_logits_of_the_whole_text(runner: MlxRunner, block_size: int) -> None:
    session, tokens, found = Session(runner, block_size), list(PROMPT), []
    while len(tokens) < 53:
        start = len(tokens) - 1 if found else 0
        found += session.run(session.chunk(tokens[start:], start))[0]
        tokens.append(found[-1].token_id)
    assert_greedy(found, runner.forward([tokens])["logits"][0, len(PROMPT) - 1 : -1])


def test_results_come_in_the_order_of_the_plan(runner: MlxRunner) -> None:
    """Inside, single tokens go first; several samples of a chunk stay together, and one that asks for none has none."""
    session = Session(runner)
    texts = [PROMPT, PROMPT[:9], PROMPT[5:17], PROMPT[:1]]
    session.run(session.chunk(texts[1][:-1], 0, 1, draws=()))
    logits = [runner.forward([text])["logits"][0] for text in texts]
    found = session.run(
        session.chunk(PROMPT, 0, draws=(-3, -2, -1)),
        session.chunk(texts[1][-1:], 8, 1),
        session.chunk(texts[2], 0, 2, draws=()),
        session.chunk(texts[3], 0, 3),
    )
    assert [len(sampled) for sampled in found] == [3, 1, 0, 1]
    for number, rows in ((0, 3), (1, 1), (3, 1)):
        assert_greedy(found[number], logits[number][-rows:])


def test_targets_get_the_log_probabilities_of_the_whole_text() -> None:
    """Of a text read in pieces beside others, more targets in a chunk than logits are held of at once."""
    runner = MlxRunner(build_model(dataclasses.replace(CONFIG, max_position_embeddings=200), seed=1))
    text = np.random.default_rng(1).integers(0, 97, 200).tolist()
    memory = runner.allocate(CacheLayout(16, 30))
    (table,), (other,) = shuffled_tables(memory.cache.layout, [200, 200])
    expected = log_softmax(runner.forward([text])["logits"][0])[np.arange(199), text[1:]]
    found: list[float] = []
    for start, end in ((0, 3), (3, 4), (4, 150), (150, 200)):
        beside = ScheduledChunk(1, tuple(text[start:end]), start, (other,), (SampleSpec(GREEDY, 5, end),))
        scored = ScheduledChunk(0, tuple(text[start:end]), start, (table,), (), tuple(text[start + 1 : end + 1]))
        result = runner.run(Plan((beside, scored)), memory)
        assert result.target_logprobs[0] == ()
        assert [len(sampled) for sampled in result.sampled] == [1, 0]
        found += result.target_logprobs[1]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_copied_block_parts_two_sequences(runner: MlxRunner) -> None:
    """The second shares all full blocks and a copy of the last, half-filled one; each goes on alone."""
    session = Session(runner)
    session.run(session.chunk(PROMPT, 0))
    (first,), (second,) = session.tables[0], session.tables[1]
    second[:2] = first[:2]
    runner.run(Plan((), (BlockCopy(0, int(first[2]), int(second[2])),)), session.memory)
    texts = {0: [*PROMPT, 3, 7], 1: [*PROMPT, 44, 9]}
    for position in (23, 24):
        for sequence, text in texts.items():
            (found,) = session.run(session.chunk([text[position]], position, sequence))
            assert_greedy(found, runner.forward([text[: position + 1]])["logits"][0, -1:])


def test_numbers_that_are_none_stay_with_the_sequence_that_made_them(runner: MlxRunner) -> None:
    """Blocks full of NaN, as broken sequences leave them behind, hurt neither their next owners nor neighbours."""
    session = Session(runner)
    for memory in (session.memory.cache.keys, session.memory.cache.values):
        memory[:] = [mx.full((2, 256, 8), float("nan")) for _ in memory]
    texts = [list(text) for text in (PROMPT, PROMPT[:20], PROMPT[:16], PROMPT[:2])]
    session.run(*(session.chunk(text, 0, number) for number, text in enumerate(texts)))
    for token in range(10):
        for text in texts:
            text.append(token)
        found = session.run(*(session.chunk([token], len(t) - 1, number) for number, t in enumerate(texts)))
        for sampled, text in zip(found, texts, strict=True):
            assert_greedy(sampled, runner.forward([text])["logits"][0, -1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_narrow_types_decode_like_their_own_prefill(dtype: str, tolerance: float) -> None:
    half = runner_over(CONFIG, to_host_arrays(build_model(CONFIG, seed=1)), dtype)
    session, found, text = Session(half), [], list(PROMPT)
    while len(found) < 12:
        start = len(text) - 1 if found else 0
        found += session.run(session.chunk(text[start:], start))[0]
        text.append(found[-1].token_id)
    logprobs_TV = log_softmax(half.forward([text])["logits"][0])[len(PROMPT) - 1 : -1]
    forced = logprobs_TV[np.arange(12), text[len(PROMPT) :]]
    np.testing.assert_allclose([token.logprob for token in found], forced, atol=tolerance)
    assert half.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, sliding_window=9, tie_word_embeddings=True)])
def test_logits_streams_and_counts_of_bytes_are_those_of_pytorch(config: ModelConfig, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", config)
    ours, theirs = load_runner(directory), load_torch(directory, device="cpu")
    names, rows = ["embedding", "layers.0", "layers.2", "norm"], [PROMPT, PROMPT[::-1]]
    found, expected = ours.forward(rows, names), theirs.forward(rows, names)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token
    assert ours.cache_budget > 0
    with pytest.raises(ValueError, match=r"capture='layers\.3' is unknown"):
        ours.forward(rows, ["layers.3"])
    for name, array in theirs.weights().items():  # the matrices lie in another order inside
        assert bytes(ours.weights()[name].data) == bytes(array.data), name


def test_a_model_in_training_is_run_without_dropout_and_goes_on_training() -> None:
    noisy = build_model(dataclasses.replace(CONFIG, dropout=0.5), seed=1).train()
    still = MlxRunner(build_model(CONFIG, seed=1))
    for _ in range(2):
        np.testing.assert_array_equal(MlxRunner(noisy).forward([PROMPT])["logits"], still.forward([PROMPT])["logits"])
    Session(MlxRunner(noisy)).run(Session(still).chunk(PROMPT, 0))
    assert noisy.training


def test_a_step_runs_in_whatever_thread_asks_for_it(runner: MlxRunner) -> None:
    session, found = Session(runner), []
    session.run(session.chunk(PROMPT[:-1], 0, draws=()))
    thread = threading.Thread(target=lambda: found.extend(session.run(session.chunk(PROMPT[-1:], 22))[0]))
    thread.start()
    thread.join()
    assert_greedy(found, runner.forward([PROMPT])["logits"][0, -1:])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 48])  # 48 is no whole number of the kernel's groups
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_give_pytorchs_logits_and_go_back_as_they_came(scheme: str, width: int, tied: bool) -> None:
    config = dataclasses.replace(
        CONFIG, hidden_size=width, num_attention_heads=4, head_dim=16, tie_word_embeddings=tied, intermediate_size=96,
        quantization=scheme,
    )  # fmt: skip
    plain = to_host_arrays(build_model(dataclasses.replace(config, quantization=""), seed=1))
    stored = dict(quantize_arrays(config, plain.items()))
    expected = dict(quantize_torch(config, plain.items()))
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        assert (stored[name].dtype, stored[name].shape) == (array.dtype, array.shape)
        assert bytes(stored[name].data) == bytes(array.data), name
    ours, theirs = runner_over(config, stored), over_torch(config, stored)
    logits, rival = ours.forward([PROMPT])["logits"], theirs.forward([PROMPT])["logits"]
    np.testing.assert_allclose(logits, rival, atol=1e-5 * np.abs(rival).max())
    half = runner_over(config, stored, "bfloat16")
    if width == 64 and tied:  # the kernel reads a scale and a bias of its own for each stored scale
        assert half.weight_bytes > sum(len(array.data) for array in stored.values())
    assert np.linalg.norm(half.forward([PROMPT])["logits"] - rival) < 0.03 * np.linalg.norm(rival)
    for name, array in half.weights().items():
        assert bytes(array.data) == bytes(stored[name].data), name
    session = Session(ours)
    session.run(session.chunk(PROMPT[:-1], 0, draws=()))
    assert_greedy(session.run(session.chunk(PROMPT[-1:], 22))[0], logits[0, -1:])


def test_the_type_is_that_of_the_file_unless_another_is_asked_for(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", dtype="BF16")
    assert load_runner(directory).dtype == mx.bfloat16
    assert load_runner(directory, "float32").dtype == mx.float32
    assert load_runner(directory, "float16", "cpu").dtype == mx.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exact": True}, "exact mode is PyTorch's"),
        ({"threads": 2}, "threads=2 cannot be set: MLX"),
        ({"dtype": "int3"}, "dtype='int3' is not supported; give auto or one of float32, bfloat16, float16"),
        ({"device": "cuda"}, "device='cuda' is not one of MLX's; give auto, cpu or gpu"),
    ],
)
def test_what_mlx_does_not_have_is_refused_in_a_line(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_runner(save_model(tmp_path / "model"), **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 10**6]], "token id 1000000 is not one of this model's, 0 to "),
        ([[1, -1]], "token id -1 is not one of this model's"),
        ([[1, 2], [3]], "tokens must be rows of one length, at least 1, of whole numbers"),
        ([[]], "tokens must be rows of one length, at least 1"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused_by_both(tokens: list, message: str, runner: MlxRunner) -> None:
    """MLX looks them up unchecked, in other memory."""
    for each in (runner, over_torch(CONFIG, runner.weights())):
        with pytest.raises(ValueError, match=message):
            each.forward(tokens)


@pytest.mark.skipif(mx.is_available(mx.Device(mx.gpu)), reason="this machine has a GPU that MLX can use")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='gpu' cannot be used: this MLX has no GPU; give auto or cpu"):
        load_runner(save_model(tmp_path / "model"), device="gpu")
