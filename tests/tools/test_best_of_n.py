"""`tools/best_of_n.py`: from `predict` on the Shapes world to table, numbers and plot."""

import json
import math

import pytest
import torch
from PIL import Image

from cotgen_pl.best_of_n import best_of_n_curve
from tools.best_of_n import (
    MEAN,
    RANDOM,
    Candidates,
    best_of_n,
    draw_curves,
    format_curves,
    read_candidates,
)
from tools.main import main

NAN = math.nan


def write_scores(folder, rows) -> None:
    """Rows (index, category, {reward: total})."""
    lines = [
        {
            "index": index,
            "copy": 0,
            "candidate": number,
            "category": category,
            "seed": 1,
            "rewards": {name: {"total": total, "parts": {}} for name, total in rewards.items()},
        }
        for number, (index, category, rewards) in enumerate(rows)
    ]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    origin = {"prompts": {"number": len(rows)}, "copies": 1, "candidates": 1}
    (folder / "origin.json").write_text(json.dumps(origin))


# From pictures to curves ------------------------------------------------------------------------


def test_from_predict_to_table_and_plot(repository, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(repository)
    run = tmp_path / "run"
    text = (repository / "cotgen_pl/shapes/assets/prompts/id_validation.jsonl").read_text()
    lines = [
        [line for line in text.splitlines() if f'"category": "{category}"' in line][:8]
        for category in ("color", "spatial")
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[0] + lines[1]))
    files = f"[{{path: {tmp_path / 'prompts.jsonl'}, format: jsonl}}]"
    arguments = ["predict", "--config", "configs/grpo_shapes.yaml"]
    arguments += ["--trainer.default_root_dir", str(run), "--data.init_args.predict_files", files]
    arguments += ["--trainer.callbacks", "configs/predict/shapes_best_of_n.yaml"]
    main([*arguments, "--trainer.callbacks.init_args.candidates", "4"])
    written = {name: tmp_path / f"curves.{name}" for name in ("json", "png")}
    folder = run / "images"
    arguments = [str(folder), "--judge", "exact", "--json", str(written["json"])]
    curves = best_of_n([*arguments, "--plot", str(written["png"])])
    assert list(curves) == [MEAN, "color", "spatial"]
    ends = {name: curve.mean[-1].item() for name, curve in curves[MEAN].items()}
    assert ends[RANDOM] < ends["narrow"] <= ends["exact"]
    assert ends[RANDOM] + 0.1 < ends["broad"] <= ends["exact"]
    for choosers in curves.values():
        assert list(choosers) == [RANDOM, "broad", "narrow", "exact"]
        for curve in choosers.values():  # one of one is whatever was drawn
            assert curve.mean[0].item() == pytest.approx(choosers[RANDOM].mean[0].item())
        assert (choosers["exact"].mean.diff() >= 0).all()
    # What was reported is the best of 4 by the broad scorer.
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    exact = {(s["index"], s["candidate"]): s["rewards"]["exact"]["total"] for s in scores}
    manifest = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    reported = {
        category: [
            exact[row["index"], row["candidate"]] for row in manifest if row["category"] == category
        ]
        for category in ("color", "spatial")
    }
    for category, values in reported.items():
        assert curves[category]["broad"].mean[-1].item() == pytest.approx(sum(values) / len(values))
    output = capsys.readouterr().out
    assert f"16 prompts x 4 candidates of {folder}, judged by exact" in output
    assert "random (floor)" in output and "exact (ceiling)" in output
    content = json.loads(written["json"].read_text())
    assert content["curves"]["color"]["exact"]["mean"] == curves["color"]["exact"].mean.tolist()
    assert (content["judge"], content["candidates"]) == ("exact", 4)
    colors = Image.open(written["png"]).convert("RGB").getcolors(1_000_000)
    assert len(colors) > 100  # lines, bands and letters


# Numbers ----------------------------------------------------------------------------------------


