"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over fused parameters, and the norm that clipping needs.

`adamw_update` is the paper in a dozen lines; `AdamW.step` computes the same with few passes over memory. Knows nothing
of models, losses or schedules: the learning rate is an argument of each step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llamita.backend.adamw import AdamWSettings as AdamWSettings
from llamita.backend.adamw import clipping_scale as clipping_scale
from llamita.backend.adamw import saved_state, updates_made
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.weights import host_from_tensor, tensor_from_host
from llamita.model.host_array import HostArray

BUCKET_NUMBERS = 256 * 1024
"""Numbers per array that one pass works on, on a CPU: few enough to stay in its caches between operations."""


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
    """The same update for all parameters of a model, bucket by bucket, with foreach operations.

    On a CPU a bucket is small enough to stay in the caches over its eight operations, so that memory is read and
    written about once; elsewhere all parameters that decay are one bucket, and all others another.
    """

    def __init__(self, parameters: Iterable[FusedParameter], settings: AdamWSettings | None = None) -> None:
        self.settings = settings or AdamWSettings()
        self.parameters = list(parameters)
        self.t = 0
        tensors = [item.parameter for item in self.parameters]
        self._tensors = tensors
        self._m = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in tensors]
        self._v = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in tensors]
        on_cpu = all(p.device.type == "cpu" for p in tensors)
        self._bucket_numbers = BUCKET_NUMBERS if on_cpu else max((p.numel() for p in tensors), default=1)
        self._buckets = self._make_buckets(None if not on_cpu else BUCKET_NUMBERS)

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its `.grad` times `gradient_scale` (what clipping to a norm multiplies by)."""
        self.t += 1
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        # m-hat / (sqrt(v-hat) + eps) = sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps sqrt(1 - beta2^t))
        correction = math.sqrt(1 - beta2**self.t)
        alpha_t = learning_rate * correction / (1 - beta1**self.t)
        epsilon = self.settings.epsilon * (correction if self.settings.bias_correction == "textbook" else 1.0)
        gradients = self._gradient_pieces()
        for bucket in self._buckets:
            g = [gradients[i] for i in bucket.pieces]
            if gradient_scale != 1.0:
                torch._foreach_mul_(g, gradient_scale)
            torch._foreach_lerp_(bucket.m, g, 1 - beta1)
            torch._foreach_mul_(bucket.v, beta2)
            torch._foreach_addcmul_(bucket.v, g, g, 1 - beta2)
            denominators = torch._foreach_sqrt(bucket.v)
            torch._foreach_add_(denominators, epsilon)
            if bucket.decays and self.settings.weight_decay:
                torch._foreach_mul_(bucket.parameters, 1 - learning_rate * self.settings.weight_decay)
            torch._foreach_addcdiv_(bucket.parameters, bucket.m, denominators, -alpha_t)

    def state(self) -> dict[str, HostArray]:
        """Returns m and v under canonical names (`m.model.norm.weight`), and `t`, the number of steps taken."""
        return saved_state({name: host_from_tensor(view) for name, view in self._canonical_moments().items()}, self.t)

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError, naming them, for arrays that are missing or of another shape."""
        self.t = updates_made(state, self.parameters)
        for name, target in self._canonical_moments().items():
            target.copy_(tensor_from_host(state[name]))

    def _canonical_moments(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": view
            for kind, moments in (("m", self._m), ("v", self._v))
            for item, moment in zip(self.parameters, moments, strict=True)
            for name, view in zip(item.parts, item.split(moment), strict=True)
        }

    def _gradient_pieces(self) -> list[torch.Tensor]:
        pieces: list[torch.Tensor] = []
        for item, parameter in zip(self.parameters, self._tensors, strict=True):
            assert parameter.grad is not None, f"{item.name} has no gradient"
            pieces += parameter.grad.reshape(-1).split(self._bucket_numbers)
        return pieces

    def _make_buckets(self, limit: int | None) -> list["_Bucket"]:
        """Fills buckets with pieces of at most `limit` numbers in all, those that decay apart from the others."""
        pieces = [
            piece
            for p, m, v in zip(self._tensors, self._m, self._v, strict=True)
            for piece in zip(*(x.detach().view(-1).split(self._bucket_numbers) for x in (p, m, v)), strict=True)
        ]
        decays = [
            item.weight_decay for item, p in zip(self.parameters, self._tensors, strict=True)
            for _ in range(-(-p.numel() // self._bucket_numbers))
        ]  # fmt: skip
        buckets: list[_Bucket] = []
        for kind in (True, False):
            used = None
            for number, (p, m, v) in enumerate(pieces):
                if decays[number] is not kind:
                    continue
                if used is None or (limit is not None and used + p.numel() > limit):
                    buckets.append(_Bucket([], [], [], [], kind))
                    used = 0
                bucket = buckets[-1]
                bucket.parameters.append(p)
                bucket.m.append(m)
                bucket.v.append(v)
                bucket.pieces.append(number)
                used += p.numel()
        return buckets


@dataclass(frozen=True)
class _Bucket:
    """Flat pieces that are updated together; `pieces` are their places among all pieces of all parameters."""

    parameters: list[torch.Tensor]
    m: list[torch.Tensor]
    v: list[torch.Tensor]
    pieces: list[int]
    decays: bool


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the Euclidean norm of all gradients laid end to end: a float32 scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32))))
