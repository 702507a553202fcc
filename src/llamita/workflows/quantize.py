"""A model directory into a smaller one whose matrices are int8 or int4, tensor by tensor.

What is read is mapped and what is written is not kept, so that little more than one tensor is in memory. The rounding
is the backend's.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llamita.backend.interface import Backend
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import check_arrays, parameter_table, stored_arrays
from llamita.storage import calibration, files, model_directory
from llamita.storage.gguf_header import is_gguf
from llamita.storage.safetensors import size_of
from llamita.text.tokenizer import Tokenizer

Scheme = Literal["int8", "int4"]
CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
TEMPLATES = "additional_chat_templates"  # a folder of templates by name


@dataclass(frozen=True)
class Quantized:
    """The config of a quantised copy, and the bytes of the weights before and after."""

    config: ModelConfig
    bytes_before: int
    bytes_after: int


def quantize(model: Path | str, output: Path, scheme: Scheme, overwrite: bool, backend: Backend) -> Quantized:
    """Write `model` (a directory, a run, a name on the hub) to `output`, quantised.

    ValueError or OSError in one line.
    """
    directory = model_directory.resolve_model_directory(model)
    config = model_directory.load_config(directory)
    if config.quantization:
        raise ValueError(
            f"{directory} is quantised already ({config.quantization}); quantise the model that it was made from"
        )
    arrays = model_directory.load_tensors(directory)
    check_arrays(config, arrays)
    result = replace(config, quantization=scheme)
    names = [row.name for row in parameter_table(config)]
    stored = stored_arrays(result)
    layout = {array.name: (array.stored_dtype, array.shape) for array in stored}
    with files.atomic_directory(output, overwrite) as temporary:
        model_directory.save_config(temporary, result)
        carry_over(temporary, directory)
        calibration.save(temporary, calibration.load(directory))
        model_directory.stream_tensors(temporary, layout, backend.quantize_arrays(result, _one_by_one(arrays, names)))
    before = sum(size_of(arrays[name].dtype, arrays[name].shape) for name in names)
    return Quantized(result, before, sum(array.stored_bytes for array in stored))


def carry_over(output: Path, *places: Path) -> None:
    """Copies the files around a model's weights (`CARRIED`, `TEMPLATES`), each from the first place that has it; from a
    GGUF file, where none of them has a tokenizer, its own."""
    for name in CARRIED:
        found = [place / name for place in places if (place / name).is_file()]
        if found:
            shutil.copyfile(found[0], output / name)
    if folders := [place / TEMPLATES for place in places if (place / TEMPLATES).is_dir()]:
        (output / TEMPLATES).mkdir()
        for file in sorted(folders[0].glob("*.jinja")):
            shutil.copyfile(file, output / TEMPLATES / file.name)
    for place in places:
        if is_gguf(place) and not Tokenizer.is_in(output) and Tokenizer.is_in(place):
            Tokenizer.load(place).save(output)


def _one_by_one(arrays: dict[str, HostArray], names: list[str]) -> Iterator[tuple[str, HostArray]]:
    """The arrays in the order of the table, the memory of each given back once the next is asked for."""
    for name in names:
        yield name, arrays[name]
        arrays[name].forget(0, len(arrays[name].data))
