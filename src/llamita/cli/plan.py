"""`llamita plan`: prints what a training will need before it is begun. workflows/plan.py counts it."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import psutil
import tyro
from rich.console import Console, Group
from rich.table import Table

from llamita.cli.info import find_model, short_bytes, short_number
from llamita.model.config import ModelConfig
from llamita.model.presets import PRESETS, preset
from llamita.model.scaling import Scaled, at_depth
from llamita.workflows.plan import Plan, PlanConfig, make_plan
from llamita.workflows.pretrain import parse_change

TABLE_DEPTHS = (2, 4, 6, 8, 12, 16, 20, 24, 32)


@dataclass(frozen=True)
class PlanVerb:
    """The options of `llamita plan`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A preset, a model directory or a training run; or a depth in its place."""
    depth: int = 0
    """Plan what llamita train --depth would do: shape, rows, batch, learning rate and steps follow from it."""
    depths: bool = False
    """Print the rules' table for depths from 2 to 32."""
    vocab_size: int = 0
    """Tokens of the vocabulary; 0: those of the model, and 32,000 for a depth."""
    set: tuple[str, ...] = ()
    """Changes to a preset, as in --set hidden_size=128 num_hidden_layers=4."""
    json: bool = False
    """Print JSON instead of a table."""
    options: PlanConfig = PlanConfig()


def run(verb: PlanVerb) -> int:
    """Show what a training will need: memory by parts, the rows that fit at a time, time and disk.

    Examples:
      llamita plan stories-110m --gpu a100-40gb --tokens 2e9
      llamita plan llama-3.2-1b --gpus 8 --gpu h100 --parallel fsdp --recompute all --batch-size 64
      llamita plan stories-15m --device cpu --memory 4 --batch-size 8 --sequence-length 256
      llamita plan --depth 12 --gpu h100

    The exit status is 1 where it does not fit.
    """
    console = Console()
    if verb.depths:
        scaled = [at_depth(depth, verb.vocab_size or 32_000) for depth in TABLE_DEPTHS]
        if verb.json:
            print(json.dumps([depth_facts(entry) for entry in scaled], indent=2))
        else:
            console.print(depth_table(scaled))
        return 0
    config, options, scaled_run = chosen(verb)
    plan = make_plan(config, options, free_memory=free_memory, peak_flops=lambda: peak_flops(options.precision))
    if verb.json:
        facts = plan.facts() | ({"depth": depth_facts(scaled_run)} if scaled_run else {})
        print(json.dumps(facts, indent=2))
    else:
        console.print(plan_table(plan, options, scaled_run))
    return 0 if plan.fits else 1


