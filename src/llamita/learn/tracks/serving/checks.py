"""The checks of the serving track: each runs one function of the reader's on fixed inputs, and so the solution's.

`mine` holds the modules under judgement by their names (`mine.attention`), `right` those of the solutions. What a
function calls is taken from `right`, so that a mistake shows where it is made and nowhere else. Everything is written
once: `tensors` turns numpy's numbers into those of the reader's framework, and back.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from tensors import array, dtype, dtype_of, integers, tensor

from llamita.learn.checking import Check, Outputs, difference

SIZES = {
    "vocab_size": 13,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 0.1,
    "rope_theta": 100.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
PROMPT = [1, 5, 2, 9, 10, 3, 7]
HIDDEN = -np.inf


# Attention and what it stands on


def softmax(mine: Any, right: Any) -> Outputs:
    x = numbers(1, 2, 3, 5)
    partly = x.copy()
    partly[:, :, 2:4] = HIDDEN
    run = mine.basics.softmax
    return {
        "result (along axis -1)": array(run(tensor(x), -1)),
        "result (along axis 1)": array(run(tensor(x), 1)),
        "result (along axis 0)": array(run(tensor(x), 0)),
        "result (of numbers near 1000)": array(run(tensor(x + 1000), -1)),
        "result (of numbers near -1000)": array(run(tensor(x - 1000), -1)),
        "result (with minus infinity)": array(run(tensor(partly), -1)),
        "sum of the result (70000 zeros in float16)": array(run(tensor(np.zeros(70000), "float16"), 0)).sum(),
        **bits_of(run(tensor(x, "float16"), -1)),
    }


def linear(mine: Any, right: Any) -> Outputs:
    x, w, bias = tensor(numbers(1, 2, 3, 4)), tensor(numbers(2, 5, 4)), tensor(numbers(3, 5))
    square = tensor(numbers(4, 4, 4))
    return {
        "result": array(mine.basics.linear(x, w)),
        "result (with a bias)": array(mine.basics.linear(x, w, bias)),
        "result (with square weights)": array(mine.basics.linear(x, square)),
        "result (of a vector)": array(mine.basics.linear(x[0, 0], w, bias)),
    }


def silu(mine: Any, right: Any) -> Outputs:
    x = np.concatenate([3 * numbers(1, 7), [0.0, 100.0, -100.0, 30.0]])
    run = mine.basics.silu
    return {"result": array(run(tensor(x))), **bits_of(run(tensor(x, "float16")))}


def attention_simple(mine: Any, right: Any) -> Outputs:
    run = mine.attention.scaled_dot_product_attention_simple
    query, key, value = (tensor(numbers(1, 2, 3, 4, 6)), tensor(numbers(2, 2, 3, 5, 6)), tensor(numbers(3, 2, 3, 5, 6)))
    hidden = np.zeros((4, 5))
    hidden[0, 1:] = hidden[1, 4] = HIDDEN
    return {
        "result": array(run(query, key, value)),
        "result (with scale 0.7)": array(run(query, key, value, scale=0.7)),
        "result (with a mask)": array(run(query, key, value, mask=tensor(numbers(4, 2, 1, 4, 5)))),
        "result (with scale 0.7 and a mask)": array(run(query, key, value, 0.7, tensor(numbers(4, 2, 1, 4, 5)))),
        "result (with hidden keys)": array(run(query, key, value, mask=tensor(hidden))),
        "result (without batch axes)": array(run(query[0], key[0], value[0])),
        "result (with two batch axes)": array(run(query[None], key[None], value[None])),
    }


def multi_head(mine: Any, right: Any) -> Outputs:
    mine.attention.scaled_dot_product_attention_simple = right.attention.scaled_dot_product_attention_simple
    weights = [tensor(0.4 * numbers(seed, 12, 12)) for seed in (1, 2, 3, 4)]
    attention = mine.attention.SimpleMultiHeadAttention(12, 3, *weights)
    query, key, value = (tensor(numbers(seed, 2, 5, 12)) for seed in (5, 6, 7))
    mask = tensor(numbers(8, 2, 3, 5, 5))
    return {
        "result": array(attention(query, key, value)),
        "result (with a mask)": array(attention(query, key, value, mask)),
    }


def causal(mine: Any, right: Any) -> Outputs:
    run = mine.attention.causal_mask
    return {
        "result (for L = S = 4)": array(run(4, 4, dtype("float32"))),
        "result (for L = 3 and S = 7)": array(run(3, 7, dtype("float32"))),
        "result (for L = 1 and S = 5)": array(run(1, 5, dtype("float32"))),
        **bits_of(run(2, 3, dtype("float16"))),
    }


def attention_grouped(mine: Any, right: Any) -> Outputs:
    mine.attention.scaled_dot_product_attention_simple = right.attention.scaled_dot_product_attention_simple
    mine.attention.causal_mask = right.attention.causal_mask
    run = mine.attention.scaled_dot_product_attention_grouped
    query, key, value = (tensor(numbers(1, 2, 6, 3, 4)), tensor(numbers(2, 2, 2, 5, 4)), tensor(numbers(3, 2, 2, 5, 4)))
    return {
        "result": array(run(query, key, value)),
        "result (with scale 0.7)": array(run(query, key, value, scale=0.7)),
        "result (with a mask for each head)": array(run(query, key, value, mask=tensor(numbers(4, 2, 6, 3, 5)))),
        "result (with a mask for each row)": array(run(query, key, value, mask=tensor(numbers(5, 2, 1, 3, 5)))),
        "result (with the causal mask)": array(run(query, key, value, mask="causal")),
        "result (with scale 0.7 and the causal mask)": array(run(query, key, value, 0.7, "causal")),
        "result (with one head of keys)": array(run(query, key[:, :1], value[:, :1], mask="causal")),
        "result (without batch axes)": array(run(query[0], key[0], value[0], mask="causal")),
    }


def rotary(mine: Any, right: Any) -> Outputs:
    RoPE = mine.positional_encoding.RoPE
    x = tensor(numbers(1, 2, 5, 3, 8))
    halves, neighbours = RoPE(8, 40), RoPE(8, 40, traditional=True)
    rows = [slice(2, 7), slice(9, 14)]
    return {
        "result (halves)": array(halves(x)),
        "result (neighbours)": array(neighbours(x)),
        "result (halves at positions 4 to 8)": array(halves(x, slice(4, 9))),
        "result (neighbours at positions 4 to 8)": array(neighbours(x, slice(4, 9))),
        "result (halves at positions of each row)": array(halves(x, rows)),
        "result (neighbours at positions of each row)": array(neighbours(x, rows)),
        "result (halves with base 50)": array(RoPE(8, 40, 50)(x)),
        **bits_of(halves(tensor(numbers(1, 1, 2, 1, 8), "float16"))),
    }


# The model


def norm(mine: Any, right: Any) -> Outputs:
    x, weight = numbers(1, 2, 5, 8), 1 + 0.5 * numbers(2, 8)
    run = mine.layers.RMSNorm(8, tensor(weight), eps=0.3)
    half = mine.layers.RMSNorm(8, tensor(weight, "float16"), eps=0.3)
    large = half(tensor(2000 * x, "float16"))
    return {
        "result": array(run(tensor(x))),
        "result (of a vector)": array(run(tensor(x[0, 0]))),
        "a 200th of the result of a float16 x near 2000": array(large) / 200,  # so small that rounding is no matter
        **bits_of(large),
    }


def mlp(mine: Any, right: Any) -> Outputs:
    gate, up, down = tensor(numbers(1, 7, 6)), tensor(numbers(2, 7, 6)), tensor(numbers(3, 6, 7))
    return {"result": array(mine.layers.MLP(6, 7, gate, up, down)(tensor(numbers(4, 2, 3, 6))))}


def embedding(mine: Any, right: Any) -> Outputs:
    made = mine.layers.Embedding(7, 4, tensor(numbers(1, 7, 4)))
    return {"result": array(made(integers([[3, 0, 6], [1, 1, 5]])))}


def unembedding(mine: Any, right: Any) -> Outputs:
    made = mine.layers.Embedding(7, 4, tensor(numbers(1, 7, 4)))
    return {"result": array(made.as_linear(tensor(numbers(2, 2, 3, 4))))}


def model_attention(mine: Any, right: Any) -> Outputs:
    x = tensor(numbers(1, 2, 3, 24))
    llama, biased, qwen2, qwen3 = (
        mine.model.Attention(config_of(mine), weights_of(kind), "model.layers.0.self_attn.")
        for kind in ("llama", "biased", "qwen2", "qwen3")
    )
    caches = right.batch.BatchKvCache([begun_cache(right, 1, 4), begun_cache(right, 1, 2)])
    return {
        "result (of a Llama)": array(llama(x, mine.model.NoCache())),
        "result (of a Llama, after 4 positions in a cache)": array(llama(x, begun_cache(right, 2, 4))),
        "result (of a Llama, after 4 and 2 positions in a batch)": array(llama(x, caches)),
        "result (of a Llama with four biases)": array(biased(x, mine.model.NoCache())),
        "result (of a Qwen2)": array(qwen2(x, mine.model.NoCache())),
        "result (of a Qwen3 (norms), after 4 positions in a cache)": array(qwen3(x, begun_cache(right, 2, 4))),
    }


def block(mine: Any, right: Any) -> Outputs:
    weights = weights_of("llama")
    made = mine.model.TransformerBlock(config_of(mine), weights, "model.layers.0.")
    parts = right.model.TransformerBlock(config_of(right), weights, "model.layers.0.")
    for name in ("input_norm", "attention", "post_attention_norm", "mlp"):
        setattr(made, name, getattr(parts, name))
    x = tensor(numbers(1, 2, 3, 24))
    return {
        "result": array(made(x, right.model.NoCache())),
        "result (after 4 positions in a cache)": array(made(x, begun_cache(right, 2, 4))),
    }


def whole_model(mine: Any, right: Any) -> Outputs:
    found: dict[str, np.ndarray] = {}
    tokens = integers([[1, 5, 2, 9], [3, 3, 0, 12]])
    for name, tied in (("tied", True), ("with an lm_head", False)):
        model = mine.model.Model(config_of(mine, tie_word_embeddings=tied), weights_of("llama", tied))
        model.blocks = right.model.Model(config_of(right), weights_of("llama")).blocks
        found[f"logits ({name})"] = array(model(tokens))
    model = mine.model.Model(config_of(mine), weights_of("llama"))
    model.blocks = right.model.Model(config_of(right), weights_of("llama")).blocks
    caches = [begun_cache(right, 2, 4, seed) for seed in (1, 2)]
    found["logits (after 4 positions in the caches)"] = array(model(tokens, caches))
    return found


def everything(mine: Any, right: Any) -> Outputs:
    tokens = integers([[1, 5, 2, 9, 10], [3, 3, 0, 12, 4]])
    return {
        f"logits ({name})": array(mine.model.Model(config_of(mine), weights_of(kind))(tokens))
        for name, kind in (("a Llama", "llama"), ("a Qwen2", "qwen2"), ("a Qwen3", "qwen3"))
    }


# Writing


def distribution(mine: Any, right: Any) -> Outputs:
    logits = tensor(2 * numbers(1, 3, 9))
    run = mine.sampler.distribution
    return {
        "result (at temp 1)": array(run(logits, 1.0)),
        "result (at temp 0.5)": array(run(logits, 0.5)),
        "result (with top_k 3)": array(run(logits, 1.0, top_k=3)),
        "result (with top_k 20)": array(run(logits, 1.0, top_k=20)),
        "result (with top_p 0.7)": array(run(logits, 1.0, top_p=0.7)),
        "result (with top_p 0.05)": array(run(logits, 1.0, top_p=0.05)),
        "result (with min_p 0.2)": array(run(logits, 1.0, min_p=0.2)),
        "result (with top_k 4 and top_p 0.85)": array(run(logits, 1.0, top_k=4, top_p=0.85)),
        "result (at temp 2 with top_k 6, top_p 0.9 and min_p 0.3)": array(run(logits, 2.0, 6, 0.9, 0.3)),
    }


def drawn(mine: Any, right: Any) -> Outputs:
    uniform = np.array([0.0, 0.1, 0.3, 0.55, 0.75, 0.999])
    rows = np.array([[0.0, 0.25, 0.25, 0.0, 0.5, 0.0], [0.5, 0.125, 0.125, 0.125, 0.125, 0.0]])
    return {
        f"tokens (from row {number})": array(mine.sampler.draw(tensor(np.tile(row, (6, 1))), tensor(uniform)))
        for number, row in enumerate(rows)
    }


def cache_update(mine: Any, right: Any) -> Outputs:
    cache, found = mine.kv_cache.KvCache(), {}
    for number, length in enumerate((3, 1, 2)):
        key, value, mask = cache.update_and_fetch(*(tensor(numbers(10 * number + n, 2, 3, length, 4)) for n in (0, 1)))
        found[f"keys (call {number + 1})"] = array(key)
        found[f"values (call {number + 1})"] = array(value)
        found[f"offset (call {number + 1})"] = np.array(cache.offset)
    found["whether the mask is causal"] = np.array(int(isinstance(mask, str) and mask == "causal"))
    return found


def cache_rewind(mine: Any, right: Any) -> Outputs:
    """Judges rewind and update_and_fetch together; where that is wrong, rewind with the solution's update_and_fetch."""
    own = mine.kv_cache.KvCache
    mixed = type("KvCache", (own,), {"update_and_fetch": right.kv_cache.KvCache.update_and_fetch})
    expected = rewound(right.kv_cache.KvCache)
    if fits(lambda: rewound(own), expected):
        return expected
    return rewound(mixed)


