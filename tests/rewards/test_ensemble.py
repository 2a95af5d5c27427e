"""Ensemble: weighted sums, missing verdicts, standardising, and what it refuses."""

import math
import threading
import time

import pytest
import torch

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.rewards.ensemble import Ensemble, _place, standardise_scores

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]
NAN = math.nan


class Fixed(Reward):
    """Scores that are written down."""

    def __init__(self, *values, facts=(), details=None):
        super().__init__()
        self.values, self.details, self.required_facts = torch.tensor(values), details, facts
        self.loads = 0

    def load(self):
        self.loads += 1
        return self

    def score(self, images, prompts):
        return Scores.single("own", self.values, self.details)


class Brightness(Reward):
    """The mean of a picture; it tells pictures apart, whatever their place in the batch."""

    def score(self, images, prompts):
        return Scores.single("brightness", images.mean(dim=(1, 2, 3)))


class Judge(Fixed):
    """One score that counts and one that is watched."""

    def score(self, images, prompts):
        strict = (self.values == 1).float()
        return Scores(
            self.values, {"graded": self.values, "strict": strict}, {"graded": 1.0, "strict": 0.0}
        )


A, B = (1.0, 2.0, 3.0, 4.0), (0.5, 0.0, -1.0, 0.25)


def test_total_is_the_weighted_sum_and_parts_are_the_raw_scores():
    ensemble = Ensemble({"a": Fixed(*A), "b": Fixed(*B)}, {"b": 4.0, "a": 0.5})
    scores = ensemble.score(IMAGES, PROMPTS)
    assert scores.total.tolist() == [2.5, 1.0, -2.5, 3.0]  # 0.5 a + 4 b
    assert scores.parts["a"].tolist() == list(A) and scores.parts["b"].tolist() == list(B)
    assert scores.weights == {"a": 0.5, "b": 4.0}


def test_weights_are_one_by_default():
    scores = Ensemble({"a": Fixed(*A), "b": Fixed(*B)}).score(IMAGES, PROMPTS)
    assert scores.total.tolist() == [1.5, 2.0, 2.0, 4.25]
    assert scores.weights == {"a": 1.0, "b": 1.0}


class Variant(Fixed):
    """Calls one category's score by another name."""

    def __init__(self, mark):
        super().__init__(*A)
        self.mark = mark

    def metric_name(self, category):
        return f"{category}[{self.mark}]" if category == "color" else category


def test_the_name_of_a_score_tells_what_rewards_with_a_weight_say_of_theirs():
    rewards = {"a": Fixed(*A), "b": Variant("x"), "c": Variant("y"), "d": Variant("x")}

    def name(*weights, category="color"):
        return Ensemble(rewards, dict(zip("abcd", weights, strict=True))).metric_name(category)

    assert name(1, 1, 0, 0) == "color[x]"
    assert name(1, 0, 0, 0) == "color"
    assert name(1, 1, -2, 1) == "color[x]+color[y]"
    assert name(1, 1, 1, 1, category="shape") == "shape"


def test_scores_follow_their_picture():
    ensemble = Ensemble(
        {"first": Brightness(), "second": Brightness()}, {"first": 1.0, "second": -3.0}
    )
    total = ensemble.score(IMAGES, PROMPTS).total
    order = [2, 0, 3, 1]
    shuffled = ensemble.score(IMAGES[order], [PROMPTS[i] for i in order]).total
    assert torch.equal(shuffled, total[order])
    single = torch.cat(
        [ensemble.score(IMAGES[i : i + 1], PROMPTS[i : i + 1]).total for i in range(4)]
    )
    torch.testing.assert_close(single, total)
    assert total.std() > 0


def test_a_brighter_picture_is_better():
    ensemble = Ensemble({"brightness": Brightness()})
    total = ensemble.score(
        torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), PROMPTS[:2]
    ).total
    assert total[1] > total[0]


def test_a_missing_weighted_part_makes_the_total_missing():
    scores = Ensemble({"a": Fixed(1.0, NAN, 3.0, 4.0), "b": Fixed(*B)}).score(IMAGES, PROMPTS)
    assert scores.total.isnan().tolist() == [False, True, False, False]
    assert scores.parts["b"].isnan().sum() == 0


def test_a_missing_watched_part_is_harmless():
    ensemble = Ensemble({"a": Fixed(*A), "b": Fixed(NAN, NAN, NAN, NAN)}, {"a": 1.0, "b": 0.0})
    scores = ensemble.score(IMAGES, PROMPTS)
    assert scores.total.tolist() == list(A) and scores.weights == {"a": 1.0, "b": 0.0}
    assert scores.parts["b"].isnan().all()


