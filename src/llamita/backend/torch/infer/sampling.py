"""Picks a token for each row of logits, every row by parameters of its own, many rows at a time.

In this order: logit bias; repetition, frequency and presence penalties; banned ids and the mask of a grammar;
temperature; top-k; top-p; min-p; and a draw by the Gumbel-max trick. Each is switched off by its neutral value, so that
a temperature alone samples exactly from `softmax(logits / temperature)`. What is kept is decided in float64, so that it
does not depend on rounding. The functions below `Sampler` take a column of parameters, one a row. On a device nothing
waits for the host before the results, which come over in one piece. Knows nothing of models or caches.

Letters beyond the usual: R rows, E entries (a row and an id), W words of 32 bits, C some ids, K the largest scores.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llamita.backend.interface import SampledToken, SampleSpec
from llamita.backend.sampling import DROPPED, Steps, allowed_words, banned, biases, rows_by_steps, sampled_token
from llamita.backend.sampling_params import SamplingParams
from llamita.backend.torch.infer.few import kept_ids
from llamita.backend.torch.infer.noise import GumbelNoise, stream_keys
from llamita.backend.torch.infer.token_counts import CountedRow, TokenCounts, to_device

CPU_BLOCK = 1 << 18
"""Float64 scores taken at a time on a CPU, so that they stay in its cache. A device takes BLOCK of them."""
BLOCK = 1 << 25
Drawer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores [R, V], codes of the ids [V], keys of the rows [R, 2]) -> ids [R, 1], as `GumbelNoise` decides them."""