def rewound(KvCache: Any) -> Outputs:
    found = {}
    for n in (0, 2, 5):
        cache = KvCache()
        cache.update_and_fetch(tensor(numbers(1, 1, 2, 5, 4)), tensor(numbers(2, 1, 2, 5, 4)))
        cache.rewind(n)
        found[f"offset (after rewind({n}))"] = np.array(cache.offset)
        for number, length in enumerate((1, 2)):
            new = (tensor(numbers(10 * number + seed, 1, 2, length, 4)) for seed in (3, 4))
            key, value, _ = cache.update_and_fetch(*new)
            found[f"keys (after rewind({n}) and {number + 1} calls)"] = array(key)
            found[f"values (after rewind({n}) and {number + 1} calls)"] = array(value)
    return found


def prefill(mine: Any, right: Any) -> Outputs:
    found = {}
    for chunk in (3, 7, 100):
        model, caches = Recorded(right), caches_of(right)
        found[f"logits (chunks of {chunk})"] = array(mine.generate.prefill(model, PROMPT, caches, chunk))
        found[f"rows and tokens of each call (chunks of {chunk})"] = model.shapes()
        found[f"positions in the caches (chunks of {chunk})"] = np.array([cache.offset for cache in caches])
    return found


def generated(mine: Any, right: Any) -> Outputs:
    mine.generate.prefill = right.generate.prefill
    greedy, run, found = right.sampler.make_sampler(0.0), mine.generate.generate, {}
    tokens = run(Recorded(right), PROMPT, caches_of(right), greedy, 8, (), 3)
    found["tokens"] = whole(tokens)
    found["tokens (the third one ends the text)"] = whole(
        run(Recorded(right), PROMPT, caches_of(right), greedy, 8, {int(fixed_tokens(right)[2])}, 3)
    )
    found["tokens (max_tokens 1)"] = whole(run(Recorded(right), PROMPT, caches_of(right), greedy, 1))
    model = Recorded(right)
    run(model, PROMPT, caches_of(right), greedy, 4, (), 5)
    found["rows and tokens of the first five calls"] = model.shapes()[:5]
    return found


