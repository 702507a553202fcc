"""Rotary position embeddings: each pair of a head's numbers is turned by an angle that grows with the position.

Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.2 and equation 34.
"""

import torch
from torch import Tensor


class RoPE:
    """Turns positions into queries or keys."""

    def __init__(self, dims: int, seq_len: int, base: float = 10000, traditional: bool = False) -> None:
        """Prepares for positions 0 to seq_len - 1 and heads of `dims` numbers, an even number.

        Pair i of a head, of dims / 2, is turned by position * base ** (-2i / dims) radians. traditional: pair i is the
        numbers 2i and 2i + 1, as in the paper; else it is i and dims / 2 + i, as in the checkpoints of Llama and Qwen.
        """
        self.traditional = traditional
        # to do: self.cos and self.sin, (seq_len, dims / 2), float32: of the angle of each position and pair.
        frequencies = base ** (-torch.arange(0, dims, 2).float() / dims)
        angles = torch.arange(seq_len).float()[:, None] * frequencies[None, :]
        self.cos, self.sin = angles.cos(), angles.sin()
        # done

    def __call__(self, x: Tensor, offset: slice | list[slice] | None = None) -> Tensor:
        """Returns x with its positions turned into it; the shape and the dtype stay.

        x: (N, L, H, dims), heads after positions. offset: the positions of x, as a slice of length L; a list has a
        slice for each of the N rows; None stands for slice(0, L). No slice ends beyond seq_len. A point (a, b) that is
        turned by the angle w becomes (a cos w - b sin w, a sin w + b cos w).
        """
        L = x.shape[1]
        # to do: the rows of self.cos and self.sin at these positions, in a shape that broadcasts over N and H; the two
        #        coordinates a and b of all pairs, in float32; turn them; put them back in their places.
        slices = offset if isinstance(offset, list) else [slice(0, L) if offset is None else offset]
        cos = torch.stack([self.cos[positions] for positions in slices])[:, :, None, :]
        sin = torch.stack([self.sin[positions] for positions in slices])[:, :, None, :]
        if self.traditional:
            a, b = x.float()[..., 0::2], x.float()[..., 1::2]
        else:
            a, b = x.float().chunk(2, dim=-1)
        turned = (a * cos - b * sin, a * sin + b * cos)
        joined = torch.stack(turned, dim=-1).flatten(-2) if self.traditional else torch.cat(turned, dim=-1)
        return joined.to(x.dtype)
        # done
