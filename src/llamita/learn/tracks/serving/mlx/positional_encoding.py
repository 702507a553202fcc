"""Rotary position embeddings: each pair of a head's numbers is turned by an angle that grows with the position.

Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.2 and equation 34.
"""

import mlx.core as mx


class RoPE:
    """Turns positions into queries or keys."""

    def __init__(self, dims: int, seq_len: int, base: float = 10000, traditional: bool = False) -> None:
        """Prepares for positions 0 to seq_len - 1 and heads of `dims` numbers, an even number.

        Pair i of a head, of dims / 2, is turned by position * base ** (-2i / dims) radians. traditional: pair i is the
        numbers 2i and 2i + 1, as in the paper; else it is i and dims / 2 + i, as in the checkpoints of Llama and Qwen.
        """
        self.traditional = traditional
        # to do: self.cos and self.sin, (seq_len, dims / 2), float32: of the angle of each position and pair.
        frequencies = base ** (-mx.arange(0, dims, 2) / dims)
        angles = mx.arange(seq_len)[:, None] * frequencies[None, :]
        self.cos, self.sin = mx.cos(angles), mx.sin(angles)
        # done

    def __call__(self, x: mx.array, offset: slice | list[slice] | None = None) -> mx.array:
        """Returns x with its positions turned into it; the shape and the dtype stay.

        x: (N, L, H, dims), heads after positions. offset: the positions of x, as a slice of length L; a list has a
        slice for each of the N rows; None stands for slice(0, L). No slice ends beyond seq_len. A point (a, b) that is
        turned by the angle w becomes (a cos w - b sin w, a sin w + b cos w).
        """
        L = x.shape[1]
        # to do: the rows of self.cos and self.sin at these positions, in a shape that broadcasts over N and H; the two
        #        coordinates a and b of all pairs, in float32; turn them; put them back in their places.
        slices = offset if isinstance(offset, list) else [slice(0, L) if offset is None else offset]
        cos = mx.stack([self.cos[positions] for positions in slices])[:, :, None, :]
        sin = mx.stack([self.sin[positions] for positions in slices])[:, :, None, :]
        if self.traditional:
            a, b = x.astype(mx.float32)[..., 0::2], x.astype(mx.float32)[..., 1::2]
        else:
            a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        joined = mx.stack(turned, axis=-1).flatten(-2) if self.traditional else mx.concatenate(turned, axis=-1)
        return joined.astype(x.dtype)
        # done