# Less memory


def quantized(mine: Any, right: Any) -> Outputs:
    w = numbers(1, 3, 16)
    w[1, 8:] = 0.75
    halves = np.array([[0.0, 0.5, 1.5, 2.5, 4.5, 6.5, 15.0, 255.0]])
    found = {}
    for bits in (4, 8):
        result = mine.quantize.quantize_weights(tensor(w), 8, bits)
        found[f"weight ({bits} bits)"] = array(result.weight)
        found[f"scales ({bits} bits)"] = array(result.scales)
        found[f"biases ({bits} bits)"] = array(result.biases)
        halves[0, -1] = 2**bits - 1  # so that the scale is 1
        found[f"weight (halves, {bits} bits)"] = array(mine.quantize.quantize_weights(tensor(halves), 8, bits).weight)
    return found


def quantized_weights(right: Any, bits: int) -> Any:
    rng = np.random.default_rng(bits)
    q = integers(rng.integers(256, size=(5, 16 * bits // 8)), "uint8")
    scales, biases = tensor(0.1 + rng.random((5, 4))), tensor(rng.normal(size=(5, 4)))
    return right.quantize.QuantizedWeights(q, scales, biases, 4, bits)


def dequantized(mine: Any, right: Any) -> Outputs:
    return {
        f"weights ({bits} bits)": array(mine.quantize.dequantize_weights(quantized_weights(right, bits)))
        for bits in (4, 8)
    }


def quantized_product(mine: Any, right: Any) -> Outputs:
    mine.quantize.dequantize_weights = right.quantize.dequantize_weights
    run, x, bias = mine.quantize.quantized_linear, 0.1 * numbers(1, 2, 3, 16), tensor(numbers(2, 5))
    return {
        "result (with 4 bits)": array(run(tensor(x), quantized_weights(right, 4))),
        "result (with 8 bits and a bias)": array(run(tensor(x), quantized_weights(right, 8), bias)),
        **bits_of(run(tensor(x, "float16"), quantized_weights(right, 4))),
    }


def merged(mine: Any, right: Any) -> Outputs:
    scores = [20 * numbers(seed, 2, 4, 3) for seed in (1, 2, 3)]
    scores[0][:, 0, 1:] = scores[1][:, 0] = scores[1][:, 1, 0] = HIDDEN
    scores[2] += 150
    begin = (np.full((2, 4, 1), HIDDEN), np.zeros((2, 4, 1)), np.zeros((2, 4, 5)))
    state: Sequence[Any] = tuple(map(tensor, begin))
    found = {}
    for number, part in enumerate(scores, 1):
        state = mine.flash_attention.merge_block(*state, tensor(part), tensor(numbers(10 + number, 2, 3, 5)))
        for name, value in zip(("maximum", "total", "output"), state, strict=True):
            found[f"{name} (after block {number})"] = array(value)
    return found


def flash(mine: Any, right: Any) -> Outputs:
    mine.flash_attention.merge_block = right.flash_attention.merge_block
    run = mine.flash_attention.flash_attention
    query, key, value = (tensor(numbers(seed, 2, 3, length, 6)) for seed, length in ((1, 4), (2, 10), (3, 10)))
    half = tensor(numbers(1, 2, 3, 4), "float16")
    return {
        "result (with blocks of 4)": array(run(query, key, value, block_size=4)),
        "result (with one block)": array(run(query, key, value)),
        "result (with scale 0.9)": array(run(query, key, value, 0.9, block_size=5)),
        "result (causal, with blocks of 4)": array(run(query, key, value, causal=True, block_size=4)),
        "result (causal, with blocks of 1)": array(run(query, key, value, causal=True, block_size=1)),
        "result (causal, with L = S)": array(run(query, key[:, :, :4], value[:, :, :4], causal=True, block_size=3)),
        **bits_of(run(half, half, half)),
    }


# Serving


def batch_update(mine: Any, right: Any) -> Outputs:
    found = {}
    for L in (1, 2):
        caches = [begun_cache(right, 1, length, length) for length in (2, 5)] + [right.kv_cache.KvCache()]
        key, value = tensor(numbers(1, 3, 2, L, 6)), tensor(numbers(2, 3, 2, L, 6))
        keys, values, mask = mine.batch.BatchKvCache(caches).update_and_fetch(key, value)
        found[f"keys (L = {L})"] = array(keys)
        found[f"values (L = {L})"] = array(values)
        found[f"mask (L = {L})"] = array(mask)
        found[f"offsets (L = {L})"] = np.array([cache.offset for cache in caches])
    return found


def batched(mine: Any, right: Any) -> Outputs:
    mine.batch.BatchKvCache = right.batch.BatchKvCache
    found = {}
    for name, eos_ids in (("", set()), (" (a token ends texts)", {int(fixed_tokens(right)[2])})):
        model = Recorded(right)
        batcher = mine.batch.Batcher(
            model, lambda: caches_of(right), right.sampler.make_sampler(0.0), batch_size=2, chunk=4, eos_ids=eos_ids
        )
        requests = [batcher.add(prompt, n) for prompt, n in ((PROMPT, 6), ([4, 4], 2), ([8, 1, 6], 5), ([2], 1))]
        order: list[int] = []
        for step in range(1, 40):
            order += [10 * step + requests.index(request) for request in batcher.step()]
            if not batcher.waiting and not batcher.running:
                break
        for number, request in enumerate(requests):
            found[f"tokens of request {number}{name}"] = whole(request.tokens)
        found[f"10 * step + number of each request that finishes{name}"] = whole(order)
        found[f"rows and tokens of each call{name}"] = model.shapes()
    return found


def reserved(mine: Any, right: Any) -> Outputs:
    pool = right.paged_cache.PagePool(1, 60, 3, 1, 2)
    pool.free = [3, 0, 4, 1, *range(5, 60)]
    table = mine.paged_cache.BlockTable(pool, [2])
    found = {}
    for length in (3, 4, 7, 7, 9, 20):
        table.reserve(length)
        found[f"pages (after call {len(found) + 1}, reserve({length}))"] = whole(table.pages)
    return found


def paged_update(mine: Any, right: Any) -> Outputs:
    mine.paged_cache.PagedKvCache.fetched = right.paged_cache.PagedKvCache.fetched
    pool = small_pool(right)
    table, found = right.paged_cache.BlockTable(pool), {}
    cache = mine.paged_cache.PagedKvCache(table, 1)
    for number, length in enumerate((4, 1, 3)):
        new = [tensor(numbers(10 * number + n, 1, 2, length, 4)) for n in (0, 1)]
        key, value, mask = cache.update_and_fetch(*new)
        found[f"keys (call {number + 1})"] = array(key)
        found[f"values (call {number + 1})"] = array(value)
        found[f"offset (call {number + 1})"] = np.array(cache.offset)
    found["pages"] = whole(table.pages)
    for layer in (1, 0):
        found[f"memory of keys (layer {layer})"] = array(pool.keys[layer])
        found[f"memory of values (layer {layer})"] = array(pool.values[layer])
    found["whether the mask is causal"] = np.array(int(isinstance(mask, str) and mask == "causal"))
    return found


def paged_fetch(mine: Any, right: Any) -> Outputs:
    table = right.paged_cache.BlockTable(small_pool(right), [3, 0, 4])
    memory = tensor(numbers(1, 5, 2, 3, 4))
    return {
        f"result ({offset} positions)": array(mine.paged_cache.PagedKvCache(table, 0, offset).fetched(memory))
        for offset in (8, 9, 7)
    }


def paged_product(mine: Any, right: Any) -> Outputs:
    key_pages, value_pages = tensor(numbers(1, 6, 2, 3, 4)), tensor(numbers(2, 6, 2, 3, 4))
    table, lengths = integers([[4, 1, -1], [0, 5, 2], [3, -1, -1]]), integers([5, 9, 2])
    run, found = mine.paged_cache.paged_attention, {}
    for L in (1, 2):
        query = tensor(numbers(3, 3, 6, L, 4))
        found[f"result (L = {L})"] = array(run(query, key_pages, value_pages, table, lengths, 3))
    found["result (scale 0.9)"] = array(run(query, key_pages, value_pages, table, lengths, 3, 0.9))
    return found


def prefix_cache(PrefixCache: Any, known: Iterable[tuple[Sequence[int], int]]) -> Any:
    cache = PrefixCache(HoldersOnly([1] * 12, 2))
    cache.pages = {tuple(tokens): page for tokens, page in known}
    return cache


def prefix_match(mine: Any, right: Any) -> Outputs:
    return prefixes_judged(matched, mine, right)


def prefix_insert(mine: Any, right: Any) -> Outputs:
    return prefixes_judged(inserted, mine, right)


def prefix_evict(mine: Any, right: Any) -> Outputs:
    return prefixes_judged(evicted, mine, right)


def matched(PrefixCache: Any) -> Outputs:
    known = (([1, 2], 7), ([5, 6], 3), ([1, 2, 3, 4], 9), ([1, 2, 3, 4, 5, 6], 4), ([7, 8, 3, 4], 2))
    texts = ([1, 2, 3, 4, 5, 6, 9], [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 5, 6, 1], [5, 6], [5, 6, 3, 4, 5], [7, 8, 3, 4, 5])
    found = {}
    for text in texts:
        cache = prefix_cache(PrefixCache, known)
        found[f"pages (for {text})"] = whole(cache.match(text))
        found[f"pages in the order of use (after match({text}))"] = whole(cache.pages.values())
        found[f"holders of page (after match({text}))"] = whole(cache.pool.holders)
    return found


def inserted(PrefixCache: Any) -> Outputs:
    found = {}
    for text, pages in (([1, 2, 3, 4, 5], [7, 9, 4]), ([1, 2, 3, 4, 5, 6], [6, 8, 5]), ([9], [1])):
        cache = prefix_cache(PrefixCache, [([1, 2], 3), ([8, 8], 2)])
        cache.insert(text, pages)
        found[f"pages in the order of use (after insert({text}))"] = whole(cache.pages.values())
        found[f"tokens in each key in the order of use (after insert({text}))"] = whole(map(len, cache.pages))
        found[f"holders of page (after insert({text}))"] = whole(cache.pool.holders)
    return found


def evicted(PrefixCache: Any) -> Outputs:
    found = {}
    for count in (0, 1, 2, 5):
        cache = prefix_cache(PrefixCache, [([5, 6], 3), ([1, 2], 7), ([1, 2, 3, 4], 9), ([8, 8], 2)])
        cache.pool.holders[7] = 2
        found[f"result of evict({count})"] = np.array(cache.evict(count))
        found[f"pages left in the order of use (after evict({count}))"] = whole(cache.pages.values())
        found[f"holders of page (after evict({count}))"] = whole(cache.pool.holders)
    return found


def prefixes_judged(run: Callable[[Any], Outputs], mine: Any, right: Any) -> Outputs:
    """Judges one method on the solution's table; where the reader's has other keys, by what the three methods do."""
    own, solution = mine.prefix_cache.PrefixCache, right.prefix_cache.PrefixCache
    expected, together = run(solution), prefixes_used(solution)
    assert not expected.keys() & together.keys()
    if not has_other_keys(own):
        return {**run(own), **together}
    return {**expected, **(together if fits(lambda: run(own), expected) else prefixes_used(own))}


def has_other_keys(PrefixCache: Any) -> bool:
    """Whether `insert` keeps a text's pages under something else than all tokens up to their ends."""
    cache = PrefixCache(HoldersOnly([1] * 12, 2))
    try:
        cache.insert([1, 2, 3, 4], [7, 9])
        return not {(1, 2), (1, 2, 3, 4)}.issuperset(cache.pages)
    except Exception:
        return False


def prefixes_used(PrefixCache: Any) -> Outputs:
    """Results of match, insert and evict one after the other, without a look at the table."""
    found: dict[str, np.ndarray] = {}
    for renewed in (False, True):
        cache = PrefixCache(HoldersOnly([1] * 12, 2))
        when = "with match" if renewed else "without match"
        for text, pages in (
            ([1, 2, 3, 4, 5], [7, 9, 4]),
            ([8, 8, 3, 4], [2, 6]),
            ([1, 2, 3, 4, 5, 6], [10, 11, 5]),
            ([9], [1]),
        ):
            cache.insert(text, pages)
            found[f"holders of page (after insert({text}), {when})"] = whole(cache.pool.holders)
        for text in (
            ([1, 2, 3, 4, 5, 6], [8, 8, 3, 4, 5], [1, 2, 3, 4, 5, 6, 9], [3, 4, 5], [1, 2, 9, 9, 9], [8, 8])
            if renewed
            else ()
        ):
            found[f"pages (after inserts, for {text})"] = whole(cache.match(text))
            found[f"holders of page (after inserts and match({text}))"] = whole(cache.pool.holders)
        cache.pool.holders[:] = [1] * 12  # of all pages, the prefix cache alone has one
        cache.pool.holders[2] = 2
        for step, count in enumerate((0, 1, 1, 2, 5), 1):
            found[f"result of evict({count}) (step {step}, {when})"] = np.array(cache.evict(count))
            found[f"holders of page (after evict({count}), step {step}, {when})"] = whole(cache.pool.holders)
        found[f"pages (after evict, {when})"] = whole([*cache.match([8, 8, 3, 4, 5]), *cache.match([1, 2, 3])])
    return found


def greedy_acceptance(mine: Any, right: Any) -> Outputs:
    draft = [1, 2, 3]
    cases = ((draft, [1, 2, 3, 4]), (draft, [1, 5, 3, 4]), (draft, [7, 2, 3, 4]), ([4, 4], [4, 5, 6]), ([], [8]))
    return {
        f"tokens (draft {draft}, target {target})": whole(mine.speculative.accept_greedy(draft, target))
        for draft, target in cases
    }


def sampled_acceptance(mine: Any, right: Any) -> Outputs:
    q = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.5, 0.25, 0.125]])
    p = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.125, 0.25, 0.125], [0.125, 0.25, 0.125, 0.5]])
    cases = (
        ([0, 1], [0.4, 0.2, 0.9]),
        ([0, 1], [0.6, 0.2, 0.9]),
        ([0, 1], [0.45, 0.3, 0.2]),
        ([2, 2], [0.99, 0.99, 0.05]),
        ([3, 1], [0.9, 0.9, 0.6]),
        ([0, 0], [0.55, 0.1, 0.4]),
        ([0, 0], [0.1, 0.9, 0.3]),
    )
    return {
        f"tokens (draft {draft}, uniform {uniform})": whole(
            mine.speculative.accept_sampled(draft, tensor(q), tensor(p), tensor(uniform))
        )
        for draft, uniform in cases
    }


