"""Reinforcement: a model writes answers, a reward judges them, and what was better than the rest becomes likelier.

Group-relative policy optimisation over the engine's own samples. How answers are drawn lies in rollouts.py, what they
are worth in rewards.py, the loss in the backend. The backend is passed in.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from llamita.backend.adamw import AdamWSettings
from llamita.backend.interface import Backend
from llamita.backend.objectives import PolicyGradient
from llamita.backend.sampling_params import MAX_CONTINUATIONS
from llamita.data import prompts as prompts_data
from llamita.data.conversations import BadRecords
from llamita.data.preferences import Layout
from llamita.data.prompts import Prompt
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig
from llamita.training.display import Display
from llamita.training.examples import Examples
from llamita.training.trainer import TrainingResult
from llamita.workflows.finetune import FinetuneConfig, finetune, load_base, make_step
from llamita.workflows.layouts import TEXT, layout_of, source_of
from llamita.workflows.pretrain import check_run, scorer_options
from llamita.workflows.reading import ReadingConfig
from llamita.workflows.rewards import BUILT_IN, LoadReward
from llamita.workflows.rollouts import AnswerBatches, Answerer, HeldOut, Rules

MEADOW_ANSWERS = 200  # stories to validate on, where all are asked for


def absolute(reward: str) -> str:
    """Returns the name of a reward as it is from anywhere."""
    path, colon, function = reward.rpartition(":")
    return f"{Path(path).resolve()}{colon}{function}" if path.endswith(".py") else reward


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """The options of `llamita rl`."""

    run: RunConfig
    finetune: FinetuneConfig = FinetuneConfig()
    reading: ReadingConfig = ReadingConfig()
    prompts: int | None = None
    """Read at most this many."""
    reward: str = field(default="", metadata={"saved": absolute})
    """The reward of an answer: meadow (1 for a story whose facts agree), exact (1 for the record's `answer`, to the
    letter), or a Python function of a sample, as module:function or file.py:function. Left out: meadow for meadow."""
    template: str = ""
    """The chat template: chatml, r0, plain-eos, a file of Jinja, or text for none. Left out: the model's own, else
    text."""
    group: int = 8
    """Answers to each prompt, which are measured against each other; --batch-size counts answers."""
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
    training: TrainingConfig = TrainingConfig(
        steps=100,
        batch_size=64,
        learning_rate=1e-4,
        schedule="constant",
        adamw=AdamWSettings(weight_decay=0.0),
        evaluate_every=20,
        evaluation_rows=100,
    )
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        self.reading.refuse_on_meadow(template=self.template, prompts=self.prompts)
        self.objective()
        if self.group < 2:
            raise ValueError(f"group={self.group} must be at least 2: answers are measured against each other")
        if self.group > MAX_CONTINUATIONS:
            raise ValueError(f"group={self.group} must be at most {MAX_CONTINUATIONS}")
        if self.training.batch_size % self.group:
            raise ValueError(f"batch_size={self.training.batch_size} must be a multiple of group={self.group}")
        for name in ("updates", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} must be at least 1")
        if not self.temperature >= 0.01:
            raise ValueError(f"temperature={self.temperature} must be at least 0.01: answers are to differ")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature={self.temperature} must be a number; 1 samples what is learned")

    def objective(self) -> PolicyGradient:
        return PolicyGradient(self.clip, self.kl_weight, self.normalization)

    def rules(self) -> Rules:
        return Rules(
            self.training.batch_size // self.group,
            self.group,
            self.updates,
            self.max_tokens,
            self.temperature,
            self.training.seed,
            self.normalization == "answer",
            self.training.rows_at_once,
        )


def reinforce(
    config: RlConfig,
    backend: Backend,
    load_reward: LoadReward = lambda name: BUILT_IN[name],
    *,
    report: Callable[[str], None] = print,
    display: Display | None = None,
) -> TrainingResult:
    """Tune a model on its own answers, or go on with the run in its directory where it is to be resumed.

    ValueError or OSError, in one line, for options and data that cannot be met, and for a sample that has no reward.
    """
    check_run(config)
    bad = BadRecords(config.reading.skip_bad)
    train, held_out = read(config, bad)
    reward_name = config.reward or ("meadow" if config.reading.on_meadow else "")
    if not reward_name:
        raise ValueError("--reward is missing: give meadow, exact, module:function or file.py:function")
    reward = load_reward(reward_name)
    if reward_name == "exact":
        train, held_out = (only(check_answer, side, bad) for side in (train, held_out))
    base = load_base(config.finetune)
    if not config.reading.on_meadow:
        config = replace(config, template=source_of(config.template))
    layout, model = layout_of(base, TEXT if config.reading.on_meadow else config.template)
    check = partial(check_length, layout, max_tokens=config.max_tokens, positions=model.max_position_embeddings)
    train, held_out = (only(check, side, bad) for side in (train, held_out))
    if not train:
        raise ValueError(f"there are no prompts to train on; {bad.count:,} are bad, the first: {bad.shown[0]}")
    skipped = f"; {bad.count:,} skipped, which cannot be laid out" if bad.count else ""
    report(f"{len(train):,} prompts to train on, {len(held_out):,} to validate on; reward {reward.name}{skipped}")
    for line in bad.lines():
        report(line)
    step = make_step(config, backend, model, base.arrays, config.objective())
    reference = None
    if config.kl_weight:
        reference = backend.build_scorer(base.config, base.arrays, **scorer_options(config))
    answerer = Answerer(config.rules(), step, layout, reward)
    validation = HeldOut(answerer, held_out, reference)
    return finetune(
        config,
        base,
        backend,
        kind="reinforcement",
        identity={
            "data": {"train": prompts_data.digest(train), "validation": prompts_data.digest(held_out)},
            **({"prompts": {"train": len(train), "validation": len(held_out), "bad": bad.count}} if bad.count else {}),
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


def read(config: RlConfig, bad: BadRecords) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to validate on; `bad` is what becomes of records that cannot be read."""
    config.reading.require_data("prompts")
    asked = config.training.evaluation_rows
    if config.reading.on_meadow:
        nothing = Prompt(({"role": "user", "content": ""},), {}, "a story from nothing")
        return [nothing], [nothing] * (asked or MEADOW_ANSWERS)
    train, held_out = prompts_data.split(
        prompts_data.prompts(config.reading.source(config.prompts), bad),
        config.reading.validation_share,
        config.training.seed,
    )
    if not train:
        raise ValueError("there are no prompts to train on; give more, or a smaller --validation-share")
    count = min(asked or len(held_out), len(held_out))
    return train, [held_out[i * len(held_out) // count] for i in range(count)]


def only(check: Callable[[Prompt], None], prompts: Iterable[Prompt], bad: BadRecords) -> list[Prompt]:
    """The prompts that a check lets pass; those that it raises ValueError for are bad."""
    found = []
    for prompt in prompts:
        try:
            check(prompt)
        except ValueError as error:
            bad.add(error)
        else:
            found.append(prompt)
    return found


def check_answer(prompt: Prompt) -> None:
    """Refuse, naming it, a prompt without the answer that the reward exact compares."""
    if not isinstance(prompt.record.get("answer"), str):
        raise ValueError(f"{prompt.where} has no field 'answer' that is a text, which the reward exact compares")


def check_length(layout: Layout, prompt: Prompt, max_tokens: int, positions: int) -> None:
    """Refuse, naming it, a prompt that leaves no room for an answer."""
    try:
        length = len(layout.prompt(prompt.said, prompt.tools, prompt.variables))
    except ValueError as error:
        raise ValueError(f"{prompt.where}: {error}") from None
    if length == 0:
        raise ValueError(f"{prompt.where}: the prompt is empty and this model has no BOS token to start from")
    if length + max_tokens > positions:
        raise ValueError(
            f"{prompt.where} has {length} tokens, and with max_tokens={max_tokens} that is more than the model's "
            f"{positions} positions; lower --max-tokens, or shorten the prompt"
        )
