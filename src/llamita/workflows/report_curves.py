"""The curves of a run as pictures for a page: small SVGs whose colours are the page's own, light or dark.

Matplotlib draws them in stand-in colours, which become CSS variables afterwards. What the page says beside them is not
known here.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llamita.training import metrics
from llamita.workflows.runs import Run

POINTS = 500  # along a line; a picture has fewer pixels than a long run has updates
SIZE = (4.6, 2.7)  # inches; small, so that the letters stay readable where a phone scales it to its width
KNOWN = frozenset({"kind", "step", "loss", "learning_rate", "grad_norm", "targets", *metrics.TIMES})
INK, GRID, FAINT, FIRST, SECOND = "#010201", "#010202", "#010203", "#010204", "#010205"
VARIABLES = {INK: "ink-soft", GRID: "line", FAINT: "curve-faint", FIRST: "curve-a", SECOND: "curve-b"}
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "svg.hashsalt": "llamita",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

Points = Sequence[tuple[int, float]]


class Curve(NamedTuple):
    """A picture with its title, and a sentence for who cannot see it."""

    title: str
    description: str
    svg: str


class Line(NamedTuple):
    label: str
    points: Points
    color: str
    marked: bool = False


def curves(run: Run) -> list[Curve]:
    """Loss, learning rate, gradient norm, speed, and whatever else was measured; what has no points has no picture."""
    made = []
    updates, checks = run.updates, run.checks
    lines = [*_noisy("training", _points(updates, "loss")), Line("validation", _points(checks, "loss"), SECOND, True)]
    target = str(checks[-1].get("target", "token")) if checks else "token"
    made.append(draw("Loss", f"nats per {target}", lines, floor_per_target(run), losses=True))
    made.append(draw("Learning rate", "", [Line("Learning rate", _points(updates, "learning_rate"), FIRST)]))
    made.append(draw("Gradient norm, before clipping", "", _noisy("each update", _points(updates, "grad_norm"))))
    made.append(draw("Speed", "tokens per second", _noisy("each update", _points(updates, "tokens_per_second"))))
    for name in measures(run):
        nested = [{"step": line["step"], **(line.get("measures") or {})} for line in checks]
        pair = [*_noisy("training", _points(updates, name)), Line("validation", _points(nested, name), SECOND, True)]
        made.append(draw(name.replace("_", " ").capitalize(), "", pair))
    return [curve for curve in made if curve is not None]


def measures(run: Run) -> list[str]:
    """Returns what the objective measured besides the loss, in the order in which it came."""
    names = [key for line in run.updates[:1] for key in line if key not in KNOWN]
    return list(dict.fromkeys([*names, *(key for line in run.checks for key in line.get("measures") or {})]))


def floor_per_target(run: Run) -> float | None:
    """The least possible loss in the unit of the loss; the manifest has it in nats per character."""
    floor = run.manifest.get("floor")
    known = [line for line in run.checks if line.get("nats_per_character") and line.get("loss")]
    if not isinstance(floor, int | float) or not known:
        return None
    return floor * known[-1]["loss"] / known[-1]["nats_per_character"]


def draw(
    title: str, unit: str, lines: Sequence[Line], floor: float | None = None, losses: bool = False
) -> Curve | None:
    """One picture of one or more lines over the steps; None where none has a point."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    lines = [line for line in lines if line.points]
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            steps, values = zip(*thinned(line.points), strict=True)
            alone = line.marked or len(steps) == 1
            width = 0.7 if line.color == FAINT else 1.5
            axes.plot(steps, values, color=line.color, linewidth=width, marker="o" if alone else "", markersize=3,
                      label=line.label)  # fmt: skip
        if floor is not None:
            axes.axhline(floor, color=INK, linestyle="--", linewidth=1, label=f"floor {floor:.3f}")
        if losses:
            metrics.scale_losses(axes, [value for line in lines for _, value in line.points], floor)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1 or floor is not None:
            axes.legend(frameon=False)
        stream = io.StringIO()
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    return Curve(title, _described(title, lines), page_svg(stream.getvalue(), title))


def thinned(points: Points) -> Points:
    """At most about POINTS of them: the lowest and the highest of each stretch, so that a spike stays one."""
    if len(points) <= POINTS:
        return points
    size = -(-2 * len(points) // POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def page_svg(svg: str, title: str) -> str:
    """Matplotlib's file as a part of a page: no prologue, no size, names of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for color, name in VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1).strip()


def _noisy(label: str, points: Points) -> list[Line]:
    """Every value, faint, and their moving average."""
    average = zip([step for step, _ in points], metrics.smoothed([value for _, value in points]), strict=True)
    return [Line(label, points, FAINT), Line(f"{label}, smoothed", list(average), FIRST)]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = [(line["step"], line.get(key)) for line in lines]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float)]


def _described(title: str, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines:
        if line.color != FAINT or len(lines) == 1:
            (first, start), (last, end) = line.points[0], line.points[-1]
            parts.append(f"{line.label}: {start:.4g} at step {first}, {end:.4g} at step {last}")
    return f"{title} over the steps. " + "; ".join(parts) + "."
