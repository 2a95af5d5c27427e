"""The fused decoder against transformers' layers, on the policy that draws with it."""

import copy
import warnings

import pytest
import torch
from torch import nn

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.decoding.fused import FusedDrawing
from cotgen_pl.decoding.graphs import StepRecorder
from cotgen_pl.decoding.settings import DecodingSettings
from cotgen_pl.decoding.weights import rotation_order, why_unreadable
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.sampling import sample_tokens
from tests.decoding.test_graphs import Recorder, refuse

PROMPTS = ["three green circles", "a striped red circle on the left of a plain blue square", "two"]
EAGER = DecodingSettings(path="eager")
BUCKETS = DecodingSettings(buckets=(24, 40, 96))


def load(folder, **arguments):
    torch.manual_seed(0)  # fresh adapters are random
    return JanusPolicy(str(folder), **arguments).load()


@torch.no_grad()
def perturb(policy):
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return policy


def draw(policy, decoding, guidance=5.0, copies=4):
    policy.decoding = decoding
    return sample_tokens(policy, PROMPTS, guidance=guidance, seeds=range(3 * copies))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("decoding", [DecodingSettings(), BUCKETS], ids=["exact", "buckets"])
def test_tokens_are_those_of_the_eager_path(shipped_folder, decoding, guidance):
    policy = load(shipped_folder)
    expected, logprobs = draw(policy, EAGER, guidance)
    tokens, own = draw(policy, decoding, guidance)
    assert expected.unique().numel() > 5
    assert torch.equal(tokens, expected)
    assert (own - logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("learnt", [False, True])
def test_adapters_are_read(janus_folder, learnt):
    policy = load(janus_folder, lora=LoraSettings(rank=4, alpha=8))
    base, _ = draw(load(janus_folder), EAGER)
    if learnt:
        perturb(policy)
    expected, _ = draw(policy, EAGER)
    assert torch.equal(draw(policy, DecodingSettings())[0], expected)
    assert torch.equal(expected, base) is not learnt


def test_reference_of_a_lora_policy_draws_as_it_was(janus_folder):
    policy = load(janus_folder, lora=LoraSettings(rank=4, alpha=8))
    start, _ = draw(policy, DecodingSettings())
    reference = policy.reference()
    assert not torch.equal(draw(perturb(policy), DecodingSettings())[0], start)
    tokens, _ = sample_tokens(reference, PROMPTS, guidance=5.0, seeds=range(12))
    assert torch.equal(tokens, start)


def test_an_optimizer_step_is_seen_by_the_next_batch(shipped_folder):
    policy = load(shipped_folder, trains="both")
    before, _ = draw(policy, DecodingSettings())
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    logits = policy.logits(PROMPTS, before[::4])
    logits.log_softmax(-1).gather(-1, before[::4, :, None]).mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    after, _ = draw(policy, DecodingSettings())
    assert not torch.equal(after, before)
    assert torch.equal(after, draw(policy, EAGER)[0])


def test_weights_that_only_their_data_changes_are_seen(shipped_folder):
    policy = load(shipped_folder)
    before, _ = draw(policy, DecodingSettings())
    policy.janus.model.language_model.norm.weight.data.mul_(-1)  # raises no version counter
    assert not torch.equal(draw(policy, DecodingSettings())[0], before)


@pytest.mark.parametrize("arguments", [{"dtype": "bfloat16", "trains": "generation"}, {}], ids=str)
@torch.no_grad()
def test_bfloat16_stays_as_near_as_the_eager_path(shipped_folder, arguments):
    exact = load(shipped_folder, dtype="float64")
    policy = load(shipped_folder, **arguments)
    tokens, _ = draw(exact, EAGER)
    errors = []
    for decoding in (EAGER, DecodingSettings()):
        policy.decoding = exact.decoding = decoding
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append(forced_logprobs(policy, tokens) - forced_logprobs(exact, tokens))
    eager, fused = (error.abs().quantile(0.99).item() for error in errors)
    assert fused < 1.5 * eager
    assert fused < 0.05


def forced_logprobs(policy, tokens):
    """Log-probs of given tokens by cached stepping, [B, T]."""
    logits, cache = policy.prefill(PROMPTS, guided=False, copies=4)
    steps = [logits]
    steps += [policy.step(column, cache) for column in tokens[:, :-1].T]
    logprobs = torch.stack(steps, 1).double().log_softmax(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0]


@torch.no_grad()
def test_a_step_run_twice_gives_the_same_twice(janus_folder):
    policy = load(janus_folder, dtype="float64", decoding=BUCKETS)
    _, drawing = policy.prefill(PROMPTS, guided=True, copies=2)
    first = drawing.step(torch.arange(6))
    state = copy.deepcopy(drawing.memory)
    assert torch.equal(drawing.run(96), first)
    for (name, own), (_, other) in zip(tensors_of(drawing.memory), tensors_of(state), strict=True):
        assert torch.equal(own, other), name


def record_with(monkeypatch, capture):
    """Have steps captured on a CPU."""
    recorder = StepRecorder(capture)
    monkeypatch.setattr("cotgen_pl.decoding.fused.step_recorder", lambda device: recorder)


def tensors_of(memory):
    """All that a batch remembers, by name."""
    for name, value in vars(memory).items():
        parts = value if isinstance(value, list) else [value]
        yield from ((f"{name}[{number}]", part) for number, part in enumerate(parts))


@torch.no_grad()
def test_a_captured_step_reads_nothing_that_moves(janus_folder, monkeypatch):
    # A graph keeps the addresses of its first run.
    policy = load(janus_folder, decoding=BUCKETS)
    expected, _ = draw(policy, BUCKETS)
    record_with(monkeypatch, Recorder())
    logits, drawing = policy.prefill(PROMPTS, guided=True, copies=4)
    before = [tensor.data_ptr() for _, tensor in tensors_of(drawing.memory)]
    for column in expected[:, :-1].T:
        logits = drawing.step(column)
    assert [tensor.data_ptr() for _, tensor in tensors_of(drawing.memory)] == before
    policy.decoding = EAGER
    other, cache = policy.prefill(PROMPTS, guided=True, copies=4)
    for column in expected[:, :-1].T:
        other = policy.step(column, cache)
    assert (logits - other).abs().max() < 1e-4


@torch.no_grad()
def test_capturing_leaves_nothing_in_the_memory(janus_folder, monkeypatch):
    policy = load(janus_folder, decoding=BUCKETS)
    expected, plain = policy.prefill(PROMPTS, guided=True, copies=2)
    capture = Recorder()
    record_with(monkeypatch, capture)
    logits, drawing = policy.prefill(PROMPTS, guided=True, copies=2)
    assert capture.captures
    assert torch.equal(logits, expected)
    for (name, own), (_, other) in zip(
        tensors_of(drawing.memory), tensors_of(plain.memory), strict=True
    ):
        assert torch.equal(own, other), name


def test_all_lengths_of_a_batch_are_captured_before_its_first_step(shipped_folder, monkeypatch):
    policy = load(shipped_folder)
    expected, _ = draw(policy, EAGER)
    capture = Recorder()
    record_with(monkeypatch, capture)
    policy.decoding = BUCKETS
    _, drawing = policy.prefill(PROMPTS, guided=True)
    filled = range(drawing.filled + 1, drawing.filled + policy.num_tokens)
    needed = sorted({next(size for size in (24, 40, 96) if size >= each) for each in filled})
    assert len(needed) > 1 and capture.captures == needed
    for _ in range(2):
        assert torch.equal(draw(policy, BUCKETS)[0], expected)
    assert capture.captures == 3 * needed


def test_after_a_failed_capture_the_same_is_drawn_with_one_warning(shipped_folder, monkeypatch):
    policy = load(shipped_folder)
    expected, _ = draw(policy, EAGER)
    record_with(monkeypatch, refuse)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tokens = [draw(policy, BUCKETS)[0] for _ in range(2)]
    assert [torch.equal(each, expected) for each in tokens] == [True, True]
    assert len([each for each in seen if "could not be captured" in str(each.message)]) == 1


@pytest.mark.parametrize("path", ["fused", "eager"])
def test_other_paths_capture_nothing(janus_folder, monkeypatch, path):
    capture = Recorder()
    record_with(monkeypatch, capture)
    draw(load(janus_folder), DecodingSettings(path=path))
    assert capture.captures == []


def test_pairs_of_a_rotation_stand_side_by_side():
    rows = torch.arange(12)[:, None]  # two heads of width 6
    assert rotation_order(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_a_prompt_longer_than_the_buckets_is_refused_before_weights_load(janus_folder):
    policy = JanusPolicy(str(janus_folder), decoding=DecodingSettings(buckets=(16, 24)))
    with pytest.raises(ValueError, match=r"expected decoding.buckets to reach \d+ .*\[16, 24\]"):
        policy.check_prompts(PROMPTS)


def quantised(policy):
    return load(policy.path, lora=LoraSettings(), quantize="4bit")


def unusual(policy):
    class Doubled(nn.Linear):
        pass

    attention = policy.janus.model.language_model.layers[1].self_attn
    attention.k_proj.__class__ = Doubled
    return policy


@pytest.mark.parametrize(("change", "reason"), [(quantised, "quantised"), (unusual, "a Doubled")])
def test_what_cannot_be_read_is_drawn_eagerly_with_one_warning(janus_folder, change, reason):
    policy = change(load(janus_folder))
    expected, _ = draw(policy, EAGER)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        tokens = [draw(policy, DecodingSettings())[0] for _ in range(2)]
    assert [torch.equal(each, expected) for each in tokens] == [True, True]
    [warning] = [str(each.message) for each in seen if "drawn through" in str(each.message)]
    assert reason in warning
    with pytest.raises(ValueError, match=reason):
        draw(policy, DecodingSettings(strict=True))


def test_sharded_weights_are_not_read(janus_folder, monkeypatch):
    class Sharded(nn.Parameter):
        pass

    policy = load(janus_folder)
    monkeypatch.setattr("torch.distributed.tensor.DTensor", Sharded)
    body = policy.janus.model.language_model
    assert why_unreadable(body) is None
    projection = body.layers[0].mlp.up_proj
    projection.weight = Sharded(projection.weight.detach())
    assert "layers.0.mlp.up_proj is sharded" in why_unreadable(body)


def test_the_fused_path_is_the_one_that_draws(janus_folder):
    policy = load(janus_folder)
    assert isinstance(policy.prefill(PROMPTS, guided=True)[1], FusedDrawing)
