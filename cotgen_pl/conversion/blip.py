"""Checkpoints in BLIP's original layout (github.com/salesforce/BLIP) for transformers' classes.

Two of them: ImageReward, which is a BLIP with a head of its own, and BLIP-VQA, which answers
questions. transformers' defaults are not BLIP's (8 text heads for 12, epsilon 1e-5 for 1e-6, 384
pixels), so every setting is written out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cotgen_pl.conversion.keys import Conversion, KeyMap, check_coverage, rename_weights
from cotgen_pl.weights import find_weights, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_REWARD_FILE = "ImageReward.pt"
BLIP_VQA_FILE = "model_base_vqa_capfilt_large.pth"
MED_CONFIG_FILE = "med_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
ADDED_TOKENS = ("[DEC]", "[ENC]")  # behind BERT's own, in this order
HEAD_WIDTH = 64  # of vision heads: 768 / 12 in ViT-B, 1024 / 16 in ViT-L (BLIP's create_vit)
VISION_EPSILON = 1e-6  # models/vit.py: partial(nn.LayerNorm, eps=1e-6)
TEXT_DEFAULTS = {"num_attention_heads": 12, "layer_norm_eps": 1e-12}  # configs/med_config.json
HEAD_LAYERS = (0, 2, 4, 6, 7)  # of ImageReward's nn.Sequential; dropouts stand between them


def _vision_renames(prefix: str) -> list[tuple[str, str]]:
    """BLIP's vision names behind a prefix (a regular expression), and transformers'."""
    block, layer = prefix + r"visual_encoder\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."
    kind = r"\.(weight|bias)"
    return [
        (prefix + r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
        (prefix + r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
        (
            prefix + r"visual_encoder\.patch_embed\.proj" + kind,
            r"vision_model.embeddings.patch_embedding.\1",
        ),
        (prefix + r"visual_encoder\.norm" + kind, r"vision_model.post_layernorm.\1"),
        (block + r"norm([12])" + kind, layer + r"layer_norm\2.\3"),
        (block + r"attn\.qkv" + kind, layer + r"self_attn.qkv.\2"),
        (block + r"attn\.proj" + kind, layer + r"self_attn.projection.\2"),
        (block + r"mlp\.(fc[12])" + kind, layer + r"mlp.\2.\3"),
    ]


IMAGE_REWARD_KEYS = KeyMap(
    renames=[
        *_vision_renames(r"blip\."),
        (r"blip\.(text_encoder\..+)", r"\1"),
        *(
            (rf"mlp\.layers\.{old}\.(weight|bias)", rf"head.{new}.\1")
            for new, old in enumerate(HEAD_LAYERS)
        ),
    ],
    dropped=[
        r"blip\.text_encoder\.embeddings\.position_ids",
        r"blip\.(vision|text)_proj\.(weight|bias)",  # of BLIP's contrastive loss
    ],
)
BLIP_VQA_KEYS = KeyMap(
    renames=[*_vision_renames(""), (r"(text_(encoder|decoder)\..+)", r"\1")],
    dropped=[r"text_(encoder|decoder\.bert)\.embeddings\.position_ids"],
)


@dataclass
class BlipCheckpoint:
    """An original file, read, with transformers' names."""

    file: Path
    weights: dict[str, Tensor]
    num_read: int
    dropped: list[str]

    def shape(self, name: str) -> torch.Size:
        """Of a weight that must be there."""
        if name not in self.weights:
            raise ValueError(
                f"{self.file}: expected a weight that becomes {name}, got none among "
                f"{self.num_read}; the file is incomplete, download it again"
            )
        return self.weights[name].shape

    def count(self, pattern: str) -> int:
        """How many weights have a name of this regular expression."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.weights)


def convert_image_reward(
    source: Path, target: Path, tokenizer: str = "bert-base-uncased"
) -> Conversion:
    """Write ImageReward (https://huggingface.co/THUDM/ImageReward) as the folder its reward reads.

    Args:
        source: ImageReward.pt or the folder that holds it; a `med_config.json` beside it counts,
            else BLIP's own holds.
        target: A new or empty folder, for config.json, the tokenizer and model.safetensors: names
            of BlipVisionModel under `vision_model`, of BlipTextModel under `text_encoder`, `head`.
        tokenizer: BERT's, a folder or hub id.
    """
    checkpoint = _read(source, IMAGE_REWARD_FILE, IMAGE_REWARD_KEYS, "ImageReward")
    config = describe_image_reward(checkpoint)
    with torch.device("meta"):
        model = ImageRewardWeights(config)
    check_coverage(model, checkpoint.weights, checkpoint.file)
    return _write(checkpoint, config, target, tokenizer)


def convert_blip_vqa(
    source: Path, target: Path, tokenizer: str = "bert-base-uncased"
) -> Conversion:
    """Write BLIP-VQA as a folder that `BlipForQuestionAnswering.from_pretrained` reads.

    The picture size is that of the position embeddings: 480 pixels in the original file. The hub's
    Salesforce/blip-vqa-* were resampled to 384 and are other networks.

    Args:
        source: model_base_vqa_capfilt_large.pth or the folder that holds it; a `med_config.json`
            beside it counts, else BLIP's own holds.
        target: A new or empty folder, for config.json, the tokenizer and model.safetensors.
        tokenizer: BERT's, a folder or hub id.
    """
    from transformers import BlipConfig, BlipForQuestionAnswering

    checkpoint = _read(source, BLIP_VQA_FILE, BLIP_VQA_KEYS, "BLIP-VQA")
    config = describe_blip_vqa(checkpoint)
    with torch.device("meta"):
        model = BlipForQuestionAnswering(BlipConfig(**config))
    check_coverage(model, checkpoint.weights, checkpoint.file)
    _check_tied(checkpoint)
    return _write(checkpoint, config, target, tokenizer)


class ImageRewardWeights(nn.Module):
    """ImageReward's weights by their new names; its forward pass is in the reward's file."""

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(BlipVisionConfig(**config["vision_config"]))
        text_config = BlipTextConfig(**config["text_config"])
        self.text_encoder = BlipTextModel(text_config, add_pooling_layer=False)
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(config["head_widths"])))


def describe_image_reward(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    """The contents of config.json."""
    heads = [checkpoint.shape(f"head.{layer}.weight") for layer in range(len(HEAD_LAYERS))]
    return {
        "model_type": "image_reward",
        "vision_config": _describe_vision(checkpoint),
        "text_config": _describe_text(checkpoint),
        "head_widths": [heads[0][1], *(shape[0] for shape in heads)],
    }


def describe_blip_vqa(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "model_type": "blip",
        "architectures": ["BlipForQuestionAnswering"],
        "vision_config": _describe_vision(checkpoint),
        "text_config": _describe_text(checkpoint),
    }


def _describe_vision(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    layers = r"vision_model\.encoder\.layers\.\d+\.layer_norm1\.weight"
    width, _, _, patch_size = checkpoint.shape("vision_model.embeddings.patch_embedding.weight")
    num_positions = checkpoint.shape("vision_model.embeddings.position_embedding")[1]
    if width % HEAD_WIDTH:
        raise ValueError(
            f"{checkpoint.file}: expected a vision width that is a multiple of {HEAD_WIDTH}, as of "
            f"all of BLIP's, got {width}; name one of BLIP's own checkpoints"
        )
    return {
        "hidden_size": width,
        "intermediate_size": checkpoint.shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": checkpoint.count(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "image_size": math.isqrt(num_positions - 1) * patch_size,  # one position is the class's
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": VISION_EPSILON,
    }


def _describe_text(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    embeddings, layer = "text_encoder.embeddings", "text_encoder.encoder.layer.0"
    vocab_size, width = checkpoint.shape(f"{embeddings}.word_embeddings.weight")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": checkpoint.shape(f"{layer}.intermediate.dense.weight")[0],
        "num_hidden_layers": checkpoint.count(
            r"text_encoder\.encoder\.layer\.\d+\.output\.dense\.weight"
        ),
        "max_position_embeddings": checkpoint.shape(f"{embeddings}.position_embeddings.weight")[0],
    }
    return {
        **sizes,
        **_read_text_settings(checkpoint.file.parent / MED_CONFIG_FILE, sizes),
        "encoder_hidden_size": checkpoint.shape(f"{layer}.crossattention.self.key.weight")[1],
        "hidden_act": "gelu",
        "is_decoder": True,  # to have cross-attention; its forward pass is told false
    }


def _read_text_settings(file: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What the weights do not tell, from BLIP's `med_config.json` where there is one."""
    if not file.is_file():
        return TEXT_DEFAULTS
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        settings = {name: config[name] for name in TEXT_DEFAULTS}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected BLIP's text settings with {list(TEXT_DEFAULTS)}, got {error!r}; "
            "put the file that belongs to the weights there, or none to take BLIP's own"
        ) from error
    others = {name: config[name] for name in sizes if config.get(name, sizes[name]) != sizes[name]}
    if others:
        raise ValueError(
            f"{file}: expected the sizes of the weights beside it, {dict(sizes)}, got {others}; "
            "put the file that belongs to the weights there"
        )
    return settings


