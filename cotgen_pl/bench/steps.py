"""Whole GRPO steps to be measured: our module inside of a trainer, and the naive step beside it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from cotgen_pl.bench.measuring import Timing
from cotgen_pl.bench.naive import Habits, NaiveStep, Setting, pad_left
from cotgen_pl.interfaces import Policy, Prompt, Reward, Scores
from cotgen_pl.modules.grpo import GRPOModule

OURS, NAIVE, NO_HABIT = "ours", "naive", "naive without habits"
PEERS = {NAIVE: Habits(), NO_HABIT: Habits.none()} | {
    name: Habits.only(name) for name in Habits.names()
}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
LEARNING_RATE = 1e-6  # T2I-R1's
KL_COEF = 0.01  # T2I-R1's; above 0, so that a reference is read


class MeanPixel(Reward):
    """The mean of all pixels: a reward that costs nothing."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """[B], 0 to 1."""
        return Scores.single(self.name, images.mean((1, 2, 3)))


class MeasuredGRPO(GRPOModule):
    """Measures where it would train: inside of a trainer, with its precision and its optimizer."""

    measure: Callable[[MeasuredGRPO, list[Prompt]], None]

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """Measure, and be done."""
        self.measure(self, prompts)
        self.trainer.should_stop = True

    def run_step(self, prompts: list[Prompt]) -> None:
        """The step of an experiment."""
        super().training_step(prompts, 0)


def run_in_trainer(
    policy: Policy,
    prompts: list[Prompt],
    measure: Callable[[MeasuredGRPO, list[Prompt]], None],
    folder: Path,
    *,
    device: str,
    dtype: str,
    optimizer: str = "torch.optim.AdamW",
    **settings: Any,
) -> None:
    """Set a GRPO run up as an experiment would, and measure in place of its first step.

    Args:
        policy: What trains.
        prompts: One per group.
        measure: Gets the module, ready to train, and the prompts.
        folder: The run's.
        device: `cpu` or `cuda`.
        dtype: A key of `PRECISIONS`.
        optimizer: Class path.
        **settings: Of `GRPOModule`.
    """
    module = MeasuredGRPO(
        policy,
        MeanPixel(),
        partial(find_optimizer(optimizer), lr=LEARNING_RATE),
        images_budget=sys.maxsize,
        kl_coef=KL_COEF,
        **settings,
    )
    module.measure = measure
    with _quiet():
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=PRECISIONS[dtype],  # type: ignore[arg-type]  # a Literal of many strings
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(module, DataLoader([prompts], batch_size=None))  # type: ignore[arg-type]


def find_optimizer(class_path: str) -> Callable[..., torch.optim.Optimizer]:
    """The class that a path names.

    Raises:
        ValueError: There is none, or it is no optimizer.
    """
    try:
        found = resolve_name(class_path)
    except (ImportError, AttributeError, ValueError) as error:
        found = error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(
            f"expected an optimizer's class path, like torch.optim.AdamW, got {class_path!r} "
            f"({found}); correct --optimizer"
        )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's messages and advice, which are for training."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def naive_step(module: GRPOModule, prompts: list[Prompt], habits: Habits) -> NaiveStep:
    """The naive step on a module's own models, optimizer and settings; its reward is MeanPixel."""
    policy: Any = module.policy  # a JanusPolicy, as the naive step is written for
    reference: Any = module.reference
    rows = [policy.prompt_ids(prompt.drawn_text) for prompt in prompts]
    setting = Setting(
        copies=module.group_size,
        num_tokens=policy.num_tokens,
        guidance=module.guidance,
        mode=module.logprobs,
        kl_coef=KL_COEF,
        micro_batch_size=module.micro_batch_size or module.images_per_update,
        pad=policy.pad,
    )
    optimizer: Any = module.optimizers(use_pl_optimizer=False)
    return NaiveStep(
        policy.janus,
        reference.janus,
        optimizer,
        *pad_left(rows, policy.pad, module.device),
        draw=policy.decode,
        score=lambda pictures: pictures.mean((1, 2, 3)),
        setting=setting,
        habits=habits,
    )


def compare_steps(timings: Mapping[str, Timing], memory: Mapping[str, int]) -> dict[str, Any]:
    """How ours compares with the naive step, and what each habit adds to the step without any.

    Args:
        timings: Of ours and of `peers_for` some habits.
        memory: Bytes of each over loading.
    """
    found: dict[str, Any] = {
        "times_faster": timings[NAIVE].median / timings[OURS].median,
        "share_of_memory": memory[OURS] / memory[NAIVE],
    }
    habits = [name for name in Habits.names() if name in timings]
    if habits:
        found["habits"] = {
            name: {
                "added_time": timings[name].median / timings[NO_HABIT].median - 1,
                "added_memory": memory[name] / memory[NO_HABIT] - 1,
            }
            for name in habits
        }
    return found


def peers_for(habits: Sequence[str]) -> list[str]:
    """The naive step, and what tells the share of each of some habits."""
    return [NAIVE, *([NO_HABIT, *habits] if habits else [])]
