"""Reinforcement as a run: rewards rise, samples follow from seed and step, runs resume exactly, errors name samples."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from llamita.backend.torch.train.step import build_train_step
from llamita.cli.rl import load_reward
from llamita.data.batches import IGNORE_INDEX
from llamita.data.preferences import Layout
from llamita.data.prompts import Prompt
from llamita.storage import model_directory
from llamita.text.chat import Chat
from llamita.text.chat_templates import BUILT_IN
from llamita.text.tokenizer import Tokenizer
from llamita.training import metrics
from llamita.workflows import rewards, rollouts
from llamita.workflows.options import resolve
from llamita.workflows.reinforcement import RlConfig, reinforce
from llamita.workflows.rewards import Reward, Sample
from llamita.workflows.rollouts import Answerer, Rules
from tests.training.helpers import QUICK, Altered, Silence, timeless, weights_of
from tests.workflows.test_sft import save_model


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    directory = tmp_path_factory.mktemp("given")
    lines = [json.dumps({"prompt": f"Number {i}: ", "answer": "e", "most": i}) for i in range(24)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return SimpleNamespace(model=save_model(directory / "model"), prompts=directory / "prompts.jsonl")


def vowels(sample):
    """The share of an answer's letters that are vowels: what any model can learn."""
    return sum(letter in "aeiou" for letter in sample.answer) / max(1, len(sample.answer))


def rewarding(function):
    return lambda name: Reward(name, function, "a hash")


def config(given, output, **changes):
    values = {
        "model": given.model,
        "data": (str(given.prompts),),
        "reward": "vowels",
        "output": output,
        "steps": 6,
        "batch_size": 8,
        "group": 4,
        "max_tokens": 6,
        "validation_share": 0.2,
        "evaluate_every": 3,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "learning_rate": 3e-3,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    }
    return resolve(RlConfig, **values | changes)


def tune(config, backend=QUICK, reward=vowels):
    return reinforce(config, backend, rewarding(reward), report=lambda text: None, display=Silence())


