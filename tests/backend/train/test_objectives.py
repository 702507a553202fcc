"""Objectives of both backends: preference and policy losses against trl's own code, with gradients; in a whole step;
and MLX's updates held to PyTorch's.

trl's losses are methods of its trainers. They are called here as they are, on a stand-in for the trainer that holds the
options they read, and on log-probabilities that PyTorch's log_softmax gave for the same hidden states and head.
"""

import dataclasses
import functools
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llamita.backend.adamw import AdamWSettings
from llamita.backend.objectives import Classification, PolicyGradient, Preference
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.training.trainer import split as split_rows
from tests.backend.frameworks import Mlx, Torch
from tests.backend.models import IGNORE_INDEX
from tests.backend.steps import CONFIG, batch, largest_difference, same, split

B, T, D, V = 5, 9, 16, 40


def labels(generator, rows, shortest=1):
    """Answers of unequal length behind prompts of unequal length."""
    labels_BT = torch.full((rows, T), IGNORE_INDEX)
    for row in labels_BT:
        start = int(torch.randint(3, (1,), generator=generator))
        end = start + int(torch.randint(shortest, T - start, (1,), generator=generator))
        row[start:end] = torch.randint(V, (end - start,), generator=generator)
    return labels_BT


class Case:
    """Hidden states that the tokens stand for (each token is a place in a table), a head, random references."""

    def __init__(self, framework, rows):
        self.framework = framework
        self.generator = torch.Generator().manual_seed(0)
        self.states_RTD = self.random(rows, T, D).requires_grad_()
        self.head_VD = self.random(V, D).requires_grad_()
        self.tokens_RT = torch.arange(rows)[:, None].expand(rows, T)
        self.labels_RT = labels(self.generator, rows)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def log_probs(self):
        """By PyTorch, of all rows, every logit held."""
        table_RTV = (self.states_RTD @ self.head_VD.mT).log_softmax(-1)
        found_RT = table_RTV.gather(-1, self.labels_RT.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.labels_RT == IGNORE_INDEX, 0.0, found_RT)

    def batch(self, rows, extras):
        """Some of the rows in the framework's own arrays."""
        tokens_BT, labels_BT = (self.framework.array(x[rows].numpy()) for x in (self.tokens_RT, self.labels_RT))
        extras = {name: self.framework.array(values.detach().numpy()) for name, values in extras.items()}
        return self.framework.objectives.TensorBatch(tokens_BT, labels_BT, None, extras)

    def check(self, loss, targets, batch, theirs):
        """The framework's loss, per target, and its gradients beside theirs; gives the measures, per target."""

        def output(states_RTD, head_VD):
            head = self.framework.head.OutputHead(head_VD)
            return loss(lambda tokens_BT, segments_BT=None: states_RTD[tokens_BT[:, 0]], head, batch)

        given = [self.framework.array(x.detach().numpy()) for x in (self.states_RTD, self.head_VD)]
        found = output(*given)
        close(self.framework.numbers(found.nats) / targets, theirs)
        expected = torch.autograd.grad(theirs, (self.states_RTD, self.head_VD), retain_graph=True)
        ours = self.framework.gradients(lambda *leaves: output(*leaves).nats / targets, *given)
        for one, other in zip(ours, expected, strict=True):
            close(self.framework.numbers(one), other)
        return {name: float(self.framework.numbers(value)) / targets for name, value in found.measures.items()}


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().double().numpy(), rtol=1e-5, atol=1e-5)


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
    scored_RT = labels_RT != IGNORE_INDEX
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


