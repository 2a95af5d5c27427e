"""Rewards that are only watched, variety, and the alarm for reward hacking, in the loop."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.evaluation import ALARM, Suite, SuiteEvaluation
from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.modules.sft import SFTModule
from cotgen_pl.monitors import diversity
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    Brightness,
    StopAt,
    attach_grpo,
    fit,
    make_grpo,
    make_policy,
    make_trainer,
    write_prompts,
)

NEAR = (("a red circle", "color"), ("two cats", "count"), ("cats", "count"), ("blue", "color"))
NEARBY = (("circle", "color"), ("red", "count"), ("square", "count"))
FAR = (("square", "any"), ("a blue circle", "any"))
RISING = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
FALLING = [0.5, 0.5, 0.4, 0.5, 0.4, 0.3, 0.2]  # a dip at 2, and below its best from 4 on


class ByUpdate(Reward):
    """A score that a curve sets for each update; pictures and prompts change it a little."""

    def __init__(self, curve: list[float], now: Callable[[], int]) -> None:
        super().__init__()
        self.curve, self.now = curve, now

    def score(self, images, prompts):
        own = torch.tensor([len(prompt.text) for prompt in prompts]) + images.mean((1, 2, 3))
        return Scores.single("by_update", self.curve[self.now()] + 0.01 * own)


class Counted(Brightness):
    """Counts the pictures that it has scored."""

    scored = 0

    def score(self, images, prompts):
        self.scored += len(images)
        return super().score(images, prompts)


class Redness(Reward):
    """Mean of the red pixels; no verdict on prompts that hold `cats`; needs the fact `mark`."""

    required_facts = ("mark",)

    def score(self, images, prompts):
        missing = torch.tensor(["cats" in prompt.text for prompt in prompts])
        return Scores.single(
            "red", images[:, 0].mean((1, 2)).float().masked_fill(missing, math.nan)
        )


def write_rows(folder, name: str, rows, **facts) -> PromptFile:
    path = folder / f"{name}.jsonl"
    lines = [json.dumps({"prompt": text, "category": kind, **facts}) for text, kind in rows]
    path.write_text("\n".join(lines))
    return PromptFile(str(path), "jsonl")


def suites_of(folder, reward: Reward | None = None, **facts) -> list[Suite]:
    """Two suites in domain, one out of domain, and one that moves one thing."""
    reward = reward or Brightness()
    rows = {"near": NEAR, "nearby": NEARBY, "far": FAR}
    files = {name: [write_rows(folder, name, texts, **facts)] for name, texts in rows.items()}
    return [
        Suite("near", "id", files["near"], reward),
        Suite("nearby", "id", files["nearby"], reward),
        Suite("far", "ood", files["far"], reward),
        Suite("moved", "shift", files["near"], reward),
    ]


def evaluation_of(folder, reward: Reward | None = None, **arguments) -> SuiteEvaluation:
    settings = {"images_per_prompt": 2, "final_images_per_prompt": 4, "every_n_updates": 1}
    settings |= {"batch_size": 6, "kl_images": 0, "watched": {}, "leaks": "warn"}
    return SuiteEvaluation(suites_of(folder, reward), **(settings | arguments))


@pytest.fixture
def module(tiny_janus, tmp_path):
    """A module that is loaded and attached to a trainer."""
    return attach_grpo(tiny_janus, tmp_path)


def draw(module, texts, copies) -> torch.Tensor:
    """The evaluation's pictures of some prompts, [prompts, copies, 3, H, W]."""
    rows = []
    for index, text in enumerate(texts):
        tokens, _ = module.draw([Prompt(text, index=index)], copies, "evaluation")
        rows.append(module.policy.decode(tokens))
    return torch.stack(rows)


# Watched rewards --------------------------------------------------------------------------------


