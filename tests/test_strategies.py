"""What a sharded run refuses before weights load, and how it is named on the command line."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore, init_process_group, is_initialized

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.strategies import ShardedStrategy, leave_group
from tests.toys import make_grpo
from tools.main import read_strategy


def sharded(module):
    module._trainer = SimpleNamespace(strategy=ShardedStrategy())
    return module


def test_bitsandbytes_optimizers_are_refused(tiny_janus):
    from bitsandbytes.optim import AdamW8bit

    module = sharded(make_grpo(tiny_janus))
    with pytest.raises(ValueError, match=r"got bitsandbytes' AdamW8bit.*torch.optim.AdamW"):
        module.check_sharding(AdamW8bit)
    module.check_sharding(torch.optim.AdamW)
    make_grpo(tiny_janus).check_sharding(AdamW8bit)


def test_quantised_weights_are_refused(tiny_janus):
    policy = JanusPolicy(str(tiny_janus), lora=LoraSettings(), quantize="4bit")
    module = sharded(make_grpo(tiny_janus, policy=policy))
    with pytest.raises(ValueError, match=r"got quantize: 4bit.*ddp.yaml"):
        module.check_sharding(torch.optim.AdamW)
    assert policy.model is None


def test_unknown_ways_to_gather_are_refused():
    with pytest.raises(ValueError, match="expected gather to be one of"):
        ShardedStrategy("sometimes")


def test_checkpoints_elsewhere_than_on_a_disk_are_refused():
    with pytest.raises(ValueError, match="on a disk that all processes share, got s3://bucket"):
        ShardedStrategy().save_checkpoint({}, "s3://bucket/last.ckpt")


def test_a_strategy_is_named_by_its_file_or_by_lightnings_name(tmp_path):
    assert read_strategy("ddp") == "ddp"
    file = tmp_path / "mine.yaml"
    file.write_text("class_path: cotgen_pl.strategies.ShardedStrategy\ninit_args: {gather: step}\n")
    named = read_strategy(str(file))
    assert named.class_path == "cotgen_pl.strategies.ShardedStrategy"
    assert named.init_args.gather == "step"
    file.write_text("class_path: cotgen_pl.strategies.ShardedStrategy\ninit_args: {gater: step}\n")
    for wrong in (file, tmp_path / "other.yaml"):
        with pytest.raises(ValueError, match=rf"got {wrong}: .*configs/strategies has fsdp.yaml"):
            read_strategy(str(wrong))


def test_a_program_leaves_its_group_where_it_has_one():
    leave_group()  # none yet
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    leave_group()
    assert not is_initialized()
