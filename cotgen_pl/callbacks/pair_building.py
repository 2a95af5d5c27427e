"""Drawing a preference pair set: a module's own pictures, scored, and chosen from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import cotgen_pl
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.prompts import PromptFile
from cotgen_pl.descriptions import describe
from cotgen_pl.interfaces import (
    Prompt,
    check_choice,
    check_positive,
    check_scores,
    check_share,
)
from cotgen_pl.modules.offline import OfflineModule
from cotgen_pl.pairs.selection import PairRule, select_pairs
from cotgen_pl.pairs.sets import Drawn, PairSet, PairSetWriter
from cotgen_pl.sampling import noise_seed
from cotgen_pl.scoring import ask


@dataclass
class PairSettings:
    """Which pairs a set takes, and how it is written."""

    rule: PairRule = "best_worst"
    """See `cotgen_pl.pairs.selection.select_pairs`."""
    margin: float = 0.0
    """Least difference of the two scores."""
    most_missing: float = 0.5
    """Largest share of a batch's images that may lack a verdict; above it, the run stops."""
    prompts_per_shard: int = 64
    """What an interruption discards at most, on each process."""
    images_per_batch: int = 256
    """Images drawn at a time, on each process."""

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, PairRule)
        if not self.margin >= 0:
            raise ValueError(f"expected margin of 0 or more, got {self.margin}; 0 takes all pairs")
        check_share(most_missing=self.most_missing)
        check_positive(
            prompts_per_shard=self.prompts_per_shard, images_per_batch=self.images_per_batch
        )


def build_pairs(
    module: OfflineModule,
    prompts: Sequence[Prompt],
    folder: Path,
    settings: PairSettings,
    *,
    files: Sequence[PromptFile],
    stream: str,
    counted: bool = True,
) -> PairSet:
    """Draw, score and write what is not there yet of a pair set, and open it.

    Args:
        module: Draws and scores, with its guidance, temperature, reward and group size.
        prompts: Of the whole set, over all processes.
        folder: Where the set lies; finished shards in it are kept.
        settings: Which pairs are taken.
        files: Where the prompts are from, for the record.
        stream: Kind of noise; another one for each round.
        counted: Whether the images count as drawn for training.
    """
    size, strategy = settings.prompts_per_shard, module.trainer.strategy
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    origin = _origin(module, prompts, settings, stream) | {"files": [asdict(f) for f in files]}
    writer = PairSetWriter(folder, len(shards), origin)
    own = range(module.global_rank, len(shards), module.trainer.world_size)
    images = sum(len(shards[shard]) for shard in own) * module.group_size
    hidden = not _shows_bar(module)
    with (
        module.gathered(),
        tqdm(total=images, desc=f"drawing {folder.name}", disable=hidden) as bar,
    ):
        for shard in own:
            if writer.is_finished(shard):
                bar.update(len(shards[shard]) * module.group_size)
            else:
                with module.own_random_state(stream, shard):
                    drawn = _draw(module, shards[shard], settings, stream, counted, bar.update)
                _write(module, writer, shard, drawn, settings, stream)
    strategy.barrier("pairs are drawn")
    if module.trainer.is_global_zero:
        writer.finish()
    strategy.barrier("pairs are written")
    return PairSet(folder)


def _origin(
    module: OfflineModule, prompts: Sequence[Prompt], settings: PairSettings, stream: str
) -> dict[str, Any]:
    """What a pair set says of how it was made; another origin may not go on with it."""
    return {
        "version": cotgen_pl.__version__,
        "policy": hash_weights(module.policy),
        "policy_source": module.policy.describe(),
        "codebook_size": module.policy.codebook_size,
        "num_tokens": module.policy.num_tokens,
        "reward": describe(module.reward),
        "prompts": {"number": len(prompts), "hash": f"{noise_seed(repr(prompts)):016x}"},
        "sampling": {
            "guidance": module.guidance,
            "temperature": module.temperature,
            "images_per_prompt": module.group_size,
            "seed": module.seed,
            "stream": stream,
        },
        "selection": asdict(settings),
    }


def _shows_bar(module: OfflineModule) -> bool:
    trainer = module.trainer
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


@torch.no_grad()
def _draw(
    module: OfflineModule,
    prompts: Sequence[Prompt],
    settings: PairSettings,
    stream: str,
    counted: bool,
    show: Callable[[int], Any],
) -> Drawn:
    """A shard's pictures with their scores, on the CPU."""
    assert module.reward is not None
    copies, parts = module.group_size, []
    size = max(1, settings.images_per_batch // copies)
    for start in range(0, len(prompts), size):
        part = list(prompts[start : start + size])
        tokens, _ = module.draw(part, copies, stream)
        images = module.policy.decode(tokens)
        scores = ask(module.reward, images, [p for p in part for _ in range(copies)])
        check_scores(scores, len(tokens), module.reward.name, most_missing=settings.most_missing)
        parts.append((tokens.cpu(), images.cpu(), scores.total.cpu()))
        if counted:
            module.count_drawn(len(tokens))
        show(len(tokens))
    tokens, images, totals = (torch.cat(values) for values in zip(*parts, strict=True))
    return Drawn(list(prompts), tokens, images, totals, module.noise_seeds(prompts, copies, stream))


def _write(
    module: OfflineModule,
    writer: PairSetWriter,
    shard: int,
    drawn: Drawn,
    settings: PairSettings,
    stream: str,
) -> None:
    """Choose a shard's pairs, ties by each prompt's own seed, and write them."""
    ties = [noise_seed(module.seed, stream, "ties", p.index, p.occurrence) for p in drawn.prompts]
    selection = select_pairs(
        drawn.scores, module.group_size, rule=settings.rule, margin=settings.margin, seeds=ties
    )
    writer.write(
        shard,
        drawn.pairs(selection.chosen, selection.rejected),
        num_prompts=len(drawn.prompts),
        num_images=len(drawn.tokens),
        dropped=selection.dropped,
    )
