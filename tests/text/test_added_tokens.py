"""Tokens beside a vocabulary, as people's directories have them: the ids and the text of transformers."""

import base64
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from llamita.text import sentencepiece_json, sentencepiece_training
from llamita.text.bpe import special_tokens
from llamita.text.chat import Chat
from llamita.text.sentencepiece_codec import SentencePieceCodec
from llamita.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

CORPUS = (
    "the cat sat on the mat and the dog sat on the cat.\nWhere is the dog? On the mat!\n\n\tIt's   there, on the mat.\n"
)
SENTENCEPIECE = sentencepiece_training.train([CORPUS * 5], 310, special_tokens(2))
assert isinstance(SENTENCEPIECE, SentencePieceCodec)
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
CHATML = {"<|im_end|>": 311, "<|im_start|>": 310}
TEXTS = [
    "", "the cat", " the cat", "  the  cat ", "the\ncat\n", "<s>the cat</s>", "<s> the cat </s> the", "é the caté",
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", "the <|im_start|> cat", "the   <|im_start|>   cat",
    "<|im_start|><|im_end|>", "x<|im_start|>x", "<extra>the<extra> cat <extra>", "theextrathe extra the", "<pad>[PAD]",
    "▁the▁cat", "Ünïcode 😀", "<|IM_START|>", "the\n<|im_end|>\n\n  cat", "<tool_call>the</tool_call>",
]  # fmt: skip


def token(content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, "special": special, **usual, **flags}


ENDS = {"0": token("<unk>", True), "1": token("<s>", True), "2": token("</s>", True)}

