"""mmdet 2.x's Mask2Former with a Swin backbone, GenEval's detector, to a folder for transformers.

The file is `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth` of
https://download.openmmlab.com/mmdetection/v2.0 (Apache-2.0). The file of the same training for
mmdet 3.x has other names and is refused.

Names are written in the layout that transformers 4 gave its models on the hub; version 5 renames it
when it loads. Two things differ beyond names: attention's query, key and value are one weight in
mmdet, and mmdet's patch merging reads the four pixels of a patch row by row and channel by channel,
transformers' column by column and pixel by pixel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cotgen_pl.conversion.keys import Conversion, KeyMap, rename_weights, renames_of
from cotgen_pl.weights import read_tensors

KIND = "mmdet 2.x's Mask2Former with a Swin backbone"
ENCODER, DECODER = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder"
QUERIES = "model.transformer_module"

# mmdet's prefix and transformers', then what follows them. query, key and value, and q, k and v,
# stand for the thirds of one weight, see THIRDS. Placeholders are those of keys.py.
NAMES = {
    ("backbone", ENCODER): (
        ("patch_embed.projection.{p}", "embeddings.patch_embeddings.projection.{p}"),
        ("patch_embed.norm.{p}", "embeddings.norm.{p}"),
        *((f"norm{i}.{{p}}", f"hidden_states_norms.stage{i + 1}.{{p}}") for i in range(4)),
    ),
    ("backbone.stages.{i}.downsample", f"{ENCODER}.encoder.layers.{{i}}.downsample"): (
        ("norm.{p}", "norm.{p}"),
        ("reduction.weight", "reduction.weight"),
    ),
    ("backbone.stages.{i}.blocks.{j}", f"{ENCODER}.encoder.layers.{{i}}.blocks.{{j}}"): (
        ("norm1.{p}", "layernorm_before.{p}"),
        ("norm2.{p}", "layernorm_after.{p}"),
        ("attn.w_msa.query.{p}", "attention.self.query.{p}"),
        ("attn.w_msa.key.{p}", "attention.self.key.{p}"),
        ("attn.w_msa.value.{p}", "attention.self.value.{p}"),
        ("attn.w_msa.proj.{p}", "attention.output.dense.{p}"),
        (
            "attn.w_msa.relative_position_bias_table",
            "attention.self.relative_position_bias_table",
        ),
        ("ffn.layers.0.0.{p}", "intermediate.dense.{p}"),
        ("ffn.layers.1.{p}", "output.dense.{p}"),
    ),
    ("panoptic_head.pixel_decoder", DECODER): (
        ("input_convs.{i}.conv.{p}", "input_projections.{i}.0.{p}"),
        ("input_convs.{i}.gn.{p}", "input_projections.{i}.1.{p}"),
        ("level_encoding.weight", "level_embed"),
        ("lateral_convs.0.conv.{p}", "adapter_1.0.{p}"),
        ("lateral_convs.0.gn.{p}", "adapter_1.1.{p}"),
        ("output_convs.0.conv.{p}", "layer_1.0.{p}"),
        ("output_convs.0.gn.{p}", "layer_1.1.{p}"),
        ("mask_feature.{p}", "mask_projection.{p}"),
    ),
    ("panoptic_head.pixel_decoder.encoder.layers.{i}", f"{DECODER}.encoder.layers.{{i}}"): (
        ("attentions.0.{rest}", "self_attn.{rest}"),
        ("ffns.0.layers.0.0.{p}", "fc1.{p}"),
        ("ffns.0.layers.1.{p}", "fc2.{p}"),
        ("norms.0.{p}", "self_attn_layer_norm.{p}"),
        ("norms.1.{p}", "final_layer_norm.{p}"),
    ),
    ("panoptic_head.transformer_decoder.layers.{i}", f"{QUERIES}.decoder.layers.{{i}}"): (
        ("attentions.0.attn.{rest}", "cross_attn.{rest}"),
        ("attentions.1.attn.q.{p}", "self_attn.q_proj.{p}"),
        ("attentions.1.attn.k.{p}", "self_attn.k_proj.{p}"),
        ("attentions.1.attn.v.{p}", "self_attn.v_proj.{p}"),
        ("attentions.1.attn.out_proj.{p}", "self_attn.out_proj.{p}"),
        ("ffns.0.layers.0.0.{p}", "fc1.{p}"),
        ("ffns.0.layers.1.{p}", "fc2.{p}"),
        ("norms.0.{p}", "cross_attn_layer_norm.{p}"),
        ("norms.1.{p}", "self_attn_layer_norm.{p}"),
        ("norms.2.{p}", "final_layer_norm.{p}"),
    ),
    ("panoptic_head", QUERIES): (
        ("transformer_decoder.post_norm.{p}", "decoder.layernorm.{p}"),
        ("query_embed.weight", "queries_embedder.weight"),
        ("query_feat.weight", "queries_features.weight"),
        ("level_embed.weight", "level_embed.weight"),
        *(
            (f"mask_embed.{2 * i}.{{p}}", f"decoder.mask_predictor.mask_embedder.{i}.0.{{p}}")
            for i in range(3)
        ),
    ),
    ("panoptic_head.cls_embed", "class_predictor"): (("{p}", "{p}"),),
}
DROPPED = (r".*\.relative_position_index",)  # transformers computes it
THIRDS = {
    r"(.*\.attn\.w_msa)\.qkv\.(weight|bias)": (r"\1.query.\2", r"\1.key.\2", r"\1.value.\2"),
    r"(.*\.attentions\.1\.attn)\.in_proj_(weight|bias)": (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2"),
}
MERGING = re.compile(r"backbone\.stages\.\d+\.downsample\.(norm|reduction)\.(weight|bias)")

KEY_MAP = KeyMap(renames_of(NAMES), DROPPED)

NUM_HEADS = 8  # of both decoders, in the published configuration; no weight's shape tells it
OUTSIDE_THE_BODY = {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}


def convert(source: Path, target: Path) -> Conversion:
    """Write a folder that transformers' `Mask2FormerForUniversalSegmentation` loads.

    Args:
        source: mmdet's file.
        target: An existing, empty folder.
    """
    original = read_tensors(source)
    weights, dropped = rename_weights(_prepare(original), KEY_MAP, source, KIND)
    config = build_config(weights, source)
    config.save_pretrained(target)
    weights |= unused_weights(config)
    save_file(
        {name: values.contiguous().clone() for name, values in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    check_loading(target, source)
    return Conversion(source, target, len(original), len(weights), dropped)


def unused_weights(config: Any) -> dict[str, Tensor]:
    """What the class has beyond mmdet, and detection does not use, as transformers begins it.

    A norm behind the backbone's last stage and the training loss's weights of the classes. Without
    them the folder would load with a warning that its weights are not all there.
    """
    width = config.backbone_config.hidden_size
    classes = torch.ones(config.num_labels + 1)
    classes[-1] = config.no_object_weight
    return {
        f"{ENCODER}.swin.layernorm.weight": torch.ones(width),
        f"{ENCODER}.swin.layernorm.bias": torch.zeros(width),
        "criterion.empty_weight": classes,
    }


def _prepare(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut and order weights as transformers does, still under mmdet's names."""
    prepared: dict[str, Tensor] = {}
    for name, values in original.items():
        for pattern, thirds in THIRDS.items():
            match = re.fullmatch(pattern, name)
            if match:
                names = [match.expand(third) for third in thirds]
                prepared.update(zip(names, values.chunk(3), strict=True))
                break
        else:
            prepared[name] = reorder_merging(values) if MERGING.fullmatch(name) else values
    return prepared


