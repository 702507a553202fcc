"""The bodies of /v1/look_inside: what a model expects after each token, layer by layer, and where its heads look."""

from typing import Literal

from pydantic import Field

from llamita.server.schemas.common import Answer, Body
from llamita.server.schemas.openai import Message


class LookInsideRequest(Body):
    """A text, token ids, or messages as the chat template lays them out before an answer; at most 512 tokens."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    top: int = Field(default=5, ge=1, le=20, description="The likeliest tokens that are reported for each position.")
    attention: list[int] = Field(
        default_factory=list, max_length=4, description="The layers, from 0, whose attention weights are wanted."
    )
    lens: bool = Field(default=False, description="Report what each layer would predict (the logit lens).")


class Piece(Answer):
    id: int
    text: str


class Candidate(Piece):
    logprob: float


class AttentionMap(Answer):
    """weights[n][t][s]: the weight with which head n at position t looks at position s."""

    layer: int
    weights: list[list[list[float]]]


class Inside(Answer):
    object: Literal["look_inside"]
    model: str
    layers: int
    heads: int
    tokens: list[Piece]
    next: list[list[Candidate]]
    lens: list[list[list[Candidate]]] | None
    attention: list[AttentionMap]