class Columns:
    """Parameters of rows as columns [R, 1] on a device; `largest_k` is known to the host."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        names = ("temperature", "top_k", "top_p", "min_p")
        penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        table = np.array([[getattr(row, name) for name in names + penalties] for row in params], dtype=np.float64)
        columns = to_device(table, device).split(1, dim=1)
        self.temperature_R1, self.top_k_R1, self.top_p_R1, self.min_p_R1 = columns[:4]
        self.repetition_R1, self.frequency_R1, self.presence_R1 = columns[4:]
        self.largest_k = max(row.top_k for row in params)
        self.any_repetition = any(row.repetition_penalty != 1 for row in params)
        self.any_output_penalty = any(row.frequency_penalty or row.presence_penalty for row in params)
        self.any_top_p, self.any_min_p = any(row.top_p < 1 for row in params), any(row.min_p > 0 for row in params)


class Sampler:
    """Samples for an engine, over a vocabulary of so many ids; keeps counts of the sequences it has penalties for.

    `drawer` draws from rows of which nothing is truncated; without it, noise is made for all ids.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu", drawer: Drawer | None = None) -> None:
        self.vocab_size, self.device, self._drawer = vocab_size, torch.device(device), drawer
        self._noise = GumbelNoise(vocab_size, device)
        self._counts = TokenCounts(vocab_size, self.device)

    def warm_up(self) -> None:
        """Compiles the drawer, or reads it from disk, before the first request waits for it."""
        if self._drawer is not None:
            scores_1V = torch.zeros(1, self.vocab_size, dtype=torch.float64)
            self._drawer(scores_1V, self._noise.codes_V, torch.from_numpy(stream_keys([0], [0])))

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, specs: Sequence[SampleSpec], sequence_ids: Sequence[int]) -> list[SampledToken]:
        """Picks a token for each row as its spec asks, with its natural log-probability under `softmax(logits)`.

        A row's token depends on its own logits and spec alone. Rows of one sequence have the same id; the counts of
        sequences that are not in a call are forgotten. A row that holds NaN or infinity, as the logits of broken
        weights do, gets an error in its token's place, as does one of which banned ids and mask leave no token.
        ValueError for a bias outside the vocabulary.
        """
        assert logits_RV.shape == (len(specs), self.vocab_size), (logits_RV.shape, len(specs), self.vocab_size)
        assert len(specs) == len(sequence_ids)
        readers = [row for row, spec in enumerate(specs) if spec.params.reads_history]
        counted = self._counts.update([specs[row] for row in readers], [sequence_ids[row] for row in readers])
        counts_of = dict(zip(readers, counted, strict=True))
        if not specs:
            return []
        order: list[int] = []
        blocks: list[Tensor] = []
        for steps, rows in self._blocks(specs):
            block_RV = logits_RV if rows == list(range(len(specs))) else logits_RV[self._index(rows)]
            counts = [counts_of[row] for row in rows] if steps.penalized else []
            blocks.append(self._sample_block(block_RV, steps, [specs[row] for row in rows], counts))
            order += rows
        width = max(block.shape[1] for block in blocks)
        results = torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1])) for block in blocks])
        values_of = dict(zip(order, results.tolist(), strict=True))  # the one wait for the device
        return [sampled_token(values_of[row], spec.params.top_logprobs) for row, spec in enumerate(specs)]

    def _blocks(self, specs: Sequence[SampleSpec]) -> Iterator[tuple[Steps, list[int]]]:
        """Yields the rows that have their steps in common, not too many at a time."""
        for steps, rows in rows_by_steps(specs).items():
            block = CPU_BLOCK if self.device.type == "cpu" and not steps.plain_greedy else BLOCK
            size = max(1, block // self.vocab_size)
            for start in range(0, len(rows), size):
                yield steps, rows[start : start + size]

    def _sample_block(
        self, logits_RV: Tensor, steps: Steps, specs: Sequence[SampleSpec], counts: Sequence[CountedRow]
    ) -> Tensor:
        """Returns float64 [R, 3 + 2K]: id, log-probability, score; ids and log-probabilities of the K likeliest."""
        logprobs_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
        if steps.plain_greedy:
            best_R1, ids_R1 = logits_RV.max(dim=-1, keepdim=True)
        else:
            columns = Columns([spec.params for spec in specs], self.device)
            scores_RV = logits_RV.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            if steps.scored_anew:
                scores_RV = self._score(scores_RV, specs, columns, counts)
            if steps.greedy:
                best_R1, ids_R1 = scores_RV.max(dim=-1, keepdim=True)
            else:
                best_R1 = scores_RV.amax(dim=-1, keepdim=True)
                keys = stream_keys([spec.seed for spec in specs], [spec.position for spec in specs])
                # Subtracting the largest changes no probability and keeps tiny temperatures from overflowing.
                scores_RV = scores_RV.sub_(best_R1).div_(columns.temperature_R1)
                ids_R1 = self._drawn(scores_RV, specs, columns, self._to_device(keys), steps.truncated)
        parts = [ids_R1, logprobs_RV.gather(1, ids_R1), best_R1]
        wanted = min(max(spec.params.top_logprobs for spec in specs), self.vocab_size)
        if wanted:
            likeliest = logprobs_RV.topk(wanted, dim=-1)
            parts.append(torch.stack([likeliest.indices.double(), likeliest.values.double()], dim=-1).flatten(1))
        return torch.cat([part.double() for part in parts], dim=1)

    def _drawn(
        self, scores_RV: Tensor, specs: Sequence[SampleSpec], columns: Columns, keys_R2: Tensor, truncated: bool
    ) -> Tensor:
        """Returns ids [R, 1] drawn from softmax(scores), of which the largest are 0."""
        if truncated and self.device.type == "cpu":
            return self._drawn_of_few(scores_RV, specs, keys_R2)
        if truncated:
            scores_RV = truncate(scores_RV, columns)
        elif self._drawer is not None:
            return self._drawer(scores_RV, self._noise.codes_V, keys_R2)
        return self._noise.rows(keys_R2).add_(scores_RV).argmax(dim=-1, keepdim=True)

    def _drawn_of_few(self, scores_RV: Tensor, specs: Sequence[SampleSpec], keys_R2: Tensor) -> Tensor:
        """Returns ids [R, 1] drawn, on a CPU, from what truncation keeps of the scores."""
        ids_R1 = torch.zeros(len(scores_RV), 1, dtype=torch.int64)
        for row, scores_V in enumerate(scores_RV):
            ids_C = torch.from_numpy(kept_ids(scores_V.numpy(), specs[row].params))
            if len(ids_C):  # else nothing may come: the caller says so
                noise_C = self._noise.rows(keys_R2[row : row + 1], ids_C)[0]
                ids_R1[row] = ids_C[noise_C.add_(scores_V[ids_C]).argmax()]
        return ids_R1

    def _score(
        self, scores_RV: Tensor, specs: Sequence[SampleSpec], columns: Columns, counts: Sequence[CountedRow]
    ) -> Tensor:
        """Returns the logits after bias, penalties and exclusions."""
        if (biased := biases(specs, self.vocab_size)) is not None:
            row_E, id_E, bias_E = biased
            places_E = self._to_device(row_E * self.vocab_size + id_E)
            scores_RV.view(-1).index_add_(0, places_E, self._to_device(bias_E.astype(np.float64)))
        if counts:
            scores_RV = penalize(scores_RV, *self._counts.gather(counts), columns)
        if (dropped := banned(specs, self.vocab_size)) is not None:
            row_E, id_E = dropped
            scores_RV.view(-1).index_fill_(0, self._to_device(row_E * self.vocab_size + id_E), DROPPED)
        if (words_RW := allowed_words(specs, self.vocab_size)) is not None:
            scores_RV = scores_RV.masked_fill_(~unpack_bits(self._to_device(words_RW), self.vocab_size), DROPPED)
        return scores_RV

    def _index(self, numbers: list[int]) -> Tensor:
        return self._to_device(np.array(numbers, dtype=np.int64))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)


