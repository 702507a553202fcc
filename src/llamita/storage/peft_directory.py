"""Adapter directories in the format of PEFT: `adapter_config.json`, `adapter_model.safetensors`, the base by its name.

    adapter_config.json         PEFT's settings, base_model_name_or_path among them
    adapter_model.safetensors   A and B under PEFT's names, `base_model.model.` before the canonical ones
    adapter_base.json           the SHA-256 of the base's weights; only ours have it
    config.json, tokenizer.json, ...    of the adapted model; only ours have them for certain

What PEFT writes is read as far as it is LoRA on linear maps, and whole parameters in the place of the base's
(modules_to_save); anything else is refused in one line. Never pickle.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import ALL, HEAD, Adapter, Factors, LoraSettings, is_called, linear_maps
from llamita.model.parameters import CLASSIFIER, EMBEDDING, OUTPUT_HEAD, parameter_table, shortened
from llamita.storage import files, model_directory, safetensors
from llamita.storage.model_directory import ADAPTER_CONFIG, weight_files

VALUES, BASE = "adapter_model", "adapter_base.json"
PREFIX = "base_model.model."
FORMAT = 1
HEADS = ("score", "classifier")  # what PEFT saves whole for a classifier
HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type"),
        *("peft_version", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "init_lora_weights"),
        *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "bias"),
    }
)
"""Keys that are read, or change nothing of what an adapter computes. Any other must be null, false or empty."""
ORDINARY_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights alone; others (pissa, olora, ...) change them."""


@dataclass(frozen=True)
class BaseModel:
    """The model that an adapter goes with: where it is, and which it is (empty where that is not known)."""

    name: str
    sha256: str = ""


@dataclass(frozen=True)
class Opened:
    """An adapter directory as it was read, and the directory of its base."""

    directory: Path
    base: Path
    adapter: Adapter


