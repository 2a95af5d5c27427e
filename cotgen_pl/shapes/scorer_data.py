"""What the Shapes world's learned scorers learn from and are measured on.

Renderings, and pairs of the base policy's own pictures that the exact judge voted on; the prompts
of both are drawn from a scorer's own domain and are never those of an evaluation suite.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.shapes.grammar import A_WORDS, ALL_WORDS, draw_prompt, suites
from cotgen_pl.shapes.judge import graded, judge, strict
from cotgen_pl.shapes.recognise import Recognition, recognise
from cotgen_pl.shapes.render import CELL, GRID, Placed, render
from cotgen_pl.shapes.scenes import compose, spoil

PROMPTS_FILE, PAIRS_FILE = "prompts.jsonl", "pairs.safetensors"
FLIPPED_VOTES = 0.1  # share of pairs whose vote goes to the worse picture

Domain = Literal["in_domain", "wide"]
PictureSource = Callable[[list[Prompt]], Tensor]
"""Draws two pictures for each of P prompts: [2 * P, 3, 32, 32] in [0, 1], those of a prompt side by
side."""


@dataclass
class Pairs:
    """N prompts with two pictures each, none of them equal in the eyes of the exact judge."""

    prompts: list[Prompt]
    pictures: Tensor
    """[N, 2, 3, 32, 32] uint8."""
    scores: Tensor
    """[N, 2] float32, the exact judge's graded scores."""

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def read(cls, folder: Path) -> Pairs:
        """What `write` wrote."""
        lines = (folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()
        return cls([Prompt(**json.loads(line)) for line in lines], **load_file(folder / PAIRS_FILE))

    def write(self, folder: Path) -> None:
        """Write them to a new folder: prompts as JSON lines, pictures and scores as tensors."""
        folder.mkdir(parents=True)
        lines = [json.dumps(asdict(prompt)) + "\n" for prompt in self.prompts]
        (folder / PROMPTS_FILE).write_text("".join(lines), encoding="utf-8")
        save_file({"pictures": self.pictures, "scores": self.scores}, folder / PAIRS_FILE)

    def first(self, number: int) -> Pairs:
        """The first `number` pairs, or a ValueError where there are fewer."""
        if number > len(self):
            raise ValueError(
                f"expected at least {number} pairs, got {len(self)}; collect that many"
            )
        return Pairs(self.prompts[:number], self.pictures[:number], self.scores[:number])


@cache
def evaluation_texts() -> frozenset[str]:
    """The texts of every suite but the training prompts and their probe."""
    kept = {
        name: prompts for name, prompts in suites().items() if name not in ("train", "id_probe")
    }
    return frozenset(prompt.text for prompts in kept.values() for prompt in prompts)


def draw_prompts(domain: Domain, seed: int | str) -> Iterator[Prompt]:
    """Endless prompts of a domain, numbered from 0, without those of the evaluation suites.

    Args:
        domain: `in_domain` has the wording, words and pairs of the RL prompts, `wide` has all.
        seed: Of the draws.
    """
    rng = random.Random(f"scorer prompts {domain} {seed}")
    number = 0
    while True:
        if domain == "in_domain":
            prompt = draw_prompt(rng, wording="in_domain", words="A", pairs="seen")
        else:
            prompt = draw_prompt(rng, wording="both", words="all", pairs="all")
        if prompt.text not in evaluation_texts():
            yield replace(prompt, index=number)
            number += 1


def collect_pairs(
    draw_pictures: PictureSource,
    prompts: Iterable[Prompt],
    number: int,
    report: Callable[[str], None],
    batch_size: int = 250,
) -> Pairs:
    """Let a policy draw each prompt twice, judge both pictures exactly and drop the ties.

    Args:
        draw_pictures: The policy.
        prompts: Drawn until `number` pairs are not tied.
        number: N.
        report: Takes a line on the share of ties and the mean score.
        batch_size: Prompts drawn at once.
    """
    source, num_drawn, total = iter(prompts), 0, 0.0
    kept: list[Pairs] = []
    while sum(map(len, kept)) < number:
        batch = list(islice(source, batch_size))
        if not batch:
            raise ValueError(f"the prompts ended before {number} pairs were untied; give more")
        part = judge_pairs(batch, draw_pictures(batch))
        untied = part.scores[:, 0] != part.scores[:, 1]
        chosen = untied.nonzero()[:, 0].tolist()
        kept.append(Pairs([batch[i] for i in chosen], part.pictures[untied], part.scores[untied]))
        num_drawn += len(batch)
        total += part.scores.mean(1).sum().item()
    pairs = join_pairs(kept)
    report(
        f"{len(pairs)} pairs of {num_drawn} prompts, the rest tied; "
        f"mean graded score {total / num_drawn:.3f}"
    )
    return pairs.first(number)


def judge_pairs(prompts: list[Prompt], pictures: Tensor) -> Pairs:
    """Pairs with the exact judge's scores, ties included.

    Args:
        prompts: P prompts.
        pictures: [2 * P, 3, 32, 32] in [0, 1], those of a prompt side by side.
    """
    found = recognise(pictures)
    scores = [
        graded(judge(prompts[i // 2].facts, recognition)) for i, recognition in enumerate(found)
    ]
    return Pairs(
        prompts, as_bytes(pictures).unflatten(0, (-1, 2)), torch.tensor(scores).view(-1, 2)
    )


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, in order."""
    return Pairs(
        [prompt for part in parts for prompt in part.prompts],
        torch.cat([part.pictures for part in parts]),
        torch.cat([part.scores for part in parts]),
    )


def vote(scores: Tensor, seed: int | str) -> Tensor:
    """Which picture of each pair is preferred, [N] of 0 or 1: the better one, or by mistake not.

    Args:
        scores: [N, 2], untied.
        seed: Of the mistakes; those of the first pairs do not depend on how many follow.
    """
    rng = random.Random(f"scorer votes {seed}")
    mistakes = torch.tensor([rng.random() < FLIPPED_VOTES for _ in scores])
    return scores.argmax(1) ^ mistakes.long()


def pair_accuracy(reward: Reward, pairs: Pairs) -> float:
    """Share of pairs that a reward orders as the exact judge does; equal scores count a half."""
    pictures = pairs.pictures.flatten(0, 1).float() / 255
    prompts = [prompt for prompt in pairs.prompts for _ in range(2)]
    scores = reward.score(pictures, prompts).total.view(-1, 2)
    right = (scores[:, 0] - scores[:, 1]).sign() * (pairs.scores[:, 0] - pairs.scores[:, 1]).sign()
    return ((right + 1) / 2).mean().item()


def draw_renderings(domain: Domain, number: int, seed: int) -> tuple[list[Prompt], Tensor]:
    """Prompts of a domain, each with a right picture and two hard negatives.

    The negatives stay within the domain's words, or a narrow scorer would know all objects by
    sight. One is spoiled; in the other the attributes of two objects are exchanged, without which
    the scorer takes texts for bags of words for a long time.

    Returns:
        N prompts, and pictures [N, 3, 3, 32, 32] uint8, the right one first.
    """
    rng = random.Random(f"scorer renderings {domain} {seed}")
    prompts = list(islice(draw_prompts(domain, f"renderings {seed}"), number))
    pictures = []
    for prompt in prompts:
        scene = compose(prompt, rng)
        spoiled = spoil_within(domain, prompt, scene, rng)
        scenes = (scene, spoiled, exchange(prompt, scene, rng) or spoiled)
        pictures.append(torch.stack([render(objects) for objects in scenes]))
    if not pictures:
        return [], torch.empty(0, 3, 3, GRID * CELL, GRID * CELL, dtype=torch.uint8)
    return prompts, as_bytes(torch.stack(pictures))


def spoil_within(
    domain: Domain, prompt: Prompt, scene: list[Placed], rng: random.Random
) -> list[Placed]:
    """The scene with mistakes, but without objects that the domain has no words for."""
    words = A_WORDS if domain == "in_domain" else ALL_WORDS
    while True:
        spoiled = spoil(prompt, scene, rng)
        if all(o.shape in words.shapes and o.color in words.colors for o in spoiled):
            return spoiled


def exchange(prompt: Prompt, scene: list[Placed], rng: random.Random) -> list[Placed] | None:
    """The scene with the shapes, colors or textures of two objects exchanged so that it is wrong.

    Returns:
        The first such scene in random order, or None where every exchange leaves the prompt true.
    """
    choices = list(product(combinations(range(len(scene)), 2), ("shape", "color", "texture")))
    for (i, j), name in rng.sample(choices, len(choices)):
        exchanged = list(scene)
        for here, there in ((i, j), (j, i)):
            taken: dict[str, Any] = {name: getattr(scene[there], name)}
            exchanged[here] = replace(scene[here], **taken)
        if not strict(judge(prompt.facts, Recognition(exchanged))):
            return exchanged
    return None


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as they lie in a file, uint8."""
    return (pictures * 255).round().to(torch.uint8)
