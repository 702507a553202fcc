"""Decisions: probabilities against transformers' likelihoods, one reading of the text, heads, adapters, refusals."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.backend.torch.backend import BACKEND
from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model import lora, weights
from llamita.data import meadow
from llamita.evaluation.zero_shot import Prompt, zero_shot
from llamita.inference.config import EngineConfig
from llamita.inference.llm import LLM
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter, LoraSettings, adapter_shapes
from llamita.storage import model_directory
from llamita.storage.calibration import Calibration, QuestionTemperature
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import Chat
from llamita.text.chat_templates import BUILT_IN
from llamita.text.tokenizer import Tokenizer
from llamita.workflows import decisions
from llamita.workflows.classify import Classifier
from llamita.workflows.decisions import ContextError, decide, decide_async
from llamita.workflows.questions import Choice, Labels, Option, Predicate, Score
from tests.inference.hash_model import HashRunner, expected_targets, shape

TEXT = meadow.story(0, 1)
QUESTIONS = (
    Predicate("Is the fox sad?"),
    Choice("It is", (Option("happy"), Option("happy and proud of it all", "glad"), Option("sad"))),
    Labels("The story has", (Option("a fox"), Option("a storm", "rain and wind"))),
    Score("How long is it?", (Option("short"), Option("long"), Option("very long indeed"))),
)


def options(*values):
    return tuple(map(Option, values))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny"
    place.mkdir()
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300)
    tokenizer.save(place)
    config = ModelConfig(tokenizer.vocab_size, 32, 48, 2, 4, 2, 512, bos_token_id=tokenizer.bos_id)
    model_directory.save_config(place, config)
    model_directory.save_tensors(place, weights.to_host_arrays(weights.build_model(config, seed=3)))
    return place


@pytest.fixture(scope="module")
def llm(directory):
    return LLM.load(directory, backend=BACKEND, dtype="float32")


@pytest.fixture(scope="module")
def chatting(directory):
    """A tokenizer with a chat template."""
    tokenizer = Tokenizer.load(directory)
    tokenizer.chat_template = BUILT_IN["r0"]
    return tokenizer


@pytest.fixture(scope="module")
def theirs(directory):
    """The log-probability of an ending after a context by transformers, each computed alone."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def score(context, ending):
        with torch.inference_mode():
            logits = model(torch.tensor([[*context, *ending]])).logits[0, len(context) - 1 : -1].double()
        return float(logits.log_softmax(-1)[range(len(ending)), ending].sum())

    return score


def check(found, expected, tolerance=3e-5):
    """Probabilities agree, and so do their logarithms: some are tiny."""
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.log(found), np.log(expected), atol=tolerance)


def normalized(scores):
    p = np.exp(np.array(scores) - max(scores))
    return p / p.sum()


@pytest.mark.parametrize("values", [("happy", "sad"), ("a", "happy and proud of it"), ("sad", "sad, cold", "hot")])
def test_options_get_their_likelihoods_by_transformers(llm, theirs, values):
    """Options of one token and of many, and one that another begins with."""
    answer = decide(llm, TEXT, [Choice("That night everyone felt", options(*values))]).answers[0]
    encode, bos = llm.tokenizer.encode, llm.tokenizer.bos_id
    context = [bos, *encode(f"{TEXT} That night everyone felt")]
    endings = [encode(f" {value}") for value in values]
    assert min(map(len, endings)) < max(map(len, endings)) or values == ("happy", "sad")
    expected = normalized([theirs(context, ending) for ending in endings])
    check(answer.probabilities, expected)
    assert answer.choice == values[int(expected.argmax())]


def test_each_kind_of_question_by_transformers(llm, theirs):
    encode, bos = llm.tokenizer.encode, llm.tokenizer.bos_id

    def p(asked, *values):
        context = [bos, *encode(f"{TEXT} {asked}")]
        return normalized([theirs(context, encode(f" {value}")) for value in values])

    predicate, choice, labels, score = decide(llm, TEXT, QUESTIONS).answers
    yes = p("Is the fox sad?", "Yes", "No")[0]
    check(predicate.probability, yes)
    means = "happy and proud of it all: glad. It is"
    check(choice.probabilities, p(means, "happy", "happy and proud of it all", "sad"))
    each = [p(f"The story has {asked}?", "Yes", "No")[0] for asked in ("a fox", "a storm: rain and wind")]
    check(labels.probabilities, each)
    levels = p("How long is it?", "short", "long", "very long indeed")
    assert score.score == pytest.approx(levels[1] + 2 * levels[2], abs=1e-6)
    assert score.confidence == pytest.approx((levels.max() - 1 / 3) / (2 / 3), abs=1e-6)


