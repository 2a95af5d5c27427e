"""`tools/score.py` on folders that another model drew: verdicts, tables, resuming, imports."""

import csv
import json
import math
import random
from pathlib import Path

import pytest
import torch
import yaml

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.layouts import name_pictures, write_metadata
from cotgen_pl.pixels import to_pillow
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil
from tools.score import score

SHAPES = Path(__file__).resolve().parents[2] / "cotgen_pl" / "shapes" / "assets" / "prompts"
ORACLE = "cotgen_pl.rewards.shapes_oracle.ShapesOracle"
TOYS = "tests.tools.test_score"
COPIES = 2


class Noisy(Reward):
    """Torch's own noise, no verdict on some pictures, and a failure after some calls."""

    calls_left = 1_000_000

    def score(self, images, prompts):
        Noisy.calls_left -= 1
        if Noisy.calls_left < 0:
            raise RuntimeError("the machine went down")
        brightness = images.mean((1, 2, 3))
        blind = (brightness * 1000).long() % 3 == 0
        total = torch.rand(len(images)).masked_fill(blind, math.nan)
        details = [{"brightness": value} for value in brightness.tolist()]
        return Scores.single("noisy", total, details)


class Constant(Reward):
    """One score for all."""

    def score(self, images, prompts):
        return Scores.single("constant", torch.ones(len(images)))


@pytest.fixture
def drawn(tmp_path):
    """Prompts of two of GenEval's tags, each with a right picture and a wrong one."""
    lines = (SHAPES / "ood_geneval.jsonl").read_text().splitlines()
    chosen = [*lines[:3], *(line for line in lines if '"counting"' in line)][:6]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(chosen) + "\n")
    return path, draw(
        tmp_path / "pictures", "geneval", read_prompts(PromptFile(str(path), "jsonl"))
    )


def draw(folder: Path, layout: str, prompts: list[Prompt]) -> Path:
    rng = random.Random(3)
    rows = []
    for name, content in write_metadata(layout, prompts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for prompt, names in zip(prompts, name_pictures(layout, prompts, COPIES), strict=True):
        scene = compose(prompt, rng)
        pictures = torch.stack([render(scene), render(spoil(prompt, scene, rng))])
        for name, picture in zip(names, to_pillow(pictures), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / name)
            rows.append({"file": name, "prompt": prompt.text})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def piece(folder: Path, class_path: str = ORACLE, **init_args) -> str:
    path = folder / f"{class_path.split('.')[-1]}.yaml"
    path.write_text(yaml.safe_dump({"class_path": class_path, "init_args": init_args}))
    return str(path)


def run(drawn, *more: str, reward: str | None = None, layout: str = "geneval"):
    prompts, folder = drawn
    oracle = reward or piece(prompts.parent, rules="geneval")
    arguments = [str(folder), "--layout", layout, "--prompts", str(prompts), "--format", "jsonl"]
    return score([*arguments, "--reward", oracle, "--copies", str(COPIES), *more])


# Verdicts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["geneval", "t2i_compbench", "plain"])
def test_scores_each_picture_of_a_foreign_folder(layout, drawn, tmp_path, capsys):
    path, _ = drawn
    prompts = read_prompts(PromptFile(str(path), "jsonl"))
    folder = draw(tmp_path / layout, layout, prompts)
    rows = run((path, folder), layout=layout)
    assert [row.name for row in rows] == ["single_object", "counting", "mean"]
    assert [(row.prompts, row.images_right, row.prompts_right) for row in rows] == [
        (3, 0.5, 1.0),
        (3, 0.5, 1.0),
        (6, 0.5, 1.0),
    ]
    output = capsys.readouterr().out
    assert f"{folder}, images of each prompt: 2" in output and "50.00%" in output
    content = json.loads((folder / "verdicts.json").read_text())
    assert content["table"][-1]["score"] == pytest.approx(rows[-1].score)
    assert (
        content["variant"]["reward"].items() >= {"class_path": ORACLE, "rules": "geneval"}.items()
    )
    verdicts = content["verdicts"]
    assert [v["parts"]["strict"] for v in verdicts] == [1.0, 0.0] * 6
    assert [bool(v["details"]["failed"]) for v in verdicts] == [False, True] * 6
    with (folder / "verdicts.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == [v["file"] for v in verdicts]
    assert [float(row["total"]) for row in table] == [v["total"] for v in verdicts]
    assert [row["prompt"] for row in table[::2]] == [prompt.text for prompt in prompts]


def test_several_prompt_files_are_one_list(drawn, tmp_path):
    path, folder = drawn
    lines = path.read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:2]))
    path.write_text("\n".join(lines[2:]))
    arguments = [str(folder), "--layout", "geneval", "--format", "jsonl", "--copies", "2"]
    arguments += ["--prompts", str(tmp_path / "a.jsonl"), str(path)]
    assert score([*arguments, "--reward", piece(tmp_path, rules="geneval")])[-1].prompts == 6


def test_pictures_without_a_verdict_are_counted_and_not_zero(drawn, tmp_path):
    rows = run(drawn, reward=piece(tmp_path, f"{TOYS}.Noisy"))
    content = json.loads((drawn[1] / "verdicts.json").read_text())
    known = [v["total"] for v in content["verdicts"] if v["total"] is not None]
    assert 0 < rows[-1].missing == 12 - len(known) < 12
    single = [v["total"] for v in content["verdicts"][:6] if v["total"] is not None]
    assert rows[0].score == pytest.approx(sum(single) / len(single))


