"""The figures of lessons: one for each line that shows one, the same every time, a part of the page, and no more."""

import base64
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from llamita.learn import course, track
from llamita.learn.course import Course
from llamita.learn.figures import DARK_INK, INK, divided, drawings, drawn, svg
from llamita.learn.grading import Result
from llamita.learn.harness import assembled
from llamita.learn.page import page
from llamita.learn.track import Lesson, Track, sources_of

TRACKS = track.names()
TRACK = track.find("min-llama")
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    return drawn(TRACK)


def shown_in(lesson: Lesson) -> list[str]:
    return [name for _, _, name in divided(lesson.text) if name]


@pytest.mark.parametrize("name", TRACKS)
def test_lessons_show_the_figures_that_there_are(name: str) -> None:
    found = track.find(name)
    shown = [figure for lesson in found.lessons for figure in shown_in(lesson)]
    assert sorted(shown) == sorted(drawings(found.directory))
    for lesson in found.lessons:
        lines = [line for line in lesson.text.splitlines() if "![" in line]
        assert len(lines) == len(shown_in(lesson)), "a line that shows a figure holds nothing else"
        for _, caption, _ in divided(lesson.text):
            assert not caption[:1].islower(), caption


def test_each_lesson_of_min_llama_has_its_figure() -> None:
    assert [shown_in(lesson) for lesson in TRACK.lessons] == [[lesson.name] for lesson in TRACK.lessons]
    for lesson in TRACK.lessons:
        before, caption, _ = divided(lesson.text)[0]
        assert "**The idea.**" in before
        assert "**The exercise.**" not in before
        assert len(caption) > 40


def test_a_figure_is_the_same_bytes_every_time_and_in_another_process(figures: dict[str, str]) -> None:
    once = svg(drawings(TRACK.directory)["attention"])
    assert once == figures["attention"]
    program = (
        "import sys\nfrom llamita.learn import figures, track\n"
        "draw = figures.drawings(track.find('min-llama').directory)['attention']\n"
        "sys.stdout.buffer.write(figures.svg(draw).encode())\n"
        "assert 'torch' not in sys.modules and 'mlx' not in sys.modules"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=120)
    assert other.stdout == once.encode()


def test_a_figure_runs_nothing_and_asks_no_other_host(figures: dict[str, str]) -> None:
    assert set(figures) == set(drawings(TRACK.directory))
    for name, text in figures.items():
        for element in ElementTree.fromstring(text).iter():
            assert element.tag.startswith(SVG), name
            assert element.tag.removeprefix(SVG) in {"svg", "style", "defs", "g", "path", "use", "clipPath", "rect"}, (
                name,
                element.tag,
            )
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on"), name
                if key.endswith("href"):
                    assert value.startswith("#"), name
                assert "url(" not in value or re.search(r"url\(#\w+\)", value), name
        assert re.findall(r"https?://[\w./-]+", text) == ["http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"]
        assert len(text) < 150_000, name


def test_letters_are_dark_on_light_paper_and_light_on_dark(figures: dict[str, str]) -> None:
    for name, text in figures.items():
        rules, drawing = text.split("</style>", 1)
        assert f"fill: {INK}" in drawing, name
        assert "@media (prefers-color-scheme: dark)" in rules
        assert f'[style*="fill: {INK}"] {{ fill: {DARK_INK} !important }}' in rules
        assert "#ffffff" not in drawing.split('<g id="axes_1">')[0], "the paper shows through"


def test_a_page_holds_the_figures(figures: dict[str, str]) -> None:
    results = [Result(lesson.name, check, "passed") for lesson in TRACK.lessons for check in lesson.checks]
    text = page(TRACK, results, figures)
    images = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"><figcaption>([^<]+)<', text)
    assert [base64.b64decode(image).decode() for image, _, _ in images] == [
        figures[lesson.name] for lesson in TRACK.lessons
    ]
    captions = [divided(lesson.text)[0][1] for lesson in TRACK.lessons]
    assert [caption for _, _, caption in images] == [alternative for _, alternative, _ in images] == captions
    assert text.count("<img") == 8
    assert page(TRACK, results, {}).count("<figure><figcaption>") == 8
    assert "<script" not in text
    assert "img-src data:" in text
    for lesson, entry in zip(TRACK.lessons, re.split(r"<details(?: open)?>", text)[1:], strict=True):
        assert entry.index("<strong>The idea.</strong>") < entry.index("<figure>")
        assert entry.index("</figure>") < entry.index("<strong>The exercise.</strong>"), lesson.name


