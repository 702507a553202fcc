"""The options that every kind of training shares, in groups, and the options of a verb as a flat list of names.

The options of a verb are a dataclass of such groups beside its own fields (`TrainingVerb`); each field of a group is a
flag of that name. Knows nothing of models or data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

from llamita.backend.adamw import AdamWSettings
from llamita.backend.group import ParallelName, ParallelSettings
from llamita.backend.interface import AttentionName, BackendName, Precision, Recompute
from llamita.backend.muon import MuonSettings, OptimizerName
from llamita.training.loggers import LoggerName
from llamita.training.schedule import Schedule, ScheduleName
from llamita.training.spikes import SpikePolicy


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: where it lies, and whether it is a new one."""

    output: Path
    """Directory of the run: checkpoints, metrics.jsonl, loss.png."""
    resume: bool = False
    """Go on with the run in --output; its options stand where one is left out, and those given must agree."""


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """The framework and the device that compute. A resumed run may change them: that is announced."""

    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: str = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""
    threads: int = 0
    """CPU threads, with PyTorch alone; 0: as many as it takes."""
    compile: bool = False
    """Compile the model with torch.compile: a slow first update, then faster ones. MLX does by itself on a GPU."""
    recompute: Recompute = "none"
    """Blocks, evenly chosen, whose activations are computed a second time instead of kept: less memory, the same
    numbers, up to a third more time. A number, all or none."""

    attention: AttentionName = "masked"
    """How documents of packed rows, and windows, are kept apart. masked: by a matrix of all pairs of positions; flex:
    by FlexAttention, which skips blocks of them (PyTorch on a GPU, without dropout). The numbers differ by rounding."""
    parallel: ParallelName = "ddp"
    """With several processes (torchrun): ddp, each holds the whole model; fsdp, each holds a part of everything."""
    tensor_parallel: int = 1
    """Processes that divide each matrix product between them; teams of so many share the rows of a batch."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads={self.threads} must not be negative")
        if isinstance(self.recompute, int) and self.recompute < 0:
            raise ValueError(f"recompute={self.recompute} must be a number of blocks, all or none")
        self.parallel_settings()

    def parallel_settings(self) -> ParallelSettings:
        return ParallelSettings(self.parallel, self.tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The updates of a run: how many, of what size, at what rate; and what is kept of them."""

    steps: int = 1000
    """Updates in the whole run."""
    batch_size: int = 16
    """Rows in an update."""
    micro_batch_size: int = 0
    """Rows computed at a time, to save memory; the loss does not depend on it. 0: all of batch_size."""
    learning_rate: float = 1e-3
    """The highest learning rate, reached after the warm-up."""
    schedule: ScheduleName = "cosine"
    """After the warm-up: a cosine to the minimum, a constant, or a constant with a linear decay at the end."""
    warmup_steps: int | None = None
    """Updates over which the learning rate rises. Left out: a tenth of the steps, at most 200."""
    decay_steps: int | None = None
    """Updates of the final decay of warmup-stable-decay. Left out: a fifth of the steps."""
    minimum_learning_rate: float | None = None
    """The rate at which the schedule ends. Left out: a tenth of the learning rate."""
    optimizer: OptimizerName = "adamw"
    """adamw; or muon: that for the matrices of the blocks, and AdamW for all else. Both take the same learning rate."""
    adamw: AdamWSettings = field(default_factory=AdamWSettings)
    muon: MuonSettings = field(default_factory=MuonSettings)
    max_grad_norm: float = 1.0
    """Scale gradients down to this global norm; 0: never."""
    evaluate_every: int = 100
    """Updates between two evaluations on what is held out; 0: only at the end."""
    evaluation_rows: int = 512
    """Held-out rows, texts or prompts to evaluate on, evenly spaced; 0: all."""
    checkpoint_every: int = 0
    """Updates between two checkpoints; 0: as evaluate_every. There is one at the end and at each best loss anyway."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the best."""
    keep_every: int = 0
    """Write a checkpoint every so many updates and keep it for good; 0: none."""
    on_spike: SpikePolicy = "report"
    """What to do when the loss jumps far above those before it; an autopsy is written into the run in any case.
    report: go on. skip: do not make the update, and go on with the next batch. rewind: go back to the newest
    checkpoint, and pass over the batch when its turn comes. stop: do not make the update, save and end. A loss or
    gradient that is not finite stops the run unless this is skip or rewind."""
    spike_deviations: float = 7.0
    """A spike is a loss above the median of the last 100 by so many robust standard deviations; 0: look for none."""
    spike_limit: int = 10
    """Stop after so many batches that were passed over or gone back from."""
    seed: int = 0
    """Decides initialisation, the order of rows and dropout."""
    precision: Precision = "auto"
    """Type of the products; weights stay float32. auto: bf16 on a GPU, and on a CPU that multiplies it (PyTorch alone),
    else fp32. fp8: with the blocks' matrices in 8-bit numbers, else bf16 (PyTorch; a GPU from Ada and Hopper on)."""
    log: tuple[LoggerName, ...] = ()
    """Log to tensorboard and/or wandb too (WANDB_MODE=offline works)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        counts = ("micro_batch_size", "evaluate_every", "evaluation_rows", "checkpoint_every", "keep_every", "seed")
        for name in (*counts, "spike_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must not be above batch_size={self.batch_size}")
        if not self.spike_deviations >= 0:
            raise ValueError(f"spike_deviations={self.spike_deviations} must not be negative; 0 looks for no spikes")
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must not be negative; 0 switches clipping off")
        self.learning_rates()

    def resolved(self) -> "TrainingConfig":
        """The same with every value filled in that was left to follow from others."""
        warmup = min(200, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        decay = self.decay_steps
        if decay is None:
            decay = min(self.steps // 5, self.steps - warmup) if self.schedule == "warmup-stable-decay" else 0
        minimum = self.learning_rate / 10 if self.minimum_learning_rate is None else self.minimum_learning_rate
        return replace(
            self,
            warmup_steps=warmup,
            decay_steps=decay,
            minimum_learning_rate=minimum,
            micro_batch_size=self.rows_at_once,
            checkpoint_every=self.checkpoint_every or self.evaluate_every,
        )

    @property
    def rows_at_once(self) -> int:
        """Rows that are computed at a time."""
        return self.micro_batch_size or self.batch_size

    def learning_rates(self) -> Schedule:
        """The learning rate of each update."""
        if any(value is None for value in (self.warmup_steps, self.decay_steps, self.minimum_learning_rate)):
            return self.resolved().learning_rates()
        assert self.warmup_steps is not None and self.decay_steps is not None  # noqa: PT018
        assert self.minimum_learning_rate is not None
        return Schedule(
            self.schedule,
            self.learning_rate,
            self.minimum_learning_rate,
            self.steps,
            self.warmup_steps,
            self.decay_steps,
        )

    def identity(self) -> dict[str, Any]:
        """The options that decide the run's weights and its record; a resumed run must have the same."""
        values = flat_options(self.resolved())
        values = {name: value for name, value in values.items() if name not in INCIDENTAL_OPTIONS}
        if self.schedule == "constant":  # nothing follows from its end, so it may be moved
            del values["steps"]
        return values


