"""Training on a mixture of prepared data: what is recorded, resumed, evaluated, refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llamita.cli.main import main
from llamita.data.batches import IGNORE_INDEX
from llamita.data.packing import RowsConfig
from llamita.data.prepare import PrepareConfig, prepare
from llamita.data.shards import TokenShards, load_tokenizer
from llamita.storage import model_directory
from llamita.training import metrics
from llamita.training.run_directory import read_manifest
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, make_examples, mixture_weights, sample_prompt
from tests.training.helpers import prepare_stories
from tests.workflows.test_pretrain import assert_resumed_exactly, backend, run, settings


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """Stories, and the same words in another order; one has three times as much text."""
    root = tmp_path_factory.mktemp("mixture")
    stories = prepare_stories(root)
    text = root / "text.txt"
    lines = [" ".join(reversed(story.split())) for story in load_stories(stories)[:40]]
    text.write_text("\n\n".join(lines), encoding="utf-8")
    config = PrepareConfig(root / "reversed", root / "tokenizer", files=(text,), validation_share=0.2, workers=1)
    prepare(config)
    return stories, config.output


def load_stories(data: Path) -> list[str]:
    tokenizer, shards = load_tokenizer(data), TokenShards(data)
    return [tokenizer.decode(shards.document(number)) for number in range(shards.num_documents)]


@pytest.mark.parametrize("mode", ["pack", "best-fit"])
def test_a_run_says_what_it_read_and_resumes_exactly(tmp_path, places, mode):
    whole = settings(tmp_path / "whole", places, weights=(3, 1), mode=mode, checkpoint_every=3, within_documents=True)
    run(whole)

    assert_resumed_exactly(whole, tmp_path / "broken")
    updates = [line for line in metrics.read_records(tmp_path / "whole/metrics.jsonl") if line["kind"] == "train"]
    assert [line["rows/data"] + line["rows/reversed"] for line in updates] == [4 * step for step in range(1, 13)]
    assert updates[-1]["rows/data"] > updates[-1]["rows/reversed"] > 0
    assert updates[-1]["epochs/reversed"] > 0
    identity = read_manifest(tmp_path / "whole")["identity"]["data"]
    assert identity["source-1"]["weight"] == 0.75
    assert identity["source-2"].keys() == {"train", "validation", "weight"}


def test_each_source_validates_and_the_loss_is_their_weighted_mean(tmp_path, places):
    result = run(settings(tmp_path / "both", places, weights=(3, 1), steps=6))
    losses = {}
    for name, place in zip(("data", "reversed"), places, strict=True):
        # The model after these very updates, evaluated on one source alone.
        config = settings(tmp_path / "both", (place,))
        rows = RowsConfig("pack", 32)
        validation = make_examples(config, load_tokenizer(place), rows).validation
        step = backend.build_train_step(model_of(tmp_path / "both"), precision="fp32", device="cpu")
        weights, optimizer = arrays_of(tmp_path / "both/last")
        step.load_state(weights, optimizer)
        found = [step.evaluate(batch) for batch in validation()]
        losses[name] = sum(part.nats for part in found) / sum(part.targets for part in found)
    measures = result.evaluation.measures
    assert {name: measures[f"loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-6)
    assert result.evaluation.loss == pytest.approx(0.75 * losses["data"] + 0.25 * losses["reversed"], rel=1e-6)
    assert result.evaluation.perplexity == pytest.approx(np.exp(result.evaluation.loss))


def model_of(run_directory: Path):
    return model_directory.load_config(run_directory / "last")


def arrays_of(checkpoint: Path):
    return model_directory.load_tensors(checkpoint), model_directory.load_tensors(checkpoint, name="optimizer")


def test_without_weights_sources_count_by_their_tokens(tmp_path, places):
    config = settings(tmp_path, places)
    tokens = [json.loads((place / "manifest.json").read_text())["splits"]["train"]["tokens"] for place in places]
    assert mixture_weights(config) == pytest.approx([count / sum(tokens) for count in tokens])


def test_rows_of_a_source_are_those_of_its_documents(tmp_path, places):
    config = settings(tmp_path, places, weights=(1, 1), batch_size=64)
    tokenizer = load_tokenizer(places[0])
    batch = make_examples(config, tokenizer, RowsConfig("pad", 400)).batches.next()
    originals = [set(load_stories(place)) for place in places]
    found = []
    for tokens, labels in zip(batch.tokens_BT, batch.labels_BT, strict=True):
        text = tokenizer.decode([tokens[0], *labels[labels != IGNORE_INDEX]])
        found.append([text in known for known in originals])
    assert any(first for first, _ in found)
    assert any(second for _, second in found)


def test_two_directories_of_one_name_are_told_apart(tmp_path, places):
    config = settings(tmp_path, (places[0], places[0], places[1]), weights=(1, 1, 2))
    batch = make_examples(config, load_tokenizer(places[0]), RowsConfig("pack", 16)).batches.next()
    assert [name for name in batch.metrics if name.startswith("rows/")] == ["rows/data-1", "rows/data-2",
                                                                           "rows/reversed"]  # fmt: skip


def test_without_a_bos_token_samples_continue_the_first_token_of_the_first_row(tmp_path, places):
    for data in (places, places[:1]):
        examples = make_examples(settings(tmp_path, data), load_tokenizer(data[0]), RowsConfig("pack", 16))
        prompt = sample_prompt(settings(tmp_path, data), SimpleNamespace(bos_id=None), examples)
        assert prompt == (int(TokenShards(places[0]).document(0)[0]),)


def test_other_weights_are_refused_by_name(tmp_path, places):
    run(settings(tmp_path / "run", places, weights=(3, 1), steps=2))
    with pytest.raises(ValueError, match=r"data\.source-1\.weight was 0\.75 and is now 0\.5; data\.source-2\.weight"):
        run(resolve(PretrainConfig, output=tmp_path / "run", resume=True, weights=(1, 1)))


def test_a_run_of_one_directory_saved_as_a_text_goes_on(tmp_path, places):
    run(settings(tmp_path / "run", places[0], steps=2, schedule="constant"))
    path = tmp_path / "run" / "run.json"
    manifest = json.loads(path.read_text())
    assert manifest["arguments"]["data"] == [str(places[0])]
    manifest["arguments"]["data"] = str(places[0])  # as it was when there could be only one
    del manifest["arguments"]["weights"]
    path.write_text(json.dumps(manifest))
    assert run(resolve(PretrainConfig, output=tmp_path / "run", resume=True, steps=4)).step == 4


def test_mistakes_are_one_line(tmp_path, places, capsys):
    def refused(*arguments: str) -> str:
        assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 2
        return capsys.readouterr().err

    first, second = map(str, places)
    other = prepare_stories(tmp_path, vocab_size=310)
    assert "--data is missing" in refused()
    assert f"{first} and {other} were not made by the same tokenizer" in refused("--data", first, str(other))
    assert "there are 1 weights for 2 sources" in refused("--data", first, second, "--weights", "0.5")
    assert "there is only one" in refused("--data", first, "--weights", "0.5")
    assert not (tmp_path / "run").exists()
