"""mlx-lm with the face of a runner, so that a model can be verified against it layer by layer. Needs mlx-lm.

What a config asks for and mlx-lm would leave out in silence is refused here: else the reference were another model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from llamita.model.config import ModelConfig
from llamita.storage.files import read_json
from llamita.storage.model_directory import load_config, resolve_model_directory


class MlxLmRunner:
    """A model directory as mlx-lm runs it, in float32 on the CPU. ValueError in one line where mlx-lm does not."""

    def __init__(self, model: Path | str) -> None:
        directory = resolve_model_directory(model)
        config = load_config(directory)
        _refuse_what_is_left_out(directory, config)
        try:
            with mx.stream(mx.cpu):
                self.model, _ = load_model(directory, model_config=_completed(directory, config))
                self.model.set_dtype(mx.float32)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"mlx-lm does not run {directory}: {' '.join(str(error).split())}") from None
        self.window = config.sliding_window
        self.seen: dict[str, mx.array] = {}
        body = self.model.model
        body.layers = [_Watched(layer, f"layers.{number}", self.seen) for number, layer in enumerate(body.layers)]
        body.layers[0].name_of_input = "embedding"  # as it goes in: some families multiply what was looked up
        body.norm = _Watched(body.norm, "norm", self.seen)

    def forward(
        self, tokens_BT: Sequence[Sequence[int]] | np.ndarray, capture: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Returns `logits` (B, T, V), and the residual stream at the places in `capture`, named as by
        `TorchRunner.forward`."""
        tokens = np.asarray(tokens_BT, dtype=np.int32)
        if self.window and tokens.shape[1] > self.window:
            raise ValueError(
                f"mlx-lm lets every position see all before it, and this model sees sliding_window={self.window} of "
                f"them; compare at most {self.window} tokens, not {tokens.shape[1]}"
            )
        with mx.stream(mx.cpu):
            self.seen["logits"] = self.model(mx.array(tokens))
            return {name: np.array(self.seen[name], dtype=np.float32) for name in (*capture, "logits")}


class _Watched:
    """A module of mlx-lm's whose output is kept, and its input under `name_of_input`; all else is as before."""

    name_of_input = ""

    def __init__(self, module: Any, name: str, seen: dict[str, mx.array]) -> None:
        self._module, self._name, self._seen = module, name, seen

    def __call__(self, *inputs: Any, **named: Any) -> mx.array:
        if self.name_of_input:
            self._seen[self.name_of_input] = inputs[0]
        output = self._module(*inputs, **named)
        self._seen[self._name] = output
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _completed(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Returns the settings whose defaults are not those of mlx-lm, or whose keys mlx-lm does not read."""
    said, whole = read_json(directory / "config.json"), config.to_dict()
    missing = {key: value for key, value in whole.items() if said.get(key) is None}
    # Kinds of layers are for windows, which `forward` looks after; a list of sliding ones alone stops mlx-lm.
    return missing | {"rope_scaling": whole["rope_scaling"], "layer_types": None}


def _refuse_what_is_left_out(directory: Path, config: ModelConfig) -> None:
    scaling, left_out = config.rope_scaling, []
    if config.num_labels:
        left_out.append(f"num_labels={config.num_labels}")
    if scaling is not None and scaling.attention_factor is not None:
        left_out.append(f"attention_factor={scaling.attention_factor}")
    if scaling is not None and (scaling.mscale is None) != (scaling.mscale_all_dim is None):
        left_out.append("mscale without mscale_all_dim, or the other way round")
    if scaling is not None and not scaling.truncate:
        left_out.append("truncate=false")
    if left_out:
        raise ValueError(f"mlx-lm does not run {directory}: it has nothing for {', '.join(left_out)}")
