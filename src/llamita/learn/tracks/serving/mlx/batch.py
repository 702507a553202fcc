"""Continuous batching: requests come and go while others run, and every step runs all that are ready together.

Source: Yu et al. 2022, Orca (https://www.usenix.org/conference/osdi22/presentation/yu), section 3; chunks of prompts
between the steps of others: Agrawal et al. 2023, Sarathi (https://arxiv.org/abs/2308.16369), section 4.
Letters: N requests that run together, H heads, L new positions of each, S the most positions of any, E size of a head.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from generate import Forward
from sampler import Sampler


class BatchKvCache:
    """The caches of one layer of several requests, which hold different numbers of positions, as one."""

    def __init__(self, caches: Sequence[Any]) -> None:
        """caches: a cache of one row for each request, such as a `KvCache`."""
        self.caches = caches

    @property
    def offset(self) -> list[int]:
        """How many positions each request has."""
        return [cache.offset for cache in self.caches]

    def update_and_fetch(self, key: mx.array, value: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Takes L new positions of every request, (N, H, L, E); returns all keys, all values, and the mask for them.

        Row n goes into the cache of request n. Keys and values come back as (N, H, S, E), where S is the most positions
        that any request has now: those of a request begin at 0, and zeros fill up what it has fewer. The mask is
        (N, 1, L, S), of the dtype of key: 0 where a new position sees a key, minus infinity elsewhere. A request with s
        positions now has its new ones at s - L to s - 1; each sees itself and those before it. The masks that the
        requests' caches return are not needed.
        """
        # to do: each request's own cache; `filled`, below, for the zeros; the mask from the positions.
        L = key.shape[2]
        rows = [cache.update_and_fetch(key[n : n + 1], value[n : n + 1]) for n, cache in enumerate(self.caches)]
        S = max(self.offset)
        keys = mx.concatenate([filled(row[0], S) for row in rows])
        values = mx.concatenate([filled(row[1], S) for row in rows])
        positions = mx.array(self.offset)[:, None] - L + mx.arange(L)
        seen = mx.arange(S) <= positions[:, None, :, None]
        mask = mx.where(seen, 0.0, -mx.inf).astype(key.dtype)
        return keys, values, mask
        # done


@dataclass
class Request:
    """A prompt, and what has been written after it."""

    prompt: list[int]
    max_tokens: int
    caches: list[Any]
    """One for each layer."""
    read: int = 0
    """How many tokens of the prompt the model has read."""
    tokens: list[int] = field(default_factory=list)
    """The new tokens."""


class Batcher:
    """Runs requests together, as many at a time as there are places for."""

    def __init__(
        self,
        model: Forward,
        new_caches: Callable[[], list[Any]],
        sampler: Sampler,
        batch_size: int,
        chunk: int,
        eos_ids: Collection[int] = (),
    ) -> None:
        """new_caches: gives empty caches, one for each layer. batch_size: the places. chunk: see `step`."""
        self.model, self.new_caches, self.sampler = model, new_caches, sampler
        self.batch_size, self.chunk, self.eos_ids = batch_size, chunk, eos_ids
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def add(self, prompt: Sequence[int], max_tokens: int) -> Request:
        """Returns a new request, which waits for a place. prompt: at least one token. max_tokens: at least 1."""
        self.waiting.append(Request(list(prompt), max_tokens, self.new_caches()))
        return self.waiting[-1]

    def run(self) -> None:
        """Steps until all requests are finished."""
        while self.waiting or self.running:
            self.step()

    def step(self) -> list[Request]:
        """Takes one step and returns the requests that it finished, in the order in which they were running.

        1. While there is a place, the request that has waited longest begins to run, behind those that run already.
        2. All running requests whose prompt was read in earlier steps get a token each, by one call of the model over
           their last tokens, (N, 1), with a `BatchKvCache` for each layer. With none, it is not called.
        3. The first running request whose prompt is not yet read reads at most `self.chunk` tokens more of it, in a
           call of its own, (1, L), with its own caches. Where that was the last of the prompt, it gets its first token.
        4. A request is finished when its newest token is in `self.eos_ids`, which is then taken off its tokens again,
           or when it has max_tokens tokens. It stops running, and its place is free in the next step.
        """
        # to do: the four parts. `self.sampler` takes logits (N, V) and gives a token for each row; part 2 calls it once
        #        for all rows, part 3 once for its own.
        while self.waiting and len(self.running) < self.batch_size:
            self.running.append(self.waiting.pop(0))
        reading = [request for request in self.running if request.read < len(request.prompt)]
        writing = [request for request in self.running if request.read == len(request.prompt)]
        if writing:
            caches = [BatchKvCache(layer) for layer in zip(*(request.caches for request in writing), strict=True)]
            logits = self.model(mx.array([[request.tokens[-1]] for request in writing]), caches)
            for request, token in zip(writing, self.sampler(logits[:, -1]), strict=True):
                request.tokens.append(int(token))
        if reading:
            first = reading[0]
            part = first.prompt[first.read : first.read + self.chunk]
            logits = self.model(mx.array([part]), first.caches)
            first.read += len(part)
            if first.read == len(first.prompt):
                first.tokens.append(int(self.sampler(logits[:, -1])[0]))
        finished = []
        for request in list(self.running):
            ended = bool(request.tokens) and request.tokens[-1] in self.eos_ids
            if ended:
                request.tokens.pop()
            if ended or len(request.tokens) == request.max_tokens:
                self.running.remove(request)
                finished.append(request)
        return finished
        # done


def filled(x: mx.array, S: int) -> mx.array:
    """Returns x, (1, H, s, E), with zeros behind it up to S positions."""
    return mx.pad(x, ((0, 0), (0, 0), (0, S - x.shape[2]), (0, 0)))
