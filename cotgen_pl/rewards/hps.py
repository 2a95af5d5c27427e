"""HPSv2 and HPSv2.1: how well a picture fits its prompt and how much people like it.

The scorer is a CLIP ViT-H/14 that was tuned on people's choices (https://arxiv.org/abs/2306.09341).
It runs on upstream open_clip. What differs from the authors' package, hpsv2 1.2.0
(https://github.com/tgxs002/HPSv2):

* scores are float32 outside autocast; half precision has steps of 0.00024 near 0.28, hence ties;
* pictures are scored in batches, and the features of a prompt are kept;
* pictures are scored as the floats they are, not after rounding to 8 bits;
* an oblong picture whose longer side already fits is padded as well;
* the ViT-H/14 of LAION is not downloaded first, only to be overwritten.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores, freeze

if TYPE_CHECKING:
    from open_clip import CLIP

ORIGINAL_FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
OPEN_CLIP_FILE = "open_clip_model.safetensors"
CONFIG_FILE = "open_clip_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MAX_KEPT_PROMPTS = 4096  # 1024 floats each: 16 MB for ViT-H/14
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Tokenizer = Callable[[list[str]], Tensor]


def find_weights(path: str, version: str) -> Path | None:
    """The local weights that `path` names, or None where it names a hub repository.

    Args:
        path: A weights file, a folder that holds one, or a repository, "owner/name".
        version: Which of the original's files a folder is searched for.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        names = (ORIGINAL_FILES[version], OPEN_CLIP_FILE)
        found = [place / name for name in names if (place / name).is_file()]
        if found:
            return found[0]
        raise ValueError(
            f"HPS weights: expected {' or '.join(names)} in the folder {path}, got neither; "
            "name the weights file itself or put it there"
        )
    if HUB_ID.fullmatch(path) and place.suffix not in (".pt", ".safetensors"):
        return None
    raise ValueError(
        f"HPS weights: expected a file, a folder or a hub repository like xswu/HPSv2, got {path}, "
        "which does not exist; correct the path or download the file first"
    )


def download_weights(repository: str, version: str) -> Path:
    """Fetch one of the original's files from the Hugging Face hub or the local cache."""
    from huggingface_hub import hf_hub_download

    file = ORIGINAL_FILES[version]
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:  # offline, not cached, no such repository or file: all are OSErrors
        raise ValueError(
            f"HPS weights: expected a local path or {file} of the hub repository {repository}, got "
            f"neither ({type(error).__name__}); where there is a network run `hf download "
            f"{repository} {file}`, then set path to that file here"
        ) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU. No other object is ever unpickled.

    Args:
        file: Names to tensors, or the original's layout {"state_dict": names to tensors}.
    """
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file}: expected a checkpoint that holds tensors only, got one that is damaged "
            "or would run code when opened; download it again, or convert one that you trust to "
            ".safetensors"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    if isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()):
        return weights
    raise ValueError(
        f"{file}: expected tensors by name, or those under 'state_dict', got other contents; "
        f"use the original's {ORIGINAL_FILES['v2.1']} or open_clip's {OPEN_CLIP_FILE}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """open_clip's own description of a model: the one in `folder`, else ViT-H-14's.

    Returns:
        {"model_cfg": ..., "preprocess_cfg": ...}; the latter is optional.
    """
    import open_clip

    file = folder / CONFIG_FILE
    if not file.is_file():
        return {"model_cfg": open_clip.get_model_config("ViT-H-14")}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if "vision_cfg" in config["model_cfg"] and "text_cfg" in config["model_cfg"]:
            return config
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(_config_message(file, repr(error))) from error
    raise ValueError(_config_message(file, "no vision_cfg or no text_cfg"))


def build_model(model_config: dict[str, Any], weights: dict[str, Tensor], file: Path) -> CLIP:
    """A CLIP of that architecture in float32; the weights, read from `file`, must all fit."""
    import open_clip

    try:
        model = open_clip.CLIP(**model_config)
    except TypeError as error:
        raise ValueError(_config_message(file.parent / CONFIG_FILE, str(error))) from error
    model.float()  # the default dtype of this moment may be the trainer's
    misfits = _describe_misfits(model.state_dict(), weights)
    if misfits:
        raise ValueError(
            f"{file}: expected the weights of {_describe_architecture(model_config)}, got "
            f"{misfits}; put the {CONFIG_FILE} that belongs to these weights into their folder"
        )
    model.load_state_dict(weights)
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
            f"HPS tokenizer: expected a Hugging Face tokenizer at {source}, got none; "
            f"put its {' and '.join(TOKENIZER_FILES)} into {folder}"
        ) from error


def fit_pictures(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale pictures until the longer side is `size`, pad them to a square and normalise them.

    Resizing is bicubic with antialias, without clamping, as torchvision (0.17 and later) does it on
    a float tensor; the aspect ratio is kept and nothing is cut off. Padding is black, centred and
    added before normalising, so its pixels become (0 - mean) / std. Pictures whose longer side fits
    are not resampled. Source: `ResizeMaxSize` in hpsv2/src/open_clip/transform.py of
    https://github.com/tgxs002/HPSv2/tree/866735e.

    Args:
        images: [B, 3, H, W] in [0, 1].
        size: Pixels along each side of the result.
        mean: Per colour channel, of the unit of the pictures.
        std: The same.

    Returns:
        [B, 3, size, size] float32.
    """
    images = images.float()
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    fitted = (round(height * scale), round(width * scale))
    if fitted != (height, width):
        images = F.interpolate(images, fitted, mode="bicubic", antialias=True)
    rows, columns = size - fitted[0], size - fitted[1]
    padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    images = F.pad(images, padding)  # [B, 3, size, size]
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


