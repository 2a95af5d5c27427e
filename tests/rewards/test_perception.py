"""BLIP-VQA, converted from the original layout, against BLIP in plain torch and Pillow."""

import pytest
import torch
from PIL import Image

from cotgen_pl.conversion.blip import convert_blip_vqa
from cotgen_pl.rewards.perception import BlipVQA, clean_question, find_converted
from tests.conversion.original_blip import (
    DECODE,
    ENCODE,
    NO,
    PIECES,
    YES,
    PlainBlip,
    as_tensor,
    draw,
    shrink_with_pillow,
    write_blip_vqa,
    write_tokenizer,
)

QUESTIONS = [
    "a red cat?",
    "two blue dogs on the moon?",
    "dogs?",
    "a BIG red cat, and a (blue) box?",
]
CLEANED = ["a red cat ?", "two blue dog ##s on the moon ?", "dog ##s ?"]
CLEANED += ["a big red cat , and a blue box ?"]
SIZE = 64  # of pictures; 480 in the published file
STEP = 1 / 255 / 0.26130258  # of an 8-bit channel, in units of the smallest deviation


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, write_blip_vqa(folder, size=SIZE)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_blip_vqa(original[0], folder, write_tokenizer(folder / "bert"))
    return folder


@pytest.fixture(scope="module")
def vqa(converted):
    return BlipVQA.read(converted).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    """Two pictures of 8 bits in the network's own size, so that none is resized."""
    return torch.cat([as_tensor(draw((SIZE, SIZE), seed=i)).roll(40 * i, -1) for i in range(2)])


def plain_probability(weights, image, cleaned):
    """By plain torch, one question at a time, from Pillow's pixels; a float."""
    picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    pixels = torch.from_numpy(shrink_with_pillow(picture, SIZE, crop=False))[None]
    token_ids = torch.tensor([[ENCODE, *(PIECES[word] for word in cleaned.split()), 102]])
    mask = torch.ones_like(token_ids)
    return PlainBlip(weights).yes_probability(pixels, token_ids, mask).item()


def test_probabilities_are_those_of_plain_torch(vqa, original, images):
    pairs = [(0, 0), (1, 1), (1, 2), (0, 3), (0, 1)]  # picture, question
    expected = [plain_probability(original[1], images[i], CLEANED[j]) for i, j in pairs]
    found = vqa(images, [i for i, _ in pairs], [QUESTIONS[j] for _, j in pairs])
    assert found.dtype == torch.float32 and found.shape == (5,)
    assert torch.tensor(expected).std() > 0.05  # else any constant would pass
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)


def test_tokens_are_those_of_the_original(vqa):
    assert (vqa.encode_id, vqa.decode_id) == (ENCODE, DECODE) == (30523, 30522)
    assert (vqa.yes_id, vqa.no_id) == (YES, NO) == (2748, 2053)
    tokens = vqa.tokenize([*QUESTIONS, "a red cat " * 12])
    assert [ids[0] for ids in tokens] == [30523] * 5
    assert tokens[0] == [30523, *(PIECES[word] for word in ("a", "red", "cat", "?")), 102]
    assert len(tokens[4]) == 35 and tokens[4][-1] == 102


def test_the_decoder_starts_with_its_token_and_nothing_is_padded(vqa, images):
    seen = []
    hooks = [
        tower.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        for tower in (vqa.model.text_encoder, vqa.model.text_decoder)
    ]
    vqa(images, [0, 0, 1], ["dogs?", "a red cat?", "a big box?"])
    for hook in hooks:
        hook.remove()
    short, first, long, second = seen
    assert short.tolist() == [[30523, PIECES["dog"], PIECES["##s"], PIECES["?"], 102]]
    assert long.shape == (2, 6) and 0 not in long
    assert first.tolist() == [[30522]] and second.tolist() == [[30522], [30522]]


def test_an_answer_depends_on_no_other_question(vqa, images):
    many = torch.cat([images.roll(4 * i, -2) for i in range(8)])
    asked = [QUESTIONS[i % 4] for i in range(16)]
    whole = vqa(many, range(16), asked)
    alone = torch.cat([vqa(many[i : i + 1], [0], asked[i : i + 1]) for i in range(16)])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    assert whole.std() > 0.01


def test_swapped_questions_have_swapped_answers(vqa, images):
    first = vqa(images, [0, 1, 0], QUESTIONS[:3])
    second = vqa(images.flip(0), [1, 1, 0], [QUESTIONS[0], QUESTIONS[2], QUESTIONS[1]])
    torch.testing.assert_close(second, first[[0, 2, 1]], atol=1e-6, rtol=0)


def test_at_most_one_question_per_picture_is_asked_at_once(vqa, images, monkeypatch):
    ask, sizes = vqa._ask, []
    monkeypatch.setattr(vqa, "_ask", lambda f, ids: sizes.append(len(ids)) or ask(f, ids))
    pieces = vqa(images, [0, 0, 1, 1, 0], ["a red cat?"] * 5)
    assert sizes == [2, 2, 1]
    assert (
        len(pieces.round(decimals=5).unique()) == 2
    )  # the same answer for each of the same pictures


@pytest.mark.parametrize("size", [(384, 384), (640, 480), (1024, 1024)])
def test_pixels_are_pillows(vqa, size, monkeypatch):
    monkeypatch.setattr(vqa.model.config.vision_config, "image_size", 480)
    picture = draw(size)
    expected = torch.from_numpy(shrink_with_pillow(picture, 480, crop=False))
    difference = (vqa.prepare_pictures(as_tensor(picture))[0].double() - expected).abs()
    assert difference.max() <= 1.01 * STEP  # one step of 256
    assert difference.mean() < 0.02 * STEP


@pytest.mark.parametrize(
    ("question", "cleaned"),
    [
        ('The "Big", red: cat; (no. 1) *#~!?', "the big, red cat no 1 ?"),
        ("a red cat?   ", "a red cat?"),
        ("a  cat", "a  cat"),
        ("a " * 60, "a " * 49 + "a"),
    ],
)
def test_questions_are_cleaned_as_in_training(question, cleaned):
    assert clean_question(question) == cleaned


def test_a_tokenizer_without_the_answers_is_refused(tmp_path):
    write_blip_vqa(tmp_path, size=32)
    pieces = {word: index for word, index in PIECES.items() if word != "yes"}
    convert_blip_vqa(tmp_path, tmp_path / "vqa", write_tokenizer(tmp_path / "bert", pieces))
    with pytest.raises(ValueError, match="expected 'yes' as a single token, got none; convert"):
        BlipVQA.read(tmp_path / "vqa")


def test_a_folder_without_weights_is_refused(converted, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(
        ValueError, match=r"got .*, which is none; run `python tools/convert.py x S"
    ):
        find_converted(str(tmp_path), "x", "blip")
    assert find_converted(str(converted), "x", "blip") == converted
