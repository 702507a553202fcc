"""The page of a run: complete in itself, well-formed, with the run's own figures, whatever a model wrote."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from llamita.cli.main import main
from llamita.evaluation import records
from llamita.training import metrics
from llamita.training.run_directory import open_run
from llamita.workflows import report, report_curves, runs
from tests.browser import browser
from tests.training.helpers import MODEL, config, train

IDENTITY = {"kind": "pretraining", "model": {**MODEL.__dict__}, "data": {"train": "a0b1c2"}}
VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = '</div><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" {{ 7 * 7 }} \x1b[31m \ud800 ]]>'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """A page taken apart: the tags in use, attributes, ids, text; an assertion where a tag is not closed in order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], set(), [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.texts.append(" " if tag in ("td", "th") else "")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def values(self, *names):
        return [value for _, name, value in self.attributes if name in names]


def check(path):
    """What holds of every page; returns it taken apart."""
    source = path.read_text("utf-8")
    page = Page(source)
    assert page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for value in page.values("src", "href", "xlink:href"):
        assert value.startswith(("data:image/", "#"))
    assert re.findall(r"(?:url\(|@import)\s*[^#\s]", source) == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for name in re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', source):
        assert name in ids
    assert set(re.findall(r"var\((--[\w-]+)\)", source)) <= set(re.findall(r"(--[\w-]+):", source))
    assert "#0102" not in source  # a stand-in colour that was not replaced
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "first run"
    settings = config(path, steps=12, evaluate_every=4)
    identity = IDENTITY | {"training": settings.training.identity()}
    train(settings, identity=identity, on_evaluation=lambda e: f"sample {e.step}: {HOSTILE[:-5]}", floor=0.5)
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "first run", symlinks=True)


def test_the_page_has_the_figures_of_the_run(run, capsys):
    (run / "evaluations").mkdir()
    (run / "evaluations/matrix.png").write_bytes(PNG)
    pictures = ["matrix.png", "../loss.png", "none.png"]
    found = {"accuracy": 0.75, "accuracy_stderr": 0.0123, "lost": float("nan")}
    records.write(run, f"exam {HOSTILE[:20]}", found, f"llamita evaluate {HOSTILE[:40]}", run / "best", pictures)
    (run / "evaluations/bad.json").write_text("[]")
    assert main(["report", str(run)]) == 0
    assert "report.html" in capsys.readouterr().out
    page = check(run / "report.html")
    summed, lines = runs.open_run(run), metrics.read_records(run / "metrics.jsonl")
    last = [line for line in lines if line["kind"] == "evaluation"][-1]
    for value in (last["loss"], last["perplexity"], last["bits_per_byte"]):
        assert f"{value:.5g}" in page.text
    assert f"{summed.parameters:,}" in page.text
    assert "12 of 12 updates" in page.text
    assert "0.75 ± 0.0123" in page.text
    assert "lost –" in page.text
    assert f"sample 12: {HOSTILE[:30]}" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "a0b1c2" in page.text
    assert "bad.json is no record" in page.text
    assert summed.sessions[0]["command"].split()[0] in page.text
    assert page.values("src") == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert "picture ../loss.png is missing" in page.text
    assert len(page.values("viewbox")) == len(report_curves.curves(summed)) == 4
    assert (run / "report.html").stat().st_size < 300_000


def test_a_page_of_every_state(run, tmp_path):
    manifest = json.loads((run / "run.json").read_text())

    def written(state, **changes):
        manifest["sessions"][-1] |= {"state": state, **changes}
        (run / "run.json").write_text(json.dumps(manifest))
        return check(report.write(run)).text

    assert "was killed" in written("running")
    assert "the disk is full <b>" in written("failed", reason="the disk is full <b>")
    assert "interrupted" in written("interrupted")
    del manifest["sessions"], manifest["floor"], manifest["conditions"]
    (run / "run.json").write_text(json.dumps(manifest))
    assert "not recorded" in check(report.write(run)).text  # as an older version left it
    with open_run(tmp_path / "new", {}, {}, resume=False):
        text = check(report.write(tmp_path / "new")).text
    assert "No update has been recorded" in text
    assert "is going on" in text


