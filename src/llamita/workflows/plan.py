"""The plan of a training before it is begun: memory by parts, the rows that fit at a time, time, disk, and advice.

Counts only; nothing is trained. The speed of this machine's processor, where it is asked for, is passed in.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llamita.backend.group import ParallelName, check_tensor_parallel
from llamita.backend.interface import Recompute
from llamita.backend.train_step import recomputed_layers
from llamita.model.config import ModelConfig
from llamita.model.devices import UTILIZATION, gpu
from llamita.model.parameters import parameter_table
from llamita.model.scaling import TOKENS_PER_PARAMETER
from llamita.model.sizes import count_parameters, flops_per_token
from llamita.model.training_memory import Parallelism, TrainingMemory, Update, moments_of, training_memory

GB = 1e9
SPARE = 0.05
"""The share of a device's memory that is left for its driver and for what does not fit into gaps."""
MOST_ROWS = 4096
"""No search for rows at a time goes further: a device is busy long before."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is to be trained, where, and how."""

    tokens: float = 0
    """Tokens to train on (2e9 may be written so); 0: 20 a parameter, or as the depth has it."""
    batch_size: int = 0
    """Rows in an update, over all devices; 0: as the depth has it, else 16."""
    micro_batch_size: int = 0
    """Rows computed at a time on one device; 0: as many as fit."""
    sequence_length: int = 0
    """Tokens in a row; 0: the model's positions, at most 2048."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the products; weights, gradients and moments are float32."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw keeps two numbers for each parameter, muon one for each of a block's matrices."""
    recompute: Recompute = "none"
    """Blocks whose activations are computed a second time: a number, all or none."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What computes: graphics cards, or this machine's processor."""
    gpu: str = ""
    """A card by name, for its memory and its speed: l4, l40s, a10, a100-40gb, a100-80gb, h100, h200, b200, rtx-3090,
    rtx-4090, mi300x."""
    gpus: int = 1
    """Cards that train together."""
    gpu_memory: float = 0
    """Memory of a card in GB (10^9 bytes); 0: that of the card named, else 80."""
    memory: float = 0
    """Memory for training on a processor, in GB; 0: all that this machine has free."""
    parallel: ParallelName = "ddp"
    """ddp: each card holds all weights; fsdp: weights, gradients and moments are split over the cards."""
    tensor_parallel: int = 1
    """Cards that share each matrix."""
    tokens_per_second: float = 0
    """A speed that you have measured, of all devices together; 0: from operations, peak and utilization."""
    utilization: float = UTILIZATION
    """The share of a device's peak that training reaches."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, beside the best."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_size", "sequence_length", "gpu_memory", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("tokens", "tokens_per_second"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number that is not negative")
        for name in ("gpus", "tensor_parallel", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must lie between 0 and 1; {UTILIZATION} is usual")
        if self.gpus % self.tensor_parallel:
            raise ValueError(f"gpus={self.gpus} must be a multiple of tensor_parallel={self.tensor_parallel}")
        if self.device == "cpu" and (self.gpu or self.gpus > 1 or self.tensor_parallel > 1):
            raise ValueError("--device cpu trains in one process; leave --gpu, --gpus and --tensor-parallel out")


@dataclass(frozen=True)
class Disk:
    """Bytes on disk of a whole training."""

    tokens: int
    """The prepared data, where every token is seen once."""
    checkpoint: int
    checkpoints: int


@dataclass(frozen=True)
class Plan:
    """What a training will need. Bytes are those of one device, times are of all together."""

    parameters: int
    tokens: int
    batch_size: int
    micro_batch_size: int
    """Rows at a time on one device; 0: not even one fits."""
    micro_batches: int
    sequence_length: int
    steps: int
    recomputed: int
    device_memory: int
    memory: TrainingMemory
    """Of the rows at a time; of one, where none fit."""
    fits: bool
    flops: float
    tokens_per_second: float
    """0: unknown."""
    speed_from: str
    seconds: float
    disk: Disk
    advice: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Returns all of it as JSON holds it."""
        facts = asdict(self)
        facts["memory"]["total"] = self.memory.total
        return facts


