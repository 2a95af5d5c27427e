"""Drawing through a language model's own layers, in memory that is allocated once per batch.

The reference that `fused.py` is held to, and the path for models that it cannot read. Kept apart
from the policies because it serves any language model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

# What transformers calls keys and values of before: renamed in 5.24, the old name goes in 5.40.
CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


class StaticCache(Cache):
    """Room for a batch: its row r continues row index[r] of what was read.

    Args:
        prefix: What was read.
        index: [R] int64.
        length: Positions that each row can hold.
    """

    def __init__(self, prefix: DynamicCache, index: Tensor, length: int) -> None:
        layers: Any = [
            _StaticLayer(_keys(layer)[index], _values(layer)[index], length)
            for layer in prefix.layers
        ]
        super().__init__(layers=layers)


@dataclass
class EagerDrawing:
    """Where a batch of images stands while it is drawn."""

    memory: StaticCache
    mask: Tensor
    """False on left padding, [R, prefix + T] bool."""
    branches: int
    """Rows of an image: 2 under guidance, else 1."""
    embed: Callable[[Tensor], Tensor]
    """Tokens [images, 1] to embeddings [images, 1, width]."""
    body: Callable[..., Tensor]
    """Embeddings, mask [R, 1, 1, filled], positions [R, 1] and memory to hidden [R, 1, width]."""
    head: Callable[[Tensor], Tensor]
    """The last to logits."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each image, [images] int64, and give the next logits, [R, V]."""
        embedded = self.embed(tokens[:, None]).repeat(self.branches, 1, 1)
        mask = self.mask[:, : self.memory.get_seq_length() + 1]
        positions = mask.long().sum(-1, keepdim=True) - 1
        return self.head(self.body(embedded, mask[:, None, None], positions, self.memory)[:, -1])


class _StaticLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, positions, width], filled from the left.

    Under autocast they have its type: rotation lifts keys to float32 there, and attention would
    cast all of them down again at every step.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        shape = keys.shape[0], keys.shape[1], length, keys.shape[3]
        self.keys = keys.new_empty(shape, dtype=_stored_type(keys))
        self.values = torch.empty_like(self.keys)
        self.filled = 0
        self.is_initialized = True
        self.update(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.filled + key_states.shape[2]
        assert end <= self.get_max_length(), "an assignment past the end would be lost silently"
        keys, values = _keys(self), _values(self)
        keys[:, :, self.filled : end] = key_states
        values[:, :, self.filled : end] = value_states
        self.filled = end
        return keys[:, :, :end], values[:, :, :end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """All memory is there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return _keys(self).shape[2]


def _keys(layer: Any) -> Tensor:
    keys: Tensor = layer.keys
    return keys


def _values(layer: Any) -> Tensor:
    values: Tensor = layer.values
    return values


def _stored_type(like: Tensor) -> torch.dtype:
    device = like.device.type
    if like.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return like.dtype
