"""The options that every kind of training shares. Knows nothing of models or data."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from llamita.backend.interface import BackendName
from llamita.training.loggers import LoggerName
from llamita.training.schedule import Schedule, ScheduleName


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The options of a run. ValueError, naming the field, for values that cannot be."""

    output: Path
    """Directory of the run: checkpoints, metrics.jsonl, loss.png."""
    resume: bool = False
    """Go on with the run in --output; its options stand where one is left out or given as its
    default, those given otherwise must agree."""
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
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate; not on norms and biases."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW's term against division by zero."""
    bias_correction: Literal["textbook", "efficient"] = "textbook"
    """AdamW's form: m-hat and v-hat, or alpha_t and epsilon-hat (end of section 2 of Kingma & Ba)."""
    max_grad_norm: float = 1.0
    """Scale gradients down to this global norm; 0: never."""
    evaluate_every: int = 100
    """Updates between two evaluations on validation rows; 0: only at the end."""
    evaluation_rows: int = 512
    """Validation rows to evaluate on, evenly spaced over the split; 0: all."""
    checkpoint_every: int = 0
    """Updates between two checkpoints; 0: as evaluate_every. There is one at the end and at each best loss anyway."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the best."""
    seed: int = 0
    """Decides initialisation, the order of rows and dropout."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of the products; weights stay float32. auto: bf16 on a GPU, and on a CPU that multiplies it (PyTorch alone),
    else fp32."""
    backend: BackendName = "auto"
    """The framework that computes; auto: MLX on Apple silicon where it is installed, else PyTorch."""
    device: str = "auto"
    """cpu or cuda with PyTorch, cpu or gpu with MLX; auto: a GPU where there is one."""
    threads: int = 0
    """CPU threads, with PyTorch alone; 0: as many as it takes."""
    compile: bool = False
    """Compile the model with torch.compile: a slow first update, then faster ones. MLX does by itself on a GPU."""
    log: tuple[LoggerName, ...] = ()
    """Log to tensorboard and/or wandb too (WANDB_MODE=offline works)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("micro_batch_size", "evaluate_every", "evaluation_rows", "checkpoint_every", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size={self.micro_batch_size} must not be above batch_size={self.batch_size}")
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
            micro_batch_size=self.micro_batch_size or self.batch_size,
            checkpoint_every=self.checkpoint_every or self.evaluate_every,
        )

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
        resolved = self.resolved()
        values = {
            field.name: getattr(resolved, field.name)
            for field in fields(TrainingConfig)
            if field.name not in INCIDENTAL_OPTIONS
        }
        if self.schedule == "constant":  # nothing follows from its end, so it may be moved
            del values["steps"]
        return values

    def arguments(self) -> dict[str, Any]:
        """Every option, JSON-able, as a resumed run takes it over."""
        resolved = self.resolved()
        values = {field.name: getattr(resolved, field.name) for field in fields(self)}
        del values["output"], values["resume"]
        # A path that is none is the name of a model on the hub.
        paths = {name: value for name, value in values.items() if isinstance(value, Path)}
        return values | {name: str(path.resolve() if path.exists() else path) for name, path in paths.items()}


INCIDENTAL_OPTIONS = frozenset(
    {"output", "resume", "checkpoint_every", "keep_checkpoints", "backend", "device", "threads", "compile", "log"}
)
"""Options that a resumed run may change; backend, device, threads and compile are conditions: a change is announced."""


Config = TypeVar("Config", bound=TrainingConfig)


def take_over(given: Config, saved: Mapping[str, Any]) -> Config:
    """`given`, with every option that was left at its default replaced by that of the run (`arguments()`)."""
    hints = get_type_hints(type(given))
    changes: dict[str, Any] = {}
    for field in fields(given):
        if field.name not in saved or getattr(given, field.name) != field.default:
            continue
        value = saved[field.name]
        if value is not None and Path in (hints[field.name], *get_args(hints[field.name])):
            value = Path(value)
        changes[field.name] = tuple(value) if isinstance(value, list) else value
    return replace(given, **changes)
