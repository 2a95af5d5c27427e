"""Prompts, pairs and renderings that the learned scorers are made of."""

import random
from itertools import islice

import pytest
import torch

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from cotgen_pl.shapes.grammar import (
    A_COLORS,
    A_SHAPES,
    draw_prompt,
    has_b_word,
    has_held_out_pair,
    suites,
)
from cotgen_pl.shapes.judge import judge, strict
from cotgen_pl.shapes.recognise import Recognition, recognise
from cotgen_pl.shapes.render import Placed, render
from cotgen_pl.shapes.scenes import compose, spoil
from cotgen_pl.shapes.scorer_data import (
    Pairs,
    collect_pairs,
    draw_prompts,
    draw_renderings,
    exchange,
    join_pairs,
    pair_accuracy,
    spoil_within,
    vote,
)


def draw_pictures(prompts: list[Prompt]) -> torch.Tensor:
    """A stand-in for a policy: mostly wrong pictures, the same for the same prompts."""
    rng = random.Random(prompts[0].text)
    scenes = [compose(prompt, rng) for prompt in prompts for _ in range(2)]
    wrong = [spoil(prompts[i // 2], scene, rng) for i, scene in enumerate(scenes)]
    drawn = [rng.choices(both, (1, 3))[0] for both in zip(scenes, wrong, strict=True)]
    return torch.stack([render(scene) for scene in drawn])


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return collect_pairs(draw_pictures, draw_prompts("in_domain", "test"), 120, lambda line: None)


def test_pairs_come_back_from_a_folder_as_they_were(pairs, tmp_path):
    pairs.write(tmp_path / "pairs")
    read = Pairs.read(tmp_path / "pairs")
    assert torch.equal(read.pictures, pairs.pictures) and torch.equal(read.scores, pairs.scores)
    assert [(p.text, p.category, p.index) for p in read.prompts] == [
        (p.text, p.category, p.index) for p in pairs.prompts
    ]
    for prompt, before in zip(read.prompts, pairs.prompts, strict=True):  # tuples became lists
        assert judge(prompt.facts, Recognition([])) == judge(before.facts, Recognition([]))


class Fixed(Reward):
    """Scores that are known beforehand."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def score(self, images, prompts):
        return Scores.single("fixed", self.values)


def test_no_prompt_stands_in_an_evaluation_suite():
    evaluated = {
        prompt.text
        for name, prompts in suites().items()
        if name not in ("train", "id_probe")
        for prompt in prompts
    }
    assert len(evaluated) > 500
    rng = random.Random(0)
    unfiltered = [draw_prompt(rng, wording="both", words="all", pairs="all") for _ in range(1000)]
    assert any(prompt.text in evaluated for prompt in unfiltered)
    for domain in ("in_domain", "wide"):
        drawn = list(islice(draw_prompts(domain, 0), 1000))
        assert not [prompt.text for prompt in drawn if prompt.text in evaluated]
        assert [prompt.index for prompt in drawn] == list(range(1000))


def test_in_domain_prompts_are_those_of_the_rl_run():
    inside = list(islice(draw_prompts("in_domain", 0), 500))
    wide = list(islice(draw_prompts("wide", 0), 500))
    assert all("objects" in prompt.facts for prompt in inside)
    assert not any(has_b_word(prompt) or has_held_out_pair(prompt) for prompt in inside)
    assert any("include" in prompt.facts for prompt in wide)
    assert any(map(has_b_word, wide)) and any(map(has_held_out_pair, wide))


def test_prompts_depend_on_seed_and_domain():
    first, again, other = (list(islice(draw_prompts("in_domain", s), 20)) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_collected_pairs_are_untied_and_carry_the_exact_judges_scores(pairs):
    assert len(pairs) == len(pairs.prompts) == len(pairs.pictures) == len(pairs.scores) == 120
    assert pairs.pictures.dtype == torch.uint8
    assert (pairs.scores[:, 0] != pairs.scores[:, 1]).all()
    doubled = [prompt for prompt in pairs.prompts for _ in range(2)]
    judged = ShapesOracle().score(pairs.pictures.flatten(0, 1).float() / 255, doubled).total
    assert torch.equal(judged.view(-1, 2), pairs.scores)


def test_collecting_reports_how_many_were_tied():
    lines: list[str] = []
    collect_pairs(draw_pictures, draw_prompts("wide", 0), 30, lines.append, batch_size=20)
    [line] = lines
    num_pairs, num_prompts = int(line.split()[0]), int(line.split()[3])
    assert 30 <= num_pairs < num_prompts
    assert num_prompts % 20 == 0


def test_collecting_refuses_prompts_that_end_too_early():
    with pytest.raises(ValueError, match=r"prompts ended before 50 pairs .* give more"):
        collect_pairs(draw_pictures, islice(draw_prompts("wide", 0), 40), 50, lambda line: None)


def test_too_few_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="expected at least 121 pairs, got 120; collect"):
        pairs.first(121)
    assert len(pairs.first(0)) == 0


def test_joining_keeps_the_order(pairs):
    joined = join_pairs([pairs.first(2), pairs.first(3)])
    assert joined.prompts == pairs.prompts[:2] + pairs.prompts[:3]
    assert torch.equal(joined.pictures[2:], pairs.pictures[:3])
    assert torch.equal(joined.scores[2:], pairs.scores[:3])


def test_a_tenth_of_the_votes_is_mistaken():
    scores = torch.rand(5000, 2)
    wrong = vote(scores, 0) != scores.argmax(1)
    assert 0.085 < wrong.float().mean() < 0.115  # standard error 0.004
    assert torch.equal(vote(scores[:700], 0), vote(scores, 0)[:700])
    assert not torch.equal(vote(scores, 1), vote(scores, 0))


def test_pair_accuracy_of_the_exact_judge_is_one_and_of_its_opposite_zero(pairs):
    assert pair_accuracy(ShapesOracle(), pairs) == 1.0
    assert pair_accuracy(Fixed(-pairs.scores.flatten()), pairs) == 0.0


def test_pair_accuracy_counts_ties_half(pairs):
    assert pair_accuracy(Fixed(torch.zeros(2)), pairs.first(1)) == 0.5
    better = pairs.scores[:4].argmax(1)
    scores = torch.stack([1.0 - better, better], 1)
    scores[0] = scores[0].flip(0)  # one wrong
    scores[1] = 3.0  # one tied
    assert pair_accuracy(Fixed(scores.flatten()), pairs.first(4)) == 2.5 / 4


@pytest.mark.parametrize("domain", ["in_domain", "wide"])
def test_the_first_rendering_is_right_and_the_others_are_wrong(domain):
    prompts, pictures = draw_renderings(domain, 60, 0)
    assert pictures.shape == (60, 3, 3, 32, 32)
    found = recognise(pictures.flatten(0, 1).float() / 255)
    verdicts = [strict(judge(prompts[i // 3].facts, seen)) for i, seen in enumerate(found)]
    assert verdicts == [1.0, 0.0, 0.0] * 60
    own = [all(o.shape in A_SHAPES and o.color in A_COLORS for o in seen.objects) for seen in found]
    assert all(own) == (domain == "in_domain")


def test_no_renderings_have_the_shape_of_some():
    prompts, pictures = draw_renderings("wide", 0, 0)
    assert prompts == [] and pictures.shape == (0, 3, 3, 32, 32)


def test_exchanging_moves_one_attribute_between_two_objects():
    asked = [
        {"shape": s, "color": c, "texture": None, "count": 1, "numbered": False}
        for s, c in (("circle", "red"), ("square", "blue"))
    ]
    prompt = Prompt("a red circle and a blue square", facts={"objects": asked, "relations": []})
    scene = [Placed("circle", "red", "plain", 0, 1), Placed("square", "blue", "striped", 2, 2)]
    colors = [Placed("circle", "blue", "plain", 0, 1), Placed("square", "red", "striped", 2, 2)]
    shapes = [Placed("square", "red", "plain", 0, 1), Placed("circle", "blue", "striped", 2, 2)]
    seen = [exchange(prompt, scene, random.Random(seed)) for seed in range(20)]
    assert colors in seen and shapes in seen
    assert all(exchanged in (colors, shapes) for exchanged in seen)  # textures were not asked for


def test_exchanging_has_no_answer_for_one_object():
    prompt = next(p for p in draw_prompts("wide", 0) if len(p.facts.get("include", [0, 0])) == 1)
    assert exchange(prompt, [Placed("circle", "red", "plain", 0, 0)], random.Random(0)) is None


def test_spoiling_within_the_domain_uses_its_words_only():
    rng = random.Random(0)
    prompt = next(draw_prompts("in_domain", 0))
    scene = compose(prompt, rng)
    for _ in range(50):
        spoiled = spoil_within("in_domain", prompt, scene, rng)
        assert not strict(judge(prompt.facts, Recognition(spoiled)))
        assert all(o.shape in A_SHAPES and o.color in A_COLORS for o in spoiled)
