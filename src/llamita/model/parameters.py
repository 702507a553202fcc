"""The table of parameters: a row for each, with its name, shape, initialisation, weight decay and shard axis.

Backends build, initialise, group for AdamW, load and check from this table. Knows nothing of frameworks.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from llamita.model.config import ModelConfig, NormPlacement
from llamita.model.host_array import FLOATING
from llamita.model.quantization import SCALE, quantized_shapes

InitializationName = Literal["fan-in", "gpt-2"]


@dataclass(frozen=True)
class Initialization:
    """How a parameter starts: drawn from a normal distribution of this standard deviation, or constant."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


@dataclass(frozen=True)
class Parameter:
    """A row of the table. `shard_axis` is the axis that tensor parallelism splits, None where it replicates."""

    name: str
    shape: tuple[int, ...]
    initialization: Initialization
    weight_decay: bool
    shard_axis: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


ONES, ZEROS = Initialization("ones"), Initialization("zeros")
EMBEDDING = "model.embed_tokens.weight"
OUTPUT_HEAD = "lm_head.weight"
CLASSIFIER = "score.weight"
LAYER_BIAS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.bias")


class BlockNorms(NamedTuple):
    """The norms of a block by their place, under canonical names; empty where there is none."""

    before_attention: str
    after_attention: str
    before_feed_forward: str
    after_feed_forward: str


BLOCK_NORMS: Mapping[NormPlacement, BlockNorms] = {
    "before": BlockNorms("input_layernorm", "", "post_attention_layernorm", ""),
    "after": BlockNorms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": BlockNorms(
        *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
}
# The linear maps that lie in one matrix inside a model, one below the other: one large product is faster than three.
FUSED_PARTS = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def parameter_table(config: ModelConfig, initialization: InitializationName = "fan-in") -> tuple[Parameter, ...]:
    """The table of a model, in the order of the forward pass, under Hugging Face names.

    Initialisations: `fan-in` draws matrices with std 1/sqrt(n_in) and the embedding with std 1, or 1/sqrt(D) where it
    is also the output head (Chowdhery et al. 2022, PaLM, section 5); `gpt-2` draws everything with std 0.02 and the
    two projections into the residual stream with 0.02/sqrt(2 L) (Radford et al. 2019; llama2.c).
    Weight decay applies to matrices and embeddings, not to norms and biases.
    """
    if initialization not in ("fan-in", "gpt-2"):
        raise ValueError(f"initialization={initialization!r} must be 'fan-in' or 'gpt-2'")
    D, C, V, H = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    N, K, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers

    def linear(
        name: str, n_out: int, n_in: int, axis: int | None, bias: bool, residual: bool = False
    ) -> list[Parameter]:
        std = 1 / math.sqrt(n_in)
        if initialization == "gpt-2":
            std = 0.02 / math.sqrt(2 * L) if residual else 0.02
        rows = [Parameter(f"{name}.weight", (n_out, n_in), Initialization("normal", std), True, axis)]
        if bias:  # a row-split product is summed over shards, so its bias is not split
            rows.append(Parameter(f"{name}.bias", (n_out,), ZEROS, False, 0 if axis == 0 else None))
        return rows

    def norm(name: str, size: int) -> Parameter:
        return Parameter(f"{name}.weight", (size,), ZEROS if config.unit_offset_norm else ONES, False)

    def block(prefix: str) -> list[Parameter]:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        input_bias = config.attention_bias or config.query_key_value_bias
        heads = {"q": N, "k": K} if config.norm_all_heads else {"q": 1, "k": 1}
        head_norms = [norm(f"{attention}.{name}_norm", count * H) for name, count in heads.items()]
        norms = BLOCK_NORMS[config.norm_placement]

        def block_norm(name: str) -> list[Parameter]:
            return [norm(f"{prefix}.{name}", D)] if name else []

        return [
            *block_norm(norms.before_attention),
            *linear(f"{attention}.q_proj", N * H, D, 0, input_bias),
            *linear(f"{attention}.k_proj", K * H, D, 0, input_bias),
            *linear(f"{attention}.v_proj", K * H, D, 0, input_bias),
            *(head_norms if config.query_key_norm else ()),
            *linear(f"{attention}.o_proj", D, N * H, 1, config.attention_bias, residual=True),
            *block_norm(norms.after_attention),
            *block_norm(norms.before_feed_forward),
            *linear(f"{mlp}.gate_proj", C, D, 0, config.mlp_bias),
            *linear(f"{mlp}.up_proj", C, D, 0, config.mlp_bias),
            *linear(f"{mlp}.down_proj", D, C, 1, config.mlp_bias, residual=True),
            *block_norm(norms.after_feed_forward),
        ]

    embedding_std = 0.02 if initialization == "gpt-2" else 1 / math.sqrt(D) if config.tie_word_embeddings else 1.0
    table = [Parameter(EMBEDDING, (V, D), Initialization("normal", embedding_std), True, 0)]
    for layer in range(L):
        table += block(f"model.layers.{layer}")
    table.append(norm("model.norm", D))
    if config.num_labels:
        table += linear("score", config.num_labels, D, None, bias=False)
    elif not config.tie_word_embeddings:
        table += linear("lm_head", V, D, 0, bias=False)
    return tuple(table)