def test_a_question_of_the_same_form_is_that_of_zero_shot(llm):
    words, suffix = ("happy", "sad", "proud of it"), "Is it happy or sad? It is "
    found = zero_shot(llm.runner, llm.tokenizer, [TEXT, "A fox."], words, suffix=suffix, length=512, vocab_size=300)
    for row, text in zip(found.log_probabilities, (TEXT, "A fox."), strict=True):
        answer = decide(llm, text, [Choice(suffix, options(*words))]).answers[0]
        check(answer.probabilities, np.exp(row))


@pytest.mark.parametrize("layout", ["plain", "chat"])
def test_together_alone_and_over_a_full_cache_are_the_same_bits_in_the_exact_mode(directory, chatting, layout):
    runner = BACKEND.load_runner(directory, "float32", "cpu", exact=True)

    def fresh(**config):
        return LLM(runner, chatting, engine=EngineConfig(**config))

    model = fresh()
    together = decide(model, TEXT, QUESTIONS, layout=layout)
    again = decide(model, TEXT, QUESTIONS, layout=layout)
    alone = [decide(fresh(prefix_caching=False, prefill_tokens=7), TEXT, [one], layout=layout) for one in QUESTIONS]
    asked = asyncio.run(decide_async(fresh(), TEXT, QUESTIONS, layout=layout))
    assert together.answers == again.answers == asked.answers == tuple(one.answers[0] for one in alone)
    assert again.cached_tokens > together.cached_tokens == 0
    assert together.input_tokens == again.input_tokens < sum(one.input_tokens for one in alone)


def test_in_a_chat_the_option_is_the_answer_to_a_users_turn(llm, chatting, theirs):
    model, chat = LLM(llm.runner, chatting), Chat(chatting)
    asked = "Is it so?\nAnswer Yes or No."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<r2> said he."}]

    def expected(*turns):
        prompt = chat.encode(turns).tokens
        endings = []
        for word in ("Yes", "No"):
            answered = [*turns, {"role": "assistant", "content": word}]
            whole = chat.encode(answered, add_generation_prompt=False, continue_final_message=True).tokens
            assert whole[: len(prompt)] == prompt
            endings.append(whole[len(prompt) :])
        return normalized([theirs(prompt, ending) for ending in endings])

    question = Predicate("Is it so?")
    answer = decide(model, messages, [question]).answers[0]  # the layout is chat, since there is a template
    joined = {"role": "user", "content": f"<r2> said he.\n\n{asked}"}
    check(answer.probabilities, expected(messages[0], joined))
    answered = [*messages, {"role": "assistant", "content": "Oh."}]
    answer = decide(model, answered, [question]).answers[0]
    check(answer.probabilities, expected(*answered, {"role": "user", "content": asked}))


THINKS = (
    "{{ bos_token }}{% for m in messages %}{{ '<r0>' ~ m.role ~ '<r1>' ~ m.content ~ '<r2>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<r0>assistant<r1>' }}"
    "{% if enable_thinking is not false %}{{ 'Hm.' }}{% else %}{{ '(none) ' }}{% endif %}{% endif %}"
)
COLON = "{{ bos_token }}{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # noqa: E501


def test_a_template_that_thinks_first_is_told_not_to_and_the_answer_stands_alone(directory):
    tokenizer = Tokenizer.load(directory)
    tokenizer.chat_template = THINKS
    writer = decisions._ChatTurns(Chat(tokenizer), tokenizer, [{"role": "user", "content": "Well?"}])
    (prompt,) = writer.prompts(Predicate("Is it so?"))
    assert tokenizer.decode(prompt.context).endswith("(none) ")
    assert prompt.labels == (tuple(tokenizer.encode("Yes")), tuple(tokenizer.encode("No")))


def test_an_answer_that_shares_a_token_with_the_template_is_encoded_with_it(directory):
    """ "assistant: " ends in a space, which in " Yes" belongs to the word."""
    tokenizer = Tokenizer.load(directory)
    tokenizer.chat_template = COLON
    writer = decisions._ChatTurns(Chat(tokenizer), tokenizer, [{"role": "user", "content": "Well?"}])
    (prompt,) = writer.prompts(Predicate("Is it so?"))
    start = [tokenizer.bos_id, *tokenizer.encode("user: Well?\n\nIs it so?\nAnswer Yes or No.\nassistant: Yes")]
    assert [*prompt.context, *prompt.labels[0]] == start
    assert tokenizer.decode(prompt.labels[1]) == " No"


# --- one reading of the text ----------------------------------------------------------------------------------------


