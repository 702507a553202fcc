"""The model that a server serves, a language model with its engine or a classifier, and what clients may know of it."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.llm import LLM
from llamita.inference.service import Service
from llamita.model.config import ModelConfig
from llamita.server.errors import ApiError
from llamita.storage import model_directory
from llamita.text.chat import Chat
from llamita.text.tokenizer import Tokenizer

T = TypeVar("T")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The keys of generation_config.json that are defaults of a request."""
DEFAULT_TEMPLATE = "plain"


@dataclass(frozen=True)
class ServedModel:
    """A model under the name by which clients ask for it.

    `chat` lays conversations out; None where the model has no tokenizer. `defaults` are the sampling parameters of a
    request that names none: those of the model's generation_config.json, else plain sampling.
    """

    name: str
    llm: LLM
    chat: Chat | None
    defaults: SamplingParams = SamplingParams()
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def service(self) -> Service:
        return self.llm.service

    @property
    def config(self) -> ModelConfig:
        return self.llm.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.llm.tokenizer

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; `ApiError` for a model without."""
        if self.llm.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer, so it reads and writes token ids alone", param="prompt")
        return self.llm.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(sorted(self.llm.engine.adapters))

    def adapter_of(self, name: str | None) -> str | None:
        """Returns the adapter that a request's `model` stands for, None for the model itself; 404 for another name."""
        if name is None or name == self.name:
            return None
        if name in self.adapters:
            return name
        known = ", ".join((self.name, *self.adapters))
        raise ApiError(
            404, f"there is no model {name!r:.200}; served are: {known}", param="model", code="model_not_found"
        )

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What may be asked of it, as /v1/models lists it."""
        chat = ("chat",) if self.chat is not None else ()
        return (*chat, "completions")

    def close(self) -> None:
        """Ends all that is under way, and the engine's thread."""
        self.llm.close()

    async def call(self, work: Callable[[], T]) -> T:
        """Returns the result of work on the runner, done while nothing else uses it."""
        return await self.service.call_async(work)


def serve_model(
    llm: LLM, name: str, template: str | None = None, generation: Mapping[str, Any] | None = None
) -> ServedModel:
    """Returns a loaded model as it is served: with its own chat template, `template`, or a plain one for a model
    without; and with the defaults of its generation_config.json (`generation`)."""
    chat = None
    if llm.tokenizer is not None:
        has_own = bool(llm.tokenizer.chat_templates)
        chat = Chat(llm.tokenizer, template if template is not None or has_own else DEFAULT_TEMPLATE)
    return ServedModel(name, llm, chat, sampling_defaults(generation or {}))


def open_model(
    path: Path | str, *, name: str = "", template: str | None = None, adapters: Mapping[str, Path | str], **options: Any
) -> ServedModel:
    """Opens a model to be served. `options` are those of `LLM.load`; without a `name` it has that of its place."""
    directory = model_directory.resolve_model_directory(path)
    llm = LLM.load(directory, adapters=adapters, **options)
    return serve_model(llm, name or shown_name(path), template, read_generation_config(directory))


def shown_name(path: Path | str) -> str:
    """Returns a model's name for its clients: that of the hub, of its file, or of its directory."""
    place = Path(path)
    if place.exists():
        place = place.resolve()
        return place.stem if place.is_file() else place.name
    return str(path)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """Returns the contents of a model's generation_config.json; empty where there is none."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    value = json.loads(file.read_text("utf-8"))
    return value if isinstance(value, dict) else {}


def sampling_defaults(generation: Mapping[str, Any]) -> SamplingParams:
    """Returns the sampling parameters that a generation_config.json names; `do_sample: false` is greedy.

    ValueError for a value that is not allowed.
    """
    given = {name: generation[name] for name in SAMPLING if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams(**given)
