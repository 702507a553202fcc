"""Direct preference optimisation: the better of two answers is to gain on the worse one, measured from a reference.

Source: Rafailov et al. 2023 (https://arxiv.org/abs/2305.18290), equation 7. B: rows; T: positions; V: the vocabulary.
"""

import mlx.core as mx
from loss import IGNORE_INDEX


def answer_log_probs(logits: mx.array, labels: mx.array) -> mx.array:
    """Returns the log-probability of each row's answer, (B,): the sum over its tokens.

    logits: (B, T, V), float32; labels: (B, T), shifted as in lesson 3, IGNORE_INDEX where a token is not of the answer.
    Finite also where a token's probability is too small for float32.
    """
    # to do: log-softmax, the label's entry, nothing where the label is IGNORE_INDEX, the sum over a row.
    scored = labels != IGNORE_INDEX
    log_probs = logits - logits.logsumexp(-1, keepdims=True)
    chosen = mx.take_along_axis(log_probs, mx.where(scored, labels, 0)[..., None], axis=-1)[..., 0]
    return mx.where(scored, chosen, 0.0).sum(-1)
    # done


def dpo_loss(
    chosen: mx.array, rejected: mx.array, reference_chosen: mx.array, reference_rejected: mx.array, beta: float
) -> mx.array:
    """Returns the mean over the pairs of -log sigmoid(beta * margin), a scalar.

    chosen, rejected: (B,), the log-probabilities that the model gives to the better and the worse answer of each pair;
    reference_chosen and reference_rejected: those of the model before tuning. The margin is how much more the better
    answer has gained on the reference than the worse one has. It stays finite for margins of any size and sign.
    """
    # to do: the margins; the logarithm of a sigmoid without an overflow; the mean.
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return mx.logaddexp(0 * margin, -beta * margin).mean()
    # done
