"""Pictures of `predict`: layouts, seeds, resuming, and the best of several candidates."""

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from cotgen_pl.callbacks.images import ImageWriter
from cotgen_pl.data.pictures import PictureData
from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.files import read_rows
from cotgen_pl.interfaces import Reward, Scores
from cotgen_pl.layouts import OFFICIAL_COPIES, read_picture
from cotgen_pl.pixels import round_to_bytes
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import (
    TEXTS,
    Brightness,
    make_grpo,
    make_policy,
    make_trainer,
    numbered_prompts,
    write_prompts,
)


class Dark(Reward):
    """Minus the brightness."""

    def score(self, images, prompts):
        return Scores.single("dark", -images.mean((1, 2, 3)))


class Unsure(Reward):
    """Brightness, without a verdict on every picture brighter than a half, and on all of `cats`."""

    def score(self, images, prompts):
        total = images.mean((1, 2, 3)).float()
        blind = torch.tensor([prompt.text == "cats" for prompt in prompts])
        return Scores.single("unsure", total.masked_fill((total > 0.5) | blind, math.nan))


class Equal(Reward):
    """Zero."""

    def score(self, images, prompts):
        return Scores.single("equal", torch.zeros(len(images)))


class Fragile(Brightness):
    """Brightness, until the machine goes down."""

    calls_left = 1_000_000

    def score(self, images, prompts):
        Fragile.calls_left -= 1
        if Fragile.calls_left < 0:
            raise RuntimeError("the machine went down")
        return super().score(images, prompts)


def predict(tiny_janus, folder, module=None, prompts=None, **arguments) -> Path:
    folder.mkdir(exist_ok=True)
    data = PromptData([prompts or write_prompts(folder)])
    trainer = make_trainer(folder, ImageWriter(**arguments))
    trainer.predict(module or make_grpo(tiny_janus), data)
    return folder / "images"


def rows_of(folder: Path, name: str = "manifest.jsonl") -> list[dict]:
    return read_rows(folder / name)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def draw(tiny_janus, copies: int, occurrence: int = 0) -> torch.Tensor:
    """What the files of all prompts hold, [P, copies, 3, H, W]."""
    module = make_grpo(tiny_janus)
    module.configure_model()
    prompts = [replace(prompt, occurrence=occurrence) for prompt in numbered_prompts(4)]
    tokens, _ = module.draw(prompts, copies, "predict")
    return round_to_bytes(module.policy.decode(tokens)).unflatten(0, (4, copies))


# Pictures ---------------------------------------------------------------------------------------


def test_each_copy_has_a_picture_and_a_row_with_its_seed(tiny_janus, tmp_path):
    folder = predict(tiny_janus, tmp_path / "a", copies=2, batch_size=3)
    rows = rows_of(folder)
    places = [(row["index"], row["copy"]) for row in rows]
    assert places == [(index, copy) for index in range(4) for copy in range(2)]
    module = make_grpo(tiny_janus)
    for row in rows:
        assert (row["prompt"], row["category"]) == (TEXTS[row["index"]], "")
        prompt = replace(numbered_prompts(4)[row["index"]], occurrence=row["copy"])
        assert [row["seed"]] == module.noise_seeds([prompt], 1, "predict")
        expected = draw(tiny_janus, 1, row["copy"])[row["index"], 0]
        assert torch.equal(read_picture(folder / row["file"]), expected)
    assert set(contents(folder)) == {row["file"] for row in rows} | {
        "origin.json",
        "manifest.jsonl",
    }


def test_fewer_copies_are_the_first_of_more(tiny_janus, tmp_path):
    one, two = (predict(tiny_janus, tmp_path / str(n), copies=n) for n in (1, 2))
    for row in rows_of(one):
        assert (one / row["file"]).read_bytes() == (two / row["file"]).read_bytes()


def test_greedy_pictures_do_not_depend_on_noise(tiny_janus, tmp_path):
    def draw_pictures(name: str, **sampling) -> list[bytes]:
        folder = predict(tiny_janus, tmp_path / name, **sampling)
        return [(folder / row["file"]).read_bytes() for row in rows_of(folder)]

    def seeded(name: str, seed: int, **sampling) -> list[bytes]:
        module = make_grpo(tiny_janus, seed=seed)
        folder = predict(tiny_janus, tmp_path / name, module, **sampling)
        return [(folder / row["file"]).read_bytes() for row in rows_of(folder)]

    assert draw_pictures("a", top_k=1) == seeded("b", 1, top_k=1)
    assert draw_pictures("c") != seeded("d", 1)


