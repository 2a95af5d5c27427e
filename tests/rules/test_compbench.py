"""T2I-CompBench's rules: by hand, and counted on its own prompt files where they are at hand."""

from pathlib import Path

import pytest
import torch

from cotgen_pl.rules.compbench import (
    LEAST_SPATIAL_SCORE,
    RELATIONS_2D,
    THREE_IN_ONE,
    UNKNOWN_IN_DEPTH,
    UNKNOWN_TO_UNIDET,
    Relation,
    detector_size,
    drop_duplicates,
    numeracy_score,
    parse_complex_relation,
    parse_counts,
    parse_relation,
    read_nouns,
    score_depth_relation,
    score_relation_2d,
    select_phrases,
    spatial_score,
    template_phrases,
    without_adjectives,
)
from cotgen_pl.rules.position import score_position

NOUNS = read_nouns(
    ["cup - cups", "knife - knives", "girl - girls", "teddy bear - teddy bears", "bear - bears"]
)


@pytest.fixture(scope="module")
def official() -> Path:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "t2i_compbench"
    if not folder.is_dir():
        pytest.skip("T2I-CompBench's prompt files are not at hand")
    return folder


def lines_of(folder: Path, name: str) -> list[str]:
    return [line.strip() for line in (folder / f"{name}.txt").read_text().splitlines() if line]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("an oval old mirror and round red plates", ["an oval old mirror", "round red plates"]),
        ("a goldfish and a blue bowl", ["a goldfish", "a blue bowl"]),
        ("bread and a blue bowl", None),
        ("a green bench and a blue bowl.", None),
        ("a green bench, and a blue bowl", None),
        ("a very big green bench and a blue bowl", None),
        ("The car is red and the sky is blue", None),
    ],
)
def test_templates_give_two_phrases_or_nothing(text, phrases):
    assert template_phrases(text) == phrases


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("color_val", 240),
        ("shape_val", 196),
        ("texture_val", 240),
        ("color_train", 560),
        ("shape_train", 508),
        ("texture_train", 560),
    ],
)
def test_templates_cover_the_official_prompts_as_counted(official, name, number):
    assert sum(template_phrases(line) is not None for line in lines_of(official, name)) == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a giraffe next to a lamp", Relation("giraffe", "next to", "lamp")),
        ("A boy on top of an elephant.", Relation("person", "on top of", "elephant")),
        ("a woman on the top of a car", Relation("person", "on the top of", "car")),
        ("a chair hidden by a mouse", Relation("chair", "hidden by", "mouse")),
        ("a chair is near a man", Relation("chair", "near", "person")),
        ("a red chair near a lamp", None),
        ("two chairs near a lamp", None),
    ],
)
def test_relations_are_read_off_the_template(text, expected):
    assert parse_relation(text) == expected


@pytest.mark.parametrize(
    ("name", "number", "unknown"), [("spatial_val", 300, 100), ("spatial_train", 700, 218)]
)
def test_official_relations_and_what_unidet_does_not_know(official, name, number, unknown):
    relations = [parse_relation(line) for line in lines_of(official, name)]
    assert len(relations) == number and all(relations)
    missed = [r for r in relations if {r.first, r.second} & UNKNOWN_TO_UNIDET]
    assert len(missed) == unknown


@pytest.mark.parametrize("name", ["3d_spatial_val", "3d_spatial_train"])
def test_official_relations_in_depth(official, name):
    lines = lines_of(official, name)
    assert len(lines) in (300, 700)
    assert all(parse_relation(line) for line in lines)


@pytest.mark.parametrize(("name", "unknown"), [("3d_spatial_val", 20), ("3d_spatial_train", 54)])
def test_official_relations_in_depth_that_unidet_cannot_match(official, name, unknown):
    relations = [parse_relation(line) for line in lines_of(official, name)]
    assert sum(bool({r.first, r.second} & UNKNOWN_IN_DEPTH) for r in relations) == unknown


def test_the_official_parts_of_complex_are_all_of_it(official):
    parts = {part: lines_of(official, f"complex_val_{part}") for part in THREE_IN_ONE}
    assert {part: len(lines) for part, lines in parts.items()} == {
        "spatial": 58,
        "action": 212,
        "spatialaction": 30,
    }
    texts = {line.lower().split(".")[0] for lines in parts.values() for line in lines}
    assert texts == {line.lower().split(".")[0] for line in lines_of(official, "complex_val")}


