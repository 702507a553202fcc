"""The two published JSON forms of decisions, read strictly and written: no HTTP, no model.

`decisions` is OpenAI's Decisions API (`POST /v1/decisions`; openai-python's `client.decisions.create`), `systemone`
TypeSafe's System One (`POST /v1/systemone`); vLLM serves both. Both have three kinds of questions: predicate (noul),
choice, score. Ours are the kind `labels`, several options at once, and the field `layout`. A field that is not known is
an error, since it might have changed the answer; null is as if left out.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from llamita.text.chat import Message
from llamita.workflows.decisions import Layout
from llamita.workflows.questions import Answer, Choice, Decisions, Labels, Option, Predicate, Question, Score

MAX_QUESTIONS = 64
MAX_CHOICES = 64
MAX_LEVELS = 10
MAX_OPTIONS = 512
"""Most options of all questions of a request together; each may cost a prompt."""
PARTS = {"user": ("input_text", "input_json"), "assistant": ("output_text",)}
ROLES = ("user", "system", "developer", "assistant")
MADE: dict[str, type[Choice] | type[Labels] | type[Score]] = {"choice": Choice, "labels": Labels, "score": Score}
UNSERVED = ("prompt_cache_key", "prompt_cache_options", "prompt_cache_breakpoint")


class FormError(ValueError):
    """A request that is not of its form; `param` names the field, such as `questions[0].choices`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


@dataclass(frozen=True)
class Asked:
    """A request: the model's name, a text or messages, the questions, and their names (None: unnamed)."""

    model: str | None
    text: str | tuple[Message, ...]
    questions: tuple[Question, ...]
    names: tuple[str | None, ...]
    layout: Layout = "auto"


# --- OpenAI's ---------------------------------------------------------------------------------------------------------


def parse_decisions(body: Any) -> Asked:
    """Returns the request in a body of `/v1/decisions`; FormError, in one line, for one of another form."""
    known = ("model", "input", "questions", "layout", "safety_identifier")
    fields = _object(body, "body", known)
    questions = _list(fields.get("questions"), "questions", 1, MAX_QUESTIONS)
    read = [_decisions_question(question, f"questions[{i}]") for i, question in enumerate(questions)]
    _check_total(question for _, question in read)
    _optional_text(fields, "safety_identifier", "safety_identifier")
    return Asked(
        model=_optional_text(fields, "model", "model"),
        text=_input(fields.get("input")),
        questions=tuple(question for _, question in read),
        names=tuple(name for name, _ in read),
        layout=_layout(fields),
    )


