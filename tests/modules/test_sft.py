"""Supervised fine-tuning on rendered pictures."""

import pytest
import torch

from cotgen_pl.data.pictures import PictureData
from cotgen_pl.interfaces import Prompt
from cotgen_pl.modules.sft import SFTModule
from tests.toys import make_policy, make_trainer, sgd, write_pairs


@pytest.fixture(scope="module")
def janus_of_32_pixels(tmp_path_factory):
    from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus

    folder = tmp_path_factory.mktemp("janus_of_32_pixels")
    tokenizer = build_tokenizer(["a red circle and a blue square"], 300)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    save_janus(build_janus(tokenizer, **sizes, grid=4, vq_levels=4), tokenizer, folder)
    return folder


class Watched(SFTModule):
    """Notes loss and dropped conditions of each step."""

    losses: list[float]
    dropped: list[torch.Tensor]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def _dropped(self, number):
        dropped = super()._dropped(number)
        self.dropped.append(dropped)
        return dropped


def watched(folder, **arguments) -> Watched:
    module = Watched(make_policy(folder, dtype="float32", trains="both"), **arguments)
    module.losses, module.dropped = [], []
    return module


def test_loss_falls(janus_of_32_pixels, tmp_path):
    module = watched(
        janus_of_32_pixels, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    )
    trainer = make_trainer(tmp_path, precision="32-true")
    trainer.fit(module, PictureData(batch_size=16, num_batches=30))
    assert len(module.losses) == 30 and module.rollouts == 30
    assert sum(module.losses[-5:]) / 5 < module.losses[0] - 0.3
    rows = trainer.logger.rows
    assert rows[30]["train/loss"] == pytest.approx(module.losses[-1])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_conditions_are_dropped_by_share(janus_of_32_pixels, tmp_path, share):
    module = watched(janus_of_32_pixels, condition_dropout=share, optimizer=sgd(0.0))
    trainer = make_trainer(tmp_path, precision="32-true")
    trainer.fit(module, PictureData(batch_size=32, num_batches=8))
    dropped = torch.stack(module.dropped).float()
    assert dropped.mean().item() == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)
    if 0 < share < 1:
        assert not torch.equal(dropped[0], dropped[1])


def test_loss_is_the_mean_negative_log_likelihood(janus_of_32_pixels):
    module = watched(janus_of_32_pixels, condition_dropout=0.0)
    module.configure_model()
    module.log_update = lambda metrics, sequences: None
    prompts = [Prompt("a red circle"), Prompt("two"), Prompt("a blue square and a circle")]
    pictures = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        loss = module.training_step((prompts, pictures), 0)
        tokens = module.policy.encode(pictures)
        logits = module.policy.logits([prompt.text for prompt in prompts], tokens)
    chosen = logits.log_softmax(-1).gather(-1, tokens[..., None])
    assert loss.item() == pytest.approx(-chosen.mean().item(), abs=1e-5)


def test_of_pairs_the_chosen_pictures_are_learnt(janus_of_32_pixels, tmp_path):
    module = watched(janus_of_32_pixels, condition_dropout=0.0)
    module.configure_model()
    module.log_update = lambda metrics, sequences: None
    batch = write_pairs(tmp_path, 3, torch.randint(0, 32, (3, 2, 16))).batch([2, 0])
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        logits = module.policy.logits(["prompt 2", "prompt 0"], batch.chosen)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.chosen.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_non_finite_loss_names_the_step(janus_of_32_pixels, tmp_path):
    module = watched(janus_of_32_pixels, optimizer=sgd(float("inf")))
    trainer = make_trainer(tmp_path, precision="32-true")
    with pytest.raises(ValueError, match=r"expected a finite loss in update 2 .*got nan"):
        trainer.fit(module, PictureData(batch_size=2, num_batches=3))


def test_impossible_share_is_refused(janus_of_32_pixels):
    with pytest.raises(ValueError, match=r"expected condition_dropout in \[0, 1\], got 1.5"):
        watched(janus_of_32_pixels, condition_dropout=1.5)


def test_a_non_finite_gradient_never_reaches_the_weights(janus_of_32_pixels, tmp_path):
    module = watched(janus_of_32_pixels)
    module.configure_model()
    start = {name: weight.clone() for name, weight in module.state_dict().items()}
    parameter = next(iter(module._trained().values()))
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    trainer = make_trainer(tmp_path, precision="32-true", gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="expected a finite gradient norm in update 1 "):
        trainer.fit(module, PictureData(batch_size=2, num_batches=3))
    assert all(torch.equal(start[name], weight) for name, weight in module.state_dict().items())
