"""Every operation of a Llama, of both backends, beside PyTorch's own operator on the CPU: values, not shapes.

    pytest tests/course                       all of it, in under a minute
    pytest tests/course -k "rms_norm"         one operation
    pytest tests/course -k "torch and fp32"   one backend, one precision

Inputs are rounded to the precision first; PyTorch's operator then computes in float64, so that what differs is our own
rounding. tests/backend/tolerances.py says how much of that there may be. MLX's tests are left out where it is not
installed.
"""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llamita.backend.interface import CacheLayout, Plan, SampleSpec, ScheduledChunk, Target
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.train.adamw import AdamWSettings
from llamita.model.config import ModelConfig
from llamita.model.parameters import parameter_table
from tests.backend.frameworks import PRECISIONS, host, normal
from tests.backend.models import dequantized
from tests.backend.tolerances import BLOCK, OPERATION, assert_close

MODELS = [  # width 32: multi-head, grouped-query, multi-query; heads of 8 and of 16; tied and not
    ModelConfig(61, 32, 48, 1, 4, 4, 64),
    ModelConfig(61, 32, 80, 1, 4, 2, 64, tie_word_embeddings=True),
    ModelConfig(61, 32, 64, 1, 2, 1, 64, rope_theta=500.0),
]
HEADS = ["multi-head", "grouped-query", "multi-query"]


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return request.param


@pytest.fixture(params=["plain", "fused"])
def operations(request, framework):
    """The form of each operation that is to be read, or the one that runs."""
    return framework.layers.PLAIN if request.param == "plain" else framework.layers.FUSED


def wide(numbers):
    return torch.from_numpy(numbers).double()


# --- operations ---


@pytest.mark.parametrize("shape", [(5,), (3, 17), (2, 4, 1000)])
def test_softmax(framework, precision, shape):
    """Exponentials divided by their sum: scores become weights. Each is off by the error of the largest score's
    exponential, hence the maximum is subtracted first (Goodfellow et al. 2016, section 4.1)."""
    x = normal(*shape, precision=precision, scale=3)
    found = framework.attention.softmax(framework.array(x, precision))
    assert_close(framework.numbers(found), wide(x).softmax(-1).numpy(), OPERATION[precision])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 5), (7, 64, 48), (33, 96, 130)])
def test_linear(framework, operations, precision, shape, bias):
    """y = x W^T + b: every projection of the model, its rows the outputs and its columns the inputs."""
    rows, n_in, n_out = shape
    x, weight = normal(rows, n_in, precision=precision), normal(n_out, n_in, precision=precision, seed=1)
    b = normal(n_out, precision=precision, seed=2) if bias else None
    given = [None if each is None else framework.array(each, precision) for each in (x, weight, b)]
    expected = F.linear(wide(x), wide(weight), None if b is None else wide(b))
    assert_close(framework.numbers(operations.linear(*given)), expected.numpy(), OPERATION[precision])


