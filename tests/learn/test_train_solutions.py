"""The training track's solutions against other people's code: tokenizers, PyTorch, peft, transformers, numpy."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch.nn import functional as F

from llamita.data import meadow
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig
from llamita.evaluation.calibration import fit_temperature
from llamita.learn import track
from llamita.learn.figures import drawings
from llamita.learn.harness import assembled, installed
from llamita.learn.track import Sources, solutions_of, sources_of

TRACK = track.find("train")
EXERCISES = sorted({lesson.file.removesuffix(".py") for lesson in TRACK.lessons})
FREE = ("bpe", "schedule", "instructions", "calibration", "config", "batches", "train", "tune", "classify")
"""The files that need no framework, or only through framework.py."""
SPLIT = pre_tokenizers.Split(tokenizers.Regex(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+"), "isolated")
ALPHABET = [chr(0x100 + byte) for byte in range(256)]
"""A character for each byte, in the order of the bytes, so that tokenizers settles ties as the course does."""
TEXT = (
    "".join(meadow.corpus(3, 8, "train"))
    + (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")[:5000]
    + "Zoë ate 3 crêpes — 日本語のテキスト、aaaa aaaaaa aaa 🦙🦙\n\n\tend  \n"
)


def files(framework: str) -> Sources:
    own = sources_of((TRACK.directory / framework / "grader").glob("*.py"))
    return {**solutions_of(TRACK.directory, framework), **own}


def as_characters(word: str) -> str:
    return "".join(ALPHABET[byte] for byte in word.encode("utf-8"))


LOADED: dict[str, SimpleNamespace] = {}


@pytest.fixture(params=TRACK.frameworks)
def solved(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The solutions in a framework, `tensors`, and its `name`."""
    name: str = request.param
    pytest.importorskip({"mlx": "mlx.core"}.get(name, name))
    if name not in LOADED:
        LOADED[name] = assembled(files(name), [*EXERCISES, "tensors", "llama", "framework", "config", "batches"])
        LOADED[name].name = name
    return LOADED[name]


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_lessons_name_the_checks_that_there_are(solved: Any) -> None:
    own = sources_of(TRACK.directory.glob("*.py"))
    checks = assembled({**files(solved.name), **own}, ["checks"]).checks.CHECKS
    named = [(lesson.file, name) for lesson in TRACK.lessons for name in lesson.checks]
    assert named == [(f"{check.file}.py", check.name) for check in checks]


def test_lessons_have_a_check_and_a_figure() -> None:
    drawn = drawings(TRACK.directory)
    for lesson in TRACK.lessons:
        assert "**Try.**" in lesson.text
        assert f"llamita learn check {lesson.name}" in lesson.text
        assert f"`{lesson.file}`" in lesson.text
        assert f"]({lesson.name}.svg)" in lesson.text
        assert lesson.name in drawn


@pytest.mark.medium
def test_figures_are_drawn() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, draw in drawings(TRACK.directory).items():
        figure = Figure(figsize=(7, 3), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        assert np.asarray(canvas.buffer_rgba()).std() > 5, name


def test_both_frameworks_have_the_same_files_and_signatures() -> None:
    torch_files, mlx_files = TRACK.solutions("torch"), TRACK.solutions("mlx")
    assert torch_files.keys() == mlx_files.keys()
    for name in FREE:
        assert torch_files[f"{name}.py"] == mlx_files[f"{name}.py"], name
    for name, text in torch_files.items():

        def signatures(source: str) -> list[str]:
            found = re.findall(r"^ *def (.*?):\n", source.replace("mx.array", "Tensor"), re.MULTILINE | re.DOTALL)
            return [re.sub(r",?\s+", " ", each).replace("( ", "(").replace(" )", ")") for each in found]

        assert signatures(text) == signatures(mlx_files[name]), name


def test_words_are_those_of_tokenizers(solved: Any) -> None:
    assert solved.bpe.words_of(TEXT) == [word for word, _ in SPLIT.pre_tokenize_str(TEXT)]
    story = meadow.story(1, 2)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(story)
    assert solved.bpe.words_of(story) == [word.replace("Ġ", " ") for word, _ in gpt2]


def test_merges_are_those_of_tokenizers(solved: Any) -> None:
    merges = solved.bpe.train([TEXT], 256 + 150)
    texts = ["\n".join(as_characters(word) for word, _ in SPLIT.pre_tokenize_str(TEXT))]
    other = tokenizers.Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    other.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=256 + 150, min_frequency=2, initial_alphabet=ALPHABET, show_progress=False),
    )
    vocabulary = other.get_vocab()
    names = [*ALPHABET, *[""] * 150]
    for place, (first, second) in enumerate(merges):
        names[256 + place] = names[first] + names[second]
    assert len(merges) == 150
    assert {name: place for place, name in enumerate(names)} == vocabulary


