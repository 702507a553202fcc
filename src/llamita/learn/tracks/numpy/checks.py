"""The checks of the numpy track: each runs one function of the reader's on fixed inputs, and so the solution's.

`mine` holds the modules under judgement by their names (`mine.rope`), `right` those of the solutions. What a function
calls is taken from `right`, so that a mistake shows where it is made and nowhere else. No framework is imported.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamita.learn.checking import Check, Outputs, Run

EXERCISES = {
    "functions": ("softmax", "linear", "embedding", "silu", "rms_norm"),
    "rope": ("angles", "rotate_halves", "rotate_neighbours"),
    "attention": ("causal_mask", "attention", "grouped_attention"),
    "weights": ("float32_of", "read_safetensors"),
    "llama": ("self_attention", "feed_forward", "one_layer", "forward"),
    "generate": ("greedy", "sample", "generate"),
    "loss": ("cross_entropy", "cross_entropy_gradient", "linear_gradients", "embedding_gradient"),
}
SIZES = {
    "vocab_size": 11,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 0.05,
    "rope_theta": 50.0,
}


def softmax(mine: Any, right: Any) -> Outputs:
    found = mine.functions.softmax
    x = numbers(1, 2, 3, 5)
    masked = np.where(numbers(2, 2, 3, 5) > 0.3, -np.inf, x).astype(np.float32)
    masked[..., 0] = 0.5
    apart = x + 200 * np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    given = x.copy()
    result = found(given)
    return {
        "result": array(result),
        "result of a row alone": array(found(x[0, 0].copy())),
        "result where elements are minus infinity": array(found(masked)),
        "result of large numbers": array(found(x + 1000)),
        "result of rows that are 200 apart": array(found(apart)),
        "the argument afterwards": array(given),
        "the dtype of the result": dtype_of(result),
    }


def linear(mine: Any, right: Any) -> Outputs:
    x = numbers(1, 2, 3, 5)
    result = mine.functions.linear(x, numbers(2, 4, 5))
    return {
        "result": array(result),
        "result of a square weight": array(mine.functions.linear(x, numbers(3, 5, 5))),
        "result of a row alone": array(mine.functions.linear(x[0, 0], numbers(2, 4, 5))),
        "the dtype of the result": dtype_of(result),
    }


def embedding(mine: Any, right: Any) -> Outputs:
    weight = numbers(1, 7, 4)
    tokens = np.array([[1, 6, 2], [0, 6, 3]])
    return {
        "result": array(mine.functions.embedding(tokens, weight)),
        "result of a square weight": array(mine.functions.embedding(tokens, numbers(2, 7, 7))),
    }


def silu(mine: Any, right: Any) -> Outputs:
    x = 3 * numbers(1, 2, 3, 5)
    result = mine.functions.silu(x)
    return {"result": array(result), "the argument afterwards": array(x), "the dtype of the result": dtype_of(result)}


def rms_norm(mine: Any, right: Any) -> Outputs:
    x, weight = numbers(1, 2, 5, 24), 1 + 0.5 * numbers(7, 24)
    result = mine.functions.rms_norm(x, weight, 0.3)
    return {
        "result": array(result),
        "result of zeros": array(mine.functions.rms_norm(np.zeros((2, 24), np.float32), weight, 0.3)),
        "the argument afterwards": array(x),
        "the dtype of the result": dtype_of(result),
    }


def angles(mine: Any, right: Any) -> Outputs:
    return {
        "result at theta=50": array(mine.rope.angles(np.arange(5), 8, 50.0)),
        "result at theta=10000": array(mine.rope.angles(np.array([0, 1, 7]), 6, 10000.0)),
    }


def rotated(name: str) -> Run:
    def run(mine: Any, right: Any) -> Outputs:
        turn = right.rope.angles(np.arange(2, 7), 8, 50.0)
        result = getattr(mine.rope, name)(numbers(1, 2, 3, 5, 8), turn)
        return {"result": array(result), "the dtype of the result": dtype_of(result)}

    return run


def causal_mask(mine: Any, right: Any) -> Outputs:
    masks = {f"mask of T={T} and S={S}": mine.attention.causal_mask(T, S) for T, S in ((4, 4), (3, 7), (1, 5), (1, 1))}
    return {
        **{name: array(each) for name, each in masks.items()},
        **{f"the dtype of the {name}": dtype_of(each) for name, each in masks.items()},
    }


def attention(mine: Any, right: Any) -> Outputs:
    query, key, value = numbers(1, 2, 3, 4, 6), numbers(2, 2, 3, 7, 6), numbers(3, 2, 3, 7, 6)
    mask = right.attention.causal_mask(4, 7)
    other = numbers(4, 4, 7) > 0.5
    other[:, 2] = True  # each query sees one key at least
    found = mine.attention.attention
    plain, masked = found(query, key, value), found(query, key, value, mask)
    return {
        "result": array(plain),
        "result with a mask": array(masked),
        "result with a mask of each batch": array(found(query, key, value, np.stack([mask, other])[:, None])),
        "result of T=S": array(found(query, key[:, :, :4], value[:, :, :4], mask[:, 3:])),
        "result of one head": array(found(query[0, 0], key[0, 0], value[0, 0], mask)),
        "the dtype of the result": dtype_of(plain),
        "the dtype of the result with a mask": dtype_of(masked),
    }


def grouped_attention(mine: Any, right: Any) -> Outputs:
    query, key, value = numbers(1, 2, 6, 3, 4), numbers(2, 2, 2, 5, 4), numbers(3, 2, 2, 5, 4)
    found = mine.attention.grouped_attention
    return {
        "result with a mask": array(found(query, key, value, right.attention.causal_mask(3, 5))),
        "result": array(found(query, key, value)),
        "result of as many key heads as query heads": array(found(query[:, :2], key, value)),
    }


def float32_of(mine: Any, right: Any) -> Outputs:
    x = numbers(1, 9)
    bits = x.view(np.uint32) >> 16
    result = {
        "numbers of F32": mine.weights.float32_of(x.astype("<f4").tobytes(), "F32"),
        "numbers of F16": mine.weights.float32_of(x.astype("<f2").tobytes(), "F16"),
        "numbers of BF16": mine.weights.float32_of(bits.astype("<u2").tobytes(), "BF16"),
    }
    try:
        mine.weights.float32_of(b"\0" * 8, "I64")
        answer = "an array"
    except ValueError:
        answer = "a ValueError"
    return {
        **{name: array(each) for name, each in result.items()},
        **{f"the dtype of the {name}": dtype_of(each) for name, each in result.items()},
        "the answer to I64": np.array(answer),
    }


def read_safetensors(mine: Any, right: Any) -> Outputs:
    arrays = {"second": numbers(1, 3, 2), "first": numbers(2, 4), "third": numbers(3, 2, 2, 2)}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.safetensors"
        written(path, arrays, "F32")
        plain = mine.weights.read_safetensors(path)
        written(path, arrays, "BF16")
        short = mine.weights.read_safetensors(path)
    found = {"the number of arrays": np.array(float(len(plain)))}
    for name in arrays:
        found[f"array {name!r}"] = array(plain[name])
        found[f"array {name!r} of BF16"] = array(short[name])
    return found


def self_attention(mine: Any, right: Any) -> Outputs:
    config, weights = model_of(right)
    x = numbers(1, 2, 5, 24)
    return {
        "result": array(mine.llama.self_attention(config, weights, 0, x)),
        "result of layer 1": array(mine.llama.self_attention(config, weights, 1, x)),
    }


def self_attention_with_a_cache(mine: Any, right: Any) -> Outputs:
    config, weights = model_of(right)
    x = numbers(1, 2, 5, 24)
    cache = right.cache.KeyValueCache(2, 2, 9, 8)
    parts = [mine.llama.self_attention(config, weights, 0, part, cache) for part in (x[:, :2], x[:, 2:4], x[:, 4:])]
    return {"result of 2, 2 and 1 positions": np.concatenate([array(part) for part in parts], axis=1)}


def feed_forward(mine: Any, right: Any) -> Outputs:
    _, weights = model_of(right)
    x = numbers(1, 2, 5, 24)
    return {f"result of layer {layer}": array(mine.llama.feed_forward(weights, layer, x)) for layer in (0, 1)}


def one_layer(mine: Any, right: Any) -> Outputs:
    config, weights = model_of(right)
    x = numbers(1, 2, 5, 24)
    cache = right.cache.KeyValueCache(2, 2, 9, 8)
    given = x.copy()
    plain = mine.llama.one_layer(config, weights, 1, given)
    parts = [mine.llama.one_layer(config, weights, 1, part.copy(), cache) for part in (x[:, :2], x[:, 2:])]
    return {
        "result": array(plain),
        "result with a cache": np.concatenate([array(part) for part in parts], axis=1),
        "the argument afterwards": array(given),
        "the dtype of the result": dtype_of(plain),
    }


def forward(mine: Any, right: Any) -> Outputs:
    config, weights = model_of(right)
    tokens = np.array([[1, 5, 2, 9, 10], [3, 3, 0, 7, 4]])
    caches = [right.cache.KeyValueCache(2, 2, 12, 8) for _ in range(2)]
    tied, tied_weights = model_of(right, tie_word_embeddings=True)
    parts = [mine.llama.forward(config, weights, part, caches) for part in (tokens[:, :3], tokens[:, 3:])]
    return {
        "logits": array(mine.llama.forward(config, weights, tokens)),
        "logits with caches": np.concatenate([array(part) for part in parts], axis=1),
        "logits with the embeddings' matrix": array(mine.llama.forward(tied, tied_weights, tokens)),
    }


def whole_model(mine: Any, right: Any) -> Outputs:
    """All of the reader's own modules together, over files such as `model/` has."""
    config, weights = model_of(right, tie_word_embeddings=True)
    names = sorted(weights)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, some in parts.items():
            written(directory / file, {name: weights[name] for name in some}, "BF16")
        index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        read = mine.weights.read_weights(directory)
    return {"logits": array(mine.llama.forward(config, read, np.array([[1, 5, 2, 9, 10], [3, 3, 0, 7, 4]])))}


