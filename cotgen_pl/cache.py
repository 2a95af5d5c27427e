"""Keys and values of what has been read and drawn, in memory that is allocated once and used again.

Kept apart from the policies because it serves any language model of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class StaticCache(Cache):
    """A cache whose memory outlives the batch that it was made for.

    Args:
        rows: Sequences that it can hold.
        length: Positions that it can hold.
        prefix: Gives the number of layers and heads, the head width, the type and the device.
    """

    def __init__(self, rows: int, length: int, prefix: DynamicCache) -> None:
        layers: Any = [_StaticLayer(rows, length, _keys(layer)) for layer in prefix.layers]
        super().__init__(layers=layers)

    def fits(self, rows: int, length: int, prefix: DynamicCache) -> bool:
        """Whether so many sequences of such a length have room."""
        own, new = _keys(self.layers[0]), _keys(prefix.layers[0])
        room = own.shape[0] >= rows and own.shape[2] >= length
        return room and (own.dtype, own.device) == (_stored_type(new), new.device)

    def fill(self, prefix: DynamicCache, index: Tensor) -> None:
        """Start a batch: its row r continues row index[r] of the prefix; index is [R] int64."""
        for own, read in zip(self.layers, prefix.layers, strict=True):
            assert isinstance(own, _StaticLayer)
            own.start(_keys(read)[index], _values(read)[index])


@dataclass
class Decoding:
    """Where a batch of images stands while it is drawn."""

    memory: StaticCache
    mask: Tensor  # [R, prefix + T] bool, False on left padding
    guided: bool


class _StaticLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, positions, width], filled from the left.

    Under autocast they have its type: rotation lifts keys to float32 there, and attention would
    cast all of them down again at every step.
    """

    def __init__(self, rows: int, length: int, like: Tensor) -> None:
        super().__init__()
        shape = rows, like.shape[1], length, like.shape[3]
        self.keys = like.new_empty(shape, dtype=_stored_type(like))
        self.values = torch.empty_like(self.keys)
        self.filled = self.rows = 0
        self.is_initialized = True

    def start(self, keys: Tensor, values: Tensor) -> None:
        self.rows, self.filled = keys.shape[0], 0
        self.update(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.filled + key_states.shape[2]
        assert end <= self.get_max_length(), "an assignment past the end would be lost silently"
        keys, values = _keys(self)[: self.rows], _values(self)[: self.rows]
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
