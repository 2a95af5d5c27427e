"""The grid of pictures: what is on it, and when it is drawn."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cotgen_pl.callbacks.samples import (
    GREEN,
    LINE,
    MOST_BOXES,
    RED,
    Box,
    SampleGrid,
    draw_grid,
    find_boxes,
    log_picture,
    read_verdict,
)
from cotgen_pl.data.prompts import PromptFile
from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.modules.sft import SFTModule
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from tests.toys import (
    Brightness,
    Fixed,
    Memory,
    fit,
    make_grpo,
    make_policy,
    make_trainer,
    sgd,
    write_prompts,
)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


# The sheet --------------------------------------------------------------------------------------


def test_pictures_are_enlarged_and_stand_in_their_rows():
    images = torch.zeros(4, 3, 4, 4)
    for number in range(4):
        images[number, :, 0, 0] = number / 4
        images[number, 0] = 1.0
    sheet = pixels(draw_grid(images, [Prompt("p")] * 4, torch.zeros(4), columns=2))
    side = 144  # 36 times 4
    top, left = 6, 6
    assert (sheet[top + 40 : top + side, left : left + side] == [255, 0, 0]).all()
    right = left + side + 6
    assert (sheet[top, right] == [255, 64, 64]).all()  # the second picture's first pixel
    below = sheet.shape[0] - (sheet.shape[0] - 6) // 2
    assert (sheet[below : below + 10, left] == [255, 128, 128]).all()
    assert sheet.shape[1] == 6 + 2 * (side + 6)


def test_prompt_and_score_are_written_under_each_picture():
    images = torch.ones(2, 3, 4, 4)

    def below(text: str, score: float) -> np.ndarray:
        sheet = draw_grid(images, [Prompt(text)] * 2, torch.full((2,), score), columns=2)
        return pixels(sheet)[6 + 144 :]

    plain = below("one cat", 0.25)
    assert (plain < 128).any()  # ink
    for other in (below("one cow", 0.25), below("one cat", 0.75)):
        assert other.shape == plain.shape and (other != plain).any()
    assert np.array_equal(plain, below("one cat", 0.25))
    longer = below("a very long prompt that runs over several lines below its picture", 0.25)
    assert longer.shape[0] > plain.shape[0]


def test_large_pictures_keep_their_size():
    sheet = draw_grid(torch.rand(1, 3, 200, 200), [Prompt("p")], torch.zeros(1), columns=1)
    assert sheet.width == 200 + 2 * 6


# In the loop ------------------------------------------------------------------------------------


def grid_of(folder, **arguments) -> SampleGrid:
    settings = {"num_prompts": 3, "images_per_prompt": 2, "every_n_updates": 2}
    return SampleGrid([write_prompts(folder)], **(settings | arguments))


def test_start_middle_and_end_are_drawn_with_the_same_noise(tiny_janus, tmp_path):
    logger = TensorBoardLogger(tmp_path, "", "")
    module = make_grpo(tiny_janus, images_budget=24, optimizer=sgd(0.0))
    fit(module, tmp_path, grid_of(tmp_path), logger=[Memory(), logger])
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["000000.png", "000002.png", "000003.png"]
    start, *later = (pixels(Image.open(file)) for file in files)
    assert start.shape == (3 * (start.shape[0] - 6) // 3 + 6, 2 * (144 + 6) + 6, 3)
    assert all(np.array_equal(start, other) for other in later)  # nothing was learnt
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    logged = events.Images("samples")
    assert [(picture.step, picture.width) for picture in logged] == [
        (step, start.shape[1]) for step in (0, 2, 3)
    ]


def test_pictures_change_as_the_policy_does(tiny_janus, tmp_path):
    fit(make_grpo(tiny_janus, images_budget=16, optimizer=sgd(50.0)), tmp_path, grid_of(tmp_path))
    start, end = (pixels(Image.open(tmp_path / f"samples/{step:06d}.png")) for step in (0, 2))
    assert (start != end).any()


def test_its_own_reward_is_the_one_drawn(tiny_janus, tmp_path):
    sheets = []
    for reward in (None, Fixed([0.125])):
        fit(make_grpo(tiny_janus), tmp_path, grid_of(tmp_path, reward=reward))
        sheets.append(pixels(Image.open(tmp_path / "samples/000000.png")))
    assert (sheets[0] != sheets[1]).any()


def test_prompts_are_spread_over_the_files(tmp_path):
    grid = SampleGrid([write_prompts(tmp_path, tuple("abcdef"))], num_prompts=3)
    assert [(prompt.text, prompt.index) for prompt in grid.prompts] == [
        ("a", 0),
        ("c", 2),
        ("e", 4),
    ]
    few = SampleGrid([write_prompts(tmp_path, tuple("ab"))], num_prompts=6)
    assert [prompt.text for prompt in few.prompts] == ["a", "b"]


def test_a_module_without_a_reward_needs_one_here(tiny_janus, tmp_path):
    module = SFTModule(make_policy(tiny_janus))
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="SampleGrid got no reward and SFTModule trains on none"):
        grid_of(tmp_path).setup(module.trainer, module, "fit")
    grid_of(tmp_path, reward=Brightness()).show(module.trainer, module)
    assert (tmp_path / "samples/000000.png").exists()


class Marked(Brightness):
    required_facts = ("mark",)


@pytest.mark.parametrize(
    ("texts", "reward", "message"),
    [
        (("one",), Marked(), r"grid.txt:1: expected the facts \['mark'\] for reward Marked"),
        (("one", "word " * 5000), None, "expected a prompt of at most"),
    ],
)
def test_unfit_prompts_stop_a_run_before_weights_load(
    tiny_janus, tmp_path, monkeypatch, texts, reward, message
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    (tmp_path / "grid.txt").write_text("\n".join(texts))
    grid = SampleGrid([PromptFile(str(tmp_path / "grid.txt"), "text")], reward)
    with pytest.raises(ValueError, match=message):
        fit(make_grpo(tiny_janus), tmp_path, grid)


@pytest.mark.parametrize("name", ["num_prompts", "images_per_prompt", "every_n_updates"])
def test_sizes_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        grid_of(tmp_path, **{name: 0})


def test_a_logger_with_log_image_gets_pictures():
    class Takes(Memory):
        def log_image(self, key, images, step):
            self.rows[step][key] = images

    taker, other = Takes(), Memory()
    picture = Image.new("RGB", (3, 2))
    log_picture(taker, "samples", picture, 5)
    log_picture(other, "samples", picture, 5)
    assert taker.rows[5]["samples"] == [picture] and not other.rows


# Verdicts and boxes -----------------------------------------------------------------------------


CLAUSES = {"failed": ["count 0: 3", "color 1: red"], "objects": [{"shape": "circle", "row": 1}]}
FOUND = [
    {"label": "bench", "score": 0.9, "box": [8.0, 16.0, 40.0, 48.0], "color": "green"},
    {"label": "bowl", "score": 0.5, "box": [0.0, 0.0, 64.0, 64.0]},
]
DETECTED = {
    "phrases": {
        "cup": {"best": 0.625, "scores": [0.625, 0.375], "boxes": [[0.0, 1, 2, 3], [4.0, 5, 6, 7]]},
        "dog": {"best": 0.125, "scores": [], "boxes": []},
    }
}


@pytest.mark.parametrize(
    ("details", "lines"),
    [
        (CLAUSES, [("failed: count 0: 3", RED), ("failed: color 1: red", RED)]),
        ({"failed": [], "objects": []}, [("all clauses hold", GREEN)]),
        ({"failure": "no answer"}, [("no verdict: no answer", RED)]),
        (
            {"phrases": [{"phrase": "a cup", "yes": 0.5}, {"phrase": "a dog", "yes": 0.25}]},
            [("a cup 0.50", GREEN), ("a dog 0.25", RED)],
        ),
        ({"phrases": ["cup", "dog"], "yes": [1.0, 0.0]}, [("cup 1.00", GREEN), ("dog 0.00", RED)]),
        (DETECTED, [("cup 0.62", GREEN), ("dog 0.12", RED)]),
        (
            {"geneval": {"failed": []}, "vqa": {"phrases": ["cup"], "yes": [1.0]}},
            [("geneval: all clauses hold", GREEN), ("vqa: cup 1.00", GREEN)],
        ),
        ({"phrases": []}, []),
        ({"chances": [0.5, 0.5]}, []),
        ({}, []),
    ],
)
def test_what_a_verdict_says(details, lines):
    assert list(read_verdict(details)) == lines


def test_the_exact_judges_verdict_is_read():
    prompt = Prompt(
        "a photo of a red circle",
        facts={"include": [{"class": "circle", "count": 1, "color": "red"}], "exclude": []},
    )
    scores = ShapesOracle("geneval").score(torch.ones(1, 3, 32, 32), [prompt])
    assert list(read_verdict(scores.details[0])) == [("failed: color 0: red", RED)]
    assert list(find_boxes(scores.details[0])) == []


def test_boxes_are_found_wherever_they_stand():
    expected = [
        Box("green bench", 0.9, (8.0, 16.0, 40.0, 48.0)),
        Box("bowl", 0.5, (0.0, 0.0, 64.0, 64.0)),
        Box("cup", 0.625, (0.0, 1, 2, 3)),
        Box("cup", 0.375, (4.0, 5, 6, 7)),
    ]
    details = {"geneval": {"failed": [], "objects": FOUND}, "dino": DETECTED}
    assert list(find_boxes(details)) == expected


@pytest.mark.parametrize("size", [32, 64, 384])
def test_boxes_are_drawn_where_they_are(size):
    objects = [{"label": "b", "score": 0.5, "box": [0.25 * size, 0.5 * size, size, size]}]
    plain, boxed = (
        pixels(draw_grid(torch.ones(1, 3, size, size), [Prompt("p")], torch.zeros(1), 1, details))
        for details in (None, [{"objects": objects}])
    )
    assert plain.shape == boxed.shape
    side = size * max(1, -(-144 // size))
    changed = (plain != boxed).any(-1)[6 : 6 + side, 6 : 6 + side]
    assert not changed[: side // 2].any() and not changed[:, : side // 4].any()
    assert changed[side // 2, side // 4 :].all() and changed[side // 2 :, side // 4].all()
    assert changed[-1, side // 4 :].all() and changed[side // 2 :, -1].all()
    assert not changed[-10:-4, -20:-4].any()  # its inside is the picture's
    assert not (plain != boxed).any(-1)[6 + side :].any()


def test_labels_stay_on_the_picture_and_say_what_was_found():
    def draw(label: str, left: float) -> np.ndarray:
        objects = [{"label": label, "score": 0.5, "box": [left, 0.0, 144.0, 144.0]}]
        sheet = draw_grid(
            torch.ones(1, 3, 144, 144), [Prompt("p")], torch.zeros(1), 1, [{"objects": objects}]
        )
        return pixels(sheet)

    assert (draw("cat", 0.0) != draw("cow", 0.0)).any()
    late = draw("a long label", 140.0)
    assert (late[:, 6 + 144 :] == [232, 232, 232]).all()  # the sheet's margin
    assert (late[8:18, 60:140] != 255).any()  # moved to the left


def test_only_the_surest_boxes_are_drawn():
    def draw(number: int) -> np.ndarray:
        objects = [
            {"label": "b", "score": 1 - i / 100, "box": [10.0 * i, 10.0 * i, 10.0 * i + 9, 200.0]}
            for i in range(number)
        ]
        prompts = [Prompt("p")]
        details = [{"objects": objects}]
        return pixels(draw_grid(torch.ones(1, 3, 200, 200), prompts, torch.zeros(1), 1, details))

    assert np.array_equal(draw(MOST_BOXES), draw(MOST_BOXES + 5))
    assert not np.array_equal(draw(MOST_BOXES), draw(MOST_BOXES - 1))


def test_a_long_verdict_is_cut_and_says_so():
    def height(*clauses: str) -> int:
        details = [{"failed": list(clauses)}]
        return draw_grid(torch.ones(1, 3, 4, 4), [Prompt("p")], torch.zeros(1), 1, details).height

    assert height("a") == height("a", "b") - LINE
    assert height(*"abcdef") == height(*"abcdefghijkl")


class Judging(Brightness):
    def score(self, images, prompts):
        details = [{"failed": ["all of it"]} for _ in prompts]
        return Scores.single("judging", super().score(images, prompts).total, details)


def test_the_rewards_details_are_on_the_grid(tiny_janus, tmp_path):
    sheets = []
    for reward in (Brightness(), Judging()):
        fit(make_grpo(tiny_janus), tmp_path, grid_of(tmp_path, reward=reward))
        sheets.append(pixels(Image.open(tmp_path / "samples/000000.png")))
    below = [sheet[6 + 144 : 6 + 144 + 3 * LINE - 2] for sheet in sheets]  # down to the verdict
    assert [(texts[..., 0] - texts[..., 1] > 60).any() for texts in below] == [False, True]  # red
