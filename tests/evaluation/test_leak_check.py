"""Training prompts that a suite holds out: told, left out, and the same after an interruption."""

import json
import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from cotgen_pl.callbacks.evaluation import SuiteEvaluation
from cotgen_pl.callbacks.pair_building import PairSettings
from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.data.foreign_pairs import ForeignPairs
from cotgen_pl.data.pairs import PairData
from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.evaluation.leak_check import LeakCheck
from cotgen_pl.evaluation.suites import Suite
from cotgen_pl.interfaces import Prompt
from cotgen_pl.leaks import PromptSource
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    TEXTS,
    Brightness,
    StopAt,
    make_dpo,
    make_grpo,
    make_trainer,
    write_pairs,
    write_prompts,
)

LEAKED = "Two  CATS."  # TEXTS[1]
NEAR = "the red circle"  # TEXTS[0]


class HoldOut(Callback):
    """Holds prompts out, as an evaluation does."""

    def __init__(self, *texts: str, name: str = "toys", action: str = "drop") -> None:
        self.suites = [Suite(name, "ood", []), Suite("probe", "shift", [])]
        prompts = [Prompt(text, suite=name, index=i) for i, text in enumerate(texts)]
        self.prompts = {name: prompts, "probe": [Prompt(text) for text in TEXTS]}
        self.check = LeakCheck(action)

    def setup(self, trainer, pl_module, stage):
        self.check.run(trainer, self.suites, self.prompts)

    def on_train_start(self, trainer, pl_module):
        self.check.write(trainer)


