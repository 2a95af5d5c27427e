"""The rule for positions, on boxes whose score can be worked out by hand."""

import pytest

from cotgen_pl.rules.position import RELATIONS, overlap, score_position

HERE = (0, 0, 100, 100)


def shifted(x, y):
    return (x, y, x + 100, y + 100)


@pytest.mark.parametrize(
    ("relation", "first", "second", "expected"),
    [
        ("on the left of", HERE, shifted(150, 0), 1.0),
        ("on the left of", HERE, shifted(50, 0), 0.3),  # 0.1 / (5000 / 15000)
        ("on the left of", HERE, shifted(95, 0), 1.0),  # overlap 500 / 19500 is below 0.1
        ("on the right of", HERE, shifted(150, 0), 0.0),
        ("right of", shifted(150, 0), HERE, 1.0),
        ("on the top of", HERE, shifted(0, 150), 1.0),
        ("top of", HERE, shifted(0, 150), 1.0),
        ("on top of", HERE, shifted(0, 150), 1.0),
        ("above", HERE, shifted(0, 150), 1.0),
        ("above", HERE, shifted(0, 50), 0.3),
        ("above", HERE, shifted(0, -150), 0.0),
        ("on the bottom of", HERE, shifted(0, -150), 1.0),
        ("below", HERE, shifted(0, -150), 1.0),
        ("below", HERE, shifted(0, 150), 0.0),
        ("left of", HERE, shifted(120, 150), 0.0),  # further below than to the side
        ("left of", HERE, shifted(150, 150), 0.0),  # as far
        ("next to", HERE, shifted(300, 300), 0.5),
        ("near", (0, 0, 50, 50), (200, 160, 250, 210), 0.75),  # 150 / 200
        ("on side of", HERE, shifted(-300, 149), 1.0),  # one distance below 150 is enough
        ("on side of", HERE, shifted(-300, -150), 0.5),
    ],
)
def test_relations_of_boxes(relation, first, second, expected):
    assert score_position(relation, first, second) == pytest.approx(expected, abs=1e-12)


def test_the_published_thresholds_can_be_changed():
    assert score_position("near", HERE, shifted(300, 300), near=60) == 0.2
    assert score_position("left of", HERE, shifted(50, 0), most_overlap=0.25) == 0.75


@pytest.mark.parametrize("relation", sorted(RELATIONS))
def test_mirrored_boxes_fit_the_opposite_direction_only(relation):
    far = {"beside": shifted(10, 0), "left": shifted(150, 0), "right": shifted(-150, 0)}
    far |= {"above": shifted(0, 150), "below": shifted(0, -150)}
    second = far[RELATIONS[relation]]
    assert score_position(relation, HERE, second) == 1
    assert score_position(relation, second, HERE) == float(RELATIONS[relation] == "beside")


def test_overlap_is_intersection_over_union():
    assert overlap(HERE, HERE) == 1
    assert overlap(HERE, (50, 50, 150, 150)) == pytest.approx(2500 / 17500)
    assert overlap((0, 0, 10, 10), HERE) == pytest.approx(0.01)  # one inside the other
    assert overlap(HERE, shifted(200, 0)) == overlap(HERE, shifted(200, 200)) == 0
    assert overlap((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match=r"expected a relation out of .*got 'behind'"):
        score_position("behind", HERE, HERE)
