"""GroundingDINOReward: its rules on boxes made by hand, its detector against transformers' own."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    BertTokenizer,
    CLIPConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    SwinConfig,
)

from cotgen_pl.interfaces import Prompt
from cotgen_pl.pixels import as_rgb
from cotgen_pl.rewards.grounding_dino import (
    GroundingDINOReward,
    find_tokens,
    fit_pictures,
    write_caption,
)

# The detector's code names the ids of [CLS], [SEP], "." and "?", so they stand where BERT has them.
WORDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
WORDS |= {
    word: 1030 + place
    for place, word in enumerate(
        ["hot", "dog", "cup", "ice", "cream", "cone", "um", "##brella", "red", "on", "-", "##s"]
    )
}
RIGHT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
needs_right_positions = pytest.mark.skipif(
    not RIGHT, reason="the reward refuses this version of transformers"
)


def build_tokenizer():
    gaps = {f"[unused{index}]": index for index in range(1100)}
    taken = set(WORDS.values())
    return BertTokenizer(vocab={w: i for w, i in gaps.items() if i not in taken} | WORDS)


SMALL_PICTURES = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 107})


# --- Hand-made boxes: a detector that answers from a script. ---


class Script(nn.Module):
    """Finds what it is told to: each query has a probability per word, and a box."""

    config = SimpleNamespace(max_text_len=256)

    def __init__(self, queries):
        super().__init__()
        self.queries = queries

    def forward(self, pixel_values, input_ids, attention_mask):
        logits = torch.full((len(input_ids), len(self.queries), 256), -math.inf)
        for query, (words, _) in enumerate(self.queries):
            for word, probability in words.items():
                rows, columns = (input_ids == WORDS[word]).nonzero(as_tuple=True)
                logits[rows, query, columns] = torch.tensor(probability).logit()
        boxes = torch.tensor([box for _, box in self.queries]).expand(len(input_ids), -1, -1)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


class Scripted(GroundingDINOReward):
    """The reward around a scripted detector."""

    def __init__(self, queries, **arguments):
        super().__init__(**arguments)
        self.queries = queries

    def read(self):
        self._tokenizer, self._settings = build_tokenizer(), SMALL_PICTURES
        self._detector = Script(self.queries)
        return self._detector


def judge(queries, nouns, category="object", *, height=400, width=400, faults=False, **facts):
    """Score and details of one picture."""
    prompt = Prompt("", category=category, facts={"nouns": nouns, **facts})
    reward = Scripted(queries, reference_faults=faults).load()
    scores = reward.score(torch.zeros(1, 3, height, width), [prompt])
    return scores.total.item(), scores.details[0]


def at(words, x, y, width=0.1, height=0.1):
    """A query for words (one, or a probability for each) with its box, as shares of the picture."""
    return (words if isinstance(words, dict) else {words: 0.9}, (x, y, width, height))


def relation(locality):
    return {"spatial_info": {"obj1": "cup", "obj2": "dog", "locality": locality}}


def counts(**numbers):
    return {"numeracy_info": [{"obj_name": name, "num": num} for name, num in numbers.items()]}


LEFT_CUP, RIGHT_DOG = at("cup", 0.2, 0.5), at("dog", 0.8, 0.5)
BOTH = ["cup", "dog"]


@pytest.mark.parametrize("category", ["color", "shape", "texture", "object", "non", "complex", ""])
def test_other_categories_score_the_share_of_nouns_found(category):
    assert judge([LEFT_CUP, RIGHT_DOG], BOTH, category)[0] == 1
    assert judge([LEFT_CUP], BOTH, category)[0] == 0.5
    assert judge([LEFT_CUP, at("cup", 0.7, 0.5)], BOTH, category)[0] == 0.5
    assert judge([LEFT_CUP], ["dog"], category)[0] == 0
    assert judge([LEFT_CUP], [*BOTH, "ice"], category)[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("faults", [False, True])
@pytest.mark.parametrize("category", ["object", "spatial", "numeracy"])
def test_a_prompt_without_nouns_scores_one(category, faults):
    assert judge([LEFT_CUP], [], category, faults=faults) == (1, {"phrases": {}})


@pytest.mark.parametrize(
    ("queries", "locality", "expected"),
    [
        ([], "left of", 0.0),
        ([LEFT_CUP], "left of", 0.2),
        ([RIGHT_DOG], "left of", 0.2),
        ([LEFT_CUP, RIGHT_DOG], "left of", 0.9),
        ([LEFT_CUP, RIGHT_DOG], "right of", 0.4),
        ([at("cup", 0.4, 0.5, 0.4), at("dog", 0.6, 0.5, 0.4)], "on the left of", 0.4 + 0.3 / 2),
        ([at("cup", 0.5, 0.2), at("dog", 0.5, 0.8)], "on the top of", 0.9),
        ([at("cup", 0.5, 0.2), at("dog", 0.5, 0.8)], "below", 0.4),
        ([at("cup", 0.1, 0.1), at("dog", 0.2, 0.2)], "next to", 0.9),
        # The box with the highest score decides, wherever it stands in the list.
        ([at({"cup": 0.6}, 0.9, 0.5), RIGHT_DOG, LEFT_CUP], "left of", 0.9),
        ([LEFT_CUP, RIGHT_DOG, at({"cup": 0.95}, 0.95, 0.5)], "left of", 0.4),
    ],
)
def test_positions(queries, locality, expected):
    queries = queries or [at("ice", 0.5, 0.5)]
    assert judge(queries, BOTH, "spatial", **relation(locality))[0] == pytest.approx(expected)


def test_positions_count_in_pixels_of_the_picture():
    queries, near = [at("cup", 0.1, 0.1), at("dog", 0.6, 0.6)], relation("near")
    assert judge(queries, BOTH, "spatial", height=200, width=280, **near)[0] == pytest.approx(0.9)
    score = judge(queries, BOTH, "spatial", height=400, width=500, **near)[0]
    assert score == pytest.approx(0.4 + 150 / 250 / 2)
    # 0.4 of 300 rows is less than 0.3 of 500 columns, so the cup is left of the dog.
    queries = [at("cup", 0.3, 0.3), at("dog", 0.6, 0.7)]
    score = judge(queries, BOTH, "spatial", height=300, width=500, **relation("left of"))[0]
    assert score == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("queries", "numbers", "expected"),
    [
        ([LEFT_CUP, at("cup", 0.8, 0.5)], {"cup": 2}, 1.0),
        ([LEFT_CUP, at("cup", 0.8, 0.5)], {"cup": 3}, 0.2),
        ([LEFT_CUP, at("cup", 0.8, 0.5)], {"cup": 1}, 0.2),
        ([RIGHT_DOG], {"cup": 1}, 0.0),
        ([LEFT_CUP, RIGHT_DOG], {"cup": 1, "dog": 2}, 0.6),
        ([LEFT_CUP], {"cup": 1, "dog": 1}, 0.5),
        # Boxes that overlap by more than a half are one thing.
        ([LEFT_CUP, at("cup", 0.21, 0.5)], {"cup": 1}, 1.0),
        ([LEFT_CUP, at("cup", 0.25, 0.5)], {"cup": 2}, 1.0),
    ],
)
def test_counts(queries, numbers, expected):
    score, _ = judge(queries, list(numbers), "numeracy", **counts(**numbers))
    assert score == pytest.approx(expected)


def test_a_phrase_scores_the_mean_of_its_tokens():
    score, details = judge([at({"hot": 0.5, "dog": 0.12}, 0.5, 0.5)], ["hot dog"])
    assert score == 1 and details["phrases"]["hot dog"]["best"] == pytest.approx(0.31)
    assert judge([at({"hot": 0.5, "dog": 0.08}, 0.5, 0.5)], ["hot dog"])[0] == 0  # mean 0.29
    assert judge([at({"um": 0.6, "##brella": 0.1}, 0.5, 0.5)], ["umbrella"])[0] == 1


def test_the_threshold_is_an_argument():
    prompt = Prompt("", facts={"nouns": ["cup"]})
    for threshold, expected in ((0.89, 1), (0.91, 0)):
        reward = Scripted([LEFT_CUP], box_threshold=threshold).load()
        assert reward.score(torch.zeros(1, 3, 8, 8), [prompt]).total.item() == expected


def test_details_tell_what_was_found_where():
    queries = [LEFT_CUP, at({"cup": 0.2, "dog": 0.25}, 0.8, 0.5)]
    _, details = judge(queries, BOTH, height=200, width=400)
    cup, dog = details["phrases"]["cup"], details["phrases"]["dog"]
    assert cup["best"] == pytest.approx(0.9) and cup["scores"] == pytest.approx([0.9])
    [box] = cup["boxes"]
    assert box == pytest.approx([60, 90, 100, 110], abs=1e-3)  # left, top, right, bottom
    assert dog == {"best": pytest.approx(0.25), "scores": [], "boxes": []}


def test_a_noun_that_stands_twice_is_one_thing():
    queries = [LEFT_CUP, at({"cup": 0.2}, 0.8, 0.5)]
    assert judge(queries, ["cup", "cup"], "numeracy", **counts(cup=1))[0] == 1
    assert judge([LEFT_CUP], ["cup", "cup", "dog"])[0] == pytest.approx(2 / 3)


# --- The four faults of the reference. ---


@pytest.mark.parametrize("locality", ["next to", "near", "on side of"])
def test_fault_a_compares_pixels_with_shares(locality):
    queries = [at("cup", 0.1, 0.1), at("dog", 0.85, 0.85)]  # 300 pixels apart, both ways
    right = judge(queries, BOTH, "spatial", **relation(locality))[0]
    faulty = judge(queries, BOTH, "spatial", faults=True, **relation(locality))[0]
    assert (right, faulty) == pytest.approx((0.4 + 0.5 / 2, 0.9))


@pytest.mark.parametrize("locality", ["above", "on top of"])
def test_fault_b_knows_no_above(locality):
    queries = [at("cup", 0.5, 0.2), at("dog", 0.5, 0.8)]
    right = judge(queries, BOTH, "spatial", **relation(locality))[0]
    faulty = judge(queries, BOTH, "spatial", faults=True, **relation(locality))[0]
    assert (right, faulty) == pytest.approx((0.9, 0.4))
    others = [judge(queries, BOTH, "spatial", faults=f, **relation("top of"))[0] for f in (0, 1)]
    assert others == pytest.approx([0.9, 0.9])


def test_fault_c_keeps_duplicates():
    queries = [at({"cup": p}, 0.5, 0.5, 0.3, 0.3) for p in (0.9, 0.8)]
    right = judge(queries, ["cup"], "numeracy", **counts(cup=1))[0]
    faulty = judge(queries, ["cup"], "numeracy", faults=True, **counts(cup=1))[0]
    assert (right, faulty) == pytest.approx((1.0, 0.2))


def test_fault_d_never_finds_nouns_of_three_words():
    queries = [at({"ice": 0.9, "cream": 0.9, "cone": 0.9}, 0.5, 0.5), LEFT_CUP]
    nouns = ["ice cream cone", "cup"]
    assert judge(queries, nouns)[0] == 1
    assert judge(queries, nouns, faults=True)[0] == 0.5
    numbers = {"numeracy_info": [{"obj_name": "ice cream cone", "num": 1}]}
    assert judge(queries, nouns, "numeracy", **numbers)[0] == 1
    assert judge(queries, nouns, "numeracy", faults=True, **numbers)[0] == 0
    assert judge([at({"hot": 0.9, "dog": 0.9}, 0.5, 0.5)], ["hot dog"], faults=True)[0] == 1


# --- Failures are no verdict. ---


@pytest.mark.parametrize(
    ("nouns", "category", "facts", "failure"),
    [
        (None, "object", {}, "expected a list of texts under 'nouns', got None"),
        (["cup"], "spatial", {}, "expected the fact 'spatial_info' for the category spatial"),
        (["cup"], "numeracy", {"numeracy_info": []}, "expected the fact 'numeracy_info'"),
        (["cup"], "spatial", relation("left of"), "expected 'dog' among the nouns"),
        (["cup"], "numeracy", counts(cup=1, ice=2), "expected 'ice' among the nouns"),
        (BOTH, "spatial", relation("behind"), "expected obj1, obj2 and a locality"),
        (["cup"] * 200, "object", {}, "expected nouns of at most 256 tokens, got 402"),
        (["cup", "\u200b"], "object", {}, "got a noun without any token"),
    ],
)
def test_what_cannot_be_judged_has_no_verdict(nouns, category, facts, failure):
    bad = Prompt("", category=category, facts={"nouns": nouns, **facts})
    good = Prompt("", facts={"nouns": ["cup"]})
    scores = Scripted([LEFT_CUP]).load().score(torch.zeros(2, 3, 8, 8), [bad, good])
    assert scores.total[0].isnan() and scores.total[1] == 1
    assert failure in scores.details[0]["failure"] and "failure" not in scores.details[1]


def test_a_network_that_gives_nan_is_no_verdict():
    score, details = judge([at({"cup": math.nan}, 0.5, 0.5)], ["cup"])
    assert math.isnan(score) and "NaN" in details["failure"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"nouns": "cup"}, "list of texts under 'nouns', got 'cup'"),
        ({"nouns": ["cup", ""]}, "list of texts under 'nouns'"),
        ({"nouns": BOTH, **relation("behind")}, "obj1, obj2 and a locality .*take a locality out"),
        ({"nouns": BOTH, "spatial_info": {"obj1": "cup"}}, "obj1, obj2 and a locality"),
        ({"nouns": BOTH, "numeracy_info": {"cup": 2}}, "list of obj_name and num"),
        ({"nouns": BOTH, "numeracy_info": [{"obj_name": "cup"}]}, "list of obj_name and num"),
    ],
)
def test_facts_of_another_form_are_refused(facts, message):
    with pytest.raises(ValueError, match=f"reward grounding_dino: expected .*{message}"):
        GroundingDINOReward().check_prompt(Prompt("p", facts=facts))


def test_facts_of_t2i_r1_are_accepted():
    reward = GroundingDINOReward()
    for facts in ({}, relation("above"), counts(cup=2), {"spatial_info": None}):
        reward.check_prompt(Prompt("p", facts={"nouns": ["cup", "dog"], **facts}))


# --- Captions and pixels. ---


def test_spans_become_tokens():
    text, spans = write_caption(["hot dog", "cup"])
    assert text == "hot dog . cup."
    assert [text[start:end] for start, end in spans] == ["hot dog", "cup"]
    encoded = build_tokenizer()(text, return_offsets_mapping=True)
    assert encoded["input_ids"] == [101, 1030, 1031, 1012, 1032, 1012, 102]
    places = [find_tokens(encoded["offset_mapping"], *span) for span in spans]
    assert places == [[1, 2], [4]]


@pytest.mark.parametrize(
    ("nouns", "places"),
    [
        (["cup", "cup"], [[1], [3]]),
        (["on", "cone"], [[1], [3]]),  # "on" is a part of "cone", too
        (["cone", "on"], [[1], [3]]),
        (["umbrella", "Red-CUPs"], [[1, 2], [4, 5, 6, 7]]),
    ],
)
def test_spans_are_found_by_place_not_by_text(nouns, places):
    text, spans = write_caption(nouns)
    offsets = build_tokenizer()(text, return_offsets_mapping=True)["offset_mapping"]
    assert [find_tokens(offsets, *span) for span in spans] == places


def pillow_pixels(picture, shortest, longest, settings):
    """What the published transform does, by Pillow and NumPy alone, for a [C, H, W] picture."""
    array = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")
    short, long = min(image.size), max(image.size)
    scale = shortest / short
    if long * scale > longest:
        scale = longest / long
    image = image.resize([int(side * scale + 1e-6) for side in image.size], Image.BILINEAR)
    array = np.asarray(image, dtype=np.float32) / 255
    array = (array - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("width", "height", "fitted"),
    [
        (384, 384, (800, 800)),
        (640, 480, (800, 1066)),
        (1024, 1024, (800, 800)),
        (600, 300, (666, 1333)),
    ],
)
def test_pixels_are_those_of_pillow(channels, width, height, fitted):
    settings = GroundingDinoImageProcessor()
    coarse = torch.rand(1, channels, height // 10, width // 10)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels = fit_pictures(as_rgb(images), settings)[0]
    expected = pillow_pixels(images[0], 800, 1333, settings)
    assert pixels.shape[1:] == expected.shape[1:] == fitted
    steps = (pixels - expected).abs() * torch.tensor(settings.image_std)[:, None, None] * 255
    # Pillow rounds after each of its two passes, so a few pixels are off by two steps of 256.
    assert steps.max() < 2.01 and (steps > 1.5).float().mean() < 1e-4 and steps.mean() < 0.03


# --- The detector itself. ---


def write_detector(folder):
    """An untrained GroundingDINO in transformers' format, shaken until it finds things."""
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    text = {"model_type": "bert", "vocab_size": 1100, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, num_queries=12, **layers, **heads
    )
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    SMALL_PICTURES.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def detector(folder):
    return GroundingDINOReward(str(folder)).load()