def speculated(mine: Any, right: Any) -> Outputs:
    def accepted(draft: Sequence[int], target: Sequence[int]) -> list[int]:
        return right.speculative.accept_greedy(draft, [*target, *[0] * (len(draft) + 1 - len(target))])

    def prefilled(model: Any, tokens: Sequence[int], caches: Any, chunk: int) -> Any:
        return (
            right.generate.prefill(model, tokens, caches, chunk)
            if len(tokens)
            else model(integers([[]]), caches)[:, -1]
        )

    # Where a cache holds too much, there is nothing to run or too few targets: that gives wrong tokens here, no error.
    mine.speculative.accept_greedy, mine.speculative.prefill = accepted, prefilled
    found = {}
    end = int(fixed_tokens(right)[4])
    cases = (
        ("", 0.2, 2, ()),
        (" (the small model is the large one)", 0.0, 3, ()),
        (" (the small model knows little)", 1.0, 3, ()),
        (" (a token ends texts)", 0.2, 3, {end}),
    )
    for name, apart, count, eos_ids in cases:
        model, draft = Recorded(right), Recorded(right, apart)
        tokens = mine.speculative.speculative_generate(
            model, draft, PROMPT, caches_of(right), caches_of(right), 9, count, eos_ids
        )
        found[f"tokens{name}"] = whole(tokens)
        found[f"rows and tokens of the large model's calls{name}"] = model.shapes()
        found[f"number of tokens that the small model ran{name}"] = np.array(sum(length for _, length in draft.calls))
    return found


