"""The lessons and the state of their checks as one HTML page, which needs no server and loads nothing."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
from markdown_it import MarkdownIt

from llamita.learn.grading import Result
from llamita.learn.track import Track

TEMPLATE = Path(__file__).parent / "page.html"


def page(track: Track, results: Sequence[Result]) -> str:
    """Returns the page of a track; `results` are those of all its checks, in order."""
    markdown = MarkdownIt("commonmark", {"html": False})
    markdown.validateLink = lambda url: True  # type: ignore[method-assign]  # the lessons link to files, and are ours
    lessons = []
    for lesson in track.lessons:
        own = [result for result in results if result.lesson == lesson.name]
        done = all(result.state == "passed" for result in own)
        lessons.append({"lesson": lesson, "results": own, "done": done, "text": markdown.render(lesson.text)})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return template.render(track=track, lessons=lessons, passed=sum(entry["done"] for entry in lessons))
