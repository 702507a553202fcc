"""The JSON forms of decisions: read, refused with the field's place, and answers that other people's clients parse."""

import copy
import json

import pytest

from llamita.workflows import decision_forms as forms
from llamita.workflows.questions import Answer, Choice, Decisions, Labels, Option, Predicate, Score

DECISIONS = {
    "model": "tiny",
    "input": "The package arrived with a broken screen.",
    "questions": [
        {"type": "predicate", "name": "damaged", "instructions": "Is an item damaged?"},
        {
            "type": "choice", "name": "department", "instructions": "Which department?",
            "choices": [{"value": "returns", "description": "damaged goods"}, {"value": True}],
        },
        {"type": "score", "instructions": "How bad is it?", "levels": [{"label": "cosmetic"}, {"label": "broken"}]},
        {"type": "labels", "name": "topics", "instructions": "About:", "choices": [{"value": "price"}]},
    ],
}  # fmt: skip
SYSTEMONE = {
    "model": "tiny",
    "state": {"ticket": "Charged twice für é."},
    "questions": {
        "urgent": {"type": "noul", "instructions": "Is it urgent?", "criteria": {"true": "money is moving"}},
        "team": {"type": "choice", "instructions": "Which team?", "criteria": {"billing": "refunds", "other": None}},
        "tone": {"type": "score", "instructions": {"ask": "How upset?"}, "criteria": ["calm", "furious"]},
        "topics": {"type": "labels", "instructions": "About:", "criteria": {"price": None}},
    },
    "layout": "plain",
}
ANSWERS = ((0.9, 0.1), (0.25, 0.75), (0.4, 0.6), (0.3,))


def found(asked):
    answers = tuple(Answer(question, p) for question, p in zip(asked.questions, ANSWERS, strict=True))
    return Decisions(answers, 40, 16)


def test_openais_form_is_read():
    asked = forms.parse_decisions(DECISIONS)
    assert asked == forms.Asked(
        model="tiny",
        text="The package arrived with a broken screen.",
        questions=(
            Predicate("Is an item damaged?"),
            Choice("Which department?", (Option("returns", "damaged goods"), Option(True))),
            Score("How bad is it?", (Option("cosmetic"), Option("broken"))),
            Labels("About:", (Option("price"),)),
        ),
        names=("damaged", "department", None, "topics"),
    )
    body = {**DECISIONS, "model": None, "layout": "chat", "safety_identifier": "x", "prompt_cache_key": None}
    assert forms.parse_decisions(body) == forms.Asked(None, asked.text, asked.questions, asked.names, "chat")


def test_openais_messages_and_parts():
    body = copy.deepcopy(DECISIONS)
    body["input"] = [
        {"role": "developer", "content": "Be just."},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "a"}, {"type": "input_json", "data": {"é": [1, None]}}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ]  # fmt: skip
    body["questions"][0]["instructions"] = [{"type": "input_text", "text": "Is"}, {"type": "input_json", "data": [{}]}]
    asked = forms.parse_decisions(body)
    assert asked.text == (
        {"role": "system", "content": "Be just."},
        {"role": "user", "content": 'a\n{"é": [1, null]}'},
        {"role": "assistant", "content": "b"},
    )
    assert asked.questions[0] == Predicate("Is\n[{}]")


def test_openais_client_parses_the_answer():
    openai_types = pytest.importorskip("openai.types")
    if not hasattr(openai_types, "Decision"):
        pytest.skip("this openai has no decisions")
    asked = forms.parse_decisions(DECISIONS)
    body = forms.decisions_response("tiny", asked, found(asked))
    assert json.loads(json.dumps(body)) == body
    theirs = body | {"answers": body["answers"][:3]}  # labels are ours
    decision = openai_types.Decision.model_validate(theirs, strict=True)
    predicate, choice, score = decision.answers
    assert (predicate.type, predicate.name, predicate.probability) == ("predicate", "damaged", 0.9)
    assert (choice.type, choice.choice, choice.confidence) == ("choice", True, pytest.approx(0.5))
    assert [(one.value, one.probability) for one in choice.probabilities] == [("returns", 0.25), (True, 0.75)]
    assert (score.type, score.name, score.score) == ("score", None, pytest.approx(0.6))
    assert [(one.label, one.value, one.probability) for one in score.probabilities] == [
        ("cosmetic", 0, 0.4), ("broken", 1, 0.6)
    ]  # fmt: skip
    assert (decision.usage.input_tokens, decision.usage.output_tokens, decision.usage.total_tokens) == (40, 0, 40)
    assert decision.usage.input_tokens_details.cached_tokens == 16
    assert body["answers"][3] == {
        "type": "labels", "name": "topics", "probabilities": [{"value": "price", "probability": 0.3}]
    }  # fmt: skip


