"""Prompt files: every format, and what malformed ones are told."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from cotgen_pl.data.formats import ORIGIN, PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt

COMPBENCH_CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "non_spatial",
    "complex",
    "3d_spatial",
    "numeracy",
)


@pytest.fixture
def official(repository: Path) -> Path:
    """The folder of the official benchmark files, which are not ours to ship."""
    folder = Path(os.environ.get("COTGEN_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no official prompt files at {folder}; set COTGEN_DATA to their folder")
    return folder


def write(path: Path, *lines: str | dict) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8", newline="")
    return path


def read(path: Path, format: str, **settings) -> list[Prompt]:
    return read_prompts(PromptFile(str(path), format, **settings))


def facts(prompt: Prompt) -> dict:
    return {name: value for name, value in prompt.facts.items() if name != ORIGIN}


# Formats ----------------------------------------------------------------------------------------


def test_text_reads_one_prompt_per_line_and_leaves_blank_ones_out(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff a red cube \r", "", "  \r", "a café\r", "")
    prompts = read(path, "text", category="color", suite="mine")
    assert [prompt.text for prompt in prompts] == ["a red cube", "a café"]
    assert prompts[1] == Prompt("a café", "mine", "color", {ORIGIN: f"{path}:4"})


def test_jsonl_columns_become_facts(tmp_path):
    row = {
        "prompt": "two dogs",
        "category": "numeracy",
        "generation_text": "two dogs side by side",
        "objects": [{"noun": "dog", "count": 2}],
        "texture": None,
    }
    path = write(tmp_path / "a.jsonl", row, {"prompt": "a cat", "category": None})
    first, second = read(path, "jsonl")
    assert (first.text, first.category) == ("two dogs", "numeracy")
    assert first.drawn_text == "two dogs side by side"
    assert facts(first) == {"objects": [{"noun": "dog", "count": 2}], "texture": None}
    assert (second.drawn_text, second.category, facts(second)) == ("a cat", "", {})


def test_jsonl_keeps_line_separators_inside_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert [prompt.text for prompt in read(path, "jsonl")] == ["a\u2028b", "c"]


def test_geneval_rows(tmp_path):
    include = [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cup", "count": 1, "position": ["left of", 0]},
    ]
    exclude = [{"class": "dog", "count": 2}]
    row = {"tag": "position", "include": include, "exclude": exclude, "prompt": "p", "note": 1}
    path = write(tmp_path / "a.jsonl", row, {"tag": "two", "include": include, "prompt": "q"})
    first, second = read(path, "geneval")
    assert (first.text, first.category) == ("p", "position")
    assert facts(first) == {"include": include, "exclude": exclude}
    assert facts(second) == {"include": include, "exclude": []}


def test_flow_grpo_rows_keep_every_column(tmp_path):
    include = [{"class": "dog", "count": 1}]
    path = write(
        tmp_path / "train_metadata.jsonl",
        {"tag": "counting", "include": include, "prompt": "a photo of a dog", "level": 3},
        {"prompt": "swap the two cups", "image": "cups.png"},
    )
    first, second = read(path, "flow_grpo")
    assert (first.text, first.category) == ("a photo of a dog", "counting")
    assert facts(first) == {"include": include, "exclude": [], "level": 3}
    assert (second.category, facts(second)) == ("", {"image": "cups.png"})


@pytest.mark.parametrize(
    ("name", "category", "expected"),
    [
        ("non_spatial_train.txt", "non_spatial", {"split": "train"}),
        ("complex_val_action.txt", "complex", {"split": "val", "part": "action"}),
    ],
)
def test_t2i_compbench_tells_category_and_split_by_the_name(tmp_path, name, category, expected):
    [prompt] = read(write(tmp_path / name, "a green bench\r", ""), "t2i_compbench")
    assert (prompt.text, prompt.category, facts(prompt)) == ("a green bench", category, expected)


def test_t2i_r1_rows(tmp_path):
    spatial = {"obj1": "dog", "obj2": "cup", "locality": "left of"}
    numeracy = [{"obj_name": "dog", "num": 2}]
    path = write(
        tmp_path / "a.json",
        {"prompt": "p", "task_type": "spatial", "nouns": ["dog"], "spatial_info": spatial, "x": 1},
        {"prompt": "q", "task_type": "numeracy", "nouns": ["dog"], "numeracy_info": numeracy},
        {"prompt": "r", "task_type": "color", "attr_nouns": ["red dog"], "spatial_info": None},
    )
    prompts = read(path, "t2i_r1")
    assert [prompt.category for prompt in prompts] == ["spatial", "numeracy", "color"]
    assert facts(prompts[0]) == {"nouns": ["dog"], "spatial_info": spatial}
    assert facts(prompts[1]) == {"nouns": ["dog"], "numeracy_info": numeracy}
    assert facts(prompts[2]) == {"attr_nouns": ["red dog"]}


def test_given_category_replaces_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "category": "color"}, {"prompt": "q"})
    assert [prompt.category for prompt in read(path, "jsonl", category="all")] == ["all", "all"]


# Mistakes ---------------------------------------------------------------------------------------

CLAUSE = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("format", "line", "message"),
    [
        ("jsonl", "a red cube", "expected a JSON object, got 'a red cube' .*; write one object"),
        ("jsonl", "[1]", r"expected a JSON object, got \[1\]; correct this line, or name the for"),
        ("jsonl", {"text": "p"}, "expected a text under 'prompt', got None; correct"),
        ("jsonl", {"prompt": 3}, "expected a text under 'prompt', got 3; correct"),
        ("jsonl", {"prompt": " "}, "expected a text under 'prompt', got ' '; correct"),
        ("jsonl", {"prompt": "p", "category": 3}, "text or nothing under 'category', got 3"),
        ("geneval", {"prompt": "p", "include": [CLAUSE]}, "a text under 'tag', got None"),
        ("geneval", {"prompt": "p", "tag": "t"}, "clauses under 'include', got None"),
        ("geneval", {"prompt": "p", "tag": "t", "include": []}, r"clauses under 'include', got \["),
        (
            "geneval",
            {"prompt": "p", "tag": "t", "include": [CLAUSE], "exclude": "dog"},
            "a list under 'exclude', got 'dog'",
        ),
        (
            "geneval",
            {"prompt": "p", "tag": "t", "include": [{"class": "dog", "count": 0}]},
            r'expected a clause \{"class": text.*got \{\'class\': \'dog\', \'count\': 0\}',
        ),
        (
            "geneval",
            {"prompt": "p", "tag": "t", "include": [{**CLAUSE, "color": 1}]},
            "expected a clause",
        ),
        (
            "geneval",
            {"prompt": "p", "tag": "t", "include": [{**CLAUSE, "position": ["left of", 1]}]},
            r"number of a clause of include\], got",
        ),
        ("flow_grpo", {"prompt": "p", "include": ["dog"]}, "expected a clause .*got 'dog'"),
        ("t2i_r1", {"prompt": "p"}, "a text under 'task_type', got None"),
        ("t2i_r1", {"prompt": "p", "nouns": "dog"}, "a list of texts under 'nouns', got 'dog'"),
        ("t2i_r1", {"prompt": "p", "spatial_info": {}}, "obj1, obj2 and locality under 'spatial_i"),
        ("t2i_r1", {"prompt": "p", "numeracy_info": [{}]}, "a list of obj_name with num under"),
    ],
)
def test_malformed_line_is_named(tmp_path, format, line, message):
    good = {
        "prompt": "p",
        "tag": "t",
        "task_type": "color",
        "include": [CLAUSE],
    }
    path = write(tmp_path / "a.jsonl", good, "", line)
    with pytest.raises(ValueError, match=message) as error:
        read(path, format)
    assert str(error.value).startswith(f"{path}:3: expected ")


@pytest.mark.parametrize("lines", [(), ("", " \r", "")])
def test_empty_file_is_refused(tmp_path, lines):
    path = write(tmp_path / "a.txt", *lines)
    with pytest.raises(ValueError, match=r"a.txt:1: expected at least one prompt, got an empty"):
        read(path, "text")


def test_file_in_another_encoding_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a cat\na caf\xe9\n")
    with pytest.raises(ValueError, match=r"a.txt:2: expected UTF-8 text, got byte 0xe9; save"):
        read(path, "text")


def test_missing_file_is_named_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = f"expected a file of prompts at {tmp_path / 'sub' / 'a.txt'}, got none; correct"
    with pytest.raises(ValueError, match=message):
        read(Path("sub/a.txt"), "text")


def test_t2i_compbench_file_without_its_official_name_is_refused(tmp_path):
    path = write(tmp_path / "color.txt", "a red cube")
    with pytest.raises(ValueError, match=r"like color_train.txt .*got color.txt; keep the offici"):
        read(path, "t2i_compbench")


def test_unknown_format_and_weight_are_refused():
    with pytest.raises(ValueError, match=r"a.csv: expected a format out of \('text', .*got 'csv'"):
        PromptFile("a.csv", "csv")
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"expected a weight above 0, got {weight}; leave"):
            PromptFile("a.txt", "text", weight=weight)


# Official files ---------------------------------------------------------------------------------


def test_official_geneval_file(official):
    prompts = read(official / "geneval" / "evaluation_metadata.jsonl", "geneval")
    assert Counter(prompt.category for prompt in prompts) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert [p.category == "counting" for p in prompts] == [
        bool(p.facts["exclude"]) for p in prompts
    ]


def test_official_t2i_compbench_files(official):
    folder = official / "t2i_compbench"
    for category in COMPBENCH_CATEGORIES:
        for split, size in (("train", 700), ("val", 300)):
            prompts = read(folder / f"{category}_{split}.txt", "t2i_compbench")
            assert len(prompts) == size
            assert {(p.category, facts(p)["split"]) for p in prompts} == {(category, split)}
            assert not [p.text for p in prompts if p.text != p.text.strip()]
    for part, size in (("spatial", 58), ("action", 212), ("spatialaction", 30)):
        prompts = read(folder / f"complex_val_{part}.txt", "t2i_compbench")
        assert [facts(p) for p in prompts] == [{"split": "val", "part": part}] * size


def test_official_t2i_r1_file(official):
    prompts = read(official / "t2i_r1" / "geneval_and_t2i_data_final.json", "t2i_r1")
    assert Counter(prompt.category for prompt in prompts) == {
        "spatial": 2195,
        "numeracy": 1172,
        "color": 879,
        "complex": 700,
        "non": 700,
        "texture": 695,
        "shape": 682,
        "object": 200,
    }
    columns = Counter(name for prompt in prompts for name in facts(prompt))
    assert columns == {
        "nouns": 7223,
        "attr_nouns": 879 + 695 + 682,
        "spatial_info": 2195 + 185,
        "numeracy_info": 1172,
    }
