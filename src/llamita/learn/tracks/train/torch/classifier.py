"""A classifier over a language model: a linear layer over what the model makes of a whole text.

B: texts; T: positions; D: the model's width; C: classes.
"""

import torch
from torch import Tensor


def last_states(hidden: Tensor, real: Tensor) -> Tensor:
    """Returns the hidden state of each text's last token, (B, D).

    hidden: (B, T, D); real: booleans (B, T), False where there is padding, which may stand before a text, behind it,
    or both. At least one token of each row is real. The last token is the only one that has seen the whole text.
    """
    # to do: the place of the last True in each row; the state there.
    place = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, place, -1).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
    # done


def class_log_probs(hidden: Tensor, real: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the log-probability of each class, (B, C). weight: (C, D); bias: (C,); the others as in `last_states`."""
    # to do: the linear layer over the last states; a log-softmax over the classes.
    logits = last_states(hidden, real) @ weight.T + bias
    return logits - logits.logsumexp(-1, keepdim=True)
    # done


def classification_loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over the texts of -log p of the right class. log_probs: (B, C); labels: integers (B,)."""
    # to do: one line is enough.
    return -log_probs[torch.arange(len(labels), device=labels.device), labels].mean()
    # done
