"""AestheticScore against CLIP and the linear head in plain tensor operations."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.aesthetic import HEAD_FILE, AestheticScore, read_head
from tests.rewards.plain_clip import gelu, picture_features, quick_gelu

VISION = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1}
MODEL = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
HEAD_SIZES = {0: (1024, 24), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
PROMPTS = [Prompt(f"prompt {i}") for i in range(16)]
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def build():
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def head_weights() -> dict[str, torch.Tensor]:
    """Random weights under the original's names, which give scores near 5 with some spread."""
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for layer, (rows, columns) in HEAD_SIZES.items():
        values = torch.randn(rows, columns, generator=generator) / columns**0.5
        weights[f"layers.{layer}.weight"] = values
        weights[f"layers.{layer}.bias"] = 0.1 * torch.randn(rows, generator=generator)
    weights["layers.7.bias"] += 5
    return weights


def write(folder: Path, model_config=MODEL) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(build().state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    torch.save(head_weights(), folder / HEAD_FILE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture(scope="module")
def reward(folder):
    return AestheticScore(str(folder), str(folder)).load()


@pytest.fixture
def pictures():
    """16 pictures, [16, 3, 38, 28], of whole bytes, which need cropping but no resampling."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (16, 3, 38, 28), generator=generator) / 255


def plain_scores(images: torch.Tensor, activation=quick_gelu) -> torch.Tensor:
    pixels = (images[:, :, 5:33] - MEAN) / STD
    x = picture_features(build().state_dict(), pixels, heads=2, activation=activation)
    weights = head_weights()
    for layer in HEAD_SIZES:
        x = x @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"]
    return x[:, 0]


def test_score_is_that_of_the_head_on_a_plain_clip(reward, pictures):
    expected = plain_scores(pictures)
    scores = reward.score(pictures, PROMPTS)
    assert expected.std() > 0.01  # else any constant would pass
    assert scores.total.dtype == torch.float32
    torch.testing.assert_close(scores.total, expected, atol=1e-5, rtol=0)
    assert scores.weights == {"aesthetic": 1.0} and list(scores.parts) == ["aesthetic"]
    assert (plain_scores(pictures, gelu) - expected).abs().max() > 1e-3  # so QuickGELU is told


def test_prompts_are_not_read(reward, pictures, monkeypatch):
    monkeypatch.setattr(reward.network, "encode_text", lambda *_: pytest.fail("a text was read"))
    total = reward.score(pictures, PROMPTS).total
    assert torch.equal(reward.score(pictures, PROMPTS[::-1]).total, total)


def test_scores_follow_their_picture(reward, pictures):
    total = reward.score(pictures, PROMPTS).total
    order = [1, 0, *range(2, 16)]
    swapped = reward.score(pictures[order], PROMPTS).total
    torch.testing.assert_close(swapped, total[order], atol=1e-6, rtol=0)
    assert (total[0] - total[1]).abs() > 1e-3


def test_a_score_alone_is_that_in_a_batch_of_16(reward, pictures):
    together = reward.score(pictures, PROMPTS).total
    alone = [reward.score(pictures[i : i + 1], PROMPTS[i : i + 1]).total for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=0)


def test_grey_and_transparent_pictures_are_scored(reward, pictures):
    grey = pictures[:, :1]
    three = reward.score(grey.expand(-1, 3, -1, -1), PROMPTS).total
    assert torch.equal(reward.score(grey, PROMPTS).total, three)
    transparent = torch.cat([pictures, torch.rand(16, 1, 38, 28)], dim=1)
    opaque = reward.score(pictures, PROMPTS).total
    assert torch.equal(reward.score(transparent, PROMPTS).total, opaque)


def test_bfloat16_keeps_scores_apart(folder, reward, pictures):
    """bfloat16 has steps of 0.03 near 5; the head's own numbers do not lie on them."""
    half = AestheticScore(str(folder), str(folder), dtype="bfloat16").load()
    total = half.score(pictures, PROMPTS).total
    assert total.dtype == torch.float32 and len(total.unique()) == 16
    torch.testing.assert_close(total, reward.score(pictures, PROMPTS).total, atol=0.1, rtol=0)


# --- files


def test_the_published_head_has_768_features(tmp_path):
    weights = head_weights()
    weights["layers.0.weight"] = torch.randn(1024, 768)
    torch.save(weights, tmp_path / HEAD_FILE)
    weight, bias = read_head(tmp_path / HEAD_FILE, 768)
    assert weight.shape == (768,) and bias.shape == () and weight.dtype == torch.float32


def test_a_head_for_another_clip_is_refused(tmp_path, folder):
    weights = head_weights()
    weights["layers.0.weight"] = torch.randn(1024, 768)
    torch.save(weights, tmp_path / "head.pth")
    message = r"head on 24 features, got 1 of another shape \(first: layers.0.weight\)"
    with pytest.raises(ValueError, match=message):
        AestheticScore(str(tmp_path / "head.pth"), str(folder)).load()


def test_a_file_that_is_no_head_is_refused(tmp_path, folder):
    torch.save({"linear.weight": torch.zeros(1, 24)}, tmp_path / "head.pth")
    message = r"10 missing \(first: layers.0.weight\), 1 unknown \(first: linear.weight\)"
    with pytest.raises(ValueError, match=message):
        AestheticScore(str(tmp_path / "head.pth"), str(folder)).load()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("no/such/head.pth", "aesthetic head weights: expected a file.* does not exist"),
        ("someone/repository", r"expected the file sac\+logos.*got someone/repository"),
    ],
)
def test_a_missing_head_is_refused_before_loading(folder, head, message):
    with pytest.raises(ValueError, match=message):
        AestheticScore(head, str(folder))


def test_a_config_that_says_gelu_is_refused(tmp_path):
    write(tmp_path, {**MODEL, "quick_gelu": False})
    with pytest.raises(ValueError, match=r'_config.json: expected "quick_gelu": true in model_cfg'):
        AestheticScore(str(tmp_path), str(tmp_path)).load()


def test_without_a_config_clip_is_openais_vit_l_14(tmp_path, folder, pictures, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-L-14-quickgelu": MODEL}.__getitem__)
    total = AestheticScore(str(folder), str(file)).load().score(pictures, PROMPTS).total
    torch.testing.assert_close(total, plain_scores(pictures), atol=1e-5, rtol=0)


def test_the_hub_repository_is_open_clips_own(folder):
    repository = open_clip.get_pretrained_cfg("ViT-L-14", "openai")["hf_hub"].strip("/")
    assert AestheticScore(str(folder)).path == repository
