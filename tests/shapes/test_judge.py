import json

import pytest

from cotgen_pl.shapes.judge import (
    check_compbench_facts,
    check_geneval_facts,
    graded,
    judge,
    judge_compbench,
    judge_geneval,
    relation_holds,
    strict,
)
from cotgen_pl.shapes.recognise import Recognition
from cotgen_pl.shapes.render import Placed


def asked(shape, color=None, texture=None, count=1, numbered=False):
    return {
        "shape": shape,
        "color": color,
        "texture": texture,
        "count": count,
        "numbered": numbered,
    }


def facts(*objects, relations=()):
    return {"objects": list(objects), "relations": [list(r) for r in relations]}


def seen(*words):
    """Objects side by side from "striped red circle" and the like."""
    placed = []
    for place, word in enumerate(words):
        texture, color, shape = word.split()
        placed.append(Placed(shape, color, texture, row=place // 4, column=place % 4))
    return Recognition(placed)


RED_AND_BLUE = facts(asked("circle", "red"), asked("square", "blue"))


def failed(verdict):
    return [name for name, holds in verdict.items() if not holds]


def test_a_right_picture_satisfies_all():
    verdict = judge_compbench(RED_AND_BLUE, seen("plain blue square", "striped red circle"))
    assert list(verdict) == [
        "color 0: red",
        "color 1: blue",
        "no extra object",
    ]
    assert graded(verdict) == strict(verdict) == 1


def test_one_wrong_color_fails_its_clause_only():
    verdict = judge_compbench(RED_AND_BLUE, seen("plain red circle", "plain red square"))
    assert failed(verdict) == ["color 1: blue"]
    assert graded(verdict) == pytest.approx(2 / 3)
    assert strict(verdict) == 0


def test_swapped_colors_score_zero():
    verdict = judge_compbench(RED_AND_BLUE, seen("plain red square", "plain blue circle"))
    assert graded(verdict) == 0


def test_an_object_without_attributes_has_a_clause_of_its_own():
    bare = facts(asked("circle"), asked("square"))
    verdict = judge_compbench(bare, seen("plain red circle"))
    assert failed(verdict) == ["object 1: square"]
    assert next(iter(verdict)) == "object 0: circle"


def test_an_empty_picture_and_a_picture_of_nothing_asked_score_zero():
    for recognition in (seen(), seen("plain green triangle", "plain red cross")):
        assert graded(judge_compbench(RED_AND_BLUE, recognition)) == 0


def test_what_is_no_picture_scores_zero():
    right = seen("plain blue square", "striped red circle")
    right.is_picture = False
    assert graded(judge_compbench(RED_AND_BLUE, right)) == 0
    assert graded(judge_geneval({"include": [{"class": "square", "count": 1}]}, right)) == 0


def test_extra_objects_and_unreadable_cells_fail_one_clause():
    extra = seen("plain blue square", "striped red circle", "plain red circle")
    assert failed(judge_compbench(RED_AND_BLUE, extra)) == ["no extra object"]
    unread = seen("plain blue square", "striped red circle")
    unread.unreadable = [(3, 3)]
    assert failed(judge_compbench(RED_AND_BLUE, unread)) == ["no extra object"]


def test_one_object_is_not_counted_twice():
    both = facts(asked("circle", "red"), asked("circle", "blue"))
    verdict = judge_compbench(both, seen("plain blue circle"))
    assert failed(verdict) == ["color 0: red"]
    twice = facts(asked("circle", "red"), asked("circle", "red"))
    assert failed(judge_compbench(twice, seen("plain red circle"))) == ["color 1: red"]


def test_objects_are_matched_for_the_best_total():
    both = facts(asked("circle", "red", "plain"), asked("circle", "blue", "plain"))
    verdict = judge_compbench(both, seen("striped red circle", "plain red circle"))
    # the plain red one is the first, the striped red one is left for the second
    assert failed(verdict) == ["color 1: blue", "texture 1: plain", "binding 1"]


def test_attributes_must_meet_on_one_object():
    striped = facts(asked("circle", "red", "striped"))
    verdict = judge_compbench(striped, seen("plain red circle", "striped blue circle"))
    assert not verdict["binding 0"]
    assert verdict["color 0: red"] + verdict["texture 0: striped"] == 1
    apart = judge_compbench(striped, seen("plain blue circle", "striped red square"))
    assert failed(apart) == ["color 0: red", "texture 0: striped", "binding 0", "no extra object"]


@pytest.mark.parametrize(("number", "right"), [(1, False), (2, True), (3, False)])
def test_a_named_number_is_exact(number, right):
    two = facts(asked("circle", "red", count=2, numbered=True))
    verdict = judge_compbench(two, seen(*["plain red circle"] * number))
    assert verdict["count 0: 2"] is right
    assert verdict["color 0: red"] and verdict["no extra object"] is (number <= 2)


def test_objects_of_another_color_do_not_count():
    two = facts(asked("circle", "red", count=2, numbered=True))
    verdict = judge_compbench(two, seen("plain red circle", "plain blue circle"))
    assert failed(verdict) == ["count 0: 2"]


def test_a_relation_needs_right_objects_and_any_pair_will_do():
    left = facts(asked("circle", "red"), asked("square", "blue"), relations=[(0, "left", 1)])
    right_order = seen("plain red circle", "plain blue square")
    assert strict(judge_compbench(left, right_order)) == 1
    wrong_order = seen("plain blue square", "plain red circle")
    assert failed(judge_compbench(left, wrong_order)) == ["relation: 0 left 1"]
    wrong_color = seen("plain green circle", "plain blue square")
    assert "relation: 0 left 1" in failed(judge_compbench(left, wrong_color))
    pair = seen("plain blue square", "plain red circle", "plain blue square")
    assert failed(judge_compbench(left, pair)) == ["no extra object"]


@pytest.mark.parametrize(
    ("relation", "a", "b", "holds"),
    [  # cells as (row, column)
        ("left", (1, 0), (1, 1), True),
        ("left", (0, 0), (1, 2), True),
        ("left", (0, 0), (1, 1), False),  # a diagonal: neither axis wins
        ("left", (1, 1), (1, 0), False),
        ("right", (1, 3), (2, 1), True),
        ("right", (1, 3), (3, 2), False),
        ("above", (0, 2), (2, 3), True),
        ("above", (2, 2), (0, 2), False),
        ("below", (3, 0), (1, 1), True),
        ("below", (3, 0), (2, 3), False),
        ("next to", (0, 0), (1, 1), True),
        ("next to", (0, 0), (1, 3), True),  # one row apart: 8 pixels, below 150 * 32 / 479 = 10.02
        ("next to", (0, 0), (2, 2), False),  # two apart both ways: 16 pixels
    ],
)
def test_relations_follow_the_rule_on_centres(relation, a, b, holds):
    placed = [Placed("circle", "red", "plain", *cell) for cell in (a, b)]
    assert relation_holds(relation, *placed) is holds


def test_geneval_counts_with_include_and_exclude():
    three = {
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
    }
    wrong = {0: 2, 1: 1, 2: 1, 3: 0, 4: 1}  # clauses that fail, by number of crosses
    for number, count in wrong.items():
        verdict = judge_geneval(three, seen(*["plain red cross"] * number))
        assert len(failed(verdict)) == count, number


def test_geneval_looks_at_the_first_objects_only():
    red = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
    assert strict(judge_geneval(red, seen("plain red circle", "plain blue circle"))) == 1
    verdict = judge_geneval(red, seen("plain blue circle", "plain red circle"))
    assert failed(verdict) == ["color 0: red"]


def test_geneval_attributes_fail_without_enough_objects():
    two = {"include": [{"class": "circle", "count": 2, "color": "red", "texture": "striped"}]}
    assert graded(judge_geneval(two, seen("striped red circle"))) == 0
    verdict = judge_geneval(two, seen("striped red circle", "plain red circle"))
    assert failed(verdict) == ["texture 0: striped"]


def test_geneval_position_is_against_a_matched_target():
    left = {
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "position": ["left of", 0]},
        ]
    }
    assert strict(judge_geneval(left, seen("plain red circle", "plain blue square"))) == 1
    mirrored = judge_geneval(left, seen("plain blue square", "plain red circle"))
    assert failed(mirrored) == ["position 1: left of 0"]
    unmatched = judge_geneval(left, seen("plain red circle", "plain red square"))
    assert failed(unmatched) == ["color 0: blue", "position 1: left of 0"]


