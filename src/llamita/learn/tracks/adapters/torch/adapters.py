"""One function for each part of a Transformer language model: call what you have written elsewhere from here.

The names, the arguments and their order are those of `tests/adapters.py` in the first assignment of Stanford's course
CS336 (https://github.com/stanford-cs336/assignment1-basics), so that a file of either serves for both. `...` in a shape
is any number of axes in front, none too.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import IO, Any, BinaryIO

import numpy as np
import regex
import torch
from torch import Tensor

WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""GPT-2's division of a text into words (Radford et al. 2019), for the regex package: merges never cross its pieces."""


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    """Returns in_features through a linear map without a bias.

    weights: (d_out, d_in), a row an output; in_features: (..., d_in); the result: (..., d_out).
    """
    # to do: your linear layer with these weights.
    return in_features @ weights.T
    # done


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    """Returns the vector of each token: row t of the weights for token t.

    weights: (vocab_size, d_model); token_ids: (...), integers; the result: (..., d_model).
    """
    # to do: your embedding with these weights.
    return weights[token_ids]
    # done


def run_silu(in_features: Tensor) -> Tensor:
    """Returns x * sigmoid(x), element by element. The shape stays."""
    # to do: your SiLU.
    return in_features * torch.sigmoid(in_features)
    # done


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    """Returns the softmax along the axis `dim`. The shape stays; numbers of any size give no NaN."""
    # to do: your softmax.
    exponentials = torch.exp(in_features - in_features.amax(dim=dim, keepdim=True))
    return exponentials / exponentials.sum(dim=dim, keepdim=True)
    # done


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    """Returns x divided by the root of (the mean of its squares + eps) over the last axis, times the weights.

    weights: (d_model,); in_features and the result: (..., d_model).
    """
    # to do: your RMSNorm with these weights.
    return in_features * torch.rsqrt(in_features.pow(2).mean(dim=-1, keepdim=True) + eps) * weights
    # done


