"""Instruction tuning: a trained model learns, from conversations, to answer.

The loss is that of pre-training, over the assistant's tokens alone, the token that ends its turn included; with a
teacher it is mixed with the divergence from what that model finds likely there. What is read where lies in
data/conversations.py, what becomes a row in data/examples.py. The backend is passed in.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamita.backend.adamw import AdamWSettings
from llamita.backend.interface import Backend, Scorer
from llamita.backend.objectives import Distillation, NextToken
from llamita.data import conversations as talks
from llamita.data.batches import IGNORE_INDEX, Batch, Batches, BatchIterator, evaluation_batches
from llamita.data.conversations import BadRecords, Conversation, ConversationSource
from llamita.data.examples import ConversationRows, EncodedConversations, TooLong, encode
from llamita.data.packing import RowsConfig
from llamita.model.config import ModelConfig
from llamita.text.chat import Chat
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig
from llamita.training.display import Display
from llamita.training.examples import Examples
from llamita.training.trainer import TrainingResult
from llamita.workflows import answers
from llamita.workflows.finetune import Base, FinetuneConfig, finetune, load_base, make_step
from llamita.workflows.layouts import ending_answers, learn, refuse_what_writes_nothing, source_of
from llamita.workflows.pretrain import check_run, scorer_options
from llamita.workflows.reading import HeldOutConfig, ReadingConfig

MEADOW_CONVERSATIONS = 16000
MEADOW_TURNS = 3  # questions about a story, of which each costs a fraction of reading it
MEADOW_ANSWERS = 200
PACKED_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """The options of `llamita sft`."""

    run: RunConfig
    finetune: FinetuneConfig = FinetuneConfig()
    reading: ReadingConfig = ReadingConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    conversations: int | None = None
    """Read at most this many (meadow: write so many, 16,000 where left out, and a validation share more)."""
    template: str = ""
    """The chat template to learn: chatml, r0, plain-eos, or a file of Jinja. Left out: the model's own, else r0 on
    reserved tokens of its vocabulary, else plain-eos."""
    mode: Literal["pack", "pad"] = "pack"
    """pack: several conversations in a row, which do not see each other; pad: one a row."""
    sequence_length: int = 0
    """Tokens in a row. 0: as many as the longest conversation has that fits the model's positions; packed, at least
    512, where the model has as many."""
    too_long: TooLong = "drop"
    """A conversation longer than a row is dropped, or loses its end."""
    answers: int | None = None
    """Held-out questions to answer at each evaluation, greedily; the share of answers that are right to the letter
    becomes the measure `exact`, and chooses the best checkpoint. Left out: 200 for meadow; elsewhere 3, only shown."""
    teacher: Path | None = None
    """A model of the same tokenizer whose distribution over the next token is learned beside the token itself: a
    directory, a training run, a name on the hub. It is held in memory too."""
    teacher_weight: float = 0.5
    """Of the divergence from the teacher, in the place of as much of the ordinary loss."""
    teacher_temperature: float = 1.0
    """Divides the logits of teacher and student in the divergence."""
    training: TrainingConfig = TrainingConfig(learning_rate=3e-4, adamw=AdamWSettings(weight_decay=0.0))
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        for name in ("sequence_length", "answers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.conversations is not None and self.conversations < 1:
            raise ValueError(f"conversations={self.conversations} must be at least 1")
        self.distillation()

    def distillation(self) -> Distillation:
        return Distillation(self.teacher_weight, self.teacher_temperature)


def sft(
    config: SftConfig,
    backend: Backend,
    *,
    report: Callable[[str], None] = print,
    display: Display | None = None,
) -> TrainingResult:
    """Tune a model on conversations, or go on with the run in its directory where it is to be resumed.

    `report` is told what was read. ValueError or OSError, in one line, for options and data that cannot be met.
    """
    check_run(config)
    train_source, validation_source = config.held_out.sources(
        config.reading, config.conversations, meadow_source(config), "conversations"
    )
    base = load_base(config.finetune)
    config, chat = learn_template(config, base)
    longest = _longest(config, base.config)
    bad = BadRecords(config.reading.skip_bad), BadRecords(config.reading.skip_bad)
    encoded, held_out = read(config, chat, longest, train_source, validation_source, bad)
    rows = make_rows(config, encoded, base)
    teacher = load_teacher(config, backend, base, rows[0].block - 1)
    report(f"training: {encoded[0].counts}, in {len(rows[0]):,} rows of {rows[0].block - 1} tokens")
    report(f"validation: {encoded[1].counts}, in {len(rows[1]):,} rows")
    for line in (*bad[0].lines(), *bad[1].lines()):
        report(line)
    config = replace(config, training=config.held_out.updates(config.training, len(rows[0])))
    model = ending_answers(base.config, chat)
    count = MEADOW_ANSWERS if config.reading.on_meadow else answers.SHOWN
    count = count if config.answers is None else config.answers
    asked = answers.questions(chat, held_out, count, model.max_position_embeddings)
    measured = bool(asked) and (config.reading.on_meadow or config.answers is not None)
    step = make_step(config, backend, model, base.arrays, config.distillation() if teacher else NextToken())
    examination = answers.Examination(step, chat, asked)
    examples = Examples(
        BatchIterator(rows[0], config.training.batch_size, config.training.seed),
        partial(evaluation_batches, rows[1], config.training.rows_at_once, config.training.evaluation_rows)
        if len(rows[1])
        else tuple,
        origin=lambda row: f"conversations {', '.join(map(str, rows[0].members(row)))} of those kept",
    )
    return finetune(
        config,
        base,
        backend,
        kind="instruction tuning",
        identity={
            "data": {"train": encoded[0].digest(), "validation": encoded[1].digest()},
            "conversations": {
                "train": talks.recorded(encoded[0].counts),
                "validation": talks.recorded(encoded[1].counts),
            },
            "template": hashlib.sha256(config.template.encode()).hexdigest(),
            "rows": asdict(rows[0].config),
            "answers": len(asked),
            **({"teacher": {"model": teacher.digest, **asdict(config.distillation())}} if teacher else {}),
        },
        examples=teacher.taught(examples) if teacher else examples,
        step=step,
        model=model,
        on_evaluation=examination.shown if asked else None,
        measure=examination.measure if measured else None,
        best_measure="exact" if measured else None,
        display=display,
    )


def meadow_source(config: SftConfig) -> ConversationSource:
    """Questions about Meadow's stories."""
    limit = config.conversations or MEADOW_CONVERSATIONS
    return ConversationSource(meadow="train", limit=limit, turns=MEADOW_TURNS, seed=config.training.seed)