def penalize(scores_RV: Tensor, seen_RV: Tensor, outputs_RV: Tensor, columns: Columns) -> Tensor:
    """Makes tokens less likely that have come before, for a repetition penalty above 1 and others above 0.

    Repetition (prompt and output, `seen_RV`): positive logits are divided by it; negative ones are multiplied, so that
    these fall as well (Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1; the multiplication follows
    transformers). Then, as OpenAI's API defines them, over the output alone: the frequency penalty is subtracted once
    for each occurrence, the presence penalty once.
    """
    if columns.any_repetition:
        penalty_RV = torch.where(seen_RV, columns.repetition_R1, 1.0)
        scores_RV = torch.where(scores_RV > 0, scores_RV / penalty_RV, scores_RV * penalty_RV)
    if columns.any_output_penalty:
        scores_RV = scores_RV - columns.frequency_R1 * outputs_RV - columns.presence_R1 * (outputs_RV > 0)
    return scores_RV


def unpack_bits(words_RW: Tensor, size: int) -> Tensor:
    """Returns bool [R, size]: bit i % 32 of int32 word i // 32, for each i."""
    bytes_RW1 = words_RW.view(torch.uint8).unsqueeze(-1)  # the lowest byte first, on every machine that runs this
    bits_8 = torch.arange(8, dtype=torch.uint8, device=words_RW.device)
    return ((bytes_RW1 >> bits_8) & 1).bool().flatten(1)[:, :size]


def truncate(scores_RV: Tensor, columns: Columns) -> Tensor:
    """Returns the scores after top-k, top-p and min-p; dropped tokens have -inf."""
    if columns.largest_k:
        scores_RV = keep_top_k(scores_RV, columns.top_k_R1, columns.largest_k)
    if columns.any_top_p:
        scores_RV = keep_top_p(scores_RV, columns.top_p_R1)
    return drop_below_min_p(scores_RV, columns.min_p_R1) if columns.any_min_p else scores_RV


def keep_top_k(scores_RV: Tensor, k_R1: Tensor, largest: int) -> Tensor:
    """Keeps the k largest scores, and any equal to the k-th (Fan et al. 2018, arXiv:1805.04833); 0 keeps all.

    `largest` is the largest k.
    """
    largest = min(largest, scores_RV.shape[-1])
    values_RK = scores_RV.topk(largest, dim=-1).values
    smallest_kept_R1 = values_RK.gather(1, (k_R1.long() - 1).clamp(0, largest - 1))
    return scores_RV.masked_fill((scores_RV < smallest_kept_R1) & (k_R1 > 0), DROPPED)


def keep_top_p(scores_RV: Tensor, p_R1: Tensor) -> Tensor:
    """Keeps the nucleus: the smallest set of most probable tokens whose mass is at least p, never none; 1 keeps all.

    Of equally probable tokens at the border, those with the smaller ids stay (Holtzman et al. 2019, arXiv:1904.09751).
    """
    kept_RV = nucleus(scores_RV.softmax(dim=-1), p_R1)
    return scores_RV.masked_fill(~kept_RV & (p_R1 < 1), DROPPED)


def nucleus(probabilities_RC: Tensor, p_R1: Tensor) -> Tensor:
    """Returns bool [R, C]: whether a token is needed, the most probable first, to reach the mass p."""
    sorted_RC, order_RC = probabilities_RC.sort(dim=-1, descending=True, stable=True)
    kept_RC = torch.ones_like(sorted_RC, dtype=torch.bool)
    kept_RC[:, 1:] = sorted_RC.cumsum(dim=-1)[:, :-1] < p_R1  # the tokens before it do not suffice
    return kept_RC.scatter(1, order_RC, kept_RC)


def drop_below_min_p(scores_RV: Tensor, min_p_R1: Tensor) -> Tensor:
    """Drops tokens less probable than `min_p` times the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    threshold_R1 = scores_RV.amax(dim=-1, keepdim=True) + min_p_R1.log()
    return scores_RV.masked_fill(scores_RV < threshold_R1, DROPPED)
