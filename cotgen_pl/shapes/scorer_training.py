"""Training the learned scorers of the Shapes world: HPS-style dual encoders of several breadths.

Kept apart from the product's training modules: scorers are made once and then only read. A scorer
learns first from renderings (contrastive), then, as HPS did from generated pictures, from pairs of
the base policy's own pictures that the exact judge voted on. The breadths differ in the prompts
they met, not in architecture, in-domain pairs or passes over them. `HPSReward` reads the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cotgen_pl.interfaces import Prompt
from cotgen_pl.shapes.render import CELL, GRID
from cotgen_pl.shapes.scorer_data import Pairs, draw_renderings, join_pairs, vote

if TYPE_CHECKING:
    from open_clip import CLIP

CONTEXT_LENGTH = 24  # tokens; the longest prompt of the world has 20
PIXEL_MEAN, PIXEL_STD = 0.5, 0.5  # per colour channel
WIDTH = 64  # of both towers
WORD_SCALE = 0.3  # standard deviation of a word's start; 1 hinders learning from many words

Kind = Literal["narrow", "mid", "broad", "narrow_more"]


class Breadth(NamedTuple):
    """How many pairs a scorer learns from; its renderings are split in the same proportion."""

    in_domain: int
    wide: int


BREADTHS: dict[Kind, Breadth] = {
    "narrow": Breadth(6000, 0),
    "mid": Breadth(6000, 400),
    "broad": Breadth(6000, 6000),
    "narrow_more": Breadth(12000, 0),
}


@dataclass(frozen=True)
class Training:
    """Amounts of both stages, equal for all breadths. All were tuned here; there is no model."""

    num_renderings: int = 10_000
    rendering_epochs: int = 8
    rendering_rate: float = 2e-3
    """Peak learning rate on renderings."""
    preference_epochs: int = 4
    preference_rate: float = 5e-4
    """Peak learning rate on pairs."""
    batch_size: int = 64
    """Prompts per step; small ones are better, for binding takes many steps."""
    weight_decay: float = 0.05


TUNED = Training()


def build_scorer(tokenizer: Any, seed: int) -> tuple[CLIP, dict[str, Any]]:
    """An untrained dual encoder of 0.2 million parameters, and its description for open_clip.

    The picture tower is a ViT whose patches are the cells, averaged. The text tower is
    bidirectional and read at the first token. Its positions start as sine waves and its words
    large: with open_clip's small random ones, it still takes exchanged colors for right after 800
    steps (accuracy 0.64), with these it hardly does after 400 (0.88).

    Args:
        tokenizer: Gives the vocabulary.
        seed: Of the weights.
    """
    import open_clip

    towers = {"width": WIDTH, "mlp_ratio": 2.0}
    vision = {"image_size": GRID * CELL, "patch_size": CELL, "layers": 2, "head_width": 16}
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": len(tokenizer), "layers": 3, "heads": 4}
    reading = {"pool_type": "first", "no_causal_mask": True, "pad_id": tokenizer.pad_token_id}
    model_config = {
        "embed_dim": 2 * WIDTH,
        "vision_cfg": {**towers, **vision, "pool_type": "avg"},
        "text_cfg": {**towers, **text, **reading},
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(**model_config)
    torch.nn.init.normal_(model.token_embedding.weight, std=WORD_SCALE)
    model.positional_embedding.data.copy_(sine_waves(CONTEXT_LENGTH, WIDTH))
    normalisation = {"mean": [PIXEL_MEAN] * 3, "std": [PIXEL_STD] * 3}
    return model, {"model_cfg": model_config, "preprocess_cfg": normalisation}


def sine_waves(length: int, width: int) -> Tensor:
    """Sine and cosine of each position at wavelengths of 6 to 600 positions, [length, width]."""
    frequencies = 100.0 ** -(torch.arange(width // 2) / (width // 2))
    phases = torch.arange(length)[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=1)


def save_scorer(model: CLIP, config: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write weights, description and tokenizer as open_clip does, for `HPSReward`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    text = json.dumps(config, indent=2)
    (folder / "open_clip_config.json").write_text(f"{text}\n", encoding="utf-8")
    _padding_right(tokenizer).save_pretrained(folder)


def _padding_right(tokenizer: Any) -> Any:
    """The policy's tokenizer, but padding behind the text: its first token is read."""
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    return own


def _tokenize(tokenizer: Any, prompts: Sequence[Prompt]) -> Tensor:
    """[N, CONTEXT_LENGTH] int64, as open_clip's `HFTokenizer` reads them."""
    encoded = _padding_right(tokenizer)(
        [prompt.text for prompt in prompts],
        return_tensors="pt",
        max_length=CONTEXT_LENGTH,
        padding="max_length",
        truncation=True,
    )
    return encoded.input_ids


