"""Answers that a model under training writes and a reward judges, as batches of `objectives.PolicyGradient`.

The prompts and the seeds of a round are a pure function of (seed, round), so a resumed run goes on as the whole run
did; what a round under way wrote is part of the state. Knows nothing of the loop or of how a loss is computed.
"""

import hashlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from llamita.backend.interface import Scorer, TrainStep
from llamita.backend.sampling_params import SamplingParams
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.data.preferences import Layout
from llamita.data.prompts import Prompt
from llamita.inference.config import EngineConfig
from llamita.inference.conversation import with_end_of_turn
from llamita.inference.llm import LLM
from llamita.training.trainer import split
from llamita.workflows.rewards import Reward, Sample

ROUNDED_TO = 32  # lengths of rows, so that few shapes are compiled
MOST_AT_ONCE = 128  # sequences in the engine
ADVANTAGE_EPSILON = 1e-4


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt, its end included, and its reward."""

    prompt: int
    tokens: tuple[int, ...]
    text: str
    ended: bool
    reward: float


@dataclass(frozen=True)
class Rules:
    """The rules by which a round is drawn."""

    prompts: int
    """Prompts in a round."""
    group: int
    """Answers to each."""
    updates: int
    """Updates from each round."""
    max_tokens: int
    temperature: float
    seed: int
    by_answer: bool
    """Whether the loss is a mean over answers, not over tokens."""
    micro_batch_size: int


class Answerer:
    """A model under training with prompts to answer and a reward."""

    def __init__(self, rules: Rules, step: TrainStep, layout: Layout, reward: Reward) -> None:
        self.rules = rules
        self.step = step
        self.layout = layout
        self.reward = reward

    def answer(self, prompts: Sequence[Prompt], numbers: Sequence[int], seeds: Sequence[int], n: int) -> list[Answer]:
        """`n` answers to each of the prompts of these numbers, by the weights as they are; answers to one lie together.

        The engine is a new one with memory for all that it runs, so that nothing earlier changes the last bits.
        """
        tokens = {number: self._asked(prompts[number]) for number in numbers}
        params = [
            SamplingParams(temperature=self.rules.temperature, max_tokens=self.rules.max_tokens, seed=seed, n=n)
            for seed in seeds
        ]
        if self.layout.chat is not None:
            params = [with_end_of_turn(param, self.layout.chat) for param in params]
        at_once = min(MOST_AT_ONCE, len(numbers) * n)
        longest = max(map(len, tokens.values())) + self.rules.max_tokens
        blocks = (at_once + n) * -(-longest // EngineConfig.block_size)
        limits = EngineConfig(max_sequences=at_once, blocks=blocks, warm_up=False)
        llm = LLM(self.step.runner(), self.layout.tokenizer, engine=limits)
        found = []
        for number, seed, generation in zip(
            numbers, seeds, llm.generate([tokens[number] for number in numbers], params), strict=True
        ):
            for index, continuation in enumerate(generation.continuations):
                prompt, ended = prompts[number], continuation.finish_reason == "stop"
                content = prompt.said[-1].get("content")
                said = content if isinstance(content, str) else str(content)
                where = f"answer {index} to {prompt.where} (seed {seed + index}): {continuation.text[:60]!r}"
                value = self.reward(Sample(said, continuation.text, prompt.record, ended), where)
                found.append(Answer(number, continuation.token_ids, continuation.text, ended, value))
        llm.close()
        return found

    def _asked(self, prompt: Prompt) -> tuple[int, ...]:
        return self.layout.prompt(prompt.said, prompt.tools, prompt.variables)

    def batch(self, prompts: Sequence[Prompt], answers: Sequence[Answer], advantages: Sequence[float]) -> Batch:
        """Answers as rows after their prompts, padding behind; `extras` hold the advantages."""
        before = [self._asked(prompts[answer.prompt]) for answer in answers]
        longest = max(len(said) + len(answer.tokens) for said, answer in zip(before, answers, strict=True)) - 1
        shape = (len(answers), -(-longest // ROUNDED_TO) * ROUNDED_TO)
        pad_id = self.layout.tokenizer.pad_id or 0  # never scored, and behind all that is: any id will do
        tokens_BT, labels_BT = np.full(shape, pad_id, dtype=np.int32), np.full(shape, IGNORE_INDEX, dtype=np.int32)
        for row, (said, answer) in enumerate(zip(before, answers, strict=True)):
            whole = np.array([*said, *answer.tokens], dtype=np.int32)
            tokens_BT[row, : len(whole) - 1] = whole[:-1]
            labels_BT[row, len(said) - 1 : len(whole) - 1] = whole[len(said) :]
        extras = {"advantages_B": np.array(advantages, dtype=np.float32)}
        row_ids = np.array([answer.prompt for answer in answers], dtype=np.int64)
        return Batch(tokens_BT, labels_BT, None, row_ids, extras, self.rules.by_answer)


def score(scorer: Scorer, batch: Batch, size: int) -> np.ndarray:
    """The log-probabilities of all answers, as many rows at a time as an update takes."""
    return np.concatenate([scorer.log_probs(part) for part in split(batch, size)])


@dataclass(frozen=True)
class Round:
    """Answers, their log-probabilities when they were written, and those of the reference where it counts."""

    answers: list[Answer]
    old_log_probs_BT: np.ndarray
    reference_log_probs_BT: np.ndarray | None

    def state(self) -> dict[str, Any]:
        """JSON-able; float32 numbers survive it."""
        reference = self.reference_log_probs_BT
        return {
            "answers": [asdict(answer) for answer in self.answers],
            "old_log_probs": self.old_log_probs_BT.tolist(),
            "reference_log_probs": None if reference is None else reference.tolist(),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Round":
        answers = [Answer(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in state["answers"]]
        old, reference = state["old_log_probs"], state["reference_log_probs"]
        return cls(
            answers,
            np.array(old, dtype=np.float32),
            None if reference is None else np.array(reference, dtype=np.float32),
        )


class AnswerBatches:
    """Training batches: each round is sampled, judged, scored, and used for `rules.updates` updates."""

    def __init__(self, answerer: Answerer, prompts: Sequence[Prompt], reference: Scorer | None) -> None:
        self.answerer = answerer
        self.prompts = prompts
        self.reference = reference
        self.taken = 0
        self._round: Round | None = None

    def next(self) -> Batch:
        rules = self.answerer.rules
        number, used = divmod(self.taken, rules.updates)
        if used == 0:
            self._round = self._sample(number)
        assert self._round is not None, "the state of a round under way is missing"
        answers = self._round.answers
        batch = self.answerer.batch(
            self.prompts, answers, advantages([answer.reward for answer in answers], rules.group)
        )
        extras = {**batch.extras, "old_log_probs_BT": self._round.old_log_probs_BT}
        if self._round.reference_log_probs_BT is not None:
            extras["reference_log_probs_BT"] = self._round.reference_log_probs_BT
        self.taken += 1
        return replace(batch, extras=extras, metrics=metrics_of(answers, rules.group))

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` needs to go on exactly here; JSON-able."""
        under_way = self.taken % self.answerer.rules.updates != 0
        return {"taken": self.taken, "round": self._round.state() if under_way and self._round else None}

    def load_state(self, state: dict[str, Any]) -> None:
        self.taken = int(state["taken"])
        self._round = Round.of_state(state["round"]) if state["round"] is not None else None

    def _sample(self, number: int) -> Round:
        rules = self.answerer.rules
        numbers = numbers_of_round(len(self.prompts), rules.prompts, rules.seed, number)
        seeds = [seed_of(rules.seed, "train", number, slot) for slot in range(len(numbers))]
        answers = self.answerer.answer(self.prompts, numbers, seeds, rules.group)
        batch = self.answerer.batch(self.prompts, answers, [0.0] * len(answers))
        size = rules.micro_batch_size
        reference = None if self.reference is None else score(self.reference, batch, size)
        return Round(answers, score(self.answerer.step, batch, size), reference)


