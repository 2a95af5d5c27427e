"""GenEval's rules on hand-made detections, and the Shapes world's suite scored by them."""

import json

import pytest
import torch

from cotgen_pl.rules.geneval import Found, graded_reward, judge, keep_sure, relative_positions
from cotgen_pl.shapes.judge import judge_geneval, strict
from cotgen_pl.shapes.recognise import Recognition
from cotgen_pl.shapes.render import COLORS, GRID, SHAPES, TEXTURES, Placed

CUP_LEFT, CUP_RIGHT, CUP_BELOW = (0, 0, 10, 10), (50, 0, 60, 10), (0, 50, 10, 60)


def found(label, box=CUP_LEFT, score=0.95):
    return Found(label, score, box)


def colors(**by_label):
    """Reads an object's color off its label."""
    return lambda item, name: by_label[item.label] if name == "color" else "plain"


def unread(item, name):
    raise AssertionError(f"{name} of {item.label} was read though it does not matter")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [  # recorded from GenEval's evaluation code at af4902f
        ((0, 100, 100, 200), (200, 100, 300, 200), {"left of"}),
        ((0, 0, 100, 100), (30, 0, 130, 100), set()),
        ((0, 0, 100, 100), (80, 60, 180, 160), {"left of"}),
        ((0, 0, 100, 100), (100, 110, 200, 210), {"above", "left of"}),
        ((50, 0, 150, 100), (50, 200, 150, 300), {"above"}),
        ((0, 0, 100, 100), (0, 0, 100, 100), set()),
    ],
)
def test_positions_match_geneval(a, b, expected):
    assert relative_positions(a, b) == expected
    mirrored = {"left of": "right of", "above": "below"}
    assert relative_positions(b, a) == {mirrored[name] for name in expected}


def test_sure_objects_are_kept_by_tag_and_class():
    items = [found("cup", score=score) for score in (0.31, 0.95, 0.3, 0.9)]
    assert [item.score for item in keep_sure(items, "colors")] == [0.95, 0.9, 0.31]
    assert [item.score for item in keep_sure(items, "counting")] == [0.95]
    many = [found("cup", score=0.5 + n / 100) for n in range(20)] + [found("cat", score=0.4)]
    kept = keep_sure(many, "single_object")
    assert [item.label for item in kept] == ["cup"] * 16 + ["cat"]
    assert kept[0].score == pytest.approx(0.69)