class HPSReward(Reward):
    """Human preference score: the cosine of picture and prompt, 0.2 to 0.35 with published weights.

    Scores of v2 and v2.1 are not comparable, nor are those of different prompts. Architecture and
    normalisation come from an `open_clip_config.json` beside the weights (its `resize_mode` is not
    used), else they are those of ViT-H-14.
    """

    def __init__(
        self,
        path: str = "xswu/HPSv2",
        version: Literal["v2", "v2.1"] = "v2.1",
        batch_size: int = 32,
        name: str = "hps",
    ) -> None:
        """Check the arguments; nothing is read yet.

        Args:
            path: A weights file (.pt or .safetensors), a folder that holds one, or a hub
                repository, "owner/name".
            version: Which of the original's two files to take from a repository or a folder; a file
                speaks for itself.
            batch_size: Pictures encoded at once.
            name: The score's name among the parts.
        """
        super().__init__()
        if version not in ORIGINAL_FILES:
            raise ValueError(
                f"HPS version: expected one of {list(ORIGINAL_FILES)}, got {version!r}; set one"
            )
        if batch_size < 1:
            raise ValueError(f"HPS batch_size: expected at least 1, got {batch_size}; set it to 32")
        self.path = path
        self.version = version
        self.batch_size = batch_size
        self.name = name
        self.model: CLIP | None = None
        self._tokenize: Tokenizer | None = None
        self._mean: Sequence[float] = ()
        self._std: Sequence[float] = ()
        self._kept: dict[str, Tensor] = {}  # text to [1, D]
        find_weights(path, version)

    def load(self) -> HPSReward:
        """Read weights, architecture and tokenizer, to the CPU; a second call does nothing."""
        if self.model is not None:
            return self
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        file = find_weights(self.path, self.version) or download_weights(self.path, self.version)
        config = read_config(file.parent)
        normalisation = config.get("preprocess_cfg", {})
        self._mean = normalisation.get("mean", OPENAI_DATASET_MEAN)
        self._std = normalisation.get("std", OPENAI_DATASET_STD)
        self._tokenize = build_tokenizer(config["model_cfg"]["text_cfg"], file.parent)
        self.model = build_model(config["model_cfg"], read_weights(file), file)
        freeze(self.model)
        return self

    def train(self, mode: bool = True) -> HPSReward:
        """Stay in evaluation mode: a scorer inside a training module is not trained with it."""
        return super().train(False)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 3, H, W] in [0, 1] of any size, on the device of the weights.

        The scores are float32, whatever autocast is active, and lie on the device of `images`.
        """
        if self.model is None:
            raise ValueError(
                f"reward {self.name}: its weights are not loaded; call load() before score()"
            )
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"reward {self.name}: expected pictures [{len(prompts)}, 3, H, W] for "
                f"{len(prompts)} prompts, got {list(images.shape)}; pass one RGB picture per prompt"
            )
        device = next(self.model.parameters()).device
        # Not inference_mode: its tensors could not enter a loss afterwards.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            texts = torch.cat([self._text_features(prompt.text, device) for prompt in prompts])
            parts = images.to(device).split(self.batch_size)
            pictures = torch.cat([self._picture_features(part) for part in parts])  # [B, D]
            cosines = (pictures * texts).sum(dim=-1)
        return Scores.single(self.name, cosines.to(images.device))

    def _picture_features(self, images: Tensor) -> Tensor:
        """[B, D], of unit length."""
        assert self.model is not None
        size = self.model.visual.image_size[0]
        return self.model.encode_image(
            fit_pictures(images, size, self._mean, self._std), normalize=True
        )

    def _text_features(self, text: str, device: torch.device) -> Tensor:
        """[1, D], of unit length, kept for the next time.

        Texts are encoded one by one: in a batch the last bits would depend on which other texts
        were new, and a resumed run, which starts with none kept, would not repeat the uninterrupted
        one bit for bit.
        """
        if text not in self._kept:
            assert self.model is not None and self._tokenize is not None
            if len(self._kept) >= MAX_KEPT_PROMPTS:
                del self._kept[next(iter(self._kept))]  # the oldest
            tokens = self._tokenize([text]).to(device)
            self._kept[text] = self.model.encode_text(tokens, normalize=True)
        return self._kept[text].to(device)


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


def _describe_misfits(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """What does not fit, in a line, with the first name of each kind; empty if everything does."""
    common = [name for name in expected if name in weights]
    misfits = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [n for n in common if expected[n].shape != weights[n].shape],
    }
    return ", ".join(f"{len(v)} {kind} (first: {v[0]})" for kind, v in misfits.items() if v)
