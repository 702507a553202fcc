"""Preparation end to end: what lies on disk is the text, for any number of workers; and every way it can fail."""

import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest

from llamita.data import meadow
from llamita.data.batches import BatchIterator
from llamita.data.inspect import count_rows, documents_in_both, marked_text
from llamita.data.packing import Rows, RowsConfig
from llamita.data.prepare import PrepareConfig, Progress, prepare
from llamita.data.shards import Manifest, TokenShards, load_tokenizer
from llamita.text.bpe import train_bpe_from_iterator


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe_from_iterator(meadow.corpus(0, 200, "train"), vocab_size=400).save(directory)
    return directory


@pytest.fixture(scope="module")
def stories() -> list[str]:
    return list(meadow.corpus(1, 300, "train"))


@pytest.fixture
def make(tmp_path, tokenizer_dir, stories):
    """A function that prepares the stories, with changes."""
    text = tmp_path / "stories.txt"
    text.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")

    def make(name: str = "data", **changes) -> Manifest:
        base = {"tokenizer": tokenizer_dir, "files": (text,), "separator": "<|endoftext|>", "workers": 1}
        return prepare(PrepareConfig(tmp_path / name, **(base | changes)))

    return make


def all_documents(data_dir: Path, split: str) -> list[np.ndarray]:
    shards = TokenShards(data_dir, split)
    return [shards.document(i) for i in range(shards.num_documents)]


def leftovers(directory: Path) -> list[str]:
    """What a failed preparation left behind."""
    return [path.name for path in directory.iterdir() if path.name != "stories.txt"]


