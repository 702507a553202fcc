"""The objectives that a model is trained for, named so that either backend can compute them.

An objective is data: a training step turns it into a function of hidden states. It lies left of the backends, which
compute it, and of the workflows, which choose it. Knows no tensor.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class NextToken:
    """-log p of every label that is scored: pre-training and instruction tuning."""


@dataclass(frozen=True)
class Classification:
    """-log p of the label of each text, read from the state of its last token; metric: `accuracy`.

    A batch's label stands at that token and nowhere else in its row, so padding on either side changes nothing.
    """

    dropout: float = 0.0
    """On that state, before the linear head."""
    class_weights: tuple[float, ...] = ()
    """The loss of a text is multiplied by the weight of its label; empty: by 1."""


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives, from pairs of answers.

    A row is a pair: the batch's own tokens and labels are the chosen answer, `extras` hold `rejected_tokens_BT`,
    `rejected_labels_BT`, and `reference_B2`, the summed log-probabilities that the model before tuning gave to the two
    (with `normalize_lengths`: the means over their tokens). Metrics: `accuracy`, `margin`, `chosen_reward` and
    `rejected_reward`; a reward is beta times the log-ratio to the reference.
    """

    form: Literal["dpo", "ipo"] = "dpo"
    """dpo: -log sigmoid(beta * margin). ipo: (margin - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036)."""
    beta: float = 0.1
    """The strength with which the model is held to the reference."""
    normalize_lengths: bool = False
    """Compare means over the tokens of an answer instead of sums."""
    label_smoothing: float = 0.0
    """The share of pairs taken to be labelled the wrong way round (conservative DPO); dpo alone."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be above 0; 0.1 is usual")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        if self.label_smoothing and self.form != "dpo":
            raise ValueError(f"label_smoothing={self.label_smoothing} has a meaning for form=dpo alone; leave it out")


@dataclass(frozen=True)
class PolicyGradient:
    """Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) from sampled answers.

    A row is an answer; its labels are its tokens. It is the unit too (`row_is_target`) where `normalization` is answer.
    `extras` hold `advantages_B`, `old_log_probs_BT`, and `reference_log_probs_BT` where `kl_weight` is not 0. Metrics:
    `clipped`, `ratio` and `kl`.
    """

    clip: float = 0.2
    """The ratio of probabilities to those at sampling counts between 1 - clip and 1 + clip."""
    kl_weight: float = 0.0
    """Of the divergence from the reference."""
    normalization: Literal["answer", "token"] = "answer"
    """answer: the mean over answers of each one's mean over its tokens. token: the mean over all tokens."""

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip} must be above 0 and below 1; 0.2 is usual")
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight={self.kl_weight} must not be negative; 0 leaves the reference out")


@dataclass(frozen=True)
class Distillation:
    """A teacher's distribution over the vocabulary beside the label (Hinton et al. 2015, arXiv:1503.02531).

        (1 - w) * -log p(label) + w * t^2 * KL(teacher_t || student_t),   w = teacher_weight, t = teacher_temperature

    at every label that is scored: the forward divergence, so that the student is to cover all that the teacher finds
    likely. Logits of both are divided by t in it, and t^2 keeps its gradients as large as they are at 1.

    `extras` hold `teacher_log_probs_BSV`, float32: the teacher's log-probabilities at t, [b, s] being those where the
    s-th scored label of row b stands. S is at least the most labels scored in a row; behind a row's own lies anything
    finite. They take B x S x V x 4 bytes, and the loss a few times M x V x 4, since the student's logits at all M
    scored labels are held.

    Metrics: `cross_entropy` and `teacher_kl`, the divergence without t^2. An evaluation's loss is the cross-entropy
    alone, comparable with that of any other model and with that of the same one without a teacher.
    """

    teacher_weight: float = 0.5
    """Of the divergence; the cross-entropy has what is left to 1."""
    teacher_temperature: float = 1.0
    """Above 1, what the teacher finds unlikely counts for more."""

    def __post_init__(self) -> None:
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight={self.teacher_weight} must be above 0 and at most 1; 0.5 is usual")
        if not 0 < self.teacher_temperature < math.inf:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature} must be a number above 0; 1 leaves logits as they are"
            )


Objective = NextToken | Classification | Preference | PolicyGradient | Distillation


def without_dropout(objective: Objective) -> Objective:
    """Returns the objective without the dropout of its own, where it has one."""
    return replace(objective, dropout=0.0) if isinstance(objective, Classification) else objective