@pytest.mark.parametrize("shape", [(7,), (3, 129)])
def test_silu(framework, precision, shape):
    """x times its logistic sigmoid, a smooth relative of the rectifier (Elfwing et al. 2017, arXiv:1702.03118)."""
    x = normal(*shape, precision=precision, scale=4)
    found = framework.layers.silu(framework.array(x, precision))
    assert_close(framework.numbers(found), F.silu(wide(x)).numpy(), OPERATION[precision])


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", [(1, 4), (5, 64), (2, 3, 288)])
def test_rms_norm(framework, operations, precision, shape, eps):
    """Each vector divided by its root mean square, then scaled by a learned weight: layer normalisation without its
    mean (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    x, weight = normal(*shape, precision=precision), normal(shape[-1], precision=precision, seed=1)
    found = operations.rms_norm(framework.array(x, precision), framework.array(weight, precision), eps)
    expected = F.rms_norm(wide(x), (shape[-1],), wide(weight), eps)
    assert_close(framework.numbers(found), expected.numpy(), OPERATION[precision])


@pytest.mark.parametrize("config", MODELS, ids=HEADS)
def test_embedding(framework, precision, config):
    """A row of a table for each token. Nothing is computed, so nothing may differ, the rounding of the table apart."""
    arrays, tokens = weights_of(config, precision), tokens_of(2, 9)
    found = framework.build_model(config, arrays, precision).model.embed_tokens(framework.array(tokens))
    expected = F.embedding(torch.from_numpy(tokens), wide(arrays["model.embed_tokens.weight"]))
    assert_close(framework.numbers(found), expected.numpy(), 0)


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "size"), [(1, 2), (4, 8), (3, 64)])
@pytest.mark.parametrize("first", [0, 37, 2000])
def test_rope(framework, precision, layout, heads, size, first):
    """Pairs of numbers turned by an angle that grows with the position, so that scores depend on distances (Su et al.
    2021, arXiv:2104.09864). A pair is (i, i + H/2) in Hugging Face's layout and (2i, 2i + 1) in the paper's."""
    x = normal(2, 5, heads, size, precision=precision)
    positions, frequencies = np.arange(first, first + 5)[None], np.float32(10000.0) ** (-np.arange(0, size, 2) / size)
    frequencies = frequencies.astype(np.float32)
    cos, sin = framework.layers.rope_table(framework.array(positions), framework.array(frequencies))
    apply = framework.layers.apply_rope if layout == "halves" else framework.layers.apply_rope_interleaved
    found = framework.numbers(apply(framework.array(x, precision), cos, sin))
    # The angle is a float32 product in every library, and far along that is what rounds most: it is given as such.
    angles = torch.from_numpy(positions[..., None].astype(np.float32) * frequencies).double()[:, :, None]
    assert_close(found, turned(wide(x), angles, layout).numpy(), OPERATION[precision])


def turned(x, angles, layout):
    """Pairs as complex numbers, multiplied by e^(i angle)."""
    pairs = x.unflatten(-1, (2, -1)).transpose(-1, -2) if layout == "halves" else x.unflatten(-1, (-1, 2))
    rotated = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    real = torch.view_as_real(rotated)
    return (real.transpose(-1, -2) if layout == "halves" else real).flatten(-2)


@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 2), (4, 1)], ids=HEADS)
@pytest.mark.parametrize(("T", "S"), [(1, 1), (16, 16), (5, 40), (1, 70)])
@pytest.mark.parametrize("looks", ["everywhere", "back", "masked", "back and masked"])
def test_attention(framework, operations, precision, N, K, T, S, looks):
    """softmax(Q K^T / sqrt(H)) V (Vaswani et al. 2017, arXiv:1706.03762), a group of query heads to each key/value head
    (Ainslie et al. 2023, arXiv:2305.13245). Looking back, a query sees the keys up to its own position."""
    query = normal(2, N, T, 16, precision=precision)
    key, value = (normal(2, K, S, 16, precision=precision, seed=seed) for seed in (1, 2))
    causal = looks.startswith("back")
    mask = np.random.default_rng(3).random((2, 1, T, S)) < 0.6 if "masked" in looks else None
    if mask is not None:
        mask[..., 0] = True  # a query that sees nothing has no answer
    given = [framework.array(each, precision) for each in (query, key, value)]
    found = operations.attention(*given, None if mask is None else framework.array(mask), causal)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else torch.ones(T, S, dtype=torch.bool)
    seen = seen if mask is None else seen & torch.from_numpy(mask)
    expected = F.scaled_dot_product_attention(*map(wide, (query, key, value)), attn_mask=seen, enable_gqa=True)
    assert_close(framework.numbers(found), expected.numpy(), OPERATION[precision])


# --- parts of a model ---


def weights_of(config, precision, seed=0):
    """The arrays of a model with random weights, as numbers of the precision."""
    rows = parameter_table(config)
    spread = {2: lambda shape: shape[-1] ** -0.5, 1: lambda shape: 1.0}
    return {
        row.name: normal(*row.shape, precision=precision, seed=seed + i, scale=spread[len(row.shape)](row.shape))
        for i, row in enumerate(rows)
    }


def tokens_of(rows, length, vocabulary=61):
    return np.random.default_rng(7).integers(0, vocabulary, (rows, length))


@pytest.mark.parametrize("config", MODELS, ids=HEADS)
@pytest.mark.parametrize("rows", [1, 12])
def test_feed_forward(framework, precision, config, rows):
    """SwiGLU: one projection, through SiLU, gates another, and a third leads back (Shazeer 2020, arXiv:2002.05202)."""
    arrays, x = weights_of(config, precision), normal(1, rows, config.hidden_size, precision=precision, seed=50)
    found = framework.build_model(config, arrays, precision).model.layers[0].mlp(framework.array(x, precision))
    assert_close(framework.numbers(found), feed_forward(wide(x), arrays, 0).numpy(), BLOCK[precision])


def feed_forward(x, arrays, layer):
    gate, up, down = (wide(arrays[f"model.layers.{layer}.mlp.{name}_proj.weight"]) for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def block(x, arrays, config, layer=0):
    """One block of a Llama from PyTorch's operators, in float64: x (B, T, D)."""
    of = {name: wide(arrays[f"model.layers.{layer}.{name}.weight"]) for name in (
        "input_layernorm", "post_attention_layernorm", *(f"self_attn.{p}_proj" for p in "qkvo"))}  # fmt: skip
    B, T, D = x.shape
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, H, 2).double() / H)
    angles = (torch.arange(T).double()[:, None] * frequencies)[None, :, None]
    normed = F.rms_norm(x, (D,), of["input_layernorm"], config.rms_norm_eps)
    q, k, v = (
        F.linear(normed, of[f"self_attn.{p}_proj"]).view(B, T, heads, H) for p, heads in (("q", N), ("k", K), ("v", K))
    )
    q, k = turned(q, angles, "halves"), turned(k, angles, "halves")
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(mixed.transpose(1, 2).reshape(B, T, N * H), of["self_attn.o_proj"])
    normed = F.rms_norm(x, (D,), of["post_attention_layernorm"], config.rms_norm_eps)
    return x + feed_forward(normed, arrays, layer)


