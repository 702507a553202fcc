"""`vocab.json` and `merges.txt`, GPT-2's form of a byte-level BPE, as the tokenizer that transformers makes of them.

The two files hold tokens and merges. How words are split, and which tokens begin, end and pad a text, is said by the
class that tokenizer_config.json names, and by nothing where it names none: then it is GPT-2's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from llamita.storage.files import read_json
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.word_splitters import SPLITTERS

TOKENS, MERGES = "vocab.json", "merges.txt"
END = "<|endoftext|>"
MOST_TOKENS = 1 << 24  # an id past it is damage, and a table up to it would not fit into memory


@dataclass(frozen=True)
class TokenizerClass:
    """What a class of transformers adds to the two files."""

    splitter: str
    """llama.cpp's name for how words are split."""
    roles: Mapping[str, str | None]
    """The tokens that have a role where the settings beside the files name none."""


CLASSES = {
    "GPT2Tokenizer": TokenizerClass("gpt-2", {"bos_token": END, "eos_token": END, "unk_token": END}),
    "Qwen2Tokenizer": TokenizerClass(
        "qwen2", {"bos_token": None, "eos_token": END, "unk_token": END, "pad_token": END}
    ),
}
OF_MODEL = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
"""The class of a model whose files name none, by its `model_type`."""
ALWAYS = ("qwen2",)
"""Models for which that class counts whatever their files name."""


def read(directory: Path, config: Mapping[str, Any]) -> tuple[HuggingFaceCodec, dict[str, Any]]:
    """Returns the codec without tokens of other files, and the settings of tokenizer_config.json with the class's own.

    ValueError, naming the file and its line, where one is damaged, and for a class that is not known here;
    FileNotFoundError where one of the two is missing.
    """
    name = _class_name(directory, config)
    made = CLASSES[name]
    vocabulary = _read_tokens(directory / TOKENS)
    merges = _read_merges(directory / MERGES, vocabulary)
    splitter = SPLITTERS[made.splitter]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = splitter.normalizer()
    tokenizer.pre_tokenizer = splitter.pre_tokenizer(bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    return HuggingFaceCodec(tokenizer), {**made.roles, **config, "tokenizer_class": name}


def _class_name(directory: Path, config: Mapping[str, Any]) -> str:
    """The class by which transformers reads the files; GPT-2's where it has none for the model."""
    file = directory / "config.json"
    model = read_json(file) if file.exists() else {}
    usual = OF_MODEL.get(str(model.get("model_type")))
    if usual is not None and model["model_type"] in ALWAYS:
        return usual
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or usual or "GPT2Tokenizer"
    name = str(named).removesuffix("Fast")
    if name not in CLASSES:
        raise ValueError(
            f"{directory} holds {TOKENS} and {MERGES} of the tokenizer_class {named}, and Llamita reads those of "
            f"{' and '.join(CLASSES)}; save it as a tokenizer.json with transformers"
        )
    return name


def _read_tokens(file: Path) -> dict[str, int]:
    _check_exists(file)
    content = read_json(file)
    if not content:
        raise ValueError(f"{file} holds no tokens")
    names: dict[int, str] = {}
    for name, token_id in content.items():
        if type(token_id) is not int or not 0 <= token_id < MOST_TOKENS:
            raise ValueError(f"{file} must map each token to its id, got {name!r:.80}: {token_id!r:.80}")
        if names.setdefault(token_id, name) != name:
            raise ValueError(f"{file} gives {names[token_id]!r:.80} and {name!r:.80} the same id, {token_id}")
    return content


def _read_merges(file: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    _check_exists(file)
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as fault:
        number = fault.object.count(b"\n", 0, fault.start) + 1
        raise ValueError(f"{file}, line {number}: a byte that is not UTF-8") from None
    merges = []
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if line.startswith("#version"):
            continue
        left, *others = line.removesuffix("\r").split(" ")
        if len(others) != 1 or not left or not others[0]:
            raise ValueError(f"{file}, line {number}: expected two tokens and a space between them, got {line!r:.80}")
        for token in (left, others[0], left + others[0]):
            if token not in vocabulary:
                raise ValueError(f"{file}, line {number}: {token!r:.80} is no token of {TOKENS} beside it")
        merges.append((left, others[0]))
    return merges


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a tokenizer without a tokenizer.json needs {TOKENS} and {MERGES}")
