"""The start of training is in the last checkpoint, its end in every one, whatever the interval."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation
from cotgen_pl.callbacks.final_checkpoint import FinalCheckpoint, StartCheckpoint
from cotgen_pl.data.prompts import PromptData
from tests.toys import Rising, StopAt, fit, make_grpo, make_trainer, write_prompts


def callbacks(folder, interval: int) -> list:
    """One suite whose score rises with each evaluation; last and best checkpoints."""
    suite = Suite("a", "ood", [write_prompts(folder)], Rising())
    return [
        SuiteEvaluation([suite], every_n_updates=100, kl_images=0, leaks="warn"),
        ModelCheckpoint(folder, save_last=True, every_n_train_steps=interval),
        ModelCheckpoint(
            folder,
            "best",
            monitor="val/ood/mean",
            mode="max",
            every_n_train_steps=interval,
        ),
        FinalCheckpoint(),
    ]


def rollouts_in(path) -> int:
    return torch.load(path, weights_only=True)["progress"]["rollouts"]


@pytest.mark.parametrize("interval", [4, 100])
@pytest.mark.parametrize(
    ("limits", "rollouts"), [({}, 5), ({"max_steps": 8}, 3), ({"limit_train_batches": 3}, 3)]
)
def test_last_and_best_hold_the_end_of_training(tiny_janus, tmp_path, interval, limits, rollouts):
    module = make_grpo(tiny_janus, images_budget=40, updates_per_rollout=3)
    fit(module, tmp_path, *callbacks(tmp_path, interval), **limits)
    assert module.rollouts == rollouts
    assert rollouts_in(tmp_path / "last.ckpt") == rollouts
    assert rollouts_in(tmp_path / "best.ckpt") == rollouts
    assert not list(tmp_path.glob("*-v1.ckpt"))


def test_the_end_of_the_last_epoch_alone_is_saved(tiny_janus, tmp_path):
    saved = []

    class Recorder(ModelCheckpoint):
        def _save_last_checkpoint(self, trainer, monitor_candidates):
            saved.append(trainer.global_step)

    recorder = Recorder(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=100)
    trainer = make_trainer(
        tmp_path, recorder, FinalCheckpoint(), max_epochs=3, limit_train_batches=2
    )
    data = PromptData([write_prompts(tmp_path)])
    data.setup = lambda stage: None  # which allows one epoch only
    trainer.fit(make_grpo(tiny_janus, images_budget=80), data)
    assert saved[0] == 6  # Lightning's own may follow, in `on_train_end`


def test_a_run_with_a_later_end_goes_on_from_there(tiny_janus, tmp_path):
    """As it would not from a checkpoint of `on_train_end`, where the epoch has ended."""
    settings = {"images_budget": 40}
    fit(make_grpo(tiny_janus, **settings), tmp_path, *callbacks(tmp_path, 100), max_steps=3)
    module = make_grpo(tiny_janus, **settings)
    trainer = make_trainer(tmp_path, *callbacks(tmp_path, 100))
    data = PromptData([write_prompts(tmp_path)])
    trainer.fit(module, data, ckpt_path=str(tmp_path / "last.ckpt"))
    assert module.rollouts == 5


# The start --------------------------------------------------------------------------------------


def killed_at(tiny_janus, folder, rollout: int, *checkpoints, **arguments) -> None:
    """A run of five rollouts, killed before one of them."""
    module = make_grpo(tiny_janus, images_budget=40)
    trainer = make_trainer(folder, *checkpoints, StartCheckpoint(), StopAt(rollout))
    with pytest.raises(RuntimeError, match="the machine went down"):
        trainer.fit(module, PromptData([write_prompts(folder)]), **arguments)


def last(folder, interval: int = 100, **settings) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=interval, **settings)


def test_a_run_that_is_killed_early_goes_on_from_its_start(tiny_janus, tmp_path):
    killed_at(tiny_janus, tmp_path, 3, last(tmp_path))
    assert rollouts_in(tmp_path / "last.ckpt") == 0
    ends = []
    for checkpoint in (None, str(tmp_path / "last.ckpt")):
        module = make_grpo(tiny_janus, images_budget=40)
        trainer = make_trainer(tmp_path)
        trainer.fit(module, PromptData([write_prompts(tmp_path)]), ckpt_path=checkpoint)
        ends.append(module.state_dict())
        assert module.rollouts == 5
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


def test_a_run_that_goes_on_keeps_its_last_checkpoint_or_begins_one_elsewhere(tiny_janus, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    killed_at(tiny_janus, tmp_path, 3, last(first, interval=2))
    path = str(first / "last.ckpt")
    assert rollouts_in(path) == 2
    before = (first / "last.ckpt").read_bytes()
    killed_at(tiny_janus, tmp_path, 4, last(first), ckpt_path=path)
    assert (first / "last.ckpt").read_bytes() == before
    killed_at(tiny_janus, tmp_path, 4, last(second), ckpt_path=path)
    assert rollouts_in(second / "last.ckpt") == 2
    ends = []
    for checkpoint in (None, str(second / "last.ckpt")):
        module = make_grpo(tiny_janus, images_budget=40)
        trainer = make_trainer(tmp_path)
        trainer.fit(module, PromptData([write_prompts(tmp_path)]), ckpt_path=checkpoint)
        ends.append(module.state_dict())
        assert module.rollouts == 5
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


def test_a_fresh_run_takes_the_place_of_a_last_checkpoint_that_was_left(tiny_janus, tmp_path):
    killed_at(tiny_janus, tmp_path, 3, last(tmp_path, interval=2))
    killed_at(tiny_janus, tmp_path, 1, last(tmp_path, interval=2))
    assert [path.name for path in tmp_path.glob("last*")] == ["last.ckpt"]
    assert rollouts_in(tmp_path / "last.ckpt") == 0


def test_without_a_last_checkpoint_none_is_begun(tiny_janus, tmp_path):
    killed_at(tiny_janus, tmp_path, 2, ModelCheckpoint(tmp_path, every_n_train_steps=100))
    assert not list(tmp_path.glob("*.ckpt"))
