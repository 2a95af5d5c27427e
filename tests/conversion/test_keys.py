"""Names of one format to another, each accounted for."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cotgen_pl.conversion.keys import (
    Conversion,
    KeyMap,
    check_coverage,
    rename_weights,
    renames_of,
)

SOURCE = Path("weights.pt")
TABLE = {
    ("blocks.{i}", "layers.{i}"): (("norm.{p}", "layernorm.{p}"), ("mlp.{rest}", "{rest}")),
    ("{side}", "model.{side}"): (("conv{j}.weight", "convs.{j}.weight"),),
}


def test_the_first_matching_rename_counts():
    names = KeyMap([(r"a\.(.+)", r"first.\1"), (r"a\.b", "second")])
    assert names.target("a.b") == "first.b"


def test_names_match_as_a_whole():
    names = KeyMap([("norm", "layernorm")])
    with pytest.raises(KeyError):
        names.target("norm.weight")


def test_a_rename_replaces_the_whole_name():
    # "a" alone would match first inside "ab" and leave a "b" behind
    assert KeyMap([("a|ab", "c")]).target("ab") == "c"


def test_dropped_names_have_no_target():
    assert KeyMap([(".*", "x")], dropped=[r".*\.position_ids"]).target("a.position_ids") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("blocks.12.norm.bias", "layers.12.layernorm.bias"),
        ("blocks.0.mlp.fc1.weight", "layers.0.fc1.weight"),
        ("decoder.conv3.weight", "model.decoder.convs.3.weight"),
    ],
)
def test_tables_of_names_read_both_ways(old, new):
    assert KeyMap(renames_of(TABLE)).target(old) == new
    assert KeyMap(renames_of(TABLE, back=True)).target(new) == old


@pytest.mark.parametrize(
    "name", ["blocks.x.norm.bias", "blocksx1.norm.bias", "middle.conv1.weight"]
)
def test_placeholders_stand_for_their_kind_alone(name):
    with pytest.raises(KeyError):
        KeyMap(renames_of(TABLE)).target(name)


def test_weights_are_renamed_and_what_is_left_out_is_told():
    weights = {"blocks.0.norm.bias": torch.ones(1), "ids": torch.zeros(1)}
    renamed, dropped = rename_weights(weights, KeyMap(renames_of(TABLE), ["ids"]), SOURCE, "a toy")
    assert list(renamed) == ["layers.0.layernorm.bias"]
    assert renamed["layers.0.layernorm.bias"] is weights["blocks.0.norm.bias"]
    assert dropped == ["ids"]


def test_unknown_names_are_refused_by_name():
    weights = {f"other.{i}": torch.ones(1) for i in range(5)}
    with pytest.raises(
        ValueError, match=r"a toy, got 5 unexpected names \(first: other.0, other.1"
    ):
        rename_weights(weights, KeyMap([]), SOURCE, "a toy")


def test_two_weights_never_become_one():
    weights = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="expected one weight for c, got two, b among them"):
        rename_weights(weights, KeyMap([("a|b", "c")]), SOURCE, "a toy")


@pytest.mark.parametrize(
    ("weights", "misfit"),
    [
        ({"weight": torch.ones(2, 3)}, "1 missing"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)},
            "1 unknown",
        ),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, "1 of another shape"),
    ],
)
def test_coverage_is_exact(weights, misfit):
    with pytest.raises(ValueError, match=misfit):
        check_coverage(nn.Linear(3, 2), weights, SOURCE)


def test_full_coverage_passes():
    check_coverage(nn.Linear(3, 2), nn.Linear(3, 2).state_dict(), SOURCE)


def test_a_summary_names_what_was_left_out():
    done = Conversion(Path("a"), Path("b"), num_read=3, num_written=2, dropped=["ids"])
    assert str(done).splitlines() == [
        "a -> b",
        "3 tensors read, 2 written, 1 left out",
        "left out on purpose: ids",
    ]