def run_scaled_dot_product_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the mean of the values for each query, weighted by the softmax of the products with the keys.

    Q: (..., queries, d_k); K: (..., keys, d_k); V: (..., keys, d_v); the result: (..., queries, d_v). The products are
    divided by the root of d_k. mask: booleans, (..., queries, keys), True where a query may see a key.
    """
    # to do: your attention.
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return run_softmax(scores, -1) @ V
    # done


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    """Returns causal self-attention with several heads and without positions.

    The weights are (d_model, d_model); rows 0 to d_model / num_heads - 1 of the first three are head 0, and so on.
    in_features and the result: (..., sequence_length, d_model). A position sees itself and those before it.
    """
    # to do: your multi-head attention with these weights.
    query, key, value = (
        (in_features @ weight.T).unflatten(-1, (num_heads, -1)).transpose(-3, -2)  # (..., heads, length, d_k)
        for weight in (q_proj_weight, k_proj_weight, v_proj_weight)
    )
    earlier = torch.ones(in_features.shape[-2], in_features.shape[-2], dtype=torch.bool).tril()
    heads = run_scaled_dot_product_attention(query, key, value, earlier)
    return heads.transpose(-3, -2).flatten(-2) @ o_proj_weight.T
    # done


def run_rope(d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor) -> Tensor:
    """Returns queries or keys with their pairs turned by their positions.

    in_query_or_key and the result: (..., sequence_length, d_k); token_positions: (..., sequence_length), integers
    from 0 to max_seq_len - 1. Pair i is the numbers 2 * i and 2 * i + 1, and turns by theta ** (-2 * i / d_k) radians
    a position.
    """
    # to do: your rotary positions.
    speeds = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64) / d_k)
    angles = token_positions[..., None] * speeds
    cos, sin = angles.cos().to(in_query_or_key.dtype), angles.sin().to(in_query_or_key.dtype)
    first, second = in_query_or_key[..., 0::2], in_query_or_key[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    # done


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
    token_positions: Tensor | None = None,
) -> Tensor:
    """Returns the same with rotary positions on the queries and keys of every head (d_k = d_model / num_heads).

    token_positions: (..., sequence_length), or None for 0, 1, 2, ...
    """
    # to do: your multi-head attention with rotary positions.
    length, d_k = in_features.shape[-2], d_model // num_heads
    positions = torch.arange(length) if token_positions is None else token_positions[..., None, :]
    query, key, value = (
        run_linear(d_model, d_model, weight, in_features).unflatten(-1, (num_heads, d_k)).transpose(-3, -2)
        for weight in (q_proj_weight, k_proj_weight, v_proj_weight)
    )
    query, key = (run_rope(d_k, theta, max_seq_len, x, positions) for x in (query, key))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    gathered = run_scaled_dot_product_attention(query, key, value, seen)
    return run_linear(d_model, d_model, o_proj_weight, gathered.transpose(-3, -2).flatten(-2))
    # done


def run_swiglu(
    d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor
) -> Tensor:
    """Returns W2 (SiLU(W1 x) * W3 x), the feed-forward network with a gate.

    w1_weight and w3_weight: (d_ff, d_model); w2_weight: (d_model, d_ff); in_features and the result: (..., d_model).
    """
    # to do: your feed-forward network with these weights.
    return (run_silu(in_features @ w1_weight.T) * (in_features @ w3_weight.T)) @ w2_weight.T
    # done


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    """Returns one layer: x + attention(norm(x)), then the same with the feed-forward network; rotary positions.

    weights: `attn.q_proj.weight`, `attn.k_proj.weight`, `attn.v_proj.weight` and `attn.output_proj.weight`,
    (d_model, d_model); `ln1.weight` before the attention and `ln2.weight` before the feed-forward network, (d_model,);
    `ffn.w1.weight` and `ffn.w3.weight`, (d_ff, d_model), `ffn.w2.weight`, (d_model, d_ff). in_features and the result:
    (batch, sequence_length, d_model). The epsilon of the norms is 1e-5.
    """
    # to do: your block with these weights.
    attention = [weights[f"attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "output_proj")]
    normed = run_rmsnorm(d_model, 1e-5, weights["ln1.weight"], in_features)
    x = in_features + run_multihead_self_attention_with_rope(d_model, num_heads, max_seq_len, theta, *attention, normed)
    normed = run_rmsnorm(d_model, 1e-5, weights["ln2.weight"], x)
    return x + run_swiglu(d_model, d_ff, *(weights[f"ffn.w{number}.weight"] for number in (1, 2, 3)), normed)
    # done


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Tensor,
) -> Tensor:
    """Returns the logits of a whole model. in_indices: (batch, length); the result: (batch, length, vocab_size).

    weights: `token_embeddings.weight`, (vocab_size, d_model); for each layer from 0 the block's under
    `layers.{layer}.`; `ln_final.weight`, (d_model,); `lm_head.weight`, (vocab_size, d_model). length is at most
    context_length.
    """
    # to do: your model with these weights.
    x = run_embedding(vocab_size, d_model, weights["token_embeddings.weight"], in_indices)
    for layer in range(num_layers):
        start = f"layers.{layer}."
        own = {name.removeprefix(start): tensor for name, tensor in weights.items() if name.startswith(start)}
        x = run_transformer_block(d_model, num_heads, d_ff, context_length, rope_theta, own, x)
    x = run_rmsnorm(d_model, 1e-5, weights["ln_final.weight"], x)
    return run_linear(d_model, vocab_size, weights["lm_head.weight"], x)
    # done


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of -log(probability of the target) in nats, a tensor without axes.

    inputs: (batch, vocab_size), logits; targets: (batch,), integers. Logits of any size give no infinity.
    """
    # to do: your loss.
    shifted = inputs - inputs.amax(dim=-1, keepdim=True)
    log_probabilities = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    return -log_probabilities.gather(-1, targets[..., None]).mean()
    # done


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    """Scales all gradients by one factor, in place, so that their norm together is at most max_l2_norm.

    Gradients whose norm is below it stay as they are. Parameters without a gradient are left out. `parameters` may
    be an iterator, which can be gone through once.
    """
    # to do: your clipping.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))
    if norm > max_l2_norm:
        for gradient in gradients:
            gradient.mul_(max_l2_norm / (norm + 1e-6))
    # done


def get_adamw_cls() -> Any:
    """Returns a class of torch.optim.Optimizer: AdamW, made with (parameters, lr, betas, eps, weight_decay).

    The running means are corrected for their beginning at zero, and the decay is lr * weight_decay * parameter, outside
    of them. Either form of the correction will do, and the decay may come before the update or after it.
    """

    # to do: your optimiser's class.
    class AdamW(torch.optim.Optimizer):
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0.01,
        ) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            for group in self.param_groups:
                lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    gradient, state = parameter.grad, self.state[parameter]
                    t = state["t"] = state.get("t", 0) + 1
                    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
                    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * gradient**2
                    parameter -= lr * group["weight_decay"] * parameter
                    parameter -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
            return loss

    return AdamW
    # done


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """Returns the learning rate of iteration `it`, the first being 0.

    Before warmup_iters it is it / warmup_iters of the maximum; from there to cosine_cycle_iters it falls along half a
    cosine from the maximum to the minimum; after that it is the minimum.
    """
    # to do: your schedule.
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it > cosine_cycle_iters:
        return min_learning_rate
    done = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + 0.5 * (1 + math.cos(math.pi * done)) * (max_learning_rate - min_learning_rate)
    # done


