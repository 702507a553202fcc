"""Picks a token for each row of logits, every row by parameters of its own, many rows at a time.

In this order: logit bias; repetition, frequency and presence penalties; banned ids and the mask of a grammar;
temperature; top-k; top-p; min-p; and a draw by the Gumbel-max trick. Each is switched off by its neutral value, so that
a temperature alone samples exactly from `softmax(logits / temperature)`. Scores are float64 on the CPU and float32 on
Metal, which has nothing wider; MLX's exponential is good to a millionth in either, so that a token may stand on the
other side of the border of top-p only where its mass is that near. The functions below `Sampler` take a column of
parameters, one a row. All results come over in one piece, and nothing waits before them. Knows nothing of models or
caches.

Letters beyond the usual: R rows, E entries (a row and an id), W words of 32 bits, C the likeliest ids.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from llamita.backend.interface import SampledToken, SampleSpec
from llamita.backend.mlx.infer.noise import GumbelNoise, stream_keys
from llamita.backend.mlx.infer.token_counts import CountedRow, TokenCounts
from llamita.backend.sampling import DROPPED, Steps, allowed_words, banned, biases, rows_by_steps, sampled_token
from llamita.backend.sampling_params import SamplingParams

LARGEST_K = 2**31 - 1
"""The most that top-k can be, since MLX counts in 32 bits; a vocabulary is smaller."""
LIKELIEST = 1024
"""On a CPU, top-p looks for its nucleus among so many tokens before it sorts all."""


class Columns:
    """Parameters of rows as columns [R, 1]; `largest_k` is known to the host."""

    def __init__(self, params: Sequence[SamplingParams], dtype: mx.Dtype = mx.float64) -> None:
        def column(name: str) -> mx.array:
            return mx.array(np.array([[getattr(row, name)] for row in params], dtype=np.float64), dtype=dtype)

        self.temperature_R1, self.top_p_R1, self.min_p_R1 = map(column, ("temperature", "top_p", "min_p"))
        self.repetition_R1 = column("repetition_penalty")
        self.frequency_R1, self.presence_R1 = map(column, ("frequency_penalty", "presence_penalty"))
        self.largest_k = max(row.top_k for row in params)
        self.top_k_R1 = mx.array([[min(row.top_k, LARGEST_K)] for row in params])
        self.any_repetition = any(row.repetition_penalty != 1 for row in params)
        self.any_output_penalty = any(row.frequency_penalty or row.presence_penalty for row in params)
        self.any_top_p, self.any_min_p = any(row.top_p < 1 for row in params), any(row.min_p > 0 for row in params)


class Sampler:
    """Samples for an engine, over a vocabulary of so many ids; keeps counts of the sequences it has penalties for."""

    def __init__(self, vocab_size: int, device: mx.Device | mx.DeviceType = mx.cpu) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.dtype = mx.float64 if device == mx.cpu else mx.float32
        with mx.stream(device):
            self._noise = GumbelNoise(vocab_size, self.dtype)
        self._counts = TokenCounts(vocab_size)

    def sample(
        self, logits_RV: mx.array, specs: Sequence[SampleSpec], sequence_ids: Sequence[int]
    ) -> list[SampledToken]:
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
        groups = rows_by_steps(specs)
        blocks = []
        with mx.stream(self.device):
            for steps, rows in groups.items():
                block_RV = logits_RV if len(groups) == 1 else logits_RV[mx.array(rows)]
                counts = [counts_of[row] for row in rows] if steps.penalized else []
                blocks.append(self._sample_block(block_RV, steps, [specs[row] for row in rows], counts))
            mx.eval(blocks)  # the one wait for the device
        values_of: dict[int, list[float]] = {}
        for rows, block in zip(groups.values(), blocks, strict=True):
            values_of |= zip(rows, np.array(block).tolist(), strict=True)
        return [sampled_token(values_of[row], spec.params.top_logprobs) for row, spec in enumerate(specs)]

    def _sample_block(
        self, logits_RV: mx.array, steps: Steps, specs: Sequence[SampleSpec], counts: Sequence[CountedRow]
    ) -> mx.array:
        """Returns [R, 3 + 2K]: id, log-probability, score; ids and log-probabilities of the K likeliest."""
        wide_RV = logits_RV.astype(self.dtype)
        total_R1 = logsumexp(wide_RV)
        if steps.plain_greedy:
            ids_R1 = mx.argmax(wide_RV, axis=-1, keepdims=True)
            best_R1 = mx.take_along_axis(wide_RV, ids_R1, axis=-1)
        else:
            columns = Columns([spec.params for spec in specs], self.dtype)
            scores_RV = self._score(wide_RV, specs, columns, counts) if steps.scored_anew else wide_RV
            best_R1, ids_R1 = scores_RV.max(axis=-1, keepdims=True), mx.argmax(scores_RV, axis=-1, keepdims=True)
            if not steps.greedy:
                # Subtracting the largest changes no probability and keeps tiny temperatures from overflowing.
                scores_RV = (scores_RV - best_R1) / columns.temperature_R1
                if steps.truncated:
                    scores_RV = truncate(scores_RV, columns)
                keys_R2 = stream_keys([spec.seed for spec in specs], [spec.position for spec in specs])
                ids_R1 = mx.argmax(scores_RV + self._noise.rows(mx.array(keys_R2)), axis=-1, keepdims=True)
        parts = [ids_R1, mx.take_along_axis(wide_RV, ids_R1, axis=-1) - total_R1, best_R1]
        wanted = min(max(spec.params.top_logprobs for spec in specs), self.vocab_size)
        if wanted:
            likeliest_RK = largest_first(wide_RV, wanted)
            values_RK = mx.take_along_axis(wide_RV, likeliest_RK, axis=-1) - total_R1
            parts.append(mx.stack([likeliest_RK.astype(self.dtype), values_RK], axis=-1).flatten(1))
        return mx.concatenate([part.astype(self.dtype) for part in parts], axis=1)

    def _score(
        self, scores_RV: mx.array, specs: Sequence[SampleSpec], columns: Columns, counts: Sequence[CountedRow]
    ) -> mx.array:
        """Returns the logits after bias, penalties and exclusions."""
        if (biased := biases(specs, self.vocab_size)) is not None:
            row_E, id_E, bias_E = biased
            scores_RV = scores_RV.at[mx.array(row_E), mx.array(id_E)].add(mx.array(bias_E, dtype=self.dtype))
        if counts:
            scores_RV = penalize(scores_RV, *self._counts.gather(counts), columns)
        if (dropped := banned(specs, self.vocab_size)) is not None:
            row_E, id_E = dropped
            scores_RV = scores_RV.at[mx.array(row_E), mx.array(id_E)].minimum(DROPPED)
        if (words_RW := allowed_words(specs, self.vocab_size)) is not None:
            scores_RV = mx.where(unpack_bits(mx.array(words_RW), self.vocab_size), scores_RV, DROPPED)
        return scores_RV


def logsumexp(scores_RV: mx.array) -> mx.array:
    """Returns [R, 1], summed in the type of the scores; MLX's own, in float32, is off by 5e-5 over 32,000 ids."""
    largest_R1 = scores_RV.max(axis=-1, keepdims=True)
    return largest_R1 + mx.log(mx.exp(scores_RV - largest_R1).sum(axis=-1, keepdims=True))


