"""The lessons and the state of their checks as one HTML page, which needs no server and loads nothing."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from llamita.learn import links
from llamita.learn.figures import divided, drawn
from llamita.learn.grading import Result
from llamita.learn.track import Lesson, Track

TEMPLATE = Path(__file__).parent / "page.html"


def page(track: Track, results: Sequence[Result], figures: Mapping[str, str] | None = None) -> str:
    """Returns the page of a track; `results` are those of all its checks, in order.

    `figures` are the texts of SVG files by name; without them they are drawn. Each is a part of the page, an image
    whose colours follow the reader's system as the page's do. The library's definitions that a lesson links to are
    shown, folded, below the paragraph with the links.
    """
    markdown = MarkdownIt("commonmark", {"html": False})
    texts = drawn(track) if figures is None else figures
    images = {name: f"data:image/svg+xml;base64,{_base64(svg)}" for name, svg in texts.items()}
    lessons = []
    for lesson in track.lessons:
        own = [result for result in results if result.lesson == lesson.name]
        done = all(result.state == "passed" for result in own)
        parts = _parts(lesson, markdown, images)
        lessons.append({"lesson": lesson, "results": own, "done": done, "parts": parts})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(track=track, lessons=lessons, passed=sum(entry["done"] for entry in lessons))


def _parts(lesson: Lesson, markdown: MarkdownIt, images: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns a lesson in parts: text, then the code that it links to or a figure."""

    def anchor(found: links.Definition) -> str:
        return f"{lesson.name}/{found.file}/{found.name}"

    parts: list[dict[str, Any]] = []
    for text, caption, name in divided(lesson.text):
        for paragraphs, definitions in links.divided(text):
            html = markdown.render(links.led(paragraphs, lambda found: f"#{anchor(found)}"))
            code = [{"definition": found, "anchor": anchor(found)} for found in definitions]
            parts.append({"html": html, "code": code, "caption": "", "image": ""})
        parts[-1] |= {"caption": caption, "image": images.get(name, "")}
    return parts


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8")).decode("ascii")