def test_tokens_are_those_of_tokenizers_and_come_back(solved: Any) -> None:
    merges = solved.bpe.train([TEXT], 256 + 200)
    names = [*ALPHABET]
    for first, second in merges:
        names.append(names[first] + names[second])
    vocabulary = {name: place for place, name in enumerate(names)}
    other = tokenizers.Tokenizer(models.BPE(vocabulary, [(names[first], names[second]) for first, second in merges]))
    unseen = (Path(__file__).parents[2] / "docs" / "sft.md").read_text("utf-8") + "ρόδο 北京"
    for text in (TEXT, unseen, ""):
        tokens = solved.bpe.encode(text, merges)
        words = [as_characters(word) for word, _ in SPLIT.pre_tokenize_str(text)]
        assert tokens == other.encode(words, is_pretokenized=True).ids
        assert solved.bpe.decode(tokens, merges) == text
        assert solved.batches.encoder(merges)(text) == tokens


def test_the_loss_is_pytorchs(solved: Any) -> None:
    logits, labels = 3 * numbers(1, 4, 9, 13), np.random.default_rng(2).integers(0, 13, (4, 9))
    labels[np.random.default_rng(3).random((4, 9)) < 0.4] = -100
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(x.flatten(0, 1), torch.tensor(labels).flatten(), ignore_index=-100)
    (gradient,) = torch.autograd.grad(expected, x)
    tensor = solved.tensors.tensor
    value, gradients = solved.framework.value_and_gradients(
        lambda given: solved.loss.cross_entropy(given["x"], tensor(labels)), {"x": tensor(logits)}
    )
    np.testing.assert_allclose(solved.tensors.array(value), expected.item(), rtol=1e-6)
    np.testing.assert_allclose(solved.tensors.array(gradients["x"]), gradient.numpy(), atol=1e-7)
    large = solved.loss.summed_cross_entropy(tensor(logits + 1e4), tensor(labels))
    np.testing.assert_allclose(solved.tensors.array(large), expected.item() * (labels != -100).sum(), rtol=1e-3)


def test_adamw_is_pytorchs(solved: Any) -> None:
    parameters = {"matrix": numbers(1, 3, 4), "norm": numbers(2, 5)}
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
    other = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in parameters.items()}
    reference = torch.optim.AdamW(
        [{"params": [other["matrix"]], "weight_decay": 0.3}, {"params": [other["norm"]], "weight_decay": 0.0}],
        **options,
    )
    mine = {name: solved.tensors.tensor(value) for name, value in parameters.items()}
    optimizer = solved.adamw.AdamW(0.8, 0.95, 1e-3, 0.3)
    for step in range(20):
        gradients = {name: numbers(10 + step, *value.shape) for name, value in parameters.items()}
        for name, value in gradients.items():
            other[name].grad = torch.tensor(value)
        reference.step()
        mine = optimizer.update(mine, {name: solved.tensors.tensor(each) for name, each in gradients.items()}, 0.05)
    for name in parameters:
        np.testing.assert_allclose(solved.tensors.array(mine[name]), other[name].detach().numpy(), atol=2e-6)


def test_the_schedules_cosine_is_pytorchs(solved: Any) -> None:
    warmup, steps, peak, minimum = 5, 40, 0.3, 0.02
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, minimum)
    for step in range(steps):
        mine = solved.schedule.learning_rate(step, peak, minimum, warmup, steps)
        if step < warmup:
            assert math.isclose(mine, peak * (step + 1) / warmup)
        else:
            optimizer.step()
            other.step()
            assert math.isclose(mine, other.get_last_lr()[0], rel_tol=1e-9)
    assert math.isclose(mine, minimum)


