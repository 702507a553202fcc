"""Training in float32, bfloat16 and 8-bit products: the loss over the same updates from the same weights.

    python benchmarks/precision.py [--output runs/precision] [--device cpu] [--plot docs/images/precision.png]

Each is a `llamita train` over stories of Meadow: same seed, rows and rates, another `--precision`. A run that is
already in OUTPUT is not made again. Prints the training loss beside float32's at a few updates and the last validation
losses; `--plot` draws all of them. On a CPU, 8-bit products show what the rounding does to the loss and are not fast.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llamita.backend.choice import load_backend
from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training import metrics
from llamita.training.record import processor_name
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "8-bit"}
SHAPE = ("hidden_size=64", "intermediate_size=256", "num_hidden_layers=2")
STORIES = 6_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/precision"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", nargs="*", default=SHAPE, help="changes to the preset")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="rows in an update")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    data = prepared(options.output)
    records = {precision: trained(options, data, precision) for precision in NAMES}
    report(options, records)
    if options.plot:
        draw(options, records)


def prepared(output: Path) -> Path:
    """Returns a directory of prepared stories, made where it is not there yet."""
    place, tokenizer = output / "meadow", output / "tokenizer"
    if not place.exists():
        stories = (f"{text}\n" for text in meadow.corpus(0, 2000, "train"))
        train_bpe_from_iterator(stories, 512).save(tokenizer)
        prepare(PrepareConfig(output=place, tokenizer=tokenizer, source="meadow", documents=STORIES))
    return place


def trained(options: argparse.Namespace, data: Path, precision: str) -> list[dict[str, Any]]:
    """Returns the record of a run, made where it is not there yet."""
    run = options.output / precision
    if not run.exists():
        config = resolve(
            PretrainConfig,
            output=run,
            data=data,
            preset=options.preset,
            set=tuple(options.set),
            learning_rate=options.rate,
            steps=options.steps,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            evaluate_every=max(1, options.steps // 10),
            evaluation_rows=64,
            checkpoint_every=options.steps,
            keep_checkpoints=1,
            sample_tokens=0,
            seed=options.seed,
            precision=precision,
            backend="torch",
            device=options.device,
            threads=options.threads,
        )
        if pretrain(config, load_backend("torch")).interrupted:
            raise SystemExit(f"stopped; remove {run} before the same command is given again")
    return metrics.read_records(run / "metrics.jsonl")


def losses(record: list[dict[str, Any]], kind: str) -> dict[int, float]:
    """Returns the losses by update: of training, or of an evaluation."""
    return {entry["step"]: entry["loss"] for entry in record if entry["kind"] == kind}


def report(options: argparse.Namespace, records: dict[str, list[dict[str, Any]]]) -> None:
    console = Console(width=110)
    console.print(
        f"{processor_name()}, {options.device}, {options.threads} threads; {options.preset} {' '.join(options.set)}"
    )
    table = Table(title="loss, nats per token")
    for column in ("", *NAMES.values()):
        table.add_column(column, justify="right")
    training = {precision: losses(record, "train") for precision, record in records.items()}
    every = sorted(training["fp32"])
    for first in range(0, len(every), max(1, len(every) // 5)):
        block = every[first : first + max(1, len(every) // 5)]
        means = [sum(training[name][step] for step in block) / len(block) for name in NAMES]
        table.add_row(f"training, updates {block[0]} to {block[-1]}", *(f"{mean:.4f}" for mean in means))
    last = [list(losses(records[name], "evaluation").values())[-1] for name in NAMES]
    table.add_row("last validation", *(f"{loss:.4f}" for loss in last))
    console.print(table)


def draw(options: argparse.Namespace, records: dict[str, list[dict[str, Any]]]) -> None:
    """Draws the training losses over each other, and below them how far each is from float32's at the same update."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    exact = losses(records["fp32"], "train")
    for name, colour in zip(NAMES, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        found = losses(records[name], "train")
        above.plot(list(found), list(found.values()), color=colour, linewidth=1, label=NAMES[name])
        if name != "fp32":
            differences = [loss - exact[step] for step, loss in found.items()]
            below.plot(list(found), differences, color=colour, linewidth=1)
    above.set_ylabel("training loss, nats per token")
    above.legend()
    below.axhline(0, color="grey", linewidth=0.8)
    below.set_ylabel("minus float32's")
    below.set_xlabel("updates")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