CAPTIONS = {  # nouns to ids and the tokens of each noun
    ("hot dog", "cup"): ([101, 1030, 1031, 1012, 1032, 1012, 102], [[1, 2], [4]]),
    ("umbrella",): ([101, 1036, 1037, 1012, 102], [[1, 2]]),
    ("ice cream cone", "dog", "cup"): (
        [101, 1033, 1034, 1035, 1012, 1031, 1012, 1032, 1012, 102],
        [[1, 2, 3], [5], [7]],
    ),
}


def draw(count, height=48, width=56):
    pictures = torch.rand(count, 3, height // 8, width // 8)
    return torch.nn.functional.interpolate(pictures, (height, width))


def noun_prompts(count):
    return [Prompt("", facts={"nouns": list(nouns)}) for nouns in (list(CAPTIONS) * count)[:count]]


def numbers_in(scores):
    """By picture, the best score of each phrase, then the edges of all boxes."""
    phrases = [list(entry["phrases"].values()) for entry in scores.details]
    return [
        [found["best"] for found in row]
        + [n for found in row for box in found["boxes"] for n in box]
        for row in phrases
    ]


@needs_right_positions
def test_phrases_score_as_in_the_models_own_output(folder, detector):
    images = draw(3, height=64, width=80)  # not resampled; pixels have a test of their own
    images = (images * 255).round() / 255
    scores = detector.score(images, noun_prompts(3))
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    seen = []
    for picture, (nouns, (tokens, places)), details in zip(
        images, CAPTIONS.items(), scores.details, strict=True
    ):
        pixels = pillow_pixels(picture, 64, 107, SMALL_PICTURES)[None]
        with torch.no_grad():
            raw = model(pixel_values=pixels, input_ids=torch.tensor([tokens]))
        shares = 1 / (1 + (-raw.logits[0]).exp())
        size = torch.tensor([80, 64])
        for noun, own in zip(nouns, places, strict=True):
            score = shares[:, own].mean(dim=1)
            kept = score > 0.3
            centre, sides = raw.pred_boxes[0, kept, :2], raw.pred_boxes[0, kept, 2:]
            corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=1).view(-1, 2, 2)
            found = details["phrases"][noun]
            assert found["best"] == pytest.approx(score.max().item(), abs=1e-5)
            assert found["scores"] == pytest.approx(score[kept].tolist(), abs=1e-5)
            boxes = (corners * size).view(-1, 4)
            torch.testing.assert_close(
                torch.tensor(found["boxes"]).view(-1, 4), boxes, atol=1e-3, rtol=0
            )
            seen += [(score.max().item(), int(kept.sum()))]
    assert np.std([best for best, _ in seen]) > 0.01  # else any constant would pass
    assert any(count for _, count in seen)


