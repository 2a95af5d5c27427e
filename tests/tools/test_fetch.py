"""`tools/fetch.py`: recipes parse, files arrive, what they need is converted once."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
import yaml

from cotgen_pl.conversion.formats import FORMATS
from cotgen_pl.downloads import Downloader
from cotgen_pl.fetching import read_recipe
from tests.conversion.test_mask2former import mmdet_weights
from tests.file_server import Served, running
from tools.fetch import RECIPES, main, recipe_names

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = [
    "aesthetic",
    "blip_vqa",
    "clip_score",
    "geneval_prompts",
    "git",
    "grounding_dino",
    "hps_v2.1",
    "image_reward",
    "janus_pro_1b",
    "mask2former",
    "orm",
    "phrases",
    "pick_score",
    "t2i_compbench_prompts",
    "t2i_r1_prompts",
    "unified_reward",
    "unified_reward_llava",
]


@pytest.fixture
def server():
    with running() as state:
        yield state


@pytest.fixture
def fetch():
    def run(*arguments) -> int:
        return main([str(a) for a in arguments], Downloader(pause=0.0, show=False))

    return run


def write_recipe(place: Path, name: str, **content) -> Path:
    file = place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_finds_the_recipes():
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipes_parse(name):
    file = RECIPES / f"{name}.yaml"
    recipe = read_recipe(file)
    assert file.read_text().startswith("# ")
    targets = [entry.target for entry in recipe.files]
    if recipe.convert is not None:
        assert recipe.convert.format in FORMATS
        for needed in (recipe.convert.source, *recipe.convert.folders.values()):
            assert any(target == needed or target.startswith(f"{needed}/") for target in targets)
        assert not any(target.startswith(f"{recipe.convert.target}/") for target in targets)


@pytest.mark.parametrize("name", ["geneval_prompts", "t2i_compbench_prompts", "t2i_r1_prompts"])
def test_prompt_files_are_pinned_to_a_commit(name):
    for entry in read_recipe(RECIPES / f"{name}.yaml").files:
        assert entry.sha256
        assert entry.size
        assert len(entry.url.split("/")[5]) == 40


def test_pins_are_those_of_the_files():
    if not DATA.is_dir():
        pytest.skip(f"no copy of the benchmarks' files in {DATA}")
    checked = 0
    for name in ("geneval_prompts", "t2i_compbench_prompts", "t2i_r1_prompts"):
        for entry in read_recipe(RECIPES / f"{name}.yaml").files:
            copy = DATA / entry.target
            if copy.exists():
                content = copy.read_bytes()
                assert hashlib.sha256(content).hexdigest() == entry.sha256
                assert len(content) == entry.size
                checked += 1
    assert checked >= 25


def test_files_are_fetched_and_converted_once(server, fetch, tmp_path, capsys):
    content = io.BytesIO()
    torch.save({"state_dict": mmdet_weights()}, content)
    server.files["/detector.pth"] = Served(content.getvalue(), breaks=[1000])
    recipe = write_recipe(
        tmp_path,
        "detector",
        files=[{"target": "original/detector.pth", "url": f"{server.address}/detector.pth"}],
        convert={"format": "mask2former", "source": "original/detector.pth", "target": "ready"},
    )
    folder = tmp_path / "weights"
    assert fetch(recipe, "--to", folder) == 0
    assert (folder / "ready" / "model.safetensors").is_file()
    assert "tensors read" in capsys.readouterr().out
    assert (tmp_path / "fetch.lock").is_file()
    assert fetch(recipe, "--to", folder) == 0
    assert "tensors read" not in capsys.readouterr().out
    assert len(server.asked) == 2


def test_a_failed_recipe_does_not_stop_the_others(server, fetch, tmp_path, capsys):
    server.files["/b"] = Served(b"b")
    missing, there = (
        write_recipe(tmp_path, name, files=[{"target": name, "url": f"{server.address}/{name}"}])
        for name in "ab"
    )
    assert fetch(missing, there, "nothing", "--to", tmp_path / "weights") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "HTTP 404" in errors[0]
    assert "expected a recipe among aesthetic" in errors[1]
    assert (tmp_path / "weights" / "b").read_bytes() == b"b"


def test_places_that_cannot_be_written_are_told_in_one_line(server, fetch, tmp_path, capsys):
    recipe = write_recipe(tmp_path, "a", files=[{"target": "a", "url": f"{server.address}/a"}])
    (tmp_path / "file").write_text("")
    (tmp_path / "weights" / "a").mkdir(parents=True)
    assert fetch(recipe, "--to", tmp_path / "file") == 2  # a file in place of the folder
    assert fetch(recipe, "--to", tmp_path / "weights") == 2  # a folder in place of the file
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)


def test_hub_files_come_from_the_mirror_asked_for(server, fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    server.serve_repository("xswu/HPSv2", {"HPS_v2.1_compressed.pt": b"weights"})
    assert fetch("hps_v2.1", "--to", tmp_path / "weights") == 0
    assert (tmp_path / "weights" / "HPS_v2.1_compressed.pt").read_bytes() == b"weights"


def test_recipes_lie_where_they_say_without_a_folder(server, fetch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.files["/a"] = Served(b"a")
    files = [{"target": "a", "url": f"{server.address}/a"}]
    assert fetch(write_recipe(tmp_path, "x", folder="data", files=files)) == 0
    assert (tmp_path / "data" / "a").exists()
    assert (tmp_path / "fetch.lock").exists()
