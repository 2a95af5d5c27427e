"""The studies in configs/studies: each is planned whole, and that of Janus-Pro runs in small."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from cotgen_pl.study.agreement import find_difference
from cotgen_pl.study.definition import read_study
from cotgen_pl.study.progress import read_records
from tests.rewards.test_hps import write as write_small_hps
from tests.stand_ins import (
    COMPLEX_TEXTS,
    GENEVAL,
    TEXTS,
    name_weights,
    write_benchmarks,
    write_complex,
)
from tools.study import read_settings, run_study

SIX = ["color", "shape", "texture", "spatial[open_vocabulary]", "non_spatial"]
SIX.append("complex[open_vocabulary]")
EIGHT = [*SIX, "3d_spatial[open_vocabulary]", "numeracy[open_vocabulary]"]
SHARED_SKILLS = ["two_object", "counting", "colors", "position", "color_attr"]
JANUS_PRO = "configs/studies/janus_pro.yaml"


@pytest.fixture
def workplace(repository, tmp_path, monkeypatch) -> Path:
    """A working directory that has nothing but configs, from which runs find the package."""
    shutil.copytree(repository / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository), prepend=os.pathsep)
    return tmp_path


# Plans ------------------------------------------------------------------------------------------


def numbers_of(plan: str) -> dict[str, list[float]]:
    """Runs, images and, where they are planned, GPU hours of each group and of the sum."""
    _, *lines = plan.splitlines()
    rows = [line.split()[:4] for line in lines if not line.startswith("GPU hours")]
    return {
        name: [float(cell.replace(",", "")) for cell in cells if cell != "-"]
        for name, *cells in rows
    }


@pytest.fixture
def plan_of(workplace, capsys):
    """Plans a study, and sees that this leaves nothing behind."""

    def plan(name: str) -> dict[str, list[float]]:
        before = sorted(workplace.rglob("*"))
        assert run_study([f"configs/studies/{name}.yaml", "--plan"]) == 0
        assert sorted(workplace.rglob("*")) == before
        return numbers_of(capsys.readouterr().out)

    return plan


def test_both_algorithms_are_tuned_with_equal_means(plan_of):
    plan = plan_of("tuning")
    assert plan["grpo"] == plan["dpo"] == [9, 9 * 16_384]
    assert plan["sum"] == [1 + 2 * 9, 2 * 9 * 16_384]


def test_both_algorithms_are_tuned_with_equal_means_on_janus_pro(plan_of):
    plan = plan_of("tuning_janus_pro")
    assert plan["grpo"][:2] == plan["dpo"][:2] == [9, 9 * 51_200]
    assert plan["grpo"][2] > 0 < plan["dpo"][2]
    assert plan["sum"][:2] == [1 + 2 * 9, 2 * 9 * 51_200]


@pytest.mark.slow
def test_the_shapes_study_is_planned(plan_of):
    plan = plan_of("shapes")
    assert plan["main"] == [5 * 2 * 6, 5 * 2 * 6 * 16_384]
    assert plan["base"] == [6, 0]
    check_sums(plan)


@pytest.mark.slow
def test_the_janus_pro_study_is_planned_with_gpu_hours(plan_of):
    plan = plan_of("janus_pro")
    assert plan["main"][:2] == [5 * 2 * 3, 5 * 2 * 3 * 51_200]
    assert plan["base"] == [3, 0, 0]
    assert all(hours > 0 for name, (_, _, hours) in plan.items() if name != "base")
    assert plan["logprobs"][:2] == [4 * 3, 4 * 3 * 51_200]  # beside those of samples_growing
    assert plan["best_of_n_tuning"][:2] == [3, 3 * 51_200]
    check_sums(plan)


@pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within Python.*")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "janus_pro", "tuning", "tuning_janus_pro"])
def test_what_a_run_saves_is_what_its_study_says(workplace, name):
    """A seventh of the runs, the base among them, as the command line reads them."""
    study = read_study(f"configs/studies/{name}.yaml")
    runs = list(study.runs.values())[::7]
    assert len(runs) >= 3
    for run in runs:
        _, saved = read_settings(study, run)
        assert find_difference(study, run, run.seeds[0], saved) is None
        other = saved | {"seed_everything": 99}
        assert find_difference(study, run, run.seeds[0], other) is not None


def check_sums(plan: dict[str, list[float]]) -> None:
    """Each strategy has runs of its own, and the last row is the sum of all."""
    strategies = {"samples_growing", "samples_controlled", "data_growing", "data_controlled"}
    strategies |= {"diversity", "rounds_growing", "rounds_one", "rounds_controlled"}
    assert all(plan[name][0] > 0 for name in strategies)
    *groups, total = plan.values()
    assert np.sum([group[:2] for group in groups], axis=0).tolist() == total[:2]


# Janus-Pro in small -----------------------------------------------------------------------------


def edit(path: Path, change) -> None:
    """Change a YAML file."""
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


@pytest.fixture
def small_study(workplace, tiny_janus) -> str:
    """The study of Janus-Pro with small weights and prompts, of two rewards and in small sizes."""
    small = write_benchmarks(workplace)
    write_complex(workplace)
    spoil_training_prompts(workplace / "data/t2i_compbench/color_train.txt")
    (workplace / "weights/hps").mkdir()
    hps = write_small_hps(workplace / "weights/hps")
    configs = workplace / "configs"
    edit(configs / "policies/janus_pro_1b.yaml", lambda p: name_path(p, tiny_janus))
    edit(configs / "rewards/hps_v2.1.yaml", lambda piece: name_path(piece, hps))
    for algorithm in ("grpo", "dpo"):
        edit(configs / f"{algorithm}_metric.yaml", lambda piece: name_weights(piece, small))
    evaluation = configs / "evaluation/benchmarks_with_phrases.yaml"
    edit(evaluation, lambda piece: shrink_evaluation(piece, small))
    edit(workplace / JANUS_PRO, shrink_study)
    return JANUS_PRO


def name_path(piece: dict, path: Path) -> None:
    piece.setdefault("init_args", {})["path"] = str(path)


def spoil_training_prompts(path: Path) -> None:
    """Add a prompt that is held out, and one that comes again."""
    held_out = (path.with_name("color_val.txt")).read_text().upper()
    path.write_text("\n".join([path.read_text(), f"{held_out}.", path.read_text()]))


def shrink_evaluation(piece: dict, small: dict[str, str]) -> None:
    """One picture of each prompt."""
    name_weights(piece, small)
    for suite in piece["init_args"]["suites"]:
        del suite["final_images_per_prompt"]
    piece["init_args"] |= {"final_images_per_prompt": 1, "kl_images": 2}


def shrink_study(content: dict) -> None:
    """Two rewards, 64 images, four pictures of each prompt by the base; a prompt per category."""
    base, main = content["base"]["overrides"], content["groups"]["main"]
    watched = base["trainer.callbacks.init_args.watched"]
    base["trainer.callbacks.init_args.watched"] = {"hps": watched["hps"]}
    base["trainer.callbacks.init_args.final_images_per_prompt"] = 4
    for name in ("image_reward", "unified_reward", "orm"):
        del main["axes"]["reward"][name]
    algorithms = main["axes"]["algorithm"]
    algorithms["grpo"]["overrides"]["model.init_args.images_per_update"] = 32
    algorithms["dpo"]["overrides"]["data.init_args.pairs_per_update"] = 2
    main["overrides"] = {"model.init_args.images_budget": 64}
    for entry in content["prompts"].values():
        if "number" in entry:
            entry["number"] = len(entry.get("categories", [*TEXTS, "complex"]))


def numbers_in(table: Path, *labels: str) -> dict[str, float]:
    """By column the means of a row of a report's table."""
    with table.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[: len(labels)] == list(labels)]
    return {row[3]: float(row[4]) for row in rows if row[4]}


