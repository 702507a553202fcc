"""Instruction tuning: a trained model learns, from conversations, to answer.

The loss is that of pre-training, over the assistant's tokens alone, the token that ends its turn included. What is read
where lies in data/conversations.py, what becomes a row in data/examples.py. The backend is passed in.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llamita.config import ModelConfig
from llamita.data import conversations as talks
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.conversations import MEADOW, Conversation, ConversationSource
from llamita.data.examples import ConversationRows, EncodedConversations, TooLong, encode
from llamita.data.packing import RowsConfig
from llamita.inference.llm import LLM
from llamita.objective import NextToken
from llamita.text.chat import Chat
from llamita.text.chat_templates import template_to_learn
from llamita.training.display import Display
from llamita.training.interfaces import Evaluation, Examples, TrainingResult
from llamita.workflows import answers
from llamita.workflows.finetune import Base, FinetuneConfig, finetune, load_base, make_step, resumed
from llamita.workflows.layouts import source_of
from llamita.workflows.pretrain import Backend, TrainableStep

MEADOW_CONVERSATIONS = 16000
MEADOW_TURNS = 3  # questions about a story, of which each costs a fraction of reading it
MEADOW_ANSWERS = 200
PACKED_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class SftConfig(FinetuneConfig):
    """What `llamita sft` takes."""

    data: tuple[str, ...] = ()
    """Files of JSON lines, each {"messages": [...]} or {"prompt": ..., "response": ...}; or the word meadow, for
    questions about stories of the embedded corpus."""
    dataset: str = ""
    """Instead of files: a dataset on the Hugging Face hub, or a local directory of one, with rows of that form."""
    dataset_config: str | None = None
    """The dataset's configuration, where it has several."""
    dataset_split: str = "train"
    """The dataset's split to read."""
    validation_data: tuple[str, ...] = ()
    """Files to validate on, instead of a share of the others."""
    validation_dataset_split: str | None = None
    """The dataset's split to validate on, instead of a share of the other."""
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
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} must be at least 0 and below 1")
        for name in ("sequence_length", "epochs", "answers"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.conversations is not None and self.conversations < 1:
            raise ValueError(f"conversations={self.conversations} must be at least 1")
        if MEADOW in self.data and len(self.data) > 1:
            raise ValueError("--data meadow stands alone; give either that word or files")
        if self.data and self.dataset:
            raise ValueError("--data and --dataset are both given; choose one")

    @property
    def on_meadow(self) -> bool:
        return self.data == (MEADOW,)

    def arguments(self) -> dict[str, Any]:
        """Files by their absolute names, so that the run can be resumed from any directory."""
        files = {"data": self.data, "validation_data": self.validation_data}
        absolute = {k: [n if n == MEADOW else str(Path(n).resolve()) for n in names] for k, names in files.items()}
        return super().arguments() | absolute


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
    train_source, validation_source = data_sources(config)
    base = load_base(config)
    config, chat = learn_template(config, base)
    longest = _longest(config, base.config)
    encoded, held_out = read(config, chat, longest, train_source, validation_source)
    rows = make_rows(config, encoded, base)
    report(f"training: {encoded[0].counts}, in {len(rows[0]):,} rows of {rows[0].block - 1} tokens")
    report(f"validation: {encoded[1].counts}, in {len(rows[1]):,} rows")
    if config.epochs:
        config = replace(config, steps=math.ceil(config.epochs * len(rows[0]) / config.batch_size))
    model = replace(base.config, eos_token_id=_ends(base.config, chat))
    count = MEADOW_ANSWERS if config.on_meadow else answers.SHOWN
    count = count if config.answers is None else config.answers
    asked = answers.questions(chat, held_out, count, model.max_position_embeddings)
    measured = bool(asked) and (config.on_meadow or config.answers is not None)
    step = make_step(config, backend, model, base.arrays, NextToken())
    examination = Examination(step, chat, asked)
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


def data_sources(config: SftConfig) -> tuple[ConversationSource, ConversationSource | None]:
    """Where to read what is trained on, and what validates; None for the latter where that is a share of the former."""
    if not config.data and not config.dataset:
        raise ValueError("--data is missing: give files of conversations, or the word meadow")
    if config.on_meadow:
        source = ConversationSource(
            meadow="train",
            limit=config.conversations or MEADOW_CONVERSATIONS,
            turns=MEADOW_TURNS,
            seed=config.seed,
        )
        return source, talks.for_validation(source, config.validation_share) if config.validation_share else None
    source = ConversationSource(
        files=tuple(map(Path, config.data)),
        dataset=config.dataset,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
        limit=config.conversations,
    )
    source.check()
    if config.validation_data:
        validation = ConversationSource(files=tuple(map(Path, config.validation_data)))
        validation.check()
        return source, validation
    if config.validation_dataset_split is not None:
        if not config.dataset:
            raise ValueError("--validation-dataset-split is a split of the dataset that --dataset names; give that too")
        return source, replace(source, dataset_split=config.validation_dataset_split, limit=None)
    return source, None


def learn_template(config: SftConfig, base: Base) -> tuple[SftConfig, Chat]:
    """The template that is to be learned, made the tokenizer's own, and the options with its source in them."""
    given = source_of(config.template)
    if base.config.num_labels:
        raise ValueError(f"{config.model} is a classifier, which writes no answers; give a language model as --model")
    tokenizer = base.tokenizer
    if tokenizer.vocab_size > base.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {config.model} has {tokenizer.vocab_size} tokens and the model embeddings for "
            f"{base.config.vocab_size}; one of them is another model's"
        )
    source = template_to_learn(tokenizer, given)
    if given:
        tokenizer.chat_templates.clear()
    tokenizer.chat_template = source
    chat = Chat(tokenizer)
    if not chat.end_of_turn[0]:
        raise ValueError(
            "the chat template writes no control token after an answer, so that the model would not learn to stop; "
            "use another with --template, such as plain-eos"
        )
    return replace(config, template=source), chat


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
        raise ValueError(f"there is nothing to train on: {counts}; a longer --sequence-length may help")
    length = max(int(each.lengths.max(initial=0)) for each in encoded) - 1
    if config.mode == "pack":
        length = max(length, min(PACKED_LENGTH, base.config.max_position_embeddings))
    layout = RowsConfig(config.mode, config.sequence_length or length, within_documents=config.mode == "pack")
    return [ConversationRows(each, layout, base.tokenizer.pad_id) for each in encoded]