def test_the_text_is_read_once_for_all_questions(directory):
    runner = HashRunner(shape(vocabulary=300, positions=512))
    tokenizer = Tokenizer.load(directory)
    model = LLM(runner, tokenizer, engine=EngineConfig(block_size=4, warm_up=False))
    text = " ".join(meadow.corpus(0, 2, "train"))
    asked = [
        Choice(f"Number {number}: it was", options("good", "bad", "a very long and unlikely answer"))
        for number in range(5)
    ]
    length = len(tokenizer.encode(text))
    found = decide(model, text, asked)
    run = sum(len(chunk.tokens) for plan in runner.recorded for chunk in plan.chunks)
    prompts = [prompt for question in asked for prompt in decisions._Plain(model, tokenizer, text).prompts(question)]
    rows = [row for prompt in prompts for row in decisions._rows(prompt)]
    assert len(rows) >= 2 * len(asked)
    assert length > 200
    assert length < found.input_tokens < 1.5 * length
    assert run <= found.input_tokens + 8 * len(rows)  # what a block holds that is not full is read again
    # All rows but the first's and the prompts' own run in as few steps as the engine's budget of tokens allows.
    assert runner.calls <= 2 + 1 + 1 + run // 512


def test_scores_are_gathered_from_the_rows_that_were_run():
    """Each label's score is the sum over its own tokens, by the hash model's definition."""
    config = shape(vocabulary=50)
    labels = ((3,), (4, 5), (4, 5, 6), (4, 7), (8, 1, 1, 1, 2))
    prompt = Prompt((1, 2, 3), labels, False)
    rows = list(decisions._rows(prompt))
    assert [row.tokens for row in rows] == [(1, 2, 3, 8, 1, 1, 1), (1, 2, 3, 4, 5)]
    log_p = {}
    for row in rows:
        request = decisions.Request(0, row.tokens, targets=row.targets)
        scores = expected_targets(request, config)
        log_p |= {(row.tokens[: t.position], t.token_id): s for t, s in zip(row.targets, scores, strict=True)}
    for label, score in zip(labels, decisions._scores(prompt, log_p), strict=True):
        targets = tuple(decisions.PromptTarget(3 + place, token_id) for place, token_id in enumerate(label))
        alone = decisions.Request(0, (*prompt.context, *label[:-1]), targets=targets)
        assert score == pytest.approx(sum(expected_targets(alone, config)))


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=8, unique=True))
@settings(max_examples=200, deadline=None)
def test_rows_judge_every_token_of_every_label_after_the_right_tokens(labels):
    rows = list(decisions._rows(Prompt((7, 7), tuple(labels), False)))
    judged = {(row.tokens[: target.position], target.token_id) for row in rows for target in row.targets}
    assert judged == {((7, 7, *label[:place]), token) for label in labels for place, token in enumerate(label)}
    for row in rows:
        assert list(row.targets) == sorted(set(row.targets))
        others = [other.tokens for other in rows if other is not row]
        assert not any(other[: len(row.tokens)] == row.tokens for other in others), "no row lies on another's way"


# --- models that were calibrated, adapted, or have a head --------------------------------------------------------


def test_a_question_that_was_calibrated_has_its_temperature(llm):
    words = options("happy", "sad")
    fitted = QuestionTemperature(2.5, "That night everyone felt", ("sad", "happy"), 100)
    model = LLM(llm.runner, llm.tokenizer, calibration=Calibration(None, (fitted,)))
    for instructions, temperature in (("That night everyone felt ", 2.5), ("Then everyone felt", 1.0)):
        plain, fit = (decide(one, TEXT, [Choice(instructions, words)]).answers[0] for one in (llm, model))
        gap = np.log(plain.probabilities[0] / plain.probabilities[1])
        assert np.log(fit.probabilities[0] / fit.probabilities[1]) == pytest.approx(gap / temperature, rel=1e-6)


def test_an_adapter_by_its_name(llm):
    config = llm.config
    factors = LoraSettings(4, 8.0).factors(config)
    random = np.random.default_rng(0)
    shapes = adapter_shapes(config, factors)
    arrays = {n: HostArray.from_numpy(random.normal(0, 0.15, s).astype(np.float32)) for n, s in shapes.items()}
    adapter = Adapter(config, factors, arrays)
    model, merged = (weights.build_model(config, seed=3).eval() for _ in range(2))
    lora.merge(merged, adapter)
    served = LLM(TorchRunner(model, adapters={"a": adapter}), llm.tokenizer, adapters=("a",))
    base, adapted = (decide(served, TEXT, QUESTIONS, adapter=name).answers for name in (None, "a"))
    expected = decide(LLM(TorchRunner(merged), llm.tokenizer), TEXT, QUESTIONS).answers
    plain = decide(llm, TEXT, QUESTIONS).answers
    for found, wanted in ((adapted, expected), (base, plain)):
        for one, other in zip(found, wanted, strict=True):
            check(one.probabilities, other.probabilities)
    assert abs(np.log(base[0].probability / adapted[0].probability)) > 0.1
    with pytest.raises(ValueError, match="there is no adapter 'b'; loaded are: a"):
        decide(served, TEXT, QUESTIONS, adapter="b")


