"""All of a Janus checkpoint but its weights: sizes, tokenizer, processor, the original's own files.

Facts on the original's config.json and on its code's table of vision towers come from knowledge of
https://github.com/deepseek-ai/Janus at 1daa72f, not from a published file; sizes are read off the
weights wherever their shapes tell them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cotgen_pl.checkpoints import TEMPLATES, recognise_template, token_id
from cotgen_pl.shapes.checkpoint import (
    BEGIN_OF_IMAGE,
    BOS,
    CHAT_TEMPLATE,
    END_OF_IMAGE,
    EOS,
    IMAGE,
    PAD,
)

EXTRAS = "original"  # the folder in a converted one for what transformers has no place for
MODEL_TYPE = "multi_modality"  # the original's
VISION_HEADS = {"siglip_large_patch16_384": 16}  # not to be read off the weights
GUIDANCE = 5.0  # of the original's generation_inference.py
ROLES = ("bos", "eos", "pad")
LANGUAGE_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_settings(folder: Path) -> dict[str, Any]:
    """The original's config.json.

    Raises:
        ValueError: There is none, or it is of another model.
    """
    file = folder / "config.json"
    settings = _read_json(file)
    if settings.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{file}: expected model_type {MODEL_TYPE!r}, got {settings.get('model_type')!r}; name "
            "a checkpoint in Janus's original layout"
        )
    for key in ("language_config", "vision_config"):
        if not isinstance(settings.get(key), dict):
            raise ValueError(f"{file}: expected an entry {key}, got none; download it again")
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected JSON in {file}, got {type(error).__name__}; download the checkpoint's small "
            "files as well as its weights"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {file}, got another; download it again")
    return content


class Sizes:
    """Sizes off the shapes of weights.

    Args:
        outlines: By transformers' names.
        source: The checkpoint, for messages.
    """

    def __init__(self, outlines: Mapping[str, Tensor], source: Path) -> None:
        self.outlines, self.source = outlines, source

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        if name not in self.outlines:
            raise ValueError(
                f"{self.source}: expected weights for {name}, got none; the checkpoint is "
                "incomplete or of another model"
            )
        return tuple(self.outlines[name].shape)

    def count(self, prefix: str) -> int:
        """How many numbered parts follow a prefix."""
        names = [name for name in self.outlines if name.startswith(prefix)]
        return len({name[len(prefix) :].split(".")[0] for name in names})


def build_config(settings: Mapping[str, Any], outlines: Mapping[str, Tensor], source: Path) -> Any:
    """Describe an original checkpoint to transformers, but for the tokenizer's ids.

    Args:
        settings: Its config.json.
        outlines: Its weights under transformers' names; shapes and types count.
        source: Its folder, for messages.
    """
    from transformers import JanusConfig

    sizes = Sizes(outlines, source)
    words = "model.language_model.embed_tokens.weight"
    sizes.of(words)
    return JanusConfig(
        text_config=_language_settings(settings),
        vision_config=_vision_settings(settings, sizes),
        vq_config=_vq_settings(sizes),
        tie_word_embeddings=False,
        dtype=outlines[words].dtype,
        architectures=["JanusForConditionalGeneration"],
    )


def _language_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A LlamaConfig's entries; what the original leaves out has transformers' default."""
    unwanted = ("torch_dtype", "dtype", "transformers_version", "architectures", "_name_or_path")
    given = {k: v for k, v in settings["language_config"].items() if k not in unwanted}
    return given | {"model_type": "llama", "tie_word_embeddings": False}