def check_pairs(case, objective, reference_B2, theirs):
    """Measures of a batch of the first half of the rows, each beside the one of the second half."""
    half = len(case.tokens_RT) // 2
    extras = {
        "rejected_tokens_BT": case.tokens_RT[half:],
        "rejected_labels_BT": case.labels_RT[half:],
        "reference_B2": reference_B2,
    }
    loss = functools.partial(case.framework.objectives.preference_loss, objective)
    return case.check(loss, half, case.batch(slice(half), extras), theirs)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("objective", "loss_type"),
    [
        (Preference(beta=0.3), "sigmoid"),
        (Preference(beta=2.0, normalize_lengths=True), "sigmoid_norm"),
        (Preference("ipo", beta=0.2, normalize_lengths=True), "ipo"),
    ],
)
def test_preferences_equal_those_of_trl(framework, objective, loss_type):
    case = Case(framework, 2 * B)
    sums_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    lengths_B2 = (case.labels_RT != IGNORE_INDEX).sum(-1).view(2, B).T
    reference_B2 = sums_B2 / lengths_B2 if objective.normalize_lengths else sums_B2
    theirs, measured = trl_preference(loss_type, case.log_probs(), case.labels_RT, sums_B2, objective.beta)
    measures = check_pairs(case, objective, reference_B2, theirs)
    if not objective.normalize_lengths:  # trl's rewards are those of sums in any case
        names = {
            "accuracy": "accuracies",
            "margin": "margins",
            "chosen_reward": "chosen",
            "rejected_reward": "rejected",
        }
        for name, their_name in names.items():
            assert measures[name] == pytest.approx(measured[f"rewards/{their_name}"], abs=1e-5)


@pytest.mark.medium
def test_label_smoothing_equals_that_of_trl(framework):
    """trl smooths in its loss for sorted differences, which for a single pair is that of the pair."""
    case = Case(framework, 2 * B)
    reference_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    objective = Preference(beta=0.3, label_smoothing=0.2)
    pairs = [torch.tensor([pair, B + pair]) for pair in range(B)]
    theirs = [
        trl_preference("aot", case.log_probs()[p], case.labels_RT[p], reference_B2[p[:1]], 0.3, label_smoothing=0.2)[0]
        for p in pairs
    ]
    check_pairs(case, objective, reference_B2, torch.stack(theirs).mean())


def test_ipo_of_sums_is_the_square_of_the_paper(framework):
    """(h - 1 / (2 tau))^2, h being the difference of log-ratios: equation 17 of arXiv:2310.12036."""
    case = Case(framework, 2 * B)
    reference_B2 = case.log_probs().sum(-1).view(2, B).T.detach() + case.random(B, 2)
    sums_2B = case.log_probs().sum(-1).view(2, B)
    h_B = (sums_2B[0] - sums_2B[1]) - (reference_B2[:, 0] - reference_B2[:, 1])
    check_pairs(case, Preference("ipo", 0.5), reference_B2, ((h_B - 1.0) ** 2).mean())


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
        "completion_mask": (labels_RT != IGNORE_INDEX).long(),
        "advantages": extras["advantages_B"],
        "old_per_token_logps": extras["old_log_probs_BT"],
        "ref_per_token_logps": extras.get("reference_log_probs_BT"),
    }
    loss = trainer._compute_loss(itself, None, inputs)
    return loss, {name: values[-1] for name, values in itself._metrics["train"].items()}


