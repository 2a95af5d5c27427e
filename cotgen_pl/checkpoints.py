"""Reading transformers' checkpoints, with refusals that say what to do, before any weights load.

Kept apart from the policies because it serves any model of transformers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cotgen_pl.sharding import whole

# README and demo/app_januspro.py of github.com/deepseek-ai/Janus at 1daa72f: no system prompt, the
# assistant's turn empty, no blank behind it.
TEMPLATES = {
    "janus": "User: {prompt}\n\nAssistant:",
    "janus_pro": "<|User|>: {prompt}\n\n<|Assistant|>:",
}


def hash_weights(model: nn.Module) -> str:
    """16 hexadecimal digits that tell weights apart: names, shapes, types and values of all.

    Without adapters that have not learnt yet: one of their factors is 0, and the other one, random
    and new in each run, changes nothing. Processes that have parts of the weights all have to ask.
    """
    digest = hashlib.blake2b(digest_size=8)
    state = model.state_dict()
    for name, part in sorted(state.items()):
        if "lora_" in name and not whole(state[name.replace("lora_A", "lora_B")]).any():
            continue
        values: Any = whole(part)
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def expand_home(path: str) -> str:
    """Put the home folder in place of a leading `~`; hub ids and other paths stay as they are."""
    # Not by Path: it drops the dot of "./models/janus", which then reads as a hub id.
    return os.path.expanduser(path)


def read_config(path: str, kind: type[PreTrainedConfig], example: str) -> Any:
    """Read the configuration of a checkpoint.

    Args:
        path: A folder or a hub id.
        kind: The class that the checkpoint must belong to.
        example: A hub id of such a checkpoint, for messages.

    Raises:
        ValueError: No such folder, a hub id out of reach, or a model of another kind.
    """
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.is_dir() and (looks_local or folder.parent.is_dir()):
        raise ValueError(
            f"expected a folder with a {kind.model_type} checkpoint, got {folder.absolute()}, "
            f"which does not exist; name an existing folder, or a hub id such as {example}"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"expected a config.json in {folder.absolute()}, got none; name the folder that holds "
            f"a {kind.model_type} checkpoint in transformers' format"
        )
    try:
        entries, _ = kind.get_config_dict(path, local_files_only=folder.is_dir())
    except OSError as error:
        raise ValueError(
            f"expected {path} to be a folder, or a hub id that this machine can reach, got: "
            f"{_first_line(error)}; download the checkpoint where there is a network and give its "
            "folder"
        ) from error
    if entries.get("model_type") != kind.model_type:
        raise ValueError(
            f"expected a {kind.model_type} checkpoint in {path}, got model_type "
            f"{entries.get('model_type')!r}; use one in transformers' format, such as {example}"
        )
    return kind.from_dict(entries)


def read_processor(path: str, kind: type[ProcessorMixin]) -> Any:
    """Read tokenizer and image processor of a checkpoint.

    Raises:
        ValueError: They are not there.
    """
    try:
        return kind.from_pretrained(path, local_files_only=Path(path).is_dir())
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected tokenizer and processor files beside the weights in {path}, got: "
            f"{_first_line(error)}; copy them from the checkpoint that the weights came from"
        ) from error


def token_id(tokenizer: Any, token: str, path: str) -> int:
    """The id of a special token, looked up by name: checkpoints of one family differ in it.

    Raises:
        ValueError: The tokenizer does not have it.
    """
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ValueError(
            f"expected the token {token} in the tokenizer of {path}, got none; "
            "a guessed id would change pictures without a word: use the original tokenizer"
        )
    return int(index)


def prepare_pictures(image_processor: Any, pictures: Sequence[Image]) -> Tensor:
    """Pictures resized and padded as a checkpoint's image processor does, but not normalised.

    Its mean and deviation are those of the tower that looks at pictures, not of the codes.

    Args:
        image_processor: transformers' own, of the checkpoint.
        pictures: B pictures of any mode and size; transparency is dropped.

    Returns:
        [B, 3, H, W] float32 in [0, 1].
    """
    images = [picture.convert("RGB") for picture in pictures]
    prepared = image_processor(images, do_normalize=False, return_tensors="pt")
    pixels: Tensor = prepared["pixel_values"]
    return pixels.float()


def read_weights(
    path: str, kind: type[PreTrainedModel], *, empty: bool = False, **settings: Any
) -> Any:
    """Read a model, all of it, or make room for one.

    transformers itself fills what a file lacks with random numbers and warns.

    Args:
        path: A folder or a hub id.
        kind: The model's class.
        empty: Read no weights; their values are whatever was in memory.
        **settings: For `from_pretrained`.

    Raises:
        ValueError: There are no weights, some are missing, or some are of another shape.
    """
    if empty:
        return _make_room(path, kind, **settings)
    try:
        loaded: Any = kind.from_pretrained(
            path,
            local_files_only=Path(path).is_dir(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with names
            **settings,
        )
    except OSError as error:
        raise ValueError(
            f"expected weights in {path}, got: {_first_line(error)}; download the checkpoint again"
        ) from error
    model, report = loaded
    names = {
        "missing": report["missing_keys"],
        "of another shape": [name for name, *_ in report["mismatched_keys"]],
        "unknown": report["unexpected_keys"],
    }
    misfits = [f"{len(v)} {misfit} (first: {min(v)})" for misfit, v in names.items() if v]
    if names["missing"] or names["of another shape"]:
        raise ValueError(
            f"expected all weights of a {kind.__name__} in {path}, got {', '.join(misfits)}; "
            "convert or download the checkpoint again"
        )
    return model


def _make_room(
    path: str, kind: Any, *, dtype: torch.dtype, attn_implementation: str, **settings: Any
) -> Any:
    config = read_config(path, kind.config_class, path)
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    with suppress(OSError):  # there need not be one
        local = Path(path).is_dir()
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=local)
    return model.to_empty(device="cpu")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def recognise_template(processor: Any, path: str) -> Literal["janus", "janus_pro"]:
    """The known template that the checkpoint's own chat template renders."""
    probe = [{"role": "user", "content": [{"type": "text", "text": "a dog"}]}]
    if processor.chat_template:
        drawn = processor.apply_chat_template(probe, add_generation_prompt=True, tokenize=False)
        for name in ("janus", "janus_pro"):
            if drawn.strip() == TEMPLATES[name].format(prompt="a dog"):
                return name
    raise ValueError(
        f"expected {path} to carry the chat template of Janus or Janus-Pro, got another or none; "
        "name the form that the checkpoint was trained with: template: janus_pro or template: janus"
    )
