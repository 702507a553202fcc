"""What the tests of training share: a model of a few thousand parameters, documents for it, prepared data."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llamita.backend.torch.backend import BACKEND as TORCH
from llamita.backend.torch.train.step import build_train_step
from llamita.data import meadow
from llamita.data.batches import BatchIterator, evaluation_batches
from llamita.data.packing import InMemoryDocuments, Rows, RowsConfig
from llamita.data.prepare import PrepareConfig, prepare
from llamita.model.config import ModelConfig
from llamita.text.bpe import train_bpe_from_iterator
from llamita.training import metrics
from llamita.training.config import MachineConfig, RunConfig, TrainingConfig, saved_options, with_options
from llamita.training.examples import Examples, TokenText
from llamita.training.run_directory import open_run
from llamita.training.trainer import Trainer

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    tie_word_embeddings=True,
    dropout=0.1,
)


class Silence:
    """A display that keeps what it is told."""

    def __init__(self):
        self.records, self.evaluations, self.messages = [], [], []

    def update(self, record):
        self.records.append(record)

    def evaluation(self, record):
        self.evaluations.append(record)

    def message(self, text):
        self.messages.append(text)

    def close(self):
        pass


def documents(seed=0, count=60):
    """Documents of unequal length in which a token mostly follows its neighbour."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    result = []
    for _ in range(count):
        steps = generator.choice([1, 1, 1, 2, 5], size=int(generator.integers(3, 30)))
        result.append((generator.integers(0, 40) + np.cumsum(steps)) % 40)
    return InMemoryDocuments(result)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a verb that has none of its own."""

    run: RunConfig
    training: TrainingConfig = TrainingConfig(
        steps=30,
        batch_size=6,
        micro_batch_size=4,
        learning_rate=1e-2,
        evaluate_every=10,
        checkpoint_every=4,
        precision="fp32",
    )
    machine: MachineConfig = MachineConfig(device="cpu")


def config(output, **changes):
    return with_options(Options(run=RunConfig(output=Path(output))), **changes)


def examples(config, mode="pad"):
    rows = RowsConfig(mode, MODEL.max_position_embeddings)
    sizes = np.arange(40, dtype=np.int64)
    return Examples(
        BatchIterator(Rows(documents(), rows), config.training.batch_size, config.training.seed),
        partial(evaluation_batches, Rows(documents(1, 20), rows), 5, config.training.evaluation_rows),
        TokenText(sizes, sizes * 2),
    )


class Altered:
    """A backend whose training steps are changed as they are made, by what `change` does to one."""

    def __init__(self, change=None, backend=TORCH):
        self.change, self.backend = change, backend

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def build_train_step(self, *arguments, **options):
        step = self.backend.build_train_step(*arguments, **options)
        step.peak_flops = lambda: 1e11  # measuring it takes longer than these runs
        if self.change is not None:
            self.change(step)
        return step


QUICK = Altered()


def make_step(config, model=MODEL):
    training = config.training
    step = build_train_step(
        model,
        seed=training.seed,
        muon=training.muon if training.optimizer == "muon" else None,
        precision=training.precision,
        device="cpu",
        max_grad_norm=training.max_grad_norm,
    )
    step.peak_flops = lambda: 1e11  # measuring it takes longer than these runs
    return step


def train(config, *, step=None, identity=None, display=None, **options):
    """Run a trainer as `config` says; returns (result, step, display)."""
    step, display = step or make_step(config), display or Silence()
    identity = identity or {"training": config.training.identity()}
    with open_run(config.run.output, identity, saved_options(config), config.run.resume) as run:
        trainer = Trainer(config.training, MODEL, step, examples(config), run, display=display, **options)
        return trainer.run(), step, display


def cut_short(whole, cut, lost_steps):
    """Copies a run as if it had been killed before it wrote its checkpoints of the lost steps."""
    shutil.copytree(whole, cut, symlinks=True)
    for step in lost_steps:
        shutil.rmtree(cut / f"checkpoints/step-{step:08d}")


def weights_of(checkpoint_directory):
    """The bytes of everything that decides how a run goes on."""
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: (Path(checkpoint_directory) / name).read_bytes() for name in names}


def timeless(run_directory):
    """metrics.jsonl without what depends on the clock."""
    records = metrics.read_records(Path(run_directory) / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in metrics.TIMES} for record in records]


def prepare_stories(directory, count=120, vocab_size=300):
    """A tokenizer and a data directory of Meadow stories; returns the latter."""
    tokenizer = train_bpe_from_iterator(meadow.corpus(0, count, "train"), vocab_size)
    tokenizer.save(directory / "tokenizer")
    data = directory / "data"
    prepare(
        PrepareConfig(
            output=data, tokenizer=directory / "tokenizer", source="meadow", documents=count, workers=1, seed=0
        )
    )
    return data


def state_of(checkpoint_directory):
    return json.loads((Path(checkpoint_directory) / "train_state.json").read_text())
