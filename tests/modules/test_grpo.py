"""GRPO on a tiny random Janus, in float64: what is learnt from, what is logged, what is refused."""

import math
import threading

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from cotgen_pl.interfaces import Reward, Rollout, Scores
from cotgen_pl.losses import group_advantages, token_logprobs
from cotgen_pl.modules.grpo import GRPOModule
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.ensemble import Ensemble
from cotgen_pl.scoring import Questions, ask
from tests.toys import (
    Brightness,
    Fixed,
    Snapshots,
    fit,
    make_grpo,
    make_policy,
    numbered_prompts,
    sgd,
)

EXACT = 1e-9  # float64: what differs is the order of sums
MATCHING = [("guided", 3.0), ("guided_detached", 3.0), ("guided", 1.0), ("conditional", 1.0)]


def keep_updates(module, monkeypatch) -> list[dict[str, float]]:
    """The metrics of every single update, as they come."""
    kept = []
    log = module._log_update

    def keep(metrics):
        kept.append({name: float(value) for name, value in metrics.items()})
        log(metrics)

    monkeypatch.setattr(module, "_log_update", keep)
    return kept


def rollout_of(module, prompts, tokens, logprobs) -> Rollout:
    number = len(tokens)
    repeated = [prompt for prompt in prompts for _ in range(number // len(prompts))]
    return Rollout(repeated, tokens, logprobs, {}, torch.zeros(number), torch.ones(number))


class PerCall(Reward):
    """Call k gets the k-th row of scores, and the last row from there on."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__()
        self.rows, self.calls = rows, 0

    def score(self, images, prompts):
        row = self.rows[min(self.calls, len(self.rows) - 1)]
        self.calls += 1
        return Scores.single("per_call", torch.tensor(row)[: len(images)])


class WrongShape(Reward):
    def score(self, images, prompts):
        values = torch.zeros(len(images), 1)
        return Scores(values, {"wrong": values}, {"wrong": 1.0})


# Log-probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "guidance"), MATCHING)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_replayed_ones(tiny_janus, mode, guidance, temperature):
    module = make_grpo(tiny_janus, logprobs=mode, guidance=guidance, temperature=temperature)
    module.configure_model()
    prompts = numbered_prompts(3)
    tokens, logprobs = module.draw(prompts, 4, "rollout")
    replayed = module.replay(module.policy, rollout_of(module, prompts, tokens, logprobs))
    assert logprobs.dtype == torch.float64
    assert (logprobs - replayed).abs().max() < EXACT


@pytest.mark.parametrize(("mode", "guidance"), MATCHING)
def test_ratio_is_one_and_nothing_clipped_at_the_first_update_of_each_rollout(
    tiny_janus, tmp_path, monkeypatch, mode, guidance
):
    module = make_grpo(
        tiny_janus,
        logprobs=mode,
        guidance=guidance,
        images_budget=16,
        updates_per_rollout=2,
        optimizer=sgd(30.0),
    )
    updates = keep_updates(module, monkeypatch)
    rows = fit(module, tmp_path).logger.rows
    assert len(updates) == 4
    for first in updates[::2]:
        assert abs(first["ratio/mean"] - 1) < EXACT
        assert all(first[name] == 0 for name in first if name.startswith("clip_ratio/"))
        assert first["sampling/sampling_logp_difference/max"] < EXACT
        assert abs(first["sampling/importance_sampling_ratio/min"] - 1) < EXACT
    for second in updates[1::2]:
        assert abs(second["ratio/mean"] - 1) > 1e-3
        assert second["clip_ratio/region_mean"] > 0
        # What the sampler thought is compared with the policy that sampled, not with the new one.
        assert second["sampling/sampling_logp_difference/max"] < EXACT
    assert rows[2]["train/clip_ratio/region_mean"] == pytest.approx(
        updates[3]["clip_ratio/region_mean"]
    )


def test_old_logprobs_of_several_updates_are_replayed_not_the_samplers(
    tiny_janus, tmp_path, monkeypatch
):
    def train(disturbance: float) -> dict[str, torch.Tensor]:
        module, kept = make_grpo(tiny_janus, updates_per_rollout=2), Snapshots()
        draw = module.draw

        def disturbed(*args, **kwargs):
            tokens, logprobs = draw(*args, **kwargs)
            return tokens, logprobs + disturbance

        monkeypatch.setattr(module, "draw", disturbed)
        fit(module, tmp_path, kept)
        return kept.weights[-1]

    plain, disturbed = train(0.0), train(1.0)
    assert all(torch.equal(plain[name], disturbed[name]) for name in plain)


def test_conditional_logprobs_under_guidance_are_named_a_proxy(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, logprobs="conditional", kl_coef=0.1, images_budget=16)
    module.configure_model()
    prompts = numbered_prompts(2)
    trainer = fit(module, tmp_path)
    row = trainer.logger.rows[2]
    assert "train/kl_proxy" in row and "train/kl" not in row
    assert "train/guidance_logp_gap" in row
    assert not any("sampling_logp_difference" in name for name in row)
    module.rollouts = 0
    tokens, sampled = module.draw(prompts, 4, "rollout")
    texts = [prompt.text for prompt in prompts for _ in range(4)]
    conditional = token_logprobs(module.policy.logits(texts, tokens), tokens)
    part = rollout_of(module, prompts, tokens, sampled)
    gap = module._sampling_gap(part, conditional.detach())["guidance_logp_gap"]
    assert gap.item() == pytest.approx((sampled - conditional).mean().item(), abs=EXACT)
    assert abs(gap.item()) > 1e-3


# Updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["guided", "guided_detached", "conditional"])
def test_micro_batches_make_the_same_update(tiny_janus, tmp_path, mode):
    ends, rows = [], []
    for size in (1, 3, 8):
        kept = Snapshots()
        module = make_grpo(
            tiny_janus,
            logprobs=mode,
            micro_batch_size=size,
            updates_per_rollout=2,
            kl_coef=0.1,
            entropy_coef=0.01,
            images_budget=16,
            gradient_clip=0.5,
        )
        rows.append(fit(module, tmp_path, kept).logger.rows[2])
        ends.append(kept.weights[-1])
    start = kept.weights[0]
    for name, weight in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(weight, other[name], rtol=0, atol=1e-10)
    assert any((ends[0][name] - start[name]).abs().max() > 1e-4 for name in start)
    logged = [name for name in rows[0] if name.startswith("train/")]
    assert len(logged) > 15
    for name in logged:
        assert rows[0][name] == pytest.approx(rows[2][name], abs=1e-8, nan_ok=True), name
        assert rows[1][name] == pytest.approx(rows[2][name], abs=1e-8, nan_ok=True), name


def test_groups_drawn_one_by_one_make_the_same_rollout(tiny_janus, monkeypatch):
    rollouts, drawn = [], []
    draw = GRPOModule.draw

    def counted(module, prompts, *arguments):
        drawn.append(len(prompts))
        return draw(module, prompts, *arguments)

    monkeypatch.setattr(GRPOModule, "draw", counted)
    for at_once in (None, 4, 8):
        module = make_grpo(
            tiny_janus, images_per_update=12, images_budget=12, drawn_at_once=at_once
        )
        module.configure_model()
        asked = Questions(module.reward, None)
        drawn_then = module._draw_pictures(numbered_prompts(3), 0, asked)
        rollouts.append((*drawn_then, torch.cat(asked.images)))
    assert drawn == [3, 1, 1, 1, 2, 1]
    for other in rollouts[1:]:
        assert torch.equal(other[0], rollouts[0][0])
        torch.testing.assert_close(other[1:], rollouts[0][1:])


def test_parts_are_scored_while_the_next_is_drawn(tiny_janus, tmp_path, monkeypatch):
    events = []

    class Noted(Brightness):
        def score(self, images, prompts):
            scored.wait(10)  # until the next part is being drawn
            events.append(("scored", len(images)))
            return super().score(images, prompts)

    draw, scored = GRPOModule.draw, threading.Event()

    def noted(module, prompts, *arguments, **settings):
        if events:
            scored.set()
        events.append(("drawn", len(prompts)))
        return draw(module, prompts, *arguments, **settings)

    monkeypatch.setattr(GRPOModule, "draw", noted)
    module = make_grpo(tiny_janus, Noted(), drawn_at_once=4, scores_while_drawing=True)
    fit(module, tmp_path)
    assert scored.is_set() and events[0] == ("drawn", 1)
    assert ("drawn", 1) in events[1:3] and "scored" in {events[1][0], events[2][0]}
    assert events[3] == ("scored", 4)


def test_scoring_while_drawing_changes_no_number(tiny_janus, tmp_path):
    rows = []
    for overlaps in (False, True):
        module = make_grpo(tiny_janus, Brightness(), drawn_at_once=4, scores_while_drawing=overlaps)
        rows.append(fit(module, tmp_path).logger.rows[1])
    clocks = ("perf/", "train/skipped")
    plain, overlapped = (
        {name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows
    )
    assert plain == overlapped and plain["train/reward"] > 0
    assert {name for name in rows[0] if "reward" in name} == {
        name for name in rows[1] if "reward" in name
    }


def test_a_reward_that_fails_behind_the_drawing_stops_the_run(tiny_janus, tmp_path):
    class Failing(Reward):
        def score(self, images, prompts):
            raise ValueError("no answer")

    module = make_grpo(tiny_janus, Failing(), drawn_at_once=4, scores_while_drawing=True)
    with pytest.raises(ValueError, match="no answer"):
        fit(module, tmp_path)


def test_gradients_do_not_wait_out_the_next_rollout(tiny_janus, tmp_path, monkeypatch):
    held = []
    collect = GRPOModule.collect

    def watched(module, prompts):
        held.append([name for name, p in module.policy.named_parameters() if p.grad is not None])
        return collect(module, prompts)

    monkeypatch.setattr(GRPOModule, "collect", watched)
    module = make_grpo(tiny_janus, images_budget=16)
    row = fit(module, tmp_path).logger.rows[2]
    assert held == [[], []] and row["train/grad_norm"] > 0


def test_brighter_pictures_become_likelier(tiny_janus, tmp_path):
    module = make_grpo(
        tiny_janus,
        images_budget=640,
        images_per_update=32,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2),
    )
    rows = fit(module, tmp_path).logger.rows
    rewards = [rows[step]["train/reward"] for step in range(1, 21)]
    deviation = rows[1]["train/rewards/all/std"]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + deviation / 2


def test_entropy_bonus_raises_entropy(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Fixed([0.0]), entropy_coef=1.0, images_budget=80)
    rows = fit(module, tmp_path).logger.rows
    assert rows[10]["train/entropy"] > rows[1]["train/entropy"]


def test_schedule_steps_once_per_optimizer_step(tiny_janus, tmp_path, monkeypatch):
    module = make_grpo(
        tiny_janus,
        updates_per_rollout=2,
        images_budget=16,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    )
    updates = keep_updates(module, monkeypatch)
    trainer = fit(module, tmp_path)
    assert [u["learning_rate"] for u in updates] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert trainer.global_step == 4
    assert trainer.logger.rows[2]["train/learning_rate"] == pytest.approx(0.0125)


def test_gradient_norm_is_logged_before_clipping_and_bounds_the_step(tiny_janus, tmp_path):
    kept = Snapshots()
    module = make_grpo(tiny_janus, gradient_clip=1e-3, optimizer=sgd(1.0))
    row = fit(module, tmp_path, kept).logger.rows[1]
    assert row["train/grad_norm"] > 1e-2
    first, last = kept.weights
    moved = sum((last[name] - first[name]).square().sum() for name in first).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_what_is_frozen_stays_untouched(tiny_janus, tmp_path):
    start = make_policy(tiny_janus).load().state_dict()
    for trains, parts in {"language_model": ["layers"], "generation": ["generation_"]}.items():
        policy = make_policy(tiny_janus, trains=trains)
        fit(make_grpo(tiny_janus, policy=policy), tmp_path)
        end = policy.state_dict()
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert changed and changed <= trained
        assert any(part in name for part in parts for name in changed)
        assert not any(name in trained for name in start if "vqmodel" in name or "lm_head" in name)


# Reference --------------------------------------------------------------------------------------


def test_without_kl_there_is_no_reference(tiny_janus, tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("a reference was made")

    monkeypatch.setattr(JanusPolicy, "reference", refuse)
    module = make_grpo(tiny_janus, kl_coef=0.0)
    row = fit(module, tmp_path).logger.rows[1]
    assert module.reference is None
    assert not any(name.startswith("reference") for name, _ in module.named_parameters())
    assert not any("kl" in name for name in row) and "perf/reference_s" not in row


def test_reference_is_the_frozen_start(tiny_janus, tmp_path, monkeypatch):
    module = make_grpo(tiny_janus, kl_coef=0.1, images_budget=16, optimizer=sgd(5.0))
    updates = keep_updates(module, monkeypatch)
    trainer = fit(module, tmp_path)
    start = make_policy(tiny_janus).load().state_dict()
    reference = module.reference.state_dict()
    assert all(torch.equal(start[name], reference[name]) for name in start)
    assert not any(p.requires_grad for p in module.reference.parameters())
    assert abs(updates[0]["kl"]) < EXACT < 1e-6 < updates[1]["kl"]
    assert trainer.logger.rows[2]["train/kl"] == pytest.approx(updates[1]["kl"])
    assert trainer.logger.rows[2]["perf/reference_s"] > 0


def test_kl_term_pulls_back_to_the_start(tiny_janus, tmp_path):
    """Without any signal from the reward, a disturbed policy returns to its reference."""

    class Disturb(Snapshots):
        def on_train_start(self, trainer, pl_module):
            disturb(pl_module)

    module = make_grpo(tiny_janus, Fixed([0.0]), kl_coef=1.0, images_budget=160)
    rows = fit(module, tmp_path, Disturb()).logger.rows
    assert rows[20]["train/kl"] < 0.5 * rows[1]["train/kl"]


def disturb(module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module._trained().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)


# Groups without signal --------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "moves"), [("keep", True), ("mask", False)])
def test_mask_stops_the_kl_term_of_dead_groups_too(tiny_janus, tmp_path, choice, moves):
    class Disturbed(Snapshots):
        def on_train_start(self, trainer, pl_module):
            disturb(pl_module)
            super().on_train_start(trainer, pl_module)

    kept = Disturbed()
    module = make_grpo(
        tiny_janus,
        Fixed([1.0]),
        dead_groups=choice,
        kl_coef=0.5,
        images_budget=16,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0),
    )
    rows = fit(module, tmp_path, kept).logger.rows
    first, last = kept.weights[0], kept.weights[-1]
    assert any(not torch.equal(first[name], last[name]) for name in first) == moves
    assert (rows[1]["train/grad_norm"] > 0) == moves
    assert rows[1]["train/kl"] > 0  # watched all the same


def test_masked_images_keep_the_batch_shape(tiny_janus, tmp_path, monkeypatch):
    seen = []
    module = make_grpo(tiny_janus, Fixed([1.0] * 4 + [0.0, 1.0, 2.0, 3.0]), dead_groups="mask")
    update = module.update
    monkeypatch.setattr(module, "update", lambda rollout: (seen.append(rollout), update(rollout)))
    fit(module, tmp_path)
    assert seen[0].weights.tolist() == [0.0] * 4 + [1.0] * 4
    assert len(seen[0]) == 8


def test_resample_draws_dead_groups_again_with_other_noise(tiny_janus, tmp_path, monkeypatch):
    alive = [0.0, 1.0, 2.0, 3.0]
    module = make_grpo(tiny_janus, PerCall([5.0] * 4 + alive, alive), dead_groups="resample")
    rollouts = []
    collect = module.collect

    def keep(prompts):
        rollouts.append((prompts, collect(prompts)))
        return rollouts[-1][1]

    monkeypatch.setattr(module, "collect", keep)
    trainer = fit(module, tmp_path)
    prompts, rollout = rollouts[0]
    assert module.images_sampled == 8 + 4
    row = trainer.logger.rows[1]
    assert row["perf/images_sampled"] == 12
    assert row["train/frac_reward_zero_std"] == 0.5  # of the first drawing
    assert rollout.rewards["per_call"].tolist() == alive + alive
    fresh = make_grpo(tiny_janus)
    fresh.configure_model()
    again, logprobs = fresh.draw(prompts[:1], 4, "rollout", first_copy=4)
    before, _ = fresh.draw(prompts[:1], 4, "rollout")
    assert torch.equal(rollout.tokens[:4], again)
    torch.testing.assert_close(rollout.logprobs[:4], logprobs)
    assert not torch.equal(again, before)


def test_resample_gives_up_after_four_times_and_the_budget_counts_them(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, Fixed([1.0]), dead_groups="resample", images_budget=80)
    rows = fit(module, tmp_path).logger.rows
    assert [rows[step]["perf/images_sampled"] for step in sorted(rows) if step] == [40, 80]
    assert module.rollouts == 2  # of the 10 that 80 images would be without redrawing


def test_resample_survives_a_group_that_never_gets_a_verdict(tiny_janus, tmp_path):
    alive, missing = [0.0, 1.0, 2.0, 3.0], [math.nan] * 4
    module = make_grpo(tiny_janus, PerCall(missing + alive, missing), dead_groups="resample")
    row = fit(module, tmp_path).logger.rows[1]
    assert row["perf/images_sampled"] == 8 + 4 * 4
    assert row["train/frac_no_verdict"] == 0.5 and math.isfinite(row["train/loss"])


def test_a_redrawn_group_must_have_finite_scores_too(tiny_janus, tmp_path):
    dead, broken = [0.0, 1.0, 2.0, 3.0] + [1.0] * 4, [0.0, math.inf, 1.0, 2.0]
    module = make_grpo(tiny_janus, PerCall(dead, broken), dead_groups="resample")
    with pytest.raises(ValueError, match="reward PerCall: expected finite scores"):
        fit(module, tmp_path)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_dead_groups_are_counted_per_group_whatever_the_scaling(tiny_janus, tmp_path, scale):
    module = make_grpo(
        tiny_janus,
        Fixed([0.0, 1.0, 0.0, 1.0] + [1.0] * 4 + [2.0, 1.0, 0.0, 1.0] + [0.0, 0.0, 0.0, 3.0]),
        images_per_update=16,
        images_budget=16,
        advantage_scale=scale,
    )
    row = fit(module, tmp_path).logger.rows[1]
    assert row["train/frac_reward_zero_std"] == 0.25
    # Sample deviations by hand: 0.57735, 0, 0.81650, 1.5.
    assert row["train/reward_std"] == pytest.approx((0.577350 + 0 + 0.816497 + 1.5) / 4, abs=1e-5)


# Bad input --------------------------------------------------------------------------------------


def test_a_missing_verdict_is_left_out_and_counted(tiny_janus, tmp_path, monkeypatch):
    seen = []
    module = make_grpo(tiny_janus, Fixed([math.nan, 0.0, 1.0, 2.0, 5.0, 6.0, 5.0, 6.0]))
    update = module.update
    monkeypatch.setattr(module, "update", lambda rollout: (seen.append(rollout), update(rollout)))
    row = fit(module, tmp_path).logger.rows[1]
    # Without the first image the group has mean 1 and sample deviation 1.
    assert seen[0].advantages[:4].tolist() == pytest.approx([0, -1, 0, 1], abs=2e-4)
    assert row["train/frac_no_verdict"] == 1 / 8
    assert row["train/reward"] == pytest.approx(25 / 7)
    assert row["train/rewards/fixed/mean"] == pytest.approx(25 / 7)
    assert row["train/rewards/fixed/missing"] == 1 / 8
    assert math.isfinite(row["train/loss"]) and math.isfinite(row["train/reward_std"])


def test_too_many_missing_verdicts_stop_the_run(tiny_janus, tmp_path):
    scores = [math.nan, math.nan, math.nan, 0.0, 1.0, 2.0, 3.0, 4.0]
    fit(make_grpo(tiny_janus, Fixed(scores), most_missing=3 / 8), tmp_path)
    module = make_grpo(tiny_janus, Fixed(scores), most_missing=0.3)
    with pytest.raises(ValueError, match=r"reward Fixed: expected a share.* 0.3 .* 3 of 8"):
        fit(module, tmp_path)


def test_each_rewards_time_is_logged(tiny_janus, tmp_path):
    rewards = {"slow": Brightness(), "none": Fixed([0.0, 1.0])}
    row = fit(make_grpo(tiny_janus, Ensemble(rewards)), tmp_path).logger.rows[1]
    assert 0 < row["perf/reward/slow_s"] <= row["perf/reward_s"]
    assert 0 < row["perf/reward/none_s"] <= row["perf/reward_s"]
    row = fit(make_grpo(tiny_janus, Fixed([0.0, 1.0])), tmp_path).logger.rows[1]
    assert 0 < row["perf/reward/Fixed_s"] <= row["perf/reward_s"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Fixed([math.nan]), "reward Fixed: expected scores, got NaN"),
        (Fixed([0.0, math.inf]), "reward Fixed: expected finite scores or NaN .*, got inf in tot"),
        (Fixed([0.0, -math.inf]), "reward Fixed: expected finite scores .*, got -inf in total"),
        (WrongShape(), r"reward WrongShape: expected total of shape \(8,\).*got \(8, 1\)"),
    ],
)
def test_a_useless_verdict_stops_the_step_with_the_rewards_name(
    tiny_janus, tmp_path, reward, message
):
    with pytest.raises(ValueError, match=message):
        fit(make_grpo(tiny_janus, reward), tmp_path)


def test_a_non_finite_loss_stops_and_leaves_the_last_checkpoint(tiny_janus, tmp_path):
    good = [0.0, 1.0, 2.0, 3.0] * 2
    checkpoints = ModelCheckpoint(tmp_path / "run", every_n_train_steps=1, save_last=True)
    kept = Snapshots()
    module = make_grpo(tiny_janus, Fixed(good), images_budget=40)
    advantages = module.advantages

    def break_the_third(scores):
        found = advantages(scores)
        return found * math.nan if module.rollouts == 2 else found

    module.advantages = break_the_third
    message = r"expected a finite loss in update 3 \(optimizer step 3\), got nan; .*resume"
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, kept, checkpoints)
    last = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert last["progress"] == {"images_sampled": 16, "rollouts": 2, "skipped_steps": 0}
    for name, weight in kept.weights[-1].items():
        assert torch.equal(weight, last["state_dict"][name])
        assert torch.equal(weight, module.state_dict()[name])  # nor were the weights touched


def test_a_non_finite_gradient_stops_too(tiny_janus, tmp_path, monkeypatch):
    module = make_grpo(tiny_janus)
    parameter = next(iter(make_policy(tiny_janus).load().parameters()))
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: parameter.new_tensor(math.inf)
    )
    with pytest.raises(ValueError, match="expected a finite gradient norm in update 1"):
        fit(module, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 3}, "images_per_update 8 does not split into groups of 3"),
        ({"group_size": 1}, "expected group_size of 2 or more, got 1"),
        ({"images_budget": 4}, "expected images_budget of at least images_per_update"),
        ({"micro_batch_size": 0}, "expected micro_batch_size of 1 or more, got 0"),
        ({"drawn_at_once": 6}, "expected drawn_at_once to be whole groups of 4, got 6"),
        ({"drawn_at_once": 0}, "expected drawn_at_once to be whole groups of 4, got 0"),
        ({"scores_while_drawing": True}, "expected drawn_at_once beside scores_while_drawing"),
        ({"updates_per_rollout": 0}, "expected updates_per_rollout of 1 or more, got 0"),
        ({"guidance": 0.5}, "expected guidance of 1"),
        ({"temperature": 0.0}, "expected temperature above 0, got 0.0"),
        ({"temperature": -1.0}, "expected temperature above 0, got -1.0"),
        ({"dead_groups": "drop"}, "expected dead_groups to be one of .*'mask'.*, got 'drop'"),
        ({"logprobs": "free"}, "expected logprobs to be one of .*'guided'.*, got 'free'"),
        ({"gradient_clip": 0.0}, "expected gradient_clip above 0, got 0.0; null"),
        ({"kl_penalty": -0.1}, "expected kl_penalty of 0 or more, got -0.1"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "got k1, whose gradient there is zero"),
        ({"clip_high": -0.1}, "expected clip_low, clip_high >= 0"),
        ({"combine_rewards": "normalise_then_sum", "advantage_scale": "none"}, "expects scale"),
    ],
)
def test_settings_are_refused_before_weights_load(tiny_janus, monkeypatch, arguments, message):
    monkeypatch.setattr(JanusPolicy, "load", None)
    with pytest.raises(ValueError, match=message):
        make_grpo(tiny_janus, **arguments)


# Rewards, budget, metrics -----------------------------------------------------------------------


def test_rewards_score_in_their_own_precision(tiny_janus):
    class Linear(Reward):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(48, 1)

        def score(self, images, prompts):
            return Scores.single("linear", self.layer(images.flatten(1))[:, 0])

    module = make_grpo(tiny_janus, Linear())
    images, prompts = torch.rand(8, 3, 4, 4), numbered_prompts(2) * 4
    plain = ask(module.reward, images, prompts).total
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        mixed = ask(module.reward, images, prompts).total
        spoilt = module.reward.score(images, prompts).total
    assert torch.equal(plain, mixed)
    assert not torch.equal(plain, spoilt)  # what autocast would have done


def test_mixed_precision_keeps_full_weights_and_trains(tiny_janus, tmp_path):
    policy = make_policy(tiny_janus, dtype="bfloat16")
    module, kept = make_grpo(tiny_janus, policy=policy, kl_coef=0.1), Snapshots()
    row = fit(module, tmp_path, kept, precision="bf16-mixed").logger.rows[1]
    assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
    for name, weight in kept.weights[-1].items():
        assert weight.dtype == torch.float32
        assert not torch.equal(weight, kept.weights[0][name]), name


def test_the_budget_ends_the_run_at_the_rollout_that_reaches_it(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, images_budget=20)
    rows = fit(module, tmp_path).logger.rows
    assert module.images_sampled == 24 and module.rollouts == 3
    assert [rows[step]["perf/images_sampled"] for step in (1, 2, 3)] == [8, 16, 24]


def test_progress_bar_has_reward_kl_and_speed(tiny_janus, tmp_path):
    trainer = fit(make_grpo(tiny_janus, kl_coef=0.1, images_budget=16), tmp_path)
    shown, row = trainer.progress_bar_metrics, trainer.logger.rows[2]
    assert {"reward", "kl", "images/s"} <= shown.keys()
    assert shown["reward"] == pytest.approx(row["train/reward"])
    assert shown["kl"] == pytest.approx(row["train/kl"])


def test_watched_parts_are_logged_and_not_trained_on(tiny_janus, tmp_path):
    row = fit(make_grpo(tiny_janus, Brightness()), tmp_path).logger.rows[1]
    assert row["train/rewards/all/mean"] == pytest.approx(row["train/reward"])
    assert row["train/rewards/red/mean"] != row["train/reward"]
    assert {"train/rewards/all/std", "train/rewards/red/std"} <= row.keys()


def test_a_kl_penalty_is_a_part_of_the_reward(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, kl_penalty=0.5, images_budget=16)
    seen = []
    update = module.update
    module.update = lambda rollout: (seen.append(rollout), update(rollout))
    row = fit(module, tmp_path).logger.rows[2]
    assert module.reference is not None
    penalty = (seen[1].reference_logprobs - seen[1].old_logprobs).sum(1)
    assert row["train/rewards/kl_penalty/mean"] == pytest.approx(penalty.mean().item(), abs=1e-6)
    assert row["train/rewards/kl_penalty/std"] == pytest.approx(penalty.std().item(), abs=1e-6)
    for rollout in seen:
        divergence = (rollout.old_logprobs - rollout.reference_logprobs).sum(1)
        total = rollout.rewards["all"] - 0.5 * divergence
        assert torch.allclose(
            rollout.advantages, group_advantages(total, 4).to(rollout.advantages), atol=1e-5
        )
    assert seen[0].old_logprobs.equal(seen[0].reference_logprobs)  # nothing was learnt before
    assert not seen[1].old_logprobs.allclose(seen[1].reference_logprobs)


def test_summed_rewards_are_those_that_the_reward_summed(tiny_janus, tmp_path):
    class Halved(Reward):
        def score(self, images, prompts):
            part = torch.arange(8.0)
            return Scores(part.flip(0), {"part": part}, {"part": 1.0})

    module = make_grpo(tiny_janus, Halved())
    seen = []
    update = module.update
    module.update = lambda rollout: (seen.append(rollout), update(rollout))
    fit(module, tmp_path)
    assert (seen[0].advantages.view(2, 4).diff() < 0).all()
