"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over fused parameters, and the norm that clipping needs.

`adamw_update` is the paper in a dozen lines; `AdamW.step` computes the same in one pass over memory. Knows nothing of
models, losses or schedules: the learning rate is an argument of each step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.optim.adamw import adamw

from llamita.backend.adamw import AdamWSettings as AdamWSettings
from llamita.backend.adamw import clipping_scale as clipping_scale
from llamita.backend.adamw import saved_state, updates_made
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.weights import host_from_tensor, tensor_from_host
from llamita.backend.torch.train.sharded import gradient_of, local, local_part, whole
from llamita.model.host_array import HostArray


def adamw_update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: int,
    learning_rate: float,
    settings: AdamWSettings,
    decays: bool = True,
) -> None:
    """Updates `parameter`, `m` and `v` in place at step t = 1, 2, ...; the readable form."""
    beta1, beta2, epsilon = settings.beta1, settings.beta2, settings.epsilon
    m.copy_(beta1 * m + (1 - beta1) * gradient)
    v.copy_(beta2 * v + (1 - beta2) * gradient**2)
    if decays:
        parameter -= learning_rate * settings.weight_decay * parameter
    if settings.bias_correction == "textbook":
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        parameter -= learning_rate * m_hat / (v_hat.sqrt() + epsilon)
    else:
        alpha_t = learning_rate * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        parameter -= alpha_t * m / (v.sqrt() + epsilon)


class AdamW:
    """The same update for all parameters of a model by PyTorch's fused kernel, which passes over memory once.

    Parameters may be sharded over processes: moments are sharded alike, and each process updates its part.
    """

    def __init__(self, parameters: Iterable[FusedParameter], settings: AdamWSettings | None = None) -> None:
        self.settings = settings or AdamWSettings()
        self.parameters = list(parameters)
        self.t = 0
        tensors = [item.parameter for item in self.parameters]
        assert all(p.is_contiguous() for p in tensors), "the kernel reads numbers as they lie in memory"
        self._m = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in tensors]
        self._v = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in tensors]

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its `.grad` times `gradient_scale` (what clipping to a norm multiplies by).

        The gradients may be scaled in place.
        """
        self.t += 1
        settings = self.settings
        epsilon = settings.epsilon
        if settings.bias_correction == "efficient":
            # The kernel's form is the textbook's, and this the same number:
            # alpha_t m / (sqrt(v) + eps) = learning_rate m-hat / (sqrt(v-hat) + eps / sqrt(1 - beta2^t))
            epsilon /= math.sqrt(1 - settings.beta2**self.t)
        divisor = None if gradient_scale == 1.0 else torch.tensor(1 / gradient_scale, dtype=torch.float32)
        rows = [row for row in zip(self.parameters, self._m, self._v, strict=True) if local(row[1]).numel()]
        for decays in (True, False):
            group = [row for row in rows if row[0].weight_decay is decays]
            if not group:
                continue
            device = group[0][0].parameter.device
            adamw(
                params=[local(item.parameter) for item, _, _ in group],
                # In the order of memory: the kernel on a CPU takes no notice of strides.
                grads=[local(gradient_of(item)).contiguous() for item, _, _ in group],
                exp_avgs=[local(m) for _, m, _ in group],
                exp_avg_sqs=[local(v) for _, _, v in group],
                max_exp_avg_sqs=[],
                state_steps=list(torch.full((len(group),), self.t - 1.0, device=device).unbind()),  # it adds 1
                fused=True,
                grad_scale=divisor,
                amsgrad=False,
                beta1=settings.beta1,
                beta2=settings.beta2,
                lr=learning_rate,
                weight_decay=settings.weight_decay if decays else 0.0,
                eps=epsilon,
                maximize=False,
            )

    def state(self) -> dict[str, HostArray]:
        """Returns m and v under canonical names (`m.model.norm.weight`), and `t`, the number of steps taken."""
        return saved_state({name: host_from_tensor(whole(view)) for name, view in self.moments().items()}, self.t)

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError, naming them, for arrays that are missing or of another shape."""
        self.t = updates_made(state, self.parameters)
        for name, target in self.moments().items():
            local(target).copy_(local_part(tensor_from_host(state[name]).to(target.device), target))

    def moments(self) -> dict[str, torch.Tensor]:
        """Returns the tensors of the state themselves under canonical names, sharded as the parameters are."""
        return {
            f"{kind}.{name}": view
            for kind, moments in (("m", self._m), ("v", self._v))
            for item, moment in zip(self.parameters, moments, strict=True)
            for name, view in zip(item.parts, item.split(moment), strict=True)
        }


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the Euclidean norm of all gradients laid end to end: a float32 scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32))))
