"""Whether a detector works, looked at before it judges: one that is broken goes on in silence.

Apart from the detectors because several rewards look at theirs in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import check_choice
from cotgen_pl.pixels import STEPS

Sanity = Literal["stop", "warn", "off"]
ADVICE = (
    "convert or download its weights again, and see that torch computes rightly on this machine"
)


def two_pictures() -> Tensor:
    """Two pictures [2, 3, 64, 64] of noise, the same each time."""
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def check_answers(*answers: Tensor) -> None:
    """Raise a ValueError unless a detector tells two pictures apart by finite numbers.

    Args:
        *answers: [2, ...] each, what the network says of `two_pictures`.
    """
    for values in answers:
        if not values.isfinite().all() or torch.equal(values[0], values[1]):
            raise ValueError(
                "expected a detector whose answers are finite and differ between two pictures, "
                f"got others; {ADVICE}"
            )


@dataclass(frozen=True)
class SanityCheck:
    """A picture of the user's, what it shows, and what to do if the detector does not see it."""

    action: Sanity
    picture: str | None
    label: str | None

    def __post_init__(self) -> None:
        check_choice("sanity", self.action, Sanity)
        if self.action == "stop" and self.picture is None:
            raise ValueError(
                "expected a sanity_picture beside sanity: stop, got none; name a picture file and, "
                "under sanity_class, what it shows"
            )
        if (self.picture is None) != (not self.label):
            raise ValueError(
                f"expected sanity_picture with a sanity_class, got {self.picture!r} with "
                f"{self.label!r}; name both or neither"
            )
        if self.picture is not None and not Path(self.picture).expanduser().is_file():
            raise ValueError(
                f"expected a picture at {self.picture}, got no file; correct sanity_picture"
            )

    @torch.no_grad()
    def run(self, reward: str, find: Callable[[Tensor], Collection[str]]) -> None:
        """Stop or warn where the detector does not find what the user says is there.

        Args:
            reward: Its name, for messages.
            find: The labels that the detector finds in a picture [1, 3, H, W] in [0, 1].
        """
        if self.action == "off" or self.picture is None:
            return
        labels = sorted(set(find(_read_picture(self.picture))))
        if self.label in labels:
            return
        message = (
            f"reward {reward}: expected the detector to find a {self.label} in {self.picture}, got "
            f"{labels or 'nothing'}; {ADVICE}"
        )
        if self.action == "stop":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _read_picture(file: str) -> Tensor:
    """A picture file as [1, 3, H, W] in [0, 1]."""
    from PIL import Image

    try:
        picture = Image.open(Path(file).expanduser()).convert("RGB")
    except OSError as error:
        raise ValueError(
            f"{file}: expected a picture, got {error}; name another sanity_picture"
        ) from error
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2) / STEPS
