"""PickScore against CLIP in plain tensor operations, on small weights in the published form."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.pick_score import PickScore, prepare_pictures
from tests.rewards.plain_clip import from_hugging_face, gelu, picture_features, text_features
from tests.test_pixels import as_tensor, draw_picture, square_with_pillow

END = 49407  # CLIP's end of text
LAYER = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
TEXT = {**LAYER, "hidden_size": 16, "intermediate_size": 64, "vocab_size": 49408}
VISION = {**LAYER, "hidden_size": 32, "intermediate_size": 128, "image_size": 28, "patch_size": 14}
TEXTS = ["a red cat", "two blue dogs on the moon", "a red cat", "", "a red cat " * 60]
PROMPTS = [Prompt(TEXTS[i % len(TEXTS)]) for i in range(16)]
OPENAI = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
MEAN, STD = (torch.tensor(numbers).view(3, 1, 1) for numbers in OPENAI)


def write_model(folder: Path, end: int = 2) -> Path:
    """A small random CLIPModel. `end` 2 is what configs of 2023 say, though CLIP's is 49407."""
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**TEXT, "eos_token_id": end}, vision_config=VISION)
    config.projection_dim = 24
    model = CLIPModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for tower, length in (("text_model", 77), ("vision_model", 5)):  # as saved in 2023
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> Path:
    """CLIP's own tokenizer in transformers' form."""
    folder.mkdir(exist_ok=True)
    tokenizer = SimpleTokenizer()
    vocabulary = dict(tokenizer.encoder)
    for theirs, published in (("start_of_text", "startoftext"), ("end_of_text", "endoftext")):
        vocabulary[f"<|{published}|>"] = vocabulary.pop(f"<{theirs}>")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    names = {"bos_token": "<|startoftext|>"} | dict.fromkeys(
        ("eos_token", "unk_token", "pad_token"), "<|endoftext|>"
    )
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("pick_score"))


@pytest.fixture(scope="module")
def reward(folder, tokenizer):
    return PickScore(str(folder), str(tokenizer)).load()


@pytest.fixture
def pictures():
    """16 pictures, [16, 3, 37, 28], of whole bytes, which need cropping but no resampling."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (16, 3, 37, 28), generator=generator) / 255


def plain_scores(folder: Path, images: torch.Tensor) -> torch.Tensor:
    state = load_file(folder / "model.safetensors")
    weights = from_hugging_face(state)
    pixels = (images[:, :, 4:32] - MEAN) / STD  # (37 - 28) // 2 = 4 rows are cut off above
    tokens = open_clip.get_tokenizer("ViT-H-14")([prompt.text for prompt in PROMPTS])
    seen = picture_features(weights, pixels, heads=2, activation=gelu)
    read = text_features(weights, tokens, heads=2, end=END, activation=gelu)
    return state["logit_scale"].exp() * (seen * read).sum(dim=-1)


@pytest.mark.parametrize("end", [2, END])
def test_score_is_the_scaled_cosine_of_a_plain_clip(tmp_path, tokenizer, pictures, end):
    folder = write_model(tmp_path / "model", end)
    expected = plain_scores(folder, pictures)
    scores = PickScore(str(folder), str(tokenizer)).load().score(pictures, PROMPTS)
    assert expected.std() > 0.1  # else any constant would pass
    assert scores.total.dtype == torch.float32
    torch.testing.assert_close(scores.total, expected, atol=1e-5, rtol=0)
    assert scores.weights == {"pick_score": 1.0} and list(scores.parts) == ["pick_score"]


def test_score_is_that_of_transformers_own_forward(folder, reward, pictures):
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = open_clip.get_tokenizer("ViT-H-14")([prompt.text for prompt in PROMPTS])
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=(pictures[:, :, 4:32] - MEAN) / STD)
    expected = out.logits_per_image.diagonal()
    torch.testing.assert_close(reward.score(pictures, PROMPTS).total, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(384, 384), (480, 640), (1024, 1024)])
@pytest.mark.parametrize("size", [224, 223])
def test_pixels_are_those_of_pillow_to_one_step(shape, size):
    pixels = draw_picture(*shape)
    result = prepare_pictures(as_tensor(pixels), size, *OPENAI)[0]
    square = square_with_pillow(Image.fromarray(pixels), size, floor=True)
    assert result.shape == (3, size, size)
    difference = (result * STD + MEAN - torch.tensor(square).permute(2, 0, 1)).abs()
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
    torch.testing.assert_close(swapped, total[order], atol=1e-5, rtol=0)
    assert (total[0] - total[1]).abs() > 1e-2
    other_prompt = reward.score(pictures, [PROMPTS[i] for i in order]).total
    other_picture = reward.score(pictures[order], PROMPTS).total
    for changed in (other_prompt, other_picture):
        assert ((changed - total).abs()[:2] > 1e-3).all()


def test_each_text_is_encoded_once(folder, tokenizer, pictures, monkeypatch):
    reward = PickScore(str(folder), str(tokenizer)).load()
    encode, calls = reward.network.text_model.forward, []
    monkeypatch.setattr(
        reward.network.text_model,
        "forward",
        lambda **inputs: calls.append(inputs["input_ids"].shape) or encode(**inputs),
    )
    reward.score(pictures, PROMPTS)
    reward.score(pictures, PROMPTS)
    assert calls == [(1, 77)] * len(set(TEXTS))


def test_bfloat16_keeps_scores_apart_and_the_scale_exact(folder, tokenizer, reward, pictures):
    half = PickScore(str(folder), str(tokenizer), dtype="bfloat16").load()
    total = half.score(pictures, PROMPTS).total
    assert total.dtype == torch.float32 and len(total.unique()) == 16
    expected = reward.score(pictures, PROMPTS).total
    torch.testing.assert_close(total, expected, atol=0.02 * expected.abs().max(), rtol=0)
    assert half._scale == reward._scale


# --- files


def test_a_folder_with_its_own_tokenizer_uses_it(tmp_path, pictures, reward):
    write_tokenizer(write_model(tmp_path))
    total = PickScore(str(tmp_path), "no-such/tokenizer").load().score(pictures, PROMPTS).total
    assert torch.equal(total, reward.score(pictures, PROMPTS).total)


def test_a_missing_tokenizer_is_named(folder):
    with pytest.raises(ValueError, match=r"PickScore tokenizer.*at no-such/tokenizer, got none"):
        PickScore(str(folder), "no-such/tokenizer").load()


def test_weights_of_another_model_are_refused_with_names(tmp_path, tokenizer):
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["blip.head.weight"] = weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    message = r"got 1 missing \(first: visual_proj.*1 unknown \(first: blip.head"
    with pytest.raises(ValueError, match=message):
        PickScore(str(tmp_path), str(tokenizer)).load()


def test_weights_of_another_size_are_refused_with_names(tmp_path, tokenizer):
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["visual_projection.weight"] = torch.zeros(12, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of another shape \(first: visual_projection"):
        PickScore(str(tmp_path), str(tokenizer)).load()


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ValueError, match=r"expected a clip checkpoint in .* got model_type 'blip'"):
        PickScore(str(tmp_path), str(tokenizer)).load()


def test_a_missing_folder_is_refused(tokenizer):
    with pytest.raises(ValueError, match="which does not exist"):
        PickScore("./no/such/folder", str(tokenizer)).load()
