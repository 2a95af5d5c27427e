"""T2I-CompBench's scores of pictures (https://arxiv.org/abs/2307.06350), one rule per category.

color, shape and texture ask BLIP-VQA about each noun phrase; spatial, numeracy and 3d_spatial judge
boxes, the last with depth; non_spatial is a CLIPScore; complex is the mean of some of these. The
rules are those of github.com/Karine-Huang/T2I-CompBench at 1b70949. What differs:

* UniDet (detectron2) is replaced by an open-vocabulary detector, which knows all nouns and gives
  other scores: these parts' names end in `[open_vocabulary]`, and are not comparable;
* phrases come from a phrase file (`cotgen_pl.phrases`), a fact of the prompt, or a template;
* "on top of" means what "on the top of" means, and depth is read in the box and not in the box with
  its axes swapped (both switchable); where both things of a prompt have one name, they are its two
  surest boxes;
* pictures are resized as tensors, to within one step of 256 of Pillow's result, and all networks
  compute in float32 on a GPU too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Scores, check_share
from cotgen_pl.phrases import PhraseFile
from cotgen_pl.rewards.base import Kept, ModelReward
from cotgen_pl.rewards.compbench_prompts import (
    BY_DETECTOR,
    Plan,
    PromptReader,
    check_categories,
    check_phrase_source,
    digest_files,
    read_noun_list,
    terms_of,
)
from cotgen_pl.rewards.depth import ORIGINAL as DEPTH_MODEL
from cotgen_pl.rewards.depth import DepthEstimator, mean_depth
from cotgen_pl.rewards.open_clip_models import (
    OPEN_CLIP_FILES,
    OpenClip,
    find_open_clip,
    read_open_clip,
)
from cotgen_pl.rewards.open_vocabulary import ORIGINAL as DETECTOR
from cotgen_pl.rewards.open_vocabulary import FoundByNoun, OpenVocabularyDetector
from cotgen_pl.rewards.perception import BlipVQA, find_converted
from cotgen_pl.rewards.sanity import Sanity, SanityCheck
from cotgen_pl.rules.compbench import (
    LEAST_SPATIAL_SCORE,
    UNKNOWN_IN_DEPTH,
    UNKNOWN_TO_UNIDET,
    Relation,
    detector_size,
    drop_duplicates,
    numeracy_score,
    score_depth_relation,
    score_relation_2d,
    spatial_score,
)
from cotgen_pl.rules.geneval import Found
from cotgen_pl.weights import find_weights

DECIMALS = 4


def multiply_answers(probabilities: Sequence[float]) -> float:
    """The score of a picture: a product in float32 of rounded numbers, rounded to 4 decimals.

    >>> multiply_answers([0.5, 0.333333])
    0.1666
    >>> multiply_answers([])
    1.0
    """
    # One by one, because the order of a tensor's own product is not told.
    rounded = [round(p, DECIMALS) for p in probabilities]
    factors = torch.tensor([1.0, *rounded], dtype=torch.float32)
    return round(reduce(mul, factors).item(), DECIMALS)


def choose_pair(found: FoundByNoun, relation: Relation) -> tuple[Found | None, Found | None]:
    """The surest box of each of two things; the two surest where both have one name."""
    first, second = found[relation.first], found[relation.second]
    if relation.first == relation.second:
        second = second[1:]
    return next(iter(first), None), next(iter(second), None)


def hide_nouns(found: FoundByNoun, unknown: frozenset[str]) -> FoundByNoun:
    """What would be found by a detector that does not know some nouns."""
    return {noun: [] if noun in unknown else boxes for noun, boxes in found.items()}


def judge_relation(found: FoundByNoun, relation: Relation, *, reference_faults: bool) -> float:
    """The 2D score of a picture, 0 or 0.5 to 1."""
    if reference_faults:
        found = hide_nouns(found, UNKNOWN_TO_UNIDET)
    first, second = choose_pair(found, relation)
    holds = 0.0
    if first and second:
        holds = score_relation_2d(
            relation.relation, first.box, second.box, reference_faults=reference_faults
        )
    return _combine(first, second, holds, LEAST_SPATIAL_SCORE)


def judge_depth(
    found: FoundByNoun, relation: Relation, nearness: Tensor, *, reference_faults: bool
) -> float:
    """The 3D score of a picture, 0 to 1, by the map [H, W] of how near each pixel is."""
    if reference_faults:
        found = hide_nouns(found, UNKNOWN_IN_DEPTH)
    first, second = choose_pair(found, relation)
    holds = 0.0
    if first and second:
        depths = [mean_depth(nearness, f.box, swap_axes=reference_faults) for f in (first, second)]
        holds = score_depth_relation(relation.relation, first.box, second.box, *depths)
    return _combine(first, second, holds, 0.0)


def _combine(first: Found | None, second: Found | None, holds: float, least: float) -> float:
    return spatial_score(
        first.score if first else None, second.score if second else None, holds, least=least
    )


def judge_counts(found: FoundByNoun, counts: Sequence[tuple[str, int]]) -> float:
    """The numeracy score of a picture, 0 to 1."""
    numbers = {
        noun: len(drop_duplicates([item.box for item in boxes])) for noun, boxes in found.items()
    }
    return numeracy_score(counts, numbers)


@dataclass
class Verdict:
    """What is known of one picture so far."""

    failure: str
    terms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def score(self, plan: Plan) -> float:
        """The mean over the plan's terms; NaN where one of them is not known."""
        if self.failure:
            return math.nan
        return sum(self.terms[term] for term in plan.terms) / len(plan.terms)

    def describe(self, score: float) -> dict[str, Any]:
        """For whoever looks at the picture."""
        failure = self.failure or ("a network gave NaN" if math.isnan(score) else "")
        if failure:
            return self.details | {"failure": failure}
        return self.details | ({"terms": self.terms} if len(self.terms) > 1 else {})


