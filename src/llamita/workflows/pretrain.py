"""Pre-training: a preset, prepared data and the training options become a run; samples come from the inference engine.

The backend is passed in. Everything that can be wrong with the options is found before anything is written.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from llamita.backend.interface import Backend
from llamita.backend.sampling_params import SamplingParams
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.inspect import documents_of_row
from llamita.data.mixture import MixedRows, MixtureIterator, normalised
from llamita.data.packing import RowMode, Rows, RowsConfig
from llamita.data.read_ahead import ReadAhead
from llamita.data.shards import Manifest, TokenShards, load_tokenizer
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.model.parameters import InitializationName
from llamita.model.presets import preset
from llamita.model.scaling import at_depth, model_at_depth
from llamita.text.tokenizer import Tokenizer
from llamita.training import loggers, run_directory
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig, TrainingVerb, saved_options
from llamita.training.display import Display
from llamita.training.evaluation import Evaluation, OnEvaluation
from llamita.training.examples import Examples, TokenText, ValidationPart
from llamita.training.launch import launched_processes
from llamita.training.trainer import Trainer, TrainingResult

TRAIN, VALIDATION = "train", "validation"
DEFAULT_SEQUENCE_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The options of `llamita train`."""

    run: RunConfig
    recipe: str = ""
    """Take every option that is not given from a recipe; llamita recipe lists them."""
    data: tuple[Path, ...] = ()
    """Prepared data (llamita prepare), several directories for a mixture of them. Needed, but when resuming."""
    weights: tuple[float, ...] = ()
    """The share of rows from each directory of --data. Left out: in proportion to their tokens."""
    preset: str = "tiny"
    """The model's shape; llamita info lists the presets."""
    depth: int = 0
    """In place of a preset: so many blocks, from which shape, rows, batch, learning rate and steps follow where they
    are not given. llamita plan --depths shows them."""
    set: tuple[str, ...] = ()
    """Changes to the preset, as in --set hidden_size=128 num_hidden_layers=4."""
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer."""
    initialization: InitializationName = "fan-in"
    """fan-in: std 1/sqrt(n_in); gpt-2: std 0.02, less on the projections into the residual stream."""
    mode: RowMode = "pack"
    """pad: each document padded to whole rows; pack: documents back to back; best-fit: whole documents, as many as fit
    in a row; random: windows at random offsets."""
    sequence_length: int = 0
    """Tokens in a row; 0: as many as the model has positions, at most 256."""
    within_documents: bool = False
    """Keep attention inside a document; validation is then over whole documents, each in rows of its own."""
    sample_tokens: int = 100
    """Length of the sample written at each evaluation; 0: none."""
    sample_prompt: str = ""
    """The text that the sample continues; empty: a new text."""
    own_code: Annotated[Path | None, tyro.conf.arg(name="with")] = None
    """The folder of the course min-llama, whose model and AdamW are trained in the place of the library's (PyTorch,
    one process)."""
    training: TrainingConfig = TrainingConfig()
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        for name in ("sequence_length", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.depth and self.preset:
            raise ValueError(f"--depth {self.depth} and --preset {self.preset} both name a shape; give one of them")
        if not self.depth and not self.preset:
            raise ValueError("the model's shape is missing: give --preset or --depth")


def pretrain(
    config: PretrainConfig,
    backend: Backend,
    *,
    floor: float | None = None,
    on_evaluation: OnEvaluation | None = None,
    display: Display | None = None,
) -> TrainingResult:
    """Train as `config` says, or go on with the run in its directory where it is to be resumed.

    `floor` is the least possible loss in nats per character, for the plot. `on_evaluation` is called after each
    evaluation, after the sample was written. ValueError or OSError, in one line, for options that cannot be met.
    """
    check_run(config)
    tokenizer = load_common_tokenizer(config.data)
    model = model_config(config, tokenizer)
    rows = RowsConfig(config.mode, sequence_length(config, model), config.within_documents)
    identity = {
        "kind": "pretraining",
        "model": asdict(model),
        "initialization": config.initialization,
        "data": {"tokenizer": tokenizer.hash, **_data_identity(config)},
        "rows": asdict(rows),
        "training": config.training.identity(),
    }
    run_directory.check_identity(config.run.output, identity, config.run.resume)  # before the weights are made
    examples = make_examples(config, tokenizer, rows)
    step = backend.build_train_step(model, initialization=config.initialization, **step_options(config))
    prompt = sample_prompt(config, tokenizer, examples)

    def after_evaluation(evaluation: Evaluation) -> str | None:
        texts = []
        if config.sample_tokens:
            params = SamplingParams(max_tokens=config.sample_tokens, seed=config.training.seed)
            texts.append(sample(LLM(step.runner(), tokenizer, engine=EngineConfig(warm_up=False)), prompt, params))
        more = on_evaluation(evaluation) if on_evaluation else None
        return "\n".join([*texts, *([more] if more else [])]) or None

    with run_directory.open_run(
        config.run.output, identity, saved_options(config), config.run.resume, group=step.group
    ) as run:
        trainer = Trainer(
            config.training,
            model,
            step,
            examples,
            run,
            tokenizer_directory=config.data[0] / "tokenizer",
            on_evaluation=after_evaluation,
            floor=floor,
            display=display,
        )
        return trainer.run()


def step_options(config: TrainingVerb) -> dict[str, Any]:
    """Returns what a backend's `build_train_step` takes of the options that every kind of training has."""
    training, machine = config.training, config.machine
    compiled = {"compile": True} if machine.compile else {}  # left out, a backend does what is usual with it
    parallel = {"parallel": machine.parallel_settings()} if launched_processes() > 1 else {}
    recomputed = {"recompute": machine.recompute} if machine.recompute not in ("none", 0) else {}
    attention = {"attention": machine.attention} if machine.attention != "masked" else {}
    return {
        "seed": training.seed,
        "optimizer": training.adamw,
        "muon": training.muon if training.optimizer == "muon" else None,
        "max_grad_norm": training.max_grad_norm,
        **scorer_options(config),
        **compiled,
        **parallel,
        **recomputed,
        **attention,
    }


