"""A conversation with a model: keeps its turns, and forgets the oldest where the context is full.

Knows templates and context lengths; knows nothing of terminals or of how an answer is generated.
"""

import dataclasses
from typing import Any

from llamita.backend.sampling_params import SamplingParams
from llamita.text.answers import AnswerFormat
from llamita.text.chat import Chat, Message


class Conversation:
    """Turns of a user and an assistant, after an optional system message, for a model of `positions` positions."""

    def __init__(self, chat: Chat, positions: int, system: str = "") -> None:
        self._chat = chat
        self._positions = positions
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """The messages that are remembered, the system message first where there is one."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, text: str, room: int) -> tuple[tuple[int, ...], int]:
        """Adds a user's text; returns the prompt for the answer, and the number of old messages that were forgotten.

        The oldest turns are forgotten until `room` tokens are left for the answer, or a quarter of the context where
        that is less. Raises ValueError, the text not added, where it is too long even alone.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        room = max(1, min(room, self._positions // 4))
        forgotten = 0
        try:
            while True:
                tokens = self._chat.encode(self.messages).tokens
                if len(tokens) + room <= self._positions:
                    return tokens, forgotten
                if len(self.turns) == 1:
                    limit = self._positions - room
                    raise ValueError(f"this has {len(tokens)} tokens, but the model can read {limit}; shorten it")
                going = 1 if self.turns[1]["role"] == "user" else min(2, len(self.turns) - 1)
                del self.turns[:going]
                forgotten += going
        except ValueError:
            self.turns = before
            raise

    def answer(self, text: str) -> None:
        """Adds the model's answer; an empty one takes the question back."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text.strip()})
        else:
            self.turns.pop()

    def reset(self) -> None:
        """Forgets all turns, and keeps the system message."""
        self.turns = []

    def params(self, chosen: SamplingParams) -> SamplingParams:
        """Returns the sampling parameters, with the stop tokens and strings of this template added."""
        return with_end_of_turn(chosen, self._chat)


def with_end_of_turn(params: SamplingParams, chat: Chat) -> SamplingParams:
    """Returns the sampling parameters, with the tokens and strings that end a turn of a chat template added."""
    token_ids, stops = chat.end_of_turn
    more: dict[str, Any] = {
        "stop_token_ids": tuple(dict.fromkeys((*params.stop_token_ids, *token_ids))),
        "stop": tuple(dict.fromkeys((*params.stop, *stops))),
    }
    return dataclasses.replace(params, **more)


def with_answer_format(params: SamplingParams, form: AnswerFormat) -> SamplingParams:
    """Returns the sampling parameters for an answer that an `AnswerParser` reads: its control tokens are part of the
    text, and what ends it is added."""
    more: dict[str, Any] = {
        "stop_token_ids": tuple(dict.fromkeys((*params.stop_token_ids, *form.stop_token_ids))),
        "visible_token_ids": tuple(dict.fromkeys((*params.visible_token_ids, *form.visible_token_ids))),
    }
    return dataclasses.replace(params, **more)
