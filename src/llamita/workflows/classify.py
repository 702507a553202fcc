"""Tuning a language model to label texts, and a tuned model that labels them.

The state after the last token of a text goes through a linear head, `score.weight`. Checkpoints open in transformers'
sequence-classification classes with the same logits. The backend is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from llamita.backend.interface import Backend, Runner
from llamita.backend.objectives import Classification
from llamita.data.batches import BatchIterator
from llamita.data.labelled import Fields, LabelledTexts, absolute, read_labelled, read_mapping, validation_of
from llamita.data.labelled_batches import EncodedTexts, Keep, LabelledRows, encode_texts, labelled_evaluation
from llamita.evaluation.calibration import with_temperature
from llamita.evaluation.classification import label_log_probabilities
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.parameters import CLASSIFIER, OUTPUT_HEAD, initial_values, parameter_table
from llamita.model.quantization import SCALE
from llamita.storage import calibration, model_directory, peft_directory
from llamita.text.tokenizer import Tokenizer
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig
from llamita.training.examples import Examples
from llamita.training.trainer import TrainingResult
from llamita.workflows.finetune import Base, FinetuneConfig, finetune, load_base
from llamita.workflows.pretrain import check_run

ACCURACY = "accuracy"
Report = Callable[[str], None]


def absolute_sources(sources: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of sources as they are from anywhere."""
    return tuple(map(absolute, sources))


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """The options of `llamita classify train`."""

    run: RunConfig
    finetune: FinetuneConfig = FinetuneConfig()
    data: tuple[str, ...] = field(default=(), metadata={"saved": absolute_sources})
    """Labelled texts to learn from: files (label ||| sentence, .csv, .tsv, .jsonl; gzip or zstd), meadow[:COUNT], or
    `hub:NAME[:CONFIG][@SPLIT]`. Needed, but when resuming."""
    validation: tuple[str, ...] = field(default=(), metadata={"saved": absolute_sources})
    """Labelled texts to choose the best checkpoint by. Of meadow and hub data left out: their validation split."""
    label_mapping: Path | None = None
    """A JSON list of the labels' names in the order of their numbers, or an object of their numbers."""
    labels: tuple[str, ...] = ()
    """The same as names. Left out: the labels found in the data."""
    text_field: str = "text"
    """The column or field of a text in CSV, JSON lines and hub datasets."""
    label_field: str = "label"
    """That of its label."""
    tsv_quotes: bool = False
    """Fields of .tsv files may stand in quotes, as in .csv; without it a quote there is a character like any other."""
    sequence_length: int = 0
    """Tokens of a text that are read, its context; 0: as many as the model has positions."""
    keep: Keep = "end"
    """The side of a longer text that is kept."""
    head_dropout: float = 0.1
    """On the state that the head reads."""
    class_weights: tuple[str, ...] = ()
    """The weight of each label's loss, in the order of the labels; or balanced: texts / (labels x texts of it)."""
    seeds: tuple[int, ...] = ()
    """Train once with each seed, in OUTPUT/seed-N, and report mean and standard deviation."""
    own_code: Annotated[Path | None, tyro.conf.arg(name="with")] = None
    """The folder of the course min-llama, whose classifier and AdamW are trained in the place of the library's
    (PyTorch, one process)."""
    training: TrainingConfig = TrainingConfig(learning_rate=3e-4, evaluation_rows=0)
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        if self.sequence_length < 0:
            raise ValueError(f"sequence_length={self.sequence_length} must not be negative")
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"head_dropout={self.head_dropout} must lie in [0, 1)")
        if self.label_mapping and self.labels:
            raise ValueError("--label-mapping and --labels both name the labels; give one of them")
        if len(set(self.seeds)) < len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds={self.seeds} must be different and not negative")


def train_classifier(config: ClassifyConfig, backend: Backend, report: Report = print) -> TrainingResult:
    """Tune as `config` says, or go on with the run in its directory; the best checkpoint is the most accurate.

    The loss of a batch is the sum of weight x -log p over its texts, divided by the number of texts: with balanced
    weights these are 1 in the mean over the training texts. ValueError or OSError, in one line, before anything is
    written.
    """
    check_run(config)
    task = read_task(config, report)
    return finetune(
        config,
        task.base,
        backend,
        kind="classification",
        model=task.model,
        identity=task.identity,
        examples=task.examples,
        objective=task.objective,
        best_measure=ACCURACY if task.validated else None,
    )


