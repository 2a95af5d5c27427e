"""Prompts as a tree: what several of them begin with is read once.

A position's hidden state depends on the tokens up to it and on nothing else, so equal beginnings,
of prompts as of unconditional rows, are one node of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefixes:
    """P rows of tokens by their N distinct beginnings, numbered as they first appear."""

    ids: Tensor
    """Each node's last token, [N] int64."""
    positions: Tensor
    """Its place in its row, [N] int64."""
    nodes: Tensor
    """Each row's nodes from its start, [P, L] int64; past its end its last node again."""
    lengths: Tensor
    """Of the rows, [P] int64."""
    places: Tensor
    """Where a node first stands in `nodes`, flattened, [N] int64."""

    @property
    def ends(self) -> Tensor:
        """Each row's last node, [P]."""
        return self.nodes[:, -1]

    @property
    def padding(self) -> Tensor:
        """How much shorter than the longest each row is, [P]."""
        return self.nodes.shape[1] - self.lengths

    def right_aligned(self) -> Tensor:
        """`nodes` with each row's last node in the last column, [P, L]; before its start node 0."""
        columns = torch.arange(self.nodes.shape[1], device=self.nodes.device)
        columns = columns - self.padding[:, None]
        return self.nodes.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)


def find_prefixes(rows: Sequence[Sequence[int]], device: torch.device) -> Prefixes:
    """Find the distinct beginnings of rows of token ids, none of which is empty."""
    known: dict[tuple[int, int], int] = {}  # (node before, token) to node
    places: list[int] = []
    positions: list[int] = []
    longest = max(map(len, rows))
    table: list[list[int]] = []
    for row in rows:
        node, path = -1, []
        for position, token in enumerate(row):
            step = node, token
            if step not in known:
                known[step] = len(known)
                places.append(len(table) * longest + position)
                positions.append(position)
            node = known[step]
            path.append(node)
        table.append(path + [node] * (longest - len(row)))
    return Prefixes(
        ids=torch.tensor([token for _, token in known], device=device),
        positions=torch.tensor(positions, device=device),
        nodes=torch.tensor(table, device=device),
        lengths=torch.tensor([len(row) for row in rows], device=device),
        places=torch.tensor(places, device=device),
    )