CHECKS = (
    Check("softmax", "basics", softmax),
    Check("linear", "basics", linear),
    Check("silu", "basics", silu),
    Check("scaled_dot_product_attention_simple", "attention", attention_simple),
    Check("SimpleMultiHeadAttention", "attention", multi_head),
    Check("RoPE", "positional_encoding", rotary),
    Check("causal_mask", "attention", causal),
    Check("scaled_dot_product_attention_grouped", "attention", attention_grouped),
    Check("RMSNorm", "layers", norm),
    Check("MLP", "layers", mlp),
    Check("Embedding", "layers", embedding),
    Check("Embedding.as_linear", "layers", unembedding),
    Check("Attention", "model", model_attention),
    Check("TransformerBlock", "model", block),
    Check("Model", "model", whole_model),
    Check(
        "Model, with all parts your own",
        "model",
        everything,
        together=("basics", "attention", "positional_encoding", "layers"),
    ),
    Check("distribution", "sampler", distribution),
    Check("draw", "sampler", drawn),
    Check("KvCache.update_and_fetch", "kv_cache", cache_update),
    Check("KvCache.rewind", "kv_cache", cache_rewind),
    Check("prefill", "generate", prefill),
    Check("generate", "generate", generated),
    Check("quantize_weights", "quantize", quantized),
    Check("dequantize_weights", "quantize", dequantized),
    Check("quantized_linear", "quantize", quantized_product),
    Check("merge_block", "flash_attention", merged),
    Check("flash_attention", "flash_attention", flash),
    Check("BatchKvCache.update_and_fetch", "batch", batch_update),
    Check("Batcher.step", "batch", batched),
    Check("BlockTable.reserve", "paged_cache", reserved),
    Check("PagedKvCache.update_and_fetch", "paged_cache", paged_update),
    Check("PagedKvCache.fetched", "paged_cache", paged_fetch),
    Check("paged_attention", "paged_cache", paged_product),
    Check("PrefixCache.match", "prefix_cache", prefix_match),
    Check("PrefixCache.insert", "prefix_cache", prefix_insert),
    Check("PrefixCache.evict", "prefix_cache", prefix_evict),
    Check("accept_greedy", "speculative", greedy_acceptance),
    Check("accept_sampled", "speculative", sampled_acceptance),
    Check("speculative_generate", "speculative", speculated),
)


