"""Checkpoints in parts, written and read by a group of one process."""

import pytest
import torch
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cotgen_pl import sharded_checkpoints
from cotgen_pl.run_checkpoints import WholeCheckpoints
from cotgen_pl.sharded_checkpoints import load_parts, save_parts, split_whole


@pytest.fixture
def mesh():
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def checkpoint_of(mesh, value):
    """What a trainer saves, in small: weights in parts, one that is whole, and plain values."""
    weight = distribute_tensor(torch.full((3, 2), value), mesh, [Shard(0)])
    state = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": weight * 2}}, "param_groups": []}
    return {
        "state_dict": {"policy.weight": weight},
        "optimizer_states": [state],
        "reference": {},
        "random_state": torch.arange(5),
        "progress": {"rollouts": 7},
    }


def test_parts_come_back_as_parts_or_as_wholes(mesh, tmp_path):
    folder = tmp_path / "last.ckpt"
    save_parts(checkpoint_of(mesh, 1.5), folder)
    divided, whole = load_parts(folder, mesh), load_parts(folder, None)
    for read in (divided, whole):
        assert read["progress"] == {"rollouts": 7}
        assert read["random_state"].tolist() == [0, 1, 2, 3, 4]
        assert read["optimizer_states"][0]["state"][0]["step"] == 4
    weight = divided["state_dict"]["policy.weight"]
    assert isinstance(weight, DTensor) and torch.equal(
        weight.full_tensor(), torch.full((3, 2), 1.5)
    )
    assert torch.equal(whole["state_dict"]["policy.weight"], torch.full((3, 2), 1.5))
    average = whole["optimizer_states"][0]["state"][0]["exp_avg"]
    assert torch.equal(average, torch.full((3, 2), 3.0))


def test_the_last_checkpoint_stays_until_the_next_is_whole(mesh, tmp_path, monkeypatch):
    folder = tmp_path / "last.ckpt"
    save_parts(checkpoint_of(mesh, 1.5), folder)

    def die(*args):
        raise RuntimeError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(sharded_checkpoints, "write_whole", die)
        with pytest.raises(RuntimeError, match="the machine went down"):
            save_parts(checkpoint_of(mesh, 2.5), folder)
    assert load_parts(folder, None)["state_dict"]["policy.weight"][0, 0] == 1.5
    save_parts(checkpoint_of(mesh, 3.5), folder)
    assert load_parts(folder, None)["state_dict"]["policy.weight"][0, 0] == 3.5
    assert len(list(folder.iterdir())) == 2  # meta.pt, and no tensors of the others


def test_a_folder_that_was_never_finished_is_refused(mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_checkpoints, "write_whole", lambda path, write: None)
    save_parts(checkpoint_of(mesh, 1.5), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"expected meta.pt in the checkpoint folder .*last.ckpt"):
        load_parts(tmp_path / "last.ckpt", None)


def test_a_folder_takes_the_place_of_a_file(mesh, tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"of a run that was not sharded")
    save_parts(checkpoint_of(mesh, 1.5), path)
    assert load_parts(path, None)["progress"] == {"rollouts": 7}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_takes_the_place_of_a_folder(mesh, tmp_path):
    path = tmp_path / "last.ckpt"
    save_parts(checkpoint_of(mesh, 1.5), path)
    whole = load_parts(path, None)
    WholeCheckpoints().save_checkpoint(whole, path)
    assert path.is_file() and list(tmp_path.iterdir()) == [path]
    assert WholeCheckpoints().load_checkpoint(path)["progress"] == {"rollouts": 7}


def test_whole_tensors_are_divided(mesh):
    whole = {
        "state_dict": {"policy.weight": torch.ones(3, 2)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}}}],
        "reference": {"weight": torch.ones(3, 2)},
        "random_state": torch.arange(5),
    }
    divided = split_whole(whole, mesh)
    assert isinstance(divided["state_dict"]["policy.weight"], DTensor)
    assert isinstance(divided["reference"]["weight"], DTensor)
    average = divided["optimizer_states"][0]["state"][0]
    assert isinstance(average["exp_avg"], DTensor) and not isinstance(average["step"], DTensor)
    assert not isinstance(divided["random_state"], DTensor)
