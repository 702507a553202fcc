"""A language model from Python: text or token ids in, text out, whole or as it comes.

The face of the engine for programs and for the command line. The backend is passed in, so this module loads none:

    from llamita.inference.llm import LLM
    from llamita.torch_backend.runner import load_runner

    llm = LLM.load("runs/stories", load_runner)
    print(llm.generate("Once upon a time").text)
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamita import checkpoint, files
from llamita.config import ModelConfig
from llamita.inference.engine import Engine, Runner
from llamita.inference.request import FinishReason, Request, SamplingParams, Statistics, TokenEvent
from llamita.text.tokenizer import Tokenizer

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Generation:
    """What a model wrote. `text` ends before a stop string; `token_ids` and `logprobs` have all that was sampled."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    statistics: Statistics


class LLM:
    """A runner, its tokenizer (None for a model that comes without: ids in, ids out), and an engine over both."""

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None = None, eos_token_ids: Collection[int] | None = None
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.engine = Engine(runner, tokenizer, eos_token_ids)
        self._ids = itertools.count()
        self._events: dict[int, deque[TokenEvent]] = {}

    @classmethod
    def load(cls, model: Path | str, load_runner: Callable[[Path], Runner]) -> "LLM":
        """Load a model directory, or the best checkpoint of a run directory, with the backend that `load_runner` is."""
        directory = checkpoint.resolve_model_directory(model)
        runner = load_runner(directory)
        found = any((directory / name).is_file() for name in VOCABULARY_FILES)
        tokenizer = Tokenizer.load(directory) if found else None
        if tokenizer is not None and tokenizer.vocab_size > runner.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens and the model embeddings for "
                f"{runner.config.vocab_size}; one of them is another model's"
            )
        return cls(runner, tokenizer, _end_tokens(directory))

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
            checkpoint.save_config(directory, self.config, next(iter(arrays.values())).dtype)
            checkpoint.save_tensors(directory, arrays)
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

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Generation:
        """Continue the prompt to its end and return all of it."""
        events = list(self.events(prompt, params))
        last = events[-1]
        assert last.finish_reason is not None
        return Generation(
            text="".join(event.text for event in events),
            token_ids=tuple(event.token_id for event in events),
            logprobs=tuple(event.logprob for event in events),
            finish_reason=last.finish_reason,
            statistics=last.statistics,
        )

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Continue the prompt and yield text as it becomes certain."""
        return (event.text for event in self.events(prompt, params) if event.text)

    def events(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Continue the prompt and yield an event for every token. Closing the iterator ends the request.

        A prompt that cannot be served raises ValueError here, before the first event is asked for.
        """
        request = Request(next(self._ids), self.encode(prompt), params or SamplingParams())
        self.engine.check(request)
        return self._follow(request)

    def _follow(self, request: Request) -> Iterator[TokenEvent]:
        request_id = request.id
        events = self._events[request_id] = deque()
        try:
            self.engine.add(request)
            while True:
                while not events:
                    if not self.engine.has_work:
                        raise RuntimeError(f"request {request_id} was dropped by a step that failed")
                    for event in self.engine.step():
                        if event.request_id in self._events:
                            self._events[event.request_id].append(event)
                event = events.popleft()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.engine.abort(request_id)
            del self._events[request_id]


def _end_tokens(directory: Path) -> tuple[int, ...]:
    """The ids that end a text: `generation_config.json` may name more of them than `config.json`, never fewer."""
    ends = dict.fromkeys(checkpoint.load_config(directory).eos_token_ids)
    file = directory / "generation_config.json"
    if file.is_file():
        value = files.read_json(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token_id) is int for token_id in ids):
            raise ValueError(f"{file}: eos_token_id={value!r} must be a token id, or several")
        ends |= dict.fromkeys(ids)
    return tuple(ends)
