"""Runs a file of prompts through a model into a file of answers, and goes on where an earlier run was cut off.

Each line of the input is an object with `prompt` (text), `prompt_tokens` or `messages` (with `tools`, where there are
any), optionally an `id`, an `adapter` (or a `model` of the form `base:adapter`) and fields of `SamplingParams`; or the
input is an array of such objects. Each line of the output is an object with the same and the text written, in the order
in which requests end. A file beside the output records the input and the options, so that no others are mixed into it.
Knows nothing of progress bars or of flags.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from llamita.backend.sampling_params import SamplingParams
from llamita.data.conversations import tools_of
from llamita.data.sources import array_or_lines, array_records
from llamita.inference.conversation import with_end_of_turn
from llamita.inference.llm import LLM
from llamita.inference.request import Generation, Request
from llamita.storage import compressed, files
from llamita.text.chat import Chat

PROMPTS = ("prompt", "prompt_tokens", "messages")
OWN = ("id", "adapter", "model", "tools", *PROMPTS)
"""The keys of a line that are no sampling parameters."""
SHOWN_FAULTS = 10


@dataclass(frozen=True)
class Item:
    """A line of the input: the keys that its output line repeats, and the request."""

    index: int
    given: Mapping[str, Any]
    request: Request


Outcome = tuple[Item, Generation | Exception]


@dataclass
class Totals:
    """The totals of a run; lines that an earlier run did are not counted."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


