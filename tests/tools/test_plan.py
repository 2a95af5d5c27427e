"""The planning tool on shipped experiments: no weights, no network, no run folder."""

import json

import pytest

from cotgen_pl.planning.footprint import read_sizes
from cotgen_pl.planning.work import OptimizerMemory
from tools.plan import GPUS, KNOWN_SIZES, file_bytes, plan, policy_sizes

FLOAT32 = [
    "--model.init_args.policy.init_args.trained_dtype=float32",
    "--model.init_args.optimizer=torch.optim.AdamW",
]
HPS = 986e6 * 4  # bytes, by the header of configs/rewards/hps_v2.1.yaml


@pytest.fixture(autouse=True)
def root(repository, monkeypatch):
    """The repository's root as working directory, and no way to the hub."""
    monkeypatch.chdir(repository)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repository


def gigabytes(found, phase, name) -> float:
    return found["memory"][phase][name] / 1e9


def test_plans_janus_pro_as_the_experiments_header_says(capsys, tmp_path):
    file = tmp_path / "plan.json"
    found = plan(["configs/grpo_hps.yaml", "--gpu", "h100", "rtx4090", "--json", str(file)])
    h100, rtx4090 = found
    assert h100["fits"] and not rtx4090["fits"]
    parts = ("weights that train", "gradients", "optimizer")
    assert sum(gigabytes(h100, "update", part) for part in parts) == pytest.approx(20, abs=0.5)
    assert gigabytes(h100, "update", "reference") == pytest.approx(5, abs=0.1)
    assert gigabytes(h100, "update", "frozen weights") == pytest.approx(2, abs=0.2)
    assert gigabytes(h100, "update", "reward") == HPS / 1e9
    assert gigabytes(h100, "rollout", "key-value cache") == pytest.approx(16, abs=0.5)
    assert gigabytes(h100, "rollout", "decoding pictures") == pytest.approx(9, abs=0.5)
    assert gigabytes(h100, "evaluation", "start weights") == pytest.approx(5, abs=0.1)
    assert h100["peak"] == pytest.approx(58e9, abs=1e9) and h100["phase"] == "evaluation"
    output = capsys.readouterr().out
    assert "DOES NOT FIT: 57.8 GB in the evaluation, room 21.6" in output
    assert "7.32 GB less, 50.4 GB, not enough alone: model.init_args.optimizer: bitsand" in output
    saved = json.loads(file.read_text())["plans"]
    assert [row["gpu"] for row in saved] == ["h100", "rtx4090"]
    assert saved[0]["seconds"] == h100["seconds"]


def test_all_of_7b_fits_one_gpu_of_141_gb_and_no_small_steps_are_lost():
    [found] = plan(["configs/grpo_hps_7b.yaml", "--gpu", "h200"])
    assert found["fits"] and found["peak"] < 127e9
    parts = ("weights that train", "gradients", "optimizer")
    held = sum(gigabytes(found, "update", part) for part in parts)
    assert held == pytest.approx(6.06 * 6.0715, abs=0.1)  # bytes a parameter, billions of them
    assert gigabytes(found, "update", "reference") == pytest.approx(12.1, abs=0.1)
    assert found["work"].drawn == 64
    [plain] = plan(["configs/grpo_hps_7b.yaml", "--gpu", "h200", *FLOAT32])
    assert not plain["fits"]


def test_adapters_on_7b_in_4_bits_fit_24_gb():
    [found] = plan(["configs/grpo_hps_7b_lora.yaml", "--gpu", "rtx4090"])
    assert found["fits"] and found["peak"] < 24e9
    assert (found["work"].drawn, found["work"].draws, found["work"].learnt) == (8, 8, 64)
    assert gigabytes(found, "rollout", "decoding pictures") == pytest.approx(2.54, abs=0.01)
    [at_once] = plan(
        ["configs/grpo_hps_7b_lora.yaml", "--gpu", "rtx4090", "--model.init_args.drawn_at_once=64"]
    )
    assert not at_once["fits"]
    assert at_once["seconds"]["rollout"] < found["seconds"]["rollout"]


def test_plans_the_shapes_world_on_a_cpu(capsys, tmp_path):
    [found] = plan(["configs/grpo_shapes.yaml", "--model.init_args.micro_batch_size", "auto"])
    assert found["fits"] and found["seconds"] is None and found["gpu"] == "cpu"
    assert found["micro_batch_images"] == 128  # all of an update: there is room for it
    assert "reward" not in found["memory"]["update"]  # the exact judge has no weights
    assert "seconds: not planned on a CPU, whose rates are not" in capsys.readouterr().out


