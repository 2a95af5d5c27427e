"""Janus's original modules, small, in plain torch: their names, and what they compute.

Written from the description of deepseek-ai/Janus (siglip_vit.py, vq_model.py, projector.py,
modeling_vlm.py at 1daa72f); only what pictures need.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VISION_WIDTH, PATCH, PIXELS = 32, 4, 16
HEADS = 16  # of siglip_large_patch16_384
WIDTH, CODES, CODE_WIDTH, LATENT, CHANNELS, MULTIPLIERS = 48, 40, 8, 24, 32, (1, 2, 2)
SPECIALS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
}
OTHERS = ["<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<|User|>", "<|Assistant|>"]


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        thirds = self.qkv(x).unflatten(-1, (3, HEADS, -1))  # [B, N, 3, heads, width / heads]
        q, k, v = thirds.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(width), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self):
        super().__init__()
        width = VISION_WIDTH
        self.pos_embed = nn.Parameter(torch.randn(1, (PIXELS // PATCH) ** 2, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.Sequential(VisionBlock(width), VisionBlock(width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn_pool = nn.Module()  # never run
        self.attn_pool.latent = nn.Parameter(torch.randn(1, 1, width))
        self.attn_pool.q, self.attn_pool.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.attn_pool.proj, self.attn_pool.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.attn_pool.mlp = Mlp(width)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        return self.norm(self.blocks(x))


class Residual(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, 1e-6), nn.GroupNorm(32, after, 1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        added = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return added + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        normal = self.norm(x)
        q, k, v = (f(normal).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """One resolution; only the coarsest has attention."""

    def __init__(self, before, after, num_blocks, attention, move):
        super().__init__()
        widths = [before] + [after] * num_blocks
        self.res = nn.ModuleList(Residual(widths[k], after) for k in range(num_blocks))
        self.attn = nn.ModuleList(PixelAttention(after) for _ in range(attention * num_blocks))
        if move:
            setattr(self, move, nn.Module())
            stride, padding = (2, 0) if move == "downsample" else (1, 1)
            getattr(self, move).conv = nn.Conv2d(after, after, 3, stride, padding)

    def forward(self, x):
        for k, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[k](x)
        if hasattr(self, "upsample"):
            x = self.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        if hasattr(self, "downsample"):
            x = self.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return x


class Side(nn.Module):
    """The VQ's encoder or decoder."""

    def __init__(self, decodes):
        super().__init__()
        widths = [CHANNELS * multiplier for multiplier in MULTIPLIERS]
        last = len(widths) - 1
        self.decodes = decodes
        if decodes:
            self.conv_in = nn.Conv2d(LATENT, widths[-1], 3, padding=1)
            levels = [
                Level(widths[min(i + 1, last)], widths[i], 2, i == last, "upsample" if i else "")
                for i in reversed(range(len(widths)))
            ]
            self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        else:
            self.conv_in = nn.Conv2d(3, CHANNELS, 3, padding=1)
            levels = [
                Level(([CHANNELS, *widths])[i], widths[i], 1, i == last, "downsample" * (i < last))
                for i in range(len(widths))
            ]
            self.conv_out = nn.Conv2d(widths[-1], LATENT, 3, padding=1)
        self.conv_blocks = nn.ModuleList(levels)
        coarse = widths[-1]
        self.mid = nn.ModuleList(
            [Residual(coarse, coarse), PixelAttention(coarse), Residual(coarse, coarse)]
        )
        self.norm_out = nn.GroupNorm(32, widths[0] if decodes else coarse, 1e-6)

    def forward(self, x):
        x = self.conv_in(x)
        order = [*self.mid, *self.conv_blocks] if self.decodes else [*self.conv_blocks, *self.mid]
        for layer in order:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Vq(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Side(decodes=False), Side(decodes=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(CODES, CODE_WIDTH)
        self.quantize.register_buffer("codebook_used", torch.arange(65536.0))
        self.quant_conv = nn.Conv2d(LATENT, CODE_WIDTH, 1)
        self.post_quant_conv = nn.Conv2d(CODE_WIDTH, LATENT, 1)

    def encode(self, pixels):
        """[B, 3, H, W] to what is compared with the codes, [B, 8, h, w]."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, tokens: Tensor) -> Tensor:
        """[B, T] to pictures [B, 3, H, W]."""
        side = int(tokens.shape[1] ** 0.5)
        codes = F.normalize(self.quantize.embedding(tokens), dim=-1)  # [B, T, 8]
        codes = codes.transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(self.post_quant_conv(codes))


class Projector(nn.Module):
    def __init__(self, before):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(before, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.layers(x)


class Janus(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.vision_model = nn.Module()
        self.vision_model.vision_tower = VisionTower()
        self.aligner, self.gen_aligner = Projector(VISION_WIDTH), Projector(CODE_WIDTH)
        self.gen_vision_model = Vq()
        self.gen_head = nn.Module()
        self.gen_head.output_mlp_projector = nn.Linear(WIDTH, WIDTH)
        self.gen_head.vision_head = nn.Linear(WIDTH, CODES)
        self.gen_embed = nn.Embedding(CODES, CODE_WIDTH)
        self.language_model = LlamaForCausalLM(LlamaConfig(**language_settings(vocab_size)))

    def image_logits(self, hidden):
        return self.gen_head.vision_head(F.gelu(self.gen_head.output_mlp_projector(hidden)))


def language_settings(vocab_size: int) -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "vocab_size": vocab_size,
    }


def write_settings(folder: Path) -> int:
    """The original's small files; gives the number of words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[*SPECIALS.values(), *OTHERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    core.save(str(folder / "tokenizer.json"))
    vocab_size = core.get_vocab_size()
    vision = {"image_size": PIXELS, "model_name": "siglip_large_patch16_384", "select_layer": -1}
    language = language_settings(vocab_size) | {"model_type": "llama", "torch_dtype": "bfloat16"}
    contents = {
        "config.json": {
            "model_type": "multi_modality",
            "architectures": ["MultiModalityCausalLM"],
            "language_config": language,
            "vision_config": {"cls": "CLIPVisionTower", "params": vision},
        },
        "tokenizer_config.json": {
            "bos_token": {"__type": "AddedToken", "content": SPECIALS["bos"]},
            "eos_token": SPECIALS["eos"],
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizerFast",
        },
        "special_tokens_map.json": {"pad_token": SPECIALS["pad"]},
        "preprocessor_config.json": {
            "image_size": PIXELS,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "background_color": [127] * 3,
        },
        "processor_config.json": {"processor_class": "VLChatProcessor", "sft_format": "deepseek"},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return vocab_size


def write_original(folder: Path) -> Janus:
    """A whole original checkpoint in two pickles, as the older ones are published."""
    folder.mkdir()
    model = Janus(write_settings(folder)).eval()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    names = list(state)
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = folder / f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, file)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return model
