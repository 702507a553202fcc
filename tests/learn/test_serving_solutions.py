"""The serving track's solutions, in both frameworks, against PyTorch's operators, transformers and MLX's."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.learn.serving import FRAMEWORKS, solutions

TOLERANCE = {"float32": (1e-5, 2e-5), "float16": (2e-3, 5e-3), "bfloat16": (1.6e-2, 3e-2)}
"""Relative and absolute, for results of size 1."""
DTYPES = tuple(TOLERANCE)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def course(request: pytest.FixtureRequest) -> SimpleNamespace:
    return solutions(request.param)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def both(course: Any, dtype: str, *arrays: np.ndarray) -> tuple[list[Any], list[torch.Tensor]]:
    """The arrays as the course's and as PyTorch's, rounded alike to a dtype."""
    expected = [torch.tensor(array, dtype=torch.float32).to(getattr(torch, dtype)) for array in arrays]
    return [course.tensors.tensor(array, dtype) for array in arrays], expected


def assert_close(course: Any, got: Any, expected: torch.Tensor, dtype: str = "float32") -> None:
    rtol, atol = TOLERANCE[dtype]
    np.testing.assert_allclose(course.tensors.array(got), expected.double().numpy(), rtol=rtol, atol=atol)
    assert str(got.dtype).split(".")[-1] == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_basics_are_pytorchs(course: Any, dtype: str) -> None:
    for shape in ((7,), (3, 5), (2, 3, 4, 5)):
        (x,), (reference,) = both(course, dtype, 5 * drawn(1, *shape))
        for axis in range(-len(shape), len(shape)):
            assert_close(course, course.basics.softmax(x, axis), torch.softmax(reference, axis), dtype)
        assert_close(course, course.basics.silu(x), F.silu(reference), dtype)
    for leading in ((), (3,), (2, 3)):
        arrays, (x, w, bias) = both(course, dtype, drawn(1, *leading, 6), 0.3 * drawn(2, 4, 6), drawn(3, 4))
        assert_close(course, course.basics.linear(*arrays[:2]), F.linear(x, w), dtype)
        assert_close(course, course.basics.linear(*arrays), F.linear(x, w, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_pytorchs(course: Any, dtype: str) -> None:
    cases = itertools.product(((), (2,), (2, 3)), ((4, 4), (1, 7), (3, 9)), (None, 0.3), (False, True))
    for batch, (L, S), scale, masked in cases:
        shapes = ((*batch, 2, L, 8), (*batch, 2, S, 8), (*batch, 2, S, 8))
        arrays, tensors = both(course, dtype, *(drawn(seed, *shape) for seed, shape in enumerate(shapes)))
        (mask,), (added,) = both(course, dtype, drawn(9, *batch, 1, L, S))
        got = course.attention.scaled_dot_product_attention_simple(*arrays, scale, mask if masked else None)
        expected = F.scaled_dot_product_attention(*tensors, added if masked else None, scale=scale)
        assert_close(course, got, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
def test_grouped_attention_is_pytorchs(course: Any, dtype: str, heads: tuple[int, int]) -> None:
    run = course.attention.scaled_dot_product_attention_grouped
    for batch, (L, S), scale in itertools.product(((), (2,)), ((5, 5), (1, 6), (3, 8)), (None, 0.5)):
        shapes = ((*batch, heads[0], L, 8), (*batch, heads[1], S, 8), (*batch, heads[1], S, 8))
        arrays, tensors = both(course, dtype, *(drawn(seed, *shape) for seed, shape in enumerate(shapes)))
        hidden = torch.ones(L, S, dtype=torch.bool).tril(S - L)
        assert_close(
            course, run(*arrays, scale, "causal"),
            F.scaled_dot_product_attention(*tensors, hidden, scale=scale, enable_gqa=True), dtype,
        )  # fmt: skip
        (mask,), (added,) = both(course, dtype, drawn(9, *batch, heads[0], L, S))
        expected = F.scaled_dot_product_attention(*tensors, added, scale=scale, enable_gqa=True)
        assert_close(course, run(*arrays, scale, mask), expected, dtype)


def test_multi_head_attention_is_pytorchs(course: Any) -> None:
    wq, wk, wv, wo = (0.3 * drawn(seed, 12, 12) for seed in range(4))
    inputs = [drawn(seed, 2, 5, 12) for seed in (5, 6, 7)]
    weights = [course.tensors.tensor(w) for w in (wq, wk, wv, wo)]
    got = course.attention.SimpleMultiHeadAttention(12, 3, *weights)(*map(course.tensors.tensor, inputs))
    query, key, value = (torch.tensor(x, dtype=torch.float32).transpose(0, 1) for x in inputs)
    combined = torch.tensor(np.concatenate((wq, wk, wv)), dtype=torch.float32)
    expected, _ = F.multi_head_attention_forward(
        query, key, value, 12, 3, combined, None, None, None, False, 0.0,
        torch.tensor(wo, dtype=torch.float32), None, training=False,
    )  # fmt: skip
    assert_close(course, got, expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_pytorchs(course: Any, dtype: str) -> None:
    for shape in ((8,), (2, 3, 8)):
        arrays, (x, weight) = both(course, dtype, 3 * drawn(1, *shape), 1 + 0.2 * drawn(2, 8))
        got = course.layers.RMSNorm(8, arrays[1], 0.01)(arrays[0])
        assert_close(course, got, F.rms_norm(x, (8,), weight, 0.01), dtype)


def test_rope_is_a_product_with_complex_numbers(course: Any) -> None:
    x = drawn(1, 2, 5, 3, 8)
    for offset, positions in (
        (None, np.tile(np.arange(5), (2, 1))),
        (slice(6, 11), np.tile(np.arange(6, 11), (2, 1))),
        ([slice(1, 6), slice(20, 25)], np.stack((np.arange(1, 6), np.arange(20, 25)))),
    ):
        turn = np.exp(1j * positions[:, :, None] * 300.0 ** (-np.arange(0, 8, 2) / 8))[:, :, None]
        for traditional in (True, False):
            first, second = (x[..., 0::2], x[..., 1::2]) if traditional else np.split(x, 2, axis=-1)
            turned = (first + 1j * second) * turn
            parts = (turned.real, turned.imag)
            expected = np.stack(parts, -1).reshape(x.shape) if traditional else np.concatenate(parts, -1)
            got = course.positional_encoding.RoPE(8, 32, 300, traditional)(course.tensors.tensor(x), offset)
            np.testing.assert_allclose(course.tensors.array(got), expected, atol=2e-5)


@pytest.mark.parametrize("warper", ["top_k", "top_p", "min_p", "all"])
def test_what_sampling_keeps_is_what_transformers_keeps(course: Any, warper: str) -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.tensor(2 * drawn(3, 4, 30), dtype=torch.float32)
    chosen = {
        "top_k": [transformers.TopKLogitsWarper(7)],
        "top_p": [transformers.TopPLogitsWarper(0.8)],
        "min_p": [transformers.MinPLogitsWarper(0.1)],
    }
    options: dict[str, Any] = {"top_k": 7, "top_p": 0.8, "min_p": 0.1}
    warpers = [*chosen["top_k"], *chosen["top_p"], *chosen["min_p"]] if warper == "all" else chosen[warper]
    expected = logits / 1.3
    for each in warpers:
        expected = each(None, expected)
    given = options if warper == "all" else {warper: options[warper]}
    got = course.sampler.distribution(course.tensors.tensor(logits.numpy()), 1.3, **given)
    np.testing.assert_allclose(course.tensors.array(got), torch.softmax(expected, -1).numpy(), atol=1e-6)


def test_draws_have_the_shares_of_the_distribution(course: Any) -> None:
    p = np.array([0.1, 0.0, 0.45, 0.25, 0.2])
    uniform = (np.arange(2000) + 0.5) / 2000
    got = course.sampler.draw(course.tensors.tensor(np.tile(p, (2000, 1))), course.tensors.tensor(uniform))
    np.testing.assert_allclose(np.bincount(course.tensors.array(got).astype(int), minlength=5) / 2000, p, atol=1e-3)
    sampler = course.sampler.make_sampler(0.0)
    assert list(course.tensors.array(sampler(course.tensors.tensor(drawn(1, 3, 9))))) == list(drawn(1, 3, 9).argmax(-1))


def test_a_sampler_gives_a_token_of_the_vocabulary_for_the_greatest_number_too(
    course: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Greatest:
        def __init__(self, seed: int) -> None:
            pass

        def random(self) -> float:
            return 1 - 2.0**-53

        def getrandbits(self, bits: int) -> int:
            return 2**bits - 1

    monkeypatch.setattr(course.sampler.random, "Random", Greatest)
    for seed in range(20):
        logits = drawn(seed, 50, 7)
        logits[:, -2:] = -200.0  # their probabilities are 0
        tokens = course.tensors.array(course.sampler.make_sampler(1.0)(course.tensors.tensor(logits)))
        np.testing.assert_array_equal(tokens, np.full(50, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_mlxs_own_format(course: Any, bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    w = drawn(1, 6, 128)
    got = course.quantize.quantize_weights(course.tensors.tensor(w), 32, bits)
    stored = course.tensors.array(got.weight).astype(np.uint8)
    scales, biases = (mx.array(course.tensors.array(x).astype(np.float32)) for x in (got.scales, got.biases))
    words = mx.array(np.ascontiguousarray(stored).view(np.uint32))
    expected = np.array(mx.dequantize(words, scales, biases, group_size=32, bits=bits))
    back = course.tensors.array(course.quantize.dequantize_weights(got))
    np.testing.assert_allclose(back, expected, atol=1e-6)
    steps = np.repeat(course.tensors.array(got.scales), 32, axis=1)
    assert (np.abs(back - w) <= 0.5001 * steps).all()
    x = drawn(2, 3, 128)
    product = np.array(mx.quantized_matmul(
        mx.array(x.astype(np.float32)), words, scales, biases, group_size=32, bits=bits
    ))  # fmt: skip
    ours = course.tensors.array(course.quantize.quantized_linear(course.tensors.tensor(x), got))
    np.testing.assert_allclose(ours, product, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_attention_is_pytorchs(course: Any, dtype: str) -> None:
    for (L, S), block, causal in itertools.product(((6, 6), (1, 9), (4, 33)), (1, 4, 8, 64), (False, True)):
        shapes = ((2, 3, L, 8), (2, 3, S, 8), (2, 3, S, 8))
        arrays, tensors = both(course, dtype, *(2 * drawn(seed, *shape) for seed, shape in enumerate(shapes)))
        got = course.flash_attention.flash_attention(*arrays, causal=causal, block_size=block)
        mask = torch.ones(L, S, dtype=torch.bool).tril(S - L) if causal else None
        assert_close(course, got, F.scaled_dot_product_attention(*tensors, mask), dtype)


def test_paged_attention_is_pytorchs_over_each_text(course: Any) -> None:
    """Texts of 5, 12 and 1 positions in pages of four, anywhere in a memory of nine."""
    key_pages, value_pages = drawn(1, 9, 2, 4, 8), drawn(2, 9, 2, 4, 8)
    table, lengths = np.array([[7, 2, -1], [0, 8, 3], [5, -1, -1]]), np.array([5, 12, 1])
    query = drawn(3, 3, 6, 1, 8)
    tensor, integers = course.tensors.tensor, course.tensors.integers
    got = course.paged_cache.paged_attention(
        tensor(query), tensor(key_pages), tensor(value_pages), integers(table), integers(lengths), 4
    )
    for text in range(3):
        pages = table[text][table[text] >= 0]
        key, value = (
            torch.tensor(memory[pages].swapaxes(0, 1).reshape(2, -1, 8)[:, : lengths[text]], dtype=torch.float32)
            for memory in (key_pages, value_pages)
        )
        expected = F.scaled_dot_product_attention(
            torch.tensor(query[text], dtype=torch.float32), key, value, enable_gqa=True
        )
        np.testing.assert_allclose(course.tensors.array(got)[text], expected.numpy(), atol=1e-5)


def test_accepted_and_replaced_guesses_are_distributed_as_the_large_models_own(course: Any) -> None:
    """Sums the probability of each first token over all guesses and a grid of numbers: it must be the large model's."""
    q, p = np.array([0.6, 0.3, 0.1, 0.0]), np.array([0.25, 0.25, 0.1, 0.4])
    tensor, shares, steps = course.tensors.tensor, np.zeros(4), (np.arange(20) + 0.5) / 20
    rows = tensor(np.stack((p, p)))
    for guess, first, last in itertools.product(range(3), steps, steps):
        tokens = course.speculative.accept_sampled([guess], tensor(q[None]), rows, tensor([first, last]))
        shares[tokens[0]] += q[guess] / 400
    np.testing.assert_allclose(shares, p, atol=0.03)


