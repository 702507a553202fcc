"""The checks of the adapters track: each calls one function of the reader's file on fixed inputs.

`mine.adapters` is the file under judgement, `right.adapters` the solutions'. The reader's functions call what they
were written with; a mistake in one shows in those that use it too, and `also` says whose mistakes are looked for there.
"""

import io
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamita.learn.checking import Check, Outputs

TEXT = (
    "low low low low low lower lower widest widest widest newest newest newest newest newest newest\n"
    'It\'s 2024, and the newest river isn\'t lower; it\'s wider!  "Well," she said,   "12345" \n\n'
    "Der Fluß fließt über die Brücke. 河は流れる。 aaaa aaaaaaa <|endoftext|>newest low<|end|>"
    "<|endoftext|> lowest wide river end of text st<|end|>st<|end|>st<|end|>st<|end|>st\n"
) * 2
SPECIAL = ("<|endoftext|>", "<|end|>")
SIZES = {"d_model": 24, "num_heads": 3, "d_ff": 40}


def linear(call: Any) -> Outputs:
    x = numbers(1, 2, 3, 5)
    return {
        "result": array(call(5, 4, numbers(2, 4, 5), x)),
        "result of a square weight": array(call(5, 5, numbers(3, 5, 5), x)),
        "result of a row alone": array(call(5, 4, numbers(2, 4, 5), x[0, 0])),
    }


def embedding(call: Any) -> Outputs:
    tokens = torch.tensor([[1, 6, 2], [0, 6, 3]])
    return {
        "result": array(call(7, 4, numbers(1, 7, 4), tokens)),
        "result of a square weight": array(call(7, 7, numbers(2, 7, 7), tokens)),
    }


def silu(call: Any) -> Outputs:
    return {"result": array(call(3 * numbers(1, 2, 3, 5)))}


def softmax(call: Any) -> Outputs:
    x = numbers(1, 2, 3, 3)
    return {
        **{f"result of dim={dim}": array(call(x, dim)) for dim in (-1, 0, 1)},
        "result of large numbers": array(call(x + 1000, -1)),
    }


def rmsnorm(call: Any) -> Outputs:
    x, weight = numbers(1, 2, 5, 24), 1 + 0.5 * numbers(7, 24)
    return {
        "result": array(call(24, 0.3, weight, x)),
        "result of small numbers": array(call(24, 1e-5, weight, 0.003 * x)),
    }


def scaled_dot_product_attention(call: Any) -> Outputs:
    query, key, value = numbers(1, 2, 3, 4, 6), numbers(2, 2, 3, 7, 6), numbers(3, 2, 3, 7, 5)
    mask = numbers(4, 2, 3, 4, 7) > 0.3
    mask[..., 2] = True
    return {
        "result without a mask": array(call(query, key, value)),
        "result": array(call(query, key, value, mask)),
        "result of three axes": array(call(query[0], key[0], value[0], mask[0])),
        "result of values as wide as keys": array(call(query, key, numbers(5, 2, 3, 7, 6), mask)),
    }


def multihead(call: Any) -> Outputs:
    weights = [0.3 * numbers(seed, 24, 24) for seed in (1, 2, 3, 4)]
    x = numbers(5, 2, 5, 24)
    return {"result": array(call(24, 3, *weights, x)), "result of no batch": array(call(24, 3, *weights, x[0]))}


def rope(call: Any) -> Outputs:
    x = numbers(1, 2, 5, 8)
    return {
        "result": array(call(8, 50.0, 16, x, torch.arange(5))),
        "result at theta=10000": array(call(8, 10000.0, 16, x, torch.arange(5))),
        "result at other positions": array(call(8, 50.0, 16, x, torch.tensor([[3, 0, 7, 15, 1], [2, 4, 6, 8, 10]]))),
        "result with heads": array(call(8, 50.0, 16, numbers(2, 2, 3, 5, 8), torch.arange(5))),
    }


def multihead_with_rope(call: Any) -> Outputs:
    weights = [0.3 * numbers(seed, 24, 24) for seed in (1, 2, 3, 4)]
    x = numbers(5, 2, 5, 24)
    return {
        "result": array(call(24, 3, 16, 50.0, *weights, x, torch.arange(5)[None])),
        "result at other positions": array(call(24, 3, 16, 50.0, *weights, x, torch.tensor([[2, 3, 5, 9, 11]]))),
    }


