"""What every kind of tuning after pre-training shares: a trained model to begin from, and a run of the one trainer.

What is learned (examples, objective) is the caller's. The backend is passed in.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamita import checkpoint, files
from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.objective import Objective
from llamita.text.tokenizer import Tokenizer
from llamita.training import loggers, run_directory
from llamita.training.config import Config, TrainingConfig, take_over
from llamita.training.display import Display
from llamita.training.interfaces import Examples, OnEvaluation, TrainingResult
from llamita.training.trainer import Trainer
from llamita.workflows.pretrain import Backend, TrainableStep, step_options


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """The options that every kind of tuning shares."""

    model: Path | None = None
    """The model to begin from: a directory, a training run, a name on the hub. Needed, but when resuming."""
    dropout: float = 0.0
    """On embeddings, attention weights and the output of each sublayer."""


@dataclass(frozen=True)
class Base:
    """The model that a run begins from; arrays are mapped, not read."""

    directory: Path
    config: ModelConfig
    arrays: dict[str, HostArray]
    tokenizer: Tokenizer

    def digest(self) -> str:
        """One hash over the files that the model's values and its tokens depend on."""
        total = hashlib.sha256(self.tokenizer.hash.encode())
        for file in sorted([self.directory / "config.json", *self.directory.glob("model*.safetensors")]):
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        return total.hexdigest()


def resumed(config: Config) -> Config:
    """The options of a run, those of an earlier call taken over where it goes on; checked before anything is read."""
    if config.resume:
        config = take_over(config, run_directory.read_manifest(config.output)["arguments"])
    run_directory.check(config.output, config.resume)
    loggers.require(config.log)
    return config


def load_base(config: FinetuneConfig, flag: str = "--model") -> Base:
    """The model to begin from; ValueError or FileNotFoundError, in one line, where there is none."""
    if config.model is None:
        raise ValueError(f"{flag} is missing: give the model to begin from")
    directory = checkpoint.resolve_model_directory(config.model)
    model = replace(checkpoint.load_config(directory), dropout=config.dropout)
    return Base(directory, model, checkpoint.load_tensors(directory), Tokenizer.load(directory))


def finetune(
    config: FinetuneConfig,
    base: Base,
    backend: Backend,
    *,
    kind: str,
    identity: dict[str, Any],
    examples: Examples,
    step: TrainableStep | None = None,
    model: ModelConfig | None = None,
    objective: Objective | None = None,
    on_evaluation: OnEvaluation | None = None,
    measure: Callable[[], Mapping[str, float]] | None = None,
    best_measure: str | None = None,
    display: Display | None = None,
) -> TrainingResult:
    """Train from `base` on `examples`, or go on with the run in config.output.

    `identity` is what decides the result besides the base and the options of training (hashes of data, for one).
    `model` is the base's config with what the kind changes (labels, special tokens). The tokenizer, chat template
    included, is written beside every checkpoint. `step` is made from base and objective where it is not given.
    """
    model = model or base.config
    whole = {
        "kind": kind,
        "model": asdict(model),
        "base": base.digest(),
        **identity,
        "training": config.identity(),
    }
    if config.resume:  # a changed option is named before the weights are made
        run_directory.compare(run_directory.read_manifest(config.output)["identity"], whole)
    if step is None:
        assert objective is not None
        step = make_step(config, backend, model, base.arrays, objective)
    with run_directory.open_run(config.output, whole, config.arguments(), config.resume) as run:
        tokenizer = run.file("tokenizer")
        with files.atomic_directory(tokenizer, overwrite=True) as temporary:
            base.tokenizer.save(temporary)
        trainer = Trainer(
            config,
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
    config: FinetuneConfig,
    backend: Backend,
    model: ModelConfig,
    arrays: dict[str, HostArray],
    objective: Objective,
    **more: Any,
) -> TrainableStep:
    """The backend's training step over a model with values."""
    return backend(model, arrays, objective=objective, **step_options(config), **more)
