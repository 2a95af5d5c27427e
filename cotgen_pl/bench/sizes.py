"""Janus models of a stated size with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cotgen_pl.shapes.checkpoint import IMAGE, build_tokenizer, initialise_janus, save_processor


@dataclass(frozen=True)
class Size:
    """What a configuration is made of."""

    layers: int
    width: int
    mlp: int
    """Width of an MLP's hidden layer."""
    heads: int
    grid: int
    """Tokens along a picture's side."""
    codes: int
    vocabulary: int
    """Words of the text embedding and head."""
    positions: int
    """Longest context."""
    vq: dict[str, Any]
    """Entries of the VQ part's configuration that differ from transformers' defaults."""
    vision: dict[str, Any]
    """Likewise of the vision tower's, through which no drawn picture passes."""


_SMALL_VQ = {"base_channels": 32, "channel_multiplier": [1] * 4, "num_res_blocks": 0}
_SMALL_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

# `1b` and `7b` are Janus-Pro's: arXiv 2501.17811, table 1, and the published config.json files. The
# defaults of transformers' VQ and vision configurations are theirs.
SIZES = {
    "small": Size(14, 512, 2048, 8, 16, 4096, 4096, 512, _SMALL_VQ, _SMALL_VISION),
    "1b": Size(24, 2048, 5632, 16, 24, 16384, 102400, 16384, {}, {}),
    "7b": Size(30, 4096, 11008, 32, 24, 16384, 102400, 16384, {}, {}),
}


def make_config(size: Size, tokenizer: Any) -> Any:
    """The configuration of a Janus of a size."""
    from transformers import JanusConfig, LlamaConfig

    text = LlamaConfig(
        vocab_size=max(size.vocabulary, len(tokenizer)),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.positions,
        rms_norm_eps=1e-6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    multipliers = size.vq.get("channel_multiplier", [1, 1, 2, 2, 4])
    patch = 2 ** (len(multipliers) - 1)  # the VQ part halves the side between its levels
    pixels = size.grid * patch
    vision = {
        "image_size": pixels,
        "patch_size": patch,
        "num_image_tokens": size.grid**2,
        "projection_dim": size.width,
    }
    vq = {
        "num_embeddings": size.codes,
        "projection_dim": size.width,
        "image_token_embed_dim": size.width,
    }
    return JanusConfig(
        text_config=text.to_dict(),
        vision_config=vision | size.vision,
        vq_config=vq | size.vq,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )


def write_without_weights(size: Size, texts: Iterable[str], folder: Path) -> None:
    """Write configuration, tokenizer and processor of a Janus into a folder.

    Args:
        size: Of the model.
        texts: What the tokenizer should compress.
        folder: Exists.
    """
    tokenizer = build_tokenizer(texts, size.vocabulary)
    config = make_config(size, tokenizer)
    config.save_pretrained(folder)
    save_processor(config, tokenizer, folder)


def make_weights(config: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A Janus of transformers with random weights, made in place and in the type asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return initialise_janus(config, tokenizer)
    finally:
        torch.set_default_dtype(before)
