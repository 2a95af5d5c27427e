"""Rendered pictures for supervised fine-tuning: order, processes, wrong ones, resumed runs."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from cotgen_pl.data.pictures import PictureData, ShapesPictures
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from tests.toys import make_grpo, make_trainer


def scores(prompts, pictures):
    """The exact judge's verdict, by the rules that each prompt has facts for."""
    rules = ["compbench" if "objects" in prompt.facts else "geneval" for prompt in prompts]
    judges = {name: ShapesOracle(name) for name in ("compbench", "geneval")}
    pairs = zip(rules, prompts, pictures, strict=True)
    return torch.stack([judges[r].score(x[None], [p]).parts["strict"][0] for r, p, x in pairs])


def test_pictures_show_their_prompts():
    prompts, pictures = next(iter(ShapesPictures(64, 1)))
    assert pictures.shape == (64, 3, 32, 32)
    assert len({prompt.text for prompt in prompts}) > 48
    assert scores(prompts, pictures).min() == 1


def test_wrong_share_is_wrong():
    prompts, pictures = next(iter(ShapesPictures(200, 1, wrong_share=0.3, seed=1)))
    assert (scores(prompts, pictures) < 1).float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_a_batch_depends_on_seed_and_number_alone():
    whole = list(ShapesPictures(4, 5, seed=2))
    rest = list(ShapesPictures(4, 5, start=3, seed=2))
    assert len(whole) == 5 and len(rest) == 2
    for (prompts, pictures), (same_prompts, same_pictures) in zip(whole[3:], rest, strict=True):
        assert prompts == same_prompts and torch.equal(pictures, same_pictures)
    other = next(iter(ShapesPictures(4, 5, seed=3)))
    assert other[0] != whole[0][0] and whole[1][0] != whole[0][0]


def test_processes_draw_different_pictures():
    one = [prompts for prompts, _ in ShapesPictures(4, 4)]
    two = [
        [prompts for prompts, _ in ShapesPictures(4, 2, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert [two[0][0], two[1][0], two[0][1], two[1][1]] == one


def test_data_module_goes_on_behind_the_finished_batches():
    progress = SimpleNamespace(total=SimpleNamespace(processed=2))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data = PictureData(batch_size=3, num_batches=4, seed=5)
    data.trainer = SimpleNamespace(fit_loop=loop, global_rank=0, world_size=1)
    loader = data.train_dataloader()
    expected = list(islice(ShapesPictures(3, 4, seed=5), 2, None))
    got = list(loader)
    assert len(loader) == 4 and len(got) == 2
    assert [prompts for prompts, _ in got] == [prompts for prompts, _ in expected]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=rf"expected wrong_share in \[0, 1\], got {share}"):
        PictureData(wrong_share=share)


@pytest.mark.parametrize("name", ["batch_size", "num_batches"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        PictureData(**{name: 0})


def test_a_module_that_draws_its_own_pictures_is_refused_before_weights_load(
    tiny_janus, tmp_path, monkeypatch
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    message = "expected a module that learns from .* beside PictureData, got GRPOModule.*PromptData"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(make_grpo(tiny_janus), PictureData())
