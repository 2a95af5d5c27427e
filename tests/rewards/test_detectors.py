"""The detector's reading of pictures and logits, by hand and by an independent resizer."""

import numpy as np
import pytest
import torch

from cotgen_pl.rewards.detectors import (
    MEAN,
    STD,
    InstanceDetector,
    find_instances,
    fit_pictures,
    plan_size,
    tight_box,
)

NAMES = ["cup", "cat"]


def build_detector(num_labels=2):
    """A small random Mask2Former, shaken so that its masks are no plain."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        dim_feedforward=32,
        num_attention_heads=4,
        num_queries=6,
        num_labels=num_labels,
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return build_detector()


def resized_by_hand(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between pixel centres, edges repeated, as cv2.resize does; [h, w, 3] floats."""

    def places(size, old):
        at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), (at - low)

    top, bottom, down = places(height, picture.shape[0])
    left, right, along = places(width, picture.shape[1])
    rows = picture[top] * (1 - down)[:, None, None] + picture[bottom] * down[:, None, None]
    return rows[:, left] * (1 - along)[None, :, None] + rows[:, right] * along[None, :, None]


@pytest.mark.parametrize(
    ("size", "scaled", "padded"),
    [
        ((384, 384), (800, 800), (800, 800)),
        ((480, 640), (800, 1067), (800, 1088)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((400, 1000), (533, 1333), (544, 1344)),
    ],
)
def test_pictures_are_scaled_and_padded_as_mmdet_does(size, scaled, padded):
    sizes = plan_size(*size)
    assert (sizes.scaled, sizes.padded) == (scaled, padded)
    numbers = np.random.default_rng(0).integers(0, 256, (*size, 3))
    picture = torch.tensor(numbers).permute(2, 0, 1)[None] / 255
    pixels = fit_pictures(picture, sizes)[0].permute(1, 2, 0).numpy()
    steps = (pixels * np.array(STD) + np.array(MEAN)) * 255
    expected = resized_by_hand(numbers.astype(float), *scaled).round()
    assert pixels.shape == (*padded, 3)
    assert np.abs(steps[: scaled[0], : scaled[1]] - expected).max() <= 1.001
    assert np.abs(steps[scaled[0] :] - 128).max(initial=0) < 0.001
    assert np.abs(steps[:, scaled[1] :] - 128).max(initial=0) < 0.001


def test_instances_of_hand_made_logits():
    sizes = plan_size(400, 800)  # scaled to 667 x 1333, padded to 672 x 1344
    assert (sizes.scaled, sizes.padded) == ((667, 1333), (672, 1344))
    masks = torch.full((2, 168, 336), -10.0)  # a quarter of the padded picture
    masks[0, :, :84] = 10.0  # left quarter
    masks[1] = -1.0
    masks[1, 84:, 168:] = 1.0  # right lower quarter, less sure: sigmoid(1) = 0.731
    classes = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    cup, cat = find_instances(classes, masks, sizes, NAMES, least=0.3)
    probabilities = classes.softmax(-1)
    assert (cup.label, cat.label) == ("cup", "cat")
    assert cup.score == pytest.approx(probabilities[0, 0].item(), abs=0.01)
    assert cat.score == pytest.approx(probabilities[1, 1].item() * 0.731, abs=0.01)
    assert cup.box == pytest.approx((0, 0, 336 / 1.6663, 400), abs=1.01)
    assert cat.box == pytest.approx((672 / 1.6663, 336 / 1.6675, 800, 400), abs=1.01)
    assert cup.mask.shape == (400, 800) and cup.mask[:, :198].all() and not cup.mask[:, 204:].any()


def test_each_class_of_a_query_counts_and_weak_ones_do_not():
    sizes = plan_size(64, 64)
    masks = torch.full((1, 200, 200), 20.0)
    classes = torch.tensor([[1.0, 1.0, 0.0]])  # 0.42 each
    found = find_instances(classes, masks, sizes, NAMES, least=0.3)
    assert sorted(item.label for item in found) == ["cat", "cup"]
    assert found[0].score == pytest.approx(0.4223, abs=1e-3)
    assert not find_instances(classes, masks, sizes, NAMES, least=0.43)


def test_boxes_end_behind_their_last_pixel():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    assert tight_box(mask) == (2.0, 1.0, 5.0, 3.0)
    assert tight_box(torch.zeros(5, 6, dtype=torch.bool)) == (0.0, 0.0, 0.0, 0.0)


def test_a_picture_is_read_alike_alone_and_in_a_batch(model, monkeypatch):
    monkeypatch.setattr("cotgen_pl.rewards.detectors.SHORT_SIDE", 64)
    detector = InstanceDetector(model, NAMES)
    pictures = torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        together = detector(pictures, least=0.0)
        alone = [detector(picture[None], least=0.0)[0] for picture in pictures]
    assert any(together)
    for some, same in zip(together, alone, strict=True):
        assert [item.label for item in some] == [item.label for item in same]
        assert [i.score for i in some] == pytest.approx([i.score for i in same], abs=1e-5)


def test_a_picture_without_numbers_is_told(monkeypatch):
    monkeypatch.setattr("cotgen_pl.rewards.detectors.SHORT_SIDE", 64)
    model = build_detector()
    with torch.no_grad():
        model.class_predictor.bias.fill_(torch.nan)
        assert InstanceDetector(model, NAMES)(torch.rand(2, 3, 48, 64), least=0.3) == [None, None]


def test_other_classes_are_refused(model):
    with pytest.raises(ValueError, match=r"expected a detector of 3 classes, .*, got one of 2"):
        InstanceDetector(model, [*NAMES, "dog"])


@pytest.mark.parametrize("broken", [float("nan"), 0.0])
def test_a_broken_detector_is_found_out(broken):
    model = build_detector()
    InstanceDetector(model, NAMES).check()
    with torch.no_grad():
        for parameter in model.model.pixel_level_module.parameters():
            parameter.fill_(broken)
    with pytest.raises(ValueError, match="answers are finite and differ between two pictures"):
        InstanceDetector(model, NAMES).check()
