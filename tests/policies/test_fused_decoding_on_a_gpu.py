"""CUDA graphs: tokens of captured steps, failures to capture, and what stays in memory."""

import gc
import warnings

import pytest
import torch

from cotgen_pl.decoding.graphs import step_recorder
from cotgen_pl.decoding.layers import decode_step
from cotgen_pl.decoding.settings import DecodingSettings
from tests.policies.test_fused_decoding import BUCKETS, EAGER, PROMPTS, draw, load

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STRICT = DecodingSettings(buckets=BUCKETS.buckets, strict=True)


@pytest.fixture(autouse=True)
def exact_and_fresh(monkeypatch):
    """Products in float32, not TF32, and a recorder that no test has used."""
    monkeypatch.setattr("torch.backends.cuda.matmul.allow_tf32", False)
    step_recorder.cache_clear()
    yield
    step_recorder.cache_clear()


@pytest.fixture
def policy(shipped_folder):
    return load(shipped_folder).cuda()


def test_captured_tokens_are_those_of_the_eager_path(policy):
    expected, logprobs = draw(policy, EAGER)
    for _ in range(2):
        tokens, own = draw(policy, STRICT)
        assert torch.equal(tokens, expected)
        assert (own - logprobs).abs().max() < 1e-4
    _, drawing = policy.prefill(PROMPTS, guided=True)
    assert len(drawing.run.graphs) > 1


def test_capturing_leaves_nothing_in_the_memory(policy):
    policy.decoding = STRICT
    _, drawing = policy.prefill(PROMPTS, guided=True)
    policy.decoding = DecodingSettings(path="fused", buckets=BUCKETS.buckets)
    _, plain = policy.prefill(PROMPTS, guided=True)
    for name in ("bias", "position", "tokens", "offsets"):
        assert torch.equal(getattr(drawing.memory, name), getattr(plain.memory, name)), name
    for own, other in zip(drawing.memory.keys, plain.memory.keys, strict=True):
        assert torch.equal(own, other)


def test_after_a_failed_capture_the_same_is_drawn_on_the_same_stream(policy, monkeypatch):
    expected, _ = draw(policy, EAGER)

    def waiting(network, memory, length, *, masked):
        logits = decode_step(network, memory, length, masked=masked)
        logits.sum().item()  # not permitted in a capture: it becomes invalid
        return logits

    monkeypatch.setattr("cotgen_pl.decoding.fused.decode_step", waiting)
    stream = torch.cuda.current_stream()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tokens = [draw(policy, BUCKETS)[0] for _ in range(2)]
    assert [torch.equal(each, expected) for each in tokens] == [True, True]
    assert len([each for each in seen if "could not be captured" in str(each.message)]) == 1
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    monkeypatch.setattr("cotgen_pl.decoding.fused.decode_step", decode_step)
    step_recorder.cache_clear()
    assert torch.equal(draw(policy, STRICT)[0], expected)  # what failed is no obstacle later


def test_batches_leave_no_memory_behind(policy):
    used = []
    for _ in range(20):
        draw(policy, STRICT)
        gc.collect()
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(used[5:])) == 1, used
