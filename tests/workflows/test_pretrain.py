"""Pre-training from prepared data: what is refused, what a run holds, resuming it by its directory alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llamita.backend.torch.infer.runner import load_runner
from llamita.data import shards
from llamita.data.batches import IGNORE_INDEX
from llamita.data.packing import RowsConfig
from llamita.inference.llm import LLM
from llamita.storage import model_directory
from llamita.training.config import with_options
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, make_examples, model_config, parse_change, pretrain
from tests.training.helpers import Altered, Silence, prepare_stories, timeless, weights_of

SMALL = (
    "hidden_size=16",
    "intermediate_size=24",
    "num_hidden_layers=2",
    "num_attention_heads=2",
    "num_key_value_heads=1",
    "max_position_embeddings=64",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("stories"))


backend = Altered()


def settings(output, data, **changes):
    values = {
        "output": output,
        "data": data,
        "set": SMALL,
        "dropout": 0.1,
        "sequence_length": 32,
        "steps": 12,
        "batch_size": 4,
        "evaluate_every": 6,
        "evaluation_rows": 8,
        "sample_tokens": 10,
        "precision": "fp32",
        "device": "cpu",
    }
    return resolve(PretrainConfig, **(values | changes))


def run(config, **options):
    return pretrain(config, backend, display=Silence(), **options)


def assert_resumed_exactly(whole, broken):
    """Makes the run that `whole` made once more in `broken`, stopped after eight updates, and compares both."""

    class Stop(Silence):
        def update(self, record):
            if record["step"] == 8:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        pretrain(with_options(whole, output=broken), backend, display=Stop())
    run(resolve(PretrainConfig, output=broken, resume=True))
    assert weights_of(whole.run.output / "last") == weights_of(broken / "last")
    assert timeless(whole.run.output) == timeless(broken)


def test_a_run_from_prepared_data(tmp_path, data):
    seen = []
    result = run(settings(tmp_path / "run", data), on_evaluation=seen.append, floor=0.5)
    assert [evaluation.step for evaluation in seen] == [6, 12]
    assert result.evaluation.nats_per_character < result.evaluation.loss
    assert result.evaluation.loss == pytest.approx(math.log(300), rel=0.2)
    samples = (tmp_path / "run/samples.txt").read_text()
    assert "=== step 6 ===" in samples
    assert "=== step 12 ===" in samples
    llm = LLM.load(tmp_path / "run", backend="torch")
    assert llm.tokenizer.hash == shards.load_tokenizer(data).hash
    assert len(llm.generate("The").token_ids) > 0
    config = model_directory.load_config(tmp_path / "run/best")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (300, 1, 2)


@pytest.mark.medium
def test_transformers_opens_a_checkpoint_as_it_is(tmp_path, data):
    transformers = pytest.importorskip("transformers")
    run(settings(tmp_path / "run", data))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/best")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/best")
    text = "The fox is at the mill."
    ids = shards.load_tokenizer(data).encode(text)
    assert tokenizer(text)["input_ids"] == ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    ours = load_runner(tmp_path / "run").forward([ids])["logits"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sampling_does_not_disturb_training(tmp_path, data):
    for name, tokens in (("with", 10), ("without", 0)):
        run(settings(tmp_path / name, data, sample_tokens=tokens))
    assert weights_of(tmp_path / "with/last") == weights_of(tmp_path / "without/last")
    assert not (tmp_path / "without/samples.txt").exists()


@pytest.mark.parametrize("mode", ["pad", "random"])
def test_resumed_by_its_directory_alone(tmp_path, data, mode):
    whole = settings(tmp_path / "whole", data, mode=mode, checkpoint_every=3)
    run(whole)

    assert_resumed_exactly(whole, tmp_path / "broken")
    assert (tmp_path / "whole/samples.txt").read_text() == (tmp_path / "broken/samples.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 5e-4}, r"training\.learning_rate was 0\.001 and is now 0\.0005"),
        ({"set": (*SMALL, "num_hidden_layers=3")}, r"model\.num_hidden_layers was 2 and is now 3"),
        ({"seed": 9}, r"training\.seed was 0 and is now 9"),
        ({"mode": "pad"}, r"rows\.mode was 'pack' and is now 'pad'"),
        ({"dropout": 0.3}, r"model\.dropout was 0\.1 and is now 0\.3"),
        ({"steps": 50}, r"training\.steps was 12 and is now 50"),
        ({"steps": 1000}, r"training\.steps was 12 and is now 1000"),  # the default, but given
    ],
)
def test_a_changed_option_is_refused_by_name(tmp_path, data, finished, changes, named):
    before = weights_of(finished / "last")
    with pytest.raises(ValueError, match=named):
        run(resolve(PretrainConfig, output=finished, resume=True, **changes))
    assert weights_of(finished / "last") == before


def test_changed_data_is_refused(tmp_path, finished):
    other = prepare_stories(tmp_path, count=100)
    with pytest.raises(ValueError, match=r"data\.train was "):
        run(resolve(PretrainConfig, output=finished, resume=True, data=other))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    output = tmp_path_factory.mktemp("finished") / "run"
    run(settings(output, data))
    return output


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": "llama-9"}, "no preset named 'llama-9'; choose one of tiny"),
        ({"set": (*SMALL, "query_key_norm=true", "mlp_bias=true")}, "mlp_bias=True does not go with query_key_norm"),
        ({"set": ("vocab_size=1000",)}, "vocab_size=1000 does not fit the tokenizer .* 300 tokens"),
        ({"set": (*SMALL, "num_attention_heads=3")}, "hidden_size=16 must be a multiple of num_attention_heads=3"),
        ({"set": ("hiddensize=3",)}, "'hiddensize' is no field of a model"),
        ({"set": ("hidden_size=big",)}, "hidden_size='big' must be a whole number"),
        ({"set": ("hidden_size",)}, "form name=value"),
        ({"sequence_length": 65}, "sequence_length=65 is longer than the model's 64 positions"),
        ({"data": None}, "--data is missing"),
        ({"data": Path("nowhere")}, "nowhere"),
        ({"device": "tpu"}, "device='tpu' is not here"),
        ({"beta1": 1.5}, "beta1=1.5"),
        ({"initialization": "zeros"}, "initialization='zeros'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, data, changes, named):
    with pytest.raises((ValueError, OSError), match=named) as error:
        run(settings(tmp_path / "run", **{"data": data, **changes}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"warmup_steps": 13}, "warmup_steps=13"),
        ({"micro_batch_size": 5}, "micro_batch_size=5"),
        ({"learning_rate": -1.0}, "learning_rate=-1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"sample_tokens": -1}, "sample_tokens"),
        ({"schedule": "linear"}, "schedule='linear'"),
    ],
)
def test_options_that_cannot_be(changes, named):
    with pytest.raises(ValueError, match=named):
        settings(Path("run"), Path("data"), **changes)


def test_changes_to_a_preset(data):
    assert parse_change("hidden-size=128") == ("hidden_size", 128)
    assert parse_change("rope_theta=5e5") == ("rope_theta", 5e5)
    assert parse_change("tie_word_embeddings=False") == ("tie_word_embeddings", False)
    model = model_config(settings(Path("run"), data), shards.load_tokenizer(data))
    assert (model.hidden_size, model.head_dim, model.vocab_size, model.dropout) == (16, 8, 300, 0.1)


def test_validation_counts_characters_exactly(data):
    config = settings(Path("run"), data, evaluation_rows=0, batch_size=5)
    tokenizer = shards.load_tokenizer(data)
    rows = RowsConfig("pack", 32)
    examples = make_examples(config, tokenizer, rows)
    batches = list(examples.validation())
    split = shards.TokenShards(data, "validation")
    assert sum(batch.num_targets for batch in batches) == split.num_tokens - 1
    labels = np.concatenate([batch.labels_BT[batch.labels_BT >= 0] for batch in batches])
    assert examples.text.characters_V[labels].sum() == split.num_characters
    assert examples.text.bytes_V[labels].sum() == split.num_bytes


def test_identity_is_json_and_paths_may_move(tmp_path, data):
    run(settings(tmp_path / "run", data, steps=3))
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    assert all(Path(place).is_absolute() for place in manifest["arguments"]["data"])
    assert str(data) not in json.dumps(manifest["identity"])
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(resolve(PretrainConfig, output=tmp_path / "moved", resume=True)).step == 3


def test_validation_inside_documents_scores_each_from_its_beginning(data):
    config = settings(Path("unused"), data, mode="pack", within_documents=True, evaluation_rows=0, sequence_length=64)
    tokenizer = shards.load_tokenizer(data)
    split = shards.TokenShards(data, "validation")
    scored = 0
    for batch in make_examples(config, tokenizer, RowsConfig("pack", 64, True)).validation():
        for tokens, labels in zip(batch.tokens_BT, batch.labels_BT, strict=True):
            assert labels[0] != IGNORE_INDEX
            assert tokens[0] == tokenizer.bos_id or split.manifest.splits["validation"].longest_document > 65
            scored += int((labels != IGNORE_INDEX).sum())
    lengths = [len(split.document(i)) for i in range(split.num_documents)]
    assert scored == sum(length - (-(-length // 65)) for length in lengths)  # all but the first token of each row
