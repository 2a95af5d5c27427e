"""Prompts for modules that sample pictures: their order, and the data module that serves them.

The order is a pure function of the seed: it depends neither on the number of processes nor on where
a run was interrupted. The file formats are in `formats.py`, whose `PromptFile` and `read_prompts`
belong here for users.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from cotgen_pl.data.formats import ORIGIN, PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.leaks import check_same_prompts, fingerprint, leave_out

__all__ = [
    "PromptData",
    "PromptFile",
    "PromptStream",
    "check_facts",
    "check_scorable",
    "read_prompts",
]

# Consecutive multiples of the golden ratio, modulo 1, are spread evenly, however many they are.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def check_facts(prompts: Sequence[Prompt], required_facts: Sequence[str], reward_name: str) -> None:
    """Raise a ValueError naming file and line unless every prompt has what a reward needs.

    A fact that is null counts as missing.
    """
    for number, prompt in enumerate(prompts):
        present = {fact for fact, value in prompt.facts.items() if value is not None}
        missing = [fact for fact in required_facts if fact not in present]
        if missing:
            raise ValueError(
                f"{_place(prompt, number)}: expected the facts "
                f"{list(required_facts)} for reward {reward_name}, got "
                f"{sorted(present - {ORIGIN})} without {missing}; add them to the file, or take a "
                "reward that needs none of them"
            )


def check_scorable(prompts: Sequence[Prompt], reward: Reward) -> None:
    """Raise a ValueError naming file and line unless a reward can judge by all prompts' facts."""
    check_facts(prompts, reward.required_facts, reward.name)
    for number, prompt in enumerate(prompts):
        try:
            reward.check_prompt(prompt)
        except ValueError as error:
            raise ValueError(f"{_place(prompt, number)}: {error}") from error


def draw_passes(weights: Sequence[float], seed: int) -> Iterator[list[tuple[int, int]]]:
    """Endless passes over a data set, each in an order of its own.

    After n passes, prompt i has been drawn floor(n * weight_i + phase_i) times, where the phases
    are spread over [0, 1). At weight 2 it comes twice in each pass; at 0.5 in every other one, half
    the prompts each time.

    Args:
        weights: Draws per pass, one number for each prompt.
        seed: Of the order.

    Yields:
        Pairs (index of the prompt, how often it was drawn before). At weight 1 the latter is the
        number of the pass; no pair ever comes twice, so it can key the noise.
    """
    phases = [index * GOLDEN_RATIO % 1 for index in range(len(weights))]
    for number in count():
        draws = [
            (index, occurrence)
            for index, (weight, phase) in enumerate(zip(weights, phases, strict=True))
            for occurrence in range(
                math.floor(number * weight + phase), math.floor((number + 1) * weight + phase)
            )
        ]
        random.Random(f"prompts of seed {seed}, pass {number}").shuffle(draws)
        yield draws


