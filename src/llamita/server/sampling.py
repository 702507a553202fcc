"""From the fields of a request to the sampling parameters of the engine, within the limits of the server."""

import json
import re
from collections.abc import Sequence
from typing import Any

from llamita.backend.sampling_params import SamplingParams
from llamita.server.errors import ApiError, bad_value
from llamita.server.model import DEFAULTS
from llamita.server.schemas.openai import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponseFormat,
    Sampling,
)
from llamita.server.settings import ServerLimits

TAKEN_AS_THEY_ARE = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "min_tokens", "ignore_eos", "regex", "grammar",
)  # fmt: skip


def sampling_params(
    body: Sampling, defaults: SamplingParams, limits: ServerLimits, max_tokens: int, **more: Any
) -> SamplingParams:
    """Returns the parameters that a request asks for; `more` are further ones, by their names in `SamplingParams`.

    Raises `ApiError` (400) that names the field.
    """
    given: dict[str, Any] = {name: value for name in TAKEN_AS_THEY_ARE if (value := getattr(body, name)) is not None}
    given |= {
        "n": _n(body, limits),
        "stop": stop_texts(body.stop, limits),
        "logit_bias": _bias(body.logit_bias, limits),
    }
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = _stop_token_ids(body.stop_token_ids, limits)
    if body.choices is not None:
        given["choices"] = tuple(body.choices)
    if body.json_schema is not None:
        if more.get("json_schema"):
            raise bad_value("json_schema", "both json_schema and response_format hold the answer to a form; give one")
        more["json_schema"] = json.dumps(body.json_schema)
    if "no_forcing" in (body.grammar or ""):
        raise bad_value("grammar", "grammar sets no_forcing, an option that the server keeps to itself; leave it out")
    check_streaming(body)
    given |= more
    own = {name: getattr(defaults, name) for name in DEFAULTS}
    return checked_params({**own, **given, "max_tokens": max_tokens})


def checked_params(values: dict[str, Any]) -> SamplingParams:
    """Returns `SamplingParams` of these values; its ValueError as an `ApiError` that names the field."""
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise ApiError(400, str(error), param=field_at_fault(str(error)), code="invalid_value") from None


def field_at_fault(message: str) -> str | None:
    """Returns the field of a request that a ValueError of the engine, or of its parameters, is about."""
    found = re.match(r"(?:a token id of |the )?(\w+)", message)
    name = found[1] if found else ""
    if name == "json_schema":
        return "response_format"
    return name if name == "prompt" or name in SamplingParams.__dataclass_fields__ else None


def chosen_max_tokens(asked: int | None, field: str, room: int) -> int:
    """Returns the most tokens to generate: those asked for, else as many as the context has room for."""
    if asked is None:
        return max(1, room)
    if asked < 1:
        message = f"{field}={asked} is not allowed; give a whole number >= 1, or leave it out for the default"
        raise bad_value(field, message)
    return asked


def schema_of(form: ResponseFormat | None) -> str:
    """Returns the JSON schema that an answer is held to; empty for plain text."""
    if isinstance(form, JsonObjectFormat):
        return json.dumps(form.schema_ if form.schema_ is not None else {"type": "object"})
    if isinstance(form, JsonSchemaFormat):
        if form.json_schema.schema_ is None:
            raise bad_value("response_format", "response_format.json_schema has no schema; give the JSON schema")
        return json.dumps(form.json_schema.schema_)
    return ""


def check_top_logprobs(count: int | None, field: str, limits: ServerLimits) -> int:
    """Returns how many alternatives to report for each token."""
    if count is None:
        return 0
    if not 0 <= count <= limits.max_top_logprobs:
        raise bad_value(
            field, f"{field}={count} is not allowed; give a whole number from 0 to {limits.max_top_logprobs}"
        )
    return count


def check_tools(tools: Sequence[Any] | None, limits: ServerLimits) -> None:
    if len(tools or ()) > limits.max_tools:
        raise bad_value("tools", f"tools has {len(tools or ())} entries; give at most {limits.max_tools}")


def check_streaming(body: Any) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_value("stream_options", "stream_options is for streams; set stream, or leave it out")


def _n(body: Sampling, limits: ServerLimits) -> int:
    n = 1 if body.n is None else body.n
    if not 1 <= n <= limits.max_n:
        raise bad_value("n", f"n={n} is not allowed; give a whole number from 1 to {limits.max_n}")
    return n


def stop_texts(stop: str | Sequence[str] | None, limits: ServerLimits, field: str = "stop") -> tuple[str, ...]:
    """Returns the texts before which an answer ends."""
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(texts) > limits.max_stops:
        raise bad_value(field, f"{field} has {len(texts)} texts; give at most {limits.max_stops}")
    for text in texts:
        if not 0 < len(text) <= limits.max_stop_characters:
            raise bad_value(
                field, f"a text of {field} has {len(text)} characters; give 1 to {limits.max_stop_characters}"
            )
    return texts


def _stop_token_ids(ids: Sequence[int], limits: ServerLimits) -> tuple[int, ...]:
    if len(ids) > limits.max_logit_bias:
        raise bad_value("stop_token_ids", f"stop_token_ids has {len(ids)} ids; give at most {limits.max_logit_bias}")
    return tuple(ids)


def _bias(bias: dict[str, float] | None, limits: ServerLimits) -> dict[int, float]:
    if not bias:
        return {}
    if len(bias) > limits.max_logit_bias:
        raise bad_value("logit_bias", f"logit_bias has {len(bias)} entries; give at most {limits.max_logit_bias}")
    faulty = next((key for key in bias if not re.fullmatch("[0-9]{1,12}", key)), None)
    if faulty is not None:
        raise bad_value("logit_bias", f"logit_bias has the key {faulty!r:.60}; give token ids as strings")
    return {int(key): value for key, value in bias.items()}
