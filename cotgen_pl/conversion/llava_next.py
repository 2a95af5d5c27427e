"""LLaVA-OneVision-Qwen2 in the format of LLaVA-NeXT's own code, to a folder for transformers.

UnifiedReward-7b and the fine-tuned ORMs are published in it
(https://github.com/LLaVA-VL/LLaVA-NeXT). The result has the names that transformers 4 wrote, which
every later version reads, and the original's types.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cotgen_pl.conversion.keys import Conversion, KeyMap, rename_weights
from cotgen_pl.conversion.shards import Planned, Shards, same, write_shards

KIND = "a LLaVA-OneVision-Qwen2 in LLaVA-NeXT's format"
TOWER = r"model\.vision_tower\.vision_tower\.vision_model\."
SIGLIP_LAYER = (
    r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|layer_norm[12]|mlp\.fc[12])"
    r"\.(?:weight|bias)"
)
SIGLIP_REST = (
    r"embeddings\.patch_embedding\.(?:weight|bias)|embeddings\.position_embedding\.weight"
    r"|post_layernorm\.(?:weight|bias)"
)
QWEN2 = (
    r"embed_tokens\.weight|norm\.weight|layers\.\d+\.(?:self_attn\.[qkv]_proj\.(?:weight|bias)"
    r"|self_attn\.o_proj\.weight|mlp\.(?:gate|up|down)_proj\.weight"
    r"|(?:input|post_attention)_layernorm\.weight)"
)
KEYS = KeyMap(
    renames=(
        (rf"{TOWER}({SIGLIP_LAYER}|{SIGLIP_REST})", r"vision_tower.vision_model.\1"),
        (r"model\.mm_projector\.0\.(weight|bias)", r"multi_modal_projector.linear_1.\1"),
        (r"model\.mm_projector\.2\.(weight|bias)", r"multi_modal_projector.linear_2.\1"),
        (r"model\.image_newline", "image_newline"),
        (rf"model\.({QWEN2})", r"language_model.model.\1"),
        (r"lm_head\.weight", "language_model.lm_head.weight"),
    ),
    # LLaVA-NeXT cuts both off when it builds the tower (siglip_encoder.py, load_model).
    dropped=(rf"{TOWER}encoder\.layers\.26\..+", rf"{TOWER}head\..+"),
)
WORDS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
VISION_MLP = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
VISION_LAYER = re.compile(
    r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"
)

# What neither config.json nor the weights tell of the one tower that these models have: defaults of
# SigLipVisionConfig in llava/model/multimodal_encoder/siglip_encoder.py.
SIGLIP_TOWER = "siglip-so400m-patch14-384"
SIGLIP = {
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
HALF = [0.5, 0.5, 0.5]  # SigLipImageProcessor's mean and deviation
NEEDED = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad"}
QWEN2_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)
QWEN2_OPTIONAL = (
    "hidden_act",
    "max_position_embeddings",
    "rope_scaling",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
IMAGE, VIDEO = "<image>", "<video>"
GENERATION = "generation_config.json"


def convert(source: Path, target: Path) -> Conversion:
    """Write a folder that transformers' LlavaOnevisionForConditionalGeneration loads.

    Args:
        source: A folder with config.json, the tokenizer's files, and safetensors or .bin weights.
        target: An existing, empty folder.

    Raises:
        ValueError: Another model's checkpoint, or an incomplete one.
    """
    shards = Shards(source, KIND)
    plan, dropped = plan_weights(shards)
    original = _read_original_config(source)
    _write_config(original, {planned.name: planned.outline() for planned in plan}, source, target)
    write_shards(target, plan)
    _check_loads(target, source)
    return Conversion(source, target, len(shards.outlines), len(plan), dropped)


def plan_weights(shards: Shards) -> tuple[list[Planned], list[str]]:
    """What the result's weights are made of, and the names that are left out on purpose."""
    names = {name: name for name in shards.outlines}
    renamed, dropped = rename_weights(names, KEYS, shards.folder, KIND)
    plan = [Planned(new, shards, (old,), same) for new, old in renamed.items()]
    if HEAD not in renamed and WORDS in renamed:  # the head shares the words' weights
        plan.append(Planned(HEAD, shards, (renamed[WORDS],), same))
    return plan, dropped


def _read_original_config(source: Path) -> dict[str, Any]:
    """config.json of LLaVA-NeXT's; a ValueError for what transformers' class cannot compute."""
    file = source / "config.json"
    if not file.is_file():
        raise ValueError(f"{source}: expected a config.json beside the weights, got none; add it")
    try:
        config: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected settings in JSON, got {error!r}; download it again"
        ) from error
    tower = Path(str(config.get("mm_vision_tower"))).name  # a hub id or the trainer's local path
    found = {**{key: config.get(key) for key in NEEDED}, "mm_vision_tower": tower}
    needed = {**NEEDED, "mm_vision_tower": SIGLIP_TOWER}
    if found != needed:
        raise ValueError(
            f"{file}: expected {needed}, got {found}; transformers' LLaVA-OneVision computes "
            "nothing else: name a checkpoint of that architecture"
        )
    absent = [key for key in QWEN2_NEEDED if key not in config]
    if absent:
        raise ValueError(f"{file}: expected a Qwen2's settings, got no {', '.join(absent)}; add it")
    _check_tiles(config, file)
    return config


