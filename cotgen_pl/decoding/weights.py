"""The weights of transformers' Llama as the fused decoder reads them: its own copy of them.

Queries, keys and values are one product, gate and up another. Under autocast the copy has the type
that is computed in, so that nothing is cast at each token; on a CPU in oneDNN's order (`pack`).
Adapters stay apart, two thin products: merged into bfloat16 weights, most of what they have learnt
would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cotgen_pl.products import pack, product


class Projection(NamedTuple):
    """x W' + bias, and x down' up' where there are adapters."""

    weight: Tensor
    """[outputs, inputs], packed on a CPU."""
    bias: Tensor | None = None
    """[outputs]."""
    down: Tensor | None = None
    """[ranks, inputs], of all adapters that read this input."""
    up: Tensor | None = None
    """[outputs, ranks], with the adapters' scale."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs], in the weights' type."""
        hidden = hidden.to(self.weight.dtype)
        projected = product(hidden, self.weight, self.bias)
        if self.down is None or self.up is None:
            return projected
        return projected + F.linear(F.linear(hidden, self.down), self.up)


class Layer(NamedTuple):
    """One decoder layer; norms have their weight alone, [width]."""

    attention_norm: Tensor
    attention_input: Projection  # queries, keys and values; the first two in `rotation_order`
    attention_output: Projection
    mlp_norm: Tensor
    mlp_input: Projection  # gate and up
    mlp_output: Projection


class Network(NamedTuple):
    """All that a decoding step multiplies with."""

    layers: list[Layer]
    norm: Tensor
    head: list[Projection]
    """The linear layers from the last hidden state to logits."""
    codes: Tensor
    """What each code is read as, [V, width]."""
    activation: Callable[[Tensor], Tensor]
    """Between the head's linear layers."""
    num_heads: int
    epsilon: float
    """Of the norms."""


def why_unreadable(model: Any) -> str | None:
    """What keeps the fused decoder from reading transformers' Llama, or None where nothing does.

    Args:
        model: Its body, `LlamaModel`.
    """
    config = model.config
    if type(model).__name__ != "LlamaModel" or config.hidden_act != "silu":
        return f"it is a {type(model).__name__} with {config.hidden_act}, not a Llama"
    if config.num_key_value_heads != config.num_attention_heads:
        return "its heads share keys and values"
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        return "its rotation depends on the length"
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
            reason = _why_unreadable_linear(module)
            if reason:
                return f"layers.{name} {reason}"
    return None


def _why_unreadable_linear(module: Any) -> str | None:
    from torch.distributed.tensor import DTensor

    base = getattr(module, "base_layer", module)
    if not base.weight.is_floating_point():
        return "is quantised"
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return "is sharded; gather the layers before pictures are drawn"
    if type(base) is not nn.Linear:
        return f"is a {type(base).__name__}, not a plain linear layer"
    return "has adapters of another kind than LoRA" if getattr(module, "lora_variant", 0) else None


@torch.no_grad()
def read_network(model: Any, head: Any, codes: Tensor) -> Network:
    """Copy the weights of now.

    Args:
        model: The body, transformers' `LlamaModel`.
        head: From the last hidden state to logits, transformers' Janus's: two linear layers.
        codes: What each code is read as, [V, width].
    """
    heads = model.config.num_attention_heads
    return Network(
        layers=[_read_layer(layer, heads) for layer in model.layers],
        norm=model.norm.weight.detach().clone(),
        head=[_fuse([head.proj_out]), _fuse([head.vision_head])],
        codes=codes.detach(),
        activation=head.activation_fn,
        num_heads=heads,
        epsilon=model.norm.variance_epsilon,
    )


def rotation_order(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query's or key's weights [heads * width, ...] with each rotated pair side by side.

    transformers rotates number i of a head with number i + width / 2. Side by side they are one
    complex number, and a rotation is one product. Queries and keys move alike, so that their
    products stay.
    """
    rows, *rest = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, *rest)
    return halves.transpose(1, 2).reshape(rows, *rest)


def _read_layer(layer: Any, heads: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def ordered(weight: Tensor) -> Tensor:
        return rotation_order(weight, heads)

    def kept(weight: Tensor) -> Tensor:
        return weight

    return Layer(
        attention_norm=layer.input_layernorm.weight.detach().clone(),
        attention_input=_fuse(
            [attention.q_proj, attention.k_proj, attention.v_proj], [ordered, ordered, kept]
        ),
        attention_output=_fuse([attention.o_proj]),
        mlp_norm=layer.post_attention_layernorm.weight.detach().clone(),
        mlp_input=_fuse([mlp.gate_proj, mlp.up_proj]),
        mlp_output=_fuse([mlp.down_proj]),
    )


def _fuse(
    linears: Sequence[Any], orders: Sequence[Callable[[Tensor], Tensor]] | None = None
) -> Projection:
    """Linear layers that read the same input as one; `orders` sort the outputs of each."""
    orders = orders or [lambda weight: weight] * len(linears)
    bases = [getattr(linear, "base_layer", linear) for linear in linears]
    dtype = computing_type(bases[0].weight)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        ordered = [order(tensor) for order, tensor in zip(orders, tensors, strict=True)]
        return torch.cat([tensor.detach().to(dtype) for tensor in ordered])

    weight = joined([base.weight for base in bases])
    bias = None if bases[0].bias is None else joined([base.bias for base in bases])
    adapters = [_active_adapters(linear) for linear in linears]
    downs = [down.to(dtype) for pairs in adapters for down, _ in pairs]
    if not downs:
        return Projection(pack(weight), bias)
    ups = []
    for base, order, pairs in zip(bases, orders, adapters, strict=True):
        none = weight.new_empty(base.out_features, 0)
        ups.append(order(torch.cat([none, *[up.to(dtype) for _, up in pairs]], 1)))
    return Projection(pack(weight), bias, torch.cat(downs), torch.block_diag(*ups))


def _active_adapters(linear: Any) -> list[tuple[Tensor, Tensor]]:
    """What peft's layer adds to its base layer: [rank, inputs] and [outputs, rank] each, scaled."""
    if not hasattr(linear, "base_layer") or linear.disable_adapters or linear.merged:
        return []
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    return [
        (linear.lora_A[name].weight, linear.lora_B[name].weight * linear.scaling[name])
        for name in names
    ]


def computing_type(weight: Tensor) -> torch.dtype:
    """The type that a product with a weight is taken in here: autocast's, or the weight's own."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype
