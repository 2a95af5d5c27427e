"""What a study is: its YAML file, read into runs, groups of runs that are compared, and prompts.

A file in configs/studies has these entries; the paths in it are relative to the working directory,
and `{folder}` in an override stands for the study's own folder:

    name, title, folder     what it is called, and where its runs lie
    base                    how the policy without training is scored: `config` and `overrides`
    judge                   the level of the axis `reward` whose scores are the suites' own
    prompts                 prompt files made before the first run; see `cotgen_pl.study.prompts`
    groups                  by name, in the order in which they run: runs that are compared
    tables, figures         what the report shows, by name; each is of one group
    claims                  the file of claims and their tests

A group spans axes. Each axis has levels, each level has `overrides` and may have a `config` and
`starts_from`; the group's runs are all combinations, and a run's labels are its level on each axis.
`where` in a level holds what it says for one level of another axis alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from cotgen_pl.interfaces import check_choice

Command = Literal["fit", "validate"]
Comparison = Literal["free", "growing", "controlled"]
Priority = Literal["main", "efficiency", "extra"]

BASE = "base"
"""Name of the run that scores the policy as it is before training."""


@dataclass(frozen=True)
class Run:
    """One command of tools/main.py, for several seeds."""

    name: str
    """Its folder inside the study's; a seed has a folder of its own in that."""
    config: str
    overrides: Mapping[str, Any]
    """Values by their names on the command line, without the two dashes."""
    seeds: tuple[int, ...]
    command: Command = "fit"
    starts_from: str | None = None
    """The run whose exported policy, of the same seed, this one begins with; absent means the
    policy that the config names."""

    @property
    def settings(self) -> str:
        """What the run does, as text: runs with equal settings are the same run."""
        parts = [self.command, self.config, dict(self.overrides), self.starts_from]
        return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """A place in a group: what a run is called there. Groups may share a run."""

    labels: Mapping[str, str]
    """Level by axis, such as {"algorithm": "grpo", "reward": "broad"}."""
    run: str
    """Name of the run."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Runs that are compared with each other."""

    name: str
    title: str
    comparison: Comparison
    """`controlled`: equal budgets of images. `growing`: images grow, prompts may. `free`: what
    is compared says nothing about images."""
    priority: Priority
    """What may be dropped if time runs short: extras first, then efficiency, `main` never."""
    axes: Mapping[str, tuple[str, ...]]
    """Levels by axis, in the order of the file."""
    cells: tuple[Cell, ...]

    def cell(self, **labels: str) -> Cell:
        """The one with these labels.

        Raises:
            ValueError: There is none, or more than one.
        """
        found = [c for c in self.cells if labels.items() <= c.labels.items()]
        if len(found) != 1:
            raise ValueError(
                f"group {self.name}: expected one cell with {labels}, got {len(found)} of "
                f"{[dict(c.labels) for c in self.cells]}; name a level of each axis"
            )
        return found[0]


@dataclass(frozen=True)
class Study:
    """All that a study's file says."""

    name: str
    title: str
    folder: Path
    runs: Mapping[str, Run]
    """By name; `base` is the first."""
    groups: Mapping[str, Group]
    """By name, in the order in which they run."""
    prompts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    claims: str | None = None
    judge: str | None = None
    """The level of an axis `reward` whose scores are the suites' own; the base has all others
    watched. Absent means that none is."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is left of the file: `choose` of a study that tunes, `gpu` of one that is planned."""

    def run_folder(self, run: str, seed: int) -> Path:
        """Where a run's files of a seed lie."""
        return self.folder / run / f"seed_{seed}"

    def overrides_of(self, run: Run, seed: int) -> dict[str, Any]:
        """What a run's command says of a seed beside its config and its folder."""
        overrides = dict(run.overrides)
        if run.starts_from is not None:
            exported = self.run_folder(run.starts_from, seed) / "exported"
            overrides["model.init_args.policy.init_args.path"] = exported.as_posix()
        return overrides | {"seed_everything": seed}

    def seeded_runs(self) -> Iterator[tuple[Run, int]]:
        """Each run with each of its seeds: runs in order, and within a run the seeds."""
        for run in self.runs.values():
            yield from ((run, seed) for seed in run.seeds)


# Reading ----------------------------------------------------------------------------------------


