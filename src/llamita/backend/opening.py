"""Opens what a runner is made from: a model directory, or an adapter's over its base, and further adapters beside it.

Written once for every backend, which builds its model from these host arrays. Knows no framework and no device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamita.backend import processor
from llamita.model import host_array
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter
from llamita.storage import model_directory, peft_directory

DTYPES = ("float32", "bfloat16", "float16")
"""The types that weights and cache may have while a model runs."""
OWN = ""
"""The name of the adapter that was opened as a model, or that is in training."""


@dataclass(frozen=True)
class OpenedModel:
    """A model on disk: mapped arrays, the adapters over it by name, and the one that is the model's own, if any."""

    config: ModelConfig
    arrays: Mapping[str, HostArray]
    adapters: Mapping[str, Adapter]
    default: str | None
    dtype: str
    """One of DTYPES: what was asked for, or for "auto" what config.json says, else that of the file (bfloat16 for the
    activations of a quantised model), or float32 on a CPU that multiplies that slowly."""
    dtype_reason: str
    """Why it is that one, in a few words."""


def open_model(
    model: Path | str,
    dtype: str = "auto",
    adapters: Mapping[str, Path] | None = None,
    on_cpu: bool = False,
    quantized_dtype: str = "bfloat16",
) -> OpenedModel:
    """Opens a model directory, the best checkpoint of a run, a GGUF file, a name on the hub, or an adapter over its
    base.

    `adapters` are further ones over the same base, by name. `on_cpu`: it will run on a CPU. `quantized_dtype` is what
    the kernels over quantised weights take best. ValueError or OSError, in one line, for what does not fit.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not supported; give auto or one of {', '.join(DTYPES)}")
    directory = model_directory.resolve_model_directory(model)
    own = peft_directory.open_adapter(directory) if peft_directory.is_adapter(directory) else None
    base = own.base if own else directory
    config = own.adapter.config if own else model_directory.load_config(directory)
    arrays = model_directory.load_tensors(base)
    named = peft_directory.open_beside(adapters or {}, base, arrays)
    if own is not None:
        arrays = own.adapter.over(arrays)
        named[OWN] = own.adapter
    reason = "asked for"
    if dtype == "auto":
        asked = model_directory.stored_dtype(base)
        dtype, reason = _dtype_of(config, arrays, asked, on_cpu, quantized_dtype)
    return OpenedModel(config, arrays, named, OWN if own else None, dtype, reason)


def _dtype_of(
    config: ModelConfig, arrays: Mapping[str, HostArray], asked: str | None, on_cpu: bool, quantized_dtype: str
) -> tuple[str, str]:
    """Returns the type that "auto" stands for, and why; `asked` is what config.json says."""
    if config.quantization:
        return quantized_dtype, f"the kernels over {config.quantization} take it"
    stored = host_array.DTYPE_NAMES.get(next((array.dtype for array in arrays.values()), "F32"), "float32")
    stored = asked if asked in DTYPES else stored
    if stored not in DTYPES:
        return "float32", f"nothing runs in the file's {stored}"
    if on_cpu and not processor.multiplies(stored):
        return "float32", f"the file has {stored}, for which this processor has no instructions"
    return stored, "the file's own"