def largest_first(scores_RV: mx.array, count: int) -> mx.array:
    """Returns ids [R, count] of the largest scores, in order."""
    ids_RK = mx.argpartition(-scores_RV, count - 1, axis=-1)[:, :count]
    order_RK = mx.argsort(-mx.take_along_axis(scores_RV, ids_RK, axis=-1), axis=-1)
    return mx.take_along_axis(ids_RK, order_RK, axis=-1)


def penalize(scores_RV: mx.array, seen_RV: mx.array, outputs_RV: mx.array, columns: Columns) -> mx.array:
    """Makes tokens less likely that have come before, for a repetition penalty above 1 and others above 0.

    Repetition (prompt and output, `seen_RV`): positive logits are divided by it; negative ones are multiplied, so that
    these fall as well (Keskar et al. 2019, CTRL, arXiv:1909.05858, section 4.1; the multiplication follows
    transformers). Then, as OpenAI's API defines them, over the output alone: the frequency penalty is subtracted once
    for each occurrence, the presence penalty once.
    """
    if columns.any_repetition:
        penalty_RV = mx.where(seen_RV, columns.repetition_R1, 1.0)
        scores_RV = mx.where(scores_RV > 0, scores_RV / penalty_RV, scores_RV * penalty_RV)
    if columns.any_output_penalty:
        scores_RV = scores_RV - columns.frequency_R1 * outputs_RV - columns.presence_R1 * (outputs_RV > 0)
    return scores_RV