def logits(tokens, arrays, config):
    """A whole Llama from PyTorch's operators, in float64: tokens (B, T) to logits (B, T, V)."""
    x = F.embedding(torch.from_numpy(tokens), wide(arrays["model.embed_tokens.weight"]))
    for layer in range(config.num_hidden_layers):
        x = block(x, arrays, config, layer)
    x = F.rms_norm(x, (config.hidden_size,), wide(arrays["model.norm.weight"]), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return F.linear(x, wide(arrays[head]))


@pytest.mark.parametrize("config", MODELS, ids=HEADS)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_block(framework, precision, config, length):
    """Norm, attention, addition; norm, feed-forward, addition: a block of Llama (Touvron et al. 2023,
    arXiv:2302.13971), here between the embedding and the next."""
    arrays, tokens = weights_of(config, precision), tokens_of(2, length)
    found = {}
    model = framework.build_model(config, arrays, precision)
    model(framework.array(tokens), trace=lambda name, x: found.update({name: x}))
    x = F.embedding(torch.from_numpy(tokens), wide(arrays["model.embed_tokens.weight"]))
    assert_close(framework.numbers(found["layers.0"]), block(x, arrays, config).numpy(), BLOCK[precision])


@pytest.mark.parametrize("config", MODELS, ids=HEADS)
@pytest.mark.parametrize("prompt", [1, 6, 19])
def test_decoding_with_a_cache(framework, precision, config, prompt):
    """Keys and values of earlier tokens are kept, so that a new token is one row of work instead of the whole text
    again. Its log-probabilities must be those of the whole text, which PyTorch's operators compute anew."""
    config = ModelConfig(**{**vars(config), "num_hidden_layers": 2})
    arrays, tokens = weights_of(config, precision), tokens_of(1, 20)[0]
    runner = framework.runner_over(config, arrays, precision)
    memory = runner.allocate(CacheLayout(8, 4, config.attention_windows))
    tables = tuple(np.array([2, 0, 3], dtype=np.int32) for _ in config.attention_windows)  # blocks lie anywhere
    steps = [(0, prompt), *((i, i + 1) for i in range(prompt, 19))]
    found = []
    for start, end in steps:
        parts = tuple(map(int, tokens[start:end])), start, tables
        followers = enumerate(map(int, tokens[start + 1 : end + 1]))
        chunk = ScheduledChunk(0, *parts, targets=tuple(Target(offset, token) for offset, token in followers))
        found += runner.run(Plan((chunk,)), memory).target_logprobs[0]
    expected = logits(tokens[None, :19], arrays, config).log_softmax(-1)[0]
    expected = expected.gather(-1, torch.from_numpy(tokens[1:20])[:, None])[:, 0]
    assert_close(np.array(found), expected.numpy(), BLOCK[precision])


# --- learning ---


@pytest.mark.parametrize("chunk", [0, 7, 1024])
@pytest.mark.parametrize("shape", [(1, 3), (2, 17)])
def test_cross_entropy(framework, precision, shape, chunk):
    """The sum of -log softmax(logits)[label], labels of -100 left out; in chunks, so that never all logits exist. Its
    gradients, which the chunked form takes by hand, are compared too."""
    D, V = 24, 61
    hidden, weight = normal(*shape, D, precision=precision), normal(V, D, precision=precision, seed=1, scale=0.3)
    labels = np.random.default_rng(2).integers(0, V, shape)
    labels[:, 0] = -100

    def loss(hidden, weight):
        if not chunk:
            return framework.losses.cross_entropy(framework.layers.linear(hidden, weight), framework.array(labels))
        return framework.losses.chunked_cross_entropy(
            hidden, framework.head.OutputHead(weight), framework.array(labels), chunk
        )

    given = framework.array(hidden, precision), framework.array(weight, precision)
    leaves = wide(hidden).requires_grad_(), wide(weight).requires_grad_()
    flat = F.linear(*leaves).flatten(0, 1), torch.from_numpy(labels).flatten()
    expected = F.cross_entropy(*flat, ignore_index=-100, reduction="sum")
    expected.backward()
    assert_close(framework.numbers(loss(*given)), expected.detach().numpy(), OPERATION[precision])
    for found, leaf in zip(framework.gradients(loss, *given), leaves, strict=True):
        assert_close(framework.numbers(found), leaf.grad.numpy(), BLOCK[precision])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (64, 48)])
