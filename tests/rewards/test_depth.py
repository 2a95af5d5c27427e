"""DPT's depth: the published order of steps, on a small random hybrid in its own format."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

from cotgen_pl.rewards import depth
from cotgen_pl.rewards.depth import UNUSED, DepthEstimator, mean_depth


def write(folder):
    """A small DPT-hybrid as published: without the weights that nothing is computed with."""
    backbone = BitConfig(
        embedding_size=8,
        hidden_sizes=[16, 16, 32],
        depths=[1, 1, 1],
        layer_type="bottleneck",
        global_padding="same",
        num_groups=4,
        out_features=["stage1", "stage2", "stage3"],
        embedding_dynamic_padding=True,
    )
    torch.manual_seed(0)
    model = DPTForDepthEstimation(
        DPTConfig(
            is_hybrid=True,
            backbone_config=backbone,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=64,
            backbone_featmap_shape=[1, 32, 4, 4],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=8,
            backbone_out_indices=[0, 1, 2, 3],
            reassemble_factors=[1, 1, 1, 0.5],
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    published = {name: values for name, values in weights.items() if not name.startswith(UNUSED)}
    assert len(published) < len(weights)
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dpt"))


@pytest.fixture
def estimator(folder, monkeypatch):
    monkeypatch.setattr(depth, "SIDE", 96)  # another than the training's, as 480 is than 384
    return DepthEstimator.read(str(folder)).eval().requires_grad_(False)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 96, 96), generator=generator) / 255


def test_depth_is_normalised_per_picture_and_stored_in_8_bits(estimator, images):
    raw = estimator.model(pixel_values=(images - 0.5) / 0.5).predicted_depth
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    expected = ((raw - low) / (high - low) * 255).round() / 255
    found = estimator(images, (96, 96))
    assert raw.shape == (3, 96, 96) and found.std() > 0.02
    torch.testing.assert_close(found, expected, atol=1.01 / 255, rtol=0)
    assert (found * 255 - (found * 255).round()).abs().max() < 1e-3
    assert found.amin((1, 2)).tolist() == [0, 0, 0] and found.amax((1, 2)).tolist() == [1, 1, 1]


def test_depth_is_resized_like_the_detectors_picture(estimator, images):
    assert estimator(images[:, :, :48], (40, 80)).shape == (3, 40, 80)


def test_a_picture_has_one_depth_alone_and_in_a_batch(estimator, images):
    together = estimator(images, (40, 40))
    alone = torch.cat([estimator(image[None], (40, 40)) for image in images])
    torch.testing.assert_close(together, alone, atol=1.01 / 255, rtol=0)


def test_the_mean_is_that_of_rows_and_columns_of_a_box():
    near = torch.zeros(4, 6)
    near[1:3, 4:6] = 1.0
    assert mean_depth(near, (4.0, 1.0, 6.0, 3.0)) == 1.0
    assert mean_depth(near, (4.0, 0.0, 6.0, 4.0)) == 0.5
    assert mean_depth(near, (1.0, 4.0, 3.0, 6.0)) == 0.0


def test_swapped_axes_read_another_region():
    near = torch.zeros(6, 6)
    near[4:6, 0:2] = 1.0  # the lower left corner
    corner = (0.0, 4.0, 2.0, 6.0)
    assert mean_depth(near, corner) == 1.0
    assert mean_depth(near, corner, swap_axes=True) == 0.0  # the upper right one


@pytest.mark.parametrize(
    "box", [(3.2, 2.1, 3.3, 2.2), (6.0, 4.0, 6.0, 4.0), (-3.0, -2.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("swap_axes", [False, True])
def test_a_box_has_one_pixel_at_least(box, swap_axes):
    assert mean_depth(torch.ones(4, 6), box, swap_axes=swap_axes) == 1.0


def test_missing_weights_are_refused_but_those_that_nothing_needs(folder, tmp_path):
    DepthEstimator.read(str(folder))
    weights = load_file(folder / "model.safetensors")
    del weights["head.head.0.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"got 1 missing or of another shape \(first: head.head.0"):
        DepthEstimator.read(str(tmp_path))


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"expected weights in .*, got"):
        DepthEstimator.read(str(tmp_path))
