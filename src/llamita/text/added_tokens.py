"""What the files beside a vocabulary say of it, as transformers reads them: added tokens, and where a space goes first.

Added tokens stand in `added_tokens_decoder` of tokenizer_config.json, or in special_tokens_map.json and
added_tokens.json, which count where that key is absent. `tokenizer_class` LlamaTokenizer says that no space is put
before a text that follows a special token.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors

from llamita.text import sentencepiece_json
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER = ("extra_special_tokens", "additional_special_tokens")  # the newer name counts
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedTokens:
    """What the files beside a vocabulary add to it, in the order in which tokens get their ids."""

    config: dict[str, Any]
    """The settings of tokenizer_config.json, with those of special_tokens_map.json where that counts."""
    tokens: tuple[AddedToken, ...] = ()
    """Listed with their ids; a token that the vocabulary has keeps its own id there."""
    named: tuple[AddedToken, ...] = ()
    """Named by their role, or as further special tokens: control tokens, added where nothing else has them."""
    special: frozenset[str] = field(default=frozenset())
    """The names of those that are control tokens even where the vocabulary does not say so."""


def read(directory: Path, config: Mapping[str, Any], codec: HuggingFaceCodec | SentencePieceCodec) -> AddedTokens:
    """Reads the files beside a vocabulary; ValueError names the file where one is not of the form.

    A tokenizer.json counts before added_tokens.json. Beside any other vocabulary, transformers does not read
    `additional_special_tokens` of special_tokens_map.json.
    """
    config = dict(config)
    listed: dict[int, AddedToken] = {}
    further: dict[str, Any] = {}
    if config.get("added_tokens_decoder") is not None:
        for number, token in _object(config["added_tokens_decoder"], "added_tokens_decoder").items():
            if not (str(number).isdigit() and isinstance(token, Mapping) and isinstance(token.get("content"), str)):
                raise ValueError(
                    f"added_tokens_decoder in {directory / 'tokenizer_config.json'} must map ids to objects with a "
                    f"content, got {number!r}: {token!r:.80}"
                )
            listed[int(number)] = _token(token, special=bool(token.get("special", False)))
    else:
        further = read_json(directory / "special_tokens_map.json")
        late = further.pop("additional_special_tokens", None)
        config |= further
        special = {_content(token) for token in [*_named(config), *_further(config)]}
        if late and isinstance(codec, HuggingFaceCodec) and not any(config.get(key) for key in FURTHER):
            # It comes too late to say what added_tokens.json means.
            config["additional_special_tokens"] = further["additional_special_tokens"] = late
        for name, number in read_json(directory / "added_tokens.json").items():
            if not isinstance(number, int):
                raise ValueError(f"{directory / 'added_tokens.json'} must map tokens to ids, got {name!r}: {number!r}")
            listed[number] = AddedToken(name, normalized=name not in special, special=name in special)
        if isinstance(codec, HuggingFaceCodec):
            listed |= codec.added_tokens
    by_name = {token.content: token for token in listed.values()}
    control = {_content(value) for value in _named(config)}
    named: dict[str, AddedToken] = {}
    for value in [*_named(config), *_further(config)]:
        named.setdefault(_content(value), by_name.get(_content(value)) or _token(value, special=True))
    tokens = tuple(listed[number] for number in sorted(listed))
    control |= {token.content for token in tokens if token.special}
    settings = config | {key: _plain(value) for key, value in further.items()}
    return AddedTokens(settings, tokens, tuple(named.values()), frozenset(control))


def is_of_model(spec: Mapping[str, Any], proto: bytes, directory: Path) -> bool:
    """Whether a directory's tokenizer.json gives the ids of its SentencePiece model, with the files beside the two."""
    model = sentencepiece_json.parse(proto)
    config = read_json(directory / "tokenizer_config.json")
    prefix: str | None = "always" if config.get("legacy", True) else "first"
    if _is_llama_tokenizer(config, read_json(directory / "config.json").get("model_type")):
        prefix = None  # its settings say so for both
    elif not model.adds_dummy_prefix:
        prefix = "never"
    try:
        return sentencepiece_json.agrees(spec, model, prefix)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False  # it is not of the form, which is said where it is read


def complete(
    codec: HuggingFaceCodec | SentencePieceCodec, found: AddedTokens, directory: Path, adds_ends: bool = False
) -> HuggingFaceCodec | SentencePieceCodec:
    """Returns the codec of a vocabulary with what the files beside it say.

    A SentencePiece model stays one unless tokens are added to it. Tokens that are only named by a role, without an id,
    are added as far as config.json leaves room for them. `adds_ends`: the settings say which tokens stand around a
    text, as they do where no tokenizer.json does. ValueError for a SentencePiece model that cannot hold more.
    """
    model = read_json(directory / "config.json")
    is_llama = _is_llama_tokenizer(found.config, model.get("model_type"))
    scheme = _prefix_scheme(found.config) if is_llama else None
    if isinstance(codec, SentencePieceCodec):
        if not is_llama and codec.strips_leading_space and not found.config.get("legacy", True):
            scheme = "first"
        more = [token for token in found.tokens if not codec.has(token)]
        room = _room(model, codec.vocab_size + len({token.content for token in more if not codec.knows(token)}))
        named = [token for token in found.named if not codec.has(token)]
        if not more and not named[:room]:
            return codec.with_prefix(scheme) if scheme in ("first", "never") else codec
        converted = sentencepiece_json.convert(sentencepiece_json.parse(codec.proto))
        if converted is None:
            converted = sentencepiece_json.convert_loosely(codec.proto, is_llama, scheme or "always")
            scheme = None
        if converted is None:
            raise ValueError(
                f"{directory / 'tokenizer.model'} has tokens added beside it ({(more + named)[0].content}), and is not "
                "of SentencePiece's kind BPE, the only one that Llamita can add to; save it as a tokenizer.json with "
                "transformers"
            )
        adds_ends = True
        tokens = [token if is_llama else _unnormalised(token) for token in found.tokens]
        codec = HuggingFaceCodec(converted)
    else:
        tokens = list(found.tokens)
    if scheme is not None and codec.marks_spaces:
        changed = codec.copy()
        sentencepiece_json.prefix_texts(changed, scheme)
        codec = HuggingFaceCodec(changed)
    if _class_name(found.config) == "GPT2Tokenizer":
        codec = codec.with_space_before(bool(found.config.get("add_prefix_space")))
    codec = codec.with_added(tokens)
    missing = [token for token in found.named if token.content not in codec.added]
    room = _room(model, codec.vocab_size)
    while missing and room is not None and len({token.content for token in missing} - codec.vocabulary.keys()) > room:
        missing.pop()
    codec = codec.with_added(missing)
    if _class_name(found.config) == "Qwen2Tokenizer":  # it adds them once more, by their names alone
        again = [AddedToken(token.content, special=True) for token in found.named if token.content in codec.added]
        codec = codec.with_added(again)
    if adds_ends:
        codec = _with_ends(codec, found)
    return codec.with_special(codec.vocabulary[name] for name in found.special if name in codec.vocabulary)


