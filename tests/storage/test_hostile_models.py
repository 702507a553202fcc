"""Broken and malicious model directories: each is refused at once, by name, without a large allocation.

All are loaded in one process whose address space may grow by half a gigabyte only: a wild allocation fails there.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llamita
from llamita.backend.torch.model import weights
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.storage import files, model_directory, safetensors
from llamita.text.bpe import train_bpe_from_iterator

CONFIG = ModelConfig(300, 16, 32, 2, 4, 2, 64)
WEIGHTS = "model.safetensors"


def make_model(directory: Path) -> None:
    with files.atomic_directory(directory) as temporary:
        model_directory.save_config(temporary, CONFIG)
        model_directory.save_tensors(temporary, weights.to_host_arrays(weights.build_model(CONFIG)))
        train_bpe_from_iterator(meadow.corpus(0, 200, "train"), 300).save(temporary)


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(text: bytes | str, data: bytes = b"") -> bytes:
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def edit_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        header, data = header_of(directory / WEIGHTS)
        changed = change(header)
        (directory / WEIGHTS).write_bytes(with_header(json.dumps(header if changed is None else changed), data))

    return edit


def edit_entry(**changes: object) -> Callable[[Path], None]:
    """Change the header entry of the first norm's weight, 16 numbers."""
    return edit_header(lambda header: header["model.norm.weight"].update(changes))


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    encoded = content if isinstance(content, bytes) else content.encode()
    return lambda directory: (directory / name).write_bytes(encoded) and None


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    def shorten(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: keep(len(content))])

    return shorten


def set_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return edit


def copied(arrays: dict[str, HostArray]) -> dict[str, HostArray]:
    """The arrays in memory of their own, so that their file can be written anew."""
    return {name: HostArray(a.dtype, a.shape, memoryview(bytes(a.data))) for name, a in arrays.items()}


