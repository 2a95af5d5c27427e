"""Layouts of picture folders: their names, their metadata, and every fault of a foreign folder."""

import json
from pathlib import Path

import pytest
import torch

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt
from cotgen_pl.layouts import Picture, find_pictures, name_pictures, read_picture, write_metadata
from cotgen_pl.pixels import round_to_bytes, to_pillow

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LAYOUTS = ("plain", "geneval", "t2i_compbench")


def make_prompts(*texts: str, category: str = "counting") -> list[Prompt]:
    include = [{"class": "cat", "count": 2}]
    return [
        Prompt(text, category=category, facts={"include": include, "_origin": "a:1"}, index=index)
        for index, text in enumerate(texts)
    ]


PROMPTS = make_prompts("two cats", "two cats.", "a cat and a cat")


def draw_folder(folder: Path, layout: str, prompts=PROMPTS, copies: int = 2) -> dict[str, bytes]:
    """A folder without faults, all pictures different; gives their contents."""
    rows = []
    for name, content in write_metadata(layout, prompts).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for index, names in enumerate(name_pictures(layout, prompts, copies)):
        for copy, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            to_pillow(torch.rand(1, 3, 8, 8))[0].save(folder / name)
            rows.append({"file": name, "prompt": prompts[index].text, "index": index, "copy": copy})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {row["file"]: (folder / row["file"]).read_bytes() for row in rows}


def faults_of(folder: Path, layout: str, prompts=PROMPTS, copies: int | None = 2) -> list[str]:
    """The lines of the error, without the first, which must say what to do."""
    with pytest.raises(ValueError, match="nothing was scored: draw what is missing") as error:
        find_pictures(folder, layout, prompts, copies)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read(layout, tmp_path):
    drawn = draw_folder(tmp_path, layout)
    found = find_pictures(tmp_path, layout, PROMPTS, 2)
    assert [picture.file for picture in found] == list(drawn)
    assert [(p.prompt, p.copy) for p in found] == [(p, copy) for p in PROMPTS for copy in (0, 1)]


def test_official_names():
    assert name_pictures("geneval", PROMPTS, 4)[2] == [
        f"00002/samples/000{copy}.png" for copy in range(4)
    ]
    assert name_pictures("t2i_compbench", PROMPTS, 10)[1] == [
        f"samples/two cats._{number:06d}.png" for number in range(10, 20)
    ]


def test_each_of_several_categories_has_a_folder_that_official_tools_take():
    prompts = make_prompts("a", "b") + make_prompts("c", category="color")
    assert name_pictures("t2i_compbench", prompts, 1) == [
        ["counting/samples/a_000000.png"],
        ["counting/samples/b_000001.png"],
        ["color/samples/c_000000.png"],
    ]
    with pytest.raises(ValueError, match=r"a category that can name a folder .* got '' for 'd'"):
        name_pictures("t2i_compbench", [*prompts, Prompt("d")], 1)


@pytest.mark.parametrize("text", ["a_b", "a/b", "é" * 120])
def test_texts_that_no_file_can_be_named_by_are_refused(text):
    with pytest.raises(ValueError, match=r"got 1 others: .*reword .* or take the layout plain"):
        name_pictures("t2i_compbench", [Prompt("a cat"), Prompt(text)], 1)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmarks' prompt files")
def test_metadata_is_the_line_of_the_benchmark():
    path = DATA / "geneval" / "evaluation_metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written = write_metadata("geneval", read_prompts(PromptFile(str(path), "geneval")))
    assert [json.loads(content) for content in written.values()] == lines
    assert len(lines) == 553
    assert list(written)[-1] == "00552/metadata.jsonl"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmarks' prompt files")
def test_all_prompts_of_t2i_compbench_can_name_files():
    paths = sorted((DATA / "t2i_compbench").glob("*_val.txt"))
    files = [PromptFile(str(path), "t2i_compbench") for path in paths]
    names = name_pictures("t2i_compbench", [p for file in files for p in read_prompts(file)], 10)
    assert len({name for of in names for name in of}) == 8 * 300 * 10
    assert names[300][0].split("/")[0] == "color"


# Foreign folders --------------------------------------------------------------------------------