def test_layouts_of_benchmarks(tiny_janus, tmp_path):
    lines = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": text}
        for text in ("two cats", "cats")
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = PromptFile(str(path), "geneval")
    geneval = predict(tiny_janus, tmp_path / "a", None, prompts, layout="geneval", copies=2)
    assert {name for name in contents(geneval) if "/" in name} == {
        f"0000{index}/{name}"
        for index in range(2)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    }
    assert json.loads((geneval / "00001/metadata.jsonl").read_text()) == lines[1]
    compbench = predict(tiny_janus, tmp_path / "b", None, prompts, layout="t2i_compbench", copies=2)
    assert [row["file"] for row in rows_of(compbench)] == [
        "samples/two cats_000000.png",
        "samples/two cats_000001.png",
        "samples/cats_000002.png",
        "samples/cats_000003.png",
    ]


@pytest.mark.parametrize("name", ["geneval", "t2i_compbench", "shapes_best_of_n"])
def test_pieces_are_read(name, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert len(list((repository / "configs/predict").iterdir())) == 3
    parser = LightningArgumentParser()
    parser.add_subclass_arguments(ImageWriter, "writer")
    config = parser.parse_args([f"--writer=configs/predict/{name}.yaml"])
    writer = parser.instantiate_classes(config).writer
    assert (writer.copies, writer.candidates) == {
        "geneval": (OFFICIAL_COPIES["geneval"], 1),
        "t2i_compbench": (OFFICIAL_COPIES["t2i_compbench"], 1),
        "shapes_best_of_n": (1, 16),
    }[name]


@pytest.mark.slow
def test_processes_draw_their_own_parts(tiny_janus, repository, tmp_path):
    def draw_with(processes: int) -> dict[str, bytes]:
        folder = tmp_path / str(processes)
        policy = "cotgen_pl.policies.janus.JanusPolicy"
        arguments = {
            "model": "cotgen_pl.modules.grpo.GRPOModule",
            "model.init_args.policy": policy,
            "model.init_args.policy.init_args.path": tiny_janus,
            "model.init_args.policy.init_args.dtype": "float64",
            "model.init_args.reward": "tests.toys.Brightness",
            "data": "cotgen_pl.data.prompts.PromptData",
            "data.init_args.files": f"[{{path: {write_prompts(tmp_path).path}, format: text}}]",
            "trainer.callbacks": "cotgen_pl.callbacks.images.ImageWriter",
            "trainer.callbacks.init_args.copies": 3,
            "trainer.callbacks.init_args.batch_size": 5,
            "trainer.callbacks.init_args.rewards": "{bright: tests.toys.Brightness}",
            "trainer.precision": "64-true",
            "trainer.accelerator": "cpu",
            "trainer.devices": processes,
            "trainer.strategy": "ddp" if processes > 1 else "auto",
            "trainer.default_root_dir": folder,
        }
        command = [sys.executable, "tools/main.py", "predict"]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=repository,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return contents(folder / "images")

    alone = draw_with(1)
    assert len(alone) == 12 + 3
    assert draw_with(2) == alone


# Refusals ---------------------------------------------------------------------------------------


def refuse(tiny_janus, folder, message, texts=TEXTS, **arguments):
    """Expect a refusal before weights load."""
    module = make_grpo(tiny_janus)
    module.configure_model = lambda: pytest.fail("weights were loaded")
    folder.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        predict(tiny_janus, folder, module, write_prompts(folder, texts), **arguments)


def test_prompts_that_a_layout_cannot_hold_are_refused(tiny_janus, tmp_path):
    message = "without '_' and '/' .* got 1 others: 'a_b'; reword .* or take the layout plain"
    refuse(tiny_janus, tmp_path, message, ("two cats", "a_b"), layout="t2i_compbench")
    refuse(tiny_janus, tmp_path, "layout geneval: expected prompts with", layout="geneval")


def test_facts_that_a_reward_needs_are_asked_for(tiny_janus, tmp_path):
    class Needing(Brightness):
        required_facts = ("objects",)

    refuse(tiny_janus, tmp_path, "expected the facts .'objects'.", rewards={"judge": Needing()})


def test_data_without_prompts_are_refused(tiny_janus, tmp_path):
    trainer = make_trainer(tmp_path, ImageWriter())
    with pytest.raises(ValueError, match="expected PromptData to draw from, got PictureData; name"):
        trainer.predict(make_grpo(tiny_janus), PictureData())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"copies": 0}, "expected copies of 1 or more, got 0"),
        ({"candidates": 2}, "expected select with 2 or more candidates"),
        ({"rewards": {"a": Dark()}, "select": "a"}, "expected select with 2 or more candidates"),
        ({"candidates": 2, "select": "a"}, r"one of the rewards \[\], got 'a'"),
        ({"keep_candidates": True}, "expected keep_candidates with a choice"),
    ],
)
def test_contradictory_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageWriter(**arguments)


