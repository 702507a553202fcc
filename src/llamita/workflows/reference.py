"""Log-probabilities of pairs of answers under the model before tuning: computed once, and kept in the run's directory.

RUN/reference.safetensors holds the log-probabilities, RUN/reference.json its hash and the hash of what they are of. A
resumed run reads them; damaged ones, and those of anything else, are computed anew. Knows nothing of objectives.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from llamita.data.batches import Batch, evaluation_batches
from llamita.data.preferences import PairRows
from llamita.model.host_array import HostArray
from llamita.storage import files, safetensors
from llamita.training.run_directory import RunDirectory

NAME = "reference"

LogProbs = Callable[[Batch], np.ndarray]
"""The log-probability of every scored label of a batch, float32 (B, T), 0 elsewhere."""


def attach(
    run: RunDirectory,
    rows: Mapping[str, PairRows],
    base: str,
    log_probs: LogProbs,
    batch_size: int,
    means: bool,
    report: Callable[[str], None],
) -> None:
    """Give the pairs of each split their reference: sums over an answer's tokens, or `means`.

    `base` is the hash of the model that `log_probs` asks. It is asked only where the run does not hold its answers.
    """
    digests = {split: part.pairs.digest() for split, part in rows.items()}
    of = hashlib.sha256(json.dumps([base, digests], sort_keys=True).encode()).hexdigest()
    lengths = {split: len(part) for split, part in rows.items()}
    sums = run.group.first(lambda: _read(run.file, of, lengths, report))
    if sums is None:
        sums = {split: score(part, log_probs, batch_size) for split, part in rows.items()}
        run.group.first(lambda: _write(run.file, of, sums))
        report(f"reference: {sum(map(len, rows.values())):,} pairs scored with the model before tuning")
    for split, part in rows.items():
        part.pairs.reference_N2 = sums[split] / part.pairs.lengths_N2 if means else sums[split]


def score(rows: PairRows, log_probs: LogProbs, batch_size: int) -> np.ndarray:
    """The summed log-probabilities of the chosen and the rejected answer of each pair, float32 (N, 2)."""
    found = [np.zeros((0, 2), dtype=np.float32)]
    for batch in evaluation_batches(rows, batch_size):
        rejected = replace(
            batch, tokens_BT=batch.extras["rejected_tokens_BT"], labels_BT=batch.extras["rejected_labels_BT"], extras={}
        )
        sums = [log_probs(side).sum(-1, dtype=np.float64) for side in (replace(batch, extras={}), rejected)]
        found.append(np.stack(sums, axis=1).astype(np.float32))
    return np.concatenate(found)


def _write(file: Callable[[str], Path], of: str, sums: Mapping[str, np.ndarray]) -> None:
    """The numbers first: without the record beside them, or with another's, they are not read."""
    with files.atomic_file(file(f"{NAME}.safetensors"), overwrite=True) as temporary:
        safetensors.write_safetensors(temporary, {name: HostArray.from_numpy(array) for name, array in sums.items()})
        digest = files.sha256(temporary)
    files.atomic_write(file(f"{NAME}.json"), json.dumps({"of": of, "sha256": digest}, indent=2) + "\n")


def _read(
    file: Callable[[str], Path], of: str, lengths: Mapping[str, int], report: Callable[[str], None]
) -> dict[str, np.ndarray] | None:
    """Returns what the run holds; None, with a word where it is not as it was written, where that is no use."""
    numbers, record = file(f"{NAME}.safetensors"), file(f"{NAME}.json")
    if not numbers.exists() and not record.exists():
        return None
    try:
        known = files.read_json(record)
        if known.get("of") != of:
            report(f"{numbers} is of another model or other data, and is computed anew")
            return None
        if files.sha256(numbers) != known.get("sha256"):
            raise ValueError("its SHA-256 differs")
        found = {name: array.to_numpy() for name, array in safetensors.read_safetensors(numbers).items()}
        assert {name: array.shape for name, array in found.items()} == {k: (n, 2) for k, n in lengths.items()}
    except (ValueError, OSError) as error:
        report(f"{numbers} is damaged, and is computed anew: {error}")
        return None
    return found
