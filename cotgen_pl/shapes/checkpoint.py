"""An untrained small Janus in transformers' own folder format.

`tools/build_shapes.py` trains one into the shipped checkpoint; tests use it as it is. Nothing here
is special to our policy class: the folder loads with transformers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

BOS, EOS, PAD, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
)  # Janus-Pro's own names, so that look-ups by name are the same on both
ROLES = ("<|User|>", "<|Assistant|>")

# Renders `<|User|>: {text}\n\n<|Assistant|>:`, Janus-Pro's conversation form, in the style of Jinja
# chat templates.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ ('<|User|>: ' if message.role == 'user' else '<|Assistant|>: ') }}"
    "{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{{ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|>:' }}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """Train a byte-level BPE tokenizer with Janus-Pro's special tokens.

    Args:
        texts: What it should compress; other text falls back to bytes, so nothing is unknown.
        vocab_size: Upper bound; 256 bytes and the special tokens are always there.

    Returns:
        A transformers fast tokenizer that puts BOS first and pads on the left.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [BOS, EOS, PAD, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE, *ROLES]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={
            "image_token": IMAGE,
            "boi_token": BEGIN_OF_IMAGE,
            "eoi_token": END_OF_IMAGE,
        },
    )


def build_config(tokenizer: Any, **sizes: Any) -> Any:
    """The configuration of a small Janus.

    Args:
        tokenizer: Gives the vocabulary and the special ids.
        **sizes: `hidden_size`, `num_layers`, `num_heads`, `codebook_size`, `grid` (tokens along a
            picture's side), `vq_levels` (each halves the side once but the last), `vq_channels` (a
            multiple of 32, GroupNorm's groups), `vq_blocks`, `max_positions`; what is absent has
            the Shapes world's value.
    """
    from transformers import JanusConfig, LlamaConfig

    size = {
        "hidden_size": 128,
        "num_layers": 3,
        "num_heads": 4,
        "codebook_size": 128,
        "grid": 4,
        "vq_levels": 4,
        "vq_channels": 32,
        "vq_blocks": 0,
        "max_positions": 128,
    } | sizes
    width, pixels = size["hidden_size"], size["grid"] * 2 ** (size["vq_levels"] - 1)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        max_position_embeddings=size["max_positions"],
        rms_norm_eps=1e-6,
        initializer_range=width
        ** -0.5,  # at Janus's 0.02 so narrow a model binds words to cells very late
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": pixels,
        "patch_size": pixels // size["grid"],
        "projection_dim": width,
        "num_image_tokens": size["grid"] ** 2,
    }
    vq = {
        "num_embeddings": size["codebook_size"],
        "latent_channels": 64,
        "base_channels": size["vq_channels"],
        "channel_multiplier": [1] * size["vq_levels"],
        "num_res_blocks": size["vq_blocks"],
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    return JanusConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        vq_config=vq,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )


def build_janus(tokenizer: Any, seed: int = 0, **sizes: Any) -> Any:
    """A randomly initialised `JanusForConditionalGeneration`; `sizes` as in `build_config`."""
    return initialise_janus(build_config(tokenizer, **sizes), tokenizer, seed)


def initialise_janus(config: Any, tokenizer: Any, seed: int = 0) -> Any:
    """A `JanusForConditionalGeneration` with random weights that react to what is read.

    The 8-wide code embedding starts at unit length and the two small MLPs around it at their
    layers' own scale: at 0.02 the tokens already drawn would hardly reach the language model. Words
    start at scale 1, that of what the layers add to them: at the layers' own, binding words to
    each other takes three times as many steps.
    """
    from transformers import GenerationConfig, JanusForConditionalGeneration

    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(config)
    nn.init.normal_(model.model.generation_embeddings.weight, std=8**-0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight)
    for part in (model.model.generation_aligner, model.model.generation_head, model.model.vqmodel):
        for layer in part.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()
    codes = model.model.vqmodel.quantize.embedding.weight
    nn.init.normal_(codes)
    codes.data = nn.functional.normalize(
        codes.data, dim=-1
    )  # encode compares raw codes: see the VQ's traps
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        guidance_scale=2.0,
        generation_kwargs={"boi_token_id": tokenizer.convert_tokens_to_ids(BEGIN_OF_IMAGE)},
    )
    return model


def save_janus(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model, tokenizer and processor, so that transformers' Auto classes load all three."""
    model.save_pretrained(folder)
    save_processor(model.config, tokenizer, folder)


def save_processor(config: Any, tokenizer: Any, folder: Path) -> None:
    """Write the processor and tokenizer alone."""
    from transformers import JanusImageProcessor, JanusProcessor

    pixels = config.vision_config.image_size
    images = JanusImageProcessor(
        size={"height": pixels, "width": pixels}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = JanusProcessor(
        images,
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        num_image_tokens=config.vision_config.num_image_tokens,
    )
    processor.save_pretrained(folder)
