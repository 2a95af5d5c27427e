"""Janus's own checkpoints to transformers' folders and back, without loss.

The original layout is that of `MultiModalityCausalLM` of https://github.com/deepseek-ai/Janus
(revision 1daa72f), in which Janus, Janus-Pro, T2I-R1 and ReasonGen-R1 are published. What differs
from transformers' `JanusForConditionalGeneration` beside names:

* the vision tower keeps query, key and value in one weight, and positions with an axis more;
* it has an attention pool (`attn_pool`) and its quantiser a usage counter (`codebook_used`) that
  neither side reads when it draws or looks at pictures; transformers has no place for them.

What transformers has no place for goes into the folder `original` inside the result, with the
original's small files, and comes back from there.

What is certain: names and shapes on transformers' side are checked against its class in each
conversion. Those of the original were written down from knowledge of its code and have not been
compared with a published file, so a name that is not among them is refused. The attention pool is
supported by a size: with its 12.6 M parameters, not without, Janus-Pro-7B has its 14.84 GB.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cotgen_pl.checkpoints import read_config
from cotgen_pl.conversion.janus_settings import (
    EXTRAS,
    build_config,
    copy_settings,
    find_original,
    read_settings,
    save_processor,
)
from cotgen_pl.conversion.keys import Conversion, KeyMap, check_coverage, rename_weights, renames_of
from cotgen_pl.conversion.shards import (
    Planned,
    Shards,
    has_weights,
    joined,
    part,
    same,
    write_shards,
)

KIND = "a Janus in the original layout (MultiModalityCausalLM)"
CONVERTED = "a Janus in transformers' format"

# The original's prefix and transformers', then what follows them. `q`, `k` and `v` of the vision
# tower stand for the thirds of its `qkv`. Placeholders are those of keys.py.
NAMES = {
    ("vision_model.vision_tower", "model.vision_model"): (
        ("patch_embed.proj.{p}", "embeddings.patch_embedding.{p}"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("blocks.{i}.norm1.{p}", "encoder.layers.{i}.layer_norm1.{p}"),
        ("blocks.{i}.norm2.{p}", "encoder.layers.{i}.layer_norm2.{p}"),
        ("blocks.{i}.attn.q.{p}", "encoder.layers.{i}.self_attn.q_proj.{p}"),
        ("blocks.{i}.attn.k.{p}", "encoder.layers.{i}.self_attn.k_proj.{p}"),
        ("blocks.{i}.attn.v.{p}", "encoder.layers.{i}.self_attn.v_proj.{p}"),
        ("blocks.{i}.attn.proj.{p}", "encoder.layers.{i}.self_attn.projection_layer.{p}"),
        ("blocks.{i}.mlp.fc1.{p}", "encoder.layers.{i}.mlp.fc1.{p}"),
        ("blocks.{i}.mlp.fc2.{p}", "encoder.layers.{i}.mlp.fc2.{p}"),
        ("norm.{p}", "post_layernorm.{p}"),
    ),
    ("aligner", "model.aligner"): (
        ("layers.0.{p}", "fc1.{p}"),
        ("layers.2.{p}", "hidden_layers.0.{p}"),
    ),
    ("gen_vision_model", "model.vqmodel"): (
        ("{side}.conv_in.{p}", "{side}.conv_in.{p}"),
        ("encoder.conv_blocks.{i}.res.{rest}", "encoder.down.{i}.block.{rest}"),
        ("encoder.conv_blocks.{i}.attn.{rest}", "encoder.down.{i}.attn.{rest}"),
        ("encoder.conv_blocks.{i}.downsample.{rest}", "encoder.down.{i}.downsample.{rest}"),
        # Both sides count the decoder's levels from the coarsest.
        ("decoder.conv_blocks.{i}.res.{rest}", "decoder.up.{i}.block.{rest}"),
        ("decoder.conv_blocks.{i}.attn.{rest}", "decoder.up.{i}.attn.{rest}"),
        ("decoder.conv_blocks.{i}.upsample.{rest}", "decoder.up.{i}.upsample.{rest}"),
        ("{side}.mid.0.{rest}", "{side}.mid.block_1.{rest}"),
        ("{side}.mid.1.{rest}", "{side}.mid.attn_1.{rest}"),
        ("{side}.mid.2.{rest}", "{side}.mid.block_2.{rest}"),
        ("{side}.norm_out.{p}", "{side}.norm_out.{p}"),
        ("{side}.conv_out.{p}", "{side}.conv_out.{p}"),
        ("quantize.embedding.weight", "quantize.embedding.weight"),
        ("quant_conv.{p}", "quant_conv.{p}"),
        ("post_quant_conv.{p}", "post_quant_conv.{p}"),
    ),
    ("gen_embed", "model.generation_embeddings"): (("weight", "weight"),),
    ("gen_aligner", "model.generation_aligner"): (
        ("layers.0.{p}", "fc1.{p}"),
        ("layers.2.{p}", "hidden_layers.0.{p}"),
    ),
    ("gen_head", "model.generation_head"): (
        ("output_mlp_projector.{p}", "proj_out.{p}"),
        ("vision_head.{p}", "vision_head.{p}"),
    ),
    ("language_model.model", "model.language_model"): (("{rest}", "{rest}"),),
    ("language_model.lm_head", "lm_head"): (("weight", "weight"),),
}
# Without a place in transformers.
DROPPED = (
    r"vision_model\.vision_tower\.attn_pool\..+",
    r"gen_vision_model\.quantize\.codebook_used",
    r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # older Llamas' files
)
MERGED = re.compile(r"(vision_model\.vision_tower\.blocks\.\d+\.attn)\.qkv\.(weight|bias)")
THIRD = re.compile(r"(vision_model\.vision_tower\.blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
POSITIONS = "vision_model.vision_tower.pos_embed"  # [1, N, D], transformers' [N, D]


FORWARD, BACKWARD = KeyMap(renames_of(NAMES), DROPPED), KeyMap(renames_of(NAMES, back=True))


def convert(source: Path, target: Path, template: Literal["janus", "janus_pro"]) -> Conversion:
    """Write transformers' folder of an original checkpoint.

    Args:
        source: A folder with config.json, the tokenizer's and processor's files, and the weights.
        target: An empty folder.
        template: The form of prompts that the weights were trained with, which no file of the
            original tells: "janus_pro" for Janus-Pro, "janus" for Janus-1.3B (and T2I-R1, which
            trained Janus-Pro with the older roles).
    """
    settings = read_settings(source)
    shards = Shards(source, KIND)
    plan, dropped = plan_forward(shards)
    outlines = {planned.name: planned.outline() for planned in plan}
    config = build_config(settings, outlines, source)
    check_coverage(_empty_model(config), outlines, source)
    save_processor(config, template, source, target)
    write_shards(target, plan)
    copy_settings(source, target / EXTRAS)
    if dropped:
        write_shards(target / EXTRAS, [Planned(n, shards, (n,), same) for n in dropped])
    return Conversion(source, target, len(shards.outlines), len(plan), dropped)


def convert_back(source: Path, target: Path, original: Path | None = None) -> Conversion:
    """Write the original layout of a folder in transformers' format.

    Args:
        source: A converted folder, or one that training exported.
        target: An empty folder.
        original: The original checkpoint that `source` descends from, for its small files and the
            weights without a place in transformers; absent means the copy inside `source`.
    """
    from transformers import JanusConfig

    config = read_config(str(source), JanusConfig, "deepseek-community/Janus-Pro-1B")
    kept = find_original(source, original, config)
    shards = Shards(source, CONVERTED)
    check_coverage(_empty_model(config), shards.outlines, source)
    plan = plan_backward(shards)
    num_read = len(plan)
    if has_weights(kept):
        extras = Shards(kept, KIND)
        plan += [Planned(n, extras, (n,), same) for n in extras.outlines if _is_dropped(n)]
    write_shards(target, plan)
    copy_settings(kept, target)
    return Conversion(source, target, len(shards.outlines) + len(plan) - num_read, len(plan))


def plan_forward(shards: Shards) -> tuple[list[Planned], list[str]]:
    """What becomes of the original's tensors, and the names of those without a place."""
    pieces = {piece: (name, make) for name in shards.outlines for piece, make in _pieces_of(name)}
    renamed, dropped = rename_weights(pieces, FORWARD, shards.folder, KIND)
    plan = [Planned(new, shards, (name,), make) for new, (name, make) in renamed.items()]
    return plan, dropped