class Examination:
    """Questions put to the weights as they are, once for an evaluation: scored by `measure`, then written out."""

    def __init__(self, step: TrainableStep, chat: Chat, asked: Sequence[answers.Question]) -> None:
        self._step, self._chat, self._asked = step, chat, asked
        self._answers: list[answers.Answer] = []

    def measure(self) -> dict[str, float]:
        self._answers = self._ask()
        return {"exact": sum(each.exact for each in self._answers) / len(self._answers)}

    def shown(self, evaluation: Evaluation) -> str:
        given = self._answers or self._ask()
        self._answers = []
        return answers.shown(given)

    def _ask(self) -> list[answers.Answer]:
        return answers.answer(LLM(self._step.runner(), self._chat.tokenizer), self._chat, self._asked)


def _longest(config: SftConfig, model: ModelConfig) -> int:
    """The most tokens that a conversation may have: the last is only predicted, never read."""
    if config.sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"sequence_length={config.sequence_length} is longer than the model's {model.max_position_embeddings} "
            "positions; shorten it"
        )
    return (config.sequence_length or model.max_position_embeddings) + 1


def _ends(model: ModelConfig, chat: Chat) -> int | tuple[int, ...]:
    """What ends a text of the tuned model: what ended one before, and what ends an answer."""
    ends = tuple(dict.fromkeys((*chat.end_of_turn[0], *model.eos_token_ids)))
    return ends[0] if len(ends) == 1 else ends
