"""The charts of a report, each panel an SVG of its own that fits a phone.

Each public function is what `kind` of a figure in a study's file names; its arguments behind
`name` are the entry's other words. The same records give the same bytes. Dashes and markers tell
algorithms apart, colours all else; bars and bands are the sample deviation over seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.definition import Group
from cotgen_pl.study.drawing import BEST_MARKER, Styles, draw_panel
from cotgen_pl.study.entries import Illustration, Panel, Spread
from cotgen_pl.study.folders import Curve, Numbers, Record, Records
from cotgen_pl.study.rows import (
    BEST,
    REWARD,
    Row,
    axis_beside_reward,
    base_records,
    best_record,
    domain_score,
    domain_scores,
    gain_of,
    has_scores,
    rows_of,
)
from cotgen_pl.study.tables import heading

Against = Literal["images", "kl_to_base"]

MEANS = {"id": "val/id/mean", "ood": "val/ood/mean"}
"""What is logged of a domain."""
KL = "val/kl_to_base"


def spread_text(numbers: Iterable[int]) -> str:
    """What bars and bands are, of things with these numbers of seeds.

    >>> spread_text([3, 6, 0])
    'bars and bands: the sample deviation over 3 to 6 seeds.'
    """
    known = sorted({number for number in numbers if number})
    if known in ([], [1]):
        return "one seed, so no bars and bands."
    told = f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
    return f"bars and bands: the sample deviation over {told} seeds."


# Lines over training ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A number as training goes on, over seeds."""

    place: Numbers
    """[N], images sampled or nats; mean over seeds."""
    mean: Numbers
    """[N]."""
    deviation: Numbers
    """[N], NaN for one seed."""


def curves(
    records: Records,
    group: Group,
    name: str,
    metrics: Mapping[str, str] | None = None,
    against: Sequence[Against] = ("images", "kl_to_base"),
) -> list[Illustration]:
    """Logged numbers against images sampled, and against the divergence from the base.

    Args:
        records: Of the study.
        group: Its runs are lines.
        name: Of the files; the panel's number follows.
        metrics: Logged names by the titles of their panels; absent means both domains' means.
        against: What runs along the horizontal axis.
    """
    titled = metrics or {DOMAINS[domain]: metric for domain, metric in MEANS.items()}
    bases = base_records(records, group)
    rows = [_from_start(row, bases) for row in rows_of(records, group) if row.kind == "trained"]
    panels = [
        _curve_panel(f"{name}-{number}", group, rows, title, metric, axis)
        for number, ((title, metric), axis) in enumerate(
            itertools.product(titled.items(), against), 1
        )
    ]
    caption = (
        "Means over seeds of each evaluation in training; those between start and end see fewer "
        "pictures and scatter more. What draws all its images before it learns (DPO in one round) "
        f"goes straight from its start to its end; {spread_text(len(row.records) for row in rows)}"
    )
    shown = [panel for panel in panels if panel is not None]
    return [Illustration(heading(group), caption, shown)] if shown else []


def _curve_panel(
    name: str, group: Group, rows: Sequence[Row], title: str, metric: str, against: Against
) -> Panel | None:
    styles, shown = Styles(group), {}
    for row in rows:
        course = course_of(row.records.values(), metric, against)
        if len(course.place):
            shown[row.title] = (styles.of(row.labels), course)
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for style, course in shown.values():
            axes.plot(course.place, course.mean, markersize=3, **style)
            below, above = course.mean - course.deviation, course.mean + course.deviation
            axes.fill_between(course.place, below, above, color=style["color"], alpha=0.12, lw=0)
        axes.set(title=title, xlabel=AXES[against], ylabel="mean score")

    ends = [f"{label} {course.mean[-1]:.3f}" for label, (_, course) in shown.items()]
    alt = f"{title} against {AXES[against]}; at the end: {', '.join(ends)}."
    return draw_panel(name, alt, draw, styles.handles())


AXES: dict[Against, str] = {
    "images": "images sampled",
    "kl_to_base": "KL to the base, nats per token",
}


def _from_start(row: Row, bases: Mapping[int, Record]) -> Row:
    """The same with the base's scores at its start, in runs that did not score it themselves."""
    own = {
        seed: _with_start(record, bases[seed]) if seed in bases else record
        for seed, record in row.records.items()
    }
    return Row(row.kind, row.labels, own)


def _with_start(record: Record, base: Record) -> Record:
    starts = {metric: domain_score(base, domain) for domain, metric in MEANS.items()} | {KL: 0.0}
    metrics = dict(record.metrics)
    for name, start in starts.items():
        curve = metrics.get(name)
        if curve is not None and curve.updates[0] > 0:
            metrics[name] = Curve(
                np.append(0.0, curve.updates),
                np.append(0.0, curve.images),
                np.append(start, curve.values),
            )
    return replace(record, metrics=metrics)


