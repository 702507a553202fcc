"""Text to ids and back for a `tokenizer.json`, through the `tokenizers` library.

Knows the vocabulary and the added tokens; knows nothing of which of them begin or end a text (tokenizer.py does).
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from llamita.text import fast_bpe

SPACE_MARK = "▁"
UNKNOWN_PART = re.compile("untagged enum (?:Py)?(Model|Merge|Normalizer|PreTokenizer|PostProcessor|Decoder)")
"""How the library says that it does not know a part of a file."""


class HuggingFaceCodec:
    """A `tokenizers.Tokenizer` with byte-level or SentencePiece-like tokens.

    vocab_size: ids are 0..vocab_size-1. special_tokens: text -> id of the tokens that control a model. added_tokens: by
    id, those that are found in a text before it is split. `marks` are control tokens too, though the file does not say
    so; they are written as the file has them, and decoding shows them. Raises ValueError for a tokenizer whose tokens
    do not stand for bytes (WordPiece, a word list).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, marks: frozenset[str] = frozenset()) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that looks like a control token is text
        self._tokenizer = tokenizer
        self.marks = marks
        self.vocabulary = vocab = tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError("the vocabulary is empty")
        self.vocab_size = max(vocab.values()) + 1
        added = self.added_tokens = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self.added = tuple(token.content for token in added.values())
        self.strips_leading_space = self.marks_spaces = False
        to_bytes = self._bytes_of_token()
        self.bytes_of_id = [b""] * self.vocab_size
        for name, token_id in vocab.items():
            if token_id not in added:
                self.bytes_of_id[token_id] = to_bytes(name)
            elif not added[token_id].special or name in marks:
                self.bytes_of_id[token_id] = self.spelled(name)

    @functools.cached_property
    def spec(self) -> dict[str, Any]:
        """The tokenizer's JSON, parsed: large, and read only by who writes or changes a tokenizer."""
        spec: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return spec

    def spelled(self, name: str) -> bytes:
        """The bytes of an added token: those of its normal form where it is found in normalised text."""
        found = self._tokenizer.id_to_token(self.vocabulary[name]) or name
        return found.replace(SPACE_MARK, " ").encode() if self.marks_spaces else found.encode()

    @classmethod
    def from_file(cls, path: Path) -> "HuggingFaceCodec":
        """Read a tokenizer.json; ValueError names the file and the fault."""
        try:
            return _from_string(path.read_text("utf-8"))
        except OSError:
            raise
        except Exception as fault:  # the library raises bare Exceptions
            reason = " ".join(str(fault).split())
            if part := UNKNOWN_PART.search(reason):
                named = re.sub("(?<=[a-z])(?=[A-Z])", "_", part[1]).lower()
                reason = f"tokenizers {tokenizers.__version__} knows no {named} of this form; a newer version may, "
                reason += "unless the file is damaged"
            raise ValueError(f"{path} is not a tokenizer.json that can be used: {reason}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        # The library's own pickling forgets that control tokens are to be read as text.
        return _from_string, (self._tokenizer.to_str(), self.marks)

    def with_special(self, token_ids: Iterable[int]) -> "HuggingFaceCodec":
        """This codec, or one in which those added tokens are special though the file does not say so."""
        wanted = set(token_ids)
        return self._with_more_special(
            [token for number, token in self.added_tokens.items() if number in wanted], False
        )

    def with_marks(self, names: Iterable[str]) -> "HuggingFaceCodec":
        """This codec, or one in which those added tokens are `marks`."""
        wanted = set(names)
        return self._with_more_special([token for token in self.added_tokens.values() if token.content in wanted], True)

    def _with_more_special(self, tokens: list[tokenizers.AddedToken], are_marks: bool) -> "HuggingFaceCodec":
        found = {token.content for token in tokens if not token.special}
        if not found:
            return self
        listed = [
            {**token, "special": token["special"] or token["content"] in found} for token in self.spec["added_tokens"]
        ]
        text = json.dumps({**self.spec, "added_tokens": listed})
        return _from_string(text, self.marks | found if are_marks else self.marks)

    def with_added(self, tokens: Sequence[tokenizers.AddedToken]) -> "HuggingFaceCodec":
        """This codec, or one to which those tokens are added, with the next ids in their order where it lacks them."""
        known = {
            token.content: token.__getstate__()
            for token in self.added_tokens.values()
            if token.content not in self.marks
        }
        if all(known.get(token.content) == token.__getstate__() for token in tokens):
            return self
        changed = self.copy()
        before = changed.to_str()
        changed.add_tokens(list(tokens))
        after = changed.to_str()
        if after == before:
            return self
        if any(token.content in self.special_tokens and not token.special for token in tokens):
            changed = tokenizers.Tokenizer.from_str(after)  # the library itself still takes them for special ones
        return HuggingFaceCodec(changed).with_marks(self.marks)

    def with_space_before(self, wanted: bool) -> "HuggingFaceCodec":
        """This codec, or one that puts a space before a text that has none, or puts none there."""
        splits = _with_space_before(self.spec.get("pre_tokenizer"), wanted)
        if splits == self.spec.get("pre_tokenizer"):
            return self
        return _from_string(json.dumps({**self.spec, "pre_tokenizer": splits}), self.marks)

    def copy(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, as the file has it."""
        return tokenizers.Tokenizer.from_str(json.dumps(self._as_given()))

    def encode(self, text: str) -> list[int]:
        fast = self._fast.encode(text) if self._fast else None
        return self._tokenizer.encode(text, add_special_tokens=False).ids if fast is None else fast

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast:
            return [self.encode(text) for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_special(self, text: str) -> list[int]:
        return self._with_special.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str, allow_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters that each stands for: [start, end) in the text as it was given."""
        tokenizer = self._with_special if allow_special else self._tokenizer
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def ids_around_nothing(self) -> list[int]:
        """The ids that the file's post-processor puts around an empty text; `encode` leaves them out."""
        return self._tokenizer.encode("", add_special_tokens=True).ids

    def fingerprint(self) -> str:
        """sha256 over what decides ids: not over how a text is decoded or how a pair of texts is joined."""
        given = self._as_given()
        decisive = {key: given.get(key) for key in ("normalizer", "pre_tokenizer", "added_tokens")}
        # Options that are off are left out, so that a library version that adds one leaves the hash alone.
        decisive["model"] = {key: value for key, value in self.spec["model"].items() if value not in (None, False, "")}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        if self.marks:
            return self.copy().save(str(directory / "tokenizer.json"), pretty=True)
        self._tokenizer.save(str(directory / "tokenizer.json"), pretty=True)

    def _as_given(self) -> dict[str, Any]:
        """The tokenizer's JSON, in which `marks` are no special tokens."""
        tokens = [
            {**token, "special": False} if token["content"] in self.marks else token
            for token in self.spec["added_tokens"]
        ]
        return {**self.spec, "added_tokens": tokens}

    @functools.cached_property
    def _fast(self) -> fast_bpe.FastBpe | None:
        if not fast_bpe.splits_as_gpt2(_settings(self._tokenizer.pre_tokenizer)):
            return None
        return fast_bpe.fast_bpe(self._tokenizer, self.spec)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _bytes_of_token(self) -> Any:
        """The function from a token's name to its bytes, by the kind of decoder; says what that does with spaces."""
        decoder = _settings(self._tokenizer.decoder)
        steps = _flat(decoder) if decoder else []
        kinds = {step["type"] for step in steps}
        others = [step for step in steps if step["type"] not in ("ByteLevel", "ByteFallback", "Fuse")]
        if "ByteLevel" in kinds and not others:
            return fast_bpe.bytes_of_name
        marks = [step for step in others if step["type"] == "Metaspace" or _replaces(step) == (SPACE_MARK, " ")]
        fused = [step["type"] for step in steps].index("Fuse") if "Fuse" in kinds else len(steps)
        by_token = [step for step in steps[:fused] if step not in marks and step["type"] == "Replace"]
        replaced = [_replaces(step) for step in by_token]
        ends = [step for step in others if step["type"] == "Strip"]
        understood = len(marks) + len(replaced) + len(ends) == len(others) and None not in replaced
        if marks and "ByteLevel" not in kinds and understood and all(map(_strips_one_space, ends)):
            self.marks_spaces = True
            self.strips_leading_space = any(step["start"] > 0 for step in ends) or any(
                step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in marks
            )
            byte_pieces = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if "ByteFallback" in kinds else {}

            def to_bytes(name: str) -> bytes:
                for old, new in filter(None, replaced):
                    name = name.replace(old, new)
                return byte_pieces.get(name) or name.replace(SPACE_MARK, " ").encode()

            return to_bytes
        named = ", ".join(step["type"] for step in steps) or None
        raise ValueError(
            f"its decoder is {named}; only byte-level tokens (ByteLevel) and SentencePiece tokens "
            "(Metaspace, or Replace and ByteFallback) stand for bytes"
        )


def _with_space_before(splits: Any, wanted: bool) -> Any:
    """The settings of a pre-tokenizer of bytes, with or without a space before a text that has none."""
    if isinstance(splits, list):
        return [_with_space_before(step, wanted) for step in splits]
    if not isinstance(splits, dict):
        return splits
    if splits.get("type") == "ByteLevel":
        return {**splits, "add_prefix_space": wanted}
    return {key: _with_space_before(value, wanted) for key, value in splits.items()}


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of a decoder, in their order."""
    inner = decoder.get("decoders")
    return [decoder] if inner is None else [step for part in inner for step in _flat(part)]


def _replaces(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a step of a decoder writes for what, token by token; None where that is no plain text."""
    if step["type"] != "Replace":
        return None
    pattern = step["pattern"].get("String", step["pattern"].get("Regex", ""))
    is_plain = "String" in step["pattern"] or pattern == SPACE_MARK
    return (pattern, step["content"]) if is_plain else None


def _strips_one_space(step: dict[str, Any]) -> bool:
    """Whether a step takes one space from the start of a text, or nothing."""
    return step["content"] == " " and step["start"] in (0, 1) and step["stop"] == 0


def _from_string(text: str, marks: frozenset[str] = frozenset()) -> HuggingFaceCodec:
    return HuggingFaceCodec(tokenizers.Tokenizer.from_str(text), marks)


def _settings(part: Any) -> dict[str, Any]:
    """Returns a part of the library's tokenizer as its JSON has it; nothing for a part that is not there."""
    settings: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return settings