def make_plan(
    config: ModelConfig,
    options: PlanConfig,
    *,
    free_memory: Callable[[], int],
    peak_flops: Callable[[], float],
) -> Plan:
    """Returns the plan of training a model.

    `free_memory` gives this machine's free bytes and `peak_flops` the operations a second of a large product here;
    either is called only where the options leave it open. ValueError for options that do not go with the model.
    """
    length = options.sequence_length or min(config.max_position_embeddings, 2048)
    if length > config.max_position_embeddings:
        raise ValueError(f"sequence_length={length} is longer than the model's {config.max_position_embeddings}")
    check_tensor_parallel(config, options.tensor_parallel)
    counts = count_parameters(config)
    tokens = int(options.tokens) or TOKENS_PER_PARAMETER * counts.matrices
    parallel = Parallelism(options.gpus, options.parallel, options.tensor_parallel)
    batch = options.batch_size or 16
    if batch % parallel.replicas:
        raise ValueError(f"batch_size={batch} must be a multiple of the {parallel.replicas} replicas")
    steps = max(1, -(-tokens // (batch * length)))
    room = _device_memory(options, free_memory)
    recomputed = len(recomputed_layers(config.num_hidden_layers, options.recompute))
    update = Update(
        1, length, options.precision, recomputed, 1, options.optimizer, options.device, parallel,
    )  # fmt: skip
    share = batch // parallel.replicas
    if options.micro_batch_size > share:
        raise ValueError(f"micro_batch_size={options.micro_batch_size} is above the {share} rows of one device")
    rows = options.micro_batch_size or rows_that_fit(config, update, share, room)
    if rows and not options.micro_batch_size:
        rows = -(-share // -(-share // rows))  # as many parts, and all of one size
    chosen = _with_rows(update, max(rows, 1), share)
    memory = training_memory(config, chosen)
    fits = rows > 0 and memory.total <= room
    flops = flops_per_token(config, length) * (1 + _again(config, recomputed, length))
    speed, source = _speed(options, flops, peak_flops)
    return Plan(
        counts.total, tokens, batch, rows, chosen.micro_batches, length, steps, recomputed, room, memory, fits,
        float(tokens) * flops, speed, source, tokens / speed if speed else 0.0, _disk(config, options, tokens),
        tuple(_advice(config, options, chosen, share, room, fits, rows)),
    )  # fmt: skip


def rows_that_fit(config: ModelConfig, update: Update, most: int, room: int) -> int:
    """Returns the most rows, up to `most`, whose update needs no more than `room` bytes; 0: not even one."""
    low, high = 0, min(most, MOST_ROWS)
    while low < high:
        middle = (low + high + 1) // 2
        if training_memory(config, _with_rows(update, middle, most)).total <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _with_rows(update: Update, rows: int, share: int) -> Update:
    return replace(update, rows=rows, micro_batches=-(-share // rows))


def _device_memory(options: PlanConfig, free_memory: Callable[[], int]) -> int:
    if options.device == "cpu":
        return int(options.memory * GB) or free_memory()
    whole = options.gpu_memory * GB or (gpu(options.gpu).memory if options.gpu else 80 * GB)
    return int(whole * (1 - SPARE))


def _again(config: ModelConfig, recomputed: int, length: int) -> float:
    """Returns the operations of recomputed blocks' second forward pass, a third of their own, as a share of all."""
    head = 6 * config.vocab_size * config.hidden_size / flops_per_token(config, length)
    return (1 - head) / 3 * recomputed / config.num_hidden_layers


def _speed(options: PlanConfig, flops: float, peak_flops: Callable[[], float]) -> tuple[float, str]:
    if options.tokens_per_second:
        return options.tokens_per_second, "given"
    if options.device == "cpu":
        peak, source = peak_flops(), "of a large product, measured here"
    elif options.gpu:
        peak, source = getattr(gpu(options.gpu), options.precision), f"published for {options.gpu}"
    else:
        return 0.0, "unknown: name a card with --gpu, or give --tokens-per-second"
    share = f"{options.utilization:.0%} of {peak / 1e12:.3g} TFLOP/s {source}"
    return peak * options.gpus * options.utilization / flops, share + (f", x {options.gpus}" * (options.gpus > 1))


def _disk(config: ModelConfig, options: PlanConfig, tokens: int) -> Disk:
    """Token ids take two bytes up to 65,536 of them, else four; a checkpoint holds float32 weights and moments."""
    numbers = sum(row.size * (1 + moments_of(row, options.optimizer)) for row in parameter_table(config))
    return Disk(
        tokens=tokens * (2 if config.vocab_size <= 2**16 else 4),
        checkpoint=4 * numbers,
        checkpoints=4 * numbers * (options.keep_checkpoints + 1),
    )


def _advice(
    config: ModelConfig, options: PlanConfig, chosen: Update, share: int, room: int, fits: bool, rows: int
) -> list[str]:
    """Returns what to change where something does not fit, each with what it would come to."""
    if fits:
        waiting = rows < share and not options.micro_batch_size
        return [f"give --micro-batch-size {rows}: the {share} rows do not fit at once"] if waiting else []

    def total(update: Update) -> str:
        bytes_needed = training_memory(config, update).total
        return f"{bytes_needed / GB:.3g} GB" + ("" if bytes_needed > room else ", which fits")

    one_row, found = _with_rows(chosen, 1, share), []
    if chosen.rows > 1:
        found.append(f"fewer rows at a time: --micro-batch-size 1 needs {total(one_row)}")
    everything = replace(one_row, recomputed=config.num_hidden_layers)
    if chosen.recomputed < config.num_hidden_layers:
        found.append(f"compute activations again: --recompute all, with one row at a time, needs {total(everything)}")
    if chosen.precision == "fp32":
        lower = replace(everything, precision="bf16")
        found.append(f"products in bfloat16: --precision bf16, with that too, needs {total(lower)}")
    if options.device == "cuda" and options.parallel == "ddp" and chosen.parallel.replicas > 1:
        split = replace(everything, parallel=replace(chosen.parallel, mode="fsdp"))
        found.append(f"split what the cards hold: --parallel fsdp, with that too, needs {total(split)} on each")
    if options.device == "cuda":
        for gpus in (2, 4, 8, 16, 32, 64, 128):
            more = replace(
                everything, parallel=Parallelism(gpus * options.tensor_parallel, "fsdp", options.tensor_parallel)
            )
            if gpus > chosen.parallel.replicas and training_memory(config, more).total <= room:
                found.append(f"more cards: --gpus {gpus * options.tensor_parallel} --parallel fsdp needs {total(more)}")
                break
    if options.optimizer == "adamw":
        lean = replace(everything, optimizer="muon")
        found.append(f"one moment for matrices: --optimizer muon, with that too, needs {total(lean)}")
    return [*found, "or a smaller model, or shorter rows"]
