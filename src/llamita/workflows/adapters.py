"""An adapter and its base into an ordinary model directory, tensor by tensor; the backend that computes is given."""

from dataclasses import replace
from pathlib import Path

from llamita.backend.interface import Backend
from llamita.model.parameters import check_arrays, parameter_table
from llamita.storage import calibration, files, model_directory, peft_directory
from llamita.storage.peft_directory import Opened
from llamita.workflows.quantize import carry_over


def merge(adapter: Path, output: Path, overwrite: bool, backend: Backend, base: Path | None = None) -> Opened:
    """Write `adapter` (a directory or a training run), merged into its base, to `output`.

    `base` is a copy of the base, where that which the adapter names is gone. ValueError or OSError in one line.
    """
    directory = model_directory.resolve_model_directory(adapter)
    if not peft_directory.is_adapter(directory):
        raise ValueError(f"{adapter} holds no adapter but a whole model; there is nothing to merge")
    opened = peft_directory.open_adapter(directory, base and model_directory.resolve_model_directory(base))
    config = replace(opened.adapter.config, quantization="")
    arrays = model_directory.load_tensors(opened.base)
    present = opened.adapter.over(arrays)
    check_arrays(opened.adapter.config, present)
    quantised = bool(opened.adapter.config.quantization)
    layout = {
        row.name: (
            "BF16" if quantised and row.name not in opened.adapter.replaced else present[row.name].dtype,
            row.shape,
        )
        for row in parameter_table(config)
    }
    with files.atomic_directory(output, overwrite) as temporary:
        carry_over(temporary, opened.directory, opened.base)
        generation = peft_directory.generation_config(opened.directory, opened.base)
        model_directory.save_config(temporary, config, next(iter(layout.values()))[0], generation)
        calibration.save(temporary, calibration.load(opened.directory))  # the base's is for another model
        model_directory.stream_tensors(temporary, layout, backend.merged_arrays(arrays, opened.adapter))
    return opened
