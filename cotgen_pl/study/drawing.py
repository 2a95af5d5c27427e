"""How a chart of a report is drawn: its looks, its legend, and the same bytes each time."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cotgen_pl.study.definition import Group
from cotgen_pl.study.entries import Panel
from cotgen_pl.study.rows import ALGORITHM

PANEL = (4.6, 3.7)  # inches; at 96 pixels each, little wider than a phone
# Okabe and Ito's colours, told apart by nearly all eyes, without their yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
BEST_MARKER = "*"
SHORT = 12  # letters of a legend's entry, of which four stand in a line
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",  # letters are drawn: no font of the reader's is needed
}


class Styles:
    """How the places of a group are told apart, the same in all of its panels.

    Algorithms have dashes and markers, all other levels colours; where there is nothing else,
    algorithms have colours too.

    Args:
        group: Whose levels these are.
        axes: Those that matter; absent means all of the group's.
    """

    def __init__(self, group: Group, axes: Sequence[str] | None = None) -> None:
        own = list(group.axes if axes is None else axes)
        self.dashed = [axis for axis in own if axis == ALGORITHM]
        self.colored = [axis for axis in own if axis != ALGORITHM] or self.dashed
        self.colors = _cycle(group, self.colored, COLORS)
        self.dashes = _cycle(group, self.dashed, DASHES)
        self.markers = _cycle(group, self.dashed, MARKERS)

    def of(self, labels: Mapping[str, str]) -> dict[str, Any]:
        """The line of a place; what is not a level of the group has the first look."""
        color, dash = (
            tuple(labels.get(a, "") for a in axes) for axes in (self.colored, self.dashed)
        )
        return {
            "color": self.colors.get(color, COLORS[0]),
            "linestyle": self.dashes.get(dash, DASHES[0]),
            "marker": self.markers.get(dash, MARKERS[0]),
        }

    def handles(self, dashes: bool = True) -> list[Line2D]:
        """A legend's entries: each colour, then each dash and marker.

        Args:
            dashes: Whether lines are drawn between the markers.
        """
        looks = []
        for levels in self.colors:
            labels = dict(zip(self.colored, levels, strict=True))
            plain = {} if self.colored == self.dashed else {"marker": "", "linewidth": 3}
            looks.append(self.of(labels) | {"label": ", ".join(levels)} | plain)
        for levels in self.dashes if self.colored != self.dashed else ():
            look = self.of(dict(zip(self.dashed, levels, strict=True)))
            look |= {"color": "0.3"} if dashes else {"color": "0.3", "linestyle": "none"}
            looks.append(look | {"label": ", ".join(levels)})
        return [Line2D([], [], markersize=4, **look) for look in looks]


def _cycle(group: Group, axes: Sequence[str], looks: Sequence[str]) -> dict[tuple[str, ...], str]:
    """A look for each combination of levels; the first again where there are more."""
    if not axes:
        return {}
    levels = itertools.product(*(group.axes[axis] for axis in axes))
    return dict(zip(levels, itertools.cycle(looks), strict=False))


def draw_panel(
    name: str, alt: str, draw: Callable[[Axes], None], handles: Sequence[Line2D]
) -> Panel:
    """A panel with its legend below, free of dates and of settings of the machine."""
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=PANEL, layout="constrained")
        draw(figure.add_subplot())
        columns = 4 if all(len(str(handle.get_label())) < SHORT for handle in handles) else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Panel(name, alt, text.getvalue())
