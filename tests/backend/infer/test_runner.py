"""The runners give the model's logits whatever the cache, the chunks, the type and the thread, and transformers'
tokens; and what they refuse."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita.backend.interface import BlockCopy, CacheLayout, Plan
from llamita.model.parameters import parameter_table
from tests import reference
from tests.backend.frameworks import NAMES, make, to_numpy
from tests.backend.models import dequantized, perturbed, save
from tests.backend.sessions import (
    CONFIG,
    PROMPT,
    Session,
    assert_greedy,
    check_targets,
    check_that_broken_numbers_stay,
    greedy,
    log_softmax,
)
from tests.backend.tolerances import DECODING, QUANTIZED, relative_difference

NARROW = {"BF16": "bf16", "F32": "fp32"}


@pytest.fixture(scope="module")
def arrays():
    return perturbed(CONFIG)


@pytest.fixture(scope="module")
def runner(framework, arrays):
    return framework.runner_over(CONFIG, arrays)


def save_model(framework, directory: Path, arrays, config=CONFIG, dtype: str = "F32") -> Path:
    model = framework.build_model(config, arrays, NARROW[dtype])
    return save(config, framework.weights.to_host_arrays(model), directory, dtype)


def test_logits_are_those_of_the_oracle(framework, runner, arrays) -> None:
    expected = reference.forward(CONFIG, to_numpy(arrays), PROMPT)
    found = runner.forward([PROMPT, PROMPT[::-1]], ["embedding", "layers.0", "layers.2", "norm"])
    assert set(found) == {"embedding", "layers.0", "layers.2", "norm", "logits"}
    for name, array in found.items():
        assert array.dtype == np.float32
        assert relative_difference(array[0], expected[name]) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 5, 22, 23])
def test_a_prompt_in_chunks_gives_what_the_whole_gives(runner, size: int) -> None:
    session = Session(runner)
    for start in range(0, len(PROMPT), size):
        last = start + size >= len(PROMPT)
        (found,) = session.run(session.chunk(PROMPT[start : start + size], start, draws=(-1,) if last else ()))
        assert len(found) == last
    assert_greedy(found, runner.forward([PROMPT])["logits"][0, -1:])


def test_decoding_from_the_cache_gives_the_logits_of_the_whole_text(runner) -> None:
    found = list(greedy(runner, PROMPT, 30))
    text = [*PROMPT, *(token.token_id for token in found)]
    assert_greedy(found, runner.forward([text])["logits"][0, len(PROMPT) - 1 : -1], 2e-5)


def test_a_chunk_may_go_back_and_a_new_sequence_forgets_the_old(runner) -> None:
    session = Session(runner)
    first = session.token(PROMPT, 0)
    session.token([1, 2, 3], 23)
    assert session.token(PROMPT[20:], 20) == session.token(PROMPT[20:], 20)
    assert session.token(PROMPT[::-1], 0) != first
    assert session.token(PROMPT, 0) == first


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_the_size_of_blocks_changes_no_token(runner, block_size: int) -> None:
    expected = list(greedy(runner, PROMPT, 20))
    found = list(greedy(runner, PROMPT, 20, block_size))
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    np.testing.assert_allclose([t.logprob for t in found], [t.logprob for t in expected], atol=1e-5)


def test_results_come_in_the_order_of_the_plan(runner) -> None:
    """Inside, single tokens go first; several samples of a chunk stay together, and one that asks for none has none."""
    session = Session(runner)
    texts = [PROMPT, PROMPT[:9], PROMPT[5:17], PROMPT[:1]]
    session.run(session.chunk(texts[1][:-1], 0, 1, draws=()))
    logits = [runner.forward([text])["logits"][0] for text in texts]
    result = session.step(
        session.chunk(PROMPT, 0, draws=(-3, -2, -1)),
        session.chunk(texts[1][-1:], 8, 1),
        session.chunk(texts[2], 0, 2, draws=()),
        session.chunk(texts[3], 0, 3),
    )
    assert [len(sampled) for sampled in result.sampled] == [3, 1, 0, 1]
    assert result.target_logprobs == ()
    for number, rows in ((0, 3), (1, 1), (3, 1)):
        assert_greedy(result.sampled[number], logits[number][-rows:])


def test_targets_get_the_log_probabilities_of_the_whole_text(framework, arrays) -> None:
    check_targets(framework.runner_over(dataclasses.replace(CONFIG, max_position_embeddings=400), arrays))


def test_a_copied_block_parts_two_sequences(runner) -> None:
    """The second shares all full blocks and a copy of the last, half-filled one; each goes on alone."""
    session = Session(runner)
    session.token(PROMPT, 0)
    (first,), (second,) = session.tables[0], session.tables[1]
    second[:2] = first[:2]
    runner.run(Plan((), (BlockCopy(0, int(first[2]), int(second[2])),)), session.memory)
    texts = {0: [*PROMPT, 3, 7], 1: [*PROMPT, 44, 9]}
    for position in (23, 24):
        for sequence, text in texts.items():
            found = session.token([text[position]], position, sequence)
            assert_greedy([found], runner.forward([text[: position + 1]])["logits"][0, -1:])


def test_numbers_that_are_none_stay_with_the_sequence_that_made_them(framework, arrays) -> None:
    check_that_broken_numbers_stay(framework, framework.runner_over(CONFIG, arrays))


def test_captured_streams_and_logits_are_those_of_transformers(framework, runner, arrays, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = save_model(framework, tmp_path / "model", arrays)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    rows, names = [PROMPT, PROMPT[::-1]], ["embedding", "layers.0", "layers.1", "norm"]
    ours = runner.forward(rows, capture=names)
    with torch.no_grad():
        theirs = peer(torch.tensor(rows), output_hidden_states=True)
    hidden = theirs.hidden_states
    for name, expected in zip(names, (hidden[0], hidden[1], hidden[2], hidden[-1]), strict=True):
        np.testing.assert_allclose(ours[name], expected.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), rtol=1e-4, atol=1e-5)


def test_greedy_tokens_are_those_of_transformers(framework, runner, arrays, tmp_path: Path) -> None:
    """Equal up to the first near tie: where the two best differ by more than twice the measured difference."""
    transformers = pytest.importorskip("transformers")
    directory = save_model(framework, tmp_path / "model", arrays)
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_types_decode_like_their_own_prefill(framework, arrays, precision: str) -> None:
    half = framework.runner_over(CONFIG, arrays, precision)
    found = list(greedy(half, PROMPT, 20))
    text = [*PROMPT, *(token.token_id for token in found)]
    logprobs_TV = log_softmax(half.forward([text])["logits"][0])[len(PROMPT) - 1 : -1]
    forced = logprobs_TV[np.arange(20), text[len(PROMPT) :]]
    np.testing.assert_allclose([token.logprob for token in found], forced, atol=DECODING[precision])


def test_a_model_with_dropout_is_run_without(framework, arrays) -> None:
    model = framework.build_model(dataclasses.replace(CONFIG, dropout=0.5), arrays)
    noisy, still = framework.runner_of(model), framework.runner_of(framework.build_model(CONFIG, arrays))
    assert list(greedy(noisy, PROMPT, 5)) == list(greedy(still, PROMPT, 5))
    for _ in range(2):
        np.testing.assert_array_equal(noisy.forward([PROMPT])["logits"], still.forward([PROMPT])["logits"])


def test_a_step_runs_in_whatever_thread_asks_for_it(runner) -> None:
    session, found = Session(runner), []
    session.run(session.chunk(PROMPT[:-1], 0, draws=()))
    thread = threading.Thread(target=lambda: found.append(session.token(PROMPT[-1:], 22)))
    thread.start()
    thread.join()
    assert_greedy(found, runner.forward([PROMPT])["logits"][0, -1:])


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_a_token_count_each_weight_once_and_one_row_of_an_embedding(framework, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    runner = framework.runner_over(config, perturbed(config), "bf16")
    matrices = sum(row.size for row in parameter_table(config) if tied or "embed" not in row.name)
    assert runner.weight_bytes == 2 * matrices
    assert runner.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, head size, bytes
    assert runner.cache_budget > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 48])  # 48 is no whole number of the groups of MLX's kernel
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights_give_the_logits_of_the_numbers_they_stand_for(framework, scheme, width, tied) -> None:
    """From the cache, too."""
    config = dataclasses.replace(
        CONFIG, hidden_size=width, num_attention_heads=4, head_dim=16, tie_word_embeddings=tied, intermediate_size=96,
    )  # fmt: skip
    quantized = dataclasses.replace(config, quantization=scheme)
    stored = dict(framework.backend.quantize_arrays(quantized, perturbed(config).items()))
    values = dequantized(stored)
    plain = {row.name: values[row.name][..., : row.shape[-1]] for row in parameter_table(config)}
    expected = reference.forward(config, plain, PROMPT)["logits"]
    for precision in ("fp32", "bf16"):
        runner = framework.runner_over(quantized, stored, precision)
        logits = runner.forward([PROMPT])["logits"]
        assert relative_difference(logits[0], expected) < QUANTIZED[precision]
        session = Session(runner)
        session.run(session.chunk(PROMPT[:-1], 0, draws=()))
        found = session.token(PROMPT[-1:], 22)
        if precision == "fp32":
            assert_greedy([found], logits[0, -1:], 2e-5)


# --- opening ---


@pytest.mark.parametrize(("stored", "asked", "expected"), [
    ("F32", "auto", "fp32"), ("BF16", "auto", "bf16"), ("BF16", "float32", "fp32"), ("F32", "bfloat16", "bf16"),
    ("BF16", "float16", "fp16"),
])  # fmt: skip
def test_loading_takes_the_type_of_the_file_unless_told(framework, arrays, tmp_path, stored, asked, expected) -> None:
    directory = save_model(framework, tmp_path / "model", arrays, dtype=stored)
    runner = framework.backend.load_runner(directory, dtype=asked, device="cpu")
    wanted = framework.dtype(expected)
    assert runner.dtype == wanted
    # Weights in blocks hold no memory as parameters, and keep the numbers of the file.
    held = [p for p in framework.parameters(runner.model) if not getattr(p, "is_meta", False)]
    assert {parameter.dtype for parameter in held} == {wanted}
    assert runner.allocate(CacheLayout(16, 4)).cache.keys[0].dtype == wanted


def test_a_loaded_runner_gives_the_weights_of_the_file(framework, arrays, tmp_path) -> None:
    """The matrices lie in another order inside."""
    runner = framework.backend.load_runner(save_model(framework, tmp_path / "model", arrays), device="cpu")
    found = runner.weights()
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert bytes(found[name].data) == bytes(array.data), name


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 9, "tie_word_embeddings": True}], ids=["plain", "window"])
def test_a_loaded_model_has_the_logits_and_counts_of_bytes_of_the_other_backend(changes, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    directory = save(config, perturbed(config), tmp_path / "model")
    ours, theirs = (make(name).backend.load_runner(directory, device="cpu") for name in NAMES)
    names, rows = ["embedding", "layers.0", "layers.2", "norm"], [PROMPT, PROMPT[::-1]]
    found, expected = ours.forward(rows, names), theirs.forward(rows, names)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token


def test_loading_a_run_directory_takes_its_best_checkpoint(framework, arrays, tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    save_model(framework, run_directory / "checkpoints" / "step-00000100", arrays)
    (run_directory / "best").symlink_to("checkpoints/step-00000100")
    loaded = framework.backend.load_runner(run_directory, device="cpu")
    assert_greedy([Session(loaded).token(PROMPT, 0)], loaded.forward([PROMPT])["logits"][0, -1:])


def test_wrong_names_are_refused_in_one_line(framework, runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"capture='layers\.9' is unknown"):
        runner.forward([PROMPT], capture=["layers.9"])
    with pytest.raises(ValueError, match="dtype='int3' is not supported; give auto or one of float32"):
        framework.backend.load_runner(tmp_path, dtype="int3")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        framework.backend.load_runner(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 10**6]], "token id 1000000 is not one of this model's, 0 to "),
        ([[1, -1]], "token id -1 is not one of this model's"),
        ([[1, 2], [3]], "tokens must be rows of one length, at least 1, of whole numbers"),
        ([[]], "tokens must be rows of one length, at least 1"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(runner, tokens: list, message: str) -> None:
    """Looked up unchecked, they would read other memory."""
    with pytest.raises(ValueError, match=message):
        runner.forward(tokens)
