"""The arithmetic of a Llama on fused weights: a prompt's pass and one decoding step.

Both are plain functions of tensors. Rows of hidden states are [rows, width]: one per node of a
prompt's tree, or one per sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cotgen_pl.decoding.prefixes import Prefixes
from cotgen_pl.decoding.weights import Layer, Network


@dataclass
class Memory:
    """Keys and values of R sequences, and what a step reads beside the weights.

    Nothing in it changes its address: a captured step finds all of it where it was.
    """

    keys: list[Tensor]
    """Of each layer, rotated, [R, heads, S, head width]; the last two turned for `_attend`."""
    values: list[Tensor]
    """Of each layer, [R, heads, S, head width]."""
    bias: Tensor
    """0 where a position is seen, minus infinity where it is padding or empty, [R, 1, 1, S]."""
    turns: Tensor
    """The rotation at each position, complex, [S, head width / 2]."""
    offsets: Tensor
    """Each row's padding on the left, [R] int64."""
    position: Tensor
    """The last position that is filled, [1] int64."""
    tokens: Tensor
    """To append, one per image, [images] int64."""

    def rows_of_keys(self, layer: int) -> Tensor:
        """A layer's keys as [R, heads, S, head width], however they lie."""
        keys = self.keys[layer]
        return keys.transpose(2, 3) if _attends_by_products(keys) else keys

    def start(self, prefixes: Prefixes, source: Tensor) -> None:
        """Begin a batch whose row r continues row source[r], [R], of the prompts."""
        longest = prefixes.nodes.shape[1]
        self.offsets.copy_(prefixes.padding[source])
        columns = torch.arange(self.bias.shape[3], device=source.device)
        unseen = (columns < self.offsets[:, None]) | (columns >= longest)
        self.bias.zero_().masked_fill_(unseen[:, None, None], -math.inf)
        self.position.fill_(longest - 1)


