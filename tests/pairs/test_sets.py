"""Pair sets on disk: what is written is read again, by us and by others; bad ones are refused."""

import io
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cotgen_pl.interfaces import Prompt
from cotgen_pl.pairs.sets import (
    Drawn,
    PairSet,
    PairSetWriter,
    load_reference,
    save_reference,
    tokens_hash,
)
from tests.toys import write_pairs

SETTINGS = {"policy": "abc", "reward": {"name": "toy", "weights": [1, 2]}}
POLICY = SimpleNamespace(num_tokens=4, codebook_size=32)
PROMPTS = [
    Prompt("a red circle", "train", "color", {"objects": [{"name": "circle"}]}, "Ein Kreis", 7, 2),
    Prompt("zwei Kätzchen", index=3),
]


def drawn(seed: int = 0) -> Drawn:
    """Two groups of 3 pictures of 5 x 6 px."""
    generator = torch.Generator().manual_seed(seed)
    return Drawn(
        prompts=PROMPTS,
        tokens=torch.randint(0, 32, (6, 4), generator=generator),
        images=torch.rand(6, 3, 5, 6, generator=generator),
        scores=torch.rand(6, generator=generator),
        seeds=[2**62 + k for k in range(6)],
    )


def write_shard(writer: PairSetWriter, shard: int, chosen=(0, 4), rejected=(2, 3)) -> None:
    dropped = {"equal": 2 - len(chosen), "margin": 0}
    rows = drawn(shard).pairs(chosen, rejected)
    writer.write(shard, rows, num_prompts=2, num_images=6, dropped=dropped)


@pytest.fixture
def finished(tmp_path) -> PairSet:
    """Three shards of 2, 0 and 1 pairs."""
    writer = PairSetWriter(tmp_path / "set", 3, SETTINGS)
    write_shard(writer, 0)
    write_shard(writer, 1, (), ())
    write_shard(writer, 2, [5], [3])
    return writer.finish()


def shard_of(pairs: PairSet, number: int) -> Path:
    return sorted((pairs.folder / "data").glob("*.parquet"))[number]


# Writing and reading ----------------------------------------------------------------------------


def test_what_is_written_is_read_in_any_order(finished):
    assert len(finished) == 3
    batch = finished.batch([2, 0])
    first, last = drawn(0), drawn(2)
    assert batch.prompts == [PROMPTS[1], PROMPTS[0]]
    assert torch.equal(batch.chosen, torch.stack([last.tokens[5], first.tokens[0]]))
    assert torch.equal(batch.rejected, torch.stack([last.tokens[3], first.tokens[2]]))
    expected = [[last.scores[5], last.scores[3]], [first.scores[0], first.scores[2]]]
    assert torch.equal(batch.scores, torch.tensor(expected))
    assert batch.rows.tolist() == [2, 0] and len(batch) == 2
    assert (batch.chosen.dtype, batch.scores.dtype) == (torch.int64, torch.float32)
    assert list(finished.prompts()) == [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert finished.batch(torch.tensor([1])).rows.tolist() == [1]


def test_settings_and_totals_are_kept(finished):
    assert finished.settings == SETTINGS
    dropped = {"equal": 3, "margin": 0}
    assert finished.counts == {"prompts": 6, "images": 18, "pairs": 3, "dropped": dropped}
    stored = json.loads((finished.folder / "pairs.json").read_text())
    assert stored["settings"] == SETTINGS


def test_a_pair_of_two_prompts_is_no_pair():
    with pytest.raises(AssertionError, match="a pair has one prompt"):
        drawn().pairs([0], [3])


@pytest.mark.parametrize("how", ["folder", "files", "pandas"])
def test_other_tools_open_a_set_and_its_pictures_are_lossless(finished, tmp_path, how):
    files = [str(shard_of(finished, number)) for number in range(3)]
    if how == "folder":
        rows = list(datasets.load_dataset(str(finished.folder), cache_dir=tmp_path / "c")["train"])
    elif how == "files":
        found = datasets.load_dataset("parquet", data_files=files, cache_dir=tmp_path / "c")
        rows = list(found["train"])
    else:
        pandas = pytest.importorskip("pandas")
        rows = [row for file in files for row in pandas.read_parquet(file).to_dict("records")]
    assert [row["caption"] for row in rows] == [p.text for p in finished.prompts()]
    assert [(row["label_0"], row["label_1"]) for row in rows] == [(1.0, 0.0)] * 3
    assert [row["seed_1"] for row in rows] == [2**62 + 2, 2**62 + 3, 2**62 + 3]
    picture = Image.open(io.BytesIO(rows[0]["jpg_1"]))
    assert (picture.format, picture.size) == ("PNG", (6, 5))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(5, 6, 3)
    expected = (drawn().images[2].permute(1, 2, 0) * 255).round()
    assert torch.equal(pixels.float(), expected)


def test_reading_leaves_the_home_folder_alone(finished, monkeypatch, tmp_path):
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "home")
    datasets.Dataset.cleanup_cache_files(finished._rows)
    assert len(PairSet(finished.folder).batch([0])) == 1
    assert not (tmp_path / "home").exists()