def small_track(directory: Path, figures: str = "") -> Track:
    """A track of one lesson that shows a figure, in a directory with the figures.py given."""
    directory.mkdir()
    if figures:
        (directory / "figures.py").write_text(figures, "utf-8")
    text = "# One\n\nAn idea.\n\n![A line & more.](one.svg)\n\nAn exercise.\n" if figures else "# One\n\nAn idea.\n"
    lesson = Lesson("one", "One", "one.py", ("one",), text)
    return Track("small", "Small", ("torch",), (lesson,), directory, "none", "")


DRAWING = """
def one(figure):
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0])
    axes.set_title("one")

FIGURES = {"one": one}
"""


def test_a_folder_has_the_figures_and_a_terminal_says_where(tmp_path: Path) -> None:
    small = small_track(tmp_path / "small", DRAWING)
    (tmp_path / "small" / "torch").mkdir()
    folder = tmp_path / "course"
    started = course.start(folder, small, "torch", None, 1, tools=None)  # type: ignore[arg-type]  # no model, so none is used
    assert (folder / "lessons" / "one.svg").read_text("utf-8") == drawn(small)["one"]
    assert sorted(path.name for path in (folder / "lessons").iterdir()) == ["1-one.md", "one.svg"]
    assert course.figures(started) == drawn(small)
    assert course.figures(Course(tmp_path / "older", small, "torch")) == drawn(small)
    printed = course.as_printed(started, small.lessons[0])
    assert f"An idea.\n\n[Figure: A line & more.\n {folder / 'lessons' / 'one.svg'}]\n\nAn exercise." in printed
    elsewhere = Course(tmp_path / "older", small, "torch")
    assert "An idea.\n\n[Figure: A line & more.]\n\nAn exercise." in course.as_printed(elsewhere, small.lessons[0])
    assert "<figcaption>A line &amp; more.</figcaption>" in page(small, [Result("one", "one", "passed")])


def test_a_track_needs_no_figures(tmp_path: Path) -> None:
    small = small_track(tmp_path / "small")
    assert drawn(small) == {}
    assert "<figure>" not in page(small, [Result("one", "one", "passed")])
    assert course.as_printed(Course(tmp_path, small, "torch"), small.lessons[0]) == small.lessons[0].text


def test_what_the_figures_compute() -> None:
    """The numbers in them are those of the lessons: PyTorch's Adam, and a rotation that knows distances alone."""
    torch = pytest.importorskip("torch")
    module = assembled(sources_of([TRACK.directory / "figures.py"]), ["figures"]).figures
    stretch, start, zero = np.array([1.0, 30.0]), np.array([-4.3, 0.95]), np.zeros(2)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.Adam([weight], lr=0.15, eps=1e-12)
    path_taken = module.adam_path(start, stretch, zero, 20, 0.15, 0.0)
    for step in range(1, 21):
        optimizer.zero_grad()
        (0.5 * (torch.tensor(stretch) * weight**2).sum()).backward()
        optimizer.step()
        np.testing.assert_allclose(path_taken[step], weight.detach().numpy(), atol=1e-6)
    speeds, (query, key) = np.array([1.0, 0.3]), np.random.default_rng(0).normal(size=(2, 4))
    products = [module.turned(query, place, speeds) @ module.turned(key, place + 3, speeds) for place in (0, 1, 7, 20)]
    np.testing.assert_allclose(products, products[0])
    assert abs(products[0] - query @ key) > 1e-3
    shapes = module.forward_shapes(2, 7, 512, 64, 8, 4, 176)
    assert shapes["scores"] == (2, 8, 7, 7)
    assert shapes["logits"] == (2, 1, 512)
    np.testing.assert_allclose(module.running_mean(np.ones(9), 0.9), 1 - 0.9 ** np.arange(1, 10))
