"""A language model in Python: takes text or token ids and gives text, whole or as it comes.

    import llamita

    model = llamita.load("runs/stories")
    print(model.generate("Once upon a time").text)

All calls (one prompt or many, whole or streamed, blocking or asynchronous, from one thread or several) go through the
same engine, which serves them together.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from llamita.backend.choice import load_backend
from llamita.backend.interface import Backend, BackendName, Runner
from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import Drafter, DraftModel, PromptLookup
from llamita.inference.embedding import Pooling, embed
from llamita.inference.engine import Engine
from llamita.inference.inspection import Inspection, look_inside
from llamita.inference.request import Generation, PromptTarget, Request, TokenEvent
from llamita.inference.service import Service
from llamita.model.config import ModelConfig
from llamita.progress import ProgressBar
from llamita.storage import calibration, files, model_directory, peft_directory
from llamita.storage.calibration import Calibration
from llamita.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = str | Sequence[str | None] | None


class LLM:
    """A language model: a runner, its tokenizer (None for a model without: ids in, ids out), and an engine over both.

    `load` opens one; the constructor takes a runner that exists already, such as that of a model under training.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Collection[int] | None = None,
        engine: EngineConfig | None = None,
        drafter: Drafter | None = None,
        adapters: Collection[str] = (),
        calibration: Calibration = Calibration(),  # noqa: B008 - it is frozen
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.calibration = calibration
        """The temperatures that were fitted to this model's label likelihoods; decisions follow them."""
        self._ends = runner.config.eos_token_ids if eos_token_ids is None else tuple(eos_token_ids)
        self.generation = generation or {}
        """What the model's generation_config.json says."""
        self.engine = Engine(runner, tokenizer, eos_token_ids, engine, drafter, adapters)
        self.service = Service(self.engine)
        self._ids = itertools.count()

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        backend: BackendName | Backend = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str = "auto",
        threads: int = 0,
        exact: bool = False,
        engine: EngineConfig | None = None,
        draft: Path | str | Drafter = "",
        adapters: Mapping[str, Path | str] | None = None,
    ) -> "LLM":
        """Loads a language model: a Hugging Face model directory, a training run, a GGUF file, or a name on the hub
        (`owner/name`).

        `backend` is "torch", "mlx", "auto" for MLX on Apple silicon where it is installed, else PyTorch; or one that
        was loaded. `dtype` is that of weights and cache, "auto" that of the file. `device` is "cpu", "cuda" (PyTorch),
        "gpu" (MLX), or "auto" for a GPU where there is one. PyTorch alone has `threads` (0: PyTorch's choice) and
        `exact`: logits that are the same bits alone and in any batch (float32 on the CPU, slower). `engine` sets the
        limits of the engine. `draft` guesses tokens ahead, which changes the speed but no token: "lookup" searches the
        text for earlier occurrences of its last tokens; else it is the directory of a smaller model of the same
        vocabulary, or a drafter. `adapters` (directories by name) are served over the model in one batch with it, each
        to the requests that name it; `path` may also be an adapter's directory.

        The result generates (`generate`, `stream`), shows what it expects and attends to (`look_inside`), turns texts
        into vectors (`embed`), gives logits and residual streams (`runner.forward`), and writes itself (`save`).
        FileNotFoundError or ValueError, in one line, where the model is missing, broken, or of a kind that Llamita does
        not have; ModuleNotFoundError where the framework is not installed.
        """
        if isinstance(backend, str):
            backend = load_backend(backend, device=device, threads=threads, exact=exact)
        drafter: Drafter | None = PromptLookup() if draft == "lookup" else None
        if not isinstance(draft, Path | str):
            drafter = draft
        elif draft and drafter is None:
            drafter = DraftModel(backend.load_runner(draft, dtype, device, threads))
        directory = model_directory.resolve_model_directory(path)
        places = {name: Path(place) for name, place in (adapters or {}).items()}
        vocabulary = peft_directory.place_of(directory, *peft_directory.VOCABULARY)
        runner = backend.load_runner(directory, dtype, device, threads, exact, places)
        tokenizer = Tokenizer.load(vocabulary) if Tokenizer.is_in(vocabulary) else None
        if tokenizer is not None and tokenizer.vocab_size > runner.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens and the model embeddings for "
                f"{runner.config.vocab_size}; one of them is another model's"
            )
        generation = peft_directory.generation_config(directory)
        ends = model_directory.end_tokens(runner.config, generation)
        return cls(runner, tokenizer, ends, engine, drafter, tuple(places), calibration.load(directory), generation)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.runner.config

    def save(self, path: Path | str, overwrite: bool = False) -> None:
        """Writes a Hugging Face model directory, whole or not at all: config, weights in their type, tokenizer.

        FileExistsError where the path exists, unless `overwrite`.
        """
        arrays = self.runner.weights()
        with files.atomic_directory(path, overwrite) as directory:
            config = self.config
            if self._ends != model_directory.end_tokens(config, self.generation):  # neither file would name all
                config = model_directory.with_end_tokens(config, self._ends)
            model_directory.save_config(directory, config, next(iter(arrays.values())).dtype, self.generation)
            model_directory.save_tensors(directory, arrays)
            if self.tokenizer is not None:
                self.tokenizer.save(directory)
            calibration.save(directory, self.calibration)

    def encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """Returns the prompt as token ids; those of a text begin with the BOS token where the tokenizer has one.

        ValueError for text without a tokenizer, and for an empty prompt without a BOS token.
        """
        if not isinstance(prompt, str):
            return tuple(int(token_id) for token_id in prompt)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer beside it; give the prompt as token ids")
        tokens = tuple(self.tokenizer.encode(prompt, bos=self.tokenizer.begins_texts))
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
        """Continues a prompt to its end, or many at once, and returns what was written.

        A text or a sequence of token ids is one prompt and gives one `Generation`; a sequence of those is many and
        gives a list in their order. With `n` above 1, a prompt's `Generation` is its first continuation and has all
        under `continuations`. `params` are for all prompts, or one for each, and so is `adapter`, the name of a loaded
        one (None: the model itself); `progress` shows a bar. A prompt that cannot be served raises ValueError before
        any is begun; one that fails under way raises RuntimeError, which ends the others.
        """
        requests = self._requests(prompts, params, adapter)
        found: dict[int, Generation] = {}
        with contextlib.ExitStack() as stack:
            outcomes = stack.enter_context(contextlib.closing(self.service.follow_many(requests)))
            bar = stack.enter_context(ProgressBar("generating", len(requests), "tokens")) if progress else None
            tokens = 0
            for place, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                found[place] = outcome
                if bar is not None:
                    tokens += sum(len(continuation.token_ids) for continuation in outcome.continuations)
                    bar.update(len(found), tokens)
        return found[0] if _is_one(prompts) else [found[place] for place in range(len(requests))]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[str]:
        """Continues the prompt and yields text as it becomes certain; RuntimeError where that fails under way."""
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
        """Continues the prompt and yields an event for every token. Closing the iterator ends the request.

        A prompt that cannot be served raises ValueError here, before the first event is asked for. A continuation that
        fails under way ends with an event whose finish reason is "error". `background` leaves the steps to a worker
        thread, so that Ctrl-C ends the waiting at once and never falls into a step.
        """
        return self.service.follow(self.request(prompt, params, adapter), background)

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
        """Does as `generate`, for asyncio; the requests of many tasks are served together."""
        requests = await asyncio.to_thread(self._requests, prompts, params, adapter)
        found = await self.service.gather_async(requests)
        return found[0] if _is_one(prompts) else found

    async def stream_async(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        buffer: int | None = None,
        *,
        adapter: str | None = None,
    ) -> AsyncGenerator[TokenEvent]:
        """Yields as `events`, for asyncio. Leaving the iterator, or cancelling its reader's task, ends the request.

        A reader more than `buffer` events behind gets a RuntimeError, and its request ends, lest it fill memory.
        """
        request = await asyncio.to_thread(self.request, prompt, params, adapter)
        async with contextlib.aclosing(self.service.follow_async(request, buffer)) as events:
            async for event in events:
                yield event

    def look_inside(
        self,
        prompt: Prompt,
        *,
        top: int = 5,
        attention: Sequence[int] = (),
        lens: bool = False,
        adapter: str | None = None,
    ) -> Inspection:
        """Returns the `top` likeliest tokens after each token of a prompt, and more of what leads to them.

        `attention` are layers, from 0, whose attention weights are wanted; with `lens`, the predictions that each layer
        would make. See `inspection.look_inside`, also for its ValueErrors.
        """
        tokens = self.encode(prompt)
        return look_inside(
            self.runner, self.tokenizer, tokens, top=top, attention=attention, lens=lens, adapter=adapter
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling = "mean",
        normalize: bool = True,
        *,
        adapter: str | None = None,
    ) -> np.ndarray:
        """Returns a vector for each prompt, float32 (n, D), in their order; see `embedding.embed`."""
        listed = cast(Sequence[Prompt], [prompts] if _is_one(prompts) else prompts)
        return embed(self.runner, [self.encode(prompt) for prompt in listed], pooling, normalize, adapter)

    def close(self) -> None:
        """Ends all open requests and the worker thread. A model that is no longer referenced needs no closing."""
        self.service.close()

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        targets: Sequence[PromptTarget] = (),
    ) -> Request:
        """Returns the engine's request for a prompt, checked: ValueError where this model cannot serve it."""
        chosen = params or SamplingParams()
        request = Request(next(self._ids), self.encode(prompt), chosen, adapter=adapter, targets=tuple(targets))
        self.engine.check(request)
        return request

    def _requests(self, prompts: Prompt | Sequence[Prompt], params: Params, adapter: Adapters = None) -> list[Request]:
        """Returns the requests of one prompt or of many, all checked before any is begun."""
        listed = cast(list[Prompt], [prompts] if _is_one(prompts) else list(prompts))
        listed_params = [params] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        names = [adapter] * len(listed) if adapter is None or isinstance(adapter, str) else list(adapter)
        for what, given in (("sampling parameters", len(listed_params)), ("adapters", len(names))):
            if given != len(listed):
                raise ValueError(f"{len(listed)} prompts came with {given} {what}; give one, or one each")
        if len(listed) == 1:
            return [self.request(listed[0], listed_params[0], names[0])]
        requests = []
        for index, (prompt, chosen, name) in enumerate(zip(listed, listed_params, names, strict=True)):
            try:
                requests.append(self.request(prompt, chosen, name))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
        return requests


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Returns whether this is one prompt (a text, or token ids) rather than a sequence of prompts, maybe empty."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def _texts(events: Iterator[TokenEvent]) -> Iterator[str]:
    for event in events:
        if event.finish_reason == "error":
            raise RuntimeError(event.error)
        if event.text:
            yield event.text
