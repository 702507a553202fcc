"""The report on an update that went wrong: what was found, the rows at fault and their text, layers before and at it.

`autopsy` gathers it as a JSON-able dict, `in_words` makes a page of that for a person. Where it is kept, and what
becomes of the run, is not known here.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llamita.backend.interface import Diagnosis, RowDiagnosis
from llamita.backend.train_step import rows_of
from llamita.data.batches import IGNORE_INDEX, Batch
from llamita.data.inspect import marked_text
from llamita.data.packing import Row
from llamita.storage import files
from llamita.text.tokenizer import Tokenizer
from llamita.training.display import printable
from llamita.training.metrics import finite
from llamita.training.spikes import Threshold

FORMAT = 1
HISTORY = 50  # updates before it that are shown
SHOWN, GLIMPSE = 3000, 160  # characters of a suspect row, and of another, on the page


@dataclass(frozen=True)
class Finding:
    """What is wrong with the update of `step`: a loss above its threshold, or a loss or gradient that is not finite."""

    step: int
    kind: Literal["spike", "loss", "gradient"]
    loss: float
    grad_norm: float
    learning_rate: float
    threshold: Threshold | None = None

    def __str__(self) -> str:
        if self.kind == "spike":
            assert self.threshold is not None
            return (
                f"the loss {self.loss:.4g} is a spike: above {self.threshold.limit:.4g}, those before it being about "
                f"{self.threshold.median:.4g}"
            )
        return f"the loss is {self.loss}" if self.kind == "loss" else f"the gradient norm is {self.grad_norm}"


@dataclass(frozen=True)
class Healthy:
    """An earlier update that went well, diagnosed with the weights of the one that did not; `loss` is of its time."""

    step: int
    loss: float
    diagnosis: Diagnosis


@dataclass(frozen=True)
class RowText:
    """The words for the rows of a batch: where each comes from, and its text."""

    tokenizer: Tokenizer | None = None
    origin: Callable[[int], str] | None = None
    label_names: tuple[str, ...] | None = None
    """Of a classifier, whose labels are no tokens; empty where they have no names."""


def autopsy(
    finding: Finding,
    micro_batches: Sequence[Batch],
    at: Diagnosis,
    before: Healthy | None,
    history: Iterable[Mapping[str, Any]],
    words: RowText,
    outcome: str,
) -> dict[str, Any]:
    """Returns the report; `history` are train records, `outcome` says what became of the run.

    Rows are `suspect` as `suspects` has it, and stand in the order of their losses, the highest first.
    """
    limit = finding.threshold.limit if finding.threshold else None
    named = suspects(at.rows, before.diagnosis.rows if before else (), limit)
    rows = [
        {**asdict(row), "suspect": i in named, **_described(batch, words)}
        for i, (row, batch) in enumerate(zip(at.rows, rows_of(micro_batches), strict=True))
    ]
    rows.sort(key=lambda row: (not row["suspect"], -_order(row["loss"])))
    report = {
        "format": FORMAT,
        "step": finding.step,
        "kind": finding.kind,
        "what": str(finding),
        "outcome": outcome,
        "loss": finding.loss,
        "grad_norm": finding.grad_norm,
        "learning_rate": finding.learning_rate,
        "threshold": asdict(finding.threshold) if finding.threshold else None,
        "suspects": list(dict.fromkeys(at.rows[i].row_id for i in named)),
        "at": _whole(at),
        "before": before and {"step": before.step, "loss_then": before.loss, **_whole(before.diagnosis)},
        "rows_before": [asdict(row) for row in before.diagnosis.rows] if before else [],
        "rows": rows,
        "history": [
            {key: record.get(key) for key in ("step", "loss", "grad_norm", "learning_rate")} for record in history
        ][-HISTORY:],
    }
    return dict(finite(report))


def read_autopsy(file: Path) -> dict[str, Any]:
    """Returns a report.json; ValueError or OSError, in one line, where it is none."""
    report = files.read_json(file)
    if report.get("format") != FORMAT or not report.keys() >= KEYS:
        raise ValueError(f"{file} is no report on an update, or one of another version")
    return report


KEYS = {"step", "kind", "what", "outcome", "suspects", "threshold", "at", "before", "rows"}
"""The parts of a report that a page cannot do without."""


def suspects(rows: Sequence[RowDiagnosis], before: Sequence[RowDiagnosis], limit: float | None) -> list[int]:
    """Returns the places of the rows that are at fault, the worst first.

    Those whose own loss or gradient is not finite; where there are none, those whose loss is above `limit`, and above
    that of every row of the batch `before`; where there are none either, the one of the highest loss.
    """
    losses = [_order(row.loss) for row in rows]
    faulty = [i for i, row in enumerate(rows) if math.inf in (losses[i], _order(row.grad_norm))]
    if not faulty and limit is not None:
        least = max([limit, *(_order(row.loss) for row in before)])
        faulty = [i for i, loss in enumerate(losses) if loss > least] or [losses.index(max(losses))]
    return sorted(faulty, key=lambda i: -losses[i])


def layer_norms(norms: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns gradient norms by layer (`embed_tokens`, `layers.0`, ..., `norm`, `lm_head`) from those by parameter."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        layer = re.search(r"layers\.\d+", name)
        place = layer[0] if layer else next((part for part in LARGE if f"{part}." in f"{name}."), name)
        squares[place] = squares.get(place, 0.0) + (math.nan if norm is None else norm * norm)
    return {place: math.sqrt(square) if math.isfinite(square) else None for place, square in squares.items()}


LARGE = ("embed_tokens", "lm_head", "score", "norm")
"""The parts of a model outside its layers."""


# --- as a page -------------------------------------------------------------------------------------------------------


def in_words(report: Mapping[str, Any]) -> str:
    """Returns a report as Markdown, text of rows in blocks that it cannot leave."""
    lines = [f"# Step {report['step']}: {report['what']}", "", report["outcome"], ""]
    lines += [cause(report), ""]
    lines += _table(
        ("", "at it", "the update before"),
        [
            ("step", report["step"], _of(report["before"], "step")),
            ("loss, nats per target", report["loss"], _of(report["before"], "loss_then")),
            ("gradient norm", report["grad_norm"], _of(report["before"], "grad_norm")),
            ("learning rate", report["learning_rate"], None),
        ],
    )
    lines += ["", "## Rows", ""]
    origins = any(row.get("origin") for row in report["rows"])
    lines += _table(
        ("row", *(["from"] if origins else []), "loss", "gradient norm", "targets", ""),
        [
            (
                row["row_id"],
                *([row.get("origin")] if origins else []),
                *(row["loss"], row["grad_norm"], row["targets"], "**suspect**" if row["suspect"] else ""),
            )
            for row in report["rows"]
        ],
    )
    lines += ["", "Each row was computed alone, without dropout.", ""]
    for row in report["rows"]:
        most = SHOWN if row["suspect"] else GLIMPSE
        for name, text in row["texts"].items():
            title = f"row {row['row_id']}" + (f", {name}" if name != "text" else "")
            label = f" (label: {row['label']})" if row.get("label") is not None else ""
            cut = f", the first {most} of {len(text):,} characters" if len(text) > most else ""
            lines += [f"### {printable(title)}{printable(label)}{cut}", "", *_fenced(text[:most]), ""]
    lines += ["## Layers", ""]
    lines += _layers(report, "gradient norm", lambda side: layer_norms(side["grad_norms"]))
    lines += ["", *_layers(report, "activation, root mean square", lambda side: side["activations"])]
    lines += ["", "## The updates before", ""]
    lines += _table(
        ("step", "loss", "gradient norm", "learning rate"),
        [tuple(record[key] for key in ("step", "loss", "grad_norm", "learning_rate")) for record in report["history"]],
    )
    return "\n".join(lines) + "\n"


def cause(report: Mapping[str, Any]) -> str:
    """Returns whether the batch or the weights are at fault, as far as the batch before can tell."""
    named = ", ".join(map(str, report["suspects"]))
    rows = f"Suspect: row{'s' if len(report['suspects']) > 1 else ''} {named}. " if named else ""
    before = report["before"]
    if before is None:
        return rows + "No batch from before is at hand to compare with."
    now, then = before["loss"], before["loss_then"]
    limit = (report["threshold"] or {}).get("limit", math.inf)
    told = f"With the same weights, the batch of step {before['step']} has a loss of {_number(now)}"
    if now is None or now > limit:
        return rows + f"{told}, and had {_number(then)} at its own step: the weights are at fault; look at that update."
    return rows + f"{told}, as it had {_number(then)} at its own step: the batch is at fault, not the weights."


def _layers(report: Mapping[str, Any], title: str, values: Callable[[Any], Mapping[str, Any]]) -> list[str]:
    at, before = values(report["at"]), values(report["before"]) if report["before"] else {}
    rows = []
    for place, now in at.items():
        then = before.get(place)
        ratio = f"{now / then:.2f}" if now is not None and then else None
        rows.append((place, now, then, ratio))
    return _table((title, "at it", "the batch before", "ratio"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[_number(value) for value in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in [list(head), ["---"] * len(head), *cells]]


def _number(value: Any) -> str:
    if isinstance(value, str):
        return printable(value).replace("|", "\\|").replace("\n", " ")
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fenced(text: str) -> list[str]:
    """Returns a block that holds the text, whatever it contains."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", printable(text), fence]


