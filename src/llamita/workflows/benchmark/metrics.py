"""What is measured of a server: one record a request, and the statistics of a load over its records.

Nothing here reads a clock or a network. The terms are those of vLLM's and guidellm's benchmarks; how each is computed
stands at its property or field.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np


@dataclass(frozen=True)
class Load:
    """How requests come: so many under way at every moment (a closed loop), or so many a second (an open loop)."""

    concurrency: int | None = None
    rate: float | None = None
    """Requests a second, at the random moments of a Poisson process."""

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate is None)

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g} a second"


@dataclass(frozen=True)
class RequestRecord:
    """What was seen of one request. Times are in seconds since its load began."""

    number: int
    """Its place in the load, from 0."""
    due: float
    """When the load asked for it. Latencies count from here, so that time lost before sending is not hidden."""
    sent: float
    ended: float
    """When the answer's last event was read, or the request failed."""
    text_times: tuple[float, ...] = ()
    """When each chunk with text arrived, reasoning and tool calls included."""
    status: int | None = None
    """The HTTP status; None where none came."""
    error: str | None = None
    """The kind of failure; None for a request that was answered in full."""
    message: str | None = None
    """What the server or the connection said of the failure."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Tokens of the prompt that the server found in its cache, where it says so."""
    output_tokens: int = 0
    tokens_counted_by: Literal["usage", "chunks"] = "chunks"
    """Whether the server counted its output tokens, or chunks with text had to be counted instead."""
    retry_after: float | None = None
    """Seconds after which a server that refused asked to try again."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """The server's own times, where it reports any."""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until the first text; None where none came."""
        return self.text_times[0] - self.due if self.text_times else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between one chunk with text and the next. A server that sends several tokens in a chunk has fewer."""
        return [after - before for before, after in zip(self.text_times, self.text_times[1:], strict=False)]

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds a token after the first, as vLLM has it: (end - first text) / (tokens - 1); None below two tokens."""
        if not self.text_times or self.output_tokens < 2:
            return None
        return (self.ended - self.text_times[0]) / (self.output_tokens - 1)

    @property
    def end_to_end_latency(self) -> float:
        """Seconds until the answer's end."""
        return self.ended - self.due


@dataclass(frozen=True)
class Distribution:
    """Some values in seconds: how many, their mean, and percentiles interpolated between neighbours."""

    count: int
    mean: float
    median: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self | None:
        """Returns the distribution of values; None where there are none."""
        given = np.asarray(list(values), dtype=np.float64)
        if not given.size:
            return None
        median, p95, p99 = (float(value) for value in np.percentile(given, (50, 95, 99)))
        return cls(given.size, float(given.mean()), median, p95, p99, float(given.max()))


@dataclass(frozen=True)
class LoadSummary:
    """The statistics of one load. Latencies, tokens and rates are those of the requests that were answered in full."""

    load: Load
    requests: int
    """All that were sent, whatever became of them."""
    completed: int
    errors: Mapping[str, int]
    """How many failed, by kind; refusals are `http_429` and `http_503`."""
    duration_seconds: float
    """From the first request's due time to the last end."""
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    tokens_counted_by: str
    """`usage`, `chunks` or, where requests differ, `both`."""
    finish_reasons: Mapping[str, int]
    latest_start_seconds: float
    """The longest time between a request's due time and its sending: large where the client cannot keep up."""
    time_to_first_token: Distribution | None
    inter_token_latency: Distribution | None
    """Over all gaps of all requests."""
    time_per_output_token: Distribution | None
    """Over requests."""
    end_to_end_latency: Distribution | None


def summarize(load: Load, records: Sequence[RequestRecord]) -> LoadSummary:
    """Returns the statistics of a load's records, of which there is at least one."""
    assert records
    completed = [record for record in records if record.error is None]
    duration = max(record.ended for record in records) - min(record.due for record in records)
    output_tokens = sum(record.output_tokens for record in completed)
    counted_by = {record.tokens_counted_by for record in completed}
    first = [record.time_to_first_token for record in completed]
    per_token = [record.time_per_output_token for record in completed]
    return LoadSummary(
        load=load,
        requests=len(records),
        completed=len(completed),
        errors=_counted(record.error for record in records),
        duration_seconds=duration,
        requests_per_second=_rate(len(completed), duration),
        output_tokens_per_second=_rate(output_tokens, duration),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in completed),
        cached_tokens=sum(record.cached_tokens or 0 for record in completed),
        output_tokens=output_tokens,
        tokens_counted_by="both" if len(counted_by) > 1 else next(iter(counted_by), "usage"),
        finish_reasons=_counted(record.finish_reason for record in completed),
        latest_start_seconds=max(record.sent - record.due for record in records),
        time_to_first_token=Distribution.of(value for value in first if value is not None),
        inter_token_latency=Distribution.of(gap for record in completed for gap in record.inter_token_latencies),
        time_per_output_token=Distribution.of(value for value in per_token if value is not None),
        end_to_end_latency=Distribution.of(record.end_to_end_latency for record in completed),
    )


def _counted(names: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name is not None).items()))


def _rate(amount: int, seconds: float) -> float:
    return amount / seconds if seconds > 0 else math.nan if amount else 0.0