def test_hostile_manifests_are_only_text(run):
    manifest = json.loads((run / "run.json").read_text())
    manifest["identity"] |= {"kind": HOSTILE, "model": {"hidden_size": HOSTILE}, HOSTILE: HOSTILE}
    manifest["arguments"] |= {"model": HOSTILE, "data": HOSTILE, "note": [HOSTILE]}
    manifest["sessions"][-1] |= {"state": HOSTILE, "command": HOSTILE, "started": 1e300, "code": {"commit": HOSTILE}}
    (run / "run.json").write_text(json.dumps(manifest))
    with (run / "metrics.jsonl").open("a") as file:
        line = {"kind": "evaluation", "step": 12, "loss": None, "target": "$\\bad$ <b>", "measures": {HOSTILE: 0.5}}
        file.write(json.dumps(line) + "\n")
    check(report.write(run))


def test_curves_keep_their_peaks_and_follow_the_floor(run):
    points = [(step, 9.0 if step == 7777 else float(step % 3)) for step in range(10_000)]
    thin = report_curves.thinned(points)
    assert len(thin) <= report_curves.POINTS + 1
    assert (7777, 9.0) in thin
    assert thin == sorted(thin)
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    summed = runs.open_run(run)
    last = summed.checks[-1]
    assert report_curves.floor_per_target(summed) == pytest.approx(0.5 * last["loss"] / last["nats_per_character"])
    assert f"floor {report_curves.floor_per_target(summed):.3f}" in report_curves.curves(summed)[0].svg


def test_what_is_measured_besides_has_its_curve(tmp_path):
    with open_run(tmp_path / "run", IDENTITY, {"steps": 4}, resume=False) as opened:
        file = metrics.MetricsFile(opened.file("metrics.jsonl"))
        for step in (1, 2, 3, 4):
            file.append({"kind": "train", "step": step, "loss": 1 / step, "accuracy": step / 8})
        file.append({"kind": "evaluation", "step": 4, "loss": 0.3, "measures": {"accuracy": 0.625}, "best": True})
        file.close()
    page = check(report.write(tmp_path / "run"))
    assert {"Loss", "Accuracy"} == {curve.title for curve in report_curves.curves(runs.open_run(tmp_path / "run"))}
    assert "validation: 0.625 at step 4" in page.text


def test_no_other_file_is_replaced(run, tmp_path, capsys):
    (tmp_path / "notes.html").write_text("mine")
    assert main(["report", str(run), "--output", str(tmp_path / "notes.html")]) == 2
    assert "is no report" in capsys.readouterr().err
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert main(["report", str(run), "--output", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path)]) == 2
    for _ in range(2):  # one of its own it replaces
        assert main(["report", str(run), "--output", str(tmp_path / "pages/one.html")]) == 0
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.medium
def test_a_browser_shows_it_at_every_width(run):
    file = report.write(run)
    started, program = browser()
    try:
        for width in (340, 800, 1400):
            for scheme in ("light", "dark"):
                context = program.new_context(
                    viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=True
                )
                page, messages, requests = context.new_page(), [], []
                page.on("console", lambda message, kept=messages: kept.append(message.text))
                page.on("request", lambda request, kept=requests: kept.append(request.url))
                page.goto(file.as_uri())
                assert messages == []
                assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                boxes = page.locator("figure svg").evaluate_all("all => all.map(one => one.getBoundingClientRect())")
                assert len(boxes) == 4
                assert all(box["width"] > 250 and box["height"] > 130 for box in boxes)
                curve = page.locator("figure svg path[clip-path]").first
                assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", curve.evaluate("one => getComputedStyle(one).stroke"))
                paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
                brightness = sum(int(part) for part in re.findall(r"\d+", paper)) / 3
                assert (brightness > 200) == (scheme == "light")
                context.close()
    finally:
        program.close()
        started.stop()
