"""What a server counts and measures, for Prometheus: names begin with `llamita_`, times are in seconds.

Counters are fed when a request ends, gauges are read from the engine when somebody asks. One object a server: nothing
is process-wide.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llamita.inference.engine import Engine
from llamita.inference.request import Statistics

TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The counters, histograms and gauges of one server; `engine` is None for a classifier, which has none."""

    def __init__(self, engine: Engine | None, waiting: Callable[[], int], queued_tokens: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        count, time = self._counter, self._histogram
        self.prompt_tokens = count("prompt_tokens", "Prompt tokens of requests that ended.")
        self.cached_tokens = count("prompt_tokens_cached", "Of those, the tokens found in the prefix cache.")
        self.generated_tokens = count("generation_tokens", "Tokens generated.")
        self.finished = count("requests_finished", "Continuations that ended, by reason.", "reason")
        self.rejected = count("requests_rejected", "Requests that were refused, by reason.", "reason")
        self.cancelled = count("requests_cancelled", "Requests whose client went away or fell behind.")
        self.preempted = count("preemptions", "Times a sequence gave its memory to others and began again.")
        self.engine_errors = count("engine_errors", "Continuations that ended with an error of the engine.")
        self.answered = count("http_responses", "Answers by path and status.", "path", "status")
        self.first_token = time("time_to_first_token", "From a request's arrival to its first token.", SLOW)
        self.gap = time("inter_token_latency", "Between two tokens of a continuation.", FAST)
        self.whole = time("request_latency", "From a request's arrival to its last token.", SLOW)
        self.queue = time("request_queue", "From a request's arrival in the engine to its first step.", SLOW)
        self.prefill = time("request_prefill", "Reading a request's prompt.", SLOW)
        self.decode = time("request_decode", "Decoding after the first token.", SLOW)
        self._gauge("requests_waiting", "Requests that wait for their first step.", waiting)
        self._gauge("queued_prompt_tokens", "Prompt tokens that wait to be read.", queued_tokens)
        if engine is not None:
            scheduler, manager = engine.scheduler, engine.manager
            blocks = manager.layout.blocks
            self._gauge("requests_running", "Sequences that run now.", lambda: len(scheduler.running))
            self._gauge("kv_cache_blocks", "Blocks of the key/value memory.", lambda: blocks)
            self._gauge("kv_cache_blocks_free", "Blocks that no sequence holds.", lambda: manager.available)
            self._gauge(
                "kv_cache_usage", "Share of the blocks that sequences hold.", lambda: 1 - manager.available / blocks
            )

    def ended(self, statistics: Statistics, reason: str) -> None:
        """Counts a continuation that ended, with the engine's statistics of it."""
        self.finished.labels(reason).inc()
        self.generated_tokens.inc(statistics.generated_tokens)
        self.preempted.inc(statistics.preemptions)
        if reason == "error":
            self.engine_errors.inc()
        self.queue.observe(statistics.queue_seconds)
        self.prefill.observe(statistics.prefill_seconds)
        self.decode.observe(statistics.decode_seconds)

    def read_prompt(self, statistics: Statistics) -> None:
        """Counts the prompt of a request, once for all its continuations."""
        self.prompt_tokens.inc(statistics.prompt_tokens)
        self.cached_tokens.inc(statistics.cached_tokens)

    def text(self) -> bytes:
        """Returns all of it in Prometheus's text form."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"llamita_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"llamita_{name}_seconds", about, registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        Gauge(f"llamita_{name}", about, registry=self.registry).set_function(read)