def test_the_rules_follow_the_facts():
    recognition = seen("plain red circle")
    assert "no extra object" in judge(facts(asked("circle")), recognition)
    assert list(judge({"include": [{"class": "circle", "count": 1}]}, recognition)) == [
        "include 0: 1 circle"
    ]


# Facts ------------------------------------------------------------------------------------------


def without(item, name):
    return {key: value for key, value in item.items() if key != name}


CIRCLE = asked("circle", "red")


@pytest.mark.parametrize(
    ("broken", "got"),
    [
        *(
            ({"objects": [CIRCLE, without(CIRCLE, name)], "relations": []}, "{")
            for name in ("shape", "color", "texture", "count", "numbered")
        ),
        ({"objects": [CIRCLE | {"count": 0}], "relations": []}, "{"),
        ({"objects": [], "relations": []}, "None"),
        ({"objects": "circle", "relations": []}, "'circle'"),
        ({"objects": [CIRCLE]}, "None"),
        ({"objects": [CIRCLE], "relations": [[0, "left", 1]]}, "[0, 'left', 1]"),
        ({"objects": [CIRCLE] * 2, "relations": [[0, "left of", 1]]}, "[0, 'left of', 1]"),
        ({"objects": [CIRCLE] * 2, "relations": [[0, "left"]]}, "[0, 'left']"),
    ],
    ids=str,
)
def test_in_domain_facts_that_cannot_be_judged_are_refused(broken, got):
    with pytest.raises(ValueError, match=r"expected a list under '(objects|relations)', each") as e:
        check_compbench_facts(broken)
    assert f", got {got}" in str(e.value) and "correct this prompt's facts" in str(e.value)
    check_compbench_facts({"objects": [CIRCLE] * 2, "relations": [[0, "next to", 1]]})