@pytest.mark.parametrize("limit", [0.1, 3.0, 1000.0])
def test_clipping_is_pytorchs(limit: float, solved: Any) -> None:
    gradients = {"matrix": numbers(1, 3, 4), "vector": 2 * numbers(2, 5)}
    other = [torch.nn.Parameter(torch.zeros(value.shape)) for value in gradients.values()]
    for parameter, value in zip(other, gradients.values(), strict=True):
        parameter.grad = torch.tensor(value)
    expected = torch.nn.utils.clip_grad_norm_(other, limit)
    mine, norm = solved.clipping.clipped({name: solved.tensors.tensor(each) for name, each in gradients.items()}, limit)
    np.testing.assert_allclose(solved.tensors.array(norm), expected.item(), rtol=1e-6)
    for parameter, value in zip(other, mine.values(), strict=True):
        np.testing.assert_allclose(solved.tensors.array(value), parameter.grad.numpy(), rtol=1e-5)


def test_parts_give_the_gradients_of_the_whole(solved: Any) -> None:
    x, labels = numbers(1, 7, 4), np.array([0, 2, -100, 1, -100, -100, 2])
    weight = torch.tensor(numbers(2, 4, 3), requires_grad=True)
    expected = F.cross_entropy(torch.tensor(x) @ weight, torch.tensor(labels), ignore_index=-100)
    (gradient,) = torch.autograd.grad(expected, weight)
    tensor = solved.tensors.tensor
    parts = [SimpleNamespace(x=tensor(x[a:b]), labels=tensor(labels[a:b])) for a, b in ((0, 2), (2, 3), (3, 7))]

    def summed_loss(parameters: Any, batch: Any) -> Any:
        return solved.loss.summed_cross_entropy((batch.x @ parameters["w"])[None], batch.labels[None])

    loss, found = solved.loop.mean_gradients(summed_loss, {"w": tensor(weight.detach().numpy())}, parts)
    np.testing.assert_allclose(solved.tensors.array(loss), expected.item(), rtol=1e-6)
    np.testing.assert_allclose(solved.tensors.array(found["w"]), gradient.numpy(), atol=1e-6)


def test_packed_rows_are_the_librarys(solved: Any) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(1, 90, size).tolist() for size in (5, 1, 12, 3, 3, 20, 2)]
    length = 5  # a divisor of the stream's 46 tokens less one, so that the library's last row is not moved back
    rows, owners = solved.packing.packed(documents, length, 99)
    other = Rows(InMemoryDocuments(documents), RowsConfig("pack", length, within_documents=True))
    assert len(rows) == len(other)
    labels = solved.packing.packed_labels(solved.tensors.tensor(rows), solved.tensors.tensor(owners))
    for mine, whose, scored, row in zip(rows, owners, solved.tensors.array(labels), other, strict=True):
        assert mine == row.tokens.tolist()
        assert whose == row.segments.tolist()
        np.testing.assert_array_equal(scored, np.where(row.label_mask[1:], row.tokens[1:], -100))


