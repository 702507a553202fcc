"""Which template a model is tuned with, by the tokens that its vocabulary has."""

import json

import pytest
import tokenizers

from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.chat import BUILT_IN, Chat
from llamita.text.chat_templates import template_to_learn
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.tokenizer import Tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def with_tokens(*names, remove=()):
    """A tokenizer of bytes with these control tokens besides; `remove`d ones become text."""
    spec = train_bpe_from_iterator(["a"], 259).codec.spec
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in remove
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(list(names))
    return Tokenizer.from_codec(HuggingFaceCodec(backend))


@pytest.mark.parametrize(
    ("names", "asked", "written"),
    [
        ((), "", "<s>User: Hi\nAssistant: Yo</s>"),
        ((), "plain-eos", "<s>User: Hi\nAssistant: Yo</s>"),
        (("<r0>", "<r1>", "<r2>"), "", "<s><r0>user<r1>Hi<r2><r0>assistant<r1>Yo<r2>"),
        (("<r0>", "<r1>"), "", "<s>User: Hi\nAssistant: Yo</s>"),
        (
            ("<r0>", "<r1>"),
            "chatml",
            "<s><r0>user\nHi<r1>\n<r0>assistant\nYo<r1>\n",
        ),
        (
            ("<|im_start|>", "<|im_end|>", "<r0>", "<r1>"),
            "chatml",
            "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n",
        ),
        (
            tuple(f"<|reserved_special_token_{i}|>" for i in (7, 3, 5)),
            "r0",
            "<s><|reserved_special_token_7|>user<|reserved_special_token_3|>Hi<|reserved_special_token_5|>"
            "<|reserved_special_token_7|>assistant<|reserved_special_token_3|>Yo<|reserved_special_token_5|>",
        ),
        # <r0> has a meaning already, so the marks of r0 move on, each to another.
        (("<r1>", "<r2>", "<r3>"), "r0", "<s><r1>user<r2>Hi<r3><r1>assistant<r2>Yo<r3>"),
    ],
)
def test_the_template_has_tokens_for_its_marks(names, asked, written):
    tokenizer = with_tokens(*names)
    chat = Chat(tokenizer, template_to_learn(tokenizer, asked))
    found = chat.encode(TURNS, add_generation_prompt=False)
    assert found.text == written
    assert chat.end_of_turn[0], "something ends an answer"
    marks = [token for token in names if token in written]
    ids = {tokenizer.codec.special_tokens[name] for name in marks}
    assert ids <= set(found.tokens)


def test_the_models_own_comes_first():
    tokenizer = with_tokens("<r0>", "<r1>", "<r2>")
    tokenizer.chat_template = own = "{{ messages[0].content }}<r0>"
    assert template_to_learn(tokenizer) == own
    assert template_to_learn(tokenizer, "plain-eos") == BUILT_IN["plain-eos"]
    assert template_to_learn(tokenizer, "{{ messages }}") == "{{ messages }}"


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (("<r0>", "<r1>"), "r0", r"needs the token <r2>, .* 2 reserved tokens for the 3 marks; .*--reserved-tokens 3"),
        (("<r0>",), "chatml", r"needs the token <\|im_start\|>, .* 1 reserved tokens for the 2 marks"),
        ((), "plain", "does not say where an answer ends.*use plain-eos"),
        ((), "vicuna", r"there is no chat template 'vicuna'; the built-in ones are chatml, r0, plain, plain-eos"),
    ],
)
def test_a_template_without_tokens_is_refused(names, asked, message):
    with pytest.raises(ValueError, match=message):
        template_to_learn(with_tokens(*names), asked)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="needs a token that ends a text, which this tokenizer lacks"):
        template_to_learn(with_tokens(remove=("</s>",)))
