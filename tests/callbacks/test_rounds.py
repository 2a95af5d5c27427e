"""Runs in rounds: what each one starts from, draws and leaves, and which are refused."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from cotgen_pl.adapters import LoraSettings, lend_weights
from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation
from cotgen_pl.callbacks.pair_building import PairSettings
from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.pairs import PairData
from cotgen_pl.data.prompts import PromptData
from cotgen_pl.interfaces import Prompt
from cotgen_pl.modules.sft import SFTModule
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    TEXTS,
    Brightness,
    Fixed,
    Snapshots,
    make_dpo,
    make_grpo,
    make_policy,
    make_trainer,
    sgd,
    write_pairs,
    write_prompts,
)

GROUP, PROMPTS, PER_UPDATE, EPOCHS = 4, 4, 2, 2  # in a round: 16 images, 4 pairs, 4 updates
UPDATES = EPOCHS * PROMPTS // PER_UPDATE
LORA = LoraSettings(rank=2, alpha=16)


def rounds_of(folder: Path, **settings: Any) -> IterativeRounds:
    pairs = PairSettings(prompts_per_shard=3, images_per_batch=8)
    return IterativeRounds(
        **({"rounds": 2, "files": [write_prompts(folder)], "pairs": pairs} | settings)
    )


def fit_pairs(module: Any, folder: Path, *callbacks: Callback) -> dict[int, dict[str, float]]:
    trainer = make_trainer(folder, *callbacks)
    trainer.fit(module, PairData(pairs_per_update=PER_UPDATE, epochs=EPOCHS))
    return trainer.logger.rows


def make_ranked(tiny_janus: Path, **arguments: Any) -> Any:
    """DPO on two rounds of 16 images, the brighter the better."""
    return make_dpo(tiny_janus, **({"reward": Brightness(), "images_budget": 32} | arguments))


def pair_set(folder: Path, number: int) -> PairSet:
    return PairSet(folder / "rounds" / str(number) / "pairs")


def everything(pairs: PairSet) -> Any:
    return pairs.batch(range(len(pairs)))


# What a round starts from -----------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["live", "stored"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_the_second_round_starts_where_the_first_ended(tiny_janus, tmp_path, lora, reference):
    policy = make_policy(tiny_janus, lora=lora)
    module = make_ranked(tiny_janus, policy=policy, reference_logps=reference)
    snapshots = Snapshots()
    rows = fit_pairs(module, tmp_path, rounds_of(tmp_path), snapshots)
    assert module.rollouts == 2 * UPDATES
    for number in range(2):
        start = {
            name.removeprefix("policy."): values
            for name, values in snapshots.weights[number * UPDATES].items()
        }
        pairs = everything(pair_set(tmp_path, number))
        with lend_weights(module.policy, start):
            again, _ = module.draw(pairs.prompts, GROUP, f"pairs of round {number}")
            expected = module._sums(module.policy, pairs)
            assert hash_weights(module.policy) == records_of(tmp_path)[number]["policy"]
        drawn = again.view(len(pairs), GROUP, -1).tolist()
        for row, tokens in enumerate(drawn):
            assert pairs.chosen[row].tolist() in tokens and pairs.rejected[row].tolist() in tokens
        if number == 1:  # the reference that is left is the last round's
            torch.testing.assert_close(
                module._reference_of(pairs), expected, rtol=0, atol=1e-5, check_dtype=False
            )
        first = rows[number * UPDATES + 1]
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert rows[number * UPDATES + 2]["train/rewards/margins"] != 0
    assert tokens_of(tmp_path, 0) != tokens_of(tmp_path, 1)


def tokens_of(folder: Path, number: int) -> list[Any]:
    return everything(pair_set(folder, number)).chosen.tolist()


@pytest.mark.parametrize("reference", ["live", "stored"])
def test_a_reference_that_is_kept_is_the_run_s_start(tiny_janus, tmp_path, reference):
    module = make_ranked(tiny_janus, reference_logps=reference)
    rows = fit_pairs(module, tmp_path, rounds_of(tmp_path, reference="keep"))
    pairs = everything(pair_set(tmp_path, 1))
    expected = module._sums(make_policy(tiny_janus).load(), pairs)
    torch.testing.assert_close(
        module._reference_of(pairs), expected, rtol=0, atol=1e-5, check_dtype=False
    )
    assert abs(rows[UPDATES + 1]["train/loss"] - math.log(2)) > 1e-4


class Watch(Callback):
    """Notes, before each update, the learning rate and the optimizer's steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        states = list(optimizer.state.values())
        self.steps.append(int(states[0]["step"]) if states else 0)


