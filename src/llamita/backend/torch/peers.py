"""transformers behind the face of a runner, so that a model can be verified against it layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from llamita.storage.model_directory import resolve_model_directory


class TransformersRunner:
    """A model directory as transformers runs it, in float32 on the CPU."""

    def __init__(self, model: Path | str) -> None:
        directory = resolve_model_directory(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        ).eval()

    @torch.inference_mode()
    def forward(
        self, tokens_BT: Sequence[Sequence[int]] | np.ndarray, capture: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Returns `logits` (B, T, V), and the residual stream at the places in `capture`, named as by
        `TorchRunner.forward`."""
        body = self.model.model
        places = {"embedding": body.embed_tokens, "norm": body.norm}
        places |= {f"layers.{number}": layer for number, layer in enumerate(body.layers)}
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        hooks = [
            places[name].register_forward_hook(lambda module, given, output, name=name: keep(name, output))
            for name in capture
        ]
        try:
            logits = self.model(torch.as_tensor(np.asarray(tokens_BT, dtype=np.int64)), use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return {name: x.float().numpy() for name, x in {**seen, "logits": logits}.items()}
