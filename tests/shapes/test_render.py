import pytest
import torch

from cotgen_pl.shapes.render import COLORS, SHAPES, TEXTURES, Placed, render, tiles


def test_there_are_sixty_different_tiles():
    kinds, drawings = tiles()
    assert len(set(kinds)) == len(SHAPES) * len(COLORS) * len(TEXTURES) == 60
    assert drawings.shape == (60, 3, 8, 8)
    assert drawings.min() >= 0 and drawings.max() <= 1
    distances = torch.cdist(drawings.flatten(1), drawings.flatten(1), p=1) / 192
    distances.fill_diagonal_(1.0)
    assert distances.min() == pytest.approx(0.0588, abs=1e-3)


def test_an_object_fills_its_own_cell_only():
    picture = render([Placed("square", "red", "plain", row=1, column=2)])
    assert picture.shape == (3, 32, 32)
    changed = (picture != 1).any(0).nonzero()
    assert changed.min(0).values.tolist() == [9, 17]  # cell (1, 2) without the square's margin
    assert changed.max(0).values.tolist() == [14, 22]
    assert picture[:, 12, 20].tolist() == pytest.approx([210 / 255, 30 / 255, 40 / 255])


def test_stripes_darken_every_second_pair_of_rows():
    plain = render([Placed("cross", "green", "plain", 0, 0)])
    striped = render([Placed("cross", "green", "striped", 0, 0)])
    dark = (striped < plain).any(0).any(1).nonzero().flatten()
    assert dark.tolist() == [2, 3, 6, 7]


def test_no_objects_give_a_white_picture():
    assert (render([]) == 1).all()


def test_two_objects_in_a_cell_are_refused():
    objects = [Placed("circle", "red", "plain", 3, 0), Placed("square", "blue", "plain", 3, 0)]
    with pytest.raises(ValueError, match=r"two objects in cell \(3, 0\)"):
        render(objects)


def test_boxes_are_pixels():
    assert Placed("circle", "red", "plain", row=1, column=3).box == (24, 8, 32, 16)
