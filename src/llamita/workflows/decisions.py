"""Decisions: a text and typed questions in, a probability for every option out; nothing is generated.

A language model judges an option by the likelihood of its tokens after the text and the question. The text comes first
in all prompts of a request, so that it is read once and found in the engine's prefix cache from then on; what is left
runs in one batch. A model with a classification head gives the probabilities of its own labels instead.
Chat templates that let a model think before it answers are told not to. Questions and answers are in questions.py.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llamita.backend.sampling_params import SamplingParams
from llamita.evaluation.calibration import with_temperature
from llamita.evaluation.classification import log_softmax
from llamita.evaluation.zero_shot import Prompt, build_prompt, shared_length
from llamita.inference.llm import LLM
from llamita.inference.request import Generation, PromptTarget, Request
from llamita.text.chat import Chat, Message
from llamita.text.tokenizer import Tokenizer
from llamita.workflows.classify import Classifier
from llamita.workflows.questions import YES_NO, Answer, Choice, Decisions, Labels, Option, Predicate, Question, Score

Layout = Literal["auto", "chat", "plain"]
"""`plain`: the text, the instructions and the option, a space between each, as zero-shot classification has them.
`chat`: the text and the question as a user's turn, the option as the answer to it. `auto`: chat where the model has a
chat template, else plain."""
UNCUT = 2**62
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
"""What is generated is not looked at; one token is the least that an engine gives."""


class ContextError(ValueError):
    """A text, a question and its longest option have more tokens than the model has positions."""


# --- asking ----------------------------------------------------------------------------------------------------------


def decide(
    model: LLM | Classifier,
    text: str | Sequence[Message],
    questions: Sequence[Question],
    *,
    layout: Layout = "auto",
    adapter: str | None = None,
) -> Decisions:
    """Returns the probability of every option of every question about a text, or a conversation.

    An option's score is the log-probability of its tokens after text and question, their sum; of an option that another
    begins with, that of all answers that begin so. The scores of a question are normalised to probabilities, at the
    temperature that was fitted to it, where there is one (`llamita classify calibrate`). ValueError for a question that
    the model cannot be asked, ContextError where text and question are too long, RuntimeError where a step fails.
    """
    if isinstance(model, Classifier):
        return _by_head(model, text, questions, adapter)
    asking = _Asking(model, text, questions, layout, adapter).run()
    requests = next(asking)
    while True:
        found: dict[int, Generation] = {}
        with contextlib.closing(model.service.follow_many(requests)) as outcomes:
            for place, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                found[place] = outcome
        try:
            requests = asking.send([found[place] for place in range(len(requests))])
        except StopIteration as end:
            return end.value


async def decide_async(
    model: LLM | Classifier,
    text: str | Sequence[Message],
    questions: Sequence[Question],
    *,
    layout: Layout = "auto",
    adapter: str | None = None,
) -> Decisions:
    """Does as `decide`, for asyncio; the requests of many tasks are served together. Cancelling ends them."""
    if isinstance(model, Classifier):
        return await asyncio.to_thread(_by_head, model, text, questions, adapter)
    asking = await asyncio.to_thread(lambda: _Asking(model, text, questions, layout, adapter).run())
    requests = next(asking)
    while True:
        found = await model.service.gather_async(requests)
        try:
            requests = asking.send(found)
        except StopIteration as end:
            return end.value


class _Asking:
    """One call of `decide`: its prompts, the requests of each stage, and the answers made of what comes back.

    A `Prompt` is a question to the model: one for each question, and one for each option of `Labels`.
    """

    def __init__(
        self,
        model: LLM,
        text: str | Sequence[Message],
        questions: Sequence[Question],
        layout: Layout,
        adapter: str | None,
    ) -> None:
        if not questions:
            raise ValueError("there is no question; ask at least one")
        self.questions = questions
        writer = _writer(model, text, layout)
        self.prompts: list[list[Prompt]] = []
        self.temperatures: list[float] = []
        for number, question in enumerate(questions, 1):
            prompts = list(writer.prompts(question))
            longest = max(len(prompt.context) + max(map(len, prompt.labels)) for prompt in prompts)
            _check_length(number, longest, model.config.max_position_embeddings)
            self.prompts.append(prompts)
            self.temperatures.append(writer.temperature(question))
        stages = self._stages([row for prompts in self.prompts for prompt in prompts for row in _rows(prompt)])
        # All requests are made, and so checked, before any is begun.
        self.stages = [[(row, _request(model, row, adapter)) for row in stage] for stage in stages]

    def run(self) -> Generator[list[Request], list[Generation], Decisions]:
        """Yields the requests of each stage, takes their generations, and returns the answers."""
        log_p: dict[tuple[tuple[int, ...], int], float] = {}
        first: Generation | None = None
        for stage in self.stages:
            generations = yield [request for _, request in stage]
            first = first or generations[0]
            for (row, request), generation in zip(stage, generations, strict=True):
                scored = zip(request.targets, generation.prompt_logprobs, strict=True)
                log_p |= {(row.tokens[: target.position], target.token_id): score for target, score in scored}
        assert first is not None
        answers = [
            _answer(question, np.array([_scores(prompt, log_p) for prompt in prompts]), temperature)
            for question, prompts, temperature in zip(self.questions, self.prompts, self.temperatures, strict=True)
        ]
        rows = sorted(row.tokens for stage in self.stages for row, _ in stage)
        repeated = sum(itertools.starmap(shared_length, itertools.pairwise(rows)))
        read = sum(map(len, rows)) - repeated
        return Decisions(tuple(answers), read, first.statistics.cached_tokens)

    def _stages(self, rows: "list[_Row]") -> "list[list[_Row]]":
        """Returns the rows in stages: one that reads the text, one of every other prompt, then all others.

        Each stage finds what it shares with an earlier one in the prefix cache.
        """
        seen: set[tuple[int, ...]] = set()
        stages: list[list[_Row]] = [rows[:1], [], []]
        seen.add(rows[0].context)
        for row in rows[1:]:
            stages[2 if row.context in seen else 1].append(row)
            seen.add(row.context)
        return [stage for stage in stages if stage]


@dataclass(frozen=True)
class _Row:
    """Tokens to run, the prompt's first, and the tokens to judge along them."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]
    targets: tuple[PromptTarget, ...]


