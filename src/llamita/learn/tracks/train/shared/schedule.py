"""The learning rate of each step: it rises, then falls along half a cosine.

Source: Loshchilov and Hutter 2017 (https://arxiv.org/abs/1608.03983), equation 5, after a linear warm-up.
"""

import math


def learning_rate(step: int, peak: float, minimum: float, warmup_steps: int, steps: int) -> float:
    """Returns the learning rate of update number `step`; the first is 0, the last is steps - 1.

    Over the first `warmup_steps` updates it rises by equal amounts, from peak / warmup_steps in the first of them to
    `peak` in the last of them. From there it falls along half a cosine to `minimum`, which update steps - 1 has, and
    each after it. warmup_steps may be 0 and is less than steps. With 0, update 0 is not at the peak: 1 / steps of the
    fall is over.
    """
    # to do: the warm-up; else the share of the fall that this update ends, from 0 to 1; the cosine of it.
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step + 1 - warmup_steps) / (steps - warmup_steps))
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2
    # done
