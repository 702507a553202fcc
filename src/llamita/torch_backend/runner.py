"""Runs the plans of an inference engine on a PyTorch model, over one contiguous key/value cache.

The engine decides which tokens run and where; here they are run. `prefill` and `decode_one_token` hold all that happens
between tokens and logits, so that they are the units to compile or to replace by faster kernels. Deliberately knows
nothing of requests, text, or when to stop.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita import architecture, checkpoint
from llamita.checkpoint import HostArray
from llamita.config import ModelConfig
from llamita.plan import Plan, SampledToken, ScheduledChunk, StepResult
from llamita.torch_backend.kv_cache import KVCache
from llamita.torch_backend.model import Llama
from llamita.torch_backend.sampling import sample
from llamita.torch_backend.weights import build_model, to_host_arrays

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchRunner:
    """Does an engine's plans with `model`, which it neither copies nor changes; dropout is off meanwhile.

    One sequence at a time: a chunk that starts at 0 begins a new one, and a chunk that starts earlier than the cache is
    long goes on from there. `reserve` makes room before a sequence begins.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        weight = model.model.norm.weight  # never quantised: its type is that of the activations and of the cache
        self.dtype, self.device = weight.dtype, weight.device
        self.cache = self._new_cache(1)
        read = list(model.parameters())
        if self.config.num_labels or not self.config.tie_word_embeddings:  # of an embedding alone, one row is read
            read = [parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name]
        self.weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in read)
        """Bytes of weights that decoding one token reads."""
        self.kv_bytes_per_token = architecture.kv_bytes_per_token(self.config, weight.element_size())
        """Bytes of keys and values that one earlier position adds to what decoding a token reads."""

    def weights(self) -> dict[str, HostArray]:
        """The values under canonical names, in the type they have here."""
        return to_host_arrays(self.model)

    def reserve(self, positions: int) -> None:
        """Make the cache hold at least so many positions; what it held is forgotten where it has to grow."""
        if positions > self.cache.capacity:
            self.cache = self._new_cache(positions)

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Run every chunk, in order, and sample a token after those that ask for one."""
        with evaluation(self.model):
            return StepResult(tuple(self._run_chunk(chunk) for chunk in plan.chunks))

    @torch.inference_mode()
    def forward(
        self, tokens_BT: Sequence[Sequence[int]] | np.ndarray, capture: Sequence[str] = ()
    ) -> dict[str, np.ndarray]:
        """Logits of every position, and the residual stream at named places, as float32 arrays.

        Returns `logits` (B, T, V) and each name in `capture` (B, T, D): `embedding`, `layers.0`, `layers.1`, ...,
        `norm`. Nothing is cached. Raises ValueError for an unknown name.
        """
        captured: dict[str, Tensor] = {}

        def trace(name: str, x_BTD: Tensor) -> None:
            if name in capture:
                captured[name] = x_BTD

        tokens = torch.as_tensor(np.asarray(tokens_BT, dtype=np.int64), device=self.device)
        with evaluation(self.model):
            logits_BTV = self.model(tokens, trace=trace).logits_BTV
        unknown = [name for name in capture if name not in captured]
        if unknown:
            raise ValueError(
                f"capture={unknown[0]!r} is unknown; there are embedding, layers.0, layers.1, ... and norm"
            )
        return {name: x.float().cpu().numpy() for name, x in {**captured, "logits": logits_BTV}.items()}

    def _run_chunk(self, chunk: ScheduledChunk) -> tuple[SampledToken, ...]:
        self.cache.truncate(chunk.start)
        tokens_1T = torch.tensor([chunk.tokens], device=self.device)
        logits_1V: Tensor | None
        if len(chunk.tokens) == 1:
            with fast_single_row(self.device, self.dtype):
                logits_1V = decode_one_token(self.model, self.cache, tokens_1T)
        else:
            logits_1V = prefill(self.model, self.cache, tokens_1T, with_logits=bool(chunk.samples))
        return () if not chunk.samples or logits_1V is None else tuple(sample(logits_1V, chunk.samples))

    def _new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.config, 1, capacity, self.dtype, self.device)


def prefill(model: Llama, cache: KVCache, tokens_1T: Tensor, with_logits: bool) -> Tensor | None:
    """Append the tokens (1, T) to the cache; logits (1, V) after the last one, if wanted."""
    hidden_1TD = model.hidden(tokens_1T, cache=cache)
    return model.logits(hidden_1TD[:, -1]) if with_logits else None


def decode_one_token(model: Llama, cache: KVCache, token_11: Tensor) -> Tensor:
    """Append one token (1, 1) to the cache; logits (1, V) after it."""
    return model.logits(model.hidden(token_11, cache=cache)[:, -1])


def load_runner(model: Path | str, dtype: str = "auto", device: str = "auto", threads: int = 0) -> TorchRunner:
    """A runner over a model directory, or over the best checkpoint of a run directory.

    `dtype` is that of weights and cache: a name in DTYPES, or "auto" for that of the file (bfloat16 for the activations
    of a quantised one, whose kernels take no other). `device` is PyTorch's, or
    "auto" for a GPU where there is one. `threads` 0 leaves PyTorch's own choice.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; give auto or one of {', '.join(DTYPES)}")
    device = choose_device(device)
    directory = checkpoint.resolve_model_directory(model)
    arrays = checkpoint.load_tensors(directory)
    config = checkpoint.load_config(directory)
    if dtype == "auto":
        stored = "BF16" if config.quantization else next((array.dtype for array in arrays.values()), "F32")
        dtype = checkpoint.DTYPE_NAMES.get(stored, "float32")
    return TorchRunner(build_model(config, arrays, dtype=DTYPES.get(dtype, torch.float32), device=device).eval())


def runner_over(config: ModelConfig, arrays: Mapping[str, HostArray], dtype: str = "float32") -> TorchRunner:
    """A runner over host arrays, on the CPU."""
    return TorchRunner(build_model(config, arrays, dtype=DTYPES[dtype]).eval())


def choose_device(name: str) -> str:
    """A PyTorch device by name, or a GPU if there is one for "auto"; ValueError where it cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}); give auto, cpu, or cuda on a GPU") from None
    return name


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@contextlib.contextmanager
def fast_single_row(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """The settings under which PyTorch multiplies a single row fastest.

    On a CPU, oneDNN reads bfloat16 weights at half the speed of PyTorch's own matrix-vector product.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