class HeldOut:
    """Answers to held-out prompts, one to each, with the same seeds at every evaluation."""

    def __init__(self, answerer: Answerer, prompts: Sequence[Prompt], reference: Scorer | None) -> None:
        self.answerer = answerer
        self.prompts = prompts
        self.reference = reference
        self._answers: list[Answer] = []

    def batches(self) -> Iterator[Batch]:
        """Their rewards in the place of advantages: the loss is then minus the mean reward."""
        rules = self.answerer.rules
        numbers = range(len(self.prompts))
        seeds = [seed_of(rules.seed, "validation", 0, number) for number in numbers]
        self._answers = self.answerer.answer(self.prompts, numbers, seeds, 1)
        batch = self.answerer.batch(self.prompts, self._answers, [answer.reward for answer in self._answers])
        for part in split(batch, rules.micro_batch_size):
            extras = {**part.extras, "old_log_probs_BT": self.answerer.step.log_probs(part)}
            if self.reference is not None:
                extras["reference_log_probs_BT"] = self.reference.log_probs(part)
            yield replace(part, extras=extras)

    def measure(self) -> dict[str, float]:
        """Of the answers of this evaluation."""
        found = metrics_of(self._answers, 1)
        del found["no_signal"]
        return found

    def shown(self, count: int = 3) -> str:
        """A few of them as text."""
        parts = []
        for answer in self._answers[:count]:
            said = self.prompts[answer.prompt].said
            content = said[-1].get("content")
            asked = content if isinstance(content, str) else ""
            cut = "" if answer.ended else ", cut off"
            parts.append(f"{asked}{' -> ' if asked else ''}{answer.text}\n(reward {answer.reward:g}{cut})")
        return "\n\n".join(parts)