def greedy(mine: Any, right: Any) -> Outputs:
    logits = numbers(1, 2, 3, 9)
    logits[0, 0, [4, 2]] = 9.0
    return {
        "tokens": array(mine.generate.greedy(logits)),
        "token of a row alone": array(mine.generate.greedy(logits[1, 1])),
    }


def sample(mine: Any, right: Any) -> Outputs:
    logits = 1.5 * numbers(1, 3, 1, 6) + np.zeros((3, 400, 6), np.float32)
    number = np.broadcast_to((np.arange(400) + 0.5) / 400, (3, 400))
    found: dict[str, np.ndarray] = {}
    for temperature in (0.5, 1.0, 2.0):
        tokens = array(mine.generate.sample(logits, temperature, number))
        if tokens.shape != (3, 400):
            return {**found, f"share of each token at temperature {temperature}": tokens}
        shares = (tokens[..., None] == np.arange(6)).mean(axis=1)
        found[f"share of each token at temperature {temperature}"] = shares
        found[f"tokens at temperature {temperature}"] = tokens
    found["token of a row alone"] = array(mine.generate.sample(logits[0, 0], 1.0, np.array(0.7)))
    greatest = np.full(300, np.nextafter(1.0, 0.0))  # rounding leaves the last sum of many of these rows below it
    found["tokens where the number is close to 1"] = array(mine.generate.sample(numbers(2, 300, 6), 1.0, greatest))
    return found


