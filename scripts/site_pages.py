"""The hook with which MkDocs makes a site of docs/: links out of that folder lead to pages of the site too.

A page of docs/ may link to any file of the repository, as `../src/llamita/cli/main.py`. For the site each such file
becomes a page below files/: Markdown as it reads, anything else as numbered lines; a folder becomes a list of files.
The pages in docs/ stay as they are, so that their links work where files are viewed too. A lesson of a course links to
definitions of the library (learn/links.py): on the site, to their first lines.

Two more things are not as MkDocs reads them. A fence may have words behind its language ("sh no-run", for
tests/test_readme.py), which would make it text; they are left out. And in a table a bar inside code is written `\\|`,
of which MkDocs would show the stroke too.

The figures of a course's lessons, which no file of the repository holds, are drawn beside the pages of the lessons.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llamita.learn import links, track
from llamita.learn.figures import drawn

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
FILES = "files"
"""The folder of the site in which the pages of the repository's files lie."""

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*(\S*)(.*)$")
CODE = re.compile(r"`[^`]+`")
NAMED_TEST = re.compile(
    r'<a href="(?P<page>[^"#]*\.html)">(?P<text>(?:<code>)?[^<]*::(?P<function>\w+)(?:</code>)?)</a>'
)
LINE = re.compile(r'<a id="(line-0-\d+)"')
LANGUAGES = {".py": "python", ".html": "html", ".js": "javascript", ".css": "css", ".toml": "toml", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds figures, and a page for each file of the repository that a page links to, and for those that it links to."""
    waiting = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    waiting += [posixpath.relpath(uri, FILES) for uri in named_in(config.nav) if uri.startswith(f"{FILES}/")]
    seen = set(waiting)
    while waiting:
        name = waiting.pop()
        if not name.startswith(f"{DOCS}/"):
            files.append(File.generated(config, page_uri(name), content=page_text(name)))
        for target in linked(name):
            if target not in seen and not target.startswith(f"{DOCS}/"):
                seen.add(target)
                waiting.append(target)
    for course in map(track.find, track.names()):
        folder = f"{FILES}/src/llamita/learn/tracks/{course.directory.name}/lessons"
        for name, figure in drawn(course).items():
            files.append(File.generated(config, f"{folder}/{name}.svg", content=figure))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to the pages of the site, and reduces fences to their language."""
    uri = page.file.src_uri
    inside = uri.startswith(f"{FILES}/")
    name = source_of(uri) if inside else f"{DOCS}/{uri}"
    if inside and not (name.endswith(".md") or (ROOT / name).is_dir()):
        return markdown
    return "\n".join(line for _, line in rewritten(markdown, name, uri))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads a link that names a test, as `test_config.py::test_a_head`, to its line; tells MkDocs a file's lines."""

    def to_line(link: re.Match[str]) -> str:
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.dest_uri), link["page"]))
        name = source_of(uri.removesuffix(".html") + ".md")
        line = definition(name, link["function"]) if uri.startswith(f"{FILES}/") else None
        return link[0] if line is None else f'<a href="{link["page"]}#line-0-{line}">{link["text"]}</a>'

    assert page.present_anchor_ids is not None
    page.present_anchor_ids |= set(LINE.findall(html))  # the highlighter's, which MkDocs does not look for
    return NAMED_TEST.sub(to_line, html)


def rewritten(markdown: str, name: str, uri: str) -> Iterator[tuple[bool, str]]:
    """Yields each line of the repository's file `name` as the page `uri` has it, and whether it is inside a fence."""

    def led(link: re.Match[str]) -> str:
        target, place = target_of(name, link[2]), link[3]
        if target is None:
            return link[0]
        if link[2].startswith("PACKAGE/"):
            found = links.definition(link[2].removeprefix("PACKAGE/"), place.strip("#)"))
            place = f"#line-0-{found.lines[0]})"
        return f"{link[1]}{posixpath.relpath(page_uri(target), posixpath.dirname(uri) or '.')}{place}"

    for fenced, line in lines_of(markdown):
        if fenced:
            yield True, FENCE.sub(r"\1\2\3", line) if FENCE.match(line) else line
        else:
            line = CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
            yield False, LINK.sub(led, line)


def lines_of(markdown: str) -> Iterator[tuple[bool, str]]:
    """Yields each line, and whether it belongs to a fenced block, its fences included."""
    opened = ""
    for line in markdown.splitlines():
        fence = FENCE.match(line)
        if opened:
            yield True, line
            if fence and fence[2].startswith(opened) and not fence[3]:
                opened = ""
        else:
            opened = fence[2] if fence else ""
            yield bool(fence), line


def linked(name: str) -> Iterator[str]:
    """Yields the files and folders of the repository that the file `name` links to or, as a folder, holds."""
    path = ROOT / name
    if path.is_dir():
        yield from (f"{name}/{child.name}" for child in children(path))
    elif name.endswith(".md"):
        for fenced, line in lines_of(path.read_text("utf-8")):
            for link in () if fenced else LINK.finditer(line):
                if (target := target_of(name, link[2])) is not None:
                    yield target


def target_of(name: str, link: str) -> str | None:
    """The path in the repository to which a link in the file `name` leads; None for one that leads out of it."""
    if re.match(r"[a-z]+:|/", link):
        return None
    if link.startswith("PACKAGE/"):  # a lesson's word for wherever the package is installed
        name, link = "src/llamita/", link.removeprefix("PACKAGE/")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return target if (ROOT / target).exists() else None


def page_uri(name: str) -> str:
    """The page of the site on which the repository's file `name` is."""
    if name.startswith(f"{DOCS}/"):
        return name.removeprefix(f"{DOCS}/")
    if name.endswith(".md"):
        return f"{FILES}/{name}"
    return f"{FILES}/{name}/index.md" if (ROOT / name).is_dir() else f"{FILES}/{name}.md"


def source_of(uri: str) -> str:
    """The repository's file that is on the page `uri` of the site, which lies below files/."""
    name = uri.removeprefix(f"{FILES}/")
    if name.endswith("/index.md") and (ROOT / name.removesuffix("/index.md")).is_dir():
        return name.removesuffix("/index.md")
    return name if (ROOT / name).is_file() else name.removesuffix(".md")


def page_text(name: str) -> str:
    """The page of a file of the repository, as Markdown."""
    path = ROOT / name
    if name.endswith(".md"):
        return path.read_text("utf-8")
    head = f"---\ntitle: {name}\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        return head + "".join(f"- [`{child.name}`]({path.name}/{child.name})\n" for child in children(path))
    text = path.read_text("utf-8")
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    language = LANGUAGES.get(path.suffix, "bash" if text.startswith("#!") else "text")
    return f'{head}{fence}{language} linenums="1"\n{text.rstrip()}\n{fence}\n'


def children(directory: Path) -> list[Path]:
    """The folders and the files of text in a folder, folders first."""
    found = [child for child in directory.iterdir() if child.name[0] != "." and child.name != "__pycache__"]
    return sorted(
        (child for child in found if child.is_dir() or is_text(child)), key=lambda path: (path.is_file(), path)
    )


def is_text(file: Path) -> bool:
    try:
        return "\0" not in file.read_text("utf-8")
    except UnicodeDecodeError:
        return False


def definition(name: str, function: str) -> int | None:
    """The line, from 1, on which the file defines the function."""
    text = (ROOT / name).read_text("utf-8")
    found = re.search(rf"^[ \t]*(?:async )?def {function}\(", text, re.MULTILINE)
    return None if found is None else text.count("\n", 0, found.start()) + 1


def named_in(nav: object) -> Iterator[str]:
    """Yields the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from named_in(part)