@pytest.mark.parametrize("optimizer", ["keep", "reset"])
@pytest.mark.parametrize("schedule", ["keep", "reset"])
def test_optimizer_and_schedule_go_on_or_start_over(tiny_janus, tmp_path, optimizer, schedule):
    module = make_ranked(
        tiny_janus,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    watch = Watch()
    fit_pairs(module, tmp_path, rounds_of(tmp_path, optimizer=optimizer, schedule=schedule), watch)
    once, twice = [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]
    assert watch.steps == (twice if optimizer == "keep" else once * 2)
    halvings = twice if schedule == "keep" else once * 2
    assert watch.rates == pytest.approx([0.01 * 0.5**number for number in halvings])


# What a round leaves ----------------------------------------------------------------------------


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def suites(folder: Path) -> SuiteEvaluation:
    files = [write_prompts(folder)]
    named = [Suite("a", "id", files, Brightness()), Suite("b", "ood", files, Brightness())]
    numbers = {"images_per_prompt": 1, "final_images_per_prompt": 2}
    return SuiteEvaluation(named, every_n_updates=3, **numbers, leaks="warn")


def test_each_round_leaves_a_record(tiny_janus, tmp_path):
    module = make_ranked(tiny_janus)
    rows = fit_pairs(module, tmp_path, rounds_of(tmp_path), suites(tmp_path))
    records = records_of(tmp_path)
    assert [record["round"] for record in records] == [0, 1]
    for number, record in enumerate(records):
        pairs = pair_set(tmp_path, number)
        assert record["path"] == f"rounds/{number}/pairs"
        assert record["policy"] == pairs.settings["policy"]
        expected = {"prompts": PROMPTS, "images": 16, "pairs": 4}
        expected["dropped"] = {"missing": 0, "equal": 0, "margin": 0}
        assert {name: record[name] for name in expected} == expected == pairs.counts
        scores = everything(pairs).scores
        assert record["mean_margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item())
        assert record["mean_margin"] > 0
        assert record["images_sampled"] == 16 * (number + 1)
        end = UPDATES * (number + 1)
        assert record["updates"] == end
        for name in ("val/id/mean", "val/ood/mean"):
            assert record[name] == rows[end][name]
    assert records[0]["policy"] != records[1]["policy"]
    assert rows[UPDATES]["perf/images_sampled"] == 16
    assert rows[UPDATES + 1]["perf/images_sampled"] == 32
    assert rows[2 * UPDATES]["perf/images_redrawn"] == 0
    assert rows[UPDATES + 1]["perf/pairs_s"] > 0 and rows[UPDATES + 2]["perf/pairs_s"] == 0


def test_new_prompts_are_taken_until_all_have_been_had(tiny_janus, tmp_path):
    drawn = {}
    for prompts in ("new", "same"):
        folder = tmp_path / prompts
        folder.mkdir()
        module = make_ranked(tiny_janus, images_budget=16, optimizer=sgd(0.0))
        fit_pairs(module, folder, rounds_of(folder, prompts=prompts))  # two of four in a round
        drawn[prompts] = [list(pair_set(folder, number).prompts()) for number in range(2)]
    (first, second), (same, again) = drawn["new"], drawn["same"]
    assert sorted(prompt.text for prompt in first + second) == sorted(TEXTS)
    assert [prompt.text for prompt in same] == [prompt.text for prompt in again]
    assert [prompt.text for prompt in same] == [prompt.text for prompt in first]
    one, two = (everything(pair_set(tmp_path / "same", number)) for number in range(2))
    assert not torch.equal(one.chosen, two.chosen)  # the same policy: other noise


def test_a_budget_beyond_all_prompts_takes_them_again_with_other_noise(tiny_janus, tmp_path):
    module = make_ranked(tiny_janus, images_budget=32)
    fit_pairs(module, tmp_path, rounds_of(tmp_path, rounds=1))
    prompts = list(pair_set(tmp_path, 0).prompts())
    assert sorted(p.text for p in prompts) == sorted(TEXTS * 2)
    assert sorted(p.occurrence for p in prompts) == [0] * 4 + [1] * 4
    assert len({tuple(tokens) for tokens in tokens_of(tmp_path, 0)}) > 4


def test_a_finished_set_trains_without_rounds_as_it_did_with_them(tiny_janus, tmp_path):
    one, two = make_ranked(tiny_janus), make_ranked(tiny_janus, reward=None)
    fit_pairs(one, tmp_path / "one", rounds_of(tmp_path, rounds=1))
    trainer = make_trainer(tmp_path / "two")
    path = str(tmp_path / "one/rounds/0/pairs")
    trainer.fit(two, PairData(path, pairs_per_update=PER_UPDATE, epochs=EPOCHS))
    for name, values in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], values)
    assert not list((tmp_path / "two").glob("rounds*"))
    assert trainer.logger.rows[1]["perf/images_sampled"] == 32