@pytest.mark.medium
@pytest.mark.parametrize("changes", [{}, {"updates": 3, "kl_weight": 0.01, "normalization": "token"}])
def test_rewards_rise(given, tmp_path, changes):
    chosen = config(
        given, tmp_path / "run", steps=24, batch_size=32, group=8, learning_rate=0.02, evaluate_every=8, **changes
    )
    result = tune(chosen)
    records = metrics.read_records(tmp_path / "run/metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["reward"] > train[0]["reward"] + 0.3
    assert result.best.measures["reward"] > train[0]["reward"] + 0.3
    assert result.best.loss == pytest.approx(-result.best.measures["reward"], abs=0.1)
    assert {"reward", "reward_std", "no_signal", "length", "cut_off", "clipped", "ratio"} <= train[0].keys()
    assert train[0]["ratio"] == pytest.approx(1, abs=1e-4)  # nothing has changed since the answers were drawn
    if changes:
        assert train[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert train[-1]["kl"] > 0.01
        assert any(record["clipped"] > 0 for record in train)
    samples = (tmp_path / "run/samples.txt").read_text()
    assert samples.count("=== step") == 3
    assert samples.count("(reward ") >= 3


def stopping(after):
    """A backend whose step fails after some updates, as a crash would."""

    def break_off(step):
        update = step.step

        def fail(*arguments):
            if step.optimizer.t >= after:
                raise RuntimeError("the power went")
            return update(*arguments)

        step.step = fail

    return Altered(break_off)


@pytest.mark.parametrize("changes", [{}, {"updates": 2, "kl_weight": 0.1, "micro_batch_size": 3}])
def test_a_run_cut_short_resumes_to_the_same_bytes(given, tmp_path, changes):
    """With two updates from a round, the fifth is in its midst: what was drawn comes out of the checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(config(given, whole, **changes))
    with pytest.raises(RuntimeError, match="the power went"):
        tune(config(given, cut, **changes), stopping(5))
    judged = []
    tune(resolve(RlConfig, output=cut, resume=True), reward=lambda sample: judged.append(sample) or vowels(sample))
    assert weights_of(cut / "last") == weights_of(whole / "last")
    assert timeless(cut) == timeless(whole)
    assert (cut / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    drawn = 0 if changes else 8
    held_out = sum(record["targets"] for record in timeless(whole) if record["kind"] == "evaluation") // 2
    assert len(judged) == drawn + held_out


def test_micro_batches_change_nothing_but_rounding(given, tmp_path):
    for size in (8, 3):
        tune(config(given, tmp_path / str(size), micro_batch_size=size, steps=2, evaluate_every=0))
    whole, parts = (model_directory.load_tensors(tmp_path / name / "last") for name in ("8", "3"))
    for name, array in whole.items():
        np.testing.assert_allclose(parts[name].to_numpy(), array.to_numpy(), atol=1e-4, err_msg=name)


# --- samples ----------------------------------------------------------------------------------------------------------


def answerer(given, reward=vowels, **changes):
    step = build_train_step(
        model_directory.load_config(given.model),
        model_directory.load_tensors(given.model),
        precision="fp32",
        device="cpu",
    )
    rules = {"prompts": 2, "group": 3, "updates": 1, "max_tokens": 6, "temperature": 1.0, "seed": 5,
             "by_answer": True, "micro_batch_size": 8}  # fmt: skip
    layout = Layout(Tokenizer.load(given.model), None)
    return Answerer(Rules(**rules | changes), step, layout, Reward("a reward", reward))


PROMPTS = [Prompt(({"role": "user", "content": text},), {"id": text}, text) for text in ("One ", "Two two two ", "3 ")]


def test_a_batch_scores_what_the_engine_drew(given):
    """Tokens, labels and their places: the log-probabilities are those that the engine reports of its own tokens."""
    asker = answerer(given)
    answers = asker.answer(PROMPTS, [0, 2], [7, 8], 3)
    assert [each.prompt for each in answers] == [0, 0, 0, 2, 2, 2]
    batch = asker.batch(PROMPTS, answers, range(6))
    found_BT = rollouts.score(asker.step, batch, 4)
    llm = rollouts.LLM(asker.step.runner(), asker.layout.tokenizer)
    for row, each in enumerate(answers):
        scored = batch.labels_BT[row] != IGNORE_INDEX
        assert tuple(batch.labels_BT[row][scored]) == each.tokens
        prompt = asker.layout.prompt(PROMPTS[each.prompt].said)
        assert tuple(batch.tokens_BT[row][: len(prompt)]) == prompt
        params = rollouts.SamplingParams(max_tokens=6, seed=[7, 8][row // 3] + row % 3)
        again = llm.generate(prompt, params)
        assert again.token_ids == each.tokens
        np.testing.assert_allclose(found_BT[row][scored], again.logprobs, atol=1e-4)
    assert batch.extras["advantages_B"].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_answer_holds_the_token_that_ends_it(given):
    asker = answerer(given, max_tokens=100)
    answers = asker.answer(PROMPTS, [0], [1], 12)
    ended = [each for each in answers if each.ended]
    assert ended
    assert all(each.tokens[-1] == asker.layout.tokenizer.eos_id for each in ended)


def test_answers_to_messages_end_with_the_turn(given):
    """The model's end of a turn, not one that the template spells, and what was said goes through the template."""
    asker = answerer(given, reward=rewards.exact, max_tokens=100)
    chat = Chat(asker.layout.tokenizer, "plain-eos")
    asker.layout = Layout(asker.layout.tokenizer, chat)
    said = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
    answers = asker.answer([Prompt(said, {"answer": "never so"}, "x")], [0], [4], 12)
    batch = asker.batch([Prompt(said, {}, "x")], answers, [0.0] * 12)
    tokens = chat.encode(said).tokens
    assert all(tuple(row[: len(tokens)]) == tokens for row in batch.tokens_BT)
    assert {each.reward for each in answers} == {0.0}
    assert any(each.ended for each in answers)
    assert all(each.ended == (each.tokens[-1] == chat.end_of_turn[0][0]) for each in answers)


def test_prompts_and_seeds_are_a_function_of_seed_and_round():
    rounds = [rollouts.numbers_of_round(7, 3, 11, number) for number in range(7)]
    flat = [number for each in rounds for number in each]
    for epoch in range(3):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert rounds[4] == rollouts.numbers_of_round(7, 3, 11, 4)
    assert flat[:7] != flat[7:14]
    assert flat != [n for number in range(7) for n in rollouts.numbers_of_round(7, 3, 12, number)]
    seeds = {rollouts.seed_of(s, p, r, k) for s in range(3) for p in ("train", "x") for r in range(5) for k in range(5)}
    assert len(seeds) == 150
    assert max(seeds) + 1000 < 2**63


def test_advantages_are_rewards_within_their_group():
    """(r - mean) / (std + 1e-4) over a group, the deviation that of a sample: trl's default."""
    values = np.random.Generator(np.random.Philox(key=1)).normal(size=12)
    values[4:8] = 0.5
    groups = values.reshape(3, 4)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollouts.advantages(values.tolist(), 4), expected.ravel(), rtol=1e-12, atol=1e-12)
    answers = [rollouts.Answer(0, (1, 2), "", number != 3, value) for number, value in enumerate(values.tolist())]
    found = rollouts.metrics_of(answers, 4)
    assert found["reward"] == pytest.approx(values.mean())
    assert found["reward_std"] == pytest.approx(values.std())
    assert (found["no_signal"], found["length"], found["cut_off"]) == (pytest.approx(1 / 3), 2, pytest.approx(1 / 12))


def test_a_round_survives_json():
    numbers = np.random.Generator(np.random.Philox(key=2)).normal(size=(2, 5)).astype(np.float32)
    before = rollouts.Round([rollouts.Answer(3, (1, 2), "é", True, 0.1)], numbers, None)
    after = rollouts.Round.of_state(json.loads(json.dumps(before.state())))
    assert after.answers == before.answers
    assert (after.old_log_probs_BT == numbers).all()
    assert after.reference_log_probs_BT is None


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_what_a_reward_function_sees(given):
    seen = []
    answerer(given, reward=lambda sample: seen.append(sample) or 1).answer(PROMPTS, [1], [3], 2)
    assert [each.prompt for each in seen] == ["Two two two "] * 2
    assert [each.record for each in seen] == [{"id": "Two two two "}] * 2
    assert not any(each.ended for each in seen)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda sample: 1 / 0, r"raised ZeroDivisionError on answer 0 to .*prompts.jsonl, line \d+ \(seed \d+\): "),
        (lambda sample: float("nan"), r"is nan on answer 0 to .*prompts.jsonl, line \d+ \(seed \d+\)"),
        (lambda sample: float("inf"), r"is inf on answer 0 to"),
        (lambda sample: None, r"raised TypeError on answer 0 to"),
        (lambda sample: sample.nothing, r"raised AttributeError on answer 0 to"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_sample(given, tmp_path, function, message):
    with pytest.raises(ValueError, match=f"reward vowels {message}") as caught:
        tune(config(given, tmp_path / "run"), reward=function)
    assert "\n" not in str(caught.value)
    result = tune(resolve(RlConfig, output=tmp_path / "run", resume=True), reward=vowels)  # nothing is spoilt
    assert result.step == 6


def test_the_rewards_that_there_are(given):
    story = "\n" + rewards.meadow.story(0, 0)
    judged = [
        rewards.consistent_story(Sample("", text, {}, ended))
        for text, ended in ((story, True), (story, False), (story[:-9], True), ("", True))
    ]
    assert judged == [1, 0, 0, 0]
    judged = [
        rewards.exact(Sample("", text, {"answer": " yes"}, ended)) for text, ended in (("yes ", True), ("yes", 0))
    ]
    assert judged == [1, 0]
    with pytest.raises(ValueError, match="reward exact raised ValueError on x: the record has no field 'answer'"):
        rewards.BUILT_IN["exact"](Sample("", "", {}, True), "x")


def test_a_reward_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(sample):\n    return -len(sample.answer)\n\nnumber = 3\n")
    (tmp_path / "broken.py").write_text("import nowhere_at_all\n")
    (tmp_path / "classes.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
        "@dataclass\nclass Worth:\n    value: float\n\n\ndef three(sample):\n    return Worth(3).value\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("my_rewards:short", "my_rewards.py:short", str(tmp_path / "my_rewards.py:short")):
        found = load_reward(name)
        assert found(Sample("", "four", {}, True), "x") == -4
        assert len(found.digest) == 64
    assert load_reward("classes.py:three")(Sample("", "", {}, True), "x") == 3
    assert load_reward("meadow") is rewards.BUILT_IN["meadow"]
    for name, message in (
        ("nonsense", "reward='nonsense' is not known; use meadow, exact, module:function or file.py:function"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("my_rewards:long", "has no function 'long'"),
        ("my_rewards.py:number", "has no function 'number'"),
        ("broken.py:f", "broken.py cannot be run: ModuleNotFoundError"),
        ("nowhere_at_all:f", "cannot be imported: ModuleNotFoundError"),
    ):
        with pytest.raises((ValueError, OSError), match=message.replace(".", r"\.")):
            load_reward(name)


def test_another_reward_is_refused_when_resuming(given, tmp_path):
    tune(config(given, tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"reward\.sha256 was 'a hash' and is now 'another'"):
        reinforce(
            resolve(RlConfig, output=tmp_path / "run", resume=True),
            Altered(),
            lambda name: Reward(name, vowels, "another"),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "--data is missing: give files of prompts"),
        ({"data": ("meadow", "x.jsonl")}, "--data meadow stands alone"),
        ({"data": ("nowhere.jsonl",)}, "there is no file nowhere.jsonl"),
        ({"dataset": "x"}, "--data and --dataset are both given"),
        ({"reward": ""}, "--reward is missing: give meadow, exact"),
        ({"model": None}, "--model is missing"),
        ({"group": 1}, "group=1 must be at least 2"),
        ({"group": 3}, "batch_size=8 must be a multiple of group=3"),
        ({"group": 160, "batch_size": 160}, "group=160 must be at most 128"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"temperature": float("inf")}, "temperature=inf must be a number"),
        ({"data": ("meadow",), "template": "chatml"}, "--data meadow writes its own, so that --template would not"),
        ({"temperature": 0.0}, "temperature=0.0 must be at least 0.01"),
        ({"clip": 0.0}, "clip=0.0 must be above 0"),
        ({"max_tokens": 510}, r"line 1 has \d+ tokens, and with max_tokens=510 that is more than the model's 512"),
        ({"template": "nonsense"}, "there is no chat template 'nonsense'"),
        ({"prompts": 1, "validation_share": 0.999}, "there are no prompts to train on"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(given, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        tune(config(given, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_prompts_end_a_run_or_are_skipped_and_counted(given, tmp_path):
    data = tmp_path / "prompts.jsonl"
    bad = [
        "{",
        json.dumps({"text": "a"}),
        json.dumps({"prompt": "long " * 600}),
        json.dumps({"prompt": "b", "tools": 1}),
    ]
    data.write_text(given.prompts.read_text() + "\n".join(bad) + "\n")
    changes = {"data": (str(data),), "steps": 1, "validation_share": 0.0, "evaluate_every": 0}
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 25 is not JSON"):
        tune(config(given, tmp_path / "run", **changes))
    reported = []
    reinforce(
        config(given, tmp_path / "run", skip_bad=True, **changes), QUICK, rewarding(vowels), report=reported.append,
        display=Silence(),
    )  # fmt: skip
    assert reported[0] == "24 prompts to train on, 0 to validate on; reward vowels; 4 skipped, which cannot be laid out"
    assert [line.partition("prompts.jsonl, ")[2][:7] for line in reported[1:]] == ["line 25", "line 26", "line 28", ""]
    identity = json.loads((tmp_path / "run/run.json").read_text())["identity"]
    assert identity["prompts"] == {"train": 24, "validation": 0, "bad": 4}
    data.write_text("{\n")
    with pytest.raises(ValueError, match="there are no prompts to train on"):
        tune(config(given, tmp_path / "none", skip_bad=True, **changes))


def test_what_is_sampled_from_has_the_tools(given, tmp_path):
    """In the text that answers go on from, and in the rows that are learned."""
    step = build_train_step(model_directory.load_config(given.model), model_directory.load_tensors(given.model))
    tokenizer = Tokenizer.load(given.model)
    chat = Chat(tokenizer, "{{ tools | tojson if tools else '' }}" + BUILT_IN["plain-eos"])
    asker = Answerer(Rules(1, 2, 1, 4, 1.0, 0, True, 8), step, Layout(tokenizer, chat), Reward("vowels", vowels))
    told = Prompt(({"role": "user", "content": "a"},), {}, "x", [{"name": "look"}])
    (first, _) = answers = asker.answer([told], [0], [1], 2)
    batch = asker.batch([told], answers, [1.0, -1.0])
    text = tokenizer.decode(batch.tokens_BT[0])
    assert text.startswith('[{"name": "look"}]')
    scored = batch.labels_BT[0] != IGNORE_INDEX
    assert batch.labels_BT[0][scored].tolist() == list(first.tokens)


def test_an_exact_reward_needs_answers_before_anything_is_written(given, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "Hello", "answer": "Good day."}\n{"prompt": "Hi"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2 has no field 'answer' that is a text"):
        tune(config(given, tmp_path / "run", data=(str(data),), reward="exact", validation_share=0.0))
    assert not (tmp_path / "run").exists()
