"""What answers of several endpoints are written with: ids, token texts, counts."""

import secrets
import string
from collections.abc import Iterable
from typing import Any

from llamita import __version__
from llamita.inference.request import Statistics, TokenEvent
from llamita.text.tokenizer import Tokenizer

LETTERS_AND_DIGITS = string.ascii_letters + string.digits
FINGERPRINT = f"llamita-{__version__}"


def new_id(prefix: str) -> str:
    """Returns an id such as `chatcmpl-` and 24 characters."""
    return f"{prefix}{secrets.token_hex(12)}"


def new_call_id(is_short: bool) -> str:
    """Returns an id of a call, such as `call_` and 24 characters; a short one is nine letters and digits."""
    return "".join(secrets.choice(LETTERS_AND_DIGITS) for _ in range(9)) if is_short else new_id("call_")


def logprob(tokenizer: Tokenizer | None, token_id: int, value: float) -> dict[str, Any]:
    """Returns a token with its log-probability, as chat completions have it."""
    known = tokenizer is not None and token_id < tokenizer.vocab_size
    data = tokenizer.spelled_bytes(token_id) if known and tokenizer is not None else b""
    return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}


def chat_logprob(tokenizer: Tokenizer | None, event: TokenEvent) -> dict[str, Any]:
    """Returns a generated token with its alternatives."""
    assert event.token_id is not None
    alternatives = [logprob(tokenizer, token_id, value) for token_id, value in event.top_logprobs]
    return {**logprob(tokenizer, event.token_id, event.logprob), "top_logprobs": alternatives}


def usage(prompts: Iterable[Statistics], generated: int, reasoning: int | None = None) -> dict[str, Any]:
    """Returns the counts of a call. `prompts`: the statistics of one continuation of each prompt; `generated`: the
    tokens of all continuations, of which `reasoning` were reasoning."""
    listed = list(prompts)
    prompt = sum(statistics.prompt_tokens for statistics in listed)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(statistics.cached_tokens for statistics in listed)},
    }
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found


def timings(statistics: Statistics) -> dict[str, float]:
    """Returns the engine's times of a continuation."""
    return {
        "queue_seconds": round(statistics.queue_seconds, 6),
        "prefill_seconds": round(statistics.prefill_seconds, 6),
        "decode_seconds": round(statistics.decode_seconds, 6),
        "prompt_tokens_per_second": round(statistics.prefill_tokens_per_second, 3),
        "tokens_per_second": round(statistics.decode_tokens_per_second, 3),
    }
