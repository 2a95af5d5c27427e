"""GenEvalReward on a small random detector and CLIP, and with a detector that knows the answer."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cotgen_pl.interfaces import Prompt
from cotgen_pl.pixels import to_pillow
from cotgen_pl.rewards import geneval
from cotgen_pl.rewards.detectors import Instance, fit_pictures, plan_size
from cotgen_pl.rewards.geneval import COLORS, GenEvalReward, cut_out
from tests.rewards.test_clip_score import write as write_clip
from tests.rewards.test_detectors import NAMES, build_detector

CUP = {"class": "cup", "count": 1}
PROMPTS = [
    Prompt("a photo of a cup", category="single_object", facts={"include": [CUP]}),
    Prompt("a photo of a red cup", category="colors", facts={"include": [CUP | {"color": "red"}]}),
    Prompt(
        "a photo of two cups",
        category="counting",
        facts={
            "include": [{"class": "cup", "count": 2}],
            "exclude": [{"class": "cup", "count": 3}],
        },
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments for a reward whose weights are small and random."""
    folder = tmp_path_factory.mktemp("geneval")
    build_detector().save_pretrained(folder / "detector")
    (folder / "clip").mkdir()
    clip = write_clip(folder / "clip")
    (folder / "object_names.txt").write_text("\n".join(NAMES) + "\n")
    names = folder / "object_names.txt"
    return {"path": str(folder / "detector"), "names": str(names), "clip": str(clip)}


@pytest.fixture(scope="module")
def reward(files):
    return GenEvalReward(**files).load()


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(1))


class Finds(nn.Module):
    """A detector that finds what it was told, in each picture alike."""

    def __init__(self, *found):
        super().__init__()
        self.found = found

    def forward(self, images, least):
        return [list(self.found) for _ in images]


class Names(nn.Module):
    """A classifier of colors that has one answer, and counts its questions."""

    def __init__(self, color):
        super().__init__()
        self.color, self.asked = color, 0

    def forward(self, image, found):
        self.asked += 1
        return self.color


def instance(label="cup", score=0.95, box=(4.0, 4.0, 20.0, 20.0)):
    mask = torch.zeros(40, 48, dtype=torch.bool)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    return Instance(label, score, box, mask)


def judged(files, pictures, detector, classifier, **settings):
    reward = GenEvalReward(**files, **settings)
    reward._held.append(nn.ModuleDict({"detector": detector, "classifier": classifier}))
    return reward.score(pictures, PROMPTS)


def test_verdicts_of_known_objects(files, pictures):
    scores = judged(files, pictures, Finds(instance()), Names("red"))
    assert scores.parts["strict"].tolist() == [1, 1, 0]
    assert scores.parts["graded"].tolist() == [1, 1, 0.5]
    assert torch.equal(scores.total, scores.parts["strict"])
    assert scores.details[2]["failed"] == ["include 0: 2 cup"]
    assert scores.details[1]["objects"] == [
        {"label": "cup", "score": 0.95, "box": [4.0, 4.0, 20.0, 20.0], "color": "red"}
    ]


def test_more_than_asked_is_right_for_the_benchmark_alone(files, pictures):
    scores = judged(files, pictures, Finds(instance(), instance()), Names("blue"), total="graded")
    assert scores.parts["strict"].tolist() == [1, 0, 1]
    assert scores.parts["exact"].tolist() == [0, 0, 1]
    assert torch.equal(scores.total, scores.parts["graded"])
    assert scores.weights == {"strict": 0.0, "graded": 1.0, "exact": 0.0}


def test_counting_wants_surer_objects(files, pictures):
    scores = judged(files, pictures, Finds(*[instance(score=0.5)] * 2), Names("red"))
    assert scores.parts["strict"].tolist() == [1, 1, 0]


def test_each_object_is_asked_for_its_color_once(files, pictures):
    classifier = Names("red")
    judged(files, pictures, Finds(instance()), classifier)
    assert classifier.asked == 1  # one prompt of three asks for a color; two scores want it


