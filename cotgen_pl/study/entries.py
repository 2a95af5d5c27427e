"""What stands in a report's tables: numbers of several seeds, pictures, words.

Apart from `tables.py` and `grids.py`, which say what is tabulated, and from `page.py`, which says
how it looks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NOTHING = "-"


@dataclass(frozen=True)
class Spread:
    """A number of each seed, by its mean and how far the seeds lie apart."""

    mean: float
    """NaN where no seed has the number."""
    deviation: float
    """Sample standard deviation over seeds; NaN for fewer than two."""
    seeds: int
    """How many have the number."""

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of a number per seed; NaN is no number and is left out.

        >>> Spread.of([0.5, 0.75, float("nan")])
        Spread(mean=0.625, deviation=0.1767766952966369, seeds=2)
        """
        known = [value for value in values if not math.isnan(value)]
        mean = float(np.mean(known)) if known else math.nan
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
        return cls(mean, deviation, len(known))

    def text(self, form: str = ".3f") -> str:
        """Mean ± deviation, each in a format such as ".3f"; a sign in it is the mean's alone."""
        if not self.seeds:
            return NOTHING
        around = "?" if math.isnan(self.deviation) else format(self.deviation, form.lstrip("+"))
        return f"{self.mean:{form}} ± {around}"


@dataclass(frozen=True)
class Entry:
    """A number of a table, where the base has it too with what was gained over that."""

    score: Spread
    difference: Spread | None = None
    """To the base of the same seed."""
    relative: Spread | None = None
    """The same in parts of the base's number, seed by seed."""
    form: str = ".3f"
    row_seeds: int = 0
    """Of the row that it stands in; 0 where it stands in none."""

    def lines(self) -> list[str]:
        """One below the other: the number, what was gained, and the same in percent.

        A number of fewer seeds than its row, or a gain of fewer than its number, says of how many.
        """
        lines = [self.score.text(self.form) + self._fewer_than_row()]
        if self.difference is not None and self.difference.seeds:
            lines.append(self.difference.text(f"+{self.form}") + self._fewer(self.difference))
        if self.relative is not None and self.relative.seeds:
            percent = Spread(100 * self.relative.mean, 100 * self.relative.deviation, 1)
            lines.append(f"{percent.text('+.1f')} %{self._fewer(self.relative)}")
        return lines

    def _fewer_than_row(self) -> str:
        fewer = 0 < self.score.seeds < self.row_seeds
        return f" ({self.score.seeds} of {self.row_seeds} seeds)" if fewer else ""

    def _fewer(self, gain: Spread) -> str:
        fewer = gain.seeds < self.score.seeds
        return f" ({gain.seeds} of {self.score.seeds} seeds)" if fewer else ""


def compare(values: Mapping[int, float], base: Mapping[int, float], form: str = ".3f") -> Entry:
    """An entry from numbers by seed, and those of the base; each seed with its own base.

    >>> compare({0: 0.6, 1: 0.9}, {0: 0.5, 1: 0.5}).lines()
    ['0.750 ± 0.212', '+0.250 ± 0.212', '+50.0 ± 42.4 %']
    """
    both = [seed for seed in values if seed in base]
    return Entry(
        Spread.of(values.values()),
        Spread.of(values[seed] - base[seed] for seed in both),
        Spread.of((values[seed] - base[seed]) / base[seed] for seed in both if base[seed]),
        form,
    )


@dataclass(frozen=True)
class Picture:
    """A picture in a grid, with what its judge says of it."""

    name: str
    """Of its file, without ending; equal names are equal pictures."""
    png: bytes
    side: int
    """Pixels of its width."""
    alt: str
    score: float
    verdict: tuple[str, ...]
    """The judge's words, in lines."""

    def lines(self) -> list[str]:
        """What stands under it."""
        return ["no verdict" if math.isnan(self.score) else f"{self.score:.2f}", *self.verdict]


Content = str | int | tuple[str, ...] | Entry | Picture
"""What stands in a table's cell; a tuple is lines of text."""


def lines_of(content: Content) -> list[str]:
    """The lines of text of a table's cell."""
    if isinstance(content, Entry | Picture):
        return content.lines()
    return list(content) if isinstance(content, tuple) else [str(content)]


@dataclass(frozen=True)
class Table:
    """Rows of labels and of what is told of them."""

    name: str
    """Of its file, without ending."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Content]]
    """Each as long as `columns`."""
    num_labels: int
    """How many columns at the left say what a row is of."""
    note: str = ""
    """What a reader must know to read it."""


@dataclass(frozen=True)
class Panel:
    """One chart."""

    name: str
    """Of its file, without ending."""
    alt: str
    """What it shows, in words and in its last numbers."""
    svg: str


@dataclass(frozen=True)
class Illustration:
    """Charts that belong together."""

    title: str
    caption: str
    panels: Sequence[Panel]
