"""The documentation's site: it builds strictly, no link inside it is broken, and files of the repository are on it."""

import html.parser
import os
import posixpath
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from llamita.learn import track
from llamita.learn.links import LINK
from tests.test_readme import blocks

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocstrings", reason="needs pip install 'llamita[docs]'")

BUILD = """
import sys
from mkdocs.__main__ import cli
from pygments.lexer import RegexLexer
from pygments.token import Text

RegexLexer.get_tokens_unprocessed = lambda self, text, *_: [(0, Text, text)]
sys.exit(cli())
"""
"""MkDocs without the colours of code, which no test looks at: a third of the time."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make site` builds it, but for colours; a warning is a failure."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    return directory


@dataclass
class Elements(html.parser.HTMLParser):
    """What a page links to, the anchors that it has, and the classes of its elements."""

    links: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.links |= {given[name] for name in ("href", "src") if name in given}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes.append(given.get("class", ""))


def elements(page: Path) -> Elements:
    found = Elements()
    found.feed(page.read_text("utf-8"))
    return found


@pytest.mark.medium
def test_no_link_inside_the_site_is_broken(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): elements(path) for path in site.rglob("*.html")}
    assert len(pages) > 150
    checked = 0
    for name, page in pages.items():
        if name == "404.html":  # its links count from the address at which the site is served
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path) or Path(name).name))
            assert (site / target).is_file() or (site / target / "index.html").is_file(), f"{name} links to {link}"
            if parts.fragment and target in pages:
                fragment = unquote(parts.fragment)
                assert fragment in pages[target].anchors, f"{name} links to {link}, which has no such place"
                checked += 1
    assert checked > 1000


@pytest.mark.medium
def test_the_source_that_a_page_names_is_on_the_site(site: Path) -> None:
    assert "files/src/llamita/model/families.py.html" in elements(site / "tour.html").links
    shown = (site / "files/src/llamita/model/families.py.html").read_text("utf-8")
    lines = (ROOT / "src/llamita/model/families.py").read_text("utf-8").count("\n")
    assert f'id="line-0-{lines}"' in shown
    assert f'id="line-0-{lines + 1}"' not in shown
    named = re.findall(
        r'href="files/(tests/[^"#]+)\.html#line-0-(\d+)">[^<]*::(\w+)', (site / "compatibility.html").read_text("utf-8")
    )
    assert len(named) > 100
    for name, line, function in named:
        assert f"def {function}(" in (ROOT / name).read_text("utf-8").splitlines()[int(line) - 1]


@pytest.mark.medium
def test_links_of_lessons_lead_to_the_lines_of_definitions(site: Path) -> None:
    for name in track.names():
        found = track.find(name)
        for lesson in found.lessons:
            page = site / f"files/src/llamita/learn/tracks/{found.directory.name}/lessons/{lesson.name}.html"
            links = re.findall(r'href="([^"#]+)\.html#line-0-(\d+)">', page.read_text("utf-8"))
            named = [link["name"].split(".")[-1] for link in LINK.finditer(lesson.text)]
            assert len(links) == len(named) > 0, lesson.name
            for (file, line), word in zip(links, named, strict=True):
                source = (page.parent / file).resolve().relative_to((site / "files").resolve())
                lines = (ROOT / source).read_text("utf-8").splitlines()[int(line) - 1 :]
                statement = next(text for text in lines if not text.strip().startswith("@"))
                assert re.match(rf"\s*(?:(?:async )?def |class )?{word}\b", statement), (lesson.name, word)


@pytest.mark.medium
def test_every_fence_of_a_page_is_shown_as_its_language(site: Path) -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        written = [block.language for block in blocks(path.read_text("utf-8"))]
        classes = elements(site / f"{path.stem}.html").classes
        for language in ("sh", "python"):
            assert written.count(language) == classes.count(f"language-{language} highlight"), (
                f"{path.name}: {language}"
            )


@pytest.mark.medium
def test_the_reference_has_signatures_and_the_fields_of_options(site: Path) -> None:
    shown = elements(site / "reference/llm.html").anchors
    assert {"llamita.LLM.load", "llamita.LLM.generate", "llamita.SamplingParams.temperature"} <= shown
    assert "Logits are divided by it; 0 is greedy." in (site / "reference/llm.html").read_text("utf-8")
    assert "llamita.workflows.pretrain.PretrainConfig.depth" in elements(site / "reference/training.html").anchors
