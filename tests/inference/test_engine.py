"""The engine's plans and endings, on a runner whose next token is a hash of everything that was cached before it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.config import ModelConfig
from llamita.inference.engine import Engine
from llamita.inference.request import Request, SamplingParams, TokenEvent
from llamita.plan import Plan, SampledToken, StepResult
from llamita.text.tokenizer import Tokenizer

VOCABULARY, POSITIONS = 50, 40
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)


@dataclass
class HashRunner:
    """Keeps the tokens it was given as its cache. Any error of position, order or repetition changes what it says next.

    `script` replaces the hash: the token to say at each position, counted from the end of the prompt.
    """

    config: ModelConfig = field(
        default_factory=lambda: ModelConfig(VOCABULARY, 8, 8, 1, 1, 1, POSITIONS, bos_token_id=1, eos_token_id=None)
    )
    script: Sequence[int] = ()
    weight_bytes: int = 1000
    kv_bytes_per_token: int = 10
    cache: list[int] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    capacity: int = 0
    said: int = 0
    fails_at: int | None = None

    def reserve(self, positions: int) -> None:
        self.capacity = max(self.capacity, positions)

    def run(self, plan: Plan) -> StepResult:
        self.plans.append(plan)
        if len(self.plans) - 1 == self.fails_at:
            raise RuntimeError("out of memory")
        (chunk,) = plan.chunks
        assert chunk.start <= len(self.cache)
        self.cache[chunk.start :] = chunk.tokens
        assert len(self.cache) <= self.capacity
        if chunk.sample is None:
            return StepResult((None,))
        assert chunk.sample.position == len(self.cache)
        assert chunk.sample.history == self.cache
        self.said += 1
        if self.script:
            return StepResult((SampledToken(self.script[self.said - 1], -0.5),))
        digest = hashlib.sha256(repr((self.cache, chunk.sample.seed)).encode()).digest()
        return StepResult((SampledToken(digest[0] % VOCABULARY, -0.5),))


def finish(engine: Engine, request_id: int = 0) -> list[TokenEvent]:
    events = []
    while engine.has_work:
        events += [event for event in engine.step() if event.request_id == request_id]
    return events


def tokens_of(runner: HashRunner, prompt: Sequence[int], chunk: int = 512, **params: object) -> list[int]:
    engine = Engine(runner, prefill_chunk=chunk)
    engine.add(Request(0, tuple(prompt), SamplingParams(**{"seed": 1, "max_tokens": 12, **params})))
    return [event.token_id for event in finish(engine)]


@given(prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), chunk=st.integers(1, 40))
def test_any_size_of_prefill_chunk_gives_the_same_tokens(prompt: list[int], chunk: int) -> None:
    runner = HashRunner()
    assert tokens_of(runner, prompt, chunk, max_tokens=5) == tokens_of(HashRunner(), prompt, max_tokens=5)
    assert max(len(plan.chunks[0].tokens) for plan in runner.plans) <= chunk
    assert len(runner.plans) == -(-len(prompt) // chunk) + 4


def test_each_token_is_run_once_and_the_last_one_never() -> None:
    runner = HashRunner()
    tokens = tokens_of(runner, PROMPT, chunk=4)
    assert runner.cache == [*PROMPT, *tokens[:-1]]
    assert [len(plan.chunks[0].tokens) for plan in runner.plans] == [4, 4, 2] + [1] * 11
    assert [plan.chunks[0].sample is not None for plan in runner.plans] == [False, False] + [True] * 12
    assert runner.capacity == len(PROMPT) + 12


def test_requests_are_served_in_order_and_do_not_touch_each_other() -> None:
    engine = Engine(HashRunner())
    for request_id, prompt in enumerate((PROMPT, PROMPT[::-1], PROMPT)):
        engine.add(Request(request_id, prompt, SamplingParams(seed=1, max_tokens=12)))
    events = []
    while engine.has_work:
        events += engine.step()
    assert [event.request_id for event in events] == [0] * 12 + [1] * 12 + [2] * 12
    expected = tokens_of(HashRunner(), PROMPT), tokens_of(HashRunner(), PROMPT[::-1])
    for request_id, tokens in ((0, expected[0]), (1, expected[1]), (2, expected[0])):
        assert [event.token_id for event in events if event.request_id == request_id] == tokens


def test_max_tokens_ends_with_length() -> None:
    engine = Engine(HashRunner())
    engine.add(Request(0, PROMPT, SamplingParams(max_tokens=3)))
    assert [event.finish_reason for event in finish(engine)] == [None, None, "length"]


def test_generation_past_the_models_positions_is_cut_and_ends_with_length() -> None:
    engine = Engine(HashRunner())
    engine.add(Request(0, PROMPT, SamplingParams(max_tokens=2**63)))
    events = finish(engine)
    assert len(PROMPT) + len(events) == POSITIONS
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty"),
        ((1,) * 40, r"has 40 tokens, but this model has 40 positions .* at most 39"),
        ((1,) * 1000, "has 1000 tokens"),
        ((1, 50), "token id 50, but this model's ids are 0 to 49"),
        ((-1,), "token id -1"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(prompt: tuple[int, ...], message: str) -> None:
    engine = Engine(HashRunner())
    with pytest.raises(ValueError, match=message):
        engine.add(Request(0, prompt))
    assert not engine.has_work
    assert len(tokens_of(HashRunner(), (1,) * 39)) == 1


def test_an_eos_token_ends_the_request_unless_ignored() -> None:
    def endings(ignore: bool, eos: tuple[int, ...]) -> list[tuple[int, str | None]]:
        engine = Engine(HashRunner(script=[7, 8, 9, 2, 4]), eos_token_ids=eos)
        engine.add(Request(0, PROMPT, SamplingParams(max_tokens=5, ignore_eos=ignore)))
        return [(event.token_id, event.finish_reason) for event in finish(engine)]

    assert endings(False, (2,)) == [(7, None), (8, None), (9, None), (2, "stop")]
    assert endings(False, (2, 8)) == [(7, None), (8, "stop")]
    assert endings(True, (2, 8)) == endings(False, ()) == [(7, None), (8, None), (9, None), (2, None), (4, "length")]


@pytest.mark.parametrize("eos", [5, (4, 5), None])
def test_eos_comes_from_the_models_config(eos: int | tuple[int, ...] | None) -> None:
    config = ModelConfig(VOCABULARY, 8, 8, 1, 1, 1, POSITIONS, bos_token_id=1, eos_token_id=eos)
    engine = Engine(HashRunner(config, script=[3, 5, 6]))
    engine.add(Request(0, PROMPT, SamplingParams(max_tokens=3)))
    assert len(finish(engine)) == (3 if eos is None else 2)


def test_abort_frees_the_engine_wherever_the_request_stands() -> None:
    engine = Engine(HashRunner(), prefill_chunk=4)
    for request_id in range(3):
        engine.add(Request(request_id, PROMPT, SamplingParams(seed=1, max_tokens=12)))
    engine.step()
    for request_id in (0, 0, 1, 99):  # in mid-prefill, again, waiting, unknown
        engine.abort(request_id)
    assert [event.token_id for event in finish(engine, 2)] == tokens_of(HashRunner(), PROMPT)
    engine.abort(2)  # done
    assert engine.step() == []


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_failed_step_ends_its_request_and_the_next_one_works(step: int) -> None:
    runner = HashRunner(fails_at=step)
    engine = Engine(runner, prefill_chunk=4)
    for request_id in range(2):
        engine.add(Request(request_id, PROMPT, SamplingParams(seed=1, max_tokens=12)))
    with pytest.raises(RuntimeError, match="out of memory"):
        finish(engine)
    assert [event.token_id for event in finish(engine, 1)] == tokens_of(HashRunner(), PROMPT)


def test_a_seed_is_kept_and_without_one_each_request_draws_its_own() -> None:
    assert tokens_of(HashRunner(), PROMPT, seed=1) == tokens_of(HashRunner(), PROMPT, seed=1)
    assert tokens_of(HashRunner(), PROMPT, seed=1) != tokens_of(HashRunner(), PROMPT, seed=2)
    engine = Engine(HashRunner())
    seeds = set()
    for request_id in range(4):
        engine.add(Request(request_id, PROMPT, SamplingParams(max_tokens=4)))
        events = finish(engine, request_id)
        seeds.add(events[0].statistics.seed)
        drawn = [event.token_id for event in events]
        assert drawn == tokens_of(HashRunner(), PROMPT, seed=events[0].statistics.seed, max_tokens=4)
    assert len(seeds) == 4


def test_statistics_add_up() -> None:
    engine = Engine(HashRunner(), prefill_chunk=4)
    engine.add(Request(0, PROMPT, SamplingParams(seed=9, max_tokens=6)))
    statistics = finish(engine)[-1].statistics
    assert (statistics.seed, statistics.prompt_tokens) == (9, 10)
    assert (statistics.generated_tokens, statistics.decode_tokens) == (6, 5)
    # Decoding reads all weights, and the keys and values of the token itself and of all before it.
    assert statistics.decode_bytes == 5 * 1000 + 10 * (11 + 12 + 13 + 14 + 15)
    assert statistics.prefill_seconds > 0
    assert statistics.decode_tokens_per_second == pytest.approx(5 / statistics.decode_seconds)
    assert statistics.decode_bytes_per_second == pytest.approx(statistics.decode_bytes / statistics.decode_seconds)
    assert statistics.prefill_tokens_per_second == pytest.approx(10 / statistics.prefill_seconds)


def test_a_classifier_cannot_generate() -> None:
    config = ModelConfig(VOCABULARY, 8, 8, 1, 1, 1, POSITIONS, num_labels=2)
    with pytest.raises(ValueError, match="classification head and cannot generate"):
        Engine(HashRunner(config))


# --- text -----------------------------------------------------------------------------------------------------------


def said(tokenizer: Tokenizer, ids: Sequence[int], stop: tuple[str, ...] = (), **params: object) -> list[TokenEvent]:
    config = ModelConfig(tokenizer.vocab_size, 8, 8, 1, 1, 1, 1000, eos_token_id=tokenizer.eos_id)
    engine = Engine(HashRunner(config, script=ids), tokenizer)
    engine.add(Request(0, (tokenizer.bos_id,), SamplingParams(max_tokens=len(ids), stop=stop, **params)))
    return finish(engine)


def test_text_comes_in_whole_characters_and_its_rest_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("née 🦙"), tokenizer.encode("ß")[0]]
    events = said(tokenizer, ids)
    assert "".join(event.text for event in events) == tokenizer.decode(ids) == "née 🦙\ufffd"
    assert all("\ufffd" not in event.text for event in events[:-1])


def test_an_eos_token_has_no_text_and_flushes_the_rest(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("ß")[0]
    events = said(tokenizer, [half, tokenizer.eos_id, half])
    assert [event.text for event in events] == ["", "\ufffd"]
    assert events[-1].finish_reason == "stop"


def test_a_character_that_the_prompt_leaves_unfinished_is_completed(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("ß fox")
    engine = Engine(HashRunner(ModelConfig(tokenizer.vocab_size, 8, 8, 1, 1, 1, POSITIONS), script=rest), tokenizer)
    engine.add(Request(0, (tokenizer.bos_id, first), SamplingParams(max_tokens=len(rest))))
    assert len(tokenizer.token_bytes(first)) == 1
    assert "".join(event.text for event in finish(engine)) == "ß fox"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stop_string_across_token_borders_ends_the_text_before_it(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = "The fox gave the owl a red kite. 日本語 and then they sat by the river."
    byte_ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    single = [byte_ids[bytes([byte])] for byte in text.encode()]
    ids = data.draw(st.sampled_from([tokenizer.encode(text), single]))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 9))]
    events = said(tokenizer, ids, stop=(stop, "never there"))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "stop"
    assert stop in tokenizer.decode(ids[: len(events)])
    assert stop not in tokenizer.decode(ids[: len(events) - 1])


def test_text_held_back_for_a_stop_that_does_not_come_is_not_lost(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("by the river")
    events = said(tokenizer, ids, stop=("riverbank",))
    assert "".join(event.text for event in events) == "by the river"
    assert events[-1].finish_reason == "length"


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        Engine(HashRunner()).add(Request(0, PROMPT, SamplingParams(stop=("x",))))
