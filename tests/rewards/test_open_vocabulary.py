"""OWLv2: boxes by hand, pixels and scores against transformers' own."""

import pytest
import torch
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from cotgen_pl.rewards.open_vocabulary import OpenVocabularyDetector, scale_boxes, select_boxes

SIDE = 64
WORDS = ["a", "photo", "of", "cup", "dog", "lamp"]
VOCABULARY = [f"{word}</w>" for word in WORDS] + list("abcdefghlmnoptu")
VOCABULARY = ["!", "<|startoftext|>", "<|endoftext|>", *VOCABULARY, *(f"{c}</w>" for c in "zyx")]


def merges_of(words):
    """Byte-pair merges that build each word from the left."""
    found = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            found.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(dict.fromkeys(found))


def build_tokenizer():
    merges = merges_of(WORDS)
    pieces = dict.fromkeys([*VOCABULARY, *(p for m in merges for p in (*m, "".join(m)))])
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges, pad_token="!"
    )


def write(folder):
    """A small random OWLv2 in its own format."""
    tokenizer = build_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}oftext|>") for name in ("start", "end"))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {"bos_token_id": start, "eos_token_id": end}
    vision = sizes | {"image_size": SIDE, "patch_size": 16}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    processor = Owlv2Processor(
        image_processor=Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("owlv2"))


@pytest.fixture(scope="module")
def detector(folder):
    return OpenVocabularyDetector.read(str(folder)).eval().requires_grad_(False)


def draw(height, width, number=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (number, 3, height, width), generator=generator) / 255


@pytest.mark.parametrize("size", [(48, 48), (32, 40), (64, 64), (50, 30)])
def test_pixels_are_those_of_transformers(detector, size):
    images = draw(*size)
    processor = detector.settings
    expected = processor(
        [(image * 255).round().byte() for image in images], return_tensors="pt"
    ).pixel_values
    torch.testing.assert_close(detector.fit_pictures(images), expected, atol=1e-4, rtol=0)


def test_scores_and_boxes_are_those_of_transformers(detector):
    images, nouns = draw(48, 48), [["cup", "dog"], ["lamp", "cup"], ["dog", "lamp"]]
    texts = [[f"a photo of a {noun}" for noun in asked] for asked in nouns]
    tokens = detector.tokenizer(
        [text for own in texts for text in own],
        padding="max_length",
        max_length=16,
        return_tensors="pt",
    )
    raw = detector.model(
        pixel_values=detector.fit_pictures(images),
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
    )
    found = detector(images, nouns, (479, 479), 0.0)
    scores = raw.logits.sigmoid()
    assert scores.std() > 0.01
    for row, asked in enumerate(nouns):
        for place, noun in enumerate(asked):
            best = found[row][noun][0]
            patch = scores[row, :, place].argmax()
            assert best.label == noun
            assert best.score == pytest.approx(scores[row, patch, place].item(), abs=1e-6)
            x, y, width, height = raw.pred_boxes[row, patch].tolist()
            corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            expected = [min(max(corner, 0), 1) * 479 for corner in corners]
            assert best.box == pytest.approx(expected, abs=0.01)


def test_a_noun_is_found_alike_whatever_else_is_asked(detector):
    images = draw(48, 32)
    alone = [detector(image[None], [["cup"]], (480, 320), 0.0)[0]["cup"] for image in images]
    together = detector(images, [["cup"], ["dog", "cup", "lamp"], ["lamp", "cup"]], (480, 320), 0.0)
    for one, other in zip(alone, together, strict=True):
        assert [f.score for f in one] == pytest.approx([f.score for f in other["cup"]], abs=1e-5)
        for a, b in zip(one, other["cup"], strict=True):
            assert a.box == pytest.approx(b.box, abs=0.01)


def test_boxes_of_a_wide_picture_lie_on_the_upper_part_of_the_square():
    whole = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.25, 0.5, 0.5, 1.0]])
    scaled = scale_boxes(whole, (240, 480), (240, 480)).tolist()
    assert scaled == [[0, 0, 480, 240], [0, 0, 240, 240]]


def test_one_box_of_each_thing_stays():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [50, 0, 60, 10]]).float()
    found = select_boxes("cup", torch.tensor([0.4, 0.8, 0.6, 0.1]), boxes, 0.1)
    assert [item.score for item in found] == pytest.approx([0.8, 0.6])
    assert [item.box for item in found] == [(0, 0, 10, 9), (20, 0, 30, 10)]
    assert {item.label for item in found} == {"cup"}


def test_numbers_that_are_none_are_told(folder):
    detector = OpenVocabularyDetector.read(str(folder))
    with torch.no_grad():
        detector.model.class_head.dense0.weight.fill_(torch.nan)
        assert detector(draw(48, 48, 1), [["cup"]], (479, 479), 0.1) == [None]


@pytest.mark.parametrize("broken", [float("nan"), 0.0])
def test_a_broken_detector_is_found_out(folder, broken):
    detector = OpenVocabularyDetector.read(str(folder)).eval()
    detector.check()
    with torch.no_grad():
        for parameter in detector.model.owlv2.vision_model.parameters():
            parameter.fill_(broken)
    with pytest.raises(ValueError, match="answers are finite and differ between two pictures"):
        detector.check()


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dpt"}')
    with pytest.raises(ValueError, match="expected a owlv2 checkpoint"):
        OpenVocabularyDetector.read(str(tmp_path))
