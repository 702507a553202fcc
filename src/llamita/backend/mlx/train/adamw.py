"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over fused parameters, and the norm that clipping needs.

`adamw_update` is the paper in a dozen lines; `AdamW.step` computes the same with few passes over memory. Knows nothing
of models, losses or schedules: the learning rate is an argument of each step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from llamita.backend.adamw import AdamWSettings as AdamWSettings
from llamita.backend.adamw import clipping_scale as clipping_scale
from llamita.backend.adamw import saved_state, updates_made
from llamita.backend.mlx.model.fused import FusedParameter
from llamita.backend.mlx.model.weights import array_from_host, host_from_array
from llamita.model.host_array import HostArray


def adamw_update(
    parameter: mx.array,
    gradient: mx.array,
    m: mx.array,
    v: mx.array,
    t: int,
    learning_rate: float,
    settings: AdamWSettings,
    decays: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """Returns `parameter`, `m` and `v` after step t = 1, 2, ...; the readable form."""
    beta1, beta2, epsilon = settings.beta1, settings.beta2, settings.epsilon
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient**2
    if decays:
        parameter = parameter - learning_rate * settings.weight_decay * parameter
    if settings.bias_correction == "textbook":
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        parameter = parameter - learning_rate * m_hat / (mx.sqrt(v_hat) + epsilon)
    else:
        alpha_t = learning_rate * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        parameter = parameter - alpha_t * m / (mx.sqrt(v) + epsilon)
    return parameter, m, v


class AdamW:
    """The same update for all parameters of a model, all operations on a parameter fused into one by `mx.compile`."""

    def __init__(self, parameters: Iterable[FusedParameter], settings: AdamWSettings | None = None) -> None:
        self.settings = settings or AdamWSettings()
        self.parameters = list(parameters)
        self.t = 0
        self._m = [mx.zeros_like(item.parameter) for item in self.parameters]
        self._v = [mx.zeros_like(item.parameter) for item in self.parameters]
        self._update: Callable[..., Any] = mx.compile(self._updated)

    def step(self, gradients: Sequence[mx.array], learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its gradient times `gradient_scale` (what clipping to a norm multiplies by).

        `gradients` are in the order of the parameters.
        """
        self.t += 1
        # m-hat / (sqrt(v-hat) + eps) = sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps sqrt(1 - beta2^t))
        correction = math.sqrt(1 - self.settings.beta2**self.t)
        alpha_t = learning_rate * correction / (1 - self.settings.beta1**self.t)
        epsilon = self.settings.epsilon * (correction if self.settings.bias_correction == "textbook" else 1.0)
        kept = 1 - learning_rate * self.settings.weight_decay
        # As arrays: a number in Python would be built into the compiled function, which is made anew for another.
        scalars = [mx.array(number, dtype=mx.float32) for number in (gradient_scale, alpha_t, epsilon, kept)]
        for i, (item, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            values, self._m[i], self._v[i] = self._update(
                item.parameter, gradient, self._m[i], self._v[i], *scalars, item.weight_decay
            )
            item.replace(values)
        mx.eval([item.parameter for item in self.parameters], self._m, self._v)

    def _updated(
        self,
        parameter: mx.array,
        gradient: mx.array,
        m: mx.array,
        v: mx.array,
        gradient_scale: mx.array,
        alpha_t: mx.array,
        epsilon: mx.array,
        kept: mx.array,
        decays: bool,
    ) -> tuple[mx.array, mx.array, mx.array]:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        gradient = gradient * gradient_scale
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient * gradient
        if decays:
            parameter = parameter * kept
        return parameter - alpha_t * m / (mx.sqrt(v) + epsilon), m, v

    def state(self) -> dict[str, HostArray]:
        """Returns m and v under canonical names (`m.model.norm.weight`), and `t`, the number of steps taken."""
        moments = {
            f"{kind}.{name}": host_from_array(part)
            for kind, moments in (("m", self._m), ("v", self._v))
            for item, moment in zip(self.parameters, moments, strict=True)
            for name, part in zip(item.parts, item.split(moment), strict=True)
        }
        return saved_state(moments, self.t)

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError, naming them, for arrays that are missing or of another shape."""
        self.t = updates_made(state, self.parameters)
        for kind, moments in (("m", self._m), ("v", self._v)):
            for i, item in enumerate(self.parameters):
                parts = [array_from_host(state[f"{kind}.{name}"]) for name in item.parts]
                moments[i] = mx.concatenate(parts).astype(item.parameter.dtype)
        mx.eval(self._m, self._v)


def global_norm(gradients: Sequence[mx.array]) -> mx.array:
    """Returns the Euclidean norm of all gradients laid end to end: a float32 scalar."""
    return mx.sqrt(sum((mx.sum(mx.square(g.astype(mx.float32))) for g in gradients), mx.zeros(())))