def learn_template(config: SftConfig, base: Base) -> tuple[SftConfig, Chat]:
    """The template that is to be learned, made the tokenizer's own, and the options with its source in them."""
    refuse_what_writes_nothing(base)
    chat = learn(base, source_of(config.template))
    if not chat.end_of_turn[0]:
        raise ValueError(
            "the chat template writes no control token after an answer, so that the model would not learn to stop; "
            "use another with --template, such as plain-eos"
        )
    assert base.tokenizer.chat_template is not None
    return replace(config, template=base.tokenizer.chat_template), chat


def read(
    config: SftConfig,
    chat: Chat,
    longest: int,
    source: ConversationSource,
    validation: ConversationSource | None,
    bad: tuple[BadRecords, BadRecords],
) -> tuple[list[EncodedConversations], list[Conversation]]:
    """Returns what to train on and what to validate on, as tokens; and the latter as they were said.

    `bad` is what becomes of bad records of the two. Where both are of one source, one that cannot be read counts with
    those to train on.
    """
    train: Iterable[Conversation] = talks.conversations(source, bad[0])
    if validation is None:
        train, held_out = talks.split(train, config.reading.validation_share, config.training.seed)
    else:
        held_out = list(talks.conversations(validation, bad[1]))
    sides = zip((train, held_out), bad, strict=True)
    return [encode(chat, side, longest, config.too_long, of_side) for side, of_side in sides], held_out


