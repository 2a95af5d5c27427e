"""Metrics of a rollout, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from cotgen_pl.interfaces import Scores
from cotgen_pl.metrics import merge_metrics, parity_metrics, peak_memory_gb, reward_metrics

NAN = math.nan


def test_reward_metrics_leave_missing_verdicts_out():
    totals = torch.tensor([1.0, NAN, 3.0, 5.0, 5.0, 5.0, NAN, NAN, 7.0])
    watched = torch.arange(9.0)
    scores = Scores(totals, {"a": totals, "b": watched}, {"a": 1.0, "b": 0.0})
    metrics = {name: value.item() for name, value in reward_metrics(scores, 3).items()}
    assert metrics["reward"] == pytest.approx(26 / 6)
    # Groups: {1, 3} has deviation sqrt(2), {5, 5, 5} has 0, {7} has none.
    assert metrics["reward_std"] == pytest.approx(math.sqrt(2) / 2)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert metrics["frac_no_verdict"] == pytest.approx(3 / 9)
    assert metrics["rewards/a/mean"] == pytest.approx(26 / 6)
    squares = sum((x - 26 / 6) ** 2 for x in (1, 3, 5, 5, 5, 7))
    assert metrics["rewards/a/std"] == pytest.approx(math.sqrt(squares / 5))
    assert metrics["rewards/b/mean"] == 4
    assert metrics["rewards/b/std"] == pytest.approx(math.sqrt(60 / 8))


def test_a_group_without_verdicts_has_no_deviation():
    totals = torch.tensor([1.0, 3.0, NAN, NAN])
    metrics = reward_metrics(Scores.single("a", totals), 2)
    assert metrics["reward_std"].item() == pytest.approx(math.sqrt(2))


def test_parity_metrics():
    sampled = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    replayed = torch.tensor([[-1.0, -2.5], [-2.8, -4.0]])
    metrics = {name: value.item() for name, value in parity_metrics(sampled, replayed).items()}
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.7 / 4)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.5)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(math.exp(-0.5))
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(0.2))


def test_micro_batches_merge_by_share_and_extremes_as_extremes():
    metrics: dict[str, torch.Tensor] = {}
    for share, value in ((0.25, 4.0), (0.75, -8.0)):
        names = ("entropy", "clip_ratio/high_max", "clip_ratio/low_min")
        merge_metrics(metrics, {name: torch.tensor(value) for name in names}, share)
    assert {name: value.item() for name, value in metrics.items()} == {
        "entropy": -5.0,
        "clip_ratio/high_max": 4.0,
        "clip_ratio/low_min": -8.0,
    }


@pytest.mark.parametrize(("platform", "bytes_each"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_gigabytes_of_1e9_bytes(monkeypatch, platform, bytes_each):
    usage = SimpleNamespace(ru_maxrss=3_000_000)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    monkeypatch.setattr("sys.platform", platform)
    peak = peak_memory_gb(torch.device("cpu"))
    assert peak == pytest.approx(3_000_000 * bytes_each / 1e9)


def test_peak_memory_of_this_process_is_plausible():
    assert 0.1 < peak_memory_gb(torch.device("cpu")) < 100  # torch alone takes 0.2
