"""What can be wrong with a study, told before any of its runs starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cotgen_pl.evaluation.tables import DOMAINS
from cotgen_pl.study.claims import Claim
from cotgen_pl.study.definition import BASE, Cell, Group, Study
from cotgen_pl.study.progress import domains_of, suites_of

TESTS_OF_CHOICES = ("order", "correlation")  # they need what rewards say of the base's pictures
SEEDS_OF_A_DEVIATION = 2  # the sample deviation of one number is not defined

Settings = Mapping[str, Any]


def check_study(
    study: Study, settings: Mapping[str, Settings], claims: list[Claim], deviates: bool = True
) -> None:
    """Raise a ValueError that names the first mistake.

    Args:
        study: What is to run.
        settings: By run, its whole configuration.
        claims: That the study tests.
        deviates: Whether deviations are told and claims tested; not of one quick seed.
    """
    for run in study.runs.values():
        if run.command == "fit":
            check_resumable(run.name, settings[run.name])
    for group in study.groups.values():
        if group.comparison == "controlled":
            check_budgets(group, settings)
    check_choosing(study, settings)
    for name, table in study.tables.items() if deviates else ():
        wanted = SEEDS_OF_A_DEVIATION if table.get("deviation", True) else 1
        check_seeds(study.groups[table["group"]], wanted, f"the deviation in table {name}")
    for claim in claims:
        if {claim.group, claim.minus_group or claim.group} <= study.groups.keys():
            check_claim(study, claim, settings, deviates)


def check_claim(
    study: Study, claim: Claim, settings: Mapping[str, Settings], deviates: bool
) -> None:
    """What a claim compares is there, scored in its domain, looked at, and run with seeds enough.

    Args:
        study: Its groups may be some of those that the file has.
        claim: About those that are there.
        settings: Of each run by name.
        deviates: Whether tests have more than one seed to go by.
    """
    group = study.groups[claim.group]
    minus_group = study.groups.get(claim.minus_group, group)
    purpose = f"the test of claim {claim.name}"
    claim.check(group, minus_group)
    if claim.test in TESTS_OF_CHOICES:
        check_watched(study, group, settings[BASE], purpose)
    for own in (group, minus_group):
        check_domains(claim, own, settings)
        if deviates:
            check_seeds(own, claim.least_seeds, purpose)


def check_claims(study: Study, claims: Sequence[Claim]) -> None:
    """Refuse claims about what a study does not have; asks for no configuration.

    Args:
        study: With all of its groups, whichever are to run now.
        claims: That it tests.

    Raises:
        ValueError: Names the first claim with another group, domain, place or axis.
    """
    for claim in claims:
        for name in (claim.group, claim.minus_group or claim.group):
            if name not in study.groups:
                raise ValueError(
                    f"claim {claim.name}: expected a group among {', '.join(study.groups)}, got "
                    f"{name!r}; correct the file of claims"
                )
        if claim.domain not in DOMAINS:
            raise ValueError(
                f"claim {claim.name}: expected a domain among {', '.join(DOMAINS)}, got "
                f"{claim.domain!r}; correct the file of claims"
            )
        group = study.groups[claim.group]
        claim.check(group, study.groups.get(claim.minus_group, group))


def check_domains(claim: Claim, group: Group, settings: Mapping[str, Settings]) -> None:
    """All that a claim compares is scored in its domain."""
    for run in dict.fromkeys([BASE, *(cell.run for cell in group.cells)]):
        domains = domains_of(settings[run])
        if claim.domain not in domains:
            raise ValueError(
                f"claim {claim.name}: expected a domain of the suites of run {run} "
                f"({', '.join(domains)}), got {claim.domain!r}; evaluate a suite of it, or correct "
                "the file of claims"
            )


def check_choosing(study: Study, settings: Mapping[str, Settings]) -> None:
    """The suite by which a study chooses is scored by all runs that compete."""
    rule = study.settings.get("choose", {"groups": ()})
    groups = [study.groups[name] for name in rule["groups"] if name in study.groups]
    for run in dict.fromkeys(cell.run for group in groups for cell in group.cells):
        names = suites_of(settings[run])
        if rule["suite"] not in names:
            raise ValueError(
                f"choose: expected a suite of run {run}, out of {names}, got {rule['suite']!r}; "
                "name one of them"
            )


def check_budgets(group: Group, settings: Mapping[str, Settings]) -> None:
    """A controlled comparison has one budget of images."""
    budgets = {cell.run: images_of(settings[cell.run]) for cell in group.cells}
    if len(set(budgets.values())) > 1:
        raise ValueError(
            f"group {group.name}: expected equal budgets of images in a controlled comparison, got "
            f"{budgets}; set model.init_args.images_budget alike, or call it growing"
        )


def images_of(settings: Settings) -> int:
    """Images that a configuration samples for training."""
    return int(settings["model"]["init_args"].get("images_budget", 0))


def check_seeds(group: Group, wanted: int, purpose: str) -> None:
    """Every cell of a group has as many seeds as something needs."""
    few: list[Cell] = [cell for cell in group.cells if len(cell.seeds) < wanted]
    if few:
        raise ValueError(
            f"group {group.name}: expected {wanted} seeds or more for {purpose}, got "
            f"{list(few[0].seeds)} for {dict(few[0].labels)}; name more seeds, or leave it out"
        )


def check_watched(study: Study, group: Group, base: Settings, purpose: str) -> None:
    """Every reward of a group looks at the base's pictures."""
    callbacks = base["trainer"]["callbacks"] or []
    watched = [name for c in callbacks for name in c["init_args"].get("watched") or ()]
    absent = set(group.axes.get("reward", ())) - {study.judge, *watched}
    if absent:
        raise ValueError(
            f"group {group.name}: expected each reward among the base's watched ones "
            f"({sorted(watched)}) or the judge ({study.judge}) for {purpose}, got {sorted(absent)} "
            "beside them; add it to `watched` in the base's overrides"
        )


def check_resumable(name: str, settings: Settings) -> None:
    """A run that is killed must be able to go on, and its end must be scored."""
    callbacks = settings["trainer"]["callbacks"] or []
    if not any(callback["init_args"].get("save_last") for callback in callbacks):
        raise ValueError(
            f"run {name}: expected a ModelCheckpoint with save_last: true, so that a killed run "
            "goes on, got none; add it to the callbacks of its config"
        )
    if not any(callback["init_args"].get("suites") for callback in callbacks):
        raise ValueError(
            f"run {name}: expected SuiteEvaluation among the callbacks, got none: the study would "
            "have nothing to read; add it to its config"
        )