def extend(mine: Any, right: Any) -> Outputs:
    cache = mine.cache.KeyValueCache(2, 3, 8, 4)
    found: dict[str, np.ndarray] = {}
    for number, count in enumerate((3, 1, 2)):
        keys, values = cache.extend(numbers(number, 2, 3, count, 4), numbers(10 + number, 2, 3, count, 4))
        found[f"keys after call {number + 1}"] = array(keys)
        found[f"values after call {number + 1}"] = array(values)
        found[f"length after call {number + 1}"] = np.array(float(cache.length))
    return found


def generate(mine: Any, right: Any) -> Outputs:
    """A model of two layers that says which tokens it was given, and whether its caches were kept."""
    config, _ = model_of(right)
    table = numbers(59, 11, 11)  # no token follows twice
    read: list[int] = []
    kept: list[int] = []

    def forward(config: Any, weights: Any, tokens: np.ndarray, caches: Any = None) -> np.ndarray:
        read.extend([len(tokens), *np.asarray(tokens).shape[1:], *np.asarray(tokens).ravel()])
        if len(read) > 600:
            raise RuntimeError("generate called forward far more often than count says")
        for cache in caches or ():
            cache.length += np.asarray(tokens).shape[1]
        kept.append(caches[0].length if caches else 0)
        return table[tokens]

    mine.generate.forward = forward
    chosen: list[np.ndarray] = []

    def choose(logits: np.ndarray) -> int:
        chosen.append(np.asarray(logits))
        return int(logits.argmax())

    tokens = list(mine.generate.generate(config, {}, [3, 1, 4], 7, choose))
    found = {
        "tokens": array(tokens),
        "logits that were chosen from": array(np.stack(chosen)),
        "what forward was given (the counts of rows and tokens, then the tokens)": array(read),
        "positions in the caches after each call": array(kept),
    }
    short = list(mine.generate.generate(config, {}, [3, 1, 4], 7, choose, stop={tokens[3], 99}))
    return {**found, "tokens where one of them stops": array(short)}


