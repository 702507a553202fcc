"""Runs the plans of an inference engine on a model whose modules somebody has written in the course.

Their attention keeps no keys and values, so the engine's memory holds the token itself at each position, and a step
computes a sequence from its first token again wherever logits are wanted. Blocks, the prefix cache, preemption and
guesses ahead work as ever, since tokens are shared and moved as keys and values would be. Of a prompt that is read in
chunks, only the last costs anything; guesses (`--draft lookup`) read a text once for several tokens.

Letters beyond the usual: R rows of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from llamita.backend.step_layout import LEAST_ALIKE, States, StepLayout, begins, sample_chunks, score_chunks
from llamita.backend.torch.infer.sampling import Sampler
from llamita.backend.torch.own.model import FORM, OwnModel
from llamita.model.config import ModelConfig
from llamita.model.host_array import HostArray

MEMORY_BYTES = 1 << 19
"""For the tokens of an engine's sequences. A draft model beside it takes keys and values for as many positions."""
MOST_SCORES = 1 << 22
"""Most scores of a head's queries over keys in one pass over several sequences: it bounds the memory that one takes."""


@dataclass
class TextMemory:
    """The memory of one engine: a token at each slot of its blocks, and the sampler's counts."""

    block_size: int
    tokens: np.ndarray
    sampler: Sampler

    def slots(self, table: np.ndarray, start: int, end: int) -> np.ndarray:
        """Returns the slots of positions start to end - 1 of a sequence with this table of blocks."""
        positions = np.arange(start, end)
        return table[positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size


class OwnRunner:
    """Runs an engine's plans with `model`, which it neither copies nor changes; without dropout, in float32."""

    dtype_name = "float32"
    dtype_reason = "the course's code computes in it"
    kernels = "the course's code, which reads the whole text again for each token"

    def __init__(self, model: OwnModel) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        parameters = [(fused.name, fused.parameter) for fused in model.fused_parameters()]
        self.device = parameters[0][1].device
        self.weight_bytes = bytes_read_per_token(self.config, ((name, value.nbytes) for name, value in parameters))
        self.kv_bytes_per_token = np.dtype(np.int64).itemsize
        """Bytes of an earlier position: its token."""

    @property
    def cache_budget(self) -> int:
        """Bytes that the tokens of sequences may take where nothing else is said."""
        return MEMORY_BYTES

    def weights(self) -> Mapping[str, HostArray]:
        """Returns the values under canonical names."""
        return self.model.host_arrays()

    def allocate(self, layout: CacheLayout, sequences: int = 0) -> TextMemory:
        """Returns memory for the sequences of one engine."""
        assert layout.windows == (0,), "windows are refused before"
        tokens = np.zeros(layout.blocks * layout.block_size, dtype=np.int64)
        return TextMemory(layout.block_size, tokens, Sampler(self.config.vocab_size, self.device))

    @torch.inference_mode()
    def run(self, plan: Plan, memory: TextMemory) -> StepResult:
        """Writes the tokens of every chunk, samples the tokens and scores the targets that they ask for."""
        blocks = memory.tokens.reshape(-1, memory.block_size)
        for copy in plan.copies:
            blocks[copy.target] = blocks[copy.source]
        for chunk in plan.chunks:
            memory.tokens[memory.slots(chunk.tables[0], chunk.start, chunk.end)] = chunk.tokens
        if not plan.chunks:
            return StepResult(())
        layout = StepLayout.of(plan.chunks)
        for chunk in layout.chunks:
            adapter_named({}, chunk.adapter)  # refuses a name
        states = self._states(layout, memory)

        def draw(rows: list[int], specs: list[SampleSpec], ids: list[int]) -> list[SampledToken]:
            return memory.sampler.sample(self._logits(states, rows), specs, ids)

        def score(rows: list[int], places: list[int], ids: list[int], top: int) -> tuple[list[float], list[Likeliest]]:
            logprobs_RV = self._logits(states, rows).log_softmax(-1)
            found = logprobs_RV.topk(min(top, logprobs_RV.shape[1]), dim=-1)
            pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            likeliest = [tuple(zip(row, values, strict=True)) for row, values in pairs] if top else []
            return logprobs_RV[places, ids].tolist(), likeliest

        sampled = sample_chunks(layout.chunks, draw)
        return layout.result(sampled, score_chunks(layout.chunks, score))

    def _states(self, layout: StepLayout, memory: TextMemory) -> States[Tensor]:
        """Returns the states of the rows that are wanted, each sequence read from its first token."""
        wanted = [(chunk, begin, offsets) for chunk, begin in begins(layout.chunks) if (offsets := _offsets(chunk))]
        place_of_row: dict[int, int] = {}
        found: list[Tensor] = []
        for group in _alike(wanted):
            longest = group[-1][0].end
            tokens_BT = np.zeros((len(group), longest), dtype=np.int64)  # what comes after a text changes nothing in it
            for row, (chunk, _, _) in zip(tokens_BT, group, strict=True):
                row[: chunk.end] = memory.tokens[memory.slots(chunk.tables[0], 0, chunk.end)]
            hidden_BTD = self.model.hidden(torch.from_numpy(tokens_BT).to(self.device))
            for hidden_TD, (chunk, begin, offsets) in zip(hidden_BTD, group, strict=True):
                for offset in offsets:
                    place_of_row[begin + offset] = len(found)
                    found.append(hidden_TD[chunk.start + offset])
        hidden_RD = torch.stack(found) if found else torch.zeros(0, self.config.hidden_size)
        return States(hidden_RD, place_of_row, layout.adapters(None))

    def _logits(self, states: States[Tensor], rows: Sequence[int]) -> Tensor:
        return self.model.logits(states.hidden_RD[states.places(rows)]).float()

    @torch.inference_mode()
    def forward(
        self,
        tokens_BT: Sequence[Sequence[int]] | np.ndarray,
        capture: Sequence[str] = (),
        adapter: str | None = None,
        logits: WantedLogits = "all",
    ) -> dict[str, np.ndarray]:
        """Returns `logits` and each place in `capture`, as float32 arrays; attention is computed out of sight.

        A classifier reads each beginning of a text for itself, so that "all" its logits take as many passes as the
        texts have tokens.
        """
        attention_of, positions = layers_of_attention(capture, self.config), positions_of_logits(logits)
        if attention_of:
            raise ValueError(f"{FORM} does not show its attention; capture the residual stream, or leave --with out")
        adapter_named({}, adapter)  # refuses a name
        found: dict[str, np.ndarray] = {}

        def trace(name: str, x: Tensor) -> None:
            if name in capture:
                found[name] = x.float().cpu().numpy()

        tokens = torch.as_tensor(token_array(tokens_BT, self.config.vocab_size), device=self.device)
        if self.config.num_labels and positions is not None:
            ends = range(1, tokens.shape[1] + 1)[positions]
            each = [self.model.label_log_probs(tokens[:, :end]) for end in ends]
            found["logits"] = torch.stack(each, dim=1).cpu().numpy()
        if capture or not self.config.num_labels:
            hidden_BTD = self.model.hidden(tokens, trace=trace if capture else None)
            if positions is not None and not self.config.num_labels:
                found["logits"] = self.model.logits(hidden_BTD[:, positions]).float().cpu().numpy()
        return found

    @torch.inference_mode()
    def label_log_probs(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the log-probability of each label of whole texts, float32 (B, labels), by their classifier."""
        tokens_BT = np.full((len(texts), max(map(len, texts))), self.model.pad_id, dtype=np.int64)
        for row, ids in zip(tokens_BT, texts, strict=True):
            row[: len(ids)] = ids
        found: np.ndarray = self.model.label_log_probs(torch.from_numpy(tokens_BT).to(self.device)).cpu().numpy()
        return found

    @torch.inference_mode()
    def logit_lens(self, stream_BTD: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """Returns the logits (B, T, V) of states of the residual stream (B, T, D) as though they were the last layer's:
        through their final norm and their output layer."""
        adapter_named({}, adapter)
        stream = torch.tensor(stream_BTD, dtype=torch.float32, device=self.device)
        with self.model.program.guard():
            normed = self.model.model.norm(stream)
        found: np.ndarray = self.model.logits(normed).float().cpu().numpy()
        return found


Wanted = tuple[ScheduledChunk, int, list[int]]
"""A chunk, the row of its first token, and the offsets in it after which a token is drawn or scored."""


def _offsets(chunk: ScheduledChunk) -> list[int]:
    drawn = {sample.position - 1 - chunk.start for sample in chunk.samples}
    return sorted(drawn | {target.offset for target in chunk.targets})


def _alike(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """Yields sequences to be read together, shorter ones first: of like length, so that little is padding."""
    group: list[Wanted] = []
    for part in sorted(wanted, key=lambda part: part[0].end):
        end = part[0].end
        if group and (group[0][0].end < LEAST_ALIKE * end or (len(group) + 1) * end * end > MOST_SCORES):
            yield group
            group = []
        group.append(part)
    if group:
        yield group