def _read(source: Path, file_name: str, key_map: KeyMap, kind: str) -> BlipCheckpoint:
    file = find_weights(str(source), [file_name], kind)
    if file is None:
        raise ValueError(
            f"expected {file_name} or the folder that holds it, got {source}, where there is no "
            "file; download it first"
        )
    original = read_tensors(file)
    weights, dropped = rename_weights(original, key_map, file, kind)
    return BlipCheckpoint(file, weights, len(original), dropped)


def _check_tied(checkpoint: BlipCheckpoint) -> None:
    """Raise a ValueError unless the decoder's last layer has the weights of its embeddings.

    transformers ties the two, as BLIP does, and would drop one of two that differ.
    """
    decoder = "text_decoder.cls.predictions"
    for name, twin in {
        f"{decoder}.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        f"{decoder}.decoder.bias": f"{decoder}.bias",
    }.items():
        if not torch.equal(checkpoint.weights[name], checkpoint.weights[twin]):
            raise ValueError(
                f"{checkpoint.file}: expected equal weights in {name} and {twin}, as BLIP ties "
                "them, got different ones; name BLIP's own checkpoint"
            )


def _write(
    checkpoint: BlipCheckpoint, config: dict[str, Any], target: Path, tokenizer: str
) -> Conversion:
    words = read_tokenizer(tokenizer, config["text_config"]["vocab_size"])
    target.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Copies, because safetensors refuses tensors that share memory, as tied ones do.
    weights = {name: values.contiguous().clone() for name, values in checkpoint.weights.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return Conversion(
        checkpoint.file, target, checkpoint.num_read, len(weights), checkpoint.dropped
    )


def read_tokenizer(source: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with BLIP's two tokens behind its own, as BLIP's `init_tokenizer` adds them.

    Args:
        source: A folder or hub id.
        vocab_size: Tokens that the network knows, the two included.
    """
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(_find_tokenizer(source), local_files_only=True)
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    added = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    if len(tokenizer) != vocab_size or added != [vocab_size - 2, vocab_size - 1]:
        raise ValueError(
            f"BLIP tokenizer: expected {vocab_size} tokens, the last two {ADDED_TOKENS}, got "
            f"{len(tokenizer)} with those two at {added} from {source}; name bert-base-uncased "
            "or a copy of it"
        )
    return tokenizer


def _find_tokenizer(source: str) -> Path:
    """The folder of a tokenizer; without its files transformers would make one of 5 tokens."""
    from huggingface_hub import snapshot_download

    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["tokenizer*", "vocab.txt"]))
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
        problem = "neither file"
    except (OSError, ValueError) as error:  # offline and not cached, or not a repository's name
        problem = type(error).__name__
    raise ValueError(
        f"BLIP tokenizer: expected a folder or hub id with {' or '.join(TOKENIZER_FILES)} of "
        f"BERT's, got {problem} from {source}; where there is a network run `hf download "
        "bert-base-uncased tokenizer.json tokenizer_config.json`, or name a folder that has them"
    )