def course_of(records: Iterable[Record], metric: str, against: Against) -> Course:
    """A metric over the evaluations that all records have: the first ones, and the last.

    Runs whose pairs are not equally many end at different updates: their last evaluations are
    taken together, and so are those with equal numbers before.
    """
    found = [_points(record, metric, against) for record in records]
    common = min((len(points) for points in found), default=0)
    if not common:
        return Course(*[np.empty(0)] * 3)
    points = np.stack([np.concatenate([p[: common - 1], p[-1:]]) for p in found])  # [S, N, 2]
    spreads = [Spread.of(column) for column in points[:, :, 1].T.tolist()]
    return Course(
        points[:, :, 0].mean(0),
        np.array([spread.mean for spread in spreads]),
        np.array([spread.deviation for spread in spreads]),
    )


def _points(record: Record, metric: str, against: Against) -> Numbers:
    """[N, 2], places and values; of several at one number of images, the last."""
    curve, kl = record.metrics.get(metric, NO_CURVE), record.metrics.get(KL, NO_CURVE)
    if against == "kl_to_base":
        nats = dict(zip(kl.updates, kl.values, strict=True))
        places = np.array([nats.get(update, np.nan) for update in curve.updates])
        pairs = list(zip(places, curve.values, strict=True))
    else:
        pairs = list(dict(zip(curve.images, curve.values, strict=True)).items())
    points = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return points[~np.isnan(points).any(1)]


NO_CURVE = Curve(*[np.empty(0)] * 3)


# Levels -----------------------------------------------------------------------------------------


def levels(records: Records, group: Group, name: str, axis: str) -> list[Illustration]:
    """The gain in each domain over the levels of an axis.

    Args:
        records: Of the study.
        group: Its runs are points.
        name: Of the files; the domain follows.
        axis: Its levels run along the horizontal axis.
    """
    panels = [_level_panel(f"{name}-{d}", records, group, axis, d) for d in MEANS]
    bases = base_records(records, group)
    rows = [row for row in rows_of(records, group) if row.kind == "trained"]
    seeds = [gain_of(row, bases, domain).seeds for row in rows for domain in MEANS]
    caption = f"Gain over the base of the same seed; {spread_text(seeds)}"
    return [Illustration(heading(group), caption, panels)]


def _level_panel(name: str, records: Records, group: Group, axis: str, domain: str) -> Panel:
    others, bases = [other for other in group.axes if other != axis], base_records(records, group)
    lines: dict[tuple[str, ...], list[tuple[int, Spread, Row]]] = {}
    for row in rows_of(records, group):
        gain = gain_of(row, bases, domain)
        if row.kind == "trained" and gain.seeds:
            place = group.axes[axis].index(row.labels[axis])
            lines.setdefault(tuple(row.labels[o] for o in others), []).append((place, gain, row))
    styles = Styles(group, others)

    def draw(axes: Axes) -> None:
        axes.axhline(0, color="0.4", linewidth=0.8)
        for number, points in enumerate(lines.values()):
            shift = SHIFT * (number - (len(lines) - 1) / 2)  # bars do not hide each other
            places = [place + shift for place, _, _ in points]
            means = [gain.mean for _, gain, _ in points]
            bars = [gain.deviation for _, gain, _ in points]
            axes.errorbar(places, means, bars, capsize=2.5, **styles.of(points[0][2].labels))
        axes.set_xticks(range(len(group.axes[axis])), group.axes[axis])
        axes.set(title=DOMAINS[domain], xlabel=axis.replace("_", " "), ylabel="gain over the base")

    told = [f"{row.title} {gain.mean:+.3f}" for ps in lines.values() for _, gain, row in ps]
    alt = f"Gain {DOMAINS[domain]} by {axis.replace('_', ' ')}: {', '.join(told)}."
    return draw_panel(name, alt, draw, styles.handles())


SHIFT = 0.06  # of the distance between two levels


# Points -----------------------------------------------------------------------------------------


def summary(records: Records, group: Group, name: str) -> list[Illustration]:
    """All in one picture: what each run gained in domain and out of domain."""
    rows, bases = rows_of(records, group), base_records(records, group)
    points = [(row, gain_of(row, bases, "id"), gain_of(row, bases, "ood")) for row in rows[1:]]
    labels = ("gain in domain", "gain out of domain")
    panel = _point_panel(name, "Who gains where", Styles(group), points, labels, diagonal=True)
    caption = (
        "Gain over the base of the same seed. On the dashed line both domains gain the same; below "
        f"it training is better where it trained. Stars: {BEST} by each reward, without training; "
        f"{spread_text(gain.seeds for _, *gains in points for gain in gains)}"
    )
    return [Illustration(heading(group), caption, [panel])]