def _rows(prompt: Prompt) -> Iterator[_Row]:
    """Yields what has to be run for all labels to be judged: one row where they all have one token.

    A label needs its tokens but the last to be run; whatever lies on the way of another is judged there.
    """
    start = len(prompt.context)
    ways = sorted({label[:-1] for label in prompt.labels}, key=lambda way: (-len(way), way))
    kept: list[tuple[int, ...]] = []
    for way in ways:
        if not any(longer[: len(way)] == way for longer in kept):
            kept.append(way)
    for way in kept:
        targets = {
            PromptTarget(start + place, token_id)
            for label in prompt.labels
            for place, token_id in enumerate(label)
            if label[:place] == way[:place] and place <= len(way)
        }
        yield _Row(prompt.context, (*prompt.context, *way), tuple(sorted(targets)))


def _request(model: LLM, row: _Row, adapter: str | None) -> Request:
    return model.request(row.tokens, ONE_TOKEN, adapter, row.targets)


def _scores(prompt: Prompt, log_p: dict[tuple[tuple[int, ...], int], float]) -> list[float]:
    """Returns the sum of the log-probabilities of each label's tokens."""
    return [
        sum(log_p[(*prompt.context, *label[:place]), token_id] for place, token_id in enumerate(label))
        for label in prompt.labels
    ]


def _answer(question: Question, scores_PO: np.ndarray, temperature: float) -> Answer:
    """Returns the answer from the scores of each prompt's options; P: prompts, O: options."""
    p_PO = np.exp(with_temperature(log_softmax(scores_PO), temperature))
    return Answer(question, tuple(float(p) for p in (p_PO[:, 0] if isinstance(question, Labels) else p_PO[0])))


def _check_length(number: int, longest: int, positions: int) -> None:
    if longest > positions:
        raise ContextError(
            f"question {number}: the text, the question and its longest option have {longest} tokens, and this model "
            f"has {positions} positions; shorten the text by {longest - positions} tokens"
        )


# --- writing questions -----------------------------------------------------------------------------------------------


def _writer(model: LLM, text: str | Sequence[Message], layout: Layout) -> "_Plain | _ChatTurns":
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer beside it, and a question is text")
    if layout == "auto":
        layout = "chat" if model.tokenizer.chat_templates else "plain"
    if layout == "plain":
        return _Plain(model, model.tokenizer, plain_text(text))
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    return _ChatTurns(Chat(model.tokenizer), model.tokenizer, messages)


def plain_text(text: str | Sequence[Message]) -> str:
    """Returns a text, or what the only message of a conversation says; ValueError for several."""
    if isinstance(text, str):
        return text
    if len(text) != 1 or not isinstance(text[0].get("content"), str):
        raise ValueError("this model reads one text, not a conversation: give the text, or a single message")
    return str(text[0]["content"])


@dataclass(frozen=True)
class _Plain:
    """Writes questions as zero-shot classification does: the text, the instructions, the option."""

    model: LLM
    tokenizer: Tokenizer
    text: str

    def prompts(self, question: Question) -> Iterator[Prompt]:
        if isinstance(question, Labels):
            for option in question.options:
                asked = f"{question.instructions.strip()} {_described(option)}?"
                yield build_prompt(self.tokenizer, self.text, asked, YES_NO, UNCUT)
            return
        meanings = [_described(option) for option in question.options if option.description]
        suffix = " ".join([*(f"{meaning}." for meaning in meanings), question.instructions.strip()])
        yield build_prompt(self.tokenizer, self.text, suffix, _texts(question), UNCUT)

    def temperature(self, question: Question) -> float:
        if isinstance(question, Labels) or any(option.description for option in question.options):
            return 1.0
        return self.model.calibration.question_temperature(question.instructions, _texts(question))


