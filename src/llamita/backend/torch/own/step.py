"""One update of a model whose modules somebody has written in the course: their model and their AdamW, our losses.

Gradients over micro-batches, clipping and random numbers are those of train/step.py. Knows nothing of where their
files are.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita.backend.adamw import AdamWSettings
from llamita.backend.objectives import Classification, NextToken, Objective
from llamita.backend.torch.model.fused import FusedParameter
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.own.min_llama import MinLlamaModel
from llamita.backend.torch.own.runner import OwnRunner, llama_runner
from llamita.backend.torch.train.objectives import Hidden, LossFunction, LossOutput, TensorBatch
from llamita.backend.torch.train.scorer import ChosenPrecision
from llamita.backend.torch.train.step import TorchTrainStep
from llamita.data.batches import IGNORE_INDEX
from llamita.model.host_array import HostArray

OWN = "own."
"""Begins the names of what their AdamW keeps, in a saved state."""
Number = int | float


class OwnTrainStep(TorchTrainStep):
    """Their model with their AdamW, in one process."""

    model: MinLlamaModel  # type: ignore[assignment] # what is asked of it here, it has

    def __init__(
        self,
        model: MinLlamaModel,
        settings: AdamWSettings | None = None,
        *,
        objective: Objective = NextToken(),  # noqa: B008 - it is frozen
        trainable: Callable[[str], bool] | None = None,
        max_grad_norm: float = 0.0,
        precision: ChosenPrecision = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,  # type: ignore[arg-type]
            settings,
            objective=objective,
            trainable=trainable,
            max_grad_norm=max_grad_norm,
            precision=precision,
            seed=seed,
            make_optimizer=lambda trained, adamw, muon, precision: OwnAdamW(model, trained, adamw or AdamWSettings()),
        )

    def loss_function(self, objective: Objective, training: bool) -> LossFunction:
        """Returns the function that computes an objective: a classification from what their classifier gives."""
        if isinstance(objective, Classification):
            return functools.partial(classification_loss, objective, self.model.pad_id)
        return super().loss_function(objective, training)

    def output(self, hidden: Hidden, training: bool = False) -> tuple[Hidden, OutputHead]:
        """Returns hidden states and the output matrix, as losses take them; with dropout while `training`.

        In the place of hidden states a classification takes the log-probabilities of labels.
        """
        if self.model.config.num_labels:
            return functools.partial(self.model.label_log_probs, training=training), self.model.head
        return super().output(hidden, training)

    def weights(self) -> dict[str, HostArray]:
        """Returns the float32 weights under canonical names."""
        return self.model.host_arrays()

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        """Goes on from what `weights()` and `state()` gave; ValueError lists what is missing or misshapen."""
        self.model.load_host_arrays(arrays)
        self.optimizer.load_state(state)

    def runner(self) -> OwnRunner:  # type: ignore[override] # both are runners of the contract
        """Returns a runner over the weights as they are now."""
        return llama_runner(self.model)

    def conditions(self) -> dict[str, Any]:
        """Returns all that the last bits of a result depend on besides the configuration, the data and their code."""
        return super().conditions() | {"code": "the course's"}


def classification_loss(
    objective: Classification, pad_id: int, label_log_probs: Hidden, head: OutputHead, batch: TensorBatch
) -> LossOutput:
    """Returns -log p of each text's label by their classifier, and counts the labels that are likeliest.

    A text ends at its label; their classifier finds that place by what pads the rest of the row.
    """
    scored_BT = batch.labels_BT != IGNORE_INDEX
    last_B = scored_BT.long().argmax(dim=-1)
    labels_B = batch.labels_BT.gather(-1, last_B[:, None])[:, 0]
    positions_T = torch.arange(scored_BT.shape[1], device=scored_BT.device)
    tokens_BT = batch.tokens_BT.masked_fill(positions_T > last_B[:, None], pad_id)
    log_probs_BV = label_log_probs(tokens_BT)
    nats_B = -log_probs_BV.gather(-1, labels_B[:, None])[:, 0]
    if objective.class_weights:
        nats_B = nats_B * torch.tensor(objective.class_weights, device=nats_B.device)[labels_B]
    return LossOutput(nats_B.sum(), {"accuracy": (log_probs_BV.argmax(-1) == labels_B).float().sum()})


class OwnAdamW:
    """Their AdamW over a model's parameters, with the settings of the library's.

    It decays after the update rather than before, by `learning_rate * weight_decay` of it less. Its `eps` is the
    epsilon-hat of the efficient form; for `bias_correction` "textbook" it is set anew for each update, so that the two
    forms are the same number (end of section 2 of Kingma & Ba 2015, arXiv:1412.6980).
    """

    def __init__(self, model: MinLlamaModel, parameters: Sequence[FusedParameter], settings: AdamWSettings) -> None:
        self.model, self.settings = model, settings
        self.parameters = list(parameters)
        self.t = 0
        groups = [
            {"params": found, "weight_decay": settings.weight_decay if decays else 0.0}
            for decays in (True, False)
            if (found := [item.parameter for item in self.parameters if item.weight_decay is decays])
        ]
        betas = (settings.beta1, settings.beta2)
        self._optimizer = model.make_optimizer(
            groups, lr=0.0, betas=betas, eps=settings.epsilon, weight_decay=settings.weight_decay, correct_bias=True
        )

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Updates every parameter from its `.grad`, which is multiplied by `gradient_scale`."""
        self.t += 1
        epsilon = self.settings.epsilon
        if self.settings.bias_correction == "textbook":
            epsilon *= math.sqrt(1 - self.settings.beta2**self.t)
        if gradient_scale != 1.0:
            for item in self.parameters:
                if item.parameter.grad is not None:
                    item.parameter.grad.mul_(gradient_scale)
        for group in self._optimizer.param_groups:
            group["lr"], group["eps"] = learning_rate, epsilon
        with self.model.program.guard():
            self._optimizer.step()

    def moments(self) -> dict[str, Tensor]:
        """Returns the tensors that their AdamW keeps, by the names that it has for them and those of parameters."""
        return {
            f"{OWN}{key}.{item.name}": value
            for item, key, value in self._kept()
            if isinstance(value, Tensor) and value.shape == item.parameter.shape
        }

    def state(self) -> dict[str, HostArray]:
        """Returns what their AdamW keeps of each parameter, whatever its names are, and `t`, the number of updates."""
        found = {"t": HostArray.from_numpy(np.array([self.t], dtype=np.int64))}
        for item, key, value in self._kept():
            name = f"{OWN}{key}.{item.name}"
            if isinstance(value, Tensor) and value.shape == item.parameter.shape:
                found[name] = self.model.to_host(item.name, value)
            elif isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1):
                number = value.item() if isinstance(value, Tensor) else value
                kind = np.int64 if isinstance(number, int) else np.float64
                found[name] = HostArray.from_numpy(np.array([number], dtype=kind))
            else:
                raise ValueError(
                    f"your AdamW keeps {key!r} of a parameter as {type(value).__name__}; a checkpoint holds numbers "
                    "and tensors of the parameter's shape"
                )
        return found

    def load_state(self, state: Mapping[str, HostArray]) -> None:
        """Takes over what `state()` gave; ValueError for the state of another optimiser."""
        if "t" not in state or not any(name.startswith(OWN) for name in state):
            raise ValueError("the saved state is not of the course's AdamW; the run was begun without --with")
        self.t = int(state["t"].to_numpy()[0])
        for item in self.parameters:
            kept = self._optimizer.state[item.parameter]
            for name, array in state.items():
                if not name.startswith(OWN) or not name.endswith(f".{item.name}"):
                    continue
                key = name.removeprefix(OWN).removesuffix(f".{item.name}")
                if array.dtype in ("I64", "F64"):
                    kept[key] = array.to_numpy()[0].item()
                else:
                    kept[key] = self.model.from_host(item.name, array).to(item.parameter.device)

    def _kept(self) -> list[tuple[FusedParameter, str, Any]]:
        """Returns what is kept of each parameter, and under which key."""
        return [
            (item, str(key), value)
            for item in self.parameters
            for key, value in self._optimizer.state.get(item.parameter, {}).items()
        ]