# --- rows ------------------------------------------------------------------------------------------------------------


def _described(row: Batch, words: RowText) -> dict[str, Any]:
    """Returns where a row comes from, its label where it is a classifier's, and its texts."""
    origin = words.origin(int(row.row_ids[0])) if words.origin else None
    found: dict[str, Any] = {"origin": origin, "label": None}
    if words.label_names is not None:
        labels = row.labels_BT[row.labels_BT != IGNORE_INDEX].tolist()
        names = words.label_names
        found["label"] = ", ".join(names[label] if label < len(names) else str(label) for label in labels)
    sides = {"text": (row.tokens_BT[0], row.labels_BT[0])}
    for name, array in row.extras.items():
        if name.endswith("_tokens_BT"):
            kind = name.removesuffix("_tokens_BT")
            labels_BT = row.extras.get(f"{kind}_labels_BT", np.full_like(array, IGNORE_INDEX))
            sides[kind] = (array[0], labels_BT[0])
    found["texts"] = {
        name: row_text(tokens, labels, words.tokenizer, words.label_names is None)
        for name, (tokens, labels) in sides.items()
    }
    return found


def row_text(tokens_T: np.ndarray, labels_T: np.ndarray, tokenizer: Tokenizer | None, of_tokens: bool = True) -> str:
    """Returns a row as text, special tokens by name; the ids, where there is no tokenizer.

    The last token is read from the labels where these are tokens and it is scored. Padding is left out: two ids or more
    behind the last scored place that are all alike.
    """
    block = np.concatenate([tokens_T, labels_T[-1:] if of_tokens and labels_T[-1] != IGNORE_INDEX else []])
    block = block.astype(np.int32)
    scored = np.flatnonzero(labels_T != IGNORE_INDEX)
    end = int(scored[-1]) + 1 + of_tokens if len(scored) else len(block)
    while end < len(block) and (block[end:] != block[-1]).any():
        end += 1
    block = block[:end] if len(block) - end > 1 else block
    if tokenizer is None:
        return " ".join(map(str, block.tolist()))
    row = Row(block, np.ones(len(block), dtype=bool), None)
    return "".join(text for _, text, _ in marked_text(row, tokenizer))


def _whole(diagnosis: Diagnosis) -> dict[str, Any]:
    return {key: value for key, value in asdict(diagnosis).items() if key != "rows"}


def _order(loss: float | None) -> float:
    """Returns a number that puts a loss in order: one that is not finite above all others."""
    return -math.inf if loss is None else loss if math.isfinite(loss) else math.inf


def _of(side: Mapping[str, Any] | None, key: str) -> Any:
    return None if side is None else side[key]
