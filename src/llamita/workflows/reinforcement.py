"""Reinforcement: a model writes answers, a reward judges them, and what was better than the rest becomes likelier.

Group-relative policy optimisation over the engine's own samples. How answers are drawn lies in rollouts.py, what they
are worth in rewards.py, the loss in the backend. The backend is passed in.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llamita.backend.interface import Backend
from llamita.backend.objectives import PolicyGradient
from llamita.backend.sampling_params import MAX_CONTINUATIONS
from llamita.data import prompts as prompts_data
from llamita.data.preferences import Layout
from llamita.data.prompts import Prompt
from llamita.training.display import Display
from llamita.training.examples import Examples
from llamita.training.trainer import TrainingResult
from llamita.workflows.finetune import finetune, load_base, make_step
from llamita.workflows.layouts import TEXT, layout_of, source_of
from llamita.workflows.pretrain import resumed
from llamita.workflows.reading import ReadingConfig
from llamita.workflows.rewards import BUILT_IN, LoadReward
from llamita.workflows.rollouts import AnswerBatches, Answerer, HeldOut, Rules

MEADOW_ANSWERS = 200  # stories to validate on, where all are asked for


@dataclass(frozen=True, kw_only=True)
class RlConfig(ReadingConfig):
    """The options of `llamita rl`."""

    data: tuple[str, ...] = ()
    """Files of JSON lines, each {"prompt": a text or messages, ...} or {"messages": [...]}; or the word meadow, for
    stories from nothing."""
    prompts: int | None = None
    """Read at most this many."""
    validation_share: float = 0.05
    """The share of prompts to validate on, by a hash of what they say; 0 for none."""
    reward: str = ""
    """The reward of an answer: meadow (1 for a story whose facts agree), exact (1 for the record's `answer`, to the
    letter), or a Python function of a sample, as module:function or file.py:function. Left out: meadow for meadow."""
    template: str = ""
    """The chat template: chatml, r0, plain-eos, a file of Jinja, or text for none. Left out: the model's own, else
    text."""
    group: int = 8
    """Answers to each prompt, which are measured against each other."""
    batch_size: int = 64
    """Answers in an update: so many prompts times the size of a group."""
    updates: int = 1
    """Updates from the same answers before new ones are drawn."""
    max_tokens: int = 128
    """Most tokens of an answer; one that is cut off is judged as it is."""
    temperature: float = 1.0
    """Of sampling. Only at 1 are answers drawn from the distribution that is learned."""
    clip: float = 0.2
    """A token counts while its probability is between 1 - clip and 1 + clip times that when it was drawn."""
    kl_weight: float = 0.0
    """Of the divergence from the model before tuning; above 0 that model is held in memory too."""
    normalization: Literal["answer", "token"] = "answer"
    """answer: each answer counts alike; token: each token does."""
    steps: int = 100
    """Updates in the whole run."""
    learning_rate: float = 1e-4
    """The highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "constant", "warmup-stable-decay"] = "constant"
    """The course after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate; not on norms and biases."""
    evaluate_every: int = 20
    """Updates between two evaluations on held-out prompts; 0: only at the end."""
    evaluation_rows: int = 100
    """Held-out prompts to answer, once each; 0: all (meadow: 200 stories)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()
        if self.group < 2:
            raise ValueError(f"group={self.group} must be at least 2: answers are measured against each other")
        if self.group > MAX_CONTINUATIONS:
            raise ValueError(f"group={self.group} must be at most {MAX_CONTINUATIONS}")
        if self.batch_size % self.group:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of group={self.group}")
        for name in ("updates", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} must be at least 1")
        if not self.temperature >= 0.01:
            raise ValueError(f"temperature={self.temperature} must be at least 0.01: answers are to differ")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature={self.temperature} must be a number; 1 samples what is learned")

    @property
    def unread_on_meadow(self) -> tuple[str, ...]:
        return ("template", "prompts")

    def objective(self) -> PolicyGradient:
        return PolicyGradient(self.clip, self.kl_weight, self.normalization)

    def rules(self) -> Rules:
        return Rules(
            self.batch_size // self.group,
            self.group,
            self.updates,
            self.max_tokens,
            self.temperature,
            self.seed,
            self.normalization == "answer",
            self.micro_batch_size or self.batch_size,
        )

    def arguments(self) -> dict[str, Any]:
        path, colon, function = self.reward.rpartition(":")
        reward = f"{Path(path).resolve()}{colon}{function}" if path.endswith(".py") else self.reward
        return super().arguments() | {"reward": reward}


def reinforce(
    config: RlConfig,
    backend: Backend,
    load_reward: LoadReward = lambda name: BUILT_IN[name],
    *,
    report: Callable[[str], None] = print,
    display: Display | None = None,
) -> TrainingResult:
    """Tune config.model on its own answers, or go on with the run in config.output where config.resume is set.

    ValueError or OSError, in one line, for options and data that cannot be met, and for a sample that has no reward.
    """
    config = resumed(config)
    train, held_out = read(config)
    reward_name = config.reward or ("meadow" if config.on_meadow else "")
    if not reward_name:
        raise ValueError("--reward is missing: give meadow, exact, module:function or file.py:function")
    reward = load_reward(reward_name)
    if reward_name == "exact":
        for prompt in (*train, *held_out):
            if not isinstance(prompt.record.get("answer"), str):
                raise ValueError(
                    f"{prompt.where} has no field 'answer' that is a text, which the reward exact compares"
                )
    base = load_base(config)
    if not config.on_meadow:
        config = replace(config, template=source_of(config.template))
    layout, model = layout_of(base, TEXT if config.on_meadow else config.template)
    for prompt in (*train, *held_out):
        check_length(layout, prompt, config.max_tokens, model.max_position_embeddings)
    report(f"{len(train):,} prompts to train on, {len(held_out):,} to validate on; reward {reward.name}")
    step = make_step(config, backend, model, base.arrays, config.objective())
    reference = None
    if config.kl_weight:
        options = {name: getattr(config, name) for name in ("precision", "device", "threads")}
        reference = backend.build_scorer(base.config, base.arrays, **options)
    answerer = Answerer(config.rules(), step, layout, reward)
    validation = HeldOut(answerer, held_out, reference)
    return finetune(
        config,
        base,
        backend,
        kind="reinforcement",
        identity={
            "data": {"train": prompts_data.digest(train), "validation": prompts_data.digest(held_out)},
            "reward": {"name": reward.name, "sha256": reward.digest},
            "objective": asdict(config.objective()),
            "sampling": {
                name: getattr(config, name) for name in ("group", "updates", "max_tokens", "temperature", "template")
            },
        },
        examples=Examples(
            AnswerBatches(answerer, train, reference),
            validation.batches if held_out else tuple,
            target=config.normalization,
        ),
        step=step,
        model=model,
        on_evaluation=lambda evaluation: validation.shown(),
        measure=validation.measure,
        best_measure="reward",
        display=display,
    )


def read(config: RlConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to validate on."""
    config.require_data("prompts")
    if config.on_meadow:
        nothing = Prompt(({"role": "user", "content": ""},), {}, "a story from nothing")
        return [nothing], [nothing] * (config.evaluation_rows or MEADOW_ANSWERS)
    train, held_out = prompts_data.split(
        prompts_data.prompts(config.source(config.prompts)), config.validation_share, config.seed
    )
    if not train:
        raise ValueError("there are no prompts to train on; give more, or a smaller --validation-share")
    count = min(config.evaluation_rows or len(held_out), len(held_out))
    return train, [held_out[i * len(held_out) // count] for i in range(count)]


def check_length(layout: Layout, prompt: Prompt, max_tokens: int, positions: int) -> None:
    """Refuse, naming it, a prompt that leaves no room for an answer."""
    try:
        length = len(layout.prompt(prompt.said))
    except ValueError as error:
        raise ValueError(f"{prompt.where}: {error}") from None
    if length == 0:
        raise ValueError(f"{prompt.where}: the prompt is empty and this model has no BOS token to start from")
    if length + max_tokens > positions:
        raise ValueError(
            f"{prompt.where} has {length} tokens, and with max_tokens={max_tokens} that is more than the model's "
            f"{positions} positions; lower --max-tokens, or shorten the prompt"
        )
