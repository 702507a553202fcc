"""`llamita classify ...` as typed: train, resume, seeds, evaluate, predict, zero-shot; one line for each mistake."""

import json

import pytest

from llamita.backend.torch.model import weights
from llamita.cli.main import main
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator

CONFIG = ModelConfig(300, 16, 24, 1, 2, 1, 64)
QUICK = ["--steps", "4", "--batch-size", "4", "--evaluate-every", "2", "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, labelled files, and a classifier trained on them."""
    directory = tmp_path_factory.mktemp("world")
    (directory / "base").mkdir()
    train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300).save(directory / "base")
    model_directory.save_config(directory / "base", CONFIG)
    model_directory.save_tensors(directory / "base", weights.to_host_arrays(weights.build_model(CONFIG, seed=1)))
    for name, count in (("train.txt", 24), ("dev.txt", 9)):
        lines = [f"{i % 3} ||| He was {('sad', 'here', 'happy')[i % 3]} {i} ." for i in range(count)]
        (directory / name).write_text("\n".join(lines) + "\n")
    (directory / "test.txt").write_text("".join(line.replace("2 |||", "0 |||").replace("1 |||", "0 |||")
                                                for line in (directory / "dev.txt").open()))  # fmt: skip
    (directory / "map.json").write_text('["bad", "average", "good"]')
    assert main(train(directory, directory / "run")) == 0
    return directory


def train(world, output, *more):
    data = ["--data", str(world / "train.txt"), "--validation", str(world / "dev.txt")]
    names = ["--label-mapping", str(world / "map.json")]
    return ["classify", "train", "--model", str(world / "base"), *data, *names, "--output", str(output), *QUICK, *more]


