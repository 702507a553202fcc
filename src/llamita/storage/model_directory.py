"""Model directories, on disk or on the Hugging Face hub: `config.json`, and weights in one file or in shards.

Knows nothing of frameworks.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub

from llamita.model.config import ModelConfig, dtype_of, unknown_keys
from llamita.model.host_array import DTYPE_NAMES, HostArray
from llamita.model.parameters import EMBEDDING, OUTPUT_HEAD, shortened
from llamita.storage import gguf
from llamita.storage.contradictions import settled
from llamita.storage.files import read_json
from llamita.storage.gguf_header import is_gguf, part_files
from llamita.storage.safetensors import Layout, layout_of, read_safetensors, size_of, write_file

MAX_SHARD_BYTES = 5_000_000_000
HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
SHARDS = "shards"  # where a checkpoint of several processes has its arrays in parts
GENERATION = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"  # a directory that has it holds an adapter over another model
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch.compile, FSDP and recomputation put into names, wherever the part that they wrap begins."""
OUTER = ("module.", "base_model.")
"""What data parallelism, and PEFT, put before all names."""


def save_tensors(directory: Path | str, tensors: Mapping[str, HostArray], name: str = "model") -> None:
    """Write `<name>.safetensors`, or shards of at most 5 GB and an index. The directory should be an atomic one."""
    stream_tensors(directory, layout_of(tensors), tensors.items(), name)


def stream_tensors(
    directory: Path | str, layout: Layout, tensors: Iterable[tuple[str, HostArray]], name: str = "model"
) -> None:
    """`save_tensors` of arrays that come one by one, in the order of `layout`, which has the type and shape of each."""
    directory, arrays = Path(directory), iter(tensors)
    shards: list[Layout] = [{}]
    used = total = 0
    for key, (dtype, shape) in layout.items():
        size = size_of(dtype, shape)
        if used and used + size > MAX_SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][key] = (dtype, shape)
        used, total = used + size, total + size
    if len(shards) == 1:
        return write_file(directory / f"{name}.safetensors", shards[0], arrays)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file_name, shard, arrays)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def load_tensors(directory: Path | str, name: str = "model") -> dict[str, HostArray]:
    """Map `<name>.safetensors`, or the shards that its index lists; nothing is copied.

    A model's have canonical names: what wrapped it when it was saved, a missing `model.` or a second one are settled
    (`canonical_name`). A GGUF file's are read too. Raises FileNotFoundError where neither exists, ValueError (naming
    the file) for a broken one.
    """
    directory = Path(directory)
    if is_gguf(directory):
        return gguf.load_tensors(directory)
    single, index_file = directory / f"{name}.safetensors", directory / f"{name}.safetensors.index.json"
    if single.is_file():
        found = read_safetensors(single)
        return as_model(directory, found) if name == "model" else found
    if not index_file.is_file():
        if name == "model" and (directory / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{directory} holds an adapter, and a whole model is needed; make one with: llamita merge {directory} "
                "--output DIR"
            )
        if (directory / SHARDS).is_dir():
            raise ValueError(
                f"{directory} is a checkpoint in parts, as several processes wrote it; put it together with: "
                f"llamita convert {directory} DIR"
            )
        raise FileNotFoundError(
            f"no {single.name} in {directory}; expected a Hugging Face model directory{_other_weights(directory)}"
        )
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index_file} has no weight_map; the download is incomplete or the file is broken")
    result: dict[str, HostArray] = {}
    faults = []
    for file_name in sorted(set(weight_map.values())):
        shard = read_safetensors(_shard(directory, file_name, index_file))
        faults += [f"{file_name} repeats {key} of another shard" for key in sorted(result.keys() & shard.keys())]
        result |= shard
    # Some indexes list rotary tables, or a tied head, that were left out of the files.
    listed = {key for key in weight_map if ".rotary_emb." not in key and key != OUTPUT_HEAD}
    faults += [f"no shard holds {key}" for key in sorted(listed - result.keys())]
    if faults:
        raise ValueError(f"{index_file} and its shards disagree: {shortened(faults)}")
    return as_model(directory, result) if name == "model" else result


def _other_weights(directory: Path) -> str:
    """What to do with the files of weights in a directory that has none under the usual names."""
    if pickled := pickled_weights(directory):
        return (
            f"; {pickled[0].name} may be a pickled file, which only `llamita convert` reads: "
            f"llamita convert {directory} DIR"
        )
    if found := sorted(file.name for file in directory.glob("*.bin")) or sorted(
        file.name for file in directory.glob("*.pt*")
    ):
        return f"; {found[0]} may be a pickled file, which only `llamita convert` reads"
    if found := sorted(file.name for file in directory.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS):
        if "-of-" in found[0]:
            return f"; {found[0]} is one of several, and model.safetensors.index.json, which lists them, is missing"
        return f"; if its weights are those in {found[0]}, rename that"
    return ""


