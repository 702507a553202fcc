"""The lessons and the state of their checks as one HTML page, which needs no server and loads nothing."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt

from llamita.learn.figures import divided, drawn
from llamita.learn.grading import Result
from llamita.learn.track import Track

TEMPLATE = Path(__file__).parent / "page.html"


def page(track: Track, results: Sequence[Result], figures: Mapping[str, str] | None = None) -> str:
    """Returns the page of a track; `results` are those of all its checks, in order.

    `figures` are the texts of SVG files by name; without them they are drawn. Each is a part of the page, an image
    whose colours follow the reader's system as the page's do.
    """
    markdown = MarkdownIt("commonmark", {"html": False})
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]  # the lessons link to files, and are ours
    texts = drawn(track) if figures is None else figures
    images = {name: f"data:image/svg+xml;base64,{_base64(svg)}" for name, svg in texts.items()}
    lessons = []
    for lesson in track.lessons:
        own = [result for result in results if result.lesson == lesson.name]
        done = all(result.state == "passed" for result in own)
        parts = [
            {"html": markdown.render(text), "caption": caption, "image": images.get(name, "")}
            for text, caption, name in divided(lesson.text)
        ]
        lessons.append({"lesson": lesson, "results": own, "done": done, "parts": parts})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(track=track, lessons=lessons, passed=sum(entry["done"] for entry in lessons))


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8")).decode("ascii")