def test_means_and_intervals_are_over_prompts_and_then_over_categories():
    judge = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.25, 0.75]]).double()
    candidates = Candidates(["a", "a", "a", "b"], {"judge": judge, "other": -judge})
    curves = draw_curves(candidates, "judge", ["other"])
    assert list(curves) == [MEAN, "a", "b"]
    assert curves["a"]["judge"].mean.tolist() == pytest.approx([0.5, 2 / 3])
    assert curves["a"]["other"].mean.tolist() == pytest.approx([0.5, 1 / 3])
    # Deviations of (0.5, 1, 0) and (1, 1, 0) over sqrt(3), each 1.96 times.
    expected = [1.96 * 0.5 / 3**0.5, 1.96 * (1 / 3) ** 0.5 / 3**0.5]
    assert curves["a"]["judge"].interval.tolist() == pytest.approx(expected)
    assert curves["b"]["judge"].interval.isnan().all()  # of one prompt
    assert curves[MEAN]["judge"].mean.tolist() == pytest.approx([0.5, (2 / 3 + 0.75) / 2])
    assert "0.500 ± 0.566" in format_curves(curves, "judge")


def test_prompts_without_the_judges_verdict_are_left_out(tmp_path, capsys):
    rows = [(0, "", {"judge": 0.5, "by": 1.0}), (0, "", {"judge": 1.0, "by": None})]
    rows += [(1, "", {"judge": None, "by": 1.0}), (1, "", {"judge": None, "by": 2.0})]
    write_scores(tmp_path, rows)
    curves = best_of_n([str(tmp_path), "--judge", "judge", "--chosen_by", "by"])
    assert curves["other"]["by"].mean.tolist() == [0.75, 0.5]  # NaN never wins
    assert curves["other"]["judge"].mean.tolist() == [0.75, 1.0]
    assert "1 prompts without its verdict are left out" in capsys.readouterr().out


def test_copies_of_a_prompt_are_candidates_alike(tmp_path):
    generator = torch.Generator().manual_seed(0)
    totals = torch.rand(2, 6, generator=generator)
    rows = [(k % 2, "a", {"judge": totals[k % 2, k // 2].item()}) for k in range(12)]
    write_scores(tmp_path, rows)
    candidates = read_candidates(tmp_path)
    assert torch.equal(candidates.totals["judge"].float(), totals)
    curve = draw_curves(candidates, "judge", [])["a"]["judge"].mean
    torch.testing.assert_close(curve, best_of_n_curve(totals, totals).mean(0), check_dtype=False)


# Refusals ---------------------------------------------------------------------------------------


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected the scores of all candidates in .* got none"):
        read_candidates(tmp_path)
    (tmp_path / "scores_0.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"got scores_0.jsonl, of a run that goes on; let predict"):
        read_candidates(tmp_path)
    (tmp_path / "scores_0.jsonl").unlink()
    write_scores(tmp_path, [(0, "", {"a": 1.0}), (0, "", {"a": 1.0}), (1, "", {"a": 1.0})])
    with pytest.raises(ValueError, match=r"expected as many candidates of each prompt.* \[1, 2\]"):
        read_candidates(tmp_path)
    write_scores(tmp_path, [(0, "", {"a": 1.0}), (1, "", {"b": 1.0})])
    with pytest.raises(ValueError, match=r"scored by the same rewards, got .* \['a', 'b'\]"):
        read_candidates(tmp_path)


def test_an_interrupted_folder_is_refused(tmp_path):
    write_scores(tmp_path, [(0, "", {"a": 1.0}), (1, "", {"a": 1.0})])
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    (tmp_path / "scores.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(ValueError, match="expected scores of 2 candidates, got 1; let predict fin"):
        read_candidates(tmp_path)
    (tmp_path / "origin.json").unlink()
    with pytest.raises(ValueError, match=r"expected .*origin.json beside the scores, got no file"):
        read_candidates(tmp_path)


def test_rewards_that_did_not_score_are_refused(tmp_path):
    write_scores(tmp_path, [(0, "", {"a": 1.0})])
    for arguments in (["--judge", "x"], ["--judge", "a", "--chosen_by", "x"]):
        with pytest.raises(ValueError, match=r"expected rewards out of \['a'\], got \['x'\]; name"):
            best_of_n([str(tmp_path), *arguments])