@pytest.mark.parametrize(
    ("relation", "a", "b", "score"),
    [
        ("on the left of", (0, 0, 100, 100), (150, 0, 250, 100), 1),
        ("on the left of", (0, 0, 100, 100), (50, 0, 150, 100), 0.3),
        ("on the right of", (0, 0, 100, 100), (150, 0, 250, 100), 0),
        ("next to", (0, 0, 100, 100), (300, 300, 400, 400), 0.5),
        ("near", (0, 0, 50, 50), (200, 160, 250, 210), 0.75),
        ("on top of", (0, 0, 100, 100), (0, 200, 100, 300), 0),
        ("on the top of", (0, 0, 100, 100), (0, 200, 100, 300), 1),
    ],
)
def test_golden_values_of_the_published_rule(relation, a, b, score):
    assert score_relation_2d(relation, a, b, reference_faults=True) == pytest.approx(score)


def test_on_top_of_means_on_the_top_of():
    assert score_relation_2d("on top of", (0, 0, 100, 100), (0, 200, 100, 300)) == 1
    assert score_relation_2d("on top of", (0, 200, 100, 300), (0, 0, 100, 100)) == 0


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((384, 384), (479, 479)),
        ((479, 480), (479, 480)),
        ((480, 640), (360, 480)),
        ((640, 480), (480, 360)),
    ],
)
def test_boxes_lie_on_a_picture_of_479_pixels(size, resized):
    assert detector_size(*size) == resized


def test_detector_sizes_are_torchvisions():
    from torchvision.transforms.v2.functional import resize

    for height, width in ((384, 384), (100, 333), (333, 100), (512, 511), (480, 640)):
        picture = torch.zeros(1, height, width)
        resized = resize(picture, [479], max_size=480)
        assert detector_size(height, width) == tuple(resized.shape[-2:])


def tag(text: str) -> list[tuple[str, str]]:
    """Words with their kinds, from "red/ADJ cup"; nouns need none."""
    pairs = [piece.partition("/") for piece in text.split()]
    return [(word, kind or "NOUN") for word, _, kind in pairs]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "The/DET red/ADJ hat was/AUX on/ADP top of/ADP the/DET coat rack",
            Relation("hat", "on top of", "coat"),
        ),
        ("cup spoon next/ADV to/ADP a/DET dog", Relation("spoon", "next to", "dog")),
        ("a/DET boy near/ADP Tom/PROPN Sawyer/PROPN", Relation("person", "near", "sawyer")),
        ("Tom/PROPN near/ADP Sam/PROPN Bell/PROPN s/X Al/PROPN", Relation("tom", "near", "bell")),
        ("Tom/PROPN near/ADP Sam/PROPN dog", Relation("tom", "near", "dog")),
        ("cup on/ADP the/DET left of/ADP a/DET dog", Relation("cup", "on the left of", "dog")),
        ("cup on/ADP bottom of/ADP a/DET dog", Relation("cup", "on the bottom of", "dog")),
        # The order of the list counts, not that of the prompt.
        ("a cup near/ADP dog on/ADP top of/ADP box", Relation("dog", "on top of", "box")),
        ("near/ADP a/DET dog", None),
        ("a/DET dog is/AUX near/ADP", None),
        ("a/DET dog on/ADP a/DET box", None),
    ],
)
def test_complex_relations_are_read_off_kinds_of_words(text, expected):
    assert parse_complex_relation(tag(text)) == expected


def test_adjectives_are_dropped_and_the_rest_joined():
    words = tag("The/DET red/ADJ hat was/AUX red/PROPN ./PUNCT")
    assert without_adjectives(words) == "The hat was red ."


def test_phrases_that_only_say_where_are_not_asked_about():
    chunks = ["a cup", "top", "the side", "the left", "the right", "The left", "a top"]
    assert select_phrases(chunks) == ["a cup", "The left", "a top"]
    assert select_phrases([*"abcdefghij", "top"]) == list("abcdefgh")


@pytest.mark.parametrize("relation", RELATIONS_2D)
def test_every_2d_relation_has_a_rule(relation):
    assert 0 <= score_position(relation, (0, 0, 10, 10), (20, 0, 30, 10)) <= 1