@dataclass(frozen=True)
class AdapterFiles:
    """Writes and reads the weights of a training run's checkpoints as adapter directories."""

    settings: LoraSettings
    base: BaseModel

    def save(self, directory: Path, config: ModelConfig, weights: Mapping[str, HostArray]) -> None:
        model_directory.save_config(directory, config)
        settings = peft_settings(self.settings, config, self.base.name)
        (directory / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        named = {PREFIX + name: array for name, array in weights.items()}
        safetensors.write_safetensors(directory / f"{VALUES}.safetensors", named)
        content = {"format": FORMAT, "sha256": self.base.sha256}
        (directory / BASE).write_text(json.dumps(content, indent=2) + "\n")

    def load(self, directory: Path) -> dict[str, HostArray]:
        return _arrays(directory)


def peft_settings(settings: LoraSettings, config: ModelConfig, base: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.num_labels else "CAUSAL_LM",
        "base_model_name_or_path": base.partition("@")[0],
        "revision": base.partition("@")[2] or None,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilized,
        "target_modules": list(settings.names),
        "modules_to_save": ["score"] if config.num_labels else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def open_adapter(directory: Path, base: Path | None = None) -> Opened:
    """Read an adapter directory, over the base that it names or over another copy of that, at `base`.

    ValueError or FileNotFoundError in one line: the base is gone or another one, a setting or a file does not fit.
    """
    settings = files.read_json(directory / ADAPTER_CONFIG)
    base = base or base_directory(directory)
    if (directory / BASE).is_file():
        sha256 = files.read_json(directory / BASE).get("sha256")
        if sha256 and sha256 != weights_digest(base):
            raise ValueError(
                f"{directory} was trained over other weights than those in {base} (their SHA-256 differs); give the "
                "model that it was trained over"
            )
    arrays = _arrays(directory)
    own = directory / "config.json"
    config = model_directory.load_config(directory if own.is_file() else base)
    if CLASSIFIER in arrays and not (own.is_file() and config.num_labels):
        config = replace(config, num_labels=arrays[CLASSIFIER].shape[0])
    try:
        _check_replaced(settings, config, arrays)
        config = _with_embeddings(config, arrays, base)
        factors = factors_of(settings, config)
    except ValueError as error:
        raise ValueError(f"{directory / ADAPTER_CONFIG}: {error}") from None
    return Opened(directory, base, Adapter(config, factors, arrays, f"the adapter in {directory}"))


def is_adapter(directory: Path) -> bool:
    return (directory / ADAPTER_CONFIG).is_file()


def open_beside(paths: Mapping[str, Path], base: Path, arrays: Mapping[str, HostArray]) -> dict[str, Adapter]:
    """Several adapters, directories or training runs, by name, all over one base whose arrays are given.

    ValueError for one that another base, a classification head or a whole parameter of its own keeps from being served
    beside others.
    """
    found = {}
    tied = OUTPUT_HEAD not in arrays
    for name, path in paths.items():
        if not name or ":" in name:
            raise ValueError(f"an adapter cannot be called {name!r}; give it a name without a colon")
        directory = model_directory.resolve_model_directory(path)
        if not is_adapter(directory):
            raise ValueError(f"{path} holds no adapter ({ADAPTER_CONFIG} is missing), but a whole model")
        adapter = open_adapter(directory, base).adapter
        if tied and HEAD in adapter.factors:
            raise ValueError(f"{path} adapts the output head, which is the base's embedding; load it alone")
        for key, array in adapter.replaced.items():
            if key not in arrays or array.dtype != arrays[key].dtype or array.data != arrays[key].data:
                raise ValueError(f"{path} replaces {key} whole, so it cannot be served beside others; load it alone")
        found[name] = adapter
    return found


def base_directory(directory: Path) -> Path:
    """The model that an adapter names as its base: a directory, or a model of the hub's."""
    settings = files.read_json(directory / ADAPTER_CONFIG)
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if "fine_tune_type" in settings:
        raise ValueError(
            f"{directory} holds an adapter of mlx-lm's, which is not read; mlx_lm.fuse makes a model of it"
        )
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise ValueError(f"{directory} does not say which model it adapts; load that model, and this as its adapter")
    for place in (Path(name), directory / name):
        if place.exists():
            return model_directory.resolve_model_directory(place)
    try:
        return model_directory.resolve_model_directory(f"{name}@{revision}" if revision else name)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the base of the adapter in {directory}, {name}, is gone; load a copy of it, and this as its adapter"
        ) from None


VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")  # any makes a tokenizer's directory
CONFIG = "config.json"


def place_of(directory: Path, *names: str) -> Path:
    """Returns the directory of one of these files: a model's own or, for an adapter without it, its base's. A GGUF file
    stands for its own directory."""
    if is_adapter(directory) and not any((directory / name).is_file() for name in names):
        return base_directory(directory)
    return directory


def generation_config(directory: Path, base: Path | None = None) -> dict[str, Any]:
    """Returns what a model's `generation_config.json` says; an adapter's own goes over that of its `base`, which is the
    one that it names where none is given."""
    of_base = generation_config(base or base_directory(directory)) if is_adapter(directory) else {}
    return of_base | model_directory.load_generation_config(directory)


def _arrays(directory: Path) -> dict[str, HostArray]:
    """The values under canonical names."""
    if not (directory / f"{VALUES}.safetensors").is_file():
        pickled = directory / f"{VALUES}.bin"
        hint = "; adapter_model.bin is a pickled file, which is not read: save it as safetensors"
        raise FileNotFoundError(f"no {VALUES}.safetensors in {directory}{hint if pickled.is_file() else ''}")
    result = {}
    for saved, array in safetensors.read_safetensors(directory / f"{VALUES}.safetensors").items():
        name = model_directory.unwrapped(saved)
        if not name.startswith(PREFIX):
            raise ValueError(f"{directory} holds {name}; the names of an adapter begin with {PREFIX}")
        if ".original_module." in name:
            continue  # the base's, of a parameter that is replaced whole
        # Of a linear map that it changes, PEFT may save the base's weight too, and takes it over when loading.
        canonical = name.removeprefix(PREFIX).replace(".base_layer.weight", ".weight")
        result[canonical.replace(".modules_to_save.", ".")] = array
    return result


def _check_replaced(settings: Mapping[str, Any], config: ModelConfig, arrays: Mapping[str, HostArray]) -> None:
    """Raise ValueError where the file lacks a parameter that the settings say is saved whole, or the model has none of
    the name, and for an adapter of the embedding."""
    if any(".lora_embedding_" in name for name in arrays):
        raise ValueError(
            f"target_modules={settings.get('target_modules')!r} is not supported with {EMBEDDING}: linear maps alone "
            "are adapted, or an embedding saved whole by modules_to_save"
        )
    names = settings.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modules_to_save={names!r} must be a list of names")
    rows = [row.name for row in parameter_table(replace(config, tie_word_embeddings=False))]
    for name in names:
        whole = [row for row in rows if re.search(rf"{re.escape(name)}(\.|$)", row.rpartition(".")[0])]
        lacking = [row for row in whole if row not in arrays]
        if lacking or (not whole and name not in HEADS):
            what = f"the file lacks {shortened(lacking, 2)}" if whole else f"the model has no {name}"
            raise ValueError(f"modules_to_save={names!r} is not supported: {what}")


def _with_embeddings(config: ModelConfig, arrays: dict[str, HostArray], base: Path) -> ModelConfig:
    """The config with as many tokens as an embedding saved whole has. A tied model is untied where its embedding or its
    head alone is changed, as in PEFT: then what is not changed of both is the base's embedding, put into `arrays`."""
    embedding, head = arrays.get(EMBEDDING), arrays.get(OUTPUT_HEAD)
    if embedding is not None and len(embedding.shape) == 2:
        config = replace(config, vocab_size=embedding.shape[0])
    if not config.tie_word_embeddings or not any(name == EMBEDDING or name.startswith(f"{HEAD}.") for name in arrays):
        return config
    if head is not None and embedding is not None and head.dtype == embedding.dtype and head.data == embedding.data:
        del arrays[OUTPUT_HEAD]
        return config
    if head is None:
        arrays[OUTPUT_HEAD] = model_directory.load_tensors(base)[EMBEDDING]
    return replace(config, tie_word_embeddings=False)


# --- what PEFT's settings mean ---------------------------------------------------------------------------------------


def factors_of(settings: Mapping[str, Any], config: ModelConfig) -> dict[str, Factors]:
    """The linear maps that these settings change in this model; ValueError for what goes beyond."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type={settings.get('peft_type')!r} is not supported, only LORA")
    more = [key for key, value in settings.items() if key not in HARMLESS and value not in (None, False, 0, "")]
    more = [key for key in more if settings[key] not in ([], {})]
    if settings.get("bias", "none") != "none":
        more.append("bias")
    if settings.get("init_lora_weights", True) not in ORDINARY_STARTS:
        more.append("init_lora_weights")
    if settings.get("layers_pattern") in ("layers", ["layers"]):  # what these models call their layers
        more.remove("layers_pattern")
    if more:
        raise ValueError(f"{more[0]}={settings[more[0]]!r} is not supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    result = {}
    try:
        for module in linear_maps(config):
            if not _is_target(module, settings):
                continue
            own_rank, own_alpha = _by_pattern(ranks, module, rank), _by_pattern(alphas, module, alpha)
            if type(own_rank) is not int or own_rank < 1 or not isinstance(own_alpha, int | float):
                raise ValueError(f"r={own_rank!r} and lora_alpha={own_alpha!r} of {module} must be numbers above 0")
            result[module] = Factors(own_rank, own_alpha / (own_rank**0.5 if settings.get("use_rslora") else own_rank))
    except (re.error, TypeError, RecursionError) as error:
        raise ValueError(f"target_modules, or a pattern, is broken ({error})") from None
    if not result:
        raise ValueError(f"target_modules={settings.get('target_modules')!r} names no linear map of this model")
    return result


def _is_target(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether a linear map is among target_modules: names that it ends with, a regular expression, or all."""
    if settings.get("exclude_modules") and _matches(module, settings["exclude_modules"]):
        return False
    targets = settings.get("target_modules")
    if isinstance(targets, str) and targets.lower() in ("all-linear", ALL):
        return module != HEAD
    if not targets or not _matches(module, targets):
        return False
    layers = settings.get("layers_to_transform")
    if layers is None or layers == [] or isinstance(targets, str):
        return True
    number = re.search(r"\.layers\.(\d+)\.", module)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)


def _matches(module: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(is_called(module, name) for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a name matches."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def weights_digest(directory: Path | str) -> str:
    """One SHA-256 over the weights of a model directory."""
    return files.combined_sha256(weight_hashes(directory))


def weight_hashes(directory: Path | str) -> list[str]:
    """The SHA-256 of each file of weights of a model directory, in their order."""
    return [files.sha256(file) for file in weight_files(directory)]
