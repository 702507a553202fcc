"""The content blocks of Anthropic's Messages, made of the parts of an answer as they come, with the events of a stream.

A stream and a whole answer are made by the same steps: whoever wants the whole leaves the events out.
"""

from typing import Any

from pydantic_core import from_json

from llamita.server.chat_jobs import CallDelta, ChatEvent

Event = dict[str, Any]


class Blocks:
    """The content of one answer. `content` are the blocks so far, the last of which may be under way."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._is_open = False
        self._call: int | None = None  # the index of the call under way
        self._arguments = ""

    def take(self, event: ChatEvent) -> list[Event]:
        """Takes what one token adds; returns the events that tell of it."""
        events: list[Event] = []
        if event.reasoning:
            events += self._write({"type": "thinking", "thinking": "", "signature": ""}, "thinking", event.reasoning)
        if event.text:
            events += self._write({"type": "text", "text": ""}, "text", event.text)
        for call in event.calls:
            events += self._write_call(call)
        return events

    def end(self) -> list[Event]:
        """Ends the last block."""
        if not self._is_open:
            return []
        self._is_open, block, events = False, self.content[-1], []
        if block["type"] == "thinking":
            events.append(self._delta("signature", signature=""))
        elif self._call is not None:
            # An answer may end at max_tokens in the middle of its arguments: what is there of them is given.
            block["input"] = from_json(self._arguments or "{}", allow_partial=True)
            self._call, self._arguments = None, ""
        return [*events, {"type": "content_block_stop", "index": len(self.content) - 1}]

    def _write(self, empty: dict[str, Any], field: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self.content[-1]["type"] != empty["type"]:
            events += self._open(empty)
        self.content[-1][field] += text
        return [*events, self._delta(field, **{field: text})]

    def _write_call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if self._call != call.index:
            events += self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            self._call = call.index
        if call.arguments:
            self._arguments += call.arguments
            events.append(self._delta("input_json", partial_json=call.arguments))
        return events

    def _open(self, block: dict[str, Any]) -> list[Event]:
        events = self.end()
        self.content.append(block)
        self._is_open = True
        start = {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}
        return [*events, start]

    def _delta(self, kind: str, **more: Any) -> Event:
        delta = {"type": f"{kind}_delta", **more}
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}