@dataclass(frozen=True)
class StoredArray:
    """An array of a model directory; `dtypes` are the types that it may have, by their safetensors names."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    weight_decay: bool

    @property
    def stored_dtype(self) -> str:
        """The type in a quantised model: the only one that it may have, or bfloat16."""
        return self.dtypes[0] if len(self.dtypes) == 1 else "BF16"

    @property
    def stored_bytes(self) -> int:
        return math.prod(self.shape) * (2 if self.stored_dtype == "BF16" else 1)


def weight_bits(config: ModelConfig, row: Parameter) -> int:
    """Bits of a quantised parameter's values, 0 where it stays as it is.

    Matrices are quantised but for a classifier's head, which is small. The embedding and the output head keep 8 bits
    in int4 too: an embedding's row is read alone, and a head's error goes straight to the logits.
    """
    if not config.quantization or len(row.shape) != 2 or row.name == CLASSIFIER:
        return 0
    return 8 if config.quantization == "int8" or row.name in (EMBEDDING, OUTPUT_HEAD) else 4


def stored_arrays(config: ModelConfig) -> tuple[StoredArray, ...]:
    """What a model directory holds, in order: a row of the table each, or a quantised row's values and their scales."""
    arrays = []
    for row in parameter_table(config):
        bits = weight_bits(config, row)
        if not bits:
            arrays.append(StoredArray(row.name, row.shape, FLOATING, row.weight_decay))
            continue
        n_out, n_in = row.shape
        shape, scales = quantized_shapes(n_out, n_in, bits)
        arrays.append(StoredArray(row.name, shape, ("I8" if bits == 8 else "U8",), False))
        arrays.append(StoredArray(row.name + SCALE, scales, ("BF16",), False))
    return tuple(arrays)


def canonical_names(name: str) -> tuple[str, ...]:
    """The parameters of a checkpoint that a parameter of a backend's model holds.

    In a model that is divided between processes the parts of a fused matrix stand apart, in its place.
    """
    for fused, parts in FUSED_PARTS.items():
        if f".{fused}." in name:
            module = fused.rpartition(".")[0]
            owner, _, rest = name.partition(f"{fused}.")
            if rest.partition(".")[0] in parts:
                return (f"{owner}{module}.{rest}",)
            return tuple(name.replace(fused, f"{module}.{part}") for part in parts)
    return (name,)


class Array(Protocol):
    """What is checked of an array before it is used."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def shortened(faults: list[str], most: int = 20) -> str:
    """The faults in one line, the first of them where there are very many."""
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


def check_arrays(config: ModelConfig, arrays: Mapping[str, Array]) -> None:
    """Raise ValueError with all that is missing, extra, misshapen or of another type, before anything of that size is
    allocated."""
    expected = {row.name: row for row in stored_arrays(config)}
    faults = [f"{name} is missing" for name in expected if name not in arrays]
    for name, array in arrays.items():
        if ".rotary_emb." in name or is_left_aside(config, name):
            continue  # some files hold the rotary frequencies, or the tied embedding again under the head's name
        if name not in expected:
            faults.append(f"{name} is not part of this model")
        elif array.shape != expected[name].shape:
            faults.append(f"{name} has shape {list(array.shape)}, expected {list(expected[name].shape)}")
        elif array.dtype not in (dtypes := expected[name].dtypes):
            one_of = "one of " if len(dtypes) > 1 else ""
            faults.append(f"{name} has dtype {array.dtype}, expected {one_of}{', '.join(dtypes)}")
    if faults:
        raise ValueError(f"the weights do not fit config.json: {shortened(faults)}")


def is_left_aside(config: ModelConfig, name: str) -> bool:
    """Whether an array of this name is not the model's, and can be in its file all the same.

    It is a head of another kind than the model's, the embedding again under the head's name, or a bias of a linear map
    that has none by the config. transformers leaves the same ones aside.
    """
    if name == OUTPUT_HEAD:
        return config.tie_word_embeddings or bool(config.num_labels)
    if name == CLASSIFIER:
        return not config.num_labels
    found = LAYER_BIAS.fullmatch(name)
    if found is None:
        return False
    if found[1] == "mlp":
        return not config.mlp_bias
    return not (config.attention_bias or (config.query_key_value_bias and found[2] != "o"))


def initialize_parameters(
    config: ModelConfig, seed: int, initialization: InitializationName = "fan-in"
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, float32 array) for every row of the table.

    Each parameter has a random stream of its own, keyed by (seed, name), so that every backend starts from the same
    numbers and a tensor does not depend on which others exist.
    """
    for row in parameter_table(config, initialization):
        yield row.name, initial_values(row, seed)


def initial_values(row: Parameter, seed: int) -> np.ndarray:
    """The float32 array that a row of the table starts from; see `initialize_parameters`."""
    kind = row.initialization.kind
    if kind != "normal":
        return np.full(row.shape, 1.0 if kind == "ones" else 0.0, dtype=np.float32)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{row.name}".encode()).digest()[:16], "little")
    array = np.random.Generator(np.random.Philox(key=key)).standard_normal(row.shape, dtype=np.float32)
    array *= np.float32(row.initialization.std)
    return array