# Resuming ---------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(tiny_janus, tmp_path, monkeypatch):
    settings = {"copies": 2, "candidates": 3, "select": "bright", "batch_size": 6}
    settings |= {"rewards": {"bright": Fragile()}}
    whole = predict(tiny_janus, tmp_path / "whole", **settings)
    monkeypatch.setattr(Fragile, "calls_left", 2)
    with pytest.raises(RuntimeError, match="went down"):
        predict(tiny_janus, tmp_path / "killed", **settings)
    folder = tmp_path / "killed/images"
    assert len(rows_of(folder, "manifest_0.jsonl")) == 4  # two batches of two pictures
    half = folder / rows_of(folder, "manifest_0.jsonl")[1]["file"]
    half.write_bytes(half.read_bytes()[:-20])
    with (folder / "scores_0.jsonl").open("a") as scores:
        scores.write('{"index": 2, "co')  # a row that the kill cut
    first = (folder / "000000_0000.png").stat()
    monkeypatch.setattr(Fragile, "calls_left", 3)  # half a batch, and the two that are left
    predict(tiny_janus, tmp_path / "killed", **settings)
    assert contents(folder) == contents(whole)
    assert (folder / "000000_0000.png").stat().st_mtime_ns == first.st_mtime_ns


def test_a_batch_is_written_while_the_next_is_drawn(tiny_janus, tmp_path, monkeypatch):
    begun, waited = threading.Event(), []
    write, decode = ImageWriter._write_batch, JanusPolicy.decode

    def slow_write(*arguments):
        if not begun.is_set():
            waited.append(second.wait(20))
        begun.set()
        write(*arguments)

    second = threading.Event()
    calls = []

    def noted(policy, tokens):
        calls.append(len(tokens))
        if len(calls) == 2:
            second.set()
        return decode(policy, tokens)

    monkeypatch.setattr(ImageWriter, "_write_batch", slow_write)
    monkeypatch.setattr(JanusPolicy, "decode", noted)
    folder = predict(tiny_janus, tmp_path, batch_size=2)
    assert waited == [True] and len(calls) > 1
    assert len(rows_of(folder)) == sum(calls)