def read_items(llm: LLM, path: Path, defaults: SamplingParams, template: str | None = None) -> list[Item]:
    """Returns all lines of the input, each checked against the model; ValueError lists the faults, in one line."""
    items: list[Item] = []
    faults: list[str] = []
    chat: Chat | None = None
    seen: dict[Any, str] = {}
    for place, read in _entries(path):
        try:
            given = read()
            if not isinstance(given, dict):
                raise ValueError(f"expected an object, got {json.dumps(given):.40}")
            if "messages" in given and chat is None:
                chat = _chat(llm, template)
            items.append(Item(len(items), *_parse(llm, chat, given, defaults)))
            if "id" in given and seen.setdefault(given["id"], place) != place:
                raise ValueError(f"the id {given['id']!r} is that of {seen[given['id']]} too")
        except (ValueError, TypeError) as error:
            faults.append(f"{place}: {error}")
    if faults:
        more = len(faults) - SHOWN_FAULTS
        shown = "; ".join(faults[:SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else "")
        raise ValueError(f"{path} cannot be run: {shown}")
    if not items:
        raise ValueError(f"{path} has no line with a prompt; each line is an object with prompt or messages")
    return items


def run_batch(llm: LLM, items: list[Item], output: Path, made_from: Mapping[str, Any]) -> tuple[int, Iterator[Outcome]]:
    """Returns the number of lines that the output has already, and an iterator over the others' outcomes.

    The iterator serves the requests and writes a line for each outcome before yielding it. `made_from` is all that the
    output depends on: it is recorded, and ValueError names what differs from an earlier record.
    """
    stack = contextlib.ExitStack()
    try:
        file = stack.enter_context(_opened(output))
        _check_record(output, file, made_from)
        done = _kept(file, output, len(items))
    except BaseException:
        stack.close()
        raise
    left = [item for item in items if item.index not in done]

    def finish() -> Iterator[Outcome]:
        with stack:
            for place, outcome in llm.service.follow_many(item.request for item in left):
                item = left[place]
                line = json.dumps(_record(item, outcome), ensure_ascii=False) + "\n"
                file.write(line.encode())
                file.flush()
                yield item, outcome
            os.fsync(file.fileno())

    return len(done), finish()


def count(totals: Totals, item: Item, outcome: Generation | Exception) -> None:
    """Adds the outcome of an item to the totals."""
    totals.requests += 1
    totals.prompt_tokens += len(item.request.prompt)
    if isinstance(outcome, Exception):
        totals.failed += 1
    else:
        totals.generated_tokens += sum(len(continuation.token_ids) for continuation in outcome.continuations)


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the input -------------------------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The place of each value of the input, a line or an entry of the array that it is, and what reads the value."""
    is_array, pieces = array_or_lines(path)
    if is_array:
        for value, where in array_records(path, pieces):
            yield where.removeprefix(f"{path}, "), partial(copy, value)
        return
    try:
        lines = compressed.read(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", partial(files.parse_json, line.encode(), "not JSON")


def _chat(llm: LLM, template: str | None) -> Chat:
    if llm.tokenizer is None:
        raise ValueError("messages need a tokenizer, and this model has none; give prompt_tokens")
    return Chat(llm.tokenizer, template)


def _parse(
    llm: LLM, chat: Chat | None, given: dict[str, Any], defaults: SamplingParams
) -> tuple[dict[str, Any], Request]:
    """Returns the keys that a line's output repeats, and its request; ValueError for a line that is no request."""
    kinds = [name for name in PROMPTS if name in given]
    if len(kinds) != 1:
        raise ValueError(f"expected one of prompt, prompt_tokens and messages, got {', '.join(kinds) or 'none'}")
    if "id" in given and (isinstance(given["id"], bool) or not isinstance(given["id"], str | int)):
        raise ValueError(f"the id {given['id']!r} must be a text or a whole number")
    params = SamplingParams.from_json({name: value for name, value in given.items() if name not in OWN}, defaults)
    value = given[kinds[0]]
    if kinds[0] == "messages":
        assert chat is not None
        prompt: Any = chat.encode(value, tools=tools_of(given)).tokens
        params = with_end_of_turn(params, chat)
    elif kinds[0] == "prompt_tokens":
        if not isinstance(value, list) or not all(type(token_id) is int for token_id in value):
            raise ValueError("prompt_tokens must be a list of token ids")
        prompt = value
    elif isinstance(value, str):
        prompt = value
    else:
        raise ValueError(f"prompt={value!r:.40} must be a text")
    repeated = {name: given[name] for name in ("id", "adapter", "model", "tools", *kinds) if name in given}
    return repeated, llm.request(prompt, params, _adapter(given))


def _adapter(given: dict[str, Any]) -> str | None:
    """Returns the adapter that a line asks for, by `adapter` or by `model` after a colon; None for the model itself."""
    for name in ("adapter", "model"):
        if not isinstance(given.get(name), str | None):
            raise ValueError(f"{name}={given[name]!r:.40} must be a text")
    after_colon = (given.get("model") or "").rpartition(":")[2] if ":" in (given.get("model") or "") else None
    if "adapter" in given and after_colon is not None and after_colon != given["adapter"]:
        raise ValueError(f"adapter={given['adapter']!r} and model={given['model']!r} name two adapters")
    return given.get("adapter") or after_colon


# --- the output ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens the output for this run alone; ValueError where another run has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing {path}; wait for it, or choose another output") from None
        yield file


def record_path(output: Path) -> Path:
    """Returns the path of the record of the input and options that an output was made from."""
    return output.with_name(output.name + ".made-from.json")


def _check_record(output: Path, file: BinaryIO, made_from: Mapping[str, Any]) -> None:
    path, wanted = record_path(output), json.loads(json.dumps(made_from))
    if path.exists():
        found = files.read_json(path)
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if different:
            raise ValueError(
                f"{output} was begun with another {' and another '.join(different)}; go on with the same, or choose "
                "another output"
            )
    elif file.seek(0, os.SEEK_END):
        raise ValueError(f"{output} exists already, without the record {path.name} of a run; choose another output")
    else:
        files.atomic_write(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")


def _kept(file: BinaryIO, path: Path, total: int) -> set[int]:
    """Returns the indices of the lines that are done; a line that was cut off in its midst is dropped from the file."""
    file.seek(0)
    done: set[int] = set()
    whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        whole += len(line)
        value = files.parse_json(line, f"{path} has a broken line")
        index = value.get("index") if isinstance(value, dict) else None
        if type(index) is not int or not 0 <= index < total:
            raise ValueError(
                f"{path} has a line whose index is {index!r}, not one of this input; choose another output"
            )
        done.add(index)
    file.truncate(whole)
    file.seek(0, os.SEEK_END)
    return done


def _record(item: Item, outcome: Generation | Exception) -> dict[str, Any]:
    record: dict[str, Any] = {"index": item.index, **item.given}
    if isinstance(outcome, Exception):
        return {**record, "error": str(outcome)}
    first = outcome.statistics
    record |= _continuation(outcome, item.request.params)
    if item.request.params.n > 1:
        record["continuations"] = [
            _continuation(continuation, item.request.params) for continuation in outcome.continuations
        ]
    if item.request.params.prompt_logprobs:
        record["prompt_logprobs"] = list(outcome.prompt_logprobs)
    written = sum(len(continuation.token_ids) for continuation in outcome.continuations)
    usage = {"prompt_tokens": first.prompt_tokens, "completion_tokens": written, "cached_tokens": first.cached_tokens}
    return {**record, "usage": usage}


def _continuation(generation: Generation, params: SamplingParams) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": generation.text,
        "token_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
        "seed": generation.statistics.seed,
    }
    if params.top_logprobs:
        record |= {
            "logprobs": list(generation.logprobs),
            "top_logprobs": [list(row) for row in generation.top_logprobs],
        }
    return record