def _pieces_of(name: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The parts of one of the original's tensors that transformers keeps apart, and their cuts."""
    merged = MERGED.fullmatch(name)
    if merged:
        for index, letter in enumerate("qkv"):
            yield f"{merged[1]}.{letter}.{merged[2]}", part(index, 3)
    else:
        yield name, _without_batch if name == POSITIONS else same


def _without_batch(positions: Tensor) -> Tensor:
    return positions.squeeze(0)  # [N, D]


def plan_backward(shards: Shards) -> list[Planned]:
    """The original's tensors out of transformers', but for those without a place there."""
    names = {name: name for name in shards.outlines}
    renamed, _ = rename_weights(names, BACKWARD, shards.folder, CONVERTED)
    plan = []
    for old, new in renamed.items():
        third = THIRD.fullmatch(old)
        if third is None:
            make = _with_batch if old == POSITIONS else same
            plan.append(Planned(old, shards, (new,), make))
        elif third[2] == "q":
            thirds = tuple(renamed[f"{third[1]}.{letter}.{third[3]}"] for letter in "qkv")
            plan.append(Planned(f"{third[1]}.qkv.{third[3]}", shards, thirds, joined))
    return plan


def _with_batch(positions: Tensor) -> Tensor:
    return positions.unsqueeze(0)  # [1, N, D]


def _is_dropped(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in DROPPED)


def _empty_model(config: Any) -> nn.Module:
    """A Janus of transformers, without values."""
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        model: nn.Module = JanusForConditionalGeneration(config)
    return model
