"""Writing text: the choice of the next token, and the loop around the model."""

from collections.abc import Callable, Collection, Iterator

import numpy as np
from cache import KeyValueCache
from config import LlamaConfig
from functions import softmax
from llama import Weights, forward


def greedy(logits: np.ndarray) -> np.ndarray:
    """Returns the most likely token of each row. logits: (..., vocabulary); the result: (...), integers.

    Where two are equally likely, it is the one with the smaller number.
    """
    # to do: one line.
    return logits.argmax(axis=-1)
    # done


def sample(logits: np.ndarray, temperature: float, number: np.ndarray) -> np.ndarray:
    """Returns a token of each row, drawn by the softmax of the logits divided by the temperature.

    logits: (..., vocabulary); temperature: more than 0; number: (...), a number for each row, drawn evenly from
    0 to below 1.

    The result: (...), integers: the first token at which the running sum of the probabilities, its own included, is
    more than the number. Rounding may leave the last sum below a number close to 1: the result is then the last token.
    """
    # to do: probabilities, `np.cumsum`, and the count of sums that are not more than the number.
    sums = np.cumsum(softmax(logits / temperature), axis=-1)
    return np.minimum((sums <= number[..., None]).sum(axis=-1), logits.shape[-1] - 1)
    # done


def generate(
    config: LlamaConfig,
    weights: Weights,
    prompt: list[int],
    count: int,
    choose: Callable[[np.ndarray], int],
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yields the tokens after a prompt: `count` of them, or fewer where one of `stop` is chosen, which is not yielded.

    `choose` takes the logits after the last token, (vocabulary,), and returns the next token. Nothing is read twice:
    `forward` gets the prompt, (1, length), and after that one token at a time, (1, 1), with the same caches.
    `tokens`, always of two axes, is what it is to read next.
    """
    capacity = len(prompt) + count
    caches = [
        KeyValueCache(1, config.num_key_value_heads, capacity, config.head_dim) for _ in range(config.num_hidden_layers)
    ]
    tokens = np.array([prompt])
    for _ in range(count):
        # to do: read `tokens` with `forward`; choose; return where the token is one of `stop`; yield it; make it the
        #        next to be read.
        token = choose(forward(config, weights, tokens, caches)[0, -1])
        if token in stop:
            return
        yield token
        tokens = np.array([[token]])
        # done
