"""Runs the plans of an inference engine on a model whose modules somebody has written in the course.

What the model keeps of a text lies in the engine's blocks, whatever it is. So blocks that are shared, copied, given
back and found again serve it as they serve the library's own model: the prefix cache, preemption, several
continuations of a prompt and guesses ahead need nothing of it.

Letters beyond the usual: R rows of a step that logits are made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
from llamita.backend.runner import adapter_named, bytes_read_per_token, layers_of_attention, positions_of_logits
from llamita.backend.step_layout import StepLayout, rows_wanted, sample_chunks, score_chunks
from llamita.backend.torch.infer.sampling import Sampler
from llamita.backend.torch.own.min_llama import MinLlamaModel
from llamita.backend.torch.own.program import Memory, OwnModel
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray


@dataclass
class EngineMemory:
    """The memory of one engine: what the model keeps of its sequences, and the sampler's counts."""

    kept: Memory
    sampler: Sampler


class OwnRunner:
    """Runs an engine's plans with `model`, which it neither copies nor changes; without dropout, in float32."""

    dtype_name = "float32"
    dtype_reason = "the course's code computes in it"

    def __init__(self, model: OwnModel) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        self.kernels = model.kernels
        self.weight_bytes = bytes_read_per_token(self.config, model.sizes())
        self.kv_bytes_per_token = model.kept_bytes_per_token

    @property
    def cache_budget(self) -> int:
        """Bytes that what the model keeps may take where nothing else is said."""
        return self.model.cache_budget

    def weights(self) -> Mapping[str, HostArray]:
        """Returns the values under canonical names."""
        return self.model.host_arrays()

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> EngineMemory:
        """Returns memory for the sequences of one engine."""
        assert layout.windows == (0,), "windows are refused before"
        return EngineMemory(self.model.allocate(layout), Sampler(self.config.vocab_size, self.model.device))

    @torch.inference_mode()
    def run(self, plan: Plan, memory: EngineMemory) -> StepResult:
        """Reads every chunk, samples the tokens and scores the targets that they ask for."""
        memory.kept.copy(plan.copies)
        if not plan.chunks:
            return StepResult(())
        layout = StepLayout.of(plan.chunks)
        for chunk in layout.chunks:
            adapter_named({}, chunk.adapter)  # refuses a name
        wanted = [(chunk, _offsets(chunk)) for chunk in layout.chunks]
        logits_RV = torch.cat(self.model.read(wanted, memory.kept)).float()
        places = {row: place for place, row in enumerate(rows_wanted(layout.chunks))}

        def logits_of(rows: Sequence[int]) -> Tensor:
            return logits_RV[[places[row] for row in rows]]

        def draw(rows: list[int], specs: list[SampleSpec], ids: list[int]) -> list[SampledToken]:
            return memory.sampler.sample(logits_of(rows), specs, ids)

        def score(rows: list[int], at: list[int], ids: list[int], top: int) -> tuple[list[float], list[Likeliest]]:
            logprobs_RV = logits_of(rows).log_softmax(-1)
            found = logprobs_RV.topk(min(top, logprobs_RV.shape[1]), dim=-1)
            pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            likeliest = [tuple(zip(row, values, strict=True)) for row, values in pairs] if top else []
            return logprobs_RV[at, ids].tolist(), likeliest

        sampled = sample_chunks(layout.chunks, draw)
        return layout.result(sampled, score_chunks(layout.chunks, score))

    @torch.inference_mode()
    def forward(
        self,
        tokens_BT: Sequence[Sequence[int]] | np.ndarray,
        capture: Sequence[str] = (),
        adapter: str | None = None,
        logits: WantedLogits = "all",
    ) -> dict[str, np.ndarray]:
        """Returns `logits` and each place in `capture`, as float32 arrays; attention is computed out of sight."""
        attention_of, positions = layers_of_attention(capture, self.config), positions_of_logits(logits)
        if attention_of:
            form = self.model.form
            raise ValueError(f"{form} does not show its attention; capture the residual stream, or leave --with out")
        adapter_named({}, adapter)  # refuses a name
        found: dict[str, np.ndarray] = {}

        def trace(name: str, x: Tensor) -> None:
            if name in capture:
                found[name] = x.float().cpu().numpy()

        tokens = torch.as_tensor(token_array(tokens_BT, self.config.vocab_size), device=self.model.device)
        hidden_BTD = self.model.hidden(tokens, trace=trace if capture else None)
        if positions is not None:
            found["logits"] = self._logits(tokens, hidden_BTD, positions).float().cpu().numpy()
        return found

    def _logits(self, tokens_BT: Tensor, hidden_BTD: Tensor, positions: slice) -> Tensor:
        """Returns the logits at some positions of texts and of their hidden states."""
        return self.model.logits(hidden_BTD[:, positions])

    @torch.inference_mode()
    def logit_lens(self, stream_BTD: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Returns the logits (B, T, V) of states of the residual stream (B, T, D) as though they were the last layer's:
        through their final norm and their output layer."""
        adapter_named({}, adapter)
        stream = torch.tensor(stream_BTD, dtype=torch.float32, device=self.model.device)
        found: np.ndarray = self.model.logits(self.model.norm(stream)).float().cpu().numpy()
        return found


def _offsets(chunk: ScheduledChunk) -> list[int]:
    """Returns the offsets in a chunk after which a token is drawn or scored, in order."""
    drawn = {sample.position - 1 - chunk.start for sample in chunk.samples}
    return sorted(drawn | {target.offset for target in chunk.targets})


class OwnLabeller(OwnRunner):
    """The runner of a classifier, which reads whole texts."""

    model: MinLlamaModel

    @torch.inference_mode()
    def label_log_probs(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the log-probability of each label of whole texts, float32 (B, labels), by their classifier."""
        tokens_BT = np.full((len(texts), max(map(len, texts))), self.model.pad_id, dtype=np.int64)
        for row, ids in zip(tokens_BT, texts, strict=True):
            row[: len(ids)] = ids
        tokens = torch.from_numpy(tokens_BT).to(self.model.device)
        found: np.ndarray = self.model.label_log_probs(tokens).cpu().numpy()
        return found

    def _logits(self, tokens_BT: Tensor, hidden_BTD: Tensor, positions: slice) -> Tensor:
        """Returns the log-probabilities of labels after each beginning of the texts, which is read for itself."""
        ends = range(1, tokens_BT.shape[1] + 1)[positions]
        return torch.stack([self.model.label_log_probs(tokens_BT[:, :end]) for end in ends], dim=1)


def llama_runner(model: MinLlamaModel) -> OwnRunner:
    """Returns a runner over a Llama of theirs, or over their classifier."""
    return OwnLabeller(model) if model.config.num_labels else OwnRunner(model)
