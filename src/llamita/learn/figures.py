"""The figures of a track's lessons: drawn by its figures.py into SVG files that are the same bytes every time.

figures.py runs in this process, unlike the other files of a track: it holds nothing of the reader's, needs numpy and
matplotlib alone, and its figures belong into the folder that a course begins with.

A line `![what one sees](NAME.svg)` of a lesson shows the figure of that name.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamita.learn.harness import assembled
from llamita.learn.track import Track, sources_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE = re.compile(r"^!\[(?P<caption>[^\]\n]+)\]\((?P<name>[\w-]+)\.svg\)$", re.MULTILINE)
"""A lesson's line that shows a figure."""
SIZE = (7.0, 3.0)
"""Inches, where a figure does not choose its own: the width of a page's column."""
INK, DARK_INK = "#22272e", "#e3e6ea"
"""Letters and axes, on light paper and on dark."""
LINES, DARK_LINES = "#cfd3d9", "#454c58"
"""Grid lines on both."""
STYLE: Any = {
    "svg.fonttype": "path",  # the letters look alike on every machine
    "svg.hashsalt": "llamita",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along
    "font.size": 9,
    "axes.titlesize": 9.5,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINES,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
}
DARK = f"""<style>
@media (prefers-color-scheme: dark) {{
  [style*="fill: {INK}"] {{ fill: {DARK_INK} !important }}
  [style*="stroke: {INK}"] {{ stroke: {DARK_INK} !important }}
  [style*="stroke: {LINES}"] {{ stroke: {DARK_LINES} !important }}
}}
</style>"""


def drawn(track: Track) -> dict[str, str]:
    """Returns the SVG of each figure of a track by its name; empty where the track has no figures.py.

    Background and letters suit light and dark paper, whichever the reader's system asks for.
    """
    return {name: svg(draw) for name, draw in drawings(track.directory).items()}


def drawings(directory: Path) -> Mapping[str, "Callable[[Figure], None]"]:
    """Returns FIGURES of the figures.py in a track's directory: by name, what draws into an empty figure."""
    path = directory / "figures.py"
    if not path.is_file():
        return {}
    figures: Mapping[str, Callable[[Figure], None]] = assembled(sources_of([path]), ["figures"]).figures.FIGURES
    return figures


def svg(draw: "Callable[[Figure], None]") -> str:
    """Returns what is drawn as the text of an SVG file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):  # matplotlib takes these from nowhere else
        figure = Figure(figsize=SIZE, layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure)
        stream = io.StringIO()
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]  # the prologue names a document type on another host
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = text.index(">") + 1
    return f"{text[:head]}\n{DARK}{text[head:]}"


def divided(text: str) -> Sequence[tuple[str, str, str]]:
    """Returns a lesson's text in parts, each with the caption and the name of the figure that follows it.

    The last part has no figure: its caption and name are empty.
    """
    parts, position = [], 0
    for line in LINE.finditer(text):
        parts.append((text[position : line.start()], line["caption"], line["name"]))
        position = line.end()
    return [*parts, (text[position:], "", "")]
