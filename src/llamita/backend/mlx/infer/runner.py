"""Runs the plans of an inference engine on an MLX model, over a paged key/value memory.

The engine decides which tokens run and where their keys and values lie; here they are run, all chunks of a step laid
into one row. A step is one graph, from the tokens to the draws, and is waited for once. `hidden_states` holds all that
happens between tokens and the states that logits are made of. Deliberately knows nothing of requests, text, or when to
stop.

Letters beyond the usual: R rows of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil

from llamita.backend.interface import (
    CacheLayout,
    Likeliest,
    Plan,
    SampledToken,
    SampleSpec,
    ScheduledChunk,
    StepResult,
    WantedLogits,
    token_array,
)
from llamita.backend.mlx.devices import choose_device
from llamita.backend.mlx.infer.adapters import adapters_of_rows
from llamita.backend.mlx.infer.kv_cache import PagedKVCache, PagedStep
from llamita.backend.mlx.infer.sampling import Sampler, largest_first
from llamita.backend.mlx.model import lora
from llamita.backend.mlx.model.layers import Adapters
from llamita.backend.mlx.model.llama import Llama
from llamita.backend.mlx.model.quantized import QuantizedLinear
from llamita.backend.mlx.model.weights import build_model, to_host_arrays
from llamita.backend.opening import open_model
from llamita.backend.runner import (
    adapter_named,
    bytes_read_per_token,
    layers_of_attention,
    positions_of_logits,
    with_adapter,
)
from llamita.backend.step_layout import Scores, States, StepLayout, rows_wanted, sample_chunks, score_chunks
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter
from llamita.model.sizes import kv_bytes_per_token

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
CACHE_SHARE = 0.25
"""Of the memory that is free once the weights are loaded, what keys and values may take: others need the rest."""


@dataclass
class MlxMemory:
    """The memory of one engine's sequences from step to step: keys and values, and counts of tokens."""

    cache: PagedKVCache
    sampler: Sampler


