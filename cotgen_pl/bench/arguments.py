"""The bench's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from cotgen_pl.bench.generate import check_generates
from cotgen_pl.bench.naive import Habits
from cotgen_pl.bench.sizes import SIZES
from cotgen_pl.bench.steps import PRECISIONS, find_optimizer
from cotgen_pl.interfaces import check_positive
from cotgen_pl.sampling import LogprobMode, check_guidance

AGAINST = {"rollout": "transformers", "step": "naive"}
BATCHES = {"rollout": 16, "growth": 128, "paths": 8, "update": 16, "reward": 64, "step": 16}
GROUP_SIZES = {"rollout": 1, "growth": 1, "paths": 1, "update": 4, "reward": 1, "step": 4}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is built."""
    parser = argparse.ArgumentParser(description="How fast a phase is here.", allow_abbrev=False)
    modes = get_args(LogprobMode)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("phase", choices=BATCHES)
    parser.add_argument("--size", choices=["shapes", *SIZES], default="shapes")
    parser.add_argument("--path", help="a checkpoint's folder in place of --size")
    parser.add_argument("--batch", type=int, help=f"images; by default {BATCHES}")
    parser.add_argument("--group_size", type=int, help=f"of one prompt; by default {GROUP_SIZES}")
    parser.add_argument("--guidance", type=float, default=5.0, help="1 is none")
    parser.add_argument("--logprobs", choices=modes, default="conditional", help="that train")
    parser.add_argument("--micro_batch_size", type=read_size, help="images per pass, or auto")
    parser.add_argument("--drawn_at_once", type=int, help="images of a rollout, in ours alone")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing")
    parser.add_argument("--reward", default="configs/rewards/shapes_broad.yaml", help="its YAML")
    parser.add_argument("--against", choices=AGAINST.values(), help="what to compare with")
    parser.add_argument(
        "--habits",
        nargs="*",
        choices=Habits.names(),
        help="of the naive step, to be switched on alone; all unless said, and none without a name",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default_device)
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--trained_dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--optimizer", default="torch.optim.AdamW", help="its class path")
    parser.add_argument("--json", type=Path, help="a file to write all numbers to")
    own = parser.parse_args(arguments)
    own.batch = BATCHES[own.phase] if own.batch is None else own.batch
    check_habits(own)
    own.group_size = GROUP_SIZES[own.phase] if own.group_size is None else own.group_size
    check_arguments(own)
    return own


def read_size(text: str) -> int | str:
    """A number of images, or `auto`."""
    return text if text == "auto" else int(text)


def check_habits(own: argparse.Namespace) -> None:
    """Fill in all habits, or raise a ValueError where there is no step to have them."""
    if own.habits is not None and own.against != "naive":
        raise ValueError(
            f"expected --habits beside step --against naive, got it beside {own.phase}; leave it "
            "out, or measure that step"
        )
    own.habits = Habits.names() if own.habits is None else own.habits


def check_arguments(own: argparse.Namespace) -> None:
    """Raise a ValueError for what cannot be measured."""
    check_positive(batch=own.batch, group_size=own.group_size, repeats=own.repeats)
    check_guidance(own.guidance)
    find_optimizer(own.optimizer)
    if own.group_size > 1 and own.phase in ("growth", "paths"):
        raise ValueError(
            f"expected --group_size 1 beside {own.phase}, whose images have a prompt each, got "
            f"{own.group_size}; leave it out"
        )
    if own.batch % own.group_size:
        raise ValueError(
            f"expected --batch to be a multiple of --group_size {own.group_size}, got "
            f"{own.batch}; set --group_size to a divisor of it"
        )
    if own.phase == "growth" and own.batch < 2:
        raise ValueError(f"expected --batch of 2 or more beside growth, got {own.batch}; raise it")
    if own.against and own.against != AGAINST.get(own.phase):
        raise ValueError(
            f"expected --against {AGAINST.get(own.phase, 'to be left out')} beside {own.phase}, "
            f"got {own.against}; transformers draws and the naive step is whole: use `rollout "
            "--against transformers` or `step --against naive`"
        )
    if own.against == "transformers":
        check_generates(own.guidance)
    if own.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a GPU for --device cuda, got none; use --device cpu")
