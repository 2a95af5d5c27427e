import pytest
import torch

from cotgen_pl.decoding.settings import DecodingSettings, buckets_between, choose_bucket

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("filled", "length"), [(1, 128), (127, 128), (128, 128), (129, 256), (608, 640)]
)
def test_the_first_bucket_that_holds_all_is_read(filled, length):
    lengths = DecodingSettings().bucket_lengths(608, CUDA)
    assert lengths == (128, 256, 384, 512, 640)
    assert choose_bucket(filled, lengths) == length


def test_a_full_last_bucket_is_not_followed_by_an_empty_one():
    assert DecodingSettings().bucket_lengths(256, CUDA) == (128, 256)


@pytest.mark.parametrize(
    ("first", "last", "needed"),
    [(33, 608, (128, 256, 384, 512, 640)), (120, 128, (128,)), (129, 300, (256, 384)), (5, 4, ())],
)
def test_a_batch_needs_no_bucket_that_its_prompts_fill(first, last, needed):
    assert buckets_between(first, last, (128, 256, 384, 512, 640)) == needed


def test_without_buckets_each_number_of_positions_is_one():
    assert buckets_between(3, 5, None) == (3, 4, 5)


def test_elsewhere_exactly_what_is_filled_is_read():
    lengths = DecodingSettings().bucket_lengths(608, CPU)
    assert choose_bucket(33, lengths) == 33


def test_named_buckets_count_everywhere():
    assert DecodingSettings(buckets=(50, 90)).bucket_lengths(60, CPU) == (50, 90)


@pytest.mark.parametrize("buckets", [(), (0, 128), (128, 128), (256, 128)])
def test_buckets_that_do_not_rise_are_refused(buckets):
    with pytest.raises(ValueError, match=r"expected decoding.buckets to be rising .* got"):
        DecodingSettings(buckets=buckets)