@pytest.mark.parametrize(
    ("first", "second", "relation", "least", "score"),
    [
        (0.8, 0.6, 1.0, LEAST_SPATIAL_SCORE, 0.85),
        (1.0, 1.0, 0.0, LEAST_SPATIAL_SCORE, 0.5),
        (0.9, 0.9, 0.0, LEAST_SPATIAL_SCORE, 0.0),  # 0.45, below the cut
        (0.9, None, 1.0, LEAST_SPATIAL_SCORE, 0.0),  # one thing alone never counts in 2D
        (0.8, None, 1.0, 0.0, 0.2),  # in 3D it does
        (None, None, 1.0, 0.0, 0.0),
    ],
)
def test_spatial_scores_by_hand(first, second, relation, least, score):
    assert spatial_score(first, second, relation, least=least) == pytest.approx(score)


def boxes_of_overlap(iou: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two equal squares side by side that overlap so."""
    shift = 100 * (1 - iou) / (1 + iou)
    return (0, 0, 100, 100), (shift, 0, 100 + shift, 100)


@pytest.mark.parametrize(
    ("iou", "score"), [(0.0, 0.0), (0.4, 0.8), (0.6, 1.0), (1.0, 1.0), (0.1, 0.2)]
)
@pytest.mark.parametrize(
    ("relation", "depths"),
    [("in front of", (0.9, 0.1)), ("behind", (0.1, 0.9)), ("hidden by", (0.1, 0.9))],
)
def test_depth_relations_by_hand(iou, score, relation, depths):
    boxes = boxes_of_overlap(iou)
    assert score_depth_relation(relation, *boxes, *depths) == pytest.approx(score)
    assert score_depth_relation(relation, *boxes, *reversed(depths)) == 0


def test_depth_at_exactly_half_an_overlap_is_0_as_published():
    assert score_depth_relation("behind", (0, 0, 100, 100), (0, 0, 50, 100), 0.1, 0.9) == 0


def test_a_relation_without_rule_is_refused():
    with pytest.raises(ValueError, match=r"expected a relation out of .*, got 'beside'"):
        score_depth_relation("beside", (0, 0, 1, 1), (0, 0, 1, 1), 0.1, 0.9)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("two cups", [("cup", 2)]),
        ("a cup and three knives", [("cup", 1), ("knife", 3)]),
        ("two teddy bears, one bear", [("teddy bear", 2), ("bear", 1)]),
        ("two girls and a girl", [("person", 2), ("person", 1)]),
        ("four shiny knives lay there", [("knife", 4)]),
        ("cups everywhere", []),
    ],
)
def test_counts_are_read_off_number_words_and_nouns(text, counts):
    assert parse_counts(text, NOUNS) == counts


def test_official_counts_are_all_found(official):
    nouns = read_nouns((official / "new_objects.txt").read_text().splitlines())
    assert len(set(nouns.values())) == 88
    for name, number in (("numeracy_val", 300), ("numeracy_train", 700)):
        counts = [parse_counts(line, nouns) for line in lines_of(official, name)]
        assert len(counts) == number and all(counts)


def test_a_line_without_plural_is_named():
    with pytest.raises(ValueError, match="line 2: expected 'singular - plural', got 'cups'"):
        read_nouns(["cup - cups", "", "cups"])


def test_duplicates_are_boxes_that_cover_each_other():
    boxes = [(0, 0, 99, 99), (0, 0, 98, 98), (0, 0, 49, 49), (200, 0, 299, 99), (0, 50, 99, 149)]
    # The second is nearly the first; the third lies within it.
    assert drop_duplicates(boxes) == [0, 3, 4]
    assert drop_duplicates([]) == []


def test_one_more_pixel_belongs_to_each_box():
    # 10 of 11 columns shared: 0.909 with the pixel, 9 of 10 = 0.9 and no duplicate without it.
    assert drop_duplicates([(0, 0, 10, 10), (1, 0, 11, 10)]) == [0]


@pytest.mark.parametrize(
    ("found", "score"),
    [
        ({"cup": 2, "dog": 1}, 1.0),
        ({"cup": 3, "dog": 1}, 0.75),
        ({"cup": 2}, 0.5),
        ({"cat": 1}, 0.0),
    ],
)
def test_numeracy_scores_by_hand(found, score):
    assert numeracy_score([("cup", 2), ("dog", 1)], found) == score
