"""llama.cpp behind the face of a runner, so that a model can be verified against it. Needs llama-cpp-python."""

from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np


class LlamaCppRunner:
    """A GGUF file as llama.cpp runs it. It shows logits alone; keys and values are in half precision there."""

    def __init__(self, path: Path | str) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; give a GGUF file")
        try:
            self.model = llama_cpp.Llama(str(path), verbose=False, logits_all=True, n_ctx=0)
        except ValueError as error:
            raise ValueError(f"llama.cpp does not open {path}: {error}") from None

    def forward(
        self, tokens_BT: Sequence[Sequence[int]] | np.ndarray, capture: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """`logits` (B, T, V) of every position."""
        rows = []
        for tokens_T in np.asarray(tokens_BT).tolist():
            self.model.reset()
            self.model.eval(tokens_T)
            rows.append(np.array(self.model.scores[: len(tokens_T)], dtype=np.float32))
        return {"logits": np.stack(rows)}