CUP, CAT = {"class": "cup", "count": 1}, {"class": "cat", "count": 1}
TWO_CUPS = {"include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}]}
RED_CUP = {"include": [CUP | {"color": "red"}]}
CAT_RIGHT_OF_CUP = {"include": [CUP, CAT | {"position": ["right of", 0]}]}


@pytest.mark.parametrize(
    ("facts", "items", "failed"),
    [
        ({"include": [CUP]}, [found("cup")], []),
        ({"include": [CUP]}, [found("cup"), found("cup")], []),  # more than asked will do
        ({"include": [CUP]}, [found("cat")], ["include 0: 1 cup"]),
        ({"include": [CUP, CAT]}, [found("cup")], ["include 1: 1 cat"]),
        (TWO_CUPS, [found("cup")] * 2, []),
        (TWO_CUPS, [found("cup")] * 3, ["exclude: 3 cup"]),
        (TWO_CUPS, [found("cup")], ["include 0: 2 cup"]),
        (CAT_RIGHT_OF_CUP, [found("cup"), found("cat", CUP_RIGHT)], []),
        (CAT_RIGHT_OF_CUP, [found("cup"), found("cat", CUP_BELOW)], ["position 1: right of 0"]),
        (
            CAT_RIGHT_OF_CUP,  # only the surest cat is looked at
            [found("cup"), found("cat", CUP_BELOW), found("cat", CUP_RIGHT, 0.5)],
            ["position 1: right of 0"],
        ),
        (
            CAT_RIGHT_OF_CUP,  # an unmatched target fails the position too
            [found("cat", CUP_RIGHT)],
            ["include 0: 1 cup", "position 1: right of 0"],
        ),
    ],
)
def test_verdicts_by_hand(facts, items, failed):
    clauses = judge(facts, items, unread)
    assert [name for name, holds in clauses.items() if not holds] == failed


def test_a_position_is_held_against_every_target_and_by_every_object():
    facts = {"include": [{"class": "cup", "count": 2}, CAT | {"position": ["right of", 0]}]}
    near, far = (20, 0, 30, 10), (80, 0, 90, 10)
    right = [found("cup"), found("cup", near), found("cat", far)]
    assert all(judge(facts, right, unread).values())
    between = [found("cup"), found("cup", far), found("cat", near)]
    assert not all(judge(facts, between, unread).values())


def test_every_object_that_counts_must_have_the_color():
    facts = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    by_place = {0: "red", 50: "red", 90: "blue"}
    items = [found("cup", (left, 0, left + 9, 9), 0.99 - left / 1000) for left in by_place]

    def read(item, name):
        return by_place[item.box[0]]

    assert all(judge(facts, items, read).values())  # the blue one is the least sure of three
    by_place[50] = "blue"
    assert judge(facts, items, read) == {"include 0: 2 cup": True, "color 0: red": False}
    assert judge(RED_CUP, [found("cup")], colors(cup="red"))["color 0: red"]


@pytest.mark.parametrize(
    ("facts", "items", "expected", "right"),
    [
        ({"include": [CUP]}, [found("cup")], 1.0, True),
        ({"include": [CUP]}, [found("cup")] * 2, 0.0, False),  # equal, not at least
        ({"include": [CUP]}, [found("cup")] * 3, -1.0, False),
        (TWO_CUPS, [found("cup")], 0.5, False),
        (RED_CUP, [found("cup")], 1.0, True),
        (RED_CUP, [], 0.0, False),
        (CAT_RIGHT_OF_CUP, [found("cup"), found("cat", CUP_RIGHT)], 1.0, True),
        (CAT_RIGHT_OF_CUP, [found("cup"), found("cat", CUP_BELOW)], 2 / 3, False),
        (CAT_RIGHT_OF_CUP, [found("cat", CUP_RIGHT)], 1 / 3, False),
        (CAT_RIGHT_OF_CUP, [found("cup")], 1 / 3, False),
    ],
)
def test_graded_rewards_by_hand(facts, items, expected, right):
    reward, strictly = graded_reward(facts, items, colors(cup="red"))
    assert reward == pytest.approx(expected)
    assert strictly is right


def test_graded_color_counts_those_that_have_it():
    facts = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    items = [found("cup"), found("cup", CUP_RIGHT)]

    def read(item, name):
        return "red" if item.box == CUP_LEFT else "blue"

    assert graded_reward(facts, items, read) == (pytest.approx((1 + 0.5) / 2), False)


def test_the_references_second_term_for_a_wrong_position():
    items = [found("cup"), found("cat", CUP_BELOW)]
    assert graded_reward(CAT_RIGHT_OF_CUP, items, unread, reference_faults=True)[0] == 0.75
    for same in ([found("cup")], [found("cup"), found("cat", CUP_RIGHT)]):
        plain = graded_reward(CAT_RIGHT_OF_CUP, same, unread)
        assert graded_reward(CAT_RIGHT_OF_CUP, same, unread, reference_faults=True) == plain


def test_the_shapes_suite_has_the_same_strict_verdicts_by_these_rules(repository):
    path = repository / "cotgen_pl/shapes/assets/prompts/ood_geneval.jsonl"
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    generator, agreed, right = torch.Generator().manual_seed(0), 0, 0
    for number in range(1000):
        facts = prompts[number % len(prompts)]
        placed = scatter(facts, generator)
        by_box = {item.box: item for item in placed}
        items = [Found(item.shape, 1.0, item.box) for item in placed]
        verdict = judge(
            facts,
            keep_sure(items, facts["category"]),
            lambda item, name, by_box=by_box: getattr(by_box[item.box], name),
        )
        own = strict(judge_geneval(facts, Recognition(placed)))
        agreed += all(verdict.values()) == bool(own)
        right += bool(own)
    assert agreed == 1000
    assert 100 < right < 900  # both verdicts occur


def scatter(facts, generator):
    """What a prompt asks for, often, and something else, sometimes, in random cells."""

    def pick(values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    kinds = [
        (item["class"], item.get("color") or pick(COLORS), item.get("texture") or pick(TEXTURES))
        for item in facts["include"]
        for _ in range(item["count"])
    ]
    if pick([True, False]):
        kinds.append((pick([kinds[0][0], *SHAPES]), pick(COLORS), pick(TEXTURES)))
    if pick([True, False, False, False]):
        kinds = kinds[1:]
    cells = torch.randperm(GRID * GRID, generator=generator)[: len(kinds)].sort().values.tolist()
    order = torch.randperm(len(kinds), generator=generator).tolist()
    return [
        Placed(*kinds[kind], row=cell // GRID, column=cell % GRID)
        for kind, cell in zip(order, cells, strict=True)
    ]