def test_a_set_that_is_made_anew_is_read_anew(finished):
    before = finished.batch([0]).chosen
    for path in finished.folder.rglob("*.json"):
        if ".reading" not in path.parts:
            path.unlink()
    writer = PairSetWriter(finished.folder, 3, SETTINGS)
    for shard in range(3):
        assert not writer.is_finished(shard)
        write_shard(writer, shard, [1, 5], [0, 4])
    after = writer.finish()
    assert len(after) == 6
    assert torch.equal(after.batch([0]).chosen[0], drawn(0).tokens[1])
    assert not torch.equal(after.batch([0]).chosen, before)


def test_one_copy_for_reading_is_kept_wherever_the_set_is(tmp_path, monkeypatch):
    def copies(folder):
        return list((folder / ".reading").rglob("*.arrow"))

    before = write_pairs(tmp_path / "a", 3)
    tokens = before.batch([0, 1, 2]).chosen
    [first] = copies(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert torch.equal(PairSet(tmp_path / "b").batch([0, 1, 2]).chosen, tokens)
    [second] = copies(tmp_path / "b")
    assert second.relative_to(tmp_path / "b") != first.relative_to(tmp_path / "a")
    assert torch.equal(before.batch([0, 1, 2]).chosen, tokens)  # still mapped
    written = second.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert torch.equal(PairSet("b").batch([0, 1, 2]).chosen, tokens)
    assert [path.stat().st_mtime_ns for path in copies(tmp_path / "b")] == [written]


def test_pictures_are_not_copied_for_reading(finished):
    stored = set(finished._rows.column_names)
    assert {"caption", "tokens_0"} <= stored
    assert not stored & {"jpg_0", "jpg_1"}


@pytest.mark.slow
def test_ten_thousand_pairs_are_read_in_constant_memory(tmp_path):
    tokens = torch.randint(0, 16384, (2000, 576), generator=torch.Generator().manual_seed(0))
    writer = PairSetWriter(tmp_path, 10, {})
    for shard in range(10):
        prompts = [Prompt(f"prompt {shard} {number}") for number in range(1000)]
        images, scores = torch.zeros(2000, 3, 2, 2), torch.zeros(2000)
        part = Drawn(prompts, tokens.roll(shard, 1), images, scores, [None] * 2000)
        rows = part.pairs(range(0, 2000, 2), range(1, 2000, 2))
        writer.write(shard, rows, num_prompts=1000, num_images=2000, dropped={})
    writer.finish()
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(1)).split(32)
    arrow, before = pa.total_allocated_bytes(), _own_memory()
    pairs = PairSet(tmp_path)
    for rows in order:
        pairs.batch(rows)
    pairs.check_fits(SimpleNamespace(num_tokens=576, codebook_size=16384))
    tokens_hash(pairs)
    # The tokens of all pairs are 46 MB, as read 92 MB.
    assert pa.total_allocated_bytes() - arrow < 1_000_000
    assert _own_memory() - before < 20_000_000


