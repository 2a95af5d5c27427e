"""How pictures are drawn token by token: the arguments that configurations name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch

BUCKET = 128  # positions; docs/performance.md: at 608 positions 1.6 times what one length reads


@dataclass(frozen=True)
class DecodingSettings:
    """How a policy draws; pictures are the same up to rounding.

    Args:
        path: `graph` decodes by fused layers of our own, captured as CUDA graphs on a GPU; `fused`
            by the same layers, launched one by one; `eager` through transformers' layers, which the
            others are held to. Where a model cannot be read (quantised, sharded), `graph` and
            `fused` warn and take `eager`.
        buckets: Positions, rising, that attention reads up to: the first that holds all that is
            filled. The last must hold prompt and picture. By default multiples of 128 on a GPU,
            where each has a graph of its own, and elsewhere exactly what is filled.
        strict: Raise an error where a slower path would be taken.
    """

    path: Literal["graph", "fused", "eager"] = "graph"
    buckets: tuple[int, ...] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        buckets = self.buckets
        if buckets is None:
            return
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            raise ValueError(
                f"expected decoding.buckets to be rising numbers of positions, got "
                f"{list(buckets)}; name them like [128, 256, 640], or leave them out"
            )

    def fall_back(self, reason: str) -> None:
        """Warn that transformers' layers draw; with `strict` raise a ValueError instead."""
        if self.strict:
            raise ValueError(
                f"expected a model that fused layers can read, got one where {reason}; set "
                "decoding.path to eager, or decoding.strict to false"
            )
        warnings.warn(
            f"pictures are drawn through transformers' layers, because {reason}: on a GPU 5 to 20 "
            "times slower below 64 images at once (estimate). To choose that, set decoding.path to "
            "eager",
            stacklevel=3,
        )

    def check_length(self, prompt: int, picture: int) -> None:
        """Raise a ValueError where the last bucket does not hold a prompt and its picture.

        Args:
            prompt: Tokens of it.
            picture: Likewise.
        """
        if self.buckets is not None and prompt + picture > self.buckets[-1]:
            raise ValueError(
                f"expected decoding.buckets to reach {prompt + picture} positions, a prompt of "
                f"{prompt} tokens and its picture of {picture}, got {list(self.buckets)}; add a "
                "larger one, or leave buckets out"
            )

    def bucket_lengths(self, length: int, device: torch.device) -> tuple[int, ...] | None:
        """Every length that attention may read up to, or None where it is what is filled.

        Args:
            length: Of prompt and picture.
            device: Where they are.
        """
        if self.buckets is not None or device.type != "cuda":
            return self.buckets
        return tuple(range(BUCKET, length + BUCKET, BUCKET))


def choose_bucket(filled: int, lengths: tuple[int, ...] | None) -> int:
    """The first of the lengths that holds the filled positions; their number if there are none."""
    if lengths is None:
        return filled
    return next(length for length in lengths if length >= filled)


def buckets_between(first: int, last: int, lengths: tuple[int, ...] | None) -> tuple[int, ...]:
    """What `choose_bucket` gives while first, ..., last positions are filled, rising."""
    return tuple(sorted({choose_bucket(filled, lengths) for filled in range(first, last + 1)}))
