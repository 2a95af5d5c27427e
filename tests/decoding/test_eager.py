import pytest
import torch
from transformers.cache_utils import DynamicCache

from cotgen_pl.decoding.eager import StaticCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def prefix(rows=2, length=5, dtype=torch.float32):
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.randn(2, rows, HEADS, length, WIDTH).unbind()
        cache.update(keys.to(dtype), values.to(dtype), layer)
    return cache


def test_a_batch_repeats_the_rows_of_what_was_read():
    read = prefix()
    cache = StaticCache(read, torch.tensor([1, 0, 0]), length=8)
    keys, values = cache.update(*torch.ones(2, 3, HEADS, 1, WIDTH).unbind(), 1)
    assert keys.shape == values.shape == (3, HEADS, 6, WIDTH)
    assert torch.equal(keys[:, :, :5], read.layers[1].keys[[1, 0, 0]])
    assert torch.equal(values[:, :, :5], read.layers[1].values[[1, 0, 0]])
    assert (keys[:, :, 5] == 1).all()


def test_appending_counts_positions_and_moves_nothing():
    cache = StaticCache(prefix(), torch.tensor([0, 1]), length=8)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    assert cache.get_seq_length() == 5
    assert cache.layers[0].get_mask_sizes(1) == (6, 0)
    for _ in range(3):
        for layer in range(LAYERS):
            cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), layer)
    assert cache.get_seq_length() == cache.layers[0].get_max_length() == 8
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def test_appending_past_the_end_fails():
    cache = StaticCache(prefix(length=8), torch.tensor([0, 1]), length=8)
    with pytest.raises(AssertionError, match="past the end"):
        cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), 0)


def test_memory_has_the_type_that_autocast_computes_in():
    read = prefix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = StaticCache(read, torch.tensor([0, 1]), length=8)
    keys, values = cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, :5], read.layers[0].keys.bfloat16())
    outside = StaticCache(read, torch.tensor([0, 1]), length=8)
    assert outside.layers[0].keys.dtype == torch.float32
