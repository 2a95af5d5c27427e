"""Habits change what a step costs and nothing that it computes."""

from types import SimpleNamespace

import pytest
import torch

from cotgen_pl.bench.naive import Habits
from cotgen_pl.bench.steps import KL_COEF, NAIVE, NO_HABIT, PEERS, naive_step, run_in_trainer
from cotgen_pl.losses import grpo_loss, token_statistics
from cotgen_pl.sampling import forced_logits
from tests.toys import make_policy, numbered_prompts

BATCH = SimpleNamespace(images=8, group=4, prompts=2)  # prompts of different lengths


def gradients(module):
    return {name: p.grad.clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def run_step(module, step, seeds):
    """A naive step's loss, and the gradients that its optimizer saw."""
    seen = {}
    hook = step.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(module)))
    loss = step.run(seeds)
    hook.remove()
    return loss, seen


def whole_loss(module, rollout):
    """The loss of a rollout in one piece, written out."""
    prompts = [prompt.text for prompt in rollout.prompts]
    logits = forced_logits(
        module.policy, prompts, rollout.tokens, guidance=module.guidance, mode=module.logprobs
    )
    logprobs, _ = token_statistics(logits, rollout.tokens)
    reference = rollout.reference_logprobs
    loss, _ = grpo_loss(logprobs, logprobs.detach(), reference, rollout.advantages, kl_coef=KL_COEF)
    return loss.detach()


def measure_in(folder, tmp_path, measure, **settings):
    sizes = {"images_per_update": BATCH.images, "group_size": BATCH.group, "micro_batch_size": 3}
    run_in_trainer(
        make_policy(folder),
        numbered_prompts(BATCH.prompts),
        measure,
        tmp_path,
        device="cpu",
        dtype="float32",  # of the trainer; the policy computes in float64
        **(sizes | {"guidance": 3.0} | settings),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"logprobs": "conditional"},
        {"logprobs": "guided"},
        {"logprobs": "guided_detached"},
        {"guidance": 1.0},
    ],
    ids=str,
)
def test_no_habit_changes_a_result(tiny_janus, tmp_path, settings):
    compared = []

    def measure(module, prompts):
        for weight in module.policy.parameters():  # away from the reference: a KL term above 0
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn_like(weight)
        start = {name: value.clone() for name, value in module.policy.state_dict().items()}
        rollout = module.collect(prompts)
        assert not torch.equal(rollout.reference_logprobs, rollout.logprobs)
        loss = whole_loss(module, rollout)
        module.update(rollout)
        expected = gradients(module)
        assert sum(part.norm() for part in expected.values()) > 0.1
        seeds = module.noise_seeds(prompts, BATCH.group, "rollout")
        for name, habits in PEERS.items():
            module.policy.load_state_dict(start)
            step = naive_step(module, prompts, habits)
            assert torch.equal(step.roll_out(seeds), rollout.tokens), name
            done, found = run_step(module, step, seeds)
            torch.testing.assert_close(done, loss, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
            held = [p for p in module.policy.parameters() if p.grad is not None]
            assert not step.kept and not held, "a step lets go of what it kept"
            compared.append(name)

    measure_in(tiny_janus, tmp_path, measure, **settings)
    assert compared == [NAIVE, NO_HABIT, *Habits.names()]


def work_done(module, prompts, habits):
    """What a step has parts of the model do."""
    step = naive_step(module, prompts, habits)
    janus, seen = step.model, {"text": 0, "read": [], "passes": []}
    body = janus.model.language_model

    def note(rows, length):
        seen["passes" if torch.is_grad_enabled() else "read"].append((rows, length))

    hooks = [
        janus.lm_head.register_forward_hook(lambda *_: seen.update(text=seen["text"] + 1)),
        body.register_forward_pre_hook(
            lambda _, args, inputs: note(*inputs["inputs_embeds"].shape[:2]), with_kwargs=True
        ),
    ]
    seeds = module.noise_seeds(prompts, BATCH.group, "rollout")
    step.roll_out(seeds)
    [kept] = step.kept
    step.kept.clear()
    step.run(seeds)
    for hook in hooks:
        hook.remove()
    return seen | {"kept": kept.shape[-1], "cache": type(step._prefill()[1]).__name__}


def test_each_habit_does_its_work(tiny_janus, tmp_path):
    found = {}

    def measure(module, prompts):
        found.update({name: work_done(module, prompts, habits) for name, habits in PEERS.items()})

    measure_in(tiny_janus, tmp_path, measure, logprobs="conditional")
    none, everything = found[NO_HABIT], found[NAIVE]
    assert none["text"] == 0
    assert none["kept"] == 1
    assert none["cache"] == "StaticCache"
    assert none["read"][0][0] == 2 * BATCH.prompts
    assert [rows for rows, _ in none["passes"]] == [3, 3, 2]
    assert found["text_head"]["text"] == len(none["read"]) + len(none["passes"])
    assert found["full_logits"]["kept"] == 32  # codes of the codebook
    assert found["growing_cache"]["cache"] == "DynamicCache"
    assert found["prompt_per_copy"]["read"][0][0] == 2 * BATCH.images
    assert [rows for rows, _ in found["image_per_backward"]["passes"]] == [1] * BATCH.images
    for name in Habits.names():  # each alone leaves the others off
        differing = {key for key, value in found[name].items() if value != none[key]}
        own = {
            "growing_cache": {"cache"},
            "text_head": {"text"},
            "full_logits": {"kept"},
            "prompt_per_copy": {"read"},
            "image_per_backward": {"passes"},
        }
        assert differing == own[name]
    assert {key for key, value in everything.items() if value != none[key]} == set(none)