def files_of(directory: Path) -> dict[str, str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_documents_come_back(tmp_path, make, stories):
    manifest = make()
    tokenizer = load_tokenizer(tmp_path / "data")
    decoded = {}
    for split in ("train", "validation"):
        documents = all_documents(tmp_path / "data", split)
        assert all(document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id for document in documents)
        decoded[split] = [tokenizer.decode(document) for document in documents]
        info = manifest.splits[split]
        assert info.documents == len(documents)
        assert info.tokens == sum(map(len, documents))
        assert info.characters == sum(map(len, decoded[split]))
        assert info.bytes == sum(len(text.encode()) for text in decoded[split])
        assert info.longest_document == max(map(len, documents))
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(stories)
    kept = set(decoded["validation"])
    assert decoded["train"] == [story for story in stories if story not in kept], "in the order of the text"
    assert 10 < len(decoded["validation"]) < 60  # 30 expected, standard deviation 5.2
    assert (manifest.dtype, manifest.vocab_size, manifest.adds_bos, manifest.adds_eos) == ("uint16", 400, True, True)
    assert Manifest.load(tmp_path / "data") == manifest


def test_stream_and_windows_across_shards(tmp_path, make):
    make("one")
    make("many", shard_tokens=1000)
    one, many = TokenShards(tmp_path / "one"), TokenShards(tmp_path / "many")
    shards = many.manifest.splits["train"].shards
    assert len(shards) == -(-many.num_tokens // 1000)
    assert [shard.bytes for shard in shards[:-1]] == [2000] * (len(shards) - 1)
    stream = one.window(0, one.num_tokens)
    assert stream.dtype == np.uint16
    assert (stream == np.concatenate(all_documents(tmp_path / "many", "train"))).all()
    for start, length in ((0, 1), (999, 2), (990, 3020), (0, one.num_tokens), (one.num_tokens - 3, 10), (5, 0)):
        assert (many.window(start, length) == stream[start : start + length]).all()
    assert one.document_starts.tolist() == many.document_starts.tolist()


# Small groups, so that a small corpus keeps several processes busy.
def run_in_small_groups(monkeypatch, size: int = 2000) -> None:
    monkeypatch.setattr("llamita.data.encoding.GROUP_CHARACTERS", size)


def test_the_bytes_do_not_depend_on_the_workers(tmp_path, make, monkeypatch):
    make("plain")
    run_in_small_groups(monkeypatch)
    for workers in (1, 2, 4):
        make(f"workers{workers}", workers=workers)
        assert files_of(tmp_path / f"workers{workers}") == files_of(tmp_path / "plain")


def test_without_bos_and_eos_the_text_is_one_stream(tmp_path, make, stories):
    text = tmp_path / "tail.txt"
    text.write_text("".join(stories), encoding="utf-8")
    manifest = make(files=(text,), separator="file", split="tail", bos=False, eos=False)
    tokenizer = load_tokenizer(tmp_path / "data")
    parts = [TokenShards(tmp_path / "data", split) for split in ("train", "validation")]
    whole = "".join(stories)
    assert [tokenizer.decode(part.window(0, part.num_tokens)) for part in parts] == [
        whole[: int(len(whole) * 0.9)],
        whole[int(len(whole) * 0.9) :],
    ]
    assert not manifest.adds_bos


def test_tail_over_many_documents_cuts_one(tmp_path, make, stories):
    make(split="tail", validation_share=0.25)
    tokenizer = load_tokenizer(tmp_path / "data")
    train, validation = (
        [tokenizer.decode(d) for d in all_documents(tmp_path / "data", s)] for s in ("train", "validation")
    )
    assert "".join(train + validation) == "".join(stories)
    assert sum(map(len, train)) == int(sum(map(len, stories)) * 0.75)


def test_tiny_shakespeare_splits_as_nanogpt_does(tmp_path, make, shared_data):
    file = shared_data / "tinyshakespeare" / "input.txt"
    manifest = make(files=(file,), separator="file", split="tail", bos=False, eos=False)
    assert {name: split.characters for name, split in manifest.splits.items()} == {
        "train": 1003854,
        "validation": 111540,
    }


def test_wikitext_articles_are_documents(tmp_path, make, shared_data):
    paths = {name: (shared_data / "wikitext-2" / f"{name}.txt",) for name in ("valid", "test")}
    manifest = make(source="wikitext", files=paths["test"], validation_files=paths["valid"])
    assert [manifest.splits[split].documents for split in ("train", "validation")] == [60, 60]
    text = load_tokenizer(tmp_path / "data").decode(TokenShards(tmp_path / "data", "validation").document(0))
    assert text.startswith("= Homarus gammarus =\nHomarus gammarus , known as")


def test_meadow_has_its_own_validation(tmp_path, make):
    manifest = make(source="meadow", files=(), documents=50, seed=4, validation_share=0.2)
    assert [split.documents for split in manifest.splits.values()] == [50, 10]
    tokenizer = load_tokenizer(tmp_path / "data")
    texts = [tokenizer.decode(document) for document in all_documents(tmp_path / "data", "validation")]
    assert texts == list(meadow.corpus(4, 10, "validation"))


def test_equal_documents_lie_on_one_side_and_the_seed_chooses(tmp_path, make, stories):
    text = tmp_path / "twice.txt"
    text.write_text("\n\n".join(stories[:100] * 2), encoding="utf-8")
    make("a", files=(text,), separator="blank-line")
    train, validation = (TokenShards(tmp_path / "a", split) for split in ("train", "validation"))
    assert documents_in_both(train, validation) == 0
    assert train.num_documents % 2 == validation.num_documents % 2 == 0
    make("b", files=(text,), separator="blank-line", seed=1)
    assert TokenShards(tmp_path / "b", "validation").num_tokens != validation.num_tokens


def test_no_validation(tmp_path, make):
    assert list(make(validation_share=0.0).splits) == ["train"]
    with pytest.raises(ValueError, match=r"has no split 'validation', only \['train'\]"):
        TokenShards(tmp_path / "data", "validation")


def test_empty_documents_are_left_out_and_counted(tmp_path, make):
    text = tmp_path / "gaps.txt"
    text.write_text("a<|endoftext|><|endoftext|> \n <|endoftext|>b", encoding="utf-8")
    manifest = make(files=(text,), validation_share=0)
    assert (manifest.empty_documents, manifest.splits["train"].documents) == (2, 2)


def test_large_vocabulary_takes_uint32(tmp_path, tokenizer_dir):
    large = tmp_path / "large"
    shutil.copytree(tokenizer_dir, large)
    spec = json.loads((large / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {f"filler {i}": i for i in range(400, 69_999)} | {"QX": 69_999}
    spec["model"]["merges"].append(["Q", "X"] if isinstance(spec["model"]["merges"][0], list) else "Q X")
    (large / "tokenizer.json").write_text(json.dumps(spec))
    text = tmp_path / "words.txt"
    text.write_text("QX", encoding="utf-8")
    config = PrepareConfig(tmp_path / "data", large, files=(text,), validation_share=0)
    assert prepare(config).dtype == "uint32"
    assert TokenShards(tmp_path / "data").window(0, 9).tolist() == [1, 69_999, 2]


def test_progress_is_reported(tmp_path, tokenizer_dir, stories, monkeypatch):
    run_in_small_groups(monkeypatch)
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(stories), encoding="utf-8")
    seen: list[Progress] = []
    manifest = prepare(PrepareConfig(tmp_path / "data", tokenizer_dir, files=(text,), workers=1), seen.append)
    assert len(seen) > 5
    assert [p.tokens for p in seen] == sorted(p.tokens for p in seen)
    assert seen[-1].tokens == sum(split.tokens for split in manifest.splits.values())
    assert seen[-1].total_bytes == text.stat().st_size


# --- rows over shards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pad", "pack", "best-fit", "random"])
def test_rows_and_counts_over_shards(tmp_path, make, mode):
    make(shard_tokens=777)
    shards = TokenShards(tmp_path / "data", "validation")
    tokenizer = load_tokenizer(tmp_path / "data")
    rows = Rows(shards, RowsConfig(mode, 32, within_documents=True), tokenizer.bos_id, tokenizer.eos_id)
    counts = count_rows(rows)
    slow = [rows.row(i) for i in range(len(rows))]
    assert counts.rows == counts.looked_at == len(slow)
    assert counts.targets == sum(int(row.label_mask.sum()) for row in slow)
    assert counts.padding == sum(int((row.segments == 0).sum()) for row in slow)
    # A document ends with EOS, so a row whose last real token is another one is cut.
    assert counts.truncated == sum(row.tokens[row.segments > 0][-1] != tokenizer.eos_id for row in slow)
    assert counts.fully_masked == sum(not row.label_mask.any() for row in slow)
    assert counts.empty == 0
    marks = list(marked_text(slow[0], tokenizer))
    assert marks[0][:2] == ("read", "<s>")
    assert sum(tokens for _, _, tokens in marks) == 33
    assert BatchIterator(rows, 4, seed=0).next().tokens_BT.shape == (4, 32)


def test_documents_in_both_splits_are_counted(tmp_path, make, stories):
    for name, part in (("t", stories[:20]), ("v", stories[15:25])):
        (tmp_path / name).write_text("\n\n".join(part), encoding="utf-8")
    make(files=(tmp_path / "t",), validation_files=(tmp_path / "v",), separator="blank-line")
    splits = [TokenShards(tmp_path / "data", split) for split in ("train", "validation")]
    assert documents_in_both(*splits) == 5


# --- what can go wrong: one line, and nothing left behind ----------------------------------------------------------


@pytest.mark.parametrize(("changes", "kind", "message"), [
    ({"files": (Path("nothing.txt"),)}, FileNotFoundError, "there is no file nothing.txt"),
    ({"validation_files": (Path("nothing.txt"),)}, FileNotFoundError, "there is no file nothing.txt"),
    ({"files": ()}, ValueError, "pass --files"),
    ({"tokenizer": Path("nothing")}, FileNotFoundError, "there is no tokenizer at nothing"),
    ({"validation_share": 1.0}, ValueError, "validation_share=1.0"),
    ({"workers": 0}, ValueError, "workers=0"),
    ({"shard_tokens": 0}, ValueError, "shard_tokens=0"),
    ({"split": "middle"}, ValueError, "split='middle'"),
    ({"validation_share": 1e-9}, ValueError, "the validation split would be empty: 300 documents"),
])  # fmt: skip
def test_mistakes_are_named(tmp_path, tokenizer_dir, make, changes, kind, message):
    base = {
        "files": (tmp_path / "stories.txt",),
        "separator": "<|endoftext|>",
        "workers": 1,
        "tokenizer": tokenizer_dir,
    }
    with pytest.raises(kind, match=message):
        prepare(PrepareConfig(output=tmp_path / "data", **(base | changes)))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("content", "message"), [
    (b"", "no text in"),
    (b" \n\n \n", "no text in"),
    (b"good text\n\nbad \xff text", "bad.txt is not UTF-8: byte 0xff at offset 15"),
])  # fmt: skip
def test_text_that_cannot_be_prepared(tmp_path, make, content, message):
    source = tmp_path / "bad.txt"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(files=(source,), separator="blank-line")
    source.unlink()
    assert leftovers(tmp_path) == []


def test_output_that_exists(tmp_path, make):
    make()
    before = files_of(tmp_path / "data")
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        make(seed=9)
    assert files_of(tmp_path / "data") == before
    make(seed=9, overwrite=True)
    assert files_of(tmp_path / "data") != before
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letters.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is not a data directory"):
        make("home", overwrite=True)
    assert leftovers(precious) == ["letters.txt"]


def test_overwriting_fails_whole(tmp_path, make):
    make()
    before = files_of(tmp_path / "data")
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        make(files=(tmp_path / "bad.txt",), overwrite=True)
    assert files_of(tmp_path / "data") == before
    assert sorted(leftovers(tmp_path)) == ["bad.txt", "data"]


def test_another_tokenizer_is_refused(tmp_path, make):
    make()
    other = train_bpe_from_iterator(["something else entirely"] * 3, vocab_size=265)
    with pytest.raises(ValueError, match="is not the one that made"):
        TokenShards(tmp_path / "data").check_tokenizer(other)
    TokenShards(tmp_path / "data").check_tokenizer(load_tokenizer(tmp_path / "data"))
    other.save(tmp_path / "data" / "tokenizer")
    with pytest.raises(ValueError, match="is not the one that made"):
        load_tokenizer(tmp_path / "data")


def test_a_tokenizer_replaced_between_preparations(tmp_path, make, stories):
    """The loaded tokenizer is kept for the next group of documents, but never for another tokenizer at its path."""
    place = tmp_path / "tokenizer"
    for name, size in (("a", 300), ("b", 500)):
        train_bpe_from_iterator(stories, vocab_size=size).save(place)
        make(name, tokenizer=place)
        text = load_tokenizer(tmp_path / name).decode(TokenShards(tmp_path / name).document(0))
        assert text in stories


@pytest.mark.parametrize("name", ["train-00000.bin", "train-documents.bin"])
def test_damaged_files_are_named(tmp_path, make, name):
    make()
    path = tmp_path / "data" / name
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=rf"{name} has {len(content) - 8} bytes, the manifest says {len(content)}"):
        TokenShards(tmp_path / "data")
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(ValueError, match=rf"{name} has changed: its SHA-256"):
        TokenShards(tmp_path / "data")
    TokenShards(tmp_path / "data", verify=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        TokenShards(tmp_path / "data")


def test_an_id_out_of_vocabulary_is_named(tmp_path, make):
    make()
    path = tmp_path / "data" / "train-00000.bin"
    tokens = np.fromfile(path, dtype="<u2")
    tokens[17] = 400
    tokens.tofile(path)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train-00000.bin holds token 400, and the vocabulary ends at 399"):
        TokenShards(tmp_path / "data")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "llamita token shards", "version": 2}', "\ud800"])
def test_damaged_manifest(tmp_path, make, content):
    make()
    (tmp_path / "data" / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="is not a manifest this version reads"):
        TokenShards(tmp_path / "data")


def test_a_directory_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        TokenShards(tmp_path)


def test_a_full_disk(tmp_path, make):
    """The limit on file size stands for the disk: the write fails in the middle of a shard."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match="data") as caught:
            make()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to mount a small file system")
def test_no_space_left(tmp_path, tokenizer_dir, stories):
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(stories), encoding="utf-8")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            prepare(PrepareConfig(small / "data", tokenizer_dir, files=(text,), workers=1))
        assert caught.value.errno == errno.ENOSPC
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("when", ["starting", "working"])
def test_a_dead_worker_is_an_error(tmp_path, tokenizer_dir, monkeypatch, when):
    run_in_small_groups(monkeypatch)
    endless = (meadow.story(0, number) for number in count())
    monkeypatch.setattr("llamita.data.sources.documents", lambda source: endless)

    killed = []

    def kill_one(progress: object = None) -> None:
        """Kill a worker, once: groups that were encoded before its death still report progress."""
        while not killed and not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        if not killed:
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    if when == "starting":
        threading.Thread(target=kill_one).start()
    config = PrepareConfig(tmp_path / "data", tokenizer_dir, "meadow", documents=1, workers=2)
    with pytest.raises(ChildProcessError, match="an encoding process died"):
        prepare(config, kill_one if when == "working" else None)
    assert leftovers(tmp_path) == []
    assert multiprocessing.active_children() == []


ENDLESS = """
import sys, time
from pathlib import Path
from llamita.data import encoding, meadow, prepare, sources

def endless(source):
    number = 0
    while True:
        yield meadow.story(0, number)
        number += 1

if __name__ == "__main__":
    encoding.GROUP_CHARACTERS = 2000
    sources.documents = endless
    config = prepare.PrepareConfig(Path(sys.argv[1]), Path(sys.argv[2]), "meadow", documents=1, workers=2)
    try:
        prepare.prepare(config, lambda progress: print(progress, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle(tmp_path, tokenizer_dir, stop):
    """Ctrl-C reaches every process of the group, and leaves nothing; after a kill no process stays behind."""
    script = tmp_path / "script.py"
    script.write_text(ENDLESS)
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "out" / "data"), str(tokenizer_dir)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    for _ in range(3):
        assert process.stdout.readline().startswith("Progress(")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, errors
    if stop == signal.SIGINT:
        assert process.returncode == 130, errors
        assert list((tmp_path / "out").iterdir()) == []


BOUNDED = """
import resource, sys
from pathlib import Path
from llamita.data.prepare import PrepareConfig, prepare

if __name__ == "__main__":
    text, output, tokenizer = map(Path, sys.argv[1:])
    config = PrepareConfig(output, tokenizer, files=(text,), workers=1)
    peaks = []
    manifest = prepare(config, lambda _: peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    print(sum(split.bytes for split in manifest.splits.values()), peaks[4], peaks[-1])
"""


def test_memory_is_bounded(tmp_path, tokenizer_dir):
    """Thirty megabytes go through; after the first five the peak grows by less than four."""
    script = tmp_path / "script.py"
    script.write_text(BOUNDED)
    text = tmp_path / "large.txt"
    with open(text, "w") as file:
        for number in range(30_000):
            file.write(f"{number} " + "some words of a document that goes on for about a kilobyte " * 17 + "\n\n")
    command = [sys.executable, str(script), str(text), str(tmp_path / "data"), str(tokenizer_dir)]
    size, early, late = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    assert size > 30e6
    assert (late - early) * unit < 4e6, f"peak went from {early} to {late}"
