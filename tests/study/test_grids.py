"""Picture grids of a made-up study: the same prompts for all, with the verdict under each."""

import io

from PIL import Image

from cotgen_pl.study.entries import Picture
from cotgen_pl.study.grids import comparison, pictures, read_picture
from tests.study.made_up import make_study, read_all


def test_comparison_has_a_column_for_base_and_each_algorithm(records, main):
    near, far = comparison(records, main, "three", labels={"reward": "broad"})
    assert (near.name, far.name) == ("three-near", "three-far")
    assert near.columns == ["prompt", "base", "dpo", "grpo"]
    assert [row[0] for row in near.rows] == ["a color | 0 <b>", "a shape | 2 <b>"]
    base, dpo, _ = near.rows[0][1:]
    assert base.lines() == ["0.40", "failed: color is wrong"]
    assert dpo.lines() == ["0.62", "failed: color is wrong"]
    assert base.name == "base-0-near-0"


def test_pictures_have_a_row_for_each_run_and_the_same_prompts(records, main):
    [table] = pictures(records, main, "all", per_suite=1)
    assert [row[0] for row in table.rows] == [
        "base",
        *(f"{reward}, {way}" for reward in main.axes["reward"] for way in main.axes["algorithm"]),
    ]
    assert len(table.columns) == 3
    assert {type(content) for row in table.rows for content in row[1:]} == {Picture}
    assert len({row[1].png for row in table.rows}) == 2  # the base's, and all others' shade


def test_picture_that_was_not_kept_is_not_there(tmp_path):
    study = make_study(tmp_path, seeds=(0,))
    (tmp_path / "main/broad-dpo/seed_0/evaluation/pictures/near/0.png").unlink()
    near, _ = comparison(read_all(study), study.groups["main"], "three", {"reward": "broad"})
    assert [type(content) for content in near.rows[0]] == [str, Picture, str, Picture]


def test_small_pictures_are_enlarged_and_large_ones_reduced(tmp_path):
    for side, shown in ((32, 96), (384, 192), (100, 100)):
        picture = Image.new("RGB", (side, side), "white")
        picture.putpixel((0, 0), (255, 0, 0))
        picture.save(tmp_path / "picture.png")
        png, width = read_picture(tmp_path / "picture.png")
        drawn = Image.open(io.BytesIO(png))
        assert drawn.size == (shown, shown) and width == shown
        if side == 32:
            assert drawn.getpixel((2, 2)) == (255, 0, 0) and drawn.getpixel((3, 3)) == (255,) * 3