def test_cache_is_exact_on_a_cpu_and_ends_with_a_bucket_on_a_gpu():
    decoding = "--model.init_args.policy.init_args.decoding"

    def positions(*arguments):
        return [
            found["memory"]["rollout"]["key-value cache"] / (128 * 196_608)
            for found in plan(["configs/grpo_hps.yaml", *arguments])
        ]

    assert positions("--gpu", "cpu", "h200") == [608, 640]
    assert positions(f"{decoding}.path=fused", "--gpu", "cpu", "h200") == [608, 640]
    assert positions(f"{decoding}.path=eager", "--gpu", "cpu", "h200") == [608, 608]
    assert positions(f"{decoding}.buckets=[512, 700]", "--gpu", "cpu", "h200") == [700, 700]


def test_seconds_are_told_in_the_precision_whose_rates_are_known(capsys):
    [found] = plan(["configs/grpo_hps.yaml", "--gpu", "h200", "--trainer.precision", "32-true"])
    assert found["seconds"] is None
    output = capsys.readouterr().out
    assert "not planned in 32-true: the rates known are those of bfloat16 products" in output


def test_plans_pairs_and_several_gpus():
    [found] = plan(["configs/dpo_hps.yaml", "--gpus", "2", "--gpu", "a100"])
    assert found["work"].learnt == 8 and found["work"].drawn == 64
    assert gigabytes(found, "update", "buckets of gradients") == pytest.approx(4.93, abs=0.01)
    assert "reference" not in found["memory"]["update"]  # stored


def test_auto_fills_a_stated_memory():
    auto = ["configs/grpo_hps.yaml", "--model.init_args.micro_batch_size", "auto"]
    wide, none = plan([*auto, "--gpu", "h200", "rtx4090"])
    assert wide["micro_batch_images"] == 64 and wide["fits"]
    assert none["micro_batch_images"] == 1 and not none["fits"]
    guided = ["--model.init_args.logprobs", "guided"]  # an update of all images takes most then
    [narrow] = plan([*auto, *guided, "--gpu", "h200", "--memory_gb", "66"])
    assert 1 < narrow["micro_batch_images"] < 64 and narrow["fits"]


def test_optimizers_and_rewards_come_from_the_configuration():
    arguments = ["--model.init_args.optimizer", "torch.optim.SGD"]
    arguments += ["--model.init_args.optimizer.init_args.lr", "0.1", "--reward_gb", "7"]
    [found] = plan(["configs/grpo_hps.yaml", *arguments])
    assert found["work"].optimizer == OptimizerMemory(0.0, 0)
    assert gigabytes(found, "update", "reward") == 7


def test_a_reward_without_arguments_is_planned():
    arguments = ["--model.init_args.reward", "configs/rewards/random.yaml"]
    [found] = plan(["configs/grpo_hps.yaml", *arguments])
    assert "reward" not in found["memory"]["update"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/sft_shapes.yaml"], "expected GRPOModule or DPOModule, got SFTModule"),
        (["configs/grpo_hps.yaml", "--gpus", "3"], "groups of 8 on 3 GPUs, got 64"),
        (["configs/dpo_hps.yaml", "--gpus", "3"], "pairs_per_update to split over 3 GPUs, got 8"),
        (["configs/grpo_hps.yaml", "--gpus", "0"], "expected gpus of 1 or more"),
        (["configs/grpo_hps.yaml", "--mfu", "45"], "expected mfu from 0 to 1"),
        (["configs/grpo_hps.yaml", "--mfu", "0"], "above 0, got 0; leave it out"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(arguments)


def test_known_sizes_are_those_of_their_configurations():
    from transformers import JanusConfig

    for width, mlp, layers, name in ((2048, 5632, 24, "1B"), (4096, 11_008, 30, "7B")):
        text = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp}
        text |= {"num_hidden_layers": layers, "num_attention_heads": width // 128}
        text |= {"num_key_value_heads": width // 128, "vocab_size": 102_400}
        vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 384, "patch_size": 16, "mlp_ratio": 4.0, "depth": 2}
        vq = {"embed_dim": 8, "num_embeddings": 16_384, "projection_dim": width}
        vq |= {"image_token_embed_dim": width, "channel_multiplier": [1, 1, 2, 2, 4]}
        vision["projection_dim"] = width
        config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq)
        assert read_sizes(config) == KNOWN_SIZES[f"deepseek-community/Janus-Pro-{name}"]


def test_sizes_of_a_folder_come_from_its_config():
    assert policy_sizes("cotgen_pl/shapes/assets/janus").num_tokens == 16
    with pytest.raises(ValueError, match="does not exist"):
        policy_sizes("./no/such/folder")


def test_weight_files_are_counted_in_one_format(tmp_path):
    assert file_bytes(None) is None and file_bytes(str(tmp_path)) is None
    (tmp_path / "model.bin").write_bytes(b"123")
    assert file_bytes(str(tmp_path)) == 3
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert file_bytes(str(tmp_path)) == 5
    assert file_bytes(str(tmp_path / "model.bin")) == 3


def test_every_gpu_names_its_source():
    assert set(GPUS) == {"h200", "h100", "a100", "l40s", "rtx4090"}
    assert all(device.source.startswith("NVIDIA") for device in GPUS.values())