def test_fine_tuning_learns_the_chosen_pictures(tiny_janus, tmp_path):
    settings = {"images_budget": 32, "group_size": 4, "condition_dropout": 0.0}
    module = SFTModule(make_policy(tiny_janus), Brightness(), optimizer=sgd(0.5), **settings)
    rows = fit_pairs(module, tmp_path, rounds_of(tmp_path))
    assert [record["updates"] for record in records_of(tmp_path)] == [UPDATES, 2 * UPDATES]
    assert module._reference_weights == {}  # nothing compares: no copy of the weights is kept
    first, second = (sum(rows[step]["train/loss"] for step in steps) for steps in ((1, 2), (3, 4)))
    assert second < first  # the same pictures once more


# Refusals ---------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", lambda self: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    ("rounds", "arguments", "message"),
    [
        ({"files": None}, {}, "expected files with prompts for IterativeRounds, got none"),
        ({}, {"reward": None}, "expected a reward beside IterativeRounds, which scores pictures"),
        ({"rounds": 8}, {}, "at least 2 pairs, those of one update, in a round, got at most 1"),
        ({"rounds": 9}, {}, "expected images_budget of at least 36, a group for each of 9 rounds"),
    ],
)
def test_rounds_that_cannot_be_are_refused(
    tiny_janus, tmp_path, no_weights, rounds, arguments, message
):
    module = make_ranked(tiny_janus, **arguments)
    with pytest.raises(ValueError, match=message):
        fit_pairs(module, tmp_path, rounds_of(tmp_path, **rounds))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "expected rounds of 1 or more, got 0"),
        ({"reference": "old"}, "expected reference to be one of"),
        ({"optimizer": "new"}, "expected optimizer to be one of"),
        ({"schedule": "new"}, "expected schedule to be one of"),
        ({"prompts": "other"}, "expected prompts to be one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        rounds_of(tmp_path, **settings)


def test_rounds_beside_a_finished_set_are_refused(tiny_janus, tmp_path, no_weights):
    data = PairData(str(write_pairs(tmp_path / "set", 4).folder), pairs_per_update=2)
    with pytest.raises(ValueError, match="without path or source for 2 rounds, which draw pairs"):
        make_trainer(tmp_path, rounds_of(tmp_path, rounds=2)).fit(make_ranked(tiny_janus), data)


def test_one_round_draws_nothing_beside_a_finished_set(tiny_janus, tmp_path):
    data = PairData(str(write_pairs(tmp_path / "set", 4).folder), pairs_per_update=2)
    module = make_ranked(tiny_janus)
    make_trainer(tmp_path, rounds_of(tmp_path, rounds=1)).fit(module, data)
    assert module.rollouts == 2
    assert not (tmp_path / "rounds").exists()
    [record] = records_of(tmp_path)
    counts = {"prompts": 4, "images": 8, "pairs": 4, "dropped": {}}
    expected = counts | {"path": "set", "mean_margin": 1.0, "round": 0, "updates": 2}
    assert {name: record[name] for name in expected} == expected


def test_a_past_round_whose_pairs_are_not_there_says_what_to_copy(tmp_path):
    rounds = rounds_of(tmp_path)
    rounds.round = 1
    message = r"expected the pairs of a finished round, .*rounds/0/pairs.*; copy the rounds/ folder"
    with pytest.raises(ValueError, match=message.replace("; copy", ".* copy")):
        next(rounds.pair_sets(make_trainer(tmp_path), None))


def test_rounds_beside_other_data_are_refused(tiny_janus, tmp_path, no_weights):
    data = PromptData([write_prompts(tmp_path)])
    module = make_ranked(tiny_janus)
    module.prompts_per_batch, module.num_rollouts = 2, 2
    with pytest.raises(ValueError, match="expected IterativeRounds beside GRPOModule with Prompt"):
        make_trainer(tmp_path, rounds_of(tmp_path)).fit(module, data)


def test_pairs_from_nowhere_are_refused(tiny_janus, tmp_path, no_weights):
    with pytest.raises(ValueError, match="expected pairs to train on, got none; name a finished"):
        fit_pairs(make_ranked(tiny_janus), tmp_path)


def test_facts_that_the_reward_lacks_are_refused(tiny_janus, tmp_path, no_weights):
    reward = Brightness()
    reward.required_facts = ("objects",)
    with pytest.raises(ValueError, match=r"prompts.txt:1: expected the facts \['objects'\]"):
        fit_pairs(make_ranked(tiny_janus, reward=reward), tmp_path, rounds_of(tmp_path))


def test_a_round_without_pairs_says_what_was_dropped(tiny_janus, tmp_path):
    module = make_ranked(tiny_janus, reward=Fixed([1.0]))
    with pytest.raises(ValueError, match="got none of 16 pictures; dropped: 0 missing, 4 equal"):
        fit_pairs(module, tmp_path, rounds_of(tmp_path))


# GRPO -------------------------------------------------------------------------------------------


def fit_grpo(module: Any, folder: Path, *callbacks: Callback, texts: Any = TEXTS) -> Any:
    trainer = make_trainer(folder, *callbacks)
    trainer.fit(module, PromptData([write_prompts(folder, texts)]))
    return trainer.logger.rows


class Prompts(Callback):
    """Notes the prompts of each batch."""

    def __init__(self) -> None:
        self.texts: list[set[str]] = []

    def on_train_batch_start(self, trainer, pl_module, batch: list[Prompt], batch_idx):
        self.texts.append({prompt.text for prompt in batch})


@pytest.mark.parametrize("lora", [None, LORA])
def test_grpo_compares_with_the_start_of_the_round(tiny_janus, tmp_path, lora):
    policy = make_policy(tiny_janus, lora=lora)
    module = make_grpo(tiny_janus, policy=policy, images_budget=40, kl_coef=0.1, optimizer=sgd(1.0))
    rows = fit_grpo(module, tmp_path, IterativeRounds(rounds=2, prompts="same"), suites(tmp_path))
    divergences = [rows[step]["train/kl"] for step in range(1, 6)]  # rounds of three and two
    assert [abs(divergences[step]) < 1e-12 for step in range(5)] == [
        True,
        False,
        False,
        True,
        False,
    ]
    records = records_of(tmp_path)
    assert [record["updates"] for record in records] == [3, 5]
    assert [record["images_sampled"] for record in records] == [24, 40]
    assert records[0]["policy"] != records[1]["policy"]
    for record in records:
        assert record["val/id/mean"] == rows[record["updates"]]["val/id/mean"]


def test_a_kept_reference_is_that_of_the_run_s_start(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, images_budget=32, kl_coef=0.1, optimizer=sgd(1.0))
    rows = fit_grpo(module, tmp_path, IterativeRounds(rounds=2, reference="keep"))
    assert all(rows[step]["train/kl"] > 1e-6 for step in (2, 3, 4))


def test_each_round_of_grpo_has_prompts_of_its_own(tiny_janus, tmp_path):
    texts = ("a red circle", "two cats", "a blue square", "cats", "two red cats", "a circle")
    seen = Prompts()
    module = make_grpo(tiny_janus, images_budget=72, optimizer=sgd(0.0))
    rounds = IterativeRounds(rounds=3)
    fit_grpo(module, tmp_path, rounds, seen, texts=texts)
    parts = [set().union(*seen.texts[3 * number : 3 * number + 3]) for number in range(3)]
    assert parts == [{texts[k], texts[k + 3]} for k in range(3)]


@pytest.mark.parametrize(("rollouts", "rounds"), [(4, 3), (7, 3), (5, 5)])
def test_rounds_are_as_equal_as_they_can_be(tiny_janus, tmp_path, rollouts, rounds):
    seen = Prompts()
    module = make_grpo(tiny_janus, images_budget=8 * rollouts, optimizer=sgd(0.0))
    fit_grpo(module, tmp_path, IterativeRounds(rounds=rounds), seen, texts=(*TEXTS, "a red square"))
    ends = [0, *(record["updates"] for record in records_of(tmp_path))]
    sizes = [end - start for start, end in pairwise(ends)]
    assert len(sizes) == rounds and sum(sizes) == rollouts and max(sizes) - min(sizes) <= 1
    parts = [set().union(*seen.texts[a:b]) for a, b in pairwise(ends)]
    assert sum(map(len, parts)) == len(set().union(*parts))  # no prompt in two rounds


@pytest.mark.parametrize(
    ("rounds", "arguments", "message"),
    [
        ({"prompts": "same"}, {"kl_coef": 0.0}, "expected GRPO rounds that change something"),
        ({"prompts": "same", "reference": "keep"}, {"kl_coef": 0.1}, "that change something"),
        ({"rounds": 1}, {"kl_coef": 0.1}, "that change something, got 1 "),
        (
            {"rounds": 5, "prompts": "same"},
            {"kl_coef": 0.1},
            "at least 5 rollouts, .* got keep and 4",
        ),
        ({}, {"dead_groups": "resample"}, "expected dead_groups: keep or mask .* got resample"),
        ({"files": [{}]}, {}, "expected no files for IterativeRounds beside GRPOModule"),
    ],
)
def test_grpo_rounds_that_cannot_be_are_refused(
    tiny_janus, tmp_path, no_weights, rounds, arguments, message
):
    if "files" in rounds:
        rounds = {"files": [write_prompts(tmp_path)]}
    module = make_grpo(tiny_janus, images_budget=32, **arguments)
    with pytest.raises(ValueError, match=message):
        fit_grpo(module, tmp_path, IterativeRounds(**({"rounds": 2} | rounds)))


def test_fewer_prompts_than_rounds_are_refused(tiny_janus, tmp_path, no_weights):
    module = make_grpo(tiny_janus, images_budget=64)
    with pytest.raises(ValueError, match="at least one prompt for each of 5 rounds, got 4"):
        fit_grpo(module, tmp_path, IterativeRounds(rounds=5))
