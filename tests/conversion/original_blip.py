"""Small random checkpoints in BLIP's original layout, and BLIP in plain torch on those names.

Pictures in that layout's own sizes, 224 and 480 pixels; widths and depths are small.

`PlainBlip` computes in float64, from the original's names and without transformers:
github.com/salesforce/BLIP models/vit.py, models/med.py and models/blip_vqa.py.
"""

import json
import math
from pathlib import Path

import numpy
import torch
from PIL import Image
from transformers import BertTokenizer

NUM_WORDS = 30522  # of bert-base-uncased
ENCODE, DECODE = 30523, 30522
YES, NO = 2748, 2053
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
WORDS = [
    "a",
    "the",
    "and",
    "red",
    "blue",
    "cat",
    "dog",
    "two",
    "on",
    "moon",
    "big",
    "box",
    "?",
    ",",
]
PIECES = {"yes": YES, "no": NO, **{word: 3000 + i for i, word in enumerate(WORDS)}, "##s": 4000}
HEADS = 2  # of the text towers, told by med_config.json
VISION_HEAD = 64
MED_CONFIG = {"num_attention_heads": HEADS, "layer_norm_eps": 1e-12, "vocab_size": NUM_WORDS + 2}


def write_tokenizer(folder: Path, pieces=PIECES) -> str:
    """BERT's tokenizer with its number of words and its ids, nearly all of them unused."""
    ids = {**SPECIAL, **pieces}
    names = {index: name for name, index in ids.items()}
    vocabulary = {names.get(index, f"[unused{index}]"): index for index in range(NUM_WORDS)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def vision_shapes(prefix, width, layers, size, patch=16):
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (size // patch) ** 2 + 1, width),
        **linear("patch_embed.proj", (width, 3, patch, patch)),
        **linear("norm", (width,)),
    }
    for layer in (f"blocks.{i}" for i in range(layers)):
        shapes |= linear(f"{layer}.norm1", (width,)) | linear(f"{layer}.norm2", (width,))
        shapes |= linear(f"{layer}.attn.qkv", (3 * width, width))
        shapes |= linear(f"{layer}.attn.proj", (width, width))
        shapes |= linear(f"{layer}.mlp.fc1", (4 * width, width))
        shapes |= linear(f"{layer}.mlp.fc2", (width, 4 * width))
    return {f"{prefix}visual_encoder.{name}": shape for name, shape in shapes.items()}


def text_shapes(prefix, width, layers, seen_width, positions=64, words=NUM_WORDS + 2):
    shapes = {
        "embeddings.position_ids": None,
        "embeddings.word_embeddings.weight": (words, width),
        "embeddings.position_embeddings.weight": (positions, width),
        **linear("embeddings.LayerNorm", (width,)),
    }
    for layer in (f"encoder.layer.{i}" for i in range(layers)):
        for attention, source in (("attention", width), ("crossattention", seen_width)):
            shapes |= linear(f"{layer}.{attention}.self.query", (width, width))
            shapes |= linear(f"{layer}.{attention}.self.key", (width, source))
            shapes |= linear(f"{layer}.{attention}.self.value", (width, source))
            shapes |= linear(f"{layer}.{attention}.output.dense", (width, width))
            shapes |= linear(f"{layer}.{attention}.output.LayerNorm", (width,))
        shapes |= linear(f"{layer}.intermediate.dense", (4 * width, width))
        shapes |= linear(f"{layer}.output.dense", (width, 4 * width))
        shapes |= linear(f"{layer}.output.LayerNorm", (width,))
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def linear(name, shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def image_reward_shapes(
    vision=(128, 2), size=224, text=(64, 2), head=(64, 32, 16, 8, 4, 1), **text_options
):
    shapes = vision_shapes("blip.", *vision, size)
    shapes |= text_shapes("blip.text_encoder", *text, vision[0], **text_options)
    shapes |= linear("blip.vision_proj", (8, vision[0])) | linear("blip.text_proj", (8, text[0]))
    for i, layer in enumerate((0, 2, 4, 6, 7)):
        shapes |= linear(f"mlp.layers.{layer}", (head[i + 1], head[i]))
    return shapes


def blip_vqa_shapes(width=64, layers=2, size=480, **text_options):
    shapes = vision_shapes("", width, layers, size)
    shapes |= text_shapes("text_encoder", width, layers, width, **text_options)
    shapes |= text_shapes("text_decoder.bert", width, layers, width, **text_options)
    words = shapes["text_encoder.embeddings.word_embeddings.weight"][0]
    shapes |= {"text_decoder.cls.predictions.bias": (words,)}
    shapes |= linear("text_decoder.cls.predictions.transform.dense", (width, width))
    shapes |= linear("text_decoder.cls.predictions.transform.LayerNorm", (width,))
    return shapes | linear("text_decoder.cls.predictions.decoder", (words, width))


def fill(shapes, device="cpu"):
    """Random weights, large enough for scores to differ between pictures and texts."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if shape is None:
            weights[name] = torch.arange(512)[None]
        elif device == "meta":
            weights[name] = torch.empty(shape, device="meta")
        else:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
            if "norm" in name.lower() and name.endswith("weight"):
                weights[name] += 1
    decoder = "text_decoder.cls.predictions.decoder"
    if f"{decoder}.weight" in weights:  # tied, as BLIP has them
        weights[f"{decoder}.weight"] = weights[
            "text_decoder.bert.embeddings.word_embeddings.weight"
        ]
        weights[f"{decoder}.bias"] = weights["text_decoder.cls.predictions.bias"]
    return weights


def write_image_reward(folder: Path, **sizes) -> dict:
    """ImageReward.pt and med_config.json into a folder; gives the weights."""
    weights = fill(image_reward_shapes(**sizes))
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    return weights


def write_blip_vqa(folder: Path, **sizes) -> dict:
    """model_base_vqa_capfilt_large.pth and med_config.json into a folder; gives the weights."""
    weights = fill(blip_vqa_shapes(**sizes))
    torch.save({"model": weights, "epoch": 3}, folder / "model_base_vqa_capfilt_large.pth")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    return weights


class PlainBlip:
    """BLIP's forward passes, in float64."""

    def __init__(self, weights: dict, prefix: str = "") -> None:
        self.weights = {name: values.double() for name, values in weights.items()}
        self.prefix = prefix

    def apply(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return x @ weight.T + bias

    def norm(self, name, x, epsilon):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def see(self, pixels):
        """[B, 3, S, S] to [B, N, D]."""
        tower = f"{self.prefix}visual_encoder"
        patches = self.weights[f"{tower}.patch_embed.proj.weight"]
        width, _, side, _ = patches.shape
        batch, _, size, _ = pixels.shape
        grid = size // side
        cut = pixels.double().reshape(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        x = cut.reshape(batch, grid * grid, -1) @ patches.reshape(width, -1).T
        x = x + self.weights[f"{tower}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{tower}.cls_token"].expand(batch, 1, width), x], 1)
        x = x + self.weights[f"{tower}.pos_embed"]
        layer = 0
        while f"{tower}.blocks.{layer}.norm1.weight" in self.weights:
            block = f"{tower}.blocks.{layer}"
            qkv = self.apply(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            mixed = attend(*qkv.chunk(3, -1), heads=width // VISION_HEAD)
            x = x + self.apply(f"{block}.attn.proj", mixed)
            inner = self.apply(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.apply(f"{block}.mlp.fc2", gelu(inner))
            layer += 1
        return self.norm(f"{tower}.norm", x, 1e-6)

    def read(self, tower, token_ids, mask, other, other_mask=None):
        """Token ids [B, L] and what they look at, [B, N, E], to [B, L, D]."""
        words = self.weights[f"{tower}.embeddings.word_embeddings.weight"][token_ids]
        places = self.weights[f"{tower}.embeddings.position_embeddings.weight"]
        x = words + places[: token_ids.shape[1]]
        x = self.norm(f"{tower}.embeddings.LayerNorm", x, 1e-12)
        layer = 0
        while f"{tower}.encoder.layer.{layer}.output.dense.weight" in self.weights:
            name = f"{tower}.encoder.layer.{layer}"
            x = self.mix(f"{name}.attention", x, x, mask)
            x = self.mix(f"{name}.crossattention", x, other, other_mask)
            inner = gelu(self.apply(f"{name}.intermediate.dense", x))
            x = x + self.apply(f"{name}.output.dense", inner)
            x = self.norm(f"{name}.output.LayerNorm", x, 1e-12)
            layer += 1
        return x

    def mix(self, name, x, other, mask):
        query = self.apply(f"{name}.self.query", x)
        key, value = self.apply(f"{name}.self.key", other), self.apply(f"{name}.self.value", other)
        mixed = self.apply(f"{name}.output.dense", attend(query, key, value, HEADS, mask))
        return self.norm(f"{name}.output.LayerNorm", x + mixed, 1e-12)

    def image_reward(self, pixels, token_ids, mask):
        """Standardised scores, [B]."""
        x = self.read("blip.text_encoder", token_ids, mask, self.see(pixels))[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = self.apply(f"mlp.layers.{layer}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072

    def yes_probability(self, pixels, token_ids, mask):
        """[B] of "yes" against "no", for questions whose first token is [ENC]."""
        asked = self.read("text_encoder", token_ids, mask, self.see(pixels))
        start = torch.full((len(token_ids), 1), DECODE)
        x = self.read("text_decoder.bert", start, None, asked, mask)[:, 0]
        head = "text_decoder.cls.predictions"
        x = gelu(self.apply(f"{head}.transform.dense", x))
        x = self.apply(f"{head}.decoder", self.norm(f"{head}.transform.LayerNorm", x, 1e-12))
        probabilities = x.softmax(-1)
        return probabilities[:, YES] / (probabilities[:, YES] + probabilities[:, NO])


def attend(query, key, value, heads, mask=None):
    """Multi-head attention, [B, L, D] with [B, N, D]; mask [B, N] is 0 where nothing is looked at.

    Head by head, so that nothing depends on a reshape.
    """
    width = query.shape[-1] // heads
    results = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None] == 0, -math.inf)
        results.append(scores.softmax(-1) @ value[..., part])
    return torch.cat(results, -1)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def shrink_with_pillow(picture, size, *, crop):
    """A Pillow image as BLIP's transforms give it, [3, size, size] normalised, by Pillow and NumPy.

    With `crop` the shorter side becomes `size` and the middle is kept (ImageReward); without, the
    picture is squashed (BLIP-VQA).
    """
    picture = picture.convert("RGB")
    width, height = picture.size
    shorter = min(width, height)
    fitted = (size * width // shorter, size * height // shorter) if crop else (size, size)
    picture = picture.resize(fitted, Image.Resampling.BICUBIC)
    left, top = round((fitted[0] - size) / 2), round((fitted[1] - size) / 2)
    pixels = numpy.asarray(picture, dtype=numpy.float64)[top : top + size, left : left + size] / 255
    mean = numpy.array([0.48145466, 0.4578275, 0.40821073])
    std = numpy.array([0.26862954, 0.26130258, 0.27577711])
    return ((pixels - mean) / std).transpose(2, 0, 1)


def draw(size, mode="RGB", seed=0):
    """A Pillow image with smooth areas, an edge and noise."""
    width, height = size
    x, y = numpy.meshgrid(numpy.linspace(0, 1, width), numpy.linspace(0, 1, height))
    noise = numpy.random.default_rng(seed).random((height, width))
    channels = [x, y, 0.5 * (x > y) + 0.5 * noise, 0.25 + 0.5 * x * y][: len(mode)]
    pixels = (numpy.stack(channels, -1) * 255).round().astype(numpy.uint8)
    return Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)


def as_tensor(picture):
    """A Pillow image as [1, C, H, W] in [0, 1]."""
    pixels = torch.from_numpy(numpy.array(picture)).float() / 255
    return pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None]