@dataclass(frozen=True)
class Task:
    """All that a run needs before it begins: a base with its new head, the texts, the objective."""

    base: Base
    model: ModelConfig
    examples: Examples
    objective: Classification
    identity: dict[str, Any]
    validated: bool


def read_task(config: ClassifyConfig, report: Report) -> Task:
    """Read and check what `config` names; `report` is told what was found."""
    if not config.data:
        raise ValueError("--data is missing: give the labelled texts to learn from")
    base = load_base(config.finetune)
    train, validation = read_data(config)
    context = context_length(config.sequence_length, base.config)
    objective = Classification(config.head_dropout, class_weights(config.class_weights, train))
    base, model = with_head(config, base, train.names, context, report)
    pad_id = model.pad_token_id or 0

    def rows(what: str, texts: LabelledTexts, whole: bool) -> LabelledRows:
        encoded = encode_texts(base.tokenizer, texts.texts, context, config.keep, texts.source)
        report(_described(what, texts, encoded, config.keep))
        return LabelledRows(encoded, texts.labels, pad_id, whole)

    training = config.training
    batches = BatchIterator(rows("training", train, config.machine.compile), training.batch_size, training.seed)
    examples = Examples(batches, target="text")
    if validation is not None:
        held_out = rows("validation", validation, False)
        evaluation = partial(labelled_evaluation, held_out, training.rows_at_once, training.evaluation_rows)
        examples = replace(examples, validation=evaluation)
        if shared := len(set(train.texts) & set(validation.texts)):
            report(f"note: the training texts hold {shared} of the validation texts too")
    epochs = training.steps * training.batch_size / len(train)
    report(f"{training.steps} updates of {training.batch_size} texts are {epochs:.1f} epochs")
    identity = {
        "data": {"train": train.digest(), "validation": validation and validation.digest()},
        "objective": asdict(objective),
        "context": {"length": context, "keep": config.keep},
    }
    return Task(base, model, examples, objective, identity, validation is not None)


def read_data(config: ClassifyConfig) -> tuple[LabelledTexts, LabelledTexts | None]:
    """The training texts, and those that choose the best checkpoint, under the same labels."""
    fields = Fields(config.text_field, config.label_field, config.tsv_quotes)
    names = read_mapping(config.label_mapping) if config.label_mapping else config.labels
    train = read_labelled(config.data, "train", names, fields)
    held_out = config.validation or validation_of(config.data)
    if not held_out:
        return train, None
    return train, read_labelled(held_out, "validation", train.names, fields)


def context_length(asked: int, model: ModelConfig) -> int:
    """Tokens of a text that are read."""
    if asked > model.max_position_embeddings:
        raise ValueError(f"sequence_length={asked} is more than the model's {model.max_position_embeddings} positions")
    return asked or model.max_position_embeddings


def class_weights(asked: Sequence[str], train: LabelledTexts) -> tuple[float, ...]:
    """The weight of each label; a label without a training text has 1 where they are balanced."""
    if tuple(asked) == ("balanced",):
        counts = train.counts()
        weights_C = len(train) / (np.count_nonzero(counts) * np.maximum(counts, 1))
        return tuple(np.where(counts > 0, weights_C, 1.0).tolist())
    if not asked:
        return ()
    try:
        weights = tuple(float(text) for text in asked)
    except ValueError:
        weights = ()
    if (
        len(weights) != len(train.names)
        or not all(0 <= weight < float("inf") for weight in weights)
        or not any(weights)
    ):
        names = ", ".join(train.names)
        raise ValueError(f"class_weights={' '.join(asked)!r} must be 'balanced', or a number for each of {names}")
    return weights


