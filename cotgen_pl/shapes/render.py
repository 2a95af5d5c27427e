"""Pictures of the Shapes world: 4 x 4 cells of 8 x 8 pixels, at most one object in a cell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

CELL = 8  # pixels along a cell's side
GRID = 4  # cells along a picture's side
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
TEXTURES = ("plain", "striped")
BACKGROUND = 1.0
STRIPE_DARKNESS = 0.3  # brightness of a stripe's dark rows; rows come in bright and dark pairs

_RGB = {
    "red": (210, 30, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 225, 50),
    "purple": (150, 50, 185),
    "orange": (245, 125, 20),
}
_BITMAPS = {
    "circle": "..####.. .######. ######## ######## ######## ######## .######. ..####..",
    "square": "........ .######. .######. .######. .######. .######. .######. ........",
    "triangle": "...##... ...##... ..####.. ..####.. .######. .######. ######## ########",
    "cross": "##....## ###..### .######. ..####.. ..####.. .######. ###..### ##....##",
    "diamond": "...##... ..####.. .######. ######## ######## .######. ..####.. ...##...",
}


@dataclass(frozen=True)
class Placed:
    """An object in a cell; row 0 is the top, column 0 the left."""

    shape: str
    color: str
    texture: str
    row: int
    column: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of its cell, in pixels; right and bottom are exclusive."""
        return (
            self.column * CELL,
            self.row * CELL,
            (self.column + 1) * CELL,
            (self.row + 1) * CELL,
        )


def _draw_tile(shape: str, color: str, texture: str) -> Tensor:
    inside = torch.tensor([[c == "#" for c in row] for row in _BITMAPS[shape].split()])
    rgb = torch.tensor(_RGB[color]) / 255
    dark_rows = (torch.arange(CELL) // 2 % 2 == 1) & (texture == "striped")
    brightness = torch.where(dark_rows, STRIPE_DARKNESS, 1.0)
    ink = rgb[:, None, None] * brightness[None, :, None]
    return torch.where(inside, ink, torch.tensor(BACKGROUND))


@cache
def tiles() -> tuple[tuple[tuple[str, str, str], ...], Tensor]:
    """The 60 kinds of object, (shape, color, texture), and their pictures, [60, 3, 8, 8]."""
    kinds = tuple((s, c, t) for s in SHAPES for c in COLORS for t in TEXTURES)
    return kinds, torch.stack([_draw_tile(*kind) for kind in kinds])


def render(objects: Iterable[Placed]) -> Tensor:
    """Draw objects on a white picture, [3, 32, 32] in [0, 1].

    Raises:
        ValueError: Two objects share a cell.
    """
    kinds, drawings = tiles()
    picture = torch.full((3, GRID * CELL, GRID * CELL), BACKGROUND)
    taken: set[tuple[int, int]] = set()
    for placed in objects:
        if (placed.row, placed.column) in taken:
            raise ValueError(
                f"two objects in cell {placed.row, placed.column}; each cell holds at most one"
            )
        taken.add((placed.row, placed.column))
        left, top, right, bottom = placed.box
        kind = kinds.index((placed.shape, placed.color, placed.texture))
        picture[:, top:bottom, left:right] = drawings[kind]
    return picture