class Recorded:
    """A right model of one layer without projections, which notes the shapes of the tokens that it is called with.

    Called with no tokens at all, it gives logits of 0.
    """

    def __init__(self, right: Any, apart: float = 0.0) -> None:
        """apart: how far its logits are from those of other models of this kind."""
        self.attend = right.attention.scaled_dot_product_attention_grouped
        self.embeddings = tensor(numbers(38, 13, 8))
        self.places = tensor(numbers(5, 160, 8))
        self.head = tensor(numbers(70, 8, 13) + apart * numbers(7, 8, 13))
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, tokens: Any, caches: Any) -> Any:
        self.calls.append(tuple(tokens.shape))
        if not tokens.shape[1]:
            return tensor(np.zeros((1, 1, len(self.head[0]))))
        (only,) = caches
        firsts = only.offset if isinstance(only.offset, list) else [only.offset]
        places = integers([range(first, first + tokens.shape[1]) for first in firsts])
        vectors = (self.embeddings[tokens] + self.places[places])[:, None]
        keys, values, mask = only.update_and_fetch(vectors, vectors)
        return self.attend(vectors, keys, values, 0.4, mask)[:, 0] @ self.head

    def shapes(self) -> np.ndarray:
        return np.array(self.calls)


class HoldersOnly:
    """A pool of pages without memory: what a prefix cache needs of one."""

    def __init__(self, holders: list[int], page_size: int) -> None:
        self.holders, self.page_size = holders, page_size

    def hold(self, page: int) -> None:
        self.holders[page] += 1

    def release(self, page: int) -> None:
        self.holders[page] -= 1


