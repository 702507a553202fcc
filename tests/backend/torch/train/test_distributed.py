"""Updates by several processes against those of one: losses, gradients, weights, moments, evaluation, parts on disk."""

import os
from dataclasses import replace

import numpy as np
import pytest

from llamita.backend.group import ParallelSettings, share
from llamita.backend.objectives import Classification, NextToken, Preference
from llamita.backend.torch.train.step import build_train_step
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from tests.backend.steps import CONFIG, batch, largest_difference
from tests.together import run_together

UNTIED = replace(CONFIG, tie_word_embeddings=False, query_key_norm=True)
OLMO = replace(CONFIG, query_key_norm=True, norm_all_heads=True, norm_placement="after", tie_word_embeddings=False)
LABELS = replace(CONFIG, tie_word_embeddings=False, num_labels=3)
FORMS = {
    "ddp of 2": (2, ParallelSettings()),
    "fsdp of 2": (2, ParallelSettings("fsdp")),
    "team of 2": (2, ParallelSettings("fsdp", 2)),
    "fsdp of 4": (4, ParallelSettings("fsdp")),
    "2 teams of 2": (4, ParallelSettings("fsdp", 2)),
}


def objective_batch(objective, seed):
    """A batch of 8 rows for an objective."""
    whole = batch(rows=8, seed=seed, unequal=not isinstance(objective, Preference))
    if isinstance(objective, Classification):
        labels = np.full_like(whole.labels_BT, -100)
        labels[np.arange(8), np.arange(8) + 3] = np.arange(8) % 3
        return replace(whole, labels_BT=labels, row_is_target=True)
    if isinstance(objective, Preference):
        other = batch(rows=8, seed=seed + 100, unequal=False)
        extras = {
            "rejected_tokens_BT": other.tokens_BT,
            "rejected_labels_BT": other.labels_BT,
            "reference_B2": np.full((8, 2), -40, dtype=np.float32),
        }
        return replace(whole, extras=extras, row_is_target=True)
    return whole


def train(parallel, config, objective=NextToken(), adapter=None, updates=3):  # noqa: B008 - it is frozen
    """Trains, evaluates and looks closer; what is found is the same for any number of processes."""
    step = build_train_step(
        config, objective=objective, adapter=adapter, max_grad_norm=0.5, precision="fp32", parallel=parallel
    )
    losses, norms, measures = [], [], []
    for t in range(updates):
        rows = share(objective_batch(objective, t), step.group)
        found = step.step([rows.rows(slice(0, 1)), rows.rows(slice(1, None))], 1e-2)
        losses.append(found.loss)
        norms.append(found.grad_norm)
        measures.append(dict(found.measures))
    held_out = objective_batch(objective, 50)
    few = held_out.rows(slice(0, 3))
    evaluation = step.evaluate(few)
    result = {
        "losses": losses,
        "norms": norms,
        "measures": [found[name] for found in measures for name in sorted(found)],
        "evaluation": [evaluation.nats, evaluation.targets, *evaluation.measures.values()],
        "grad_norms": (look := step.diagnose([held_out.rows(slice(0, 2)), held_out.rows(slice(2, 3))])).grad_norms,
        "rows": [row.loss for row in look.rows],
        "arrays": numbers(step),
    }
    if isinstance(objective, NextToken):
        result["log_probs"] = step.log_probs(few)
    return result


def assert_same(found, expected, tolerance=2e-6):
    for name, value in expected.items():
        if name in ("arrays", "grad_norms"):
            assert list(found[name]) == list(value)
            pairs = [(found[name][key], value[key]) for key in value]
        else:
            pairs = [(found[name], value)]
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=tolerance, err_msg=name)


CASES = [(CONFIG,), (UNTIED,), (LABELS, Classification()), (CONFIG, Preference())]
WITH_AN_ADAPTER = (CONFIG, NextToken(), LoraSettings(rank=2))


def train_all(parallel, cases):
    return [train(parallel, *case) for case in cases]


@pytest.fixture(scope="module")
def alone():
    """The results of one process."""
    return train_all(None, [*CASES, WITH_AN_ADAPTER])


@pytest.mark.parametrize("form", FORMS)
def test_several_processes_make_the_updates_of_one(form, alone):
    size, parallel = FORMS[form]
    cases = CASES if form in ("ddp of 2", "fsdp of 2", "2 teams of 2") else CASES[:2]
    for found, expected in zip(run_together(size, train_all, parallel, cases), alone, strict=False):
        assert_same(found, expected)


