"""The two backends hold the same files, and in these the same public names with parameters of the same names.

What differs is listed here with its reason; a file or a name that one of them gains without the other fails.
"""

import importlib
import inspect
from pathlib import Path

import pytest

import llamita

pytest.importorskip("mlx.core", reason="mlx is not installed")

PACKAGE = Path(llamita.__file__).parent

FILES_LACKING = {
    "prepacked": "the order of oneDNN's kernels",
    "decode_graphs": "CUDA's graphs",
    "paged_decode": "kernels of Triton",
    "dropout": "attention.Dropout, which holds the key it draws from",
    "exact": "bits that do not depend on the batch: MLX does not say how its kernels sum",
    "peers": "each wraps another library to verify against: transformers there, mlx-lm here",
    "pickles": "PyTorch's own files, converted once for every backend",
}
NAMES_LACKING = {
    "attention.attention_by_products": "goes round a kernel of PyTorch's CPU that is slow in bfloat16",
    "attention.attention_by_query_tiles": "the same",
    "layers.RopeTable": "MLX's kernel computes the angles as it goes",
    "model.Block.drop": "attention.Dropout, which holds the key it draws from",
    "kv_cache.CacheStep": "only CUDA's graphs are another step than PagedStep",
    "paged_attention.ExactAttention": "no exact mode",
    "paged_attention.TableAttention": "kernels of Triton",
    "paged_attention.Span.gather": "Span.read and gather",
    "quantize.dequantize_blocks": "the order of PyTorch's int4 kernel",
    "quantize.from_blocks": "the same",
    "quantize.scales_and_zeros": "the same",
    "quantize.to_blocks": "the same",
    "quantize.int4_product": "product: one kernel of MLX takes both",
    "quantize.int8_product": "product",
    "quantize.kernel_fits": "packs",
    "devices.evaluation": "dropout is passed, so there is none to switch off",
    "devices.table_kernel": "Triton's",
    "devices.fast_few_rows": "a setting of PyTorch's threads",
    "sampling.nucleus": "most_probable",
    "sampling.nucleus_candidates": "most_probable",
    "token_counts.to_device": "memory is unified",
    "train_step.cpu_multiplies_bf16": "MLX's CPU kernels are no faster in bfloat16",
    "weights.copy_values": "copies piece by piece, for weights that are prepacked as they are read; see prepacked.py",
    "weights.finite_pieces": "the same",
    "weights.model_without_values": "the same",
    "weights.host_from_tensor": "host_from_array",
    "weights.tensor_from_host": "array_from_host",
}
# An array of MLX has no device, and there is no exact mode: these parameters are left out wherever they occur.
PARAMETERS_LACKING = {"device", "exact"}
PARAMETERS_DIFFERING = {
    "adamw.AdamW.step": "gradients are passed, for an array carries none",
    "layers.Operations.__init__": "rotations have a fused form too",
    "lora.Attached.output": "whether dropout is drawn is said before, by Attached.drop",
    "lora.Change.__init__": "no exact mode, which needs a product of its own",
    "lora.Change.forward": "whether dropout is drawn is said before",
    "lora.Change.dropped": "the same",
    "model.Context.__init__": "positions and frequencies in place of a table of angles, and dropout",
    "model.Llama.context": "dropout is passed, not drawn from a global generator",
    "model.Llama.hidden": "the same",
    "noise.GumbelNoise.__init__": "the type of the logits, since Metal has no float64",
    "objectives.loss_function": "a key to draw from while training, since nothing is drawn from a global generator",
    "objectives.classification_loss": "the same",
    "packed.PackedParameter.__init__": "owner and key: where a new array is put, since arrays do not change",
    "kv_cache.PagedKVCache.__init__": "no kernel of Triton",
    "runner.MlxMemory.__init__": "no graphs",
    "runner.MlxRunner.__init__": "the device it runs on",
    "sampling.Columns.__init__": "the type of the logits",
    "serving.Serving.attach": "no exact mode",
    "token_counts.CountedRow.__init__": "counts lie elsewhere",
    "weights.copy_host_arrays": "where the arrays are put, since they do not change",
    "train_step.MlxTrainStep.__init__": "the device it runs on",
}


def files(backend: str) -> set[str]:
    return {path.stem for path in (PACKAGE / backend).glob("*.py")} - {"__init__"}


BOTH = sorted((files("torch_backend") & files("mlx_backend")) - FILES_LACKING.keys())


def own_names(backend: str, file: str) -> dict[str, tuple[str, ...] | None]:
    """The public functions, classes and methods of a file with the names of their parameters; under MLX's names."""
    module, found = importlib.import_module(f"llamita.{backend}.{file}"), {}
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if value.__module__ not in (module.__name__, "llamita.optimization"):
            continue
        path = f"{file}.{name.replace('Torch', 'Mlx')}"
        found[path] = tuple(inspect.signature(value).parameters) if inspect.isfunction(value) else None
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(function) and (method in ("__init__", "__call__") or not method.startswith("_")):
                method = "forward" if method == "__call__" else method
                found[f"{path}.{method}"] = tuple(inspect.signature(function).parameters)
    return found


def test_the_same_files():
    lacking = files("torch_backend") - files("mlx_backend")
    assert lacking == FILES_LACKING.keys() - {"peers"}, "write the twin, or list the file here with its reason"
    assert files("mlx_backend") <= files("torch_backend")


@pytest.mark.parametrize("file", BOTH)
def test_the_same_names_with_the_same_parameters(file):
    theirs, ours = own_names("torch_backend", file), own_names("mlx_backend", file)
    assert theirs, file
    for path, parameters in theirs.items():
        if path in NAMES_LACKING or path.rpartition(".")[0] in NAMES_LACKING:
            assert path not in ours, f"{path} is there: take it from the list"
            continue
        assert path in ours, f"{path} has no twin; write it, or list it here with its reason"
        if path in PARAMETERS_DIFFERING:
            assert parameters != ours[path], f"{path} no longer differs: take it from the list"
        elif parameters is not None:
            expected = tuple(p for p in parameters if p not in PARAMETERS_LACKING or p in (ours[path] or ()))
            assert ours[path] == expected, path


def test_every_exception_is_of_a_name_that_exists():
    names = {path for file in BOTH for path in own_names("torch_backend", file)}
    assert NAMES_LACKING.keys() | PARAMETERS_DIFFERING.keys() <= names
