"""The part that every kind of tuning shares: a trained model to begin from, and a run of the one trainer.

What is learned (examples, objective) is the caller's. The backend is passed in.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from llamita.backend.interface import Backend, TrainStep
from llamita.backend.objectives import Objective
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import ALL, LoraSettings
from llamita.model.parameters import CLASSIFIER
from llamita.storage import files, model_directory
from llamita.storage.peft_directory import AdapterFiles, BaseModel, weight_hashes
from llamita.text.tokenizer import Tokenizer
from llamita.training import run_directory
from llamita.training.config import TrainingVerb, saved_options
from llamita.training.display import Display
from llamita.training.evaluation import OnEvaluation
from llamita.training.examples import Examples
from llamita.training.run_directory import RunDirectory, WeightFiles
from llamita.training.trainer import Trainer, TrainingResult
from llamita.workflows.pretrain import step_options


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The model that tuning begins from, and what of it is trained."""

    model: Path | None = None
    """The model to begin from: a directory, a training run, a name on the hub. Needed, but when resuming."""
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer."""
    tuning: Literal["full", "lora", "head"] = "full"
    """Trained is all of the model, a low-rank adapter over it (and a classifier's head), or that head alone."""
    lora_rank: int = 8
    """Rank of the adapter's matrices."""
    lora_alpha: float = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """On the adapter's input."""
    lora_targets: tuple[str, ...] = (ALL,)
    """The linear maps to adapt: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head; all: those of
    the blocks."""
    lora_rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA), for high ranks."""

    def __post_init__(self) -> None:
        self.lora()

    def lora(self) -> LoraSettings:
        """Returns the settings of the adapter."""
        return LoraSettings(
            self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets), self.lora_rank_stabilized
        )


class FinetuneVerb(TrainingVerb, Protocol):
    """The options of a verb that tunes a model."""

    @property
    def finetune(self) -> FinetuneConfig: ...


@dataclass(frozen=True)
class Base:
    """The model that a run begins from; arrays are mapped, not read."""

    directory: Path
    config: ModelConfig
    arrays: dict[str, HostArray]
    tokenizer: Tokenizer

    @cached_property
    def hashes(self) -> list[str]:
        """Of the files of weights, which are read for it once."""
        return weight_hashes(self.directory)

    def digest(self) -> str:
        """One hash over the files that the model's values and its tokens depend on."""
        file = self.directory / "config.json"
        config = [files.sha256(file)] if file.is_file() else []  # a GGUF file holds both
        return files.combined_sha256([*config, *self.hashes], self.tokenizer.hash)


def load_base(config: FinetuneConfig, flag: str = "--model") -> Base:
    """The model to begin from; ValueError or FileNotFoundError, in one line, where there is none."""
    if config.model is None:
        raise ValueError(f"{flag} is missing: give the model to begin from")
    directory = model_directory.resolve_model_directory(config.model)
    model = replace(model_directory.load_config(directory), dropout=config.dropout)
    ends = model_directory.end_tokens(model, model_directory.load_generation_config(directory))
    model = model_directory.with_end_tokens(model, ends)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has {tokenizer.vocab_size} tokens and the model embeddings for "
            f"{model.vocab_size}; one of them is another model's"
        )
    return Base(directory, model, model_directory.load_tensors(directory), tokenizer)


def finetune(
    config: FinetuneVerb,
    base: Base,
    backend: Backend,
    *,
    kind: str,
    identity: dict[str, Any],
    examples: Examples,
    step: TrainStep | None = None,
    model: ModelConfig | None = None,
    objective: Objective | None = None,
    on_evaluation: OnEvaluation | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    best_measure: str | None = None,
    before: Callable[[RunDirectory], None] | None = None,
    display: Display | None = None,
) -> TrainingResult:
    """Train from `base` on `examples`, or go on with the run in its directory.

    `identity` is what decides the result besides the base and the options of training (hashes of data, for one).
    `model` is the base's config with what the kind changes (labels, special tokens). The tokenizer, chat template
    included, is written beside every checkpoint. `step` is made from base and objective where it is not given. `before`
    is called with the run held and the weights still those of the base, also where a run goes on.
    """
    model = model or base.config
    _check_tuning(config.finetune, model, base)
    whole = {
        "kind": kind,
        "model": asdict(model),
        "base": base.digest(),
        **identity,
        "training": config.training.identity(),
        **_tuning_identity(config.finetune),
    }
    run_directory.check_identity(config.run.output, whole, config.run.resume)  # before the weights are made
    if step is None:
        assert objective is not None
        step = make_step(config, backend, model, base.arrays, objective)
    weight_files = _weight_files(config.finetune, base)
    with run_directory.open_run(
        config.run.output, whole, saved_options(config), config.run.resume, weight_files, step.group
    ) as run:
        tokenizer = run.file("tokenizer")
        if run.writes:
            with files.atomic_directory(tokenizer, overwrite=True) as temporary:
                base.tokenizer.save(temporary)
        if before is not None:
            before(run)
        trainer = Trainer(
            config.training,
            model,
            step,
            examples,
            run,
            tokenizer_directory=tokenizer,
            on_evaluation=on_evaluation,
            measure=measure,
            best_measure=best_measure,
            display=display,
        )
        return trainer.run()


def make_step(
    config: FinetuneVerb,
    backend: Backend,
    model: ModelConfig,
    arrays: dict[str, HostArray],
    objective: Objective,
) -> TrainStep:
    """The backend's training step over a model with values, all of which are trained or what `tuning` says."""
    if config.finetune.tuning == "head" and not model.num_labels:
        raise ValueError("--tuning head trains a classifier's head, and a language model has none; use lora or full")
    options = step_options(config) | tuning_options(config.finetune)
    return backend.build_train_step(model, arrays, objective=objective, **options)


def tuning_options(config: FinetuneConfig) -> dict[str, Any]:
    """Returns the options of `build_train_step` that say what is to be trained."""
    if config.tuning == "lora":
        return {"adapter": config.lora()}
    return {"trainable": CLASSIFIER.__eq__} if config.tuning == "head" else {}


def _check_tuning(config: FinetuneConfig, model: ModelConfig, base: Base) -> None:
    """Refuse, in one line, an adapter for a model that is not its base."""
    if config.tuning != "lora":
        return
    config.lora().factors(model)
    changed = [
        f.name
        for f in fields(model)
        if f.name not in OF_THE_ADAPTED and getattr(model, f.name) != getattr(base.config, f.name)
    ]
    if changed:
        raise ValueError(
            f"--tuning lora leaves the model as it is, but here its {changed[0]} would change from "
            f"{getattr(base.config, changed[0])} to {getattr(model, changed[0])}; use --tuning full"
        )


OF_THE_ADAPTED = (
    *("num_labels", "label_names", "problem_type", "tie_word_embeddings", "dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that may differ between a model and its base without another set of weights below the head."""


def _tuning_identity(config: FinetuneConfig) -> dict[str, Any]:
    """Returns what of the tuning decides a run's result."""
    settings = asdict(config.lora()) if config.tuning == "lora" else {}
    return {} if config.tuning == "full" else {"tuning": {"what": config.tuning, **settings}}


def _weight_files(config: FinetuneConfig, base: Base) -> WeightFiles | None:
    """Returns how checkpoints are written: an adapter's as the adapter alone."""
    if config.tuning != "lora":
        return None
    assert config.model is not None
    on_hub = not config.model.exists()
    name = str(config.model) if on_hub else str(base.directory.resolve())
    return AdapterFiles(config.lora(), BaseModel(name, files.combined_sha256(base.hashes)))
