"""A small study whose run folders are made up: every number in them is known beforehand."""

import json
from pathlib import Path

import yaml
from PIL import Image

from cotgen_pl.study.definition import BASE, Study, read_study
from cotgen_pl.study.folders import Records, read_record

ALGORITHMS = ("dpo", "grpo")
REWARDS = ("exact", "narrow", "broad")
SUITES = {"near": ("id", ["color", "shape"]), "far": ("ood", ["counting", "position"])}
NAMES = {"position": "position[other]"}  # a score that is not as published
PROMPTS_PER_CATEGORY, COPIES = 2, 4
BASE_SCORE = 0.5
GAINS = {  # by algorithm, in domain and out of domain
    "dpo": {"near": 0.2, "far": -0.05},
    "grpo": {"near": 0.1, "far": 0.15},
}
REWARD_BONUS = {"exact": 0.05, "narrow": 0.0, "broad": 0.02}
SEED_STEP = 0.01  # a run's scores rise by this from seed to seed, the base's do not
CURVE = ((0, 0), (4, 64), (8, 128))  # updates and images of each evaluation


def study_file(folder: Path, seeds=(0, 1), **changes) -> Path:
    """Write the study's YAML."""
    algorithms = {name: {"config": f"configs/{name}.yaml"} for name in ALGORITHMS}
    content = {
        "name": "made_up",
        "title": "A made-up study",
        "folder": str(folder),
        "base": {"config": "configs/base.yaml"},
        "judge": "exact",
        "seeds": list(seeds),
        "groups": {
            "main": {
                "title": "Rewards and algorithms",
                "priority": "main",
                "axes": {
                    "reward": {name: {"overrides": {"reward": name}} for name in REWARDS},
                    "algorithm": algorithms,
                },
            },
            "rounds": {
                "title": "Rounds",
                "comparison": "controlled",
                "axes": {
                    "rounds": {n: {"overrides": {"rounds": n}} for n in ("1", "2", "3")},
                    "algorithm": algorithms,
                },
            },
        },
        "tables": {
            "results": {"group": "main", "kind": "suites"},
            "shifts": {"group": "main", "kind": "shifts"},
            "by_reward": {"group": "main", "kind": "rewards"},
            "best_of_4": {"group": "main", "kind": "uplifts"},
            "rounds": {"group": "rounds", "kind": "domains"},
            "costs": {"group": "main", "kind": "costs"},
        },
        "figures": {
            "summary": {"group": "main", "kind": "summary"},
            "curves": {"group": "main", "kind": "curves"},
            "uplift": {"group": "main", "kind": "uplift"},
            "best_of_n": {"group": "main", "kind": "best_of_n"},
            "rounds": {"group": "rounds", "kind": "levels", "axis": "rounds"},
            "algorithms": {"group": "main", "kind": "comparison", "labels": {"reward": "broad"}},
            "pictures": {"group": "main", "kind": "pictures"},
            "pictures_of_rounds": {"group": "rounds", "kind": "pictures", "per_suite": 1},
        },
    }
    path = folder / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def make_study(folder: Path, **changes) -> Study:
    """Write a study and all of its run folders."""
    study = read_study(study_file(folder, **changes))
    for run, seed in study.seeded_runs():
        own = study.run_folder(run.name, seed)
        labels = labels_of(study, run.name)
        for suite in SUITES:
            write_suite(own, suite, score_of(labels, suite, seed))
            write_pictures(own, suite, shade=60 * len(labels) + 20 * seed)
        if run.name != BASE:
            write_metrics(own, labels, seed)
            (own / "run.json").write_text(json.dumps({"commit": "0123abc", "torch": "9.9"}))
    return study


def labels_of(study: Study, run: str) -> dict[str, str]:
    """A run's labels in the first group that has it; the base has none."""
    cells = [cell for group in study.groups.values() for cell in group.cells if cell.run == run]
    return dict(cells[0].labels) if cells else {}


def score_of(labels: dict[str, str], suite: str, seed: int) -> float:
    """The mean of a run's pictures at its end."""
    if not labels:
        return BASE_SCORE
    bonus = REWARD_BONUS.get(labels.get("reward", ""), 0.0)
    return BASE_SCORE + GAINS[labels["algorithm"]][suite] + bonus + SEED_STEP * seed


def write_suite(folder: Path, suite: str, score: float) -> None:
    """Verdicts around a mean: of a prompt's four pictures two lie 0.1 above it and two below.

    `broad` gives the better ones the higher score, `narrow` tells none from another.
    """
    domain, categories = SUITES[suite]
    rows = []
    for index in range(len(categories) * PROMPTS_PER_CATEGORY):
        category = categories[index // PROMPTS_PER_CATEGORY]
        for copy in range(COPIES):
            total = score + (0.1 if copy % 2 else -0.1)
            others = {"watched/narrow": 0.3, "watched/broad": float(copy % 2)}
            rows.append(
                {
                    "index": index,
                    "prompt": f"a {category} | {index} <b>",
                    "category": category,
                    "copy": copy,
                    "seed": copy,
                    "total": total,
                    "parts": {"strict": float(total > 0.5)},
                    "others": others,
                    "details": {"failed": [] if copy % 2 else [f"{category} is wrong"]},
                }
            )
    path = folder / "evaluation" / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{"name": name} for name in [*(NAMES.get(c, c) for c in categories), "mean"]]
    content = {"suite": suite, "domain": domain, "table": table, "verdicts": rows}
    path.write_text(json.dumps(content))


def write_pictures(folder: Path, suite: str, shade: int) -> None:
    """The first picture of each prompt."""
    for index in range(len(SUITES[suite][1]) * PROMPTS_PER_CATEGORY):
        path = folder / "evaluation" / "pictures" / suite / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (shade % 256, 40 * index % 256, 120)).save(path)


def write_metrics(folder: Path, labels: dict[str, str], seed: int) -> None:
    """Scores that rise linearly with updates, and what was spent."""
    updates, images = CURVE[-1]
    costs = {"sequences_backpropagated": 2 * images, "optimizer_steps": updates, "training_s": 30}
    rows = [(updates, f"perf/{name}", value) for name, value in costs.items()]
    for step, drawn in CURVE:
        share = step / updates
        for suite, (domain, _) in SUITES.items():
            gain = score_of(labels, suite, seed) - BASE_SCORE
            rows.append((step, f"val/{domain}/mean", BASE_SCORE + share * gain))
        rows.append((step, "val/kl_to_base", 0.2 * share))
        if step:
            rows.append((step, "perf/images_sampled", drawn))
    lines = [f"r,{step},{name},{value!r}" for step, name, value in rows]
    (folder / "metrics.csv").write_text("\n".join(["run,step,metric,value", *lines]) + "\n")


def read_all(study: Study) -> Records:
    """The records of the folders that are there."""
    found, missing = {}, []
    for run, seed in study.seeded_runs():
        folder = study.run_folder(run.name, seed)
        if (folder / "evaluation").is_dir():
            found[run.name, seed] = read_record(folder, run.name, seed)
        else:
            missing.append((run.name, seed))
    return Records(study, found, tuple(missing))
