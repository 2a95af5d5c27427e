"""The hand-worked example: two images of three tokens.

The old policy gives every token 1/2; the ratios are chosen, so that the policy's log-probs are
log(ratio / 2).
"""

import math

import torch
from torch import Tensor

LN2 = math.log(2)
RATIOS = torch.tensor([[1.0, 1.5, 0.5], [0.5, 1.5, 1.0]])
OLD = torch.full((2, 3), 0.5).log()
ADVANTAGES = torch.tensor([1.0, -1.0])
# log reference - log policy: ln 2 at one token of image 1, -ln 2 at one of image 2.
REFERENCE_GAPS = torch.tensor([[LN2, 0.0, 0.0], [0.0, -LN2, 0.0]])


def logprobs_of(ratios: Tensor) -> Tensor:
    return (0.5 * ratios).log().requires_grad_()


def gradient_of(loss: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]
