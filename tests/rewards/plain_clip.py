"""CLIP written out in plain tensor operations, without any library's model, to compare with.

After section 3 of https://arxiv.org/abs/2103.00020 and clip/model.py of
https://github.com/openai/CLIP, whose weight names are used (they are open_clip's too).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]
Activation = Callable[[Tensor], Tensor]

HUGGING_FACE_NAMES = [
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"visual.ln_pre.\1"),
    (r"vision_model\.post_layernorm\.(\w+)", r"visual.ln_post.\1"),
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"vision_model\.encoder\.layers\.(.*)", r"visual.transformer.resblocks.\1"),
    (r"text_model\.encoder\.layers\.(.*)", r"transformer.resblocks.\1"),
]
HUGGING_FACE_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def picture_features(
    weights: Weights, pixels: Tensor, *, heads: int, activation: Activation
) -> Tensor:
    """[B, D] of unit length, of prepared pictures [B, 3, S, S]."""
    kernel = weights["visual.conv1.weight"]  # [width, 3, patch, patch]
    size = kernel.shape[-1]
    patches = pixels.unfold(2, size, size).unfold(3, size, size)  # [B, 3, rows, columns, p, p]
    x = torch.einsum("bcijpq,wcpq->bijw", patches, kernel).flatten(1, 2)
    first = weights["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + weights["visual.positional_embedding"]
    x = _norm(weights, "visual.ln_pre", x)
    x = _run_blocks(weights, "visual.transformer", x, heads, activation, causal=False)
    return _unit(_norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"])


def text_features(
    weights: Weights, tokens: Tensor, *, heads: int, end: int, activation: Activation
) -> Tensor:
    """[B, D] of unit length, read at the first token `end` of each row of [B, L]."""
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = _run_blocks(weights, "transformer", x, heads, activation, causal=True)
    x = _norm(weights, "ln_final", x)
    place = (tokens == end).int().argmax(dim=1)
    return _unit(x[torch.arange(len(x)), place] @ weights["text_projection"])


def from_hugging_face(state: Weights) -> Weights:
    """transformers' CLIP weights under OpenAI's names."""
    weights = {"visual.proj": state["visual_projection.weight"].T}
    weights["text_projection"] = state["text_projection.weight"].T
    for name, values in state.items():
        for pattern, replacement in HUGGING_FACE_NAMES:
            if re.fullmatch(pattern, name):
                renamed = re.sub(pattern, replacement, name)
                for part, theirs in HUGGING_FACE_PARTS.items():
                    renamed = renamed.replace(part, theirs)
                weights[renamed] = values
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    return weights


def _run_blocks(
    weights: Weights, tower: str, x: Tensor, heads: int, activation: Activation, *, causal: bool
) -> Tensor:
    layer = 0
    while f"{tower}.resblocks.{layer}.ln_1.weight" in weights:
        block = f"{tower}.resblocks.{layer}"
        x = x + _attend(weights, f"{block}.attn", _norm(weights, f"{block}.ln_1", x), heads, causal)
        hidden = activation(
            _linear(weights, f"{block}.mlp.c_fc", _norm(weights, f"{block}.ln_2", x))
        )
        x = x + _linear(weights, f"{block}.mlp.c_proj", hidden)
        layer += 1
    assert layer > 0
    return x


def _attend(weights: Weights, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    joint = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
    queries, keys, values = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1)
    )  # [B, heads, L, width / heads]
    logits = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    if causal:
        length = x.shape[1]
        logits = logits + torch.full((length, length), -torch.inf).triu(1)
    mixed = logits.softmax(dim=-1) @ values
    return _linear(weights, f"{name}.out_proj", mixed.transpose(1, 2).flatten(2))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
