"""Batches of garbage in the middle of a run: what is found of them, what they do, and what passing over them saves.

    python benchmarks/spikes.py [--steps 300] [--batches 4] [--deviations 7]

Trains a small model on Meadow stories on the CPU, a story a row. In planted data, signs thrown together stand in the
place of the stories of a few batches in a row. A run goes on as it is (report), passes batches over in place (skip), or
goes back to the newest checkpoint first (rewind), with gradients clipped to a norm of 1 and not clipped. Prints the
spikes found, the rows named and how many of them are garbage, the validation loss at the end, and the most by which it
rose from one evaluation to the next after a fifth of the run.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llamita.backend.choice import load_backend
from llamita.data import meadow
from llamita.data.batches import BatchIterator
from llamita.data.inspect import documents_of_row
from llamita.data.packing import Rows, RowsConfig
from llamita.data.prepare import PrepareConfig, prepare
from llamita.data.shards import TokenShards
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training import exit_status
from llamita.training.metrics import read_records
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain

SHAPE = ("hidden_size=64", "intermediate_size=160", "num_hidden_layers=2", "num_attention_heads=4")
SIGNS = "#%&*+=@^_~"  # which no story has
SPECIAL = 2  # tokens of a document that are not its text: its beginning and its end
STORIES, ROWS, LENGTH = 3000, 8, 128  # documents, rows of an update, tokens of a row


def prepared(directory: Path, stories: list[str], tokenizer: Path) -> Path:
    """Returns a data directory of these stories; those of validation are always the same."""
    directory.mkdir()
    held_out = [text.strip() for text in meadow.corpus(0, 200, "validation")]
    for name, texts in (("train", stories), ("validation", held_out)):
        (directory / f"{name}.txt").write_text("\n\n".join(texts) + "\n", "utf-8")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(
            PrepareConfig(
                output=directory / "data",
                tokenizer=tokenizer,
                files=(directory / "train.txt",),
                validation_files=(directory / "validation.txt",),
            )
        )
    return directory / "data"


def planted_stories(stories: list[str], clean: Path, first: int, batches: int) -> list[str]:
    """Returns the stories with signs, a token each, in the place of those that some batches are made of.

    Each has as many tokens as the story in whose place it stands, so every other row of the data stays as it is.
    """
    shards, generator = TokenShards(clean, "train"), random.Random(0)
    rows = Rows(shards, RowsConfig("pad", LENGTH))
    iterator, planted = BatchIterator(rows, ROWS, seed=0), list(stories)
    for step in range(first, first + batches):
        for row in iterator.row_ids(step):
            (number,) = documents_of_row(rows, int(row)).split()[1:]
            tokens = len(shards.document(int(number))) - SPECIAL
            planted[int(number)] = "".join(generator.choices(SIGNS, k=tokens))
    return planted


def measured(run: Path, data: Path, policy: str, options: argparse.Namespace, clipping: float) -> list[str]:
    """Trains once and returns the cells of its row."""
    values = {
        "output": run, "data": data, "set": (*SHAPE, "num_key_value_heads=2"), "mode": "pad",
        "sequence_length": LENGTH, "steps": options.steps, "batch_size": ROWS, "learning_rate": 4e-3,
        "max_grad_norm": clipping, "evaluate_every": 20, "checkpoint_every": 50, "evaluation_rows": 96,
        "sample_tokens": 0, "precision": "fp32", "device": "cpu", "on_spike": policy,
        "spike_deviations": options.deviations, "spike_limit": 100, "keep_checkpoints": 3,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        result = pretrain(resolve(PretrainConfig, **values), load_backend("torch"))
    lines = read_records(run / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    rise = max(0.0, *(after - before for before, after in pairwise(losses[len(losses) // 5 :])))
    reports = [json.loads(file.read_text("utf-8")) for file in sorted((run / "autopsies").glob("*/report.json"))]
    named = [row["texts"]["text"] for report in reports for row in report["rows"] if row["suspect"]]
    garbage = sum(any(sign in text for sign in SIGNS) for text in named)
    if result.interrupted or result.evaluation is None:
        raise SystemExit(exit_status.of_signal(result.signal))
    return [str(len(reports)), f"{garbage} of {len(named)}", f"{result.evaluation.loss:.4f}", f"{rise:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--deviations", type=float, default=7.0)
    options = parser.parse_args()
    first = options.steps // 2
    table = Table(title=f"{options.batches} batches of garbage from update {first + 1} of {options.steps} on")
    for column in ("data", "on spike", "clipped", "autopsies", "garbage of rows named", "loss", "largest rise"):
        table.add_column(column, justify="left" if column in ("data", "on spike", "clipped") else "right")
    stories = [text.strip() for text in meadow.corpus(0, STORIES, "train")]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        train_bpe_from_iterator(stories, 400).save(directory / "tokenizer")
        clean = prepared(directory / "clean", stories, directory / "tokenizer")
        other = planted_stories(stories, clean, first, options.batches)
        planted = prepared(directory / "planted", other, directory / "tokenizer")
        for clipping in (1.0, 0.0):
            for data, policy in ((clean, "report"), (planted, "report"), (planted, "skip"), (planted, "rewind")):
                run = directory / f"{data.parent.name}-{policy}-{clipping}"
                cells = measured(run, data, policy, options, clipping)
                table.add_row(data.parent.name, policy, "to 1" if clipping else "no", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
