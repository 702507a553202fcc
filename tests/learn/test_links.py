"""The links of lessons into the library: each names a definition that there is, and leads to its lines everywhere."""

import ast
import re
import shutil
import textwrap
from pathlib import Path

import pytest

from llamita.learn import course, links, track
from llamita.learn.course import Course
from llamita.learn.grading import Result
from llamita.learn.links import LINK, Definition
from llamita.learn.page import page
from llamita.learn.track import Lesson, Track
from tests.browser import browser

LONGEST = 75
"""Lines that a page shows of a definition: of a longer class, a lesson links to the method that it is about."""
LESSONS = [(name, lesson) for name in track.names() for lesson in track.find(name).lessons]


def linked(where: str, lesson: Lesson) -> list[Definition]:
    """The definitions that a lesson links to; a test that meets a link to nothing fails with what to do."""
    found = []
    for link in LINK.finditer(lesson.text):
        try:
            found.append(links.definition(link["file"], link["name"]))
        except ValueError as error:
            pytest.fail(f"lesson {lesson.name} of {where}: {error}")
    return found


@pytest.mark.parametrize(("where", "lesson"), LESSONS, ids=lambda value: getattr(value, "name", value))
def test_a_lesson_links_to_definitions_that_there_are(where: str, lesson: Lesson) -> None:
    definitions = linked(where, lesson)
    assert lesson.text.count("PACKAGE/") == len(definitions), "a link has the form [text](PACKAGE/FILE#NAME)"
    (paragraph,) = (text for text in lesson.text.split("\n\n") if text.startswith("**In Llamita.**"))
    assert len(LINK.findall(paragraph)) == len(definitions) > 0
    for found in definitions:
        name = found.name.split(".")[-1]
        lines = found.path.read_text("utf-8").splitlines()[found.lines[0] - 1 : found.lines[-1]]
        (statement,) = ast.parse(textwrap.dedent("\n".join(lines))).body
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            assert re.match(rf"{name}\b.*=", lines[0]), found
        else:
            assert getattr(statement, "name", None) == name, found
        assert len(lines) <= LONGEST, f"lesson {lesson.name} of {where}: {found.name} is long; link to a part of it"


