"""The memory of training, by parts, counted from the table of parameters and from what each operation of a block keeps.

An update holds the most at one of three moments: at the loss, where every block's activations are kept and logits come
on top; in the middle of the backward pass, where gradients of later blocks stand beside activations of earlier ones;
or at its end, where all gradients do. What is counted is what this library's blocks keep (backend/torch); another
backend keeps a little more or less.

Letters beyond the usual: M the tokens that are computed at a time.
"""

from dataclasses import dataclass, field
from typing import Literal

from llamita.model.config import ModelConfig
from llamita.model.parameters import BLOCK_NORMS, EMBEDDING, OUTPUT_HEAD, Parameter, parameter_table

FLOAT32 = 4
PRODUCT_BYTES = {"bf16": 2, "fp32": 4}
HEAD_CHUNK = 1024
"""Positions whose logits exist at a time (`train/losses.py` of both backends)."""
SOFTMAX_NUMBERS = 2**19
"""Logits that the loss turns into float32 at a time on a CPU (the same place)."""
MAX_SCORES = 2**26
"""Attention scores that a CPU holds in bfloat16 before it changes to a kernel that holds none (model/attention.py)."""
CUDA_WORKSPACE = 32 * 2**20 + 8 * 2**20
"""The workspaces of cuBLAS and cuBLASLt on Hopper; they are smaller before it."""
HEAP_SHARE = 0.5
"""The share of what a block lets go of that stays in the heap of a CPU's allocator, unused by the next blocks.

glibc asks for more than a piece's size to align it, so a hole that a piece of one size left does not fit the next of
that size. Measured with mallinfo2 after forward passes of models of 6 and 16 blocks: 0.47 to 0.59."""


@dataclass(frozen=True)
class Parallelism:
    """How a training is spread: `tensor_parallel` devices share each matrix, `gpus` over that are the replicas.

    `fsdp` also splits weights, gradients and moments over the replicas (Rajbhandari et al. 2020, arXiv:1910.02054,
    stage 3); `ddp` gives each replica all of them.
    """

    gpus: int = 1
    mode: Literal["ddp", "fsdp"] = "ddp"
    tensor_parallel: int = 1

    @property
    def replicas(self) -> int:
        return self.gpus // self.tensor_parallel

    @property
    def splits(self) -> int:
        """Returns over how many replicas weights are split."""
        return self.replicas if self.mode == "fsdp" else 1


@dataclass(frozen=True)
class Update:
    """What decides the memory of an update on one device, besides the model."""

    rows: int
    """Rows that are computed at a time."""
    sequence_length: int
    precision: Literal["bf16", "fp32"] = "bf16"
    recomputed: int = 0
    """Blocks whose activations are computed again."""
    micro_batches: int = 1
    """Parts that an update is computed in: from the second on, gradients are there from the start."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    device: Literal["cpu", "cuda"] = "cuda"
    parallel: Parallelism = field(default_factory=Parallelism)

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_length


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the moment of an update that holds the most."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    workspace: int
    """What is held for a moment within an operation, and what the allocator cannot use."""
    all_gradients: int
    """Gradients once they are complete, whether or not that is the moment of the peak."""
    moment: str
    """The moment of the peak, in words."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations + self.logits + self.workspace


