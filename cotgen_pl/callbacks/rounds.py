"""Iterative self-training: a run in rounds, each from where the one before has led."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cotgen_pl.callbacks.base import save_last
from cotgen_pl.callbacks.evaluation import SuiteEvaluation
from cotgen_pl.callbacks.pair_building import PairSettings, build_pairs
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.pairs import PairData
from cotgen_pl.data.prompts import PromptData, PromptFile, check_scorable, draw_passes, read_prompts
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Prompt, check_choice, check_positive
from cotgen_pl.leaks import check_same_prompts, fingerprint, leave_out
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.modules.grpo import GRPOModule
from cotgen_pl.modules.offline import OfflineModule
from cotgen_pl.pairs.sets import COUNTS, PairSet

RECORDED = ("val/id/mean", "val/ood/mean")

Reference = Literal["refresh", "keep"]
AtStart = Literal["keep", "reset"]
Prompts = Literal["new", "same"]


class IterativeRounds(Callback):
    """Divides a run, and its images budget, into rounds of equal numbers of images.

    DPO and SFT on pairs: a round draws a pair set with the policy of its start, then passes over it
    `PairData.epochs` times. One round is plain offline training, and draws nothing where `PairData`
    names finished pairs. GRPO: a round is a share of the rollouts. `rounds.jsonl` in the run folder
    gets a line for each finished round.

    Args:
        rounds: How many.
        files: Prompts that pairs are drawn for; GRPO has those of its `PromptData`.
        reference: What the reference has from the second round on: the weights of the round's
            start, or still those of the run's.
        optimizer: Whether its state goes on at a round's start.
        schedule: Whether the learning-rate schedule goes on at a round's start.
        prompts: Whether a round takes prompts that no round before has had (until all have been
            had). `same`: each set of pairs has those of the first, with other noise; GRPO goes
            through all of them as without rounds.
        pairs: Which pairs are taken, and how they are written.
    """

    def __init__(
        self,
        rounds: int = 1,
        files: list[PromptFile] | None = None,
        reference: Reference = "refresh",
        optimizer: AtStart = "keep",
        schedule: AtStart = "keep",
        prompts: Prompts = "new",
        pairs: PairSettings = PairSettings(),  # noqa: B008  # never changed
    ) -> None:
        check_positive(rounds=rounds)
        check_choice("reference", reference, Reference)
        check_choice("optimizer", optimizer, AtStart)
        check_choice("schedule", schedule, AtStart)
        check_choice("prompts", prompts, Prompts)
        self.rounds, self.reference, self.optimizer = rounds, reference, optimizer
        self.schedule, self.prompts, self.pairs = schedule, prompts, pairs
        self.files = files or []
        read = [(file.weight, read_prompts(file)) for file in self.files]
        numbered = enumerate(chain.from_iterable(prompts for _, prompts in read))
        self._all_prompts = [replace(prompt, index=index) for index, prompt in numbered]
        self._weights = [weight for weight, prompts in read for _ in prompts]
        self._prompts_read = self._all_prompts  # those that leak among them
        self._fits = False
        self.round = 0
        """The one that the run is in, from 0."""
        self.records: list[dict[str, Any]] = []
        """One for each finished round."""
        self._policy = ""  # hash of the weights at the round's start
        self._made: dict[str, Any] = {}  # what the record says of the round's pairs

    # Preparation --------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, rounds that cannot be or would change nothing."""
        self._fits = stage == "fit"
        if not self._fits:
            return
        data: Any = getattr(trainer, "datamodule", None)
        if isinstance(pl_module, GRPOModule) and isinstance(data, PromptData):
            self._check_online(pl_module, data)
            data.parts = self.rounds if self.prompts == "new" else 1
        elif isinstance(pl_module, OfflineModule) and isinstance(data, PairData):
            if (data.path or data.source) and self.rounds == 1:
                return  # the pairs are there
            self._check_offline(pl_module, data)
            most_pairs = self._most_pairs(pl_module)
            data.take_rounds(lambda: self.pair_sets(trainer, pl_module), self.rounds, most_pairs)
        else:
            raise ValueError(
                "expected IterativeRounds beside GRPOModule with PromptData, or DPOModule or "
                f"SFTModule with PairData, got {type(pl_module).__name__} with "
                f"{type(data).__name__}; leave it out, or change the data module"
            )

    def train_prompts(self) -> list[Prompt]:
        """See `cotgen_pl.leaks.PromptSource`; none for GRPO."""
        return self._prompts_read

    def drop_prompts(self, leaks: Callable[[Prompt], bool]) -> None:
        """See `cotgen_pl.leaks.PromptSource`."""
        fewest = min(1, len(self._all_prompts))
        kept, self._weights = leave_out(self._all_prompts, self._weights, leaks, fewest)
        self._all_prompts = [replace(prompt, index=index) for index, prompt in enumerate(kept)]

    def _check_online(self, module: GRPOModule, data: PromptData) -> None:
        if self._all_prompts:
            raise ValueError(
                "expected no files for IterativeRounds beside GRPOModule, whose prompts are those "
                "of PromptData; leave files out"
            )
        refreshed = self.reference == "refresh" and module.needs_reference
        rescheduled = self.schedule == "reset" and module.lr_scheduler is not None
        reset = self.optimizer == "reset" or rescheduled
        if self.rounds < 2 or not (refreshed or reset or self.prompts == "new"):
            raise ValueError(
                f"expected GRPO rounds that change something, got {self.rounds} with the same "
                "prompts, optimizer and schedule and no new reference; set rounds to 2 or more and "
                "kl_coef above 0 with reference: refresh, or prompts: new"
            )
        if self.prompts == "new" and len(data.prompts) < self.rounds:
            raise ValueError(
                f"expected at least one prompt for each of {self.rounds} rounds, got "
                f"{len(data.prompts)}; name more prompts, set fewer rounds, or prompts: same"
            )
        if module.dead_groups == "resample" or module.num_rollouts < self.rounds:
            raise ValueError(
                f"expected dead_groups: keep or mask and at least {self.rounds} rollouts, so that "
                f"a round has a known number of them, got {module.dead_groups} and "
                f"{module.num_rollouts}; set dead_groups, or raise images_budget"
            )

    def _check_offline(self, module: OfflineModule, data: PairData) -> None:
        if data.path is not None or data.source is not None:
            raise ValueError(
                f"expected PairData without path or source for {self.rounds} rounds, which draw "
                "pairs of their own, got finished pairs; set rounds to 1, or leave them out"
            )
        if not self._all_prompts:
            raise ValueError(
                "expected files with prompts for IterativeRounds, got none; name one by path and "
                "format, or name a finished pair set by data.init_args.path"
            )
        if self._prompts_per_round(module) < 1:
            raise ValueError(
                f"expected images_budget of at least {module.group_size * self.rounds}, a group "
                f"for each of {self.rounds} rounds, got {module.images_budget}; raise it"
            )
        if self._most_pairs(module) < data.pairs_per_update:
            raise ValueError(
                f"expected at least {data.pairs_per_update} pairs, those of one update, in a round,"
                f" got at most {self._most_pairs(module)}; lower pairs_per_update, set fewer "
                "rounds, or raise images_budget"
            )
        check_scorable(self._all_prompts, module.needed_reward(type(self).__name__))
        module.policy.check_prompts([prompt.drawn_text for prompt in self._all_prompts])

    def _prompts_per_round(self, module: OfflineModule) -> int:
        return module.images_budget // (module.group_size * self.rounds)

    def _most_pairs(self, module: OfflineModule) -> int:
        """That a round can give."""
        size = module.group_size
        per_prompt = size * (size - 1) // 2 if self.pairs.rule == "all_pairs" else 1
        return self._prompts_per_round(module) * per_prompt

    # DPO, and SFT on pairs ----------------------------------------------------------------------

    def pair_sets(self, trainer: Trainer, module: OfflineModule) -> Iterator[PairSet]:
        """Each round's pair set, drawn when it is asked for; those of past rounds are opened."""
        for number in range(self.rounds):
            folder = Path(trainer.default_root_dir) / "rounds" / str(number) / "pairs"
            if number < self.round:
                yield _open_past(folder)
                continue
            if number > self.round:
                self.finish_round(trainer, module)
                self.start_round(trainer, module)
            if not self._made:
                self._made = self._draw(trainer, module, folder)
            yield PairSet(folder)

    def _draw(self, trainer: Trainer, module: OfflineModule, folder: Path) -> dict[str, Any]:
        """Draw the round's pairs; what its record says of them."""
        save_last(trainer)  # a kill from here on costs no training
        prompts = self._prompts_of(self.round, self._prompts_per_round(module), module.seed)
        stream = f"pairs of round {self.round}"
        with module.phase("pairs"):
            pairs = build_pairs(
                module, prompts, folder, self.pairs, files=self.files, stream=stream
            )
        return _describe(pairs, trainer)

    def _prompts_of(self, number: int, size: int, seed: int) -> list[Prompt]:
        """The next prompts of endless passes, or those of the first round again."""
        first = number * size if self.prompts == "new" else 0
        draws = chain.from_iterable(draw_passes(self._weights, seed))
        return [
            replace(self._all_prompts[index], occurrence=occurrence)
            for index, occurrence in islice(draws, first, first + size)
        ]

    # GRPO ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the start of the first round."""
        assert isinstance(pl_module, PolicyModule)
        data: Any = getattr(trainer, "datamodule", None)
        if isinstance(data, PairData) and data.pairs is not None:  # the finished ones
            self._made = _describe(data.pairs, trainer)
        if not self._policy:
            self._policy = hash_weights(pl_module.policy)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the next round when the one before has had its rollouts."""
        if not isinstance(pl_module, GRPOModule):
            return  # whose data asks for the next round
        if pl_module.rollouts * self.rounds // pl_module.num_rollouts > self.round:
            self.finish_round(trainer, pl_module)
            self.start_round(trainer, pl_module)

    # Between two rounds -------------------------------------------------------------------------

    def start_round(self, trainer: Trainer, module: PolicyModule) -> None:
        """Go on to the next round, from the weights of now."""
        self.round += 1
        self._policy, self._made = hash_weights(module.policy), {}
        if self.reference == "refresh":
            module.refresh_reference()
        if self.optimizer == "reset":
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        if self.schedule == "reset" and module.lr_scheduler is not None:
            for entry in trainer.lr_scheduler_configs:
                entry.scheduler = module.restart_schedule(entry.scheduler.optimizer)

    def finish_round(self, trainer: Trainer, module: PolicyModule, *, ends: bool = False) -> None:
        """Score the round's end, thoroughly where the run ends, and write its record."""
        scores: dict[str, float] = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a Trainer has them
            if isinstance(callback, SuiteEvaluation):
                if callback.last_scored != module.rollouts:
                    state = module.own_random_state("end of round", self.round)
                    with state, module.stopwatch.paused():
                        callback.observe(trainer, module, thoroughly=ends)
                    callback.last_observed = module.rollouts
                scores |= {n: callback.last[n] for n in RECORDED if n in callback.last}
        record = {"round": self.round, "policy": self._policy, **self._made}
        record |= {"images_sampled": module.images_sampled, "updates": module.rollouts, **scores}
        self.records = [*self.records[: self.round], record]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "rounds.jsonl"
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            write_whole(path, lambda part: part.write_text(text))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last round's record."""
        assert isinstance(pl_module, PolicyModule)
        self.finish_round(trainer, pl_module, ends=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is."""
        return {
            "round": self.round,
            "records": self.records,
            "policy": self._policy,
            "made": self._made,
            "prompts": fingerprint(self._all_prompts, self._weights),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.round, self.records = state_dict["round"], state_dict["records"]
        self._policy, self._made = state_dict["policy"], state_dict["made"]
        if self._fits and "prompts" in state_dict:  # absent in older checkpoints
            own = fingerprint(self._all_prompts, self._weights)
            check_same_prompts(state_dict["prompts"], own, len(self._all_prompts))


def _open_past(folder: Path) -> PairSet:
    """The set of a finished round, of which a resumed run wants the size."""
    try:
        return PairSet(folder)
    except ValueError as error:
        raise ValueError(
            f"expected the pairs of a finished round, got: {error}; if this run goes on in another "
            "folder than it began in, copy the rounds/ folder there too"
        ) from error


def _describe(pairs: PairSet, trainer: Trainer) -> dict[str, Any]:
    """What a round's record says of its pairs; their path is relative to the run folder."""
    path = os.path.relpath(pairs.folder, trainer.default_root_dir)
    counts = {name: pairs.counts[name] for name in COUNTS}
    return {"path": path, **counts, "mean_margin": _mean_margin(pairs)}


def _mean_margin(pairs: PairSet) -> float:
    """How far apart the scores of a pair are, on average."""
    total = 0.0
    for rows in torch.arange(len(pairs)).split(1000):
        scores = pairs.batch(rows.tolist()).scores
        total += (scores[:, 0] - scores[:, 1]).double().sum().item()
    return total / len(pairs)
