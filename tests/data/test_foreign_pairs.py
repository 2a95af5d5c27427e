"""Preference data from elsewhere: formats, labels, pictures that do not decode, the cache."""

import io
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cotgen_pl.data import foreign_pairs
from cotgen_pl.data.foreign_pairs import ForeignPairs, fingerprint_encoder
from cotgen_pl.data.pairs import PairData
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.policies.janus import JanusPolicy
from tests.data.test_pairs import Recorder, fit
from tests.toys import make_policy

LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.9, 0.1), (None, None), (0, 1)]
BETTER = {0: 0, 1: 1, 3: 0, 5: 1}  # of the rows that have a preference, the better side


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    """An untrained Janus of 2 x 2 tokens and 16 x 16 px: its processor goes down to 14."""
    from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus

    folder = tmp_path_factory.mktemp("janus")
    tokenizer = build_tokenizer(["a red circle", "two cats"], 300)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    save_janus(build_janus(tokenizer, **sizes, grid=2, vq_levels=4), tokenizer, folder)
    return folder


@pytest.fixture
def policy(janus) -> JanusPolicy:
    return make_policy(janus).load()


def picture(row: int, side: int) -> Image.Image:
    generator = torch.Generator().manual_seed(10 * row + side)
    pixels = torch.randint(0, 256, (20 + row, 30, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def rows_of(labels=LABELS) -> list[dict]:
    return [
        {
            "caption": f"prompt {row}",
            "label_0": first,
            "label_1": second,
            "jpg_0": file_of(picture(row, 0)),
            "jpg_1": file_of(picture(row, 1)),
            "user_id": row,
        }
        for row, (first, second) in enumerate(labels)
    ]


def write_source(folder: Path, kind: str, rows: list[dict] | None = None) -> Path:
    rows = rows_of() if rows is None else rows
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "source.parquet")
        return folder / "source.parquet"
    if kind == "folder":
        (folder / "shards").mkdir()
        for number, part in enumerate((rows[:4], rows[4:])):
            pq.write_table(pa.Table.from_pylist(part), folder / "shards" / f"{number}.parquet")
        return folder / "shards"
    if kind == "saved":
        features = datasets.Dataset.from_list(rows).features.copy()
        features["jpg_0"] = features["jpg_1"] = datasets.Image()
        rows = [row | {name: {"bytes": row[name]} for name in ("jpg_0", "jpg_1")} for row in rows]
        datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
        return folder / "saved"
    return _write_lines(folder, rows)


def _write_lines(folder: Path, rows: list[dict]) -> Path:
    (folder / "pictures").mkdir()
    for number, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (folder / "pictures" / f"{number}{name}.png").write_bytes(row[name])
            row[name] = f"pictures/{number}{name}.png"
    path = folder / "source.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    return path


# What comes out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved", "jsonl"])
def test_labels_choose_and_pictures_become_the_policys_tokens(policy, tmp_path, kind):
    source = ForeignPairs(str(write_source(tmp_path / "source", kind)), batch_size=3)
    source.check(policy)
    pairs = PairSet(source.encode(policy))
    pairs.check_fits(policy)
    batch = pairs.batch(range(len(pairs)))
    assert [prompt.text for prompt in batch.prompts] == [f"prompt {row}" for row in BETTER]
    assert [prompt.index for prompt in batch.prompts] == list(BETTER)
    for side, tokens in enumerate((batch.chosen, batch.rejected)):
        expected = [
            picture(row, better if side == 0 else 1 - better) for row, better in BETTER.items()
        ]
        assert torch.equal(tokens, policy.encode(policy.prepare(expected)))
    assert not torch.equal(batch.chosen, batch.rejected)
    assert batch.scores.tolist() == torch.tensor([[1, 0], [1, 0], [0.9, 0.1], [1, 0]]).tolist()
    dropped = {"ties": 1, "without labels": 1}
    assert pairs.counts == {"prompts": 6, "images": 12, "pairs": 4, "dropped": dropped}


def test_stored_pictures_are_those_that_the_policy_sees(policy, tmp_path):
    source = ForeignPairs(str(write_source(tmp_path, "parquet")))
    [shard] = (source.encode(policy) / "data").iterdir()
    stored = Image.open(io.BytesIO(pq.read_table(shard)["jpg_1"][1].as_py()))
    expected = (policy.prepare([picture(1, 0)])[0] * 255).round().permute(1, 2, 0)
    assert stored.size == (16, 16)
    pixels = torch.frombuffer(bytearray(stored.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    assert torch.equal(pixels.float(), expected)


def test_own_column_names(policy, tmp_path):
    names = {"caption": "text", "jpg_0": "a", "jpg_1": "b", "label_0": "x", "label_1": "y"}
    rows = [{names.get(name, name): value for name, value in row.items()} for row in rows_of()]
    path = write_source(tmp_path, "parquet", rows)
    source = ForeignPairs(str(path), None, "text", "a", "b", "x", "y")
    source.check(policy)
    assert len(PairSet(source.encode(policy))) == 4


def test_prepare_keeps_the_aspect_and_pads(policy):
    white = Image.new("L", (60, 30), 255)
    [prepared] = policy.prepare([white])
    assert prepared.shape == (3, 16, 16) and prepared.dtype == torch.float32
    bars = torch.cat([prepared[:, :1], prepared[:, -1:]])
    assert torch.allclose(bars, torch.tensor(127 / 255))
    assert torch.equal(prepared[:, 4:12], torch.ones(3, 8, 16))


def test_prepare_leaves_a_picture_of_the_right_size_as_it_is(policy):
    image = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    expected = torch.tensor(list(image.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    assert torch.allclose(policy.prepare([image])[0], expected)


# The cache --------------------------------------------------------------------------------------


def test_pictures_are_encoded_once(policy, tmp_path, monkeypatch):
    source = ForeignPairs(str(write_source(tmp_path, "parquet")))
    folder = source.encode(policy)
    assert folder.parent == tmp_path / "source.parquet.tokens"
    monkeypatch.setattr(foreign_pairs, "encode_pairs", None)
    assert source.encode(policy) == folder
    elsewhere = ForeignPairs(source.path, cache=str(tmp_path / "cache"))
    with pytest.raises(TypeError):
        elsewhere.encode(policy)


def test_another_source_or_encoder_makes_another_set(policy, janus, tmp_path):
    source = ForeignPairs(str(write_source(tmp_path, "parquet")))
    folder = source.encode(policy)
    with torch.no_grad():
        for weight in policy.janus.model.language_model.parameters():
            weight.add_(1)
    assert source.encode(policy) == folder, "what trains is no part of the key"
    other = make_policy(janus).load()
    with torch.no_grad():
        other.janus.model.vqmodel.quantize.embedding.weight.neg_()
    assert fingerprint_encoder(other) != fingerprint_encoder(policy)
    assert source.encode(other) != folder
    write_source(tmp_path, "parquet", rows_of(LABELS[:2]))
    assert source.encode(policy) != folder


def test_interrupted_encoding_goes_on_behind_its_finished_shards(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign_pairs, "ROWS_PER_SHARD", 2)
    source = ForeignPairs(str(write_source(tmp_path, "jsonl")), batch_size=1)
    whole = PairSet(source.encode(policy)).batch(range(4))
    again = ForeignPairs(source.path, cache=str(tmp_path / "again"), batch_size=1)
    encode, prompts = foreign_pairs.encode_pairs, []

    def record(candidates, policy):
        prompts.extend(candidate.prompt.text for candidate in candidates)
        if prompts.count("prompt 3") == 1:
            raise RuntimeError("killed")
        return encode(candidates, policy)

    monkeypatch.setattr(foreign_pairs, "encode_pairs", record)
    with pytest.raises(RuntimeError, match="killed"):
        again.encode(policy)
    prompts.clear()
    prompts.append("prompt 3")
    pairs = PairSet(again.encode(policy))
    assert prompts == ["prompt 3", "prompt 3", "prompt 5"]
    batch = pairs.batch(range(4))
    assert torch.equal(batch.chosen, whole.chosen)
    assert pairs.counts["pairs"] == 4 and pairs.counts["dropped"]["ties"] == 1


# In training ------------------------------------------------------------------------------------


class Learner(Recorder):
    """Reads a real policy's weights where modules do."""

    def configure_model(self):
        self.policy.load()


def test_a_run_trains_on_the_encoded_pairs(janus, tmp_path):
    source = ForeignPairs(str(write_source(tmp_path, "jsonl", rows_of([(1, 0)] * 5))))
    module = Learner(make_policy(janus))
    batches = fit(module, PairData(source=source, pairs_per_update=2, epochs=2))
    assert [len(batch) for batch in batches] == [2] * 4
    assert len({row for batch in batches[:2] for row in batch}) == 4


def test_mistakes_in_a_source_stop_a_run_before_weights_load(janus, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusPolicy, "load", lambda self: pytest.fail("weights loaded"))
    rows = rows_of()
    rows[3]["caption"] = "word " * 500
    source = ForeignPairs(str(write_source(tmp_path, "parquet", rows)))
    with pytest.raises(ValueError, match="expected a prompt of at most"):
        fit(Learner(make_policy(janus)), PairData(source=source, pairs_per_update=2))


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl"])
def test_pictures_that_do_not_decode_are_counted_and_named(policy, tmp_path, kind):
    rows = rows_of([(1, 0)] * 4)
    rows[1]["jpg_0"] = rows[1]["jpg_0"][:-200]
    rows[2]["jpg_0"] = rows[2]["jpg_1"] = b"no picture"
    path = write_source(tmp_path / "source", kind, rows)
    place = rf"{path}, row 2 jpg_0 \(.*{path}, row 3 jpg_0 \(.*{path}, row 3 jpg_1 \("
    message = rf"got 3 that do not in 4 rows: {place}.*; repair them, or .* skip_unreadable: true"
    with pytest.raises(ValueError, match=message):
        ForeignPairs(str(path)).encode(policy)
    with pytest.warns(UserWarning, match=rf"got 3 that do not .*{place}.*; their pairs are left"):
        pairs = PairSet(ForeignPairs(str(path), skip_unreadable=True).encode(policy))
    assert len(pairs) == 2
    assert pairs.counts["dropped"] == {"unreadable pictures": 2}


def test_a_picture_that_is_not_there_is_unreadable(policy, tmp_path):
    path = write_source(tmp_path, "jsonl")
    (tmp_path / "pictures" / "0jpg_1.png").unlink()
    with pytest.raises(ValueError, match=r"got 1 that do not .*, row 1 jpg_1 \(.*No such file"):
        ForeignPairs(str(path)).encode(policy)


def test_missing_columns_are_named_before_weights_load(janus, tmp_path):
    path = write_source(tmp_path, "parquet")
    message = r"got \['caption', .*\] without \['image'\]; name the columns"
    with pytest.raises(ValueError, match=message):
        ForeignPairs(str(path), picture_0="image").check(make_policy(janus))


def test_a_row_without_a_column_is_named(policy, tmp_path):
    path = write_source(tmp_path, "jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    del rows[2]["label_1"]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r"source.jsonl, row 3: .* got a row without 'label_1'; give"
    ):
        ForeignPairs(str(path)).encode(policy)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label_1", "1.0", "expected a number in column 'label_1', got '1.0'; correct the row"),
        ("jpg_1", 7, "expected a picture in column 'jpg_1', .*, got int; correct the row"),
        (
            "jpg_0",
            {"path": 7},
            "expected a picture in column 'jpg_0', .*, got int; correct the row",
        ),
    ],
)
def test_a_row_with_a_value_of_another_kind_is_named(policy, tmp_path, column, value, message):
    path = write_source(tmp_path, "jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    rows[1][column] = value
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"source.jsonl, row 2: {message}"):
        ForeignPairs(str(path)).encode(policy)


def test_broken_pages_are_named(policy, tmp_path):
    path = write_source(tmp_path, "parquet")
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(k) for k in range(group.num_columns)]
    [column] = [column for column in columns if column.path_in_schema == "jpg_0"]
    start, size = column.dictionary_page_offset, column.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    message = (
        r"(?s)source.parquet, behind row 0: expected rows that can be read, got: .*; download it"
    )
    with pytest.raises(ValueError, match=message):
        ForeignPairs(str(path)).encode(policy)


def test_a_cache_inside_the_source_is_refused(janus, tmp_path):
    path = write_source(tmp_path, "folder")
    source = ForeignPairs(str(path), cache=str(path / "tokens"))
    with pytest.raises(
        ValueError, match=r"expected a cache outside of the source .*shards/tokens;"
    ):
        source.check(make_policy(janus))


@pytest.mark.parametrize("caption", ["", "  ", None])
def test_a_row_without_a_prompt_is_named(janus, tmp_path, caption):
    rows = rows_of()
    rows[1]["caption"] = caption
    path = write_source(tmp_path, "parquet", rows)
    with pytest.raises(
        ValueError, match=r"source.parquet, row 2: expected a prompt in column 'caption"
    ):
        ForeignPairs(str(path)).check(make_policy(janus))


@pytest.mark.parametrize("line", ["{", "[1]"])
def test_a_malformed_line_is_named(janus, tmp_path, line):
    path = write_source(tmp_path, "jsonl")
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=r"source.jsonl:12: expected a JSON object, got"):
        ForeignPairs(str(path)).check(make_policy(janus))


def test_no_source_an_empty_one_and_a_broken_one_are_refused(policy, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a .parquet or .jsonl file, .*nowhere with neit"
    ):
        ForeignPairs(str(tmp_path / "nowhere")).check(policy)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="got an empty source; name another"):
        ForeignPairs(str(tmp_path / "empty.jsonl")).encode(policy)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"expected a Parquet file at .*broken.parquet, got"):
        ForeignPairs(str(tmp_path / "broken.parquet")).check(policy)


def test_nothing_but_ties_says_so(policy, tmp_path):
    path = write_source(tmp_path, "parquet", rows_of([(0.5, 0.5)] * 3))
    with pytest.raises(ValueError, match="got none of 6 pictures; dropped: 3 ties; "):
        ForeignPairs(str(path)).encode(policy)