# tokenizer_config.json, and further files, beside a tokenizer.model of 310 pieces
BESIDE: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "nothing": (LLAMA, {}),
    "no settings": (None, {"added_tokens": CHATML}),
    "added_tokens.json": ({}, {"added_tokens": CHATML}),
    "added_tokens.json, Llama": (LLAMA, {"added_tokens": CHATML}),
    "added_tokens.json, Llama, legacy": ({**LLAMA, "legacy": True}, {"added_tokens": CHATML}),
    "added_tokens.json, Llama, not legacy": (
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, {"added_tokens": CHATML},
    ),
    "added_tokens.json, Llama, no prefix": ({**LLAMA, "add_prefix_space": False}, {"added_tokens": CHATML}),
    "ids with a gap": (LLAMA, {"added_tokens": {"<extra>": 400, "<|im_start|>": 350}}),
    "one of the pieces": (LLAMA, {"added_tokens": {"<r0>": 3, "<|im_start|>": 310}}),
    "special by the map": (
        LLAMA, {"added_tokens": CHATML, "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": "<s>"}},
    ),
    "the map before the settings": (
        {**LLAMA, "eos_token": "</s>", "pad_token": "</s>"},
        {"added_tokens": CHATML, "special_tokens_map": {"eos_token": token("<|im_end|>"), "pad_token": "<unk>"}},
    ),
    "further special tokens by the map": (
        LLAMA, {"added_tokens": CHATML, "special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]}},
    ),
    "added_tokens_decoder": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("<|im_start|>", True), "311": token("<|im_end|>")}}, {},
    ),
    "the decoder before other files": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("<extra>")}, "eos_token": "</s>"},
        {"added_tokens": CHATML, "special_tokens_map": {"eos_token": "<extra>"}},
    ),
    "lstrip": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("<|im_start|>", lstrip=True), "311": token("<extra>")}},
        {},
    ),
    "rstrip": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("<|im_start|>", True, rstrip=True)}}, {},
    ),
    "both strip, not Llama": (
        {"added_tokens_decoder": {**ENDS, "310": token("<|im_start|>", True, rstrip=True, lstrip=True)}}, {},
    ),
    "an end that strips": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "1": token("<s>", True, rstrip=True, lstrip=True)}}, {},
    ),
    "single_word": ({**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("extra", single_word=True)}}, {}),
    "normalized": (
        {**LLAMA, "added_tokens_decoder": {**ENDS, "310": token("extra", normalized=True, lstrip=True)}}, {},
    ),
    "not legacy, of no class": ({"legacy": False}, {}),
    "not legacy, of no class, with tokens": ({"legacy": None}, {"added_tokens": CHATML}),
    "a piece that is named": ({"pad_token": "▁the", "tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "further ones twice": (
        {**LLAMA, "extra_special_tokens": ["<extra>"], "additional_special_tokens": ["<|im_start|>"]},
        {"special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}},
    ),
    "named by a role alone": ({**LLAMA, "pad_token": "[PAD]"}, {}),
    "named and further ones": (
        {**LLAMA, "pad_token": "[PAD]", "additional_special_tokens": ["<extra>", "<|im_start|>"]}, {},
    ),
    "of a name of its own": ({"image_token": "<extra>", "pad_token": "<pad>"}, {"added_tokens": CHATML}),
    "BOS and EOS around a text": (
        {**LLAMA, "add_bos_token": True, "add_eos_token": True}, {"added_tokens": CHATML},
    ),
}  # fmt: skip


def write(directory: Path, config: dict[str, Any] | None, files: dict[str, Any], model_type: str = "llama") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 2000}))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def check(directory: Path, texts: list[str] = TEXTS, leading_space: bool = True, decodes: bool = True) -> Tokenizer:
    """The tokenizer of a directory, compared with that of transformers; and saved, it is the same."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), Tokenizer.load(directory)
    copy = directory / "copy"
    ours.save(copy)
    (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
    again, theirs_again = Tokenizer.load(copy), transformers.AutoTokenizer.from_pretrained(copy)
    assert ours.vocab_size == len(theirs) == again.vocab_size == len(theirs_again)
    assert ours.hash == again.hash
    for role in ("bos", "eos", "unk", "pad"):
        expected, found = getattr(theirs, f"{role}_token_id"), getattr(ours, f"{role}_id")
        assert found == getattr(again, f"{role}_id")
        assert found == expected or expected is None, role  # Llamita knows <s> and </s> by their names
    pickled = pickle.loads(pickle.dumps(ours))
    for text in texts:
        if text[:1] in (" ", "▁") and not leading_space:
            continue
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, allow_special=True) == expected, text
        for tokenizer in (again, pickled):
            assert tokenizer.encode(text, allow_special=True) == expected, text
        assert theirs_again(text, add_special_tokens=False).input_ids == expected, text
        assert ours.encode_with_offsets(text, allow_special=True)[0] == expected, text
        assert ours.encode_with_offsets(text)[0] == ours.encode(text), text
        if decodes:
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True), text
            assert ours.decode(expected, skip_special=False) == theirs.decode(expected), text
    return ours


@pytest.mark.parametrize("name", BESIDE)
def test_beside_a_sentencepiece_model(name, tmp_path):
    config, files = BESIDE[name]
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, config, files)
    # A model without added tokens is read by SentencePiece, which keeps a space before a text apart.
    check(tmp_path, leading_space=name not in ("nothing", "not legacy, of no class"))


@pytest.mark.parametrize("name", ["added_tokens.json, Llama", "added_tokens_decoder"])
def test_beside_a_sentencepiece_model_of_mistral(name, tmp_path):
    config, files = BESIDE[name]
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, config, files, "mistral")
    check(tmp_path)


def byte_level(directory: Path, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS * 5], trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(directory / "tokenizer.json"))


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
SMALL = ["the cat", "  THE cat ", "e\u0301 caf\u00e9", *TEXTS[8:]]

# normaliser, tokens in the tokenizer.json, tokenizer_config.json, further files
IN_JSON: dict[str, tuple[Any, tuple[AddedToken, ...], dict[str, Any], dict[str, Any]]] = {
    "NFC": (normalizers.NFC(), (AddedToken("caf\u00e9", normalized=True),), FAST, {}),
    "NFD, in which a token is another": (normalizers.NFD(), (AddedToken("caf\u00e9", normalized=True),), FAST, {}),
    "lower case": (normalizers.Lowercase(), (AddedToken("<|im_start|>", normalized=True),), FAST, {}),
    "lower case, not the token": (normalizers.Lowercase(), (AddedToken("<|im_start|>", normalized=False),), FAST, {}),
    "strips and replaces": (
        normalizers.Sequence([normalizers.Strip(), normalizers.Replace("extra", "cat")]),
        (AddedToken("<|im_start|>", lstrip=True, rstrip=True), AddedToken("<extra>")), FAST, {},
    ),
    "flags of the decoder": (
        None, (AddedToken("<|im_start|>"),),
        {**FAST, "added_tokens_decoder": {"300": token("<|im_start|>", True, lstrip=True, rstrip=True)}}, {},
    ),
    "more in the decoder": (
        None, (AddedToken("<|im_start|>"),),
        {**FAST, "added_tokens_decoder": {"300": token("<|im_start|>"), "301": token("<|im_end|>", True)}}, {},
    ),
    "more in added_tokens.json": (None, (AddedToken("<|im_start|>"),), FAST, {"added_tokens": {"<|im_end|>": 301}}),
    "in the vocabulary, and named": (None, (), {**FAST, "additional_special_tokens": ["the"]}, {}),
    "the file before added_tokens.json": (
        None, (AddedToken("<|im_start|>", lstrip=True), AddedToken("<|im_end|>", single_word=True)), FAST,
        {"added_tokens": {"<|im_start|>": 286, "<|im_end|>": 287}},
    ),
    "special by the map": (
        None, (AddedToken("<|im_start|>"), AddedToken("<|im_end|>")), FAST,
        {"special_tokens_map": {"eos_token": token("<|im_end|>"), "additional_special_tokens": ["<|im_start|>"]}},
    ),
    "further by the map, and new": (
        None, (AddedToken("<|im_start|>"),), FAST,
        {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    ),
    "extra by the map, and new": (
        None, (AddedToken("<|im_start|>"),), FAST,
        {"special_tokens_map": {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
    ),
    "special by the settings": (
        None, (AddedToken("<|im_start|>"), AddedToken("<|im_end|>")),
        {**FAST, "eos_token": "<|im_end|>", "extra_special_tokens": ["<extra>"], "pad_token": "[PAD]"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_JSON)
def test_in_and_beside_a_tokenizer_json(name, tmp_path):
    normalizer, added, config, files = IN_JSON[name]
    byte_level(tmp_path, normalizer, added)
    write(tmp_path, config, files)
    # Through `tokenizers`, a token outside of ASCII comes back as broken bytes, and another as its normal form.
    check(tmp_path, SMALL, decodes=all(token.content.startswith("<|") for token in added))


@pytest.mark.parametrize("name", [name for name in BESIDE if name not in ("nothing", "no settings")])
def test_beside_the_json_of_a_sentencepiece_model(name, tmp_path):
    """A tokenizer.json as older transformers wrote it: transformers reads its vocabulary in the way of its class."""
    config, files = BESIDE[name]
    SENTENCEPIECE.write(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    write(tmp_path, config, files)
    check(tmp_path)


# --- marks of conversations ------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": "the cat  sat"}, {"role": "assistant", "content": "on the mat"}]


@pytest.mark.parametrize(
    "name", ["no settings", "added_tokens.json, Llama", "added_tokens_decoder", "lstrip", "rstrip"]
)
def test_marks_without_the_flag_are_control_tokens_of_a_conversation(name, tmp_path):
    config, files = BESIDE[name]
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, {**(config or {}), "chat_template": TEMPLATE}, files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), check(tmp_path)
    for add in (True, False):
        expected = theirs.apply_chat_template(TALK, add_generation_prompt=add, return_dict=False)
        assert list(Chat(ours).encode(TALK, add_generation_prompt=add).tokens) == expected
    mark = ours.codec.special_tokens["<|im_start|>"]
    told = [{"role": "user", "content": "say <|im_start|>system"}]
    assert Chat(ours).encode(told).tokens.count(mark) == 2  # the template's own
    assert mark not in ours.encode("<|im_start|>")


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PHI = {
    "310": token("<|user|>", rstrip=True), "311": token("<|assistant|>", rstrip=True), "312": token("<|end|>", True),
}  # fmt: skip
# In the manner of published models: the model's type, tokenizer_config.json, further files, what ends a turn
DIRECTORIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Llama 2": ("llama", {**LLAMA, **ROLES, "added_tokens_decoder": ENDS, "chat_template": INST}, {}, 2),
    "Llama 2, legacy": ("llama", {**LLAMA, **ROLES, "legacy": True, "chat_template": INST}, {}, 2),
    "TinyLlama": (
        "llama", {**LLAMA, **ROLES, "legacy": False, "chat_template": ZEPHYR}, {"special_tokens_map": ROLES}, 2,
    ),
    "Mistral": ("mistral", {**LLAMA, **ROLES, "added_tokens_decoder": ENDS, "chat_template": INST}, {}, 2),
    "Hermes": (
        "mistral",
        {**LLAMA, **ROLES, "eos_token": "<|im_end|>", "chat_template": TEMPLATE,
         "added_tokens_decoder": {**ENDS, "310": token("<|im_end|>", True), "311": token("<|im_start|>")}},
        {"added_tokens": {"<|im_end|>": 310, "<|im_start|>": 311}}, 310,
    ),
    "an older Hermes": (
        "llama", {**LLAMA, **ROLES, "chat_template": TEMPLATE},
        {"added_tokens": {"<|im_end|>": 310, "<|im_start|>": 311},
         "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": token("<s>", normalized=True)}}, 310,
    ),
    "Phi 3": (
        "llama",
        {**LLAMA, **ROLES, "eos_token": "<|end|>", "legacy": False, "chat_template": ZEPHYR,
         "added_tokens_decoder": {**ENDS, **PHI}}, {}, 312,
    ),
}  # fmt: skip


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("name", DIRECTORIES)
def test_conversations_in_the_directories_of_published_models(name, with_json, tmp_path):
    model_type, config, files, end = DIRECTORIES[name]
    SENTENCEPIECE.write(tmp_path)
    if not with_json:
        (tmp_path / "tokenizer.json").unlink()
    write(tmp_path, config, files, model_type)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for add in (True, False):
        expected = theirs.apply_chat_template(TALK, add_generation_prompt=add, return_dict=False)
        assert list(Chat(ours).encode(TALK, add_generation_prompt=add).tokens) == expected
    assert Chat(ours).end_of_turn == ((end,), ())


def test_user_defined_symbols_of_sentencepiece_are_marks_too(tmp_path):
    model = sentencepiece_json.parse(SENTENCEPIECE.proto)
    symbols = (("<|im_start|>", 0.0, 4), ("<|im_end|>", 0.0, 4), ("<other>", 0.0, 4))
    pieces = (*model.pieces, *symbols)
    proto = sentencepiece_json.serialize(replace(model, pieces=pieces), {"unk": 0, "bos": 1, "eos": 2})
    (tmp_path / "tokenizer.model").write_bytes(proto)
    write(tmp_path, {"chat_template": TEMPLATE}, {})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), check(tmp_path)
    assert {"<|im_start|>", "<|im_end|>"} == set(ours.codec.special_tokens) - set(SENTENCEPIECE.special_tokens)
    assert list(Chat(ours).encode(TALK, add_generation_prompt=False).tokens) == theirs.apply_chat_template(
        TALK, return_dict=False
    )
    assert 310 not in ours.encode("a<|im_start|>b<other>")
    assert ours.decode(ours.encode("a<|im_start|>b<other>")) == "a<|im_start|>b<other>"
    assert ours.encode("<other>")[-1] == 312
    told = [{"role": "user", "content": "say <|im_start|>system"}]
    assert Chat(ours).encode(told).tokens.count(310) == 2


def test_an_answer_ends_at_a_mark_without_the_flag(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, {**LLAMA, "chat_template": TEMPLATE}, {"added_tokens": CHATML})
    chat = Chat(Tokenizer.load(tmp_path))
    assert chat.end_of_turn == ((311,), ())


def test_the_flags_of_marks_stay_as_they_were(tmp_path):
    byte_level(tmp_path, None, (AddedToken("<|im_start|>"), AddedToken("<|im_end|>"), AddedToken("<think>")))
    write(tmp_path, {**FAST, "chat_template": TEMPLATE}, {})
    ours = Tokenizer.load(tmp_path)
    assert {"<|im_start|>", "<|im_end|>"} == ours.codec.special_tokens.keys()
    ours.save(tmp_path / "copy")
    spec = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert not any(token["special"] for token in spec["added_tokens"])
    assert Tokenizer.load(tmp_path / "copy").hash == ours.hash


def test_tags_in_pairs_belong_to_the_text(tmp_path):
    """Qwen 3's `<think>` and `</think>`, which its template writes and assistants too."""
    tags = (AddedToken("<think>"), AddedToken("</think>"), AddedToken("<tool_call>"), AddedToken("</tool_call>"))
    byte_level(tmp_path, None, tags)
    template = TEMPLATE + "{{ '<think>\n\n</think>\n\n<tool_call></tool_call>' }}"
    write(tmp_path, {**FAST, "chat_template": template}, {})
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not ours.codec.special_tokens
    text = "<think>the cat</think> sat <tool_call>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("default", ["none", "settings", "file", "both"])
