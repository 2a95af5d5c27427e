import math
from collections import Counter

import pytest
import torch

from cotgen_pl.interfaces import Policy, Prompt
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.sampling import (
    check_guidance,
    forced_logits,
    guide,
    keep_likeliest,
    noise_seed,
    sample_tokens,
    uniform_noise,
)

CODES = 6


class TablePolicy(Policy):
    """Reads its logits from tables: [T, V] for each prompt, [T, V] without one, [V, V] for the
    influence of the last token."""

    def __init__(self, conditional, unconditional=None, influence=None):
        super().__init__()
        table = next(iter(conditional.values()))
        self.num_tokens, self.codebook_size = table.shape
        self.conditional = conditional
        self.unconditional = torch.zeros_like(table) if unconditional is None else unconditional
        codes = self.codebook_size
        self.influence = torch.zeros(codes, codes) if influence is None else influence
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.rows_read: list[int] = []

    def load(self):
        return self

    def prefill(self, prompts, *, guided, copies=1):
        self.rows_read.append(len(prompts))
        tables = [self.conditional[prompt] for prompt in prompts for _ in range(copies)]
        tables += [self.unconditional] * (len(tables) if guided else 0)
        cache = {"tables": torch.stack(tables), "position": 0}
        return cache["tables"][:, 0], cache

    def step(self, tokens, cache):
        cache["position"] += 1
        rows = cache["tables"][:, cache["position"]]
        return rows + self.influence[tokens].repeat(len(rows) // len(tokens), 1)

    def logits(self, prompts, tokens, unconditional=False):
        tables = [self.unconditional if unconditional else self.conditional[p] for p in prompts]
        before = torch.zeros(len(tokens), self.num_tokens, self.codebook_size)
        before[:, 1:] = self.influence[tokens[:, :-1]]
        return (torch.stack(tables) + before) * self.scale

    def decode(self, tokens):
        raise NotImplementedError

    def encode(self, images):
        raise NotImplementedError

    def reference(self):
        raise NotImplementedError

    def blocks(self):
        return []

    def export(self, folder, *, merge_adapters=True):
        raise NotImplementedError


@pytest.fixture
def policy():
    torch.manual_seed(1)
    tables = {name: torch.randn(4, CODES) for name in ("red", "blue")}
    return TablePolicy(tables, torch.randn(4, CODES), torch.randn(CODES, CODES))


def flat(num_tokens, codes):
    return TablePolicy({"any": torch.zeros(num_tokens, codes)})


def test_guidance_by_hand():
    conditional, unconditional = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    assert guide(conditional, unconditional, 1.5).tolist() == [2.5, -3.0]
    assert guide(conditional, unconditional, 1.0).tolist() == [2.0, -1.0]


def test_guidance_computes_in_float32():
    conditional = torch.tensor([10.0625]).bfloat16()
    unconditional = torch.tensor([10.0]).bfloat16()
    guided = guide(conditional, unconditional, 1.5)
    assert guided.dtype == torch.float32
    assert guided.item() == 10.09375
    assert guided.bfloat16().item() != 10.09375, "the example must need more than bfloat16"
    assert guide(conditional.double(), unconditional.double(), 5.0).dtype == torch.float64


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_logprobs_are_those_of_the_guided_and_tempered_distribution(policy, guidance):
    tokens, logprobs = sample_tokens(
        policy, ["red", "blue"], guidance=guidance, temperature=0.5, seeds=range(6)
    )
    assert tokens.shape == logprobs.shape == (6, 4)
    assert tokens.dtype == torch.int64
    assert logprobs.dtype == torch.float32
    for image, prompt in enumerate(["red"] * 3 + ["blue"] * 3):
        before = torch.zeros(CODES)
        for position, token in enumerate(tokens[image].tolist()):
            conditional = policy.conditional[prompt][position] + before
            unconditional = policy.unconditional[position] + before
            mixed = unconditional + guidance * (conditional - unconditional)
            expected = math.log((mixed / 0.5).softmax(-1)[token].item())
            assert logprobs[image, position].item() == pytest.approx(expected, abs=1e-5)
            before = policy.influence[token]


def test_no_guidance_reads_no_unconditional_rows(policy):
    sizes = []
    step = policy.step
    policy.step = lambda tokens, cache: sizes.append(len(cache["tables"])) or step(tokens, cache)
    sample_tokens(policy, ["red"], guidance=1.0, seeds=range(5))
    sample_tokens(policy, ["red"], guidance=2.0, seeds=range(5))
    assert sizes == [5] * 3 + [10] * 3


def test_prompts_go_to_the_policy_once_however_many_copies(policy):
    sample_tokens(policy, ["red", "blue"], guidance=2.0, seeds=range(8))
    assert policy.rows_read == [2]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_forced_logits_are_those_sampled(policy, guidance):
    tokens, logprobs = sample_tokens(policy, ["red", "blue"], guidance=guidance, seeds=[5, 6])
    logits = forced_logits(policy, ["red", "blue"], tokens, guidance=guidance)
    forced = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (forced - logprobs).abs().max() < 1e-5


def test_forced_modes_differ_in_value_and_gradient_as_named(policy):
    tokens, _ = sample_tokens(policy, ["red"], guidance=3.0, seeds=[5])
    values, slopes = {}, {}
    for mode in ("guided", "guided_detached", "conditional"):
        values[mode] = forced_logits(policy, ["red"], tokens, guidance=3.0, mode=mode)
        (slopes[mode],) = torch.autograd.grad(values[mode].sum(), policy.scale)
    conditional = policy.logits(["red"], tokens).sum()
    unconditional = policy.logits(["red"], tokens, unconditional=True).sum()
    assert torch.equal(values["guided"], values["guided_detached"])
    assert torch.equal(values["conditional"], policy.logits(["red"], tokens))
    # The scale is 1, so the slope of a sum of logits is that sum itself.
    assert slopes["guided"].item() == pytest.approx(
        (3 * conditional - 2 * unconditional).item(), rel=1e-4
    )
    assert slopes["guided_detached"].item() == pytest.approx(3 * conditional.item(), rel=1e-4)
    assert slopes["conditional"].item() == pytest.approx(conditional.item(), rel=1e-4)


def test_forced_logits_keep_the_callers_gradient_setting(policy):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert not forced_logits(policy, ["red"], tokens, guidance=3.0).requires_grad
    assert torch.is_grad_enabled()


def test_flat_logits_use_the_whole_codebook():
    tokens, logprobs = sample_tokens(flat(4, 200), ["any"], guidance=5.0, seeds=range(500))
    assert tokens.unique().numel() == 200
    assert logprobs.numpy() == pytest.approx(-math.log(200), abs=1e-5)


def test_drawn_shares_match_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    logits = probabilities.log()[None].expand(20, -1)
    tokens, _ = sample_tokens(
        TablePolicy({"any": logits}), ["any"], guidance=1.0, seeds=range(1000)
    )
    counts = torch.bincount(tokens.flatten(), minlength=5)
    expected = probabilities[:4] * 20_000
    chi_square = ((counts[:4] - expected) ** 2 / expected).sum()
    assert counts[4] == 0
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in 1,000 correct samplers


def test_successive_tokens_are_independent():
    tokens, _ = sample_tokens(flat(2, 2), ["any"], guidance=1.0, seeds=range(4000))
    pairs = Counter(map(tuple, tokens.tolist()))
    assert all(abs(pairs[first, second] - 1000) < 110 for first in (0, 1) for second in (0, 1))


def test_the_ends_of_the_noise_draw_tokens_of_non_zero_probability(monkeypatch):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([[0.0, 1 - 2**-53]], dtype=torch.float64)
    monkeypatch.setattr("cotgen_pl.sampling.uniform_noise", lambda seeds, num_tokens: ends)
    tokens, logprobs = sample_tokens(TablePolicy({"any": logits}), ["any"], guidance=1.0, seeds=[0])
    assert tokens.tolist() == [[1, 3]]
    assert logprobs.isfinite().all()


def test_noise_belongs_to_the_image(policy):
    tokens, logprobs = sample_tokens(policy, ["red", "blue"], guidance=2.0, seeds=[7, 8, 9, 7])
    alone, own_logprobs = sample_tokens(policy, ["blue"], guidance=2.0, seeds=[9])
    assert tokens[2].tolist() == alone[0].tolist()
    assert torch.equal(logprobs[2], own_logprobs[0])
    noise = uniform_noise([7, 8, 9, 7], 4)
    assert noise.dtype == torch.float64
    assert torch.equal(noise[0], noise[3])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(uniform_noise([9], 4)[0], noise[2])


def test_sampling_leaves_the_global_random_state_alone(policy):
    before = torch.get_rng_state()
    sample_tokens(policy, ["red"], guidance=2.0, seeds=[1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_the_same_on_every_machine():
    assert noise_seed(0, "rollout", 0, 1, 2, 3) == 2170527867205338030
    keys = [(run, kind, i) for run in range(20) for kind in ("rollout", "pairs") for i in range(50)]
    seeds = {noise_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(1, 23) != noise_seed(12, 3) != noise_seed("12", 3)


@pytest.fixture
def module():
    return PolicyModule(flat(4, 1000), guidance=2.0, seed=3)


PROMPTS = [Prompt("any", index=4), Prompt("any", index=9)]


def test_copies_are_a_prefix_of_more_copies(module):
    few, _ = module.draw(PROMPTS, 2, "rollout")
    many, _ = module.draw(PROMPTS, 4, "rollout")
    rest, _ = module.draw(PROMPTS, 2, "rollout", first_copy=2)
    assert few.tolist() == many[[0, 1, 4, 5]].tolist()
    assert rest.tolist() == many[[2, 3, 6, 7]].tolist()
    assert len({tuple(row) for row in many.tolist()}) == 8


def test_every_part_of_the_noise_key_counts(module):
    def draw(prompt=PROMPTS[0], stream="rollout", **changes):
        for name, value in changes.items():
            setattr(module, name, value)
        return tuple(module.draw([prompt], 1, stream)[0][0].tolist())

    start = draw()
    assert draw() == start
    drawn = [start, draw(stream="evaluation"), draw(Prompt("any", index=5))]
    drawn += [draw(Prompt("any", index=4, occurrence=1)), draw(rollouts=1), draw(seed=4)]
    assert len(set(drawn)) == 6
    assert draw(stream="evaluation", rollouts=0) == draw(stream="evaluation", rollouts=7)


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, -1.0, 2.0]])
    tokens, logprobs = sample_tokens(
        TablePolicy({"any": logits}), ["any"], guidance=1.0, seeds=range(20), top_k=1
    )
    assert tokens.tolist() == [[1, 0]] * 20
    assert logprobs.abs().max() == 0


def test_filters_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(**filters):
        return keep_likeliest(logits, **filters).isfinite()[0].nonzero()[:, 0].tolist()

    assert kept() == kept(top_k=4) == kept(top_k=9) == kept(top_p=1.0) == [0, 1, 2, 3]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.05) == kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.71) == [1, 2, 3]
    # Of the two kept by top-k, token 1 alone has 4/7 of the probability.
    assert kept(top_k=2, top_p=0.57) == [1]
    assert kept(top_k=2, top_p=0.58) == [1, 3]