CODE = '''
import functools

FIRST, SECOND = 1, 2
WHOLE: int = 3


class Kept:
    """A class.

    With a docstring.
    """

    field: int = 0

    @functools.cache
    def double(self, x: int) -> int:
        return 2 * x


@functools.cache
def double(x: int) -> int:
    return 2 * x


class Plain(Kept):
    async def run(self) -> None: ...
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of one file in the place of the real one."""
    monkeypatch.setattr(links, "PACKAGE", tmp_path / "library")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "code.py").write_text(CODE, "utf-8")
    return tmp_path / "library"


@pytest.mark.parametrize(
    ("name", "first", "last", "heads"),
    [
        ("FIRST", 4, 4, ()),
        ("SECOND", 4, 4, ()),
        ("WHOLE", 5, 5, ()),
        ("Kept", 8, 18, ()),
        ("Kept.field", 14, 14, (range(8, 13),)),
        ("Kept.double", 16, 18, (range(8, 13),)),
        ("double", 21, 23, ()),
        ("Plain.run", 27, 27, (range(26, 27),)),
    ],
)
def test_a_definition_has_its_lines(package: Path, name: str, first: int, last: int, heads: tuple[range, ...]) -> None:
    found = links.definition("code.py", name)
    assert (found.lines[0], found.lines[-1], found.heads) == (first, last, heads)
    assert found.uri == f"{(package / 'code.py').as_uri()}#L{first}-L{last}"
    shown = [text for piece in found.excerpt() for _, text in piece]
    assert shown == [CODE.splitlines()[number - 1] for piece in (*heads, found.lines) for number in piece]


def test_lines_are_looked_up_anew(package: Path) -> None:
    (package / "code.py").write_text("# moved\n\n" + CODE, "utf-8")
    assert links.definition("code.py", "double").lines == range(23, 26)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("code.py#halve", "code.py defines no halve; lead the link to what is there in its place"),
        ("code.py#Kept.halve", "code.py defines no Kept.halve; lead"),
        ("code.py#double.x", "code.py defines no double.x; lead"),
        ("other.py#double", "the library has no file other.py; lead the link to where double is now"),
    ],
)
def test_a_link_to_nothing_is_refused(package: Path, link: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        links.led(f"[text](PACKAGE/{link})", lambda found: found.uri)


def test_a_renamed_function_fails_with_the_lesson_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = track.find("min-llama").lesson("norm")
    for found in linked("min-llama", lesson):
        (tmp_path / found.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(found.path, tmp_path / found.file)
    layers = tmp_path / "backend/torch/model/layers.py"
    layers.write_text(layers.read_text("utf-8").replace("def rms_norm(", "def root_mean_square_norm("), "utf-8")
    monkeypatch.setattr(links, "PACKAGE", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"norm of min-llama: .*layers\.py defines no rms_norm; lead"):
        linked("min-llama", lesson)


TEXT = """# One

An idea.

**In Llamita.** [`double`](PACKAGE/code.py#double) and [the method](PACKAGE/code.py#Kept.double) & more;
[`double`](PACKAGE/code.py#double) again.

**Try.** Something.
"""


@pytest.fixture
def small(package: Path) -> Track:
    (package.parent / "track" / "torch").mkdir(parents=True)
    lesson = Lesson("one", "One", "one.py", ("one",), TEXT)
    return Track("small", "Small", ("torch",), (lesson,), package.parent / "track", "none", "")


def test_a_folder_and_a_terminal_lead_to_the_lines(package: Path, small: Track, tmp_path: Path) -> None:
    folder = tmp_path / "course"
    course.start(folder, small, "torch", None, 1, tools=None)  # type: ignore[arg-type]  # no model, so none is used
    file = (package / "code.py").as_uri()
    written = (folder / "lessons" / "1-one.md").read_text("utf-8")
    assert f"[`double`]({file}#L21-L23) and [the method]({file}#L16-L18) & more;" in written
    assert written.replace(f"{file}#L21-L23", "PACKAGE/code.py#double").count("#double") == 2
    printed = course.as_printed(Course(folder, small, "torch"), small.lessons[0])
    assert printed == TEXT.split("**In")[0] + (
        "**In Llamita.** `double` and the method & more; `double` again.\n"
        f"  double       {package / 'code.py'}:21\n"
        f"  Kept.double  {package / 'code.py'}:16\n"
        "\n**Try.** Something.\n"
    )


def test_a_page_shows_what_a_lesson_links_to(package: Path, small: Track) -> None:
    text = page(small, [Result("one", "one", "passed")], {})
    assert text.count('<details class="code">') == 2
    assert text.index("again.") < text.index('<details class="code">') < text.index("<strong>Try.</strong>")
    assert text.count('<a href="#one/code.py/double">') == 2
    method = text[text.index('<pre id="one/code.py/Kept.double">') :]
    method = method[: method.index("</pre>")]
    numbers = [int(number) for number in re.findall(r"<i>(\d+)</i>", method)]
    assert numbers == [*range(8, 13), 16, 17, 18]
    assert "<i>17</i>    def double(self, x: int) -&gt; int:\n" in method
    assert method.count("<i>…</i>") == 1
    assert text.count(f'<a href="{(package / "code.py").as_uri()}">llamita/code.py</a>') == 2


def test_a_link_of_a_page_unfolds_the_code(package: Path, small: Track, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page(small, [Result("one", "one", "error")], {}), "utf-8")
    started, chromium = browser()
    try:
        shown = chromium.new_page()
        shown.goto((tmp_path / "page.html").as_uri())
        code = shown.get_by_text("def double(self, x: int) -> int:")
        assert not code.is_visible()
        shown.get_by_role("link", name="the method").click()
        code.wait_for(state="visible", timeout=60_000)
        assert shown.locator("details.code[open]").count() == 1
    finally:
        chromium.close()
        started.stop()


@pytest.mark.parametrize("name", track.names())
def test_links_of_a_page_lead_to_its_own_anchors(name: str) -> None:
    found = track.find(name)
    text = page(
        found, [Result(lesson.name, check, "passed") for lesson in found.lessons for check in lesson.checks], {}
    )
    anchors = re.findall(r'<pre id="([^"]+)">', text)
    assert len(anchors) == len(set(anchors)) == text.count('<details class="code">')
    assert set(re.findall(r'<a href="#([^"]+)">', text)) == set(anchors)
    assert "PACKAGE/" not in text
