"""Training the VQ part of the small Janus, so that one token is one cell.

Kept apart from the product's training modules: Janus's VQ part is never trained by post-training.

What was found to matter: pictures of every density (mostly white ones teach shapes slowly), a
weight on the objects' pixels, codes of unit length (Janus's encoder compares raw vectors, its
decoder normalises them), and the codes as the classes of a small classification loss, without which
some kinds of object share a code for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cotgen_pl.shapes.render import BACKGROUND, CELL, GRID, tiles

BLANK = 60  # the class after the 60 kinds of object
OBJECT_WEIGHT = 3.0  # of an object's pixels against the background's
SHARPNESS = 10.0  # inverse temperature of the classification over unit vectors
NAMING_WEIGHT = 0.3  # of the classification loss
CONTINUOUS_SHARE = 0.25  # of the steps that train without quantisation, with noise in its place
LATENT_NOISE = 0.1  # standard deviation per latent channel, of vectors of unit length
LEARNING_RATE = 2e-3


def random_pictures(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures with random objects, each of a random density.

    Returns:
        Pictures [B, 3, 32, 32] in [0, 1] and the class of each cell, [B, 16] in 0..60, row by row.
    """
    _, drawings = tiles()
    blank = torch.full_like(drawings[:1], BACKGROUND)
    density = torch.rand(number, 1, generator=generator)
    classes = torch.randint(BLANK, (number, GRID**2), generator=generator)
    classes[torch.rand(classes.shape, generator=generator) > density] = BLANK
    cells = torch.cat([drawings, blank])[classes].view(number, GRID, GRID, 3, CELL, CELL)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(number, 3, GRID * CELL, GRID * CELL), classes


def train_vq(
    vq: Any, steps: int, seed: int, report: Callable[[str], None], batch: int = 32
) -> None:
    """Train a `JanusVQVAE` in place.

    Args:
        vq: For pictures of 32 x 32 pixels, 4 x 4 tokens and at least 61 codes.
        steps: Optimizer steps of `batch` pictures.
        seed: Of the pictures.
        report: Takes a line of progress every 100 steps.
        batch: Pictures per step.
    """
    generator = torch.Generator().manual_seed(seed)
    vq.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        vq.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05
    )
    for step in range(1, steps + 1):
        pictures, classes = random_pictures(batch, generator)
        noise = None if step > CONTINUOUS_SHARE * steps else generator
        loss, agreement = _loss(vq, pictures, classes, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            report(f"vq step {step}/{steps}: loss {loss.item():.3f}, own codes {agreement:.4f}")
    with torch.no_grad():
        codes = vq.quantize.embedding.weight
        codes.copy_(functional.normalize(codes, dim=-1))
    vq.requires_grad_(False)


def _loss(
    vq: Any, pictures: Tensor, classes: Tensor, noise: torch.Generator | None
) -> tuple[Tensor, float]:
    """The loss, and the share of cells whose nearest code is their own."""
    codes = functional.normalize(vq.quantize.embedding.weight, dim=-1)
    latent = functional.normalize(vq.quant_conv(vq.encoder(pictures * 2 - 1)), dim=1)
    flat = latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
    nearest = (flat @ codes.T).argmax(-1)
    chosen = codes[nearest]
    if noise is None:
        through = flat + (chosen - flat).detach()  # straight-through gradient
    else:
        through = flat + LATENT_NOISE * torch.randn(flat.shape, generator=noise)
    grid = through.view(len(pictures), GRID, GRID, -1).permute(0, 3, 1, 2)
    error = vq.decoder(vq.post_quant_conv(grid)) - (pictures * 2 - 1)
    weight = torch.where(_object_pixels(classes), OBJECT_WEIGHT, 1.0)
    drawing = (weight * (error.abs() + 2 * error**2)).mean()
    commitment = (flat - chosen.detach()).square().sum(-1).mean()
    naming = functional.cross_entropy(SHARPNESS * flat @ codes.T, classes.flatten())
    own = (nearest == classes.flatten()).float().mean().item()
    return drawing + 0.25 * commitment + NAMING_WEIGHT * naming, own


def _object_pixels(classes: Tensor) -> Tensor:
    """Which pixels lie in a cell with an object, [B, 1, 32, 32] bool."""
    cells = (classes != BLANK).view(-1, 1, GRID, GRID)
    return cells.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
