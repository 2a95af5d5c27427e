import pytest
import torch
from transformers.cache_utils import DynamicCache

from cotgen_pl.cache import StaticCache

LAYERS, HEADS, WIDTH = 2, 3, 4


def prefix(rows=2, length=5, dtype=torch.float32):
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys, values = torch.randn(2, rows, HEADS, length, WIDTH).unbind()
        cache.update(keys.to(dtype), values.to(dtype), layer)
    return cache


def addresses(cache):
    return [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]


def test_filling_repeats_the_rows_of_the_prefix():
    read = prefix()
    cache = StaticCache(rows=4, length=8, prefix=read)
    cache.fill(read, torch.tensor([1, 0, 0]))
    keys, values = cache.update(*torch.ones(2, 3, HEADS, 1, WIDTH).unbind(), 1)
    assert keys.shape == values.shape == (3, HEADS, 6, WIDTH)
    assert torch.equal(keys[:, :, :5], read.layers[1].keys[[1, 0, 0]])
    assert torch.equal(values[:, :, :5], read.layers[1].values[[1, 0, 0]])
    assert (keys[:, :, 5] == 1).all()


def test_appending_counts_positions():
    read = prefix()
    cache = StaticCache(rows=2, length=8, prefix=read)
    cache.fill(read, torch.tensor([0, 1]))
    assert cache.get_seq_length() == 5
    assert cache.layers[0].get_mask_sizes(1) == (6, 0)
    for _ in range(3):
        for layer in range(LAYERS):
            cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), layer)
    assert cache.get_seq_length() == cache.layers[0].get_max_length() == 8


def test_appending_past_the_end_fails():
    read = prefix(length=8)
    cache = StaticCache(rows=2, length=8, prefix=read)
    cache.fill(read, torch.tensor([0, 1]))
    with pytest.raises(AssertionError, match="past the end"):
        cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), 0)


def test_refilling_uses_the_same_memory_and_forgets_what_was_there():
    cache = StaticCache(rows=4, length=8, prefix=prefix())
    before = addresses(cache)
    cache.fill(prefix(length=7), torch.tensor([0, 0, 1, 1]))
    shorter = prefix(length=3)
    cache.fill(shorter, torch.tensor([1]))
    keys, _ = cache.update(*torch.zeros(2, 1, HEADS, 1, WIDTH).unbind(), 0)
    assert keys.shape == (1, HEADS, 4, WIDTH)
    assert torch.equal(keys[:, :, :3], shorter.layers[0].keys[[1]])
    assert addresses(cache) == before


@pytest.mark.parametrize(
    ("rows", "length", "fits"), [(4, 8, True), (1, 2, True), (5, 8, False), (4, 9, False)]
)
def test_room_is_rows_and_positions(rows, length, fits):
    cache = StaticCache(rows=4, length=8, prefix=prefix())
    assert cache.fits(rows, length, prefix()) is fits


def test_another_type_does_not_fit():
    cache = StaticCache(rows=4, length=8, prefix=prefix())
    assert not cache.fits(4, 8, prefix(dtype=torch.float64))


def test_memory_has_the_type_that_autocast_computes_in():
    read = prefix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = StaticCache(rows=2, length=8, prefix=read)
        cache.fill(read, torch.tensor([0, 1]))
        assert cache.fits(2, 8, read)
    keys, values = cache.update(*torch.randn(2, 2, HEADS, 1, WIDTH).unbind(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, :5], read.layers[0].keys.bfloat16())
    assert not cache.fits(2, 8, read), "outside of autocast the same prefix stays float32"