def test_templates_in_files_of_their_own(default, tmp_path):
    byte_level(tmp_path, None, (AddedToken("<|im_start|>"), AddedToken("<|im_end|>")))
    in_settings = {"chat_template": "{{ 'settings' }}"} if default in ("settings", "both") else {}
    write(tmp_path, {**FAST, **in_settings}, {})
    if default in ("file", "both"):
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text("{{ '" + name + "' }}")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert ours.chat_templates == theirs.chat_template
    ours.save(tmp_path / "copy")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == theirs.chat_template
    assert Tokenizer.load(tmp_path / "copy").chat_templates == ours.chat_templates
    if default in ("file", "both"):
        tool = [{"type": "function", "function": {"name": "f", "description": "g", "parameters": {}}}]
        assert Chat(ours).render(TALK, tools=tool) == "tool_use"
        assert Chat(ours).render(TALK) == theirs.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)


def test_a_rank_file_with_names_beside_it(tmp_path):
    """Llama 3.1's names of tokens that Llama 3 had reserved, as tokenizer_config.json lists them."""
    letters = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b" c", b" cat"]
    lines = (base64.b64encode(letter) + b" %d\n" % rank for rank, letter in enumerate(letters))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    names = {str(261 + i): token(f"<|special_{i}|>", True) for i in (0, 1, 3)}
    write(tmp_path, {**FAST, "added_tokens_decoder": names, "bos_token": "<|special_0|>"}, {})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs) == 265
    assert ours.bos_id == theirs.bos_token_id == 261
    for text in ("the cat", "<|special_0|>the<|special_3|> cat <|special_1|>", "<|reserved_token_263|> the"):
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_json_without_a_prefix_read_in_llamas_way(prefix, tmp_path):
    SENTENCEPIECE.write(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    spec["decoder"]["decoders"] = spec["decoder"]["decoders"][:-1]
    file.write_text(json.dumps(spec))
    write(tmp_path, {**LLAMA, "add_prefix_space": prefix}, {"added_tokens": CHATML})
    check(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "added_tokens.json, Llama", "lstrip", "not legacy, of no class"])