def chosen(verb: PlanVerb) -> tuple[ModelConfig, PlanConfig, Scaled | None]:
    """Returns the model and the options that are meant, and the depth's training where one is given."""
    if bool(verb.model) == bool(verb.depth):
        raise ValueError("give either a model (a preset, a directory) or --depth; llamita info lists the presets")
    changes = dict(parse_change(text) for text in verb.set)
    if verb.vocab_size:
        changes["vocab_size"] = verb.vocab_size
    options = verb.options
    if verb.depth:
        vocab_size = int(changes.get("vocab_size", 32_000))
        if set(changes) - {"vocab_size"}:
            raise ValueError("--set changes a preset; with --depth the shape follows from the depth")
        scaled = at_depth(verb.depth, vocab_size, options.sequence_length, options.batch_size)
        options = replace(
            options,
            sequence_length=scaled.sequence_length,
            batch_size=scaled.batch_size,
            tokens=options.tokens or scaled.tokens,
        )
        replicas = options.gpus // options.tensor_parallel
        if not verb.options.batch_size and scaled.batch_size % replicas:
            options = replace(options, batch_size=-(-scaled.batch_size // replicas) * replicas)
        return scaled.model, options, scaled
    if changes and verb.model not in PRESETS:
        raise ValueError("--set and --vocab-size change a preset; the shape of a model directory stands in it")
    config = preset(verb.model, **changes) if changes else find_model(verb.model)[0]
    return config, options, None


def free_memory() -> int:
    """Returns the bytes of memory that this machine has free."""
    return int(psutil.virtual_memory().available)


def peak_flops(precision: str) -> float:
    """Returns the operations a second of a large product on this machine's processor."""
    from llamita.backend.choice import load_backend

    backend = load_backend("torch", device="cpu")
    return backend.build_train_step(preset("tiny"), precision=precision, device="cpu").peak_flops()  # type: ignore[arg-type]


# --- what is printed -------------------------------------------------------------------------------------------------


def plan_table(plan: Plan, options: PlanConfig, scaled: Scaled | None) -> Group:
    memory = plan.memory
    card = options.gpu or "card"
    where = (
        "this machine" if options.device == "cpu" else f"each of {options.gpus} {card}" if options.gpus > 1 else card
    )
    rows: list[tuple[str, str]] = [("parameters", f"{plan.parameters:,}")]
    if scaled:
        shape = scaled.model
        rows.append(
            ("shape", f"depth {scaled.depth}: width {shape.hidden_size}, {shape.num_attention_heads} heads, "
             f"feed-forward {shape.intermediate_size}")
        )  # fmt: skip
        rows.append(("learning rate", f"{scaled.learning_rate:g}"))
    rows += [
        ("tokens", f"{short_number(plan.tokens)} in {plan.steps:,} updates of {plan.batch_size} x "
         f"{plan.sequence_length:,}"),
        ("memory", f"{short_bytes(memory.total)} of {short_bytes(plan.device_memory)} on {where}: "
         + ("fits" if plan.fits else "[bold red]does not fit[/]")),
        ("  weights", short_bytes(memory.weights)),
        (f"  {options.optimizer}'s state", short_bytes(memory.optimizer)),
        ("  gradients", f"{short_bytes(memory.gradients)}, {short_bytes(memory.all_gradients)} in the end"),
        ("  activations", short_bytes(memory.activations)
         + (f" with {plan.recomputed} blocks computed again" if plan.recomputed else "")),
        ("  logits", short_bytes(memory.logits)),
        ("  workspace", short_bytes(memory.workspace)),
        ("  the most", memory.moment),
        ("rows at a time", f"{plan.micro_batch_size or 'not even one'}, {plan.micro_batches} times an update"),
        ("operations", f"{plan.flops:.2e} FLOP"),
        ("speed", f"{short_number(plan.tokens_per_second)}tokens/s ({plan.speed_from})"
         if plan.tokens_per_second else plan.speed_from),
    ]  # fmt: skip
    if plan.seconds:
        rows.append(("time", duration(plan.seconds)))
    rows += [
        ("disk", f"{short_bytes(plan.disk.tokens)} of prepared tokens, {short_bytes(plan.disk.checkpoints)} of "
         f"checkpoints ({options.keep_checkpoints + 1} of {short_bytes(plan.disk.checkpoint)})"),
    ]  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for label, value in rows:
        table.add_row(label if label.startswith(" ") else f"[bold]{label}[/bold]", value)
    return Group(table, *(["", *(f"- {text}" for text in plan.advice)] if plan.advice else []))


def depth_facts(scaled: Scaled) -> dict[str, Any]:
    """Returns what a depth stands for, as JSON holds it."""
    return {
        "depth": scaled.depth,
        "width": scaled.model.hidden_size,
        "heads": scaled.model.num_attention_heads,
        "feed_forward": scaled.model.intermediate_size,
        "parameters": scaled.parameters,
        "sequence_length": scaled.sequence_length,
        "batch_size": scaled.batch_size,
        "learning_rate": scaled.learning_rate,
        "steps": scaled.steps,
        "tokens": scaled.tokens,
        "flops": scaled.flops,
    }


def depth_table(entries: list[Scaled]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = ("depth", "width", "heads", "parameters", "row", "rows", "learning rate", "updates", "tokens", "FLOP")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        table.add_row(
            str(entry.depth),
            str(entry.model.hidden_size),
            str(entry.model.num_attention_heads),
            short_number(entry.parameters),
            str(entry.sequence_length),
            str(entry.batch_size),
            f"{entry.learning_rate:g}",
            f"{entry.steps:,}",
            short_number(entry.tokens),
            f"{entry.flops:.1e}",
        )
    return table


def duration(seconds: float) -> str:
    """Returns a time in the two largest units that it has."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    for (name, size), (smaller, part) in pairwise(units):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            return f"{_count(int(whole), name)} {_count(int(rest // part), smaller)}"
    return _count(max(1, round(seconds)), "second")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" + ("s" if number != 1 else "")
