"""The clock's order and arithmetic, and a peak that is known beforehand."""

import sys

import pytest
import torch

from cotgen_pl.bench import measuring
from cotgen_pl.bench.measuring import (
    Timing,
    copy_bandwidth,
    matrix_rate,
    peak_bytes,
    reset_peak,
    time_alternately,
)

CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def clock(monkeypatch):
    """A clock that candidates move by themselves."""
    state = {"now": 0.0}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: state["now"])
    return state


@on_linux
def test_candidates_alternate_and_warm_up_once(clock):
    calls = []

    def candidate(name, seconds):
        def run():
            calls.append(name)
            clock["now"] += seconds[calls.count(name) - 1]

        return run

    runs = {"a": candidate("a", [9.0, 1.0, 4.0, 2.0]), "b": candidate("b", [8.0, 3.0, 3.0, 3.0])}
    timings = time_alternately(runs, 3, CPU)
    assert "".join(calls) == "ab" * 4
    assert (timings["a"].warm_up, timings["b"].warm_up) == (9, 8)
    assert timings["a"].seconds == [1, 4, 2]
    assert timings["a"].median == 2
    assert timings["a"].spread == (1, 4)


def test_median_of_an_even_number_lies_between():
    assert Timing(0.0, [1.0, 2.0, 4.0, 9.0]).median == 3


@on_linux
def test_peak_is_that_of_the_phase():
    reset_peak(CPU)
    before, _ = peak_bytes(CPU)
    held = torch.ones(50_000_000)  # 200 MB
    during, reserved = peak_bytes(CPU)
    del held
    assert 190e6 < during - before < 260e6
    assert reserved == during
    later, _ = peak_bytes(CPU)
    assert later == pytest.approx(during, abs=5e6), "a peak outlives what made it"
    reset_peak(CPU)
    assert peak_bytes(CPU)[0] < during - 150e6, "and ends with its phase"


def test_memory_of_a_process_needs_linux(monkeypatch):
    monkeypatch.setattr(measuring.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="expected Linux for the memory of a process, got darwin"):
        reset_peak(CPU)


def test_probes_divide_by_the_fastest_run(monkeypatch):
    monkeypatch.setattr(measuring, "_fastest", lambda run, device: 0.5)
    monkeypatch.setitem(measuring.COPY_BYTES, "cpu", 1000)
    monkeypatch.setitem(measuring.MATRIX_SIDES, "cpu", 10)
    assert copy_bandwidth(CPU) == 2 * 1000 / 0.5
    assert matrix_rate(CPU, torch.float32) == 2 * 10**3 / 0.5


def test_fastest_takes_the_least_of_several(clock):
    steps = iter([100.0, 0.2, 0.1, 0.3])

    def run():
        clock["now"] += next(steps)

    assert measuring._fastest(run, CPU) == pytest.approx(0.1)
