"""`llamita info`: prints a model's parameters and costs, counted from the table of parameters, or lists the presets.

Loads no framework and no weights; model/parameters.py and model/sizes.py derive the numbers.
"""

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console, Group
from rich.table import Table

from llamita.backend.opening import open_model
from llamita.model.config import ModelConfig
from llamita.model.parameters import Initialization, InitializationName, Parameter, parameter_table, stored_arrays
from llamita.model.presets import PRESETS, preset
from llamita.model.sizes import count_parameters, flops_per_token, kv_bytes_per_token
from llamita.model.training_memory import Update, training_memory
from llamita.storage.model_directory import load_config, resolve_model_directory, weight_files

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
LAYER = re.compile(r"(model\.layers\.)(\d+)\.(.+)")


@dataclass(frozen=True)
class InfoConfig:
    """The options of `llamita info`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A preset, a model directory or a training run. Left out: the presets are listed."""
    batch_size: int = 8
    """Rows of a training step, for the estimate of memory."""
    sequence_length: int = 0
    """Positions of a row, for operations and memory; 0: the model's context length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations while training; weights and AdamW's state are float32."""
    initialization: InitializationName = "fan-in"
    """The initialisation that the table shows."""
    json: bool = False
    """Print JSON instead of tables, with a row for every parameter."""


def run(options: InfoConfig) -> None:
    """Show the parameters of a model and what they cost, or list the presets."""
    console = Console()
    if not options.model:
        presets = [describe_preset(name) for name in PRESETS]
        if options.json:
            print(json.dumps({"presets": presets}, indent=2))
        else:
            console.print(preset_table(presets))
        return
    config, directory = find_model(options.model)
    facts = describe(config, options, directory)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        console.print(Group(shown_table(config, options.initialization), "", facts_table(facts, config)))


def find_model(name: str) -> tuple[ModelConfig, Path | None]:
    """Returns the config that a preset's name or a path stands for, and the directory it came from.

    A preset goes before a directory of the same name (`./tiny` is the directory). Raises ValueError or OSError.
    """
    if name in PRESETS:
        return preset(name), None
    if "/" not in name and not Path(name).exists():
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "llamita info lists the presets"
        raise ValueError(f"{name!r} is neither a preset nor a directory; {hint}")
    directory = resolve_model_directory(name)
    return load_config(directory), directory


def describe(config: ModelConfig, options: InfoConfig, directory: Path | None = None) -> dict[str, Any]:
    """Returns all counts under the names that `--json` prints. Bytes and operations are whole numbers."""
    for name in ("batch_size", "sequence_length"):
        if getattr(options, name) < (name == "batch_size"):
            raise ValueError(f"{name}={getattr(options, name)} must be positive")
    counts = count_parameters(config)
    length = options.sequence_length or config.max_position_embeddings
    precision: Literal["bf16", "fp32"] = "bf16" if options.dtype == "bfloat16" else "fp32"
    memory = training_memory(config, Update(options.batch_size, length, precision, device="cpu"))
    file_bytes = {name: size * counts.total for name, size in NUMBER_BYTES.items()}
    if config.quantization:
        file_bytes[config.quantization] = sum(array.stored_bytes for array in stored_arrays(config))
    files = weight_files(directory) if directory else []
    opened = open_model(directory, on_cpu=True) if directory and files else None
    return {
        "model": options.model,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(counts),
        "flops_per_token": {"sequence_length": length, "training": flops_per_token(config, length)},
        "kv_bytes_per_token": {name: kv_bytes_per_token(config, size) for name, size in NUMBER_BYTES.items()},
        "training_memory": {
            "batch_size": options.batch_size,
            "sequence_length": length,
            "activations_dtype": options.dtype,
            **dataclasses.asdict(memory),
            "total": memory.total,
        },
        "file_bytes": file_bytes,
        "file_bytes_on_disk": sum(file.stat().st_size for file in files) if files else None,
        "dtype_on_cpu": {"dtype": opened.dtype, "reason": opened.dtype_reason} if opened else None,
        "table": [dataclasses.asdict(row) for row in parameter_table(config, options.initialization)],
    }


def describe_preset(name: str) -> dict[str, Any]:
    """Returns a preset's name, fields and number of parameters."""
    config = preset(name)
    return {"name": name, "parameters": count_parameters(config).total, "config": dataclasses.asdict(config)}


