"""`llamita learn page` opens what it has written, where someone sits before a terminal."""

import json
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from llamita.cli import learn
from llamita.learn import track


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_the_page_is_opened_where_it_can_be_seen(
    terminal: bool, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "course.json").write_text(json.dumps({"track": "min-llama", "framework": "torch"}))
    for name, text in track.find("min-llama").skeletons("torch").items():
        (tmp_path / name).write_text(text, "utf-8")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setattr("llamita.learn.grading.grade", lambda *arguments: iter(()))
    monkeypatch.setattr("llamita.learn.course.figures", lambda opened: {})
    learn.write_page(learn.PageConfig(tmp_path, open=wanted))
    page = tmp_path / "course.html"
    assert [Path(unquote(urlparse(url).path)) for url in opened] == ([page] if terminal and wanted else [])
    assert "of 8 lessons pass their checks." in page.read_text("utf-8")
