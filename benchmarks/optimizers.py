"""Muon beside AdamW: the validation loss after the same updates over the same rows, and how many Muon can do without.

    python benchmarks/optimizers.py [--output runs/optimizers] [--wikitext test.txt valid.txt]
                                    [--steps 400] [--rates 0.002 ...] [--plot docs/images/muon.png]

Either optimiser has the same trials: a training from the same weights at each of the rates, with a warm-up of a tenth
and a cosine to a tenth. The best of each, by its last validation loss, are compared. Muon also trains for shorter runs
(`--shares`) at its best rate, with a schedule of their own length. Data: stories of Meadow, and where its two files are
given (to train on, and to validate on), WikiText. Every trial is a `llamita train`; it becomes a line of
OUTPUT/trials.jsonl and is not made again by a second call. Prints a table, and draws the curves with `--plot`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llamita.backend.choice import load_backend
from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.text.bpe import TokenizerTrainingConfig, train_bpe_from_iterator, train_tokenizer
from llamita.training import metrics
from llamita.training.record import processor_name
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain

OPTIMIZERS = ("adamw", "muon")
NAMES = {"adamw": "AdamW", "muon": "Muon"}
RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
SHAPE = ("hidden_size=64", "intermediate_size=256", "num_hidden_layers=2")
STORIES = 12_000

Trial = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/optimizers"))
    parser.add_argument("--wikitext", type=Path, nargs=2, metavar=("TRAIN", "VALIDATION"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--set", nargs="*", default=SHAPE, help="changes to the preset")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8, help="rows in an update")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--shares", type=float, nargs="*", default=(0.65, 0.5), help="of the updates, for Muon alone")
    parser.add_argument("--momentum", type=float, default=0.9, help="of Muon; AdamW's beta1 is 0.9")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    datasets = prepared(options)
    for name, data in datasets.items():
        for rate in options.rates:
            for optimizer in OPTIMIZERS:
                run_trial(options, name, data, optimizer, rate, options.steps)
        best = best_trials(options, name)["muon"]
        for share in options.shares:
            run_trial(options, name, data, "muon", best["learning_rate"], round(share * options.steps))
    report(options, list(datasets))
    if options.plot:
        draw(options, list(datasets))


def prepared(options: argparse.Namespace) -> dict[str, Path]:
    """Returns a data directory for each text, with a tokenizer of its own; made where it is not there yet."""
    places = {"meadow": options.output / "meadow"}
    if options.wikitext:
        places["wikitext-2"] = options.output / "wikitext-2"
    for name, place in places.items():
        if place.exists():
            continue
        tokenizer = options.output / f"{name}-tokenizer"
        if name == "meadow":
            stories = (f"{text}\n" for text in meadow.corpus(0, 2000, "train"))
            train_bpe_from_iterator(stories, 512).save(tokenizer)
            source: dict[str, Any] = {"source": "meadow", "documents": STORIES, "validation_share": 0.02}
        else:
            files, validation = (options.wikitext[0],), (options.wikitext[1],)
            train_tokenizer(TokenizerTrainingConfig(files=files, vocab_size=1024, output=tokenizer))
            source = {"source": "wikitext", "files": files, "validation_files": validation}
        prepare(PrepareConfig(output=place, tokenizer=tokenizer, **source))
    return places


def run_trial(options: argparse.Namespace, name: str, data: Path, optimizer: str, rate: float, steps: int) -> None:
    """Trains once and appends a line to the trials, unless it is there."""
    trial = {
        "data": name,
        "optimizer": optimizer,
        **({"momentum": options.momentum} if optimizer == "muon" else {}),
        "learning_rate": rate,
        "steps": steps,
        "preset": options.preset,
        "set": list(options.set),
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
    }
    if any(trial.items() <= made.items() for made in trials(options)):
        return
    run = options.output / "run"
    shutil.rmtree(run, ignore_errors=True)
    config = resolve(
        PretrainConfig,
        output=run,
        data=data,
        preset=options.preset,
        set=tuple(options.set),
        optimizer=optimizer,
        momentum=options.momentum,
        learning_rate=rate,
        steps=steps,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        evaluate_every=max(1, options.steps // 20),
        evaluation_rows=128,
        checkpoint_every=steps,
        keep_checkpoints=1,
        sample_tokens=0,
        precision="fp32",
        backend="torch",
        device="cpu",
        threads=options.threads,
    )
    started = time.perf_counter()
    if pretrain(config, load_backend("torch")).interrupted:
        raise SystemExit("stopped; the same command goes on with the trials that are not made yet")
    records = metrics.read_records(run / "metrics.jsonl")
    trial["seconds"] = round(time.perf_counter() - started, 1)
    trial["validation"] = [(r["step"], round(r["loss"], 5)) for r in records if r["kind"] == "evaluation"]
    with (options.output / "trials.jsonl").open("a") as file:
        file.write(json.dumps(trial) + "\n")
    shutil.rmtree(run)


def trials(options: argparse.Namespace) -> list[Trial]:
    """Returns the trials that are made, of Muon those with the momentum that is asked for."""
    file = options.output / "trials.jsonl"
    made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [trial for trial in made if trial.get("momentum", options.momentum) == options.momentum]


def best_trials(options: argparse.Namespace, name: str) -> dict[str, Trial]:
    """Returns the trial of the whole length with the lowest last loss, for each optimiser."""
    whole = [trial for trial in trials(options) if trial["data"] == name and trial["steps"] == options.steps]
    return {
        optimizer: min((trial for trial in whole if trial["optimizer"] == optimizer), key=last_loss)
        for optimizer in OPTIMIZERS
    }


def last_loss(trial: Trial) -> float:
    return trial["validation"][-1][1]


def updates_to_reach(trial: Trial, loss: float) -> float:
    """Returns the update at which the curve first comes down to a loss, between evaluations by a straight line."""
    step_before, loss_before = 0, float("inf")
    for step, found in trial["validation"]:
        if found <= loss:
            way = (loss_before - loss) / (loss_before - found) if loss_before < float("inf") else 1.0
            return step_before + way * (step - step_before)
        step_before, loss_before = step, found
    return float("inf")


def report(options: argparse.Namespace, names: list[str]) -> None:
    console = Console(width=110)
    console.print(f"{processor_name()}, {options.threads} threads; {options.preset} {' '.join(options.set)}")
    made = trials(options)
    for name in names:
        table = Table(title=f"{name}: last validation loss, nats per token")
        for column in ("learning rate", *(NAMES[optimizer] for optimizer in OPTIMIZERS)):
            table.add_column(column, justify="right")
        whole = [trial for trial in made if trial["data"] == name and trial["steps"] == options.steps]
        for rate in sorted({trial["learning_rate"] for trial in whole}):
            at_rate = {
                trial["optimizer"]: f"{last_loss(trial):.4f}" for trial in whole if trial["learning_rate"] == rate
            }
            table.add_row(f"{rate:g}", *(at_rate.get(optimizer, "") for optimizer in OPTIMIZERS))
        console.print(table)
        best = best_trials(options, name)
        target = last_loss(best["adamw"])
        share = updates_to_reach(best["muon"], target) / options.steps
        console.print(
            f"AdamW's best ends at {target:.4f} (rate {best['adamw']['learning_rate']:g}), Muon's at "
            f"{last_loss(best['muon']):.4f} (rate {best['muon']['learning_rate']:g}). Muon reaches {target:.4f} after "
            f"{share:.0%} of the updates, on the way of the whole schedule."
        )
        for trial in shorter(options, name):
            console.print(
                f"A run of {trial['steps']} updates ({trial['steps'] / options.steps:.0%}) with a schedule of its own "
                f"ends at {last_loss(trial):.4f}: {'below' if last_loss(trial) <= target else 'above'} AdamW's."
            )


def shorter(options: argparse.Namespace, name: str) -> list[Trial]:
    return [trial for trial in trials(options) if trial["data"] == name and trial["steps"] < options.steps]


def draw(options: argparse.Namespace, names: list[str]) -> None:
    """Draws the curves of the best trials over updates, and under them the last losses over the rates."""
    figure = Figure(figsize=(5 * len(names), 7.5), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    colours = {"adamw": "tab:blue", "muon": "tab:orange"}
    for (curves, rates), name in zip(axes.T, names, strict=True):
        best = best_trials(options, name)
        target = last_loss(best["adamw"])
        for optimizer, trial in best.items():
            label = f"{NAMES[optimizer]}, rate {trial['learning_rate']:g}"
            curves.plot(*zip(*trial["validation"], strict=True), color=colours[optimizer], label=label)
        for trial, style in zip(shorter(options, name), ("--", ":", "-."), strict=False):
            label = f"Muon, {trial['steps']} updates"
            curves.plot(*zip(*trial["validation"], strict=True), style, color=colours["muon"], label=label)
        curves.axhline(target, color="grey", linewidth=0.8)
        top = max(trial["validation"][2][1] for trial in best.values())
        lowest = min(map(last_loss, best.values()))
        curves.set_ylim(lowest - 0.05 * (top - lowest), top)
        curves.set(title=name, xlabel="updates", ylabel="validation loss, nats per token")
        curves.legend()
        for optimizer in OPTIMIZERS:
            chosen = [
                trial
                for trial in trials(options)
                if (trial["data"], trial["optimizer"], trial["steps"]) == (name, optimizer, options.steps)
            ]
            points = sorted((trial["learning_rate"], last_loss(trial)) for trial in chosen)
            rates.plot(*zip(*points, strict=True), "o-", color=colours[optimizer], label=NAMES[optimizer])
        rates.set(xscale="log", xlabel="learning rate", ylabel="last validation loss")
        shown = sorted(options.rates)
        rates.set_xticks(shown, [f"{rate:g}" for rate in shown])
        rates.set_xticks([], minor=True)
        rates.legend()
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
