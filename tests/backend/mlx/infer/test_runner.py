"""What MLX's runner alone has: bytes that its kernel reads, weights laid out by columns, and what it refuses."""

import dataclasses
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed here")

from llamita.backend.mlx.infer.runner import load_runner, runner_over  # noqa: E402
from llamita.backend.mlx.model.weights import quantize_arrays  # noqa: E402
from tests.backend.models import perturbed, save  # noqa: E402
from tests.backend.sessions import CONFIG  # noqa: E402


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_kernel_reads_a_scale_and_a_bias_of_its_own_for_each_stored_scale(scheme: str) -> None:
    config = dataclasses.replace(
        CONFIG, hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=96, tie_word_embeddings=True
    )
    quantized = dataclasses.replace(config, quantization=scheme)
    stored = dict(quantize_arrays(quantized, perturbed(config).items()))
    runner = runner_over(quantized, stored, "bfloat16")
    assert runner.weight_bytes > sum(len(array.data) for array in stored.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exact": True}, "exact mode is PyTorch's"),
        ({"threads": 2}, "threads=2 cannot be set: MLX"),
        ({"dtype": "int3"}, "dtype='int3' is not supported; give auto or one of float32, bfloat16, float16"),
        ({"device": "cuda"}, "device='cuda' is not one of MLX's; give auto, cpu or gpu"),
    ],
)
def test_what_mlx_does_not_have_is_refused_in_a_line(arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load_runner(save(CONFIG, perturbed(CONFIG), tmp_path / "model"), **arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(mx.is_available(mx.Device(mx.gpu)), reason="this machine has a GPU that MLX can use")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='gpu' cannot be used: this MLX has no GPU; give auto or cpu"):
        load_runner(save(CONFIG, perturbed(CONFIG), tmp_path / "model"), device="gpu")