def cross_entropy(mine: Any, right: Any) -> Outputs:
    logits, labels = 2 * numbers(1, 2, 4, 6), np.array([[1, 5, 0, 2], [3, 3, 4, 1]])
    some = np.array([[1, -100, 0, -100], [3, 3, -100, 1]])
    return {
        "loss": array(mine.loss.cross_entropy(logits, labels)),
        "loss where labels are ignored": array(mine.loss.cross_entropy(logits, some)),
        "loss of large logits": array(mine.loss.cross_entropy(200 * logits, labels)),
    }


def cross_entropy_gradient(mine: Any, right: Any) -> Outputs:
    logits, labels = 2 * numbers(1, 2, 4, 6), np.array([[1, 5, 0, 2], [3, 3, 4, 1]])
    some = np.array([[1, -100, 0, -100], [3, 3, -100, 1]])
    return {
        "gradient": array(mine.loss.cross_entropy_gradient(logits, labels)),
        "gradient where labels are ignored": array(mine.loss.cross_entropy_gradient(logits, some)),
    }


def linear_gradients(mine: Any, right: Any) -> Outputs:
    by_x, by_weight = mine.loss.linear_gradients(numbers(1, 7, 5), numbers(2, 5, 5), numbers(3, 7, 5))
    other_x, other_weight = mine.loss.linear_gradients(numbers(1, 7, 5), numbers(2, 4, 5), numbers(3, 7, 4))
    return {
        "derivative by x where the weight is square": array(by_x),
        "derivative by the weight where it is square": array(by_weight),
        "derivative by x": array(other_x),
        "derivative by the weight": array(other_weight),
    }


def embedding_gradient(mine: Any, right: Any) -> Outputs:
    return {"gradient": array(mine.loss.embedding_gradient(np.array([1, 4, 1, 0, 4, 4]), 6, numbers(1, 6, 3)))}


def adamw(mine: Any, right: Any) -> Outputs:
    found: dict[str, np.ndarray] = {}
    given = {name: numbers(seed, 3, 4) for seed, name in enumerate("ab")}
    optimizer = mine.optimizer.AdamW(given, lr=0.05, betas=(0.8, 0.95), eps=0.01, weight_decay=0.3)
    for step in range(6):
        optimizer.step({name: numbers(10 * step + seed + 20, 3, 4) for seed, name in enumerate("ab")})
        if step in (0, 5):
            found[f"parameters after step {step + 1}"] = np.stack([array(given[name]).copy() for name in "ab"])
    return found


