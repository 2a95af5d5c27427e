"""Preference pairs for modules that learn from them: their order, and the data module.

It only reads: pairs are built by `IterativeRounds`, or come from elsewhere (`foreign_pairs.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from cotgen_pl.data.foreign_pairs import ForeignPairs
from cotgen_pl.interfaces import PreferencePair, Prompt, check_positive
from cotgen_pl.pairs.sets import PairSet

__all__ = ["ForeignPairs", "PairData", "PairSet", "PairStream", "draw_order"]

PROMPTS_PER_CHECK = 1000


def draw_order(num_pairs: int, seed: int, number: int) -> list[int]:
    """The rows of a set in the order of a pass: a pure function of its arguments.

    Args:
        num_pairs: In the set.
        seed: Of all orders.
        number: Of the pass, from 0, counted through the whole run.
    """
    order = list(range(num_pairs))
    random.Random(f"pairs of seed {seed}, pass {number}").shuffle(order)
    return order


class PairStream(IterableDataset[PreferencePair]):
    """Batches of one process: passes over a set, then over the next one, to the end of the run.

    Batch k of a pass is rows k * N to (k + 1) * N - 1 of its order; each process takes its
    contiguous share of it, so the union over processes does not depend on their number. What is
    left of a pass behind its last whole batch is dropped: all processes take the same number of
    steps, and all steps learn from the same number of pairs.

    Args:
        sets: Gives the run's sets one after another. The next one is asked for when its first batch
            is, so the policy that draws it has learnt from all batches before.
        prepare: Called with each set that is begun or gone on with, before its batches, and whether
            none of them has been learnt from yet.
        end: Called before the run's last batch.
        num_sets: How many sets there are.
        longest: Most batches that the whole run can have.
        pairs_per_batch: N, over all processes.
        epochs: Passes over each set.
        start: The first batch of the run to yield.
        seed: Of the order.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        sets: Callable[[], Iterator[PairSet]],
        *,
        prepare: Callable[[PairSet, bool], None],
        end: Callable[[], None],
        num_sets: int,
        longest: int,
        pairs_per_batch: int,
        epochs: int = 1,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.sets, self.prepare, self.end, self.num_sets = sets, prepare, end, num_sets
        self.longest, self.pairs_per_batch, self.epochs = longest, pairs_per_batch, epochs
        self.start, self.seed = start, seed
        share = pairs_per_batch // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.longest  # with a length, Lightning fetches no batch before its time

    def __iter__(self) -> Iterator[PreferencePair]:
        begin = 0  # the set's first batch, counted through the run
        for number, pairs in enumerate(self.sets()):
            size = len(pairs) // self.pairs_per_batch
            finished = max(0, self.start - begin)
            if finished < size * self.epochs:
                self.prepare(pairs, finished == 0)
            for batch in range(finished, size * self.epochs):
                if number == self.num_sets - 1 and batch == size * self.epochs - 1:
                    self.end()
                if batch == finished or batch % size == 0:
                    order = draw_order(len(pairs), self.seed, number * self.epochs + batch // size)
                first = batch % size * self.pairs_per_batch
                yield pairs.batch(order[first : first + self.pairs_per_batch][self.share])
            begin += size * self.epochs


class PairData(LightningDataModule):
    """Serves preference pairs to a module that learns from them: DPO, or SFT on the chosen ones.

    The pairs are those of `path` or of `source`; without either, `IterativeRounds` gives a set for
    each round. The run is one epoch of Lightning; a resumed one goes on behind the last batch that
    was finished. Images of a set that the policy drew count as sampled when training begins on it,
    whichever run drew them.

    Args:
        path: A finished pair set.
        source: Preference data that the policy did not draw; encoded once, by the first process
            (for much data, have it done by a run on one process: the others wait for it).
        pairs_per_update: Pairs in a batch, over all processes.
        epochs: Passes over each set.
        seed: Of the order. On the command line it is `seed_everything`.
    """

    def __init__(
        self,
        path: str | None = None,
        source: ForeignPairs | None = None,
        pairs_per_update: int = 32,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_positive(pairs_per_update=pairs_per_update, epochs=epochs)
        if path is not None and source is not None:
            raise ValueError(
                f"expected path or source, got both, {path} and {source.path}; leave out one of "
                "them"
            )
        self.path, self.source = path, source
        self.pairs_per_update, self.epochs, self.seed = pairs_per_update, epochs, seed
        self.pairs: PairSet | None = None
        """The finished set, once it is open."""
        self._rounds: Callable[[], Iterator[PairSet]] | None = None
        self._num_rounds = 1
        self._most_pairs = 0

    def take_rounds(
        self, sets: Callable[[], Iterator[PairSet]], number: int, most_pairs: int
    ) -> None:
        """Serve the pair set of each round, where there is no finished one.

        Args:
            sets: Gives them one after another; the next one is asked for when it is needed.
            number: How many rounds there are.
            most_pairs: That a round can give.
        """
        self._rounds, self._num_rounds, self._most_pairs = sets, number, most_pairs

    def setup(self, stage: str) -> None:
        """Refuse, before weights load, a run that the pairs do not fit."""
        if stage == "predict":
            raise ValueError(
                "expected data that gives prompts to draw, got PairData; name a piece with "
                "PromptData: --data configs/data/shapes.yaml, with predict_files of your own"
            )
        if stage != "fit":
            return
        trainer: Any = self.trainer
        module = trainer.lightning_module
        if not getattr(module, "learns_from_pairs", False):
            raise ValueError(
                f"expected a module that learns from pairs beside {type(self).__name__}, got "
                f"{type(module).__name__}; use DPOModule or SFTModule, or PromptData"
            )
        if self.pairs_per_update % trainer.world_size:
            raise ValueError(
                f"{self.pairs_per_update} pairs per update do not split over {trainer.world_size} "
                f"processes; set pairs_per_update to a multiple of {trainer.world_size}"
            )
        if trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs: expected 1, because the whole run is one epoch, got "
                f"{trainer.max_epochs}; set it to 1, and the passes over a set by epochs"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: expected 1, because each batch of pairs is an "
                f"update, got {trainer.accumulate_grad_batches}; set it to 1, and the pairs of an "
                "update by pairs_per_update; with little memory, set micro_batch_size on DPOModule"
            )
        if self.path is not None:
            self.pairs = PairSet(self.path)
            self._check(self.pairs)
        elif self.source is not None:
            self.source.check(module.policy)

    def train_prompts(self) -> Iterable[Prompt]:
        """Those of finished pairs, which `setup` has opened; see `cotgen_pl.leaks.PromptSource`."""
        if self.source is not None:
            return self.source.prompts()
        return self.pairs.prompts() if self.pairs is not None else ()

    def drop_prompts(self, leaks: Callable[[Prompt], bool]) -> None:
        """Refuse pairs of prompts that leak: they are written already."""
        number = sum(map(leaks, self.train_prompts()))
        if number:
            raise ValueError(
                f"expected finished pairs of prompts that no suite holds out, got {number} of "
                "others; build the set again by IterativeRounds, which leaves them out, or set "
                "leaks: warn on SuiteEvaluation to train on what it scores"
            )

    def check_ready(self) -> None:
        """Refuse a run without pairs, once callbacks have had their say: the module asks then."""
        if self.path is None and self.source is None and self._rounds is None:
            raise ValueError(
                "expected pairs to train on, got none; name a finished set by path, preference "
                "data by source, or add IterativeRounds to trainer.callbacks, which builds sets"
            )

    def _check(self, pairs: PairSet) -> None:
        """Refuse a set that does not fit the policy, or has too few pairs."""
        if len(pairs) < self.pairs_per_update:
            raise ValueError(
                f"expected at least {self.pairs_per_update} pairs, those of one update, in "
                f"{pairs.folder}, got {len(pairs)}; lower pairs_per_update, or build more pairs"
            )
        trainer: Any = self.trainer
        policy = trainer.lightning_module.policy
        pairs.check_fits(policy)
        prompts = pairs.prompts()
        while texts := [prompt.drawn_text for prompt in islice(prompts, PROMPTS_PER_CHECK)]:
            policy.check_prompts(list(dict.fromkeys(texts)))

    def train_dataloader(self) -> DataLoader[PreferencePair]:
        """The batches of this process that are still to come."""
        trainer: Any = self.trainer
        if self.source is not None and self.pairs is None:
            policy = trainer.lightning_module.policy
            folder = self.source.encode(policy) if trainer.is_global_zero else None
            self.pairs = PairSet(trainer.strategy.broadcast(folder))
            self._check(self.pairs)
        most = self._most_pairs if self.pairs is None else len(self.pairs)
        stream = PairStream(
            self._sets,
            prepare=self._prepare,
            end=self._end,
            num_sets=self._num_rounds,
            longest=self._num_rounds * self.epochs * max(1, most // self.pairs_per_update),
            pairs_per_batch=self.pairs_per_update,
            epochs=self.epochs,
            start=trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(stream, batch_size=None)

    def _sets(self) -> Iterator[PairSet]:
        if self.pairs is not None:
            return iter([self.pairs])
        assert self._rounds is not None
        return self._checked(self._rounds())

    def _checked(self, sets: Iterator[PairSet]) -> Iterator[PairSet]:
        for pairs in sets:
            self._check(pairs)
            yield pairs

    def _prepare(self, pairs: PairSet, fresh: bool) -> None:
        trainer: Any = self.trainer
        module = trainer.lightning_module
        if fresh and self.source is None:
            module.images_sampled += pairs.counts["images"]
            if self.path is not None and trainer.is_global_zero:
                module.count_drawn(pairs.counts["images"])  # by another run, and none twice
        module.take_up(pairs, self.pairs_per_update // trainer.world_size)

    def _end(self) -> None:
        """Tell the trainer, whose length is that of a run without dropped groups."""
        trainer: Any = self.trainer
        trainer.should_stop = True
