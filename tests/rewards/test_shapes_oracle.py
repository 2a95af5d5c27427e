import random

import pytest
import torch

from cotgen_pl.interfaces import check_scores
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from cotgen_pl.shapes.grammar import draw_prompt
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil

WORDINGS = [("compbench", "in_domain"), ("geneval", "geneval")]


def pictures(wording, count=60):
    """Prompts with a right picture, a spoiled one and one of shapeless grey each."""
    rng = random.Random(8)
    prompts = [draw_prompt(rng, wording=wording, words="all", pairs="all") for _ in range(count)]
    scenes = [compose(p, rng) for p in prompts]
    right = torch.stack([render(scene) for scene in scenes])
    wrong = torch.stack(
        [render(spoil(p, scene, rng)) for p, scene in zip(prompts, scenes, strict=True)]
    )
    return prompts, right, wrong, torch.full_like(right, 0.5)


@pytest.mark.parametrize(("rules", "wording"), WORDINGS)
def test_right_pictures_score_one_wrong_ones_less_and_others_zero(rules, wording):
    prompts, right, wrong, grey = pictures(wording)
    oracle = ShapesOracle(rules).load()
    best = oracle.score(right, prompts)
    assert (best.total == 1).all() and (best.parts["strict"] == 1).all()
    assert all(detail["failed"] == [] for detail in best.details)
    spoiled = oracle.score(wrong, prompts)
    assert (spoiled.total < 1).all() and (spoiled.parts["strict"] == 0).all()
    assert 0.2 < spoiled.total.mean() < 0.8
    assert (oracle.score(grey, prompts).total == 0).all()


@pytest.mark.parametrize(("rules", "wording"), WORDINGS)
def test_verdicts_do_not_depend_on_the_batch(rules, wording):
    prompts, _, wrong, _ = pictures(wording, count=12)
    oracle = ShapesOracle(rules)
    together = oracle.score(wrong, prompts)
    alone = [oracle.score(wrong[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
    assert torch.equal(together.total, torch.cat([scores.total for scores in alone]))


def test_scores_have_the_agreed_form():
    prompts, right, wrong, _ = pictures("in_domain", count=5)
    scores = ShapesOracle().score(wrong, prompts)
    check_scores(scores, 5, "shapes_oracle")
    assert scores.total.dtype == torch.float32
    assert scores.weights == {"graded": 1.0, "strict": 0.0}
    assert all(detail["failed"] for detail in scores.details)
    seen = ShapesOracle().score(right, prompts).details[0]["objects"][0]
    assert set(seen) == {"shape", "color", "texture", "row", "column"}


def test_low_precision_pictures_get_float32_scores():
    prompts, right, _, _ = pictures("in_domain", count=20)
    scores = ShapesOracle().score(right.bfloat16(), prompts)
    assert scores.total.dtype == torch.float32
    assert (scores.total == 1).all()


def test_each_rule_set_asks_for_its_own_facts():
    assert ShapesOracle().required_facts == ("objects",)
    assert ShapesOracle("geneval").required_facts == ("include",)


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="expected compbench or geneval, got 'vqa'"):
        ShapesOracle("vqa")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_stay_on_the_device_of_the_pictures():
    prompts, right, _, _ = pictures("in_domain", count=5)
    assert ShapesOracle().score(right.cuda(), prompts).total.device.type == "cuda"
