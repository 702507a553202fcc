"""Held-out questions answered by a model under training, greedily, and compared with the right answers.

The engine answers, with the chat template that the model learns. Knows nothing of where the questions come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llamita.backend.interface import TrainStep
from llamita.backend.sampling_params import SamplingParams
from llamita.data.conversations import Conversation
from llamita.inference.config import EngineConfig
from llamita.inference.conversation import with_end_of_turn
from llamita.inference.llm import LLM
from llamita.text.chat import Chat
from llamita.training.evaluation import Evaluation

MORE_TOKENS = 16  # an answer may be so much longer than the right one before it is cut off
SHOWN = 3


@dataclass(frozen=True)
class Question:
    """A conversation up to an answer: what the user said last, the tokens of all of it, and what is right."""

    said: str
    tokens: tuple[int, ...]
    right: str
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer of a model; `exact` where it said what is right and nothing else, and ended by itself."""

    question: Question
    text: str
    exact: bool


def questions(chat: Chat, conversations: Sequence[Conversation], count: int, positions: int) -> list[Question]:
    """At most `count`, evenly spaced, of the conversations that end with the assistant and fit with its turn into the
    model's positions. Right is all of that turn: reasoning and calls of tools too, as the template lays them out."""
    found = []
    for conversation in conversations:
        *before, last = conversation.messages
        if not before or last["role"] != "assistant":
            continue
        try:
            tokens = chat.encode(before, tools=conversation.tools, **conversation.variables).tokens
            whole = chat.encode(
                conversation.messages,
                add_generation_prompt=False,
                tools=conversation.tools,
                learned_from=len(before),
                **conversation.variables,
            )
        except ValueError:  # one that was skipped, or is named elsewhere
            continue
        turn = [token for token, mine in zip(whole.tokens, whole.assistant_mask or (), strict=False) if mine]
        if not turn:
            continue
        right = chat.tokenizer.decode(turn).strip()
        room = len(turn) + MORE_TOKENS
        if len(tokens) + room <= positions:
            found.append(Question(str(before[-1].get("content")), tokens, right, room))
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def answer(llm: LLM, chat: Chat, asked: Sequence[Question]) -> list[Answer]:
    """The likeliest answer to each question."""
    params = [
        with_end_of_turn(SamplingParams(temperature=0, max_tokens=question.max_tokens), chat) for question in asked
    ]
    given = llm.generate([question.tokens for question in asked], params)
    return [
        Answer(
            question,
            generation.text.strip(),
            generation.text.strip() == question.right and generation.finish_reason == "stop",
        )
        for question, generation in zip(asked, given, strict=True)
    ]


def shown(answers: Sequence[Answer]) -> str:
    """A few of them as text, wrong ones first."""
    first = sorted(answers, key=lambda answer: answer.exact)[:SHOWN]
    return "\n\n".join(
        f"{answer.question.said}\n-> {answer.text}" + ("" if answer.exact else f"\n   right: {answer.question.right}")
        for answer in first
    )


class Examination:
    """Questions put to the weights as they are, once for an evaluation: scored by `measure`, then written out."""

    def __init__(self, step: TrainStep, chat: Chat, asked: Sequence[Question]) -> None:
        self._step, self._chat, self._asked = step, chat, asked
        self._answers: list[Answer] = []

    def measure(self) -> dict[str, float]:
        self._answers = self._ask()
        return {"exact": sum(answer.exact for answer in self._answers) / len(self._answers)}

    def shown(self, evaluation: Evaluation) -> str:
        given = self._answers or self._ask()
        self._answers = []
        return shown(given)

    def _ask(self) -> list[Answer]:
        return answer(
            LLM(self._step.runner(), self._chat.tokenizer, engine=EngineConfig(warm_up=False)), self._chat, self._asked
        )
