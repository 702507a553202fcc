"""The bodies of /v1/decisions (OpenAI's form) and /v1/systemone: a text and typed questions, a probability an option.

What the values may be is checked where they are read (workflows/decision_forms.py), so that a message says what is
allowed; here are the shapes.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamita.server.schemas.common import Answer, Body

Layout = Annotated[
    Literal["auto", "chat", "plain"] | None,
    Field(description="Lay the question out by the chat template, or as plain text; auto: chat where there is one."),
]


# --- /v1/decisions ----------------------------------------------------------------------------------------------------


class InputText(Body):
    type: Literal["input_text", "output_text"]
    text: str


class InputJson(Body):
    type: Literal["input_json"]
    data: dict[str, Any] | list[Any]


InputPart = Annotated[InputText | InputJson, Field(discriminator="type")]


class InputMessage(Body):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputPart]


class ChoiceOption(Body):
    value: str | bool
    description: str | None = None


class ScoreLevel(Body):
    label: str
    description: str | None = None


class PredicateQuestion(Body):
    type: Literal["predicate"]
    instructions: str | list[InputPart]
    name: str | None = None


class ChoiceQuestion(Body):
    type: Literal["choice", "labels"]
    instructions: str | list[InputPart]
    choices: list[ChoiceOption]
    name: str | None = None


class ScoreQuestion(Body):
    type: Literal["score"]
    instructions: str | list[InputPart]
    levels: list[ScoreLevel]
    name: str | None = None


Question = Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionsRequest(Body):
    """The body of POST /v1/decisions."""

    model: str | None = None
    input: str | list[InputMessage]
    questions: list[Question]
    layout: Layout = None
    safety_identifier: str | None = Field(default=None, description="Bookkeeping of the client.")


class PredicateAnswer(Answer):
    type: Literal["predicate"]
    name: str | None
    probability: float


class ValueProbability(Answer):
    value: str | bool
    probability: float


class ChoiceAnswer(Answer):
    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ValueProbability]


class LevelProbability(Answer):
    label: str
    value: int
    probability: float


class ScoreAnswer(Answer):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class LabelsAnswer(Answer):
    type: Literal["labels"]
    name: str | None
    probabilities: list[ValueProbability]


class CacheDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Answer):
    reasoning_tokens: int


class DecisionsUsage(Answer):
    input_tokens: int
    input_tokens_details: CacheDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class DecisionsAnswer(Answer):
    model: str
    answers: list[Annotated[PredicateAnswer | ChoiceAnswer | ScoreAnswer | LabelsAnswer, Field(discriminator="type")]]
    usage: DecisionsUsage


# --- /v1/systemone ----------------------------------------------------------------------------------------------------

Instructions = str | dict[str, Any] | list[Any]


class TrueFalse(Body):
    true: Any = None
    false: Any = None


class NoulQuestion(Body):
    type: Literal["noul"]
    instructions: Instructions
    criteria: TrueFalse | None = None


class NamedQuestion(Body):
    type: Literal["choice", "labels"]
    instructions: Instructions
    criteria: dict[str, Any]


class LevelQuestion(Body):
    type: Literal["score"]
    instructions: Instructions
    criteria: list[Any]


class SystemOneRequest(Body):
    """The body of POST /v1/systemone."""

    model: str | None = None
    state: Any
    questions: dict[str, Annotated[NoulQuestion | NamedQuestion | LevelQuestion, Field(discriminator="type")]]
    layout: Layout = None


class NoulAnswer(Answer):
    type: Literal["noul"]
    noul: float


class NamedAnswer(Answer):
    type: Literal["choice"]
    choice: str
    confidence: float
    probabilities: dict[str, float]


class LevelAnswer(Answer):
    type: Literal["score"]
    score: float
    confidence: float
    legend: dict[str, str]
    probabilities: dict[str, float]


class NamedLabels(Answer):
    type: Literal["labels"]
    probabilities: dict[str, float]


class SystemOneUsage(Answer):
    input_tokens: int
    output_tokens: int


class SystemOne(Answer):
    model: str
    answers: dict[str, Annotated[NoulAnswer | NamedAnswer | LevelAnswer | NamedLabels, Field(discriminator="type")]]
    usage: SystemOneUsage