def make_memory(
    network: Network, rows: int, images: int, length: int, rotation: tuple[Tensor, Tensor]
) -> Memory:
    """Room for so many sequences of a length.

    Args:
        network: Gives number, width and type of the layers' keys.
        rows: Sequences.
        images: Of which each is one, or two under guidance.
        length: Positions.
        rotation: Cosines and sines at each position, [S, head width] each, as transformers' own.
    """
    weight = network.layers[0].attention_input.weight
    width = weight.shape[0] // 3 // network.num_heads
    like = torch.empty(0, dtype=weight.dtype, device=weight.device)
    heads = rows, network.num_heads
    of_keys = (width, length) if _attends_by_products(like) else (length, width)
    cosines, sines = (part[:, : width // 2].contiguous() for part in rotation)
    return Memory(
        # Zeros: what no number has been written to may be not-a-number, and 0 times that is too.
        keys=[like.new_zeros(*heads, *of_keys) for _ in network.layers],
        values=[like.new_zeros(*heads, length, width) for _ in network.layers],
        bias=like.new_zeros(rows, 1, 1, length),
        turns=torch.complex(cosines, sines),
        offsets=like.new_zeros(rows, dtype=torch.int64),
        position=like.new_zeros(1, dtype=torch.int64),
        tokens=like.new_zeros(images, dtype=torch.int64),
    )


def read_prompts(
    network: Network, memory: Memory, prefixes: Prefixes, source: Tensor, hidden: Tensor
) -> Tensor:
    """Fill the memory with prompts and give the logits after them.

    The last layer's output is computed where prompts end and nowhere else: it is read there alone.

    Args:
        network: The weights.
        memory: Started with the same prefixes and source.
        prefixes: The prompts.
        source: Row of the prompts that each sequence continues, [R] int64.
        hidden: Embeddings of the nodes, [N, width].

    Returns:
        [P, V], in the head's type.
    """
    nodes, longest = prefixes.nodes, prefixes.nodes.shape[1]
    seen = torch.arange(longest, device=nodes.device) < prefixes.lengths[:, None]
    copied = prefixes.right_aligned()[source]
    turn = memory.turns[prefixes.positions][:, None, None]
    for number, layer in enumerate(network.layers):
        queries, keys, values = _attention_inputs(network, layer, hidden, turn)
        memory.rows_of_keys(number)[:, :, :longest] = keys[copied].transpose(1, 2)
        memory.values[number][:, :, :longest] = values[copied].transpose(1, 2)
        keys, values = keys[nodes].transpose(1, 2), values[nodes].transpose(1, 2)
        if number < len(network.layers) - 1:
            asked = queries[nodes].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(asked, keys, values, is_causal=True)
            mixed = mixed.transpose(1, 2).flatten(0, 1)[prefixes.places]
        else:
            hidden, asked = hidden[prefixes.ends], queries[prefixes.ends][:, :, None]
            mixed = F.scaled_dot_product_attention(asked, keys, values, seen[:, None, None])
        hidden = _finish_layer(network, layer, hidden, mixed.reshape(len(hidden), -1))
    return _logits(network, hidden)


def decode_step(network: Network, memory: Memory, length: int, *, masked: bool) -> Tensor:
    """Logits after `memory.tokens`, which stand at `memory.position`, [R, V] in the head's type.

    Run twice it gives the same twice, and nothing in it waits for the device: it can be captured.

    Args:
        network: The weights.
        memory: Written to at its position.
        length: Positions to read; those that are filled, or more if masked.
        masked: Whether any of them is padding or empty.
    """
    rows, images = len(memory.offsets), len(memory.tokens)
    hidden = network.codes[memory.tokens].repeat(rows // images, 1)
    bias = memory.bias.index_fill_(3, memory.position, 0)[..., :length] if masked else None
    turn = memory.turns[memory.position - memory.offsets][:, None, None]
    for number, layer in enumerate(network.layers):
        asked, key, value = (
            part[:, :, None] for part in _attention_inputs(network, layer, hidden, turn)
        )
        keys, values = memory.rows_of_keys(number), memory.values[number]
        keys.index_copy_(2, memory.position, key)
        values.index_copy_(2, memory.position, value)
        mixed = _attend(asked, keys[:, :, :length], values[:, :, :length], bias)
        hidden = _finish_layer(network, layer, hidden, mixed.reshape(rows, -1))
    return _logits(network, hidden)


def _attend(asked: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of one query to each row's positions, [R, heads, 1, head width].

    Torch's own is made for many queries: on a CPU, two products take two thirds of its time where
    neighbouring positions of the keys lie side by side.
    """
    if not _attends_by_products(keys):
        return F.scaled_dot_product_attention(asked, keys, values, bias)
    scores = (asked * asked.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    return (scores if bias is None else scores + bias).softmax(-1) @ values


def _attends_by_products(keys: Tensor) -> bool:
    """Not in bfloat16, where torch's own attention sums in float32 and two products would not."""
    return keys.device.type == "cpu" and keys.dtype in (torch.float32, torch.float64)


def _attention_inputs(
    network: Network, layer: Layer, hidden: Tensor, turn: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values: [rows, heads, head width] each."""
    normed = _normalise(hidden, layer.attention_norm, network.epsilon)
    parts = layer.attention_input(normed).view(len(hidden), 3, network.num_heads, -1)
    queries, keys = _rotate(parts[:, :2], turn).unbind(1)
    return queries, keys, parts[:, 2]


def _finish_layer(network: Network, layer: Layer, hidden: Tensor, mixed: Tensor) -> Tensor:
    """A layer's output from its input and what its attention mixed, [rows, width] each."""
    hidden = hidden + layer.attention_output(mixed)
    normed = _normalise(hidden, layer.mlp_norm, network.epsilon)
    gate, up = layer.mlp_input(normed).chunk(2, -1)
    return hidden + layer.mlp_output(F.silu(gate) * up)


def _logits(network: Network, hidden: Tensor) -> Tensor:
    hidden = _normalise(hidden, network.norm, network.epsilon)
    for number, projection in enumerate(network.head):
        hidden = projection(network.activation(hidden) if number else hidden)
    return hidden


def _rotate(pairs: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbours by its angle: one product of complex numbers.

    Args:
        pairs: [..., head width], in `rotation_order`.
        turn: Complex, of absolute value 1 (or a rotation's own scale), [..., head width / 2].
    """
    numbers = torch.view_as_complex(pairs.to(turn.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(numbers * turn).flatten(-2).to(pairs.dtype)


def _normalise(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm; in float64 with float32 inside, as transformers' own."""
    if hidden.dtype == torch.float64:
        return weight * F.rms_norm(hidden.float(), weight.shape, eps=epsilon).double()
    return F.rms_norm(hidden, weight.shape, weight, epsilon)