class CompBenchReward(ModelReward):
    """T2I-CompBench's score of pictures of its prompts, 0 to 1, by each prompt's own category.

    Parts: the total under `name`, and of each category its own score, NaN for pictures of the
    others. The name of a category tells in brackets what is not as published: `[template]` (phrases
    by template), `[spacy-VERSION]`, the name of a fact, `[open_vocabulary]`. What a template or a
    phrase file does not cover has no verdict (NaN). Details: phrases with the probability of "yes",
    objects with scores and boxes in the picture's pixels, the terms of a complex score, or
    `failure`. Only the networks that `categories` need are read.

    A complex prompt must tell its part of the benchmark (files complex_<split>_<part>.txt, format
    t2i_compbench) and stand in the phrase file.

    Args:
        path: The folder that `tools/convert.py blip_vqa` wrote.
        categories: Of the prompts; absent means all eight.
        phrases: The fact that holds a prompt's phrases, a list of texts, such as T2I-R1's
            `attr_nouns`.
        phrase_file: In its place, what `tools/fetch.py phrases` wrote. Without either, prompts like
            "a red cup and a blue bowl" alone are scored.
        detector: OWLv2, a folder or a hub id in transformers' format.
        clip: OpenAI's ViT-B/32 in open_clip's format: a file, a folder that holds one, or a hub
            repository, "owner/name".
        depth: DPT, a folder or a hub id in transformers' format.
        nouns: T2I-CompBench's new_objects.txt, for counts.
        threshold: Detector's score above which a box counts; 0.1 as published for UniDet.
        reference_faults: Restore what the published code does to positions: nouns that UniDet does
            not know are never found, "on top of" is 0, and depth is read with swapped axes.
        sanity: What to do where `sanity_picture` does not show the detector a `sanity_class`, see
            `cotgen_pl.rewards.geneval.GenEvalReward`.
        sanity_picture: A picture file of yours that shows such a thing.
        sanity_class: Its name, any noun.
        name: Of the total among the parts.
        **residence: See `ModelReward`: batch_size, device, dtype, offload. At most batch_size
            questions are asked at once.
    """

    def __init__(
        self,
        path: str = "weights/blip_vqa",
        categories: list[str] | None = None,
        phrases: str | None = None,
        phrase_file: str | None = None,
        detector: str = DETECTOR,
        clip: str = "timm/vit_base_patch32_clip_224.openai",
        depth: str = DEPTH_MODEL,
        nouns: str = "data/t2i_compbench/new_objects.txt",
        threshold: float = 0.1,
        reference_faults: bool = False,
        sanity: Sanity = "warn",
        sanity_picture: str | None = None,
        sanity_class: str | None = None,
        name: str = "compbench",
        **residence: Any,
    ) -> None:
        super().__init__(name, **residence)
        check_share(threshold=threshold)
        self.categories = check_categories(categories)
        self.terms = terms_of(self.categories)
        check_phrase_source(phrases, phrase_file, self.terms)
        self.detector, self.clip, self.depth = detector, clip, depth
        self.threshold, self.reference_faults = threshold, reference_faults
        self._sanity = SanityCheck(sanity, sanity_picture, sanity_class)
        if sanity_picture is not None and not self.terms & BY_DETECTOR:
            raise ValueError(
                "expected no sanity_picture without a category that a detector judges, got "
                f"{sanity_picture!r}; leave it out"
            )
        if "blip" in self.terms:
            self.folder = find_converted(path, "blip_vqa", "blip")
        if "clip" in self.terms:
            find_weights(clip, OPEN_CLIP_FILES, "T2I-CompBench CLIP")
        self.reader = PromptReader(
            name,
            self.categories,
            phrases,
            PhraseFile(phrase_file) if phrase_file else None,
            read_noun_list(nouns) if "numeracy" in self.terms else {},
        )
        self.words = digest_files(phrase_file, nouns if "numeracy" in self.terms else None)
        self._kept: Kept[Tensor] = Kept()  # text to [1, D]

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError unless it is of a known category and written as its rule needs."""
        self.reader.check(prompt)

    def read(self) -> nn.Module:
        """Read the networks that the categories need."""
        members: dict[str, nn.Module] = {}
        if "blip" in self.terms:
            members["blip"] = BlipVQA.read(self.folder)
        if self.terms & BY_DETECTOR:
            members["detector"] = self._read_detector()
        if "3d_spatial" in self.terms:
            members["depth"] = DepthEstimator.read(self.depth)
        if "clip" in self.terms:
            file = find_open_clip(self.clip, "T2I-CompBench CLIP")
            self._clip: OpenClip = read_open_clip(file, "ViT-B-32-quickgelu", quick_gelu=True)
            members["clip"] = self._clip.model
        return nn.ModuleDict(members)

    def _read_detector(self) -> OpenVocabularyDetector:
        """Read it, and see that it works."""
        detector = OpenVocabularyDetector.read(self.detector).eval()
        detector.check()
        noun = self._sanity.label or ""

        def find(picture: Tensor) -> list[str]:
            size = (picture.shape[-2], picture.shape[-1])
            [found] = detector(picture, [[noun]], size, self.threshold)
            return [noun] if found and found[noun] else []

        self._sanity.run(self.name, find)
        return detector

    def metric_name(self, category: str) -> str:
        """The category; in brackets, what differs from the published metric."""
        return self.reader.part_name(category) if category in self.categories else category

    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Ask each network about the pictures that need it, then put the terms together."""
        plans = [self.reader.plan(prompt) for prompt in prompts]
        verdicts = [Verdict(plan.failure) for plan in plans]
        self._ask_about_phrases(images, plans, verdicts)
        self._compare_with_texts(images, plans, verdicts)
        self._look_for_things(images, plans, verdicts)
        values = [verdict.score(plan) for verdict, plan in zip(verdicts, plans, strict=True)]
        scores = torch.tensor(values, dtype=torch.float32, device=images.device)
        parts = {self.name: scores}
        for category in self.categories:
            own = torch.tensor([p.category == category for p in prompts], device=images.device)
            parts[self.reader.part_name(category)] = scores.masked_fill(~own, math.nan)
        weights = {part: float(part == self.name) for part in parts}
        details = [v.describe(value) for v, value in zip(verdicts, values, strict=True)]
        return Scores(scores, parts, weights, details)

    def _member(self, name: str) -> nn.Module:
        assert isinstance(self.network, nn.ModuleDict)
        return self.network[name]

    def _ask_about_phrases(
        self, images: Tensor, plans: Sequence[Plan], verdicts: Sequence[Verdict]
    ) -> None:
        rows = _rows_with("blip", plans)
        if not rows:
            return
        pictures = [place for place, row in enumerate(rows) for _ in plans[row].phrases]
        questions = [f"{phrase}?" for row in rows for phrase in plans[row].phrases]
        answers: list[float] = []  # the score of a prompt without phrases is 1, as published
        if questions:
            answers = self._member("blip")(images[rows], pictures, questions).tolist()
        for place, row in enumerate(rows):
            given = [p for p, own in zip(answers, pictures, strict=True) if own == place]
            verdicts[row].terms["blip"] = multiply_answers(given)
            verdicts[row].details["phrases"] = [
                {"phrase": phrase, "yes": round(p, DECIMALS)}
                for phrase, p in zip(plans[row].phrases, given, strict=True)
            ]

    def _compare_with_texts(
        self, images: Tensor, plans: Sequence[Plan], verdicts: Sequence[Verdict]
    ) -> None:
        rows = _rows_with("clip", plans)
        if not rows:
            return
        texts = self._clip.text_features([plans[row].text for row in rows], self._kept)
        pictures = self._clip.picture_features(self._clip.crop_pictures(images[rows]))
        for row, cosine in zip(rows, (pictures * texts).sum(-1).tolist(), strict=True):
            verdicts[row].terms["clip"] = cosine

    def _look_for_things(
        self, images: Tensor, plans: Sequence[Plan], verdicts: Sequence[Verdict]
    ) -> None:
        rows = []
        for row, plan in enumerate(plans):
            if plan.nouns and not plan.failure:
                rows.append(row)
            elif "spatial" in plan.terms:
                verdicts[row].terms["spatial"] = 0.0  # no two things in a complex prompt
        if not rows:
            return
        size = detector_size(images.shape[-2], images.shape[-1])
        nouns = [plans[row].nouns for row in rows]
        answers = self._member("detector")(images[rows], nouns, size, self.threshold)
        near = self._estimate_depth(images, plans, size)
        for row, found in zip(rows, answers, strict=True):
            if found is None:
                verdicts[row].failure = "the detector's scores are NaN; try dtype: float32"
                continue
            [term] = BY_DETECTOR & set(plans[row].terms)
            verdicts[row].terms[term] = self._judge(term, plans[row], found, near.get(row))
            verdicts[row].details["objects"] = _describe(found, size, images)

    def _estimate_depth(
        self, images: Tensor, plans: Sequence[Plan], size: tuple[int, int]
    ) -> dict[int, Tensor]:
        """By row, how near each pixel is, [*size]."""
        rows = _rows_with("3d_spatial", plans)
        if not rows:
            return {}
        return dict(zip(rows, self._member("depth")(images[rows], size), strict=True))

    def _judge(self, term: str, plan: Plan, found: FoundByNoun, near: Tensor | None) -> float:
        if term == "numeracy":
            return judge_counts(found, plan.counts)
        assert plan.relation is not None
        if near is None:
            return judge_relation(found, plan.relation, reference_faults=self.reference_faults)
        if near.isnan().any():
            return math.nan
        return judge_depth(found, plan.relation, near, reference_faults=self.reference_faults)


def _rows_with(term: str, plans: Sequence[Plan]) -> list[int]:
    return [row for row, plan in enumerate(plans) if term in plan.terms and not plan.failure]


def _describe(found: FoundByNoun, size: tuple[int, int], images: Tensor) -> list[dict[str, Any]]:
    """Boxes of a picture of `size` in the pixels of the original one, surest first."""
    down, right = (images.shape[-2 + k] / size[k] for k in (0, 1))
    factors = (right, down, right, down)
    items = sorted((item for boxes in found.values() for item in boxes), key=lambda i: -i.score)
    return [
        {
            "label": item.label,
            "score": item.score,
            "box": [side * factor for side, factor in zip(item.box, factors, strict=True)],
        }
        for item in items
    ]