def scorer_options(config: TrainingVerb) -> dict[str, Any]:
    """Returns what a backend's `build_scorer` takes of the same."""
    return {
        "precision": config.training.precision,
        "device": config.machine.device,
        "threads": config.machine.threads,
    }


def check_run(config: TrainingVerb) -> None:
    """ValueError or OSError where a run cannot be begun, or gone on with, in its directory; before anything is read."""
    if config.machine.tensor_parallel > 1 and launched_processes() == 1:
        raise ValueError(
            f"tensor_parallel={config.machine.tensor_parallel} needs several processes; start them with: torchrun "
            f"--nproc-per-node {config.machine.tensor_parallel} -m llamita ..."
        )
    run_directory.check(config.run.output, config.run.resume)
    loggers.require(config.training.log)


def model_config(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The preset with the changes asked for, and the tokenizer's vocabulary and special tokens."""
    changes = dict(parse_change(text) for text in config.set)
    vocabulary = changes.setdefault("vocab_size", tokenizer.vocab_size)
    if vocabulary != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={vocabulary} does not fit the tokenizer of {config.data[0]}, which has {tokenizer.vocab_size} "
            "tokens; leave vocab_size out to take the tokenizer's"
        )
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    changes = {"dropout": config.dropout, **special, **changes}
    if config.depth:
        return model_at_depth(config.depth, changes.pop("vocab_size"), config.sequence_length, **changes)
    return preset(config.preset, **changes)


def options_of_depth(data: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that `given["depth"]` stands for over prepared data, by their names, beside those given."""
    lengths = {name: given[name] for name in ("sequence_length", "batch_size") if given.get(name)}
    return at_depth(given["depth"], load_tokenizer(data).vocab_size, **lengths).options() | dict(given)


def parse_change(text: str) -> tuple[str, Any]:
    """`hidden_size=128` -> ("hidden_size", 128); ValueError for an unknown name or a value that is no number."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    numbers = {field.name: field.type for field in dataclasses.fields(ModelConfig) if field.type in (int, float, bool)}
    del numbers["num_labels"]
    if not equals:
        raise ValueError(f"--set {text!r} must have the form name=value, as in hidden_size=128")
    if name not in numbers:
        raise ValueError(f"--set {name!r} is no field of a model; choose from {', '.join(numbers)}")
    kind = numbers[name]
    try:
        if kind is bool:
            return name, {"true": True, "false": False, "1": True, "0": False}[value.strip().lower()]
        return name, int(value) if kind is int else float(value)
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"--set {name}={value.strip()!r} must be {expected}") from None


def sequence_length(config: PretrainConfig, model: ModelConfig) -> int:
    """Tokens in a row: what was asked for, or as many as the model takes up to a limit."""
    length = config.sequence_length or min(model.max_position_embeddings, DEFAULT_SEQUENCE_LENGTH)
    if length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length={length} is longer than the model's {model.max_position_embeddings} positions; shorten "
            f"it, or add --set max_position_embeddings={length}"
        )
    return length


