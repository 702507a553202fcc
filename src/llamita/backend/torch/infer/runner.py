"""Runs the plans of an inference engine on a PyTorch model, over a paged key/value memory.

The engine decides which tokens run and where their keys and values lie; here they are run, all chunks of a step laid
into one row. `hidden_states` holds all that happens between tokens and the states that logits are made of: it is the
unit to compile or to replace by faster kernels. Deliberately knows nothing of requests, text, or when to stop.

Letters beyond the usual: R rows of a step.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from llamita.backend import processor
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
from llamita.backend.opening import open_model
from llamita.backend.runner import (
    adapter_named,
    bytes_read_per_token,
    layers_of_attention,
    positions_of_logits,
    with_adapter,
)
from llamita.backend.sampling import Steps, sampled_token
from llamita.backend.step_layout import Scores, States, StepLayout, rows_wanted, sample_chunks, score_chunks
from llamita.backend.torch.devices import choose_device, table_kernel
from llamita.backend.torch.infer.adapters import adapters_of_rows, exact_adapter
from llamita.backend.torch.infer.exact import TEXT_PIECE, exact_model, exact_states
from llamita.backend.torch.infer.graphs import DecodeGraphs, TableStep, cuda_recorder
from llamita.backend.torch.infer.kernels.choice import (
    NO_KERNELS,
    Choice,
    choose_kernels,
    decoder_of,
    drawer_for,
    greedy_head_of,
)
from llamita.backend.torch.infer.kv_cache import EXACT_ROWS, PagedKVCache, PagedStep
from llamita.backend.torch.infer.sampling import Sampler
from llamita.backend.torch.model import lora
from llamita.backend.torch.model.layers import Adapters
from llamita.backend.torch.model.llama import Llama
from llamita.backend.torch.model.quantized import QuantizedLinear
from llamita.backend.torch.model.reordered import build_reordered, weights_held_in_blocks
from llamita.backend.torch.model.weights import build_model, to_host_arrays
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray
from llamita.model.lora import Adapter
from llamita.model.sizes import kv_bytes_per_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""Of the memory that is free once the weights are loaded, what keys and values may take."""


@dataclass
class TorchMemory:
    """The memory of one engine's sequences from step to step: keys and values, and counts of tokens."""

    cache: PagedKVCache
    sampler: Sampler
    graphs: DecodeGraphs | None = None


