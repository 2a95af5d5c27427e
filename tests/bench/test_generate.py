"""transformers' generate as a baseline: the same work, or one clear error."""

from importlib.metadata import version

import pytest
import torch

from cotgen_pl.bench.generate import (
    check_agreement,
    check_generates,
    generate_tokens,
)
from cotgen_pl.bench.naive import pad_left
from cotgen_pl.sampling import sample_tokens
from tests.toys import TEXTS, make_policy

generates = pytest.mark.skipif(
    version("transformers").startswith("5.17."), reason="its generate draws no Janus pictures"
)


@pytest.fixture
def policy(tiny_janus):
    return make_policy(tiny_janus).load()


def inputs_of(policy):
    rows = [policy.prompt_ids(text) for text in TEXTS]
    assert len(set(map(len, rows))) > 1, "lengths must differ"
    return policy.janus, *pad_left(rows, policy.pad, torch.device("cpu"))


@generates
def test_greedy_tokens_agree(policy):
    tokens = generate_tokens(*inputs_of(policy), 5.0, greedy=True)
    assert check_agreement(policy, TEXTS, 5.0, tokens) == 1.0


@generates
def test_samples_from_the_whole_codebook(policy):
    policy.janus.generation_config.top_k = 5  # generate's own default is 50
    for weight in policy.janus.model.generation_head.parameters():
        weight.data.mul_(0.01)  # all codes nearly alike
    drawn = [generate_tokens(*inputs_of(policy), 2.0) for _ in range(20)]
    assert torch.stack(drawn).unique().numel() > 28  # of 32, in 320 draws


def test_other_tokens_are_refused(policy):
    tokens, _ = sample_tokens(policy, TEXTS, guidance=5.0, seeds=range(4), top_k=1)
    tokens[0, 0] = (tokens[0, 0] + 1) % 32
    with pytest.raises(ValueError, match=r"got 93\.8% of them; the two do not compute the same"):
        check_agreement(policy, TEXTS, 5.0, tokens)


def test_bfloat16_is_held_to_the_likeliest_tokens(policy):
    policy.to(torch.bfloat16)
    tokens, _ = sample_tokens(policy, TEXTS, guidance=5.0, seeds=range(4), top_k=1)
    assert check_agreement(policy, TEXTS, 5.0, tokens) == 1.0
    with pytest.raises(ValueError, match=r"within 0\.2 deviations of our likeliest ones, got"):
        check_agreement(policy, TEXTS, 5.0, (tokens + 1) % 32)


def test_bfloat16_lets_ties_pass(policy):
    policy.to(torch.bfloat16)
    inner = policy.janus.model  # codes 2n and 2n + 1 become the same
    head = inner.generation_head.vision_head
    for weight in (inner.generation_embeddings.weight, head.weight, head.bias):
        weight.data[1::2] = weight.data[::2]
    tokens, _ = sample_tokens(policy, TEXTS, guidance=5.0, seeds=range(4), top_k=1)
    assert check_agreement(policy, TEXTS, 5.0, tokens ^ 1) == 0.0
    head.weight.data.zero_()
    head.bias.data.zero_()
    with pytest.raises(ValueError, match="got nan"):
        check_agreement(policy, TEXTS, 5.0, tokens + 1)


def test_broken_versions_are_named():
    class Broken:
        def generate(self, **settings):
            raise TypeError("missing 1 required positional argument: 'prefill_chunk_size'")

    with pytest.raises(ValueError, match=f"got version {version('transformers')}, which fails"):
        generate_tokens(Broken(), torch.zeros(1, 1), torch.ones(1, 1), 5.0)


def test_other_errors_of_transformers_stay():
    class Broken:
        def generate(self, **settings):
            raise TypeError("something else")

    with pytest.raises(TypeError, match="something else"):
        generate_tokens(Broken(), torch.zeros(1, 1), torch.ones(1, 1), 5.0)


def test_transformers_needs_guidance():
    check_generates(1.5)
    with pytest.raises(ValueError, match="expected guidance above 1 beside transformers' generate"):
        check_generates(1.0)
