"""Other people's models into Hugging Face directories and back, each export proven before it is kept.

The kind of a source is recognised by its content. What is written is read again, and its logits on fixed prompts are
compared with the source's: a difference past what the form allows refuses the export and leaves nothing. The backend
and the reader of pickled files are passed in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llamita.backend.interface import Backend
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.storage import calibration, files, model_directory, safetensors
from llamita.storage.calibration import Calibration
from llamita.storage.contradictions import settled
from llamita.storage.formats import checkpoints, gguf, llama2c, llama2c_tokenizer
from llamita.storage.formats.foreign import ForeignModel
from llamita.storage.gguf_header import is_gguf
from llamita.text import tiktoken_ranks
from llamita.text.tokenizer import Tokenizer

Target = Literal[
    "huggingface",
    "gguf-f32",
    "gguf-f16",
    "gguf-bf16",
    "gguf-q8_0",
    "llama2c",
    "llama2c-int8",
    "llama2c-pt",
    "course-pt",
]
TOLERANCES: Mapping[Target, float] = {"llama2c-int8": 0.05, "gguf-f16": 0.01, "gguf-bf16": 0.02, "gguf-q8_0": 0.05}
"""Root mean square of the logits' differences that a form may have, as a share of that of the logits; else 0."""
PROMPTS, PROMPT_TOKENS = 4, 64


@dataclass(frozen=True)
class ConvertConfig:
    """The options of `llamita convert` besides source and destination."""

    to: Target = "huggingface"
    """huggingface: a model directory; gguf-...: llama.cpp's file, with numbers of that type; llama2c, llama2c-int8: a
    .bin of version 0 or 2; llama2c-pt, course-pt: a training checkpoint under llama2.c's names or the guided
    course's."""
    tokenizer: Path | None = None
    """A tokenizer for the model (tokenizer.json, tokenizer.model, llama2.c's tokenizer.bin, or a directory); else that
    of the source."""
    tokenizer_output: Path | None = None
    """Write the tokenizer as llama2.c's tokenizer.bin too, to this file."""
    heads: int = 0
    """Attention heads, where the source does not say (mini-llama)."""
    positions: int = 0
    """Positions, where the source does not say (mini-llama)."""
    overwrite: bool = False
    """Replace a destination that exists."""


@dataclass(frozen=True)
class Tools:
    """A backend that runs what is compared, and PyTorch's pickled files, in and out."""

    backend: Backend
    read_pickle: Callable[[Path], Any]
    write_pickle: Callable[[Path, Any], None]


@dataclass(frozen=True)
class Conversion:
    """A conversion: the kind of the source, and the distance of the copy's logits from its own."""

    kind: str
    config: ModelConfig
    difference: float
    """Root mean square of the differences, as a share of that of the logits; 0 where all are equal."""
    has_tokenizer: bool


def convert(source: Path, destination: Path, config: ConvertConfig, tools: Tools) -> Conversion:
    """Read a model of any kind, write it as another, and prove the copy. ValueError or OSError in one line."""
    if config.to not in get_args(Target):
        raise ValueError(f"to={config.to!r} is no form of model; choose one of {', '.join(get_args(Target))}")
    kind, model = read_model(source, config, tools)
    if config.tokenizer is not None:
        read = llama2c_tokenizer.read if config.tokenizer.suffix == ".bin" else Tokenizer.load
        model = replace(model, tokenizer=read(config.tokenizer))
    if model.tokenizer is not None and model.tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens and the model {model.config.vocab_size} "
            "embeddings; give the tokenizer that it was trained with"
        )
    if config.tokenizer_output is not None and model.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer to write to {config.tokenizer_output}; --tokenizer adds one")
    keep = files.atomic_directory if config.to == "huggingface" else files.atomic_file
    with keep(destination, config.overwrite) as temporary:
        _write(temporary, model, config.to, tools, destination.stem, _generation(source))
        if config.to == "huggingface":
            calibration.save(temporary, _calibration(source))
        again = read_model(temporary, config, tools)[1]
        difference = compare(model, again, tools)
        if difference > TOLERANCES.get(config.to, 0.0):
            raise ValueError(
                f"the logits of the copy differ from the source's by {difference:.2e} of their size, more than the "
                f"{TOLERANCES.get(config.to, 0.0):g} that {config.to} allows; nothing was written"
            )
        if config.tokenizer_output is not None and model.tokenizer is not None:
            with files.atomic_file(config.tokenizer_output, config.overwrite) as file:
                llama2c_tokenizer.write(file, model.tokenizer)
    if config.to.startswith("gguf-"):
        calibration.save(destination, _calibration(source))
    return Conversion(kind, model.config, difference, model.tokenizer is not None)


def _calibration(source: Path) -> Calibration:
    """Returns the temperatures stored with a source that Llamita runs, none of any other."""
    runs = is_gguf(source) or not (source.is_file() or _is_metas(source))
    return calibration.load(model_directory.resolve_model_directory(source)) if runs else Calibration()


def _generation(source: Path) -> dict[str, Any]:
    """Returns what a model directory says of how to generate; nothing of a source of another kind."""
    if source.is_file() or _is_metas(source):
        return {}
    return model_directory.load_generation_config(model_directory.resolve_model_directory(source))


def _is_metas(source: Path) -> bool:
    """Whether a directory is one of Meta's; one that has a config.json too is Hugging Face's (Mistral publishes so)."""
    return (source / "params.json").is_file() and not (source / "config.json").is_file()