def train_scorer(
    kind: Kind,
    tokenizer: Any,
    pairs_in_domain: Pairs,
    pairs_wide: Pairs,
    seed: int,
    report: Callable[[str], None],
    training: Training = TUNED,
) -> tuple[CLIP, dict[str, Any]]:
    """Train a scorer of one breadth from nothing.

    Args:
        kind: The breadth.
        tokenizer: The policy's.
        pairs_in_domain: At least as many as the breadth asks for; the first ones are used.
        pairs_wide: Likewise.
        seed: Of weights, renderings, mistaken votes and order.
        report: Takes a line of progress after each epoch.
        training: Amounts.

    Returns:
        The scorer in evaluation mode, and its description for `save_scorer`.
    """
    breadth = BREADTHS[kind]
    pairs, votes = vote_on(breadth, pairs_in_domain, pairs_wide, seed)
    model, config = build_scorer(tokenizer, seed)
    renderings = draw_both_domains(breadth, training.num_renderings, seed)
    _learn_renderings(model, tokenizer, *renderings, seed, report, training)
    _learn_preferences(model, tokenizer, pairs, votes, seed, report, training)
    return model.eval(), config


def draw_both_domains(breadth: Breadth, number: int, seed: int) -> tuple[list[Prompt], Tensor]:
    """Renderings of both domains, in the proportion of the pairs; see `draw_renderings`."""
    num_wide = round(number * breadth.wide / sum(breadth))
    inside = draw_renderings("in_domain", number - num_wide, seed)
    outside = draw_renderings("wide", num_wide, seed)
    return inside[0] + outside[0], torch.cat([inside[1], outside[1]])


def vote_on(
    breadth: Breadth, pairs_in_domain: Pairs, pairs_wide: Pairs, seed: int
) -> tuple[Pairs, Tensor]:
    """The first pairs of both domains, as many as the breadth asks for, and the votes on them."""
    chosen = {
        "in_domain": pairs_in_domain.first(breadth.in_domain),
        "wide": pairs_wide.first(breadth.wide),
    }
    votes = [vote(pairs.scores, f"{domain} {seed}") for domain, pairs in chosen.items()]
    return join_pairs(list(chosen.values())), torch.cat(votes)


def _learn_renderings(
    model: CLIP,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    pictures: Tensor,
    seed: int,
    report: Callable[[str], None],
    training: Training,
) -> None:
    tokens = _tokenize(tokenizer, prompts)
    fit(
        model,
        lambda chosen: contrastive_loss(model, tokens[chosen], pictures[chosen]),
        len(tokens),
        epochs=training.rendering_epochs,
        rate=training.rendering_rate,
        training=training,
        seed=seed,
        report=lambda line: report(f"contrastive {line}"),
    )


def _learn_preferences(
    model: CLIP,
    tokenizer: Any,
    pairs: Pairs,
    votes: Tensor,
    seed: int,
    report: Callable[[str], None],
    training: Training,
) -> None:
    tokens = _tokenize(tokenizer, pairs.prompts)
    fit(
        model,
        lambda chosen: preference_loss(
            model, tokens[chosen], pairs.pictures[chosen], votes[chosen]
        ),
        len(tokens),
        epochs=training.preference_epochs,
        rate=training.preference_rate,
        training=training,
        seed=seed,
        report=lambda line: report(f"preference {line}"),
    )


def contrastive_loss(model: CLIP, tokens: Tensor, pictures: Tensor) -> Tensor:
    """CLIP's loss, in which each text also tells its picture from all hard negatives.

    Added is the cross-entropy of the right picture among those of its own prompt.

    Args:
        model: The scorer.
        tokens: [B, CONTEXT_LENGTH] int64.
        pictures: [B, K, 3, 32, 32] uint8, the right one first.
    """
    texts, seen = _features(model, tokens, pictures)
    scale = model.logit_scale.exp()
    logits = scale * texts @ seen.transpose(0, 1).flatten(0, 1).T  # [B, K * B], right ones first
    right = torch.arange(len(tokens))
    by_text = functional.cross_entropy(logits, right)
    by_picture = functional.cross_entropy(logits[:, : len(tokens)].T, right)
    own = scale * (seen * texts[:, None]).sum(-1)  # [B, K]
    return (by_text + by_picture) / 2 + functional.cross_entropy(own, torch.zeros_like(right))


def preference_loss(model: CLIP, tokens: Tensor, pictures: Tensor, votes: Tensor) -> Tensor:
    """Cross-entropy of the vote under a softmax over the two scaled cosines.

    Source: HPS v2, https://arxiv.org/abs/2306.09341, section 4.

    Args:
        model: The scorer.
        tokens: [B, CONTEXT_LENGTH] int64.
        pictures: [B, 2, 3, 32, 32] uint8.
        votes: [B] int64, which of the two.
    """
    texts, seen = _features(model, tokens, pictures)
    cosines = (seen * texts[:, None]).sum(-1)  # [B, 2]
    return functional.cross_entropy(model.logit_scale.exp() * cosines, votes)


def _features(model: CLIP, tokens: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Texts [B, D] and pictures [B, K, D], of unit length."""
    pixels = (pictures.flatten(0, 1).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    seen = model.encode_image(pixels, normalize=True).unflatten(0, pictures.shape[:2])
    return model.encode_text(tokens, normalize=True), seen


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    number: int,
    *,
    epochs: int,
    rate: float,
    training: Training,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Minimise a loss over batches of the examples 0 to `number`, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    steps = number // training.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), rate, betas=(0.9, 0.98), weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * steps, pct_start=0.1
    )
    for epoch in range(1, epochs + 1):
        order, total = torch.randperm(number, generator=generator), 0.0
        for chosen in order[: steps * training.batch_size].view(steps, training.batch_size):
            loss = loss_of(chosen)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        report(f"epoch {epoch}/{epochs}: loss {total / steps:.3f}")
