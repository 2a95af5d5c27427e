"""Numbers to watch a rollout by: tensors in, named scalars out.

Apart from the losses, which nothing here enters, and from the module that logs them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from cotgen_pl.interfaces import Scores
from cotgen_pl.losses import dead_groups

# Metrics that stay extremes when micro-batches or processes are put together; all others are means.
MAXIMA = {
    "clip_ratio/high_max",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/max",
}
MINIMA = {"clip_ratio/low_min", "sampling/importance_sampling_ratio/min"}


def reward_metrics(scores: Scores, group_size: int) -> dict[str, Tensor]:
    """What a reward says of a rollout, by TRL's names.

    `reward`: mean of the totals. `reward_std`: mean over groups of the sample deviation (G - 1).
    `frac_reward_zero_std`: share of groups without variance or with fewer than two verdicts,
    whatever the advantages' scaling (TRL counts by that). `frac_no_verdict`: share of images.
    `rewards/<part>/mean` and `/std` (sample): of each part, missing verdicts left out;
    `rewards/<part>/missing`: share of images without one.

    >>> totals = torch.tensor([1.0, 3.0, 2.0, 2.0])
    >>> metrics = reward_metrics(Scores.single("taste", totals), group_size=2)
    >>> metrics["frac_reward_zero_std"].item(), round(metrics["reward_std"].item(), 4)
    (0.5, 0.7071)
    """
    groups = scores.total.view(-1, group_size)
    metrics = {
        "reward": groups.nanmean(),
        "reward_std": _sample_std(groups).nanmean(),
        "frac_reward_zero_std": dead_groups(scores.total, group_size).float().mean(),
        "frac_no_verdict": groups.isnan().float().mean(),
    }
    for name, values in scores.parts.items():
        metrics[f"rewards/{name}/mean"] = values.nanmean()
        metrics[f"rewards/{name}/std"] = _sample_std(values)
        metrics[f"rewards/{name}/missing"] = values.isnan().float().mean()
    return metrics


def _sample_std(values: Tensor) -> Tensor:
    """Deviation along the last axis without NaN; NaN for fewer than two."""
    count = (~values.isnan()).sum(-1)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return (squares / (count - 1).clamp(min=0)).sqrt()  # 0 / 0 for none as for one


def parity_metrics(sampled: Tensor, replayed: Tensor) -> dict[str, Tensor]:
    """How far the sampler's log-probs [B, T] lie from teacher forcing's of the same distribution.

    >>> parity_metrics(torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))[
    ...     "sampling/sampling_logp_difference/max"
    ... ]
    tensor(0.5000)
    """
    difference, ratio = (sampled - replayed).abs(), (replayed - sampled).exp()
    return {
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
    }


def merge_metrics(metrics: dict[str, Tensor], part: dict[str, Tensor], share: float) -> None:
    """Add a micro-batch's metrics to those before it: extremes as such, all else by share.

    Args:
        metrics: Of the micro-batches so far; changed in place.
        part: Of one more.
        share: Its share of the images.
    """
    for name, value in part.items():
        if name in MAXIMA:
            metrics[name] = torch.maximum(metrics.get(name, value), value)
        elif name in MINIMA:
            metrics[name] = torch.minimum(metrics.get(name, value), value)
        else:
            metrics[name] = metrics.get(name, 0) + share * value


class Stopwatch:
    """Counts seconds while it runs.

    Args:
        seconds: Counted before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None  # of a clock; None while it stands

    @property
    def seconds(self) -> float:
        """Counted so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running

    def start(self) -> None:
        """Go on."""
        if self._since is None:
            self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still while the context lasts, unless it stands anyway."""
        runs = self._since is not None
        self._before, self._since = self.seconds, None
        yield
        if runs:
            self.start()


def peak_memory_gb(device: torch.device) -> float:
    """Most memory (1e9 bytes) that tensors took on a GPU so far; elsewhere, all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float("nan")  # Python has no such counter there
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # in bytes there, else in KiB
