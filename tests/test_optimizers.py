"""Weights in bfloat16 that learn from steps far below their spacing."""

import copy

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from cotgen_pl.optimizers import StochasticAdamW8bit, round_stochastically

LR = 1e-6


def random_weights(*shape: int, dtype=torch.bfloat16) -> torch.nn.Parameter:
    """As a language model's: N(0, 0.02)."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter((0.02 * torch.randn(*shape, generator=generator)).to(dtype))


def small_steps(weights, **settings) -> StochasticAdamW8bit:
    return StochasticAdamW8bit([weights], lr=LR, weight_decay=0.0, **settings)


def train(optimizer, weights, steps: int, first: int = 0) -> None:
    """Steps on gradients that alternate in sign along a row, of which Adam makes steps of lr."""
    sign = torch.tensor([1.0, -1.0]).repeat(weights.shape[1] // 2).expand_as(weights)
    for step in range(first, first + steps):
        size = 0.5 + torch.rand(weights.shape, generator=torch.Generator().manual_seed(step))
        weights.grad = (sign * size).to(weights.dtype)
        optimizer.step()


def movement(optimizer, weights, steps: int) -> tuple[float, float]:
    """Share of weights that moved, and mean movement against their gradients, in steps."""
    start = weights.detach().clone()
    train(optimizer, weights, steps)
    moved = (weights - start).double()
    against = torch.cat([-moved[:, 0::2], moved[:, 1::2]])
    return (moved != 0).double().mean().item(), against.mean().item() / LR


def test_small_steps_move_bfloat16_weights_as_far_as_float32_ones():
    exact = random_weights(256, 512, dtype=torch.float32)
    share, expected = movement(AdamW8bit([exact], lr=LR, weight_decay=0.0), exact, 100)
    assert share > 0.99 and expected == pytest.approx(100, rel=0.05)
    weights = random_weights(256, 512)
    spacing = 2.0 ** (weights.detach().abs().double().log2().floor() - 7)
    chance = 1 - (1 - LR / spacing).clamp(min=0) ** 100  # of moving once or more
    share, mean = movement(small_steps(weights), weights, 100)
    assert share == pytest.approx(chance.mean().item(), abs=0.03) and share > 0.7
    assert mean == pytest.approx(expected, rel=0.03)
    assert weights.dtype == weights.grad.dtype == torch.bfloat16


def test_nearly_all_weights_move_in_a_thousand_steps():
    weights = random_weights(64, 128)
    share, mean = movement(small_steps(weights), weights, 1000)
    assert share > 0.98
    assert mean == pytest.approx(1000, rel=0.05)


@pytest.mark.slow
def test_small_steps_move_a_whole_layer_of_janus_pro_7b():
    """One weight of its MLP, 4,096 x 11,008: from the first step on, by what Adam's steps are."""
    weights = random_weights(4096, 11_008)
    optimizer = small_steps(weights)
    start, means = weights.detach().clone(), []
    for step in range(5):
        train(optimizer, weights, 1, first=step)
        moved = weights.detach().float() - start.float()
        means.append((moved[:, 1::2].mean() - moved[:, ::2].mean()).item() / 2 / LR)
    assert means == pytest.approx([1, 2, 3, 4, 5], rel=0.03)
    spacing = 2.0 ** (start.float().abs().log2().floor() - 7)
    chance = 1 - (1 - LR / spacing).clamp(min=0) ** 5  # of moving once or more
    share = (weights != start).float().mean().item()
    assert share == pytest.approx(chance.mean().item(), abs=0.005) and share > 0.12


def test_small_steps_are_lost_when_rounded_to_the_nearest():
    weights = random_weights(256, 512)
    share, mean = movement(AdamW8bit([weights], lr=LR, weight_decay=0.0), weights, 100)
    assert share < 0.03 and mean < 3


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole, resumed = random_weights(64, 128), random_weights(64, 128)
    train(small_steps(whole), whole, 6)
    before = small_steps(resumed)
    train(before, resumed, 3)
    torch.save(before.state_dict(), tmp_path / "optimizer.pt")
    torch.manual_seed(7)  # torch's own random state has no part in it
    after = small_steps(resumed)
    after.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(after, resumed, 3, first=3)
    assert torch.equal(whole, resumed)


def test_rounding_is_keyed_by_seed_and_parameter():
    first, second = random_weights(64, 128), random_weights(64, 128)
    other, start = random_weights(64, 128), random_weights(64, 128)
    optimizer = StochasticAdamW8bit([first, second], lr=LR, weight_decay=0.0)
    first.grad = second.grad = torch.ones_like(first)
    optimizer.step()
    train(small_steps(other, seed=1), other, 1)
    assert not torch.equal(first, start)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, ::2], other[:, ::2])


def test_other_types_step_as_they_always_do():
    ours, theirs = (random_weights(64, 128, dtype=torch.float32) for _ in range(2))
    train(small_steps(ours), ours, 3)
    train(AdamW8bit([theirs], lr=LR, weight_decay=0.0), theirs, 3)
    assert torch.equal(ours, theirs)


def test_weight_decay_and_rate_are_those_of_the_group():
    weights = random_weights(64, 128)
    start = weights.detach().double()
    optimizer = StochasticAdamW8bit([weights], lr=0.0, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.1
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    torch.testing.assert_close(weights.double(), start * 0.95, rtol=2**-7, atol=0)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -1.0 - 2**-9, 0.0123, -3e-5, 1e-39])
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(value):
    values = torch.full((200_000,), value)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    found = rounded.unique().double()
    assert rounded.dtype == torch.bfloat16 and len(found) == 2
    exact = values[0].double()
    assert found.min() < exact < found.max()
    spacing = (found.max() - found.min()).item()
    assert abs(rounded.double().mean() - exact).item() < 0.005 * spacing


def test_what_bfloat16_has_stays():
    values = torch.cat([torch.randn(1000).bfloat16().float(), torch.tensor([0.0, -0.0, 2.0**-126])])
    kept = copy.deepcopy(values)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.float(), kept)
    assert torch.equal(values, kept)
