"""The Python face of the library: `llamita.load` and `llamita.save`."""

from pathlib import Path
from typing import Literal

from llamita.inference.llm import LLM


def load(
    model: Path | str,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    threads: int = 0,
) -> LLM:
    """Load a language model: a Hugging Face model directory, a training run, or a name on the hub (`owner/name`).

    `dtype` is that of weights and cache, "auto" that of the file; `device` is "cpu", "cuda", or "auto" for a GPU where
    there is one; `threads` 0 leaves PyTorch's choice. The result generates (`generate`, `stream`), gives logits and
    residual streams (`runner.forward`), and is saved by `save`. FileNotFoundError or ValueError, in one line, where the
    model is missing, broken, or of a kind that Llamita does not have.
    """
    from llamita.torch_backend.runner import load_runner

    return LLM.load(model, lambda directory: load_runner(directory, dtype, device, threads))


def save(model: LLM, path: Path | str, overwrite: bool = False) -> None:
    """Write a model as a Hugging Face model directory, whole or not at all.

    FileExistsError where the path exists, unless `overwrite`.
    """
    model.save(path, overwrite)
