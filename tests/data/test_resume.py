"""Preparation that is killed and goes on, is dealt out over machines and put together: always the bytes of one run."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.merge import merge
from llamita.data.prepare import PrepareConfig, prepare
from llamita.data.shards import Manifest, TokenShards
from llamita.data.unfinished import place_of
from llamita.text.bpe import train_bpe_from_iterator
from tests.data.test_shards import files_of

SIZES = {"group_characters": 3000, "journal_bytes": 20_000}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe_from_iterator(meadow.corpus(0, 200, "train"), vocab_size=400).save(directory)
    return directory


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """So that a small corpus has many groups, and many entries of the journal."""
    monkeypatch.setattr("llamita.data.encoding.GROUP_CHARACTERS", SIZES["group_characters"])
    monkeypatch.setattr("llamita.data.prepare.JOURNAL_BYTES", SIZES["journal_bytes"])


@pytest.fixture
def text(tmp_path) -> tuple[Path, ...]:
    """Two files, one compressed, with documents that have no text among them."""
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("<|endoftext|>".join(meadow.corpus(1, 500, "train")), encoding="utf-8")
    packed.write_bytes(gzip.compress("<|endoftext|> <|endoftext|>".join(meadow.corpus(2, 100, "train")).encode()))
    return plain, packed


@pytest.fixture
def base(tmp_path, tokenizer_dir, text):
    """A function from a name and changes to a configuration."""

    def configured(name: str, **changes) -> PrepareConfig:
        options = {"tokenizer": tokenizer_dir, "files": text, "workers": 1, "shard_tokens": 5000}
        return PrepareConfig(tmp_path / name, separator="<|endoftext|>", **(options | changes))

    return configured


class Stop(Exception):  # noqa: N818
    pass


def stopping(after: int):
    """A callback that ends the preparation as a lost disk would, after so many groups."""
    seen = []

    def report(progress):
        seen.append(progress)
        if len(seen) >= after:
            raise Stop

    return report


@pytest.mark.parametrize("split", ["document", "tail"])
def test_resumed_again_and_again(tmp_path, base, split):
    """However often it stops, and wherever: also before the first entry of the journal and right behind one."""
    whole = prepare(base("whole", split=split))
    total = sum(part.characters for part in whole.splits.values()) // SIZES["group_characters"]
    resumed = False
    for after in (3, 8, 1, 11, 20, 2, 9):
        with pytest.raises(Stop):
            prepare(base("data", split=split, resume=resumed), stopping(after))
        resumed = place_of(tmp_path / "data").is_dir()
    assert resumed
    assert json.loads((place_of(tmp_path / "data") / "journal.json").read_text())["progress"]["groups"] > 10
    assert not (tmp_path / "data").exists()
    seen = []
    manifest = prepare(base("data", split=split, resume=True, workers=2), seen.append)
    assert len(seen) < 0.9 * total, "what was written is not encoded again"
    assert manifest == whole
    assert files_of(tmp_path / "data") == files_of(tmp_path / "whole")
    assert not place_of(tmp_path / "data").exists()


KILLED = """
import sys, time
from pathlib import Path
from llamita.data import encoding, prepare

if __name__ == "__main__":
    encoding.GROUP_CHARACTERS, prepare.JOURNAL_BYTES = 3000, 20_000
    output, tokenizer, resume, *files = sys.argv[1:]
    config = prepare.PrepareConfig(
        Path(output), Path(tokenizer), files=tuple(map(Path, files)), workers=2, shard_tokens=5000,
        resume=bool(resume), separator="<|endoftext|>",
    )

    def slowly(progress):
        print(progress.documents, flush=True)
        time.sleep(0.02)

    prepare.prepare(config, slowly)