def _own_memory() -> int:
    """Bytes that the process holds itself: pages of mapped files are the system's to take back."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


# Interrupted and refused ------------------------------------------------------------------------


def test_a_build_goes_on_behind_its_finished_shards(tmp_path):
    writer = PairSetWriter(tmp_path, 3, SETTINGS)
    write_shard(writer, 1)
    again = PairSetWriter(tmp_path, 3, SETTINGS)
    assert [again.is_finished(shard) for shard in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match=r"expected 3 shards in .*, got none for \[0, 2\]; put"):
        again.finish()
    with pytest.raises(ValueError, match=r"got one that was begun; resume the run that builds it"):
        PairSet(tmp_path)


def test_a_shard_without_its_counts_is_not_finished(tmp_path):
    writer = PairSetWriter(tmp_path, 1, SETTINGS)
    write_shard(writer, 0)
    (tmp_path / "counts" / "00000.json").unlink()
    assert not writer.is_finished(0)


def test_a_build_with_other_settings_is_refused(tmp_path):
    PairSetWriter(tmp_path, 3, SETTINGS)
    other = SETTINGS | {"reward": {"name": "toy", "weights": [1, 3]}}
    message = r"was begun with reward .*\[1, 2\].*, got .*\[1, 3\].*; go on with the settings"
    with pytest.raises(ValueError, match=message):
        PairSetWriter(tmp_path, 3, other)
    with pytest.raises(ValueError, match="was begun with num_shards 3, got 4; go on"):
        PairSetWriter(tmp_path, 4, SETTINGS)


def test_full_disk_discards_the_shard_in_work_and_no_other(tmp_path):
    writer = PairSetWriter(tmp_path, 2, SETTINGS)
    write_shard(writer, 0)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        with pytest.raises(ValueError, match=r"expected room for .*train-00001-of-00002.parquet"):
            write_shard(writer, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    write_shard(writer, 1)
    assert len(writer.finish()) == 4


@pytest.mark.parametrize("damage", ["truncated", "removed", "other"])
def test_a_damaged_shard_is_named(finished, damage):
    path = shard_of(finished, 2)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(shard_of(finished, 0).read_bytes())
    message = r"a readable shard at .*train-00002-of-00003.*; copy it again, or draw the set in a "
    with pytest.raises(ValueError, match=message):
        PairSet(finished.folder)


def test_a_shard_that_is_broken_inside_is_named(finished):
    path = shard_of(finished, 0)
    column = pq.read_metadata(path).row_group(0).column(3)
    assert column.path_in_schema.startswith("tokens_0")
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a readable shard at .*train-00000-of-00003"):
        PairSet(finished.folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.json", '{"settings": {', "expected JSON in .*pairs.json, got: Expecting"),
        (
            "pairs.json",
            "[1]",
            r"in .*pairs.json, got none for \['settings', 'counts', 'pairs_per_sha",
        ),
        (
            "pairs.json",
            '{"settings": {}, "counts": {"pairs": 1}, "pairs_per_shard": []}',
            r"in .*pairs.json, got none for \['prompts', 'images', 'dropped'\]; copy it again, or",
        ),
        ("settings.json", "", "expected JSON in .*settings.json, got: Expecting"),
        (
            "counts/00001.json",
            "{}",
            r"in .*00001.json, got none for \['prompts', 'images', 'pairs'",
        ),
    ],
)
def test_damaged_json_is_named(finished, name, content, message):
    (finished.folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        if name == "pairs.json":
            PairSet(finished.folder)
        else:
            PairSetWriter(finished.folder, 3, SETTINGS).finish()


def test_a_folder_without_a_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a pair set in .*, got no pairs.json there; na"):
        PairSet(tmp_path)


def test_no_pairs_left_says_how_many_were_dropped_and_why(tmp_path):
    writer = PairSetWriter(tmp_path, 1, SETTINGS)
    writer.write(0, [], num_prompts=7, num_images=28, dropped={"equal": 5, "margin": 2})
    with pytest.raises(ValueError, match="got none of 28 pictures; dropped: 5 equal, 2 margin; dr"):
        writer.finish()


def test_tokens_of_another_policy_are_refused(finished):
    finished.check_fits(POLICY)
    message = r"expected 5 tokens per picture, as the policy draws, got 4 in tokens_0 of pair 0; ta"
    with pytest.raises(ValueError, match=message):
        finished.check_fits(SimpleNamespace(num_tokens=5, codebook_size=32))
    largest = max(drawn(0).tokens[[0, 2, 4, 3]].max(), drawn(2).tokens[[5, 3]].max()).item()
    finished.check_fits(SimpleNamespace(num_tokens=4, codebook_size=largest + 1))
    message = rf"expected tokens from 0 to {largest - 1}, the policy's codes, got {largest} in tok"
    with pytest.raises(ValueError, match=message):
        finished.check_fits(SimpleNamespace(num_tokens=4, codebook_size=largest))


def test_the_pair_with_a_wrong_token_is_named(tmp_path):
    tokens = torch.zeros(3, 2, 4, dtype=torch.int64)
    tokens[2, 1, 3] = -1
    pairs = write_pairs(tmp_path, 3, tokens=tokens)
    with pytest.raises(ValueError, match="got -1 in tokens_1 of pair 2; take the policy"):
        pairs.check_fits(POLICY)


# The reference's log-probabilities --------------------------------------------------------------

KEY = {"reference": "ab", "guidance": 5.0, "dtype": "float32"}


def test_stored_reference_comes_back_unchanged(tmp_path):
    assert load_reference(tmp_path, KEY) is None
    logps = torch.randn(7, 2)
    save_reference(tmp_path, logps, KEY)
    assert torch.equal(load_reference(tmp_path, dict(reversed(KEY.items()))), logps)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 1.0}, "expected log-probabilities of guidance 1.0, got those of 5.0; train"),
        ({"mode": "guided"}, "expected log-probabilities of mode 'guided', got those of None; tr"),
    ],
)
def test_reference_of_another_key_is_refused(tmp_path, change, message):
    save_reference(tmp_path, torch.zeros(1, 2), KEY)
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path, KEY | change)


def test_stored_reference_may_be_read_by_whoever_may_read_the_set(finished):
    save_reference(finished.folder, torch.zeros(1, 2), KEY)
    modes = [
        (finished.folder / name).stat().st_mode for name in ("reference.safetensors", "pairs.json")
    ]
    assert modes[0] == modes[1]


def test_unreadable_reference_is_refused(tmp_path):
    save_reference(tmp_path, torch.zeros(100, 2), KEY)
    path = tmp_path / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"reference.safetensors, got: .*; remove the file"):
        load_reference(tmp_path, KEY)


def test_hash_tells_tokens_texts_and_their_order_apart(tmp_path):
    tokens = torch.arange(24).view(3, 2, 4)
    same = [write_pairs(tmp_path / name, 3, tokens=tokens) for name in "ab"]
    assert tokens_hash(same[0]) == tokens_hash(same[1])
    others = [
        write_pairs(tmp_path / "c", 3, tokens=tokens.flip(1)),
        write_pairs(tmp_path / "d", 3, tokens=tokens.flip(0)),
        write_pairs(tmp_path / "e", 3, tokens=tokens, text="picture"),
    ]
    assert len({tokens_hash(pairs) for pairs in [same[0], *others]}) == 4