def test_watched_means_are_over_images_categories_and_suites(module, tmp_path):
    suites = suites_of(tmp_path, mark=1)
    watched = {"red": Redness(), "bright": Brightness()}
    metrics = SuiteEvaluation(suites, images_per_prompt=3, watched=watched).evaluate(
        module, thoroughly=False
    )
    near, nearby, far = (
        draw(module, [text for text, _ in rows], 3) for rows in (NEAR, NEARBY, FAR)
    )

    def red(pictures):
        return pictures[:, :, 0].mean().item()

    # Of `near`, the category `count` is without verdicts; its suite has no mean.
    assert math.isnan(metrics["val/watched/id/red"])
    assert metrics["val/watched/ood/red"] == pytest.approx(red(far), abs=1e-6)
    brightness = [pictures.mean((2, 3, 4)) for pictures in (near, nearby)]
    means = [
        (brightness[0][[0, 3]].mean() + brightness[0][[1, 2]].mean()) / 2,
        (brightness[1][0].mean() + brightness[1][1:].mean()) / 2,
    ]
    expected = (sum(means) / 2).item()
    assert metrics["val/watched/id/bright"] == pytest.approx(expected, abs=1e-6)
    names = {name for name in metrics if name.startswith("val/watched/")}
    assert names == {f"val/watched/{d}/{r}" for d in ("id", "ood") for r in ("red", "bright")}
    assert module.trainer.logger.rows[0] == pytest.approx(metrics, nan_ok=True)


def test_each_reward_scores_each_picture_once(module, tmp_path):
    scorer, trained, other = Counted(), Counted(), Counted()
    module.reward = trained
    pictures = 2 * (len(NEAR) + len(NEARBY)), 2 * len(FAR), 2 * len(NEAR)
    evaluation_of(tmp_path, scorer, watched={"other": other}).evaluate(module, thoroughly=False)
    assert scorer.scored == sum(pictures)
    assert other.scored == sum(pictures)  # verdicts on `shift` are kept, though it enters no mean
    assert trained.scored == pictures[0]
    module.reward = scorer
    evaluation_of(tmp_path, scorer, watched={"same": scorer}).evaluate(module, thoroughly=False)
    assert scorer.scored == 2 * sum(pictures)


def test_without_watched_rewards_nothing_more_is_asked_or_logged(module, tmp_path):
    module.reward = Counted()
    metrics = evaluation_of(tmp_path, watched=None).evaluate(module, thoroughly=False)
    assert module.reward.scored == 0
    assert not [name for name in metrics if "watched" in name or "alarm" in name]


def test_scores_are_the_same_with_and_without_watched_rewards(module, tmp_path):
    alone = evaluation_of(tmp_path, watched=None).evaluate(module, thoroughly=False)
    beside = evaluation_of(tmp_path, watched={"red": Brightness()}).evaluate(
        module, thoroughly=False
    )
    assert {name: beside[name] for name in alone} == alone


class Noise(Reward):
    """From torch's own random state."""

    def score(self, images, prompts):
        return Scores.single("noise", torch.rand(len(images)))