def test_an_adapter_is_trained_over_a_whole_model_in_each_process(alone):
    assert_same(run_together(2, train, ParallelSettings(), *WITH_AN_ADAPTER), alone[-1])


def numbers(step):
    """Copies of weights and state, which later updates leave alone."""
    return {name: array.to_numpy().copy() for name, array in (step.weights() | step.state()).items()}


def save_parts(parallel, directory):
    """Two updates, then parts on their way while a third changes the weights; the numbers after the two."""
    step = build_train_step(UNTIED, precision="fp32", parallel=parallel)
    for t in range(2):
        step.step([share(batch(seed=t), step.group)], 1e-2)
    expected = numbers(step)
    saving = step.save_shards(directory)
    step.step([share(batch(seed=2), step.group)], 1e-2)
    saving.result()
    return expected


def load_parts(parallel, directory):
    step = build_train_step(UNTIED, seed=1, precision="fp32", parallel=parallel)
    step.load_shards(directory)
    held = numbers(step)
    step.step([share(batch(seed=2), step.group)], 1e-2)  # they are what is trained, not copies
    after = numbers(step)
    return held, after


def test_parts_are_read_by_any_number_of_processes_as_they_were_when_saving_began(tmp_path):
    expected = run_together(4, save_parts, FORMS["2 teams of 2"][1], tmp_path)
    alone_held, alone_after = load_parts(None, tmp_path)
    for form in ("fsdp of 2", "team of 2", "ddp of 2"):
        size, parallel = FORMS[form]
        held, after = run_together(size, load_parts, parallel, tmp_path)
        for name, value in expected.items():
            np.testing.assert_array_equal(held[name], value, err_msg=f"{form}: {name}")
            np.testing.assert_array_equal(alone_held[name], value, err_msg=name)
            np.testing.assert_allclose(after[name], alone_after[name], rtol=1e-5, atol=2e-6, err_msg=f"{form}: {name}")


def refused(cases):
    """What is said against each."""
    said = []
    for config, parallel, adapter in cases:
        with pytest.raises(ValueError, match=r"tensor|divided|adapter") as error:
            build_train_step(config, adapter=adapter, precision="fp32", parallel=parallel)
        said.append(str(error.value))
    return said


def test_a_model_that_cannot_be_divided_is_refused_in_one_line():
    odd = replace(CONFIG, num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    team = ParallelSettings("fsdp", 2)
    cases = [
        (odd, team, None),
        (CONFIG, ParallelSettings("fsdp", 4), None),
        (OLMO, team, None),
        (CONFIG, ParallelSettings("fsdp"), LoraSettings(rank=2)),
    ]
    heads, processes, norm, adapter = run_together(2, refused, cases)
    assert heads == "tensor_parallel=2 must divide num_attention_heads=3"
    assert processes == "tensor_parallel=4 must divide the 2 processes of the run"
    assert norm == "a norm over all heads at once is not divided between processes; use --tensor-parallel 1"
    assert adapter == "an adapter is trained over a whole model in each process; use --parallel ddp for lora"


def lose_one():
    step = build_train_step(CONFIG, precision="fp32", parallel=ParallelSettings())
    step.step([share(batch(), step.group)], 1e-2)
    if step.group.rank == 1:
        os._exit(9)
    try:
        step.step([share(batch(), step.group)], 1e-2)
    except ConnectionError as error:
        return str(error)


def test_the_loss_of_another_process_is_told_in_one_line():
    assert run_together(2, lose_one) == "another process of this run was lost"


def fails():
    raise FileNotFoundError("not here")


def agree():
    """What a process gets of the methods of its group."""
    group = build_train_step(CONFIG, precision="fp32", parallel=ParallelSettings()).group
    rank = group.rank
    found = [group.any(rank == 1), group.any(False), group.sums([rank, 0.5]), group.gather(rank)]
    found.append(group.gather(group.first(lambda: f"from {rank}")))
    try:
        group.first(fails)
    except FileNotFoundError as error:
        found.append(group.gather(f"{rank}: {error}"))
    return found


def test_the_processes_agree():
    told = ["0: not here", "1: not here"]
    assert run_together(2, agree) == [True, False, [1.0, 1.0], [0, 1], ["from 0"] * 2, told]


def test_one_process_leaves_a_batch_whole():
    step = build_train_step(CONFIG, precision="fp32")
    whole = batch()
    assert share(whole, step.group) is whole
    assert isinstance(step.weights()["model.norm.weight"], HostArray)
    assert largest_difference(step.weights(), step.weights()) == 0
