"""Compares apply_rotary_emb with the four numbers that a head of size 4 has at position 1."""

import torch
from rope import apply_rotary_emb

# (1, 1) turned by 1 radian, and by 0.01, which is 10000 ** (-2 / 4). Position 0 is not turned.
AT_POSITION_1 = [-0.30116868, 1.38177329, 0.98995017, 1.00994983]

if __name__ == "__main__":
    query, key = apply_rotary_emb(2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4), 4, 20)
    expected = torch.tensor([[1.0] * 4, AT_POSITION_1])[None, :, None, :].expand(1, 2, 2, 4)
    torch.testing.assert_close(query, 2 * expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key, 3 * expected, atol=1e-5, rtol=1e-5)
    print("Rotary embedding test passed!")
