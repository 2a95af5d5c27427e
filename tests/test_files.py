"""Files that are there whole or not at all."""

import resource

import pytest

from cotgen_pl.files import append_whole, write_whole


def test_a_file_is_written_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_whole(path, lambda part: part.write_text("one"))
    write_whole(path, lambda part: part.write_text("two"))
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ValueError, match=r"expected room for .*a.txt, got: .*; what was fin"):
            write_whole(path, lambda part: part.write_text("new" * 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_between_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_and_die(part):
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write_and_die)
    assert path.read_text() == "old"


def test_text_is_added_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    append_whole(path, "one\n")
    append_whole(path, "two\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"expected room for .*a.txt, got: .* free some room, and go on with --ckpt_path last"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ValueError, match=message):
            append_whole(path, "three" * 1000)
        assert path.read_text() == "one\ntwo\n"
        append_whole(path, "four\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "one\ntwo\nfour\n"
