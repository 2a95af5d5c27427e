"""ImageReward, converted from the original layout, against BLIP in plain torch and Pillow."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cotgen_pl.conversion.blip import convert_blip_vqa, convert_image_reward
from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.image_reward import ImageReward
from tests.conversion.original_blip import (
    PIECES,
    PlainBlip,
    as_tensor,
    draw,
    shrink_with_pillow,
    write_blip_vqa,
    write_image_reward,
    write_tokenizer,
)

TEXTS = ["a red cat", "two blue dogs on the moon", "a big box", "", "a red cat and " * 12]
STEP = 1 / 255 / 0.26130258  # of an 8-bit channel, in units of the smallest deviation


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, write_image_reward(folder)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_image_reward(original[0], folder, write_tokenizer(folder / "bert"))
    return folder


@pytest.fixture(scope="module")
def reward(converted):
    return ImageReward(str(converted)).load()


@pytest.fixture
def images():
    """Five pictures of 8 bits in the network's own size, so that none is resized."""
    return torch.cat([as_tensor(draw((224, 224), seed=i)) for i in range(5)]).roll(17, 0)


@pytest.fixture
def prompts():
    return [Prompt(text) for text in TEXTS]


def plain_tokens(text):
    """Token ids and mask as BERT's tokenizer gives them for the words of these tests, [1, 35]."""
    words = text.replace("dogs", "dog ##s").split()
    ids = [101, *[PIECES[word] for word in words][:33], 102]
    padding = [0] * (35 - len(ids))
    return torch.tensor([ids + padding]), torch.tensor([[1] * len(ids) + padding])


def test_score_is_that_of_plain_torch(reward, original, images, prompts):
    pixels = torch.stack([torch.from_numpy(shrink(image)) for image in images])
    tokens = [plain_tokens(text) for text in TEXTS]
    token_ids, mask = (torch.cat(part) for part in zip(*tokens, strict=True))
    expected = PlainBlip(original[1], "blip.").image_reward(pixels, token_ids, mask)
    scores = reward.score(images, prompts)
    assert scores.total.dtype == torch.float32 and list(scores.parts) == ["image_reward"]
    assert expected.std() > 0.05  # else any constant would pass
    torch.testing.assert_close(scores.total.double(), expected, atol=1e-6, rtol=0)


def shrink(image):
    picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    return shrink_with_pillow(picture, 224, crop=True)


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (480, 641), (1024, 1024), (100, 130)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_are_pillows(reward, size, mode):
    seen = []
    hook = reward.network.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    picture = draw(size, mode)
    reward.score(as_tensor(picture), [Prompt("a red cat")])
    hook.remove()
    expected = torch.from_numpy(shrink_with_pillow(picture, 224, crop=True))
    difference = (seen[0][0].double() - expected).abs()
    assert difference.max() <= 1.01 * STEP  # one step of 256
    assert difference.mean() < 0.02 * STEP


def test_a_picture_alone_scores_as_in_a_batch_of_16(reward, images):
    many = torch.cat([images, images.flip(-1), images.flip(-2), images[:1] / 2])
    prompts = [Prompt(TEXTS[i % 5]) for i in range(16)]
    whole = reward.score(many, prompts).total
    alone = torch.cat([reward.score(many[i : i + 1], prompts[i : i + 1]).total for i in range(16)])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)


def test_swapped_entries_have_swapped_scores(reward, images, prompts):
    order = [0, 4, 2, 3, 1]
    total = reward.score(images, prompts).total
    swapped = reward.score(images[order], [prompts[i] for i in order]).total
    torch.testing.assert_close(swapped, total[order], atol=1e-6, rtol=0)
    assert (total[1] - total[4]).abs() > 1e-3


def test_picture_and_prompt_both_count(reward, images):
    prompt, other = Prompt("a red cat"), Prompt("two blue dogs on the moon")
    first, second, third = (
        reward.score(image[None], [text]).total
        for image, text in ((images[0], prompt), (1 - images[0], prompt), (images[0], other))
    )
    assert (first - second).abs() > 1e-3 and (first - third).abs() > 1e-3


def test_texts_are_cut_behind_33_word_pieces(reward, images):
    def score(text):
        return reward.score(images[:1], [Prompt(text)]).total

    assert torch.equal(score("a red cat " * 11), score("a red cat " * 11 + "and a box"))
    assert not torch.equal(score("a red cat " * 10), score("a red cat " * 10 + "and a box"))


def test_rewards_see_the_raw_text(reward, images):
    rewritten = Prompt("a red cat", generation_text="something else")
    raw = reward.score(images[:1], [Prompt("a red cat")]).total
    assert torch.equal(reward.score(images[:1], [rewritten]).total, raw)


def test_each_text_becomes_tokens_once(converted, images, prompts, monkeypatch):
    reward, calls = ImageReward(str(converted)).load(), []
    tokenizer = reward._tokenizer
    monkeypatch.setattr(
        reward, "_tokenizer", lambda text, **rest: calls.append(text) or tokenizer(text, **rest)
    )
    reward.score(images, prompts)
    reward.score(images, prompts[::-1])
    assert calls == TEXTS


def test_half_precision_scores_are_float32_and_near(converted, images, prompts):
    exact = ImageReward(str(converted)).load().score(images, prompts).total
    rough = ImageReward(str(converted), dtype="bfloat16").load().score(images, prompts).total
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


def test_the_original_is_refused_with_the_command_that_converts_it(original, tmp_path):
    command = r"run `python tools/convert.py image_reward SOURCE TARGET` and set path to TARGET"
    for path in (original[0] / "ImageReward.pt", original[0], tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"expected a converted folder.* {path}.*{command}"):
            ImageReward(str(path))


def test_the_folder_of_another_model_is_refused(tmp_path):
    write_blip_vqa(tmp_path, size=32)
    convert_blip_vqa(tmp_path, tmp_path / "vqa", write_tokenizer(tmp_path / "bert"))
    with pytest.raises(ValueError, match="expected model_type image_reward, got blip; run"):
        ImageReward(str(tmp_path / "vqa"))


def test_a_folder_that_was_changed_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["head.2.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"got 1 missing \(first: head.2.bias\); convert"):
        ImageReward(str(folder)).load()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="a network with 30524 tokens, got one with 5; convert"):
        ImageReward(str(folder)).load()
    (folder / "config.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"config\.json: expected a model_type, got"):
        ImageReward(str(folder))
