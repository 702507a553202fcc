"""A conversation with a model: what was said, and how much of it the model can still read.

Knows templates and context lengths; knows nothing of terminals, and nothing of how an answer is generated.
"""

import dataclasses
from typing import Any

from llamita.backend.sampling_params import SamplingParams
from llamita.text.chat import Chat, Message


class Conversation:
    """Turns of a user and an assistant, after an optional system message, for a model of so many positions."""

    def __init__(self, chat: Chat, positions: int, system: str = "") -> None:
        self._chat = chat
        self._positions = positions
        self.system = system
        self.turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        """All that is remembered, the system message first where there is one."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns

    def ask(self, text: str, room: int) -> tuple[tuple[int, ...], int]:
        """Add what the user says; the prompt that has the model answer, and how many old messages it had to forget.

        Oldest turns go first, until `room` tokens are left for the answer, or a quarter of the context where that is
        less. Raises ValueError, the text not added, where it cannot be read even alone.
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
        """Add the model's answer; after an empty one, the question is taken back."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text.strip()})
        else:
            self.turns.pop()

    def reset(self) -> None:
        """Forget all turns, and keep the system message."""
        self.turns = []

    def params(self, chosen: SamplingParams) -> SamplingParams:
        """The sampling parameters, with what ends a turn of this template added."""
        return with_end_of_turn(chosen, self._chat)


def with_end_of_turn(params: SamplingParams, chat: Chat) -> SamplingParams:
    """The sampling parameters, with what ends a turn of a chat template added."""
    token_ids, stops = chat.end_of_turn
    more: dict[str, Any] = {
        "stop_token_ids": tuple(dict.fromkeys((*params.stop_token_ids, *token_ids))),
        "stop": tuple(dict.fromkeys((*params.stop, *stops))),
    }
    return dataclasses.replace(params, **more)