def make_rows(config: SftConfig, encoded: Sequence[EncodedConversations], base: Base) -> list[ConversationRows]:
    """Rows over the conversations to train on, then over those to validate on, all of one length."""
    if not len(encoded[0]):
        counts = encoded[0].counts
        raise ValueError(
            f"there is nothing to train on: {counts}; a longer --sequence-length or a "
            "smaller --validation-share may help"
        )
    length = max(int(part.lengths.max(initial=0)) for part in encoded) - 1
    if config.mode == "pack":
        length = max(length, min(PACKED_LENGTH, base.config.max_position_embeddings))
    layout = RowsConfig(config.mode, config.sequence_length or length, within_documents=config.mode == "pack")
    return [ConversationRows(part, layout, base.tokenizer.pad_id) for part in encoded]


# --- the teacher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """A frozen model, asked about each batch when it is its turn; what it says is not kept."""

    scorer: Scorer
    digest: str
    temperature: float
    rows_at_once: int
    vocab_size: int

    def taught(self, examples: Examples) -> Examples:
        """Returns the same examples, each batch with what the teacher says about it."""
        return replace(
            examples,
            batches=TaughtBatches(examples.batches, self),
            validation=lambda: map(self.teach, examples.validation()),
        )

    def teach(self, batch: Batch) -> Batch:
        """Returns the batch with `teacher_log_probs_BSV`, as `Distillation` describes it.

        S is a power of two where the rows are long enough, so that a backend that compiles for shapes meets few.
        """
        counts_B1 = (batch.labels_BT != IGNORE_INDEX).sum(-1, keepdims=True)
        length = min(batch.labels_BT.shape[1], 1 << (int(counts_B1.max()) - 1).bit_length())
        log_probs_BSV = np.zeros((len(counts_B1), length, self.vocab_size), dtype=np.float32)
        scored_BS = np.arange(length) < counts_B1
        for start in range(0, len(counts_B1), self.rows_at_once):
            part = slice(start, start + self.rows_at_once)
            log_probs_BSV[part][scored_BS[part]] = self.scorer.distributions(batch.rows(part), self.temperature)
        return replace(batch, extras={**batch.extras, "teacher_log_probs_BSV": log_probs_BSV})


class TaughtBatches:
    """Training batches with what the teacher says about each."""

    def __init__(self, batches: Batches, teacher: Teacher) -> None:
        self.batches, self.teacher = batches, teacher

    def next(self) -> Batch:
        return self.teacher.teach(self.batches.next())

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)


def load_teacher(config: SftConfig, backend: Backend, base: Base, longest_row: int) -> Teacher | None:
    """Returns the teacher that is asked for; ValueError, in one line, for one that has nothing to say to `base`."""
    if config.teacher is None:
        if config.distillation() != Distillation():
            raise ValueError("--teacher-weight and --teacher-temperature say how to learn from a --teacher; give one")
        return None
    found = load_base(replace(config.finetune, model=config.teacher), "--teacher")
    if found.config.num_labels:
        raise ValueError(f"{found.directory} is a classifier, which predicts no tokens; give a language model")
    if found.tokenizer.hash != base.tokenizer.hash:
        raise ValueError(f"the teacher {found.directory} has another tokenizer than {base.directory}; both must be one")
    if found.config.vocab_size != base.config.vocab_size:
        raise ValueError(
            f"the teacher {found.directory} has embeddings for {found.config.vocab_size} tokens and {base.directory} "
            f"for {base.config.vocab_size}; they must be as many"
        )
    if found.config.max_position_embeddings < longest_row:
        raise ValueError(
            f"the rows have {longest_row} tokens and the teacher {found.directory} has "
            f"{found.config.max_position_embeddings} positions; give a shorter --sequence-length"
        )
    return Teacher(
        backend.build_scorer(found.config, found.arrays, **scorer_options(config)),
        found.digest(),
        config.teacher_temperature,
        config.training.rows_at_once,
        found.config.vocab_size,
    )


def _longest(config: SftConfig, model: ModelConfig) -> int:
    """The most tokens that a conversation may have: the last is only predicted, never read."""
    if config.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length={config.sequence_length} is longer than the model's {model.max_position_embeddings} "
            "positions; shorten it"
        )
    return (config.sequence_length or model.max_position_embeddings) + 1
