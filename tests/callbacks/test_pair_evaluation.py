"""Accuracy on pairs of held-out prompts: when it is 0, what it is later, and what it costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.callbacks.pair_evaluation import PairEvaluation
from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.data.pairs import PairData
from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    Brightness,
    StopAt,
    make_dpo,
    make_grpo,
    make_policy,
    make_trainer,
    write_prompts,
)

HELD_OUT = ("a blue circle", "two red cats", "a red square", "circle", "square")
UPDATES = 4


def held_out(folder: Path) -> list[PromptFile]:
    path = folder / "held_out.txt"
    path.write_text("\n".join(HELD_OUT) + "\n")
    return [PromptFile(str(path), "text")]


def make_module(tiny_janus: Path, **arguments: Any) -> DPOModule:
    return make_dpo(tiny_janus, **({"reward": Brightness()} | arguments))


def fit(
    module: DPOModule,
    folder: Path,
    *callbacks: Any,
    checkpoint: str | None = None,
    **settings: Any,
) -> dict[int, dict[str, float]]:
    """One round of four pairs, two passes of two updates, evaluated after each update."""
    settings = {"every_n_updates": 1, "pairs_per_batch": 2} | settings
    evaluation = PairEvaluation(held_out(folder), **settings)
    rounds = IterativeRounds(files=[write_prompts(folder)])
    trainer = make_trainer(folder, rounds, evaluation, *callbacks)
    data = PairData(pairs_per_update=2, epochs=2)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer.logger.rows


@pytest.mark.parametrize(
    ("lora", "reference"), [(None, "live"), (LoraSettings(rank=2, alpha=16), "stored")]
)
def test_it_is_what_the_sums_say(tiny_janus, tmp_path, lora, reference):
    policy = make_policy(tiny_janus, lora=lora)
    module = make_module(tiny_janus, policy=policy, reference_logps=reference)
    rows = fit(module, tmp_path)
    assert [step for step in sorted(rows) if "val/pairs/loss" in rows[step]] == [0, 1, 2, 3, 4]
    # Policy and reference are equal: no picture has the higher implicit reward.
    assert rows[0]["val/pairs/accuracies"] == 0
    assert rows[0]["val/pairs/margins"] == 0
    assert rows[0]["val/pairs/loss"] == pytest.approx(0.6931472, abs=1e-6)
    pairs = PairSet(tmp_path / "held_out_pairs")
    batch = pairs.batch(range(len(pairs)))
    before = module._sums(make_policy(tiny_janus).load(), batch)
    ratios = module._sums(module.policy, batch) - before
    gaps = 0.1 * (ratios[:, 0] - ratios[:, 1])
    expected = {
        "accuracies": (gaps > 0).float().mean().item(),
        "margins": gaps.mean().item(),
        "loss": -torch.nn.functional.logsigmoid(gaps).mean().item(),
    }
    found = {name: rows[UPDATES][f"val/pairs/{name}"] for name in expected}
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected["margins"]) > 1e-4


def test_held_out_pictures_are_drawn_once_by_the_start_policy_and_not_counted(tiny_janus, tmp_path):
    module = make_module(tiny_janus)
    rows = fit(module, tmp_path)
    pairs = PairSet(tmp_path / "held_out_pairs")
    assert pairs.counts["images"] == 4 * len(HELD_OUT)
    assert {prompt.text for prompt in pairs.prompts()} == set(HELD_OUT)
    assert pairs.settings["files"] == [vars(held_out(tmp_path)[0])]
    assert rows[UPDATES]["perf/images_sampled"] == 16
    assert rows[UPDATES]["perf/images_redrawn"] == 0
    assert (tmp_path / "drawn/0.txt").read_text() == "16\n"
    with module.start_weights():
        tokens, _ = module.draw(list(pairs.prompts()), 4, "held-out pairs")
    drawn = tokens.view(len(pairs), 4, -1).tolist()
    chosen = pairs.batch(range(len(pairs))).chosen.tolist()
    assert all(own in group for own, group in zip(chosen, drawn, strict=True))


def test_training_is_the_same_without_it(tiny_janus, tmp_path):
    ends = []
    for number, settings in enumerate(({}, {"every_n_updates": 100, "num_prompts": 2})):
        folder = tmp_path / str(number)
        folder.mkdir()
        module = make_module(tiny_janus)
        fit(module, folder, **settings)
        ends.append(module.state_dict())
    assert all(torch.equal(values, ends[1][name]) for name, values in ends[0].items())


def test_a_resumed_run_builds_nothing_again(tiny_janus, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = fit(make_module(tiny_janus), whole)
    save = {"every_n_train_steps": 2, "save_last": True}
    with pytest.raises(RuntimeError, match="the machine went down"):
        fit(
            make_module(tiny_janus),
            tmp_path,
            ModelCheckpoint(tmp_path / "saved", **save),
            StopAt(4),
        )
    shard = next((tmp_path / "held_out_pairs/data").glob("*.parquet"))
    before = (shard.stat().st_mtime_ns, shard.read_bytes())
    module = make_module(tiny_janus)
    streams, draw = [], module.draw

    def note(prompts, copies, stream, first_copy=0, **sampling):
        streams.append(stream)
        return draw(prompts, copies, stream, first_copy, **sampling)

    module.draw = note
    rows = fit(module, tmp_path, checkpoint=str(tmp_path / "saved/last.ckpt"))
    assert streams == []
    assert (shard.stat().st_mtime_ns, shard.read_bytes()) == before
    for step in (3, 4):
        for name in ("accuracies", "margins", "loss"):
            assert rows[step][f"val/pairs/{name}"] == expected[step][f"val/pairs/{name}"]


@pytest.mark.parametrize(
    ("settings", "refreshed"), [({}, 1), ({"reference": "keep"}, 0), ({"rounds": 1}, 0)]
)
def test_the_reference_is_read_once_and_again_when_it_is_another(
    tiny_janus, tmp_path, monkeypatch, settings, refreshed
):
    """With numbers that are those of reading it at each observation, bit for bit."""
    read, calls, rows = DPOModule.reference_sums, [], []

    def note(self, pair_set, batch_size):
        if pair_set.folder.name == "held_out_pairs":
            calls.append(self.rollouts)
        return read(self, pair_set, batch_size)

    monkeypatch.setattr(DPOModule, "reference_sums", note)
    for keeps in (True, False):
        folder = tmp_path / str(keeps)
        folder.mkdir()
        evaluation = PairEvaluation(held_out(folder), every_n_updates=1, pairs_per_batch=2)
        if not keeps:
            forget = evaluation.observe

            def observe(*arguments, evaluation=evaluation, forget=forget, **named):
                evaluation._read = None
                forget(*arguments, **named)

            evaluation.observe = observe
        rounds = IterativeRounds(**({"rounds": 2, "files": [write_prompts(folder)]} | settings))
        trainer = make_trainer(folder, rounds, evaluation)
        module = make_module(tiny_janus, images_budget=32)
        trainer.fit(module, PairData(pairs_per_update=2))
        rows.append(
            {step: values["val/pairs/loss"] for step, values in trainer.logger.rows.items()}
        )
        if keeps:
            assert len(calls) == 1 + refreshed
            calls.clear()
    assert len(calls) == len(rows[0]) == 5
    assert rows[0] == rows[1]


def test_prompts_are_spread_over_the_files(tmp_path):
    evaluation = PairEvaluation(held_out(tmp_path), num_prompts=2)
    assert [prompt.text for prompt in evaluation.prompts] == [HELD_OUT[0], HELD_OUT[2]]
    assert len(PairEvaluation(held_out(tmp_path), num_prompts=100).prompts) == len(HELD_OUT)


# Refusals ---------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", lambda self: pytest.fail("weights were read"))


def test_another_module_is_refused(tiny_janus, tmp_path, no_weights):
    trainer = make_trainer(tmp_path, PairEvaluation(held_out(tmp_path)))
    with pytest.raises(ValueError, match="expected DPOModule beside PairEvaluation, got GRPOModul"):
        trainer.fit(make_grpo(tiny_janus), PromptData([write_prompts(tmp_path)]))


def test_a_module_without_reward_is_refused(tiny_janus, tmp_path, no_weights):
    trainer = make_trainer(tmp_path, PairEvaluation(held_out(tmp_path)))
    module = make_module(tiny_janus, reward=None)
    with pytest.raises(ValueError, match="expected a reward beside PairEvaluation, which scores"):
        trainer.fit(module, PairData(pairs_per_update=2))


@pytest.mark.parametrize("name", ["num_prompts", "pairs_per_batch", "every_n_updates"])
def test_settings_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        PairEvaluation(held_out(tmp_path), **{name: 0})
