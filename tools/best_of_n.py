"""How well do rewards choose? `python tools/best_of_n.py FOLDER --judge NAME`, without training.

Reads the scores.jsonl of a folder that `predict` wrote with rewards, and prints, for every n up to
the number of candidates of a prompt, what the judge says on average of the best of n by each
reward, beside random selection (the floor) and the judge's own choice (the ceiling). A reward whose
curve keeps rising generalises to what the judge measures; one whose curve turns down will be
hacked (arXiv 2505.17017).

All candidates of a prompt count alike, whichever reported copy they were drawn for. The interval is
that of the mean over prompts, 1.96 standard errors to each side; for the mean over categories, the
categories' errors are independent.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cotgen_pl.best_of_n import best_of_n_curve
from cotgen_pl.evaluation.suites import UNNAMED
from cotgen_pl.evaluation.tables import NUM_ERRORS
from cotgen_pl.files import read_rows, without_nan, write_whole
from cotgen_pl.monitors import mean_error

if __package__:  # as a module of tools/
    from tools.main import run_command
else:  # as a script, which has its own folder on the path
    from main import run_command

SCORES = "scores.jsonl"
RANDOM = "random"
MEAN = "mean over categories"
PANELS_PER_ROW = 3


@dataclass
class Candidates:
    """All scores of a folder: P prompts with N candidates each."""

    categories: list[str]
    """[P]."""
    totals: dict[str, Tensor]
    """By reward, [P, N] float64; NaN for no verdict."""


@dataclass
class Curve:
    """What the judge says of the best of n, for every n from 1 to N."""

    mean: Tensor
    """[N], over prompts."""
    interval: Tensor
    """[N], half the width of its 95% interval; NaN for a single prompt."""


# Reading ----------------------------------------------------------------------------------------


def read_candidates(folder: Path) -> Candidates:
    """The scores of a folder that `predict` has finished.

    Raises:
        ValueError: There are none, or prompts have different numbers of candidates or rewards.
    """
    path = folder / SCORES
    rows = read_rows(path)
    unfinished = sorted(part.name for part in folder.glob("scores_*.jsonl"))
    if not rows or unfinished:
        raise ValueError(
            f"expected the scores of all candidates in {path}, got "
            f"{', '.join(unfinished) + ', of a run that goes on' if unfinished else 'none'}; let "
            "predict finish with rewards on ImageWriter (see configs/predict/)"
        )
    _check_complete(folder, len(rows))
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["index"]].append(row)
    numbers = {len(group) for group in groups.values()}
    rewards = list(rows[0]["rewards"])
    if len(numbers) > 1 or any(list(row["rewards"]) != rewards for row in rows):
        raise ValueError(
            f"{path}: expected as many candidates of each prompt, scored by the same rewards, got "
            f"{sorted(numbers)} and {sorted({name for row in rows for name in row['rewards']})}; "
            "draw the folder anew"
        )
    totals = {name: _table(groups, name) for name in rewards}
    return Candidates([group[0]["category"] for group in groups.values()], totals)


def _check_complete(folder: Path, number: int) -> None:
    """Raise a ValueError unless there are as many scores as `predict` was to draw pictures."""
    path = folder / "origin.json"
    if not path.is_file():
        raise ValueError(
            f"expected {path} beside the scores, got no file; name the folder that predict wrote"
        )
    origin = json.loads(path.read_text(encoding="utf-8"))
    wanted = origin["prompts"]["number"] * origin["copies"] * origin["candidates"]
    if number != wanted:
        raise ValueError(
            f"{folder}: expected scores of {wanted} candidates, got {number}; let predict finish"
        )


def _table(groups: Mapping[int, Sequence[Mapping[str, Any]]], name: str) -> Tensor:
    """[P, N] float64 of a reward."""
    table = [[row["rewards"][name]["total"] for row in group] for group in groups.values()]
    numbers = [[math.nan if value is None else value for value in row] for row in table]
    return torch.tensor(numbers, dtype=torch.float64)


# Curves -----------------------------------------------------------------------------------------


def draw_curves(
    candidates: Candidates, judge: str, chosen_by: Sequence[str]
) -> dict[str, dict[str, Curve]]:
    """Curves by category, and of their mean, then by what chooses: random first, the judge last."""
    totals = candidates.totals
    unknown = [name for name in [judge, *chosen_by] if name not in totals]
    if unknown:
        raise ValueError(
            f"expected rewards out of {list(totals)}, got {unknown}; name those that scored the "
            "candidates, or draw again with the others"
        )
    choosers = {RANDOM: torch.zeros_like(totals[judge])}
    choosers |= {name: totals[name] for name in chosen_by if name != judge} | {judge: totals[judge]}
    names = [name or UNNAMED for name in candidates.categories]
    curves: dict[str, dict[str, Curve]] = {name: {} for name in (MEAN, *dict.fromkeys(names))}
    for chooser, scores in choosers.items():
        values = best_of_n_curve(totals[judge], scores)  # [P, N]
        own = []
        for category in dict.fromkeys(names):
            rows = torch.tensor([name == category for name in names])
            own.append(_mean_curve(values[rows]))
            curves[category][chooser] = own[-1]
        curves[MEAN][chooser] = _mean_of(own)
    return curves


def _mean_curve(values: Tensor) -> Curve:
    """Of prompts [P, N]; those without the judge's verdict are left out."""
    errors = [mean_error(column[:, None]) for column in values.T]
    return Curve(values.nanmean(0), NUM_ERRORS * torch.tensor(errors))


