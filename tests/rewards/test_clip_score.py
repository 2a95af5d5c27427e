"""CLIPScore against CLIP in plain tensor operations, and whose weights it takes."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.clip_score import CLIPScore
from cotgen_pl.rewards.open_clip_models import read_config
from tests.rewards.plain_clip import gelu, picture_features, quick_gelu, text_features
from tests.test_pixels import as_tensor, draw_picture, square_with_pillow

VISION = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MODEL = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
END = 49407  # CLIP's end of text
TEXTS = ["a red cat", "two blue dogs on the moon", "a red cat", "", "a red cat " * 60]
MEAN = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)


def build():
    """A small random CLIP, shaken so that its scores differ between pictures and texts."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(folder: Path, model_config=MODEL) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(build().state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("clip_score"))


@pytest.fixture(scope="module")
def reward(folder):
    return CLIPScore(str(folder)).load()


@pytest.fixture
def pictures():
    """16 pictures, [16, 3, 37, 28], of whole bytes, which need cropping but no resampling."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (16, 3, 37, 28), generator=generator) / 255


PROMPTS = [Prompt(TEXTS[i % len(TEXTS)]) for i in range(16)]


def prepare(images: torch.Tensor, size: int = 28) -> torch.Tensor:
    """CLIP's preparation by Pillow and NumPy."""
    squares = [
        square_with_pillow(
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()), size
        )
        for image in images
    ]
    pixels = torch.stack([torch.tensor(square).permute(2, 0, 1).float() for square in squares])
    return (pixels - MEAN) / STD


def plain_scores(images: torch.Tensor, activation=quick_gelu) -> torch.Tensor:
    weights = build().state_dict()
    tokens = open_clip.get_tokenizer("ViT-B-32")([prompt.text for prompt in PROMPTS])
    seen = picture_features(weights, prepare(images), heads=2, activation=activation)
    read = text_features(weights, tokens, heads=2, end=END, activation=activation)
    return (seen * read).sum(dim=-1)


def test_score_is_the_cosine_of_a_plain_clip(reward, pictures):
    expected = plain_scores(pictures)
    scores = reward.score(pictures, PROMPTS)
    assert expected.std() > 0.01  # else any constant would pass
    assert scores.total.dtype == torch.float32
    torch.testing.assert_close(scores.total, expected, atol=1e-5, rtol=0)
    assert scores.weights == {"clip_score": 1.0} and list(scores.parts) == ["clip_score"]


def test_openais_weights_are_computed_with_quick_gelu(reward, pictures):
    difference = reward.score(pictures, PROMPTS).total - plain_scores(pictures, gelu)
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(384, 384), (480, 640), (1024, 1024)])
def test_pixels_are_those_of_pillow_to_one_step(reward, shape):
    pixels = draw_picture(*shape)
    reward._clip.model.visual.image_size, size = (224, 224), reward._clip.model.visual.image_size
    try:
        result = reward._clip.crop_pictures(as_tensor(pixels))[0]
    finally:
        reward._clip.model.visual.image_size = size
    expected = torch.tensor(square_with_pillow(Image.fromarray(pixels), 224)).permute(2, 0, 1)
    assert result.shape == (3, 224, 224)
    difference = (result * STD + MEAN - expected).abs()
    assert difference.max() < 1.01 / 255


def test_grey_and_transparent_pictures_are_those_of_pillow(reward, pictures):
    grey = pictures[:, :1]
    three = reward.score(grey.expand(-1, 3, -1, -1), PROMPTS).total
    assert torch.equal(reward.score(grey, PROMPTS).total, three)
    transparent = torch.cat([pictures, torch.rand(16, 1, 37, 28)], dim=1)
    opaque = reward.score(pictures, PROMPTS).total
    assert torch.equal(reward.score(transparent, PROMPTS).total, opaque)


def test_a_score_alone_is_that_in_a_batch_of_16(reward, pictures):
    together = reward.score(pictures, PROMPTS).total
    alone = [reward.score(pictures[i : i + 1], PROMPTS[i : i + 1]).total for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=0)


def test_scores_follow_their_picture_and_prompt(reward, pictures):
    total = reward.score(pictures, PROMPTS).total
    order = [1, 0, *range(2, 16)]
    swapped = reward.score(pictures[order], [PROMPTS[i] for i in order]).total
    torch.testing.assert_close(swapped, total[order], atol=1e-6, rtol=0)
    assert (total[0] - total[1]).abs() > 1e-3
    other_prompt = reward.score(pictures, [PROMPTS[i] for i in order]).total
    other_picture = reward.score(pictures[order], PROMPTS).total
    for changed in (other_prompt, other_picture):
        assert ((changed - total).abs()[:2] > 1e-4).all()


def test_each_text_is_encoded_once(folder, pictures, monkeypatch):
    reward = CLIPScore(str(folder)).load()
    encode, calls = reward.network.encode_text, []
    monkeypatch.setattr(
        reward.network, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens)
    )
    reward.score(pictures, PROMPTS)
    reward.score(pictures, PROMPTS)
    assert calls == [1] * len(set(TEXTS))


def test_bfloat16_is_near_and_keeps_scores_apart(folder, reward, pictures):
    half = CLIPScore(str(folder), dtype="bfloat16").load().score(pictures, PROMPTS).total
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, reward.score(pictures, PROMPTS).total, atol=0.05, rtol=0)
    assert len(half.unique()) == 16


# --- files


@pytest.mark.parametrize("said", [{}, {"quick_gelu": False}])
def test_a_config_that_says_gelu_is_refused(tmp_path, said):
    config = {name: value for name, value in MODEL.items() if name != "quick_gelu"} | said
    with pytest.raises(ValueError, match=r'_config.json: expected "quick_gelu": true in model_cfg'):
        CLIPScore(str(write(tmp_path, config))).load()


def test_a_file_without_a_config_is_openais_vit_b_32(tmp_path, folder, pictures, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    assert read_config(tmp_path, "ViT-B-32-quickgelu")["model_cfg"]["quick_gelu"] is True
    with pytest.raises(ValueError, match=r"a CLIP with 12 vision layers of width 768"):
        CLIPScore(str(file)).load()
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-B-32-quickgelu": MODEL}.__getitem__)
    total = CLIPScore(str(file)).load().score(pictures, PROMPTS).total
    torch.testing.assert_close(total, plain_scores(pictures), atol=1e-5, rtol=0)


def test_the_hub_gives_weights_and_config(monkeypatch, folder):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    CLIPScore().load()
    repository = open_clip.get_pretrained_cfg("ViT-B-32", "openai")["hf_hub"].strip("/")
    names = ["open_clip_config.json", "open_clip_model.safetensors"]
    assert asked == [(repository, name) for name in names]


def test_the_hub_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"hf download \S+openai open_clip_model\S+ open_clip_config.json`, then set path"
    with pytest.raises(ValueError, match=message):
        CLIPScore().load()


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:.*looks like a TorchScript")
def test_openais_own_archive_is_refused_and_not_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(ValueError, match="tensors only, got one that is damaged or would run code"):
        CLIPScore(str(tmp_path / "ViT-B-32.pt")).load()


def test_a_missing_path_is_refused_before_loading(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        CLIPScore("/no/such/folder")
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors or open_clip_pytorch_model"):
        CLIPScore(str(tmp_path))
