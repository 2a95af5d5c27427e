"""Log-probabilities and entropies by hand."""

import pytest
import torch
from torch.testing import assert_close

from cotgen_pl.losses import logprobs as module
from cotgen_pl.losses import sum_logprobs, token_logprobs, token_statistics
from tests.losses.example import LN2, gradient_of
from tests.toys import counted_peak


def test_log_probs_and_entropy_by_hand() -> None:
    # p = 1/2, 1/4, 1/4: entropy 1/2 ln 2 + 2 * 1/4 * 2 ln 2 = 1.5 ln 2.
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]).log()
    tokens = torch.tensor([[0, 1]])
    expected = torch.tensor([[-LN2, -2 * LN2]])
    logprobs, entropy = token_statistics(logits, tokens)
    assert_close(logprobs, expected)
    assert_close(entropy, torch.tensor([[1.5 * LN2, 1.5 * LN2]]))
    # Twice the logits at temperature 2 are the same distribution.
    assert_close(token_logprobs(2 * logits, tokens, temperature=2.0), expected)
    assert_close(token_statistics(2 * logits, tokens, temperature=2.0), (expected, entropy))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_half_precision_logits_give_float32_and_float64_stays(temperature: float) -> None:
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.arange(6).reshape(2, 3)
    results = token_statistics(logits, tokens, temperature)
    assert [result.dtype for result in results] == [torch.float32] * 2
    # The bf16 logits are exact in float64: all rounding must be that of float32.
    exact = token_statistics(logits.double(), tokens, temperature)
    assert [result.dtype for result in exact] == [torch.float64] * 2
    assert_close(results, tuple(result.float() for result in exact), rtol=1e-5, atol=1e-5)


def test_entropy_keeps_its_graph_only_on_request() -> None:
    logits = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    tokens = torch.tensor([[0]])
    logprobs, entropy = token_statistics(logits, tokens)
    assert logprobs.requires_grad and not entropy.requires_grad
    entropy = token_statistics(logits, tokens, entropy_gradient=True)[1]
    # dH/dlogit_0 = -p0 p1 (logit_0 - logit_1) for two codes; p0 = 0.731059, p1 = 0.268941.
    assert_close(gradient_of(entropy.sum(), logits)[0, 0, 0], torch.tensor(-0.196612))


def test_entropy_gradient_stays_finite_when_a_probability_underflows() -> None:
    logits = torch.tensor([[[0.0, -200.0]]], requires_grad=True)
    entropy = token_statistics(logits, torch.tensor([[0]]), entropy_gradient=True)[1]
    assert gradient_of(entropy.sum(), logits).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 20, 1000])
def test_gradients_are_those_of_a_distribution_that_is_kept(monkeypatch, dtype, at_once) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)  # one row of 7, two rows, all six
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randint(7, (2, 3), generator=generator)
    weights = torch.randn(2, 2, 3, generator=generator).to(torch.promote_types(dtype, torch.float))
    kept = torch.log_softmax(logits.to(weights.dtype) / 0.7, -1)
    expected = kept.gather(-1, tokens[..., None])[..., 0], -(kept.exp() * kept).sum(-1)
    results = token_statistics(logits, tokens, 0.7, entropy_gradient=True)
    assert_close(results, expected)
    for used in ((0,), (1,), (0, 1)):  # a gradient of one result, of the other, of both
        ours, theirs = (
            gradient_of(sum((weights[i] * values[i]).sum() for i in used), logits)
            for values in (results, expected)
        )
        assert ours.dtype == dtype
        assert_close(ours, theirs)


def test_of_all_logits_only_they_and_their_gradient_are_held(monkeypatch) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 1000)
    logits = torch.zeros(4, 100, 1000, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(4, 100, dtype=torch.int64)

    def update() -> None:
        token_statistics(logits, tokens)[0].mean().backward()
        logits.grad = None

    gradient = logits.nbytes
    assert gradient < counted_peak(update) < 1.1 * gradient


def test_sums_of_long_images_are_rounded_once_and_alike_in_every_batch_shape() -> None:
    logprobs = -20 * torch.rand(8, 576, generator=torch.Generator().manual_seed(0))
    exact = logprobs.double().sum(1)
    sums = sum_logprobs(logprobs)
    assert sums.dtype == torch.float32
    assert sums.tolist() == exact.float().tolist()
    # Another order of the tokens, as kernels have it for another batch shape, changes no bit.
    assert sum_logprobs(logprobs.flip(1)).tolist() == sums.tolist()
    assert torch.cat([sum_logprobs(row[None]) for row in logprobs]).tolist() == sums.tolist()
    assert logprobs.flip(1).sum(1).tolist() != logprobs.sum(1).tolist()  # in float32 it changes
    assert sum_logprobs(logprobs.double()).tolist() == exact.tolist()
    assert sum_logprobs(logprobs.bfloat16()).dtype == torch.float32


def test_tokens_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \[2, 3\], got \[1, 3\]"):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(1, 3, dtype=torch.int64))


def test_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        token_statistics(torch.zeros(1, 1, 2), torch.tensor([[0]]), temperature=0.0)
