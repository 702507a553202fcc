"""Preference tuning: a trained model learns, from pairs of answers, which of two is the better one.

What is read where lies in data/preferences.py, what a model before tuning thinks of the pairs in reference.py, the loss
in the backend. The backend is passed in.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from llamita.backend.adamw import AdamWSettings
from llamita.backend.interface import Backend
from llamita.backend.objectives import Preference
from llamita.data import preferences as pairs_data
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.conversations import BadRecords, Conversation, ConversationSource, recorded
from llamita.data.preferences import Layout, PairRows, Pairs, encode
from llamita.data.preferences import Preference as Pair
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig
from llamita.training.display import Display
from llamita.training.examples import Examples
from llamita.training.run_directory import RunDirectory
from llamita.training.trainer import TrainingResult
from llamita.workflows import answers, reference
from llamita.workflows.finetune import FinetuneConfig, finetune, load_base, make_step
from llamita.workflows.layouts import layout_of, source_of
from llamita.workflows.pretrain import check_run
from llamita.workflows.reading import HeldOutConfig, ReadingConfig

MEADOW_PAIRS = 4800
MEADOW_ANSWERS = 200


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """The options of `llamita dpo`."""

    run: RunConfig
    finetune: FinetuneConfig = FinetuneConfig()
    reading: ReadingConfig = ReadingConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    pairs: int | None = None
    """Read at most this many (meadow: write so many, 4,800 where left out, and a validation share more)."""
    template: str = ""
    """The chat template: chatml, r0, plain-eos, a file of Jinja, or text for none, answers following their prompts as
    they are. Left out: the model's own, else text."""
    sequence_length: int = 0
    """Tokens in a row, a prompt with an answer; pairs with a longer one are dropped. 0: as many as the longest that
    fits the model's positions."""
    form: Literal["dpo", "ipo"] = "dpo"
    """The loss: of a logistic model of preferences, or the square that holds the margin at 1 / (2 beta)."""
    beta: float = 0.1
    """The strength with which the model is held to what it was."""
    label_smoothing: float = 0.0
    """The share of pairs taken to be labelled the wrong way round; dpo alone."""
    normalize_lengths: bool = False
    """Compare means over the tokens of answers instead of sums, so that length counts for nothing; beta is then to be
    larger."""
    answers: int | None = None
    """Held-out prompts to answer at each evaluation, greedily; the share that is the chosen answer to the letter is the
    measure `exact`. It needs a chat template. Left out: 200 for meadow, elsewhere none."""
    training: TrainingConfig = TrainingConfig(steps=300, learning_rate=5e-5, adamw=AdamWSettings(weight_decay=0.0))
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        for name in ("sequence_length", "answers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        self.objective()
        if self.pairs is not None and self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")

    def objective(self) -> Preference:
        return Preference(self.form, self.beta, self.normalize_lengths, self.label_smoothing)


def dpo(
    config: DpoConfig,
    backend: Backend,
    *,
    report: Callable[[str], None] = print,
    display: Display | None = None,
) -> TrainingResult:
    """Tune a model on pairs of answers, or go on with the run in its directory where it is to be resumed.

    `report` is told what was read. ValueError or OSError, in one line, for options and data that cannot be met.
    """
    check_run(config)
    made = ConversationSource(meadow="train", limit=config.pairs or MEADOW_PAIRS, seed=config.training.seed)
    sources = config.held_out.sources(config.reading, config.pairs, made, "pairs")
    base = load_base(config.finetune)
    config = replace(config, template=source_of(config.template))
    layout, model = layout_of(base, config.template)
    bad = BadRecords(config.reading.skip_bad), BadRecords(config.reading.skip_bad)
    train, held_out = read(config, *sources, bad)
    positions = model.max_position_embeddings
    if config.sequence_length > positions:
        raise ValueError(f"sequence_length={config.sequence_length} is longer than the model's {positions} positions")
    longest = (config.sequence_length or positions) + 1
    sides = zip((train, held_out), bad, strict=True)
    encoded = [encode(layout, side, longest, of_side) for side, of_side in sides]
    rows = make_rows(config, encoded, base.tokenizer.pad_id)
    report(f"training: {encoded[0].counts}, in rows of {rows['train'].config.sequence_length} tokens")
    report(f"validation: {encoded[1].counts}")
    for line in (*bad[0].lines(), *bad[1].lines()):
        report(line)
    config = replace(config, training=config.held_out.updates(config.training, len(rows["train"])))
    objective = config.objective()
    step = make_step(config, backend, model, base.arrays, objective)
    asked = questions(config, layout, held_out, positions)
    examination = answers.Examination(step, layout.chat, asked) if asked and layout.chat else None
    training, size = config.training, config.training.rows_at_once

    def score_with_base(run: RunDirectory) -> None:
        reference.attach(run, rows, base.digest(), step.log_probs, size, objective.normalize_lengths, report)

    return finetune(
        config,
        base,
        backend,
        kind="preference tuning",
        identity={
            "data": {name: part.pairs.digest() for name, part in rows.items()},
            "pairs": {name: recorded(part.pairs.counts) for name, part in rows.items()},
            "objective": asdict(objective),
            "sequence_length": rows["train"].config.sequence_length,
            "answers": len(asked),
        },
        examples=Examples(
            BatchIterator(rows["train"], training.batch_size, training.seed),
            partial(evaluation_batches, rows["validation"], size, training.evaluation_rows) if encoded[1] else tuple,
            target="pair",
        ),
        step=step,
        model=model,
        on_evaluation=examination.shown if examination else None,
        measure=examination.measure if examination else None,
        before=score_with_base,
        display=display,
    )


def read(
    config: DpoConfig,
    source: ConversationSource,
    validation: ConversationSource | None,
    bad: tuple[BadRecords, BadRecords],
) -> tuple[list[Pair], list[Pair]]:
    """All pairs: those to train on, those to validate on; `bad` is what becomes of records that cannot be read."""
    if validation is not None:
        return list(pairs_data.preferences(source, bad[0])), list(pairs_data.preferences(validation, bad[1]))
    return pairs_data.split(
        pairs_data.preferences(source, bad[0]), config.reading.validation_share, config.training.seed
    )


def make_rows(config: DpoConfig, encoded: list[Pairs], pad_id: int | None) -> dict[str, PairRows]:
    """Rows over the pairs to train on and those to validate on, all of one length."""
    if not len(encoded[0]):
        raise ValueError(f"there is nothing to train on: {encoded[0].counts}")
    length = config.sequence_length or max(side.longest for side in encoded) - 1
    return {name: PairRows(side, length, pad_id) for name, side in zip(("train", "validation"), encoded, strict=True)}


def questions(config: DpoConfig, layout: Layout, held_out: list[Pair], positions: int) -> list[answers.Question]:
    """Held-out prompts to be answered at each evaluation."""
    count = (MEADOW_ANSWERS if config.reading.on_meadow else 0) if config.answers is None else config.answers
    if layout.chat is None:
        if config.answers:
            raise ValueError("--answers needs a chat template, and this model has none; name one with --template")
        return []
    conversations = [
        Conversation((*pair.prompt, *pair.chosen), pair.tools, pair.where, pair.variables) for pair in held_out
    ]
    return answers.questions(layout.chat, conversations, count, positions)