@pytest.fixture(scope="module")
def classifier(directory):
    names = ("bad", "fine", "good")
    config = ModelConfig(300, 32, 48, 2, 4, 2, 64, num_labels=3, label_names=names)
    runner = TorchRunner(weights.build_model(config, seed=5).eval())
    return Classifier(directory, config, Tokenizer.load(directory), runner, 1.7)


def test_a_head_gives_the_calibrated_probabilities_of_its_labels_in_the_order_of_the_options(classifier):
    text = TEXT[:60]
    (logits,) = classifier.runner.forward([classifier.encode([text]).tokens[0]])["logits"][:, -1].astype(float)
    bad, fine, good = normalized(logits / 1.7)
    asked = [Choice("?", options("good", "bad", "fine")), Score("!", options("bad", "fine", "good"))]
    found = decide(classifier, text, asked)
    check(found.answers[0].probabilities, (good, bad, fine))
    assert found.answers[1].score == pytest.approx(fine + 2 * good, abs=1e-6)
    assert found == asyncio.run(decide_async(classifier, [{"role": "user", "content": text}], asked))
    assert found.input_tokens == len(classifier.encode([text]).tokens[0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Predicate("Is it?"), "give all of them as the options: bad, fine, good"),
        (Choice("?", options("bad", "good")), "question 1: this model has a classification head"),
        (Labels("?", options("bad", "fine", "good")), "can only be asked for one of its labels"),
    ],
)
def test_what_a_head_cannot_be_asked(classifier, asked, message):
    with pytest.raises(ValueError, match=message):
        decide(classifier, TEXT[:60], [asked])
    with pytest.raises(ContextError, match=r"the text has \d+ tokens, and this model reads 64; shorten it by \d+"):
        decide(classifier, TEXT * 3, [Choice("?", options("bad", "fine", "good"))])


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_text_that_does_not_fit_is_refused_with_the_counts(llm):
    question = Choice("It is", options("a", "b c d"))
    encode = llm.tokenizer.encode
    words, longest = TEXT.split(), 0
    for count in range(1, 400):
        text = " ".join((words * 40)[:count])
        size = 1 + len(encode(f"{text} It is b c d"))
        if size <= 512:
            longest, fits = size, text
    assert longest > 500
    decide(llm, fits, [question])
    with pytest.raises(ContextError, match=r"question 2: .* have (\d+) tokens, .* 512 positions; shorten .* by"):
        decide(llm, fits, [question, Choice("It is a very long question, it is", question.options)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice("?", options("a", "a ")), "the option 'a' is given twice"),
        (lambda: Choice("?", options("true", True)), "the option 'true' is given twice"),
        (lambda: Choice("?", options("a", " ")), "option 2 of a question is empty"),
        (lambda: Choice("?", options("a")), r"the options \['a'\] needs at least 2"),
        (lambda: Score("?", options("a")), "needs at least 2"),
        (lambda: Labels("?", ()), "needs at least 1"),
        (lambda: Predicate(" "), "the instructions of a question are empty"),
    ],
)
def test_questions_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_refusals(llm):
    with pytest.raises(ValueError, match="there is no question"):
        decide(llm, TEXT, [])
    with pytest.raises(ValueError, match="no tokenizer"):
        decide(LLM(llm.runner), TEXT, QUESTIONS)
    with pytest.raises(ValueError, match="this model has no chat template"):
        decide(llm, TEXT, QUESTIONS, layout="chat")
    with pytest.raises(ValueError, match="one text, not a conversation"):
        decide(llm, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], QUESTIONS)
    same = decide(llm, [{"role": "user", "content": TEXT}], QUESTIONS).answers
    assert same == decide(llm, TEXT, QUESTIONS).answers


def test_a_failing_step_raises(directory):
    runner = HashRunner(shape(vocabulary=300, positions=512), fails_at=(1,))
    model = LLM(runner, Tokenizer.load(directory), engine=EngineConfig(warm_up=False))
    with pytest.raises(RuntimeError, match="out of memory"):
        decide(model, TEXT, QUESTIONS)
    assert len(decide(model, TEXT, QUESTIONS).answers) == 4


def test_cancelling_ends_the_requests(directory):
    model = LLM(HashRunner(shape(vocabulary=300, positions=512)), Tokenizer.load(directory))

    async def cancelled():
        task = asyncio.create_task(decide_async(model, TEXT, QUESTIONS))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await decide_async(model, TEXT, QUESTIONS)

    assert len(asyncio.run(cancelled()).answers) == 4
    assert not model.engine.has_work
    model.close()