def test_training_says_what_it_read_and_how_it_went(world, capsys, tmp_path):
    assert main(train(world, tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    assert "training: 24 texts (bad 8, average 8, good 8); longest" in printed
    assert "context of 64: none is cut" in printed
    assert "best validation accuracy" in printed
    assert main(["classify", "train", "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert "resumed from step 4 of 4" in capsys.readouterr().out


def test_seeds(world, capsys, tmp_path):
    assert main(train(world, tmp_path / "runs", "--seeds", "0", "1")) == 0
    record = json.loads((tmp_path / "runs" / "seeds.json").read_text())
    assert f"mean {record['mean']:.4f}, standard deviation {record['deviation']:.4f}" in capsys.readouterr().out
    assert main(["classify", "train", "--output", str(tmp_path / "runs"), "--resume"]) == 0
    assert "validation accuracy of 2 seeds" in capsys.readouterr().out


def test_evaluate(world, capsys, tmp_path):
    command = ["classify", "evaluate", str(world / "run"), "--data", str(world / "dev.txt")]
    assert main([*command, "--output", str(tmp_path / "scores")]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert f"accuracy          {content['accuracy']:.4f}" in printed
    assert content["texts"] == 9
    assert (content["context"], content["truncated"], content["keep"]) == (64, 0, "end")
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == [
        "confusion.png", "evaluation.json", "reliability.png"
    ]  # fmt: skip


def test_predict_does_not_look_at_labels(world, capsys, tmp_path):
    for source in ("dev.txt", "test.txt"):
        command = ["classify", "predict", str(world / "run"), "--data", str(world / source)]
        assert main([*command, "--output", str(tmp_path / source)]) == 0
        assert "were not looked at" in capsys.readouterr().err
    assert (tmp_path / "dev.txt").read_text() == (tmp_path / "test.txt").read_text()
    lines = (tmp_path / "dev.txt").read_text().splitlines()
    texts = [line.partition(" ||| ")[2] for line in (world / "dev.txt").read_text().splitlines()]
    assert [line.partition(" ||| ")[2] for line in lines] == texts
    assert {line.partition(" ||| ")[0] for line in lines} <= {"0", "1", "2"}
    (tmp_path / "plain.txt").write_text("\n".join(texts))
    assert main(["classify", "predict", str(world / "run"), "--data", str(tmp_path / "plain.txt"), "--names"]) == 0
    printed = capsys.readouterr()
    names = ["bad", "average", "good"]
    assert printed.out.splitlines() == [f"{names[int(line[0])]}{line[1:]}" for line in lines]
    assert "were not looked at" not in printed.err
    assert main(["classify", "predict", str(world / "run"), "--text", texts[0]]) == 0
    shares = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert max(shares, key=lambda name: float(shares[name])) == names[int(lines[0][0])]
    assert sum(map(float, shares.values())) == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("more", [[], ["--score", "mean", "--calibrate"], ["--labels", "sad", "there", "happy"]])
def test_zero_shot(world, capsys, tmp_path, more):
    command = ["classify", "zero-shot", str(world / "base"), "--data", str(world / "dev.txt")]
    names = ["--label-mapping", str(world / "map.json")]
    assert main([*command, *names, *more, "--output", str(tmp_path / "zero")]) == 0
    printed = capsys.readouterr().out
    words = more[1:] if "--labels" in more else ["bad", "average", "good"]
    question = f"Is this movie {words[0]}, {words[1]}, or {words[2]}? This movie is"
    assert f"question: {question} {'|'.join(words)}" in printed
    content = json.loads((tmp_path / "zero" / "evaluation.json").read_text())
    assert content["words"] == words
    assert [each["label"] for each in content["labels"]] == ["bad", "average", "good"]
    assert f"accuracy          {content['accuracy']:.4f}" in printed


@pytest.mark.parametrize(("arguments", "message"), [
    (["train", "--model", "{world}/base", "--output", "{out}"], "--data is missing"),
    (["train", "--data", "meadow", "--output", "{out}"], "--model is missing"),
    (["train", "--model", "{world}/none", "--data", "meadow", "--output", "{out}"], "does not exist"),
    (["train", "--model", "{world}/base", "--data", "none.txt", "--output", "{out}"], "there is no file none.txt"),
    (["train", "--model", "{world}/base", "--data", "{world}/test.txt", "--output", "{out}"], "at least two labels"),
    (["train", "--model", "{world}/base", "--data", "{world}/train.txt", "--seeds", "0", "1", "--output", "{out}"],
     "--validation is missing"),
    (["train", "--model", "{world}/base", "--data", "{world}/train.txt", "--class-weights", "1", "--output", "{out}"],
     "a number for each of 0, 1, 2"),
    (["train", "--output", "{out}", "--resume"], "no training run"),
    (["evaluate", "{world}/run", "--data", "{world}/test.txt"], "labels that are all alike are placeholders"),
    (["evaluate", "{world}/run", "--data", "{world}/dev.txt", "--output", "{world}/base"], "exists already"),
    (["evaluate", "{world}/base", "--data", "{world}/dev.txt"], "without a classification head"),
    (["predict", "{world}/run"], "give either --data, texts to label, or --text"),
    (["predict", "{world}/run", "--data", "{world}/dev.txt", "--output", "{world}/dev.txt"], "pass --overwrite"),
    (["zero-shot", "{world}/run", "--data", "{world}/dev.txt"], "has a classification head"),
    (["zero-shot", "{world}/base", "--data", "{world}/dev.txt", "--suffix", "why " * 90], "shorten the suffix"),
    (["zero-shot", "{world}/base", "--data", "{world}/dev.txt", "--labels", "a", "b"], "is none of a, b"),
    (["zero-shot", "{world}/base", "--data", "{world}/dev.txt", "--label-mapping", "{world}/map.json", "--labels", "a",
      "b"], "--labels has 2 words, but there are 3 labels"),
    (["zero-shot", "{world}/base", "--data", "{world}/dev.txt", "--sequence-length", "99"], "=99 is more"),
])  # fmt: skip
def test_a_mistake_is_one_line(world, capsys, tmp_path, arguments, message):
    out = tmp_path / "out"
    status = main(["classify", *(each.format(world=world, out=out) for each in arguments)])
    printed = capsys.readouterr().err.strip()
    assert status == 2
    assert message in printed
    assert printed.startswith("error: ")
    assert "\n" not in printed
    assert not out.exists()