class PromptStream(IterableDataset[list[Prompt]]):
    """Batches of prompts for one process.

    Batch k is draws k * P to (k + 1) * P - 1 of all passes laid end to end. Each process takes its
    contiguous share of it, so the union over processes does not depend on their number.

    Args:
        prompts: The data set.
        weights: Draws per pass, one number for each prompt.
        prompts_per_batch: P, over all processes.
        num_batches: Of the whole run; this is the stream's length wherever it starts.
        start: The first batch to yield.
        parts: Each from prompts of its own: batch k is in part floor(k * parts / num_batches),
            prompt i in part i modulo their number.
        seed: Of the order.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        weights: Sequence[float],
        *,
        prompts_per_batch: int,
        num_batches: int,
        start: int = 0,
        parts: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_batches(prompts_per_batch, num_batches, world_size)
        assert parts <= len(prompts), "a part has a prompt"
        self.prompts = prompts
        self.weights = weights
        self.prompts_per_batch = prompts_per_batch
        self.num_batches = num_batches
        self.start = start
        self.parts = parts
        self.seed = seed
        share = prompts_per_batch // world_size
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Prompt]]:
        rest = islice(self._draws(), self.start * self.prompts_per_batch, None)
        for _ in range(self.start, self.num_batches):
            batch = list(islice(rest, self.prompts_per_batch))
            yield [
                replace(self.prompts[index], index=index, occurrence=occurrence)
                for index, occurrence in batch[self.share]
            ]

    def _draws(self) -> Iterator[tuple[int, int]]:
        """Index and occurrence of each draw of the run, part after part."""
        for part in range(self.parts):
            first, end = (-(-k * self.num_batches // self.parts) for k in (part, part + 1))
            weights = [
                weight if index % self.parts == part else 0.0
                for index, weight in enumerate(self.weights)
            ]
            draws = chain.from_iterable(draw_passes(weights, self.seed))
            yield from islice(draws, (end - first) * self.prompts_per_batch)


class PromptData(LightningDataModule):
    """Serves prompts to a module that samples pictures from them.

    The files are read at construction, so that a mistake in them ends a run before any weights
    load. The module says what it draws: `prompts_per_batch` (per rollout, over all processes) and
    `num_rollouts` (of the whole run), and its `reward` which facts the prompts must have. The run
    is one epoch; a resumed one goes on behind the last batch that was finished.

    Args:
        files: What to train on.
        seed: Of the order.
        limit: Keep this many prompts of each file, from its start; None keeps all.
        predict_files: What to draw under `predict`; None takes `files`.
    """

    def __init__(
        self,
        files: list[PromptFile],
        seed: int = 0,
        limit: int | None = None,
        predict_files: list[PromptFile] | None = None,
    ) -> None:
        super().__init__()
        if not files:
            raise ValueError(
                "files: expected at least one prompt file, got none; name one by path and format"
            )
        if limit is not None and limit < 1:
            raise ValueError(
                f"limit: expected at least 1 prompt of each file, got {limit}; leave it out to "
                "keep all"
            )
        parts = [read_prompts(file)[:limit] for file in files]
        self.prompts = _number(chain.from_iterable(parts))
        """All prompts to train on, in the order of the files."""
        self.weights = [file.weight for file, part in zip(files, parts, strict=True) for _ in part]
        self._all_prompts = self.prompts  # those that leak among them
        self.seed = seed
        self.parts = 1
        """Parts of the run with prompts of their own; `IterativeRounds` sets it."""
        self.predict_prompts = self.prompts
        """What `ImageWriter` draws under `predict`, numbered in the order of the files."""
        if predict_files is not None:
            parts = [read_prompts(file)[:limit] for file in predict_files]
            self.predict_prompts = _number(chain.from_iterable(parts))

    def setup(self, stage: str) -> None:
        """Refuse, before weights load, a run that the prompts do not fit."""
        trainer: Any = self.trainer
        if stage == "predict":
            _check_drawable(trainer.lightning_module, self.predict_prompts)
        if stage != "fit":
            return
        if trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs: expected 1, because the whole run is one epoch, got "
                f"{trainer.max_epochs}; set it to 1, and the length of the run on the module"
            )
        module = trainer.lightning_module
        if not hasattr(module, "prompts_per_batch"):
            raise ValueError(
                f"expected a module that draws pictures of prompts beside {type(self).__name__}, "
                f"got {type(module).__name__}, which has no prompts_per_batch; use PictureData, or "
                "GRPOModule"
            )
        check_scorable(self.prompts, module.reward)
        _check_batches(module.prompts_per_batch, module.num_rollouts, trainer.world_size)
        _check_drawable(module, self.prompts)

    def train_prompts(self) -> list[Prompt]:
        """See `cotgen_pl.leaks.PromptSource`."""
        return self._all_prompts

    def drop_prompts(self, leaks: Callable[[Prompt], bool]) -> None:
        """See `cotgen_pl.leaks.PromptSource`; what is drawn under `predict` stays."""
        kept, self.weights = leave_out(self.prompts, self.weights, leaks, fewest=self.parts)
        self.prompts = _number(kept)

    def state_dict(self) -> dict[str, Any]:
        """Which prompts are trained on."""
        return {"prompts": fingerprint(self.prompts, self.weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with others."""
        trainer: Any = self.trainer
        if trainer.state.fn == "fit":
            own = fingerprint(self.prompts, self.weights)
            check_same_prompts(state_dict["prompts"], own, len(self.prompts))

    def train_dataloader(self) -> DataLoader[list[Prompt]]:
        """The batches of this process that are still to come."""
        trainer: Any = self.trainer
        # Lightning has restored its counters when it asks for a loader. `processed` counts finished
        # batches: in a checkpoint written at the end of a batch `completed` is one behind it, and
        # in one written on an interruption inside a batch `ready` is one ahead.
        start = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        stream = PromptStream(
            self.prompts,
            self.weights,
            prompts_per_batch=trainer.lightning_module.prompts_per_batch,
            num_batches=trainer.lightning_module.num_rollouts,
            start=start,
            parts=self.parts,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(stream, batch_size=None)

    def predict_dataloader(self) -> DataLoader[int]:
        """One empty batch for each process, so that `predict` enters a loop; see `ImageWriter`."""
        trainer: Any = self.trainer
        dataset: Any = range(trainer.world_size)  # has all that a map-style data set needs
        return DataLoader(dataset, batch_size=None)


def _place(prompt: Prompt, number: int) -> str:
    """Where a prompt stands: path and line, or its number where no file holds it."""
    return str(prompt.facts.get(ORIGIN, f"prompt {number}"))


def _number(prompts: Iterable[Prompt]) -> list[Prompt]:
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts)]


def _check_drawable(module: Any, prompts: Sequence[Prompt]) -> None:
    module.policy.check_prompts([prompt.drawn_text for prompt in prompts])


def _check_batches(prompts_per_batch: int, num_batches: int, world_size: int) -> None:
    if prompts_per_batch < 1 or num_batches < 1:
        raise ValueError(
            f"expected at least one batch of at least one prompt, got {num_batches} batches of "
            f"{prompts_per_batch}; raise images_budget or images_per_update"
        )
    if prompts_per_batch % world_size:
        raise ValueError(
            f"{prompts_per_batch} prompts per batch do not split over {world_size} processes; set "
            f"images_per_update to group_size times a multiple of {world_size}"
        )