def test_offsets_are_those_of_the_text(name, tmp_path):
    config, files = BESIDE[name]
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, config, files)
    ours = Tokenizer.load(tmp_path)
    text = "<s>the  <|im_start|> cat</s> the\n<|im_end|>mat"
    ids, offsets = ours.encode_with_offsets(text, allow_special=True)
    assert len(ids) == len(offsets)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert "".join(text[start:end] for start, end in offsets) == text
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        if token_id in ours.special_ids:
            names = {number: word for word, number in ours.codec.special_tokens.items()}
            assert text[start:end].strip() == names[token_id]


# --- files that are not of the form ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"added_tokens_decoder": ["<a>"]}, {}, "added_tokens_decoder holds a list where an object was expected"),
        ({"added_tokens_decoder": {"a": token("<a>")}}, {}, "added_tokens_decoder in .* must map ids to objects"),
        ({"added_tokens_decoder": {"310": "<a>"}}, {}, "must map ids to objects with a content, got '310'"),
        ({}, {"added_tokens": {"<a>": "310"}}, r"added_tokens\.json must map tokens to ids, got '<a>': '310'"),
        ({}, {"added_tokens": ["<a>"]}, r"added_tokens\.json holds a list where an object was expected"),
        ({}, {"special_tokens_map": 5}, r"special_tokens_map\.json holds a int where an object was expected"),
    ],
)
def test_faulty_files_are_named(config, files, words, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, config, files)
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(tmp_path)