def test_a_picture_that_cannot_be_written_stops_the_run(tiny_janus, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(ImageWriter, "_write_batch", full)
    with pytest.raises(OSError, match="no space left"):
        predict(tiny_janus, tmp_path)


def test_a_finished_folder_is_left_as_it_is(tiny_janus, tmp_path):
    folder = predict(tiny_janus, tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    writer = ImageWriter()
    trainer = make_trainer(tmp_path / "a", writer)
    drawn = trainer.predict(make_grpo(tiny_janus), PromptData([write_prompts(tmp_path / "a")]))
    assert drawn == [0]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} == before


@pytest.mark.parametrize("changed", ["seed", "policy", "copies", "prompts"])
def test_a_folder_of_something_else_is_refused(changed, tiny_janus, tmp_path):
    folder = predict(tiny_janus, tmp_path / "a")
    before = contents(folder)
    module, arguments, prompts = make_grpo(tiny_janus), {}, write_prompts(tmp_path / "a")
    match changed:
        case "seed":
            module = make_grpo(tiny_janus, seed=1)
        case "policy":
            policy = make_policy(tiny_janus).load()
            with torch.no_grad():
                next(p for p in policy.parameters() if p.requires_grad).add_(1)
            module = make_grpo(tiny_janus, policy=policy)
        case "copies":
            arguments = {"copies": 2}
        case "prompts":
            prompts = write_prompts(tmp_path / "a", TEXTS[:3])
    with pytest.raises(ValueError, match=f"holds pictures of another {changed} .*name another"):
        predict(tiny_janus, tmp_path / "a", module, prompts, **arguments)
    assert contents(folder) == before


def test_a_folder_of_other_files_is_refused(tiny_janus, tmp_path):
    (tmp_path / "a/images").mkdir(parents=True)
    (tmp_path / "a/images/0.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds files without origin.json"):
        predict(tiny_janus, tmp_path / "a")


# Best of N --------------------------------------------------------------------------------------


def test_the_best_candidate_is_written_and_all_scores_are_kept(tiny_janus, tmp_path):
    rewards = {"bright": Brightness(), "dark": Dark()}
    settings = {"rewards": rewards, "candidates": 3, "keep_candidates": True, "batch_size": 2}
    folder = predict(tiny_janus, tmp_path / "a", **settings, select="dark")
    images = draw(tiny_janus, 3)  # [4, 3, 3, H, W]
    brightness = images.mean((2, 3, 4))
    seeds = make_grpo(tiny_janus).noise_seeds(numbered_prompts(4), 3, "predict")
    for row in rows_of(folder):
        chosen = brightness[row["index"]].argmin().item()
        assert row["candidate"] == chosen
        assert row["score"] == pytest.approx(-brightness[row["index"], chosen].item())
        assert row["seed"] == seeds[3 * row["index"] + chosen]
        assert torch.equal(read_picture(folder / row["file"]), images[row["index"], chosen])
    scores = rows_of(folder, "scores.jsonl")
    assert [(row["index"], row["copy"], row["candidate"]) for row in scores] == [
        (index, 0, candidate) for index in range(4) for candidate in range(3)
    ]
    assert [row["seed"] for row in scores] == seeds
    for row, value in zip(scores, brightness.flatten().tolist(), strict=True):
        assert row["rewards"]["bright"]["total"] == pytest.approx(value)
        assert list(row["rewards"]["bright"]["parts"]) == ["all", "red"]
        assert row["rewards"]["dark"]["total"] == pytest.approx(-value)
        name = f"candidates/{row['index']:06d}_0000_{row['candidate']:04d}.png"
        expected = images[row["index"], row["candidate"]]
        assert torch.equal(read_picture(folder / name), expected)
    assert len(list((folder / "candidates").iterdir())) == 12


def test_candidates_without_a_verdict_never_win_over_others(tiny_janus, tmp_path):
    settings = {"rewards": {"unsure": Unsure()}, "candidates": 6, "select": "unsure"}
    with pytest.warns(UserWarning, match="no verdict on any candidate of 1 of 4 pictures"):
        folder = predict(tiny_janus, tmp_path / "a", **settings)
    scores = rows_of(folder, "scores.jsonl")
    assert not (folder / "candidates").exists()
    totals = {(r["index"], r["candidate"]): r["rewards"]["unsure"]["total"] for r in scores}
    for row in rows_of(folder):
        known = [totals[row["index"], k] for k in range(6) if totals[row["index"], k] is not None]
        assert row["score"] == (max(known) if known else None)
    assert sum(total is None for total in totals.values()) > 6  # of other prompts, too


def test_equal_candidates_are_drawn_from_by_the_seed(tiny_janus, tmp_path):
    prompts = write_prompts(tmp_path, tuple(f"{n} cats" for n in range(24)))
    settings = {"rewards": {"equal": Equal()}, "candidates": 2, "select": "equal"}

    def chosen(name: str, seed: int) -> list[int]:
        module = make_grpo(tiny_janus, seed=seed)
        folder = predict(tiny_janus, tmp_path / name, module, prompts, **settings)
        return [row["candidate"] for row in rows_of(folder)]

    first = chosen("a", 0)
    assert 6 <= sum(first) <= 18
    assert chosen("b", 0) == first != chosen("c", 1)


def test_scores_of_reported_pictures_are_kept_without_a_choice(tiny_janus, tmp_path):
    rewards = {"bright": Brightness()}
    folder = predict(tiny_janus, tmp_path / "a", copies=2, rewards=rewards)
    rows = rows_of(folder, "scores.jsonl")
    assert [(row["index"], row["copy"], row["candidate"]) for row in rows] == [
        (index, copy, 0) for index in range(4) for copy in range(2)
    ]
    assert all("candidate" not in row for row in rows_of(folder))
