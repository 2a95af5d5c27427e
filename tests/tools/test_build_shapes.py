"""The builder of scorers: what it makes, what it takes as it ships, and its gates."""

from pathlib import Path

import pytest
import torch

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.shapes.scorer_data import Pairs
from tools import build_shapes
from tools.build_shapes import DrawnSuite, build_scorers, check_scorers, make_pairs, share_of_uplift

KINDS = ["narrow", "mid", "broad", "narrow_more", "judge"]


class Known(Reward):
    """Scores that were given."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.tensor(values)

    def score(self, images, prompts):
        return Scores.single("known", self.values[: len(images)])


def suite(name, exact):
    rows = torch.tensor(exact)
    return DrawnSuite(name, [Prompt("")] * rows.numel(), torch.zeros(rows.numel(), 3, 1, 1), rows)


@pytest.fixture
def made(monkeypatch):
    """What was trained, as (kind, folder, seed), with stand-ins for policy, pictures and gates."""
    calls: list[tuple[str, Path, int]] = []
    checked: list[dict[str, Path]] = []

    def make(kind, policy, folder, seed):
        calls.append((kind, folder, seed))
        return folder / kind

    class Policy:
        def __init__(self, path):
            self.path = path

        def load(self):
            return self

    monkeypatch.setattr(build_shapes, "make_scorer", make)
    monkeypatch.setattr(build_shapes, "JanusPolicy", Policy)
    monkeypatch.setattr(build_shapes, "draw_suite", lambda policy, world, name, *_: name)
    monkeypatch.setattr(
        build_shapes,
        "check_scorers",
        lambda places, *_: checked.append(places) or [len(checked) == 1],
    )
    return calls, checked


def test_what_ships_is_not_made_again(made, tmp_path):
    calls, [places] = made[0], (build_scorers((0,), tmp_path, Path("world")), made[1])[1]
    assert calls == [(kind, tmp_path / "seed_0", 0) for kind in ("mid", "narrow_more")]
    shipped = Path("world") / "scorers"
    assert {kind: place.parent for kind, place in places.items()} == {
        kind: shipped if kind in ("narrow", "broad", "judge") else tmp_path / "seed_0"
        for kind in KINDS
    }


def test_other_seeds_are_made_whole_and_failed_gates_name_them(made, tmp_path):
    with pytest.raises(ValueError, match=r"gates failed with the scorers of seeds \[2\]"):
        build_scorers((1, 2), tmp_path, Path("world"))
    assert made[0] == [(k, tmp_path / f"seed_{seed}", seed) for seed in (1, 2) for k in KINDS]


def test_pairs_are_drawn_once(monkeypatch, tmp_path):
    drawn: list[int] = []
    pairs = Pairs([Prompt("a")], torch.zeros(1, 2, 3, 2, 2, dtype=torch.uint8), torch.eye(2)[:1])

    def collect(draw_pictures, prompts, number, report):
        drawn.append(number)
        return pairs

    monkeypatch.setattr(build_shapes, "collect_pairs", collect)
    for _ in range(2):
        assert make_pairs("in_domain", None, tmp_path, 0).prompts == pairs.prompts
    make_pairs("wide", None, tmp_path, 0)
    assert drawn == [12000, 6000]  # those of narrow_more and of broad


def test_share_of_uplift_by_hand():
    # The best of the first four gains 0.75 over their mean of 0.25, in the second group 0.5 of 0.5.
    exact = suite("id", [[0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    blind = Known([3.0, 0, 0, 0, 5.0, 0, 0, 0])  # takes the first: 0 and 1, less 0.25 and 0.5
    assert share_of_uplift(Known(exact.exact.flatten().tolist()), exact) == 1
    assert share_of_uplift(blind, exact) == pytest.approx((0.5 - 0.375) / (1.0 - 0.375))


@pytest.fixture
def measured(monkeypatch):
    """Sets the accuracies in and out of domain, and the shares of the uplift out of domain."""
    values: dict[str, tuple[float, float, float]] = {}
    sets = {"held_out_in_domain": 0, "held_out_out_of_domain": 1}
    monkeypatch.setattr(build_shapes, "load_scorer", lambda kind, place: kind)
    monkeypatch.setattr(build_shapes, "make_pairs", lambda name, *_: sets[name])
    monkeypatch.setattr(build_shapes, "pair_accuracy", lambda kind, which: values[kind][which])
    monkeypatch.setattr(build_shapes, "share_of_uplift", lambda kind, suite: values[kind][2])
    return values


GOOD = {"narrow": (0.87, 0.65, 0.2), "mid": (0.875, 0.75, 0.5), "broad": (0.88, 0.83, 0.75)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [True, True, True, True]),
        ({"mid": (0.84, 0.75, 0.5)}, [False, True, True, True]),
        ({"narrow": (0.87, 0.72, 0.2)}, [True, False, True, True]),
        ({"narrow": (0.87, 0.65, 0.36)}, [True, True, False, True]),
        ({"broad": (0.88, 0.83, 0.69)}, [True, True, True, False]),
    ],
)
def test_gates_on_scorers(measured, changed, expected):
    measured |= GOOD | changed
    places = {kind: Path(kind) for kind in GOOD}
    assert check_scorers(places, None, Path(), 0, ["id", "ood"]) == expected
