"""open_clip's models from files beside each other: weights, architecture, tokenizer.

Shared by the rewards that are a CLIP of open_clip's or stand on one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cotgen_pl.pixels import crop_centre, normalise, resize_shorter
from cotgen_pl.rewards.base import Kept
from cotgen_pl.weights import download_weights, find_weights, load_strictly, read_tensors

if TYPE_CHECKING:
    from open_clip import CLIP

CONFIG_FILE = "open_clip_config.json"
OPEN_CLIP_FILE = "open_clip_model.safetensors"
OPEN_CLIP_FILES = (OPEN_CLIP_FILE, "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class OpenClip:
    """A CLIP of open_clip's in float32, with what belongs to it."""

    model: CLIP
    tokenize: Tokenizer
    """Texts (B of them) to token ids, [B, context length] int64."""
    mean: Sequence[float]
    """Of each colour channel, in the unit of pictures in [0, 1]."""
    std: Sequence[float]

    @property
    def picture_size(self) -> int:
        """Pixels along each side of what the model reads."""
        size: int = self.model.visual.image_size[0]
        return size

    def crop_pictures(self, images: Tensor) -> Tensor:
        """CLIP's own preparation, [B, 3, H, W] in [0, 1] to [B, 3, S, S], S = `picture_size`.

        Shorter side to S, bicubic; the square in the middle; normalised. Source: `_transform` in
        clip/clip.py of https://github.com/openai/CLIP.
        """
        squares = crop_centre(resize_shorter(images, self.picture_size), self.picture_size)
        return normalise(squares, self.mean, self.std)

    def picture_features(self, pixels: Tensor) -> Tensor:
        """[B, D] float32 of unit length, of prepared pictures [B, 3, S, S]."""
        features = self.model.encode_image(pixels.to(next(self.model.parameters()).dtype))
        return F.normalize(features.float(), dim=-1)

    def text_features(self, texts: Sequence[str], kept: Kept[Tensor]) -> Tensor:
        """[B, D] float32 of unit length, each text encoded once and kept.

        Texts are encoded one by one: in a batch the last bits would depend on which other texts
        were new, and a resumed run, which starts with none kept, would not repeat the uninterrupted
        one bit for bit.
        """
        device = next(self.model.parameters()).device
        features = [kept.get_or_compute(text, self._encode_text).to(device) for text in texts]
        return torch.cat(features)

    def _encode_text(self, text: str) -> Tensor:
        tokens = self.tokenize([text]).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def find_open_clip(path: str, what: str) -> Path:
    """The weights file that `path` names, fetched with its config where that is a hub repository.

    Args:
        path: A weights file, a folder that holds open_clip's, or a repository in open_clip's layout
            like timm/vit_base_patch32_clip_224.openai, "owner/name".
        what: Whose weights, for messages.
    """
    file = find_weights(path, OPEN_CLIP_FILES, what)
    return file or download_weights(path, OPEN_CLIP_FILE, what, CONFIG_FILE)


def read_open_clip(file: Path, architecture: str, *, quick_gelu: bool = False) -> OpenClip:
    """Read a model from its weights file and what lies beside it.

    Args:
        file: The weights, with open_clip's names.
        architecture: open_clip's name of it, where there is no `open_clip_config.json` beside.
        quick_gelu: The weights are OpenAI's own, which want x * sigmoid(1.702 x) in place of GELU
            (class QuickGELU in clip/model.py of https://github.com/openai/CLIP). A config beside
            them that says GELU is refused: scores would differ without a word.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    config = read_config(file.parent, architecture)
    model_config = config["model_cfg"]
    if quick_gelu:
        model_config = _with_quick_gelu(model_config, file.parent / CONFIG_FILE)
    normalisation = config.get("preprocess_cfg", {})
    return OpenClip(
        build_model(model_config, read_tensors(file), file),
        build_tokenizer(model_config["text_cfg"], file.parent),
        normalisation.get("mean", OPENAI_DATASET_MEAN),
        normalisation.get("std", OPENAI_DATASET_STD),
    )


def read_config(folder: Path, architecture: str) -> dict[str, Any]:
    """open_clip's own description of a model: the one in `folder`, else that of `architecture`.

    Returns:
        {"model_cfg": ..., "preprocess_cfg": ...}; the latter is optional.
    """
    import open_clip

    file = folder / CONFIG_FILE
    if not file.is_file():
        return {"model_cfg": open_clip.get_model_config(architecture)}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if "vision_cfg" in config["model_cfg"] and "text_cfg" in config["model_cfg"]:
            return config
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(_config_message(file, repr(error))) from error
    raise ValueError(_config_message(file, "no vision_cfg or no text_cfg"))


def _with_quick_gelu(model_config: dict[str, Any], file: Path) -> dict[str, Any]:
    if file.is_file() and not model_config.get("quick_gelu"):
        raise ValueError(
            f'{file}: expected "quick_gelu": true in model_cfg, as OpenAI\'s weights want, got a '
            "config that computes GELU; add it where the weights beside it are OpenAI's, else name "
            "a folder or repository of OpenAI's weights"
        )
    return model_config | {"quick_gelu": True}


def build_model(model_config: dict[str, Any], weights: dict[str, Tensor], file: Path) -> CLIP:
    """A CLIP of that architecture in float32; the weights, read from `file`, must all fit."""
    import open_clip

    try:
        model = open_clip.CLIP(**model_config)
    except TypeError as error:
        raise ValueError(_config_message(file.parent / CONFIG_FILE, str(error))) from error
    model.float()  # the default dtype of this moment may be the trainer's
    refusal = (
        f"{file}: expected the weights of {_describe_architecture(model_config)}, got {{misfits}}; "
        f"put the {CONFIG_FILE} that belongs to these weights into their folder"
    )
    load_strictly(model, weights, refusal)
    return model


def build_tokenizer(text_config: dict[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer beside the weights, else the one that the config names, else CLIP's own.

    Returns:
        Texts (B of them) to token ids, [B, context length] int64.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    context_length = text_config.get("context_length", 77)  # open_clip's default
    options = text_config.get("tokenizer_kwargs") or {}
    beside = any((folder / name).is_file() for name in TOKENIZER_FILES)
    source = str(folder) if beside else text_config.get("hf_tokenizer_name")
    if not source:
        return SimpleTokenizer(context_length=context_length, **options)
    options = {**options, "trust_remote_code": False}  # a checkpoint's folder may not bring code
    mode = text_config.get("tokenizer_mode")
    try:
        return HFTokenizer(source, context_length, tokenizer_mode=mode, **options)
    except OSError as error:
        raise ValueError(
            f"open_clip tokenizer: expected a Hugging Face tokenizer at {source}, got none; "
            f"put its {' and '.join(TOKENIZER_FILES)} into {folder}"
        ) from error


def _config_message(file: Path, problem: str) -> str:
    return (
        f"{file}: expected open_clip's format, model_cfg (embed_dim, vision_cfg, text_cfg of a "
        f"plain CLIP) and preprocess_cfg, got {problem}; copy the file from the model's own release"
    )


def _describe_architecture(model_config: dict[str, Any]) -> str:
    vision, text = model_config["vision_cfg"], model_config["text_cfg"]
    return (
        f"a CLIP with {vision.get('layers')} vision layers of width {vision.get('width')} and "
        f"{text.get('layers')} text layers of width {text.get('width')}"
    )