class TorchRunner:
    """Runs an engine's plans with `model`, which it neither copies nor changes; without dropout.

    With `exact`, on a CPU in float32, the logits after a text are the same bits however it came there: alone or with
    others, whole or in chunks, computed again or found in the prefix cache; so is all that `forward` returns of a text,
    alone or in a batch, and whatever padding follows it. It is slower.

    A chunk goes through the one of `adapters` that it names, or through `default`, or the model alone.
    """

    dtype_reason = ""
    kernels = "PyTorch's operators"

    def __init__(
        self,
        model: Llama,
        exact: bool = False,
        adapters: Mapping[str, Adapter | lora.ModelAdapter] | None = None,
        default: str | None = None,
    ) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        weight = model.model.norm.weight  # never quantised: its type is that of the activations
        self.dtype, self.device = weight.dtype, weight.device
        if exact and (self.device.type != "cpu" or self.dtype != torch.float32 or self.config.quantization):
            form = self.config.quantization or str(self.dtype)
            raise ValueError(f"the exact mode runs on a CPU in float32, not on {self.device.type} in {form}")
        self.exact = exact
        self._running = exact_model(model) if exact else model
        self._decoder, self._greedy_head = decoder_of(model), None if exact else greedy_head_of(model)
        self.adapters, self.default = dict(adapters or {}), default
        self._adapters = {
            name: adapter if isinstance(adapter, lora.ModelAdapter) else lora.loaded_adapter(model, adapter)
            for name, adapter in self.adapters.items()
        }
        if exact:
            self._adapters = {name: exact_adapter(adapter) for name, adapter in self._adapters.items()}
        read = [(name, parameter.nbytes) for name, parameter in model.named_parameters() if not parameter.is_meta]
        modules = list(model.named_modules())
        read += [(name, module.kernel_bytes) for name, module in modules if isinstance(module, QuantizedLinear)]
        kernels = [(name, getattr(module, "kernel", None)) for name, module in modules]
        read += [(name, kernel.nbytes) for name, kernel in kernels if kernel]
        self.weight_bytes = bytes_read_per_token(self.config, read)
        """Bytes of weights that decoding one token reads."""
        self.cache_dtype = self._type_of_cache()
        self.kv_bytes_per_token = kv_bytes_per_token(self.config, self.cache_dtype.itemsize)
        """Bytes of keys and values that one earlier position adds to what decoding a token reads."""

    def _type_of_cache(self) -> torch.dtype:
        """Returns the type of keys and values: that of the activations; float16 instead of float32 where products round
        activations to bytes, which costs more than that."""
        rounds = any(weight.form.in_bytes for weight in weights_held_in_blocks(self.model))
        halves = self._decoder is not None and self._decoder.reads_float16 and rounds
        return torch.float16 if halves and self.dtype == torch.float32 else self.dtype

    @property
    def dtype_name(self) -> str:
        """The type of weights and cache."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def cache_budget(self) -> int:
        """Bytes that keys and values may take where nothing else is said."""
        free = (
            torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        )
        return int(free * CACHE_SHARE.get(self.device.type, CACHE_SHARE["cpu"]))

    def weights(self) -> dict[str, HostArray]:
        """Returns the values under canonical names, in the type they have here, with the default adapter merged in."""
        adapter = None if self.default is None else self.adapters[self.default]
        return with_adapter(self.config, to_host_arrays(self.model), adapter, lora.merged_arrays)

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> TorchMemory:
        """Returns memory for the sequences of one engine, of which so many decode at once.

        On a GPU the steps that decode up to so many are recorded as graphs, which takes seconds. Where that fails, a
        warning says so, and attention gathers what it reads as it does on a CPU. On a CPU kernels of our own are
        compiled, or read from disk.
        """
        sampler = Sampler(self.config.vocab_size, self.device, drawer_for(self.model.instructions))
        cache = PagedKVCache(
            self.config, layout, self.cache_dtype, self.device, table_kernel(self.device) if sequences else None
        )
        if cache.kernel is not None:
            try:
                with torch.inference_mode():
                    graphs = DecodeGraphs(self._decode, cache, sequences, cuda_recorder(self.device))
                return TorchMemory(cache, sampler, graphs)
            except Exception as error:  # of Triton, its compiler, or the driver: all have errors of their own
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"decoding goes on without CUDA graphs: {reason}", stacklevel=2)
                cache.kernel = None
        elif sequences and self.model.instructions is not None:
            self._compile(cache, sampler)
        return TorchMemory(cache, sampler)

    @torch.inference_mode()
    def _compile(self, cache: PagedKVCache, sampler: Sampler) -> None:
        """Compiles kernels of our own, or reads them from disk, before the first request waits for them."""
        if self._decoder is None or self._adapters:
            one_of_each = {weight.form: weight for weight in weights_held_in_blocks(self.model)}
            for weight in one_of_each.values():
                weight.multiply(torch.zeros(1, weight.n_in))
        self.model.embedded(torch.zeros(1, 1, dtype=torch.int64))
        self.model.logits(torch.zeros(1, self.config.hidden_size, dtype=self.dtype))
        if self._decoder is not None:
            self._decoder.warm_up(cache)
        if self._greedy_head is not None:
            self._greedy_head(torch.zeros(1, self.config.hidden_size))
        sampler.warm_up()

    def _decode(self, tokens_1T: Tensor, step: TableStep) -> Tensor:
        """Returns the states after the final norm of one token each of several sequences."""
        return self._running.hidden(tokens_1T, cache=step, adapters=self._adapters_of([self.default]))[0]

    def _adapters_of(self, names: Sequence[str | None]) -> Adapters | None:
        """Returns the adapters of so many rows of a step."""
        if not self._adapters:
            return None
        return adapters_of_rows(self._adapters, names, self.device, EXACT_ROWS if self.exact else 1)

    @torch.inference_mode()
    def run(self, plan: Plan, memory: TorchMemory) -> StepResult:
        """Runs every chunk at once, samples the tokens and scores the targets that they ask for."""
        memory.cache.copy(plan.copies)
        if not plan.chunks:
            return StepResult(())
        layout = StepLayout.of(plan.chunks)
        states = self._recorded(layout, memory) or self._computed(layout, memory)
        sampled = self._sample(layout.chunks, states, memory.sampler)
        return layout.result(sampled, self._score(layout.chunks, states))

    def _recorded(self, layout: StepLayout, memory: TorchMemory) -> States[Tensor] | None:
        """Returns the states by replaying a recorded step; None where there is none for these chunks."""
        chunks, names = layout.chunks, layout.adapters(self.default)
        if memory.graphs is None or {*names} != {self.default} or not memory.graphs.fit(chunks):
            return None
        return States(memory.graphs.run(chunks), {row: row for row in range(len(chunks))}, names)

    def _computed(self, layout: StepLayout, memory: TorchMemory) -> States[Tensor]:
        names = layout.adapters(self.default)
        if self._decoder is not None and {*names} == {None}:
            hidden_RD = self._decoder.hidden(layout.tokens, layout.chunks, memory.cache)
            return States(hidden_RD, {row: row for row in range(len(hidden_RD))}, names)
        step = memory.cache.step(layout.chunks, self.exact)
        padding = step.padded - step.tokens
        tokens_1T = torch.tensor([layout.tokens + [0] * padding], device=self.device)
        # The exact mode has its own count of rows, and adapters are told apart by rows of the whole step.
        every = self.exact or len(set(names)) > 1
        wanted = list(range(step.padded)) if every else rows_wanted(layout.chunks)
        adapters = self._adapters_of(names + [None] * padding)
        hidden_RD = hidden_states(self._running, tokens_1T, step, wanted, adapters)
        return States(hidden_RD, {row: place for place, row in enumerate(wanted)}, names)

    def _sample(
        self, chunks: Sequence[ScheduledChunk], states: States[Tensor], sampler: Sampler
    ) -> list[tuple[SampledToken, ...]]:
        """Returns the tokens that each chunk asks for, all drawn in one pass."""

        def draw(rows: list[int], specs: list[SampleSpec], ids: list[int]) -> list[SampledToken]:
            if (
                self._greedy_head is not None
                and all(Steps.of(spec).plain_greedy and not spec.params.top_logprobs for spec in specs)
                and {states.adapters[row] for row in rows} == {None}
            ):
                found = zip(*self._greedy_head(self._hidden(states, rows)), strict=True)
                return [sampled_token([token_id, logprob, 0.0], 0) for token_id, logprob in found]
            return sampler.sample(self._logits(states, rows), specs, ids)

        return sample_chunks(chunks, draw)

    def _score(self, chunks: Sequence[ScheduledChunk], states: States[Tensor]) -> list[Scores]:
        """Returns what each chunk asks of its targets."""

        def score(rows: list[int], places: list[int], ids: list[int], top: int) -> tuple[list[float], list[Likeliest]]:
            logits_RV = self._logits(states, rows).float()
            totals_R = logits_RV.logsumexp(-1)
            logprobs = (logits_RV[places, ids] - totals_R[places]).tolist()
            if not top:
                return logprobs, []
            found = logits_RV.topk(min(top, logits_RV.shape[1]), dim=-1)
            pairs = zip(found.indices.tolist(), (found.values - totals_R[:, None]).tolist(), strict=True)
            return logprobs, [tuple(zip(row, values, strict=True)) for row, values in pairs]

        return score_chunks(chunks, score)

    def _logits(self, states: States[Tensor], rows: Sequence[int]) -> Tensor:
        """Returns logits (R, V) of some rows of the step."""
        hidden_RD = self._hidden(states, rows).to(self.dtype)
        if self.exact:
            hidden_RD = F.pad(hidden_RD, (0, 0, 0, -len(rows) % EXACT_ROWS))
        names = [states.adapters[row] for row in rows] + [None] * (len(hidden_RD) - len(rows))
        return self._running.logits(hidden_RD, self._adapters_of(names))[: len(rows)]

    def _hidden(self, states: States[Tensor], rows: Sequence[int]) -> Tensor:
        """Returns the states (R, D) of some rows of the step."""
        places, hidden_RD = states.places(rows), states.hidden_RD
        if places == list(range(len(hidden_RD))):
            return hidden_RD
        return hidden_RD[torch.tensor(places, device=self.device)]

    @torch.inference_mode()
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
        if self.exact:
            return self._exact_forward(tokens_BT, capture, attention_of, adapter, positions)
        found: dict[str, np.ndarray] = {}

        def trace(name: str, x: Tensor) -> None:
            if name in capture:
                found[name] = x.float().cpu().numpy()

        tokens = torch.as_tensor(token_array(tokens_BT, self.config.vocab_size), device=self.device)
        adapters = self._whole_adapter(adapter)
        hidden_BTD = self.model.hidden(tokens, trace=trace, adapters=adapters, attention_of=attention_of)
        if positions is not None:
            found["logits"] = self.model.logits(hidden_BTD[:, positions], adapters).float().cpu().numpy()
        return found

    def _exact_forward(
        self,
        tokens_BT: Sequence[Sequence[int]] | np.ndarray,
        capture: Sequence[str],
        attention_of: Collection[int],
        adapter: str | None,
        positions: slice | None,
    ) -> dict[str, np.ndarray]:
        """Computes `forward` text by text, with the operations of the exact mode."""
        found: dict[str, list[np.ndarray]] = {}
        adapters = self._whole_adapter(adapter)
        for row in token_array(tokens_BT, self.config.vocab_size):
            pieces: dict[str, list[Tensor]] = {}

            def trace(name: str, x: Tensor, pieces: dict[str, list[Tensor]] = pieces) -> None:
                if name in capture:
                    pieces.setdefault(name, []).append(x[0])

            hidden_TD = exact_states(self._running, row.tolist(), adapters, trace, attention_of)
            if positions is not None:
                pieces["logits"] = [
                    self._padded_logits(rows_RD, adapters) for rows_RD in hidden_TD[positions].split(TEXT_PIECE)
                ]
            for name, parts in pieces.items():
                found.setdefault(name, []).append(torch.cat(parts, dim=-2).numpy())
        return {name: np.stack(rows) for name, rows in found.items()}

    def _padded_logits(self, hidden_RD: Tensor, adapters: Adapters | None) -> Tensor:
        """Returns logits (R, V) by as many rows as the exact mode takes."""
        padded_RD = F.pad(hidden_RD, (0, 0, 0, -len(hidden_RD) % EXACT_ROWS))
        return self._running.logits(padded_RD, adapters)[: len(hidden_RD)]

    @torch.inference_mode()
    def logit_lens(self, stream_BTD: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Returns the logits (B, T, V) of states of the residual stream (B, T, D) as though they were the last layer's:
        through the final norm and the output head."""
        stream = torch.tensor(stream_BTD, dtype=self.dtype, device=self.device)
        if self.exact:
            adapters = self._whole_adapter(adapter)
            rows = [self._padded_logits(self._running.model.norm(row_TD), adapters) for row_TD in stream]
            return torch.stack(rows).numpy()
        return self.model.logits(self.model.model.norm(stream), self._whole_adapter(adapter)).float().cpu().numpy()

    def _whole_adapter(self, name: str | None) -> Adapters | None:
        """Returns the adapter of a forward pass that all rows go through."""
        return adapter_named(self._adapters, self.default if name is None else name)


