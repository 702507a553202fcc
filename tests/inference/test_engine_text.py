"""Text out of the engine: whole characters, stop strings across tokens, and what comes of them with min_tokens."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.backend.sampling_params import SamplingParams
from llamita.inference.config import EngineConfig
from llamita.inference.drafting import PromptLookup
from llamita.inference.engine import Engine
from llamita.inference.request import Request
from llamita.text.tokenizer import Tokenizer
from tests.inference.hash_model import Answer, HashRunner, check_invariants, serve, shape

TEXT = "The fox gave the owl a red kite. 日本語 and then they sat by the river."


def said(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), **params: Any) -> Answer:
    runner = HashRunner(shape(vocabulary=tokenizer.vocab_size, positions=1000), script=ids)
    engine = Engine(runner, tokenizer, eos_token_ids=(tokenizer.eos_id,), drafter=params.pop("drafter", None))
    request = Request(0, (tokenizer.bos_id, *prompt), SamplingParams(**{"max_tokens": len(ids), **params}))
    return serve(engine, [request])[0, 0]


def single_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return [ids[bytes([byte])] for byte in text.encode()]


def test_text_comes_in_whole_characters_and_its_rest_at_the_end(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("née 🦙"), tokenizer.encode("ß")[0]]
    answer = said(tokenizer, ids)
    assert answer.text == tokenizer.decode(ids) == "née 🦙\ufffd"
    assert all("\ufffd" not in event.text for event in answer.events[:-1])


def test_an_eos_token_has_no_text_and_flushes_the_rest(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("ß")[0]
    answer = said(tokenizer, [half, tokenizer.eos_id, half])
    assert [event.text for event in answer.events] == ["", "\ufffd"]
    assert answer.reason == "stop"


def test_a_stop_tokens_text_is_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("by the river")
    answer = said(tokenizer, ids, stop_token_ids=(ids[-1],))
    assert (answer.text, answer.reason) == (tokenizer.decode(ids[:-1]), "stop")


def test_a_character_that_the_prompt_leaves_unfinished_is_completed(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("ß fox")
    assert len(tokenizer.token_bytes(first)) == 1
    assert said(tokenizer, rest, [first]).text == "ß fox"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stop_string_across_token_borders_ends_the_text_before_it(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.sampled_from([tokenizer.encode(TEXT), single_bytes(tokenizer, TEXT)]))
    start = data.draw(st.integers(0, len(TEXT) - 1))
    stop = TEXT[start : start + data.draw(st.integers(1, 9))]
    drafter = data.draw(st.sampled_from([None, PromptLookup()]))
    answer = said(tokenizer, ids, stop=(stop, "never there"), drafter=drafter)
    assert answer.text == TEXT[: TEXT.index(stop)]
    assert answer.reason == "stop"
    assert stop in tokenizer.decode(ids[: len(answer.said)])
    assert stop not in tokenizer.decode(ids[: len(answer.said) - 1])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_stop_string_that_is_complete_first_wins(tokenizer: Tokenizer, data: st.DataObject) -> None:
    places = st.tuples(st.integers(0, len(TEXT) - 1), st.integers(1, 9))
    stops = tuple(TEXT[at : at + long] for at, long in data.draw(st.lists(places, min_size=2, max_size=4)))
    answer = said(tokenizer, single_bytes(tokenizer, TEXT), stop=stops)
    end, begin = min((TEXT.index(stop) + len(stop), TEXT.index(stop)) for stop in stops)
    assert answer.text == TEXT[:begin]
    assert [event.stop_string for event in answer.events] == [None] * (len(answer.events) - 1) + [TEXT[begin:end]]


def test_text_held_back_for_a_stop_that_does_not_come_is_not_lost(tokenizer: Tokenizer) -> None:
    answer = said(tokenizer, tokenizer.encode("by the river"), stop=("riverbank",))
    assert answer.events[-1].stop_string is None
    assert (answer.text, answer.reason) == ("by the river", "length")


@pytest.mark.parametrize(
    ("least", "text"),
    [(0, "ab"), (3, "ab"), (4, "abstopcd"), (9, "abstopcd"), (10, "abstopcdstop"), (12, "abstopcdstop")],
)
def test_a_stop_string_counts_where_all_of_it_comes_from_min_tokens_on(
    tokenizer: Tokenizer, least: int, text: str
) -> None:
    answer = said(tokenizer, single_bytes(tokenizer, "abstopcdstop"), stop=("stop",), min_tokens=least)
    assert (answer.text, answer.reason) == (text, "length" if text.endswith("stop") else "stop")


def test_a_stop_string_gives_the_blocks_back_at_once(tokenizer: Tokenizer) -> None:
    ids = single_bytes(tokenizer, "abstopcd")
    runner = HashRunner(shape(vocabulary=tokenizer.vocab_size), script=ids)
    engine = Engine(runner, tokenizer, config=EngineConfig(block_size=2))
    engine.add(Request(0, (1, 2, 3), SamplingParams(stop=("stop",), max_tokens=8)))
    events = []
    while not events or events[-1].finish_reason is None:
        events += engine.step()
    assert not engine.has_work
    check_invariants(engine)
    assert len(events) == 6
