"""GITReward against transformers' own GIT asked one question at a time, on small random weights."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
)

from cotgen_pl.interfaces import Prompt
from cotgen_pl.pixels import as_rgb
from cotgen_pl.rewards.git_vqa import GITReward, check_settings, choose_phrases, fit_pictures

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "yes", "no"]
WORDS += ["red", "blue", "cup", "dog", "hot", "##s", "umbrella"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}


def write_git(folder, words=WORDS):
    """An untrained GIT in transformers' format, shaken so that pictures and texts matter."""
    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    BertTokenizer(vocab={w: index for index, w in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_git(tmp_path_factory.mktemp("git"))


@pytest.fixture(scope="module")
def reward(folder):
    return GITReward(str(folder)).load()


def make_prompts():
    rows = [
        ("color", ["cup", "dog"], ["red cup", "hot dog"]),
        ("spatial", ["cup", "dog"], None),
        ("numeracy", ["cups"], None),
        ("object", ["umbrella", "umbrella", "cup"], None),
        ("complex", [], None),
        ("texture", ["cup"], ["blue cups"]),
    ]
    return [
        Prompt("", category=category, facts={"nouns": nouns, "attr_nouns": attributes})
        for category, nouns, attributes in rows
    ]


PHRASES = [
    ["red cup", "hot dog"],
    ["cup", "dog"],
    ["cups"],
    ["umbrella", "umbrella", "cup"],
    [],
    ["blue cups"],
]
TOKENS = {
    "red cup": [2, 8, 10, 5],
    "hot dog": [2, 12, 11, 5],
    "cup": [2, 10, 5],
    "dog": [2, 11, 5],
    "cups": [2, 10, 13, 5],
    "umbrella": [2, 14, 5],
    "blue cups": [2, 9, 10, 13, 5],
}


def draw(count, height=36, width=28):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def pillow_pixels(picture, size, settings):
    """What the published processor does, by Pillow and NumPy alone, for a [C, H, W] picture."""
    array = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")
    shorter = min(image.size)
    image = image.resize([int(size * side / shorter) for side in image.size], Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image, dtype=np.float32) / 255
    array = (array - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    return torch.from_numpy(array).permute(2, 0, 1)


def ask_alone(folder, picture, phrase):
    """p(yes) / (p(yes) + p(no)) from the model's own output, for one picture and one phrase."""
    model = GitForCausalLM.from_pretrained(folder).eval()
    settings = CLIPImageProcessor.from_pretrained(folder)
    pixels = pillow_pixels(picture, 28, settings)[None]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([TOKENS[phrase]]), pixel_values=pixels).logits
    shares = logits[0, -1].softmax(dim=-1)
    return (shares[6] / (shares[6] + shares[7])).item()


def test_score_is_the_mean_share_of_yes_of_the_models_own_output(folder, reward):
    images = draw(6)
    images = (images * 255).round() / 255
    scores = reward.score(images, make_prompts())
    asked = [[ask_alone(folder, i, p) for p in row] for i, row in zip(images, PHRASES, strict=True)]
    expected = torch.tensor([np.mean(row) if row else 1.0 for row in asked]).float()
    assert expected[:4].std() > 0.05  # else any constant would pass
    torch.testing.assert_close(scores.total, expected, atol=1e-5, rtol=0)
    assert scores.total.dtype == torch.float32 and scores.weights == {"git": 1.0}
    assert [entry["phrases"] for entry in scores.details] == PHRASES
    for entry, row in zip(scores.details, asked, strict=True):
        assert entry["yes"] == pytest.approx(row, abs=1e-5)


def test_questions_start_with_cls_and_have_no_end_token(reward):
    for phrase, tokens in TOKENS.items():
        assert reward._tokenize(phrase).tolist() == tokens


def test_a_picture_scores_the_same_alone_and_among_sixteen(reward):
    images, prompts = draw(16), (make_prompts() * 3)[:16]
    total = reward.score(images, prompts).total
    alone = [reward.score(images[i : i + 1], [prompts[i]]).total for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), total, atol=1e-5, rtol=0)
    order = torch.arange(15, -1, -1)
    swapped = reward.score(images[order], [prompts[i] for i in order]).total
    torch.testing.assert_close(swapped, total[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_size_of_a_batch_changes_nothing_and_bounds_the_rows(folder, reward, batch_size):
    images, prompts = draw(6), make_prompts()
    small = GITReward(str(folder), batch_size=batch_size).load()
    rows = []
    small._git.git.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    total = reward.score(images, prompts).total
    torch.testing.assert_close(small.score(images, prompts).total, total, atol=1e-5, rtol=0)
    assert max(rows) <= max(batch_size, 3)  # the phrases of one picture stay together
    assert sum(rows) == 9


def test_each_picture_is_encoded_once(reward):
    seen = []
    tower = reward._git.git.image_encoder
    with tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))):
        reward.score(draw(6), make_prompts())
    assert sum(seen) == 5  # of six, one prompt has no phrase