def only(module: str, name: str, run: Run) -> Run:
    """The same run, where all other exercises of the module are the solutions'."""

    def alone(mine: Any, right: Any) -> Outputs:
        for other in EXERCISES.get(module, ()):
            if other != name:
                setattr(getattr(mine, module), other, getattr(getattr(right, module), other))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an overflow shows in the numbers
            return run(mine, right)

    return alone


def check(module: str, name: str, run: Run, title: str = "") -> Check:
    return Check(title or name, module, only(module, name, run))


CHECKS = (
    check("functions", "softmax", softmax),
    check("functions", "linear", linear),
    check("functions", "embedding", embedding),
    check("functions", "silu", silu),
    check("functions", "rms_norm", rms_norm),
    check("rope", "angles", angles),
    check("rope", "rotate_halves", rotated("rotate_halves")),
    check("rope", "rotate_neighbours", rotated("rotate_neighbours")),
    check("attention", "causal_mask", causal_mask),
    check("attention", "attention", attention),
    check("attention", "grouped_attention", grouped_attention),
    check("weights", "float32_of", float32_of),
    check("weights", "read_safetensors", read_safetensors),
    check("llama", "self_attention", self_attention),
    check("llama", "feed_forward", feed_forward),
    check("llama", "one_layer", one_layer),
    check("llama", "forward", forward),
    Check("the model over a directory", "llama", whole_model, together=("functions", "rope", "attention", "weights")),
    check("generate", "greedy", greedy),
    check("generate", "sample", sample),
    check("cache", "extend", extend, "KeyValueCache.extend"),
    check("llama", "self_attention", self_attention_with_a_cache, "self_attention with a cache"),
    check("generate", "generate", generate),
    check("loss", "cross_entropy", cross_entropy),
    check("loss", "cross_entropy_gradient", cross_entropy_gradient),
    check("loss", "linear_gradients", linear_gradients),
    check("loss", "embedding_gradient", embedding_gradient),
    check("optimizer", "AdamW", adamw, "AdamW.step"),
)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def array(given: Any) -> np.ndarray:
    if given is None:
        raise TypeError("expected an array, got None: is there a return?")
    result = np.asarray(given)
    if result.dtype.kind not in "fiub":
        raise TypeError(f"expected an array of numbers, got {type(given).__name__} with dtype {result.dtype}")
    return result.astype(np.float64)


def dtype_of(given: Any) -> np.ndarray:
    """The name of an array's dtype, as a result."""
    return np.array(np.asarray(given).dtype.name)


def model_of(modules: Any, tie_word_embeddings: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns a small config and random weights for it, by the names of a model's file."""
    config = modules.config.LlamaConfig(**SIZES, tie_word_embeddings=tie_word_embeddings)
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (11, 24), "model.norm.weight": (24,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.{name}_proj.weight": (rows, 24) for name, rows in zip("qkv", (32, 16, 16), strict=True)
        }
        shapes |= {f"{prefix}.self_attn.o_proj.weight": (24, 32), f"{prefix}.mlp.down_proj.weight": (24, 20)}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (20, 24) for name in ("gate", "up")}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (24,) for name in ("input", "post_attention")}
    if not tie_word_embeddings:
        shapes["lm_head.weight"] = (11, 24)
    weights = {name: 0.4 * numbers(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    return config, {name: weight + name.endswith("norm.weight") for name, weight in weights.items()}


def written(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """Writes a safetensors file; BF16 keeps the upper half of each number's bits. Names are not in the data's order."""
    parts: dict[str, bytes] = {}
    for name, x in arrays.items():
        bits = x.astype("<f4").tobytes()
        parts[name] = bits if dtype == "F32" else (np.frombuffer(bits, "<u4") >> 16).astype("<u2").tobytes()
    header: dict[str, Any] = {}
    position = 0
    for name in sorted(arrays):
        offsets = [position, position + len(parts[name])]
        header[name] = {"dtype": dtype, "shape": list(arrays[name].shape), "data_offsets": offsets}
        position = offsets[1]
    shuffled = {"__metadata__": {"format": "pt"}, **{name: header[name] for name in arrays}}
    encoded = json.dumps(shuffled).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(parts[name] for name in sorted(arrays)))