def test_adamw_step(framework, weight_decay, shape):
    """The mean gradient over the root of the mean squared gradient, both running means, and weights that decay apart
    from it (Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101). Both forms, five steps."""
    values, rates = normal(*shape), [1e-3, 1e-2, 1e-3, 5e-3, 2e-3]
    settings = AdamWSettings(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=weight_decay)
    theirs = torch.nn.Parameter(wide(values))
    reference = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizer = framework.optimizer([values], [True], settings)
    plain = [framework.array(each) for each in (values, np.zeros_like(values), np.zeros_like(values))]
    update = framework.adamw.adamw_update
    for t, rate in enumerate(rates, 1):
        gradient = normal(*shape, seed=t, scale=0.1)
        theirs.grad = wide(gradient)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        optimizer.step([gradient], rate)
        plain = update(plain[0], framework.array(gradient), *plain[1:], t, rate, settings) or plain  # in place, or new
        assert_close(optimizer.values()[0], theirs.detach().numpy(), OPERATION["fp32"])
        assert_close(framework.numbers(plain[0]), theirs.detach().numpy(), OPERATION["fp32"])


# --- choosing a token ---


def draw(framework, row, params, count):
    """So many draws from one row of logits, each with a seed of its own."""
    sampler = framework.sampling.Sampler(len(row))
    specs = [SampleSpec(params, seed, 5) for seed in range(count)]
    return sampler.sample(framework.array(np.tile(row, (count, 1))), specs, list(range(count)))