def test_picture_and_prompt_matter(reward):
    images, [first, *_] = draw(2), make_prompts()
    one, other = reward.score(images, [first, first]).total
    assert abs(one - other) > 1e-4
    changed = Prompt("", facts={"nouns": ["cup"], "attr_nouns": ["blue cup"]})
    assert abs(reward.score(images[:1], [changed]).total - one) > 1e-4


def test_the_references_constant_for_positions_and_counts(folder, reward):
    images, prompts = draw(6), make_prompts()
    total = reward.score(images, prompts).total
    faulty = GITReward(str(folder), reference_faults=True).load().score(images, prompts)
    assert faulty.total[1:3].tolist() == [0, 0]
    assert ((total[1:3] > 0) & (total[1:3] < 1)).all()
    torch.testing.assert_close(faulty.total[[0, 3, 4, 5]], total[[0, 3, 4, 5]], atol=1e-5, rtol=0)
    assert total[4] == 1  # nothing to ask for, with and without the faults
    assert faulty.details[1] == {"phrases": [], "yes": []}


def test_a_network_that_gives_nan_is_no_verdict(folder):
    broken = GITReward(str(folder)).load()
    broken._git.output.bias.fill_(math.nan)
    scores = broken.score(draw(6)[:1], make_prompts()[:1])
    assert scores.total.isnan().all() and "NaN" in scores.details[0]["failure"]


def test_nouns_are_asked_where_there_are_no_attributes():
    assert choose_phrases({"nouns": ["cup"], "attr_nouns": None}) == ["cup"]
    assert choose_phrases({"nouns": ["cup"], "attr_nouns": []}) == ["cup"]
    assert choose_phrases({"nouns": None}) == []


SETTINGS = CLIPImageProcessor(size={"shortest_edge": 480}, crop_size={"height": 480, "width": 480})


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("width", "height"), [(384, 384), (640, 480), (1024, 1024), (331, 500)])
def test_pixels_are_those_of_pillow(channels, width, height):
    coarse = torch.rand(1, channels, height // 8, width // 8)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels = fit_pictures(as_rgb(images), SETTINGS)[0]
    expected = pillow_pixels(images[0], 480, SETTINGS)
    assert pixels.shape == expected.shape == (3, 480, 480)
    steps = (pixels - expected).abs() * torch.tensor(SETTINGS.image_std)[:, None, None] * 255
    # Pillow rounds after each of its two passes, so a few pixels are off by two steps of 256.
    assert steps.max() < 2.01 and (steps > 1.5).float().mean() < 1e-4 and steps.mean() < 0.03


def test_grey_and_transparent_pictures_are_scored(reward):
    images, prompts = draw(2), make_prompts()[:2]
    total = reward.score(images, prompts).total
    transparent = torch.cat([images, torch.rand(2, 1, 36, 28)], dim=1)
    assert torch.equal(reward.score(transparent, prompts).total, total)
    grey = images[:, :1]
    same = reward.score(grey.repeat(1, 3, 1, 1), prompts).total
    assert torch.equal(reward.score(grey, prompts).total, same)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "yes"], r"'no' .* got \['\[UNK\]'\]"),
        (
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "ye", "##s", "no"],
            r"'yes' .* got \['ye', '##s'\]",
        ),
    ],
)
def test_answers_that_are_no_single_tokens_are_refused(tmp_path, words, message):
    with pytest.raises(ValueError, match=f"expected {message}; use the tokenizer"):
        GITReward(str(write_git(tmp_path, words))).load()


def test_other_checkpoints_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="which does not exist"):
        GITReward(str(tmp_path / "nothing")).load()
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a git checkpoint .* got model_type 'clip'"):
        GITReward(str(tmp_path)).load()


@pytest.mark.parametrize(
    "change",
    [
        {"size": SimpleNamespace(height=480, width=480)},
        {"resample": 2},
        {"do_center_crop": False},
        {"crop_size": SimpleNamespace(height=500, width=500)},
    ],
)
def test_other_preprocessing_is_refused(change):
    good = {
        "size": SimpleNamespace(shortest_edge=480),
        "crop_size": SimpleNamespace(height=480, width=480),
        "resample": 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
    }
    check_settings(SimpleNamespace(**good), "here")
    with pytest.raises(ValueError, match=r"expected an image processor in here .* got size"):
        check_settings(SimpleNamespace(**good | change), "here")


@pytest.mark.parametrize(
    "facts",
    [{"nouns": "cup"}, {"nouns": [""]}, {"nouns": [3]}, {"nouns": ["cup"], "attr_nouns": 3}],
)
def test_facts_of_another_form_are_refused(facts):
    with pytest.raises(ValueError, match=r"expected a list of texts under '(attr_)?nouns', got"):
        GITReward().check_prompt(Prompt("p", facts=facts))
    GITReward().check_prompt(Prompt("p", facts={"nouns": [], "attr_nouns": None}))
