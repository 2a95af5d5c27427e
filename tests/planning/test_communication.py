"""What processes send each other, against arithmetic written out."""

import math

import pytest

from cotgen_pl.planning.communication import (
    LINK_SHARE,
    LINKS,
    communication_seconds,
    ddp_bytes,
    format_communication,
    link,
    sharded_bytes,
)
from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.planning.work import OptimizerMemory, PlannedWork
from tools.plan import KNOWN_SIZES, plan

SIZES = KNOWN_SIZES["deepseek-community/Janus-Pro-1B"]
POLICY = PlannedPolicy(SIZES)  # bf16-mixed: 1,233,225,728 parameters of layers, in float32


def work(processes: int, **changes) -> PlannedWork:
    """Eight images on each process in micro-batches of 4, with a reference."""
    settings = {"drawn": 8, "draws": 1, "learnt": 8, "micro_batch": 4, "guided": True, "replays": 1}
    settings |= {"logprobs": "conditional", "twin": True, "processes": processes} | changes
    return PlannedWork(optimizer=OptimizerMemory(8.0, 4.0), **settings)


def test_whole_models_send_gradients_twice():
    # 2 x 7/8 x 1,233,225,728 x 4 bytes
    assert ddp_bytes(POLICY, work(8)) == {"gradients": pytest.approx(8_632_580_096)}
    assert ddp_bytes(POLICY, work(8, updates=2))["gradients"] == pytest.approx(17_265_160_192)
    assert ddp_bytes(POLICY, work(1)) == {"gradients": 0}


def test_adapters_send_little():
    adapters = PlannedPolicy(SIZES, lora_rank=16)
    assert ddp_bytes(adapters, work(8))["gradients"] < 0.02 * 8_632_580_096


def test_sharded_layers_travel_once_for_a_rollout_and_twice_for_each_micro_batch():
    layers = 7 / 8 * 1_233_225_728 * 2  # bytes, in bfloat16
    assert sharded_bytes(POLICY, work(8)) == {
        "rollout": pytest.approx(layers),
        "reference and replay": pytest.approx(2 * layers),
        "update": pytest.approx(2 * 2 * layers),
        "gradients": pytest.approx(2 * layers),  # once, in float32
    }
    one = work(8, micro_batch=8, replays=0)
    # ZeRO's 3 to 2 in equal types; here gradients have twice the bytes of layers: 1 + 1 + 2 to 4.
    learning = {n: b for n, b in sharded_bytes(POLICY, one).items() if n != "rollout"}
    assert sum(learning.values()) == pytest.approx(ddp_bytes(POLICY, one)["gradients"])


def test_the_slowest_link_of_the_ring_counts():
    assert [link(n) for n in (2, 8, 16, 64)] == ["in a node"] * 2 + ["between nodes"] * 2
    sent = {"gradients": 50e9}
    assert communication_seconds(sent, 64) == pytest.approx(1 / LINK_SHARE)
    ratio = communication_seconds(sent, 64) / communication_seconds(sent, 8)
    assert ratio == pytest.approx(LINKS["in a node"] / LINKS["between nodes"])


def test_the_table_names_both_ways():
    told = format_communication(POLICY, work(64))
    assert "communication at 35 GB/s between nodes" in told
    assert "whole models (DDP): each GPU sends 9.71 GB gradients in a step" in told
    assert "in parts (FSDP2): each GPU sends 2.43 GB rollout, 4.86 GB reference" in told


def test_the_tool_plans_64_gpus(repository, monkeypatch, capsys):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    many = ["--model.init_args.images_per_update", "512", "--gpus", "64", "--gpu", "h200"]
    [found] = plan(["configs/grpo_hps.yaml", *many])
    assert found["work"].drawn == 8
    assert found["communication"]["ddp"]["gradients"] == pytest.approx(9.71e9, rel=1e-3)
    assert "communication at 35 GB/s between nodes" in capsys.readouterr().out
    [alone] = plan(["configs/grpo_hps.yaml", "--gpu", "h200"])
    assert alone["communication"] is None
    assert not math.isnan(found["peak"])
