"""AdamW for weights that are kept in bfloat16: 6 bytes a parameter, gradients included.

bitsandbytes' AdamW8bit keeps its state in 8 bits, but rounds new weights to the nearest bfloat16
number. Near 0.02 those lie 1.2e-4 apart, so that a step of 1e-6 is lost in 98 of 100 weights.
Rounded up or down by chance, in proportion to how near each neighbour is, a weight moves rarely,
and on average by exactly its step (arXiv 2010.06192).

Apart from whoever trains, because it imports bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor

from cotgen_pl.sampling import noise_seed

DISCARDED = 1 << 16  # a bfloat16 number is the upper 16 bits of a float32 one


class StochasticAdamW8bit(AdamW8bit):
    """AdamW (arXiv 1711.05101) with 8-bit state (arXiv 2110.02861) and stochastic rounding.

    One parameter at a time is computed in float32: 12 bytes for each number of the largest one
    while it takes its step. Chance is keyed by (seed, step, place of the parameter), so a resumed
    run goes on as it was, and processes that hold the same weights round them alike.

    Args:
        params: Parameters; others than bfloat16 ones are stepped as AdamW8bit would.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the second moment's root.
        weight_decay: Share of each weight that a step takes off, over the learning rate.
        seed: Of the rounding.
    """

    rounds_stochastically = True
    """That small steps of bfloat16 weights count; `cotgen_pl.modules.base` asks for it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.seed = seed

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Take the step of one parameter; bitsandbytes calls this for each that has a gradient."""
        if p.dtype != torch.bfloat16:
            super().update_step(group, p, gindex, pindex)
            return
        weights, gradients = p.data, p.grad
        assert gradients is not None
        p.data, p.grad = weights.float(), None
        p.grad = gradients.float()
        super().update_step(group, p, gindex, pindex)
        generator = torch.Generator(p.device)
        generator.manual_seed(noise_seed(self.seed, self.state[p]["step"], gindex, pindex))
        weights.copy_(round_stochastically(p.data, generator))
        p.data, p.grad = weights, None
        p.grad = gradients


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to one of the two neighbours in bfloat16, so that the mean is the number itself.

    Args:
        values: Finite numbers of any shape; those that bfloat16 has stay as they are.
        generator: On the same device.

    >>> half = torch.full((1000,), 1 + 2**-8)  # between 1 and 1 + 2**-7
    >>> rounded = round_stochastically(half, torch.Generator().manual_seed(0))
    >>> sorted(set(rounded.tolist())), abs(rounded.float().mean().item() - half[0].item()) < 4e-4
    ([1.0, 1.0078125], True)
    """
    noise = torch.empty_like(values, dtype=torch.int32)
    noise.random_(0, DISCARDED, generator=generator)
    # Added to the bits below those that stay, noise carries into them as often as they are large.
    noise += values.view(torch.int32)
    noise &= -DISCARDED
    return noise.view(torch.float32).bfloat16()
