"""One grid of pictures of the same prompts with the same noise, as training goes on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
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

# Pixels of a drawn picture's side; smaller pictures are enlarged without smoothing.
SMALLEST_SIDE = 144
MARGIN = 6
LINE = 13  # pixels of a line of text
CHARACTERS = 24  # of a line of text below a picture of the smallest side
PROMPT_LINES, VERDICT_LINES = 4, 6  # at most, below a picture
MOST_BOXES = 12  # on a picture, the surest ones; more hide it
LIKELY = 0.5  # chance of "yes" from which on a phrase counts as there
BLACK, RED, GREEN = "#000000", "#b00020", "#00702a"
BOX_COLORS = ("#e6194b", "#0070c0", "#f58231", "#911eb4", "#008080", "#9a6324", "#d000a0")

Line = tuple[str, str]  # a text and its color


@dataclass(frozen=True)
class Box:
    """What a detector found."""

    label: str
    score: float
    sides: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels of the picture."""


class SampleGrid(Observer):
    """Draws a grid, a row per prompt, for every logger that takes pictures and for `samples/`.

    Prompt, score and what the scorer tells of the picture stand under it: clauses that failed, the
    chance of "yes" for each phrase, or why there is no verdict. Boxes of its detector are drawn.

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
        with module.gathered():
            if trainer.is_global_zero:
                self.show(trainer, module)

    @torch.no_grad()
    def show(self, trainer: Trainer, module: PolicyModule) -> None:
        """Draw, score, log and write the grid."""
        tokens, _ = module.draw(self.prompts, self.images_per_prompt, "samples")
        images = module.policy.decode(tokens)
        prompts = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        scores = self._score(module, images, prompts)
        grid = draw_grid(images, prompts, scores.total, self.images_per_prompt, scores.details)
        path = Path(trainer.default_root_dir) / "samples" / f"{module.rollouts:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(path)
        for logger in trainer.loggers:
            log_picture(logger, "samples", grid, module.rollouts)

    def _score(self, module: PolicyModule, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        reward = scorer_of(module, self.reward, type(self).__name__)
        return ask(reward, images, prompts)


def draw_grid(
    images: Tensor,
    prompts: Sequence[Prompt],
    totals: Tensor,
    columns: int,
    details: Sequence[Mapping[str, Any]] | None = None,
) -> Image.Image:
    """Pictures [B, 3, H, W] in [0, 1] on one sheet, row by row, with texts and boxes.

    Args:
        images: The pictures.
        prompts: B, each picture's own.
        totals: [B], the scores.
        columns: Pictures in a row.
        details: B, a scorer's; see `read_verdict` and `find_boxes`.
    """
    factor = max(1, -(-SMALLEST_SIDE // images.shape[-1]))
    side, rows = images.shape[-1] * factor, -(-len(images) // columns)
    width = CHARACTERS * side // SMALLEST_SIDE
    details = details or [{}] * len(images)
    texts = [
        _write_lines(prompt.text, total, entry, width)
        for prompt, total, entry in zip(prompts, totals.tolist(), details, strict=True)
    ]
    height = side + LINE * max(map(len, texts)) + MARGIN
    sheet = Image.new(
        "RGB", (columns * (side + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "#e8e8e8"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 2)
    for number, (image, lines, entry) in enumerate(zip(images, texts, details, strict=True)):
        left = MARGIN + number % columns * (side + MARGIN)
        top = MARGIN + number // columns * (height + MARGIN)
        sheet.paste(_draw_picture(image, factor, list(find_boxes(entry))), (left, top))
        for place, (text, color) in enumerate(lines):
            pen.text((left, top + side + 1 + LINE * place), text, fill=color, font=font)
    return sheet


def _write_lines(prompt: str, total: float, details: Mapping[str, Any], width: int) -> list[Line]:
    """Score, prompt and verdict, in lines of at most `width` characters."""
    lines = [(f"score {total:.2f}", BLACK)]
    lines += [(text, BLACK) for text in textwrap.wrap(prompt, width)[:PROMPT_LINES]]
    verdict = [
        (part, color)
        for text, color in read_verdict(details)
        for part in textwrap.wrap(text, width, subsequent_indent="  ")
    ]
    if len(verdict) > VERDICT_LINES:
        left_out = len(verdict) - VERDICT_LINES + 1
        verdict = [*verdict[: VERDICT_LINES - 1], (f"... {left_out} lines more", BLACK)]
    return lines + verdict


def read_verdict(details: Mapping[str, Any]) -> Iterator[Line]:
    """What a scorer tells of a picture, in the words of its details.

    `failed`: clauses that do not hold. `phrases`: how likely each is there, as a list of entries
    with `phrase` and `yes`, as a list of texts beside `yes`, or as a detector's `best` score and
    `boxes` by phrase. `failure`: why there is no verdict. An ensemble has the details of each
    member under its name.
    """
    for name, value in details.items():
        match name, value:
            case "failed", []:
                yield "all clauses hold", GREEN
            case "failed", [*clauses]:
                yield from ((f"failed: {clause}", RED) for clause in clauses)
            case "failure", str():
                yield f"no verdict: {value}", RED
            case "phrases", dict(found):
                for word, entry in found.items():
                    yield f"{word} {entry['best']:.2f}", GREEN if entry["boxes"] else RED
            case "phrases", [{"phrase": _}, *_]:
                yield from (_write_chance(entry["phrase"], entry["yes"]) for entry in value)
            case "phrases", [str(), *_]:
                yield from starmap(_write_chance, zip(value, details["yes"], strict=True))
            case _, dict(member):
                yield from ((f"{name}: {text}", color) for text, color in read_verdict(member))


def _write_chance(phrase: str, chance: float) -> Line:
    return f"{phrase} {chance:.2f}", GREEN if chance >= LIKELY else RED


def find_boxes(details: Mapping[str, Any]) -> Iterator[Box]:
    """All boxes in a scorer's details, wherever they stand.

    They are entries with `label`, `score` and `box`, or `boxes` with their `scores` by phrase.
    """
    for name, value in details.items():
        match value:
            case {"boxes": [*boxes], "scores": [*scores]}:
                for box, score in zip(boxes, scores, strict=True):
                    yield Box(name, score, tuple(box))
            case dict(inner):
                yield from find_boxes(inner)
            case [{"box": _}, *_]:
                for entry in value:
                    label = f"{entry.get('color', '')} {entry['label']}".strip()
                    yield Box(label, entry["score"], tuple(entry["box"]))


def _draw_picture(image: Tensor, factor: int, boxes: Sequence[Box]) -> Image.Image:
    """A picture [3, H, W] in [0, 1], `factor` times as large, with the surest boxes on it."""
    pixels = (image.float().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels).resize(
        (width * factor, height * factor), Image.Resampling.NEAREST
    )
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=LINE - 3)
    surest = sorted(boxes, key=lambda box: -box.score)[:MOST_BOXES]
    labels = list(dict.fromkeys(box.label for box in surest))
    for box in reversed(surest):  # the surest one is drawn last, over the others
        color = BOX_COLORS[labels.index(box.label) % len(BOX_COLORS)]
        left, top, right, bottom = (side * factor for side in box.sides)
        pen.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=2
        )
        text = f"{box.label} {box.score:.2f}"
        place = (max(0, min(left, picture.width - pen.textlength(text, font=font))), max(0, top))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=color)
        pen.text(place, text, fill="white", font=font)
    return picture


def log_picture(logger: Logger, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to a logger that takes some: by `log_image`, or as TensorBoard does."""
    writer: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[picture], step=step)
    elif hasattr(writer, "add_image"):
        writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