def load_common_tokenizer(data: Sequence[Path]) -> Tokenizer:
    """The tokenizer that made all of the data; ValueError where there is none, or not one alone."""
    if not data:
        raise ValueError("--data is missing: give the directory that llamita prepare wrote")
    tokenizer = load_tokenizer(data[0])
    for other in data[1:]:
        if Manifest.load(other).tokenizer_hash != tokenizer.hash:
            raise ValueError(
                f"{data[0]} and {other} were not made by the same tokenizer; prepare one again with that of the other"
            )
    return tokenizer


def make_examples(config: PretrainConfig, tokenizer: Tokenizer, rows: RowsConfig) -> Examples:
    """Training batches and validation batches over the data; without a validation split, none of those."""
    special = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    training = config.training
    names = _names(config.data)
    train = {name: Rows(TokenShards(place, TRAIN), rows, *special) for name, place in names.items()}
    validation = {}
    for name, place in names.items():
        if VALIDATION in Manifest.load(place).splits:
            held_out = Rows(TokenShards(place, VALIDATION), rows.for_evaluation(), *special)
            validation[name] = partial(evaluation_batches, held_out, training.rows_at_once, training.evaluation_rows)
    pieces = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    text = TokenText(
        # A character is a byte that does not continue another: one that is not 0b10xxxxxx.
        characters_V=np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces], dtype=np.int64),
        bytes_V=np.array([len(piece) for piece in pieces], dtype=np.int64),
    )
    if len(train) > 1:
        weights = dict(zip(names, mixture_weights(config), strict=True))
        mixture = MixtureIterator(MixedRows(train), tuple(weights.values()), training.batch_size, training.seed)
        parts = tuple(ValidationPart(name, weights[name], batches) for name, batches in validation.items())
        return Examples(ReadAhead(mixture), text=text, parts=parts, origin=partial(_origin_in_mixture, mixture.rows))
    ((name, rows_of_one),) = train.items()
    batches = BatchIterator(rows_of_one, training.batch_size, training.seed)
    return Examples(
        ReadAhead(batches), validation.get(name, tuple), text, origin=partial(documents_of_row, rows_of_one)
    )


def _origin_in_mixture(rows: MixedRows, index: int) -> str:
    name, source, row = rows.place(index)
    assert isinstance(source, Rows)
    return f"{name}, {documents_of_row(source, row)}"


def mixture_weights(config: PretrainConfig) -> tuple[float, ...]:
    """The weights of the directories of data, which sum to one: those given, or in proportion to training tokens."""
    tokens = [Manifest.load(place).splits[TRAIN].tokens for place in config.data]
    return normalised(config.weights or tokens, len(config.data))


def _names(data: Sequence[Path]) -> dict[str, Path]:
    """Directories by their names or, where those are not enough to tell them apart, with a number behind."""
    found = [place.resolve().name for place in data]
    return {
        name if found.count(name) == 1 else f"{name}-{number}": place
        for number, (name, place) in enumerate(zip(found, data, strict=True), start=1)
    }


def _data_identity(config: PretrainConfig) -> dict[str, Any]:
    """One hash a split of the data; of a mixture, those of each directory and its weight."""
    found = [{name: _digest(split) for name, split in Manifest.load(place).splits.items()} for place in config.data]
    if len(found) == 1:
        if config.weights:
            raise ValueError("--weights says how to mix several directories of --data, and there is only one")
        return found[0]
    weights = mixture_weights(config)
    return {
        f"source-{number}": {**splits, "weight": weight}
        for number, (splits, weight) in enumerate(zip(found, weights, strict=True), start=1)
    }


def sample_prompt(config: PretrainConfig, tokenizer: Tokenizer, examples: Examples) -> str | tuple[int, ...]:
    """Returns what samples continue: the prompt given, else the BOS token, else the first token of the first row."""
    if config.sample_prompt or tokenizer.bos_id is not None:
        return config.sample_prompt
    batches = examples.batches
    assert isinstance(batches, ReadAhead)
    assert isinstance(batches.order, BatchIterator | MixtureIterator)
    return (int(batches.order.rows.batch(np.zeros(1, dtype=np.int64)).tokens_BT[0, 0]),)


def sample(llm: LLM, prompt: str | tuple[int, ...], params: SamplingParams) -> str:
    """The prompt and its continuation, as text."""
    assert llm.tokenizer is not None
    shown = prompt if isinstance(prompt, str) else llm.tokenizer.decode(prompt)
    return shown + llm.generate(prompt, params).text


def _digest(split: Any) -> str:
    """One hash over the files of a split."""
    files = [*split.shards, split.index]
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()