def _mean_of(curves: Sequence[Curve]) -> Curve:
    mean = torch.stack([curve.mean for curve in curves]).mean(0)
    squares = torch.stack([curve.interval for curve in curves]).square().sum(0)
    return Curve(mean, squares.sqrt() / len(curves))


# Showing ----------------------------------------------------------------------------------------


def format_curves(curves: Mapping[str, Mapping[str, Curve]], judge: str) -> str:
    """A table for each category, a line for each n."""
    lines = []
    for category, choosers in curves.items():
        labels = [_label(name, judge) for name in choosers]
        width = max(18, *(len(label) + 2 for label in labels))
        lines += [category, f"{'n':>5s}" + "".join(f"{label:>{width}s}" for label in labels)]
        for row in range(len(choosers[judge].mean)):
            cells = [
                f"{curve.mean[row]:.3f} ± {curve.interval[row]:.3f}" for curve in choosers.values()
            ]
            lines.append(f"{row + 1:5d}" + "".join(f"{cell:>{width}s}" for cell in cells))
        lines.append("")
    return "\n".join(lines)


def _label(name: str, judge: str) -> str:
    return f"{name} (ceiling)" if name == judge else f"{name} (floor)" if name == RANDOM else name


def as_json(curves: Mapping[str, Mapping[str, Curve]], **settings: Any) -> str:
    """All of it as JSON; entry n - 1 of a list is that of n, numbers that are not known null."""
    numbers = {
        category: {
            name: {"mean": curve.mean.tolist(), "interval": curve.interval.tolist()}
            for name, curve in choosers.items()
        }
        for category, choosers in curves.items()
    }
    content = without_nan({**settings, "curves": numbers})
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def plot_curves(curves: Mapping[str, Mapping[str, Curve]], judge: str, path: Path) -> None:
    """Draw a panel for each category, with intervals as bands; the path's ending says the format.

    A single category, whose mean is itself, has one panel.
    """
    from matplotlib.figure import Figure

    shown = dict(list(curves.items())[1:]) if len(curves) == 2 else curves
    columns = min(PANELS_PER_ROW, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    styles = _line_styles(list(shown[next(iter(shown))]), judge)
    for panel, (category, choosers) in zip(panels, shown.items(), strict=False):
        for name, curve in choosers.items():
            n = torch.arange(1, len(curve.mean) + 1)
            [line] = panel.plot(n, curve.mean, label=_label(name, judge), **styles[name])
            below, above = curve.mean - curve.interval, curve.mean + curve.interval
            panel.fill_between(n, below, above, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set_title(category, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.tick_params(labelbottom=True)
    for panel in panels[len(shown) :]:
        panel.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel("n candidates, one chosen", fontsize=10)
    figure.supylabel(f"{judge}, 95% interval over prompts", fontsize=10)
    figure.savefig(path, dpi=150)


def _line_styles(choosers: Sequence[str], judge: str) -> dict[str, dict[str, Any]]:
    """Of lines by what chooses; dashes differ, since curves may lie on each other."""
    styles = {RANDOM: {"color": "0.5", "linestyle": "--"}, judge: {"color": "black"}}
    rewards = [name for name in choosers if name not in styles]
    dashes = ("-", "-.", ":")
    return styles | {
        name: {"color": f"C{place}", "linestyle": dashes[place % len(dashes)]}
        for place, name in enumerate(rewards)
    }


def best_of_n(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Curve]]:
    """Read a command line, print and write; returns the curves."""
    parser = argparse.ArgumentParser(
        description="What a judge says of the best of n candidates by other rewards.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="of pictures that predict drew with rewards")
    parser.add_argument("--judge", required=True, help="the reward that measures")
    parser.add_argument(
        "--chosen_by", nargs="+", help="the rewards that choose; all others if left out"
    )
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    parser.add_argument("--plot", type=Path, help="a picture to draw, like curves.png or .pdf")
    own = parser.parse_args(arguments)
    candidates = read_candidates(own.folder)
    chosen_by = own.chosen_by or [name for name in candidates.totals if name != own.judge]
    curves = draw_curves(candidates, own.judge, chosen_by)
    number, most = candidates.totals[own.judge].shape
    blind = int(candidates.totals[own.judge].isnan().all(1).sum())
    print(f"{number} prompts x {most} candidates of {own.folder}, judged by {own.judge}")
    print(f"{blind} prompts without its verdict are left out\n" if blind else "")
    print(format_curves(curves, own.judge))
    if own.json:
        settings = {"folder": str(own.folder), "judge": own.judge, "prompts": number}
        text = as_json(curves, **settings, prompts_without_verdict=blind, candidates=most)
        write_whole(own.json, lambda part: part.write_text(text, encoding="utf-8"))
    if own.plot:
        own.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(curves, own.judge, own.plot)
    return curves


if __name__ == "__main__":
    run_command(best_of_n)