FAMILIES = ("llama", "qwen2", "qwen3")


def made(family: str, tied: bool, directory: Any) -> Any:
    """A tiny random model of transformers', saved as a checkpoint."""
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "initializer_range": 0.3, "head_dim": 8,
    }  # fmt: skip
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0 and norms at 1, where a mistake would not show
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_logits_of_transformers(course: Any, family: str, tmp_path: Any) -> None:
    reference = made(family, family == "qwen2", tmp_path)
    model = course.model.Model(*course.load.load(tmp_path))
    tokens = np.random.default_rng(0).integers(31, size=(2, 11))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits
    np.testing.assert_allclose(
        course.tensors.array(model(course.tensors.integers(tokens))), expected.numpy(), atol=2e-4, rtol=1e-3
    )
    caches = [course.kv_cache.KvCache() for _ in range(2)]
    parts = [model(course.tensors.integers(tokens[:, a:b]), caches) for a, b in ((0, 4), (4, 5), (5, 11))]
    found = np.concatenate([course.tensors.array(part) for part in parts], axis=1)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4, rtol=1e-3)


def test_every_way_of_writing_writes_what_transformers_does(course: Any, tmp_path: Any) -> None:
    """One by one, in batches, in pages, after a known beginning, and by guesses of another model: the same tokens."""
    reference = made("qwen3", True, tmp_path / "large")
    other = made("llama", True, tmp_path / "small")
    assert reference is not other
    prompts = [[1, 5, 2, 9, 10, 3, 7, 8, 4, 20], [4, 4], [8, 1, 6], [2]]
    expected = []
    for prompt in prompts:
        text = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                text = torch.cat((text, reference(text).logits[:, -1:].argmax(-1)), dim=1)
        expected.append(text[0, len(prompt) :].tolist())
    model, draft = (course.model.Model(*course.load.load(tmp_path / name)) for name in ("large", "small"))
    greedy, run = course.sampler.make_sampler(0.0), course.generate

    def caches() -> list[Any]:
        return [course.kv_cache.KvCache() for _ in range(2)]

    assert [run.simple_generate(model, prompt, greedy, 6) for prompt in prompts] == expected
    assert [run.generate(model, prompt, caches(), greedy, 6, chunk=4) for prompt in prompts] == expected
    speculated = [
        course.speculative.speculative_generate(model, draft, prompt, caches(), caches(), 6, 3) for prompt in prompts
    ]
    assert speculated == expected
    pool = course.paged_cache.PagePool(2, 40, 4, 2, 8)
    for new_caches in (caches, lambda: course.paged_cache.new_paged_caches(pool)):
        batcher = course.batch.Batcher(model, new_caches, greedy, 3, 4)
        requests = [batcher.add(prompt, 6) for prompt in prompts]
        batcher.run()
        assert [request.tokens for request in requests] == expected
    assert len(pool.free) < 40
    prefix = course.prefix_cache.PrefixCache(pool)
    first = requests[0].caches[0]
    prefix.insert([*prompts[0], *expected[0]][: first.offset], first.table.pages)
    pages = prefix.match(prompts[0])
    assert len(pages) == 2
    shared = course.paged_cache.new_paged_caches(pool, pages)
    assert run.generate(model, prompts[0][8:], shared, greedy, 6) == expected[0]
    for request in requests:
        request.caches[0].table.release()
    shared[0].table.release()
    assert len(pool.free) == 40 - len(prefix.pages) == 37
    assert prefix.evict(10) == 3
    assert sorted(pool.free) == list(range(40))


def test_a_pool_that_is_empty_says_so(course: Any) -> None:
    table = course.paged_cache.BlockTable(course.paged_cache.PagePool(1, 2, 4, 1, 2))
    with pytest.raises(ValueError, match="all 2 pages are in use"):
        table.reserve(9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3'; choose one of llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary positions are stretched"),
        ({"use_sliding_window": True}, "no sliding window"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    course: Any, changes: dict[str, Any], message: str, tmp_path: Any
) -> None:
    values = {
        "model_type": "qwen2", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    with pytest.raises(ValueError, match=message):
        course.config.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = course.config.read_config(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.rope_theta) == (4, 2, 10000.0)
    with pytest.raises(ValueError, match=r"has no model\.safetensors; expected a Hugging Face model directory"):
        course.load.load(tmp_path)