def reorder_merging(values: Tensor) -> Tensor:
    """A weight over merged patches in transformers' order.

    Args:
        values: [..., 4C], for each channel the pixels (row, column) 00, 01, 10, 11.

    Returns:
        [..., 4C], for each of the pixels 00, 10, 01, 11 the channels.
    """
    by_pixel = values.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]]  # [..., C, 4]
    return by_pixel.transpose(-1, -2).flatten(-2)


def build_config(weights: Mapping[str, Tensor], source: Path) -> Any:
    """The configuration, its sizes read off the weights (named as in transformers 4).

    Args:
        weights: Renamed.
        source: mmdet's file, for messages.
    """
    from transformers import Mask2FormerConfig

    shapes = {name: tuple(values.shape) for name, values in weights.items()}
    try:
        settings: dict[str, Any] = dict(
            backbone_config=_swin_config(shapes),
            feature_size=shapes[f"{DECODER}.input_projections.0.0.weight"][0],
            mask_feature_size=shapes[f"{DECODER}.mask_projection.weight"][0],
            hidden_dim=shapes[f"{QUERIES}.queries_features.weight"][1],
            encoder_layers=_count(shapes, f"{DECODER}.encoder.layers."),
            encoder_feedforward_dim=shapes[f"{DECODER}.encoder.layers.0.fc1.weight"][0],
            decoder_layers=_count(shapes, f"{QUERIES}.decoder.layers.") + 1,  # counts the input's
            dim_feedforward=shapes[f"{QUERIES}.decoder.layers.0.fc1.weight"][0],
            num_attention_heads=NUM_HEADS,
            num_queries=shapes[f"{QUERIES}.queries_features.weight"][0],
            num_labels=shapes["class_predictor.weight"][0] - 1,  # the last is "no object"
            architectures=["Mask2FormerForUniversalSegmentation"],
        )
        return Mask2FormerConfig(**settings)
    except KeyError as error:
        raise ValueError(
            f"{source}: expected the weights of {KIND}, got none that become {error.args[0]}; the "
            "file is incomplete or of another model"
        ) from error


