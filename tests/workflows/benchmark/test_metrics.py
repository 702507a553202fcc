"""The statistics of a load against values worked out by hand."""

import math

import pytest

from llamita.workflows.benchmark.metrics import Distribution, Load, RequestRecord, summarize

LOAD = Load(concurrency=2)


def test_the_times_of_a_request_are_differences_of_what_was_seen() -> None:
    record = RequestRecord(
        0, due=1.0, sent=1.25, ended=5.0, text_times=(2.0, 2.5, 4.0), output_tokens=7, tokens_counted_by="usage"
    )
    assert record.time_to_first_token == 1.0
    assert record.inter_token_latencies == [0.5, 1.5]
    assert record.time_per_output_token == 0.5  # three seconds for six tokens after the first
    assert record.end_to_end_latency == 4.0


def test_a_request_without_text_has_no_time_to_first_token() -> None:
    record = RequestRecord(0, due=0.0, sent=0.0, ended=2.0, output_tokens=1)
    assert record.time_to_first_token is None
    assert record.inter_token_latencies == []
    assert record.time_per_output_token is None
    assert record.end_to_end_latency == 2.0


def test_percentiles_are_interpolated_between_neighbours() -> None:
    found = Distribution.of(float(value) for value in reversed(range(1, 102)))  # the q-th percentile is 1 + q
    assert found == Distribution(101, 51.0, 51.0, 96.0, 100.0, 101.0)
    assert Distribution.of([1.0, 2.0]) == Distribution(2, 1.5, 1.5, 1.95, 1.99, 2.0)
    assert Distribution.of([]) is None


def test_a_summary_counts_failures_by_kind_and_leaves_them_out_of_the_statistics() -> None:
    good = RequestRecord(
        0, 2.0, 2.0, 6.0, (3.0, 4.0), 200, finish_reason="length", prompt_tokens=10, cached_tokens=4,
        output_tokens=4, tokens_counted_by="usage",
    )  # fmt: skip
    slow = RequestRecord(
        1, 2.5, 2.75, 12.0, (4.5, 7.5), 200, finish_reason="stop", prompt_tokens=20, output_tokens=2,
        tokens_counted_by="usage",
    )  # fmt: skip
    cut = RequestRecord(2, 3.0, 3.0, 4.0, (3.5,), 200, "cut_off", output_tokens=100)
    refused = [RequestRecord(number, 3.0, 3.0, 3.0, (), 429, "http_429") for number in (3, 4)]
    found = summarize(LOAD, [good, slow, cut, *refused])
    assert (found.requests, found.completed) == (5, 2)
    assert found.errors == {"cut_off": 1, "http_429": 2}
    assert found.duration_seconds == 10.0
    assert found.requests_per_second == 0.2
    assert found.output_tokens_per_second == 0.6
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (30, 4, 6)
    assert found.finish_reasons == {"length": 1, "stop": 1}
    assert found.tokens_counted_by == "usage"
    assert found.latest_start_seconds == 0.25
    assert found.time_to_first_token == Distribution.of([1.0, 2.0])
    assert found.inter_token_latency == Distribution.of([1.0, 3.0])
    assert found.time_per_output_token == Distribution.of([1.0, 7.5])
    assert found.end_to_end_latency == Distribution.of([4.0, 9.5])


def test_gaps_are_taken_over_all_requests_and_not_averaged_by_request() -> None:
    many = RequestRecord(0, 0.0, 0.0, 9.0, tuple(float(moment) for moment in range(9)), output_tokens=9)
    few = RequestRecord(1, 0.0, 0.0, 9.0, (0.0, 9.0), output_tokens=2)
    found = summarize(LOAD, [many, few]).inter_token_latency
    assert found is not None
    assert (found.count, found.mean, found.median) == (9, 17 / 9, 1.0)


def test_a_load_in_which_all_failed_has_no_latencies() -> None:
    found = summarize(LOAD, [RequestRecord(0, 0.0, 0.0, 1.0, (), None, "connect")])
    assert (found.completed, found.requests_per_second, found.output_tokens_per_second) == (0, 0.0, 0.0)
    assert found.time_to_first_token is None
    assert found.end_to_end_latency is None


def test_counts_of_both_kinds_are_told() -> None:
    by_usage = RequestRecord(0, 0.0, 0.0, 1.0, (0.5,), output_tokens=1, tokens_counted_by="usage")
    by_chunks = RequestRecord(1, 0.0, 0.0, 1.0, (0.5,), output_tokens=1)
    assert summarize(LOAD, [by_usage, by_chunks]).tokens_counted_by == "both"
    assert summarize(LOAD, [by_chunks]).tokens_counted_by == "chunks"


def test_a_rate_over_no_time_is_no_number() -> None:
    assert math.isnan(summarize(LOAD, [RequestRecord(0, 1.0, 1.0, 1.0)]).requests_per_second)


def test_a_load_is_of_one_kind() -> None:
    assert str(Load(concurrency=4)) == "4 at once"
    assert str(Load(rate=2.5)) == "2.5 a second"
    with pytest.raises(AssertionError):
        Load()
