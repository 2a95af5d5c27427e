"""How a report looks: one HTML page that needs nothing else, Markdown with files beside it, CSV."""

from __future__ import annotations

import base64
import csv
import html
import importlib.resources
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Template

from cotgen_pl.study.entries import (
    Content,
    Entry,
    Illustration,
    Panel,
    Picture,
    Spread,
    Table,
    lines_of,
)


@dataclass(frozen=True)
class Code:
    """Commands, as they are typed."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    points: Sequence[str]


Block = str | Code | Points | Table | Illustration
"""A piece of a section; a string is a paragraph, in which `backticks` mark names in code."""


@dataclass(frozen=True)
class Section:
    """A part of a report under its own heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its name in a link."""
        return slug(self.title)


def slug(text: str) -> str:
    """A text as a name of files and of anchors.

    >>> slug("In domain, strict")
    'in-domain-strict'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# HTML -------------------------------------------------------------------------------------------


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The whole page; charts and pictures are in it."""
    template = importlib.resources.files("cotgen_pl.study").joinpath("report.html")
    links = [f'<a href="#{s.anchor}">{html.escape(s.title)}</a>' for s in sections]
    parts = [
        f'<section id="{s.anchor}">\n<h2>{html.escape(s.title)}</h2>\n'
        + "\n".join(_html_block(block) for block in s.blocks)
        + "\n</section>"
        for s in sections
    ]
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), links="\n".join(links), sections="\n".join(parts)
    )


def _html_block(block: Block) -> str:
    match block:
        case Table():
            return _html_table(block)
        case Illustration():
            return _html_illustration(block)
        case Code():
            return f"<pre>{html.escape(block.text)}</pre>"
        case Points():
            points = "".join(f"<li>{_html_text(point)}</li>" for point in block.points)
            return f"<ul>{points}</ul>"
        case _:
            return f"<p>{_html_text(block)}</p>"


def _html_text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _html_table(table: Table) -> str:
    """A table that scrolls inside its own box where the page is narrow."""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    body = "\n".join(
        "<tr>"
        + "".join(_html_cell(c, place < table.num_labels) for place, c in enumerate(row))
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{_html_text(table.note)}</p>' if table.note else ""
    return (
        f"<h3>{html.escape(table.title)}</h3>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n{note}"
    )


LONG = 30  # letters of a label from which on it may take several lines
LONG_CELL = 60  # likewise of a line of numbers with words


def _html_cell(content: Content, is_label: bool) -> str:
    lines = [html.escape(line) for line in lines_of(content)]
    if isinstance(content, Picture):
        picture = (
            f'<img src="data:image/png;base64,{_base64(content.png)}" width="{content.side}" '
            f'alt="{html.escape(content.alt)}">'
        )
        return f'<td class="picture">{picture}{_html_lines(lines)}</td>'
    if is_label:
        long = ' class="long"' if len(lines[0]) > LONG else ""
        return f'<th scope="row"{long}>{lines[0]}</th>'
    kind = "text" if isinstance(content, str | int) else "number"
    kind += " long" if max(map(len, lines)) > LONG_CELL else ""
    return f'<td class="{kind}">{_html_lines(lines)}</td>'


def _html_lines(lines: Sequence[str]) -> str:
    """The first line, and the others smaller below it."""
    return lines[0] + "".join(f'<span class="below">{line}</span>' for line in lines[1:])


def _html_illustration(illustration: Illustration) -> str:
    panels = "\n".join(_html_panel(panel) for panel in illustration.panels)
    return (
        f"<h3>{html.escape(illustration.title)}</h3>\n<figure>\n"
        f'<div class="panels">\n{panels}\n</div>\n'
        f"<figcaption>{_html_text(illustration.caption)}</figcaption></figure>"
    )


def _html_panel(panel: Panel) -> str:
    data = _base64(panel.svg.encode())
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(panel.alt)}">'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# Markdown ---------------------------------------------------------------------------------------


def as_markdown(title: str, sections: Iterable[Section]) -> str:
    """The same with charts in `figures/` and pictures in `pictures/`, see `files_of`."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *(_markdown_block(block) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Table():
            return _markdown_table(block)
        case Illustration():
            panels = [f"![{_one_line(p.alt)}](figures/{p.name}.svg)" for p in block.panels]
            return "\n\n".join([f"### {block.title}", "\n".join(panels), block.caption])
        case Code():
            return f"```\n{block.text}\n```"
        case Points():
            return "\n".join(f"- {point}" for point in block.points)
        case _:
            return block