def _check_tiles(config: dict[str, Any], file: Path) -> None:
    """Raise a ValueError unless config.json says how pictures are cut into tiles, as numbers."""
    ratio, points = config.get("image_aspect_ratio"), config.get("image_grid_pinpoints")
    if not re.fullmatch(r"anyres_max_\d+", str(ratio)):
        raise ValueError(
            f"{file}: expected image_aspect_ratio like anyres_max_9, got {ratio!r}; a judge of one "
            "padded tile cuts no tiles whatever it says: set it to anyres_max_9 for one"
        )
    if not isinstance(points, list) or not points:
        raise ValueError(
            f"{file}: expected image_grid_pinpoints as a list of [height, width] in pixels, got "
            f"{points!r}; write it out, such as [[384, 384], [384, 768]]"
        )


def _write_config(
    original: dict[str, Any], weights: Mapping[str, Tensor], source: Path, target: Path
) -> None:
    """Write config.json, the processor and, where there is one, the generation's settings."""
    vision = _vision_config(original, weights, source)
    tokenizer = _write_processor(original, vision, source, target)
    image, video = (int(tokenizer.convert_tokens_to_ids(token)) for token in (IMAGE, VIDEO))
    if max(image, video) >= original["vocab_size"]:
        raise ValueError(
            f"{source}: expected room for {IMAGE} and {VIDEO} in the vocabulary of "
            f"{original['vocab_size']}, got tokens {image} and {video}; put the tokenizer that "
            "belongs to these weights into their folder"
        )
    known = [key for key in QWEN2_NEEDED + QWEN2_OPTIONAL if key in original]
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **{key: original[key] for key in known}},
        "vision_config": vision,
        "image_token_index": image,  # marks the places of features, which replace its embedding
        "video_token_index": video,
        "image_grid_pinpoints": original["image_grid_pinpoints"],
        "vision_aspect_ratio": original["image_aspect_ratio"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": original.get("tie_word_embeddings", False),
        "torch_dtype": original.get("torch_dtype"),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if (source / GENERATION).is_file():
        shutil.copyfile(source / GENERATION, target / GENERATION)


def _vision_config(
    original: dict[str, Any], weights: Mapping[str, Tensor], source: Path
) -> dict[str, Any]:
    """SigLIP's settings: from config.json, else from the shapes of the weights, else known ones."""
    layers = [int(found[1]) for name in weights if (found := VISION_LAYER.fullmatch(name))]
    absent = [name for name in (PATCHES, VISION_MLP, WORDS) if name not in weights]
    if absent or not layers:
        raise ValueError(
            f"{source}: expected every weight of {KIND}, got no {absent or VISION_LAYER.pattern}; "
            "download the checkpoint again"
        )
    return {
        **SIGLIP,
        "hidden_size": original.get("mm_hidden_size", weights[PATCHES].shape[0]),
        "intermediate_size": weights[VISION_MLP].shape[0],
        "num_hidden_layers": max(layers) + 1,
        "patch_size": weights[PATCHES].shape[-1],
        "image_size": min(min(point) for point in original["image_grid_pinpoints"]),
    }


def _write_processor(
    original: dict[str, Any], vision: dict[str, Any], source: Path, target: Path
) -> Any:
    """Write what prepares texts and pictures; gives the tokenizer, with marks for pictures."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    size = {"height": vision["image_size"], "width": vision["image_size"]}
    look: dict[str, Any] = {"size": size, "image_mean": HALF, "image_std": HALF}
    points = original["image_grid_pinpoints"]
    tokenizer = _read_tokenizer(source)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=points, **look),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**look),
        num_image_tokens=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=original["image_aspect_ratio"],
    )
    processor.save_pretrained(target)
    return tokenizer


def _read_tokenizer(source: Path) -> Any:
    """The original's, with tokens that mark pictures: LLaVA-NeXT's own code does without."""
    from transformers import AddedToken, Qwen2Tokenizer

    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{source}: expected the tokenizer's files beside the weights, "
            f"{' or '.join(TOKENIZER_FILES)}, got none; copy them from the checkpoint's own release"
        )
    tokenizer = Qwen2Tokenizer.from_pretrained(source, local_files_only=True)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (IMAGE, VIDEO)]
    tokenizer.add_tokens(marks, special_tokens=True)
    return tokenizer


def _check_loads(folder: Path, source: Path) -> None:
    """Raise a ValueError unless transformers finds every weight in its shape, and no other."""
    from transformers import LlavaOnevisionForConditionalGeneration

    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # to name them
        dtype="auto",
    )
    report = {kind.removesuffix("_keys"): sorted(names) for kind, names in loaded[1].items()}
    found = [f"{len(v)} {kind} (first: {v[0]})" for kind, v in report.items() if v]
    if found:
        raise ValueError(
            f"{source}: expected every weight of {KIND} and no other, got {', '.join(found)}; the "
            "files are incomplete or config.json belongs to another checkpoint"
        )
