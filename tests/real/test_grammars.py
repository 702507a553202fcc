"""Texts that grammars in llama.cpp's notation take: llama.cpp itself is asked, over a published model's vocabulary."""

import ctypes

import pytest

from tests.inference.test_structured import GBNF
from tests.real import smollm2

NOT_THERE = 3  # the last of them: names with _, | at the beginning of a line, and 65,536 times are refused there


@pytest.fixture(scope="module")
def takes():
    """Whether a grammar takes a text, as llama.cpp says: a function of both."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled")
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(smollm2.needed()).encode(), settings)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    end = llama_cpp.llama_vocab_eos(vocabulary)

    def tokens(letter):
        found = (llama_cpp.llama_token * 16)()
        data = letter.encode()
        return found[: llama_cpp.llama_tokenize(vocabulary, data, len(data), found, 16, False, False)]

    def may_come(sampler, token):
        one = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(llama_cpp.llama_token_data_array(one, 1, -1, False)))
        return one[0].logit > -1e30

    def answer(grammar, text):
        sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
        assert sampler, "llama.cpp reads no such grammar"
        try:
            for token in (token for letter in text for token in tokens(letter)):
                if not may_come(sampler, token):
                    return False
                llama_cpp.llama_sampler_accept(sampler, token)
            return may_come(sampler, end)
        finally:
            llama_cpp.llama_sampler_free(sampler)

    yield answer
    llama_cpp.llama_model_free(model)


@pytest.mark.parametrize(("grammar", "right", "wrong"), GBNF[:-NOT_THERE])
def test_llama_cpp_takes_the_same_texts(takes, grammar, right, wrong):
    assert [takes(grammar, text) for text in right] == [True] * len(right)
    assert [takes(grammar, text) for text in wrong] == [False] * len(wrong)
