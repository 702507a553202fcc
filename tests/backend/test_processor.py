"""The type that a model runs in where nobody says: the file's own, unless this processor multiplies it slowly."""

import pytest

from llamita.backend import processor
from llamita.backend.opening import open_model
from llamita.backend.torch.infer.runner import load_runner
from llamita.backend.torch.train.scorer import choose
from llamita.cli.main import main
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from tests.backend.models import perturbed, save

CONFIG = ModelConfig(64, 32, 48, 1, 2, 1, 64)
INTEL_2014 = frozenset({"avx2", "fma", "f16c"})
ZEN_4 = INTEL_2014 | {"avx512f", "avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"amx_bf16", "avx512_fp16"}


@pytest.fixture
def flags(monkeypatch):
    return lambda found: monkeypatch.setattr(processor, "cpu_flags", lambda: found)


def stored_as(dtype, directory):
    arrays = perturbed(CONFIG)
    if dtype == "BF16":
        arrays = {
            name: HostArray.from_bf16_bits((array.to_numpy().view("<u4") >> 16).astype("<u2"))
            for name, array in arrays.items()
        }
    elif dtype == "F16":
        arrays = {name: HostArray.from_numpy(array.to_numpy().astype("<f2")) for name, array in arrays.items()}
    return save(CONFIG, arrays, directory / dtype, dtype)


@pytest.mark.parametrize(
    ("found", "dtype", "chosen"),
    [
        (INTEL_2014, "F32", "float32"),
        (INTEL_2014, "BF16", "float32"),
        (INTEL_2014, "F16", "float32"),
        (ZEN_4, "BF16", "bfloat16"),
        (ZEN_4, "F16", "float32"),
        (SAPPHIRE_RAPIDS, "F16", "float16"),
        (frozenset(), "BF16", "float32"),  # no list of flags, as on a Mac
    ],
)
def test_auto_is_a_type_that_the_processor_multiplies(tmp_path, flags, capsys, monkeypatch, found, dtype, chosen):
    flags(found)
    if dtype != "F32":  # kernels for each type are compiled by their own tests
        monkeypatch.setenv("LLAMITA_KERNELS", "off")
    directory = stored_as(dtype, tmp_path)
    runner = load_runner(directory)
    assert runner.dtype_name == chosen
    own = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]
    reason = "the file's own" if own == chosen else f"the file has {own}, for which this processor has no instructions"
    assert runner.dtype_reason == reason
    assert main(["generate", str(directory), "--prompt-tokens", "1", "2", "--max-tokens", "2", "--statistics"]) == 0
    assert f" GB/s read; in {chosen} ({reason}), {runner.kernels}; " in capsys.readouterr().err
    assert main(["info", str(directory)]) == 0
    assert f"in {chosen} ({reason[:20]}" in " ".join(capsys.readouterr().out.split())


def test_what_is_asked_for_is_done(tmp_path, flags):
    flags(INTEL_2014)
    directory = stored_as("BF16", tmp_path)
    asked = load_runner(directory, "bfloat16")
    assert (asked.dtype_name, asked.dtype_reason) == ("bfloat16", "asked for")
    assert open_model(directory).dtype == "bfloat16"  # on a GPU


def test_training_in_auto_is_bf16_only_where_it_is_multiplied(flags):
    for found, precision in ((INTEL_2014, "fp32"), (ZEN_4, "bf16"), (SAPPHIRE_RAPIDS, "bf16")):
        flags(found)
        assert choose("cpu", "auto", 0) == ("cpu", precision)