def small(solved: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Sizes, and parameters large enough for differences to show."""
    sizes = solved.config.Sizes(vocab_size=23, width=16, layers=2, heads=4, key_value_heads=2, hidden=24)
    shapes = solved.llama.shapes(sizes).items()
    return sizes, {name: numbers(place, *shape) * 0.3 + (len(shape) == 1) for place, (name, shape) in enumerate(shapes)}


def test_packed_documents_are_computed_as_if_alone(solved: Any) -> None:
    sizes, values = small(solved)
    parameters = {name: solved.tensors.tensor(value) for name, value in values.items()}
    documents = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    rows, owners = solved.packing.packed(documents, 8, 22)
    tensor = solved.tensors.tensor
    batch = solved.batches.batch_of(tensor(rows), tensor(rows), tensor(owners))
    got = solved.tensors.array(solved.llama.logits_of(parameters, sizes, batch.tokens, batch.positions, batch.mask))
    start = 0
    for document in documents:
        one = solved.batches.batch_of(tensor([document]), tensor([document]), tensor([[1] * len(document)]))
        alone = solved.llama.logits_of(parameters, sizes, one.tokens, one.positions, one.mask)
        np.testing.assert_allclose(got[0, start : start + len(document)], solved.tensors.array(alone)[0], atol=2e-5)
        start += len(document)


@pytest.mark.medium
def test_the_given_model_has_the_logits_of_transformers(solved: Any) -> None:
    transformers = pytest.importorskip("transformers")
    sizes, values = small(solved)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=sizes.epsilon, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.theta},
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).eval()
    names = {"embedding": "model.embed_tokens", "norm": "model.norm"}
    parts = {
        "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj", "value": "self_attn.v_proj", "output": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for name, value in values.items():
        layer, _, part = name.partition(".")
        key = names.get(name) or f"model.layers.{layer}.{parts[part]}"
        state[f"{key}.weight"] = torch.tensor(value)
    reference.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    tokens = np.random.default_rng(0).integers(0, 23, (3, 7))
    tensor = solved.tensors.tensor
    batch = solved.batches.batch_of(tensor(tokens), tensor(tokens), tensor(np.ones_like(tokens)))
    parameters = {name: tensor(value) for name, value in values.items()}
    got = solved.llama.logits_of(parameters, sizes, batch.tokens, batch.positions, batch.mask)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(solved.tensors.array(got), expected, atol=1e-4)


def test_a_conversations_labels_are_what_the_assistant_says(solved: Any) -> None:
    inputs, labels = solved.instructions.inputs_and_labels(
        [("user", [10, 11]), ("assistant", [20])], {"user": 1, "assistant": 2}, 3
    )
    assert inputs == [1, 10, 11, 3, 2, 20]
    assert labels == [-100, -100, -100, -100, 20, 3]
    turns = [("assistant", [30, 31]), ("user", []), ("assistant", []), ("assistant", [32])]
    inputs, labels = solved.instructions.inputs_and_labels(turns, {"user": 1, "assistant": 2}, 3)
    assert inputs == [2, 30, 31, 3, 1, 3, 2, 3, 2, 32]
    assert labels == [30, 31, 3, -100, -100, -100, 3, -100, 32, 3]


@pytest.mark.medium
def test_an_adapter_is_pefts(solved: Any) -> None:
    peft = pytest.importorskip("peft")
    layers = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
    weight = layers[0].weight.detach().numpy().copy()
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, lora_alpha=7, target_modules=["0"]))
    a, b, x = numbers(1, 2, 6), numbers(2, 4, 2), numbers(3, 5, 6)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.tensor(a), torch.tensor(b)
    tensor = solved.tensors.tensor
    with torch.no_grad():
        expected = model(torch.tensor(x)).numpy()
    got = solved.lora.adapted(tensor(x), tensor(weight), tensor(a), tensor(b), 7.0)
    np.testing.assert_allclose(solved.tensors.array(got), expected, atol=1e-5)
    whole = solved.lora.merged_weight(tensor(weight), tensor(a), tensor(b), 7.0)
    merged = model.merge_and_unload()[0].weight.detach().numpy()
    np.testing.assert_allclose(solved.tensors.array(whole), merged, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_can_learn(solved: Any) -> None:
    uniform = np.random.default_rng(0).random((8, 400))
    a, b = solved.lora.fresh_factors(solved.tensors.tensor(uniform), 30)
    values = solved.tensors.array(a)
    assert np.abs(values).max() <= 1 / 20
    np.testing.assert_allclose(values.std(), 1 / 20 / math.sqrt(3), rtol=0.02)
    assert solved.tensors.array(b).shape == (30, 8)
    assert not solved.tensors.array(b).any()


def test_preferences_are_pytorchs(solved: Any) -> None:
    logits, labels = 2 * numbers(1, 4, 6, 9), np.random.default_rng(0).integers(0, 9, (4, 6))
    labels[:, :2] = -100
    tensor, array = solved.tensors.tensor, solved.tensors.array
    losses = F.cross_entropy(torch.tensor(logits).mT, torch.tensor(labels), ignore_index=-100, reduction="none")
    got = solved.dpo.answer_log_probs(tensor(logits), tensor(labels))
    np.testing.assert_allclose(array(got), -losses.sum(-1).numpy(), rtol=1e-5)
    four = [4 * numbers(seed, 5) - 20 for seed in range(4)]
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor(each, dtype=torch.float64) for each in four)
    margin = chosen - rejected - (reference_chosen - reference_rejected)
    expected = -F.logsigmoid(0.3 * margin).mean()
    np.testing.assert_allclose(array(solved.dpo.dpo_loss(*map(tensor, four), 0.3)), expected.item(), rtol=1e-5)


def test_a_classifier_is_pytorchs_however_it_is_padded(solved: Any) -> None:
    hidden, weight, bias = numbers(1, 3, 4), numbers(2, 5, 4), numbers(3, 5)
    real = np.zeros((3, 9), dtype=bool)
    padded = numbers(4, 3, 9, 4)
    for row, (first, last) in enumerate(((0, 8), (2, 5), (7, 7))):
        real[row, first : last + 1] = True
        padded[row, last] = hidden[row]
    tensor, array, labels = solved.tensors.tensor, solved.tensors.array, np.array([4, 0, 2])
    got = solved.classifier.class_log_probs(tensor(padded), tensor(real), tensor(weight), tensor(bias))
    expected = F.log_softmax(F.linear(*map(torch.tensor, (hidden, weight, bias))), dim=-1)
    np.testing.assert_allclose(array(got), expected.numpy(), atol=1e-5)
    loss = solved.classifier.classification_loss(got, tensor(labels))
    np.testing.assert_allclose(array(loss), F.nll_loss(expected, torch.tensor(labels)).item(), rtol=1e-5)


def test_calibration_is_a_loop_over_texts_and_the_librarys_temperature(solved: Any) -> None:
    random = np.random.default_rng(5)
    logits, labels = 3 * random.normal(size=(150, 4)), random.integers(0, 4, 150)
    labels[:90] = logits[:90].argmax(axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for bins in (1, 7, 10):
        sums = [[0, 0.0, 0] for _ in range(bins)]  # texts, confidence, right ones
        for row, label in zip(probabilities, labels, strict=True):
            confidence = max(row)
            k = next(k for k in range(bins) if k / bins < confidence <= (k + 1) / bins)
            sums[k][0] += 1
            sums[k][1] += confidence
            sums[k][2] += int(np.argmax(row) == label)
        expected = sum(abs(right - confidence) for _, confidence, right in sums) / len(labels)
        got = solved.calibration.expected_calibration_error(probabilities, labels, bins)
        assert math.isclose(got, expected, rel_tol=1e-9)
    temperature = solved.calibration.fitted_temperature(logits, labels)
    assert math.isclose(temperature, fit_temperature(logits, labels), rel_tol=1e-6)
    around = [
        F.cross_entropy(torch.tensor(logits / t), torch.tensor(labels)) for t in np.array([0.98, 1, 1.02]) * temperature
    ]
    assert around[1] == min(around)


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "solved",
    [pytest.param("torch", marks=pytest.mark.medium), pytest.param("mlx", marks=pytest.mark.slow)],
    indirect=True,
)
@pytest.mark.usefixtures("in_a_folder")
def test_the_programs_train_tune_and_classify(
    solved: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run of each: the loss falls, the merged model is the adapted one, what was saved is read again."""

    def run(program: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [program, *arguments])
        with installed(files(solved.name)):
            exec(compile(files(solved.name)[program][1], program, "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    with pytest.raises(ValueError, match=r"trained.npz and merges.json are not here; python train.py writes them"):
        run("tune")
    out = run("train", "--steps", "12", "--stories", "60")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", out)]
    assert losses[-1] < losses[0] - 1
    assert re.search(r"held out: \S+ nats a character; no model can have less than 0.08", out)
    out = run("tune", "--steps", "4", "--preference-steps", "2", "--rank", "2")
    before, after, merged = re.findall(r": (\S+) nats a token", out)
    assert float(after) < float(before)
    assert merged == after
    assert re.search(r"step +0  loss 0.693", out)  # the reference is the model itself at first: log 2
    out = run("classify", "--steps", "3", "--stories", "20")
    assert re.search(r"held out: \S+% of 200 texts right; the temperature of the others is \S+", out)
