"""What every policy family must prove; a family's test class inherits from `PolicyEquivalence`."""

import pytest
import torch

from cotgen_pl.interfaces import Policy
from cotgen_pl.sampling import forced_logits, sample_tokens

PROMPTS = ["a red circle", "a photo of a blue square and a striped cross", "two"]
COPIES = 2


def random_tokens(policy: Policy, num_images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (num_images, policy.num_tokens)
    return torch.randint(policy.codebook_size, shape, generator=generator)


@torch.no_grad()
def stepped_logits(policy: Policy, prompts, tokens, *, guided: bool, copies: int):
    """Logits of given tokens by cached decoding, [R, T, V]."""
    logits, cache = policy.prefill(prompts, guided=guided, copies=copies)
    steps = [logits]
    for column in tokens[:, :-1].T:
        steps.append(policy.step(column, cache))
    return torch.stack(steps, 1)


def repeated(prompts, copies=COPIES):
    return [prompt for prompt in prompts for _ in range(copies)]


class PolicyEquivalence:
    """Needs a fixture `exact`: a loaded policy in float64."""

    tolerance = 1e-9  # float64: what differs is the order of sums

    @pytest.fixture
    def exact(self) -> Policy:
        raise NotImplementedError("give a loaded policy in float64")

    @pytest.mark.parametrize("guided", [False, True])
    def test_cached_stepping_matches_teacher_forcing(self, exact, guided):
        tokens = random_tokens(exact, len(PROMPTS) * COPIES)
        stepped = stepped_logits(exact, PROMPTS, tokens, guided=guided, copies=COPIES)
        with torch.no_grad():
            forced = exact.logits(repeated(PROMPTS), tokens)
            if guided:
                dropped = exact.logits(repeated(PROMPTS), tokens, unconditional=True)
                forced = torch.cat([forced, dropped])
        assert stepped.shape == (len(forced), exact.num_tokens, exact.codebook_size)
        assert stepped.dtype == torch.float64
        assert (stepped - forced).abs().max() < self.tolerance

    @pytest.mark.parametrize("unconditional", [False, True])
    @torch.no_grad()
    def test_logits_do_not_depend_on_padding(self, exact, unconditional):
        tokens = random_tokens(exact, len(PROMPTS))
        batch = exact.logits(PROMPTS, tokens, unconditional)
        for row, prompt in enumerate(PROMPTS):
            alone = exact.logits([prompt], tokens[row : row + 1], unconditional)
            assert (batch[row] - alone[0]).abs().max() < self.tolerance

    @torch.no_grad()
    def test_stepping_does_not_depend_on_padding(self, exact):
        tokens, count = random_tokens(exact, len(PROMPTS)), len(PROMPTS)
        batch = stepped_logits(exact, PROMPTS, tokens, guided=True, copies=1)
        for row, prompt in enumerate(PROMPTS):
            own = tokens[row : row + 1]
            alone = stepped_logits(exact, [prompt], own, guided=True, copies=1)
            assert (batch[[row, count + row]] - alone).abs().max() < self.tolerance

    @torch.no_grad()
    def test_unconditional_rows_can_be_marked(self, exact):
        tokens = random_tokens(exact, 3)
        marked = exact.logits(PROMPTS, tokens, torch.tensor([False, True, False]))
        kept, dropped = exact.logits(PROMPTS, tokens), exact.logits(PROMPTS, tokens, True)
        assert (marked[[0, 2]] - kept[[0, 2]]).abs().max() < self.tolerance
        assert (marked[1] - dropped[1]).abs().max() < self.tolerance
        assert (kept[1] - dropped[1]).abs().max() > 1e-3

    def test_conditions_and_tokens_matter(self, exact):
        tokens = random_tokens(exact, 1).repeat(2, 1)
        with torch.no_grad():
            logits = exact.logits(["a red circle", "a blue cross"], tokens)
            changed = tokens.clone()
            changed[:, 3] = (tokens[:, 3] + 1) % exact.codebook_size
            moved = exact.logits(["a red circle", "a blue cross"], changed) - logits
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        assert moved[:, :4].abs().max() < self.tolerance, (
            "a token must not see itself or what follows"
        )
        assert moved[:, 4:].abs().amax((0, 2)).min() > 1e-6, "a token must see all before it"

    @pytest.mark.parametrize("guidance", [1.0, 4.0])
    @torch.no_grad()
    def test_sampled_logprobs_are_those_of_teacher_forcing(self, exact, guidance):
        seeds = list(range(len(PROMPTS) * COPIES))
        tokens, logprobs = sample_tokens(
            exact, PROMPTS, guidance=guidance, temperature=0.7, seeds=seeds
        )
        forced = forced_logits(exact, repeated(PROMPTS), tokens, guidance=guidance) / 0.7
        expected = forced.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        assert (logprobs - expected).abs().max() < self.tolerance

    def test_images_do_not_depend_on_batch_and_copies(self, exact):
        seeds = list(range(100, 100 + len(PROMPTS) * COPIES))
        together, _ = sample_tokens(exact, PROMPTS, guidance=2.0, seeds=seeds)
        for row, prompt in enumerate(PROMPTS):
            for copy in range(COPIES):
                image = row * COPIES + copy
                alone, _ = sample_tokens(exact, [prompt], guidance=2.0, seeds=[seeds[image]])
                assert alone.tolist() == together[image : image + 1].tolist()

    @torch.no_grad()
    def test_copies_of_a_prompt_start_alike(self, exact):
        logits, _ = exact.prefill([PROMPTS[0], PROMPTS[1], PROMPTS[0]], guided=False, copies=4)
        assert logits.shape == (12, exact.codebook_size)
        assert torch.equal(logits[0:4], logits[8:12])
        assert not torch.equal(logits[0], logits[4])

    def test_gradient_reaches_every_trainable_weight(self, exact):
        tokens = random_tokens(exact, 2)
        exact.zero_grad(set_to_none=True)
        logits = exact.logits(PROMPTS[:2], tokens)
        logits.log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()
        trained = [p for p in exact.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        assert all(p.grad is None for p in exact.parameters() if not p.requires_grad)
        exact.zero_grad(set_to_none=True)

    def test_pictures_and_tokens_have_their_shapes_and_ranges(self, exact):
        tokens = random_tokens(exact, 3)
        images = exact.decode(tokens)
        assert images.shape[:2] == (3, 3)
        assert images.shape[2] == images.shape[3]
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        read = exact.encode(images)
        assert read.shape == tokens.shape
        assert read.dtype == torch.int64
        assert 0 <= read.min() <= read.max() < exact.codebook_size

    def test_pictures_do_not_depend_on_the_batch(self, exact):
        tokens = random_tokens(exact, 3)
        images = exact.decode(tokens)
        assert (exact.decode(tokens[1:2]) - images[1:2]).abs().max() < 1e-6
        assert torch.equal(exact.encode(images)[1:2], exact.encode(images[1:2]))

    @torch.no_grad()
    def test_reference_keeps_the_weights_of_its_moment(self, exact):
        tokens = random_tokens(exact, 2)
        reference, start = exact.reference(), exact.logits(PROMPTS[:2], tokens)
        trained = [p for p in exact.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        try:
            for parameter in trained:
                parameter.add_(0.05)
            assert (exact.logits(PROMPTS[:2], tokens) - start).abs().max() > 1e-3
            assert torch.equal(reference.logits(PROMPTS[:2], tokens), start)
        finally:
            for parameter, values in zip(trained, before, strict=True):
                parameter.copy_(values)
