"""Continuations and multiple choice: log-likelihoods against float64 numpy, the shares and their errors, the files."""

import json
import math
import statistics

import numpy as np
import pytest

from llamita.backend.torch.infer.runner import runner_over
from llamita.backend.torch.model import weights
from llamita.cli.main import main
from llamita.data import meadow
from llamita.evaluation import multiple_choice, records
from llamita.evaluation.continuations import Pair, encode_pair, score
from llamita.evaluation.multiple_choice import Question, read_questions, standard_error
from llamita.model.config import ModelConfig
from llamita.text.bpe import train_bpe_from_iterator
from tests import reference
from tests.training.helpers import config, train

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=24,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def arrays():
    return weights.to_host_arrays(weights.build_model(MODEL))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_from_iterator(meadow.corpus(0, 50, "train"), MODEL.vocab_size)


def expected(arrays, pair):
    """Nats of a continuation and whether it is greedy, in float64, the pair alone."""
    tokens = [*pair.context, *pair.continuation][-(MODEL.max_position_embeddings + 1) :]
    values = {name: array.to_numpy().astype(np.float64) for name, array in arrays.items()}
    logits_TV = reference.forward(MODEL, values, np.array(tokens[:-1]))["logits"]
    log_p_TV = logits_TV - np.log(np.exp(logits_TV - logits_TV.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p_TV -= logits_TV.max(-1, keepdims=True)
    size = len(pair.continuation)
    rows, targets = log_p_TV[-size:], tokens[-size:]
    return rows[np.arange(size), targets].sum(), bool((rows.argmax(-1) == targets).all())


def test_likelihoods_are_those_of_each_pair_alone(arrays):
    draw = np.random.default_rng(3)
    sizes = [(1, 1), (5, 3), (20, 4), (21, 4), (40, 6), (2, 24), (9, 1), (60, 1)]  # some too long, so cut off
    pairs = [Pair(*(draw.integers(0, 300, size).tolist() for size in both)) for both in sizes]
    logits = runner_over(MODEL, arrays).forward([pairs[1].context])["logits"]
    pairs.append(Pair(pairs[1].context, [int(logits[0, -1].argmax())]))  # a greedy one
    found = score(runner_over(MODEL, arrays), pairs, MODEL.vocab_size, MODEL.max_position_embeddings)
    for likelihood, pair in zip(found, pairs, strict=True):
        nats, greedy = expected(arrays, pair)
        assert likelihood.nats == pytest.approx(nats, abs=1e-4)
        assert likelihood.greedy == greedy
    assert found[-1].greedy
    with pytest.raises(ValueError, match="25 tokens does not fit"):
        score(runner_over(MODEL, arrays), [Pair([1], [2] * 25)], MODEL.vocab_size, 24)


def test_a_pair_is_cut_as_one_text(tokenizer):
    whole = tokenizer.encode("the fox has a kite")
    pair = encode_pair(tokenizer.encode, "the fox has ", "a kite")
    assert [*pair.context, *pair.continuation] == whole
    assert tokenizer.decode(pair.continuation) == " a kite"


class Favourite:
    """A model whose likeliest next token is always the same, each other half as likely as the one before."""

    def forward(self, tokens_BT):
        B, T = np.shape(tokens_BT)
        return {"logits": np.broadcast_to(-np.arange(10.0) * math.log(2), (B, T, 10)).astype(np.float32)}


def test_the_shares_and_their_errors():
    def encode(text):  # a token a letter, from the alphabet
        return [ord(letter) - ord("a") + 1 if letter.isalpha() else 0 for letter in text]

    asked = [
        Question("a", ("b", "c"), 0),  # the likelier one
        Question("a", ("b", "c"), 1),
        Question("a", ("d", "bb"), 0),  # the longer is likelier a letter, and less likely as a whole: 4 + 2 halvings
        Question("a", ("gggg", "bc", "f"), 1),
    ]
    found = multiple_choice.evaluate(Favourite(), encode, asked, 10, 100)
    log2 = [[likelihood.nats / math.log(2) for likelihood in row] for row in found.likelihoods]
    base = math.log2(sum(2.0**-i for i in range(10)))
    assert log2[2] == pytest.approx([-4 - 2 * base, -4 - 3 * base], abs=1e-5)
    assert (found.accuracy, found.accuracy_norm) == (0.75, 0.5)
    assert found.accuracy_stderr == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert found.accuracy_norm_stderr == pytest.approx(statistics.stdev([1, 0, 0, 1]) / 2)
    assert found.chance == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert standard_error([1.0]) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[]", "expected an object"),
        ({"choices": ["a", "b"], "answer": 0}, "`question` or `context`"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "`question` or `context`"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "none of them empty"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "its index from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "its index from 0 to 1"),
        ({"question": "q", "choices": ["a", "a"], "answer": "a"}, "one of the choices"),
        ({"question": "q", "choices": ["a", "b"]}, "answer=None"),
    ],
)
def test_a_line_that_is_no_question_is_named(line, message, tmp_path):
    good = json.dumps({"question": "q", "choices": ["a", "b"], "answer": "b"})
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "questions.jsonl").write_text(f"{good}\n\n{text}\n")
    with pytest.raises(ValueError, match=r"questions.jsonl, line 3(: | is not JSON: )") as error:
        read_questions(tmp_path / "questions.jsonl")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert read_questions(tmp_path / "questions.jsonl", limit=1) == [Question("Question: q\nAnswer:", ("a", "b"), 1)]


def test_only_line_ends_end_a_line(tmp_path):
    question = {"question": "a\u2028b\u0085c", "choices": ["a", "b"], "answer": "b"}
    (tmp_path / "questions.jsonl").write_text("\ufeff" + json.dumps(question, ensure_ascii=False) + "\n", "utf-8")
    assert [each.prompt for each in read_questions(tmp_path / "questions.jsonl")] == [
        "Question: a\u2028b\u0085c\nAnswer:"
    ]


def test_the_command_leaves_its_figures_in_the_run(tmp_path, tokenizer, capsys, arrays):
    from llamita.storage import model_directory

    run = tmp_path / "run"
    train(config(run, steps=2, evaluate_every=0))
    model = run / "checkpoints/step-00000002"  # a model with words in the place of the run's, which has none
    model_directory.save_config(model, MODEL)
    model_directory.save_tensors(model, arrays)
    tokenizer.save(model)
    lines = [{"context": f"the {who} has a", "choices": ["kite", "red ball"], "answer": 0} for who in ("fox", "owl")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["evaluate", str(run), "--task", "multiple-choice", "--data", str(tmp_path / "questions.jsonl")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    [record], faults = records.read(run)
    assert faults == []
    assert (record.name, record.model) == ("multiple-choice questions", "checkpoints/step-00000002")
    assert record.metrics["questions"] == 2
    pairs = [
        encode_pair(lambda text: tokenizer.encode(text, bos=True), line["context"], f" {choice}")
        for line in lines
        for choice in line["choices"]
    ]
    nats = [expected(arrays, pair)[0] for pair in pairs]
    assert record.metrics["accuracy"] == np.mean([nats[0] > nats[1], nats[2] > nats[3]])
    assert main([*command, "--bos", "never", "--name", "bare"]) == 0
    assert {one.name for one in records.read(run)[0]} == {"multiple-choice questions", "bare"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "frobnicate"], "is unknown"),
        (["--task", "lm-eval:"], "names no task"),
        (["--task", "multiple-choice"], "--data is missing"),
        ([], "--data is missing"),
        (["--task", "multiple-choice", "--data", "nowhere"], "there is no file nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "model", *arguments]) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors
    assert "\n" not in errors
