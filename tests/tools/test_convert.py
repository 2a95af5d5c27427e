"""`tools/convert.py`: every format resolves, and a target is there whole or not at all."""

import inspect

import pytest
import torch

from cotgen_pl.conversion import formats
from cotgen_pl.conversion.formats import FORMATS, convert_checkpoint, find_converter
from cotgen_pl.conversion.keys import Conversion
from tests.conversion.test_mask2former import mmdet_weights, write
from tools.convert import OPTIONS, main


@pytest.fixture
def detector(tmp_path):
    return write(tmp_path, mmdet_weights())


def failing(source, target):
    (target / "model.safetensors").write_text("half")
    raise ValueError("expected all of it,\ngot half; download it again")


def without_room(source, target):
    (target / "model.safetensors").write_text("half")
    raise OSError("no space left on device")


@pytest.fixture
def replace_converter(monkeypatch):
    def replace(converter) -> None:
        monkeypatch.setattr(formats, "find_converter", lambda name: converter)

    return replace


@pytest.mark.parametrize("name", FORMATS)
def test_formats_resolve_and_their_options_are_offered(name):
    source, target, *extra = inspect.signature(find_converter(name)).parameters
    assert (source, target) == ("source", "target")
    assert set(extra) <= set(OPTIONS)


def test_every_option_has_a_format():
    parameters = [inspect.signature(find_converter(name)).parameters for name in FORMATS]
    assert set(OPTIONS) == {n for names in parameters for n in names} - {"source", "target"}


def test_a_summary_is_printed(detector, tmp_path, capsys):
    target = tmp_path / "deep" / "new"
    assert main(["mask2former", str(detector), str(target)]) == 0
    output = capsys.readouterr().out
    assert f"{detector} -> {target}" in output
    assert "left out on purpose: backbone.stages.0.blocks.0" in output
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["new"]


def test_an_empty_target_is_taken(detector, tmp_path):
    (tmp_path / "new").mkdir()
    assert main(["mask2former", str(detector), str(tmp_path / "new")]) == 0


@pytest.mark.parametrize(
    ("converter", "refusal"), [(failing, "all of it, got half"), (without_room, "no space left")]
)
def test_mistakes_are_one_line_and_leave_nothing(
    detector, tmp_path, capsys, replace_converter, converter, refusal
):
    replace_converter(converter)
    assert main(["mask2former", str(detector), str(tmp_path / "new")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert refusal in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == [detector.name]


def test_what_a_killed_run_left_is_cleared(detector, tmp_path):
    left = tmp_path / ".new.part"
    left.mkdir()
    (left / "old").write_text("half")
    convert_checkpoint("mask2former", detector, tmp_path / "new")
    assert not (tmp_path / "new" / "old").exists()
    assert not left.exists()


def test_targets_with_something_in_them_are_left(detector, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("mine")
    assert main(["mask2former", str(detector), str(tmp_path / "new")]) == 2
    assert "something there" in capsys.readouterr().err
    assert (tmp_path / "new" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["mask2former", "nowhere", "new"], "got nothing"),
        (["mask2former", "{file}", "new", "--template", "janus"], "template"),
        (["janus", "{file}", "new"], "template"),
        (["mask2former", "{file}", "{file}/new"], "Not a directory"),
    ],
)
def test_wrong_arguments_are_told(detector, tmp_path, capsys, monkeypatch, arguments, refusal):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(file=detector) for argument in arguments]) == 2
    assert refusal in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_unknown_formats_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["onnx", "a", "b"])
    assert stop.value.code == 2
    assert "image_reward" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a format among image_reward"):
        find_converter("onnx")


def test_no_pickle_is_run(tmp_path, capsys):
    torch.save({"state_dict": Conversion}, tmp_path / "evil.pth")
    assert main(["mask2former", str(tmp_path / "evil.pth"), str(tmp_path / "new")]) == 2
    assert "run code when opened" in capsys.readouterr().err