def test_typesafes_form():
    asked = forms.parse_systemone(SYSTEMONE)
    assert asked.text == '{"ticket": "Charged twice für é."}'
    assert asked.names == ("urgent", "team", "tone", "topics")
    assert asked.layout == "plain"
    assert asked.questions == (
        Predicate("Is it urgent?", "money is moving"),
        Choice("Which team?", (Option("billing", "refunds"), Option("other"))),
        Score('{"ask": "How upset?"}', (Option("calm"), Option("furious"))),
        Labels("About:", (Option("price"),)),
    )
    assert forms.systemone_response("tiny", asked, found(asked)) == {
        "model": "tiny",
        "answers": {
            "urgent": {"type": "noul", "noul": 0.9},
            "team": {
                "type": "choice", "choice": "other", "confidence": pytest.approx(0.5),
                "probabilities": {"billing": 0.25, "other": 0.75},
            },
            "tone": {
                "type": "score", "score": pytest.approx(0.6), "confidence": pytest.approx(0.2),
                "legend": {"0": "calm", "1": "furious"}, "probabilities": {"0": 0.4, "1": 0.6},
            },
            "topics": {"type": "labels", "probabilities": {"price": 0.3}},
        },
        "usage": {"input_tokens": 40, "output_tokens": 0},
    }  # fmt: skip


def changed(body, path, value):
    body = copy.deepcopy(body)
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


CHOICES = ("questions", 1, "choices")


@pytest.mark.parametrize(
    ("path", "value", "param", "message"),
    [
        (("input",), None, "input", "expected a list, got nothing"),
        (("input",), [], "input", "expected at least 1 entries, got 0"),
        (("input",), [{"role": "tool", "content": "x"}], "input[0].role", "expected one of user, system"),
        (("input",), [{"type": "function_call"}], "input[0].type", "calls of tools cannot be judged"),
        (("input",), [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}],
         "input[0].content[0].type", "only text is read"),
        (("questions",), [], "questions", "expected 1 to 64 entries, got 0"),
        (("questions",), {}, "questions", "expected a list"),
        (("questions", 0, "type"), "noul", "questions[0].type", "expected one of predicate, choice, labels, score"),
        (("questions", 0, "name"), 3, "questions[0].name", "expected a text, got 3"),
        (("questions", 0, "instructions"), "  ", "questions[0].instructions", "the instructions of a quest"),
        (("questions", 0, "instructions"), None, "questions[0].instructions", "expected a list, got nothing"),
        (("questions", 0, "choices"), [], "questions[0].choices", "there is no such field; known are type, name"),
        (CHOICES, [{"value": "a"}], "questions[1].choices", "expected 2 to 64 entries, got 1"),
        (CHOICES, [{"value": "a"}, {"value": "a "}], "questions[1].choices", "the option 'a' is given twice"),
        (CHOICES, [{"value": "a"}, {"value": ""}], "questions[1].choices", "option 2 of a question is empty"),
        ((*CHOICES, 0, "value"), 3, "questions[1].choices[0].value", "expected a text or a boolean, got 3"),
        ((*CHOICES, 0, "label"), "x", "questions[1].choices[0].label", "there is no such field"),
        (("questions", 2, "levels", 0, "label"), True, "questions[2].levels[0].label", "expected a text, got true"),
        (("questions", 2, "levels"), [{"label": str(i)} for i in range(11)], "questions[2].levels", "2 to 10 entries"),
        (("temperature",), 1, "temperature", "there is no such field"),
        (("prompt_cache_key",), "x", "prompt_cache_key", "it is not served here"),
        (("layout",), "html", "layout", "expected one of auto, chat, plain"),
        (("model",), 3, "model", "expected a text"),
    ],
)  # fmt: skip
def test_openais_form_is_refused(path, value, param, message):
    with pytest.raises(forms.FormError, match=message) as error:
        forms.parse_decisions(changed(DECISIONS, path, value))
    assert error.value.param == param
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "param", "message"),
    [
        (("state",), None, "state", "it is missing"),
        (("questions",), {}, "questions", "expected 1 to 64 questions"),
        (("questions", "urgent", "type"), "predicate", "questions.urgent.type", "expected one of noul"),
        (("questions", "urgent", "criteria"), {"maybe": "x"}, "questions.urgent.criteria.maybe", "no such field"),
        (("questions", "urgent", "instructions"), "", "questions.urgent.instructions", "instructions .* are empty"),
        (("questions", "team", "criteria"), ["a", "b"], "questions.team.criteria", "expected an object"),
        (("questions", "team", "criteria"), {"a": None}, "questions.team.criteria", "expected 2 to 64 options, got 1"),
        (("questions", "tone", "criteria"), {"a": None}, "questions.tone.criteria", "expected a list"),
        (("questions", "tone", "weight"), 2, "questions.tone.weight", "there is no such field"),
        (("instructions",), "x", "instructions", "there is no such field"),
    ],
)
def test_typesafes_form_is_refused(path, value, param, message):
    with pytest.raises(forms.FormError, match=message) as error:
        forms.parse_systemone(changed(SYSTEMONE, path, value))
    assert error.value.param == param


def test_limits_and_other_values():
    many = [{"type": "labels", "instructions": "x", "choices": [{"value": f"v{i}"} for i in range(60)]}] * 9
    with pytest.raises(forms.FormError, match="540 options together"):
        forms.parse_decisions({"input": "x", "questions": many})
    for value in (None, [], "x", 3):
        for parse in (forms.parse_decisions, forms.parse_systemone):
            with pytest.raises(forms.FormError, match="body: expected an object"):
                parse(value)
