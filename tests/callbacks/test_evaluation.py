"""Scores in the loop, against brute force on a tiny Janus."""

import json
import math

import pytest
import torch
from lightning.pytorch import Callback

from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation, format_table
from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.evaluation.divergence import divergence
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.modules.sft import SFTModule
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    Brightness,
    Fixed,
    attach_grpo,
    fit,
    make_grpo,
    make_policy,
    make_trainer,
    sgd,
)

ROWS = [("a red circle", "color"), ("two cats", "count"), ("cats", "count"), ("blue", "color")]


class Marked(Reward):
    """Brightness, without a verdict on prompts that hold `missing`; needs the fact `mark`."""

    required_facts = ("mark",)

    def score(self, images, prompts):
        values = images.mean((1, 2, 3)).float()
        missing = torch.tensor(["missing" in prompt.text for prompt in prompts])
        return Scores.single("marked", values.masked_fill(missing, math.nan))


def write_rows(folder, rows=ROWS, **facts) -> PromptFile:
    path = folder / "held_out.jsonl"
    lines = [json.dumps({"prompt": text, "category": kind, **facts}) for text, kind in rows]
    path.write_text("\n".join(lines))
    return PromptFile(str(path), "jsonl")


def evaluation_of(folder, **arguments) -> SuiteEvaluation:
    file = write_rows(folder)
    suites = [
        Suite("near", "id", [file], Brightness()),
        Suite("far", "ood", [write_rows_reversed(folder)], Brightness()),
        Suite("moved", "shift", [file], Brightness()),
    ]
    settings = {"images_per_prompt": 2, "final_images_per_prompt": 3, "batch_size": 5}
    settings["leaks"] = "warn"  # of `tests.toys.TEXTS`
    return SuiteEvaluation(suites, **(settings | arguments))


def write_rows_reversed(folder) -> PromptFile:
    path = folder / "far.txt"
    path.write_text("\n".join(text for text, _ in ROWS[::-1][:3]))
    return PromptFile(str(path), "text", category="any")


def brute_force(module, texts, copies) -> torch.Tensor:
    """Brightness of each image, one prompt at a time, [prompts, copies]."""
    rows = []
    for index, text in enumerate(texts):
        tokens, _ = module.draw([Prompt(text, index=index)], copies, "evaluation")
        rows.append(module.policy.decode(tokens).mean((1, 2, 3)))
    return torch.stack(rows)


@pytest.fixture
def module(tiny_janus, tmp_path):
    """A module that is loaded and attached to a trainer."""
    return attach_grpo(tiny_janus, tmp_path)


def disturb(module, size=0.2) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module._trained().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * noise)


# Scores -----------------------------------------------------------------------------------------


