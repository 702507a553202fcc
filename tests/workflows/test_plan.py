"""`llamita plan`: rows that fit, advice that holds, time and disk by hand, what is printed and what is refused."""

import json
from dataclasses import replace

import pytest

from llamita.cli.main import main
from llamita.model.presets import preset
from llamita.model.scaling import at_depth
from llamita.model.sizes import flops_per_token
from llamita.workflows.plan import PlanConfig, make_plan


def unused():
    raise AssertionError("this was not to be measured")


def planned(config, **options):
    return make_plan(config, PlanConfig(**options), free_memory=unused, peak_flops=unused)


def test_the_most_rows_that_fit_fit_and_one_more_does_not():
    config = preset("stories-110m")
    plan = planned(config, batch_size=4096, gpu_memory=20)
    assert plan.fits
    assert plan.memory.total <= 19e9
    exact = next(rows for rows in range(1, 4097) if -(-4096 // rows) == plan.micro_batches)
    assert exact == plan.micro_batch_size
    more = planned(config, batch_size=4096, gpu_memory=20, micro_batch_size=2 * plan.micro_batch_size)
    assert not more.fits


def test_advice_is_true():
    """What is said to fit fits, in a plan of its own."""
    config = preset("llama-2-7b")
    plan = planned(config, gpus=8, gpu="h100", batch_size=64)
    assert not plan.fits
    assert plan.micro_batch_size == 0
    assert any("--parallel fsdp" in text and "which fits" in text for text in plan.advice)
    assert planned(config, gpus=8, gpu="h100", batch_size=64, parallel="fsdp", recompute="all").fits
    assert not any("recompute all" in text and "which fits" in text for text in plan.advice)
    assert not planned(config, gpus=8, gpu="h100", batch_size=64, recompute="all").fits


def test_a_vocabulary_that_the_cards_do_not_divide_is_planned_as_it_is_trained():
    """Training cuts it unevenly (test_distributed.py trains one of 61 tokens); the largest part counts."""
    even, odd = (planned(preset("tiny", vocab_size=size), gpus=2, tensor_parallel=2) for size in (32_000, 31_999))
    assert even.memory.weights == odd.memory.weights
    assert even.memory.optimizer == odd.memory.optimizer
    assert planned(preset("tiny", vocab_size=31_998), gpus=2, tensor_parallel=2).memory.weights < odd.memory.weights


def test_a_norm_over_all_heads_is_refused_as_in_training():
    config = replace(preset("tiny"), query_key_norm=True, norm_all_heads=True, norm_placement="after")
    assert planned(config, gpus=2).memory.total
    with pytest.raises(ValueError, match="a norm over all heads at once is not divided between processes"):
        planned(config, gpus=2, tensor_parallel=2)


def test_time_and_disk_by_hand():
    config = preset("stories-15m")
    plan = planned(config, tokens=1e9, batch_size=64, sequence_length=256, gpu="a100-40gb", utilization=0.5)
    flops = flops_per_token(config, 256)
    assert plan.tokens_per_second == pytest.approx(0.5 * 312e12 / flops)
    assert plan.seconds == pytest.approx(1e9 * flops / (0.5 * 312e12))
    assert plan.steps == -(-(10**9) // (64 * 256))
    assert plan.disk.tokens == 2 * 10**9
    assert plan.disk.checkpoint == 12 * 15_191_712
    assert plan.disk.checkpoints == 3 * plan.disk.checkpoint
    given = planned(config, tokens=1e6, tokens_per_second=500)
    assert given.seconds == 2000
    again = planned(config, tokens=1e9, batch_size=64, sequence_length=256, gpu="a100-40gb", recompute="all")
    assert 1 < again.flops / plan.flops < 4 / 3


def test_a_processor_is_asked_for_its_memory_and_its_speed():
    config = preset("tiny")
    plan = make_plan(
        config, PlanConfig(device="cpu", utilization=0.5), free_memory=lambda: 10**9, peak_flops=lambda: 1e11
    )
    assert plan.device_memory == 10**9
    assert plan.tokens_per_second == pytest.approx(0.5e11 / flops_per_token(config, 256))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 3, "tensor_parallel": 2}, "gpus=3 must be a multiple of tensor_parallel=2"),
        ({"gpus": 5, "tensor_parallel": 5}, "tensor_parallel=5 must divide num_attention_heads=4"),
        ({"gpus": 3}, "batch_size=16 must be a multiple of the 3 replicas"),
        ({"gpu": "abacus"}, "no graphics card named 'abacus'"),
        ({"sequence_length": 512}, "sequence_length=512 is longer than the model's 256"),
        ({"utilization": 2}, "utilization=2 must lie between 0 and 1"),
        ({"device": "cpu", "gpus": 2}, "--device cpu trains in one process"),
        ({"recompute": 9}, "recompute=9 must lie between 0 and the model's 3 blocks"),
        ({"micro_batch_size": 17}, "micro_batch_size=17 is above the 16 rows"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        planned(preset("tiny"), **options)


def test_the_command_prints_what_json_holds(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    command = ["plan", "stories-110m", "--gpu", "a100-40gb", "--tokens", "2e9", "--batch-size", "256"]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 109_529_856
    assert facts["memory"]["total"] < facts["device_memory"] == 38 * 10**9
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "109,529,856" in shown
    assert f"give --micro-batch-size {facts['micro_batch_size']}" in shown
    assert main(["plan", "llama-2-7b", "--gpu-memory", "24"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_depth_is_planned_as_it_is_trained(capsys):
    assert main(["plan", "--depth", "12", "--gpu", "h100", "--json"]) == 0
    facts, scaled = json.loads(capsys.readouterr().out), at_depth(12, 32_000)
    assert (facts["batch_size"], facts["steps"], facts["tokens"]) == (scaled.batch_size, scaled.steps, scaled.tokens)
    assert facts["depth"]["learning_rate"] == scaled.learning_rate
    assert main(["plan", "--depths"]) == 0
    assert f"{scaled.steps:,}" in capsys.readouterr().out
    assert main(["plan"]) == 2
    assert main(["plan", "tiny", "--depth", "3"]) == 2
    assert "give either a model" in capsys.readouterr().err
