"""The first five minutes: stories, a tokenizer, a model of about a million parameters, its scores, what it writes.

Every part is the one that a user's own run takes; only the choices are made here. The backend is passed in.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.padding import Padding

from llamita.backend.interface import Backend, BackendName, Forward, Runner
from llamita.backend.sampling_params import SamplingParams
from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.data.shards import Manifest
from llamita.evaluation import meadow_score, records
from llamita.evaluation.perplexity import score_sequences
from llamita.inference.llm import LLM
from llamita.model.sizes import count_parameters
from llamita.progress import ProgressBar
from llamita.storage.files import atomic_directory, atomic_write
from llamita.storage.model_directory import load_config
from llamita.text.bpe import train_bpe_from_iterator
from llamita.text.tokenizer import Tokenizer
from llamita.training import exit_status
from llamita.training.record import command_line
from llamita.training.run_directory import LAST
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain

TOKENIZER_STORIES = 5000  # enough for the most frequent pairs to be known
STORIES_SHOWN = 3
SAMPLED_AT_ONCE = 100


@dataclass(frozen=True)
class Size:
    """The amount to learn, and the size of the model that learns it for so many updates."""

    steps: int
    stories: int
    vocab_size: int
    scored_stories: int
    batch_size: int
    shape: tuple[str, ...] = ()
    """Changes to the preset `tiny`."""


SIZES = {
    "full": Size(steps=4000, stories=64_000, vocab_size=688, scored_stories=1000, batch_size=16),
    "small": Size(
        steps=400,
        stories=4000,
        vocab_size=400,
        scored_stories=100,
        batch_size=8,
        shape=("hidden_size=64", "intermediate_size=256", "num_hidden_layers=2"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The options of `llamita quickstart`."""

    output: Path = Path("runs/quickstart")
    """Directory for all of it: tokenizer, data, the training run, the report. An unfinished one is gone on with."""
    full: bool = False
    """Then tune the model too: to answer questions, to prefer right answers to wrong ones, to tell happy stories from
    sad ones; and write a report of each run."""
    size: Literal["auto", "full", "small"] = "auto"
    """full: a model of a million parameters that learns Meadow well; small: one of 180,000 that begins to, for where
    even the other takes long. auto: small with MLX on a CPU, which MLX is not made for, else full."""
    steps: int = 0
    """Updates; 0: as many as the size has, 4,000 or 400. Fewer for a quick look, which the runs of --full do not exceed
    either; the scores need all of them."""
    stories: int = 0
    """Training stories to generate, and a validation share more; 0: as the size has, 64,000 or 4,000."""
    vocab_size: int = 0
    """Size of the tokenizer's vocabulary; 0: as the size has, 688 or 400."""
    scored_stories: int = 0
    """Stories to sample and to check, and as many validation stories to predict; 0: as the size has, 1,000 or 100. With
    --full no more questions are asked, either, and no more stories labelled."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    seed: int = 0
    """Decides the stories, the initial weights, their order, and what is sampled."""

    def resolved(self) -> "QuickstartConfig":
        """The same with what the size decides filled in; "auto" is full unless somebody has said otherwise."""
        size: Literal["full", "small"] = "small" if self.size == "small" else "full"
        names = ("steps", "stories", "vocab_size", "scored_stories")
        values = {name: getattr(self, name) or getattr(SIZES[size], name) for name in names}
        return replace(self, size=size, **values)


@dataclass(frozen=True)
class Report:
    """The scores of the trained model; written as report.json. Losses are over whole validation stories."""

    parameters: int
    validation_stories: int
    nats_per_story: float
    floor_per_story: float
    times_floor: float
    determined_words: float
    sampled_stories: int
    grammatical: float
    consistent: float


def quickstart(config: QuickstartConfig, backend: Backend) -> int:
    """Run all parts, those of an earlier call excepted, and print what came out; the exit status."""
    config = config.resolved()
    console = Console(highlight=False)
    if config.size == "small":
        console.print("The small size: a model that begins to learn, in a few minutes; --size full is the whole")
    tokenizer, data, run = config.output / "tokenizer", config.output / "data", config.output / "run"
    if not tokenizer.exists():
        console.print(f"[bold]1. A tokenizer[/] of {config.vocab_size} tokens, from {TOKENIZER_STORIES:,} stories")
        texts = meadow.corpus(config.seed, TOKENIZER_STORIES, "train")
        with atomic_directory(tokenizer) as temporary:
            train_bpe_from_iterator((f"{text}\n" for text in texts), config.vocab_size).save(temporary)
    if not data.exists():
        console.print(f"[bold]2. Data[/]: {config.stories:,} stories of Meadow, as tokens")
        prepare(
            PrepareConfig(
                output=data,
                tokenizer=tokenizer,
                source="meadow",
                documents=config.stories,
                validation_share=max(0.02, config.scored_stories / config.stories),
                seed=config.seed,
            )
        )
    floor = meadow.floor(meadow.corpus(config.seed, config.scored_stories, "validation"))
    if not (run / "run.json").exists() or _steps_done(run) < config.steps:
        parameters = "180,000" if config.size == "small" else "a million"
        console.print(f"[bold]3. A model[/] of about {parameters} parameters; no model can have a loss below ", end="")
        console.print(f"{floor.nats_per_character:.4f} nats a character here")
        result = pretrain(training_options(config, data, run), backend, floor=floor.nats_per_character)
        if result.interrupted:
            console.print("stopped and saved; the same command goes on from here")
            return exit_status.of_signal(result.signal)
    report = evaluate(config, run / LAST, backend.load_runner(run / LAST), floor, console)
    atomic_write(config.output / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    records.write(run, "meadow", asdict(report), command_line(sys.argv), run / LAST)
    show(report, config, run, backend, console)
    return 0


def training_options(config: QuickstartConfig, data: Path, run: Path) -> PretrainConfig:
    """A story a row, the longest one filling it, so that each is predicted from its beginning to its end."""
    splits = Manifest.load(data).splits.values()
    return resolve(
        PretrainConfig,
        data=(data,),
        output=run,
        resume=(run / "run.json").exists(),
        preset="tiny",
        set=SIZES[config.size].shape,
        mode="pad",
        sequence_length=max(split.longest_document for split in splits) - 1,
        steps=config.steps,
        batch_size=SIZES[config.size].batch_size,
        learning_rate=6e-3,
        minimum_learning_rate=0.0,
        # The sum of the rates, more than anything, decides how little probability is left on words that cannot come;
        # so they stay high for long.
        schedule="warmup-stable-decay",
        decay_steps=config.steps * 4 // 10,
        # Nothing here is seen twice, and decay keeps a little probability on words that never come next.
        weight_decay=0.0,
        evaluate_every=max(1, config.steps // 8),
        evaluation_rows=256,
        sample_tokens=200,
        backend=config.backend,
        seed=config.seed,
    )


def evaluate(config: QuickstartConfig, model: Path, runner: Runner, floor: meadow.Floor, console: Console) -> Report:
    """Predict validation stories and check sampled ones."""
    tokenizer = Tokenizer.load(model)
    stories = list(meadow.corpus(config.seed, config.scored_stories, "validation"))
    nats, hits, determined = predict(runner, tokenizer, stories)
    first = config.seed * config.scored_stories
    texts = list(sample_stories(LLM(runner, tokenizer), range(first, first + config.scored_stories), console))
    score = meadow_score.score(texts)
    return Report(
        parameters=count_parameters(load_config(model)).total,
        validation_stories=len(stories),
        nats_per_story=nats / len(stories),
        floor_per_story=floor.nats_per_story,
        times_floor=nats / floor.nats,
        determined_words=hits / max(1, determined),
        sampled_stories=len(texts),
        grammatical=score.grammatical,
        consistent=score.consistent,
    )


def predict(runner: Forward, tokenizer: Tokenizer, stories: list[str]) -> tuple[float, int, int]:
    """Nats over whole stories, BOS given and EOS scored; and of the spans that far facts determine, how many the
    likeliest tokens hit, and how many there are."""
    sequences = [np.asarray(ids) for ids in tokenizer.encode_batch(stories, bos=True, eos=True)]
    nats, hits, determined = 0.0, 0, 0
    for text, ids, scores in zip(
        stories, sequences, score_sequences(runner, sequences, tokenizer.vocab_size), strict=True
    ):
        nats -= float(scores.log_probabilities_T.sum())
        right_T = scores.likeliest_T == ids[1:]
        ends = np.cumsum([len(tokenizer.token_bytes(int(i))) for i in ids[1:]])  # Meadow is ASCII: bytes are characters
        for start, end in meadow_score.determined_spans(text):
            inside = (ends > start) & (np.concatenate(([0], ends[:-1])) < end)
            hits += bool(right_T[inside].all())
            determined += 1
    return nats, hits, determined


def sample_stories(llm: LLM, seeds: range, console: Console) -> Iterator[str]:
    """Stories at temperature 1, nothing cut off, one for each seed; the engine writes many at once."""
    with ProgressBar("sampling stories", len(seeds), console=console) as bar:
        for first in range(0, len(seeds), SAMPLED_AT_ONCE):
            params = [SamplingParams(max_tokens=10_000, seed=seed) for seed in seeds[first : first + SAMPLED_AT_ONCE]]
            for number, generation in enumerate(llm.generate([""] * len(params), params), start=first + 1):
                bar.update(number)
                yield generation.text


def show(report: Report, config: QuickstartConfig, run: Path, backend: Backend, console: Console) -> None:
    excess = report.nats_per_story - report.floor_per_story
    console.print()
    console.print(f"[bold]The model[/]: {report.parameters:,} parameters, {run / LAST}")
    console.print(
        f"  loss on {report.validation_stories} new stories: {report.nats_per_story:.2f} nats a story, "
        f"{report.times_floor:.3f} times the floor ({excess:.2f} nats above it)"
    )
    console.print(f"  words that a fact 20 or more words back decides: {report.determined_words:.1%} right")
    console.print(
        f"  {report.sampled_stories} stories sampled at temperature 1: {report.grammatical:.1%} grammatical, "
        f"{report.consistent:.1%} with all facts consistent"
    )
    console.print("\n[bold]Three stories it wrote[/]")
    shown = range(10**6, 10**6 + STORIES_SHOWN)
    for number, text in enumerate(sample_stories(LLM.load(run / LAST, backend=backend), shown, console)):
        verdict = "consistent" if meadow.parse(text.strip()) else "not consistent"
        console.print(Padding(f"{text}\n[dim]({verdict}; seed {10**6 + number})[/]", (0, 2, 1, 2)))
    console.print(f"[bold]The loss[/] as a picture: {run / 'loss.png'}; every figure: {run / 'metrics.jsonl'}")
    console.print("[bold]What next[/]")
    for command in (
        f'llamita generate {run} "One rainy morning,"',
        f"llamita data show {config.output / 'data'}",
        f"llamita info {run}",
        f"llamita report {run}",
        "llamita train --help",
    ):
        console.print(f"  {command}")


def _steps_done(run: Path) -> int:
    """Updates in the newest checkpoint of a run; 0 where there is none yet."""
    state = run / LAST / "train_state.json"
    return int(json.loads(state.read_text())["step"]) if state.is_file() else 0
