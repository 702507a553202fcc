"""Instruction tuning: a trained model learns, from conversations, to answer.

The loss is that of pre-training, over the assistant's tokens alone, the token that ends its turn included. What is read
where lies in data/conversations.py, what becomes a row in data/examples.py. The backend is passed in.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

from llamita.backend.interface import Backend
from llamita.backend.objectives import NextToken
from llamita.data import conversations as talks
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.conversations import Conversation, ConversationSource
from llamita.data.examples import ConversationRows, EncodedConversations, TooLong, encode
from llamita.data.packing import RowsConfig
from llamita.model.config import ModelConfig
from llamita.text.chat import Chat
from llamita.training.display import Display
from llamita.training.interfaces import Examples, TrainingResult
from llamita.workflows import answers
from llamita.workflows.finetune import Base, finetune, load_base, make_step
from llamita.workflows.layouts import ending_answers, learn, refuse_what_writes_nothing, source_of
from llamita.workflows.pretrain import resumed
from llamita.workflows.reading import ValidatedConfig

MEADOW_CONVERSATIONS = 16000
MEADOW_TURNS = 3  # questions about a story, of which each costs a fraction of reading it
MEADOW_ANSWERS = 200
PACKED_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class SftConfig(ValidatedConfig):
    """What `llamita sft` takes."""

    data: tuple[str, ...] = ()
    """Files of JSON lines, each {"messages": [...]} or {"prompt": ..., "response": ...}; or the word meadow, for
    questions about stories of the embedded corpus."""
    validation_share: float = 0.05
    """The share of conversations to validate on, by a hash of what is said; 0 for none."""
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
    """What happens to a conversation longer than a row: it is dropped, or loses its end."""
    epochs: float = 0.0
    """How often to go through the conversations, instead of --steps; 0: as --steps says."""
    answers: int | None = None
    """Held-out questions to answer at each evaluation, greedily; the share of answers that are right to the letter
    becomes the measure `exact`, and chooses the best checkpoint. Left out: 200 for meadow; elsewhere 3, only shown."""
    learning_rate: float = 3e-4
    """The highest learning rate, reached after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate; not on norms and biases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conversations is not None and self.conversations < 1:
            raise ValueError(f"conversations={self.conversations} must be at least 1")


def sft(
    config: SftConfig,
    backend: Backend,
    *,
    report: Callable[[str], None] = print,
    display: Display | None = None,
) -> TrainingResult:
    """Tune config.model on conversations, or go on with the run in config.output where config.resume is set.

    `report` is told what was read. ValueError or OSError, in one line, for options and data that cannot be met.
    """
    config = resumed(config)
    train_source, validation_source = config.sources(config.conversations, meadow_source(config), "conversations")
    base = load_base(config)
    config, chat = learn_template(config, base)
    longest = _longest(config, base.config)
    encoded, held_out = read(config, chat, longest, train_source, validation_source)
    rows = make_rows(config, encoded, base)
    report(f"training: {encoded[0].counts}, in {len(rows[0]):,} rows of {rows[0].block - 1} tokens")
    report(f"validation: {encoded[1].counts}, in {len(rows[1]):,} rows")
    if config.epochs:
        config = replace(config, steps=math.ceil(config.epochs * len(rows[0]) / config.batch_size))
    model = ending_answers(base.config, chat)
    count = MEADOW_ANSWERS if config.on_meadow else answers.SHOWN
    count = count if config.answers is None else config.answers
    asked = answers.questions(chat, held_out, count, model.max_position_embeddings)
    measured = bool(asked) and (config.on_meadow or config.answers is not None)
    step = make_step(config, backend, model, base.arrays, NextToken())
    examination = answers.Examination(step, chat, asked)
    return finetune(
        config,
        base,
        backend,
        kind="instruction tuning",
        identity={
            "data": {"train": encoded[0].digest(), "validation": encoded[1].digest()},
            "conversations": {"train": asdict(encoded[0].counts), "validation": asdict(encoded[1].counts)},
            "template": hashlib.sha256(config.template.encode()).hexdigest(),
            "rows": asdict(rows[0].config),
            "answers": len(asked),
        },
        examples=Examples(
            BatchIterator(rows[0], config.batch_size, config.seed),
            partial(evaluation_batches, rows[1], config.micro_batch_size or config.batch_size, config.evaluation_rows)
            if len(rows[1])
            else tuple,
        ),
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
    return ConversationSource(meadow="train", limit=limit, turns=MEADOW_TURNS, seed=config.seed)


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
    config: SftConfig, chat: Chat, longest: int, source: ConversationSource, validation: ConversationSource | None
) -> tuple[list[EncodedConversations], list[Conversation]]:
    """What to train on and what to validate on, as tokens; and the latter as they were said."""
    train: Iterable[Conversation] = talks.conversations(source)
    if validation is None:
        train, held_out = talks.split(train, config.validation_share, config.seed)
    else:
        held_out = list(talks.conversations(validation))
    return [encode(chat, each, longest, config.too_long) for each in (train, held_out)], held_out


def make_rows(config: SftConfig, encoded: Sequence[EncodedConversations], base: Base) -> list[ConversationRows]:
    """Rows over the conversations to train on, then over those to validate on, all of one length."""
    if not len(encoded[0]):
        counts = encoded[0].counts
        raise ValueError(
            f"there is nothing to train on: {counts}; a longer --sequence-length or a "
            "smaller --validation-share may help"
        )
    length = max(int(each.lengths.max(initial=0)) for each in encoded) - 1
    if config.mode == "pack":
        length = max(length, min(PACKED_LENGTH, base.config.max_position_embeddings))
    layout = RowsConfig(config.mode, config.sequence_length or length, within_documents=config.mode == "pack")
    return [ConversationRows(each, layout, base.tokenizer.pad_id) for each in encoded]


def _longest(config: SftConfig, model: ModelConfig) -> int:
    """The most tokens that a conversation may have: the last is only predicted, never read."""
    if config.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length={config.sequence_length} is longer than the model's {model.max_position_embeddings} "
            "positions; shorten it"
        )
    return (config.sequence_length or model.max_position_embeddings) + 1
