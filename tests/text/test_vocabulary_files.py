"""`vocab.json` with `merges.txt`: the ids and the text of transformers, and one line for files that are damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from llamita.text.chat import Chat
from llamita.text.tokenizer import Tokenizer
from llamita.text.vocabulary_files import END
from tests.text.test_added_tokens import CHATML, CORPUS, TALK, TEMPLATE, check, token, write

transformers = pytest.importorskip("transformers")

GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
QWEN2 = {"tokenizer_class": "Qwen2Tokenizer"}
TEXTS = [
    "", " ", "the cat", " the  cat ", "the\ncat\r\n\n\t the   \n", "It's DON'T, we'LL and I'M'", "'s",
    "12 345 67 on2the", "café e\u0301 Å A\u030a", "😀 👍🏽 the", "Привет 日本語 العربية हिन्दी ٣٤ ½",
    "\u00a0the\u2028cat\u3000\x00\x7f\x85",
    f"{END}the cat{END}", f"the {END} cat", "<|im_start|>user\nthe cat<|im_end|>\n", "the   <|im_start|>   cat",
    "x<|im_start|>x <|im_end|><|im_end|>", "<extra>the<extra> cat <extra>", "theextrathe extra the", "<pad>[PAD]",
    "<|IM_START|> <tool_call>the</tool_call>", "\ufeffthe cat", "the" * 50 + " " * 20,
]  # fmt: skip


def train(special: tuple[str, ...] = ()) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS * 5 + "Don't 12 345 12"], trainer)
    return json.loads(tokenizer.to_str())["model"]


WITHOUT_END, WITH_END = train(), train((END,))
SIZE = len(WITHOUT_END["vocab"])


def write_vocabulary(directory: Path, model: dict[str, Any], ends: str = "\n") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (directory / "merges.txt").write_bytes("".join(line + ends for line in lines).encode())


# tokenizer_config.json, further files, and whether the vocabulary itself has the token that ends a text
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "the class alone": (GPT2, {}, True),
    "its fast name": ({"tokenizer_class": "GPT2TokenizerFast"}, {}, True),
    "an end that the vocabulary lacks": (GPT2, {}, False),
    "a space first": ({**GPT2, "add_prefix_space": True}, {}, True),
    "a space first, and tokens": ({**GPT2, "add_prefix_space": True}, {"added_tokens": CHATML}, True),
    "BOS and EOS around a text": ({**GPT2, "add_bos_token": True, "add_eos_token": True}, {}, False),
    "BOS of its own": ({**GPT2, "add_bos_token": True, "bos_token": "<s>"}, {}, True),
    "no BOS": ({**GPT2, "add_bos_token": True, "bos_token": None}, {}, True),
    "added_tokens.json": (GPT2, {"added_tokens": {END: SIZE, "<|im_start|>": SIZE + 1, "<|im_end|>": SIZE + 2}}, False),
    "special by the map": (
        GPT2,
        {
            "added_tokens": {"<|im_start|>": SIZE, "<|im_end|>": SIZE + 1},
            "special_tokens_map": {"eos_token": "<|im_end|>", "bos_token": END, "unk_token": token(END)},
        },
        True,
    ),
    "further ones by the map": (
        GPT2, {"special_tokens_map": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}}, True,
    ),
    "further ones": ({**GPT2, "additional_special_tokens": ["<extra>"], "pad_token": "[PAD]"}, {}, True),
    "flags": (
        {
            **GPT2,
            "added_tokens_decoder": {
                "0": token(END, True, lstrip=True, rstrip=True),
                str(SIZE): token("<|im_start|>", True, lstrip=True),
                str(SIZE + 1): token("<|im_end|>", rstrip=True),
                str(SIZE + 2): token("extra", single_word=True),
            },
        },
        {}, True,
    ),
    "Qwen2": (QWEN2, {}, True),
    "Qwen2, fast": ({"tokenizer_class": "Qwen2TokenizerFast"}, {}, False),
    "Qwen2, a space first": ({**QWEN2, "add_prefix_space": True}, {}, False),
    "Qwen2 as published": (
        {
            **QWEN2, "add_bos_token": False, "add_prefix_space": False, "bos_token": None, "errors": "replace",
            "eos_token": "<|im_end|>", "pad_token": END, "unk_token": None, "split_special_tokens": False,
            "model_max_length": 32768, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(SIZE): token(END, True), str(SIZE + 1): token("<|im_start|>", True),
                str(SIZE + 2): token("<|im_end|>", True), str(SIZE + 3): token("<tool_call>"),
            },
        },
        {"added_tokens": {END: SIZE, "<|im_start|>": SIZE + 1}}, False,
    ),
    "Qwen2, flags": (
        {
            **QWEN2,
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                str(SIZE): token(END, True, rstrip=True), str(SIZE + 1): token("<|im_start|>", True, lstrip=True),
                str(SIZE + 2): token("<|im_end|>", True, lstrip=True, rstrip=True),
                str(SIZE + 3): token("caf\u00e9", normalized=True), str(SIZE + 4): token("extra", single_word=True),
            },
        },
        {}, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_ids_and_text_are_those_of_transformers(name, tmp_path):
    config, files, has_end = BESIDE[name]
    write_vocabulary(tmp_path, WITH_END if has_end else WITHOUT_END)
    write(tmp_path, config, files)
    # Through `tokenizers`, an added token outside of ASCII comes back as broken bytes.
    ours = check(tmp_path, TEXTS, decodes=name != "Qwen2, flags")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    around = theirs("").input_ids
    assert ours.codec.ids_around_nothing() == around
    assert ours.adds_bos == (around[:1] == [theirs.bos_token_id])


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({"model_type": "qwen2"}, None),
        ({"model_type": "qwen3"}, None),
        ({"model_type": "qwen3"}, GPT2),
        ({"model_type": "qwen2"}, GPT2),  # transformers takes the class of the model
        ({"model_type": "qwen2"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"model_type": "llama", "tokenizer_class": "GPT2TokenizerFast"}, None),
        ({"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}, QWEN2),
        ({"model_type": "smollm3"}, QWEN2),
    ],
    ids=str,
)
def test_the_class_is_that_of_the_settings_or_of_the_model(model, config, tmp_path):
    write_vocabulary(tmp_path, WITH_END)
    write(tmp_path, config, {})
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2000, **model}))
    check(tmp_path, TEXTS)


def test_where_nothing_names_a_class_it_is_gpt2s(tmp_path):
    for name, config in (("named", GPT2), ("nothing", None)):
        write_vocabulary(tmp_path / name, WITH_END)
        write(tmp_path / name, config, {})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "named"), Tokenizer.load(tmp_path / "nothing")
    assert [ours.encode(text, allow_special=True) for text in TEXTS] == theirs(TEXTS).input_ids
    for bare in (tmp_path / "nothing" / "vocab.json", tmp_path / "nothing" / "merges.txt"):
        assert Tokenizer.load(bare).hash == ours.hash
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (0, 0, 0, None)


def test_another_file_counts_first_and_lines_may_end_as_on_windows(tmp_path):
    write_vocabulary(tmp_path, WITH_END, ends="\r\n")
    write(tmp_path, QWEN2, {})
    saved = check(tmp_path, TEXTS)
    saved.save(tmp_path)
    (tmp_path / "merges.txt").write_text("the file is not read")
    assert Tokenizer.load(tmp_path).hash == saved.hash
    assert Tokenizer.is_in(tmp_path)


def test_a_conversation_is_laid_out_as_transformers_does(tmp_path):
    config, files, _ = BESIDE["Qwen2 as published"]
    write_vocabulary(tmp_path, WITHOUT_END)
    write(tmp_path, {**config, "chat_template": TEMPLATE.replace("{{ bos_token }}", "")}, files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert list(Chat(ours).encode(TALK, add_generation_prompt=True).tokens) == expected


# --- files that are not of the form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CLIPTokenizer", "PreTrainedTokenizerFast", "RobertaTokenizerFast"])
def test_a_class_of_another_kind_is_refused_by_name(name, tmp_path):
    write_vocabulary(tmp_path, WITH_END)
    write(tmp_path, {"tokenizer_class": name}, {})
    with pytest.raises(ValueError, match=f"merges.txt of the tokenizer_class {name}, and Llamita reads") as fault:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_the_file_that_is_missing_is_named(missing, tmp_path):
    write_vocabulary(tmp_path, WITH_END)
    (tmp_path / missing).unlink()
    assert Tokenizer.is_in(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing; a tokenizer without a tokenizer.json needs"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("vocab.json", b"{", r"vocab\.json is not valid JSON"),
        ("vocab.json", b"[]", r"vocab\.json must hold a JSON object"),
        ("vocab.json", b"{}", r"vocab\.json holds no tokens"),
        ("vocab.json", b'{"t": "1"}', r"vocab\.json must map each token to its id, got 't': '1'"),
        ("vocab.json", b'{"t": -1}', "got 't': -1"),
        ("vocab.json", b'{"t": true}', "got 't': True"),
        ("vocab.json", b'{"t": 4000000000000}', "got 't': 4000000000000"),
        ("vocab.json", b'{"t": 0, "h": 0}', r"vocab\.json gives 't' and 'h' the same id, 0"),
        ("merges.txt", b"#version: 0.2\nh e\nthe\n", r"merges\.txt, line 3: expected two tokens and a space .* 'the'"),
        ("merges.txt", b"h e\n\nt he\n", r"merges\.txt, line 2: expected two tokens"),
        ("merges.txt", b"h e\nt he x\n", r"merges\.txt, line 2: expected two tokens"),
        ("merges.txt", b"h e\nt hez\n", r"merges\.txt, line 2: 'hez' is no token of vocab\.json beside it"),
        ("merges.txt", b"h e\nt\xffh\n", r"merges\.txt, line 2: a byte that is not UTF-8"),
    ],
)
def test_damage_is_named_with_its_place(file, content, words, tmp_path):
    write_vocabulary(tmp_path, WITH_END)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=words) as fault:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(fault.value)
    assert str(tmp_path) in str(fault.value)
