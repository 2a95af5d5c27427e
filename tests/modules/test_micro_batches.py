"""The micro-batch that is found, kept by resumed runs, and what is refused for want of memory."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.images import ImageWriter
from cotgen_pl.data.prompts import PromptData
from cotgen_pl.interfaces import Policy
from cotgen_pl.modules import micro_batches
from cotgen_pl.modules.micro_batches import held_bytes, total_memory
from cotgen_pl.planning.footprint import PlannedPolicy, read_sizes
from cotgen_pl.planning.work import OptimizerMemory, PlannedWork, memory, peak
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import Brightness, make_dpo, make_grpo, make_trainer, write_prompts
from tools.main import SaveRunConfig


def test_rewards_are_counted_where_they_hide_their_networks():
    reward = Brightness()
    reward.hidden = [torch.nn.Linear(3, 2)]
    assert held_bytes(reward) == 4 * (3 * 2 + 2)
    reward.device = "cuda:1"
    assert held_bytes(reward) == 0
    assert held_bytes(None) == 0


def room_for(folder, images: int, monkeypatch) -> None:
    """Make the machine as large as a run of `make_grpo` with such micro-batches needs."""
    total = needed(folder, images) * 1.0001 / micro_batches.CPU_SHARE
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: total)


def needed(folder, images: int, **settings) -> float:
    """Bytes of a run of `make_grpo` in float64 on a CPU, with so many images in a micro-batch."""
    policy = JanusPolicy(str(folder), dtype="float64")
    planned = PlannedPolicy.read(read_sizes(policy.config), policy, "64-true", "cpu")
    usual = {"drawn": 8, "draws": 1, "learnt": 8, "guided": True, "logprobs": "guided"}
    rest = {"twin": False, "replays": 0, "optimizer": OptimizerMemory(0, 0)}
    work = PlannedWork(micro_batch=images, **(usual | rest | settings))
    return peak(memory(planned, work))[1]


def test_auto_is_found_once_and_kept_by_a_resumed_run(tiny_janus, tmp_path, monkeypatch, capsys):
    room_for(tiny_janus, 3, monkeypatch)
    monkeypatch.setattr("cotgen_pl.planning.footprint.PIXELS_PER_DECODE", 1)
    data = PromptData([write_prompts(tmp_path)])
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    module = make_grpo(tiny_janus, micro_batch_size="auto", images_budget=16)
    sizes = []
    update = module._statistics
    module._statistics = lambda policy, part: sizes.append(len(part)) or update(policy, part)
    make_trainer(tmp_path, keep).fit(module, data)
    assert module.micro_batch_size == 3
    assert sizes == [3, 3, 2] * 2
    assert SaveRunConfig._found_out(None, module)["micro_batch_size"] == 3  # run.json
    assert "micro_batch_size: auto is 3" in capsys.readouterr().out
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1e15)
    resumed = make_grpo(tiny_janus, micro_batch_size="auto", images_budget=24)
    make_trainer(tmp_path).fit(resumed, data, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert resumed.micro_batch_size == 3
    fresh = make_grpo(tiny_janus, micro_batch_size="auto")
    make_trainer(tmp_path / "fresh").fit(fresh, data)
    assert fresh.micro_batch_size == 8


def test_a_smaller_machine_refuses_the_micro_batch_of_a_checkpoint(
    tiny_janus, tmp_path, monkeypatch
):
    """It names its own size, and goes on once that is set; as it does on a machine with room."""
    monkeypatch.setattr("cotgen_pl.planning.footprint.PIXELS_PER_DECODE", 1)
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1e15)
    data = PromptData([write_prompts(tmp_path)])
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    module = make_grpo(tiny_janus, micro_batch_size="auto", images_budget=16)
    make_trainer(tmp_path, keep).fit(module, data)
    checkpoint = str(tmp_path / "step=1.ckpt")
    total = needed(tiny_janus, 8) * 0.99
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: total)
    resumed = make_grpo(tiny_janus, micro_batch_size="auto", images_budget=16)
    message = (
        r"expected a run that fits into .* GB, got .* in its update .*micro-batches of 8 were "
        r"found on a device with more memory; set .*micro_batch_size to a number, here (\d)$"
    )
    with pytest.raises(ValueError, match=message) as refusal:
        make_trainer(tmp_path).fit(resumed, data, ckpt_path=checkpoint)
    number = int(str(refusal.value)[-1])
    assert 1 <= number < 8
    resumed = make_grpo(tiny_janus, micro_batch_size=number, images_budget=16)
    make_trainer(tmp_path).fit(resumed, data, ckpt_path=checkpoint)
    assert resumed.rollouts == 2
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: total * 1.02)
    resumed = make_grpo(tiny_janus, micro_batch_size="auto", images_budget=16)
    make_trainer(tmp_path).fit(resumed, data, ckpt_path=checkpoint)
    assert resumed.micro_batch_size == 8


def test_auto_takes_the_smallest_of_all_processes(tiny_janus, monkeypatch):
    module = make_grpo(tiny_janus, micro_batch_size="auto")
    cpu = torch.device("cpu")
    module._trainer = attached(cpu)
    monkeypatch.setattr(module, "gather", lambda size: torch.cat([size, torch.tensor([5])]))
    module._fit_into_memory(module.reward)
    assert module.micro_batch_size == 5


def attached(device: torch.device, **more) -> SimpleNamespace:
    """What a module asks of its trainer."""
    strategy = SimpleNamespace(root_device=device)
    usual = {"precision": "32-true", "world_size": 1, "num_nodes": 1, "callbacks": []}
    return SimpleNamespace(strategy=strategy, **(usual | more))


def test_a_gpu_without_room_refuses_before_weights_load(tiny_janus, monkeypatch):
    module = make_grpo(tiny_janus, micro_batch_size=4)
    module._trainer = attached(torch.device("cuda"))
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1e6)
    with pytest.raises(ValueError, match=r"fits into 0.001 GB, got one that is planned"):
        module._fit_into_memory(module.reward)
    assert module.policy.model is None
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1e12)
    module._fit_into_memory(module.reward)
    assert module.micro_batch_size == 4


def drawing_module(folder, callbacks, **settings):
    """A module that is about to draw on a GPU."""
    module = make_grpo(folder, **settings)
    module._trainer = attached(torch.device("cuda"), callbacks=callbacks)
    module._trainer.state = SimpleNamespace(fn="validate")
    return module


def test_a_gpu_without_room_to_draw_refuses_before_weights_load(tiny_janus, monkeypatch):
    """By weights, keys and values, and pictures: not by what training takes."""
    module = drawing_module(tiny_janus, [SimpleNamespace(batch_size=100)], kl_coef=0.1)
    policy = PlannedPolicy.read(read_sizes(module.policy.config), module.policy, "32-true")
    twice = 2 * policy.trained * policy.trained_bytes  # the reference is read, too
    drawn = policy.cache(100, guided=True) + policy.decoding(100) + policy.drawing_copy
    exactly = twice + policy.frozen_weights + drawn
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: exactly * 0.999)
    message = r"in its rollout \(.*draw fewer than 100 pictures at once: batch_size"
    with pytest.raises(ValueError, match=message):
        module.configure_model()
    assert module.policy.model is None
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: exactly * 1.001)
    module._check_drawing(module.reward)
    alone = drawing_module(tiny_janus, [])  # draws nothing
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1.0)
    alone._check_drawing(alone.reward)


def test_a_reward_is_scored_with_beside_the_policy(tiny_janus, monkeypatch):
    """Where it goes after scoring, it is not there while pictures are drawn."""
    reward = Brightness()
    reward.network = torch.nn.Linear(2000, 2000)  # 16 MB
    module = drawing_module(tiny_janus, [SimpleNamespace(batch_size=1)], reward=reward)
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 16e6)
    with pytest.raises(ValueError, match=r"got .* in its rollout \(.*GB reward"):
        module._check_drawing(reward)
    reward.offload = True
    with pytest.raises(ValueError, match=r"got .* in its reward \(.*GB reward"):
        module._check_drawing(reward)


def test_predict_draws_no_more_at_once_than_there_are_pictures(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus)
    data = PromptData([write_prompts(tmp_path)])
    best = {"candidates": 2, "rewards": {"brightness": Brightness()}, "select": "brightness"}
    for settings, images in (({}, 4), ({"batch_size": 3}, 3), (best, 8)):
        make_trainer(tmp_path / str(images), ImageWriter(**settings)).predict(module, data)
        assert module.pictures_at_once == images


def test_the_drawing_that_predict_does_is_what_is_checked(tiny_janus, tmp_path, monkeypatch):
    """An evaluation's larger batch beside it draws nothing then."""
    module = drawing_module(tiny_janus, [SimpleNamespace(batch_size=10_000)])
    module.pictures_at_once = 1
    monkeypatch.setattr(micro_batches, "total_memory", lambda device: 1e7)
    module._check_drawing(module.reward)
    module.pictures_at_once = 0
    with pytest.raises(ValueError, match="draw fewer than 10000"):
        module._check_drawing(module.reward)