def run_get_batch(dataset: Any, batch_size: int, context_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Returns inputs and labels, each (batch_size, context_length), int64, on the device.

    dataset: a numpy array of token ids, (n,). A row is context_length tokens in a row from a random place, its labels
    the tokens one place further. Every place from which both fit is equally likely.
    """
    # to do: your batches.
    starts = torch.randint(len(dataset) - context_length, (batch_size,))
    places = starts[:, None] + torch.arange(context_length)
    tokens = torch.from_numpy(np.asarray(dataset).astype(np.int64))
    return tokens[places].to(device), tokens[places + 1].to(device)
    # done


def run_save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | BinaryIO | IO[bytes],
) -> None:
    """Writes the state of a model, its optimiser and the number of iterations done to a file or an open one."""
    # to do: your saving.
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}, out)
    # done


def run_load_checkpoint(
    src: str | os.PathLike[str] | BinaryIO | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restores what run_save_checkpoint wrote into the model and the optimiser, and returns the iterations."""
    # to do: your loading.
    content = torch.load(src)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return int(content["iteration"])
    # done


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> Any:
    """Returns a tokenizer: `encode(text)` a list of ids, `decode(ids)` the text, `encode_iterable(texts)` an iterator.

    Byte-level BPE: a text is divided at special tokens (of two that begin at one place, the longer), then into words
    by GPT-2's pattern (WORDS); in a word's bytes the pair that comes first in `merges` is merged everywhere, again and
    again, until there is none. `vocab` has each token's bytes by its id; a special token that it lacks gets the next
    id. `decode` puts U+FFFD where the bytes are no UTF-8. `encode_iterable` yields the ids of one text after another.
    """
    # to do: your tokenizer.
    tokens = dict(vocab)
    special = {token: token.encode() for token in sorted(special_tokens or [], key=len, reverse=True)}
    for token in special_tokens or []:
        if special[token] not in tokens.values():
            tokens[len(tokens)] = special[token]
    ids = {token: number for number, token in tokens.items()}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    dividing = "(" + "|".join(regex.escape(token) for token in special) + ")"

    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            found: list[int] = []
            for part in regex.split(dividing, text) if special else [text]:
                if part in special:
                    found.append(ids[special[part]])
                else:
                    for word in regex.findall(WORDS, part):
                        found += [ids[token] for token in self.divided([bytes([byte]) for byte in word.encode()])]
            return found

        def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
            for text in iterable:
                yield from self.encode(text)

        def decode(self, ids: list[int]) -> str:
            return b"".join(tokens[number] for number in ids).decode("utf-8", errors="replace")

        def divided(self, word: list[bytes]) -> list[bytes]:
            while known := [pair for pair in itertools.pairwise(word) if pair in ranks]:
                first = min(known, key=lambda pair: ranks[pair])
                merged: list[bytes] = []
                for token in word:
                    if merged and (merged[-1], token) == first:
                        merged[-1] += token
                    else:
                        merged.append(token)
                word = merged
            return word

    return Tokenizer()
    # done


def run_train_bpe(
    input_path: str | os.PathLike[str], vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Returns the vocabulary and the merges of a byte-level BPE that is trained on a text file in UTF-8.

    The vocabulary has the 256 bytes, the special tokens and as many merges as it has room for. The text is divided at
    special tokens, which are not counted, then into words by GPT-2's pattern (WORDS). The most frequent pair within
    words is merged next; of pairs equally frequent the greater one, compared as a tuple of bytes. No more merges are
    made once no pair is left.
    """
    # to do: your training.
    with open(input_path, encoding="utf-8", newline="") as file:
        text = file.read()
    counts: Counter[tuple[bytes, ...]] = Counter()
    between = "|".join(regex.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
    for part in regex.split(between, text) if special_tokens else [text]:
        counts.update(tuple(bytes([byte]) for byte in word.encode()) for word in regex.findall(WORDS, part))
    words, pairs = [list(word) for word in counts], Counter[tuple[bytes, bytes]]()
    places: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)  # the words in which a pair stands

    def count(number: int, times: int) -> None:
        for pair in itertools.pairwise(words[number]):
            pairs[pair] += times
            places[pair].add(number)

    for number, times in enumerate(counts.values()):
        count(number, times)
    occurrences, made = list(counts.values()), list[tuple[bytes, bytes]]()
    while 256 + len(special_tokens) + len(made) < vocab_size:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 1:
            break
        made.append(best)
        for number in list(places[best]):
            count(number, -occurrences[number])
            shorter: list[bytes] = []
            for token in words[number]:
                if shorter and (shorter[-1], token) == best:
                    shorter[-1] = b"".join(best)
                else:
                    shorter.append(token)
            words[number] = shorter
            count(number, occurrences[number])
    single = [*(token.encode() for token in special_tokens), *(bytes([byte]) for byte in range(256))]
    return dict(enumerate([*single, *(left + right for left, right in made)])), made
    # done
