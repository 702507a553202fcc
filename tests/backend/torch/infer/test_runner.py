"""The runner gives the model's logits whatever the cache, the chunks and the type, and transformers' tokens."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita.backend.interface import BlockCopy, CacheLayout, Plan, SampledToken, SampleSpec, ScheduledChunk
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner, load_runner
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory
from tests.backend.paged import shuffled_tables

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
        model_directory.save_tensors(temporary, to_host_arrays(build_model(config, seed=1, dtype=dtype)))
        model_directory.save_config(temporary, config, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])
    return directory


class Session:
    """A runner with memory for a few sequences of up to 64 tokens, sequence i in blocks of its own in mixed order."""

    def __init__(self, runner: TorchRunner, block_size: int = 8) -> None:
        self.runner = runner
        layout = CacheLayout(block_size, 4 * -(-64 // block_size), runner.config.attention_windows)
        self.memory = runner.allocate(layout)
        self.tables = shuffled_tables(layout, [64] * 4)

    def chunk(
        self,
        tokens: Sequence[int],
        start: int,
        params: SamplingParams | None = GREEDY,
        sequence: int = 0,
        targets: Sequence[int] = (),
    ) -> ScheduledChunk:
        samples = () if params is None else (SampleSpec(params, 5, start + len(tokens)),)
        return ScheduledChunk(sequence, tuple(tokens), start, self.tables[sequence], samples, tuple(targets))

    def run(
        self, tokens: Sequence[int], start: int, params: SamplingParams | None = GREEDY, sequence: int = 0
    ) -> SampledToken | None:
        plan = Plan((self.chunk(tokens, start, params, sequence),))
        sampled = self.runner.run(plan, self.memory).sampled[0]
        assert len(sampled) == (params is not None)
        return sampled[0] if sampled else None


def run_in_chunks(runner: TorchRunner, tokens: Sequence[int], size: int) -> SampledToken:
    session = Session(runner)
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        result = session.run(chunk, start, GREEDY if start + len(chunk) == len(tokens) else None)
    assert result is not None
    return result


def greedy(runner: TorchRunner, prompt: Sequence[int], count: int, block_size: int = 8) -> Iterator[SampledToken]:
    session = Session(runner, block_size)
    tokens, start = list(prompt), 0
    for _ in range(count):
        token = session.run(tokens[start:], start)
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
    session = Session(runner)
    first = session.run(PROMPT, 0)
    session.run([1, 2, 3], 23)
    assert session.run(PROMPT[20:], 20) == session.run(PROMPT[20:], 20)
    assert session.run(PROMPT[::-1], 0) != first
    assert session.run(PROMPT, 0) == first


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_the_size_of_blocks_changes_no_token(runner: TorchRunner, block_size: int) -> None:
    expected = list(greedy(runner, PROMPT, 20))
    found = list(greedy(runner, PROMPT, 20, block_size))
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    np.testing.assert_allclose([t.logprob for t in found], [t.logprob for t in expected], atol=1e-5)


def test_results_come_in_the_order_of_the_plan(runner: TorchRunner) -> None:
    """Inside, single tokens go first; several samples of a chunk stay together, and one that asks for none has none."""
    session = Session(runner)
    texts = [PROMPT, PROMPT[:9], PROMPT[5:17], PROMPT[:1]]
    for number in (1, 3):
        session.run(texts[number][:-1] or [0], 0, None, number)
    logprobs = [log_softmax(runner.forward([text])["logits"][0]) for text in texts]
    speculated = ScheduledChunk(
        0, PROMPT, 0, session.tables[0], tuple(SampleSpec(GREEDY, 5, end) for end in (21, 22, 23))
    )
    chunks = (
        speculated,
        session.chunk(texts[1][-1:], 8, sequence=1),
        session.chunk(texts[2], 0, None, sequence=2),
        session.chunk(texts[3], 0, sequence=3),
    )
    result = runner.run(Plan(chunks), session.memory)
    assert [len(sampled) for sampled in result.sampled] == [3, 1, 0, 1]
    assert result.target_logprobs == ()
    for sampled, rows in ((result.sampled[0], logprobs[0][20:]), (result.sampled[1], logprobs[1][-1:]),
                          (result.sampled[3], logprobs[3][-1:])):  # fmt: skip
        assert [token.token_id for token in sampled] == rows.argmax(-1).tolist()
        np.testing.assert_allclose([token.logprob for token in sampled], rows.max(-1), atol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_targets_get_the_log_probabilities_of_the_whole_text(runner: TorchRunner, exact: bool) -> None:
    """Of a text read in pieces beside others, more targets in a chunk than logits are held of at once."""
    runner = TorchRunner(build_model(dataclasses.replace(CONFIG, max_position_embeddings=400), seed=1), exact)
    text = np.random.default_rng(1).integers(0, 97, 400).tolist()
    memory = runner.allocate(CacheLayout(16, 60))
    (table,), (other,) = shuffled_tables(memory.cache.layout, [400, 400])
    expected = log_softmax(runner.forward([text])["logits"][0])[np.arange(399), text[1:]]
    found: list[float] = []
    for start, end in ((0, 3), (3, 4), (4, 300), (300, 400)):
        beside = ScheduledChunk(1, tuple(text[start:end]), start, (other,), (SampleSpec(GREEDY, 5, end),))
        scored = ScheduledChunk(0, tuple(text[start:end]), start, (table,), (), tuple(text[start + 1 : end + 1]))
        result = runner.run(Plan((beside, scored)), memory)
        assert result.target_logprobs[0] == ()
        assert [len(sampled) for sampled in result.sampled] == [1, 0]
        found += result.target_logprobs[1]
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_copied_block_parts_two_sequences(runner: TorchRunner) -> None:
    """The second shares all full blocks and a copy of the last, half-filled one; each goes on alone."""
    session = Session(runner)
    session.run(PROMPT, 0)
    (first,), (second,) = session.tables[0], session.tables[1]
    second[:2] = first[:2]
    copy = BlockCopy(0, int(first[2]), int(second[2]))
    runner.run(Plan((), (copy,)), session.memory)
    for sequence, token in ((0, 3), (1, 44), (0, 7), (1, 9)):
        text = [*PROMPT, {0: 3, 1: 44}[sequence], token][: 24 + (token in (7, 9))]
        logprobs_V = log_softmax(runner.forward([text])["logits"][0, -1])
        found = session.run([token], len(text) - 1, sequence=sequence)
        assert found is not None
        assert found.token_id == int(logprobs_V.argmax())
        assert found.logprob == pytest.approx(logprobs_V.max(), abs=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_numbers_that_are_none_stay_with_the_sequence_that_made_them(exact: bool) -> None:
    """Blocks full of NaN, as broken sequences leave them behind, hurt neither their next owners nor neighbours."""
    runner = TorchRunner(build_model(CONFIG, seed=1), exact)
    clean, session = Session(runner), Session(runner)
    for memory in (*session.memory.cache.keys, *session.memory.cache.values):
        memory.fill_(float("nan"))
    texts = [PROMPT, PROMPT[:20], PROMPT[:16], PROMPT[:2]]
    for number, text in enumerate(texts):
        for one in (clean, session):
            assert one.run(text, 0, sequence=number) is not None
    for step in range(10):
        chunks = [session.chunk([step], len(text) + step, sequence=number) for number, text in enumerate(texts)]
        expected = [clean.run([step], len(text) + step, sequence=number) for number, text in enumerate(texts)]
        for (found,), alone in zip(runner.run(Plan(tuple(chunks)), session.memory).sampled, expected, strict=True):
            assert alone is not None
            assert found.token_id == alone.token_id
            assert found.logprob == pytest.approx(alone.logprob, abs=1e-5)


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


def test_bfloat16_decodes_like_its_own_prefill() -> None:
    half = TorchRunner(build_model(CONFIG, seed=1, dtype=torch.bfloat16))
    tokens = list(greedy(half, PROMPT, 20))
    text = [*PROMPT, *(token.token_id for token in tokens)]
    logprobs_TV = log_softmax(half.forward([text])["logits"][0])[len(PROMPT) - 1 : -1]
    forced = logprobs_TV[np.arange(20), text[len(PROMPT) :]]
    np.testing.assert_allclose([token.logprob for token in tokens], forced, atol=0.1)


def test_a_model_in_training_is_run_without_dropout() -> None:
    model = build_model(ModelConfig(**{**vars(CONFIG), "dropout": 0.5}), seed=1)
    noisy, still = TorchRunner(model), TorchRunner(build_model(CONFIG, seed=1))
    assert list(greedy(noisy, PROMPT, 5)) == list(greedy(still, PROMPT, 5))
    np.testing.assert_array_equal(noisy.forward([PROMPT])["logits"], still.forward([PROMPT])["logits"])


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
    assert runner.allocate(CacheLayout(16, 4)).cache.keys[0].dtype == expected


def test_loading_a_run_directory_takes_its_best_checkpoint(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    save_model(run_directory / "checkpoints" / "step-00000100")
    (run_directory / "best").symlink_to("checkpoints/step-00000100")
    assert run_in_chunks(load_runner(run_directory, device="cpu"), PROMPT, 23).token_id < 97


def test_the_exact_mode_is_refused_where_it_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"exact mode runs on a CPU in float32, not on cpu in torch\.bfloat16"):
        TorchRunner(build_model(CONFIG, dtype=torch.bfloat16), exact=True)


def test_the_exact_mode_loads_float32_whatever_is_stored(tmp_path: Path) -> None:
    runner = load_runner(save_model(tmp_path / "model", dtype=torch.bfloat16), exact=True)
    assert runner.exact
    assert runner.dtype == torch.float32


def test_wrong_names_are_refused_in_one_line(runner: TorchRunner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"capture='layers\.9' is unknown"):
        runner.forward([PROMPT], capture=["layers.9"])
    with pytest.raises(ValueError, match="dtype='int3' is not supported; give auto or one of float32"):
        load_runner(tmp_path, dtype="int3")
    with pytest.raises(ValueError, match="device='meta' is not one that this backend runs on; give auto, cpu, or cuda"):
        load_runner(save_model(tmp_path / "model"), device="meta")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_runner(tmp_path)