def advantages(rewards: Sequence[float], group: int) -> list[float]:
    """(reward - mean) / (standard deviation + 1e-4) of each group of consecutive answers; 0 where all are alike."""
    found = []
    for start in range(0, len(rewards), group):
        values = rewards[start : start + group]
        mean, spread = statistics.fmean(values), statistics.stdev(values)
        found += [(value - mean) / (spread + ADVANTAGE_EPSILON) for value in values]
    return found


def metrics_of(answers: Sequence[Answer], group: int) -> dict[str, float]:
    """The mean reward and its standard deviation over the answers, the share of groups whose rewards are all alike and
    teach nothing, the mean length in tokens, and the share of answers that were cut off."""
    rewards = [answer.reward for answer in answers]
    groups = [rewards[start : start + group] for start in range(0, len(rewards), group)]
    return {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "no_signal": statistics.fmean(len(set(group)) == 1 for group in groups),
        "length": statistics.fmean(len(answer.tokens) for answer in answers),
        "cut_off": statistics.fmean(not answer.ended for answer in answers),
    }


def numbers_of_round(prompts: int, count: int, seed: int, number: int) -> list[int]:
    """The prompts of a round: each epoch goes through all of them, in an order keyed by (seed, epoch)."""
    orders: dict[int, np.ndarray] = {}
    found = []
    for position in range(number * count, (number + 1) * count):
        epoch, place = divmod(position, prompts)
        if epoch not in orders:
            key = np.array([seed, epoch], dtype=np.uint64)
            orders[epoch] = np.argsort(np.random.Philox(key=key).random_raw(prompts), kind="stable")
        found.append(int(orders[epoch][place]))
    return found


def seed_of(seed: int, purpose: str, number: int, slot: int) -> int:
    """Of the first answer to a prompt; the others have those that follow. Far enough apart not to meet."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{number}/{slot}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
