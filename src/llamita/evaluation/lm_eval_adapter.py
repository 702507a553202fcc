"""Makes a Llamita model one of lm_eval (EleutherAI's evaluation harness, 0.4.13), whose tasks then run in this process.

    import lm_eval, llamita
    from llamita.evaluation.lm_eval_adapter import LlamitaLM

    lm_eval.simple_evaluate(LlamitaLM(llamita.load("runs/first")), tasks=["hellaswag"])

Texts become tokens as in lm_eval's adapter for transformers, so both give the same metrics. The model is passed in:
this module itself loads no framework. It needs the package lm_eval, of the extra `evaluation`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lm_eval
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from llamita.backend.interface import Forward
from llamita.backend.sampling_params import SamplingParams
from llamita.evaluation import continuations
from llamita.evaluation.continuations import Pair
from llamita.inference.llm import LLM
from llamita.text.chat import Chat

GENERATED = 256  # tokens at most, where a task does not say
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
Encoded = tuple[Any, Sequence[int], Sequence[int]]


class LlamitaLM(TemplateLM):
    """A Llamita model for lm_eval.

    `add_bos`: True puts the BOS token before every context, False before none; None does what the tokenizer's files ask
    of transformers, which for a tokenizer trained here is False. ValueError without a tokenizer, or a BOS token to add.
    """

    def __init__(self, llm: LLM, add_bos: bool | None = None) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError("this model has no tokenizer beside it, and tasks are made of text")
        if add_bos and llm.tokenizer.bos_id is None:
            raise ValueError("this model's tokenizer has no BOS token to put before a context")
        self.llm = llm
        self.tokens = llm.tokenizer
        self.add_bos = llm.tokenizer.adds_bos if add_bos is None else add_bos
        self.max_length = llm.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        if self.tokens.eos_id is None:
            raise ValueError("this model's tokenizer has no token that ends a text, which lm_eval's tasks need")
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokens.bos_id is None else self.tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text in which control tokens may be spelled out; a BOS at its start is not doubled."""
        ids = self.tokens.encode(string, allow_special=True)
        begins = self.add_bos if add_special_tokens is None else add_special_tokens and self.tokens.adds_bos
        doubled = add_special_tokens is None and ids[:1] == [self.prefix_token_id]
        return [self.prefix_token_id, *ids] if begins and not doubled else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        runner = cast(Forward, self.llm.runner)
        found = continuations.score(runner, pairs, self.llm.config.vocab_size, self.max_length)
        for (texts, _, _), likelihood in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of whole texts, in windows as long as the model has positions."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            made = lm_eval.utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in made:
                windows.append((None, *lm_eval.utils.make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the engine's text after each context, up to a stop string; all contexts are served together."""
        end = self.tokens.decode([self.eot_token_id], skip_special=False)
        prompts, params, stops = [], [], []
        for context, options in (request.args for request in requests):
            given = dict(normalize_gen_kwargs(options, GENERATED))
            stop = handle_stop_sequences(given.pop("until", None), eos=end)
            most = int(given.pop("max_gen_toks"))
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={most} leaves no room for a prompt in this model's {self.max_length} positions; "
                    "ask for fewer tokens"
                )
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            params.append(_sampling(given, most, tuple(text for text in stop if text)))
            stops.append(stop)
        texts = []
        for request, stop, generation in zip(requests, stops, self.llm.generate(prompts, params), strict=True):
            # Decoded by itself, as transformers does, not as what follows the prompt.
            text = postprocess_generated_text(self.tokens.decode(generation.token_ids), stop, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokens.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokens.chat_template is None:
            raise ValueError("this model has no chat template; leave apply_chat_template out")
        return Chat(self.tokens).render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.hash


def run(model: LlamitaLM, tasks: Sequence[str], tasks_path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Returns lm_eval's results for `tasks`, which are its own or have their YAML files in `tasks_path`.

    ValueError for a task that neither has. `options` are those of lm_eval.simple_evaluate.
    """
    if tasks_path is not None and not tasks_path.is_dir():
        raise FileNotFoundError(f"there is no directory {tasks_path}; give the one that your task files lie in")
    manager = _manager(tasks, tasks_path)
    return dict(lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, **options) or {})


def _manager(tasks: Sequence[str], tasks_path: Path | None) -> TaskManager:
    """Returns a manager that has the tasks; lm_eval's thousands are read only if needed, since that takes seconds."""
    own = TaskManager(include_path=str(tasks_path), include_defaults=False) if tasks_path else None
    if own is not None and all(own.match_tasks([name]) for name in tasks):
        return own
    manager = TaskManager(include_path=None if tasks_path is None else str(tasks_path))
    for name in tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"lm_eval has no task {name!r}; `lm-eval ls tasks` lists them")
    return manager


def metrics_by_task(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the metrics of each task; a filter other than lm_eval's `none` stands before their names."""
    found: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        rows = found.setdefault(task, {})
        for key, value in values.items():
            name, _, kept = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool):
                rows[name if kept in ("", "none") else f"{kept}.{name}"] = value
    return found


def _sampling(given: Mapping[str, Any], most: int, stop: tuple[str, ...]) -> SamplingParams:
    """Returns lm_eval's sampling parameters as ours; ValueError for one that would be ignored silently."""
    unknown = sorted(given.keys() - {"do_sample", *SAMPLING})
    if unknown:
        raise ValueError(f"generation_kwargs has {unknown[0]!r}, which is unknown here; there are {_listed(SAMPLING)}")
    chosen = {key: given[key] for key in SAMPLING if given.get(key) is not None}
    chosen["temperature"] = float(chosen.get("temperature", 1.0)) if given.get("do_sample") else 0.0
    return SamplingParams(max_tokens=most, stop=stop, **chosen)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
