"""The page, Markdown and CSV of tables, charts and pictures."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import pytest

from cotgen_pl.study.entries import Entry, Illustration, Panel, Picture, Spread, Table
from cotgen_pl.study.page import Code, Points, Section, as_csv, as_html, as_markdown, files_of

ENTRY = Entry(Spread(0.5, 0.01, 3), Spread(0.1, 0.02, 3), Spread(0.25, 0.04, 2))
PICTURE = Picture("base-0", b"png", 96, 'of "a | b"', 0.25, ("failed: a < b",))
NUMBERS = Table("numbers", "Scores & gains", ["what", "mean"], [["a | b", ENTRY]], 1, "see `a`")
GRID = Table("grid", "Pictures", ["prompt", "base"], [["a_b", PICTURE]], 1)
CHART = Illustration("Chart", "A caption.", [Panel("chart-1", "rises [to] 1", "<svg/>")])
SECTIONS = [
    Section("First part", ["Look at `this` <now>.", Points(["one"]), Code("a < b")]),
    Section("Second part", [NUMBERS, CHART, GRID]),
]


class Outline(HTMLParser):
    """Tags that are open, and what each picture and link has."""

    VOID = ("img", "meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


@pytest.fixture(scope="module")
def page():
    return as_html("Title & more", SECTIONS)


def test_page_is_whole_and_closed(page):
    outline = Outline(page)
    assert outline.open == []
    assert [a["href"] for a in outline.all("a")] == ["#first-part", "#second-part"]
    assert [s["id"] for s in outline.all("section")] == ["first-part", "second-part"]


def test_page_needs_nothing_from_elsewhere(page):
    sources = [picture["src"] for picture in Outline(page).all("img")]
    assert [source.partition(";")[0] for source in sources] == [
        "data:image/svg+xml",
        "data:image/png",
    ]
    assert base64.b64decode(sources[1].partition(",")[2]) == b"png"
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_every_picture_has_words(page):
    assert [p["alt"] for p in Outline(page).all("img")] == ["rises [to] 1", 'of "a | b"']


def test_text_is_never_markup(page):
    assert "<title>Title &amp; more</title>" in page
    assert "Look at <code>this</code> &lt;now&gt;." in page
    assert '<span class="below">failed: a &lt; b</span>' in page


def test_numbers_stand_in_a_real_table(page):
    assert '<th scope="row">a | b</th><td class="number">0.500 ± 0.010' in page
    assert '<span class="below">+0.100 ± 0.020</span>' in page
    assert '<span class="below">+25.0 ± 4.0 % (2 of 3 seeds)</span>' in page


def test_markdown_has_the_same(page):
    text = as_markdown("Title", SECTIONS)
    assert text.startswith(
        "# Title\n\n## First part\n\nLook at `this` <now>.\n\n- one\n\n```\na < b"
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        rows[2] == "| a \\| b | 0.500 ± 0.010<br>+0.100 ± 0.020<br>+25.0 ± 4.0 % (2 of 3 seeds) |"
    )
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert "![rises \\[to\\] 1](figures/chart-1.svg)" in text
    assert 'src="pictures/base-0.png"' in text


def test_files_are_those_that_markdown_names():
    files = files_of(SECTIONS)
    assert sorted(files) == [
        "figures/chart-1.svg",
        "pictures/base-0.png",
        "tables/grid.csv",
        "tables/numbers.csv",
    ]
    text = as_markdown("Title", SECTIONS)
    named = re.findall(r"(?:figures|pictures)/[\w.-]+", text)
    assert sorted(named) == ["figures/chart-1.svg", "pictures/base-0.png"]


def test_csv_has_a_line_for_each_number():
    [row] = csv.DictReader(io.StringIO(as_csv(NUMBERS)))
    assert row["what"] == "a | b" and row["column"] == "mean"
    assert (row["mean"], row["deviation"], row["seeds"]) == ("0.5", "0.01", "3")
    assert (row["gain_mean"], row["relative_gain_mean"], row["relative_gain_seeds"]) == (
        "0.1",
        "0.25",
        "2",
    )


def test_a_label_that_is_called_like_a_number_is_the_rows():
    table = Table("one", "One", ["images", "seeds", "a"], [["x", 2, ENTRY]], 2)
    [row] = csv.DictReader(io.StringIO(as_csv(table)))
    assert (row["images"], row["row_seeds"], row["seeds"]) == ("x", "2", "3")


def test_csv_leaves_out_what_is_not_known():
    one = Entry(Spread.of([0.5]))
    table = Table("one", "One", ["what", "a", "b"], [["x", one, Entry(Spread.of([]))]], 1)
    rows = list(csv.reader(io.StringIO(as_csv(table))))[1:]
    assert rows == [["x", "a", "0.5", "", "1", *6 * [""]], ["x", "b", *9 * [""]]]


def test_csv_of_pictures_has_their_verdicts():
    assert list(csv.reader(io.StringIO(as_csv(GRID)))) == [
        ["prompt", "base"],
        ["a_b", "0.25 | failed: a < b"],
    ]
