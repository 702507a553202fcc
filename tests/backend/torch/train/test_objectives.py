"""Preference and policy losses against trl's own code, with gradients; their parts against the plain form.

trl's losses are methods of its trainers. They are called here as they are, on a stand-in for the trainer that holds the
options they read, and on log-probabilities that PyTorch's log_softmax gave for the same hidden states and head.
"""

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamita.backend.objectives import PolicyGradient, Preference
from llamita.backend.torch.model.head import OutputHead
from llamita.backend.torch.train import losses, objectives
from llamita.backend.torch.train.objectives import TensorBatch
from llamita.backend.torch.train.step import build_train_step
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.training.trainer import split

B, T, D, V = 5, 9, 16, 40
IGNORED = losses.IGNORED


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def labels(generator, rows, shortest=1):
    """Answers of unequal length behind prompts of unequal length."""
    labels_BT = torch.full((rows, T), IGNORED)
    for row in labels_BT:
        start = int(torch.randint(3, (1,), generator=generator))
        end = start + int(torch.randint(shortest, T - start, (1,), generator=generator))
        row[start:end] = torch.randint(V, (end - start,), generator=generator)
    return labels_BT


class Case:
    """Hidden states that the tokens stand for (each token is a place in a table), a head, random references."""

    def __init__(self, rows):
        self.generator = torch.Generator().manual_seed(0)
        self.states_RTD = self.random(rows, T, D).requires_grad_()
        self.head_VD = self.random(V, D).requires_grad_()
        self.tokens_RT = torch.arange(rows)[:, None].expand(rows, T)
        self.labels_RT = labels(self.generator, rows)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def hidden(self, tokens_BT, segments_BT=None):
        return self.states_RTD[tokens_BT[:, 0]]

    def log_probs(self):
        """By PyTorch, of all rows, every logit held."""
        table_RTV = (self.states_RTD @ self.head_VD.mT).log_softmax(-1)
        found_RT = table_RTV.gather(-1, self.labels_RT.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.labels_RT == IGNORED, 0.0, found_RT)

    def gradients(self, loss):
        return torch.autograd.grad(loss, (self.states_RTD, self.head_VD), retain_graph=True)

    def compare(self, ours, theirs):
        close(ours, theirs)
        for one, other in zip(self.gradients(ours), self.gradients(theirs), strict=True):
            close(one, other)


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_log_probabilities_in_chunks_equal_the_plain_ones(chunk_size):
    case = Case(B)
    ours = losses.chunked_log_probs(case.states_RTD, OutputHead(case.head_VD), case.labels_RT, chunk_size)
    theirs = case.log_probs()
    weights = case.random(B, T)
    close(ours, theirs)
    case.compare((ours * weights).sum(), (theirs * weights).sum())


def test_log_probabilities_under_autocast_follow_float32():
    case = Case(B)
    weights = case.random(B, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.chunked_log_probs(case.states_RTD, OutputHead(case.head_VD), case.labels_RT, 4)
    assert ours.dtype == torch.float32
    for one, other in zip(
        case.gradients((ours * weights).sum()), case.gradients((case.log_probs() * weights).sum()), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.02


def test_log_probabilities_of_nothing_are_zero_with_zero_gradients():
    case = Case(B)
    found = losses.chunked_log_probs(
        case.states_RTD, OutputHead(case.head_VD), torch.full_like(case.labels_RT, IGNORED)
    )
    assert not found.any()
    assert not any(gradient.any() for gradient in case.gradients(found.sum()))


# --- pairs ----------------------------------------------------------------------------------------------------------


def trl_self(**options):
    """What the losses of trl's trainers read of themselves."""
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
    )
    metrics = {"train": defaultdict(list)}
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics=metrics,
        **options,
    )