@needs_right_positions
def test_a_picture_scores_the_same_alone_and_among_sixteen(folder):
    reward = GroundingDINOReward(str(folder), box_threshold=0.7).load()
    images, prompts = draw(16), noun_prompts(16)
    together = reward.score(images, prompts)
    assert len(together.total.unique()) > 1
    for place in range(16):
        alone = reward.score(images[place : place + 1], [prompts[place]])
        assert alone.total.item() == pytest.approx(together.total[place].item(), abs=1e-5)
        [expected], found = numbers_in(alone), numbers_in(together)[place]
        assert found == pytest.approx(expected, abs=1e-3)  # boxes in pixels
    order = list(range(15, -1, -1))
    swapped = reward.score(images[order], [prompts[place] for place in order])
    assert torch.equal(swapped.total, together.total[order])
    for place, row in zip(order, numbers_in(swapped), strict=True):
        assert row == pytest.approx(numbers_in(together)[place], abs=1e-3)


@needs_right_positions
def test_picture_and_prompt_matter(detector):
    images, [prompt, other, _] = draw(2), noun_prompts(3)
    first, second = numbers_in(detector.score(images, [prompt, prompt]))
    assert abs(first[0] - second[0]) > 1e-4
    changed = numbers_in(detector.score(images[:1], [other]))[0]
    assert abs(first[0] - changed[0]) > 1e-4


