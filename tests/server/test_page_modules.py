"""The page's modules by themselves, in a browser: Markdown against markdown-it's, server-sent events in any pieces."""

import random
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from tests.browser import browser
from tests.server import clients
from tests.server.page import opened

TEXTS = (
    "hello *a* **b** `c` ~~d~~\nsecond *line\nthat* goes on",
    "# h1\n## h2\ntext\n### h3 ##\n####### no\n#no",
    "- a\n- b\n  - c\n    - d\n- e\n\nafter",
    "1. a\n2. b\n   - x\n   - y\n3. c\n\n7. seven",
    "* a\n\n  para\n* b\n+ other",
    "> q\n> r\nlazy\n\nz\n> - a\n> - b\n>   > deep",
    "```py\nx = 1\n\n  y  # *no*\n```\nafter",
    "~~~\na```b\n~~~\n````\n```\n````",
    "- item\n  ```\n  code\n\n    more\n  ```\n  text",
    "a | b\n--|:-:\n1 | 2\n3 | `x`\n\nend",
    "| a | b |\n|---|---|\n| \\| | **c** |\n",
    "[l](http://a.b/c) <https://x.y/> [t](https://a.b/ 'title') [n *e* m](https://a.b/(c))",
    "***bold it*** and **bold *it* x** and *it **bold***",
    "snake_case_word and _em_ __st__ a__b__c",
    "\\*no\\* 1 * 2 * 3 \\\\ \\a",
    "---\n***\n_ _ _\nb\n\n-- -",
    "para\n---x\n1. one\n\n1984\\. That",
    "`` a`b `` and ` c ` and `open",
    "[x] [y] ] [",
    "a*b*c 5*3*2 **a** *  b*",
    "5 > 3 && 2 < 3",
    "1) a\n2) b\n\n10) ten",
    "שלום *עולם* 🦙 **é**",
    "```\nunclosed\n",
)
PIECES = (
    *(
        "*",
        "_",
        "`",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "  ",
        "    ",
        "> ",
        "#",
        "|",
        "|--|--|\n",
        "a|b\n",
        "```",
        "~~~",
        "word",
    ),
    *("[", "](", "http://a.b", ")", "\\", "é", "🦙", "שלום", " ", "**", "\t", "\r\n", "x" * 40, "---", "<b>", "&amp;"),
)
RENDERED = (
    "async texts => { const m = await import('/page/markdown.js'); return texts.map(t => m.rendered(t).innerHTML) }"
)
IN_PIECES = """async ([texts, cuts]) => {
  const m = await import('/page/markdown.js');
  return texts.map((text, i) => {
    const root = document.createElement('div'), shown = new m.Markdown(root);
    let at = 0;
    for (const cut of [...cuts[i], text.length]) { shown.append(text.slice(at, cut)); at = cut }
    shown.finish();
    return root.innerHTML;
  });
}"""
WORK = """async ([text, piece]) => {
  const m = await import('/page/markdown.js');
  const root = document.createElement('div'), shown = new m.Markdown(root);
  let nodes = 0;
  const make = { text: document.createTextNode, element: document.createElement };
  document.createTextNode = t => (nodes++, make.text.call(document, t));
  document.createElement = t => (nodes++, make.element.call(document, t));
  for (let at = 0; at < text.length; at += piece) shown.append(text.slice(at, at + piece));
  shown.finish();
  Object.assign(document, { createTextNode: make.text, createElement: make.element });
  return nodes;
}"""
DEPTH = """async text => {
  const m = await import('/page/markdown.js');
  let depth = 0;
  for (let e = m.rendered(text); e; e = e.lastElementChild) depth++;
  return depth;
}"""
EVENTS = """async chunks => {
  const { EventParser } = await import('/page/sse.js');
  const parser = new EventParser();
  return chunks.flatMap(bytes => parser.feed(new Uint8Array(bytes)));
}"""


@pytest.fixture(scope="module")
def page():
    started, program = browser()
    with clients.serve(clients.scripted_model()) as address, opened(program, address) as found:
        yield found
    program.close()
    started.stop()


