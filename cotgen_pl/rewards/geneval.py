"""GenEval in process: Mask2Former finds objects, CLIP names their colors, rules give the verdict.

The benchmark of https://arxiv.org/abs/2310.11513 (github.com/djghosh13/geneval at af4902f) on
transformers and open_clip alone, and flow_grpo's graded form of it as a training reward. What
differs from the original:

* half precision is used nowhere; there, CLIP runs under autocast on a GPU;
* pictures are resized as tensors: at most one step of 256 from cv2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores, check_choice
from cotgen_pl.pixels import round_to_bytes
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rewards.detectors import Instance, InstanceDetector
from cotgen_pl.rewards.open_clip_models import (
    OPEN_CLIP_FILES,
    OpenClip,
    find_open_clip,
    read_open_clip,
)
from cotgen_pl.rewards.perception import find_converted
from cotgen_pl.rewards.sanity import Sanity, SanityCheck
from cotgen_pl.rules.geneval import THRESHOLD, Found, graded_reward, judge, keep_sure
from cotgen_pl.weights import find_weights

Part = Literal["strict", "graded", "exact"]
PARTS = ("strict", "graded", "exact")
MOST_EQUAL = 256  # pictures in a row with one and the same score, before that is told
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
BACKGROUND = 0.6  # (153, 153, 153), around an object whose color is read


def cut_out(image: Tensor, found: Instance) -> Tensor:
    """An object on grey, cut to its box: [3, h, w] of a picture [3, H, W]."""
    alone = torch.where(found.mask, round_to_bytes(image), torch.full_like(image, BACKGROUND))
    left, top, right, bottom = (round(side) for side in found.box)
    return alone[:, top:bottom, left:right]


class ColorClassifier(nn.Module):
    """Names an object's color out of ten: CLIP, asked with three templates for each.

    Args:
        clip: OpenAI's ViT-L/14, with QuickGELU.
    """

    def __init__(self, clip: OpenClip) -> None:
        super().__init__()
        self.model = clip.model
        self._clip = clip
        self._kept: Kept[Tensor] = Kept()  # label to [10, D]
        self._texts: Kept[Tensor] = Kept()

    def forward(self, image: Tensor, found: Instance) -> str:
        """The color of an object in a picture [3, H, W] in [0, 1]."""
        pixels = self._clip.crop_pictures(cut_out(image, found)[None])
        features = self._clip.picture_features(pixels)  # [1, D]
        colors = self._kept.get_or_compute(found.label, self._color_features)
        return COLORS[int((features @ colors.to(features.device).T).argmax())]

    def _color_features(self, label: str) -> Tensor:
        """[10, D] of unit length: of each color, the mean over templates."""
        rows = []
        for color in COLORS:
            texts = [template.format(color=color, label=label) for template in TEMPLATES]
            rows.append(self._clip.text_features(texts, self._texts).mean(0))
        return F.normalize(torch.stack(rows), dim=-1)


class EqualScores:
    """Tells, once, that many pictures in a row had one and the same score.

    A detector whose kernels are broken gives all pictures 0 in silence.
    """

    def __init__(self) -> None:
        self.value, self.number, self.told = math.nan, 0, False

    def watch(self, scores: Tensor, name: str) -> None:
        """Look at the scores [B] of further pictures; those without verdict do not count."""
        for score in scores[~scores.isnan()].tolist():
            self.number = self.number + 1 if score == self.value else 1
            self.value = score
        if self.number >= MOST_EQUAL and not self.told:
            self.told = True
            warnings.warn(
                f"reward {name}: the last {self.number} pictures all scored {self.value:g}; look "
                "at some of them, and name a sanity_picture to see whether the detector works",
                stacklevel=2,
            )


class GenEvalReward(ModelReward):
    """GenEval's verdict on pictures of its prompts.

    Parts: `strict`, 1 where the benchmark calls the picture right, else 0; `graded`, flow_grpo's
    mean over terms, 1 at best and below 0 far above the asked number; `exact`, 1 where counts are
    equal as well, not only reached. Prompts want the facts of GenEval's metadata and its tag as
    category. Details: the clauses that failed, objects with scores and boxes, and colors read. A
    picture for which the detector gives NaN has no verdict. Scores that stay the same for 256
    pictures are warned of.

    Args:
        path: The folder that `tools/convert.py mask2former` wrote.
        names: GenEval's object_names.txt, the detector's 80 labels in their order.
        clip: OpenAI's ViT-L/14 in open_clip's format: a file, a folder that holds one, or a hub
            repository, "owner/name".
        total: Which part is the total: `strict` for the benchmark, `graded` for training.
        reference_faults: Give the graded score the second term that flow_grpo's server adds where
            a position is wrong.
        sanity: What to do where `sanity_picture` does not show the detector a `sanity_class`: stop,
            warn, or do not look. Whatever is chosen, a detector whose answers are not finite, or
            equal for two different pictures, stops. Without a picture nothing is looked at.
        sanity_picture: A picture file of yours that shows such an object.
        sanity_class: Its name, one of `names`.
        name: Under which it is logged.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    required_facts = ("include",)

    def __init__(
        self,
        path: str,
        names: str = "data/geneval/object_names.txt",
        clip: str = "timm/vit_large_patch14_clip_224.openai",
        total: Part = "strict",
        reference_faults: bool = False,
        sanity: Sanity = "warn",
        sanity_picture: str | None = None,
        sanity_class: str | None = None,
        name: str = "geneval",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        check_choice("total", total, Part)
        self.path, self.clip, self.total = path, clip, total
        self.reference_faults = reference_faults
        self.labels = read_names(Path(names).expanduser())
        self.folder = find_converted(path, "mask2former", "mask2former")
        find_weights(clip, OPEN_CLIP_FILES, "GenEval CLIP")
        self._sanity = SanityCheck(sanity, sanity_picture, sanity_class)
        _check_known(sanity_class, self.labels)
        self._equal = EqualScores()

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for a class or color that is never found."""
        facts = prompt.facts
        clauses = [*facts["include"], *(facts.get("exclude") or ())]
        for clause in clauses:
            if clause["class"] not in self.labels:
                raise ValueError(
                    f"reward {self.name}: expected a class out of the {len(self.labels)} names of "
                    f"the detector, got {clause['class']!r}; correct this prompt's facts"
                )
            if clause.get("color", COLORS[0]) not in COLORS:
                raise ValueError(
                    f"reward {self.name}: expected a color out of {COLORS}, got "
                    f"{clause['color']!r}; correct this prompt's facts"
                )

    def read(self) -> nn.Module:
        """Read detector and CLIP, and see that the detector works."""
        detector = InstanceDetector.read(self.folder, self.labels)
        detector.check()
        self._sanity.run(self.name, partial(_labels_in, detector.eval()))
        clip = read_open_clip(
            find_open_clip(self.clip, "GenEval CLIP"), "ViT-L-14-quickgelu", quick_gelu=True
        )
        return nn.ModuleDict({"detector": detector, "classifier": ColorClassifier(clip)})

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Find objects in all pictures, then judge one after another."""
        assert isinstance(self.network, nn.ModuleDict)
        found = self.network["detector"](images, least=THRESHOLD)
        verdicts = [
            self._judge(image, items, prompt)
            for image, items, prompt in zip(images, found, prompts, strict=True)
        ]
        parts = {
            part: torch.tensor([verdict[part] for verdict, _ in verdicts], dtype=torch.float32)
            for part in PARTS
        }
        parts = {part: values.to(images.device) for part, values in parts.items()}
        self._equal.watch(parts[self.total], self.name)
        weights = {part: float(part == self.total) for part in parts}
        return Scores(parts[self.total], parts, weights, [details for _, details in verdicts])

    def _judge(
        self, image: Tensor, found: Sequence[Instance] | None, prompt: Prompt
    ) -> tuple[dict[str, float], dict[str, Any]]:
        if found is None:
            failure = "the detector's answers are NaN; try dtype: float32"
            return dict.fromkeys(PARTS, math.nan), {"failure": failure}
        sure = keep_sure(found, prompt.category)
        colors: dict[int, str] = {}  # by identity: each object is read once

        def read_color(item: Found, attribute: str) -> str:
            if id(item) not in colors:
                assert isinstance(self.network, nn.ModuleDict)
                colors[id(item)] = self.network["classifier"](image, item)
            return colors[id(item)]

        clauses = judge(prompt.facts, sure, read_color)
        graded, exact = graded_reward(
            prompt.facts, sure, read_color, reference_faults=self.reference_faults
        )
        objects = [
            {"label": item.label, "score": item.score, "box": list(item.box)}
            | ({"color": colors[id(item)]} if id(item) in colors else {})
            for item in sure
        ]
        failed = [name for name, holds in clauses.items() if not holds]
        verdict = {"strict": float(not failed), "graded": graded, "exact": float(exact)}
        return verdict, {"failed": failed, "objects": objects}


def read_names(file: Path) -> list[str]:
    """The labels in a file, one per line."""
    if not file.is_file():
        raise ValueError(
            f"expected GenEval's object_names.txt at {file}, got no file; run `python "
            "tools/fetch.py geneval_prompts`, or set names to where it lies"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _labels_in(detector: InstanceDetector, picture: Tensor) -> set[str]:
    """What is in a picture [1, 3, H, W] in [0, 1]."""
    [found] = detector(picture, least=THRESHOLD)
    return {item.label for item in found or ()}


def _check_known(label: str | None, labels: Sequence[str]) -> None:
    if label is not None and label not in labels:
        raise ValueError(
            f"expected a sanity_class out of the {len(labels)} names of the detector, got "
            f"{label!r}; take one of them"
        )
