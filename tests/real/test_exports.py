"""What a published model loses in each form that it is exported to, on real text, beside llama.cpp's own files."""

import pytest
from benchmarks import exports

from llamita.text.tokenizer import Tokenizer
from tests.real import smollm2

pytestmark = pytest.mark.slow
LENGTH = 256


def test_exports_lose_no_more_than_llama_cpps(tmp_path, shared_data):
    """Perplexity on WikiText-2: the same in both programs, and near that of the file as it came."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled")
    model = smollm2.needed()
    text = shared_data / "wikitext-2" / "valid.txt"
    windows = exports.text_windows(Tokenizer.load(model), text, 2, LENGTH)
    assert [len(window) for window in windows] == [LENGTH, LENGTH]
    forms = exports.exported(model, tmp_path)
    all_forms = {"as it came": model, **forms}
    here = {name: exports.perplexity(path, windows, "float32") for name, path in all_forms.items()}
    as_it_runs = exports.perplexity(model, windows, "auto")  # with activations in bytes, where there are kernels
    assert as_it_runs == pytest.approx(exports.llama_cpp_perplexity(model, windows), rel=2e-2)
    assert as_it_runs == pytest.approx(here["as it came"], rel=2e-2)
    assert here["gguf-f32"] == pytest.approx(here["as it came"], rel=1e-6)
    for kind, tolerance in {"gguf-f16": 1e-3, "gguf-bf16": 5e-3, "gguf-q8_0": 5e-3, "int8": 1e-2}.items():
        assert here[kind] == pytest.approx(here["as it came"], rel=tolerance)
    assert here["int4"] < here["llama.cpp's q4_0"]  # the embedding is int8 here
    for kind, tolerance in {"gguf-f32": 1e-4, "gguf-f16": 1e-3, "gguf-bf16": 5e-3, "gguf-q8_0": 2e-2}.items():
        assert exports.llama_cpp_perplexity(forms[kind], windows) == pytest.approx(here[kind], rel=tolerance)
    theirs = exports.llama_cpp_perplexity(forms["llama.cpp's q4_0"], windows)
    assert theirs == pytest.approx(here["llama.cpp's q4_0"], rel=2e-2)  # it multiplies activations in eight bits
