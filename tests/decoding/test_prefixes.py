import torch

from cotgen_pl.decoding.prefixes import find_prefixes

ROWS = [[1, 5, 6, 9], [1, 5, 9], [1, 5, 6, 9, 9], [1, 5, 9]]
CPU = torch.device("cpu")


def spelled(prefixes, nodes):
    """The last tokens of nodes, by which a row can be read again."""
    return prefixes.ids[nodes].tolist()


def test_equal_beginnings_are_one_node():
    prefixes = find_prefixes(ROWS, CPU)
    beginnings = {tuple(row[:end]) for row in ROWS for end in range(1, len(row) + 1)}
    assert len(prefixes.ids) == len(beginnings) == 6
    assert len(prefixes.positions) == len(prefixes.places) == 6


def test_the_same_token_elsewhere_is_another_node():
    prefixes = find_prefixes([[1, 9, 9], [9, 9]], CPU)
    assert len(prefixes.ids) == 5


def test_rows_are_read_back_from_either_side():
    prefixes = find_prefixes(ROWS, CPU)
    assert prefixes.lengths.tolist() == [4, 3, 5, 3]
    assert prefixes.padding.tolist() == [1, 2, 0, 2]
    for row, left, right, end in zip(
        ROWS, prefixes.nodes, prefixes.right_aligned(), prefixes.ends, strict=True
    ):
        assert spelled(prefixes, left[: len(row)]) == row
        assert spelled(prefixes, right[-len(row) :]) == row
        assert prefixes.positions[left[: len(row)]].tolist() == list(range(len(row)))
        assert end == left[len(row) - 1]


def test_each_node_is_found_at_its_place():
    prefixes = find_prefixes(ROWS, CPU)
    assert prefixes.nodes.flatten()[prefixes.places].tolist() == list(range(len(prefixes.ids)))


def test_unconditional_rows_share_their_pads():
    rows = [[1, *[0] * (length - 2), 7] for length in (15, 17, 19)]
    assert len(find_prefixes(rows, CPU).ids) == 18 + 3
