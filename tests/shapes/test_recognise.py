import random

import pytest
import torch
import torch.nn.functional as F

from cotgen_pl.shapes.recognise import Recognition, recognise
from cotgen_pl.shapes.render import COLORS, SHAPES, TEXTURES, Placed, render

CELLS = [(row, column) for row in range(4) for column in range(4)]


def random_scenes(count: int) -> list[list[Placed]]:
    rng = random.Random(0)
    return [
        [
            Placed(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(TEXTURES), row, column)
            for row, column in sorted(rng.sample(CELLS, rng.randint(0, 16)))
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def scenes():
    return random_scenes(3000)


@pytest.fixture(scope="module")
def pictures(scenes):
    return torch.stack([render(scene) for scene in scenes])


def test_thousands_of_renderings_are_read_without_error(scenes, pictures):
    assert recognise(pictures) == [Recognition(scene) for scene in scenes]


def test_mild_noise_is_read_without_error(scenes, pictures):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    found = recognise((pictures + 0.07 * noise).clamp(0, 1))
    assert [f.objects for f in found] == scenes


def test_mild_blur_is_read_without_error(scenes, pictures):
    line = torch.tensor([0.08, 0.84, 0.08])
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    assert [f.objects for f in recognise(blurred)] == scenes


def unreal_pictures(pictures):
    generator = torch.Generator().manual_seed(2)
    ramp = torch.linspace(0, 1, 32)
    clouds = torch.rand(50, 3, 4, 4, generator=generator)
    yield "uniform noise", torch.rand(50, 3, 32, 32, generator=generator)
    yield "horizontal gradient", ramp.expand(1, 3, 32, 32)
    yield "vertical gradient", ramp[:, None].expand(1, 3, 32, 32)
    yield "inverted", 1 - pictures[:500]
    yield "black", torch.zeros(1, 3, 32, 32)
    yield "grey", torch.full((1, 3, 32, 32), 0.5)
    yield "pale grey", torch.full((1, 3, 32, 32), 0.87)
    yield "one colour", torch.tensor([0.8, 0.1, 0.15]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    yield "photo-like", F.interpolate(clouds, size=32, mode="bicubic").clamp(0, 1)
    yield "not a number", torch.full((1, 3, 32, 32), float("nan"))


def test_what_is_no_picture_of_shapes_is_rejected(pictures):
    for name, images in unreal_pictures(pictures):
        assert not any(found.is_picture for found in recognise(images)), name


def test_a_few_unreadable_cells_are_named_and_a_fifth_one_is_too_many():
    picture = render([Placed("circle", "red", "plain", 0, 0)])
    for column in range(4):
        picture[:, 24:, 8 * column : 8 * column + 8] = 0.4
    (found,) = recognise(picture[None])
    assert found.objects == [Placed("circle", "red", "plain", 0, 0)]
    assert found.unreadable == [(3, 0), (3, 1), (3, 2), (3, 3)]
    assert found.is_picture
    picture[:, 16:24, :8] = 0.4
    assert not recognise(picture[None])[0].is_picture


def test_a_blank_picture_is_a_picture_without_objects():
    assert recognise(torch.ones(2, 3, 32, 32)) == [Recognition([]), Recognition([])]


def test_no_pictures_give_no_readings():
    assert recognise(torch.ones(0, 3, 32, 32)) == []


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 32, 32), (1, 1, 32, 32)])
def test_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected pictures of the Shapes world.*got \("):
        recognise(torch.ones(shape))
