"""Finding, reading and fitting weights."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cotgen_pl.weights import (
    describe_misfits,
    download_weights,
    find_weights,
    load_strictly,
    read_tensors,
)

WEIGHTS = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
NAMES = ("first.pt", "second.safetensors")


def test_a_file_speaks_for_itself(tmp_path):
    file = tmp_path / "of any name"
    file.touch()
    assert find_weights(str(file), NAMES, "a scorer's") == file


def test_the_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "first.pt").touch()
    assert find_weights("~/first.pt", NAMES, "a scorer's") == tmp_path / "first.pt"


def test_a_folder_gives_the_first_name_that_is_there(tmp_path):
    (tmp_path / "second.safetensors").touch()
    assert find_weights(str(tmp_path), NAMES, "a scorer's") == tmp_path / "second.safetensors"
    (tmp_path / "first.pt").touch()
    assert find_weights(str(tmp_path), NAMES, "a scorer's") == tmp_path / "first.pt"


def test_an_empty_folder_is_refused(tmp_path):
    message = (
        r"^CLIP weights: expected first.pt or second.safetensors in the folder .* none of them"
    )
    with pytest.raises(ValueError, match=message):
        find_weights(str(tmp_path), NAMES, "CLIP")


@pytest.mark.parametrize("path", ["owner/name", "timm/vit_base_patch32_clip_224.openai"])
def test_owner_and_name_are_a_hub_repository(path):
    assert find_weights(path, NAMES, "CLIP") is None


@pytest.mark.parametrize("path", ["/no/file", "name", "a/b/c", "./a/b", "a/b.pth", "a/b.bin"])
def test_anything_else_is_refused(path):
    with pytest.raises(ValueError, match=r"^CLIP weights: expected a file, a folder or a hub"):
        find_weights(path, NAMES, "CLIP")


def test_a_download_takes_what_must_lie_beside(tmp_path, monkeypatch):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    file = download_weights("owner/name", "model.safetensors", "CLIP", "config.json")
    assert file == tmp_path / "model.safetensors"
    assert asked == [("owner/name", "config.json"), ("owner/name", "model.safetensors")]


def test_a_download_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = r"run `hf download owner/name model.pt config.json`, then set path to what it prints"
    with pytest.raises(ValueError, match=message):
        download_weights("owner/name", "model.pt", "CLIP", "config.json")


def write(file: Path, content) -> Path:
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.safetensors", WEIGHTS),
        ("a.pt", WEIGHTS),
        ("a.bin", {"state_dict": WEIGHTS, "epoch": 3}),
        ("a.pth", {"model": WEIGHTS, "optimizer": {"lr": 0.1}}),
    ],
)
def test_tensors_are_found_in_the_usual_places(tmp_path, name, content):
    tensors = read_tensors(write(tmp_path / name, content))
    assert set(tensors) == {"weight", "bias"}
    assert all(torch.equal(tensors[key], WEIGHTS[key]) for key in WEIGHTS)


class Armed:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, zipped):
    file, mark = tmp_path / "a.pt", tmp_path / "ran"
    if zipped:
        torch.save({**WEIGHTS, "extra": Armed(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Armed(mark), protocol=2))
    with pytest.raises(ValueError, match="tensors only, got one that is damaged or would run code"):
        read_tensors(file)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, name):
    whole = write(tmp_path / name, WEIGHTS).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="got one that is damaged"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"\x85.", b"h\x07.", b"j\x01.", b"\x80\x02}N\x85R.", b"<html>", b"version https"]
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.pt: expected a checkpoint .* that is damaged"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"epoch": 3}}, torch.zeros(2)])
def test_other_contents_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="expected tensors by name, or those under 'state_dict'"):
        read_tensors(write(tmp_path / "a.pt", content))


def test_all_weights_must_fit():
    model = nn.Linear(2, 1)
    load_strictly(model, WEIGHTS, "never: {misfits}")
    assert model(torch.tensor([1.0, 1.0])).item() == 6.0
    wrong = {"weight": torch.zeros(1, 3), "scale": torch.zeros(1)}
    message = (
        r"^a line: 1 missing \(first: bias\), 1 unknown \(first: scale\), "
        r"1 of another shape \(first: weight\)$"
    )
    with pytest.raises(ValueError, match=message):
        load_strictly(model, wrong, "a line: {misfits}")
    assert model.weight.tolist() == [[1.0, 2.0]]  # left as it was


def test_what_fits_has_no_misfits():
    assert describe_misfits(nn.Linear(2, 1).state_dict(), WEIGHTS) == ""
