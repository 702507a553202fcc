"""AdamW: Adam with weight decay that does not pass through the gradient.

Sources: Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), algorithm 1 and the end of section 2; Loshchilov and
Hutter 2019 (https://arxiv.org/abs/1711.05101), algorithm 2.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    """The optimiser that the classifier is trained with."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"lr={lr} must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas={betas} must each be at least 0 and less than 1")
        if eps < 0.0:
            raise ValueError(f"eps={eps} must not be negative")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Updates every parameter that has a gradient, in place. There is no schedule: lr is the learning rate.

        With g the gradient, m and v the running means of it and of its square, which begin as zeros, and t the number
        of this step, which for each parameter begins at 1:

            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            alpha = lr * sqrt(1 - beta2 ** t) / (1 - beta1 ** t)     (lr alone without correct_bias)
            parameter = parameter - alpha * m / (sqrt(v) + eps)
            parameter = parameter - lr * weight_decay * parameter    (of the parameter just updated)

        The third line is the efficient form of the bias correction (Kingma and Ba, end of section 2). The state of a
        parameter is `self.state[parameter]`, a dictionary, empty at first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
            beta1, beta2 = group["betas"]
            correct_bias = group["correct_bias"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                state = self.state[p]
                # to do: create the state at the first step; update the running means; the step's size with the bias
                #        corrected; the update; then the weight decay.
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_((1 - beta1) * grad)
                v.mul_(beta2).add_((1 - beta2) * grad * grad)
                alpha = lr
                if correct_bias:
                    alpha = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.sub_(alpha * m / (v.sqrt() + eps))
                p.sub_(lr * weight_decay * p)
                # done
        return loss