def fold_layers(rows: tuple[Parameter, ...]) -> list[tuple[str, str, int, Parameter]]:
    """Returns the rows with those merged that differ in the layer alone: (prefix, name within it, count, one of them).

    `model.layers.0.mlp.up_proj.weight` up to layer 11 folds into ("model.layers.{0..11}.", "mlp.up_proj.weight", 12,
    row). A row outside the layers has an empty prefix.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Parameter]]] = {}
    for row in rows:
        match = LAYER.fullmatch(row.name)
        name, layer = (match[3], int(match[2])) if match else (row.name, -1)
        key = (name, bool(match), row.shape, row.initialization, row.weight_decay)
        groups.setdefault(key, []).append((layer, row))
    folded = []
    for (name, in_layers, *_), members in groups.items():
        numbers = [layer for layer, _ in members]
        prefix = f"model.layers.{_numbers(numbers)}." if in_layers else ""
        folded.append((prefix, name, len(members), members[0][1]))
    return folded


def _numbers(layers: list[int]) -> str:
    """Returns `3`, `{0..11}`, or `{0,2,5}` where the numbers have gaps."""
    if len(layers) == 1:
        return str(layers[0])
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{{{layers[0]}..{layers[-1]}}}"
    return "{" + ",".join(map(str, layers)) + "}"


def shown_table(config: ModelConfig, initialization: InitializationName) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("parameter", no_wrap=True)
    for title in ("shape", "numbers"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("starts as", no_wrap=True)
    table.add_column("decay", no_wrap=True)
    shown = ""
    for prefix, name, count, row in fold_layers(parameter_table(config, initialization)):
        if prefix and prefix != shown:
            table.add_row(f"[dim]{prefix}[/dim]")
        shown = prefix
        table.add_row(
            f"  {name}" if prefix else name,
            " x ".join(map(str, row.shape)),
            f"{count * row.size:,}",
            _start_text(row.initialization),
            "yes" if row.weight_decay else "no",
        )
    return table


def _start_text(initialization: Initialization) -> str:
    return f"normal {initialization.std:.3g}" if initialization.kind == "normal" else initialization.kind


def facts_table(facts: dict[str, Any], config: ModelConfig) -> Table:
    counts, memory = facts["parameters"], facts["training_memory"]
    flops, kv, files = facts["flops_per_token"], facts["kv_bytes_per_token"], facts["file_bytes"]
    rows = [
        ("parameters", f"{counts['total']:,}"),
        ("  embedding", f"{counts['embedding']:,}" + (" (also the output head)" if _tied(config) else "")),
        ("  in matrix products", f"{counts['matrices']:,}" + (" (output head included)" if _has_head(config) else "")),
        ("  a layer", f"{counts['per_layer']:,}"),
        ("context length", f"{config.max_position_embeddings:,} positions"),
        (
            "training operations",
            f"{short_number(flops['training'])}FLOP a token, rows of {flops['sequence_length']:,} positions",
        ),
        (
            "key-value cache",
            f"{short_bytes(kv['bfloat16'])} a token in bfloat16, {short_bytes(kv['float32'])} in float32",
        ),
        (
            "training memory",
            f"{short_bytes(memory['total'])} on a CPU, with {memory['batch_size']} rows of "
            f"{memory['sequence_length']:,} positions (llamita plan says more)",
        ),
        ("  weights", short_bytes(memory["weights"])),
        ("  AdamW's state", short_bytes(memory["optimizer"])),
        ("  gradients", f"{short_bytes(memory['gradients'])} then, {short_bytes(memory['all_gradients'])} in the end"),
        ("  activations", f"{short_bytes(memory['activations'])} in {memory['activations_dtype']}"),
        ("  logits, workspace", short_bytes(memory["logits"] + memory["workspace"])),
        ("file", ", ".join(f"{short_bytes(size)} in {name}" for name, size in files.items())),
    ]
    if facts["file_bytes_on_disk"] is not None:
        rows.append(("  on disk", short_bytes(facts["file_bytes_on_disk"])))
    if chosen := facts["dtype_on_cpu"]:
        rows.append(("runs on this CPU", f"in {chosen['dtype']} ({chosen['reason']}); --dtype says otherwise"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(label if label.startswith(" ") else f"[bold]{label}[/bold]", value)
    return table


def preset_table(presets: list[dict[str, Any]]) -> Group:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("preset", no_wrap=True)
    for title in ("parameters", "width", "layers", "heads", "tokens", "context"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in presets:
        config = entry["config"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        table.add_row(
            entry["name"],
            f"{entry['parameters']:,}",
            str(config["hidden_size"]),
            str(config["num_hidden_layers"]),
            str(heads) if heads == kv_heads else f"{heads}/{kv_heads}",
            str(config["vocab_size"]),
            str(config["max_position_embeddings"]),
        )
    notes = [
        "16/8 heads: 16 of queries, 8 of keys and values. tokens: the vocabulary.",
        "llamita info PRESET shows the parameters of one and what they cost.",
    ]
    return Group(table, "", *notes)


def _has_head(config: ModelConfig) -> bool:
    return config.num_labels == 0


def _tied(config: ModelConfig) -> bool:
    return config.tie_word_embeddings and _has_head(config)


def short_number(value: float) -> str:
    """Returns three digits and a decimal prefix, `40.2 G`, or digits and a space where no prefix is needed."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 999.5 and prefix != "P":
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g} {prefix}"


def short_bytes(count: int) -> str:
    """Returns bytes with a decimal prefix (1 kB = 1000 B), as file managers and disk makers count."""
    return f"{short_number(count)}B"
