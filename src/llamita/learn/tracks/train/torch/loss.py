"""The loss of a language model: how little probability it gave to the token that came next.

T: positions of a row; B: rows; V: the vocabulary.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not scored."""


def shifted(rows: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Returns what the model reads and what it should say: (inputs, labels), both (B, T).

    rows: (B, T + 1) tokens, with `padding` behind the shorter texts. inputs are all but the last column; labels[b, t]
    is the token that follows inputs[b, t], or IGNORE_INDEX where that is `padding`. Inputs keep their padding, and rows
    stay as they are.
    """
    # to do: two slices; then the labels that are padding.
    inputs, labels = rows[:, :-1], rows[:, 1:]
    return inputs, torch.where(labels == padding, IGNORE_INDEX, labels)
    # done


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over scored positions of -log softmax(logits)[label], in nats, as a float32 scalar.

    logits: (B, T, V), float32 or bfloat16, of any size: computed in float32, and no exponential overflows. labels:
    (B, T) tokens, or IGNORE_INDEX, where logits count for nothing. No framework's own loss, please; its logsumexp will
    do.
    """
    # to do: the logarithm of the sum of exponentials, with the largest logit taken out of it; less the label's logit.
    logits = logits.float()
    scored = labels != IGNORE_INDEX
    largest = logits.amax(dim=-1, keepdim=True)
    normalizer = (logits - largest).exp().sum(dim=-1).log() + largest[..., 0]
    places = torch.where(scored, labels, 0)
    chosen = logits.gather(-1, places[..., None])[..., 0]
    return torch.where(scored, normalizer - chosen, 0.0).sum()
    # done


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over the scored positions of the whole batch, a float32 scalar; 0 where none is scored.

    logits, labels: as in `summed_cross_entropy`.
    """
    # to do: the sum, and how many labels are scored.
    count = (labels != IGNORE_INDEX).sum()
    return summed_cross_entropy(logits, labels) / count.clamp(min=1)
    # done