def hidden_states(
    model: Llama, tokens_1T: Tensor, step: PagedStep, rows: Sequence[int], adapters: Adapters | None
) -> Tensor:
    """Returns the states (R, D) after the final norm at some `rows` of the tokens; all keys and values go into the
    memory."""
    every = len(rows) == tokens_1T.shape[1]
    rows_R = None if every else torch.tensor(rows, dtype=torch.int64, device=tokens_1T.device)
    return model.hidden(tokens_1T, cache=step, adapters=adapters, rows_R=rows_R)[0]


def load_runner(
    model: Path | str,
    dtype: str = "auto",
    device: str = "auto",
    threads: int = 0,
    exact: bool = False,
    adapters: Mapping[str, Path] | None = None,
) -> TorchRunner:
    """Returns a runner over a model directory, or over the best checkpoint of a run directory; of an adapter's, over
    its base with that adapter. `adapters` are further ones over the same base, each for the chunks that name it.

    `dtype` is that of weights and cache: a name in DTYPES, or "auto" for that of the file (bfloat16 for the
    activations of a quantised one, whose kernels take no other; float32 on a CPU without instructions for the
    file's). `device` is PyTorch's, or "auto" for a GPU where there is one. `threads` 0 leaves PyTorch's own choice.
    `exact` means float32 on the CPU.
    """
    if exact:
        dtype, device = ("float32" if dtype == "auto" else dtype), ("cpu" if device == "auto" else device)
    if threads > 0:
        torch.set_num_threads(threads)
    device = choose_device(device)
    kernels = choose_kernels() if device == "cpu" and not exact else NO_KERNELS
    # Kernels of our own take any type.
    widens = kernels.instructions is not None and not processor.multiplies("bfloat16")
    opened = open_model(
        model, dtype, adapters, on_cpu=device == "cpu", quantized_dtype="float32" if widens else "bfloat16"
    )
    if opened.config.quantization and dtype == "float32" and kernels.instructions is not None:
        kernels = Choice(None, "float32 was asked for, and kernels of our own would round activations to bytes")
    if exact:
        built = build_model(opened.config, opened.arrays, dtype=DTYPES[opened.dtype], device=device)
    else:
        built = build_reordered(
            opened.config,
            opened.arrays,
            dtype=DTYPES[opened.dtype],
            device=device,
            instructions=kernels.instructions,
            packed=dtype == "auto",
        )
    runner = TorchRunner(built, exact, opened.adapters, opened.default)
    runner.dtype_reason, runner.kernels = opened.dtype_reason, kernels.shown
    if numbers := {weight.form.numbers for weight in weights_held_in_blocks(built)}:
        runner.kernels += f" over weights in {' and '.join(sorted(numbers))}"
    if runner.cache_dtype != runner.dtype:
        runner.kernels += f", keys and values in {str(runner.cache_dtype).removeprefix('torch.')}"
    return runner


def runner_over(config: ModelConfig, arrays: Mapping[str, HostArray], dtype: str = "float32") -> TorchRunner:
    """Returns a runner over host arrays, on the CPU."""
    return TorchRunner(build_reordered(config, arrays, dtype=DTYPES[dtype]))