def with_head(
    config: ClassifyConfig, base: Base, names: tuple[str, ...], context: int, report: Report
) -> tuple[Base, ModelConfig]:
    """The base with a head for these labels in place of its own, and the config of the two.

    A base that has a head for the same labels keeps it; another head is drawn as the table of parameters says. What
    pads is the tokenizer's pad token, else EOS, else BOS: none of them ends a text here, so that transformers, which
    looks for the last token that does not pad, finds the one that the label was learned at.
    """
    tokenizer = base.tokenizer
    pads = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id)
    pad_id = next((token_id for token_id in pads if token_id is not None), None)
    model = replace(base.config, num_labels=len(names), label_names=names, pad_token_id=pad_id, problem_type="")
    rows = {row.name: row for row in parameter_table(model)}
    left_out = (OUTPUT_HEAD, OUTPUT_HEAD + SCALE)
    arrays = {name: array for name, array in base.arrays.items() if name not in left_out}
    if base.config.labels != names or not base.config.scores_labels:
        if base.config.num_labels:
            report(f"the head of {base.directory} for {', '.join(base.config.labels)} is left out; a new one is drawn")
        head = initial_values(rows[CLASSIFIER], config.training.seed)
        arrays[CLASSIFIER] = HostArray.from_numpy(head)
    laid_out = tokenizer.for_classification(pad_id, context, config.keep == "end")
    return replace(base, arrays=arrays, tokenizer=laid_out), model


def _described(what: str, texts: LabelledTexts, encoded: EncodedTexts, keep: Keep) -> str:
    counts = ", ".join(f"{name} {count}" for name, count in zip(texts.names, texts.counts(), strict=True))
    cut = f"{encoded.truncated} of them cut, their {keep} kept" if encoded.truncated else "none is cut"
    return (
        f"{what}: {len(texts)} texts ({counts}); longest {encoded.longest} tokens, context of {encoded.context}: {cut}"
    )


# --- a tuned model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier:
    """A tuned model that labels texts, cut as its tokenizer's files say."""

    directory: Path
    config: ModelConfig
    tokenizer: Tokenizer
    runner: Runner
    temperature: float = 1.0
    """The number that the head's logits are divided by, from the model's `calibration.json`."""

    @classmethod
    def load(
        cls, model: Path, backend: Backend, dtype: str = "auto", device: str = "auto", *, exact: bool = False
    ) -> Classifier:
        """Opens a model, a run or an adapter; ValueError where it has no head.

        `exact`: probabilities that are the same bits for a text alone and in any batch (PyTorch on a CPU, float32).
        """
        directory = model_directory.resolve_model_directory(model)
        runner = backend.load_runner(directory, dtype, device, exact=exact)
        if not runner.config.num_labels:
            raise ValueError(
                f"{directory} is a language model without a classification head; tune it with llamita classify train, "
                "or ask it with llamita classify zero-shot"
            )
        if not runner.config.scores_labels:
            meaning = runner.config.problem_type or "regression"
            raise ValueError(
                f"{directory} has a head whose num_labels={runner.config.num_labels} numbers are for {meaning}: they "
                "do not tell which of several labels is right; llamita.load gives them as they are, as the logits of "
                "runner.forward(tokens)"
            )
        tokenizer = Tokenizer.load(peft_directory.place_of(directory, *peft_directory.VOCABULARY))
        temperature = calibration.load(directory).head_temperature(runner.config.labels, directory)
        return cls(directory, runner.config, tokenizer, runner, temperature)

    @property
    def context(self) -> int:
        return min(
            self.tokenizer.max_length or self.config.max_position_embeddings, self.config.max_position_embeddings
        )

    @property
    def keep(self) -> Literal["end", "start"]:
        return "end" if self.tokenizer.keeps_end else "start"

    def encode(self, texts: Sequence[str], where: str = "") -> EncodedTexts:
        return encode_texts(self.tokenizer, texts, self.context, self.keep, where)

    def log_probabilities(self, encoded: EncodedTexts) -> np.ndarray:
        """log p of each label, calibrated where the model is: float64 [n, labels]."""
        log_p = label_log_probabilities(self.runner, encoded.tokens, self.config.num_labels)
        return with_temperature(log_p, self.temperature)
