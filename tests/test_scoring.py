"""Asking a reward: loaded, frozen, in full precision, timed."""

import time

import pytest
import torch
from torch import nn

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.scoring import ask

IMAGES = torch.full((2, 3, 4, 4), 0.3)
PROMPTS = [Prompt("a"), Prompt("b")]


class Slow(Reward):
    """A linear layer, which takes its time and notes how it was asked."""

    name = "slow"

    def __init__(self, pause: float = 0.0, loading: float = 0.0) -> None:
        super().__init__()
        self.pause, self.loading, self.loads = pause, loading, 0
        self.layer = nn.Linear(3, 1)
        self.told: dict[str, float] = {}

    def load(self):
        time.sleep(self.loading)
        self.loads += 1
        return self

    def score(self, images, prompts):
        time.sleep(self.pause)
        self.autocast = torch.is_autocast_enabled("cpu")
        scores = Scores.single(self.name, self.layer(images.mean(dim=(2, 3))).squeeze(-1))
        scores.seconds = dict(self.told)
        return scores


def test_the_reward_is_loaded_and_frozen():
    reward = Slow()
    total = ask(reward, IMAGES, PROMPTS).total
    assert reward.loads == 1 and not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not total.requires_grad and total.shape == (2,)


def test_gradients_are_on_again_afterwards():
    ask(Slow(), IMAGES, PROMPTS)
    assert torch.is_grad_enabled()


def test_autocast_does_not_reach_the_reward():
    reward = Slow()
    full = ask(reward, IMAGES, PROMPTS).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ask(reward, IMAGES, PROMPTS).total, full)
        assert torch.is_autocast_enabled("cpu")
    assert reward.autocast is False


def test_seconds_are_those_of_scoring_without_loading():
    reward = Slow(pause=0.05, loading=0.3)
    seconds = ask(reward, IMAGES, PROMPTS).seconds
    assert list(seconds) == ["slow"] and 0.05 <= seconds["slow"] < 0.3


def test_seconds_that_a_reward_tells_itself_stay():
    reward = Slow()
    reward.told = {"a": 1.5, "b": 2.5}
    assert ask(reward, IMAGES, PROMPTS).seconds == {"a": 1.5, "b": 2.5}


@pytest.mark.parametrize("answer", [None, torch.zeros(2)])
def test_an_answer_that_is_no_scores_is_left_to_the_check(answer, monkeypatch):
    reward = Slow()
    monkeypatch.setattr(reward, "score", lambda images, prompts: answer)
    assert ask(reward, IMAGES, PROMPTS) is answer