"""


@pytest.mark.medium
def test_killed_twice(tmp_path, base, tokenizer_dir, text):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    prepare(base("whole"))
    for resume, groups in (("", 30), ("resume", 25)):
        command = [sys.executable, str(script), str(tmp_path / "data"), str(tokenizer_dir), resume, *map(str, text)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(groups):
            assert process.stdout.readline().strip().isdigit()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "data").exists()
        assert (place_of(tmp_path / "data") / "journal.json").is_file()
    prepare(base("data", resume=True))
    assert files_of(tmp_path / "data") == files_of(tmp_path / "whole")


def test_what_may_not_be_resumed(tmp_path, base, text, tokenizer_dir):
    with pytest.raises(FileNotFoundError, match="no unfinished preparation"):
        prepare(base("data", resume=True))
    with pytest.raises(Stop):
        prepare(base("data"), stopping(30))
    before = files_of(place_of(tmp_path / "data"))
    with pytest.raises(ValueError, match=r"add --resume to go on, or --overwrite"):
        prepare(base("data"))
    with pytest.raises(ValueError, match=r"seed was 0 and is now 3"):
        prepare(base("data", resume=True, seed=3))
    stamp = text[0].stat()
    os.utime(text[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"files \(names, sizes, times\) was"):
        prepare(base("data", resume=True))
    os.utime(text[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert files_of(place_of(tmp_path / "data")) == before
    damaged = place_of(tmp_path / "data") / "train-documents.bin"
    damaged.write_bytes(damaged.read_bytes()[:64])
    with pytest.raises(ValueError, match=r"train-documents\.bin has 64 bytes, and"):
        prepare(base("data", resume=True))
    with pytest.raises(FileNotFoundError):
        prepare(base("data", resume=True))
    prepare(base("data"))


def test_begun_anew_where_that_is_asked_for(tmp_path, base):
    with pytest.raises(Stop):
        prepare(base("data"), stopping(30))
    prepare(base("data", overwrite=True, seed=5))
    prepare(base("whole", seed=5))
    assert files_of(tmp_path / "data") == files_of(tmp_path / "whole")


def test_two_processes_do_not_share_a_directory(tmp_path, base):
    def again(progress):
        with pytest.raises(ValueError, match="another process is preparing"):
            prepare(base("data"))
        raise Stop

    with pytest.raises(Stop):
        prepare(base("data"), again)


def test_the_command_says_how_to_go_on(tmp_path, tokenizer_dir, text, monkeypatch, capsys):
    arguments = ["prepare", "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "data"), "--workers", "1"]
    arguments += ["--separator", "<|endoftext|>", "--files", *map(str, text)]
    monkeypatch.setattr("llamita.cli.prepare.describe", stopping_by_hand := StopByHand(30))
    assert main(arguments) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    stopping_by_hand.left = 10**9
    assert main([*arguments, "--resume"]) == 0
    assert "unfinished" not in capsys.readouterr().err
    assert TokenShards(tmp_path / "data").num_documents > 0


class StopByHand:
    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, progress) -> str:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return ""


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "split"), [(1, "document"), (2, "document"), (5, "document"), (3, "tail")])
def test_parts_put_together_are_the_whole(tmp_path, base, parts, split):
    whole = prepare(base("whole", split=split))
    for number in range(1, parts + 1):
        prepare(base(f"part-{number}", split=split, shard=f"{number}/{parts}"))
    given = [tmp_path / f"part-{number}" for number in range(parts, 0, -1)]
    shares = [sum(split.documents for split in Manifest.load(place).splits.values()) for place in given]
    assert sum(shares) == sum(split.documents for split in whole.splits.values())
    assert max(shares) < 1.5 * min(shares)
    if parts > 1:
        assert merge(given, tmp_path / "merged") == whole
        assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


def test_more_parts_than_groups(tmp_path, base):
    small = {"documents": 12}
    whole = prepare(base("whole", **small))
    for number in range(1, 10):
        prepare(base(f"part-{number}", shard=f"{number}/9", **small))
    assert Manifest.load(tmp_path / "part-9").splits == {}
    assert merge([tmp_path / f"part-{number}" for number in range(1, 10)], tmp_path / "merged") == whole
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


def test_a_part_is_resumed(tmp_path, base):
    prepare(base("whole"))
    prepare(base("part-1", shard="1/2"))
    with pytest.raises(Stop):
        prepare(base("part-2", shard="2/2"), stopping(25))
    prepare(base("part-2", shard="2/2", resume=True))
    merge([tmp_path / "part-1", tmp_path / "part-2"], tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("validation", [False, True])
def test_whole_directories_follow_each_other(tmp_path, base, text, validation):
    """The files of each machine prepared there, then put together, are the files prepared at once."""
    sides = [{"validation_files": (path,)} if validation else {} for path in text]
    for number, (path, more) in enumerate(zip(text, sides, strict=True)):
        prepare(base(f"machine-{number}", files=(path,), **more))
    prepare(base("whole", **({"validation_files": text} if validation else {})))
    merge([tmp_path / "machine-0", tmp_path / "machine-1"], tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


def test_other_options_are_recorded_side_by_side(tmp_path, base, text):
    first, second = prepare(base("a", files=text[:1], seed=1)), prepare(base("b", files=text[1:], seed=2))
    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert merged.source == {"merged": [first.source, second.source]}
    both = [TokenShards(tmp_path / name) for name in ("a", "b")]
    found = TokenShards(tmp_path / "merged")
    expected = np.concatenate([shards.window(0, shards.num_tokens) for shards in both])
    assert (found.window(0, found.num_tokens) == expected).all()
    assert found.num_characters == sum(shards.num_characters for shards in both)


def test_long_documents_are_copied_in_pieces(tmp_path, base, monkeypatch):
    monkeypatch.setattr("llamita.data.merge.PIECE_TOKENS", 300)
    prepare(base("whole"))
    for number in (1, 2):
        prepare(base(f"part-{number}", shard=f"{number}/2"))
    merge([tmp_path / "part-1", tmp_path / "part-2"], tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")


def test_parts_that_do_not_belong_together(tmp_path, base, tokenizer_dir, text):
    places = {}
    for name, changes in {
        "one": {"shard": "1/2"},
        "two": {"shard": "2/2"},
        "third": {"shard": "1/3"},
        "seed": {"shard": "2/2", "seed": 4},
        "whole": {},
        "bare": {"bos": False},
        "sizes": {"shard": "2/2", "shard_tokens": 4000},
    }.items():
        prepare(base(name, **changes))
        places[name] = tmp_path / name

    def refused(*names: str) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is returned
            merge([places[name] for name in names], tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return str(caught.value)

    assert "give two or more" in refused("one")
    assert "are the same part" in refused("one", "one")
    assert "not parts of the same text" in refused("one", "third")
    assert "not parts of the same text" in refused("one", "seed")
    assert "is not a part of a corpus" in refused("one", "whole")
    assert "differ in adds_bos" in refused("whole", "bare")
    assert "differ in --shard-tokens" in refused("one", "sizes")
    (places["two"] / "parts.bin").write_bytes(b"\0" * 16)
    assert "parts.bin is missing or has changed" in refused("one", "two")


def test_a_missing_part_is_named(tmp_path, base):
    for number in (1, 3):
        prepare(base(f"part-{number}", shard=f"{number}/3"))
    with pytest.raises(ValueError, match="part 2/3 is missing; give all 3 parts"):
        merge([tmp_path / "part-1", tmp_path / "part-3"], tmp_path / "merged")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_cannot_be(base, shard):
    with pytest.raises(ValueError, match=r"must be i/n with 1 <= i <= n"):
        prepare(base("data", shard=shard))


def test_the_merge_command(tmp_path, base, capsys):
    for number in (1, 2):
        prepare(base(f"part-{number}", shard=f"{number}/2"))
    arguments = ["data", "merge", str(tmp_path / "part-1"), str(tmp_path / "part-2"), "--output", str(tmp_path / "d")]
    assert main(arguments) == 0
    assert f"wrote {tmp_path / 'd'}" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


# --- directories of files --------------------------------------------------------------------------------------------


def test_a_directory_stands_for_its_files(tmp_path, base, text):
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    text[1].rename(folder / "below" / "b.txt.gz")
    text[0].rename(folder / "z.txt")
    (folder / ".hidden").write_bytes(b"\xff")
    prepare(base("data", files=(folder,)))
    prepare(base("listed", files=(folder / "below" / "b.txt.gz", folder / "z.txt")))
    assert files_of(tmp_path / "data") == files_of(tmp_path / "listed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there are no files in"):
        prepare(base("none", files=(tmp_path / "empty",)))
