"""The contract of a backend: all that the rest of the library asks of PyTorch or MLX.

    Backend     opens and makes the three objects below; `choice.load_backend` gives one by its name
    TrainStep   a model with its optimiser: one update, the loss of a batch, weights and state in and out
    Scorer      a frozen model that gives log-probabilities: DPO's and GRPO's reference, a teacher
    Runner      a model that generates: `run(plan)` does one step of an engine, `forward` gives logits

The engine (inference/) decides a `Plan` without tensors, a runner does it and answers with a `StepResult`. Nothing here
knows a tensor, a tokenizer, or why a token was scheduled: arrays that cross this line are `HostArray`s or numpy's.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from llamita.backend.adamw import AdamWSettings
from llamita.backend.group import Group, ParallelSettings
from llamita.backend.muon import MuonSettings
from llamita.backend.objectives import NextToken, Objective
from llamita.backend.sampling_params import SamplingParams
from llamita.data.batches import Batch
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter, LoraSettings
from llamita.model.parameters import InitializationName

BackendName = Literal["auto", "torch", "mlx"]
"""The backends there are; which one "auto" stands for, `choice.choose` says."""
Precision = Literal["auto", "bf16", "fp32", "fp8"]
AttentionName = Literal["masked", "flex"]
Recompute = int | Literal["all", "none"]
"""How many of a model's blocks run a second time for the backward pass, instead of keeping their activations."""
WantedLogits = Literal["all", "last", "none"]
"""The positions whose logits a forward pass gives: a large vocabulary makes those of a long text a large array."""
LONGEST_CHUNK = 512
"""Most tokens of a sequence in a step: bounds the memory of a step, and how long it keeps others waiting."""


# --- one step of an engine -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleSpec:
    """Asks for one token. `position` is its own absolute position: it is drawn from the logits of the one before."""

    params: SamplingParams
    seed: int
    position: int
    history: Sequence[int] = ()  # prompt and output so far; read only where `params.reads_history`
    prompt_length: int = 0  # how many of them are the prompt's
    banned: tuple[int, ...] = ()  # ids that may not come now
    allowed: np.ndarray | None = None  # bit i % 32 of int32 word i // 32: whether id i may come; None: all may


class Target(NamedTuple):
    """Asks for the log-probability of a token after the one at `offset` of a chunk."""

    offset: int
    token_id: int


@dataclass(frozen=True)
class ScheduledChunk:
    """Consecutive tokens of one sequence, to be run on top of the `start` tokens of it that the cache already holds.

    Position p of the sequence lies in block `tables[g][p // block_size]` of group g (see `CacheLayout`). Blocks of a
    sliding window that no query of the chunk sees any more may be missing (-1).
    """

    sequence_id: int
    tokens: tuple[int, ...]
    start: int  # absolute position of tokens[0]
    tables: tuple[np.ndarray, ...] = ()  # int32, a group each
    samples: tuple[SampleSpec, ...] = ()  # tokens to draw, at positions start + 1 .. end; none: fill the cache only
    targets: tuple[Target, ...] = ()  # by their offset; several at one, or none
    adapter: str | None = None  # the adapter that it goes through, by the runner's name for it
    target_top: int = 0  # how many of the likeliest tokens are reported beside each target

    def __post_init__(self) -> None:
        assert self.tokens, "a chunk holds at least one token"
        assert self.start >= 0
        if self.targets:
            assert all(0 <= target.offset < len(self.tokens) for target in self.targets)
            assert all(one.offset <= other.offset for one, other in pairwise(self.targets))
        assert all(self.start < sample.position <= self.end for sample in self.samples)

    @property
    def end(self) -> int:
        """One past the absolute position of the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class CacheLayout:
    """The shape of a runner's key/value memory: positions in a block, and blocks for each group of layers.

    A group is the layers of one attention window, `windows` being the config's `attention_windows`: a sequence has a
    table of blocks for each, since a sliding window gives blocks back that a full one keeps.
    """

    block_size: int
    blocks: int
    windows: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class BlockCopy:
    """Asks that a block's contents be copied before the step, since two sequences that shared it part there."""

    group: int
    source: int
    target: int


@dataclass(frozen=True)
class Plan:
    """The work of one step: first the copies, then the chunks, all at once."""

    chunks: tuple[ScheduledChunk, ...]
    copies: tuple[BlockCopy, ...] = ()


Likeliest = tuple[tuple[int, float], ...]
"""The most probable tokens with their natural log-probabilities, the likeliest first."""


