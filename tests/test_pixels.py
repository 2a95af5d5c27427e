"""Pictures on their way into a scorer, against Pillow and NumPy, transformers and torchvision."""

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tvf
from transformers.image_transforms import center_crop

from cotgen_pl.pixels import (
    as_rgb,
    crop_centre,
    normalise,
    pad_to_square,
    resize,
    resize_shorter,
    round_to_bytes,
    to_pillow,
)

STEP = 1 / 255
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIZES = [(384, 384), (480, 640), (1024, 1024), (640, 480), (101, 60), (32, 32)]


def draw_picture(height: int, width: int, kind: str = "scene") -> numpy.ndarray:
    """[height, width, 3] uint8: a `scene` of shades, waves and a hard edge; `noise`; or `edges`."""
    random = numpy.random.default_rng(0)
    if kind == "noise":
        return random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    if kind == "edges":
        return random.integers(0, 2, (height, width, 3), dtype=numpy.uint8) * 255
    rows, columns = numpy.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = 0.5 + 0.5 * numpy.sin(40 * rows + 25 * columns)
    disc = (rows - 0.4) ** 2 + (columns - 0.6) ** 2 < 0.04
    picture = numpy.stack([columns, waves, 1 - rows * columns], axis=-1)
    picture[disc] = (0.9, 0.1, 0.2)
    return (picture * 255).round().astype(numpy.uint8)


def as_tensor(pixels: numpy.ndarray) -> torch.Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] in [0, 1]."""
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255


def as_array(images: torch.Tensor) -> numpy.ndarray:
    """[1, 3, H, W] in [0, 1] to [H, W, 3]."""
    return images[0].permute(1, 2, 0).numpy()


def square_with_pillow(picture: Image.Image, size: int, *, floor: bool = False) -> numpy.ndarray:
    """Shorter side to `size`, bicubic, then the middle, by Pillow and NumPy: [size, size, 3] <= 1.

    Where the middle is half a pixel off: the even place, or the upper left one with `floor`.
    """
    width, height = picture.size
    shorter = min(width, height)
    fitted = (size * width // shorter, size * height // shorter)
    resized = numpy.asarray(picture.convert("RGB").resize(fitted, FILTERS["bicubic"]))
    halves = [(side - size) / 2 for side in resized.shape[:2]]
    top, left = [int(half if floor else numpy.rint(half)) for half in halves]
    return resized[top : top + size, left : left + size] / 255.0


@pytest.mark.parametrize("mode", FILTERS)
@pytest.mark.parametrize("kind", ["scene", "noise", "edges"])
@pytest.mark.parametrize("sizes", [((480, 640), (224, 298)), ((32, 32), (224, 224))])
def test_resizing_is_pillows_to_one_step(sizes, kind, mode):
    pixels = draw_picture(*sizes[0], kind)
    height, width = sizes[1]
    expected = Image.fromarray(pixels).resize((width, height), FILTERS[mode])
    difference = as_array(resize(as_tensor(pixels), height, width, mode)) * 255 - expected
    assert numpy.abs(difference).max() < 1.01  # steps of 256
    assert (numpy.abs(difference) > 0.5).mean() < 0.05  # by rounding at a half


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("size", [224, 33])
@pytest.mark.parametrize("floor", [True, False])
def test_squares_are_pillows_to_one_step(shape, size, floor):
    pixels = draw_picture(*shape)
    result = crop_centre(resize_shorter(as_tensor(pixels), size), size, floor=floor)
    expected = square_with_pillow(Image.fromarray(pixels), size, floor=floor)
    assert result.shape == (1, 3, size, size)
    assert numpy.abs(as_array(result) - expected).max() < 1.01 * STEP


@pytest.mark.parametrize(("height", "width"), [(5, 9), (6, 9), (7, 8), (10, 4), (4, 4), (11, 7)])
def test_the_middle_is_torchvisions_or_transformers(height, width):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crop_centre(images, 4), tvf.center_crop(images, [4, 4]))
    theirs = center_crop(images[0].numpy(), (4, 4), "channels_first", "channels_first")
    assert numpy.array_equal(crop_centre(images, 4, floor=True)[0], theirs)


def test_a_picture_that_fits_is_only_rounded():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_shorter(images, 8), round_to_bytes(images))
    assert torch.equal(crop_centre(images, 8), images)


def test_rounding_to_bytes():
    values = torch.tensor([-0.1, 0.0, 0.4, 0.5, 0.6, 2.5, 255.0, 331.0]) / 255
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 3.0, 255.0, 255.0]) / 255
    torch.testing.assert_close(round_to_bytes(values), expected, atol=1e-7, rtol=0)
    every = torch.arange(256) / 255
    assert torch.equal(round_to_bytes(every), every)
    assert round_to_bytes(every.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(4, 9), (9, 4), (5, 8), (6, 6)])
def test_padding_is_centred_with_the_odd_pixel_right_and_below(height, width):
    pixels = draw_picture(height, width)
    side = max(height, width)
    expected = numpy.full((side, side, 3), 127, dtype=numpy.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    expected[top : top + height, left : left + width] = pixels
    result = as_array(pad_to_square(as_tensor(pixels), 127 / 255))
    assert numpy.array_equal(result, expected.astype(numpy.float32) / 255)


def test_normalising_is_by_channel():
    images = torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    result = normalise(images, (0.1, 0.3, 0.5), (0.5, 0.1, 0.2))
    assert result.shape == images.shape
    torch.testing.assert_close(result[1, :, 2, 3], torch.tensor([0.0, 2.0, 2.0]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_channels_are_those_of_pillows_convert(mode):
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=numpy.uint8)
    picture = Image.fromarray(pixels, "RGBA").convert(mode)
    images = as_tensor(numpy.asarray(picture).reshape(6, 7, -1))
    assert images.shape[1] == len(mode)
    expected = as_tensor(numpy.asarray(picture.convert("RGB")))
    assert torch.equal(as_rgb(images), expected)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 5, 8, 8)])
def test_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected pictures \[B, 1, 3 or 4, H, W\], got"):
        as_rgb(torch.zeros(shape))


def test_pillow_pictures_hold_the_same_bytes():
    pixels = draw_picture(5, 7, "noise")
    [picture, other] = to_pillow(torch.cat([as_tensor(pixels), as_tensor(255 - pixels)]))
    assert picture.mode == "RGB" and numpy.array_equal(numpy.asarray(picture), pixels)
    assert numpy.array_equal(numpy.asarray(other), 255 - pixels)