def _swin_config(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    from transformers import SwinConfig

    layers = f"{ENCODER}.encoder.layers."
    table = "blocks.0.attention.self.relative_position_bias_table"
    stages = range(_count(shapes, layers))
    tables = [shapes[f"{layers}{i}.{table}"] for i in stages]  # [(2 window - 1)^2, heads]
    width, _, patch, _ = shapes[f"{ENCODER}.embeddings.patch_embeddings.projection.weight"]
    settings: dict[str, Any] = dict(
        embed_dim=width,
        patch_size=patch,
        depths=[_count(shapes, f"{layers}{i}.blocks.") for i in stages],
        num_heads=[heads for _, heads in tables],
        window_size=(isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shapes[f"{layers}0.blocks.0.intermediate.dense.weight"][0] / width,
        out_features=[f"stage{i + 1}" for i in stages],
    )
    return SwinConfig(**settings)


def _count(names: Iterable[str], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def check_loading(folder: Path, source: Path) -> None:
    """Raise a ValueError unless transformers finds each weight of the model in a folder.

    The body is loaded, not the whole class: that wants scipy, for its training loss.

    Args:
        folder: The converted one.
        source: What it was made from, for messages.
    """
    from transformers import Mask2FormerModel, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would warn of what is checked here
    try:
        loaded: Any = Mask2FormerModel.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
        )
    finally:
        logging.set_verbosity(verbosity)
    _, report = loaded
    misfits = {
        "missing": report["missing_keys"],
        "unknown": set(report["unexpected_keys"]) - OUTSIDE_THE_BODY,
        "of another shape": [str(name) for name, *_ in report["mismatched_keys"]],
    }
    found = [f"{len(v)} {kind} (first: {min(v)})" for kind, v in misfits.items() if v]
    if found:
        raise ValueError(
            f"{source}: expected every weight of {KIND} and no other, got {', '.join(found)}; the "
            "file is incomplete or its architecture is another one"
        )
