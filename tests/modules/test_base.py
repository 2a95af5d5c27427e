"""What all training modules share: noise, start weights, precision, checkpoints."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.data.prompts import PromptData
from cotgen_pl.optimizers import StochasticAdamW8bit
from tests.toys import (
    Snapshots,
    fit,
    make_grpo,
    make_policy,
    make_trainer,
    numbered_prompts,
    write_prompts,
)


@pytest.fixture
def module(tiny_janus):
    module = make_grpo(tiny_janus)
    module.configure_model()
    return module


# Noise ------------------------------------------------------------------------------------------


def test_more_copies_begin_with_the_same_ones(module):
    prompts = numbered_prompts(2)
    few, _ = module.draw(prompts, 2, "evaluation")
    many, _ = module.draw(prompts, 4, "evaluation")
    later, _ = module.draw(prompts, 2, "evaluation", first_copy=2)
    many = many.view(2, 4, -1)
    assert torch.equal(few.view(2, 2, -1), many[:, :2])
    assert torch.equal(later.view(2, 2, -1), many[:, 2:])
    assert not torch.equal(few.view(2, 2, -1), many[:, 2:])


def test_images_do_not_depend_on_the_batch_that_they_are_drawn_in(module):
    prompts = numbered_prompts(4)
    together, _ = module.draw(prompts, 3, "evaluation")
    alone = [module.draw([prompt], 3, "evaluation")[0] for prompt in reversed(prompts)]
    assert torch.equal(together, torch.cat(alone[::-1]))


def test_only_rollouts_get_new_noise_as_training_goes_on(module):
    prompts = numbered_prompts(2)
    drawn = {}
    for rollout in (0, 1):
        module.rollouts = rollout
        for stream in ("rollout", "evaluation", "samples"):
            drawn[rollout, stream] = module.draw(prompts, 4, stream)[0]
    assert not torch.equal(drawn[0, "rollout"], drawn[1, "rollout"])
    assert torch.equal(drawn[0, "evaluation"], drawn[1, "evaluation"])
    assert torch.equal(drawn[0, "samples"], drawn[1, "samples"])
    assert not torch.equal(drawn[0, "evaluation"], drawn[0, "samples"])


def test_seed_index_and_occurrence_key_the_noise(module, tiny_janus):
    def draw(seed=0, **changes):
        other = make_grpo(tiny_janus, seed=seed, policy=module.policy)
        prompt = numbered_prompts(1)[0]
        for name, value in changes.items():
            setattr(prompt, name, value)
        return other.draw([prompt], 8, "rollout")[0]

    assert torch.equal(draw(), draw())
    for changed in (draw(seed=1), draw(index=5), draw(occurrence=1)):
        assert not torch.equal(draw(), changed)


def test_the_policy_sees_the_generation_text(module):
    plain, rewritten = numbered_prompts(1)[0], numbered_prompts(1)[0]
    rewritten.text, rewritten.generation_text = "something else", plain.text
    assert torch.equal(
        module.draw([plain], 4, "rollout")[0], module.draw([rewritten], 4, "rollout")[0]
    )


def test_predict_without_a_writer_is_refused_before_weights_load(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus)
    module.configure_model = lambda: pytest.fail("weights were loaded")
    with pytest.raises(ValueError, match="expected a callback that writes what predict draws"):
        make_trainer(tmp_path).predict(module, PromptData([write_prompts(tmp_path)]))


BFLOAT16 = {"dtype": "bfloat16", "trained_dtype": "bfloat16"}


def in_bfloat16(folder, **arguments):
    """GRPO on weights that train in bfloat16, with the optimizer that they take."""
    arguments = {"optimizer": partial(StochasticAdamW8bit, lr=1e-3), "kl_coef": 0.1} | arguments
    return make_grpo(folder, policy=make_policy(folder, **BFLOAT16), **arguments)


def test_bfloat16_weights_are_refused_an_optimizer_that_loses_small_steps(tiny_janus, tmp_path):
    module = in_bfloat16(tiny_janus, optimizer=torch.optim.AdamW)
    module.configure_model = lambda: pytest.fail("weights were loaded")
    with pytest.raises(ValueError, match=r"rounds stochastically .* got AdamW, .*; use cotgen_pl"):
        fit(module, tmp_path, precision="bf16-mixed")


def test_a_resumed_run_in_bfloat16_ends_as_the_uninterrupted_one(tiny_janus, tmp_path):
    data = PromptData([write_prompts(tmp_path)])
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, resumed = (in_bfloat16(tiny_janus, images_budget=24) for _ in range(2))
    make_trainer(tmp_path, keep, precision="bf16-mixed").fit(whole, data)
    trainer = make_trainer(tmp_path / "resumed", precision="bf16-mixed")
    trainer.fit(resumed, data, ckpt_path=str(tmp_path / "step=2.ckpt"))
    middle = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    moved = []
    for name, weight in whole.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(resumed.state_dict()[name], weight), name
        moved.append(not torch.equal(middle[name], weight))
    assert any(moved)


# Weights ----------------------------------------------------------------------------------------


def test_start_weights_last_as_long_as_the_context(module):
    trained = module._trained()
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="inside"), module.start_weights() as policy:
        assert policy is module.policy
        assert all(torch.equal(start[name], p) for name, p in module._trained().items())
        raise RuntimeError("inside")
    assert all(torch.equal(start[name] + 1.0, p) for name, p in module._trained().items())


def test_only_what_trains_gets_an_optimizer(module):
    optimizer = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.policy.parameters() if p.requires_grad}
    assert 0 < len(held) < len(list(module.policy.parameters()))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_spoiling_precisions_are_refused_before_weights_load(tiny_janus, tmp_path, precision):
    module = make_grpo(tiny_janus)
    with pytest.raises(ValueError, match=f"one of 32-true, .*, got {precision}; bf16-mixed"):
        fit(module, tmp_path, precision=precision)
    assert module.policy.model is None


def test_half_precision_with_scaling_is_refused(module):
    # Lightning has it on a GPU only.
    module._trainer = SimpleNamespace(precision="16-mixed", strategy=None)
    with pytest.raises(ValueError, match="got 16-mixed"):
        module.setup("fit")


# Checkpoints ------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny_janus, tmp_path):
    """The path of a checkpoint of two rollouts with a KL term, and the weights at its time."""
    kept = Snapshots()
    writer = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=2)
    momentum = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731  # one use
    module = make_grpo(tiny_janus, kl_coef=0.1, images_budget=16, optimizer=momentum)
    fit(module, tmp_path, kept, writer)
    return tmp_path / "end.ckpt", kept.weights[-1]


def test_checkpoint_holds_what_trains_and_nothing_else(tiny_janus, checkpoint):
    path, weights = checkpoint
    content = torch.load(path, weights_only=True)
    policy = make_policy(tiny_janus).load()
    trained = {f"policy.{name}" for name, p in policy.named_parameters() if p.requires_grad}
    assert content["state_dict"].keys() == trained
    assert all(torch.equal(weight, weights[name]) for name, weight in content["state_dict"].items())
    assert len(content["optimizer_states"][0]["state"]) == len(trained)
    assert content["progress"] == {"images_sampled": 16, "rollouts": 2, "skipped_steps": 0}
    assert content["random_state"].dtype == torch.uint8


def test_checkpoint_brings_weights_and_counters_back(tiny_janus, tmp_path, checkpoint):
    path, weights = checkpoint
    module = make_grpo(tiny_janus, kl_coef=0.1)
    make_trainer(tmp_path).validate(module, ckpt_path=str(path), verbose=False)
    assert (module.images_sampled, module.rollouts) == (16, 2)
    assert all(torch.equal(w, weights[name]) for name, w in module.state_dict().items())
    start = make_policy(tiny_janus).load().state_dict()
    reference = module.reference.state_dict()
    assert all(torch.equal(start[name], reference[name]) for name in start)


def test_checkpoint_of_another_trained_part_is_refused(tiny_janus, tmp_path, checkpoint):
    path, weights = checkpoint
    module = make_grpo(tiny_janus, policy=make_policy(tiny_janus, trains="generation"))
    message = f"holds {len(weights)} trained weights, .*; use the configuration that wrote it"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).validate(module, ckpt_path=str(path), verbose=False)


# Images drawn -----------------------------------------------------------------------------------


def test_images_count_in_another_folder_as_in_their_own(tiny_janus, tmp_path):
    """A run that goes on elsewhere finds no file of what it drew before."""
    saved, folder = tmp_path / "saved", tmp_path / "folder"
    folder.mkdir()
    writer = ModelCheckpoint(saved, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_grpo(tiny_janus, images_budget=24), tmp_path, writer)
    trainer, data = make_trainer(folder), PromptData([write_prompts(folder)])
    trainer.fit(make_grpo(tiny_janus, images_budget=24), data, ckpt_path=str(saved / "step=2.ckpt"))
    assert trainer.logger.rows[3]["perf/images_sampled"] == 24
    assert trainer.logger.rows[3]["perf/images_redrawn"] == 0
    assert (folder / "drawn/0.txt").read_text() == "24\n"


def test_images_of_processes_that_are_no_more_count(module, tmp_path):
    module.trainer = make_trainer(tmp_path)
    (tmp_path / "drawn").mkdir()
    for rank, number in enumerate((8, 16, 4)):
        (tmp_path / f"drawn/{rank}.txt").write_text(f"{number}\n")
    module.images_sampled = 20
    assert module.image_counts() == {"images_sampled": 20, "images_redrawn": 8}
    module.count_drawn(2)
    assert module.image_counts() == {"images_sampled": 20, "images_redrawn": 10}


# Random states ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "taken"), [(0, 0), (1, 1), (2, 0)])
def test_each_process_takes_up_its_own_random_state(
    module, checkpoint, tmp_path, monkeypatch, rank, taken
):
    """One that was not there before takes that of another."""
    content = torch.load(checkpoint[0], weights_only=True)
    torch.rand(7)
    states = torch.cat([content["random_state"], torch.get_rng_state()[None]])
    module.trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(module), "global_rank", rank)
    module.on_load_checkpoint(content | {"random_state": states, "reference": {}})
    assert torch.equal(module._random_state, states[taken])


def test_a_random_state_of_its_own_repeats_and_leaves_the_run_s_alone(module):
    before, drawn = torch.get_rng_state(), []
    for key in (("pairs", 0), ("pairs", 1), ("pairs", 0)):
        with module.own_random_state(*key):
            drawn.append(torch.rand(3).tolist())
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_random_state_that_waits_for_its_batch_is_saved_as_it_is(module, checkpoint, tmp_path):
    content = torch.load(checkpoint[0], weights_only=True)
    module.trainer = make_trainer(tmp_path)
    saved = {}
    module.on_save_checkpoint(saved)
    assert torch.equal(saved["random_state"], torch.get_rng_state()[None])  # of one process
    module._random_state = content["random_state"][0]
    torch.rand(1)
    module.on_save_checkpoint(saved)
    assert torch.equal(saved["random_state"], content["random_state"])
