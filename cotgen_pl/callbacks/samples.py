"""One grid of pictures of the same prompts with the same noise, as training goes on."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.data.prompts import PromptFile, check_scorable, read_prompts
from cotgen_pl.interfaces import Prompt, Reward, Scores, check_positive
from cotgen_pl.modules.base import PolicyModule, scorer_of
from cotgen_pl.scoring import ask

SMALLEST_SIDE = (
    144  # pixels of a drawn picture's side; smaller pictures are enlarged without smoothing
)
MARGIN = 6
LINE = 13  # pixels of a line of text
CHARACTERS = 24  # of a line of text below a picture of the smallest side


class SampleGrid(Observer):
    """Draws a grid, a row per prompt, for every logger that takes pictures and for `samples/`.

    Prompt and score stand under each picture.

    Args:
        files: Prompts to draw.
        reward: Scores the pictures; absent means the training reward.
        num_prompts: Rows; spread evenly over the files' prompts.
        images_per_prompt: Columns.
        every_n_updates: Rollouts between two grids; the start and the end have one always.
    """

    def __init__(
        self,
        files: list[PromptFile],
        reward: Reward | None = None,
        num_prompts: int = 6,
        images_per_prompt: int = 4,
        every_n_updates: int = 100,
    ) -> None:
        super().__init__(every_n_updates)
        check_positive(num_prompts=num_prompts, images_per_prompt=images_per_prompt)
        self.reward, self.images_per_prompt = reward, images_per_prompt
        prompts = [prompt for file in files for prompt in read_prompts(file)]
        for index, prompt in enumerate(prompts):
            prompt.index = index
        rows = min(num_prompts, len(prompts))
        self.prompts = [prompts[len(prompts) * row // rows] for row in range(rows)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, prompts that cannot be drawn or lack a scorer's facts."""
        assert isinstance(pl_module, PolicyModule)
        if stage == "fit":  # nothing is drawn elsewhere
            check_scorable(self.prompts, scorer_of(pl_module, self.reward, type(self).__name__))
            pl_module.policy.check_prompts([prompt.drawn_text for prompt in self.prompts])

    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Draw the grid, on the first process."""
        if trainer.is_global_zero:
            self.show(trainer, module)

    @torch.no_grad()
    def show(self, trainer: Trainer, module: PolicyModule) -> None:
        """Draw, score, log and write the grid."""
        tokens, _ = module.draw(self.prompts, self.images_per_prompt, "samples")
        images = module.policy.decode(tokens)
        prompts = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        grid = draw_grid(
            images, prompts, self._score(module, images, prompts).total, self.images_per_prompt
        )
        path = Path(trainer.default_root_dir) / "samples" / f"{module.rollouts:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        for logger in trainer.loggers:
            log_picture(logger, "samples", grid, module.rollouts)

    def _score(self, module: PolicyModule, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        reward = scorer_of(module, self.reward, type(self).__name__)
        return ask(reward, images, prompts)


def draw_grid(
    images: Tensor, prompts: Sequence[Prompt], totals: Tensor, columns: int
) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1] on one sheet, row by row, prompt and score under each."""
    factor = max(1, -(-SMALLEST_SIDE // images.shape[-1]))
    side, rows = images.shape[-1] * factor, -(-len(images) // columns)
    width = CHARACTERS * side // SMALLEST_SIDE
    texts = [textwrap.wrap(prompt.text, width)[:4] for prompt in prompts]
    height = side + LINE * (1 + max(map(len, texts))) + MARGIN
    sheet = Image.new(
        "RGB", (columns * (side + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "#e8e8e8"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 2)
    for number, image in enumerate(images):
        left = MARGIN + number % columns * (side + MARGIN)
        top = MARGIN + number // columns * (height + MARGIN)
        pixels = (image.float().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        sheet.paste(
            Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top)
        )
        lines = [f"score {totals[number].item():.2f}", *texts[number]]
        pen.multiline_text(
            (left, top + side + 1), "\n".join(lines), fill="black", font=font, spacing=1
        )
    return sheet


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to a logger that takes some: by `log_image`, or as TensorBoard does."""
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(writer, "add_image"):
        writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
