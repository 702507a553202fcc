"""Adapters served by both backends: a directory opened as a model, several over one base in one batch; held to the
oracle and to each one merged into a model of its own."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest

import llamita
from llamita.backend.objectives import Classification
from llamita.backend.opening import OWN
from llamita.backend.sampling_params import SamplingParams
from llamita.cli.main import main
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import LoraSettings
from llamita.storage import model_directory
from tests import reference
from tests.backend.adapters import (
    CONFIG,
    EVERYTHING,
    batch,
    fill_with_nan,
    fresh,
    labelled,
    save_adapter,
    save_base,
    summed,
)
from tests.backend.frameworks import NAMES, make
from tests.backend.models import dequantized, save
from tests.backend.tolerances import relative_difference
from tests.inference.test_adapters import (
    SETTINGS,
    adapter_of,
    check_that_one_batch_equals_separate_runs,
    check_that_two_threads_keep_their_adapters_apart,
    scores_of_four,
)

TOKENS = [[3, 17, 42, 9, 55, 1, 28], [4, 4, 60, 2, 33, 12, 8]]
SERVED = ModelConfig(97, 48, 80, 3, 6, 2, 256)


def three(framework, precision="fp32"):
    """A runner with two adapters, and by name runners over models of which one is a part."""
    arrays = fresh(SERVED)
    made = {name: adapter_of(SERVED, settings, i) for i, (name, settings) in enumerate(SETTINGS.items())}
    merged = {None: framework.runner_over(SERVED, arrays, precision)}
    for name, adapter in made.items():
        merged[name] = framework.runner_over(SERVED, dict(framework.backend.merged_arrays(arrays, adapter)), precision)
    return framework.runner_of(framework.build_model(SERVED, arrays, precision), adapters=made), merged


def test_one_batch_of_two_adapters_and_the_base_equals_three_separate_runs(framework):
    check_that_one_batch_equals_separate_runs(*three(framework))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_the_base_have_the_bits_of_a_run_without_adapters(framework, precision):
    runner, _ = three(framework, precision)
    plain = framework.runner_of(framework.build_model(SERVED, fresh(SERVED), precision))
    names = [None, "a", None, "b"]
    with_adapters, without = scores_of_four(runner, names), scores_of_four(plain, [None] * 4)
    for name, one, other in zip(names, with_adapters, without, strict=True):
        assert (one == other) is (name is None)


def test_two_threads_keep_their_adapters_apart(framework, monkeypatch):
    check_that_two_threads_keep_their_adapters_apart(three(framework)[0], monkeypatch)


@pytest.fixture
def saved(tmp_path):
    """Two adapters of one base on disk."""
    base = save_base(tmp_path / "base")
    made = {name: adapter_of(CONFIG, EVERYTHING, i) for i, name in enumerate("ab")}
    return base, {
        name: save_adapter(tmp_path / name, CONFIG, adapter.arrays, EVERYTHING, base) for name, adapter in made.items()
    }


@pytest.mark.parametrize("scheme", ["", "int8", "int4"])
def test_an_adapter_is_opened_as_a_model_with_the_oracle_s_logits(framework, tmp_path, saved, scheme):
    base, directories = saved
    load, plain = framework.backend.load_runner, {name: array.to_numpy() for name, array in fresh(CONFIG).items()}
    if scheme:
        config = dataclasses.replace(CONFIG, quantization=scheme)
        stored = dict(framework.backend.quantize_arrays(config, model_directory.load_tensors(base).items()))
        base = save(config, stored, tmp_path / "quantised")
        arrays = adapter_of(config, EVERYTHING, 0).arrays
        directories = {"a": save_adapter(tmp_path / "q", config, arrays, EVERYTHING, base)}
        plain = {name: dequantized(stored)[name][..., : array.shape[-1]] for name, array in plain.items()}
    runner = load(directories["a"], "float32", "cpu")
    weights = summed(plain, adapter_of(CONFIG, EVERYTHING, 0))
    logits = runner.forward(TOKENS)["logits"]
    expected = np.stack([reference.forward(CONFIG, weights, tokens)["logits"] for tokens in TOKENS])
    assert relative_difference(logits, expected) < 2e-5
    assert np.abs(logits - load(base, "float32", "cpu").forward(TOKENS)["logits"]).max() > 0.1
    if scheme:
        with pytest.raises(ValueError, match="is no one model; use llamita merge"):
            runner.weights()
        return
    merged = framework.runner_over(CONFIG, runner.weights())
    assert relative_difference(merged.forward(TOKENS)["logits"], logits) < 1e-5
    narrow = load(directories["a"], "bfloat16", "cpu")
    (part,) = narrow._adapters[OWN].changes["lm_head"].parts
    assert part.up_CR.dtype == framework.dtype("bf16"), "the type of what it changes"


def test_an_adapter_of_another_type_than_the_model_runs_in_whatever_thread_asks(framework, saved):
    base, directories = saved
    runner = framework.backend.load_runner(base, "bfloat16", "cpu", adapters=directories)  # the adapters are float32
    found = []
    thread = threading.Thread(target=lambda: found.append(runner.forward(TOKENS, adapter="a")["logits"]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0], runner.forward(TOKENS, adapter="a")["logits"])


def test_the_python_face_serves_several_and_opens_one(framework, saved):
    base, directories = saved
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt, backend = tuple(TOKENS[0]), framework.name
    llm = llamita.load(base, backend=backend, adapters=directories)
    found = llm.generate([prompt] * 3, greedy, adapter=[None, "a", "b"])
    assert len({one.token_ids for one in found}) == 3
    for path, one in zip((base, *directories.values()), found, strict=True):
        assert llamita.load(path, backend=backend).generate(prompt, greedy).token_ids == one.token_ids
    alone = framework.backend.load_runner(directories["b"]).forward(TOKENS)["logits"]
    np.testing.assert_array_equal(llm.runner.forward(TOKENS, adapter="b")["logits"], alone)


def test_both_backends_say_the_same_with_an_adapter(saved):
    base, directories = saved
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for path in (base, *directories.values()):
        texts = [llamita.load(path, backend=make(name).name).generate(tuple(TOKENS[0]), greedy) for name in NAMES]
        assert texts[0].token_ids == texts[1].token_ids


@pytest.mark.parametrize("objective", [None, Classification()], ids=["language", "classifier"])
@pytest.mark.parametrize("opened_by", NAMES)
def test_what_was_trained_opens_in_both_backends(framework, tmp_path, objective, opened_by):
    base = save_base(tmp_path / "base")
    arrays, config, more = model_directory.load_tensors(base), CONFIG, {}
    if objective:
        config, more = dataclasses.replace(CONFIG, num_labels=3), {"objective": objective}
        del arrays["lm_head.weight"]
        arrays["score.weight"] = HostArray.from_numpy(np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32))
    settings = LoraSettings(4, 8)
    step = framework.train_step(config, arrays, adapter=settings, **more)
    for _ in range(3):
        step.step([labelled() if objective else batch()], 1e-2)
    directory = save_adapter(tmp_path / "adapter", config, step.weights(), settings, base)
    expected = step.runner().forward(TOKENS)["logits"]
    found = make(opened_by).backend.load_runner(directory, device="cpu").forward(TOKENS)["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bad_adapters_are_refused_in_one_line(framework, tmp_path, saved, capsys):
    base, directories = saved

    def refused(directory, message, *more):
        assert main(["generate", str(directory), "x", "--max-tokens", "4", "--backend", framework.name, *more]) == 2
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
    fill_with_nan(damaged)
    refused(damaged, "holds NaN or infinite values")