class MlxRunner:
    """Runs an engine's plans with `model`, which it does not copy.

    A chunk goes through the one of `adapters` that it names, or through `default`, or the model alone.
    """

    dtype_reason = ""
    kernels = "MLX's operations"

    def __init__(
        self,
        model: Llama,
        device: mx.DeviceType = mx.cpu,
        adapters: Mapping[str, Adapter | lora.ModelAdapter] | None = None,
        default: str | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.config: ModelConfig = model.config
        self.dtype = model.model.norm.weight.dtype  # never quantised: that of the activations and of the cache
        self.adapters, self.default = dict(adapters or {}), default
        self._adapters = {
            name: adapter if isinstance(adapter, lora.ModelAdapter) else lora.loaded_adapter(model, adapter)
            for name, adapter in self.adapters.items()
        }
        read = [(name, array.nbytes) for name, array in named_arrays(model)]
        modules = model.named_modules()
        read += [(name, module.kernel_bytes) for name, module in modules if isinstance(module, QuantizedLinear)]
        self.weight_bytes = bytes_read_per_token(self.config, read)
        """Bytes of weights that decoding one token reads."""
        self.kv_bytes_per_token = kv_bytes_per_token(self.config, self.dtype.size)
        """Bytes of keys and values that one earlier position adds to what decoding a token reads."""

    @property
    def dtype_name(self) -> str:
        """The type of weights and cache."""
        return str(self.dtype).removeprefix("mlx.core.")

    @property
    def cache_budget(self) -> int:
        """Bytes that keys and values may take where nothing else is said."""
        return int(psutil.virtual_memory().available * CACHE_SHARE)

    def weights(self) -> dict[str, HostArray]:
        """Returns the values under canonical names, in the type they have here, with the default adapter merged in."""
        adapter = None if self.default is None else self.adapters[self.default]
        return with_adapter(self.config, to_host_arrays(self.model), adapter, lora.merged_arrays)

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> MlxMemory:
        """Returns memory for the sequences of one engine; how many decode at once makes no difference to it."""
        with mx.stream(self.device):
            cache = PagedKVCache(self.config, layout, self.dtype)
            mx.eval(cache.keys, cache.values)  # another thread may do the steps
            return MlxMemory(cache, Sampler(self.config.vocab_size, self.device))

    def run(self, plan: Plan, memory: MlxMemory) -> StepResult:
        """Runs every chunk at once, samples the tokens and scores the targets that they ask for."""
        with mx.stream(self.device):
            memory.cache.copy(plan.copies)
            if not plan.chunks:
                mx.eval(memory.cache.keys, memory.cache.values)
                return StepResult(())
            layout = StepLayout.of(plan.chunks)
            tokens_1T, names = mx.array([layout.tokens]), layout.adapters(self.default)
            # Adapters are told apart by rows of the whole step.
            wanted = list(range(len(names))) if len(set(names)) > 1 else rows_wanted(layout.chunks)
            adapters = adapters_of_rows(self._adapters, names)
            hidden_RD = hidden_states(self.model, tokens_1T, memory.cache.step(layout.chunks), wanted, adapters)
            # The changed memory is part of the step: left to a later one, graphs and memory would pile up.
            mx.async_eval(memory.cache.keys, memory.cache.values)
            states = States(hidden_RD, {row: place for place, row in enumerate(wanted)}, names)
            sampled = self._sample(layout.chunks, states, memory.sampler)
            return layout.result(sampled, self._score(layout.chunks, states))

    def _sample(
        self, chunks: Sequence[ScheduledChunk], states: States[mx.array], sampler: Sampler
    ) -> list[tuple[SampledToken, ...]]:
        """Returns the tokens that each chunk asks for, all drawn in one pass."""

        def draw(rows: list[int], specs: list[SampleSpec], ids: list[int]) -> list[SampledToken]:
            return sampler.sample(self._logits(states, rows), specs, ids)

        return sample_chunks(chunks, draw)

    def _score(self, chunks: Sequence[ScheduledChunk], states: States[mx.array]) -> list[Scores]:
        """Returns what each chunk asks of its targets."""

        def score(rows: list[int], places: list[int], ids: list[int], top: int) -> tuple[list[float], list[Likeliest]]:
            logits_RV, at = self._logits(states, rows).astype(mx.float32), mx.array(places)
            totals_R = mx.logsumexp(logits_RV, axis=-1)
            logprobs = np.array(logits_RV[at, mx.array(ids)] - totals_R[at]).tolist()
            if not top:
                return logprobs, []
            ids_RK = largest_first(logits_RV, min(top, logits_RV.shape[1]))
            values_RK = mx.take_along_axis(logits_RV, ids_RK, axis=-1) - totals_R[:, None]
            pairs = zip(np.array(ids_RK).tolist(), np.array(values_RK).tolist(), strict=True)
            return logprobs, [tuple(zip(row, values, strict=True)) for row, values in pairs]

        return score_chunks(chunks, score)

    def _logits(self, states: States[mx.array], rows: Sequence[int]) -> mx.array:
        """Returns logits (R, V) of some rows of the step."""
        places, hidden_RD = states.places(rows), states.hidden_RD
        if places != list(range(len(hidden_RD))):
            hidden_RD = hidden_RD[mx.array(places)]
        return self.model.logits(hidden_RD, adapters_of_rows(self._adapters, [states.adapters[row] for row in rows]))

    def forward(
        self,
        tokens_BT: Sequence[Sequence[int]] | np.ndarray,
        capture: Sequence[str] = (),
        adapter: str | None = None,
        logits: WantedLogits = "all",
    ) -> dict[str, np.ndarray]:
        """Returns `logits` (B, T, V) and each place in `capture`, as float32 arrays.

        Places are the residual stream (B, T, D) at `embedding`, `layers.0`, `layers.1`, ..., `norm`, and the attention
        probabilities (B, N, T, T) at `layers.0.attention`, .... `logits` "last" are those of the last position alone,
        (B, 1, V); "none" leaves them out. Nothing is cached. ValueError for an unknown place, an adapter that is not
        loaded, and ids outside the vocabulary.
        """
        attention_of, positions = layers_of_attention(capture, self.config), positions_of_logits(logits)
        found: dict[str, mx.array] = {}

        def trace(name: str, x: mx.array) -> None:
            if name in capture:
                found[name] = x.astype(mx.float32)

        with mx.stream(self.device):
            tokens = mx.array(token_array(tokens_BT, self.config.vocab_size).astype(np.int32))
            adapters = self._whole_adapter(adapter)
            hidden_BTD = self.model.hidden(tokens, trace=trace, adapters=adapters, attention_of=attention_of)
            if positions is not None:
                found["logits"] = self.model.logits(hidden_BTD[:, positions], adapters).astype(mx.float32)
            mx.eval(hidden_BTD, found)
            return {name: np.array(x) for name, x in found.items()}

    def logit_lens(self, stream_BTD: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Returns the logits (B, T, V) of states of the residual stream (B, T, D) as though they were the last layer's:
        through the final norm and the output head."""
        with mx.stream(self.device):
            stream = mx.array(stream_BTD).astype(self.dtype)
            logits_BTV = self.model.logits(self.model.model.norm(stream), self._whole_adapter(adapter))
            return np.array(logits_BTV.astype(mx.float32))

    def _whole_adapter(self, name: str | None) -> Adapters | None:
        """Returns the adapter of a forward pass that all rows go through."""
        return adapter_named(self._adapters, self.default if name is None else name)


def hidden_states(
    model: Llama, tokens_1T: mx.array, step: PagedStep, rows: Sequence[int], adapters: Adapters | None
) -> mx.array:
    """Returns the states (R, D) after the final norm at some `rows` of the tokens; all keys and values go into the
    memory."""
    every = len(rows) == tokens_1T.shape[1]
    rows_R = None if every else mx.array(list(rows), mx.int32)
    return model.hidden(tokens_1T, cache=step, adapters=adapters, rows_R=rows_R)[0]


def load_runner(
    model: Path | str,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
    exact: bool = False,
    adapters: Mapping[str, Path] | None = None,
) -> MlxRunner:
    """Returns a runner over a model directory, or over the best checkpoint of a run directory; of an adapter's, over
    its base with that adapter. `adapters` are further ones over the same base, each for the chunks that name it.

    `dtype` is that of weights and cache: a name in DTYPES, or "auto" for that of the file (bfloat16 for the
    activations of a quantised one; float32 on a CPU without instructions for the file's). `device` is "cpu", "gpu",
    or "auto" for MLX's own default: the GPU of a Mac. MLX has no setting for `threads` and no `exact` mode, so
    either is refused.
    """
    if exact:
        raise ValueError(
            "the exact mode is PyTorch's: MLX's kernels round a row by what runs beside it; use --backend torch"
        )
    if threads:
        raise ValueError(f"threads={threads} cannot be set: MLX chooses its threads itself; leave it at 0")
    where = choose_device(device)
    opened = open_model(model, dtype, adapters, on_cpu=where == mx.cpu)
    runner = _arranged(opened.config, opened.arrays, DTYPES[opened.dtype], where, opened.adapters, opened.default)
    runner.dtype_reason = opened.dtype_reason
    return runner


def runner_over(config: ModelConfig, arrays: Mapping[str, HostArray], dtype: str = "float32") -> MlxRunner:
    """Returns a runner over host arrays, on the CPU."""
    return _arranged(config, arrays, DTYPES[dtype], mx.cpu)


def _arranged(
    config: ModelConfig,
    arrays: Mapping[str, HostArray],
    dtype: mx.Dtype,
    device: mx.DeviceType,
    adapters: Mapping[str, Adapter] | None = None,
    default: str | None = None,
) -> MlxRunner:
    """Returns a runner over a model of its own, whose matrices lie as its device multiplies them fastest."""
    with mx.stream(device):
        model = build_model(config, arrays, dtype=dtype)
        if device == mx.cpu and dtype == mx.float32:
            lay_columns_together(model)
        mx.eval([array for _, array in named_arrays(model)])  # what is lazy belongs to this thread's stream
        return MlxRunner(model, device, adapters, default)


def lay_columns_together(model: Llama) -> None:
    """Stores each float32 matrix column by column, with the face of one stored row by row.

    x W^T then reads W^T row by row, for which the BLAS of MLX on Linux takes three quarters to half of the time.
    """
    for fused in model.fused_parameters():
        weight = fused.parameter
        if weight.ndim == 2 and weight.dtype == mx.float32:
            columns = mx.contiguous(weight.T)
            mx.eval(columns)
            fused.replace(columns.T)


def named_arrays(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Yields every array that the model holds, by the name of its module and its own."""
    for module_name, module in model.named_modules():
        for key, value in module.items():
            if isinstance(value, mx.array):
                yield f"{module_name}.{key}", value
