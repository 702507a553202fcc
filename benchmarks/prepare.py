"""`llamita prepare` from end to end against the tokenizer's library alone, on all cores; same ids, memory, CPU time.

Ours starts a process, reads files, finds documents, encodes, hashes and writes shards; the library only encodes
documents that are in memory already. The text is cut into files, and the contenders take turns, file by file, so that a
change in the machine's speed meets all. At the end ours prepares all files at once, and its memory is watched.

    python benchmarks/prepare.py [--text FILE ...] [--megabytes 500]       without --text: Meadow stories
    python benchmarks/prepare.py --pattern llama-3                         a tokenizer that only `tokenizers` can encode

CPU seconds stand beside the wall's: on a machine that does other things too, they are the ones to compare.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import tiktoken
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llamita.data import meadow, textfiles
from llamita.data.shards import TokenShards
from llamita.text.bpe import special_tokens, train_bpe_from_iterator
from llamita.text.fast_bpe import GPT2_PATTERN
from llamita.text.tokenizer import Tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BATCH = 4096  # documents given to the library at once: all of them would take some 100 bytes a token


@dataclass
class Times:
    """Seconds of the wall and of the CPU, a file each."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files, repeated; documents between blank lines")
    parser.add_argument("--megabytes", type=int, default=500, help="amount of text")
    parser.add_argument("--files", type=int, default=5, help="number of files that it is cut into")
    parser.add_argument("--vocab-size", type=int, help="default: 8192, or 688 for Meadow, whose world has few words")
    parser.add_argument("--pattern", choices=("gpt-2", "llama-3"), default="gpt-2", help="how words are split")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(Path(directory), arguments)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    sources = endless(arguments.text)
    files = [directory / f"{number}.txt" for number in range(arguments.files)]
    for file in files:
        write(file, sources, arguments.megabytes * 1_000_000 // len(files))
    vocab_size = arguments.vocab_size or (8192 if arguments.text else 688)
    train(files[0], vocab_size, arguments.pattern, directory / "tokenizer")
    peer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    # WikiText spells `<unk>`; like ours, the peer is to read it as text and not as the control token.
    peer.encode_special_tokens = True
    contenders: dict[str, Callable[[list[str]], object]] = {
        "tokenizers encode_batch": lambda texts: peer.encode_batch(texts, add_special_tokens=False)
    }
    if arguments.pattern == "gpt-2":
        encoding, cores = tiktoken_of(Tokenizer.load(directory / "tokenizer")), len(os.sched_getaffinity(0))
        contenders["tiktoken encode_ordinary_batch"] = lambda texts: encoding.encode_ordinary_batch(
            texts, num_threads=cores
        )
    else:
        contenders["tokenizers encode_batch_fast"] = lambda texts: peer.encode_batch_fast(
            texts, add_special_tokens=False
        )

    times = {name: Times() for name in ("llamita prepare", *contenders)}
    megabytes = 0.0
    for number, file in enumerate(files):
        prepare([file], directory, times["llamita prepare"])
        texts = list(textfiles.documents(file, "blank-line"))
        megabytes += sum(len(text.encode()) for text in texts) / 1e6
        if number == 0:
            check_ids(directory / "data", peer, texts)
        for name, encode in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for start in range(0, len(texts), BATCH):
                encode(texts[start : start + BATCH])
            times[name].wall.append(time.perf_counter() - wall)
            times[name].cpu.append(time.process_time() - cpu)
        report(times, megabytes, number + 1)
    whole = Times()
    peak = prepare(files, directory, whole)
    print(f"all {megabytes:.0f} MB at once: {megabytes / whole.wall[0]:.1f} MB/s, {whole.cpu[0]:.1f} s of CPU")
    print(f"memory of all its processes together at most {peak / 1e6:.0f} MB")


def report(times: dict[str, Times], megabytes: float, done: int) -> None:
    ours = times["llamita prepare"]
    print(f"after {done} files, {megabytes:.0f} MB")
    print(f"{'':<32} {'wall s':>8} {'MB/s':>7} {'CPU s':>8} {'ours, wall':>11} {'ours, CPU':>10}")
    for name, found in times.items():
        wall, cpu = sum(found.wall), sum(found.cpu)
        ratios = f"{wall / sum(ours.wall):>11.2f} {cpu / sum(ours.cpu):>10.2f}"
        print(f"{name:<32} {wall:>8.1f} {megabytes / wall:>7.1f} {cpu:>8.1f} {ratios}", flush=True)


def prepare(files: list[Path], directory: Path, times: Times) -> int:
    """Run the command; returns the most memory, in bytes, that its processes had together."""
    options = ["--files", *map(str, files), "--tokenizer", str(directory / "tokenizer")]
    options += ["--output", str(directory / "data"), "--validation-share", "0", "--no-bos", "--no-eos", "--overwrite"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "llamita.cli.main", "prepare", *options], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    peaks = [0]
    ended = threading.Event()
    watch = threading.Thread(target=watch_memory, args=(process.pid, ended, peaks))
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    times.wall.append(time.perf_counter() - started)
    times.cpu.append(usage.ru_utime + usage.ru_stime)
    ended.set()
    watch.join()
    if status:
        raise SystemExit("llamita prepare failed")
    return peaks[0]


def watch_memory(pid: int, ended: threading.Event, peaks: list[int]) -> None:
    """Resident memory of a process and all below it; what they share counts once for each."""
    while not ended.wait(0.1):
        try:
            parent = psutil.Process(pid)
            together = sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))
        except psutil.NoSuchProcess:
            continue
        peaks[0] = max(peaks[0], together)


def check_ids(data: Path, peer: tokenizers.Tokenizer, texts: list[str]) -> None:
    ours = TokenShards(data)
    theirs = [encoding.ids for encoding in peer.encode_batch(texts[:20_000], add_special_tokens=False)]
    expected = np.concatenate(theirs)
    if not np.array_equal(ours.window(0, len(expected)), expected):
        raise SystemExit("the ids differ")
    print(f"same ids for the first {len(theirs):,} of {len(texts):,} documents")


def endless(files: list[Path] | None) -> Iterator[str]:
    """Documents without end: those of the files again and again, or Meadow's stories of seed after seed."""
    for seed in count():
        if files:
            for path in files:
                yield from textfiles.documents(path, "blank-line")
        else:
            yield from meadow.corpus(seed, 50_000, "train")


def write(file: Path, documents: Iterator[str], size: int) -> None:
    with file.open("wb") as output:
        while output.tell() < size:
            output.write(next(documents).encode() + b"\n\n")


def train(file: Path, vocab_size: int, pattern: str, directory: Path) -> None:
    texts = [text for text, _ in zip(textfiles.documents(file, "blank-line"), range(30_000), strict=False)]
    if pattern == "gpt-2":
        train_bpe_from_iterator(texts, vocab_size).save(directory)
        return
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens(0),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))


def tiktoken_of(tokenizer: Tokenizer) -> tiktoken.Encoding:
    """The same tokens in the library that our fast path stands on."""
    special = tokenizer.special_ids
    ranks = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size) if token not in special}
    return tiktoken.Encoding("benchmark", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


if __name__ == "__main__":
    main()