class Drawn(Callback):
    """Notes the prompts of all batches."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.texts += [prompt.text for prompt in batch]


def fit_texts(tiny_janus, folder, texts, *callbacks, **arguments) -> tuple:
    """Four rollouts on two texts each; gives what was drawn and learnt."""
    folder.mkdir(exist_ok=True)
    module, drawn = make_grpo(tiny_janus, images_budget=32), Drawn()
    data = PromptData([write_prompts(folder, tuple(texts))])
    trainer = make_trainer(folder, *callbacks, drawn)
    trainer.fit(module, data, **arguments)
    return drawn.texts, module.state_dict()


def read_record(folder) -> dict:
    return json.loads((folder / "leaks.json").read_text())["toys"]


# Prompts ----------------------------------------------------------------------------------------


def test_a_run_is_as_if_the_file_had_no_leaks(tiny_janus, tmp_path):
    message = (
        r"1 of 4 training prompts equal 1 held-out prompts of toys: 'two cats' .*prompts.txt:2"
    )
    with pytest.warns(UserWarning, match=message):
        drawn, weights = fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(LEAKED, "a dog"))
    rest = [text for text in TEXTS if text != "two cats"]
    same_drawn, same_weights = fit_texts(tiny_janus, tmp_path, rest)
    assert drawn == same_drawn and set(drawn) == set(rest)
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    [entry] = read_record(tmp_path)["equal"]
    assert entry == {
        "suite": "toys",
        "held_out": LEAKED,
        "held_out_at": "prompt 0",
        "train": "two cats",
        "train_at": f"{tmp_path / 'prompts.txt'}:2",
    }


def test_weights_go_with_their_prompts_and_predict_keeps_all(tmp_path):
    files = []
    for name, weight, texts in (("a", 1.0, "one\ntwo"), ("b", 3.0, "Two\nthree")):
        (tmp_path / name).write_text(texts)
        files.append(PromptFile(str(tmp_path / name), "text", weight=weight))
    data = PromptData(files)
    data.drop_prompts(lambda prompt: prompt.text.lower() == "two")
    kept = [(p.text, p.index, w) for p, w in zip(data.prompts, data.weights, strict=True)]
    assert kept == [("one", 0, 1.0), ("three", 1, 3.0)]
    assert [p.text for p in data.train_prompts()] == ["one", "two", "Two", "three"]
    assert len(data.predict_prompts) == 4
    data.parts = 2
    with pytest.raises(ValueError, match="at least 2 prompts"):
        data.drop_prompts(lambda prompt: prompt.text == "one")


def test_two_suites_drop_what_either_holds_out(tiny_janus, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        drawn, _ = fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(LEAKED), HoldOut("cats"))
    assert set(drawn) == {TEXTS[0], TEXTS[2]}


def test_warn_trains_on_leaks_and_says_so(tiny_janus, tmp_path):
    with pytest.warns(UserWarning, match="they are trained on, and lift the scores"):
        drawn, _ = fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(LEAKED, action="warn"))
    assert set(drawn) == set(TEXTS)
    record = read_record(tmp_path)
    assert record["leaks"] == "warn" and len(record["equal"]) == 1


def test_stop_ends_a_run_before_weights_load(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", None)
    with pytest.raises(ValueError, match=r"1 of 4 training prompts equal .* set leaks: drop"):
        fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(LEAKED, action="stop"))
    assert not (tmp_path / "leaks.json").exists()


def test_nothing_left_to_train_on_stops_a_run(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", None)
    with pytest.raises(ValueError, match=r"got 0 of 4; .* set leaks: warn"):
        fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(*TEXTS))


def test_nearly_equal_prompts_are_told_and_kept(tiny_janus, tmp_path, caplog, recwarn):
    with caplog.at_level(logging.INFO):
        drawn, _ = fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut(NEAR, "a dog", action="stop"))
    assert set(drawn) == set(TEXTS)
    assert "1 held-out prompts are nearly equal to training prompts, which are kept" in caplog.text
    assert not [warning for warning in recwarn if "leaks" in str(warning.message)]
    [entry] = read_record(tmp_path)["near"]
    assert (entry["kind"], entry["train"], entry["held_out"]) == ("same words", TEXTS[0], NEAR)


def test_a_run_without_leaks_leaves_no_record(tiny_janus, tmp_path):
    fit_texts(tiny_janus, tmp_path, TEXTS, HoldOut("a dog"))
    assert not (tmp_path / "leaks.json").exists()


def test_records_of_several_suites_stand_side_by_side(tiny_janus, tmp_path):
    first, second = HoldOut(LEAKED, name="other"), HoldOut("cats")
    with pytest.warns(UserWarning, match="leaks"):
        fit_texts(tiny_janus, tmp_path, TEXTS, first, second)
    records = json.loads((tmp_path / "leaks.json").read_text())
    held_out = {name: record["equal"][0]["held_out"] for name, record in records.items()}
    assert held_out == {"other": LEAKED, "toys": "cats"}


# Resuming ---------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_without_them(tiny_janus, tmp_path):
    whole, _ = fit_texts(tiny_janus, tmp_path / "whole", TEXTS, HoldOut(LEAKED))
    checkpoint = ModelCheckpoint(tmp_path / "run", save_last=True, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="went down"):
        fit_texts(tiny_janus, tmp_path / "run", TEXTS, HoldOut(LEAKED), checkpoint, StopAt(3))
    last = str(tmp_path / "run" / "last.ckpt")
    rest, _ = fit_texts(tiny_janus, tmp_path / "run", TEXTS, HoldOut(LEAKED), ckpt_path=last)
    assert rest == whole[4:]
    for other in (HoldOut(LEAKED, "cats"), HoldOut("a dog"), HoldOut(LEAKED, action="warn")):
        with pytest.raises(
            ValueError, match="expected to go on with the prompts that the run began with"
        ):
            fit_texts(tiny_janus, tmp_path / "run", TEXTS, other, ckpt_path=last)


def test_a_checkpoint_is_drawn_from_whatever_it_was_trained_on(tmp_path):
    data, other = (PromptData([write_prompts(tmp_path, texts)]) for texts in (("a",), ("b",)))
    other.trainer = make_trainer(tmp_path)
    other.trainer.state.fn = "predict"
    other.load_state_dict(data.state_dict())
    other.trainer.state.fn = "fit"
    other.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"got others \(1 of them\)"):
        other.load_state_dict(data.state_dict())


# Pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds_first", [True, False])
def test_rounds_draw_no_pairs_of_leaked_prompts(tiny_janus, tmp_path, rounds_first):
    rounds = IterativeRounds(
        files=[write_prompts(tmp_path)], pairs=PairSettings(prompts_per_shard=3, images_per_batch=8)
    )
    callbacks = [rounds, HoldOut(LEAKED)]
    module = make_dpo(tiny_janus, reward=Brightness(), images_budget=24)
    trainer = make_trainer(tmp_path, *(callbacks if rounds_first else callbacks[::-1]))
    with pytest.warns(UserWarning, match="they are left out of training"):
        trainer.fit(module, PairData(pairs_per_update=2))
    pairs = PairSet(tmp_path / "rounds/0/pairs")
    assert pairs.counts["prompts"] == 6
    assert {p.text for p in pairs.prompts()} == {t for t in TEXTS if t != "two cats"}
    assert sorted({p.index for p in pairs.prompts()}) == [0, 1, 2]


def test_rounds_are_not_resumed_with_other_prompts(tiny_janus, tmp_path):
    def run(*callbacks: Callback, **arguments) -> None:
        files = [write_prompts(tmp_path)]
        module = make_dpo(tiny_janus, reward=Brightness(), images_budget=32)
        trainer = make_trainer(tmp_path, IterativeRounds(2, files), *callbacks)
        trainer.fit(module, PairData(pairs_per_update=2), **arguments)

    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="went down"):
        run(HoldOut(LEAKED), checkpoint, StopAt(2))
    last = str(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="expected to go on with the prompts"):
        run(HoldOut("a dog"), ckpt_path=last)
    run(HoldOut(LEAKED), ckpt_path=last)
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 2


def test_finished_pairs_of_leaked_prompts_are_refused(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", None)
    write_pairs(tmp_path / "pairs", 4)
    data = PairData(str(tmp_path / "pairs"), pairs_per_update=2)
    module = make_dpo(tiny_janus)
    with pytest.raises(ValueError, match=r"expected finished pairs .*, got 1 of others; build"):
        make_trainer(tmp_path, HoldOut("Prompt 2")).fit(module, data)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="they are trained on"):
        make_trainer(tmp_path, HoldOut("Prompt 2", action="warn")).fit(module, data)


def test_captions_of_foreign_pairs_are_looked_at(tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text("\n".join(json.dumps({"caption": text}) for text in TEXTS))
    data = PairData(source=ForeignPairs(str(path)))
    assert [prompt.text for prompt in data.train_prompts()] == list(TEXTS)
    with pytest.raises(ValueError, match="got 1 of others"):
        data.drop_prompts(lambda prompt: prompt.text == "cats")


def test_all_that_holds_training_prompts_is_found(tmp_path):
    rounds = IterativeRounds(files=[write_prompts(tmp_path)])
    for source in (PromptData([write_prompts(tmp_path)]), PairData(), rounds):
        assert isinstance(source, PromptSource)
    assert list(PairData().train_prompts()) == []


def test_an_evaluation_keeps_what_it_scores_out_of_training(tiny_janus, tmp_path):
    (tmp_path / "held_out.txt").write_text(f"{LEAKED}\na dog")
    (tmp_path / "probe.txt").write_text(TEXTS[0])
    suites = [
        Suite("far", "ood", [PromptFile(str(tmp_path / "held_out.txt"), "text")], Brightness()),
        Suite("probe", "shift", [PromptFile(str(tmp_path / "probe.txt"), "text")], Brightness()),
    ]
    evaluation = SuiteEvaluation(suites, final_images_per_prompt=1, kl_images=0)
    with pytest.warns(UserWarning, match=r"equal 1 held-out prompts of far: .*held_out.txt:1"):
        drawn, _ = fit_texts(tiny_janus, tmp_path, TEXTS, evaluation)
    assert set(drawn) == {text for text in TEXTS if text != "two cats"}
    records = json.loads((tmp_path / "leaks.json").read_text())
    assert [entry["held_out"] for entry in records["far"]["equal"]] == [LEAKED]
    with pytest.raises(ValueError, match="set leaks: drop"):
        stopping = SuiteEvaluation(suites, final_images_per_prompt=1, leaks="stop")
        fit_texts(tiny_janus, tmp_path, TEXTS, stopping)


def test_an_unknown_action_is_refused():
    with pytest.raises(ValueError, match=r"expected leaks to be one of .*, got 'ignore'"):
        LeakCheck("ignore")