def trl_preference(loss_type, log_probs_RT, labels_RT, reference_B2, beta, label_smoothing=0.0):
    """trl's loss of a batch: chosen rows first, then rejected ones; and what it recorded."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    itself = trl_self(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing,
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    scored_RT = labels_RT != IGNORED
    first = torch.zeros(len(labels_RT), 1, dtype=torch.bool)  # trl's masks are of tokens, ours of what follows them
    inputs = {
        "input_ids": torch.zeros(len(labels_RT), T + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(labels_RT), T + 1),
        "completion_mask": torch.cat([first, scored_RT], dim=1).long(),
        "ref_chosen_logps": reference_B2[:, 0],
        "ref_rejected_logps": reference_B2[:, 1],
    }
    nothing = torch.zeros_like(log_probs_RT)
    outputs = SimpleNamespace(log_probs=log_probs_RT, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    loss = trainer._compute_loss(itself, lambda **options: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in itself._metrics["train"].items()}


def pair_batch(case, reference_B2):
    half = len(case.tokens_RT) // 2
    extras = {
        "rejected_tokens_BT": case.tokens_RT[half:],
        "rejected_labels_BT": case.labels_RT[half:],
        "reference_B2": reference_B2,
    }
    return TensorBatch(case.tokens_RT[:half], case.labels_RT[:half], None, extras)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("objective", "loss_type"),
    [
        (Preference(beta=0.3), "sigmoid"),
        (Preference(beta=2.0, normalize_lengths=True), "sigmoid_norm"),
        (Preference("ipo", beta=0.2, normalize_lengths=True), "ipo"),
    ],
)
def test_preferences_equal_those_of_trl(objective, loss_type):
    case = Case(2 * B)
    sums_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    lengths_B2 = (case.labels_RT != IGNORED).sum(-1).view(2, B).T
    reference_B2 = sums_B2 / lengths_B2 if objective.normalize_lengths else sums_B2
    ours = objectives.preference_loss(objective, case.hidden, OutputHead(case.head_VD), pair_batch(case, reference_B2))
    theirs, measured = trl_preference(loss_type, case.log_probs(), case.labels_RT, sums_B2, objective.beta)
    case.compare(ours.nats / B, theirs)
    if not objective.normalize_lengths:  # trl's rewards are those of sums in any case
        names = {
            "accuracy": "accuracies",
            "margin": "margins",
            "chosen_reward": "chosen",
            "rejected_reward": "rejected",
        }
        for name, their_name in names.items():
            assert ours.measures[name].item() / B == pytest.approx(measured[f"rewards/{their_name}"], abs=1e-5)


@pytest.mark.medium
def test_label_smoothing_equals_that_of_trl():
    """trl smooths in its loss for sorted differences, which for a single pair is that of the pair."""
    case = Case(2 * B)
    reference_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    objective = Preference(beta=0.3, label_smoothing=0.2)
    ours = objectives.preference_loss(objective, case.hidden, OutputHead(case.head_VD), pair_batch(case, reference_B2))
    pairs = [torch.tensor([pair, B + pair]) for pair in range(B)]
    theirs = [
        trl_preference("aot", case.log_probs()[p], case.labels_RT[p], reference_B2[p[:1]], 0.3, label_smoothing=0.2)[0]
        for p in pairs
    ]
    case.compare(ours.nats, torch.stack(theirs).sum())


def test_ipo_of_sums_is_the_square_of_the_paper():
    """(h - 1 / (2 tau))^2, h being the difference of log-ratios: equation 17 of arXiv:2310.12036."""
    case = Case(2 * B)
    reference_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    ours = objectives.preference_loss(
        Preference("ipo", 0.5), case.hidden, OutputHead(case.head_VD), pair_batch(case, reference_B2)
    )
    sums_2B = case.log_probs().sum(-1).view(2, B)
    h_B = (sums_2B[0] - sums_2B[1]) - (reference_B2[:, 0] - reference_B2[:, 1])
    case.compare(ours.nats / B, ((h_B - 1.0) ** 2).mean())


# --- policies ---------------------------------------------------------------------------------------------------------


def trl_policy(objective, log_probs_RT, labels_RT, extras):
    """trl's loss of sampled answers, and what it recorded."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    itself = trl_self(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        beta=objective.kl_weight, epsilon_low=objective.clip, epsilon_high=objective.clip, use_vllm=False,
        loss_type={"answer": "grpo", "token": "bnpo"}[objective.normalization], _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        _get_per_token_logps_and_entropies=lambda *a, **o: (log_probs_RT, torch.zeros_like(log_probs_RT), None),
    )  # fmt: skip
    rows = len(labels_RT)
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 1),
        "completion_ids": labels_RT,
        "completion_mask": (labels_RT != IGNORED).long(),
        "advantages": extras["advantages_B"],
        "old_per_token_logps": extras["old_log_probs_BT"],
        "ref_per_token_logps": extras.get("reference_log_probs_BT"),
    }
    loss = trainer._compute_loss(itself, None, inputs)
    return loss, {name: values[-1] for name, values in itself._metrics["train"].items()}