def test_inner_parts_are_watched_under_the_name_of_their_reward():
    ensemble = Ensemble(
        {"judge": Judge(1.0, 0.5, 0.0, 1.0), "hps_v2.1": Fixed(*B)}, {"judge": 2.0, "hps_v2.1": 1.0}
    )
    scores = ensemble.score(IMAGES, PROMPTS)
    assert scores.total.tolist() == [2.5, 1.0, -1.0, 2.25]
    assert scores.weights == {
        "judge": 2.0,
        "judge/graded": 0.0,
        "judge/strict": 0.0,
        "hps_v2.1": 1.0,
    }
    assert scores.parts["judge/strict"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_ensembles_nest():
    inner = Ensemble({"a": Fixed(*A), "b": Fixed(*B)}, {"a": 1.0, "b": 2.0})
    scores = Ensemble({"inner": inner, "c": Fixed(*B)}).score(IMAGES, PROMPTS)
    assert scores.total.tolist() == [2.5, 2.0, 0.0, 4.75]  # a + 3 b
    assert scores.weights == {"inner": 1.0, "inner/a": 0.0, "inner/b": 0.0, "c": 1.0}


def test_standardised_parts_count_equally_and_parts_stay_raw():
    small = tuple(0.25 + 0.001 * value for value in A)
    scores = Ensemble({"a": Fixed(*A), "b": Fixed(*small)}, standardise=True).score(IMAGES, PROMPTS)
    # mean 2.5, population deviation sqrt(1.25): twice (-1.5, -0.5, 0.5, 1.5) / 1.11803
    expected = torch.tensor([-2.68328, -0.89443, 0.89443, 2.68328])
    torch.testing.assert_close(
        scores.total, expected, atol=1e-3, rtol=0
    )  # 0.251 is not exact in float32
    assert scores.parts["a"].tolist() == list(A)


def test_standardising_leaves_missing_verdicts_out():
    assert standardise_scores(torch.tensor([1.0, NAN, 3.0, NAN])).nan_to_num(9.0).tolist() == [
        -1,
        9,
        1,
        9,
    ]


@pytest.mark.parametrize("value", [0.1, 0.0, -7.3, 1e6])
def test_a_part_without_spread_becomes_zero(value):
    assert standardise_scores(torch.full((7,), value)).tolist() == [0.0] * 7
    single = standardise_scores(torch.tensor([NAN, value]))
    assert single[1] == 0 and single[0].isnan()
    assert standardise_scores(torch.tensor([NAN, NAN])).isnan().all()


def test_details_stand_under_the_name_of_their_reward():
    details = [{"failed": i} for i in range(4)]
    scores = Ensemble({"a": Fixed(*A, details=details), "b": Fixed(*B)}).score(IMAGES, PROMPTS)
    assert scores.details == [{"a": {"failed": i}} for i in range(4)]
    assert Ensemble({"b": Fixed(*B)}).score(IMAGES, PROMPTS).details is None


def test_load_and_required_facts_cover_every_reward():
    members = {
        "a": Fixed(*A, facts=("objects", "nouns")),
        "b": Fixed(*B, facts=("nouns", "relation")),
    }
    ensemble = Ensemble(members)
    assert ensemble.required_facts == ("objects", "nouns", "relation")
    assert ensemble.load() is ensemble
    assert [member.loads for member in members.values()] == [1, 1]
    assert Ensemble({"b": Fixed(*B)}).required_facts == ()


def test_rewards_move_with_the_ensemble():
    holder = Fixed(*A)
    holder.layer = torch.nn.Linear(2, 2)
    assert len(list(Ensemble({"hps_v2.1": holder}).parameters())) == 2


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ({}, None, "at least one reward"),
        ({"a": Fixed(*A)}, {"b": 1.0}, r"one weight for each of \['a'\], got weights for \['b'\]"),
        ({"a": Fixed(*A), "b": Fixed(*B)}, {"a": 1.0}, "got weights for"),
        ({"a": Fixed(*A)}, {"a": 0.0}, "a weight other than 0"),
        ({"a/b": Fixed(*A)}, None, "names without '/'"),
    ],
)
def test_wrong_arguments_are_refused(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(rewards, weights)


def test_a_verdict_of_the_wrong_shape_names_its_reward():
    with pytest.raises(
        ValueError, match=r"reward broken: expected total of shape \(4,\).* got \(3,\)"
    ):
        Ensemble({"fine": Fixed(*A), "broken": Fixed(1.0, 2.0, 3.0)}).score(IMAGES, PROMPTS)


def test_a_verdict_that_is_no_scores_names_its_reward():
    class Bare(Reward):
        def score(self, images, prompts):
            return torch.zeros(4)

    with pytest.raises(ValueError, match="reward bare: expected Scores, got Tensor"):
        Ensemble({"bare": Bare()}).score(IMAGES, PROMPTS)


def test_an_infinite_score_names_its_reward():
    rewards = {"fine": Fixed(*A), "broken": Fixed(1.0, 2.0, math.inf, 3.0)}
    with pytest.raises(ValueError, match="reward broken: expected finite scores or NaN"):
        Ensemble(rewards).score(IMAGES, PROMPTS)


def test_facts_are_checked_by_every_reward_that_reads_into_them():
    class Reader(Fixed):
        def check_prompt(self, prompt):
            if "colour" not in prompt.facts["objects"]:
                raise ValueError("expected a colour")

    ensemble = Ensemble({"blind": Fixed(*A), "inner": Ensemble({"reader": Reader(*A)})})
    ensemble.check_prompt(Prompt("p", facts={"objects": {"colour": "red"}}))
    with pytest.raises(ValueError, match="expected a colour"):
        ensemble.check_prompt(Prompt("p", facts={"objects": {}}))


# --- where members live, and how long they take


class Placed(Brightness):
    """A reward of a place, which notes when it scores and may wait for others to score as well."""

    def __init__(self, device=None, pause=0.0, barrier=None, notes=None):
        super().__init__()
        self.device, self.pause, self.barrier = device, pause, barrier
        self.notes = [] if notes is None else notes

    def score(self, images, prompts):
        self.notes.append(("starts", self.device))
        if self.barrier:
            self.barrier.wait(timeout=5)
        time.sleep(self.pause)
        self.grad, self.autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        self.notes.append(("ends", self.device))
        return super().score(images, prompts)


@pytest.mark.parametrize(
    "devices", [("cuda:0", "cuda:1"), (None, "cuda:0"), (None, "remote"), ("remote", "remote")]
)
def test_members_of_several_places_score_at_the_same_time(devices):
    barrier = threading.Barrier(2)  # each waits until both score
    members = {name: Placed(d, barrier=barrier) for name, d in zip("ab", devices, strict=True)}
    scores = Ensemble(members).score(IMAGES, PROMPTS)
    torch.testing.assert_close(scores.total, 2 * IMAGES.mean(dim=(1, 2, 3)))
    assert list(scores.parts) == ["a", "b"]


@pytest.mark.parametrize("devices", [("cuda:1", "cuda:1"), (None, None), (None, "cpu")])
def test_members_of_one_place_score_one_after_another(devices):
    notes = []
    elsewhere = Placed("elsewhere")
    members = {n: Placed(d, 0.02, notes=notes) for n, d in zip("ab", devices, strict=True)}
    Ensemble({"a": members["a"], "c": elsewhere, "b": members["b"]}).score(IMAGES, PROMPTS)
    assert [what for what, _ in notes] == ["starts", "ends", "starts", "ends"]
    assert [place for _, place in notes[::2]] == list(devices)
    assert len(elsewhere.notes) == 2


@pytest.mark.parametrize(
    ("device", "pictures", "place"),
    [
        (None, "cpu", "cpu"),
        (None, "cuda:1", "cuda:1"),
        ("cuda", "cuda:1", "cuda:1"),  # a name for two places would be scored at twice at a time
        ("cuda:0", "cuda:1", "cuda:0"),
        ("cpu", "cuda:1", "cpu"),
        ("remote", "cuda:0", "remote"),
    ],
)
def test_each_place_has_one_name(device, pictures, place):
    assert _place(device, torch.device(pictures)) == place


def test_parts_stand_in_the_order_of_the_rewards_whatever_their_places():
    members = {"a": Placed("x", 0.03), "b": Placed("y"), "c": Placed("x"), "d": Placed("z")}
    scores = Ensemble(members).score(IMAGES, PROMPTS)
    assert list(scores.parts) == list(scores.seconds) == ["a", "b", "c", "d"]


def test_members_in_threads_score_without_gradient_and_autocast():
    members = {"a": Placed("x"), "b": Placed("y")}
    with torch.autocast("cpu", torch.bfloat16):
        Ensemble(members).score(IMAGES, PROMPTS)
    assert [(m.grad, m.autocast) for m in members.values()] == [(False, False)] * 2


def test_members_in_threads_are_loaded_one_after_another():
    notes = []

    class Reading(Placed):
        def load(self):
            if ("read", self.device) not in notes:
                notes.append(("reads", self.device))
                time.sleep(0.02)
                notes.append(("read", self.device))
            return self

    Ensemble({"a": Reading("x"), "b": Reading("y")}).score(IMAGES, PROMPTS)
    assert notes == [("reads", "x"), ("read", "x"), ("reads", "y"), ("read", "y")]


def test_a_failure_in_a_thread_reaches_the_caller():
    class Broken(Placed):
        def score(self, images, prompts):
            raise ValueError("out of order")

    with pytest.raises(ValueError, match="out of order"):
        Ensemble({"a": Placed("x"), "b": Broken("y")}).score(IMAGES, PROMPTS)


def test_seconds_are_told_by_member():
    inner = Ensemble({"slow": Placed(pause=0.05), "quick": Placed()})
    seconds = Ensemble({"inner": inner, "quick": Placed()}).score(IMAGES, PROMPTS).seconds
    assert list(seconds) == ["inner", "quick"]
    assert seconds["inner"] >= 0.05 > seconds["quick"] >= 0
