"""Runs that no longer learn: one warning or the end, and a name among the metrics."""

import math
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.guards import Guards
from cotgen_pl.data.pairs import PairData
from tests.toys import (
    Fixed,
    Snapshots,
    StopAt,
    fit,
    make_dpo,
    make_grpo,
    make_trainer,
    write_pairs,
    write_prompts,
)

EQUAL = [0.5] * 4
GOOD = [0.1, 0.2, 0.3, 0.4]


def break_rollouts(module, *numbers: int) -> None:
    """Make the advantages of these rollouts NaN, from 1."""
    advantages = module.advantages

    def broken(scores):
        found = advantages(scores)
        return found * math.nan if module.rollouts + 1 in numbers else found

    module.advantages = broken


def guards_warnings(caught) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("update ")]


# Steps that are no numbers ------------------------------------------------------------------------


def test_steps_that_are_no_numbers_are_left_out_as_often_as_allowed(tiny_janus, tmp_path):
    """AdamW moves weights even where the gradient is 0, so nothing but leaving out will do."""
    kept = Snapshots()
    module = make_grpo(tiny_janus, Fixed(GOOD), images_budget=40, optimizer=torch.optim.AdamW)
    break_rollouts(module, 2, 4)
    trainer = fit(module, tmp_path, Guards(max_skipped_steps=2), kept)
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(kept.weights, kept.weights[1:], strict=False)
    ]
    assert same == [False, True, False, True, False]
    assert all(w.isfinite().all() for w in module.state_dict().values())
    (state,) = {int(s["step"]) for s in trainer.optimizers[0].state.values()}
    assert state == trainer.global_step == 3
    assert (module.rollouts, module.images_sampled, module.skipped_steps) == (5, 40, 2)
    rows = trainer.logger.rows
    assert {
        step: row["train/skipped_steps"]
        for step, row in rows.items()
        if "train/skipped_steps" in row
    } == {2: 1, 4: 2}


def test_one_more_stops_the_run(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Fixed(GOOD), images_budget=40)
    break_rollouts(module, 2, 4)
    with pytest.raises(ValueError, match="expected a finite loss in update 4"):
        fit(module, tmp_path, Guards(max_skipped_steps=1))


def test_a_resumed_run_counts_on(tiny_janus, tmp_path):
    def settings():
        module = make_grpo(tiny_janus, Fixed(GOOD), images_budget=40)
        break_rollouts(module, 2, 4)
        return module

    last = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="went down"):
        fit(settings(), tmp_path, Guards(max_skipped_steps=1), last, StopAt(4))
    trainer = make_trainer(tmp_path, Guards(max_skipped_steps=1))
    from cotgen_pl.data.prompts import PromptData

    data = PromptData([write_prompts(tmp_path)])
    with pytest.raises(ValueError, match="expected a finite loss in update 4"):
        trainer.fit(settings(), data, ckpt_path=str(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_automatic_optimisation_leaves_out_too(tiny_janus, tmp_path, broken):
    pairs = PairData(str(write_pairs(tmp_path / "pairs", 6).folder), pairs_per_update=2)
    module = make_dpo(tiny_janus, optimizer=torch.optim.AdamW)
    module.configure_model()
    weight = next(iter(module._trained().values()))
    if broken == "gradient":
        weight.register_hook(lambda g: g * (math.inf if module.rollouts == 2 else 1))
    else:
        compute = module.loss
        module.loss = lambda *a: (
            compute(*a)[0] * (math.nan if module.rollouts == 1 else 1),
            compute(*a)[1],
        )
    kept, guards = Snapshots(), Guards(max_skipped_steps=1)
    trainer = make_trainer(tmp_path, guards, kept)
    trainer.fit(module, pairs)
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(kept.weights, kept.weights[1:], strict=False)
    ]
    assert same == [False, True, False]
    assert {int(s["step"]) for s in trainer.optimizers[0].state.values()} == {2}
    assert (module.rollouts, module.skipped_steps) == (3, 1)
    assert trainer.logger.rows[2]["train/skipped_steps"] == 1


# Equal rewards, no gradient, far off --------------------------------------------------------------


@pytest.mark.parametrize("guard", ["equal_rewards", "zero_gradient", "kl"])
def test_a_run_that_learns_nothing_is_told_of_once(tiny_janus, tmp_path, guard):
    settings = {"kl": {"kl_coef": 0.1, "optimizer": lambda p: torch.optim.SGD(p, lr=1e4)}}
    rewards = Fixed(GOOD if guard == "kl" else EQUAL)
    module = make_grpo(tiny_janus, rewards, images_budget=40, **settings.get(guard, {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, tmp_path, Guards(patience=3, most_kl=0.1))
    rows = trainer.logger.rows
    holding = [step for step, row in rows.items() if row.get(f"train/alarm/{guard}") == 1]
    assert holding and holding[0] == {"kl": 2}.get(guard, 3)
    told = guards_warnings(caught)
    named = {"equal_rewards": "equal rewards", "zero_gradient": "gradient was 0", "kl": "diverg"}
    assert len([text for text in told if named[guard] in text]) == 1


def test_a_run_that_learns_is_left_alone(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Fixed(GOOD), images_budget=40, kl_coef=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, tmp_path, Guards(patience=1))
    assert guards_warnings(caught) == []
    names = {name for row in trainer.logger.rows.values() for name in row}
    assert not [name for name in names if "alarm" in name or "skipped" in name]


def test_a_run_that_learns_nothing_stops_where_that_is_asked_for(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Fixed(EQUAL), images_budget=40)
    with pytest.raises(ValueError, match=r"update 2: .* got: all groups of 2 updates in a row had"):
        fit(module, tmp_path, Guards(patience=2, action="stop"))


def test_streaks_go_through_a_checkpoint():
    guards, resumed = Guards(patience=2), Guards(patience=2)
    dead = {"train/frac_reward_zero_std": 1.0, "train/grad_norm": 0.0}
    assert guards._holding(dead) == []
    resumed.load_state_dict(guards.state_dict())
    assert resumed._holding(dead) == ["equal_rewards", "zero_gradient"]
    assert resumed._holding({"train/frac_reward_zero_std": 0.5, "train/grad_norm": 0.1}) == []


@pytest.mark.parametrize(
    "wrong", [{"max_skipped_steps": -1}, {"patience": 0}, {"most_kl": 0.0}, {"action": "end"}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="expected "):
        Guards(**wrong)
