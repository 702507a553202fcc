"""Several adapters over one base in one batch, held to each one merged into a model of its own and served alone."""

import dataclasses
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import starmap

import numpy as np
import pytest
import torch

import llamita
from llamita.backend.interface import CacheLayout, Plan, ScheduledChunk, Target
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import lora
from llamita.cli.main import main
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter, LoraSettings, adapter_shapes
from llamita.storage import model_directory
from llamita.storage.peft_directory import AdapterFiles, BaseModel, weights_digest
from tests.backend.torch.infer.served import Served, alone, model_of, requests

SETTINGS = {
    "a": LoraSettings(4, 8.0),
    "b": LoraSettings(3, 9.0, targets=("q_proj", "down_proj", "lm_head"), rank_stabilized=True),
}


def adapter_of(config, settings, seed):
    """An adapter that changes much."""
    random = np.random.default_rng(seed)
    factors = settings.factors(config)
    shapes = adapter_shapes(config, factors)
    arrays = {n: HostArray.from_numpy(random.normal(0, 0.15, s).astype(np.float32)) for n, s in shapes.items()}
    return Adapter(config, factors, arrays)


def three(exact=False, dtype=torch.float32, **changes):
    """A runner with two adapters, and by name runners over models of which one is a part."""
    changes = {"tie_word_embeddings": False, **changes}
    config = model_of(**changes).config
    made = {name: adapter_of(config, settings, i) for i, (name, settings) in enumerate(SETTINGS.items())}
    merged = {}
    for name in (None, *made):
        model = model_of(dtype, **changes).eval()
        if name:
            lora.merge(model, made[name])
        merged[name] = TorchRunner(model)
    return TorchRunner(model_of(dtype, **changes).eval(), exact, made), merged


def mixed(vocabulary, **params):
    names = (None, "a", "b")
    return [dataclasses.replace(r, adapter=names[r.id % 3]) for r in requests(vocabulary, **params)]


def answers(runner, asked, **limits):
    engine = Engine(runner, config=EngineConfig(**limits), adapters=tuple(runner.adapters))
    for request in asked:
        engine.add(request)
    found = {request.id: [] for request in asked}
    while engine.has_work:
        for event in engine.step():
            assert not event.error, event.error
            found[event.request_id].append(event)
    return found


def check_that_one_batch_equals_separate_runs(runner, merged):
    """Of the base and its adapters, `merged` being runners over models that have one of them merged in, or none."""
    asked = mixed(97, temperature=0, top_logprobs=2, prompt_logprobs=True)
    together = answers(runner, asked, max_sequences=5, blocks=80)
    compared = 0
    for name, single in merged.items():
        mine = [request for request in asked if request.adapter == name]
        for key, events in answers(single, [dataclasses.replace(r, adapter=None) for r in mine]).items():
            np.testing.assert_allclose(together[key][0].prompt_logprobs, events[0].prompt_logprobs, atol=1e-4)
            for ours, theirs in zip(together[key], events, strict=True):
                best, second = (logprob for _, logprob in theirs.top_logprobs)
                if ours.token_id != theirs.token_id:
                    assert best - second < 2e-4
                    break
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                compared += 1
    assert compared > 150


def scores_of_four(runner, names):
    """The log-probabilities of the tokens of four chunks in one step, each read by the adapter of its name."""
    chunks = []
    for number, (name, length) in enumerate(zip(names, (7, 1, 20, 3), strict=True)):
        tokens = tuple(np.random.default_rng(number).integers(0, 97, length + 1).tolist())
        table = (np.arange(number * 3, number * 3 + 3, dtype=np.int32),)
        chunks.append(
            ScheduledChunk(number, tokens[:-1], 0, table, (), tuple(starmap(Target, enumerate(tokens[1:]))), name)
        )
    return runner.run(Plan(tuple(chunks)), runner.allocate(CacheLayout(16, 40))).target_logprobs


def test_one_batch_of_two_adapters_and_the_base_equals_three_separate_runs():
    check_that_one_batch_equals_separate_runs(*three())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_base_have_the_bits_of_a_run_without_adapters(dtype):
    runner, merged = three(dtype=dtype)
    random = np.random.default_rng(2)
    names = [None, "a", None, "b"]
    random.shuffle(names)
    with_adapters, without = scores_of_four(runner, names), scores_of_four(merged[None], [None] * 4)
    for name, one, other in zip(names, with_adapters, without, strict=True):
        assert (one == other) is (name is None)


def check_that_two_threads_keep_their_adapters_apart(runner, monkeypatch):
    """Two engines over one runner, at once: each has the tokens, and bit for bit the logits, that it has alone."""
    seen, together, compute = {}, threading.Barrier(1), runner._logits

    def watched(states, rows):
        together.wait(10)  # neither thread goes ahead of the other's step
        logits_RV = compute(states, rows)
        seen[threading.get_ident()].append(np.asarray(logits_RV).copy())
        return logits_RV

    def serve(name):
        seen[threading.get_ident()] = logits = []
        names = (name, None, name, "a")
        asked = [
            Request(number, tuple(range(number, number + 9)), SamplingParams(temperature=0, max_tokens=12), adapter=one)
            for number, one in enumerate(names)
        ]
        return answers(runner, asked, max_sequences=3), logits

    monkeypatch.setattr(runner, "_logits", watched)
    expected = [serve(name) for name in ("a", "b")]
    together = threading.Barrier(2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(serve, ("a", "b")))
    finally:
        sys.setswitchinterval(before)
    for (events, logits), (expected_events, expected_logits) in zip(found, expected, strict=True):
        for number, own in expected_events.items():
            assert [event.token_id for event in events[number]] == [event.token_id for event in own]
            assert [event.logprob for event in events[number]] == [event.logprob for event in own]
        for ours, theirs in zip(logits, expected_logits, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_two_threads_keep_their_adapters_apart(exact, monkeypatch):
    check_that_two_threads_keep_their_adapters_apart(three(exact)[0], monkeypatch)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 37, "intermediate_size": 53, "head_dim": 10}], ids=str)