def test_equal_scores_are_warned_of(drawn, tmp_path):
    with pytest.warns(UserWarning, match="expected scores that differ, got 1 for all 12 pictures"):
        run(drawn, reward=piece(tmp_path, f"{TOYS}.Constant"))


# Refusals ---------------------------------------------------------------------------------------


def test_a_faulty_folder_is_not_scored(drawn, tmp_path):
    _, folder = drawn
    (folder / "00001/samples/0000.png").unlink()
    (folder / "00002/samples/0001.png").write_bytes(b"no picture")
    (folder / "00009").mkdir()
    with pytest.raises(ValueError, match=r"got 1 missing, 1 unreadable; nothing was scored") as e:
        run(drawn)
    assert "missing: 00001/samples/0000.png" in str(e.value)
    assert "unreadable: 00002/samples/0001.png (" in str(e.value)
    assert not list(folder.glob("verdicts*"))


def test_prompts_that_the_reward_cannot_judge_are_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: expected the facts .'objects'."):
        run(drawn, reward=piece(tmp_path, rules="compbench"))


def test_a_file_of_verdicts_ends_as_it_is_written(drawn, tmp_path):
    with pytest.raises(ValueError, match=r"expected --out of a file that ends in .json, got .*csv"):
        run(drawn, "--out", str(tmp_path / "a.csv"))


# Resuming ---------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("verdicts*")}


def test_a_killed_run_goes_on(drawn, tmp_path, monkeypatch):
    _, folder = drawn
    settings = ["--batch_size", "5"]
    noisy = piece(tmp_path, f"{TOYS}.Noisy")
    run(drawn, *settings, reward=noisy)
    whole = contents(folder)
    for name in whole:
        (folder / name).unlink()
    monkeypatch.setattr(Noisy, "calls_left", 2)
    with pytest.raises(RuntimeError, match="went down"):
        run(drawn, *settings, reward=noisy)
    assert list(contents(folder)) == ["verdicts.jsonl"]
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 1 + 10
    with (folder / "verdicts.jsonl").open("a") as file:
        file.write('{"file": "00005/sa')
    monkeypatch.setattr(Noisy, "calls_left", 1)  # the last batch alone is left
    run(drawn, *settings, reward=noisy)
    assert contents(folder) == whole
    monkeypatch.setattr(Noisy, "calls_left", 0)
    run(drawn, *settings, reward=noisy)
    assert contents(folder) == whole


@pytest.mark.parametrize("changed", ["reward", "pictures", "prompts"])
def test_verdicts_on_something_else_are_refused(changed, drawn, tmp_path):
    path, folder = drawn
    run(drawn)
    before, reward = contents(folder), None
    match changed:
        case "reward":
            reward = piece(tmp_path, f"{TOYS}.Constant")
        case "pictures":
            swapped = [folder / f"00000/samples/000{copy}.png" for copy in range(2)]
            first, second = (file.read_bytes() for file in swapped)
            swapped[0].write_bytes(second)
            swapped[1].write_bytes(first)
        case "prompts":
            path.write_text(path.read_text().replace('"exclude": []', '"exclude": [], "x": 1', 1))
    with pytest.raises(ValueError, match=f"verdicts with another {changed} .* by --out, or remove"):
        run(drawn, reward=reward)
    assert contents(folder) == before
    run(drawn, "--out", str(tmp_path / "other.json"), reward=reward)
    assert (tmp_path / "other.csv").exists()


# Official results -------------------------------------------------------------------------------


def write_result(path: Path, answers: dict[int, float]) -> str:
    rows = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def spatial(drawn, tmp_path):
    """Three prompts whose category is `spatial` and three others, in T2I-CompBench's layout."""
    path, _ = drawn
    path.write_text(path.read_text().replace('"single_object"', '"spatial"'))
    prompts = read_prompts(PromptFile(str(path), "jsonl"))
    return path, draw(tmp_path / "spatial", "t2i_compbench", prompts)


def test_official_results_take_the_place_of_the_reward(spatial, tmp_path):
    file = write_result(tmp_path / "r.json", {n: n / 10 for n in reversed(range(6))})
    rows = run(spatial, "--import-unidet", file, layout="t2i_compbench")
    assert [(row.name, row.score) for row in rows[:2]] == [
        ("spatial", pytest.approx(0.25)),
        ("counting", rows[1].score),
    ]
    content = json.loads((spatial[1] / "verdicts.json").read_text())
    assert content["variant"]["import_unidet"] == file
    assert [v["parts"] for v in content["verdicts"][:6]] == [{"unidet": n / 10} for n in range(6)]
    assert list(content["verdicts"][6]["parts"]) == ["graded", "strict"]


def test_a_result_of_another_folder_is_refused(spatial, tmp_path):
    file = write_result(tmp_path / "r.json", {n: 0.5 for n in (0, 1, 2, 3, 7)})
    with pytest.raises(ValueError, match=r"got 5 without \[4, 5\] and with \[7\] besides"):
        run(spatial, "--import-unidet", file, layout="t2i_compbench")


def test_results_need_one_category_that_they_can_be_of(drawn, tmp_path):
    file = write_result(tmp_path / "r.json", {0: 0.5})
    with pytest.raises(ValueError, match=r"expected prompts of one category out of .* got \[\]"):
        run(drawn, "--import-unidet", file)


def test_a_reward_is_needed_where_no_results_are(drawn):
    arguments = [str(drawn[1]), "--layout", "geneval", "--prompts", str(drawn[0])]
    with pytest.raises(ValueError, match="expected a reward for 12 pictures, got none; name a pie"):
        score([*arguments, "--format", "jsonl", "--copies", "2"])