@needs_right_positions
def test_captions_are_tokenised_once(folder):
    reward = GroundingDINOReward(str(folder), batch_size=2).load()
    reward.score(draw(6), noun_prompts(6))
    assert sorted(reward._kept) == sorted(write_caption(nouns)[0] for nouns in CAPTIONS)


@needs_right_positions
def test_grey_and_transparent_pictures_are_scored(detector):
    images, prompts = draw(2), noun_prompts(2)
    expected = numbers_in(detector.score(images, prompts))
    transparent = torch.cat([images, torch.rand(2, 1, 48, 56)], dim=1)
    assert numbers_in(detector.score(transparent, prompts)) == expected
    grey = images[:, :1]
    expected = numbers_in(detector.score(grey.repeat(1, 3, 1, 1), prompts))
    assert numbers_in(detector.score(grey, prompts)) == expected


def test_versions_of_transformers_with_wrong_text_features_are_refused(folder, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    with pytest.raises(ValueError, match=r"expected transformers 5.23 or later, got 5.22.2.*pip"):
        GroundingDINOReward(str(folder)).load()


def test_full_stops_stand_behind_their_phrase_in_versions_that_are_accepted(folder):
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    seen = []
    model.model.text_backbone.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    tokens, _ = CAPTIONS["hot dog", "cup"]
    model(pixel_values=torch.zeros(1, 3, 64, 96), input_ids=torch.tensor([tokens]))
    right = seen[0].tolist() == [[0, 0, 1, 2, 0, 1, 0]]  # [CLS] hot dog . cup . [SEP]
    assert right == RIGHT


@needs_right_positions
def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        GroundingDINOReward(str(tmp_path / "nothing")).load()
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a grounding-dino checkpoint .* got model_type"):
        GroundingDINOReward(str(tmp_path)).load()


def test_thresholds_outside_zero_to_one_are_refused():
    with pytest.raises(ValueError, match="expected box_threshold from 0 to 1"):
        GroundingDINOReward(box_threshold=30)