@pytest.mark.parametrize("size", [2, 61, 1000])
def test_greedy(framework, size):
    """At temperature 0, the token of the largest logit. Beside it come the log-probabilities of the likeliest, the
    logarithms of the softmax."""
    for seed in range(5):
        row = normal(size, seed=seed, scale=2)
        found = draw(framework, row, SamplingParams(temperature=0, top_logprobs=min(size, 50)), 1)[0]
        values, ids = wide(row).log_softmax(-1).topk(min(size, 50))
        assert found.token_id == ids[0]
        assert [token for token, _ in found.top] == ids.tolist()
        assert_close(np.array([logprob for _, logprob in found.top]), values.numpy(), OPERATION["fp32"])


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), lambda p: torch.ones_like(p, dtype=torch.bool)),
        (SamplingParams(temperature=0.6), lambda p: torch.ones_like(p, dtype=torch.bool)),
        (SamplingParams(top_k=5), lambda p: p >= p.topk(5).values[-1]),
        (SamplingParams(top_p=0.7), lambda p: nucleus(p, 0.7)),
        (SamplingParams(temperature=1.5, top_k=8, top_p=0.9), lambda p: nucleus(p * (p >= p.topk(8).values[-1]), 0.9)),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "all"],
)
def test_sampling(framework, params, kept):
    """softmax(logits / temperature) over the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833), or the fewest that
    have a mass of p together (Holtzman et al. 2019, arXiv:1904.09751). 4,000 draws: none outside, and the shares of the
    tokens inside within five standard deviations of PyTorch's softmax."""
    count, row = 4000, normal(30, seed=4, scale=1.5)
    probabilities = (wide(row) / params.temperature).softmax(-1)
    probabilities = probabilities * kept(probabilities)
    probabilities = (probabilities / probabilities.sum()).numpy()
    drawn = draw(framework, row, params, count)
    shares = Counter(token.token_id for token in drawn)
    own = wide(row).log_softmax(-1).numpy()
    for token, p in enumerate(probabilities):
        assert abs(shares[token] / count - p) <= 5 * np.sqrt(p * (1 - p) / count), f"token {token}, probability {p:.4f}"
    assert_close(np.array([t.logprob for t in drawn]), own[[t.token_id for t in drawn]], OPERATION["fp32"])


def nucleus(p, mass):
    """Tokens, the likeliest first, until they have the mass."""
    p = p / p.sum()
    values, order = p.sort(descending=True)
    return torch.zeros_like(p, dtype=torch.bool).scatter(0, order, values.cumsum(0) - values < mass)


# --- smaller weights ---


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 20])
def test_quantised_product(framework, scheme, precision, rows):
    """Weights as small whole numbers times a scale, a scale a row (int8) or for 32 numbers (int4): the product is that
    with the numbers that they stand for. One row takes a kernel of its own where there is one."""
    config = ModelConfig(64, 64, 96, 1, 4, 2, 64, quantization=scheme)
    plain = ModelConfig(64, 64, 96, 1, 4, 2, 64)
    stored, meant = quantised(config, weights_of(plain, "bf16"))
    runner = framework.runner_over(config, stored, precision)
    tokens = tokens_of(1, rows)
    found = runner.forward(tokens)["logits"]
    assert_close(found, logits(tokens, meant, plain).numpy(), BLOCK[precision])


def quantised(config, arrays):
    """(the arrays as they are stored, the numbers that these stand for)"""
    from llamita.backend.torch.model.weights import quantize_arrays

    stored = dict(quantize_arrays(config, host(arrays).items()))
    return stored, dequantized(stored)