def read_model(source: Path, config: ConvertConfig, tools: Tools) -> tuple[str, ForeignModel]:
    """The model of a source and its kind, told by what is in it."""
    if _is_metas(source):
        return "Meta's checkpoint", _read_meta(source, tools)
    if source.is_dir() or not source.exists():
        directory = model_directory.resolve_model_directory(source)
        shape, shards = model_directory.load_config(directory), directory / model_directory.SHARDS
        generation = model_directory.load_generation_config(directory)
        shape = model_directory.with_end_tokens(shape, model_directory.end_tokens(shape, generation))
        in_parts = shards.is_dir()
        if in_parts:
            arrays = tools.backend.read_shards(shards)[0]
        elif pickled := model_directory.pickled_weights(directory):
            arrays = model_directory.as_model(directory, _unpickled(pickled, tools))
            shape = settled(shape, arrays, directory)
        else:
            arrays = model_directory.load_tensors(directory)
        if shape.quantization:
            raise ValueError(
                f"{directory} is quantised ({shape.quantization}); convert the model that it was made from"
            )
        model = ForeignModel.in_order(shape, arrays, Tokenizer.load(directory) if Tokenizer.is_in(directory) else None)
        return "checkpoint in parts" if in_parts else "Hugging Face directory", model
    with open(source, "rb") as file:
        head = file.read(16)
    if is_gguf(source):
        return "GGUF file", gguf.read_model(source, with_tokenizer=config.tokenizer is None)
    # A pickle begins with its protocol and an operation; 128 as llama2.c's width has the same first byte.
    if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and head[2:3] != b"\0"):
        return "training checkpoint", checkpoints.from_training_checkpoint(source, tools.read_pickle(source))
    if llama2c.is_model(source):
        return "llama2.c model", llama2c.read_model(source)
    if head[8:9] == b"{":
        arrays = safetensors.read_safetensors(source)
        if checkpoints.is_mini_llama(list(arrays)):
            model = checkpoints.from_mini_llama(source, arrays, config.heads, config.positions)
            return "mini-llama", model
        raise ValueError(f"{source} is a safetensors file alone; give the directory with its config.json")
    raise ValueError(
        f"{source} is no model that Llamita knows: a Hugging Face directory, a GGUF file, llama2.c's .bin or .pt, the "
        "guided course's .pt, Meta's directory of consolidated.*.pth, or mini-llama's .safetensors"
    )


def _unpickled(files: list[Path], tools: Tools) -> dict[str, HostArray]:
    """The arrays in all pickled files of a model's weights."""
    arrays: dict[str, HostArray] = {}
    for file in files:
        content = tools.read_pickle(file)
        if not isinstance(content, Mapping):
            raise ValueError(f"{file} must hold a dictionary of arrays")
        arrays |= {str(name): array for name, array in content.items() if isinstance(array, HostArray)}
    return arrays


def compare(model: ForeignModel, other: ForeignModel, tools: Tools) -> float:
    """The root mean square of the logits' differences on fixed prompts, as a share of that of the logits."""
    tokens = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=(PROMPTS, tokens))
    logits, others = (
        tools.backend.runner_over(form.config, form.arrays).forward(prompts)["logits"].astype(np.float64)
        for form in (model, other)
    )
    if np.array_equal(logits, others):
        return 0.0
    return float(np.sqrt(((logits - others) ** 2).mean() / (logits**2).mean()))


def _write(
    path: Path, model: ForeignModel, target: Target, tools: Tools, name: str, generation: Mapping[str, Any]
) -> None:
    if target == "huggingface":
        model_directory.save_config(path, model.config, next(iter(model.arrays.values())).dtype, generation)
        model_directory.save_tensors(path, model.arrays)
        if model.tokenizer is not None:
            model.tokenizer.save(path)
    elif target.startswith("gguf-"):
        gguf.write_model(path, model, target.removeprefix("gguf-"), name)  # type: ignore[arg-type]
    elif target in ("llama2c", "llama2c-int8"):
        llama2c.write_model(path, model, version=0 if target == "llama2c" else 2)
    else:
        names = "course" if target == "course-pt" else "meta"
        tools.write_pickle(path, checkpoints.to_training_checkpoint(model, names))


def _read_meta(source: Path, tools: Tools) -> ForeignModel:
    shards = sorted(source.glob("consolidated*.pth")) or sorted(source.glob("consolidated*.safetensors"))
    if not shards:
        raise FileNotFoundError(
            f"{source} has params.json and no consolidated.*.pth beside it, nor Mistral's consolidated.safetensors"
        )
    contents = [
        safetensors.read_safetensors(shard) if shard.suffix == ".safetensors" else tools.read_pickle(shard)
        for shard in shards
    ]
    if not all(isinstance(content, Mapping) for content in contents):
        raise ValueError(f"{source}: consolidated.*.pth must hold a dictionary of arrays each")
    model = checkpoints.from_meta_shards(source, files.read_json(source / "params.json"), contents)
    tokenizer = _meta_tokenizer(source, model.config.vocab_size)
    if tokenizer is None:
        return model
    # Llama 3's code ends a text at the end of a turn too.
    ends = (tokenizer.eos_id, tokenizer.codec.special_tokens.get(tiktoken_ranks.END_OF_TURN))
    ids = tuple(token_id for token_id in ends if token_id is not None)
    eos = ids if len(ids) > 1 else tokenizer.eos_id
    return replace(
        model, tokenizer=tokenizer, config=replace(model.config, bos_token_id=tokenizer.bos_id, eos_token_id=eos)
    )


def _meta_tokenizer(source: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of Meta's model; Llama 1 and 2 came with one file for all sizes, a directory above."""
    if (source / "tokenizer.model").is_file():
        return Tokenizer.load(source / "tokenizer.model")
    above = source.resolve().parent / "tokenizer.model"
    try:
        tokenizer = Tokenizer.load(above) if above.is_file() else None
    except ValueError:
        return None  # whatever it is, it is not this model's
    return tokenizer if tokenizer is not None and tokenizer.vocab_size == vocab_size else None
