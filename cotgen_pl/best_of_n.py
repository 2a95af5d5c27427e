"""Best-of-n from N candidates: what a judge says of the picture that a reward would choose.

A reward's intrinsic generalisation (arXiv 2505.17017): how well it chooses, without any training,
where the benchmark is the judge.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_of_n_curve(judge: Tensor, chosen_by: Tensor) -> Tensor:
    """The expected judgement of the best of n pictures, for every n from 1 to N, per prompt.

    The mean over all subsets of n of the N candidates, without drawing any: in ascending order of
    the choosing score, candidate i is the best of C(i - 1, n - 1) out of C(N, n) subsets. Equal
    scores share the chances of their places. A candidate whose choosing score is NaN lies below
    all others, so it is chosen only where all n are such. Candidates without the judge's verdict
    (NaN) count in the choice and are left out of the mean.

    Args:
        judge: [P, N], what is measured.
        chosen_by: [P, N], what chooses. A constant chooses at random: n makes no difference. The
            judge itself is the ceiling.

    Returns:
        [P, N] float64; column n - 1 is that of n.

    >>> judge = torch.tensor([[0.0, 1.0, 0.5]])
    >>> best_of_n_curve(judge, judge)  # of 2: 0.5 of (0, 0.5), and 1 twice
    tensor([[0.5000, 0.8333, 1.0000]], dtype=torch.float64)
    >>> best_of_n_curve(judge, torch.zeros(1, 3))
    tensor([[0.5000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    if judge.ndim != 2 or judge.shape != chosen_by.shape:
        raise ValueError(
            "expected two tables [P, N] of N candidates for each of P prompts, got "
            f"{list(judge.shape)} and {list(chosen_by.shape)}; score the same pictures with both"
        )
    order = chosen_by.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # [P, N]: how many candidates lie below each, and how many do so or are its equals
    below = (order.unsqueeze(2) > order.unsqueeze(1)).sum(2)
    up_to = (order.unsqueeze(2) >= order.unsqueeze(1)).sum(2)
    shares = _shares_won(judge.shape[1])  # [N + 1, N]
    # Equals win all subsets whose best is among them; each of them an equal part.
    chances = (shares[up_to] - shares[below]) / (up_to - below).unsqueeze(2)  # [P, N, N]
    values = judge.double().unsqueeze(2)
    known = ~values.isnan()
    return (chances * values.nan_to_num()).sum(1) / (chances * known).sum(1)


def choose(scores: Tensor, noise: Tensor) -> list[int]:
    """The candidate with the highest score, for each of P prompts.

    Without a verdict (NaN) one is chosen only where all are such. Ties are drawn from.

    Args:
        scores: [P, N].
        noise: [P] in [0, 1), decides between equals.

    >>> choose(torch.tensor([[0.2, float("nan"), 0.9, 0.9]]), torch.tensor([0.6]))
    [3]
    """
    order = scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = order == order.amax(1, keepdim=True)  # [P, N]
    places = [row.nonzero()[:, 0].tolist() for row in best]
    return [
        equal[int(share * len(equal))] for equal, share in zip(places, noise.tolist(), strict=True)
    ]


def _shares_won(number: int) -> Tensor:
    """[N + 1, N]: row i, column n - 1 is C(i, n) / C(N, n), the subsets within the lowest i."""
    shares = torch.zeros(number + 1, number, dtype=torch.float64)
    ranks = torch.arange(number + 1, dtype=torch.float64)
    share = torch.ones(number + 1, dtype=torch.float64)
    for n in range(1, number + 1):
        share = share * (ranks - n + 1).clamp(min=0) / (number - n + 1)
        shares[:, n - 1] = share
    return shares
