"""The parts of a model beside attention: normalisation, the feed-forward network with a gate, and the embeddings."""

import mlx.core as mx
from basics import silu
from projection import project


class RMSNorm:
    """Root mean square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, weight: mx.array, eps: float = 1e-5) -> None:
        """weight: (dim), of the dtype of x."""
        self.dim, self.weight, self.eps = dim, weight, eps

    def __call__(self, x: mx.array) -> mx.array:
        """Returns x divided by the root of the mean of its squares over the last axis, times the weight.

        x: (N.., dim); the shape and the dtype stay. Everything up to the division is computed in float32, whatever the
        dtype of x. `self.eps` is added to the mean of the squares, inside the root.

        Source: equation 4 of the paper.
        """
        # to do: the normalised x in float32, back in x's dtype, times the weight.
        wide = x.astype(mx.float32)
        normed = wide * mx.rsqrt(mx.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight
        # done


class MLP:
    """The feed-forward network with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, w_gate: mx.array, w_up: mx.array, w_down: mx.array) -> None:
        """w_gate, w_up: (hidden_dim, dim). w_down: (dim, hidden_dim)."""
        self.dim, self.hidden_dim = dim, hidden_dim
        self.w_gate, self.w_up, self.w_down = w_gate, w_up, w_down

    def __call__(self, x: mx.array) -> mx.array:
        """Returns down(silu(gate(x)) * up(x)). x and the result: (N.., dim).

        Source: equation 6 of the paper, where Swish with beta 1 is `silu`.
        """
        # to do: one line. `project(x, w)` is `linear`; it will take quantised weights too.
        return project(silu(project(x, self.w_gate)) * project(x, self.w_up), self.w_down)
        # done


class Embedding:
    """The vectors of the tokens, and the way back from a vector to logits."""

    def __init__(self, vocab_size: int, embedding_dim: int, weight: mx.array) -> None:
        """weight: (vocab_size, embedding_dim), a row for each token."""
        self.vocab_size, self.embedding_dim, self.weight = vocab_size, embedding_dim, weight

    def __call__(self, x: mx.array) -> mx.array:
        """Returns the rows of tokens. x: (N..), integers. The result: (N.., embedding_dim)."""
        # to do: one line.
        return self.weight[x]
        # done

    def as_linear(self, x: mx.array) -> mx.array:
        """Returns logits, by `project`: the products of x with all rows.

        x: (N.., embedding_dim). The result: (N.., vocab_size).
        """
        # to do: one line.
        return project(x, self.weight)
        # done
