"""The three operations that everything else is made of: softmax, a linear layer, and SiLU."""

import torch
from torch import Tensor


def softmax(x: Tensor, axis: int) -> Tensor:
    """Returns exp(x) divided by its sum along `axis`. The shape and the dtype stay.

    The greatest number along the axis is subtracted first, which changes nothing but lets no exp overflow. The sum is
    taken in float32, whatever the dtype of x. A number may be minus infinity; its share is 0.
    """
    # to do: three lines, without torch.softmax.
    wide = x.float()
    exponentials = torch.exp(wide - wide.amax(dim=axis, keepdim=True))
    return (exponentials / exponentials.sum(dim=axis, keepdim=True)).to(x.dtype)
    # done


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x times the transpose of w, plus the bias where there is one.

    x: (N.., I), any number of axes before the last. w: (O, I), a row for each output, as checkpoints have it.
    bias: (O). The result: (N.., O). All have one dtype.
    """
    # to do: one line or two, without torch.nn.functional.linear.
    y = x @ w.T
    return y if bias is None else y + bias
    # done


def silu(x: Tensor) -> Tensor:
    """Returns x times the logistic sigmoid of x, element by element. The dtype stays.

    Source: Elfwing et al. 2017 (https://arxiv.org/abs/1702.03118); also called Swish.
    """
    # to do: one line, without torch.nn.functional.silu.
    return x / (1 + torch.exp(-x))
    # done