class Outline(HTMLParser):
    """Tags, addresses and texts of HTML, without what the page does otherwise on purpose."""

    def __init__(self, source: str, shift: int):
        super().__init__()
        self.found: list[str] = []
        self.shift, self.skipped = shift, 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "div":
            self.skipped += self.skipped > 0 or attributes.get("class") == "code-header"
        if tag == "div" or self.skipped:
            return
        if tag == "p":  # whether a list is loose is not kept
            return
        side = (attributes.get("style") or "").removeprefix("text-align:") or attributes.get("class", "")
        side = side if tag in ("th", "td") and side == "center" else ""
        self.found.append(f"<{self.name(tag)} {attributes.get('href', '')}{attributes.get('start', '')}{side}>")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if self.skipped:
            self.skipped -= tag == "div"
        elif tag not in ("p", "div"):
            self.found.append(f"</{self.name(tag)}>")

    def handle_data(self, data):
        if not self.skipped and data.strip():
            self.found.append(" ".join(data.split()))

    def name(self, tag):
        if tag[0] == "h" and tag[1:].isdigit():
            return f"h{min(6, int(tag[1:]) + self.shift)}"
        return {"s": "del"}.get(tag, tag)


def random_texts(count, length):
    generator = random.Random(7)
    return ["".join(generator.choice(PIECES) for _ in range(generator.randint(2, length))) for _ in range(count)]


@pytest.mark.parametrize("text", TEXTS)
def test_markdown_is_what_others_make_of_it(page, text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    (found,) = page.evaluate(RENDERED, [text])
    assert Outline(found, 0).found == Outline(parser.render(text), 2).found


def test_any_pieces_end_alike(page):
    generator = random.Random(3)
    texts = [*TEXTS, *random_texts(150, 40)]
    whole = page.evaluate(RENDERED, texts)
    for most in (1, 4, 30):
        cuts = []
        for text in texts:
            at = [generator.randint(1, most) for _ in range(len(text))]
            cuts.append([cut for cut in (sum(at[:i]) for i in range(1, len(at))) if cut < len(text)])
        assert page.evaluate(IN_PIECES, [texts, cuts]) == whole


def test_no_text_is_lost_or_invented(page):
    """Where nothing is an address or the name of a language, each letter of the text is on the page, and as often."""
    texts = [text for text in random_texts(400, 60) if not any(mark in text for mark in ("](", "```", "~~~"))]
    assert len(texts) > 50
    script = RENDERED.replace("innerHTML", "textContent")
    for text, shown in zip(texts, page.evaluate(script, texts), strict=True):
        assert {letter: shown.count(letter) for letter in "wordxש🦙é"} == {
            letter: text.count(letter) for letter in "wordxש🦙é"
        }


@pytest.mark.parametrize(
    "unit",
    [
        "word *em* ",
        "- item **b**\n",
        "> - a\n",
        "```\ncode\n",
        "| a |\n|--|\n| b |\n\n",
        "x",
        "[](",
        "`a``b```",
        "a *b ",
    ],
)
def test_the_work_is_linear_in_the_text(page, unit):
    """Twice the text, in pieces of one size, makes at most some two times as many nodes."""
    once, twice = (page.evaluate(WORK, [unit * (size // len(unit)), 64]) for size in (12_000, 24_000))
    assert twice < 2.3 * once + 50


def test_nothing_takes_exponentially_long(page):
    hostile = [
        "*" * 4000 + "a", "[" * 4000, "](" * 2000, "`" * 3999, "> " * 2000 + "a", "- " * 2000 + "a", "*a **b " * 700,
        "|" * 4000 + "\n" + "|-" * 2000, "# " + " " * 4000 + "x", "-" * 4000 + " x", "_a" * 2000, "\\" * 4001,
        "<http://" * 500,
    ]  # fmt: skip
    page.set_default_timeout(10_000)
    assert len(page.evaluate(RENDERED, hostile)) == len(hostile)
    assert all(page.evaluate(DEPTH, text) < 60 for text in hostile)


def test_events_survive_any_division_of_their_bytes(page):
    stream = (
        'data: {"a": "é🦙"}\n\n: a comment\n\nevent: x\ndata: one\ndata:two\n\n'
        "data\n\ndata: cr\r\rdata: crlf\r\n\r\nid: 4\nretry: 5\n\ndata:  space\n\ndata: unfinished"
    ).encode()
    expected = ['{"a": "é🦙"}', "one\ntwo", "", "cr", "crlf", " space"]
    assert page.evaluate(EVENTS, [list(stream)]) == expected
    assert page.evaluate(EVENTS, [[byte] for byte in stream]) == expected
    for cut in range(1, len(stream)):
        assert page.evaluate(EVENTS, [list(stream[:cut]), list(stream[cut:])]) == expected
