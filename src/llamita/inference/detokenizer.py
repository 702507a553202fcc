"""Turns a stream of tokens into text: whole characters only, and nothing past a stop string.

`IncrementalDetokenizer` turns ids into text as they come; `StopMatcher` holds text back while it may still be the
beginning of a stop string. Neither knows where the ids come from.
"""

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that streaming needs."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def strips_leading_space(self) -> bool: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def spelled_bytes(self, token_id: int) -> bytes: ...


class IncrementalDetokenizer:
    """Decodes token ids as they come; the pieces joined equal the text of all ids decoded at once.

    A character whose bytes are spread over tokens comes out with its last byte; bytes that no character can begin with
    come out as U+FFFD, as in `bytes.decode("utf-8", errors="replace")`. `context` are the ids before the first one:
    their text is not repeated, but a character that they leave unfinished is completed, and the space that a
    SentencePiece model puts before the first word of a text is dropped only where no text came before. Ids that the
    tokenizer does not know (a model's padded vocabulary) give no text, nor do special ones, but for those that are
    `visible`: their names are in the text.
    """

    def __init__(self, tokenizer: TokenBytes, context: Iterable[int] = (), visible: Collection[int] = ()) -> None:
        self._tokenizer, self._visible = tokenizer, frozenset(visible)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.strips_leading_space
        for token_id in context:
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        """Takes one id and returns the text that it makes certain, often one word, sometimes nothing."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return ""
        is_visible = token_id in self._visible
        data = self._tokenizer.spelled_bytes(token_id) if is_visible else self._tokenizer.token_bytes(token_id)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Returns the rest: U+FFFD where the last character stayed unfinished, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Passes text through until a stop string appears in it, and never lets out a part of one.

    The stop string that is complete first ends the text; of several complete at the same character, the longest. The
    output does not depend on how the text was split. Only the longest suffix that begins a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Takes more text and returns what can be let out; nothing once `matched` is set."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        matches = [(pending.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in pending]
        if matches:
            end, _, self.matched = min(matches)
            self._held = ""
            return pending[: end - len(self.matched)]
        held = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def finish(self) -> str:
        """Returns the text held back, which turned out to begin no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