def training_memory(config: ModelConfig, update: Update) -> TrainingMemory:
    """Returns the memory of an update: float32 weights, gradients and moments, products in `update.precision`."""
    rows = parameter_table(config)
    weights = FLOAT32 * sum(_size(row, update) for row in rows) // update.parallel.splits
    moments = FLOAT32 * sum(_size(row, update) * moments_of(row, update.optimizer) for row in rows)
    moments //= update.parallel.splits
    layers, again = config.num_hidden_layers, update.recomputed
    block, residual = block_bytes(config, update), update.tokens * FLOAT32 * config.hidden_size
    kept = (layers - again) * block + again * residual + 2 * residual  # and the input and output of the last norm
    casts = _cast_bytes(rows, update)
    unsharded = _gathered_bytes(rows, config, update)
    head = head_bytes(config, update)
    block_gradients = _block_parameters(rows, update) * FLOAT32 // update.parallel.splits
    head_gradients = _size_of_head(rows, config, update) * FLOAT32
    backward = _backward_bytes(config, rows, update)
    carried = weights if update.micro_batches > 1 else 0
    heap = int(HEAP_SHARE * layers * released_bytes(config, update))

    # A block's second run and its backward pass each leave holes as its first run did, until two blocks' lie ready.
    heap_later = heap + int(2 * HEAP_SHARE * min(again, 2) * released_bytes(config, update))

    def memory(moment: str, gradients: int, activations: int, logits: int, passing: int) -> TrainingMemory:
        extra = (heap if logits else heap_later) if update.device == "cpu" else CUDA_WORKSPACE
        return TrainingMemory(
            weights, moments, gradients, activations, logits, unsharded + passing + extra, weights, moment
        )

    moments_of_update = [memory("at the loss", carried, kept + casts, head, 0)]
    for done in range(layers + 1):
        share = (layers - done) / layers
        gradients = min(weights, (carried or head_gradients // update.parallel.splits + done * block_gradients))
        left = int((kept + casts - 2 * residual) * share) + residual
        second = block if again and done < layers else 0  # of the block that is being computed again
        where = "at the end of the backward pass" if done == layers else f"in the backward pass, {done} blocks done"
        embedding = head_gradients if done == layers else 0  # of the embedding, which is dense
        if done == layers:
            gradients, left = weights, 0
        moments_of_update.append(memory(where, gradients, left + second, 0, embedding or backward))
    return max(moments_of_update, key=lambda one: one.total)


def block_bytes(config: ModelConfig, update: Update) -> int:
    """Returns the bytes of activations that one block keeps for its backward pass, weights not counted."""
    D, T = config.hidden_size, update.sequence_length
    k = update.parallel.tensor_parallel
    C, H = config.intermediate_size // k, config.head_dim
    N, K = config.num_attention_heads // k, max(1, config.num_key_value_heads // k)
    p = PRODUCT_BYTES[update.precision]
    places = BLOCK_NORMS[config.norm_placement]
    norms = sum(map(bool, places)) * (FLOAT32 * D + 2 * FLOAT32)
    if p == 2:  # a sublayer's result is normed in float32: a copy of it, and the normed numbers
        norms += sum(map(bool, (places.after_attention, places.after_feed_forward))) * FLOAT32 * D
    # Both sublayers read the norm's output in the type of products: a copy of the float32 one in bf16.
    inputs = 2 * p * D
    by_products = update.device == "cpu" and p == 2 and update.rows * N * T * T <= MAX_SCORES
    if by_products:  # queries, keys and values in an order of their own, the softmax, what the last product reads
        attention = (N + 2 * K) * H * p + N * T * p + N * H * p
    elif update.device == "cpu" and K != N:  # rotated queries and keys, then keys and values once for each query head
        attention = (N + K) * H * p + 2 * N * H * p + N * H * p + FLOAT32 * N
        attention += N * H * p if p == 2 else 0
    else:  # rotated queries and keys, the projection's output that the values are a view of, the result
        attention = (N + K) * H * p + (N + 2 * K) * H * p + N * H * p + FLOAT32 * N
        attention += N * H * p if update.device == "cpu" and p == 2 else 0
    if config.query_key_norm and p == 2:  # likewise
        attention += 2 * (N + K) * H * FLOAT32
    feed_forward = 3 * C * p  # gate and up, and the gated result
    dropout = 0
    if config.dropout:  # which numbers were kept, in the type of what they multiply
        dropout = 2 * D * p + 2 * N * T * p
    return update.tokens * (norms + inputs + attention + feed_forward + dropout)


def released_bytes(config: ModelConfig, update: Update) -> int:
    """Returns the bytes that the forward pass of one block allocates and lets go again."""
    k = update.parallel.tensor_parallel
    N, K = config.num_attention_heads // k, max(1, config.num_key_value_heads // k)
    H, D, C, p = config.head_dim, config.hidden_size, config.intermediate_size // k, PRODUCT_BYTES[update.precision]
    # Rotation in float32: six products and sums of half the numbers each, and their concatenation.
    rotation = (6 / 2 + 1) * FLOAT32 * (N + K) * H
    results = 2 * p * D + C * p  # of the last product of each sublayer, and the activated gate
    if p == 2:  # norms before they are rounded, the projection before its parts are put in order, the scores
        results += 2 * FLOAT32 * D + (N + 2 * K) * H * p + N * update.sequence_length * p
    return int(update.tokens * (rotation + results))


def head_bytes(config: ModelConfig, update: Update) -> int:
    """Returns the bytes that the loss holds at once: a chunk of logits, and gradients by the head and the states."""
    D, V, k = config.hidden_size, config.vocab_size, update.parallel.tensor_parallel
    p, M = PRODUCT_BYTES[update.precision], -(-update.tokens // k)  # devices that share matrices share the loss's rows
    chunk = min(M, HEAD_CHUNK)
    softmax = 2 * FLOAT32 * (min(chunk * V, SOFTMAX_NUMBERS) if update.device == "cpu" else chunk * V)
    capped = 3 * FLOAT32 * chunk * V if config.logits_scaling != 1.0 or config.final_logit_softcapping else 0
    gradient, product = FLOAT32 * V * D, p * V * D  # the sum over chunks, and a chunk's own
    low = p * (V * D + M * D) if p == 2 else 0  # the copies of head and states that products read
    states = FLOAT32 * update.tokens * D
    gathered = FLOAT32 * V * D if k > 1 else 0
    return p * chunk * V + max(softmax, product) + capped + gradient + low + states + gathered


def moments_of(row: Parameter, optimizer: Literal["adamw", "muon"]) -> int:
    """Returns how many numbers the optimiser keeps for each of a parameter: Muon one for a block's matrices."""
    return 1 if optimizer == "muon" and _in_block(row) and len(row.shape) == 2 else 2


# --- the table of parameters -----------------------------------------------------------------------------------------


def _size(row: Parameter, update: Update) -> int:
    """Returns the numbers of a parameter on one device of those that share its matrix."""
    if row.shard_axis is None:
        return row.size
    length = row.shape[row.shard_axis]  # of a vocabulary that is not divided evenly the first device holds the most
    return row.size // length * -(-length // update.parallel.tensor_parallel)


def _in_block(row: Parameter) -> bool:
    return row.name.startswith("model.layers.")


def _block_parameters(rows: tuple[Parameter, ...], update: Update) -> int:
    return sum(_size(row, update) for row in rows if row.name.startswith("model.layers.0."))


def _size_of_head(rows: tuple[Parameter, ...], config: ModelConfig, update: Update) -> int:
    name = EMBEDDING if config.tie_word_embeddings else OUTPUT_HEAD
    return sum(_size(row, update) for row in rows if row.name == name)


def _cast_bytes(rows: tuple[Parameter, ...], update: Update) -> int:
    """Returns the bytes of the blocks' matrices in bfloat16, which are kept until their backward pass."""
    if update.precision == "fp32":
        return 0
    return 2 * sum(_size(row, update) for row in rows if _in_block(row) and len(row.shape) == 2)


def _gathered_bytes(rows: tuple[Parameter, ...], config: ModelConfig, update: Update) -> int:
    """Returns the bytes that FSDP gathers: two blocks, the one at work and the next, and the gradients of one."""
    if update.parallel.splits == 1:
        return 0
    block = _block_parameters(rows, update)
    return PRODUCT_BYTES[update.precision] * 2 * block + FLOAT32 * (block + _size_of_head(rows, config, update))


def _backward_bytes(config: ModelConfig, rows: tuple[Parameter, ...], update: Update) -> int:
    """Returns the bytes of gradients that pass through a block: of the feed-forward layer, the stream, one matrix."""
    p, k = PRODUCT_BYTES[update.precision], update.parallel.tensor_parallel
    largest = max(_size(row, update) for row in rows if _in_block(row))
    gate = 4  # the gradients of its result, of gate and up, and one product on the way
    flowing = gate * config.intermediate_size // k * p + 3 * config.hidden_size * FLOAT32
    return update.tokens * flowing + largest * (p + FLOAT32)
