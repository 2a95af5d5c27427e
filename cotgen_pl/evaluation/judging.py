"""A suite's pictures: drawn, each process its share, and judged by several rewards at once.

Apart from `callbacks/evaluation.py`, which says when this happens and what is made of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from cotgen_pl.evaluation.suites import OWN, JudgedSuite, Suite
from cotgen_pl.evaluation.verdicts import JudgedBatch, VerdictStore, as_plain
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.monitors import diversity
from cotgen_pl.pixels import to_pillow
from cotgen_pl.scoring import ask_each


@dataclass
class Gallery:
    """Keeps the first picture of some of a suite's prompts, as `<place in the suite>.png`."""

    folder: Path
    prompts: list[Prompt]

    def keep(self, prompts: Sequence[Prompt], images: Tensor) -> None:
        """Write those of P prompts that are wanted.

        Args:
            prompts: P.
            images: [P, 3, H, W] in [0, 1], the first of each.
        """
        wanted = {prompt.index for prompt in self.prompts}
        for prompt, picture in zip(prompts, to_pillow(images), strict=True):
            if prompt.index in wanted:
                path = self.folder / f"{prompt.index}.png"
                write_whole(path, partial(picture.save, format="PNG"))


def judge_suite(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    copies: int,
    batch_size: int,
    store: VerdictStore | None = None,
    gallery: Gallery | None = None,
) -> JudgedSuite:
    """Draw `copies` pictures of each prompt and ask each reward; each process has its share.

    Args:
        module: Whose policy draws.
        suite: What the prompts are of.
        prompts: P, numbered.
        rewards: The suite's own under `own`, and others.
        copies: G.
        batch_size: Images drawn at a time, on each process.
        store: Where verdicts are kept until the evaluation is finished. What is in it is not drawn
            again.
        gallery: Keeps some pictures.
    """
    done = _take_up(module, store) if store else []
    finished = {index for batch in done for index in batch.prompts}
    rest = [prompt for prompt in prompts if prompt.index not in finished]
    own = rest[module.global_rank :: module.trainer.world_size]
    batches = done if module.global_rank == 0 else []
    drawn = []
    with module.gathered(), _progress(module, suite, copies * len(own)) as bar:
        for part in _split(own, max(1, batch_size // copies)):
            drawn.append(_judge_batch(module, suite, part, rewards, copies, gallery))
            if store:
                store.append(drawn[-1])
            bar.update(len(part) * copies)
    pattern = [*drawn, *done][0]  # of parts; a process may have none left to draw
    judged = _join(module, suite, prompts, [*batches, *drawn], pattern)
    judged.names = {c: rewards[OWN].metric_name(c) for c in judged.categories}
    return judged


def _take_up(module: PolicyModule, store: VerdictStore) -> list[JudgedBatch]:
    """What an interrupted evaluation has left, on each process the same."""
    suite, done = store.variant["suite"], store.read()
    for path, differing in store.others().items():
        rank_zero_info(
            f"suite {suite}: {path} is of an unfinished evaluation with other "
            f"{', '.join(differing)}; this one begins anew, remove that file if you do not go on "
            "with that one"
        )
    number = sum(len(batch.prompts) for batch in done)
    if number:
        rank_zero_info(f"suite {suite}: {number} prompts were judged before an interruption")
    module.trainer.strategy.barrier("verdicts are read")
    return done


def _progress(module: PolicyModule, suite: Suite, images: int) -> Any:
    """A bar with time left, on the first process and where the trainer shows one too."""
    shows = module.trainer.progress_bar_callback is not None and module.global_rank == 0
    return tqdm(total=images, desc=f"suite {suite.name}", disable=not shows, leave=False)


def _judge_batch(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    copies: int,
    gallery: Gallery | None,
) -> JudgedBatch:
    """Draw and ask; rewards that draw have a random state that belongs to the batch."""
    tokens, _ = module.draw(prompts, copies, "evaluation")
    images = module.policy.decode(tokens)
    if gallery is not None:
        gallery.keep(prompts, images[::copies])
    with module.own_random_state("evaluation", suite.name, prompts[0].index):
        scores = ask_each(rewards, images, [p for p in prompts for _ in range(copies)])
    variety = (
        diversity(images, copies) if copies > 1 else images.new_full((len(prompts),), torch.nan)
    )
    verdicts = {
        name: {
            part: values.cpu().double().view(-1, copies)
            for part, values in {"total": given.total, **given.parts}.items()
        }
        for name, given in scores.items()
    }
    told, starts = scores[OWN].details, range(0, len(images), copies)
    details = None if told is None else [as_plain(told[at : at + copies]) for at in starts]
    indices = [prompt.index for prompt in prompts]
    return JudgedBatch(indices, verdicts, variety.cpu().double(), details)


def _split(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def _join(
    module: PolicyModule,
    suite: Suite,
    prompts: Sequence[Prompt],
    batches: Sequence[JudgedBatch],
    pattern: JudgedBatch,
) -> JudgedSuite:
    """The verdicts of all processes in the prompts' order, from the batches that each gives."""
    places = {prompt.index: row for row, prompt in enumerate(prompts)}
    rows = [places[index] for batch in batches for index in batch.prompts]

    def join(own: list[Tensor], like: Tensor) -> Tensor:
        whole = torch.zeros(len(prompts), *like.shape[1:], dtype=torch.float64)
        whole[rows] = torch.cat(own) if own else whole[rows]
        return module.sum_over_processes(whole).cpu()

    verdicts = {
        name: {
            part: join([batch.verdicts[name][part] for batch in batches], like)
            for part, like in parts.items()
        }
        for name, parts in pattern.verdicts.items()
    }
    variety = join([batch.diversity for batch in batches], pattern.diversity)
    return JudgedSuite(suite, list(prompts), verdicts, variety)
