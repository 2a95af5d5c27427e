"""GroundingDINO as T2I-R1 uses it: are the things there, how many, and where.

The detector is GroundingDINO (https://arxiv.org/abs/2303.05499), asked for the nouns of a prompt;
the scores are those of the GroundingDINO reward of
https://github.com/CaraJ7/T2I-R1/tree/2d9d4d1. Four faults of it are corrected here;
`reference_faults: true` restores them together. Counts are of T2I-R1's own prompts.

a. Its position rule compares a distance of 150 pixels with boxes that are shares of the picture, so
   "next to", "near" and "on side of" always hold (182 of 2,195 positions). Here boxes are scaled to
   the pixels of the picture.
b. Its rule knows neither "above" (364 of 2,195) nor "on top of": always 0. Here they mean what
   "on the top of" means.
c. It removes duplicates before counting by corners that are in fact centres and sizes, so that most
   duplicates stay (1,172 prompts with counts). Here they are corners.
d. Nouns of three and more words are looked up under their first and last word, hence never found
   (four nouns). Here the phrase is the whole noun.

It also ends in a crash or in 0 where facts are missing; here such a picture has no verdict (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, nms

from cotgen_pl.interfaces import Prompt, Scores, check_share
from cotgen_pl.pixels import normalise, resize
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rules.position import RELATIONS, score_position

ORIGINAL = "IDEA-Research/grounding-dino-tiny"
# Up to 5.22 transformers puts the full stop behind a phrase at position 0, where the original puts
# it behind the phrase's last token, so that all text features are off.
FIRST_RIGHT_TRANSFORMERS = (5, 23)
DUPLICATE_OVERLAP = 0.5  # intersection over union from which two boxes are one thing
FOUND_SCORE = 0.2  # for an object of a relation, and for a wrong count of something found
LONGEST_REFERENCE_NOUN = 2  # words; fault d
UNKNOWN_TO_REFERENCE = ("above", "on top of")  # fault b


@dataclass
class Caption:
    """What the detector reads for some nouns."""

    nouns: Sequence[str]
    tokens: Tensor
    """[L] int64, on the CPU."""
    places: list[list[int]]
    """For each noun, which of the tokens are its own."""


@dataclass
class Found:
    """What was found of one phrase in one picture."""

    best: float
    """The highest score of any box, above the threshold or not, 0 to 1."""
    scores: Tensor
    """[n] of the boxes above the threshold."""
    boxes: Tensor
    """[n, 4] centre x, centre y, width, height, as shares of the picture."""

    @property
    def corners(self) -> Tensor:
        """[n, 4] left, top, right, bottom, as shares of the picture."""
        corners: Tensor = box_convert(self.boxes, "cxcywh", "xyxy")
        return corners


def write_caption(nouns: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The detector's text for some nouns, and where each starts and ends in it.

    >>> write_caption(["hot dog", "cup"])
    ('hot dog . cup.', [(0, 7), (10, 13)])
    """
    spans: list[tuple[int, int]] = []
    for noun in nouns:
        start = spans[-1][1] + len(" . ") if spans else 0
        spans.append((start, start + len(noun)))
    return " . ".join(nouns) + ".", spans


