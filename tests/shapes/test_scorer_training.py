"""The dual encoders: format, losses by hand, and that they learn."""

import math
import random
from dataclasses import replace

import pytest
import torch

from cotgen_pl.rewards.hps import HPSReward
from cotgen_pl.shapes import scorer_training
from cotgen_pl.shapes.checkpoint import build_tokenizer
from cotgen_pl.shapes.grammar import draw_prompt
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil
from cotgen_pl.shapes.scorer_data import Pairs, collect_pairs, draw_prompts, pair_accuracy
from cotgen_pl.shapes.scorer_training import (
    BREADTHS,
    CONTEXT_LENGTH,
    Breadth,
    Training,
    build_scorer,
    contrastive_loss,
    preference_loss,
    save_scorer,
    sine_waves,
    train_scorer,
)

SHORT = Training(
    num_renderings=64,
    rendering_epochs=1,
    preference_epochs=12,
    preference_rate=3e-3,
    batch_size=32,
)


@pytest.fixture(scope="module")
def tokenizer():
    rng = random.Random(0)
    drawn = [draw_prompt(rng, wording="both", words="all", pairs="all") for _ in range(2000)]
    return build_tokenizer(prompt.text for prompt in drawn)


def collect(domain: str, number: int) -> Pairs:
    """Pairs by a stand-in for a policy: one picture is right, the other is not."""
    rng = random.Random(0)

    def draw_pictures(prompts):
        pictures = []
        for prompt in prompts:
            scene = compose(prompt, rng)
            two = [render(scene), render(spoil(prompt, scene, rng))]
            rng.shuffle(two)
            pictures += two
        return torch.stack(pictures)

    return collect_pairs(draw_pictures, draw_prompts(domain, "test"), number, lambda line: None, 64)


@pytest.fixture(scope="module")
def inside():
    return collect("in_domain", 128)


@pytest.fixture(scope="module")
def wide():
    return collect("wide", 64)


def train(tokenizer, inside, wide, seed=0, report=lambda line: None, amounts=SHORT):
    return train_scorer("broad", tokenizer, inside, wide, seed, report, amounts)


@pytest.fixture(autouse=True)
def small_breadths(monkeypatch):
    monkeypatch.setitem(BREADTHS, "broad", Breadth(128, 64))


class Lookup:
    """A model whose features are given: one row per text, one per picture."""

    def __init__(self, texts, pictures, scale):
        self.texts, self.pictures = torch.tensor(texts), torch.tensor(pictures)
        self.logit_scale = torch.tensor(math.log(scale))

    def encode_text(self, tokens, normalize):
        return self.texts

    def encode_image(self, pixels, normalize):
        return self.pictures


def test_preference_loss_by_hand():
    model = Lookup([[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [0.8, 0.6], [0.6, 0.8], [1.0, 0.0]], 2)
    tokens, pictures = torch.zeros(2, CONTEXT_LENGTH), torch.zeros(2, 2, 3, 32, 32).byte()
    # Cosines 0.6 / 0.8 and 0.8 / 0; the votes are for 0.8 and for 0.
    expected = (math.log(1 + math.exp(2 * (0.6 - 0.8))) + math.log(1 + math.exp(2 * 0.8))) / 2
    loss = preference_loss(model, tokens, pictures, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_contrastive_loss_by_hand():
    # Right and wrong picture of text 0, then of text 1.
    model = Lookup([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]], 1)
    tokens, pictures = torch.zeros(2, CONTEXT_LENGTH), torch.zeros(2, 2, 3, 32, 32).byte()
    by_text = [
        -1.0 + math.log(sum(map(math.exp, (1.0, 0.6, 0.0, 0.8)))),
        -0.8 + math.log(sum(map(math.exp, (0.0, 0.8, 1.0, 0.6)))),
    ]
    by_picture = [
        -1.0 + math.log(math.exp(1.0) + math.exp(0.0)),
        -0.8 + math.log(math.exp(0.6) + math.exp(0.8)),
    ]
    own = [
        -1.0 + math.log(math.exp(1.0) + math.exp(0.0)),
        -0.8 + math.log(math.exp(0.8) + math.exp(0.6)),
    ]
    expected = (sum(by_text) / 2 + sum(by_picture) / 2) / 2 + sum(own) / 2
    assert contrastive_loss(model, tokens, pictures).item() == pytest.approx(expected, abs=1e-6)


def test_positions_start_as_sine_waves():
    waves = sine_waves(CONTEXT_LENGTH, 64)
    assert waves.shape == (CONTEXT_LENGTH, 64)
    assert waves[3, 0].item() == pytest.approx(math.sin(3))
    assert waves[3, 32].item() == pytest.approx(math.cos(3))
    assert waves[3, 16].item() == pytest.approx(math.sin(0.3))


def test_scorers_are_small_and_every_prompt_fits(tokenizer):
    model, _ = build_scorer(tokenizer, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) < 350_000
    rng = random.Random(1)
    drawn = [draw_prompt(rng, wording="both", words="all", pairs="all").text for _ in range(2000)]
    longest = max(len(ids) for ids in tokenizer(drawn).input_ids)
    assert 15 < longest <= CONTEXT_LENGTH


def test_hps_reward_reads_the_folder_and_gives_the_models_cosines(tokenizer, inside, tmp_path):
    model, config = build_scorer(tokenizer, 0)
    save_scorer(model.eval(), config, tokenizer, tmp_path / "scorer")
    reward = HPSReward(str(tmp_path / "scorer")).load()
    tokens = scorer_training._tokenize(tokenizer, inside.prompts)
    assert len(set(tokens[:, -1].tolist())) == 1  # padding stands behind the text
    with torch.no_grad():
        texts, seen = scorer_training._features(model, tokens, inside.pictures)
    expected = (seen * texts[:, None]).sum(-1).flatten()
    assert expected.std() > 0.01  # else any constant would pass
    doubled = [prompt for prompt in inside.prompts for _ in range(2)]
    scores = reward.score(inside.pictures.flatten(0, 1).float() / 255, doubled).total
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert tokenizer.padding_side == "left"  # the policy's own stays as it is


def test_training_orders_its_pairs_and_reports_each_epoch(tokenizer, inside, wide, tmp_path):
    lines: list[str] = []
    model, config = train(tokenizer, inside, wide, report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["contrastive epoch 1/1"] + [
        f"preference epoch {epoch}/12" for epoch in range(1, 13)
    ]
    assert not model.training
    save_scorer(model, config, tokenizer, tmp_path)
    trained = pair_accuracy(HPSReward(str(tmp_path)).load(), inside)
    save_scorer(*build_scorer(tokenizer, 0), tokenizer, tmp_path)
    untrained = pair_accuracy(HPSReward(str(tmp_path)).load(), inside)
    assert trained > 0.75 > 0.65 > untrained


def test_same_seed_gives_the_same_scorer(tokenizer, inside, wide):
    shortest = replace(SHORT, preference_epochs=1)
    first, again, other = (
        train(tokenizer, inside, wide, seed, amounts=shortest)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_breadths_share_their_in_domain_pairs():
    assert BREADTHS["narrow"] == (6000, 0)
    assert BREADTHS["mid"] == (6000, 400)
    assert BREADTHS["narrow_more"].in_domain == 2 * BREADTHS["narrow"].in_domain


def test_too_few_pairs_are_refused(tokenizer, inside, wide):
    with pytest.raises(ValueError, match="expected at least 6000 pairs, got 128"):
        train_scorer("narrow", tokenizer, inside, wide, 0, lambda line: None)