INCIDENTAL_OPTIONS = (
    *("checkpoint_every", "keep_checkpoints", "keep_every", "log"),
    *("on_spike", "spike_deviations", "spike_limit"),
)
"""Options of training that a resumed run may change. What is done about spikes is among them, so that a run that
stopped at one can go on; the batches that were passed over stand in its checkpoints and its record."""


class TrainingVerb(Protocol):
    """The options of a verb that trains."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def machine(self) -> MachineConfig: ...


# --- options by the names of their flags -----------------------------------------------------------------------------

Config = TypeVar("Config")


def flat_options(config: Any) -> dict[str, Any]:
    """Returns every option of a dataclass by the name of its flag, those of the groups in it included."""
    return {option.name: value for option, value in _walk(config)}


def with_options(config: Config, **changes: Any) -> Config:
    """Returns `config` with other values for some options, by the names of their flags, whichever group holds them.

    Texts become paths and lists tuples where the option is one. ValueError for a name that is no option.
    """
    unknown = changes.keys() - flat_options(config).keys()
    if unknown:
        raise ValueError(f"{type(config).__name__} has no option {', '.join(sorted(unknown))}")
    return _changed(config, changes)


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for option in fields(config):
        value = getattr(config, option.name)
        if is_dataclass(value):
            values[option.name] = _changed(value, changes)
        elif option.name in changes:
            value, hint = changes[option.name], hints[option.name]
            if get_origin(hint) is tuple and not isinstance(value, list | tuple):  # one, where several may be given
                value = [] if value is None else [value]
            if Path in (hint, *get_args(hint)):
                value = [Path(text) for text in value] if isinstance(value, list | tuple) else value and Path(value)
            values[option.name] = tuple(value) if isinstance(value, list) else value
    return replace(config, **values)


def saved_options(config: TrainingVerb) -> dict[str, Any]:
    """Returns every option but those of `RunConfig`, JSON-able, as a resumed run takes them over from any directory.

    Paths are absolute. An option whose texts name files has a function for them as its field's metadata["saved"].
    """
    values = _saved(config) | _saved(config.training.resolved())
    return {name: value for name, value in values.items() if name not in _saved(config.run)}


def _saved(config: Any) -> dict[str, Any]:
    return {option.name: option.metadata.get("saved", _absolute)(value) for option, value in _walk(config)}


def _walk(config: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Yields every option with its value, those of the groups included."""
    for option in fields(config):
        value = getattr(config, option.name)
        if is_dataclass(value):
            yield from _walk(value)
        else:
            yield option, value


def _absolute(value: Any) -> Any:
    """Returns a path as a text, absolute where it exists: one that does not is the name of a model on the hub."""
    if isinstance(value, tuple):
        return tuple(_absolute(item) for item in value)
    if not isinstance(value, Path):
        return value
    return str(value.resolve() if value.exists() else value)