def read_study(path: str | Path, quick: bool = False, only: Sequence[str] = ()) -> Study:
    """Read a study's file.

    Args:
        path: Of the YAML file.
        quick: One seed, and the groups of priority `main` alone.
        only: Names of groups; none means all.

    Raises:
        ValueError: There is no such file, an entry is unknown, or a group that `only` names is.
    """
    content = read_yaml(path)
    known = {"name", "title", "folder", BASE, "seeds", "prompts", "groups", "tables", "figures"}
    known |= {"claims", "judge", "choose", "plan"}
    _check_names(content, known, {"name", "title", "folder", BASE, "seeds", "groups"}, str(path))
    folder, seeds = Path(content["folder"]), tuple(content["seeds"])
    _check_num_seeds(content["groups"], seeds)
    kept = _keep_groups(content["groups"], quick, only)
    seeds = seeds[:1] if quick else seeds
    runs: dict[str, Run] = {}
    # All of them, for a run that several share is named by the first, whichever are asked for.
    everything = {
        name: _read_group(name, entry, seeds, runs) for name, entry in content["groups"].items()
    }
    groups = {name: everything[name] for name in kept}
    runs = _runs_of(groups, runs)
    base_seeds = tuple(sorted({seed for run in runs.values() for seed in run.seeds}))
    base = Run(BASE, **_run_settings(content[BASE], BASE), seeds=base_seeds, command="validate")
    return Study(
        name=content["name"],
        title=content["title"],
        folder=folder,
        runs=_in_order({BASE: _fill_folder(base, folder)}, runs, folder),
        groups=groups,
        prompts=content.get("prompts", {}),
        tables=_of_groups(content.get("tables", {}), content["groups"], groups),
        figures=_of_groups(content.get("figures", {}), content["groups"], groups),
        claims=content.get("claims"),
        judge=content.get("judge"),
        settings={name: content[name] for name in ("choose", "plan") if name in content},
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping, or a ValueError that names the file."""
    if not Path(path).is_file():
        raise ValueError(f"expected a YAML file at {path}, got none; name one of configs/studies")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got: {error}; correct it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected names and values, got {content!r:.60}; correct it")
    return content


def _check_names(entry: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    unknown, missing = sorted(entry.keys() - known), sorted(needed - entry.keys())
    if unknown or missing:
        raise ValueError(
            f"{where}: expected {', '.join(sorted(needed))} among {', '.join(sorted(known))}, got "
            f"unknown {unknown}, missing {missing}; correct the file"
        )


def _keep_groups(groups: Mapping[str, Any], quick: bool, only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in groups]
    if unknown:
        raise ValueError(f"expected groups among {', '.join(groups)}, got {unknown}; name those")
    return [
        name
        for name, group in groups.items()
        if (not only or name in only) and (not quick or group.get("priority", "extra") == "main")
    ]


def _check_num_seeds(groups: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """A group has as many seeds as it says."""
    for name, group in groups.items():
        number = group.get("num_seeds", len(seeds))
        if number not in range(1, len(seeds) + 1):
            raise ValueError(
                f"group {name}: expected num_seeds from 1 to the study's {len(seeds)} seeds, got "
                f"{number}; lower it, or add to the study's seeds"
            )


def _runs_of(groups: Mapping[str, Group], runs: Mapping[str, Run]) -> dict[str, Run]:
    """The runs of some groups with the seeds that these ask for, and what they start from."""
    wanted: dict[str, dict[int, None]] = {}
    for cell in (cell for group in groups.values() for cell in group.cells):
        name = cell.run
        while name in runs and not wanted.get(name, {}).keys() >= set(cell.seeds):
            wanted.setdefault(name, {}).update(dict.fromkeys(cell.seeds))
            name = runs[name].starts_from or ""
    return {
        name: replace(run, seeds=tuple(wanted[name]))
        for name, run in runs.items()
        if name in wanted
    }


def _read_group(
    name: str, entry: Mapping[str, Any], seeds: tuple[int, ...], runs: dict[str, Run]
) -> Group:
    """A group, whose runs join `runs` unless they are there under another name."""
    known = {"title", "comparison", "priority", "num_seeds", "config", "overrides", "axes"}
    _check_names(entry, known, {"title", "axes"}, f"group {name}")
    comparison, priority = entry.get("comparison", "free"), entry.get("priority", "extra")
    check_choice("comparison", comparison, Comparison)
    check_choice("priority", priority, Priority)
    own_seeds = seeds[: entry.get("num_seeds", len(seeds))]
    axes: Mapping[str, Mapping[str, Any]] = entry["axes"]
    cells = []
    for levels in itertools.product(*axes.values()):
        labels = dict(zip(axes, map(str, levels), strict=True))
        own = [axes[axis][level] or {} for axis, level in zip(axes, levels, strict=True)]
        parts = [entry, *(part for level in own for part in _parts(level, labels))]
        run = _join_run(name, labels, parts, own_seeds)
        cells.append(Cell(labels, _add_run(runs, run), own_seeds))
    spans = {axis: tuple(map(str, levels)) for axis, levels in axes.items()}
    return Group(name, entry["title"], comparison, priority, spans, tuple(cells))


def _parts(level: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    """What a level says, and what it says where another axis has a certain level."""
    yield {name: value for name, value in level.items() if name != "where"}
    where = level.get("where", {})
    yield from (where[label] for label in labels.values() if label in where)


def _join_run(
    group: str,
    labels: Mapping[str, str],
    parts: Sequence[Mapping[str, Any]],
    seeds: tuple[int, ...],
) -> Run:
    """What a group and a level of each axis say together; the later has the last word."""
    for part in parts[1:]:
        _check_names(part, {"config", "overrides", "starts_from"}, set(), f"group {group} {labels}")
    configs = [part["config"] for part in parts if part.get("config")]
    starts = [part["starts_from"] for part in parts if part.get("starts_from")]
    if not configs:
        raise ValueError(f"group {group}: expected a config for {labels}, got none; name one")
    overrides: dict[str, Any] = {}
    for part in parts:
        overrides |= part.get("overrides") or {}
    name = f"{group}/{'-'.join(str(level) for level in labels.values())}"
    return Run(name, configs[-1], overrides, seeds, starts_from=starts[-1] if starts else None)


def _add_run(runs: dict[str, Run], run: Run) -> str:
    """The name under which a run of these settings goes, with the seeds of all its groups."""
    for name, other in runs.items():
        if other.settings == run.settings:
            seeds = tuple(dict.fromkeys([*other.seeds, *run.seeds]))
            runs[name] = replace(other, seeds=seeds)
            return name
    runs[run.name] = run
    return run.name


def _run_settings(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    _check_names(entry, {"config", "overrides"}, {"config"}, where)
    return {"config": entry["config"], "overrides": entry.get("overrides") or {}}


def _in_order(first: dict[str, Run], runs: Mapping[str, Run], folder: Path) -> dict[str, Run]:
    """All runs, each behind the one that it starts from."""
    ordered, waiting = dict(first), dict(runs)
    while waiting:
        ready = [n for n, r in waiting.items() if r.starts_from is None or r.starts_from in ordered]
        if not ready:
            name, run = next(iter(waiting.items()))
            raise ValueError(
                f"run {name}: expected starts_from to name a run of this study that does not come "
                f"from it, got {run.starts_from}; name one of {', '.join(runs)}"
            )
        for name in ready:
            ordered[name] = _fill_folder(waiting.pop(name), folder)
    return ordered


def _fill_folder(run: Run, folder: Path) -> Run:
    """A run whose overrides have the study's folder in place of `{folder}`."""
    overrides = {name: _filled(value, folder) for name, value in run.overrides.items()}
    return Run(run.name, run.config, overrides, run.seeds, run.command, run.starts_from)


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value.replace("{folder}", folder.as_posix())
    if isinstance(value, Mapping):
        return {name: _filled(entry, folder) for name, entry in value.items()}
    return [_filled(entry, folder) for entry in value] if isinstance(value, list) else value


def _of_groups(
    entries: Mapping[str, Any], all_groups: Mapping[str, Any], kept: Mapping[str, Group]
) -> dict[str, Any]:
    """Tables or figures, without those of groups that are left out."""
    for name, entry in entries.items():
        for group in (entry.get("group"), *entry.get("more", {}).values()):
            if group not in all_groups:
                raise ValueError(
                    f"{name}: expected a group among {', '.join(all_groups)}, got {group!r}; name "
                    "one"
                )
    return {name: entry for name, entry in entries.items() if entry["group"] in kept}