def test_official_tools_own_files_are_no_faults(tmp_path):
    draw_folder(tmp_path / "a", "geneval")
    first = tmp_path / "a/00000"
    (first / "samples/0000.png").rename(first / "samples/00000.png")  # five digits, as Flux has
    (first / "grid.png").write_bytes(b"")
    assert find_pictures(tmp_path / "a", "geneval", PROMPTS, 2)[0].file.endswith("/00000.png")
    draw_folder(tmp_path / "b", "t2i_compbench")
    (tmp_path / "b/labels/depth").mkdir(parents=True)
    (tmp_path / "b/labels/depth/0.png").write_bytes(b"")
    assert len(find_pictures(tmp_path / "b", "t2i_compbench", PROMPTS, 2)) == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_faults_are_listed_at_once(layout, tmp_path):
    files = list(draw_folder(tmp_path, layout))
    (tmp_path / files[0]).unlink()
    (tmp_path / files[3]).unlink()
    for number, size in ((1, 0), (4, -20)):
        content = (tmp_path / files[number]).read_bytes()
        (tmp_path / files[number]).write_bytes(content[:size])
    (tmp_path / files[2]).with_name("mine_000099.png").write_bytes(b"")
    extra = (Path(files[2]).parent / "mine_000099.png").as_posix()
    lines = faults_of(tmp_path, layout)
    assert lines[:3] == [f"missing: {files[0]}", f"missing: {files[3]}", f"extra: {extra}"]
    assert [line.split(" (")[0] for line in lines[3:]] == [
        f"unreadable: {files[1]}",
        f"unreadable: {files[4]}",
    ]


@pytest.mark.parametrize("layout", ["geneval", "t2i_compbench"])
def test_the_official_number_of_copies_is_the_default(layout, tmp_path):
    draw_folder(tmp_path, layout, copies=4)
    if layout == "geneval":
        assert len(find_pictures(tmp_path, layout, PROMPTS)) == 12
    else:
        assert len(faults_of(tmp_path, layout, copies=None)) == 3 * 10 - 1 * 4 + 2 * 4
    lines = faults_of(tmp_path, "geneval" if layout == "geneval" else layout, copies=3)
    assert any(line.startswith("extra: ") for line in lines)


def test_geneval_pictures_beyond_the_prompts_are_extra(tmp_path):
    draw_folder(tmp_path, "geneval")
    lines = faults_of(tmp_path, "geneval", PROMPTS[:2])
    assert lines == ["extra: 00002/samples/0000.png", "extra: 00002/samples/0001.png"]


def test_geneval_metadata_must_match_the_prompts(tmp_path):
    draw_folder(tmp_path, "geneval")
    first, second, third = (tmp_path / f"0000{row}/metadata.jsonl" for row in range(3))
    line = json.loads(first.read_text())
    first.write_text(json.dumps(line | {"tag": "colors"}))
    second.write_text("{")
    third.unlink()
    lines = faults_of(tmp_path, "geneval")
    assert lines[0] == (
        "not as the prompts have it: 00000/metadata.jsonl: tag 'colors' instead of 'counting'"
    )
    assert "00001/metadata.jsonl: Expecting" in lines[1]
    assert lines[2:] == ["not as the prompts have it: 00002/metadata.jsonl: no file"]
    first.write_text(json.dumps(line | {"include": [{"class": "dog", "count": 2}]}))
    assert "include [{'class': 'dog', 'count': 2}] instead of" in faults_of(tmp_path, "geneval")[0]


def test_a_manifest_may_tell_only_file_and_prompt(tmp_path):
    draw_folder(tmp_path, "plain")
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    short = [{"file": row["file"], "prompt": row["prompt"]} for row in reversed(rows)]
    text = "\n".join(map(json.dumps, short))  # without an end of the last line
    (tmp_path / "manifest.jsonl").write_text(text)
    found = find_pictures(tmp_path, "plain", PROMPTS)
    assert [p.file for p in found[:2]] == ["000000_0001.png", "000000_0000.png"]
    assert found[5] == Picture("000002_0000.png", PROMPTS[2], 1)


def test_a_manifest_must_match_the_prompts(tmp_path):
    draw_folder(tmp_path, "plain")
    with (tmp_path / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"file": "000000_0000.png", "prompt": "a dog"}\n')
        manifest.write('{"file": "a.png", "prompt": "two cats", "index": 1}\n')
        manifest.write('{"file": "000001_0001.png", "prompt": "two cats.", "copy": 2}\n')  # twice
        manifest.write('{"file": "b.png", "prompt": "two cats", "copy": "x"}\n')
    lines = faults_of(tmp_path, "plain")
    assert [line.split(": {'file'")[0] for line in lines] == [
        f"not as the prompts have it: manifest.jsonl:{number}" for number in (7, 8, 9, 10)
    ]


def test_a_folder_that_is_no_such_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder of pictures at .*nowhere, got none"):
        find_pictures(tmp_path / "nowhere", "geneval", PROMPTS)
    with pytest.raises(ValueError, match=r"manifest.jsonl with a row for each picture, got no f"):
        find_pictures(tmp_path, "plain", PROMPTS)


def test_pictures_are_read_as_they_were_written(tmp_path):
    image = round_to_bytes(torch.rand(3, 5, 7))
    to_pillow(image[None])[0].save(tmp_path / "a.png")
    assert torch.equal(read_picture(tmp_path / "a.png"), image)
    to_pillow(image[None])[0].convert("L").save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").shape == (3, 5, 7)