def _is_llama_tokenizer(config: Mapping[str, Any], model_type: Any) -> bool:
    """Whether transformers reads a directory by its LlamaTokenizer, which it does not where the model is Mistral's."""
    return _class_name(config) == "LlamaTokenizer" and model_type != "mistral"


def _class_name(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class")).removesuffix("Fast")


def _prefix_scheme(config: Mapping[str, Any]) -> str:
    """Which texts between added tokens get a space before them in LlamaTokenizer."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def _with_ends(codec: HuggingFaceCodec, found: AddedTokens) -> HuggingFaceCodec:
    """Returns the codec that puts around a text the tokens that the settings want there."""
    ends = {}
    for role, usual in (("bos", "<s>"), ("eos", "</s>")):
        name = _content(found.config.get(f"{role}_token", usual))
        if found.config.get(f"add_{role}_token") and name in codec.vocabulary:
            ends[role] = (name, codec.vocabulary[name])
    if not ends:
        return codec
    before, after = (f"{ends[role][0]}:{{0}}" if role in ends else "" for role in ("bos", "eos"))
    single = " ".join(part for part in (before, "$A:{0}", after) if part)
    pair = " ".join(part for part in (before, "$B:{0}", after) if part)
    changed = codec.copy()
    changed.post_processor = processors.TemplateProcessing(
        single=single.format(0), pair=f"{single.format(0)} {pair.format(1)}", special_tokens=[*ends.values()]
    )
    return HuggingFaceCodec(changed)


def _room(model: Mapping[str, Any], size: int) -> int | None:
    """How many more tokens the embeddings beside a vocabulary have; None where nothing says so."""
    rows = model.get("vocab_size")
    return max(rows - size, 0) if isinstance(rows, int) else None


def _unnormalised(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, an empty one where there is no file; ValueError names the file and the fault."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as fault:
        raise ValueError(f"{path} is not JSON: {fault}") from None
    return _object(content, str(path))


def _named(config: Mapping[str, Any]) -> list[Any]:
    """The tokens that a config names by a role, its own roles too."""
    own = [v for key, v in config.items() if key.endswith("_token") and key not in NAMED and isinstance(v, str)]
    for name in NAMED:
        if not isinstance(_content(config.get(name) or ""), str):
            raise ValueError(
                f"{name} in tokenizer_config.json must be a text, or an object with its content; got "
                f"{config[name]!r:.80}"
            )
    return [token for token in [*(config.get(name) for name in NAMED), *own] if token]


def _further(config: Mapping[str, Any]) -> list[Any]:
    """The special tokens of a config that have no role. They are control tokens only where they are new."""
    found: Any = next((config[key] for key in FURTHER if config.get(key)), [])
    found = list(found.values()) if isinstance(found, Mapping) else found
    return [token for token in found if isinstance(token, str | Mapping) and _content(token)]


def _token(value: Any, special: bool) -> AddedToken:
    if not isinstance(value, Mapping):
        return AddedToken(value, special=special)
    flags = {flag: bool(value[flag]) for flag in FLAGS[:-1] if flag in value}
    return AddedToken(value["content"], special=special, **flags)


def _plain(value: Any) -> Any:
    """A token, or several, by name alone; its flags are kept where the tokens are."""
    return [_content(token) for token in value] if isinstance(value, list) else _content(value)


def _content(value: Any) -> Any:
    return value.get("content", value) if isinstance(value, Mapping) else value


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__} where an object was expected")
    return value


def names_by_id(config: Mapping[str, Any], first: int) -> list[str]:
    """Returns the names of the tokens from an id on that `added_tokens_decoder` lists; gaps have names as well."""
    listed = config.get("added_tokens_decoder") or {}
    names = {int(number): _content(token) for number, token in listed.items() if str(number).isdigit()}
    return [names.get(number, f"<|reserved_token_{number}|>") for number in range(first, max(names, default=-1) + 1)]


def template_marks(tokens: Iterable[str], templates: Iterable[str]) -> frozenset[str]:
    """Returns those of the tokens that a chat template writes around messages, by the text of its source.

    Tags in pairs, `<think>` and `</think>`, are left out: they enclose a part of a message, and belong to its text.
    """
    sources = "\0".join(templates)
    names = frozenset(tokens)
    written = {name for name in names if name in sources and not name.isspace()}
    return frozenset(name for name in written if not {f"</{name[1:]}", f"<{name[2:]}"} & (names - {name}))
