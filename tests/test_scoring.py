"""Asking a reward: loaded, frozen, in full precision, timed."""

import time

import pytest
import torch
from torch import nn

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.scoring import ask, questions

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


@pytest.mark.parametrize("while_drawing", [True, False])
def test_questions_about_parts_are_answered_in_their_order(while_drawing):
    reward = Slow(pause=0.02)
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(text) for text in "abcdef"]
    expected = ask(reward, images, prompts)
    with questions(reward, while_drawing=while_drawing) as asked:
        for start in (0, 2, 4):
            asked.put(images[start : start + 2], prompts[start : start + 2])
        scores = asked.scores()
    torch.testing.assert_close(scores.total, expected.total)
    times_asked = 3 if while_drawing else 1
    assert list(scores.seconds) == ["slow"] and scores.seconds["slow"] >= 0.02 * times_asked


def test_a_wrong_answer_about_a_part_is_named(monkeypatch):
    reward = Slow()
    monkeypatch.setattr(reward, "score", lambda images, prompts: torch.zeros(2))
    with questions(reward, while_drawing=True) as asked:
        asked.put(IMAGES, PROMPTS)
        with pytest.raises((TypeError, ValueError), match="slow"):
            asked.scores()


def test_a_part_without_a_verdict_is_for_the_whole_to_judge(monkeypatch):
    reward = Slow()
    values = iter([0.5, float("nan")])
    monkeypatch.setattr(
        reward,
        "score",
        lambda images, prompts: Scores.single("slow", torch.full((2,), next(values))),
    )
    with questions(reward, while_drawing=True) as asked:
        for _ in range(2):
            asked.put(IMAGES, PROMPTS)
        total = asked.scores().total
    assert total.isnan().tolist() == [False, False, True, True]


def test_a_failure_is_told_with_the_next_part(monkeypatch):
    reward = Slow()

    def fail(images, prompts):
        raise ValueError("the server is gone")

    monkeypatch.setattr(reward, "score", fail)
    with (
        pytest.raises(ValueError, match="the server is gone"),
        questions(reward, while_drawing=True) as asked,
    ):
        asked.put(IMAGES, PROMPTS)
        time.sleep(0.3)
        asked.put(IMAGES, PROMPTS)
        pytest.fail("went on drawing")


def test_seconds_of_nothing_are_kept(monkeypatch):
    reward = Slow()
    reward.told = {"cached": 0.0}
    with questions(reward, while_drawing=True) as asked:
        asked.put(IMAGES, PROMPTS)
        assert asked.scores().seconds == {"cached": 0.0}


def test_what_nobody_waits_for_is_not_asked(monkeypatch):
    reward, started = Slow(), []

    def score(images, prompts):
        started.append(len(images))
        time.sleep(0.2)
        return Scores.single("slow", torch.zeros(len(images)))

    monkeypatch.setattr(reward, "score", score)
    failing = pytest.raises(RuntimeError, match="out of memory")
    with failing, questions(reward, while_drawing=True) as asked:
        for _ in range(5):
            asked.put(IMAGES, PROMPTS)
        raise RuntimeError("out of memory")
    assert len(started) <= 1


def test_verdicts_with_other_parts_are_not_joined():
    parts = Scores.single("one", torch.zeros(1)), Scores.single("other", torch.zeros(1))
    with pytest.raises(ValueError, match=r"the same parts .* got \['one'\] and \['other'\]"):
        Scores.join(parts)