CAT = {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("broken", "got"),
    [
        ({"include": [CAT, {"count": 1}]}, "{'count': 1}"),
        ({"include": [{"class": "cat"}]}, "{'class': 'cat'}"),
        ({"include": []}, "None"),
        ({"include": [CAT | {"color": None}]}, "{"),
        ({"include": [CAT | {"position": ["left of", 0]}, CAT]}, "{"),  # not an earlier one
        ({"include": [CAT, CAT | {"position": ["left", 0]}]}, "{"),
        ({"include": [CAT], "exclude": [{"class": "dog"}]}, "{'class': 'dog'}"),
        ({"include": [CAT], "exclude": None}, "None"),
    ],
    ids=str,
)
def test_out_of_domain_facts_that_cannot_be_judged_are_refused(broken, got):
    with pytest.raises(ValueError, match=r"expected a list under '(include|exclude)', each") as e:
        check_geneval_facts(broken)
    assert f", got {got}" in str(e.value)
    check_geneval_facts({"include": [CAT, CAT | {"position": ["left of", 0], "color": "red"}]})


def test_the_shipped_prompts_can_all_be_judged(repository):
    paths = sorted((repository / "cotgen_pl/shapes/assets/prompts").glob("*.jsonl"))
    assert len(paths) >= 8
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            (check_compbench_facts if "objects" in row else check_geneval_facts)(row)