def test_the_exact_mode_gives_the_same_bits_alone_and_batched(changes):
    runner, _ = three(exact=True, **changes)
    asked = mixed(97, count=8)
    reference = alone(runner, asked)
    for served in (
        Served(runner, [asked[:5], asked[5:]], blocks=60),
        Served(runner, [asked], blocks=24, max_sequences=4, prefill_tokens=50, drafter=PromptLookup()),
    ):
        for key, (text, logits) in reference.items():
            assert served.texts[key] == text
            for position, rows in served.logits_of(key).items():
                assert all(row_V.tobytes() == logits[position][0].tobytes() for row_V in rows)
    for request in asked:
        text, logits = reference[request.id, 0]
        whole_TV = runner.forward([text], adapter=request.adapter)["logits"][0]
        assert all(np.array_equal(whole_TV[position - 1], row_V) for position, (row_V,) in logits.items())


def test_no_block_is_shared_between_adapters():
    runner, _ = three()
    engine = Engine(runner, config=EngineConfig(block_size=4), adapters=("a", "b"))
    prompt, greedy = tuple(range(21)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    cached = []
    for number, name in enumerate((None, "a", "b", None, "b", "a")):
        engine.add(Request(number, prompt, greedy, adapter=name))
        while engine.has_work:
            events = engine.step()
        cached.append(events[-1].statistics.cached_tokens)
    assert cached == [0, 0, 0, 20, 20, 20]


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """Two adapters of the tiny model on disk."""
    config = model_directory.load_config(tiny_model)
    base = BaseModel(str(tiny_model), weights_digest(tiny_model))
    found = {}
    for number, name in enumerate(("a", "b")):
        settings = LoraSettings(4, 16.0)
        found[name] = tmp_path_factory.mktemp("adapters") / name
        found[name].mkdir()
        AdapterFiles(settings, base).save(found[name], config, adapter_of(config, settings, number).arrays)
    return found


def test_the_python_face_and_an_adapter_loaded_as_a_model_agree(tiny_model, saved, tmp_path):
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm = llamita.load(tiny_model, exact=True, adapters=saved)
    base, a, b = llm.generate(["The fox"] * 3, greedy, adapter=[None, "a", "b"])
    for name, expected in saved.items():
        alone = llamita.load(expected, exact=True)
        assert alone.generate("The fox", greedy).token_ids == {"a": a, "b": b}[name].token_ids
    assert len({base.token_ids, a.token_ids, b.token_ids}) == 3
    assert "".join(llm.stream("The fox", greedy, adapter="b")) == b.text
    llamita.save(llamita.load(saved["a"]), tmp_path / "merged")
    logits = llm.runner.forward([[1, 5, 9]], adapter="a")["logits"]
    np.testing.assert_allclose(
        llamita.load(tmp_path / "merged").runner.forward([[1, 5, 9]])["logits"], logits, atol=1e-5
    )
    with pytest.raises(ValueError, match="there is no adapter 'c'; loaded are: a, b"):
        llm.generate("The fox", greedy, adapter="c")
    with pytest.raises(ValueError, match="prompt 1: there is no adapter 'd'"):
        llm.generate(["The fox", "An owl"], adapter=["a", "d"])


def test_the_command_serves_adapters_to_prompts_and_to_lines(tiny_model, saved, tmp_path, capsys):
    def lines(*asked):
        (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"prompt": "The fox", **one}) for one in asked))
        for file in tmp_path.glob("out*"):
            file.unlink()
        named = [f"{name}={path}" for name, path in saved.items()]
        given = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        options = ["--temperature", "0", "--max-tokens", "8", "--adapter", *named]
        status = main(["generate", str(tiny_model), *given, *options])
        return status, capsys.readouterr().err

    assert lines({}, {"adapter": "a"}, {"model": "tiny:b"}, {"model": "tiny"}, {"model": "tiny:a"})[0] == 0
    found = {r["index"]: r["text"] for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert found[0] == found[3] != found[1] == found[4] != found[2]
    status, error = lines({"adapter": "c"}, {"adapter": "a", "model": "tiny:b"})
    assert status == 2
    assert "line 1: there is no adapter 'c'" in error
    assert "line 2: adapter='a' and model='tiny:b' name two adapters" in error
    options = ["--temperature", "0", "--max-tokens", "8", "--no-echo"]
    assert main(["generate", str(tiny_model), "The fox", *options, "--adapter", f"a={saved['a']}"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == found[1].rstrip("\n")
    for bad, message in (("a", "must have the form NAME=PATH"), (f"x={tiny_model}", "holds no adapter")):
        assert main(["generate", str(tiny_model), "The fox", "--adapter", bad]) == 2
        assert message in capsys.readouterr().err
