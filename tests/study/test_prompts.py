"""Prompt files that a study makes: which prompts are kept, which are left out, and what is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.study.definition import Study
from cotgen_pl.study.prompts import make_prompts, select_prompts

COLORS = [f"a red cup and {number} blue bowls" for number in range(8)]
SHAPES = [f"a round cup and {number} square bowls" for number in range(4)]


def write_compbench(folder: Path, **texts: list[str]) -> list[dict[str, str]]:
    """A file in T2I-CompBench's format for each name, such as color_train, as a study names it."""
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return [{"path": str(folder / f"{name}.txt"), "format": "t2i_compbench"} for name in texts]


@pytest.fixture
def files(tmp_path):
    return write_compbench(tmp_path, color_train=COLORS, shape_train=SHAPES)


def texts_of(prompts) -> list[str]:
    return [prompt.text for prompt in prompts]


def study_of(folder: Path, **entries) -> Study:
    return Study("s", "s", folder / "study", {}, {}, entries)


def test_an_entry_keeps_all_prompts_in_their_order(files):
    prompts, counts = select_prompts("all", {"files": files})
    assert texts_of(prompts) == COLORS + SHAPES
    assert (counts.read, counts.leaks, counts.duplicates, counts.kept) == (12, 0, 0, 12)


def test_categories_keep_their_own_prompts(files):
    prompts, counts = select_prompts("shapes", {"files": files, "categories": ["shape"]})
    assert texts_of(prompts) == SHAPES
    assert (counts.read, counts.kept) == (12, 4)


def test_a_number_is_shared_by_categories_and_spread_over_their_lists(files):
    prompts, counts = select_prompts("five", {"files": files, "number": 5})
    assert texts_of(prompts) == [COLORS[0], COLORS[2], COLORS[5], SHAPES[0], SHAPES[2]]
    assert counts.kept == 5


def test_held_out_prompts_are_left_out_and_counted(files, tmp_path):
    held_out = write_compbench(tmp_path, color_val=[f"{COLORS[3].upper()}.", "a green cup"])
    entry = {"files": files, "held_out": held_out}
    prompts, counts = select_prompts("clean", entry)
    assert texts_of(prompts) == COLORS[:3] + COLORS[4:] + SHAPES
    assert (counts.leaks, counts.duplicates, counts.kept) == (1, 0, 11)


def test_a_prompt_that_comes_again_is_left_out_where_its_first_stays(tmp_path):
    lines = [COLORS[0], COLORS[1], f"{COLORS[0]}.", COLORS[2], COLORS[1]]
    files = write_compbench(tmp_path, color_train=lines)
    prompts, counts = select_prompts("distinct", {"files": files, "distinct": True})
    assert texts_of(prompts) == COLORS[:3]
    assert (counts.leaks, counts.duplicates, counts.kept) == (0, 2, 3)
    assert texts_of(select_prompts("all", {"files": files})[0]) == lines


def test_a_number_is_of_what_leaks_and_duplicates_leave(tmp_path):
    files = write_compbench(tmp_path, color_train=[*COLORS[:3], COLORS[2]])
    held_out = write_compbench(tmp_path, color_val=[COLORS[0]])
    entry = {"files": files, "held_out": held_out, "distinct": True}
    prompts, counts = select_prompts("two", entry | {"number": 2})
    assert texts_of(prompts) == COLORS[1:3]
    assert (counts.read, counts.leaks, counts.duplicates, counts.kept) == (4, 1, 1, 2)
    with pytest.raises(ValueError, match="prompts three: expected 3 of category color, got 2"):
        select_prompts("three", entry | {"number": 3})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"numbers": 4}, r"prompts x: expected files and any of .* got \['files', 'numbers'\]"),
        ({"number": 0}, "expected number of 1 or more, got 0"),
        ({"number": 10}, "prompts x: expected 5 of category shape, got 4; lower number"),
        ({"categories": ["colour"]}, r"among color, shape, got \['colour'\]; name those"),
    ],
)
def test_mistakes_in_an_entry_are_named(files, words, message):
    with pytest.raises(ValueError, match=message):
        select_prompts("x", {"files": files} | words)


def test_a_weight_is_refused(files):
    weighted = [files[0] | {"weight": 2.0}, *files[1:]]
    with pytest.raises(ValueError, match=f"prompts x: .*one on {weighted[0]['path']}"):
        select_prompts("x", {"files": weighted})


def test_kept_prompts_are_read_back_equal(tmp_path):
    """Facts and what is drawn from stay; the part of a complex prompt is such a fact."""
    files = write_compbench(tmp_path, complex_train_action=["The café is open."])
    clause = {"class": "cup", "count": 2}
    row = {"tag": "counting", "include": [clause], "exclude": [], "prompt": "two cups"}
    (tmp_path / "geneval.jsonl").write_text(json.dumps(row))
    files.append({"path": str(tmp_path / "geneval.jsonl"), "format": "geneval"})
    row = {"prompt": "a cup", "category": "plain", "generation_text": "a cup, drawn", "seen": [1]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    files.append({"path": str(tmp_path / "own.jsonl"), "format": "jsonl"})
    [counts] = make_prompts(study_of(tmp_path, kept={"files": files}))
    assert counts.kept == 3
    path = tmp_path / "study/prompts/kept.jsonl"
    wanted = [prompt for file in files for prompt in read_prompts(PromptFile(**file))]
    read = read_prompts(PromptFile(str(path), "jsonl"))
    assert [without_origin(prompt) for prompt in read] == [without_origin(p) for p in wanted]
    assert read[0].facts["part"] == "action"
    assert read[2].drawn_text == "a cup, drawn"


def without_origin(prompt):
    facts = {name: value for name, value in prompt.facts.items() if name != "_origin"}
    return replace(prompt, facts=facts)


def test_a_file_that_holds_other_prompts_is_refused(files, tmp_path):
    study = study_of(tmp_path, train={"files": files})
    make_prompts(study)
    path = tmp_path / "study/prompts/train.jsonl"
    before = path.stat().st_mtime_ns
    make_prompts(study)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"train\.jsonl to hold the prompts that the study names"):
        make_prompts(study_of(tmp_path, train={"files": files, "number": 4}))
    assert len(path.read_text().splitlines()) == 12