@pytest.mark.slow
def test_the_janus_pro_study_runs_with_only_weights_prompts_and_sizes_replaced(small_study, capsys):
    assert run_study([small_study, "--quick", "--jobs", "2"]) == 0
    study = read_study(small_study, quick=True)
    records = read_records(study)
    assert not records.missing and len(records.records) == 1 + 2 * 2
    number = len(TEXTS) + len(COMPLEX_TEXTS)
    counts = f"prompts train: {number} of {number + 2}, without 1 that are held out and 1 that"
    assert counts in capsys.readouterr().out
    for place, record in records.records.items():
        assert list(record.suites) == ["geneval", "t2i_compbench"]
        assert len(record.pictures["geneval"]) == len(GENEVAL)
        assert len(record.pictures["t2i_compbench"]) == len(EIGHT)
        assert place[0] == "base" or record.costs.images == 64
    check_means(study.folder / "report")
    check_marks((study.folder / "report/report.md").read_text())


def check_means(folder: Path) -> None:
    """Over six and eight categories, and over the skills that both benchmarks have."""
    for row in (["base", ""], ["best of 4", "hps"], ["grpo", "hps"], ["dpo", "hps"]):
        near = numbers_in(folder / "tables/main-t2i_compbench.csv", *row)
        assert near["six categories"] == pytest.approx(mean_of(near, SIX), abs=1e-5)
        assert near["eight categories"] == pytest.approx(mean_of(near, EIGHT), abs=1e-5)
        assert near["eight categories"] == near["mean"]
        far = numbers_in(folder / "tables/main-geneval.csv", *row)
        shared = far["skills of the in-domain set"]
        assert shared == pytest.approx(mean_of(far, SHARED_SKILLS), abs=1e-5)
        assert far["another skill"] == far["single_object"]


def mean_of(numbers: dict[str, float], columns: list[str]) -> float:
    return float(np.mean([numbers[column] for column in columns]))


def check_marks(report: str) -> None:
    """The reward that is the suite's own score has a star in domain, and there alone."""
    near, far = (table_below(report, title) for title in ("t2i_compbench, in domain", "geneval,"))
    assert "| six categories | eight categories |" in near
    assert "| skills of the in-domain set | another skill |" in far
    for algorithm in ("grpo", "dpo"):
        assert f"| {algorithm} \\* | metric | 1 |" in near and f"| {algorithm} | hps | 1 |" in near
        assert f"| {algorithm} | metric | 1 |" in far
    note = "trained on its own test metric"
    assert f"* {note}" in near and note not in far
    assert f"* in domain: {note}" in report


def table_below(report: str, title: str) -> str:
    """From a heading to the next."""
    return report.partition(f"### {title}")[2].partition("\n#")[0]