def find_tokens(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Which tokens overlap with a span of characters.

    >>> find_tokens([(0, 0), (0, 3), (4, 7), (8, 9), (0, 0)], 0, 7)  # [CLS] hot dog . [SEP]
    [1, 2]
    """
    return [
        place for place, (first, last) in enumerate(offsets) if max(first, start) < min(last, end)
    ]


def find_phrases(
    caption: Caption, probabilities: Tensor, boxes: Tensor, threshold: float
) -> dict[str, Found]:
    """What a detector's raw output says about each noun of one picture.

    A box's score for a noun is the mean of the probabilities of the noun's tokens. A noun that
    stands twice in the caption has the boxes of both.

    Args:
        caption: What the detector was asked for.
        probabilities: [Q, L] of each box and token, 0 to 1.
        boxes: [Q, 4] centre x, centre y, width, height, as shares of the picture.
        threshold: Score above which a box counts.
    """
    means = [probabilities[:, tokens].mean(dim=1) for tokens in caption.places]
    found = {}
    for noun in dict.fromkeys(caption.nouns):
        rows = [mean for mean, name in zip(means, caption.nouns, strict=True) if name == noun]
        scores = torch.cat(rows)  # [n * Q]
        kept = scores > threshold
        found[noun] = Found(scores.max().item(), scores[kept], boxes.repeat(len(rows), 1)[kept])
    return found


def score_objects(nouns: Sequence[str], found: Mapping[str, Found]) -> float:
    """The share of the nouns that were found."""
    return sum(len(found[noun].scores) > 0 for noun in nouns) / len(nouns)


def score_counts(
    items: Sequence[Mapping[str, Any]], found: Mapping[str, Found], reference_faults: bool = False
) -> float:
    """How well the numbers of things fit, 0 to 1.

    The mean over the items: 1 for the right number, 0.2 where something was found, else 0.

    Args:
        items: T2I-R1's numeracy_info, `obj_name` and `num` each.
        found: By noun.
        reference_faults: Count most duplicates (fault c).
    """
    score = 0.0
    for item in items:
        thing = found[item["obj_name"]]
        boxes = thing.boxes if reference_faults else thing.corners
        count = len(nms(boxes, thing.scores, DUPLICATE_OVERLAP))
        score += 1.0 if count == item["num"] else FOUND_SCORE if count else 0.0
    return score / len(items)


def score_relation(
    relation: Mapping[str, str],
    found: Mapping[str, Found],
    size: Tensor,
    reference_faults: bool = False,
) -> float:
    """How well two things stand to each other, 0 to 0.9.

    0.2 for each thing found; for both, half of the position rule on their best boxes is added.

    Args:
        relation: T2I-R1's spatial_info: `obj1`, `obj2` and `locality`.
        found: By noun.
        size: [4] width, height, width, height of the picture in pixels.
        reference_faults: Take boxes as shares of the picture (fault a), and give 0 for the
            relations that T2I-R1 does not know (fault b).
    """
    things = [found[relation["obj1"]], found[relation["obj2"]]]
    score = FOUND_SCORE * sum(len(thing.scores) > 0 for thing in things)
    unknown = reference_faults and relation["locality"] in UNKNOWN_TO_REFERENCE
    if unknown or not all(len(thing.scores) for thing in things):
        return score
    best = [thing.corners[thing.scores.argmax()] for thing in things]
    first, second = best if reference_faults else [box * size for box in best]
    return score + score_position(relation["locality"], first.tolist(), second.tolist()) / 2


class GroundingDINOReward(ModelReward):
    """Whether what a prompt names is there, in the right number and place, 0 to 1.

    A prompt's category, T2I-R1's task type, says by which rule: `spatial` by `score_relation`
    (fact `spatial_info`), `numeracy` by `score_counts` (`numeracy_info`), all others by
    `score_objects`. A prompt without nouns scores 1, as in T2I-R1.

    A caption is tokenised once; its features are not kept, since in this model they depend on the
    picture from the first fused layer on.

    Args:
        path: A folder or a hub id, in transformers' format.
        box_threshold: Score above which a box counts; 0.3 as in T2I-R1.
        reference_faults: Restore the faults a to d of T2I-R1's own code, all together.
        name: The score's name among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload.
    """

    required_facts = ("nouns",)

    def __init__(
        self,
        path: str = ORIGINAL,
        box_threshold: float = 0.3,
        reference_faults: bool = False,
        name: str = "grounding_dino",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        check_share(box_threshold=box_threshold)
        self.path, self.box_threshold = path, box_threshold
        self.reference_faults = reference_faults
        self._kept: Kept[Mapping[str, Any]] = Kept()  # text to its tokens and their offsets

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for nouns, relation or counts that are not as T2I-R1 writes them."""
        problem = describe_problem(prompt.facts)
        if problem:
            raise ValueError(f"reward {self.name}: {problem}")

    def read(self) -> nn.Module:
        """Read tokenizer, the settings of the image processor and weights."""
        import transformers

        from cotgen_pl.checkpoints import expand_home, read_config, read_processor, read_weights

        check_transformers()
        path = expand_home(self.path)
        read_config(path, transformers.GroundingDinoConfig, ORIGINAL)
        processor = read_processor(path, transformers.GroundingDinoProcessor)
        self._tokenizer, self._settings = processor.tokenizer, processor.image_processor
        kind = transformers.GroundingDinoForObjectDetection
        self._detector: Any = read_weights(path, kind, dtype=torch.float32)
        model: nn.Module = self._detector
        return model

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Detect and judge; details: per phrase the best score and the boxes found, in pixels."""
        problems = [self._find_problem(prompt) for prompt in prompts]
        scores = [math.nan if problem else 1.0 for problem in problems]
        details: list[dict[str, Any]] = [
            {"failure": problem} if problem else {"phrases": {}} for problem in problems
        ]
        asked = [n for n, bad in enumerate(problems) if not bad and prompts[n].facts["nouns"]]
        if asked:
            height, width = images.shape[-2:]
            size = torch.tensor([width, height] * 2, device=images.device)
            answers = self._detect(images[asked], [prompts[place] for place in asked])
            for place, found in zip(asked, answers, strict=True):
                scores[place], details[place] = self._judge(prompts[place], found, size)
        return Scores.single(self.name, torch.tensor(scores, device=images.device), details)

    def _find_problem(self, prompt: Prompt) -> str | None:
        """Why a picture of this prompt cannot be judged, or None."""
        problem = describe_problem(prompt.facts) or describe_missing(prompt)
        if problem or not prompt.facts["nouns"]:
            return problem
        most = self._detector.config.max_text_len
        caption = self._read_caption(prompt.facts["nouns"])
        if len(caption.tokens) > most:
            return f"expected nouns of at most {most} tokens, got {len(caption.tokens)}"
        return None if all(caption.places) else "got a noun without any token"

    def _detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[dict[str, Found]]:
        """By picture, what was found of each noun."""
        captions = [self._read_caption(prompt.facts["nouns"]) for prompt in prompts]
        rows = [caption.tokens for caption in captions]
        tokens = pad_sequence(rows, batch_first=True).to(images.device)
        lengths = torch.tensor([len(row) for row in rows], device=images.device)
        mask = torch.arange(tokens.shape[1], device=images.device) < lengths[:, None]  # [b, L]
        pixels = fit_pictures(images, self._settings).to(self.torch_dtype)
        raw = self._detector(pixel_values=pixels, input_ids=tokens, attention_mask=mask.long())
        probabilities = raw.logits.float().sigmoid()  # [b, Q, max_text_len]; 0 behind the caption
        boxes = raw.pred_boxes.float()  # [b, Q, 4]
        return [
            find_phrases(*row, self.box_threshold)
            for row in zip(captions, probabilities, boxes, strict=True)
        ]

    def _judge(
        self, prompt: Prompt, found: dict[str, Found], size: Tensor
    ) -> tuple[float, dict[str, Any]]:
        """The score of a picture whose width, height, width, height are `size`; its details."""
        if any(math.isnan(thing.best) for thing in found.values()):
            return math.nan, {"failure": "the detector's scores are NaN; try dtype: float32"}
        facts, faults = prompt.facts, self.reference_faults
        seen = hide_long_nouns(found) if faults else found
        match prompt.category:
            case "spatial":
                score = score_relation(facts["spatial_info"], seen, size, faults)
            case "numeracy":
                score = score_counts(facts["numeracy_info"], seen, faults)
            case _:
                score = score_objects(facts["nouns"], seen)
        return score, {"phrases": {noun: _describe(f, size) for noun, f in found.items()}}

    def _read_caption(self, nouns: Sequence[str]) -> Caption:
        text, spans = write_caption(nouns)
        encoded = self._kept.get_or_compute(text, self._tokenise)
        places = [find_tokens(encoded["offset_mapping"], *span) for span in spans]
        return Caption(nouns, torch.tensor(encoded["input_ids"]), places)

    def _tokenise(self, text: str) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = self._tokenizer(text, return_offsets_mapping=True)
        return encoded


def hide_long_nouns(found: Mapping[str, Found]) -> dict[str, Found]:
    """What T2I-R1 finds: nothing of nouns of three and more words (fault d)."""
    long = {n: f for n, f in found.items() if len(n.split()) > LONGEST_REFERENCE_NOUN}
    return {**found, **{n: Found(f.best, f.scores[:0], f.boxes[:0]) for n, f in long.items()}}


def describe_problem(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the facts that there are, or None."""
    nouns = facts.get("nouns")
    if not isinstance(nouns, list) or not all(isinstance(n, str) and n.strip() for n in nouns):
        return f"expected a list of texts under 'nouns', got {nouns!r}; write it like [\"cup\"]"
    match facts.get("spatial_info") or None:
        case None:
            pass
        case {"obj1": str(), "obj2": str(), "locality": str(locality)} if locality in RELATIONS:
            pass
        case other:
            return (
                "expected obj1, obj2 and a locality under 'spatial_info', got "
                f"{other!r}; take a locality out of {list(RELATIONS)}"
            )
    items = facts.get("numeracy_info") or []
    if isinstance(items, list) and all(map(_is_item, items)):
        return None
    return (
        "expected a list of obj_name and num under 'numeracy_info', got "
        f'{items!r}; write it like [{{"obj_name": "cup", "num": 2}}]'
    )


def _is_item(item: Any) -> bool:
    match item:
        case {"obj_name": str(), "num": int()}:
            return True
    return False


def describe_missing(prompt: Prompt) -> str | None:
    """What the rule of a prompt's category lacks, or None.

    >>> describe_missing(Prompt("two cups", category="numeracy", facts={"nouns": ["cup"]}))
    "expected the fact 'numeracy_info' for the category numeracy, got none"
    """
    facts = prompt.facts
    needed = {"spatial": "spatial_info", "numeracy": "numeracy_info"}.get(prompt.category)
    if needed is None or not facts["nouns"]:
        return None
    info = facts.get(needed)
    if not info:
        return f"expected the fact {needed!r} for the category {prompt.category}, got none"
    if prompt.category == "spatial":
        names = [info["obj1"], info["obj2"]]
    else:
        names = [item["obj_name"] for item in info]
    strangers = [name for name in names if name not in facts["nouns"]]
    return f"expected {strangers[0]!r} among the nouns, got {facts['nouns']}" if strangers else None


def _describe(thing: Found, size: Tensor) -> dict[str, Any]:
    boxes = (thing.corners * size).tolist()
    return {"best": thing.best, "scores": thing.scores.tolist(), "boxes": boxes}


def fit_pictures(images: Tensor, settings: Any) -> Tensor:
    """Pictures as the image processor makes them: resized, aspect ratio kept, and normalised.

    The shorter side becomes 800 pixels, or less where the longer one would exceed 1,333.

    Args:
        images: [b, 3, H, W] in [0, 1].
        settings: transformers' image processor, for the sizes, mean and deviation.

    Returns:
        [b, 3, h, w] float32.
    """
    from transformers.image_transforms import get_size_with_aspect_ratio

    shortest, longest = settings.size.shortest_edge, settings.size.longest_edge
    height, width = get_size_with_aspect_ratio(images.shape[-2:], shortest, longest)
    return normalise(
        resize(images, height, width, mode="bilinear"), settings.image_mean, settings.image_std
    )


def check_transformers() -> None:
    """Raise a ValueError for a version of transformers that computes wrong text features."""
    from transformers import __version__ as version

    if tuple(map(int, version.split(".")[:2])) < FIRST_RIGHT_TRANSFORMERS:
        raise ValueError(
            f"GroundingDINO: expected transformers 5.23 or later, got {version}, which puts the "
            "full stop behind each phrase at a wrong position and so computes wrong text features; "
            "run pip install 'transformers>=5.23'"
        )
