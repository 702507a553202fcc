"""Byte-level tokenizers in GGUF files: the ids of llama.cpp for every name of a way to split words.

python -m tests.storage.formats.test_llama_cpp_tokens      stores what llama.cpp says anew
"""

import json
import tempfile
from pathlib import Path

import pytest

from llamita.data import meadow
from llamita.text.tokenizer import Tokenizer
from llamita.text.word_splitters import SPLITTERS
from tests.storage.formats.test_gguf import split_like, write_bare

STORED = Path(__file__).with_name("llama_cpp_tokens.json")
TEXTS = [
    "Once upon a time, Pip the mouse said: \"It's DON'T, we'LL and I'm!\"",
    "  two  spaces\n\nand lines\t\r\n tabs \n",
    "naïve café, 1234567 x=3*4;//c `a` ^~|$ <tag> fooBarBaz HTMLParser",
    "Привет, как дела? 日本語のテキスト 한국어 텍스트 中文 ΐὟ Ω ǅ ʰ ª ½ ②",
    "123,456.78 €9.99 ١٢٣ !!!??? ...--- (a)[b]{c} '' \"\" 😀👍🏽",
    "العربية ไทย א",
    "",
    " ",
    "'s",
]
NORMALIZED = ["cafe\u0301", "e\u0301 A\u030a"]  # Qwen's files bring these to NFC, llama.cpp does not
MARKS = ["हिन्दी"]  # the models' own pattern keeps marks with their letters, llama.cpp's spelling of it does not
EXCEPTIONS = dict.fromkeys(("tekken", "gpt-4o", "llama4", "kanana2", "talkie"), MARKS)


def made(name, path):
    tokenizer = split_like(name)
    write_bare(path, tokenizer, name, {"tokenizer.ggml.add_bos_token": False})
    return Tokenizer.load(path)


def by_llama_cpp(path, texts, special=False):
    import llama_cpp

    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=False, special=special) for text in texts]


@pytest.mark.parametrize("name", SPLITTERS)
def test_the_ids_are_those_that_llama_cpp_gave(name, tmp_path):
    stored = json.loads(STORED.read_text())
    tokenizer = made(name, tmp_path / "m.gguf")
    assert [tokenizer.encode(text) for text in TEXTS] == stored[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITTERS)
def test_the_ids_of_real_text_are_those_of_llama_cpp(name, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")
    tokenizer = made(name, tmp_path / "m.gguf")
    wikitext = Path(__file__).resolve().parents[4] / "shared" / "data" / "wikitext-2" / "valid.txt"
    real = wikitext.read_text("utf-8")[:200_000] if wikitext.is_file() else "\n".join(meadow.corpus(1, 300, "train"))
    texts = [*real.splitlines(), *Path(__file__).read_text().replace(MARKS[0], "").splitlines(), *TEXTS]
    for text, expected in zip(texts, by_llama_cpp(tmp_path / "m.gguf", texts), strict=True):
        assert tokenizer.encode(text) == expected, text


def test_where_the_models_own_files_are_followed(tmp_path):
    for name in ("qwen2", "qwen35"):
        tokenizer = made(name, tmp_path / "m.gguf")
        assert [tokenizer.decode(tokenizer.encode(text)) for text in NORMALIZED] == ["café", "é Å"]
    for name, texts in EXCEPTIONS.items():
        tokenizer = made(name, tmp_path / "m.gguf")
        words = SPLITTERS[name].pre_tokenizer().pre_tokenize_str(texts[0])
        assert len(words) == 1
        assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        found = {}
        for name in SPLITTERS:
            path = Path(directory) / f"{name}.gguf"
            made(name, path)
            found[name] = by_llama_cpp(path, TEXTS)
        lines = (f"{json.dumps(name)}: {json.dumps(ids)}" for name, ids in found.items())
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