def bits_of(x: Any) -> Outputs:
    """Returns what tells the dtype of a result for float16: the bits of each number, and those of its mantissa."""
    size, mantissa = dtype_of(x)
    return {"bits of each number (result for float16)": size, "bits of each mantissa (result for float16)": mantissa}


def fits(run: Callable[[], Outputs], expected: Outputs) -> bool:
    """Whether results can be had and are the expected ones."""
    try:
        return difference(run(), expected, 1e-4, 1e-5) is None
    except Exception:
        return False


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def whole(tokens: Iterable[Any]) -> np.ndarray:
    """Returns whole numbers, such as tokens, as an array."""
    return np.array([int(token) for token in tokens], dtype=np.int64)


def config_of(modules: Any, **changes: Any) -> Any:
    return modules.config.ModelConfig(**{**SIZES, **changes})


@cache
def weights_of(kind: str, tied: bool = True) -> dict[str, Any]:
    """Returns random weights of a family's small model, by their names in a checkpoint."""
    D, C, V, E = (SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    N, K = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, heads in (("q", N), ("k", K), ("v", K)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (heads * E, D)
            if kind in ("qwen2", "biased"):
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (heads * E,)
        if kind == "biased":
            shapes[f"{prefix}self_attn.o_proj.bias"] = (D,)
        if kind == "qwen3":
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (E,) for name in "qk"}
        shapes |= {f"{prefix}self_attn.o_proj.weight": (D, N * E), f"{prefix}mlp.down_proj.weight": (D, C)}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (C, D) for name in ("gate", "up")}
        shapes |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        values = 0.4 * numbers(seed, *shape)
        found[name] = tensor(1 + values if name.endswith("norm.weight") else values)
    return found


def caches_of(right: Any) -> list[Any]:
    """Returns the empty caches of a `Recorded` model."""
    return [right.kv_cache.KvCache()]


def begun_cache(right: Any, rows: int, length: int, seed: int = 0) -> Any:
    """Returns a cache of some rows that holds so many positions of two heads."""
    cache = right.kv_cache.KvCache()
    cache.update_and_fetch(*(tensor(numbers(begin + seed, rows, 2, length, 6)) for begin in (50, 60)))
    return cache


def small_pool(right: Any) -> Any:
    """Returns a pool of five pages of three positions, which are given out in no simple order."""
    pool = right.paged_cache.PagePool(2, 5, 3, 2, 4)
    pool.free = [3, 0, 4, 1, 2]
    return pool


def fixed_tokens(right: Any) -> list[int]:
    """Returns what the small right model writes after PROMPT."""
    greedy = right.sampler.make_sampler(0.0)
    return right.generate.generate(Recorded(right), PROMPT, caches_of(right), greedy, 8)