def test_filters_keep_the_logits_and_break_ties_downwards():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 5.0, 1.0, 5.0]])
    expected = [[1.0, 1.0, -math.inf, -math.inf], [-math.inf, 5.0, -math.inf, 5.0]]
    assert keep_likeliest(logits, top_k=2).tolist() == expected


def test_top_p_of_one_keeps_the_tail():
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 18.0  # in float32 the tail adds up to less than one rounding
    assert keep_likeliest(logits, top_p=1.0).isfinite().all()


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}])
def test_logprobs_are_those_of_the_filtered_distribution(filters):
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    policy = TablePolicy({"any": logits})
    tokens, logprobs = sample_tokens(policy, ["any"], guidance=1.0, seeds=range(200), **filters)
    assert set(tokens.flatten().tolist()) == {1, 3}
    for token, share in ((1, 4 / 7), (3, 3 / 7)):
        assert logprobs[tokens == token].numpy() == pytest.approx(math.log(share), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 0.5}, r"guidance of 1 \(none\) or more, got 0.5"),
        ({"guidance": math.nan}, "guidance of 1"),
        ({"temperature": 0.0}, "temperature above 0, got 0.0; for greedy sampling set top_k to 1"),
        ({"temperature": -1.0}, "temperature above 0, got -1.0"),
        ({"top_k": 0}, "top_k of 1 or more, got 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\], got 1.5"),
        ({"seeds": [1, 2, 3]}, "3 seeds do not split over 2 prompts"),
        ({"seeds": []}, "0 seeds do not split over 2 prompts"),
        ({"prompts": []}, "2 seeds do not split over 0 prompts"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(policy, settings, message):
    arguments = {"prompts": ["red", "blue"], "guidance": 2.0, "seeds": [1, 2]} | settings
    with pytest.raises(ValueError, match=message):
        sample_tokens(policy, **arguments)
    assert not policy.rows_read


def test_guidance_of_one_is_allowed():
    check_guidance(1.0)