def edit_arrays(change: Callable[[dict[str, HostArray]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        arrays = copied(model_directory.load_tensors(directory))
        change(arrays)
        model_directory.save_tensors(directory, arrays)

    return edit


def numbers(value: float, dtype: type = np.float32) -> HostArray:
    return HostArray.from_numpy(np.full(16, value, dtype=dtype))


def with_index(change: Callable[[dict, Path], None]) -> Callable[[Path], None]:
    """Two shards and an index, which `change` edits."""

    def edit(directory: Path) -> None:
        arrays = copied(model_directory.load_tensors(directory))
        names = list(arrays)
        index = {"weight_map": {}}
        for number, part in enumerate((names[:5], names[5:]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            safetensors.write_safetensors(directory / file, {name: arrays[name] for name in part})
            index["weight_map"] |= dict.fromkeys(part, file)
        (directory / WEIGHTS).unlink()
        change(index, directory)
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def link_outside(index: dict, directory: Path) -> None:
    outside = directory.parent / f"{directory.name} outside.safetensors"
    (directory / FIRST).rename(outside)
    (directory / FIRST).symlink_to(outside)


def repeat_a_tensor(index: dict, directory: Path) -> None:
    first, second = (copied(safetensors.read_safetensors(directory / name)) for name in (FIRST, SECOND))
    safetensors.write_safetensors(directory / SECOND, dict([first.popitem()]) | second)


DEEP = "[" * 100_000
# name -> (how a good model becomes this one, what the line must say)
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights: empty": (write(WEIGHTS, b""), WEIGHTS),
    "weights: seven bytes": (write(WEIGHTS, b"1234567"), WEIGHTS),
    "weights: a length alone": (write(WEIGHTS, struct.pack("<Q", 100)), WEIGHTS),
    "weights: a header of 2^63 bytes": (write(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"), WEIGHTS),
    "weights: a header longer than the file": (write(WEIGHTS, struct.pack("<Q", 3) + b"{}"), WEIGHTS),
    "weights: cut inside the header": (cut(WEIGHTS, lambda size: 60), WEIGHTS),
    "weights: no JSON": (write(WEIGHTS, with_header("{not json")), "broken header"),
    "weights: a list": (write(WEIGHTS, with_header("[1, 2]")), "expected an object"),
    "weights: nested without end": (write(WEIGHTS, with_header(DEEP)), "broken header"),
    "weights: a name twice": (write(WEIGHTS, with_header('{"x": {}, "x": {}}')), "'x' twice"),
    "weights: no UTF-8": (write(WEIGHTS, with_header(b'{"\xff": {}}')), "broken header"),
    "weights: a number of a million digits": (write(WEIGHTS, with_header("[" + "9" * 10**6 + "]")), "broken header"),
    "weights: one byte short": (cut(WEIGHTS, lambda size: size - 1), "truncated"),
    "weights: half": (cut(WEIGHTS, lambda size: size // 2), "truncated"),
    "weights: a byte too many": (
        lambda directory: write(WEIGHTS, (directory / WEIGHTS).read_bytes() + b"x")(directory), "the file holds",
    ),
    "weights: overlapping": (edit_entry(data_offsets=[0, 64]), "overlap or gape"),
    "weights: a gap": (edit_header(lambda header: header.pop("model.norm.weight") and None), "overlap or gape"),
    "weights: negative offsets": (edit_entry(data_offsets=[-64, 0]), "is broken"),
    "weights: offsets reversed": (edit_entry(data_offsets=[64, 0]), "is broken"),
    "weights: offsets of text": (edit_entry(data_offsets=["0", "64"]), "is broken"),
    "weights: fractional offsets": (edit_entry(data_offsets=[0.5, 64.5]), "is broken"),
    "weights: three offsets": (edit_entry(data_offsets=[0, 1, 2]), "is broken"),
    "weights: offsets of 2^62": (edit_entry(data_offsets=[2**62, 2**62 + 64]), "overlap or gape"),
    "weights: a negative shape": (edit_entry(shape=[-16]), "is broken"),
    "weights: a shape of 2^62": (edit_entry(shape=[2**31, 2**31]), "cannot fill"),
    "weights: a shape of nothing": (edit_entry(shape=None), "is broken"),
    "weights: a shape of truth": (edit_entry(shape=[True] * 16), "is broken"),
    "weights: an unknown type": (edit_entry(dtype="F13"), "dtype 'F13'"),
    "weights: a type of two": (edit_entry(dtype=["F32", "F16"]), "is broken"),
    "weights: whole numbers": (
        edit_arrays(lambda arrays: arrays.update({"model.norm.weight": numbers(1, np.int32)})), "has dtype I32",
    ),
    "weights: one missing": (
        edit_arrays(lambda arrays: arrays.pop("model.norm.weight")), "model.norm.weight is missing",
    ),
    "weights: one too many": (edit_arrays(lambda arrays: arrays.update(bogus=numbers(1))), "bogus is not part"),
    "weights: of another shape": (
        edit_arrays(lambda arrays: arrays.update({"lm_head.weight": numbers(1)})), "lm_head.weight has shape [16]",
    ),
    "weights: NaN": (
        edit_arrays(lambda arrays: arrays.update({"model.norm.weight": numbers(float("nan"))})), "NaN or infinite",
    ),
    "weights: infinite": (
        edit_arrays(lambda arrays: arrays.update({"model.norm.weight": numbers(float("inf"))})), "NaN or infinite",
    ),
    "weights: none": (lambda directory: (directory / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "weights: a directory": (
        lambda directory: ((directory / WEIGHTS).unlink(), (directory / WEIGHTS).mkdir()), f"no {WEIGHTS}",
    ),
    "weights: a pipe": (
        lambda directory: ((directory / WEIGHTS).unlink(), os.mkfifo(directory / WEIGHTS)), f"no {WEIGHTS}",
    ),
    "weights: pickled": (
        lambda directory: (directory / WEIGHTS).rename(directory / "pytorch_model.bin"), "only `llamita convert` reads",
    ),
    "index: a path upwards": (
        with_index(lambda index, d: index["weight_map"].update({"model.norm.weight": "../../x"})), "'../../x'",
    ),
    "index: an absolute path": (
        with_index(lambda index, d: index["weight_map"].update({"model.norm.weight": "/etc/passwd"})), "'/etc/passwd'",
    ),
    "index: a link to elsewhere": (with_index(link_outside), "must lie in the same directory"),
    "index: a shard missing": (with_index(lambda index, d: (d / SECOND).unlink()), "the download is incomplete"),
    "index: no map": (with_index(lambda index, d: index.update(weight_map=[1])), "no weight_map"),
    "index: numbers for files": (with_index(lambda index, d: index.update(weight_map={"x": 1})), "no weight_map"),
    "index: a tensor nowhere": (
        with_index(lambda index, d: index["weight_map"].update(bogus=FIRST)), "no shard holds bogus",
    ),
    "index: a tensor twice": (with_index(repeat_a_tensor), "of another shard"),
    "config: none": (lambda directory: (directory / "config.json").unlink(), "config.json"),
    "config: no JSON": (write("config.json", "{"), "config.json"),
    "config: a list": (write("config.json", "[]"), "config.json"),
    "config: nested without end": (write("config.json", DEEP), "config.json"),
    "config: binary": (write("config.json", bytes(range(256))), "config.json"),
    "config: forty megabytes": (write("config.json", b" " * 40_000_000 + b"{}"), "config.json"),
    "config: 10^9 layers": (set_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "config: 9,999 layers": (set_config(num_hidden_layers=9999), "is missing"),
    "config: zero heads": (set_config(num_attention_heads=0), "num_attention_heads=0"),
    "config: heads that do not divide": (set_config(num_attention_heads=5, head_dim="absent"), "num_attention_heads=5"),
    "config: a huge width that heads do not divide": (
        set_config(hidden_size=2**31 - 1, head_dim="absent"), "num_attention_heads=4",
    ),
    "config: a NaN theta": (set_config(rope_theta=float("nan")), "rope_theta=nan"),
    "config: a negative epsilon": (set_config(rms_norm_eps=-1), "rms_norm_eps=-1"),
    "config: a width of text": (set_config(hidden_size="16"), "hidden_size='16'"),
    "config: a width of 2^30": (set_config(hidden_size=2**30, head_dim="absent"), "has shape"),
    "config: a head of 2^30": (set_config(head_dim=2**30), "has shape"),
    "config: half a head": (set_config(head_dim=2.5), "head_dim=2.5"),
    "config: another vocabulary": (set_config(vocab_size=301), "model.embed_tokens.weight has shape"),
    "config: a vocabulary of 2^40": (set_config(vocab_size=2**40), "vocab_size="),
    "config: tied by text": (set_config(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
    "config: another model": (set_config(model_type="gpt2"), "model_type='gpt2'"),
    "config: a list for scaling": (set_config(rope_parameters=[1]), "rope_parameters=[1]"),
    "config: quantised": (set_config(quantization_config={"bits": 4}), "quantization_config"),
    "config: an end outside": (set_config(eos_token_id=300), "eos_token_id=300"),
    "config: an end of text": (set_config(eos_token_id="</s>"), "eos_token_id='</s>'"),
    "config: ends within ends": (set_config(eos_token_id=[[2]]), "eos_token_id=[[2]]"),
    "config: attention by number": (set_config(model_type="qwen2", layer_types=5), "layer_types"),
    "config: experts": (set_config(model_type="mixtral", num_local_experts=8), "model_type='mixtral'"),
    "tokenizer: cut": (cut("tokenizer.json", lambda size: size // 2), "tokenizer.json"),
    "tokenizer: no JSON": (write("tokenizer.json", "{]"), "tokenizer.json"),
    "tokenizer: empty": (write("tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer: larger than the model": (
        lambda directory: train_bpe_from_iterator(meadow.corpus(0, 300, "train"), 320).save(directory),
        "has 320 tokens",
    ),
    "tokenizer: another library's, broken": (
        lambda directory: (directory / "tokenizer.json").rename(directory / "tokenizer.model").write_bytes(b"\x0a\xff"),
        "tokenizer.model",
    ),
    "tokenizer: a broken config": (write("tokenizer_config.json", "[1"), "tokenizer_config.json"),
    "generation: no JSON": (write("generation_config.json", "{"), "generation_config.json"),
    "generation: an end of text": (write("generation_config.json", '{"eos_token_id": "x"}'), "eos_token_id='x'"),
}  # fmt: skip

LOADER = """
import json, resource, sys, time
import llamita
names = json.load(sys.stdin)
good, *rest = names
llamita.load(good)  # everything that is loaded once is in memory now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
results = {}
for name in rest:
    started = time.process_time()  # of computing: a busy machine takes longer
    try:
        llamita.load(name)
        outcome = ["loaded", ""]
    except (ValueError, OSError) as error:
        outcome = ["refused", str(error)]
    except BaseException as error:
        outcome = [type(error).__name__, str(error)]
    results[name] = [*outcome, time.process_time() - started]
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[str, str, float]]:
    """What loading each case came to: how it ended, the message, the seconds of computing."""
    root = tmp_path_factory.mktemp("hostile")
    make_model(root / "good")
    paths = {}
    for number, (name, (break_it, _)) in enumerate(CASES.items()):
        directory = root / f"case {number}"
        shutil.copytree(root / "good", directory)
        break_it(directory)
        paths[name] = str(directory)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADER],
        input=json.dumps([str(root / "good"), *paths.values()]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return {name: tuple(results[path]) for name, path in paths.items()}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the address space")
@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_at_once_in_one_line(outcomes, name):
    how, message, seconds = outcomes[name]
    assert how == "refused", f"{how}: {message}"
    assert CASES[name][1] in message
    assert "\n" not in message.strip()
    assert len(message) < 3000
    assert seconds < 5


def test_the_model_they_were_made_from_loads(tmp_path):
    make_model(tmp_path / "good")
    assert llamita.load(tmp_path / "good").config == CONFIG
    assert len(CASES) >= 40