def _markdown_table(table: Table) -> str:
    marks = ["---" if place < table.num_labels else "---:" for place in range(len(table.columns))]
    rows = [[_markdown_cell(content) for content in row] for row in table.rows]
    lines = ["| " + " | ".join(row) + " |" for row in [[*map(_one_line, table.columns)], marks]]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n\n".join([f"### {table.title}", "\n".join(lines), *([table.note] * bool(table.note))])


def _markdown_cell(content: Content) -> str:
    text = "<br>".join(_one_line(line) for line in lines_of(content))
    if isinstance(content, Picture):
        source = f'src="pictures/{content.name}.png" width="{content.side}"'
        alt = html.escape(content.alt).replace("|", "&#124;")  # would end the cell
        return f'<img {source} alt="{alt}"><br>{text}'
    return text


def _one_line(text: str) -> str:
    """Text that may stand in a table's cell or in brackets."""
    return re.sub(r"([|\[\]<>*_\\])", r"\\\1", " ".join(text.split()))


# Files ------------------------------------------------------------------------------------------


def files_of(sections: Iterable[Section]) -> dict[str, bytes]:
    """By path in the report's folder: charts, pictures, and each table as CSV."""
    files: dict[str, bytes] = {}
    for block in (block for section in sections for block in section.blocks):
        match block:
            case Illustration():
                files |= {f"figures/{panel.name}.svg": panel.svg.encode() for panel in block.panels}
            case Table():
                files[f"tables/{block.name}.csv"] = as_csv(block).encode()
                found = [c for row in block.rows for c in row if isinstance(c, Picture)]
                files |= {f"pictures/{picture.name}.png": picture.png for picture in found}
    return files


def as_csv(table: Table) -> str:
    """A line for each number, with what it is of; a table of words and pictures as it stands.

    A label that is called like one of the numbers, such as `seeds`, is `row_seeds` there.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if any(isinstance(content, Entry) for row in table.rows for content in row):
        own = ["column", *(f"{p}{n}" for p in PREFIXES for n in NUMBERS)]
        labels = table.columns[: table.num_labels]
        writer.writerow([*(f"row_{name}" if name in own else name for name in labels), *own])
        for row in table.rows:
            for column, content in list(zip(table.columns, row, strict=True))[table.num_labels :]:
                if isinstance(content, Entry):
                    writer.writerow([*row[: table.num_labels], column, *_numbers(content)])
    else:
        writer.writerow(table.columns)
        writer.writerows([" | ".join(lines_of(content)) for content in row] for row in table.rows)
    return text.getvalue()


PREFIXES = ("", "gain_", "relative_gain_")
NUMBERS = ("mean", "deviation", "seeds")


def _numbers(entry: Entry) -> list[str]:
    """Nothing stands for what is not known."""
    numbers: list[str] = []
    for spread in (entry.score, entry.difference, entry.relative):
        known = spread if spread is not None and spread.seeds else None
        numbers += _written(known) if known else [""] * len(NUMBERS)
    return numbers


def _written(spread: Spread) -> list[str]:
    deviation = "" if spread.deviation != spread.deviation else f"{spread.deviation:.6g}"
    return [f"{spread.mean:.6g}", deviation, str(spread.seeds)]