KINDS: dict[str, dict[str, Any]] = {
    "removes spaces": {"removes_extra_spaces": True},
    "no prefix": {"adds_dummy_prefix": False},
    "symbols": {"symbols": ("<sym>", "cat")},
    "symbols, no prefix": {"symbols": ("<sym>", "cat"), "adds_dummy_prefix": False},
    "symbols, removes spaces": {"symbols": ("<sym>",), "removes_extra_spaces": True},
}
ODD = [
    *TEXTS,
    "<sym>the<sym> cat<|im_start|>cat <sym>",
    "  the   cat  <|im_end|>  the   cat  ",
    "<sym>",
    "the cat<sym>",
]


def changed(symbols: tuple[str, ...] = (), **changes: Any) -> bytes:
    """The model with further pieces of its users, and with other settings."""
    model = sentencepiece_json.parse(SENTENCEPIECE.proto)
    pieces = (*model.pieces, *((name, 0.0, sentencepiece_json.USER_DEFINED) for name in symbols))
    return sentencepiece_json.serialize(replace(model, pieces=pieces, **changes), {"unk": 0, "bos": 1, "eos": 2})


@pytest.mark.parametrize("config", [{}, LLAMA, {**LLAMA, "legacy": True}, {"legacy": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_beside_models_of_other_kinds(kind, config, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(changed(**KINDS[kind]))
    size = 310 + len(KINDS[kind].get("symbols", ()))
    write(tmp_path, config, {"added_tokens": {"<|im_start|>": size, "<|im_end|>": size + 1}})
    check(tmp_path, ODD)


def test_a_model_that_cannot_hold_more_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(changed(model_type=1))
    write(tmp_path, LLAMA, {})
    assert Tokenizer.load(tmp_path).vocab_size == 310
    write(tmp_path, LLAMA, {"added_tokens": CHATML})
    with pytest.raises(ValueError, match=r"tokenizer.model has tokens added beside it \(<\|im_start\|>\)"):
        Tokenizer.load(tmp_path)


def test_a_role_beyond_the_embeddings_adds_no_token(tmp_path):
    """A pad token that no file gives an id, and the model no row."""
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE.proto)
    write(tmp_path, {**LLAMA, "pad_token": "[PAD]"}, {})
    assert (Tokenizer.load(tmp_path).vocab_size, Tokenizer.load(tmp_path).pad_id) == (311, 310)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 310}))
    assert (Tokenizer.load(tmp_path).vocab_size, Tokenizer.load(tmp_path).pad_id) == (310, None)
