"""The three operations that everything else is made of: softmax, a linear layer, and SiLU."""

import mlx.core as mx


def softmax(x: mx.array, axis: int) -> mx.array:
    """Returns exp(x) divided by its sum along `axis`. The shape and the dtype stay.

    The greatest number along the axis is subtracted first, which changes nothing but lets no exp overflow. The sum is
    taken in float32, whatever the dtype of x. A number may be minus infinity; its share is 0.
    """
    # to do: three lines, without mx.softmax.
    wide = x.astype(mx.float32)
    exponentials = mx.exp(wide - wide.max(axis=axis, keepdims=True))
    return (exponentials / exponentials.sum(axis=axis, keepdims=True)).astype(x.dtype)
    # done


def linear(x: mx.array, w: mx.array, bias: mx.array | None = None) -> mx.array:
    """Returns x times the transpose of w, plus the bias where there is one.

    x: (N.., I), any number of axes before the last. w: (O, I), a row for each output, as checkpoints have it.
    bias: (O). The result: (N.., O). All have one dtype.
    """
    # to do: one line or two, without mlx.nn.
    y = x @ w.T
    return y if bias is None else y + bias
    # done


def silu(x: mx.array) -> mx.array:
    """Returns x times the logistic sigmoid of x, element by element. The dtype stays.

    Source: Elfwing et al. 2017 (https://arxiv.org/abs/1702.03118); also called Swish.
    """
    # to do: one line, without mlx.nn.
    return x / (1 + mx.exp(-x))
    # done