def test_an_object_is_cut_out_as_pillow_does_it(pictures):
    found = instance(box=(3.0, 5.0, 31.0, 30.0))
    found.mask[10:20, 10:20] = False
    [picture] = to_pillow(pictures[:1])
    grey = Image.new("RGB", picture.size, "#999")
    mask = Image.fromarray(found.mask.numpy())
    expected = np.asarray(Image.composite(picture, grey, mask).crop(tuple(map(round, found.box))))
    cut = (cut_out(pictures[0], found).permute(1, 2, 0) * 255).numpy()
    assert cut.shape == (25, 28, 3)
    assert np.abs(cut - expected).max() < 1e-3


def test_colors_are_those_of_the_nearest_mean_of_three_texts(reward, pictures):
    classifier, clip = reward.network["classifier"], reward.network["classifier"]._clip
    found = instance()
    means = []
    for color in COLORS:
        texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup"]
        texts.append(f"a photo of a {color} object")
        features = clip.model.encode_text(clip.tokenize(texts), normalize=True)
        means.append(torch.nn.functional.normalize(features.mean(0), dim=0))
    pixels = clip.crop_pictures(cut_out(pictures[0], found)[None])
    similarities = clip.model.encode_image(pixels, normalize=True) @ torch.stack(means).T
    with torch.no_grad():
        assert classifier(pictures[0], found) == COLORS[int(similarities.argmax())]


