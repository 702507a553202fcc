"""A language model from Python: text or token ids in, text out, whole or as it comes.

The face of the engine for programs and for the command line. The backend is passed in, so this module loads none:

    from llamita.inference.llm import LLM
    from llamita.backend.torch.infer.runner import load_runner

    llm = LLM.load("runs/stories", load_runner)
    print(llm.generate("Once upon a time").text)

Every form of it (one prompt or many, whole or streamed, waiting or asynchronous, from one thread or several) goes
through the same engine, which serves them together.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, overload

from llamita.backend.interface import Runner
from llamita.backend.sampling_params import SamplingParams
from llamita.inference import async_llm, many
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter
from llamita.inference.engine import Engine
from llamita.inference.request import Generation, Request, TokenEvent
from llamita.inference.shared_engine import SharedEngine
from llamita.model.config import ModelConfig
from llamita.storage import files, model_directory, peft_directory
from llamita.text.tokenizer import Tokenizer

__all__ = ["LLM", "Generation", "Prompt"]


Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = str | Sequence[str | None] | None


class LLM:
    """A runner, its tokenizer (None for a model that comes without: ids in, ids out), and an engine over both."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Collection[int] | None = None,
        config: EngineConfig | None = None,
        drafter: Drafter | None = None,
        adapters: Collection[str] = (),
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.engine = Engine(runner, tokenizer, eos_token_ids, config, drafter, adapters)
        self.shared = SharedEngine(self.engine)
        self._ids = itertools.count()

    @classmethod
    def load(
        cls,
        model: Path | str,
        load_runner: Callable[..., Runner],
        config: EngineConfig | None = None,
        drafter: Drafter | None = None,
        adapters: Mapping[str, Path | str] | None = None,
    ) -> "LLM":
        """Load a model directory, or the best checkpoint of a run directory, with the backend that `load_runner` is.

        `adapters` are served over it, each to the requests that name it.
        """
        directory = model_directory.resolve_model_directory(model)
        runner = load_runner(directory, adapters=adapters) if adapters else load_runner(directory)
        place = peft_directory.place_of(directory, *peft_directory.VOCABULARY)
        tokenizer = (
            Tokenizer.load(place) if any((place / name).is_file() for name in peft_directory.VOCABULARY) else None
        )
        if tokenizer is not None and tokenizer.vocab_size > runner.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens and the model embeddings for "
                f"{runner.config.vocab_size}; one of them is another model's"
            )
        ends = _end_tokens(directory, runner.config)
        return cls(runner, tokenizer, ends, config, drafter, tuple(adapters or ()))

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.runner.config

    def save(self, path: Path | str, overwrite: bool = False) -> None:
        """Write a Hugging Face model directory, whole or not at all: config, weights in their type, tokenizer.

        FileExistsError where the path exists, unless `overwrite`.
        """
        arrays = self.runner.weights()
        with files.atomic_directory(path, overwrite) as directory:
            model_directory.save_config(directory, self.config, next(iter(arrays.values())).dtype)
            model_directory.save_tensors(directory, arrays)
            if self.tokenizer is not None:
                self.tokenizer.save(directory)

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The prompt as token ids, text with the BOS token first where the tokenizer has one; ids stay as they are."""
        if not isinstance(prompt, str):
            return tuple(int(token_id) for token_id in prompt)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer beside it; give the prompt as token ids")
        tokens = tuple(self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None))
        if not tokens:
            raise ValueError("the prompt is empty and this model has no BOS token to start from; give some text")
        return tokens

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, params: Params = None, *, adapter: Adapters = None, progress: bool = False
    ) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[int], params: Params = None, *, adapter: Adapters = None, progress: bool = False
    ) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: Params = None, *, adapter: Adapters = None, progress: bool = False
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        adapter: Adapters = None,
        progress: bool = False,
    ) -> Generation | list[Generation]:
        """Continue a prompt to its end and return all of it, or do so for many at once.

        A text or a sequence of token ids is one prompt and gives one `Generation`; a sequence of those is many and
        gives a list in their order. With `n` above 1, a prompt's `Generation` is its first continuation and has all
        under `continuations`. `params` are for all, or one for each, and so is `adapter`, a name of those that were
        loaded (None: the model itself); `progress` shows a bar. A prompt that cannot be
        served raises ValueError before any is begun; one that fails under way RuntimeError, which ends the others.
        """
        requests = self._requests(prompts, params, adapter)
        if many.is_one(prompts):
            return next(many.as_finished(self.shared, requests))[1]
        found: list[Generation | None] = [None] * len(requests)
        finished = many.as_finished(self.shared, requests)
        for index, generation in many.with_bar(finished, len(requests)) if progress else finished:
            found[index] = generation
        return [generation for generation in found if generation is not None]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[str]:
        """Continue the prompt and yield text as it becomes certain; RuntimeError where that fails under way."""
        if params is not None and params.n > 1:
            raise ValueError(f"n={params.n} texts cannot be one stream; read events(), which carry an index")
        return _texts(self.events(prompt, params, adapter=adapter))

    def events(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        background: bool = False,
    ) -> Iterator[TokenEvent]:
        """Continue the prompt and yield an event for every token. Closing the iterator ends the request.

        A prompt that cannot be served raises ValueError here, before the first event is asked for. A continuation that
        fails under way ends with an event whose finish reason is "error". `background` has a worker thread do the
        steps, so that Ctrl-C ends the waiting at once and never a step in its midst.
        """
        [request] = self._requests([prompt], params, adapter)
        return (many.follow_in_background if background else many.follow)(self.shared, request)

    @overload
    async def generate_async(  # type: ignore[overload-overlap]
        self, prompts: str, params: Params = None, *, adapter: Adapters = None
    ) -> Generation: ...
    @overload
    async def generate_async(
        self, prompts: Sequence[int], params: Params = None, *, adapter: Adapters = None
    ) -> Generation: ...
    @overload
    async def generate_async(
        self, prompts: Sequence[Prompt], params: Params = None, *, adapter: Adapters = None
    ) -> list[Generation]: ...
    async def generate_async(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, adapter: Adapters = None
    ) -> Generation | list[Generation]:
        """`generate` for asyncio: what many tasks ask for at once is served together."""
        requests = await asyncio.to_thread(self._requests, prompts, params, adapter)
        found = await async_llm.gather(self.shared, requests)
        return found[0] if many.is_one(prompts) else found

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        buffer: int | None = None,
        *,
        adapter: str | None = None,
    ) -> AsyncGenerator[TokenEvent]:
        """`events` for asyncio. Leaving the iterator, or cancelling the task that reads it, ends the request.

        A reader that is more than `buffer` events behind is given up with RuntimeError, so that it cannot fill memory.
        """
        [request] = await asyncio.to_thread(self._requests, [prompt], params, adapter)
        async with contextlib.aclosing(async_llm.follow(self.shared, request, buffer)) as events:
            async for event in events:
                yield event

    def close(self) -> None:
        """End what is open, and the thread that serves asyncio. A model that is let go of needs no closing."""
        self.shared.close()

    def request(self, prompt: Prompt, params: SamplingParams | None = None, adapter: str | None = None) -> Request:
        """A request of the engine for a prompt, checked: ValueError where this model cannot serve it."""
        request = Request(next(self._ids), self.encode(prompt), params or SamplingParams(), adapter=adapter)
        self.engine.check(request)
        return request

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: Params, adapter: Adapters = None) -> list[Request]:
        """The requests of one prompt or of many, all checked before any is begun."""
        listed = cast(list[Prompt], [prompts] if many.is_one(prompts) else list(prompts))
        each = [params] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        names = [adapter] * len(listed) if adapter is None or isinstance(adapter, str) else list(adapter)
        for what, given in (("sampling parameters", len(each)), ("adapters", len(names))):
            if given != len(listed):
                raise ValueError(f"{len(listed)} prompts came with {given} {what}; give one, or one each")
        if len(listed) == 1:
            return [self.request(listed[0], each[0], names[0])]
        requests = []
        for index, (prompt, chosen, name) in enumerate(zip(listed, each, names, strict=True)):
            try:
                requests.append(self.request(prompt, chosen, name))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return requests


def _end_tokens(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a text: `generation_config.json` may name more of them than `config.json`, never fewer."""
    ends = dict.fromkeys(config.eos_token_ids)
    file = directory / "generation_config.json"
    if file.is_file():
        value = files.read_json(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int for token_id in ids):
            raise ValueError(f"{file}: eos_token_id={value!r} must be a token id, or several")
        ends |= dict.fromkeys(ids)
    return tuple(ends)


def _texts(events: Iterator[TokenEvent]) -> Iterator[str]:
    for event in events:
        if event.finish_reason == "error":
            raise RuntimeError(event.error)
        if event.text:
            yield event.text
