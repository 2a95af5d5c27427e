"""The probe on shipped experiments, and its numbers and words on made-up scores."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation
from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from tests.toys import Brightness, make_grpo, make_trainer, numbered_prompts, write_prompts
from tools.probe import (
    LEAST_SHARE,
    MOST_DEAD,
    MOST_MISSING,
    Probe,
    Row,
    as_json,
    columns,
    format_rows,
    interpret,
    leave_out,
    measure,
    named_rewards,
    probe,
    spread_evenly,
)

NAN = math.nan


@pytest.fixture
def root(repository, monkeypatch):
    """The repository's root as working directory: prompt files start there."""
    monkeypatch.chdir(repository)
    return repository


# Experiments ------------------------------------------------------------------------------------


def test_probes_grpo_with_watched_rewards(root, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "probe.json"
    arguments = ["configs/grpo_shapes.yaml", "--prompts", "8", "--images", "4"]
    arguments += ["--json", str(file), "--trainer.default_root_dir", str(run)]
    arguments += ["--trainer.callbacks", "configs/evaluation/shapes_watched.yaml"]
    rows = probe(arguments)
    assert list(rows) == [
        "trained",
        "trained/strict",  # its other part, `graded`, is its total
        "watched/broad",
        "watched/narrow",
        "suites/shapes",
    ]
    trained, broad = rows["trained"], rows["watched/broad"]
    assert (trained.mean, trained.uplift) == (rows["suites/shapes"].mean, trained.uplift)
    assert 0.3 < trained.mean < 0.8 and trained.dead_groups < 0.5
    assert 0.2 < trained.agreement["watched/broad"] < 0.95
    assert 0 < broad.uplift["trained"] <= trained.uplift["trained"]
    assert not run.exists()
    output = capsys.readouterr().out
    assert "8 prompts x 4 images of configs/grpo_shapes.yaml" in output
    assert "suites/shapes_geneval: left out, for it cannot judge these prompts" in output
    assert output.count("\ntrained: can teach: ") == 1
    content = json.loads(file.read_text())
    assert content["prompts"] == 8 and list(content["left_out"]) == ["suites/shapes_geneval"]
    assert content["rewards"]["trained"]["uplift"] == trained.uplift


def test_probes_dpo_on_the_prompts_that_pairs_are_made_of(root, tmp_path):
    arguments = ["configs/dpo_shapes.yaml", "--prompts", "4", "--images", "2", "--batch_size", "4"]
    rows = probe([*arguments, "--trainer.default_root_dir", str(tmp_path / "run")])
    prompts = read_prompts(PromptFile("cotgen_pl/shapes/assets/prompts/train.jsonl", "jsonl"))
    numbered = [replace(prompts[index], index=index) for index in (0, 384, 768, 1152)]
    config = yaml.safe_load((root / "configs/dpo_shapes.yaml").read_text())
    module = make_grpo(root, ShapesOracle(), policy=JanusPolicy("cotgen_pl/shapes/assets/janus"))
    module.guidance = config["model"]["init_args"]["guidance"]
    module.configure_model()
    tokens, _ = module.draw(numbered, 2, "probe")
    repeated = [prompt for prompt in numbered for _ in range(2)]
    scores = module.reward.score(module.policy.decode(tokens), repeated)
    assert rows["trained"].mean == pytest.approx(scores.total.mean().item())
    assert not (tmp_path / "run").exists()


def test_an_experiment_that_draws_nothing_is_refused(root):
    with pytest.raises(ValueError, match="expected an experiment that draws pictures"):
        probe(["configs/sft_shapes.yaml"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["--images", "1"], "expected --images of 2 or more, got 1"),
        (["--prompts", "0"], "expected prompts of 1 or more, got 0"),
        (["--json", "nowhere/a.json"], "expected --json in a folder that is there"),
        (["--batch_size", "0"], "expected batch_size of 1 or more, got 0"),
    ],
)
def test_mistakes_are_refused_before_any_work(setting, message):
    with pytest.raises(ValueError, match=message):
        probe(["configs/grpo_shapes.yaml", *setting])


# Drawing ----------------------------------------------------------------------------------------


def test_draws_its_own_stream_whatever_the_batch(tiny_janus, tmp_path):
    prompts = numbered_prompts(4)
    module = make_grpo(tiny_janus)
    module.configure_model()
    tokens, _ = module.draw(prompts, 3, "probe")
    expected = module.policy.decode(tokens).mean((1, 2, 3)).float()
    for batch_size in (1, 100):
        drawing = Probe({"trained": Brightness()}, prompts, 3, batch_size)
        make_trainer(tmp_path, drawing).validate(make_grpo(tiny_janus), verbose=False)
        torch.testing.assert_close(drawing.verdicts["trained"].total, expected)
        assert list(drawing.verdicts["trained"].parts) == ["all", "red"]


