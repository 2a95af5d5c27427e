"""Capturing without a GPU: a capture here is a function that runs the step when replayed."""

import warnings

import pytest
import torch

from cotgen_pl.decoding.graphs import CapturedSteps


class Recorder:
    """Stands for CUDA's capture: one result buffer per graph, overwritten by each replay."""

    def __init__(self):
        self.captures = 0

    def __call__(self, step):
        self.captures += 1
        result = torch.zeros(2)
        return lambda: result.copy_(step()), result


def refuse(step):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Steps:
    """Counts what is launched."""

    def __init__(self):
        self.lengths = []

    def __call__(self, length):
        self.lengths.append(length)
        return torch.tensor([length, len(self.lengths)]).float()


def test_each_length_is_captured_once_and_replayed():
    recorder = Recorder()
    run = CapturedSteps(Steps(), strict=True, capture=recorder)
    assert [run(length)[0].item() for length in (128, 128, 256, 128)] == [128, 128, 256, 128]
    assert recorder.captures == 2


def test_libraries_set_up_before_the_first_capture_only():
    steps = Steps()
    run = CapturedSteps(steps, strict=True, capture=lambda step: (lambda: None, torch.zeros(1)))
    run(128)
    run(256)
    assert steps.lengths == [128]


def test_results_outlive_the_next_replay():
    run = CapturedSteps(Steps(), strict=True, capture=Recorder())
    first = run(128)
    kept = first.clone()
    run(128)
    assert torch.equal(first, kept)


def test_a_failed_capture_warns_once_and_goes_on():
    steps = Steps()
    run = CapturedSteps(steps, strict=False, capture=refuse)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [run(length)[0].item() for length in (128, 128, 256)] == [128, 128, 256]
    [warning] = [str(each.message) for each in seen]
    assert "not permitted when stream is capturing)" in warning
    assert "20 ms per token" in warning


def test_a_failed_capture_is_an_error_if_strict():
    run = CapturedSteps(Steps(), strict=True, capture=refuse)
    with pytest.raises(ValueError, match=r"expected to capture .* 128 positions, got: operation"):
        run(128)


def test_an_error_of_the_step_itself_is_not_hidden():
    def broken(length):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        CapturedSteps(broken, strict=False, capture=Recorder())(128)
