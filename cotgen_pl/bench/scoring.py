"""How long a reward takes: many pictures in one call against one by one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cotgen_pl.bench.measuring import time_alternately
from cotgen_pl.bench.report import Row
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.scoring import ask


def read_reward(file: str) -> Reward:
    """A reward from its YAML piece, not loaded.

    Raises:
        ValueError: There is none.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Reward, "reward")
    try:
        given = parser.parse_args([f"--reward={file}"])
    except ArgumentError as error:
        raise ValueError(
            f"expected a reward's YAML piece, like configs/rewards/shapes_broad.yaml, got {file} "
            f"({error})"
        ) from error
    with warnings.catch_warnings():  # a newer name exists that the oldest jsonargparse lacks
        warnings.filterwarnings("ignore", message="(?s).*(Jsonargparse|instantiate_classes)")
        reward: Reward = parser.instantiate_classes(given).reward
    return reward


def measure_scoring(
    reward: Reward, images: Tensor, prompts: Sequence[Prompt], repeats: int
) -> dict[str, Any]:
    """Score in turns in one call and one by one, after the two were compared.

    What a reward keeps of a prompt's text, it has kept before the first timed run of either.

    Args:
        reward: Any.
        images: [B, 3, H, W] in [0, 1].
        prompts: B, each image's own.
        repeats: Timed runs of each.

    Returns:
        `rows`, `times_faster` and the `largest_difference` between two scores of one picture.
    """

    def batched() -> Tensor:
        return ask(reward, images, prompts).total

    def one_by_one() -> Tensor:
        alone = [ask(reward, images[n : n + 1], prompts[n : n + 1]) for n in range(len(prompts))]
        return Scores.join(alone).total

    together, alone = batched(), one_by_one()
    runs = {"batched": batched, "one by one": one_by_one}
    timings = time_alternately(runs, repeats, images.device)
    return {
        "rows": [Row(name, timing, len(images), 0) for name, timing in timings.items()],
        "largest_difference": (together - alone).abs().nan_to_num().max().item(),
        "times_faster": timings["one by one"].median / timings["batched"].median,
    }
