"""Checkpoints of a run: written whole, checked before they are read, the newest good one found."""

import os
import warnings
from pathlib import Path

import pytest
import torch

from cotgen_pl.files import check_digests, write_digests
from cotgen_pl.run_checkpoints import WholeCheckpoints, check_whole, newest_good
from tests.test_command_line import (  # noqa: F401  # a fixture
    assert_same,
    fit,
    little_room,
    read_checkpoint,
    read_metrics,
    run,
)

STATE = {"weights": torch.arange(300.0), "progress": {"rollouts": 3}, "lr": [1e-3, "a"]}


def write(path: Path, age_s: int = 0) -> Path:
    """A checkpoint that was written some time ago."""
    WholeCheckpoints().save_checkpoint(STATE, path)
    written = path.stat().st_mtime - age_s
    os.utime(path, (written, written))
    return path


def cut(path: Path, size: int = 1000) -> None:
    """Leave the first bytes of a file, and the time that it was written at."""
    times = path.stat()
    path.write_bytes(path.read_bytes()[:size])
    os.utime(path, (times.st_atime, times.st_mtime))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    checkpoints, path = WholeCheckpoints(), tmp_path / "checkpoints" / "last.ckpt"
    checkpoints.save_checkpoint({"weights": torch.zeros(3)}, str(path))
    message = r"expected room for .*last.ckpt, got: .*; what was finished before it stays: free"
    with little_room(10_000), pytest.raises(ValueError, match=message):
        checkpoints.save_checkpoint({"weights": torch.ones(10_000)}, str(path))
    assert torch.equal(checkpoints.load_checkpoint(path)["weights"], torch.zeros(3))
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_cut_at_any_byte_is_refused(tmp_path):
    path = write(tmp_path / "last.ckpt")
    whole = path.read_bytes()
    assert_same(WholeCheckpoints().load_checkpoint(path), STATE)
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"expected a whole checkpoint at .*, got a damaged"):
            WholeCheckpoints().load_checkpoint(path)


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    """What is not covered by a checksum is padding, and the dates of entries."""
    path = write(tmp_path / "last.ckpt")
    whole, refused = path.read_bytes(), 0
    places = range(0, len(whole), 7)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 0x41
        path.write_bytes(changed)
        try:
            check_whole(path)
        except ValueError:
            refused += 1
        else:
            assert_same(torch.load(path, weights_only=True), STATE)
    assert refused > 0.7 * len(places)


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": Path("x")}, path)
    with pytest.raises(ValueError, match=r"got a damaged one .*Weights only load failed"):
        WholeCheckpoints().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("damage", ["changed", "missing", "more", "list"])
def test_a_folder_is_checked_by_its_list(tmp_path, damage):
    folder = tmp_path / "last.ckpt" / "1"
    folder.mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(name.encode())
    torch.save(STATE, folder.parent / "meta.pt")
    write_digests(folder)
    check_whole(folder.parent)
    if damage == "changed":
        (folder / "b.safetensors").write_bytes(b"c.safetensors")
    elif damage == "missing":
        (folder / "b.safetensors").unlink()
    elif damage == "more":
        (folder / "b.safetensors.part").touch()
    else:
        cut(folder / "checksums.json", 30)
    with pytest.raises(ValueError, match=r"expected the files of .*/1 as checksums.json has them"):
        check_whole(folder.parent)


def test_a_folder_whose_own_file_is_cut_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "meta.pt")
    cut(tmp_path / "meta.pt")
    with pytest.raises(ValueError, match=r"got a damaged one \(meta.pt"):
        check_whole(tmp_path)


def test_a_folder_that_was_never_finished_is_refused(tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(ValueError, match=r"got a damaged one \(it was never finished\)"):
        check_whole(tmp_path)


def test_an_empty_list_is_no_list(tmp_path):
    (tmp_path / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got others: checksums\.json"):
        check_digests(tmp_path)


def test_the_newest_good_one_is_a_last_one_where_one_is_good(tmp_path):
    write(tmp_path / "best.ckpt")
    older, newer = write(tmp_path / "last.ckpt", 60), write(tmp_path / "last-v1.ckpt", 30)
    assert newest_good([tmp_path]) == newer
    cut(newer)
    with pytest.warns(UserWarning, match=r"not gone on with: .*last-v1.ckpt, got a damaged one"):
        assert newest_good([tmp_path]) == older


def test_the_newest_good_one_is_any_where_no_last_one_is_good(tmp_path):
    cut(write(tmp_path / "last.ckpt"))
    write(tmp_path / "epoch=0-step=2.ckpt", 60)
    newer = write(tmp_path / "epoch=0-step=4.ckpt", 30)
    with pytest.warns(UserWarning, match=r"last.ckpt"):
        assert newest_good([tmp_path]) == newer
    for path in tmp_path.iterdir():
        cut(path)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"expected a whole checkpoint in .*, got 3 damaged ones"),
    ):
        warnings.simplefilter("ignore")
        newest_good([tmp_path])


def test_without_a_last_one_there_is_none(tmp_path):
    write(tmp_path / "best.ckpt")
    assert newest_good([tmp_path, tmp_path / "nowhere"]) is None


def test_a_run_whose_last_checkpoint_is_cut_goes_on_from_the_one_before(run, tmp_path):  # noqa: F811
    settings, whole = run
    folder = fit(settings, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    for name in ("last", "best", "epoch=0-step=6"):
        cut(checkpoints / f"{name}.ckpt")
    with pytest.warns(UserWarning, match=r"not gone on with: .*last.ckpt"):
        fit(settings, folder, "--ckpt_path", "last")
    assert_same(read_checkpoint(folder), read_checkpoint(whole))
    assert read_metrics(folder) == read_metrics(whole)
    cut(checkpoints / "last.ckpt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"expected a whole checkpoint at .*last.ckpt, got a dam"):
        fit(settings, folder, "--ckpt_path", str(checkpoints / "last.ckpt"))
    assert {path: path.read_bytes() for path in before} == before
