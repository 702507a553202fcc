"""Where WikiText articles begin: on the real files, and where rows of tables and equations look like titles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.data import textfiles
from llamita.data.wikitext import articles, heading_level

LEAD = " The lead paragraph of the article . "


def titles(text: str) -> list[str]:
    return [article.split("\n")[0] for article in articles(text.split("\n"))]


# Counted by reading each candidate in its place: 60 articles in each file. In test.txt two more lines have the shape of
# a title and are parts of equations (under "Constant k filter").
@pytest.mark.parametrize(("name", "first", "last"), [
    ("valid", "= Homarus gammarus =", "= <unk> <unk> ="),
    ("test", "= Robert <unk> =", "= The <unk> ( film ) ="),
])  # fmt: skip
def test_real_files(shared_data, name, first, last):
    path = shared_data / "wikitext-2" / f"{name}.txt"
    found = list(articles(textfiles.lines(path)))
    heads = [article.split("\n")[0] for article in found]
    assert len(found) == 60
    assert (heads[0], heads[-1]) == (first, last)
    assert all(heading_level(head) == 1 for head in heads)
    # Nothing is lost or moved: all lines that are not blank, in order.
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    assert "\n".join(found).split("\n") == lines
    if name == "test":
        shaped = [line for line in lines if heading_level(line) == 1]
        assert sorted(set(shaped) - set(heads)) == ["= 1 <unk> / s and a nominal <unk> k =", "= 1 <unk> and <unk> C ="]
        assert "= Constant k filter =" in heads
        assert "= The <unk> =" in heads
    else:
        # One blank line before it, where the others have two or three.
        assert "= Japanese battleship Asahi =" in heads


def test_the_usual_layout():
    text = f" \n = One = \n \n{LEAD}\n More . \n \n = = History = = \n \n Text . \n \n \n = Two = \n \n{LEAD}\n \n"
    one, two = articles(text.split("\n"))
    assert one == f"= One =\n{LEAD.strip()}\nMore .\n= = History = =\nText ."
    assert two == f"= Two =\n{LEAD.strip()}"


TABLES = {
    "row inside a table": " \n = = Results = = \n \n Key \n = Win ; D = \n Draw \n",
    "row begins its section": " \n = = Results = = \n \n = Win ; D = \n Draw ; L = Loss \n",
    "row ends its section": " \n = = Results = = \n \n Key \n = Win ; D = \n",
    "row is all of its section": " \n = = Results = = \n \n = Win ; D = \n",
    "rows follow each other": " \n = = Results = = \n \n Key \n = Win ; D = \n = Draw ; L = \n = Loss ; \n",
    "row is all of a subsection": " \n = = Results = = \n \n \n = = = League = = = \n \n = Win ; D = \n",
    "equation in a paragraph": " where the impedance is \n = A * B + C = \n 1 , for any B . \n",
    "no spaces around": "\n= = Results = =\n\nKey\n= Win ; D =\nDraw\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
@pytest.mark.parametrize("blanks", [1, 2, 3])
def test_rows_are_not_titles(table, blanks):
    text = f" = Club season = \n \n{LEAD}\n{table}{' ' + chr(10) * blanks} = Next = \n \n{LEAD}\n"
    assert titles(text) == ["= Club season =", "= Next ="]


def test_row_as_the_whole_lead():
    assert titles(f" = Club = \n \n = Win ; D = \n \n = = Next = = \n \n{LEAD}\n") == ["= Club ="]


@pytest.mark.parametrize("title", ["E = mc ²", "1 + 1 = 2", "x = y = z", "Win ; D", "A =", "= 3", "== operator"])
def test_titles_may_contain_equals_signs(title):
    text = f" = First = \n \n{LEAD}\n \n \n = {title} = \n \n{LEAD}\n"
    assert titles(text) == ["= First =", f"= {title} ="]


@pytest.mark.parametrize("blanks", [1, 2, 3])
def test_title_after_text(blanks):
    text = f" = One = \n \n{LEAD}\n" + " \n" * blanks + f" = Two = \n \n{LEAD}"
    assert titles(text) == ["= One =", "= Two ="]


@pytest.mark.parametrize("blanks", [2, 3])
def test_title_after_an_empty_section_or_article(blanks):
    gap = " \n" * blanks
    assert titles(f" = One = \n \n{LEAD}\n \n = = See = = \n{gap} = Two = \n \n{LEAD}") == ["= One =", "= Two ="]
    assert titles(f" = One = \n{gap} = Two = \n \n{LEAD}") == ["= One =", "= Two ="]


def test_title_without_a_lead():
    text = f" = One = \n \n \n = = History = = \n \n{LEAD}\n \n \n = Two = \n \n \n = = History = = \n \n{LEAD}"
    assert titles(text) == ["= One =", "= Two ="]


def test_ends_of_the_file():
    assert titles("= First line =\n\nText") == ["= First line ="]
    assert titles("Text\n\n\n= Last line =") == ["Text", "= Last line ="]
    assert titles("= Only =") == ["= Only ="]
    assert titles("Rest of an article .\n\n\n = Next = \n\nText") == ["Rest of an article .", "= Next ="]
    assert titles("") == titles(" \n\n \n") == []
    assert titles("Text\n = Row = ") == ["Text"]


def test_line_ends_and_marks_of_the_file_do_not_matter(tmp_path, shared_data):
    original = (shared_data / "wikitext-2" / "test.txt").read_bytes()
    path = tmp_path / "crlf.txt"
    path.write_bytes(b"\xef\xbb\xbf" + original.replace(b"\n", b"\r\n").rstrip())
    plain = list(articles(textfiles.lines(shared_data / "wikitext-2" / "test.txt")))
    assert list(articles(textfiles.lines(path))) == plain


@pytest.mark.parametrize(("line", "level"), [
    (" = Title = ", 1), (" = = Heading = = ", 2), (" = = = = Deep = = = = ", 4), (" = a = = ", 1), (" = = a = ", 1),
    (" = Win ; D ", 0), (" Win ; D = ", 0), (" = ", 0), (" = = ", 0), (" = = = ", 0), ("", 0), ("=Title=", 0),
])  # fmt: skip
def test_heading_level(line, level):
    assert heading_level(line) == level


WORDS = st.text("abc =", min_size=1, max_size=8)
PARAGRAPHS = st.lists(st.one_of(WORDS.map(lambda w: f" x {w}"), st.just(" = Win ; D = ")), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.lists(PARAGRAPHS, min_size=1, max_size=4), st.integers(1, 3)), min_size=1, max_size=5))
def test_any_articles_come_back(corpus):
    """Laid out as in the real files; paragraphs may be rows like titles, anywhere but alone between blank lines."""
    lines, expected = [" "], []
    for number, (sections, blanks) in enumerate(corpus):
        body = [f" = Title {number} = "]
        lines += [body[0], " "]
        for depth, section in enumerate(sections):
            if depth:
                lines += [" ", f" = = Heading {depth} = = ", " "]
                body.append(f" = = Heading {depth} = = ")
            lines += section
            body += section
        lines += [" "] * blanks
        expected.append("\n".join(line.strip() for line in body))
    assert list(articles(lines)) == expected
