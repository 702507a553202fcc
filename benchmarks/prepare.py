"""`llamita prepare` from end to end against the batch encoder of `tokenizers` alone, one core each, same ids.

Ours reads files, finds documents, encodes, hashes and writes shards; the peer only encodes documents already in memory.
Passes alternate, so that a change in the machine's speed meets both.

    python benchmarks/prepare.py [--text FILE ...]      without --text: Meadow stories
"""

import os

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is imported: it has one thread, as we have one worker
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers

from llamita.data import meadow, textfiles
from llamita.data.prepare import PrepareConfig, prepare
from llamita.data.shards import TokenShards
from llamita.text.bpe import train_bpe_from_iterator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; documents are separated by blank lines")
    parser.add_argument("--stories", type=int, default=30_000, help="Meadow stories where no text is given")
    parser.add_argument("--vocab-size", type=int, help="default: 8192, or 688 for Meadow, whose world has few words")
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(Path(directory), arguments)


def measure(directory: Path, arguments: argparse.Namespace) -> None:
    files = tuple(arguments.text or [])
    if not files:
        files = (directory / "stories.txt",)
        files[0].write_text("\n\n".join(meadow.corpus(0, arguments.stories, "train")), encoding="utf-8")
    texts = [text for path in files for text in textfiles.documents(path, "blank-line")]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    vocab_size = arguments.vocab_size or (8192 if arguments.text else 688)
    train_bpe_from_iterator(texts, vocab_size).save(directory / "tokenizer")
    peer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    # WikiText spells `<unk>`; like ours, the peer is to read it as text and not as the control token.
    peer.encode_special_tokens = True
    config = PrepareConfig(
        directory / "data",
        directory / "tokenizer",
        files=files,
        validation_share=0,
        bos=False,
        eos=False,
        workers=1,
        overwrite=True,
    )
    contenders: dict[str, Callable[[], object]] = {
        "llamita prepare, 1 worker": lambda: prepare(config),
        "tokenizers encode_batch": lambda: peer.encode_batch(texts, add_special_tokens=False),
        "tokenizers encode_batch_fast": lambda: peer.encode_batch_fast(texts, add_special_tokens=False),
    }

    prepare(config)
    ours = TokenShards(config.output)
    theirs = np.concatenate([encoding.ids for encoding in peer.encode_batch(texts, add_special_tokens=False)])
    same = np.array_equal(ours.window(0, ours.num_tokens), theirs)

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.passes):
        for name, run in contenders.items():
            start = time.perf_counter()
            result = run()
            seconds[name].append(time.perf_counter() - start)
            del result

    print(f"{megabytes:.1f} MB, {len(texts):,} documents, {ours.num_tokens:,} tokens, vocabulary {vocab_size:,}")
    print(f"same ids: {same}")
    print(f"{'':<30} {'median s':>9} {'min..max s':>14} {'MB/s':>7} {'ratio':>6}")
    reference = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.2f}..{max(times):.2f}"
        print(f"{name:<30} {median:>9.3f} {spread:>14} {megabytes / median:>7.1f} {median / reference:>6.2f}")
    if not same:
        raise SystemExit("the ids differ")


if __name__ == "__main__":
    main()