def uplift(records: Records, group: Group, name: str) -> list[Illustration]:
    """Whether a reward that chooses well out of domain also teaches well there."""
    other = axis_beside_reward(group)
    rows, bases = rows_of(records, group), base_records(records, group)
    chosen = {row.labels[REWARD]: gain_of(row, bases, "ood") for row in rows if row.kind == "best"}
    panels, seeds = [], []
    for level in group.axes[other]:
        own = [r for r in rows if r.labels[other] == level and r.labels[REWARD] in chosen]
        points = [(row, chosen[row.labels[REWARD]], gain_of(row, bases, "ood")) for row in own]
        seeds += [gain.seeds for _, *gains in points for gain in gains]
        labels = (f"uplift of {BEST}, out of domain", "gain by training, out of domain")
        panels.append(_point_panel(f"{name}-{level}", level, Styles(group), points, labels))
    caption = (
        f"Each point is a reward: what {BEST} by it gains on the base's own pictures, and what "
        f"training on it gains; {spread_text(seeds)}"
    )
    return [Illustration("Intrinsic generalisation and what becomes of it", caption, panels)]


def _point_panel(
    name: str,
    title: str,
    styles: Styles,
    points: Sequence[tuple[Row, Spread, Spread]],
    labels: tuple[str, str],
    diagonal: bool = False,
) -> Panel:
    known = [point for point in points if point[1].seeds and point[2].seeds]

    def draw(axes: Axes) -> None:
        for row, across, up in known:
            style = styles.of(row.labels) | {"linestyle": "none"}
            if row.kind == "best":
                style |= {"marker": BEST_MARKER, "markersize": 10, "markeredgecolor": "white"}
            axes.errorbar(
                across.mean, up.mean, up.deviation, across.deviation, elinewidth=0.8, **style
            )
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.axvline(0, color="0.4", linewidth=0.8)
        if diagonal:
            axes.axline((0, 0), slope=1, color="0.4", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])

    told = [f"{row.title} {across.mean:+.3f}, {up.mean:+.3f}" for row, across, up in known]
    alt = f"{title}: {labels[0]}, then {labels[1]}, of {'; '.join(told)}."
    has_best = any(row.kind == "best" for row, _, _ in known)
    star = [Line2D([], [], color="0.3", marker=BEST_MARKER, linestyle="none", label=BEST)]
    return draw_panel(name, alt, draw, styles.handles(dashes=False) + star * has_best)


# Choosing among more ----------------------------------------------------------------------------


def best_of_n(records: Records, group: Group, name: str) -> list[Illustration]:
    """How each reward's choice among n of the base's pictures does, as n grows."""
    bases, judge = base_records(records, group), records.study.judge
    panels = [_choice_panel(f"{name}-{domain}", bases, group, domain, judge) for domain in MEANS]
    caption = (
        "The judge's mean of the picture that a reward chooses among n of the base's, without any "
        f"training; {spread_text([len(bases)])}"
    )
    return [Illustration("Best of n by each reward", caption, panels)]


def _choice_panel(
    name: str, bases: Mapping[int, Record], group: Group, domain: str, judge: str | None
) -> Panel:
    styles, lines = Styles(group, [REWARD]), {}
    most = min(s.graded.shape[1] for r in bases.values() for s in r.suites_of(domain))
    for reward in group.axes[REWARD]:
        records = [
            {seed: best_record(record, reward, judge, n) for seed, record in bases.items()}
            for n in range(1, most + 1)
        ]
        if any(has_scores(record) for record in records[0].values()):
            lines[reward] = [Spread.of(domain_scores(own, domain).values()) for own in records]

    def draw(axes: Axes) -> None:
        for reward, spreads in lines.items():
            means = np.array([spread.mean for spread in spreads])
            around = np.array([spread.deviation for spread in spreads])
            style, n = styles.of({REWARD: reward}), range(1, most + 1)
            axes.plot(n, means, markersize=3, **style)
            axes.fill_between(n, means - around, means + around, color=style["color"], alpha=0.12)
        axes.set_xticks(range(1, most + 1))
        axes.set(title=DOMAINS[domain], xlabel="n pictures, one chosen", ylabel="mean score")

    told = [f"{reward} {spreads[-1].mean:.3f}" for reward, spreads in lines.items()]
    alt = f"Best of n {DOMAINS[domain]}; of {most} the choice by {', '.join(told)}."
    return draw_panel(name, alt, draw, styles.handles())