class _ChatTurns:
    """Writes a question at the end of a user's turn, and an option as the answer to it."""

    def __init__(self, chat: Chat, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        self._chat, self._tokenizer, self._messages = chat, tokenizer, messages
        self._known: dict[tuple[str, ...], tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = {}

    def prompts(self, question: Question) -> Iterator[Prompt]:
        if isinstance(question, Labels):
            for option in question.options:
                asked = f"{question.instructions.strip()}\nDoes this apply: {_described(option)}\nAnswer Yes or No."
                yield self._prompt(asked, YES_NO)
            return
        lines = [question.instructions.strip()]
        if isinstance(question, Predicate):
            lines += [f"- {_described(option)}" for option in question.options if option.description]
            lines.append("Answer Yes or No.")
        else:
            lines += [f"- {_described(option)}" for option in question.options]
            what = "levels, which go from lowest to highest" if isinstance(question, Score) else "options"
            lines.append(f"Answer with one of these {what}, and nothing else.")
        yield self._prompt("\n".join(lines), _texts(question))

    def temperature(self, question: Question) -> float:
        return 1.0  # temperatures are fitted to questions in the plain layout

    def _prompt(self, asked: str, options: Sequence[str]) -> Prompt:
        last = self._messages[-1]
        if last.get("role") == "user" and isinstance(last.get("content"), str):
            messages = [*self._messages[:-1], {**last, "content": f"{last['content']}\n\n{asked}"}]
        else:
            messages = [*self._messages, {"role": "user", "content": asked}]
        context = self._chat.encode(messages, enable_thinking=False).tokens
        before, endings = self._answers(tuple(options))
        if before and context[-len(before) :] != before:  # the beginning of an answer depends on what is asked
            before, endings = (), self._alone(options)
        return Prompt(context[: len(context) - len(before)], endings, False)

    def _answers(self, options: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Returns the last tokens of a prompt that the answers to it spell anew, and the tokens of each answer there.

        Prompt and answer are encoded as one text, in which the last character of the one and the first of the other may
        be one token; a short question stands in for the text, which lies before the template's own words.
        """
        if options not in self._known:
            asked: list[Message] = [{"role": "user", "content": "?"}]
            prompt = self._chat.encode(asked, enable_thinking=False)
            wholes = [
                self._chat.encode(
                    [*asked, {"role": "assistant", "content": option}],
                    add_generation_prompt=False,
                    continue_final_message=True,
                    enable_thinking=False,
                )
                for option in options
            ]
            if all(whole.text.startswith(prompt.text) for whole in wholes):
                start = min(shared_length(prompt.tokens, whole.tokens) for whole in wholes)
                self._known[options] = prompt.tokens[start:], tuple(whole.tokens[start:] for whole in wholes)
            else:  # templates that write an empty thought before an answer leave it out of a finished one
                self._known[options] = (), self._alone(options)
        return self._known[options]

    def _alone(self, options: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self._tokenizer.encode(option)) for option in options)


def _texts(question: Question) -> tuple[str, ...]:
    return tuple(option.text for option in question.options)


def _described(option: Option) -> str:
    return f"{option.text}: {option.description.strip()}" if option.description.strip() else option.text


# --- a classification head -------------------------------------------------------------------------------------------


def _by_head(
    model: Classifier, text: str | Sequence[Message], questions: Sequence[Question], adapter: str | None
) -> Decisions:
    """Returns the head's probabilities of its labels, in the order in which each question has them as options."""
    labels = model.config.labels
    if not questions:
        raise ValueError("there is no question; ask at least one")
    if adapter is not None:
        raise ValueError(f"there is no adapter {adapter!r}: this model has a classification head, and no adapters")
    for number, question in enumerate(questions, 1):
        if not isinstance(question, Choice | Score) or sorted(_texts(question)) != sorted(labels):
            raise ValueError(
                f"question {number}: this model has a classification head, which can only be asked for one of its "
                f"labels; give all of them as the options: {', '.join(labels)}"
            )
    encoded = model.encode([plain_text(text)], "the text")
    if encoded.truncated:
        raise ContextError(
            f"the text has {encoded.longest} tokens, and this model reads {encoded.context}; shorten it by "
            f"{encoded.longest - encoded.context} tokens"
        )
    p = dict(zip(labels, np.exp(model.log_probabilities(encoded)[0]).tolist(), strict=True))
    answers = (Answer(question, tuple(p[option] for option in _texts(question))) for question in questions)
    return Decisions(tuple(answers), len(encoded.tokens[0]))