@pytest.mark.medium
@pytest.mark.parametrize("normalization", ["answer", "token"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_policy_gradients_equal_those_of_trl(framework, normalization, kl_weight):
    objective = PolicyGradient(clip=0.2, kl_weight=kl_weight, normalization=normalization)
    case = Case(framework, B)
    now_BT = case.log_probs().detach()
    extras = {"advantages_B": case.random(B), "old_log_probs_BT": now_BT + 0.3 * case.random(B, T)}
    if kl_weight:
        extras["reference_log_probs_BT"] = now_BT + 0.5 * case.random(B, T)
    targets = B if normalization == "answer" else int((case.labels_RT != IGNORE_INDEX).sum())
    theirs, measured = trl_policy(objective, case.log_probs(), case.labels_RT, extras)
    loss = functools.partial(framework.objectives.policy_loss, objective)
    measures = case.check(loss, targets, case.batch(slice(None), extras), theirs)
    assert ("kl" in measures) == bool(kl_weight)
    if normalization == "token":  # trl's figures are means over tokens
        assert measured["clip_ratio/region_mean"] > 0
        assert measures["clipped"] == pytest.approx(measured["clip_ratio/region_mean"], abs=1e-6)
        if kl_weight:
            assert measures["kl"] == pytest.approx(measured["kl"], abs=1e-5)


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
def test_micro_batches_make_the_update_of_the_whole_batch(framework, objective):
    results = []
    for size in (6, 4, 1):
        step = framework.train_step(MODEL, objective=objective)
        metrics = step.step(split_rows(host_batch(objective), size), 1e-3)
        values = {name: np.frombuffer(array.data, np.float32) for name, array in step.weights().items()}
        results.append((metrics, values))
    whole, weights = results[0]
    for metrics, values in results[1:]:
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-5)
        assert metrics.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
        assert metrics.measures == pytest.approx(whole.measures, rel=1e-4, abs=1e-6)
        for name, value in values.items():
            np.testing.assert_allclose(value, weights[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("frozen", [False, True], ids=["step", "scorer"])
def test_a_model_scores_what_a_batch_holds(framework, frozen):
    step = framework.train_step(MODEL)
    scorer = step
    if frozen:
        scorer = framework.backend.build_scorer(MODEL, step.weights(), precision="fp32", device="cpu")
    data = host_batch(PolicyGradient())
    logits_BTV = torch.from_numpy(step.runner().forward(data.tokens_BT)["logits"])
    expected_BT = logits_BTV.log_softmax(-1).gather(-1, torch.from_numpy(data.labels_BT).long().clamp(min=0)[..., None])
    scored_BT = data.labels_BT != IGNORE_INDEX
    found_BT = scorer.log_probs(data)
    assert found_BT.dtype == np.float32
    np.testing.assert_allclose(found_BT[scored_BT], expected_BT[..., 0].numpy()[scored_BT], atol=1e-5)
    assert not found_BT[~scored_BT].any()
    expected_MV = (logits_BTV[torch.from_numpy(scored_BT)] / 2).log_softmax(-1)
    np.testing.assert_allclose(scorer.distributions(data, 2.0), expected_MV, atol=1e-5)


# --- updates ----------------------------------------------------------------------------------------------------

LABELS = dataclasses.replace(CONFIG, num_labels=3)
WEIGHTED = Classification(class_weights=(0.5, 1.0, 3.0))


def texts(seed=0, rows=8, T=12) -> Batch:
    """Texts of unequal length, each with its label at the last token."""
    random = np.random.default_rng(seed)
    labels = np.full((rows, T), IGNORE_INDEX, dtype=np.int32)
    labels[np.arange(rows), random.integers(2, T, rows)] = random.integers(0, 3, rows)
    tokens = random.integers(0, CONFIG.vocab_size, (rows, T), dtype=np.int32)
    return Batch(tokens, labels, None, np.arange(rows, dtype=np.int64))


@pytest.mark.parametrize("objective", [Classification(), WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_classification_is_pytorch_s(objective, precision):
    options = {"max_grad_norm": 1.0} | {
        "objective": objective,
        "precision": precision,
        "optimizer": AdamWSettings(epsilon=1e-6),
    }
    ours, theirs = (each.train_step(LABELS, **options) for each in (Mlx(), Torch()))
    rough, close = (1e-5, 1e-4) if precision == "fp32" else (2e-2, np.inf)
    for i in range(6):
        data = split(texts(i), 3)
        a, b = ours.step(data, 1e-2), theirs.step(data, 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=rough)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2 * rough)
        assert a.targets == b.targets == 8
        if precision == "fp32":
            assert a.measures == b.measures
    a, b = ours.evaluate(texts(9)), theirs.evaluate(texts(9))
    assert a.nats == pytest.approx(b.nats, rel=5 * rough)
    assert a.targets == b.targets
    assert a.measures.keys() == b.measures.keys() == {"accuracy"}
    assert largest_difference(ours.weights(), theirs.weights()) < close


def test_dropout_before_a_classifier_s_head_acts_while_training_alone(framework):
    step = framework.train_step(LABELS, objective=Classification(dropout=0.5))
    assert len({step.step([texts()], 0.0).loss for _ in range(3)}) == 3
    assert step.evaluate(texts()) == step.evaluate(texts())
    assert step.evaluate(texts()) == framework.train_step(LABELS, objective=Classification()).evaluate(texts())


def trainable(name):
    return name.startswith("model.layers.1.")


def test_only_what_is_trainable_is_trained(framework):
    """The last block alone; its gradients are those of the whole model's."""
    options = {"trainable": trainable, "max_grad_norm": 1.0}
    step, whole = framework.train_step(CONFIG, **options), framework.train_step(CONFIG)
    fresh = {name: bytes(array.data) for name, array in step.weights().items()}
    (_, found), (_, expected) = (framework.update_gradients(each, [batch()]) for each in (step, whole))
    assert found.keys() == {name for name in fresh if trainable(name)}
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-7)
    for i in range(3):
        step.step([batch(seed=i)], 1e-2)
    for name, array in step.weights().items():
        assert (bytes(array.data) != fresh[name]) == trainable(name), name
    with pytest.raises(ValueError, match="no parameter of the model is to be trained"):
        framework.train_step(CONFIG, trainable=lambda name: False)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_what_is_trained_of_a_model_is_trained_as_by_pytorch(compile):
    """What is loaded later counts, though nothing of it is trained."""
    options = {"trainable": trainable, "max_grad_norm": 1.0}
    ours, theirs = Mlx().train_step(CONFIG, compile=compile, **options), Torch().train_step(CONFIG, **options)
    assert set(ours.state()) == set(theirs.state())
    for i in range(3):
        a, b = ours.step([batch(seed=i)], 1e-2), theirs.step([batch(seed=i)], 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    assert largest_difference(ours.weights(), theirs.weights()) < 1e-4
    other = Torch().train_step(CONFIG, seed=8)
    for step in (ours, theirs):
        step.load_state(other.weights(), step.state())
    a, b = ours.step([batch(seed=7)], 1e-2), theirs.step([batch(seed=7)], 1e-2)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_training_goes_on_from_given_arrays(framework):
    arrays = framework.train_step(CONFIG, seed=8).weights()
    assert same(framework.train_step(CONFIG, arrays).weights(), arrays)


def answers(objective, seed=0, rows=6, T=10) -> Batch:
    """Pairs of answers for a preference, or sampled answers with advantages, of which some are clipped."""
    random = np.random.default_rng(seed)

    def drawn():
        block = random.integers(0, CONFIG.vocab_size, (rows, T + 1), dtype=np.int32)
        labels = np.where(np.arange(T) < random.integers(1, 6, (rows, 1)), IGNORE_INDEX, block[:, 1:])
        return block[:, :-1], labels.astype(np.int32)

    (tokens, labels), (other_tokens, other_labels) = drawn(), drawn()
    if isinstance(objective, Preference):
        reference = (-30 + 3 * random.standard_normal((rows, 2))).astype(np.float32)
        extras = {"rejected_tokens_BT": other_tokens, "rejected_labels_BT": other_labels, "reference_B2": reference}
    else:
        old, further = (-4 + random.standard_normal((2, rows, T))).astype(np.float32)
        extras = {"advantages_B": random.standard_normal(rows).astype(np.float32)}
        extras |= {"old_log_probs_BT": old, "reference_log_probs_BT": further}
    return Batch(tokens, labels, None, np.arange(rows, dtype=np.int64), extras, row_is_target=True)


@pytest.mark.parametrize(
    "objective",
    [
        Preference(),
        Preference(beta=0.5, label_smoothing=0.2, normalize_lengths=True),
        Preference(form="ipo"),
        PolicyGradient(),
        PolicyGradient(clip=0.5, kl_weight=0.1, normalization="token"),
    ],
    ids=["dpo", "dpo by length", "ipo", "policy", "policy held to a reference"],
)
def test_answers_are_learned_from_as_in_pytorch(objective):
    options = {"max_grad_norm": 1.0} | {"objective": objective, "optimizer": AdamWSettings(epsilon=1e-6)}
    ours, theirs = (each.train_step(CONFIG, **options) for each in (Mlx(), Torch()))
    for i in range(4):
        data = [answers(objective, i).rows(slice(0, 2)), answers(objective, i).rows(slice(2, 6))]
        a, b = ours.step(data, 3e-3), theirs.step(data, 3e-3)
        assert a.loss == pytest.approx(b.loss, rel=1e-4, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.measures.keys() == b.measures.keys()
        assert dict(a.measures) == pytest.approx(dict(b.measures), rel=1e-4, abs=1e-4)
    assert ours.evaluate(answers(objective, 9)).nats == pytest.approx(
        theirs.evaluate(answers(objective, 9)).nats, rel=1e-4, abs=1e-4
    )
    assert largest_difference(ours.weights(), theirs.weights()) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probabilities_are_pytorch_s(precision):
    data = batch(segments=True)
    ours, theirs = (each.train_step(CONFIG, precision=precision).log_probs(data) for each in (Mlx(), Torch()))
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 if precision == "fp32" else 0.1)
    assert ((ours == 0) == (data.labels_BT == IGNORE_INDEX)).all()