def test_means_over_images_categories_and_suites(module, tmp_path):
    metrics = evaluation_of(tmp_path).evaluate(module, thoroughly=True)
    near = brute_force(module, [text for text, _ in ROWS], 3)
    far = brute_force(module, [text for text, _ in ROWS[::-1][:3]], 3)
    color, count = near[[0, 3]].mean().item(), near[[1, 2]].mean().item()
    expected = {
        "val/id/near/color": color,
        "val/id/near/count": count,
        "val/id/near/mean": (color + count) / 2,
        "val/id/mean": (color + count) / 2,
        "val/ood/far/any": far.mean().item(),
        "val/ood/mean": far.mean().item(),
        "val/gap": (color + count) / 2 - far.mean().item(),
        "val/shift/moved/mean": (color + count) / 2,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert "val/shift/mean" not in metrics
    assert metrics["val/id/near/parts/red"] != metrics["val/id/near/mean"]
    assert module.trainer.logger.rows[0] == metrics


def test_domain_mean_is_over_suites_not_over_images(module, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("blue\n")
    suites = [
        Suite("one", "id", [write_rows(tmp_path)], Brightness()),
        Suite("two", "id", [PromptFile(str(few), "text")], Brightness()),
    ]
    metrics = SuiteEvaluation(suites).evaluate(module, thoroughly=False)
    two = [metrics["val/id/one/mean"], metrics["val/id/two/mean"]]
    assert metrics["val/id/mean"] == pytest.approx(sum(two) / 2)
    assert metrics["val/id/two/other"] == metrics["val/id/two/mean"]  # prompts without a category
    assert "val/ood/mean" not in metrics and "val/gap" not in metrics


def test_a_missing_verdict_is_left_out_of_its_mean(module, tmp_path):
    rows = [*ROWS, ("missing", "color")]
    suite = Suite("near", "id", [write_rows(tmp_path, rows, mark=1)], Marked())
    metrics = SuiteEvaluation([suite]).evaluate(module, thoroughly=False)
    near = brute_force(module, [text for text, _ in ROWS], 2)
    assert metrics["val/id/near/color"] == pytest.approx(near[[0, 3]].mean().item(), abs=1e-6)


def test_the_batch_size_changes_nothing(module, tmp_path):
    one = evaluation_of(tmp_path, batch_size=1).evaluate(module, thoroughly=True)
    many = evaluation_of(tmp_path, batch_size=100).evaluate(module, thoroughly=True)
    assert one == pytest.approx(many, abs=1e-6)


# Samples ----------------------------------------------------------------------------------------


def test_all_evaluations_of_a_run_score_the_sample_and_its_ends_all_beside_it(tiny_janus, tmp_path):
    """Same prompts, same noise: the sample's pictures are those of the same prompts in full."""
    module = make_grpo(tiny_janus, images_budget=24, optimizer=sgd(0.0))
    evaluation = evaluation_of(
        tmp_path, every_n_updates=1, prompts_per_category=1, final_images_per_prompt=2
    )
    rows = fit(module, tmp_path, evaluation).logger.rows
    near = brute_force(module, [text for text, _ in ROWS], 2)
    far = brute_force(module, [text for text, _ in ROWS[::-1][:3]], 2)
    sample, whole = ("val", [0], [1], [0]), ("val/full", [0, 3], [1, 2], [0, 1, 2])
    for step, (names, color, count, away) in ((0, sample), (1, sample), (3, sample), (3, whole)):
        scores = [near[color].mean().item(), near[count].mean().item(), far[away].mean().item()]
        logged = ("id/near/color", "id/near/count", "ood/mean")
        assert [rows[step][f"{names}/{name}"] for name in logged] == pytest.approx(scores, abs=1e-6)
    assert rows[0] == {name: rows[3][name] for name in rows[0]}
    assert not [name for step in (1, 2) for name in rows[step] if name.startswith("val/full/")]


def test_what_the_best_checkpoint_is_chosen_by_is_of_the_same_prompts_at_all_times(
    tiny_janus, tmp_path, capsys
):
    monitored = []

    class Monitor(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            monitored.append(trainer.callback_metrics["val/ood/mean"].item())

    module = make_grpo(tiny_janus, images_budget=24, optimizer=sgd(0.0))
    evaluation = evaluation_of(
        tmp_path, every_n_updates=1, prompts_per_category=1, final_images_per_prompt=2
    )
    rows = fit(module, tmp_path, evaluation, Monitor()).logger.rows
    assert monitored == pytest.approx([rows[1]["val/ood/mean"]] * 3)
    assert rows[3]["val/full/ood/mean"] != pytest.approx(monitored[-1], abs=1e-4)
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert "full/ood/mean" in table and "ood/mean" not in table


def test_a_suite_may_have_a_number_of_images_of_its_own(module, tmp_path):
    seen = []

    class Seen(Brightness):
        def score(self, images, prompts):
            seen.append([prompt.text for prompt in prompts].count("blue"))
            return super().score(images, prompts)

    file = write_rows(tmp_path, [("blue", "color")])
    suites = [
        Suite("one", "id", [file], Seen(), images_per_prompt=1, final_images_per_prompt=4),
        Suite("two", "ood", [file], Seen()),
    ]
    evaluation = SuiteEvaluation(suites, images_per_prompt=2, final_images_per_prompt=3)
    evaluation.evaluate(module, thoroughly=False)
    evaluation.evaluate(module, thoroughly=True)
    assert seen == [1, 2, 4, 3]


# Divergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (3.0, 0.7)])
def test_divergence_is_exact_over_the_codebook(tiny_janus, tmp_path, guidance, temperature):
    module = make_grpo(tiny_janus, guidance=guidance, temperature=temperature)
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    evaluation = evaluation_of(tmp_path)
    assert evaluation.evaluate(module, thoroughly=False)["val/kl_to_base"] == pytest.approx(
        0, abs=1e-9
    )
    disturb(module)
    base = make_policy(tiny_janus).load()
    expected = []
    for texts in ([text for text, _ in ROWS], [text for text, _ in ROWS[::-1][:3]]):
        values = []
        for index, text in enumerate(texts):
            tokens, _ = module.draw([Prompt(text, index=index)], 1, "evaluation")
            now = distribution(module.policy, text, tokens, guidance, temperature)
            then = distribution(base, text, tokens, guidance, temperature)
            values += [
                sum(p * (math.log(p) - math.log(q)) for p, q in zip(*pair, strict=True))
                for pair in zip(now, then, strict=True)
            ]
        expected.append(sum(values) / len(values))
    metrics = evaluation.evaluate(module, thoroughly=False)
    assert sum(expected) / 2 > 0.01
    assert metrics["val/kl_to_base"] == pytest.approx(sum(expected) / 2, abs=1e-6)


@torch.no_grad()
def distribution(policy, text, tokens, guidance, temperature) -> list[list[float]]:
    """Probabilities of each code at each place, by stepping through all of it by hand."""
    conditional = policy.logits([text], tokens)[0]
    unconditional = policy.logits([text], tokens, unconditional=True)[0]
    logits = (unconditional + guidance * (conditional - unconditional)) / temperature
    return logits.softmax(-1).tolist()


def test_divergence_is_that_of_the_whole_image_on_average(module, tmp_path):
    """Summed over places and averaged over images it is KL of the images: all 32^4 are too many,
    but the sampled mean of log-ratios has the same expectation."""
    disturb(module, 0.05)
    prompts = [Prompt("a red circle", index=index) for index in range(400)]
    found = divergence(module, prompts, 400, 200)
    tokens, logprobs = module.draw(prompts, 1, "evaluation")
    with module.start_weights() as base, torch.no_grad():
        texts = [prompt.text for prompt in prompts]
        parts = [base.logits(texts, tokens), base.logits(texts, tokens, unconditional=True)]
    logits = parts[1] + module.guidance * (parts[0] - parts[1])
    before = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ratios = (logprobs - before).mean(1)
    error = ratios.std().item() / math.sqrt(len(ratios))
    assert found == pytest.approx(ratios.mean().item(), abs=4 * error)
    assert found > 4 * error


def test_the_policy_is_itself_again_after_an_evaluation(module, tmp_path):
    disturb(module)
    before = {name: w.clone() for name, w in module.state_dict().items()}
    random_state = torch.get_rng_state()
    evaluation_of(tmp_path).evaluate(module, thoroughly=False)
    assert all(torch.equal(w, before[name]) for name, w in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


# In the loop ------------------------------------------------------------------------------------


def test_start_middle_and_end_are_scored_and_the_table_printed(tiny_janus, tmp_path, capsys):
    module = make_grpo(tiny_janus, images_budget=40, optimizer=sgd(5.0))
    evaluation = evaluation_of(tmp_path, every_n_updates=2)
    asked = []
    evaluate = evaluation.evaluate
    evaluation.evaluate = lambda m, thoroughly: (
        asked.append((m.rollouts, thoroughly)) or evaluate(m, thoroughly=thoroughly)
    )
    trainer = fit(module, tmp_path, evaluation)
    assert asked == [(0, True), (2, False), (4, False), (5, True)]
    rows = trainer.logger.rows
    assert rows[0]["val/kl_to_base"] == pytest.approx(0, abs=1e-9)
    assert rows[5]["val/kl_to_base"] > 1e-3
    assert trainer.callback_metrics["val/ood/mean"].item() == pytest.approx(rows[5]["val/ood/mean"])
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    start, end = rows[0]["val/id/near/color"], rows[5]["val/id/near/color"]
    assert ["id/near/color", f"{start:.3f}", f"{end:.3f}", f"{end - start:+.3f}"] in table


@pytest.mark.parametrize("limits", [{"max_steps": 3}, {"max_steps": 2}, {"limit_train_batches": 3}])
def test_a_run_that_is_stopped_early_is_scored_at_its_end(tiny_janus, tmp_path, limits):
    module = make_grpo(tiny_janus, images_budget=80)
    evaluation = evaluation_of(tmp_path, every_n_updates=2)
    trainer = fit(module, tmp_path, evaluation, **limits)
    score = trainer.logger.rows[next(iter(limits.values()))]["val/ood/mean"]
    assert trainer.callback_metrics["val/ood/mean"].item() == pytest.approx(score)  # for `best`


def test_a_run_that_stops_after_its_last_batch_is_scored_then(tiny_janus, tmp_path):
    class StopLate(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    module = make_grpo(tiny_janus, images_budget=24)
    data = PromptData([write_rows(tmp_path)])
    data.setup = lambda stage: None  # which allows one epoch only
    evaluation = evaluation_of(tmp_path, every_n_updates=100)
    trainer = make_trainer(tmp_path, evaluation, StopLate(), max_epochs=2, limit_train_batches=2)
    trainer.fit(module, data)
    assert [step for step, row in trainer.logger.rows.items() if "val/ood/mean" in row] == [0, 2]


def test_two_of_them_keep_their_own_scores_in_a_checkpoint(tmp_path):
    file = write_rows(tmp_path)
    one = SuiteEvaluation([Suite("one", "id", [file], Brightness())])
    two = SuiteEvaluation([Suite("two", "id", [file], Brightness())])
    assert one.state_key != two.state_key
    one.first, one.last = {"val/id/mean": 0.5}, {"val/id/mean": 0.75}
    two.load_state_dict(one.state_dict())
    assert (two.first, two.last) == (one.first, one.last)


def test_table():
    first, last = {"val/id/mean": 0.5}, {"val/id/mean": 0.75, "val/gap": 0.1}
    lines = [line.split() for line in format_table(first, last).splitlines()]
    assert lines == [
        ["start", "end", "change"],
        ["id/mean", "0.500", "0.750", "+0.250"],
        ["gap", "nan", "0.100", "+nan"],
    ]
    assert format_table({}, last).split() == ["score", "id/mean", "0.750", "gap", "0.100"]


def test_table_leaves_out_a_part_that_is_the_mean():
    near = {"val/id/near/mean": 0.5, "val/id/near/parts/graded": 0.5, "val/id/near/parts/red": 0.5}
    later = near | {"val/id/near/parts/red": 0.75}
    for first, last in ((near, later), ({}, later), (later, near)):
        rows = [line.split()[0] for line in format_table(first, last).splitlines()[1:]]
        assert rows == ["id/near/mean", "id/near/parts/red"]


def test_the_bar_shows_the_latest_divergence_after_every_rollout(tiny_janus, tmp_path):
    seen = []

    class Bar(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(trainer.progress_bar_metrics["kl to base"])

    module = make_grpo(tiny_janus, images_budget=32, optimizer=sgd(5.0))
    rows = fit(module, tmp_path, evaluation_of(tmp_path, every_n_updates=3), Bar()).logger.rows
    latest = [rows[step]["val/kl_to_base"] for step in (0, 0, 3, 4)]
    assert seen == pytest.approx(latest, abs=1e-6)
    assert "kl to base" not in rows[3]


# Mistakes ---------------------------------------------------------------------------------------


def test_suites_need_names_of_their_own(tmp_path):
    suite = Suite("same", "id", [write_rows(tmp_path)], Brightness())
    for suites in ([], [suite, suite]):
        with pytest.raises(ValueError, match="expected suites"):
            SuiteEvaluation(suites)


@pytest.mark.parametrize(
    "name",
    [
        "images_per_prompt",
        "final_images_per_prompt",
        "every_n_updates",
        "batch_size",
        "prompts_per_category",
    ],
)
def test_sizes_below_one_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        evaluation_of(tmp_path, **{name: 0})


def test_equal_scores_over_a_suite_are_told_once(module, tmp_path):
    evaluation = SuiteEvaluation([Suite("near", "id", [write_rows(tmp_path)], Fixed([0.25]))])
    with pytest.warns(UserWarning, match="suite near: expected scores that differ") as caught:
        evaluation.evaluate(module, thoroughly=True)
    assert len([w for w in caught if "scores that differ" in str(w.message)]) == 1


def test_validate_prints_the_papers_tables_and_then_all_metrics(tiny_janus, tmp_path, capsys):
    evaluation = evaluation_of(tmp_path)
    make_trainer(tmp_path, evaluation).validate(make_grpo(tiny_janus), verbose=False)
    printed = capsys.readouterr().out
    assert evaluation.tables in printed and evaluation.tables.startswith("near, in domain, images")
    assert printed.index("means over suites") < printed.index("id/near/color")
    names = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    assert names == [f"{n}.{kind}" for n in ("far", "moved", "near") for kind in ("csv", "json")]


def test_a_prompt_beyond_the_context_stops_a_run_before_weights_load(
    tiny_janus, tmp_path, monkeypatch
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    file = write_rows(tmp_path, [("word " * 5000, "long")])
    with pytest.raises(ValueError, match="expected a prompt of at most"):
        fit(make_grpo(tiny_janus), tmp_path, SuiteEvaluation([Suite("n", "id", [file])]))


@pytest.mark.parametrize("own", [True, False])
def test_missing_facts_stop_a_run_before_weights_load(tiny_janus, tmp_path, monkeypatch, own):
    monkeypatch.setattr(JanusPolicy, "load", None)
    suite = Suite("near", "id", [write_rows(tmp_path)], Marked() if own else None)
    module = make_grpo(tiny_janus, Brightness() if own else Marked())
    if not own:
        monkeypatch.setattr(PromptData, "setup", lambda self, stage: None)
    with pytest.raises(ValueError, match=r"held_out.jsonl:1: expected the facts \['mark'\]"):
        fit(module, tmp_path, SuiteEvaluation([suite]))


def test_a_suite_without_a_scorer_takes_the_training_reward(module, tmp_path):
    file = write_rows(tmp_path)
    own = SuiteEvaluation([Suite("near", "id", [file], Brightness())]).evaluate(
        module, thoroughly=False
    )
    assert SuiteEvaluation([Suite("near", "id", [file])]).evaluate(module, thoroughly=False) == own


def test_a_module_without_a_reward_needs_one_in_the_suite(tiny_janus, tmp_path):
    suite = Suite("near", "id", [write_rows(tmp_path)])
    trainer = make_trainer(tmp_path, SuiteEvaluation([suite]))
    with pytest.raises(ValueError, match="suite near got no reward and SFTModule trains on none"):
        trainer.validate(SFTModule(make_policy(tiny_janus)), verbose=False)
