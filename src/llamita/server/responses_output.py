"""The output items of Responses, made of the parts of an answer as they come, with the events that tell of them.

A stream and a whole answer are made by the same steps: whoever wants the whole leaves the events out.
"""

from typing import Any, Literal

from llamita.server import wording
from llamita.server.chat_jobs import CallDelta, ChatEvent
from llamita.text.tokenizer import Tokenizer

Event = dict[str, Any]
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
"""The content part of an item, and the middle of the names of its events."""


class Output:
    """The items of one answer. `items` are those so far, the last of which may be under way."""

    def __init__(self, tokenizer: Tokenizer | None, logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._is_open = False
        self._call: int | None = None  # the index of the call under way
        self._waiting: list[dict[str, Any]] = []  # log-probabilities of tokens whose text was not let out yet

    def take(self, event: ChatEvent) -> list[Event]:
        """Takes what one token adds; returns the events that tell of it."""
        if self._logprobs and event.token.token_id is not None:
            self._waiting.append(wording.chat_logprob(self._tokenizer, event.token))
        events: list[Event] = []
        if event.reasoning:
            self._waiting = []
            events += self._write("reasoning", event.reasoning)
        if event.text:
            events += self._write("message", event.text)
        for call in event.calls:
            self._waiting = []
            events += self._write_call(call)
        return events

    def end(self, status: Literal["completed", "incomplete"]) -> list[Event]:
        """Ends the last item, with its status; an answer that says nothing is an empty message."""
        events: list[Event] = []
        is_message = self._is_open and self.items[-1]["type"] == "message"
        if not self.items or (is_message and self._waiting):
            events += self._write("message", "")
        return events + self._close(status)

    def _write(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if not self._is_open or self.items[-1]["type"] != kind:
            events += self._close() + self._open_text(kind)
        part = self.items[-1]["content"][0]
        part["text"] += text
        scores: dict[str, Any] = {}
        if kind == "message":
            scores, self._waiting = {"logprobs": self._waiting}, []
            part["logprobs"] = part["logprobs"] + scores["logprobs"]
        if text or scores.get("logprobs"):
            events.append(self._of_part(f"{PARTS[kind]}.delta", delta=text, **scores))
        return events

    def _write_call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        if self._call != call.index:
            events += self._close()
            item = {"type": "function_call", "id": wording.new_id("fc_"), "call_id": call.id, "name": call.name}
            events += self._open({**item, "arguments": "", "status": "in_progress"})
            self._call = call.index
        if call.arguments:
            self.items[-1]["arguments"] += call.arguments
            events.append(self._of_item("function_call_arguments.delta", delta=call.arguments))
        return events

    def _open_text(self, kind: str) -> list[Event]:
        part: dict[str, Any] = {"type": PARTS[kind], "text": ""}
        if kind == "message":
            part |= {"annotations": [], "logprobs": []}
            item: dict[str, Any] = {"type": kind, "id": wording.new_id("msg_"), "role": "assistant"}
        else:
            item = {"type": kind, "id": wording.new_id("rs_"), "summary": []}
        events = self._open({**item, "status": "in_progress", "content": []})
        self.items[-1]["content"] = [part]
        return [*events, self._of_part("content_part.added", part=dict(part))]

    def _open(self, item: dict[str, Any]) -> list[Event]:
        self.items.append(item)
        self._is_open = True
        return [self._of_output("output_item.added")]

    def _close(self, status: Literal["completed", "incomplete"] = "completed") -> list[Event]:
        if not self._is_open:
            return []
        item = self.items[-1]
        item["status"] = status
        self._is_open, self._call = False, None
        if item["type"] == "function_call":
            events = [self._of_item("function_call_arguments.done", arguments=item["arguments"])]
        else:
            part = item["content"][0]
            scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            events = [
                self._of_part(f"{part['type']}.done", text=part["text"], **scores),
                self._of_part("content_part.done", part=dict(part)),
            ]
        return [*events, self._of_output("output_item.done")]

    def _of_part(self, name: str, **more: Any) -> Event:
        return self._of_item(name, content_index=0, **more)

    def _of_item(self, name: str, **more: Any) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{name}", **place, **more}

    def _of_output(self, name: str) -> Event:
        return {"type": f"response.{name}", "output_index": len(self.items) - 1, "item": dict(self.items[-1])}