def swiglu(call: Any) -> Outputs:
    weights = [0.4 * numbers(1, 40, 24), 0.4 * numbers(2, 24, 40), 0.4 * numbers(3, 40, 24)]
    return {"result": array(call(24, 40, *weights, numbers(4, 2, 5, 24)))}


def block(call: Any) -> Outputs:
    weights = of_block()
    x = numbers(50, 2, 5, 24)
    return {"result": array(call(24, 3, 40, 16, 50.0, weights, x))}


def whole_model(call: Any) -> Outputs:
    weights = {"token_embeddings.weight": numbers(60, 11, 24), "ln_final.weight": 1 + 0.4 * numbers(61, 24)}
    weights["lm_head.weight"] = 0.4 * numbers(62, 11, 24)
    for layer in range(2):
        weights |= {f"layers.{layer}.{name}": tensor for name, tensor in of_block(20 * (layer + 1)).items()}
    tokens = torch.tensor([[1, 5, 2, 9, 10], [3, 3, 0, 7, 4]])
    return {
        "logits": array(call(11, 16, 24, 2, 3, 40, 50.0, weights, tokens)),
        "logits of a short text": array(call(11, 16, 24, 2, 3, 40, 50.0, weights, tokens[:, :2])),
    }


def cross_entropy(call: Any) -> Outputs:
    logits, targets = 2 * numbers(1, 5, 6), torch.tensor([1, 5, 0, 2, 3])
    return {"loss": array(call(logits, targets)), "loss of large logits": array(call(500 * logits, targets))}


def gradient_clipping(call: Any) -> Outputs:
    def clipped(limit: float, once: bool = False) -> np.ndarray:
        parameters = [torch.nn.Parameter(numbers(seed, 3, 4)) for seed in (1, 2, 3)]
        for seed, parameter in enumerate(parameters[:2]):  # the third has no gradient
            parameter.grad = numbers(10 + seed, 3, 4) * (1 + 2 * seed)
        call(iter(parameters) if once else parameters, limit)
        return np.stack([array(parameter.grad) for parameter in parameters[:2]])

    return {
        "gradients under the limit": clipped(100.0),
        "gradients over the limit": clipped(2.0),
        "gradients where the parameters are an iterator": clipped(2.0, once=True),
    }


def adamw(get: Any) -> Outputs:
    """The decay is large and the steps are small: so it does not show whether it comes before or after the update."""
    found: dict[str, np.ndarray] = {}
    weights = [torch.nn.Parameter(numbers(seed, 3, 4)) for seed in (1, 2, 3)]
    optimizer = get()(weights, lr=0.002, betas=(0.8, 0.95), eps=1e-8, weight_decay=1.0)
    for step in range(20):
        for number, weight in enumerate(weights[:2]):  # the third has no gradient
            weight.grad = numbers(10 * step + number, 3, 4)
        optimizer.step()
        if step in (0, 19):
            found[f"weights after step {step + 1}"] = array(torch.stack([weight.detach() for weight in weights]))
    return found


def schedule(call: Any) -> Outputs:
    rates = [call(iteration, 1.0, 0.1, 7, 21) for iteration in range(26)]
    other = [call(iteration, 0.5, 0.05, 2, 10) for iteration in range(13)]
    return {"rate of each iteration": array(rates), "rate of each iteration of a short run": array(other)}


def get_batch(call: Any) -> Outputs:
    """What is the same however places are drawn: which occur, about how often, and what a row and its labels are."""
    seeded()
    dataset = np.arange(100, 125, dtype=np.uint16)
    inputs, labels = call(dataset, 4000, 5, "cpu")
    found = {
        "shapes": np.array([*inputs.shape, *labels.shape], dtype=np.float64),
        "whether inputs and labels are int64": array([inputs.dtype == torch.int64, labels.dtype == torch.int64]),
    }
    names = (
        "labels minus inputs, the least and the greatest",
        "step between neighbours of a row, the least and the greatest",
        "first and last place that occur",
        "whether each place occurs about as often as the others",
    )
    x, y = array(inputs), array(labels)
    if x.shape != (4000, 5) or y.shape != (4000, 5):
        return found | dict.fromkeys(names, np.full(1, np.nan))
    shares = np.array([(x[:, 0] == value).mean() for value in range(100, 120)])
    offsets = np.array([np.sort((y - x).ravel())[place] for place in (0, -1)])
    steps = np.array([np.sort((x[:, 1:] - x[:, :-1]).ravel())[place] for place in (0, -1)])
    ends = np.array([x[:, 0].min(), x[:, 0].max()]) - 100
    even = ((shares > 0.025) & (shares < 0.1)).astype(np.float64)
    return found | dict(zip(names, (offsets, steps, ends, even), strict=True))