@dataclass(frozen=True)
class SampledToken:
    """A token and its natural log-probability under the model itself, before temperature, penalty and truncation.

    `top` are the most probable tokens with theirs, as many as were asked for, the likeliest first. Where no token could
    be picked, `error` says why in a line, and the rest means nothing.
    """

    token_id: int
    logprob: float
    top: Likeliest = ()
    error: str = ""


@dataclass(frozen=True)
class StepResult:
    """One entry a chunk of the plan, in its order: its sampled tokens, and what was found of its targets."""

    sampled: tuple[tuple[SampledToken, ...], ...]
    target_logprobs: tuple[tuple[float, ...], ...] = ()  # empty where no chunk had targets
    target_tops: tuple[tuple[Likeliest, ...], ...] = ()  # the likeliest beside each; empty where none are wanted


# --- what a backend makes --------------------------------------------------------------------------------------------


class Forward(Protocol):
    """A model that gives the logits of whole texts. Evaluation and verification ask for no more."""

    def forward(
        self, tokens_BT: Sequence[Sequence[int]] | np.ndarray, capture: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Returns `logits`, float32 (B, T, V), or (B, T, labels) of a classifier, and each place named in `capture`.

        Places are `embedding`, `layers.0`, `layers.1`, ..., `norm`: the residual stream there, float32 (B, T, D).
        Nothing is cached. ValueError for an unknown place, for ragged rows, and for ids outside the vocabulary.
        """


class Runner(Forward, Protocol):
    """A model that generates: it runs the plans of engines, which share it, and its weights never change by that."""

    config: ModelConfig
    weight_bytes: int
    """Bytes of weights that decoding one token reads."""
    kv_bytes_per_token: int
    """Bytes of keys and values that one earlier position adds to that."""
    dtype_reason: str
    """Why weights and cache have the type that they have; empty where nobody chose it."""
    kernels: str
    """What multiplies, and why it does, in a few words."""

    @property
    def dtype_name(self) -> str:
        """The type of weights and cache: float32, bfloat16 or float16."""

    @property
    def cache_budget(self) -> int:
        """Bytes that keys and values may take where nothing else is said."""

    def forward(
        self,
        tokens_BT: Sequence[Sequence[int]] | np.ndarray,
        capture: Sequence[str] = (),
        adapter: str | None = None,
        logits: WantedLogits = "all",
    ) -> dict[str, np.ndarray]:
        """Does as `Forward.forward`, through the `adapter` of this name, and shows attention too.

        Places are also `layers.0.attention`, ...: the probabilities with which each head of the layer looks at each
        position, float32 (B, N, T, T). A row sums to one, and is zero after its own position and outside a window. What
        is captured changes no number. `logits` "last" are those of the last position alone, (B, 1, V); with "none" the
        result has no such entry. ValueError also for an adapter that is not loaded.
        """

    def logit_lens(self, stream_BTD: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Returns the logits that the model would give if these states of its residual stream were its last layer's.

        `stream_BTD` are states that `forward` captured; they go through the final norm and the output head. The result
        is float32 (B, T, V), and for the states of the last layer the model's own logits, bit for bit. Method:
        nostalgebraist 2020, "interpreting GPT: the logit lens".
        """

    def weights(self) -> Mapping[str, HostArray]:
        """Returns the values under canonical names, those of an adapter that was opened as a model merged in.

        ValueError over quantised weights, which take no sums.
        """

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> Any:
        """Returns the memory of one engine, to be given with each of its plans: keys, values and counts of tokens.

        At most `sequences` decode at once; 0: not known.
        """

    def run(self, plan: Plan, memory: Any) -> StepResult:
        """Copies blocks, runs every chunk, and returns the sampled tokens and the targets' log-probabilities."""


@runtime_checkable
class TextLabeller(Protocol):
    """A runner over a classifier that reads whole texts, rather than giving the logits of each position."""

    def label_log_probs(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the natural log-probability of each label of each text, float32 (B, labels)."""


class Scorer(Protocol):
    """A model that judges texts: a reference, a teacher. One from `Backend.build_scorer` is frozen."""

    def log_probs(self, batch: Batch) -> np.ndarray:
        """Returns the natural log-probability of every label that is scored, float32 (B, T); 0 elsewhere.

        Without dropout.
        """

    def distributions(self, batch: Batch, temperature: float = 1.0) -> np.ndarray:
        """Returns the natural log-probability of every token at each position whose label is scored, float32 (M, V).

        The M positions go row by row. Logits are divided by `temperature` first. Without dropout.
        """


class LossSums(NamedTuple):
    """A loss summed over the targets of a batch, in nats, their number, and sums of the other metrics."""

    nats: float
    targets: int
    measures: Mapping[str, float]


@dataclass(frozen=True)
class StepMetrics:
    """The result of an update: `loss` in nats per target before it, `grad_norm` of the mean gradient before clipping.

    Where either is not finite, or the loss is above `loss_limit`, the update was not made: the weights are as before.
    `faulty_micro_batches` numbers those whose own loss was not finite (none, where only the gradient was not).
    """

    loss: float
    grad_norm: float
    targets: int
    faulty_micro_batches: tuple[int, ...] = ()
    measures: Mapping[str, float] = field(default_factory=dict)
    """Means over the targets of the other metrics of the objective."""
    loss_limit: float = math.inf
    """The highest loss with which the update was to be made."""

    @property
    def is_finite(self) -> bool:
        """Returns whether loss and gradient are finite."""
        return not self.faulty_micro_batches and math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_update(self) -> bool:
        """Returns whether the update was made."""
        return self.is_finite and self.loss <= self.loss_limit


@dataclass(frozen=True)
class RowDiagnosis:
    """A row computed alone, without dropout: `loss` in nats per target, None where it has no target.

    `grad_norm` is that of the gradient of the row's mean loss. Either may be infinite or NaN.
    """

    row_id: int
    targets: int
    loss: float | None
    grad_norm: float | None


@dataclass(frozen=True)
class Diagnosis:
    """A look at the update that some micro-batches would make, with the random numbers of that update.

    `loss` and `grad_norm` are those of `StepMetrics`; `grad_norms` divides the latter by canonical parameter (the root
    of the sum of its squares is `grad_norm`); `activations` are root mean squares of the residual stream, over all
    positions and channels, at each place of `Forward.forward`.
    """

    loss: float
    grad_norm: float
    grad_norms: Mapping[str, float]
    activations: Mapping[str, float]
    rows: tuple[RowDiagnosis, ...]


class Saving(Protocol):
    """A checkpoint on its way to the disk."""

    def result(self, timeout: float | None = None) -> Any:
        """Waits until all processes have written their parts; raises what went wrong."""


class TrainStep(Scorer, Protocol):
    """A model under training, with its optimiser; with several processes, this one's part of both.

    All processes of the group call the same methods in the same order.
    """

    group: Group
    is_divided: bool
    """Whether each process holds a part of the weights, and so writes a part of a checkpoint."""

    def step(self, micro_batches: Sequence[Batch], learning_rate: float, loss_limit: float = math.inf) -> StepMetrics:
        """Makes one update from the mean loss over all targets of `micro_batches`, however these divide them.

        With several processes they are this one's share of the rows, and the metrics are of all. A loss above
        `loss_limit` makes none, and the same call without a limit then makes the one that it would have made.
        ValueError where there is no target.
        """

    def diagnose(self, micro_batches: Sequence[Batch]) -> Diagnosis:
        """Returns a look at the update that `step` would make now, and at each row alone; changes nothing.

        It takes about as long as an update, and a backward pass for each row. Several processes are all given all rows.
        """

    def evaluate(self, batch: Batch) -> LossSums:
        """Returns the loss and the metrics summed over the batch's targets; without dropout.

        Several processes are all given the whole batch, and divide it between them.
        """

    def runner(self) -> Runner:
        """Returns a runner over the weights as they are now."""

    def weights(self) -> dict[str, HostArray]:
        """Returns the float32 weights under canonical names; with an adapter, only what is trained."""

    def state(self) -> dict[str, HostArray]:
        """Returns what the next update depends on besides the weights: moments, and the number of updates made."""

    def load_state(self, arrays: Mapping[str, HostArray], state: Mapping[str, HostArray]) -> None:
        """Goes on from what `weights()` and `state()` gave; ValueError lists what is missing or misshapen."""

    def save_shards(self, directory: Path) -> Saving:
        """Begins to write this process's part of weights and state, as they are now, into a directory that all see."""

    def load_shards(self, directory: Path) -> None:
        """Goes on from what any number of processes wrote with `save_shards`."""

    def read_shards(self, directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
        """Returns `weights()` and `state()` as `save_shards` wrote them; the other processes are not asked."""

    def conditions(self) -> dict[str, Any]:
        """Returns what the last bits of a result depend on besides configuration and data: versions, device, ..."""

    def memory_bytes(self) -> int:
        """Returns the most memory held so far, in bytes: of the device, or of this process where that is the CPU."""

    def peak_flops(self) -> float:
        """Returns the floating-point operations a second of a large matrix product here, measured."""


class Backend(Protocol):
    """A framework. What it lacks (a device, the exact mode) it refuses with ValueError in one line."""

    @property
    def name(self) -> Literal["torch", "mlx"]: ...

    @property
    def device(self) -> str:
        """The device that it computes on by default: "cpu", "cuda" (PyTorch) or "gpu" (MLX)."""

    def build_train_step(
        self,
        config: ModelConfig,
        arrays: Mapping[str, HostArray] | None = None,
        *,
        seed: int = 0,
        initialization: InitializationName = "fan-in",
        objective: Objective = NextToken(),  # noqa: B008 - it is frozen
        trainable: Callable[[str], bool] | None = None,
        adapter: LoraSettings | None = None,
        optimizer: AdamWSettings | None = None,
        muon: MuonSettings | None = None,
        max_grad_norm: float = 0.0,
        precision: Precision = "auto",
        device: str = "auto",
        threads: int = 0,
        compile: bool | None = None,
        recompute: Recompute = "none",
        attention: AttentionName = "masked",
        parallel: ParallelSettings | None = None,
    ) -> TrainStep:
        """Returns a model of the values in `arrays`, or a freshly initialised one, with its optimiser.

        Trained are the parameters whose canonical name is `trainable`, or with an `adapter` that one and a classifier's
        head; left out: all. `optimizer` holds AdamW's settings; with `muon`, Muon updates the matrices of the blocks
        and AdamW the rest. `max_grad_norm` 0 clips nothing, `threads` 0 leaves the framework's choice, and so does
        `compile` None. `recompute` changes no number; `attention` is how documents of a packed row, and windows, are
        kept apart. With `parallel`, this process is one of several that were started together, and joins them.
        ValueError for `muon` where none of those matrices is trained, and for what the backend or the device lacks.
        """

    def build_scorer(
        self,
        config: ModelConfig,
        arrays: Mapping[str, HostArray],
        *,
        precision: Precision = "auto",
        device: str = "auto",
        threads: int = 0,
    ) -> Scorer:
        """Returns a frozen model of the values in `arrays`: no optimiser, no gradients."""

    def load_runner(
        self,
        model: Path | str,
        dtype: str = "auto",
        device: str = "auto",
        threads: int = 0,
        exact: bool = False,
        adapters: Mapping[str, Path] | None = None,
    ) -> Runner:
        """Opens a model directory, the best checkpoint of a run, a name on the hub, or an adapter over its base.

        `adapters` are further ones over the same base, by name, each for the chunks that name it. `dtype` is that of
        weights and cache, "auto" that of the file. `exact`: logits that are the same bits alone and in any batch.
        """

    def runner_over(self, config: ModelConfig, arrays: Mapping[str, HostArray], dtype: str = "float32") -> Runner:
        """Returns a runner over host arrays, on the CPU."""

    def quantize_arrays(
        self, config: ModelConfig, arrays: Iterable[tuple[str, HostArray]]
    ) -> Iterable[tuple[str, HostArray]]:
        """Yields the arrays of an unquantised model as one of `config`, which is quantised, stores them; one by one."""

    def read_shards(self, directory: Path) -> tuple[dict[str, HostArray], dict[str, HostArray]]:
        """Returns the weights and the optimiser's state of a checkpoint that several processes wrote in parts."""

    def merged_arrays(self, arrays: Mapping[str, HostArray], adapter: Adapter) -> Iterable[tuple[str, HostArray]]:
        """Yields a base's arrays with an adapter merged in, one by one in the table's order, none quantised."""


def token_array(tokens_BT: Sequence[Sequence[int]] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns token ids [B, T], int64, all below `vocab_size`; ValueError for none, ragged rows and other ids.

    An id outside the embedding would read other memory on some devices.
    """
    try:
        array = np.asarray(tokens_BT, dtype=np.int64)
    except (OverflowError, TypeError, ValueError):
        array = np.empty(0, np.int64)
    if array.ndim != 2 or not array.size:
        raise ValueError("tokens must be rows of one length, at least 1, of whole numbers")
    outside = array[(array < 0) | (array >= vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is not one of this model's, 0 to {vocab_size - 1}")
    return array