def unpack_bits(words_RW: mx.array, size: int) -> mx.array:
    """Returns bool [R, size]: bit i % 32 of int32 word i // 32, for each i."""
    bits_RW32 = (words_RW[..., None] >> mx.arange(32, dtype=mx.int32)) & 1
    return bits_RW32.astype(mx.bool_).flatten(1)[:, :size]


def truncate(scores_RV: mx.array, columns: Columns) -> mx.array:
    """Returns the scores after top-k, top-p and min-p; dropped tokens have -inf."""
    if columns.largest_k:
        scores_RV = keep_top_k(scores_RV, columns.top_k_R1, columns.largest_k)
    if columns.any_top_p:
        scores_RV = keep_top_p(scores_RV, columns.top_p_R1)
    return drop_below_min_p(scores_RV, columns.min_p_R1) if columns.any_min_p else scores_RV


def keep_top_k(scores_RV: mx.array, k_R1: mx.array, largest: int) -> mx.array:
    """Keeps the k largest scores, and any equal to the k-th (Fan et al. 2018, arXiv:1805.04833); 0 keeps all.

    `largest` is the largest k.
    """
    largest = min(largest, scores_RV.shape[-1])
    values_RK = mx.sort(mx.topk(scores_RV, largest, axis=-1), axis=-1)  # the smallest first
    smallest_kept_R1 = mx.take_along_axis(values_RK, mx.clip(largest - k_R1, 0, largest - 1), axis=-1)
    return mx.where((scores_RV < smallest_kept_R1) & (k_R1 > 0), DROPPED, scores_RV)


def keep_top_p(scores_RV: mx.array, p_R1: mx.array) -> mx.array:
    """Keeps the nucleus: the smallest set of most probable tokens whose mass is at least p, never none; 1 keeps all.

    Of equally probable tokens at the border, those with the smaller ids stay (Holtzman et al. 2019, arXiv:1904.09751).
    """
    probabilities_RV = mx.exp(scores_RV - logsumexp(scores_RV))
    sorted_RC = most_probable(probabilities_RV, p_R1)
    before_RC = mx.cumsum(sorted_RC, axis=-1) - sorted_RC
    needed_R1 = mx.maximum((before_RC < p_R1).sum(axis=-1, keepdims=True), 1)
    border_R1 = mx.take_along_axis(sorted_RC, needed_R1 - 1, axis=-1)
    above_RV, equal_RV = probabilities_RV > border_R1, probabilities_RV == border_R1
    places_R1 = needed_R1 - above_RV.sum(axis=-1, keepdims=True)
    kept_RV = above_RV | (equal_RV & (mx.cumsum(equal_RV.astype(mx.int32), axis=-1) <= places_R1))
    return mx.where(kept_RV | (p_R1 >= 1), scores_RV, DROPPED)


def most_probable(probabilities_RV: mx.array, p_R1: mx.array) -> mx.array:
    """Returns probabilities in falling order: all, or so many that they hold the mass p of each row that has one."""
    if probabilities_RV.dtype == mx.float64 and probabilities_RV.shape[-1] > 4 * LIKELIEST:
        # Float64 is the CPU, where a look at the numbers waits for nobody, and sorting all takes longest.
        likeliest_RC = mx.topk(probabilities_RV, LIKELIEST, axis=-1)
        if mx.all((likeliest_RC.sum(axis=-1, keepdims=True) > p_R1 + 1e-9) | (p_R1 >= 1)).item():
            return -mx.sort(-likeliest_RC, axis=-1)
    return -mx.sort(-probabilities_RV, axis=-1)


def drop_below_min_p(scores_RV: mx.array, min_p_R1: mx.array) -> mx.array:
    """Drops tokens less probable than `min_p` times the most probable one (Nguyen et al. 2024, arXiv:2407.01082)."""
    threshold_R1 = scores_RV.max(axis=-1, keepdims=True) + mx.log(min_p_R1)
    return mx.where(scores_RV < threshold_R1, DROPPED, scores_RV)
