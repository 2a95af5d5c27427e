import random

import pytest

from cotgen_pl.shapes.grammar import GENEVAL_TAGS, IN_DOMAIN_CATEGORIES, draw_prompt, suites
from cotgen_pl.shapes.judge import graded, judge, strict
from cotgen_pl.shapes.recognise import Recognition, recognise
from cotgen_pl.shapes.render import COLORS, SHAPES, render
from cotgen_pl.shapes.scenes import compose, spoil

NUM_PROMPTS = 200  # per category


@pytest.fixture(scope="module")
def drawn():
    """200 prompts of each of the twelve categories, each with a right picture."""
    rng = random.Random(3)
    found = {category: [] for category in (*IN_DOMAIN_CATEGORIES, *GENEVAL_TAGS)}
    while min(map(len, found.values())) < NUM_PROMPTS:
        prompt = draw_prompt(rng, wording="both", words="all", pairs="all")
        found[prompt.category].append((prompt, compose(prompt, rng)))
    return found


@pytest.mark.parametrize("category", [*IN_DOMAIN_CATEGORIES, *GENEVAL_TAGS])
def test_composed_pictures_satisfy_every_fact(drawn, category):
    for prompt, objects in drawn[category]:
        verdict = judge(prompt.facts, Recognition(objects))
        assert graded(verdict) == strict(verdict) == 1, (prompt, objects, verdict)
        items = prompt.facts.get("objects") or prompt.facts["include"]
        assert len(objects) == sum(item["count"] for item in items)  # nothing extra


@pytest.mark.parametrize("category", [*IN_DOMAIN_CATEGORIES, *GENEVAL_TAGS])
def test_spoiled_pictures_fail_a_clause_and_keep_the_original(drawn, category):
    rng = random.Random(4)
    scores = []
    for prompt, objects in drawn[category]:
        before = list(objects)
        verdict = judge(prompt.facts, Recognition(spoil(prompt, objects, rng)))
        assert strict(verdict) == 0 and graded(verdict) < 1
        assert objects == before
        scores.append(graded(verdict))
    assert len(set(scores)) >= 2 or category == "single_object"  # mistakes of several sizes


def test_every_shipped_prompt_can_be_drawn_and_read_back():
    rng = random.Random(5)
    prompts = [p for found in suites().values() for p in found]
    scenes = [compose(p, rng) for p in prompts]
    assert len(scenes) == 2400
    for scene in scenes[::20]:
        (found,) = recognise(render(scene)[None])
        assert found.objects == scene


def test_pictures_vary_and_open_attributes_use_all_words():
    rng = random.Random(6)
    prompt = next(p for p in suites()["shift_wording"] if p.text == "a photo of a circle")
    scenes = [compose(prompt, rng)[0] for _ in range(400)]
    assert {o.color for o in scenes} == set(COLORS)
    assert len({(o.row, o.column) for o in scenes}) == 16
    assert {o.shape for o in scenes} == {"circle"} < set(SHAPES)


def test_pictures_of_other_prompts_score_low():
    rng = random.Random(7)
    prompts = [draw_prompt(rng, wording="both", words="all", pairs="all") for _ in range(2000)]
    others = [compose(p, rng) for p in prompts[1:] + prompts[:1]]
    scores = [graded(judge(p.facts, Recognition(o))) for p, o in zip(prompts, others, strict=True)]
    assert sum(scores) / len(scores) < 0.22  # measured: 0.19
