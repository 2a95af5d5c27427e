"""Scores on held-out prompts, in domain and out of domain, before, during and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.data.prompts import check_scorable
from cotgen_pl.evaluation.divergence import divergence
from cotgen_pl.evaluation.judging import Gallery, judge_suite
from cotgen_pl.evaluation.leak_check import LeakAction, LeakCheck
from cotgen_pl.evaluation.suites import (
    OWN,
    JudgedSuite,
    Metrics,
    Suite,
    check_shares,
    domain_mean,
    domain_means,
    domain_verdicts,
    domains_of,
    read_suite,
    sample_prompts,
)
from cotgen_pl.evaluation.tables import (
    format_table,
    format_tables,
    full_name,
    warn_of_equal,
    write_verdicts,
)
from cotgen_pl.evaluation.verdicts import VerdictStore, describe_judge, describe_variant
from cotgen_pl.interfaces import Reward, check_positive
from cotgen_pl.modules.base import PolicyModule, scorer_of
from cotgen_pl.monitors import Course, watch_hacking

__all__ = ["Suite", "SuiteEvaluation", "format_table"]

ALARM = "val/alarm/reward_hacking"


class SuiteEvaluation(Observer):
    """Draws the same prompts with the same noise each time, and logs how they score.

    Logged: `val/<domain>/<suite>/<category>` (mean over images), `val/<domain>/<suite>/mean` (over
    categories), `val/<domain>/<suite>/parts/<part>` for each watched part of the scorer (mean over
    categories), `val/<domain>/<suite>/diversity` (of a prompt's images, see
    `cotgen_pl.monitors.diversity`; mean over categories), `val/id/mean` and `val/ood/mean` (over
    suites), `val/gap` (in domain less out of domain), and `val/kl_to_base`: the KL divergence of
    the sampled distribution to that of the start weights, exact over the codebook, along the images
    drawn, mean per token, in nats.

    With `watched`: `val/watched/<domain>/<reward>` (mean over suites of the mean over categories)
    in domain and out of domain. Where the module trains on a reward and a suite is in domain, the
    reward scores that suite's images too, and `val/alarm/reward_hacking` is 1 where it goes up
    while a watched score or `val/ood/mean` goes down, else 0; the rule is that of
    `cotgen_pl.monitors.watch_hacking`, on as many images of each prompt as every evaluation has. A
    warning names what fell. An ensemble that standardises its parts has the same mean at all times
    and so never gives an alarm.

    A run's start and end and `validate` are thorough: all prompts. One that is killed goes on where
    it was, if weights, prompts, rewards and seeds are the same: its verdicts so far lie in
    `evaluation/unfinished`. At the end of a run and in `validate` the tables of
    `cotgen_pl.evaluation.tables` are printed, and every picture's verdict stands in
    `evaluation/<suite>.json` and `.csv`. With `prompts_per_category`, all that is logged is of the
    prompts that every evaluation scores, so that the points of a curve, and `ModelCheckpoint`'s
    best, compare with each other; the start and the end log the means over all prompts beside it,
    as `val/full/...`.

    Args:
        suites: What is scored.
        every_n_updates: Rollouts between two evaluations in training.
        images_per_prompt: Images of each prompt in the middle of a run; a suite may say otherwise.
        final_images_per_prompt: Images of each prompt at its start and end, and in `validate`;
            likewise.
        batch_size: Images drawn at a time, on each process.
        kl_images: Images of each in-domain and out-of-domain suite along which the divergence is
            taken; 0 leaves it out.
        watched: Rewards, by names of your own, that are looked at on all suites and not trained on;
            absent means no alarm, none at all ({}) that `val/ood/mean` alone is watched.
        prompts_per_category: Prompts of each suite's categories in the middle of a run, spread
            evenly over the category's list and the same each time; absent means all.
        leaks: What to do about prompts in training that a suite in or out of domain holds out; see
            `cotgen_pl.evaluation.leak_check.LeakCheck`.
        scores_start: Whether a run's start is scored; what `validate` says of the same weights
            and seed is the same.
        pictures_per_category: Prompts of each suite's categories whose first picture is kept with
            the verdicts, as `evaluation/pictures/<suite>/<place in the suite>.png`.
    """

    def __init__(
        self,
        suites: list[Suite],
        every_n_updates: int = 100,
        images_per_prompt: int = 2,
        final_images_per_prompt: int = 8,
        batch_size: int = 256,
        kl_images: int = 64,
        watched: dict[str, Reward] | None = None,
        prompts_per_category: int | None = None,
        leaks: LeakAction = "drop",
        scores_start: bool = True,
        pictures_per_category: int = 0,
    ) -> None:
        names = [suite.name for suite in suites]
        if not suites or len(set(names)) < len(names):
            raise ValueError(
                f"expected suites with names of their own, got {names}; name each once"
            )
        _check_watched(watched or {})
        super().__init__(every_n_updates)
        check_positive(
            images_per_prompt=images_per_prompt,
            final_images_per_prompt=final_images_per_prompt,
            batch_size=batch_size,
            prompts_per_category=prompts_per_category,
        )
        self.suites = suites
        self.images_per_prompt = images_per_prompt
        self.final_images_per_prompt = final_images_per_prompt
        self.batch_size, self.kl_images = batch_size, kl_images
        self.prompts = {suite.name: read_suite(suite) for suite in suites}
        self.samples = {
            name: sample_prompts(prompts, prompts_per_category)
            for name, prompts in self.prompts.items()
        }
        """Of each suite, what is scored in the middle of a run."""
        self.first: Metrics = {}
        self.last: Metrics = {}
        self.last_scored = -1
        """Rollouts before the last scores."""
        self.watched, self.leak_check = watched, LeakCheck(leaks)
        self.scores_start, self.pictures_per_category = scores_start, pictures_per_category
        self.course: Course | None = None
        """What the alarm remembers."""
        self.tables = ""
        """Of the last thorough evaluation of this process."""
        self._judges: dict[Reward, dict[str, Any]] = {}  # hashing a judge's weights takes seconds

    # When ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, prompts that cannot be drawn or lack a scorer's facts."""
        assert isinstance(pl_module, PolicyModule)
        for suite in self.suites:
            prompts = self.prompts[suite.name]
            check_shares(suite, len(self.samples[suite.name]), trainer.world_size)
            for reward in self._rewards(pl_module, suite).values():
                check_scorable(prompts, reward)
            pl_module.policy.check_prompts([prompt.drawn_text for prompt in prompts])
        self.leak_check.run(trainer, self.suites, self.prompts)

    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Score, and keep the scores of the start for the table."""
        starts = module.rollouts == 0
        if starts:
            self.leak_check.write(trainer)
        if not starts or self.scores_start:
            metrics = self.evaluate(module, thoroughly=thoroughly)
            self.first = metrics if starts else self.first

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show new scores to `ModelCheckpoint`, and the last divergence on the bar."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(pl_module, PolicyModule)
        if self.last_observed == pl_module.rollouts:
            pl_module.log_dict(self.last, logger=False, batch_size=1)
        if "val/kl_to_base" in self.last:  # the bar shows what is logged in a step, so in each
            divergence = self.last["val/kl_to_base"]
            pl_module.log("kl to base", divergence, prog_bar=True, logger=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what changed."""
        super().on_train_end(trainer, pl_module)
        assert isinstance(pl_module, PolicyModule)
        self._show(pl_module, self.first)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score a checkpoint or a folder under `validate`."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.state.fn == "validate":
            self.evaluate(pl_module, thoroughly=True)
            self._show(pl_module, {})

    def _show(self, module: PolicyModule, first: Metrics) -> None:
        """Print all tables."""
        if self.tables:  # a resumed run that had ended has none
            module.print(f"every picture's verdict: {_folder(module)}\n\n{self.tables}\n")
        module.print(format_table(first, self.last))

    @property
    def state_key(self) -> str:
        """Tells two of these apart in a checkpoint, by their suites."""
        return self._generate_state_key(suites=[suite.name for suite in self.suites])

    def state_dict(self) -> dict[str, Any]:
        """The scores of the start and the last ones, and the alarm's memory, for a resumed run."""
        return {
            "first": self.first,
            "last": self.last,
            "last_scored": self.last_scored,
            "course": vars(self.course) if self.course else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the scores."""
        self.first, self.last = state_dict["first"], state_dict["last"]
        self.last_scored = state_dict["last_scored"]
        self.course = Course(**state_dict["course"]) if state_dict["course"] else None

    # What ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, module: PolicyModule, *, thoroughly: bool) -> Metrics:
        """Score all suites, log the metrics and return them.

        Args:
            module: Whose policy draws.
            thoroughly: All prompts, `final_images_per_prompt` of each; else those of the middle.
        """
        stores = {suite.name: self._store(module, suite) for suite in self.suites if thoroughly}
        judged = [self._judge(module, suite, stores.get(suite.name)) for suite in self.suites]
        metrics = self._means([suite.part(self.samples[suite.suite.name]) for suite in judged])
        if thoroughly and self.samples != self.prompts:
            metrics |= {full_name(name): mean for name, mean in self._means(judged).items()}
        if self.kl_images:
            metrics |= self._divergences(module)
        if any("trained" in suite.verdicts for suite in judged):
            metrics[ALARM] = float(self._watch(module, judged))
        self.last, self.last_scored = metrics, module.rollouts
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.rollouts)
        if thoroughly:
            self._finish(module, judged, stores)
        return metrics

    def _judge(self, module: PolicyModule, suite: Suite, store: VerdictStore | None) -> JudgedSuite:
        thoroughly = store is not None
        prompts = (self.prompts if thoroughly else self.samples)[suite.name]
        rewards, copies = self._rewards(module, suite), self._copies(suite, thoroughly=thoroughly)
        gallery = None
        if thoroughly and _keeps_files(module):
            kept = sample_prompts(self.prompts[suite.name], self.pictures_per_category)
            gallery = Gallery(_folder(module) / "pictures" / suite.name, kept)
        return judge_suite(module, suite, prompts, rewards, copies, self.batch_size, store, gallery)

    def _means(self, judged: Sequence[JudgedSuite]) -> Metrics:
        """What the suites' verdicts come to."""
        metrics: Metrics = {}
        for suite in judged:
            metrics |= suite.metrics()
        return metrics | domain_means(judged) | self._watched_means(judged)

    def _copies(self, suite: Suite, *, thoroughly: bool) -> int:
        if thoroughly:
            return suite.final_images_per_prompt or self.final_images_per_prompt
        return suite.images_per_prompt or self.images_per_prompt

    # Thorough evaluations -----------------------------------------------------------------------

    def _store(self, module: PolicyModule, suite: Suite) -> VerdictStore:
        """Where a suite's verdicts are kept until all suites are finished."""
        rewards = self._rewards(module, suite)
        for reward in rewards.values():
            if reward not in self._judges:
                self._judges[reward] = describe_judge(reward)
        variant = describe_variant(
            module,
            suite.name,
            suite.files,
            self.prompts[suite.name],
            self._copies(suite, thoroughly=True),
            {name: self._judges[reward] for name, reward in rewards.items()},
        )
        return VerdictStore(_folder(module) / "unfinished", variant, module.global_rank)

    def _finish(
        self,
        module: PolicyModule,
        judged: Sequence[JudgedSuite],
        stores: Mapping[str, VerdictStore],
    ) -> None:
        """Make tables and, but at a run's start, files; then forget the batches."""
        self.tables = format_tables(judged)
        for suite in judged:
            warn_of_equal(suite)
        if module.trainer.is_global_zero:
            for suite in judged if _keeps_files(module) else ():
                self._write(module, suite, stores[suite.suite.name])
            for store in stores.values():
                store.remove()
        module.trainer.strategy.barrier("verdicts are written")

    def _write(self, module: PolicyModule, judged: JudgedSuite, store: VerdictStore) -> None:
        """Write a suite's files; the details of its pictures are on disk alone."""
        batches = store.read()
        if sum(len(batch.prompts) for batch in batches) < len(judged.prompts):
            raise ValueError(
                f"expected the verdicts of all processes in {store.folder}, got some of them; give "
                "all machines one folder, trainer.default_root_dir"
            )
        details: dict[int, Sequence[Any]] = {}
        for batch in batches:
            details |= zip(batch.prompts, batch.details or (), strict=batch.details is not None)
        copies = self._copies(judged.suite, thoroughly=True)
        seeds = module.noise_seeds(judged.prompts, copies, "evaluation")
        write_verdicts(_folder(module), judged, store.variant, seeds, details)

    # Rewards that judge -------------------------------------------------------------------------

    def _rewards(self, module: PolicyModule, suite: Suite) -> dict[str, Reward]:
        """All that judge a suite: its own, those that are watched, and the one trained on."""
        rewards = {OWN: scorer_of(module, suite.reward, f"suite {suite.name}")}
        if self.watched is None:
            return rewards
        rewards |= {f"watched/{name}": reward for name, reward in self.watched.items()}
        trained = getattr(module, "reward", None)
        if suite.domain == "id" and isinstance(trained, Reward) and not _validates(module):
            rewards["trained"] = trained
        return rewards

    def _watched_means(self, judged: Sequence[JudgedSuite]) -> Metrics:
        return {
            f"val/watched/{domain}/{name}": domain_mean(judged, domain, f"watched/{name}")
            for domain in domains_of(self.suites)
            for name in self.watched or {}
        }

    def _watch(self, module: PolicyModule, judged: Sequence[JudgedSuite]) -> bool:
        """Whether the alarm is on, with a warning that names what fell."""
        if module.rollouts == 0:
            self.course = None  # a run that was interrupted before its first update starts over
        judged = [self._in_all(suite) for suite in judged]
        domains = domains_of(self.suites)
        watched = {
            f"val/watched/{place}/{name}": domain_verdicts(judged, place, f"watched/{name}")
            for place in domains
            for name in self.watched or {}
        }
        if "ood" in domains:
            watched["val/ood/mean"] = domain_verdicts(judged, "ood")
        trained = domain_verdicts(judged, "id", "trained")
        self.course, names = watch_hacking(self.course, trained, watched)
        if names:
            rank_zero_warn(
                f"reward hacking at update {module.rollouts}? The trained reward has risen on the "
                f"in-domain suites, while {', '.join(names)} fell; look at the pictures, and go "
                "back to an earlier checkpoint, train for less long, or raise kl_coef"
            )
        return bool(names)

    def _in_all(self, judged: JudgedSuite) -> JudgedSuite:
        """The pictures that every evaluation of the run has."""
        suite = judged.suite
        copies = min(self._copies(suite, thoroughly=thorough) for thorough in (True, False))
        return judged.part(self.samples[suite.name], copies)

    def _divergences(self, module: PolicyModule) -> Metrics:
        suites = [suite for suite in self.suites if suite.domain != "shift"]
        prompts = [self.prompts[suite.name] for suite in suites]
        values = [divergence(module, some, self.kl_images, self.batch_size) for some in prompts]
        return {"val/kl_to_base": sum(values) / len(values)} if values else {}


def _check_watched(watched: Mapping[str, Reward]) -> None:
    unusable = [name for name in watched if not name or "/" in name]
    if unusable:
        raise ValueError(
            f"expected names of watched rewards without '/', which parts the names of metrics, got "
            f"{unusable}; rename them"
        )


def _validates(module: PolicyModule) -> bool:
    """Whether a checkpoint is scored, which has no course to watch."""
    return module.trainer.state.fn == "validate"


def _keeps_files(module: PolicyModule) -> bool:
    """Whether verdicts are written: not those of a run's start."""
    return module.rollouts > 0 or _validates(module)


def _folder(module: PolicyModule) -> Path:
    return Path(module.trainer.default_root_dir) / "evaluation"
