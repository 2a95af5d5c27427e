"""Prompts with pictures, for supervised fine-tuning: rendered pictures of the Shapes world."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cotgen_pl.interfaces import Prompt, check_positive
from cotgen_pl.shapes.grammar import Wording, draw_prompt
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil


class ShapesPictures(IterableDataset[tuple[list[Prompt], Tensor]]):
    """Batches of prompts and their pictures for one process.

    Batch k of process r out of W is drawn from (seed, k * W + r) alone, so processes never share.

    Args:
        batch_size: Pictures in a batch.
        num_batches: Of the whole run.
        start: The first batch to yield.
        wrong_share: Share of the pictures that are wrong on purpose, so that a model trained on
            them has something left to learn from rewards.
        in_domain_share: Share of the prompts in the in-domain wording, whose pictures ask more.
        seed: Of prompts and pictures.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        batch_size: int,
        num_batches: int,
        start: int = 0,
        wrong_share: float = 0.0,
        in_domain_share: float = 0.5,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.batch_size, self.num_batches, self.start = batch_size, num_batches, start
        self.wrong_share, self.in_domain_share, self.seed = wrong_share, in_domain_share, seed

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[list[Prompt], Tensor]]:
        for number in range(self.start, self.num_batches):
            drawn_number = number * self.world_size + self.rank
            rng = random.Random(f"pictures of seed {self.seed}, batch {drawn_number}")
            drawn = [self._draw(rng) for _ in range(self.batch_size)]
            yield [prompt for prompt, _ in drawn], torch.stack([picture for _, picture in drawn])

    def _draw(self, rng: random.Random) -> tuple[Prompt, Tensor]:
        in_domain = rng.random() < self.in_domain_share
        wording: Wording = "in_domain" if in_domain else "geneval"
        prompt = draw_prompt(rng, wording=wording, words="all", pairs="all")
        objects = compose(prompt, rng)
        if rng.random() < self.wrong_share:
            objects = spoil(prompt, objects, rng)
        return prompt, render(objects)


class PictureData(LightningDataModule):
    """Pictures of the Shapes world in all words, both wordings and all pairs of objects.

    Args:
        batch_size: Pictures per optimizer step, on one process.
        num_batches: Optimizer steps of the run.
        wrong_share: Share of the pictures that are wrong on purpose.
        in_domain_share: Share of the prompts in the in-domain wording; the rest has GenEval's.
        seed: Of prompts and pictures.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_batches: int = 1000,
        wrong_share: float = 0.0,
        in_domain_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, share in {"wrong": wrong_share, "in_domain": in_domain_share}.items():
            if not 0 <= share <= 1:
                raise ValueError(
                    f"expected {name}_share in [0, 1], got {share}; it is a share of the pictures"
                )
        check_positive(batch_size=batch_size, num_batches=num_batches)
        self.batch_size, self.num_batches = batch_size, num_batches
        self.wrong_share, self.in_domain_share, self.seed = wrong_share, in_domain_share, seed

    def setup(self, stage: str) -> None:
        """Refuse, before weights load, a module that draws its own pictures."""
        trainer: Any = self.trainer
        module = trainer.lightning_module
        if stage == "fit" and hasattr(module, "prompts_per_batch"):
            raise ValueError(
                f"expected a module that learns from pictures beside {type(self).__name__}, got "
                f"{type(module).__name__}, which draws its own; use PromptData, or SFTModule"
            )

    def train_dataloader(self) -> DataLoader[tuple[list[Prompt], Tensor]]:
        """The batches that a resumed run has not seen yet."""
        trainer: Any = self.trainer
        pictures = ShapesPictures(
            self.batch_size,
            self.num_batches,
            trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            self.wrong_share,
            self.in_domain_share,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        return DataLoader(pictures, batch_size=None)
