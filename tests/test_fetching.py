"""Fetching from a server that breaks off, changes its files, or is not there."""

import hashlib
import json
import os
import socket

import pytest

from cotgen_pl.downloads import TRIES, Downloader, UnreachableError
from cotgen_pl.fetching import Fetcher, Recipe, RecipeFile, check_target, read_recipe
from tests.file_server import Served, running

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = os.urandom(300_000)


@pytest.fixture
def server():
    with running() as state:
        yield state


@pytest.fixture
def downloader():
    return Downloader(pause=0.0, show=False)


@pytest.fixture
def fetch(server, downloader, tmp_path):
    """Fetches entries into `tmp_path/weights`; gives the lines told."""

    def run(*entries: RecipeFile) -> list[str]:
        fetcher = Fetcher(tmp_path / "weights", downloader, server.address)
        return list(fetcher.fetch(Recipe(list(entries))))

    return run


def left_over(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def locked(tmp_path) -> dict:
    return json.loads((tmp_path / "fetch.lock").read_text())


def test_broken_downloads_are_resumed(server, downloader, tmp_path):
    server.files["/a"] = Served(CONTENT, breaks=[100_000, 50_000])
    answer = downloader.download(f"{server.address}/a", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert answer.etag == '"one"'
    asked = [wanted for _, wanted in server.asked]
    assert asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_command_resumes(server, downloader, tmp_path):
    server.files["/a"] = Served(CONTENT, breaks=[100_000] + [0] * TRIES)
    with pytest.raises(UnreachableError, match="broke off after 100000 of 300000"):
        downloader.download(f"{server.address}/a", tmp_path / "part")
    server.asked.clear()
    server.files["/a"].breaks.clear()
    downloader.download(f"{server.address}/a", tmp_path / "part")
    assert server.asked == [("/a", "bytes=100000-")]
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_servers_without_ranges_are_asked_for_all(server, downloader, tmp_path):
    server.files["/a"] = Served(CONTENT, breaks=[100_000], ranges=False)
    downloader.download(f"{server.address}/a", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_parts_of_two_versions_are_never_joined(server, downloader, tmp_path):
    server.files["/a"] = Served(OTHER, etag='"old"', breaks=[100_000] + [0] * TRIES)
    with pytest.raises(UnreachableError):
        downloader.download(f"{server.address}/a", tmp_path / "part")
    server.files["/a"] = Served(CONTENT, etag='"new"')
    downloader.download(f"{server.address}/a", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_parts_of_unknown_versions_are_not_gone_on_with(server, downloader, tmp_path):
    server.files["/a"] = Served(CONTENT, etag=None, breaks=[100_000])
    downloader.download(f"{server.address}/a", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, None]


@pytest.mark.parametrize(("etag", "asked"), [('"one"', 1), ('"two"', 2)])
def test_a_whole_part_is_taken_if_it_is_of_this_version(server, downloader, tmp_path, etag, asked):
    server.files["/a"] = Served(CONTENT)
    part = tmp_path / "part"
    downloader.download(f"{server.address}/a", part)
    server.asked.clear()
    server.files["/a"].etag = etag
    downloader.download(f"{server.address}/a", part)
    assert len(server.asked) == asked
    assert part.read_bytes() == CONTENT


def test_overload_is_waited_for(server, downloader, tmp_path):
    server.files["/a"] = Served(CONTENT, status=[503, 429])
    downloader.download(f"{server.address}/a", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_a_pinned_file_is_fetched_once(server, fetch, tmp_path):
    server.files["/a"] = Served(CONTENT)
    entry = RecipeFile("deep/a", f"{server.address}/a", sha256=SHA256, size=len(CONTENT))
    assert "as pinned" in fetch(entry)[0]
    assert "is there" in fetch(entry)[0]
    assert len(server.asked) == 1
    assert left_over(tmp_path) == ["a"]


@pytest.mark.parametrize("pins", [{"sha256": SHA256}, {"size": 7}])
def test_other_bytes_are_refused_and_removed(server, fetch, tmp_path, pins):
    server.files["/a"] = Served(OTHER)
    with pytest.raises(ValueError, match=r"expected (sha256|7 bytes).*, got .* was removed"):
        fetch(RecipeFile("a", f"{server.address}/a", **pins))
    assert left_over(tmp_path) == []


def test_the_first_download_is_pinned(server, fetch, tmp_path):
    server.files["/a"] = Served(CONTENT)
    entry = RecipeFile("a", f"{server.address}/a")
    assert SHA256 in fetch(entry)[0]
    pin = locked(tmp_path)[f"{server.address}/a"]
    assert pin == {"sha256": SHA256, "size": 300_000, "etag": '"one"', "revision": None}
    (tmp_path / "weights" / "a").unlink()
    server.files["/a"].content = OTHER
    with pytest.raises(ValueError, match=r"expected sha256 .*fetch.lock"):
        fetch(entry)
    assert left_over(tmp_path) == ["fetch.lock"]
    assert locked(tmp_path)[f"{server.address}/a"] == pin


def test_a_file_in_place_is_never_overwritten(server, fetch, tmp_path):
    server.files["/a"] = Served(CONTENT)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(OTHER)
    with pytest.raises(ValueError, match="left as it is: move it away"):
        fetch(RecipeFile("a", f"{server.address}/a", sha256=SHA256))
    assert (tmp_path / "weights" / "a").read_bytes() == OTHER
    assert not server.asked


def test_a_file_placed_by_hand_is_pinned(server, fetch, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(CONTENT)
    assert "now pinned" in fetch(RecipeFile("a", "http://nowhere.invalid/a"))[0]
    assert locked(tmp_path)["http://nowhere.invalid/a"]["sha256"] == SHA256
    assert not server.asked


@pytest.mark.parametrize("status", [404, 403])
def test_refusals_say_what_to_do(server, fetch, tmp_path, status):
    server.files["/a"] = Served(CONTENT, status=[status])
    with pytest.raises(ValueError, match=rf"HTTP {status}.*put the file at .*weights/a") as error:
        fetch(RecipeFile("a", f"{server.address}/a"))
    assert f"{server.address}/a" in str(error.value)
    assert len(server.asked) == 1
    assert left_over(tmp_path) == []


def test_no_network_says_what_to_do(fetch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a"
        with pytest.raises(ValueError, match=r"refused.*download that address.*put the file at"):
            fetch(RecipeFile("a", address))


def test_hub_files_are_pinned_to_their_commit(server, fetch, tmp_path):
    server.serve_repository("owner/model", {"model.safetensors": CONTENT})
    entry = RecipeFile("m.safetensors", hub="owner/model", file="model.safetensors")
    fetch(entry)
    pin = locked(tmp_path)["hub:owner/model@main/model.safetensors"]
    assert (pin["revision"], pin["sha256"], pin["etag"]) == ("c0ffee", SHA256, f'"{SHA256}"')
    (tmp_path / "weights" / "m.safetensors").unlink()
    server.asked.clear()
    server.serve_repository("owner/model", {"model.safetensors": OTHER}, "decade")
    fetch(entry)
    assert server.asked[0][0] == "/owner/model/resolve/c0ffee/model.safetensors"
    assert (tmp_path / "weights" / "m.safetensors").read_bytes() == CONTENT


def test_hub_downloads_are_resumed_across_the_redirect(server, fetch, tmp_path):
    server.serve_repository("owner/model", {"model.bin": CONTENT})
    server.files[f"/storage/{SHA256}"].breaks = [100_000]
    fetch(RecipeFile("model.bin", hub="owner/model", file="model.bin"))
    assert (tmp_path / "weights" / "model.bin").read_bytes() == CONTENT
    assert server.asked[-1] == (f"/storage/{SHA256}", "bytes=100000-")


def test_patterns_fetch_what_matches_at_one_commit(server, fetch, tmp_path):
    files = {"config.json": b"{}", "sub/more.json": b"[]", "model.bin": CONTENT}
    server.serve_repository("owner/model", files)
    entry = RecipeFile("model", hub="owner/model", file="*.json")
    assert len(fetch(entry)) == 2
    assert left_over(tmp_path / "weights") == ["config.json", "more.json"]
    assert (tmp_path / "weights" / "model" / "sub" / "more.json").read_bytes() == b"[]"
    listed = locked(tmp_path)["hub:owner/model@main/*.json"]
    assert listed == {"revision": "c0ffee", "files": ["config.json", "sub/more.json"]}
    server.files.clear()
    assert len(fetch(entry)) == 2  # by the lock alone


def test_patterns_fetch_weights_in_one_format(server, fetch, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": CONTENT, "pytorch_model.bin": b"same"}
    server.serve_repository("owner/model", files)
    assert len(fetch(RecipeFile("model", hub="owner/model", file="*"))) == 2
    assert left_over(tmp_path / "weights") == ["config.json", "model.safetensors"]


def test_patterns_take_what_was_placed_by_hand(fetch, tmp_path):
    folder = tmp_path / "weights" / "model"
    entry = RecipeFile("model", hub="owner/model", file="*.json")
    with pytest.raises(ValueError, match=r"HTTP 404.*hf download owner/model --include"):
        fetch(entry)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert len(fetch(entry)) == 1


def test_patterns_that_match_nothing_are_refused(server, fetch):
    server.serve_repository("owner/model", {"config.json": b"{}"})
    with pytest.raises(ValueError, match=r"files like \*.bin .* got none among its 1"):
        fetch(RecipeFile("model", hub="owner/model", file="*.bin"))


def test_a_listing_cannot_lead_out_of_the_folder(server, fetch, tmp_path):
    server.serve_repository("owner/model", {"../../stolen.json": b"{}"})
    with pytest.raises(ValueError, match="inside the folder"):
        fetch(RecipeFile("model", hub="owner/model", file="*.json"))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("target", ["../a", "/a", "a/../../b", "", ".", "C:/a", "a\\..\\b"])
def test_targets_stay_in_the_folder(target):
    with pytest.raises(ValueError, match="inside the folder of downloads"):
        check_target(target)


@pytest.mark.parametrize(
    ("entry", "refusal"),
    [
        ({}, "either a url or hub and file"),
        ({"url": "http://a/b", "hub": "o/n", "file": "f"}, "either a url or hub and file"),
        ({"hub": "o/n"}, "either a url or hub and file"),
        ({"url": "file:///etc/passwd"}, "http"),
        ({"hub": "o/n/../m", "file": "f"}, "hub id"),
        ({"hub": "o/n", "file": "f", "revision": "../x"}, "revision"),
        ({"url": "http://a/b", "sha256": "abc"}, "64 digits"),
        ({"hub": "o/n", "file": "*", "size": 3}, "beside a pattern"),
    ],
)
def test_entries_that_mean_nothing_are_refused(entry, refusal):
    with pytest.raises(ValueError, match=refusal):
        RecipeFile("a", **entry)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("files: []", "got none"),
        ("files: [{target: ../a, url: http://a/b}]", "inside the folder"),
        ("files: [{target: a, url: http://a/b, sha: 1}]", "sha"),
        ("files: [{target: a, url: http://a/b}, {target: a, url: http://a/c}]", "each target once"),
        (
            "files: [{target: a, url: http://a/b}]\nconvert: {format: x, source: /a, target: b}",
            "/a",
        ),
        (": [", "expected a recipe"),
    ],
)
def test_files_that_are_no_recipes_are_refused(text, refusal, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=refusal) as error:
        read_recipe(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"http://nowhere.invalid/a": 3}'])
def test_a_damaged_lock_is_refused(fetch, tmp_path, text):
    (tmp_path / "fetch.lock").write_text(text)
    with pytest.raises(ValueError, match="restore it from version control"):
        fetch(RecipeFile("a", "http://nowhere.invalid/a"))