def test_rewards_that_draw_have_the_same_seeds_each_time_and_leave_no_trace(module, tmp_path):
    evaluation = evaluation_of(tmp_path, watched={"noise": Noise()})
    before = torch.get_rng_state()
    one = evaluation.evaluate(module, thoroughly=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    module.rollouts = 5
    assert (
        evaluation.evaluate(module, thoroughly=False)["val/watched/id/noise"]
        == one["val/watched/id/noise"]
    )


# Variety ----------------------------------------------------------------------------------------


def test_diversity_is_the_mean_over_categories(module, tmp_path):
    metrics = evaluation_of(tmp_path, watched=None, images_per_prompt=3).evaluate(
        module, thoroughly=False
    )
    for name, domain, rows in (("nearby", "id", NEARBY), ("far", "ood", FAR)):
        pictures = draw(module, [text for text, _ in rows], 3)
        values = diversity(pictures.flatten(0, 1), 3)
        kinds = [kind for _, kind in rows]
        parts = [
            values[torch.tensor([kind == one for one in kinds])].mean() for kind in sorted({*kinds})
        ]
        expected = (sum(parts) / len(parts)).item()
        assert metrics[f"val/{domain}/{name}/diversity"] == pytest.approx(expected, abs=1e-6)
        assert expected > 0.01
    assert "val/shift/moved/diversity" in metrics


def test_one_image_of_each_prompt_has_no_diversity(module, tmp_path):
    metrics = evaluation_of(tmp_path, watched=None, images_per_prompt=1).evaluate(
        module, thoroughly=False
    )
    assert not [name for name in metrics if name.endswith("/diversity")]


# The alarm --------------------------------------------------------------------------------------


@contextmanager
def warned() -> Iterator[list[str]]:
    """Collects the warnings of reward hacking."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if "reward hacking" in str(w.message)]


def run(tiny_janus, folder, curves: dict[str, list[float]], *callbacks, checkpoint=None):
    """Six updates, each evaluated; the curves are of `trained`, `suite` and watched rewards."""
    folder.mkdir(exist_ok=True)
    module = make_grpo(tiny_janus, images_budget=48)
    rewards = {name: ByUpdate(curve, lambda: module.rollouts) for name, curve in curves.items()}
    module.reward = rewards.pop("trained")
    suite = rewards.pop("suite", Brightness())
    evaluation = evaluation_of(folder, suite, watched=rewards, final_images_per_prompt=2)
    evaluation.suites = [evaluation.suites[1], evaluation.suites[2]]  # one of each domain
    trainer = make_trainer(folder, evaluation, *callbacks)
    with warned() as texts:
        trainer.fit(module, PromptData([write_prompts(folder)]), ckpt_path=checkpoint)
    return trainer.logger.rows, texts


def alarms(rows) -> list[float]:
    return [row[ALARM] for _, row in sorted(rows.items()) if ALARM in row]


def test_a_reward_that_rises_while_a_watched_one_falls_gives_an_alarm(tiny_janus, tmp_path):
    curves = {"trained": RISING, "judge": FALLING, "other": [0.5] * 7}
    rows, texts = run(tiny_janus, tmp_path, curves)
    assert alarms(rows) == [0, 0, 0, 0, 0, 1, 1]  # once for each evaluation, 0 to 6
    assert [re.findall(r"at update (\d)", text) for text in texts] == [["5"], ["6"]]
    for text in texts:
        assert "val/watched/id/judge, val/watched/ood/judge fell" in text


def test_the_out_of_domain_score_is_watched_by_itself(tiny_janus, tmp_path):
    rows, texts = run(tiny_janus, tmp_path, {"trained": RISING, "suite": FALLING})
    assert alarms(rows) == [0, 0, 0, 0, 0, 1, 1]
    assert all("while val/ood/mean fell" in text for text in texts)
    assert len(texts) == 2


@pytest.mark.parametrize(("trained", "judge"), [(RISING, RISING), (RISING[::-1], FALLING)])
def test_no_alarm_where_they_go_together_or_the_reward_does_not_rise(
    tiny_janus, tmp_path, trained, judge
):
    rows, texts = run(tiny_janus, tmp_path, {"trained": trained, "suite": judge, "judge": judge})
    assert alarms(rows) == [0] * 7
    assert texts == []


def test_a_resumed_run_gives_the_same_alarms(tiny_janus, tmp_path):
    """The checkpoint lies between the two evaluations that make an alarm."""
    curves = {"trained": RISING, "judge": FALLING}
    whole, _ = run(tiny_janus, tmp_path / "whole", curves)
    folder = tmp_path / "cut"
    saved = ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_last=True)
    with pytest.raises(RuntimeError, match="the machine went down"):
        run(tiny_janus, folder, curves, saved, StopAt(5))
    rows, texts = run(tiny_janus, folder, curves, checkpoint=str(folder / "saved/last.ckpt"))
    assert {step for step in rows if ALARM in rows[step]} == {5, 6}
    assert alarms(rows) == [1, 1]
    assert len(texts) == 2
    for step in (5, 6):
        names = [name for name in whole[step] if name.startswith("val/")]
        assert [rows[step][name] for name in names] == [whole[step][name] for name in names]


def test_a_start_that_is_scored_again_begins_the_course_again(module, tmp_path):
    evaluation = evaluation_of(tmp_path)
    for _ in range(2):
        evaluation.evaluate(module, thoroughly=True)
        assert evaluation.course.suspects == []
    start = evaluation.course.start
    assert start.shape == (len(NEAR) + len(NEARBY), 2)  # pictures that every evaluation has
    module.rollouts = 1
    module.reward = ByUpdate([0.0, 1.0], lambda: module.rollouts)
    evaluation.evaluate(module, thoroughly=False)
    assert torch.equal(evaluation.course.start, start)


def test_the_first_pictures_of_the_thorough_evaluations_are_compared(module, tmp_path):
    evaluation = evaluation_of(tmp_path)
    evaluation.evaluate(module, thoroughly=True)
    start, best = evaluation.course.start, evaluation.course.best["val/ood/mean"]
    module.rollouts = 1  # with the same weights: the same pictures
    evaluation.evaluate(module, thoroughly=False)
    assert torch.equal(evaluation.course.start, start)
    torch.testing.assert_close(evaluation.course.best["val/ood/mean"], best)
    far = draw(module, [text for text, _ in FAR], 2).mean((2, 3, 4)).double()
    torch.testing.assert_close(best, far, rtol=0, atol=1e-6)


def test_the_sampled_prompts_of_the_thorough_evaluations_are_compared(module, tmp_path):
    """Suites with other numbers of pictures side by side: what one lacks is no verdict."""
    evaluation = evaluation_of(tmp_path, prompts_per_category=1)
    evaluation.suites[1].images_per_prompt = 3
    evaluation.evaluate(module, thoroughly=True)
    start, best = evaluation.course.start, evaluation.course.best["val/ood/mean"]
    near = draw(module, ["a red circle", "two cats"], 2).mean((2, 3, 4)).double()
    nearby = draw(module, ["circle", "red"], 3).mean((2, 3, 4)).double()
    torch.testing.assert_close(start[:2, :2], near, rtol=0, atol=1e-6)
    torch.testing.assert_close(start[2:], nearby, rtol=0, atol=1e-6)
    assert start[:2, 2].isnan().all()
    module.rollouts = 1  # with the same weights: the same pictures
    evaluation.evaluate(module, thoroughly=False)
    assert evaluation.course.suspects == []
    torch.testing.assert_close(evaluation.course.best["val/ood/mean"], best)


def test_another_number_of_pictures_is_refused_when_a_run_goes_on(module, tmp_path):
    one, two = evaluation_of(tmp_path), evaluation_of(tmp_path, images_per_prompt=3)
    one.evaluate(module, thoroughly=True)
    two.load_state_dict(one.state_dict())
    module.rollouts = 1
    with pytest.raises(ValueError, match=r"\[7, 2\] as before, got \[7, 3\]; resume with"):
        two.evaluate(module, thoroughly=True)


# Where there is no alarm ------------------------------------------------------------------------


def test_a_module_that_trains_on_no_reward_has_watched_scores_and_no_alarm(tiny_janus, tmp_path):
    module = SFTModule(make_policy(tiny_janus))
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    metrics = evaluation_of(tmp_path, watched={"red": Brightness()}).evaluate(
        module, thoroughly=False
    )
    assert metrics["val/watched/id/red"] > 0
    assert ALARM not in metrics


def test_validate_scores_watched_rewards_without_an_alarm(tiny_janus, tmp_path, capsys):
    module = make_grpo(tiny_janus, Redness())  # could not judge the suites
    evaluation = evaluation_of(tmp_path, watched={"bright": Brightness()})
    make_trainer(tmp_path, evaluation).validate(module, verbose=False)
    output = capsys.readouterr().out
    assert "watched/id/bright" in output and "alarm" not in output


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b"])
def test_names_that_make_no_metric_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected names of watched rewards without '/'"):
        evaluation_of(tmp_path, watched={name: Brightness()})


@pytest.mark.parametrize("trained", [True, False])
def test_missing_facts_stop_a_run_before_weights_load(tiny_janus, tmp_path, monkeypatch, trained):
    monkeypatch.setattr(JanusPolicy, "load", None)
    monkeypatch.setattr(PromptData, "setup", lambda self, stage: None)
    module = make_grpo(tiny_janus, Redness() if trained else Brightness())
    evaluation = evaluation_of(tmp_path, watched={} if trained else {"red": Redness()})
    with pytest.raises(ValueError, match=r"near.jsonl:1: expected the facts \['mark'\]"):
        fit(module, tmp_path, evaluation)


class WrongShape(Reward):
    name = "wrong"

    def score(self, images, prompts):
        return Scores.single("wrong", torch.zeros(1))


def test_a_watched_reward_that_loses_scores_is_refused(module, tmp_path):
    evaluation = evaluation_of(tmp_path, watched={"wrong": WrongShape()})
    with pytest.raises(ValueError, match=r"reward wrong: expected total of shape \(6,\)"):
        evaluation.evaluate(module, thoroughly=False)


def test_more_processes_than_prompts_are_refused(module, tmp_path):
    trainer = SimpleNamespace(world_size=3, state=make_trainer(tmp_path).state)
    with pytest.raises(ValueError, match="suite far: expected a prompt or more for each of 3"):
        evaluation_of(tmp_path).setup(trainer, module, "fit")