def test_a_small_random_detector_runs_and_scores_alike_alone_and_in_a_batch(
    reward, pictures, monkeypatch
):
    monkeypatch.setattr("cotgen_pl.rewards.detectors.SHORT_SIDE", 64)
    monkeypatch.setattr(geneval, "THRESHOLD", 0.0)
    scores = reward.score(pictures, PROMPTS)
    alone = [reward.score(pictures[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    assert scores.total.dtype == torch.float32
    for part, values in scores.parts.items():
        assert torch.equal(values, torch.cat([one.parts[part] for one in alone]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_detector_in_half_precision_reads_all_steps_of_a_picture(files, pictures, dtype):
    reward = GenEvalReward(**files, dtype=dtype).load()
    seen = []
    model = reward.network["detector"].model
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    assert reward.score(pictures, PROMPTS).total.isfinite().all()
    full = fit_pictures(pictures, plan_size(40, 48))
    assert torch.equal(seen[0], full.to(getattr(torch, dtype)))


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "unicorn", "count": 1}, "expected a class out of the 2 names .* got 'unicorn'"),
        (CUP | {"color": "teal"}, "expected a color out of .* got 'teal'"),
    ],
)
def test_facts_that_are_never_found_are_refused(files, clause, message):
    with pytest.raises(ValueError, match=message):
        GenEvalReward(**files).check_prompt(Prompt("p", facts={"include": [clause]}))


def test_missing_files_are_told_before_weights_load(files, tmp_path):
    with pytest.raises(ValueError, match=r"object_names.txt at .*; run `python tools/fetch.py"):
        GenEvalReward(**files | {"names": str(tmp_path / "object_names.txt")})
    with pytest.raises(ValueError, match=r"expected a converted folder.*convert.py mask2former"):
        GenEvalReward(**files | {"path": str(tmp_path)})


# Whether the detector works -----------------------------------------------------------------------


class Loads(Finds):
    """A detector in place of the one that `read` would make."""

    def check(self):
        pass


@pytest.fixture
def photo(tmp_path):
    Image.new("L", (48, 40), 90).save(tmp_path / "cup.png")
    return str(tmp_path / "cup.png")


def load(files, monkeypatch, detector, **settings):
    monkeypatch.setattr(geneval.InstanceDetector, "read", lambda folder, names: detector)
    return GenEvalReward(**files, **settings).load()


def test_a_detector_that_finds_nothing_stops_or_warns(files, photo, monkeypatch):
    known = {"sanity_picture": photo, "sanity_class": "cup"}
    message = r"expected the detector to find a cup in .*cup.png, got \['cat'\]; convert"
    with pytest.raises(ValueError, match=message):
        load(files, monkeypatch, Loads(instance("cat")), sanity="stop", **known)
    with pytest.warns(UserWarning, match=message):
        load(files, monkeypatch, Loads(instance("cat")), **known)
    with pytest.warns(UserWarning, match=r"got nothing; convert"):
        load(files, monkeypatch, Loads(), **known)


@pytest.mark.parametrize("sanity", ["stop", "warn"])
def test_a_detector_that_finds_it_goes_on(files, photo, monkeypatch, recwarn, sanity):
    seen = []

    class Looks(Loads):
        def forward(self, images, least):
            seen.append(images)
            return super().forward(images, least)

    known = {"sanity_picture": photo, "sanity_class": "cup"}
    load(files, monkeypatch, Looks(instance("cat"), instance()), sanity=sanity, **known)
    assert not [w for w in recwarn if "detector" in str(w.message)]
    assert seen[0].shape == (1, 3, 40, 48)
    assert (seen[0] * 255).unique().tolist() == pytest.approx([90])


def test_the_check_may_be_left_out(files, photo, monkeypatch, recwarn):
    known = {"sanity_picture": photo, "sanity_class": "cup"}
    load(files, monkeypatch, Loads(), sanity="off", **known)
    load(files, monkeypatch, Loads())  # and nothing is looked at without a picture
    assert not [w for w in recwarn if "detector" in str(w.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sanity": "stop"}, "expected a sanity_picture beside sanity: stop, got none"),
        ({"sanity": "loud"}, "expected sanity to be one of"),
        ({"sanity_class": "cup"}, "expected sanity_picture with a sanity_class"),
        ({"sanity_picture": "a.png"}, "expected sanity_picture with a sanity_class"),
        (
            {"sanity_picture": "a.png", "sanity_class": "cow"},
            "expected a picture at a.png, got no file",
        ),
        (
            {"sanity_picture": "/no/a.png", "sanity_class": "cup"},
            "expected a picture at /no/a.png, got no file",
        ),
    ],
)
def test_a_check_that_cannot_be_made_is_refused(files, settings, message):
    with pytest.raises(ValueError, match=message):
        GenEvalReward(**files, **settings)


def test_a_class_that_the_detector_does_not_know_is_refused(files, photo):
    with pytest.raises(ValueError, match=r"sanity_class out of the 2 names .* got 'cow'"):
        GenEvalReward(**files, sanity_picture=photo, sanity_class="cow")


def test_a_file_that_is_no_picture_is_refused(files, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("no")
    known = {"sanity_picture": str(tmp_path / "a.png"), "sanity_class": "cup"}
    with pytest.raises(ValueError, match=r"a.png: expected a picture, got"):
        load(files, monkeypatch, Loads(), **known)


def test_a_detector_without_numbers_gives_no_verdict(files, pictures):
    class Blind(nn.Module):
        def forward(self, images, least):
            return [None, [instance()], [instance()]]

    scores = judged(files, pictures, Blind(), Names("red"))
    assert scores.total.isnan().tolist() == [True, False, False]
    assert scores.details[0] == {"failure": "the detector's answers are NaN; try dtype: float32"}


def test_equal_scores_of_many_pictures_are_warned_of_once(recwarn, monkeypatch):
    monkeypatch.setattr(geneval, "MOST_EQUAL", 4)
    watch, zeros = geneval.EqualScores(), torch.zeros(3)
    watch.watch(zeros, "geneval")
    watch.watch(torch.tensor([1.0, 0.0, 0.0, torch.nan]), "geneval")
    assert not recwarn.list
    watch.watch(zeros, "geneval")
    watch.watch(zeros, "geneval")
    [warning] = recwarn.list
    assert "reward geneval: the last 5 pictures all scored 0;" in str(warning.message)


def test_the_reward_watches_its_own_scores(files, pictures, monkeypatch):
    monkeypatch.setattr(geneval, "MOST_EQUAL", 3)
    with pytest.warns(UserWarning, match="the last 3 pictures all scored 0"):
        judged(files, pictures, Finds(), Names("red"))
