"""One text under way in the engine: its tokens, the memory it holds, its text, and when it ends.

Knows nothing of other sequences or of how tokens are computed.
"""

import bisect
import time
from collections import abc
from collections.abc import Collection

import numpy as np

from llamita.backend.interface import Likeliest, SampledToken, SampleSpec, ScheduledChunk, Target
from llamita.backend.sampling_params import MAX_SEED
from llamita.inference.block_manager import Prefix, Tables
from llamita.inference.detokenizer import IncrementalDetokenizer, StopMatcher, TokenBytes
from llamita.inference.request import FinishReason, PromptTarget, Request, Statistics, TokenEvent
from llamita.inference.structured import Matcher


class Sequence:
    """A prompt and the tokens generated after it, with the memory they hold.

    `computed` counts the tokens whose keys and values lie in the blocks of `tables`. `forks` are the other sequences of
    its request, which start once it has read the prompt that they share.
    """

    def __init__(
        self,
        id: int,
        request: Request,
        index: int,
        seed: int,
        arrival: int,
        limit: int,
        end_tokens: Collection[int],
        tokenizer: TokenBytes | None,
        matcher: Matcher | None = None,
    ) -> None:
        self.id, self.request, self.index, self.params = id, request, index, request.params
        self.arrival = arrival
        """The number of its request among all that came."""
        self.limit = limit
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.computed = 0
        self.tables: Tables = ()
        self.prefixes: list[Prefix] = []
        self.forks: list[Sequence] = []
        self.statistics = Statistics(seed=(seed + index) & MAX_SEED, prompt_tokens=self.prompt_length)
        self.finish_reason: FinishReason | None = None
        self.matcher = matcher
        self.targets = request.targets
        if self.params.prompt_logprobs:
            self.targets = tuple(map(PromptTarget, range(1, self.prompt_length), request.prompt[1:]))
        self.scores: list[float] = []  # log-probabilities of the targets, as far as the prompt was read
        self.tops: list[Likeliest] = []  # the likeliest tokens beside them, where asked for
        self.arrived = time.perf_counter()
        self._ends = frozenset(() if self.params.ignore_eos else end_tokens) | frozenset(self.params.stop_token_ids)
        self._detokenizer = tokenizer and IncrementalDetokenizer(
            tokenizer, context=request.prompt, visible=self.params.visible_token_ids
        )
        self._stop_matcher = StopMatcher(self.params.stop)

    @property
    def is_decoding(self) -> bool:
        """True once the prompt has been read and only the last token is still to be run."""
        return self.computed == len(self.tokens) - 1 and self.computed >= self.prompt_length

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def shareable(self) -> int:
        """The number of first tokens of which all but the last may come from the prefix cache.

        The state of the last is what a token is drawn from, or the first target judged by.
        """
        return self.targets[0].position if self.targets and not self.generated else len(self.tokens)

    @property
    def width(self) -> int:
        """The number of sequences that this one is or will be, its forks included."""
        return 1 + len(self.forks)

    @property
    def may_be_drafted(self) -> bool:
        """True where several tokens may be sampled at once, since none of them changes how the next one is picked."""
        return not (self.matcher or self.params.reads_history or self.targets)

    def chunk(self, count: int, drafts: abc.Sequence[int] = (), allowed: np.ndarray | None = None) -> ScheduledChunk:
        """Returns the next `count` known tokens, then the drafts; it samples where these are all known tokens."""
        end = self.computed + count
        samples: list[SampleSpec] = []
        if end == len(self.tokens):
            samples = [self._sample(end + extra, allowed) for extra in range(len(drafts) + 1)]
            samples += [fork._sample(end, allowed) for fork in self.forks]
        targets: tuple[Target, ...] = ()
        if self.targets and not self.generated:
            first, stop = (bisect.bisect_left(self.targets, (place + 1,)) for place in (self.computed, end))
            targets = tuple(Target(at - 1 - self.computed, token_id) for at, token_id in self.targets[first:stop])
        return ScheduledChunk(
            self.id,
            (*self.tokens[self.computed : end], *drafts),
            self.computed,
            tuple(table.blocks for table in self.tables),
            tuple(samples),
            targets,
            self.request.adapter,
            self.params.top_logprobs if targets and self.params.prompt_logprobs else 0,
        )

    def _sample(self, position: int, allowed: np.ndarray | None) -> SampleSpec:
        early = position - self.prompt_length < self.params.min_tokens
        banned = tuple(sorted(self._ends)) if early else ()
        if banned and allowed is not None and not _without(allowed, banned).any():
            banned = ()  # the grammar has come to its end
        seed = self.statistics.seed
        return SampleSpec(self.params, seed, position, self.tokens, self.prompt_length, banned, allowed)

    def score(self, logprobs: abc.Sequence[float], tops: abc.Sequence[Likeliest]) -> None:
        """Takes in what a chunk found of its targets."""
        self.scores += logprobs
        self.tops += tops

    def take(self, token: SampledToken) -> TokenEvent:
        """Takes in a sampled token and returns its event, with the text that is certain and the end of the sequence."""
        if self.matcher is not None and token.token_id not in self.params.stop_token_ids:
            self.matcher.accept(token.token_id)
        self.tokens.append(token.token_id)
        self.statistics.generated_tokens += 1
        self.statistics.decode_tokens += self.generated > 1
        text = ""
        if token.token_id in self._ends:
            self.finish_reason = "stop"
        else:
            text = self._let_out(self._detokenizer.feed(token.token_id)) if self._detokenizer else ""
            if len(self.tokens) >= self.limit:
                self.finish_reason = "length"
            if self.matcher is not None and self.matcher.is_complete:
                self.finish_reason = "stop"
        return self._event(token, text)

    def end(self, reason: FinishReason, error: str = "") -> TokenEvent:
        """Ends the sequence without a further token."""
        self.finish_reason = reason
        return self._event(None, "", error)

    def _let_out(self, text: str) -> str:
        """Returns the text that can be shown: all but a stop string's beginning, looked for from `min_tokens` on."""
        return text if self.generated < self.params.min_tokens else self._stop_matcher.feed(text)

    def _event(self, token: SampledToken | None, text: str, error: str = "") -> TokenEvent:
        if self.finish_reason is not None and self._detokenizer:
            text += self._let_out(self._detokenizer.finish())
        if self._stop_matcher.matched is not None:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stop_matcher.finish()
        scores, tops = (tuple(self.scores), tuple(self.tops)) if self.generated <= 1 else ((), ())
        self.scores, self.tops = [], []
        return TokenEvent(
            request_id=self.request.id,
            token_id=None if token is None else token.token_id,
            logprob=0.0 if token is None else token.logprob,
            text=text,
            statistics=self.statistics,
            finish_reason=self.finish_reason,
            index=self.index,
            top_logprobs=() if token is None else token.top,
            prompt_logprobs=scores,
            prompt_top_logprobs=tops,
            error=error,
            stop_string=self._stop_matcher.matched,
        )


def _without(allowed: np.ndarray, banned: abc.Sequence[int]) -> np.ndarray:
    """Returns a mask of allowed ids (see `SampleSpec`) without the banned ones."""
    words = allowed.view(np.uint32).copy()
    for token_id in banned:
        words[token_id // 32] &= ~np.uint32(1 << (token_id % 32))
    return words
