"""The order of a step and the way back, and what is drawn and scored after which row: numbers that can be counted."""

from dataclasses import replace

import numpy as np

from llamita.backend.interface import SampledToken, SampleSpec, ScheduledChunk, StepResult, Target
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.step_layout import (
    SCORED_ROWS,
    Scores,
    States,
    StepLayout,
    rows_of_adapters,
    rows_wanted,
    sample_chunks,
    score_chunks,
)


def chunk(number: int, start: int, length: int, samples: tuple[int, ...] = (), targets: int = 0, adapter=None):
    """Tokens 100 * number + their position; `samples` are positions of tokens to draw."""
    tokens = tuple(100 * number + position for position in range(start, start + length))
    specs = tuple(SampleSpec(SamplingParams(), 0, position) for position in samples)
    followers = tuple(Target(offset, token + 1) for offset, token in enumerate(tokens[:targets]))
    return ScheduledChunk(number, tokens, start, (), specs, followers, adapter)


CHUNKS = (
    chunk(0, 0, 3, (2, 3), adapter="a"),
    chunk(1, 9, 1, (10,)),
    chunk(2, 4, 2, targets=2, adapter="b"),
    chunk(3, 5, 1),
)
LAYOUT = StepLayout.of(CHUNKS)


def test_single_tokens_lie_first_those_of_similar_context_together() -> None:
    assert [one.sequence_id for one in LAYOUT.chunks] == [3, 1, 0, 2]
    assert LAYOUT.tokens == [305, 109, 0, 1, 2, 204, 205]
    assert LAYOUT.adapters(None) == [None, None, "a", "a", "a", "b", "b"]
    assert LAYOUT.adapters("c") == ["c", "c", "a", "a", "a", "b", "b"]
    assert rows_of_adapters(LAYOUT.adapters(None)) == {"a": [2, 3, 4], "b": [5, 6]}


def test_each_chunk_gets_the_tokens_drawn_after_its_rows_in_the_order_of_the_plan() -> None:
    """A token here is the row that it was drawn after: position 2 of sequence 0 follows its second row, the fourth."""
    asked = []

    def draw(rows, specs, ids):
        asked.extend(zip(rows, [spec.position for spec in specs], ids, strict=True))
        return [SampledToken(row, 0.0) for row in rows]

    sampled = sample_chunks(LAYOUT.chunks, draw)
    assert asked == [(1, 10, 1), (3, 2, 0), (4, 3, 0)]
    result = LAYOUT.result(sampled, [])
    assert [[token.token_id for token in tokens] for tokens in result.sampled] == [[3, 4], [1], [], []]
    assert result.target_logprobs == ()
    assert sample_chunks(LAYOUT.chunks[:1], lambda *_: 1 / 0) == [()], "nothing is asked for, nothing drawn"


def test_targets_are_scored_after_their_rows_some_at_a_time() -> None:
    long = chunk(4, 0, 2 * SCORED_ROWS + 5, targets=2 * SCORED_ROWS + 1)
    layout, lengths = StepLayout.of((*CHUNKS, long)), []

    def score(rows, places, ids, top):
        lengths.append(len(rows))
        assert [layout.tokens[rows[place]] + 1 for place in places] == ids
        return [float(rows[place]) for place in places], []

    result = layout.result([()] * 5, score_chunks(layout.chunks, score))
    assert [len(scores) for scores in result.target_logprobs] == [0, 0, 2, 0, 2 * SCORED_ROWS + 1]
    assert result.target_logprobs[2] == (5.0, 6.0)
    assert lengths == [2, SCORED_ROWS, SCORED_ROWS, 1]
    assert score_chunks(LAYOUT.chunks[:3], score) == []
    assert LAYOUT.result([()] * 4, []) == StepResult(((),) * 4)


def test_several_targets_after_one_token_share_its_row() -> None:
    asked = replace(chunk(0, 5, 4), targets=(Target(1, 7), Target(1, 9), Target(3, 7)))
    layout, calls = StepLayout.of((chunk(1, 0, 3, (3,)), asked)), []

    def score(*given):
        calls.append(given)
        return [0.1, 0.2, 0.3], [((given[0][0], -1.0),), ((given[0][1], -2.0),)]

    assert rows_wanted(layout.chunks) == [2, 4, 6]
    assert score_chunks(layout.chunks, score) == [Scores(), Scores((0.1, 0.2, 0.3))]
    assert calls == [([4, 6], [0, 0, 1], [7, 9, 7], 0)]
    layout = StepLayout.of((chunk(1, 0, 3, (3,)), replace(asked, target_top=1)))
    (nothing, found) = score_chunks(layout.chunks, score)
    assert (nothing.tops, found.tops) == ((), (((4, -1.0),), ((4, -1.0),), ((6, -2.0),)))


def test_the_rows_that_are_wanted_are_found_among_those_that_were_kept() -> None:
    wanted = rows_wanted(LAYOUT.chunks)
    assert wanted == [1, 3, 4, 5, 6]
    hidden_RD = np.arange(5)
    states = States(hidden_RD, {row: place for place, row in enumerate(wanted)}, LAYOUT.adapters(None))
    assert states.places([4, 1]) == [2, 0]
