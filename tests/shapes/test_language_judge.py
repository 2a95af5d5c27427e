"""The yes/no judge: what it reads, that `ORMReward` reads it, losses by hand, that it learns."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from cotgen_pl.rewards.orm import ORMReward, full_question
from cotgen_pl.shapes.grammar import suites
from cotgen_pl.shapes.language_judge import (
    ANSWERS,
    JudgeTraining,
    build_judge,
    naming_loss,
    train_judge,
    with_easy_one,
    yes_no_loss,
)
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil
from cotgen_pl.shapes.scorer_data import Pairs, collect_pairs, draw_prompts, pair_accuracy
from cotgen_pl.shapes.scorer_training import BREADTHS, Breadth

ASSETS = Path(__file__).resolve().parents[2] / "cotgen_pl" / "shapes" / "assets"
QUESTION = full_question()
SHORT = JudgeTraining(
    num_renderings=64,
    naming_epochs=1,
    rendering_epochs=1,
    preference_epochs=12,
    preference_rate=3e-3,
    batch_size=32,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "janus")


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """By a stand-in for a policy: one picture is right, the other is not."""
    rng = random.Random(0)

    def draw_pictures(prompts):
        scenes = [compose(prompt, rng) for prompt in prompts]
        both = [[s, spoil(p, s, rng)] for p, s in zip(prompts, scenes, strict=True)]
        return torch.stack([render(scene) for two in both for scene in rng.sample(two, 2)])

    return collect_pairs(draw_pictures, draw_prompts("wide", "test"), 128, lambda line: None, 64)


@pytest.fixture(autouse=True)
def small_breadths(monkeypatch):
    monkeypatch.setitem(BREADTHS, "broad", Breadth(64, 64))


def train(tokenizer, pairs, seed=0, report=lambda line: None, amounts=SHORT):
    return train_judge(tokenizer, QUESTION, pairs, pairs, seed, report, amounts)


def test_what_never_changes_is_few_tokens_and_the_prompt_keeps_its_own(tokenizer):
    judge, prompts = build_judge(tokenizer, QUESTION, 0), suites()["ood_geneval"]
    read = judge.tokenize(prompts)
    for prompt, ids, mask in zip(prompts, read.input_ids, read.attention_mask, strict=True):
        words = tokenizer(prompt.text, add_special_tokens=False).input_ids
        assert ids[-1 - len(words) : -1].tolist() == words
        assert mask.sum() == len(words) + 21  # start, 17 places of the picture, three sentences
        said = ids[judge.named(ids[None])[0]]
        assert said.tolist() == [*words, ids[-1]]
    answers = judge.tokenizer(list(ANSWERS), add_special_tokens=False).input_ids
    assert [len(ids) for ids in answers] == [1, 1]
    assert len(judge.tokenizer) == len(tokenizer) + 7


def test_orm_reward_reads_the_folder_and_gives_the_models_margins(tokenizer, pairs, tmp_path):
    judge, prompts = build_judge(tokenizer, QUESTION, 0), pairs.prompts[:8]
    torch.nn.init.normal_(judge.words)  # answers start at 0, where each picture scores a half
    judge.save(tmp_path / "judge")
    reward = ORMReward(str(tmp_path / "judge"), temperature=2.0).load()
    asked = judge.tokenize(prompts)
    with torch.no_grad():
        states = judge.read(asked.input_ids, asked.attention_mask, pairs.pictures[:8])
        margins = judge.margins(states)
    images = pairs.pictures[:8].flatten(0, 1).float() / 255
    scores = reward.score(images, [prompt for prompt in prompts for _ in range(2)]).total
    expected = torch.sigmoid(margins.flatten() / 2.0)
    assert expected.std() > 0.01  # else any constant would pass
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def test_yes_no_loss_by_hand():
    margins = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    answers = [math.log1p(math.exp(x)) for x in (-1.0, -2.0, 0.5, -3.0)]
    choices = [math.log1p(math.exp(-2.0 - 1.0)), math.log1p(math.exp(0.5 - 3.0))]
    loss = yes_no_loss(margins, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(sum(answers) / 4 + sum(choices) / 2, abs=1e-6)


def test_naming_loss_by_hand():
    words = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    states = torch.tensor([[[9.0, 9.0], [1.0, 0.5], [0.0, 1.0], [9.0, 9.0]]])
    named = torch.tensor([[False, False, True, True]])
    # Logits behind the second token 1 and 1, behind the third 0 and 2; said are words 0 and 1.
    expected = (math.log(2) + math.log(math.exp(0) + math.exp(2)) - 2) / 2
    loss = naming_loss(words, states, torch.tensor([[1, 1, 0, 1]]), named)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_an_easy_picture_takes_the_place_of_one_of_the_hard_ones():
    pictures = torch.arange(30).view(10, 3, 1, 1, 1)
    found = with_easy_one(pictures, torch.Generator().manual_seed(0)).flatten(1)
    assert torch.equal(found[:, 0], pictures[:, 0].flatten())
    assert set((found[:, 1] - found[:, 0]).tolist()) == {1, 2}
    assert torch.equal(found[:, 2], found[:, 0].roll(1))


def test_training_orders_its_pairs_and_reports_each_epoch(tokenizer, pairs, tmp_path):
    lines: list[str] = []
    judge = train(tokenizer, pairs, report=lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "naming epoch 1/1",
        "renderings epoch 1/1",
    ] + [f"preference epoch {epoch}/12" for epoch in range(1, 13)]
    assert not judge.model.training
    judge.save(tmp_path)
    assert pair_accuracy(ORMReward(str(tmp_path)).load(), pairs.first(64)) > 0.7


def test_same_seed_gives_the_same_judge(tokenizer, pairs):
    shortest = replace(SHORT, preference_epochs=1)
    first, again, other = (
        train(tokenizer, pairs, seed, amounts=shortest).model.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# --- the shipped judge


@pytest.fixture(scope="module")
def shipped():
    return ORMReward(str(ASSETS / "scorers" / "judge"), temperature=1.0).load()


def test_the_shipped_judge_is_small(shipped):
    size = sum(path.stat().st_size for path in (ASSETS / "scorers" / "judge").iterdir())
    assert size < 1_100_000  # bytes
    assert sum(parameter.numel() for parameter in shipped.network.parameters()) < 250_000


@pytest.mark.parametrize(("suite", "least"), [("id_validation", 0.88), ("ood_geneval", 0.8)])
def test_the_shipped_judge_orders_pictures_of_the_shapes_world(shipped, suite, least):
    """A right picture above one with mistakes, mostly one or two; 0.84 out of domain."""
    generator, prompts = random.Random(0), suites()[suite]
    right = [compose(prompt, generator) for prompt in prompts]
    wrong = [spoil(p, scene, generator) for p, scene in zip(prompts, right, strict=True)]
    scores = [
        shipped.score(torch.stack([render(scene) for scene in scenes]), prompts).total
        for scenes in (right, wrong)
    ]
    assert len(prompts) == 192
    assert (scores[0] > scores[1]).float().mean() > least
