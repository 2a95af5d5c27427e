"""Reads a picture of the Shapes world back into facts, without a learned part or a verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cotgen_pl.shapes.render import BACKGROUND, CELL, GRID, Placed, tiles

# Root mean square difference, over a cell's 192 values in [0, 1], up to which a cell is read. The
# two most similar tiles are 0.124 apart; cells decoded from VQ codes lie within 0.09 of their tile;
# grey levels below 0.88, noise, gradients and inverted cells lie beyond 0.12. Mean absolute
# difference separates worse (tiles 0.059 apart, decoded cells up to 0.062 away) and takes ten times
# longer, because it is not a matrix product.
MAX_DISTANCE = 0.12
MAX_UNREADABLE = GRID * GRID // 4  # cells; more of them, and it is no picture of shapes


@dataclass
class Recognition:
    """What stands in a picture."""

    objects: list[Placed]
    """In reading order: row by row, from the left."""
    unreadable: list[tuple[int, int]] = field(default_factory=list)
    """Cells, as (row, column), that look like neither an object nor background."""
    is_picture: bool = True
    """False when more than a quarter of the cells are unreadable."""


def recognise(images: Tensor) -> list[Recognition]:
    """Name what stands in each cell: the nearest of the 60 tiles or blank, if any is near enough.

    Args:
        images: [B, 3, 32, 32] in [0, 1], on any device.

    Raises:
        ValueError: The pictures have another size.
    """
    side = GRID * CELL
    if images.dim() != 4 or images.shape[1:] != (3, side, side):
        raise ValueError(
            f"expected pictures of the Shapes world, [B, 3, {side}, {side}], "
            f"got {tuple(images.shape)}; score other pictures with another reward"
        )
    # On the CPU and in float64, the reading depends on no device and no matmul precision setting.
    distances, nearest = _distances(images.detach().cpu().double()).min(dim=-1)  # [B, 16] each
    nearest = torch.where(distances <= MAX_DISTANCE, nearest, -1)  # NaN is unreadable too
    return [_read(cells) for cells in nearest.tolist()]


def _distances(images: Tensor) -> Tensor:
    """Root mean square difference of every cell to the 60 tiles and to blank, [B, 16, 61]."""
    _, drawings = tiles()
    known = torch.cat([drawings, torch.full_like(drawings[:1], BACKGROUND)]).flatten(1)  # [61, 192]
    cells = images.unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL))  # [B, 3, 4, 8, 4, 8]
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, known.shape[1])  # [B * 16, 192]
    distances = torch.cdist(cells, known.double()) / known.shape[1] ** 0.5
    return distances.view(len(images), GRID * GRID, len(known))


def _read(cells: list[int]) -> Recognition:
    kinds, _ = tiles()
    found = Recognition([])
    for place, kind in enumerate(cells):
        row, column = divmod(place, GRID)
        if kind < 0:
            found.unreadable.append((row, column))
        elif kind < len(kinds):
            found.objects.append(Placed(*kinds[kind], row=row, column=column))
    found.is_picture = len(found.unreadable) <= MAX_UNREADABLE
    return found
