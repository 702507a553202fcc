"""What a chat model's answer says: its reasoning, its text, and its calls of tools.

    form = answer_format(Chat(tokenizer))          how this model writes them, read from its chat template
    parser = AnswerParser(form, tools, prompt)     takes the answer's text as it comes, gives `Part`s
    parse_answer(form, text, tools, prompt)        the same for a whole answer, as an `Answer`
    call_grammar(form, tools, "required")          a grammar that holds an answer to calls of these tools

Knows nothing of requests, of engines or of tensors.
"""

from llamita.text.answers.forms import AnswerFormat, CallForm, answer_format
from llamita.text.answers.grammar import call_grammar
from llamita.text.answers.parser import Answer, AnswerParser, Part, ToolCall, collect, parse_answer

__all__ = [
    "Answer",
    "AnswerFormat",
    "AnswerParser",
    "CallForm",
    "Part",
    "ToolCall",
    "answer_format",
    "call_grammar",
    "collect",
    "parse_answer",
]