def test_pairs_are_fitted_in_pairs(tiny_janus, monkeypatch):
    module = make_dpo(tiny_janus, micro_batch_size="auto")
    data = SimpleNamespace(pairs_per_update=6)
    module._trainer = attached(torch.device("cpu"), datamodule=data)
    monkeypatch.setattr(module, "gather", lambda size: size)
    module._fit_into_memory(None)
    assert module.micro_batch_size == 6
    assert planned_at(module, 3, monkeypatch) == 6


def test_a_checkpoints_size_is_planned_up_to_what_a_process_learns(tiny_janus, monkeypatch):
    """As where one process wrote it, and two go on."""
    module = make_grpo(tiny_janus, micro_batch_size="auto")  # 8 images
    module._trainer = attached(torch.device("cpu"), world_size=2)
    assert planned_at(module, 3, monkeypatch) == 3
    assert planned_at(module, 8, monkeypatch) == 4


def planned_at(module, size: int, monkeypatch) -> int:
    """Images in the micro-batch that is planned with for a checkpoint's size."""
    planned = []

    def record(policy, work):
        planned.append(work.micro_batch)
        return memory(policy, work)

    monkeypatch.setattr(micro_batches, "memory", record)
    module._check_stored(size)
    return planned[-1]


def test_auto_needs_known_sizes(tiny_janus):
    class Other(torch.nn.Module):
        pass

    module = make_grpo(tiny_janus, micro_batch_size="auto")
    module.policy = Other()
    module._trainer = attached(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"expected a JanusPolicy.*got Other.*set a number"):
        module._fit_into_memory(None)
    assert not issubclass(Other, Policy)


@pytest.mark.parametrize("size", [0, "most"])
def test_other_sizes_are_refused(tiny_janus, size):
    with pytest.raises(ValueError, match="expected micro_batch_size"):
        make_grpo(tiny_janus, micro_batch_size=size)


def test_memory_of_this_machine_is_known(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert total_memory(cpu) > 1e8
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(micro_batches, "CONTAINER_LIMIT", limit)
    assert total_memory(cpu) == 123456789
    limit.write_text("max\n")
    assert total_memory(cpu) > 123456789
