"""One tokenizer for the whole library: text to ids, ids to text, to and from a directory.

Decides which tokens begin and end a text, and reads and writes the Hugging Face files around a vocabulary. How text
becomes ids is the business of the two codecs; how a vocabulary is trained, of bpe.py.
"""

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamita.storage.gguf_header import is_gguf
from llamita.storage.peft_directory import VOCABULARY
from llamita.text import added_tokens, gguf_tokenizer, sentencepiece_json, tiktoken_ranks, vocabulary_files
from llamita.text.added_tokens import read_json, template_marks
from llamita.text.huggingface_codec import HuggingFaceCodec
from llamita.text.sentencepiece_codec import SentencePieceCodec

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # all that `save` writes
MARKS = ("<|im_start|>", "<|im_end|>")  # of a template that nearly every model for conversations has been tuned with
ROLES = ("bos", "eos", "unk", "pad")
OWN_SETTINGS = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
"""The tokenizer_config.json of a tokenizer trained here."""


class Tokenizer:
    """A vocabulary with its special tokens.

    vocab_size: ids are 0..vocab_size-1, specials included. bos_id, eos_id, unk_id, pad_id: None where there is none.
    special_ids: tokens that control a model; text never becomes one unless `encode` is told to allow it.
    strips_leading_space: where true (SentencePiece with a dummy prefix), `decode` drops one space from the front of the
    joined bytes; whoever joins `token_bytes` piece by piece must drop it too, once, at the start of a text.
    """

    def __init__(
        self, codec: HuggingFaceCodec | SentencePieceCodec, config: dict[str, Any], roles: dict[str, int | None]
    ):
        self.codec = codec
        self._config = config
        self.vocab_size = codec.vocab_size
        self.special_ids = frozenset(codec.special_tokens.values())
        self.strips_leading_space = codec.strips_leading_space
        self.chat_templates = _chat_templates(config.get("chat_template"))  # by name; most have "default" alone
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = (roles.get(role) for role in ROLES)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Open a directory, a tokenizer.json, a GGUF file with a tokenizer in it, or a tokenizer.model, which is
        SentencePiece's or, of Llama 3, tiktoken's.

        A directory's tokenizer.model is read by `sentencepiece`, unless the tokenizer.json beside it says otherwise.
        One of tiktoken's is read only where there is no tokenizer.json; vocab.json and merges.txt, where there is
        neither file.
        Raises FileNotFoundError or ValueError with one line that names the file and the fault.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no tokenizer at {path}; `llamita tokenizer train` makes one")
        if is_gguf(path):
            codec, config, roles = gguf_tokenizer.read(path)
            return cls(_with_marks(codec, config), config, roles)
        file = _tokenizer_file(path) if path.is_dir() else path
        config = read_json(file.parent / "tokenizer_config.json")
        if in_two_files := file.name in (vocabulary_files.TOKENS, vocabulary_files.MERGES):
            codec, config = vocabulary_files.read(file.parent, config)
        elif file.suffix == ".json" or file.read_bytes()[:1] == b"{":
            codec = HuggingFaceCodec.from_file(file)
        elif tiktoken_ranks.is_rank_file(file):
            codec = tiktoken_ranks.codec_from_file(file, functools.partial(added_tokens.names_by_id, config))
        else:
            codec = SentencePieceCodec.from_file(file)
            beside = path / "tokenizer.json"
            if path.is_dir() and beside.exists():
                spec = read_json(beside)
                if not added_tokens.is_of_model(spec, codec.proto, path):
                    codec = HuggingFaceCodec.from_file(beside)
                else:  # decides it for transformers
                    begins = bool(config.get("add_bos_token")) or sentencepiece_json.begins_texts(spec)
                    config = {**config, "add_bos_token": begins}
        found = added_tokens.read(file.parent, config, codec)
        codec, config = added_tokens.complete(codec, found, file.parent, adds_ends=in_two_files), found.config
        if templates := _template_files(file.parent):  # where there are any, transformers reads these alone
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        roles = _find_roles(codec, config, file.parent)
        if isinstance(codec, HuggingFaceCodec):
            codec = codec.with_special(token_id for token_id in roles.values() if token_id is not None)
        return cls(_with_marks(codec, config), config, roles)

    @staticmethod
    def is_in(place: Path) -> bool:
        """Whether a directory, or a GGUF file, holds a tokenizer."""
        if is_gguf(place):
            return gguf_tokenizer.has_tokenizer(place)
        return any((place / name).is_file() for name in VOCABULARY)

    @classmethod
    def from_codec(cls, codec: HuggingFaceCodec | SentencePieceCodec) -> "Tokenizer":
        """A tokenizer without files around it; the special tokens `<s>`, `</s>` and `<unk>` have those roles.
        So have Llama 3's."""
        return cls(codec, {}, _default_roles(codec))

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of what decides ids; the same after a save and a load."""
        return hashlib.sha256(f"{self.codec.fingerprint()} {self.bos_id} {self.eos_id}".encode()).hexdigest()

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether transformers, unless told otherwise, puts the BOS token before a text that this tokenizer encodes."""
        if self.bos_id is None:
            return False
        if isinstance(self.codec, HuggingFaceCodec):  # its post-processor decides, whatever the settings beside it say
            return self.codec.ids_around_nothing()[:1] == [self.bos_id]
        return bool(self._config.get("add_bos_token", True))

    @property
    def begins_texts(self) -> bool:
        """Whether a text that a model goes on from begins with the BOS token.

        It does where transformers puts it there, and for tokenizers trained here, whose files leave that to whoever
        asks (`OWN_SETTINGS`) while all texts that a model learns from begin with it.
        """
        own = OWN_SETTINGS.items() <= (self._config or OWN_SETTINGS).items()
        return self.bos_id is not None and (own or self.adds_bos)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that lays a conversation out as text (chat.py reads it); `save` keeps it."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self.chat_templates["default"] = source

    def for_classification(self, pad_id: int | None, max_length: int, keeps_end: bool) -> "Tokenizer":
        """The same tokenizer whose files tell how a classifier's texts are laid out: what pads them, how many tokens
        they may have, and which side of a longer one is kept."""
        names = {token_id: name for name, token_id in self.codec.special_tokens.items()}
        config = {**(self._config or OWN_SETTINGS), "model_max_length": max_length}
        config["truncation_side"] = "left" if keeps_end else "right"
        roles = {role: getattr(self, f"{role}_id") for role in ROLES}
        if pad_id in names:
            config, roles = {**config, "pad_token": names[pad_id]}, {**roles, "pad": pad_id}
        changed = Tokenizer(self.codec, config, roles)
        changed.chat_templates = dict(self.chat_templates)
        return changed

    @property
    def max_length(self) -> int | None:
        """Tokens that a text may have, special ones counted, where the files say so."""
        value = self._config.get("model_max_length")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def keeps_end(self) -> bool:
        """Whether a text that is too long keeps its end; it keeps its start where the files do not say."""
        return self._config.get("truncation_side") == "left"

    def encode(self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of a text, with the token that begins or ends a text where asked.

        Control tokens spelled in the text are encoded as the characters they are, unless `allow_special`. Raises
        ValueError for a lone surrogate, which no encoding can hold, and where bos or eos is asked of a tokenizer that
        has none.
        """
        _check_text(text)
        begin, end = self._ends(bos, eos)
        ids = self.codec.encode_with_special(text) if allow_special else self.codec.encode(text)
        return [*begin, *ids, *end] if begin or end else ids

    def encode_with_offsets(self, text: str, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and for each id where the characters of the text that it stands for begin and end, as the tokenizer
        itself says: those of a text that it normalises too."""
        _check_text(text)
        return self.codec.encode_with_offsets(text, allow_special)

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[np.ndarray]:
        """`encode` of each text, as int32 arrays. A byte-level BPE trained here takes one thread."""
        for text in texts:
            _check_text(text)
        begin, end = self._ends(bos, eos)
        return [np.array([*begin, *ids, *end], dtype=np.int32) for ids in self.codec.encode_batch(texts)]

    def encode_joined(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of each text, laid end to end: int32 [tokens], and the number of tokens of each, int64 [texts]."""
        for text in texts:
            _check_text(text)
        begin, end = self._ends(bos, eos)
        joined = array("i")  # takes a list of ints several times faster than numpy does
        lengths = np.empty(len(texts), dtype=np.int64)
        for number, ids in enumerate(self.codec.encode_batch(texts)):
            joined.fromlist(begin)
            joined.fromlist(ids)
            joined.fromlist(end)
            lengths[number] = len(ids)
        return np.array(joined, dtype=np.int32), lengths + len(begin) + len(end)

    def decode(self, ids: Iterable[int] | np.ndarray, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is outside the vocabulary of 0..{self.vocab_size - 1}")
        table = self.codec.bytes_of_id if skip_special else self._bytes_with_special
        joined = b"".join([table[token_id] for token_id in ids])
        if self.strips_leading_space and joined[:1] == b" ":
            joined = joined[1:]
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for; b"" for a special token. See `strips_leading_space`."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of 0..{self.vocab_size - 1}")
        return self.codec.bytes_of_id[token_id]

    def spelled_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, and for a special token those of its name."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of 0..{self.vocab_size - 1}")
        return self._bytes_with_special[token_id]

    def piece(self, token_id: int) -> str:
        """A token as it is shown by itself: a special one by its name, bytes that are no whole character as U+FFFD."""
        return self.spelled_bytes(token_id).decode("utf-8", errors="replace")

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json (and tokenizer.model) into a directory, made if need be.

        `transformers.AutoTokenizer` opens it and gives the ids of `encode`. A tokenizer trained here states
        add_bos_token false: nobody gets a BOS that was not asked for. Others' settings and chat template are kept as
        they were.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = dict(self._config or OWN_SETTINGS)
        if isinstance(self.codec, SentencePieceCodec):
            self.codec.write(directory, self.bos_id if config.get("add_bos_token", True) else None)
        else:
            self.codec.write(directory)
        if self.chat_templates.keys() == {"default"}:
            config["chat_template"] = self.chat_template
        elif self.chat_templates:
            config["chat_template"] = [{"name": k, "template": v} for k, v in sorted(self.chat_templates.items())]
        names = {token_id: name for name, token_id in self.codec.special_tokens.items()}
        for role in ROLES:
            token_id = getattr(self, f"{role}_id")
            if token_id in names:
                config.setdefault(f"{role}_token", names[token_id])
        if (directory / "tokenizer.json").exists():
            config.pop("added_tokens_decoder", None)  # the tokenizer.json has them all
            config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (directory / "tokenizer_config.json").write_text(text + "\n", "utf-8")

    @functools.cached_property
    def _bytes_with_special(self) -> list[bytes]:
        table = list(self.codec.bytes_of_id)
        for name, token_id in self.codec.special_tokens.items():
            table[token_id] = self.codec.spelled(name)
        return table

    def _ends(self, bos: bool, eos: bool) -> tuple[list[int], list[int]]:
        begin = [self.bos_id] if bos else []
        end = [self.eos_id] if eos else []
        if None in begin or None in end:
            raise ValueError("this tokenizer has no token that " + ("begins" if None in begin else "ends") + " a text")
        return [token for token in begin if token is not None], [token for token in end if token is not None]


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as fault:
        code = ord(text[fault.start])
        raise ValueError(f"the text holds a lone surrogate, U+{code:04X}, at character {fault.start}") from None


# --- reading directories -------------------------------------------------------------------------------------------


def _tokenizer_file(directory: Path) -> Path:
    """Returns the file to begin with: what is beside a SentencePiece model may still say otherwise."""
    model, whole = directory / "tokenizer.model", directory / "tokenizer.json"
    in_two_files = (directory / vocabulary_files.TOKENS, directory / vocabulary_files.MERGES)
    if not model.exists() and not whole.exists():
        if any(file.is_file() for file in in_two_files):
            return in_two_files[0]
        other = "; Mistral's tekken.json is not read" if (directory / "tekken.json").is_file() else ""
        raise FileNotFoundError(
            f"{directory} holds neither a tokenizer.json nor a tokenizer.model, nor vocab.json with merges.txt{other}"
        )
    return whole if whole.exists() and (not model.exists() or tiktoken_ranks.is_rank_file(model)) else model


def _find_roles(
    codec: HuggingFaceCodec | SentencePieceCodec, config: dict[str, Any], directory: Path
) -> dict[str, int | None]:
    """Returns the ids that begin, end and pad a text: the first file that names a role decides, null included."""
    roles = _default_roles(codec)
    by_name = (
        {**codec.vocabulary, **codec.special_tokens} if isinstance(codec, HuggingFaceCodec) else codec.special_tokens
    )
    by_text = [config]
    by_id = [read_json(directory / "generation_config.json"), read_json(directory / "config.json")]
    for role in ROLES:
        named = next((source[f"{role}_token"] for source in by_text if f"{role}_token" in source), ...)
        numbered = next((source[f"{role}_token_id"] for source in by_id if f"{role}_token_id" in source), None)
        if named is not ...:
            text = named.get("content") if isinstance(named, dict) else named
            roles[role] = by_name.get(text) if text is not None else None
        elif numbered is not None and roles[role] is None:
            first = numbered[0] if isinstance(numbered, list) else numbered
            roles[role] = first if 0 <= first < codec.vocab_size else None
    return roles


def _default_roles(codec: HuggingFaceCodec | SentencePieceCodec) -> dict[str, int | None]:
    if isinstance(codec, SentencePieceCodec):
        return {"bos": codec.bos_id, "eos": codec.eos_id, "unk": codec.unk_id, "pad": codec.pad_id}
    names = {
        "bos": (BOS, tiktoken_ranks.BEGIN),
        "eos": (EOS, tiktoken_ranks.END),
        "unk": (UNKNOWN,),
        "pad": ("<pad>",),
    }
    found = {role: [name for name in given if name in codec.special_tokens] for role, given in names.items()}
    return {role: codec.special_tokens[known[0]] if known else None for role, known in found.items()}


def _template_files(directory: Path) -> dict[str, str]:
    """The templates that stand in files of their own, by name."""
    files = {"default": directory / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    return {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}


def _with_marks(
    codec: HuggingFaceCodec | SentencePieceCodec, config: dict[str, Any]
) -> HuggingFaceCodec | SentencePieceCodec:
    """Returns the codec in which what a chat template writes around messages are control tokens."""
    sources = _chat_templates(config.get("chat_template")).values()
    return codec.with_marks(template_marks(codec.added, [*sources, *MARKS]))


def _chat_templates(value: Any) -> dict[str, str]:
    """The templates of a tokenizer_config.json by name: it has one, or several with their names, or none."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": source} for name, source in value.items()]
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        found = {entry.get("name"): entry.get("template") for entry in value}
        if all(isinstance(name, str) and isinstance(source, str) for name, source in found.items()):
            return found
    raise ValueError("chat_template in tokenizer_config.json must be a text, or a list of objects of name and template")