@pytest.mark.medium
@pytest.mark.parametrize("normalization", ["answer", "token"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_policy_gradients_equal_those_of_trl(normalization, kl_weight):
    objective = PolicyGradient(clip=0.2, kl_weight=kl_weight, normalization=normalization)
    case = Case(B)
    now_BT = case.log_probs().detach()
    extras = {"advantages_B": case.random(B), "old_log_probs_BT": now_BT + 0.3 * case.random(B, T)}
    if kl_weight:
        extras["reference_log_probs_BT"] = now_BT + 0.5 * case.random(B, T)
    batch = TensorBatch(case.tokens_RT, case.labels_RT, None, extras)
    ours = objectives.policy_loss(objective, case.hidden, OutputHead(case.head_VD), batch)
    targets = B if normalization == "answer" else int((case.labels_RT != IGNORED).sum())
    theirs, measured = trl_policy(objective, case.log_probs(), case.labels_RT, extras)
    case.compare(ours.nats / targets, theirs)
    assert ("kl" in ours.measures) == bool(kl_weight)
    if normalization == "token":  # trl's figures are means over tokens
        assert measured["clip_ratio/region_mean"] > 0
        assert ours.measures["clipped"].item() / targets == pytest.approx(measured["clip_ratio/region_mean"], abs=1e-6)
        if kl_weight:
            assert ours.measures["kl"].item() / targets == pytest.approx(measured["kl"], abs=1e-5)


# --- in a step --------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
)  # fmt: skip


def host_batch(objective, rows=6):
    """Rows as the data of either kind gives them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (2 * rows, T), generator=generator).numpy().astype(np.int32)
    wanted = labels(generator, 2 * rows).numpy().astype(np.int32)
    numbers = np.random.Generator(np.random.Philox(key=2))
    if isinstance(objective, Preference):
        extras = {
            "rejected_tokens_BT": tokens[rows:],
            "rejected_labels_BT": wanted[rows:],
            "reference_B2": numbers.normal(-20, 3, (rows, 2)).astype(np.float32),
        }
    else:
        extras = {
            "advantages_B": numbers.normal(size=rows).astype(np.float32),
            "old_log_probs_BT": numbers.normal(-3.7, 0.2, (rows, T)).astype(np.float32),
            "reference_log_probs_BT": numbers.normal(-3.7, 0.2, (rows, T)).astype(np.float32),
        }
    by_row = not (isinstance(objective, PolicyGradient) and objective.normalization == "token")
    return Batch(tokens[:rows], wanted[:rows], None, np.arange(rows), extras, by_row)


@pytest.mark.parametrize(
    "objective",
    [Preference(), Preference("ipo"), PolicyGradient(kl_weight=0.1), PolicyGradient(normalization="token")],
)
def test_micro_batches_make_the_update_of_the_whole_batch(objective):
    results = []
    for size in (6, 4, 1):
        step = build_train_step(MODEL, seed=3, objective=objective, precision="fp32", device="cpu")
        metrics = step.step(split(host_batch(objective), size), 1e-3)
        values = {name: np.frombuffer(array.data, np.float32) for name, array in step.weights().items()}
        results.append((metrics, values))
    whole, weights = results[0]
    for metrics, values in results[1:]:
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-5)
        assert metrics.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert metrics.measures == pytest.approx(whole.measures, rel=1e-4, abs=1e-6)
        for name, value in values.items():
            np.testing.assert_allclose(value, weights[name], atol=2e-5, err_msg=name)


def test_a_step_scores_what_a_batch_holds():
    step = build_train_step(MODEL, seed=3, precision="fp32", device="cpu")
    batch = host_batch(PolicyGradient())
    found_BT = step.log_probs(batch)
    logits_BTV = torch.from_numpy(step.runner().forward(batch.tokens_BT)["logits"])
    expected_BT = logits_BTV.log_softmax(-1).gather(
        -1, torch.from_numpy(batch.labels_BT).long().clamp(min=0)[..., None]
    )
    scored_BT = batch.labels_BT != IGNORED
    np.testing.assert_allclose(found_BT[scored_BT], expected_BT[..., 0].numpy()[scored_BT], atol=1e-5)
    assert not found_BT[~scored_BT].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preference(beta=0), "beta=0 must be above 0"),
        (lambda: Preference(label_smoothing=0.5), "label_smoothing=0.5 must be"),
        (lambda: Preference("ipo", label_smoothing=0.1), "for form=dpo alone"),
        (lambda: PolicyGradient(clip=1.5), "clip=1.5 must be"),
        (lambda: PolicyGradient(kl_weight=-1), "kl_weight=-1 must not be negative"),
    ],
)
def test_objectives_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
