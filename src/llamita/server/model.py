"""The model that a server serves, a language model with its engine or a classifier, and what clients may know of it."""

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llamita.backend.choice import load_backend
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.embedding import Pooling
from llamita.inference.engine import Engine
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.server.errors import ApiError
from llamita.storage import model_directory, peft_directory
from llamita.text.answers import AnswerFormat, answer_format
from llamita.text.chat import Chat
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.classify import Classifier

T = TypeVar("T")
DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The keys of generation_config.json that are defaults of a request."""
DEFAULT_TEMPLATE = "plain"


@dataclass(frozen=True)
class ServedModel:
    """A model under the name by which clients ask for it: a language model (`llm`), or a `classifier`.

    `aliases` are further names of it, for clients whose own cannot be changed. `chat` lays conversations out; None
    where the model has no tokenizer. `is_chat_model` is true where it does so as the model was tuned, or as was asked
    for, and not by the plain template of last resort. `defaults` are the sampling parameters of a request that names
    none: those of the model's generation_config.json, else plain sampling. `pooling` is the one of embeddings where a
    request names none.
    """

    name: str
    llm: LLM | None = None
    classifier: Classifier | None = None
    chat: Chat | None = None
    is_chat_model: bool = False
    defaults: SamplingParams = SamplingParams()
    aliases: tuple[str, ...] = ()
    pooling: Pooling = "mean"
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock, repr=False)

    @functools.cached_property
    def answer_format(self) -> AnswerFormat:
        """How the chat template has the model write reasoning and calls of tools."""
        return AnswerFormat() if self.chat is None else answer_format(self.chat)

    @property
    def engine(self) -> Engine | None:
        """The engine of a language model."""
        return None if self.llm is None else self.llm.engine

    @property
    def config(self) -> ModelConfig:
        return (self.llm or self.require_classifier()).config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return (self.llm or self.require_classifier()).tokenizer

    def require_llm(self) -> LLM:
        """Returns the language model; `ApiError` for a classifier."""
        if self.llm is None:
            raise ApiError(400, "this model labels texts and writes none; ask /v1/classify", param="model")
        return self.llm

    def require_classifier(self) -> Classifier:
        """Returns the classifier; `ApiError` for a language model."""
        if self.classifier is None:
            raise ApiError(
                400, "this model has no classification head; ask /v1/decisions, which needs none", param="model"
            )
        return self.classifier

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; `ApiError` for a model without."""
        if self.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, so it reads and writes token ids alone", param="prompt")
        return self.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted(self.llm.engine.adapters)) if self.llm is not None else ()

    def adapter_of(self, name: str | None) -> str | None:
        """Returns the adapter that a request's `model` stands for, None for the model itself; 404 for another name."""
        if name is None or name == self.name or name in self.aliases:
            return None
        if name in self.adapters:
            return name
        known = ", ".join((self.name, *self.aliases, *self.adapters))
        raise ApiError(
            404, f"there is no model {name!r:.200}; served are: {known}", param="model", code="model_not_found"
        )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What may be asked of it, as /v1/models lists it."""
        if self.classifier is not None:
            return ("classify", "decisions")
        if self.chat is None:
            return ("completions", "embeddings")
        form = self.answer_format
        more = (("tools",) if form.calls is not None else ()) + (("reasoning",) if form.reasoning is not None else ())
        return ("chat", "completions", "embeddings", "look_inside", "decisions", *more)

    @property
    def fault(self) -> str:
        """What came out of a step of the engine and makes it unfit to go on; empty where nothing did."""
        return "" if self.llm is None else self.llm.service.failure

    @property
    def seconds_in_step(self) -> float:
        """Seconds that the step or the call under way has taken so far."""
        return 0.0 if self.llm is None else self.llm.service.seconds_in_step

    async def call(self, work: Callable[[], T]) -> T:
        """Returns the result of work on the model, done while nothing else uses it."""
        if self.llm is not None:
            return await self.llm.service.call_async(work)
        async with self._turn:
            return await asyncio.to_thread(work)


def serve_model(
    llm: LLM,
    name: str,
    template: str | None = None,
    generation: Mapping[str, Any] | None = None,
    *,
    aliases: Sequence[str] = (),
    pooling: Pooling = "mean",
) -> ServedModel:
    """Returns a loaded model as it is served: with its own chat template, `template`, or a plain one for a model
    without; and with the defaults of its generation_config.json (`generation`)."""
    chat, has_template = None, False
    if llm.tokenizer is not None:
        has_template = template is not None or bool(llm.tokenizer.chat_templates)
        chat = Chat(llm.tokenizer, template if has_template else DEFAULT_TEMPLATE)
    if taken := set(aliases) & {name, *llm.engine.adapters}:
        raise ValueError(f"the alias {min(taken)!r} is the name of the model or of an adapter; choose another")
    return ServedModel(
        name,
        llm,
        chat=chat,
        is_chat_model=has_template,
        defaults=sampling_defaults(generation or {}),
        aliases=tuple(aliases),
        pooling=pooling,
    )


def open_model(
    path: Path | str,
    *,
    name: str = "",
    template: str | None = None,
    adapters: Mapping[str, Path | str],
    aliases: Sequence[str] = (),
    pooling: Pooling = "mean",
    **options: Any,
) -> ServedModel:
    """Opens a model to be served. `options` are those of `LLM.load`; without a `name` it has that of its place."""
    directory = model_directory.resolve_model_directory(path)
    name = name or shown_name(path)
    if labels_texts(directory):
        backend = options["backend"]
        if isinstance(backend, str):
            backend = load_backend(backend, device=options["device"], threads=options["threads"])  # type: ignore[arg-type]
        classifier = Classifier.load(directory, backend, options["dtype"], options["device"], exact=options["exact"])
        return ServedModel(name, classifier=classifier, aliases=tuple(aliases))
    llm = LLM.load(directory, adapters=adapters, **options)
    return serve_model(llm, name, template, llm.generation, aliases=aliases, pooling=pooling)


def labels_texts(path: Path | str) -> bool:
    """Returns whether a model has a classification head."""
    directory = model_directory.resolve_model_directory(path)
    return model_directory.load_config(peft_directory.place_of(directory, peft_directory.CONFIG)).num_labels > 0


def shown_name(path: Path | str) -> str:
    """Returns a model's name for its clients: that of the hub, of its file, or of its directory."""
    place = Path(path)
    if place.exists():
        place = place.resolve()
        return place.stem if place.is_file() else place.name
    return str(path)


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingParams:
    """Returns the sampling parameters that a generation_config.json names; `do_sample: false` is greedy, and a top_k of
    -1 keeps every token, as with vLLM.

    ValueError for a value that is not allowed.
    """
    given = {name: generation[name] for name in DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    if given.get("top_k") == -1:
        given["top_k"] = 0
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise ValueError(f"{model_directory.GENERATION} of the model: {error}") from None
