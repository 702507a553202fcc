"""AdamW: each parameter moves by a step of about the same size, and decays apart from its gradient.

Sources: Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), algorithm 1; Loshchilov and Hutter 2019
(https://arxiv.org/abs/1711.05101), algorithm 2.
"""

import mlx.core as mx


def adamw_update(
    parameter: mx.array,
    gradient: mx.array,
    m: mx.array,
    v: mx.array,
    t: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns (parameter, m, v) after an update; what is passed in stays as it is. All have the parameter's shape.

    m and v are the running means of the gradient and of its square, both zeros before the first update, which has
    t = 1. As PyTorch does, and in this order:

        parameter loses learning_rate * weight_decay * parameter
        m = beta1 m + (1 - beta1) gradient            v = beta2 v + (1 - beta2) gradient^2
        m_hat = m / (1 - beta1^t)                     v_hat = v / (1 - beta2^t)
        parameter loses learning_rate * m_hat / (sqrt(v_hat) + epsilon)

    The m and v that are returned are those without hats.
    """
    # to do: the lines above.
    parameter = parameter - learning_rate * weight_decay * parameter
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    parameter = parameter - learning_rate * m_hat / (v_hat.sqrt() + epsilon)
    return parameter, m, v
    # done


def decays(parameter: mx.array) -> bool:
    """Returns whether weight decay is for this parameter: for two axes or more (matrices, embeddings), not for fewer.

    A vector is a norm's weight or a bias: it sets a size, and there are few of them.
    """
    # to do: one line.
    return parameter.ndim >= 2
    # done


class AdamW:
    """The optimiser of a whole model: the means of every parameter, by name."""

    def __init__(
        self, beta1: float = 0.9, beta2: float = 0.95, epsilon: float = 1e-8, weight_decay: float = 0.1
    ) -> None:
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay
        self.t = 0
        self.means: dict[str, tuple[mx.array, mx.array]] = {}

    def update(
        self, parameters: dict[str, mx.array], gradients: dict[str, mx.array], learning_rate: float
    ) -> dict[str, mx.array]:
        """Returns the parameters after one more update; the optimiser keeps their means."""
        self.t += 1
        updated = {}
        for name, parameter in parameters.items():
            m, v = self.means.get(name, (0 * parameter, 0 * parameter))
            decay = self.weight_decay if decays(parameter) else 0.0
            updated[name], m, v = adamw_update(
                parameter, gradients[name], m, v, self.t, learning_rate, self.beta1, self.beta2, self.epsilon, decay
            )
            self.means[name] = m, v
        return updated
