"""Adapters used in MLX: a directory opened as a model, several over one base in one batch; held to PyTorch and to each
one merged into a model of its own."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
import mlx.core as mx

import llamita
from llamita.backend.mlx.infer.runner import MlxRunner, load_runner
from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.weights import build_model, quantize_arrays
from llamita.backend.mlx.train.step import build_train_step
from llamita.backend.objectives import Classification
from llamita.backend.opening import OWN
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import load_runner as load_torch
from llamita.backend.torch.model.weights import to_host_arrays
from llamita.cli.main import main
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from llamita.storage import model_directory, safetensors
from llamita.storage.peft_directory import AdapterFiles, BaseModel, weights_digest
from tests.backend.torch.infer.test_exact import model_of
from tests.backend.torch.model.test_lora import CONFIG, batch, labelled, save_base
from tests.inference.test_adapters import (
    SETTINGS,
    adapter_of,
    check_that_one_batch_equals_separate_runs,
    check_that_two_threads_keep_their_adapters_apart,
    scores_of_four,
)

TOKENS = [[3, 17, 42, 9, 55, 1, 28], [4, 4, 60, 2, 33, 12, 8]]


def three(dtype=mx.float32, **changes):
    """A runner with two adapters, and by name runners over models of which one is a part."""
    source = model_of(**{"tie_word_embeddings": False, **changes})
    config, arrays = source.config, to_host_arrays(source)
    made = {name: adapter_of(config, settings, i) for i, (name, settings) in enumerate(SETTINGS.items())}
    merged = {None: MlxRunner(build_model(config, arrays, dtype=dtype))}
    for name, adapter in made.items():
        merged[name] = MlxRunner(build_model(config, dict(lora.merged_arrays(arrays, adapter)), dtype=dtype))
    return MlxRunner(build_model(config, arrays, dtype=dtype), adapters=made), merged


def test_one_batch_of_two_adapters_and_the_base_equals_three_separate_runs():
    check_that_one_batch_equals_separate_runs(*three())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_of_the_base_have_the_bits_of_a_run_without_adapters(dtype):
    runner, merged = three(dtype)
    names = [None, "a", None, "b"]
    with_adapters, without = scores_of_four(runner, names), scores_of_four(merged[None], [None] * 4)
    for name, one, other in zip(names, with_adapters, without, strict=True):
        assert (one == other) is (name is None)


def test_two_threads_keep_their_adapters_apart(monkeypatch):
    check_that_two_threads_keep_their_adapters_apart(three()[0], monkeypatch)


def save_adapter(directory, base, adapter, settings):
    directory.mkdir()
    AdapterFiles(settings, BaseModel(str(base), weights_digest(base))).save(directory, adapter.config, adapter.arrays)
    return directory


@pytest.fixture
def saved(tmp_path):
    """Two adapters of one base on disk."""
    base = save_base(tmp_path / "base")
    settings = LoraSettings(4, 8, targets=("all", "lm_head"))
    made = {name: adapter_of(CONFIG, settings, i) for i, name in enumerate("ab")}
    return base, {name: save_adapter(tmp_path / name, base, one, settings) for name, one in made.items()}


@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
def test_an_adapter_is_opened_as_a_model_with_pytorch_s_logits(tmp_path, saved, scheme):
    base, directories = saved
    if scheme:
        config = dataclasses.replace(CONFIG, quantization=scheme)
        arrays = dict(quantize_arrays(config, model_directory.load_tensors(base).items()))
        base = tmp_path / "quantised"
        base.mkdir()
        model_directory.save_config(base, config)
        model_directory.save_tensors(base, arrays)
        settings = LoraSettings(4, 8, targets=("all", "lm_head"))
        directories = {"a": save_adapter(tmp_path / "q", base, adapter_of(config, settings, 0), settings)}
    ours, theirs = (load(directories["a"], "float32", "cpu") for load in (load_runner, load_torch))
    logits = ours.forward(TOKENS)["logits"]
    np.testing.assert_allclose(logits, theirs.forward(TOKENS)["logits"], atol=2e-5 * np.abs(logits).max())
    assert np.abs(logits - load_runner(base, "float32").forward(TOKENS)["logits"]).max() > 0.1
    if scheme:
        with pytest.raises(ValueError, match="is no one model; use llamita merge"):
            ours.weights()
        return
    merged = MlxRunner(build_model(CONFIG, ours.weights()))
    np.testing.assert_allclose(merged.forward(TOKENS)["logits"], logits, atol=1e-5 * np.abs(logits).max())
    (part,) = load_runner(directories["a"], "bfloat16")._adapters[OWN].changes["lm_head"].parts
    assert part.up_CR.dtype == mx.bfloat16


def test_an_adapter_of_another_type_than_the_model_runs_in_whatever_thread_asks(saved):
    base, directories = saved
    runner = load_runner(base, "bfloat16", adapters=directories)  # the adapters are float32
    found = []
    thread = threading.Thread(target=lambda: found.append(runner.forward(TOKENS, adapter="a")["logits"]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], runner.forward(TOKENS, adapter="a")["logits"])


def test_the_python_face_serves_several_and_opens_one(saved):
    base, directories = saved
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = tuple(TOKENS[0])
    llm = llamita.load(base, backend="mlx", adapters=directories)
    found = llm.generate([prompt] * 3, greedy, adapter=[None, "a", "b"])
    assert len({one.token_ids for one in found}) == 3
    for path, one in zip((base, *directories.values()), found, strict=True):
        assert llamita.load(path, backend="mlx").generate(prompt, greedy).token_ids == one.token_ids
        assert llamita.load(path, backend="torch").generate(prompt, greedy).token_ids == one.token_ids
    alone = load_runner(directories["b"]).forward(TOKENS)["logits"]
    np.testing.assert_array_equal(llm.runner.forward(TOKENS, adapter="b")["logits"], alone)


@pytest.mark.parametrize("objective", [None, Classification()], ids=["language", "classifier"])
def test_what_was_trained_here_opens_in_both_backends(tmp_path, objective):
    base = save_base(tmp_path / "base")
    arrays, config, more = model_directory.load_tensors(base), CONFIG, {}
    if objective:
        config, more = dataclasses.replace(CONFIG, num_labels=3), {"objective": objective}
        del arrays["lm_head.weight"]
        arrays["score.weight"] = HostArray.from_numpy(np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    settings = LoraSettings(4, 8)
    step = build_train_step(config, arrays, adapter=settings, precision="fp32", device="cpu", **more)
    for _ in range(3):
        step.step([labelled() if objective else batch()], 1e-2)
    (tmp_path / "adapter").mkdir()
    files = AdapterFiles(settings, BaseModel(str(base), weights_digest(base)))
    files.save(tmp_path / "adapter", config, step.weights())
    expected = step.runner().forward(TOKENS)["logits"]
    for load in (load_runner, load_torch):
        np.testing.assert_allclose(load(tmp_path / "adapter").forward(TOKENS)["logits"], expected, atol=1e-5)


def test_bad_adapters_are_refused_in_one_line(tmp_path, saved, capsys):
    base, directories = saved

    def refused(directory, message, *more):
        assert main(["generate", str(directory), "x", "--max-tokens", "4", "--backend", "mlx", *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert message in error

    def edited(**changes):
        shutil.rmtree(tmp_path / "edited", ignore_errors=True)
        shutil.copytree(directories["a"], tmp_path / "edited")
        file = tmp_path / "edited" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path / "edited"

    refused(edited(r=5), "expected [5, 32]")
    refused(edited(use_dora=True), "use_dora=True is not supported")
    refused(edited(base_model_name_or_path=str(tmp_path / "gone")), "is gone")
    refused(base, "holds no adapter", "--adapter", f"x={base}")
    damaged = edited()
    values = dict(safetensors.read_safetensors(damaged / "adapter_model.safetensors"))
    name = next(iter(values))
    values[name] = HostArray.from_numpy(np.full(values[name].shape, np.nan, np.float32))
    safetensors.write_safetensors(tmp_path / "nan", values)
    shutil.copyfile(tmp_path / "nan", damaged / "adapter_model.safetensors")
    refused(damaged, "holds NaN or infinite values")
