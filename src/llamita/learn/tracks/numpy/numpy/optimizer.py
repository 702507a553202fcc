"""AdamW (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980; Loshchilov and Hutter 2019,
https://arxiv.org/abs/1711.05101)."""

import numpy as np


class AdamW:
    """Updates arrays in place by their gradients; the defaults are PyTorch's."""

    def __init__(
        self,
        parameters: dict[str, np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.parameters = parameters
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.m = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.v = {name: np.zeros_like(array) for name, array in parameters.items()}

    def step(self, gradients: dict[str, np.ndarray]) -> None:
        """Updates every parameter, in place. gradients: an array of the same shape for each name.

        With g the gradient and t the number of this step, 1 for the first:

            parameter = parameter - lr * weight_decay * parameter
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            parameter = parameter - lr * (m / (1 - beta1 ** t)) / (sqrt(v / (1 - beta2 ** t)) + eps)

        m and v are `self.m[name]` and `self.v[name]`, and are kept there for the next step. The gradients are not
        changed. `a -= b` and `a[...] = b` change the array itself; `a = b` only gives the name to another array.
        """
        beta1, beta2 = self.betas
        # to do: count the step; then the four lines for each parameter.
        self.steps += 1
        for name, parameter in self.parameters.items():
            g = gradients[name]
            parameter -= self.lr * self.weight_decay * parameter
            self.m[name] = beta1 * self.m[name] + (1 - beta1) * g
            self.v[name] = beta2 * self.v[name] + (1 - beta2) * g * g
            m = self.m[name] / (1 - beta1**self.steps)
            v = self.v[name] / (1 - beta2**self.steps)
            parameter -= self.lr * m / (np.sqrt(v) + self.eps)
        # done