def pickled_weights(directory: Path) -> list[Path]:
    """The pickled files of a Hugging Face directory's weights, as transformers wrote them before safetensors; none
    where it has safetensors."""
    if any((directory / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        return []
    return sorted(directory.glob("pytorch_model*.bin"))


def canonical_name(name: str) -> str:
    """Returns the name that transformers gives a parameter which was saved with what wrapped its model, from the model
    without its head (no `model.` before it), or with that twice."""
    name = unwrapped(name)
    while outer := next((outer for outer in OUTER if name.startswith(outer)), ""):
        name = name.removeprefix(outer)
    if name.startswith(("embed_tokens.", "layers.", "norm.")):
        return f"model.{name}"
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.", "model.score.")) else name


def unwrapped(name: str) -> str:
    """Returns a name without what wrapped the model, or parts of it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def as_model(directory: Path, found: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """The arrays of a model under canonical names, with the embedding of a tied model whose file has it under the
    head's name alone. One whose canonical name another has already keeps its own, and is refused by it."""
    arrays: dict[str, HostArray] = {}
    for name in sorted(found, key=lambda name: canonical_name(name) != name):
        canonical = canonical_name(name)
        arrays[name if canonical in arrays else canonical] = found[name]
    file = directory / "config.json"
    if OUTPUT_HEAD not in arrays or EMBEDDING in arrays or not file.is_file():
        return arrays
    tied = ModelConfig.from_dict(read_json(file)).tie_word_embeddings
    return {EMBEDDING: arrays[OUTPUT_HEAD], **arrays} if tied else arrays


def _shard(directory: Path, name: str, index_file: Path) -> Path:
    """The file of a shard, which lies in the directory; in the hub's cache it is a link to the model's blobs."""
    root = directory.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    file = directory / name
    if Path(name).name != name or file.resolve().parent not in roots:
        raise ValueError(f"{index_file} names {name!r}; a shard must lie in the same directory")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, but {index_file.name} names it; the download is incomplete")
    return file


# --- model directories -----------------------------------------------------------------------------------------------


def save_config(
    directory: Path | str, config: ModelConfig, dtype: str = "F32", generation: Mapping[str, Any] | None = None
) -> None:
    """Write `config.json` and `generation_config.json`; `dtype` is the safetensors name of the weights' type.

    `generation` is what the model's `generation_config.json` said before, which goes along; where it names no special
    tokens, they are the config's. What is not quantised in a quantised model is bfloat16, whatever the type of its
    first array.
    """
    directory = Path(directory)
    values = config.to_dict("bfloat16" if config.quantization else DTYPE_NAMES[dtype])
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    tokens = {k: values[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if values[k] is not None}
    given = {key: value for key, value in (generation or {}).items() if value is not None}
    (directory / GENERATION).write_text(json.dumps({**tokens, **given}, indent=2) + "\n")


def load_generation_config(directory: Path | str) -> dict[str, Any]:
    """Returns what a model's `generation_config.json` says; empty where there is none."""
    file = Path(directory) / GENERATION
    values = read_json(file) if file.is_file() else {}
    ends = values.get("eos_token_id")
    if not all(type(token_id) is int for token_id in (ends if isinstance(ends, list) else [ends or 0])):
        raise ValueError(f"{file}: eos_token_id={ends!r} must be a token id, or several")
    return values


def load_config(directory: Path | str) -> ModelConfig:
    """Read `config.json`; keys that Llamita does not know are named in a warning.

    Where the weights beside it contradict it, it is settled as transformers does, with a warning.
    """
    if is_gguf(Path(directory)):
        return gguf.load_config(Path(directory))
    file = Path(directory) / "config.json"
    values = read_json(file)
    try:
        config = ModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    unknown = unknown_keys(values)
    if unknown:
        warnings.warn(f"{file} has keys that Llamita does not know, and ignores: {', '.join(unknown)}", stacklevel=1)
    try:
        arrays = load_tensors(directory)
    except (OSError, ValueError):
        return config  # no weights, or broken ones: whoever needs them says so
    return settled(config, arrays, file.parent)


def end_tokens(config: ModelConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end a text: those of the config, and any that `generation_config.json` adds."""
    ends = generation.get("eos_token_id")
    added = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(dict.fromkeys((*config.eos_token_ids, *added)))


def with_end_tokens(config: ModelConfig, ends: Iterable[int]) -> ModelConfig:
    """Returns the config of a model whose texts end with these ids."""
    found = tuple(ends)
    return config if found == config.eos_token_ids else replace(config, eos_token_id=found or None)


def stored_dtype(directory: Path | str) -> str | None:
    """Returns the type that `config.json` gives for the weights, float32 or the like; None where it gives none."""
    file = Path(directory) / "config.json"
    return dtype_of(read_json(file)) if file.is_file() else None


def weight_files(directory: Path | str) -> list[Path]:
    """The files of a model's weights, in their order; a GGUF file holds its own, or has them in its parts."""
    directory = Path(directory)
    if is_gguf(directory):
        return part_files(directory)
    return [directory] if directory.is_file() else sorted(directory.glob("model*.safetensors"))


def resolve_model_directory(path: Path | str) -> Path:
    """The model directory that a user means: a path, the best (else last) checkpoint of a training run, a GGUF file
    (which stands for a directory wherever one is read), or a model's name on the Hugging Face hub (`owner/name` or
    `owner/name@revision`), which is fetched into the hub's cache.

    The hub's client decides where the cache is and whether to go online (HF_HOME, HF_HUB_OFFLINE).
    """
    on_hub = HUB_NAME.fullmatch(str(path))
    path = Path(path)
    if is_gguf(path):
        return path
    for candidate in (path, path / "best", path / "last"):
        if any((candidate / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            return candidate
    if path.exists():
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        instead = f"give the GGUF file in it, {files[0]}" if files else "expected a model or a run"
        raise FileNotFoundError(f"{path} holds no config.json and no best or last checkpoint; {instead}")
    if on_hub is None or path.parent.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a model directory or a training run")
    try:
        found = huggingface_hub.snapshot_download(
            on_hub["name"], revision=on_hub["revision"], allow_patterns=list(HUB_FILES)
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"there is no directory {path}, and the hub gives no such model: {reason}") from None
    return Path(found)
