"""Compares AdamW with weights that a plain float64 computation reached after 100 steps."""

import torch

from optimizer import AdamW

START = [[0.5, -0.25, 0.125], [-0.75, 0.375, 0.25]]
AFTER_100_STEPS = [[0.90948778, 0.37378335, 0.21344949], [-0.4518894, 0.12380771, -0.32533122]]


def trained(optimizer_class: type) -> torch.Tensor:
    """Fits a 3 by 2 matrix to a fixed one. The inputs are small whole numbers, so no random numbers are needed."""
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = optimizer_class([weight], lr=1e-2, weight_decay=0.1, correct_bias=True)
    for step in range(100):
        optimizer.zero_grad()
        x = torch.tensor([float(step * factor % 7 - 3) for factor in (1, 2, 3)]) / 3
        error = weight @ x - torch.stack((x[0] + x[1], -x[2]))
        (error**2).sum().backward()
        optimizer.step()
    return weight.detach()


if __name__ == "__main__":
    torch.testing.assert_close(trained(AdamW), torch.tensor(AFTER_100_STEPS), atol=1e-5, rtol=1e-4)
    print("Optimizer test passed!")