def test_prompts_come_from_all_parts_of_the_files():
    prompts = [Prompt(str(number)) for number in range(10)]
    assert [prompt.text for prompt in spread_evenly(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread_evenly(prompts, 100) == prompts


def test_rewards_are_named_by_what_they_do(tiny_janus, tmp_path):
    file, judge, watched = write_prompts(tmp_path), Brightness(), Brightness()
    suites = [Suite(name, domain, [file], judge) for name, domain in (("a", "ood"), ("b", "shift"))]
    suites.append(Suite("c", "id", [file]))  # by the training reward
    evaluation = SuiteEvaluation(suites, watched={"w": watched})
    module = make_grpo(tiny_janus)
    rewards = named_rewards(module, [evaluation])
    assert rewards == {"trained": module.reward, "watched/w": watched, "suites/a": judge}
    with pytest.raises(ValueError, match="expected an experiment that names a reward, got none"):
        named_rewards(SimpleNamespace(reward=None), [])


def test_a_reward_that_no_run_could_train_on_is_refused():
    prompts = [Prompt("a red circle")]
    assert list(leave_out({"suites/a": ShapesOracle(), "trained": Brightness()}, prompts)) == [
        "suites/a"
    ]
    with pytest.raises(ValueError, match="prompt 0: expected the facts"):
        leave_out({"trained": ShapesOracle()}, prompts)


# Numbers and words ------------------------------------------------------------------------------


def test_rows_are_what_the_groups_say():
    own = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.0, NAN, NAN, NAN])
    other = torch.tensor([3.0, 1.0, 2.0, 4.0, 0.0, 0.0, 1.0, 3.0])
    rows = measure({"trained": own, "suites/a": other}, 2)
    trained, judge = rows["trained"], rows["suites/a"]
    assert trained.mean == pytest.approx(0.4)  # of five verdicts
    assert trained.spread == pytest.approx((0.5**0.5 + 0) / 2)  # of the two with a deviation
    assert (trained.dead_groups, trained.missing) == (0.75, 0.375)
    assert (judge.dead_groups, judge.missing) == (0.25, 0.0)
    assert trained.agreement == {"trained": 1.0, "suites/a": -1.0}  # the first group alone
    # Groups one to three: chosen less mean is 1 - 2, the mean of equals, a lone picture.
    assert trained.uplift["suites/a"] == pytest.approx(-1 / 3)
    assert judge.uplift["suites/a"] == pytest.approx((1 + 1 + 0 + 1) / 4)


def row(**changed) -> Row:
    numbers = {"mean": 0.5, "spread": 0.1, "dead_groups": 0.1, "missing": 0.0}
    return Row(**(numbers | {"agreement": {}, "uplift": {}} | changed))


def judged(share: float, own: float = 0.5) -> dict[str, Row]:
    """A trained reward that gains a judge some share of the judge's own uplift."""
    return {
        "trained": row(uplift={"trained": 1.0, "trained/part": 9.0, "suites/a": share * own}),
        "trained/part": row(uplift={"trained": 0.0, "trained/part": 9.0, "suites/a": 0.0}),
        "suites/a": row(uplift={"trained": 1.0, "trained/part": 0.0, "suites/a": own}),
    }


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"missing": MOST_MISSING + 0.1}, "would stop a run: 60% of the pictures have no verdict"),
        ({"dead_groups": MOST_DEAD + 0.2}, "will teach little: 70% of the groups are dead"),
        ({"dead_groups": MOST_DEAD}, "can teach: 50% of the groups are dead"),
    ],
)
def test_words_for_a_reward_by_itself(changed, words):
    assert interpret("trained", {"trained": row(**changed, uplift={"trained": 0.1})}, 8) == words


def test_words_for_a_reward_beside_a_judge():
    below, above = LEAST_SHARE - 0.05, LEAST_SHARE + 0.05
    assert interpret("trained", judged(below), 8) == (
        "may rise without suites/a: best of 8 by it gains that one 30% of what its own choice would"
    )
    assert interpret("trained", judged(-0.1), 8).startswith("may rise without suites/a")
    assert interpret("trained", judged(above), 8) == (
        "can teach: 10% of the groups are dead, and best of 8 by it gains suites/a 40% of what its "
        "own choice would"
    )
    # A judge that finds no best picture has nothing to gain.
    assert interpret("trained", judged(0.0, own=0.0), 8).endswith("of the groups are dead")
    # Neither itself nor the trained reward's parts are judges.
    assert interpret("suites/a", judged(0.0), 8) == "can teach: 10% of the groups are dead"


def test_parts_are_shown_of_the_trained_reward_alone():
    total, other = torch.tensor([0.5, NAN]), torch.tensor([0.0, 1.0])
    scores = Scores(total, {"same": total.clone(), "other": other}, {"same": 1.0, "other": 0.0})
    found = columns({"trained": scores, "watched/w": scores})
    assert list(found) == ["trained", "trained/other", "watched/w"]


def test_table_and_json_of_unknown_numbers():
    rows = {"trained": row(mean=NAN, agreement={"trained": NAN}, uplift={"trained": NAN})}
    rows["trained"].meaning = "says nothing"
    lines = [line.split() for line in format_rows(rows, 8).splitlines()]
    assert lines[:2] == [
        ["mean", "spread", "dead", "missing"],
        ["[1]", "trained", "nan", "0.100", "10%", "0%"],
    ]
    assert ["[1]", "trained", "+nan"] in lines
    assert lines[-1] == ["trained:", "says", "nothing"]
    content = json.loads(as_json(rows, {"suites/a": "why"}, prompts=3))
    assert content["rewards"]["trained"]["agreement"] == {"trained": None}
    assert (content["prompts"], content["left_out"]) == (3, {"suites/a": "why"})
