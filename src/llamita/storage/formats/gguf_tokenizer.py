"""The tokenizer inside a GGUF file: SentencePiece pieces, or a byte-level BPE with the name of its way to split words.

Knows the keys of the file and nothing of tensors.
"""

import json
from collections.abc import Mapping
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llamita.model.config import ModelConfig
from llamita.text import sentencepiece_json, tiktoken_ranks
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.sentencepiece_json import BPE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SentencePieceModel
from llamita.text.tokenizer import ROLES, Tokenizer

QWEN2_WORDS = tiktoken_ranks.WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp's name for a way to split words -> the pattern, None for GPT-2's, and whether the text is brought to NFC.
SPLITTERS: Mapping[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "llama-bpe": (tiktoken_ranks.WORDS, False),
    "qwen2": (QWEN2_WORDS, True),
}
KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # our roles, and their names in a file


def write(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Add the tokenizer's settings; the tokens are as many as the model's embeddings. ValueError where llama.cpp has no
    such tokenizer."""
    codec = tokenizer.codec
    if isinstance(codec, SentencePieceCodec):
        _write_sentencepiece(writer, codec, config.vocab_size)
    else:
        _write_byte_level(writer, codec, config.vocab_size)
    for role, add in zip(
        ROLES,
        (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id),
        strict=True,
    ):
        token_id = getattr(tokenizer, f"{role}_id")
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def read(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a file's settings; None where it has none, ValueError where it is of a kind that is not read."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens and tokenizer.ggml.token_type do not fit together")
    codec: SentencePieceCodec | HuggingFaceCodec
    try:
        if kind == "llama":
            codec = _read_sentencepiece(metadata, tokens, types)
        elif kind == "gpt2":
            codec = _read_byte_level(metadata, tokens, types)
        else:
            raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported; Llamita reads llama and gpt2")
    except ValueError:
        raise
    except Exception as fault:  # the libraries raise bare exceptions
        raise ValueError(f"the tokenizer cannot be used: {' '.join(str(fault).split())}") from None
    roles: dict[str, int | None] = {}
    for role, key in KEYS.items():
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        roles[role] = found if isinstance(found, int) and 0 <= found < codec.vocab_size else None
    config: dict[str, Any] = {"add_bos_token": False, "clean_up_tokenization_spaces": False}
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return Tokenizer(codec, config, roles)


def _write_sentencepiece(writer: gguf.GGUFWriter, codec: SentencePieceCodec, size: int) -> None:
    model = sentencepiece_json.parse(codec.proto)
    if model.model_type != BPE:
        raise ValueError("llama.cpp has SentencePiece's BPE, and this tokenizer is of another kind of SentencePiece's")
    padding = [(f"[PAD{token_id}]", 0.0, UNUSED) for token_id in range(len(model.pieces), size)]
    pieces = [*model.pieces, *padding]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_add_space_prefix(model.adds_dummy_prefix)


def _write_byte_level(writer: gguf.GGUFWriter, codec: HuggingFaceCodec, size: int) -> None:
    splitter = _splitter(codec.spec)
    if splitter is None or codec.spec["model"].get("type") != "BPE":
        raise ValueError("llama.cpp has no way to split words as this tokenizer does; leave the tokenizer out")
    names = {token_id: name for name, token_id in codec.vocabulary.items()}
    added = {token["id"]: token for token in codec.spec["added_tokens"]}
    texts, types = [], []
    for token_id in range(max(size, codec.vocab_size)):
        token = added.get(token_id)
        texts.append(names.get(token_id, f"[PAD{token_id}]"))
        known = CONTROL if token and token["special"] else USER_DEFINED if token else NORMAL
        types.append(known if token_id in names else UNUSED)
    merges = codec.spec["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def _splitter(spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the way a tokenizer.json splits words; None where it has none."""
    for name, (pattern, nfc) in SPLITTERS.items():
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = _pre_tokenizer(pattern)
        same = _decisive(spec.get("pre_tokenizer")) == _decisive(json.loads(made.to_str())["pre_tokenizer"])
        if same and (spec.get("normalizer") or {}).get("type") == ("NFC" if nfc else None):
            return name
    return None


def _decisive(spec: Any) -> Any:
    """A pre-tokenizer's settings without those that change no split."""
    if isinstance(spec, dict):
        return {key: _decisive(value) for key, value in spec.items() if key != "trim_offsets"}
    return [_decisive(item) for item in spec] if isinstance(spec, list) else spec


def _pre_tokenizer(pattern: str | None) -> Any:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _read_sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> SentencePieceCodec:
    scores = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    if len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores and tokenizer.ggml.tokens do not fit together")
    if types.count(UNKNOWN) != 1:
        raise ValueError("a SentencePiece tokenizer has one unknown token, and this one has another number of them")
    model = SentencePieceModel(
        pieces=tuple(zip(tokens, scores, types, strict=True)),
        model_type=BPE,
        byte_fallback=True,
        adds_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        removes_extra_spaces=False,
    )
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for role, key in KEYS.items()}
    return SentencePieceCodec(sentencepiece_json.serialize(model, ids))


def _read_byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> HuggingFaceCodec:
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if name not in SPLITTERS:
        raise ValueError(f"tokenizer.ggml.pre={name!r} is not supported; Llamita reads {', '.join(SPLITTERS)}")
    pattern, nfc = SPLITTERS[name]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata.get("tokenizer.ggml.merges") or ()]
    used = {text: number for number, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    special = {text for text, number in used.items() if types[number] in (CONTROL, UNKNOWN)}
    added = special | {text for text, number in used.items() if types[number] == USER_DEFINED}
    # llama.cpp looks a whole word up first where words are split as Llama 3's are.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    in_order = sorted(added, key=used.__getitem__)
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in in_order])
    return HuggingFaceCodec(tokenizer)
