"""Gradients that are not allowed to be large: clipped by their common norm.

Source: Pascanu, Mikolov and Bengio 2013 (https://arxiv.org/abs/1211.5063), algorithm 1.
"""

from torch import Tensor


def global_norm(gradients: dict[str, Tensor]) -> Tensor:
    """Returns the length of all gradients laid end to end as one vector: a scalar array of the framework.

    gradients: by the parameter's name, of any shapes.
    """
    # to do: the root of the sum of all squares.
    return sum((gradient * gradient).sum() for gradient in gradients.values()) ** 0.5
    # done


def clipped(gradients: dict[str, Tensor], limit: float) -> tuple[dict[str, Tensor], Tensor]:
    """Returns (gradients, norm): all multiplied by one number, so that their global norm is at most `limit`.

    The number is limit / (norm + 1e-6) where that is below 1, else 1: short gradients stay as they are. `norm` is the
    global norm before. What is passed in stays as it is.
    """
    # to do: the norm, the number, the products.
    norm = global_norm(gradients)
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    return {name: gradient * scale for name, gradient in gradients.items()}, norm
    # done