def checkpoints(modules: Any) -> Outputs:
    """A run that is saved and loaded goes on as one that was not, by a path and by an open file."""
    save, load = written(modules, "run_save_checkpoint"), written(modules, "run_load_checkpoint")
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("a path", "an open file"):
            first, optimizer = trained(seed=1, steps=3)
            place: Any = Path(temporary) / "checkpoint" if kind == "a path" else io.BytesIO()
            save(first, optimizer, 1234, place)
            if kind == "an open file":
                place.seek(0)
            again, other = trained(seed=2, steps=1)
            iteration = load(place, again, other)
            found[f"iteration from {kind}"] = array(iteration)
            found[f"weights from {kind}"] = flat(again)
            train(again, other, steps=2)
            found[f"weights after two more steps from {kind}"] = flat(again)
    return found


def tokenizer(modules: Any) -> Outputs:
    get = written(modules, "get_tokenizer")
    vocab, merges = reference_bpe()
    plain, special = get(vocab, merges), get(dict(vocab), list(merges), list(SPECIAL))
    nested = get(dict(vocab), list(merges), ["<|end|>", "<|end|><|end|>"])
    texts = {
        "words": "the newest lower wide river isn't widest",
        "spaces and digits": "  low\n\n  12345  newest \t!",
        "other letters": "Fluß 河は流れる é",
        "the same letter many times": "aaaaaaaaaaa aaaa",
        "nothing": "",
    }
    found: dict[str, np.ndarray] = {}
    for name, text in texts.items():
        ids = [int(number) for number in plain.encode(text)]
        found[f"ids of {name}"] = array(ids)
        found[f"text of {name}"] = letters(plain.decode(ids))
    marked = "low<|endoftext|>newest <|end|><|endoftext|><|endoftext|>"
    found["ids with special tokens"] = array(special.encode(marked))
    found["text with special tokens"] = letters(special.decode(list(special.encode(marked))))
    found["ids where special tokens are not asked for"] = array(plain.encode(marked))
    found["ids where one special token begins another"] = array(nested.encode("low<|end|><|end|>newest<|end|>low"))
    found["text of bytes that are no UTF-8"] = letters(plain.decode([ids_of(vocab)[b"\xc3"], ids_of(vocab)[b"a"]]))
    lines = ["low lower\n", "newest<|end|>\n", "wid"]
    found["ids of encode_iterable"] = array(list(special.encode_iterable(iter(lines))))
    return found


def train_bpe(call: Any) -> Outputs:
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "corpus.txt"
        path.write_bytes(TEXT.encode())
        for special, size in ((SPECIAL, 300), ((), 290)):
            vocab, merges = call(path, size, list(special))
            name = f"with {len(special)} special tokens"
            found[f"merges {name}"] = np.array([padded(left) + padded(right) for left, right in merges])
            found[f"size of the vocabulary {name}"] = array(len(vocab))
            found[f"whether ids run from 0 without a gap {name}"] = array(sorted(vocab) == list(range(len(vocab))))
            found[f"tokens {name}, sorted"] = np.array([padded(token) for token in sorted(vocab.values())])
    return found


BASICS = ("run_linear", "run_softmax")
ATTENTION = (*BASICS, "run_scaled_dot_product_attention")
BLOCK = ("run_rmsnorm", "run_silu", "run_swiglu", *ATTENTION, "run_rope", "run_multihead_self_attention_with_rope")


def check(name: str, run: Callable[[Any], Outputs], also: Sequence[str] = (), **tolerances: float) -> Check:
    """A check of one function."""
    return Check(name, "adapters", lambda mine, right: run(written(mine, name)), also=tuple(also), **tolerances)