def decisions_response(model: str, asked: Asked, found: Decisions) -> dict[str, Any]:
    """Returns the body of the answer to a request of `/v1/decisions`."""
    total = found.input_tokens
    return {
        "model": model,
        "answers": [_decisions_answer(name, one) for name, one in zip(asked.names, found.answers, strict=True)],
        "usage": {
            "input_tokens": total,
            "input_tokens_details": {"cached_tokens": found.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": total,
        },
    }


def _decisions_question(given: Any, at: str) -> tuple[str | None, Question]:
    kind = _object(given, at).get("type")
    own = {"predicate": (), "choice": ("choices",), "labels": ("choices",), "score": ("levels",)}
    if not isinstance(kind, str) or kind not in own:
        raise FormError(f"{at}.type", f"expected one of {', '.join(own)}, got {_shown(kind)}")
    fields = _object(given, at, ("type", "name", "instructions", *own[kind]))
    name = _optional_text(fields, "name", f"{at}.name")
    instructions = _content(fields.get("instructions"), f"{at}.instructions", ("input_text", "input_json"))
    if kind == "predicate":
        return name, _made(lambda: Predicate(instructions), f"{at}.instructions")
    field, value, most = ("levels", "label", MAX_LEVELS) if kind == "score" else ("choices", "value", MAX_CHOICES)
    listed = _list(fields.get(field), f"{at}.{field}", 1 if kind == "labels" else 2, most)
    options = tuple(_decisions_option(option, value, f"{at}.{field}[{i}]") for i, option in enumerate(listed))
    return name, _made(lambda: MADE[kind](instructions, options), f"{at}.{field}")


def _decisions_option(given: Any, name: str, at: str) -> Option:
    fields = _object(given, at, (name, "description"))
    value = fields.get(name)
    if not isinstance(value, str | bool) or (name == "label" and isinstance(value, bool)):
        allowed = "a text or a boolean" if name == "value" else "a text"
        raise FormError(f"{at}.{name}", f"expected {allowed}, got {_shown(value)}")
    return Option(value, _optional_text(fields, "description", f"{at}.description") or "")


def _decisions_answer(name: str | None, answer: Answer) -> dict[str, Any]:
    question, p = answer.question, answer.probabilities
    if isinstance(question, Predicate):
        return {"type": "predicate", "name": name, "probability": answer.probability}
    if isinstance(question, Score):
        levels = [
            {"label": option.value, "value": value, "probability": p[value]}
            for value, option in enumerate(question.options)
        ]
        scored = {"score": answer.score, "confidence": answer.confidence, "probabilities": levels}
        return {"type": "score", "name": name, **scored}
    chosen = [{"value": option.value, "probability": p[i]} for i, option in enumerate(question.options)]
    if isinstance(question, Labels):
        return {"type": "labels", "name": name, "probabilities": chosen}
    choice = {"choice": answer.choice, "confidence": answer.confidence, "probabilities": chosen}
    return {"type": "choice", "name": name, **choice}


def _input(given: Any) -> str | tuple[Message, ...]:
    if isinstance(given, str):
        return given
    messages: list[Message] = []
    for i, message in enumerate(_list(given, "input", 1, None)):
        at = f"input[{i}]"
        kind = _object(message, at).get("type") or "message"
        if kind != "message":
            raise FormError(f"{at}.type", f"expected message, got {_shown(kind)}; calls of tools cannot be judged here")
        fields = _object(message, at, ("type", "role", "content"))
        role = fields.get("role")
        if role not in ROLES:
            raise FormError(f"{at}.role", f"expected one of {', '.join(ROLES)}, got {_shown(role)}")
        content = _content(fields.get("content"), f"{at}.content", PARTS.get(role, ("input_text",)))
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return tuple(messages)


def _content(given: Any, at: str, kinds: Collection[str]) -> str:
    """Returns a text, or the texts of parts, a line each."""
    if isinstance(given, str):
        return given
    texts = []
    for i, part in enumerate(_list(given, at, 1, None)):
        where = f"{at}[{i}]"
        kind = _object(part, where).get("type")
        if kind not in kinds:
            raise FormError(f"{where}.type", f"expected {' or '.join(kinds)}, got {_shown(kind)}: only text is read")
        if kind == "input_json":
            data = _object(part, where, ("type", "data")).get("data")
            if not isinstance(data, dict | list):
                raise FormError(f"{where}.data", f"expected an object or a list of objects, got {_shown(data)}")
            texts.append(_json_text(data))
        else:
            text = _object(part, where, ("type", "text")).get("text")
            if not isinstance(text, str):
                raise FormError(f"{where}.text", f"expected a text, got {_shown(text)}")
            texts.append(text)
    return "\n".join(texts)


# --- TypeSafe's -------------------------------------------------------------------------------------------------------


def parse_systemone(body: Any) -> Asked:
    """Returns the request in a body of `/v1/systemone`; FormError, in one line, for one of another form."""
    fields = _object(body, "body", ("model", "state", "questions", "layout"))
    if fields.get("state") is None:
        raise FormError("state", "it is missing; give the text, or the JSON, that the questions are about")
    questions = _object(fields.get("questions"), "questions")
    if not 1 <= len(questions) <= MAX_QUESTIONS or not all(questions):
        raise FormError("questions", f"expected 1 to {MAX_QUESTIONS} questions under names, got {len(questions)}")
    read = [_systemone_question(question, f"questions.{name}") for name, question in questions.items()]
    _check_total(read)
    return Asked(
        model=_optional_text(fields, "model", "model"),
        text=_json_text(fields["state"]),
        questions=tuple(read),
        names=tuple(questions),
        layout=_layout(fields),
    )


def systemone_response(model: str, asked: Asked, found: Decisions) -> dict[str, Any]:
    """Returns the body of the answer to a request of `/v1/systemone`."""
    answers = {cast(str, name): _systemone_answer(one) for name, one in zip(asked.names, found.answers, strict=True)}
    return {"model": model, "answers": answers, "usage": {"input_tokens": found.input_tokens, "output_tokens": 0}}


def _systemone_question(given: Any, at: str) -> Question:
    fields = _object(given, at, ("type", "instructions", "criteria"))
    kind, criteria = fields.get("type"), fields.get("criteria")
    if kind not in ("noul", "choice", "labels", "score"):
        raise FormError(f"{at}.type", f"expected one of noul, choice, labels, score, got {_shown(kind)}")
    instructions = _json_text("" if fields.get("instructions") is None else fields["instructions"])
    at_criteria = f"{at}.criteria"
    if kind == "noul":
        meanings = _object({} if criteria is None else criteria, at_criteria, ("true", "false"))
        yes, no = (_json_text(meanings.get(key) or "") for key in ("true", "false"))
        return _made(lambda: Predicate(instructions, yes, no), f"{at}.instructions")
    if kind == "score":
        levels = _list(criteria, at_criteria, 2, MAX_LEVELS)
        return _made(lambda: Score(instructions, tuple(Option(_json_text(level)) for level in levels)), at_criteria)
    named = _object(criteria, at_criteria)
    least = 1 if kind == "labels" else 2
    if not least <= len(named) <= MAX_CHOICES:
        raise FormError(at_criteria, f"expected {least} to {MAX_CHOICES} options, got {len(named)}")
    options = tuple(Option(name, _json_text(meaning or "")) for name, meaning in named.items())
    return _made(lambda: MADE[kind](instructions, options), at_criteria)


def _systemone_answer(answer: Answer) -> dict[str, Any]:
    question, p = answer.question, answer.probabilities
    if isinstance(question, Predicate):
        return {"type": "noul", "noul": answer.probability}
    if isinstance(question, Score):
        return {
            "type": "score",
            "score": answer.score,
            "confidence": answer.confidence,
            "legend": {str(i): option.value for i, option in enumerate(question.options)},
            "probabilities": {str(i): share for i, share in enumerate(p)},
        }
    named = {str(option.value): p[i] for i, option in enumerate(question.options)}
    if isinstance(question, Labels):
        return {"type": "labels", "probabilities": named}
    return {"type": "choice", "choice": answer.choice, "confidence": answer.confidence, "probabilities": named}


# --- values -----------------------------------------------------------------------------------------------------------


def _object(given: Any, at: str, known: Collection[str] | None = None) -> Mapping[str, Any]:
    """Returns an object, whose fields are all known; those that are null may be anything."""
    if not isinstance(given, dict):
        raise FormError(at, f"expected an object, got {_shown(given)}")
    for name, value in given.items():
        if known is not None and name not in known and value is not None:
            where = name if at == "body" else f"{at}.{name}"
            why = (
                "it is not served here" if name in UNSERVED else f"there is no such field; known are {', '.join(known)}"
            )
            raise FormError(where, why)
    return given


def _list(given: Any, at: str, least: int, most: int | None) -> list[Any]:
    if not isinstance(given, list):
        raise FormError(at, f"expected a list, got {_shown(given)}")
    if len(given) < least or (most is not None and len(given) > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise FormError(at, f"expected {allowed} entries, got {len(given)}")
    return given


def _optional_text(fields: Mapping[str, Any], name: str, at: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise FormError(at, f"expected a text, got {_shown(value)}")
    return value


def _layout(fields: Mapping[str, Any]) -> Layout:
    value = fields.get("layout")
    if value is not None and value not in get_args(Layout):
        raise FormError("layout", f"expected one of {', '.join(get_args(Layout))}, got {_shown(value)}")
    return cast(Layout, value or "auto")


def _made(make: Callable[[], Question], at: str) -> Question:
    """Returns a question; what it refuses is named by its place in the request."""
    try:
        return make()
    except ValueError as error:
        raise FormError(at, str(error)) from None


def _check_total(questions: Iterable[Question]) -> None:
    total = sum(len(question.options) for question in questions)
    if total > MAX_OPTIONS:
        raise FormError(
            "questions", f"they have {total} options together, and at most {MAX_OPTIONS} are judged at once"
        )


def _json_text(value: Any) -> str:
    """Returns a text as it is, and any other value as its JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{json.dumps(value, ensure_ascii=False, default=str):.60}"
