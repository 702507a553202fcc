"""Readers of model files on bytes that were changed at random: a line of error or a result, never anything else.

The slow form runs for minutes. The process may grow by a gigabyte only, so that a wild allocation fails.
"""

import base64
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamita.backend.torch.model import weights
from llamita.data import meadow
from llamita.model.config import ModelConfig
from llamita.storage import model_directory, safetensors
from llamita.storage.formats import gguf, llama2c, llama2c_tokenizer
from llamita.storage.formats.foreign import ForeignModel
from llamita.text import sentencepiece_training
from llamita.text.bpe import special_tokens, train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer

CONFIG = ModelConfig(300, 16, 32, 1, 2, 1, 16, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": safetensors.read_safetensors,
    "config.json": lambda path: ModelConfig.from_dict(model_directory.read_json(path)),
    "gguf": gguf.read_model,
    "llama2c": llama2c.read_model,
    "llama2c int8": llama2c.read_model,
    "tokenizer.bin": llama2c_tokenizer.read,
    "tokenizer.model": Tokenizer.load,
}
SECONDS = 100  # of the slow form, for each reader
ROOM = 1_000_000_000


def valid(name: str, path: Path) -> bytes:
    """A good file of each kind."""
    arrays = weights.to_host_arrays(weights.build_model(CONFIG))
    stories = list(meadow.corpus(0, 200, "train"))
    if name == "safetensors":
        safetensors.write_safetensors(path, arrays)
    elif name == "config.json":
        path.write_text(json.dumps(CONFIG.to_dict()))
    elif name == "gguf":
        gguf.write_model(path, ForeignModel(CONFIG, arrays, train_bpe_from_iterator(stories, 300)))
    elif name == "tokenizer.bin":
        codec = sentencepiece_training.train(stories, 320, special_tokens(0))
        llama2c_tokenizer.write(path, Tokenizer.from_codec(codec))
    elif name == "tokenizer.model":  # Llama 3's, a rank file of tiktoken's
        tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b" x"]
        path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    else:
        llama2c.write_model(path, ForeignModel(CONFIG, arrays), 2 if "int8" in name else 0)
    return path.read_bytes()


# Where the bytes that lengths and counts are made of lie, most of all; and values that are too large or negative there.
edits = st.tuples(
    st.one_of(st.integers(0, 400), st.floats(0, 1)),
    st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from(
            [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"[" * 200]
        ),
    ),
    st.sampled_from(["replace", "insert", "delete"]),
)
changes = st.tuples(st.lists(edits, max_size=4), st.one_of(st.none(), st.floats(0, 1)))


def changed(content: bytes, how: tuple) -> bytes:
    damaged = bytearray(content)
    for place, new, kind in how[0]:
        at = int(place * len(damaged)) if isinstance(place, float) else place
        damaged[at : at + (0 if kind == "insert" else len(new))] = b"" if kind == "delete" else new
    return bytes(damaged if how[1] is None else damaged[: int(how[1] * len(damaged))])


def fuzz(name: str, directory: Path, examples: int, seconds: float) -> None:
    path = directory / "file"
    content = valid(name, path)
    READERS[name](path)
    end, failed = time.monotonic() + seconds, []

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes)
    def run(how: tuple) -> None:
        if time.monotonic() > end and not failed:
            return
        path.write_bytes(changed(content, how))
        started = time.monotonic()
        message = ""
        try:
            READERS[name](path)
        except (ValueError, OSError) as error:
            message = str(error)
        except BaseException:
            failed.append(how)  # what failed is tried again, however late, and reported
            raise
        took = time.monotonic() - started
        if "\n" in message.strip() or took > 5:
            failed.append(how)
        assert "\n" not in message.strip()
        assert took < 5

    run()


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_changed_files(name, tmp_path):
    fuzz(name, tmp_path, examples=200, seconds=20)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["replace", "insert"])
def test_a_line_end_in_a_name_stays_out_of_messages(name, kind, tmp_path):
    path = tmp_path / "file"
    content, messages = valid(name, path), []
    for place in range(400):
        path.write_bytes(changed(content, ([(place, b"\n", kind)], None)))
        try:
            READERS[name](path)
        except (ValueError, OSError) as error:
            messages.append(str(error).strip())
    assert [message for message in messages if "\n" in message] == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the address space")
@pytest.mark.parametrize("name", READERS)
def test_changed_files_for_minutes(name, tmp_path):
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.storage.test_fuzz_readers", name, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS * 3)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    valid(sys.argv[1], Path(sys.argv[2]) / "warm")  # all that is loaded once is in memory now
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM,) * 2)
    stop = time.monotonic() + SECONDS
    while time.monotonic() < stop:
        fuzz(sys.argv[1], Path(sys.argv[2]), examples=1000, seconds=stop - time.monotonic())