def check_of_both(name: str, run: Callable[[Any], Outputs]) -> Check:
    """A check that takes several functions or none by its name."""
    return Check(name, "adapters", lambda mine, right: run(mine))


CHECKS = (
    check("run_linear", linear),
    check("run_embedding", embedding),
    check("run_silu", silu),
    check("run_softmax", softmax),
    check("run_rmsnorm", rmsnorm),
    check("run_scaled_dot_product_attention", scaled_dot_product_attention, also=["run_softmax"]),
    check("run_multihead_self_attention", multihead, also=ATTENTION),
    check("run_rope", rope),
    check("run_multihead_self_attention_with_rope", multihead_with_rope, also=[*ATTENTION, "run_rope"]),
    check("run_swiglu", swiglu, also=["run_silu", "run_linear"]),
    check("run_transformer_block", block, also=BLOCK),
    check("run_transformer_lm", whole_model, also=[*BLOCK, "run_embedding", "run_transformer_block"]),
    check("run_cross_entropy", cross_entropy),
    check("run_gradient_clipping", gradient_clipping),
    check("get_adamw_cls", adamw, rtol=1e-3, atol=3e-4),
    check("run_get_lr_cosine_schedule", schedule),
    check("run_get_batch", get_batch),
    check_of_both("run_save_checkpoint and run_load_checkpoint", checkpoints),
    check_of_both("get_tokenizer", tokenizer),
    check("run_train_bpe", train_bpe),
)


def written(modules: Any, name: str) -> Any:
    """Returns a function of the file; NotImplementedError where the file has none of this name."""
    seeded()
    function = getattr(modules.adapters, name, None)
    if function is None:
        raise NotImplementedError(f"there is no {name}")
    return function


def seeded() -> None:
    """Gives every source of chance that a reader may use a beginning of its own."""
    torch.manual_seed(0)
    np.random.seed(0)  # a reader's code may draw from it
    random.seed(0)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def array(given: Any) -> np.ndarray:
    if given is None:
        raise TypeError("expected a result, got None: is there a return?")
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        return given.double().numpy()
    result = np.asarray(given)
    if result.size and result.dtype.kind not in "fiub":
        raise TypeError(f"expected numbers, got {type(given).__name__} with dtype {result.dtype}")
    return result.astype(np.float64)


def letters(text: Any) -> np.ndarray:
    """The code points of a text."""
    if not isinstance(text, str):
        raise TypeError(f"expected a str, got {type(text).__name__}")
    return np.array([float(ord(letter)) for letter in text])


def padded(token: Any) -> list[float]:
    """The bytes of a token, -1 behind its end."""
    if not isinstance(token, bytes):
        raise TypeError(f"expected bytes, got {type(token).__name__}")
    return [float(byte) for byte in token[:24]] + [-1.0] * (24 - len(token))


def of_block(seed: int = 10) -> dict[str, torch.Tensor]:
    """Random weights of one layer."""
    shapes: dict[str, tuple[int, ...]] = {
        **{f"attn.{name}.weight": (24, 24) for name in ("q_proj", "k_proj", "v_proj", "output_proj")},
        "ffn.w1.weight": (40, 24),
        "ffn.w2.weight": (24, 40),
        "ffn.w3.weight": (40, 24),
        "ln1.weight": (24,),
        "ln2.weight": (24,),
    }
    return {
        name: 0.3 * numbers(seed + index, *shape) + name.startswith("ln")
        for index, (name, shape) in enumerate(shapes.items())
    }


def trained(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model and PyTorch's AdamW after some steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(numbers(step, 3, 4)).pow(2).mean().backward()
        optimizer.step()


def flat(model: torch.nn.Module) -> np.ndarray:
    return array(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


def ids_of(vocab: dict[int, bytes]) -> dict[bytes, int]:
    return {token: number for number, token in vocab.items()}


def reference_bpe() -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """A vocabulary whose merges overlap, so that their order shows."""
    pairs = (
        "l o,lo w,n e,ne w,e s,es t,new est,w e,_ l,_ low,a a,aa aa,i d,w id,_ n,t h,th e,i n,1 2,e r,low er,_n e,e _"
    )
    merges = [tuple(part.replace("_", " ").encode() for part in pair.split()) for pair in pairs.split(",")]
    tokens = [*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)]
    return dict(enumerate(tokens)), merges
