"""Rotary position embeddings: each pair of a head's numbers is turned by an angle that grows with the position.

Source: Su et al. 2021, RoFormer (https://arxiv.org/abs/2104.09864), section 3.2.2 and equation 34.
"""

import torch


def apply_rotary_emb(
    query: torch.Tensor,
    key: torch.Tensor,
    head_dim: int,
    max_seq_len: int,
    theta: float = 10000.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the query and the key with their positions turned into them.

    query: (batch, seqlen, query heads, head_dim). key: (batch, seqlen, key heads, head_dim). Both come back in their
    own shape and number type. The first position is 0. Pairs are interleaved, as in llama2.c: numbers 2i and 2i + 1 of
    a head are the two coordinates of one point, which is turned by position * theta ** (-2i / head_dim) radians.

    max_seq_len: the most positions that the model is made for; seqlen is never more.
    """
    seqlen = query.shape[1]
    assert seqlen <= max_seq_len

    # The two coordinates of each pair: (batch, seqlen, heads, head_dim / 2).
    query_real, query_imag = query.float().unflatten(-1, (-1, 2)).unbind(-1)
    key_real, key_imag = key.float().unflatten(-1, (-1, 2)).unbind(-1)

    # to do: 1. the angle of each position and pair, (seqlen, head_dim / 2); 2. its cosine and sine, in a shape that
    #        broadcasts over batch and heads; 3. turn each point; 4. put the coordinates next to each other again.
    pairs = torch.arange(0, head_dim, 2, device=query.device).float()
    frequencies = theta ** (-pairs / head_dim)
    positions = torch.arange(seqlen, device=query.device).float()
    angles = positions[:, None] * frequencies[None, :]
    cos, sin = angles.cos()[None, :, None, :], angles.sin()[None, :, None, :]

    def turned(real: torch.Tensor, imag: torch.Tensor) -> torch.Tensor:
        return torch.stack((real * cos - imag * sin, real * sin + imag * cos), dim=-1).flatten(-2)

    query_out, key_out = turned(query_real, query_imag), turned(key_real, key_imag)
    # done
    return query_out.type_as(query), key_out.type_as(key)