def _vision_settings(settings: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    given = settings["vision_config"].get("params", {})
    name = given.get("model_name")
    if name not in VISION_HEADS:
        raise ValueError(
            f"{sizes.source}: expected a vision tower among {list(VISION_HEADS)}, got {name!r}, "
            "whose number of heads is not known here; convert a Janus or Janus-Pro"
        )
    width, _, patch, _ = sizes.of("model.vision_model.embeddings.patch_embedding.weight")
    inner = sizes.of("model.vision_model.encoder.layers.0.mlp.fc1.weight")[0]
    positions = sizes.of("model.vision_model.embeddings.position_embedding.weight")[0]
    pixels = given.get("image_size")
    if not isinstance(pixels, int) or (pixels // patch) ** 2 != positions:
        raise ValueError(
            f"{sizes.source}: expected an image_size of {positions} patches of {patch} px, got "
            f"{pixels}; config.json and weights are of different checkpoints"
        )
    return {
        "hidden_size": width,
        "num_hidden_layers": sizes.count("model.vision_model.encoder.layers."),
        "num_attention_heads": VISION_HEADS[name],
        "mlp_ratio": inner / width,
        "image_size": pixels,
        "patch_size": patch,
        "num_image_tokens": positions,
        "projection_dim": sizes.of("model.aligner.fc1.weight")[0],
    }


def _vq_settings(sizes: Sizes) -> dict[str, Any]:
    encoder = "model.vqmodel.encoder"
    base, colours, _, _ = sizes.of(f"{encoder}.conv_in.weight")
    levels = range(sizes.count(f"{encoder}.down."))
    widths = [sizes.of(f"{encoder}.down.{i}.block.0.conv1.weight")[0] for i in levels]
    codes, code_width = sizes.of("model.vqmodel.quantize.embedding.weight")
    inner, width = sizes.of("model.generation_head.proj_out.weight")
    return {
        "num_embeddings": codes,
        "embed_dim": code_width,
        "latent_channels": sizes.of(f"{encoder}.conv_out.weight")[0],
        "in_channels": colours,
        "out_channels": sizes.of("model.vqmodel.decoder.conv_out.weight")[0],
        "base_channels": base,
        "channel_multiplier": [channels // base for channels in widths],
        "num_res_blocks": sizes.count(f"{encoder}.down.0.block."),
        "projection_dim": inner,
        "image_token_embed_dim": width,
    }


def save_processor(
    config: Any, template: Literal["janus", "janus_pro"], source: Path, target: Path
) -> None:
    """Write configuration, tokenizer, processor and what generation needs.

    Args:
        config: transformers'; the tokenizer's ids are put into it.
        template: Which form of prompts the chat template renders.
        source: The original's folder, with the tokenizer's and the picture processor's files.
        target: Where to.
    """
    from transformers import GenerationConfig, JanusProcessor

    if template not in TEMPLATES:
        raise ValueError(
            f"expected a template among {', '.join(TEMPLATES)}, got {template!r}; name the form of "
            "prompts that the weights were trained with"
        )
    tokenizer = read_tokenizer(source)
    processor = JanusProcessor(
        _picture_processor(source, config.vision_config.image_size),
        tokenizer,
        chat_template=_chat_template(template),
        num_image_tokens=config.vision_config.num_image_tokens,
        use_default_system_prompt=True,  # before questions, as the original's own inference has it
    )
    assert recognise_template(processor, str(source)) == template
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    for name, index in ids.items():
        setattr(config.text_config, name, index)
    config.image_token_id = token_id(tokenizer, IMAGE, str(source))
    boi = token_id(tokenizer, BEGIN_OF_IMAGE, str(source))
    config.save_pretrained(target)
    processor.save_pretrained(target)
    GenerationConfig(
        guidance_scale=GUIDANCE, generation_kwargs={"boi_token_id": boi}, **ids
    ).save_pretrained(target)


def _chat_template(template: str) -> str:
    if template == "janus_pro":
        return CHAT_TEMPLATE
    return CHAT_TEMPLATE.replace("<|User|>", "User").replace("<|Assistant|>", "Assistant")


def read_tokenizer(source: Path) -> Any:
    """The original's tokenizer as it stands in tokenizer.json, putting BOS first, padding left.

    The original names LlamaTokenizerFast, which adds BOS by itself whatever the file says; recent
    versions of that class would rebuild the tokenizer by Llama's own rules.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    file = source / "tokenizer.json"
    content = _read_json(file)
    specials = _special_tokens(source)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        padding_side="left",
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
        },
        **{f"{role}_token": token for role, token in specials.items()},
    )
    known = _tokens_of(content)
    for token in (*specials.values(), IMAGE, BEGIN_OF_IMAGE, END_OF_IMAGE):
        if token not in known:
            raise ValueError(
                f"{file}: expected the token {token}, got a tokenizer without it; a new one would "
                "have an embedding that was never trained: use the original tokenizer"
            )
    bos = specials["bos"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    return tokenizer


def _tokens_of(content: Mapping[str, Any]) -> set[str]:
    """All tokens of a tokenizer.json."""
    added = {entry["content"] for entry in content.get("added_tokens", [])}
    return added | set(content.get("model", {}).get("vocab", {}))


def _special_tokens(source: Path) -> dict[str, str]:
    """BOS, EOS and pad: of special_tokens_map.json, of tokenizer_config.json, or Janus's own."""
    names = {"bos": BOS, "eos": EOS, "pad": PAD}
    for file in (source / "tokenizer_config.json", source / "special_tokens_map.json"):
        settings = _read_json(file) if file.exists() else {}
        for role in names:
            token = settings.get(f"{role}_token")
            if token is not None:
                names[role] = token["content"] if isinstance(token, dict) else token
    return names


def _picture_processor(source: Path, pixels: int) -> Any:
    """What the original's preprocessor_config.json asks for, as a class of transformers."""
    from transformers import JanusImageProcessor

    file = source / "preprocessor_config.json"
    settings = _read_json(file)
    missing = [key for key in ("image_mean", "image_std") if settings.get(key) is None]
    if missing:
        raise ValueError(f"{file}: expected {' and '.join(missing)}, got none; download it again")
    kept = ("image_mean", "image_std", "background_color", "min_size", "rescale_factor")
    given = {key: settings[key] for key in kept if key in settings}
    return JanusImageProcessor(size={"height": pixels, "width": pixels}, **given)


def copy_settings(source: Path, target: Path) -> None:
    """Copy an original's small files: all JSON but the weights' index, and its licence."""
    target.mkdir(exist_ok=True)
    files = [file for file in source.glob("*.json") if not file.name.endswith(".index.json")]
    for file in [*files, *source.glob("LICENSE*")]:
        shutil.copyfile(file, target / file.name)


def find_original(source: Path, original: Path | None, config: Any) -> Path:
    """The folder with the original's small files, of the same sizes as the converted one.

    Args:
        source: The folder in transformers' format.
        original: The one that was named; absent means the copy inside `source`.
        config: transformers' configuration of `source`.
    """
    from transformers import LlamaConfig

    folder = source / EXTRAS if original is None else Path(original)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"expected the original's config.json in {folder}, got none; name the original "
            "checkpoint that the weights descend from: --original FOLDER"
        )
    language = LlamaConfig(**_language_settings(read_settings(folder)))
    for name in LANGUAGE_SIZES:
        theirs, ours = getattr(language, name), getattr(config.text_config, name)
        if theirs != ours:
            raise ValueError(
                f"{folder}: expected {name} {ours} as in {source}, got {theirs}; name the original "
                "checkpoint that the weights descend from"
            )
    return folder
