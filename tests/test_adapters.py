"""Adapters on quantised weights, trained through the trainer on a CPU."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus
from tests.toys import fit, make_grpo, make_policy


@pytest.fixture(scope="module", params=[32, 64])
def folder(request, tmp_path_factory):
    """A Janus whose layers are narrower than a block of 64 weights, or as wide as one."""
    path = tmp_path_factory.mktemp("narrow")
    tokenizer = build_tokenizer(["a red circle left of a blue square", "two cats"], 300)
    sizes = {"hidden_size": request.param, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    save_janus(build_janus(tokenizer, **sizes, grid=2, vq_levels=2), tokenizer, path)
    return path


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_on_quantised_weights_learn_on_a_cpu(folder, tmp_path, bits):
    settings = {"lora": LoraSettings(rank=2, alpha=4), "quantize": bits, "dtype": "float32"}
    module = make_grpo(
        folder,
        policy=make_policy(folder, **settings),
        optimizer=torch.optim.AdamW,
        images_budget=16,
        updates_per_rollout=2,
        kl_coef=0.1,
    )
    fit(module, tmp_path, precision="32-true")
    adapters = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    start = module._start_weights
    assert len(adapters) == 2 * 2 * 7  # two matrices on seven projections of two layers
    unmoved = [name for name, p in adapters.items() if torch.equal(p, start[name])]
    assert unmoved == []
    assert module.global_step == 4


def test_sampling_leaves_four_bit_weights_in_the_form_that_trains(folder):
    """Kernels for inference pack weights in place, and then give no gradient."""
    policy = make_policy(folder, lora=LoraSettings(rank=2), quantize="4bit", dtype="float32").load()
    layers = [layer for layer in policy.modules() if isinstance(layer, Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        policy.logits(["two cats"], torch.zeros(1, 4, dtype=torch.long))
    assert len(layers) == 14
    assert all(
        torch.equal(layer.weight.data, weight) for layer, weight in zip(layers, before, strict=True)
    )


def test_adapters_begin_by_the_seed_whatever_was_drawn_since(folder):
    starts = []
    for drawn in (0, 3):
        torch.manual_seed(5)
        torch.rand(drawn)
        policy = make_policy(folder, lora=LoraSettings(rank=2)).load()
        starts.append([p.detach().clone() for p in policy.parameters() if p.requires_grad])
    assert any(start.any() for start in starts[0])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
